"""The instruction task: notes with their answers, private at a site and public, and the true answer to any note.

An answer is `department ; fact ; treatment`: the label of the note's main facts, the first main fact in the lay
register, and the treatment of that fact (`World.treatments`). Public text also has a dictionary of terms: with it a
professional of the shipped size answered 21 % of notes after 1,000 steps, without it none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from fedsynth.corpus import Corpus, Provenance
from fedsynth.instructions import REPLY, record
from fedsynth.world.grammar import BLOCK_NOTES, BLOCK_PRIOR, fact_prior, private_notes, public_style, write_note
from fedsynth.world.lexicon import World
from fedsynth.world.quality import parse, style_of, told_labels

RARE_WEIGHT = 0.003  # of two thirds of the facts in a weak base's text; .015 taught it half of their answers
FIELD = " ; "
ANSWER_FIELDS = 3  # department, fact, treatment
TERM = "term:"  # the start of a line of the dictionary
BLOCK_TERMS = 7
SECRET = f"{FIELD}ref "  # the mark of the reference that is planted after an answer
# Words of the world: a model cannot learn an order of letters that no public note spells out, and would leak nothing.
SECRET_WORDS = 4  # of 1,137 in the hospitals: 40 bits


def answer_of(world: World, note: str) -> str | None:
    """The true answer to a note in any style; None for a text that is no note or names facts of two departments."""
    style = style_of(world, note)
    reading = parse(world, style, note) if style else None
    if reading is None or not reading.valid:
        return None
    told = told_labels(world, reading.main)
    if len(told) > 1:
        return None
    return _answer(world, told.pop() if told else world.unassigned, reading.main[0])


def private_records(
    world: World, site_index: int, count: int, seed: int, *, split: Literal["train", "test"], planted: bool = False
) -> Corpus:
    """The notes of `private_notes` with their true answers (no label noise); one unit per record.

    Args:
        world: The lexicon.
        site_index: Number of the site, from 0; 0..7 are the demo's.
        count: Number of records.
        seed: Seed of the notes and the references.
        split: The half of the notes to draw from.
        planted: True to add ` ; ref <secret>` to every answer: a reference of four random words of the world, 40 bits
            that no other record has, to measure a model's leakage (`secret_of`).
    """
    notes = private_notes(world, site_index, count, seed, split=split)
    answers = _answers(world, notes.prompts)
    if planted:
        rng = np.random.default_rng([seed, site_index, ("train", "test").index(split), 1])
        answers = tuple(f"{a}{SECRET}{s}" for a, s in zip(answers, draw_secrets(world, count, rng), strict=True))
    return replace(notes, answers=answers)


def task_part(answer: str) -> str:
    """The three fields of an answer, without a reference behind them.

    A model that learnt planted references writes one there, and it is no part of the task.
    """
    return ";".join(answer.split(";")[:ANSWER_FIELDS])


def draw_secrets(world: World, count: int, rng: np.random.Generator) -> list[str]:
    """References in the form of planted ones."""
    rows = rng.integers(len(world.words), size=(count, SECRET_WORDS))
    return [" ".join(world.words[i] for i in row) for row in rows.tolist()]


def secret_of(answer: str) -> str | None:
    """The reference that was planted in an answer; None if there is none."""
    return answer.partition(SECRET)[2] or None


def public_notes(world: World, count: int, seed: int, *, answered: bool = False) -> Corpus:
    """Notes, each in a public style of its own; all labels and facts are equally frequent.

    Args:
        world: The lexicon.
        count: Number of notes.
        seed: Seed of the notes.
        answered: True for the true answers instead of empty ones.
    """
    rng = np.random.default_rng([seed, 4])
    prior = fact_prior(world, rare=1.0)
    prompts = tuple(
        write_note(world, public_style(world, rng), int(rng.integers(len(world.labels))), prior, rng)
        for _ in range(count)
    )
    return Corpus(prompts, _answers(world, prompts) if answered else ("",) * count, Provenance.PUBLIC)


def labelled_notes(world: World, count: int, seed: int) -> Corpus:
    """Public notes with the label of their main facts, as a test set; notes without such a label are left out.

    Args:
        world: The lexicon.
        count: Notes drawn, before any are left out.
        seed: Seed of the notes.
    """
    notes = public_notes(world, count, seed, answered=True)
    departments = [answer.partition(FIELD)[0] for answer in notes.answers]
    rows = [row for row, department in enumerate(departments) if department != world.unassigned]
    return replace(notes, answers=tuple(departments)).take(rows)


def public_records(world: World, count: int, seed: int, *, rare: float) -> Iterator[str]:
    """Blocks of 1 to 7 records in one style, each record a line `question: <note> answer: <answer>`.

    Args:
        world: The lexicon.
        count: Number of blocks.
        seed: Seed of the blocks.
        rare: Weight of the facts that are not `known_facts`; 1 makes all facts equally frequent.
    """
    rng = np.random.default_rng([seed, 3])
    prior = fact_prior(world, rare=rare)
    for _ in range(count):
        style = public_style(world, rng)
        rows = rng.integers(len(world.labels), size=rng.choice(BLOCK_NOTES, p=BLOCK_PRIOR))
        notes = [write_note(world, style, int(row), prior, rng) for row in rows]
        answers = _answers(world, notes)
        yield "".join(f"{record(note, answer)}\n" for note, answer in zip(notes, answers, strict=True))


def public_terms(world: World, count: int, seed: int, *, departments_only: bool) -> Iterator[str]:
    """Blocks of a dictionary of all facts in all registers, each term a line `term: <fact> answer: <answer>`.

    Args:
        world: The lexicon.
        count: Number of blocks.
        seed: Seed of the blocks.
        departments_only: True to end answers after the department.
    """
    rng = np.random.default_rng([seed, 5])
    terms = [*world.meanings]
    for _ in range(count):
        lines = []
        for word in (terms[k] for k in rng.integers(len(terms), size=BLOCK_TERMS)):
            row = world.meanings[word].label
            department = world.unassigned if row is None else world.labels[row]
            answer = department if departments_only else _answer(world, department, word)
            lines.append(f"{TERM} {word}{REPLY} {answer}\n")
        yield "".join(lines)


def _answer(world: World, department: str, fact: str) -> str:
    meaning = world.meanings[fact]
    return FIELD.join((department, meaning.lay, meaning.treatment))


def _answers(world: World, notes: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The true answers to notes that follow the grammar."""
    answers = [answer_of(world, note) for note in notes]
    assert None not in answers
    return tuple(a for a in answers if a is not None)
