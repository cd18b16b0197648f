"""A coordinator's SuperLink in the foreground: started, watched, and taken down with everything that runs on it."""

from __future__ import annotations

import contextlib
import ctypes
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fedsynth import certificates
from fedsynth.flower import (
    OWNER,
    LaunchFailed,
    alive,
    alone,
    ending,
    keep_output,
    kill_all,
    last_words,
    listens,
    marked,
    one_line,
)
from fedsynth.invitation import FILE as INVITATION
from fedsynth.invitation import joined, read_invitation
from fedsynth.server import CONFIG, ServerConfig, check, flower_environment, flower_home, reach, read_config
from fedsynth.typed import BadValue

SUPERLINK_LOG = "superlink.log"
SERVERAPP = "flwr-serverapp"
LISTENING_SECONDS = 60.0


class ServerFailed(LaunchFailed):
    """A server could not be started, or ended by itself; the message is one line."""

    what = "the server failed"


def start(folder: Path, tell: Callable[[str], None]) -> None:
    """Runs a coordinator's SuperLink until Ctrl-C or SIGTERM; everything that it started is gone then.

    Transport is TLS always, sites show that they hold a registered key. The SuperLink starts no SuperExec of its own
    (`--isolation subprocess`), which could not prove who it is: whoever reached the port could take the place of a
    run's ServerApp. The SuperExec that is started here shows a secret that is made anew each time.

    Args:
        folder: The coordinator's.
        tell: Called with lines for the terminal; the log's own lines go to standard output as they come.

    Raises:
        BadValue: What is wrong in the folder.
        ServerFailed: The SuperLink or the SuperExec died, or another one works in the folder.
    """
    folder = folder.absolute()
    for warning in check(folder):
        tell(f"warning: {warning}")
    config, invitation, home = read_config(folder), read_invitation(folder / INVITATION), flower_home(folder)
    with alone(home, ServerFailed(f"another `fedsynth server start {folder}` is running: end that one first")):
        _check_port(config.host, config.port)
        marker = uuid.uuid4().hex
        (home / OWNER).write_text(marker)
        log = folder / SUPERLINK_LOG
        since = log.stat().st_size if log.exists() else 0
        signal.signal(signal.SIGTERM, _interrupt)
        running: list[subprocess.Popen[bytes]] = []
        try:
            with log.open("ab") as out:
                superlink = _spawn(running, _superlink(folder, config), folder, marker, out)
                shown = _Tail(log, since)
                _wait_for(superlink, config, log, since, shown)
                superexec = _spawn(running, _superexec(folder, config, superlink.pid), folder, marker, out)
            tell(f"the SuperLink listens on {joined(config.host, config.port)}, sites connect to {invitation.address}; "
                 f"Ctrl-C ends it (log: {log})")  # fmt: skip
            while superlink.poll() is None and superexec.poll() is None:
                shown.show()
                time.sleep(0.2)
            shown.show()
            who, code = ("SuperLink", superlink.poll()) if superlink.poll() is not None else (
                "SuperExec", superexec.poll())  # fmt: skip
            raise ServerFailed(f"{last_words(log, since, f'the {who} died: {ending(code)}')} (log: {log})")
        except KeyboardInterrupt:
            tell("ending the SuperLink and what runs on it")
        finally:
            _take_down(running, marker)


def _superlink(folder: Path, config: ServerConfig) -> list[str]:
    secret = flower_home(folder) / "superexec.secret"
    secret.unlink(missing_ok=True)
    certificates.write_new(secret, secrets.token_bytes(32), secret=True)
    return ["flower-superlink", "--host", config.host, "--port", str(config.port),
            "--ssl-certfile", config.certificate, "--ssl-keyfile", config.key, "--ssl-ca-certfile", config.ca,
            "--enable-supernode-auth", "--database", str(folder / "state.db"),
            "--isolation", "process", "--superexec-auth-secret-file", str(secret),
            "--disable-runtime-dependency-installation"]  # fmt: skip


def _superexec(folder: Path, config: ServerConfig, superlink: int) -> list[str]:
    return ["flower-superexec", "--runtime-api-address", config.local, "--root-certificates", config.ca,
            "--superexec-auth-secret-file", str(flower_home(folder) / "superexec.secret"),
            "--parent-pid", str(superlink)]  # fmt: skip


def _spawn(
    running: list[subprocess.Popen[bytes]], command: list[str], folder: Path, marker: str, log: BinaryIO
) -> subprocess.Popen[bytes]:
    """A program of Flower that dies with this process, however that ends, and that Ctrl-C does not reach by itself."""
    env, programs = flower_environment(folder, marker), flower_home(folder) / "bin"
    programs.mkdir(exist_ok=True)
    path = keep_output(SERVERAPP, programs, folder / SUPERLINK_LOG, env["PATH"])
    if path is None:
        raise ServerFailed(f"{SERVERAPP} is not on the PATH: is flwr installed beside this Python?")
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    set_parent_death_signal = 1

    def with_me() -> None:
        if library is not None:
            library.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)

    running.append(
        subprocess.Popen(command, env={**env, "PATH": path}, cwd=flower_home(folder), stdin=subprocess.DEVNULL,
                         stdout=log, stderr=log, start_new_session=True, preexec_fn=with_me)
    )  # fmt: skip
    return running[-1]


def _wait_for(superlink: subprocess.Popen[bytes], config: ServerConfig, log: Path, since: int, shown: _Tail) -> None:
    end = time.monotonic() + LISTENING_SECONDS
    while not listens(superlink, config.port):
        shown.show()
        if superlink.poll() is not None:
            said = last_words(log, since, f"the SuperLink did not start: {ending(superlink.returncode)}")
            raise ServerFailed(f"{one_line(said)} (log: {log})")
        if time.monotonic() > end:
            raise ServerFailed(f"the SuperLink does not listen after {LISTENING_SECONDS:.0f} s (log: {log})")
        time.sleep(0.05)
    try:
        reach(log.parent, config)
    except BadValue as problem:
        raise ServerFailed(
            f"the SuperLink listens, and `local` of {CONFIG} does not lead to it: {problem}"
        ) from problem


def _take_down(running: list[subprocess.Popen[bytes]], marker: str) -> None:
    """The SuperExec first: a ServerApp then ends by itself, and says so while the SuperLink still listens."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)
    for process, patience in zip(reversed(running), (6.0, 5.0), strict=False):
        process.terminate()
        end = time.monotonic() + patience
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        if process is not running[0]:
            while time.monotonic() < end and any(alive(p) for p in marked(marker) if p.pid != running[0].pid):
                time.sleep(0.1)
    for process in running:
        process.kill()
        process.wait()
    kill_all(marker, children=False)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _Tail:
    """What a log gains, on standard output."""

    def __init__(self, log: Path, since: int) -> None:
        self.log, self.at = log, since

    def show(self) -> None:
        with self.log.open("rb") as file:
            file.seek(self.at)
            new = file.read()
        self.at += len(new)
        # Nobody may look any more: that is no reason to end.
        with contextlib.suppress(OSError):
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()


def _check_port(host: str, port: int) -> None:
    try:
        kind, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as problem:
        raise BadValue(f"the SuperLink cannot listen on {joined(host, port)}: {problem.strerror}; see host and port in "
                       f"{CONFIG}") from problem  # fmt: skip
