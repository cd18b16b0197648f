"""`fedsynth site init`: makes a site's folder with site.toml and a key."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

import tomli_w

from fedsynth.deployment.certificates import write_new, write_node_keys
from fedsynth.deployment.invitation import FILE, Invitation, check_name, read_invitation
from fedsynth.deployment.policy import load_site
from fedsynth.typed import BadValue


def init(folder: Path, *, name: str, invitation: Path) -> Path:
    """Makes a site's folder: site.toml for the operator to edit, the CA's certificate, the invitation, a key. Returns
    its public half.

    Raises:
        BadValue: If the folder already holds a site, or the invitation cannot be read.
    """
    if (folder / "site.toml").exists():
        raise BadValue(f"{folder} holds a site already: its key and its account must not be made anew")
    invited = read_invitation(invitation)
    check_name(name)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    told = folder / f"{name}.pub"
    write_node_keys(folder / "keys" / "node", told, comment=name)
    write_new(folder / "ca.crt", invited.ca.encode())
    write_new(folder / FILE, invitation.read_bytes())
    write_new(folder / "site.toml", template(name, invited).encode())  # last: this file makes the folder a site's
    return told


def new_key(folder: Path) -> Path:
    """Makes a new key for a site: a server never accepts a removed key again. Account and audit log stay.

    Returns:
        The public half for the coordinator. The old halves stay under other names.

    Raises:
        BadValue: If the folder holds no site.
    """
    place = load_site(folder)
    private, public = place.path(place.site.superlink.private_key), place.path(f"{place.site.name}.pub")
    now = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    for path in (private, public):
        if path.exists():
            path.rename(path.with_name(f"{path.name}.{now}"))
    write_node_keys(private, public, comment=place.site.name)
    return public


def template(name: str, invited: Invitation) -> str:
    """site.toml, with the coordinator's proposals filled in for the operator to judge."""
    asked = invited.scenario
    attributes = [f"attributes.{_line(**{column: values})}" for column, values in asked.attributes.items()]
    filled = {
        "@name@": name,
        "@address@": invited.address,
        "@task@": asked.task,
        "@labels@": "\n".join([_line(labels=asked.labels) if asked.labels else "", *attributes]),
        "@models@": _line(models=asked.models),
        "@strategies@": _line(strategies=asked.strategies),
        "@asked@": "no budget" if asked.epsilon is None else f"epsilon {asked.epsilon:g}",
    }
    text = resources.files("fedsynth.deployment.site").joinpath("site.template.toml").read_text(encoding="utf-8")
    for mark, value in filled.items():
        text = text.replace(mark, value)
    if asked.task == "instructions":
        text = text.replace(
            'label = "label"           # TODO (of instructions: response = "response")',
            'response = "response"     # TODO',
        )
    return text


def _line(**values: tuple[str, ...]) -> str:
    """The line `key = [...]` in TOML."""
    return tomli_w.dumps({key: list(found) for key, found in values.items()}).strip()
