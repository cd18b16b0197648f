"""Sites that are asked again, and how soon: not connected, restarted, awaiting approval (the limit: messaging.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.common.constant import ErrorCode as FlowerError

from fedsynth.federation.delivery.sending import Delivery
from fedsynth.federation.messages import ErrorCode, Refused
from fedsynth.federation.nodes import nodes_by_name
from fedsynth.federation.payload import decode
from fedsynth.federation.records import unpacked
from fedsynth.typed import BadValue

ASK_AGAIN_SECONDS = 5.0  # a site that cannot be reached
APPROVAL_SECONDS = 30.0  # a site whose reply waits for a person
NOT_ASKED = "was never connected"
WAITS = "its reply waits for approval there"


@dataclass(frozen=True)
class _Again:
    """The reason for asking a site once more, and the time."""

    why: str
    when: float = field(default_factory=lambda: time.monotonic() + ASK_AGAIN_SECONDS)


class SiteRetry:
    """The sites of one exchange to ask again; none in a simulation.

    Args:
        delivery: Reaches the sites.
        tell: Gets a line for each site where somebody must act.
    """

    def __init__(self, delivery: Delivery, tell: Callable[[str], None]) -> None:
        self._delivery, self._tell = delivery, tell
        self._again: dict[int, _Again] = {}
        self._reached: set[int] = set()
        self._reasons: dict[int, str] = {}  # by client: its latest reason for sending no reply
        self._looked = time.monotonic()

    def __bool__(self) -> bool:
        return bool(self._again)

    def sent(self, messages: Mapping[str, tuple[int, ...]], absent: Iterable[int]) -> None:
        """Takes note of a sending: the clients of its messages, and the sites that were not connected."""
        self._reached.update(client for clients in messages.values() for client in clients)
        self._again |= {client: _Again("it was not connected") for client in absent}

    def postponed(self, client: int, reply: Message | None) -> bool:
        """True if a site's reply is not final: the site is then asked again."""
        if not self._delivery.sites or reply is None or (why := _why_later(reply)) is None:
            return False
        seconds = APPROVAL_SECONDS if why == WAITS else ASK_AGAIN_SECONDS
        self._again[client] = _Again(why, time.monotonic() + seconds)
        if self._reasons.get(client) != why:  # somebody must act at the site
            self._tell(f"site {self._delivery.sites[client]!r}: {why}")
        self._reasons[client] = why
        return True

    def look(self, waiting: dict[str, tuple[int, ...]]) -> None:
        """Takes messages to restarted sites out of `waiting`, each `ASK_AGAIN_SECONDS`: a site that reconnects after a
        crash has lost its request, and the SuperLink does not say so."""
        if not self._delivery.sites or time.monotonic() - self._looked <= ASK_AGAIN_SECONDS:
            return
        now, since = nodes_by_name(self._delivery.grid, self._delivery.sites), self._delivery.since
        lost = [key for key, (client, *_) in waiting.items() if client in now and now[client][1] != since.get(client)]
        self._again |= {waiting.pop(key)[0]: _Again("it was started anew", time.monotonic()) for key in lost}
        self._looked = time.monotonic()

    def due(self) -> list[int]:
        """Takes out the sites that are due to be asked again."""
        due = [client for client, again in self._again.items() if again.when <= time.monotonic()]
        for client in due:
            del self._again[client]
        return due

    def in_vain(self, waiting: Iterable[int], late: str) -> dict[int, str]:
        """After the timeout: by client, the reason why its reply is missing.

        Args:
            waiting: Clients that were asked and have not replied.
            late: The reason given for them.
        """
        found = {client: f"{late}: {self._reasons[client]}" if client in self._reasons else late for client in waiting}
        for client, again in self._again.items():
            found[client] = f"{late}: {again.why}" if client in self._reached else NOT_ASKED
        return found


def _why_later(reply: Message) -> str | None:
    """The reason for asking a site once more; None if its reply is final."""
    if reply.has_error():
        gone = reply.error.code in (FlowerError.NODE_UNAVAILABLE, FlowerError.MESSAGE_UNAVAILABLE)
        return "it could not be reached" if gone else None
    try:
        payload, refused, _ = unpacked(reply.content)
        waits = refused and decode(payload, Refused).code is ErrorCode.AWAITS_APPROVAL
    except BadValue:
        return None
    return WAITS if waits else None
