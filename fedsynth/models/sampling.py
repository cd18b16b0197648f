"""Sampling parameters of a language model, one object for every call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one call, for all of its prompts.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: In (0, 1]: only the smallest set of likeliest tokens that holds this much of the mass is drawn from.
        top_k: Only so many of the likeliest tokens are drawn from, and `top_p` is of their mass; 0 for all tokens.
        max_new_tokens: At most so many new tokens for each prompt.
        one_line: A text ends with its first line that is not blank, which is all that is given back.

    Raises:
        ValueError: If a parameter is out of range.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int
    one_line: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")

    @classmethod
    def greedy(cls, max_new_tokens: int, *, one_line: bool = False) -> SamplingParams:
        """The likeliest token each time."""
        return cls(temperature=0.0, max_new_tokens=max_new_tokens, one_line=one_line)
