"""Several simulated clients' LoRAs train in one pass, if the clients' requests came in one message.

A client's function yields a `TrainRequest` and gets the trained result back. So it reads from top to bottom as if its
client were alone, and charges, releases and replies for that client alone.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from fedsynth.lora import Adapter
from fedsynth.models.adapters import read_adapter, stack_of, with_adapter
from fedsynth.models.devices import device
from fedsynth.models.loading import load_tokenizer
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.training.dp_training import Training, train_generator, train_stacked

R = TypeVar("R")


@dataclass(frozen=True)
class TrainRequest:
    """A LoRA of a client's model, to be trained.

    Attributes:
        base: Name of the client's model.
        start: The adapter to train from.
        settings: Learning rate, micro-batch, engine and precision.
        training: The examples, and how they are drawn, clipped and noised.
        frozen_a: Only the factors B are trained.
    """

    base: str
    start: Adapter
    settings: GeneratorTraining
    training: Training
    frozen_a: bool = False


@dataclass(frozen=True)
class TrainResult:
    """The result of a `TrainRequest`.

    Attributes:
        adapter: The trained adapter.
        steps: Number of steps that ran.
    """

    adapter: Adapter
    steps: int


class Barrier:
    """Waits for the other functions of its pass."""


Trains: TypeAlias = Generator[TrainRequest | Barrier, TrainResult, R]
"""A function that yields its trainings, may wait for the others, and returns R."""


def together(functions: Sequence[Trains[R]]) -> list[R]:
    """Runs all functions, in turns from training to training, and returns their results.

    If a training fails, it fails in each function that asked for it. The functions that wait continue when all others
    wait as well, or have ended.
    """
    results: dict[int, R] = {}
    replies: dict[int, Any] = dict.fromkeys(range(len(functions)))
    waiting: list[int] = []
    while replies:
        asked: dict[int, TrainRequest] = {}
        for number, reply in replies.items():
            function = functions[number]
            try:
                said = function.throw(reply) if isinstance(reply, Exception) else function.send(reply)
            except StopIteration as end:
                results[number] = end.value
                continue
            if isinstance(said, TrainRequest):
                asked[number] = said
            else:
                waiting.append(number)
        replies = {}
        if not asked:
            replies, waiting = dict.fromkeys(waiting), []
        for numbers in _alike(asked):
            try:
                replies |= zip(numbers, _trained([asked[number] for number in numbers]), strict=True)
            except Exception as problem:
                replies |= dict.fromkeys(numbers, problem)
    return [results[number] for number in range(len(functions))]


def _alike(asked: dict[int, TrainRequest]) -> list[list[int]]:
    """Groups of requests that one pass can train."""
    groups: dict[Any, list[int]] = {}
    for number, one in asked.items():
        of, by = one.start, one.training
        alike = (one.base, of.base, of.rank, of.alpha, one.settings, one.frozen_a, by.steps, by.clip_norm, by.proximal)
        own = () if one.settings.clipping == "bookkeeping" else (number,)
        groups.setdefault((alike, own), []).append(number)
    return list(groups.values())


def _trained(alike: Sequence[TrainRequest]) -> list[TrainResult]:
    one = alike[0]
    pad, precision = load_tokenizer(one.base).pad_token_id, one.settings.precision
    model = with_adapter(one.base, one.start, frozen_a=one.frozen_a, precision=precision).to(device())
    if len(alike) == 1:
        steps = train_generator(model, one.training, one.settings, pad=pad)
        return [TrainResult(read_adapter(model, one.start.base), steps)]
    stack = stack_of(model, [each.start for each in alike])
    steps = train_stacked(model, stack.factors, [each.training for each in alike], one.settings, pad=pad)
    return [TrainResult(replace(one.start, arrays=arrays, grants=(), public=False), steps) for arrays in stack.read()]
