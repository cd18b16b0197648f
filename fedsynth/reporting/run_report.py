"""The shareable report of a run: a run's directory as one plain tree. No other directory is opened."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from fedsynth.audit import FILE as AUDIT
from fedsynth.federation.run.conclusion import concluded
from fedsynth.federation.run.data_facts import read_facts
from fedsynth.federation.run.egress import egress_of
from fedsynth.federation.run.environment import FILE
from fedsynth.federation.run.log import SERVER
from fedsynth.federation.run.times import times_of
from fedsynth.pretraining.public_text import labelled, sample
from fedsynth.reporting.cautions import cautions
from fedsynth.reporting.judging import judgements
from fedsynth.reporting.page import Page, render
from fedsynth.reporting.risk_section import add_rates
from fedsynth.reporting.run_page import page
from fedsynth.reporting.statistics import (
    Figures,
    add_costs,
    add_curves,
    add_differences,
    add_egress,
    add_facts,
    add_lines,
    add_losses,
    add_privacy,
    add_server,
    add_times,
    add_utility,
    add_verdict,
    add_yields,
)
from fedsynth.reporting.texts import (
    EMBEDDED,
    Embed,
    Reference,
    Released,
    add_distances,
    add_identifiers,
    add_texts,
    kinds_of,
    released,
    shown_labels,
    simulated_reference,
)
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.simulation.flower import DEPLOYMENT, EVENTS
from fedsynth.synthesis.attrition import losses
from fedsynth.typed import BadValue
from fedsynth.world import load_world

SCHEMA = 1
EXAMPLES = 6  # of a kind of text and arm
EXAMPLE_CHARACTERS = 400  # of one; with at most 8 arms and 4 kinds a page stays far below 3 MB
SHOWN_ARMS = 8  # with examples

# --- A run's directory as a tree --------------------------------------------------------------------------------------


def build(out: Path, embedder_name: str = "") -> dict[str, Any]:
    """The whole content of the page as JSON; `rows` is the table of figures.

    Reads the run's directory and shipped or named models (to embed text), and nothing of `OUT.private`.

    Args:
        out: A run's directory.
        embedder_name: The model that embeds texts; "" for the scenario's.

    Raises:
        BadValue: If it is no run's directory, the run did not end, or the directory holds forbidden text.
    """
    privacy, versions = _json(out / "privacy.json"), _json(out / FILE, needed=False)
    sites = list(_json(out / DEPLOYMENT, needed=False).get("sites", []))
    scenario, metrics = read_scenario(out), _metrics(out)
    if embedder_name:
        scenario = replace(scenario, server=replace(scenario.server, embedder=embedder_name))
    arms = [str(arm) for arm in dict.fromkeys(metrics["arm"])]
    of_arm = {cell.arm: cell.scenario for cell in cells(scenario)}
    apart = [arm for arm in arms if arm in of_arm and of_arm[arm].data.pooled]
    alike = [arm for arm in arms if arm not in apart]
    baseline = "local" if "local" in alike else alike[0] if alike else ""
    tuned_on, facts = scenario.data.tuned_on, read_facts(out)

    figures = Figures()
    figures.add("run", "clients", "value", scenario.data.clients)
    figures.add("run", "seeds", "value", metrics["seed"].nunique())
    figures.add("run", "rounds", "value", scenario.rounds)
    figures.add("run", "seconds", "value", _json(out / "summary.json", needed=False).get("seconds"))
    add_privacy(figures, privacy)
    add_rates(figures, privacy, int(metrics["seed"].nunique()))
    add_utility(figures, metrics, tuned_on)
    add_lines(figures, metrics)
    add_differences(figures, metrics, alike, baseline, tuned_on)
    found = concluded(scenario, metrics, {arm: _epsilon(privacy.get(arm, {})) for arm in arms}, facts)
    add_verdict(figures, found)
    add_curves(figures, metrics)
    add_yields(figures, metrics)
    add_facts(figures, facts)
    lost = losses(metrics)
    add_losses(figures, lost)
    # Text without a guarantee may hold a person's words; a simulated world has no persons.
    simulated_world = scenario.data.world is not None and not sites
    bare = {arm for arm in arms if privacy.get(arm, {}).get("guarantee") == "none" and not simulated_world}
    texts = [text for text in released(out) if text.arm not in bare]
    described = _texts(figures, texts, scenario, sorted(int(seed) for seed in metrics["seed"].unique()))
    add_identifiers(figures, texts)
    described["bare"] = sorted(bare & {path.name for path in (out / "corpora").glob("*")})
    add_costs(figures, metrics)
    add_server(figures, metrics)
    add_times(figures, times_of(out, metrics))
    add_egress(figures, egress_of(out))
    return {
        "schema": SCHEMA,
        "audience": "shareable",
        "run": {
            "name": scenario.name,
            "source": "of each site, its own" if sites else _short(scenario.data.source),
            "sites": sites,
            "task": scenario.data.task,
            "unit": scenario.data.unit_name,
            "seeds": sorted(int(seed) for seed in metrics["seed"].unique()),
            "tuned_on": list(tuned_on),
            "arms": facts.get("arms") or _arm_words(scenario),
            "date": _date(out),
            "strategies": {arm: of_arm[arm].strategy.use.rpartition(":")[2] for arm in arms if arm in of_arm},
            "models": {_short(name): facts for name, facts in versions.get("models", {}).items()},
            "versions": {
                key: versions[key] for key in ("fedsynth", "python", "packages", "hardware", "code") if key in versions
            },
        },
        "arms": arms,
        "pooled": apart,
        "baseline": baseline,
        "facts": {name: facts[name] for name in ("cuts", "labels") if name in facts},
        "verdict": [statement.words for statement in found.statements],
        "privacy": privacy,
        "losses": {arm: [{"what": loss.what, "words": loss.words} for loss in own] for arm, own in lost.items()},
        "warnings": cautions(figures, privacy, metrics, scenario, arms, apart),
        "texts": described,
        "examples": _examples(texts, arms),
        "judgements": judgements(out),
        "audit": _json(out / AUDIT, needed=False),
        "rows": [_row(row) for row in figures.rows],
    }


def _arm_words(scenario: Scenario) -> dict[str, str]:
    """The arms of a run that did not note them: of real sites, or of an earlier version."""
    from fedsynth.federation.arm_words import arm_words  # a strategy brings torch, which takes seconds

    return arm_words(scenario)


def _date(out: Path) -> str:
    """The day, in UTC, on which the run began, by its first event; "" if it recorded none."""
    try:
        with (out / EVENTS).open(encoding="utf-8") as lines:
            first: dict[str, Any] = next((json.loads(line) for line in lines), {})
    except OSError:
        return ""
    return f"{datetime.fromtimestamp(first['at'], UTC):%d %B %Y}".lstrip("0") if "at" in first else ""


def _epsilon(said: Mapping[str, Any]) -> float | None:
    """0 if an arm released nothing, None without a guarantee."""
    return None if said.get("guarantee") == "none" else float(said.get("largest_over_clients", {}).get("epsilon", 0.0))


def read_scenario(out: Path) -> Scenario:
    """The scenario of a run's directory.

    Raises:
        BadValue: If the directory holds none.
    """
    try:
        return from_toml((out / "scenario.toml").read_text(encoding="utf-8"), str(out / "scenario.toml"))
    except OSError as problem:
        raise BadValue(f"{out} is no run's directory: scenario.toml cannot be read ({problem.strerror})") from problem


def _metrics(out: Path) -> pd.DataFrame:
    try:
        metrics = pd.read_parquet(out / "metrics.parquet")
    except (OSError, ValueError) as problem:
        raise BadValue(f"{out}: metrics.parquet cannot be read: no cell of the run ended") from problem
    if metrics.empty:
        raise BadValue(f"{out}: metrics.parquet holds no row: there is nothing to report")
    return metrics


def _json(path: Path, *, needed: bool = True) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        if not needed:
            return {}
        raise BadValue(
            f"{path} cannot be read: a report needs a run that ended; one that broke off has no statement of privacy"
        ) from problem
    return found


def _short(name: str) -> str:
    """The last part of a path: the report does not reveal folders of this machine."""
    return PurePath(name).name if name.startswith(("/", "~")) or "\\" in name else name


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    # JSON knows no infinity.
    return {**row, "value": row["value"] if math.isfinite(row["value"]) else str(row["value"])}


def _texts(figures: Figures, texts: Sequence[Released], scenario: Scenario, seeds: Sequence[int]) -> dict[str, Any]:
    """Adds the quality of the released texts; returns the page's remarks on the method."""
    data = scenario.data
    if not texts:
        return {"kinds": [], "labels": [], "reference": "", "embedder": "", "left_out": ""}
    public: list[str] | None = None if data.classes else []
    if data.labels != "all":
        public = list(data.labels)
    elif data.world is not None and data.classes:
        public = list(load_world(data.world).labels)
    labels, reference = shown_labels(texts, public), public_reference(scenario, seeds)
    add_texts(figures, texts, labels, reference)
    found = {"kinds": kinds_of(texts), "labels": labels, "reference": "", "embedder": "", "left_out": ""}
    if reference is None:
        why = "the scenario names no public text (server.public), and private text is not for this report"
        return {**found, "left_out": why}
    name, embed = embedder(scenario)
    if embed is None:
        return {**found, "left_out": name}
    add_distances(figures, texts, reference, embed)
    return {**found, "reference": reference.name, "embedder": _short(name)}


def public_reference(scenario: Scenario, seeds: Sequence[int]) -> Reference | None:
    """Text that is public beyond doubt: a simulated world's, or the server's; None if there is none.

    Public test texts come first: they are of the task, where other public text may be of any kind.
    """
    if scenario.data.world is not None:
        return simulated_reference(scenario.data, seeds)
    if (test := scenario.server.public_test) is not None and scenario.data.labels != "all":
        try:
            own = labelled(test, scenario.data.labels, 2 * EMBEDDED, seed=0)
        except BadValue:  # the file has moved
            return None
        halves = [{SERVER: own.take(range(start, len(own), 2))} for start in (0, 1)]
        name = f"one half of the public test texts of {_short(test.source)}"
        return Reference(name, halves[0], halves[1], "(the other half)") if len(own) > 1 else None
    public = scenario.server.public
    if public is None or public.startswith("world:"):  # real text is not compared with a simulated world's
        return None
    try:
        texts = sample(public, EMBEDDED, seed=0)
    except BadValue:  # the file has moved
        return None
    return Reference(f"the public text {_short(public)}", {SERVER: texts}, {})


def embedder(scenario: Scenario) -> tuple[str, Embed | None]:
    """The model that embeds texts: the server's embedder, else its LLM; or the reason why there is none."""
    name = scenario.server.embedder or scenario.server.llm
    if not isinstance(name, str):
        return "the server's LLM is an endpoint, which embeds no text, and the scenario names no embedder", None
    from fedsynth.models.embedding import Embedder  # torch takes seconds to import

    try:
        return name, Embedder.for_server(name, scenario.server.hardware).embed
    except BadValue as problem:
        return f"the embedder cannot be loaded here: {problem}", None


def _examples(texts: Sequence[Released], arms: Sequence[str]) -> list[dict[str, Any]]:
    """A few texts of each arm and kind, from the first seed and client, one of each label in turn."""
    found, shown = [], []
    for arm in arms[:SHOWN_ARMS]:
        for kind in kinds_of(texts, arm):
            own = next(t for t in texts if (t.arm, t.kind) == (arm, kind))
            if own.corpus in shown:
                continue  # arms with the same requests have the same drafts
            shown.append(own.corpus)
            for number in _varied(own.corpus.answers, EXAMPLES):
                text, answer = own.corpus.prompts[number], own.corpus.answers[number]
                found.append(
                    {
                        "arm": arm,
                        "kind": kind,
                        "seed": own.seed,
                        "client": own.client,
                        "file": own.file,
                        "number": number,
                        "text": _cut(text),
                        "answer": _cut(answer),
                    }
                )
    return found


def _varied(answers: Sequence[str], most: int) -> list[int]:
    """Places of the first example of each answer, then of the second of each, in order of answers."""
    seen: dict[str, int] = {}
    turns = []
    for number, answer in enumerate(answers):
        seen[answer] = seen.get(answer, 0) + 1
        turns.append((seen[answer], number))
    return [number for _, number in sorted(turns)[:most]]


def _cut(text: str) -> str:
    return text if len(text) <= EXAMPLE_CHARACTERS else text[: EXAMPLE_CHARACTERS - 1] + "…"


# --- Files ------------------------------------------------------------------------------------------------------------


def write(out: Path, html: Path | None = None, embedder_name: str = "") -> tuple[Path, dict[str, Any]]:
    """Writes the page, and beside it the same as JSON and the table of its figures as Parquet.

    Args:
        out: A run's directory.
        html: The page; None for `report.html` in the run's directory.
        embedder_name: The model that embeds texts; "" for the scenario's.

    Returns:
        Path of the page, and the report.

    Raises:
        BadValue: If the directory allows no report, or the report cannot be written.
    """
    place = html or out / "report.html"
    if place.suffix != ".html":
        raise BadValue(f"--out must name an .html file, got {str(place)!r}")
    report = build(out, embedder_name)
    save(place, report, page(report, place.with_suffix(".parquet").name), mode=0o644)
    return place, report


def save(place: Path, report: Mapping[str, Any], shown: Page, *, mode: int) -> None:
    """Writes the page and, under the same name, its JSON and its table; each appears whole or not at all.

    Raises:
        BadValue: If they cannot be written.
    """
    try:
        _replace(place, render(shown).encode(), mode)
        _replace(place.with_suffix(".json"), json.dumps(report, ensure_ascii=False, allow_nan=False).encode(), mode)
        part = place.with_suffix(".parquet.part")
        _create(part, b"", mode)
        Figures.of(report["rows"]).table().to_parquet(part, index=False)
        part.replace(place.with_suffix(".parquet"))
    except OSError as problem:
        raise BadValue(f"{place} cannot be written ({problem.strerror}): name another file") from problem


def _replace(place: Path, data: bytes, mode: int) -> None:
    part = place.with_name(place.name + ".part")
    _create(part, data, mode)
    part.replace(place)


def _create(part: Path, data: bytes, mode: int) -> None:
    part.unlink(missing_ok=True)
    # The mode is set before the first byte: nobody else can read the file meanwhile.
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
