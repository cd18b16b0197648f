"""Tokens that a language model has read and written, and the record of those that went to an endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedsynth.scenario.server import Endpoint


@dataclass
class TokenUsage:
    """Tokens so far, as far as they are known."""

    read: int = 0
    written: int = 0


class Egress(Protocol):
    """Takes down what goes out to endpoints: `fedsynth.federation.run.egress`."""

    def unguarded(self) -> bool:
        """True if prompts may now hold text without a guarantee, which is kept nowhere but in the run."""

    def sent(self, to: Endpoint) -> None:
        """A request goes out; one that is repeated goes out again."""

    def answered(self, to: Endpoint, read: int, written: int) -> None:
        """An answer came, with its tokens as the server reports them."""

    def recalled(self, to: Endpoint, read: int, written: int) -> None:
        """The cache answered; the tokens are those of the first time."""

    def spent(self, to: Endpoint) -> int:
        """Tokens of the answers so far, of the whole run, from before a resumption, too."""
