"""`fedsynth site declare-loss`: what the audit trail knows and the ledger does not is counted as spent."""

from __future__ import annotations

from collections.abc import Sequence

from fedsynth.clients.policy import Place
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.witness import Charge
from fedsynth.site_approve import user
from fedsynth.site_ready import check_account
from fedsynth.typed import BadValue


def lost(place: Place) -> tuple[Ledger, Sequence[Charge]]:
    """The account as it lies there, and the charges of the trail that it lacks.

    Raises:
        BadValue: If the account is gone altogether.
        fedsynth.privacy.ledger.LedgerUnusable: If it cannot be used for another reason.
    """
    check_account(place)
    if not place.ledger.exists():
        raise BadValue(f"there is no account at {place.ledger} yet, so that nothing of it is lost")
    ledger = place.open_ledger(behind=True)
    return ledger, ledger.missing(place.witness().known())


def declare(place: Place, ledger: Ledger, charges: Sequence[Charge]) -> None:
    """Counts them as spent, and writes down who declared it: the account is open again."""
    by = user()
    # First: nothing is counted as lost of which the trail does not say who declared it.
    place.witness().add(
        "lost",
        grants=[charge.grant for charge in charges if charge.grant],
        releases=[{"run": charge.run, "reason": charge.reason} for charge in charges if not charge.grant],
        by=by,
    )
    ledger.declare_lost(charges, by)
