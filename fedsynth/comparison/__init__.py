"""Grids of scenarios, epsilons and seeds: run or continued, read as one table."""
