"""The highest rate at which an attack recognises a unit, against closed forms of mechanisms that have one."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import pytest

from fedsynth.privacy import curve as module
from fedsynth.privacy.curve import FALSE_POSITIVES, highest_rate, rate_of
from fedsynth.privacy.plan import DPPlan

NORMAL = NormalDist()
TOLERANCE = 2e-4  # upwards: losses are rounded up to a grid, and the curve is looked at in 65 places


def gaussian(shift: float, alarms: float = FALSE_POSITIVES) -> float:
    """The best attack on a Gaussian mechanism (Neyman and Pearson): two normals that are `shift` deviations apart."""
    return NORMAL.cdf(NORMAL.inv_cdf(alarms) + shift)


def whole(sigma: float, steps: int = 1, mechanism: str = "votes") -> DPPlan:
    return DPPlan(100, 100, steps, 1, 1.0, sigma, 1e-5, mechanism)  # type: ignore[arg-type]  # one of the names


@pytest.mark.parametrize(("sigma", "steps"), [(1.994, 1), (0.601, 1), (1.0, 4), (5.0, 10), (0.4, 1)])
def test_of_a_gaussian_mechanism_the_rate_is_that_of_the_best_test(sigma: float, steps: int) -> None:
    shift = steps**0.5 / sigma
    for plan, replaced in ((whole(sigma, steps), 2**0.5), (whole(sigma, steps, "scores"), 1.0)):
        found = highest_rate([plan])
        assert gaussian(shift) <= found <= gaussian(shift) + TOLERANCE
        another = highest_rate([plan], relation="replace_one")  # two units' votes are sqrt 2 apart
        assert gaussian(shift * replaced) <= another <= gaussian(shift * replaced) + TOLERANCE
    gradients = whole(sigma, steps, "gradients")  # and two gradients point apart
    other = highest_rate([gradients], relation="replace_one")
    assert gaussian(2 * shift) <= other <= gaussian(2 * shift) + TOLERANCE


def test_other_false_positives_and_several_plans() -> None:
    found = highest_rate([whole(2.0)], false_positives=0.1)
    assert gaussian(0.5, 0.1) <= found <= gaussian(0.5, 0.1) + TOLERANCE
    together = highest_rate([whole(2.0), whole(1.0, 3)])  # shifts add up in squares: 1/4 + 3
    assert gaussian(3.25**0.5) <= together <= gaussian(3.25**0.5) + TOLERANCE
    assert highest_rate([]) == FALSE_POSITIVES


@pytest.mark.parametrize("rows", [2, 5, 10])
def test_rows_of_one_person_move_the_sum_as_often(rows: int) -> None:
    assert highest_rate([whole(1.994)], rows=rows) == pytest.approx(gaussian(rows / 1.994), abs=TOLERANCE)


def test_of_a_sampled_step_the_rate_is_that_of_the_best_threshold() -> None:
    # One step at rate q: N(0, s) against (1 - q) N(0, s) + q N(1, s). A threshold is the best test in either direction.
    rate, sigma = 0.25, 0.5
    high = sigma * NORMAL.inv_cdf(1 - FALSE_POSITIVES)  # alarm if above
    found = rate * (1 - NORMAL.cdf((high - 1) / sigma)) + (1 - rate) * FALSE_POSITIVES
    low, up = -9.0, 9.0  # the unit may as well be the one that is missing: alarm if below
    for _ in range(80):
        middle = (low + up) / 2
        alarms = rate * NORMAL.cdf((middle - 1) / sigma) + (1 - rate) * NORMAL.cdf(middle / sigma)
        low, up = (middle, up) if alarms < FALSE_POSITIVES else (low, middle)
    best = max(found, NORMAL.cdf(low / sigma))
    assert best <= highest_rate([DPPlan(200, 50, 1, 1, 1.0, sigma, 1e-5)]) <= best + 0.005


def test_epsilon_alone_allows_far_more_than_the_curve() -> None:
    plan = DPPlan(200, 50, 60, 1, 1.0, 1.416, 1e-5)  # epsilon 7.994
    assert rate_of(7.994, 1e-5) > 0.999
    assert highest_rate([plan]) == pytest.approx(0.204, abs=0.001)
    # By a central limit theorem (Bu et al., arXiv 1911.11607) the steps are a Gaussian mechanism of this shift.
    shift = 0.25 * (60 * (2.718281828459045 ** (1 / 1.416**2) - 1)) ** 0.5
    assert highest_rate([plan]) == pytest.approx(gaussian(shift), abs=0.04)


@pytest.mark.parametrize(
    ("epsilon", "rate"), [(0.0, 0.01), (1.0, 0.0271828), (8.0, 1 - 0.99 * 0.00033546), (float("inf"), 1.0)]
)
def test_pure_privacy_by_hand(epsilon: float, rate: float) -> None:
    assert rate_of(epsilon, 0.0) == pytest.approx(rate, rel=1e-4)


def test_a_secure_sums_rate_is_a_bound_by_renyi() -> None:
    plan = whole(0.639, mechanism="summed_votes")
    # Of order 2: with Renyi divergence R = 1 / sigma^2, a rate is at most sqrt(a e^R).
    assert gaussian(1 / 0.639) < highest_rate([plan]) <= (0.01 * 2.718281828459045 ** (1 / 0.639**2)) ** 0.5 + 1e-3
    assert highest_rate([plan]) < highest_rate([plan], relation="replace_one") <= 1.0
    assert highest_rate([plan]) < highest_rate([plan], rows=2) <= 1.0
    mixed = [plan, DPPlan(200, 50, 60, 1, 1.0, 1.416, 1e-5)]
    assert highest_rate(mixed) > highest_rate(mixed[1:])
    assert highest_rate(mixed, relation="replace_one") > highest_rate(mixed[1:], relation="replace_one")


Wrong = Callable[[float, float, float], float]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda epsilon, delta, a: max(a, min(1.0, 2.718281828459045**epsilon * a)),  # delta forgotten
        lambda epsilon, delta, a: max(a, min(1.0, 2.718281828459045**epsilon * a + delta)),  # the complement forgotten
    ],
)
def test_a_broken_bound_is_found(wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rate_of", wrong)
    with pytest.raises(AssertionError):
        test_of_a_gaussian_mechanism_the_rate_is_that_of_the_best_test(0.4, 1)
