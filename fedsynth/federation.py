"""Clients that can be asked, and strategies that are one function from round to round."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray

from fedsynth.checkpoint import Exchange
from fedsynth.corpus import Corpus, Scores
from fedsynth.firewall import Rejected, check_answer
from fedsynth.llm import TextModel
from fedsynth.lora import Adapter
from fedsynth.participation import Fate, fates
from fedsynth.payload import BadPayload, decode
from fedsynth.privacy.plan import Statement
from fedsynth.runs import SERVER, Journal, append_event
from fedsynth.scenario import Cell, Scenario, StrategyChoice
from fedsynth.tasks import Code, Envelope, Evaluate, Evaluated, Order, Refused
from fedsynth.trackers import event_files, figures
from fedsynth.typed import BadValue, build
from fedsynth.wire import derived, joined, pack_answer, pack_order, parted, payload_bytes, unpack_answer, unpacked

R = TypeVar("R")
S = TypeVar("S")
WHO = "query.who"
ASK_AGAIN_SECONDS = 5.0  # a site that cannot be reached
APPROVAL_SECONDS = 30.0  # a site whose answer waits for a person
NOT_ASKED = "was never connected"
POLL_SECONDS = 0.05
LARGEST_MESSAGE = 2**25  # bytes of orders that are joined; cut between stacks
IN_VAIN = "gave no answer in time"
TRIES = 3  # to get an order answered by a client whose worker dies


class TooFewReplies(RuntimeError):
    """Fewer clients gave a usable answer than the quorum asks for; the message names them and what they said."""


def nodes_by_home(grid: Grid, homes: int, *, stack: int = 1, seconds: float = 120.0) -> dict[int, int]:
    """Which node hosts which home; node ids are random, so each node is asked for its partition.

    Where there are fewer nodes than homes, SuperNode p of N hosts stacks p, p + N, p + 2 N, ... of homes.

    Args:
        grid: Flower's.
        homes: Number of homes.
        stack: Homes that train in one pass: the first so many, the next, ...
        seconds: How long to wait for all nodes: their registration races the start of a run.

    Raises:
        TooFewReplies: If fewer nodes register and answer than there are partitions.
    """
    end = time.monotonic() + seconds
    places: dict[int, int] = {}
    partitions = 1
    while len(places) < partitions:
        if time.monotonic() > end:
            raise TooFewReplies(f"{len(places)} of {partitions} SuperNodes said which partition they hold")
        new = [node for node in grid.get_node_ids() if node not in places.values()]
        asked = [Message(RecordDict({"who": ConfigRecord({})}), message_type=WHO, dst_node_id=node) for node in new]
        if not asked:
            time.sleep(POLL_SECONDS)
            continue
        for reply in grid.send_and_receive(asked, timeout=max(1.0, end - time.monotonic())):
            if reply.has_error():
                raise TooFewReplies(f"a SuperNode could not run the client app: {_first_line(reply)}")
            facts = reply.content["who"]
            if not isinstance(facts, ConfigRecord):
                raise TooFewReplies("a SuperNode's client app does not say which partition it holds")
            places[int(str(facts["partition-id"]))] = reply.metadata.src_node_id
            partitions = int(str(facts["num-partitions"]))
    ordered = [places[p] for p in sorted(places)]
    return {home: ordered[home // stack % len(ordered)] for home in range(homes)}


@dataclass(frozen=True)
class Deployment:
    """A run between real sites; a run-config without one is a simulation.

    Attributes:
        run: Public id of the run: sites know its orders again by it, also after a restart.
        sites: Names under which the sites' keys were registered; their order numbers the clients.
        measured: Ask for figures of the sites' models on their test rows: no epsilon covers them, and sites refuse
            unless their policies allow them.
    """

    run: str
    sites: tuple[str, ...]
    measured: bool = False

    @classmethod
    def read(cls, text: str) -> Deployment | None:
        """From a run-config's JSON; None if it is empty.

        Raises:
            BadValue: If it is no deployment.
        """
        if not text:
            return None
        try:
            return build(cls, json.loads(text), "deployment")
        except json.JSONDecodeError as problem:
            raise BadValue(f"the run-config's deployment is not JSON: {problem}") from problem


def nodes_by_name(grid: Grid, names: Sequence[str]) -> dict[int, tuple[int, str]]:
    """Which of the named sites are connected: number -> node id, and since when.

    A node's name is that under which an operator of the server registered its key, so that no site can claim to be
    another.

    Raises:
        TooFewReplies: If two nodes have the same name.
    """
    online = [node for node in grid.get_nodes() if node.status == "online"]
    for name, count in Counter(str(node.name) for node in online).items():
        if count > 1 and name in names:  # Flower makes keys unique, not names
            raise TooFewReplies(f"{count} SuperNodes are registered as {name!r}: find out who they are, and remove all "
                                "but one, before anything is asked")  # fmt: skip
    known = {str(node.name): (int(node.node_id), str(node.last_activated_at)) for node in online}
    return {number: known[name] for number, name in enumerate(names) if name in known}


@dataclass(frozen=True)
class _Again:
    """Why a site is asked once more, and when."""

    why: str
    when: float = field(default_factory=lambda: time.monotonic() + ASK_AGAIN_SECONDS)


WAITS = "its answer waits for approval there"


def _why_later(reply: Message) -> str | None:
    """Why a site is to be asked once more; None if what it says is an answer."""
    if reply.has_error():
        gone = reply.error.code in (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)
        return "it could not be reached" if gone else None
    try:
        payload, refused, _ = unpacked(reply.content)
        waits = refused and decode(payload, Refused).code is Code.AWAITS_APPROVAL
    except (BadPayload, BadValue):
        return None
    return WAITS if waits else None


def _first_line(reply: Message) -> str:
    return ((reply.error.reason or "").strip().splitlines() or ["no reason given"])[0][:200]


def load_strategy(choice: StrategyChoice) -> tuple[type[RoundStrategy[Any]], Any]:
    """The class that a scenario names, and its checked options.

    Raises:
        BadValue: If there is no such class, it is no RoundStrategy, or an option does not fit.
    """
    module, _, name = choice.use.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as problem:
        raise BadValue(f"strategy.use: no strategy {choice.use!r} ({problem})") from problem
    if not (isinstance(found, type) and issubclass(found, RoundStrategy)):
        raise BadValue(f"strategy.use: {choice.use!r} is not a RoundStrategy")
    return found, build(found.config_class, choice.options, "strategy")


@dataclass
class Clients:
    """The clients of one cell.

    Attributes:
        grid: Flower's.
        nodes: Home -> node id.
        cell: Arm, seed and resolved scenario.
        run: Public id of the run.
        labels: The public label list.
        journal: Where metrics, progress and what the cell needs to go on go.
        exchange: Number of the latest.
        sites: Names of real sites, by home; `nodes` are looked for again for each exchange. None in a simulation.
    """

    grid: Grid
    nodes: Mapping[int, int]
    cell: Cell
    run: str
    labels: Sequence[str]
    journal: Journal
    exchange: int = 0
    sites: Sequence[str] = ()
    # Messages whose time was over: the homes they are for, the exchange, and its orders.
    _late: dict[str, tuple[tuple[int, ...], int, Mapping[int, Order[Any]]]] = field(default_factory=dict)
    _since: dict[int, str] = field(default_factory=dict)  # by home: when the site connected that was asked
    _pushed: set[int] = field(default_factory=set)  # homes that the latest exchange's orders were sent to
    _round: int = 0
    _before: int = 0  # exchanges before the round's first

    @property
    def homes(self) -> Sequence[int]:
        """Numbers of all clients."""
        return range(len(self.sites)) if self.sites else sorted(self.nodes)

    def ask(self, order: Order[R]) -> dict[int, R]:
        """The same order to every home; typed answers by home, in order of homes."""
        return self.ask_each(dict.fromkeys(self.homes, order))

    def ask_each(self, orders: Mapping[int, Order[R]]) -> dict[int, R]:
        """One order per home, together; typed answers by home, in order of homes.

        Homes that the scenario's `participation` takes away give none: who is absent is not asked, who drops out or is
        late has answered in vain. What those released counts.

        Raises:
            TooFewReplies: If fewer homes than the quorum give a usable answer in time.
        """
        if self.journal.round != self._round:
            self._round, self._before = self.journal.round, self.exchange
        self.exchange += 1
        order = next(iter(orders.values()))
        name = order.task.rpartition(".")[2]
        fates = self._fates(orders)
        asked = [home for home in sorted(orders) if fates.get(home) is not Fate.ABSENT]
        answers: dict[int, R] = {}
        reasons = {home: fate.value for home, fate in fates.items()}
        # The tolerance is for shares such as 0.07 of 100, whose product lies above 7.
        needed = math.ceil(self.cell.scenario.server.quorum * len(orders) - 1e-9)
        self.journal.progress(name, 0, len(orders))
        # Where a quorum is out of reach, asking the others would spend in vain, and waiting for them cost time.
        said = self._said(orders, asked) if len(orders) - len(reasons) >= needed else ()
        for home, content in said:
            found = self._read(content, home, orders[home])
            if isinstance(found, str):
                reasons[home] = found
                if found != NOT_ASKED:
                    self._miss(home, order)
            else:
                self._note(home, found)
                if home not in fates:
                    answers[home] = found
            if len(orders) - len(reasons) < needed:
                break
            self.journal.progress(name, len(answers), len(orders))
        self._count(name, len(orders), answers, fates, reasons)
        if len(answers) < needed:
            for home in set(asked) - set(answers) - set(reasons):
                self._miss(home, order)
            why = "; ".join(f"{self._name(home)} {reason}" for home, reason in sorted(reasons.items()))
            log = "the site's own log" if self.sites else "the client's own log, in the private directory,"
            raise TooFewReplies(
                f"{name}: {len(answers)} of {len(orders)} clients answered, {needed} needed ({why}); {log} says more"
            )
        return dict(sorted(answers.items()))

    def _name(self, home: int) -> str:
        return f"site {self.sites[home]!r}" if self.sites else f"client {home}"

    def _miss(self, home: int, order: Order[Any]) -> None:
        """Notes that a client may have spent something of which its answer would have told."""
        if any(field.name == "statement" for field in fields(order.reply)):
            self.journal.silent.add((home, self.exchange))

    def _fates(self, orders: Mapping[int, Order[R]]) -> dict[int, Fate]:
        """The homes that take no part in this exchange; a simulator's own measurement reaches all."""
        if isinstance(next(iter(orders.values())), Evaluate):
            return {}
        return fates(self.cell, self.journal.round, self.exchange - self._before, sorted(orders))

    def _count(
        self, name: str, asked: int, answers: Mapping[int, R], fates: Mapping[int, Fate], reasons: Mapping[int, str]
    ) -> None:
        """What happened, in the metrics; where all answered there is nothing to say."""
        if len(answers) == asked:
            return
        place = f"exchange/{self.exchange}-{name}"
        self.journal.metric(SERVER, f"{place}/clients", asked)
        self.journal.metric(SERVER, f"{place}/answered", len(answers))
        for home, fate in fates.items():
            self.journal.metric(home, f"{place}/{fate.name.lower()}", 1)
        for home in sorted(set(reasons) - set(fates)):
            self.journal.metric(home, f"{place}/failed", 1)

    def _said(self, orders: Mapping[int, Order[R]], asked: Sequence[int]) -> Iterator[tuple[int, RecordDict | str]]:
        """What each home says, as it comes, or why it says nothing: from this exchange's record, where a run goes on
        behind it."""
        self._collect_late()
        record = self.journal.checkpoint.exchange(self.exchange)
        found = record.kept(lambda: self._digest(orders, asked))
        if found is not None:
            late = [home for home, _, facts in found if str(facts.get("why")).startswith(IN_VAIN)]
            # Asked again, what they have stored says what they spent.
            self._late |= {
                message: (homes, self.exchange, orders) for message, homes in self._send(orders, late).items()
            }
            for home, answer, facts in found:
                self.journal.count("bytes/down", home, facts["down"])
                yield home, facts.get("why") or pack_answer(answer, refused=facts["refused"], seconds=facts["seconds"])
            return
        down: dict[int, int] = {}
        digest = hashlib.sha256()
        again: dict[int, _Again] = {}
        self._pushed = set()
        known: dict[int, str] = {}
        waiting = self._send(orders, asked, down, digest, again)
        record.begin(digest.hexdigest())
        tries = dict.fromkeys(asked, 1)
        for homes, reply in self._replies(orders, waiting, again):
            if self.sites and (why := _why_later(reply)):
                seconds = APPROVAL_SECONDS if why == WAITS else ASK_AGAIN_SECONDS
                again[homes[0]] = _Again(why, time.monotonic() + seconds)
                if known.get(homes[0]) != f": {why}":  # for whoever watches: somebody is to act there
                    append_event(self.journal.events, {"event": "sites", "line": f"{self._name(homes[0])}: {why}"})
                known[homes[0]] = f": {why}"
                continue
            if reply.has_error() and tries[homes[0]] < TRIES:
                # Their worker died. The same orders again, under the same grants: stored answers are sent as they are.
                # In smaller messages, so that a home that kills its worker takes no other with it in the end.
                whole = len({self._stack(home) for home in homes}) > 1
                for _, part in groupby(homes, key=self._stack if whole else int):
                    waiting |= self._send(orders, part, again=again)
                tries |= {home: tries[home] + 1 for home in homes}
                continue
            for home, content in self._contents(reply, homes):
                self.journal.count("bytes/down", home, down[home])
                yield home, _kept(record, home, content, down[home])
        self._late |= {message: (homes, self.exchange, orders) for message, homes in waiting.items()}
        vain = {home: IN_VAIN + known.get(home, "") for homes in waiting.values() for home in homes}
        for home, missing in again.items():
            vain[home] = f"{IN_VAIN}: {missing.why}" if home in self._pushed else NOT_ASKED
        for home, why in sorted(vain.items()):
            self.journal.count("bytes/down", home, down[home])
            yield home, _kept(record, home, why, down[home])
        record.close()

    def _collect_late(self) -> None:
        """What came after its time is not used, but it was released: what it says of privacy holds."""
        if not self._late:
            return
        for reply in self.grid.pull_messages(list(self._late)):
            homes, exchange, orders = self._late.pop(reply.metadata.reply_to_message_id)
            for home, content in self._contents(reply, homes):
                answer: Any = self._read(content, home, orders[home])
                if not isinstance(answer, str):
                    self._note(home, answer)
                    self.journal.silent.discard((home, exchange))

    def close(self) -> None:
        """After the last exchange."""
        self._collect_late()

    def _digest(self, orders: Mapping[int, Order[R]], asked: Sequence[int]) -> str:
        digest = hashlib.sha256()
        for home in asked:
            digest.update(unpacked(self._packed(orders, home))[0])
        return digest.hexdigest()

    def _packed(self, orders: Mapping[int, Order[R]], home: int) -> RecordDict:
        where = Envelope(self.run, self.cell.arm, self.cell.seed, self.exchange, home, self._stack(home))
        return pack_order(orders[home], where)

    def _send(
        self,
        orders: Mapping[int, Order[R]],
        homes: Iterable[int],
        down: dict[int, int] | None = None,
        digest: Any = None,
        again: dict[int, _Again] | None = None,
    ) -> dict[str, tuple[int, ...]]:
        """Sends the orders of these homes, those of one node together: a message costs more than training a very small
        model. Which homes each message is for, by its id; into `down` the size of each order, into `digest` all, into
        `again` sites that are not connected now, and when to try them."""
        sent: dict[str, tuple[int, ...]] = {}
        if self.sites:
            found = nodes_by_name(self.grid, self.sites)
            self.nodes = {home: node for home, (node, _) in found.items()}
            self._since |= {home: since for home, (_, since) in found.items()}
        ready: dict[int, dict[int, RecordDict]] = {}
        sizes: dict[int, int] = {}
        for home in homes:
            content = self._packed(orders, home)
            size = payload_bytes(content)
            if down is not None:
                down[home] = size
                digest.update(unpacked(content)[0])
            if self.sites and home not in self.nodes:
                if again is not None:
                    again[home] = _Again("it was not connected")
                continue
            node, stack = self.nodes[home], self._stack(home)
            # Never within a stack: who trains together must not depend on who else is on the node.
            if (
                ready.get(node)
                and sizes[node] + size > LARGEST_MESSAGE
                and stack != self._stack(next(reversed(ready[node])))
            ):
                sent |= self._push(orders, node, ready.pop(node))
            ready.setdefault(node, {})[home] = content
            sizes[node] = size + (sizes[node] if len(ready[node]) > 1 else 0)
        for node, contents in ready.items():
            sent |= self._push(orders, node, contents)
        return sent

    def _stack(self, home: int) -> int:
        return home // self.cell.scenario.stack

    def _push(
        self, orders: Mapping[int, Order[R]], node: int, contents: Mapping[int, RecordDict]
    ) -> dict[str, tuple[int, ...]]:
        self._pushed |= set(contents)
        task = orders[next(iter(contents))].task
        message = Message(joined(list(contents.values())), message_type=task, dst_node_id=node)
        [key] = self.grid.push_messages([message])
        return {str(key): tuple(contents)}

    def _contents(self, reply: Message, homes: Sequence[int]) -> Iterable[tuple[int, RecordDict | str]]:
        """Each home's part of a reply, or why there is none."""
        if reply.has_error():
            return [(home, f"its worker failed: {_first_line(reply)}") for home in homes]
        parts = parted(reply.content)
        if len(parts) != len(homes):
            return [(home, f"sent {len(parts)} answers to {len(homes)} orders") for home in homes]
        return zip(homes, parts, strict=True)

    def _replies(
        self, orders: Mapping[int, Order[R]], waiting: dict[str, tuple[int, ...]], again: dict[int, _Again]
    ) -> Iterable[tuple[tuple[int, ...], Message]]:
        """Replies as they come; who is in `again` is asked anew when its time has come."""
        begun = looked = time.monotonic()
        while (waiting or again) and (taken := time.monotonic() - begun) < self.cell.scenario.server.answer_seconds:
            for reply in self.grid.pull_messages(list(waiting)) if waiting else ():
                yield waiting.pop(reply.metadata.reply_to_message_id), reply
            if self.sites and time.monotonic() - looked > ASK_AGAIN_SECONDS:
                again |= self._lost(waiting)
                looked = time.monotonic()
            due = [home for home, missing in again.items() if missing.when <= time.monotonic()]
            for home in due:
                del again[home]
            waiting |= self._send(orders, due, again=again) if due else {}
            if waiting or again:  # looking costs time that workers could use
                time.sleep(min(1.0, max(POLL_SECONDS, taken / 50)))

    def _lost(self, waiting: dict[str, tuple[int, ...]]) -> dict[int, _Again]:
        """Takes out of `waiting` whom nobody works for: a site that connected anew, as after a crash, has forgotten
        what it was asked, and the SuperLink does not say so."""
        now = nodes_by_name(self.grid, self.sites)
        lost = [key for key, (home, *_) in waiting.items() if home in now and now[home][1] != self._since.get(home)]
        return {waiting.pop(key)[0]: _Again("it was started anew", time.monotonic()) for key in lost}

    def _read(self, content: RecordDict | str, home: int, order: Order[R]) -> R | str:
        """The checked answer, or why there is none: one bad client must not end what a quorum allows."""
        if isinstance(content, str):
            return content
        try:
            payload, _, seconds = unpacked(content)
            self.journal.count("bytes/up", home, len(payload))
            if seconds is not None and 0 <= seconds < math.inf:
                self.journal.count("seconds/client", home, seconds)
            answer: Any = unpack_answer(content, order.reply)
            if isinstance(answer, Refused):
                return f"refused: {answer.code.value}"
            check_answer(order, answer, self.labels)
        except (BadPayload, BadValue, Rejected) as problem:
            return f"sent an unusable answer: {problem}"
        return cast(R, answer)

    def _note(self, home: int, answer: object) -> None:
        """What an answer says of privacy, and what kinds of things it let out."""
        statement = getattr(answer, "statement", None)
        if isinstance(statement, Statement):
            self.journal.state(home, statement)
        kinds = {Corpus: "synthetic text with labels", Adapter: "adapters", Scores: "scores"}
        self.journal.released |= {kinds[type(p)] for p in derived(answer)}


def _kept(record: Exchange, home: int, content: RecordDict | str, down: int) -> RecordDict | str:
    """What a home said, written down; what cannot be read becomes words."""
    if not isinstance(content, str):
        try:
            payload, refused, seconds = unpacked(content)
        except BadValue as problem:
            content = f"sent an unusable answer: {problem}"
        else:
            record.add(home, payload, refused=refused, seconds=seconds, down=down)
            return content
    record.add(home, b"", why=content, down=down)
    return content


@dataclass(frozen=True)
class ServerSide:
    """What a strategy works with on the server.

    Attributes:
        cell: Arm, seed and resolved scenario; `cell.public_seed` gives every public random stream.
        labels: The public label list.
        llm: The server LLM.
        professional: The model that judges and responds, KnowledgeSG's; the LLM where a scenario names no other.
        embed: Texts -> vectors, shape (texts, width); offline the mean of the LLM's hidden states.
        journal: Where the strategy records what it kept and dropped.
        open_clients: Flower's grid -> the clients of this cell.
        measures: Whether clients' models are measured after each round.
    """

    cell: Cell
    labels: tuple[str, ...]
    llm: TextModel
    professional: TextModel
    embed: Callable[[Sequence[str]], NDArray[np.float32]]
    journal: Journal
    open_clients: Callable[[Grid], Clients]
    measures: bool = True

    def new_adapter(self, seed: int) -> Adapter:
        """What training of the clients' model starts from: the server has their base, too.

        Args:
            seed: Public, of the factors A.
        """
        from fedsynth.adapters import new_adapter  # brings torch, which methods without adapters do not need

        client = self.cell.scenario.client
        settings = client.generator_training
        return new_adapter(client.generator, rank=settings.rank, alpha=settings.alpha, seed=seed)


class RoundStrategy(Strategy, Generic[S]):
    """A method: its options (`config_class`), a first state, and one function `round(clients, state) -> state`.

    `start` is Flower's entry point. It is overridden because a round of these methods has several exchanges, which
    Flower's own loop (one training, one evaluation) cannot express.
    """

    config_class: ClassVar[type[Any]]
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    @classmethod
    def check(cls, config: Any, scenario: Scenario) -> None:
        """Whether the method can run a scenario; before any work is spent. Options may have a `check(scenario)`, too.

        Args:
            config: The method's options.
            scenario: Resolved.

        Raises:
            BadValue: If not, with the way out.
        """
        if scenario.data.task not in cls.tasks:
            raise BadValue(f"{cls.__name__} is for data.task = {' or '.join(map(repr, cls.tasks))}, "
                           f"this scenario has {scenario.data.task!r}")  # fmt: skip
        if hasattr(config, "check"):
            config.check(scenario)

    @classmethod
    def spends(cls, config: Any) -> bool:  # noqa: ARG003 - methods look at their options
        """Whether any of the budget is spent under `dp`; what spends nothing is the same at every epsilon."""
        return True

    def __init__(self, config: Any, server: ServerSide) -> None:
        self.config = config
        self.server = server

    @abstractmethod
    def initial(self) -> S:
        """The state before round 1."""

    @abstractmethod
    def round(self, clients: Clients, state: S) -> S:
        """One round: what is asked, what is made of it, what the state is after."""

    def seed(self, purpose: str, home: int = -1) -> int:
        """A public random stream of its own for each purpose, round and home."""
        return self.server.cell.public_seed(purpose, round=self.server.journal.round, client=home)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 1,
        timeout: float = 3600,  # noqa: ARG002 - Flower's signature; the scenario's server.answer_seconds rules
        train_config: ConfigRecord | None = None,  # noqa: ARG002
        evaluate_config: ConfigRecord | None = None,  # noqa: ARG002
        evaluate_fn: Any = None,  # noqa: ARG002
    ) -> Result:
        """Runs all rounds, and measures every client's task model after each."""
        clients, journal = self.server.open_clients(grid), self.server.journal
        result = Result(arrays=initial_arrays or ArrayRecord())
        state = self._resumed(clients, self.initial())
        with event_files(journal.place("tensorboard")) as tell:
            for number in range(journal.checkpoint.round + 1, num_rounds + 1):
                journal.round = number
                state = self.round(clients, state)
                if self.server.measures:
                    result.evaluate_metrics_clientapp[number] = self._record(clients.ask(Evaluate()))
                spent = {} if journal.epsilon is None else {"privacy/epsilon": journal.epsilon}
                tell(number, figures(journal.rows, number) | spent)
                try:
                    journal.checkpoint.save(number, state, {**journal.record(), "exchange": clients.exchange})
                except BadValue as problem:
                    # What clients sent is kept all the same: to go on then means to go through more rounds again.
                    append_event(journal.events, {"event": "warning", "text": f"round {number}: {problem}"})
        clients.close()
        return result

    def _resumed(self, clients: Clients, first: S) -> S:
        """The state to go on from: after the last round that is done, or the first."""
        journal = self.server.journal
        found = journal.checkpoint.load(type(first))
        if found is None:
            journal.checkpoint.save(0, first, {**journal.record(), "exchange": 0})
            return first
        state, record = found
        journal.restore(record)
        clients.exchange = record["exchange"]
        return state

    def _record(self, evaluated: Mapping[int, Evaluated]) -> MetricRecord:
        for home, answer in evaluated.items():
            for metric, value in sorted(answer.metrics.items()):
                self.server.journal.metric(home, metric, value)
        names = sorted({m for a in evaluated.values() for m in a.metrics})
        return MetricRecord({m: sum(a.metrics[m] for a in evaluated.values()) / len(evaluated) for m in names})

    def configure_train(self, *_: Any, **__: Any) -> Iterable[Message]:
        """Unused: `round` drives its own exchanges."""
        return []

    def aggregate_train(self, *_: Any, **__: Any) -> tuple[None, None]:
        """Unused: `round` drives its own exchanges."""
        return None, None

    def configure_evaluate(self, *_: Any, **__: Any) -> Iterable[Message]:
        """Unused: `start` asks for the evaluation."""
        return []

    def aggregate_evaluate(self, *_: Any, **__: Any) -> None:
        """Unused: `start` asks for the evaluation."""

    def summary(self) -> None:
        """Unused: the run directory holds the scenario and the results."""
