"""Whether what a model is to read fits into it: found out before it is asked, as one text must not end a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedsynth.models.chat import Prompt

TOO_LONG = "too long"
UNREADABLE = "unreadable to the model"


def misfits(
    model: Any, prompts: Sequence[Prompt], more: int = 0, continuations: Sequence[str] | None = None
) -> list[str | None]:
    """Why a model cannot be asked, prompt by prompt; None where it can, or does not tell (an endpoint's may not fit).

    Args:
        model: A `TextModel`; one that tells has a method of this name.
        prompts: Any number.
        more: New tokens that are to find room behind each.
        continuations: What is scored after each; left out: nothing.
    """
    tell = getattr(model, "misfits", None)
    found: list[str | None] = [None] * len(prompts) if tell is None else tell(prompts, more, continuations)
    return found
