"""The keys by which the clients of a secure sum know each other: signatures, rosters, fingerprints."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature


class Mistrusted(RuntimeError):
    """A step of a secure sum is not what it must be: nothing more of it leaves."""


@dataclass(frozen=True)
class Identity:
    """A client's signing key, and the keys of all clients that it trusts to take part.

    Attributes:
        key: The key by which the server knows the client.
        roster: By fingerprint, the public keys that the client's operator has pinned.
    """

    key: ec.EllipticCurvePrivateKey
    roster: Mapping[str, ec.EllipticCurvePublicKey]

    @property
    def signer(self) -> str:
        """The own public key, in OpenSSH's form."""
        return _line(self.key.public_key())

    def sign(self, said: bytes) -> str:
        """A signature in hex, always of the same length."""
        r, s = decode_dss_signature(self.key.sign(said, ec.ECDSA(hashes.SHA256())))
        size = (self.key.key_size + 7) // 8
        return (r.to_bytes(size, "big") + s.to_bytes(size, "big")).hex()

    def verify(self, signer: str, signature: str, said: bytes) -> None:
        """Checks another client's signature.

        Raises:
            Mistrusted: If its key is not pinned, or did not sign this.
        """
        key = _public_key(signer)
        if key is None or fingerprint(key) not in self.roster:
            known = "no key" if key is None else f"the key {fingerprint(key)}"
            raise Mistrusted(f"a client signs by {known}, which is none of this client's roster")
        if not signed(signer, signature, said):
            raise Mistrusted(f"the signature by the key {fingerprint(key)} is not of what it should sign")


def signed(signer: str, signature: str, said: bytes) -> bool:
    """True if the key that is named signed this. It says nothing of whose key that is."""
    key = _public_key(signer)
    if key is None:
        return False
    try:
        raw, size = bytes.fromhex(signature), (key.key_size + 7) // 8
        if len(raw) != 2 * size:
            return False
        both = int.from_bytes(raw[:size], "big"), int.from_bytes(raw[size:], "big")
        key.verify(encode_dss_signature(*both), said, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def _public_key(line: str) -> ec.EllipticCurvePublicKey | None:
    try:
        key = serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) and _line(key) == line else None


def _line(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """The fingerprint of a public key, as `ssh-keygen -l` prints it."""
    digest = hashlib.sha256(base64.b64decode(_line(key).split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def simulated_identity(client: int, clients: int) -> Identity:
    """The identity of a simulated client: its keys are known to everybody, and show the protocol's work alone."""
    return Identity(_simulated_key(client), _simulated_roster(clients))


@lru_cache(maxsize=8)
def _simulated_roster(clients: int) -> Mapping[str, ec.EllipticCurvePublicKey]:
    keys = [_simulated_key(number).public_key() for number in range(clients)]
    return {fingerprint(key): key for key in keys}


@lru_cache(maxsize=4096)
def _simulated_key(client: int) -> ec.EllipticCurvePrivateKey:
    digest = hashlib.sha256(f"fedsynth: simulated client {client}".encode()).digest()
    return ec.derive_private_key(int.from_bytes(digest, "big") >> 1, ec.SECP256R1())
