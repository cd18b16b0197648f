"""The site-only report: released texts beside the private ones behind them. It stays in the private directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsynth.corpus import Corpus, pool, same
from fedsynth.data.partition import open_sites
from fedsynth.federation.run.directory import private_of
from fedsynth.federation.run.log import SERVER
from fedsynth.reporting.page import Block, Cell, Items, Page, Paragraph, Quote, Quotes, Section, Table
from fedsynth.reporting.run_report import SCHEMA, embedder, read_scenario, save
from fedsynth.reporting.statistics import Figures, Where
from fedsynth.reporting.text_section import CLOSENESS, quality_table
from fedsynth.reporting.texts import PER_CLIENT, Reference, Released, add_distances, kinds_of, released
from fedsynth.rouge import nearest, rouge_l
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells
from fedsynth.typed import BadValue

NEAR = 0.9  # ROUGE-L at and above which a text is called a near copy
PAIRS = 4  # closest pairs that are shown of an arm and kind
HELD_TEXTS = "(held-out test text)"
BANNER = (
    "SITE ONLY. This page compares with private text and shows some of it. It must not leave the site; no text is "
    "filtered, blocked or made again for what stands here: that alone would give an answer about private records."
)


def write(out: Path) -> tuple[Path, dict[str, Any]]:
    """Writes the page, its JSON and its table into the private directory beside the run's, for its owner alone.

    Args:
        out: A run's directory.

    Returns:
        Path of the page, and the report.

    Raises:
        BadValue: If there is no run, no private directory beside it, or no text of the run to compare.
    """
    private = private_of(out)
    if not private.is_dir():
        raise BadValue(
            f"{out} has no private directory {private.name!r} beside it: a site-only report is made where that is"
        )
    report = build(out, private)
    place = private / "site-report.html"
    save(place, report, page(report), mode=0o600)
    return place, report


def build(out: Path, private: Path) -> dict[str, Any]:
    """The whole content of the page; `rows` is the table of figures.

    Args:
        out: A run's directory.
        private: The private directory beside it.

    Raises:
        BadValue: If it is no run's directory, has no texts, or the private text is not found.
    """
    scenario, texts = read_scenario(out), released(out)
    if not texts:
        raise BadValue(f"{out} holds no released text to compare with private text")
    figures = Figures()
    cards = json.loads((private / "data.json").read_text(encoding="utf-8")) if (private / "data.json").is_file() else {}
    _add_cards(figures, cards)
    private_texts = _private(scenario, texts)
    pairs = _add_copies(figures, texts, private_texts)
    left_out = _add_distances(figures, texts, private_texts, scenario)
    return {
        "schema": SCHEMA,
        "audience": "site only",
        "run": {"name": scenario.name},
        "arms": list(dict.fromkeys(t.arm for t in texts)),
        "kinds": kinds_of(texts),
        "origin": cards.get("origin", ""),
        "left_out": left_out,
        "pairs": pairs,
        "rows": figures.rows,
    }


Private = Mapping[tuple[str, int, int], tuple[Corpus, Corpus]]
"""Training and test text by (arm, seed, client); `SERVER`: of all clients."""


def _private(scenario: Scenario, texts: Sequence[Released]) -> Private:
    wanted = {(t.arm, t.seed) for t in texts}
    found: dict[tuple[str, int, int], tuple[Corpus, Corpus]] = {}
    for cell in cells(scenario):
        if (cell.arm, cell.seed) in wanted:
            sites = open_sites(cell.scenario.data, cell.seed)
            found |= {(cell.arm, cell.seed, i): (site.train, site.test) for i, site in enumerate(sites)}
            found[cell.arm, cell.seed, SERVER] = (pool([s.train for s in sites]), pool([s.test for s in sites]))
    return found


def _add_cards(figures: Figures, cards: Mapping[str, Any]) -> None:
    """Sizes of the clients, from the first card."""
    for card in cards.get("cards", [])[:1]:
        for client, held in enumerate(card["clients"]):
            for name in ("train", "test", "units", "labels_present", "duplicates"):
                figures.add("data", name, "value", held[name], Where(client=client))
            figures.add("data", "words", "median", held["words"]["median"], Where(client=client))


def _add_copies(figures: Figures, texts: Sequence[Released], private_texts: Private) -> list[dict[str, Any]]:
    """The similarity of texts to their nearest private ones, beside held-out text of the client; the closest pairs."""
    rows: list[tuple[str, str, int, str, float]] = []
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for t in texts:
        train, test = private_texts[t.arm, t.seed, t.client]
        # Both columns are cut to equally many texts: the nearest of more texts is nearer.
        size = min(PER_CLIENT, len(t.corpus), len(test))
        if not size:
            continue
        found = np.array(nearest(t.corpus.prompts[:size], train.prompts))
        held = np.array(nearest(test.prompts[:size], train.prompts))
        known = {same(text) for text in train.prompts}
        for arm, values, of in ((t.arm, found, t.corpus), (HELD_TEXTS, held, test)):
            exact = np.mean([same(text) in known for text in of.prompts[:size]])
            rows += [
                (arm, t.kind, t.seed, "nearest", float(values.mean())),
                (arm, t.kind, t.seed, "near_copies", float((values >= NEAR).mean())),
                (arm, t.kind, t.seed, "copies", float(exact)),
            ]
        best = np.argsort(-found, kind="stable")[:PAIRS]
        pairs.setdefault((t.arm, t.kind), []).extend(
            {
                "arm": t.arm,
                "kind": t.kind,
                "seed": t.seed,
                "client": t.client,
                "rouge_l": float(found[i]),
                "text": t.corpus.prompts[i],
            }
            for i in best.tolist()
        )
    frame = pd.DataFrame(rows, columns=["arm", "kind", "seed", "metric", "value"])
    for (of_arm, of_kind, metric), rows_of in frame.groupby(["arm", "kind", "metric"], sort=False):
        per_seed = rows_of.groupby("seed")["value"].mean()
        std = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None
        figures.add("copies", f"{of_kind}/{metric}", "mean", float(per_seed.mean()), Where(arm=str(of_arm)))
        figures.add("copies", f"{of_kind}/{metric}", "std", std, Where(arm=str(of_arm)))
    chosen = [pair for own in pairs.values() for pair in sorted(own, key=lambda p: -p["rouge_l"])[:PAIRS]]
    for number, pair in enumerate(chosen):
        pair["metric"] = f"{pair['kind']}/pair {number}"
        figures.add(
            "pair",
            pair["metric"],
            "rouge_l",
            pair["rouge_l"],
            Where(arm=pair["arm"], seed=pair["seed"], client=pair["client"]),
        )
        near_to, _ = private_texts[pair["arm"], pair["seed"], pair["client"]]
        pair["private"] = max(near_to.prompts, key=lambda text: rouge_l(text, pair["text"]))
    return chosen


def _add_distances(figures: Figures, texts: Sequence[Released], private_texts: Private, scenario: Scenario) -> str:
    """Adds MAUVE and Frechet distance from private training text of the same seed; returns reasons for missing ones."""
    name, embed = embedder(scenario)
    if embed is None:
        return name
    seed = min(t.seed for t in texts)  # one seed: private text differs between them
    own = [t for t in texts if t.seed == seed]
    arm = own[0].arm
    clients = sorted(c for a, s, c in private_texts if (a, s) == (arm, seed) and c != SERVER)
    sides = [{c: private_texts[arm, seed, c][side] for c in clients} for side in (0, 1)]
    add_distances(
        figures, own, Reference("private training text", sides[0], sides[1], HELD_TEXTS), embed, part="private"
    )
    return ""


def page(report: Mapping[str, Any]) -> Page:
    """The page of a site-only report."""
    figures, arms, kinds = Figures.of(report["rows"]), report["arms"], report["kinds"]
    columns = (
        ("nearest", "ROUGE-L of the nearest", 3),
        ("near_copies", f"share above {NEAR:g}", 3),
        ("copies", "exact copies", 3),
    )
    copies: list[Block] = []
    for kind in kinds:
        copies += quality_table(figures, "copies", [*arms, HELD_TEXTS], kind, columns, f"Texts of the kind “{kind}”")
    copies.append(
        Items(
            [
                (
                    "Read it so:",
                    "text that is no closer to private training text than held-out test text is "
                    "no copy of it. This looks for copies; it is no bound: epsilon is.",
                )
            ]
        )
    )
    sections = [Section("Near copies of private text", "copies", copies)]
    far: list[Block] = []
    for kind in kinds:
        far += quality_table(
            figures, "private", [*arms, HELD_TEXTS], kind, CLOSENESS, f"Texts of the kind “{kind}”, first seed"
        )
    if report["left_out"]:
        far.append(Paragraph(report["left_out"]))
    sections.append(Section("Distance from private text", "distance", far))
    groups: dict[str, list[Quote]] = {}
    for p in report["pairs"]:
        row = figures.row("pair", p["metric"], "rouge_l", Where(arm=p["arm"], seed=p["seed"], client=p["client"]))
        source = (f"private, client {p['client']}, seed {p['seed']}, ROUGE-L ", figures.number(row))
        groups.setdefault(f"{p['arm']}, {p['kind']}", []).append(Quote(source, p["text"], p["private"]))
    shown: list[Block] = [Paragraph("Above a released text, below the private text that is nearest to it.")]
    for head, quotes in groups.items():
        shown += [Paragraph(f"{head}:", quiet=True), Quotes(quotes)]
    sections.append(Section("Closest pairs", "pairs", shown))
    if names := figures.metrics("data"):
        clients = sorted({r["client"] for r in figures.rows if r["part"] == "data"})
        heads = ["client", *(n.replace("_", " ") for n in names)]
        rows: list[list[Cell]] = [
            [
                str(c),
                *(
                    figures.number(
                        figures.row("data", n, "median" if n == "words" else "value", Where(client=c)),
                        1 if n == "words" else 0,
                    )
                    for n in names
                ),
            ]
            for c in clients
        ]
        table = Table(heads, rows, "What each client holds (first seed)", report["origin"])
        sections.append(Section("Private data", "data", [table]))
    lead = "Released and written texts against the private text they came from."
    return Page(
        f"Site-only report: {report['run']['name']}", lead, BANNER, sections, "site-report.parquet", private=True
    )
