"""The Flower App that the launcher submits."""
