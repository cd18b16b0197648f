"""Labelled text in rows: reading from files, sources and the simulated world, and division among clients."""
