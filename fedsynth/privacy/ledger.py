"""The durable account of one data set: what was spent on it, by which grant, and what was answered."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedsynth.privacy.caps import Account, reserved
from fedsynth.privacy.filter import admits, epsilon_at, order_for, used
from fedsynth.privacy.ledger_file import LedgerFile, canonical, fix_order, next_counter, now, order_of
from fedsynth.privacy.noise import GrantRandomness, site_key
from fedsynth.privacy.plan import Budget, DPPlan, composed_epsilon
from fedsynth.privacy.witness import Charge, Witness, check_witness, count_lost, missing, tell, unknown


class GrantUsed(RuntimeError):
    """A grant was to be used twice, or out of turn."""


@dataclass(frozen=True)
class Binding:
    """The facts that a grant holds for: if one of them changes, it is another grant.

    Attributes:
        order: Digest of the request; the ledgers on disk call it so.
        plan: `DPPlan.digest()`.
        data: Keyed MAC of the data (`data_mac` with the ledger's `mac_key`).
        model: Hash of the model's weights.
        version: The software's version.
    """

    order: str
    plan: str
    data: str
    model: str
    version: str

    def digest(self) -> str:
        """SHA-256 (hex) of the binding as canonical JSON."""
        return hashlib.sha256(canonical(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class Grant:
    """Leave to run one round of a plan once. Holds no secret.

    Attributes:
        id: Public; texts and adapters carry it.
        counter: Number of the grant in its ledger, from 1.
        plan: The whole plan; the grant is for one of its rounds.
        binding: The facts that it holds for.
    """

    id: str
    counter: int
    plan: DPPlan
    binding: Binding


def _site_keys(counter: int, binding: str) -> bytes:
    """Fresh randomness whatever is asked: see `site_key`."""
    del counter, binding
    return site_key()


@dataclass(frozen=True)
class Opening:
    """How a ledger is opened.

    Attributes:
        create: Make the file if there is none; else that is an error: an account that is gone must not begin anew.
        behind: Open it although the witness knows more: to declare the loss. It charges nothing until that is done.
        durable: A commit survives a power cut. Simulations do without: then it survives the death of any process, and
            costs a third.
    """

    create: bool = True
    behind: bool = False
    durable: bool = True


class Ledger:
    """One SQLite file per declared data set; lies outside run directories and is never reset.

    States of a grant: reserved -> running -> stored -> sent; abandoned where the request came again with something
    bound changed. A charge is never given back. Every change is one committed transaction. The caller
    serialises requests per site with a file lock, so a grant found running while charging means a crash.

    A next request may depend on earlier releases, so a Rényi filter (`fedsynth.privacy.filter`) guards the
    cap. Its order follows from the cap as long as nothing is spent; with the first charge it is fixed, and stays when
    the cap is changed.

    With a witness, what was charged is written down there too: after the commit, before the grant is handed out. So a
    crash between the two leaves a grant that never ran, and what ran is known in two places. Charges of others on
    the same file, each with a witness of its own, are written down with it, and by `tell_witness`.

    Args:
        path: The file; made (mode 0600) if there is none. An empty or damaged file is refused, not replaced.
        account: Its declared facts.
        witness: Remembers charges in another file; a ledger that lacks one of them is not opened.
        keys: Key of a grant by (counter, binding digest), and of the data MAC by (0, "data"). Sites keep the
            default; simulations pass `simulated_key` of their run and client.
        opening: How its file is opened.

    Raises:
        LedgerUnusable: If the file is another data set's, of another schema, or damaged.
        LedgerBehind: If the witness knows more than the file.
    """

    def __init__(
        self,
        path: Path,
        account: Account,
        *,
        witness: Witness | None = None,
        keys: Callable[[int, str], bytes] = _site_keys,
        opening: Opening = Opening(),
    ) -> None:
        self.path = path
        self.account = account
        self._witness = witness
        self._keys = keys
        self._file = LedgerFile(path, durable=opening.durable)
        self._transaction = self._file.transaction
        order = order_for(account.cap)
        if not path.exists():
            if not opening.create:
                raise self._file.unusable("it is gone")
            self._file.create({"dataset": account.dataset, "mac_key": keys(0, "data"), "order": order})
        os.chmod(path, 0o600)  # a copy from a backup may have come with wider access
        known = self._known()
        with self._transaction() as db:
            meta = self._file.check(db, account.dataset)
            if not opening.behind:
                check_witness(path, db, known)
            spent = bool(known) or db.execute("SELECT 1 FROM spent").fetchone() is not None
            # Without one it was made before there was a filter; while nothing is spent, nothing was seen either.
            if "order" not in meta or (not spent and meta["order"] != order):
                fix_order(db, order)
            if account.cap is not None and meta.get("cap") != _cap(account.cap):  # for who reads the file alone
                db.execute("INSERT OR REPLACE INTO meta VALUES ('cap', ?)", (_cap(account.cap),))

    @property
    def order(self) -> int:
        """Rényi order of the filter."""
        with self._transaction() as db:
            return order_of(db)

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
        """True if the answer to a request was handed over to be sent."""
        with self._transaction() as db:
            row = db.execute("SELECT sent FROM answers WHERE order_digest = ?", (request,)).fetchone()
        return row is not None and bool(row[0])

    def charge(
        self,
        plan: DPPlan,
        binding: Binding,
        run: str,
        *,
        budget: Budget | None = None,
        beside: Sequence[DPPlan] = (),
    ) -> Grant:
        """Pays for one round of a plan before any private text is opened.

        The first charge of (run, plan) reserves all its rounds; later rounds draw from that. A round beyond them,
        and a retry of a request of which anything bound has changed, reserve one more round. An unfinished grant of
        the same request and binding (a crash before "stored") is handed out again, and costs nothing.

        Args:
            plan: The run's plan.
            binding: The facts that the grant holds for.
            run: Public id of the run; what follows a slash names a part of it (arm, seed).
            budget: That part's budget; a request too many would pass it even where it leaves the lifetime cap intact.
            beside: Plans of later requests of the run. The first charge reserves their rounds with its own, as all of
                them were fixed together, before any release.

        Raises:
            BudgetExhausted: If the lifetime cap, `per_run` or the budget would be passed; nothing is written then.
            GrantUsed: If the request has an answer already: send that.
            LedgerBehind: If the witness knows more than the file.
            ValueError: If the binding is another plan's.
        """
        if binding.plan != plan.digest():
            raise ValueError(f"the binding names plan {binding.plan[:12]}, the plan to charge is {plan.digest()[:12]}")
        own = 0 if self.account.cap is None else self.order  # it may yet change: decided in the transaction
        for limit, order in self.account.limits(budget, own):
            admits(limit, order, [], [plan, *beside])  # what takes seconds is known before others are kept waiting
        known = self._known()
        with self._transaction() as db:
            check_witness(self.path, db, known)
            grant = self._grant(db, plan, binding, run, budget, beside)
            untold = self._untold(db, known)
        self._tell(untold, grant.id)
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
            check_witness(self.path, db, known)
            untold = self._untold(db, known)
        self._tell(untold)

    def _grant(
        self,
        db: sqlite3.Connection,
        plan: DPPlan,
        binding: Binding,
        run: str,
        budget: Budget | None,
        beside: Sequence[DPPlan],
    ) -> Grant:
        if db.execute("SELECT 1 FROM answers WHERE order_digest = ?", (binding.order,)).fetchone():
            raise GrantUsed(f"request {binding.order[:12]} has been answered; send the stored answer again")
        unfinished = db.execute(
            "SELECT counter, id, binding FROM grants WHERE order_digest = ? AND state IN ('reserved', 'running')",
            (binding.order,),
        ).fetchone()
        if unfinished is not None:
            counter, id, bound = unfinished
            if bound == canonical(asdict(binding)):
                db.execute("UPDATE grants SET state = 'reserved' WHERE counter = ?", (counter,))
                return Grant(id, counter, plan, binding)
            db.execute("UPDATE grants SET state = 'abandoned', key = NULL WHERE counter = ?", (counter,))
        spent = self._draw(db, plan, run, budget, beside, retry=unfinished is not None)
        counter = next_counter(db)
        key = self._keys(counter, binding.digest())
        # A public name from a secret: random where keys are, and the same again where a simulation is repeated.
        id = hmac.new(key, b"grant id", hashlib.sha256).hexdigest()[:32]
        db.execute(
            "INSERT INTO grants VALUES (?, ?, ?, ?, ?, 'reserved', ?, ?)",
            (counter, id, spent, binding.order, canonical(asdict(binding)), key, now()),
        )
        return Grant(id, counter, plan, binding)

    def rounds(self, run: str, plan: DPPlan) -> int:
        """Rounds of a plan that a run has reserved: more than the plan's after one beyond them, or a changed retry."""
        with self._transaction() as db:
            [found] = db.execute(
                "SELECT COALESCE(SUM(rounds), 0) FROM spent WHERE run = ? AND plan_digest = ?", (run, plan.digest())
            ).fetchone()
        return int(found)

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
            if row is None or row[1] != canonical(asdict(grant.binding)) or json.loads(row[2]) != grant.plan.to_dict():
                raise GrantUsed(f"grant {grant.id} is not of the ledger of data set {self.account.dataset!r}")
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
            grant_or_request: The grant or request that the answer is for.
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
                db.execute("INSERT INTO answers VALUES (?, ?, 0, ?)", (request, answer, now()))
                return
            if row is None or (isinstance(grant_or_request, Grant) and row[0] != grant_or_request.id):
                raise GrantUsed(
                    f"request {request[:12]} has no such grant in the ledger of data set {self.account.dataset!r}"
                )
            if row[2] != "running":
                raise GrantUsed(f"grant {row[0]} is {row[2]}; only the answer of a running one is stored")
            db.execute("UPDATE grants SET state = 'stored', key = NULL WHERE counter = ?", (row[1],))
            db.execute("INSERT INTO answers VALUES (?, ?, 0, ?)", (request, answer, now()))

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
            db.execute("INSERT INTO answers VALUES (?, ?, 0, ?)", (request, answer, now()))

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
            True for the first of its run and reason.

        Raises:
            LedgerBehind: If the witness knows more than the file.
            ValueError: If no reason is given.
        """
        if not reason.strip():
            raise ValueError("a release without guarantee needs a reason: it is shown on every later report")
        known = self._known()
        with self._transaction() as db:
            check_witness(self.path, db, known)
            noted = "SELECT 1 FROM spent WHERE plan IS NULL AND run = ? AND reason = ?"
            first = db.execute(noted, (run, reason)).fetchone() is None
            if first:
                db.execute(
                    "INSERT INTO spent (run, rounds, drawn, reason, at) VALUES (?, 1, 1, ?, ?)", (run, reason, now())
                )
            untold = self._untold(db, known)
        self._tell(untold, (run, reason))
        return first

    def waived(self, run: str) -> bool:
        """True if a release without guarantee was noted in a run."""
        with self._transaction() as db:
            return db.execute("SELECT 1 FROM spent WHERE plan IS NULL AND run = ?", (run,)).fetchone() is not None

    def spent(self, run: str | None = None) -> tuple[float, float]:
        """(epsilon, delta) of all that was reserved, drawn or not; `inf` after an event without guarantee.

        By privacy loss distributions, as if all of it had been fixed in advance; `filtered` is what a cap is held to.

        Args:
            run: Only what this run reserved, in all its parts if it names none; the data's lifetime otherwise.
        """
        with self._transaction() as db:
            plans, private = reserved(db, run)
        delta = self.account.delta(plans)
        return (composed_epsilon(plans, delta) if private else math.inf), delta

    def filtered(self) -> float:
        """Epsilon at the delta of `spent` by the filter, whatever each plan was chosen after."""
        with self._transaction() as db:
            (plans, private), order = reserved(db, None), order_of(db)
        return epsilon_at(used(plans, order), order, self.account.delta(plans)) if private else math.inf

    def missing(self, known: Sequence[Charge]) -> list[Charge]:
        """Charges that a witness knows and this file does not."""
        with self._transaction() as db:
            return missing(db, known)

    def declare_lost(self, charges: Sequence[Charge], by: str) -> None:
        """Counts charges of which this file knows nothing as spent: one round of its plan for each grant.

        A grant of unknown plan takes the whole cap, now and at any later cap: epsilon is infinite. None of them runs
        again. Known charges change nothing. A file of which nothing was spent takes over the order of the
        filter under which they were charged, where the witness knows it: no other one was fixed before them.

        Args:
            charges: From `missing`.
            by: The person who declares it.
        """
        with self._transaction() as db:
            count_lost(db, charges, by)

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

    def _draw(
        self,
        db: sqlite3.Connection,
        plan: DPPlan,
        run: str,
        budget: Budget | None,
        beside: Sequence[DPPlan],
        *,
        retry: bool,
    ) -> int:
        """The reservation that pays for one round, made if need be, and with it those of the plans beside it."""
        rows = db.execute(
            "SELECT id, rounds - drawn FROM spent WHERE run = ? AND plan_digest = ? ORDER BY id", (run, plan.digest())
        ).fetchall()
        # A retry leaves the rounds to come their reservation: what cannot be paid is refused now, not at the end.
        left = [] if retry else [id for id, remaining in rows if remaining > 0]
        if left:
            db.execute("UPDATE spent SET drawn = drawn + 1 WHERE id = ?", (left[0],))
            return int(left[0])
        rounds = 1 if rows else plan.rounds
        later = [] if rows else [each for each in beside if not self._reserved(db, each, run)]
        self.account.check(db, [replace(plan, rounds=rounds), *later], run, budget)
        for each in later:
            self._reserve(db, each, run, each.rounds, drawn=0)
        return self._reserve(db, plan, run, rounds, drawn=1)

    @staticmethod
    def _reserved(db: sqlite3.Connection, plan: DPPlan, run: str) -> bool:
        found = db.execute("SELECT 1 FROM spent WHERE run = ? AND plan_digest = ?", (run, plan.digest()))
        return found.fetchone() is not None

    @staticmethod
    def _reserve(db: sqlite3.Connection, plan: DPPlan, run: str, rounds: int, *, drawn: int) -> int:
        made = db.execute(
            "INSERT INTO spent (run, plan, plan_digest, rounds, drawn, at) VALUES (?, ?, ?, ?, ?, ?)",
            (run, canonical(plan.to_dict()), plan.digest(), rounds, drawn, now()),
        )
        assert made.lastrowid is not None
        return made.lastrowid

    def _known(self) -> Sequence[Charge]:
        return [] if self._witness is None else self._witness.known()

    def _untold(self, db: sqlite3.Connection, known: Sequence[Charge]) -> list[Charge]:
        """Charges that the witness, if there is one, does not know."""
        return [] if self._witness is None else unknown(db, known)

    def _tell(self, untold: Sequence[Charge], own: str | tuple[str, str] | None = None) -> None:
        if self._witness is not None:
            tell(self._witness, untold, own)


def _cap(budget: Budget) -> str:
    return canonical({"epsilon": budget.epsilon, "delta": budget.delta})
