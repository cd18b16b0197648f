"""Synthetic text that waits until a person at the site lets it go."""

from __future__ import annotations

import getpass
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedsynth.typed import BadValue

Decision = Literal["waits", "accepted", "declined"]


class AwaitsApproval(RuntimeError):
    """The answer is stored and waits."""


class NotApproved(RuntimeError):
    """A person at the site does not let the answer go. What was charged for it stays charged."""


@dataclass(frozen=True)
class Approvals:
    """One small file for each order whose answer needs a person's leave; the answer itself lies in the ledger.

    Attributes:
        folder: Of those files.
    """

    folder: Path

    def hold(self, order: str, **facts: Any) -> None:
        """From now on the answer of an order waits; called before it is stored, so that none slips through."""
        if not self._file(order).exists():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(order, {"order": order, "decision": "waits", "asked": _now(), **facts})

    def check(self, order: str) -> None:
        """Whether the answer of an order may go.

        Raises:
            AwaitsApproval, NotApproved: If not.
        """
        if not self._file(order).exists():
            return
        held = self._read(self._file(order))
        if held["decision"] == "waits":
            raise AwaitsApproval(f"order {order[:12]} waits for `fedsynth site approve`")
        if held["decision"] != "accepted":
            raise NotApproved(f"order {order[:12]} was declined by {held.get('by')}")

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
            raise BadValue(f"{'no' if not found else 'more than one'} order starts with {start!r}; there are: {known}")
        return found[0]

    def decide(self, start: str, decision: Decision) -> dict[str, Any]:
        """Lets an answer go, or not; once it has gone, it has gone.

        Raises:
            BadValue: If there is no such order, or it was decided before.
        """
        held = self.find(start)
        if held["decision"] != "waits":
            raise BadValue(f"order {held['order'][:12]} was {held['decision']} by {held['by']} at {held['decided']}")
        held |= {"decision": decision, "by": getpass.getuser(), "decided": _now()}
        self._write(held["order"], held)
        return held

    def _file(self, order: str) -> Path:
        return self.folder / f"{order}.json"

    def _read(self, path: Path) -> dict[str, Any]:
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def _write(self, order: str, held: dict[str, Any]) -> None:
        part = self._file(order).with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(held, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._file(order))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
