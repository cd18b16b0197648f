"""Tokens that a language model has read and written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TokenUsage:
    """Tokens so far, as far as they are known."""

    read: int = 0
    written: int = 0
