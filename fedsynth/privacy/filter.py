"""A Rényi filter: whether one more plan keeps a budget when each plan is chosen after seeing what came before it.

Privacy loss distributions are exact for plans that were fixed in advance. Composed so, plans that a server chooses after
seeing earlier releases can pass the delta that was promised. Rényi differential privacy of one order, fixed beforehand,
adds up whatever is chosen when (Feldman and Zrnic 2021, "Individual Privacy Accounting via a Rényi Filter", theorem 3.1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.rdp import RdpAccountant

from fedsynth.privacy.plan import Budget, DPPlan, composed_epsilon

# Whole orders alone: their RDP is a finite sum, while the series of others does not always end.
ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256, 512)
_TYPICAL = (1 / 8, 1.5)  # sampling rate and noise of a training that the order is chosen for
_ROUNDING = 1e-13  # per step: more than what is lost to rounding, so that nothing is free


def order_for(budget: Budget | None) -> int:
    """The order at which a budget admits the most steps of a typical training; for no budget, that of epsilon 10.

    It depends on the budget alone: an order that is chosen after seeing results would make the filter's sum meaningless.
    Several orders, each with its share of delta, admit less than this one (docs/privacy.md has the figures).
    """
    asked = budget or Budget(10.0)
    return max(ORDERS, key=lambda order: room(asked, order) / _step(*_TYPICAL, order))


def room(budget: Budget, order: int) -> float:
    """RDP of an order up to which the budget holds; not positive where the order is too low for so small a budget.

    A pair of distributions with that divergence is within (epsilon, delta) by Canonne, Kamath and Steinke 2020,
    proposition 12, which holds for each order by itself.
    """
    return budget.epsilon + _conversion(order, budget.delta)


def used(plans: Iterable[DPPlan], order: int) -> float:
    """RDP of an order of all steps of the plans, under zero-out adjacency."""
    return math.fsum(_step(plan.sampling_rate, plan.noise_multiplier, order) * plan.total_steps for plan in plans)


def epsilon_at(spent: float, order: int, delta: float) -> float:
    """The least epsilon whose `room` holds so much RDP: far above that of fixed plans where little is spent."""
    return max(0.0, spent - _conversion(order, delta)) if spent > 0 else 0.0


def admits(budget: Budget, order: int, before: Sequence[DPPlan], asked: DPPlan) -> bool:
    """Whether the budget holds with one more plan, although it may have been chosen after seeing what came before.

    The first plan of all is chosen without seeing anything, so that its privacy loss distribution alone may admit it.
    If it then fills more than the filter's room, nothing is admitted behind it: what is left is that one plan.

    Args:
        budget: What all together may spend.
        order: Fixed before the first of them.
        before: What was reserved, each with all its rounds, drawn or not.
        asked: What is asked for.
    """
    if used([*before, asked], order) <= room(budget, order):
        return True
    return not before and composed_epsilon([asked], budget.delta) <= budget.epsilon


def _conversion(order: int, delta: float) -> float:
    """What the RDP of an order may be above epsilon; negative."""
    return math.log(delta * order) / (order - 1) - math.log1p(-1 / order)


@functools.cache
def _step(sampling_rate: float, sigma: float, order: int) -> float:
    step = dp_event.PoissonSampledDpEvent(sampling_rate, dp_event.GaussianDpEvent(sigma))
    accountant = RdpAccountant([order], NeighboringRelation.REPLACE_SPECIAL).compose(step)
    return max(0.0, float(accountant.rdp[0])) + _ROUNDING
