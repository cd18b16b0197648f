"""What server and clients say to each other, round by round, and what a run writes down."""
