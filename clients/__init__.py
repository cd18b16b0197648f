"""A client's side of each request: checks, training, sampling and sealed replies."""
