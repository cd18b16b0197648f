"""The base class of strategies, one function from round to round, and the server's side of a cell."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
import zlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray

from fedsynth.federation.messages import Evaluate, Evaluated
from fedsynth.federation.messaging import Clients
from fedsynth.federation.run.log import SERVER, RunLog, append_event
from fedsynth.federation.run.times import WORKER_SECONDS
from fedsynth.federation.run.trackers import event_files, figures
from fedsynth.lora import Adapter
from fedsynth.models.llm import TextModel
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario.client import Client
from fedsynth.scenario.schema import Cell, Scenario, StrategyChoice
from fedsynth.scenario.task import Task
from fedsynth.training.engine import Engine
from fedsynth.typed import BadValue, build

__all__ = ["Clients", "Planner", "RoundStrategy", "ServerSide", "load_strategy"]  # all that a method's module needs

S = TypeVar("S")
Planner: TypeAlias = Callable[[int, int], DPPlan]  # (number of units, rounds) -> the plan of all rounds


@dataclass(frozen=True)
class ServerSide:
    """The server's side of a cell, for its strategy.

    Attributes:
        cell: Arm, seed and resolved scenario; `cell.public_seed` gives every public random stream.
        labels: The public label list.
        llm: The server LLM.
        professional: KnowledgeSG's model that judges and responds; the LLM if a scenario names no other.
        embed: Texts -> vectors, shape (texts, width); offline the mean of the LLM's hidden states.
        run_log: Takes the strategy's metrics, corpora and adapters.
        open_clients: Flower's grid -> the clients of this cell.
        measures: True if clients' models are measured after each round.
        engine: Loads, asks and trains the strategy's own language models.
    """

    cell: Cell
    labels: tuple[str, ...]
    llm: TextModel
    professional: TextModel
    embed: Callable[[Sequence[str]], NDArray[np.float32]]
    run_log: RunLog
    open_clients: Callable[[Grid], Clients]
    measures: bool = True
    engine: Engine = field(default_factory=Engine)

    def new_adapter(self, seed: int) -> Adapter:
        """A new adapter to start the training of the clients' model from; the server has their base model as well.

        Args:
            seed: Public seed of the factors A.
        """
        from fedsynth.models.adapters import new_adapter  # brings torch, which methods without adapters do not need

        client = self.cell.scenario.client
        settings = client.generator_training
        return new_adapter(
            client.generator, rank=settings.rank, alpha=settings.alpha, seed=seed, targets=settings.lora_targets
        )


class RoundStrategy(Strategy, Generic[S]):
    """A method: its options (`config_class`), a first state, and one function `round(clients, state) -> state`.

    `start` is Flower's entry point. It is overridden because a round of these methods has several exchanges, which
    Flower's own loop (one training, one evaluation) cannot express.
    """

    config_class: ClassVar[type[Any]]
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    warm_starts: ClassVar[bool] = False
    """True if the method sends the start that `client.generator_training.warm_start` describes."""
    divides_budget: ClassVar[bool] = False
    """True if the method asks a client for drafts and votes, which `client.voting.share` divides a budget between."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def check(cls, config: Any, scenario: Scenario) -> None:
        """Checks, before any work, that the method can run a scenario. Calls the options' `check(scenario)` if any.

        Args:
            config: The method's options.
            scenario: The resolved scenario.

        Raises:
            BadValue: If it cannot, with the way out.
        """
        if ("instructions" if scenario.data.task == "choice" else scenario.data.task) not in cls.tasks:
            raise BadValue(
                f"{cls.__name__} is for data.task = {' or '.join(map(repr, cls.tasks))}, "
                f"this scenario has {scenario.data.task!r}"
            )
        client = scenario.client
        half = client.generator_training.precision == "bfloat16"
        if half and client.guarantee == "dp" and cls.trains_generator(config):
            raise BadValue(
                'client.generator_training.precision = "bfloat16" gives no guarantee: in it one text can '
                'move a sum by more than clip_norm, as others are drawn; say "float32", or "auto", which '
                'is float32 under client.guarantee = "dp"'
            )
        if client.generator_training.warm_start is not None and cls.trains_generator(config) and not cls.warm_starts:
            raise BadValue(f"client.generator_training.warm_start: {cls.__name__} sends no such start; leave it out")
        if client.voting.share and cls.spends(config) and not cls.divides_budget:
            raise BadValue(f"client.voting.share: {cls.__name__} asks no client for drafts and votes; leave it out")
        task = client.task_training
        if task.baseline and cls.sends_text(config):
            raise BadValue(
                f'client.task_training.trains = "{task.trains}" learns from no text that is sent: say '
                'strategy.use = "fedsynth.strategies.local:LocalOnly"'
            )
        if task.schedule == "synthetic_only" and not (task.baseline or cls.sends_text(config)):
            raise BadValue(
                f'client.task_training.schedule = "synthetic_only" leaves nothing to learn from: {cls.__name__} '
                'asks clients to learn without a text; say "sequential" or "mixed"'
            )
        if hasattr(config, "check"):
            config.check(scenario)

    @classmethod
    def warnings(cls, config: Any, labels: Sequence[str]) -> list[str]:
        """Warnings before a run; they do not stop it. Calls the options' `warnings(labels)` if any.

        Args:
            config: The method's options.
            labels: The public label list; empty where the task is to follow instructions.
        """
        return list(config.warnings(labels)) if hasattr(config, "warnings") else []

    @classmethod
    def spends(cls, config: Any) -> bool:  # noqa: ARG003 - methods look at their options
        """True if the method spends budget under `dp`; one that spends none is the same at every epsilon."""
        return True

    @classmethod
    def trains_generator(cls, config: Any) -> bool:
        """True if the generator's training spends the budget; its settings are then checked before a run."""
        return cls.spends(config)

    @classmethod
    def planners(cls, config: Any, client: Client) -> tuple[Planner, ...]:  # noqa: ARG003 - methods look at their options
        """How a client's spending is planned, mechanism by mechanism: a generator's training, unless a method says
        otherwise. Where one is trained, its plan is the first."""
        return (client.plan,)

    @classmethod
    def only_simulated(cls, config: Any) -> bool:  # noqa: ARG003 - methods look at their options
        """True if the method asks for something that no site gives."""
        return False

    @classmethod
    def sends_text(cls, config: Any) -> bool:  # noqa: ARG003 - methods look at their options
        """True if every request to learn brings text."""
        return True

    def __init__(self, config: Any, server: ServerSide) -> None:
        self.config = config
        self.server = server

    @abstractmethod
    def initial(self) -> S:
        """The state before round 1."""

    @abstractmethod
    def round(self, clients: Clients, state: S) -> S:
        """One round: asks clients, works on their replies, returns the next state."""

    @property
    def task(self) -> Task:
        """The scenario's task card."""
        return self.server.cell.scenario.task

    def seed(self, purpose: str, client: int = -1) -> int:
        """A public random stream of its own for each purpose, round and client."""
        return self.server.cell.public_seed(purpose, round=self.server.run_log.round, client=client)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 1,
        *_: Any,
        **__: Any,
    ) -> Result:
        """Runs all rounds, and measures every client's task model after each.

        Args:
            grid: Flower's.
            initial_arrays: Returned in the result unchanged.
            num_rounds: Number of rounds in all, with those before a resumption.
            *_: Flower's timeout and configurations; the scenario has them instead.
            **__: Likewise.
        """
        run_log, begun = self.server.run_log, time.monotonic()
        clients = self.server.open_clients(grid)
        run_log.count(WORKER_SECONDS, SERVER, time.monotonic() - begun)
        result = Result(arrays=initial_arrays or ArrayRecord())
        state = self._resumed(clients, self.initial())
        with event_files(run_log.place("tensorboard")) as tell:
            for number in range(run_log.checkpoint.round + 1, num_rounds + 1):
                run_log.round = number
                state = self.round(clients, state)
                if self.server.measures:
                    result.evaluate_metrics_clientapp[number] = self._record(clients.ask(Evaluate()))
                spent = {} if run_log.epsilon is None else {"privacy/epsilon": run_log.epsilon}
                tell(number, figures(run_log.rows, number) | spent)
                try:
                    run_log.checkpoint.save(number, state, {**run_log.record(), "exchange": clients.exchange})
                except BadValue as problem:
                    # The clients' stored replies remain; a resumed run then repeats more rounds.
                    append_event(run_log.events, {"event": "warning", "text": f"round {number}: {problem}"})
        clients.close()
        return result

    def _resumed(self, clients: Clients, first: S) -> S:
        """The state after the last completed round, or the first state."""
        run_log = self.server.run_log
        found = run_log.checkpoint.load(type(first))
        if found is None:
            run_log.checkpoint.save(0, first, {**run_log.record(), "exchange": 0})
            return first
        state, record = found
        run_log.restore(record)
        clients.exchange = record["exchange"]
        return state

    def _record(self, evaluated: Mapping[int, Evaluated]) -> MetricRecord:
        for client, reply in evaluated.items():
            for metric, value in sorted(reply.metrics.items()):
                self.server.run_log.log_metric(client, metric, value)
        found: dict[str, list[float]] = {}
        for reply in evaluated.values():
            for metric, value in reply.metrics.items():
                found.setdefault(metric, []).append(value)
        return MetricRecord({metric: sum(found[metric]) / len(found[metric]) for metric in sorted(found)})

    def _unused(self, *_: Any, **__: Any) -> Any:
        """Flower's hooks are for its own loop; `start` takes the place of that loop."""

    configure_train = aggregate_train = configure_evaluate = aggregate_evaluate = summary = _unused


def load_strategy(choice: StrategyChoice) -> tuple[type[RoundStrategy[Any]], Any]:
    """The class that a scenario names, and its checked options.

    Raises:
        BadValue: If there is no such class or preset, it is no RoundStrategy, or an option does not fit.
    """
    found, options = _class(choice), dict(choice.options)
    if (preset := options.pop("preset", None)) is not None:
        if preset not in found.presets:
            known = ", ".join(map(repr, found.presets)) or "none: its defaults are this package's own"
            raise BadValue(f"strategy.preset: {found.__name__} has no preset {preset!r}; known: {known}")
        options = {**found.presets[preset], **options}  # keys beside a preset win
    return found, build(found.config_class, options, "strategy")


def _class(choice: StrategyChoice) -> type[RoundStrategy[Any]]:
    module, _, name = choice.use.partition(":")
    try:
        found = getattr(importlib.import_module(module) if choice.file is None else _module_at(choice.file), name)
    except ModuleNotFoundError as problem:
        way_out = "install it, or put its folder on PYTHONPATH; a file mine.py beside the scenario is mine:Class"
        raise BadValue(f"strategy.use: no strategy {choice.use!r} ({problem}): {way_out}") from problem
    except (ImportError, AttributeError) as problem:
        raise BadValue(f"strategy.use: no strategy {choice.use!r} ({problem})") from problem
    if not (isinstance(found, type) and issubclass(found, RoundStrategy)):
        raise BadValue(f"strategy.use: {choice.use!r} is not a RoundStrategy")
    return found


def _module_at(file: Path) -> ModuleType:
    """The module in a file, read again when it changes. At its top it can import modules beside it, none of which
    takes the place of an installed one.

    Raises:
        BadValue: If there is no such file, or reading it fails; the message has its line.
    """
    if not file.is_file():
        raise BadValue(f"strategy.use: the file {str(file)!r} is gone: put it there again, or name another strategy")
    return _module_of(file.absolute(), file.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _module_of(file: Path, _: int) -> ModuleType:
    # A name of its own: `import mine` elsewhere must not find another scenario's file.
    name = f"{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    spec = spec_from_file_location(name, file)
    assert spec is not None  # its name ends with .py
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except ImportError:
        raise
    except Exception as problem:
        line = problem.lineno if isinstance(problem, SyntaxError) else _line_in(file, problem)
        raise BadValue(f"strategy.use: {file}, line {line}: {type(problem).__name__}: {problem}") from problem
    finally:
        sys.path.remove(str(file.parent))
    return module


def _line_in(file: Path, problem: BaseException) -> int | None:
    """The last line of a file that an exception passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == str(file)]
    return lines[-1] if lines else None
