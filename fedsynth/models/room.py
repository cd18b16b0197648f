"""Checks before a request that prompts fit into a model, as one text must not end a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedsynth.models.chat import Prompt

TOO_LONG = "too long"
UNREADABLE = "unreadable to the model"


def misfits(
    model: Any, prompts: Sequence[Prompt], more: int = 0, continuations: Sequence[str] | None = None
) -> list[str | None]:
    """The reason why each prompt does not fit; None if it fits, or if the model cannot tell (an endpoint).

    Args:
        model: A `TextModel`; one that can tell has a method of this name.
        prompts: Any number of prompts.
        more: Number of new tokens that need room after each prompt.
        continuations: Texts to score after the prompts; left out, none.
    """
    tell = getattr(model, "misfits", None)
    found: list[str | None] = [None] * len(prompts) if tell is None else tell(prompts, more, continuations)
    return found
