"""What votes decide: the texts that are kept, and the controls that take the votes away."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from fedsynth.corpus import Corpus, Provenance, Votes, united

Selection = Literal["rank", "proportion"]


def permuted(votes: Votes, corpus: Corpus, seed: int) -> Votes:
    """The same votes on other texts of their label: a control, in which they tell nothing."""
    values, labels, rng = np.asarray(votes.values), np.asarray(corpus.answers), np.random.default_rng(seed)
    for label in dict.fromkeys(corpus.answers):
        rows = np.flatnonzero(labels == label)
        values[rows] = values[rng.permutation(rows)]
    return replace(votes, values=tuple(values.tolist()))


def kept(corpus: Corpus, votes: Votes, keep: int, *, select: Selection, threshold: float, seed: int) -> Corpus:
    """At most `keep` texts of each label, in the order of the corpus. The choice has the guarantee of the votes.

    Args:
        corpus: The candidates.
        votes: One number for each.
        keep: Texts of a label.
        select: `rank`: those with the most votes. `proportion`: drawn without replacement, each in proportion to its
            votes; where too few have votes, the rest by rank.
        threshold: Is taken from each text's votes first, and none falls below 0: noise alone then chooses less often.
        seed: Public seed of the draws.
    """
    values = np.asarray(votes.values)
    labels, rng, found = np.asarray(corpus.answers), np.random.default_rng(seed), list[int]()
    for label in dict.fromkeys(corpus.answers):
        rows = np.flatnonzero(labels == label)
        ranked = rows[np.argsort(-values[rows], kind="stable")]
        if select == "proportion":
            mass = np.maximum(values[rows] - threshold, 0.0)
            shares = mass / mass.sum() if mass.any() else mass
            some = min(keep, int((shares > 0).sum()))  # beside a huge count a small one may have no share
            drawn = rng.choice(rows, some, replace=False, p=shares) if some else rows[:0]
            ranked = np.concatenate([drawn, ranked[~np.isin(ranked, drawn)]])
        found += ranked[:keep].tolist()
    chosen = corpus.take(sorted(found))
    return replace(chosen, provenance=Provenance.LLM_WRITTEN, grants=united([corpus, votes]))


def by_chance(corpus: Corpus, keep: int, seed: int) -> Corpus:
    """At most `keep` texts of each label, drawn alike: a control without any vote."""
    labels, rng = np.asarray(corpus.answers), np.random.default_rng(seed)
    found = [
        row
        for label in dict.fromkeys(corpus.answers)
        for row in rng.permutation(np.flatnonzero(labels == label))[:keep].tolist()
    ]
    return corpus.take(sorted(found))
