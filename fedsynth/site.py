"""`fedsynth site`: a site's file and key are made, checked, and its SuperNode runs."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from fedsynth.certificates import write_new, write_node_keys
from fedsynth.clients.approval import Decision
from fedsynth.clients.process import SOCKET, stand_ins
from fedsynth.clients.site import SITE, Place, check_name
from fedsynth.clients.trail import Trail
from fedsynth.corpus import Corpus
from fedsynth.payload import decode
from fedsynth.site_check import check_key, check_state
from fedsynth.tasks import ORDERS
from fedsynth.typed import BadValue
from fedsynth.wire import derived


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
    write_new(folder / "ca.crt", invited["ca"].encode())
    write_new(folder / "site.toml", template(name, invited).encode())  # last: with it the folder is a site's
    return told


def read_invitation(path: Path) -> dict[str, Any]:
    """What a coordinator wrote for sites: address, CA, and what the scenario asks for.

    Raises:
        BadValue: If it is none.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise BadValue(f"{path} is no invitation: {problem}; ask the coordinator for invitation.toml") from problem
    for key in ("address", "ca"):
        if not isinstance(found.get(key), str):
            raise BadValue(f"{path} is no invitation: it has no {key}; ask the coordinator for invitation.toml")
    return found


def template(name: str, invited: Mapping[str, Any]) -> str:
    """site.toml, with what the coordinator proposes filled in, for the operator to judge."""
    import tomli_w

    asked = dict(invited.get("scenario", {}))
    labels = tomli_w.dumps({"labels": asked.get("labels", [])}).strip()
    models = tomli_w.dumps({"models": asked.get("models", [])}).strip()
    strategies = tomli_w.dumps({"strategies": [s] if (s := asked.get("strategy")) else []}).strip()
    text = resources.files("fedsynth").joinpath("site.template.toml").read_text(encoding="utf-8")
    filled = {
        "@name@": name,
        "@address@": str(invited["address"]),
        "@task@": str(asked.get("task", "classification")),
        "@labels@": labels,
        "@models@": models,
        "@strategies@": strategies,
        "@asked@": f"{asked['epsilon']:g}" if "epsilon" in asked else "what it says",
    }
    for mark, value in filled.items():
        text = text.replace(mark, value)
    return text


def start(place: Place, *, port: int = 0, process: tuple[str, ...] = ("-m", "fedsynth.clients.process")) -> int:
    """Runs the SuperNode and the warm process beside it, until one ends or a signal comes.

    Args:
        place: The site.
        port: Of the SuperNode's own API on 127.0.0.1; any free one by default.
        process: How Python runs the warm process.

    Returns:
        The SuperNode's exit code.

    Raises:
        BadValue: If something stands in the way.
    """
    check_state(place)
    check_key(place)
    warm_socket = _socket(place)
    programs = place.state / "bin"
    stand_ins(programs, warm_socket)
    environment = _environment(place, programs)
    children: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        warm = [sys.executable, "-P", *process, "serve", str(warm_socket)]
        children.append(subprocess.Popen(warm, env=environment, cwd=place.state, preexec_fn=_end_with_parent))
        children.append(
            subprocess.Popen(_supernode(place, port or _free_port()), env=environment, cwd=place.state,
                             preexec_fn=_end_with_parent)
        )  # fmt: skip
        return _watched(children)
    except KeyboardInterrupt:
        return 0
    finally:
        for child in reversed(children):
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        for child in children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def _watched(children: list[subprocess.Popen[bytes]]) -> int:
    warm, supernode = children
    while supernode.poll() is None:
        if warm is not None and warm.poll() is not None:
            print("fedsynth: the warm process has ended; messages now start their own, which takes seconds each",
                  file=sys.stderr, flush=True)  # fmt: skip
            warm = None  # type: ignore[assignment]
        time.sleep(0.2)
    return supernode.returncode


def _supernode(place: Place, port: int) -> list[str]:
    link = place.site.superlink
    return [
        "flower-supernode",
        "--superlink", link.address,
        "--root-certificates", str(place.path(link.root_certificates)),
        "--auth-supernode-private-key", str(place.path(link.private_key)),
        "--host", "127.0.0.1",
        "--port", str(port),
    ]  # fmt: skip


def _environment(place: Place, programs: Path) -> dict[str, str]:
    """The operator's environment, without what would reach outside, with the stand-ins first on the PATH."""
    from fedsynth.launch import quiet_flower

    device = place.site.device
    cards = {"auto": None, "cpu": ""}.get(device, device.removeprefix("cuda:"))
    path = os.pathsep.join([str(programs), str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    return {
        **os.environ,
        **quiet_flower(),
        **({} if cards is None else {"CUDA_VISIBLE_DEVICES": cards}),
        SITE: str(place.folder / "site.toml"),
        "FLWR_HOME": str(place.state / "flower"),
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a process that forks must have one thread
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": path,
    }


def _socket(place: Place) -> Path:
    """Of the warm process; paths of Unix sockets are short."""
    path = place.state / SOCKET
    if len(str(path)) < 100:
        return path
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    folder = Path(f"/tmp/fedsynth-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
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
    held = place.approvals.decide(order, decision)
    Trail(place.trail, {}).add(decision, order=held["order"], by=held["by"])
    return held


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """In a child, before its program: SIGTERM comes when the parent dies, however that one ended (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
