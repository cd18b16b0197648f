"""Flower's programs as this package starts them: their environment, their command line, their end.

As a script, `flower.py` serves `flwr` commands: one JSON list per line, an empty line after each answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import psutil

from fedsynth.system.proxy import past_proxies
from fedsynth.typed import BadValue

MARKER = "FEDSYNTH_RUN"  # in the environment of every process that belongs together
OWNER = "marker"  # of the processes that work in a directory
EVENTS = "events.jsonl"
STATUS = "status.json"
LOG = "flower.log"
DEPLOYMENT = "deployment.json"  # of a run on real sites: fedsynth.deployment.plan
SERVER_PROCESS = "server.pid"  # in the private directory of a run on real sites: its ServerApp's process

# For the C library: freed memory stays with the process, as the next step needs as much. A training step of 15 million
# parameters takes 4 % less time when its pages need not be found again (docs/results.md). Blocks from 32 MB on go back
# at once: logits of real models change their size from batch to batch, and a heap that keeps them all outgrew 21 GB.
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


# From the first version to before the second, Flower's programs and its client process (deployment/client_process.py)
# are those that this package is written for. pyproject.toml says the same.
FLOWER = ((1, 41), (1, 43))


def check_flower() -> str:
    """Checks that this package works with the installed Flower: others may lack the parts that a site replaces.

    Returns:
        Its version, in words.

    Raises:
        BadValue: If it does not, or Flower is not installed.
    """
    (first, second), (beyond, minor) = FLOWER
    wanted = f"flwr[simulation]>={first}.{second},<{beyond}.{minor}"
    way_out = f"pip install '{wanted}', in an environment of its own if another program needs that one"
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise BadValue(f"Flower is not installed beside this Python: {way_out}") from None
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not FLOWER[0] <= (int(numbers[1]), int(numbers[2])) < FLOWER[1]:
        raise BadValue(f"Flower {found} is installed, and this fedsynth works with {wanted}: {way_out}")
    return f"flwr {found}"


class LaunchFailed(RuntimeError):
    """The run did not complete; the message is one line with the reason and the log's path."""

    what = "the run failed"


class CommandRefused(RuntimeError):
    """A `flwr` command failed; the message is Flower's own, or says that there was none."""


class Commands:
    """Flower's command line in its own process: its import, a second or more, is paid once for all commands.

    The process ends with `close`, or when its owner dies. Ctrl-C does not reach it, as stopping a run needs it.

    Args:
        environment: The process's environment, with FLWR_HOME, whose config.toml names the SuperLink.
        cwd: The process's working directory.
        log: Takes its output besides answers.
    """

    def __init__(self, environment: Mapping[str, str], cwd: Path, log: IO[bytes] | int = subprocess.DEVNULL) -> None:
        self.process = subprocess.Popen(
            # -P and a path rather than -m: modules of this package must not be found under top-level names.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=dict(environment),
            cwd=cwd,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *arguments: str) -> dict[str, Any]:
        """One `flwr` command and its JSON answer.

        Raises:
            CommandRefused: If Flower refuses it.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([*arguments, "--format", "json"]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise CommandRefused("Flower's command line could not be started") from None
        lines: list[str] = []
        while (line := self.process.stdout.readline()) != "\n":  # an empty line ends an answer ...
            if not line:  # ... and this is the end of the process
                raise CommandRefused(f"Flower's command line died over `flwr {arguments[0]}`")
            lines.append(line)
        if not lines:
            raise CommandRefused(f"Flower's command line gave no answer to {arguments[0]}")
        answer: dict[str, Any] = json.loads("".join(lines))
        if not answer.get("success"):
            said = str(answer.get("error-message", answer)).rpartition("\n\n")[2]  # without the SuperLink's name
            raise CommandRefused(f"`flwr {arguments[0]}` was refused: {one_line(said)}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


class Events:
    """Whole lines appended to a file from now on; lines of an earlier attempt are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def new(self) -> Iterator[dict[str, Any]]:
        """The events added since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        yield from (json.loads(line) for line in whole.splitlines() if line.strip())


@contextlib.contextmanager
def alone(folder: Path, otherwise: LaunchFailed | None = None) -> Iterator[None]:
    """Holds the lock of a directory, so that one run works in it at a time.

    Processes of an earlier run get time to end (its supervisor takes them down), then they are killed.

    Args:
        folder: The folder with the lock.
        otherwise: Raised if another run works there; None for a default message.

    Raises:
        LaunchFailed: If another run works there.
    """
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            said = f"another run works in this directory ({folder}): wait for it, or end it"
            raise otherwise or LaunchFailed(said) from None
        if (folder / OWNER).is_file():
            marker = (folder / OWNER).read_text()
            for _ in range(100):
                if not any(alive(p) for p in marked(marker)):
                    break
                time.sleep(0.2)
            kill_all(marker, children=False)
        yield


def environment(marker: str, *here: str) -> dict[str, str]:
    """The caller's environment, changed so that Flower's programs contact neither the internet nor other runs.

    Args:
        marker: Marks the processes of one run.
        *here: More names under which they find this machine.

    Raises:
        BadValue: If this package does not work with the installed Flower.
    """
    check_flower()
    # Relative entries mean the caller's working directory, not that of Flower's processes.
    path = [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return {
        **KEEPING,
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("RAY_")},
        **({"PYTHONPATH": os.pathsep.join(path)} if path else {}),
        **past_proxies(os.environ, *here),
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",  # a killed process leaves all its output
        "OMP_NUM_THREADS": "1",  # a worker per CPU, a thread per worker
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # the default of 1 s loses half a second on average
        "RAY_ADDRESS": "local",  # its own cluster even if another one runs
        "RAY_prestart_worker_first_driver": "0",  # such workers lack the run's environment and could not serve
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",  # added to the launcher's own; with the default, 15, a busy machine starves them
        MARKER: marker,
    }


def ray_token() -> dict[str, str]:
    """A token as environment variables: only the processes of one run can use its Ray. Without it, anyone who reaches a
    port of this machine can run code in it (CVE-2023-48022)."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def ray_clocks(seconds: float) -> dict[str, str]:
    """Ray's timeouts at its start, 20 to 100 s by default, set to `seconds`, as environment variables."""
    whole = str(math.ceil(seconds))
    names = (
        "raylet_start_wait_time_s",
        "worker_register_timeout_seconds",
        "gcs_server_request_timeout_seconds",
        "gcs_rpc_server_reconnect_timeout_s",
        "NUM_REDIS_GET_RETRIES",
    )
    milliseconds = str(min(math.ceil(1000 * seconds), 2**31 - 1))
    return {**{f"RAY_{name}": whole for name in names}, "RAY_agent_register_timeout_ms": milliseconds}


def keep_output(program: str, folder: Path, log: Path, path: str) -> str | None:
    """Puts a script before a program that appends its output to a log: SuperExec discards the output of its programs.

    Args:
        program: Name of the program.
        folder: Folder of the script.
        log: The log.
        path: The PATH in which the program is looked up.

    Returns:
        The PATH that finds the script first; None if there is no such program.
    """
    found = shutil.which(program, path=path)
    if found is None:
        return None
    stand_in = folder / program
    stand_in.write_text(f'#!/bin/sh\nexec {shlex.quote(found)} "$@" >>{shlex.quote(str(log))} 2>&1\n')
    stand_in.chmod(0o755)
    return os.pathsep.join([str(folder), path])


def own_status(out: Path) -> dict[str, Any]:
    """The status that the ServerApp writes at a run's end; empty until then."""
    try:
        return dict(json.loads((out / STATUS).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or half written
        return {}


def free_port(wanted: int | None = None) -> int:
    """A free port of 127.0.0.1: the wanted one, or any.

    Raises:
        LaunchFailed: If the wanted one cannot be used.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise LaunchFailed(
                f"port {wanted} on 127.0.0.1 cannot be used: {error.strerror}; name another, or none"
            ) from None
        return int(probe.getsockname()[1])


def listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """True if this process listens on the port, and not another one that has taken it meanwhile."""
    try:
        connections = psutil.Process(process.pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def last_words(log: Path, since: int, otherwise: str = "") -> str:
    """`otherwise`, then the last line of a log that names an error; bytes before `since` belong to another attempt."""
    lines = log.read_bytes()[since:].decode(errors="replace").splitlines()
    named = re.compile(r"\b(\w*Error|\w*Exception|ERROR|address already in use)\b")
    last = next((line for line in reversed(lines) if named.search(line)), "")
    return "; ".join(part for part in (otherwise, last.strip()) if part)


def one_line(text: str, limit: int = 500) -> str:
    """The text without line breaks and colours, cut at `limit` characters."""
    line = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def ending(code: int | None) -> str:
    """A process's exit code in words."""
    if code is None:
        return "it vanished"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def alive(process: psutil.Process) -> bool:
    """True if a process still works; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose parents die, so that it finds all of them (Linux)."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def kill_all(marker: str, within: float = 20.0, *, children: bool = True) -> None:
    """Kills descendants, and processes with the marker, until none is left: they may start new ones meanwhile."""
    me = psutil.Process()
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        own = me.children(recursive=True) if children else []
        victims = [p for p in {*own, *marked(marker)} if p != me and alive(p)]
        with contextlib.suppress(ChildProcessError):
            while children and os.waitpid(-1, os.WNOHANG)[0]:  # adopted orphans wait for us
                pass
        if not victims:
            return
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(victims, timeout=0.2)


def spawn(
    running: list[subprocess.Popen[bytes]],
    command: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    log: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a program that dies with this process, however that ends; Ctrl-C does not reach it.

    Args:
        running: The program is added to these, which `take_down` ends.
        command: The program and its arguments.
        env: The program's environment.
        cwd: The program's working directory.
        log: Takes the program's output; None for this process's own output.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    set_parent_death_signal = 1

    def with_me() -> None:
        if library is not None:
            library.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)

    running.append(
        subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=with_me,
        )
    )
    return running[-1]


def take_down(running: Sequence[subprocess.Popen[bytes]], marker: str) -> None:
    """Ends the programs that `spawn` started, and their children; the last first.

    A SuperExec ends before the program that it serves: its app then ends by itself and can still report that.
    """
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)
    for process, patience in zip(reversed(running), (6.0, 5.0, 2.0), strict=False):
        process.terminate()
        end = time.monotonic() + patience
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        if process is running[-1]:
            mine = {p.pid for p in running}
            while time.monotonic() < end and any(alive(p) for p in marked(marker) if p.pid not in mine):
                time.sleep(0.1)
    for process in running:
        process.kill()
        process.wait()
    kill_all(marker, children=False)


def interrupt(*_: object) -> None:
    """A handler with which SIGTERM ends a program as Ctrl-C does.

    Raises:
        KeyboardInterrupt: Always.
    """
    raise KeyboardInterrupt


def marked(marker: str) -> Iterator[psutil.Process]:
    """All processes with the marker whose environment can be read."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == marker:
                yield process


def _serve() -> None:
    from flwr.cli.app import app

    for line in sys.stdin:
        with contextlib.suppress(SystemExit):
            app(json.loads(line))
        print(flush=True)


if __name__ == "__main__":
    _serve()
