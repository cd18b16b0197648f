"""Texts that a model writes: asked for, judged, kept or dropped, and learnt from."""
