"""Synthetic text that waits until a person at the site approves it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedsynth.system.folders import private_folder
from fedsynth.typed import BadValue

Decision = Literal["waits", "accepted", "declined"]


class AwaitsApproval(RuntimeError):
    """The reply is stored and waits for approval."""


class NotApproved(RuntimeError):
    """A person at the site has declined to send the reply. Its charge stays."""


@dataclass(frozen=True)
class Approvals:
    """One small file for each request whose reply needs approval; the ledger stores the reply itself.

    Attributes:
        folder: The folder of these files.
    """

    folder: Path

    def hold(self, request: str, sha256: str, **facts: Any) -> bool:
        """Makes the reply to a request wait; called before the reply is stored, so that none slips through.

        Args:
            request: Digest of the request.
            sha256: Hash of the reply: the decision is about these bytes, and a repeated training gives others.
            **facts: More facts for the person who decides.

        Returns:
            True if it did not wait before.
        """
        if self._file(request).exists() and self._read(self._file(request))["sha256"] == sha256:
            return False
        private_folder(self.folder)
        self._write(request, {"order": request, "sha256": sha256, "decision": "waits", "asked": _now(), **facts})
        return True

    def check(self, request: str, sha256: str) -> None:
        """Checks that the reply to a request may go.

        Raises:
            AwaitsApproval, NotApproved: If not.
        """
        if not self._file(request).exists():
            return
        held = self._read(self._file(request))
        if held["decision"] == "waits" or held["sha256"] != sha256:
            raise AwaitsApproval(f"request {request[:12]} waits for `fedsynth site approve`")
        if held["decision"] != "accepted":
            raise NotApproved(f"request {request[:12]} was declined by {held.get('by')}")

    def all(self) -> list[dict[str, Any]]:
        """The facts of all requests whose reply needed approval, oldest first."""
        return sorted((self._read(path) for path in self.folder.glob("*.json")), key=lambda held: held["asked"])

    def find(self, start: str) -> dict[str, Any]:
        """The request whose digest starts with `start`.

        Raises:
            BadValue: If there is none, or more than one.
        """
        found = [held for held in self.all() if held["order"].startswith(start)]
        if len(found) != 1:
            known = ", ".join(held["order"][:12] for held in self.all()) or "nothing waits"
            raise BadValue(
                f"{'no' if not found else 'more than one'} request starts with {start!r}; there are: {known}"
            )
        return found[0]

    def undecided(self, start: str) -> dict[str, Any]:
        """The request whose digest starts with `start`, if it waits.

        Raises:
            BadValue: Also if it was decided before.
        """
        held = self.find(start)
        if held["decision"] != "waits":
            raise BadValue(f"request {held['order'][:12]} was {held['decision']} by {held['by']} at {held['decided']}")
        return held

    def decide(self, held: dict[str, Any], decision: Decision, by: str) -> dict[str, Any]:
        """Stores the decision on a reply; a reply that was sent cannot be recalled."""
        held = {**held, "decision": decision, "by": by, "decided": _now()}
        self._write(held["order"], held)
        return held

    def _file(self, request: str) -> Path:
        return self.folder / f"{request}.json"

    def _read(self, path: Path) -> dict[str, Any]:
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def _write(self, request: str, held: dict[str, Any]) -> None:
        part = self._file(request).with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(held, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._file(request))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
