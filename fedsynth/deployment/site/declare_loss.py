"""`fedsynth site declare-loss`: counts charges that the audit log has and the ledger lacks as spent."""

from __future__ import annotations

from collections.abc import Sequence

from fedsynth.clients.audit_log import entries
from fedsynth.deployment.policy import Place
from fedsynth.deployment.site.approve import user
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.witness import Charge
from fedsynth.typed import BadValue


def lost(place: Place) -> tuple[Ledger | None, Sequence[Charge]]:
    """The account and the charges of the audit log that it lacks. Nothing is changed.

    Returns:
        If the account is gone: None for it, and all charges of the audit log.

    Raises:
        BadValue: If there never was an account; or if it is gone and the audit log lacks a line, so that the spending
            is unknown.
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
    """Counts missing charges as spent and logs who declared them; the account is then open again.

    Args:
        place: The site.
        ledger: The site's account; None to make a new one.
        charges: The charges that it lacks.
    """
    by = user()
    # First: nothing is counted as lost before the audit log says who declared it.
    place.witness().add(
        "lost",
        grants=[charge.grant for charge in charges if charge.grant],
        releases=[{"run": charge.run, "reason": charge.reason} for charge in charges if not charge.grant],
        **({"account": "gone"} if ledger is None else {}),
        by=by,
    )
    # A process that is killed here leaves an empty account: it lacks charges of the audit log and stays closed.
    made = place.open_ledger(create=True, behind=True) if ledger is None else ledger
    made.declare_lost(charges, by)
    return made
