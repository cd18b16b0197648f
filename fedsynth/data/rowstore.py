"""A site's imported rows: single records under a keyed MAC, which requests read in place of the source."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from fedsynth.system.folders import private_folder

FORMAT = 3
READ = (2, FORMAT)  # in format 2, rows had no attributes; in format 1, rows and source had one key
_STORED, _SOURCE = b"fedsynth: imported rows, as they are stored", b"fedsynth: imported rows, their source"


class RowsUnusable(RuntimeError):
    """The imported rows are not those that were written. An operator must act, as for a damaged account."""


@dataclass(frozen=True)
class Record:
    """One row, which no other row changes.

    Attributes:
        unit: The person in one spelling; the row's number if rows are independent. None if the person or the test mark
            cannot be read, or for a blank line.
        held: True for a test row.
        text: The text; "" if the row cannot be read or lacks a cell, and nothing is learnt from it.
        answer: The answer, likewise.
        attributes: Values of the further columns that site.toml names, in the order of their names; "" for none.
    """

    unit: str | int | None
    held: bool
    text: str
    answer: str
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Imported:
    """The header above the records.

    Attributes:
        declared: Digest of the keys of site.toml that govern reading; a change needs another import.
        at: Time of the import, UTC.
        rows: Number of records.
        size: Size of the source file in bytes; 0 for a query.
        changed: Time of the source file's last change (ns).
        mac: Keyed MAC of the source's content; "" for a query.
        format: Format of this file.
    """

    declared: str
    at: str
    rows: int
    size: int = 0
    changed: int = 0
    mac: str = ""
    format: int = FORMAT


def source_mac(key: bytes, content: bytes) -> str:
    """HMAC-SHA256 (hex) of a source's content. With a plain hash, its readers could test guesses of the content.

    Its key is derived from the ledger's and differs from that of the stored rows: a writer of the source chooses the
    authenticated content and can read the MAC above the rows.
    """
    return _mac(key, _SOURCE, content)


def _mac(key: bytes, purpose: bytes, content: bytes) -> str:
    own = hmac.new(key, purpose, hashlib.sha256).digest()
    return hmac.new(own, content, hashlib.sha256).hexdigest()


def write(path: Path, key: bytes, about: Imported, records: Sequence[Record]) -> None:
    """Replaces the stored records, all or none; only their owner can read them.

    Args:
        path: Path of the file.
        key: The ledger's `mac_key`.
        about: The header.
        records: The records in the order of the source.
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
    """The header above the records, not yet verified; None if nothing was imported that this version can read."""
    try:
        with path.open("rb") as file:
            found = Imported(**json.loads(file.readline()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.format in READ else None


def read(path: Path, key: bytes) -> list[Record]:
    """The records as they were written under this key.

    Raises:
        RowsUnusable: If they are other ones.
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
    return [_record(*json.loads(line)) for line in lines]


def _record(unit: str | int | None, held: bool, text: str, answer: str, attributes: Sequence[str] = ()) -> Record:
    return Record(unit, held, text, answer, tuple(attributes))


def _unusable(path: Path, why: str) -> str:
    return f"the imported rows {path} cannot be used: {why}. Import them anew: fedsynth site check"
