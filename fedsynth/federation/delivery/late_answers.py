"""Replies that come after the timeout: they are not used, but their privacy spending is counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import RecordDict

from fedsynth.federation.delivery.sending import Delivery
from fedsynth.federation.messages import Request

IN_VAIN = "gave no reply in time"


class LateAnswers:
    """Messages past their timeout, and the replies that still come to them.

    Args:
        delivery: The delivery that sent the messages.
    """

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._missing: dict[str, tuple[tuple[int, ...], int, Mapping[int, Request[Any]]]] = {}

    def expect(
        self, messages: Mapping[str, tuple[int, ...]], exchange: int, requests: Mapping[int, Request[Any]]
    ) -> None:
        """Remembers messages without a reply.

        Args:
            messages: By message id, the clients that it is for.
            exchange: Number of the exchange that sent them.
            requests: The requests of that exchange, by client.
        """
        self._missing |= {message: (clients, exchange, requests) for message, clients in messages.items()}

    def come(self) -> Iterator[tuple[int, int, Request[Any], RecordDict | str]]:
        """Each reply that has come since: client, exchange, request, and the reply or the reason why it is missing."""
        if not self._missing:
            return
        for key, reply in self._delivery.pulled(list(self._missing)):
            clients, exchange, requests = self._missing.pop(key)
            for client, content in self._delivery.divided(reply, clients):
                yield client, exchange, requests[client], content
