"""Texts that a model writes: prompts for them, their judgement and curation, and learning from them."""
