"""Growth with the number of clients: of the server's own work, without any client, and of whole runs.

CPU seconds of the server's pieces: progress lines of an exchange, rows of a round, the checkpoint after a round (the
first and the tenth), metrics and summary, data cards, report. A piece is linear if four times as many clients cost at
most `LIMIT` times as much.

    python simulations/benchmarks/growth.py [--clients 64 256 1024 4096] [--report 64 256] [--json FILE]

Whole runs: `fedsynth run` with the toy of throughput.py, two rounds of DP-FedAvg (5 private steps each), evaluated
after each. Processes are looked at every `LOOK` seconds; what one does after the last look is not counted. With
`--beside N` each run is repeated beside N processes that do nothing but compute, and its wall time then stands beside
the first one's. This means something on an idle machine only.

    python simulations/benchmarks/growth.py --runs [8 64 512 1024 4096] [--workers 2] [--beside 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import psutil
from throughput import SCENARIO, built

from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.card import data_cards
from fedsynth.federation.run.directory import prepare
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.summary import summarize, write_metrics
from fedsynth.privacy.plan import Budget, plan
from fedsynth.privacy.statement import statement
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, from_toml, load
from fedsynth.simulation.simulate import run, supernodes
from fedsynth.typed import plain

ROWS = 23  # figures of a client and round in FDKT on `hospitals`
ROUNDS = 10
DRAFTS = 8
LIMIT = 6.0  # times the CPU seconds for four times the clients: 4 if linear, 16 if quadratic
SMALL = 0.05  # CPU seconds below which a ratio says nothing
RUN_ROUNDS, RUN_STEPS = 2, 5  # of a whole run
LOOK = 3.0  # seconds; a look takes some 100 ms of CPU, which are not the run's
RUNS = (8, 64, 512, 1024, 4096)
DRIVER = ("superlink", "flwr-simulation")  # and in it the server app
COLUMNS = {
    "wall": ("wall, s", ".0f"),
    "cpu": ("CPU, s", ".0f"),
    "each": ("workers' CPU by client and round, ms", ".1f"),
    "driver_cpu": ("driver's CPU by client and round, ms", ".1f"),
    "driver": ("driver, MB", ".0f"),
    "most": ("all processes, MB", ".0f"),
    "disk": ("disk, MB", ".1f"),
    "messages": ("messages", ",.0f"),
    "beside": ("wall beside others, s", ".0f"),
}


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


def whole_run(clients: int, workers: int, out: Path) -> None:
    """The run itself, in a process of its own."""
    toml = SCENARIO.format(
        clients=clients,
        texts=20,
        model=built("toy", out.with_name("model")),
        batch=4,
        guarantee="dp",
        steps=RUN_STEPS,
        rate=1e-3,
        tokens=16,
        precision="float32",
        rounds=RUN_ROUNDS,
    )
    scenario = from_toml(toml)
    run(replace(scenario, client=replace(scenario.client, answer_tokens=4)), out=out, workers=workers)


def watched(clients: int, workers: int, place: Path) -> dict[str, float]:
    """One whole run, seen from outside: seconds, CPU seconds of all processes, megabytes, messages."""
    command = [sys.executable, __file__, "--one", str(clients), "--workers", str(workers), "--keep", str(place)]
    begun, used, most, driver = time.monotonic(), dict[tuple[int, float], tuple[str, float]](), 0.0, 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        own = psutil.Process(running.pid)
        while running.poll() is None:
            held = {"driver": 0.0, "workers": 0.0, "others": 0.0}
            for process in [own, *own.children(recursive=True)]:
                try:
                    line, took, memory = " ".join(process.cmdline()), process.cpu_times(), process.memory_info().rss
                    born = process.create_time()
                except psutil.Error:
                    continue
                if not line:  # it has ended, and no longer says what it was
                    continue
                kind = "driver" if any(n in line for n in DRIVER) else "workers" if "ray::Client" in line else "others"
                used[process.pid, born] = kind, took.user + took.system
                held[kind] += memory / 1e6
            driver, most = max(driver, held["driver"]), max(most, sum(held.values()))
            time.sleep(LOOK)
    if running.returncode:
        raise SystemExit(f"the run with {clients} clients failed")
    work = clients * RUN_ROUNDS / 1000  # milliseconds are shown

    def of(*kinds: str) -> float:
        return sum(seconds for kind, seconds in used.values() if kind in kinds)

    out = place / f"run-{clients}"
    exchanges = {e["phase"] for e in map(json.loads, (out / "events.jsonl").open()) if e["event"] == "progress"}
    files = [f for folder in (out, out.with_name(f"{out.name}.private")) for f in folder.rglob("*") if f.is_file()]
    return {
        "wall": time.monotonic() - begun,
        "cpu": of("driver", "workers", "others"),
        "each": of("workers") / work,
        "driver_cpu": of("driver") / work,
        "driver": driver,
        "most": most,
        "disk": sum(f.stat().st_size for f in files) / 1e6,
        # One for each SuperNode and exchange, and the question which clients it hosts.
        "messages": supernodes(clients, workers) * (1 + RUN_ROUNDS * len(exchanges)),
    }


def print_runs(sizes: Sequence[int], workers: int, beside: int, place: Path) -> dict[int, dict[str, float]]:
    """A row for each number of clients, as soon as its run is over."""
    columns = [text for key, (text, _) in COLUMNS.items() if beside or key != "beside"]
    print("| clients | " + " | ".join(columns) + " |\n" + "|---:|" + "---:|" * len(columns))
    found = {}
    for clients in sizes:
        found[clients] = watched(clients, workers, place / "alone")
        if beside:
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
            try:
                found[clients]["beside"] = watched(clients, workers, place / "beside")["wall"]
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
        row = [format(found[clients][key], how) for key, (_, how) in COLUMNS.items() if key in found[clients]]
        print(f"| {clients:,} | " + " | ".join(row) + " |", flush=True)
        shutil.rmtree(place, ignore_errors=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clients", type=int, nargs="+", default=[64, 256, 1024, 4096])
    options.add_argument("--report", type=int, nargs="*", default=[64, 256], help="numbers of clients with a report")
    options.add_argument("--keep", type=Path, help="a folder for the runs' directories, which otherwise go")
    options.add_argument("--runs", type=int, nargs="*", help="whole runs with so many clients")
    options.add_argument("--workers", type=int, default=2, help="client processes of a whole run")
    options.add_argument("--beside", type=int, default=0, help="repeat each whole run beside so many busy processes")
    options.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    if given.one:
        whole_run(given.one, given.workers, given.keep / f"run-{given.one}")
        return
    if given.runs is not None:
        with tempfile.TemporaryDirectory() as folder:
            runs = print_runs(given.runs or RUNS, given.workers, given.beside, Path(folder))
        if given.json:
            given.json.write_text(json.dumps(plain({str(n): row for n, row in runs.items()}), indent=1))
        return
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
