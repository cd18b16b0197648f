"""The tables of a run: the metrics of all cells as one frame, and each arm's summary of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedsynth.evaluation.lines import CHANCE, MAJORITY
from fedsynth.federation.run.conclusion import concluded, lines_for
from fedsynth.federation.run.data_facts import read_facts
from fedsynth.federation.run.egress import write_egress
from fedsynth.federation.run.log import COLUMNS, SERVER, RunLog
from fedsynth.federation.run.privacy_report import guarantee_of, privacy_report
from fedsynth.scenario.schema import Scenario
from fedsynth.synthesis.attrition import losses
from fedsynth.typed import plain

MAIN = ("accuracy", "exact_match", "rouge_l")  # what a run tells of an arm as soon as it is done


def write_metrics(out: Path, run_logs: Sequence[RunLog]) -> pd.DataFrame:
    """The tidy metrics of all cells so far, one row per (arm, seed, round, client, metric)."""
    frame = pd.DataFrame([row for j in run_logs for row in j.rows], columns=list(COLUMNS))
    part = out / "metrics.parquet.part"
    frame.to_parquet(part, index=False)
    part.replace(out / "metrics.parquet")
    return frame


def summarize(scenario: Scenario, out: Path, seconds: float, run_logs: Sequence[RunLog]) -> dict[str, Any]:
    """Writes metrics.parquet, privacy.json, conclusion.json and summary.json; returns the last (`--json`)."""
    frame = write_metrics(out, run_logs)
    arms = list(dict.fromkeys(j.cell.arm for j in run_logs))
    tuned_on, lost = set(scenario.data.tuned_on), losses(frame)
    summary: dict[str, Any] = {
        "scenario": scenario.name,
        "out": str(out),
        "seconds": round(seconds, 1),
        "arms": {
            arm: {
                **_arm(frame, arm, [j for j in run_logs if j.cell.arm == arm], tuned_on),
                "losses": [{**plain(loss), "few": loss.few, "line": str(loss)} for loss in lost.get(arm, ())],
            }
            for arm in arms
        },
    }
    epsilon = {arm: found["epsilon"] for arm, found in summary["arms"].items()}
    verdict = concluded(scenario, frame, epsilon, read_facts(out)).sentences
    if sent := write_egress(out):  # a run without an endpoint has the shape that it always had
        summary["egress"] = list(map(plain, sent))
    privacy = {arm: privacy_report([j for j in run_logs if j.cell.arm == arm]) for arm in arms}
    (out / "privacy.json").write_text(json.dumps(privacy, indent=1), encoding="utf-8")
    conclusion = {"verdict": list(verdict), "lines": lines_for(frame)}
    (out / "conclusion.json").write_text(json.dumps(conclusion, indent=1), encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


def last_figures(run_log: RunLog) -> dict[str, Any]:
    """A cell's first figures: `figures`, the mean over clients of each of its main metrics in the last round, and
    `clients`, their number; empty if nobody measured any."""
    own = [row for row in run_log.rows if row[3] != SERVER and row[4] in MAIN]
    last = [row for row in own if row[2] == max(r[2] for r in own)]
    found = {name: [row[5] for row in last if row[4] == name] for name in MAIN}
    figures = {name: sum(values) / len(values) for name, values in found.items() if values}
    return {"figures": figures, "clients": len({row[3] for row in last})} if figures else {}


def missing(frame: pd.DataFrame) -> list[str]:
    """The exchanges that went on without some clients, and the reasons: a line for each arm and seed."""
    rows = frame[frame["metric"].astype(str).str.startswith("exchange/")]
    lines = []
    for (arm, seed), own in rows.groupby(["arm", "seed"], sort=False):
        said = []
        for place in dict.fromkeys(own["metric"].str.rpartition("/")[0]):
            here = own[own["metric"].str.startswith(f"{place}/")]
            kinds = here["metric"].str.rpartition("/")[2]
            asked, answered = (int(here.loc[kinds == kind, "value"].iloc[0]) for kind in ("clients", "answered"))
            of = here.groupby(kinds, sort=False)["client"]
            why = [
                f"{len(who)} {kind} ({', '.join(map(str, sorted(who)))})"
                for kind, who in of
                if kind not in ("clients", "answered")
            ]
            phase, number = place.rpartition("-")[2], int(here["round"].iloc[0])
            said.append(f"{phase} of round {number}: {answered} of {asked} clients, {', '.join(why)}")
        lines.append(f"{arm} seed {seed} went on without some clients: {'; '.join(said)}")
    return lines


def _arm(frame: pd.DataFrame, arm: str, run_logs: Sequence[RunLog], tuned_on: set[int]) -> dict[str, Any]:
    own = frame[(frame["arm"] == arm) & (frame["client"] != SERVER)]
    last = own[own["round"] == own["round"].max()]
    metrics = {}
    for metric, rows in last.groupby("metric"):
        name = str(metric)
        if name.startswith(("bytes/", "privacy/", "seconds/", "exchange/", f"{CHANCE}/", f"{MAJORITY}/")):
            continue
        metrics[name] = _over_seeds(rows)
        held = rows[~rows["client"].isin(tuned_on)]
        if tuned_on and not name.startswith("yield/") and len(held):
            metrics[f"{name}_held_out_clients"] = _over_seeds(held)
    epsilons = [s.epsilon for j in run_logs for s in j.spending.values()]
    statements = [s for j in run_logs for s in j.spending.values()]
    guarantee = guarantee_of(run_logs)
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
