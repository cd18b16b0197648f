"""One Flower simulation: started in its own temporary folder, watched, and taken down to the last process.

`launch` starts a supervisor (this same file, run as a script). The supervisor is the ancestor of everything else:
SuperLink, SuperExec, simulation, Ray. It ends when the pipe from its launcher closes, so that no process outlives the
launcher, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from fedsynth.simulation.cluster import cluster_environment
from fedsynth.simulation.flower import (
    EVENTS,
    LOG,
    OWNER,
    STATUS,
    CommandRefused,
    Commands,
    Events,
    LaunchFailed,
    adopt_orphans,
    alive,
    alone,
    ending,
    environment,
    free_port,
    keep_output,
    kill_all,
    last_words,
    listens,
    one_line,
    own_status,
    ray_clocks,
    ray_token,
)

APP = Path(__file__).parents[1] / "app"  # a link to simulations/ in a checkout, the same files in a wheel
SIMULATION = "flwr-simulation"
# A run needs these beside its SuperLink: SuperExec starts the simulation, which starts Ray. None ends before the run.
RAY = {"gcs_server", "raylet"}
PARTS = {SIMULATION, "flower-superexec", *RAY}
RAY_DIES = (  # the 15 s are Ray's own, for the port of an agent that it starts; no setting changes them
    "the system kills it where memory is short, and Ray gives up after 15 s where its start gets less than a twentieth "
    "of a core; wait until the machine is less busy"
)
ENDING_SECONDS = 10.0  # between the ends of Ray's two programs, if the simulation ends them
LOOK_SECONDS = 5.0  # between two requests for Flower's status of a run
PATIENCE = 3  # requests that the SuperLink may leave unanswered, half a minute each, before the run fails


@dataclass(frozen=True, kw_only=True)
class AppRun:
    """One run of a Flower app as a simulation.

    Attributes:
        app: Folder with the app's pyproject.toml.
        run_config: Overrides of the app's run-config; every key must be known to the app.
        supernodes: Number of virtual SuperNodes, hence of partitions.
        workers: Processes that serve them; at most the CPUs plus four, and never more than 32, work at once (Flower's
            thread pool).
        gpu_share: The share of one GPU that each worker counts as its own; Ray assigns GPUs to workers by it.
        out: Absolute folder of the run.
        logs: Absolute folder for the output of Flower and Ray (flower.log, added to); it may quote clients' data.
        ray: HOST:PORT of a Ray cluster that runs already, whose CPUs are the workers; None starts a Ray for this run.
    """

    app: Path
    run_config: Mapping[str, str | int | float | bool]
    supernodes: int
    workers: int
    gpu_share: float = 0.0
    out: Path
    logs: Path
    ray: str | None = None


def launch(
    run: AppRun,
    *,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    port: int | None = None,
    start_seconds: float = 3600.0,
    poll: float = 0.2,
) -> None:
    """Runs a Flower app as a simulation; returns when the run has completed and no process of it is left.

    The ServerApp appends one JSON object per line to `out/events.jsonl` during the run, and writes `out/status.json` at
    its end: `{"status": "completed"}` or `{"status": "failed", "reason": "one line"}`. A run has completed when both
    that file and Flower say so, because Flower also calls a run completed in which every client failed.

    Args:
        run: The app, its configuration, and its folders.
        on_event: Called with each new event, in this thread.
        port: Port of the SuperLink on 127.0.0.1; any free one if None.
        start_seconds: Longest time that SuperLink, simulation and Ray may each take to start, if none of them dies.
        poll: Seconds between two reads of the events.

    Raises:
        LaunchFailed: The port is taken, the app was refused, or the run failed, was stopped or lost a process; another
            run works in these folders.
    """
    out, logs = run.out, run.logs
    for folder in (out, logs):
        if not folder.is_absolute():
            raise ValueError(f"the folders of a run must be absolute, got {folder}")
        folder.mkdir(parents=True, exist_ok=True)
    with alone(logs):
        (out / STATUS).unlink(missing_ok=True)
        events = Events(out / EVENTS)
        plan = _Plan(
            app=str(run.app.resolve()),
            run_config=dict(run.run_config),
            supernodes=run.supernodes,
            workers=run.workers,
            gpu_share=run.gpu_share,
            out=str(out),
            logs=str(logs),
            ray=run.ray,
            port=free_port(port),
            start_seconds=start_seconds,
            marker=uuid.uuid4().hex,
            log_from=(logs / LOG).stat().st_size if (logs / LOG).exists() else 0,
        )
        (logs / OWNER).write_text(plan.marker)
        _watched(plan, logs, events, on_event, poll)


def _watched(
    plan: _Plan, logs: Path, events: Events, on_event: Callable[[dict[str, Any]], None] | None, poll: float
) -> None:
    """Starts the supervisor and passes events on until it ends; takes everything down on any exception."""
    if plan.ray is None:
        surroundings = environment(plan.marker)
    else:
        host = plan.ray.rpartition(":")[0]
        surroundings = environment(plan.marker, host) | cluster_environment(plan.ray, os.environ, plan.marker)
    with (logs / LOG).open("ab") as log:
        supervisor = subprocess.Popen(
            # -P and a path rather than -m: modules of this package must not be found under top-level names.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=surroundings,
            start_new_session=True,  # Ctrl-C reaches the launcher alone
            text=True,
        )
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.write(json.dumps(asdict(plan)) + "\n")
            supervisor.stdin.flush()
        while supervisor.poll() is None:
            for event in events.new():
                if on_event:
                    on_event(event)
            with contextlib.suppress(subprocess.TimeoutExpired):
                supervisor.wait(poll)
        for event in events.new():
            if on_event:
                on_event(event)
        verdict = supervisor.stdout.read().strip()
    finally:
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.close()  # the supervisor's sign to take everything down
        supervisor.wait()
        supervisor.stdout.close()
    reason = json.loads(verdict)["failed"] if verdict else f"the supervisor died ({ending(supervisor.returncode)})"
    if reason is not None:
        raise LaunchFailed(f"{one_line(reason)} (log: {logs / LOG})")


@dataclass(frozen=True)
class _Plan:
    """The supervisor's input."""

    app: str
    run_config: dict[str, str | int | float | bool]
    supernodes: int
    workers: int
    gpu_share: float
    out: str
    logs: str
    ray: str | None
    port: int
    start_seconds: float
    marker: str
    log_from: int  # the log before this byte is an earlier attempt's


# ---- The supervisor: everything below runs in a process of its own ----


class _RunFailed(Exception):
    """The reason why a run ended early."""


def _supervise() -> None:
    """Reads a plan from standard input, carries it out, takes everything down, prints the verdict."""
    plan = _Plan(**json.loads(sys.stdin.readline()))
    adopt_orphans()
    # Workers on other machines of a cluster read Flower's folder, and see the run's, but not this machine's own.
    within = _short_temporary_folder() if plan.ray is None else plan.logs
    place = Path(tempfile.mkdtemp(prefix="fedsynth-", dir=within))
    spawning = threading.Lock()  # whoever takes the run down holds it to the end: no process starts after that

    def end(verdict: str) -> NoReturn:
        spawning.acquire()
        kill_all(plan.marker)
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(BrokenPipeError):
            print(verdict, flush=True)
        os._exit(0)

    def end_with_launcher() -> None:
        sys.stdin.read()  # returns when the launcher closes the pipe or dies
        end("")

    threading.Thread(target=end_with_launcher, daemon=True).start()
    try:
        _carry_out(plan, place, spawning)
    except Exception as error:
        end(json.dumps({"failed": str(error) if isinstance(error, _RunFailed | CommandRefused) else repr(error)}))
    end(json.dumps({"failed": None}))


def _carry_out(plan: _Plan, place: Path, spawning: threading.Lock) -> None:
    """Starts Flower, submits the run and watches it to its end; raises _RunFailed unless it completed."""
    cwd, flower, ray, programs = (place / name for name in ("cwd", "flwr", "ray", "bin"))
    for folder in (cwd, flower, ray, programs):
        folder.mkdir()
    log_path = Path(plan.logs) / LOG
    (flower / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{plan.port}"\ninsecure = true\n'
    )
    import tomli_w

    config = place / "run.toml"
    config.write_text(tomli_w.dumps(plan.run_config))
    path = keep_output(SIMULATION, programs, log_path, os.environ["PATH"])
    if path is None:
        raise _RunFailed(f"{SIMULATION} is not on the PATH: is flwr[simulation] installed beside this Python?")
    os.environ.update(FLWR_HOME=str(flower), PATH=path)
    if plan.ray is None:
        os.environ.update({"RAY_TMPDIR": str(ray)} | ray_clocks(plan.start_seconds) | ray_token())

    log = log_path.open("ab")
    with spawning:
        superlink = subprocess.Popen(
            ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(plan.port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=cwd,
        )
        flwr = Commands(os.environ, cwd, log)

    begun = time.monotonic()
    while not listens(superlink, plan.port):
        if superlink.poll() is not None:
            raise _RunFailed(_last_words(plan) or f"the SuperLink did not start: {ending(superlink.returncode)}")
        _check_clock(plan, begun, "the SuperLink does not listen")
        time.sleep(0.05)

    each = f"client-resources-num-cpus=1 client-resources-num-gpus={plan.gpu_share}"
    here = f" init-args-num-cpus={plan.workers}" if plan.ray is None else ""  # Ray refuses it for a cluster
    federation = f"num-supernodes={plan.supernodes} {each}{here}"
    run = flwr("run", plan.app, "-c", str(config), "--federation-config", federation)
    _watch(plan, superlink, lambda: flwr("list", "--run-id", str(run["run-id"]))["runs"][0])


def _watch(plan: _Plan, superlink: subprocess.Popen[bytes], flower_status: Callable[[], dict[str, Any]]) -> None:
    """Returns when Flower and the ServerApp both report completion; raises _RunFailed as soon as they cannot."""
    parts: dict[str, psutil.Process] = {}
    flower: dict[str, Any] = {"status": "pending"}
    begun, next_look, refused, alone = time.monotonic(), 0.0, 0, 0.0
    while True:
        own = own_status(Path(plan.out))
        if own.get("status") == "failed":
            raise _RunFailed(own.get("reason") or "the ServerApp failed without a reason")
        if superlink.poll() is not None:
            raise _RunFailed(f"the SuperLink died in mid-run: {ending(superlink.returncode)}")
        parts |= _parts(PARTS - set(parts))
        dead = {name for name, process in parts.items() if not alive(process)}
        if SIMULATION in dead or time.monotonic() >= next_look:
            next_look = time.monotonic() + LOOK_SECONDS
            try:
                flower, refused = flower_status(), 0
            except CommandRefused:  # the SuperLink may be busy; the check above has seen it alive
                refused += 1
                if refused == PATIENCE:
                    raise
        if flower["status"].startswith("finished"):
            break
        starting = flower["status"] in ("pending", "starting")
        if SIMULATION in dead:
            if not starting:
                break
            # It took longer to start than Flower waits for; Flower then starts another one.
            del parts[SIMULATION]
        if "flower-superexec" in dead:
            raise _RunFailed(_last_words(plan, "SuperExec died in mid-run"))
        if len(dead & RAY) == 1:  # if both are dead, the simulation has ended them and ends itself
            alone = alone or time.monotonic()
            if time.monotonic() - alone > ENDING_SECONDS:
                raise _RunFailed(f"Ray's {' '.join(dead & RAY)} died in mid-run: {RAY_DIES}")
        if starting:
            _check_clock(plan, begun, "Flower has not started the simulation")
        time.sleep(0.1)

    own = own_status(Path(plan.out))
    if own.get("status") == "failed":
        raise _RunFailed(own.get("reason") or "the ServerApp failed without a reason")
    if not flower["status"].startswith("finished"):
        raise _RunFailed(_last_words(plan, "the simulation process died in mid-run"))
    if flower["status"] != "finished:completed":
        raise _RunFailed(flower.get("status-details") or _last_words(plan, f"Flower reports {flower['status']}"))
    if own.get("status") != "completed":
        raise _RunFailed(f"the ServerApp ended without writing {STATUS}")


def _check_clock(plan: _Plan, begun: float, what: str) -> None:
    taken = time.monotonic() - begun
    if taken > plan.start_seconds:
        raise _RunFailed(
            f"{what} after {taken:.0f} s (server.start_seconds): the machine is too busy; wait until it "
            "is less so, or raise that key"
        )


def _parts(names: set[str]) -> dict[str, psutil.Process]:
    """A run's processes that work now, by name; Ray's also if they have already died."""
    found = {}
    for process in psutil.Process().children(recursive=True) if names else ():
        with contextlib.suppress(psutil.Error):
            for name in names & _called(process):
                if alive(process) or name in RAY:
                    found[name] = process
    return found


def _called(process: psutil.Process) -> set[str]:
    """A program's names: the system's, which it keeps after its death, and those of its first two words."""
    names = {process.name()}
    with contextlib.suppress(psutil.ZombieProcess):
        names |= {Path(word).name for word in process.cmdline()[:2]}
    return names


def _short_temporary_folder() -> str | None:
    # Ray's paths of sockets are some 70 characters longer; the system allows about 100 in all.
    return None if len(tempfile.gettempdir()) <= 20 or not Path("/tmp").is_dir() else "/tmp"


def _last_words(plan: _Plan, otherwise: str = "") -> str:
    return last_words(Path(plan.logs) / LOG, plan.log_from, otherwise)


if __name__ == "__main__":
    _supervise()
