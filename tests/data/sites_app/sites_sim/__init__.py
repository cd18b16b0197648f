"""A stand-in for the Flower app of runs on sites."""
