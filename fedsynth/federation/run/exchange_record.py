"""What clients answered in one exchange, on disk, so that a resumed round need not ask them again."""

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
    """What came of a client: its checked reply, or why there is none.

    Attributes:
        answer: Of the request's class; None before it is checked.
        why: The end of a sentence about the client; None beside a reply.
        payload: The bytes, if they are worth keeping: of a reply, or of a refusal.
        refused: Whether they are a refusal.
        size: Of what came.
        seconds: As `fedsynth.federation.records.unpacked` says.
    """

    reply: Any = None
    why: str | None = None
    payload: bytes = b""
    refused: bool = False
    size: int = 0
    seconds: float | None = None


class ExchangeRecord:
    """Answers of one exchange, kept as they come, and whole once `close` was called.

    Args:
        path: Of its file; where its folder does not exist, nothing is kept.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._part, self._asked = path, path.with_suffix(".coming"), path.with_suffix(".asked")
        self._archive: zipfile.ZipFile | None = None
        self._facts: dict[str, dict[str, Any]] = {}

    def kept(self, asked: Callable[[], str]) -> list[tuple[int, Heard, int]] | None:
        """Each client, what came of it (to be checked again), and the size of its request; None if the exchange is not
        whole.

        Args:
            asked: Digest of the requests.

        Raises:
            BadValue: If it was begun with other requests: then the code, or what it reads, is not what it was.
        """
        if not self._asked.is_file():
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
        """Keeps the digest of the requests that were sent."""
        if self._path.parent.is_dir():
            write_whole(self._asked, asked.encode())

    def keep(self, client: int, heard: Heard, down: int) -> None:
        """Writes down what came of a client: its bytes if they can be read, else why not. A resumed run reads it again.

        Args:
            client: Whose.
            heard: What came.
            down: Size of its request.
        """
        if not self._path.parent.is_dir():
            return
        if self._archive is None:
            self._archive = zipfile.ZipFile(self._part, "w", zipfile.ZIP_STORED)
        self._archive.writestr(str(client), heard.payload)
        what = {"refused": heard.refused} if heard.payload else {"why": heard.why, "up": heard.size}
        self._facts[str(client)] = {**what, "seconds": heard.seconds, "down": down}

    def close(self) -> None:
        """All is there that will come."""
        if self._archive is not None:
            self._archive.writestr("head.json", json.dumps({"clients": self._facts}))
            self._archive.close()
            self._part.replace(self._path)


def _recalled(data: bytes, facts: dict[str, Any]) -> Heard:
    seconds = facts.get("seconds")
    if "why" in facts:
        return Heard(why=facts["why"], size=facts.get("up", 0), seconds=seconds)
    return Heard(payload=data, refused=facts["refused"], size=len(data), seconds=seconds)
