"""A random Llama and a byte-level tokenizer, made once per test run: no test depends on a shipped model."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsynth.training.dp_training import next_token_losses

PAD, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3  # ids of single characters follow in the order of the byte-level alphabet


def tokenizer() -> Any:
    """One token per byte; adds no special token by itself."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", *letters])}
    inner = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left")


def model(seed: int = 0, **more: Any) -> LlamaForCausalLM:
    """Two layers of width 32; the global random state is left as it was."""
    settings: dict[str, Any] = {
        "vocab_size": FIRST_BYTE + 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # large: gradients of a random model that are worth clipping
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **more})).float().eval()


@cache
def folder() -> str:
    """A saved model with its tokenizer; removed at the end of the run."""
    where = Path(tempfile.mkdtemp(prefix="fedsynth-tiny-"))
    atexit.register(shutil.rmtree, where, ignore_errors=True)
    model().save_pretrained(where)
    tokenizer().save_pretrained(where)
    return str(where)


def taught(
    where: Path, examples: Callable[[Any, np.random.Generator], list[Any]], *, steps: int, rate: float, seed: int = 0
) -> str:
    """A saved model that has learnt what `examples(tokenizer, rng)` draws, a batch in each step, and its tokenizer."""
    made, reader, rng = model(seed), tokenizer(), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(made.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        next_token_losses(made, examples(reader, rng), PAD).mean().backward()
        optimizer.step()
    made.save_pretrained(where)
    reader.save_pretrained(where)
    return str(where)
