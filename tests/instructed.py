"""Sites with instructions, and two rounds with state at the server: what slow tests between processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from inprocess import canary, play

from fedsynth.privacy.audit import contents, problems
from fedsynth.testing import ScriptedLLM

ROWS = 30
SCENARIO = """
name = "between-hospitals"
seeds = [0]
rounds = {rounds}
[strategy]
use = "fedsynth.strategies.lora_avg:LoraAverage"
[data]
source = "{file}"
task = "instructions"
clients = {clients}
split = "natural"
client_column = "site"
unit = "person"
test = {{ column = "part", equals = "test" }}
[client]
generator = "assets:tiny-slm"
guarantee = "{guarantee}"
budget = {{ epsilon = 8.0 }}
generator_training = {{ expected_batch_size = 10, steps = {steps}, learning_rate = 1e-3, rank = 2, alpha = 4.0 }}
answer_tokens = 8
[server]
llm = "assets:tiny-llm"
timeout = {timeout}
[arms.main]
"""
SITE_TOML = {
    "independent_rows = true": 'person = "person"',
    f"records = {ROWS}": f"records = {ROWS - ROWS // 10}",
    "# test = {": "test = {",
    'equals = "test" }   #': 'equals = "test" } #',
    'column = "split"': 'column = "part"',
}


def records(names: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """By site its records, a canary in each instruction and in each response; the last tenth is held out."""
    return {
        name: pd.DataFrame(
            {
                "text": [f"note {canary(2 * (1000 * site + i))} of thing {i % 5}" for i in range(ROWS)],
                "response": [f"ward {i % 5}; {canary(2 * (1000 * site + i) + 1)}" for i in range(ROWS)],
                "person": [f"{name}-{i}" for i in range(ROWS)],
                "part": ["test" if i >= ROWS - ROWS // 10 else "train" for i in range(ROWS)],
                "site": name,
            }
        )
        for site, name in enumerate(names)
    }


def scenario(
    folder: Path,
    names: tuple[str, ...],
    *,
    steps: int = 10,
    rounds: int = 2,
    guarantee: str = "dp",
    timeout: float = 240,
) -> str:
    """The scenario of simulation and deployment alike; the simulation reads all sites' records from one file."""
    file = folder / f"{'-'.join(names)}.csv"
    pd.concat(records(names).values()).to_csv(file, index=False)
    return SCENARIO.format(
        file=file, clients=len(names), steps=steps, rounds=rounds, guarantee=guarantee, timeout=timeout
    )


def adapters(out: Path) -> dict[str, dict[str, Any]]:
    """Every adapter that a run has kept: by file its arrays."""
    found = sorted((out / "adapters").rglob("*.safetensors"))
    from safetensors.numpy import load_file

    return {str(path.relative_to(out)): load_file(path) for path in found}


def same(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> bool:
    """Whether two runs have kept the same adapters, to the last bit."""
    return one.keys() == other.keys() and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in ((one[file], other[file]) for file in one)
    )


def simulated(text: str, folder: Path, run: str) -> dict[str, dict[str, Any]]:
    """The adapters of the same scenario in this process; unmeasured, or exchanges would be numbered otherwise."""
    folder.mkdir()
    return adapters(play(text, folder, "main", llm=ScriptedLLM(), run=run, measures=False).out)


def account(ledger: Path) -> dict[str, Any]:
    """A ledger in which nothing is amiss."""
    found = contents(ledger)
    assert not problems(found)
    return found
