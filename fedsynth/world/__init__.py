"""A small simulated world in which the methods truly run, offline."""
