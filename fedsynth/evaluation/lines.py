"""What no model is needed for: the figures of a random answer, and of the commonest label throughout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from fedsynth.corpus import LETTERS, Corpus

CHANCE, MAJORITY = "chance", "majority"  # before the metric's name in a tidy frame: `chance/accuracy`
WORDS = {CHANCE: "chance", MAJORITY: "commonest test label"}


def lines_of(test: Corpus, labels: Sequence[str]) -> dict[str, float]:
    """The lines of one client's test set, by `LINE/METRIC`; none without a known label among its answers.

    Chance is the expected accuracy of one of the labels (or of a row's own options) drawn evenly. The majority line
    knows the test labels and always answers the commonest: no model that ignores the text has a higher accuracy.
    Macro-F1 is over the labels that occur, as in `utility.scores`; that of a random answer has no simple form.

    Args:
        test: Test text whose labels are declared public.
        labels: The public label list; without use if rows have options of their own.
    """
    names = LETTERS if test.options is not None else labels
    known = set(names)
    counts = Counter(answer for answer in test.answers if answer in known)
    if not counts:
        return {}
    total, most = len(test), max(counts.values())
    sizes = [len(own) for own in test.options] if test.options is not None else [len(labels)] * total
    right = sum(1 / size for size, answer in zip(sizes, test.answers, strict=True) if answer in known)
    return {
        f"{CHANCE}/accuracy": right / total,
        f"{MAJORITY}/accuracy": most / total,
        # Precision is most / total, recall 1; the F1 of every other label that occurs is 0.
        f"{MAJORITY}/macro_f1": 2 * most / (most + total) / len(counts),
    }


def recorded(metrics: pd.DataFrame, metric: str, line: str) -> float | None:
    """The mean over seeds of a line's mean over clients, of the first arm that recorded one; None if none did.

    Arms with the same data have the same lines; an arm with all clients' text in one place is not asked.

    Args:
        metrics: A tidy frame.
        metric: A task metric.
        line: `CHANCE` or `MAJORITY`.
    """
    rows = metrics[metrics["metric"] == f"{line}/{metric}"]
    for _, own in rows.groupby("arm", sort=False):
        return float(own.groupby("seed")["value"].mean().mean())
    return None
