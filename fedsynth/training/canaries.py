"""Canaries with orthogonal gradients, trained by the trainer's own loop: what an audit sees of each step.

`fedsynth.training.dp_training` itself draws, clips, adds noise and divides. The model is one linear layer. A canary's
gradient is one number of its weight, and longer than C, so that each number of a step's sum is C times "was the canary
drawn?", plus noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.training import dp_training as training
from fedsynth.training.loopcheck import before_steps

ROWS = 2  # of a canary: an engine that clips rows, not units, moves the sum by so many C
# Gradients of canaries' rows, in C, by turns: units are cut by little and by much.
_LENGTHS = (0.9, 1.4, 4.0, 1e4)
_PHYSICAL = 512  # rows of a pass; it changes no result


@dataclass(frozen=True)
class Row:
    """A row of a canary.

    Attributes:
        canary: Its number.
        tokens: One, as lengths sort the rows of a pass.
    """

    canary: int
    tokens: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Steps:
    """The steps of one training as the optimizer saw them, in units of C.

    Attributes:
        values: The number of each canary, (steps, canaries), float32.
        hit: True where the canary is in the training and was drawn, (steps, canaries).
        rest: Numbers that no canary moves, (steps, more), float32.
        sizes: Units drawn, empty ones included, (steps,).
        ran: Number of steps that the training reports.
    """

    values: NDArray[np.float32]
    hit: NDArray[np.bool_]
    rest: NDArray[np.float32]
    sizes: NDArray[np.int64]
    ran: int


class _Slots(Sequence[Any]):
    """The declared number of slots; those of canaries outside the training are empty. It notes what is drawn."""

    def __init__(self, present: NDArray[np.bool_], count: int) -> None:
        self._rows = [(Row(k),) * ROWS if there else () for k, there in enumerate(present.tolist())]
        self._count = count
        self._drawn: list[int] = []

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: Any) -> Any:
        if not -self._count <= at < self._count:
            raise IndexError(at)
        number = int(at) % self._count
        self._drawn.append(number)
        return self._rows[number] if number < len(self._rows) else ()

    def drawn(self) -> NDArray[np.int64]:
        """The slots drawn since the last call."""
        found, self._drawn = self._drawn, []
        return np.asarray(found, np.int64)


class _Square(nn.Module):
    """One linear layer; canary k is the number (k // side, k % side) of its weight."""

    def __init__(self, canaries: int) -> None:
        super().__init__()
        self.side = math.isqrt(canaries - 1) + 1
        self.layer = nn.utils.skip_init(nn.Linear, self.side, self.side, bias=False)
        nn.init.zeros_(self.layer.weight)


def trained(
    present: NDArray[np.bool_], plan: DPPlan, settings: GeneratorTraining, randomness: GrantRandomness
) -> Steps:
    """One round of a plan on canaries.

    Args:
        present: True for each canary that is in the training, (canaries,).
        plan: At least one record for each canary; further ones are empty.
        settings: Its engine is used.
        randomness: The grant's randomness.
    """
    canaries, lengths = len(present), torch.tensor(_LENGTHS) * plan.clip_norm
    model, slots = _Square(canaries), _Slots(present, plan.records)
    given: list[NDArray[np.float32]] = []
    sizes: list[int] = []
    hit = np.zeros((plan.steps, canaries), np.bool_)

    def losses(model: nn.Module, rows: Sequence[Row], pad: int) -> Tensor:  # noqa: ARG001 - the signature of Losses
        number = torch.tensor([row.canary for row in rows])
        down, across = number // model.side, number % model.side  # type: ignore[operator]  # of _Square
        inputs = torch.nn.functional.one_hot(across, model.side).float()  # type: ignore[arg-type]  # likewise
        inputs = inputs * lengths[number % len(lengths)].unsqueeze(1)
        outputs: Tensor = model.layer(inputs.unsqueeze(1))[:, 0]  # type: ignore[operator]  # likewise
        return outputs.gather(1, down.unsqueeze(1))[:, 0]

    def look(weights: Sequence[Tensor]) -> None:
        drawn = slots.drawn()
        own = drawn[drawn < canaries]
        if len(sizes) < len(hit):  # a loop with too many steps is found by their number
            hit[len(sizes), own] = present[own]
        sizes.append(len(drawn))
        grad = weights[0].grad
        given.append(np.zeros(model.side**2, np.float32) if grad is None else grad.flatten().numpy().copy())

    asked = GeneratorTraining(
        clip_norm=plan.clip_norm,
        max_physical_batch_size=_PHYSICAL,
        clipping=settings.clipping,
        rows_per_unit=ROWS,
    )
    with _one_thread(), before_steps(look):
        ran = training.train_generator(model, training.private(slots, plan, randomness), asked, pad=0, losses=losses)
    whole = np.array(given, np.float32).reshape(-1, model.side**2) * np.float32(plan.expected_batch / plan.clip_norm)
    hit = hit[: len(whole)] if len(whole) <= len(hit) else np.pad(hit, ((0, len(whole) - len(hit)), (0, 0)))
    return Steps(whole[:, :canaries], hit, whole[:, canaries:], np.asarray(sizes, np.int64), ran)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The layer is too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
