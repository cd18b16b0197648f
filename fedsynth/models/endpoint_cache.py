"""Answers of endpoints on disk, so that no prompt is paid for twice, also after a kill."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsynth.system.folders import private_folder
from fedsynth.typed import BadValue, build, plain

FORM = 1  # rises when a stored answer would no longer be what is read from it
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What is used of an endpoint's answer to one request.

    Attributes:
        text: The text; None where there is none.
        finish: Why the text ends.
        read: Tokens of the prompt, if the server reports them.
        written: Tokens of the answer, likewise.
        tokens: Of an echoed text.
        logs: Their log-likelihoods.
    """

    text: str | None = None
    finish: str = ""
    read: int | None = None
    written: int | None = None
    tokens: tuple[str, ...] = ()
    logs: tuple[float | None, ...] = ()


class EndpointCache:
    """A folder of answers that only its owner can read: a file for each request, written whole or not at all.

    A damaged file is no answer.

    Args:
        folder: The folder; made if it is not there.

    Raises:
        BadValue: If it cannot be made, or closed to others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.full = folder, False
        try:
            private_folder(folder)
            folder.chmod(0o700)
        except OSError as problem:
            raise BadValue(
                f"the cache of endpoints {str(folder)!r} cannot be used ({problem.strerror}): name another folder in "
                "FEDSYNTH_CACHE, or say cache = false at the endpoint"
            ) from problem

    def get(self, question: Mapping[str, Any]) -> Answer | None:
        """The stored answer to a request; None if there is none, or its file is damaged."""
        try:
            kept = json.loads(self._place(question).read_text(encoding="utf-8"))
            answer = build(Answer, kept["answer"])
        except (OSError, ValueError, KeyError, TypeError):  # not whole: as if it had not been asked
            return None
        return answer if kept.get("sum") == _digest(plain(answer)) else None

    def put(self, question: Mapping[str, Any], answer: Answer) -> None:
        """Stores an answer. A disk that takes no more costs the answer's place, not the run."""
        place = self._place(question)
        told = plain(answer)
        try:
            private_folder(place.parent)
            number, part = tempfile.mkstemp(prefix="part-", dir=place.parent)  # of mode 0600
            try:
                with os.fdopen(number, "w", encoding="utf-8") as file:
                    json.dump({"answer": told, "sum": _digest(told)}, file)
                Path(part).replace(place)
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
        except OSError as problem:
            if not self.full:
                log.warning("answers of endpoints are no longer kept in %s: %s", self.folder, problem.strerror)
            self.full = True

    def _place(self, question: Mapping[str, Any]) -> Path:
        key = _digest({"form": FORM, **question})
        return self.folder / key[:2] / f"{key}.json"


def cache_folder() -> Path:
    """The folder of endpoints' answers: in FEDSYNTH_CACHE, or in a cache folder of the user.

    Raises:
        BadValue: If FEDSYNTH_CACHE is a relative path: processes of a run have other working directories.
    """
    if named := os.environ.get("FEDSYNTH_CACHE", ""):
        if not Path(named).is_absolute():
            raise BadValue(f"FEDSYNTH_CACHE must be an absolute path, got {named!r}")
        return Path(named) / "endpoints"
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "fedsynth" / "endpoints"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
