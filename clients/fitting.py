"""A client's model that never fails at a text: a text that it cannot read, or that does not fit, gets an empty result.

One private text must not decide if the client replies (docs/privacy.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from fedsynth.models.batches import given_rows, token_rows
from fedsynth.models.chat import Chat, Prompt, check_asked
from fedsynth.models.llm import LocalLLM
from fedsynth.models.sampling import SamplingParams

T = TypeVar("T")


class Fitting:
    """`LocalLLM` for prompts that hold private text.

    Args:
        llm: Completes and scores the prompts that fit.
    """

    def __init__(self, llm: LocalLLM):
        self.llm = llm

    @property
    def chats(self) -> bool:
        """As the model itself."""
        return self.llm.chats

    @property
    def structured(self) -> bool:
        """As the model itself."""
        return self.llm.structured

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int) -> list[str]:
        """As `LocalLLM.complete`; "" for a prompt that does not fit."""
        check_asked(prompts, self.llm.tokenizer)  # that is no matter of one private text

        def those(rows: Sequence[int]) -> list[str]:
            chosen = [prompts[row] for row in rows]
            return self.llm.complete(chosen, sampling, seed=seed)

        return _whatever_fits(those, len(prompts), lambda row: self._fits(prompts[row], sampling.max_new_tokens), "")

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        """As `LocalLLM.score`; minus infinity for a pair that does not fit."""
        check_asked(prompts, self.llm.tokenizer)

        def those(rows: Sequence[int]) -> list[float]:
            return self.llm.score([prompts[row] for row in rows], [continuations[row] for row in rows])

        return _whatever_fits(
            those, len(prompts), lambda row: self._fits(prompts[row], 0, continuations[row]), -math.inf
        )

    def _fits(self, text: Prompt, more: int, continuation: str = "") -> bool:
        try:
            if isinstance(text, Chat):
                [tokens] = given_rows(self.llm.tokenizer, [text], self.llm.kind, [continuation])
            else:
                [tokens] = token_rows(self.llm.tokenizer, [text + continuation], self.llm.kind)
        except Exception:  # each tokenizer raises its own
            return False
        return self.llm.context is None or len(tokens) + more <= self.llm.context


def _whatever_fits(
    work: Callable[[Sequence[int]], list[T]], count: int, fits: Callable[[int], bool], instead: T
) -> list[T]:
    """Runs the work on all rows; if that fails, on those that fit."""
    try:
        return work(range(count))
    except Exception:  # of the model's checks, or the tokenizer's own
        rows = [row for row in range(count) if fits(row)]
        if len(rows) == count:
            raise
    found = [instead] * count
    for row, each in zip(rows, work(rows), strict=True):
        found[row] = each
    return found
