"""Requests as messages to nodes, one message per node; replies divided among their clients."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types

from fedsynth.federation.messages import Request
from fedsynth.federation.nodes import first_line, nodes_by_name
from fedsynth.federation.records import joined, parted, payload_bytes

UNUSABLE = "sent an unusable reply"
LARGEST_MESSAGE = 2**25  # bytes of requests that are joined; cut between stacks
# Flower raises these while it unpacks a reply that a SuperNode made up; a lost connection raises others.
UNPACKING = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, RecursionError,
             struct.error, DecodeError)  # fmt: skip


@dataclass
class Delivery:
    """The way to the clients of one cell.

    Attributes:
        grid: Flower's grid.
        nodes: Client -> node id.
        sites: Names of real sites, by client; each sending looks up their nodes again. Empty in a simulation.
        stack: This many clients in a row train in one pass.
        since: By client, the time at which its site had connected when it was last sent something.
    """

    grid: Grid
    nodes: Mapping[int, int]
    sites: Sequence[str]
    stack: int
    since: dict[int, str] = field(default_factory=dict)

    def send(
        self, requests: Mapping[int, Request[Any]], clients: Iterable[int], pack: Callable[[int], RecordDict]
    ) -> tuple[dict[str, tuple[int, ...]], list[int]]:
        """Sends these clients' requests, one message per node: a message costs more than training a tiny model.

        Args:
            requests: By client.
            clients: The clients to send to.
            pack: Client -> its request as the content of a message.

        Returns:
            By message id, the clients that it is for; and the sites that are not connected now.
        """
        sent: dict[str, tuple[int, ...]] = {}
        absent: list[int] = []
        if self.sites:
            found = nodes_by_name(self.grid, self.sites)
            self.nodes = {client: node for client, (node, _) in found.items()}
            self.since |= {client: since for client, (_, since) in found.items()}
        ready: dict[int, dict[int, RecordDict]] = {}
        sizes: dict[int, int] = {}
        for client in clients:
            content = pack(client)
            size = payload_bytes(content)
            if self.sites and client not in self.nodes:
                absent.append(client)
                continue
            node = self.nodes[client]
            # Never cut within a stack: the clients of one pass must not depend on the other clients of the node.
            if (
                ready.get(node)
                and sizes[node] + size > LARGEST_MESSAGE
                and client // self.stack != next(reversed(ready[node])) // self.stack
            ):
                sent |= self._push(requests, node, ready.pop(node))
            ready.setdefault(node, {})[client] = content
            sizes[node] = size + (sizes[node] if len(ready[node]) > 1 else 0)
        for node, contents in ready.items():
            sent |= self._push(requests, node, contents)
        return sent, absent

    def _push(
        self, requests: Mapping[int, Request[Any]], node: int, contents: Mapping[int, RecordDict]
    ) -> dict[str, tuple[int, ...]]:
        task = requests[next(iter(contents))].task
        message = Message(joined(list(contents.values())), message_type=task, dst_node_id=node)
        [key] = self.grid.push_messages([message])
        return {str(key): tuple(contents)}

    def pulled(self, keys: Sequence[str]) -> Iterator[tuple[str, Message | None]]:
        """The replies that are there now, by message id; None for one that cannot be unpacked.

        Replies of sites are pulled one by one: Flower unpacks all that it is asked for together, and hands out none
        if one of them fails. The id is the one that was asked for, not the one that a site writes into its reply.
        """
        if not self.sites:
            for reply in self.grid.pull_messages(keys):
                yield reply.metadata.reply_to_message_id, reply
            return
        for key in keys:
            try:
                replies = list(self.grid.pull_messages([key]))
            except UNPACKING:
                yield key, None
            else:
                yield from ((key, reply) for reply in replies[:1])

    def divided(self, reply: Message | None, clients: Sequence[int]) -> Iterable[tuple[int, RecordDict | str]]:
        """Each client's part of a reply, or the reason why it is missing."""
        if reply is None:
            return [(client, f"{UNUSABLE}: its message cannot be read") for client in clients]
        if reply.has_error():
            # A real site writes its own error's text, so the text is not repeated.
            why = f"Flower's error {reply.error.code}" if self.sites else first_line(reply)
            return [(client, f"its worker failed: {why}") for client in clients]
        parts = parted(reply.content)
        if len(parts) != len(clients):
            return [(client, f"sent {len(parts)} replies to {len(clients)} requests") for client in clients]
        return zip(clients, parts, strict=True)
