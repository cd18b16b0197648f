"""Results: utility, instructions answered, fidelity of synthetic text, and an attacker's gain."""
