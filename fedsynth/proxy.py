"""What a machine says to itself goes through no proxy, whatever proxies its environment names."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

import psutil

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Capitals after small letters, as those who read them decide: small letters come first.
_EXCEPTIONS = ("no_proxy", "NO_PROXY")
_GRPC = "no_grpc_proxy"  # to gRPC it comes before `no_proxy`


def is_loopback(host: str) -> bool:
    """Whether a host's name or address always means the machine that says it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def past_proxies(environment: Mapping[str, str], *here: str) -> dict[str, str]:
    """What an environment lacks so that local traffic passes its proxies by: `no_proxy`, completed.

    What a user wrote there stays, and traffic to every other machine keeps the proxy. Nothing is lacking where no
    proxy is named, nor where `*` says that nothing goes through one.

    Args:
        environment: Of a program.
        here: More names of this machine, as the one under which a server's own programs find it.

    Returns:
        The variables to set.
    """
    if not names_proxy(environment):
        return {}
    written = {name: environment[name] for name in (*_EXCEPTIONS, _GRPC) if name in environment}
    for name, other in zip(_EXCEPTIONS, reversed(_EXCEPTIONS), strict=True):
        written.setdefault(name, environment.get(other, ""))
    own = [*LOOPBACK, *_addresses(), *here]
    return {name: _completed(value, own) for name, value in written.items()}


def no_proxies(host: str) -> dict[str, None]:
    """Mounts of an httpx client that talks to one host: past the environment's proxies if it is this machine."""
    return {"http://": None, "https://": None, "all://": None} if is_loopback(host) else {}


def names_proxy(environment: Mapping[str, str]) -> bool:
    """Whether an environment names a proxy for some kind of traffic."""
    names = [name.lower() for name, value in environment.items() if value]
    return any(name.endswith("_proxy") and not name.startswith("no_") for name in names)


def _addresses() -> list[str]:
    """This machine's own: its programs find each other under them, too (Ray's node)."""
    kinds = (socket.AF_INET, socket.AF_INET6)
    found = [each.address for of in psutil.net_if_addrs().values() for each in of if each.family in kinds]
    # An address with a zone, as fe80::1%eth0, is no host of a URL.
    return [socket.gethostname(), *(address for address in found if "%" not in address)]


def _completed(written: str, own: list[str]) -> str:
    entries = [entry.strip() for entry in written.split(",")]
    if "*" in entries:
        return written
    lacking = [host for host in dict.fromkeys(own) if host and host not in entries]
    return ",".join([*([written] if written.strip() else []), *lacking])
