"""Sums of clients' votes or scores: in the open, or by the six exchanges of a secure sum."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from fedsynth.corpus import Scores, Votes, united
from fedsynth.federation.messages import OfferKeys, OpenShares, Request, Score, ShareSeeds, SignSurvivors, Unmask, Vote
from fedsynth.federation.nodes import TooFewReplies
from fedsynth.federation.secure_sum import Kind, NotOpened, Offer, Sealed, Signed, genuine, undisputed, unmasked
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


def capped(numbers: Sequence[Numbers]) -> list[Numbers]:
    """Each client's numbers, scaled down to the length (L2 norm) of the median client's where they are longer.

    So a minority that votes a million times for one text counts no more than as many honest clients. Honest votes of
    large clients lose some weight. What follows from noised numbers costs nothing more.
    """
    lengths = [float(np.linalg.norm(each.values)) for each in numbers]
    most = float(np.median(lengths))
    return [
        replace(each, values=tuple((np.asarray(each.values) * (most / length)).tolist())) if length > most else each
        for each, length in zip(numbers, lengths, strict=True)
    ]


def secure_sum(ask: Ask, ids: Sequence[int], request: Score | Vote, cohort: Cohort, sum_id: str) -> Numbers:
    """The sum of the clients' votes or scores, of which the server sees nothing else.

    Args:
        ask: Sends requests.
        ids: The clients of the cohort.
        request: The request, without a sum.
        cohort: The declared cohort.
        sum_id: The id of this sum.

    Raises:
        fedsynth.federation.nodes.TooFewReplies: If more clients than the cohort's dropouts are missing, or give what
            cannot be used, before the sum is opened; or it cannot be opened. What was charged stays so.
    """
    keys = ask(dict.fromkeys(ids, OfferKeys(sum_id, kind_of(request))), needed=cohort.least)
    offers = _usable({client: reply.offer for client, reply in keys.items()}, sum_id, cohort)
    shared = ask({made.client: ShareSeeds(sum_id, offers) for made in offers}, needed=cohort.least)
    sealed = {
        client: tuple(Sealed(sender, box) for sender, boxes in shared.items() for box in _for(client, boxes.shares))
        for client in shared
    }
    opened = ask({client: OpenShares(sum_id, boxes) for client, boxes in sealed.items()}, needed=cohort.least)
    members = undisputed({client: set(reply.unreadable) & set(opened) for client, reply in opened.items()})
    _enough(members, cohort, "shares of the others could be opened by each other")

    asked = replace(request, sum_id=sum_id, members=members)
    told = ask(dict.fromkeys(members, asked), needed=cohort.least)
    survivors = tuple(told)
    signed = ask(dict.fromkeys(survivors, SignSurvivors(sum_id, survivors)), needed=cohort.threshold)
    signatures = tuple(Signed(client, reply.signature) for client, reply in signed.items())
    given = ask(dict.fromkeys(survivors, Unmask(sum_id, survivors, signatures)), needed=cohort.threshold)

    vectors = {client: reply.numbers.values for client, reply in told.items()}
    shares = {client: reply.shares for client, reply in given.items()}
    try:
        total = unmasked(sum_id, offers, members, vectors, shares, cohort.threshold)
    except NotOpened as problem:
        raise TooFewReplies(f"the secure sum cannot be opened: {problem}; what it cost stays charged") from problem
    found: list[Numbers] = [reply.numbers for reply in told.values()]
    return replace(found[0], values=tuple((total / UNIT).tolist()), grants=united(found))


def kind_of(request: Score | Vote) -> Kind:
    """What a request's replies are."""
    return "scores" if isinstance(request, Score) else "votes"


def _usable(offers: Mapping[int, Offer], sum_id: str, cohort: Cohort) -> tuple[Offer, ...]:
    """The offers that the others can work with, in order; a client with another one is left out before anybody pays."""
    found = [
        made
        for client, made in sorted(offers.items())
        if made.client == client and made.cohort == cohort and genuine(made, sum_id)
    ]
    for name in ("signer", "sealing_key", "masking_key"):
        count = Counter(getattr(made, name) for made in found)
        found = [made for made in found if count[getattr(made, name)] == 1]
    _enough([made.client for made in found], cohort, "offered keys that can be used")
    return tuple(found)


def _enough(clients: Sequence[int], cohort: Cohort, what: str) -> None:
    if len(clients) < cohort.least:
        raise TooFewReplies(f"secure sum: of {cohort.clients} clients {len(clients)} {what}, {cohort.least} are needed")


def _for(client: int, boxes: Sequence[Sealed]) -> list[str]:
    return [each.box for each in boxes if each.client == client]
