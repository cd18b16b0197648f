"""A coordinator's invitation to its sites: the server's address, its CA, the planned scenario. It holds no secret."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tomli_w

from fedsynth.data.partition import label_list
from fedsynth.scenario.data import Data
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.scenario.task import Task
from fedsynth.scenario.toml import cells
from fedsynth.typed import BadValue, build, plain, toml_file

FILE = "invitation.toml"
HOST = re.compile(r"[A-Za-z0-9._:%-]+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
HEADER = """\
# An invitation to a federation: `fedsynth site init DIR --name NAME --invitation invitation.toml` reads it.
# It holds no secret. Whoever can change it on its way can put their own server in the place of this one, so compare
# the certificate's fingerprint with the coordinator: openssl x509 -noout -fingerprint -sha256 -in DIR/ca.crt

"""


@dataclass(frozen=True)
class Planned:
    """The facts of a scenario that a site's operator needs for site.toml.

    Attributes:
        name: Name of the scenario.
        task: The scenario's `data.task`.
        labels: The public label list; empty for instructions.
        attributes: Column -> public values, of all arms.
        strategies: Strategies of the arms that run.
        models: Models that clients load.
        guarantee: `none` if one arm has none.
        epsilon, delta: The largest budget of an arm, for one run, not for the data's lifetime.
        rounds: Rounds of a run.
    """

    name: str
    task: Literal["classification", "instructions"]
    labels: tuple[str, ...]
    strategies: tuple[str, ...]
    models: tuple[str, ...]
    guarantee: str
    rounds: int = 1
    epsilon: float | None = None
    delta: float | None = None
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Invitation:
    """An invitation.

    Attributes:
        address: HOST:PORT that sites connect to.
        ca: The CA of the server's certificate, as PEM.
        scenario: Facts of the planned scenario.
    """

    address: str
    ca: str
    scenario: Planned

    def __post_init__(self) -> None:
        host_and_port(self.address)


def check_installed(cell: Cell) -> None:
    """Checks that an arm's strategy is an installed module.

    Raises:
        BadValue: If it is a file beside the scenario, which sites cannot read before they agree to it.
    """
    if (file := cell.scenario.strategy.file) is not None:
        raise BadValue(
            f"arm {cell.arm!r}: strategy.use is the file {str(file)!r}, which simulations alone read: between real "
            "sites all parties run an installed package; make one of it, and name its module"
        )


def planned(scenario: Scenario) -> Planned:
    """The facts of a scenario for sites.

    Raises:
        BadValue: If its label list is not a public one, a strategy is a file, or arms list other values of an
            attribute.
    """
    first = [cell for cell in cells(scenario) if cell.seed == scenario.seeds[0]]
    for cell in first:
        check_installed(cell)
    arms = [cell.scenario for cell in first]
    budgets = [arm.client.budget for arm in arms if arm.client.budget is not None]
    clients = [arm.client for arm in arms]
    models = [name for c in clients for name in (c.generator, c.task_model, *c.task_models, c.embedder)]
    labels = public_labels(scenario.data)
    assert scenario.data.task != "choice"  # refused for its labels
    return Planned(
        name=scenario.name,
        task=scenario.data.task,
        labels=labels,
        strategies=tuple(dict.fromkeys(arm.strategy.use for arm in arms)),
        models=tuple(dict.fromkeys(filter(None, models))),
        guarantee="none" if any(arm.client.guarantee == "none" for arm in arms) else "dp",
        rounds=max(arm.rounds for arm in arms),
        epsilon=max((budget.epsilon for budget in budgets), default=None),
        delta=max((budget.delta for budget in budgets), default=None),
        attributes=_attributes([arm.task for arm in arms]),
    )


def _attributes(cards: Sequence[Task]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for column, card in (each for task in cards for each in task.attributes.items()):
        if set(found.setdefault(column, tuple(card.values))) != set(card.values):
            raise BadValue(f"arms list different values of task.attributes.{column}: a site declares one list")
    return found


def public_labels(data: Data) -> tuple[str, ...]:
    """The label list of a run on sites, which must not depend on any row: a rare class can reveal a person.

    Raises:
        BadValue: If it would be read from a file, or the task is for simulations alone.
    """
    if data.task == "choice":
        raise BadValue('data.task = "choice" compares methods in a simulation: a run on sites has "instructions"')
    if data.labels == "all" and data.world is None and data.task == "classification":
        raise BadValue(
            f"data.labels would be read from {data.source}, and the list of a run on sites must be public: "
            'name the classes, data.labels = ["...", "..."]'
        )
    return label_list(data)


def read_invitation(path: Path) -> Invitation:
    """An invitation from its file.

    Raises:
        BadValue: If the file is missing or not valid.
    """
    with toml_file(path, "the coordinator sends it: invitation.toml") as table:
        return build(Invitation, table)


def invitation_toml(made: Invitation) -> str:
    """The file's text."""
    return HEADER + tomli_w.dumps(plain(made), multiline_strings=True)


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of HOST:PORT; the brackets around an IPv6 address go.

    Raises:
        BadValue: If the text is no HOST:PORT.
    """
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    numbered = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if not colon or not HOST.fullmatch(bare) or (":" in bare and bare == host) or not numbered:
        raise BadValue(f"an address must read HOST:PORT, as superlink.example.org:9443 or [::1]:9443, got {address!r}")
    return bare, int(port)


def joined(host: str, port: int) -> str:
    """HOST:PORT."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_name(name: str) -> str:
    """A site's name, which is also a name of files.

    Raises:
        BadValue: If it is no valid name.
    """
    if not NAME.fullmatch(name):
        raise BadValue(
            f"a site's name has letters, digits, '.', '_' and '-', 63 at most, and begins with a letter or "
            f"digit, got {name!r}"
        )
    return name
