"""LocalGrid: the real client app in this process, without SuperLink, network and Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """Delivers messages to a ClientApp by a call; keeps what crossed, so that tests can look at it.

    Args:
        app: The client app.
        nodes: Number of SuperNodes.
        run_config: What `flwr run` would hand to every app.
        spoil: Called with each request; what it returns instead of None is the reply (faults).
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: int,
        run_config: Mapping[str, Any],
        spoil: Callable[[Message], Message | None] = lambda _: None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.app, self.spoil = app, spoil
        # Ids are not in the order of partitions, as in Flower.
        self.contexts = {
            1000 + (7 * p) % 101: Context(
                1, 1000 + (7 * p) % 101, {"partition-id": p, "num-partitions": nodes}, RecordDict(), dict(run_config)
            )
            for p in range(nodes)
        }
        self.requests: list[Message] = []
        self.replies: list[Message] = []
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return set(self.contexts)

    def get_nodes(self) -> Iterable[Any]:
        return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        keys = []
        for message in messages:
            key = f"message-{len(self.requests)}"
            message.metadata.__dict__["_message_id"] = key
            self.requests.append(message)
            self._waiting[key] = message
            keys.append(key)
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        # Last first: replies come in any order.
        for key in reversed([k for k in message_ids if k in self._waiting]):
            message = self._waiting.pop(key)
            reply = self.spoil(message) or self.app(message, self.contexts[message.metadata.dst_node_id])
            self.replies.append(reply)
            yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return list(self.pull_messages(list(self.push_messages(messages))))

    def requests_of(self, task: str) -> list[Message]:
        return [m for m in self.requests if m.metadata.message_type == task]

    def replies_in_order(self) -> list[Message]:
        """One reply per order, in the order of orders."""
        by_key = {r.metadata.reply_to_message_id: r for r in self.replies}
        return [by_key[o.metadata.message_id] for o in self.requests]
