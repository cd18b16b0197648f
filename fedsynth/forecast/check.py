"""The forecast of a run: privacy, bytes, memory and time, its JSON, and warnings of what will not fit."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from fedsynth.clients.client_side import declared_records
from fedsynth.forecast.profiling import Cost, Unit, busy, forget_peak, peak_memory, probe, typical_lengths, waiting
from fedsynth.forecast.rehearsal import Exchange, Rehearsed, rehearse, statement_of
from fedsynth.models.hub import place_of
from fedsynth.models.of_scenario import endpoints_of
from fedsynth.privacy.plan import composed_epsilon
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.scenario.toml import cells
from fedsynth.simulation.simulate import SAFE_SHARE, check, concurrency, supernodes

DAY = 86_400.0
BUSY = 1.3  # times as long as alone: from this on, a line says that others use the machine
MOST_PLANS = 12  # noise calibrations made for one arm here; each takes about a second
# The costs of Flower and Ray in any run. Measured on two cores (docs/results.md).
# A run starts one process after the other: in units of what a worker needs to import, before the workers and for them.
STARTS, WORKER_STARTS = 3.2, 1.2
WAITS = 7.0  # idle seconds of starting and ending: Ray starts, Flower's status is read every five seconds
EXCHANGE = 0.3  # seconds of an exchange beside the clients' work
MESSAGE = 0.03  # seconds of each request on its way
HELD = 1_000_000_000  # bytes: SuperLink, SuperExec, Ray and its agents, supervisor; they hold no model
DRIVES = 400_000_000  # bytes: Ray in the process of the server app, and memory that this process does not free


@dataclass(frozen=True)
class ArmForecast:
    """The forecast of one arm, all seeds together.

    Attributes:
        guarantee: `dp` or `none`.
        epsilon: The largest over clients and seeds; None without a guarantee.
        delta: Likewise.
        up: Bytes from clients.
        down: Bytes to clients.
        read: Tokens that language models at the server read.
        written: Tokens that they write.
        seconds: Time of its cells, without starting and ending.
    """

    guarantee: str
    epsilon: float | None
    delta: float | None
    up: int
    down: int
    read: int
    written: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run.

    Attributes:
        scenario: Name of the scenario.
        arms: Forecasts of arms by name.
        workers: Number of workers that will serve the clients.
        seconds: Time of the whole run, under this machine's present load.
        seconds_alone: The same on cores that nobody else uses.
        worker: Peak bytes of a worker.
        driver: Bytes of all other processes.
        warnings: Lines on resources that will not suffice, and on unknown costs.
        failures: Errors at which the run would end, each with its arm, type, file and line.
    """

    scenario: str
    arms: Mapping[str, ArmForecast]
    workers: int
    seconds: float
    seconds_alone: float
    worker: int
    driver: int
    warnings: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    def __repr__(self) -> str:
        arms, lines = len(self.arms), len(self.warnings)
        return (
            f"Forecast({self.scenario}: {arms} arm{'s' * (arms != 1)}, {self.seconds:.0f} s, "
            f"{self.memory / 1e9:.1f} GB, {lines} warning{'s' * (lines != 1)})"
        )

    @property
    def memory(self) -> int:
        """Bytes of all processes."""
        return self.workers * self.worker + self.driver

    def to_dict(self) -> dict[str, Any]:
        """The JSON that `--json` prints."""
        return {
            "scenario": self.scenario,
            "workers": self.workers,
            "arms": {
                name: {
                    "epsilon": arm.epsilon,
                    "delta": arm.delta,
                    "guarantee": arm.guarantee,
                    "bytes": {"up": arm.up, "down": arm.down},
                    "llm_tokens": {"read": arm.read, "written": arm.written},
                    "seconds": round(arm.seconds, 1),
                }
                for name, arm in self.arms.items()
            },
            "seconds": round(self.seconds, 1),
            "seconds_alone": round(self.seconds_alone, 1),
            "memory": {
                "worker": self.worker,
                "workers": self.workers * self.worker,
                "driver": self.driver,
                "total": self.memory,
            },
            "warnings": [*self.failures, *self.warnings],
        }


def forecast(
    scenario: Scenario, *, workers: int | None = None, place: Path | None = None, tell: Callable[[str], None] = print
) -> Forecast:
    """Checks a scenario, rehearses its rounds on dummy text, measures their costs and adds up.

    No private text is trained on, sampled after or sent, and nothing is charged. A data file is read as by the check
    before a run, and for the lengths of its texts.

    Args:
        scenario: The scenario with the arms and seeds to run.
        workers: Number of client processes; None for as many as `run` would use.
        place: The run's future directory; None for the working directory.
        tell: Called with a line on each step.

    Raises:
        BadValue: With the scenario's fault and the way out.
        fedsynth.forecast.profiling.ProbeFailed: If a stand-in for a worker ends early.
    """
    begun = busy()
    warnings = check(scenario)
    checking = busy() - begun
    launcher = psutil.Process().memory_info().rss  # this process stays during a run
    clients = 1 if scenario.data.pooled else scenario.data.clients
    count, _ = concurrency(workers, clients)
    forget_peak()  # the check tries a whole pass of a generator's training, which the server app does not

    tell("rehearsing the rounds on dummy text")
    planned = cells(replace(scenario, seeds=scenario.seeds[:1]))
    lengths = {cell.arm: typical_lengths(cell) for cell in planned}
    known: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        found = {cell.arm: rehearse(cell, Path(folder) / cell.arm, lengths[cell.arm], known) for cell in planned}
    server = peak_memory()

    tell("measuring what it costs")
    same = _same_work(planned)
    found = {arm: _measured_as(same[arm], rehearsed) for arm, rehearsed in found.items()}
    probed = probe(scenario, _units(found.values()), lengths, min(count, len(os.sched_getaffinity(0))))

    pool = Workers(count, supernodes(clients, count))
    arms, waits = {}, waiting()
    starting, joining = checking + STARTS * probed.imported, WORKER_STARTS * probed.imported
    alone = starting + joining + WAITS
    for cell in planned:
        rehearsed, seeds = found[cell.arm], len(scenario.seeds)
        epsilon, told = _largest_epsilon(scenario, cell, rehearsed)
        warnings += [f"arm {cell.arm!r}: {line}" for line in (*rehearsed.noted, *told)]
        clients_work = sum(pool.take(e, probed.costs, cell.scenario.stack) for e in rehearsed.exchanges)
        alone += seeds * (rehearsed.server + clients_work)
        arms[cell.arm] = ArmForecast(
            guarantee=rehearsed.guarantee,
            epsilon=epsilon,
            delta=rehearsed.delta,
            up=seeds * rehearsed.up,
            down=seeds * rehearsed.down,
            read=seeds * rehearsed.read,
            written=seeds * rehearsed.written,
            seconds=seeds * (rehearsed.server * waits + clients_work * probed.waiting),
        )
    largest = max((e.up + e.down for r in found.values() for e in r.exchanges), default=0)
    made = Forecast(
        scenario=scenario.name,
        arms=arms,
        workers=count,
        seconds=starting * waits + joining * probed.waiting + WAITS + sum(arm.seconds for arm in arms.values()),
        seconds_alone=alone,
        worker=probed.memory,
        driver=launcher + server + DRIVES + HELD + 2 * largest,  # messages lie at the SuperLink and at their reader
    )
    failures = tuple(f"arm {arm!r} would fail: {r.failed}" for arm, r in found.items() if r.failed is not None)
    warnings += _will_not_fit(scenario, made, found, place or Path.cwd())
    return replace(made, warnings=tuple(dict.fromkeys(warnings)), failures=failures)


def _same_work(planned: Sequence[Cell]) -> dict[str, str]:
    """By arm, the first arm whose clients have the same settings and text: one measurement serves both."""
    first: dict[Any, str] = {}
    return {
        cell.arm: first.setdefault((cell.scenario.client, cell.scenario.data, cell.scenario.rounds), cell.arm)
        for cell in planned
    }


def _measured_as(arm: str, rehearsed: Rehearsed) -> Rehearsed:
    """The exchanges with all work renamed to the arm that it is measured for."""
    exchanges = (
        replace(e, work={h: {replace(u, arm=arm): n for u, n in work.items()} for h, work in e.work.items()})
        for e in rehearsed.exchanges
    )
    return replace(rehearsed, exchanges=tuple(exchanges))


def _units(found: Iterable[Rehearsed]) -> dict[Unit, int]:
    """The units to measure, each with the largest number that one client does at once."""
    most: dict[Unit, float] = {}
    for work in (work for rehearsed in found for e in rehearsed.exchanges for work in e.work.values()):
        for unit, amount in work.items():
            most[unit] = max(most.get(unit, 0), amount)
    return {unit: int(amount) for unit, amount in most.items()}


@dataclass
class Workers:
    """Workers that take messages as they come; each pays the first cost of a unit once.

    Attributes:
        count: Number of workers.
        nodes: Number of SuperNodes, each of which gets one message per exchange.
        known: By worker, the units that it has done before.
    """

    count: int
    nodes: int
    known: list[set[Unit]] = field(default_factory=list)

    def take(self, exchange: Exchange, costs: Mapping[Unit, Cost], stack: int) -> float:
        """Seconds of an exchange: those of the worker that ends last."""
        self.known = self.known or [set() for _ in range(self.count)]
        busy = [0.0] * self.count
        messages: dict[int, list[int]] = {}
        for client in sorted(exchange.work):
            messages.setdefault(client // stack % self.nodes, []).append(client)
        for clients in messages.values():
            worker = min(range(self.count), key=busy.__getitem__)
            for client in clients:
                busy[worker] += MESSAGE
                for unit, amount in exchange.work[client].items():
                    busy[worker] += costs[unit].each * amount
                    if unit not in self.known[worker]:
                        self.known[worker].add(unit)
                        busy[worker] += costs[unit].first
        return EXCHANGE + max(busy)


def _largest_epsilon(scenario: Scenario, cell: Cell, rehearsed: Rehearsed) -> tuple[float | None, list[str]]:
    """The largest epsilon over clients and seeds; and warnings, above all of clients whose budget is too small."""
    if rehearsed.epsilon is None or not rehearsed.plans:
        return rehearsed.epsilon, []
    client, told = cell.scenario.client, []
    for plans in {frozenset(p.items()) for p in rehearsed.plans.values()}:
        spent = composed_epsilon(
            [replace(p, rounds=max(p.rounds, n)) for p, n in plans], max(p.delta for p, _ in plans)
        )
        if client.budget is not None and spent > client.budget.epsilon:
            told.append(
                f"all that it asks of a client costs epsilon {spent:.3f}, its budget is "
                f"{client.budget.epsilon:g}: clients will refuse"
            )
    largest, clients = rehearsed.epsilon, 1 if cell.scenario.data.pooled else cell.scenario.data.clients
    of_generator = {p for plans in rehearsed.plans.values() for p in plans}
    known = {p.records for p in of_generator}
    sizes = {
        declared_records(replace(cell, seed=seed), client) for seed in scenario.seeds[1:] for client in range(clients)
    }
    more = sorted(sizes - known)[:MOST_PLANS]
    for records in more:
        planned = client.plan(records, cell.scenario.rounds)
        if any(replace(planned, records=p.records).steps == p.steps for p in of_generator):
            said = statement_of(planned, cell.scenario.data.unit_name, client.generator_training.rows_per_unit)
            largest = max(largest, said.epsilon or 0.0)
    if len(sizes - known) > MOST_PLANS:
        told.append(f"epsilon is the largest of {len(known) + MOST_PLANS} sizes of clients, of {len(sizes | known)}")
    return largest, told


def _will_not_fit(scenario: Scenario, made: Forecast, found: Mapping[str, Rehearsed], place: Path) -> list[str]:
    warnings = []
    free = psutil.virtual_memory().available
    needed = made.memory - psutil.Process().memory_info().rss  # this process already holds its part
    if needed > SAFE_SHARE * free:
        warnings.append(
            f"will not fit: {made.workers} workers and what drives them need {needed / 1e9:.1f} GB of "
            f"memory, {free / 1e9:.1f} GB are free: ask for fewer workers or smaller batches"
        )
    there = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    room = shutil.disk_usage(there).free
    kept = sum(_on_disk(cell, found[cell.arm]) for cell in cells(scenario))
    if kept > SAFE_SHARE * room:
        warnings.append(f"will not fit: the run writes {kept / 1e9:.1f} GB to {there}, {room / 1e9:.1f} GB are free")
    if made.seconds > BUSY * made.seconds_alone:
        warnings.append(f"others use the cores: on an idle machine the run would take about {made.seconds_alone:.0f} s")
    if made.seconds > DAY:
        warnings.append(f"will take {made.seconds / DAY:.1f} days: ask for fewer seeds, arms or steps")
    for cell in cells(replace(scenario, seeds=scenario.seeds[:1])):
        patience = cell.scenario.server.timeout
        if made.arms[cell.arm].seconds / len(scenario.seeds) > patience * max(1, len(found[cell.arm].exchanges)):
            warnings.append(f"arm {cell.arm!r}: an exchange may take longer than server.timeout = {patience:g}")
    if endpoints_of(scenario):
        warnings.append(
            "an endpoint's time is not in the seconds: what is asked of it stands under tokens, as an upper bound"
        )
    return warnings


def _on_disk(cell: Cell, rehearsed: Rehearsed) -> int:
    """Bytes of a cell on disk: its share of the run's directory, stored answers, and each client's task model."""
    learners = {client for e in rehearsed.exchanges if e.name == "learn" for client in e.work}
    config, weights = cell.scenario.client, 0
    if config.task_training.trains == "all" and cell.scenario.data.task == "classification":
        for name in {config.of(client).task_model for client in learners}:
            folder = Path(place_of(name)["pretrained_model_name_or_path"])
            if folder.is_dir():
                weights = max(weights, sum(p.stat().st_size for p in folder.glob("*.safetensors")))
    return rehearsed.kept + rehearsed.up + len(learners) * weights
