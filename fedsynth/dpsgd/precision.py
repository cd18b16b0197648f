"""Refusal of computation in less than float32, for which no clip norm bounds one unit's influence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


class HalfPrecision(ValueError):
    """A model that computes in less than float32 was to be trained under a clip norm, which bounds no unit there."""


@contextmanager
def full_precision() -> Iterator[None]:
    """While open, products of float32 stay float32: TF32 would round norms by more than the margin."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def check_precision(device: torch.device) -> None:
    """Refuses mixed precision, which would round norms and sums.

    Raises:
        ValueError: If the caller computes in mixed precision.
    """
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "norms and sums need float32, and torch.autocast is on: leave it; `precision` makes a frozen base faster"
        )


def check_bounded(model: nn.Module) -> None:
    """Refuses a model for which C cannot bound one unit's influence: all that computes must be at least float32.

    Half-precision kernels round differently for another number of rows: 32 equal units instead of 31 moved a sum by
    1.034 C on one CPU, while on another no number of rows changed anything (docs/privacy.md).

    Raises:
        HalfPrecision: If any part is less precise.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        computes = tensor.is_floating_point() or isinstance(tensor, nn.Parameter)  # a buffer may hold positions
        if computes and tensor.dtype not in (torch.float32, torch.float64):
            raise HalfPrecision(
                f"{name!r} is {tensor.dtype}, and there a unit's gradient can depend on how many others"
                " are passed with it, so that no clip norm bounds its influence"
            )
