"""The way of requests to clients and of replies back, through crashes and cut connections."""
