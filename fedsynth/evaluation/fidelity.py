"""Fidelity of synthetic text: its distance to other text, the fit of answers to prompts, and its variety."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # ships no types

from fedsynth.models.form import LINES, Form
from fedsynth.rouge import words

if TYPE_CHECKING:
    from fedsynth.models.llm import TextModel  # brings torch


def ifd(llm: TextModel, prompts: Sequence[str], answers: Sequence[str], form: Form = LINES) -> list[float]:
    """NLL(y|x) / NLL(y) of each pair, as means per token of the answer (IFD: Li et al. 2024; FedPIT's IFS).

    NLL(y|x) is taken after the instruction in the model's form, NLL(y) after the same form without an instruction.
    The ratio is below 1 if the prompt helps to foresee the answer, above 1 if it misleads, and infinite if the answer
    was certain without it. KnowledgeSG's mean leaves out values above 1.

    Args:
        llm: An LLM that scores; all pairs go in one call.
        prompts: Instructions.
        answers: One answer per instruction, not empty.
        form: The form in which the LLM reads them.

    Raises:
        ValueError: If the numbers of texts differ, or `llm` cannot score one of the texts.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"each prompt needs an answer, got {len(answers)} for {len(prompts)}")
    before = [form.asked(prompt) for prompt in prompts] + [form.unasked()] * len(prompts)
    means = llm.score(before, [form.reply(answer) for answer in answers] * 2)
    given, alone = means[: len(prompts)], means[len(prompts) :]
    return [with_x / without if without else math.inf for with_x, without in zip(given, alone, strict=True)]


# Pillutla et al. 2021, as in the authors' package, so that figures can be compared with published ones.
SCALE = 5.0  # of the divergences; the paper's c
MIXTURES = 25  # points of the frontier
VARIANCE = 0.9  # share that the principal components keep before k-means


def mauve(
    p_vectors: NDArray[np.floating], q_vectors: NDArray[np.floating], *, clusters: int | None = None, seed: int
) -> float:
    """MAUVE of two sets of embeddings (Pillutla et al. 2021): area under their divergence frontier, in 0..1.

    K-means quantises both sets together and ignores the lengths of vectors. Two sets without a common cluster have
    about 1/252, not 0. MAUVE depends on the numbers of rows and clusters: compare figures only if both are the same.

    Args:
        p_vectors: Embeddings, shape (rows, width).
        q_vectors: Embeddings of the same shape and embedder.
        clusters: Number of clusters; None for a tenth of a set's rows, at least 2 (the authors' rule).
        seed: Seed of the first centres.

    Raises:
        ValueError: If the shapes differ, a set is empty or not finite, or `clusters` is out of range.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    p_vectors, q_vectors = _of_equal_size(p_vectors, q_vectors, least=1)
    size = len(p_vectors)
    wanted = max(2, round(size / 10)) if clusters is None else clusters
    if not 2 <= wanted <= 2 * size:
        raise ValueError(f"clusters must lie in 2..{2 * size} (the rows of both sets), got {wanted}")
    rows = normalize(np.vstack([p_vectors, q_vectors]))
    wanted = min(wanted, len(np.unique(rows, axis=0)))
    if wanted == 1:
        return 1.0  # all texts are the same
    with threadpool_limits(limits=1):  # as in curation: sums in the same order give the same clusters
        rows = PCA(n_components=VARIANCE, svd_solver="full").fit_transform(rows)
        labels = KMeans(n_clusters=wanted, n_init=5, max_iter=500, random_state=seed).fit(rows).labels_
    p = np.bincount(labels[:size], minlength=wanted) / size
    q = np.bincount(labels[size:], minlength=wanted) / size
    return _frontier_area(p, q)


def _frontier_area(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Area under (exp -c KL(q|r), exp -c KL(p|r)) over the mixtures r of two histograms, from (0, 1) to (1, 0)."""
    weight = np.linspace(1 - 1e-6, 1e-6, MIXTURES)[:, None]  # not 0 and 1: there a divergence may be infinite
    mixed = weight * p + (1 - weight) * q
    x = np.exp(-SCALE * rel_entr(q, mixed).sum(axis=1))
    y = np.exp(-SCALE * rel_entr(p, mixed).sum(axis=1))
    return float(np.trapezoid([1.0, *y, 0.0], [0.0, *x, 1.0]))


def frechet(p_vectors: NDArray[np.floating], q_vectors: NDArray[np.floating]) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of embeddings (FID: Heusel et al. 2017, eq. 6).

    It is at least 0, in squared units of the embedding. Few rows bias it upwards: compare only sets of equal size.

    Args:
        p_vectors: Embeddings, shape (rows, width), at least 2 rows.
        q_vectors: Embeddings of the same shape and embedder.

    Raises:
        ValueError: If the shapes differ, or a set has fewer than 2 rows or is not finite.
    """
    p_vectors, q_vectors = _of_equal_size(p_vectors, q_vectors, least=2)
    p_mean, q_mean = p_vectors.mean(axis=0), q_vectors.mean(axis=0)
    free = len(p_vectors) - 1
    with threadpool_limits(limits=1):  # threads of so small a matrix mostly wait for each other
        p_root = np.linalg.qr(p_vectors - p_mean).R / math.sqrt(free)
        q_root = np.linalg.qr(q_vectors - q_mean).R / math.sqrt(free)
        # With covariances R'R and S'S, tr((R'R S'S)^1/2) is the sum of the singular values of RS'. No root of a matrix
        # is taken, so that covariances without full rank (fewer rows than columns) need no correction.
        cross = np.linalg.svd(p_root @ q_root.T, compute_uv=False).sum()
    distance = ((p_mean - q_mean) ** 2).sum() + (p_root**2).sum() + (q_root**2).sum() - 2 * cross
    return max(0.0, float(distance))


def _of_equal_size(
    p_vectors: NDArray[np.floating], q_vectors: NDArray[np.floating], *, least: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    p, q = np.asarray(p_vectors, dtype=np.float64), np.asarray(q_vectors, dtype=np.float64)
    if p.ndim != 2 or p.shape != q.shape or len(p) < least:
        raise ValueError(
            f"two sets of equally many rows (at least {least}) and columns are needed, got shapes {p.shape} and "
            f"{q.shape}; draw as many rows from the larger set as the smaller has"
        )
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        raise ValueError("the vectors must be finite, got NaN or infinity among them")
    return p, q


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of all texts (Li et al. 2016), in 0..1; 0 if there is none.

    It falls with the amount of text: compare sets of equal size.

    Raises:
        ValueError: If `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    grams = [tuple(row[i : i + n]) for row in map(words, texts) for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


UNSEEN = 0.1  # stands for a count of 0 (Chen and Cherry 2014, method 1): one missing order must not make all of BLEU 0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 of each text against all others (Zhu et al. 2018), in 0..1; it is higher for more similar texts.

    Words are those of `rouge.words`. The reference length is the closest one. A text shorter than 4 words counts with
    the orders that it has. It rises with the number of texts: compare sets of equal size.

    Raises:
        ValueError: If there are fewer than 2 texts.
    """
    rows = [words(text) for text in texts]
    if len(rows) < 2:
        raise ValueError(f"self-BLEU compares texts with each other: at least 2 are needed, got {len(rows)}")
    grams = [[Counter(zip(*(row[k:] for k in range(n)), strict=False)) for n in (1, 2, 3, 4)] for row in rows]
    # The largest count of an n-gram over all texts, the text that has it, and the largest of the rest. They give the
    # largest count over the other texts for each text without comparing every pair.
    most: list[dict[tuple[str, ...], tuple[int, int, int]]] = [{}, {}, {}, {}]
    for i, of_row in enumerate(grams):
        for order, counts in enumerate(of_row):
            for gram, count in counts.items():
                first, owner, second = most[order].get(gram, (0, -1, 0))
                most[order][gram] = (count, i, first) if count > first else (first, owner, max(second, count))
    lengths = Counter(map(len, rows))
    return sum(_bleu(i, row, grams[i], most, lengths) for i, row in enumerate(rows)) / len(rows)


def _bleu(
    i: int,
    row: Sequence[str],
    own: Sequence[Counter[tuple[str, ...]]],
    most: Sequence[dict[tuple[str, ...], tuple[int, int, int]]],
    lengths: Counter[int],
) -> float:
    logs = []
    for order, counts in enumerate(own):
        if not counts:
            continue
        seen = 0
        for gram, count in counts.items():
            first, owner, second = most[order][gram]
            seen += min(count, second if owner == i else first)
        logs.append(math.log((seen or UNSEEN) / counts.total()))
    if not logs:
        return 0.0
    others = [n for n, texts in lengths.items() if texts > (n == len(row))]
    closest = min(others, key=lambda n: (abs(n - len(row)), n))
    brevity = min(0.0, 1 - closest / len(row))
    return math.exp(brevity + sum(logs) / len(logs))
