"""Which clients of a simulation are there, and which leave: by public seeds, so that a run can be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from fedsynth.scenario.schema import Cell, Participation


class Fate(StrEnum):
    """Why an exchange has no reply of a client; the value is the end of a sentence about it."""

    ABSENT = "was not there in this round"
    DROPPED = "left before its reply arrived"


def fates(cell: Cell, round: int, exchange: int, clients: Sequence[int]) -> dict[int, Fate]:
    """The clients whose replies an exchange does without, and why. The same in all arms, so that arms are paired.

    Args:
        cell: With the scenario's `participation`.
        round: Whoever is absent is so for the whole of it.
        exchange: Its number within the cell; clients drop out of each by themselves.
        clients: That are to be asked.
    """
    table = cell.scenario.participation
    found: dict[int, Fate] = {}
    for client in clients:
        if _chance(table, cell.seed, 0, round, client) >= table.availability:
            found[client] = Fate.ABSENT
        elif _chance(table, cell.seed, 1, exchange, client) < table.dropout:
            found[client] = Fate.DROPPED
    return found


def _chance(table: Participation, seed: int, purpose: int, number: int, client: int) -> float:
    return float(np.random.default_rng([table.seed, seed, purpose, number, client]).random())
