"""What the docs tell people to type works."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import house
import pytest
from inprocess import play

import fedsynth.cli.main
from fedsynth.federation.messages import Learn
from fedsynth.federation.strategy import load_strategy
from fedsynth.privacy.plan import Budget
from fedsynth.scenario.keys import keys, page
from fedsynth.scenario.schema import Scenario, StrategyChoice
from fedsynth.scenario.toml import cells, from_toml, load, shipped_scenarios, to_toml
from fedsynth.testing import ScriptedLLM

ROOT = Path(__file__).parent.parent
FEDSYNTH = [sys.executable, "-m", "fedsynth.cli.main"]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return fenced(page.read_text(), language)


def run(words: list[str], place: Path, seconds: int = 280) -> str:
    done = subprocess.run(
        words, cwd=place, capture_output=True, text=True, timeout=seconds, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_the_tutorial_goes_from_a_file_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "tutorial.md"
    [script] = blocks(page, "python")
    [scenario], [lines] = blocks(page, "toml"), blocks(page, "bash")
    run([sys.executable, "-c", script], tmp_path)
    monkeypatch.delenv("FEDSYNTH_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a newcomer has no models
    assert [line.split()[1] for line in lines.splitlines()] == ["init", "check", "run"]
    for line in lines.splitlines():
        said = run([*FEDSYNTH, *shlex.split(line)[1:]], tmp_path)
    assert len(scenario.splitlines()) <= 20
    assert set(from_toml(scenario).data.labels) == set(load(tmp_path / "tickets.toml").data.labels)
    assert "fdkt" in said
    named = set(re.findall(r"`([a-z_]+\.(?:toml|json|parquet|jsonl))`", page.read_text())) - {"tickets.toml"}
    named -= {"egress.json", "egress.jsonl"}  # of an endpoint, which this run has not
    assert {"summary.json", "metrics.parquet"} <= named
    assert named <= {p.name for p in (tmp_path / "runs" / "tickets").iterdir()}


REAL = ("smollm2-135m-instruct", "all-minilm-l6-v2")
STORED = Path(os.environ.get("FEDSYNTH_MODELS", ""))
MINUTES = 5  # of CPU, on one core: what a newcomer waits


def walk_through() -> tuple[str, str, list[list[str]]]:
    """Of the page on real models, from a file to a table: the script, the scenario, the words of each command."""
    text = (ROOT / "docs" / "real-models.md").read_text()
    section = text.partition("## From a CSV file to a table\n")[2].partition("\n## ")[0]
    ([script], [scenario]), lines = (fenced(section, kind) for kind in ("python", "toml")), fenced(section, "bash")
    return script, scenario, [shlex.split(line)[1:] for block in lines for line in block.splitlines()]


def test_the_way_from_a_file_to_a_table_has_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, scenario, lines = walk_through()
    assert [line[0] for line in lines] == ["card", "check", "run", "report"]
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    asked = from_toml(scenario)
    assert {cell.arm for cell in cells(asked)} == {"local", "no_demonstrations", "fdkt"}
    rows = Path("messages.csv").read_text().splitlines()[1:]
    assert set(asked.task.labels) == set(asked.data.labels) == {row.rpartition(",")[2] for row in rows}
    assert asked.client.generator_training.max_physical_batch_size <= 8  # the self-check of a large one takes minutes


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not all((STORED / name / "config.json").is_file() for name in REAL), reason="no real weights")
def test_a_newcomer_goes_from_a_file_to_a_table_with_real_models(tmp_path: Path) -> None:
    script, scenario, lines = walk_through()
    took = dict[str, float]()

    def typed(line: list[str]) -> str:
        """What a command prints; its CPU time is kept: beside other work the clock runs on."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        said = run([*FEDSYNTH, *line], tmp_path, seconds=1800)
        took[line[0]] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        return said

    run([sys.executable, "-c", script], tmp_path)
    (tmp_path / "messages.toml").write_text(scenario)
    proposed, foreseen, said, _ = map(typed, lines)
    assert set(tomllib.loads(proposed)["task"]["labels"]) == set(load(str(tmp_path / "messages.toml")).data.labels)
    for arm in ("local", "no_demonstrations", "fdkt"):
        assert arm in foreseen
        assert re.search(rf"^\W*{arm}\b.*0\.\d\d\d", said, re.MULTILINE)
    report = json.loads((tmp_path / "runs" / "messages" / "report.json").read_text())
    shown = {(each["arm"], each["kind"]) for each in report["examples"]}
    assert {("fdkt", "drafts"), ("fdkt", "written"), ("no_demonstrations", "written")} <= shown
    print("CPU seconds:", {name: round(seconds) for name, seconds in took.items()}, foreseen, said)
    assert sum(took.values()) < MINUTES * 60


@pytest.mark.full
def test_the_strategy_of_the_docs_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page_ = ROOT / "docs" / "your-own-strategy.md"
    [code], [scenario] = blocks(page_, "python"), blocks(page_, "toml")
    assert len(code.splitlines()) <= 60
    run([sys.executable, "-c", blocks(ROOT / "docs" / "tutorial.md", "python")[0]], tmp_path)
    (tmp_path / "continued.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    [line] = blocks(page_, "bash")
    assert line.startswith("fedsynth run mine.toml")
    Path("mine.toml").write_text(scenario)
    played = play(
        to_toml(load("mine.toml")), tmp_path, "continued", llm=ScriptedLLM(answer=lambda prompt: " goes on well")
    )
    assert played.metric("accuracy")
    [written] = played.metric("texts/written")
    assert 0 < written <= 4 * 5 * 10
    assert {len(o.corpus.grants) for o in played.requests(Learn)} == {4}  # of all clients
    assert {cell.arm for cell in cells(from_toml(scenario))} == {"local", "continued"}


def test_a_round_of_the_docs_needs_no_flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page_ = ROOT / "docs" / "your-own-strategy.md"
    [code], [session] = blocks(page_, "python"), blocks(page_, "pycon")
    (tmp_path / "continued.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "continued", raising=False)
    examples = doctest.DocTestParser().get_doctest(session, {}, page_.name, str(page_), 0)
    assert len(examples.examples) >= 8
    assert doctest.DocTestRunner().run(examples).failed == 0
    monkeypatch.delitem(sys.modules, "continued")


@pytest.mark.parametrize("module", ["corpus", "instructions", "lora", "rouge", "typed"])
def test_examples_of_the_base_are_true(module: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(f"fedsynth.{module}"))
    assert not failed
    assert attempted


def strategies() -> list[Any]:
    """The classes that the shipped scenarios name."""
    named = {cell.scenario.strategy.use for path in shipped_scenarios() for cell in cells(load(path))}
    return [load_strategy(StrategyChoice(use))[0] for use in sorted(named)]


def has_option(kind: Any, names: Sequence[str]) -> bool:
    for name in names:
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in hints:
            return False
        kind = hints[name]
    return True


def exists(dotted: str) -> bool:
    """Whether a name stands in `fedsynth`, in its strategies' options (`strategy.`), or among a scenario's keys."""
    parts = dotted.split(".")
    if parts[0] == "strategy":
        return any(has_option(strategy.config_class, parts[1:]) for strategy in strategies())
    if any(f"{key.name}.".startswith(f"{dotted}.") for key in keys()):  # a key, or a table
        return True
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(["fedsynth", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name, None)
        return found is not None
    return False


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda p: p.stem)
def test_what_a_method_names_is_there(path: Path) -> None:
    named = re.findall(r"`([a-z_]+(?:\.\w+)+)(?:[ (][^`]*)?`", path.read_text())
    assert named
    assert [each for each in named if not exists(each)] == []


def test_a_name_that_moved_is_found() -> None:
    assert exists("synthesis.judges.judge_by_instruction")
    assert exists("client.guarantee")
    assert not exists("teacher.judge_by_instruction")
    assert not exists("synthesis.judges.judge_by")
    assert not exists("client.guaranty")
    assert exists("strategy.teaching.guard")
    assert not exists("strategy.teaching.guarded")


def test_the_page_of_keys_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "scenario.md").read_text() == page(), "fedsynth scenarios --keys > docs/scenario.md"
    named = {key.name: key for key in keys()}
    assert named["server.quorum"].default == "1.0"
    assert named["data.source"].default == "-"
    assert named["client.guarantee"].kind == '"dp" or "none"'
    assert not [key.name for key in named.values() if not key.meaning]


def test_the_map_of_the_house_is_what_the_files_say() -> None:
    assert house.PAGE.read_text() == house.written(), "run: python tests/house.py"
    assert all(house.first_line(path) for wing in house.WINGS for path in (ROOT / wing).rglob("*.py"))


def test_the_readmes_commands_exist() -> None:
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert set(targets) == {"run", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_readmes_runs_ask_for_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        x for b in blocks(ROOT / "README.md", "bash") for x in b.splitlines() if x.startswith("fedsynth run hospitals")
    ]
    asked: list[Scenario] = []

    def stop(found: Scenario, **_: object) -> None:
        asked.append(found)
        raise KeyboardInterrupt

    monkeypatch.setattr("fedsynth.simulation.simulate.run", stop)
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with pytest.raises(SystemExit):
            fedsynth.cli.main.main()
    quick, found = asked
    assert (quick.data.clients, [cell.arm for cell in cells(quick)]) == (2, ["local", "fdkt"])
    assert {(cell.arm, cell.seed) for cell in cells(found)} == {(a, s) for a in ("local", "fdkt") for s in (0, 1, 2)}
    assert {cell.scenario.client.budget for cell in cells(found)} == {Budget(2.0)}


def test_the_readmes_list_of_scenarios() -> None:
    assert run([*FEDSYNTH, "scenarios"], ROOT).split() == [p.stem for p in shipped_scenarios()]


@pytest.mark.parametrize("path", list(shipped_scenarios()), ids=lambda p: p.stem)
def test_every_shipped_scenario_loads(path: Path) -> None:
    assert load(path).name == path.stem


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def named_tests(page: Path) -> set[tuple[str, str]]:
    """The tests that a page names, as `test_x.py::test_y`, or `::test_z` of the file before it."""
    found, file = set(), ""
    for name, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", page.read_text()):
        file = name or file
        if test:
            found.add((file, test))
    return found


@pytest.mark.parametrize("name", ["pitfalls.md", "privacy.md"])
def test_every_test_that_a_page_on_privacy_names_is_there(name: str) -> None:
    named = named_tests(ROOT / "docs" / name)
    assert len(named) > 3
    there = {
        (path.name, test)
        for path in (ROOT / "tests").glob("test_*.py")
        for test in re.findall(r"\bdef (test_\w+)", path.read_text())
    }
    assert named - there == set()


def test_every_row_of_the_pitfalls_has_a_grade() -> None:
    rows = [line for line in (ROOT / "docs" / "pitfalls.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not line.startswith("| pitfall |")]
    assert len(rows) > 40
    for row in rows:
        cells_ = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells_) == 4, row
        assert re.match(r"refused|stated|yours", cells_[2]), row
        if cells_[2].startswith("refused") and "none is claimed" not in row:
            assert "::test_" in row or "](" in row, row
