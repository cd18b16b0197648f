"""Augmentation: what is asked of the server LLM, and how its answers are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, assert_never

import numpy as np

from fedsynth.corpus import Corpus, Provenance, same
from fedsynth.instructions import one_line
from fedsynth.models.room import misfits
from fedsynth.models.sampling import SamplingParams
from fedsynth.synthesis.curation import refuse_private

if TYPE_CHECKING:
    from fedsynth.models.llm import TextModel  # brings torch, which a scripted or remote LLM does not need

Mode: TypeAlias = Literal["per_label", "all_labels", "none"]

# --- Augmentation: plain lines of one label, for a base LLM with a small context -----------------------------------

LINE = "{label}: {text}\n"
OPEN_LINE = "{label}:"  # without a blank: byte-level tokenizers put it into the text's first token


def line_prompt(label: str, texts: Iterable[str]) -> str:
    """Few-shot lines of one label and the label once more; no texts leave the label's name alone."""
    return "".join(LINE.format(label=label, text=one_line(t)) for t in texts) + OPEN_LINE.format(label=label)


def parse_line(answer: str) -> str | None:
    """The answer's first line that is not blank, or None."""
    lines = answer.strip().splitlines()
    return lines[0].strip() if lines else None


# --- Augmentation: an instruction and blocks of all labels (docs/methods/fdkt.md, step 7) ---------------------------

DELIMITER = "-----"
BLOCK = DELIMITER + "\nLabel: {label}\nText: {text}\n"

ALL_LABELS = """Each block below holds one text and its label. The labels are: {labels}.
{blocks}{delimiter}

Write more texts like these, one new block for each of these labels: {wanted}.
Use the same format: a line {delimiter}, a line that begins with "Label:", a line that begins with "Text:".
Stay in the domain of the blocks above, and do not copy them.
"""

# Not in the paper: there, a label whose examples the filter all dropped silently never returns.
LABEL_ONLY = """The labels of some short texts are: {labels}.
Write one new text for each of these labels: {wanted}.
Give each as a block: a line {delimiter}, a line that begins with "Label:", a line that begins with "Text:".
"""


def blocks_prompt(examples: Iterable[tuple[str, str]], *, labels: Sequence[str], wanted: Sequence[str]) -> str:
    """The instruction to write one block for each wanted label.

    Args:
        examples: (label, text); none of them asks by the labels' names alone.
        labels: All labels of the task.
        wanted: The labels to write for.
    """
    blocks = "".join(BLOCK.format(label=label, text=one_line(text)) for label, text in examples)
    template = ALL_LABELS if blocks else LABEL_ONLY
    return template.format(labels=", ".join(labels), blocks=blocks, wanted=", ".join(wanted), delimiter=DELIMITER)


FIELDS = re.compile(r"\s*Label:[ \t]*(?P<label>[^\n]+?)[ \t]*\n\s*Text:\s*(?P<text>\S.*)", re.DOTALL)

RAN_ON = re.compile(r"^[ \t]*Label:[^\n]*\n[ \t]*Text:", re.MULTILINE)  # the next block, without its line before it


def parse_blocks(answer: str, labels: Sequence[str]) -> tuple[list[tuple[str, str]], Counter[str]]:
    """The (label, text) blocks of an answer, and why the others were dropped."""
    found: list[tuple[str, str]] = []
    dropped: Counter[str] = Counter()
    for block in re.split(rf"^[ \t]*{DELIMITER}-*[ \t]*$", answer, flags=re.MULTILINE):
        if not block.strip():
            continue
        fields = FIELDS.match(block)
        if fields is None:
            dropped["unreadable block"] += 1
        elif fields["label"] not in labels:
            dropped["mistyped label"] += 1
        elif RAN_ON.search(fields["text"]):
            dropped["template marker"] += 1
        else:
            found.append((fields["label"], one_line(fields["text"])))
    return found, dropped


@dataclass(frozen=True)
class Augmented:
    """What the LLM wrote for one site.

    Attributes:
        corpus: The texts and the labels they were asked for; the guarantee is that of the demonstrations.
        dropped: Reason -> answers or blocks that gave no text.
        prompts: How many were put to the LLM.
        bare: Label -> texts asked for by the label's name alone, because no demonstration of it was left.
    """

    corpus: Corpus
    dropped: Mapping[str, int]
    prompts: int
    bare: Mapping[str, int]


class _Deck:
    """Draws without replacement until all rows are drawn, then shuffles again (FDKT)."""

    def __init__(self, texts: Sequence[str], rng: np.random.Generator):
        self.texts, self.rng = texts, rng
        self.left: list[int] = []

    def draw(self, shots: int) -> list[str]:
        hand: list[int] = []
        while len(hand) < shots:
            if not self.left:
                # Those in hand go to the bottom: no prompt repeats a text while there is another.
                self.left = sorted(self.rng.permutation(len(self.texts)).tolist(), key=lambda row: row not in hand)
            hand.append(self.left.pop())
        return [self.texts[row] for row in hand]


@dataclass(frozen=True)
class Demonstrating:
    """How texts are asked for.

    Attributes:
        per_site: Texts asked for; fewer come back where an answer cannot be read.
        mode: "per_label": one text per prompt, after `shots` demonstrations of its label (or all, if there are fewer).
            "all_labels" (the paper's): one text per label and prompt, after `shots` of each label.
            "none": one text per prompt, after its label's name alone (an ablation).
        shots: Demonstrations of a label in a prompt.
        sampling: Of one answer; FDKT: temperature 0.8, top-p 0.9.
    """

    per_site: int
    mode: Mode
    shots: int
    sampling: SamplingParams


@dataclass(frozen=True)
class _Asked:
    """The demonstrations of a prompt, how it is made of them, and how its answer is read."""

    site: int
    shown: Sequence[tuple[str, str]]
    render: Callable[[Sequence[tuple[str, str]]], str]
    read: Callable[[str], tuple[list[tuple[str, str]], Counter[str]]]


def augment(
    llm: TextModel,
    demonstrations: Mapping[int, Corpus],
    how: Demonstrating,
    *,
    labels: Sequence[str],
    seed: int,
) -> dict[int, Augmented]:
    """More texts like each site's demonstrations, all sites' prompts in one call.

    Args:
        llm: The server's.
        demonstrations: By site; released texts and their class names.
        how: They are shown, and texts asked for.
        labels: The public ones. Texts are asked for uniformly, in turn: a site's label counts stay with the site.
        seed: Of the demonstrations' order and of the LLM's sampling.

    Raises:
        ValueError: If demonstrations are private, or an argument is out of range.
    """
    for corpus in demonstrations.values():
        refuse_private(corpus)
    check_labels(labels)
    if how.per_site < 1 or how.shots < 1:
        raise ValueError(f"per_site and shots must be at least 1, got {how.per_site} and {how.shots}")
    asked: list[_Asked] = []
    bare: dict[int, Counter[str]] = {}
    for site, corpus in sorted(demonstrations.items()):
        # A site's prompts depend on its own demonstrations only, not on which other sites answered.
        rng = np.random.default_rng([seed, site])
        decks = {label: _Deck(texts, rng) for label, texts in _by_label(corpus, labels).items() if texts}
        turns = [labels[i % len(labels)] for i in range(how.per_site)]
        bare[site] = Counter()
        if how.mode != "none":
            bare[site].update(label for label in turns if label not in decks)
        match how.mode:
            case "all_labels":
                asked += [
                    _Asked(site, examples, _block_writer(labels, wanted), _block_reader(labels))
                    for examples, wanted in _blocks(turns, decks, labels, how.shots)
                ]
            case "per_label" | "none":
                for label in turns:
                    deck = decks.get(label) if how.mode == "per_label" else None
                    texts = [] if deck is None else deck.draw(min(how.shots, len(deck.texts)))
                    asked.append(_Asked(site, [(label, t) for t in texts], _line_writer(label), _line_reader(label)))
            case never:
                assert_never(never)

    answers = llm.complete(_fitting(llm, asked, how.sampling.max_new_tokens), how.sampling, seed=seed)

    written: dict[int, list[tuple[str, str]]] = {site: [] for site in bare}
    dropped: dict[int, Counter[str]] = {site: Counter() for site in bare}
    for question, answer in zip(asked, answers, strict=True):
        examples, reasons = question.read(answer)
        written[question.site] += examples
        dropped[question.site].update(reasons)
    counts = Counter(a.site for a in asked)
    return {
        site: Augmented(
            corpus=_written_after(demonstrations[site] if how.mode != "none" else None, written[site]),
            dropped=dict(dropped[site]),
            prompts=counts[site],
            bare=dict(bare[site]),
        )
        for site in bare
    }


def misfit(
    llm: TextModel, corpus: Corpus, *, labels: Sequence[str], mode: Mode, max_new_tokens: int
) -> list[str | None]:
    """Why texts cannot be demonstrations of `augment`, not even alone in a prompt; None for one that can.

    Args:
        llm: The server's.
        corpus: Released texts and their class names.
        labels: The public ones.
        mode: Of `augment`.
        max_new_tokens: Of `augment`.
    """
    pairs = zip(corpus.answers, corpus.prompts, strict=True)
    if mode == "all_labels":
        return misfits(llm, [blocks_prompt([pair], labels=labels, wanted=labels) for pair in pairs], max_new_tokens)
    return misfits(llm, [line_prompt(label, [text]) for label, text in pairs], max_new_tokens)


def bare_misfit(llm: TextModel, labels: Sequence[str], mode: Mode, max_new_tokens: int) -> str | None:
    """Why not even prompts without demonstrations fit into the LLM; None where they do. Arguments as of `misfit`."""
    if mode == "all_labels":
        prompts = [blocks_prompt([], labels=labels, wanted=labels)]
    else:
        prompts = [line_prompt(label, []) for label in labels]
    return next(filter(None, misfits(llm, prompts, max_new_tokens)), None)


def _fitting(llm: TextModel, asked: Sequence[_Asked], max_new_tokens: int) -> list[str]:
    """The prompts; of one that does not fit into the LLM the longest demonstrations are left out until it does."""
    shown = [list(a.shown) for a in asked]
    prompts = [a.render(a.shown) for a in asked]
    left = list(range(len(asked)))
    while left:
        unfit = misfits(llm, [prompts[i] for i in left], max_new_tokens)
        left = [i for i, why in zip(left, unfit, strict=True) if why and shown[i]]
        for i in left:
            shown[i].remove(max(shown[i], key=lambda example: len(example[1])))
            prompts[i] = asked[i].render(shown[i])
    return prompts


def _line_writer(label: str) -> Callable[[Sequence[tuple[str, str]]], str]:
    return lambda shown: line_prompt(label, [text for _, text in shown])


def _block_writer(labels: Sequence[str], wanted: Sequence[str]) -> Callable[[Sequence[tuple[str, str]]], str]:
    return lambda shown: blocks_prompt(shown, labels=labels, wanted=wanted)


def _blocks(
    turns: Sequence[str], decks: Mapping[str, _Deck], labels: Sequence[str], shots: int
) -> Iterable[tuple[list[tuple[str, str]], list[str]]]:
    """Demonstrations of a prompt, and the labels that it asks for."""
    for start in range(0, len(turns), len(labels)):
        wanted = turns[start : start + len(labels)]
        shown = [label for label in wanted if label in decks]
        if shown:
            examples = [(label, text) for label in labels if label in decks for text in decks[label].draw(shots)]
            yield examples, shown
        lost = [label for label in wanted if label not in decks]
        if lost:
            yield [], lost


def _block_reader(labels: Sequence[str]) -> Callable[[str], tuple[list[tuple[str, str]], Counter[str]]]:
    return lambda answer: parse_blocks(answer, labels)


def _line_reader(label: str) -> Callable[[str], tuple[list[tuple[str, str]], Counter[str]]]:
    def read(answer: str) -> tuple[list[tuple[str, str]], Counter[str]]:
        text = parse_line(answer)
        return ([], Counter({"empty answer": 1})) if text is None else ([(label, text)], Counter())

    return read


def _written_after(demonstrations: Corpus | None, examples: Sequence[tuple[str, str]]) -> Corpus:
    """The LLM's texts under the guarantee of what it had read: nothing is better than the worst of its sources."""
    if demonstrations is None or demonstrations.provenance is Provenance.PUBLIC:
        provenance = Provenance.PUBLIC  # the LLM and the labels' names are public
    elif demonstrations.provenance is Provenance.SELF_GENERATED:
        provenance = Provenance.SELF_GENERATED
    else:
        provenance = Provenance.LLM_WRITTEN
    return Corpus(
        prompts=tuple(text for _, text in examples),
        answers=tuple(label for label, _ in examples),
        provenance=provenance,
        grants=() if demonstrations is None else demonstrations.grants,
    )


def _by_label(corpus: Corpus, labels: Sequence[str]) -> dict[str, list[str]]:
    """Texts of each label; answers that are not labels are left out."""
    texts: dict[str, list[str]] = {label: [] for label in labels}
    for text, label in zip(corpus.prompts, corpus.answers, strict=True):
        if label in texts:
            texts[label].append(text)
    return texts


def check_labels(labels: Sequence[str]) -> None:
    """Labels stand in prompts and control codes.

    Raises:
        ValueError: If there is none, one stands there twice, or one cannot stand in a line.
    """
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be distinct, and at least one, got {list(labels)}")
    for label in labels:
        if wrong := _in_no_line(label):
            raise ValueError(f"label {label!r} cannot stand in a prompt's line: it {wrong}")


def _in_no_line(label: str) -> str:
    """Why a label can stand in no line of a prompt; "" for one that can."""
    if not same(label):
        return "is blank"
    if ":" in label:
        return "holds a colon"
    if label.splitlines() != [label]:
        return "holds a line end"
    if label != label.strip():
        return f"{'begins' if label[0].isspace() else 'ends'} with a blank"
    if odd := [char for char in label if char.isspace() and char != " "]:
        return f"holds white space that is no blank ({odd[0]!a})"
    return "holds two blanks in a row" if "  " in label else ""
