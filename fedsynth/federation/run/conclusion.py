"""A run's verdict, with the reasons for a low result that its own record shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from fedsynth.evaluation.lines import CHANCE, MAJORITY, recorded
from fedsynth.evaluation.verdict import ORDER, Statement, Verdict, verdict
from fedsynth.federation.run.data_facts import reasons_in
from fedsynth.models.of_scenario import strangers
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells
from fedsynth.synthesis.attrition import losses

MOST = 3  # reasons in a verdict; the report has all


def concluded(
    scenario: Scenario, metrics: pd.DataFrame, epsilon: Mapping[str, float | None], facts: Mapping[str, Any]
) -> Verdict:
    """The verdict of a run.

    Args:
        scenario: The run's scenario.
        metrics: Its tidy metrics.
        epsilon: By arm: 0 if it releases nothing, None without a guarantee.
        facts: What the simulator counted in the data (`data_facts.read_facts`).
    """
    apart = {cell.arm for cell in cells(scenario) if cell.scenario.data.pooled}
    found = verdict(
        metrics,
        epsilon,
        pooled=[arm for arm in epsilon if arm in apart],
        tuned_on=scenario.data.tuned_on,
        record=[*reasons_in(facts), *reasons(metrics)][:MOST],
    )
    more = (Statement(f"{line[0].upper()}{line[1:]}.") for line in strangers(scenario))
    return replace(found, statements=(*found.statements, *more))


def reasons(metrics: pd.DataFrame) -> Iterator[Statement]:
    """Reasons for a low result, the likeliest first."""
    for arm, own in losses(metrics).items():
        for loss in own:
            if loss.few or loss.bare or loss.narrowed:
                numbers = {name: float(value) for name, value in vars(loss).items() if isinstance(value, int)}
                words = loss.words
                for name in numbers:
                    words = words.replace(f"{{{name}}}", f"{{{name}:.0f}}")
                yield Statement(f"{arm.replace('{', '{{').replace('}', '}}')} has {words}", numbers)


def lines_for(metrics: pd.DataFrame) -> dict[str, dict[str, float]]:
    """By task metric, the lines that a run recorded: the mean over clients and seeds of each."""
    found = {metric: {line: recorded(metrics, metric, line) for line in (CHANCE, MAJORITY)} for metric in ORDER}
    known = {m: {line: value for line, value in own.items() if value is not None} for m, own in found.items()}
    return {metric: own for metric, own in known.items() if own}
