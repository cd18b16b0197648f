"""Fidelity figures against closed forms and independent computations."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.linalg import sqrtm

from fedsynth.evaluation.fidelity import distinct, frechet, ifd, mauve
from fedsynth.testing import ScriptedLLM


def cloud(rows: int, width: int, seed: int, *, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.eye(width) + 0.3 * np.random.default_rng(0).normal(size=(width, width))
    return rng.normal(size=(rows, width)) @ mix + shift


# --- IFD -----------------------------------------------------------------------------------------------------------


def test_ifd_is_the_ratio_of_mean_losses_with_and_without_the_prompt() -> None:
    logs = {
        ("question: what ␊ helps ? answer:", " rest"): -1.0,
        ("question: why ? answer:", " so ␊ it is"): -6.0,
        ("question: answer:", " rest"): -4.0,
        ("question: answer:", " so ␊ it is"): -3.0,
    }
    llm = ScriptedLLM(likelihood=lambda prompt, continuation: logs[prompt, continuation])
    assert ifd(llm, ["what\nhelps ?", "why ?"], ["rest", "so\nit is"]) == [0.25, 2.0]
    assert llm.scored == [4]  # one call


def test_ifd_of_an_answer_that_is_certain_without_its_prompt_is_infinite() -> None:
    assert ifd(ScriptedLLM(likelihood=lambda prompt, continuation: 0.0), ["a"], ["b"]) == [float("inf")]


def test_ifd_needs_an_answer_per_prompt() -> None:
    with pytest.raises(ValueError, match="got 0 for 1"):
        ifd(ScriptedLLM(), ["a"], [])


# --- MAUVE ----------------------------------------------------------------------------------------------------------


def corners(*counts: int) -> np.ndarray:
    """So many rows at each unit vector: k-means with as many clusters finds just these."""
    return np.repeat(np.eye(len(counts)), counts, axis=0)


def test_identical_sets_have_mauve_one() -> None:
    rows = cloud(60, 8, 1)
    assert mauve(rows, rows, seed=0) == pytest.approx(1.0, abs=1e-9)
    assert mauve(rows, rows[::-1], seed=0) == pytest.approx(1.0, abs=1e-9)


def test_sets_without_a_common_cluster_have_one_in_252() -> None:
    # KL(q|r) = -log(1-w), KL(p|r) = -log w: the area is the integral of w^5 5 (1-w)^4 = 5 B(6, 5) = 1/252.
    # 25 points of so steep a curve are some 3 % too much; a scale of 4 would give 1/70, one of 6 1/924.
    assert mauve(corners(20, 0), corners(0, 20), clusters=2, seed=0) == pytest.approx(1 / 252, rel=0.03)
    assert mauve(cloud(100, 8, 1, shift=30.0), cloud(100, 8, 2, shift=-30.0), seed=0) < 0.01


def test_mauve_matches_the_integral_of_its_frontier() -> None:
    # p = (1, 0), q = (1/2, 1/2): x = exp(-5 KL(q|r)) = (1 - w^2)^(5/2), y = exp(-5 KL(p|r)) = ((1 + w) / 2)^5.
    area, _ = quad(lambda w: ((1 + w) / 2) ** 5 * 5 * w * (1 - w * w) ** 1.5, 0, 1)
    assert mauve(corners(20, 0), corners(10, 10), clusters=2, seed=0) == pytest.approx(area, rel=0.01)
    assert mauve(corners(10, 10), corners(20, 0), clusters=2, seed=0) == pytest.approx(area, rel=0.01)


def test_mauve_falls_with_the_distance_and_repeats_with_its_seed() -> None:
    base = cloud(200, 8, 1)
    near, far = (mauve(base, cloud(200, 8, 2, shift=shift), seed=0) for shift in (0.0, 2.0))
    assert 0.8 < near <= 1.0
    assert 0.0 < far < 0.5 * near
    assert mauve(base, cloud(200, 8, 2), seed=0) == near


MINILM = Path(os.environ.get("FEDSYNTH_MODELS", "")) / "all-minilm-l6-v2"
BANKING, MEDICAL = (
    Path(os.environ.get("FEDSYNTH_DATA", "")) / f"{name}.parquet" for name in ("banking77", "medical_abstracts")
)


@pytest.mark.full
@pytest.mark.skipif(
    not ((MINILM / "config.json").is_file() and BANKING.is_file() and MEDICAL.is_file()),
    reason="no real embedder, or no real text",
)
def test_mauve_with_a_real_embedder_ranks_true_text_above_mixed_words_above_another_domain_and_one_text() -> None:
    """Measured: .95 to .99, .36 to .67, .005 to .007, and .0065; .92 to .94 with the words of each text shuffled."""
    from fedsynth.models.embedding import Embedder  # brings torch

    rng, embedder = np.random.default_rng(0), Embedder.load(str(MINILM), workers=1)

    def drawn(path: Path, count: int) -> list[str]:
        found = pd.read_parquet(path)["text"]
        return [" ".join(found[row].split()[:12]) for row in rng.permutation(len(found))[:count].tolist()]

    banking = drawn(BANKING, 200)
    first, second = banking[:100], banking[100:]
    words = iter(rng.permutation([word for text in second for word in text.split()]).tolist())
    sets = {
        "second half": second,
        "words shuffled in each text": [" ".join(rng.permutation(text.split())) for text in second],
        "words mixed over all texts": [" ".join(next(words) for _ in text.split()) for text in second],
        "another domain": drawn(MEDICAL, 100),
        "one text": [second[0]] * 100,
    }
    true = embedder.embed(first)
    vectors = {name: embedder.embed(texts) for name, texts in sets.items()}
    found = {name: [mauve(true, each, seed=seed) for seed in range(3)] for name, each in vectors.items()}
    assert min(found["second half"]) > 0.9
    assert 0.2 < min(found["words mixed over all texts"]) <= max(found["words mixed over all texts"]) < 0.8
    assert max(found["another domain"] + found["one text"]) < 0.02
    # A sentence encoder hardly sees the order of words, so that MAUVE by it does not either.
    assert min(found["words shuffled in each text"]) > 0.9
    assert max(found["words shuffled in each text"]) < min(found["second half"])


def test_sets_of_one_and_the_same_text_have_mauve_one() -> None:
    assert mauve(np.ones((5, 3)), np.ones((5, 3)), seed=0) == 1.0


# --- Frechet --------------------------------------------------------------------------------------------------------


def test_frechet_of_identical_sets_is_zero_with_many_rows_and_with_few() -> None:
    for rows in (300, 5):
        vectors = cloud(rows, 16, 1)
        assert frechet(vectors, vectors[::-1]) == pytest.approx(0.0, abs=1e-9)


def test_frechet_of_one_column_by_hand() -> None:
    # Means 0 and 10; variances 2 and 8: 100 + (sqrt 8 - sqrt 2)^2 = 102.
    assert frechet(np.array([[-1.0], [1.0]]), np.array([[8.0], [12.0]])) == pytest.approx(102.0)


def test_frechet_matches_the_root_of_the_product_of_covariances() -> None:
    p, q = cloud(400, 6, 1), 2 * cloud(400, 6, 2)[:, ::-1] + 0.5
    p_cov, q_cov = np.cov(p, rowvar=False), np.cov(q, rowvar=False)
    gap = p.mean(axis=0) - q.mean(axis=0)
    expected = gap @ gap + np.trace(p_cov + q_cov - 2 * sqrtm(p_cov @ q_cov).real)
    assert frechet(p, q) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_a_shift_is_its_squared_length_whatever_the_rank() -> None:
    for rows in (300, 5):
        vectors = cloud(rows, 16, 1)
        assert frechet(vectors, vectors + 0.5) == pytest.approx(16 * 0.25)


# --- Both, and variety ----------------------------------------------------------------------------------------------


def test_sets_of_different_size_or_not_finite_are_refused() -> None:
    bad = np.zeros((5, 3))
    bad[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 3\)"):
        mauve(np.zeros((4, 3)), np.zeros((5, 3)), seed=0)
    with pytest.raises(ValueError, match="equally many rows"):
        frechet(np.zeros((4, 3)), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="at least 2"):
        frechet(np.zeros((1, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="finite"):
        frechet(bad, bad)
    with pytest.raises(ValueError, match=r"clusters must lie in 2\.\.10"):
        mauve(np.zeros((5, 3)), np.zeros((5, 3)), clusters=11, seed=0)


def test_distinct_by_hand() -> None:
    assert distinct(["a b a", "A, b"], 1) == 2 / 5
    assert distinct(["a b a", "A, b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct(["a b"], 3) == distinct([], 1) == 0.0
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct(["a"], 0)
