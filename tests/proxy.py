"""A TCP proxy in this process that counts what passes, and can be cut: connections are lost, new ones refused."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Between 127.0.0.1:port and a target on this machine.

    Attributes:
        target: Port of who is behind it.
        passed: (Time, "up" or "down", bytes) of each piece; up is towards the target.
    """

    target: int
    passed: list[tuple[float, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cut = threading.Event()
        self._ended = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float) -> None:
        """Nothing passes for so long; a connection that is tried meanwhile is closed at once."""
        self._cut.set()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self._cut.clear()

    def bytes(self, way: str, begin: float = 0.0, end: float = float("inf")) -> int:
        """How much passed one way between two times."""
        return sum(size for at, direction, size in self.passed if direction == way and begin <= at < end)

    def close(self) -> None:
        self._ended.set()
        self._listener.close()
        for end in list(self._open):
            end.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._cut.is_set():
                client.close()
                continue
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.target), timeout=10)
        except OSError:
            client.close()
            return
        pair = {client: (server, "up"), server: (client, "down")}
        self._open |= set(pair)
        with selectors.DefaultSelector() as ready, contextlib.suppress(OSError):
            for end in pair:
                end.setblocking(True)
                ready.register(end, selectors.EVENT_READ)
            while not self._ended.is_set():
                for key, _ in ready.select(1.0):
                    end = key.fileobj
                    assert isinstance(end, socket.socket)
                    piece = end.recv(65536)
                    if not piece:
                        raise OSError
                    other, way = pair[end]
                    other.sendall(piece)
                    self.passed.append((time.time(), way, len(piece)))
        for end in pair:
            self._open.discard(end)
            end.close()


DEAD = "http://127.0.0.1:9"  # where nobody listens
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


def behind_a_dead_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment whose proxies, in small letters and capitals, answer to nobody, without any exception."""
    kept = {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}
    return kept | {spelt: DEAD for name in PROXIES for spelt in (name, name.upper())}
