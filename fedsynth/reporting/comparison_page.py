"""The page of a comparison: its tables and Pareto plots, with every number as a row of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsynth.comparison.running import FRAME, Comparison, read
from fedsynth.comparison.tables import remarks
from fedsynth.evaluation.lines import WORDS as LINES
from fedsynth.reporting import figures as draw
from fedsynth.reporting.figures import Mark, Series
from fedsynth.reporting.page import Block, Cell, Items, Page, Paragraph, Plot, Plots, Section, Table, listed
from fedsynth.reporting.run_page import NAMES, joined, statement_cell
from fedsynth.reporting.run_report import save
from fedsynth.reporting.statistics import Figures, Where
from fedsynth.typed import BadValue

LEVELS = ("mean", "std", "low", "high", "held_out_mean", "held_out_std", "seeds", "clients")
GAPS = ("difference", "difference_low", "difference_high", "better", "pairs")
PAIRED = {*GAPS, "better_pairs"}
COSTS = {
    "epsilon_stated": "epsilon",
    "delta": "delta",
    "bytes_up": "bytes up",
    "bytes_down": "bytes down",
    "client_seconds": "client seconds",
    "tokens_read": "tokens read",
    "tokens_written": "tokens written",
}
MEGABYTE = 1e6
TASKS = {"classification": "Classification", "instructions": "Instructions"}


def write(out: Path, html: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Writes the page of a comparison, and beside it the same as JSON and its numbers as Parquet.

    Args:
        out: The comparison's directory.
        html: The page; None for `report.html` there.

    Returns:
        Path of the page, and the report.

    Raises:
        BadValue: If no comparison was completed there, or the page cannot be written.
    """
    place = html or out / "report.html"
    if place.suffix != ".html":
        raise BadValue(f"--out must name an .html file, got {str(place)!r}")
    report = build(read(out))
    save(place, report, page(report, place.with_suffix(".parquet").name), mode=0o644)
    return place, report


def build(done: Comparison) -> dict[str, Any]:
    """The page's content as plain JSON: `rows` holds every number."""
    figures, tables = Figures(), dict(done.tables)
    for found in tables["tables"].values():
        for row in found["utility"]:
            where = _part("utility", row["scenario"], row["epsilon"])
            for name in LEVELS:
                figures.add(where, row["metric"], name, row[name], Where(arm=row["arm"]))
            better = None if row["better"] is None else round(row["better"] * row["pairs"])
            figures.add(where, row["metric"], "better_pairs", better, Where(arm=row["arm"], baseline=row["baseline"]))
            for name in GAPS:
                figures.add(where, row["metric"], name, row[name], Where(arm=row["arm"], baseline=row["baseline"]))
        for row in found["costs"]:
            for name, said in COSTS.items():
                figures.add(
                    _part("cost", row["scenario"], row["epsilon"]), said, "total", row[name], Where(arm=row["arm"])
                )
    for name, by_metric in tables.get("lines", {}).items():  # comparisons of earlier versions have none
        for metric, lines in by_metric.items():
            for line, value in lines.items():
                figures.add(_part("line", name, None), f"{line}/{metric}", "mean", value)
    for place, found in enumerate(tables.get("verdicts", [])):
        for at, statement in enumerate(found["statements"]):
            for name, value in statement["numbers"].items():
                figures.add("verdict", f"{place}/{at}/{name}", "value", value)
    for row in tables["points"]:
        where = _part("point", row["scenario"], row["budget"])
        for name in ("utility", "low", "high"):
            figures.add(where, row["metric"], name, row[name], Where(arm=row["arm"]))
        if row["guarantee"] == "dp":
            figures.add(where, "epsilon", "largest", row["epsilon"], Where(arm=row["arm"]))
        if row["bytes"] is not None:
            figures.add(where, "megabytes", "total", row["bytes"] / MEGABYTE, Where(arm=row["arm"]))
    shown = {key: value for key, value in tables.items() if key != "out"}
    return {"rows": figures.rows, **shown, "epsilons": list(done.grid.epsilons)}


def _part(kind: str, scenario: str, epsilon: float | None) -> str:
    """The place of a scenario's figures under a budget; figures without a budget hold under each."""
    return f"{kind}: {scenario}" + ("" if epsilon is None else f", epsilon {epsilon:g}")


def page(report: Mapping[str, Any], table: str = "report.parquet") -> Page:
    """The page of a comparison's report.

    Args:
        report: The tree from `build`, or read back from JSON.
        table: Name of the file that holds its rows.
    """
    figures = Figures.of(report["rows"])
    sections = [Section(TASKS[task], task, _task(figures, report, task)) for task in TASKS if task in report["tables"]]
    sections.insert(0, Section("Before you quote a number", "warnings", [Items(_cautions(report))]))
    sections += [
        Section("Utility against its price", "pareto", _fronts(figures, report)),
        Section("What it costs", "costs", _costs(figures, report)),
        Section("Privacy", "privacy", _privacy(report)),
        Section("How it was made", "made", _made(report)),
    ]
    names, seeds = list(report["scenarios"]), len(report["seeds"])
    at = f", at epsilon {listed([f'{e:g}' for e in report['epsilons']])}" if report["epsilons"] else ""
    lead = f"Arms of {listed(names)}{at}, {seeds} seed{'s' if seeds > 1 else ''} each."
    banner = (
        "Shareable: computed from the directories of the runs, "
        "that is from released texts, declared facts and test figures."
    )
    return Page(
        f"Comparison: {report['name']}", lead, banner, sections, table, verdict=_verdict(figures, report), apart=True
    )


def _verdict(figures: Figures, report: Mapping[str, Any]) -> list[Cell]:
    """A sentence on each scenario and budget: what is best, and above what."""
    said: list[Cell] = []
    for place, found in enumerate(report.get("verdicts", [])):
        at = "" if found["epsilon"] is None else f" at epsilon {found['epsilon']:g}"
        parts: list[Cell] = [f"{found['scenario']}{at}: "]
        for number, statement in enumerate(found["statements"][:2]):
            parts += [" " if number else "", statement_cell(figures, f"{place}/{number}", statement["words"])]
        said.append(joined(*parts))
    return said


def _cautions(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [
        *remarks(report),
        (
            "The best of many.",
            "Whoever picks the best arm by these figures sees it a little better than it is; "
            "epsilon does not cover that arms were compared by test figures.",
        ),
        (
            "Worlds of their own.",
            "Each seed, arm and epsilon is a hypothetical federation. On real data all these runs "
            "would charge the same people, and their epsilons would add up.",
        ),
        ("Test figures are not covered by epsilon.", "They are measured at the clients, on test sets declared public."),
    ]
    without = sorted({f"{p['arm']} ({p['scenario']})" for p in report["points"] if p["guarantee"] == "none"})
    if without:
        found.append(("No guarantee.", f"No epsilon holds for {listed(without)}."))
    return found


def _rows(report: Mapping[str, Any], task: str, scenario: str, metric: str) -> list[Mapping[str, Any]]:
    utility = report["tables"][task]["utility"]
    return [row for row in utility if (row["scenario"], row["metric"]) == (scenario, metric)]


def _metrics(report: Mapping[str, Any], task: str, scenario: str) -> list[str]:
    found = (row["metric"] for row in report["tables"][task]["utility"] if row["scenario"] == scenario)
    return list(dict.fromkeys(found))


def _named(row: Mapping[str, Any], epsilon: float | None) -> str:
    return str(row["arm"]) + ("" if epsilon is None else f", ε {epsilon:g}")


def _task(figures: Figures, report: Mapping[str, Any], task: str) -> list[Block]:
    """For each scenario its first metric as figures and all metrics as tables."""
    note = (
        "Mean ± deviation over seeds; intervals: bootstrap over seeds, then clients; differences are paired by seed "
        "and client, at equal epsilon; “better in”: so many of the pairs. A difference whose interval holds 0 "
        "shows nothing."
    )
    blocks: list[Block] = [Paragraph(note, quiet=True)]
    for scenario, terms in report["scenarios"].items():
        metrics = _metrics(report, task, scenario)
        if not metrics:
            continue
        blocks.append(Paragraph(f"{scenario}, against {terms['baseline']}:"))
        first = metrics[0]
        blocks.append(Plots(_plots(figures, _rows(report, task, scenario, first), terms["baseline"], first)))
        blocks += [_table(figures, _rows(report, task, scenario, metric), metric, scenario) for metric in metrics]
    return blocks


def _plots(figures: Figures, rows: Sequence[Mapping[str, Any]], baseline: str, metric: str) -> list[Plot]:
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    captions = (
        f"{_first_up(metric)}, mean over clients and seeds with its 95 % interval",
        f"{_first_up(metric)} above that of {baseline}, pair by pair, with its 95 % interval",
    )
    plots = []
    for caption, (middle, low, high) in zip(captions, (("mean", "low", "high"), GAPS[:3]), strict=True):
        chosen = [row for row in rows if row[middle] is not None]
        marks = tuple(Mark(row[middle], row[low], row[high], _place(figures, row, metric, middle)) for row in chosen)
        if chosen:
            svg = draw.dots(
                [_named(row, row["epsilon"]) for row in chosen],
                [Series(metric, marks)],
                title=caption,
                zero=middle == "difference",
                looks=[arms.index(row["arm"]) for row in chosen],
            )
            plots.append(Plot(svg, caption))
    return plots


def _place(figures: Figures, row: Mapping[str, Any], metric: str, name: str) -> int | None:
    where = _part("utility", row["scenario"], row["epsilon"])
    return figures.row(where, metric, name, Where(arm=row["arm"], baseline=row["baseline"] if name in PAIRED else ""))


def _table(figures: Figures, rows: Sequence[Mapping[str, Any]], metric: str, scenario: str) -> Table:
    held = any(row["held_out_mean"] is not None for row in rows)
    heads = [
        "arm",
        "epsilon",
        NAMES.get(metric, metric),
        "95 % interval",
        *(["held-out clients"] if held else []),
        "difference",
        "95 % interval",
        "better in",
    ]
    cells: list[list[Cell]] = []
    for row in rows:

        def number(name: str, row: Mapping[str, Any] = row, **how: Any) -> Any:
            return figures.number(_place(figures, row, metric, name), **how)

        def spread(middle: str, deviation: str, number: Any = number) -> Cell:
            std = number(deviation)
            return number(middle) if std == "-" else (number(middle), " ± ", std)

        def interval(low: str, high: str, number: Any = number, **how: Any) -> Cell:
            return "-" if number(low) == "-" else ("[", number(low, **how), ", ", number(high, **how), "]")

        epsilon = "-" if row["epsilon"] is None else f"{row['epsilon']:g}"
        cells.append(
            [
                row["arm"],
                epsilon,
                spread("mean", "std"),
                interval("low", "high"),
                *([spread("held_out_mean", "held_out_std")] if held else []),
                number("difference", sign=True),
                interval("difference_low", "difference_high", sign=True),
                "-"
                if number("better") == "-"
                else (number("better_pairs", digits=0), " of ", number("pairs", digits=0)),
            ]
        )
    for line, words in LINES.items():
        if (at := figures.row(_part("line", scenario, None), f"{line}/{metric}", "mean")) is not None:
            cells.append([f"({words})", "-", figures.number(at), *["-"] * (len(heads) - 3)])
    return Table(heads, cells, caption=f"{scenario}: {NAMES.get(metric, metric)}", words=frozenset({0, 1}))


def _first_up(metric: str) -> str:
    name = NAMES.get(metric, metric)
    return name[:1].upper() + name[1:]


def _fronts(figures: Figures, report: Mapping[str, Any]) -> list[Block]:
    """Utility against epsilon and against bytes; the undominated arms are named below."""
    blocks: list[Block] = []
    for scenario in report["scenarios"]:
        own = [p for p in report["points"] if p["scenario"] == scenario and not p["pooled"]]
        arms = list(dict.fromkeys(p["arm"] for p in own))
        plots = []
        for cost, statistic, said in (
            ("epsilon", "largest", "epsilon stated"),
            ("megabytes", "total", "MB up and down"),
        ):
            series, metric = [], ""
            for arm in arms:
                marks = []
                for p in (p for p in own if p["arm"] == arm):
                    where, metric = _part("point", scenario, p["budget"]), p["metric"]
                    x = figures.row(where, cost, statistic, Where(arm=arm))
                    y = figures.row(where, metric, "utility", Where(arm=arm))
                    if x is not None and y is not None:
                        marks.append(Mark(p["utility"], p["low"], p["high"], y, x=figures.rows[x]["value"], x_row=x))
                series.append(Series(arm, tuple(marks)))
            spread = any(m.x for s in series for m in s.marks if m)  # else one column over a price that no arm pays
            if sum(bool(s.marks) for s in series) > 1 and spread:
                caption = f"{scenario}: {NAMES.get(metric, metric)} against {said}"
                svg = draw.scatter(series, title=caption, x_name=said, y_name=NAMES.get(metric, metric), x_digits=2)
                plots.append(Plot(svg, caption))
        if plots:
            blocks.append(Plots(plots))
        on = {cost: [_named(p, p["budget"]) for p in own if p[f"pareto_{cost}"]] for cost in ("epsilon", "bytes")}
        fronts = [(f"{scenario}, on the front by {cost}:", f"{listed(arms)}.") for cost, arms in on.items() if arms]
        blocks.append(Items(fronts))
    note = (
        "On the front are the arms for which no other has at least their utility for no more of the price (an arm "
        "without a guarantee has no finite epsilon, and no point on the left). Points are compared, not intervals."
    )
    return [*blocks, Paragraph(note, quiet=True)]


def _costs(figures: Figures, report: Mapping[str, Any]) -> list[Block]:
    rows: list[list[Cell]] = []
    for found in report["tables"].values():
        for row in found["costs"]:
            where = _part("cost", row["scenario"], row["epsilon"])
            spent = [figures.row(where, said, "total", Where(arm=row["arm"])) for said in COSTS.values()]
            epsilon = figures.bound(spent[0], 3) if row["epsilon_stated"] else "-"
            said = "nothing is released" if row["epsilon_stated"] == 0 else row["guarantee"]
            cells = [figures.number(place, 0) for place in spent[2:]]
            budget = "-" if row["epsilon"] is None else f"{row['epsilon']:g}"
            rows.append([row["scenario"], row["arm"], budget, said, epsilon, *cells])
    heads = [
        "scenario",
        "arm",
        "budget",
        "guarantee",
        "states",
        "bytes up",
        "bytes down",
        "client seconds",
        "tokens read",
        "tokens written",
    ]
    note = (
        "Of one seed: all clients, all rounds (mean over seeds). Tokens are those of the server's LLM; seconds are of "
        "this machine, busy as it was."
    )
    return [Table(heads, rows, note=note, words=frozenset({0, 1, 2, 3}))]


def _privacy(report: Mapping[str, Any]) -> list[Block]:
    entries = [(f"{run}, {arm}:", line) for run, arms in report["privacy"].items() for arm, line in arms.items()]
    return [Items(entries)]


def _made(report: Mapping[str, Any]) -> list[Block]:
    seeds = ", ".join(map(str, report["seeds"]))
    terms = [
        (
            f"{name}:",
            f"baseline {of['baseline']}, first metric {NAMES.get(of['metric'], of['metric'])}"
            + (f", settings tuned on clients {', '.join(map(str, of['tuned_on']))}" if of["tuned_on"] else ""),
        )
        for name, of in report["scenarios"].items()
    ]
    again = (
        f"Seeds {seeds}. The command that made it goes on, or reads what is there; all rows are in {FRAME}, "
        "the grid in comparison.toml."
    )
    return [Items(terms), Paragraph(again, quiet=True)]
