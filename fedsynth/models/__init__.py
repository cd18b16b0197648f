"""Language models by role: where they lie, how they load, read, write and embed text."""
