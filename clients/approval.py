"""Synthetic text that waits until a person at the site lets it go."""

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
    """The answer is stored and waits."""


class NotApproved(RuntimeError):
    """A person at the site does not let the answer go. What was charged for it stays charged."""


@dataclass(frozen=True)
class Approvals:
    """One small file for each request whose answer needs a person's leave; the answer itself lies in the ledger.

    Attributes:
        folder: Of those files.
    """

    folder: Path

    def hold(self, request: str, sha256: str, **facts: Any) -> bool:
        """From now on the answer of a request waits; called before it is stored, so that none slips through.

        Args:
            request: Its digest.
            sha256: Of the answer: what is decided is about these bytes; a training that is repeated gives others.
            facts: More for who decides.

        Returns:
            Whether it did not wait before.
        """
        if self._file(request).exists() and self._read(self._file(request))["sha256"] == sha256:
            return False
        private_folder(self.folder)
        self._write(request, {"order": request, "sha256": sha256, "decision": "waits", "asked": _now(), **facts})
        return True

    def check(self, request: str, sha256: str) -> None:
        """Whether the answer of a request may go.

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
        """All that needed leave, oldest first."""
        return sorted((self._read(path) for path in self.folder.glob("*.json")), key=lambda held: held["asked"])

    def find(self, start: str) -> dict[str, Any]:
        """The one whose order starts so.

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
        """As `find`, of one that waits.

        Raises:
            BadValue: Also if it was decided before.
        """
        held = self.find(start)
        if held["decision"] != "waits":
            raise BadValue(f"request {held['order'][:12]} was {held['decision']} by {held['by']} at {held['decided']}")
        return held

    def decide(self, held: dict[str, Any], decision: Decision, by: str) -> dict[str, Any]:
        """Lets an answer go, or not; once it has gone, it has gone."""
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
