"""Per-example clipping for DP-SGD at nearly the cost of plain training; imports neither flwr nor ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, get_args

from torch import Tensor, nn

from fedsynth.dpsgd import bookkeeping, opacus_modes
from fedsynth.dpsgd.bookkeeping import LARGEST_NORM, MARGIN
from fedsynth.dpsgd.recording import UnknownWeight
from fedsynth.scenario import Clipping

__all__ = ["CLIPPING", "LARGEST_NORM", "MARGIN", "Clipper", "Clipping", "UnknownWeight", "clipper"]

CLIPPING: tuple[Clipping, ...] = get_args(Clipping)


class Clipper(Protocol):
    """Adds up clipped gradients."""

    def add(self, losses: Callable[[], Tensor], units: Sequence[int]) -> None:
        """Adds the clipped gradients of the units of one micro-batch, whose examples' losses are computed so."""

    def take(self) -> list[Tensor]:
        """The sums so far, by trainable weight; the next ones start at zero."""


def clipper(model: nn.Module, clip_norm: float, clipping: Clipping = "bookkeeping") -> AbstractContextManager[Clipper]:
    """An engine for one model in training; the model is as before when it closes.

    Args:
        model: With at least one trainable weight.
        clip_norm: C, which no unit's clipped gradient exceeds in norm; infinite: no clipping.
        clipping: `bookkeeping` is the project's own; the others are Opacus', to compare with.

    Raises:
        UnknownWeight: If a trainable weight belongs to a layer of which no gradient per example is known.
    """
    if clipping == "bookkeeping":
        return bookkeeping.clipper(model, clip_norm)
    mode = opacus_modes.hooks if clipping == "hooks" else opacus_modes.ghost
    return mode(model, clip_norm)
