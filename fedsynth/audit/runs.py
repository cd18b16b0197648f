"""The charges of a finished simulation against its statements: ledgers, grants, keys, released texts."""

from __future__ import annotations

import io
import json
import math
import sqlite3
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsynth.audit.layers import Finding
from fedsynth.corpus import Provenance
from fedsynth.federation.payload import corpus_from_parquet
from fedsynth.federation.run.directory import private_of
from fedsynth.privacy.audit import contents, problems
from fedsynth.privacy.claims import TOLERANCE
from fedsynth.privacy.plan import DPPlan, Statement, composed_epsilon
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
        statements: By client, the largest that it has answered with.
        silent: Clients whose spending the server does not know; the report of the run names them.
        named: Ids of grants that released texts name, by file.
        bare: Files of synthetic text that name no grant.
    """

    name: str
    ledgers: Mapping[int, dict[str, Any]]
    statements: Mapping[int, Statement]
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
    statements = {client: max(said, key=_spends) for client, said in answers.items() if said}
    named, bare = {}, []
    for path in sorted((run / "corpora" / cell.arm / seed).glob("*.parquet")):
        corpus = corpus_from_parquet(path.read_bytes())
        named[path.name] = corpus.grants or ()
        if corpus.provenance is Provenance.DP_SYNTHETIC and not corpus.grants:
            bare.append(path.name)
    quiet = frozenset(client for seed_, client in silent if seed_ == cell.seed)
    return _Cell(f"{cell.arm}, seed {cell.seed}", ledgers, statements, quiet, named, tuple(bare))


def _statements(path: Path) -> Iterator[Statement]:
    """The statements in a ledger's stored answers."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        answers = [bytes(row[0]) for row in db.execute("SELECT answer FROM answers")]
    for answer in filter(lambda answer: zipfile.is_zipfile(io.BytesIO(answer)), answers):
        with zipfile.ZipFile(io.BytesIO(answer)) as archive:
            said = json.loads(archive.read("value.json"))["value"].get("statement")
        if said is not None:
            yield build(Statement, said)


def _spends(said: Statement) -> float:
    return math.inf if said.epsilon is None else said.epsilon


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


def _plans(ledger: Mapping[str, Any]) -> list[tuple[DPPlan, int]]:
    """The plans that were charged, each with its rounds."""
    return [
        (DPPlan.from_dict(row["plan"]), int(row["rounds"])) for row in ledger["reservations"] if row["plan"] is not None
    ]


def _steps(cell: _Cell) -> Iterator[str]:
    """A statement's steps are those charged, and no fewer than those of the grants."""
    for client, ledger in cell.ledgers.items():
        said, plans = cell.statements.get(client), _plans(ledger)
        spent = bool(plans) or any(row["plan"] is None for row in ledger["reservations"])
        if said is None:
            if spent and client not in cell.silent:
                yield f"client {client} has charged and states nothing"
            continue
        if any(row["plan"] is None for row in ledger["reservations"]) and said.guarantee != "none":
            yield f"client {client} released something without a guarantee and states one"
        if said.guarantee == "none" or client in cell.silent:
            continue
        own = [(plan, rounds) for plan, rounds in plans if plan.noise_multiplier == said.sigma]
        charged = sum(plan.steps * rounds for plan, rounds in own)
        drawn = sum(
            row["plan"]["steps"] * row["drawn"]
            for row in ledger["reservations"]
            if row["plan"] is not None and row["plan"]["noise_multiplier"] == said.sigma
        )
        if not drawn <= charged == said.steps:
            yield f"client {client} states {said.steps} steps, charged {charged}, {drawn} of them in grants"
        rates = {plan.sampling_rate for plan, _ in own}
        if rates and said.sampling_rate not in rates:
            yield f"client {client} states a sampling rate of {said.sampling_rate}, charged {sorted(rates)}"


def _epsilons(cell: _Cell) -> Iterator[str]:
    """Epsilon of all that a ledger charged is no more than what the client states."""
    for client, ledger in cell.ledgers.items():
        said = cell.statements.get(client)
        if said is None or said.epsilon is None or client in cell.silent:
            continue
        plans = [DPPlan.from_dict({**plan.to_dict(), "rounds": rounds}) for plan, rounds in _plans(ledger)]
        true = composed_epsilon(plans, said.delta)
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
    said = [said for cell in cells for client, said in cell.statements.items() if client not in cell.silent]
    if privacy.get("guarantee") == "dp" and any(each.guarantee == "none" for each in said):
        yield "privacy.json states a guarantee, and a client has none"
    largest = max((each.epsilon for each in said if each.epsilon is not None), default=0.0)
    shown = privacy.get("largest_over_clients", {}).get("epsilon")
    if shown is not None and not any(cell.grants for cell in cells):
        yield f"privacy.json says epsilon {shown:.4f}, and no ledger has a grant"
    if shown is not None and shown < largest - 1e-9:
        yield f"privacy.json says epsilon {shown:.4f}, a client states {largest:.4f}"
