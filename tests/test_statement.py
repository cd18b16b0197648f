from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.plan import DPPlan, composed_epsilon, group_epsilon, replaced_epsilon
from fedsynth.privacy.rdp import bound
from fedsynth.privacy.statement import Spending, Statement, statement

TRAINING = DPPlan(400, 400, 2, 1, 1.0, 4.0, 1e-5)
VOTES = DPPlan(400, 400, 1, 1, 1.0, 3.0, 1e-5, "votes")
NONE = Statement("none", None, 1e-5)


def spending(*said: Statement) -> Spending:
    first, *others = said
    found = Spending((first,))
    for each in others:
        found = found.and_(each)
    return found


def test_two_plans_of_a_client_cost_what_both_cost_and_not_the_larger() -> None:
    own = spending(statement(TRAINING, rows=()), statement(VOTES, rows=()))
    both = [TRAINING, VOTES]
    assert own.epsilon == pytest.approx(composed_epsilon(both, 1e-5), abs=1e-9)
    assert own.epsilon > 1.2 * max(part.epsilon or 0.0 for part in own.parts)
    assert own.epsilon_replace_one == pytest.approx(composed_epsilon(both, 1e-5, relation="replace_one"), abs=1e-9)
    assert own.epsilon_rows(2) == pytest.approx(group_epsilon(both, 2, 1e-5), abs=1e-9)
    assert (own.guarantee, own.delta, own.unit, own.epsilon_alone) == ("dp", 1e-5, "row", None)


def test_one_plan_costs_what_its_last_statement_says() -> None:
    late, more = statement(TRAINING, rows=()), statement(replace(TRAINING, rounds=3), rows=())
    for order in ((late, more), (more, late)):  # an earlier reply may come later
        own = spending(*order)
        assert own.parts == (more,)
        assert (own.epsilon, own.epsilon_replace_one) == (more.epsilon, replaced_epsilon(replace(TRAINING, rounds=3)))


def test_nothing_mends_a_release_without_a_guarantee() -> None:
    said = statement(TRAINING, rows=())
    for order in ((said, NONE), (NONE, said), (NONE, NONE)):
        assert spending(*order) == Spending((NONE,))
        assert spending(*order).epsilon is None
    with pytest.raises(ValueError, match="stated nothing"):
        Spending(())


def test_without_the_sum_a_clients_votes_have_the_noise_of_its_share_alone() -> None:
    cohort, summed = Cohort(8, 1, 2), replace(VOTES, mechanism="summed_votes")
    said = statement(summed, rows=(), cohort=cohort)
    assert spending(said).epsilon_alone == said.epsilon_alone
    own = spending(statement(TRAINING, rows=()), said)
    assert own.epsilon is not None
    assert own.epsilon_alone is not None
    share = 3.0 / math.sqrt(cohort.honest)  # about: whole numbers have a little more
    assert own.epsilon_alone == pytest.approx(bound([(1.0, 4.0, 2), (1.0, share, 1)], 1e-5), rel=0.05)
    assert own.epsilon < own.epsilon_alone
