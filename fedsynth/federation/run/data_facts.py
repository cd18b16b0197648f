"""What a simulator counted in the clients' rows before a run, for readers of its figures: a file in its directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsynth.evaluation.verdict import Statement

FACTS, COUNTS = "data_facts.json", "row_counts.json"
MANY_LOST = 0.1  # share of tokens from which on a cut is a likely reason for a low result
MANY_UNLISTED = 0.05  # share of rows


def read_facts(out: Path) -> dict[str, Any]:
    """The facts in a run's directory (`federation.counting.data_facts`), and counts of rows if these lie there, too;
    empty if a run of real sites, or of an earlier version, has none."""
    return {**_read(out / FACTS), **_read(out / COUNTS)}


def read_counts(private: Path) -> dict[str, Any]:
    """The counts of private rows in a run's private directory (`federation.counting.row_counts`), for its operator's
    terminal; empty if they lie in the shareable one."""
    return _read(private / COUNTS)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def lines_in(out: Path, arm: str, seed: int) -> list[dict[str, float]]:
    """The lines of a cell's test labels, by client."""
    found = read_facts(out).get("lines", [])
    return next((each["clients"] for each in found if (each["arm"], each["seed"]) == (arm, seed)), [])


def reasons_in(facts: Mapping[str, Any]) -> Iterator[Statement]:
    """Reasons for a low result that the facts show, the likeliest first."""
    cuts = [cut for cut in facts.get("cuts", []) if cut["lost"] >= MANY_LOST * cut["tokens"]]
    for cut in sorted(cuts, key=lambda cut: -cut["lost"] / cut["tokens"]):
        yield Statement(
            f"{cut['key']} = {{limit:.0f}} cuts {{cut:.0f}} of {{texts:.0f}} private texts, and the {cut['part']} "
            "never reads {share:.0f} % of their tokens",
            {**{name: cut[name] for name in ("limit", "cut", "texts")}, "share": 100 * cut["lost"] / cut["tokens"]},
        )
    for each in facts.get("labels", []):
        if each["unlisted"] >= MANY_UNLISTED * each["rows"]:
            yield Statement(
                "{unlisted:.0f} of {rows:.0f} rows have a label that data.labels lacks",
                {name: each[name] for name in ("unlisted", "rows")},
            )
        if each["lacking"]:
            yield Statement(
                "{lacking:.0f} of {clients:.0f} clients have no private text of some label (one lacks {most:.0f})",
                {name: each[name] for name in ("lacking", "clients", "most")},
            )
