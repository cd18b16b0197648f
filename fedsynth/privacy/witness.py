"""A second record of a ledger's charges in another file, which exposes an older copy of the ledger."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedsynth.privacy.ledger_file import LOST, LedgerUnusable, canonical, fix_order, next_counter, now, order_of
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.rdp import ORDERS


class LedgerBehind(LedgerUnusable):
    """The file knows less than its witness: it is an older copy, and closed until the loss is declared."""


@dataclass(frozen=True)
class Charge:
    """One charge as a witness remembers it.

    Attributes:
        run: Public id of the run, arm and seed included; empty if it is not known.
        grant: Id of the grant; empty for a release without a guarantee.
        order: Digest of the order; empty if it is not known.
        plan: The grant's whole plan; None if it was not written down, or for a release without a guarantee.
        reason: Reason of a release without a guarantee; empty if it is not known.
        stored: True if the ledger held the answer.
        at: Time of the note, as text.
        filter: Order of the filter of the account; 0 if it is not known.
    """

    run: str
    grant: str = ""
    order: str = ""
    plan: DPPlan | None = None
    reason: str = ""
    stored: bool = False
    at: str = ""
    filter: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        """The identity of a charge."""
        return (self.grant,) if self.grant else (self.run, self.reason)


class Witness(Protocol):
    """A place where a ledger notes each charge before anything runs on it."""

    def known(self) -> Sequence[Charge]:
        """All noted charges, oldest first."""

    def note(self, charge: Charge) -> None:
        """Notes a charge; it is on disk when this returns.

        Raises:
            OSError: If it cannot be written.
        """

    def saw(self, charge: Charge) -> None:
        """Notes a charge that the ledger holds already, as another witness may have noted it."""


def missing(db: sqlite3.Connection, known: Sequence[Charge]) -> list[Charge]:
    """Charges that a witness knows and a ledger lacks: none, unless the ledger is an older copy of itself.

    Args:
        db: The ledger.
        known: The witness's charges, read before the ledger, so that a charge of another process raises no alarm.
    """
    grants = dict(db.execute("SELECT id, state FROM grants").fetchall())
    waived = db.execute("SELECT run, reason FROM spent WHERE plan IS NULL").fetchall()
    return [charge for charge in known if _lacks(charge, grants, waived)]


def _lacks(charge: Charge, grants: Mapping[str, str], waived: Collection[tuple[str, str]]) -> bool:
    if charge.grant:
        # The key of a stored answer is erased; a ledger that would run the grant again is an older one.
        return grants.get(charge.grant, "") in ("", *(("reserved", "running") if charge.stored else ()))
    return not any(charge.run in ("", run) and charge.reason in ("", reason) for run, reason in waived)


def check_witness(path: Path, db: sqlite3.Connection, known: Sequence[Charge]) -> None:
    """Checks that a ledger knows all that its witness knows.

    Raises:
        LedgerBehind: If it does not.
    """
    if known and (lost := missing(db, known)):
        grants = sum(bool(charge.grant) for charge in lost)
        raise LedgerBehind(
            f"the ledger {path} knows less than the audit trail: {grants} grant(s) and {len(lost) - grants} "
            f"release(s) without guarantee are not in it, the first of {lost[0].at or 'a day that is not known'}. "
            "It is an older copy, which would let what was spent since be spent again: nothing is answered. Put "
            "the newest one in its place; if that is lost, `fedsynth site declare-loss DIR` counts what is missing "
            "as spent"
        )


def unknown(db: sqlite3.Connection, known: Sequence[Charge]) -> list[Charge]:
    """The charges that a ledger knows and its witness lacks.

    Args:
        db: The ledger.
        known: The witness's charges.
    """
    stored, order = {charge.grant: charge.stored for charge in known if charge.grant}, order_of(db)
    found = []
    for id, digest, state, run, plan in db.execute(
        "SELECT grants.id, order_digest, state, run, plan FROM grants JOIN spent ON spent.id = grants.spent "
        "ORDER BY counter"
    ):
        kept = state in ("stored", "sent")
        if id not in stored or (kept and not stored[id]):
            whole = None if plan is None else DPPlan.from_dict(json.loads(plan))
            found.append(Charge(run, id, digest, whole, stored=kept, filter=order))
    for run, reason in db.execute(
        "SELECT run, reason FROM spent WHERE plan IS NULL AND id NOT IN (SELECT spent FROM grants) ORDER BY id"
    ):
        if not any(not c.grant and c.run in ("", run) and c.reason in ("", reason) for c in known):
            found.append(Charge(run, reason=reason))
    return found


def tell(witness: Witness, unknown: Sequence[Charge], own: str | tuple[str, str] | None = None) -> None:
    """Has the witness write down charges that it does not know.

    Args:
        witness: The witness.
        unknown: The charges that it lacks.
        own: Id of the grant, or run and reason of the release, that was charged now: the last to be written.
    """
    mine = [charge for charge in unknown if own in (charge.grant, (charge.run, charge.reason))]
    for charge in unknown:
        if charge not in mine:
            witness.saw(charge)
    for charge in mine:
        witness.note(charge)


def count_lost(db: sqlite3.Connection, charges: Sequence[Charge], by: str) -> None:
    """Counts charges of which a ledger knows nothing as spent: see `Ledger.declare_lost`."""
    fixed = next((charge.filter for charge in charges if charge.filter in ORDERS), None)
    if fixed is not None and db.execute("SELECT 1 FROM spent").fetchone() is None:
        fix_order(db, fixed)
    for charge in missing(db, charges):
        reason = f"loss declared by {by}"
        spent: tuple[str, str | None, str | None, str]
        if not charge.grant:
            spent = (charge.run or LOST, None, None, charge.reason or f"release without guarantee, {reason}")
        elif charge.plan is None:
            spent = (LOST, None, None, f"grant {charge.grant} of unknown plan, {reason}")
        else:
            spent = (charge.run or LOST, canonical(charge.plan.to_dict()), charge.plan.digest(), reason)
        known = "UPDATE grants SET state = 'abandoned', key = NULL WHERE id = ?"
        if charge.grant and db.execute(known, (charge.grant,)).rowcount:
            continue  # paid for; what was stored of it is gone
        row = db.execute(
            "INSERT INTO spent (run, plan, plan_digest, reason, rounds, drawn, at) VALUES (?, ?, ?, ?, 1, 1, ?)",
            (*spent, now()),
        )
        if charge.grant:
            digest = None if charge.plan is None else charge.plan.digest()
            bound = {"order": charge.order, "plan": digest, "data": "", "model": "", "version": ""}
            db.execute(
                "INSERT INTO grants VALUES (?, ?, ?, ?, ?, 'abandoned', NULL, ?)",
                (next_counter(db), charge.grant, row.lastrowid, charge.order, canonical(bound), now()),
            )
