"""Rounds of requests and replies between server and clients, and the files that a run writes."""
