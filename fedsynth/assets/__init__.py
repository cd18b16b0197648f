"""Tiny models, made by `fedsynth pretrain` from the public part of the simulated world."""
