"""`fedsynth site start`: runs the programs of a site until they are ended."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedsynth.deployment.certificates import write_new
from fedsynth.deployment.client_process import SOCKET, CannotStandIn, UnknownFlower, stand_ins
from fedsynth.deployment.invitation import host_and_port
from fedsynth.deployment.policy import SITE, Place
from fedsynth.deployment.site.ready import check_account, check_key, check_state
from fedsynth.deployment.site.rows import check_rows, source_changed
from fedsynth.deployment.site.supernode import Patience, SiteFailed, tell, watch
from fedsynth.simulation.flower import (
    OWNER,
    LaunchFailed,
    alone,
    check_flower,
    environment,
    free_port,
    interrupt,
    spawn,
    take_down,
)
from fedsynth.system.proxy import is_loopback
from fedsynth.typed import BadValue


def start(place: Place, *, port: int = 0, client: Sequence[str] = ("-m", "fedsynth.deployment.client_process")) -> None:
    """Runs the site's SuperNode until Ctrl-C or SIGTERM; all its processes are gone then.

    There are four programs. The SuperNode talks to the server. The SuperExec starts a process for each message and
    authenticates with a secret that is new at each start. A replacement of Flower's client process
    (`fedsynth.deployment.client_process`) is the only program on the SuperExec's PATH. The warm process takes over
    from it.

    Flower gives the token of a message to its process as an argument, which other users of this machine can read
    unless /proc is mounted with hidepid=2: a site's machine should have no users who are not trusted with its data.

    Args:
        place: The site.
        port: Port of the SuperNode's own API on 127.0.0.1; 0 for any free one.
        client: Python's arguments that run `fedsynth.deployment.client_process`.

    Raises:
        BadValue: If a check fails before the start.
        SiteFailed: If the SuperNode ended by itself and would again, or another one works in the state folder.
    """
    check_flower()
    check_state(place)
    check_key(place)
    with alone(place.state, SiteFailed(f"another `fedsynth site start` works in {place.state}: end that one first")):
        marker = uuid.uuid4().hex
        try:
            port = free_port(port)
        except LaunchFailed as problem:
            raise SiteFailed(str(problem)) from problem
        (place.state / OWNER).write_text(marker)
        secret = place.state / "superexec.secret"
        secret.unlink(missing_ok=True)
        write_new(secret, secrets.token_bytes(32), secret=True)
        warm_socket, programs = _socket(place), place.state / "bin"
        try:
            stand_ins(programs, warm_socket, client, place.site.start_seconds)
        except (CannotStandIn, UnknownFlower) as problem:
            raise BadValue(str(problem)) from problem
        _open_account(place)
        check_rows(place)
        if changed := source_changed(place):
            tell(changed)
        environment = _environment(place, marker)
        # The SuperExec, which starts what a server asks for, finds only the replacements.
        alone_on_path = {**environment, "PATH": str(programs)}
        signal.signal(signal.SIGTERM, interrupt)
        running: list[subprocess.Popen[bytes]] = []
        patience = Patience(place)
        try:
            spawn(running, [sys.executable, "-P", *client, "serve", str(warm_socket)], environment, place.state)
            while True:
                supernode = spawn(running, _supernode(place, port, secret), environment, place.state)
                superexec = spawn(running, _superexec(port, secret, supernode.pid), alone_on_path, place.state)
                said, lived = watch(place, running[0], supernode, superexec, port)
                for program in (superexec, supernode):
                    program.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        program.wait(5.0)
                    program.kill()
                    program.wait()
                del running[1:]
                patience.wait(said, lived)
        except KeyboardInterrupt:
            print("ending the SuperNode and what runs on it", file=sys.stderr)
        finally:
            take_down(running, marker)


def _supernode(place: Place, port: int, secret: Path) -> list[str]:
    link = place.site.superlink
    return [_flower("flower-supernode"), "--superlink", link.address,
            "--root-certificates", str(place.path(link.root_certificates)),
            "--auth-supernode-private-key", str(place.path(link.private_key)),
            "--host", "127.0.0.1", "--port", str(port),
            "--isolation", "process", "--superexec-auth-secret-file", str(secret)]  # fmt: skip


def _superexec(port: int, secret: Path, supernode: int) -> list[str]:
    # Without TLS: the connection stays on this machine, and shows the secret.
    return [
        _flower("flower-superexec"),
        "--insecure",
        "--runtime-api-address",
        f"127.0.0.1:{port}",
        "--superexec-auth-secret-file",
        str(secret),
        "--parent-pid",
        str(supernode),
    ]


def _flower(program: str) -> str:
    """The whole path of a program of Flower beside this Python."""
    found = shutil.which(program, path=str(Path(sys.prefix) / "bin"))
    if found is None:
        raise BadValue(f"{program} is not beside this Python ({Path(sys.prefix) / 'bin'}): is flwr installed there?")
    return found


def _open_account(place: Place) -> None:
    """Makes the account of the site's data, the first time; logs charges that others have made on it since."""
    check_account(place)
    place.open_ledger(create=True).tell_witness()


def _environment(place: Place, marker: str) -> dict[str, str]:
    """The operator's environment without variables that would let programs reach outside."""
    host, _ = host_and_port(place.site.superlink.address)
    return {
        **environment(marker, *([host] if is_loopback(host) else [])),
        **place.cards,
        SITE: str(place.folder / "site.toml"),
        "FLWR_HOME": str(place.state / "flower"),
        "OMP_NUM_THREADS": str(place.site.threads),
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a process that forks must have one thread
        "TOKENIZERS_PARALLELISM": "false",
    }


def _socket(place: Place) -> Path:
    """The folder of the warm process's socket, as paths of Unix sockets must be short."""
    path = place.state / SOCKET
    if len(str(path)) < 100:
        return path
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    folder = Path(f"/tmp/fedsynth-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()  # the owner of a link could change its target later
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BadValue(f"{folder} belongs to someone else: name a shorter `state` folder in site.toml")
    return folder / f"{digest}.socket"
