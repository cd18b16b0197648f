"""The durable account of one data set: what was spent on it, by which grant, and what was answered."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsynth.privacy.noise import GrantRandomness, site_key
from fedsynth.privacy.plan import Budget, DPPlan, composed_epsilon

SCHEMA = 1
_WAIT = 120.0  # seconds for another process to finish its transaction, which holds a PLD composition of seconds

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


class BudgetExhausted(RuntimeError):
    """The lifetime cap of the data does not allow what is asked. Nothing was written."""


class GrantUsed(RuntimeError):
    """A grant was to be used twice, or out of turn."""


class LedgerUnusable(RuntimeError):
    """The file is not this data set's ledger, or cannot be read. Never delete it: it is the only account."""


@dataclass(frozen=True)
class Binding:
    """What a grant is good for: if any of it changes, it is another grant.

    Attributes:
        order: Digest of the order.
        plan: `DPPlan.digest()`.
        data: Keyed MAC of the data (`data_mac` with the ledger's `mac_key`).
        model: Hash of the model's weights.
        version: Of the software.
    """

    order: str
    plan: str
    data: str
    model: str
    version: str

    def digest(self) -> str:
        """SHA-256 (hex) of the binding as canonical JSON."""
        return hashlib.sha256(_canonical(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class Grant:
    """Leave to run one round of a plan once. Holds no secret.

    Attributes:
        id: Public; texts and adapters carry it.
        counter: Number of the grant in its ledger, from 1.
        plan: The whole plan; the grant is for one of its rounds.
        binding: What it is good for.
    """

    id: str
    counter: int
    plan: DPPlan
    binding: Binding


def _site_keys(counter: int, binding: str) -> bytes:
    """Fresh randomness whatever is asked: see `site_key`."""
    del counter, binding
    return site_key()


class Ledger:
    """One SQLite file per declared data set; lies outside run directories and is never reset.

    States of a grant: reserved -> running -> stored -> sent; abandoned where the order came again with something
    bound changed. What was charged is never given back. Every change is one committed transaction. The caller
    serialises orders per site with a file lock, so a grant found running while charging means a crash.

    The lifetime figure composes the reserved events by PLD as if they had been fixed in advance; plans chosen after
    seeing earlier results would need a privacy filter, which is not covered.

    Args:
        path: Of the file; made (mode 0600) if there is none. An empty or damaged file is refused, not replaced.
        dataset: Declared id of the data set. It stays when rows change.
        cap: Lifetime budget of the data; None: no cap (a simulated world, bounded by its run's budget).
        keys: Key of a grant by (counter, binding digest), and of the data MAC by (0, "data"). Sites keep the
            default; simulations pass `simulated_key` of their run and client.
        durable: A commit survives a power cut. Simulations do without: then it survives the death of any process, and
            costs a third.
        create: Make the file if there is none; else that is an error: an account that is gone must not begin anew.

    Raises:
        LedgerUnusable: If the file is another data set's, of another schema, or damaged.
    """

    def __init__(
        self,
        path: Path,
        *,
        dataset: str,
        cap: Budget | None,
        keys: Callable[[int, str], bytes] = _site_keys,
        durable: bool = True,
        create: bool = True,
    ) -> None:
        self.path = path
        self.dataset = dataset
        self.cap = cap
        self._keys = keys
        self._durable = durable
        self._open: tuple[Hashable, sqlite3.Connection] | None = None
        if not path.exists():
            if not create:
                raise self._unusable("it is gone")
            self._create()
        os.chmod(path, 0o600)  # a copy from a backup may have come with wider access
        with self._transaction() as db:
            problems = [row[0] for row in db.execute("PRAGMA integrity_check")]
            if problems != ["ok"]:
                raise self._unusable(f"it is damaged ({problems[0]})")
            meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
        if meta.get("schema") != SCHEMA:
            raise self._unusable(f"it has schema {meta.get('schema')}, this software reads {SCHEMA}")
        if meta["dataset"] != dataset:
            raise self._unusable(f"it is the account of data set {meta['dataset']!r}, not of {dataset!r}")

    @property
    def mac_key(self) -> bytes:
        """Key of `data_mac`: made once with the ledger, and never leaves."""
        with self._transaction() as db:
            return bytes(db.execute("SELECT value FROM meta WHERE name = 'mac_key'").fetchone()[0])

    def answered(self, order: str) -> bytes | None:
        """The stored answer of an order with this digest, to be sent again as it is; None if there is none."""
        with self._transaction() as db:
            row = db.execute("SELECT answer FROM answers WHERE order_digest = ?", (order,)).fetchone()
        return None if row is None else bytes(row[0])

    def sent(self, order: str) -> bool:
        """Whether the answer of an order was handed over to be sent."""
        with self._transaction() as db:
            row = db.execute("SELECT sent FROM answers WHERE order_digest = ?", (order,)).fetchone()
        return row is not None and bool(row[0])

    def charge(self, plan: DPPlan, binding: Binding, run: str, *, budget: Budget | None = None) -> Grant:
        """Pays for one round of a plan before any private text is opened.

        The first charge of (run, plan) reserves all its rounds; later rounds draw from that. A round beyond them,
        and a retry of an order of which anything bound has changed, reserve one more round. An unfinished grant of
        the same order and binding (a crash before "stored") is handed out again, and costs nothing.

        Args:
            plan: Of the run.
            binding: What the grant holds for.
            run: Public id of the run.
            budget: Of the run, which an order too many would pass even where the lifetime cap would not be.

        Raises:
            BudgetExhausted: If the lifetime cap or the run's budget would be passed; nothing is written then.
            GrantUsed: If the order has an answer already: send that.
            ValueError: If the binding is another plan's.
        """
        if binding.plan != plan.digest():
            raise ValueError(f"the binding names plan {binding.plan[:12]}, the plan to charge is {plan.digest()[:12]}")
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM answers WHERE order_digest = ?", (binding.order,)).fetchone():
                raise GrantUsed(f"order {binding.order[:12]} has been answered; send the stored answer again")
            unfinished = db.execute(
                "SELECT counter, id, binding FROM grants WHERE order_digest = ? AND state IN ('reserved', 'running')",
                (binding.order,),
            ).fetchone()
            if unfinished is not None:
                counter, id, bound = unfinished
                if bound == _canonical(asdict(binding)):
                    db.execute("UPDATE grants SET state = 'reserved' WHERE counter = ?", (counter,))
                    return Grant(id, counter, plan, binding)
                db.execute("UPDATE grants SET state = 'abandoned', key = NULL WHERE counter = ?", (counter,))
            spent = self._draw(db, plan, run, budget, retry=unfinished is not None)
            counter = db.execute("SELECT COALESCE(MAX(counter), 0) + 1 FROM grants").fetchone()[0]
            key = self._keys(counter, binding.digest())
            # A public name from a secret: random where keys are, and the same again where a simulation is repeated.
            id = hmac.new(key, b"grant id", hashlib.sha256).hexdigest()[:32]
            db.execute(
                "INSERT INTO grants VALUES (?, ?, ?, ?, ?, 'reserved', ?, ?)",
                (counter, id, spent, binding.order, _canonical(asdict(binding)), key, _now()),
            )
            return Grant(id, counter, plan, binding)

    def rounds(self, run: str, plan: DPPlan) -> int:
        """Rounds of a plan that a run has reserved: more than the plan's after one beyond them, or a changed retry."""
        with self._transaction() as db:
            [reserved] = db.execute(
                "SELECT COALESCE(SUM(rounds), 0) FROM spent WHERE run = ? AND plan_digest = ?", (run, plan.digest())
            ).fetchone()
        return int(reserved)

    def begin(self, grant: Grant) -> GrantRandomness:
        """Starts the one run that a grant allows (reserved -> running) and hands out its randomness.

        Raises:
            GrantUsed: If the grant is not reserved, or not one of this ledger.
        """
        with self._transaction() as db:
            row = db.execute(
                "SELECT state, binding, plan, key FROM grants JOIN spent ON spent.id = grants.spent "
                "WHERE grants.id = ? AND counter = ?",
                (grant.id, grant.counter),
            ).fetchone()
            if row is None or row[1] != _canonical(asdict(grant.binding)) or json.loads(row[2]) != grant.plan.to_dict():
                raise GrantUsed(f"grant {grant.id} is not of the ledger of data set {self.dataset!r}")
            if row[0] != "reserved":
                raise GrantUsed(f"grant {grant.id} is {row[0]}: a grant runs once; charge a new one")
            db.execute("UPDATE grants SET state = 'running' WHERE counter = ?", (grant.counter,))
            return GrantRandomness(bytes(row[3]))

    def settled(self, id: str) -> Grant | None:
        """The grant of that id, if its answer is stored: it never runs again, what came of it may be processed further.

        None for an id that is not of this ledger, and for a grant whose run may have to be repeated.
        """
        with self._transaction() as db:
            row = db.execute(
                "SELECT counter, plan, binding FROM grants JOIN spent ON spent.id = grants.spent "
                "WHERE grants.id = ? AND state IN ('stored', 'sent')",
                (id,),
            ).fetchone()
        if row is None:
            return None
        counter, plan, binding = row
        return Grant(id, counter, DPPlan.from_dict(json.loads(plan)), Binding(**json.loads(binding)))

    def store(self, grant_or_order: Grant | str, answer: bytes, *, derived_from: Sequence[str] = ()) -> None:
        """Keeps the answer before it is sent (running -> stored) and erases the grant's key with it.

        Args:
            grant_or_order: What the answer is for.
            answer: As it will be sent.
            derived_from: Ids of grants. An order that was charged nothing has its answer kept only if all of these are
                settled, and there is one: then it is post-processing of what they let out.

        Raises:
            GrantUsed: If the grant, or the order's, is not running; or there is none, and nothing settled either.
        """
        order = grant_or_order if isinstance(grant_or_order, str) else grant_or_order.binding.order
        with self._transaction() as db:
            row = db.execute(
                "SELECT id, counter, state FROM grants WHERE order_digest = ? AND state != 'abandoned'", (order,)
            ).fetchone()
            if row is None and derived_from and isinstance(grant_or_order, str):
                for id in derived_from:
                    state = db.execute("SELECT state FROM grants WHERE id = ?", (id,)).fetchone()
                    if state is None or state[0] not in ("stored", "sent"):
                        raise GrantUsed(f"grant {id} is {'unknown' if state is None else state[0]}: only what a grant "
                                        "has let out is processed further without a charge")  # fmt: skip
                db.execute("INSERT INTO answers VALUES (?, ?, 0, ?)", (order, answer, _now()))
                return
            if row is None or (isinstance(grant_or_order, Grant) and row[0] != grant_or_order.id):
                raise GrantUsed(f"order {order[:12]} has no such grant in the ledger of data set {self.dataset!r}")
            if row[2] != "running":
                raise GrantUsed(f"grant {row[0]} is {row[2]}; only the answer of a running one is stored")
            db.execute("UPDATE grants SET state = 'stored', key = NULL WHERE counter = ?", (row[1],))
            db.execute("INSERT INTO answers VALUES (?, ?, 0, ?)", (order, answer, _now()))

    def store_answer(self, order: str, answer: bytes) -> None:
        """Keeps the answer of an order that spends nothing; the same bytes again change nothing.

        Raises:
            GrantUsed: If the order has another answer, or a grant (then `store` it).
        """
        with self._transaction() as db:
            row = db.execute("SELECT answer FROM answers WHERE order_digest = ?", (order,)).fetchone()
            if row is not None:
                if bytes(row[0]) != answer:
                    raise GrantUsed(f"order {order[:12]} has another answer already; send that one again")
                return
            if db.execute("SELECT 1 FROM grants WHERE order_digest = ? AND state != 'abandoned'", (order,)).fetchone():
                raise GrantUsed(f"order {order[:12]} runs under a grant; its answer goes through store()")
            db.execute("INSERT INTO answers VALUES (?, ?, 0, ?)", (order, answer, _now()))

    def mark_sent(self, order: str) -> None:
        """Notes that the answer is handed over to be sent (stored -> sent); again changes nothing.

        Raises:
            GrantUsed: If the order has no stored answer.
        """
        with self._transaction() as db:
            if not db.execute("UPDATE answers SET sent = 1 WHERE order_digest = ?", (order,)).rowcount:
                raise GrantUsed(f"order {order[:12]} has no stored answer; an answer is stored before it is sent")
            db.execute("UPDATE grants SET state = 'sent' WHERE order_digest = ? AND state = 'stored'", (order,))

    def charge_without_guarantee(self, reason: str, run: str) -> bool:
        """Notes that something left without a mechanism: the data's epsilon is infinite from now on.

        Noted once for a run and a reason: a repeated order adds nothing to it.

        Returns:
            Whether this is the first of its run and reason.

        Raises:
            ValueError: If no reason is given.
        """
        if not reason.strip():
            raise ValueError("a release without guarantee needs a reason: it is shown on every later report")
        with self._transaction() as db:
            noted = "SELECT 1 FROM spent WHERE plan IS NULL AND run = ? AND reason = ?"
            if db.execute(noted, (run, reason)).fetchone():
                return False
            db.execute(
                "INSERT INTO spent (run, rounds, drawn, reason, at) VALUES (?, 1, 1, ?, ?)", (run, reason, _now())
            )
        return True

    def waived(self, run: str) -> bool:
        """Whether a release without guarantee was noted in a run."""
        with self._transaction() as db:
            return db.execute("SELECT 1 FROM spent WHERE plan IS NULL AND run = ?", (run,)).fetchone() is not None

    def spent(self, run: str | None = None) -> tuple[float, float]:
        """(epsilon, delta) of all that was reserved, drawn or not; `inf` after an event without guarantee.

        Args:
            run: Only what this run reserved; the data's lifetime otherwise.
        """
        with self._transaction() as db:
            plans, private = self._reserved(db, run)
        delta = self._delta(plans)
        return (composed_epsilon(plans, delta) if private else math.inf), delta

    def entries(self) -> list[dict[str, Any]]:
        """All rows in words, oldest first: reservations, events without guarantee, grants. No keys, no answers."""
        with self._transaction() as db:
            spent = db.execute("SELECT id, run, plan, rounds, drawn, reason, at FROM spent ORDER BY id").fetchall()
            grants = db.execute(
                "SELECT counter, id, spent, order_digest, binding, state, at FROM grants ORDER BY counter"
            ).fetchall()
        rows: list[dict[str, Any]] = []
        for id, run, plan, rounds, drawn, reason, at in spent:
            if plan is None:
                rows.append({"kind": "no_guarantee", "run": run, "reason": reason, "at": at})
            else:
                numbers = {"plan": json.loads(plan), "rounds": rounds, "drawn": drawn}
                rows.append({"kind": "reservation", "run": run, **numbers, "at": at})
            rows += [
                {"kind": "grant", "run": run, "id": name, "counter": counter, "order": order, "state": state}
                | {"binding": json.loads(binding), "at": when}
                for counter, name, of, order, binding, state, when in grants
                if of == id
            ]
        return rows

    def _draw(self, db: sqlite3.Connection, plan: DPPlan, run: str, budget: Budget | None, *, retry: bool) -> int:
        """The reservation that pays for one round, made if need be."""
        rows = db.execute(
            "SELECT id, rounds - drawn FROM spent WHERE run = ? AND plan_digest = ? ORDER BY id", (run, plan.digest())
        ).fetchall()
        # A retry leaves the rounds to come their reservation: what cannot be paid is refused now, not at the end.
        left = [] if retry else [id for id, remaining in rows if remaining > 0]
        if left:
            db.execute("UPDATE spent SET drawn = drawn + 1 WHERE id = ?", (left[0],))
            return int(left[0])
        rounds = 1 if rows else plan.rounds
        asked = replace(plan, rounds=rounds)
        self._check_cap(db, asked)
        if budget is not None:
            cost = composed_epsilon([*self._reserved(db, run)[0], asked], budget.delta)
            if cost > budget.epsilon:
                raise BudgetExhausted(
                    f"run {run!r} has a budget of epsilon {budget.epsilon:g}; with {rounds} more round(s) it would "
                    f"cost {cost:.4g}"
                )
        reserved = db.execute(
            "INSERT INTO spent (run, plan, plan_digest, rounds, drawn, at) VALUES (?, ?, ?, ?, 1, ?)",
            (run, _canonical(plan.to_dict()), plan.digest(), rounds, _now()),
        )
        assert reserved.lastrowid is not None
        return reserved.lastrowid

    def _check_cap(self, db: sqlite3.Connection, asked: DPPlan) -> None:
        if self.cap is None:
            return
        plans, private = self._reserved(db, None)
        delta = self.cap.delta
        after = composed_epsilon([*plans, asked], delta) if private else math.inf
        if after > self.cap.epsilon:
            before = composed_epsilon(plans, delta) if private else math.inf
            raise BudgetExhausted(
                f"data set {self.dataset!r} has spent epsilon {before:.4g} at delta {delta:g}; the {asked.rounds} "
                f"round(s) asked cost {composed_epsilon([asked], delta):.4g}, together {after:.4g}, and its lifetime "
                f"cap is {self.cap.epsilon:g}"
            )

    def _reserved(self, db: sqlite3.Connection, run: str | None) -> tuple[list[DPPlan], bool]:
        """All plans with the rounds reserved of each, and whether nothing left without a guarantee."""
        rows = db.execute("SELECT plan, rounds FROM spent WHERE ? IS NULL OR run = ?", (run, run)).fetchall()
        plans = [replace(DPPlan.from_dict(json.loads(plan)), rounds=rounds) for plan, rounds in rows if plan]
        return plans, all(plan for plan, _ in rows)

    def _delta(self, plans: list[DPPlan]) -> float:
        if self.cap is not None:
            return self.cap.delta
        return min((plan.delta for plan in plans), default=Budget.delta)

    def _create(self) -> None:
        """Makes the file complete under another name first: one that is there is never half made."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        try:
            db = self._connect(draft)
            try:
                db.executescript(f"BEGIN IMMEDIATE; {_TABLES}")
                meta = {"schema": SCHEMA, "dataset": self.dataset, "mac_key": self._keys(0, "data")}
                db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
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
    def _transaction(self) -> Iterator[sqlite3.Connection]:
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
            raise self._unusable(f"SQLite says: {error}") from error

    def _connection(self) -> sqlite3.Connection:
        """The open one, as long as the path still names the same file, and for the process and thread that opened it.

        Between transactions it holds no lock.
        """
        try:
            file = os.stat(self.path)
        except FileNotFoundError as gone:
            raise self._unusable("it is gone") from gone
        to = (os.getpid(), threading.get_ident(), file.st_dev, file.st_ino)
        if self._open is None or self._open[0] != to:
            self._open = (to, self._connect(self.path))
        return self._open[1]

    def _unusable(self, why: str) -> LedgerUnusable:
        return LedgerUnusable(
            f"the ledger {self.path} cannot be used: {why}. Do not delete it, what was spent would be forgotten; "
            "restore it from a backup, or give the path of the right one"
        )


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
