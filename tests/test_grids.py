"""What a grid may say, and what is refused before any work."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fedsynth.comparison.grids import (
    Entry,
    Grid,
    asked_for,
    at_epsilon,
    is_grid,
    read_grid,
    refuse_another,
    scenario_of,
    to_toml,
)
from fedsynth.scenario.toml import cells, load
from fedsynth.typed import BadValue

ROOT = Path(__file__).parent.parent
SMALL = """
name = "small"
epsilons = [2, 8.0]
seeds = [0, 1]
baseline = "local"

[scenarios.hospitals]
arms = ["local", "fdkt", "fdkt_epsilon2"]
set = ["data.clients=4"]

[scenarios.answers]
use = "hospitals-knowledgesg"
metric = "rouge_l"
"""


def grid(tmp_path: Path, text: str = SMALL) -> Grid:
    path = tmp_path / "small.toml"
    path.write_text(text)
    return read_grid(path)


def test_what_is_left_out_is_filled_in(tmp_path: Path) -> None:
    found = grid(tmp_path)
    assert found.epsilons == (2.0, 8.0)
    first, second = found.scenarios["hospitals"], found.scenarios["answers"]
    assert first == Entry("hospitals", ("local", "fdkt", "fdkt_epsilon2"), "local", "accuracy", ("data.clients=4",))
    assert second == Entry(
        "hospitals-knowledgesg", ("local", "public_instructions", "own_responses", "knowledge_sg"), "local", "rouge_l"
    )


def test_a_resolved_grid_reads_back(tmp_path: Path) -> None:
    found = grid(tmp_path)
    assert grid(tmp_path, to_toml(found)) == found


def test_the_scenario_has_the_entrys_arms_overrides_and_seeds(tmp_path: Path) -> None:
    found = grid(tmp_path)
    scenario = scenario_of(found.scenarios["hospitals"], found.seeds)
    assert scenario.data.clients == 4
    assert [(c.arm, c.seed) for c in cells(scenario)] == [
        (arm, seed) for seed in (0, 1) for arm in ("local", "fdkt", "fdkt_epsilon2")
    ]


def test_a_scenarios_file_stands_beside_the_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "simulations" / "scenarios" / "hospitals.toml").read_text()
    (tmp_path / "own.toml").write_text(text)
    monkeypatch.chdir(ROOT)
    found = grid(tmp_path, 'seeds = [0]\n[scenarios.own]\nuse = "own.toml"\n')
    assert found.name == "small"  # the file's
    assert found.scenarios["own"].use == str(tmp_path / "own.toml")


def test_an_epsilon_reaches_the_arms_that_have_budgets_of_their_own() -> None:
    scenario = replace(load("hospitals"), run=("fdkt", "fdkt_epsilon2", "no_dp"))
    budgets = {c.arm: c.scenario.client.budget for c in cells(at_epsilon(scenario, 0.5))}
    assert {arm: b.epsilon for arm, b in budgets.items() if b} == {"fdkt": 0.5, "fdkt_epsilon2": 0.5, "no_dp": 0.5}
    assert all(b is not None and b.delta == 1e-5 for b in budgets.values())
    assert scenario.arms["fdkt_epsilon2"] == {"client": {"budget": {"epsilon": 2.0}}}  # the original is as it was


def test_the_command_line_says_the_same_as_a_file() -> None:
    found = asked_for(
        ["hospitals", "hospitals-knowledgesg"],
        epsilons="2, 8",
        seeds="0,1",
        arms="",
        baseline="local",
        sets=["data.clients=2"],
    )
    assert found.name == "hospitals-hospitals-knowledgesg"
    assert (found.seeds, found.epsilons) == ((0, 1), (2.0, 8.0))
    assert {entry.baseline for entry in found.scenarios.values()} == {"local"}
    assert {entry.set for entry in found.scenarios.values()} == {("data.clients=2",)}


def test_without_a_baseline_the_first_arm_is_one() -> None:
    found = asked_for(["hospitals-fedpit"], epsilons="", seeds="0", arms="", baseline="", sets=[])
    assert found.scenarios["hospitals-fedpit"].baseline == "fedpit"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds = [0, 1]", "seeds = []", "seeds must be distinct whole numbers >= 0, at least one, got []"),
        ("seeds = [0, 1]", "", "key 'seeds' is missing"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "distinct"),
        ("seeds = [0, 1]", "seeds = [0.5]", "seeds[0] must be a whole number, got 0.5"),
        ("epsilons = [2, 8.0]", "epsilons = [0]", "above 0, got [0.0]"),
        ("epsilons = [2, 8.0]", "epsilons = [inf]", "finite"),
        ("epsilons = [2, 8.0]", "epsilon = [2]", "unknown key 'epsilon'; did you mean 'epsilons'?"),
        (
            'baseline = "local"',
            'baseline = "lokal"',
            "[scenarios.hospitals] the baseline 'lokal' is not among the arms",
        ),
        ('"fdkt_epsilon2"]', '"fdtk"]', "[scenarios.hospitals] run names the arm 'fdtk'"),
        ('"fdkt_epsilon2"]', '"fdkt"]', "twice"),
        ("[scenarios.hospitals]", "[scenarios.hospital]", "[scenarios.hospital] no scenario 'hospital'"),
        ("[scenarios.hospitals]", '[scenarios."a/b"]', "the name 'a/b' becomes a directory's"),
        ('metric = "rouge_l"', 'metric = "accuracy"', "metric must be one of exact_match, field_match, rouge_l"),
        ('set = ["data.clients=4"]', 'set = ["data.client=4"]', "did you mean 'clients'"),
        ('set = ["data.clients=4"]', "sets = []", "unknown key 'sets' in [scenarios.hospitals]"),
        ('name = "small"', "name = small", "not TOML"),
    ],
)
def test_a_bad_grid_is_refused_with_the_place_and_the_reason(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in SMALL
    with pytest.raises(BadValue) as refused:
        grid(tmp_path, SMALL.replace(old, new))
    assert said in str(refused.value)
    assert "small.toml" in str(refused.value)


def test_a_grid_without_scenarios_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="has no scenarios"):
        grid(tmp_path, "seeds = [0]\nscenarios = {}\n")
    with pytest.raises(BadValue, match="cannot be read: No such file"):
        read_grid(tmp_path / "nowhere.toml")


def test_a_scenario_without_arms_has_itself_as_one(tmp_path: Path) -> None:
    text = (ROOT / "simulations" / "scenarios" / "hospitals.toml").read_text()
    own = text.split("[quick]")[0].replace('run = ["local", "no_demonstrations", "dp_only", "fdkt"]', "")
    (tmp_path / "own.toml").write_text(own)
    found = grid(tmp_path, 'seeds = [0]\n[scenarios.own]\nuse = "own.toml"\n')
    assert found.scenarios["own"].arms == ("fdkt",)
    assert scenario_of(found.scenarios["own"], (0,)).run == ()
    with pytest.raises(BadValue, match="no arms but itself, 'fdkt'"):
        grid(tmp_path, 'seeds = [0]\n[scenarios.own]\nuse = "own.toml"\narms = ["local"]\n')


@pytest.mark.parametrize("seeds", ["a", "1.5", "0;1"])
def test_numbers_on_the_command_line_are_numbers(seeds: str) -> None:
    with pytest.raises(BadValue, match="--seeds must be numbers"):
        asked_for(["hospitals"], epsilons="", seeds=seeds, arms="", baseline="", sets=[])


def test_two_scenarios_of_one_name_need_a_file() -> None:
    with pytest.raises(BadValue, match="two scenarios of one name"):
        asked_for(["hospitals", "hospitals"], epsilons="", seeds="0", arms="", baseline="", sets=[])


def test_a_grids_file_is_told_from_a_scenarios(tmp_path: Path) -> None:
    grid(tmp_path)
    assert is_grid(tmp_path / "small.toml")
    assert not is_grid(ROOT / "simulations" / "scenarios" / "hospitals.toml")
    assert not is_grid(tmp_path / "nowhere.toml")


def test_epsilons_and_scenarios_may_be_added_and_baselines_changed(tmp_path: Path) -> None:
    old = grid(tmp_path)
    one = replace(old, scenarios={"hospitals": old.scenarios["hospitals"]}, epsilons=(2.0,))
    refuse_another(one, old, "there")
    entry = replace(old.scenarios["hospitals"], baseline="fdkt", metric="macro_f1")
    refuse_another(old, replace(old, scenarios={**old.scenarios, "hospitals": entry}), "there")


def test_what_changes_a_run_makes_another_comparison(tmp_path: Path) -> None:
    old = grid(tmp_path)
    entry = old.scenarios["hospitals"]
    changes = {
        "seeds [0, 1] there, [0, 1, 2] now": replace(old, seeds=(0, 1, 2)),
        "epsilons [2.0, 8.0] there, [2.0] now": replace(old, epsilons=(2.0,)),
        "epsilons [2.0, 8.0] there, [] now": replace(old, epsilons=()),
        "the scenario 'answers' is missing": replace(old, scenarios={"hospitals": entry}),
        "scenarios.hospitals.arms": replace(
            old, scenarios={**old.scenarios, "hospitals": replace(entry, arms=("local",))}
        ),
        "scenarios.hospitals.set": replace(old, scenarios={**old.scenarios, "hospitals": replace(entry, set=())}),
    }
    for said, new in changes.items():
        with pytest.raises(BadValue) as refused:
            refuse_another(old, new, "there")
        assert said in str(refused.value)
        assert "--out" in str(refused.value)
    with pytest.raises(BadValue, match=r"epsilons \[\] there"):
        refuse_another(replace(old, epsilons=()), old, "there")


@pytest.mark.parametrize("path", sorted((ROOT / "simulations" / "comparisons").glob("*.toml")), ids=lambda p: p.stem)
def test_every_grid_of_the_repository_reads(path: Path) -> None:
    assert read_grid(path).name == path.stem


def test_the_pages_grid_reads(tmp_path: Path) -> None:
    [text] = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "docs" / "compare.md").read_text(), re.DOTALL | re.MULTILINE)
    found = grid(tmp_path, text)
    assert list(found.scenarios) == ["hospitals", "few-notes", "answers"]
    assert scenario_of(found.scenarios["few-notes"], found.seeds).data.train_per_client == 50
