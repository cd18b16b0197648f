"""An adapter trained on text that is free to use: public, released, or written by the server's model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from fedsynth.scenario import Tuning
from fedsynth.training import Example, next_token_losses, trainable


def tune(
    model: nn.Module,
    examples: Sequence[Example],
    settings: Tuning,
    *,
    pad: int,
    seed: int,
    weights: Sequence[float] | None = None,
) -> float:
    """Supervised fine-tuning of what is trainable in a model, in place (AdamW, rate decayed linearly to a tenth).

    Args:
        model: With an adapter.
        examples: What is learnt of each is said by its `start`.
        settings: Passes, batch, rate.
        pad: Token that fills a batch.
        seed: Public; of the order.
        weights: One per example, not negative: its loss counts so many times; left out: all count once. An example of
            weight 0 is not read.

    Returns:
        The mean loss (nats per token, weighted) of the last pass; nan where there is nothing to learn from.

    Raises:
        ValueError: If a weight is negative or not finite, or there is not one per example.
    """
    share = np.ones(len(examples)) if weights is None else np.asarray(weights, np.float64)
    if len(share) != len(examples) or not np.isfinite(share).all() or (share < 0).any():
        raise ValueError(f"tune needs one finite weight >= 0 per example, got {len(share)} for {len(examples)}")
    rows = np.flatnonzero(share).tolist()
    if not rows:
        return math.nan
    optimizer = torch.optim.AdamW(trainable(model), lr=settings.learning_rate, weight_decay=0.0)
    steps = settings.epochs * math.ceil(len(rows) / settings.batch)
    model.train()
    losses: list[float] = []
    for step, batch in enumerate(_batches(rows, settings, seed)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - 0.9 * step / steps)
        each = next_token_losses(model, [examples[i] for i in batch], pad)
        factor = torch.tensor(share[batch], dtype=each.dtype, device=each.device)
        loss = (factor * each).sum() / factor.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(model), settings.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return float(np.mean(losses[-math.ceil(len(rows) / settings.batch) :]))


def _batches(rows: Sequence[int], settings: Tuning, seed: int) -> Iterator[list[int]]:
    rng = np.random.default_rng(seed)
    for _ in range(settings.epochs):
        order = rng.permutation(rows).tolist()
        for at in range(0, len(order), settings.batch):
            yield order[at : at + settings.batch]
