"""The commands of a site, `fedsynth site ...`, a module each."""
