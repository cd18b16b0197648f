"""The methods: each strategy's requests to clients and its work on their replies."""
