"""Language models by role: their location and loading, and how they read, write and embed text."""
