"""Where a gain is lost: the share of right labels of each stage of FDKT, and what each stage's texts teach.

    python simulations/benchmarks/stages.py runs/banking77-real-... --shots 0,1,3

It reads a simulation's directory and the true text of the clients that are named in `data.tuned_on`, and of no others:
settings may be chosen by this table. A text's label is right if the mean embedding of that label's true texts is the
nearest. True texts themselves do not all pass: the first row is the ceiling. Accuracy is that of a head on the task
model's embeddings, trained on the stage's texts mixed with so many true texts of each label (means over draws), and
measured on the same clients' test texts. Nothing of this leaves the researcher's machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import label_list, open_sites
from fedsynth.models.embedding import directions, shared_embedder
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import from_toml
from fedsynth.synthesis.label_check import fitting
from fedsynth.training.classifier import classify, fit_classifier, new_task_model

DRAWS = 4
STAGES = ("zero_shot", "drafts", "written")
NOTHING = Corpus((), (), Provenance.PUBLIC)


@dataclass(frozen=True)
class Bench:
    """The tuned clients' text, and the settings of their task models.

    Attributes:
        scenario: The run's.
        labels: The public list.
        train: Private text of all of them.
        test: Their test text.
    """

    scenario: Scenario
    labels: tuple[str, ...]
    train: Corpus
    test: Corpus

    @classmethod
    def of(cls, scenario: Scenario, seed: int) -> Bench:
        """Opens the text of the tuned clients under a seed."""
        sites = open_sites(scenario.data, seed)
        own = [sites[client] for client in scenario.data.tuned_on if client < len(sites)]
        train, test = joined([site.train for site in own]), joined([site.test for site in own])
        return cls(scenario, label_list(scenario.data), train, test)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Directions of texts by the task model, shape (texts, width)."""
        longest = self.scenario.client.task_training.max_length
        found: NDArray[np.float32] = directions(
            shared_embedder(self.scenario.client.task_model), tuple(texts), longest
        ).numpy()
        return found

    def right(self, corpus: Corpus) -> float:
        """Share of texts that lie nearest to the mean of their own label's true texts."""
        means = [
            self.embed([x for x, y in zip(self.train.prompts, self.train.answers, strict=True) if y == label]).mean(0)
            for label in self.labels
        ]
        nearest = (self.embed(corpus.prompts) @ np.stack(means).T).argmax(1)
        return float(np.mean([self.labels[i] == y for i, y in zip(nearest, corpus.answers, strict=True)]))

    def drawn(self, shots: int, seed: int) -> Corpus:
        """So many true texts of each label."""
        rng, rows = np.random.default_rng(seed), list[int]()
        for label in self.labels:
            rows += rng.permutation([i for i, y in enumerate(self.train.answers) if y == label])[:shots].tolist()
        return self.train.take(rows)

    def accuracy(self, corpus: Corpus, shots: int) -> float:
        """Mean over draws of the accuracy after training on the texts and true ones together."""
        settings, found = self.scenario.client.task_training, list[float]()
        for seed in range(DRAWS if shots else 1):
            model = new_task_model(self.scenario.client.task_model, len(self.labels), "head", seed)
            both = joined([self.drawn(shots, seed), corpus])
            fit_classifier(model, None, both, self.labels, settings, epochs=settings.private_epochs, seed=seed)
            said = classify(model, None, self.test.prompts, settings.max_length)
            found.append(np.mean([self.labels[i] == y for i, y in zip(said, self.test.answers, strict=True)]))
        return float(np.mean(found))


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """One corpus; its provenance is of no use here, as nothing leaves."""
    return Corpus(
        tuple(x for c in corpora for x in c.prompts), tuple(y for c in corpora for y in c.answers), Provenance.PRIVATE
    )


def stored(run: Path, arm: str, seed: int, stage: str) -> Corpus:
    """A stage's texts of all clients, without empty ones."""
    frames = [pd.read_parquet(f) for f in sorted((run / "corpora" / arm / f"seed-{seed}").glob(f"{stage}-*.parquet"))]
    rows = [(x, y) for frame in frames for x, y in zip(frame["prompt"], frame["answer"], strict=True) if x.strip()]
    return Corpus(tuple(x for x, _ in rows), tuple(y for _, y in rows), Provenance.PUBLIC)


def main() -> None:
    """Prints the table of a run."""
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("run", type=Path, nargs="?", help="a simulation's directory")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--shots", default="0,1,3")
    asked = ask.parse_args()
    if asked.run is None:
        print("name the directory of a run of FDKT on labelled text")
        return
    torch.set_num_threads(1)
    scenario = from_toml((asked.run / "scenario.toml").read_text(encoding="utf-8"))
    bench, shots = Bench.of(scenario, asked.seed), [int(n) for n in asked.shots.split(",")]
    wordings = Corpus(tuple(map(scenario.task.in_words, bench.labels)), bench.labels, Provenance.PUBLIC)
    rows: list[tuple[str, Corpus]] = [
        ("eight true texts of each label", bench.drawn(8, DRAWS)),
        ("no further text", NOTHING),
        ("the labels in words", wordings),
    ]
    for arm in sorted(path.name for path in (asked.run / "corpora").iterdir()):
        for stage in STAGES:
            if not len(found := stored(asked.run, arm, asked.seed, stage)):
                continue
            rows.append((f"`{arm}`: {stage}", found))
            if stage == "drafts":
                fits = fitting(found, bench.labels, scenario.task, bench.embed).corpus
                rows.append((f"`{arm}`: drafts that pass the check", fits))
    print(f"| texts | number | right labels | {' | '.join(f'with {n} true texts per label' for n in shots)} |")
    print(f"|---|---|---|{'---|' * len(shots)}")
    for name, corpus in rows:
        right = f"{bench.right(corpus):.2f}" if len(corpus) else "-"
        reached = [f"{bench.accuracy(corpus, n):.3f}" if n or len(corpus) else "-" for n in shots]
        print(f"| {name} | {len(corpus)} | {right} | {' | '.join(reached)} |", flush=True)


if __name__ == "__main__":
    main()
