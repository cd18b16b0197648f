"""How good a task model is."""

from __future__ import annotations

from collections.abc import Sequence

from sklearn.metrics import accuracy_score, f1_score


def scores(truth: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, and macro-F1 over the labels that occur in the truth, both in 0..1."""
    present = [label for label in labels if label in set(truth)]
    if not present:
        return {"accuracy": 0.0, "macro_f1": 0.0}
    return {
        "accuracy": float(accuracy_score(truth, answers)),
        "macro_f1": float(f1_score(truth, answers, labels=present, average="macro", zero_division=0.0)),
    }
