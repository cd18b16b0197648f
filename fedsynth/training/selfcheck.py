"""Checks before a charge that a training would follow its plan, on random public tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsynth import dpsgd
from fedsynth.dpsgd import (
    MARGIN,
    HalfPrecision,
    UnknownWeight,
    bookkeeping,
    clipper,
    opacus_modes,
    precision,
    recording,
)
from fedsynth.dpsgd import stacked as stacking
from fedsynth.dpsgd.stacked import stacked
from fedsynth.privacy import noise as randomness
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.skellam import Draws
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.training import checkpointing
from fedsynth.training import dp_training as training
from fedsynth.training.checkpointing import checkpointed
from fedsynth.training.dp_training import Losses, Randomness, clipped_sum, clipped_sums, trainable
from fedsynth.training.examples import Encoded, Example, Slot, vocabulary_of
from fedsynth.training.loopcheck import CHANCE, differs, far


class SelfCheckFailed(RuntimeError):
    """The training would not follow its plan; found on random public tokens, before any charge."""


def self_check(
    model: nn.Module,
    plan: DPPlan,
    settings: GeneratorTraining,
    *,
    pad: int,
    losses: Losses | None = None,
    example: Callable[[tuple[int, ...]], Encoded] = lambda tokens: Example(tokens, start=2),
) -> None:
    """Checks the step loop, and the model's clipped gradients, on random public tokens (docs/privacy.md).

    Each time it checks that the model's gradients are finite, not zero and clipped, and that an example's gradients
    are the same alone and in a batch (this finds BatchNorm, packing and batch-mean losses). Once in a process for the
    same code, plan, settings, shapes, device and precision it checks three more facts. The loop's draws, noise, divisor
    and steps are the plan's (`fedsynth.training.loopcheck`). One more unit moves the sum by C at most, with few and
    with most rows that a pass can have. There is memory for the largest pass (`whole_physical_batch`). The model stays
    as it was.

    Args:
        model: The model to train.
        plan: The plan of the training.
        settings: The settings of the training.
        pad: Token that fills a batch.
        losses: The losses of the training.
        example: Makes an example for the losses from tokens.

    Raises:
        SelfCheckFailed: If a check fails; the message names it.
        BadValue: If the settings ask for gradient checkpointing, and the model has none.
    """
    with checkpointed(model, settings.gradient_checkpointing):
        _check_gradients(model, plan, settings, pad=pad, losses=losses, example=example)
    _check_loop(plan, settings, _device(model))


def _check_gradients(
    model: nn.Module,
    plan: DPPlan,
    settings: GeneratorTraining,
    *,
    pad: int,
    losses: Losses | None,
    example: Callable[[tuple[int, ...]], Encoded],
) -> None:
    if not trainable(model):
        raise SelfCheckFailed("no parameter is trainable: was the adapter attached?")
    shapes, rng = _shapes(model), np.random.default_rng(0)
    # One of the longest: some models compute all positions differently if one text is long (LongRoPE). Each start pays
    # for three texts: together, each alone, and those that C does not cut under a lower bound.
    lengths = (5, max(14, settings.max_length), 3)
    examples = [example(tuple(int(t) for t in rng.integers(0, vocabulary_of(model), n))) for n in lengths]
    first = min(settings.rows_per_unit, len(examples) - 1)
    units: list[Slot] = [examples[:first], *([e] for e in examples[first:])]
    try:
        with clipper(model.train(), plan.clip_norm, settings.clipping) as clip:
            summed = partial(clipped_sum, clip, model, pad=pad, max_physical_batch_size=len(examples), losses=losses)
            together, alone = summed(units), [summed([unit]) for unit in units]
        norms = [_norm(grads) for grads in alone]
        for norm in norms:
            _check_norm(norm, plan.clip_norm)
        gap = _norm([t - sum(parts) for t, *parts in zip(together, *alone, strict=True)])
        if gap > 1e-3 * plan.clip_norm:
            raise SelfCheckFailed(f"an example's gradient depends on its batch (by {gap:.2g}): a layer mixes examples")
        # A gradient that is shorter than C was not cut: those are clipped again, so low that all are.
        whole = [unit for unit, norm in zip(units, norms, strict=True) if norm < (2 * MARGIN - 1) * plan.clip_norm]
        tight = min([plan.clip_norm, *(norm / 2 for norm in norms)])
        short, rows = units[-1], _most_rows(plan, settings)
        with clipper(model.train(), tight, settings.clipping) as clip:
            summed = partial(
                clipped_sum,
                clip,
                model,
                pad=pad,
                max_physical_batch_size=settings.max_physical_batch_size,
                losses=losses,
            )
            for unit in whole:
                _check_norm(_norm(summed([unit])), tight)
            _once(
                (shapes, settings.clipping, rows, losses),
                lambda: _check_counts(lambda count: summed([short] * count), rows, tight),
            )
        largest = (rows, settings.rows_per_unit, settings.max_length)
        _once(
            (shapes, settings.clipping, largest, losses),
            lambda: whole_physical_batch(model, plan, settings, pad=pad, losses=losses, example=example),
        )
    except UnknownWeight as problem:
        raise SelfCheckFailed(str(problem)) from problem
    except HalfPrecision as problem:
        raise SelfCheckFailed(
            f'{problem}: under a guarantee client.generator_training.precision is "float32" (what "auto" means there)'
        ) from problem
    finally:
        model.eval()


def check_stack(model: nn.Module, plan: DPPlan, settings: GeneratorTraining, *, pad: int) -> None:
    """`self_check` for the engine for several adapters: its loop, and every number of rows.

    A client's sum must equal that of the engine for one client, which has passed `self_check`.

    Args:
        model: The model to train, with LoRA in place.
        plan: The plan of the training.
        settings: The settings of the training.
        pad: Token that fills a batch.

    Raises:
        SelfCheckFailed: If a check fails; the message names it.
    """
    with checkpointed(model, settings.gradient_checkpointing):
        _check_stacked_sums(model, plan, settings, pad=pad)
    _check_loop(plan, settings, _device(model), clients=2)


def _check_stacked_sums(model: nn.Module, plan: DPPlan, settings: GeneratorTraining, *, pad: int) -> None:
    shapes, rng = _shapes(model), np.random.default_rng(1)
    units = [(Example(tuple(rng.integers(0, vocabulary_of(model), n).tolist()), 2),) for n in (6, 9, 7, 12, 5, 3)]
    lora = [weight for name, weight in model.named_parameters() if "lora_" in name]
    factors = {weight: torch.stack([weight.detach(), weight.detach()]) for weight in lora}
    try:
        with stacked(model.train(), factors, plan.clip_norm) as both:
            found = clipped_sums(both, model, [units[:2], units[2:]], pad=pad, max_physical_batch_size=len(units))
        with clipper(model.train(), plan.clip_norm) as clip:
            alone = [
                clipped_sum(clip, model, part, pad=pad, max_physical_batch_size=len(units))
                for part in (units[:2], units[2:])
            ]

        def check_counts() -> None:
            with clipper(model.train(), plan.clip_norm) as clip:
                norm = _norm(clipped_sum(clip, model, units[-1:], pad=pad, max_physical_batch_size=1))
            tight = min(plan.clip_norm, norm / 2 or plan.clip_norm)
            with stacked(model.train(), factors, tight) as both:

                def summed(count: int) -> list[Tensor]:
                    """Sums of units of the two clients in turn: one sum moves by at most as much as both together."""
                    own = [[units[-1]] * (count - count // 2), [units[-1]] * (count // 2)]
                    return [
                        clipped_sums(
                            both, model, own, pad=pad, max_physical_batch_size=settings.max_physical_batch_size
                        ).sum(0)
                    ]

                _check_counts(summed, settings.max_physical_batch_size, tight)

        _once((shapes, settings.max_physical_batch_size), check_counts)
    except (UnknownWeight, HalfPrecision) as problem:
        raise SelfCheckFailed(str(problem)) from problem
    finally:
        model.eval()
    for client, sums in enumerate(alone):
        gap = float((found[client] - torch.cat([s.flatten() for s in sums])).double().norm())
        if gap > 1e-3 * plan.clip_norm * len(units):
            raise SelfCheckFailed(f"a stacked client's sum differs from the one that it has alone (by {gap:.2g})")


class Noise(Randomness, Draws, Protocol):
    """The randomness of a list's noise: real or whole numbers."""


def check_list(release: Callable[[Sequence[float], Noise], Sequence[float]], plan: DPPlan) -> None:
    """Checks the mechanism of a list of numbers on public ones: two lists stay within C, the noise is the plan's.

    Args:
        release: The mechanism, for a list of `LISTED` numbers.
        plan: Its clip norm bounds the distance of two lists, its noise is that of each number.

    Raises:
        SelfCheckFailed: If a check fails; the message names it.
    """
    drawn = np.random.default_rng(0).standard_normal(LISTED) * 1e3 * plan.clip_norm
    one, other = (np.asarray(release((sign * drawn).tolist(), _Silent())) for sign in (1, -1))
    apart = float(np.linalg.norm(one - other))
    if not plan.clip_norm / 2 <= apart <= plan.clip_norm:
        raise SelfCheckFailed(f"two lists are {apart / plan.clip_norm:.4g} C apart, at most 1 is planned")
    quiet, scale = np.asarray(release([0.0] * LISTED, _Silent())), plan.noise_multiplier * plan.clip_norm
    noise = (np.asarray(release([0.0] * LISTED, GrantRandomness(bytes(32)))) - quiet) / scale
    if far(float(noise @ noise), LISTED) < CHANCE:
        deviation = math.sqrt(noise @ noise / LISTED)
        raise SelfCheckFailed(f"the noise has deviation {deviation:.4g} in units of sigma C, planned is 1")


LISTED = 2**14  # numbers in such a list: an error of 4 % in the deviation shows


class _Silent:
    """Randomness without noise, for checks that need none."""

    def normals(self, count: int) -> NDArray[np.float64]:
        return np.zeros(count)

    def poissons(self, count: int, mean: float) -> NDArray[np.int64]:  # noqa: ARG002 - none
        return np.zeros(count, dtype=np.int64)

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:
        raise NotImplementedError(f"a list is not drawn: {count} at {rate}")


def whole_physical_batch(
    model: nn.Module,
    plan: DPPlan,
    settings: GeneratorTraining,
    *,
    pad: int,
    losses: Losses | None = None,
    example: Callable[[tuple[int, ...]], Encoded] = lambda tokens: Example(tokens, start=2),
) -> None:
    """Computes the largest possible pass of the longest examples and discards the result.

    So a lack of memory shows before a charge. In the midst of a training, one long text would decide about an answer.

    Args: those of `self_check`.

    Raises:
        SelfCheckFailed: If the pass cannot be computed.
    """
    rng, rows = np.random.default_rng(0), _most_rows(plan, settings)
    tokens = rng.integers(0, vocabulary_of(model), (rows, settings.max_length)).tolist()
    examples = [_learnt_from(example(tuple(row)), 1) for row in tokens]
    if rows > 1:  # in a model that reads and writes, the longest to read meets the longest to write
        examples[-1] = _learnt_from(examples[-1], settings.max_length - 1)
    most = settings.rows_per_unit
    packings: list[list[Slot]] = [[examples[at : at + most] for at in range(0, rows, most)]]
    if most > 1:  # most pairs of rows above, most units with a sum of their own here
        packings.append([examples[:2], *([e] for e in examples[2:])])
    try:
        # The other memory of a training: two moments of Adam, the start of a proximal pull, sums in float64.
        held = [torch.ones_like(weight) for weight in trainable(model) for _ in range(5)]
        for units in packings:
            with clipper(model.train(), plan.clip_norm, settings.clipping) as clip:
                clipped_sum(clip, model, units, pad=pad, max_physical_batch_size=rows, losses=losses)
        held.clear()
    except (RuntimeError, MemoryError) as problem:
        raise SelfCheckFailed(
            f"a pass of {rows} texts of {settings.max_length} tokens cannot be computed here: a smaller "
            f"max_physical_batch_size or max_length needs less memory ({problem})"
        ) from problem
    finally:
        model.eval()


def _learnt_from(example: Encoded, start: int) -> Encoded:
    return Example(example.tokens, start) if isinstance(example, Example) else example


def _check_loop(plan: DPPlan, settings: GeneratorTraining, device: torch.device, clients: int = 1) -> None:
    def check() -> None:
        if problem := differs(plan, settings, device, clients=clients):
            raise SelfCheckFailed(problem)

    _once((plan, settings.clipping, settings.max_physical_batch_size, settings.rows_per_unit, device, clients), check)


def _check_norm(norm: float, limit: float) -> None:
    if not norm <= limit:
        raise SelfCheckFailed(f"a clipped gradient has norm {norm}, above clip_norm {limit}")
    if norm == 0:
        raise SelfCheckFailed(
            "an example has no gradient, or one that is not finite: is anything trainable, are its "
            "tokens learnt, are the weights finite?"
        )


def _check_counts(summed: Callable[[int], Sequence[Tensor]], most: int, clip_norm: float) -> None:
    """Checks sums of 1, 2, ... equal units: each unit adds that of one unit, with any kernel for so many rows.

    From 64 on it checks powers of two, where kernels may change, the numbers after them, and the largest number.
    """
    one, known = summed(1), {0: summed(0)}
    beyond = {power + more for power in (2**n for n in range(6, most.bit_length())) for more in (0, 1)}
    for count in [*range(1, min(most, 64) + 1), *sorted({c for c in beyond | {most} if 64 < c <= most})]:
        before, sums = known.get(count - 1) or summed(count - 1), summed(count)
        known = {count: sums}
        moved = [new.double() - old.double() for new, old in zip(sums, before, strict=True)]
        gap = _norm([step - alone for step, alone in zip(moved, one, strict=True)])
        if _norm(moved) > clip_norm or gap > 1e-3 * clip_norm:
            raise SelfCheckFailed(
                f"beside {count - 1} others in a pass a unit moves the sum by {_norm(moved) / clip_norm:.4f} C, and by "
                f"{_norm(one) / clip_norm:.4f} C alone: the model computes otherwise with another number of rows"
            )


def _most_rows(plan: DPPlan, settings: GeneratorTraining) -> int:
    """The most rows in one pass."""
    return max(settings.rows_per_unit, min(settings.max_physical_batch_size, plan.records * settings.rows_per_unit))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _norm(grads: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


_REMEMBERED = 256
_passed: dict[Hashable, None] = {}  # the checks that passed in this process


def _once(asked: Hashable, check: Callable[[], None]) -> None:
    """Runs a check unless it has passed in this process, with this code."""
    key = (asked, _code())
    if key not in _passed:
        check()
        while len(_passed) >= _REMEMBERED:
            _passed.pop(next(iter(_passed)))
        _passed[key] = None


def _code() -> tuple[Any, ...]:
    """The functions that a training runs, as they are now: a replaced function is checked again."""
    return tuple(
        part
        for module in (
            training,
            checkpointing,
            randomness,
            dpsgd,
            bookkeeping,
            recording,
            precision,
            stacking,
            opacus_modes,
        )
        for value in vars(module).values()
        for part in _functions(module, value)
    )


def _functions(module: ModuleType, value: Any) -> list[Any]:
    own = list(vars(value).values()) if isinstance(value, type) and value.__module__ == module.__name__ else [value]
    return [part for part in own if isinstance(part, FunctionType)]


def _shapes(model: nn.Module) -> tuple[Any, ...]:
    """The properties of a model that decide which code it runs: layers, shapes, types, device; no values."""
    tensors = tuple((name, w.shape, w.dtype, w.device, w.requires_grad) for name, w in model.named_parameters())
    layers = tuple(
        (type(layer).forward, layer.__dict__.get("forward"), getattr(layer, "gradient_checkpointing", False))
        for layer in model.modules()
    )
    return (*tensors, *layers)
