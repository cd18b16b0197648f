"""A secure sum: whole numbers of several clients, of which the server learns the sum alone.

The protocol of Bonawitz et al. (Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017), with
its signatures against an active server:

1. Each client offers two public keys and a commitment to a seed, signed by the key that its site is known by, together
   with the cohort and the noise that it will add.
2. It checks the others' signatures against the keys that its operator has pinned, and their terms against its own. It
   shares two seeds among them (Shamir), each share encrypted for its receiver.
3. It opens the shares that are for it, and names the senders of those that it cannot open.
4. It sends its vector plus a mask of its own seed, plus or minus a mask with each other client. The latter cancel.
5. It signs the list of clients whose vectors have arrived.
6. If enough have signed one list, it gives its share of one seed of each client: the own seed of those on the list, the
   seed of the key of those that are missing. It never gives both.

This module has the arithmetic of both sides, without a file or a network. Primitives are those of `cryptography` and
`Crypto.Protocol.SecretSharing`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedsynth.federation.identity import Identity, Mistrusted, signed
from fedsynth.privacy.cohort import Cohort

MODULUS = 2**48  # float64, in which votes travel, holds each residue exactly
MAX_TRIES = 500  # sets of shares that are tried for one seed
SEED_BYTES = 16  # what Shamir's scheme of the library shares: 128 bits
Words = NDArray[np.uint64]
_MASK = np.uint64(MODULUS - 1)


class NotOpened(RuntimeError):
    """A secure sum cannot be opened: too few clients are left, or one of them gave something else than it promised."""


# ---- What crosses the network ----------------------------------------------------------------------------------------


Kind = Literal["votes", "scores"]


@dataclass(frozen=True)
class Offer:
    """A client's keys and terms for one sum.

    Attributes:
        client: The client's number in the run.
        sealing_key: X25519 public key (hex) for which others encrypt their shares.
        masking_key: X25519 public key (hex) of the masks with each other client.
        commitment: SHA-256 (hex) of the seed of the client's own mask.
        kind: What is added up.
        cohort: The cohort that the client was told of.
        variance: Of the noise that it will add.
        signer: The key that signs, by which the server knows the client: an OpenSSH public key.
        signature: ECDSA signature (hex) of all else, and of the sum's id.
    """

    client: int
    sealing_key: str
    masking_key: str
    commitment: str
    kind: Kind
    cohort: Cohort
    variance: float
    signer: str = ""
    signature: str = ""

    def said(self, sum_id: str) -> bytes:
        """What is signed."""
        terms = (self.client, self.kind, *vars(self.cohort).values(), self.variance.hex())
        return _joined("offer", sum_id, self.sealing_key, self.masking_key, self.commitment, *map(str, terms))


@dataclass(frozen=True)
class Sealed:
    """Shares of one client's two seeds for another: encrypted bytes (hex), and the number of the other end."""

    client: int
    box: str


@dataclass(frozen=True)
class Signed:
    """A client's signature (hex) of a list of survivors."""

    client: int
    signature: str


@dataclass(frozen=True)
class SeedShare:
    """A share (hex) of one seed of a client: of its own mask if it survived, of its key if it is missing."""

    client: int
    share: str


# ---- The client's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Secrets:
    """A client's secrets of one sum, in hex; they are kept on its disk until the sum is opened.

    Attributes:
        sealing: Seed of the key for which others encrypt.
        masking: Seed of the key of the masks with others; the others hold shares of it.
        own: Seed of the client's own mask; likewise.
    """

    sealing: str
    masking: str
    own: str


def new_secrets() -> Secrets:
    """Fresh secrets from the operating system, in simulations too: they cancel and change no result."""
    sealing, masking, own = (secrets.token_hex(SEED_BYTES) for _ in range(3))
    return Secrets(sealing, masking, own)


def offer(
    held: Secrets, sum_id: str, client: int, identity: Identity, *, kind: Kind, cohort: Cohort, variance: float
) -> Offer:
    """A client's signed keys and terms."""
    commitment = _commitment(held.own)
    keys = (_public(held.sealing), _public(held.masking))
    made = Offer(client, *keys, commitment, kind, cohort, variance, identity.signer)
    return replace(made, signature=identity.sign(made.said(sum_id)))


def genuine(made: Offer, sum_id: str) -> bool:
    """True if an offer's keys can be used, and the key that it names has signed it for this sum."""
    try:
        for key in (made.sealing_key, made.masking_key):
            X25519PrivateKey.generate().exchange(_received(key))  # refuses keys of low order
        fits = len(bytes.fromhex(made.commitment)) == hashlib.sha256().digest_size
    except ValueError:
        return False
    return fits and math.isfinite(made.variance) and signed(made.signer, made.signature, made.said(sum_id))


def check_offers(offers: Sequence[Offer], sum_id: str, identity: Identity, own: Offer, *, rests: bool) -> None:
    """Checks that all offers are of different clients whose keys this one has pinned, on the terms that it knows.

    Args:
        offers: In the order of clients.
        sum_id: The sum.
        identity: The client's roster.
        own: Its own offer.
        rests: It counts on the others' noise: each must add as much as it does itself.

    Raises:
        Mistrusted: If not.
    """
    if own not in offers:
        raise Mistrusted("this client's own offer is not among those of the sum")
    for what in ("client", "signer", "sealing_key", "masking_key"):
        if len({getattr(made, what) for made in offers}) < len(offers):
            raise Mistrusted(f"two offers of one {what.replace('_', ' ')}")
    if [made.client for made in offers] != sorted(made.client for made in offers):
        raise Mistrusted("the offers do not stand in the order of their clients")
    for made in offers:
        identity.verify(made.signer, made.signature, made.said(sum_id))
        if not genuine(made, sum_id):
            raise Mistrusted(f"a public key in the offer of client {made.client} is none")
        if (made.kind, made.cohort) != (own.kind, own.cohort):
            raise Mistrusted(f"client {made.client} was told of another cohort or kind of sum")
        if rests and made.variance < own.variance * (1 - 1e-9):
            raise Mistrusted(f"client {made.client} will add less noise than this one counts on")


def roll(sum_id: str, offers: Sequence[Offer]) -> str:
    """SHA-256 (hex) of a sum and its offers: clients that were shown different ones sign different lists."""
    return hashlib.sha256(
        _joined(sum_id, *(str(value) for made in offers for value in vars(made).values()))
    ).hexdigest()


def shares(held: Secrets, sum_id: str, client: int, offers: Sequence[Offer], threshold: int) -> list[Sealed]:
    """Shares of the client's two seeds, one for each offer, its own included."""
    masking = Shamir.split(threshold, len(offers), bytes.fromhex(held.masking), ssss=False)
    own = Shamir.split(threshold, len(offers), bytes.fromhex(held.own), ssss=False)
    about = roll(sum_id, offers).encode()
    return [
        Sealed(made.client, _box(held, made, sum_id, client, made.client).encrypt(_NONCE, one + other, about).hex())
        for made, (_, one), (_, other) in zip(offers, masking, own, strict=True)
    ]


def opened(
    held: Secrets, sum_id: str, client: int, offers: Sequence[Offer], sent: Iterable[Sealed]
) -> dict[int, tuple[bytes, bytes]]:
    """By sender, its shares for this client: of the seed of its key, and of its own mask. A sender whose shares were
    not encrypted for this client and these offers is left out.

    Raises:
        Mistrusted: If a sender made no offer.
    """
    known, about = {made.client: made for made in offers}, roll(sum_id, offers).encode()
    found = {}
    for each in sent:
        if each.client not in known:
            raise Mistrusted(f"a share of client {each.client}, which made no offer")
        with suppress(InvalidTag, ValueError):
            box = _box(held, known[each.client], sum_id, each.client, client)
            text = box.decrypt(_NONCE, bytes.fromhex(each.box), about)
            if len(text) == 2 * SEED_BYTES:
                found[each.client] = (text[:SEED_BYTES], text[SEED_BYTES:])
    return found


def masked(
    values: NDArray[np.int64], held: Secrets, sum_id: str, client: int, offers: Sequence[Offer], members: Sequence[int]
) -> list[int]:
    """A vector of whole numbers under all masks, modulo `MODULUS`.

    Args:
        values: The vector, noise included.
        held: The client's secrets.
        sum_id: The sum.
        client: The client's number.
        offers: Those that it has checked.
        members: The clients that have shared their seeds: masks are with these alone.
    """
    total = values.astype(np.uint64) + _own_mask(held.own, sum_id, len(values))
    known = {made.client: made for made in offers}
    for other in members:
        if other != client:
            total += _between(held.masking, known[other].masking_key, sum_id, client, other, len(values))
    return [int(word) for word in total & _MASK]


def listed(sum_id: str, offers: Sequence[Offer], members: Sequence[int], survivors: Sequence[int]) -> bytes:
    """What a client signs of the survivors."""
    return _joined("survivors", roll(sum_id, offers), repr([*members]), repr([*survivors]))


# ---- The server's side -----------------------------------------------------------------------------------------------


def undisputed(unreadable: Mapping[int, Collection[int]]) -> tuple[int, ...]:
    """The clients that remain when those with the most disputes are left out, one by one, until there is none.

    Args:
        unreadable: By client, the senders whose shares it says that it could not open: either of the two may be at
            fault.
    """
    disputes = {(client, sender) for client, of in unreadable.items() for sender in of if sender != client}
    remaining = set(unreadable)
    while disputes := {pair for pair in disputes if set(pair) <= remaining}:
        count = Counter(client for pair in disputes for client in pair)
        remaining.discard(max(sorted(count), key=lambda client: count[client]))
    return tuple(sorted(remaining))


def unmasked(
    sum_id: str,
    offers: Sequence[Offer],
    members: Sequence[int],
    vectors: Mapping[int, Sequence[float]],
    given: Mapping[int, Sequence[SeedShare]],
    threshold: int,
) -> NDArray[np.int64]:
    """The sum of the survivors' vectors.

    Args:
        sum_id: The sum.
        offers: The clients' keys.
        members: The clients that have shared their seeds.
        vectors: By survivor, its masked vector.
        given: By client, its shares of the seeds.
        threshold: The number of shares that a seed takes.

    Raises:
        NotOpened: If there are too few shares, or a seed is not the one that its client offered.
    """
    place = {made.client: index + 1 for index, made in enumerate(offers)}
    known = {made.client: made for made in offers}
    by_client = {client: {each.client: each.share for each in of} for client, of in given.items()}
    size = len(next(iter(vectors.values())))
    total = np.zeros(size, dtype=np.uint64)
    for vector in vectors.values():
        total += np.asarray(vector, dtype=np.float64).astype(np.uint64)
    for member in members:
        parts = [(place[client], bytes.fromhex(of[member])) for client, of in by_client.items() if member in of]
        if member in vectors:
            seed = _fitting(member, parts, threshold, _commitment, known[member].commitment)
            total -= _own_mask(seed, sum_id, size)
        else:
            seed = _fitting(member, parts, threshold, _public, known[member].masking_key)
            for other in vectors:  # the missing client's masks, with the opposite sign, take the others' away
                total += _between(seed, known[other].masking_key, sum_id, member, other, size)
    words = (total & _MASK).astype(np.int64)
    return np.where(words >= MODULUS // 2, words - MODULUS, words)


def _fitting(
    member: int, parts: Sequence[tuple[int, bytes]], threshold: int, told: Callable[[str], str], promised: str
) -> str:
    """The seed that a client promised, by the first shares that give it: some of them may be false."""
    if len(parts) < threshold:
        raise NotOpened(f"of client {member}'s seed {len(parts)} shares are there, {threshold} are needed")
    for some in itertools.islice(itertools.combinations(parts, threshold), MAX_TRIES):
        with suppress(ValueError):
            seed = Shamir.combine(list(some), ssss=False).hex()
            if told(seed) == promised:
                return seed
    raise NotOpened(
        f"no {threshold} shares of client {member}'s seed give what it promised: it or others gave false ones"
    )


# ---- Masks, boxes, keys ----------------------------------------------------------------------------------------------

_NONCE = bytes(12)  # of keys that encrypt one message


def _private(seed: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_derived(bytes.fromhex(seed), "key"))


def _commitment(seed: str) -> str:
    return hashlib.sha256(bytes.fromhex(seed)).hexdigest()


def _public(seed: str) -> str:
    return _private(seed).public_key().public_bytes_raw().hex()


def _agreed(seed: str, other: str) -> bytes:
    return _private(seed).exchange(_received(other))


def _received(key: str) -> X25519PublicKey:
    return X25519PublicKey.from_public_bytes(bytes.fromhex(key))


def _box(held: Secrets, other: Offer, sum_id: str, sender: int, receiver: int) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(
        _derived(_agreed(held.sealing, other.sealing_key), "shares", sum_id, str(sender), str(receiver))
    )


def _own_mask(seed: str, sum_id: str, size: int) -> Words:
    return _stream(_derived(bytes.fromhex(seed), "own mask", sum_id), size)


def _between(seed: str, other_key: str, sum_id: str, client: int, other: int, size: int) -> Words:
    """The mask between two clients as the first adds it: the lower number adds, the higher subtracts."""
    low, high = sorted((client, other))
    words = _stream(_derived(_agreed(seed, other_key), "mask", sum_id, str(low), str(high)), size)
    return words if client < other else np.uint64(0) - words


def _stream(key: bytes, size: int) -> Words:
    """Uniform words; of each the lower 48 bits count."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * size))
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64)


def _derived(secret: bytes, *purpose: str) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=None, info=_joined("fedsynth secure sum", *purpose)).derive(secret)


def _joined(*parts: str) -> bytes:
    return b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
