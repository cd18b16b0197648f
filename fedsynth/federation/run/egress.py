"""What a run sends to endpoints: where to, how many requests and tokens, and under which guarantee."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeAlias

from fedsynth.federation.run.log import RunLog
from fedsynth.scenario.server import Endpoint, host_of

JOURNAL, TABLE = "egress.jsonl", "egress.json"  # in a run's directory
Provenance: TypeAlias = Literal["public", "released", "no guarantee"]
KEY = ("arm", "seed", "endpoint", "model", "provenance")


@dataclass
class Sent:
    """A line of the table: what one cell has sent to one model under one guarantee.

    Attributes:
        arm: The arm.
        seed: The run's seed.
        host: The machine that it went to.
        endpoint: The whole address.
        model: The model's name there.
        provenance: The most that the prompts may hold: `public` (no client had released anything), `released` (texts
            and adapters under differential privacy), or `no guarantee`.
        requests: Requests that went out, with those that were repeated or got no answer.
        tokens_read: Tokens of the prompts, as the server reports them.
        tokens_written: Tokens of the answers, likewise.
        from_cache: Requests that did not go out, as the cache held their answers.
        tokens_from_cache: Tokens of those prompts and answers.
    """

    arm: str
    seed: int
    host: str
    endpoint: str
    model: str
    provenance: str
    requests: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    from_cache: int = 0
    tokens_from_cache: int = 0


class EgressRecord:
    """The record of a run: a line in a journal for each event, as it happens, so that a kill loses none.

    It is one of `fedsynth.models.usage.Egress`. The journal names no text.

    Args:
        out: The run's directory.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.run_log: RunLog | None = None
        self._writing = Lock()
        self._spent: dict[tuple[str, str], int] = {}
        journal = out / JOURNAL
        if journal.is_file() and not journal.read_bytes().endswith(b"\n"):  # a kill cut its last line
            with journal.open("a", encoding="utf-8") as file:
                file.write("\n")
        for event in _events(journal):
            if event["event"] == "answered":
                self._count(event)

    def begin(self, run_log: RunLog) -> None:
        """What follows belongs to this cell."""
        self.run_log = run_log

    @property
    def provenance(self) -> Provenance:
        """The most that a prompt may hold now."""
        if self.run_log is None or not self.run_log.released:
            return "public"
        said = {statement.guarantee for statement in self.run_log.spending.values()}
        open_ = self.run_log.cell.scenario.client.guarantee == "none" or "none" in said
        return "no guarantee" if open_ else "released"

    def unguarded(self) -> bool:
        """As `Egress`."""
        return self.provenance == "no guarantee"

    def sent(self, to: Endpoint) -> None:
        """As `Egress`."""
        self._write("sent", to)

    def answered(self, to: Endpoint, read: int, written: int) -> None:
        """As `Egress`."""
        self._write("answered", to, read=read, written=written)

    def recalled(self, to: Endpoint, read: int, written: int) -> None:
        """As `Egress`."""
        self._write("recalled", to, read=read, written=written)

    def spent(self, to: Endpoint) -> int:
        """As `Egress`."""
        with self._writing:
            return self._spent.get((to.endpoint, to.model), 0)

    def _write(self, event: str, to: Endpoint, **tokens: int) -> None:
        cell = None if self.run_log is None else self.run_log.cell
        line: dict[str, Any] = {"arm": cell.arm if cell else "", "seed": cell.seed if cell else -1}
        line |= {"endpoint": to.endpoint, "model": to.model, "provenance": self.provenance, "event": event, **tokens}
        with self._writing:
            if event == "answered":
                self._count(line)
            with (self.out / JOURNAL).open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")

    def _count(self, event: dict[str, Any]) -> None:
        key = event["endpoint"], event["model"]
        self._spent[key] = self._spent.get(key, 0) + event["read"] + event["written"]


def egress_of(out: Path) -> list[Sent]:
    """The table of what a run has sent, from its journal; empty if it asked no endpoint."""
    found: dict[tuple[Any, ...], Sent] = {}
    for event in _events(out / JOURNAL):
        own = {name: event[name] for name in KEY}
        line = found.setdefault(tuple(own.values()), Sent(host=host_of(event["endpoint"]), **own))
        if event["event"] == "sent":
            line.requests += 1
        elif event["event"] == "answered":
            line.tokens_read += event["read"]
            line.tokens_written += event["written"]
        else:
            line.from_cache += 1
            line.tokens_from_cache += event["read"] + event["written"]
    return list(found.values())


def write_egress(out: Path) -> list[Sent]:
    """Writes the table beside its journal, unless the run asked no endpoint; returns it."""
    lines = egress_of(out)
    if lines:
        part = out / f"{TABLE}.part"
        part.write_text(json.dumps([asdict(line) for line in lines], indent=1), encoding="utf-8")
        part.replace(out / TABLE)
    return lines


def egress_lines(lines: Iterable[Sent]) -> list[str]:
    """A line for each machine, model and guarantee, over all arms and seeds, for the terminal."""
    sums: dict[tuple[str, str, str], Sent] = {}
    for line in lines:
        own = sums.setdefault((line.host, line.model, line.provenance), Sent(**{**asdict(line), **NOTHING}))
        for name in NOTHING:
            setattr(own, name, getattr(own, name) + getattr(line, name))
    return [
        f"sent to {one.host} (model {one.model!r}; {WORDS[one.provenance]}): {one.requests:,} requests, "
        f"{one.tokens_read:,} tokens of prompts, {one.tokens_written:,} of answers; "
        f"{one.from_cache:,} answers of {one.tokens_from_cache:,} tokens from the cache"
        for one in sums.values()
    ]


NOTHING = dict.fromkeys(("requests", "tokens_read", "tokens_written", "from_cache", "tokens_from_cache"), 0)
WORDS = {
    "public": "public text",
    "released": "text released under differential privacy",
    "no guarantee": "text without a guarantee",
}


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:  # cut by a kill
                continue
            if isinstance(event, dict) and {*KEY, "event"} <= event.keys():
                yield event
