"""Tuning of a server LLM by the clients' scores of its texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import normalize

from fedsynth.corpus import Corpus, Provenance, Scores, united
from fedsynth.instructions import one_line
from fedsynth.lora import Adapter, made_of
from fedsynth.models.adapters import new_adapter, public_adapter, read_adapter, with_adapter
from fedsynth.models.chat import Chat, converses, render, turn_end
from fedsynth.models.devices import device
from fedsynth.models.encoding import token_ids
from fedsynth.models.llm import TextModel
from fedsynth.models.loading import kind_of, load_tokenizer
from fedsynth.models.room import misfits
from fedsynth.scenario.client import Tuning
from fedsynth.scenario.task import NO_CARD, Task
from fedsynth.training.engine import Engine
from fedsynth.training.examples import Example, encode_text
from fedsynth.training.sft import Guard, Steps, dpo, perplexity, sft
from fedsynth.typed import BadValue, Count, Positive, in_range

MEASURED = 200  # most labelled texts: each is scored after every label
CHOICES = 12  # most labels of the choice task outside the LLM's own


@dataclass(frozen=True)
class Teaching:
    """The tuning of an LLM on texts that clients' scores have ranked.

    Attributes:
        update: `likelihood`: the best texts become likelier after their labels (weight 1, all others 0). `preference`:
            the best become likelier than the worst (DPO). `none`: scores only filter the texts.
        beta: `preference`: strength of the reference, the LLM before the round.
        guard: Weight of the guard of general ability (`sft.Guard`): the LLM's predictions on the round's texts, best or
            not, without their labels, may not drift. The guard needs no other text.
        tuning: Passes, batch, rate; rank, if the LLM comes without an adapter.
        measured: Most public texts to measure on, for each measure; they are never trained on.
    """

    update: Literal["likelihood", "preference", "none"] = "likelihood"
    beta: Positive = 0.1
    guard: float = 0.1
    tuning: Tuning = field(default_factory=Tuning)
    measured: Count = 300

    def __post_init__(self) -> None:
        in_range(self, "strategy.teaching")
        if not self.guard >= 0:
            raise BadValue(f"strategy.teaching.guard must not be negative, got {self.guard}")


@dataclass(frozen=True)
class Ranked:
    """The server's texts, sorted label by label by the clients' scores.

    Attributes:
        corpus: All of them.
        best: The best share of each label's texts, in the order of the corpus.
        pairs: (better text, worse text, label): the best share of each label against the worst, best against worst.
    """

    corpus: Corpus
    best: Corpus
    pairs: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Measures:
    """An LLM's task, and the public texts that measure its ability before and after a round.

    Attributes:
        labels: All labels.
        public: Texts to measure perplexity on.
        tests: Public texts with labels, to measure how often the LLM tells them.
        others: Public texts of other labels, a choice task that the LLM is not taught.
        task: The card, which puts each label into words.
    """

    labels: Sequence[str]
    public: Sequence[str] = ()
    tests: Corpus | None = None
    others: Corpus | None = None
    task: Task = NO_CARD


@dataclass(frozen=True)
class Taught:
    """An adapter of the LLM after a round.

    Attributes:
        adapter: Its guarantee is that of its start and of the texts that scores chose.
        metrics: `llm/loss`, mean of the last pass; `llm/agreement_on_chosen`, how often the LLM as it was agrees with
            the labels of the texts that scores have just chosen for it: the scores' doing as much as its own. After the
            round, and with the ending `_before` before the first: `general/perplexity`, if there is public text;
            `llm/test_accuracy`, if there are public texts of the labels; `general/choice_accuracy`, if there are some
            of other labels.
    """

    adapter: Adapter
    metrics: Mapping[str, float]


def shuffled(scores: Scores, seed: int) -> Scores:
    """The same scores on other texts: an ablation in which they carry no information."""
    order = np.random.default_rng(seed).permutation(len(scores.values)).tolist()
    return replace(scores, values=tuple(scores.values[i] for i in order))


def ranked(corpus: Corpus, scores: Scores, share: float) -> Ranked:
    """The best and the worst texts of each label.

    Only the order of scores within a label counts, so that clients may send them on any scale, with noise or without.
    The choice derives from the scores: its guarantee is theirs and, from the second round on, the corpus's own.

    Args:
        corpus: Texts and their requested labels.
        scores: One score per text.
        share: Share of each label's texts, in (0, 1]; at least one text.
    """
    values, labels = np.asarray(scores.values), np.asarray(corpus.answers)
    best: list[int] = []
    pairs: list[tuple[str, str, str]] = []
    for label in dict.fromkeys(corpus.answers):
        rows = np.flatnonzero(labels == label)
        order = rows[np.argsort(-values[rows], kind="stable")].tolist()
        count = max(1, round(share * len(order)))
        best += order[:count]
        pairs += [
            (corpus.prompts[a], corpus.prompts[b], label)
            for a, b in zip(order[:count], order[::-1][:count], strict=True)
            if values[a] > values[b]
        ]
    chosen = replace(corpus.take(sorted(best)), provenance=Provenance.LLM_WRITTEN, grants=united([corpus, scores]))
    return Ranked(corpus, chosen, tuple(pairs))


def first_adapter(llm: str, adapter: str | None, settings: Tuning, seed: int) -> Adapter:
    """The adapter that tuning of the LLM starts from: its present one, or a new one."""
    if adapter is not None:
        return public_adapter(adapter, llm)
    return new_adapter(llm, rank=settings.rank, alpha=settings.alpha, seed=seed)


def taught(
    engine: Engine,
    llm: str,
    start: Adapter,
    texts: Ranked,
    teaching: Teaching,
    measures: Measures,
    *,
    seed: int,
    first: bool = True,
) -> Taught:
    """One round's update of the LLM's adapter.

    Args:
        engine: Asks the model, and takes the steps.
        llm: Name of the model.
        start: The adapter to start from.
        texts: The texts of the round, and the choice of the clients' scores.
        teaching: The tuning; its `update` is not `none`.
        measures: The task, and the texts to measure ability on.
        seed: Public; of the order.
        first: Measure ability before the round, too: before a later round it is that after the round before.
    """
    labels, task = measures.labels, measures.task
    others = [] if measures.others is None else sorted(set(measures.others.answers))
    settings = teaching.tuning
    tokenizer, model = load_tokenizer(llm), with_adapter(llm, start, precision=engine.precision).to(device())
    pad, kind = tokenizer.pad_token_id, kind_of(model.config)

    def encoded(given: str, text: str) -> Example:
        return encode_text(tokenizer, given, text, settings.max_length, kind)

    def written(label: str, text: str) -> Example:
        """A text after what the LLM is asked for it with."""
        if converses(tokenizer):
            return _answer(tokenizer, Chat(task.question(label), task.system), text, settings.max_length)
        return encoded(task.code(label), text)

    def ability(when: str) -> dict[str, float]:
        found = {}
        if measures.public:
            found[f"general/perplexity{when}"] = perplexity(
                model, [encoded("", text) for text in measures.public], pad=pad
            )
        for name, told, among in (
            ("llm/test_accuracy", measures.tests, labels),
            ("general/choice_accuracy", measures.others, others),
        ):
            if told is not None and len(told):
                found[f"{name}{when}"] = label_accuracy(judge, told, among, task)
        return {name: value for name, value in found.items() if not math.isnan(value)}

    judge = engine.serve(model.eval(), tokenizer)
    few = texts.best.take(range(0, len(texts.best), math.ceil(len(texts.best) / MEASURED)))
    metrics = {"llm/agreement_on_chosen": label_accuracy(judge, few, labels, task)}
    if first:
        metrics |= ability("_before")
    guard = Guard([encoded("", text) for text in texts.corpus.prompts], teaching.guard)
    if teaching.update == "likelihood":
        best = [written(y, x) for x, y in zip(texts.best.prompts, texts.best.answers, strict=True)]
        loss = sft(model, best, Steps(settings, pad=pad, seed=seed, guard=guard), descend=engine.descend)
    else:
        pairs = [(written(y, better), written(y, worse)) for better, worse, y in texts.pairs]
        loss = dpo(
            model, pairs, Steps(settings, pad=pad, seed=seed, guard=guard), beta=teaching.beta, descend=engine.descend
        )
    adapter = made_of(read_adapter(model, start.base), [start, texts.best])
    learnt = {"llm/loss": loss} if math.isfinite(loss) else {}
    return Taught(adapter, {**metrics, **learnt, **ability("")})


def _answer(tokenizer: Any, asked: Chat, text: str, longest: int) -> Example:
    """A text as the answer to a question, in the model's chat form; the text is cut to `longest` tokens."""
    head, body = render(asked, tokenizer), token_ids(tokenizer, text)
    end = turn_end(tokenizer)
    ends = () if len(body) >= longest else (tokenizer.eos_token_id if end is None else end,)
    return Example((*head, *body[:longest], *ends), len(head))


def label_accuracy(llm: TextModel, texts: Corpus, labels: Sequence[str], task: Task = NO_CARD) -> float:
    """How often the LLM finds a text likelier after its own label than after any other, in 0..1; nan without a text.

    If a text does not fit after each of the labels, its end is cut until it does; it is left out if nothing fits.
    """
    prompts = list(map(task.code, labels))
    read = [(_readable(llm, prompts, f" {one_line(x)}"), y) for x, y in zip(texts.prompts, texts.answers, strict=True)]
    read = [(text, y) for text, y in read if text]
    if not read:
        return math.nan
    flat = llm.score(prompts * len(read), [text for text, _ in read for _ in labels])
    likeliest = np.asarray(flat).reshape(len(read), len(labels)).argmax(1).tolist()
    return float(np.mean([labels[i] == y for i, (_, y) in zip(likeliest, read, strict=True)]))


def _readable(llm: TextModel, prompts: Sequence[str], text: str) -> str:
    """The longest beginning of a text that fits after each of the prompts; "" if nothing does."""

    def fits(size: int, prompts: Sequence[str]) -> bool:
        return not any(misfits(llm, prompts, 0, [text[:size]] * len(prompts)))

    if fits(len(text), prompts):
        return text
    longest = [max(prompts, key=len)]  # trying all prompts for each length would take minutes
    low, high = 0, len(text)  # `low` characters fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, longest) else (low, middle)
    while text[:low].strip() and not fits(low, prompts):  # another label has more tokens
        low = low * 9 // 10
    return text[:low] if text[:low].strip() else ""


def fit(texts: Corpus, tests: Corpus, embed: Callable[[Sequence[str]], NDArray[np.float32]]) -> tuple[float, float]:
    """How often a text is nearest to its own label's public texts, by the cosine to their mean embedding.

    Returns:
        The share of `texts` that are; and the share of the public texts that are, each against the means of all others:
        no text can be expected to do better. (nan, nan) if a label of `texts` has fewer than two public texts.
    """
    labels = sorted(set(tests.answers))
    counts = np.array([tests.answers.count(y) for y in labels])
    if not len(texts) or not set(texts.answers) <= set(labels) or (counts < 2).any():
        return math.nan, math.nan

    vectors = normalize(embed([one_line(text) for text in tests.prompts]))
    own = np.array([labels.index(y) for y in tests.answers])
    sums = np.stack([vectors[own == i].sum(0) for i in range(len(labels))])
    nearest = (normalize(embed([one_line(text) for text in texts.prompts])) @ normalize(sums).T).argmax(1)
    fits = np.mean([labels[i] == y for i, y in zip(nearest.tolist(), texts.answers, strict=True)])
    cosines = vectors @ normalize(sums).T
    cosines[np.arange(len(own)), own] = (vectors * normalize(sums[own] - vectors)).sum(1)  # without itself
    return float(fits), float(np.mean(cosines.argmax(1) == own))
