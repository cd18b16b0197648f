"""Cautions for readers who quote a run's figures: a word and a sentence for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedsynth.federation.run.log import SERVER
from fedsynth.reporting.page import listed
from fedsynth.reporting.statistics import Figures, Where
from fedsynth.scenario.schema import Scenario
from fedsynth.synthesis.attrition import losses

LARGE_DELTA = 0.1  # of delta times the number of units: at this, a mechanism that publishes single units would pass
ALIKE = 1.01  # the budgets of arms may differ by this much, as noise is rounded up
NAMED = 8  # clients at most; the others are counted

NONE = (
    "No epsilon holds for {}: something left without a mechanism, or raw text was pooled. Compare these arms with "
    "others, publish nothing of theirs as private."
)
MEASURED = (
    "They are measured at the clients, on test sets declared public, mostly on models that learnt private text there; "
    "real sites do not answer them by default."
)
BUDGETS = "{} spent different epsilons: no comparison between them is one at an equal budget."
DELTA = (
    "In {} delta times the units of the largest client is above {:g}: a mechanism that publishes a few units outright "
    "could meet such a delta."
)
ONE_SEED = "Nothing here says how results differ from seed to seed: no deviation, and intervals over clients alone."
SIMULATED = (
    "Its keys follow from public seeds, so that a run can be repeated: whoever knows them can take the noise off. The "
    "statement is about sites that draw their own."
)
SILENT = "In {}: {}. What they may have spent is not in these figures."
LITTLE = "{}: {}. Its figures are not those of its method."
BARE = "{}: {}. Such a client learnt from nothing that the method made."
LOST = "In {} a step of curation left no text of some labels at some clients."
POOLED = "{} has all clients' text in one place and one test set: it is not compared client by client."


def cautions(
    figures: Figures,
    privacy: Mapping[str, Any],
    metrics: pd.DataFrame,
    scenario: Scenario,
    arms: Sequence[str],
    pooled: Sequence[str],
) -> list[list[str]]:
    """The cautions of a run, the weightiest first.

    Args:
        figures: The table of figures, with the part `privacy`.
        privacy: The content of `privacy.json`.
        metrics: As `metrics.parquet` has them.
        scenario: The run's scenario.
        arms: The arms that ran.
        pooled: The arms with one client.
    """
    found: list[tuple[str, str]] = []
    if bare := [arm for arm in arms if privacy.get(arm, {}).get("guarantee") == "none"]:
        found.append(("No guarantee.", NONE.format(listed(bare))))
    if len(_task_figures(metrics)):
        found.append(("Test figures are not covered by epsilon.", MEASURED))
    of_filters = losses(metrics)
    for words, few in ((LITTLE, True), (BARE, False)):
        told = {
            arm: [str(loss) for loss in own if loss.few == few and (few or loss.bare)]
            for arm, own in of_filters.items()
        }
        name = "Hardly any text left." if few else "Clients without text."
        found += [(name, words.format(arm, "; ".join(lines))) for arm, lines in told.items() if lines]
    spent = {arm: figures.value(figures.row("privacy", "epsilon", "largest", Where(arm=arm))) for arm in arms}
    paid = {arm: epsilon for arm, epsilon in spent.items() if epsilon}
    if paid and max(paid.values()) > ALIKE * min(paid.values()):
        found.append(("Budgets differ.", BUDGETS.format(listed(list(paid)))))
    if large := [arm for arm in arms if _delta_units(figures, arm) > LARGE_DELTA]:
        found.append(("Delta is large.", DELTA.format(listed(large), LARGE_DELTA)))
    if metrics["seed"].nunique() == 1:
        found.append(("One seed only.", ONE_SEED))
    if scenario.data.tuned_on:
        who = listed([str(client) for client in scenario.data.tuned_on])
        found.append(("Settings were tuned", f"on clients {who}: the figures of the others stand beside those of all."))
    if any(said.get("largest_over_clients", {}).get("simulated") for said in privacy.values()):
        found.append(("Simulated noise.", SIMULATED))
    ids = {arm: 1 if arm in pooled else scenario.data.clients for arm in arms}
    gone = {arm: _without_answer(privacy.get(arm, {}), metrics, arm, ids[arm]) for arm in arms}
    silent = "Clients without an answer."
    found += [(silent, SILENT.format(arm, listed(clients))) for arm, clients in gone.items() if clients]
    lost = metrics[metrics["metric"].str.endswith("/labels_lost") & (metrics["value"] > 0)]
    if len(lost):
        found.append(("Labels lost.", LOST.format(listed([str(arm) for arm in dict.fromkeys(lost["arm"])]))))
    if pooled:
        found.append(("One client.", POOLED.format(listed(pooled))))
    return [list(pair) for pair in found]


def _delta_units(figures: Figures, arm: str) -> float:
    units = figures.value(figures.row("privacy", "units", "largest", Where(arm=arm)))
    delta = figures.value(figures.row("privacy", "delta", "largest", Where(arm=arm)))
    return (units or 0.0) * (delta or 0.0)


def _task_figures(metrics: pd.DataFrame) -> pd.DataFrame:
    return metrics[(metrics["client"] != SERVER) & ~metrics["metric"].str.contains("/")]


def _without_answer(said: Mapping[str, Any], metrics: pd.DataFrame, arm: str, ids: int) -> list[str]:
    """Clients that once gave no usable reply, or have no task figure in the last round of a seed."""
    gone = {(int(seed), int(client)) for seed, client in said.get("terms", {}).get("silent", [])}
    own = metrics[metrics["arm"] == arm]
    rows = _task_figures(own)
    last = rows[rows["round"] == rows["round"].max()]
    for seed in own["seed"].unique() if len(rows) else ():  # real sites give none
        there = set(last.loc[last["seed"] == seed, "client"])
        gone |= {(int(seed), client) for client in range(ids) if client not in there}
    words = [f"client {client} (seed {seed})" for seed, client in sorted(gone)]
    return words[:NAMED] + ([f"{len(words) - NAMED} more"] if len(words) > NAMED else [])
