"""Server models that do a timed sample of each request and make up the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsynth.corpus import Corpus
from fedsynth.forecast.profiling import busy, each_of
from fedsynth.models.adapters import public_adapter
from fedsynth.models.batches import given_rows
from fedsynth.models.chat import Chat, Prompt
from fedsynth.models.embedding import Embedder
from fedsynth.models.encoding import text_rows
from fedsynth.models.llm import LocalLLM, TextModel
from fedsynth.models.sampling import SamplingParams
from fedsynth.models.usage import TokenUsage
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.server import Endpoint
from fedsynth.synthesis.curation import keep_rows
from fedsynth.synthesis.judges import SELECTED
from fedsynth.training.engine import Engine
from fedsynth.training.sft import Descent

# A call's sample grows up to these seconds of work, of all threads: a whole batch shows its memory.
WHOLE = 1.0
COUNTED = 256  # prompts whose tokens are counted; those of further ones follow from their characters

FEW_TEXTS = 4  # of the first sample of a model that writes

FITTING = 0.87  # share of an LLM's texts that fit their label (docs/results.md: .87 and .88 on banking77)


T = TypeVar("T")


@dataclass
class Tally:
    """The work of the server's models and its costs.

    Attributes:
        labels: Words that stay as they are in made-up texts.
        seconds: Time of all the work, in a run on cores that nobody else uses.
        spent: Seconds of work spent on samples here.
        read: Tokens of prompts and of scored texts.
        written: Tokens that the models write.
        known: By kind of call, its measured costs and sampled results.
        answered: Calls of models of this process so far, in all cells: a run remembers their replies.
        rng: Draws the made-up results.
    """

    labels: frozenset[str]
    seconds: float = 0.0
    spent: float = 0.0
    read: int = 0
    written: int = 0
    known: dict[Any, tuple[float, list[Any]]] = field(default_factory=dict)
    answered: set[Any] = field(default_factory=set)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Counts the work within as spent here, so that it is not taken for the strategy's own."""
        begun = busy()
        try:
            yield
        finally:
            self.spent += busy() - begun

    def add(
        self,
        key: Any,
        count: int,
        sample: Callable[[int], list[Any]],
        most: int,
        *,
        lanes: int = 1,
        first: int = 1,
    ) -> list[Any]:
        """The results of a sample of `count` items; adds the time that all of them would take.

        Args:
            key: Calls of one key cost the same for each item.
            count: Number of all items.
            sample: Does the given number of items.
            most: Items at once; a larger sample would show no more.
            lanes: Threads that a whole call uses; a small sample uses one.
            first: Items of the first sample. If more than one, an item costs less in a larger batch: at least two
                samples are taken, and a line through the last two gives the time of a whole batch.
        """
        if key not in self.known:
            n, tried = min(count, most, first), list[tuple[int, float]]()
            while True:
                begun = busy()
                found = sample(n)
                tried.append((n, busy() - begun))
                took = tried[-1][1]
                if n >= min(count, most) or (took > WHOLE and len(tried) >= min(first, 2)):
                    break
                n = min(count, most, max(4 * n, int(WHOLE * n / max(took, 1e-6))) if n > 1 else 8)
            self.known[key] = (each_of(tried, max(n, min(count, most) // lanes)) if first > 1 else took / n, found)
        each, found = self.known[key]
        self.seconds += each * count / lanes
        return found


@dataclass
class SampledLLM:
    """A `TextModel` that completes and scores a sample of its prompts, and makes up the rest from it."""

    llm: LocalLLM
    tally: Tally
    used: TokenUsage = field(default_factory=TokenUsage)

    @property
    def chats(self) -> bool:
        """As the model itself."""
        return self.llm.chats

    @property
    def structured(self) -> bool:
        """As the model itself."""
        return self.llm.structured

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int) -> list[str]:
        """As `TextModel`."""
        with self.tally.aside():
            lengths = self._lengths(prompts, None, sampling.max_new_tokens, "fewer or shorter demonstrations")
            if not prompts:
                return []
            # Neighbours in the order of their text share as much of a beginning as the rows of a whole batch do.
            said, lanes = list(map(_said, prompts)), self._lanes(len(prompts))
            order = sorted(range(len(prompts)), key=said.__getitem__)

            def sample(n: int) -> list[Any]:
                start = (len(order) - n) // 2
                return self.llm.complete([prompts[row] for row in order[start : start + n]], sampling, seed=seed)

            key, tally = ("complete", _size(self.llm.model), sampling, _magnitude(lengths)), self.tally
            before, asked = tally.seconds, (id(self.llm), tuple(prompts), sampling, seed)
            if key not in tally.known:  # the first call of a model costs more
                self.llm.complete(prompts[:1], replace(sampling, max_new_tokens=1), seed=seed)
            most = lanes * self.llm.batch_size
            known = tally.add(key, len(prompts), sample, most, lanes=lanes, first=FEW_TEXTS)
            if asked in tally.answered:
                tally.seconds = before
            tally.answered.add(asked)
            pool = vocabulary(known)
            texts = [varied(known[i % len(known)], pool, tally.labels, tally.rng) for i in range(len(prompts))]
            written = sum(_counted(texts, len, lambda some: map(len, text_rows(self.llm.tokenizer, some))))
            tally.written += written
            self.used.written += written
            return texts

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        """As `TextModel`. Consecutive pairs of one text are compared with each other: they are sampled, or made up,
        together."""
        with self.tally.aside():
            lengths = self._lengths(prompts, continuations, 0, "shorter texts")
            groups = [[i for i, _ in rows] for _, rows in groupby(enumerate(continuations), key=lambda item: item[1])]
            if not groups:
                return []
            order = np.argsort([lengths[group[0]] for group in groups], kind="stable")
            lanes, size = self._lanes(len(prompts)), len(prompts) / len(groups)

            def sample(n: int) -> list[Any]:
                chosen = [groups[int(order[i * len(order) // n])] for i in range(n)]
                rows = [row for group in chosen for row in group]
                found = iter(self.llm.score([prompts[r] for r in rows], [continuations[r] for r in rows]))
                return [[next(found) for _ in group] for group in chosen]

            most = max(1, round(lanes * self.llm.batch_size / size))
            key = ("score", _size(self.llm.model), round(size), _magnitude(lengths))
            known = self.tally.add(key, len(groups), sample, most, lanes=lanes)
            made = (known[i % len(known)] for i in range(len(groups)))
            return [v[k % len(v)] for group, v in zip(groups, made, strict=True) for k in range(len(group))]

    def misfits(
        self, prompts: Sequence[Prompt], more: int = 0, continuations: Sequence[str] | None = None
    ) -> list[str | None]:
        """As the model itself says; where the longest texts fit, the others are taken to."""
        texts = [""] * len(prompts) if continuations is None else continuations
        sizes = [len(_said(prompt)) + len(text) for prompt, text in zip(prompts, texts, strict=True)]
        longest = sorted(range(len(sizes)), key=sizes.__getitem__)[-COUNTED:]
        of_text = None if continuations is None else [texts[row] for row in longest]
        if not any(self.llm.misfits([prompts[row] for row in longest], more, of_text)):
            return [None] * len(prompts)
        return self.llm.misfits(prompts, more, continuations)

    def _lengths(
        self, prompts: Sequence[Prompt], continuations: Sequence[str] | None, more: int, way_out: str
    ) -> list[int]:
        """Number of tokens of each prompt, counted as read; raises as the model does if they leave no room."""
        texts = [""] * len(prompts) if continuations is None else continuations

        def tokens(some: Sequence[tuple[Prompt, str]]) -> Iterator[int]:
            asked, after = zip(*some, strict=True)
            return map(len, given_rows(self.llm.tokenizer, asked, self.llm.kind, after))

        pairs = list(zip(prompts, texts, strict=True))
        lengths = _counted(pairs, lambda pair: len(_said(pair[0])) + len(pair[1]), tokens)
        self.llm.check_room(lengths, more, way_out=way_out)
        self.tally.read += sum(lengths)
        self.used.read += sum(lengths)
        return lengths

    def _lanes(self, count: int) -> int:
        return max(1, min(self.llm.workers, -(-count // self.llm.batch_size)))


@dataclass(frozen=True)
class SampledEmbedder:
    """Embeds a sample of texts, and makes up vectors near those for all of them."""

    embedder: Embedder
    tally: Tally

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of shape (texts, width)."""
        if not texts:
            return self.embedder.embed(texts)
        with self.tally.aside():
            most, key = self.embedder.batch_size * self.embedder.workers, ("embed", _size(self.embedder.body))
            known = self.tally.add(key, len(texts), lambda n: list(self.embedder.embed(texts[:n])), most)
            rows = np.stack([known[i % len(known)] for i in range(len(texts))])
            noise = self.tally.rng.normal(scale=float(np.std(rows)) + 1e-9, size=rows.shape)
            return (rows + noise).astype(np.float32)


@dataclass(frozen=True)
class SampledEngine(Engine):
    """The engine of a strategy's own models; they do a sample as well: of texts, scores and training steps."""

    tally: Tally = field(kw_only=True)

    def asked(self, llm: LocalLLM) -> TextModel:
        """As `Engine`."""
        return SampledLLM(llm, self.tally)

    def checked(self, check: Callable[[Corpus], Any], corpus: Corpus) -> Any:
        """Does the work of the check; a usual share of the texts passes."""
        check(corpus)
        passes = [None if self.tally.rng.random() < FITTING else "another label is nearer" for _ in range(len(corpus))]
        return keep_rows(corpus, passes)

    def descend(self, asked: Descent) -> float:
        """As `Engine`, with a sample of the steps."""
        rows, settings, guard = asked.rows, asked.steps.settings, asked.steps.guard
        if not rows:
            return float("nan")
        steps = settings.epochs * -(-len(rows) // settings.batch)
        few, take = replace(asked.steps, settings=replace(settings, epochs=1)), super().descend

        def sample(n: int) -> list[Any]:
            some = [rows[i % len(rows)] for i in range(n * settings.batch)]
            return [take(replace(asked, rows=some, steps=few))] * n

        key = ("tune", _size(asked.model), settings, guard is not None and guard.weight > 0, len(rows) < settings.batch)
        with self.tally.aside():
            return float(self.tally.add(key, steps, sample, 16)[0])


def _said(prompt: Prompt) -> str:
    """The words of a prompt, without the marks of a chat."""
    return "\n".join(turn["content"] for turn in prompt.messages) if isinstance(prompt, Chat) else prompt


def _counted(items: Sequence[T], size: Callable[[T], int], count: Callable[[list[T]], Iterable[int]]) -> list[int]:
    """Tokens of each item: counted of at most `COUNTED` items of all sizes, and between these by a line.

    Args:
        items: Texts, or what holds them.
        size: An item's characters.
        count: Tokens of each of some items.
    """
    if len(items) <= COUNTED:
        return list(count(list(items))) if items else []
    sizes = np.array([size(item) for item in items])
    order = np.argsort(sizes, kind="stable")
    some = order[np.linspace(0, len(items) - 1, COUNTED).astype(int)]
    found = np.array(list(count([items[row] for row in some])), dtype=float)
    # Texts of one size have other numbers of tokens: a line through all keeps the sum, neighbours alone would not.
    apart = sizes[some] - sizes[some].mean()
    slope = float(apart @ found / (apart @ apart)) if apart.any() else 0.0
    return [max(1, round(float(found.mean() + slope * own))) for own in sizes - sizes[some].mean()]


def _magnitude(lengths: Sequence[int]) -> int:
    """Texts of about as many tokens cost about the same."""
    return int(np.log2(max(1.0, float(np.mean(lengths)))))


def _size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


_WORD = re.compile(r"[^\W\d_]{3,}(?!\w*\s*:)")  # no mark such as `answer:`


def vocabulary(texts: Sequence[str]) -> list[str]:
    """The words of some texts, each once."""
    return sorted({word for text in texts for word in _WORD.findall(text)}) or ["word"]


def varied(text: str, pool: Sequence[str], kept: frozenset[str], rng: np.random.Generator) -> str:
    """A text of the same form and about the same length, with half of its words changed, so that it is no copy."""

    def other(match: re.Match[str]) -> str:
        word = match.group()
        return word if word in kept or rng.random() < 0.5 else pool[int(rng.integers(len(pool)))]

    return _WORD.sub(other, text)


@dataclass
class EndpointStub:
    """A stand-in for a model behind an endpoint, which is not called, as that costs time and money. Its texts have the
    full length, and every parser here finds something in them."""

    labels: Sequence[str]
    tally: Tally
    chats: bool = False
    structured: bool = False

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int) -> list[str]:
        """One line of text; a verdict, a choice, and a block of each label, unless one line is all that is wanted. Of
        a question with a schema the choice alone: no method has another."""
        self.tally.read += sum(map(_roughly, prompts))
        self.tally.written += sampling.max_new_tokens * len(prompts)
        rng, words = np.random.default_rng(seed), max(5, sampling.max_new_tokens * 3 // 4)
        found = []
        for prompt in prompts:
            if isinstance(prompt, Chat) and prompt.schema:
                found.append(json.dumps({SELECTED: [1]}))
                continue
            line = " ".join(f"word{n}" for n in rng.integers(10_000, size=words).tolist())
            blocks = "".join(f"-----\nLabel: {label}\nText: {line}\n" for label in self.labels)
            more = "" if sampling.one_line else f"\nThe selected texts are: 1\nVerdict: keep\n{blocks}"
            found.append(f"{line}{more}")
        return found

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        """Scores that make a text likeliest after its own label."""
        self.tally.read += sum(map(_roughly, [*prompts, *continuations]))
        same = groupby(range(len(prompts)), key=lambda i: continuations[i])
        return [-1.0 - place for _, rows in same for place, _ in enumerate(rows)]


def _roughly(text: Prompt) -> int:
    return -(-len(_said(text)) // 4)  # characters of a token, the endpoint's tokenizer is not known here


def server_models(cell: Cell, labels: Sequence[str], tally: Tally, models: dict[Any, Any]) -> tuple[Any, Any, Any]:
    """LLM, professional model and embedder of the server app, in their sampled form; endpoints are not called.

    Args:
        cell: Its scenario names the models.
        labels: The public label list.
        tally: Counts the models' work.
        models: Models that this process has loaded; new ones are added.
    """
    server = cell.scenario.server

    def loaded(model: str | Endpoint, adapter: str | None = None) -> TextModel:
        if isinstance(model, Endpoint):
            return EndpointStub(labels, tally, model.api == "chat", model.structured != "none")
        if (model, adapter, server.hardware) not in models:
            lora = None if adapter is None else public_adapter(adapter, model)
            models[model, adapter, server.hardware] = LocalLLM.for_server(model, lora, server.hardware)
        return SampledLLM(models[model, adapter, server.hardware], tally)

    llm = loaded(server.llm, server.adapter)
    professional = llm if server.professional is None else loaded(server.professional)
    if server.embedder is None:
        assert isinstance(llm, SampledLLM)  # an endpoint needs an embedder: scenario.Server
        return llm, professional, SampledEmbedder(llm.llm.embedder(), tally).embed
    own = (server.embedder, server.hardware)
    if own not in models:
        models[own] = Embedder.for_server(*own)
    return llm, professional, SampledEmbedder(models[own], tally).embed


def kept_words(labels: Sequence[str]) -> frozenset[str]:
    """The words of the labels; made-up texts keep them."""
    return frozenset(word for label in labels for word in _WORD.findall(label))
