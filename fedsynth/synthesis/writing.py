"""Writing until each label has its share: the LLM is asked, texts are filtered, and asked for again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from fedsynth.corpus import Corpus, Provenance, pool
from fedsynth.limits import MAX_TEXT
from fedsynth.models.llm import TextModel
from fedsynth.scenario.task import Task
from fedsynth.synthesis.augmentation import Demonstrating, augment, lacking, turns
from fedsynth.synthesis.curation import Filtered, Steps, asked_for, deduplicate, summed, well_formed

Names: TypeAlias = Mapping[str, tuple[str, tuple[str, ...]]]
"""Name of a label with values -> the label and the values (`Task.crossed`)."""
NOTHING = Corpus((), (), Provenance.PUBLIC)


@dataclass(frozen=True)
class Curation:
    """The filters that drafts and written texts pass.

    Attributes:
        labels: The public list.
        min_words: Fewest words of a text.
        sentences: True to drop texts that look like code, JSON or markup.
        label_check: Keeps the texts that fit their labels; None for no check.
    """

    labels: tuple[str, ...]
    min_words: int
    sentences: bool
    label_check: Callable[[Corpus], Filtered] | None = None

    def steps(
        self,
        name: str,
        corpus: Corpus,
        missing: Mapping[str, int],
        asked: Sequence[str] | None = None,
        before: Corpus = NOTHING,
    ) -> Steps:
        """The well-formed texts, each once, that fit their labels, beside the number that was asked for.

        Args:
            name: Name of the first step; the others are called after it.
            corpus: Released or public texts.
            missing: Reason -> texts that never came.
            asked: The labels of the requested texts; left out, all.
            before: Texts that are kept already.
        """
        formed = well_formed(
            corpus, labels=self.labels, min_words=self.min_words, sentences=self.sentences, longest=MAX_TEXT
        )
        unique = deduplicate(formed.corpus, before)
        steps = [(name, asked_for(formed, asked or self.labels, missing)), (f"{name}_unique", unique)]
        return [*steps, (f"{name}_fitting", self.label_check(unique.corpus))] if self.label_check else steps


@dataclass(frozen=True)
class Written:
    """The LLM's texts for one client.

    Attributes:
        corpus: The texts that passed; the guarantee is that of the demonstrations.
        steps: The funnel of all attempts.
        bare: Texts that were requested without a demonstration of their label, because none was left.
    """

    corpus: Corpus
    steps: Steps
    bare: int


def write(
    llm: TextModel,
    shown: Mapping[int, Corpus],
    how: Demonstrating,
    curation: Curation,
    *,
    num_texts: int,
    seeds: Sequence[int],
    task: Task,
    name: str = "written",
) -> dict[int, Written]:
    """More text like each client's demonstrations (FDKT, step 7): all clients' prompts in one batch, and again for the
    texts that the filters took.

    Args:
        llm: The server's.
        shown: By client; released demonstrations, or none.
        how: The form of a prompt, and the sampling of its answer.
        curation: The filters.
        num_texts: Texts for each client, uniform over the labels.
        seeds: A seed for each attempt; the LLM is asked so often at most.
        task: The card: how a label is put into words.
        name: Name of the funnel's first step.
    """
    wanted = {client: turns(curation.labels, num_texts) for client in shown}
    corpora = dict.fromkeys(shown, NOTHING)
    steps: dict[int, list[Steps]] = {client: [] for client in shown}
    bare = dict.fromkeys(shown, 0)
    for attempt, seed in enumerate(seeds):
        demonstrations = {client: shown[client] for client in wanted}
        replies = augment(llm, demonstrations, how, labels=curation.labels, wanted=wanted, seed=seed, task=task)
        for client, reply in replies.items():
            asked, came = wanted[client], len(reply.corpus) + sum(reply.dropped.values())
            missing = {**reply.dropped, "not written": max(0, len(asked) - came)}
            found = curation.steps(name, reply.corpus, missing, list(dict.fromkeys(asked)), corpora[client])
            kept = found[-1][1].corpus
            corpora[client] = pool([corpora[client], kept]) if attempt else kept
            steps[client].append(found)
            bare[client] += sum(reply.bare.values())
        left = {client: lacking(corpus, curation.labels, num_texts) for client, corpus in corpora.items()}
        wanted = {client: labels for client, labels in left.items() if labels}
        if not wanted:
            break
    return {client: Written(corpora[client], summed(steps[client]), bare[client]) for client in shown}


def write_combinations(
    llm: TextModel,
    client: int,
    how: Demonstrating,
    curation: Curation,
    *,
    num_texts: int,
    seeds: Sequence[int],
    task: Task,
    name: str,
) -> Written:
    """Texts without demonstrations, of every label with every combination of the card's attributes in turn; each has
    its values beside it. Without attributes they are those of `write`.

    Args:
        llm: The server's.
        client: Number under which they are written.
        how: As for `write`, without demonstrations.
        curation: The filters; texts are checked against their labels, not against their values.
        num_texts: Number of texts, uniform over labels and combinations.
        seeds: As for `write`.
        task: As for `write`.
        name: As for `write`.
    """
    nothing = {client: NOTHING}
    if not task.attributes:
        return write(llm, nothing, how, curation, num_texts=num_texts, seeds=seeds, task=task, name=name)[client]
    card, names = task.crossed(curation.labels)
    check = curation.label_check and partial(_checked_by_label, curation.label_check, names)
    crossed = replace(curation, labels=tuple(names), label_check=check)
    found = write(llm, nothing, how, crossed, num_texts=num_texts, seeds=seeds, task=card, name=name)[client]
    corpus = replace(_in_labels(found.corpus, names), attributes=tuple(names[name][1] for name in found.corpus.answers))
    return Written(corpus, [(step, _by_label(filtered, names)) for step, filtered in found.steps], found.bare)


def _checked_by_label(check: Callable[[Corpus], Filtered], names: Names, corpus: Corpus) -> Filtered:
    found = check(_in_labels(corpus, names))
    own = dict(zip(corpus.prompts, corpus.answers, strict=True))  # each text stands there once
    answers = tuple(own[text] for text in found.corpus.prompts)
    lost = tuple(name for name in dict.fromkeys(corpus.answers) if name not in set(answers))
    return Filtered(replace(found.corpus, answers=answers), found.dropped, lost)


def _by_label(found: Filtered, names: Names) -> Filtered:
    """A step with labels in place of labels with values; a label is lost with all its combinations."""
    corpus = _in_labels(found.corpus, names)
    lost = dict.fromkeys(names[name][0] for name in found.lost)
    return Filtered(corpus, found.dropped, tuple(label for label in lost if label not in set(corpus.answers)))


def _in_labels(corpus: Corpus, names: Names) -> Corpus:
    return replace(corpus, answers=tuple(names[name][0] for name in corpus.answers))
