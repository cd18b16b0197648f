"""`fedsynth site declare-loss`: what the audit trail knows and the ledger does not is counted as spent."""

from __future__ import annotations

from collections.abc import Sequence

from fedsynth.clients.audit_log import entries
from fedsynth.deployment.policy import Place
from fedsynth.deployment.site.approve import user
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.witness import Charge
from fedsynth.typed import BadValue


def lost(place: Place) -> tuple[Ledger | None, Sequence[Charge]]:
    """The account as it lies there, and the charges of the trail that it lacks. Nothing is changed.

    Returns:
        None for the account, and all charges of the trail, where it is gone altogether.

    Raises:
        BadValue: If there never was an account; or it is gone, and so is a line of the trail: then nobody knows all
            that was spent.
        fedsynth.privacy.ledger_file.LedgerUnusable: If it cannot be used for another reason.
    """
    if place.ledger.exists():
        ledger = place.open_ledger(behind=True)
        return ledger, ledger.missing(place.witness().known())
    whole = list(entries(place.audit_log))
    if all(entry.get("dataset") != place.site.data.id for entry in whole):
        raise BadValue(f"there is no account at {place.ledger} yet, so that nothing of it is lost")
    return None, place.witness().known()


def declare(place: Place, ledger: Ledger | None, charges: Sequence[Charge]) -> Ledger:
    """Counts them as spent, and writes down who declared it: the account is open again.

    Args:
        place: The site.
        ledger: Its account; None: a new one is made.
        charges: What it lacks.
    """
    by = user()
    # First: nothing is counted as lost of which the trail does not say who declared it.
    place.witness().add(
        "lost",
        grants=[charge.grant for charge in charges if charge.grant],
        releases=[{"run": charge.run, "reason": charge.reason} for charge in charges if not charge.grant],
        **({"account": "gone"} if ledger is None else {}),
        by=by,
    )
    # A process that is killed here leaves an empty account, which lacks what the trail knows, and is closed.
    made = place.open_ledger(create=True, behind=True) if ledger is None else ledger
    made.declare_lost(charges, by)
    return made
