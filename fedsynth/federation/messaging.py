"""Clients that can be asked: orders out, checked answers back, exchange by exchange."""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any, TypeVar

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types

from fedsynth.corpus import Corpus, Scores
from fedsynth.federation.availability import Fate, fates
from fedsynth.federation.messages import Code, Envelope, Evaluate, Order, Refused
from fedsynth.federation.nodes import POLL_SECONDS, TooFewReplies, first_line, nodes_by_name
from fedsynth.federation.payload import BadPayload, decode
from fedsynth.federation.records import derived, joined, pack_order, parted, payload_bytes, unpacked
from fedsynth.federation.run.checkpoint import Exchange
from fedsynth.federation.run.log import SERVER, RunLog, append_event
from fedsynth.federation.validation import Rejected, check_answer
from fedsynth.lora import Adapter
from fedsynth.privacy.claims import UNITS
from fedsynth.privacy.plan import Statement
from fedsynth.scenario.schema import Cell
from fedsynth.typed import BadValue

R = TypeVar("R")
ASK_AGAIN_SECONDS = 5.0  # a site that cannot be reached
APPROVAL_SECONDS = 30.0  # a site whose answer waits for a person
NOT_ASKED = "was never connected"
WAITS = "its answer waits for approval there"
IN_VAIN = "gave no answer in time"
UNUSABLE = "sent an unusable answer"
LARGEST_MESSAGE = 2**25  # bytes of orders that are joined; cut between stacks
TRIES = 3  # to get an order answered by a client whose worker dies
# What Flower raises while it unpacks what a SuperNode made up; of a connection that is gone it raises others.
UNPACKING = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, RecursionError,
             struct.error, DecodeError)  # fmt: skip


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
    journal: RunLog
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
        for home, heard in said:
            if heard.why is not None:
                reasons[home] = heard.why
                if heard.why != NOT_ASKED:
                    self._miss(home, order)
            else:
                self._note(home, heard.answer)
                if home not in fates:
                    answers[home] = heard.answer
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
        """Records a client whose privacy spending is unknown because its answer is missing."""
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

    def _said(self, orders: Mapping[int, Order[R]], asked: Sequence[int]) -> Iterator[tuple[int, _Heard]]:
        """What each home says, as it comes: from this exchange's record, where a run goes on behind it."""
        self._collect_late()
        record = self.journal.checkpoint.exchange(self.exchange)
        found = record.kept(lambda: self._digest(orders, asked))
        if found is not None:
            late = [home for home, _, facts in found if str(facts.get("why")).startswith(IN_VAIN)]
            # Asked again, what they have stored says what they spent.
            self._late |= {
                message: (homes, self.exchange, orders) for message, homes in self._send(orders, late).items()
            }
            for home, data, facts in found:
                self.journal.count("bytes/down", home, facts["down"])
                yield home, self._counted(home, self._recalled(data, facts, orders[home]))
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
            if self.sites and reply is not None and (why := _why_later(reply)):
                seconds = APPROVAL_SECONDS if why == WAITS else ASK_AGAIN_SECONDS
                again[homes[0]] = _Again(why, time.monotonic() + seconds)
                if known.get(homes[0]) != f": {why}":  # for whoever watches: somebody is to act there
                    append_event(self.journal.events, {"event": "sites", "line": f"{self._name(homes[0])}: {why}"})
                known[homes[0]] = f": {why}"
                continue
            if reply is not None and reply.has_error() and tries[homes[0]] < TRIES:
                # Their worker died. The same orders again, under the same grants: stored answers are sent as they are.
                # In smaller messages, so that a home that kills its worker takes no other with it in the end.
                whole = len({self._stack(home) for home in homes}) > 1
                for _, part in groupby(homes, key=self._stack if whole else int):
                    waiting |= self._send(orders, part, again=again)
                tries |= {home: tries[home] + 1 for home in homes}
                continue
            for home, content in self._contents(reply, homes):
                heard = self._heard(content, orders[home])
                _keep(record, home, heard, down[home])
                self.journal.count("bytes/down", home, down[home])
                yield home, self._counted(home, heard)
        self._late |= {message: (homes, self.exchange, orders) for message, homes in waiting.items()}
        vain = {home: IN_VAIN + known.get(home, "") for homes in waiting.values() for home in homes}
        for home, missing in again.items():
            vain[home] = f"{IN_VAIN}: {missing.why}" if home in self._pushed else NOT_ASKED
        for home, why in sorted(vain.items()):
            heard = _Heard(why=why)
            _keep(record, home, heard, down[home])
            self.journal.count("bytes/down", home, down[home])
            yield home, heard
        record.close()

    def _collect_late(self) -> None:
        """What came after its time is not used, but it was released: what it says of privacy holds."""
        if not self._late:
            return
        for key, reply in self._pulled(list(self._late)):
            homes, exchange, orders = self._late.pop(key)
            for home, content in self._contents(reply, homes):
                heard = self._counted(home, self._heard(content, orders[home]))
                if heard.why is None:
                    self._note(home, heard.answer)
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

    def _contents(self, reply: Message | None, homes: Sequence[int]) -> Iterable[tuple[int, RecordDict | str]]:
        """Each home's part of a reply, or why there is none."""
        if reply is None:
            return [(home, f"{UNUSABLE}: its message cannot be read") for home in homes]
        if reply.has_error():
            # Whatever stands there of a real site, the site wrote it.
            why = f"Flower's error {reply.error.code}" if self.sites else first_line(reply)
            return [(home, f"its worker failed: {why}") for home in homes]
        parts = parted(reply.content)
        if len(parts) != len(homes):
            return [(home, f"sent {len(parts)} answers to {len(homes)} orders") for home in homes]
        return zip(homes, parts, strict=True)

    def _pulled(self, keys: Sequence[str]) -> Iterator[tuple[str, Message | None]]:
        """Replies to messages that are there now; None for one that cannot even be unpacked.

        Those of sites are asked for one by one: Flower unpacks all that it is asked for together, and hands out none
        if one cannot be. And which message a reply is to is what was asked for, not what a site writes into it.
        """
        if not self.sites:
            for reply in self.grid.pull_messages(keys):
                yield reply.metadata.reply_to_message_id, reply
            return
        for key in keys:
            try:
                replies = list(self.grid.pull_messages([key]))
            except UNPACKING:
                yield key, None
            else:
                yield from ((key, reply) for reply in replies[:1])

    def _replies(
        self, orders: Mapping[int, Order[R]], waiting: dict[str, tuple[int, ...]], again: dict[int, _Again]
    ) -> Iterable[tuple[tuple[int, ...], Message | None]]:
        """Replies as they come, None for one that cannot be unpacked; who is in `again` is asked anew when its time has
        come."""
        begun = looked = time.monotonic()
        while (waiting or again) and (taken := time.monotonic() - begun) < self.cell.scenario.server.answer_seconds:
            for key, reply in self._pulled(list(waiting)) if waiting else ():
                yield waiting.pop(key), reply
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

    def _heard(self, content: RecordDict | str, order: Order[Any]) -> _Heard:
        """The checked answer, or why there is none: one bad client must not end what a quorum allows."""
        if isinstance(content, str):
            return _Heard(why=content)
        try:
            payload, refused, seconds = unpacked(content)
        except BadValue as problem:
            return _Heard(why=f"{UNUSABLE}: {problem}")
        # A site sends no seconds (`pack_answer`): what one makes up is not added to others'.
        return self._checked(payload, refused, None if self.sites else seconds, order)

    def _recalled(self, data: bytes, facts: Mapping[str, Any], order: Order[Any]) -> _Heard:
        """What was kept of a home."""
        seconds = None if self.sites else facts.get("seconds")
        if "why" in facts:
            return _Heard(why=facts["why"], size=facts.get("up", 0), seconds=seconds)
        return self._checked(data, facts["refused"], seconds, order)

    def _checked(self, payload: bytes, refused: bool, seconds: float | None, order: Order[Any]) -> _Heard:
        heard, scenario = _Heard(None, None, payload, refused, len(payload), seconds), self.cell.scenario
        try:
            answer: Any = decode(payload, Refused if refused else order.reply)
            if isinstance(answer, Refused):
                return replace(heard, why=f"refused: {answer.code.value}")
            # Real sites all say in the same words what they protect, in whatever column they have it.
            units, simulated = (UNITS, False) if self.sites else ((scenario.data.unit_name,), None)
            batch = scenario.client.generator_training.expected_batch
            check_answer(order, answer, self.labels, units=units, simulated=simulated, batch=batch)
        except (BadPayload, Rejected) as problem:
            return replace(heard, why=f"{UNUSABLE}: {problem}", payload=b"")
        except Exception as problem:  # as in `decode`: what a check meets in an answer is that client's failure alone
            return replace(heard, why=f"{UNUSABLE}: it cannot be checked ({type(problem).__name__})", payload=b"")
        return replace(heard, answer=answer)

    def _counted(self, home: int, heard: _Heard) -> _Heard:
        if heard.size:
            self.journal.count("bytes/up", home, heard.size)
        if heard.seconds is not None and 0 <= heard.seconds < math.inf:
            self.journal.count("seconds/client", home, heard.seconds)
        return heard

    def _note(self, home: int, answer: object) -> None:
        """What an answer says of privacy, and what kinds of things it let out."""
        statement = getattr(answer, "statement", None)
        if isinstance(statement, Statement):
            self.journal.state(home, statement)
        kinds = {Corpus: "synthetic text with labels", Adapter: "adapters", Scores: "scores"}
        self.journal.released |= {kinds[type(p)] for p in derived(answer)}


@dataclass(frozen=True)
class _Heard:
    """What came of a home: its checked answer, or why there is none.

    Attributes:
        answer: Of the order's class.
        why: The end of a sentence about the home; None beside an answer.
        payload: The bytes, if they are worth keeping: of an answer, or of a refusal.
        refused: Whether they are a refusal.
        size: Of what came.
        seconds: As `unpacked` says.
    """

    answer: Any = None
    why: str | None = None
    payload: bytes = b""
    refused: bool = False
    size: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class _Again:
    """Why a site is asked once more, and when."""

    why: str
    when: float = field(default_factory=lambda: time.monotonic() + ASK_AGAIN_SECONDS)


def _why_later(reply: Message) -> str | None:
    """Why a site is to be asked once more; None if what it says is an answer."""
    if reply.has_error():
        gone = reply.error.code in (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)
        return "it could not be reached" if gone else None
    try:
        payload, refused, _ = unpacked(reply.content)
        waits = refused and decode(payload, Refused).code is Code.AWAITS_APPROVAL
    except BadValue:
        return None
    return WAITS if waits else None


def _keep(record: Exchange, home: int, heard: _Heard, down: int) -> None:
    """Writes down what a home said: its bytes if they can be read, else why not. What was read now will be read again
    by whoever goes on."""
    if heard.payload:
        record.add(home, heard.payload, refused=heard.refused, seconds=heard.seconds, down=down)
    else:
        record.add(home, b"", why=heard.why, up=heard.size, seconds=heard.seconds, down=down)
