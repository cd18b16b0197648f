"""The time of a run: check, start and end, and of each arm the exchanges with clients, the LLM, the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

STARTED, ENDED = "started", "ended"  # events of the process that launches a run
CHECK, START, END = "check", "start", "end"
WORKERS, LLM, REST = "start of workers", "LLM", "other work of the server"
ASKING, AT_CLIENTS = "seconds/exchange/", "seconds/clients/"  # metrics of a cell; an exchange's name follows
LLM_SECONDS, WORKER_SECONDS = "seconds/llm", "seconds/workers"


@dataclass(frozen=True)
class Spent:
    """The time of one part of a run, all seeds together.

    Attributes:
        arm: The arm; "" for what arms share.
        part: An exchange by its name, or one of this module's names.
        seconds: Wall time.
        clients: CPU seconds of the clients in an exchange; None elsewhere, and for real sites, which say none.
    """

    arm: str
    part: str
    seconds: float
    clients: float | None = None


def times_of(out: Path, metrics: pd.DataFrame) -> list[Spent]:
    """Check and start of a run, the parts of each arm, its end; of an earlier version's run, what is known of it.

    Args:
        out: A run's directory.
        metrics: Its metrics.
    """
    around = _around(_events(out / "events.jsonl"))
    return [*around[:2], *_of_arms(metrics), *around[2:]]


def _of_arms(metrics: pd.DataFrame) -> list[Spent]:
    found = []
    own = metrics[metrics["metric"].astype(str).str.startswith("seconds/")]
    for arm, rows in own.groupby("arm", sort=False):
        sums = rows.groupby("metric", sort=False)["value"].sum().to_dict()
        asking = {str(name).removeprefix(ASKING): s for name, s in sums.items() if str(name).startswith(ASKING)}
        if not asking:
            continue
        found += [Spent(str(arm), name, s, sums.get(AT_CLIENTS + name)) for name, s in asking.items()]
        own_parts = {WORKERS: sums.get(WORKER_SECONDS, 0.0), LLM: sums.get(LLM_SECONDS, 0.0)}
        found += [Spent(str(arm), part, seconds) for part, seconds in own_parts.items() if seconds]
        rest = sums.get("seconds/cell", 0.0) - sum(asking.values()) - sum(own_parts.values())
        found.append(Spent(str(arm), REST, max(0.0, rest)))
    return found


def _events(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _around(events: Sequence[Mapping[str, Any]]) -> list[Spent]:
    """Check, start and end, summed over the attempts of a run that was gone on with; empty if no event tells."""
    spent = dict.fromkeys((CHECK, START, END), 0.0)
    told, begun, last = False, None, 0.0
    for event in events:
        if "at" not in event:
            continue
        if event["event"] == STARTED:
            told, begun = True, event["at"]
            spent[CHECK] += event["seconds"]
        elif event["event"] == "cell" and begun is not None:
            spent[START] += event["at"] - begun
            begun = None
        elif event["event"] == ENDED:
            spent[END] += event["at"] - last
        last = event["at"]
    return [Spent("", part, seconds) for part, seconds in spent.items()] if told else []
