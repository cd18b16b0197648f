"""Requests whose worker died are sent again, up to `TRIES` times and in smaller messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from flwr.app import Message

TRIES = 3  # to get a request answered by a client whose worker dies; docs/running.md and deployment/faults.md say so


class WorkerRetry:
    """The tries of one exchange.

    Args:
        stack: So many clients in a row train in one pass.
    """

    def __init__(self, stack: int) -> None:
        self._stack = stack
        self._failed: Counter[int] = Counter()

    def again(self, reply: Message | None, clients: Sequence[int]) -> list[list[int]]:
        """The clients whose orders are to be sent again, message by message; none if no worker died, or it did so too
        often.

        The same orders again, under the same grants: stored replies are sent as they are. In smaller messages, so that
        a client that kills its worker takes no other with it in the end.
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
