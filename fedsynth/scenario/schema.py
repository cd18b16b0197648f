"""One experiment as typed, frozen, checked data: each key of a scenario is a field here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fedsynth.limits import MAX_STEPS
from fedsynth.scenario.client import Client
from fedsynth.scenario.data import Data
from fedsynth.scenario.server import Server, check_unguarded
from fedsynth.scenario.task import Task
from fedsynth.typed import BadValue, Count, Range, Share, in_range


@dataclass(frozen=True)
class StrategyChoice:
    """The strategy that runs: a class, and the options of its `Config`.

    Attributes:
        use: `package.module:Class`, importable; or `FILE.py:Class`, which simulations read and real sites refuse.
        options: Values of the class's `Config`.
    """

    use: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.use.count(":") != 1:
            raise BadValue(f'strategy.use must read "package.module:Class" or "FILE.py:Class", got {self.use!r}')

    @property
    def file(self) -> Path | None:
        """The file of a strategy that is no installed module: it runs on the machine of a simulation alone."""
        module = self.use.partition(":")[0]
        return Path(module) if module.endswith(".py") else None


@dataclass(frozen=True)
class Participation:
    """Clients of a simulation that are away or leave. The server's own time limit is `server.timeout`.

    Attributes:
        availability: Chance that a client is available in a round; other clients are not asked and spend nothing.
        dropout: Chance that a client leaves an exchange before its answer arrives. Its spending counts.
        seed: Seed of absences and departures; the run's seed enters, too.
    """

    availability: Share = 1.0
    dropout: Annotated[float, Range("lie in [0, 1)", lambda value: 0 <= value < 1)] = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        in_range(self, "participation")
        if self.seed < 0:
            raise BadValue(f"participation.seed must be at least 0, got {self.seed}")

    @property
    def loses(self) -> bool:
        """True if any client's answer can be missing."""
        return self.availability < 1 or self.dropout > 0


@dataclass(frozen=True)
class Scenario:
    """One experiment.

    Attributes:
        name: Name of the run directory.
        seeds: Public seeds; each gives a world of its own.
        rounds: Rounds of the strategy.
        arms: Variants: name -> overrides of the other tables.
        run: The arms that run by default; left out, all.
        quick: Overrides of `--quick`, a smaller run that shows the same in less time: `run` and all tables.
        participation: Clients that are away or leave.
        task: The task card: how the task and its labels are put into words.
    """

    name: str
    strategy: StrategyChoice
    data: Data
    client: Client
    server: Server
    seeds: tuple[int, ...] = (0,)
    rounds: Count = 1
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    run: tuple[str, ...] = ()
    quick: Mapping[str, Any] = field(default_factory=dict)
    participation: Participation = field(default_factory=Participation)
    task: Task = field(default_factory=Task)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise BadValue(f"seeds must be distinct whole numbers >= 0, at least one, got {list(self.seeds)}")
        in_range(self)
        # Before any planning: a plan of so many steps would take a client minutes and gigabytes.
        for training, rounds in (("generator_training", self.rounds), ("scorer_training", 1)):
            if (steps := getattr(self.client, training).steps) * rounds > MAX_STEPS:
                times = f"{steps:,} in each of {rounds:,} rounds" if rounds > 1 else f"{steps:,}"
                raise BadValue(
                    f"client.{training}.steps must be at most {MAX_STEPS:,} over all rounds, got {times}: "
                    "take fewer, of larger batches"
                )
        check_unguarded(
            self.server, guarantee=self.client.guarantee, public=self.data.public or self.data.world is not None
        )
        if self.participation.loses and self.server.quorum == 1:
            raise BadValue(
                "participation lets clients be missing, and server.quorum is 1: the first missing one would "
                "end the run; lower server.quorum"
            )
        self._check_attributes()
        if self.data.task == "classification" and not (self.client.task_model or self.client.task_models):
            raise BadValue("client.task_model is missing: name the model that becomes a classifier")
        if self.data.task != "classification" and self.client.task_training.weights != "equal":
            raise BadValue('client.task_training.weights = "agreement" is about labels, and instructions have none')
        choosing = self.data.task == "choice" and self.client.task_training.trains == "llm_zero_shot"
        if self.client.task_training.trains == "llm_zero_shot" and not choosing:
            raise BadValue(
                'client.task_training.trains = "llm_zero_shot" asks a language model which label a text has: say '
                'data.task = "choice"'
            )
        if self.data.task != "classification" and self.client.task_training.baseline and not choosing:
            raise BadValue(
                f'client.task_training.trains = "{self.client.task_training.trains}" tells labels, and instructions '
                "have none: leave it out"
            )
        for arm in self.run:
            if arm not in self.arms:
                raise BadValue(f"run names the arm {arm!r}, which has no [arms.{arm}]; known: {', '.join(self.arms)}")

    def _check_attributes(self) -> None:
        named, told = sorted(self.data.attributes), list(self.task.columns)
        if named != told:
            raise BadValue(
                f"data.attributes names {named}, the card has values for {told}: every column of data.attributes needs "
                "its table [task.attributes.COLUMN] with values, and no other column has one"
            )
        if self.data.labels != "all":
            self.task.check_codes(len(self.data.labels))

    def __repr__(self) -> str:
        arms = ", ".join(self.run or self.arms) or self.strategy.use.rpartition(":")[2]
        seeds = ", ".join(map(str, self.seeds))
        return f"Scenario({self.name}: {arms}; {self.data.clients} clients, data {self.data.source}, seeds {seeds})"

    @property
    def stack(self) -> int:
        """Number of clients whose adapters train in one pass; by default there are at least eight such stacks."""
        clients, training = 1 if self.data.pooled else self.data.clients, self.client.generator_training
        if training.clipping != "bookkeeping":
            return 1
        pays = (
            min(STACK_TOKENS // training.max_length, training.max_physical_batch_size) // training.expected_batch_size
        )
        return self.client.stacked or max(1, min(pays if pays >= 4 else 1, clients // 8))


STACK_TOKENS = 1024  # tokens in a step of a stack: beyond, one pass takes as long as many (docs/results.md)


@dataclass(frozen=True)
class Cell:
    """One arm under one seed: a hypothetical world of its own."""

    arm: str
    seed: int
    scenario: Scenario

    def public_seed(self, purpose: str, *, round: int = 0, client: int = -1) -> int:
        """A separate public seed for each purpose; the arm does not enter, so that arms are paired."""
        text = f"{self.seed}/{round}/{client}/{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
