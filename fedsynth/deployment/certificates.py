"""Certificates for tests, keys of nodes, and checks of a server's certificate and key."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsynth.federation.identity import fingerprint as fingerprint_of
from fedsynth.typed import BadValue

TEST_CA = "fedsynth CA for tests"  # the issuer by which such certificates are recognised
CURVES = ("secp256r1", "secp384r1", "secp521r1")  # curves that Flower accepts for the keys of nodes
NAMES = {"certificate": "server.crt", "key": "server.key", "ca": "ca.crt"}  # files of certificates for tests
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Authority:
    """A CA for tests. Its key is in memory only: nobody can issue in its name later."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        """The CA's certificate as PEM, which clients trust."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def authority(days: float = 365) -> Authority:
    """A new CA, valid since a day ago."""
    key, name = ec.generate_private_key(ec.SECP384R1()), _name(TEST_CA)
    made = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return Authority(key, made)


def issue(by: Authority, hosts: Sequence[str], days: float = 365) -> tuple[bytes, bytes]:
    """A server's certificate and its key, as PEM.

    Args:
        by: The CA.
        hosts: Names and addresses that the certificate is for.
        days: Days of validity; below 0 it has expired, for tests.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    made = (
        _builder(_name(hosts[0][:64]), by.certificate.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key()), critical=False)
        .sign(by.key, hashes.SHA384())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made.public_bytes(serialization.Encoding.PEM), secret


def write_certificates(folder: Path, hosts: Sequence[str], days: float = 365) -> None:
    """A CA and a server's certificate for tests: `ca.crt`, `server.crt` and `server.key` (mode 0600).

    Args:
        folder: The folder; made if it does not exist.
        hosts: Names and addresses of the server, besides localhost, 127.0.0.1 and ::1.
        days: Days of validity; below 0 the server's certificate has expired.

    Raises:
        BadValue: If one of the files exists: none is overwritten.
    """
    by = authority(max(days, 365))
    certificate, key = issue(by, list(dict.fromkeys([*hosts, *LOOPBACK])), days)
    folder.mkdir(parents=True, exist_ok=True)
    write_new(folder / NAMES["key"], key, secret=True)
    write_new(folder / NAMES["certificate"], certificate)
    write_new(folder / NAMES["ca"], by.pem)


def write_node_keys(private: Path, public: Path, comment: str = "") -> None:
    """Writes a node's key pair, like `ssh-keygen -t ecdsa -b 384`; the private half, mode 0600, never leaves its site.

    Raises:
        BadValue: If one of the files exists: none is overwritten.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    form, line = serialization.PrivateFormat.OpenSSH, serialization.PublicFormat.OpenSSH
    open_half = key.public_key().public_bytes(serialization.Encoding.OpenSSH, line)
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    for path in (private, public):
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_existing(path)
    write_new(private, secret, secret=True)
    write_new(public, open_half + (f" {comment}" if comment else "").encode() + b"\n")


def fingerprint(public: Path) -> str:
    """The fingerprint of a node's public key, as in `ssh-keygen -l`; two people compare it over the telephone.

    Raises:
        BadValue: If the file holds no key that Flower accepts.
    """
    return fingerprint_of(public_key(public))


def public_key(public: Path) -> ec.EllipticCurvePublicKey:
    """A node's public key.

    Raises:
        BadValue: If the file holds no key that Flower accepts.
    """
    try:
        text = public.read_bytes()
    except OSError as problem:
        raise BadValue(f"the public key {str(public)!r} cannot be read: {problem.strerror}") from problem
    if b"PRIVATE KEY" in text:
        raise BadValue(f"{str(public)!r} is a private key: it must not leave its site; name the .pub file beside it")
    try:
        key = serialization.load_ssh_public_key(text)
    except (ValueError, UnsupportedAlgorithm) as problem:
        raise BadValue(
            f"{str(public)!r} holds no OpenSSH public key ({problem}): `fedsynth site init` writes one, NAME.pub"
        ) from problem
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        kind = text.split()[0].decode(errors="replace")
        raise BadValue(
            f"{str(public)!r} is a key of the kind {kind}: Flower takes ECDSA keys of the NIST curves, as "
            "`fedsynth site init` or `ssh-keygen -t ecdsa -b 384` makes them"
        )
    return key


def check_pair(certificate: Path, key: Path) -> list[str]:
    """Checks that a server's certificate can be used now and fits its key. Returns warnings.

    Raises:
        BadValue: With the file and its fault.
    """
    warnings = []
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        mode = key.stat().st_mode
        key.read_bytes()
    except OSError as problem:
        raise BadValue(f"{problem.filename} cannot be read: {problem.strerror}") from problem
    except ValueError as problem:
        raise BadValue(f"{certificate} holds no certificate as PEM: {problem}") from problem
    begins, ends, now = found.not_valid_before_utc, found.not_valid_after_utc, datetime.now(UTC)
    if not begins <= now <= ends:
        state = "has expired" if now > ends else "is not yet valid"
        held = f"it holds from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC, now it is {now:%Y-%m-%d %H:%M}"
        raise BadValue(f"the certificate {certificate} {state}: {held}; put a new one there")
    if ends - now < timedelta(days=14):
        warnings.append(f"the certificate {certificate} expires on {ends:%Y-%m-%d}: no site can connect after that")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as problem:
        reason = getattr(problem, "reason", None) or str(problem)
        raise BadValue(
            f"the key {key} does not belong to the certificate {certificate}, or is no key as PEM without a "
            f"password ({reason})"
        ) from problem
    if mode & 0o077:
        warnings.append(f"the key {key} can be read by others (mode {mode & 0o777:04o}): chmod 600 {key}")
    return warnings


def read_authority(path: Path) -> str:
    """A file of one or several CAs, as PEM.

    Raises:
        BadValue: If it holds none.
    """
    try:
        text = path.read_text(encoding="ascii")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as problem:
        raise BadValue(f"{path} holds no CA's certificate as plain PEM ({problem})") from problem
    except OSError as problem:
        raise BadValue(f"{path} cannot be read: {problem.strerror}") from problem
    return text


def check_covers(certificate: Path, key: Path, ca: str, host: str) -> None:
    """Checks, by a handshake in memory, that a client that trusts `ca` and connects to `host` accepts the certificate.

    Args:
        certificate, key: The server's; they fit each other.
        ca: The CA as PEM.
        host: Name or address.

    Raises:
        BadValue: If it does not, with TLS's reason.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(certificate, key, password=_no_password)
    client.load_verify_locations(cadata=ca)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    while ends:
        for end in tuple(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as problem:
                raise BadValue(
                    f"who connects to {host} would refuse the certificate {certificate}: "
                    f"{problem.verify_message.rstrip('.')}"
                ) from problem


def for_tests(certificate: Path) -> bool:
    """True for a certificate that `write_certificates` made."""
    issuer = x509.load_pem_x509_certificate(certificate.read_bytes()).issuer
    return issuer == _name(TEST_CA)


def write_new(path: Path, content: bytes, *, secret: bool = False) -> None:
    """Writes a new file; a secret one is never readable by others, not even at first.

    Raises:
        BadValue: If it exists.
    """
    _refuse_existing(path)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(content)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise BadValue(f"{path} is there, and nothing is overwritten: move it away, or name another folder")


def _no_password() -> str:
    raise ValueError("the key has a password")  # OpenSSL would ask for it at the terminal


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        # A day before now, or before the end, as clocks of sites differ.
        .not_valid_before(now + timedelta(days=min(days, 0) - 1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
