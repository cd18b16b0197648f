"""`fedsynth site approve`: shows waiting synthetic text to a person, who decides."""

from __future__ import annotations

import hashlib
import os
import pwd
from typing import Any

from fedsynth.clients.approval import Decision
from fedsynth.clients.audit_log import AuditLog
from fedsynth.corpus import Corpus
from fedsynth.deployment.policy import Place
from fedsynth.federation.messages import REQUESTS
from fedsynth.typed import BadValue


def held_text(place: Place, request: str) -> Corpus:
    """The text of a reply that waits, or waited.

    Args:
        place: The site.
        request: The request's digest, or its beginning.

    Raises:
        BadValue: If there is no such request, or its reply holds no text.
    """
    from fedsynth.federation.payload import decode
    from fedsynth.federation.records import derived  # brings Flower

    held = place.approvals.find(request)
    kind = next(o for o in REQUESTS if o.task == held["task"])
    answer: Any = decode(_stored(place, held), kind.reply, trusted=True)
    return next(part for part in derived(answer) if isinstance(part, Corpus))


def decide(place: Place, request: str, decision: Decision) -> dict[str, Any]:
    """Lets a reply go, or not, and logs who decided; the charge stays in either case.

    Raises:
        BadValue: If there is no such request, or it was decided before.
    """
    held = place.approvals.undecided(request)
    _stored(place, held)
    by = user()
    # First: no text leaves before the audit log says who let it go.
    AuditLog(place.audit_log, {}).add(decision, order=held["order"], sha256=held["sha256"], by=by)
    return place.approvals.decide(held, decision, by)


def user() -> str:
    """The system's name of the user that runs this command, and of the user behind sudo."""
    uid = os.getuid()
    try:
        name = f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:  # in a container
        name = f"uid {uid}"
    return f"{name} for {os.environ['SUDO_USER']}" if "SUDO_USER" in os.environ else name


def _stored(place: Place, held: dict[str, Any]) -> bytes:
    """The waiting answer as the ledger stores it, sealed."""
    stored = place.open_ledger().answered(held["order"])
    # A process that crashed before it stored its answer may have held a different text.
    if stored is None or hashlib.sha256(stored).hexdigest() != held["sha256"]:
        raise BadValue(f"request {held['order'][:12]} has no stored answer yet: its training has not ended")
    return stored
