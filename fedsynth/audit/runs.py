"""The charges of a finished simulation against its statements: ledgers, grants, keys, released texts."""

from __future__ import annotations

import io
import json
import sqlite3
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from fedsynth.audit.layers import Finding
from fedsynth.corpus import Provenance
from fedsynth.federation.payload import corpus_from_parquet
from fedsynth.federation.run.directory import private_of
from fedsynth.privacy.audit import contents, problems
from fedsynth.privacy.claims import TOLERANCE
from fedsynth.privacy.plan import DPPlan, composed_epsilon
from fedsynth.privacy.statement import Spending, Statement
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.scenario.toml import cells
from fedsynth.typed import build

RELEASED = ("stored", "sent")


@dataclass(frozen=True)
class _Cell:
    """What a run left of one arm and seed.

    Attributes:
        name: Arm and seed.
        ledgers: By client.
        spending: By client, all that it has stated in its answers.
        silent: Clients whose spending the server does not know; the report of the run names them.
        named: Ids of grants that released texts name, by file.
        bare: Files of synthetic text that name no grant.
    """

    name: str
    ledgers: Mapping[int, dict[str, Any]]
    spending: Mapping[int, Spending]
    silent: frozenset[int]
    named: Mapping[str, tuple[str, ...]]
    bare: tuple[str, ...]

    @property
    def grants(self) -> list[dict[str, Any]]:
        """Of all clients."""
        return [grant for ledger in self.ledgers.values() for grant in ledger["grants"]]


def charged_records(run: Path, arm: str) -> int | None:
    """Units of the smallest client that an arm has charged; None if it has charged none."""
    found = [
        row["plan"]["records"]
        for path in sorted((private_of(run) / arm).rglob("ledger.sqlite"))
        for row in contents(path)["reservations"]
        if row["plan"] is not None
    ]
    return min(found, default=None)


def audit_charges(run: Path, scenario: Scenario) -> dict[str, tuple[Finding, ...]]:
    """The findings of each arm of a run.

    Args:
        run: The run's directory; the private one lies beside it.
        scenario: Its scenario.
    """
    privacy = _json(run / "privacy.json")
    found: dict[str, list[_Cell]] = {}
    for cell in cells(scenario):
        silent = privacy.get(cell.arm, {}).get("terms", {}).get("silent", [])
        found.setdefault(cell.arm, []).append(_read(run, cell, silent))
    return {arm: tuple(_findings(own, privacy.get(arm, {}))) for arm, own in found.items()}


def _read(run: Path, cell: Cell, silent: Sequence[Sequence[int]]) -> _Cell:
    place = private_of(run) / cell.arm / f"seed-{cell.seed}"
    seed = f"seed-{cell.seed}"
    paths = {int(path.parent.name.removeprefix("client-")): path for path in place.glob("client-*/ledger.sqlite")}
    ledgers = {client: contents(path) for client, path in sorted(paths.items())}
    answers = {client: list(_statements(path)) for client, path in paths.items()}
    spending = {
        client: reduce(Spending.and_, said[1:], Spending((said[0],))) for client, said in answers.items() if said
    }
    named, bare = {}, []
    for path in sorted((run / "corpora" / cell.arm / seed).glob("*.parquet")):
        corpus = corpus_from_parquet(path.read_bytes())
        named[path.name] = corpus.grants or ()
        if corpus.provenance is Provenance.DP_SYNTHETIC and not corpus.grants:
            bare.append(path.name)
    quiet = frozenset(client for seed_, client in silent if seed_ == cell.seed)
    return _Cell(f"{cell.arm}, seed {cell.seed}", ledgers, spending, quiet, named, tuple(bare))


def _statements(path: Path) -> Iterator[Statement]:
    """The statements in a ledger's stored answers."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        answers = [bytes(row[0]) for row in db.execute("SELECT answer FROM answers")]
    for answer in filter(lambda answer: zipfile.is_zipfile(io.BytesIO(answer)), answers):
        with zipfile.ZipFile(io.BytesIO(answer)) as archive:
            said = json.loads(archive.read("value.json"))["value"].get("statement")
        if said is not None:
            yield build(Statement, said)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _findings(cells: Sequence[_Cell], privacy: Mapping[str, Any]) -> Iterator[Finding]:
    grants = [grant for cell in cells for grant in cell.grants]
    clients = sum(len(cell.ledgers) for cell in cells)
    yield _told("ledgers", f"{clients} ledgers are consistent", _all(cells, _inconsistent))
    yield _told("steps", f"{len(grants)} grants and their steps are those of the statements", _all(cells, _steps))
    yield _told("epsilon", "no client spent more than it states", _all(cells, _epsilons))
    # A grant's id is a keyed hash under its key alone: equal ids are equal keys, and equal noise.
    ids = [grant["id"] for grant in grants]
    again = sorted({id for id in ids if ids.count(id) > 1}) if len(set(ids)) < len(ids) else []
    yield _told(
        "keys", f"{len(ids)} grants have {len(set(ids))} keys", [f"grant {id[:12]} has another's" for id in again]
    )
    yield _told("released", "released texts name paid grants", _all(cells, _released))
    yield _told("report", "privacy.json says no less than the clients", list(_report(cells, privacy)))


def _told(test: str, words: str, wrong: Sequence[str]) -> Finding:
    more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Finding("structural", test, f"{wrong[0]}{more}" if wrong else words, bool(wrong))


def _all(cells: Sequence[_Cell], check: Any) -> list[str]:
    return [f"{cell.name}, {wrong}" for cell in cells for wrong in check(cell)]


def _inconsistent(cell: _Cell) -> list[str]:
    return [f"client {client}: {wrong}" for client, ledger in cell.ledgers.items() for wrong in problems(ledger)]


@dataclass(frozen=True)
class _Charged:
    """Rounds of a plan in a ledger: reserved, and drawn by grants."""

    plan: DPPlan
    reserved: int
    drawn: int


def _charged(ledger: Mapping[str, Any]) -> list[_Charged]:
    """What a ledger has charged, plan by plan."""
    found: dict[str, _Charged] = {}
    for row in ledger["reservations"]:
        if row["plan"] is not None:
            plan = DPPlan.from_dict(row["plan"])
            before = found.get(plan.digest(), _Charged(plan, 0, 0))
            found[plan.digest()] = _Charged(plan, before.reserved + row["rounds"], before.drawn + row["drawn"])
    return list(found.values())


def _steps(cell: _Cell) -> Iterator[str]:
    """Each plan that ran is stated with the steps that were charged for it."""
    for client, ledger in cell.ledgers.items():
        own, charged = cell.spending.get(client), _charged(ledger)
        waived = any(row["plan"] is None for row in ledger["reservations"])
        if client in cell.silent:
            continue
        if own is None:
            if waived or any(each.drawn for each in charged):
                yield f"client {client} has charged and states nothing"
            continue
        if waived and own.guarantee != "none":
            yield f"client {client} released something without a guarantee and states one"
        if own.guarantee == "none":
            continue
        for each in charged:
            plan = each.plan
            kind = (plan.mechanism, plan.noise_multiplier, plan.sampling_rate)
            stated = [p.steps for p in own.parts if (p.mechanism, p.sigma, p.sampling_rate) == kind]
            steps = plan.steps * each.reserved
            if each.drawn and stated != [steps]:
                words = f"states {stated[0]} steps" if stated else "states nothing"
                yield (
                    f"client {client} {words} of {plan.mechanism} with noise {plan.noise_multiplier:g}, charged "
                    f"{steps}, {plan.steps * each.drawn} of them in grants"
                )


def _epsilons(cell: _Cell) -> Iterator[str]:
    """Epsilon of all that ran and was charged is no more than what the client states."""
    for client, ledger in cell.ledgers.items():
        said = cell.spending.get(client)
        if said is None or said.epsilon is None or client in cell.silent:
            continue
        true = composed_epsilon(
            [replace(each.plan, rounds=each.reserved) for each in _charged(ledger) if each.drawn], said.delta
        )
        if true > said.epsilon + TOLERANCE * max(1.0, true):
            yield f"client {client} states epsilon {said.epsilon:.3f}, its ledger has {true:.3f}"


def _released(cell: _Cell) -> Iterator[str]:
    """Each grant that a released text names is in a ledger of this arm and seed, and its answer is stored."""
    paid = {grant["id"] for grant in cell.grants if grant["state"] in RELEASED}
    for file, grants in cell.named.items():
        if unknown := set(grants) - paid:
            yield f"{file} names grant {min(unknown)[:12]}, of which no ledger has a stored answer"
    for file in cell.bare:
        yield f"{file} is called DP-synthetic and names no grant"


def _report(cells: Sequence[_Cell], privacy: Mapping[str, Any]) -> Iterator[str]:
    said = [said for cell in cells for client, said in cell.spending.items() if client not in cell.silent]
    if privacy.get("guarantee") == "dp" and any(each.guarantee == "none" for each in said):
        yield "privacy.json states a guarantee, and a client has none"
    largest = max((each.epsilon for each in said if each.epsilon is not None), default=0.0)
    shown = privacy.get("largest_over_clients", {}).get("epsilon")
    if shown is not None and not any(cell.grants for cell in cells):
        yield f"privacy.json says epsilon {shown:.4f}, and no ledger has a grant"
    if shown is not None and shown < largest - 1e-9:
        yield f"privacy.json says epsilon {shown:.4f}, a client states {largest:.4f}"
