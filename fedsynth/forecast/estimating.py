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
from fedsynth.models.embedding import Embedder
from fedsynth.models.encoding import text_rows
from fedsynth.models.llm import LocalLLM
from fedsynth.scenario.schema import Cell, Endpoint
from fedsynth.training import sft as tuning

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
        pool = vocabulary(known)
        texts = [varied(known[i % len(known)], pool, tally.labels, rng) for i in range(len(prompts))]
        tally.written += sum(map(len, text_rows(llm.tokenizer, texts)))
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

    def complete(self, prompts: Sequence[str], *, max_tokens: int, seed: int, **how: float) -> list[str]:  # noqa: ARG002 - the signature of LLM
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


def server_models(cell: Cell, labels: Sequence[str], tally: Tally, models: dict[Any, Any]) -> tuple[Any, Any, Any]:
    """LLM, professional and embedding as the server app has them; an endpoint is not asked."""
    cores, server = len(os.sched_getaffinity(0)), cell.scenario.server

    def loaded(model: str | Endpoint, adapter: str | None = None) -> Any:
        if isinstance(model, Endpoint):
            return Elsewhere(labels, tally)
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


def kept_words(labels: Sequence[str]) -> frozenset[str]:
    """The words of the labels, which a text that is made up keeps."""
    return frozenset(word for label in labels for word in _WORD.findall(label))
