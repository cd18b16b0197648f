"""A server's models that do a sample of what they are asked for, timed, and make up the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsynth.forecast.profiling import busy
from fedsynth.models.adapters import public_adapter
from fedsynth.models.batches import given_rows
from fedsynth.models.embedding import Embedder
from fedsynth.models.encoding import text_rows
from fedsynth.models.llm import LocalLLM, TextModel
from fedsynth.models.sampling import SamplingParams
from fedsynth.models.usage import TokenUsage
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.server import Endpoint
from fedsynth.training.engine import Engine
from fedsynth.training.sft import Descent

# Seconds of work, of all threads, for which a call's sample grows: a whole batch shows what memory it takes.
WHOLE = 2.5


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
        rng: Of what is made up.
    """

    labels: frozenset[str]
    seconds: float = 0.0
    spent: float = 0.0
    read: int = 0
    written: int = 0
    known: dict[Any, tuple[float, list[Any]]] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work within is spent here: it is not what the strategy itself takes."""
        begun = busy()
        try:
            yield
        finally:
            self.spent += busy() - begun

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


@dataclass
class SampledLLM:
    """A `TextModel` that completes and scores a sample of what it is asked for, and makes up the rest from it."""

    llm: LocalLLM
    tally: Tally
    used: TokenUsage = field(default_factory=TokenUsage)

    def complete(self, prompts: Sequence[str], sampling: SamplingParams, *, seed: int) -> list[str]:
        """As `TextModel`."""
        with self.tally.aside():
            lengths = self._lengths(prompts, sampling.max_new_tokens, "fewer or shorter demonstrations")
            if not prompts:
                return []
            request, lanes = np.argsort(lengths, kind="stable"), self._lanes(len(prompts))

            def sample(n: int) -> list[Any]:
                rows = [int(request[i * len(request) // n]) for i in range(n)]
                return self.llm.complete([prompts[row] for row in rows], sampling, seed=seed)

            key = ("complete", _size(self.llm.model), sampling, _magnitude(lengths))
            known = self.tally.add(key, len(prompts), sample, lanes * self.llm.batch_size, lanes=lanes)
            pool, tally = vocabulary(known), self.tally
            texts = [varied(known[i % len(known)], pool, tally.labels, tally.rng) for i in range(len(prompts))]
            written = sum(map(len, text_rows(self.llm.tokenizer, texts)))
            tally.written += written
            self.used.written += written
            return texts

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """As `TextModel`. Pairs of one text in a row are compared with each other: they are taken, and made up,
        together."""
        with self.tally.aside():
            both = [p + c for p, c in zip(prompts, continuations, strict=True)]
            lengths = self._lengths(both, 0, "shorter texts")
            groups = [[i for i, _ in rows] for _, rows in groupby(enumerate(continuations), key=lambda item: item[1])]
            if not groups:
                return []
            request = np.argsort([lengths[group[0]] for group in groups], kind="stable")
            lanes, size = self._lanes(len(prompts)), len(prompts) / len(groups)

            def sample(n: int) -> list[Any]:
                chosen = [groups[int(request[i * len(request) // n])] for i in range(n)]
                rows = [row for group in chosen for row in group]
                found = iter(self.llm.score([prompts[r] for r in rows], [continuations[r] for r in rows]))
                return [[next(found) for _ in group] for group in chosen]

            most = max(1, round(lanes * self.llm.batch_size / size))
            key = ("score", _size(self.llm.model), round(size), _magnitude(lengths))
            known = self.tally.add(key, len(groups), sample, most, lanes=lanes)
            made = (known[i % len(known)] for i in range(len(groups)))
            return [v[k % len(v)] for group, v in zip(groups, made, strict=True) for k in range(len(group))]

    def misfits(
        self, prompts: Sequence[str], more: int = 0, continuations: Sequence[str] | None = None
    ) -> list[str | None]:
        """As the model itself."""
        return self.llm.misfits(prompts, more, continuations)

    def _lengths(self, texts: Sequence[str], more: int, way_out: str) -> list[int]:
        """Tokens of each text; they count as read. Refused as by the model itself where they leave no room."""
        lengths = [len(row) for row in given_rows(self.llm.tokenizer, texts, self.llm.kind)]
        self.llm.check_room(lengths, more, way_out=way_out)
        self.tally.read += sum(lengths)
        self.used.read += sum(lengths)
        return lengths

    def _lanes(self, count: int) -> int:
        return max(1, min(self.llm.workers, -(-count // self.llm.batch_size)))


@dataclass(frozen=True)
class SampledEmbedder:
    """Embeds a sample of texts, and gives vectors near those for all of them."""

    embedder: Embedder
    tally: Tally

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (texts, width)."""
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
    """Models that a strategy makes itself do a sample, too: of texts, of scores, of the steps of their training."""

    tally: Tally

    def asked(self, llm: LocalLLM) -> TextModel:
        """As `Engine`."""
        return SampledLLM(llm, self.tally)

    def descend(self, asked: Descent) -> float:
        """As `Engine`, in a few steps of all."""
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


def _magnitude(lengths: Sequence[int]) -> int:
    """Texts of about as many tokens cost about the same."""
    return int(np.log2(max(1.0, float(np.mean(lengths)))))


def _size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


_WORD = re.compile(r"[^\W\d_]{3,}(?!\w*\s*:)")  # no mark such as `answer:`


def vocabulary(texts: Sequence[str]) -> list[str]:
    """The words of some texts, none of them twice."""
    return sorted({word for text in texts for word in _WORD.findall(text)}) or ["word"]


def varied(text: str, pool: Sequence[str], kept: frozenset[str], rng: np.random.Generator) -> str:
    """A text of the same form and about the same length, with half of its words changed: no copy of the first."""

    def other(match: re.Match[str]) -> str:
        word = match.group()
        return word if word in kept or rng.random() < 0.5 else pool[int(rng.integers(len(pool)))]

    return _WORD.sub(other, text)


@dataclass
class Elsewhere:
    """A model behind an endpoint, which is not asked: it would cost time and money. Its answers are as long as they may
    be, and every parser here finds something in them."""

    labels: Sequence[str]
    tally: Tally

    def complete(self, prompts: Sequence[str], sampling: SamplingParams, *, seed: int) -> list[str]:
        """One line of text, a verdict, a choice, and a block of each label."""
        self.tally.read += sum(map(_roughly, prompts))
        self.tally.written += sampling.max_new_tokens * len(prompts)
        rng, words = np.random.default_rng(seed), max(5, sampling.max_new_tokens * 3 // 4)
        found = []
        for _ in prompts:
            line = " ".join(f"word{n}" for n in rng.integers(10_000, size=words).tolist())
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


def server_models(cell: Cell, labels: Sequence[str], tally: Tally, models: dict[Any, Any]) -> tuple[Any, Any, Any]:
    """LLM, professional and embedding as the server app has them, but sampled; an endpoint is not asked.

    Args:
        cell: Names them.
        labels: The public label list.
        tally: Notes what they are asked for.
        models: Those that this process has loaded already; filled.
    """
    server = cell.scenario.server

    def loaded(model: str | Endpoint, adapter: str | None = None) -> TextModel:
        if isinstance(model, Endpoint):
            return Elsewhere(labels, tally)
        if (model, adapter) not in models:
            lora = None if adapter is None else public_adapter(adapter, model)
            models[model, adapter] = LocalLLM.for_server(model, lora)
        return SampledLLM(models[model, adapter], tally)

    llm = loaded(server.llm, server.adapter)
    professional = llm if server.professional is None else loaded(server.professional)
    if server.embedder is None:
        assert isinstance(llm, SampledLLM)  # an endpoint needs an embedder: scenario.Server
        return llm, professional, SampledEmbedder(llm.llm.embedder(), tally).embed
    if server.embedder not in models:
        models[server.embedder] = Embedder.load(server.embedder, workers=len(os.sched_getaffinity(0)))
    return llm, professional, SampledEmbedder(models[server.embedder], tally).embed


def kept_words(labels: Sequence[str]) -> frozenset[str]:
    """The words of the labels, which a text that is made up keeps."""
    return frozenset(word for label in labels for word in _WORD.findall(label))
