"""The replies of one exchange on disk, so that a resumed round need not ask the clients again."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsynth.federation.run.whole_files import write_whole
from fedsynth.typed import BadValue


@dataclass(frozen=True)
class Heard:
    """A client's outcome: its checked reply, or the reason why there is none.

    Attributes:
        reply: An object of the request's reply class; None before it is checked.
        why: The reason, as the end of a sentence about the client; None beside a reply.
        payload: The bytes of a readable reply or refusal; empty otherwise.
        refused: True if the payload is a refusal.
        size: Size of the received payload in bytes.
        seconds: The client's CPU time; None for real sites.
    """

    reply: Any = None
    why: str | None = None
    payload: bytes = b""
    refused: bool = False
    size: int = 0
    seconds: float | None = None


class ExchangeRecord:
    """The replies of one exchange, stored as they come; the file is whole after `close`.

    Args:
        path: The file; nothing is stored for None, or if its folder does not exist.
    """

    def __init__(self, path: Path | None) -> None:
        self._stored = path is not None and path.parent.is_dir()
        path = path or Path("nowhere")
        self._path, self._part, self._asked = path, path.with_suffix(".coming"), path.with_suffix(".asked")
        self._archive: zipfile.ZipFile | None = None
        self._facts: dict[str, dict[str, Any]] = {}

    def kept(self, asked: Callable[[], str]) -> list[tuple[int, Heard, int]] | None:
        """Each client, its outcome (to be checked again) and the size of its request; None if the file is not whole.

        Args:
            asked: Gives the digest of the requests.

        Raises:
            BadValue: If the exchange began with other requests: the code, or its inputs, have changed since.
        """
        if not self._stored or not self._asked.is_file():
            return None
        if self._asked.read_text() != asked():
            raise BadValue(
                f"{self._path.stem} was begun with other requests than those of the resumed round: software, "
                "models or files have changed since; run the scenario anew"
            )
        try:
            with zipfile.ZipFile(self._path) as archive:
                clients = json.loads(archive.read("head.json"))["clients"]
                found = [(int(client), archive.read(client), facts) for client, facts in clients.items()]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):  # not there, or not whole: clients are asked again
            return None
        return [(client, _recalled(data, facts), facts["down"]) for client, data, facts in found]

    def begin(self, asked: str) -> None:
        """Stores the digest of the requests that were sent."""
        if self._stored:
            write_whole(self._asked, asked.encode())

    def keep(self, client: int, heard: Heard, down: int) -> None:
        """Stores a client's outcome: the bytes of its reply if they can be read, else the reason.

        Args:
            client: The client.
            heard: Its outcome.
            down: Size of its request in bytes.
        """
        if not self._stored:
            return
        if self._archive is None:
            self._archive = zipfile.ZipFile(self._part, "w", zipfile.ZIP_STORED)
        self._archive.writestr(str(client), heard.payload)
        what = {"refused": heard.refused} if heard.payload else {"why": heard.why, "up": heard.size}
        self._facts[str(client)] = {**what, "seconds": heard.seconds, "down": down}

    def close(self) -> None:
        """Completes the file: no more replies will come."""
        if self._archive is not None:
            self._archive.writestr("head.json", json.dumps({"clients": self._facts}))
            self._archive.close()
            self._part.replace(self._path)


def _recalled(data: bytes, facts: dict[str, Any]) -> Heard:
    seconds = facts.get("seconds")
    if "why" in facts:
        return Heard(why=facts["why"], size=facts.get("up", 0), seconds=seconds)
    return Heard(payload=data, refused=facts["refused"], size=len(data), seconds=seconds)
