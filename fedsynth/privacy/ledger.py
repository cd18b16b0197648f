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

from fedsynth.privacy.filter import admits, epsilon_at, order_for, used
from fedsynth.privacy.noise import GrantRandomness, site_key
from fedsynth.privacy.plan import Budget, DPPlan, composed_epsilon
from fedsynth.privacy.rdp import ORDERS
from fedsynth.privacy.witness import Charge, Witness, missing

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


class BudgetExhausted(RuntimeError):
    """The lifetime cap of the data does not allow what is asked. Nothing was written."""


class GrantUsed(RuntimeError):
    """A grant was to be used twice, or out of turn."""


class LedgerUnusable(RuntimeError):
    """The file is not this data set's ledger, or cannot be read. Never delete it: it is the only account."""


class LedgerBehind(LedgerUnusable):
    """The file knows less than its witness: it is an older copy, and closed until the loss is declared."""


@dataclass(frozen=True)
class Binding:
    """What a grant is good for: if any of it changes, it is another grant.

    Attributes:
        order: Digest of the request; the ledgers on disk call it so.
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

    States of a grant: reserved -> running -> stored -> sent; abandoned where the request came again with something
    bound changed. What was charged is never given back. Every change is one committed transaction. The caller
    serialises requests per site with a file lock, so a grant found running while charging means a crash.

    What is asked next may depend on what was released before, so a Rényi filter (`fedsynth.privacy.filter`) guards the
    cap. Its order follows from the cap as long as nothing is spent; with the first charge it is fixed, and stays when
    the cap is changed.

    With a witness, what was charged is written down there too: after the commit, before the grant is handed out. So a
    crash between the two leaves a grant that never ran, and what ran is known in two places. What others charged on
    the same file, each with a witness of its own, is written down with it, and by `tell_witness`.

    Args:
        path: Of the file; made (mode 0600) if there is none. An empty or damaged file is refused, not replaced.
        dataset: Declared id of the data set. It stays when rows change.
        cap: Lifetime budget of the data; None: no cap (a simulated world, bounded by its run's budget).
        per_run: What all that carries the id of one run may spend together: its arms, seeds and rounds.
        witness: Remembers charges in another file; a ledger that lacks one of them is not opened.
        keys: Key of a grant by (counter, binding digest), and of the data MAC by (0, "data"). Sites keep the
            default; simulations pass `simulated_key` of their run and client.
        durable: A commit survives a power cut. Simulations do without: then it survives the death of any process, and
            costs a third.
        create: Make the file if there is none; else that is an error: an account that is gone must not begin anew.
        behind: Open it although the witness knows more: to declare the loss. It charges nothing until that is done.

    Raises:
        LedgerUnusable: If the file is another data set's, of another schema, or damaged.
        LedgerBehind: If the witness knows more than the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        dataset: str,
        cap: Budget | None,
        per_run: Budget | None = None,
        witness: Witness | None = None,
        keys: Callable[[int, str], bytes] = _site_keys,
        durable: bool = True,
        create: bool = True,
        behind: bool = False,
    ) -> None:
        self.path = path
        self.dataset = dataset
        self.cap = cap
        self.per_run = per_run
        self._witness = witness
        self._keys = keys
        self._durable = durable
        self._open: tuple[Hashable, sqlite3.Connection] | None = None
        if not path.exists():
            if not create:
                raise self._unusable("it is gone")
            self._create()
        os.chmod(path, 0o600)  # a copy from a backup may have come with wider access
        known = self._known()
        with self._transaction() as db:
            problems = [row[0] for row in db.execute("PRAGMA integrity_check")]
            if problems != ["ok"]:
                raise self._unusable(f"it is damaged ({problems[0]})")
            meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
            if meta.get("schema") != SCHEMA:
                raise self._unusable(f"it has schema {meta.get('schema')}, this software reads {SCHEMA}")
            if meta["dataset"] != dataset:
                raise self._unusable(f"it is the account of data set {meta['dataset']!r}, not of {dataset!r}")
            if not behind:
                self._check_witness(db, known)
            spent = bool(known) or db.execute("SELECT 1 FROM spent").fetchone() is not None
            # Without one it was made before there was a filter; while nothing is spent, nothing was seen either.
            if "order" not in meta or (not spent and meta["order"] != order_for(cap)):
                _fix_order(db, order_for(cap))
            if cap is not None and meta.get("cap") != _cap(cap):  # for who reads the file alone
                db.execute("INSERT OR REPLACE INTO meta VALUES ('cap', ?)", (_cap(cap),))

    @property
    def order(self) -> int:
        """Of the filter."""
        with self._transaction() as db:
            return _order(db)

    @property
    def mac_key(self) -> bytes:
        """Key of `data_mac`: made once with the ledger, and never leaves."""
        with self._transaction() as db:
            return bytes(db.execute("SELECT value FROM meta WHERE name = 'mac_key'").fetchone()[0])

    def answered(self, request: str) -> bytes | None:
        """The stored answer to a request with this digest, to be sent again as it is; None if there is none."""
        with self._transaction() as db:
            row = db.execute("SELECT answer FROM answers WHERE order_digest = ?", (request,)).fetchone()
        return None if row is None else bytes(row[0])

    def sent(self, request: str) -> bool:
        """Whether the answer to a request was handed over to be sent."""
        with self._transaction() as db:
            row = db.execute("SELECT sent FROM answers WHERE order_digest = ?", (request,)).fetchone()
        return row is not None and bool(row[0])

    def charge(self, plan: DPPlan, binding: Binding, run: str, *, budget: Budget | None = None) -> Grant:
        """Pays for one round of a plan before any private text is opened.

        The first charge of (run, plan) reserves all its rounds; later rounds draw from that. A round beyond them,
        and a retry of a request of which anything bound has changed, reserve one more round. An unfinished grant of
        the same request and binding (a crash before "stored") is handed out again, and costs nothing.

        Args:
            plan: Of the run.
            binding: What the grant holds for.
            run: Public id of the run; what follows a slash names a part of it (arm, seed).
            budget: Of that part, which a request too many would pass even where the lifetime cap would not be.

        Raises:
            BudgetExhausted: If the lifetime cap, `per_run` or the budget would be passed; nothing is written then.
            GrantUsed: If the request has an answer already: send that.
            LedgerBehind: If the witness knows more than the file.
            ValueError: If the binding is another plan's.
        """
        if binding.plan != plan.digest():
            raise ValueError(f"the binding names plan {binding.plan[:12]}, the plan to charge is {plan.digest()[:12]}")
        for limit, order in self._limits(budget):
            admits(limit, order, [], plan)  # what takes seconds is known before others are kept waiting
        known = self._known()
        with self._transaction() as db:
            self._check_witness(db, known)
            grant = self._grant(db, plan, binding, run, budget)
            unknown = self._unknown(db, known)
        self._note(unknown, grant.id)
        return grant

    def tell_witness(self) -> None:
        """Has the witness write down what it does not know of this account: it may be several sites', and then each
        can tell that the file is an older copy, whoever charged what is missing.

        Raises:
            LedgerBehind: If the witness knows more than the file.
            OSError: If it cannot be written.
        """
        known = self._known()
        with self._transaction() as db:
            self._check_witness(db, known)
            unknown = self._unknown(db, known)
        self._note(unknown)

    def _grant(self, db: sqlite3.Connection, plan: DPPlan, binding: Binding, run: str, budget: Budget | None) -> Grant:
        if db.execute("SELECT 1 FROM answers WHERE order_digest = ?", (binding.order,)).fetchone():
            raise GrantUsed(f"request {binding.order[:12]} has been answered; send the stored answer again")
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
        counter = _next(db)
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

    def store(self, grant_or_request: Grant | str, answer: bytes, *, derived_from: Sequence[str] = ()) -> None:
        """Keeps the answer before it is sent (running -> stored) and erases the grant's key with it.

        Args:
            grant_or_request: What the answer is for.
            answer: As it will be sent.
            derived_from: Ids of grants. A request that was charged nothing has its answer kept only if all of these are
                settled, and there is one: then it is post-processing of what they let out.

        Raises:
            GrantUsed: If the grant, or the request's, is not running; or there is none, and nothing settled either.
        """
        request = grant_or_request if isinstance(grant_or_request, str) else grant_or_request.binding.order
        with self._transaction() as db:
            row = db.execute(
                "SELECT id, counter, state FROM grants WHERE order_digest = ? AND state != 'abandoned'", (request,)
            ).fetchone()
            if row is None and derived_from and isinstance(grant_or_request, str):
                for id in derived_from:
                    state = db.execute("SELECT state FROM grants WHERE id = ?", (id,)).fetchone()
                    if state is None or state[0] not in ("stored", "sent"):
                        raise GrantUsed(
                            f"grant {id} is {'unknown' if state is None else state[0]}: only what a grant "
                            "has let out is processed further without a charge"
                        )
                db.execute("INSERT INTO answers VALUES (?, ?, 0, ?)", (request, answer, _now()))
                return
            if row is None or (isinstance(grant_or_request, Grant) and row[0] != grant_or_request.id):
                raise GrantUsed(f"request {request[:12]} has no such grant in the ledger of data set {self.dataset!r}")
            if row[2] != "running":
                raise GrantUsed(f"grant {row[0]} is {row[2]}; only the answer of a running one is stored")
            db.execute("UPDATE grants SET state = 'stored', key = NULL WHERE counter = ?", (row[1],))
            db.execute("INSERT INTO answers VALUES (?, ?, 0, ?)", (request, answer, _now()))

    def store_answer(self, request: str, answer: bytes) -> None:
        """Keeps the answer to a request that spends nothing; the same bytes again change nothing.

        Raises:
            GrantUsed: If the request has another answer, or a grant (then `store` it).
        """
        with self._transaction() as db:
            row = db.execute("SELECT answer FROM answers WHERE order_digest = ?", (request,)).fetchone()
            if row is not None:
                if bytes(row[0]) != answer:
                    raise GrantUsed(f"request {request[:12]} has another answer already; send that one again")
                return
            if db.execute(
                "SELECT 1 FROM grants WHERE order_digest = ? AND state != 'abandoned'", (request,)
            ).fetchone():
                raise GrantUsed(f"request {request[:12]} runs under a grant; its answer goes through store()")
            db.execute("INSERT INTO answers VALUES (?, ?, 0, ?)", (request, answer, _now()))

    def mark_sent(self, request: str) -> None:
        """Notes that the answer is handed over to be sent (stored -> sent); again changes nothing.

        Raises:
            GrantUsed: If the request has no stored answer.
        """
        with self._transaction() as db:
            if not db.execute("UPDATE answers SET sent = 1 WHERE order_digest = ?", (request,)).rowcount:
                raise GrantUsed(f"request {request[:12]} has no stored answer; an answer is stored before it is sent")
            db.execute("UPDATE grants SET state = 'sent' WHERE order_digest = ? AND state = 'stored'", (request,))

    def charge_without_guarantee(self, reason: str, run: str) -> bool:
        """Notes that something left without a mechanism: the data's epsilon is infinite from now on.

        Noted once for a run and a reason: a repeated request adds nothing to it.

        Returns:
            Whether this is the first of its run and reason.

        Raises:
            LedgerBehind: If the witness knows more than the file.
            ValueError: If no reason is given.
        """
        if not reason.strip():
            raise ValueError("a release without guarantee needs a reason: it is shown on every later report")
        known = self._known()
        with self._transaction() as db:
            self._check_witness(db, known)
            noted = "SELECT 1 FROM spent WHERE plan IS NULL AND run = ? AND reason = ?"
            first = db.execute(noted, (run, reason)).fetchone() is None
            if first:
                db.execute(
                    "INSERT INTO spent (run, rounds, drawn, reason, at) VALUES (?, 1, 1, ?, ?)", (run, reason, _now())
                )
            unknown = self._unknown(db, known)
        self._note(unknown, (run, reason))
        return first

    def waived(self, run: str) -> bool:
        """Whether a release without guarantee was noted in a run."""
        with self._transaction() as db:
            return db.execute("SELECT 1 FROM spent WHERE plan IS NULL AND run = ?", (run,)).fetchone() is not None

    def spent(self, run: str | None = None) -> tuple[float, float]:
        """(epsilon, delta) of all that was reserved, drawn or not; `inf` after an event without guarantee.

        By privacy loss distributions, as if all of it had been fixed in advance; `filtered` is what a cap is held to.

        Args:
            run: Only what this run reserved, in all its parts if it names none; the data's lifetime otherwise.
        """
        with self._transaction() as db:
            plans, private = self._reserved(db, run)
        delta = self._delta(plans)
        return (composed_epsilon(plans, delta) if private else math.inf), delta

    def filtered(self) -> float:
        """Epsilon at the delta of `spent` by the filter, whatever each plan was chosen after."""
        with self._transaction() as db:
            (plans, private), order = self._reserved(db, None), _order(db)
        return epsilon_at(used(plans, order), order, self._delta(plans)) if private else math.inf

    def missing(self, known: Sequence[Charge]) -> list[Charge]:
        """What a witness knows and this file does not."""
        with self._transaction() as db:
            return self._missing(db, known)

    def declare_lost(self, charges: Sequence[Charge], by: str) -> None:
        """Counts charges of which this file knows nothing as spent: one round of its plan for each grant.

        A grant of unknown plan takes the whole cap, now and at any later cap: epsilon is infinite. None of them runs
        again. What is known already changes nothing. A file of which nothing was spent takes over the order of the
        filter under which they were charged, where the witness knows it: no other one was fixed before them.

        Args:
            charges: From `missing`.
            by: Who declares it.
        """
        with self._transaction() as db:
            fixed = next((charge.filter for charge in charges if charge.filter in ORDERS), None)
            if fixed is not None and db.execute("SELECT 1 FROM spent").fetchone() is None:
                _fix_order(db, fixed)
            for charge in self._missing(db, charges):
                reason = f"loss declared by {by}"
                spent: tuple[str, str | None, str | None, str]
                if not charge.grant:
                    spent = (charge.run or LOST, None, None, charge.reason or f"release without guarantee, {reason}")
                elif charge.plan is None:
                    spent = (LOST, None, None, f"grant {charge.grant} of unknown plan, {reason}")
                else:
                    spent = (charge.run or LOST, _canonical(charge.plan.to_dict()), charge.plan.digest(), reason)
                known = "UPDATE grants SET state = 'abandoned', key = NULL WHERE id = ?"
                if charge.grant and db.execute(known, (charge.grant,)).rowcount:
                    continue  # paid for; what was stored of it is gone
                row = db.execute(
                    "INSERT INTO spent (run, plan, plan_digest, reason, rounds, drawn, at) "
                    "VALUES (?, ?, ?, ?, 1, 1, ?)",
                    (*spent, _now()),
                )
                if charge.grant:
                    digest = None if charge.plan is None else charge.plan.digest()
                    bound = {"order": charge.order, "plan": digest, "data": "", "model": "", "version": ""}
                    db.execute(
                        "INSERT INTO grants VALUES (?, ?, ?, ?, ?, 'abandoned', NULL, ?)",
                        (_next(db), charge.grant, row.lastrowid, charge.order, _canonical(bound), _now()),
                    )

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
        self._check_limits(db, replace(plan, rounds=rounds), run, budget)
        reserved = db.execute(
            "INSERT INTO spent (run, plan, plan_digest, rounds, drawn, at) VALUES (?, ?, ?, ?, 1, ?)",
            (run, _canonical(plan.to_dict()), plan.digest(), rounds, _now()),
        )
        assert reserved.lastrowid is not None
        return reserved.lastrowid

    def _limits(self, budget: Budget | None) -> list[tuple[Budget, int]]:
        """Every limit with its order: that of the cap was fixed with the account, that of another goes with it."""
        found = [] if self.cap is None else [(self.cap, self.order)]  # it may yet change: decided in the transaction
        return [*found, *((limit, order_for(limit)) for limit in (self.per_run, budget) if limit is not None)]

    def _check_limits(self, db: sqlite3.Connection, asked: DPPlan, run: str, budget: Budget | None) -> None:
        whole = run.split("/", 1)[0]
        for limit, order, of, what in (
            (self.cap, _order(db), None, f"the lifetime cap of data set {self.dataset!r}"),
            (self.per_run, None, whole, f"what policy.per_run allows run {whole!r} in all its arms and seeds"),
            (budget, None, run, f"the budget of run {run!r}"),
        ):
            if limit is None:
                continue
            plans, private = self._reserved(db, of)
            order = order or order_for(limit)
            if private and admits(limit, order, plans, asked):
                continue
            before, after = (
                epsilon_at(used(p, order), order, limit.delta) if private else math.inf
                for p in (plans, [*plans, asked])
            )
            raise BudgetExhausted(
                f"the {asked.rounds} round(s) asked would pass {what}, epsilon {limit.epsilon:g} at delta "
                f"{limit.delta:g}: by the filter of order {order}, which takes plans as chosen after seeing results, "
                f"the {len(plans)} plan(s) reserved stand at epsilon {before:.4g}, with what is asked at {after:.4g}"
                + ("" if private else "; something left without a guarantee, or at a cost that is not known")
            )

    def _reserved(self, db: sqlite3.Connection, run: str | None) -> tuple[list[DPPlan], bool]:
        """All plans with the rounds reserved of each, and whether nothing left without a guarantee.

        Args:
            db: The ledger.
            run: Its plans and those of its parts; None: all.
        """
        rows = db.execute(
            "SELECT plan, rounds FROM spent WHERE ?1 IS NULL OR run = ?1 OR substr(run, 1, length(?1) + 1) = ?1 || '/'",
            (run,),
        ).fetchall()
        plans = [replace(DPPlan.from_dict(json.loads(plan)), rounds=rounds) for plan, rounds in rows if plan]
        return plans, all(plan for plan, _ in rows)

    def _known(self) -> Sequence[Charge]:
        return [] if self._witness is None else self._witness.known()

    def _unknown(self, db: sqlite3.Connection, known: Sequence[Charge]) -> list[Charge]:
        """What this file knows and the witness does not."""
        if self._witness is None:
            return []
        stored, order = {charge.grant: charge.stored for charge in known if charge.grant}, _order(db)
        found = []
        for id, digest, state, run, plan in db.execute(
            "SELECT grants.id, order_digest, state, run, plan FROM grants JOIN spent ON spent.id = grants.spent "
            "ORDER BY counter"
        ):
            kept = state in ("stored", "sent")
            if id not in stored or (kept and not stored[id]):
                whole = None if plan is None else DPPlan.from_dict(json.loads(plan))
                found.append(Charge(run, id, digest, whole, stored=kept, filter=order))
        for run, reason in db.execute(
            "SELECT run, reason FROM spent WHERE plan IS NULL AND id NOT IN (SELECT spent FROM grants) ORDER BY id"
        ):
            if not any(not c.grant and c.run in ("", run) and c.reason in ("", reason) for c in known):
                found.append(Charge(run, reason=reason))
        return found

    def _note(self, unknown: Sequence[Charge], own: str | tuple[str, str] | None = None) -> None:
        """Has the witness write down charges that it does not know.

        Args:
            unknown: By `_unknown`.
            own: Id of the grant, or run and reason of the release, that was charged now: the last to be written.
        """
        if self._witness is None:
            return
        mine = [charge for charge in unknown if own in (charge.grant, (charge.run, charge.reason))]
        for charge in unknown:
            if charge not in mine:
                self._witness.saw(charge)
        for charge in mine:
            self._witness.note(charge)

    def _missing(self, db: sqlite3.Connection, known: Sequence[Charge]) -> list[Charge]:
        grants = dict(db.execute("SELECT id, state FROM grants").fetchall())
        return missing(known, grants, db.execute("SELECT run, reason FROM spent WHERE plan IS NULL").fetchall())

    def _check_witness(self, db: sqlite3.Connection, known: Sequence[Charge]) -> None:
        if known and (lost := self._missing(db, known)):
            grants = sum(bool(charge.grant) for charge in lost)
            raise LedgerBehind(
                f"the ledger {self.path} knows less than the audit trail: {grants} grant(s) and {len(lost) - grants} "
                f"release(s) without guarantee are not in it, the first of {lost[0].at or 'a day that is not known'}. "
                "It is an older copy, which would let what was spent since be spent again: nothing is answered. Put "
                "the newest one in its place; if that is lost, `fedsynth site declare-loss DIR` counts what is missing "
                "as spent"
            )

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
                meta = {
                    "schema": SCHEMA,
                    "dataset": self.dataset,
                    "mac_key": self._keys(0, "data"),
                    "order": order_for(self.cap),
                }
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


def _cap(budget: Budget) -> str:
    return _canonical({"epsilon": budget.epsilon, "delta": budget.delta})


def _order(db: sqlite3.Connection) -> int:
    """Of the filter: read anew each time, because another process may open the account under another cap."""
    return int(db.execute("SELECT value FROM meta WHERE name = 'order'").fetchone()[0])


def _fix_order(db: sqlite3.Connection, order: int) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES ('order', ?)", (order,))


def _next(db: sqlite3.Connection) -> int:
    """Number of the next grant."""
    return int(db.execute("SELECT COALESCE(MAX(counter), 0) + 1 FROM grants").fetchone()[0])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
