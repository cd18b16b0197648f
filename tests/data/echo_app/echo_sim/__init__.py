"""A Flower app for tests of the launcher."""
