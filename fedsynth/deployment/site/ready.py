"""Checks of a site's way to its server: folder, account, key, certificate, clock."""

from __future__ import annotations

import email.utils
import os
import shutil
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedsynth.clients.audit_log import entries
from fedsynth.deployment.invitation import host_and_port
from fedsynth.deployment.policy import Place
from fedsynth.system.folders import OTHERS, close, private_folder
from fedsynth.system.proxy import UNREADABLE, is_loopback, names_proxy, no_proxies
from fedsynth.typed import BadValue

MAX_SKEW = 5.0  # seconds that a site's clock may be ahead of the server's; Flower refuses its signature beyond
MAX_BEHIND = 300.0


@dataclass(frozen=True)
class Finding:
    """The finding of one check.

    Attributes:
        what: Name of the check.
        state: `ok`, `warning` or `problem`.
        says: The finding in words.
    """

    what: str
    state: str
    says: str


def check_state(place: Place) -> str:
    """Checks that only this user can read the state folder and that it has room. Closes its folders, and that of the
    accounts, to others: older versions made some with the umask's mode.

    Raises:
        BadValue: If not.
    """
    private_folder(place.state)
    if place.state.stat().st_mode & OTHERS:
        raise BadValue(f"{place.state} can be read by others: chmod 700 {place.state}")
    try:
        opened = [*close(place.state), *(close(place.accounts) if place.accounts.is_dir() else [])]
    except OSError as problem:
        raise BadValue(
            f"{problem.filename} can be read by others, and is not this user's to close: make it so"
        ) from problem
    free = shutil.disk_usage(place.state).free
    if free < 2**30:
        raise BadValue(
            f"{place.state} has {free / 2**20:.0f} MiB free: make room for models and answers, 1 GiB at least"
        )
    told = f"; {len(opened)} folders that others could read are closed to them now" if opened else ""
    return f"{place.state}, {free / 2**30:.0f} GiB free{told}"


def check_account(place: Place) -> None:
    """Checks that the account of the site's data exists, or was never begun: a lost account is not begun again.

    Raises:
        BadValue: If the audit log knows the data set, and there is no account of it.
    """
    if place.ledger.exists() or all(entry.get("dataset") != place.site.data.id for entry in entries(place.audit_log)):
        return
    raise BadValue(
        f"the account of the data set {place.site.data.id!r} is gone ({place.ledger}), and the audit trail "
        "knows of requests for it: what they spent would be forgotten; restore it, or `fedsynth site "
        "declare-loss DIR` makes one that holds every charge of the trail"
    )


def check_key(place: Place) -> str:
    """Checks that the site's key can be used and that nobody else can read it.

    Raises:
        BadValue: If not.
    """
    path = place.path(place.site.superlink.private_key)
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as problem:
        raise BadValue(f"the key {path} cannot be read: {problem.strerror}") from problem
    except (ValueError, TypeError, UnsupportedAlgorithm) as problem:
        raise BadValue(f"{path} holds no OpenSSH private key without a password ({problem})") from problem
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadValue(f"{path} is no EC key: Flower takes those of `fedsynth site init` and `ssh-keygen -t ecdsa`")
    if path.stat().st_mode & 0o077:
        raise BadValue(f"{path} can be read by others: chmod 600 {path}")
    return f"{path} is an EC key that only this user reads"


def server(place: Place) -> Iterator[Finding]:
    """Checks TLS, certificate and clock by one request without content; a problem is named `server`, `certificate` or
    `clock`."""
    link = place.site.superlink
    host, _ = host_and_port(link.address)
    try:
        context = ssl.create_default_context(cafile=str(place.path(link.root_certificates)))
        try:  # as the SuperNode does: by the environment's proxy, unless the server is on this machine
            client = httpx.Client(verify=context, timeout=10, mounts=no_proxies(host))
        except Exception as problem:  # httpx raises a plain Exception for an address that it cannot read
            yield Finding("server", "problem", f"{link.address} cannot be asked: {UNREADABLE} ({problem})")
            return
        with client, client.stream("GET", f"https://{link.address}/health") as answer:
            said = answer.headers.get("Date")
            certificate = answer.extensions["network_stream"].get_extra_info("ssl_object").getpeercert()
    except (OSError, ValueError, httpx.HTTPError) as problem:
        causes = list(_causes(problem))
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                why = f"the certificate of {link.address} is not accepted: {cause.verify_message}"
                yield Finding("certificate", "problem", f"{why}; ask the coordinator, and do not go on")
                return
        why = f"{link.address} cannot be reached by TLS: {causes[-1] or type(problem).__name__}"
        proxy = "" if is_loopback(host) or not names_proxy(os.environ) else " (through the proxy of the environment)"
        yield Finding("server", "problem", why + proxy)
        return
    until = dict(certificate or {}).get("notAfter", "")
    yield Finding("server", "ok", f"{link.address} answers by TLS, its certificate is accepted (until {until})")
    if said is None:
        yield Finding("clock", "warning", "the server does not say its time")
        return
    ahead = time.time() - email.utils.parsedate_to_datetime(said).timestamp()
    if -MAX_BEHIND < ahead < MAX_SKEW + 1:  # the server's date has whole seconds
        yield Finding("clock", "ok", f"within {max(1, abs(round(ahead)))} s of the server's")
        return
    off = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    yield Finding(
        "clock", "problem", f"this clock is {off}: set it by NTP, or the server refuses this site's signature"
    )


def _causes(problem: BaseException) -> Iterator[BaseException]:
    """An error and its causes; the last one happened first."""
    found: BaseException | None = problem
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
