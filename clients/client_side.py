"""A client's private side (text, ledger, task model, log) and the rules of what may be asked of it."""

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
from fedsynth.data.choice import as_instructions
from fedsynth.data.partition import ClientData, class_list, label_list, open_site, open_sites
from fedsynth.federation.identity import Identity, simulated_identity
from fedsynth.federation.messages import OUTPUTS, REQUESTS, Output
from fedsynth.federation.run.directory import SHARED
from fedsynth.identifiers import Kind
from fedsynth.models.form import Form, student_form
from fedsynth.models.hub import weights_hash
from fedsynth.privacy.caps import Account
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.ledger import Binding, Ledger, Opening
from fedsynth.privacy.noise import data_mac, simulated_key
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.statement import Statement, statement
from fedsynth.scenario.client import Client
from fedsynth.scenario.data import Data
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.task import NO_CARD, Task
from fedsynth.scenario.toml import cells as scenario_cells
from fedsynth.scenario.toml import from_toml
from fedsynth.system.folders import private_folder
from fedsynth.typed import plain


class NotAllowed(RuntimeError):
    """The client's operator does not allow the request; nothing was read and nothing charged."""


class WrongLabels(RuntimeError):
    """The scenario's list of labels, or of an attribute's values, is not the site's."""


class WrongData(RuntimeError):
    """The scenario's task or unit does not fit the site's data."""


@dataclass(frozen=True)
class Rules:
    """The requests that a client accepts, and the outputs that may leave it.

    Attributes:
        requests: Names of accepted requests.
        outputs: Kinds of outputs that may leave.
        without_guarantee: Outputs may leave without a mechanism.
        approval: Synthetic text waits for a person's approval.
        identifiers: Kinds of identifiers with which no synthetic text leaves.
        objection: The reason why this run's requests are all refused; None if they are not.
        rests_on_sums: A secure sum's noise is counted as that of its honest clients together; else the client adds
            enough for its own messages, and the sum hides them as well.
    """

    requests: frozenset[str] = frozenset(request.task for request in REQUESTS)
    outputs: frozenset[Output] = frozenset(OUTPUTS)
    without_guarantee: bool = True
    approval: bool = False
    identifiers: frozenset[Kind] = frozenset()
    objection: Exception | None = None
    rests_on_sums: bool = True


EVERYTHING = Rules()
COVERED = Rules(outputs=frozenset(kind for kind in OUTPUTS if kind != "metrics"), without_guarantee=False)


@dataclass(frozen=True)
class ClientSide:
    """One client's private side. Nothing of it leaves except through `fedsynth.federation.records.seal`.

    Attributes:
        index: The client's number.
        config: The client's models and trainings.
        labels: The public label list; empty if the task is to follow instructions.
        records: Declared, public number of privacy units.
        rounds: Rounds of the run; the plan reserves all of them at first.
        unit: The unit of privacy: "row", or the name of the person column.
        work: Private directory: ledger, task model, log.
        run: Public id of the run, arm and seed included.
        ledger: The privacy ledger of this client's data set.
        open: Reads the client's text; before the charge for its keyed MAC only.
        simulated: Noise comes from the run seed and is reproducible.
        stacked: The client's adapter may train in one pass with those of other simulated clients.
        allowed: The client's rules; None for everything in a simulation, else for what a guarantee covers.
        lock: A file that is locked while the client works on a request; None for a file in `work`.
        approvals: Text that waits for a person, if `rules.approval`.
        audit_log: The site's audit log; None in a simulation.
        world: The simulated world of the client's text; None for text of people.
        shared: Simulations: a private folder of trainings that other arms would repeat byte for byte; None at a site.
        task: The scenario's card, which gives the control codes of labels and attributes, or the form of instructions.
        choices: The responses that an instruction chooses from (`data.task = "choice"`); empty for free ones.
        identify: Gives the client's signing key and its roster, for secure sums; None: it takes part in none.
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
    task: Task = NO_CARD
    shared: Path | None = None
    choices: tuple[str, ...] = ()
    identify: Callable[[], Identity] | None = None

    @property
    def rules(self) -> Rules:
        """The rules in force: `allowed` or their default."""
        return self.allowed or (EVERYTHING if self.simulated else COVERED)

    @cached_property
    def site(self) -> ClientData:
        """The client's text."""
        return self.open()

    @property
    def instructs(self) -> bool:
        """True if the task is to follow instructions, False if it is to classify."""
        return not self.labels

    @property
    def form(self) -> Form:
        """The form in which the client's model reads instructions."""
        from fedsynth.models.loading import load_tokenizer  # brings torch

        return student_form(self.task, load_tokenizer(self.config.generator))

    @property
    def train(self) -> Corpus:
        """Private text."""
        return self.site.train

    @property
    def test(self) -> Corpus:
        """Held-out text."""
        return self.site.test

    def plan(self) -> DPPlan:
        """The plan of this whole run, from declared facts only; it reads no private text.

        Raises:
            fedsynth.privacy.plan.BudgetTooSmall: If no allowed noise fits the budget.
        """
        return self.config.plan(self.records, self.rounds)

    def charged(self, planned: DPPlan) -> DPPlan:
        """The plan with the rounds that this run has paid so far, at least all of its own; a statement covers these."""
        return replace(planned, rounds=max(planned.rounds, self.ledger.rounds(self.run, planned)))

    def binding(self, request: str, planned: DPPlan, *, model: str | None = None, training: Any = None) -> Binding:
        """The facts that a grant is bound to: request, plan, data, model, and the training's version and settings.

        Args:
            request: Digest of the request.
            planned: The plan to charge.
            model: Hash of the weights that read private text; None for the generator's.
            training: Settings beside the plan; None for the generator's.
        """
        return Binding(
            order=request,
            plan=planned.digest(),
            data=data_mac(self.ledger.mac_key, self.train),
            model=model or weights_hash(self.config.generator),
            version=f"{__version__} {self._settings_digest(training or self.config.generator_training)}",
        )

    def _settings_digest(self, training: Any) -> str:
        """A digest of training settings, labels and unit: one noise key must not serve two learning rates."""
        settings = {"training": plain(training), "labels": list(self.labels), "unit": self.unit}
        if self.task != NO_CARD:  # without a card a label is its own control code
            settings["codes"] = self.task.codes(*self.labels)
            if self.task.attributes:  # which rows a generator learns
                settings["combinations"] = self.task.combinations
            if self.instructs:
                settings["student"] = [*self.task.around("student"), self.task.system]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def statement(self, plan: DPPlan | None, rows_per_unit: int = 1, cohort: Cohort | None = None) -> Statement:
        """The privacy statement of a reply: all rounds so far under one plan, or no guarantee."""
        return statement(
            None if plan is None else self.charged(plan),
            unit=self.unit,
            rows_per_unit=rows_per_unit,
            rows=(),
            simulated=self.simulated,
            cohort=cohort,
        )

    @property
    def waived(self) -> bool:
        """True if a release without guarantee was logged in this run."""
        return self.ledger.waived(self.run)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One request at a time; the operating system lifts the lock of a process that died."""
        with open(self.lock or self.work / "lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @property
    def log_folder(self) -> Path:
        """The folder of the site's own log."""
        return self.work if self.audit_log is None else self.audit_log.path.parent

    def log(self) -> logging.Logger:
        """The site's own log, the only place for messages that may hold private values."""
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
    """Raises errors of its file, such as a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - logging's own
        """Called while the exception is handled."""
        raise


def simulated_client(cell: Cell, index: int, private: Path, run: str) -> ClientSide:
    """A simulated client: the simulator draws or splits its data, and its ledger holds this cell only.

    Args:
        cell: Arm, seed and resolved scenario.
        index: The client's number.
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
        task=scenario.task,
        shared=private / SHARED,
        choices=tuple(map(scenario.task.wording, class_list(scenario.data))) if scenario.data.task == "choice" else (),
        identify=lambda: simulated_identity(index, clients),
    )


def declared_records(cell: Cell, index: int) -> int:
    """A simulated client's number of units. The simulator counts it; a real site declares it in its own file."""
    data = cell.scenario.data
    if data.world is not None and data.notes_per_patient == 1:
        return data.train_per_client * (data.clients if data.pooled else 1)
    train = _site(cell, index).train
    return len(set(train.units)) if train.units is not None else len(train)


def _site(cell: Cell, index: int) -> ClientData:
    data = cell.scenario.data
    if data.task == "choice":
        return as_instructions(_rows(data, cell.seed, index), class_list(data), cell.scenario.task)
    return _rows(data, cell.seed, index)


def _rows(data: Data, seed: int, index: int) -> ClientData:
    if data.world is not None:
        return _drawn(replace(data, tuned_on=()), seed, index)
    return open_sites(data, seed)[index] if data.pooled else open_site(data, index, seed)


@lru_cache(maxsize=1024)
def _drawn(data: Data, seed: int, index: int) -> ClientData:
    """Cached, as a worker sees the same client in every round and arm."""
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
