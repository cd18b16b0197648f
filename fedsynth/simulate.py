"""A scenario from start to finish on this machine: check, launch, read the results."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from fedsynth.clients.home import declared_records
from fedsynth.corpus import Corpus
from fedsynth.data import label_list, open_sites
from fedsynth.federation import load_strategy
from fedsynth.launch import APP, launch
from fedsynth.models import check as check_model
from fedsynth.payload import corpus_from_parquet
from fedsynth.privacy.plan import BudgetTooSmall
from fedsynth.runs import prepare, private_of
from fedsynth.scenario import Scenario, cells, load, to_toml
from fedsynth.typed import BadValue


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        out: The run's directory.
        summary: What `--json` prints.
        metrics: Tidy: arm, seed, round, client, metric, value; client -1 is the server.
        privacy: By arm: the statement in words and figures.
    """

    out: Path
    summary: Mapping[str, Any]
    metrics: pd.DataFrame
    privacy: Mapping[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """One row per arm: mean and standard deviation of each task metric, guarantee, epsilon, bytes."""
        rows = []
        for arm, found in self.summary["arms"].items():
            row: dict[str, Any] = {"arm": arm, "guarantee": found["guarantee"], "epsilon": found["epsilon"]}
            for metric, value in found["metrics"].items():
                if not metric.startswith("yield/"):
                    row[metric], row[f"{metric}_std"] = value["mean"], value["std"]
            rows.append({**row, "bytes_up": found["bytes"]["up"], "bytes_down": found["bytes"]["down"]})
        return pd.DataFrame(rows).set_index("arm")

    def corpora(self, arm: str, seed: int, kind: str = "written") -> dict[int, Corpus]:
        """Texts by client: `drafts` (what clients released) or `written` (what the LLM wrote from them)."""
        folder = self.out / "corpora" / arm / f"seed-{seed}"
        found = {int(p.stem.rpartition("client")[2]): p for p in folder.glob(f"{kind}-*.parquet")}
        return {client: corpus_from_parquet(found[client].read_bytes()) for client in sorted(found)}


def read(out: Path) -> Result:
    """The result in a run's directory."""
    files = {name: json.loads((out / f"{name}.json").read_text()) for name in ("summary", "privacy")}
    return Result(out, files["summary"], pd.read_parquet(out / "metrics.parquet"), files["privacy"])


def check(scenario: Scenario) -> list[str]:
    """Everything that can be known before training: strategy options, models, data, budget. Returns warnings.

    Raises:
        BadValue: What is wrong and the way out.
    """
    warnings: list[str] = []
    seen: set[tuple[Any, ...]] = set()
    for cell in cells(replace(scenario, seeds=scenario.seeds[:1])):
        resolved = cell.scenario
        load_strategy(resolved.strategy)
        for name in (resolved.client.generator, resolved.client.task_model, resolved.server.llm):
            check_model(name)
        key = (resolved.data, resolved.client)
        if key in seen:
            continue
        seen.add(key)
        labels = label_list(resolved.data)
        if not labels:
            raise BadValue("the label list is empty")
        if resolved.data.world is None:
            warnings += _check_sites(scenario, cell.arm, resolved.data, labels)
        if resolved.client.guarantee == "dp":
            homes = 1 if resolved.data.pooled else resolved.data.clients
            for records in sorted({declared_records(cell, index) for index in range(homes)}):
                try:
                    resolved.client.plan(records, resolved.rounds)
                except BudgetTooSmall as problem:
                    raise BadValue(f"arm {cell.arm!r}, a client with {records} records: {problem}") from problem
    return list(dict.fromkeys(warnings))


def _check_sites(scenario: Scenario, arm: str, data: Any, labels: Sequence[str]) -> list[str]:
    warnings = []
    for seed in scenario.seeds:
        for index, site in enumerate(open_sites(data, seed)):
            present = [label for label in labels if label in site.train.counts()]
            if not present:
                raise BadValue(f"arm {arm!r}: client {index} has no example with a label of the list {list(labels)}")
            if len(present) == 1:
                warnings.append(f"client {index} has a single label, {present[0]!r} (seed {seed})")
    return warnings


def run(
    scenario: Scenario | str | Path,
    *,
    out: Path | str | None = None,
    workers: int | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Result:
    """Runs a scenario as a Flower simulation on this machine.

    Args:
        scenario: A `Scenario`, the path of a TOML file, or the name of a shipped scenario.
        out: The run's directory; must be new or empty. Left out: `runs/NAME-DATE` in the working directory.
        workers: Client processes; left out: one per core.
        on_event: Called with each progress event: arm, seed, round, phase, done, total.
        on_warning: Called with each warning of the check.

    Raises:
        BadValue: Something is wrong with scenario, data, models, budget or directory; nothing was run.
        fedsynth.launch.LaunchFailed: The run did not complete; the message has the reason and the log.
    """
    asked = scenario if isinstance(scenario, Scenario) else load(scenario)
    place = Path(out or Path("runs") / f"{asked.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    for warning in check(asked):
        if on_warning is not None:
            on_warning(warning)
    prepare(asked, place)
    private = private_of(place)
    private.mkdir(mode=0o700, exist_ok=True)
    launch(
        APP,
        run_config={"scenario-toml": to_toml(asked), "out-dir": str(place)},
        supernodes=asked.data.clients,
        workers=workers or len(os.sched_getaffinity(0)),
        out=place,
        logs=private / "logs",
        on_event=on_event,
    )
    return read(place)
