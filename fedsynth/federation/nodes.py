"""The node of each client: found by the node's partition, or by the name of a site's registered key."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsynth.federation.delivery.worker_retry import TRIES
from fedsynth.typed import BadValue, build, visible

WHO = "query.who"
POLL_SECONDS = 0.05


class TooFewReplies(RuntimeError):
    """Fewer clients gave a usable reply than the quorum asks for; the message names the others and their reasons."""


@dataclass(frozen=True)
class Deployment:
    """A run between real sites; a run-config without one is a simulation.

    Attributes:
        run: Public id of the run: sites recognise its repeated requests by it, also after a restart.
        sites: Names under which the sites' keys were registered; a site's position is its client number.
        measured: Ask for figures of the sites' models on their test rows. No epsilon covers them, and sites refuse
            unless their policies allow them.
    """

    run: str
    sites: tuple[str, ...]
    measured: bool = False

    @classmethod
    def read(cls, text: str) -> Deployment | None:
        """From a run-config's JSON; None if it is empty.

        Raises:
            BadValue: If it is no deployment.
        """
        if not text:
            return None
        try:
            return build(cls, json.loads(text), "deployment")
        except json.JSONDecodeError as problem:
            raise BadValue(f"the run-config's deployment is not JSON: {problem}") from problem


def nodes_by_client(grid: Grid, clients: int, *, stack: int = 1, seconds: float = 3600.0) -> dict[int, int]:
    """Client -> id of its node; node ids are random, so each node is asked for its partition.

    With fewer nodes than clients, SuperNode p of N hosts stacks p, p + N, p + 2 N, ... of clients.

    Args:
        grid: Flower's grid.
        clients: Number of clients.
        stack: This many clients in a row train in one pass.
        seconds: Longest wait for all nodes (server.start_seconds): their registration races the start of a run.

    Raises:
        TooFewReplies: If fewer nodes register and reply than there are partitions.
    """
    begun = time.monotonic()
    places: dict[int, int] = {}
    failed = Counter[int]()
    partitions = 1
    while len(places) < partitions:
        taken = time.monotonic() - begun
        if taken > seconds:
            raise TooFewReplies(
                f"{len(places)} of {partitions} SuperNodes said which partition they hold after "
                f"{taken:.0f} s (server.start_seconds): the machine is too busy; wait until it is less "
                "so, take fewer --workers, or raise that key"
            )
        new = [node for node in grid.get_node_ids() if node not in places.values()]
        asked = [Message(RecordDict({"who": ConfigRecord({})}), message_type=WHO, dst_node_id=node) for node in new]
        if not asked:
            time.sleep(POLL_SECONDS)
            continue
        for reply in grid.send_and_receive(asked, timeout=max(1.0, seconds - taken)):
            if reply.has_error():  # its worker may have died
                failed[reply.metadata.src_node_id] += 1
                if failed[reply.metadata.src_node_id] >= TRIES:
                    raise TooFewReplies(f"a SuperNode could not run the client app: {first_line(reply)}")
                continue
            try:
                facts = cast(ConfigRecord, reply.content["who"])
                partition, partitions = (int(str(facts[key])) for key in ("partition-id", "num-partitions"))
            except (KeyError, TypeError, ValueError) as problem:
                raise TooFewReplies("a SuperNode's client app does not say which partition it holds") from problem
            places[partition] = reply.metadata.src_node_id
    ordered = [places[p] for p in sorted(places)]
    return {client: ordered[client // stack % len(ordered)] for client in range(clients)}


def nodes_by_name(grid: Grid, names: Sequence[str]) -> dict[int, tuple[int, str]]:
    """The named sites that are connected: number -> node id and time of connection.

    An operator of the server registers each key under a name, so that no site can claim to be another.

    Raises:
        TooFewReplies: If two nodes have the same name.
    """
    online = [node for node in grid.get_nodes() if node.status == "online"]
    for name, count in Counter(str(node.name) for node in online).items():
        if count > 1 and name in names:  # Flower makes keys unique, not names
            raise TooFewReplies(
                f"{count} SuperNodes are registered as {name!r}: find out who they are, and remove all "
                "but one, before anything is asked"
            )
    known = {str(node.name): (int(node.node_id), str(node.last_activated_at)) for node in online}
    return {number: known[name] for number, name in enumerate(names) if name in known}


def first_line(reply: Message) -> str:
    """The first line of an error's reason."""
    return visible(((reply.error.reason or "").strip().splitlines() or ["no reason given"])[0][:200])
