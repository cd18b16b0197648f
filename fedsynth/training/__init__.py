"""Models that learn: generators under DP-SGD, adapters on free text, classifiers; and the checks before a charge."""
