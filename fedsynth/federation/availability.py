"""Which clients of a simulation are there, and which leave: by public seeds, so that a run can be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from fedsynth.scenario.schema import Cell, Participation


class Fate(StrEnum):
    """Why an exchange has no answer of a client; the value is the end of a sentence about it."""

    ABSENT = "was not there in this round"
    DROPPED = "left before its answer arrived"


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
    return found


def _chance(table: Participation, seed: int, purpose: int, number: int, home: int) -> float:
    return float(np.random.default_rng([table.seed, seed, purpose, number, home]).random())
