"""A run that is killed again and again, beside one that is not: are the results the same, and is nothing charged twice?

    python simulations/benchmarks/kills.py [--json FILE] [--kills 20] [--scenario FILE] [--seed 0]

A short scenario with DP training runs once undisturbed. Then it runs again and is killed (SIGKILL) at random moments of
its length, in turns its launcher, its SuperLink and a worker, and gone on with each time, until all kills are done and
the run is through. Compared are the metrics (but for seconds), every corpus and adapter, the privacy statements and the
clients' ledgers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from measuring import Bar, at_least, at_most, figure, options, told

from fedsynth.privacy.audit import contents, ledgers_in, problems
from fedsynth.simulation.flower import MARKER
from fedsynth.simulation.result import read
from fedsynth.simulation.simulate import done

SCENARIO = """
name = "kills"
seeds = [0]
rounds = 2
[strategy]
use = "fedsynth.strategies.fdkt:FDKT"
num_texts = 40
per_label = 6
[data]
source = "world:hospitals"
clients = 3
train_per_client = 60
test_per_client = 30
[client]
generator = "assets:tiny-slm"
task_model = "assets:tiny-slm"
budget = { epsilon = 8.0 }
task_training = { augmented_epochs = 2, private_epochs = 2 }
[client.generator_training]
expected_batch_size = 16
steps = 12
rank = 4
alpha = 8.0
learning_rate = 3e-3
[server]
llm = "assets:tiny-llm"
[arms.fdkt]
"""
WHO = ("launcher", "SuperLink", "worker")


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`fedsynth run` in a process of its own."""
    with log.open("ab") as out:
        return subprocess.Popen([sys.executable, "-m", "fedsynth.cli.main", "run", *command], stdout=out, stderr=out)


def victim(who: str, launcher: subprocess.Popen[bytes]) -> psutil.Process | None:
    """The process to kill, if it is there: those of the run carry its marker."""
    if who == "launcher":
        return psutil.Process(launcher.pid)
    wanted = "flower-superlink" if who == "SuperLink" else "ray::ClientAppActor"
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(launcher.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if MARKER in process.environ() and any(wanted in word for word in process.cmdline()):
                    return process
    return None


def compared(whole: Path, broken: Path) -> dict[str, Any]:
    """By name how many things differ between two runs' directories."""
    frames = [frame_of(place) for place in (whole, broken)]
    kinds = ("corpora/**/*.parquet", "adapters/**/*.safetensors", "privacy.json")
    files = {
        kind: [{p.relative_to(place): p.read_bytes() for p in place.glob(kind)} for place in (whole, broken)]
        for kind in kinds
    }
    differ = {
        kind: sum(one.get(name) != other.get(name) for name in {*one, *other}) for kind, (one, other) in files.items()
    }
    spent = [[entry_of(path) for path in ledgers_in(place)] for place in (whole, broken)]
    return {
        "rows of metrics that differ": 0 if frames[0].equals(frames[1]) else max(1, rows_apart(*frames)),
        "corpora that differ": differ[kinds[0]],
        "adapters that differ": differ[kinds[1]],
        "privacy statements that differ": differ[kinds[2]],
        "ledgers that differ": sum(one != other for one, other in zip(*spent, strict=True)),
        "ledgers with a problem": sum(bool(problems(contents(path))) for path in ledgers_in(broken)),
    }


def frame_of(place: Path) -> pd.DataFrame:
    """The metrics, in order, without how long things took."""
    frame = read(place).metrics
    keys = ["arm", "seed", "round", "client", "metric"]
    return frame[~frame["metric"].str.startswith("seconds/")].sort_values(keys).reset_index(drop=True)


def rows_apart(one: pd.DataFrame, other: pd.DataFrame) -> int:
    """The number of rows in one frame only."""
    return len(pd.concat([one, other]).drop_duplicates(keep=False))


def entry_of(path: Path) -> tuple[Any, ...]:
    """A ledger's content without times of day."""
    found = contents(path)
    rows = [(r["run"], r["rounds"], r["drawn"], str(r["plan"])) for r in found["reservations"]]
    grants = [(g["id"], g["counter"], g["order_digest"], g["state"]) for g in found["grants"]]
    return found["dataset"], found["epsilon"], rows, grants


def killed(scenario: Path, out: Path, kills: int, length: float, seed: int) -> dict[str, int]:
    """The scenario in `out`, killed so many times on its way and gone on with; how often whom."""
    rng, log = np.random.default_rng(seed), out.with_suffix(".log")
    found = dict.fromkeys(WHO, 0)
    attempts = 0
    while sum(found.values()) < kills or not done(out):
        begun = (out / "scenario.toml").is_file()
        launcher = started(["--resume", str(out)] if begun else [str(scenario), "--out", str(out)], log)
        attempts += 1
        # Anew from the start now and then, or the last kills would all hit the end.
        moment = time.monotonic() + float(rng.uniform(0.15, 1.0)) * length
        who = WHO[sum(found.values()) % len(WHO)]
        while launcher.poll() is None:
            if time.monotonic() > moment and sum(found.values()) < kills and (process := victim(who, launcher)):
                with contextlib.suppress(psutil.Error):
                    os.kill(process.pid, signal.SIGKILL)
                    found[who] += 1
                    if who != "worker":
                        break
                moment = time.monotonic() + float(rng.uniform(0.15, 1.0)) * length
                who = WHO[sum(found.values()) % len(WHO)]
            time.sleep(0.05)
        launcher.wait()
        print(f"attempt {attempts}: {found}, {'done' if done(out) else 'not done'}", file=sys.stderr, flush=True)
        if done(out):
            break
        if attempts > 4 * kills + 4:
            raise RuntimeError(f"{out} does not get done: see {log}")
    return found


def main(arguments: list[str]) -> int:
    """Prints the table; 1 where a bar is not kept."""
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--scenario", type=Path, help="another scenario than the short one")
    chosen = parser.parse_args(arguments)
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        scenario = chosen.scenario or place / "kills.toml"
        if chosen.scenario is None:
            scenario.write_text(SCENARIO)
        begun = time.monotonic()
        if started([str(scenario), "--out", str(place / "whole")], place / "whole.log").wait():
            raise RuntimeError((place / "whole.log").read_text()[-2000:])
        length = time.monotonic() - begun
        bars.append(figure("seconds of the unbroken run", "kills", length))
        number, total = 0, dict.fromkeys(WHO, 0)
        worst: dict[str, Any] = {}
        while sum(total.values()) < chosen.kills:
            out = place / f"broken-{number}"
            left = min(4, chosen.kills - sum(total.values()))
            for who, count in killed(scenario, out, left, length, chosen.seed + number).items():
                total[who] += count
            for name, count in compared(place / "whole", out).items():
                worst[name] = worst.get(name, 0) + count
            print(f"run {number}: {worst}", file=sys.stderr, flush=True)
            number += 1
        bars.append(
            at_least("kills", ", ".join(f"{who} {n}" for who, n in total.items()), sum(total.values()), chosen.kills)
        )
        bars += [at_most(name, f"{number} runs", count, 0) for name, count in worst.items()]
    return told(bars, chosen.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
