from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kstest

from fedsynth.corpus import Corpus, Provenance
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


def test_noise_has_both_tails_and_no_infinity() -> None:
    normals = GrantRandomness(KEY).normals(2_000_000)
    assert np.isfinite(normals).all()
    assert normals.min() < -4.5
    assert normals.max() > 4.5
    assert abs((normals**4).mean() - 3) < 0.05  # kurtosis of a normal


def test_the_largest_and_smallest_words_give_finite_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    extreme = np.array([0, 1, 2**64 - 1, 2**64 - 2, 2**63], dtype=np.uint64)
    monkeypatch.setattr("fedsynth.privacy.noise._KeyStream.words", lambda self, count: extreme)
    normals = GrantRandomness(KEY).normals(5)
    assert np.isfinite(normals).all()
    assert normals[0] > 9
    assert normals[2] < -9
    # The plain 53-bit way fails here.
    shifted = ((extreme >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    assert shifted.max() == 1.0


def test_continuing_calls_equal_one_big_call(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GrantRandomness(KEY).normals(1000)
    parts = GrantRandomness(KEY)
    assert np.array_equal(np.concatenate([parts.normals(n) for n in (0, 1, 299, 700)]), whole)
    # Past the end of a nonce's key stream, in the midst of a call, it goes on with fresh bytes.
    monkeypatch.setattr("fedsynth.privacy.noise._SEGMENT", 800)
    short = GrantRandomness(KEY)
    pieces = np.concatenate([short.normals(150), short.normals(850)])
    assert np.array_equal(pieces[:100], whole[:100])
    assert np.array_equal(pieces, GrantRandomness(KEY).normals(1000))
    assert len(np.unique(pieces)) == 1000
    monkeypatch.setattr("fedsynth.privacy.noise._BLOCK", 7)
    assert np.array_equal(GrantRandomness(KEY).normals(1000), pieces)


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
