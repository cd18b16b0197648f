"""Analysis of notes: their facts, the quality of a set of notes, and the best accuracy that can be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedsynth.corpus import Corpus
from fedsynth.world.grammar import Style, site
from fedsynth.world.lexicon import World


class Reading(NamedTuple):
    """A note's content, read in a style.

    Attributes:
        valid: True if the whole note follows the style's template.
        main: Fact words after the main marker, as far as the note could be read.
        history: Fact words after the history marker, likewise.
    """

    valid: bool
    main: tuple[str, ...]
    history: tuple[str, ...]


@dataclass(frozen=True)
class Quality:
    """The agreement of notes with a style and a label; rates in [0, 1], 0 if there is nothing to count.

    Attributes:
        count: Notes judged, the unfinished ones included.
        valid: Share of the notes that follow the template.
        label_correct: Share of the valid notes with label-specific main facts, in which these all have the label.
        register_match: Share of fact words in the style's register (public text itself reaches about .97).
        distinct: Number of different main facts.
    """

    count: int
    valid: float
    label_correct: float
    register_match: float
    distinct: int


def parse(world: World, style: Style, text: str) -> Reading:
    """Reads a note written in `style` up to the first word that does not fit."""
    words = text.split()
    at = 0
    main: list[str] = []
    history: list[str] = []

    def expect(*expected: str) -> bool:
        nonlocal at
        found = tuple(words[at : at + len(expected)]) == expected
        at += len(expected) if found else 0
        return found

    def follow() -> bool:
        nonlocal at
        if not expect(*style.openers):
            return False
        for options in world.traits if style.traits else ():
            if at >= len(words) or words[at] not in options:
                return False
            at += 1
        for segment in style.order:
            if not expect(style.separator):
                return False
            if segment == 2:
                if not expect(*style.closers):
                    return False
                continue
            if not expect(*(style.main, style.history)[segment].split()):
                return False
            found = _listed(world, words[at:], style.joiner)
            (main, history)[segment].extend(found)
            at += max(0, 2 * len(found) - 1)
            if not found:
                return False
        return at == len(words)

    return Reading(follow(), tuple(main), tuple(history))


def style_of(world: World, text: str) -> Style | None:
    """The style of a text, with which `parse` can read it; None if its segments are not those of a note.

    Its register is that of the first main fact. Its joiner is arbitrary if the note has none.
    """
    words = text.split()
    separator = next((w for w in words if w in world.separators), "")
    opening, *segments = _split(words, separator)
    order: list[int] = []
    spoken = {0: "", 1: "", 2: ""}
    joiner, register = world.joiners[0], 0
    for segment in segments:
        at = next((k for k, word in enumerate(segment) if word in world.meanings), len(segment))
        head = " ".join(segment[:at])
        if at == len(segment):
            order.append(2)
        elif head in world.main_markers:
            order.append(0)
            register = world.meanings[segment[at]].register
        elif head in world.history_markers:
            order.append(1)
        else:
            return None
        spoken[order[-1]] = head
        joiner = next((w for w in segment[at + 1 :] if w in world.joiners), joiner)
    closers = spoken[2].split()
    if sorted(order) != [0, 1, 2] or len(opening) not in (2, 4) or len(closers) != 2:
        return None
    if not set(opening[:2]) <= set(world.openers) or not set(closers) <= set(world.closers):
        return None
    return Style(
        main=spoken[0],
        history=spoken[1],
        openers=(opening[0], opening[1]),
        closers=(closers[0], closers[1]),
        separator=separator,
        joiner=joiner,
        register=register,
        order=(order[0], order[1], order[2]),
        traits=len(opening) == 4,
    )


def main_facts(world: World, text: str) -> tuple[str, ...]:
    """Fact words after the first main marker, for any style; empty if there is none."""
    words = text.split()
    markers = {tuple(m.split()) for m in world.main_markers}
    for at, word in enumerate(words):
        if word in world.meanings and any(tuple(words[max(0, at - n) : at]) in markers for n in (1, 2, 3)):
            joiner = words[at + 1] if at + 1 < len(words) and words[at + 1] in world.joiners else ""
            return _listed(world, words[at:], joiner)
    return ()


def quality(world: World, style: Style, labels: Sequence[str], texts: Sequence[str | None]) -> Quality:
    """The quality of notes that were requested in `style`; an unfinished note is None."""
    valid = telling = correct = matches = seen = 0
    distinct: set[str] = set()
    for label, text in zip(labels, texts, strict=True):
        words = (text or "").split()
        registers = [world.meanings[w].register for w in words if w in world.meanings]
        matches, seen = matches + registers.count(style.register), seen + len(registers)
        reading = parse(world, style, text or "")
        distinct.update(reading.main)
        if reading.valid:
            valid += 1
            named = told_labels(world, reading.main)
            telling += bool(named)
            correct += named == {label}
    return Quality(
        len(labels), valid / max(1, len(labels)), correct / max(1, telling), matches / max(1, seen), len(distinct)
    )


def told_labels(world: World, facts: Sequence[str]) -> set[str]:
    """Labels that the facts belong to; common facts belong to none."""
    rows = [world.meanings[f].label for f in facts]
    return {world.labels[row] for row in rows if row is not None}


def oracle_accuracy(world: World, site_index: int, notes: Corpus) -> float:
    """Accuracy of the site's own grammar on its notes: the best that a classifier can be expected to reach.

    If all main facts are common ones, it guesses the site's most frequent label.
    """
    place = site(world, site_index)
    guess = world.labels[int(place.label_prior.argmax())]
    right = 0
    for text, answer in zip(notes.prompts, notes.answers, strict=True):
        told = told_labels(world, parse(world, place.style, text).main)
        right += answer == (next(iter(told)) if len(told) == 1 else guess)
    return right / max(1, len(notes))


def _split(words: Sequence[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _listed(world: World, words: Sequence[str], joiner: str) -> tuple[str, ...]:
    """The fact words at the beginning of `words`, with one joiner between two."""
    if not words or words[0] not in world.meanings:
        return ()
    end = 1
    while end + 1 < len(words) and words[end] == joiner and words[end + 1] in world.meanings:
        end += 2
    return tuple(words[0:end:2])
