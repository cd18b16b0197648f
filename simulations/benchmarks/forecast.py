"""The forecast of `fedsynth check` beside the run that follows: time, bytes, memory, epsilon.

    python simulations/benchmarks/forecast.py [--json FILE] [--repeats 1] [--cases hospitals,...]

Three scenarios of unlike methods, in small: FDKT beside local training; KnowledgeSG beside three rounds of averaged
adapters; two rounds of CrossLM. Each is checked and run by the command, one after the other. True time is that of the
whole command, true memory the largest sum of the resident sets of all its processes, looked at twice a second.

Other users' load may differ between check and run; the forecast assumes the load of the check. The table has the time
that the run's processes waited for a core, by the kernel's statistics, beside its time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from measuring import Bar, at_most, figure, options, told

LIMIT = 0.3  # of what is true
CASES: dict[str, tuple[str, ...]] = {
    "hospitals": ("fdkt,local", "4", "data.test_per_client=200", "strategy.per_label=20", "strategy.num_texts=200"),
    "hospitals-knowledgesg": ("knowledge_sg,dp_fedavg_lora", "3", "data.test_per_client=100", "strategy.num_texts=400",
                              "strategy.pairs=200", "strategy.tuning.epochs=4"),
    "hospitals-crosslm": ("crosslm", "3", "data.test_per_client=200", "strategy.num_texts=200", "rounds=2",
                          "client.task_training.private_epochs=10"),
}  # fmt: skip  # arms, clients, and what makes them small


@dataclass
class Watched:
    """Memory and CPU time of a command's processes, read while it runs.

    Attributes:
        memory: Largest sum of resident sets, in bytes.
        worked: Seconds by process and thread.
        waited: Seconds for a core, likewise.
    """

    memory: int = 0
    worked: dict[tuple[int, str], float] = field(default_factory=dict)
    waited: dict[tuple[int, str], float] = field(default_factory=dict)

    @property
    def waiting(self) -> float:
        """Seconds that passed for each second of work."""
        return 1 + sum(self.waited.values()) / max(1e-9, sum(self.worked.values()))

    def look(self, root: psutil.Process) -> None:
        """At all processes below one, and at that one."""
        held = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                held += process.memory_info().rss
                for thread in Path(f"/proc/{process.pid}/task").iterdir():
                    worked, waited, _ = (thread / "schedstat").read_text().split()
                    self.worked[process.pid, thread.name] = int(worked) / 1e9
                    self.waited[process.pid, thread.name] = int(waited) / 1e9
            except (psutil.Error, OSError, ValueError):
                continue
        self.memory = max(self.memory, held)


def command(*words: str) -> tuple[dict[str, Any], float, Watched]:
    """The JSON that the command prints, its seconds, and what was seen of it."""
    begun, watched = time.perf_counter(), Watched()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, "-m", "fedsynth.cli.main", *words, "--json"], stdout=out)
        while process.poll() is None:
            try:
                watched.look(psutil.Process(process.pid))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.5)
        if process.wait():
            raise SystemExit(f"fedsynth {' '.join(words)} ended with {process.returncode}")
        took = time.perf_counter() - begun
        out.seek(0)
        return dict(json.loads(out.read().splitlines()[-1])), took, watched


def compared(name: str, arms: str, clients: str, *sets: str) -> list[Bar]:
    """One scenario, foreseen and run."""
    words = ["--arms", arms, "--clients", clients, *(word for item in sets for word in ("--set", item))]
    print(f"{name}: checking ...", flush=True)
    foreseen, checking, _ = command("check", name, "--seeds", "0", *words)
    print(f"{name}: {checking:.0f} s; running, {foreseen['seconds']:.0f} s foreseen ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ran, took, watched = command("run", name, "--seeds", "0", *words, "--out", str(Path(folder) / "run"))
    moved = {
        who: {d: sum(a["bytes"][d] for a in said["arms"].values()) for d in ("up", "down")}
        for who, said in (("foreseen", foreseen), ("ran", ran))
    }
    pairs = {"time": (foreseen["seconds"], took), "memory": (foreseen["memory"]["total"], watched.memory)}
    pairs |= {f"bytes {d}": (moved["foreseen"][d], moved["ran"][d]) for d in ("up", "down")}
    for what, (said, true) in pairs.items():
        print(f"  {what}: foreseen {said:.4g}, true {true:.4g}, ratio {said / true:.2f}", flush=True)
    print(f"  a second of work took {watched.waiting:.1f} s; the check {checking:.0f} s", flush=True)
    epsilons = [(foreseen["arms"][arm]["epsilon"], ran["arms"][arm]["epsilon"]) for arm in ran["arms"]]
    return [
        *(at_most(f"{what}: off by", name, abs(said / true - 1), LIMIT) for what, (said, true) in pairs.items()),
        at_most("epsilon: off by", name, max(abs((a or 0.0) - (b or 0.0)) for a, b in epsilons), 0.0),
        *(figure(f"{what}: foreseen / true", name, said / true) for what, (said, true) in pairs.items()),
        figure("seconds of the run", name, took),
        figure("seconds of the run if alone: foreseen", name, foreseen["seconds_alone"]),
        figure("seconds for each second of the run's work", name, watched.waiting),
        figure("seconds of the check", name, checking),
    ]


def main() -> int:
    """All cases, or those that are asked for."""
    asking = options(__doc__)
    asking.set_defaults(repeats=1)
    asking.add_argument("--cases", default=",".join(CASES), help="comma-separated; all by default")
    asked = asking.parse_args()
    names = asked.cases.split(",") * asked.repeats
    bars = [bar for name in names for bar in compared(name, *CASES[name])]
    return told(bars, asked.json)


if __name__ == "__main__":
    sys.exit(main())
