"""Traffic within the machine goes past the proxies that its environment names."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

import psutil

# Names of this machine: spellings of localhost, and the addresses that servers print when they listen everywhere.
LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "localhost.", ".localhost")
# Programs that read both prefer the lower-case variable.
_EXCEPTIONS = ("no_proxy", "NO_PROXY")
_GRPC = "no_grpc_proxy"  # gRPC prefers it to `no_proxy`
UNREADABLE = "a proxy variable of the environment (no_proxy, https_proxy, ...) cannot be used: mend it"


def is_loopback(host: str) -> bool:
    """True if a host's name or address always means this machine: `0.0.0.0` and `x.localhost`, too."""
    name = host.lower().removesuffix(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return f".{name}".endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def past_proxies(environment: Mapping[str, str], *here: str) -> dict[str, str]:
    """The variables that send local traffic past the proxies of an environment: a completed `no_proxy`.

    The user's entries stay, except those that httpx cannot read: one of them keeps httpx from making any client.
    Traffic to every other machine keeps the proxy. `*` means no proxy at all and needs nothing more. gRPC does not know
    `*`; it has its own variable, which gets all entries.

    Args:
        environment: A program's environment.
        here: More names of this machine, such as the one under which a server's own programs find it.

    Returns:
        The variables to set; none if no proxy is named and httpx can read every entry.
    """
    written = {
        name: environment.get(name, environment.get(other, ""))
        for name, other in zip(_EXCEPTIONS, reversed(_EXCEPTIONS), strict=True)
    }
    if not names_proxy(environment):
        return {name: _completed(value, []) for name, value in written.items() if any(map(_misread, _entries(value)))}
    own = [host for host in (*LOOPBACK, *_addresses(), *here) if host and not _misread(host)]
    found = {name: _completed(value, own) for name, value in written.items()}
    for_grpc = environment.get(_GRPC, written["no_proxy"])
    if _GRPC in environment or any(entry == "*" or _misread(entry) for entry in _entries(for_grpc)):
        found[_GRPC] = _joined([entry for entry in _entries(for_grpc) if entry != "*"], own)
    return found


def no_proxies(host: str) -> dict[str, None]:
    """Mounts of an httpx client for one host: past the environment's proxies if the host is this machine."""
    return {"http://": None, "https://": None, "all://": None} if is_loopback(host) else {}


def names_proxy(environment: Mapping[str, str]) -> bool:
    """True if an environment names a proxy for some kind of traffic."""
    names = [name.lower() for name, value in environment.items() if value]
    return any(name.endswith("_proxy") and not name.startswith("no_") for name in names)


def _addresses() -> list[str]:
    """The name and addresses of this machine; its programs find each other under them, too (Ray's node)."""
    kinds = (socket.AF_INET, socket.AF_INET6)
    found = [each.address for of in psutil.net_if_addrs().values() for each in of if each.family in kinds]
    # An address with a zone, as fe80::1%eth0, is no host of a URL.
    return [socket.gethostname(), *(address for address in found if "%" not in address)]


def _completed(written: str, own: list[str]) -> str:
    entries = _entries(written)
    if "*" in entries:
        return written
    if any(map(_misread, entries)):
        return _joined([entry for entry in entries if not _misread(entry)], own)
    lacking = [host for host in dict.fromkeys(own) if host not in entries]
    return ",".join([*([written] if entries else []), *lacking])


def _joined(entries: list[str], own: list[str]) -> str:
    return ",".join(dict.fromkeys([*entries, *own]))


def _entries(written: str) -> list[str]:
    return [entry for each in written.split(",") if (entry := each.strip())]


def _misread(entry: str) -> bool:
    """True if httpx parses an entry as the URL of a host and fails.

    It fails on networks of IPv6 as fd00::/8, addresses in brackets, names that are not ASCII, and a port that is no
    number.
    """
    if not entry.isascii():
        return True
    host, _, port = entry.partition(":")
    if "://" in entry or not port:
        return False
    try:
        ipaddress.IPv6Address(entry.partition("/")[0])
    except ValueError:
        return not port.partition("/")[0].isdecimal() or host.startswith("[")
    return "/" in entry
