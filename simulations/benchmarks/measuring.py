"""The benchmarks' measuring: alternating runs in one process, CPU time of one thread, medians; bars, their table."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler remarks on each start and stop
import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Bar:
    """One figure beside the limit that it must keep.

    Attributes:
        bar: Name of the figure.
        case: Model, batch and length.
        value: The measured value.
        limit: The limit; None for a figure without one.
        ok: True if the value keeps the limit.
    """

    bar: str
    case: str
    value: float
    limit: float | None
    ok: bool


def at_most(bar: str, case: str, value: float, limit: float) -> Bar:
    """A figure that must not be larger."""
    return Bar(bar, case, _told(value), limit, value <= limit)


def at_least(bar: str, case: str, value: float, limit: float) -> Bar:
    """A figure that must not be smaller."""
    return Bar(bar, case, _told(value), limit, value >= limit)


def figure(bar: str, case: str, value: float) -> Bar:
    """A figure without a limit."""
    return Bar(bar, case, _told(value), None, True)


def _told(value: float) -> float:
    """Six significant digits: a distance of 1e-7 is not 0."""
    return float(f"{value:.6g}")


def seconds(ways: Mapping[str, Callable[[], Any]], repeats: int, *, warm: int = 1) -> dict[str, float]:
    """Median seconds of each way, run in turns: A, B, C, A, B, C, ...; CPU time, wall time on a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm + repeats):
        for name, way in ways.items():
            _settle()
            start = clock()
            way()
            _settle()
            if turn >= warm:
                taken[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in taken.items()}


def peak_bytes(way: Callable[[], Any]) -> int:
    """Most memory that one run holds at once beyond what was held before it."""
    way()  # what is made once, such as an optimizer's state, does not count
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        way()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the bars to this file")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each way, in turns (default 7)")
    return parser


def told(bars: Sequence[Bar], file: Path | None) -> int:
    """Prints the table and writes the file; 1 where a bar is not kept, as an exit status."""
    print("\n| bar | case | value | limit | |\n|---|---|---:|---:|---|")
    for bar in bars:
        limit = "" if bar.limit is None else f"{bar.limit:g}"
        print(f"| {bar.bar} | {bar.case} | {bar.value:.3g} | {limit} | {'' if bar.ok else 'MISSED'} |")
    if file is not None:
        file.write_text(json.dumps([asdict(bar) for bar in bars], indent=1) + "\n")
    return int(not all(bar.ok for bar in bars))
