"""A coordinator's registered sites: keys that its SuperLink knows, names by which a run finds them."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tomli_w

from fedsynth.deployment import certificates
from fedsynth.deployment.invitation import check_name
from fedsynth.deployment.server import commands, flower_home, read_config
from fedsynth.simulation.flower import CommandRefused, Commands
from fedsynth.typed import BadValue, build, plain, toml_file

SITES = "sites.toml"
SITES_TEXT = """\
# The sites that have been let in: written by `fedsynth server invite`. A run numbers its clients in this order.

"""


@dataclass(frozen=True)
class RegisteredSite:
    """A registered site.

    Attributes:
        name: Name of its registered key; a run finds the site by it.
        fingerprint: Fingerprint of its public key.
        node: Flower's id of the site.
        since: Time of its registration, UTC.
    """

    name: str
    fingerprint: str
    node: str
    since: str


@dataclass(frozen=True)
class Sites:
    """The content of sites.toml."""

    sites: tuple[RegisteredSite, ...] = ()


def invite(folder: Path, public_key: Path, name: str | None = None) -> RegisteredSite:
    """Registers a site's public key with the running SuperLink, and notes the site in sites.toml.

    Args:
        folder: The coordinator's folder.
        public_key: File with the site's OpenSSH line.
        name: Name of the site; None for the file's name without its ending.

    Raises:
        BadValue: If the file holds no key, name or key are taken, or no SuperLink answers.
    """
    fingerprint, name = certificates.fingerprint(public_key), check_name(public_key.stem if name is None else name)
    config = read_config(folder)
    with _changing(folder) as known:
        for site in known:
            if site.name == name:
                raise BadValue(
                    f"the name {name!r} is taken, by the key {site.fingerprint} since {site.since}: choose "
                    f"another, or `fedsynth server invite {folder} --remove {name}`"
                )
            if site.fingerprint == fingerprint:
                raise BadValue(f"the key {fingerprint} is already that of the site {site.name!r}, since {site.since}")
        with commands(folder, config) as flwr:
            try:
                answer = flwr("supernode", "register", str(public_key.absolute()), "--name", name)
            except CommandRefused as problem:
                if "already in use" not in str(problem):
                    raise BadValue(str(problem)) from problem
                raise BadValue(
                    f"the SuperLink knows the key {fingerprint}, though {SITES} does not: it was removed, "
                    "or registered by other means. Flower takes a key once: the site makes a new one by "
                    "`fedsynth site init DIR --new-key`, and keeps its account"
                ) from problem
        made = RegisteredSite(name, fingerprint, str(answer["node-id"]), f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}")
        _write_sites(folder, [*known, made])
    return made


def remove(folder: Path, name: str) -> RegisteredSite:
    """Unregisters a site: it gets nothing from then on, and its key cannot be registered again.

    Raises:
        BadValue: If there is no such site, or no SuperLink answers.
    """
    config = read_config(folder)
    with _changing(folder) as known:
        gone = next((site for site in known if site.name == name), None)
        if gone is None:
            raise BadValue(f"there is no site {name!r}: {folder / SITES} has {_listed(known)}")
        with commands(folder, config) as flwr:
            try:
                flwr("supernode", "unregister", gone.node)
            except CommandRefused as problem:
                if "not found" not in str(problem):  # otherwise the SuperLink's database is new
                    raise BadValue(str(problem)) from problem
        _write_sites(folder, [site for site in known if site != gone])
    return gone


def sites(folder: Path) -> tuple[RegisteredSite, ...]:
    """The registered sites, in the order of their client numbers.

    Raises:
        BadValue: If sites.toml is not valid.
    """
    path = folder / SITES
    if not path.exists():
        return ()
    with toml_file(path) as table:
        return build(Sites, table).sites


def states(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The SuperLink's states of the sites: by name `registered` (never seen), `online`, `offline` or `unknown`; and the
    ids of registered nodes that are not in sites.toml.

    Raises:
        BadValue: If no SuperLink answers.
    """
    with commands(folder, read_config(folder)) as flwr:
        return states_by(flwr, sites(folder))


def states_by(flwr: Commands, known: Sequence[RegisteredSite]) -> tuple[dict[str, str], list[str]]:
    """The same as `states`, through an open command line."""
    nodes = flwr("supernode", "list")["nodes"]
    there = {str(node["node-id"]): str(node["status"]) for node in nodes if node["status"] != "unregistered"}
    found = {site.name: there.pop(site.node, "unknown") for site in known}
    return found, sorted(there)


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[tuple[RegisteredSite, ...]]:
    """The sites under a lock, for a change; other changes wait meanwhile."""
    with (flower_home(folder) / "sites.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield sites(folder)


def _write_sites(folder: Path, known: Sequence[RegisteredSite]) -> None:
    part = folder / f"{SITES}.part"
    part.write_text(SITES_TEXT + tomli_w.dumps(plain(Sites(tuple(known)))), encoding="utf-8")
    part.replace(folder / SITES)


def _listed(known: Sequence[RegisteredSite]) -> str:
    return ", ".join(site.name for site in known) or "none"
