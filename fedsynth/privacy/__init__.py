"""Differential privacy: plan, ledger, noise, release."""
