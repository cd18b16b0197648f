"""The section on the plain meaning of a run's epsilons: how often an attacker can recognise one unit at most."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedsynth.privacy.curve import FALSE_POSITIVES, highest_rate, rate_of
from fedsynth.privacy.plan import BY_RDP, DPPlan
from fedsynth.privacy.statement import Statement, plan_of
from fedsynth.reporting.page import Block, Cell, Items, Paragraph, Table
from fedsynth.reporting.statistics import Figures, Where

NEAR = 0.9  # of a rate: from here on, the bound says little more than that nothing is certain
BY_EPSILON = "by epsilon alone"  # the rate that (epsilon, delta) without the curve would allow
ALL = "(all arms and seeds)"


def add_rates(figures: Figures, privacy: Mapping[str, Any], seeds: int) -> None:
    """Adds the highest true-positive rates of each arm that spends, and of all of them on the same data.

    Args:
        figures: Gets the rows, part `risk`.
        privacy: The content of `privacy.json`.
        seeds: Seeds that each arm ran under.
    """
    known: dict[str, list[DPPlan]] = {arm: plans for arm, said in privacy.items() if (plans := plans_of(said))}
    rows = {arm: sorted(map(int, privacy[arm]["largest_over_clients"].get("epsilon_rows", {}))) for arm in known}
    for arm, plans in known.items():
        _add(figures, plans, rows[arm], Where(arm=arm))
        spent = privacy[arm]["largest_over_clients"]
        rate = rate_of(float(spent["epsilon"]), float(spent["delta"]))
        figures.add("risk", BY_EPSILON, "highest", rate, Where(arm=arm))
    if len(known) * seeds > 1:
        together = [plan for plans in known.values() for plan in plans] * seeds
        _add(figures, together, [], Where())


def _add(figures: Figures, plans: Sequence[DPPlan], rows: Sequence[int], where: Where) -> None:
    figures.add("risk", "zero_out", "highest", highest_rate(plans), where)
    figures.add("risk", "replace_one", "highest", highest_rate(plans, relation="replace_one"), where)
    for size in rows:
        figures.add("risk", f"{size} rows", "highest", highest_rate(plans, rows=size), where)


def plans_of(said: Mapping[str, Any]) -> list[DPPlan]:
    """The plans behind an arm's statement in `privacy.json`; none if it spends nothing or has no guarantee."""
    spent = said.get("largest_over_clients")
    if spent is None or said.get("guarantee") != "dp":
        return []
    parts = spent.get("mechanisms") or [spent]
    return [
        plan_of(
            Statement(
                "dp",
                float(part["epsilon"]),
                float(spent["delta"]),
                sigma=part["sigma"],
                sampling_rate=part["sampling_rate"],
                steps=part["steps"],
                clip_norm=part["clip_norm"],
                mechanism=part["mechanism"],
            )
        )
        for part in parts
        if part.get("sigma")
    ]


def risk_section(figures: Figures, privacy: Mapping[str, Any]) -> list[Block]:
    """What the rates mean in words, and a table of them; arms with the same statement share a line."""
    groups: dict[str, list[str]] = {}
    for arm, said in privacy.items():
        if figures.row("risk", "zero_out", "highest", Where(arm=arm)) is not None:
            spent = said["largest_over_clients"]
            groups.setdefault(json.dumps(spent, sort_keys=True), []).append(arm)
    first = next(iter(groups.values()))[0]
    spent = privacy[first]["largest_over_clients"]
    unit, sizes = str(spent["unit"]), sorted(map(int, spent.get("epsilon_rows", {})))
    heads = ["arms", "epsilon", f"{unit} there or not", f"this {unit} or another"]
    heads += [f"{size} rows of one person" for size in sizes]
    rows: list[list[Cell]] = []
    for arms in [*groups.values(), [""]]:
        if figures.row("risk", "zero_out", "highest", Where(arm=arms[0])) is None:
            continue  # one arm and one seed: together they are no more
        epsilon: Cell = figures.bound(figures.row("privacy", "epsilon", "largest", Where(arm=arms[0])), 3)
        names = ["zero_out", "replace_one", *(f"{size} rows" for size in sizes)]
        found = [figures.bound(figures.row("risk", name, "highest", Where(arm=arms[0])), 3) for name in names]
        rows.append([", ".join(arms) or ALL, epsilon, *found])
    loose = figures.value(figures.row("risk", BY_EPSILON, "highest", Where(arm=first)))
    alarms = f"{FALSE_POSITIVES:.0%}".replace("%", " %")
    intro = (
        f"Imagine an attacker who sees all that an arm releases and knows every other {unit} word for word. It wants "
        f"to know if one {unit} took part, and wrongly suspects {alarms} of those that did not. By guessing it "
        f"recognises {alarms} of those that did. The table has the share that it recognises at most."
    )
    note = (
        "Highest true-positive rate of any attack at a false-positive rate of "
        f"{alarms}, from the privacy curve of the noise that ran; rounded up."
    )
    if loose is not None:
        note += f" Epsilon and delta of {first} without that curve would allow {loose:.1%}.".replace("%", " %")
    return [
        Paragraph(intro),
        Table(heads, rows, note=note),
        Items(list(_remarks(figures, privacy, groups, sizes))),
    ]


def _remarks(
    figures: Figures, privacy: Mapping[str, Any], groups: Mapping[str, Sequence[str]], sizes: Sequence[int]
) -> Iterator[tuple[str, str]]:
    arms = [own[0] for own in groups.values()]
    near = [
        arm
        for arm in arms
        for name in ("zero_out", "replace_one")
        if (figures.value(figures.row("risk", name, "highest", Where(arm=arm))) or 0.0) >= NEAR
    ]
    if near:
        yield (
            "Near 1.",
            "Such a bound excludes hardly any attack. Known attacks stay far below it (fedsynth audit); only a smaller "
            "epsilon makes that a promise.",
        )
    yield (
        "True of everybody.",
        "What holds for all is learnt whether or not one takes part, and is not protected: if released text shows that "
        "notes on asthma mention wheezing, whoever knows that somebody has asthma has learnt it of that person, too.",
    )
    if sizes:
        yield (
            "Several rows of one person.",
            "The unit is a row here. Rows of one person add up, and a rate near 1 in these columns says that persons "
            "with so many rows are not protected: name the person's column as data.unit.",
        )
    if figures.row("risk", "zero_out", "highest") is not None:
        yield (
            f"{ALL[1:-1].capitalize()}.",
            "In a simulation each is a world of its own. On real data all of them, and every later run, spend the "
            "same lifetime budget; the last line is what this run alone would have spent of it.",
        )
    if any(part["mechanism"] in BY_RDP for arm in arms for part in _parts(privacy[arm])):
        yield (
            "Secure sums.",
            "Their rates follow from Rényi divergences at whole orders, all that is known of this noise, and are far "
            "from tight.",
        )


def _parts(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    spent = said["largest_over_clients"]
    return list(spent.get("mechanisms") or [spent])
