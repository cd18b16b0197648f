"""Requests whose worker died are sent again in smaller messages, up to `TRIES` tries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from flwr.app import Message

TRIES = 3  # for a client whose worker dies; docs/running.md and deployment/faults.md say so


class WorkerRetry:
    """The tries of one exchange.

    Args:
        stack: This many clients in a row train in one pass.
    """

    def __init__(self, stack: int) -> None:
        self._stack = stack
        self._failed: Counter[int] = Counter()

    def again(self, reply: Message | None, clients: Sequence[int]) -> list[list[int]]:
        """The clients to send to again, message by message; none if no worker died, or if it died too often.

        The requests and their grants are the same again: clients send stored replies as they are. Messages get
        smaller, so that a client that kills its worker takes no other client with it in the end.
        """
        if reply is None or not reply.has_error():
            return []
        self._failed.update(clients)
        if self._failed[clients[0]] >= TRIES:
            return []
        whole = len({client // self._stack for client in clients}) > 1
        return [
            list(part) for _, part in groupby(clients, key=lambda client: client // self._stack if whole else client)
        ]
