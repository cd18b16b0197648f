"""What remembers the charges of a ledger in another file, so that an older copy of the ledger is found out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedsynth.privacy.plan import DPPlan


@dataclass(frozen=True)
class Charge:
    """One charge as a witness remembers it.

    Attributes:
        run: Public id of the run, arm and seed included; empty where it is not known.
        grant: Id of the grant; empty for a release without a guarantee.
        order: Digest of the order; empty where it is not known.
        plan: The whole plan that the grant is of; None where it was not written down, and without a guarantee.
        reason: Of a release without a guarantee; empty where it is not known.
        stored: Whether the answer was in the ledger.
        at: When it was written down, as text.
        filter: Order of the filter that the account was held to; 0 where it is not known.
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
        """What tells it from others."""
        return (self.grant,) if self.grant else (self.run, self.reason)


class Witness(Protocol):
    """Where a ledger writes down what it charged, before anything runs on it."""

    def known(self) -> Sequence[Charge]:
        """All charges that were written down, oldest first."""

    def note(self, charge: Charge) -> None:
        """Writes one down, on disk when this returns.

        Raises:
            OSError: If it cannot be written.
        """

    def saw(self, charge: Charge) -> None:
        """Likewise one that the ledger holds and that another witness may have noted."""


def missing(known: Sequence[Charge], grants: Mapping[str, str], waived: Collection[tuple[str, str]]) -> list[Charge]:
    """What a witness knows and a ledger does not: nothing, unless the ledger is an older copy of itself.

    Args:
        known: By the witness; read before the ledger is, so that what another process charges meanwhile is no alarm.
        grants: State by id, of the ledger.
        waived: Run and reason of each release without guarantee, of the ledger.
    """
    return [charge for charge in known if _lacks(charge, grants, waived)]


def _lacks(charge: Charge, grants: Mapping[str, str], waived: Collection[tuple[str, str]]) -> bool:
    if charge.grant:
        # Stored, its key was erased; a ledger that would run it again is one from before.
        return grants.get(charge.grant, "") in ("", *(("reserved", "running") if charge.stored else ()))
    return not any(charge.run in ("", run) and charge.reason in ("", reason) for run, reason in waived)
