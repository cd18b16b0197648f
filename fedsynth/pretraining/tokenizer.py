"""A byte-level BPE tokenizer from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Words with the blank before them, numbers, punctuation, white space: tokens are merged within these pieces.
PIECES = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int, pieces: str = PIECES) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the newline is the end-of-sequence token; adds no special tokens by itself.

    Args:
        texts: The training texts.
        vocab_size: Most tokens; training stops when no pair is left to merge.
        pieces: Regular expression; tokens never cross the border of a match.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "\n"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    make: Any = PreTrainedTokenizerFast  # untyped in transformers
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="\n",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return fast
