"""The command `fedsynth`."""
