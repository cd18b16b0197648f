"""Where the time of a run went: from the metrics of its cells and the times of its events."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from fedsynth.federation.run.log import COLUMNS, SERVER, append_event
from fedsynth.federation.run.tables import print_times
from fedsynth.federation.run.times import Spent, times_of

SECONDS = {
    "seconds/cell": 60.0,
    "seconds/exchange/synthesize": 20.0,
    "seconds/exchange/learn": 10.0,
    "seconds/clients/synthesize": 36.0,
    "seconds/llm": 21.0,
    "seconds/workers": 4.0,
}


def metrics(*arms: str, seeds: int = 1, seconds: dict[str, float] = SECONDS) -> pd.DataFrame:
    rows = [(arm, seed, 1, SERVER, name, s) for arm in arms for seed in range(seeds) for name, s in seconds.items()]
    return pd.DataFrame([*rows, ("local", 0, 1, 3, "accuracy", 0.5)], columns=list(COLUMNS))


def write(out: Path, *events: dict[str, Any]) -> Path:
    (out / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return out


def cell(at: float) -> dict[str, Any]:
    return {"event": "cell", "arm": "fdkt", "seed": 0, "number": 0, "cells": 1, "at": at}


STARTED = {"event": "started", "seconds": 5.0, "at": 100.0}


def test_of_each_arm_exchanges_llm_and_the_rest_add_up_to_its_cells(tmp_path: Path) -> None:
    found = times_of(tmp_path, metrics("fdkt", seeds=2))
    assert found == [
        Spent("fdkt", "synthesize", 40.0, 72.0),
        Spent("fdkt", "learn", 20.0, None),
        Spent("fdkt", "start of workers", 8.0),
        Spent("fdkt", "LLM", 42.0),
        Spent("fdkt", "other work of the server", 10.0),
    ]
    assert sum(part.seconds for part in found) == 2 * SECONDS["seconds/cell"]


def test_check_start_and_end_are_read_off_the_events(tmp_path: Path) -> None:
    write(
        tmp_path, STARTED, cell(117.5), cell(150.0), {"event": "progress", "at": 170.0}, {"event": "ended", "at": 173}
    )
    around = [part for part in times_of(tmp_path, metrics("fdkt")) if not part.arm]
    assert around == [Spent("", "check", 5.0), Spent("", "start", 17.5), Spent("", "end", 3.0)]


def test_a_run_that_was_gone_on_with_started_twice_and_the_time_between_is_nobodys(tmp_path: Path) -> None:
    write(tmp_path, STARTED, cell(110.0), STARTED | {"at": 9000.0}, cell(9007.0), {"event": "ended", "at": 9008.0})
    around = {part.part: part.seconds for part in times_of(tmp_path, metrics("fdkt")) if not part.arm}
    assert around == {"check": 10.0, "start": 17.0, "end": 1.0}


def test_a_run_of_an_earlier_version_tells_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"event": "cell", "arm": "fdkt", "seed": 0, "number": 0, "cells": 1})
    assert times_of(tmp_path, metrics("fdkt", seconds={"seconds/cell": 60.0})) == []


def test_every_event_has_the_time_of_day(tmp_path: Path) -> None:
    before = time.time()
    append_event(tmp_path / "events.jsonl", {"event": "warning", "text": "late"})
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert before - 0.001 <= event.pop("at") <= time.time() + 0.001
    assert event == {"event": "warning", "text": "late"}


def test_the_table_has_each_part_with_its_share(tmp_path: Path) -> None:
    write(tmp_path, STARTED, cell(115.0), {"event": "ended", "at": 115.0})
    console = Console(file=io.StringIO(), width=100)
    print_times(console, SimpleNamespace(out=tmp_path, metrics=metrics("fdkt")))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]  # a StringIO
    assert ["start", "15.0", "19%"] in lines
    assert ["fdkt", "synthesize", "20.0", "25%", "36.0"] in lines
    assert ["fdkt", "LLM", "21.0", "26%"] in lines


def test_an_exchange_and_the_llm_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inprocess import instructions, play

    run = play(instructions(tmp_path, "fedsynth.strategies.lora_avg:LoraAverage"), tmp_path / "run")
    totals = run.run_log.totals
    asked = {name for name, client in totals if name.startswith("seconds/exchange/") and client == SERVER}
    assert {"seconds/exchange/finetune", "seconds/exchange/adopt"} <= asked
    for name in ("finetune", "adopt"):
        own = totals[f"seconds/clients/{name}", SERVER]
        assert 0 < own < 1.5 * totals[f"seconds/exchange/{name}", SERVER]  # clients of this process, one by one
    together = sum(totals[f"seconds/clients/{name.rpartition('/')[2]}", SERVER] for name in asked)
    alone = sum(value for (name, _), value in totals.items() if name == "seconds/client")
    assert together == pytest.approx(alone)
