"""Per-example clipping for DP-SGD at nearly the cost of plain training; imports neither flwr nor ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from fedsynth.dpsgd import bookkeeping, opacus_modes
from fedsynth.dpsgd.bookkeeping import LARGEST_NORM, MARGIN
from fedsynth.dpsgd.precision import HalfPrecision, check_bounded, full_precision
from fedsynth.dpsgd.recording import UnknownWeight, check_unrouted
from fedsynth.scenario.client import Clipping

__all__ = [
    "CLIPPING",
    "LARGEST_NORM",
    "MARGIN",
    "Clipper",
    "Clipping",
    "HalfPrecision",
    "UnknownWeight",
    "clipper",
]

CLIPPING: tuple[Clipping, ...] = get_args(Clipping)


class Clipper(Protocol):
    """Adds up clipped gradients."""

    def add(self, losses: Callable[[], Tensor], units: Sequence[int]) -> None:
        """Adds the clipped gradients of the units of one micro-batch; `losses` computes its examples' losses."""

    def take(self) -> list[Tensor]:
        """The sums so far by trainable weight, in float64 after several passes; the next sums start at zero."""


class Unclipped:
    """Adds up gradients as autograd does, for training without a guarantee; those that are not finite count as zero."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights = [w for w in model.parameters() if w.requires_grad]
        self._sums = [torch.zeros_like(w) for w in self._weights]

    def add(self, losses: Callable[[], Tensor], units: Sequence[int]) -> None:
        """See `Clipper`."""
        for weight in self._weights:
            weight.grad = None
        losses().sum().backward()
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        if not all(bool(norm.isfinite()) for norm in torch._foreach_norm(grads)):
            with bookkeeping.clipper(self._model, math.inf) as engine:  # separates the examples
                engine.add(losses, units)
                grads = engine.take()
        torch._foreach_add_(self._sums, grads)
        for weight in self._weights:
            weight.grad = None

    def take(self) -> list[Tensor]:
        """See `Clipper`."""
        sums, self._sums = self._sums, [torch.zeros_like(w) for w in self._weights]
        return sums


@contextmanager
def clipper(model: nn.Module, clip_norm: float, clipping: Clipping = "bookkeeping") -> Iterator[Clipper]:
    """An engine for one model in training; the model is as before when it closes.

    The engine finds the batch dimension of a layer's input by its size. In some models another dimension has that size
    by chance, or a layer mixes examples. `fedsynth.training.selfcheck.self_check` finds these models with batches of
    several sizes. Every guarantee needs that check.

    Args:
        model: A model with at least one trainable weight.
        clip_norm: C, the largest norm of a unit's clipped gradient; infinite clips nothing.
        clipping: `bookkeeping` is the project's own engine; the others are Opacus', for comparison.

    Raises:
        UnknownWeight: If a trainable weight belongs to a layer without a known gradient per example, or is less precise
            than float32; if there is a clip norm and a mixture of experts.
        HalfPrecision: If there is a clip norm, and any part of the model is less precise than float32.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and torch.finfo(weight.dtype).bits < 32:
            raise UnknownWeight(
                f"the weight {name!r} is {weight.dtype}: sums and noise would be rounded to that; train it in float32"
            )
    if math.isinf(clip_norm):
        yield Unclipped(model)
        return
    check_bounded(model)
    check_unrouted(model)
    modes = {"bookkeeping": bookkeeping.clipper, "hooks": opacus_modes.hooks, "ghost": opacus_modes.ghost}
    with full_precision():
        opened: Any = modes[clipping](model, clip_norm)
        with opened as engine:
            yield engine
