"""A rehearsal of a strategy's rounds: real requests to clients that reply with dummies and note the work.

Requests are made and packed as in a run, replies are dummies of the right kind and size, and the server's models do a
timed sample of their work. So no method, not even a user's own, needs a table of its costs.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedsynth.corpus import Corpus, Provenance, Scores, Votes
from fedsynth.data.partition import label_list
from fedsynth.federation.availability import Fate
from fedsynth.federation.messages import (
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
    SelfTrain,
    SelfTrained,
    Synthesize,
    Synthesized,
    Vote,
    Voted,
    measured,
)
from fedsynth.federation.payload import encode
from fedsynth.federation.records import pack_request, payload_bytes
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.privacy_report import guarantee_of
from fedsynth.federation.strategy import Clients, ServerSide, load_strategy
from fedsynth.federation.summing import added
from fedsynth.forecast.estimating import SampledEngine, Tally, kept_words, server_models, varied, vocabulary
from fedsynth.forecast.profiling import busy, dummy_site
from fedsynth.forecast.work import WORK, Facts, Work, facts_of
from fedsynth.lora import Adapter, only_b
from fedsynth.models.devices import one_thread
from fedsynth.models.encoding import text_rows
from fedsynth.models.loading import load_tokenizer
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.statement import Statement, statement
from fedsynth.scenario.schema import Cell

GRANT = ("0" * 32,)  # as long as a grant's id
ENOUGH = 10.0  # seconds of a rehearsal; further rounds are then assumed to cost as much as the last whole one


class Unforeseen(Exception):
    """A request of an unknown class; the message names it."""


class _Enough(Exception):
    """The rehearsal stops: further rounds would cost as much as those before."""


@dataclass(frozen=True)
class Exchange:
    """Requests that go out together.

    Attributes:
        number: Number of the round.
        name: Name of the request.
        work: Units of work by client.
        down: Bytes of the requests.
        up: Bytes of the replies.
    """

    number: int
    name: str
    work: Mapping[int, Work]
    down: int
    up: int


@dataclass
class _Answering(Clients):
    """Clients that reply with dummies and note the work of a real reply."""

    facts: Mapping[int, Facts] = field(default_factory=dict)
    lengths: Sequence[int] = ()
    exchanges: list[Exchange] = field(default_factory=list)
    plans: dict[int, dict[DPPlan, int]] = field(default_factory=dict)
    trained: set[Any] = field(default_factory=set)
    begun: float = field(default_factory=busy)
    spent: float = 0.0

    def summed(self, request: Any, ids: Sequence[int], *, cap: bool = False) -> Any:  # noqa: ARG002 - of `Clients`
        """Dummy sums. A secure sum's four small exchanges are left out: they take no model, and few bytes."""
        return added([reply.numbers for reply in self.ask_each(dict.fromkeys(ids, request)).values()])

    def ask_each(
        self,
        requests: Mapping[int, Request[Any]],
        *,
        needed: int | None = None,  # noqa: ARG002 - nobody is missing here
    ) -> dict[int, Any]:
        """Dummy replies by client.

        Raises:
            Unforeseen: If the request's class is unknown.
        """
        started = busy()
        if self.run_log.round > 2 and started - self.begun > ENOUGH:
            raise _Enough
        self.exchange += 1
        name = next(iter(requests.values())).task.rpartition(".")[2]
        replies: dict[int, Any] = {}
        work: dict[int, Work] = {}
        down = up = 0
        scored = {client for e in self.exchanges if e.name == "score" for client in e.work}
        fates = self._fates(requests)
        for client, request in sorted(requests.items()):
            if fates.get(client) is Fate.ABSENT:
                continue
            if type(request) not in WORK:
                raise Unforeseen(f"what clients do for the request {type(request).__name__} is not known here")
            envelope = Envelope(self.run, self.cell.arm, self.cell.seed, self.exchange, client, self._stack(client))
            size = payload_bytes(pack_request(request, envelope))
            self.run_log.count("bytes/down", client, size)
            down += size
            done = self._work(request, client)
            work[client] = {u: n for u, n in done.items() if not (u.kind == "scorer_step" and client in scored)}
            replies[client] = self._reply(request, client)
            size = len(encode(replies[client]))
            self.run_log.count("bytes/up", client, size)
            up += size
            self._note(client, replies[client])
        self.exchanges.append(Exchange(self.run_log.round, name, work, down, up))
        self.spent += busy() - started
        return {client: reply for client, reply in replies.items() if client not in fates}

    def _work(self, request: Request[Any], client: int) -> Work:
        """The work of a request; none for drafts that another arm of the simulation has asked for."""
        of = self.facts[client]
        if isinstance(request, Synthesize) and of.client.guarantee == "dp" and self.cell.scenario.stack == 1:
            own = (of.client.generator, of.client.generator_training, of.client.budget, of.records)
            asked = (self.cell.seed, client, own, replace(request, start=None), request.start is not None)
            if asked in self.trained:
                return {}
            self.trained.add(asked)
        return WORK[type(request)](request, of)

    def _reply(self, request: Request[Any], client: int) -> Any:
        of, rng = self.facts[client], np.random.default_rng([0, client, self.exchange])
        if isinstance(request, Synthesize):
            grants = GRANT if of.client.guarantee == "dp" else ()
            corpus = replace(self._drafts(client, request.per_label, request.max_new_tokens), grants=grants)
            return Synthesized(corpus, self._statement(client), 0)
        if isinstance(request, Finetune):
            adapter = _trained_from(request.start, rng, GRANT if of.client.guarantee == "dp" else ())
            if request.frozen_a:
                adapter = replace(adapter, arrays={n: a for n, a in adapter.arrays.items() if only_b(n)})
            return Finetuned(adapter, self._statement(client), of.records)
        if isinstance(request, SelfTrain):
            funnel = {"asked": request.candidates, "too short": 0, "kept": request.keep}
            return SelfTrained(_trained_from(request.start, rng, ()), self._statement(client), of.records, funnel)
        if isinstance(request, Score):
            grants = GRANT if of.client.guarantee == "dp" else ()
            return Scored(
                Scores(tuple(rng.random(len(request.corpus)).tolist()), grants), self._statement(client, Score)
            )
        if isinstance(request, Vote):
            grants = GRANT if of.client.guarantee == "dp" else ()
            return Voted(Votes(tuple(rng.random(len(request.corpus)).tolist()), grants), self._statement(client, Vote))
        if isinstance(request, Adopt):
            return Adopted(sum(array.size for array in request.adapter.arrays.values()))
        if isinstance(request, Learn):
            return Learnt(len(request.corpus or ()))
        assert isinstance(request, Evaluate)
        names = measured(request, instructs=not of.labels, chooses=of.choices > 0)
        return Evaluated(dict.fromkeys(names, 1 / 3), of.test)

    def _drafts(self, client: int, per_label: int, longest: int) -> Corpus:
        """Drafts, equally many of each label and within the length; varied texts if a client has few of a label."""
        of, rng = self.facts[client], np.random.default_rng([1, client])
        lengths = [min(length, longest) for length in self.lengths]
        like = dummy_site(self.cell, client, lengths, train=per_label * len(of.labels), test=1).train
        words, texts = vocabulary(like.prompts[:200]), list[str]()
        for label in of.labels:
            own = [x for x, y in zip(like.prompts, like.answers, strict=True) if y == label] or list(like.prompts[:1])
            texts += own[:per_label]
            more = range(per_label - len(own))
            texts += [varied(own[k % len(own)], words, kept_words(of.labels), rng) for k in more]
        labels = tuple(label for label in of.labels for _ in range(per_label))
        return Corpus(tuple(_no_longer(of.client.generator, texts, longest)), labels, Provenance.PUBLIC)

    def _statement(self, client: int, kind: type[Request[Any]] = Synthesize) -> Statement:
        """As `ClientSide.statement`: for all planned rounds, or more if the strategy asks for more."""
        of, rounds = self.facts[client], self.cell.scenario.rounds
        if of.client.guarantee == "none":
            return statement_of(None, self.cell.scenario.data.unit_name, 1)
        scores, votes = kind is Score, kind is Vote
        plan = of.client.score_plan if scores else of.client.vote_plan if votes else of.client.plan
        planned = plan(of.records, rounds)
        drawn = self.plans.setdefault(client, {})
        once = scores and of.client.scores == "model"
        drawn[planned] = 1 if once else drawn.get(planned, 0) + 1
        charged = replace(planned, rounds=max(planned.rounds, drawn[planned]))
        if charged.mechanism in ("scores", "summed_scores"):
            return statement_of(charged, "client", 1, of.client.secure_sum)
        unit = self.cell.scenario.data.unit_name
        training = of.client.scorer_training if scores else of.client.generator_training
        settings = of.client.voting if votes else training
        cohort = of.client.secure_sum if votes else None
        return statement_of(charged, unit, settings.rows_per_unit, cohort)


def _no_longer(model: str, texts: Sequence[str], longest: int) -> list[str]:
    """The texts, cut to what a generator can write: other words may be more tokens than those they replace."""
    tokenizer = load_tokenizer(model)
    rows = text_rows(tokenizer, texts)
    return [
        text if len(row) <= longest else str(tokenizer.decode(row[:longest])).strip()
        for text, row in zip(texts, rows, strict=True)
    ]


@lru_cache(maxsize=4096)
def statement_of(planned: DPPlan | None, unit: str, rows_per_unit: int, cohort: Cohort | None = None) -> Statement:
    """The statement of a plan, as a simulated client makes it."""
    return statement(planned, unit=unit, rows_per_unit=rows_per_unit, rows=(), simulated=True, cohort=cohort)


def _trained_from(start: Adapter, rng: np.random.Generator, grants: tuple[str, ...]) -> Adapter:
    """An adapter as large as a trained one, and different from its start."""
    arrays = {n: (a + 0.01 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in start.arrays.items()}
    return replace(start, arrays=arrays, grants=grants, public=False)


# ---- One cell --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rehearsed:
    """The rehearsed costs of a cell.

    Attributes:
        exchanges: The exchanges of all rounds.
        server: Seconds of the server's own work, on cores that nobody else uses.
        read: Tokens that language models at the server read.
        written: Tokens that they write.
        up: Bytes from clients.
        down: Bytes to clients.
        kept: Bytes in the run's directory.
        guarantee: `dp` or `none`.
        epsilon: The largest over clients; None without a guarantee.
        delta: Likewise.
        plans: By client, the charged plans, each with its number of rounds.
        noted: Lines for the user: rounds that were not rehearsed, requests with unknown costs.
        failed: The error at which the run would end, with its type, file and line; None without one.
    """

    exchanges: tuple[Exchange, ...]
    server: float
    read: int
    written: int
    up: int
    down: int
    kept: int
    guarantee: str
    epsilon: float | None
    delta: float | None
    plans: Mapping[int, Mapping[DPPlan, int]]
    noted: tuple[str, ...]
    failed: str | None = None


def rehearse(cell: Cell, folder: Path, lengths: Sequence[int], known: dict[Any, Any]) -> Rehearsed:
    """Rehearses all rounds of a cell on dummy text; nothing is charged.

    Args:
        cell: Arm, seed and resolved scenario.
        folder: Takes the files that a run would write; new or empty.
        lengths: Deciles of dummy text (`profiling.typical_lengths`).
        known: Models that this process has loaded, with their measured costs; new ones are added.
    """
    one_thread()  # as a server app is started
    labels = label_list(cell.scenario.data)
    run_log = RunLog(cell, folder, folder / "events.jsonl")
    answered = known.setdefault("answered", set())
    tally = Tally(kept_words(labels), known=known.setdefault("asked", {}), answered=answered)
    folder.mkdir(parents=True, exist_ok=True)
    facts = facts_of(cell, labels)
    nodes = {client: client for client in facts}
    clients = _Answering(None, nodes, cell, "simulated", labels, run_log, facts=facts, lengths=lengths)  # type: ignore[arg-type]  # no grid is asked
    clients.trained = known.setdefault("trained", set())
    noted: list[str] = []
    failed: str | None = None

    kind, config = load_strategy(cell.scenario.strategy)
    clients.begun = begun = busy()
    llm, professional, embed = server_models(cell, labels, tally, known)
    engine = SampledEngine(cell.scenario.server.hardware, tally=tally)
    server = ServerSide(cell, labels, llm, professional, embed, run_log, lambda _: clients, engine=engine)
    grid: Any = None
    try:
        kind(config, server).start(grid, num_rounds=cell.scenario.rounds)
    except _Enough:
        noted.append(f"rounds {run_log.round} to {cell.scenario.rounds} are taken to be as round {run_log.round - 1}")
    except Unforeseen as problem:
        noted.append(f"{problem}: what comes after it is left out")
    except Exception as problem:  # the strategy or a model raised it, as in the run
        failed = _told(problem, sys.modules[kind.__module__].__file__)
    own = busy() - begun - tally.spent - clients.spent
    whole = _with_missing_rounds(clients.exchanges, run_log.round, cell.scenario.rounds, noted)
    done = max(1, len({e.number for e in clients.exchanges}))
    times = max(1.0, cell.scenario.rounds / done) if len(whole) > len(clients.exchanges) else 1.0
    guarantee = guarantee_of([run_log])
    epsilons = [s.epsilon for s in run_log.spending.values() if s.epsilon is not None]
    return Rehearsed(
        exchanges=tuple(whole),
        server=(max(0.0, own) + tally.seconds) * times,
        read=int(tally.read * times),
        written=int(tally.written * times),
        up=sum(e.up for e in whole),
        down=sum(e.down for e in whole),
        kept=int(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) * times),
        guarantee=guarantee,
        epsilon=None if guarantee == "none" else max(epsilons, default=0.0),
        delta=None if guarantee == "none" else max((s.delta for s in run_log.spending.values()), default=0.0),
        plans=clients.plans,
        noted=tuple(noted),
        failed=failed,
    )


def _told(problem: Exception, method: str | None) -> str:
    """An error's type and words, and the line that raised it: the method's own if it took part."""
    frames = traceback.extract_tb(problem.__traceback__)
    at = next((frame for frame in reversed(frames) if frame.filename == method), frames[-1])
    return f"{type(problem).__name__}: {problem} ({at.filename}, line {at.lineno}, in {at.name})"


def _with_missing_rounds(found: list[Exchange], at: int, rounds: int, noted: list[str]) -> list[Exchange]:
    """Repeats the exchanges of the last whole round for the rounds that were not rehearsed."""
    if not any(line.startswith("rounds ") for line in noted):
        return found
    last = [e for e in found if e.number == at - 1]
    return [e for e in found if e.number < at] + [replace(e, number=n) for n in range(at, rounds + 1) for e in last]
