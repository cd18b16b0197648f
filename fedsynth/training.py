"""A generator trained on private text under DP-SGD.

DP-SGD is Abadi et al. 2016 (algorithm 1) with Poisson sampling owned by the loop: masks are drawn before text is seen,
an empty batch is a noise-only step, and the noisy sum is divided by the expected batch, never by the drawn one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsynth.batches import padded
from fedsynth.dpsgd import Clipper, clipper
from fedsynth.examples import Example, Slot
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario import GeneratorTraining

IGNORED = -100  # cross_entropy's own mark for positions without a target


Losses: TypeAlias = Callable[[nn.Module, Sequence[Any], int], Tensor]
"""Model, examples, padding token -> each example's own loss, shape (examples,)."""


class Randomness(Protocol):
    """Noise and Poisson draws: a grant's own (fedsynth.privacy.noise), or a public one where nothing is protected."""

    def normals(self, count: int) -> NDArray[np.float64]:
        """`count` standard normals."""

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:
        """An independent coin per unit."""


def next_token_losses(model: nn.Module, examples: Sequence[Example], pad: int) -> Tensor:
    """Each example's mean negative log-likelihood over its own learnt tokens: no example enters another's loss."""
    logits, wanted = next_tokens(model, examples, pad)
    losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED)
    return losses.sum(1) / (wanted != IGNORED).sum(1).clamp(min=1)


def next_tokens(model: nn.Module, examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """What the model says of each token before it reads it, (examples, positions, vocabulary) logits, and the tokens
    that are learnt, (examples, positions), `IGNORED` elsewhere."""
    where, step = next(model.parameters()).device, padding_step(model)
    if _reads_and_writes(model):
        within: Any = getattr(model, "_module", model)  # Opacus wraps it
        given, present = padded([e.tokens[: e.start] for e in examples], pad, step=step)
        wanted = padded([e.tokens[e.start :] or (IGNORED,) for e in examples], IGNORED, step=step)[0].to(where)
        # The decoder reads its start token and then the targets; padding stands behind, where it never looks.
        before = within.prepare_decoder_input_ids_from_labels(wanted)
        read = {"input_ids": given.to(where), "attention_mask": present.to(where), "decoder_input_ids": before}
        logits = model(**read, use_cache=False).logits.float()
    else:
        tokens, present = padded([e.tokens for e in examples], pad, step=step)
        targets, _ = padded([(IGNORED,) * e.start + e.tokens[e.start :] for e in examples], IGNORED, step=step)
        length = tokens.shape[1]
        # What comes before all learnt tokens needs no logits: they cost as much as some layers.
        first = max(0, min(min(e.start for e in examples) - 1, length - 2))
        read = {"input_ids": tokens.to(where), "attention_mask": present.to(where)}
        logits = model(**read, logits_to_keep=torch.arange(first, length - 1, device=where)).logits.float()
        wanted = targets[:, first + 1 : length].to(where)
    return logits, wanted


_STEP = 16


def padding_step(model: nn.Module) -> int:
    """To a multiple of how many tokens examples are padded.

    In half precision the gradient of an example moves with the length to which it is padded, by up to 1 % of the clip
    norm as measured: it may depend on the example alone, not on who else was drawn (docs/privacy.md).
    """
    return _STEP if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else 1


def _reads_and_writes(model: nn.Module) -> bool:
    within: Any = getattr(model, "_module", model)  # Opacus wraps it
    return bool(getattr(getattr(within, "config", None), "is_encoder_decoder", False))


def mean_loss(model: nn.Module, examples: Sequence[Example], *, pad: int, batch: int) -> float:
    """Mean over examples of their negative log-likelihood (nats) per learnt token.

    Raises:
        ValueError: If there is no example.
    """
    if not examples:
        raise ValueError("a mean loss needs at least one example")
    with torch.no_grad():
        parts = [next_token_losses(model, examples[i : i + batch], pad) for i in range(0, len(examples), batch)]
    return float(torch.cat(parts).double().mean())


def clipped_sum(
    clip: Clipper,
    model: nn.Module,
    units: Sequence[Slot],
    *,
    pad: int,
    microbatch: int,
    losses: Losses | None = None,
) -> list[Tensor]:
    """Sum over units of their examples' summed gradients, each unit's clipped; zeros for no unit.

    Micro-batches of `microbatch` examples (more only where one unit has more) split one drawn batch, sorted by length;
    in half precision those of one padded length each. The loss of an example is `next_token_losses` unless another one
    is given.
    """
    losses_of: Losses = losses or next_token_losses
    step, both = padding_step(model), _reads_and_writes(model)

    def shape(unit: Slot) -> tuple[int, ...]:
        """Of its longest example, as it is padded: what is read and what is written, or all in one."""
        ends = [(getattr(e, "start", 0) if both else 0, len(e.tokens)) for e in unit]
        return tuple(-(-size // step) for size in (max(n - s for s, n in ends), max(s for s, _ in ends)))

    ordered = sorted((unit for unit in units if unit), key=shape)
    at = 0
    while at < len(ordered):
        end, rows = at + 1, len(ordered[at])
        while (
            end < len(ordered)
            and rows + len(ordered[end]) <= microbatch
            and (step == 1 or shape(ordered[end]) == shape(ordered[at]))
        ):
            rows += len(ordered[end])
            end += 1
        examples = [example for unit in ordered[at:end] for example in unit]
        numbers = [number for number, unit in enumerate(ordered[at:end]) for _ in unit]
        clip.add(partial(losses_of, model, examples, pad), numbers)
        at = end
    return clip.take()


_BLOCK = 2**18  # noise that is made at once


def add_noise(total: Tensor, deviation: float, randomness: Randomness) -> None:
    """Gaussian noise onto a sum, in place: added in float64 and rounded once, block by block to need no second copy."""
    flat = total.view(-1)
    for at in range(0, len(flat), _BLOCK):
        part = flat[at : at + _BLOCK]
        noise = torch.from_numpy(randomness.normals(len(part)))
        part.copy_((deviation * noise).to(part.device).add_(part))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are optimised, in the order of the model."""
    return [p for p in model.parameters() if p.requires_grad]


def train_generator(
    model: nn.Module,
    slots: Sequence[Slot],
    settings: GeneratorTraining,
    *,
    pad: int,
    rate: float,
    expected_batch: int,
    steps: int,
    clip_norm: float,
    noise_multiplier: float,
    randomness: Randomness,
    proximal: float = 0.0,
    losses: Losses | None = None,
) -> int:
    """Trains in place; returns the number of steps that ran.

    Called with a plan's numbers and a grant's randomness by `fit_private`; with an infinite clip and no noise by the
    run without guarantee, so that both take the same steps.

    Args:
        proximal: Mu of FedProx (arXiv 1812.06127): the loss gains mu / 2 times the squared distance from the start.
            Its gradient is a function of the weights alone: added to the noisy sum, it costs no privacy.
        losses: Of the examples; `next_token_losses` unless a classifier is trained.
    """
    weights = trainable(model)
    starts = [w.detach().clone() for w in weights] if proximal else weights
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate, betas=(0.9, 0.99))
    ran = 0
    with clipper(model.train(), clip_norm, settings.clipping) as clip:
        for step in range(steps):
            mask = randomness.poisson_mask(len(slots), rate)
            drawn = [slots[i] for i in np.flatnonzero(mask).tolist()]
            sums = clipped_sum(clip, model, drawn, pad=pad, microbatch=settings.microbatch, losses=losses)
            for weight, start, total in zip(weights, starts, sums, strict=True):
                if noise_multiplier > 0:
                    add_noise(total, noise_multiplier * clip_norm, randomness)
                weight.grad = total.div_(expected_batch)
                if proximal:
                    weight.grad = weight.grad + proximal * (weight.detach() - start)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 - 0.9 * step / steps)
            optimizer.step()
            ran += 1
    model.eval()
    return ran


def fit_private(
    model: nn.Module,
    slots: Sequence[Slot],
    plan: DPPlan,
    settings: GeneratorTraining,
    *,
    pad: int,
    randomness: Randomness,
    proximal: float = 0.0,
    losses: Losses | None = None,
) -> int:
    """DP-SGD exactly as planned: rate, steps, clip and noise are the plan's, which is what was charged.

    Raises:
        ValueError: If there is not one slot per declared record.
    """
    if len(slots) != plan.records:
        raise ValueError(f"the plan declares {plan.records} records, got {len(slots)} slots")
    return train_generator(
        model,
        slots,
        settings,
        pad=pad,
        rate=plan.sampling_rate,
        expected_batch=plan.expected_batch,
        steps=plan.steps,
        clip_norm=plan.clip_norm,
        noise_multiplier=plan.noise_multiplier,
        randomness=randomness,
        proximal=proximal,
        losses=losses,
    )


@dataclass
class PublicRandomness:
    """Poisson draws from a public seed, for training that claims no guarantee; it has no noise to give."""

    seed: int

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def normals(self, count: int) -> NDArray[np.float64]:
        """Never: noise from a public seed protects nothing."""
        raise RuntimeError(f"{count} normals asked of a public seed: noise comes from a grant's key only")

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:
        """An independent coin per unit."""
        return self._rng.random(count) < rate


def fit_without_guarantee(
    model: nn.Module,
    slots: Sequence[Slot],
    settings: GeneratorTraining,
    *,
    pad: int,
    seed: int,
    proximal: float = 0.0,
) -> int:
    """The same schedule without clip and noise: the control arm that shows what privacy costs."""
    return train_generator(
        model,
        slots,
        settings,
        pad=pad,
        rate=min(settings.expected_batch, len(slots)) / len(slots),
        expected_batch=min(settings.expected_batch, len(slots)),
        steps=settings.steps,
        clip_norm=math.inf,
        noise_multiplier=0.0,
        randomness=PublicRandomness(seed),
        proximal=proximal,
    )
