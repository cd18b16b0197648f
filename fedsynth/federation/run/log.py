"""The log of one cell of a run: metrics, released corpora and adapters, statements of privacy, progress."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedsynth.corpus import Corpus
from fedsynth.federation.payload import corpus_to_parquet
from fedsynth.federation.run.checkpoint import CHECKPOINTS, Checkpoint
from fedsynth.lora import Adapter
from fedsynth.models.adapters import save_adapter
from fedsynth.privacy.plan import Statement
from fedsynth.scenario.schema import Cell
from fedsynth.synthesis.attrition import begins
from fedsynth.synthesis.curation import Stage
from fedsynth.typed import build, plain

SERVER = -1  # in the client column: a figure of the server
COLUMNS = ("arm", "seed", "round", "client", "metric", "value")


@dataclass
class RunLog:
    """What one cell records: metrics, released corpora, adapters, progress.

    Attributes:
        cell: Arm and seed.
        folder: The run's directory.
        events: The file that progress lines are appended to.
        round: Of the metrics that follow.
        released: What clients let out: text, adapters, scores.
        silent: (Client, exchange) without a usable reply, where one would have said what was spent.
        rows: Tidy metrics so far.
        statements: What each client said of its privacy, the latest.
        totals: By name and client what is counted over the whole cell.
        left: By client: how many texts were asked for, and how many of them the steps so far have left.
        begun: Round and name of the step that `left` counts from.
        simulated: Whether the clients are; else they are real sites.
    """

    cell: Cell
    folder: Path
    events: Path
    round: int = 0
    released: set[str] = field(default_factory=set)
    silent: set[tuple[int, int]] = field(default_factory=set)
    rows: list[tuple[str, int, int, int, str, float]] = field(default_factory=list)
    statements: dict[int, Statement] = field(default_factory=dict)
    totals: dict[tuple[str, int], float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    left: dict[int, tuple[int, int]] = field(default_factory=dict)
    begun: tuple[int, str] = (0, "")
    simulated: bool = True

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What the cell needs to go on after it was ended."""
        return Checkpoint(self.place(CHECKPOINTS))

    def place(self, kind: str) -> Path:
        """The folder of this cell among those of a kind."""
        return self.folder / kind / self.cell.arm / f"seed-{self.cell.seed}"

    def record(self) -> dict[str, Any]:
        """All that was recorded so far, as plain JSON."""
        return {
            "rows": [row[2:] for row in self.rows],
            "totals": [[*key, value] for key, value in self.totals.items()],
            "statements": {str(client): plain(said) for client, said in self.statements.items()},
            "released": sorted(self.released),
            "silent": sorted(map(list, self.silent)),
            "seconds": time.monotonic() - self.started,
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Goes on from what `record` gave."""
        self.rows = [(self.cell.arm, self.cell.seed, *row) for row in record["rows"]]
        self.totals = {(name, client): value for name, client, value in record["totals"]}
        self.statements = {int(client): build(Statement, said) for client, said in record["statements"].items()}
        self.released = set(record["released"])
        self.silent = {(client, exchange) for client, exchange in record["silent"]}
        self.started = time.monotonic() - record["seconds"]

    def log_metric(self, client: int, name: str, value: float) -> None:
        """One figure of one client (or of the server: `SERVER`)."""
        self.rows.append((self.cell.arm, self.cell.seed, int(self.round), int(client), name, float(value)))

    def log_stage(self, client: int, stage: Stage) -> None:
        """One line of a client's yield funnel: what a step took in, kept, and why it dropped the rest."""
        asked, left = self.left.get(client, (0, -1))
        if begins(stage.name, stage.before, left):
            self.left = self.left if self.begun == (self.round, stage.name) else {}
            self.begun, asked = (self.round, stage.name), stage.before
        self.left[client] = (asked, stage.after)
        self.log_metric(client, f"yield/{stage.name}/in", stage.before)
        self.log_metric(client, f"yield/{stage.name}/kept", stage.after)
        for reason, count in sorted(stage.dropped.items()):
            self.log_metric(client, f"yield/{stage.name}/dropped/{reason}", count)
        if stage.lost:
            self.log_metric(client, f"yield/{stage.name}/labels_lost", len(stage.lost))

    def log_corpus(self, client: int, kind: str, corpus: Corpus, **more: str) -> None:
        """Released or server-written text, with provenance, grants and `more` in the file's metadata."""
        folder = self.place("corpora")
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"sha256": corpus.fingerprint(), "arm": self.cell.arm, "seed": str(self.cell.seed), "kind": kind}
        path = folder / f"{kind}-round{self.round}-client{client}.parquet"
        path.write_bytes(corpus_to_parquet(corpus, **facts, **more))

    def log_adapter(self, client: int, adapter: Adapter, kind: str = "client", *, base: str | None = None) -> None:
        """An adapter in PEFT format: `PeftModel.from_pretrained(base, folder)` loads it.

        Args:
            client: Whose; `SERVER` for one of all clients.
            adapter: A whole one, factors A and B.
            kind: `client` for what a client released; else what the server made of it.
            base: Name of the model that it belongs to; left out: the clients' generator.
        """
        place = f"round-{self.round}-{kind}" + ("" if client == SERVER else f"-{client}")
        folder = self.place("adapters") / place
        save_adapter(adapter, base or self.cell.scenario.client.generator, folder)

    def count(self, name: str, client: int, amount: float) -> None:
        """Adds to a figure that is told once, at the end of the cell: bytes, seconds, tokens."""
        self.totals[name, int(client)] = self.totals.get((name, int(client)), 0) + float(amount)

    def log_statement(self, client: int, said: Statement) -> None:
        """What a client says of its privacy: the largest epsilon holds, as answers may come late; and what once left
        without a guarantee stays without."""
        earlier = self.statements.get(client)
        if earlier is None or _spends(said) >= _spends(earlier):
            self.statements[client] = said

    def progress(self, phase: str, done: int, total: int) -> None:
        """One line for whoever watches."""
        line: dict[str, Any] = {"event": "progress", "arm": self.cell.arm, "seed": self.cell.seed, "round": self.round}
        line |= {"kept": self.kept, "epsilon": self.epsilon}
        append_event(self.events, {**line, "phase": phase, "done": done, "total": total})

    @property
    def kept(self) -> float | None:
        """Of the texts that were asked for last, of all clients together, the share that is left."""
        asked = sum(asked for asked, _ in self.left.values())
        return sum(left for _, left in self.left.values()) / asked if asked else None

    @property
    def epsilon(self) -> float | None:
        """The largest that a client has stated; None without a guarantee, or if none has."""
        if any(said.guarantee == "none" for said in self.statements.values()):
            return None
        return max((said.epsilon for said in self.statements.values() if said.epsilon is not None), default=None)

    def close(self) -> None:
        """Adds what is known at the end of the cell."""
        for (name, client), amount in sorted(self.totals.items()):
            self.log_metric(client, name, amount)
        self.log_metric(SERVER, "seconds/cell", time.monotonic() - self.started)
        for client, said in sorted(self.statements.items()):
            if said.epsilon is not None:
                self.log_metric(client, "privacy/epsilon", said.epsilon)
                self.log_metric(client, "privacy/delta", said.delta)


def _spends(said: Statement) -> float:
    return math.inf if said.epsilon is None else said.epsilon


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """One JSON object per line; the launcher reads them as they come."""
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(event) + "\n")
