"""`fedsynth site`: a site's file and key are made, checked, and its SuperNode runs."""

from __future__ import annotations

import hashlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from fedsynth.certificates import write_new, write_node_keys
from fedsynth.clients.approval import Decision
from fedsynth.clients.policy import SITE, Place
from fedsynth.clients.process import SOCKET, CannotStandIn, UnknownFlower, stand_ins
from fedsynth.clients.trail import Trail, entries
from fedsynth.corpus import Corpus
from fedsynth.flower import OWNER, LaunchFailed, alone, ending, environment, interrupt, spawn, take_down
from fedsynth.invitation import Invitation, check_name, read_invitation
from fedsynth.site_ready import check_key, check_state, server
from fedsynth.tasks import ORDERS
from fedsynth.typed import BadValue

AGAIN_SECONDS = 5.0  # before a SuperNode that ended is started again
SHORT_SECONDS = 45.0  # a SuperNode that lived no longer was not let in
SILENT_SECONDS = 30.0  # without a connection; between two tries of its own Flower waits up to 20
LOOK_SECONDS = 2.0
REFUSED_SECONDS = 90.0  # so long it may be refused; longer than a server takes to find a dead one out


class SiteFailed(LaunchFailed):
    """A site's SuperNode could not be started, or ended by itself; the message is one line."""

    what = "the site failed"


def init(folder: Path, *, name: str, invitation: Path) -> Path:
    """Makes a site's folder: site.toml to be edited, the CA's certificate, and a key whose public half is returned.

    Raises:
        BadValue: If the folder holds a site already, or the invitation cannot be read.
    """
    if (folder / "site.toml").exists():
        raise BadValue(f"{folder} holds a site already: its key and its account must not be made anew")
    invited = read_invitation(invitation)
    check_name(name)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    told = folder / f"{name}.pub"
    write_node_keys(folder / "keys" / "node", told, comment=name)
    write_new(folder / "ca.crt", invited.ca.encode())
    write_new(folder / "site.toml", template(name, invited).encode())  # last: with it the folder is a site's
    return told


def new_key(folder: Path) -> Path:
    """A new key for a site: one that was removed at the server is never taken again. Account and trail stay.

    Returns:
        The public half, to be sent to the coordinator. The old halves stay under other names.

    Raises:
        BadValue: If the folder holds no site.
    """
    from fedsynth.clients.policy import load_site

    place = load_site(folder)
    private, public = place.path(place.site.superlink.private_key), place.path(f"{place.site.name}.pub")
    for path in (private, public):
        if path.exists():
            path.rename(path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
    write_node_keys(private, public, comment=place.site.name)
    return public


def template(name: str, invited: Invitation) -> str:
    """site.toml, with what the coordinator proposes filled in, for the operator to judge."""
    asked = invited.scenario
    filled = {
        "@name@": name,
        "@address@": invited.address,
        "@task@": asked.task,
        "@labels@": _line(labels=asked.labels) if asked.labels else "",
        "@models@": _line(models=asked.models),
        "@strategies@": _line(strategies=asked.strategies),
        "@asked@": "no budget" if asked.epsilon is None else f"epsilon {asked.epsilon:g}",
    }
    text = resources.files("fedsynth").joinpath("site.template.toml").read_text(encoding="utf-8")
    for mark, value in filled.items():
        text = text.replace(mark, value)
    if asked.task == "instructions":
        text = text.replace('label = "label"           # TODO (of instructions: response = "response")',
                            'response = "response"     # TODO')  # fmt: skip
    return text


def _line(**values: tuple[str, ...]) -> str:
    """`key = [...]` in TOML."""
    return tomli_w.dumps({key: list(found) for key, found in values.items()}).strip()


def start(place: Place, *, port: int = 0, client: Sequence[str] = ("-m", "fedsynth.clients.process")) -> None:
    """Runs the site's SuperNode until Ctrl-C or SIGTERM; everything that it started is gone then.

    Four programs: the SuperNode, which talks to the server; the SuperExec, which starts a process for each message and
    shows a secret that is made anew each time; in place of Flower's client process a stand-in
    (`fedsynth.clients.process`), the only program on the SuperExec's PATH; and the warm process that it hands over to.

    Flower gives the token of a message to its process as an argument, which other users of this machine can read
    unless /proc is mounted with hidepid=2: a site's machine should have no users who are not trusted with its data.

    Args:
        place: The site.
        port: Of the SuperNode's own API on 127.0.0.1; any free one if 0.
        client: How Python runs `fedsynth.clients.process`.

    Raises:
        BadValue: If something stands in the way.
        SiteFailed: The SuperNode ended by itself and would again, or another one works in the state folder.
    """
    check_state(place)
    check_key(place)
    with alone(place.state, SiteFailed(f"another `fedsynth site start` works in {place.state}: end that one first")):
        marker, port = uuid.uuid4().hex, port or _free_port()
        (place.state / OWNER).write_text(marker)
        secret = place.state / "superexec.secret"
        secret.unlink(missing_ok=True)
        write_new(secret, secrets.token_bytes(32), secret=True)
        warm_socket, programs = _socket(place), place.state / "bin"
        try:
            stand_ins(programs, warm_socket, client)
        except (CannotStandIn, UnknownFlower) as problem:
            raise BadValue(str(problem)) from problem
        _open_account(place)
        environment = _environment(place, marker)
        # Nothing but the stand-ins can be found by who starts what a server asks for.
        alone_on_path = {**environment, "PATH": str(programs)}
        signal.signal(signal.SIGTERM, interrupt)
        running: list[subprocess.Popen[bytes]] = []
        patience = _Patience(place)
        try:
            spawn(running, [sys.executable, "-P", *client, "serve", str(warm_socket)], environment, place.state)
            while True:
                supernode = spawn(running, _supernode(place, port, secret), environment, place.state)
                superexec = spawn(running, _superexec(port, secret, supernode.pid), alone_on_path, place.state)
                said = _watch(place, running[0], supernode, superexec, port)
                for program in (superexec, supernode):
                    program.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        program.wait(5.0)
                    program.kill()
                    program.wait()
                del running[1:]
                patience.wait(said)
        except KeyboardInterrupt:
            print("ending the SuperNode and what runs on it", file=sys.stderr)
        finally:
            take_down(running, marker)


@dataclass
class _Patience:
    """Whether a SuperNode that ended is started anew. It gives up where a network is cut at the wrong moment; and a
    server takes one that died for connected, and refuses the next, until it has missed its heartbeats for a minute."""

    place: Place
    begun: float = field(default_factory=time.monotonic)
    first: float | None = None  # when the first of several ended that hardly lived

    def wait(self, said: str) -> None:
        """Returns when the next is to be started.

        Args:
            said: How the one before ended.

        Raises:
            SiteFailed: If none would live longer, with what the operator can do.
        """
        found = _problems(self.place)
        for what in ("certificate", "clock"):
            if what in found:
                raise SiteFailed(f"{said}: {found[what]}")
        now = time.monotonic()
        if "server" in found or now - self.begun > SHORT_SECONDS:
            self.first = None
            _tell(f"{said}; it is started again" + (f" ({found['server']})" if found else ""))
        elif self.first is None:
            self.first = now
            _tell(f"{said}: {_refused(self.place)}; it is tried again for {REFUSED_SECONDS:.0f} s")
        elif now - self.first > REFUSED_SECONDS:
            raise SiteFailed(f"{said}: {_refused(self.place)}")
        time.sleep(AGAIN_SECONDS)
        self.begun = time.monotonic()


def _refused(place: Place) -> str:
    return (f"{place.site.superlink.address} did not let this site in. Either its key is not registered there: send "
            f"{place.site.name}.pub to the coordinator. Or another SuperNode shows the same key, or did until it was "
            "killed less than a minute ago")  # fmt: skip


def _tell(line: str) -> None:
    print(f"fedsynth: {line}", file=sys.stderr, flush=True)


def _watch(
    place: Place,
    warm: subprocess.Popen[bytes],
    supernode: subprocess.Popen[bytes],
    superexec: subprocess.Popen[bytes],
    port: int,
) -> str:
    """How SuperNode or SuperExec ended, as soon as one has, or works no more."""
    told, looked, seen = False, 0.0, time.monotonic()
    while supernode.poll() is None and superexec.poll() is None:
        if warm.poll() is not None and not told:
            _tell(f"the warm process died ({ending(warm.returncode)}): each message now takes some seconds more")
            told = True
        now = time.monotonic()
        if now - looked > LOOK_SECONDS:
            looked = now
            seen = now if _connected(supernode, port) else seen
        if now - seen > SILENT_SECONDS:
            # Where TLS is cut in its handshake Flower gives up, and its process stays without doing anything.
            if "server" not in _problems(place):
                return "the SuperNode lost its connection and does not try again"
            seen = time.monotonic()
        time.sleep(0.2)
    who, code = ("SuperExec", superexec.poll()) if supernode.poll() is None else ("SuperNode", supernode.poll())
    return f"the {who} ended ({ending(code)})"


def _connected(supernode: subprocess.Popen[bytes], port: int) -> bool:
    """Whether it holds a connection to somewhere, beside those to its own port."""
    try:
        held = psutil.Process(supernode.pid).net_connections("tcp")
    except psutil.Error:
        return True  # it has ended, or this system does not tell
    return any(each.raddr and each.laddr.port != port for each in held)


def _problems(place: Place) -> dict[str, str]:
    """What stands between this site and its server: `server`, `certificate` or `clock`, and words."""
    return {finding.what: finding.says for finding in server(place) if finding.state == "problem"}


def _supernode(place: Place, port: int, secret: Path) -> list[str]:
    link = place.site.superlink
    return [_flower("flower-supernode"), "--superlink", link.address,
            "--root-certificates", str(place.path(link.root_certificates)),
            "--auth-supernode-private-key", str(place.path(link.private_key)),
            "--host", "127.0.0.1", "--port", str(port),
            "--isolation", "process", "--superexec-auth-secret-file", str(secret)]  # fmt: skip


def _superexec(port: int, secret: Path, supernode: int) -> list[str]:
    # Without TLS: it stays on this machine, and shows the secret.
    return [_flower("flower-superexec"), "--insecure", "--runtime-api-address", f"127.0.0.1:{port}",
            "--superexec-auth-secret-file", str(secret), "--parent-pid", str(supernode)]  # fmt: skip


def _flower(program: str) -> str:
    """A program of Flower beside this Python, by its whole path."""
    found = shutil.which(program, path=str(Path(sys.prefix) / "bin"))
    if found is None:
        raise BadValue(f"{program} is not beside this Python ({Path(sys.prefix) / 'bin'}): is flwr installed there?")
    return found


def _open_account(place: Place) -> None:
    """Makes the account of the site's data, the first time; one that is gone is not begun anew.

    Raises:
        BadValue: If the audit trail knows the data set, and there is no account of it.
        fedsynth.privacy.ledger.LedgerUnusable: If it cannot be used.
    """
    known = place.ledger.exists() or all(entry.get("dataset") != place.site.data.id for entry in entries(place.trail))
    if not known:
        raise BadValue(f"the account of the data set {place.site.data.id!r} is gone ({place.ledger}), and the audit "
                       "trail knows of orders for it: what they spent would be forgotten; restore it")  # fmt: skip
    place.open_ledger(create=True)


def _environment(place: Place, marker: str) -> dict[str, str]:
    """The operator's, without what would reach outside."""
    device = place.site.device
    cards = {"auto": None, "cpu": ""}.get(device, device.removeprefix("cuda:"))
    common = environment(marker)
    return {
        **common,
        **({} if cards is None else {"CUDA_VISIBLE_DEVICES": cards}),
        SITE: str(place.folder / "site.toml"),
        "FLWR_HOME": str(place.state / "flower"),
        "OMP_NUM_THREADS": str(place.site.threads),
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a process that forks must have one thread
        "TOKENIZERS_PARALLELISM": "false",
    }


def _socket(place: Place) -> Path:
    """Of the warm process; paths of Unix sockets are short."""
    path = place.state / SOCKET
    if len(str(path)) < 100:
        return path
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    folder = Path(f"/tmp/fedsynth-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()  # of a link its owner could lead elsewhere later
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BadValue(f"{folder} belongs to someone else: name a shorter `state` folder in site.toml")
    return folder / f"{digest}.socket"


def waiting(place: Place) -> list[dict[str, Any]]:
    """What needed a person's leave, oldest first: order, task, run, number of texts, decision."""
    return place.approvals.all()


def held_text(place: Place, order: str) -> Corpus:
    """The text of an answer that waits, or waited.

    Args:
        place: The site.
        order: The order's digest, or how it starts.

    Raises:
        BadValue: If there is no such order, or its answer holds no text.
    """
    from fedsynth.payload import decode
    from fedsynth.wire import derived  # brings Flower

    held = place.approvals.find(order)
    stored = place.open_ledger().answered(held["order"])
    if stored is None:
        raise BadValue(f"order {held['order'][:12]} has no stored answer yet: its training has not ended")
    kind = next(o for o in ORDERS if o.task == held["task"])
    answer: Any = decode(stored, kind.reply)
    return next(part for part in derived(answer) if isinstance(part, Corpus))


def decide(place: Place, order: str, decision: Decision) -> dict[str, Any]:
    """Lets an answer go, or not, and writes down who did; what was charged stays charged in any case.

    Raises:
        BadValue: If there is no such order, or it was decided before.
    """
    held = place.approvals.undecided(order)
    stored = place.open_ledger().answered(held["order"])
    if stored is None or hashlib.sha256(stored).hexdigest() != held["sha256"]:
        raise BadValue(f"order {held['order'][:12]} has no stored answer yet: its training has not ended")
    by = f"{pwd.getpwuid(os.getuid()).pw_name} (uid {os.getuid()})"
    # First: no text leaves of which the trail does not say who let it go.
    Trail(place.trail, {}).add(decision, order=held["order"], sha256=held["sha256"], by=by)
    return place.approvals.decide(held, decision, by)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
