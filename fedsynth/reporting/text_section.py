"""The section of a run's page on synthetic text: losses by step, variety, closeness to public text, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsynth.identifiers import KINDS, NAMES
from fedsynth.reporting import figures as draw
from fedsynth.reporting.figures import Mark, Series
from fedsynth.reporting.page import (
    Block,
    Cell,
    Items,
    Paragraph,
    Plot,
    Plots,
    Quote,
    Quotes,
    Table,
    listed,
)
from fedsynth.reporting.statistics import Figures, Where

SHOWN_LABELS = 12  # in a figure
VARIETY = (
    ("texts", "texts", 0),
    ("words", "words", 1),
    ("distinct_1", "distinct-1", 3),
    ("distinct_2", "distinct-2", 3),
    ("self_bleu", "self-BLEU", 3),
    ("label_balance", "label balance", 3),
    ("compared", "compared", 0),
)
CLOSENESS = (("mauve", "MAUVE", 3), ("frechet", "Frechet distance", None), ("embedded", "texts compared", 0))


def text_section(figures: Figures, report: Mapping[str, Any]) -> list[Block]:
    """How many texts each step kept, how varied they are, and how close to public text."""
    arms, described = report["arms"], report["texts"]
    blocks: list[Block] = []
    if funnels := [p for arm in arms if (p := _funnel(figures, arm)) is not None]:
        blocks += [Plots(funnels), _funnel_table(figures, arms)]
    lines = [*arms, *(r["arm"] for r in figures.rows if r["part"] == "text" and r["arm"] not in arms)]
    lines = list(dict.fromkeys(lines))  # with the row of the reference text
    for kind in described["kinds"]:
        blocks += quality_table(
            figures, "text", lines, kind, VARIETY, f"Texts of the kind “{kind}”: number, length, variety"
        )
        blocks += quality_table(
            figures, "text", lines, kind, CLOSENESS, f"Texts of the kind “{kind}”: how close to public text"
        )
    if described["kinds"]:
        blocks.append(Items([(f"{word}:", said) for word, said in _reading(figures, described)]))
    if searched := [table for kind in described["kinds"] for table in _identifiers(figures, arms, kind)]:
        blocks += [*searched, Items([("Read it so:", SEARCHED)])]
    if described["bare"]:
        left_out = "texts without a guarantee are neither described nor shown where they stem from real data."
        blocks.append(Items([(f"{listed(described['bare'])}:", left_out)]))
    for kind in reversed(described["kinds"]):
        if (plot := _labels(figures, lines, kind, described["labels"])) is not None:
            blocks.append(Plots([plot]))
            break
    return blocks


def quality_table(
    figures: Figures,
    part: str,
    arms: Sequence[str],
    kind: str,
    columns: Sequence[tuple[str, str, int | None]],
    caption: str,
) -> list[Block]:
    """One line per arm that has texts of the kind, with the columns that any of them has; empty if no arm has any."""
    there = [c for c in columns if f"{kind}/{c[0]}" in figures.metrics(part)]
    chosen = [
        a
        for a in arms
        if any(figures.row(part, f"{kind}/{key}", "mean", Where(arm=a)) is not None for key, _, _ in there)
    ]
    rows: list[list[Cell]] = []
    for arm in chosen:
        # Figures that are the same for all seeds by construction need no deviation.
        cells_of = [
            figures.number(figures.row(part, f"{kind}/{key}", "mean", Where(arm=arm)), digits)
            if key in ("compared", "embedded")
            else figures.spread(part, f"{kind}/{key}", arm, digits)
            for key, _, digits in there
        ]
        rows.append([arm, *cells_of])
    return [Table(["arm", *(head for _, head, _ in there)], rows, caption)] if rows else []


def _identifiers(figures: Figures, arms: Sequence[str], kind: str) -> list[Table]:
    """How many texts have identifiers, arm by arm; columns that are empty in all arms are left out."""
    there = [f"{kind}/{name}" for name in ("searched", *KINDS) if f"{kind}/{name}" in figures.metrics("identifiers")]
    rows: list[list[Cell]] = []
    for arm in arms:
        found = [figures.row("identifiers", metric, "sum", Where(arm=arm)) for metric in there]
        if found and found[0] is not None:
            rows.append([arm, *(figures.number(row, 0) for row in found)])
    heads = ["arm", "texts searched", *(NAMES[name] for name in KINDS if f"{kind}/{name}" in there)]
    caption = f"Texts of the kind “{kind}” with identifiers or secrets, of all clients and seeds"
    return [Table(heads, rows, caption)] if rows else []


SEARCHED = (
    "public rules look for forms and check digits, in released text only. A model invents addresses and numbers, too, "
    "so that a text that has one need not tell a person's. A name is not found. Epsilon is the bound."
)


def _reading(figures: Figures, described: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [
        ("distinct-n", "different n-grams of words over all of them (Li et al. 2016): the higher, the more varied"),
        (
            "self-BLEU",
            "mean BLEU-4 of each text against the others of its set (Zhu et al. 2018): the higher, the more alike",
        ),
        (
            "counted on",
            "equally many texts of each client (compared), as both depend on how many there are; per "
            "client, then means over clients and mean ± deviation over seeds",
        ),
    ]
    if described["labels"]:
        found.append(
            ("label balance", "entropy of the labels over its largest value: 1 where all are equally frequent")
        )
    if any(name.endswith("/mauve") for name in figures.metrics("text")):
        found.append(
            (
                "MAUVE and Frechet distance",
                f"from {described['reference']}, by embeddings of "
                f"{described['embedder']}; the higher MAUVE and the lower the distance, the closer. Both are biased "
                "where texts are few: even two draws of one source do not reach 1 and 0. The line in brackets is what "
                "such draws have. Compare figures of this report only",
            )
        )
    if described["left_out"]:
        found.append(("no MAUVE, no Frechet distance", described["left_out"]))
    return [(word, f"{said}.") for word, said in found]


def _stages(figures: Figures, arm: str) -> dict[str, dict[str, int]]:
    """By step of curation, the rows of `in`, `kept` and each reason, in the order of the run."""
    stages: dict[str, dict[str, int]] = {}
    for metric in figures.metrics("yield", arm):
        stage, _, what = metric.partition("/")
        row = figures.row("yield", metric, "mean", Where(arm=arm))
        if row is not None:
            stages.setdefault(stage, {})[what.removeprefix("dropped/")] = row
    return stages


def _funnel(figures: Figures, arm: str) -> Plot | None:
    names, marks = [], []
    before: float | None = None
    for stage, found in _stages(figures, arm).items():
        taken, kept = figures.value(found.get("in")), figures.value(found.get("kept"))
        if taken is not None and (before is None or abs(taken - before) > 0.005):
            names.append(f"{stage.replace('_', ' ')}, before")
            marks.append(Mark(taken, row=found["in"], digits=1))
        if kept is not None:
            names.append(stage.replace("_", " "))
            marks.append(Mark(kept, row=found["kept"], digits=1))
        before = kept if kept is not None else before
    caption = f"{arm}: texts that each step kept, mean per client"
    return Plot(draw.bars(names, marks, title=caption), caption) if marks else None


YIELD = "Yield of all rounds, means over clients (or of the server, where it writes for all) and seeds"


def _funnel_table(figures: Figures, arms: Sequence[str]) -> Table:
    rows: list[list[Cell]] = []
    for arm in arms:
        for stage, found in _stages(figures, arm).items():
            reasons: list[Any] = []
            for reason, row in found.items():
                if reason not in ("in", "kept") and figures.value(row):
                    reasons += ["; " if reasons else "", f"{reason.replace('_', ' ')} ", figures.number(row, None)]
            rows.append(
                [
                    arm,
                    stage.replace("_", " "),
                    figures.number(found.get("in"), 1),
                    figures.number(found.get("kept"), 1),
                    tuple(reasons) or "-",
                ]
            )
    heads = ["arm", "step", "in", "kept", "dropped because, or of these"]
    return Table(heads, rows, YIELD, words=frozenset({0, 1, 4}))


def _labels(figures: Figures, arms: Sequence[str], kind: str, labels: Sequence[str]) -> Plot | None:
    if not 1 < len(labels) <= SHOWN_LABELS:
        return None
    series = []
    for arm in arms:
        rows = [figures.row("text", f"{kind}/label/{label}", "mean", Where(arm=arm)) for label in labels]
        marks = tuple(None if row is None else Mark(figures.rows[row]["value"], row=row) for row in rows)
        if any(marks):
            series.append(Series(arm, marks))
    if not series:
        return None
    caption = f"Share of each label among the texts of the kind “{kind}”, mean over clients and seeds"
    return Plot(draw.dots(labels, series, title=caption, zero=True), caption)


def examples(report: Mapping[str, Any]) -> list[Block]:
    """Some of the texts, as they stand."""
    blocks: list[Block] = [
        Paragraph(
            "Released or written by the server's LLM, as they stand; chosen by place in the file, one of each label in "
            "turn."
        )
    ]
    groups: dict[tuple[str, str], list[Quote]] = {}
    for e in report["examples"]:
        source = f"{e['file']}, text {e['number']}"
        groups.setdefault((e["arm"], e["kind"]), []).append(Quote(source, e["text"], e["answer"]))
    for (arm, kind), quotes in groups.items():
        blocks += [Paragraph(f"{arm}, {kind}:", quiet=True), Quotes(quotes)]
    return blocks
