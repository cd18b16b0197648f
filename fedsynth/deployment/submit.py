"""A run on real sites: it waits until they are connected (wait_seconds), is submitted, watched, and ended."""

from __future__ import annotations

import contextlib
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from fedsynth.deployment.plan import chosen, deployed, read_deployment
from fedsynth.deployment.registry import RegisteredSite, sites, states_by
from fedsynth.deployment.server import commands, read_config
from fedsynth.deployment.superlink import SERVERAPP, SUPERLINK_LOG
from fedsynth.federation.nodes import Deployment
from fedsynth.federation.run.directory import begin, check_free, private_of
from fedsynth.federation.run.environment import differences
from fedsynth.models.hub import elsewhere, pin
from fedsynth.models.of_scenario import models_of
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, from_toml, to_toml
from fedsynth.simulation.flower import (
    DEPLOYMENT,
    EVENTS,
    SERVER_PROCESS,
    STATUS,
    CommandRefused,
    Commands,
    Events,
    LaunchFailed,
    alive,
    alone,
    one_line,
    own_status,
)
from fedsynth.simulation.launch import APP
from fedsynth.simulation.result import Result, read
from fedsynth.simulation.simulate import check_server, done, server_warnings, with_models
from fedsynth.typed import BadValue, plain

Tell = Callable[[dict[str, Any]], None] | None
FLOWER_RUN = "flower-run"  # in the logs: the SuperLink's id of the latest submission
LOOK_SECONDS = 2.0  # between two requests for the SuperLink's status of a run
PATIENCE = 3  # requests without an answer before it is taken to be gone
STOPPING_SECONDS = 3.0  # for a ServerApp to notice that it must end; a computing one does not


def pinned(scenario: Scenario) -> Scenario:
    """The scenario with all models from the hub pinned to commits; a folder may exist at the sites only.

    Raises:
        BadValue: If a model is not found.
    """
    return with_models(scenario, {name: pin(name) for name, _ in models_of(scenario) if not elsewhere(name)})


def submit(
    server: Path,
    scenario: Scenario,
    *,
    out: Path | str | None = None,
    names: Sequence[str] = (),
    on_event: Tell = None,
    on_warning: Callable[[str], None] | None = None,
) -> Result:
    """Runs a scenario on real sites.

    Args:
        server: The coordinator's folder, whose SuperLink runs on this machine.
        scenario: A scenario with one arm and one seed.
        out: The run's directory, new or empty; None for `runs/NAME-DATE` in the working directory.
        names: Names of sites in the order of clients; empty for all registered sites.
        on_event: Called with each progress event.
        on_warning: Called with each warning.

    Raises:
        BadValue: If scenario, models, sites or directory have a fault; then nothing has run.
        LaunchFailed: The run did not complete; the message has the reason, the log, and the command to resume it.
    """
    asked_of = chosen(server, names)
    asked = deployed(scenario, len(asked_of))
    place = Path(out or Path("runs") / f"{asked.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    check_free(place)
    deployment = Deployment(uuid.uuid4().hex, tuple(site.name for site in asked_of))
    with commands(server, read_config(server)) as flwr:
        for cell in cells(asked):
            check_server(cell)
            for line in server_warnings(cell):
                _warn(on_warning, line)
        asked = pinned(asked)
        _wait_for_sites(server, flwr, asked, asked_of, on_event, on_warning)
        begin(asked, place, {DEPLOYMENT: plain(deployment)}, {})
        if on_event is not None:
            on_event({"event": "begun", "out": str(place)})
        _run(server, flwr, to_toml(asked), place, deployment, on_event)
    return read(place)


def resume(
    server: Path,
    out: Path | str,
    *,
    on_event: Tell = None,
    on_warning: Callable[[str], None] | None = None,
) -> Result:
    """Resumes a run on sites under the same id: sites reply to a repeated request with the stored answer.

    Args:
        server, on_event, on_warning: As in `submit`. Warnings name changes since the run began.
        out: The run's directory.

    Raises:
        BadValue: If there is no such run, or one of its sites is no longer registered.
        LaunchFailed: The run did not complete, or another one works in the directory.
    """
    place = Path(out).absolute()
    deployment = read_deployment(place)
    if done(place):
        return read(place)
    asked_of = chosen(server, deployment.sites)
    text = (place / "scenario.toml").read_text(encoding="utf-8")
    asked = from_toml(text)
    with commands(server, read_config(server)) as flwr:
        for line in differences(place, asked):
            _warn(on_warning, f"not as when the run began: {line}")
        for cell in cells(asked):
            check_server(cell)
        _wait_for_sites(server, flwr, asked, asked_of, on_event, on_warning)
        _run(server, flwr, text, place, deployment, on_event)
    return read(place)


def _wait_for_sites(
    server: Path, flwr: Commands, asked: Scenario, asked_of: Sequence[RegisteredSite], on_event: Tell, on_warning: Any
) -> None:
    """Waits until all sites are online; after the timeout a quorum suffices.

    Raises:
        BadValue: If fewer are online.
    """
    seconds = read_config(server).wait_seconds
    end, told = time.monotonic() + seconds, ""
    while True:
        states, others = _answered(lambda: states_by(flwr, sites(server)))
        if others and not told:
            _warn(
                on_warning,
                f"registered with the SuperLink, and not in sites.toml: node {', '.join(others)}; "
                "whoever reaches its control API can register keys, under any name",
            )
        away = [site.name for site in asked_of if states[site.name] != "online"]
        if gone := [name for name in away if states[name] == "unknown"]:
            raise BadValue(
                f"the SuperLink does not know the site {gone[0]!r} (a new database?): remove it, and let it "
                "in again; a new database takes the same key"
            )
        if not away:
            return
        line = f"waiting for {', '.join(f'{name} ({states[name]})' for name in away)}: `fedsynth site start` there"
        if on_event is not None and line != told:
            on_event({"event": "sites", "line": line})
        told = line
        if time.monotonic() > end:
            break
        time.sleep(min(LOOK_SECONDS, seconds))
    if len(asked_of) - len(away) < math.ceil(asked.server.quorum * len(asked_of)):
        raise BadValue(
            f"not online after {seconds:g} s (wait_seconds of server.toml): {', '.join(away)}; start them, "
            "or begin a run without them: --sites"
        )
    _warn(on_warning, f"not online, the quorum goes on without them: {', '.join(away)}")


def _run(server: Path, flwr: Commands, text: str, out: Path, deployment: Deployment, on_event: Tell) -> None:
    """Submits a run whose directory exists, and watches it to its end."""
    logs = private_of(out) / "logs"
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    with alone(logs):
        if (logs / FLOWER_RUN).is_file():
            _stop(flwr, (logs / FLOWER_RUN).read_text(), out)
        (out / STATUS).unlink(missing_ok=True)
        events = Events(out / EVENTS)
        config = logs / "run.toml"
        told = json.dumps(plain(deployment))
        config.write_text(tomli_w.dumps({"scenario-toml": text, "out-dir": str(out), "deployment": told}))
        run = str(_answered(lambda: flwr("run", str(APP), "-c", str(config)))["run-id"])
        (logs / FLOWER_RUN).write_text(run)
        if on_event is not None:
            on_event({"event": "sites", "line": f"sites: {', '.join(deployment.sites)} (Flower's run {run})"})
        try:
            for event in _watched(flwr, run, out, events):
                if on_event is not None:
                    on_event(event)
        except KeyboardInterrupt:
            with contextlib.suppress(CommandRefused):
                _stop(flwr, run, out)
            raise
        except _Ended as problem:
            raise LaunchFailed(
                f"{one_line(str(problem))} (log: {server.absolute() / SUPERLINK_LOG}); go on with "
                f"`fedsynth run --resume {out} --server {server}`"
            ) from None


class _Ended(Exception):
    """The reason why a run ended early."""


def _watched(flwr: Commands, run: str, out: Path, events: Events) -> Iterator[dict[str, Any]]:
    """The events of a run until it has completed; raises _Ended as soon as it cannot."""
    next_look, unanswered = time.monotonic() + LOOK_SECONDS, 0
    while True:
        own = own_status(out)
        yield from events.new()
        if own.get("status") == "completed":
            return
        said = str(own.get("reason") or "")
        if said and not said.startswith("SystemExit"):  # as Flower ends a ServerApp
            raise _Ended(said)
        if time.monotonic() >= next_look:
            try:
                flower = flwr("list", "--run-id", run)["runs"][0]
            except CommandRefused as problem:
                if "not found" in str(problem):
                    raise _Ended(f"the SuperLink knows no run {run} any more (a new database?)") from None
                unanswered += 1
                if unanswered == PATIENCE:
                    raise _Ended("the SuperLink answers no more: start it again, `fedsynth server start`") from None
            else:
                unanswered = 0
                if flower["status"].startswith("finished") and own_status(out).get("status") != "completed":
                    raise _Ended(_why(own_status(out), flower))
            next_look = time.monotonic() + LOOK_SECONDS
        time.sleep(0.1)


def _why(own: dict[str, Any], flower: dict[str, Any]) -> str:
    """The reason why a run that Flower calls finished did not complete."""
    said = str(own.get("reason") or "")
    if said and not said.startswith("SystemExit"):
        return said
    if said or flower["status"] == "finished:stopped":
        return "the run was stopped (`flwr stop`), or its server ended"
    details = str(flower.get("status-details") or "N/A")
    if "No heartbeat" in details:
        return "the ServerApp was killed, or its machine stood still: the SuperLink heard no more of it"
    return f"the ServerApp ended without writing {STATUS}" if details == "N/A" else details


def _stop(flwr: Commands, run: str, out: Path) -> None:
    """Ends a ServerApp that still works: two must not write into one directory.

    It notices at its next request to the SuperLink. A computing one makes none for long, and is killed.
    """
    with contextlib.suppress(CommandRefused):  # it has ended
        flwr("stop", run)
    process = _serverapp(out)
    if process is not None:
        end = time.monotonic() + STOPPING_SECONDS
        while alive(process) and time.monotonic() < end:
            time.sleep(0.1)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        while alive(process):
            time.sleep(0.05)


def _serverapp(out: Path) -> psutil.Process | None:
    """The process that works on a run, if there is one; its name is checked as well, as numbers are used again."""
    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        process = psutil.Process(int((private_of(out) / SERVER_PROCESS).read_text()))
        if any(Path(word).name == SERVERAPP for word in process.cmdline()[:2]):
            return process
    return None


def _answered(command: Callable[[], Any]) -> Any:
    try:
        return command()
    except CommandRefused as problem:
        raise LaunchFailed(str(problem)) from problem


def _warn(on_warning: Callable[[str], None] | None, text: str) -> None:
    if on_warning is not None:
        on_warning(text)
