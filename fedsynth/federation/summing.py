"""The server's side of a secure sum: five exchanges with a cohort of clients, and the sum of their votes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from fedsynth.corpus import Votes, united
from fedsynth.federation.messages import OfferKeys, Request, ShareSeeds, SignSurvivors, Unmask, Vote, Voted
from fedsynth.federation.nodes import TooFewReplies
from fedsynth.federation.secure_sum import NotOpened, Sealed, Signed, unmasked
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.skellam import UNIT


class Ask(Protocol):
    """`Clients.ask_each`."""

    def __call__(self, requests: Mapping[int, Request[Any]], *, needed: int) -> dict[int, Any]:
        """Sends one request per client; typed replies by client, at least so many."""


def sum_id(*parts: object) -> str:
    """The public id of a sum: of the run, the seed and the number of its first exchange. It serves once."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def summed_votes(ask: Ask, ids: Sequence[int], request: Vote, cohort: Cohort, sum_id: str) -> Votes:
    """The sum of the clients' votes, of which the server sees nothing else.

    Args:
        ask: Sends requests.
        ids: The clients of the cohort.
        request: The vote, without a sum.
        cohort: The declared cohort.
        sum_id: The id of this sum.

    Raises:
        fedsynth.federation.nodes.TooFewReplies: If more clients than the cohort's dropouts are missing before the sum
            is opened, or it cannot be opened. What the votes cost stays charged.
    """
    offers = tuple(reply.offer for reply in ask(dict.fromkeys(ids, OfferKeys(sum_id)), needed=cohort.least).values())
    joined = [made.client for made in offers]
    shared = ask(dict.fromkeys(joined, ShareSeeds(sum_id, offers)), needed=cohort.least)
    members = tuple(shared)
    vote = replace(request, sum_id=sum_id, members=members)
    voted: dict[int, Voted] = ask(dict.fromkeys(members, vote), needed=cohort.least)

    survivors = tuple(voted)
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
    vectors = {client: reply.votes.values for client, reply in voted.items()}
    shares = {client: reply.shares for client, reply in given.items()}
    try:
        total = unmasked(sum_id, offers, members, vectors, shares, cohort.threshold)
    except NotOpened as problem:
        raise TooFewReplies(f"the secure sum cannot be opened: {problem}; what it cost stays charged") from problem
    return Votes(tuple((total / UNIT).tolist()), united([reply.votes for reply in voted.values()]))
