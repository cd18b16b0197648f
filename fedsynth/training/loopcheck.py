"""A check that the step loop trains as planned: it runs on public units, and tests examine its draws and sums.

`fedsynth.training.dp_training` itself runs, with the plan's rate, steps, clip norm, noise and divisor, and the
settings' engine and micro-batch. Units have known gradients, all alike and far above C. So an optimizer must get
|drawn| C along one direction, and Gaussian noise of deviation sigma C in every coordinate, divided by the expected
batch. Each of a dozen tests fails with a chance of 1e-9 if all is right. The key is fixed, so that a verdict is the
same each time.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from scipy.special import logsumexp
from scipy.stats import binom, chi2
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedsynth.dpsgd import MARGIN
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.training import dp_training as training
from fedsynth.training.examples import Example

LEAST = 16  # fewest watched steps: a shorter training is repeated
MOST = 256  # most watched steps of one training: the rest of a longer one is only counted
CHANCE = 1e-9  # of each test to fail if all is right and keys are drawn: 6 deviations
PUBLIC = b"fedsynth: public, for checks only"  # never a grant's: the same verdict each time
_WIDTH, _VOCABULARY, _RANK, _DIGITS = 64, 192, 8, 4
_LONG, _ROW = 3 * 2**18, 2**12  # numbers of a long noise, and of one of its parts that are compared
_LAGS = 3 / 4  # of the numbers: beyond, too few products are added for a normal distribution
_ALL = 2**13  # most units that are drawn at once, unless more are expected
_ROUNDING = 1e-4  # bound on the relative rounding of a clipped gradient in float32: a tenth of the margin below C


@dataclass
class Watched:
    """The steps of one client's training, as the optimizer saw them.

    Attributes:
        drawn: Units of each step, by number.
        along: The optimizer's input in each step, times the expected batch, along the units' gradient.
        square: Squared length of the rest in each step, which is noise.
        fourth: Sum of the fourth powers of the rest in each step.
        again: Product of the rest with that of the step before, for each step except the first.
        each: Squared rests, added up over steps, (numbers,).
        lags: Sum of the products of numbers of the rest that are 1, 2, ... places apart, added up over steps.
        first: The rest of the first step.
    """

    drawn: list[NDArray[np.int64]] = field(default_factory=list)
    along: list[float] = field(default_factory=list)
    square: list[float] = field(default_factory=list)
    fourth: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    each: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    lags: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    first: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _last: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def step(self, drawn: NDArray[np.int64], given: NDArray[np.float64], direction: NDArray[np.float64]) -> None:
        """Notes one step; `given` is in units of sigma C, once the expected batch is multiplied back."""
        along = float(given @ direction)
        rest = given - along * direction
        squares = rest**2
        lags = _lagged(rest) + _lagged(direction)  # what was taken away along it has products, too
        if not self.drawn:
            self.first, self.each, self.lags = rest, squares, lags
        else:
            self.again.append(float(rest @ self._last))
            self.each, self.lags = self.each + squares, self.lags + lags
        self.drawn.append(drawn)
        self.along.append(along)
        self.square.append(float(squares.sum()))
        self.fourth.append(float((squares**2).sum()))
        self._last = rest


def _lagged(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of the products of numbers that are 1, 2, ... places apart."""
    size = 2 * len(values)
    found: NDArray[np.float64] = np.fft.irfft(np.abs(np.fft.rfft(values, size)) ** 2, size)[1 : len(values)]
    return found


def differs(
    plan: DPPlan, settings: GeneratorTraining, device: torch.device, *, clients: int = 1, key: bytes = PUBLIC
) -> str | None:
    """The first deviation of the step loop from the plan, in words; None if there is none.

    The check takes one or two milliseconds for each of `MOST` steps, and some hundredths of one for each further step,
    which draws nothing. It leaves torch's global random state alone.

    Args:
        plan: The plan; its rate, steps, clip norm, noise and expected batch are tested.
        settings: The settings; their engine, micro-batch and rows of a unit are used.
        device: The device to train on.
        clients: Number of clients; several train in one pass.
        key: A public key; other keys are for tests of this check.
    """
    found: list[Watched] = []
    if plan.steps > MOST:
        taken, ran = _counted(plan, settings, device, clients)
        if not taken == ran == plan.steps:
            return _of_steps(taken, ran, plan)
        plan = replace(plan, steps=MOST)
    for turn in range(-(-_enough(plan) // (plan.steps * clients))):
        watched, ran = _trained(plan, settings, device, clients, key + turn.to_bytes(4, "big"))
        if {len(each.drawn) for each in watched} | {ran} != {plan.steps}:
            return _of_steps(len(watched[0].drawn), ran, plan)
        found += watched
    # Some steps under another key show whether any draw or noise does not come from the key.
    other, _ = _trained(replace(plan, steps=min(4, plan.steps)), settings, device, clients, key + b"other")
    if problem := next(_differences(found, other, plan), None):
        return problem
    return _of_all_units(plan, settings, device, clients) or _of_long_noise(device, key)


def _of_steps(taken: int, ran: int, plan: DPPlan) -> str:
    return f"{taken} steps were taken and {ran} reported, planned are {plan.steps}"


def _enough(plan: DPPlan) -> int:
    """Enough steps to expose draws of a fixed size: binomial ones all have the expected size with chance e^-40."""
    same = -float(binom.logpmf(plan.expected_batch, plan.records, plan.sampling_rate))
    return max(LEAST, math.ceil(40 / same) if same > 1e-9 else LEAST)


def _trained(
    plan: DPPlan, settings: GeneratorTraining, device: torch.device, clients: int, key: bytes
) -> tuple[list[Watched], int]:
    """Each client's steps, and the number of steps that the training reports."""
    trainings = _trainings(plan, settings, clients, key)
    model = _Flat(plan.clip_norm).to(device)
    direction = _direction(model)
    watched = [Watched() for _ in range(clients)]
    scale = plan.expected_batch / (plan.noise_multiplier * plan.clip_norm)

    def look(weights: Sequence[Tensor]) -> None:
        gradients = torch.cat(
            [
                torch.zeros(clients, w.numel() // clients) if w.grad is None else w.grad.reshape(clients, -1).cpu()
                for w in weights
            ],
            1,
        )
        drawn = model.drawn()
        for client, given in enumerate(gradients.double().numpy()):
            own = drawn[drawn // plan.records == client] - client * plan.records
            watched[client].step(own, scale * given, direction)

    with before_steps(look):
        ran = _run(model, trainings, settings)
    return watched, ran


def _counted(plan: DPPlan, settings: GeneratorTraining, device: torch.device, clients: int) -> tuple[int, int]:
    """The number of steps that a whole training takes, and the number that it reports.

    It draws no unit: the loop must take a step for an empty draw, too, and the model costs no time.
    """
    taken = 0

    def look(_: Sequence[Tensor]) -> None:
        nonlocal taken
        taken += 1

    trainings = [replace(each, randomness=_Idle()) for each in _trainings(plan, settings, clients, PUBLIC)]
    with before_steps(look):
        ran = _run(_Flat(plan.clip_norm).to(device), trainings, settings)
    return taken, ran


def _of_all_units(plan: DPPlan, settings: GeneratorTraining, device: torch.device, clients: int) -> str | None:
    """Whether a step takes in all units that are drawn, however many: a cap would let one decide about another."""
    units = min(plan.records, 2 * plan.expected_batch, max(_ALL, plan.expected_batch))
    plan = replace(plan, records=units, steps=1)
    trainings = [replace(each, randomness=_All()) for each in _trainings(plan, settings, clients, PUBLIC)]
    model, moved = _Flat(plan.clip_norm).to(device), [0.0] * clients
    direction = _direction(model)

    def look(weights: Sequence[Tensor]) -> None:
        given = torch.cat([_zeros_if_none(w).reshape(clients, -1).cpu() for w in weights], 1).double().numpy()
        moved[:] = (given @ direction * plan.expected_batch / (MARGIN * plan.clip_norm)).tolist()

    with before_steps(look):
        _run(model, trainings, settings)
    if all(abs(sum_ - units) <= 10 * _ROUNDING * units for sum_ in moved):
        return None
    return f"where all of {units} units are drawn, the sum is that of {min(moved):.1f}: is there a most of a batch?"


def _zeros_if_none(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _of_long_noise(device: torch.device, key: bytes) -> str | None:
    """Whether the noise of a large model, which is made block by block, is nowhere used again."""
    noise = torch.zeros(_LONG, dtype=torch.float64, device=device)
    training.add_noise(noise, 1.0, GrantRandomness(hashlib.sha256(key + b"long").digest()))
    parts = noise.view(-1, _ROW).cpu().numpy()
    if far(float(np.square(parts).sum()), _LONG) < CHANCE:
        return f"the noise of a large model has deviation {math.sqrt(np.square(parts).mean()):.4g}, planned is 1"
    z = np.triu(parts @ parts.T, 1) / math.sqrt(_ROW)
    most = float(np.abs(z).max())
    if _normal(most) < CHANCE / (len(parts) * (len(parts) - 1) / 2):
        one, other = np.unravel_index(int(np.abs(z).argmax()), z.shape)
        return (
            f"the noise of a large model is used again: parts {one + 1} and {other + 1} are correlated (z {most:.0f})"
        )
    return None


class _All:
    """Draws all units and adds nothing."""

    def normals(self, count: int) -> NDArray[np.float64]:
        return np.zeros(count)

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:  # noqa: ARG002 - the signature of Randomness
        return np.ones(count, np.bool_)


class _Idle:
    """Draws nothing and adds nothing, at no cost."""

    def normals(self, count: int) -> NDArray[np.float64]:
        return np.zeros(count)

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:  # noqa: ARG002 - the signature of Randomness
        return np.zeros(1, np.bool_)


def _trainings(plan: DPPlan, settings: GeneratorTraining, clients: int, key: bytes) -> list[training.Training]:
    """The planned training of each client, on units of its own."""
    rows = min(settings.rows_per_unit, 4)
    keys = [hashlib.sha256(key + client.to_bytes(4, "big")).digest() for client in range(clients)]
    return [
        training.private(_Units(plan.records, rows, client * plan.records), plan, GrantRandomness(own))
        for client, own in enumerate(keys)
    ]


def _run(model: _Flat, trainings: Sequence[training.Training], settings: GeneratorTraining) -> int:
    """Trains at a rate at which no weight moves: a unit's gradient is the same in every step."""
    settings = GeneratorTraining(
        learning_rate=1e-30,
        clip_norm=trainings[0].clip_norm,
        max_physical_batch_size=settings.max_physical_batch_size,
        clipping=settings.clipping,
        rows_per_unit=settings.rows_per_unit,
    )
    if len(trainings) == 1:
        return training.train_generator(model, trainings[0], settings, pad=0)
    factors = {w: torch.stack([w.detach()] * len(trainings)) for w in model.parameters() if w.requires_grad}
    return training.train_stacked(model, factors, trainings, settings, pad=0)


@contextmanager
def before_steps(look: Any) -> Iterator[None]:
    """While open, `look` gets the weights of each step that an optimizer of this thread is about to take."""
    thread = threading.get_ident()

    def hook(optimizer: Any, arguments: Any, more: Any) -> None:  # noqa: ARG001 - torch's signature
        if threading.get_ident() == thread:
            look([w for group in optimizer.param_groups for w in group["params"]])

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Units(Sequence[Any]):
    """The declared number of units of 1 to `rows` rows; a unit's tokens are its number, and it learns one token.

    Attributes:
        units: Number of units.
        rows: Most rows of a unit.
        start: Number of the first unit.
    """

    units: int
    rows: int
    start: int

    def __len__(self) -> int:
        return self.units

    def __getitem__(self, at: Any) -> Any:
        if not -self.units <= at < self.units:
            raise IndexError(at)
        number = self.start + int(at) % self.units
        digits = tuple(number // _VOCABULARY**place % _VOCABULARY for place in range(_DIGITS))
        return (Example((*digits, 1), _DIGITS),) * (1 + int(at) % self.rows)


class _Flat(nn.Module):
    """A language model with the same output for every input: a LoRA on a constant. It notes the units that it read.

    Args:
        size: Size of the constant's numbers; gradients are more than a hundred times as long.
    """

    def __init__(self, size: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.layer = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
            inject_adapter_in_model(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=["layer"]), self)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                weight.requires_grad_("lora_" in name)
                start = torch.linspace(-1, 1, weight.numel()).view_as(weight) if "lora_A" in name else 0.0
                weight.copy_(torch.as_tensor(start))
        self.input = nn.Parameter(torch.full((1, 1, _WIDTH), size), requires_grad=False)
        self._read: list[Tensor] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor) -> Any:  # noqa: ARG002 - transformers' signature
        """Logits, all zero at the start."""
        self._read.append(input_ids[:, :_DIGITS])
        logits: Tensor = self.layer(self.input.expand(len(input_ids), len(logits_to_keep), -1))
        return SimpleNamespace(logits=logits)

    def drawn(self) -> NDArray[np.int64]:
        """The numbers of the units read since the last call, each once."""
        read, self._read = self._read, []
        if not read:
            return np.zeros(0, np.int64)
        digits = torch.cat(read).cpu().numpy().astype(np.int64)
        return np.unique(digits @ _VOCABULARY ** np.arange(_DIGITS, dtype=np.int64))


def _direction(model: _Flat) -> NDArray[np.float64]:
    """The direction of every unit's gradient, of length 1, by one plain backward pass."""
    learnt = [w for w in model.parameters() if w.requires_grad]
    ids = torch.zeros(1, _DIGITS + 1, dtype=torch.long, device=model.input.device)
    logits = model(ids, ids, torch.tensor([_DIGITS - 1], device=ids.device)).logits[0, 0]
    grads = torch.autograd.grad(-logits.log_softmax(0)[1], learnt)
    model.drawn()
    whole = torch.cat([g.flatten() for g in grads]).double().cpu().numpy()
    return np.asarray(whole / np.linalg.norm(whole))


def _differences(found: Sequence[Watched], other: Sequence[Watched], plan: DPPlan) -> Iterator[str]:
    """The deviations, one line each.

    Args:
        found: Whole trainings.
        other: First steps of further trainings, with other keys.
        plan: The plan of all trainings.
    """
    yield from _draws(found, other, plan)
    yield from _noise(found, other)
    yield from _sums(found, plan)


def _draws(found: Sequence[Watched], other: Sequence[Watched], plan: DPPlan) -> Iterator[str]:
    """Each unit enters each step by a coin of its own: rate, sizes and repetitions are binomial."""
    n, q, expected = plan.records, plan.sampling_rate, plan.expected_batch
    sizes = np.array([len(drawn) for each in found for drawn in each.drawn], np.int64)
    if two_sided(int(sizes.sum()), n * len(sizes), q) < CHANCE:
        yield f"the sampler draws at rate {sizes.mean() / n:.4f}, planned is {q:.4f}"
    squares = int(((sizes - expected) ** 2).sum())
    if chance_of_squares(squares, len(sizes), n, q) < CHANCE:
        yield (
            f"the sizes of {len(sizes)} draws vary by {squares / len(sizes):.3g} about {expected}, those of Poisson "
            f"sampling by {n * q * (1 - q):.3g}: are batches shuffled?"
        )
    seen, times = np.unique(np.concatenate([drawn for each in found for drawn in each.drawn]), return_counts=True)
    if len(seen) < n:  # units that are never drawn are alike, and may be too many to list
        times = np.append(times, 0)
    if (by_unit := two_sided(times, len(sizes), q)).min() < CHANCE / n:
        at = int(by_unit.argmin())
        yield f"one unit is drawn in {times[at]} of {len(sizes)} steps, planned is a rate of {q:.4f}"
    for gap, where in ((1, "side by side"), (n // 2, "half of all apart")):
        # Each unit is in one pair at most, so that the pairs are independent.
        if n == 1:  # it has no other
            continue
        count = len(sizes) * (n // (2 * gap) * gap + max(0, n % (2 * gap) - gap))
        both = sum(
            int(np.isin(drawn[(drawn // gap) % 2 == 0] + gap, drawn).sum()) for each in found for drawn in each.drawn
        )
        if two_sided(both, count, q * q) < CHANCE:
            yield (
                f"of {count} pairs of units {where} {both} were drawn together, {count * q * q:.3g} would be by chance"
            )
    trainings = list(pairwise([*found, *other]))[::2]  # each once
    for pairs, where in (
        (
            [pair for each in found for pair in zip(each.drawn[::2], each.drawn[1::2], strict=False)],
            "steps of one training",
        ),
        ([pair for one, two in trainings for pair in zip(one.drawn, two.drawn, strict=False)], "trainings' steps"),
    ):
        both = sum(len(np.intersect1d(one, two, assume_unique=True)) for one, two in pairs)
        if pairs and two_sided(both, n * len(pairs), q * q) < CHANCE:
            yield (
                f"in {len(pairs)} pairs of {where} {both} units were drawn twice, "
                f"{n * len(pairs) * q * q:.3g} would be by chance"
            )


def _noise(found: Sequence[Watched], other: Sequence[Watched]) -> Iterator[str]:
    """The rests are independent normals of deviation 1, in every step and coordinate."""
    numbers = len(found[0].first) - 1  # along the units' gradient there is no rest
    square = np.concatenate([each.square for each in found])
    count = numbers * len(square)
    deviation = math.sqrt(square.sum() / count)
    if far(square.sum(), count) < CHANCE:
        yield f"the noise has deviation {deviation:.4g} in units of sigma C, planned is 1"
    if (by_step := far(square, numbers)).min() < CHANCE / len(square):
        at = int(by_step.argmin())
        yield f"in one step the noise has deviation {math.sqrt(square[at] / numbers):.4g} in units of sigma C"
    each = np.sum([one.each for one in found], axis=0)
    if (by_number := far(each, len(square))).min() < CHANCE / len(by_number):
        at = int(by_number.argmin())
        yield (
            f"at one weight the noise has deviation {math.sqrt(each[at] / len(square)):.4g} in units of sigma C, "
            "planned is 1"
        )
    fourth = sum(sum(one.fourth) for one in found) / (3 * count) - 1
    if _normal(fourth / math.sqrt(96 / 9 / count)) < CHANCE:
        yield f"the noise is not Gaussian: its fourth power has a mean of {3 * fourth + 3:.3f} times sigma C, not 3"
    apart = np.sum([one.lags for one in found], axis=0)[: int(_LAGS * numbers)]
    z = np.abs(apart) / np.sqrt(len(square) * (numbers + 1 - np.arange(1, len(apart) + 1)))
    if _normal(float(z.max())) < CHANCE / len(z):
        at = int(z.argmax())
        yield (
            f"the noise of weights {at + 1} places apart is correlated (z {z[at]:.0f}): it is used again within a step"
        )
    again = [value for one in found for value in one.again]
    between = [float(one.first @ two.first) for one, two in pairwise([*found, *other])]
    for values, where in ((again, "of one step and the next"), (between, "of trainings with keys of their own")):
        if values and _normal(sum(values) / math.sqrt(numbers * len(values))) < CHANCE:
            yield f"the noise {where} is correlated by {sum(values) / numbers / len(values):.3f}: it is used again"


def _sums(found: Sequence[Watched], plan: DPPlan) -> Iterator[str]:
    """Along the units' gradient each drawn unit adds C, and the divisor is the same in every step."""
    along = np.concatenate([each.along for each in found])
    drawn = np.array([len(units) for each in found for units in each.drawn], np.float64)
    unit = MARGIN / plan.noise_multiplier  # C in units of the noise
    for sizes, what, why in (
        (drawn, "a drawn unit", "is it clipped to C, is the divisor the expected batch?"),
        (drawn - drawn.mean(), "another drawn unit", "is the divisor the drawn batch?"),
    ):
        square = float(sizes @ sizes) * unit**2
        if square == 0:
            continue
        slope = float(sizes @ along) * unit / square
        allowed = (6.2 + _ROUNDING * drawn.max() * unit) / math.sqrt(square) + _ROUNDING
        if not abs(slope - 1) <= allowed:
            yield f"{what} moves the sum by {slope:.4g} C, planned is 1: {why}"


def two_sided(count: Any, trials: int, rate: float) -> Any:
    """Chance of a binomial count at least as extreme, on both sides together; may exceed 1."""
    return 2 * np.minimum(binom.cdf(count, trials, rate), binom.sf(count - 1, trials, rate))


def _normal(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def far(squares: Any, count: int) -> Any:
    """The chance that a sum of `count` squared standard normals is at least as extreme, on either side."""
    return 2 * np.minimum(chi2.cdf(squares, count), chi2.sf(squares, count))


def chance_of_squares(squares: int, draws: int, n: int, q: float) -> float:
    """Bound on the chance that squared distances of binomial draws from n q have a sum at least as extreme.

    It is Chernoff's bound: E exp(r sum) is that of one draw to the power of draws. Sizes with a chance below 10^-20 per
    draw are left out (Bernstein's inequality).
    """
    middle, variance = round(n * q), n * q * (1 - q)
    reach = math.ceil(16 + math.sqrt(16**2 + 2 * 47 * variance))
    sizes = np.arange(max(0, middle - reach), min(n, middle + reach) + 1)
    each, chances = (sizes - middle) ** 2, binom.logpmf(sizes, n, q)
    rates = np.concatenate([-np.logspace(-3, 4, 71), np.logspace(-3, 0, 31)]) / max(variance, 1e-9)
    bounds = draws * logsumexp(chances + rates[:, None] * each, axis=1) - rates * squares
    low, high = bounds[rates < 0].min(), bounds[rates > 0].min()
    return float(2 * np.exp(min(low, high, 0.0)))
