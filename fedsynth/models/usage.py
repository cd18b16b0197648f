"""Tokens that a language model has read and written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TokenUsage:
    """So far, as far as is known."""

    read: int = 0
    written: int = 0
