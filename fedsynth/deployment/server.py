"""A coordinator's folder: server.toml (address, wait_seconds), the CA that sites trust, the way to its SuperLink."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import tomli_w

from fedsynth.deployment import certificates
from fedsynth.deployment.invitation import FILE as INVITATION
from fedsynth.deployment.invitation import Invitation, host_and_port, invitation_toml, joined, planned, read_invitation
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import to_toml
from fedsynth.simulation.flower import Commands, environment
from fedsynth.typed import BadValue, Positive, Range, build, in_range, plain, toml_file

CONFIG, SCENARIO = "server.toml", "scenario.toml"
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # an address for all interfaces -> the one for this machine's programs
CONFIG_TEXT = """\
# A coordinator's server: read by `fedsynth server start | invite` and `fedsynth run --server`.
# Paths are relative to this folder. What sites connect to, and the CA that they trust, stand in invitation.toml.

host = {host}  # where the SuperLink listens: an address of this machine, or "0.0.0.0" for all of them
port = {port}

# What programs on this machine connect to: a name or address that leads here, and that the certificate is for.
local = {local}

certificate = {certificate}  # PEM, with the intermediate certificates, if there are any
key = {key}  # PEM without a password; mode 0600
ca = {ca}  # PEM: who vouches for the certificate

wait_seconds = {wait_seconds}  # how long a run waits for its sites to be online before it begins
start_seconds = {start_seconds}  # how long the SuperLink may take to start; if it dies, that is noticed at once
"""


@dataclass(frozen=True)
class ServerConfig:
    """The content of server.toml.

    Attributes:
        host, port: The SuperLink's address.
        local: HOST:PORT that programs on this machine connect to.
        certificate, key, ca: Files; absolute paths after reading.
        wait_seconds: Longest wait of a run for its sites to be online before it begins.
        start_seconds: Longest start of the SuperLink; its death is noticed at once.
    """

    host: str
    port: Annotated[int, Range("lie in 1..65535", lambda value: 1 <= value <= 65535)]
    local: str
    certificate: str
    key: str
    ca: str
    wait_seconds: Positive = 600.0
    start_seconds: Positive = 600.0

    def __post_init__(self) -> None:
        in_range(self)
        host_and_port(self.local)


@dataclass(frozen=True)
class Files:
    """Files of a server's certificate, its key, and its CA."""

    certificate: Path
    key: Path
    ca: Path


def init(
    folder: Path,
    scenario: Scenario,
    *,
    host: str,
    port: int,
    public: str = "",
    files: Files | None = None,
    public_ca: Path | None = None,
) -> list[str]:
    """Makes a coordinator's folder. Returns warnings.

    Args:
        folder: The folder; new or empty.
        scenario: The planned scenario.
        host, port: The SuperLink's future address.
        public: HOST:PORT that sites connect to; None for host and port.
        files: The server's files; None to make a CA and a certificate for tests.
        public_ca: The CA of the proxy's certificate, if a proxy ends TLS before the SuperLink.

    Raises:
        BadValue: With the fault; nothing has been written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadValue(
            f"the folder {str(folder)!r} already holds something, and nothing is overwritten: name a new one"
        )
    public = public or joined(host, port)
    public_host, _ = host_and_port(public)
    if public_host in ANYWHERE:
        raise BadValue(f"sites cannot connect to {public_host}: say with --public-address HOST:PORT what leads here")
    own, told = joined(ANYWHERE.get(host, host), port), planned(scenario)
    warnings: list[str] = []
    if files is None:
        made = {name: f"certificates/{file}" for name, file in certificates.NAMES.items()}
        if public_ca is None and not _loopback(public_host):
            warnings.append(
                "the certificates are for tests: nobody but the invited knows their CA, and they expire in "
                "a year; for real sites have one made, --certificate, --key and --ca name it"
            )
    else:
        made = {name: str(getattr(files, name).absolute()) for name in certificates.NAMES}
        warnings += certificates.check_pair(files.certificate, files.key)
        own = _covered(files, own, public, public_ca)
    config = build(ServerConfig, {"host": host, "port": port, "local": own, **made})
    ca = None if public_ca is None else certificates.read_authority(public_ca)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # the SuperLink's database holds the sites' replies
    if files is None:
        certificates.write_certificates(folder / "certificates", [public_host, ANYWHERE.get(host, host)])
    text = CONFIG_TEXT.format(**{key: _quoted(value) for key, value in plain(config).items()})
    ca = ca or certificates.read_authority(folder / config.ca)
    written = invitation_toml(Invitation(public, ca, told))
    for name, content in ((SCENARIO, to_toml(scenario)), (INVITATION, written), (CONFIG, text)):
        certificates.write_new(folder / name, content.encode())
    return warnings


def read_config(folder: Path) -> ServerConfig:
    """A coordinator's server.toml, with absolute paths.

    Raises:
        BadValue: If it is missing or not valid.
    """
    with toml_file(folder / CONFIG, "make a coordinator's folder with `fedsynth server init`") as table:
        found = build(ServerConfig, table)
    at = folder.absolute()
    return replace(found, certificate=str(at / found.certificate), key=str(at / found.key), ca=str(at / found.ca))


def check(folder: Path) -> list[str]:
    """Checks that a SuperLink can be started from a folder. Returns warnings.

    Raises:
        BadValue: With file, fault and way out.
    """
    config, invitation = read_config(folder), read_invitation(folder / INVITATION)
    certificate, key = Path(config.certificate), Path(config.key)
    warnings = certificates.check_pair(certificate, key)
    ca, public = certificates.read_authority(Path(config.ca)), host_and_port(invitation.address)[0]
    try:
        certificates.check_covers(certificate, key, ca, host_and_port(config.local)[0])
    except BadValue as problem:
        raise BadValue(f"{problem}; programs of this machine do, see `local` in {folder / CONFIG}") from problem
    # Another CA in the invitation: a proxy ends TLS before the SuperLink, so that sites see the proxy's certificate.
    if invitation.ca.strip() == ca.strip():
        try:
            certificates.check_covers(certificate, key, ca, public)
        except BadValue as problem:
            raise BadValue(f"{problem}; {folder / INVITATION} names it to sites") from problem
        if certificates.for_tests(certificate) and not _loopback(public):
            warnings.append(f"the certificate {certificate} is for tests, and sites connect to {public}: have one made")
    return warnings


def flower_home(folder: Path) -> Path:
    """The FLWR_HOME of all programs of a coordinator's folder."""
    client = folder.absolute() / "flower"
    client.mkdir(mode=0o700, exist_ok=True)
    return client


@contextlib.contextmanager
def commands(folder: Path, config: ServerConfig, log: BinaryIO | None = None) -> Iterator[Commands]:
    """Flower's command line, connected to a coordinator's SuperLink.

    Raises:
        BadValue: If no SuperLink answers, or one with another certificate.
    """
    reach(folder, config)
    client = flower_home(folder)
    connection = {"address": config.local, "root-certificates": config.ca}
    part = client / f"config.toml.{os.getpid()}"
    part.write_text(tomli_w.dumps({"superlink": {"default": "own", "own": connection}}), encoding="utf-8")
    part.replace(client / "config.toml")
    with Commands(
        flower_environment(folder, uuid.uuid4().hex), client, subprocess.DEVNULL if log is None else log
    ) as flwr:
        yield flwr


def reach(folder: Path, config: ServerConfig, seconds: float = 10.0) -> None:
    """Checks that a coordinator's SuperLink answers over TLS, with a handshake within `seconds`.

    Raises:
        BadValue: If not, with the way out: Flower's own message is the same for every reason.
    """
    host, port = host_and_port(config.local)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(config.ca)
        with socket.create_connection((host, port), 10) as raw:
            raw.settimeout(seconds)
            context.wrap_socket(raw, server_hostname=host).close()
    except ssl.SSLCertVerificationError as problem:
        raise BadValue(
            f"the SuperLink at {config.local} has a certificate that {config.ca} does not vouch for: "
            f"{problem.verify_message.rstrip('.')}"
        ) from problem
    except ssl.SSLError as problem:
        raise BadValue(f"what answers at {config.local} is no SuperLink over TLS ({problem.reason})") from problem
    except OSError as problem:
        why = problem.strerror or type(problem).__name__
        raise BadValue(
            f"no SuperLink answers at {config.local} ({why}): start it with `fedsynth server start {folder}`"
        ) from problem


def flower_environment(folder: Path, marker: str) -> dict[str, str]:
    """The environment of Flower's programs for a coordinator's folder."""
    # A server runs for months, so it asks for work only once a second.
    own = {"FLWR_HOME": str(flower_home(folder)), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"}
    here, _ = host_and_port(read_config(folder).local)
    return {**environment(marker, here), **own}


def _loopback(host: str) -> bool:
    return host in certificates.LOOPBACK


def _covered(files: Files, own: str, public: str, public_ca: Path | None) -> str:
    """The address for this machine's programs: `own`, or `public` if the certificate is for that only.

    Raises:
        BadValue: If the certificate is not for `public` (behind a proxy it need not be), or for neither.
    """
    ca = certificates.read_authority(files.ca)
    if public_ca is None:
        certificates.check_covers(files.certificate, files.key, ca, host_and_port(public)[0])
    try:
        certificates.check_covers(files.certificate, files.key, ca, host_and_port(own)[0])
    except BadValue:
        if public_ca is not None:
            raise
        return public
    return own


def _quoted(text: Any) -> str:
    return tomli_w.dumps({"v": text}).partition("=")[2].strip()
