"""The plans of DP-SGD trainings, votes and scores, and the epsilon that they cost, alone and together."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from fedsynth.limits import MAX_SIGMA, MAX_STEPS, MIN_DELTA
from fedsynth.privacy.rdp import bound

if TYPE_CHECKING:
    from dp_accounting import dp_event  # it brings scipy: every command reads plans, and few compute an epsilon

Relation = Literal["zero_out", "replace_one"]

# What gets the noise: the sum of a batch's gradients, a client's whole list of scores, the sum of all units' votes.
Mechanism = Literal["gradients", "scores", "votes", "summed_scores", "summed_votes"]
# How far a unit that is replaced by another moves it, in C: gradients may point apart, votes are not negative, and no
# list of scores is further from another than from an empty one.
APART: Mapping[Mechanism, float] = {
    "gradients": 2.0,
    "scores": 1.0,
    "votes": math.sqrt(2),
    "summed_scores": 1.0,
    "summed_votes": math.sqrt(2),
}
# Whole numbers with Skellam noise (`fedsynth.privacy.skellam`): their Rényi divergence alone is known to lie below
# that of the Gaussian mechanism, so that no privacy loss distribution speaks for them.
BY_RDP: frozenset[Mechanism] = frozenset({"summed_scores", "summed_votes"})

MOST_SUMMED = 128.0  # noise multiplier of whole numbers: `fedsynth.privacy.noise.MAX_MEAN`
# Grids of privacy losses. PLD rounds up, so that each figure is an upper bound on any of them.
FINE, ROUGH = 1e-4, 1e-2
ROUNDED = 3e-5  # of epsilon: the most that rounding may add to a figure, unless even the finest grid adds more
SMALLEST_SIGMA = 0.05  # below, epsilon is in the thousands, and PLD takes minutes to say so
# Bounds on the time and memory of a plan, which a server chooses and a site computes: some seconds, half a gigabyte.
_LOSSES, _STEP_LOSSES = 3e6, 2e5  # most points of a grid, for all steps and for one; beyond, it is coarser than FINE
_USELESS = 0.05  # a grid this coarse is no better than RDP
_MOST_KINDS = 32  # kinds of steps that PLD composes, each in some tenths of a second; beyond, RDP too


class BudgetTooSmall(ValueError):
    """No allowed noise makes the training fit the budget."""


@dataclass(frozen=True)
class Budget:
    """A limit of spending: (epsilon, delta) under zero-out adjacency, one unit replaced by an empty one.

    Raises:
        ValueError: If epsilon is not finite and positive, or delta is not in `MIN_DELTA` .. 1, exclusive.
    """

    epsilon: float
    delta: float = 1e-5  # docs/privacy.md: n^-1.1 is too large for a small n

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon must be finite and > 0, got {self.epsilon}; no guarantee is: no budget")
        _check_delta(self.delta)
        if self.delta < MIN_DELTA:
            raise ValueError(
                f"delta must be at least {MIN_DELTA:g}, got {self.delta:g}: epsilon cannot be computed "
                f"below; ask for {MIN_DELTA:g}, or more"
            )


@dataclass(frozen=True)
class DPPlan:
    """DP-SGD as it will run: the trainer and the accountant read this one object.

    Attributes:
        records: Declared, public number of units n; the real count changes nothing here.
        expected_batch: Expected number of units in a Poisson draw; the noisy sum is divided by it.
        steps: Noisy steps of one round. Empty batches count.
        rounds: Rounds with fresh access to the private data.
        clip_norm: L2 norm C to which a unit's gradient is clipped.
        noise_multiplier: Standard deviation of the noise on the sum, in units of C.
        delta: The delta at which epsilon is stated.
        mechanism: What gets the noise. Two mechanisms never share rounds: a replaced unit costs each another epsilon.

    Raises:
        ValueError: If a number is outside its range.
    """

    records: int
    expected_batch: int
    steps: int
    rounds: int
    clip_norm: float
    noise_multiplier: float
    delta: float
    mechanism: Mechanism = "gradients"

    def __post_init__(self) -> None:
        if self.mechanism not in APART:
            raise ValueError(f"mechanism must be one of {', '.join(APART)}, got {self.mechanism!r}")
        if self.mechanism in BY_RDP and self.noise_multiplier > MOST_SUMMED:
            raise ValueError(f"noise_multiplier of a secure sum must be at most {MOST_SUMMED:g}")
        if self.mechanism != "gradients" and self.expected_batch != self.records:
            raise ValueError(f"of {self.mechanism} all units take part: expected_batch must be {self.records}")
        for name in ("records", "expected_batch", "steps", "rounds"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if self.expected_batch > self.records:
            raise ValueError(
                f"expected_batch must lie in 1..{self.records} (the declared records), got {self.expected_batch}"
            )
        for name in ("clip_norm", "noise_multiplier"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        _check_delta(self.delta)

    @property
    def sampling_rate(self) -> float:
        """Probability q with which each unit enters a batch, independently of the others."""
        return self.expected_batch / self.records

    @property
    def total_steps(self) -> int:
        """Noisy steps of all rounds."""
        return self.steps * self.rounds

    @property
    def round_event(self) -> dp_event.DpEvent:
        """One round in the accountant's terms."""
        return _steps_event(self.sampling_rate, self.noise_multiplier, self.steps)

    @property
    def event(self) -> dp_event.DpEvent:
        """All rounds in the accountant's terms."""
        return _steps_event(self.sampling_rate, self.noise_multiplier, self.total_steps)

    def to_dict(self) -> dict[str, int | float | str]:
        """Plain values by name; `from_dict` reads them back. A training names no mechanism, as in older ledgers."""
        values = asdict(self)
        if self.mechanism == "gradients":
            del values["mechanism"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DPPlan:
        """The plan that `to_dict` wrote.

        Raises:
            ValueError: If names are missing or unknown, or a number is outside its range.
        """
        check_names(cls, {"mechanism": "gradients", **values})
        numbers: dict[str, Any] = {name: float(v) if name in _REAL else v for name, v in values.items()}
        return cls(**numbers)

    def digest(self) -> str:
        """SHA-256 (hex) of the plan as canonical JSON."""
        # float() first: clip_norm 1 and 1.0 are equal plans and must have one digest.
        values = {k: float(v) if k in _REAL else v for k, v in self.to_dict().items()}
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_REAL = {"clip_norm", "noise_multiplier", "delta"}


def plan(
    budget: Budget,
    *,
    records: int,
    expected_batch: int,
    steps: int,
    rounds: int = 1,
    clip_norm: float = 1.0,
    max_noise_multiplier: float = 20.0,
    mechanism: Mechanism = "gradients",
    beside: Sequence[DPPlan] = (),
) -> DPPlan:
    """The plan with the least noise that keeps all rounds within the budget.

    The noise multiplier is the smallest multiple of 0.001 whose epsilon is at most the
    budget's, but never below `SMALLEST_SIGMA`. The search takes seconds for any input.

    Args:
        budget: The budget of all rounds together.
        records: Declared number of units.
        expected_batch: Expected number of units per step.
        steps: Steps of one round.
        rounds: Rounds with access to the private data.
        clip_norm: L2 norm C; it does not change epsilon, as the noise is in its units.
        max_noise_multiplier: The most noise; beyond it training learns nothing, and the plan is refused.
        mechanism: What gets the noise.
        beside: Plans of other mechanisms on the same data that the budget pays for, too; all are fixed in advance.

    Raises:
        BudgetTooSmall: If more noise than `max_noise_multiplier` would be needed.
        ValueError: If a number is outside its range, all rounds have more than `MAX_STEPS` steps, or
            `max_noise_multiplier` is above `MAX_SIGMA`.
    """
    if mechanism in BY_RDP:
        max_noise_multiplier = min(max_noise_multiplier, MOST_SUMMED)
    # The noise of this draft is replaced below; building it checks the other numbers first.
    draft = DPPlan(records, expected_batch, steps, rounds, clip_norm, max_noise_multiplier, budget.delta, mechanism)
    if draft.total_steps > MAX_STEPS:
        raise ValueError(
            f"steps x rounds must be at most {MAX_STEPS:,}, got {steps:,} x {rounds:,}: take fewer, of larger batches"
        )
    if max_noise_multiplier > MAX_SIGMA:
        raise ValueError(f"max_noise_multiplier must be at most {MAX_SIGMA:g}, got {max_noise_multiplier:g}")
    search = _smallest_by_rdp if mechanism in BY_RDP else _smallest_sigma
    sought = _Sought(budget.epsilon, budget.delta, draft.sampling_rate, draft.total_steps, *pieces_of(beside))
    sigma = search(sought, math.floor(max_noise_multiplier * 1000))
    if sigma is None:
        needed = _noise_beyond(sought, max_noise_multiplier)
        paid = f" beside {len(beside)} other plan(s)" if beside else ""
        raise BudgetTooSmall(
            f"epsilon {budget.epsilon:g} at delta {budget.delta:g} over {draft.total_steps} steps at sampling rate "
            f"{draft.sampling_rate:g}{paid} needs noise_multiplier {needed}, more than max_noise_multiplier "
            f"{max_noise_multiplier:g}; give more budget, fewer steps or a smaller batch"
        )
    return replace(draft, noise_multiplier=sigma)


def epsilon(plan: DPPlan, delta: float, *, relation: Relation = "zero_out") -> float:
    """Epsilon at `delta` of all rounds of a plan: an upper bound, `inf` if there is none.

    Args:
        plan: Any plan.
        delta: The delta, inside (0, 1).
        relation: zero_out: one unit replaced by an empty one, n fixed. replace_one: by any other unit.
    """
    return composed_epsilon([plan], delta, relation=relation)


def event_epsilon(event: dp_event.DpEvent, delta: float, *, relation: Relation = "zero_out", grid: float) -> float:
    """Epsilon at `delta` of an event by privacy loss distributions, with losses rounded up to multiples of `grid`."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    neighbours = {"zero_out": NeighboringRelation.REPLACE_SPECIAL, "replace_one": NeighboringRelation.REPLACE_ONE}
    return float(PLDAccountant(neighbours[relation], grid).compose(event).get_epsilon(delta))


def composed_epsilon(plans: Iterable[DPPlan], delta: float, *, relation: Relation = "zero_out") -> float:
    """Epsilon at `delta` of several plans on the same data, fixed in advance, each with all its rounds; 0 for none.

    It uses privacy loss distributions, on a grid so fine that rounding adds at most `ROUNDED` of epsilon, or on a
    coarser one where that would take minutes; beyond, and for mechanisms of `BY_RDP`, the larger bound by RDP.
    """
    _check_delta(delta)
    return _cost(pieces_of(plans, 2.0 if relation == "replace_one" else 1.0), delta, relation)


Pieces = tuple[tuple[float, float, int], ...]  # (sampling rate, sigma, steps) of each kind of step


def pieces_of(plans: Iterable[DPPlan], apart: float = 1.0) -> tuple[Pieces, Pieces]:
    """The steps of plans whose privacy loss distributions are known, and those of mechanisms of `BY_RDP`.

    Args:
        plans: Any plans.
        apart: How far the accountant takes neighbours to be, in C. Where two units are less than that apart
            (`APART`), the same step is one of as much more noise.
    """
    steps: tuple[dict[tuple[float, float], int], dict[tuple[float, float], int]] = ({}, {})
    for each in plans:
        scale = 1.0 if apart == 1.0 else apart / APART[each.mechanism]
        kind = (each.sampling_rate, each.noise_multiplier * scale)
        of = steps[each.mechanism in BY_RDP]
        of[kind] = of.get(kind, 0) + each.total_steps
    exact, rough = (tuple(sorted((*kind, count) for kind, count in of.items())) for of in steps)
    return exact, rough


def _cost(pieces: tuple[Pieces, Pieces], delta: float, relation: Relation) -> float:
    """Epsilon of pieces of both kinds, as `pieces_of` gives them."""
    exact, rough = pieces
    if not rough:
        return _composed(exact, delta, relation)
    # As in `_composed`: no mechanism of `BY_RDP` samples.
    halved = [(q, sigma / (2 if relation == "replace_one" else 1), count) for q, sigma, count in rough]
    if not exact:
        return bound(halved, delta)
    apart = _composed(exact, delta / 2, relation) + bound(halved, delta / 2)
    return min(apart, bound([*exact, *rough], delta)) if relation == "zero_out" else apart


def replaced_epsilon(plan: DPPlan) -> float:
    """Epsilon at the plan's delta if a unit is replaced by any other one."""
    return epsilon(plan, plan.delta, relation="replace_one")


def group_epsilon(plans: DPPlan | Sequence[DPPlan], size: int, delta: float) -> float:
    """Epsilon at `delta` for `size` rows of one person, if the plans' unit is the row: an upper bound.

    Each of the rows is drawn on its own, so a step holds Binomial(size, q) of them and the sum moves by at
    most that many C. The result is a mixture of Gaussians (Choquette-Choo et al., arXiv 2310.15526, corollary 4.7: the
    norms of the shifts give the dominating pair), composed over the steps. Scaling epsilon by `size`, or drawing
    the rows together, would be far larger (34 and 57 in place of 18.5 for two rows at epsilon 8, q 0.125).
    Zero-out adjacency: all rows of the person become empty.
    """
    _check_delta(delta)
    whole = [plans] if isinstance(plans, DPPlan) else list(plans)
    if size < 1:
        raise ValueError(f"size must be >= 1 (rows of one person), got {size}")
    if size == 1:
        return composed_epsilon(whole, delta)
    sizes = {min(size, plan.records) for plan in whole if plan.mechanism not in BY_RDP}
    exact, rough = pieces_of(whole)
    if not rough:
        return _group(max(sizes), exact, delta)
    # All units take part in a sum, and together they move it by `size`.
    moved = [(1.0, sigma / size, count) for _, sigma, count in rough]
    if not exact:
        return bound(moved, delta)
    return _group(max(sizes), exact, delta / 2) + bound(moved, delta / 2)


def _steps_event(sampling_rate: float, sigma: float, steps: int) -> dp_event.DpEvent:
    from dp_accounting import dp_event

    step = dp_event.PoissonSampledDpEvent(sampling_rate, dp_event.GaussianDpEvent(sigma))
    return dp_event.SelfComposedDpEvent(step, steps)


@functools.cache
def _composed(pieces: Pieces, delta: float, relation: Relation) -> float:
    """Epsilon of pieces (sampling rate, sigma, steps)."""
    if not pieces:
        return 0.0
    if relation == "replace_one" and all(rate == 1.0 for rate, *_ in pieces):
        # Without sampling a unit that is replaced by another is an empty one under half the noise.
        return _composed(tuple((rate, sigma / 2, count) for rate, sigma, count in pieces), delta, "zero_out")
    roughly, grid = bound(pieces, delta), grid_of(pieces, delta)
    if grid is None:
        return roughly if relation == "zero_out" else math.inf
    found = event_epsilon(event_of(pieces), delta, relation=relation, grid=grid)
    return min(found, roughly) if relation == "zero_out" else found


def grid_of(pieces: Pieces, delta: float) -> float | None:
    """The grid of the pieces' privacy losses for an epsilon at `delta`; None if only RDP is quick enough."""
    roughly, steps = bound(pieces, delta), sum(count for *_, count in pieces)
    close = math.sqrt(ROUNDED * roughly / growth(max(roughly, FINE), steps, delta))
    affordable = max(roughly / _LOSSES, *(_largest_loss(sigma) / _STEP_LOSSES for _, sigma, _ in pieces))
    grid = max(min(max(close, FINE), ROUGH), affordable)
    many = len(pieces) > _MOST_KINDS or steps > 10 * MAX_STEPS
    return None if many or grid > _USELESS else grid


def event_of(pieces: Pieces) -> dp_event.DpEvent:
    """The pieces as one event of dp-accounting."""
    from dp_accounting import dp_event

    return dp_event.ComposedDpEvent([_steps_event(*p) for p in pieces])


def growth(epsilon: float, steps: int, delta: float) -> float:
    """A bound on how epsilon grows with the square of the grid's step, by which each step's losses are rounded.

    The sum of all losses is nearly normal. With variance v, epsilon is v / 2 + z sqrt(v) for the z of delta. Rounding
    adds up to a quarter of the square to v for each step; the bound is twice what follows from that.
    """
    z = math.sqrt(2 * math.log(1 / delta))
    deviation = math.sqrt(z**2 + 2 * epsilon) - z
    return steps / 4 * (1 + z / deviation)


def _largest_loss(sigma: float) -> float:
    """The largest loss of one step, except for outcomes that are eight deviations off."""
    return (0.5 + 8 * sigma) / sigma**2


@functools.cache
def _group(size: int, pieces: Pieces, delta: float) -> float:
    grid = group_grid_of(size, pieces, delta)
    return math.inf if grid is None else event_epsilon(group_event_of(size, pieces), delta, grid=grid)


def group_event_of(size: int, pieces: Pieces) -> dp_event.DpEvent:
    """The pieces as one event of dp-accounting, for `size` rows of one person (`group_epsilon`)."""
    from dp_accounting import dp_event
    from scipy.stats import binom

    drawn = range(size + 1)
    parts = list[dp_event.DpEvent]()
    for sampling_rate, sigma, steps in pieces:
        chances = [float(binom.pmf(k, size, sampling_rate)) for k in drawn]
        step = dp_event.MixtureOfGaussiansDpEvent(sigma, [float(k) for k in drawn], chances)
        parts.append(dp_event.SelfComposedDpEvent(step, steps))
    return dp_event.ComposedDpEvent(parts) if len(parts) > 1 else parts[0]


def group_grid_of(size: int, pieces: Pieces, delta: float) -> float | None:
    """The grid of the privacy losses of `size` rows; None if it would be too coarse to be of use."""
    # The error grows with steps * grid^2, and epsilon with the rows: at most half a percent, upwards, for 10 rows and
    # 1,563 steps (measured against a grid that does not grow with the rows, in 0.25 of its time).
    steps = sum(count for *_, count in pieces)
    grid = max(ROUGH * size / 2 * min(1.0, math.sqrt(60 / steps)), size * bound(pieces, delta) / _LOSSES)
    return None if grid > _USELESS else grid


@dataclass(frozen=True)
class _Sought:
    """What the noise of a plan must keep to: an epsilon, beside other pieces of both kinds."""

    epsilon: float
    delta: float
    sampling_rate: float
    steps: int
    exact: Pieces
    rough: Pieces

    def cost(self, sigma: float) -> float:
        """Epsilon, by privacy loss distributions where they are known."""
        pieces = (*self.exact, (self.sampling_rate, sigma, self.steps))
        return _cost((pieces, self.rough), self.delta, "zero_out")

    def fits_by_rdp(self, sigma: float) -> bool:
        """True by RDP alone."""
        return bound([*self.exact, *self.rough, (self.sampling_rate, sigma, self.steps)], self.delta) <= self.epsilon


@functools.cache
def _smallest_sigma(sought: _Sought, most_thousandths: int) -> float | None:
    """Smallest sigma in thousandths that fits; None if it lies above the most allowed."""

    def over(thousandths: int) -> float:  # nearly a line in the logarithm of sigma; fits where it is not above 0
        return math.log(min(max(sought.cost(thousandths / 1000), 1e-300), 1e300) / sought.epsilon)

    least = min(round(SMALLEST_SIGMA * 1000), most_thousandths)
    high = _enough(sought, least, most_thousandths)
    at_high = over(high)
    if at_high > 0:
        return None
    # Walk down, in small steps at first: RDP asks for a little too much noise, and PLD is slow where there is little.
    low, at_low, stride = high, at_high, 0.95
    while at_low <= 0:
        high, at_high = low, at_low
        if high == least:
            return least / 1000
        low, stride = max(int(low * stride), least), max(stride**2, 0.5)
        at_low = over(low)
    # Then go to where the line between both ends meets 0; every other time halve, which is never slow.
    halve = False
    while high - low > 1:
        slope = math.log(high / low) / (at_low - at_high)
        met = (low + high) // 2 if halve else round(low * math.exp(slope * at_low))
        met, halve = min(max(met, low + 1), high - 1), not halve
        at = over(met)
        if at > 0:
            low, at_low = met, at
        else:
            high, at_high = met, at
    return high / 1000


@functools.cache
def _smallest_by_rdp(sought: _Sought, most_thousandths: int) -> float | None:
    """The same as `_smallest_sigma`, by RDP alone."""
    least = min(round(SMALLEST_SIGMA * 1000), most_thousandths)
    found = _enough(sought, least, most_thousandths) / 1000
    return found if sought.fits_by_rdp(found) else None


def _enough(sought: _Sought, least: int, most: int) -> int:
    """Thousandths from which on RDP, and hence PLD, fits; the most if RDP never does."""
    low, high = least - 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if sought.fits_by_rdp(middle / 1000) else (middle, high)
    return high


def _noise_beyond(sought: _Sought, most: float) -> str:
    """The noise that it would take, by RDP, for the message of a refusal."""
    sigma = most
    while sigma < 1024 * most:
        sigma *= 1.02
        if sought.fits_by_rdp(sigma):
            return f"about {sigma:.3g}"
    return f"above {sigma:.3g}"


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie inside (0, 1), got {delta}")


def check_names(cls: type[Any], values: Mapping[str, Any]) -> None:
    """Checks that values are of exactly the fields of a dataclass.

    Raises:
        ValueError: If not.
    """
    names = {f.name for f in fields(cls)}
    if set(values) != names:
        wrong = sorted(names.symmetric_difference(values))
        raise ValueError(f"{cls.__name__} needs exactly {sorted(names)}; missing or unknown: {wrong}")
