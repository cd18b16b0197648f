"""The secret randomness of one grant: DP-SGD's Gaussian noise, Poisson draws, and the keyed MAC of the data."""

from __future__ import annotations

import functools
import hashlib
import hmac
import math
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from scipy.stats import poisson

from fedsynth.corpus import Corpus

KEY_BYTES = 32
_SEGMENT = 2**37  # bytes of key stream under one nonce: ChaCha20's 32-bit block counter ends at 2**38
_BLOCK = 2**13  # pairs made at once, even: what they need fits a core's cache
_LEAST = 2**15  # pairs that are worth a thread
_ZEROS = memoryview(bytes(8 * _BLOCK))


class GrantRandomness:
    """Independent streams of one grant's key, by purpose: ChaCha20 under HMAC-SHA256(key, purpose).

    The noise is as secret as the key: an attacker who knows it subtracts it. Sums are rounded to floats afterwards;
    attacks on the last bits of floating-point noise (Mironov 2012; Holohan and Braghin 2021) are not covered.

    A purpose's name changes with what its words are made into, so that no word ever becomes two sorts of noise: a grant
    that an earlier version began and did not finish runs again with noise that is independent of the first.

    Args:
        key: 32 bytes, from the ledger's `begin` only. The object keeps derived keys, not the key itself.
    """

    __slots__ = ("_angles", "_counts", "_masks", "_pairs", "_radii", "_sampling")

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a grant's key has {KEY_BYTES} bytes, got {len(key)}")
        self._radii, self._angles = (_derive(key, b"normals: " + part) for part in (b"radii", b"angles"))
        self._counts = _KeyStream(_derive(key, b"noise"))
        self._sampling = _derive(key, b"sampling")
        self._masks = self._pairs = 0

    def normals(self, count: int) -> NDArray[np.float64]:
        """The next `count` standard normals, by Box and Muller's transform (1958) in double precision.

        Pair number k takes the k-th word of two streams: 64 bits for its distance from zero, 64 for its direction. The
        numbers do not depend on how many are made at once, nor on the threads (`OMP_NUM_THREADS`, else one per core)
        that make them. A call takes whole pairs, two at a time, and drops what is left over. Both tails reach 9.4
        deviations, and no value is infinite. Every number takes the same steps, so time says nothing of their size.
        """
        if count < 0:
            raise ValueError(f"count must be >= 0, got {count}")
        # Two pairs at a time: numpy rounds a product of complex numbers otherwise where an array has one element only.
        pairs, begin = 2 * ((count + 3) // 4), self._pairs
        self._pairs += pairs
        normals = np.empty(2 * pairs, dtype=np.float64)
        plane = normals.view(np.complex128)
        parts = max(1, min(_threads(), pairs // _LEAST))
        ends = [2 * (pairs // 2 * part // parts) for part in range(parts + 1)]

        def fill(part: int) -> None:
            at, end = ends[part], ends[part + 1]
            radii, angles = _KeyStream(self._radii, begin + at), _KeyStream(self._angles, begin + at)
            for start in range(at, end, _BLOCK):
                block = plane[start : min(start + _BLOCK, end)]
                _box_muller(radii.words(len(block)), angles.words(len(block)), block)

        if parts == 1:
            fill(0)
        else:
            with ThreadPoolExecutor(parts) as pool:
                list(pool.map(fill, range(parts)))
        return normals[:count]

    def poissons(self, count: int, mean: float) -> NDArray[np.int64]:
        """The next `count` Poisson draws of a stream of their own, by the inverse of their distribution.

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
        uniforms = ((self._counts.words(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
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


_ROOTS = 2**13  # directions in the table: 128 KB
_STEP = 2 * math.pi / _ROOTS
_TABLE: NDArray[np.complex128] = np.exp(1j * _STEP * (np.arange(_ROOTS) + 0.5))
# 1 - _BEND x**2 is a cosine up to 1.6e-16, 1 - x**2 / 2 up to 9e-16.
_BEND = 0.5 - (math.sqrt(2) - 1) / 12 * (_STEP / 2) ** 2


def _box_muller(radii: NDArray[np.uint64], angles: NDArray[np.uint64], plane: NDArray[np.complex128]) -> None:
    """Fills `plane` with normals, two in each complex number: distance times direction. Uses the words up.

    The distance is sqrt(-2 ln u) of u = |w + 1/2| / 2**63 in (0, 1], where w is a signed word. It is exact near zero,
    where large normals come from. The direction is one of a table, turned by at most half a step: 13 bits of a word
    choose the one and 51 the other, and sine and cosine of so small an angle are two terms of their series. numpy's own
    sine and cosine of any angle take longer than all of this.
    """
    radius = radii.view(np.int64) * 2.0**-63
    radius += 2.0**-64
    radius *= radius
    np.log(radius, out=radius)
    np.negative(radius, out=radius)
    np.sqrt(radius, out=radius)
    _TABLE.take((angles >> np.uint64(51)).view(np.int64), out=plane, mode="clip")  # 2**13 indices: none is clipped
    angles &= np.uint64(2**51 - 1)
    angles |= np.uint64(0x3FF << 52)  # the bits of a float in [1, 1.5)
    turn = angles.view(np.float64)
    turn -= 1.25
    square = turn * turn
    sine = square * (-((2 * _STEP) ** 3) / 6)
    sine += 2 * _STEP
    sine *= turn
    square *= -_BEND * (2 * _STEP) ** 2
    square += 1.0
    turned = np.empty_like(plane)
    np.multiply(radius, square, out=turned.real)
    np.multiply(radius, sine, out=turned.imag)
    plane *= turned


class _KeyStream:
    """ChaCha20 key stream as 64-bit words, from a place on; it goes on from call to call."""

    __slots__ = ("_at", "_encryptor", "_key", "_left")

    def __init__(self, key: bytes, at: int = 0) -> None:
        self._key, self._at, self._left = key, 8 * at, 0

    def words(self, count: int) -> NDArray[np.uint64]:
        words = np.empty(count, dtype="<u8")
        into, done = memoryview(words.data).cast("B"), 0
        while done < len(into):
            if self._left == 0:
                self._open()
            taken = min(len(into) - done, self._left)
            zeros = _ZEROS[:taken] if taken <= len(_ZEROS) else bytes(taken)
            done += self._encryptor.update_into(zeros, into[done:])
            self._at += taken
            self._left -= taken
        return words.astype(np.uint64, copy=False)

    def _open(self) -> None:
        segment, within = divmod(self._at, _SEGMENT)
        block, skipped = divmod(within, 64)
        nonce = block.to_bytes(4, "little") + segment.to_bytes(12, "little")  # block counter, then nonce
        self._encryptor = Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor()
        self._encryptor.update(_ZEROS[:skipped])
        self._left = _SEGMENT - within


def _threads() -> int:
    """As many threads as this process was given, the way torch counts them."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0))


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
