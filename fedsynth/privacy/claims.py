"""The check that a client's privacy statement can be true: ranges, and epsilon recomputed from the stated plan."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import lru_cache

from fedsynth.limits import (
    CLIP_NORMS,
    MAX_DELTA,
    MAX_EPSILON,
    MAX_RECORDS,
    MAX_ROWS,
    MAX_SIGMA,
    MAX_STEPS,
)
from fedsynth.privacy.plan import APART, BY_RDP, ROUGH, SMALLEST_SIGMA, Mechanism, Relation, event_epsilon, growth
from fedsynth.privacy.rdp import bound
from fedsynth.privacy.statement import Statement

UNITS = ("row", "person")  # at real sites; a simulation calls them by the name of a column
CLIENT = "client"  # the unit where a list of scores is protected as a whole
TOLERANCE = 1e-3  # relative to epsilon, and to 1 at least: above the difference of grids, below the printed digits
LARGEST = 10**40  # whole number that a message repeats
_POINTS = 1e5  # most points in the grid of one step's losses: a check takes seconds at worst, and some 100 MB
_MOST_GROUPS, _LARGEST_GROUP = 16, 1000  # of `epsilon_rows`


def check(
    said: Statement,
    *,
    units: Collection[str] = UNITS,
    simulated: bool | None = None,
    mechanisms: Collection[Mechanism] = tuple(APART),
) -> None:
    """Refuses a statement whose figures cannot be those of a plan. A message names junk and never repeats it.

    A client could still claim the figures of a plan that it did not run: no server can see that.

    Args:
        said: A client's statement.
        units: The privacy units that it may protect.
        simulated: True if its noise must be reproducible, false if it must not be; None allows either.
        mechanisms: What may get the noise; all but gradients need all units in every step.

    Raises:
        ValueError: If a figure is impossible; the message names it and its allowed values.
    """
    if said.unit not in units:
        raise ValueError(f"unit must be one of {', '.join(units)}")
    if simulated is not None and said.simulated is not simulated:
        raise ValueError(f"simulated must be {str(simulated).lower()} here")
    # Earlier versions named no mechanism, and of scores alone is the unit the client as a whole.
    mechanism = said.mechanism
    if said.unit == CLIENT and mechanism == "gradients":
        mechanism = "scores"
    if mechanism not in mechanisms:
        raise ValueError(f"mechanism must be {' or '.join(mechanisms)}")
    _within("delta", said.delta, math.ulp(0.0), MAX_DELTA)
    _within("rows_per_unit", said.rows_per_unit, 1, MAX_ROWS)
    if said.guarantee == "none":
        figures = (said.epsilon, said.epsilon_replace_one, said.sigma, said.sampling_rate, said.steps, said.clip_norm)
        if said.epsilon_rows or any(figure is not None for figure in figures):
            raise ValueError("guarantee is 'none', and figures of one stand beside it")
        return
    claimed = _within("epsilon", said.epsilon, 0.0, MAX_EPSILON)
    replaced = _within("epsilon_replace_one", said.epsilon_replace_one, 0.0, math.inf)
    sigma = _within("sigma", said.sigma, SMALLEST_SIGMA, MAX_SIGMA)
    rate = _within("sampling_rate", said.sampling_rate, 1 / MAX_RECORDS, 1.0)
    steps = int(_within("steps", said.steps, 1, MAX_STEPS))
    _within("clip_norm", said.clip_norm, math.ulp(0.0), 2 * CLIP_NORMS[1])  # twice: a list of scores
    _check_sum(said, mechanism, sigma, steps)
    _check_rows(said)
    _reaches("epsilon", claimed, rate, sigma, steps, said.delta, "zero_out")
    if mechanism in ("scores", "summed_scores"):  # another list is no further away than an empty one: `clients.score`
        _within("epsilon_replace_one", replaced, claimed, math.inf)
    elif mechanism == "gradients":
        _reaches("epsilon_replace_one", replaced, rate, sigma, steps, said.delta, "replace_one")
    else:
        _within("sampling_rate", rate, 1.0, 1.0)
        _reaches("epsilon_replace_one", replaced, rate, sigma / APART[mechanism], steps, said.delta, "zero_out")


def _check_sum(said: Statement, mechanism: Mechanism, sigma: float, steps: int) -> None:
    """Checks the figures of whole numbers under Skellam noise, of which RDP alone is known, and those of a cohort."""
    if said.cohort is not None and mechanism not in BY_RDP:
        raise ValueError("a secure sum stands in the statement of something that is in none")
    if mechanism not in BY_RDP:
        return
    figures = [("epsilon", said.epsilon, bound([(1.0, sigma, steps)], said.delta))]
    if said.cohort is not None:
        figures.append(("epsilon_alone", said.epsilon_alone, said.cohort.alone(sigma, steps, said.delta)))
    for name, claimed, true in figures:
        if claimed is None or not claimed >= true - TOLERANCE * max(1.0, true):
            raise ValueError(f"{name} is said to be {_shown(claimed)}; by RDP it is {true:.4g} or more")


def _check_rows(said: Statement) -> None:
    """Checks figures that clients leave out and reports recompute: those that are there have to make sense, no more."""
    if said.epsilon_rows and (said.unit != "row" or len(said.epsilon_rows) > _MOST_GROUPS):
        raise ValueError(f"epsilon_rows must be of rows, at most {_MOST_GROUPS} figures")
    least = said.epsilon
    for rows, figure in sorted(said.epsilon_rows.items()):
        _within("epsilon_rows", rows, 2, _LARGEST_GROUP)
        least = _within(f"epsilon_rows of {rows} rows", figure, least or 0.0, math.inf)


def _within(name: str, value: float | None, low: float, high: float) -> float:
    if value is None or not low <= value <= high:
        raise ValueError(f"{name} must lie in {low:g}..{high:g}, got {_shown(value)}")
    return value


def _shown(value: float | None) -> str:
    """A figure in a message. A site's whole number may be larger than any float."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) or abs(value) < LARGEST else "a larger number"


def _reaches(
    name: str, claimed: float, rate: float, sigma: float, steps: int, delta: float, relation: Relation
) -> None:
    if claimed == math.inf:
        return
    try:
        true = _above(claimed, rate, sigma, steps, delta, relation)
    except Exception as problem:  # the accountant fails on figures that no plan has
        raise ValueError(f"{name} of its plan cannot be computed ({type(problem).__name__})") from problem
    if true is not None:
        raise ValueError(
            f"{name} is said to be {claimed:.4g}; noise_multiplier {sigma:g} at sampling rate {rate:g} "
            f"costs {true:.4g} or more over {steps} steps at delta {delta:g}"
        )


@lru_cache(maxsize=4096)
def _above(claimed: float, rate: float, sigma: float, steps: int, delta: float, relation: Relation) -> float | None:
    """Epsilon of a plan, or of its first steps, if that lies above the claim; None if the claim can be true.

    It tries the first ten steps, the first hundred and so on. Epsilon only grows, so that a claim far below it is
    refused before the sum of losses would take hours and all memory.
    """
    from dp_accounting import dp_event

    done = 0
    while done < steps:
        done = min(steps, max(10, 10 * done))
        grid, slack = _grid(claimed, sigma, done, delta)
        step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
        found = event_epsilon(dp_event.SelfComposedDpEvent(step, done), delta, relation=relation, grid=grid)
        if relation == "zero_out":  # as a client's own figure: `plan.composed_epsilon`
            found = min(found, bound([(rate, sigma, done)], delta))
        if not found <= claimed + slack:
            return found
    return None


def _grid(claimed: float, sigma: float, steps: int, delta: float) -> tuple[float, float]:
    """Step of the grid of losses, and the most that rounding on it can add to a true claim."""
    grows = growth(max(claimed, TOLERANCE), steps, delta)
    wanted = TOLERANCE * max(1.0, claimed)
    range_ = 1 / sigma**2 + 20 / sigma  # range of one step's losses
    grid = max(min(ROUGH, math.sqrt(wanted / grows)), range_ / _POINTS, 10 * claimed / _POINTS)
    return grid, max(wanted, grows * grid**2)
