"""Absence and dropout of simulated clients, drawn from public seeds so that a run can be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from fedsynth.scenario.schema import Cell, Participation


class Fate(StrEnum):
    """The reason for a client's missing reply; the value ends a sentence about the client."""

    ABSENT = "was not there in this round"
    DROPPED = "left before its reply arrived"


def fates(cell: Cell, round: int, exchange: int, clients: Sequence[int]) -> dict[int, Fate]:
    """The clients without a reply in an exchange, each with its reason. All arms get the same, so that arms are paired.

    Args:
        cell: The cell; its scenario has the `participation` table.
        round: An absent client is absent for the whole round.
        exchange: Number of the exchange within the round; a client drops out of each exchange independently.
        clients: The clients to ask.
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
