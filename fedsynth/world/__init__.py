"""A simulated world of short notes: lexicons, the grammar they are written by, and how to judge them."""

from fedsynth.world.grammar import Site, Style, held_out, private_notes, public_blocks, public_style, site, write_note
from fedsynth.world.lexicon import WORLDS, Meaning, World, load_world
from fedsynth.world.quality import Quality, Reading, main_facts, oracle_accuracy, parse, quality, told_labels

__all__ = [
    "WORLDS",
    "Meaning",
    "Quality",
    "Reading",
    "Site",
    "Style",
    "World",
    "held_out",
    "load_world",
    "main_facts",
    "oracle_accuracy",
    "parse",
    "private_notes",
    "public_blocks",
    "public_style",
    "quality",
    "site",
    "told_labels",
    "write_note",
]
