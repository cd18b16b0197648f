"""A scenario on one machine: checked, launched in Flower's simulation, watched, read."""
