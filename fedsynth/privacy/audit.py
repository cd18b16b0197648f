"""Ledgers for people to read: the contents of one, its inconsistencies, and an export without secrets."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from fedsynth.privacy.filter import epsilon_at, room, used
from fedsynth.privacy.ledger_file import SCHEMA, LedgerUnusable
from fedsynth.privacy.plan import Budget, DPPlan, composed_epsilon

# Neither keys nor answers are read.
_GRANTS = """SELECT counter, id, spent, order_digest, binding, state, key IS NOT NULL AS has_key, at
             FROM grants ORDER BY counter"""
_ANSWERS = "SELECT order_digest, LENGTH(answer) AS bytes, sent, at FROM answers ORDER BY order_digest"


def ledgers_in(place: Path) -> list[Path]:
    """The ledgers of a site or a run: a file itself, or all below a folder (or beside it, in FOLDER.private).

    Raises:
        LedgerUnusable: If there is none.
    """
    if place.is_file():
        return [place]
    folders = [place, place.with_name(f"{place.name}.private")]
    found = sorted({path for folder in folders if folder.is_dir() for path in folder.rglob("ledger.sqlite")})
    if not found:
        raise LedgerUnusable(f"no ledger in {place}: name a ledger's file, a site's folder, or a run's directory")
    return found


def contents(path: Path) -> dict[str, Any]:
    """A ledger in plain words, without keys and answers; the file is only read.

    Returns:
        `dataset`, `schema`, `reservations`, `grants`, `answers` (order, bytes, sent), the `cap` at the last opening
        (None: none), and the spending at `delta`: `epsilon` by privacy loss distributions, as if all plans had been
        fixed in advance (None: something left without a guarantee, or a loss was declared whose plan is not known);
        `filter`: its `order`, RDP `used` and `room` under the cap, the `epsilon` that this is, and `closed`, true if
        the account admits no further plan (None: not opened since filters exist, or as for `epsilon`).

    Raises:
        LedgerUnusable: If the file is not a ledger, or cannot be read.
    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            db.row_factory = sqlite3.Row
            meta = dict(db.execute("SELECT name, value FROM meta WHERE name != 'mac_key'").fetchall())
            spent = [dict(row) for row in db.execute("SELECT * FROM spent ORDER BY id")]
            grants = [dict(row) for row in db.execute(_GRANTS)]
            answers = [dict(row) for row in db.execute(_ANSWERS)]
            state = [row[0] for row in db.execute("PRAGMA integrity_check")]
    except sqlite3.Error as problem:
        if _half_written(path, problem):
            raise LedgerUnusable(
                f"{path} was being written by a process that was killed; {path.name}-journal beside it undoes the half "
                "of it. Nothing that was charged or stored is lost. The next order, `fedsynth site check` or resumed "
                f"run undoes it, or now `fedsynth ledger verify --recover {path}`. Never delete the journal; copy both"
            ) from problem
        raise LedgerUnusable(f"{path} is no ledger that can be read ({problem})") from problem
    for row in spent:
        row["plan"] = None if row["plan"] is None else json.loads(row["plan"])
    for row in grants:
        row["binding"] = json.loads(row["binding"])
    plans = [_reserved(row) for row in spent if row["plan"] is not None]
    cap = Budget(**json.loads(meta["cap"])) if "cap" in meta else None
    delta = min((plan.delta for plan in plans), default=Budget.delta) if cap is None else cap.delta
    private = all(row["plan"] is not None for row in spent)
    return {
        "path": str(path),
        "dataset": meta.get("dataset"),
        "schema": meta.get("schema"),
        "integrity": state,
        "reservations": spent,
        "grants": grants,
        "answers": answers,
        "cap": None if cap is None else {"epsilon": cap.epsilon, "delta": cap.delta},
        "epsilon": composed_epsilon(plans, delta) if private else None,
        "delta": delta,
        "filter": _filter(plans, cap, int(meta["order"]), delta) if private and "order" in meta else None,
    }


def last_cap(path: Path) -> Budget | None:
    """The lifetime budget at the last opening of a ledger; None if it is not known."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            found = db.execute("SELECT value FROM meta WHERE name = 'cap'").fetchone()
    except sqlite3.Error:  # opening the ledger reports it
        return None
    return None if found is None else Budget(**json.loads(found[0]))


def _half_written(path: Path, problem: sqlite3.Error) -> bool:
    """True if a ledger could not be read because reading would first undo the change in its journal, which writes."""
    primary = getattr(problem, "sqlite_errorcode", 0) & 0xFF
    return primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) and _journal(path).exists()


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")


def recover(path: Path) -> bool:
    """Undoes the uncommitted change of a killed process, as the next charge would.

    Returns:
        True if there was anything to undo.

    Raises:
        LedgerUnusable: If the file cannot be written, or is no ledger.
    """
    left = _journal(path).exists()
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as db:
            db.execute("SELECT COUNT(*) FROM meta")  # the first read undoes
    except sqlite3.Error as problem:
        raise LedgerUnusable(f"{path} cannot be put right by this user ({problem})") from problem
    return left and not _journal(path).exists()


def _filter(plans: list[DPPlan], cap: Budget | None, order: int, delta: float) -> dict[str, Any]:
    spent, most = used(plans, order), None if cap is None else room(cap, order)
    return {
        "order": order,
        "used": spent,
        "room": most,
        "epsilon": epsilon_at(spent, order, delta),
        "closed": most is not None and bool(plans) and spent >= most,
    }


def _reserved(row: dict[str, Any]) -> DPPlan:
    return DPPlan.from_dict({**row["plan"], "rounds": row["rounds"]})


def problems(ledger: dict[str, Any]) -> list[str]:
    """The inconsistencies in the `contents` of a ledger; nothing if all is well.

    Each grant drew one round of its reservation and has one, answered grants have lost their keys, each order has one
    answer, and plans match their digests.
    """
    return list(_problems(ledger))


def _problems(ledger: dict[str, Any]) -> Iterator[str]:
    if ledger["integrity"] != ["ok"]:
        yield f"SQLite finds the file damaged: {ledger['integrity'][0]}"
    if ledger["schema"] != SCHEMA:
        yield f"schema {ledger['schema']}, this software reads {SCHEMA}"
    reservations = {row["id"]: row for row in ledger["reservations"]}
    drawn = Counter(grant["spent"] for grant in ledger["grants"])
    for id, row in reservations.items():
        if row["plan"] is None:
            if any(grant["spent"] == id and grant["state"] != "abandoned" for grant in ledger["grants"]):
                yield f"release {id} without a guarantee has grants"
            continue
        if row["plan_digest"] != DPPlan.from_dict(row["plan"]).digest():
            yield f"reservation {id}: the plan is not the one of its digest"
        if row["drawn"] != drawn[id]:
            yield f"reservation {id} counts {row['drawn']} drawn rounds, {drawn[id]} grants hold one"
        if row["drawn"] > row["rounds"]:
            yield f"reservation {id} was drawn {row['drawn']} times and has {row['rounds']} rounds"
    answered = {answer["order_digest"] for answer in ledger["answers"]}
    for grant in ledger["grants"]:
        name = f"grant {grant['counter']}"
        if grant["spent"] not in reservations:
            yield f"{name} belongs to no reservation"
        elif grant["binding"]["plan"] != reservations[grant["spent"]]["plan_digest"]:
            yield f"{name} is bound to another plan than it was paid for"
        if bool(grant["has_key"]) != (grant["state"] in ("reserved", "running")):
            yield f"{name} is {grant['state']} and {'still has' if grant['has_key'] else 'has lost'} its key"
        if (grant["state"] in ("stored", "sent")) != (
            grant["order_digest"] in answered and grant["state"] != "abandoned"
        ):
            has = "an" if grant["order_digest"] in answered else "no"
            yield f"{name} is {grant['state']}, its order has {has} answer"
    counters = [grant["counter"] for grant in ledger["grants"]]
    if counters != list(range(1, len(counters) + 1)):
        yield f"grants are numbered {counters}, some are missing"
    live = Counter(grant["order_digest"] for grant in ledger["grants"] if grant["state"] != "abandoned")
    for order, count in live.items():
        if count > 1:
            yield f"order {order[:12]} has {count} grants"
