"""What a client keeps to itself: its text, its ledger, its task model, its log; and what it may be asked."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from fedsynth import __version__
from fedsynth.clients.approval import Approvals
from fedsynth.clients.audit_log import AuditLog
from fedsynth.corpus import Corpus
from fedsynth.data.partition import ClientData, label_list, open_site, open_sites
from fedsynth.federation.messages import OUTPUTS, REQUESTS, Output
from fedsynth.models.hub import weights_hash
from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Binding, Ledger, Opening
from fedsynth.privacy.noise import data_mac, simulated_key
from fedsynth.privacy.plan import DPPlan, Statement, statement
from fedsynth.scenario.schema import Cell, Client, Data
from fedsynth.scenario.toml import cells as scenario_cells
from fedsynth.scenario.toml import from_toml
from fedsynth.system.folders import private_folder
from fedsynth.typed import plain


class NotAllowed(RuntimeError):
    """What is asked is none of what the client's operator allows; nothing was read and nothing charged."""


class WrongLabels(RuntimeError):
    """The scenario's label list is not the site's."""


class WrongData(RuntimeError):
    """The scenario's task or unit is not what the site's data are for."""


@dataclass(frozen=True)
class Rules:
    """What a client may be asked, and what may leave it.

    Attributes:
        requests: Names of requests.
        outputs: Kinds of what leaves.
        without_guarantee: Whether something may leave without a mechanism.
        approval: Whether synthetic text waits until a person lets it go.
        objection: Why nothing of this run may be asked; None if it may.
    """

    requests: frozenset[str] = frozenset(request.task for request in REQUESTS)
    outputs: frozenset[Output] = frozenset(OUTPUTS)
    without_guarantee: bool = True
    approval: bool = False
    objection: Exception | None = None


EVERYTHING = Rules()
COVERED = Rules(outputs=frozenset(kind for kind in OUTPUTS if kind != "metrics"), without_guarantee=False)


@dataclass(frozen=True)
class ClientSide:
    """One client's house. Nothing in it leaves except through `fedsynth.federation.records.seal`.

    Attributes:
        index: The client's place among the clients.
        config: What the client runs.
        labels: The public label list; empty where the task is to follow instructions.
        records: Declared, public number of privacy units.
        rounds: Rounds of the run, all planned and reserved at first.
        unit: What is protected: "row", or the name of the person column.
        work: Private directory: ledger, task model, log.
        run: Public id of the run, arm and seed included.
        ledger: Of this client's data set.
        open: Reads the client's text; before the charge for its keyed MAC only.
        stacked: Its adapter may train in one pass with those of other clients of a simulation.
        simulated: Noise comes from the run seed and is reproducible.
        allowed: What may be asked, and what may leave; left out, everything in a simulation, else what a guarantee
            covers.
        lock: Held while a request is worked on; left out, a file in `work`.
        approvals: Where text waits for a person, if `rules.approval`.
        audit_log: Where a site keeps what it was asked and answered.
        world: The simulated world that its text is of; None for text of people.
    """

    index: int
    config: Client
    labels: tuple[str, ...]
    records: int
    rounds: int
    unit: str
    work: Path
    run: str
    ledger: Ledger
    open: Callable[[], ClientData]
    simulated: bool
    stacked: bool = False
    allowed: Rules | None = None
    lock: Path | None = None
    approvals: Approvals | None = None
    audit_log: AuditLog | None = None
    world: str | None = None

    @property
    def rules(self) -> Rules:
        """What may be asked, and what may leave."""
        return self.allowed or (EVERYTHING if self.simulated else COVERED)

    @cached_property
    def site(self) -> ClientData:
        """The client's text."""
        return self.open()

    @property
    def instructs(self) -> bool:
        """Whether the task is to follow instructions; else it is to classify."""
        return not self.labels

    @property
    def train(self) -> Corpus:
        """Private text."""
        return self.site.train

    @property
    def test(self) -> Corpus:
        """Held-out text."""
        return self.site.test

    def plan(self) -> DPPlan:
        """The whole schedule of this run, from declared facts only: no private text is read for it.

        Raises:
            fedsynth.privacy.plan.BudgetTooSmall: If no allowed noise fits the budget.
        """
        return self.config.plan(self.records, self.rounds)

    def charged(self, planned: DPPlan) -> DPPlan:
        """What this run has paid of a plan so far, at least all of it: the statement is about that."""
        return replace(planned, rounds=max(planned.rounds, self.ledger.rounds(self.run, planned)))

    def binding(self, request: str, planned: DPPlan, *, model: str | None = None, training: Any = None) -> Binding:
        """What a grant holds for: this request, plan, data, model, and the version and settings of the training.

        Args:
            request: Digest of the request.
            planned: What is charged.
            model: Hash of the weights that private text is put into; left out: the generator's.
            training: Settings beside the plan; left out: those of the generator.
        """
        return Binding(
            order=request,
            plan=planned.digest(),
            data=data_mac(self.ledger.mac_key, self.train),
            model=model or weights_hash(self.config.generator),
            version=f"{__version__} {self._settings_digest(training or self.config.generator_training)}",
        )

    def _settings_digest(self, training: Any) -> str:
        """What shapes the training beside the plan: the same key must not serve another learning rate or label list."""
        settings = {"training": plain(training), "labels": list(self.labels), "unit": self.unit}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def statement(self, plan: DPPlan | None, rows_per_unit: int = 1) -> Statement:
        """What an answer says of its privacy: all rounds so far under one plan, or no guarantee."""
        charged = None if plan is None else self.charged(plan)
        return statement(charged, unit=self.unit, rows_per_unit=rows_per_unit, rows=(), simulated=self.simulated)

    @property
    def waived(self) -> bool:
        """Whether a release without guarantee was logged in this run."""
        return self.ledger.waived(self.run)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One request at a time; the operating system lifts the lock of a process that died."""
        with open(self.lock or self.work / "lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @property
    def log_folder(self) -> Path:
        """Where the site's own log lies."""
        return self.work if self.audit_log is None else self.audit_log.path.parent

    def log(self) -> logging.Logger:
        """The site's own log: what may hold private values is written here and nowhere else."""
        return site_log(self.log_folder)


def site_log(folder: Path) -> logging.Logger:
    """The log site.log in a folder."""
    logger = logging.getLogger(f"fedsynth.client.{folder}")
    if not logger.handlers:
        handler = _Strict(folder / "site.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


class _Strict(logging.FileHandler):
    """Raises what is amiss with its file, as a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - logging's own
        """Called while the exception is handled."""
        raise


def simulated_client(cell: Cell, index: int, private: Path, run: str) -> ClientSide:
    """A client of a simulation: its data is drawn or split by the simulator, its ledger holds this cell only.

    Args:
        cell: Arm, seed and resolved scenario.
        index: Which client.
        private: The run's private directory.
        run: Public id of the run.
    """
    scenario = cell.scenario
    clients = 1 if scenario.data.pooled else scenario.data.clients
    if not 0 <= index < clients:
        raise ValueError(f"client must lie in 0..{clients - 1}, got {index}")
    work = private / cell.arm / f"seed-{cell.seed}" / f"client-{index}"
    private_folder(work)
    dataset = f"{scenario.data.source}#{index}"

    def keys(counter: int, binding: str) -> bytes:
        return simulated_key(cell.seed, index, counter, binding)

    return ClientSide(
        index=index,
        config=scenario.client.of(index),
        labels=label_list(scenario.data),
        records=declared_records(cell, index),
        rounds=scenario.rounds,
        unit=scenario.data.unit_name,
        work=work,
        run=f"{run}/{cell.arm}/{cell.seed}",
        ledger=Ledger(
            work / "ledger.sqlite",
            Account(dataset, scenario.client.budget),
            keys=keys,
            opening=Opening(durable=False),
        ),
        open=lambda: _site(cell, index),
        simulated=True,
        stacked=scenario.stack > 1,
        world=scenario.data.world,
    )


def declared_records(cell: Cell, index: int) -> int:
    """The declared number of units. In a simulation the simulator knows it; a real site declares it in its own file."""
    data = cell.scenario.data
    if data.world is not None and data.notes_per_patient == 1:
        return data.train_per_client * (data.clients if data.pooled else 1)
    train = _site(cell, index).train
    return len(set(train.units)) if train.units is not None else len(train)


def _site(cell: Cell, index: int) -> ClientData:
    data = cell.scenario.data
    if data.world is not None:
        return _drawn(replace(data, tuned_on=()), cell.seed, index)
    return open_sites(data, cell.seed)[index] if data.pooled else open_site(data, index, cell.seed)


@lru_cache(maxsize=1024)
def _drawn(data: Data, seed: int, index: int) -> ClientData:
    """A worker meets the same client in every round, and in every arm."""
    return open_sites(data, seed)[index] if data.pooled else open_site(data, index, seed)


@lru_cache(maxsize=4)
def _cells(toml: str) -> tuple[Cell, ...]:
    return tuple(scenario_cells(from_toml(toml)))


def cell_of(toml: str, arm: str, seed: int) -> Cell:
    """The resolved cell that a request names.

    Raises:
        KeyError: If the scenario has no such arm or seed.
    """
    for cell in _cells(toml):
        if (cell.arm, cell.seed) == (arm, seed):
            return cell
    raise KeyError(f"the scenario has no arm {arm!r} with seed {seed}")
