"""A comparison on a terminal: lines of progress, then tables of utility and costs for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsynth.federation.run.privacy_report import up
from fedsynth.federation.run.tables import NOT_ITS_OWN

HEADS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "parsed_accuracy": "accuracy of the written answer",
    "readable": "readable answers",
    "exact_match": "exact match",
    "field_match": "field match",
    "rouge_l": "ROUGE-L",
}
FEW_SEEDS = 3
NOTES = (
    "Mean and deviation over seeds of the clients' means, 95 % below (bootstrap over seeds, then clients); held-out "
    "leaves out clients on which settings were tuned; differences are paired by (seed, client), at equal epsilon.",
    "Bytes, seconds and tokens are of one seed: all clients, all rounds.",
    "Every (seed, arm, epsilon) is a world of its own: on real data their epsilons would add up. Epsilon does not "
    "cover test figures, nor that arms were compared with them.",
)


class Lines:
    """Progress of a comparison: a line for each run and for each phase of its cells."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: dict[str, tuple[object, ...]] = {}

    def event(self, event: Mapping[str, Any]) -> None:
        """Shows one event of `fedsynth.comparison.running.compare`."""
        run = event["run"]
        if event["event"] == "run":
            self.console.print(f"[bold]{escape(run)}[/] ({event['number']}/{event['runs']}): {event['state']}")
        elif event["event"] in ("data", "workers"):
            self.console.print(f"{run}: {event['line']}", markup=False, soft_wrap=True)
        elif event["event"] == "progress":
            at = (event["arm"], event["seed"], event["round"], event["phase"])
            if at != self.last.get(run):
                self.console.print(f"{run}: {at[0]} seed {at[1]}, round {at[2]}: {at[3]}", markup=False)
                self.last[run] = at


def utility_table(tables: Mapping[str, Any], task: str) -> Table:
    """The figures of each arm, and the differences from its scenario's baseline.

    Args:
        tables: `fedsynth.comparison.running.Comparison.tables`.
        task: `classification` or `instructions`.
    """
    rows = tables["tables"][task]["utility"]
    first = {name: terms["metric"] for name, terms in tables["scenarios"].items()}
    shown = [metric for metric in HEADS if any(row["metric"] == metric for row in rows)]
    if "field_match" not in first.values():  # it lies between the other two
        shown = [metric for metric in shown if metric != "field_match"]
    found = _table(f"{tables['name']}: {task}", ["scenario", "epsilon", "arm"])
    for metric in shown:
        found.add_column(HEADS[metric])
    for head in ("held-out", "difference"):
        found.add_column(head)
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        cells.setdefault((row["scenario"], row["epsilon"], row["arm"]), {})[row["metric"]] = row
    for (scenario, epsilon, arm), by_metric in cells.items():
        compared = by_metric[first[scenario]]
        held = [_spread(compared["held_out_mean"], compared["held_out_std"])]
        gap = [_figure(compared["difference"], "+"), _interval(compared, "difference_", "+")]
        if compared["difference"] is not None:
            gap[0] += f" {compared['metric']} - {compared['baseline']}"
        levels = [
            [_spread(m["mean"], m["std"]), _interval(m)] if (m := by_metric.get(name)) else ["-"] for name in shown
        ]
        found.add_row(scenario, _epsilon(epsilon), arm, *("\n".join(lines) for lines in (*levels, held, gap)))
    return found


def costs_table(tables: Mapping[str, Any], task: str) -> Table:
    """The costs of each arm: privacy, bytes, time of clients, tokens of the LLM."""
    found = _table(f"{tables['name']}: {task}, costs", ["scenario", "epsilon", "arm", "states", "up", "down"])
    for head in ("client time", "LLM reads", "LLM writes"):
        found.add_column(head)
    for row in tables["tables"][task]["costs"]:
        moved = [_unit(row[f"bytes_{direction}"], 1e6, "MB", 2) for direction in ("up", "down")]
        spent = [
            _unit(row["client_seconds"], 1, "s", 1),
            *(_unit(row[f"tokens_{d}"], 1e3, "k", 0) for d in ("read", "written")),
        ]
        found.add_row(row["scenario"], _epsilon(row["epsilon"]), row["arm"], _stated(row), *moved, *spent)
    return found


def remarks(tables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a reader has to know beside the figures, a word and a sentence each: few seeds, texts that filters took, an
    arm that looks better for a smaller epsilon."""
    if (seeds := len(tables["seeds"])) < FEW_SEEDS:
        many = f"{seeds} seed{'s' if seeds > 1 else ''}."
        yield many, "How results differ from seed to seed is hardly known: intervals are too narrow."
    for run, of_arm in tables.get("losses", {}).items():  # comparisons of earlier versions have none
        for arm, line in of_arm.items():
            few = arm in tables["few_texts"].get(run, {})
            yield (
                "Hardly any text left." if few else "Left by filters.",
                f"{run}, {arm}: {line}" + (f": {NOT_ITS_OWN}." if few else "."),
            )
    of_budgets: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in tables["points"]:
        if point["budget"] is not None:
            of_budgets.setdefault((point["scenario"], point["arm"]), []).append((point["budget"], point["utility"]))
    for (scenario, arm), found in of_budgets.items():
        for (less, high), (more, low) in pairwise(sorted(found)):
            if high > low:
                yield (
                    "Better for a smaller epsilon.",
                    f"{scenario}, {arm}: {high:.3f} at epsilon {less:g}, {low:.3f} at {more:g}. Less noise teaches no "
                    "less: this is chance, or filters left other texts.",
                )


def _table(title: str, heads: Sequence[str]) -> Table:
    found = Table(title=title)
    for head in heads:
        found.add_column(head)
    return found


def _epsilon(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


def _stated(row: Mapping[str, Any]) -> str:
    if row["guarantee"] == "none":
        return "no guarantee"
    if not row["epsilon_stated"]:
        return "nothing is released"
    return f"epsilon {up(row['epsilon_stated'], 3):.3f}, delta {row['delta']:g}"


def _figure(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def _spread(mean: float | None, std: float | None) -> str:
    return _figure(mean) + ("" if std is None else f" ± {std:.3f}")


def _interval(row: Mapping[str, Any], prefix: str = "", sign: str = "") -> str:
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    if low is None:  # of fewer than six pairs
        return "" if row["difference" if prefix else "mean"] is None else "no interval"
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def _unit(value: float | None, scale: float, unit: str, digits: int) -> str:
    return "-" if value is None else f"{value / scale:,.{digits}f} {unit}"
