"""A simulated world of short notes: lexicons, the grammar they are written by, and how to judge them."""

from fedsynth.world.grammar import (
    Site,
    Style,
    held_out,
    known_facts,
    private_notes,
    public_blocks,
    public_style,
    site,
    write_note,
)
from fedsynth.world.lexicon import WORLDS, Meaning, World, load_world
from fedsynth.world.quality import (
    Quality,
    Reading,
    main_facts,
    oracle_accuracy,
    parse,
    quality,
    style_of,
    told_labels,
)
from fedsynth.world.records import answer_of, private_records, public_notes, public_records, public_terms, secret_of

__all__ = [
    "WORLDS",
    "Meaning",
    "Quality",
    "Reading",
    "Site",
    "Style",
    "World",
    "answer_of",
    "held_out",
    "known_facts",
    "load_world",
    "main_facts",
    "oracle_accuracy",
    "parse",
    "private_notes",
    "private_records",
    "public_blocks",
    "public_notes",
    "public_records",
    "public_style",
    "public_terms",
    "quality",
    "secret_of",
    "site",
    "style_of",
    "told_labels",
    "write_note",
]
