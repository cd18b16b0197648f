"""Tiny models, made by `simulations/assets/make.py` from the public part of the simulated world."""
