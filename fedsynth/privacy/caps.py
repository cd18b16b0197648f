"""The caps of an account: its lifetime, one run, and the parts of a run, each held by the filter."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedsynth.privacy.filter import admits, epsilon_at, order_for, used
from fedsynth.privacy.ledger_file import order_of
from fedsynth.privacy.plan import Budget, DPPlan


class BudgetExhausted(RuntimeError):
    """The lifetime cap of the data does not allow what is asked. Nothing was written."""


@dataclass(frozen=True)
class Account:
    """The declared facts of one data set's account.

    Attributes:
        dataset: Declared id of the data set. It stays when rows change.
        cap: Lifetime budget of the data; None: no cap (a simulated world, bounded by its run's budget).
        per_run: The budget that all arms, seeds and rounds with one run's id share.
    """

    dataset: str
    cap: Budget | None
    per_run: Budget | None = None

    def limits(self, budget: Budget | None, order: int) -> list[tuple[Budget, int]]:
        """Every limit with its order: that of the cap was fixed with the account, that of another goes with it.

        Args:
            budget: The budget of the part of a run that asks.
            order: Rényi order of the account's filter.
        """
        found = [] if self.cap is None else [(self.cap, order)]
        return [*found, *((limit, order_for(limit)) for limit in (self.per_run, budget) if limit is not None)]

    def check(self, db: sqlite3.Connection, asked: Sequence[DPPlan], run: str, budget: Budget | None) -> None:
        """Checks that every limit holds with more plans, which were chosen together.

        Raises:
            BudgetExhausted: If one would be passed.
        """
        whole = run.split("/", 1)[0]
        for limit, order, of, what in (
            (self.cap, order_of(db), None, f"the lifetime cap of data set {self.dataset!r}"),
            (self.per_run, None, whole, f"what policy.per_run allows run {whole!r} in all its arms and seeds"),
            (budget, None, run, f"the budget of run {run!r}"),
        ):
            if limit is None:
                continue
            plans, private = reserved(db, of)
            order = order or order_for(limit)
            if private and admits(limit, order, plans, asked):
                continue
            before, after = (
                epsilon_at(used(p, order), order, limit.delta) if private else math.inf
                for p in (plans, [*plans, *asked])
            )
            raise BudgetExhausted(
                f"the {sum(plan.rounds for plan in asked)} round(s) asked would pass {what}, epsilon "
                f"{limit.epsilon:g} at delta {limit.delta:g}: by the filter of order {order}, which takes plans as "
                f"chosen after seeing results, the {len(plans)} plan(s) reserved stand at epsilon {before:.4g}, with "
                f"what is asked at {after:.4g}"
                + ("" if private else "; something left without a guarantee, or at a cost that is not known")
            )

    def delta(self, plans: Sequence[DPPlan]) -> float:
        """At which epsilon is told: the cap's, else the least of the plans."""
        if self.cap is not None:
            return self.cap.delta
        return min((plan.delta for plan in plans), default=Budget.delta)


def reserved(db: sqlite3.Connection, run: str | None) -> tuple[list[DPPlan], bool]:
    """All plans with the rounds reserved of each, and whether nothing left without a guarantee.

    Args:
        db: The ledger.
        run: Its plans and those of its parts; None: all.
    """
    rows = db.execute(
        "SELECT plan, rounds FROM spent WHERE ?1 IS NULL OR run = ?1 OR substr(run, 1, length(?1) + 1) = ?1 || '/'",
        (run,),
    ).fetchall()
    plans = [replace(DPPlan.from_dict(json.loads(plan)), rounds=rounds) for plan, rounds in rows if plan]
    return plans, all(plan for plan, _ in rows)
