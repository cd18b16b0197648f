"""How requests reach clients and answers come back, whatever fails on the way."""
