"""The simulator's record of a run's data that readers of its figures need: the lines of the test labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsynth.data.partition import class_list, divide
from fedsynth.evaluation.lines import lines_of
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells

FILE = "data_facts.json"


def data_facts(scenario: Scenario) -> dict[str, Any]:
    """The content of a run's `data_facts.json`.

    `lines` are of test labels, which a simulation declares public (docs/privacy.md): for each cell, a table by client.
    """
    return {
        "lines": [
            {"arm": cell.arm, "seed": cell.seed, "clients": _lines(cell.scenario, cell.seed)}
            for cell in cells(scenario)
        ]
    }


def _lines(scenario: Scenario, seed: int) -> list[dict[str, float]]:
    data = scenario.data
    if data.task == "instructions":
        return []
    labels = class_list(data)
    return [lines_of(site.test, labels) for site in divide(data, seed).sites]


def read_facts(out: Path) -> dict[str, Any]:
    """The facts in a run's directory; empty if a run of real sites, or of an earlier version, has none."""
    try:
        found: dict[str, Any] = json.loads((out / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def lines_in(out: Path, arm: str, seed: int) -> list[dict[str, float]]:
    """The lines of a cell, by client."""
    found = read_facts(out).get("lines", [])
    return next((each["clients"] for each in found if (each["arm"], each["seed"]) == (arm, seed)), [])
