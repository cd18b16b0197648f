"""The check that a text fits the label it was asked for, by a sentence embedder and the labels in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedsynth.corpus import Corpus
from fedsynth.scenario.task import Task
from fedsynth.synthesis.curation import Filtered, keep_rows, refuse_private

OTHER = "another label is nearer"


def fitting(
    corpus: Corpus, labels: Sequence[str], task: Task, embed: Callable[[Sequence[str]], NDArray[np.float32]]
) -> Filtered:
    """The texts that lie nearest to their own label, by the cosine of a text and each label in words.

    Args:
        corpus: Released or public texts and the labels that they were asked for.
        labels: The public list; a text under another label is dropped.
        task: The card: a label in words is its wording and its description.
        embed: Texts -> vectors, shape (texts, width).

    Raises:
        ValueError: If the corpus is private.
    """
    refuse_private(corpus)
    if not len(corpus):
        return Filtered(corpus, {})
    nearest = _unit(embed(corpus.prompts)) @ _unit(embed(list(map(task.in_words, labels)))).T
    found = [labels[i] for i in nearest.argmax(1).tolist()]
    return keep_rows(corpus, [None if y == own else OTHER for y, own in zip(found, corpus.answers, strict=True)])


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)
