"""The audit of a scenario or of a simulation: mechanisms on canaries, and charges against statements."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedsynth.audit.layers import CONFIDENCE, Bound, Finding, examined, violations
from fedsynth.audit.mechanisms import CANARIES, Audited, evidence
from fedsynth.audit.runs import audit_charges, charged_records
from fedsynth.clients.client_side import declared_records
from fedsynth.federation.run.directory import private_of
from fedsynth.federation.strategy import Planner, load_strategy
from fedsynth.privacy.plan import BudgetTooSmall
from fedsynth.scenario.client import Client
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.scenario.toml import cells, from_toml, load
from fedsynth.simulation.flower import DEPLOYMENT
from fedsynth.typed import BadValue, plain


@dataclass(frozen=True)
class MechanismAudit:
    """What was found of one mechanism.

    Attributes:
        mechanism: What gets the noise.
        arms: Arms that have it.
        epsilon: As its statement says.
        delta: Likewise.
        canaries: Number of canaries.
        seconds: Time of the audit.
        findings: One for each test.
        bound: The one-run bound.
    """

    mechanism: str
    arms: tuple[str, ...]
    epsilon: float
    delta: float
    canaries: int
    seconds: float
    findings: tuple[Finding, ...]
    bound: Bound


@dataclass(frozen=True)
class Audit:
    """The audit of a scenario, or of a run.

    Attributes:
        name: Of the scenario.
        seed: Of keys and coins: the same audit again.
        mechanisms: What was found of each mechanism.
        charges: Of a run: what was found of each arm's ledgers and statements.
        left_out: Arms without anything to audit, and the reason.
    """

    name: str
    seed: int
    mechanisms: tuple[MechanismAudit, ...]
    charges: Mapping[str, tuple[Finding, ...]]
    left_out: Mapping[str, str]

    @property
    def violations(self) -> list[tuple[str, Finding]]:
        """Each violation with what it is of."""
        found = [(each.mechanism, finding) for each in self.mechanisms for finding in violations(each.findings)]
        return [*found, *((arm, finding) for arm, own in self.charges.items() for finding in violations(own))]

    def to_dict(self) -> dict[str, Any]:
        """The JSON that `--json` writes."""
        return {**plain(asdict(self)), "confidence": CONFIDENCE, "violated": bool(self.violations)}


def audit(asked: str, *, seed: int, canaries: int = CANARIES, tell: Callable[[str], None] = lambda _: None) -> Audit:
    """Audits a scenario (a file, or a shipped one by name), or a simulation's directory.

    Args:
        asked: Which.
        seed: Seed of keys and coins; another one each time but to repeat an audit.
        canaries: Number of canaries of each mechanism.
        tell: Called with a line on each step.

    Raises:
        BadValue: If it is something else, such as a site's folder or a run on real sites.
    """
    place = Path(asked)
    run = place if place.exists() and place.suffix != ".toml" else None
    if run is not None:
        _check_simulation(run)
        scenario = from_toml((run / "scenario.toml").read_text(encoding="utf-8"), str(run / "scenario.toml"))
    else:
        scenario = load(asked)
    found, left_out = mechanisms(scenario, _counted(scenario) if run is None else _charged(run))
    made = []
    for each in found:
        tell(f"{each.mechanism} of {', '.join(each.arms)}: {canaries:,} canaries")
        made.append(audit_mechanism(each, seed, canaries=canaries, audits=len(found)))
    charges = {} if run is None else audit_charges(run, scenario)
    if not found and not charges:
        reasons = "; ".join(f"{arm}: {why}" for arm, why in left_out.items())
        raise BadValue(f"{asked}: no arm has a mechanism to audit ({reasons})")
    return Audit(scenario.name, seed, tuple(made), charges, left_out)


def audit_mechanism(audited: Audited, seed: int, *, canaries: int = CANARIES, audits: int = 1) -> MechanismAudit:
    """Audits one mechanism.

    Args:
        audited: The mechanism.
        seed: Seed of keys and coins.
        canaries: Number of canaries.
        audits: Number of mechanisms that share the error of an audit.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedsynth-audit-") as folder:
        seen = evidence(audited, seed, Path(folder), canaries)
    findings, bound = examined(seen, audits)
    return MechanismAudit(
        audited.mechanism,
        audited.arms,
        float(seen.stated.epsilon or 0.0),
        seen.stated.delta,
        len(seen.coins),
        time.perf_counter() - started,
        tuple(findings),
        bound,
    )


def mechanisms(scenario: Scenario, records: Callable[[Cell], int | None]) -> tuple[list[Audited], dict[str, str]]:
    """The different mechanisms of a scenario's arms, and the arms that have none, with the reason.

    Args:
        scenario: The scenario, with the arms that run.
        records: Number of units of an arm's smallest client, which the largest sampling rate follows from; None if
            nothing was charged.

    Raises:
        BadValue: If a budget allows no plan.
    """
    found: dict[tuple[Any, ...], Audited] = {}
    left_out = {}
    for cell in cells(replace(scenario, seeds=scenario.seeds[:1])):
        client = cell.scenario.client.of(0)
        kind, options = load_strategy(cell.scenario.strategy)
        if client.guarantee == "none" or cell.scenario.data.pooled:
            left_out[cell.arm] = "it gives no guarantee"
        elif not kind.spends(options):
            left_out[cell.arm] = "nothing private leaves a client"
        elif (units := records(cell)) is None:
            left_out[cell.arm] = "nothing was charged"
        else:
            for planner in kind.planners(options, client):
                own = _audited(cell, client, planner, units)
                training = own.training
                key = (own.plan, own.rounds, client.secure_sum, None if training is None else training.clipping)
                before = found[key].arms if key in found else ()
                found[key] = replace(own, arms=(*before, cell.arm))
    return list(found.values()), left_out


def _audited(cell: Cell, client: Client, planner: Planner, units: int) -> Audited:
    """The mechanism that a planner is for.

    Raises:
        BadValue: If the budget allows no plan.
    """
    try:
        plan = planner(units, cell.scenario.rounds)
    except BudgetTooSmall as problem:
        raise BadValue(f"arm {cell.arm!r}: {problem}") from problem
    if plan.mechanism != "gradients":
        return Audited((cell.arm,), client, plan, cell.scenario.rounds)
    if planner == client.score_plan:  # a scorer is trained once; its scores in later rounds are post-processing
        return Audited((cell.arm,), client, plan, 1, client.scorer_training)
    return Audited((cell.arm,), client, plan, cell.scenario.rounds, client.generator_training)


def _counted(scenario: Scenario) -> Callable[[Cell], int]:
    """Units of the smallest client, as the simulator counts them for the plan of a run."""

    def records(cell: Cell) -> int:
        worlds = [replace(cell, seed=seed) for seed in scenario.seeds]
        return min(declared_records(world, k) for world in worlds for k in range(cell.scenario.data.clients))

    return records


def _charged(run: Path) -> Callable[[Cell], int | None]:
    return lambda cell: charged_records(run, cell.arm)


def _check_simulation(place: Path) -> None:
    """Refuses all but a simulation's directory: canaries have no place among the records of persons.

    Raises:
        BadValue: With what it is.
    """
    what = {
        "site.toml": "a site's folder, with private data: canaries have no place there",
        "server.toml": "a coordinator's folder",
        DEPLOYMENT: "a run on real sites: their ledgers are theirs (`fedsynth ledger verify` at each site)",
        "comparison.json": "a comparison: name one of its runs",
    }
    if place.is_file():
        raise BadValue(f"{place} is a file: an audit is of a scenario (a .toml file) or of a simulation's directory")
    for name, said in what.items():
        if (place / name).exists():
            raise BadValue(f"{place} is {said}; an audit is of a scenario or of a simulation's directory")
    if not (place / "scenario.toml").is_file():
        raise BadValue(f"{place} is no run's directory: it has no scenario.toml")
    if not (place / "privacy.json").is_file():
        raise BadValue(f"{place} has no privacy.json: the run did not end, and states nothing yet; go on with --resume")
    if not private_of(place).is_dir():
        raise BadValue(f"{private_of(place)} is gone, and with it the ledgers that a run's statements are held against")


__all__ = ["Audit", "MechanismAudit", "audit", "audit_mechanism", "mechanisms"]
