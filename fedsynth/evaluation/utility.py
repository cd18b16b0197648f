"""How good a task model is, and how much better than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
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


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its 95 % interval; `better` is the share of pairs above 0."""

    mean: float
    low: float
    high: float
    better: float
    pairs: int


def paired_difference(
    metrics: pd.DataFrame, arm: str, baseline: str, *, metric: str = "accuracy", resamples: int = 10_000, seed: int = 0
) -> Difference:
    """How much better an arm is than a baseline, pair by pair of (seed, client), each arm in its own last round.

    The interval is a percentile bootstrap over seeds, then clients within each drawn seed: clients of one seed share
    the LLM's random draws, so they are not independent.

    Args:
        metrics: Tidy, as in `metrics.parquet`.
        arm: The one.
        baseline: The other.
        metric: Which figure.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: If the two arms have no (seed, client) in common.
    """
    last = metrics.groupby("arm")["round"].transform("max")
    chosen = metrics[(metrics["metric"] == metric) & (metrics["round"] == last)]
    table = chosen.pivot_table(index=["seed", "client"], columns="arm", values="value")
    if not {arm, baseline} <= set(table.columns) or table[[arm, baseline]].dropna().empty:
        raise ValueError(
            f"no pairs of arms {arm!r} and {baseline!r} in metric {metric!r}; arms: {sorted(table.columns)}"
        )
    gaps = (table[arm] - table[baseline]).dropna()
    by_seed = [group.to_numpy() for _, group in gaps.groupby(level="seed")]
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = (by_seed[i] for i in rng.integers(len(by_seed), size=len(by_seed)))
        means.append(np.concatenate([g[rng.integers(len(g), size=len(g))] for g in drawn]).mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(gaps.mean()), float(low), float(high), float((gaps > 0).mean()), len(gaps))


def mean_interval(values: pd.Series[float], *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean: percentile bootstrap over seeds, then clients within each drawn seed.

    With one seed it says how clients differ, and nothing of how seeds do.

    Args:
        values: Indexed by (seed, client).
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: If there is no value.
    """
    groups = [group.to_numpy(dtype=float) for _, group in values.groupby(level="seed")]
    if not groups:
        raise ValueError("an interval needs at least one value")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(groups), size=(resamples, len(groups)))
    totals, counts = np.zeros(resamples), np.zeros(resamples)
    for place in drawn.T:
        for number, group in enumerate(groups):
            hit = np.flatnonzero(place == number)
            totals[hit] += group[rng.integers(len(group), size=(len(hit), len(group)))].sum(axis=1)
            counts[hit] += len(group)
    low, high = np.percentile(totals / counts, [2.5, 97.5])
    return float(low), float(high)
