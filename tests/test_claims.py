"""What a client says of its privacy is held against the plan that it names."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest

from fedsynth.privacy.claims import CLIENT, UNITS, check
from fedsynth.privacy.plan import DPPlan, epsilon
from fedsynth.privacy.statement import Statement, statement

# 200 records in batches of 25 over 60 steps: 7.986 and 11.285 (dp-accounting 0.6, on a grid of 1e-4).
TRUE = Statement("dp", 7.9864, 1e-5, 11.2852, {}, "row", 1, 0.928, 0.125, 60, 0.3)
NONE = Statement("none", None, 1e-5)


def plan(records: int, batch: int, steps: int, sigma: float, rounds: int = 1, delta: float = 1e-5) -> DPPlan:
    return DPPlan(records, batch, steps, rounds, 0.3, sigma, delta)


@pytest.mark.parametrize(
    "planned",
    [
        plan(200, 25, 60, 0.928),
        plan(10**6, 1, 1000, 20.0),
        plan(200, 25, 60, 100.0),
        plan(500, 50, 600, 1.4, delta=1e-7),
    ],
    ids=lambda p: f"n={p.records} sigma={p.noise_multiplier}",
)
def test_what_clients_say_of_their_plans_passes(planned: DPPlan) -> None:
    said = statement(planned, rows=())
    check(said)
    check(replace(said, unit="person", rows_per_unit=3, simulated=True), simulated=True)
    check(replace(said, epsilon=said.epsilon + 1, epsilon_replace_one=math.inf))
    check(statement(None, unit="person"))


def test_a_round_beyond_the_plan_is_in_the_sum() -> None:
    planned = plan(30, 30, 10, 5.0, rounds=2)
    later = statement(replace(planned, rounds=3), rows=())  # as `Home.said` has it
    check(later)
    with pytest.raises(ValueError, match="over 30 steps"):
        check(replace(later, epsilon=epsilon(planned, 1e-5)))


def test_a_list_of_scores_is_as_far_from_another_as_from_an_empty_one() -> None:
    planned = plan(1, 1, 4, 9.0)
    said = replace(statement(planned, unit=CLIENT), epsilon_replace_one=epsilon(planned, 1e-5))
    check(said, units=[*UNITS, CLIENT])
    with pytest.raises(ValueError, match=r"unit must be one of row, person$"):
        check(said)
    with pytest.raises(ValueError, match="epsilon_replace_one"):
        check(replace(said, unit="row"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epsilon": 7.97}, "epsilon is said to be 7.97; noise_multiplier 0.928 at .* costs 7.98.* over 60 steps"),
        ({"epsilon": 0.1}, "costs .* or more"),
        ({"epsilon": 0.0}, "costs .* or more"),
        ({"epsilon_replace_one": 11.2}, "epsilon_replace_one is said to be 11.2"),
        ({"epsilon_replace_one": 8.0}, "epsilon_replace_one is said to be 8"),
        ({"sigma": 0.9}, "epsilon is said"),
        ({"steps": 70}, "epsilon is said"),
        ({"sampling_rate": 0.13}, "epsilon is said"),
        ({"delta": 1e-6}, "epsilon is said"),
    ],
)
def test_a_claim_below_what_the_plan_costs_is_refused(change: dict[str, Any], said: str) -> None:
    check(TRUE)
    with pytest.raises(ValueError, match=said):
        check(replace(TRUE, **change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": "nobody in particular"}, "unit must be one of row, person$"),
        ({"unit": ""}, "unit"),
        ({"unit": "Row"}, "unit"),
        ({"simulated": True}, "simulated must be false here"),
        *[({"delta": v}, "delta must lie in") for v in (0.0, -1e-9, 1.1e-5, 0.5, 1.0, math.nan, math.inf)],
        *[({"epsilon": v}, "epsilon must lie in") for v in (-1.0, 1e7)],
        *[({"epsilon_replace_one": v}, "epsilon_replace_one must lie in") for v in (None, -1.0, math.nan, -math.inf)],
        *[({"sigma": v}, "sigma must lie in") for v in (None, 0.0, -1.0, 0.01, 1e7, math.nan, math.inf)],
        *[({"sampling_rate": v}, "sampling_rate must lie in") for v in (None, 0.0, -0.1, 1.1, 1e-300, math.nan)],
        *[({"steps": v}, "steps must lie in") for v in (None, 0, -1, 100_001, 10**30)],
        *[({"clip_norm": v}, "clip_norm must lie in") for v in (None, 0.0, -1.0, math.nan, math.inf, 1e9)],
        *[({"rows_per_unit": v}, "rows_per_unit must lie in") for v in (0, -1, 10**7)],
        ({"epsilon_rows": {1: 9.0}}, "epsilon_rows must lie in"),
        ({"epsilon_rows": {2: 7.0}}, "epsilon_rows of 2 rows must lie in"),
        ({"epsilon_rows": {2: math.nan}}, "epsilon_rows of 2 rows must lie in"),
        ({"epsilon_rows": {2: 20.0, 5: 19.0}}, "epsilon_rows of 5 rows must lie in"),
        ({"epsilon_rows": dict.fromkeys(range(2, 19), 20.0)}, "at most 16"),
        ({"epsilon_rows": {2: 20.0}, "unit": "person"}, "must be of rows"),
    ],
)
def test_a_figure_that_cannot_be_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        check(replace(TRUE, **change), simulated=False)
    assert "nobody" not in str(caught.value)


@pytest.mark.parametrize("field", ["epsilon_replace_one", "sigma", "sampling_rate", "steps", "clip_norm"])
def test_without_a_guarantee_there_are_no_figures(field: str) -> None:
    check(NONE)
    with pytest.raises(ValueError, match="'none', and figures"):
        check(replace(NONE, **{field: 1}))
    with pytest.raises(ValueError, match="'none', and figures"):
        check(replace(NONE, epsilon_rows={2: 1.0}))


@pytest.mark.parametrize(
    ("claimed", "rate", "sigma", "steps", "lies"),
    [
        (8.0, 0.01, 0.05, 100_000, True),
        (1.0, 1e-6, 0.05, 100_000, True),
        (8.0, 1.0, 0.4, 100_000, True),
        (0.0, 1.0, 1.0, 100_000, True),
        (1e6, 1.0, 0.05, 1_000, False),
        (700.0, 1e-9, 0.05, 100_000, False),
        (0.01, 1e-9, 0.3, 100_000, False),
    ],
)
def test_no_claim_takes_long_to_check(claimed: float, rate: float, sigma: float, steps: int, lies: bool) -> None:
    """On the grid of the others' figures some of these would take hours, and all memory."""
    said = replace(TRUE, epsilon=claimed, epsilon_replace_one=math.inf, sigma=sigma, sampling_rate=rate, steps=steps)
    begun = time.process_time()
    if lies:
        with pytest.raises(ValueError, match="epsilon is said to be"):
            check(said)
    else:
        check(said)
    assert time.process_time() - begun < 15


@pytest.mark.parametrize("delta", [1e-12, 1e-16])
def test_a_true_statement_at_a_small_delta_passes_and_one_below_it_does_not(delta: float) -> None:
    said = statement(plan(1000, 50, 60, 2.0, delta=delta), rows=())
    assert said.epsilon is not None
    check(said)
    with pytest.raises(ValueError, match="epsilon is said to be"):
        check(replace(said, epsilon=said.epsilon - 0.01))
