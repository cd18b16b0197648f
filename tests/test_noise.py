from __future__ import annotations

import copy
import hmac
import pickle

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, kstest, norm

from fedsynth.corpus import Corpus, Provenance
from fedsynth.privacy import noise
from fedsynth.privacy.noise import GrantRandomness, data_mac, simulated_key, site_key

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))
N = 200_000


def fits_normal(sample: NDArray[np.float64]) -> bool:
    return bool(kstest(sample, "norm").pvalue > 1e-4)


def test_noise_has_the_planned_deviation() -> None:
    normals = GrantRandomness(KEY).normals(N)
    assert fits_normal(normals)
    assert abs(normals.std() - 1) < 5 / np.sqrt(2 * N)
    for wrong in (2 / 3, 3 / 2, 1 / 50, 1.05):  # 1 / 50: divided by the batch once too often
        assert not fits_normal(wrong * normals)


def plane(radii: NDArray[np.uint64], angles: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The normals made of these words."""
    made = np.empty(len(radii), dtype=np.complex128)
    noise._box_muller(radii.copy(), angles.copy(), made)
    return made.view(np.float64)


def words(key: bytes, count: int) -> NDArray[np.uint64]:
    return noise._KeyStream(key).words(count)


def within_chance(found: int, count: int, chance: float) -> bool:
    """As many events as the exact binomial has; one in a million fair samples is refused."""
    return bool(binomtest(found, count, chance).pvalue > 1e-6)


def test_tails_are_those_of_a_normal() -> None:
    normals = GrantRandomness(KEY).normals(2**24)

    def fits(sample: NDArray[np.float64]) -> bool:
        return all(
            within_chance(int((sign * sample > t).sum()), len(sample), norm.sf(t))
            for t in (4, 4.5, 5)
            for sign in (1, -1)
        )

    assert np.isfinite(normals).all()
    assert fits(normals)
    assert not fits(np.clip(normals, -4, 4))
    assert not fits(np.where(np.abs(normals) < 4.5, normals, 0.0))
    assert not fits(1.02 * normals)


@pytest.mark.parametrize(("deviations", "zeros"), [(6, 25), (7, 34), (8, 44), (9, 57)])
def test_tails_hold_where_no_sample_reaches(deviations: int, zeros: int) -> None:
    """Only words whose u is below 2**-zeros are used: the distance exceeds sqrt(2 zeros ln 2), less than `deviations`.

    Beyond `deviations` lies 2**zeros times the share that lies there in all.
    """
    count = 2**20
    radii = (words(KEY, count).view(np.int64) >> zeros).view(np.uint64)
    chance = 2 * norm.sf(deviations) * 2.0**zeros

    def fits(sample: NDArray[np.float64]) -> bool:
        return within_chance(int((np.abs(sample) > deviations).sum()), len(sample), chance)

    made = plane(radii, words(OTHER, count))
    assert fits(made[::2])
    assert fits(made[1::2])
    assert not fits(np.clip(made[::2], -deviations, deviations))
    assert not fits(0.999 * made[::2])


def test_the_largest_and_smallest_words_give_finite_normals() -> None:
    extreme = np.array([0, 1, 2**64 - 1, 2**64 - 2, 2**63, 2**63 - 1, 2**52, 2**51 - 1], dtype=np.uint64)
    radii, angles = (each.ravel() for each in np.meshgrid(extreme, extreme))
    made = plane(radii, angles)
    assert np.isfinite(made).all()
    assert 9.4 < np.abs(made).max() < 9.42
    assert plane(extreme[:1], extreme[:1])[0] == pytest.approx(np.sqrt(128 * np.log(2)), abs=1e-12)
    # A uniform that is zero, without the half step, fails here.
    with np.errstate(divide="ignore"):
        assert np.isinf(np.sqrt(-2 * np.log(extreme.astype(np.float64) * 2.0**-64))).any()


def test_normals_are_box_and_mullers_in_double_precision() -> None:
    radii, angles = words(KEY, N), words(OTHER, N)
    u = np.abs(radii.view(np.int64).astype(np.float64) + 0.5) * 2.0**-63
    turn = 2 * np.pi * (angles.astype(np.float64) + 0.5) * 2.0**-64
    wanted = np.stack([np.sqrt(-2 * np.log(u)) * np.cos(turn), np.sqrt(-2 * np.log(u)) * np.sin(turn)], axis=1).ravel()
    made = plane(radii, angles)

    def near(sample: NDArray[np.float64]) -> bool:
        return bool(np.abs(sample - wanted).max() < 1e-12)

    assert near(made)
    assert (made == made.astype(np.float32)).mean() < 1e-6
    assert not near(made.astype(np.float32).astype(np.float64))
    for number, wrong in [("_STEP", noise._STEP * (1 + 1e-8)), ("_BEND", 0.499)]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(noise, number, wrong)
            assert not near(plane(radii, angles))


def test_the_two_numbers_of_a_pair_are_independent() -> None:
    made = GrantRandomness(KEY).normals(2 * N)
    first, second = made[::2], made[1::2]

    def independent(one: NDArray[np.float64], two: NDArray[np.float64]) -> bool:
        """In themselves and in size: distance and direction of a pair of normals have these distributions."""
        square, turn = one**2 + two**2, np.arctan2(two, one) / (2 * np.pi) + 0.5
        tests = [kstest(square / 2, "expon").pvalue, kstest(turn, "uniform").pvalue]
        tests += [kstest(turn * 2**13 % 1, "uniform").pvalue]  # within a step of the table
        return min(tests) > 1e-4 and max(correlation(one, two), correlation(one**2, two**2)) < 5

    assert independent(first, second)
    assert independent(second[:-1], first[1:])  # of neighbours, too
    radius = np.hypot(first, second)
    assert not independent(radius * np.sign(first), radius * np.sign(second))
    assert not independent(first, first[::-1] * np.sign(second) * np.abs(first) / np.abs(first[::-1]))
    turned = np.exp(2j * np.pi * np.floor(words(OTHER, N).astype(np.float64) * 2.0**-51) / 2**13)  # the table alone
    assert not independent(radius * turned.real, radius * turned.imag)


def test_normals_do_not_depend_on_blocks_calls_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    count = 2**18
    whole = GrantRandomness(KEY).normals(count)
    assert len(np.unique(whole)) == count
    for threads in (2, 3, 8):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        monkeypatch.setattr(noise, "_LEAST", count // 16)
        assert np.array_equal(GrantRandomness(KEY).normals(count), whole)
    for block in (2, 6, 1000, 2**16):
        monkeypatch.setattr(noise, "_BLOCK", block)
        assert np.array_equal(GrantRandomness(KEY).normals(10_000), whole[:10_000])
    parts = GrantRandomness(KEY)
    pieces = [parts.normals(n) for n in (0, 1, 299, 4, 698, 0)]
    assert [len(piece) for piece in pieces] == [0, 1, 299, 4, 698, 0]
    # Each call takes whole pairs, two at a time: 4, 300, 4 and 700 numbers.
    assert np.array_equal(
        np.concatenate(pieces), np.concatenate([whole[:1], whole[4:303], whole[304:308], whole[308:1006]])
    )

    # Threads that all begin at the first word are seen.
    real = noise._KeyStream.__init__
    monkeypatch.setattr(noise._KeyStream, "__init__", lambda self, key, at=0: real(self, key))
    assert not np.array_equal(GrantRandomness(KEY).normals(count), whole)


def test_a_stream_goes_on_under_the_next_nonce_with_fresh_words(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = words(KEY, 1000)
    monkeypatch.setattr(noise, "_SEGMENT", 800)
    stream = noise._KeyStream(KEY)
    pieces = np.concatenate([stream.words(n) for n in (0, 1, 149, 850)])
    assert np.array_equal(pieces[:100], whole[:100])
    assert len(np.unique(pieces)) == 1000
    for place in (1, 8, 99, 100, 101, 457):  # from any place on, in the midst of a block of ChaCha20, too
        assert np.array_equal(noise._KeyStream(KEY, place).words(300), pieces[place : place + 300])


def test_words_are_the_key_stream_of_chacha20() -> None:
    """RFC 8439, appendix A.1, vectors 1 and 2: the key stream of a zero key and nonce, blocks 0 and 1."""
    stream = words(bytes(32), 16).astype("<u8").tobytes()
    assert stream.startswith(bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"))
    assert stream[64:].startswith(bytes.fromhex("9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"))


def test_no_two_purposes_share_words() -> None:
    """Each stream under the same key: none may be another's, nor that of an earlier version's noise."""
    randomness = GrantRandomness(KEY)
    keys = [randomness._radii, randomness._angles, randomness._sampling, randomness._counts._key]
    assert len(set(keys)) == 4
    assert randomness._radii != hmac.digest(KEY, b"noise", "sha256")
    assert randomness._angles != hmac.digest(KEY, b"noise", "sha256")


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(len(a)))  # about standard normal if independent


def test_streams_of_two_keys_are_uncorrelated() -> None:
    one, two = GrantRandomness(KEY), GrantRandomness(OTHER)
    normals = one.normals(N)
    assert correlation(normals, two.normals(N)) < 5
    assert correlation(normals, GrantRandomness(KEY).normals(N)) > 100  # the same key is found
    masks = one.poisson_mask(N, 0.5).astype(float)
    assert correlation(masks, two.poisson_mask(N, 0.5).astype(float)) < 5


def test_noise_and_draws_are_uncorrelated() -> None:
    randomness = GrantRandomness(KEY)
    assert correlation(randomness.normals(N), randomness.poisson_mask(N, 0.5).astype(float)) < 5
    first, second = (randomness.poisson_mask(N, 0.5).astype(float) for _ in range(2))
    assert correlation(first, second) < 5


def draws_are_poisson(masks: NDArray[np.bool_], rate: float) -> bool:
    """Rate within 3 deviations, and a batch size whose variance is n q (1 - q) within 5."""
    draws, n = masks.shape
    close = abs(masks.mean() - rate) < 3 * np.sqrt(rate * (1 - rate) / masks.size)
    expected = n * rate * (1 - rate)
    return bool(close and abs(masks.sum(1).var() / expected - 1) < 5 * np.sqrt(2 / draws))


@pytest.mark.parametrize("rate", [0.01, 0.125, 0.64])
def test_masks_are_poisson_draws(rate: float) -> None:
    randomness = GrantRandomness(KEY)
    masks = np.stack([randomness.poisson_mask(400, rate) for _ in range(2000)])
    assert draws_are_poisson(masks, rate)
    assert abs(masks.mean(0) - rate).max() < 6 * np.sqrt(rate * (1 - rate) / 2000)  # every unit alike
    public = np.random.default_rng(0)
    fixed = np.stack([public.permutation(400) < round(400 * rate) for _ in range(2000)])
    assert not draws_are_poisson(fixed, rate)  # batches of one size: no amplification of this kind
    assert not draws_are_poisson(masks | (public.random(masks.shape) < 0.05 * rate), rate)  # 5 % too many


def test_masks_depend_on_key_count_rate_and_call_only() -> None:
    one, two = GrantRandomness(KEY), GrantRandomness(KEY)
    two.normals(12345)  # noise drawn between does not matter, nor the size of earlier draws
    one.poisson_mask(10, 0.5)
    two.poisson_mask(999, 0.1)
    assert np.array_equal(one.poisson_mask(100, 0.25), two.poisson_mask(100, 0.25))
    assert GrantRandomness(KEY).poisson_mask(50, 1.0).all()
    assert len(one.poisson_mask(0, 0.5)) == 0
    for rate in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            one.poisson_mask(10, rate)


def test_the_key_is_not_shown_pickled_or_copied() -> None:
    randomness = GrantRandomness(KEY)
    assert KEY.hex() not in repr(randomness)
    assert str(KEY) not in repr(randomness)
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="twice"):
            way(randomness)
    with pytest.raises(ValueError, match="32 bytes"):
        GrantRandomness(b"short")


def test_simulated_keys_differ_in_every_part_and_repeat() -> None:
    base = (7, 1, 2, "ab")
    assert simulated_key(*base) == simulated_key(*base)
    keys = {
        simulated_key(*k)
        for k in [
            base,
            (8, 1, 2, "ab"),
            (7, 2, 1, "ab"),
            (7, 1, 3, "ab"),
            (7, 1, 2, "ac"),
            (71, 1, 2, "ab"),
            (7, 11, 2, "ab"),
        ]
    }
    assert len(keys) == 7
    assert len({site_key() for _ in range(10)}) == 10
    assert len(site_key()) == 32


def test_data_mac_changes_with_every_part() -> None:
    def corpus(prompts: tuple[str, ...], answers: tuple[str, ...], units: tuple[object, ...] | None = None) -> Corpus:
        return Corpus(prompts, answers, Provenance.PRIVATE, units=units)

    base = corpus(("ab", "c"), ("x", "y"))
    changed = [
        corpus(("a", "bc"), ("x", "y")),  # the same letters, cut elsewhere
        corpus(("ab", "d"), ("x", "y")),
        corpus(("ab", "c"), ("y", "x")),
        corpus(("c", "ab"), ("x", "y")),
        corpus(("ab", "c"), ("x", "y"), (1, 2)),
        corpus(("ab", "c"), ("x", "y"), ("1", "2")),
        corpus(("ab", "c"), ("x", "y"), (1, 1)),
    ]
    macs = {data_mac(KEY, c) for c in [base, *changed]}
    assert len(macs) == 8
    assert data_mac(OTHER, base) not in macs
    assert data_mac(KEY, corpus(("ab", "c"), ("x", "y"))) == data_mac(KEY, base)
