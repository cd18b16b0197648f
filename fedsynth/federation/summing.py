"""Sums of clients' votes or scores: in the open, or by the five exchanges of a secure sum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from fedsynth.corpus import Scores, Votes, united
from fedsynth.federation.messages import OfferKeys, Request, Score, ShareSeeds, SignSurvivors, Unmask, Vote
from fedsynth.federation.nodes import TooFewReplies
from fedsynth.federation.secure_sum import NotOpened, Sealed, Signed, unmasked
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.skellam import UNIT

Numbers = Votes | Scores


class Ask(Protocol):
    """`Clients.ask_each`."""

    def __call__(self, requests: Mapping[int, Request[Any]], *, needed: int) -> dict[int, Any]:
        """Sends one request per client; typed replies by client, at least so many."""


def sum_id(*parts: object) -> str:
    """The public id of a sum: of the run, the seed and the number of its first exchange. It serves once."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def added(numbers: Sequence[Numbers]) -> Numbers:
    """The sum of all clients' numbers for each text; it has no guarantee if one client's have none."""
    values = np.sum([each.values for each in numbers], axis=0)
    return replace(numbers[0], values=tuple(values.tolist()), grants=united(numbers))


def secure_sum(ask: Ask, ids: Sequence[int], request: Score | Vote, cohort: Cohort, sum_id: str) -> Numbers:
    """The sum of the clients' votes or scores, of which the server sees nothing else.

    Args:
        ask: Sends requests.
        ids: The clients of the cohort.
        request: The request, without a sum.
        cohort: The declared cohort.
        sum_id: The id of this sum.

    Raises:
        fedsynth.federation.nodes.TooFewReplies: If more clients than the cohort's dropouts are missing before the sum
            is opened, or it cannot be opened. What was charged stays so.
    """
    offers = tuple(reply.offer for reply in ask(dict.fromkeys(ids, OfferKeys(sum_id)), needed=cohort.least).values())
    joined = [made.client for made in offers]
    shared = ask(dict.fromkeys(joined, ShareSeeds(sum_id, offers)), needed=cohort.least)
    members = tuple(shared)
    asked = replace(request, sum_id=sum_id, members=members)
    told = ask(dict.fromkeys(members, asked), needed=cohort.least)

    survivors = tuple(told)
    signed = ask(dict.fromkeys(survivors, SignSurvivors(sum_id, survivors)), needed=cohort.threshold)
    signatures = tuple(Signed(client, reply.signature) for client, reply in signed.items())
    sealed = {
        client: tuple(
            Sealed(member, next(each.box for each in shared[member].shares if each.client == client))
            for member in members
        )
        for client in survivors
    }
    given = ask(
        {client: Unmask(sum_id, survivors, signatures, sealed[client]) for client in survivors},
        needed=cohort.threshold,
    )
    vectors = {client: reply.numbers.values for client, reply in told.items()}
    shares = {client: reply.shares for client, reply in given.items()}
    try:
        total = unmasked(sum_id, offers, members, vectors, shares, cohort.threshold)
    except NotOpened as problem:
        raise TooFewReplies(f"the secure sum cannot be opened: {problem}; what it cost stays charged") from problem
    found: list[Numbers] = [reply.numbers for reply in told.values()]
    return replace(found[0], values=tuple((total / UNIT).tolist()), grants=united(found))
