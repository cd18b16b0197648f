"""Training of generators under DP-SGD, adapters on free text and classifiers; the checks before a charge."""
