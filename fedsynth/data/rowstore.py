"""A site's rows as they were imported: single records under a keyed MAC, which requests read in place of the source."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from fedsynth.system.folders import private_folder

FORMAT = 2  # of 1, rows and source had one key
_STORED, _SOURCE = b"fedsynth: imported rows, as they are stored", b"fedsynth: imported rows, their source"


class RowsUnusable(RuntimeError):
    """The imported rows are not those that were written: an operator's matter, as an account that is damaged."""


@dataclass(frozen=True)
class Record:
    """One row, which no other row changes.

    Attributes:
        unit: Whose it is: the person in one spelling; the row's number where rows are independent. None: no person can
            be read in it, or whether it is to test on, or it is a blank line.
        held: Whether it is to test on.
        text: "" where the row cannot be read, or lacks something: then nothing is learnt from it.
        answer: Likewise.
    """

    unit: str | int | None
    held: bool
    text: str
    answer: str


@dataclass(frozen=True)
class Imported:
    """What stands above the records.

    Attributes:
        declared: Digest of what site.toml says about reading them; other words need another import.
        at: When they were imported, UTC.
        rows: How many records follow.
        size: Of the file that they were read from, in bytes; 0 for a query.
        changed: When it was last changed (ns).
        mac: Keyed MAC of its content; "" for a query.
        format: Of this file.
    """

    declared: str
    at: str
    rows: int
    size: int = 0
    changed: int = 0
    mac: str = ""
    format: int = FORMAT


def source_mac(key: bytes, content: bytes) -> str:
    """HMAC-SHA256 (hex) of a source's content: no plain hash, by which whoever sees it could test guesses of it.

    Its key is derived from the ledger's, and is not that of the stored rows: whoever may write the source chooses what
    is authenticated here, and reads the MAC above the rows.
    """
    return _mac(key, _SOURCE, content)


def _mac(key: bytes, purpose: bytes, content: bytes) -> str:
    own = hmac.new(key, purpose, hashlib.sha256).digest()
    return hmac.new(own, content, hashlib.sha256).hexdigest()


def write(path: Path, key: bytes, about: Imported, records: Sequence[Record]) -> None:
    """Puts the records in the place of those that are there, all or none; for their owner alone.

    Args:
        path: Of the file.
        key: The ledger's `mac_key`.
        about: Above them.
        records: In the order of the source.
    """
    private_folder(path.parent)
    lines = [json.dumps(asdict(about)), *(json.dumps(astuple(record)) for record in records)]
    body = "".join(f"{line}\n" for line in lines).encode("ascii")
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(body + _mac(key, _STORED, body).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def about(path: Path) -> Imported | None:
    """What stands above the records, before it is known whether it is true; None where nothing was imported, or
    nothing that this version reads."""
    try:
        with path.open("rb") as file:
            found = Imported(**json.loads(file.readline()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.format == FORMAT else None


def read(path: Path, key: bytes) -> list[Record]:
    """The records, if they are what was written under this key.

    Raises:
        RowsUnusable: If they are not.
    """
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise RowsUnusable(_unusable(path, str(problem.strerror))) from problem
    end = content.rfind(b"\n", 0, -1) + 1
    body, mac = content[:end], content[end:]
    if not hmac.compare_digest(mac, _mac(key, _STORED, body).encode() + b"\n"):
        raise RowsUnusable(_unusable(path, "they were changed or cut short, or are those of another account"))
    _, *lines = body.splitlines()
    return [Record(*_values(line)) for line in lines]


def _values(line: bytes) -> list[Any]:
    found: list[Any] = json.loads(line)
    return found


def _unusable(path: Path, why: str) -> str:
    return f"the imported rows {path} cannot be used: {why}. Import them anew: fedsynth site check"
