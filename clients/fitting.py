"""A client's model that fails at no text: what it cannot read, or leaves it no room, gets an empty text.

Whether there is an answer must not depend on one private text (docs/privacy.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedsynth.batches import token_rows
from fedsynth.llm import LocalLLM


class Fitting:
    """`LocalLLM` for prompts that hold private text.

    Args:
        model: What completes and scores those that fit.
    """

    def __init__(self, model: LocalLLM):
        self.model = model

    def complete(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float, top_p: float = 1.0, seed: int
    ) -> list[str]:
        """As `LocalLLM.complete`; "" for a prompt that does not fit."""
        fits = [place for place, prompt in enumerate(prompts) if self._fits(prompt, max_tokens)]
        found = [""] * len(prompts)
        written = self.model.complete(
            [prompts[i] for i in fits], max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        for place, text in zip(fits, written, strict=True):
            found[place] = text
        return found

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """As `LocalLLM.score`; no likelihood at all for a pair that does not fit."""
        pairs = list(zip(prompts, continuations, strict=True))
        fits = [place for place, (prompt, text) in enumerate(pairs) if self._fits(prompt + text, 0)]
        found = [-math.inf] * len(pairs)
        scored = self.model.score([prompts[i] for i in fits], [continuations[i] for i in fits])
        for place, value in zip(fits, scored, strict=True):
            found[place] = value
        return found

    def _fits(self, text: str, more: int) -> bool:
        try:
            [tokens] = token_rows(self.model.tokenizer, [text], self.model.kind)
        except Exception:  # each tokenizer has its own
            return False
        return self.model.context is None or len(tokens) + more <= self.model.context
