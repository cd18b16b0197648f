"""Gradient checkpointing: the backward pass computes a layer's activations again, which are not kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedsynth.typed import BadValue


@contextmanager
def checkpointed(model: nn.Module, on: bool | None) -> Iterator[None]:
    """While open, training keeps the input of each layer of a transformers model alone, if `on`.

    Values and gradients are the same. transformers' own switch would also let gradients flow below the lowest adapter,
    where a frozen base needs none.

    Raises:
        BadValue: If the model has no layers that are made for it.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if on else []
    if on and not layers:
        within: Any = model
        raise BadValue(
            f"a model of type {within.config.model_type!r} has no gradient checkpointing in transformers: leave out "
            "generator_training.gradient_checkpointing, and lower max_physical_batch_size"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        # Reentrant, it would lose the gradients of a layer whose input needs none. No layer draws random numbers.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func
