"""The tokenizers that the models of a world share: one for notes, one for records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from fedsynth.pretraining.tokenizer import train_tokenizer
from fedsynth.world.grammar import public_blocks
from fedsynth.world.lexicon import World
from fedsynth.world.records import public_records

Task = Literal["notes", "records"]
VOCABULARY_SIZES = (2048, 2560, 3072, 3584, 4096)  # upper limits: training stops when no pair is left to merge
# A hyphenated word such as " chest-pain" is one piece, so that a fact can be one token.
_PIECES = r" ?[A-Za-z0-9]+(?:[-/'][A-Za-z0-9]+)*| ?[^\sA-Za-z0-9]+|\s+"


def world_tokenizer(world: World, task: Task = "notes", seed: int = 0) -> PreTrainedTokenizerFast:
    """The smallest tokenizer of `VOCABULARY_SIZES` in which 95 % of a task's words are one token.

    Raises:
        RuntimeError: If none is large enough.
    """
    blocks = public_blocks(world, 20_000, seed, weak=False)
    texts = [*(blocks if task == "notes" else public_records(world, 20_000, seed, rare=1.0))]
    for size in VOCABULARY_SIZES:
        tokenizer = train_tokenizer(texts, size, _PIECES)
        if single_token_share(words_of(world, task), tokenizer) >= 0.95:
            return tokenizer
    raise RuntimeError(f"{world.name}: no vocabulary up to {VOCABULARY_SIZES[-1]} has 95 % of the words as one token")


def words_of(world: World, task: Task) -> tuple[str, ...]:
    """The words that follow a space in a task's texts, each once."""
    return world.words if task == "notes" else (*world.words, *world.answer_words)


def single_token_share(words: Sequence[str], tokenizer: Any) -> float:
    """Share of the words that are one token after a space."""
    lengths = [len(tokenizer.encode(f" {w}", add_special_tokens=False)) for w in words]
    return float(np.mean([n == 1 for n in lengths]))
