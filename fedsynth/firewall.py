"""What a server checks of an answer, and a client of an order, before using it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedsynth.corpus import Corpus, Provenance
from fedsynth.tasks import Evaluated, Learn, Order, Synthesize, Synthesized

MAX_TEXT = 20_000  # characters of one text
MAX_SAMPLES = 100_000  # of one label
MAX_TOKENS = 8_192
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
    if isinstance(order, Synthesize | Learn):
        _within("seed", order.seed, 0, 2**32 - 2)
    if isinstance(order, Learn) and order.corpus is not None:
        _check_corpus(order.corpus, labels)
        if order.corpus.provenance is Provenance.PRIVATE:
            raise Rejected("a server sent text that is marked private")


def check_answer(order: Order[Any], answer: object, labels: Sequence[str]) -> None:
    """A server's check of one client's answer.

    Raises:
        Rejected: With the value and the range.
    """
    if isinstance(answer, Synthesized) and isinstance(order, Synthesize):
        _check_corpus(answer.corpus, labels)
        if answer.corpus.provenance is Provenance.PRIVATE:
            raise Rejected("a client sent text that is marked private")
        _within("delta", answer.statement.delta, 0.0, 1.0)
        if answer.statement.epsilon is not None:
            _within("epsilon", answer.statement.epsilon, 0.0, MAX_EPSILON)
        _within("number of texts", len(answer.corpus), 0, order.per_label * len(labels))
        most = max(answer.corpus.counts().values(), default=0)
        _within("number of texts of one label", most, 0, order.per_label)
        _within("unfinished", answer.unfinished, 0, order.per_label * len(labels) - len(answer.corpus))
        if (answer.statement.guarantee == "dp") != bool(answer.corpus.grants):
            raise Rejected(f"guarantee {answer.statement.guarantee!r} with grants {list(answer.corpus.grants)}")
        if answer.adapter is not None and not all(
            bool((abs(a) < math.inf).all()) for a in answer.adapter.arrays.values()
        ):
            raise Rejected("an adapter with values that are not finite")
    if isinstance(answer, Evaluated):
        for name, value in answer.metrics.items():
            if not math.isfinite(value):
                raise Rejected(f"metric {name!r} must be finite, got {value}")


def _check_corpus(corpus: Corpus, labels: Sequence[str]) -> None:
    if strange := set(corpus.answers) - set(labels):
        raise Rejected(f"labels outside the public list: {len(strange)}")
    if any(len(text) > MAX_TEXT for text in corpus.prompts):
        raise Rejected(f"a text of more than {MAX_TEXT} characters")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise Rejected(f"{name} must lie in {low}..{high}, got {value}")
