"""A scenario on this machine from start to finish: check, launch, read the results."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from fedsynth.clients.client_side import declared_records
from fedsynth.data.card import card_line
from fedsynth.data.loaders import pinned as pinned_data
from fedsynth.data.partition import class_list, divide, label_list, misfits, unlisted_values
from fedsynth.federation.counting import cut_line, cuts_of
from fedsynth.federation.run.directory import check_free, prepare, private_of
from fedsynth.federation.run.environment import differences
from fedsynth.federation.run.log import append_event
from fedsynth.federation.run.times import ENDED, STARTED
from fedsynth.federation.strategy import Planner, load_strategy
from fedsynth.federation.validation import Rejected, check_settings
from fedsynth.models.adapters import attach_lora, public_adapter
from fedsynth.models.devices import as_a_worker, device, gpu_memory, gpus
from fedsynth.models.hub import pin
from fedsynth.models.loading import check as check_model
from fedsynth.models.loading import forget_weights, load_frozen, load_tokenizer, wide
from fedsynth.models.of_scenario import client_models, models_of, server_models, strangers
from fedsynth.models.placing import check_hardware
from fedsynth.privacy.plan import BudgetTooSmall
from fedsynth.scenario.data import Data
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.scenario.toml import cells, from_toml, load, to_toml
from fedsynth.simulation.cluster import Cluster, cluster_at
from fedsynth.simulation.flower import DEPLOYMENT, EVENTS, STATUS
from fedsynth.simulation.launch import APP, AppRun, launch
from fedsynth.simulation.result import Result, read
from fedsynth.synthesis.augmentation import check_labels
from fedsynth.training.examples import check_room
from fedsynth.training.selfcheck import SelfCheckFailed, self_check
from fedsynth.typed import BadValue, UnknownKey

SAFE_SHARE = 0.9  # of free memory that workers may fill
MODELS = (
    ("client", "generator"),
    ("client", "task_model"),
    ("client", "task_models"),
    ("client", "embedder"),
    ("server", "llm"),
    ("server", "professional"),
    ("server", "embedder"),
)


def check(scenario: Scenario) -> list[str]:
    """Checks all that is known before training: strategy options, models, data, budget. Returns warnings.

    Raises:
        BadValue: With the fault and the way out.
    """
    warnings: list[str] = strangers(scenario)
    read: set[tuple[Any, ...]] = set()
    planned: set[tuple[Any, ...]] = set()
    for cell in cells(replace(scenario, seeds=scenario.seeds[:1])):
        resolved = cell.scenario
        check_server(cell)
        for name, role in client_models(resolved.client):
            check_model(name, role)
        labels = label_list(resolved.data)
        if (resolved.data, resolved.client) not in read:
            read.add((resolved.data, resolved.client))
            if resolved.data.classes:
                try:
                    check_labels(class_list(resolved.data))
                except ValueError as problem:
                    raise BadValue(str(problem)) from problem
            if resolved.data.world is None:
                warnings += _check_sites(scenario, cell.arm, resolved.data, class_list(resolved.data))
                resolved.task.check_codes(len(labels))
                warnings += unlisted_values(resolved.data, labels, resolved.task)
        warnings += server_warnings(cell)
        kind, options = load_strategy(resolved.strategy)
        trains = kind.trains_generator(options)
        warnings += [cut_line(cut, cell.seed) for cut in cuts_of(cell)]
        key = (resolved.data, resolved.client, resolved.rounds, trains)
        if resolved.client.guarantee == "dp" and kind.spends(options) and key not in planned:
            planned.add(key)
            _check_budget(scenario, cell, labels, kind.planners(options, resolved.client.of(0)), trains=trains)
    return list(dict.fromkeys(warnings))


def check_server(cell: Cell) -> None:
    """Checks an arm at the server: the strategy's options, the server's models and adapter, and that the settings for
    clients are within the ranges that every client accepts.

    Raises:
        BadValue: With the fault and the way out.
    """
    resolved = cell.scenario
    try:
        kind, options = load_strategy(resolved.strategy)
        check_settings(resolved.client, resolved.rounds)  # before they are used in a plan
        kind.check(options, resolved)
    except UnknownKey as problem:  # an arm has most of its options from the whole scenario
        where = f"look in [strategy], --set and [arms.{cell.arm}]"
        raise BadValue(f"arm {cell.arm!r}: {problem}; {where}") from problem
    except (BadValue, Rejected) as problem:
        raise BadValue(f"arm {cell.arm!r}: {problem}") from problem
    check_hardware(resolved.server.hardware)
    for name, role in server_models(resolved.server):
        check_model(name, role)
    if resolved.server.adapter is not None and isinstance(resolved.server.llm, str):
        public_adapter(resolved.server.adapter, resolved.server.llm)


def server_warnings(cell: Cell) -> list[str]:
    """Warnings about an arm's method and options: possible settings that are rarely intended."""
    kind, options = load_strategy(cell.scenario.strategy)
    return kind.warnings(options, label_list(cell.scenario.data))


def pinned(scenario: Scenario) -> Scenario:
    """The scenario with all models and data from the hub pinned to commits, models of its arms included.

    Raises:
        BadValue: If a model of an arm that runs is not found.
    """
    found = with_models(scenario, {name: pin(name) for name, _ in models_of(scenario)})
    return replace(found, data=pinned_data(scenario.data))


def with_models(scenario: Scenario, pins: Mapping[str, str]) -> Scenario:
    """The scenario with other names for models, those of its arms included.

    Args:
        scenario: Any scenario.
        pins: Old name -> new name; other names stay.
    """

    def renamed(table: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: pinned_name(value) if (table, key) in MODELS else value for key, value in values.items()}

    def pinned_name(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(pinned_name(name) for name in value)
        return pins.get(value, value) if isinstance(value, str) else value

    def here(table: str) -> dict[str, Any]:
        values = getattr(scenario, table)
        return renamed(table, {key: getattr(values, key) for t, key in MODELS if t == table})

    arms = {
        arm: {key: renamed(key, value) if isinstance(value, Mapping) else value for key, value in overrides.items()}
        for arm, overrides in scenario.arms.items()
    }
    client, server = replace(scenario.client, **here("client")), replace(scenario.server, **here("server"))
    return replace(scenario, client=client, server=server, arms=arms)


def _check_budget(
    scenario: Scenario, cell: Cell, labels: Sequence[str], planners: Sequence[Planner], *, trains: bool
) -> None:
    """Plans for the smallest client, which needs the most noise, and runs a training's self-check on public tokens.

    Args:
        scenario: The scenario; all its seeds are checked.
        cell: A cell of an arm that spends.
        labels: The label list of the cell's data.
        planners: How the method's spending is planned.
        trains: It is the training of a generator.
    """
    client, data = cell.scenario.client.of(0), cell.scenario.data
    clients = 1 if data.pooled else data.clients
    worlds = [replace(cell, seed=seed) for seed in scenario.seeds]
    records = min(declared_records(world, index) for world in worlds for index in range(clients))
    try:
        planned, *_ = [planner(records, cell.scenario.rounds) for planner in planners]
    except BudgetTooSmall as problem:
        raise BadValue(f"arm {cell.arm!r}, a client with {records} records: {problem}") from problem
    if not trains:
        return
    settings = client.generator_training
    tokenizer, model = load_tokenizer(client.generator), load_frozen(client.generator, settings.precision)
    try:
        check_room(tokenizer, model, labels, settings.max_length, cell.scenario.task)
        adapted = attach_lora(
            model, rank=settings.rank, alpha=settings.alpha, seed=0, targets=settings.lora_targets
        ).to(device())
        with nullcontext() if wide(client.generator) else as_a_worker():
            self_check(adapted, planned, settings, pad=tokenizer.pad_token_id)
    except (SelfCheckFailed, ValueError) as problem:
        raise BadValue(f"arm {cell.arm!r}, generator {client.generator!r}: {problem}") from problem


def _check_sites(scenario: Scenario, arm: str, data: Data, labels: Sequence[str]) -> list[str]:
    warnings = []
    if data.labels == "all" and data.classes:
        warnings.append(
            "the label list is read from the data; a real site must list it: a rare class can reveal a person"
        )
    warnings += misfits(data, labels)
    for seed in scenario.seeds:
        division = divide(data, seed)
        if data.split == "pathological" and division.left_out.not_dealt:
            warnings.append(
                f"{division.left_out.not_dealt} rows are of classes that no client holds (seed {seed}): "
                "ask for more clients, or more classes per client"
            )
        for index, site in enumerate(division.sites if labels else ()):
            for name, corpus in (("training", site.train), ("test", site.test)):
                if not set(labels) & set(corpus.answers):
                    raise BadValue(f"arm {arm!r}: client {index} has no {name} example with a label of {list(labels)}")
            present = sorted(set(labels) & set(site.train.answers))
            if len(present) == 1:
                warnings.append(f"client {index} has a single label, {present[0]!r} (seed {seed})")
    return warnings


def concurrency(asked: int | None, clients: int) -> tuple[int, str]:
    """The number of workers that run at once, and a line with the reason.

    The check in this process has loaded the models and trained on one whole micro-batch, as a worker does. So a worker
    needs about this process's peak memory. A process that holds much else, such as a notebook, passes a number.

    Args:
        asked: The user's number; None for as many as cores, clients and memory allow, at least one.
        clients: Number of clients of the run.
    """
    each = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    free = psutil.virtual_memory().available
    room = int(SAFE_SHARE * free) // each
    said = f"about {each / 1e9:.1f} GB each, {free / 1e9:.0f} GB free"
    if gpus():
        held, spare = gpu_memory()  # this process keeps its GPU memory while workers run
        room = min(room, max(1, int(SAFE_SHARE * spare / held)) * gpus())
        said += f"; on a GPU {held / 1e9:.1f} GB each, {spare / 1e9:.0f} GB free"
    count = asked or max(1, min(len(os.sched_getaffinity(0)), clients, room))
    tight = (
        ""
        if count <= room
        else ": memory may not reach, a smaller max_physical_batch_size or fewer --workers would help"
    )
    return count, f"{count} worker{'s' if count > 1 else ''}, {said}{tight}"


def gpu_share(workers: int) -> float:
    """The share of a GPU that each worker counts as its own, so that workers spread evenly; 0 without a GPU."""
    return math.floor(1e4 / math.ceil(workers / gpus())) / 1e4 if gpus() else 0.0


def supernodes(clients: int, workers: int) -> int:
    """The number of SuperNodes that host the clients; each gets one message per exchange. With few, Flower's own work
    is small beside theirs; with enough, no worker waits long for the last message."""
    return min(clients, max(8 * workers, -(-clients // 32)))


def run(
    scenario: Scenario | str | Path,
    *,
    out: Path | str | None = None,
    workers: int | None = None,
    port: int | None = None,
    ray: str | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Result:
    """Runs a scenario as a Flower simulation: on this machine, or its clients on a Ray cluster.

    Args:
        scenario: A `Scenario`, the path of a TOML file, or the name of a shipped scenario.
        out: The run's directory; must be new or empty. None for `runs/NAME-DATE` in the working directory.
        workers: Number of client processes; None for one per core, as far as memory allows.
        port: Port of the run's SuperLink on this machine; None for any free one.
        ray: HOST:PORT of a Ray cluster that runs already and that this machine belongs to; its CPUs are the workers.
            None for a Ray of the run's own.
        on_event: Called with each progress event: arm, seed, round, phase, done, total. Before them come "data" and
            "workers", each with a line: the clients' data, and the number of workers; "awaited" with what takes long,
            and "begun" with the run's directory `out`.
        on_warning: Called with each warning of the check.

    Raises:
        BadValue: If scenario, data, models, budget, directory or cluster have a fault; then nothing has run.
        fedsynth.simulation.flower.LaunchFailed: The run did not complete; the message has the reason and the log.
    """
    begun = time.monotonic()
    asked = scenario if isinstance(scenario, Scenario) else load(scenario)
    place = Path(out or Path("runs") / f"{asked.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    check_free(place)
    cluster = _cluster(ray, workers)
    _tell(on_event, {"event": "awaited", "line": "checking models, data and budget"})
    _warn(check(asked), on_warning)
    forget_weights()  # this process only waits from now on; the run's own need the memory
    asked = pinned(asked)
    served, said = _served(asked, workers, cluster)
    cards = prepare(asked, place)
    if on_event is not None:
        on_event({"event": "data", "line": card_line(cards)})
        on_event({"event": "workers", "line": said})
    return _launched(asked, to_toml(asked), place, served, port, on_event, begun)


def resume(
    out: Path | str,
    *,
    workers: int | None = None,
    port: int | None = None,
    ray: str | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Result:
    """Resumes a run that ended too soon; it reaches the results that it would have had.

    Nothing is charged twice: clients reply to a repeated request with the stored answer. A completed run is only read.

    Args:
        out: The run's directory.
        workers: As in `run`.
        port: As in `run`.
        ray: As in `run`; a run may go on elsewhere than it began.
        on_event: As in `run`.
        on_warning: As in `run`; also called with each change of versions, hardware or code since the run began.

    Raises:
        BadValue: If there is no run, its clients' accounts are gone, or there is no such cluster.
        fedsynth.simulation.flower.LaunchFailed: The run did not complete, or still goes on.
    """
    begun, place = time.monotonic(), Path(out).absolute()
    if not (place / "scenario.toml").is_file():
        raise BadValue(f"{place} holds no run: there is no scenario.toml; start one with --out")
    if (place / DEPLOYMENT).is_file():
        raise BadValue(f"{place} holds a run on sites: say with --server DIR which coordinator's")
    if done(place):
        return read(place)
    if not private_of(place).is_dir():
        raise BadValue(f"{private_of(place)} is gone, and with it what the clients of this run have spent and answered")
    cluster = _cluster(ray, workers)
    text = (place / "scenario.toml").read_text(encoding="utf-8")
    asked = from_toml(text)
    _warn([f"not as when the run began: {line}" for line in differences(place, asked)], on_warning)
    _warn(check(asked), on_warning)
    forget_weights()  # this process only waits from now on; the run's own need the memory
    served, said = _served(asked, workers, cluster)
    if on_event is not None:
        on_event({"event": "workers", "line": said})
    return _launched(asked, text, place, served, port, on_event, begun)


def _cluster(ray: str | None, workers: int | None) -> Cluster | None:
    if ray is not None and workers is not None:
        raise BadValue("a cluster's CPUs are its workers (ray start --num-cpus): leave --workers out with --ray")
    return None if ray is None else cluster_at(ray)


@dataclass(frozen=True)
class _Served:
    """The processes that serve a run's clients.

    Attributes:
        workers: Their number.
        gpu_share: The share of one GPU that each counts as its own.
        ray: The address of the cluster that they belong to; None for this machine.
    """

    workers: int
    gpu_share: float
    ray: str | None


def _served(asked: Scenario, workers: int | None, cluster: Cluster | None) -> tuple[_Served, str]:
    if cluster is not None:
        return _Served(cluster.workers, cluster.gpu_share, cluster.address), str(cluster)
    count, said = concurrency(workers, 1 if asked.data.pooled else asked.data.clients)
    return _Served(count, gpu_share(count), None), said


def _tell(on_event: Callable[[dict[str, Any]], None] | None, event: dict[str, Any]) -> None:
    if on_event is not None:
        on_event(event)


def done(out: Path) -> bool:
    """True if the run in a directory has completed."""
    try:
        return bool(json.loads((out / STATUS).read_text())["status"] == "completed")
    except (OSError, ValueError, KeyError):
        return False


def _warn(warnings: Sequence[str], on_warning: Callable[[str], None] | None) -> None:
    for warning in warnings:
        if on_warning is not None:
            on_warning(warning)


def _launched(
    asked: Scenario,
    text: str,
    place: Path,
    served: _Served,
    port: int | None,
    on_event: Callable[[dict[str, Any]], None] | None,
    begun: float,
) -> Result:
    _tell(on_event, {"event": "begun", "out": str(place)})
    _tell(on_event, {"event": "awaited", "line": "starting Flower and Ray"})
    append_event(place / EVENTS, {"event": STARTED, "seconds": round(time.monotonic() - begun, 3)})
    launch(
        AppRun(
            app=APP,
            run_config={"scenario-toml": text, "out-dir": str(place)},
            supernodes=supernodes(asked.data.clients, served.workers),
            workers=served.workers,
            gpu_share=served.gpu_share,
            out=place,
            logs=private_of(place) / "logs",
            ray=served.ray,
        ),
        on_event=on_event,
        port=port,
        start_seconds=asked.server.start_seconds,
    )
    append_event(place / EVENTS, {"event": ENDED})
    return read(place)
