"""The words of a small world and their meanings, read from a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

WORLDS = ("hospitals", "banks")


@dataclass(frozen=True)
class Meaning:
    """The meaning of one fact's word.

    Attributes:
        label: Row of the label in `World.labels`; None for the facts that are common to all labels.
        register: Column of the register in `World.registers`.
        lay: The fact's word in the first register.
        treatment: The treatment of the fact, one of `World.treatments`; the same at every site.
    """

    label: int | None
    register: int
    lay: str
    treatment: str


@dataclass(frozen=True)
class World:
    """A lexicon: labels, their facts in several registers with their treatments, and the words around them.

    Attributes:
        name: Name of the TOML file.
        labels: The classes, one lower-case word each.
        registers: Names of the registers; column r of every fact is written in register r.
        facts: Words by label, fact and register; every word occurs once in the world.
        common: Words by fact and register that say nothing about the label.
        unassigned: The department of a note whose main facts are all common ones; no label.
        treatments: Words for treatments; every fact has one.
        main_markers: Phrases that announce the label's own facts.
        history_markers: Phrases that announce facts of another label.
        openers: Words that a note begins with, two at a time.
        closers: Words of the closing segment, two at a time.
        separators: Words between segments.
        joiners: Words between facts.
        traits: Two lists of words about the person.
    """

    name: str
    labels: tuple[str, ...]
    registers: tuple[str, ...]
    facts: tuple[tuple[tuple[str, ...], ...], ...]
    common: tuple[tuple[str, ...], ...]
    unassigned: str
    treatments: tuple[str, ...]
    main_markers: tuple[str, ...]
    history_markers: tuple[str, ...]
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    separators: tuple[str, ...]
    joiners: tuple[str, ...]
    traits: tuple[tuple[str, ...], tuple[str, ...]]

    @cached_property
    def meanings(self) -> dict[str, Meaning]:
        """Every fact's word, the common ones included."""
        rows: list[tuple[int | None, tuple[str, ...]]]
        rows = [(label, fact) for label, facts in enumerate(self.facts) for fact in facts]
        rows += [(None, fact) for fact in self.common]
        # Treatments go round the facts, so the 40 facts of a label have 40 of them: the label does not reveal one.
        return {
            word: Meaning(label, register, fact[0], self.treatments[number % len(self.treatments)])
            for number, (label, fact) in enumerate(rows)
            for register, word in enumerate(fact)
        }

    @cached_property
    def words(self) -> tuple[str, ...]:
        """All words that follow a space in some note, each once."""
        phrases = (*self.main_markers, *self.history_markers)
        others = (*self.openers, *self.closers, *self.separators, *self.joiners, *self.traits[0], *self.traits[1])
        return tuple(dict.fromkeys((*self.meanings, *(word for p in phrases for word in p.split()), *others)))

    @cached_property
    def answer_words(self) -> tuple[str, ...]:
        """The words that occur in answers only."""
        return (*self.labels, self.unassigned, *self.treatments)


@lru_cache
def load_world(name: str) -> World:
    """The world of that name, one of `WORLDS`.

    Raises:
        ValueError: If there is no such world.
    """
    if name not in WORLDS:
        raise ValueError(f"world must be one of {', '.join(WORLDS)}, got {name!r}")
    table = tomllib.loads((files(__package__) / f"{name}.toml").read_text(encoding="utf-8"))
    registers = tuple(table["registers"])
    first, second = table["traits"]
    return World(
        name=name,
        labels=tuple(table["labels"]),
        registers=registers,
        facts=tuple(_facts(entry, table["findings"], registers) for entry in table["labels"].values()),
        common=tuple(zip(*(table["common"][r].split() for r in registers), strict=True)),
        unassigned=table["common"]["label"],
        treatments=tuple(table["treatments"].split()),
        main_markers=tuple(table["main_markers"]),
        history_markers=tuple(table["history_markers"]),
        openers=tuple(table["openers"].split()),
        closers=tuple(table["closers"].split()),
        separators=tuple(table["separators"].split()),
        joiners=tuple(table["joiners"].split()),
        traits=(tuple(first.split()), tuple(second.split())),
    )


def _facts(
    entry: Mapping[str, str], findings: Mapping[str, Any], registers: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    """Every stem with every finding, in all registers."""
    stems = zip(*(entry[r].split() for r in registers), strict=True)
    ends = [findings[name] for name in entry["findings"].split()]
    return tuple(tuple(stem + end for stem, end in zip(row, column, strict=True)) for row in stems for column in ends)
