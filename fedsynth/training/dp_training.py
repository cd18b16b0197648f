"""A generator trained on private text under DP-SGD.

DP-SGD is Abadi et al. 2016 (algorithm 1). The loop owns the Poisson sampling: it draws masks before it sees text, an
empty batch is a noise-only step, and the noisy sum is divided by the expected batch, never by the drawn one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsynth.dpsgd import Clipper, clipper
from fedsynth.dpsgd.stacked import Factors, Stacked, stacked
from fedsynth.models.batches import padded
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.training.checkpointing import checkpointed
from fedsynth.training.examples import Example, Slot

IGNORED = -100  # cross_entropy's own mark for positions without a target


Losses: TypeAlias = Callable[[nn.Module, Sequence[Any], int], Tensor]
"""Model, examples, padding token -> each example's own loss, shape (examples,)."""


class Randomness(Protocol):
    """Noise and Poisson draws: a grant's own (fedsynth.privacy.noise), or public ones without a guarantee."""

    def normals(self, count: int) -> NDArray[np.float64]:
        """`count` standard normals, in an array of their own, which the caller may change."""

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:
        """An independent coin per unit."""


def next_token_losses(model: nn.Module, examples: Sequence[Example], pad: int) -> Tensor:
    """Each example's mean negative log-likelihood over its own learnt tokens: no example enters another's loss."""
    logits, wanted = next_tokens(model, examples, pad)
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view_as(wanted).sum(1) / (wanted != IGNORED).sum(1).clamp(min=1)


def next_tokens(model: nn.Module, examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """The model's predictions, (examples, positions, vocabulary) logits, and the learnt tokens, (examples, positions).

    Each position predicts its token before the model reads it. Tokens that are not learnt are `IGNORED`.
    """
    where = next(model.parameters()).device
    if _reads_and_writes(model):
        within: Any = getattr(model, "_module", model)  # Opacus wraps it
        given, present = padded([e.tokens[: e.start] for e in examples], pad)
        wanted = padded([e.tokens[e.start :] or (IGNORED,) for e in examples], IGNORED)[0].to(where)
        # The decoder reads its start token and then the targets; padding comes last, where no earlier token looks.
        before = within.prepare_decoder_input_ids_from_labels(wanted)
        read = {"input_ids": given.to(where), "attention_mask": present.to(where), "decoder_input_ids": before}
        logits = _float(model(**read, use_cache=False).logits)
    else:
        tokens, present = padded([e.tokens for e in examples], pad)
        targets, _ = padded([(IGNORED,) * e.start + e.tokens[e.start :] for e in examples], IGNORED)
        length = tokens.shape[1]
        # Positions before all learnt tokens need no logits, which cost as much as some layers.
        first = max(0, min(min(e.start for e in examples) - 1, length - 2))
        read = {"input_ids": tokens.to(where), "attention_mask": present.to(where)}
        logits = _float(model(**read, logits_to_keep=torch.arange(first, length - 1, device=where)).logits)
        wanted = targets[:, first + 1 : length].to(where)
    return logits, wanted


def _float(logits: Tensor) -> Tensor:
    return logits.float() if torch.finfo(logits.dtype).bits < 32 else logits


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
    max_physical_batch_size: int,
    losses: Losses | None = None,
) -> list[Tensor]:
    """Sum over units of their examples' summed gradients, each unit's clipped; zeros for no unit.

    The default loss of an example is `next_token_losses`.
    """
    losses_of: Losses = losses or next_token_losses
    for part in _physical_batches(model, units, max_physical_batch_size):
        examples, numbers = _rows(units, part)
        clip.add(partial(losses_of, model, examples, pad), numbers)
    return clip.take()


def clipped_sums(
    clip: Stacked, model: nn.Module, units: Sequence[Sequence[Slot]], *, pad: int, max_physical_batch_size: int
) -> Tensor:
    """`clipped_sum` of several clients' units at once: (clients, numbers), as `Stacked.weights`."""
    whole = [unit for own in units for unit in own]
    client = [number for number, own in enumerate(units) for _ in own]
    for part in _physical_batches(model, whole, max_physical_batch_size):
        examples, numbers = _rows(whole, part)
        clip.add(partial(next_token_losses, model, examples, pad), numbers, [client[n] for n in numbers])
    return clip.take()


def _physical_batches(model: nn.Module, units: Sequence[Slot], max_physical_batch_size: int) -> Iterator[list[int]]:
    """The numbers of the units of each pass, sorted by length.

    A pass holds `max_physical_batch_size` examples at most, or one larger unit."""
    both = _reads_and_writes(model)

    def shape(number: int) -> tuple[int, int]:
        """Lengths of its longest example: the read and the written part, or the whole."""
        ends = [(getattr(e, "start", 0) if both else 0, len(e.tokens)) for e in units[number]]
        return max(n - s for s, n in ends), max(s for s, _ in ends)

    ordered = sorted((number for number, unit in enumerate(units) if unit), key=shape)
    at = 0
    while at < len(ordered):
        end, rows = at + 1, len(units[ordered[at]])
        while end < len(ordered) and rows + len(units[ordered[end]]) <= max_physical_batch_size:
            rows += len(units[ordered[end]])
            end += 1
        yield ordered[at:end]
        at = end


def _rows(units: Sequence[Slot], numbers: Sequence[int]) -> tuple[list[Any], list[int]]:
    """The examples of these units, and each one's unit."""
    return [e for n in numbers for e in units[n]], [n for n in numbers for _ in units[n]]


_BLOCK = 2**17  # normals that a thread makes at once: 1 MB


def add_noise(total: Tensor, deviation: float, randomness: Randomness) -> None:
    """Adds Gaussian noise to a sum in place: in float64, rounded once, block by block, without a second copy.

    The numbers are made on the CPU. A sum on a GPU gets each block by one copy and adds it there.
    """
    flat, block = total.view(-1), _BLOCK * torch.get_num_threads()
    for part in flat.split(block):
        noise = torch.from_numpy(randomness.normals(len(part)))
        noise *= deviation
        part.add_(noise.to(part.device))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, in the order of the model."""
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Training:
    """One client's training data, sampling, clipping and noise, made by `private` or `without_guarantee`.

    Attributes:
        slots: One slot per privacy unit.
        rate: Chance of each slot in each step.
        expected_batch_size: The divisor of each step's sum, for any draw.
        steps: Noisy steps, empty draws included.
        clip_norm: C; infinite clips nothing.
        noise_multiplier: Standard deviation of the noise in units of C.
        randomness: The source of draws and noise.
        proximal: Mu of FedProx (arXiv 1812.06127): the loss gains mu / 2 times the squared distance from the start.
            Its gradient depends on the weights alone, so that adding it to the noisy sum costs no privacy.
    """

    slots: Sequence[Slot]
    rate: float
    expected_batch_size: int
    steps: int
    clip_norm: float
    noise_multiplier: float
    randomness: Randomness
    proximal: float = 0.0

    def draw(self) -> list[Slot]:
        """The units of the next step."""
        mask = self.randomness.poisson_mask(len(self.slots), self.rate)
        return [self.slots[i] for i in np.flatnonzero(mask).tolist()]


def private(slots: Sequence[Slot], plan: DPPlan, randomness: Randomness, proximal: float = 0.0) -> Training:
    """DP-SGD exactly as planned: rate, steps, clip and noise are those of the charged plan.

    Raises:
        ValueError: If there is not one slot per declared record.
    """
    if len(slots) != plan.records:
        raise ValueError(f"the plan declares {plan.records} records, got {len(slots)} slots")
    return Training(
        slots,
        rate=plan.sampling_rate,
        expected_batch_size=plan.expected_batch,
        steps=plan.steps,
        clip_norm=plan.clip_norm,
        noise_multiplier=plan.noise_multiplier,
        randomness=randomness,
        proximal=proximal,
    )


def without_guarantee(slots: Sequence[Slot], settings: GeneratorTraining, seed: int, proximal: float = 0.0) -> Training:
    """The same schedule without clip and noise: the control arm that shows what privacy costs."""
    batch = min(settings.expected_batch_size, len(slots))
    return Training(
        slots,
        rate=batch / len(slots),
        expected_batch_size=batch,
        steps=settings.steps,
        clip_norm=math.inf,
        noise_multiplier=0.0,
        randomness=PublicRandomness(seed),
        proximal=proximal,
    )


def train_generator(
    model: nn.Module,
    training: Training,
    settings: GeneratorTraining,
    *,
    pad: int,
    losses: Losses | None = None,
) -> int:
    """Trains in place; returns the number of steps that ran.

    Args:
        model: The model; its trainable weights change.
        training: Data, sampling, clipping and noise.
        settings: Learning rate, micro-batch and engine.
        pad: Token that fills a batch.
        losses: Losses of the examples; a classifier passes its own in place of `next_token_losses`.
    """
    with (
        checkpointed(model, settings.gradient_checkpointing),
        clipper(model.train(), training.clip_norm, settings.clipping) as clip,
    ):

        def sums(drawn: Sequence[Sequence[Slot]]) -> list[Tensor]:
            [own] = drawn
            found = clipped_sum(
                clip, model, own, pad=pad, max_physical_batch_size=settings.max_physical_batch_size, losses=losses
            )
            return [total.unsqueeze(0) for total in found]

        ran = _descend(trainable(model), [training], settings, sums)
    model.eval()
    return ran


def train_stacked(
    model: nn.Module, factors: Factors, trainings: Sequence[Training], settings: GeneratorTraining, *, pad: int
) -> int:
    """Trains the adapters of several clients at once, in place; returns the number of steps that ran.

    Each client has its own draws, noise and sums, and its own part of the optimizer's state. Its result is the same in
    any stack, except for rounding.

    Args:
        model: A model with LoRA; its own weights stay as they are.
        factors: By LoRA weight of the model, the weights of all clients, (clients, *weight.shape); trained in place.
        trainings: One per client; all have the same steps, clip norm and proximal pull.
        settings: The settings of all clients.
        pad: Token that fills a batch.

    Raises:
        ValueError: If the trainings differ in steps, clip norm or proximal pull, or clipping is not `bookkeeping`.
    """
    if len({(t.steps, t.clip_norm, t.proximal) for t in trainings}) != 1 or settings.clipping != "bookkeeping":
        raise ValueError(
            "clients that train in one pass need the same steps, clip norm and proximal pull, and "
            "clipping = 'bookkeeping'"
        )
    with (
        checkpointed(model, settings.gradient_checkpointing),
        stacked(model.train(), factors, trainings[0].clip_norm) as clip,
    ):

        def sums(drawn: Sequence[Sequence[Slot]]) -> list[Tensor]:
            return [clipped_sums(clip, model, drawn, pad=pad, max_physical_batch_size=settings.max_physical_batch_size)]

        ran = _descend([clip.weights], trainings, settings, sums)
    model.eval()
    return ran


def _descend(
    weights: Sequence[Tensor],
    trainings: Sequence[Training],
    settings: GeneratorTraining,
    sums_of: Callable[[Sequence[Sequence[Slot]]], list[Tensor]],
) -> int:
    """Takes steps of Adam on clipped, noised sums; returns their number.

    Args:
        weights: One client's weights, or one row of numbers for each of several clients.
        trainings: One per client.
        settings: Learning rate.
        sums_of: The draws of each client -> the clipped sums of all, (clients, ...) by weight.
    """
    proximal, steps = trainings[0].proximal, trainings[0].steps
    starts = [w.detach().clone() for w in weights] if proximal else weights
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate, betas=(0.9, 0.99))
    ran = 0
    for step in range(steps):
        totals = sums_of([training.draw() for training in trainings])
        for client, training in enumerate(trainings):
            for total in totals:
                if training.noise_multiplier > 0:
                    add_noise(total[client], training.noise_multiplier * training.clip_norm, training.randomness)
        for weight, start, total in zip(weights, starts, totals, strict=True):
            given = total.to(weight.dtype)  # after the noise: before it, sums of several passes are in float64
            for client, training in enumerate(trainings):
                given[client].div_(training.expected_batch_size)
            weight.grad = given.view(weight.shape)
            if proximal:
                weight.grad = weight.grad + proximal * (weight.detach() - start)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - 0.9 * step / steps)
        optimizer.step()
        ran += 1
    return ran


@dataclass
class PublicRandomness:
    """Poisson draws from a public seed, for training without a guarantee; it has no noise."""

    seed: int

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def normals(self, count: int) -> NDArray[np.float64]:
        """Always fails: noise from a public seed protects nothing."""
        raise RuntimeError(f"{count} normals asked of a public seed: noise comes from a grant's key only")

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:
        """An independent coin per unit."""
        return self._rng.random(count) < rate
