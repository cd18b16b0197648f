from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedsynth.privacy.plan import (
    MAX_STEPS,
    Budget,
    BudgetTooSmall,
    DPPlan,
    composed_epsilon,
    epsilon,
    event_epsilon,
    group_epsilon,
    plan,
)
from fedsynth.privacy.rdp import bound
from fedsynth.privacy.statement import Statement, statement
from fedsynth.scenario.toml import from_toml
from fedsynth.typed import BadValue

plan_module = importlib.import_module("fedsynth.privacy.plan")  # `privacy.plan` is the function
WORLD = DPPlan(400, 50, 60, 1, 1.0, 0.928, 1e-5)  # 400 notes per hospital


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Closed form of one Gaussian mechanism (Balle and Wang 2018, theorem 8)."""

    def excess(eps: float) -> float:
        upper = norm.cdf(1 / (2 * sigma) - eps * sigma)
        return float(upper - math.exp(eps) * norm.cdf(-1 / (2 * sigma) - eps * sigma)) - delta

    return float(brentq(excess, 0, 100))


@pytest.mark.parametrize("sigma", [0.8, 2.0, 5.0])
def test_epsilon_matches_the_closed_form_of_the_gaussian_mechanism(sigma: float) -> None:
    whole = DPPlan(100, 100, 1, 1, 1.0, sigma, 1e-5)
    exact = gaussian_epsilon(sigma, 1e-5)
    assert exact <= epsilon(whole, 1e-5) <= exact + 1e-3
    # A wrong scale fails: 10 % more noise than declared is seen.
    assert abs(epsilon(whole, 1e-5) - gaussian_epsilon(1.1 * sigma, 1e-5)) > 1e-2


def test_composed_steps_match_the_closed_form() -> None:
    assert epsilon(DPPlan(100, 100, 3, 3, 1.0, 6.0, 1e-5), 1e-5) == pytest.approx(gaussian_epsilon(2.0, 1e-5), abs=2e-3)


def test_replacing_a_record_is_the_closed_form_at_twice_the_sensitivity() -> None:
    whole = DPPlan(100, 100, 1, 1, 1.0, 3.0, 1e-5)
    assert epsilon(whole, 1e-5, relation="replace_one") == pytest.approx(gaussian_epsilon(1.5, 1e-5), abs=1e-3)


def test_figures_of_both_relations() -> None:
    assert epsilon(WORLD, 1e-5) == pytest.approx(7.986, abs=1e-3)
    assert epsilon(WORLD, 1e-5, relation="replace_one") == pytest.approx(11.285, abs=1e-3)


def test_rdp_is_an_upper_bound_and_not_far_above() -> None:
    rdp = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    bound = rdp.compose(WORLD.event).get_epsilon(1e-5)
    assert epsilon(WORLD, 1e-5) < bound < 1.3 * epsilon(WORLD, 1e-5)


@pytest.mark.parametrize(
    ("records", "batch", "steps", "sigma"),
    [(400, 50, 60, 0.928), (200, 50, 60, 1.416), (1000, 32, 313, 1.0), (5000, 32, 1563, 2.0), (50, 32, 16, 5.0)],
)
def test_another_accountant_agrees(records: int, batch: int, steps: int, sigma: float) -> None:
    other = PRVAccountant()  # Gopi et al. 2021, another algorithm and another program; adds its own error of 0.01
    other.history = [(sigma, batch / records, steps)]
    own = epsilon(DPPlan(records, batch, steps, 1, 1.0, sigma, 1e-5), 1e-5)
    assert own - 1e-3 <= other.get_epsilon(1e-5) <= own + 0.018


def test_a_thousandth_too_little_noise_is_refused() -> None:  # .927 and 1.415 look right to two places
    assert epsilon(replace(WORLD, noise_multiplier=0.927), 1e-5) == pytest.approx(8.003, abs=5e-4)
    assert epsilon(DPPlan(200, 50, 60, 1, 1.0, 1.415, 1e-5), 1e-5) == pytest.approx(8.002, abs=5e-4)
    assert plan(Budget(8.0), records=400, expected_batch=50, steps=60).noise_multiplier == 0.928
    assert plan(Budget(8.0), records=200, expected_batch=50, steps=60).noise_multiplier == 1.416


@pytest.mark.parametrize(
    ("records", "batch", "steps", "delta", "target", "sigma"),
    [  # computed elsewhere, rounded to the nearest thousandth there
        (2000, 64, 312, 1e-5, 1, 2.311),
        (2000, 64, 312, 1e-5, 3, 1.107),
        (2000, 64, 312, 1e-5, 8, 0.715),
        (5000, 256, 195, 1e-5, 1, 2.868),
        (5000, 256, 195, 1e-5, 3, 1.297),
        (5000, 256, 195, 1e-5, 8, 0.791),
        (1000, 50, 100, 1e-4, 1, 1.859),
        (1000, 50, 100, 1e-4, 3, 0.979),
        (1000, 50, 100, 1e-4, 8, 0.643),
    ],
)
def test_noise_is_the_least_that_meets_the_target(
    records: int, batch: int, steps: int, delta: float, target: float, sigma: float
) -> None:
    made = plan(Budget(target, delta), records=records, expected_batch=batch, steps=steps)
    assert made.noise_multiplier == pytest.approx(sigma, abs=1.1e-3)
    assert epsilon(made, delta) <= target
    less = replace(made, noise_multiplier=round(made.noise_multiplier - 0.001, 3))
    assert epsilon(less, delta) > target


@pytest.mark.parametrize("target", [0.1, 25.0])
def test_small_and_large_targets_are_met_closely(target: float) -> None:
    made = plan(Budget(target), records=100, expected_batch=100, steps=1, max_noise_multiplier=100)
    assert 0.97 * target < epsilon(made, 1e-5) <= target


def test_rounds_are_planned_together() -> None:
    three = plan(Budget(8.0), records=400, expected_batch=50, steps=20, rounds=3)
    assert three.noise_multiplier == 0.928
    assert epsilon(three, 1e-5) == epsilon(WORLD, 1e-5)
    assert event_epsilon(three.round_event, 1e-5, grid=1e-3) < event_epsilon(three.event, 1e-5, grid=1e-3)
    # A plan that forgot its rounds would give each the whole budget: it fails the target by far.
    forgetful = replace(three, rounds=1, noise_multiplier=0.78)
    assert epsilon(forgetful, 1e-5) < 8
    assert epsilon(replace(forgetful, rounds=3), 1e-5) > 10


def test_runs_compose_below_the_sum() -> None:  # 3 / 5 / 10 runs at 8 = 13.9 / 18.4 / 27.9
    run = replace(WORLD, noise_multiplier=0.927)
    for runs, total in ((3, 13.9), (5, 18.4), (10, 27.9)):
        assert composed_epsilon([run] * runs, 1e-5) == pytest.approx(total, abs=0.06)
    assert composed_epsilon([], 1e-5) == 0


def test_different_plans_compose() -> None:
    other = DPPlan(400, 100, 10, 1, 1.0, 3.0, 1e-5)
    both = composed_epsilon([WORLD, other], 1e-5)
    assert epsilon(WORLD, 1e-5) < both < epsilon(WORLD, 1e-5) + epsilon(other, 1e-5)
    assert both == composed_epsilon([other, WORLD], 1e-5)


def test_a_budget_beyond_the_allowed_noise_is_refused_with_the_noise_it_takes() -> None:
    with pytest.raises(BudgetTooSmall, match=r"noise_multiplier about 2\.\d+, more than max_noise_multiplier 2;"):
        plan(Budget(2.0), records=400, expected_batch=50, steps=60, max_noise_multiplier=2.0)
    assert plan(Budget(2.0), records=400, expected_batch=50, steps=60).noise_multiplier == 2.219


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"steps": MAX_STEPS + 1}, r"steps x rounds must be at most 100,000, got 100,001 x 1"),
        ({"steps": 50_000, "rounds": 3}, r"got 50,000 x 3"),
        ({"steps": 10**9}, r"got 1,000,000,000 x 1"),
        ({"steps": 10, "max_noise_multiplier": 1e300}, r"max_noise_multiplier must be at most 1000"),
    ],
)
def test_what_would_take_too_long_to_plan_is_refused_at_once(
    more: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> float:
        raise AssertionError("something was computed")

    monkeypatch.setattr(plan_module, "_composed", never)
    with pytest.raises(ValueError, match=said):
        plan(Budget(8.0), records=400, expected_batch=50, **more)


def test_the_most_steps_are_planned_for_in_a_few_computations(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[float] = []

    def counted(*args: Any, grid: float, **more: Any) -> float:
        grids.append(grid)
        return event_epsilon(*args, grid=grid, **more)

    monkeypatch.setattr(plan_module, "event_epsilon", counted)
    made = plan(Budget(8.0), records=100_000, expected_batch=500, steps=MAX_STEPS)
    assert made.noise_multiplier == 1.162
    assert len(grids) < 10


def test_what_a_loss_distribution_would_take_gigabytes_for_has_the_bound_by_rdp() -> None:
    wild = DPPlan(100, 100, MAX_STEPS, 1, 1.0, 0.05, 1e-5)  # a loss of some 20,000,000, on a grid of 0.0001
    assert epsilon(wild, 1e-5) == bound([(1.0, 0.05, MAX_STEPS)], 1e-5)
    assert epsilon(wild, 1e-5) > 1e7
    assert epsilon(wild, 1e-5, relation="replace_one") == bound([(1.0, 0.025, MAX_STEPS)], 1e-5)
    sampled = replace(wild, expected_batch=50)
    assert epsilon(sampled, 1e-5, relation="replace_one") == group_epsilon(wild, 2, 1e-5) == math.inf
    many = [replace(WORLD, noise_multiplier=5 + i / 100) for i in range(40)]  # of kinds that differ
    pieces = [(p.sampling_rate, p.noise_multiplier, p.steps) for p in many]
    assert composed_epsilon(many, 1e-5) == pytest.approx(bound(pieces, 1e-5))


@pytest.mark.parametrize("sigma", [0.3, 0.1])
def test_a_coarser_grid_where_losses_are_large_is_an_upper_bound_and_a_close_one(sigma: float) -> None:
    exact = gaussian_epsilon(sigma, 1e-5)
    assert exact <= epsilon(DPPlan(10, 10, 1, 1, 1.0, sigma, 1e-5), 1e-5) <= exact + 2e-3


@pytest.mark.parametrize(
    ("records", "batch", "steps", "sigma"),
    [
        (2000, 32, 30, 0.457),
        (450, 32, 30, 1.237),
        (1000, 100, 500, 1.547),
        (450, 450, 1, 1.994),
        (10**4, 256, 1000, 4.0),
    ],
)
def test_the_grid_is_as_coarse_as_a_figure_allows(records: int, batch: int, steps: int, sigma: float) -> None:
    made = DPPlan(records, batch, steps, 1, 1.0, sigma, 1e-5)
    finest = event_epsilon(made.event, 1e-5, grid=1e-4)
    assert finest <= epsilon(made, 1e-5) * (1 + 1e-12) <= finest * (1 + 3e-5)
    if steps >= 500:  # the coarsest grid for all would not do
        assert event_epsilon(made.event, 1e-5, grid=1e-2) > finest * (1 + 3e-5)


def test_the_least_noise_is_found_in_a_few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[float] = []

    def as_a_cost(sought: Any, sigma: float) -> float:
        figures.append(sigma)
        return cost(sought, sigma)

    cost = plan_module._Sought.cost
    monkeypatch.setattr(plan_module._Sought, "cost", as_a_cost)
    for target, records, steps in ((7.31, 1733, 29), (1.93, 611, 53), (0.27, 901, 3), (31.0, 307, 40)):
        figures.clear()
        made = plan(Budget(target), records=records, expected_batch=32, steps=steps)
        # The smallest thousandth: this one fits, the one below does not, and both were looked at.
        assert epsilon(made, 1e-5) <= target < epsilon(replace(made, noise_multiplier=a_thousandth_less(made)), 1e-5)
        assert {made.noise_multiplier, a_thousandth_less(made)} <= set(figures)
        assert len(figures) <= 12


def a_thousandth_less(made: DPPlan) -> float:
    return (round(made.noise_multiplier * 1000) - 1) / 1000


def test_several_rows_of_one_person() -> None:
    rows = replace(WORLD, noise_multiplier=0.927)
    for size, figure in ((2, 18.5), (3, 30.8), (5, 60.8)):
        assert group_epsilon(rows, size, 1e-5) == pytest.approx(figure, abs=0.05)
    assert group_epsilon(rows, 1, 1e-5) == epsilon(rows, 1e-5)


def test_several_rows_in_one_whole_batch_match_the_closed_form() -> None:
    # q = 1: all rows enter, so the sum moves by exactly 3 C.
    assert group_epsilon(DPPlan(50, 50, 1, 1, 1.0, 6.0, 1e-5), 3, 1e-5) == pytest.approx(
        gaussian_epsilon(2.0, 1e-5), abs=5e-3
    )


# ---- Plans of two mechanisms on the same data ----

VOTES = DPPlan(400, 400, 1, 1, 1.0, 2.0, 1e-5, "votes")
WHOLE = DPPlan(400, 400, 1, 1, 1.0, 3.0, 1e-5)  # a training whose every step takes all units


def test_two_mechanisms_add_up_as_one_gaussian() -> None:
    # Shifts of 1 under noise of 3 and of 2 are one of the root of their squares; replaced, of 2 / 3 and sqrt(2) / 2.
    both = [WHOLE, VOTES]
    assert composed_epsilon(both, 1e-5) == pytest.approx(gaussian_epsilon(1 / math.hypot(1 / 3, 1 / 2), 1e-5), abs=2e-3)
    replaced = gaussian_epsilon(1 / math.hypot(2 / 3, math.sqrt(2) / 2), 1e-5)
    assert composed_epsilon(both, 1e-5, relation="replace_one") == pytest.approx(replaced, abs=2e-3)
    three = gaussian_epsilon(1 / math.hypot(3 / 3, 3 / 2), 1e-5)  # three rows of one person, all in each sum
    assert group_epsilon(both, 3, 1e-5) == pytest.approx(three, abs=1e-2)


def test_a_sum_of_whole_numbers_beside_a_training_is_charged_no_less_than_its_gaussian() -> None:
    both = [WHOLE, replace(VOTES, mechanism="summed_votes")]
    for relation in ("zero_out", "replace_one"):
        exact = composed_epsilon([WHOLE, VOTES], 1e-5, relation=relation)
        assert exact < composed_epsilon(both, 1e-5, relation=relation) < 1.5 * exact
    assert group_epsilon([WHOLE, VOTES], 2, 1e-5) < group_epsilon(both, 2, 1e-5) < math.inf


@pytest.mark.parametrize("mechanism", ["votes", "summed_votes"])
def test_a_training_beside_votes_has_the_least_noise_that_keeps_both_in_the_budget(mechanism: Any) -> None:
    budget, shape = Budget(8.0), {"records": 400, "expected_batch": 50, "steps": 60}
    votes = plan(Budget(2.4), records=400, expected_batch=400, steps=1, mechanism=mechanism)
    made = plan(budget, **shape, beside=[votes])
    assert composed_epsilon([made, votes], 1e-5) <= 8.0
    less = replace(made, noise_multiplier=made.noise_multiplier - 0.001)
    assert composed_epsilon([less, votes], 1e-5) > 8.0
    alone = plan(budget, **shape)
    assert alone.noise_multiplier == 0.928
    assert composed_epsilon([alone, votes], 1e-5) > 8.1  # as if each had the budget for itself
    if mechanism == "votes":  # the accountant alone, without this module's own composition
        steps = dp_event.SelfComposedDpEvent(
            dp_event.PoissonSampledDpEvent(1 / 8, dp_event.GaussianDpEvent(made.noise_multiplier)), 60
        )
        both = dp_event.ComposedDpEvent([steps, dp_event.GaussianDpEvent(votes.noise_multiplier)])
        assert event_epsilon(both, 1e-5, grid=1e-3) == pytest.approx(composed_epsilon([made, votes], 1e-5), abs=1e-3)


def test_votes_that_take_the_whole_budget_leave_no_plan_beside_them() -> None:
    votes = plan(Budget(2.0), records=400, expected_batch=400, steps=1, mechanism="votes")
    with pytest.raises(BudgetTooSmall, match=r"beside 1 other plan\(s\) needs noise_multiplier"):
        plan(Budget(2.0), records=400, expected_batch=50, steps=60, beside=[votes])


def test_statement_says_what_was_planned() -> None:
    said = statement(WORLD, rows=(2,), simulated=True)
    assert said.guarantee == "dp"
    assert (said.epsilon, said.epsilon_replace_one) == pytest.approx((7.986, 11.285), abs=1e-3)
    assert said.epsilon_rows[2] == pytest.approx(18.4, abs=0.1)
    assert (said.sigma, said.sampling_rate, said.steps, said.clip_norm, said.simulated) == (0.928, 0.125, 60, 1.0, True)
    assert Statement.from_dict(json.loads(json.dumps(said.to_dict(), allow_nan=False))) == said
    assert statement(WORLD, unit="patient", rows_per_unit=3).epsilon_rows == {}


def test_infinite_figures_survive_json() -> None:
    said = replace(statement(WORLD, unit="patient"), epsilon_rows={10: math.inf})
    assert Statement.from_dict(json.loads(json.dumps(said.to_dict(), allow_nan=False))) == said


def test_no_plan_is_no_guarantee() -> None:
    said = statement(None)
    assert (said.guarantee, said.epsilon) == ("none", None)
    with pytest.raises(ValueError, match="guarantee 'none'"):
        Statement("none", 8.0, 1e-5)
    with pytest.raises(ValueError, match="guarantee 'dp'"):
        Statement("dp", math.inf, 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"records": 0},
        {"expected_batch": 0},
        {"expected_batch": 401},
        {"steps": 0},
        {"steps": 1.5},
        {"rounds": 0},
        {"rounds": True},
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"clip_norm": math.nan},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
    ],
)
def test_a_plan_outside_its_ranges_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        DPPlan.from_dict(WORLD.to_dict() | change)


@pytest.mark.parametrize(("eps", "delta"), [(0, 1e-5), (-1, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (8, 0), (8, 1)])
def test_a_budget_outside_its_ranges_is_refused(eps: float, delta: float) -> None:
    with pytest.raises(ValueError):
        Budget(eps, delta)


@pytest.mark.parametrize("delta", [9e-13, 1e-20, 1e-300])
def test_a_delta_below_what_epsilon_can_be_computed_at_is_refused_with_the_way_out(delta: float) -> None:
    with pytest.raises(ValueError, match=rf"^delta must be at least 1e-12, got {delta:g}: .*; ask for 1e-12, or more$"):
        Budget(8, delta)
    with pytest.raises(BadValue, match=r"\[client\.budget\] delta must be at least 1e-12"):
        from_toml(f"[client]\nbudget = {{ epsilon = 8, delta = {delta} }}\n")


def test_the_smallest_delta_is_planned_for() -> None:
    found = plan(Budget(0.1, 1e-12), records=1000, expected_batch=10, steps=20)
    assert epsilon(found, 1e-12) <= 0.1 < epsilon(replace(found, noise_multiplier=3.4), 1e-12)


def test_digest_tells_plans_apart_and_survives_json() -> None:
    assert DPPlan.from_dict(json.loads(json.dumps(WORLD.to_dict()))) == WORLD
    assert DPPlan.from_dict(WORLD.to_dict()).digest() == WORLD.digest()
    assert replace(WORLD, clip_norm=1).digest() == WORLD.digest()
    others = [
        replace(WORLD, **{name: value})
        for name, value in {
            "records": 401,
            "expected_batch": 51,
            "steps": 61,
            "rounds": 2,
            "clip_norm": 1.1,
            "noise_multiplier": 0.929,
            "delta": 1e-6,
        }.items()
    ]
    assert len({p.digest() for p in [WORLD, *others]}) == 8
    with pytest.raises(ValueError, match="sigma"):
        DPPlan.from_dict(WORLD.to_dict() | {"sigma": 1.0})


def test_event_is_that_of_the_plan() -> None:
    step = dp_event.PoissonSampledDpEvent(0.125, dp_event.GaussianDpEvent(0.928))
    assert replace(WORLD, rounds=2).event == dp_event.SelfComposedDpEvent(step, 120)
