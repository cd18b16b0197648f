"""A site's audit log: requests and their senders, replies and their cost, approvals and their authors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.witness import Charge
from fedsynth.typed import BadValue

FIRST = "0" * 64


class AuditLogCorrupted(BadValue):
    """A line of the log was changed or removed."""


@dataclass(frozen=True)
class AuditLog:
    """One JSON object a line, each with the SHA-256 of the line before it: changed, added and removed lines show.

    Lines removed from the end do not show, and a writer of the file can rewrite all of it: an operator who wants more
    sends its last hash elsewhere. The line after a torn one (its process was killed while writing) says so.

    The log is the witness of the site's ledger (`fedsynth.privacy.witness`).

    Attributes:
        path: The file; made with the first entry.
        who: Facts of every entry: the data set, the SuperLink, the bundle, Flower's run.
    """

    path: Path
    who: Mapping[str, Any]

    def add(self, event: str, **facts: Any) -> None:
        """Adds one entry, on disk when this returns.

        Raises:
            OSError: If it cannot be written, as on a full disk; then no part of it is there.
        """
        with open(self.path, "a+b", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            at = datetime.now(UTC).isoformat(timespec="seconds")
            last = _last_line(file)
            entry = {"at": at, "event": event, **facts, **self.who, "before": _digest(last)}
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            torn = end > 0 and file.read(1) != b"\n"  # its process was killed while writing
            entry |= {"torn": True} if torn else {}
            line = b"\n" * torn + json.dumps(entry, ensure_ascii=False).encode() + b"\n"
            file.seek(end)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # the next entry must not follow from half a line
                raise

    def note(self, charge: Charge) -> None:
        """Logs a charge before anything runs on it."""
        self.add("charged", **_facts(charge))

    def saw(self, charge: Charge) -> None:
        """Logs a charge of the account that has no line here: another site's, or that of a process that was killed
        before it wrote the line. Its requester is unknown here."""
        alone = replace(self, who={"dataset": self.who.get("dataset")})
        alone.add("seen", **_facts(charge), **({"stored": True} if charge.stored else {}))

    def known(self) -> Sequence[Charge]:
        """The charges on this data set in any line, even one that does not follow from the line before.

        Older logs have no lines of charges; their stored grants and releases are taken instead.
        """
        found: dict[tuple[str, ...], Charge] = {}
        runs: dict[str, str] = {}  # by request
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        for entry in filter(None, map(_parsed, lines)):
            if entry.get("dataset") != self.who.get("dataset"):
                continue
            request, at = str(entry.get("order", "")), str(entry.get("at", ""))
            if entry.get("event") == "asked" and isinstance(asked := entry.get("envelope"), dict):
                runs[request] = "/".join(str(asked.get(name, "")) for name in ("run", "arm", "seed"))
            run = str(entry.get("run", runs.get(request, "")))
            if entry.get("event") in ("charged", "seen"):
                charge = Charge(
                    run,
                    str(entry.get("grant", "")),
                    request,
                    _plan(entry),
                    str(entry.get("reason", "")),
                    at=at,
                    filter=number if isinstance(number := entry.get("filter"), int) else 0,
                )
                before = found.setdefault(charge.key, charge)
                if entry.get("stored"):
                    found[charge.key] = replace(before, stored=True)
            if entry.get("event") == "stored":
                grants = entry.get("grants")
                for grant in grants if isinstance(grants, list) else ():  # any other value is damaged
                    charge = Charge(run, str(grant), request, at=at)
                    found[charge.key] = replace(found.get(charge.key, charge), stored=True)
                if entry.get("guarantee") == "none" and not any(run == c.run and not c.grant for c in found.values()):
                    found[run, ""] = Charge(run, order=request, at=at)
        return list(found.values())


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """All entries, oldest first, each checked against the line before.

    Raises:
        AuditLogCorrupted: With the number of the line.
    """
    before = FIRST
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            return
        entry = _parsed(line)
        if entry is None and number == len(lines):
            return  # being written, or torn: the next entry says so
        follows = _parsed(lines[number]) if number < len(lines) else None
        if entry is None and follows is not None and follows.get("torn") and follows.get("before") == _digest(line):
            before = _digest(line)
            continue
        if entry is None or entry.get("before") != before:
            raise AuditLogCorrupted(
                f"{path}, line {number}: it does not follow from the line before; the trail was changed"
            )
        before = _digest(line)
        yield entry


def _facts(charge: Charge) -> dict[str, Any]:
    if not charge.grant:
        return {"run": charge.run, "guarantee": "none", "reason": charge.reason}
    plan = {} if charge.plan is None else {"plan": charge.plan.to_dict()}
    return {"run": charge.run, "order": charge.order, "grant": charge.grant, **plan, "filter": charge.filter}


def _plan(entry: Mapping[str, Any]) -> DPPlan | None:
    try:
        return DPPlan.from_dict(entry["plan"])
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _last_line(file: Any) -> bytes:
    """The last line."""
    end = file.seek(0, os.SEEK_END)
    size = 4096
    while True:
        file.seek(max(0, end - size))
        lines = file.read().splitlines()
        if len(lines) > 1 or size >= end:
            return bytes(lines[-1]) if lines else b""
        size *= 2


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest() if line else FIRST
