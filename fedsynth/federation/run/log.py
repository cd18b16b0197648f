"""The log of one cell of a run: metrics, released corpora and adapters, statements of privacy, progress."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedsynth.corpus import Corpus
from fedsynth.federation.payload import corpus_to_parquet
from fedsynth.federation.run.checkpoint import CHECKPOINTS, Checkpoint
from fedsynth.federation.run.data_facts import lines_in
from fedsynth.lora import Adapter
from fedsynth.privacy.statement import Spending, Statement
from fedsynth.scenario.schema import Cell
from fedsynth.synthesis.attrition import begins
from fedsynth.synthesis.curation import Stage
from fedsynth.typed import BadValue, build, plain

SERVER = -1  # in the client column: a figure of the server
COLUMNS = ("arm", "seed", "round", "client", "metric", "value")


@dataclass
class RunLog:
    """The log of one cell: metrics, released corpora, adapters, privacy statements, progress.

    Attributes:
        cell: Arm, seed and resolved scenario.
        folder: The run's directory.
        events: The file that progress lines are appended to.
        round: The round of the metrics that follow.
        released: Kinds of outputs that clients released: text, adapters, scores.
        silent: (Client, exchange) pairs without the usable reply that would have stated the client's spending.
        rows: Tidy metrics so far.
        spending: By client, all that it has stated.
        largest: The spending of the client that spends most; one without a guarantee spends more than any other.
        totals: By name and client, figures that are summed over the whole cell.
        started: Time at which the cell started, on the monotonic clock; a resumed run keeps the seconds so far.
        left: By client, the number of texts that were asked for, and of those that the steps so far have left.
        sums: The sums of both over all clients.
        begun: Round and name of the step that `left` counts from.
        simulated: True for simulated clients, False for real sites.
        echo: Each phase is printed as well: of a run by hand (`flwr run --stream`), which nobody watches the events of.
    """

    cell: Cell
    folder: Path
    events: Path
    round: int = 0
    released: set[str] = field(default_factory=set)
    silent: set[tuple[int, int]] = field(default_factory=set)
    rows: list[tuple[str, int, int, int, str, float]] = field(default_factory=list)
    spending: dict[int, Spending] = field(default_factory=dict)
    largest: Spending | None = None
    totals: dict[tuple[str, int], float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    left: dict[int, tuple[int, int]] = field(default_factory=dict)
    sums: tuple[int, int] = (0, 0)
    begun: tuple[int, str] = (0, "")
    simulated: bool = True
    echo: bool = False

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint from which the cell resumes."""
        return Checkpoint(self.place(CHECKPOINTS))

    def place(self, kind: str) -> Path:
        """The folder of this cell among those of a kind."""
        return self.folder / kind / self.cell.arm / f"seed-{self.cell.seed}"

    def record(self) -> dict[str, Any]:
        """The log so far as plain JSON."""
        return {
            "rows": [row[2:] for row in self.rows],
            "totals": [[*key, value] for key, value in self.totals.items()],
            "statements": {str(client): [plain(part) for part in own.parts] for client, own in self.spending.items()},
            "released": sorted(self.released),
            "silent": sorted(map(list, self.silent)),
            "seconds": time.monotonic() - self.started,
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Restores the log from the JSON of `record`."""
        self.rows = [(self.cell.arm, self.cell.seed, *row) for row in record["rows"]]
        self.totals = {(name, client): value for name, client, value in record["totals"]}
        self.spending, self.largest = {}, None
        for client, parts in record["statements"].items():
            for part in parts if isinstance(parts, list) else [parts]:  # earlier versions kept one
                self.log_statement(int(client), build(Statement, part))
        self.released = set(record["released"])
        self.silent = {(client, exchange) for client, exchange in record["silent"]}
        self.started = time.monotonic() - record["seconds"]

    def log_metric(self, client: int, name: str, value: float) -> None:
        """One figure of one client (or of the server: `SERVER`)."""
        self.rows.append((self.cell.arm, self.cell.seed, int(self.round), int(client), name, float(value)))

    def log_stage(self, client: int, stage: Stage) -> None:
        """One line of a client's yield funnel: a step's input, output and reasons to drop the rest."""
        asked, left = self.left.get(client, (0, -1))
        if begins(stage.name, stage.before, left):
            if self.begun != (self.round, stage.name):
                self.left, self.sums = {}, (0, 0)
            self.begun, asked = (self.round, stage.name), stage.before
        before, left = self.left.get(client, (0, 0))
        self.sums = self.sums[0] + asked - before, self.sums[1] + stage.after - left
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

        Other programs know no `models:NAME`: the folder that this is here stands in its configuration.

        Args:
            client: The adapter's client; `SERVER` for one of all clients.
            adapter: A whole adapter, factors A and B.
            kind: `client` for a client's release; another name for an adapter that the server made.
            base: Name of the adapter's base model; None for the clients' generator.
        """
        from fedsynth.models.adapters import save_adapter  # brings torch, which readers of a run do not need
        from fedsynth.models.hub import locate

        place = f"round-{self.round}-{kind}" + ("" if client == SERVER else f"-{client}")
        folder = self.place("adapters") / place
        name = base or self.cell.scenario.client.generator
        with suppress(BadValue):  # a server need not have the clients' model
            name = locate(name) if name.startswith(("models:", "assets:")) else name
        save_adapter(adapter, name, folder)

    def count(self, name: str, client: int, amount: float) -> None:
        """Adds to a figure that is logged once, at the end of the cell: bytes, seconds, tokens."""
        self.totals[name, int(client)] = self.totals.get((name, int(client)), 0) + float(amount)

    def log_statement(self, client: int, said: Statement) -> None:
        """Logs a client's privacy statement. Those of several plans add up; after a release without a guarantee the
        client has none."""
        earlier = self.spending.get(client)
        own = self.spending[client] = Spending((said,)) if earlier is None else earlier.and_(said)
        if self.largest is None or _spends(own) >= _spends(self.largest):  # no client ever spends less than before
            self.largest = own

    def progress(self, phase: str, done: int, total: int) -> None:
        """Appends one line of progress to the events."""
        line: dict[str, Any] = {"event": "progress", "arm": self.cell.arm, "seed": self.cell.seed, "round": self.round}
        line |= {"kept": self.kept, "epsilon": self.epsilon}
        append_event(self.events, {**line, "phase": phase, "done": done, "total": total})
        if self.echo and done == 0:
            turn = f" round {self.round}" if self.round > 1 else ""
            print(f"{self.cell.arm} seed {self.cell.seed}{turn}: {phase}", flush=True)

    @property
    def kept(self) -> float | None:
        """The share that is left of all clients' latest texts; None before any were asked for."""
        asked, left = self.sums
        return left / asked if asked else None

    @property
    def epsilon(self) -> float | None:
        """The largest epsilon of a client; None if one has no guarantee, or none has stated any."""
        return None if self.largest is None else self.largest.epsilon

    def close(self) -> None:
        """Logs the totals, the seconds, the lines of the test labels and each client's epsilon and delta at the end."""
        for (name, client), amount in sorted(self.totals.items()):
            self.log_metric(client, name, amount)
        self.log_metric(SERVER, "seconds/cell", time.monotonic() - self.started)
        measured = {(client, metric) for _, _, number, client, metric, _ in self.rows if number == self.round}
        for client, lines in enumerate(lines_in(self.folder, self.cell.arm, self.cell.seed)):
            for name, value in lines.items():
                if (client, name.partition("/")[2]) in measured:
                    self.log_metric(client, name, value)
        for client, own in sorted(self.spending.items()):
            if own.epsilon is not None:
                self.log_metric(client, "privacy/epsilon", own.epsilon)
                self.log_metric(client, "privacy/delta", own.delta)


def _spends(own: Spending) -> float:
    return math.inf if own.epsilon is None else own.epsilon


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """One JSON object per line, with the time in seconds since 1970; the launcher reads them as they come."""
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps({**event, "at": round(time.time(), 3)}) + "\n")
