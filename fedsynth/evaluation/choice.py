"""Which of some replies a language model chooses: by their likelihoods, and by what it writes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsynth.corpus import LETTERS, same

if TYPE_CHECKING:
    from fedsynth.models.chat import Prompt


def likeliest(llm: Any, prompts: Sequence[Prompt], replies: Sequence[Sequence[str]]) -> list[int | None]:
    """The place of the likeliest of each prompt's replies; of equally likely ones the first. None if none has a score.

    A reply counts by the mean log-likelihood of its tokens, so that a long wording is not at a disadvantage.

    Args:
        llm: A `TextModel` that scores.
        prompts: Any number of prompts.
        replies: For each prompt, the replies to choose from, as they go on after it.
    """
    if not prompts:
        return []
    asked = [prompt for prompt, own in zip(prompts, replies, strict=True) for _ in own]
    means = np.asarray(llm.score(asked, [reply for own in replies for reply in own]), dtype=float)
    means[np.isnan(means)] = -math.inf
    rows = np.split(means, np.cumsum([len(own) for own in replies])[:-1])
    return [int(row.argmax()) if np.isfinite(row).any() else None for row in rows]


def said_choice(response: str, choices: Sequence[str]) -> str | None:
    """The wording that a response holds; None if it holds none, or several.

    Case and blanks make no difference. A wording within a longer one that is there, or within a word, does not count.

    >>> said_choice("It is about a lost card.", ["a lost card", "a card"])
    'a lost card'
    >>> said_choice("a card, or a PIN", ["a card", "a PIN"]) is None
    True
    """
    rest, found = same(response), []
    for wording in sorted(choices, key=lambda wording: -len(same(wording))):
        rest, there = re.subn(rf"(?<!\w){re.escape(same(wording))}(?!\w)", "\0", rest)
        if there:
            found.append(wording)
    return found[0] if len(found) == 1 else None


_NAMED = re.compile(r"(?:^|\banswer(?:\s+is|:))[\s(*\[]*([A-Z])(?=[).:*\]]|\s*(?:\n|$))")


def said_option(response: str, options: Sequence[str]) -> str | None:
    """The letter that a response begins with, or names as its answer, else that of the one option whose text it holds;
    None if there is none, or several.

    >>> said_option("B. zinc", ["wood", "zinc"]), said_option("The answer is (B).", ["wood", "zinc"])
    ('B', 'B')
    >>> said_option("A metal is zinc", ["wood", "zinc"])
    'B'
    >>> said_option("C", ["wood", "zinc"]) is None
    True
    """
    if named := set(_NAMED.findall(response)):
        return named.pop() if len(named) == 1 and named <= set(LETTERS[: len(options)]) else None
    said = said_choice(response, options)
    return None if said is None else LETTERS[options.index(said)]


def parsed_scores(truth: Sequence[str], said: Sequence[str | None]) -> dict[str, float]:
    """Share of right answers among all, an unreadable one being wrong, and share of readable ones; both in 0..1."""
    if not truth:
        return {"parsed_accuracy": 0.0, "readable": 0.0}
    right = sum(a == b for a, b in zip(truth, said, strict=True))
    return {"parsed_accuracy": right / len(truth), "readable": sum(b is not None for b in said) / len(truth)}
