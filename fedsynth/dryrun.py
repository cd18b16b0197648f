"""A strategy's own rounds against clients that only say what they would do: who is asked what, and how large it is.

Orders are made and packed as in a run, answers are dummies of the right kind and size, and of what a server's models
are asked a sample is done in earnest and timed. So a method needs no table of what it costs, whoever wrote it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsynth import tuning
from fedsynth.adapters import new_adapter, public_adapter
from fedsynth.clients.home import declared_records
from fedsynth.corpus import Corpus, Provenance, Scores
from fedsynth.data import divide, label_list
from fedsynth.embedding import Embedder
from fedsynth.federation import Clients, ServerSide, load_strategy
from fedsynth.llm import LocalLLM
from fedsynth.lora import Adapter, only_b
from fedsynth.models import one_thread
from fedsynth.participation import Fate
from fedsynth.payload import encode
from fedsynth.privacy.plan import DPPlan, Statement, statement
from fedsynth.probe import Unit, busy, dummy_site
from fedsynth.runs import Journal, guarantee_of
from fedsynth.scenario import Cell, Client, Endpoint
from fedsynth.tasks import (
    Adopt,
    Adopted,
    Envelope,
    Evaluate,
    Evaluated,
    Finetune,
    Finetuned,
    Learn,
    Learnt,
    Order,
    Score,
    Scored,
    SelfTrain,
    SelfTrained,
    Synthesize,
    Synthesized,
)
from fedsynth.wire import pack_order, payload_bytes

GRANT = ("0" * 32,)  # as long as a grant's id
WHOLE = (
    2.5  # seconds of work, of all threads, for which a call's sample grows: a whole batch shows what memory it takes
)
ENOUGH = 10.0  # seconds of a dry run after which further rounds are taken to be as the last whole one


class Unforeseen(Exception):
    """An order of a class that is not known here; the message names it."""


class _Enough(Exception):
    """Further rounds would be as those before."""


@dataclass(frozen=True)
class Facts:
    """Of one client, as declared.

    Attributes:
        arm: Whose settings hold.
        client: What it runs.
        labels: The public label list.
        records: Declared number of privacy units.
        train: Its training texts.
        test: Its test texts.
    """

    arm: str
    client: Client
    labels: tuple[str, ...]
    records: int
    train: int
    test: int


# ---- What a client does for each order: the one table ----------------------------------------------------------------

Work = dict[Unit, float]  # how much of each


def _synthesize(order: Synthesize, of: Facts) -> Work:
    sampling = Unit("sample", of.arm, order.max_tokens, temperature=order.temperature, top_p=order.top_p)
    return {**_trained(of), sampling: order.per_label * len(of.labels)}


def _finetune(order: Finetune, of: Facts) -> Work:
    return _trained(of, frozen_a=order.frozen_a)


def _trained(of: Facts, *, frozen_a: bool = False) -> Work:
    steps: Work = {Unit("step", of.arm, frozen_a=frozen_a): of.client.generator_training.steps}
    return {**steps, Unit("plan", of.arm): 1} if of.client.guarantee == "dp" else steps


def _self_train(order: SelfTrain, of: Facts) -> Work:
    steps, step = of.client.generator_training.steps, Unit("own_step", of.arm)
    if order.training == "isolated" and order.share == 1:
        return {step: steps}
    both = 1 + order.keep / of.records  # batches are as much larger
    trainings = {"isolated": 2.0, "mixed": 1 + both, "personal": 2 + both}[order.training]
    written = Unit("demonstrated", of.arm, order.max_tokens, order.shots)
    return {written: 2 * order.candidates, Unit("rate", of.arm): 2 * order.candidates, step: trainings * steps}


def _score(order: Score, of: Facts) -> Work:
    read: Work = {Unit("read", of.arm): len(order.corpus)}
    if of.client.guarantee == "dp" and of.client.scores == "model":  # once for all rounds
        return {**read, Unit("scorer_step", of.arm): of.client.scorer_training.steps}
    return read


def _learn(order: Learn, of: Facts) -> Work:
    received, task = len(order.corpus or ()), of.client.task_training
    if not of.labels:
        return {Unit("own_step", of.arm): of.client.generator_training.steps * (2 if received else 1)}
    if task.trains == "head":  # each text is embedded once; the head is little work
        return {Unit("read", of.arm): received + of.train}
    return {Unit("fit", of.arm): received * task.augmented_epochs + of.train * task.private_epochs}


def _evaluate(order: Evaluate, of: Facts) -> Work:
    loss: Work = {} if order.adapter is None else {Unit("rate", of.arm): of.test}
    if not of.labels:
        return {**loss, Unit("respond", of.arm, of.client.answer_tokens): of.test}
    return loss or {Unit("read", of.arm): of.test}


WORK: dict[type[Order[Any]], Callable[[Any, Facts], Work]] = {
    Synthesize: _synthesize,
    Finetune: _finetune,
    SelfTrain: _self_train,
    Score: _score,
    Learn: _learn,
    Evaluate: _evaluate,
    Adopt: lambda *_: {},
}


@dataclass(frozen=True)
class Exchange:
    """Orders that go out together.

    Attributes:
        number: Of the round.
        name: Of the order.
        work: By home.
        down: Bytes of the orders.
        up: Bytes of the answers.
    """

    number: int
    name: str
    work: Mapping[int, Work]
    down: int
    up: int


@dataclass
class Tally:
    """What the server's models are asked for, and what it takes.

    Attributes:
        labels: Words that stay as they are in texts made up.
        seconds: Of all of it, in a run on cores that nobody else uses.
        spent: Seconds of work that were spent on it here.
        read: Tokens of prompts and of scored texts.
        written: Tokens.
        known: What calls of a kind were found to take, and gave.
    """

    labels: frozenset[str]
    seconds: float = 0.0
    spent: float = 0.0
    read: int = 0
    written: int = 0
    known: dict[Any, tuple[float, list[Any]]] = field(default_factory=dict)

    def add(self, key: Any, count: int, sample: Callable[[int], list[Any]], most: int, *, lanes: int = 1) -> list[Any]:
        """What a sample of `count` things gave; the time of all of them is noted.

        Args:
            key: Calls of one key cost the same for each thing.
            count: Of all.
            sample: Does that many in earnest.
            most: At once; a larger sample would tell no more.
            lanes: Threads that a whole call uses; a small sample uses one.
        """
        if key not in self.known:
            n = min(count, most, 1)
            while True:
                begun = busy()
                found = sample(n)
                took = busy() - begun
                if n >= min(count, most) or took > WHOLE:
                    break
                n = min(count, most, max(4 * n, int(WHOLE * n / max(took, 1e-6))) if n > 1 else 8)
            self.known[key] = (took / n, found)
        each, found = self.known[key]
        self.seconds += each * count / lanes
        return found


@contextmanager
def on_paper(tally: Tally) -> Iterator[None]:
    """Within, models of this process do a sample of what they are asked for, and make up the rest from it.

    Completion, scoring, embedding and tuning are all that a server asks of a model here (`llm`, `embedding`, `tuning`),
    whether a strategy has it from its `ServerSide` or made it itself.
    """
    complete, score, embed, descend = LocalLLM.complete, LocalLLM.score, Embedder.embed, tuning._descend
    rng = np.random.default_rng(0)

    def completed(llm: LocalLLM, prompts: Sequence[str], *, max_tokens: int, **how: Any) -> list[str]:
        lengths = [len(row) for row in llm._tokens(prompts)]
        llm._check_room(lengths, max_tokens, way_out="fewer or shorter demonstrations")
        tally.read += sum(lengths)
        if not prompts:
            return []
        order, lanes = np.argsort(lengths, kind="stable"), _lanes(llm, len(prompts))

        def sample(n: int) -> list[Any]:
            rows = [int(order[i * len(order) // n]) for i in range(n)]
            return list(complete(llm, [prompts[row] for row in rows], max_tokens=max_tokens, **how))

        key = (
            "complete",
            _size(llm.model),
            max_tokens,
            how.get("temperature"),
            int(np.log2(max(1.0, float(np.mean(lengths))))),
        )
        known = tally.add(key, len(prompts), sample, lanes * llm.batch_size, lanes=lanes)
        pool = _vocabulary(known)
        texts = [_varied(known[i % len(known)], pool, tally.labels, rng) for i in range(len(prompts))]
        counts = llm.tokenizer(texts, add_special_tokens=False)["input_ids"]
        tally.written += sum(map(len, counts))
        return texts

    def scored(llm: LocalLLM, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        lengths = [len(row) for row in llm._tokens([p + c for p, c in zip(prompts, continuations, strict=True)])]
        llm._check_room(lengths, 0, way_out="shorter texts")
        tally.read += sum(lengths)
        # Pairs of one text in a row are compared with each other: they are taken, and made up, together.
        groups = [[i for i, _ in rows] for _, rows in groupby(enumerate(continuations), key=lambda item: item[1])]
        if not groups:
            return []
        order, lanes = np.argsort([lengths[g[0]] for g in groups], kind="stable"), _lanes(llm, len(prompts))
        size = len(prompts) / len(groups)

        def sample(n: int) -> list[Any]:
            chosen = [groups[int(order[i * len(order) // n])] for i in range(n)]
            rows = [row for group in chosen for row in group]
            found = iter(score(llm, [prompts[r] for r in rows], [continuations[r] for r in rows]))
            return [[next(found) for _ in group] for group in chosen]

        most = max(1, round(lanes * llm.batch_size / size))
        key = ("score", _size(llm.model), round(size), int(np.log2(max(1.0, float(np.mean(lengths))))))
        known = tally.add(key, len(groups), sample, most, lanes=lanes)
        made = (known[i % len(known)] for i in range(len(groups)))
        return [v[k % len(v)] for group, v in zip(groups, made, strict=True) for k in range(len(group))]

    def embedded(embedder: Embedder, texts: Sequence[str], *, longest: int | None = None) -> NDArray[np.float32]:
        if not texts:
            return embed(embedder, texts, longest=longest)
        most = embedder.batch_size * embedder.workers
        key = ("embed", _size(embedder.body), longest)
        known = tally.add(key, len(texts), lambda n: list(embed(embedder, texts[:n], longest=longest)), most)
        rows = np.stack([known[i % len(known)] for i in range(len(texts))])
        noise = rng.normal(scale=float(np.std(rows)) + 1e-9, size=rows.shape)
        return (rows + noise).astype(np.float32)

    def descended(model: Any, rows: Sequence[int], loss_of: Any, settings: Any, **more: Any) -> float:
        if not rows:
            return float("nan")
        steps = settings.epochs * -(-len(rows) // settings.batch)
        guard = more.get("guard")
        few = replace(settings, epochs=1)

        def sample(n: int) -> list[Any]:
            some = [rows[i % len(rows)] for i in range(n * settings.batch)]
            return [descend(model, some, loss_of, few, **more)] * n

        key = ("tune", _size(model), settings, guard is not None and guard.weight > 0, len(rows) < settings.batch)
        return float(tally.add(key, steps, sample, 16)[0])

    def aside(made_up: Callable[..., Any]) -> Callable[..., Any]:
        """What it takes here is not what the strategy itself takes."""

        def noted(*arguments: Any, **more: Any) -> Any:
            begun = busy()
            try:
                return made_up(*arguments, **more)
            finally:
                tally.spent += busy() - begun

        return noted

    put: Any = setattr  # methods of others, put back below
    try:
        put(LocalLLM, "complete", aside(completed))
        put(LocalLLM, "score", aside(scored))
        put(Embedder, "embed", aside(embedded))
        put(tuning, "_descend", aside(descended))
        yield
    finally:
        put(LocalLLM, "complete", complete)
        put(LocalLLM, "score", score)
        put(Embedder, "embed", embed)
        put(tuning, "_descend", descend)


def _lanes(llm: LocalLLM, count: int) -> int:
    return max(1, min(llm.workers, -(-count // llm.batch_size)))


def _size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


_WORD = re.compile(r"[^\W\d_]{3,}(?!\w*\s*:)")  # no mark such as `answer:`


def _vocabulary(texts: Sequence[str]) -> list[str]:
    return sorted({word for text in texts for word in _WORD.findall(text)}) or ["word"]


def _varied(text: str, pool: Sequence[str], kept: frozenset[str], rng: np.random.Generator) -> str:
    """A text of the same form and about the same length, with half of its words changed: no copy of the first."""

    def other(match: re.Match[str]) -> str:
        word = match.group()
        return word if word in kept or rng.random() < 0.5 else pool[int(rng.integers(len(pool)))]

    return _WORD.sub(other, text)


@dataclass
class _Elsewhere:
    """A model behind an endpoint, which is not asked: it would cost time and money. Its answers are as long as they may
    be, and every parser here finds something in them."""

    labels: Sequence[str]
    tally: Tally

    def complete(self, prompts: Sequence[str], *, max_tokens: int, seed: int, **how: float) -> list[str]:  # noqa: ARG002
        """One line of text, a verdict, a choice, and a block of each label."""
        self.tally.read += sum(map(_roughly, prompts))
        self.tally.written += max_tokens * len(prompts)
        rng = np.random.default_rng(seed)
        found = []
        for _ in prompts:
            line = " ".join(f"word{n}" for n in rng.integers(10_000, size=max(5, max_tokens * 3 // 4)).tolist())
            blocks = "".join(f"-----\nLabel: {label}\nText: {line}\n" for label in self.labels)
            found.append(f"{line}\nThe selected texts are: 1\nVerdict: keep\n{blocks}")
        return found

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """As if a text were likeliest after its own label."""
        self.tally.read += sum(map(_roughly, [*prompts, *continuations]))
        same = groupby(range(len(prompts)), key=lambda i: continuations[i])
        return [-1.0 - place for _, rows in same for place, _ in enumerate(rows)]


def _roughly(text: str) -> int:
    return -(-len(text) // 4)  # characters of a token, of which no tokenizer is known here


@dataclass
class _Answering(Clients):
    """Clients that answer with dummies and note what they would have done."""

    facts: Mapping[int, Facts] = field(default_factory=dict)
    lengths: Sequence[int] = ()
    exchanges: list[Exchange] = field(default_factory=list)
    plans: dict[int, dict[DPPlan, int]] = field(default_factory=dict)
    begun: float = field(default_factory=busy)
    spent: float = 0.0

    def ask_each(self, orders: Mapping[int, Order[Any]]) -> dict[int, Any]:
        """Dummy answers by home.

        Raises:
            Unforeseen: If nothing is known of the order's class.
        """
        started = busy()
        if self.journal.round > 2 and started - self.begun > ENOUGH:
            raise _Enough
        self.exchange += 1
        name = next(iter(orders.values())).task.rpartition(".")[2]
        answers: dict[int, Any] = {}
        work: dict[int, Work] = {}
        down = up = 0
        scored = {home for e in self.exchanges if e.name == "score" for home in e.work}
        fates = self._fates(orders)
        for home, order in sorted(orders.items()):
            if fates.get(home) is Fate.ABSENT:
                continue
            if type(order) not in WORK:
                raise Unforeseen(f"what clients do for the order {type(order).__name__} is not known here")
            envelope = Envelope(self.run, self.cell.arm, self.cell.seed, self.exchange, home, self._stack(home))
            size = payload_bytes(pack_order(order, envelope))
            self.journal.count("bytes/down", home, size)
            down += size
            done = WORK[type(order)](order, self.facts[home])
            work[home] = {u: n for u, n in done.items() if not (u.kind == "scorer_step" and home in scored)}
            answers[home] = self._answer(order, home)
            size = len(encode(answers[home]))
            self.journal.count("bytes/up", home, size)
            up += size
            self._note(home, answers[home])
        self.exchanges.append(Exchange(self.journal.round, name, work, down, up))
        self.spent += busy() - started
        return {home: answer for home, answer in answers.items() if home not in fates}

    def _answer(self, order: Order[Any], home: int) -> Any:
        of, rng = self.facts[home], np.random.default_rng([0, home, self.exchange])
        if isinstance(order, Synthesize):
            grants = GRANT if of.client.guarantee == "dp" else ()
            corpus = replace(self._drafts(home, order.per_label), grants=grants)
            adapter = None
            if order.share_adapter:
                settings = of.client.generator_training
                start = new_adapter(of.client.generator, rank=settings.rank, alpha=settings.alpha, seed=0)
                adapter = _trained_from(start, rng, grants)
            return Synthesized(corpus, self._statement(home), 0, adapter)
        if isinstance(order, Finetune):
            adapter = _trained_from(order.start, rng, GRANT if of.client.guarantee == "dp" else ())
            if order.frozen_a:
                adapter = replace(adapter, arrays={n: a for n, a in adapter.arrays.items() if only_b(n)})
            return Finetuned(adapter, self._statement(home), of.records)
        if isinstance(order, SelfTrain):
            funnel = {"asked": order.candidates, "too short": 0, "kept": order.keep}
            return SelfTrained(_trained_from(order.start, rng, ()), self._statement(home), of.records, funnel)
        if isinstance(order, Score):
            grants = GRANT if of.client.guarantee == "dp" else ()
            return Scored(
                Scores(tuple(rng.random(len(order.corpus)).tolist()), grants), self._statement(home, scores=True)
            )
        if isinstance(order, Adopt):
            return Adopted(sum(array.size for array in order.adapter.arrays.values()))
        if isinstance(order, Learn):
            return Learnt(len(order.corpus or ()))
        figures = ("accuracy", "macro_f1") if of.labels else ("exact_match", "field_match", "rouge_l")
        return Evaluated({**dict.fromkeys(figures, 1 / 3), "loss": 1 / 3}, of.test)

    def _drafts(self, home: int, per_label: int) -> Corpus:
        """As many of each label; where a site has few of one, those with other words."""
        of, rng = self.facts[home], np.random.default_rng([1, home])
        like = dummy_site(self.cell, home, self.lengths, train=per_label * len(of.labels), test=1).train
        words, texts = _vocabulary(like.prompts[:200]), list[str]()
        for label in of.labels:
            own = [x for x, y in zip(like.prompts, like.answers, strict=True) if y == label] or list(like.prompts[:1])
            texts += own[:per_label]
            more = range(per_label - len(own))
            texts += [_varied(own[k % len(own)], words, _kept_words(of.labels), rng) for k in more]
        labels = tuple(label for label in of.labels for _ in range(per_label))
        return Corpus(tuple(texts), labels, Provenance.PUBLIC)

    def _statement(self, home: int, *, scores: bool = False) -> Statement:
        """As `Home.said`: of all rounds, of more where more are asked for than planned."""
        of, rounds = self.facts[home], self.cell.scenario.rounds
        if of.client.guarantee == "none":
            return said_of(None, self.cell.scenario.data.unit_name, 1)
        planned = of.client.score_plan(of.records, rounds) if scores else of.client.plan(of.records, rounds)
        drawn = self.plans.setdefault(home, {})
        once = scores and of.client.scores == "model"
        drawn[planned] = 1 if once else drawn.get(planned, 0) + 1
        charged = replace(planned, rounds=max(planned.rounds, drawn[planned]))
        if scores and of.client.scores == "noise":
            said = said_of(charged, "client", 1)
            return replace(said, epsilon_replace_one=said.epsilon)
        settings = of.client.scorer_training if scores else of.client.generator_training
        return said_of(charged, self.cell.scenario.data.unit_name, settings.rows_per_unit)


@lru_cache(maxsize=4096)
def said_of(planned: DPPlan | None, unit: str, rows_per_unit: int) -> Statement:
    """The statement of a plan, as a simulated client makes it."""
    return statement(planned, unit=unit, rows_per_unit=rows_per_unit, rows=(), simulated=True)


def _trained_from(start: Adapter, rng: np.random.Generator, grants: tuple[str, ...]) -> Adapter:
    """As large as a trained one, and away from the start."""
    arrays = {n: (a + 0.01 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in start.arrays.items()}
    return replace(start, arrays=arrays, grants=grants, public=False)


# ---- One cell --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rehearsed:
    """What a cell comes to.

    Attributes:
        exchanges: Of all rounds.
        server: Seconds of the server's own work, on cores that nobody else uses.
        read: Tokens that language models at the server read.
        written: Tokens that they write.
        up: Bytes from clients.
        down: Bytes to clients.
        kept: Bytes in the run's directory.
        guarantee: `dp` or `none`.
        epsilon: The largest over clients; None without a guarantee.
        delta: Likewise.
        plans: By home: what is charged, and for how many rounds.
        noted: What is to be told: rounds that were not gone through, what could not be foreseen.
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


def rehearse(cell: Cell, folder: Path, lengths: Sequence[int], known: dict[Any, Any]) -> Rehearsed:
    """All rounds of a cell, on dummy text; nothing is charged.

    Args:
        cell: Arm, seed, resolved scenario.
        folder: For what a run would write; new or empty.
        lengths: Of dummy text (`probe.typical_lengths`).
        known: Models that this process has loaded already, and what they were found to take; filled.
    """
    one_thread()  # as a server app is started
    labels = label_list(cell.scenario.data)
    journal = Journal(cell, folder, folder / "events.jsonl")
    tally = Tally(_kept_words(labels), known=known.setdefault("asked", {}))
    folder.mkdir(parents=True, exist_ok=True)
    facts = facts_of(cell, labels)
    nodes = {home: home for home in facts}
    clients = _Answering(None, nodes, cell, "simulated", labels, journal, facts=facts, lengths=lengths)  # type: ignore[arg-type]
    noted: list[str] = []

    kind, config = load_strategy(cell.scenario.strategy)
    clients.begun = begun = busy()
    llm, professional, embed = _models(cell, labels, tally, known)
    for model in (llm, professional):
        if isinstance(model, _Elsewhere):
            model.tally = tally
    server = ServerSide(cell, labels, llm, professional, embed, journal, lambda _: clients)
    grid: Any = None
    with on_paper(tally):
        try:
            kind(config, server).start(grid, num_rounds=cell.scenario.rounds)
        except _Enough:
            noted.append(f"rounds {journal.round} to {cell.scenario.rounds} are taken to be as round "
                         f"{journal.round - 1}")  # fmt: skip
        except Unforeseen as problem:
            noted.append(f"{problem}: what comes after it is left out")
        except Exception as problem:  # of the strategy or a model, as it would come in the run
            noted.append(f"the run would fail: {problem}")
    own = busy() - begun - tally.spent - clients.spent
    whole = _with_missing_rounds(clients.exchanges, journal.round, cell.scenario.rounds, noted)
    done = max(1, len({e.number for e in clients.exchanges}))
    times = max(1.0, cell.scenario.rounds / done) if len(whole) > len(clients.exchanges) else 1.0
    guarantee = guarantee_of([journal])
    epsilons = [s.epsilon for s in journal.statements.values() if s.epsilon is not None]
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
        delta=None if guarantee == "none" else max((s.delta for s in journal.statements.values()), default=0.0),
        plans=clients.plans,
        noted=tuple(noted),
    )


def _with_missing_rounds(found: list[Exchange], at: int, rounds: int, noted: list[str]) -> list[Exchange]:
    """The exchanges of the last whole round stand for those of rounds that were not gone through."""
    if not any(line.startswith("rounds ") for line in noted):
        return found
    last = [e for e in found if e.number == at - 1]
    return [e for e in found if e.number < at] + [replace(e, number=n) for n in range(at, rounds + 1) for e in last]


def _kept_words(labels: Sequence[str]) -> frozenset[str]:
    return frozenset(word for label in labels for word in _WORD.findall(label))


def facts_of(cell: Cell, labels: tuple[str, ...]) -> dict[int, Facts]:
    """What is declared of every home: counts, no text."""
    data = cell.scenario.data
    homes = 1 if data.pooled else data.clients
    if data.world is not None:
        many = data.clients if data.pooled else 1
        sizes = [(data.train_per_client * many, data.test_per_client * many)] * homes
    else:
        sizes = [(len(site.train), len(site.test)) for site in divide(data, cell.seed).sites]
    return {
        home: Facts(cell.arm, cell.scenario.client.of(home), labels, declared_records(cell, home), *sizes[home])
        for home in range(homes)
    }


def _models(cell: Cell, labels: Sequence[str], tally: Tally, models: dict[Any, Any]) -> tuple[Any, Any, Any]:
    """LLM, professional and embedding as the server app has them; an endpoint is not asked."""
    cores, server = len(os.sched_getaffinity(0)), cell.scenario.server

    def loaded(model: str | Endpoint, adapter: str | None = None) -> Any:
        if isinstance(model, Endpoint):
            return _Elsewhere(labels, tally)
        if (model, adapter) not in models:
            lora = None if adapter is None else public_adapter(adapter, model)
            models[model, adapter] = LocalLLM.load(model, adapter=lora, batch_size=256, workers=cores)
        return models[model, adapter]

    llm = loaded(server.llm, server.adapter)
    professional = llm if server.professional is None else loaded(server.professional)
    if server.embedder is None:
        return llm, professional, llm.embed
    if server.embedder not in models:
        models[server.embedder] = Embedder.load(server.embedder, workers=cores)
    return llm, professional, models[server.embedder].embed
