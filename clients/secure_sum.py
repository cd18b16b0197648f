"""A client's part in secure sums: its secrets on disk, one vector and one list of survivors for each sum."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsynth.clients.client_side import ClientSide
from fedsynth.federation.identity import Identity, Mistrusted, signed
from fedsynth.federation.messages import (
    KeysOffered,
    OfferKeys,
    OpenShares,
    Score,
    SeedsShared,
    ShareSeeds,
    SharesOpened,
    SignSurvivors,
    SurvivorsSigned,
    Unmask,
    Unmasked,
    Vote,
)
from fedsynth.federation.run.whole_files import write_whole
from fedsynth.federation.secure_sum import (
    MODULUS,
    Kind,
    Offer,
    Sealed,
    Secrets,
    SeedShare,
    check_offers,
    listed,
    masked,
    new_secrets,
    offer,
    opened,
    shares,
)
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.ledger import GrantUsed
from fedsynth.privacy.skellam import UNIT, variance
from fedsynth.system.folders import private_folder
from fedsynth.typed import build, plain

SUMS = "sums"


@dataclass(frozen=True)
class Part:
    """What a client knows of one sum; it is written down before anything that rests on it leaves.

    Attributes:
        request: Digest of the request for keys.
        own: The offer that the client has made.
        secrets: None once the sum is opened: the file stays, so that no id serves twice.
        offers: The offers that the client has checked.
        boxes: The shares that it has encrypted for them, once.
        shares: By sender, in hex, the shares that it has opened.
        vector: Digest of the one request that gets a vector.
        members: The clients that it has masks with.
        survivors: The one list that it has signed, or opened the sum by.
        given: The shares that it has given then.
    """

    request: str
    own: Offer
    secrets: Secrets | None
    offers: tuple[Offer, ...] = ()
    boxes: tuple[Sealed, ...] = ()
    shares: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    vector: str = ""
    members: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()
    given: tuple[SeedShare, ...] = ()


def offer_keys(client: ClientSide, request: OfferKeys, digest: str) -> KeysOffered:
    """Makes secrets, and signs the keys that come of them with the cohort and the noise that the client knows of.

    Raises:
        Mistrusted: If the client takes part in no such sum, or knows this one from another request.
        fedsynth.privacy.plan.BudgetTooSmall: If no noise fits the budget.
    """
    identity, cohort = _terms(client)
    if request.kind == "scores" and client.config.scores != "noise":
        raise Mistrusted("this client's scores have no noise of their own, and no sum of them is asked for")
    part = _known(client, request.sum_id)
    if part is None:
        check_room(client.records, cohort)
        _forget_earlier(client)
        held = new_secrets()
        noise = _variance(client, request.kind, cohort)
        made = offer(held, request.sum_id, client.index, identity, kind=request.kind, cohort=cohort, variance=noise)
        part = Part(digest, made, held)
        _keep(client, request.sum_id, part)
    if part.request != digest:
        raise Mistrusted(f"the sum {request.sum_id} is known from another request")
    return KeysOffered(part.own)


def share_seeds(client: ClientSide, request: ShareSeeds) -> SeedsShared:
    """Checks who takes part, on which terms, and shares the seeds among them.

    Raises:
        Mistrusted: If a key is not pinned, terms differ, too few or too many take part, or others were shown before.
    """
    identity, cohort = _terms(client)
    part, held = _begun(client, request.sum_id)
    if part.offers and part.offers != request.offers:
        raise Mistrusted(f"other clients of the sum {request.sum_id} were shown before")
    if not part.offers:
        _check_number("offers", len(request.offers), cohort)
        check_offers(request.offers, request.sum_id, identity, part.own, rests=client.rules.rests_on_sums)
        boxes = shares(held, request.sum_id, client.index, request.offers, cohort.threshold)
        part = replace(part, offers=request.offers, boxes=tuple(boxes))
        _keep(client, request.sum_id, part)
    return SeedsShared(part.boxes)


def open_shares(client: ClientSide, request: OpenShares) -> SharesOpened:
    """Opens the others' shares, before anything is spent, and names the senders of those that cannot be opened.

    Raises:
        Mistrusted: If a sender made no offer, or the client has sent its vector.
    """
    part, held = _begun(client, request.sum_id)
    if part.vector:
        raise Mistrusted(f"the vector of the sum {request.sum_id} is sent")
    found = opened(held, request.sum_id, client.index, part.offers, request.sealed)
    as_hex = {sender: (one.hex(), other.hex()) for sender, (one, other) in found.items()}
    _keep(client, request.sum_id, replace(part, shares=as_hex))
    return SharesOpened(tuple(each.client for each in request.sealed if each.client not in found))


def admit(client: ClientSide, request: Score | Vote, digest: str) -> tuple[Cohort, float]:
    """Notes, before anything is charged or computed, that this request and no other gets the vector of its sum.

    A second vector under the same masks would show the difference of the two. The account remembers it as well, as a
    folder may be restored from a copy.

    Returns:
        The cohort, and the variance of the noise that the client has offered.

    Raises:
        Mistrusted: If another request has got it, or the members are not as they must be.
    """
    _, cohort = _terms(client)
    part, _ = _begun(client, request.sum_id)
    if part.own.kind != ("scores" if isinstance(request, Score) else "votes"):
        raise Mistrusted(f"the sum {request.sum_id} is one of {part.own.kind}")
    if part.own.variance != _variance(client, part.own.kind, cohort):
        raise Mistrusted(f"the noise offered for the sum {request.sum_id} is not that of the client's plan any more")
    if part.vector not in ("", digest):
        raise Mistrusted(f"another request has got this client's vector of the sum {request.sum_id}")
    _check_number("members", len(request.members), cohort)
    offered = [made.client for made in part.offers]
    if client.index not in request.members or [*request.members] != [c for c in offered if c in request.members]:
        raise Mistrusted("the members of a sum must be clients that offered keys, in order, this one among them")
    if not set(request.members) <= set(part.shares):
        raise Mistrusted("the shares of a member could not be opened here")
    try:
        client.ledger.store_answer(f"sum {request.sum_id}", digest.encode())
    except GrantUsed as problem:
        raise Mistrusted(f"another request has got this client's vector of the sum {request.sum_id}") from problem
    _keep(client, request.sum_id, replace(part, vector=digest, members=request.members))
    return cohort, part.own.variance


def refuse_sum(client: ClientSide, request: Score | Vote) -> None:
    """Refuses a request that names a sum where the client's numbers leave in the open: they have no masks.

    Raises:
        Mistrusted: If it names one.
    """
    if request.sum_id:
        raise Mistrusted(f"client {client.index} sends these numbers in the open, and the request names a sum")


def under_masks(client: ClientSide, request: Score | Vote, values: NDArray[np.int64]) -> list[int]:
    """The client's vector for a sum, noise included, under its masks, once `admit` has noted the request."""
    part, held = _begun(client, request.sum_id)
    return masked(values, held, request.sum_id, client.index, part.offers, part.members)


def sign_survivors(client: ClientSide, request: SignSurvivors) -> SurvivorsSigned:
    """Signs the one list of survivors of a sum.

    Raises:
        Mistrusted: If the client has signed another, has sent no vector, or fewer have than hold the planned noise.
    """
    identity, cohort = _terms(client)
    part, _ = _begun(client, request.sum_id)
    _check_survivors(client, part, request.survivors, cohort)
    _keep(client, request.sum_id, replace(part, survivors=request.survivors))
    said = listed(request.sum_id, part.offers, part.members, request.survivors)
    return SurvivorsSigned(identity.sign(said))


def unmask(client: ClientSide, request: Unmask) -> Unmasked:
    """Gives one share of each member, of the own mask of survivors and the key of the missing; erases the secrets.

    Raises:
        Mistrusted: If too few have signed the list, or this client has signed another.
    """
    _, cohort = _terms(client)
    known = _known(client, request.sum_id)
    if known is not None and known.given and known.survivors == request.survivors:
        return Unmasked(known.given)
    part, _ = _begun(client, request.sum_id)
    _check_survivors(client, part, request.survivors, cohort)
    signers = {made.client: made.signer for made in part.offers if made.client in part.members}
    said = listed(request.sum_id, part.offers, part.members, request.survivors)
    # False signatures are passed over: one client must not keep the others from opening.
    true = {e.client for e in request.signatures if signed(signers.get(e.client, ""), e.signature, said)}
    if len(true) < cohort.threshold:
        raise Mistrusted(f"{len(true)} clients have signed the survivors, {cohort.threshold} are needed")
    given = tuple(
        SeedShare(member, part.shares[member][1 if member in request.survivors else 0]) for member in part.members
    )
    # Written down before the shares leave: a sum is opened once, by one list.
    _keep(client, request.sum_id, replace(part, survivors=request.survivors, given=given, secrets=None, shares={}))
    return Unmasked(given)


def check_room(records: int, cohort: Cohort) -> None:
    """Checks that no sum of such clients leaves the numbers of the masks, noise included.

    Args:
        records: Each moves a number by `UNIT` at most.
        cohort: The cohort.

    Raises:
        Mistrusted: If it could.
    """
    most = MODULUS // (4 * UNIT * cohort.clients)  # half of the positive numbers, the rest is for noise
    if records > most:
        raise Mistrusted(f"{records} units are too many for a secure sum of {cohort.clients} clients: at most {most}")


def _variance(client: ClientSide, kind: Kind, cohort: Cohort) -> float:
    """Of this client's noise: its share of the sum's, or as much as its own messages need."""
    plan = (client.config.vote_plan if kind == "votes" else client.config.score_plan)(client.records, client.rounds)
    sigma = plan.noise_multiplier
    return cohort.share(sigma) if client.rules.rests_on_sums else variance(sigma)


def _terms(client: ClientSide) -> tuple[Identity, Cohort]:
    cohort = client.config.secure_sum
    if client.identify is None or cohort is None or client.config.guarantee == "none":
        raise Mistrusted("this client takes part in no secure sum: neither scenario nor policy may leave it out")
    return client.identify(), cohort


def _check_number(what: str, number: int, cohort: Cohort) -> None:
    if not cohort.least <= number <= cohort.clients:
        raise Mistrusted(f"{number} {what} of a sum: {cohort.least} to {cohort.clients} are declared")


def _check_survivors(client: ClientSide, part: Part, survivors: Sequence[int], cohort: Cohort) -> None:
    if not part.vector:
        raise Mistrusted("this client has sent no vector for the sum")
    _check_number("survivors", len(survivors), cohort)
    if client.index not in survivors or [*survivors] != [c for c in part.members if c in survivors]:
        raise Mistrusted("the survivors of a sum must be members, in order, this client among them")
    if part.survivors not in ((), tuple(survivors)):
        raise Mistrusted("another list of survivors of the sum is signed")


def _begun(client: ClientSide, sum_id: str) -> tuple[Part, Secrets]:
    part = _known(client, sum_id)
    if part is None or part.secrets is None:
        raise Mistrusted(f"the sum {sum_id} is {'not known here' if part is None else 'opened already'}")
    return part, part.secrets


def _forget_earlier(client: ClientSide) -> None:
    """Erases the secrets of the run's earlier sums: one that this client left before its end was never opened here."""
    for path in sorted((client.work / SUMS).glob("*.json")):
        try:
            part = _known(client, path.stem)
        except Mistrusted:
            continue  # it cannot be read: that sum is over for this client
        if part is not None and part.secrets is not None:
            _keep(client, path.stem, replace(part, secrets=None, shares={}))


def _file(client: ClientSide, sum_id: str) -> Path:
    return client.work / SUMS / f"{sum_id}.json"


def _known(client: ClientSide, sum_id: str) -> Part | None:
    path = _file(client, sum_id)
    if not path.exists():
        return None
    try:
        return build(Part, json.loads(path.read_text()), "part")
    except ValueError as problem:
        raise Mistrusted(f"the file of the sum {sum_id} cannot be read") from problem


def _keep(client: ClientSide, sum_id: str, part: Part) -> None:
    path = _file(client, sum_id)
    private_folder(path.parent)
    write_whole(path, json.dumps(plain(part)).encode())
