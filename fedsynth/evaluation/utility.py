"""Utility of a task model, and its advantage over another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

# Of five pairs that all have one sign, chance makes as many in 2 / 2^5 = 6 % of cases; of six, in 3 % (sign test).
FEWEST_PAIRS = 6


def scores(truth: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, and macro-F1 over the labels that occur in the truth, both in 0..1."""
    from sklearn.metrics import accuracy_score, f1_score

    present = [label for label in labels if label in set(truth)]
    if not present:
        return {"accuracy": 0.0, "macro_f1": 0.0}
    return {
        "accuracy": float(accuracy_score(truth, answers)),
        "macro_f1": float(f1_score(truth, answers, labels=present, average="macro", zero_division=0.0)),
    }


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its 95 % interval; `better` is the share of pairs above 0.

    Below `FEWEST_PAIRS` pairs the interval's ends are NaN: it would span two or three values, and look like knowledge.
    """

    mean: float
    low: float
    high: float
    better: float
    pairs: int

    def __repr__(self) -> str:
        ends = "no interval" if math.isnan(self.low) else f"95 % {self.low:+.3f} to {self.high:+.3f}"
        return f"Difference({self.mean:+.3f}, {ends}, {self.pairs} pair{'s' if self.pairs > 1 else ''})"


def paired_difference(
    metrics: pd.DataFrame, arm: str, baseline: str, *, metric: str = "accuracy", resamples: int = 10_000, seed: int = 0
) -> Difference:
    """The advantage of an arm over a baseline, by pairs of (seed, client), each arm in its own last round.

    The interval is a percentile bootstrap over seeds, then clients within each drawn seed: clients of one seed share
    the LLM's random draws, so they are not independent.

    Args:
        metrics: A tidy frame, as in `metrics.parquet`.
        arm: Name of the arm.
        baseline: Name of the baseline.
        metric: Name of the metric.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the two arms have no (seed, client) in common.
    """
    found = gaps(metrics, arm, baseline, metric=metric)
    low, high = bootstrap(found, resamples=resamples, seed=seed)
    return Difference(float(found.mean()), low, high, float((found > 0).mean()), len(found))


def gaps(metrics: pd.DataFrame, arm: str, baseline: str, *, metric: str = "accuracy") -> pd.Series[float]:
    """The differences of `paired_difference`, by (seed, client).

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
    return (table[arm] - table[baseline]).dropna()


def bootstrap(values: pd.Series, *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean: seeds are drawn with replacement, then clients within each drawn seed.

    Of fewer than `FEWEST_PAIRS` values both ends are NaN.

    Args:
        values: Values by (seed, client); seeds may have different numbers of clients. With one seed the interval covers
            the differences of clients, not those of seeds.
        resamples: Number of bootstrap samples.
        seed: Seed of the draws.

    Raises:
        ValueError: If there is no value.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    if len(values) < FEWEST_PAIRS:
        return math.nan, math.nan
    by_seed = [group.to_numpy() for _, group in values.groupby(level="seed")]
    sizes = np.array([len(group) for group in by_seed])
    table = np.zeros((len(by_seed), sizes.max()))
    for row, group in zip(table, by_seed, strict=True):
        row[: len(group)] = group
    rng, means = np.random.default_rng(seed), []
    block = max(1, 2**20 // table.shape[1])  # resamples at once: their draws stay below some megabytes
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        total, drawn_clients = np.zeros(count), np.zeros(count)
        for _ in by_seed:
            drawn = rng.integers(len(by_seed), size=count)
            clients = rng.integers(sizes[drawn][:, None], size=(count, table.shape[1]))
            counted = np.arange(table.shape[1]) < sizes[drawn][:, None]
            total += (table[drawn[:, None], clients] * counted).sum(axis=1)
            drawn_clients += sizes[drawn]
        means.append(total / drawn_clients)
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
