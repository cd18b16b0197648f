"""The check that a text fits the label it was asked for: by a sentence embedder, or by an LLM's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from fedsynth.corpus import Corpus
from fedsynth.evaluation.choice import likeliest, said_choice
from fedsynth.models.chat import Chat, Prompt
from fedsynth.models.room import misfits
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.task import Task
from fedsynth.synthesis.curation import Filtered, keep_rows, refuse_private

if TYPE_CHECKING:
    from fedsynth.models.llm import TextModel  # imports torch, which a scripted or remote LLM does not need

OTHER = "another label is nearer"
CHOSEN = "another label is chosen"
UNREADABLE = "no label is chosen"
ANSWER = 32  # tokens of a choice, at most: a wording


def check_of(
    kind: Literal["none", "embedder", "llm"],
    labels: Sequence[str],
    task: Task,
    llm: TextModel,
    embed: Callable[[Sequence[str]], NDArray[np.float32]],
) -> Callable[[Corpus], Filtered] | None:
    """The check that `strategy.label_check` names; None for none."""
    if kind == "llm":
        return lambda corpus: chosen(corpus, labels, task, llm)
    return None if kind == "none" else lambda corpus: fitting(corpus, labels, task, embed)


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


def chosen(corpus: Corpus, labels: Sequence[str], task: Task, llm: TextModel) -> Filtered:
    """The texts for which an LLM chooses the label that they were asked for.

    An LLM that converses is asked the card's question `choice`, and its answer must hold one wording. Another one goes
    on from that question: the likeliest wording is its choice.

    Args:
        corpus: Released or public texts and the labels that they were asked for.
        labels: The public list.
        task: The card: the question, and each label's wording.
        llm: The server's: a public model, or one trained under the grant of the texts.

    Raises:
        ValueError: If the corpus is private.
    """
    refuse_private(corpus)
    wordings = {task.wording(label): label for label in labels}
    asked = [task.choice(text, labels) for text in corpus.prompts]
    prompts: list[Prompt] = [Chat(question, task.system) if llm.chats else f"{question}\n" for question in asked]
    reasons = misfits(llm, prompts, ANSWER)
    fits = [row for row, why in enumerate(reasons) if why is None]
    found: list[str | None]
    if llm.chats:
        answers = llm.complete([prompts[row] for row in fits], SamplingParams.greedy(ANSWER, one_line=True), seed=0)
        found = [said_choice(answer, list(wordings)) for answer in answers]
    else:
        places = likeliest(llm, [prompts[row] for row in fits], [list(wordings)] * len(fits))
        found = [None if place is None else list(wordings)[place] for place in places]
    for row, wording in zip(fits, found, strict=True):
        if wording is None:
            reasons[row] = UNREADABLE
        elif wordings[wording] != corpus.answers[row]:
            reasons[row] = CHOSEN
    return keep_rows(corpus, reasons)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)
