"""A Rényi filter: it keeps a budget even if each plan is chosen after seeing the earlier releases.

Privacy loss distributions are exact for plans that are fixed in advance. If a server chooses plans after seeing earlier
releases, their composition by such distributions can exceed the promised delta. Rényi differential privacy of one
order, fixed beforehand, adds up for any choice (Feldman and Zrnic 2021, Individual Privacy Accounting via a Rényi
Filter).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fedsynth.privacy.plan import Budget, DPPlan, composed_epsilon
from fedsynth.privacy.rdp import ORDERS, above_epsilon, of_step

_TYPICAL = (1 / 4, 1.416)  # sampling rate and noise of the training that the order is chosen for: 60 steps at epsilon 8


def order_for(budget: Budget | None) -> int:
    """The order at which a budget admits the most steps of a typical training; for no budget, that of epsilon 10.

    The order depends on the budget alone: an order that is chosen after seeing results would void the filter.
    Several orders, each with its share of delta, would be valid too, and admit fewer steps on the whole.
    """
    asked = budget or Budget(10.0)
    return max(ORDERS, key=lambda order: room(asked, order) / of_step(*_TYPICAL, order))


def room(budget: Budget, order: int) -> float:
    """RDP of an order up to which the budget holds; not positive if the order is too low for so small a budget.

    A pair of distributions with that divergence is within (epsilon, delta).
    """
    return budget.epsilon + above_epsilon(order, budget.delta)


def used(plans: Iterable[DPPlan], order: int) -> float:
    """RDP of an order of all steps of the plans, under zero-out adjacency."""
    return math.fsum(of_step(plan.sampling_rate, plan.noise_multiplier, order) * plan.total_steps for plan in plans)


def epsilon_at(spent: float, order: int, delta: float) -> float:
    """The least epsilon whose `room` holds so much RDP: far above that of fixed plans if little is spent."""
    return max(0.0, spent - above_epsilon(order, delta)) if spent > 0 else 0.0


def admits(budget: Budget, order: int, before: Sequence[DPPlan], asked: Sequence[DPPlan]) -> bool:
    """True if the budget holds with more plans, even if these were chosen after seeing earlier releases.

    The first plans are chosen before any release, so that their privacy loss distributions alone may admit them. If
    they fill more than the filter's room, the filter admits no further plan.

    Args:
        budget: The budget of all plans together.
        order: The filter's order, fixed before the first plan.
        before: The reserved plans, each with all its rounds, drawn or not.
        asked: The new plans, chosen together.
    """
    if used([*before, *asked], order) <= room(budget, order):
        return True
    return not before and composed_epsilon(asked, budget.delta) <= budget.epsilon
