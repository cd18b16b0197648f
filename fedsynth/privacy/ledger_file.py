"""The SQLite file of a ledger: its tables, and one transaction at a time that no other process interleaves."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Hashable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
LOST = "(loss declared)"  # in place of a run: what a lost grant cost is not known. No run has such a name
_WAIT = 120.0  # seconds for another process to finish its transaction

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE spent (
    id INTEGER PRIMARY KEY,
    run TEXT NOT NULL,
    plan TEXT,             -- JSON; NULL: an event without a guarantee
    plan_digest TEXT,
    rounds INTEGER NOT NULL,
    drawn INTEGER NOT NULL CHECK (drawn <= rounds),
    reason TEXT,
    at TEXT NOT NULL
);
CREATE TABLE grants (
    counter INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    spent INTEGER NOT NULL REFERENCES spent (id),
    order_digest TEXT NOT NULL,
    binding TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'running', 'stored', 'sent', 'abandoned')),
    key BLOB,
    at TEXT NOT NULL,
    CHECK ((key IS NOT NULL) = (state IN ('reserved', 'running')))
);
CREATE UNIQUE INDEX one_grant_per_order ON grants (order_digest) WHERE state != 'abandoned';
CREATE TABLE answers (order_digest TEXT PRIMARY KEY, answer BLOB NOT NULL, sent INTEGER NOT NULL, at TEXT NOT NULL);
"""


class LedgerUnusable(RuntimeError):
    """The file is not this data set's ledger, or cannot be read. Never delete it: it is the only account."""


class LedgerFile:
    """The file at a path, opened anew in each process and thread. It is never reset.

    Args:
        path: The file.
        durable: A commit survives a power cut; else the death of any process, and costs a third.
    """

    def __init__(self, path: Path, *, durable: bool) -> None:
        self.path = path
        self._durable = durable
        self._open: tuple[Hashable, sqlite3.Connection] | None = None

    def check(self, db: sqlite3.Connection, dataset: str) -> dict[str, Any]:
        """Checks that the file is whole, of this schema, and the account of this data set.

        Returns:
            The table `meta`.

        Raises:
            LedgerUnusable: If it is not.
        """
        problems = [row[0] for row in db.execute("PRAGMA integrity_check")]
        if problems != ["ok"]:
            raise self.unusable(f"it is damaged ({problems[0]})")
        meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
        if meta.get("schema") != SCHEMA:
            raise self.unusable(f"it has schema {meta.get('schema')}, this software reads {SCHEMA}")
        if meta["dataset"] != dataset:
            raise self.unusable(f"it is the account of data set {meta['dataset']!r}, not of {dataset!r}")
        return meta

    def create(self, meta: Mapping[str, Any]) -> None:
        """Makes the file complete under another name first: one that is there is never half made.

        Args:
            meta: Values of the table `meta` beside the schema.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        try:
            db = self._connect(draft)
            try:
                db.executescript(f"BEGIN IMMEDIATE; {_TABLES}")
                db.executemany("INSERT INTO meta VALUES (?, ?)", {"schema": SCHEMA, **meta}.items())
                db.execute("COMMIT")
            finally:
                db.close()
            with contextlib.suppress(FileExistsError):  # another process was first: its ledger counts
                os.link(draft, self.path)
        finally:
            draft.unlink()
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _connect(self, path: Path) -> sqlite3.Connection:
        # mode=rw: a ledger that vanishes is an error, never a new, empty account.
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=_WAIT, isolation_level=None)
        db.execute("PRAGMA journal_mode = DELETE")  # a write-ahead log would keep erased keys
        # EXTRA is FULL, and the journal's folder too.
        db.execute(f"PRAGMA synchronous = {'EXTRA' if self._durable else 'OFF'}")
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA foreign_keys = ON")
        return db

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction that no other process interleaves: committed at the end, undone on any exception."""
        try:
            db = self._connection()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        except sqlite3.DatabaseError as error:
            raise self.unusable(f"SQLite says: {error}") from error

    def _connection(self) -> sqlite3.Connection:
        """The open one, as long as the path still names the same file, and for the process and thread that opened it.

        Between transactions it holds no lock.
        """
        try:
            file = os.stat(self.path)
        except FileNotFoundError as gone:
            raise self.unusable("it is gone") from gone
        to = (os.getpid(), threading.get_ident(), file.st_dev, file.st_ino)
        if self._open is None or self._open[0] != to:
            self._open = (to, self._connect(self.path))
        return self._open[1]

    def unusable(self, why: str) -> LedgerUnusable:
        """The refusal of a file, with what to do about it."""
        return LedgerUnusable(
            f"the ledger {self.path} cannot be used: {why}. Do not delete it, what was spent would be forgotten; "
            "restore it from a backup, or give the path of the right one"
        )


def canonical(values: Mapping[str, Any]) -> str:
    """JSON of which there is one spelling."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def order_of(db: sqlite3.Connection) -> int:
    """Rényi order of the filter, read anew each time: another process may open the account under another cap."""
    return int(db.execute("SELECT value FROM meta WHERE name = 'order'").fetchone()[0])


def fix_order(db: sqlite3.Connection, order: int) -> None:
    """Writes the order of the filter down."""
    db.execute("INSERT OR REPLACE INTO meta VALUES ('order', ?)", (order,))


def next_counter(db: sqlite3.Connection) -> int:
    """Number of the next grant."""
    return int(db.execute("SELECT COALESCE(MAX(counter), 0) + 1 FROM grants").fetchone()[0])


def now() -> str:
    """The time that rows carry."""
    return datetime.now(UTC).isoformat(timespec="seconds")
