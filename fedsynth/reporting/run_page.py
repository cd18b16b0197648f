"""The page of a run's report, section by section, made of the report's tree alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import Formatter
from typing import Any

from fedsynth.evaluation.lines import WORDS as LINES
from fedsynth.federation.run.egress import WORDS
from fedsynth.reporting import figures as draw
from fedsynth.reporting.audit_section import audit_section
from fedsynth.reporting.figures import Mark, Series
from fedsynth.reporting.page import (
    Block,
    Card,
    Cards,
    Cell,
    Items,
    Number,
    Page,
    Paragraph,
    Plot,
    Plots,
    Section,
    Table,
    listed,
)
from fedsynth.reporting.risk_section import risk_section
from fedsynth.reporting.statistics import HELD_OUT, SENT, Figures, Where
from fedsynth.reporting.text_section import examples, text_section

SHOWN_CLIENTS = 50  # in a table; the table of figures has the others
SEEN = 0.01  # share of lost tokens below which a cut changes no figure that the page shows
NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "parsed_accuracy": "accuracy of the written answer",
    "readable": "readable answers",
    "exact_match": "exact match",
    "field_match": "field match",
    "rouge_l": "ROUGE-L",
}


def page(report: Mapping[str, Any], table: str = "report.parquet") -> Page:
    """The page of a report.

    Args:
        report: The tree from `build`, or read back from JSON.
        table: Name of the file that holds its rows.
    """
    figures, run = Figures.of(report["rows"]), report["run"]
    arms: list[str] = report["arms"]
    metrics = sorted((m for m in figures.metrics("utility") if not m.endswith(HELD_OUT)), key=_order)
    sections = [
        Section("Summary", "summary", _summary(figures, report, metrics)),
        Section("Before you quote a number", "warnings", [Items([(w, t) for w, t in report["warnings"]])]),
    ]
    if described := {arm: words for arm, words in run.get("arms", {}).items() if arm in arms}:
        sections.insert(1, Section("The arms", "arms", [Items([(f"{arm}:", f"{w}.") for arm, w in described.items()])]))
    if shortened := _facts(figures, report):
        sections.insert(2, Section("Lost before training", "lost", shortened))
    if figures.metrics("risk"):
        sections.append(Section("What epsilon means here", "risk", risk_section(figures, report["privacy"])))
    sections.append(Section("Privacy", "privacy", _privacy(figures, report)))
    if audited := report.get("audit"):  # as for judgements
        sections.append(Section("Audit", "audit", audit_section(audited)))
    if metrics:
        sections.append(Section("Utility", "utility", _utility(figures, report, metrics)))
    if judged := report.get("judgements"):  # reports of earlier versions have none
        sections.append(Section("Judged responses", "judged", _judged(judged)))
    if figures.metrics("text") or figures.metrics("yield"):
        sections.append(Section("Synthetic text", "text", text_section(figures, report)))
    if report["examples"]:
        sections.append(Section("Examples", "examples", examples(report)))
    sections.append(Section("Communication and time", "costs", _costs(figures, report, metrics)))
    if figures.metrics("time"):
        sections.append(Section("Where the time went", "time", _times(figures, arms)))
    if figures.metrics("egress"):
        sections.append(Section("What went to endpoints", "egress", [_egress(figures)]))
    if names := figures.metrics("server"):
        rows: list[list[Cell]] = [
            [arm, name, figures.spread("server", name, arm, None)]
            for arm in arms
            for name in names
            if figures.row("server", name, "mean", Where(arm=arm)) is not None
        ]
        heads = ["arm", "figure", "last round (_before: the first), mean ± deviation over seeds"]
        table_of = Table(heads, rows, words=frozenset({0, 1}))
        sections.append(Section("Other figures", "other", [table_of]))
    sections.append(Section("How it was made", "made", _made(figures, report)))
    seeds, clients = len(run["seeds"]), figures.value(figures.row("run", "clients", "value")) or 0
    lead = (
        f"{len(arms)} arm{'s' if len(arms) > 1 else ''} of a Flower simulation: {clients:.0f} clients with data "
        f"{run['source']}, {seeds} seed{'s' if seeds > 1 else ''}"
    )
    if run.get("sites"):
        lead = f"{', '.join(arms)}, between the sites {', '.join(run['sites'])}, each with its own data"
    lead += f". Begun on {run['date']}." if run.get("date") else "."
    banner = (
        "Shareable: computed from the run's directory alone, that is from released texts, declared facts and test "
        "figures. No private text was read for it."
    )
    said = [statement_cell(figures, str(place), words) for place, words in enumerate(report.get("verdict", ()))]
    return Page(f"Run report: {run['name']}", lead, banner, sections, table, verdict=said)


def statement_cell(figures: Figures, place: str, words: str) -> Cell:
    """A sentence of the verdict, every number with its row; each number's format stands in the words."""
    parts: list[Cell] = []
    for text, name, form, _ in Formatter().parse(words):
        parts.append(text)
        if name is not None:
            row = figures.row("verdict", f"{place}/{name}", "value")
            parts.append(figures.number(row, int((form or ".3f").strip("+.f")), sign="+" in (form or "")))
    return joined(*parts)


def _facts(figures: Figures, report: Mapping[str, Any]) -> list[Block]:
    """What models never read of the private texts, and labels without text; nothing if nothing is lost."""
    facts, arms = report.get("facts", {}), report["arms"]

    def at(kind: str, place: int, name: str, digits: int = 0) -> Cell:
        return figures.number(figures.row("data", f"{kind}/{place}/{name}", "value"), digits)

    def of(own: Sequence[str]) -> str:
        here = [arm for arm in own if arm in arms]
        return "all" if len(here) == len(arms) else ", ".join(here)

    blocks: list[Block] = []
    rows: list[list[Cell]] = [
        [
            cut["part"],
            of(cut["arms"]),
            joined(at("cuts", place, "cut"), " of ", at("cuts", place, "texts")),
            joined(f"{cut['key']} = ", at("cuts", place, "limit")),
            at("cuts", place, "share", 2),
        ]
        for place, cut in enumerate(facts.get("cuts", []))
        if cut["lost"] >= SEEN * cut["tokens"]
    ]
    if rows:
        heads = ["read by", "arms", "texts cut", "longest text, in tokens", "share of tokens never read"]
        note = "Private training texts of all clients, first seed. A longer text costs memory and time, not epsilon."
        blocks.append(Table(heads, rows, "Texts longer than a model reads", note, frozenset({0, 1, 3})))
    rows = [
        [
            of(each["arms"]),
            joined(at("labels", place, "unlisted"), " of ", at("labels", place, "rows")),
            joined(at("labels", place, "lacking"), " of ", at("labels", place, "clients")),
            at("labels", place, "most"),
        ]
        for place, each in enumerate(facts.get("labels", []))
        if each["unlisted"] or each["lacking"]
    ]
    if rows:
        heads = ["arms", "rows ignored for their label", "clients that lack a label", "most labels one lacks"]
        blocks.append(Table(heads, rows, "Labels without private text"))
    return blocks


def _lines(figures: Figures, metric: str, columns: int) -> list[list[Cell]]:
    """Rows below a table of arms: the figures that need no model."""
    found = [(words, figures.row("line", f"{line}/{metric}", "mean")) for line, words in LINES.items()]
    return [[f"({words})", figures.number(row), *["-"] * (columns - 2)] for words, row in found if row is not None]


def _judged(judged: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Wins, ties and losses of each pair of arms."""
    heads = ["arms", "judge", "won", "tied", "lost", "no verdict", "win-tie rate", "net (95 %)"]
    rows: list[list[Cell]] = []
    for each in judged:
        read = each["win"] + each["tie"] + each["lose"]
        rate = f"{(each['win'] + each['tie']) / read:.3f}" if read else "-"
        net = "-" if each["net"] is None else f"{each['net']:.3f} ({each['low']:.3f} to {each['high']:.3f})"
        counts = [str(each[name]) for name in ("win", "tie", "lose", "unreadable")]
        rows.append([f"{each['first']} against {each['second']}", each["judge"], *counts, rate, net])
    note = (
        "Each pair of responses to a test instruction was judged in both orders; where these disagree it is a tie. "
        "Net is (won - lost) / judged. As other test figures, these counts are of models that learnt private text: "
        "epsilon does not cover them."
    )
    return [Table(heads, rows, note=note, words=frozenset({0, 1}))]


def _order(metric: str) -> tuple[int, str]:
    known = list(NAMES)
    return (known.index(metric) if metric in known else len(known), metric)


def _name(metric: str) -> str:
    return NAMES.get(metric, metric)


def _first_up(metric: str) -> str:
    """The text with a capital first letter."""
    return _name(metric)[:1].upper() + _name(metric)[1:]


def _interval(figures: Figures, part: str, metric: str, arm: str, baseline: str = "", *, sign: bool = False) -> Cell:
    ends = [
        figures.number(figures.row(part, metric, end, Where(arm=arm, baseline=baseline)), sign=sign)
        for end in ("low", "high")
    ]
    return "-" if isinstance(ends[0], str) else ("[", ends[0], ", ", ends[1], "]")


def _mark(figures: Figures, part: str, metric: str, arm: str, baseline: str = "") -> Mark | None:
    row = figures.row(part, metric, "mean", Where(arm=arm, baseline=baseline))
    value = figures.value(row)
    if value is None:
        return None
    low, high = (
        figures.value(figures.row(part, metric, end, Where(arm=arm, baseline=baseline))) for end in ("low", "high")
    )
    return Mark(value, low, high, row)


def _summary(figures: Figures, report: Mapping[str, Any], metrics: Sequence[str]) -> list[Block]:
    arms, baseline = report["arms"], report["baseline"]
    main = metrics[0] if metrics else None
    held = main + HELD_OUT if main and main + HELD_OUT in figures.metrics("utility") else None
    heads = ["arm", *([_name(main), "95 % interval"] if main else []), *(["held-out clients"] if held else [])]
    lost: Mapping[str, Any] = report.get("losses", {})
    rows: list[list[Cell]] = []
    for arm in arms:
        row: list[Cell] = [arm]
        if main:
            row += [figures.spread("utility", main, arm), _interval(figures, "utility", main, arm)]
        if held:
            row.append(figures.spread("utility", held, arm))
        rows.append(
            [
                *row,
                _guarantee(report, arm),
                figures.bound(figures.row("privacy", "epsilon", "largest", Where(arm=arm)), 3),
                *([_left(figures, arm, lost.get(arm, ()))] if lost else []),
            ]
        )
    note = (
        "Means over clients, then mean ± standard deviation over seeds. Intervals: percentile bootstrap over seeds, "
        "then clients within each."
        if main
        else ""
    )
    if held:
        there = figures.value(figures.row("run", "clients", "value")) or 0
        tuned = [str(client) for client in report["run"]["tuned_on"] if client < there]
        note += (
            f" Held-out clients are all but {listed(tuned)}: on these "
            "settings were tuned, so that only the others show how a method does elsewhere."
        )
    note += " The lines below the arms need no model: see docs/report.md." if _lines(figures, main or "", 2) else ""
    blocks: list[Block] = []
    if main:
        plots = [
            _dots(
                figures, "utility", main, arms, f"{_first_up(main)}, mean over clients and seeds with its 95 % interval"
            ),
            _dots(
                figures,
                "difference",
                main,
                arms,
                f"{_first_up(main)} above that of {baseline}, pair by pair, with its 95 % interval",
                baseline,
            ),
        ]
        blocks.append(Plots([p for p in plots if p is not None]))
    words = frozenset({0, len(heads), len(heads) + 2})
    heads += ["guarantee", "epsilon", *(["left by filters"] if lost else [])]
    rows += _lines(figures, main, len(heads)) if main else []
    return [*blocks, Table(heads, rows, note=note, words=words)]


def _left(figures: Figures, arm: str, lost: Sequence[Mapping[str, str]]) -> Cell:
    """A line on each of an arm's losses, every number with its row."""
    parts: list[Cell] = []
    for loss in lost:
        parts += ["; "] if parts else []
        for words, number, *_ in Formatter().parse(loss["words"]):
            row = figures.row("loss", f"{loss['what']}/{number}", "sum", Where(arm=arm))
            parts += [words, figures.number(row, 0)] if number else [words]
    return joined(*parts) if parts else "-"


def _guarantee(report: Mapping[str, Any], arm: str) -> str:
    said = report["privacy"].get(arm, {})
    if said.get("guarantee") == "none":
        return "none"
    return "DP" if "largest_over_clients" in said else "nothing is released"


def _dots(
    figures: Figures, part: str, metric: str, arms: Sequence[str], caption: str, baseline: str = ""
) -> Plot | None:
    chosen = [arm for arm in arms if _mark(figures, part, metric, arm, baseline)]
    if not chosen:
        return None
    marks = tuple(_mark(figures, part, metric, arm, baseline) for arm in chosen)
    looks = [arms.index(arm) for arm in chosen]
    return Plot(draw.dots(chosen, [Series(metric, marks)], title=caption, zero=bool(baseline), looks=looks), caption)


def _privacy(figures: Figures, report: Mapping[str, Any]) -> list[Block]:
    """A card for each statement, with all arms that share it; below, the terms common to all."""
    groups: dict[str, list[str]] = {}
    for arm in report["arms"]:
        said = dict(report["privacy"].get(arm, {}))
        said["terms"] = {key: value for key, value in said.get("terms", {}).items() if key != "silent"}
        groups.setdefault(json.dumps(said, sort_keys=True), []).append(arm)
    # The longest first: the short ones then find room beside it.
    order = sorted(groups.values(), key=lambda arms: "largest_over_clients" not in report["privacy"].get(arms[0], {}))
    cards = [_card(figures, report["privacy"].get(arms[0], {}), arms) for arms in order]
    public = {word for said in report["privacy"].values() for word in said.get("terms", {}).get("public", [])}
    open_ = {word for said in report["privacy"].values() for word in said.get("not_covered", [])}
    blocks: list[Block] = [Cards(cards)]
    if public:
        first = next(
            said["terms"]["public"] for said in report["privacy"].values() if said.get("terms", {}).get("public")
        )
        blocks.append(Items([("Taken as public:", "; ".join(w for w in first if w in public) + ".")]))
    not_covered = [
        w for said in list(report["privacy"].values())[:1] for w in said.get("not_covered", []) if w in open_
    ]
    if not_covered:
        blocks.append(Items([("Not covered:", word + ".") for word in not_covered]))
    return blocks


def _card(figures: Figures, said: Mapping[str, Any], arms: Sequence[str]) -> Card:
    """The first arm's figures stand for all of the card."""
    terms, spent, arm = said.get("terms", {}), said.get("largest_over_clients"), arms[0]
    title = ", ".join(arms)
    adversary = terms.get("adversary", "an honest-but-curious server")
    if spent is None:
        none = said.get("guarantee") == "none"
        facts: list[tuple[str, Cell]] = [
            ("guarantee", "none" if none else "nothing to spend"),
            ("in words", said.get("line", "")),
        ]
        if none:
            facts.append(("adversary", adversary))
        return Card(title, facts, open=none)

    def at(metric: str, digits: int | None = None) -> Cell:
        return figures.number(figures.row("privacy", metric, "largest", Where(arm=arm)), digits)

    def bound(metric: str, digits: int) -> Cell:
        return figures.bound(figures.row("privacy", metric, "largest", Where(arm=arm)), digits)

    unit, unknown = str(spent.get("unit", "row")), "not recorded"
    delta_row = figures.row("privacy", "delta", "largest", Where(arm=arm))
    delta: Cell = "-" if delta_row is None else Number(f"{figures.value(delta_row):g}", delta_row)
    units: Cell = joined(f"{unit}; at most ", at("rows_per_unit", 0), " of its rows count")
    units = {"row": "row: rows are declared independent", "client": "client: all of its data"}.get(unit, units)
    facts = [
        ("guarantee", "differential privacy, all rounds and releases of a run together"),
        ("epsilon", joined(bound("epsilon", 3), " (largest over clients and seeds)")),
        ("delta", delta),
        ("adjacency", terms.get("adjacency", "zero-out: one unit is replaced by an empty one")),
        (f"epsilon if a {unit} is replaced by another", bound("epsilon_replace_one", 2)),
        ("unit", units),
    ]
    if cohort := spent.get("cohort"):
        words = "a secure sum of {clients} clients, at most {dropouts} missing, {colluders} in league with the server"
        facts.append(("rests on", words.format(**cohort)))
        facts.append(("epsilon of a client's own messages", bound("epsilon_alone", 2)))
    if sizes := list(spent.get("epsilon_rows", {})):
        group: list[Any] = []
        for size in sizes:
            group += [", " if group else "", bound(f"epsilon of {size} rows", 1)]
        facts.append((f"epsilon for a person with {listed(sizes)} rows", tuple(group)))
    facts.append(("mechanism", terms.get("mechanism", unknown)))
    for part in spent.get("mechanisms", []):
        name = part["mechanism"]
        facts += [
            (f"{name}: epsilon by itself", bound(f"{name}/epsilon", 3)),
            (f"{name}: noise, clip", joined("sigma ", at(f"{name}/sigma", 3), ", clip ", at(f"{name}/clip_norm"))),
            (f"{name}: rate, steps", joined(at(f"{name}/sampling_rate", 3), ", ", at(f"{name}/steps", 0))),
        ]
    sampler: Cell = terms.get("sampler", unknown)
    if "mechanisms" not in spent:
        facts.append(("noise, clip", joined("sigma ", at("sigma", 3), ", clip norm ", at("clip_norm", None))))
        sampler = joined(sampler, "; rate ", at("sampling_rate", 3), ", ", at("steps", 0), " steps")
    facts += [
        ("sampler", sampler),
        ("accountant", terms.get("accountant", unknown)),
        ("composition", terms.get("composition", unknown)),
        ("adversary", adversary),
        ("sees", " and ".join(terms.get("sees", [])) or unknown),
        *([("assumptions", terms["assumptions"])] if terms.get("assumptions") else []),
        ("noise keys", "simulated: noise reproducible" if spent.get("simulated") else "drawn by the sites"),
    ]
    return Card(title, facts)


def joined(*parts: Cell) -> Cell:
    """Cells side by side, as one."""
    return tuple(piece for part in parts for piece in (part if isinstance(part, tuple) else (part,)))


def _utility(figures: Figures, report: Mapping[str, Any], metrics: Sequence[str]) -> list[Block]:
    arms, baseline = report["arms"], report["baseline"]
    held = any(m.endswith(HELD_OUT) for m in figures.metrics("utility"))
    rows: list[list[Cell]] = []
    for metric in metrics:
        for arm in arms:
            if figures.row("utility", metric, "mean", Where(arm=arm)) is None:
                continue
            row: list[Cell] = [
                arm,
                _name(metric),
                figures.spread("utility", metric, arm),
                _interval(figures, "utility", metric, arm),
            ]
            rows.append([*row, *([figures.spread("utility", metric + HELD_OUT, arm)] if held else [])])
        for name, value, *rest in _lines(figures, metric, 4 + held):
            rows.append([name, _name(metric), value, *rest[1:]])
    heads = ["arm", "metric", "mean ± deviation", "95 % interval", *(["held-out clients"] if held else [])]
    blocks: list[Block] = [Table(heads, rows, "After the last round", words=frozenset({0, 1}))]
    rows = []
    for metric in figures.metrics("difference"):
        group = "held-out" if metric.endswith(HELD_OUT) else "all"
        for arm in arms:
            where = {"arm": arm, "baseline": baseline}
            if (row_of := figures.row("difference", metric, "mean", Where(**where))) is None:
                continue
            rows.append(
                [
                    f"{arm} - {baseline}",
                    _name(metric.removesuffix(HELD_OUT)),
                    group,
                    figures.number(row_of, sign=True),
                    _interval(figures, "difference", metric, arm, baseline, sign=True),
                    figures.number(figures.row("difference", metric, "better", Where(**where)), 2),
                    figures.number(figures.row("difference", metric, "pairs", Where(**where)), 0),
                ]
            )
    if rows:
        heads = ["difference", "metric", "clients", "mean", "95 % interval", "share above 0", "pairs"]
        note = "Paired per (seed, client); percentile bootstrap over seeds, then clients."
        blocks.append(Table(heads, rows, "Paired differences", note, frozenset({0, 1, 2})))
    if curves := _curves(figures, arms, metrics):
        blocks.append(Plots(curves))
    shared = [arm for arm in arms if arm not in report["pooled"]]
    clients = sorted({int(r["client"]) for r in figures.rows if r["part"] == "client" and r["arm"] in shared})
    if clients and metrics:
        rows = []
        for client in clients[:SHOWN_CLIENTS]:
            name = f"client {client}" + (" (tuned on)" if client in report["run"]["tuned_on"] else "")
            own = (figures.row("client", metrics[0], "mean", Where(arm=arm, client=client)) for arm in shared)
            rows.append([name, *map(figures.number, own)])
        caption = f"{_first_up(metrics[0])} client by client, mean over seeds"
        more = len(clients) - SHOWN_CLIENTS
        note = f"{more} more clients stand in the table of figures, part client." if more > 0 else ""
        blocks.append(Table(["client", *shared], rows, caption, note))
    return blocks


def _curves(figures: Figures, arms: Sequence[str], metrics: Sequence[str]) -> list[Plot]:
    plots = []
    rounds = sorted({int(r["round"]) for r in figures.rows if r["part"] == "curve"})
    for metric in metrics:
        series = []
        for arm in arms:
            marks = []
            for number in rounds:
                row = figures.row("curve", metric, "mean", Where(arm=arm, round=number))
                std = figures.value(figures.row("curve", metric, "std", Where(arm=arm, round=number)))
                if (value := figures.value(row)) is not None:
                    ends = (None, None) if std is None else (value - std, value + std)
                    marks.append(Mark(value, ends[0], ends[1], row, x=float(number)))
            if marks:
                series.append(Series(arm, tuple(marks)))
        if series:
            caption = f"{_first_up(metric)} over rounds, mean over clients and seeds; whiskers: ± deviation over seeds"
            plots.append(Plot(draw.lines(series, title=caption, x_name="round"), caption))
    return plots


def _costs(figures: Figures, report: Mapping[str, Any], metrics: Sequence[str]) -> list[Block]:
    arms = report["arms"]
    names = figures.metrics("cost")
    rows: list[list[Cell]] = [[arm, *(figures.spread("cost", name, arm, 1) for name in names)] for arm in arms]
    blocks: list[Block] = [
        Table(["arm", *names], rows, note="Bytes of payloads, all rounds; seconds depend on the machine.")
    ]
    sent = "kilobytes up per client"
    if metrics and sent in names:
        series = []
        for arm in (
            a for a in arms if a not in report["pooled"]
        ):  # these arms use raw text, and this cost is not counted
            x = figures.row("cost", sent, "mean", Where(arm=arm))
            mark = _mark(figures, "utility", metrics[0], arm)
            if x is not None and mark is not None:
                series.append(Series(arm, (replace(mark, x=figures.rows[x]["value"], x_row=x),)))
        if len(series) > 1:
            caption = f"{_first_up(metrics[0])} against what a client sends"
            svg = draw.scatter(series, title=caption, x_name=sent, y_name=_name(metrics[0]), x_digits=1)
            blocks.append(Plots([Plot(svg, caption)]))
    return blocks


def _times(figures: Figures, arms: Sequence[str]) -> list[Block]:
    """The parts of all arms as bars, then those of each arm as a table."""
    names, marks = list[str](), list[Mark]()
    for part in figures.metrics("time"):
        row = figures.row("time", part, "seconds of all arms")
        row = figures.row("time", part, "seconds") if row is None else row
        if (value := figures.value(row)) is not None:
            names.append(part)
            marks.append(Mark(value, row=row, digits=1))
    caption = "Seconds of a run's parts, all arms and seeds together"
    rows: list[list[Cell]] = []
    for arm in ("", *arms):
        for part in figures.metrics("time", arm):
            at = [figures.row("time", part, statistic, Where(arm=arm)) for statistic in ("seconds", "clients")]
            if at[0] is not None:
                rows.append([arm or "(all)", part, *(figures.number(row, 1) for row in at)])
    note = (
        "Seconds by the clock, all seeds together; clients work side by side, and their own seconds are of the CPU. "
        "Check, start and end are of the whole run, the command's imports aside."
    )
    heads = ["arm", "part", "seconds", "clients' CPU seconds"]
    return [
        Plots([Plot(draw.bars(names, marks, title=caption), caption)]),
        Table(heads, rows, note=note, words=frozenset({0, 1})),
    ]


def _egress(figures: Figures) -> Table:
    """A line for each cell, machine and guarantee."""
    places = dict.fromkeys((r["arm"], r["seed"], r["metric"]) for r in figures.rows if r["part"] == "egress")
    rows: list[list[Cell]] = []
    for arm, seed, metric in places:
        host, _, provenance = metric.rpartition("/")
        counts = (figures.number(figures.row("egress", metric, n, Where(arm=arm, seed=seed)), 0) for n in SENT)
        rows.append([arm, str(seed), host, WORDS[provenance], *counts])
    heads = ["arm", "seed", "machine", "prompts hold at most"]
    heads += ["requests", "tokens of prompts", "of answers", "answers from the cache", "their tokens"]
    note = "Tokens as the servers report them. Requests that were repeated or failed went out, too."
    return Table(heads, rows, note=note, words=frozenset({0, 1, 2, 3}))


def _made(figures: Figures, report: Mapping[str, Any]) -> list[Block]:
    run, versions = report["run"], report["run"]["versions"]
    facts: list[tuple[str, Cell]] = [
        (name, figures.number(figures.row("run", name, "value"), 0))
        for name in ("clients", "seeds", "rounds", "seconds")
    ]
    facts = [(name, cell) for name, cell in facts if cell != "-"]
    facts += [
        ("seeds of the run", ", ".join(map(str, run["seeds"]))),
        ("data", run["source"]),
        ("task", run["task"]),
        ("privacy unit", run["unit"]),
    ]
    methods: dict[str, list[str]] = {}
    for arm, use in run["strategies"].items():
        methods.setdefault(use, []).append(arm)
    facts += [("strategies", "; ".join(f"{use}: {', '.join(of)}" for use, of in methods.items()))]
    facts += [
        ("model " + name, ", ".join(f"{key} {str(value)[:16]}" for key, value in kind.items()))
        for name, kind in run["models"].items()
    ]
    if "fedsynth" in versions:
        packages = {
            "fedsynth": versions["fedsynth"],
            "Python": versions.get("python", ""),
            **versions.get("packages", {}),
        }
        facts.append(("versions", ", ".join(f"{name} {number}" for name, number in packages.items())))
    if code := versions.get("code"):
        facts.append(("code", f"{str(code.get('commit'))[:12]}" + (", changed since" if code.get("changed") else "")))
    if hardware := versions.get("hardware"):
        gpus = ", ".join(map(str, hardware.get("gpus") or [])) or "no GPU"
        facts.append(("hardware", f"{hardware.get('cores')} cores, {hardware.get('memory_gb')} GB of memory, {gpus}"))
    again = "fedsynth run --from DIR repeats the run from its directory and names what is no longer as it was."
    return [Cards([Card(run["name"], facts)]), Paragraph(again, quiet=True)]
