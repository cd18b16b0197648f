"""A client's part in secure sums: its secrets on disk, one vector and one list of survivors for each sum."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsynth.clients.client_side import ClientSide
from fedsynth.federation.messages import (
    KeysOffered,
    OfferKeys,
    Score,
    SeedsShared,
    ShareSeeds,
    SignSurvivors,
    SurvivorsSigned,
    Unmask,
    Unmasked,
    Vote,
)
from fedsynth.federation.run.whole_files import write_whole
from fedsynth.federation.secure_sum import (
    MODULUS,
    Identity,
    Mistrusted,
    Offer,
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
from fedsynth.privacy.skellam import UNIT
from fedsynth.system.folders import private_folder
from fedsynth.typed import BadValue, build, plain

SUMS = "sums"


@dataclass(frozen=True)
class Part:
    """What a client knows of one sum; it is written down before anything that rests on it leaves.

    Attributes:
        request: Digest of the request for keys.
        secrets: None once the sum is opened: the file stays, so that no id serves twice.
        offers: The offers that the client has checked.
        vector: Digest of the one request that got a vector.
        members: The clients that it has masks with.
        survivors: The one list that it has signed, or opened the sum by.
        given: The shares that it has given then.
    """

    request: str
    secrets: Secrets | None
    offers: tuple[Offer, ...] = ()
    vector: str = ""
    members: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()
    given: tuple[SeedShare, ...] = ()


def offer_keys(client: ClientSide, request: OfferKeys, digest: str) -> KeysOffered:
    """Makes secrets and signs the keys that come of them.

    Raises:
        Mistrusted: If the client takes part in no sum, or knows this one from another request.
    """
    identity, _ = _terms(client)
    part = _known(client, request.sum_id)
    if part is None:
        _forget_earlier(client)
        part = Part(digest, new_secrets())
        _keep(client, request.sum_id, part)
    if part.request != digest or part.secrets is None or part.offers:
        raise Mistrusted(f"the sum {request.sum_id} is known from another request")
    return KeysOffered(offer(part.secrets, request.sum_id, client.index, identity))


def share_seeds(client: ClientSide, request: ShareSeeds) -> SeedsShared:
    """Checks who takes part, and shares the seeds among them.

    Raises:
        Mistrusted: If a key is not pinned, too few or too many take part, or others were shown before.
    """
    identity, cohort = _terms(client)
    part, held = _begun(client, request.sum_id)
    if part.offers:
        if part.offers != request.offers:
            raise Mistrusted(f"other clients of the sum {request.sum_id} were shown before")
    else:
        _check_number("offers", len(request.offers), cohort)
        check_offers(request.offers, request.sum_id, identity)
        if offer(held, request.sum_id, client.index, identity).commitment not in {o.commitment for o in request.offers}:
            raise Mistrusted("this client's own offer is not among those of the sum")
        _keep(client, request.sum_id, replace(part, offers=request.offers))
    made = shares(held, request.sum_id, client.index, request.offers, cohort.threshold)
    return SeedsShared(tuple(made))


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


def admit(client: ClientSide, request: Score | Vote, digest: str) -> Cohort:
    """Notes, before anything is charged or computed, that this request and no other gets the vector of its sum.

    A second vector under the same masks would show the difference of the two.

    Raises:
        Mistrusted: If another request has got it, or the members are not as they must be.
    """
    _, cohort = _terms(client)
    part, _ = _begun(client, request.sum_id)
    if part.vector not in ("", digest):
        raise Mistrusted(f"another request has got this client's vector of the sum {request.sum_id}")
    _check_number("members", len(request.members), cohort)
    offered = [made.client for made in part.offers]
    if client.index not in request.members or [*request.members] != [c for c in offered if c in request.members]:
        raise Mistrusted("the members of a sum must be clients that offered keys, in order, this one among them")
    if part.survivors:
        raise Mistrusted(f"the survivors of the sum {request.sum_id} are signed already")
    _keep(client, request.sum_id, replace(part, vector=digest, members=request.members))
    return cohort


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
    identity, cohort = _terms(client)
    known = _known(client, request.sum_id)
    if known is not None and known.given and known.survivors == request.survivors:
        return Unmasked(known.given)
    part, held = _begun(client, request.sum_id)
    _check_survivors(client, part, request.survivors, cohort)
    signers = {made.client: made.signer for made in part.offers}
    said = listed(request.sum_id, part.offers, part.members, request.survivors)
    if len({each.client for each in request.signatures}) < max(cohort.threshold, len(request.signatures)):
        raise Mistrusted(f"fewer than {cohort.threshold} clients have signed the survivors, or one twice")
    for each in request.signatures:
        if each.client not in part.members:
            raise Mistrusted(f"client {each.client} signs, which is no member")
        identity.verify(signers[each.client], each.signature, said)
    found = opened(held, request.sum_id, client.index, part.offers, request.sealed)
    if set(found) != set(part.members):
        raise Mistrusted("shares must be there of each member, and of nobody else")
    given = [
        SeedShare(member, (found[member][1] if member in request.survivors else found[member][0]).hex())
        for member in part.members
    ]
    # Written down before the shares leave: a sum is opened once, by one list.
    _keep(client, request.sum_id, replace(part, survivors=request.survivors, given=tuple(given), secrets=None))
    return Unmasked(tuple(given))


def _terms(client: ClientSide) -> tuple[Identity, Cohort]:
    cohort = client.config.secure_sum
    if client.identify is None or cohort is None:
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


def _begun(client: ClientSide, sum_id: str) -> tuple[Part, Secrets]:
    part = _known(client, sum_id)
    if part is None or part.secrets is None:
        raise Mistrusted(f"the sum {sum_id} is {'not known here' if part is None else 'opened already'}")
    return part, part.secrets


def _forget_earlier(client: ClientSide) -> None:
    """Erases the secrets of the run's earlier sums: one that this client left before its end was never opened here."""
    for path in sorted((client.work / SUMS).glob("*.json")):
        part = _known(client, path.stem)
        if part is not None and part.secrets is not None:
            _keep(client, path.stem, replace(part, secrets=None))


def _file(client: ClientSide, sum_id: str) -> Path:
    return client.work / SUMS / f"{sum_id}.json"


def _known(client: ClientSide, sum_id: str) -> Part | None:
    path = _file(client, sum_id)
    if not path.exists():
        return None
    try:
        return build(Part, json.loads(path.read_text()), "part")
    except (ValueError, BadValue) as problem:
        raise Mistrusted(f"the file of the sum {sum_id} cannot be read") from problem


def _keep(client: ClientSide, sum_id: str, part: Part) -> None:
    path = _file(client, sum_id)
    private_folder(path.parent)
    write_whole(path, json.dumps(plain(part)).encode())
