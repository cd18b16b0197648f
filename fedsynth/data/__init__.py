"""Labelled text in rows: read from files, sources and the simulated world, and divided among clients."""
