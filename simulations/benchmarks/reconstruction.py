"""Planted secrets that a model gives away: a LoRA without DP, KnowledgeSG, and models that never saw them.

    python simulations/benchmarks/reconstruction.py --clients 2

Each private response of the simulated hospitals ends with a reference of 40 random bits. The attacker knows every
private instruction and takes the greedy response (`fedsynth.evaluation.attack`). Pooled over the clients; intervals are
Clopper and Pearson's, p-values Fisher's exact test against the model that never saw these secrets.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from scipy.stats import binomtest, fisher_exact

import fedsynth
from fedsynth.corpus import Corpus
from fedsynth.data.partition import open_site
from fedsynth.evaluation.attack import extraction
from fedsynth.lora import Adapter
from fedsynth.models.adapters import new_adapter, with_adapter
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_generator, load_tokenizer
from fedsynth.scenario.client import Tuning
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import load
from fedsynth.synthesis.student import taught
from fedsynth.training.engine import Engine
from fedsynth.world import secret_of

SETS = (
    "data.planted=true",
    "data.test_per_client=50",
    "client.generator_training.max_length=96",  # a reference has more tokens than the rest of a response
    "strategy.max_new_tokens=96",
    "strategy.tuning.max_length=96",
)
# Without DP, until the secrets are known by heart.
BY_HEART = Tuning(epochs=150, batch=20, learning_rate=5e-3, max_length=96, rank=16, alpha=32.0)
UNSEEN = 1000  # a seed whose secrets no arm of the run has


def attacked(model: Any, name: str, secrets: Corpus) -> tuple[int, float]:
    """Secrets that were written, and the mean ROUGE-L of what was written with the true responses."""
    planted = [secret_of(answer) or "" for answer in secrets.answers]
    found = extraction(LocalLLM(model.eval(), load_tokenizer(name)), secrets, planted=planted)
    return round((found.recovered or 0.0) * found.records), found.rouge_l


def by_heart(scenario: Scenario, seed: int, client: int) -> Adapter:
    """A LoRA that has learnt a client's records without DP."""
    name = scenario.client.generator
    start = new_adapter(name, rank=BY_HEART.rank, alpha=BY_HEART.alpha, seed=client)
    train = open_site(scenario.data, client, seed).train
    return taught(Engine(), name, start, train, BY_HEART, loss_on="response", seed=client)[0]


def rows(scenario: Scenario, out: Path) -> list[dict[str, Any]]:
    """One row per model: what was recovered of all clients' secrets."""
    seed, name = scenario.seeds[0], scenario.client.generator
    fedsynth.run(scenario, out=out)
    counts: dict[str, list[tuple[int, float]]] = {}
    total = 0
    for client in range(scenario.data.clients):
        secrets = open_site(scenario.data, client, seed).train
        total += len(secrets)
        saved = out / "adapters"
        models = {
            "LoRA without DP, by heart": lambda c=client: with_adapter(name, by_heart(scenario, seed, c)),
            "the same on other secrets": lambda c=client: with_adapter(name, by_heart(scenario, UNSEEN, c)),
            "base": lambda: load_generator(name),
        }
        for arm in scenario.run:
            for what, kind in (("adapter", "client"), ("target", "target")):
                folder = saved / arm / f"seed-{seed}" / f"round-1-{kind}-{client}"
                models[f"{arm}: {what}"] = lambda f=folder: PeftModel.from_pretrained(load_generator(name), str(f))
        for which, load_model in models.items():
            counts.setdefault(which, []).append(attacked(load_model(), name, secrets))
            print(f"client {client}: {which}: {counts[which][-1]}", flush=True)
    unseen = sum(hits for hits, _ in counts["the same on other secrets"])
    found = []
    for which, parts in counts.items():
        hits = sum(h for h, _ in parts)
        low, high = binomtest(hits, total).proportion_ci(0.95)
        p = fisher_exact([[hits, total - hits], [unseen, total - unseen]]).pvalue
        found.append(
            {
                "model": which,
                "recovered": hits / total,
                "low": low,
                "high": high,
                "p": p,
                "rouge_l": sum(r for _, r in parts) / len(parts),
                "secrets": total,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    chosen = parser.parse_args()
    sets = (*SETS, f"data.clients={chosen.clients}", f"seeds=[{chosen.seed}]")
    scenario = replace(load("hospitals-knowledgesg", sets), run=("knowledge_sg", "no_dp"))
    with tempfile.TemporaryDirectory() as folder:
        found = rows(scenario, Path(folder) / "run")
    for row in found:
        row |= {"bar": "reconstruction", "limit": None, "ok": True}
        print(
            f"{row['model']:28} {row['recovered']:6.3f} [{row['low']:.3f}, {row['high']:.3f}]  "
            f"p {row['p']:.3g}  ROUGE-L {row['rouge_l']:.3f}"
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
