"""Growth of the server's own work with the number of clients, without any client: CPU seconds of each piece.

Pieces: progress lines of an exchange, rows of a round, the checkpoint after a round (the first and the tenth), metrics
and summary, data cards, report. A piece is linear if four times as many clients cost at most `LIMIT` times as much.

    python simulations/benchmarks/growth.py [--clients 64 256 1024 4096] [--report 64 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.card import data_cards
from fedsynth.federation.run.directory import prepare
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.summary import summarize, write_metrics
from fedsynth.privacy.plan import Budget, plan
from fedsynth.privacy.statement import statement
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, load
from fedsynth.typed import plain

ROWS = 23  # figures of a client and round in FDKT on `hospitals`
ROUNDS = 10
DRAFTS = 8
LIMIT = 6.0  # times the CPU seconds for four times the clients: 4 if linear, 16 if quadratic
SMALL = 0.05  # CPU seconds below which a ratio says nothing


@dataclass(frozen=True)
class State:
    """A strategy's state."""

    round: int = 0


@dataclass
class Pieces:
    """CPU seconds by piece."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, piece: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        self.seconds[piece] = time.process_time() - begun


def scenario_of(clients: int) -> Scenario:
    """`hospitals` with so many clients of 40 notes, one arm."""
    found = load("hospitals", [f"data.clients={clients}", "data.train_per_client=40", "data.test_per_client=8"])
    return replace(found, run=("fdkt",))


def measured(clients: int, place: Path, report: bool) -> dict[str, float]:
    """The pieces for one number of clients."""
    pieces, scenario, out = Pieces(), scenario_of(clients), place / f"run-{clients}"
    with pieces.of("data cards"):
        data_cards(scenario)
    (cell,) = cells(scenario)
    prepare(scenario, out)
    said = statement(plan(Budget(8.0), records=40, expected_batch=8, steps=5), unit="row", rows=(), simulated=True)
    log = RunLog(cell, out, out / "events.jsonl")
    for client in range(clients):
        log.log_statement(client, said)
    with pieces.of("progress of an exchange"):
        for done in range(clients):
            log.progress("learn", done + 1, clients)
    for number in range(1, ROUNDS + 1):
        log.round = number
        begun = time.process_time()
        for client in range(clients):
            for figure in range(ROWS):
                log.log_metric(client, f"yield/step-{figure}/in" if figure else "accuracy", 0.5 + figure / 100)
        pieces.seconds["rows of a round"] = time.process_time() - begun
        begun = time.process_time()
        log.checkpoint.save(number, State(number), {**log.record(), "exchange": number})
        if number in (1, ROUNDS):
            pieces.seconds[f"checkpoint {number}"] = time.process_time() - begun
    log.rows = [row for row in log.rows if row[2] == 1]  # of one round from here on
    for client in range(clients):
        log.count("bytes/up", client, 1500)
        text = tuple(f"Pain number {client} {i} of the left knee since {i} days" for i in range(DRAFTS))
        log.round = 1
        log.log_corpus(client, "drafts", Corpus(text, ("orthopedics",) * DRAFTS, Provenance.PUBLIC))
    log.released = {"synthetic text with labels"}
    with pieces.of("close"):
        log.close()
    with pieces.of("metrics"):
        write_metrics(out, [log])
    with pieces.of("summary"):
        summarize(scenario, out, 60.0, [log])
    if report:
        command = [sys.executable, "-c", "from fedsynth.cli.main import main; main()", "report", str(out)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        pieces.seconds["the command report"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return pieces.seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clients", type=int, nargs="+", default=[64, 256, 1024, 4096])
    options.add_argument("--report", type=int, nargs="*", default=[64, 256], help="numbers of clients with a report")
    options.add_argument("--keep", type=Path, help="a folder for the runs' directories, which otherwise go")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured(8, Path(folder) / "warm", report=False)  # imports, caches of plans
        place = given.keep or Path(folder)
        found = {n: measured(n, place, n in given.report) for n in sorted(given.clients)}
    print_table(found, print)
    if given.json:
        given.json.write_text(json.dumps(plain({str(n): pieces for n, pieces in found.items()}), indent=1))


def print_table(found: dict[int, dict[str, float]], tell: Callable[[str], None]) -> None:
    """A row for each piece; behind it, the largest growth for four times the clients, if the figures allow one."""
    numbers = sorted(found)
    tell("| piece | " + " | ".join(f"{n:,}" for n in numbers) + " | growth |")
    tell("|---|" + "---:|" * (len(numbers) + 1))
    for piece in found[numbers[0]]:
        row = [found[n].get(piece) for n in numbers]
        ratios = [
            b / a * 4 * n / m
            for (n, a), (m, b) in pairwise(zip(numbers, row, strict=True))
            if a is not None and b is not None and a >= SMALL
        ]
        growth = f"{max(ratios):.1f}" + ("" if max(ratios) <= LIMIT else " above the limit") if ratios else "-"
        tell(f"| {piece} | " + " | ".join("-" if s is None else f"{s:.3f}" for s in row) + f" | {growth} |")


if __name__ == "__main__":
    main()
