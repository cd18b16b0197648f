"""Exchanges with the clients of a cell: a request to each, checked replies back until server.timeout."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar, overload

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsynth.corpus import Corpus, Provenance, Scores, Votes
from fedsynth.federation.availability import Fate, fates
from fedsynth.federation.delivery.late_answers import IN_VAIN, LateAnswers
from fedsynth.federation.delivery.sending import UNUSABLE, Delivery
from fedsynth.federation.delivery.site_retry import NOT_ASKED, SiteRetry
from fedsynth.federation.delivery.worker_retry import WorkerRetry
from fedsynth.federation.messages import SIMULATED, Envelope, Evaluate, Refused, Request, Score, Vote
from fedsynth.federation.nodes import POLL_SECONDS, TooFewReplies
from fedsynth.federation.payload import BadPayload, decode
from fedsynth.federation.records import Derived, derived, pack_request, payload_bytes, unpacked
from fedsynth.federation.run.exchange_record import ExchangeRecord, Heard
from fedsynth.federation.run.log import SERVER, RunLog, append_event
from fedsynth.federation.run.times import ASKING, AT_CLIENTS
from fedsynth.federation.summing import added, capped, secure_sum, sum_id
from fedsynth.federation.validation import Rejected, check_reply
from fedsynth.lora import Adapter
from fedsynth.privacy.claims import UNITS
from fedsynth.privacy.statement import Statement
from fedsynth.scenario.schema import Cell
from fedsynth.typed import BadValue

R = TypeVar("R")


@dataclass
class Clients:
    """The clients of one cell.

    Attributes:
        grid: Flower's grid.
        nodes: Client -> node id; empty for real sites.
        cell: Arm, seed and resolved scenario.
        run: Public id of the run.
        labels: The public label list.
        run_log: Takes metrics, progress and the checkpoint of the cell.
        exchange: Number of the latest exchange.
        sites: Names of real sites, by client; each exchange looks up their nodes. Empty in a simulation.
    """

    grid: Grid
    nodes: Mapping[int, int]
    cell: Cell
    run: str
    labels: Sequence[str]
    run_log: RunLog
    exchange: int = 0
    sites: Sequence[str] = ()
    _round: int = 0
    _before: int = 0  # exchanges before the round's first
    _delivery: Delivery = field(init=False)
    _late: LateAnswers = field(init=False)

    def __post_init__(self) -> None:
        self._delivery = Delivery(self.grid, self.nodes, self.sites, self.cell.scenario.stack)
        self._late = LateAnswers(self._delivery)

    @property
    def ids(self) -> Sequence[int]:
        """Numbers of all clients."""
        return range(len(self.sites)) if self.sites else sorted(self.nodes)

    def ask(self, request: Request[R]) -> dict[int, R]:
        """Sends the same request to every client; returns typed replies by client, in order of clients."""
        return self.ask_each(dict.fromkeys(self.ids, request))

    def ask_each(self, requests: Mapping[int, Request[R]], *, needed: int | None = None) -> dict[int, R]:
        """Sends one request per client, all at once; returns typed replies by client, in order of clients.

        Clients that the scenario's `participation` takes away have no reply here. An absent client is not asked. The
        reply of a client that drops out is not used, but its privacy spending counts.

        Args:
            requests: By client.
            needed: The least number of replies; None for the scenario's quorum.

        Raises:
            TooFewReplies: If fewer clients give a usable reply in time.
        """
        if self.run_log.round != self._round:
            self._round, self._before = self.run_log.round, self.exchange
        self.exchange += 1
        request = next(iter(requests.values()))
        name = request.task.rpartition(".")[2]
        fates = self._fates(requests)
        asked = [client for client in sorted(requests) if fates.get(client) is not Fate.ABSENT]
        replies: dict[int, R] = {}
        reasons = {client: fate.value for client, fate in fates.items()}
        if needed is None:  # the tolerance is for shares such as 0.07 of 100, whose product lies above 7
            needed = math.ceil(self.cell.scenario.server.quorum * len(requests) - 1e-9)
        begun = time.monotonic()
        self.run_log.progress(name, 0, len(requests))
        # With the quorum out of reach, asking the others would spend their budget and the run's time in vain.
        said = self._arrived(requests, asked) if len(requests) - len(reasons) >= needed else ()
        for client, heard in said:
            if seconds := _worked(heard):
                self.run_log.count(AT_CLIENTS + name, SERVER, seconds)
            if heard.why is not None:
                reasons[client] = heard.why
                if heard.why != NOT_ASKED:
                    self._miss(client, request)
            else:
                self._note(client, heard.reply)
                if client not in fates:
                    replies[client] = heard.reply
            if len(requests) - len(reasons) < needed:
                break
            self.run_log.progress(name, len(replies), len(requests))
        self.run_log.count(ASKING + name, SERVER, time.monotonic() - begun)
        self._count(name, len(requests), replies, fates, reasons)
        if len(replies) < needed:
            for client in set(asked) - set(replies) - set(reasons):
                self._miss(client, request)
            why = "; ".join(f"{self._name(client)} {reason}" for client, reason in sorted(reasons.items()))
            log = "the site's own log" if self.sites else "the client's own log, in the private directory,"
            raise TooFewReplies(
                f"{name}: {len(replies)} of {len(requests)} clients answered, {needed} needed ({why}); {log} says more"
            )
        return dict(sorted(replies.items()))

    @overload
    def summed(self, request: Vote, ids: Sequence[int], *, cap: bool = False) -> Votes: ...

    @overload
    def summed(self, request: Score, ids: Sequence[int], *, cap: bool = False) -> Scores: ...

    def summed(self, request: Vote | Score, ids: Sequence[int], *, cap: bool = False) -> Votes | Scores:
        """The votes or scores of these clients, added up: by a secure sum, if `client.secure_sum` says so.

        Args:
            request: What each is asked.
            ids: The clients.
            cap: No client's numbers are longer than the median client's (`summing.capped`). Not of a secure sum, of
                which nobody sees a single client's.

        Raises:
            TooFewReplies: As `ask_each`; of a secure sum, if more clients are missing than its cohort allows.
        """
        client = self.cell.scenario.client
        cohort = client.secure_sum
        if cohort is None or client.guarantee == "none":
            asked: dict[int, Request[Any]] = dict.fromkeys(ids, request)
            told = [reply.numbers for reply in self.ask_each(asked).values()]
            return added(capped(told) if cap else told)
        # Arms that ask a simulated client the same thing get the same noise (`unpack_request`); those of sites share an
        # account, in which an id serves once.
        arm = "" if self.run == SIMULATED else self.cell.arm
        return secure_sum(
            self.ask_each, ids, request, cohort, sum_id(self.run, arm, self.cell.seed, self.exchange + 1, [*ids])
        )

    def _name(self, client: int) -> str:
        return f"site {self.sites[client]!r}" if self.sites else f"client {client}"

    def _miss(self, client: int, request: Request[Any]) -> None:
        """Records a client whose privacy spending is unknown because its reply is missing."""
        if any(field.name == "statement" for field in fields(request.reply)):
            self.run_log.silent.add((client, self.exchange))

    def _fates(self, requests: Mapping[int, Request[R]]) -> dict[int, Fate]:
        """The clients that take no part in this exchange; a simulator's own measurement reaches all."""
        if isinstance(next(iter(requests.values())), Evaluate):
            return {}
        return fates(self.cell, self.run_log.round, self.exchange - self._before, sorted(requests))

    def _count(
        self, name: str, asked: int, replies: Mapping[int, R], fates: Mapping[int, Fate], reasons: Mapping[int, str]
    ) -> None:
        """Logs the missing replies as metrics; nothing is logged if all clients replied."""
        if len(replies) == asked:
            return
        place = f"exchange/{self.exchange}-{name}"
        self.run_log.log_metric(SERVER, f"{place}/clients", asked)
        self.run_log.log_metric(SERVER, f"{place}/answered", len(replies))
        for client, fate in fates.items():
            self.run_log.log_metric(client, f"{place}/{fate.name.lower()}", 1)
        for client in sorted(set(reasons) - set(fates)):
            self.run_log.log_metric(client, f"{place}/failed", 1)

    def _arrived(self, requests: Mapping[int, Request[R]], asked: Sequence[int]) -> Iterator[tuple[int, Heard]]:
        """Replies as they come; a resumed run takes them from the exchange's record if that is whole."""
        self._collect_late()
        # Private text as it is stays out of the run's directory, which people share: a resumed run asks for it again.
        discloses = any(request.discloses for request in requests.values())
        record = ExchangeRecord(None) if discloses else self.run_log.checkpoint.exchange(self.exchange)
        found = record.kept(lambda: self._digest(requests, asked))
        for client, heard, down in (
            self._asked(requests, asked, record) if found is None else self._recalled(requests, found)
        ):
            self.run_log.count("bytes/down", client, down)
            yield client, self._counted(client, heard)

    def _recalled(
        self, requests: Mapping[int, Request[R]], found: Sequence[tuple[int, Heard, int]]
    ) -> Iterator[tuple[int, Heard, int]]:
        """Each client's stored reply, checked again, and the size of its request."""
        late = [client for client, heard, _ in found if (heard.why or "").startswith(IN_VAIN)]
        # Asked again, these clients send their stored replies, which say what they spent.
        sent, _ = self._delivery.send(requests, late, partial(self._packed, requests))
        self._late.expect(sent, self.exchange, requests)
        for client, heard, down in found:
            yield client, heard if heard.why is not None else self._checked(heard, requests[client]), down

    def _asked(
        self, requests: Mapping[int, Request[R]], asked: Sequence[int], record: ExchangeRecord
    ) -> Iterator[tuple[int, Heard, int]]:
        """Asks the clients; each reply as it comes, and the size of its request. All are stored."""
        down: dict[int, int] = {}
        digest = hashlib.sha256()
        waiting: dict[str, tuple[int, ...]] = {}
        workers = WorkerRetry(self.cell.scenario.stack)
        sites = SiteRetry(
            self._delivery, lambda line: append_event(self.run_log.events, {"event": "sites", "line": line})
        )

        def first(client: int) -> RecordDict:
            content = self._packed(requests, client)
            down[client] = payload_bytes(content)
            digest.update(unpacked(content)[0])
            return content

        def send(clients: Iterable[int], pack: Callable[[int], RecordDict]) -> None:
            sent, absent = self._delivery.send(requests, clients, pack)
            sites.sent(sent, absent)
            waiting.update(sent)

        again = partial(send, pack=partial(self._packed, requests))
        send(asked, first)
        record.begin(digest.hexdigest())
        for clients, reply in self._replies(waiting, sites, again):
            if sites.postponed(clients[0], reply):
                continue
            if parts := workers.again(reply, clients):
                for part in parts:
                    again(part)
                continue
            for client, content in self._delivery.divided(reply, clients):
                heard = self._heard(content, requests[client])
                record.keep(client, heard, down[client])
                yield client, heard, down[client]
        self._late.expect(waiting, self.exchange, requests)
        vain = sites.in_vain((client for clients in waiting.values() for client in clients), IN_VAIN)
        for client, why in sorted(vain.items()):
            heard = Heard(why=why)
            record.keep(client, heard, down[client])
            yield client, heard, down[client]
        record.close()

    def _replies(
        self, waiting: dict[str, tuple[int, ...]], sites: SiteRetry, again: Callable[[Sequence[int]], None]
    ) -> Iterator[tuple[tuple[int, ...], Message | None]]:
        """Replies as they come, None for one that cannot be unpacked; sites that are due are asked again."""
        begun = time.monotonic()
        while (waiting or sites) and (taken := time.monotonic() - begun) < self.cell.scenario.server.timeout:
            for key, reply in self._delivery.pulled(list(waiting)) if waiting else ():
                yield waiting.pop(key), reply
            sites.look(waiting)
            if due := sites.due():
                again(due)
            if waiting or sites:  # polling takes CPU time from the workers
                time.sleep(min(1.0, max(POLL_SECONDS, taken / 50)))

    def _collect_late(self) -> None:
        """Late replies are not used, but their text was released: their privacy statements count."""
        for client, exchange, request, content in self._late.come():
            heard = self._counted(client, self._heard(content, request))
            if heard.why is None:
                self._note(client, heard.reply)
                self.run_log.silent.discard((client, exchange))

    def close(self) -> None:
        """Collects late replies after the last exchange."""
        self._collect_late()

    def _digest(self, requests: Mapping[int, Request[R]], asked: Sequence[int]) -> str:
        digest = hashlib.sha256()
        for client in asked:
            digest.update(unpacked(self._packed(requests, client))[0])
        return digest.hexdigest()

    def _packed(self, requests: Mapping[int, Request[R]], client: int) -> RecordDict:
        where = Envelope(self.run, self.cell.arm, self.cell.seed, self.exchange, client, self._stack(client))
        return pack_request(requests[client], where)

    def _stack(self, client: int) -> int:
        return client // self.cell.scenario.stack

    def _heard(self, content: RecordDict | str, request: Request[Any]) -> Heard:
        """The checked reply, or the reason why it is missing: one bad client must not end a run that has its quorum."""
        if isinstance(content, str):
            return Heard(why=content)
        try:
            payload, refused, seconds = unpacked(content)
        except BadValue as problem:
            return Heard(why=f"{UNUSABLE}: {problem}")
        # A site sends no seconds (`pack_reply`); made-up ones are ignored.
        heard = Heard(None, None, payload, refused, len(payload), None if self.sites else seconds)
        return self._checked(heard, request)

    def _checked(self, heard: Heard, request: Request[Any]) -> Heard:
        scenario = self.cell.scenario
        try:
            reply: Any = decode(heard.payload, Refused if heard.refused else request.reply)
            if isinstance(reply, Refused):
                return replace(heard, why=f"refused: {reply.code.value}")
            # All real sites name their unit in the same words, whatever their columns are called.
            units, simulated = (UNITS, False) if self.sites else ((scenario.data.unit_name,), None)
            batch = scenario.client.generator_training.expected_batch_size
            chooses = scenario.data.task == "choice"
            check_reply(request, reply, self.labels, units=units, simulated=simulated, batch=batch, chooses=chooses)
        except (BadPayload, Rejected) as problem:
            return replace(heard, why=f"{UNUSABLE}: {problem}", payload=b"")
        except Exception as problem:  # as in `decode`: an error in a check is this client's failure alone
            return replace(heard, why=f"{UNUSABLE}: it cannot be checked ({type(problem).__name__})", payload=b"")
        return replace(heard, reply=reply)

    def _counted(self, client: int, heard: Heard) -> Heard:
        if heard.size:
            self.run_log.count("bytes/up", client, heard.size)
        if seconds := _worked(heard):
            self.run_log.count("seconds/client", client, seconds)
        return heard

    def _note(self, client: int, reply: object) -> None:
        """Logs the privacy statement of a reply and the kinds of its outputs."""
        statement = getattr(reply, "statement", None)
        if isinstance(statement, Statement):
            self.run_log.log_statement(client, statement)
        self.run_log.released |= {_kind(part) for part in derived(reply)}


def _worked(heard: Heard) -> float:
    """The CPU seconds that a client says it took; 0 for none, or for a figure that cannot be."""
    return heard.seconds if heard.seconds is not None and 0 <= heard.seconds < math.inf else 0.0


def _kind(part: Derived) -> str:
    """A report's name for something that left a client."""
    if isinstance(part, Corpus) and part.provenance is Provenance.DISCLOSED:
        return "true private text"
    named = {Corpus: "synthetic text with labels", Adapter: "adapters", Scores: "scores", Votes: "votes"}
    return named[type(part)]
