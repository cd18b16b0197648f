"""A Rényi filter: whether one more plan keeps a budget when each plan is chosen after seeing what came before it.

Privacy loss distributions are exact for plans that were fixed in advance. Composed so, plans that a server chooses
after seeing earlier releases can pass the delta that was promised. Rényi differential privacy of one order, fixed
beforehand, adds up whatever is chosen when (Feldman and Zrnic 2021, Individual Privacy Accounting via a Rényi Filter).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fedsynth.privacy.plan import Budget, DPPlan, composed_epsilon
from fedsynth.privacy.rdp import ORDERS, above_epsilon, of_step

_TYPICAL = (1 / 4, 1.416)  # sampling rate and noise of what the order is chosen for: 60 steps at epsilon 8


def order_for(budget: Budget | None) -> int:
    """The order at which a budget admits the most steps of a typical training; for no budget, that of epsilon 10.

    It depends on the budget alone: with an order that is chosen after seeing results the filter would hold nothing.
    Several orders, each with its share of delta, would hold too, and admit fewer steps on the whole.
    """
    asked = budget or Budget(10.0)
    return max(ORDERS, key=lambda order: room(asked, order) / of_step(*_TYPICAL, order))


def room(budget: Budget, order: int) -> float:
    """RDP of an order up to which the budget holds; not positive where the order is too low for so small a budget.

    A pair of distributions with that divergence is within (epsilon, delta).
    """
    return budget.epsilon + above_epsilon(order, budget.delta)


def used(plans: Iterable[DPPlan], order: int) -> float:
    """RDP of an order of all steps of the plans, under zero-out adjacency."""
    return math.fsum(of_step(plan.sampling_rate, plan.noise_multiplier, order) * plan.total_steps for plan in plans)


def epsilon_at(spent: float, order: int, delta: float) -> float:
    """The least epsilon whose `room` holds so much RDP: far above that of fixed plans where little is spent."""
    return max(0.0, spent - above_epsilon(order, delta)) if spent > 0 else 0.0


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
