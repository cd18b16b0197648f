"""What a server checks of an answer, and a client of an order, before using it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsynth.corpus import Corpus, Provenance
from fedsynth.lora import Adapter, Shared, only_b
from fedsynth.privacy.plan import Statement
from fedsynth.tasks import (
    Adopt,
    Evaluate,
    Evaluated,
    Finetune,
    Finetuned,
    Learn,
    Order,
    Score,
    Scored,
    SelfTrain,
    SelfTrained,
    Synthesize,
    Synthesized,
)

MAX_TEXT = 20_000  # characters of one text
MAX_SAMPLES = 100_000  # of one label
MAX_TOKENS = 8_192
MAX_CANDIDATES = 10_000  # of one self-generation
MAX_STEPS = 32  # what can become of a candidate
MAX_RECORDS = 10**12
MAX_PROXIMAL = 1e6
MAX_SEED = 2**32 - 2
MAX_EPSILON = 1e6  # more than any budget that means something


class Rejected(ValueError):
    """An order or answer that does not keep to what was agreed."""


def check_order(order: Order[Any], labels: Sequence[str]) -> None:
    """A client's check: ranges only, so that a server cannot ask for what the privacy statement does not cover.

    Raises:
        Rejected: With the value and the range.
    """
    if isinstance(order, Synthesize):
        _within("per_label", order.per_label, 1, MAX_SAMPLES)
        _within("max_tokens", order.max_tokens, 1, MAX_TOKENS)
        _within("temperature", order.temperature, 0.01, 10.0)
        _within("top_p", order.top_p, 0.01, 1.0)
    if isinstance(order, Synthesize | Learn | Finetune | Score | SelfTrain):
        _within("seed", order.seed, 0, MAX_SEED)
    if isinstance(order, Learn | Score) and order.corpus is not None:
        _check_corpus(order.corpus, labels)
        if order.corpus.provenance is Provenance.PRIVATE:
            raise Rejected("a server sent text that is marked private")
    if isinstance(order, Score) and not len(order.corpus):
        raise Rejected("a server sent no text to score")
    if isinstance(order, Finetune | SelfTrain):
        _check_finite(order.start)
    if isinstance(order, Finetune) and order.proximal is not None:
        _within("proximal", order.proximal, 0.0, MAX_PROXIMAL)
    if isinstance(order, Adopt | Evaluate) and order.adapter is not None:
        _check_finite(order.adapter)
    if isinstance(order, SelfTrain):
        _within("writing_seed", order.writing_seed, 0, MAX_SEED)
        _within("share", order.share, 0.0, 1.0)
        _within("candidates", order.candidates, 1, MAX_CANDIDATES)
        _within("keep", order.keep, 1, order.candidates)
        _within("shots", order.shots, 1, 64)
        _within("max_tokens", order.max_tokens, 1, MAX_TOKENS)


def check_answer(order: Order[Any], answer: object, labels: Sequence[str]) -> None:
    """A server's check of one client's answer.

    Raises:
        Rejected: With the value and the range.
    """
    if isinstance(answer, Synthesized) and isinstance(order, Synthesize):
        _check_corpus(answer.corpus, labels)
        if answer.corpus.provenance is Provenance.PRIVATE:
            raise Rejected("a client sent text that is marked private")
        _within("number of texts", len(answer.corpus), 0, order.per_label * len(labels))
        most = max(answer.corpus.counts().values(), default=0)
        _within("number of texts of one label", most, 0, order.per_label)
        _within("unfinished", answer.unfinished, 0, order.per_label * len(labels) - len(answer.corpus))
        _check_statement(answer.statement, answer.corpus.grants)
        if answer.adapter is not None:
            _check_finite(answer.adapter)
    if isinstance(answer, Finetuned) and isinstance(order, Finetune):
        _check_statement(answer.statement, answer.adapter.grants)
        _check_adapter(answer.adapter, order.start, only=only_b if order.frozen_a else None)
        _within("records", answer.records, 1, MAX_RECORDS)
    if isinstance(answer, SelfTrained) and isinstance(order, SelfTrain):
        _check_statement(answer.statement, answer.adapter.grants)
        _check_adapter(answer.adapter, order.start)
        _within("records", answer.records, 1, MAX_RECORDS)
        _within("number of steps in the funnel", len(answer.funnel), 0, MAX_STEPS)
        for step, count in answer.funnel.items():
            _within(f"candidates {step!r}", count, 0, order.candidates)
    if isinstance(answer, Scored) and isinstance(order, Score):
        _check_statement(answer.statement, answer.scores.grants)
        _within("number of scores", len(answer.scores.values), len(order.corpus), len(order.corpus))
        if not all(map(math.isfinite, answer.scores.values)):
            raise Rejected("scores that are not finite")
    if isinstance(answer, Evaluated):
        for name, value in answer.metrics.items():
            if not math.isfinite(value):
                raise Rejected(f"metric {name!r} must be finite, got {value}")


def _check_statement(said: Statement, grants: Sequence[str]) -> None:
    _within("delta", said.delta, 0.0, 1.0)
    if said.epsilon is not None:
        _within("epsilon", said.epsilon, 0.0, MAX_EPSILON)
    if (said.guarantee == "dp") != bool(grants):
        raise Rejected(f"guarantee {said.guarantee!r} with grants {list(grants)}")


def _check_adapter(adapter: Adapter, like: Adapter, only: Shared | None = None) -> None:
    """An adapter may hold the tensors of the one that was sent (or the named ones of them), and nothing else."""
    expected = {name: array.shape for name, array in like.arrays.items() if only is None or only(name)}
    if {name: array.shape for name, array in adapter.arrays.items()} != expected:
        raise Rejected("an adapter with other tensors than those of the one that was sent")
    for name in ("rank", "alpha", "base"):
        if getattr(adapter, name) != getattr(like, name):
            raise Rejected(f"an adapter of another {name}: {getattr(adapter, name)!r}, sent {getattr(like, name)!r}")
    _check_finite(adapter)


def _check_finite(adapter: Adapter) -> None:
    if not all(bool(np.isfinite(array).all()) for array in adapter.arrays.values()):
        raise Rejected("an adapter with values that are not finite")


def _check_corpus(corpus: Corpus, labels: Sequence[str]) -> None:
    if labels and (strange := set(corpus.answers) - set(labels)):
        raise Rejected(f"labels outside the public list: {len(strange)}")
    if any(len(text) > MAX_TEXT for text in (*corpus.prompts, *corpus.answers)):
        raise Rejected(f"a text of more than {MAX_TEXT} characters")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise Rejected(f"{name} must lie in {low}..{high}, got {value}")
