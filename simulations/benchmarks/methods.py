"""The tables of docs/results.md for KnowledgeSG, CrossLM and FedPIT: all arms, and the method against each.

    python simulations/benchmarks/methods.py hospitals-knowledgesg --seeds 0,1,2
    python simulations/benchmarks/methods.py hospitals-crosslm --seeds 0,1,2 --read RUN

Figures are means over clients, then mean and standard deviation over seeds; "held-out" leaves out the clients on which
settings were tuned. Differences are paired by (seed, client), with a bootstrap over seeds, then clients. Where the
server's LLM learns (CrossLM), a second table says what it writes, as the world's own parser reads it: how many texts
tell the label that they were asked for, and how many facts occur in all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import fedsynth
from fedsynth.corpus import Corpus
from fedsynth.evaluation.utility import paired_difference
from fedsynth.federation.payload import corpus_from_parquet
from fedsynth.federation.run.log import SERVER
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import from_toml, load
from fedsynth.simulation.result import Result, read
from fedsynth.world import World, load_world, main_facts, told_labels

METHODS = {
    "hospitals-knowledgesg": "knowledge_sg",
    "hospitals-crosslm": "crosslm",
    "hospitals-fedpit": "fedpit",
    "medquad": "knowledge_sg",
}
SHOWN = {
    "classification": ("accuracy", "macro_f1"),
    "instructions": ("exact_match", "field_match", "rouge_l"),
}


def spread(values: pd.Series) -> str:
    """Mean and, from two seeds on, standard deviation."""
    if not len(values):
        return "-"
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def arms_table(result: Result, shown: Sequence[str], tuned_on: Sequence[int]) -> str:
    """Markdown: one row per arm, in its last round."""
    head, held = [f.replace("_", " ") for f in shown], f"{shown[0]}, held-out".replace("_", " ")
    lines = [f"| arm | {' | '.join([head[0], held, *head[1:]])} | guarantee |", "|---" * (len(shown) + 3) + "|"]
    metrics = result.metrics[result.metrics["client"] != SERVER]
    for arm, found in result.summary["arms"].items():
        own = metrics[metrics["arm"] == arm]
        own = own[own["round"] == own["round"].max()]
        cells = []
        for metric, without in ((shown[0], ()), (shown[0], tuned_on), *((m, ()) for m in shown[1:])):
            rows = own[(own["metric"] == metric) & ~own["client"].isin(without)]
            cells.append(spread(rows.groupby("seed")["value"].mean()))
        line = result.privacy[arm]["line"]
        said = "nothing is released" if line.startswith("nothing") else found["guarantee"]
        if said == "dp":
            said = f"epsilon {found['epsilon']:.3f}"
        lines.append(f"| `{arm}` | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def differences(result: Result, method: str, metric: str, tuned_on: Sequence[int]) -> str:
    """Markdown: the method against every other arm, on all clients and on those that nothing was tuned on."""
    lines = ["| difference | clients | mean | 95 % interval | above 0 | pairs |", "|---|---|---|---|---|---|"]
    held = result.metrics[~result.metrics["client"].isin(tuned_on)]
    for arm in result.summary["arms"]:
        for name, metrics in (("all", result.metrics), ("held-out", held)) if arm != method else ():
            d = paired_difference(metrics, method, arm, metric=metric)
            what = f"{method} - {arm}" if name == "all" else ""
            interval = f"[{d.low:+.3f}, {d.high:+.3f}]"
            lines.append(f"| {what} | {name} | {d.mean:+.3f} | {interval} | {d.better:.2f} | {d.pairs} |")
    return "\n".join(lines)


def told(world: World, corpus: Corpus) -> tuple[float, int]:
    """Share of a corpus's texts whose main facts are of their label, of those that tell one; and facts in all of it."""
    facts = [main_facts(world, text) for text in corpus.prompts]
    labels = [told_labels(world, found) for found in facts]
    judged = [found == {label} for found, label in zip(labels, corpus.answers, strict=True) if found]
    return sum(judged) / max(1, len(judged)), len({fact for found in facts for fact in found})


def written_table(out: Path, metrics: pd.DataFrame, world: World) -> str:
    """Markdown: what the server's LLM writes, round by round, mean over seeds."""
    rows = []
    for path in sorted(out.glob("corpora/*/seed-*/written-round*")):
        corpus = corpus_from_parquet(path.read_bytes())
        number = int(path.stem.split("-round")[1].split("-")[0])
        right, facts = told(world, corpus)
        rows.append((path.parent.parent.name, int(path.parent.name.split("-")[1]), number, right, facts, len(corpus)))
    frame = pd.DataFrame(rows, columns=["arm", "seed", "round", "right", "facts", "texts"])
    lines = [
        "| arm | round | label told | distinct facts | texts | perplexity of public text |",
        "|---|---|---|---|---|---|",
    ]
    for (arm, number), own in frame.groupby(["arm", "round"], sort=False):
        general = metrics[(metrics["arm"] == arm) & (metrics["round"] == number) & (metrics["client"] == SERVER)]
        before, after = (
            general[general["metric"] == f"general/{name}"]["value"].mean()
            for name in ("perplexity_before", "perplexity")
        )
        change = "-" if pd.isna(before) else f"{before:.1f} -> {after:.1f}"
        lines.append(
            f"| `{arm}` | {number} | {spread(own['right'])} | {own['facts'].mean():.0f} | "
            f"{own['texts'].mean():.0f} | {change} |"
        )
    return "\n".join(lines)


def scenario_of(name: str, seeds: str, arms: str, sets: Sequence[str]) -> Scenario:
    """A shipped scenario with what the command line says."""
    chosen = [f"run={arms.split(',')!r}"] if arms else []
    return load(name, [f"seeds=[{seeds}]", *chosen, *sets])


def main() -> None:
    """Runs, or reads a run, and prints."""
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("scenario", choices=list(METHODS), nargs="?", default="hospitals-knowledgesg")
    ask.add_argument("--seeds", default="0")
    ask.add_argument("--arms", default="", help="comma-separated; left out: those of the scenario")
    ask.add_argument("--set", action="append", default=[], help="further overrides, as for fedsynth run")
    ask.add_argument("--out", type=Path, help="directory of the run")
    ask.add_argument("--read", type=Path, help="read this finished run instead")
    asked = ask.parse_args()
    if asked.read is None:
        result = fedsynth.run(scenario_of(asked.scenario, asked.seeds, asked.arms, asked.set), out=asked.out)
    else:
        result = read(asked.read)
    scenario = from_toml((result.out / "scenario.toml").read_text(encoding="utf-8"))
    shown, method = SHOWN[scenario.data.task], METHODS[asked.scenario]
    if scenario.data.task == "instructions" and scenario.data.world is None:
        shown = ("rouge_l",)  # answers in sentences are never met word by word
    seeds = ",".join(map(str, scenario.seeds))
    print(f"\n{scenario.name}, seeds {seeds}: {result.summary['seconds']:.0f} s\n")
    print(arms_table(result, shown, scenario.data.tuned_on))
    if method in result.summary["arms"]:
        print(f"\n{differences(result, method, shown[0], scenario.data.tuned_on)}")
    if scenario.data.world is not None and scenario.data.task == "classification":
        print(f"\n{written_table(result.out, result.metrics, load_world(scenario.data.world))}")
    for arm, said in result.privacy.items():
        print(f"{arm}: {said['line']}")


if __name__ == "__main__":
    main()
