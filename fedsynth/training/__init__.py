"""Models that learn: generators under DP-SGD, adapters on free text, classifiers; and what is checked before a charge."""
