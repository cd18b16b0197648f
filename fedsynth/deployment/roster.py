"""A site's roster for secure sums: its own key, and the public keys of the sites that its operator trusts."""

from __future__ import annotations

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedsynth.deployment import certificates
from fedsynth.deployment.policy import Place
from fedsynth.federation.identity import Identity, fingerprint
from fedsynth.typed import BadValue


def identity(place: Place) -> Identity:
    """The site's signing key and its roster: every `NAME.pub` of the folder that `policy.secure_sum` names.

    Operators exchange these files and compare their fingerprints; the server has no say in it.

    Raises:
        BadValue: If the policy has no such table, a key cannot be read, or two files hold one key.
    """
    terms = place.site.policy.secure_sum
    if terms is None:
        raise BadValue("policy.secure_sum is left out: this site takes part in no secure sum")
    folder, own = place.path(terms.roster), place.path(place.site.superlink.private_key)
    files = sorted(folder.glob("*.pub"))
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    for file in files:
        pinned = certificates.public_key(file)
        if fingerprint(pinned) in keys:
            raise BadValue(f"{file} holds a key that another file of {folder} holds, too")
        keys[fingerprint(pinned)] = pinned
    try:
        key = load_ssh_private_key(own.read_bytes(), None)
    except OSError as problem:
        raise BadValue(f"the site's key {own} cannot be read: {problem.strerror}") from problem
    except (ValueError, UnsupportedAlgorithm) as problem:
        raise BadValue(f"{own} holds no private key in OpenSSH's form without a password") from problem
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadValue(f"{own} is no ECDSA key: `fedsynth site init` writes one")
    if (print_ := fingerprint(key.public_key())) not in keys:
        raise BadValue(f"{folder} lacks this site's own key {print_}: put its .pub file there, too")
    return Identity(key, keys)


def told(place: Place) -> str:
    """What `fedsynth site check` says of the roster.

    Raises:
        BadValue: As `identity`; or if the roster is too short for any cohort that the policy admits.
    """
    terms, roster = place.site.policy.secure_sum, identity(place).roster
    assert terms is not None
    if len(roster) < terms.clients:
        raise BadValue(f"{len(roster)} keys are pinned, and policy.secure_sum.clients is {terms.clients}")
    charged = "what a sum costs, resting on the others" if terms.accept else "what this site's own messages cost"
    names = {certificates.fingerprint(file): file.stem for file in place.path(terms.roster).glob("*.pub")}
    listed = "; ".join(f"{names[print_]} {print_}" for print_ in roster)
    return f"the account is charged {charged}; {len(roster)} keys pinned, compare them with their owners: {listed}"
