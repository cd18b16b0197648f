"""Statistics of a tidy frame of several runs: utility with intervals, paired differences, costs, Pareto fronts.

A frame has a row for each (scenario, task, epsilon, arm, seed, round, client, metric) and its value. Epsilon is the
budget that an arm ran under. It is null for an arm that does not depend on one; its rows serve every epsilon. Client -1
is the server. Two kinds of rows are added to the records of runs: `privacy/epsilon` of the server is 0 for an arm that
releases nothing and infinity for one without a guarantee, and `data/pooled` marks the baseline with one client for all
clients' text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedsynth.evaluation.utility import bootstrap, paired_difference

METRICS = {
    "classification": ("accuracy", "macro_f1"),
    "instructions": ("exact_match", "field_match", "rouge_l"),
    "choice": ("accuracy", "macro_f1", "parsed_accuracy", "readable"),
}
COLUMNS = ("scenario", "task", "epsilon", "arm", "seed", "round", "client", "metric", "value")
CELL = ["scenario", "task", "epsilon", "arm"]


@dataclass(frozen=True)
class Terms:
    """Further inputs of a scenario's tables.

    Attributes:
        baseline: The arm that others are compared with.
        metric: The metric that comes first.
        tuned_on: Clients on which settings were tuned; the tables have figures without them, too.
    """

    baseline: str
    metric: str
    tuned_on: tuple[int, ...] = ()


def utility(frame: pd.DataFrame, terms: Mapping[str, Terms]) -> pd.DataFrame:
    """One row per (scenario, epsilon, arm, metric), each arm in its own last round.

    `mean` and `std` are over seeds, of the clients' means; `low` and `high` bound the mean with 95 % (bootstrap over
    seeds, then clients); `held_out_` leaves out `Terms.tuned_on`. `difference`, with its own bounds, is to the baseline
    at equal epsilon, paired by (seed, client); `better` is the share of `pairs` above 0. An arm that serves every
    epsilon has a row at each epsilon of the baseline. A figure that does not exist is null: the deviation of one seed,
    the difference of a baseline to itself, and any difference with a pooled arm, which has another test set.
    """
    rows = []
    for scenario, whole in frame.groupby("scenario", sort=False):
        known = terms[str(scenario)]
        pooled = set(whole.loc[whole["metric"] == "data/pooled", "arm"])
        for cell, own in _cells(whole):
            task, epsilon, arm = cell["task"], cell["epsilon"], cell["arm"]
            last = own[(own["round"] == own["round"].max()) & (own["client"] >= 0)]
            for at in _compared_at(whole, epsilon, known.baseline):
                for metric in (known.metric, *(m for m in METRICS[task] if m != known.metric)):
                    figures = last[last["metric"] == metric]
                    if not len(figures):
                        continue
                    row = {"scenario": scenario, "task": task, "epsilon": at, "arm": arm, "metric": metric}
                    row |= _level(figures, set() if arm in pooled else set(known.tuned_on))
                    paired = arm != known.baseline and not pooled & {arm, known.baseline}
                    rows.append(row | _difference(_at(whole, at), arm, known, metric, paired=paired))
    return pd.DataFrame(rows)


def _compared_at(whole: pd.DataFrame, epsilon: float, baseline: str) -> list[float]:
    """The epsilons at which an arm is compared with the baseline."""
    where = whole.loc[whole["arm"] == baseline, "epsilon"].unique()
    return list(where) if math.isnan(epsilon) and len(where) else [epsilon]


def _at(whole: pd.DataFrame, epsilon: float) -> pd.DataFrame:
    """The rows at an epsilon: of arms under it, and of those that do not depend on one."""
    return whole[whole["epsilon"].isna() | (whole["epsilon"] == epsilon)]


def _level(figures: pd.DataFrame, tuned_on: set[int]) -> dict[str, float | int]:
    low, high = bootstrap(figures.set_index(["seed", "client"])["value"])
    per_seed = figures.groupby("seed")["value"].mean()
    found = {
        "mean": float(per_seed.mean()),
        "std": float(per_seed.std(ddof=1)),
        "low": low,
        "high": high,
        "seeds": len(per_seed),
        "clients": int(figures["client"].nunique()),
    }
    held = figures[~figures["client"].isin(tuned_on)].groupby("seed")["value"].mean() if tuned_on else per_seed[:0]
    return {**found, "held_out_mean": float(held.mean()), "held_out_std": float(held.std(ddof=1))}


DIFFERENCE = ("difference", "difference_low", "difference_high", "better", "pairs")


def _difference(rows: pd.DataFrame, arm: str, terms: Terms, metric: str, *, paired: bool) -> dict[str, float | str]:
    found: dict[str, float | str] = {"baseline": terms.baseline}
    for prefix, left_out in (("", ()), ("held_out_", terms.tuned_on)):
        figures: tuple[float, ...] = (math.nan,) * len(DIFFERENCE)
        kept = rows[~rows["client"].isin(left_out)]
        if paired and (left_out or not prefix) and terms.baseline in set(rows["arm"]):
            with suppress(ValueError):  # no client answered in both, or all clients were tuned on
                figures = tuple(asdict(paired_difference(kept, arm, terms.baseline, metric=metric)).values())
        found |= {f"{prefix}{name}": value for name, value in zip(DIFFERENCE, figures, strict=True)}
    return found


def costs(frame: pd.DataFrame) -> pd.DataFrame:
    """One row of costs per (scenario, epsilon, arm).

    `guarantee` is "dp" or "none"; `epsilon_stated` and `delta` are the largest that any client of any seed stated, 0 if
    nothing is released, null without a guarantee. The rest are means over seeds of the sum over clients and rounds:
    `bytes_up` and `bytes_down` of messages, `client_seconds`, and `tokens_read` and `tokens_written` of the server's
    LLM; null if runs did not record them. `pooled` marks the baseline that no federation could run.
    """
    rows = []
    for cell, own in _cells(frame):
        stated, delta = (own.loc[own["metric"] == f"privacy/{name}", "value"] for name in ("epsilon", "delta"))
        open_ = bool(np.isinf(stated).any())
        row = cell | {"guarantee": "none" if open_ else "dp"}
        row |= {"epsilon_stated": math.nan if open_ else float(stated.max()) if len(stated) else 0.0}
        row |= {"delta": math.nan if open_ else float(delta.max()) if len(delta) else 0.0}
        for name, metric in COSTS.items():
            noted = own[own["metric"] == metric]
            row[name] = float(noted.groupby("seed")["value"].sum().mean()) if len(noted) else math.nan
        rows.append(row | {"pooled": bool((own["metric"] == "data/pooled").any())})
    return pd.DataFrame(rows)


COSTS = {
    "bytes_up": "bytes/up",
    "bytes_down": "bytes/down",
    "client_seconds": "seconds/client",
    "tokens_read": "llm/tokens_read",
    "tokens_written": "llm/tokens_written",
}


def _cells(frame: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    for cell, own in frame.groupby(CELL, sort=False, dropna=False):
        yield dict(zip(CELL, cell, strict=True)), own


def points(frame: pd.DataFrame, metrics: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Utility against costs, one row per (scenario, epsilon, arm), for plots.

    Columns: `scenario`, `task`, `arm`, `budget` (null if an arm does not depend on one), `guarantee`, `epsilon` (the
    largest stated; 0 if nothing is released, infinite without a guarantee), `bytes` (up and down, all clients, mean
    over seeds), `metric`, `utility` with its 95 % interval `low` to `high`, and `pooled`.

    Args:
        frame: A tidy frame.
        metrics: The metric by scenario; by default accuracy or exact match.
    """
    rows = []
    found = costs(frame)
    for (cell, own), (_, cost) in zip(_cells(frame), found.iterrows(), strict=True):
        metric = (metrics or {}).get(cell["scenario"], METRICS[cell["task"]][0])
        chosen = (own["round"] == own["round"].max()) & (own["client"] >= 0) & (own["metric"] == metric)
        values = own[chosen].set_index(["seed", "client"])["value"]
        if not len(values):
            continue
        low, high = bootstrap(values)
        rows.append(
            {
                "scenario": cell["scenario"],
                "task": cell["task"],
                "arm": cell["arm"],
                "budget": cell["epsilon"],
                "guarantee": cost["guarantee"],
                "epsilon": math.inf if cost["guarantee"] == "none" else cost["epsilon_stated"],
                "bytes": cost["bytes_up"] + cost["bytes_down"],
                "metric": metric,
                "utility": float(values.groupby(level="seed").mean().mean()),
                "low": low,
                "high": high,
                "pooled": cost["pooled"],
            }
        )
    return pd.DataFrame(rows)


def pareto(found: pd.DataFrame) -> pd.DataFrame:
    """`points` with two more columns: true if no arm of the scenario has at least its utility for no more cost.

    `pareto_epsilon` and `pareto_bytes` compare point estimates, not intervals. Two arms alike in both do not dominate
    each other. Pooled arms take no part: their cost is that all text is in one place.
    """
    marked = found.copy()
    for cost in ("epsilon", "bytes"):
        marked[f"pareto_{cost}"] = [_undominated(point, found, cost) for _, point in found.iterrows()]
    return marked


def _undominated(point: pd.Series, found: pd.DataFrame, cost: str) -> bool:
    if point["pooled"] or math.isnan(point[cost]):
        return False
    others = found[(found["scenario"] == point["scenario"]) & ~found["pooled"].astype(bool)]
    as_good = (others["utility"] >= point["utility"]) & (others[cost] <= point[cost])
    better = (others["utility"] > point["utility"]) | (others[cost] < point[cost])
    return not bool((as_good & better).any())
