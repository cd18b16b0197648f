"""What came of it: utility, instructions answered, fidelity of synthetic text, what an attacker gets."""
