"""A run's directory: what people share. Private state lies beside it, in another one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from fedsynth.corpus import Corpus
from fedsynth.data.card import data_cards
from fedsynth.federation.checkpoint import CHECKPOINTS, Checkpoint
from fedsynth.federation.environment import FILE, surroundings
from fedsynth.federation.payload import corpus_to_parquet
from fedsynth.lora import Adapter
from fedsynth.models.adapters import save_adapter
from fedsynth.privacy.plan import FINE, ROWS_OF_A_PERSON, DPPlan, Statement, group_epsilon
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.scenario.toml import from_toml, load, to_toml
from fedsynth.synthesis.attrition import begins, losses
from fedsynth.synthesis.curation import Stage
from fedsynth.typed import BadValue, build, plain

SERVER = -1  # in the client column: a figure of the server
COLUMNS = ("arm", "seed", "round", "client", "metric", "value")


@dataclass
class Journal:
    """What one cell records: metrics, released corpora, adapters, progress.

    Attributes:
        cell: Arm and seed.
        folder: The run's directory.
        events: The file that progress lines are appended to.
        round: Of the metrics that follow.
        released: What clients let out: text, adapters, scores.
        silent: (Client, exchange) without a usable answer, where one would have said what was spent.
        rows: Tidy metrics so far.
        statements: What each home said of its privacy, the latest.
        totals: By name and client what is counted over the whole cell.
        left: By client: how many texts were asked for, and how many of them the steps so far have left.
        begun: Round and name of the step that `left` counts from.
        simulated: Whether the clients are; else they are real sites.
    """

    cell: Cell
    folder: Path
    events: Path
    round: int = 0
    released: set[str] = field(default_factory=set)
    silent: set[tuple[int, int]] = field(default_factory=set)
    rows: list[tuple[str, int, int, int, str, float]] = field(default_factory=list)
    statements: dict[int, Statement] = field(default_factory=dict)
    totals: dict[tuple[str, int], float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    left: dict[int, tuple[int, int]] = field(default_factory=dict)
    begun: tuple[int, str] = (0, "")
    simulated: bool = True

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What the cell needs to go on after it was ended."""
        return Checkpoint(self.place(CHECKPOINTS))

    def place(self, kind: str) -> Path:
        """The folder of this cell among those of a kind."""
        return self.folder / kind / self.cell.arm / f"seed-{self.cell.seed}"

    def record(self) -> dict[str, Any]:
        """All that was recorded so far, as plain JSON."""
        return {
            "rows": [row[2:] for row in self.rows],
            "totals": [[*key, value] for key, value in self.totals.items()],
            "statements": {str(home): plain(said) for home, said in self.statements.items()},
            "released": sorted(self.released),
            "silent": sorted(map(list, self.silent)),
            "seconds": time.monotonic() - self.started,
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Goes on from what `record` gave."""
        self.rows = [(self.cell.arm, self.cell.seed, *row) for row in record["rows"]]
        self.totals = {(name, client): value for name, client, value in record["totals"]}
        self.statements = {int(home): build(Statement, said) for home, said in record["statements"].items()}
        self.released = set(record["released"])
        self.silent = {(client, exchange) for client, exchange in record["silent"]}
        self.started = time.monotonic() - record["seconds"]

    def metric(self, client: int, name: str, value: float) -> None:
        """One figure of one client (or of the server: `SERVER`)."""
        self.rows.append((self.cell.arm, self.cell.seed, int(self.round), int(client), name, float(value)))

    def stage(self, client: int, stage: Stage) -> None:
        """One line of a client's yield funnel: what a step took in, kept, and why it dropped the rest."""
        asked, left = self.left.get(client, (0, -1))
        if begins(stage.name, stage.before, left):
            self.left = self.left if self.begun == (self.round, stage.name) else {}
            self.begun, asked = (self.round, stage.name), stage.before
        self.left[client] = (asked, stage.after)
        self.metric(client, f"yield/{stage.name}/in", stage.before)
        self.metric(client, f"yield/{stage.name}/kept", stage.after)
        for reason, count in sorted(stage.dropped.items()):
            self.metric(client, f"yield/{stage.name}/dropped/{reason}", count)
        if stage.lost:
            self.metric(client, f"yield/{stage.name}/labels_lost", len(stage.lost))

    def corpus(self, client: int, kind: str, corpus: Corpus, **more: str) -> None:
        """Released or server-written text, with provenance, grants and `more` in the file's metadata."""
        folder = self.place("corpora")
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"sha256": corpus.fingerprint(), "arm": self.cell.arm, "seed": str(self.cell.seed), "kind": kind}
        path = folder / f"{kind}-round{self.round}-client{client}.parquet"
        path.write_bytes(corpus_to_parquet(corpus, **facts, **more))

    def adapter(self, client: int, adapter: Adapter, kind: str = "client", *, base: str | None = None) -> None:
        """An adapter in PEFT format: `PeftModel.from_pretrained(base, folder)` loads it.

        Args:
            client: Whose; `SERVER` for one of all clients.
            adapter: A whole one, factors A and B.
            kind: `client` for what a client released; else what the server made of it.
            base: Name of the model that it belongs to; left out: the clients' generator.
        """
        place = f"round-{self.round}-{kind}" + ("" if client == SERVER else f"-{client}")
        folder = self.place("adapters") / place
        save_adapter(adapter, base or self.cell.scenario.client.generator, folder)

    def count(self, name: str, client: int, amount: float) -> None:
        """Adds to a figure that is told once, at the end of the cell: bytes, seconds, tokens."""
        self.totals[name, int(client)] = self.totals.get((name, int(client)), 0) + float(amount)

    def state(self, client: int, said: Statement) -> None:
        """What a home says of its privacy: the largest epsilon holds, as answers may come late; and what once left
        without a guarantee stays without."""
        earlier = self.statements.get(client)
        if earlier is None or _spends(said) >= _spends(earlier):
            self.statements[client] = said

    def progress(self, phase: str, done: int, total: int) -> None:
        """One line for whoever watches."""
        line: dict[str, Any] = {"event": "progress", "arm": self.cell.arm, "seed": self.cell.seed, "round": self.round}
        line |= {"kept": self.kept, "epsilon": self.epsilon}
        append_event(self.events, {**line, "phase": phase, "done": done, "total": total})

    @property
    def kept(self) -> float | None:
        """Of the texts that were asked for last, of all clients together, the share that is left."""
        asked = sum(asked for asked, _ in self.left.values())
        return sum(left for _, left in self.left.values()) / asked if asked else None

    @property
    def epsilon(self) -> float | None:
        """The largest that a client has stated; None without a guarantee, or if none has."""
        if any(said.guarantee == "none" for said in self.statements.values()):
            return None
        return max((said.epsilon for said in self.statements.values() if said.epsilon is not None), default=None)

    def close(self) -> None:
        """Adds what is known at the end of the cell."""
        for (name, client), amount in sorted(self.totals.items()):
            self.metric(client, name, amount)
        self.metric(SERVER, "seconds/cell", time.monotonic() - self.started)
        for client, said in sorted(self.statements.items()):
            if said.epsilon is not None:
                self.metric(client, "privacy/epsilon", said.epsilon)
                self.metric(client, "privacy/delta", said.delta)


def _spends(said: Statement) -> float:
    return math.inf if said.epsilon is None else said.epsilon


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """One JSON object per line; the launcher reads them as they come."""
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(event) + "\n")


def check_free(out: Path) -> None:
    """Whether a run can be begun in a directory.

    Raises:
        BadValue: If it, or the private one beside it, holds anything: a run is never overwritten.
    """
    for place in (out, private_of(out)):
        # An old private directory would answer new orders with what it stored: its epsilon would be another run's.
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            begun = (out / "scenario.toml").is_file()
            more = f", or go on with the one that is there: fedsynth run --resume {out}" if begun else ""
            raise BadValue(f"the directory {str(place)!r} already holds something: name another run with --out{more}")


def prepare(scenario: Scenario, out: Path) -> dict[str, Any]:
    """Makes a simulation's directory and writes what is known before the run.

    Returns:
        The data cards. What they count is private text, so that `data.json` lies in the private directory.

    Raises:
        BadValue: If the directory, or the private one beside it, holds anything: a run is never overwritten.
    """
    check_free(out)
    cards = data_cards(scenario)
    begin(scenario, out, {}, {"data.json": cards})
    return cards


def begin(scenario: Scenario, out: Path, more: Mapping[str, Any], private: Mapping[str, Any]) -> None:
    """Makes a run's directory, and the private one beside it.

    Args:
        scenario: What runs.
        out: The directory; free.
        more: JSON by the name of its file, in the directory.
        private: Likewise, in the private one.
    """
    out.mkdir(parents=True, exist_ok=True)
    beside = private_of(out)
    beside.mkdir(mode=0o700, exist_ok=True)
    (out / FILE).write_text(json.dumps(surroundings(scenario), indent=1), encoding="utf-8")
    for folder, files in ((out, more), (beside, private)):
        for name, value in files.items():
            (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    # Last and at once: a directory that has it can be gone on with.
    part = out / "scenario.toml.part"
    part.write_text(to_toml(scenario), encoding="utf-8")
    part.replace(out / "scenario.toml")


def write_metrics(out: Path, journals: Sequence[Journal]) -> pd.DataFrame:
    """The tidy metrics of all cells so far, one row per (arm, seed, round, client, metric)."""
    frame = pd.DataFrame([row for j in journals for row in j.rows], columns=list(COLUMNS))
    part = out / "metrics.parquet.part"
    frame.to_parquet(part, index=False)
    part.replace(out / "metrics.parquet")
    return frame


def summarize(scenario: Scenario, out: Path, seconds: float, journals: Sequence[Journal]) -> dict[str, Any]:
    """Writes metrics.parquet, privacy.json and summary.json; returns the summary that `--json` prints."""
    frame = write_metrics(out, journals)
    arms = list(dict.fromkeys(j.cell.arm for j in journals))
    tuned_on, lost = set(scenario.data.tuned_on), losses(frame)
    summary = {
        "scenario": scenario.name,
        "out": str(out),
        "seconds": round(seconds, 1),
        "arms": {
            arm: {
                **_arm(frame, arm, [j for j in journals if j.cell.arm == arm], tuned_on),
                "losses": [{**plain(loss), "few": loss.few, "line": str(loss)} for loss in lost.get(arm, ())],
            }
            for arm in arms
        },
    }
    privacy = {arm: _privacy([j for j in journals if j.cell.arm == arm]) for arm in arms}
    (out / "privacy.json").write_text(json.dumps(privacy, indent=1), encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


def missing(frame: pd.DataFrame) -> list[str]:
    """Which exchanges went on without some clients, and why: a line for each arm and seed."""
    rows = frame[frame["metric"].astype(str).str.startswith("exchange/")]
    lines = []
    for (arm, seed), own in rows.groupby(["arm", "seed"], sort=False):
        said = []
        for place in dict.fromkeys(own["metric"].str.rpartition("/")[0]):
            here = own[own["metric"].str.startswith(f"{place}/")]
            kinds = here["metric"].str.rpartition("/")[2]
            asked, answered = (int(here.loc[kinds == kind, "value"].iloc[0]) for kind in ("clients", "answered"))
            of = here.groupby(kinds, sort=False)["client"]
            why = [f"{len(who)} {kind} ({', '.join(map(str, sorted(who)))})"
                   for kind, who in of if kind not in ("clients", "answered")]  # fmt: skip
            phase, number = place.rpartition("-")[2], int(here["round"].iloc[0])
            said.append(f"{phase} of round {number}: {answered} of {asked} clients, {', '.join(why)}")
        lines.append(f"{arm} seed {seed} went on without some clients: {'; '.join(said)}")
    return lines


def _arm(frame: pd.DataFrame, arm: str, journals: Sequence[Journal], tuned_on: set[int]) -> dict[str, Any]:
    own = frame[(frame["arm"] == arm) & (frame["client"] != SERVER)]
    last = own[own["round"] == own["round"].max()]
    metrics = {}
    for metric, rows in last.groupby("metric"):
        name = str(metric)
        if name.startswith(("bytes/", "privacy/", "seconds/", "exchange/")):
            continue
        metrics[name] = _over_seeds(rows)
        held = rows[~rows["client"].isin(tuned_on)]
        if tuned_on and not name.startswith("yield/") and len(held):
            metrics[f"{name}_held_out_clients"] = _over_seeds(held)
    epsilons = [s.epsilon for j in journals for s in j.statements.values()]
    statements = [s for j in journals for s in j.statements.values()]
    guarantee = guarantee_of(journals)
    moved = own[own["metric"].str.startswith("bytes/")].groupby("metric")["value"].sum()
    return {
        "metrics": metrics,
        "guarantee": guarantee,
        "epsilon": None if guarantee == "none" else max((e for e in epsilons if e is not None), default=0.0),
        "delta": None if guarantee == "none" else max((s.delta for s in statements), default=0.0),
        "bytes": {d: int(moved.get(f"bytes/{d}", 0)) for d in ("up", "down")},
    }


def _over_seeds(rows: pd.DataFrame) -> dict[str, Any]:
    per_seed = rows.groupby("seed")["value"].mean()
    std = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None
    return {"mean": float(per_seed.mean()), "std": std, "n": len(per_seed)}


def guarantee_of(journals: Sequence[Journal]) -> str:
    """ "none" if one client of one seed released anything without a mechanism, or the simulator pooled raw text."""
    pooled = any(j.cell.scenario.data.pooled for j in journals)
    open_ = any(s.guarantee == "none" for j in journals for s in j.statements.values())
    return "none" if pooled or open_ else "dp"


MEASURED = "test figures: measured on task models that learnt private text and stay at their clients"
WORKED = "how long a simulated client worked (seconds): it depends on what was drawn of its text, and no site tells it"
NOT_COVERED = (
    "tuning: settings come from public or simulated data; tuning on private text would cost more",
    "a server that does not run the published bundle: Flower clients execute the code that it sends",
    "what the base models had read before",
)


PUBLIC = (
    "the number of records that a client declares",
    "label list, tokenizer, longest text",
    "base models and the LLM's prompts",
    "all settings of the scenario",
    "seeds of everything but noise and Poisson draws",
)


def _privacy(journals: Sequence[Journal]) -> dict[str, Any]:
    """The largest of each figure over clients and seeds: clients differ in n, and each figure has its own worst one."""
    guarantee = guarantee_of(journals)
    measured = [MEASURED] if any("/" not in row[4] for j in journals for row in j.rows) else []
    worked = [WORKED] if journals[0].simulated else []
    head = {"guarantee": guarantee, "line": privacy_line(journals), "not_covered": [*measured, *worked, *NOT_COVERED],
            "terms": _terms(journals)}  # fmt: skip
    spent = _spent(journals)
    if guarantee == "none" or not spent:
        return head
    worst = max(spent, key=lambda s: s.epsilon or 0.0)
    figures = worst.to_dict()
    figures["delta"] = max(s.delta for s in spent)
    figures["epsilon_replace_one"] = max(s.epsilon_replace_one or 0.0 for s in spent)
    figures["unit"] = " or ".join(sorted({s.unit for s in spent}))
    if rows_only := [s for s in spent if s.unit == "row"]:
        plans = {_plan_of(s) for s in rows_only}
        figures["epsilon_rows"] = {
            str(rows): up(max(group_epsilon(plan, rows, plan.delta) for plan in plans), 2) for rows in ROWS_OF_A_PERSON
        }
    return {**head, "largest_over_clients": figures}


def _terms(journals: Sequence[Journal]) -> dict[str, Any]:
    """What the figures of an arm are figures of, in words, and the largest number of units that a client has."""
    client, seen = journals[0].cell.scenario.client, sorted({kind for j in journals for kind in j.released})
    terms: dict[str, Any] = {
        "adversary": "an honest-but-curious server that runs the published bundle",
        "sees": seen,
        "public": list(PUBLIC),
        "assumptions": _assumptions(journals).removeprefix("; "),
        "silent": sorted({(j.cell.seed, home) for j in journals for home, _ in j.silent}),
    }
    spent = _spent(journals)
    if guarantee_of(journals) == "none" or not spent:
        return terms
    listed = seen == ["scores"] and client.scores == "noise"
    training = client.scorer_training if "scores" in seen else client.generator_training
    rate = min(s.sampling_rate or 1.0 for s in spent)
    return {
        **terms,
        "mechanism": "Gaussian noise on a client's list of scores, clipped as a whole, each round" if listed else (
            "DP-SGD: each unit's gradient is clipped, Gaussian noise is added to the sum of a batch"
        ),
        "sampler": "none: all of the client's data takes part" if listed else (
            "Poisson: each unit enters each batch by a draw of its own"
        ),
        "accountant": f"privacy loss distributions (dp-accounting {version('dp-accounting')}), on a grid of {FINE:g}, "
        "rounded up",
        "adjacency": "zero-out: one unit is replaced by an empty one, the number of units is public and stays",
        "composition": "all rounds and releases of a run; clients in parallel: no unit is at two of them",
        "largest_units": 1 if listed else round(training.expected_batch / rate),
    }  # fmt: skip


def _spent(journals: Sequence[Journal]) -> list[Statement]:
    return [s for j in journals for s in j.statements.values() if s.epsilon is not None]


def up(value: float, digits: int) -> float:
    """Rounded to `digits` places, never below the value: a bound that is printed must hold."""
    return math.ceil(value * 10**digits) / 10**digits if math.isfinite(value) else value


def _plan_of(said: Statement) -> DPPlan:
    """The plan that a statement was made from, up to a factor in records and batch that no figure depends on."""
    rate = Fraction(said.sampling_rate or 1).limit_denominator(10**7)
    return DPPlan(
        records=10 * rate.denominator,
        expected_batch=10 * rate.numerator,
        steps=said.steps or 1,
        rounds=1,
        clip_norm=said.clip_norm or 1.0,
        noise_multiplier=said.sigma or 1.0,
        delta=said.delta,
    )


def privacy_line(journals: Sequence[Journal]) -> str:
    """One sentence per arm: adversary, what it sees, the bound and what it covers."""
    if any(j.cell.scenario.data.pooled for j in journals):
        return "no guarantee: the simulator pools raw private text, which no real server could see"
    seen = " and ".join(sorted({kind for j in journals for kind in j.released}))
    if guarantee_of(journals) == "none":
        return f"no differential privacy guarantee: {seen} left clients without a mechanism; no epsilon holds for them"
    spent = _spent(journals)
    if not spent:
        return "nothing derived from private text leaves a client (test figures aside), so there is nothing to spend"
    epsilon, delta = up(max(s.epsilon or 0.0 for s in spent), 3), max(s.delta for s in spent)
    replaced = up(max(s.epsilon_replace_one or 0.0 for s in spent), 2)
    unit = " or ".join(sorted({s.unit for s in spent}))  # sites may differ in what they protect
    return (
        f"an honest-but-curious server sees {seen}: ({epsilon:.3f}, {delta:g})-DP per {unit}, all rounds, zero-out "
        f"({replaced:.2f} if replaced by another {unit}); largest over "
        + ("clients and seeds, each a world of its own" if journals[0].simulated else "sites, in this run alone")
        + ("; simulated: noise reproducible" if any(s.simulated for s in spent) else "")
        + _assumptions(journals)
    )


def _assumptions(journals: Sequence[Journal]) -> str:
    """What a simulator took from private rows where a site would declare it."""
    data = journals[0].cell.scenario.data
    silent = len({(j.cell.seed, home) for j in journals for home, _ in j.silent})
    missing = (
        f"; {silent} clients gave no usable answer: what they may have spent is not in these figures" if silent else ""
    )
    listed = data.labels == "all" and data.task == "classification"
    taken = (
        [] if data.world or not journals[0].simulated else (["label list"] if listed else []) + ["number of records"]
    )
    dropped = "; duplicates dropped across clients by the simulator, no site could" if data.duplicates == "drop" else ""
    return (
        f"; {' and '.join(taken)} read from the data by the simulator, a site would declare them{dropped}{missing}"
        if taken
        else missing
    )


def places(config: Mapping[str, Any], run_id: int) -> tuple[str, Path, Path]:
    """The scenario's TOML, the run's directory and the private one, from a run-config.

    The launcher sends all three. By hand (`flwr run simulations`) the scenario is a shipped one by name, and the
    directories lie under the user's home: the working directory of Flower's processes is not the caller's.

    Raises:
        BadValue: If a directory is relative.
    """
    toml = str(config.get("scenario-toml", "")) or to_toml(load(str(config.get("scenario", "hospitals"))))
    name = from_toml(toml).name
    out = Path(str(config.get("out-dir", "")) or Path.home() / ".fedsynth" / "runs" / f"{name}-{run_id}")
    if not out.is_absolute():
        raise BadValue(f"out-dir must be absolute, got {str(out)!r}")
    return toml, out, private_of(out)


def private_of(out: Path) -> Path:
    """Where a simulation keeps its clients' private state: beside the directory that people share, never in it."""
    return out.with_name(out.name + ".private")
