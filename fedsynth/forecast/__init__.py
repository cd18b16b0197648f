"""The forecast of a planned run (privacy, bytes, memory, time) for `fedsynth check`."""
