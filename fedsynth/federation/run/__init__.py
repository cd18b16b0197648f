"""What a run writes down: its log, its directory and tables, what it says of privacy, and what it goes on from."""
