"""LoRA adapters of several clients, trained in one pass over one frozen base: each example goes through the adapter of
its own client.

A client's sum holds its own examples, clipped by its own units. Stacked or alone, it is the same, except for the
rounding of another order of additions. Stacking saves the overhead per operation, most of the cost of small models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd import Function

from fedsynth.dpsgd.bookkeeping import clip_factors, numbered, square_norms, united
from fedsynth.dpsgd.precision import check_bounded, check_precision, full_precision
from fedsynth.dpsgd.recording import (
    Record,
    UnknownWeight,
    check_examples,
    check_unrouted,
    patched,
    plain_lora,
    positions,
)

Factors = Mapping[nn.Parameter, Tensor]
"""By LoRA weight of the model, the weights of all clients, (clients, *weight.shape), float32."""


@dataclass
class _Owned(Record):
    """A record with the client of each example of the batch, (examples,)."""

    owner: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


class Stacked:
    """Adds up clipped gradients of micro-batches, client by client.

    Attributes:
        weights: Trained weights, (clients, numbers), each client's in the order of the model's trainable weights.
            The caller changes them in place between passes.
    """

    def __init__(self, weights: Tensor, places: Mapping[nn.Parameter, slice], clip_norm: float, record: _Owned) -> None:
        self.weights = weights
        self._places, self._clip_norm, self._record = places, clip_norm, record
        self._sums = torch.zeros_like(weights)
        self._passes = 0

    def add(self, losses: Callable[[], Tensor], units: Sequence[int], clients: Sequence[int]) -> None:
        """Adds the clipped gradients of the units of one micro-batch; all examples of a unit must be in it.

        Args:
            losses: Computes each example's own loss by a pass of the model, (examples,).
            units: The unit of each example, numbered across clients; the examples of one unit are clipped together.
            clients: The client of each example: the example goes through its adapter and enters its sum.

        Raises:
            UnknownWeight: If a layer's input does not have the examples as its first dimension.
            ValueError: If there is not one loss per example.
        """
        where = self.weights.device
        check_precision(where)
        self._record.examples, self._record.owner = len(units), torch.tensor(clients, device=where)
        try:
            each = losses()
            if each.shape != (len(units),):
                raise ValueError(f"{len(units)} examples need a loss each, got losses of shape {tuple(each.shape)}")
            each.sum().backward()
            with torch.no_grad():
                self._finish(numbered(units, where))
        finally:
            self._record.clear()

    def take(self) -> Tensor:
        """The sums so far, in the shape of `weights`; the next ones start at zero."""
        sums, self._sums, self._passes = self._sums, torch.zeros_like(self.weights), 0
        return sums

    def _finish(self, unit: Tensor) -> None:
        whole, owner, count = self._record.whole, self._record.owner, int(unit.max()) + 1
        squares = torch.zeros(count, dtype=torch.float64, device=unit.device)
        for grads in whole.values():
            squares += square_norms(united(grads, unit, count))
        each = clip_factors(squares, self._clip_norm)[unit]
        bad = each == 0
        spoilt = bool(bad.any())
        share = self.weights.new_zeros(len(self._sums), len(unit))
        share[owner, torch.arange(len(unit), device=unit.device)] = each.to(share.dtype)
        if self._passes:  # as for one client, passes are added up in float64
            self._sums = self._sums.double()
        for weight, grads in whole.items():
            if spoilt:  # 0 * NaN is NaN
                grads = grads.masked_fill(bad.view(-1, 1, 1), 0.0)
            total = self._sums[:, self._places[weight]]
            if self._passes:
                total += share @ grads.flatten(1)
            else:
                total.addmm_(share, grads.flatten(1))
        self._passes += 1


@contextmanager
def stacked(model: nn.Module, factors: Factors, clip_norm: float) -> Iterator[Stacked]:
    """An engine for the adapters of several clients on one model in training.

    The model's own adapter plays no part while the engine is open. The model is as before when it closes.

    Args:
        model: A model with LoRA; nothing else in it is trainable.
        factors: The clients' factors of every LoRA weight, frozen ones too; trainable ones hold the result when the
            engine closes.
        clip_norm: C, the largest norm of a unit's clipped gradient; infinite clips nothing.

    Raises:
        UnknownWeight: If a trainable weight does not belong to a plain LoRA on a linear layer, or has no factors.
        HalfPrecision: If there is a clip norm, and any part of the model is less precise than float32.
    """
    if math.isfinite(clip_norm):
        check_bounded(model)
        check_unrouted(model)
    if any(torch.finfo(stack.dtype).bits < 32 for stack in factors.values()):
        raise UnknownWeight("the clients' factors must be float32: sums and noise would be rounded to less")
    weights, places = _side_by_side({w: factors[w] for w in model.parameters() if w.requires_grad and w in factors})
    # Autograd goes through a layer only if some part of it needs a gradient.
    read = {w: weights[:, places[w]].view_as(f).requires_grad_() if w in places else f for w, f in factors.items()}
    record = _Owned()
    forwards: dict[nn.Module, Callable[..., Tensor]] = {}
    known: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        parts = plain_lora(module) if isinstance(module, LoraLinear) else None
        if parts is not None:
            known |= set(_weights(parts))
            forwards[module] = partial(_forward, module, name, parts, read, record)
    for name, weight in model.named_parameters():
        if (weight.requires_grad or weight in known) and not (weight in known and weight in factors):
            raise UnknownWeight(
                f"{name!r} is no factor of a plain LoRA, or has no clients' own: freeze it, or "
                "train each client by itself"
            )
    with full_precision(), patched(forwards):
        yield Stacked(weights, places, clip_norm, record)
    for weight, place in places.items():
        factors[weight].copy_(weights[:, place].view_as(factors[weight]))


def _side_by_side(factors: Factors) -> tuple[Tensor, dict[nn.Parameter, slice]]:
    """All numbers of a client in one row, and the place of each weight in it.

    So noise and optimizer take one step for all of them.
    """
    places: dict[nn.Parameter, slice] = {}
    end = 0
    for weight in factors:
        places[weight] = slice(end, end + weight.numel())
        end += weight.numel()
    return torch.cat([stack.detach().flatten(1) for stack in factors.values()], dim=1), places


def _forward(
    layer: Any, name: str, parts: tuple[nn.Linear, nn.Linear, float], factors: Factors, record: _Owned, x: Tensor
) -> Tensor:
    check_examples(name, x, record)
    first, second = _weights(parts)
    out: Tensor = _Lora.apply(  # type: ignore[no-untyped-call]  # torch types no `apply`
        layer.base_layer(x), x, factors[first], factors[second], (first, second, parts[2]), record
    )
    return out


def _weights(parts: tuple[nn.Linear, nn.Linear, float]) -> tuple[nn.Parameter, nn.Parameter]:
    first, second, _ = parts
    return cast(nn.Parameter, first.weight), cast(nn.Parameter, second.weight)


class _Lora(Function):
    """base + scale B_k A_k x for each example's own client k; it notes the gradients of each example."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        first: Tensor,
        second: Tensor,
        own: tuple[nn.Parameter, nn.Parameter, float],
        record: _Owned,
    ) -> Tensor:
        a, b = (stack[record.owner].to(x.dtype) for stack in (first, second))
        inner = torch.bmm(positions(x), a.transpose(1, 2))
        ctx.save_for_backward(x, a, b, inner)
        ctx.own, ctx.record = own, record
        return torch.baddbmm(positions(base), inner, b.transpose(1, 2), alpha=own[2]).view_as(base)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, a, b, inner = ctx.saved_tensors
        first, second, scale = ctx.own
        out = positions(g)
        back = torch.bmm(out, b).mul_(scale)
        if first.requires_grad:
            ctx.record.add(first, torch.bmm(back.transpose(1, 2), positions(x)))
        if second.requires_grad:
            ctx.record.add(second, torch.bmm(out.transpose(1, 2), inner * scale))
        below = torch.bmm(back, a).view_as(x) if ctx.needs_input_grad[1] else None
        return g, below, None, None, None, None
