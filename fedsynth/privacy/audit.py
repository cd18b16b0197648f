"""Ledgers read by people: what is in one, whether it is consistent, and an export without secrets."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from fedsynth.privacy.ledger import SCHEMA, LedgerUnusable
from fedsynth.privacy.plan import Budget, DPPlan, composed_epsilon

# Neither keys nor answers are read.
_GRANTS = """SELECT counter, id, spent, order_digest, binding, state, key IS NOT NULL AS has_key, at
             FROM grants ORDER BY counter"""
_ANSWERS = "SELECT order_digest, LENGTH(answer) AS bytes, sent, at FROM answers ORDER BY order_digest"


def ledgers_in(place: Path) -> list[Path]:
    """The ledgers of a site or a run: a file itself, or all that lie below a folder (or beside it, in FOLDER.private).

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
        `dataset`, `schema`, `reservations`, `grants`, `answers` (order, bytes, sent), and what was spent: `epsilon`
        (None: something left without a guarantee), `delta`.

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
        raise LedgerUnusable(f"{path} is no ledger that can be read ({problem})") from problem
    for row in spent:
        row["plan"] = None if row["plan"] is None else json.loads(row["plan"])
    for row in grants:
        row["binding"] = json.loads(row["binding"])
    plans = [_reserved(row) for row in spent if row["plan"] is not None]
    delta = min((plan.delta for plan in plans), default=Budget.delta)
    private = all(row["plan"] is not None for row in spent)
    return {
        "path": str(path),
        "dataset": meta.get("dataset"),
        "schema": meta.get("schema"),
        "integrity": state,
        "reservations": spent,
        "grants": grants,
        "answers": answers,
        "epsilon": composed_epsilon(plans, delta) if private else None,
        "delta": delta,
    }


def _reserved(row: dict[str, Any]) -> DPPlan:
    return DPPlan.from_dict({**row["plan"], "rounds": row["rounds"]})


def problems(ledger: dict[str, Any]) -> list[str]:
    """What is inconsistent in the `contents` of a ledger; nothing where all is well.

    Each grant drew one round of its reservation, none is without one, what was answered has lost its key, orders are
    answered once, and plans are what their digests say.
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
            if drawn[id]:
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
