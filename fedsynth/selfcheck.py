"""What is checked before a charge: that a training would be what its plan says, on random public tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fedsynth.dpsgd import UnknownWeight, clipper
from fedsynth.dpsgd.stacked import stacked
from fedsynth.examples import Encoded, Example, vocabulary_of
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario import GeneratorTraining
from fedsynth.training import Losses, clipped_sum, clipped_sums, padding_step, trainable


class SelfCheckFailed(RuntimeError):
    """The training would not be what the plan says; found on random public tokens, before any charge."""


def self_check(
    model: nn.Module,
    plan: DPPlan,
    settings: GeneratorTraining,
    *,
    pad: int,
    losses: Losses | None = None,
    example: Callable[[tuple[int, ...]], Encoded] = lambda tokens: Example(tokens, start=2),
) -> None:
    """Checks sampler, noise, clipping and independence of examples on random public tokens (docs/privacy.md).

    Finds layers that mix the examples of a batch (BatchNorm, packing, batch-mean losses), a missing clip and a model
    that does not learn at all. Leaves the model as it was. Costs some hundredths of a second for a tiny model.

    Args:
        model: What will be trained.
        plan: As which it will be trained.
        settings: With which it will be trained.
        pad: Token that fills a batch.
        losses: As it will be trained with.
        example: Makes an example for them from tokens.

    Raises:
        SelfCheckFailed: With what is wrong.
    """
    if not trainable(model):
        raise SelfCheckFailed("no parameter is trainable: was the adapter attached?")
    check_streams(plan.sampling_rate)
    rng = np.random.default_rng(0)
    # One as long as any: some models compute all positions otherwise where one text is long (LongRoPE).
    lengths = (5, 9, 9, max(14, settings.max_tokens), 7)
    examples = [example(tuple(int(t) for t in rng.integers(0, vocabulary_of(model), n))) for n in lengths]
    first = min(settings.rows_per_unit, len(examples) - 1)
    units = [examples[:first], *([e] for e in examples[first:])]
    try:
        with clipper(model.train(), plan.clip_norm, settings.clipping) as clip:
            summed = partial(clipped_sum, clip, model, pad=pad, microbatch=len(examples), losses=losses)
            together, alone = summed(units), [summed([unit]) for unit in units]
        norms = [_norm(grads) for grads in alone]
        # Gradients may be shorter than C at the start: what clips is seen where all are cut, too.
        tight = min([plan.clip_norm, *(norm / 2 for norm in norms if norm > 0)])
        with clipper(model.train(), tight, settings.clipping) as clip:
            cut = [_norm(clipped_sum(clip, model, [unit], pad=pad, microbatch=len(examples), losses=losses))
                   for unit in units]  # fmt: skip
    except UnknownWeight as problem:
        raise SelfCheckFailed(str(problem)) from problem
    finally:
        model.eval()
    for norm, limit in [*((norm, plan.clip_norm) for norm in norms), *((norm, tight) for norm in cut)]:
        if norm > limit:
            raise SelfCheckFailed(f"a clipped gradient has norm {norm}, above clip_norm {limit}")
    if 0.0 in norms:
        raise SelfCheckFailed("an example has no gradient: is anything trainable, are its tokens learnt?")
    gap = math.sqrt(
        sum(float((t - sum(parts)).double().square().sum()) for t, *parts in zip(together, *alone, strict=True))
    )
    if gap > 1e-3 * plan.clip_norm:
        raise SelfCheckFailed(f"an example's gradient depends on its batch (by {gap:.2g}): a layer mixes examples")


def check_stack(model: nn.Module, plan: DPPlan, *, pad: int) -> None:
    """Checks that the engine for several adapters gives each client the sums of the engine for one, on random public
    tokens: that one has passed `self_check`.

    Args:
        model: With LoRA in place, as it will be trained.
        plan: As which it will be trained.
        pad: Token that fills a batch.

    Raises:
        SelfCheckFailed: If they differ.
    """
    rng = np.random.default_rng(1)
    units = [(Example(tuple(rng.integers(0, vocabulary_of(model), n).tolist()), 2),) for n in (6, 9, 7, 12, 5)]
    lora = [weight for name, weight in model.named_parameters() if "lora_" in name]
    factors = {weight: torch.stack([weight.detach(), weight.detach()]) for weight in lora}
    try:
        with stacked(model.train(), factors, plan.clip_norm) as both:
            found = clipped_sums(both, model, [units[:2], units[2:]], pad=pad, microbatch=len(units))
        with clipper(model.train(), plan.clip_norm) as clip:
            alone = [clipped_sum(clip, model, part, pad=pad, microbatch=5) for part in (units[:2], units[2:])]
    except UnknownWeight as problem:
        raise SelfCheckFailed(str(problem)) from problem
    finally:
        model.eval()
    for client, sums in enumerate(alone):
        gap = float((found[client] - torch.cat([s.flatten() for s in sums])).double().norm())
        # In half precision the two add up in another order: see docs/privacy.md.
        if gap > (1e-3 if padding_step(model) == 1 else 0.2) * plan.clip_norm * len(units):
            raise SelfCheckFailed(f"a stacked client's sum differs from the one that it has alone (by {gap:.2g})")


def whole_microbatch(model: nn.Module, plan: DPPlan, settings: GeneratorTraining, *, pad: int) -> None:
    """Trains on as many of the longest examples as are ever held at once, and forgets it: what memory that takes shows
    before a run, not in the midst of it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary_of(model), (settings.microbatch, settings.max_tokens)).tolist()
    units = [(Example(tuple(row), start=2),) for row in tokens]
    with clipper(model.train(), plan.clip_norm, settings.clipping) as clip:
        clipped_sum(clip, model, units, pad=pad, microbatch=settings.microbatch)
    model.eval()


def _norm(grads: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


def check_streams(rate: float, count: int = 20_000) -> None:
    """Draws of a public key, never used for anything else, have the planned rate and unit deviation (5 sigma)."""
    randomness = GrantRandomness(bytes(32))
    drawn = float(randomness.poisson_mask(count, rate).mean())
    if abs(drawn - rate) > 5 * math.sqrt(rate * (1 - rate) / count):
        raise SelfCheckFailed(f"the sampler draws at rate {drawn:.4f}, planned is {rate:.4f}")
    deviation = float(np.std(randomness.normals(count)))
    if abs(deviation - 1) > 5 / math.sqrt(2 * count):
        raise SelfCheckFailed(f"the noise has deviation {deviation:.4f} in units of sigma C, planned is 1")
