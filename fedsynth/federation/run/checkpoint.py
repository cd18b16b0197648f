"""Checkpoints of a cell on disk: a killed run resumes and reaches the results that it would have had.

A round is a function of clients and state, and its random streams follow from public seeds. So the checkpoint holds
the state after the last round and, for the round in progress, all that took long: the replies of each exchange and of
the LLM. A resumed round runs again from its first line with these; clients repeat their stored replies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from fedsynth.federation.payload import BadPayload, decode, encode
from fedsynth.federation.run.exchange_record import ExchangeRecord
from fedsynth.federation.run.whole_files import write_whole
from fedsynth.typed import BadValue

T = TypeVar("T")


@dataclasses.dataclass
class Checkpoint:
    """The folder of one cell: `round-N` holds state and record after round N, and the replies so far of round N + 1.

    The rows of the run log only grow: each round appends its own to one file, a line for each round, and the record
    says how many hold.

    Attributes:
        folder: The cell's folder; made when something is saved.
        round: Number of completed rounds.
        appended: Rows of the run log in their file, and its bytes.
    """

    folder: Path
    round: int = 0
    appended: tuple[int, int] = (0, 0)

    def save(self, round: int, state: object, record: Mapping[str, Any]) -> None:
        """Saves a completed round, whole or not at all, and removes earlier ones.

        Args:
            round: Number of the completed round; 0 before the first.
            state: The strategy's state.
            record: The run log's record, plain JSON; its `rows` begin with those of the earlier round.

        Raises:
            BadValue: If the state is no dataclass of values that a payload can hold; the earlier round is still there.
        """
        data = storable(state)
        draft = self.folder / ".part"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write_whole(draft / STATE, data)
        appended = self._append(record.get("rows", ()))
        write_whole(draft / RECORD, json.dumps({**record, "rows": [], "appended": appended}).encode())
        whole = self._at(round)
        shutil.rmtree(whole, ignore_errors=True)
        draft.rename(whole)
        self.round, self.appended = round, appended
        for number, place in self._rounds():
            if number != round:
                shutil.rmtree(place, ignore_errors=True)

    def load(self, kind: type[T]) -> tuple[T, dict[str, Any]] | None:
        """State and record of the last completed round, and sets `round` to it; None if there is none.

        Args:
            kind: The state's class.

        Raises:
            BadValue: If the state is another strategy's, or cannot be read.
        """
        found = max(self._rounds(), default=None)
        if found is None:
            return None
        self.round, place = found
        try:
            state = decode((place / STATE).read_bytes(), kind, trusted=True)
            record = json.loads((place / RECORD).read_text())
            count, size = self.appended = tuple(record.pop("appended", (0, 0)))  # earlier versions wrote the rows here
            lines = (self.folder / ROWS).read_bytes()[:size].splitlines() if count else []
            rows = [row for line in lines for row in json.loads(line)]
            if len(rows) != count:
                raise ValueError(f"{ROWS} holds {len(rows)} of {count} rows")
            return state, {**record, "rows": [*record.get("rows", ()), *rows]}
        except (BadPayload, OSError, ValueError) as problem:
            raise BadValue(f"the checkpoint {place} cannot be read ({problem}): run the scenario anew") from problem

    def finish(self, record: Mapping[str, Any]) -> None:
        """Saves the record of a completed cell and removes its rounds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / DONE, json.dumps(record).encode())
        (self.folder / ROWS).unlink(missing_ok=True)
        for _, place in self._rounds():
            shutil.rmtree(place, ignore_errors=True)

    def finished(self) -> dict[str, Any] | None:
        """The record of a completed cell; None while it is not completed."""
        path = self.folder / DONE
        return json.loads(path.read_text()) if path.is_file() else None

    def exchange(self, number: int) -> ExchangeRecord:
        """The record of clients' replies in an exchange of the round in progress."""
        return ExchangeRecord(self._at(self.round) / f"exchange-{number}.zip")

    def recalled(self, question: Any, ask: Callable[[], T]) -> T:
        """The reply to a question in the round in progress: the stored one, or a new one, which is then stored.

        Args:
            question: All that the reply depends on, plain JSON.
            ask: Gives the reply, plain JSON.
        """
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        path = self._at(self.round) / f"said-{key}.json"
        if path.is_file():
            kept: T = json.loads(path.read_text())
            return kept
        reply = ask()
        if path.parent.is_dir():
            write_whole(path, json.dumps(reply).encode())
        return reply

    def _append(self, rows: Sequence[Any]) -> tuple[int, int]:
        """Appends the new rows, behind those of the last completed round; the number of all, and their bytes.

        A process that was killed in mid-save has left rows that no record counts: they go.
        """
        count, size = self.appended
        line = f"{json.dumps(rows[count:])}\n".encode()
        with (self.folder / ROWS).open("ab") as file:
            file.truncate(size)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return len(rows), size + len(line)

    def _at(self, round: int) -> Path:
        return self.folder / f"round-{round}"

    def _rounds(self) -> list[tuple[int, Path]]:
        return [(int(place.name.removeprefix("round-")), place) for place in self.folder.glob("round-*")]


CHECKPOINTS = "checkpoint"  # in a run's directory
STATE, RECORD, ROWS, DONE = "state.payload", "record.json", "rows.jsonl", "done.json"


def storable(state: object) -> bytes:
    """A state as bytes that decode to an equal state.

    Raises:
        BadValue: If the state is no dataclass of values that a payload can hold.
    """
    kind = type(state)
    if not dataclasses.is_dataclass(state):
        raise BadValue(
            f"a strategy's state must be a frozen dataclass, so that a run can go on from it; got {kind.__name__}"
        )
    try:
        data = encode(state, trusted=True)
        again = decode(data, kind, trusted=True)
    except Exception as problem:  # a state may hold anything
        raise BadValue(
            f"the strategy's state {kind.__name__} cannot be kept, so that a run could go on from it: {problem}"
        ) from problem
    if not _alike(state, again):
        raise BadValue(
            f"the strategy's state {kind.__name__} does not come back as it is: name its fields' types "
            "(Any brings back lists for tuples), and hold plain values, Corpus and Adapter"
        )
    return data


def _alike(one: object, other: object) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        return all(_alike(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, list | tuple):
        assert isinstance(other, list | tuple)
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, cast("np.ndarray", other), equal_nan=True)
    return one == other or one != one
