"""Loading, asking and training of the language models that the server makes itself from an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fedsynth.corpus import Corpus
from fedsynth.lora import Adapter
from fedsynth.models.llm import LocalLLM, TextModel
from fedsynth.training.sft import Descent, descend

F = TypeVar("F")


class Engine:
    """The engine in this process, on all of its cores. A forecast passes one that does a sample of the work."""

    def load(self, name: str, adapter: Adapter | None = None) -> TextModel:
        """Loads a model by its name, with an adapter added to its weights.

        Raises:
            BadValue: If it cannot be loaded; the message names the way out.
            fedsynth.models.adapters.WrongAdapter: If the adapter is not of this model.
        """
        return self.asked(LocalLLM.for_server(name, adapter))

    def serve(self, model: Any, tokenizer: Any) -> TextModel:
        """Wraps a model that is already in memory."""
        cores = len(os.sched_getaffinity(0)) if torch.device(model.device).type == "cpu" else 1
        return self.asked(LocalLLM(model, tokenizer, batch_size=256, workers=cores))

    def asked(self, llm: LocalLLM) -> TextModel:
        """The model that answers a strategy's prompts: here the given one itself."""
        return llm

    def descend(self, asked: Descent) -> float:
        """Takes the optimizer's steps of `sft` and `dpo`; see `fedsynth.training.sft.descend`."""
        return descend(asked)

    def checked(self, check: Callable[[Corpus], F], corpus: Corpus) -> F:
        """The result of a check of texts against their labels. A forecast's made-up texts fit none."""
        return check(corpus)
