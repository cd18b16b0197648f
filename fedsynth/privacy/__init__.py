"""Differential privacy: plan, ledger, noise, release."""

from fedsynth.privacy.caps import Account, BudgetExhausted
from fedsynth.privacy.ledger import Binding, Grant, GrantUsed, Ledger
from fedsynth.privacy.ledger_file import LedgerUnusable
from fedsynth.privacy.noise import GrantRandomness, data_mac, simulated_key, site_key
from fedsynth.privacy.plan import (
    Budget,
    BudgetTooSmall,
    DPPlan,
    composed_epsilon,
    epsilon,
    group_epsilon,
    plan,
)
from fedsynth.privacy.release import (
    DPTrained,
    NotReleasable,
    Trained,
    release,
    release_adapter,
    release_scores,
    release_without_guarantee,
)
from fedsynth.privacy.statement import Statement, statement

__all__ = [
    "Account",
    "Binding",
    "Budget",
    "BudgetExhausted",
    "BudgetTooSmall",
    "DPPlan",
    "DPTrained",
    "Grant",
    "GrantRandomness",
    "GrantUsed",
    "Ledger",
    "LedgerUnusable",
    "NotReleasable",
    "Statement",
    "Trained",
    "composed_epsilon",
    "data_mac",
    "epsilon",
    "group_epsilon",
    "plan",
    "release",
    "release_adapter",
    "release_scores",
    "release_without_guarantee",
    "simulated_key",
    "site_key",
    "statement",
]
