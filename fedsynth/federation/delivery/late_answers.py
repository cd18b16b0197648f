"""Answers that come after their time: they are not used, but what they released is accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import RecordDict

from fedsynth.federation.delivery.sending import Delivery
from fedsynth.federation.messages import Request

IN_VAIN = "gave no reply in time"


class LateAnswers:
    """Messages whose time was over, and what still comes to them.

    Args:
        delivery: The way that they were sent.
    """

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._missing: dict[str, tuple[tuple[int, ...], int, Mapping[int, Request[Any]]]] = {}

    def expect(
        self, messages: Mapping[str, tuple[int, ...]], exchange: int, requests: Mapping[int, Request[Any]]
    ) -> None:
        """Remembers messages that are not answered.

        Args:
            messages: The clients that each is for, by its id.
            exchange: In which it was sent.
            requests: Of that exchange, by client.
        """
        self._missing |= {message: (clients, exchange, requests) for message, clients in messages.items()}

    def come(self) -> Iterator[tuple[int, int, Request[Any], RecordDict | str]]:
        """What has come since: client, exchange, request, and the reply, or why there is none."""
        if not self._missing:
            return
        for key, reply in self._delivery.pulled(list(self._missing)):
            clients, exchange, requests = self._missing.pop(key)
            for client, content in self._delivery.divided(reply, clients):
                yield client, exchange, requests[client], content
