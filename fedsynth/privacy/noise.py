"""The secret randomness of one grant: DP-SGD's Gaussian noise, Poisson draws, and the keyed MAC of the data."""

from __future__ import annotations

import functools
import hashlib
import hmac
import math
import secrets
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import poisson

from fedsynth.corpus import Corpus

KEY_BYTES = 32
_SEGMENT = 2**37  # bytes of key stream under one nonce: ChaCha20's 32-bit block counter ends at 2**38
_BLOCK = 2**13  # numbers made at once: fits the cache
_ZEROS = memoryview(bytes(8 * _BLOCK))


class GrantRandomness:
    """Independent streams of one grant's key, by purpose: ChaCha20 under HMAC-SHA256(key, purpose).

    The noise is as secret as the key: an attacker who knows it subtracts it. Sums are rounded to floats afterwards;
    attacks on the last bits of floating-point noise (Mironov 2012; Holohan and Braghin 2021) are not covered.

    Args:
        key: 32 bytes, from the ledger's `begin` only. The object keeps derived keys, not the key itself.
    """

    __slots__ = ("_masks", "_noise", "_sampling")

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a grant's key has {KEY_BYTES} bytes, got {len(key)}")
        self._noise = _KeyStream(_derive(key, b"noise"))
        self._sampling = _derive(key, b"sampling")
        self._masks = 0

    def normals(self, count: int) -> NDArray[np.float64]:
        """The next `count` standard normals of the noise stream.

        Each normal takes 64 bits: one for the sign, 63 for a uniform u strictly inside (0, 1/2], whose inverse normal
        CDF is the size. So both tails reach 9 deviations, and no value is infinite. (A 53-bit uniform shifted by half
        a step rounds to 1.0 at its upper end, which would be an infinite normal.)
        """
        if count < 0:
            raise ValueError(f"count must be >= 0, got {count}")
        normals = np.empty(count, dtype=np.float64)
        for start in range(0, count, _BLOCK):
            block = normals[start : start + _BLOCK]
            words = self._noise.words(len(block)).view(np.int64)
            np.abs(words.astype(np.float64), out=block)
            block += 0.5
            block *= 2.0**-64
            ndtri(block, out=block)
            np.copysign(block, words, out=block)
        return normals

    def poissons(self, count: int, mean: float) -> NDArray[np.int64]:
        """The next `count` Poisson draws of the noise stream, by the inverse of their distribution.

        Each takes the upper 52 bits of a word for a uniform strictly inside (0, 1), which is looked up in the table of
        the distribution function: as fast for one value as for another.

        Args:
            count: Number of draws.
            mean: At most `MAX_MEAN`, beyond which the table would be too long.
        """
        if count < 0:
            raise ValueError(f"count must be >= 0, got {count}")
        if not 0 < mean <= MAX_MEAN:
            raise ValueError(f"mean must lie in 0..{MAX_MEAN}, got {mean}")
        least, table = _poisson_table(mean)
        uniforms = ((self._noise.words(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        return least + np.searchsorted(table, uniforms).astype(np.int64)

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:
        """The next draw: each of `count` units enters on its own with probability `rate`.

        The draw depends on the key, `count`, `rate` and the number of earlier draws only, never on data.
        """
        if count < 0:
            raise ValueError(f"count must be >= 0, got {count}")
        if not 0 < rate <= 1:
            raise ValueError(f"rate must lie in (0, 1], got {rate}")
        stream = _KeyStream(_derive(self._sampling, self._masks.to_bytes(8, "big")))
        self._masks += 1
        if rate == 1:
            return np.ones(count, dtype=np.bool_)
        # Whole numbers: exact where a float comparison would round the uniform.
        return np.asarray(stream.words(count) < np.uint64(int(rate * 2.0**64)), dtype=np.bool_)

    def __repr__(self) -> str:
        return "GrantRandomness(<secret>)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("the randomness of a grant is neither pickled nor copied: its noise would be used twice")


MAX_MEAN = 2**34  # of a Poisson draw: its table has some two million places


@functools.lru_cache(maxsize=4)
def _poisson_table(mean: float) -> tuple[int, NDArray[np.float64]]:
    """The least value of a table, and P(X <= value) from there on, to ten deviations on both sides."""
    reach = 10 * math.sqrt(mean) + 40
    least = max(0, math.floor(mean - reach))
    return least, np.asarray(poisson.cdf(np.arange(least, math.ceil(mean + reach)), mean), dtype=np.float64)


class _KeyStream:
    """ChaCha20 key stream as 64-bit words, going on from call to call."""

    __slots__ = ("_encryptor", "_key", "_left", "_segment")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._segment = -1
        self._left = 0

    def words(self, count: int) -> NDArray[np.uint64]:
        words = np.empty(count, dtype="<u8")
        into, at = memoryview(words.data).cast("B"), 0
        while at < len(into):
            if self._left == 0:
                self._segment += 1
                nonce = bytes(4) + self._segment.to_bytes(12, "little")  # block counter, then nonce
                self._encryptor = Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor()
                self._left = _SEGMENT
            taken = min(len(into) - at, self._left)
            at += self._encryptor.update_into(_ZEROS[:taken] if taken <= len(_ZEROS) else bytes(taken), into[at:])
            self._left -= taken
        return words.astype(np.uint64, copy=False)


def site_key() -> bytes:
    """A fresh key from the operating system's randomness, for real sites."""
    return secrets.token_bytes(KEY_BYTES)


def simulated_key(run_seed: int, client: int, counter: int, binding: str) -> bytes:
    """A reproducible key, for simulations only: reports must say "simulated: noise reproducible".

    Args:
        run_seed: Seed of the run.
        client: Partition of the client.
        counter: Counter of the grant in the client's ledger.
        binding: Digest of the data, plan and order that the grant binds, so that others never meet the same noise.
    """
    key = b"fedsynth: simulated, noise reproducible"
    for part in (str(run_seed), str(client), str(counter), binding):
        key = _derive(key, part.encode())
    return key


def data_mac(key: bytes, corpus: Corpus) -> str:
    """Keyed MAC (hex HMAC-SHA256) of prompts, answers, units and attributes in order: it changes if the data change.

    A plain hash would let its readers test guesses of the text.
    """
    mac = hmac.new(key, digestmod=hashlib.sha256)
    columns = [corpus.prompts, corpus.answers]
    if corpus.units is not None:
        columns.append(tuple(repr(unit) for unit in corpus.units))
    if corpus.attributes is not None:
        columns += [("attributes",), tuple(repr(values) for values in corpus.attributes)]
    for column in columns:
        mac.update(len(column).to_bytes(8, "big"))
        for text in column:
            raw = text.encode("utf-8", "surrogatepass")
            mac.update(len(raw).to_bytes(8, "big") + raw)
    return mac.hexdigest()


def _derive(key: bytes, purpose: bytes) -> bytes:
    return hmac.new(key, purpose, hashlib.sha256).digest()
