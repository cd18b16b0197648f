"""What a client does when asked."""
