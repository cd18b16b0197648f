"""Grids of scenarios, epsilons and seeds: run or resumed, read as one table."""
