"""A coordinator's SuperLink in the foreground: started, watched, and taken down with all its processes."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from fedsynth.deployment import certificates
from fedsynth.deployment.invitation import FILE as INVITATION
from fedsynth.deployment.invitation import joined, read_invitation
from fedsynth.deployment.server import CONFIG, ServerConfig, check, flower_environment, flower_home, reach, read_config
from fedsynth.simulation.flower import (
    OWNER,
    LaunchFailed,
    alone,
    check_flower,
    ending,
    interrupt,
    keep_output,
    last_words,
    listens,
    one_line,
    spawn,
    take_down,
)
from fedsynth.typed import BadValue

SUPERLINK_LOG = "superlink.log"
SERVERAPP = "flwr-serverapp"


class ServerFailed(LaunchFailed):
    """A server could not be started, or ended by itself; the message is one line."""

    what = "the server failed"


def start(folder: Path, tell: Callable[[str], None]) -> None:
    """Runs a coordinator's SuperLink until Ctrl-C or SIGTERM; all its processes are gone then.

    The transport is always TLS, and sites prove that they hold a registered key. The SuperLink's own SuperExec
    (`--isolation subprocess`) has no authentication: whoever reached the port could act as a run's ServerApp. So this
    function starts the SuperExec itself, with a secret that is new at each start.

    Args:
        folder: The coordinator's folder.
        tell: Called with lines for the terminal; the log's own lines go to standard output as they come.

    Raises:
        BadValue: If the folder has a fault, or this package does not work with the installed Flower.
        ServerFailed: If the SuperLink or the SuperExec died, or another one works in the folder.
    """
    check_flower()
    folder = folder.absolute()
    for warning in check(folder):
        tell(f"warning: {warning}")
    config, invitation, client = read_config(folder), read_invitation(folder / INVITATION), flower_home(folder)
    with alone(client, ServerFailed(f"another `fedsynth server start {folder}` is running: end that one first")):
        _check_port(config.host, config.port)
        marker = uuid.uuid4().hex
        (client / OWNER).write_text(marker)
        log = folder / SUPERLINK_LOG
        since = log.stat().st_size if log.exists() else 0
        signal.signal(signal.SIGTERM, interrupt)
        env = _environment(folder, marker)
        running: list[subprocess.Popen[bytes]] = []
        try:
            with log.open("ab") as out:
                superlink = spawn(running, _superlink(folder, config), env, client, out)
                shown = _Tail(log, since)
                _wait_for(superlink, config, log, since, shown)
                superexec = spawn(running, _superexec(folder, config, superlink.pid), env, client, out)
            tell(
                f"the SuperLink listens on {joined(config.host, config.port)}, sites connect to {invitation.address}; "
                f"Ctrl-C ends it (log: {log})"
            )
            while superlink.poll() is None and superexec.poll() is None:
                shown.show()
                time.sleep(0.2)
            shown.show()
            who, code = (
                ("SuperLink", superlink.poll()) if superlink.poll() is not None else ("SuperExec", superexec.poll())
            )
            raise ServerFailed(f"{last_words(log, since, f'the {who} died: {ending(code)}')} (log: {log})")
        except KeyboardInterrupt:
            tell("ending the SuperLink and what runs on it")
        finally:
            take_down(running, marker)


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
    return [
        "flower-superexec",
        "--runtime-api-address",
        config.local,
        "--root-certificates",
        config.ca,
        "--superexec-auth-secret-file",
        str(flower_home(folder) / "superexec.secret"),
        "--parent-pid",
        str(superlink),
    ]


def _environment(folder: Path, marker: str) -> dict[str, str]:
    """The environment with a PATH that first finds a program that logs a ServerApp's output."""
    env, programs = flower_environment(folder, marker), flower_home(folder) / "bin"
    programs.mkdir(exist_ok=True)
    path = keep_output(SERVERAPP, programs, folder / SUPERLINK_LOG, env["PATH"])
    if path is None:
        raise LaunchFailed(f"{SERVERAPP} is not on the PATH: is flwr installed beside this Python?")
    return {**env, "PATH": path}


def _wait_for(superlink: subprocess.Popen[bytes], config: ServerConfig, log: Path, since: int, shown: _Tail) -> None:
    begun = time.monotonic()
    while not listens(superlink, config.port):
        shown.show()
        if superlink.poll() is not None:
            said = last_words(log, since, f"the SuperLink did not start: {ending(superlink.returncode)}")
            raise ServerFailed(f"{one_line(said)} (log: {log})")
        if (taken := time.monotonic() - begun) > config.start_seconds:
            raise ServerFailed(
                f"the SuperLink does not listen after {taken:.0f} s (start_seconds of {CONFIG}): wait "
                f"until this machine is less busy, or raise that key (log: {log})"
            )
        time.sleep(0.05)
    try:
        reach(log.parent, config, config.start_seconds)
    except BadValue as problem:
        raise ServerFailed(
            f"the SuperLink listens, and `local` of {CONFIG} does not lead to it: {problem}"
        ) from problem


class _Tail:
    """Copies a log's new lines to standard output."""

    def __init__(self, log: Path, since: int) -> None:
        self.log, self.at = log, since

    def show(self) -> None:
        with self.log.open("rb") as file:
            file.seek(self.at)
            new = file.read()
        self.at += len(new)
        # Nobody may read the output any more; that is no reason to end.
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
        raise BadValue(
            f"the SuperLink cannot listen on {joined(host, port)}: {problem.strerror}; see host and port in {CONFIG}"
        ) from problem
