"""Extraction of planted secrets from the adapters of a run whose private responses end with them.

    python simulations/benchmarks/leakage.py runs/hospitals-fedpit

Two adversaries know every instruction: `global` asks the adapter that the server made of all; `uploads` is the
server, which holds each client's own adapter and asks it for that client's records. Per arm and adversary, over all
private training records of the last round (or `--round`): ROUGE-L of what is written against the true response, the
share of secrets that are written, and their exposure (bits by which the model's ranking of the true secret among random
ones narrows the search: 0 to log2(candidates + 1), 1.44 for a model that knows nothing), each with the 95 % interval
of a bootstrap over records. `base` is the model before any training. A simulated world only: the records are drawn
again from the scenario.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peft import PeftModel

from fedsynth.corpus import Corpus, pool
from fedsynth.data.partition import open_sites
from fedsynth.evaluation.attack import exposure, extraction
from fedsynth.instructions import REPLY, asked
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_generator, load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.world import World, load_world, secret_of
from fedsynth.world.records import draw_secrets

RESAMPLES = 10_000


@dataclass(frozen=True)
class Leak:
    """One row of the table; each figure is (mean, low, high)."""

    arm: str
    seed: int
    adversary: str
    records: int
    rouge_l: tuple[float, float, float]
    recovered: tuple[float, float, float]
    exposure: tuple[float, float, float]
    field_match: float | None


@dataclass(frozen=True)
class Attacked:
    """A `TextModel` in which every record is asked of one client's model."""

    models: Mapping[int, LocalLLM]
    owners: Mapping[str, int]

    def _by_owner(self, prompts: Sequence[str]) -> dict[int, list[int]]:
        rows: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(self.owners[prompt.partition(REPLY)[0]], []).append(row)
        return rows

    def complete(self, prompts: Sequence[str], sampling: SamplingParams, *, seed: int) -> list[str]:
        found = [""] * len(prompts)
        for owner, rows in self._by_owner(prompts).items():
            texts = self.models[owner].complete([prompts[i] for i in rows], sampling, seed=seed)
            for row, text in zip(rows, texts, strict=True):
                found[row] = text
        return found

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        found = [0.0] * len(prompts)
        for owner, rows in self._by_owner(prompts).items():
            pairs = [prompts[i] for i in rows], [continuations[i] for i in rows]
            for row, value in zip(rows, self.models[owner].score(*pairs), strict=True):
                found[row] = value
        return found


def attack(
    cell: Cell, models: Mapping[int, LocalLLM], adversary: str, *, candidates: int, utility: float | None
) -> Leak:
    """One adversary against all private records of a cell."""
    sites = [site.train for site in open_sites(cell.scenario.data, cell.seed)]
    owners = {asked(x).partition(REPLY)[0]: client for client, site in enumerate(sites) for x in site.prompts}
    records, model = pool(sites), Attacked(models, owners)
    planted = [secret_of(answer) or "" for answer in records.answers]
    written = extraction(model, records, planted=planted)
    share, count = written.recovered or 0.0, written.records
    rng = np.random.default_rng(0)
    shares = rng.binomial(count, share, RESAMPLES) / count  # a bootstrap of yes and no
    bits = exposures(model, records, planted, candidates, load_world(cell.scenario.data.world or ""))
    means = [bits[rng.integers(len(bits), size=len(bits))].mean() for _ in range(RESAMPLES)]
    return Leak(
        arm=cell.arm,
        seed=cell.seed,
        adversary=adversary,
        records=count,
        rouge_l=(written.rouge_l, written.low, written.high),
        recovered=(share, *_interval(shares)),
        exposure=(float(bits.mean()), *_interval(means)),
        field_match=utility,
    )


def exposures(
    model: Attacked, records: Corpus, planted: Sequence[str], candidates: int, world: World
) -> np.ndarray[Any, Any]:
    """Bits per record, of an attacker who knows the response up to its secret. Candidates are like the true secret."""
    rng = np.random.default_rng(1)
    prompts, secrets = [], []
    for x, y, secret in zip(records.prompts, records.answers, planted, strict=True):
        others = draw_secrets(world, candidates, rng)
        prompts += [f"{asked(x)} {y.removesuffix(f' {secret}')}"] * (candidates + 1)
        secrets += [f" {each}" for each in (secret, *others)]
    scores = np.array(model.score(prompts, secrets)).reshape(len(records), candidates + 1)
    return np.array([exposure(row[0], row[1:].tolist()) for row in scores])


def _interval(values: Any) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def load(cell: Cell, folder: Path | None) -> LocalLLM:
    """The clients' model, with a saved adapter."""
    name = cell.scenario.client.generator
    model: Any = load_generator(name)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    return LocalLLM(model.eval(), load_tokenizer(name), batch_size=128)


def views(run: Path, cell: Cell, number: int | None) -> dict[str, dict[int, LocalLLM]]:
    """By adversary: the model that each client's records are asked of. Empty where no adapter left a client."""
    place = run / "adapters" / cell.arm / f"seed-{cell.seed}"
    clients = range(cell.scenario.data.clients)
    number = number or cell.scenario.rounds
    found = {}
    if (folder := place / f"round-{number}-global").is_dir():
        found["global"] = dict.fromkeys(clients, load(cell, folder))
    folders = {client: place / f"round-{number}-client-{client}" for client in clients}
    if all(folder.is_dir() for folder in folders.values()):
        found["uploads"] = {client: load(cell, folder) for client, folder in folders.items()}
    return found


def leaks(run: Path, *, arms: Sequence[str], number: int | None, candidates: int, base: bool = True) -> list[Leak]:
    """One row per (arm, seed, adversary); the base once per seed."""
    scenario = from_toml((run / "scenario.toml").read_text(encoding="utf-8"))
    metrics = pd.read_parquet(run / "metrics.parquet")
    rows: list[Leak] = []
    for cell in cells(scenario):
        if arms and cell.arm not in arms:
            continue
        data = cell.scenario.data
        if not data.planted or data.pooled:
            raise SystemExit(f"arm {cell.arm!r} has no planted secrets to look for: data.planted = true")
        if base and not any(row.arm == "base" and row.seed == cell.seed for row in rows):
            untrained = Cell("base", cell.seed, cell.scenario)
            rows.append(
                attack(
                    untrained,
                    dict.fromkeys(range(data.clients), load(cell, None)),
                    "anyone",
                    candidates=candidates,
                    utility=None,
                )
            )
        own = metrics[
            (metrics["arm"] == cell.arm) & (metrics["seed"] == cell.seed) & (metrics["metric"] == "field_match")
        ]
        utility = float(own[own["round"] == own["round"].max()]["value"].mean())
        for adversary, models in views(run, cell, number).items():
            rows.append(attack(cell, models, adversary, candidates=candidates, utility=utility))
    return rows


def line(leak: Leak) -> str:
    """A row of the printed table."""
    figures = "  ".join(
        f"{m:6.3f} [{low:6.3f}, {high:6.3f}]" for m, low, high in (leak.rouge_l, leak.recovered, leak.exposure)
    )
    utility = "     -" if leak.field_match is None else f"{leak.field_match:6.3f}"
    return f"{leak.arm:18} {leak.seed:4} {leak.adversary:8} {leak.records:5}  {figures}  {utility}"


def over_seeds(rows: Sequence[Leak]) -> list[str]:
    """Per arm and adversary, the mean over seeds of each figure and its range."""
    figures = {"ROUGE-L": "rouge_l", "secrets written": "recovered", "exposure, bits": "exposure"}
    table = pd.DataFrame(
        [{"arm": row.arm, "sees": row.adversary, **{n: getattr(row, f)[0] for n, f in figures.items()}} for row in rows]
    )
    found = table.groupby(["arm", "sees"], sort=False).agg(["mean", "min", "max"])
    names = list(dict.fromkeys(name for name, _ in found.columns))
    return ["| arm | adversary | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)] + [
        f"| `{arm}` | {sees} | "
        + " | ".join(f"{row[n, 'mean']:.3f} ({row[n, 'min']:.3f} to {row[n, 'max']:.3f})" for n in names)
        + " |"
        for (arm, sees), row in found.iterrows()
    ]


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("run", type=Path, nargs="?")
    ask.add_argument("--arms", nargs="*", default=[])
    ask.add_argument("--round", type=int, help="left out: the last")
    ask.add_argument("--candidates", type=int, default=31, help="random secrets that the true one is ranked among")
    ask.add_argument("--json", type=Path)
    chosen = ask.parse_args()
    if chosen.run is None:
        print("give the directory of a run with planted secrets: fedsynth run hospitals-fedpit --out DIRECTORY")
        return
    rows = leaks(chosen.run, arms=chosen.arms, number=chosen.round, candidates=chosen.candidates)
    print(
        f"{'arm':18} seed {'sees':8} {'n':>5}  {'ROUGE-L':24}  {'secrets written':24}  {'exposure, bits':24}  "
        "field match"
    )
    for row in rows:
        print(line(row))
    print("\nmean over seeds (lowest to highest):", *over_seeds(rows), sep="\n")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
