"""Rows that choose as instructions: which of the labels does a text have, or which of its own options is right?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedsynth.corpus import Corpus
from fedsynth.data.partition import ClientData
from fedsynth.scenario.task import Task


def as_instructions(site: ClientData, labels: Sequence[str], task: Task) -> ClientData:
    """A client's rows with the card's question about each text, and the label's wording as the response.

    Where rows bring their own options, the question lists these, and the response is the letter of the right one.
    Nothing is learnt from a training row whose label is not listed: it holds its unit's place without a text. In a test
    row such a label is a response that no wording equals, as a classifier never finds it.

    Args:
        site: Texts and class names.
        labels: The public label list; empty where rows bring their own options.
        task: The card.
    """
    if site.train.options is not None:
        return ClientData(_lettered(site.train, task), _lettered(site.test, task))
    wordings = {label: task.wording(label) for label in labels}

    def asked(text: str) -> str:
        return task.choice(text, labels) if text else ""

    train, test = site.train, site.test
    known = [label in wordings for label in train.answers]
    return ClientData(
        replace(
            train,
            prompts=tuple(asked(text) if here else "" for text, here in zip(train.prompts, known, strict=True)),
            answers=tuple(wordings.get(label, "") for label in train.answers),
        ),
        replace(
            test,
            prompts=tuple(map(asked, test.prompts)),
            answers=tuple(wordings.get(label, "") for label in test.answers),
        ),
    )


def _lettered(corpus: Corpus, task: Task) -> Corpus:
    rows = zip(corpus.prompts, corpus.options or (), strict=True)
    return replace(corpus, prompts=tuple(task.lettered(text, options) for text, options in rows))
