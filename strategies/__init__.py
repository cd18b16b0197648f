"""What a server asks of its clients, method by method."""
