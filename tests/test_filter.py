"""What guards a cap where a server chooses its next plan after seeing what the last one let out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from fedsynth.privacy.filter import admits, epsilon_at, order_for, room, used
from fedsynth.privacy.plan import Budget, DPPlan, composed_epsilon, epsilon
from fedsynth.privacy.rdp import ORDERS, bound, of_step

DELTA = 1e-5
Rule = Callable[[Budget, Sequence[DPPlan], DPPlan], bool]
Step = tuple[float, float]  # sampling rate, sigma
Losses = tuple[NDArray[np.float64], NDArray[np.float64]]
REST = np.linspace(-220, 80, 12001)  # what may be left of epsilon after the first plan


def step(q: float, sigma: float) -> DPPlan:
    """One step of Poisson-sampled Gaussian noise."""
    return DPPlan(1_000_000, round(q * 1_000_000), 1, 1, 1.0, sigma, DELTA)


@pytest.mark.parametrize("order", [2, 3, 8])
@pytest.mark.parametrize(("q", "sigma"), [(0.125, 0.928), (0.25, 2.0), (1.0, 1.5)])
def test_rdp_of_a_step_is_the_integral_it_stands_for_whichever_unit_is_empty(
    q: float, sigma: float, order: int
) -> None:
    x = np.linspace(-20 - 15 * sigma, 20 + order + 15 * sigma, 400_001)
    without = norm.logpdf(x, 0, sigma)
    with_unit = np.logaddexp(np.log1p(-q) + without if q < 1 else -np.inf, math.log(q) + norm.logpdf(x, 1, sigma))

    def divergence(p: NDArray[np.float64], r: NDArray[np.float64]) -> float:
        whole = np.exp(order * p + (1 - order) * r).sum() * (x[1] - x[0])
        return math.log(whole) / (order - 1)

    found = of_step(q, sigma, order)
    assert found == pytest.approx(divergence(with_unit, without), rel=1e-6)
    assert found >= divergence(without, with_unit) - 1e-9


@pytest.mark.parametrize("cap", [1.0, 10.0, 20.0])
def test_what_fills_the_room_is_within_epsilon_and_delta(cap: float) -> None:
    budget, order = Budget(cap, DELTA), order_for(Budget(cap, DELTA))
    sigma = math.sqrt(order / (2 * room(budget, order)))  # RDP of a Gaussian is order / (2 sigma^2)
    exact = norm.cdf(1 / (2 * sigma) - cap * sigma) - math.exp(cap) * norm.cdf(-1 / (2 * sigma) - cap * sigma)
    assert DELTA / 50 < exact <= DELTA
    assert epsilon_at(order / (2 * sigma**2), order, DELTA) == pytest.approx(cap)
    # Half as much again of the room would be too much: it is no loose bound.
    less = sigma / math.sqrt(1.5)
    assert norm.cdf(1 / (2 * less) - cap * less) - math.exp(cap) * norm.cdf(-1 / (2 * less) - cap * less) > DELTA


def test_the_order_follows_from_the_budget_alone() -> None:
    assert {cap: order_for(Budget(cap)) for cap in (0.5, 1, 2, 4, 8, 10, 20, 50)} == {
        0.5: 32, 1: 16, 2: 8, 4: 5, 8: 3, 10: 3, 20: 2, 50: 2}  # fmt: skip
    assert order_for(None) == order_for(Budget(10.0))


RUNS = {1: 3.861, 2: 2.219, 4: 1.377}  # noise of 60 steps with 50 of 400 records, by epsilon


@pytest.mark.parametrize(("cap", "cost", "fixed", "adaptive"), [(4, 1, 12, 10), (8, 2, 12, 9), (10, 4, 5, 4)])
def test_a_lifetime_is_enough_for_about_as_many_runs(cap: float, cost: int, fixed: int, adaptive: int) -> None:
    """How many runs fit if they are fixed in advance, and if they are not."""
    budget, run = Budget(cap), DPPlan(400, 50, 60, 1, 1.0, RUNS[cost], DELTA)
    as_fixed = [composed_epsilon([run] * count, DELTA) for count in (fixed, fixed + 1)]
    assert as_fixed[0] <= cap < as_fixed[1]
    assert the_filter(budget, [run] * (adaptive - 1), run)
    assert not the_filter(budget, [run] * adaptive, run)


def test_the_first_plan_passes_by_its_loss_distribution_alone_and_then_nothing_does() -> None:
    budget = Budget(8.0)
    order, run = order_for(budget), DPPlan(100, 100, 4, 1, 1.0, 1.205, DELTA)  # all in each batch: takes no time
    assert 7.9 < epsilon(run, DELTA) <= 8.0
    assert used([run], order) > room(budget, order)
    assert admits(budget, order, [], [run])
    assert not admits(budget, order, [], [replace(run, noise_multiplier=1.19)])
    tiny = step(1e-6, 50.0)
    assert not admits(budget, order, [run], [tiny])
    assert as_if_fixed(budget, [run], tiny)


# ---- Strategies in two stages: the second plan is chosen by the likelihood ratio of what the first let out. ----


def losses(q: float, sigma: float, *, remove: bool, points: int = 6001) -> Losses:
    """Privacy losses of one step, and how likely each is, in one of the two directions."""
    x = np.linspace(-9 * sigma - 0.5, 9 * sigma + 1.5, points)
    middle = (x[1:] + x[:-1]) / 2

    def mass(shift: float) -> Any:
        z = (x - shift) / sigma
        return np.where(middle < shift, np.diff(norm.cdf(z)), -np.diff(norm.sf(z)))

    ratio = np.logaddexp(math.log1p(-q) if q < 1 else -math.inf, math.log(q) + (2 * middle - 1) / (2 * sigma**2))
    return (ratio, (1 - q) * mass(0.0) + q * mass(1.0)) if remove else (-ratio, mass(0.0))


def delta_at(loss: NDArray[np.float64], mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """The exact delta of one step at each epsilon of `REST`."""
    order = np.argsort(loss)
    loss, mass = loss[order], mass[order]
    p = np.append(np.cumsum(mass[::-1])[::-1], 0)
    r = np.append(np.cumsum((mass * np.exp(-loss))[::-1])[::-1], 0)
    beyond = np.searchsorted(loss, REST, "right")
    return np.clip(p[beyond] - np.exp(REST) * r[beyond], 0, 1)


def adaptive_delta(first: Step, options: Sequence[Step], cap: float) -> float:
    """Delta at the cap's epsilon of the best strategy: after each outcome, the option that then gives the most."""
    worst = 0.0
    for remove in (True, False):
        nothing = np.clip(-np.expm1(REST), 0, 1)
        best = np.max([nothing, *(delta_at(*losses(*option, remove=remove)) for option in options)], axis=0)
        loss, mass = losses(*first, remove=remove)
        worst = max(worst, float(mass @ np.interp(cap - loss, REST, best)))
    return worst


def least_sigma(allowed: Callable[[Step], bool], q: float) -> float:
    low, high = 0.05, 100.0
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if allowed((q, middle)) else (middle, high)
    return high


def worst_delta(cap: float, rule: Rule) -> float:
    """The largest delta that a search over first plans finds, with second plans that just pass the rule."""
    return max(_worst(cap, rule, q, share) for q in (1.0, 0.2) for share in (0.25, 0.5, 0.75))


def _worst(cap: float, rule: Rule, q: float, share: float) -> float:
    """With a first plan of that sampling rate, which takes that share of the room."""
    budget = Budget(cap, DELTA)
    order = order_for(budget)
    sigma = least_sigma(lambda s: of_step(*s, order) <= share * room(budget, order), q)
    before = [step(q, sigma)]
    rates = (1.0, 0.2, 0.01, 1e-3, 1e-5)
    options = [(r, least_sigma(lambda s: rule(budget, before, step(*s)), r)) for r in rates]
    return adaptive_delta((q, sigma), options, cap)


def the_filter(budget: Budget, before: Sequence[DPPlan], asked: DPPlan) -> bool:
    return admits(budget, order_for(budget), before, [asked])


def as_if_fixed(budget: Budget, before: Sequence[DPPlan], asked: DPPlan) -> bool:
    """Broken: what the rule was before there was a filter."""
    return composed_epsilon([*before, asked], budget.delta) <= budget.epsilon


def forgetful(budget: Budget, before: Sequence[DPPlan], asked: DPPlan) -> bool:
    """Broken: what is asked is held against the whole room."""
    return used([asked], order_for(budget)) <= room(budget, order_for(budget))


def test_plans_composed_as_if_fixed_pass_delta_where_the_second_is_chosen_after_the_first() -> None:
    first, options = (1.0, 0.75), [(1.0, 0.6707), (0.1, 0.4532), (0.002, 0.2816)]
    budget = Budget(10.0, DELTA)
    for option in options:
        assert as_if_fixed(budget, [step(*first)], step(*option))
        assert adaptive_delta(first, [option], 10.0) <= DELTA  # fixed in advance, each is what it says
        assert not the_filter(budget, [step(*first)], step(*option))
    assert adaptive_delta(first, options, 10.0) == pytest.approx(1.84e-5, rel=0.01)


@pytest.mark.parametrize(("cap", "largest"), [(1.0, 2.6e-6), (10.0, 2.6e-6)])
def test_no_strategy_in_two_stages_passes_delta_under_the_filter(cap: float, largest: float) -> None:
    found = worst_delta(cap, the_filter)
    assert found <= largest < DELTA
    assert found > DELTA / 10  # the search comes near: it is no empty one


def test_the_search_finds_a_rule_that_forgets_what_was_spent() -> None:
    assert worst_delta(10.0, forgetful) > 10 * DELTA


def test_the_bound_by_rdp_is_above_that_of_loss_distributions() -> None:
    for q, sigma, steps in ((0.125, 0.928, 60), (0.25, 2.0, 300)):
        exact = epsilon(DPPlan(1000, round(1000 * q), steps, 1, 1.0, sigma, DELTA), DELTA)
        assert exact < bound([(q, sigma, steps)], DELTA) < 1.35 * exact
    assert all(of_step(1e-9, 1000.0, order) > 0 for order in ORDERS)  # nothing is free
