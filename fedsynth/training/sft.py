"""Training of an adapter on text that is free to use: public, released, or written by the server's model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsynth.scenario.client import Tuning
from fedsynth.training.dp_training import IGNORED, next_token_losses, next_tokens, trainable
from fedsynth.training.examples import Example

LossOf: TypeAlias = Callable[[list[int]], Tensor]
"""Rows of a batch -> their loss, with a gradient."""


@dataclass(frozen=True)
class Guard:
    """A guard of a model's general ability during tuning: on some texts the model may not drift from its predictions.

    Attributes:
        examples: The texts; each step reads as many as it reads examples of the tuning.
        weight: Weight of the mean KL divergence per token, from the model as it was to the model as it is.
    """

    examples: Sequence[Example]
    weight: float


@dataclass(frozen=True)
class Steps:
    """The settings of an adapter's training, for any loss.

    Attributes:
        settings: Passes, batch, rate.
        pad: Token that fills a batch.
        seed: Public seed of the order.
        guard: A guard against forgetting.
    """

    settings: Tuning
    pad: int
    seed: int
    guard: Guard | None = None


@dataclass(frozen=True)
class Descent:
    """The task of the optimizer's steps.

    Attributes:
        model: A model with an adapter.
        rows: The rows to draw batches from, each once a pass.
        loss_of: The loss of a batch.
        steps: The settings of the steps.
    """

    model: nn.Module
    rows: Sequence[int]
    loss_of: LossOf
    steps: Steps


Descend: TypeAlias = Callable[[Descent], float]


def descend(asked: Descent) -> float:
    """AdamW on the trainable weights of a model, in place; the rate falls linearly to a tenth.

    Returns:
        The mean loss of the last pass, without the guard's; nan if there is no row.
    """
    model, rows = asked.model, asked.rows
    settings, pad, guard = asked.steps.settings, asked.steps.pad, asked.steps.guard
    if not rows:
        return math.nan
    weights = trainable(model)
    start = [w.detach().clone() for w in weights]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    steps = settings.epochs * math.ceil(len(rows) / settings.batch)
    rng = np.random.default_rng([asked.steps.seed, 0x60A2D])
    model.train()
    losses: list[float] = []
    for step, batch in enumerate(_batches(rows, settings, asked.steps.seed)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - 0.9 * step / steps)
        held: list[Example] = []
        if guard is not None and guard.weight > 0 and guard.examples:
            held = [guard.examples[i] for i in rng.integers(len(guard.examples), size=settings.batch).tolist()]
        # The guard swaps weights, and so it comes before any computation that needs a gradient.
        said = _likelihoods_before(model, held, start, pad) if held else None
        loss = asked.loss_of(batch)
        losses.append(float(loss.detach()))
        if guard is not None and said is not None:
            loss = loss + guard.weight * _drift(model, held, said, pad)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.step()
    model.eval()
    return float(np.mean(losses[-math.ceil(len(rows) / settings.batch) :]))


def sft(model: nn.Module, examples: Sequence[Example], steps: Steps, *, descend: Descend = descend) -> float:
    """Supervised fine-tuning of the trainable weights of a model, in place.

    Args:
        model: A model with an adapter.
        examples: The examples; the tokens from `start` on are learnt.
        steps: The settings of the steps.
        descend: Takes the steps.

    Returns:
        The mean loss (nats per token, without the guard's) of the last pass; nan if there is nothing to learn from.
    """

    def loss(batch: list[int]) -> Tensor:
        return next_token_losses(model, [examples[i] for i in batch], steps.pad).sum() / len(batch)

    return descend(Descent(model, range(len(examples)), loss, steps))


def dpo(
    model: nn.Module,
    pairs: Sequence[tuple[Example, Example]],
    steps: Steps,
    *,
    beta: float,
    descend: Descend = descend,
) -> float:
    """Direct preference optimisation of the trainable weights of a model, in place (Rafailov et al. 2023, equation 7).

    Args:
        model: A model with an adapter; its state before the call is the reference.
        pairs: Preferred and rejected text, after the same prompt.
        steps: The settings of the steps; a batch holds pairs.
        beta: Strength of the reference: POPri 0.01, up to 0.1.
        descend: Takes the steps.

    Returns:
        The mean loss of the last pass (ln 2 if the model cannot tell the pairs apart); nan if there is no pair.

    Raises:
        ValueError: If beta is not above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")

    def ahead(batch: list[int]) -> Tensor:
        """Log-likelihood of the preferred texts less that of the rejected ones, in nats."""
        chosen, rejected = (_likelihoods(model, [pairs[i][side] for i in batch], steps.pad) for side in (0, 1))
        return chosen - rejected

    model.eval()
    with torch.no_grad():
        size = steps.settings.batch
        blocks = [list(range(at, min(at + size, len(pairs)))) for at in range(0, len(pairs), size)]
        before = [ahead(block) for block in blocks]
        reference = torch.cat(before) if before else torch.empty(0)

    def loss(batch: list[int]) -> Tensor:
        return -F.logsigmoid(beta * (ahead(batch) - reference[batch])).mean()

    return descend(Descent(model, range(len(pairs)), loss, steps))


def perplexity(model: nn.Module, examples: Sequence[Example], *, pad: int, batch: int = 64) -> float:
    """Perplexity: exp of the mean negative log-likelihood of all learnt tokens together.

    Raises:
        ValueError: If there is no example.
    """
    if not examples:
        raise ValueError("a perplexity needs at least one example")
    with torch.no_grad():
        whole = [_likelihoods(model, examples[at : at + batch], pad) for at in range(0, len(examples), batch)]
    return math.exp(-float(torch.cat(whole).double().sum()) / sum(map(_learnt, examples)))


def _learnt(example: Example) -> int:
    return max(1, len(example.tokens) - example.start)


def _likelihoods(model: nn.Module, examples: Sequence[Example], pad: int) -> Tensor:
    """Log-likelihood of each example's learnt tokens together, in nats."""
    losses = next_token_losses(model, examples, pad)
    return -losses * torch.tensor([_learnt(e) for e in examples], dtype=losses.dtype, device=losses.device)


def _likelihoods_before(model: nn.Module, examples: Sequence[Example], start: Sequence[Tensor], pad: int) -> Tensor:
    """Log-probabilities of each next token by the model with the trainable weights `start`."""
    with torch.no_grad(), _as_it_was(trainable(model), start):
        return next_tokens(model, examples, pad)[0].log_softmax(-1)


def _drift(model: nn.Module, examples: Sequence[Example], before: Tensor, pad: int) -> Tensor:
    """Mean KL divergence per learnt token from `before` to the model's log-probabilities."""
    logits, wanted = next_tokens(model, examples, pad)
    learnt = wanted != IGNORED
    return ((before.exp() * (before - logits.log_softmax(-1))).sum(-1) * learnt).sum() / learnt.sum().clamp(min=1)


@contextmanager
def _as_it_was(weights: Sequence[nn.Parameter], start: Sequence[Tensor]) -> Iterator[None]:
    """While open, the trainable weights have the values `start`; the few weights cost less than a copy of the model."""
    now = [w.detach().clone() for w in weights]
    _put(weights, start)
    try:
        yield
    finally:
        _put(weights, now)


@torch.no_grad()
def _put(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _batches(rows: Sequence[int], settings: Tuning, seed: int) -> Iterator[list[int]]:
    rng = np.random.default_rng(seed)
    for _ in range(settings.epochs):
        order = rng.permutation(rows).tolist()
        for at in range(0, len(order), settings.batch):
            yield order[at : at + settings.batch]
