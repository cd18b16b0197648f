"""Augmentation: demonstrations drawn into prompts (the question's words: scenario/task.py), and answers read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar, assert_never

import numpy as np

from fedsynth.corpus import Corpus, Provenance, same
from fedsynth.instructions import one_line
from fedsynth.models.chat import Chat
from fedsynth.models.room import misfits
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.task import NO_CARD, Task
from fedsynth.synthesis.curation import refuse_private

if TYPE_CHECKING:
    from fedsynth.models.llm import TextModel  # imports torch, which a scripted or remote LLM does not need

T = TypeVar("T")
Mode: TypeAlias = Literal["per_label", "all_labels", "none"]

# --- One text of one label: lines for a base LLM, a question to an LLM that converses -------------------------------


def line_prompt(label: str, texts: Iterable[str], task: Task = NO_CARD) -> str:
    """Few-shot lines of one label and its control code once more; no texts leave the code alone.

    The code ends without a blank: byte-level tokenizers put the blank into the text's first token.
    """
    code = task.code(label)
    return "".join(f"{code} {one_line(text)}\n" for text in texts) + code


def text_prompt(llm: TextModel, label: str, texts: Sequence[str], task: Task) -> str | Chat:
    """How an LLM is asked for one text of a label, after demonstrations or none."""
    if llm.chats:
        return Chat(task.question(label, [one_line(text) for text in texts]), task.system)
    return line_prompt(label, texts, task)


QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "`": "`"}


def parse_line(answer: str) -> str | None:
    """The answer's first line that is not blank, without quotes around the whole of it; None if there is none."""
    lines = answer.strip().splitlines()
    if not lines:
        return None
    line = lines[0].strip()
    if len(line) > 1 and QUOTES.get(line[0]) == line[-1] and line[0] not in line[1:-1]:
        line = line[1:-1].strip()
    return line or None


# --- One text of each label: an instruction and blocks of all labels (docs/methods/fdkt.md, step 7) -------------------

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
        examples: (label, text) pairs; without any, the prompt names the labels only.
        labels: All labels of the task.
        wanted: The labels to write for.
    """
    blocks = "".join(BLOCK.format(label=label, text=one_line(text)) for label, text in examples)
    template = ALL_LABELS if blocks else LABEL_ONLY
    return template.format(labels=", ".join(labels), blocks=blocks, wanted=", ".join(wanted), delimiter=DELIMITER)


FIELDS = re.compile(r"\s*Label:[ \t]*(?P<label>[^\n]+?)[ \t]*\n\s*Text:\s*(?P<text>\S.*)", re.DOTALL)

RAN_ON = re.compile(r"^[ \t]*Label:[^\n]*\n[ \t]*Text:", re.MULTILINE)  # the next block, without its line before it


def parse_blocks(answer: str, labels: Sequence[str]) -> tuple[list[tuple[str, str]], Counter[str]]:
    """The (label, text) blocks of an answer, and the reasons why others were dropped."""
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
    """The LLM's texts for one site.

    Attributes:
        corpus: The texts and their requested labels; the guarantee is that of the demonstrations.
        dropped: Reason -> answers or blocks that gave no text.
        prompts: Number of prompts to the LLM.
        bare: Label -> texts requested by the label's name alone, because no demonstration of it was left.
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
                # The rows in hand go to the bottom: no prompt repeats a text while there is another.
                self.left = sorted(self.rng.permutation(len(self.texts)).tolist(), key=lambda row: row not in hand)
            hand.append(self.left.pop())
        return [self.texts[row] for row in hand]


@dataclass(frozen=True)
class Demonstrating:
    """The form of a prompt for new texts, and the sampling of its answer.

    Attributes:
        mode: "per_label": one text per prompt, after `shots` demonstrations of its label (or all, if there are fewer).
            "all_labels" (the paper's): one text per label and prompt, after `shots` of each label.
            "none": one text per prompt, after its label's name alone (an ablation).
        shots: Demonstrations of a label in a prompt.
        sampling: Sampling of one answer; FDKT: temperature 0.8, top-p 0.9.
    """

    mode: Mode
    shots: int
    sampling: SamplingParams


@dataclass(frozen=True)
class _Asked:
    """The demonstrations of a prompt, its writer, and the reader of its answer."""

    site: int
    shown: Sequence[tuple[str, str]]
    render: Callable[[Sequence[tuple[str, str]]], str | Chat]
    read: Callable[[str], tuple[list[tuple[str, str]], Counter[str]]]


def augment(
    llm: TextModel,
    demonstrations: Mapping[int, Corpus],
    how: Demonstrating,
    *,
    labels: Sequence[str],
    wanted: Mapping[int, Sequence[str]],
    seed: int,
    task: Task = NO_CARD,
) -> dict[int, Augmented]:
    """More texts like each site's demonstrations, with all sites' prompts in one call.

    Args:
        llm: The server's.
        demonstrations: By site; released texts and their class names.
        how: The form of a prompt, and the sampling of its answer.
        labels: The public ones.
        wanted: By site; the labels of the texts that are asked for, as `turns` gives them: uniformly, because a site's
            label counts stay with the site. Fewer texts come back where an answer cannot be read.
        seed: Seed of the demonstrations' order and of the LLM's sampling.
        task: The card: how a label is put into words.

    Raises:
        ValueError: If demonstrations are private, or an argument is out of range.
    """
    for corpus in demonstrations.values():
        refuse_private(corpus)
    check_labels(labels)
    if how.shots < 1:
        raise ValueError(f"shots must be at least 1, got {how.shots}")
    asked: list[_Asked] = []
    bare: dict[int, Counter[str]] = {}
    for site, corpus in sorted(demonstrations.items()):
        # A site's prompts depend on its own demonstrations only, not on which other sites answered.
        rng = np.random.default_rng([seed, *([site] if site >= 0 else [])])  # below is the server, which writes for all
        decks = {label: _Deck(texts, rng) for label, texts in _by_label(corpus, labels).items() if texts}
        bare[site] = Counter()
        if how.mode != "none":
            bare[site].update(label for label in wanted[site] if label not in decks)
        match how.mode:
            case "all_labels":
                asked += [
                    _Asked(site, examples, _block_writer(llm, labels, names, task), _block_reader(names, task))
                    for examples, names in _blocks(wanted[site], decks, labels, how.shots)
                ]
            case "per_label" | "none":
                for label in wanted[site]:
                    deck = decks.get(label) if how.mode == "per_label" else None
                    texts = [] if deck is None else deck.draw(min(how.shots, len(deck.texts)))
                    writer = _line_writer(llm, label, task)
                    asked.append(_Asked(site, [(label, t) for t in texts], writer, _line_reader(label)))
            case never:
                assert_never(never)

    sampling = replace(how.sampling, one_line=how.mode != "all_labels")
    answers = llm.complete(_fitting(llm, asked, sampling.max_new_tokens), sampling, seed=seed)

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


def turns(labels: Sequence[T], count: int) -> list[T]:
    """So many labels, or what else takes turns, each in its turn.

    >>> turns(["a", "b"], 3)
    ['a', 'b', 'a']
    """
    return [labels[i % len(labels)] for i in range(count)]


def lacking(corpus: Corpus, labels: Sequence[str], count: int) -> list[str]:
    """The labels of the texts that a corpus lacks to hold `turns(labels, count)`, in the order of labels."""
    return list((Counter(turns(labels, count)) - corpus.counts()).elements())


def misfit(
    llm: TextModel, corpus: Corpus, *, labels: Sequence[str], mode: Mode, max_new_tokens: int, task: Task = NO_CARD
) -> list[str | None]:
    """The reason why each text cannot be a demonstration of `augment`, even alone in a prompt; None for one that can.

    Args:
        llm: The server's LLM.
        corpus: Released texts and their class names.
        labels: The public ones.
        mode: As for `augment`.
        max_new_tokens: As for `augment`.
        task: As for `augment`.
    """
    pairs = zip(corpus.answers, corpus.prompts, strict=True)
    if mode == "all_labels":
        render = _block_writer(llm, labels, labels, task)
        return misfits(llm, [render([pair]) for pair in pairs], max_new_tokens)
    return misfits(llm, [text_prompt(llm, label, [text], task) for label, text in pairs], max_new_tokens)


def bare_misfit(
    llm: TextModel, labels: Sequence[str], mode: Mode, max_new_tokens: int, task: Task = NO_CARD
) -> str | None:
    """Why not even prompts without demonstrations fit into the LLM; None where they do. Arguments as of `misfit`."""
    if mode == "all_labels":
        prompts = [_block_writer(llm, labels, labels, task)([])]
    else:
        prompts = [text_prompt(llm, label, [], task) for label in labels]
    return next(filter(None, misfits(llm, prompts, max_new_tokens)), None)


def _fitting(llm: TextModel, asked: Sequence[_Asked], max_new_tokens: int) -> list[str | Chat]:
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


def _line_writer(llm: TextModel, label: str, task: Task) -> Callable[[Sequence[tuple[str, str]]], str | Chat]:
    return lambda shown: text_prompt(llm, label, [text for _, text in shown], task)


def _block_writer(
    llm: TextModel, labels: Sequence[str], wanted: Sequence[str], task: Task
) -> Callable[[Sequence[tuple[str, str]]], str | Chat]:
    """Blocks name labels as the card does; without one, as they are."""
    name = _named(task)

    def render(shown: Sequence[tuple[str, str]]) -> str | Chat:
        examples = [(name(label), text) for label, text in shown]
        prompt = blocks_prompt(examples, labels=list(map(name, labels)), wanted=list(map(name, wanted)))
        return Chat(prompt, task.system) if llm.chats else prompt

    return render


def _named(task: Task) -> Callable[[str], str]:
    return lambda label: task.labels[label].wording if label in task.labels else label


def _blocks(
    asked: Sequence[str], decks: Mapping[str, _Deck], labels: Sequence[str], shots: int
) -> Iterable[tuple[list[tuple[str, str]], list[str]]]:
    """Demonstrations of a prompt, and the labels that it asks for."""
    for start in range(0, len(asked), len(labels)):
        wanted = asked[start : start + len(labels)]
        shown = [label for label in wanted if label in decks]
        if shown:
            examples = [(label, text) for label in labels if label in decks for text in decks[label].draw(shots)]
            yield examples, shown
        lost = [label for label in wanted if label not in decks]
        if lost:
            yield [], lost


def _block_reader(wanted: Sequence[str], task: Task) -> Callable[[str], tuple[list[tuple[str, str]], Counter[str]]]:
    """Reads the first block of each wanted label. More of them, and more reasons than texts that were asked for, would
    give a label more than its share, or a run a smaller yield than it has."""
    label_of = {_named(task)(label): label for label in wanted}

    def read(answer: str) -> tuple[list[tuple[str, str]], Counter[str]]:
        found, dropped = parse_blocks(answer, list(label_of))
        first = dict(reversed(found))
        texts = [(label_of[name], first[name]) for name in dict.fromkeys(name for name, _ in found)]
        dropped["beyond those asked for"] += len(found) - len(first)
        return texts, Counter(list(dropped.elements())[: len(label_of) - len(first)])

    return read


def _line_reader(label: str) -> Callable[[str], tuple[list[tuple[str, str]], Counter[str]]]:
    def read(answer: str) -> tuple[list[tuple[str, str]], Counter[str]]:
        text = parse_line(answer)
        return ([], Counter({"empty answer": 1})) if text is None else ([(label, text)], Counter())

    return read


def _written_after(demonstrations: Corpus | None, examples: Sequence[tuple[str, str]]) -> Corpus:
    """The LLM's texts under the guarantee of its input: nothing is better than the worst of its sources."""
    if demonstrations is None or demonstrations.provenance is Provenance.PUBLIC:
        provenance = Provenance.PUBLIC  # the LLM and the labels' names are public
    elif demonstrations.provenance in (Provenance.SELF_GENERATED, Provenance.DISCLOSED):
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
    """Checks labels, which prompts and control codes contain.

    Raises:
        ValueError: If there is none, one occurs twice, or one cannot be part of a line.
    """
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be distinct, and at least one, got {list(labels)}")
    for label in labels:
        if wrong := _in_no_line(label):
            raise ValueError(f"label {label!r} cannot stand in a prompt's line: it {wrong}")


def _in_no_line(label: str) -> str:
    """The reason why a label cannot be part of a prompt's line; "" for one that can."""
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
