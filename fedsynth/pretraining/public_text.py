"""A public corpus file as text to pretrain on: few-shot blocks and held-out lines."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from transformers import PreTrainedTokenizerFast

from fedsynth.corpus import Corpus, Provenance, same
from fedsynth.data.loaders import decoded, load_columns
from fedsynth.data.places import find
from fedsynth.models.encoding import prompt_rows
from fedsynth.scenario.server import PublicTest
from fedsynth.typed import BadValue
from fedsynth.world import labelled_notes, load_world, public_notes

# Numbers of lines of one topic in a block, and their frequencies. They are those of the simulated worlds, so that a
# model learns to continue after any number of demonstrations, none included.
BLOCK_LINES, BLOCK_SHARES = (1, 2, 3, 5, 7), (0.2, 0.15, 0.15, 0.25, 0.25)
BARE_SHARE = 0.15  # share of blocks without their topic: the model must also know text by itself
HELD_OUT_SHARE = 0.02  # share of the rows, if the file names none


@dataclass(frozen=True)
class PublicText:
    """The parts of a corpus file to read.

    Attributes:
        source: CSV, JSONL, Parquet, or plain text with one text per line; looked up in FEDSYNTH_DATA, too.
        text: Column of the text.
        topic: Column of the intent or topic; lines of one topic form few-shot blocks. None: no blocks.
        held_out: (column, value) of the held-out rows, which are only measured on; None: a seeded fiftieth.
    """

    source: str
    text: str = "text"
    topic: str | None = None
    held_out: tuple[str, str] | None = None


@dataclass(frozen=True)
class Lines:
    """Texts of one line each, and their topics ("" for none)."""

    texts: tuple[str, ...]
    topics: tuple[str, ...]

    def digest(self) -> str:
        """SHA-256 of all lines in order."""
        found = hashlib.sha256()
        for text, topic in zip(self.texts, self.topics, strict=True):
            found.update(f"{topic}\n{text}\n".encode())
        return found.hexdigest()


def read(public: PublicText, seed: int) -> tuple[Lines, Lines]:
    """The lines to learn and the held-out ones; no line is in both.

    Raises:
        BadValue: If the file or a column is missing, or one of the two parts would be empty.
    """
    path = find(public.source)
    if path.suffix == ".txt":
        try:
            rows = decoded(path).splitlines()
        except ValueError as problem:
            raise BadValue(f"{public.source}: cannot be read: {problem}") from problem
        columns: dict[str, list[str]] = {public.text: rows}
    else:
        asked = [public.text, public.topic or None, public.held_out[0] if public.held_out else None]
        names = list(dict.fromkeys(c for c in asked if c is not None))
        try:
            table = load_columns(path, names)
        except BadValue as problem:
            raise BadValue(f"{public.source}: {problem}") from problem
        columns = {c: table[c].fillna("").astype(str).tolist() for c in names}
    texts = [" ".join(t.split()) for t in columns[public.text]]
    topics = [topic_name(t) for t in columns[public.topic]] if public.topic else [""] * len(texts)
    if public.held_out:
        column, value = public.held_out
        held = np.array([cell == value for cell in columns[column]])
    else:
        held = np.random.default_rng([seed, 0x4E1D]).random(len(texts)) < HELD_OUT_SHARE
    measured = {same(t) for t, h in zip(texts, held.tolist(), strict=True) if h}
    learn = [i for i, t in enumerate(texts) if t and not held[i] and same(t) not in measured]
    hold = [i for i, t in enumerate(texts) if t and held[i]]
    for name, part in (("to learn from", learn), ("held out", hold)):
        if not part:
            raise BadValue(f"{public.source}: no text {name} in column {public.text!r}: check the held-out rows")
    parts = [Lines(tuple(texts[i] for i in p), tuple(topics[i] for i in p)) for p in (learn, hold)]
    return parts[0], parts[1]


def topic_name(topic: str) -> str:
    """A topic in the form of label lists: "ReserveRestaurant" and "Reserve restaurant" are `reserve_restaurant`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", topic)
    return "_".join(re.findall(r"[^\W_]+", spaced)).lower()


def blocks(lines: Lines, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Token ids of few-shot blocks without end; each pass has every line in one block.

    A block holds lines `topic: text` of one topic. A share of the blocks, and all lines without a topic, hold the text
    alone.
    """
    bare = prompt_rows(tokenizer, [f" {t}\n" for t in lines.texts])
    named = prompt_rows(
        tokenizer, [f"{y}: {t}\n" if y else f" {t}\n" for t, y in zip(lines.texts, lines.topics, strict=True)]
    )
    by_topic: dict[str, list[int]] = {}
    for row, topic in enumerate(lines.topics):
        by_topic.setdefault(topic, []).append(row)
    rng = np.random.default_rng([seed, 0xB10C])
    while True:
        shown: list[tuple[bool, list[int]]] = []
        for topic, rows in by_topic.items():
            shown += [(bool(topic) and rng.random() >= BARE_SHARE, block) for block in _dealt(rows, bool(topic), rng)]
        for place in rng.permutation(len(shown)).tolist():
            with_topic, block = shown[place]
            yield [i for row in block for i in (named if with_topic else bare)[row]]


def _dealt(rows: Sequence[int], together: bool, rng: Generator) -> Iterator[list[int]]:
    order = rng.permutation(np.asarray(rows)).tolist()
    at = 0
    while at < len(order):
        size = int(rng.choice(BLOCK_LINES, p=BLOCK_SHARES)) if together else 1
        yield order[at : at + size]
        at += size


def sample(source: str, count: int, seed: int) -> Corpus:
    """Random public texts, without answers, for a method or control that reads some.

    Args:
        source: `world:NAME` for notes in public styles; else a file as `PublicText.source`, column `text`.
        count: Most texts; a file may hold fewer.
        seed: Seed of the draw.

    Raises:
        BadValue: If there is no such world, file or column.
    """
    if source.startswith("world:"):
        return public_notes(load_world(source.removeprefix("world:")), count, seed)
    lines, _ = read(PublicText(source), seed)
    rows = np.random.default_rng(seed).permutation(len(lines.texts))[:count]
    texts = tuple(lines.texts[row] for row in rows.tolist())
    return Corpus(texts, ("",) * len(texts), Provenance.PUBLIC)


def labelled(test: PublicTest, labels: Sequence[str], count: int, seed: int, *, others: int = 0) -> Corpus:
    """Random public texts with their labels, to measure on; none if the source has none of these labels.

    Args:
        test: The texts.
        labels: The public list; rows of other labels are left out.
        count: Most texts.
        seed: Seed of the draw.
        others: Draw texts of this many labels outside the list instead; none if there are fewer than two.

    Raises:
        BadValue: If there is no such world, file or column.
    """
    if test.source.startswith("world:"):
        found = labelled_notes(load_world(test.source.removeprefix("world:")), 0 if others else count, seed)
        return found.take(row for row, label in enumerate(found.answers) if label in labels)
    path = find(test.source)
    table = None if path.suffix == ".txt" else load_columns(path)
    if table is None or "label" not in table.columns:
        return Corpus((), (), Provenance.PUBLIC)
    if test.column:
        if test.column not in table.columns:
            raise BadValue(f"{test.source}: no column {test.column!r}; columns: {sorted(table.columns)}")
        table = table[table[test.column].astype(str) == test.equals]
    pairs = zip(table["text"].fillna("").astype(str), table["label"].fillna("").astype(str), strict=True)
    rows = [(" ".join(text.split()), label) for text, label in pairs if text.strip() and label.strip()]
    if others:
        strange = sorted({label for _, label in rows} - set(labels))
        drawn = np.random.default_rng([seed, 0x07E5]).permutation(len(strange))[:others].tolist()
        labels = [strange[i] for i in drawn] if len(strange) > 1 else []
    known = [(text, label) for text, label in rows if label in labels]
    order = np.random.default_rng([seed, 0x1ABE1]).permutation(len(known))[:count].tolist()
    return Corpus(tuple(known[i][0] for i in order), tuple(known[i][1] for i in order), Provenance.PUBLIC)
