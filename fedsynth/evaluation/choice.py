"""Which of some wordings a language model chooses: by their likelihoods, and by what it writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsynth.corpus import same

if TYPE_CHECKING:
    from fedsynth.models.chat import Prompt


def likeliest(llm: Any, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[int | None]:
    """The place of the likeliest reply to each prompt, by the mean log-likelihood of its tokens, so that a long wording
    is not at a disadvantage; of equally likely ones the first. None if no reply can be scored.

    Args:
        llm: A `TextModel` that scores.
        prompts: Any number of prompts.
        replies: The replies to choose from, as they go on after each prompt.
    """
    if not prompts:
        return []
    means = llm.score([p for p in prompts for _ in replies], [r for _ in prompts for r in replies])
    table = np.asarray(means, dtype=float).reshape(len(prompts), len(replies))
    table[np.isnan(table)] = -math.inf
    return [int(row.argmax()) if np.isfinite(row).any() else None for row in table]


def said_choice(response: str, choices: Sequence[str]) -> str | None:
    """The wording that a response holds; None if it holds none, or several.

    Case and blanks make no difference. A wording within a longer one that is there does not count.

    >>> said_choice("It is about a lost card.", ["a lost card", "a card"])
    'a lost card'
    >>> said_choice("a card, or a PIN", ["a card", "a PIN"]) is None
    True
    """
    rest, found = same(response), []
    for wording in sorted(choices, key=lambda wording: -len(same(wording))):
        if same(wording) in rest:
            found.append(wording)
            rest = rest.replace(same(wording), "\0")
    return found[0] if len(found) == 1 else None


def parsed_scores(truth: Sequence[str], said: Sequence[str | None]) -> dict[str, float]:
    """Share of right answers among all, an unreadable one being wrong, and share of readable ones; both in 0..1."""
    if not truth:
        return {"parsed_accuracy": 0.0, "readable": 0.0}
    right = sum(a == b for a, b in zip(truth, said, strict=True))
    return {"parsed_accuracy": right / len(truth), "readable": sum(b is not None for b in said) / len(truth)}
