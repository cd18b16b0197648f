"""Which clients of a simulation are there, leave, or are too slow: by public seeds, so that a run can be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from fedsynth.scenario.schema import Cell, Participation


class Fate(StrEnum):
    """Why an exchange has no answer of a client; the value is the end of a sentence about it."""

    ABSENT = "was not there in this round"
    DROPPED = "left before its answer arrived"
    LATE = "answered after the deadline"


def fates(cell: Cell, round: int, exchange: int, homes: Sequence[int]) -> dict[int, Fate]:
    """The homes whose answers an exchange does without, and why. The same in all arms, so that arms are paired.

    Args:
        cell: With the scenario's `participation`.
        round: Whoever is absent is so for the whole of it.
        exchange: Its number within the cell; clients drop out of each by themselves.
        homes: That are to be asked.
    """
    table = cell.scenario.participation
    found: dict[int, Fate] = {}
    for home in homes:
        if _chance(table, cell.seed, 0, round, home) >= table.availability:
            found[home] = Fate.ABSENT
        elif _chance(table, cell.seed, 1, exchange, home) < table.dropout:
            found[home] = Fate.DROPPED
        elif table.deadline is not None and slowness(table, cell.seed, home) > table.deadline:
            found[home] = Fate.LATE
    return found


def slowness(table: Participation, seed: int, home: int) -> float:
    """How many times as long as a client of speed 1 a home takes for everything: a property of the home."""
    chance, passed = _chance(table, seed, 2, 0, home), 0.0
    for share, times in table.speed_tiers:
        passed += share
        if chance < passed:
            return times
    return table.speed_tiers[-1][1] if table.speed_tiers else 1.0


def _chance(table: Participation, seed: int, purpose: int, number: int, home: int) -> float:
    return float(np.random.default_rng([table.seed, seed, purpose, number, home]).random())
