"""The plan of a training under DP-SGD, and the epsilon that it costs."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import dp_accounting
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from scipy.stats import binom

from fedsynth.limits import MAX_SIGMA, MAX_STEPS, MIN_DELTA
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.rdp import bound

Relation = Literal["zero_out", "replace_one"]

_RELATIONS = {
    "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}

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
FINE = 1e-4  # grid of privacy losses for every reported figure; PLD rounds up, so each is an upper bound
COARSE = 1e-3  # grid while searching: ten times as fast, at most some thousandths too high
ROUGH = 1e-2  # while searching for budgets above 20, and for group_epsilon's mixtures, a hundred times slower
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
        _check_names(cls, {"mechanism": "gradients", **values})
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
) -> DPPlan:
    """The plan with the least noise that keeps all rounds within the budget.

    The noise multiplier is the smallest multiple of 0.001 whose PLD epsilon on the fine grid is at most the
    budget's (for budgets above 20 possibly the next one), but never below `SMALLEST_SIGMA`. The search takes
    seconds for any input.

    Args:
        budget: The budget of all rounds together.
        records: Declared number of units.
        expected_batch: Expected number of units per step.
        steps: Steps of one round.
        rounds: Rounds with access to the private data.
        clip_norm: L2 norm C; it does not change epsilon, as the noise is in its units.
        max_noise_multiplier: The most noise; beyond it training learns nothing, and the plan is refused.
        mechanism: What gets the noise.

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
    sigma = search(
        budget.epsilon, budget.delta, draft.sampling_rate, draft.total_steps, math.floor(max_noise_multiplier * 1000)
    )
    if sigma is None:
        needed = _noise_beyond(
            budget.epsilon, budget.delta, draft.sampling_rate, draft.total_steps, max_noise_multiplier
        )
        raise BudgetTooSmall(
            f"epsilon {budget.epsilon:g} at delta {budget.delta:g} over {draft.total_steps} steps at sampling rate "
            f"{draft.sampling_rate:g} needs noise_multiplier {needed}, more than max_noise_multiplier "
            f"{max_noise_multiplier:g}; give more budget, fewer steps or a smaller batch"
        )
    return replace(draft, noise_multiplier=sigma)


def epsilon(
    event_or_plan: dp_event.DpEvent | DPPlan, delta: float, *, relation: Relation = "zero_out", grid: float = FINE
) -> float:
    """Epsilon at `delta` by privacy loss distributions: an upper bound, `inf` if there is none.

    Args:
        event_or_plan: A plan, which stands for all its rounds, or an event.
        delta: The delta, inside (0, 1).
        relation: zero_out: one unit replaced by an empty one, n fixed. replace_one: by any other unit.
        grid: Step at which privacy losses are rounded up.
    """
    _check_delta(delta)
    if isinstance(event_or_plan, DPPlan):
        return composed_epsilon([event_or_plan], delta, relation=relation, grid=grid)
    accountant = PLDAccountant(_RELATIONS[relation], grid)
    return float(accountant.compose(event_or_plan).get_epsilon(delta))


def composed_epsilon(
    plans: Iterable[DPPlan], delta: float, *, relation: Relation = "zero_out", grid: float = FINE
) -> float:
    """Epsilon at `delta` of several plans on the same data, fixed in advance, each with all its rounds; 0 for none.

    It uses privacy loss distributions, on a coarser grid where they would take minutes; beyond, and for mechanisms
    of `BY_RDP`, the larger bound by RDP.
    """
    _check_delta(delta)
    whole = list(plans)
    exact, rough = ([p for p in whole if (p.mechanism in BY_RDP) == by_rdp] for by_rdp in (False, True))
    if not rough:
        return _composed(_pieces(exact), delta, relation, grid)
    # Without sampling a replaced unit is an empty one under half the noise.
    scale = 2 if relation == "replace_one" else 1
    halved = [(q, sigma / scale, count) for q, sigma, count in _pieces(rough)]
    if not exact:
        return bound(halved, delta)
    apart = _composed(_pieces(exact), delta / 2, relation, grid) + bound(halved, delta / 2)
    return min(apart, bound(_pieces(whole), delta)) if relation == "zero_out" else apart


def _pieces(plans: Iterable[DPPlan]) -> tuple[tuple[float, float, int], ...]:
    """(Sampling rate, sigma, steps) of each kind of step."""
    steps: dict[tuple[float, float], int] = {}
    for each in plans:
        kind = (each.sampling_rate, each.noise_multiplier)
        steps[kind] = steps.get(kind, 0) + each.total_steps
    return tuple(sorted((*kind, count) for kind, count in steps.items()))


def group_epsilon(plan: DPPlan, size: int, delta: float) -> float:
    """Epsilon at `delta` for `size` rows of one person, if the plan's unit is the row: an upper bound.

    Each of the rows is drawn on its own, so a step holds Binomial(size, q) of them and the sum moves by at
    most that many C. The result is a mixture of Gaussians (Choquette-Choo et al., arXiv 2310.15526, corollary 4.7: the
    norms of the shifts give the dominating pair), composed over the steps. Scaling epsilon by `size`, or drawing
    the rows together, would be far larger (34 and 57 in place of 18.5 for two rows at epsilon 8, q 0.125).
    Zero-out adjacency: all rows of the person become empty.
    """
    _check_delta(delta)
    if size < 1:
        raise ValueError(f"size must be >= 1 (rows of one person), got {size}")
    if size == 1:
        return epsilon(plan, delta)
    if plan.mechanism in BY_RDP:  # all units take part, and together they move the sum by `size`
        return bound([(1.0, plan.noise_multiplier / size, plan.total_steps)], delta)
    return _group(min(size, plan.records), plan.sampling_rate, plan.noise_multiplier, plan.total_steps, delta)


@dataclass(frozen=True)
class Statement:
    """A report's statement of a run's privacy, with the figures that belong to epsilon.

    Attributes:
        guarantee: "none" if anything left without a mechanism; epsilon is None then.
        epsilon: Epsilon of all rounds, zero-out adjacency.
        delta: The delta of every epsilon here.
        epsilon_replace_one: The same for a unit replaced by any other one.
        epsilon_rows: Epsilon for 2, 5 and 10 rows of one person, if the unit is a row. Empty for persons.
        unit: The privacy unit: "row", "patient", ...
        rows_per_unit: The most rows of a unit that count.
        sigma: Noise multiplier.
        sampling_rate: Probability of each unit in each step.
        steps: Steps of all rounds.
        clip_norm: L2 norm to which a unit's gradient is clipped.
        simulated: True if the noise comes from a run seed and is reproducible: a statement about a hypothetical site.
        mechanism: What gets the noise.
        cohort: The cohort of the secure sum that epsilon rests on; None if it holds for the client's messages alone.
        epsilon_alone: Epsilon of the client's own messages, if the server could read them without the sum.
    """

    guarantee: Literal["dp", "none"]
    epsilon: float | None
    delta: float
    epsilon_replace_one: float | None = None
    epsilon_rows: dict[int, float] = field(default_factory=dict)
    unit: str = "row"
    rows_per_unit: int = 1
    sigma: float | None = None
    sampling_rate: float | None = None
    steps: int | None = None
    clip_norm: float | None = None
    simulated: bool = False
    mechanism: Mechanism = "gradients"
    cohort: Cohort | None = None
    epsilon_alone: float | None = None

    def __post_init__(self) -> None:
        if (self.cohort is None) != (self.epsilon_alone is None):
            raise ValueError("a cohort and epsilon_alone belong together")
        if (self.guarantee == "dp") != (self.epsilon is not None and math.isfinite(self.epsilon)):
            raise ValueError(f"guarantee {self.guarantee!r} cannot stand beside epsilon {self.epsilon}")

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON: row counts become text, and an infinite figure the text "inf"."""
        values = asdict(self)
        values["epsilon_rows"] = {str(rows): _finite(figure) for rows, figure in self.epsilon_rows.items()}
        for name in ("epsilon_replace_one", "epsilon_alone"):
            values[name] = _finite(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statement:
        """The statement that `to_dict` wrote.

        Raises:
            ValueError: If names are missing or unknown.
        """
        _check_names(cls, values)
        replaced = values["epsilon_replace_one"]
        rows = {int(rows): float(figure) for rows, figure in values["epsilon_rows"].items()}
        replace_one = None if replaced is None else float(replaced)
        alone = None if values["epsilon_alone"] is None else float(values["epsilon_alone"])
        cohort = None if values["cohort"] is None else Cohort(**values["cohort"])
        return cls(
            **{**values, "epsilon_rows": rows, "epsilon_replace_one": replace_one}
            | {"cohort": cohort, "epsilon_alone": alone}
        )


ROWS_OF_A_PERSON = (2, 5, 10)  # docs/privacy.md


def statement(
    plan: DPPlan | None,
    *,
    delta: float = 1e-5,
    unit: str = "row",
    rows_per_unit: int = 1,
    rows: Iterable[int] = ROWS_OF_A_PERSON,
    simulated: bool = False,
    cohort: Cohort | None = None,
) -> Statement:
    """The statement of a plan that runs whole; without a plan, the statement that there is no guarantee.

    Args:
        plan: The plan; None for a run in which anything leaves without a mechanism.
        delta: The delta if there is no plan; a plan has its own.
        unit: "row" if rows are declared independent, else the name of the privacy unit.
        rows_per_unit: The most rows of a unit that count.
        rows: Numbers of rows of one person for which the statement has epsilon, too; ignored unless the unit is a row.
            The figures take seconds each and are cached.
        simulated: True if the noise is reproducible.
        cohort: The cohort of the secure sum that the plan's noise is counted in.
    """
    if plan is None:
        return Statement("none", None, delta, unit=unit, rows_per_unit=rows_per_unit, simulated=simulated)
    return Statement(
        guarantee="dp",
        epsilon=epsilon(plan, plan.delta),
        delta=plan.delta,
        epsilon_replace_one=replaced_epsilon(plan),
        epsilon_rows={size: group_epsilon(plan, size, plan.delta) for size in rows} if unit == "row" else {},
        unit=unit,
        rows_per_unit=rows_per_unit,
        sigma=plan.noise_multiplier,
        sampling_rate=plan.sampling_rate,
        steps=plan.total_steps,
        clip_norm=plan.clip_norm,
        simulated=simulated,
        mechanism=plan.mechanism,
        cohort=cohort,
        epsilon_alone=None if cohort is None else cohort.alone(plan.noise_multiplier, plan.total_steps, plan.delta),
    )


def replaced_epsilon(plan: DPPlan) -> float:
    """Epsilon at the plan's delta if a unit is replaced by any other one.

    Where every unit takes part in every step, a sum that moves by a multiple of C is the Gaussian mechanism with as
    much less noise: the same as an empty unit in place of another under that.
    """
    if plan.mechanism == "gradients":
        return epsilon(plan, plan.delta, relation="replace_one")
    return epsilon(replace(plan, noise_multiplier=plan.noise_multiplier / APART[plan.mechanism]), plan.delta)


def _steps_event(sampling_rate: float, sigma: float, steps: int) -> dp_event.DpEvent:
    step = dp_event.PoissonSampledDpEvent(sampling_rate, dp_event.GaussianDpEvent(sigma))
    return dp_event.SelfComposedDpEvent(step, steps)


@functools.cache
def _composed(pieces: tuple[tuple[float, float, int], ...], delta: float, relation: Relation, grid: float) -> float:
    """Epsilon of pieces (sampling rate, sigma, steps)."""
    if not pieces:
        return 0.0
    roughly = bound(pieces, delta)
    grid = max(grid, roughly / _LOSSES, *(_largest_loss(sigma) / _STEP_LOSSES for _, sigma, _ in pieces))
    many = len(pieces) > _MOST_KINDS or sum(count for *_, count in pieces) > 10 * MAX_STEPS
    if many or grid > _USELESS:
        return roughly if relation == "zero_out" else math.inf
    whole = dp_event.ComposedDpEvent([_steps_event(*p) for p in pieces])
    found = epsilon(whole, delta, relation=relation, grid=grid)
    return min(found, roughly) if relation == "zero_out" else found


def _largest_loss(sigma: float) -> float:
    """The largest loss of one step, except for outcomes that are eight deviations off."""
    return (0.5 + 8 * sigma) / sigma**2


@functools.cache
def _group(size: int, sampling_rate: float, sigma: float, steps: int, delta: float) -> float:
    drawn = range(size + 1)
    chances = [float(binom.pmf(k, size, sampling_rate)) for k in drawn]
    step = dp_event.MixtureOfGaussiansDpEvent(sigma, [float(k) for k in drawn], chances)
    # The error grows with steps * grid^2: 0.001 at 60 steps, below 0.01 at 1563 (measured against grids of 1e-3).
    single = bound([(sampling_rate, sigma, steps)], delta)
    grid = max(ROUGH * min(1.0, math.sqrt(60 / steps)), size * single / _LOSSES)
    if grid > _USELESS:
        return math.inf
    return epsilon(dp_event.SelfComposedDpEvent(step, steps), delta, grid=grid)


@functools.cache
def _smallest_sigma(
    target: float, delta: float, sampling_rate: float, steps: int, most_thousandths: int
) -> float | None:
    """Smallest sigma in thousandths that meets the target on the fine grid; None if it lies above the most allowed."""

    def fits(thousandths: int, grid: float) -> bool:
        return _composed(((sampling_rate, thousandths / 1000, steps),), delta, "zero_out", grid) <= target

    least = min(round(SMALLEST_SIGMA * 1000), most_thousandths)
    high = _enough(target, delta, sampling_rate, steps, least, most_thousandths)
    # The coarse grid's error is up to 0.01: too much for small targets, too careful for large ones, where PLD is slow.
    grid = FINE if target <= 0.2 else COARSE if target <= 20 else ROUGH
    while not fits(high, grid):
        if high == most_thousandths:
            if grid == FINE:
                return None
            grid = FINE  # the coarse bound may fail where the fine one holds
        else:
            high = min(2 * high, most_thousandths)
    # Walk down, in small steps at first: RDP asks for a little too much noise, and PLD is slow where there is little.
    low, stride = high, 0.9
    while low > least and fits(low, grid):
        high, low, stride = low, max(int(low * stride), least), max(stride**2, 0.5)
    if low == least and fits(least, grid):
        return least / 1000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle, grid) else (middle, high)
    # The coarse bound is above the fine one, so `high` holds on the fine grid, and slightly less noise may too.
    # Above a target of 20 the search is not worth seconds per figure; there sigma may be 0.001 above the smallest.
    step = 1
    while target <= 20 and high - step >= least and fits(high - step, FINE):
        high, step = high - step, step * 2
    while step > 1:
        step //= 2
        if high - step >= least and fits(high - step, FINE):
            high -= step
    assert fits(high, FINE)
    return high / 1000


@functools.cache
def _smallest_by_rdp(
    target: float, delta: float, sampling_rate: float, steps: int, most_thousandths: int
) -> float | None:
    """The same as `_smallest_sigma`, by RDP alone."""
    least = min(round(SMALLEST_SIGMA * 1000), most_thousandths)
    found = _enough(target, delta, sampling_rate, steps, least, most_thousandths) / 1000
    return found if bound([(sampling_rate, found, steps)], delta) <= target else None


def _enough(target: float, delta: float, sampling_rate: float, steps: int, least: int, most: int) -> int:
    """Thousandths from which on RDP, and hence PLD, meets the target; the most if RDP never does."""
    low, high = least - 1, most
    while high - low > 1:
        middle = (low + high) // 2
        met = bound([(sampling_rate, middle / 1000, steps)], delta) <= target
        low, high = (low, middle) if met else (middle, high)
    return high


def _noise_beyond(target: float, delta: float, sampling_rate: float, steps: int, most: float) -> str:
    """The noise that the target would take, by RDP, for the message of a refusal."""
    sigma = most
    while sigma < 1024 * most:
        sigma *= 1.02
        if bound([(sampling_rate, sigma, steps)], delta) <= target:
            return f"about {sigma:.3g}"
    return f"above {sigma:.3g}"


def _finite(figure: float | None) -> float | str | None:
    return "inf" if figure == math.inf else figure


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie inside (0, 1), got {delta}")


def _check_names(cls: type[Any], values: Mapping[str, Any]) -> None:
    names = {f.name for f in fields(cls)}
    if set(values) != names:
        wrong = sorted(names.symmetric_difference(values))
        raise ValueError(f"{cls.__name__} needs exactly {sorted(names)}; missing or unknown: {wrong}")
