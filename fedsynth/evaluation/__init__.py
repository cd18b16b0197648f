"""What came of it: utility of the task models."""
