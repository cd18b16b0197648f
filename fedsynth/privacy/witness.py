"""A second record of a ledger's charges in another file, which exposes an older copy of the ledger."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedsynth.privacy.plan import DPPlan


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


def missing(known: Sequence[Charge], grants: Mapping[str, str], waived: Collection[tuple[str, str]]) -> list[Charge]:
    """Charges that a witness knows and a ledger lacks: none, unless the ledger is an older copy of itself.

    Args:
        known: The witness's charges, read before the ledger, so that a charge of another process raises no alarm.
        grants: The ledger's grants, state by id.
        waived: The ledger's releases without guarantee, run and reason of each.
    """
    return [charge for charge in known if _lacks(charge, grants, waived)]


def _lacks(charge: Charge, grants: Mapping[str, str], waived: Collection[tuple[str, str]]) -> bool:
    if charge.grant:
        # The key of a stored answer is erased; a ledger that would run the grant again is an older one.
        return grants.get(charge.grant, "") in ("", *(("reserved", "running") if charge.stored else ()))
    return not any(charge.run in ("", run) and charge.reason in ("", reason) for run, reason in waived)
