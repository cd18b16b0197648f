"""Opacus' own ways to clip, behind the same two calls, for comparisons and checks.

`hooks` instantiates every gradient per example. `ghost` takes norms from a first backward pass and the weighted sum
from a second one (Li et al. 2022). It clips examples, so each unit must have one, and it does not support tied weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from fedsynth.dpsgd.bookkeeping import clip_factors, numbered, square_norms, united
from fedsynth.dpsgd.recording import UnknownWeight

# Opacus hooks layers whose input needs no gradient (the first, of a frozen base); torch remarks on each of them.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


class Hooks:
    """Gradients per example, all of them, then norms and the sum."""

    def __init__(self, wrapped: Any, clip_norm: float) -> None:
        self._clip_norm = clip_norm
        self._weights = [w for w in wrapped.parameters() if w.requires_grad]
        self._sums: list[Tensor] = []

    def add(self, losses: Callable[[], Tensor], units: Sequence[int]) -> None:
        """See `BookKeeping.add`."""
        losses().sum().backward()
        unit = numbered(units, self._weights[0].device)
        count = int(unit.max()) + 1
        found: list[Any] = [getattr(w, "grad_sample", None) for w in self._weights]
        if any(not isinstance(g, Tensor) or len(g) != len(units) for g in found):
            raise UnknownWeight(
                "a layer gives no gradient per example through Opacus' hooks; clipping = 'bookkeeping' "
                "knows more layers, or freeze it (requires_grad_(False))"
            )
        grads = [united(g, unit, count) for g in found]
        squares = torch.stack([square_norms(g) for g in grads]).sum(0)
        factor = clip_factors(squares, self._clip_norm)
        parts = []
        for grad in grads:
            alive = grad.masked_fill((factor == 0).view(-1, *[1] * (grad.dim() - 1)), 0.0)
            parts.append(torch.einsum("n,n...->...", factor.to(grad.dtype), alive))
        self._count(parts)
        for w in self._weights:
            w.grad, w.grad_sample = None, None

    def _count(self, parts: list[Tensor]) -> None:
        """Adds the result of one pass; passes are added up in float64."""
        sums = zip(self._sums, parts, strict=True)
        self._sums = [total.double().add_(part) for total, part in sums] if self._sums else parts

    def take(self) -> list[Tensor]:
        """See `BookKeeping.take`."""
        sums, self._sums = self._sums, []
        return sums or [torch.zeros_like(w) for w in self._weights]


class Ghost(Hooks):
    """Norms without gradients, by one more backward pass."""

    def __init__(self, wrapped: Any, clip_norm: float) -> None:
        super().__init__(wrapped, clip_norm)
        self._wrapped = wrapped

    def add(self, losses: Callable[[], Tensor], units: Sequence[int]) -> None:
        """See `BookKeeping.add`; each unit has one example."""
        if len(set(units)) < len(units):
            raise ValueError("clipping = 'ghost' clips examples, and here a unit has several: use 'bookkeeping'")
        self._wrapped.enable_hooks()
        each = losses()
        each.sum().backward(retain_graph=True)
        squares = torch.stack([w._norm_sample.double() ** 2 for w in self._weights]).sum(0)
        factor = clip_factors(squares, self._clip_norm)
        for w in self._weights:
            w.grad = None
        self._wrapped.disable_hooks()
        (each[factor > 0] * factor[factor > 0].to(each.dtype)).sum().backward()
        self._count([torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights])
        for w in self._weights:
            w.grad = None


@contextmanager
def hooks(model: nn.Module, clip_norm: float) -> Iterator[Hooks]:
    """Opacus' default engine."""
    wrapped = GradSampleModule(model, loss_reduction="sum")
    try:
        yield Hooks(wrapped, clip_norm)
    finally:
        wrapped.to_standard_module()


@contextmanager
def ghost(model: nn.Module, clip_norm: float) -> Iterator[Ghost]:
    """Opacus' ghost clipping.

    Raises:
        NotImplementedError: If weights are tied; Opacus raises it.
    """
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=clip_norm)
    try:
        yield Ghost(wrapped, clip_norm)
    finally:
        wrapped.to_standard_module()
