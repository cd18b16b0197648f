"""Sentence embeddings: the mean of a model's last hidden states over each text's own tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedsynth.models.batches import by_length, longest_of, padded, token_rows
from fedsynth.models.devices import device, gpus
from fedsynth.models.loading import kind_of, load_model, load_tokenizer
from fedsynth.models.placing import ONE_DEVICE, embedder_dtype
from fedsynth.scenario.hardware import Hardware


class Embedder:
    """A model that places similar texts close together.

    In an encoder, and in the encoder of a seq2seq model, every token of its tokenizer counts, [CLS] and [SEP] included:
    the mean pooling of sentence-transformers (all-MiniLM-L6-v2). A causal model reads BOS, but the mean leaves it out:
    its state is the same for all texts and much larger than the others.

    Args:
        model: A model in evaluation mode, with or without a head.
        tokenizer: Its tokenizer.
        batch_size: Texts at once.
        workers: Threads; by default as many as torch may use (`torch.get_num_threads`) on the CPU, 1 on a GPU.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 64, workers: int | None = None):
        self.kind = kind_of(model.config)
        self.body = model.get_encoder() if self.kind == "seq2seq" else model.base_model
        self.tokenizer, self.batch_size = tokenizer, batch_size
        if workers is None:
            workers = torch.get_num_threads() if torch.device(model.device).type == "cpu" else 1
        self.workers = workers
        self.width: int = model.config.hidden_size
        self.config = model.config
        self.pad = next((p for p in (tokenizer.pad_token_id, tokenizer.eos_token_id) if p is not None), 0)

    @classmethod
    def load(
        cls, name: str, *, batch_size: int = 64, workers: int | None = None, dtype: Any = torch.float32
    ) -> Embedder:
        """Loads any model by name, onto a GPU if there is one.

        Raises:
            BadValue: If it cannot be loaded; the message names the way out.
        """
        model = load_model(name, "embedder", dtype=dtype).to(device())
        return cls(model, load_tokenizer(name), batch_size=batch_size, workers=workers)

    @classmethod
    def for_server(cls, name: str, hardware: Hardware = ONE_DEVICE) -> Embedder:
        """See `load`. Clients wait while the server works, so it uses every core."""
        workers = 1 if gpus() else len(os.sched_getaffinity(0))
        return cls.load(name, workers=workers, dtype=embedder_dtype(hardware))

    def embed(self, texts: Sequence[str], *, longest: int | None = None) -> NDArray[np.float32]:
        """Embeddings of texts, shape (texts, width).

        Args:
            texts: Plain text.
            longest: Most tokens of a text; longer texts are cut, and at the model's context in any case.

        Raises:
            ValueError: If a text holds no token.
        """
        tokens = token_rows(self.tokenizer, texts, self.kind, longest_of(self.config, self.tokenizer, longest))
        lead = 1 if self.kind == "causal" and self.tokenizer.bos_token_id is not None else 0
        for i, row in enumerate(tokens):
            if len(row) <= lead:
                raise ValueError(f"text {i} holds no token: {texts[i]!r}; leave empty texts out")

        def means(rows: Sequence[int]) -> list[NDArray[np.float32]]:
            ids, mask = (t.to(self.body.device) for t in padded([tokens[i] for i in rows], self.pad))
            cache = {"use_cache": False} if self.kind == "causal" else {}
            hidden = self.body(input_ids=ids, attention_mask=mask, **cache).last_hidden_state
            own = mask[:, lead:, None].to(torch.float32)
            mean = (hidden[:, lead:].float() * own).sum(dim=1) / own.sum(dim=1)
            return list(mean.cpu().numpy())

        found = by_length(means, [len(t) for t in tokens], batch_size=self.batch_size, workers=self.workers)
        return np.stack(found) if found else np.zeros((0, self.width), dtype=np.float32)


@lru_cache(maxsize=32)
def directions(embedder: Embedder, texts: tuple[str, ...], longest: int) -> Tensor:
    """Embeddings scaled to the length 1, float32 on the CPU, shape (texts, width).

    Remembered while the process lives: every arm of a seed reads the same private and test texts. Whole lists, so that
    a text always has the same neighbours in its batch, and the same result to the last bit.

    Args:
        embedder: Any.
        texts: Read after a space, as a classifier reads a text: so that an empty one holds a token, too.
        longest: Longer texts are cut after so many tokens.
    """
    return F.normalize(torch.from_numpy(embedder.embed([f" {text.strip()}" for text in texts], longest=longest)), dim=1)


@lru_cache(maxsize=2)
def shared_embedder(name: str) -> Embedder:
    """A model by name, one for all clients of this process."""
    return Embedder.load(name)
