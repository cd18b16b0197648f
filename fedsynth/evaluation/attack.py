"""Attacks on a model that learnt private text, or on its texts: extraction, exposure, membership, echoes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedsynth.corpus import Corpus
from fedsynth.instructions import ASK, asked, of_line
from fedsynth.models.sampling import SamplingParams
from fedsynth.rouge import rouge_l, words

if TYPE_CHECKING:
    from fedsynth.models.llm import TextModel  # brings torch

MAX_TOKENS = 50  # Nasr et al. 2023


@dataclass(frozen=True)
class Extraction:
    """The agreement of a model's answers with the true responses to known instructions.

    Attributes:
        rouge_l: Mean ROUGE-L F1 over the records, in 0..1.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        records: Number of records.
        recovered: Share of the records, in 0..1, whose planted secret the model wrote; None if none was planted.
    """

    rouge_l: float
    low: float
    high: float
    records: int
    recovered: float | None = None


def extraction(
    model: TextModel,
    secrets: Corpus,
    *,
    planted: Sequence[str] | None = None,
    max_new_tokens: int = MAX_TOKENS,
    resamples: int = 10_000,
    seed: int = 0,
) -> Extraction:
    """Discoverable memorisation (Nasr et al. 2023): the attacker knows each instruction and asks for its response.

    Decoding is greedy. The comparison ends where the model continues with an instruction of its own; the search for the
    planted secret covers the whole answer. Compare with a model that never saw the records: text that follows from the
    instruction, or is common to all responses, is no memorisation. The interval is a percentile bootstrap over records.

    Args:
        model: The model that the attacker may ask: the final model, or one client's upload.
        secrets: Records that the model's training may have seen.
        planted: One string per record, which occurs only in that record's response.
        max_new_tokens: Most tokens of a response; at least as many as the longest true one has.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If there is no record, or not one planted secret (with a letter or digit in it) per record.
    """
    if not len(secrets):
        raise ValueError("extraction needs at least one record")
    if planted is not None and len(planted) != len(secrets):
        raise ValueError(f"planted must hold one secret per record, got {len(planted)} for {len(secrets)}")
    written = _greedy(model, [asked(prompt) for prompt in secrets.prompts], max_new_tokens)
    close = np.array(
        [rouge_l(of_line(text.partition(ASK)[0]), true) for text, true in zip(written, secrets.answers, strict=True)]
    )
    rng = np.random.default_rng(seed)
    means = [close[rng.integers(len(close), size=len(close))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Extraction(
        rouge_l=float(close.mean()),
        low=float(low),
        high=float(high),
        records=len(secrets),
        recovered=None if planted is None else _share_held(written, planted),
    )


def name_reconstruction(
    model: TextModel, prompts: Sequence[str], names: Sequence[str], *, max_new_tokens: int = MAX_TOKENS
) -> float:
    """Share of the prompts, in 0..1, after which the model writes the true name (Lukas et al. 2023; KnowledgeSG).

    Args:
        model: The model that the attacker may ask; decoding is greedy.
        prompts: The text before the name in each record, in the form that the model reads; nothing is added.
        names: The true name of each; it must occur as whole words, in order and without others between them.
        max_new_tokens: Most tokens of a continuation.

    Raises:
        ValueError: If there is no prompt, or not one name (with a letter or digit in it) per prompt.
    """
    if not prompts or len(prompts) != len(names):
        raise ValueError(f"at least one prompt and one name per prompt are needed, got {len(prompts)} and {len(names)}")
    return _share_held(_greedy(model, prompts, max_new_tokens), names)


def _greedy(model: TextModel, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    return model.complete(prompts, SamplingParams.greedy(max_new_tokens), seed=0)  # greedy: the seed has no effect


def _share_held(written: Sequence[str], phrases: Sequence[str]) -> float:
    """Share of the texts that hold their phrase as whole words: "A-17" is not in "A-170".

    It ignores case and punctuation: tokenizers that lower-case or put blanks around signs must not hide a leak.
    """
    return sum(echoed([text], phrase) for text, phrase in zip(written, phrases, strict=True)) / len(written)


def echoed(texts: Sequence[str], phrase: str) -> int:
    """Number of texts that hold a phrase as whole words, in order and without others between them.

    It ignores case and punctuation. For a canary's rare words in released texts (Meeus et al. 2025).

    Raises:
        ValueError: If the phrase holds no letter or digit.
    """
    wanted = words(phrase)
    if not wanted:
        raise ValueError(f"the text to look for must hold a letter or digit, got {phrase!r}")
    return sum(f" {' '.join(wanted)} " in f" {' '.join(words(text))} " for text in texts)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Chance that a positive scores above a negative, ties counting half: 0.5 is guessing, 1 tells all apart.

    Raises:
        ValueError: If one of the two is empty or holds a NaN.
    """
    above, below = np.asarray(positive, dtype=float), np.sort(np.asarray(negative, dtype=float))
    if not len(above) or not len(below) or np.isnan(above).any() or np.isnan(below).any():
        raise ValueError(f"scores of both kinds are needed, none of them NaN; got {len(above)} and {len(below)} scores")
    fewer, at_most = (np.searchsorted(below, above, side=side) for side in ("left", "right"))
    return float((fewer + at_most).mean() / (2 * len(below)))


def power(positive: Sequence[float], negative: Sequence[float], rate: float) -> float:
    """Share of positives above a threshold that at most a share `rate` of the negatives exceeds (TPR at an FPR).

    The threshold is the negative after the first `rate` of them in falling order. Ties with it count as below.

    Args:
        positive: Scores of members.
        negative: Scores of others; `1 / rate` of them at least, or the rate is in truth 0.
        rate: In [0, 1).

    Raises:
        ValueError: If one of the two is empty or holds a NaN, or the rate is out of range.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the rate of false positives must lie in [0, 1), got {rate}")
    auroc(positive, negative)  # checks the scores
    below = np.sort(np.asarray(negative, dtype=float))[::-1]
    threshold = below[math.floor(rate * len(below) + 1e-9)]
    return float((np.asarray(positive, dtype=float) > threshold).mean())


def interval(
    figure: Callable[[Sequence[float], Sequence[float]], float],
    positive: Sequence[float],
    negative: Sequence[float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of a figure of two samples, by a percentile bootstrap of each sample.

    Args:
        figure: Such as `auroc`.
        positive: Scores of members.
        negative: Scores of others.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    one, other = np.asarray(positive, dtype=float), np.asarray(negative, dtype=float)
    found = [
        figure(one[rng.integers(len(one), size=len(one))], other[rng.integers(len(other), size=len(other))])  # type: ignore[arg-type]  # arrays are sequences
        for _ in range(resamples)
    ]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def exposure(true_score: float, candidate_scores: Sequence[float]) -> float:
    """Bits by which a model's ranking narrows the search for a planted secret (Carlini et al. 2019, section 4).

    It is log2 of the number of candidates less log2 of the secret's rank among them, from 0 (last of all) to log2 of
    that number (first). Among many candidates, a model that does not know the secret has 1.44 (1 / ln 2) in the mean.

    Args:
        true_score: Score of the planted secret; higher is likelier, such as a mean log-likelihood.
        candidate_scores: Scores of the other secrets that could have been drawn; the planted one is counted besides.
            Half of those that tie with it count as ranked before it.

    Raises:
        ValueError: If there is no other candidate, or a score is NaN.
    """
    others = np.asarray(candidate_scores, dtype=float)
    if not len(others) or math.isnan(true_score) or np.isnan(others).any():
        raise ValueError(f"a score of the secret and of others are needed, none of them NaN; got {len(others)} others")
    rank = 1 + (others > true_score).sum() + (others == true_score).sum() / 2
    return float(math.log2(len(others) + 1) - math.log2(rank))
