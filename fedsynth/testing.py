"""For the test of a strategy: an LLM and clients that answer as the test says, and rounds played with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from fedsynth.corpus import Corpus, Scores, Votes
from fedsynth.federation.messages import (
    OUTPUTS,
    Adopt,
    Adopted,
    Envelope,
    Evaluate,
    Evaluated,
    Finetune,
    Finetuned,
    Learn,
    Learnt,
    Request,
    Score,
    Scored,
    Synthesize,
    Synthesized,
    Vote,
    Voted,
)
from fedsynth.federation.messaging import Clients
from fedsynth.federation.nodes import TooFewReplies
from fedsynth.federation.payload import decode
from fedsynth.federation.records import derived, pack_request, seal, unpack_request
from fedsynth.federation.run.checkpoint import storable
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.strategy import RoundStrategy, ServerSide
from fedsynth.federation.summing import Numbers, added, capped
from fedsynth.federation.validation import check_reply, check_request
from fedsynth.lora import Adapter
from fedsynth.models.chat import Chat, Prompt
from fedsynth.models.llm import TextModel
from fedsynth.models.sampling import SamplingParams
from fedsynth.privacy.plan import Budget, DPPlan, Mechanism
from fedsynth.privacy.statement import Statement, statement
from fedsynth.scenario.client import Client
from fedsynth.scenario.data import Data
from fedsynth.scenario.schema import Cell, Scenario, StrategyChoice
from fedsynth.scenario.server import Server
from fedsynth.typed import build

R = TypeVar("R")
S = TypeVar("S")
RECORDS = 100  # declared by each client


@dataclass
class ScriptedLLM:
    """An LLM whose answers and scores the test writes; it keeps what it was asked.

    Attributes:
        answer: Completes a prompt: a text, or a `Chat`.
        likelihood: Scores a continuation of a prompt, in nats per token.
        completed: The prompts of each call.
        scored: Number of pairs in each call.
        context: Characters that fit, new tokens counted as one each; None for any number.
        settings: Sampling and seed of each call.
        chats: True if it answers a `Chat`.
        structured: True if its answer to a `Chat` holds to the chat's schema.
    """

    answer: Callable[[Any], str] = lambda _: " a text"
    likelihood: Callable[[str, str], float] = lambda *_: 0.0
    completed: list[list[Any]] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    context: int | None = None
    settings: list[tuple[SamplingParams, int]] = field(default_factory=list)
    chats: bool = False
    structured: bool = False

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int) -> list[str]:
        """The script's answer to each prompt.

        Raises:
            ValueError: For a prompt that does not fit, or a `Chat` where it does not chat: a real LLM fails, too.
        """
        if any(self.misfits(prompts, sampling.max_new_tokens)):
            raise ValueError(f"a prompt and its new tokens do not fit into context = {self.context} characters")
        if not self.chats and any(isinstance(prompt, Chat) for prompt in prompts):
            raise ValueError("this LLM does not chat: say chats=True, or send it texts")
        self.completed.append(list(prompts))
        self.settings.append((sampling, seed))
        return [self.answer(prompt) for prompt in prompts]

    def score(self, prompts: Sequence[Any], continuations: Sequence[str]) -> list[float]:
        """The script's score of each continuation.

        Raises:
            ValueError: For a prompt that does not fit.
        """
        if any(self.misfits(prompts, 0, continuations)):
            raise ValueError(f"a prompt and its continuation do not fit into context = {self.context} characters")
        self.scored.append(len(prompts))
        return [self.likelihood(p, c) for p, c in zip(prompts, continuations, strict=True)]

    def misfits(
        self, prompts: Sequence[Prompt], more: int = 0, continuations: Sequence[str] | None = None
    ) -> list[str | None]:
        """Per prompt, "too long" if it has no room with what follows."""
        read = [p.system + p.user if isinstance(p, Chat) else p for p in prompts]
        texts = [p + c for p, c in zip(read, continuations or [""] * len(prompts), strict=True)]
        return ["too long" if self.context and len(text) + more > self.context else None for text in texts]


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of texts by their length and letters, shape (texts, 2): alike for like texts, and no model behind."""
    return np.array([[len(text), sum(map(ord, text)) % 97] for text in texts], np.float32)


@dataclass
class ScriptedClients:
    """Clients that answer as the test says: no text, no model, no network.

    Requests and answers pass the checks of the wire. So a round fails here, as in a run, if it sends private text or a
    value that clients refuse; and so does an answer that no client could give.

    Attributes:
        answers: By class of request what each client answers, or a function of (client, request) that gives it. Of
            `Synthesize` a `Corpus`; of `Score` and `Vote` as many numbers as the request has texts, or `Scores` and
            `Votes`; of `Finetune` an `Adapter`; of `Evaluate` figures by name; of any request, a whole reply. `Learn`
            and `Adopt` need no answer.
        ids: The clients.
        labels: The public label list; `play` sets it.
        away: Clients that never answer.
        asked: Each request so far, with its client.
    """

    answers: Mapping[type[Request[Any]], Any] = field(default_factory=dict)
    ids: Sequence[int] = (0, 1)
    labels: Sequence[str] = ()
    away: Collection[int] = ()
    asked: list[tuple[int, Request[Any]]] = field(default_factory=list)

    def ask(self, request: Request[R]) -> dict[int, R]:
        """As `Clients.ask`."""
        return self.ask_each(dict.fromkeys(self.ids, request))

    def ask_each(self, requests: Mapping[int, Request[R]], *, needed: int | None = None) -> dict[int, R]:
        """As `Clients.ask_each`; by default one answer is enough.

        Raises:
            TooFewReplies: If fewer clients than that answer.
            fedsynth.federation.records.WillNotLeave: If a request holds private text, or an answer what may not leave.
            fedsynth.federation.validation.Rejected: If a client would refuse the request, or a server the answer.
        """
        replies = {client: self._reply(client, request) for client, request in sorted(requests.items())}
        found = {client: reply for client, reply in replies.items() if client not in self.away}
        if len(found) < (least := max(1, needed or 1)):
            raise TooFewReplies(f"{len(found)} of {len(requests)} clients answered, {least} needed")
        return found

    def summed(self, request: Vote | Score, ids: Sequence[int], *, cap: bool = False) -> Numbers:
        """As `Clients.summed`, in the open."""
        asked: dict[int, Request[Any]] = dict.fromkeys(ids, request)
        told = [reply.numbers for reply in self.ask_each(asked).values()]
        return added(capped(told) if cap else told)

    def requests(self, kind: type[Request[R]]) -> dict[int, Any]:
        """By client the last request of a class that it got."""
        return {client: request for client, request in self.asked if isinstance(request, kind)}

    def _reply(self, client: int, request: Request[R]) -> R:
        if client not in self.ids:
            raise ValueError(f"there is no client {client}: this test has {list(self.ids)}")
        packed = pack_request(request, Envelope("test", "test", 0, len(self.asked), client))
        arrived, *_ = unpack_request(packed, type(request))
        check_request(arrived, self.labels)
        self.asked.append((client, request))
        reply = _whole(arrived, self._answer(client, arrived), client)
        waived = not all(part.grants for part in derived(reply))
        told: R = decode(seal(reply, allowed=OUTPUTS, waived=waived), request.reply)
        check_reply(request, told, self.labels)
        return told

    def _answer(self, client: int, request: Request[Any]) -> Any:
        if isinstance(request, Learn | Adopt):
            return None
        if type(request) not in self.answers:
            known = ", ".join(kind.__name__ for kind in self.answers) or "none"
            raise ValueError(f"clients are asked to {type(request).__name__}, and the test has answers of {known}")
        answer = self.answers[type(request)]
        return answer(client, request) if callable(answer) else answer


@dataclass(frozen=True)
class Played(Generic[S]):
    """What rounds have left.

    Attributes:
        states: The state after each round.
        log: Metrics as in a run (`rows`), in memory; see `metric` and `corpora`.
    """

    states: Sequence[S]
    log: Notes

    @property
    def state(self) -> S:
        """After the last round."""
        return self.states[-1]

    @property
    def corpora(self) -> Mapping[tuple[int, str], Corpus]:
        """By client and kind, the last corpus that the strategy logged; client -1 is the server."""
        return self.log.corpora

    @property
    def adapters(self) -> Mapping[tuple[int, str], Adapter]:
        """By client and kind, the last adapter that the strategy logged."""
        return self.log.adapters

    def metric(self, name: str) -> dict[int, float]:
        """By client a metric's last value; client -1 is the server."""
        return {client: value for _, _, _, client, metric, value in self.log.rows if metric == name}


@dataclass
class Notes(RunLog):
    """The log of a cell that writes no file.

    Attributes:
        corpora: By client and kind.
        adapters: By client and kind.
    """

    corpora: dict[tuple[int, str], Corpus] = field(default_factory=dict)
    adapters: dict[tuple[int, str], Adapter] = field(default_factory=dict)

    def log_corpus(self, client: int, kind: str, corpus: Corpus, **_: str) -> None:
        """Keeps the corpus."""
        self.corpora[client, kind] = corpus

    def log_adapter(self, client: int, adapter: Adapter, kind: str = "client", *, base: str | None = None) -> None:  # noqa: ARG002 - the signature of a run's log
        """Keeps the adapter."""
        self.adapters[client, kind] = adapter

    def progress(self, phase: str, done: int, total: int) -> None:
        """Nobody watches."""


def play(
    strategy: type[RoundStrategy[S]],
    clients: ScriptedClients,
    *,
    labels: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    llm: TextModel | None = None,
    professional: TextModel | None = None,
    rounds: int = 1,
    seed: int = 0,
    scenario: Scenario | None = None,
) -> Played[S]:
    """Plays rounds of a strategy as a run would that is killed and resumed after each.

    Each round is played by a new object of the class, from a state that was stored and read again. So a strategy that
    keeps something in `self`, or has a state that cannot be stored, fails here.

    Args:
        strategy: The class.
        clients: Answer its requests.
        labels: The public label list; none: the task is to follow instructions.
        options: Fields of the strategy's `config_class`, as under `[strategy]` in a scenario.
        llm: The server LLM; a `ScriptedLLM` by default.
        professional: KnowledgeSG's second model; the LLM by default.
        rounds: Number of rounds.
        seed: The cell's public seed.
        scenario: For a strategy that reads it; a small one by default.

    Raises:
        fedsynth.typed.BadValue: If options do not fit, the strategy refuses the scenario, or a state cannot be stored.
    """
    clients.labels = labels
    options = dict(options or {})
    config = build(strategy.config_class, options, "strategy")
    named = StrategyChoice(f"{strategy.__module__}:{strategy.__qualname__}", options)
    scenario = scenario or _small(named, labels, len(clients.ids), rounds)
    strategy.check(config, scenario)
    model = llm or cast(TextModel, ScriptedLLM())
    cell = Cell("test", seed, scenario)
    log = Notes(cell, Path(os.devnull), Path(os.devnull))
    asked = cast(Clients, clients)
    server = ServerSide(cell, tuple(labels), model, professional or model, embed, log, lambda _: asked)
    state = strategy(config, server).initial()
    states: list[S] = []
    for number in range(1, rounds + 1):
        log.round = number
        stored = storable(state)
        state = strategy(config, server).round(asked, decode(stored, type(state), trusted=True))
        states.append(state)
    storable(state)
    return Played(states, log)


def _small(strategy: StrategyChoice, labels: Sequence[str], clients: int, rounds: int) -> Scenario:
    """A scenario with the shipped models, of which no row is read."""
    data = Data("test.csv", clients, tuple(labels)) if labels else Data("test.csv", clients, task="instructions")
    models = Client(generator="assets:tiny-slm", task_model="assets:tiny-slm", budget=Budget(epsilon=8.0))
    return Scenario("test", strategy, data, models, Server(llm="assets:tiny-llm"), rounds=rounds)


def _whole(request: Request[Any], answer: Any, client: int) -> Any:
    """The reply that an answer stands for."""
    if isinstance(answer, request.reply):
        return answer
    grants = (f"grant-{client}",)
    if isinstance(request, Learn):
        return Learnt(0 if request.corpus is None else len(request.corpus))
    if isinstance(request, Adopt):
        return Adopted(sum(array.size for array in request.adapter.arrays.values()))
    if isinstance(request, Synthesize) and isinstance(answer, Corpus):
        return Synthesized(answer, _said(bool(answer.grants)), 0)
    if isinstance(request, Finetune) and isinstance(answer, Adapter):
        return Finetuned(answer, _said(bool(answer.grants)), RECORDS)
    if isinstance(request, Score) and answer is not None:
        scores = answer if isinstance(answer, Scores) else Scores(tuple(map(float, answer)), grants)
        return Scored(scores, _said(bool(scores.grants)))
    if isinstance(request, Vote) and answer is not None:
        votes = answer if isinstance(answer, Votes) else Votes(tuple(map(float, answer)), grants)
        return Voted(votes, _said(bool(votes.grants), "votes"))
    if isinstance(request, Evaluate) and isinstance(answer, Mapping):
        return Evaluated(answer, RECORDS)
    parts = ", ".join(part.name for part in fields(request.reply))
    raise ValueError(
        f"{type(answer).__name__} is no answer to {type(request).__name__}: give a {request.reply.__name__}({parts})"
    )


@cache
def _said(granted: bool, mechanism: Mechanism = "gradients") -> Statement:
    """A privacy statement that a client could make: its epsilon is that of its plan."""
    batch, steps = (RECORDS, 1) if mechanism == "votes" else (10, 20)
    plan = DPPlan(
        records=RECORDS,
        expected_batch=batch,
        steps=steps,
        rounds=1,
        clip_norm=1.0,
        noise_multiplier=4.0,
        delta=1e-5,
        mechanism=mechanism,
    )
    return statement(plan if granted else None, unit="person")
