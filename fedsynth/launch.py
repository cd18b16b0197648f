"""One Flower simulation: started in a place of its own, watched, and taken down to the last process.

`launch` starts a supervisor (this same file, run as a script), and the supervisor is the ancestor of everything else:
SuperLink, SuperExec, simulation, Ray. It ends when the pipe from its launcher closes, so that nothing outlives a
launcher, however that one ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

APP = Path(__file__).parent / "app"  # a link to simulations/ in a checkout, the same files in a wheel
MARKER = "FEDSYNTH_RUN"  # in the environment of every process of a run
EVENTS = "events.jsonl"
STATUS = "status.json"
LOG = "flower.log"
OWNER = "marker"  # of the processes that work in a run's directory
SIMULATION = "flwr-simulation"


class LaunchFailed(RuntimeError):
    """The run did not complete; the message is one line with the reason and the place of the log."""


def launch(
    app: Path,
    *,
    run_config: Mapping[str, str | int | float | bool],
    supernodes: int,
    workers: int,
    gpu_share: float = 0.0,
    out: Path,
    logs: Path,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    port: int | None = None,
    poll: float = 0.2,
) -> None:
    """Run a Flower app as a simulation; return when it completed and no process of it is left.

    The ServerApp appends one JSON object per line to `out/events.jsonl` as it goes, and at its end writes
    `out/status.json`: `{"status": "completed"}` or `{"status": "failed", "reason": "one line"}`. A run has completed
    when both that file and Flower say so, because Flower also calls a run completed in which every client failed.

    Args:
        app: Folder with the app's pyproject.toml.
        run_config: Overrides of the app's run-config; every key must be known to the app.
        supernodes: Virtual SuperNodes, hence partitions.
        workers: Processes that serve them; more than the CPUs plus four never work at once (Flower's thread pool).
        gpu_share: Of one GPU, that each worker counts as its own: which of several it sees is Ray's choice by that.
        out: Absolute folder of the run.
        logs: Absolute folder for the output of Flower and Ray (flower.log, added to); it may quote clients' data.
        on_event: Called with each new event, in this thread.
        port: Port of the SuperLink on 127.0.0.1; any free one if None.
        poll: Seconds between two looks at the events.

    Raises:
        LaunchFailed: The port is taken, the app was refused, or the run failed, was stopped or lost a process; another
            run works in these folders.
    """
    for folder in (out, logs):
        if not folder.is_absolute():
            raise ValueError(f"the folders of a run must be absolute, got {folder}")
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(logs):
        (out / STATUS).unlink(missing_ok=True)
        events = _Events(out / EVENTS)
        plan = _Plan(
            app=str(app.resolve()),
            run_config=dict(run_config),
            supernodes=supernodes,
            workers=workers,
            gpu_share=gpu_share,
            out=str(out),
            logs=str(logs),
            port=_free_port(port),
            marker=uuid.uuid4().hex,
            log_from=(logs / LOG).stat().st_size if (logs / LOG).exists() else 0,
        )
        (logs / OWNER).write_text(plan.marker)
        _watched(plan, logs, events, on_event, poll)


def _watched(
    plan: _Plan, logs: Path, events: _Events, on_event: Callable[[dict[str, Any]], None] | None, poll: float
) -> None:
    """Starts the supervisor and passes events on until it ends; takes everything down on any exception."""
    with (logs / LOG).open("ab") as log:
        supervisor = subprocess.Popen(
            # -P and a path rather than -m: modules of this package must not be found under top-level names.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(plan.marker),
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
    reason = json.loads(verdict)["failed"] if verdict else f"the supervisor died ({_ending(supervisor.returncode)})"
    if reason is not None:
        raise LaunchFailed(f"{_one_line(reason)} (log: {logs / LOG})")


@dataclass(frozen=True)
class _Plan:
    """What the supervisor is told."""

    app: str
    run_config: dict[str, str | int | float | bool]
    supernodes: int
    workers: int
    gpu_share: float
    out: str
    logs: str
    port: int
    marker: str
    log_from: int  # what stands before in the log is an earlier attempt's


class _Events:
    """Whole lines that a file has gained; those of an earlier, resumed run are not news."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def new(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        yield from (json.loads(line) for line in whole.splitlines() if line.strip())


@contextlib.contextmanager
def _alone(logs: Path) -> Iterator[None]:
    """A run that goes on must be the only one in its directory: the launcher holds a lock as long as it lives.

    What an earlier one has left is waited for (its supervisor takes the processes down), then killed.

    Raises:
        LaunchFailed: If another launcher works there.
    """
    with (logs / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LaunchFailed(f"another run works in this directory ({logs}): wait for it, or end it") from None
        if (logs / OWNER).is_file():
            marker = (logs / OWNER).read_text()
            for _ in range(100):
                if not any(_alive(p) for p in _marked(marker)):
                    break
                time.sleep(0.2)
            _kill_all(marker, children=False)
        yield


def _free_port(wanted: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise LaunchFailed(f"port {wanted} on 127.0.0.1 cannot be used: {error.strerror}") from None
        return int(probe.getsockname()[1])


# For the C library: memory that is let go is kept for what comes next, which is as large: a training step of 15 million
# parameters takes 4 % less time when its pages need not be found anew (docs/results.md).
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def _environment(marker: str) -> dict[str, str]:
    """The caller's environment without what would let the run reach outside itself or meet another."""
    # Relative entries mean the caller's working directory, not that of Flower's processes.
    path = [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return {
        **KEEPING,
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("RAY_")},
        **({"PYTHONPATH": os.pathsep.join(path)} if path else {}),
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",  # a killed process leaves its last words
        "OMP_NUM_THREADS": "1",  # a worker per CPU, a thread per worker
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # the default of 1 s is half a second lost on average
        "RAY_ADDRESS": "local",  # a cluster of its own even where another one runs
        "RAY_prestart_worker_first_driver": "0",  # those could not serve: they lack the run's environment
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        MARKER: marker,
    }


def _one_line(text: str, limit: int = 500) -> str:
    line = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "it vanished"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


# ---- The supervisor: everything below runs in a process of its own ----


class _RunFailed(Exception):
    """The reason why a run ended early."""


def _supervise() -> None:
    """Read a plan from standard input, carry it out, take everything down, print the verdict."""
    plan = _Plan(**json.loads(sys.stdin.readline()))
    _adopt_orphans()
    place = Path(tempfile.mkdtemp(prefix="fedsynth-", dir=_short_temporary_folder()))
    spawning = threading.Lock()  # held for good by whoever takes the run down: no process is born after that

    def end(verdict: str) -> NoReturn:
        spawning.acquire()
        _kill_all(plan.marker)
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
        end(json.dumps({"failed": str(error) if isinstance(error, _RunFailed) else repr(error)}))
    end(json.dumps({"failed": None}))


def _carry_out(plan: _Plan, place: Path, spawning: threading.Lock) -> None:
    """Start Flower, submit the run and watch it to its end; raises _RunFailed unless it completed."""
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
    # SuperExec throws the simulation's output away; this stands before the real program on the PATH and keeps it.
    program = shutil.which(SIMULATION)
    if program is None:
        raise _RunFailed(f"{SIMULATION} is not on the PATH: is flwr[simulation] installed beside this Python?")
    stand_in = programs / SIMULATION
    stand_in.write_text(f'#!/bin/sh\nexec {shlex.quote(program)} "$@" >>{shlex.quote(str(log_path))} 2>&1\n')
    stand_in.chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    os.environ.update(FLWR_HOME=str(flower), RAY_TMPDIR=str(ray), PATH=path)

    log = log_path.open("ab")
    common: dict[str, Any] = {"cwd": cwd, "stderr": log}
    with spawning:
        superlink = subprocess.Popen(
            ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(plan.port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            **common,
        )
        commands = subprocess.Popen(
            [sys.executable, "-P", __file__, "commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **common,
        )

    while not _listens(superlink, plan.port):
        if superlink.poll() is not None:
            raise _RunFailed(_last_words(plan) or f"the SuperLink did not start: {_ending(superlink.returncode)}")
        time.sleep(0.05)

    each = f"client-resources-num-cpus=1 client-resources-num-gpus={plan.gpu_share}"
    federation = f"num-supernodes={plan.supernodes} {each} init-args-num-cpus={plan.workers}"
    run = _flwr(commands, ["run", plan.app, "-c", str(config), "--federation-config", federation])
    _watch(plan, superlink, lambda: _flwr(commands, ["list", "--run-id", str(run["run-id"])])["runs"][0])


def _watch(plan: _Plan, superlink: subprocess.Popen[bytes], flower_status: Callable[[], dict[str, Any]]) -> None:
    """Return when the run has completed in Flower's words and in ours; raise _RunFailed as soon as it cannot."""
    simulation: psutil.Process | None = None
    next_look = 0.0
    while True:
        own = _own_status(plan)
        if own.get("status") == "failed":
            raise _RunFailed(own.get("reason") or "the ServerApp failed without a reason")
        if superlink.poll() is not None:
            raise _RunFailed(f"the SuperLink died in mid-run: {_ending(superlink.returncode)}")
        simulation = simulation or _simulation()
        ended = simulation is not None and not _alive(simulation)
        if ended or time.monotonic() >= next_look:
            next_look = time.monotonic() + 5.0
            flower = flower_status()
            if flower["status"].startswith("finished") or ended:
                break
        time.sleep(0.1)

    own = _own_status(plan)
    if own.get("status") == "failed":
        raise _RunFailed(own.get("reason") or "the ServerApp failed without a reason")
    if not flower["status"].startswith("finished"):
        raise _RunFailed(_last_words(plan, "the simulation process died in mid-run"))
    if flower["status"] != "finished:completed":
        raise _RunFailed(flower.get("status-details") or _last_words(plan, f"Flower reports {flower['status']}"))
    if own.get("status") != "completed":
        raise _RunFailed(f"the ServerApp ended without writing {STATUS}")


def _own_status(plan: _Plan) -> dict[str, Any]:
    try:
        return dict(json.loads((Path(plan.out) / STATUS).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or half written
        return {}


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether this process, not another that was given the same port meanwhile, answers on it."""
    try:
        connections = psutil.Process(process.pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def _flwr(commands: subprocess.Popen[str], arguments: Sequence[str]) -> dict[str, Any]:
    """One `flwr` command and its JSON answer."""
    assert commands.stdin is not None
    assert commands.stdout is not None
    try:
        commands.stdin.write(json.dumps([*arguments, "--format", "json"]) + "\n")
        commands.stdin.flush()
    except BrokenPipeError:
        raise _RunFailed("Flower's command line could not be started") from None
    lines = list(iter(commands.stdout.readline, "\n"))  # an empty line ends an answer ...
    if not lines:
        raise _RunFailed(f"Flower's command line gave no answer to {arguments[0]}")
    answer: dict[str, Any] = json.loads("".join(lines))
    if not answer.get("success"):
        raise _RunFailed(f"`flwr {arguments[0]}` was refused: {answer.get('error-message', answer)}")
    return answer


def _commands() -> None:
    """Serve `flwr` commands, one JSON list per line; the import of Flower's command line is paid once."""
    from flwr.cli.app import app

    for line in sys.stdin:
        with contextlib.suppress(SystemExit):
            app(json.loads(line))
        print(flush=True)


def _simulation() -> psutil.Process | None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(Path(word).name == SIMULATION for word in process.cmdline()[:2]):
                return process
    return None


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _last_words(plan: _Plan, otherwise: str = "") -> str:
    """The last line of the log that names an error, after `otherwise`."""
    lines = (Path(plan.logs) / LOG).read_bytes()[plan.log_from :].decode(errors="replace").splitlines()
    named = re.compile(r"\b(\w*Error|\w*Exception|ERROR|address already in use)\b")
    last = next((line for line in reversed(lines) if named.search(line)), "")
    return "; ".join(part for part in (otherwise, last.strip()) if part)


def _short_temporary_folder() -> str | None:
    # Ray puts sockets some 70 characters below; the system allows about 100 in all.
    return None if len(tempfile.gettempdir()) <= 20 or not Path("/tmp").is_dir() else "/tmp"


def _adopt_orphans() -> None:
    """Become the parent of descendants whose parents die, so that all of them are found (Linux)."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _kill_all(marker: str, within: float = 20.0, *, children: bool = True) -> None:
    """Kill descendants, and processes with the marker, until none is left: new ones may be born meanwhile."""
    me = psutil.Process()
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        own = me.children(recursive=True) if children else []
        victims = [p for p in {*own, *_marked(marker)} if p != me and _alive(p)]
        with contextlib.suppress(ChildProcessError):
            while children and os.waitpid(-1, os.WNOHANG)[0]:  # adopted orphans wait for us
                pass
        if not victims:
            return
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(victims, timeout=0.2)


def _marked(marker: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == marker:
                yield process


if __name__ == "__main__":
    if sys.argv[1:] == ["commands"]:
        _commands()
    else:
        _supervise()
