"""A site's overhead: of a message, by a new process or by a child of the warm one; and of idle waiting.

    python simulations/benchmarks/messages.py [--repeats 5] [--site DIR --seconds 60]

Counted is CPU time, of the program that Flower starts and of all that works for it, up to where it would take the
message from the SuperNode. With --site, the processes of a running `fedsynth site start DIR` are watched as well.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from fedsynth.deployment.client_process import STAND_IN, stand_ins
from fedsynth.deployment.policy import load_site
from fedsynth.simulation.flower import OWNER, marked

MODULE = ("-m", "fedsynth.deployment.client_process")


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # as at a site
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--site", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        message = [str(Path(folder, STAND_IN)), "--help"]  # as far as it goes without a SuperNode
        stand_ins(Path(folder), Path(folder, "socket"))
        print(f"a process of its own: {spent(message, asked.repeats):.2f} s of CPU a message")
        warm = subprocess.Popen([sys.executable, "-P", *MODULE, "serve", f"{folder}/socket"], stdout=subprocess.PIPE)
        assert warm.stdout is not None
        warm.stdout.readline()
        helper = psutil.Process(warm.pid)
        started = cpu(helper)
        print(f"a child of the warm process: {spent(message, asked.repeats, helper):.2f} s of CPU a message")
        held = helper.memory_full_info()
        warm.kill()
        print(f"the warm process: {started:.1f} s of CPU to start, {held.uss / 1e6:.0f} MB")
    if asked.site is not None:
        idle(load_site(asked.site).state, asked.seconds)


def spent(message: list[str], repeats: int, helper: psutil.Process | None = None) -> float:
    """CPU seconds of one message: of the program that Flower starts, and of what it hands over to."""

    def send(times: int) -> None:
        for _ in range(times):
            subprocess.run(message, check=True, stdout=subprocess.DEVNULL)

    send(1)
    first, before = resource.getrusage(resource.RUSAGE_CHILDREN), cpu(helper) if helper else 0.0
    send(repeats)  # a child of the helper is counted when the next is begun: as many are as are sent
    last, after = resource.getrusage(resource.RUSAGE_CHILDREN), cpu(helper) if helper else 0.0
    own = last.ru_utime + last.ru_stime - first.ru_utime - first.ru_stime
    return (own + after - before) / repeats


def cpu(process: psutil.Process) -> float:
    """CPU seconds of a process and of its children that have ended."""
    return float(sum(process.cpu_times()[:4]))


def idle(state: Path, seconds: float) -> None:
    """CPU time of a site's processes while nothing is asked."""
    processes = list(marked((state / OWNER).read_text()))
    before = [cpu(process) for process in processes]
    time.sleep(seconds)
    for process, then in zip(processes, before, strict=True):
        name = " ".join(Path(word).name for word in process.cmdline()[1:4])
        print(
            f"idle, {name}: {(cpu(process) - then) / seconds:.2%} of a core, {process.memory_info().rss / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
