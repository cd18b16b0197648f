"""The grammar of notes: styles, sites with their own priors, public blocks and private notes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fedsynth.corpus import Corpus, Provenance
from fedsynth.world.lexicon import World

COMMON_RATE = 0.10  # share of facts replaced by one that is common to all labels
SLIP_RATE = 0.05  # share of facts drawn from any register instead of the style's
LABEL_NOISE = 0.03  # share of private notes filed under another label
REGISTER_PRIOR = (0.5, 0.3, 0.2)  # probabilities in public styles; sites write in the rarer ones
SITE_REGISTERS = (2, 2, 2, 1, 2, 2, 1, 2)
BLOCK_NOTES = (1, 2, 3, 5, 7)
BLOCK_PRIOR = (0.2, 0.15, 0.15, 0.25, 0.25)
SINGLE_LABEL_RATE = 0.6  # share of public blocks: from these a model learns to keep style and label
KNOWN_RATE, RARE_WEIGHT = 0.35, 0.15  # share of facts that are frequent in the weak corpus; weight of the others
HELD_OUT = 8  # one in eight marker pairs, and of (opener, closer) pairs, is kept for the private sites
_SEED = 1729  # seed of everything fixed once per world, such as a site's style


@dataclass(frozen=True)
class Style:
    """One author's way of writing.

    Attributes:
        main: Marker before the label's own facts.
        history: Marker before facts of another label.
        openers: The two words that begin a note.
        closers: The two words of the closing segment.
        separator: Word between segments.
        joiner: Word between facts.
        register: Column of the register in `World.registers`.
        order: Order of the segments 0 main, 1 history, 2 closing.
        traits: True if a note describes its person.
    """

    main: str
    history: str
    openers: tuple[str, str]
    closers: tuple[str, str]
    separator: str
    joiner: str
    register: int
    order: tuple[int, int, int]
    traits: bool


@dataclass(frozen=True)
class SiteStyle:
    """One client's own way of writing and mix of cases.

    Attributes:
        style: The style; its marker pair and its first (opener, closer) pair never occur in public text.
        label_prior: Probabilities of the labels, shape (labels,); they sum to 1.
        fact_prior: Probabilities of the facts, shape (labels, facts); each row sums to 1.
    """

    style: Style
    label_prior: NDArray[np.float64]
    fact_prior: NDArray[np.float64]


def held_out(first: int, second: int) -> bool:
    """True if the pair of positions (main marker, history marker) or (opener, closer) is reserved for the sites."""
    return (3 * first + second) % HELD_OUT == 0


def public_style(world: World, rng: Generator) -> Style:
    """A style whose marker pair and first (opener, closer) pair are not held out."""
    markers = _public_pair(len(world.main_markers), len(world.history_markers), rng)
    ends = _public_pair(len(world.openers), len(world.closers), rng)
    return _style(world, rng, markers, ends, _draw(np.cumsum(REGISTER_PRIOR), rng))


@lru_cache(maxsize=512)
def site(world: World, index: int) -> SiteStyle:
    """The private site `index` (0 and up), the same at every call.

    Raises:
        ValueError: If index is negative.
    """
    if index < 0:
        raise ValueError(f"site must be 0 or more, got {index}")
    rng = np.random.default_rng([_SEED, 1, index])
    # One shuffle for all sites, so the first 48 differ in their marker pair.
    markers = _held_out_pairs(len(world.main_markers), len(world.history_markers))
    ends = _held_out_pairs(len(world.openers), len(world.closers))
    register = SITE_REGISTERS[index % len(SITE_REGISTERS)]
    style = _style(world, rng, markers[index % len(markers)], ends[index % len(ends)], register)
    zipf = np.arange(1, len(world.facts[0]) + 1) ** -0.5
    facts = np.stack([rng.permutation(zipf) for _ in world.labels])
    return SiteStyle(style, rng.dirichlet(np.full(len(world.labels), 4.0)), facts / facts.sum(1, keepdims=True))


def private_notes(world: World, site_index: int, count: int, seed: int, *, split: Literal["train", "test"]) -> Corpus:
    """Notes of one site, with label noise; one unit per note.

    A text belongs to one split for good, by its checksum: no test text is in a training corpus of any seed or size.

    Args:
        world: The lexicon.
        site_index: Number of the site, from 0; 0..7 are the demo's.
        count: Number of notes.
        seed: Seed of the notes; the site's style and priors do not depend on it.
        split: The half of the texts to draw from.
    """
    place = site(world, site_index)
    half = ("train", "test").index(split)
    rng = np.random.default_rng([seed, site_index, half])
    label_prior, fact_prior = np.cumsum(place.label_prior), np.cumsum(place.fact_prior, axis=1)
    prompts: list[str] = []
    answers: list[str] = []
    while len(prompts) < count:
        label = _draw(label_prior, rng)
        text = write_note(world, place.style, label, fact_prior, rng)
        if zlib.crc32(text.encode()) % 2 != half:
            continue
        filed = _another(label, len(world.labels), rng) if rng.random() < LABEL_NOISE else label
        prompts.append(text)
        answers.append(world.labels[filed])
    return Corpus(tuple(prompts), tuple(answers), Provenance.PRIVATE, units=tuple(range(count)))


def public_blocks(world: World, count: int, seed: int, *, weak: bool) -> Iterator[str]:
    """Blocks of 1 to 7 notes in one style, each note a line `label: text`.

    Args:
        world: The lexicon.
        count: Number of blocks.
        seed: Seed of the blocks.
        weak: True to leave most facts rare, as in the text for clients' models; otherwise all are equally frequent.
    """
    rng = np.random.default_rng([seed, int(weak)])
    prior = fact_prior(world, rare=RARE_WEIGHT if weak else 1.0)
    sizes = np.cumsum(BLOCK_PRIOR)
    for _ in range(count):
        style = public_style(world, rng)
        same = rng.random() < SINGLE_LABEL_RATE
        label = int(rng.integers(len(world.labels)))
        lines = []
        for _ in range(BLOCK_NOTES[_draw(sizes, rng)]):
            label = label if same else int(rng.integers(len(world.labels)))
            lines.append(f"{world.labels[label]}: {write_note(world, style, label, prior, rng)}\n")
        yield "".join(lines)


def known_facts(world: World) -> NDArray[np.bool_]:
    """Mask of the facts that stay frequent in weak text, about a third; shape (labels, facts), always the same."""
    return np.random.default_rng([_SEED, 2]).random((len(world.labels), len(world.facts[0]))) < KNOWN_RATE


def fact_prior(world: World, *, rare: float) -> NDArray[np.float64]:
    """Prior, cumulative over the last axis, shape (labels, facts); facts outside `known_facts` weigh `rare`."""
    weights = np.where(known_facts(world), 1.0, rare)
    return np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)


def write_note(world: World, style: Style, label: int, fact_prior: NDArray[np.float64], rng: Generator) -> str:
    """One note: one or two facts of `label`, one or two of another label.

    Args:
        world: The lexicon.
        style: The style of the note.
        label: Row of the label in `World.labels`.
        fact_prior: Prior, cumulative over the last axis, shape (labels, facts).
        rng: Source of all draws.
    """
    other = _another(label, len(world.labels), rng)
    main = [_fact(world, style, label, fact_prior, rng) for _ in range(2 if rng.random() < 0.5 else 1)]
    past = [_fact(world, style, other, fact_prior, rng) for _ in range(2 if rng.random() < 0.3 else 1)]
    joiner = f" {style.joiner} "
    segments = (f"{style.main} {joiner.join(main)}", f"{style.history} {joiner.join(past)}", " ".join(style.closers))
    opening = " ".join(style.openers)
    if style.traits:
        opening = " ".join((opening, *(words[rng.integers(len(words))] for words in world.traits)))
    return f" {style.separator} ".join((opening, *(segments[k] for k in style.order)))


def _fact(world: World, style: Style, label: int, fact_prior: NDArray[np.float64], rng: Generator) -> str:
    register = int(rng.integers(len(world.registers))) if rng.random() < SLIP_RATE else style.register
    if rng.random() < COMMON_RATE:
        return world.common[rng.integers(len(world.common))][register]
    return world.facts[label][_draw(fact_prior[label], rng)][register]


def _style(world: World, rng: Generator, markers: tuple[int, int], ends: tuple[int, int], register: int) -> Style:
    opener, closer = ends
    first, second, third = (int(k) for k in rng.permutation(3))
    return Style(
        main=world.main_markers[markers[0]],
        history=world.history_markers[markers[1]],
        openers=(world.openers[opener], world.openers[_another(opener, len(world.openers), rng)]),
        closers=(world.closers[closer], world.closers[_another(closer, len(world.closers), rng)]),
        separator=world.separators[rng.integers(len(world.separators))],
        joiner=world.joiners[rng.integers(len(world.joiners))],
        register=register,
        order=(first, second, third),
        traits=bool(rng.random() < 0.6),
    )


def _public_pair(firsts: int, seconds: int, rng: Generator) -> tuple[int, int]:
    while True:
        pair = int(rng.integers(firsts)), int(rng.integers(seconds))
        if not held_out(*pair):
            return pair


@lru_cache
def _held_out_pairs(firsts: int, seconds: int) -> list[tuple[int, int]]:
    """All held-out pairs, shuffled once and for all."""
    pairs = [(i, j) for i in range(firsts) for j in range(seconds) if held_out(i, j)]
    return [pairs[k] for k in np.random.default_rng([_SEED, 3]).permutation(len(pairs))]


def _draw(cumulative: NDArray[np.float64], rng: Generator) -> int:
    # The last entry may round to just below 1.
    return min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(cumulative) - 1)


def _another(index: int, size: int, rng: Generator) -> int:
    return int((index + 1 + rng.integers(size - 1)) % size)
