"""Loading, asking and training of the language models that the server makes itself from an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fedsynth.corpus import Corpus
from fedsynth.lora import Adapter
from fedsynth.models.devices import gpus
from fedsynth.models.llm import LocalLLM, TextModel
from fedsynth.models.placing import ONE_DEVICE, server_dtype
from fedsynth.scenario.hardware import Hardware, Precision
from fedsynth.training.sft import Descent, descend

F = TypeVar("F")


@dataclass(frozen=True)
class Engine:
    """The engine in this process, on its GPU, or on all of its cores. A forecast passes one that does a sample.

    Attributes:
        hardware: Precision and devices of the models.
    """

    hardware: Hardware = ONE_DEVICE

    def load(self, name: str, adapter: Adapter | None = None) -> TextModel:
        """Loads a model by its name, with an adapter added to its weights.

        Raises:
            BadValue: If it cannot be loaded; the message names the way out.
            fedsynth.models.adapters.WrongAdapter: If the adapter is not of this model.
        """
        return self.asked(LocalLLM.for_server(name, adapter, self.hardware))

    def serve(self, model: Any, tokenizer: Any) -> TextModel:
        """Wraps a model that is already in memory."""
        cores = len(os.sched_getaffinity(0)) if torch.device(model.device).type == "cpu" else 1
        return self.asked(LocalLLM(model, tokenizer, batch_size=256, workers=cores))

    @property
    def precision(self) -> Precision:
        """Precision of the frozen base of an adapter in training: on a CPU float32, unless the scenario says else."""
        if self.hardware.precision == "auto":
            return "bfloat16" if gpus() and server_dtype("", self.hardware) is torch.bfloat16 else "float32"
        return self.hardware.precision

    def asked(self, llm: LocalLLM) -> TextModel:
        """The model that answers a strategy's prompts: here the given one itself."""
        return llm

    def descend(self, asked: Descent) -> float:
        """Takes the optimizer's steps of `sft` and `dpo`; see `fedsynth.training.sft.descend`."""
        return descend(asked)

    def checked(self, check: Callable[[Corpus], F], corpus: Corpus) -> F:
        """The result of a check of texts against their labels. A forecast's made-up texts fit none."""
        return check(corpus)
