"""The plain meaning of a plan: how often an attacker can recognise one unit, by the plan's own trade-off curve."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from fedsynth.privacy.plan import (
    DPPlan,
    Pieces,
    Relation,
    composed_epsilon,
    event_of,
    grid_of,
    group_epsilon,
    group_event_of,
    group_grid_of,
    pieces_of,
)
from fedsynth.privacy.rdp import ORDERS, of_step

if TYPE_CHECKING:
    from dp_accounting import dp_event

FALSE_POSITIVES = 0.01  # the share of absent units that an attacker takes for present ones
_PLACES = 33  # at which the curve is looked at, twice: all of it, then around the best place
_FAR = 1e-9  # delta of the largest epsilon looked at


def highest_rate(
    plans: Sequence[DPPlan],
    *,
    relation: Relation = "zero_out",
    rows: int = 1,
    false_positives: float = FALSE_POSITIVES,
) -> float:
    """The highest true-positive rate of any attack on one unit that raises so many false alarms; 0..1, an upper bound.

    The attacker sees all that the plans release, and knows all other units. It guesses if the unit is there, or an
    empty one in its place (zero-out); or which of two units is there (replace-one). For every epsilon the plans are
    (epsilon, delta(epsilon))-DP, hence a rate is at most exp(epsilon) a + delta and, by the complement, at most
    1 - exp(-epsilon) (1 - a - delta), for false positives a (Dong, Roth and Su, Gaussian Differential Privacy,
    proposition 2.5). The result is the least of these over the curve delta(epsilon) of the privacy loss distribution,
    or of RDP where the plan's epsilon stems from that. (epsilon, delta) alone would give far more.

    Args:
        plans: Plans on the same data, fixed in advance, each with all its rounds; 0 of them reveal nothing.
        relation: The neighbours.
        rows: Rows of one person that are there or not, all of them, where the plans' unit is the row; zero-out alone.
        false_positives: The share of absent units that are taken for present ones, inside (0, 1).
    """
    if not plans:
        return false_positives
    exact, rough = pieces_of(plans, 2.0 if relation == "replace_one" else 1.0)
    deltas = _curve(exact, rough, relation) if rows == 1 else _group_curve(exact, rough, rows)
    if deltas is None:  # a mixture whose curve is not known
        delta = max(plan.delta for plan in plans)
        whole = composed_epsilon(plans, delta, relation=relation) if rows == 1 else group_epsilon(plans, rows, delta)
        return rate_of(whole, delta, false_positives)
    curve, last = deltas
    low, high = 0.0, last
    best = 1.0
    for _ in range(2):  # the bounds have one least value each, and the second look is around it
        places = [low + (high - low) * place / (_PLACES - 1) for place in range(_PLACES)]
        rates = [rate_of(epsilon, curve(epsilon), false_positives) for epsilon in places]
        least = min(range(_PLACES), key=rates.__getitem__)
        best = min(best, rates[least])
        low, high = places[max(least - 1, 0)], places[min(least + 1, _PLACES - 1)]
    return best


def rate_of(epsilon: float, delta: float, false_positives: float = FALSE_POSITIVES) -> float:
    """The highest true-positive rate that (epsilon, delta)-DP alone allows."""
    if math.isinf(epsilon):
        return 1.0
    over = math.exp(min(epsilon, 700.0)) * false_positives + delta
    under = 1 - math.exp(-epsilon) * (1 - false_positives - delta)
    return max(false_positives, min(1.0, over, under))


Curve: TypeAlias = Callable[[float], float]


@functools.lru_cache(maxsize=64)
def _curve(exact: Pieces, rough: Pieces, relation: Relation) -> tuple[Curve, float] | None:
    """Delta by epsilon, and the largest epsilon of use; None if no curve of the mixture is known."""
    # As in `plan.composed_epsilon`: without sampling, a replaced unit sees half the noise.
    halved = 2.0 if relation == "replace_one" else 1.0
    if rough and (not exact or relation == "zero_out"):
        return _by_rdp((*exact, *((q, sigma / halved, count) for q, sigma, count in rough)))
    if rough:
        return None
    if relation == "replace_one" and all(rate == 1.0 for rate, *_ in exact):
        exact, relation = tuple((rate, sigma / 2, count) for rate, sigma, count in exact), "zero_out"
    grid = grid_of(exact, FALSE_POSITIVES)
    if grid is None:
        return _by_rdp(exact) if relation == "zero_out" else None
    return _by_pld(event_of(exact), relation, grid)


@functools.lru_cache(maxsize=64)
def _group_curve(exact: Pieces, rough: Pieces, rows: int) -> tuple[Curve, float] | None:
    """The same for several rows of one person."""
    if rough:
        return None if exact else _by_rdp(tuple((1.0, sigma / rows, count) for _, sigma, count in rough))
    grid = group_grid_of(rows, exact, FALSE_POSITIVES)
    return None if grid is None else _by_pld(group_event_of(rows, exact), "zero_out", grid)


def _by_pld(event: dp_event.DpEvent, relation: Relation, grid: float) -> tuple[Curve, float]:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    neighbours = {"zero_out": NeighboringRelation.REPLACE_SPECIAL, "replace_one": NeighboringRelation.REPLACE_ONE}
    accountant = PLDAccountant(neighbours[relation], grid).compose(event)
    return lambda epsilon: float(accountant.get_delta(epsilon)), float(accountant.get_epsilon(_FAR))


def _by_rdp(pieces: Pieces) -> tuple[Curve, float]:
    """The inverse of `rdp.bound`: the least delta over orders."""
    whole = {order: math.fsum(of_step(q, sigma, order) * count for q, sigma, count in pieces) for order in ORDERS}

    def curve(epsilon: float) -> float:
        logs = (
            (order - 1) * (spent - epsilon + math.log1p(-1 / order)) - math.log(order) for order, spent in whole.items()
        )
        return min(1.0, math.exp(min(0.0, *logs)))

    last = min(spent - math.log(_FAR * order) / (order - 1) for order, spent in whole.items())
    return curve, max(last, 0.0)
