"""Grids run, continued and read, with cells that run in this process instead of Flower's."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import inprocess
import pandas as pd
import pytest
import tiny
from children import meeting_child
from rich.console import Console

import fedsynth.cli.main
from fedsynth.comparison import running as comparison
from fedsynth.comparison.grids import Grid, read_grid
from fedsynth.comparison.grids import to_toml as to_toml_of
from fedsynth.comparison.running import compare, depends_on_epsilon, parts, read, shares
from fedsynth.comparison.tables import NOTES, _interval, costs_table, remarks, utility_table
from fedsynth.federation.run.directory import prepare
from fedsynth.federation.run.privacy_report import up
from fedsynth.federation.run.summary import summarize
from fedsynth.reporting import comparison_page
from fedsynth.reporting.page import render
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, to_toml
from fedsynth.simulation import simulate
from fedsynth.simulation.flower import LaunchFailed
from fedsynth.simulation.result import Result
from fedsynth.typed import BadValue

LOCAL, AVERAGE = "fedsynth.strategies.local:LocalOnly", "fedsynth.strategies.lora_avg:LoraAverage"
ARMS = f"""
[arms.local]
strategy.use = "{LOCAL}"
[arms.no_dp]
client.guarantee = "none"
[arms.pooled]
strategy.use = "{LOCAL}"
data.pooled = true
"""
GRID = """
seeds = [0, 1]
epsilons = [8.0, 2.0]
baseline = "local"
[scenarios.notes]
use = "notes.toml"
arms = ["local", "main"]
"""


def declared(tmp_path: Path, text: str = GRID) -> Grid:
    scenario = inprocess.instructions(tmp_path, AVERAGE, clients=3, rows=36) + ARMS
    (tmp_path / "notes.toml").write_text(scenario.replace('llm = "scripted"', f'llm = "{tiny.folder()}"'))
    (tmp_path / "tiny.toml").write_text(text)
    return read_grid(tmp_path / "tiny.toml")


class Stand:
    """Stands in for `fedsynth.simulation.simulate`: the real client app and strategies, in this process."""

    def __init__(self) -> None:
        self.checked: list[str] = []
        self.ran: list[str] = []
        self.resumed: list[str] = []
        self.failing: set[str] = set()

    def check(self, scenario: Scenario) -> list[str]:
        self.checked.append(scenario.name)
        return ["a warning"]

    def run(self, scenario: Scenario, *, out: Path, workers: Any = None, on_event: Any = None) -> Result:
        prepare(scenario, out)
        self.ran.append(out.name)
        return self._ended(scenario, out)

    def resume(self, out: Path, *, workers: Any = None, on_event: Any = None, on_warning: Any = None) -> Result:
        self.resumed.append(out.name)
        (scenario,) = [p.scenario for p in parts(self.grid) if p.name == out.name]
        return self._ended(simulate.pinned(scenario), out)

    def _ended(self, scenario: Scenario, out: Path) -> Result:
        if out.name in self.failing:
            (out / "status.json").write_text(json.dumps({"status": "failed", "reason": "no more clients"}))
            raise LaunchFailed("no more clients")
        run_logs = []
        for cell in cells(scenario):
            place = out.parent / "cells" / out.name / cell.arm / str(cell.seed)
            run_logs.append(inprocess.play(to_toml(scenario), place, cell.arm, seed=cell.seed).run_log)
        summarize(scenario, out, 1.0, run_logs)
        (out / "status.json").write_text(json.dumps({"status": "completed"}))
        return simulate.read(out)

    grid: Grid


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    found = Stand()
    for name in ("check", "run", "resume"):
        monkeypatch.setattr(simulate, name, getattr(found, name))
    monkeypatch.setattr(comparison, "shares", lambda todo, workers, parallel: (1, 1))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Path, Stand, list[dict[str, Any]]]:
    """One grid that was run as a whole."""
    place = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        found = Stand()
        for name in ("check", "run", "resume"):
            patch.setattr(simulate, name, getattr(found, name))
        patch.setattr(comparison, "shares", lambda todo, workers, parallel: (1, 1))
        found.grid, events = declared(place), list[dict[str, Any]]()
        compare(found.grid, place / "out", on_event=events.append)
    return found.grid, place / "out", found, events


def test_what_does_not_depend_on_epsilon_runs_once(made: tuple[Grid, Path, Stand, list[dict[str, Any]]]) -> None:
    _, out, stand, events = made
    assert stand.ran == ["notes-any", "notes-eps2", "notes-eps8"]
    frame = read(out).frame
    found = frame.groupby("arm")["epsilon"].unique()
    assert [math.isnan(e) for e in found["local"]] == [True]
    assert sorted(found["main"]) == [2.0, 8.0]
    assert [(e["run"], e["state"], e["number"]) for e in events if e["event"] == "run"] == [
        (name, state, n) for n, name in enumerate(stand.ran, 1) for state in ("new", "done")
    ]


def test_the_frame_is_tidy_and_says_what_was_spent(made: tuple[Grid, Path, Stand, list[dict[str, Any]]]) -> None:
    _, out, _, _ = made
    frame = pd.read_parquet(out / "comparison.parquet")
    assert list(frame.columns) == ["scenario", "task", "epsilon", "arm", "seed", "round", "client", "metric", "value"]
    assert not frame.duplicated(["scenario", "epsilon", "arm", "seed", "round", "client", "metric"]).any()
    assert set(frame["task"]) == {"instructions"}
    assert set(frame["seed"]) == {0, 1}
    own = pd.read_parquet(out / "runs" / "notes-eps2" / "metrics.parquet")
    assert len(frame[frame["epsilon"] == 2.0]) == len(own)
    stated = frame[frame["metric"] == "privacy/epsilon"].groupby("epsilon", dropna=False)["value"].max()
    assert stated[2.0] <= 2.0 < stated[8.0] <= 8.0
    assert frame[frame["epsilon"].isna() & (frame["metric"] == "privacy/epsilon")]["value"].tolist() == [0.0, 0.0]


def test_the_tables_hold_every_arm_at_every_epsilon(made: tuple[Grid, Path, Stand, list[dict[str, Any]]]) -> None:
    _, out, _, _ = made
    tables = json.loads((out / "comparison.json").read_text(), parse_constant=lambda _: pytest.fail("not JSON"))
    rows = [r for r in tables["tables"]["instructions"]["utility"] if r["metric"] == "rouge_l"]
    assert [(r["arm"], r["epsilon"]) for r in rows] == [("local", None), ("main", 2.0), ("main", 8.0)]
    assert [r["difference"] is None for r in rows] == [True, False, False]
    assert all(r["pairs"] == 6 for r in rows[1:])  # two seeds, three clients
    by_hand = pd.read_parquet(out / "runs" / "notes-eps8" / "metrics.parquet").query("metric == 'rouge_l'")["value"]
    assert rows[2]["mean"] == pytest.approx(by_hand.mean())
    costs = tables["tables"]["instructions"]["costs"]
    assert [c["epsilon_stated"] <= (c["epsilon"] or 0) for c in costs] == [True] * 3
    assert costs[1]["bytes_up"] > costs[0]["bytes_up"]
    assert costs[0]["client_seconds"] > 0
    assert "DP per row" in tables["privacy"]["notes-eps2"]["main"]
    assert tables["points"][0]["pareto_epsilon"] is True


def test_a_completed_grid_is_read_and_not_run_again(
    made: tuple[Grid, Path, Stand, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, out, _, _ = made
    before = (out / "comparison.json").read_bytes()
    for name in ("check", "run", "resume"):
        monkeypatch.setattr(simulate, name, lambda *_, **__: pytest.fail("nothing is to do"))
    events: list[dict[str, Any]] = []
    compare(grid, out, on_event=events.append)
    assert [e["state"] for e in events] == ["completed"] * 3
    assert (out / "comparison.json").read_bytes() == before


def test_what_is_printed_has_intervals_and_differences(made: tuple[Grid, Path, Stand, list[dict[str, Any]]]) -> None:
    _, out, _, _ = made
    console = Console(width=160, record=True, quiet=False, file=io.StringIO())
    tables = read(out).tables
    console.print(utility_table(tables, "instructions"), costs_table(tables, "instructions"))
    said = console.export_text()
    for word in ("exact match", "ROUGE-L", "exact_match - local", "[", "nothing is released", "delta 1e-05", "any"):
        assert word in said
    assert "accuracy" not in said
    assert any("95 %" in note for note in NOTES)


def test_a_figure_of_few_pairs_says_that_it_has_no_interval() -> None:
    few = {"mean": 0.5, "low": None, "high": None, "difference": None, "difference_low": None, "difference_high": None}
    assert (_interval(few), _interval(few, "difference_", "+")) == ("no interval", "")
    assert _interval({**few, "low": 0.4, "high": 0.6}) == "[0.400, 0.600]"


def point(arm: str, budget: float | None, utility: float) -> dict[str, Any]:
    return {"scenario": "notes", "arm": arm, "budget": budget, "utility": utility}


def test_what_stands_beside_the_figures_is_told_few_seeds_lost_texts_and_more_for_less() -> None:
    tables = {
        "seeds": [0],
        "losses": {"notes-eps8": {"fdkt": "3 of 40 drafts left", "dp_only": "30 of 40 drafts left"}},
        "few_texts": {"notes-eps8": {"fdkt": "3 of 40 drafts left"}},
        "points": [point("local", None, 0.9), point("fdkt", 8.0, 0.289), point("fdkt", 2.0, 0.320),
                   point("dp_only", 2.0, 0.2), point("dp_only", 8.0, 0.2), point("dp_only", 16.0, 0.3)],
    }  # fmt: skip
    told = [f"{word} {sentence}" for word, sentence in remarks(tables)]
    assert told == [
        "1 seed. How results differ from seed to seed is hardly known: intervals are too narrow.",
        "Hardly any text left. notes-eps8, fdkt: 3 of 40 drafts left: its figures are not those of its method.",
        "Left by filters. notes-eps8, dp_only: 30 of 40 drafts left.",
        "Better for a smaller epsilon. notes, fdkt: 0.320 at epsilon 2, 0.289 at 8. Less noise teaches no less: this "
        "is chance, or filters left other texts.",
    ]
    assert list(remarks({**tables, "seeds": [0, 1, 2], "losses": {}, "points": []})) == []


def test_the_pages_lines_of_python_read_a_comparison(
    made: tuple[Grid, Path, Stand, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    page = Path(__file__).parent.parent / "docs" / "compare.md"
    [script] = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first-comparison").symlink_to(made[1])
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    assert "pareto_bytes" in capfd.readouterr().out


def typed(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of the command."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["fedsynth", "compare", *words])
    with pytest.raises(SystemExit) as ended:
        fedsynth.cli.main.main()
    return ended.value.code


def test_the_command_prints_tables_and_one_json_object_last(
    made: tuple[Grid, Path, Stand, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    grid, out, _, _ = made
    (out.parent / "again.toml").write_text(to_toml_of(grid))
    assert typed(["again.toml", "--out", str(out), "--json"], out.parent, monkeypatch) == 0
    said = capfd.readouterr()
    assert json.loads(said.out) == json.loads((out / "comparison.json").read_text())
    assert "notes-eps2 (2/3): completed" in said.err
    for word in ("held-out", "difference", "client time", "bootstrap over seeds, then clients", f"written to {out}"):
        assert word in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no scenario 'nowhere'"),
        (["nowhere.toml"], "no scenario file"),
        (["hospitals", "--arms", "local,fdtk"], "run names the arm 'fdtk'"),
        (["hospitals", "--baseline", "pooled"], "the baseline 'pooled' is not among the arms that run"),
        (["hospitals", "--epsilons", "0,8"], "epsilons must be distinct, finite and above 0"),
        (["hospitals", "--epsilons", "eight"], "--epsilons must be numbers separated by commas"),
        (["hospitals", "--seeds", ","], "seeds must be distinct whole numbers >= 0, at least one"),
        (["hospitals", "--parallel", "0"], "--parallel must be at least 1"),
        (["tiny.toml", "--seeds", "0"], "belong in the grid's file"),
        ([], "Missing argument"),
    ],
)
def test_bad_grids_are_one_line_before_any_work(
    words: list[str],
    said: str,
    stand: Stand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    declared(tmp_path)
    assert typed(words, tmp_path, monkeypatch) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fedsynth: bad input")]
    assert said in line
    assert not (tmp_path / "runs").exists()
    assert (stand.checked, stand.ran) == ([], [])


def test_what_failed_is_continued_and_the_rest_is_not_run_again(stand: Stand, tmp_path: Path) -> None:
    stand.grid = declared(tmp_path, GRID.replace("[0, 1]", "[0]"))
    stand.failing = {"notes-eps2"}
    out = tmp_path / "out"
    with pytest.raises(LaunchFailed, match=r"1 of 3 runs did not complete.*notes-eps2: no more clients"):
        compare(stand.grid, out)
    assert stand.ran == ["notes-any", "notes-eps2", "notes-eps8"]  # a failure does not keep the rest from running
    with pytest.raises(BadValue, match="no completed comparison"):
        read(out)
    stand.failing, warnings = set(), list[str]()
    done = compare(stand.grid, out, on_warning=warnings.append)
    assert len(stand.ran) == 3
    assert stand.resumed == ["notes-eps2"]
    assert warnings == ["a warning"]
    assert set(done.frame["epsilon"].dropna()) == {2.0, 8.0}
    # A further epsilon is one more run.
    more = replace(stand.grid, epsilons=(2.0, 4.0, 8.0), baseline="main")
    compare(more, out)
    assert stand.ran[3:] == ["notes-eps4"]
    with pytest.raises(BadValue, match=r"another comparison \(seeds \[0\] there, \[0, 1\] now\)"):
        compare(replace(more, seeds=(0, 1)), out)
    # A run that is not the grid's: the scenario's file was edited.
    (tmp_path / "notes.toml").write_text((tmp_path / "notes.toml").read_text().replace("steps = 3", "steps = 4"))
    with pytest.raises(BadValue, match="holds a run of another scenario than 'notes' is now"):
        compare(more, out)


def test_own_budgets_stand_in_one_run(stand: Stand, tmp_path: Path) -> None:
    text = GRID.replace("epsilons = [8.0, 2.0]", "").replace("[0, 1]", "[0]")
    stand.grid = declared(tmp_path, text.replace('["local", "main"]', '["local", "main", "no_dp", "pooled"]'))
    done = compare(stand.grid, tmp_path / "out")
    assert stand.ran == ["notes-own"]
    budgets = done.frame.groupby("arm")["epsilon"].first().to_dict()
    assert budgets["main"] == 8.0
    costs = {row["arm"]: row for row in done.tables["tables"]["instructions"]["costs"]}
    assert {arm for arm, row in costs.items() if row["guarantee"] == "none"} == {"no_dp", "pooled"}
    assert [arm for arm, row in costs.items() if row["pooled"]] == ["pooled"]
    levels = {r["arm"]: r for r in done.tables["tables"]["instructions"]["utility"] if r["metric"] == "rouge_l"}
    assert levels["pooled"]["difference"] is None
    assert levels["no_dp"]["difference"] is not None


def test_everything_is_checked_before_anything_runs(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(scenario: Scenario) -> list[str]:
        if scenario.client.budget is not None and scenario.client.budget.epsilon == 8.0 and "main" in scenario.run:
            raise BadValue("the budget is too small")
        return []

    monkeypatch.setattr(simulate, "check", check)
    with pytest.raises(BadValue, match="notes-eps8: the budget is too small"):
        compare(declared(tmp_path), tmp_path / "out")
    assert stand.ran == []
    monkeypatch.setattr(simulate, "check", stand.check)
    found = compare(declared(tmp_path, GRID.replace("[8.0, 2.0]", "[4]")), tmp_path / "out")  # nothing is in its way
    assert found.grid.epsilons == (4.0,)


@pytest.mark.parametrize("there", ["a directory of something else", "a file"])
def test_what_is_no_comparison_is_never_written_into(there: str, stand: Stand, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    with pytest.raises(BadValue, match="--out"):
        compare(declared(tmp_path), out)
    assert stand.ran == []


def test_two_comparisons_do_not_share_a_directory(stand: Stand, tmp_path: Path) -> None:
    grid, out = declared(tmp_path), tmp_path / "out"
    with comparison._alone(out), pytest.raises(BadValue, match="another comparison is at work"):
        compare(grid, out)


@pytest.mark.parametrize(
    ("scenario", "arms"),
    [
        ("hospitals", {"local": False, "no_demonstrations": False, "dp_only": True, "fdkt": True, "no_dp": False}),
        ("hospitals-crosslm", {"crosslm": False, "zerogen": False, "local": False, "dp_scores": True}),
        (
            "hospitals-knowledgesg",
            {"base": False, "public_instructions": False, "own_responses": True, "ffa_lora": True},
        ),
        ("hospitals-fedpit", {"fedpit": False, "base": False}),
    ],
)
def test_which_arms_depend_on_epsilon(scenario: str, arms: dict[str, bool]) -> None:
    from fedsynth.scenario.toml import load

    found = cells(replace(load(scenario), run=tuple(arms)))
    assert {cell.arm: depends_on_epsilon(cell) for cell in found} == arms


def test_a_method_that_spends_against_its_word_is_found_out(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsynth.strategies.lora_avg import LoraAverage

    monkeypatch.setattr(LoraAverage, "spends", classmethod(lambda cls, config: False))
    with pytest.raises(RuntimeError, match="says that it spends nothing, and spent epsilon"):
        compare(declared(tmp_path, GRID.replace("[0, 1]", "[0]")), tmp_path / "out")


@pytest.mark.parametrize(
    ("room", "workers", "parallel", "expected"),
    [
        (2, None, None, (1, 2)),  # two cores, three clients: one run has them all
        (12, None, None, (3, 3)),  # twelve cores: as many runs as there are, though four would fit
        (12, 1, None, (3, 1)),
        (12, None, 2, (2, 3)),  # more workers than clients are of no use
        (1, None, 2, (2, 1)),
    ],
)
def test_runs_stand_side_by_side_where_there_is_room(
    room: int,
    workers: int | None,
    parallel: int | None,
    expected: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulate, "concurrency", lambda asked, clients: (min(room, clients), ""))
    monkeypatch.setattr(comparison, "gpus", lambda: 0)
    assert shares(parts(declared(tmp_path)), workers, parallel) == expected


def test_runs_side_by_side_meet_and_tell_how_they_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_child", meeting_child)
    todo, events = parts(declared(tmp_path)), list[dict[str, Any]]()
    told = comparison._Told(events.append, None, [part.name for part in todo])
    failed = comparison._side_by_side(todo, tmp_path / "out", dict.fromkeys((p.name for p in todo), "new"), 3, 1, told)
    assert failed == {"notes-eps8": "no more clients", "notes-eps2": "its process died (exit code 3)"}
    assert {e["run"]: e["state"] for e in events} == {"notes-any": "done", **dict.fromkeys(failed, "failed")}
    assert multiprocessing.active_children() == []


def test_runs_side_by_side_end_with_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_child", meeting_child)

    def interrupted(_: object) -> list[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.connection, "wait", interrupted)
    todo = parts(declared(tmp_path))
    told = comparison._Told(None, None, [part.name for part in todo])
    with pytest.raises(KeyboardInterrupt):
        comparison._side_by_side(todo, tmp_path / "out", dict.fromkeys((p.name for p in todo), "new"), 2, 1, told)
    assert multiprocessing.active_children() == []


# The page


def shown(text: str, value: float) -> bool:
    """Whether a text is a number's, as far as its digits go; a bound may be rounded up."""
    digits = len(text.partition(".")[2])
    return text in {f"{value:.{digits}f}", f"{value:+.{digits}f}", f"{up(value, digits):.{digits}f}", f"{value:g}"}


def test_every_number_of_the_page_stands_in_its_table(
    made: tuple[Grid, Path, Stand, list[dict[str, Any]]], tmp_path: Path
) -> None:
    _, out, _, _ = made
    path, report = comparison_page.write(out, tmp_path / "page.html")
    html = path.read_text()
    assert len(html) < 3_000_000
    table = pd.read_parquet(tmp_path / "page.parquet")
    root = ElementTree.fromstring(html.partition("\n")[2] if html.startswith("<!DOCTYPE") else html)
    seen = set()
    for element in root.iter():
        if "data-row" in element.attrib and (text := element.attrib.get("data-value") or element.text):
            row = table.iloc[int(element.attrib["data-row"])]
            assert shown(text, float(row["value"])), (text, dict(row))
            seen.add((row["part"].partition(":")[0], row["statistic"]))
    assert {
        ("utility", "mean"),
        ("utility", "low"),
        ("utility", "difference"),
        ("cost", "total"),
        ("point", "utility"),
    } <= seen
    for cell in (e for e in root.iter() if e.tag.endswith("td")):
        bare = "".join(e.text or "" for e in cell.iter() if "data-row" not in e.attrib)
        assert not re.search(r"\d\.\d", bare + "".join(e.tail or "" for e in cell.iter())), bare
    # What the page's table holds is what the comparison's says.
    [main] = [
        r
        for r in report["tables"]["instructions"]["utility"]
        if (r["arm"], r["epsilon"], r["metric"]) == ("main", 8.0, "rouge_l")
    ]
    own = table[
        (table["part"] == "utility: notes, epsilon 8") & (table["metric"] == "rouge_l") & (table["arm"] == "main")
    ]
    for place, each in enumerate(report["verdicts"]):  # of every budget, each number with its row
        assert each["sentences"] == [one["words"].format(**one["numbers"]) for one in each["statements"]]
        rows = table[(table["part"] == "verdict") & table["metric"].str.startswith(f"{place}/")]
        assert len(rows) == sum(len(one["numbers"]) for one in each["statements"]) > 0
    assert {each["epsilon"] for each in report["verdicts"] if each["scenario"] == "notes"} >= {2.0, 8.0}
    figures = own.set_index("statistic")["value"]
    assert (figures["mean"], figures["difference"]) == (main["mean"], main["difference"])
    assert json.loads((tmp_path / "page.json").read_text())["rows"] == report["rows"]
    assert render(comparison_page.page(json.loads((tmp_path / "page.json").read_text()), "page.parquet")) == html


def test_the_page_names_who_has_no_guarantee_and_who_is_on_the_front(
    made: tuple[Grid, Path, Stand, list[dict[str, Any]]], tmp_path: Path
) -> None:
    _, out, _, _ = made
    _, report = comparison_page.write(out, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "2 seeds." in html
    for point in report["points"]:
        if point["pareto_epsilon"]:
            assert point["arm"] in html.partition("notes, on the front by epsilon:")[2][:400]
    with pytest.raises(BadValue, match=r"must name an \.html file"):
        comparison_page.write(out, tmp_path / "page.txt")
    with pytest.raises(BadValue, match="no completed comparison"):
        comparison_page.write(tmp_path / "none")
