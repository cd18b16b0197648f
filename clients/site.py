"""A real site: its file site.toml with the operator's policy, and the home that comes of it."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Context

from fedsynth.clients.approval import Approvals
from fedsynth.clients.home import Home, NotAllowed, Rules, WrongData, WrongLabels, cell_of
from fedsynth.clients.trail import Trail
from fedsynth.data import label_list
from fedsynth.invitation import check_name, host_and_port
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.plan import Budget
from fedsynth.scenario import Cell, Client
from fedsynth.sources import SiteData, read
from fedsynth.tasks import ORDERS, Envelope, Output
from fedsynth.typed import BadValue, Count, build, in_range

SITE = "FEDSYNTH_SITE"  # environment variable: the path of site.toml
BUNDLE = "FEDSYNTH_BUNDLE"  # set for a client app's process: the hash of what the server sent
UNDER_GUARANTEE = tuple(o.task for o in ORDERS if o.task not in ("train.self_train", "evaluate.evaluate"))


@dataclass(frozen=True)
class SuperLink:
    """How to reach the server, and be known by it.

    Attributes:
        address: HOST:PORT of the SuperLink; always TLS.
        root_certificates: PEM file of the CA that the server's certificate is checked against.
        private_key: The site's key (EC, OpenSSH format); the server knows the site by it.
    """

    address: str
    root_certificates: str = "ca.crt"
    private_key: str = "keys/node"

    def __post_init__(self) -> None:
        host_and_port(self.address)


@dataclass(frozen=True)
class Models:
    """Models that the site takes instead of those that the scenario names: a folder, or a name as there.

    Attributes:
        generator: Causal or seq2seq model that learns the site's text. Adapters fit only one and the same.
        task_model: What becomes the site's classifier; may be another one than at other sites.
    """

    generator: str = ""
    task_model: str = ""


@dataclass(frozen=True)
class Policy:
    """What the operator allows. A scenario can only be stricter.

    Attributes:
        lifetime: What all runs together may ever spend on this data set. What would pass it is refused unspent.
        per_run: What one run may spend; a scenario that asks for more gets this.
        strategies: Strategies that may ask, as a scenario names them.
        orders: Orders that are answered.
        outputs: Kinds of what may leave: text, adapter, scores, metrics. Metrics are figures of models that learnt
            private text, on test rows; no epsilon covers them.
        without_guarantee: Whether something may leave without a mechanism. The data's epsilon is infinite from then on.
        minimum_records: Fewer declared records take part in nothing.
        models: Models of a scenario that may be loaded here.
        approve_text: Synthetic text waits for `fedsynth site approve`.
        bundles: SHA-256 of the server's bundles that may ask; left out, any. Their code is never run in any case.
    """

    lifetime: Budget
    per_run: Budget | None = None
    strategies: tuple[str, ...] = ()
    orders: tuple[str, ...] = UNDER_GUARANTEE
    outputs: tuple[Output, ...] = ("text", "adapter", "scores")
    without_guarantee: bool = False
    minimum_records: Count = 100
    models: tuple[str, ...] = ()
    approve_text: bool = True
    bundles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        in_range(self, "policy")
        known = {order.task for order in ORDERS}
        if strange := sorted(set(self.orders) - known):
            raise BadValue(f"policy.orders: no order {strange[0]!r}; there are {', '.join(sorted(known))}")
        for name, budget in (("lifetime", self.lifetime), ("per_run", self.per_run)):
            if budget is not None and budget.delta > Budget.delta:
                raise BadValue(f"policy.{name}: delta must be at most {Budget.delta:g}, got {budget.delta:g}")
        if self.per_run is not None and self.per_run.epsilon > self.lifetime.epsilon:
            raise BadValue(f"policy.per_run allows epsilon {self.per_run.epsilon:g}, more than policy.lifetime "
                           f"({self.lifetime.epsilon:g})")  # fmt: skip
        if self.outputs and not self.orders:
            raise BadValue("policy.orders is empty: such a site answers nothing; leave it out for the usual orders")
        for bundle in self.bundles:
            if not re.fullmatch(r"[0-9a-f]{64}", bundle):
                raise BadValue(f"policy.bundles: a SHA-256 has 64 hexadecimal digits, got {bundle!r}")


@dataclass(frozen=True)
class Site:
    """What site.toml says.

    Attributes:
        name: Under which the coordinator registered the site's key.
        data: The site's text.
        policy: What the operator allows.
        superlink: How to reach the server.
        models: Models that the site takes instead of the scenario's.
        state: Folder of ledger, task models, logs and audit trail; belongs to this site for ever.
        device: `auto` (a GPU where there is one), `cpu`, or the number of a GPU, as `cuda:1`.
    """

    name: str
    data: SiteData
    policy: Policy
    superlink: SuperLink
    models: Models = field(default_factory=Models)
    state: str = "state"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_name(self.name)
        if not re.fullmatch(r"auto|cpu|cuda:\d+", self.device):
            raise BadValue(f'device must be "auto", "cpu" or "cuda:NUMBER", got {self.device!r}')


@dataclass(frozen=True)
class Place:
    """A site's file and its folder, in which all relative paths of the file lie."""

    site: Site
    folder: Path

    def path(self, name: str) -> Path:
        """Where a file or folder that site.toml names lies."""
        return self.folder / name

    @property
    def state(self) -> Path:
        """The site's own folder."""
        return self.path(self.site.state)

    @property
    def ledger(self) -> Path:
        """The account of the site's data set."""
        return self.state / f"ledger-{self.site.data.id}.sqlite"

    @property
    def trail(self) -> Path:
        """The audit trail."""
        return self.state / "audit.jsonl"

    @property
    def approvals(self) -> Approvals:
        """What waits for a person."""
        return Approvals(self.state / "approvals")

    def open_ledger(self, **more: Any) -> Ledger:
        """The account, made with the first call.

        Raises:
            fedsynth.privacy.ledger.LedgerUnusable: If it cannot be used.
        """
        return Ledger(self.ledger, dataset=self.site.data.id, cap=self.site.policy.lifetime, **more)

    def model(self, name: str) -> str:
        """A model of site.toml as it is loaded."""
        return str(self.path(name)) if self.path(name).is_dir() else name


def load_site(path: Path) -> Place:
    """Reads site.toml, or that of a folder.

    Raises:
        BadValue: If it cannot be read, or says what does not fit; the message names file and key.
    """
    file = path / "site.toml" if path.is_dir() else path
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
        return Place(build(Site, tree), file.absolute().parent)
    except OSError as problem:
        raise BadValue(f"{file}: cannot be read ({problem.strerror}): make one with `fedsynth site init`") from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise BadValue(f"{file}: not TOML: {problem}") from problem
    except BadValue as problem:
        raise BadValue(f"{file}: {problem}") from problem


def site_home(context: Context, envelope: Envelope) -> Home:
    """The home of this site, for an order of a run: what the scenario asks, within what site.toml allows.

    Raises:
        BadValue: If site.toml or the scenario cannot be read.
        KeyError: If the scenario has no such arm or seed.
        fedsynth.privacy.ledger.LedgerUnusable: If the account of the data cannot be used.
    """
    place = load_site(Path(os.environ[SITE]))
    cell = cell_of(str(context.run_config["scenario-toml"]), envelope.arm, envelope.seed)
    return home_of(place, cell, envelope, _asker(place, context))


def home_of(place: Place, cell: Cell, envelope: Envelope, who: Mapping[str, Any], **ledger: Any) -> Home:
    """`site_home` for a resolved cell.

    Args:
        place: The site.
        cell: What is asked.
        envelope: Of the order.
        who: Who asks, for the audit trail.
        ledger: More for the account.
    """
    site, scenario = place.site, cell.scenario
    if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) for name in (envelope.run, cell.arm)):
        raise BadValue("run and arm name folders here: letters, digits, dots, dashes and underscores")
    work = place.state / "runs" / envelope.run / cell.arm / f"seed-{cell.seed}"
    work.mkdir(parents=True, exist_ok=True, mode=0o700)
    labels = label_list(scenario.data)
    return Home(
        index=envelope.home,
        config=client_of(place, scenario.client.of(envelope.home)),
        labels=labels,
        records=site.data.records,
        rounds=scenario.rounds,
        unit=site.data.unit_name,
        work=work,
        run=f"{envelope.run}/{cell.arm}/{cell.seed}",
        ledger=place.open_ledger(**ledger),
        open=lambda: read(site.data, place.folder),
        simulated=False,
        rules=rules_of(place, cell, labels),
        lock=place.state / "orders.lock",
        approvals=place.approvals,
        trail=Trail(place.trail, {"strategy": scenario.strategy.use, **who}),
    )


def client_of(place: Place, asked: Client) -> Client:
    """What the site runs: what the scenario asks, with the site's own models, and no larger budget than it allows."""
    models, cap = place.site.models, place.site.policy.per_run
    found = replace(asked, task_models=(), stacked=None)
    if models.generator:
        found = replace(found, generator=place.model(models.generator))
    if models.task_model:
        found = replace(found, task_model=place.model(models.task_model))
    if asked.budget is not None and cap is not None:
        least = Budget(min(asked.budget.epsilon, cap.epsilon), min(asked.budget.delta, cap.delta))
        found = replace(found, budget=least)
    return found


def rules_of(place: Place, cell: Cell, labels: tuple[str, ...]) -> Rules:
    """The site's policy, held against a scenario. Nothing private is read for it."""
    policy = place.site.policy
    return Rules(
        orders=frozenset(policy.orders),
        outputs=frozenset(policy.outputs),
        without_guarantee=policy.without_guarantee,
        approval=policy.approve_text,
        objection=_objection(place, cell, labels),
    )


def _objection(place: Place, cell: Cell, labels: tuple[str, ...]) -> Exception | None:
    site, policy, scenario = place.site, place.site.policy, cell.scenario
    if policy.strategies and scenario.strategy.use not in policy.strategies:
        return NotAllowed(f"the strategy {scenario.strategy.use!r} is none of policy.strategies")
    if site.data.records < policy.minimum_records:
        return NotAllowed(
            f"{site.data.records} records are declared, policy.minimum_records is {policy.minimum_records}"
        )
    bundle = os.environ.get(BUNDLE, "")
    if policy.bundles and bundle not in policy.bundles:
        return NotAllowed(f"the server's bundle {bundle or 'without a hash'} is none of policy.bundles")
    if scenario.data.task != site.data.task:
        return WrongData(f"the scenario's task is {scenario.data.task!r}, the site's data are for {site.data.task!r}")
    if set(labels) != set(site.data.labels):
        strange, missing = sorted(set(labels) - set(site.data.labels)), sorted(set(site.data.labels) - set(labels))
        return WrongLabels(f"of the scenario's labels data.labels has not {strange}; the scenario has not {missing}")
    client = scenario.client.of(0)
    named = {"generator": client.generator, "task_model": client.task_model}
    for role, name in named.items():
        if name and not getattr(site.models, role) and name not in policy.models:
            return NotAllowed(f"the scenario's {role} {name!r} is none of policy.models, and [models] names no own one")
    return None


def _asker(place: Place, context: Context) -> dict[str, Any]:
    return {
        "superlink": place.site.superlink.address,
        "flower_run": str(context.run_id),
        "bundle": os.environ.get(BUNDLE, ""),
    }
