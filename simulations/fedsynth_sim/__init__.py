"""The two halves of the Flower App: a server's and a client's."""
