"""The ServerApp: all cells of a scenario, one after the other, in one Flower run; workers and models stay loaded."""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

import fedsynth
from fedsynth.data.partition import label_list
from fedsynth.federation.cached_llm import CachedLLM
from fedsynth.federation.messages import SIMULATED
from fedsynth.federation.nodes import Deployment, TooFewReplies, nodes_by_client
from fedsynth.federation.run.checkpoint import CHECKPOINTS
from fedsynth.federation.run.directory import SHARED, places, prepare
from fedsynth.federation.run.egress import EgressRecord, write_egress
from fedsynth.federation.run.log import RunLog, append_event
from fedsynth.federation.run.summary import last_figures, summarize, write_metrics
from fedsynth.federation.strategy import Clients, ServerSide, load_strategy
from fedsynth.models.adapters import public_adapter
from fedsynth.models.embedding import Embedder
from fedsynth.models.endpoint import EndpointFailed, RemoteLLM
from fedsynth.models.hub import pin
from fedsynth.models.llm import LocalLLM
from fedsynth.models.of_scenario import models_of
from fedsynth.models.placing import ONE_DEVICE
from fedsynth.scenario.hardware import Hardware
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.server import Endpoint
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.simulation.flower import SERVER_PROCESS
from fedsynth.training.engine import Engine
from fedsynth.typed import BadValue

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the scenario and writes its status: Flower calls a run completed even if all clients failed."""
    toml, out, private = places(context.run_config, context.run_id)
    if context.run_config.get("deployment"):
        (private / SERVER_PROCESS).write_text(str(os.getpid()))  # fedsynth.deployment.submit may have to end it
    try:
        deployed = Deployment.read(str(context.run_config.get("deployment", "")))
        if deployed is None:
            from .workers import replace_the_dead  # Ray: simulations only

            replace_the_dead()
        by_hand = not context.run_config.get("out-dir")
        if by_hand:
            print(f"the run's directory is {out}", flush=True)
        conduct(grid, toml, out, deployed, echo=by_hand)
    except BaseException as problem:
        traceback.print_exc()  # into the log: Flower keeps the message only
        reason = " ".join(f"{problem}".split()) or type(problem).__name__
        _write_status(out, {"status": "failed", "reason": f"{type(problem).__name__}: {reason}{_place_of(problem)}"})
        raise
    _write_status(out, {"status": "completed"})
    for place in (out / CHECKPOINTS, private / SHARED):  # last: a run that goes on may need them
        shutil.rmtree(place, ignore_errors=True)


def _place_of(problem: BaseException) -> str:
    """The last line of a strategy's code in a traceback, for its bugs; refusals of this package need no line."""
    if isinstance(problem, BadValue | TooFewReplies | EndpointFailed | KeyboardInterrupt | SystemExit):
        return ""
    ours = {Path(fedsynth.__file__).resolve().parent, Path(__file__).resolve().parent}
    frames = [
        f
        for f in traceback.extract_tb(problem.__traceback__)
        if "site-packages" not in f.filename and not ours & set(Path(f.filename).resolve().parents)
    ]
    return f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name}" if frames else ""


def conduct(grid: Grid, toml: str, out: Path, deployed: Deployment | None = None, *, echo: bool = False) -> None:
    """Runs all cells and writes the metrics after each, so that a run that ends early leaves its figures.

    Args:
        grid: Flower's.
        toml: The scenario.
        out: The run's directory.
        deployed: The sites; None for a simulation.
        echo: Phases are printed.
    """
    started = time.monotonic()
    scenario = from_toml(toml)
    if not (out / "scenario.toml").exists():  # a run by hand; otherwise the launcher has made the directory
        if loose := [name for name, _ in models_of(scenario) if pin(name) != name]:
            raise BadValue(f"by hand a hub model needs its commit: write {pin(loose[0])!r}, or use `fedsynth run`")
        prepare(scenario, out)
    elif (out / "scenario.toml").read_text(encoding="utf-8") != toml:  # the same scenario: a run is resumed
        raise BadValue(f"{out} holds a run of another scenario: name another out-dir")
    planned = cells(scenario)
    run_logs: list[RunLog] = []
    egress = EgressRecord(out)
    for number, cell in enumerate(planned):
        append_event(
            out / "events.jsonl",
            {"event": "cell", "arm": cell.arm, "seed": cell.seed, "number": number, "cells": len(planned)},
        )
        try:
            run_logs.append(_one_cell(grid, cell, out, deployed, egress, echo=echo))
        finally:
            write_egress(out)
        write_metrics(out, run_logs)
        if figures := last_figures(run_logs[-1]):
            append_event(out / "events.jsonl", {"event": "result", "arm": cell.arm, "seed": cell.seed, **figures})
    summarize(scenario, out, time.monotonic() - started, run_logs)


def _one_cell(
    grid: Grid, cell: Cell, out: Path, deployed: Deployment | None, egress: EgressRecord, *, echo: bool
) -> RunLog:
    run_log = RunLog(cell, out, out / "events.jsonl", simulated=deployed is None, echo=echo)
    if (done := run_log.checkpoint.finished()) is not None:
        run_log.restore(done)
        return run_log
    egress.begin(run_log)
    data = cell.scenario.data
    labels = label_list(data)
    clients = 1 if data.pooled else data.clients

    def open_clients(grid: Grid) -> Clients:
        if deployed is not None:
            return Clients(grid, {}, cell, deployed.run, labels, run_log, sites=deployed.sites)
        found = nodes_by_client(grid, clients, stack=cell.scenario.stack, seconds=models.start_seconds)
        return Clients(grid, found, cell, SIMULATED, labels, run_log)

    kind, config = load_strategy(cell.scenario.strategy)
    models = cell.scenario.server
    hardware = models.hardware
    llm = _llm(models.llm, models.adapter, hardware, egress)
    professional = llm if models.professional is None else _llm(models.professional, None, hardware, egress)
    embed = _embedder(models.embedder, llm, hardware).embed
    asked = CachedLLM(llm, "llm", run_log, _memory(llm))
    asked_too = CachedLLM(professional, "professional", run_log, _memory(professional))
    measures = deployed is None or deployed.measured
    engine = Engine(hardware)
    server = ServerSide(cell, labels, asked, asked_too, embed, run_log, open_clients, measures, engine)
    kind(config, server).start(grid, ArrayRecord(), num_rounds=cell.scenario.rounds)
    run_log.close()
    run_log.checkpoint.finish(run_log.record())
    return run_log


# Clients wait while these work, so they may use every core, whatever the workers' environment says.


def _llm(
    model: str | Endpoint,
    adapter: str | None = None,
    hardware: Hardware = ONE_DEVICE,
    egress: EgressRecord | None = None,
) -> LocalLLM | RemoteLLM:
    return _far(model, egress) if isinstance(model, Endpoint) else _near(model, adapter, hardware)


@cache
def _far(model: Endpoint, egress: EgressRecord | None) -> RemoteLLM:
    return RemoteLLM.connect(model, egress)


@cache
def _near(model: str, adapter: str | None, hardware: Hardware) -> LocalLLM:
    lora = None if adapter is None else public_adapter(adapter, model)
    return LocalLLM.for_server(model, lora, hardware)


def _memory(llm: LocalLLM | RemoteLLM) -> dict[str, Any] | None:
    """The replies of a model of this process so far: it repeats them byte for byte, which no endpoint promises."""
    return _replies(id(llm)) if isinstance(llm, LocalLLM) else None  # models stay loaded: no other takes its number


@cache
def _replies(_: int) -> dict[str, Any]:
    return {}


@cache
def _embedder(name: str | None, llm: LocalLLM | RemoteLLM, hardware: Hardware = ONE_DEVICE) -> LocalLLM | Embedder:
    if name is not None:
        return Embedder.for_server(name, hardware)
    assert isinstance(llm, LocalLLM)  # an endpoint needs an embedder: scenario.Server
    return llm


def _write_status(out: Path, status: dict[str, str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    part = out / "status.json.part"
    part.write_text(json.dumps(status), encoding="utf-8")
    part.replace(out / "status.json")
