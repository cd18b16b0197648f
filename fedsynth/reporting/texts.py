"""Quality of a run's released texts: variety, lengths, labels, distance from public text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedsynth.corpus import Corpus, Provenance
from fedsynth.evaluation.fidelity import distinct, frechet, mauve, self_bleu
from fedsynth.federation.payload import corpus_from_parquet
from fedsynth.federation.run.log import SERVER
from fedsynth.identifiers import counts
from fedsynth.reporting.statistics import Figures, Where
from fedsynth.rouge import words
from fedsynth.scenario.data import Data
from fedsynth.typed import BadValue
from fedsynth.world import load_world, private_notes, private_records

PER_CLIENT = 200  # texts of a client that self-BLEU and distinct-n compare at most
HOMES = 32  # clients of a simulated world whose fresh text is drawn
EMBEDDED = 512  # texts of a set that are embedded at most
FEWEST = 20  # texts of a set; with fewer no distance is given, as it would be bias alone
Embed: TypeAlias = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class Released:
    """One file of texts in a run's directory."""

    arm: str
    seed: int
    kind: str
    client: int
    corpus: Corpus
    file: str


def released(out: Path) -> list[Released]:
    """The texts of a run: each client's last round of each kind, sorted.

    Raises:
        BadValue: If a file holds private text, which must not be in a run's directory.
    """
    found: dict[tuple[str, int, str, int], tuple[int, Path]] = {}
    for path in sorted((out / "corpora").glob("*/seed-*/*-round*-client*.parquet")):
        head, _, client = path.stem.rpartition("-client")
        kind, _, number = head.rpartition("-round")
        key = (path.parent.parent.name, int(path.parent.name.removeprefix("seed-")), kind, int(client))
        found[key] = max(found.get(key, (-1, path)), (int(number), path))
    texts = []
    for place, (_, path) in sorted(found.items()):
        corpus = corpus_from_parquet(path.read_bytes())
        if corpus.provenance is Provenance.PRIVATE:
            raise BadValue(f"{path} holds private text, which no report may read: remove the file")
        texts.append(Released(*place, corpus, path.relative_to(out).as_posix()))
    return texts


def kinds_of(texts: Sequence[Released], arm: str | None = None) -> list[str]:
    """Kinds of text in the order of a run."""
    order = {"drafts": 0, "instructions": 1, "pairs": 2, "written": 3}
    found = {t.kind for t in texts if arm in (None, t.arm)}
    return sorted(found, key=lambda kind: (order.get(kind, 9), kind))


def add_texts(
    figures: Figures, texts: Sequence[Released], labels: Sequence[str], reference: Reference | None = None
) -> None:
    """Adds counts, lengths, variety and label balance: per client, then means over clients, then over seeds.

    Sets are cut to equally many texts per client before their variety is compared, as it depends on their number.

    Args:
        figures: Gets the rows.
        texts: The run's texts.
        labels: The public label list; empty for instructions, which have no balance.
        reference: Gets its own line if it has as many texts of a client.
    """
    for kind in kinds_of(texts):
        own = [t for t in texts if t.kind == kind and len(t.corpus) > 1]
        if not own:
            continue
        size = min(PER_CLIENT, min(len(t.corpus) for t in own))
        rows = [(t.arm, t.seed, name, value) for t in own for name, value in _quality(t.corpus, size, labels).items()]
        _add(figures, kind, pd.DataFrame(rows, columns=["arm", "seed", "metric", "value"]))
        if reference is not None:
            ground = [c for c in reference.corpora.values() if len(c) >= size]
            known = labels if any(set(c.answers) & set(labels) for c in ground) else ()
            fresh = pd.DataFrame([_quality(corpus, size, known) for corpus in ground])
            for name in fresh.columns.difference(["texts"], sort=False):
                figures.add(
                    "text", f"{kind}/{name}", "mean", float(fresh[name].mean()), Where(arm=reference.other_name)
                )


def add_identifiers(figures: Figures, texts: Sequence[Released]) -> None:
    """Adds how many texts have identifiers and secrets by public rules, of all clients and seeds of an arm."""
    for kind in kinds_of(texts):
        for arm in dict.fromkeys(t.arm for t in texts if t.kind == kind):
            rows = [
                f"{text}\n{answer}"
                for t in texts
                if (t.arm, t.kind) == (arm, kind)
                for text, answer in zip(t.corpus.prompts, t.corpus.answers, strict=True)
            ]
            figures.add("identifiers", f"{kind}/searched", "sum", len(rows), Where(arm=arm))
            for name, count in counts(rows).items():
                figures.add("identifiers", f"{kind}/{name}", "sum", count, Where(arm=arm))


def _quality(corpus: Corpus, size: int, labels: Sequence[str]) -> dict[str, float]:
    few = _spread_out(corpus.prompts, size)
    found = {
        "texts": float(len(corpus)),
        "words": float(np.mean([len(words(text)) for text in corpus.prompts])),
        "compared": float(size),
        "distinct_1": distinct(few, 1),
        "distinct_2": distinct(few, 2),
        "self_bleu": self_bleu(few),
    }
    if labels:
        counts = corpus.counts()
        found["label_balance"] = balance(counts, labels)
        found |= {f"label/{label}": counts[label] / len(corpus) for label in labels}
    return found


def balance(counts: Mapping[str, int], labels: Sequence[str]) -> float:
    """Entropy of the labels over its largest value, in 0..1: 1 where all labels are equally frequent."""
    total = sum(counts.get(label, 0) for label in labels)
    if len(labels) < 2 or not total:
        return 1.0 if len(labels) == 1 else 0.0
    shares = [counts.get(label, 0) / total for label in labels]
    return sum(-s * math.log(s) for s in shares if s) / math.log(len(labels)) + 0.0


@dataclass(frozen=True)
class Reference:
    """Public text that a run's texts are compared with.

    Attributes:
        name: A name in words.
        corpora: Texts by client; `SERVER` for text of no client.
        other: A second sample of the same source, to show the distance of two samples; or empty.
        other_name: Its name in the column of arms.
    """

    name: str
    corpora: Mapping[int, Corpus]
    other: Mapping[int, Corpus]
    other_name: str = "(fresh simulated text)"


def simulated_reference(data: Data, seeds: Sequence[int]) -> Reference:
    """Fresh texts of a simulated world's clients, under seeds that no cell of the run has, from the test half.

    Args:
        data: The scenario's data, of a world.
        seeds: The run's seeds.
    """
    assert data.world is not None
    world, draw = load_world(data.world), private_records if data.task == "instructions" else private_notes
    first, second = max(seeds) + 1, max(seeds) + 2

    def drawn(seed: int) -> dict[int, Corpus]:
        return {i: draw(world, i, PER_CLIENT, seed, split="test") for i in range(min(data.clients, HOMES))}

    name = f"fresh simulated texts of the same clients (seeds {first} and {second}, not of the run)"
    return Reference(name, drawn(first), drawn(second))


def add_distances(
    figures: Figures, texts: Sequence[Released], reference: Reference, embed: Embed, *, part: str = "text"
) -> None:
    """Adds MAUVE and Frechet distance of each arm's texts, all clients pooled, from the reference: by seed, then means.

    Every set has the same number of texts, the same for each client, so that figures can be compared.
    """
    vectors: dict[tuple[str, ...], NDArray[np.float32]] = {}

    def placed(chosen: Sequence[str], size: int) -> NDArray[np.float32]:
        few = tuple(_spread_out(chosen, size))
        if few not in vectors:  # arms with the same requests have the same drafts
            vectors[few] = embed(few)
        return vectors[few]

    against, others = _of_all(list(reference.corpora.values())), _of_all(list(reference.other.values()))
    for kind in kinds_of(texts):
        groups: dict[tuple[str, int], list[Corpus]] = {}
        for t in texts:
            if t.kind == kind and (t.client == SERVER or SERVER in reference.corpora or t.client in reference.corpora):
                groups.setdefault((t.arm, t.seed), []).append(t.corpus)
        sets = {key: found for key, own in groups.items() if len(found := _of_all(own)) >= FEWEST}
        size = min(len(against), *map(len, sets.values())) if sets else 0
        if size < FEWEST:
            continue
        ground = placed(against, size)
        rows: list[tuple[str, int, str, float]] = []
        for (arm, seed), chosen in sets.items():
            own = placed(chosen, size)
            figure = {"mauve": mauve(own, ground, seed=0), "frechet": frechet(own, ground), "embedded": float(size)}
            rows += [(arm, seed, name, value) for name, value in figure.items()]
        _add(figures, kind, pd.DataFrame(rows, columns=["arm", "seed", "metric", "value"]), part)
        if len(others) >= size:
            far = placed(others, size)
            figures.add(part, f"{kind}/mauve", "mean", mauve(far, ground, seed=0), Where(arm=reference.other_name))
            figures.add(part, f"{kind}/frechet", "mean", frechet(far, ground), Where(arm=reference.other_name))
            figures.add(part, f"{kind}/embedded", "mean", float(size), Where(arm=reference.other_name))


def _of_all(corpora: Sequence[Corpus]) -> list[str]:
    """Equally many texts of each corpus, `EMBEDDED` together at most; empty texts have no embedding."""
    lists = [[text for text in corpus.prompts if text.strip()] for corpus in corpora]
    each = min(min(map(len, lists), default=0), max(1, EMBEDDED // max(1, len(lists))))
    return [text for own in lists for text in _spread_out(own, each)]


def _spread_out(texts: Sequence[str], size: int) -> list[str]:
    """`size` of the texts at equal distances, as texts are often sorted by label."""
    return [texts[i * len(texts) // size] for i in range(min(size, len(texts)))]


def _add(figures: Figures, kind: str, frame: pd.DataFrame, part: str = "text") -> None:
    """Seed by seed, then mean and deviation over seeds."""
    for (arm, metric), rows in frame.groupby(["arm", "metric"], sort=False):
        per_seed = rows.groupby("seed")["value"].mean()
        name = f"{kind}/{metric}"
        for seed, value in per_seed.items():
            figures.add(part, name, "value", float(value), Where(arm=str(arm), seed=int(str(seed))))
        figures.add(part, name, "mean", float(per_seed.mean()), Where(arm=str(arm)))
        figures.add(part, name, "std", float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None, Where(arm=str(arm)))
        figures.add(part, name, "n", len(per_seed), Where(arm=str(arm)))


def shown_labels(texts: Sequence[Released], listed: Sequence[str] | None) -> list[str]:
    """The public label list, or the labels of the released texts if a run has no list at hand."""
    if listed is not None:
        return list(listed)
    return sorted(Counter(label for t in texts for label in t.corpus.answers))


__all__ = [
    "SERVER",
    "Embed",
    "Reference",
    "Released",
    "add_distances",
    "add_identifiers",
    "add_texts",
    "balance",
    "kinds_of",
    "released",
    "shown_labels",
    "simulated_reference",
]
