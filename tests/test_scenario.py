from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedsynth.federation.strategy import load_strategy
from fedsynth.privacy.plan import Budget
from fedsynth.scenario.client import Client, GeneratorTraining, TaskTraining
from fedsynth.scenario.data import Data
from fedsynth.scenario.schema import Cell, Scenario, StrategyChoice
from fedsynth.scenario.server import Server
from fedsynth.scenario.toml import cells, from_toml, load, shipped_scenarios, to_toml
from fedsynth.simulation.simulate import concurrency
from fedsynth.typed import BadValue

FDKT, LOCAL = "fedsynth.strategies.fdkt:FDKT", "fedsynth.strategies.local:LocalOnly"
TEXT = f"""
name = "two"
seeds = [4, 2]
[strategy]
use = "{FDKT}"
per_label = 3
shots = 2
[data]
source = "notes.csv"
clients = 2
labels = ["flu", "asthma"]
test = {{ column = "part", equals = "test" }}
[client]
generator = "assets:tiny-slm"
task_model = "assets:tiny-slm"
budget = {{ epsilon = 8.0 }}
generator_training = {{ steps = 5 }}
[server]
llm = "assets:tiny-llm"
[arms.local]
strategy.use = "{LOCAL}"
[arms.few]
strategy.shots = 1
client.budget.epsilon = 2.0
client.generator_training.rank = 4
[arms.all]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(TEXT)
    return path


def test_a_file_becomes_typed_values(file: Path) -> None:
    scenario = load(file)
    assert scenario.strategy == StrategyChoice(FDKT, {"per_label": 3, "shots": 2})
    assert scenario.data.labels == ("flu", "asthma")
    assert scenario.client.budget == Budget(8.0, 1e-5)
    assert scenario.client.generator_training == GeneratorTraining(steps=5)
    assert scenario.client.task_training == TaskTraining()
    assert scenario.server == Server("assets:tiny-llm")
    assert scenario.seeds == (4, 2)


def test_cells_are_every_arm_under_every_seed_resolved(file: Path) -> None:
    found = cells(load(file))
    assert [(c.arm, c.seed) for c in found] == [(a, s) for s in (4, 2) for a in ("local", "few", "all")]
    few = found[1].scenario
    assert few.client.budget == Budget(2.0, 1e-5)  # the delta beside it stays
    assert few.client.generator_training == GeneratorTraining(steps=5, rank=4)
    assert few.strategy.options == {"per_label": 3, "shots": 1}
    assert few.arms == {}
    assert found[2].scenario == replace(load(file), arms={})


def test_another_strategy_drops_the_options_of_the_old_one(file: Path) -> None:
    local = cells(load(file))[0].scenario
    assert local.strategy == StrategyChoice(LOCAL, {})
    same = cells(from_toml(TEXT.replace("strategy.shots = 1", f'strategy = {{ use = "{FDKT}", shots = 1 }}')))[1]
    assert same.scenario.strategy.options == {"per_label": 3, "shots": 1}  # the same strategy keeps them


def test_run_names_the_arms_that_run(file: Path) -> None:
    found = cells(load(file, ['run = ["few"]']))
    assert [(c.arm, c.seed) for c in found] == [("few", 4), ("few", 2)]


QUICK = """
[quick]
run = ["few"]
data.clients = 1
strategy.shots = 3
"""


def test_a_quick_run_is_the_scenario_with_its_own_overrides_and_nothing_else(file: Path) -> None:
    file.write_text(TEXT + QUICK)
    whole, small = load(file), load(file, quick=True)
    assert replace(whole, quick={}) == from_toml(TEXT)  # unasked for, it changes nothing
    assert small == replace(
        from_toml(TEXT),
        run=("few",),
        data=replace(whole.data, clients=1),
        strategy=replace(whole.strategy, options={"per_label": 3, "shots": 3}),
    )
    assert [c.scenario.strategy.options["shots"] for c in cells(small)] == [1, 1]  # an arm's own key stays above
    assert load(file, ["strategy.shots=7"], quick=True).strategy.options["shots"] == 7
    assert from_toml(to_toml(whole)) == whole


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[quick]\nseeds = [1]", "'seeds' belongs to the whole scenario, `quick` cannot override it"),
        ("[quick]\ndata.clents = 1", "[quick] unknown key 'clents' in [data]; did you mean 'clients'?"),
        ('[quick]\nrun = ["more"]', "[quick] run names the arm 'more'"),
        ("[arms.few.quick]\nrun = []", "'quick' belongs to the whole scenario, an arm cannot override it"),
    ],
)
def test_a_quick_run_is_checked_when_the_scenario_is_read(file: Path, table: str, said: str) -> None:
    file.write_text(f"{TEXT}\n{table}\n")
    with pytest.raises(BadValue) as caught:
        load(file)
    assert said in str(caught.value)


def test_a_scenario_without_a_quick_run_says_so(file: Path) -> None:
    with pytest.raises(BadValue, match=r"--quick: the scenario has no \[quick\] table"):
        load(file, quick=True)


def test_without_arms_the_cell_is_named_after_its_strategy() -> None:
    [first, second] = cells(from_toml(TEXT.partition("[arms.local]")[0]))
    assert (first.arm, first.seed, second.seed) == ("fdkt", 4, 2)


def test_sets_override_by_dotted_key_in_toml_or_bare_text(file: Path) -> None:
    scenario = load(
        file,
        [
            "client.budget.epsilon=0.5",
            "seeds = [9]",
            "data.source=other notes.csv",
            "data.pooled=true",
            'name="quoted"',
            "strategy.per_label=7",
            "data.labels=all",
        ],
    )
    assert scenario.client.budget == Budget(0.5)
    assert scenario.seeds == (9,)
    assert (scenario.data.source, scenario.data.pooled, scenario.data.labels) == ("other notes.csv", True, "all")
    assert scenario.name == "quoted"
    assert scenario.strategy.options == {"per_label": 7, "shots": 2}
    assert load(file, [f"strategy.use={LOCAL}", "strategy.shots=1"]).strategy == StrategyChoice(LOCAL, {"shots": 1})


@pytest.mark.parametrize("item", ["client.budget.epsilon", "=3", " = 3"])
def test_a_set_without_key_or_value_is_refused(file: Path, item: str) -> None:
    with pytest.raises(BadValue, match="--set needs key=value"):
        load(file, [item])


def test_a_set_that_is_no_toml_key_is_refused(file: Path) -> None:
    with pytest.raises(BadValue, match=r"--set 'a b=1': 'a b' is no TOML key"):
        load(file, ["a b=1"])


def test_what_an_earlier_version_wrote_where_nobody_had_set_it_is_read(file: Path) -> None:
    text = to_toml(load(file))
    tree = tomllib.loads(text)
    tree["client"]["task_training"]["continued_rate"] = 1.0
    tree.setdefault("participation", {})["speed_tiers"] = []
    tree["arms"] = {"old": {"client": {"task_training": {"continued_rate": 1.0}}}}
    read = from_toml(tomli_w.dumps(tree))
    assert replace(read, arms={}) == replace(from_toml(text), arms={})
    assert "continued_rate" not in to_toml(read)
    tree["arms"]["old"]["client"]["task_training"]["continued_rate"] = 0.5
    with pytest.raises(BadValue, match=r"continued_rate is gone"):
        from_toml(tomli_w.dumps(tree))


def test_toml_comes_back(file: Path) -> None:
    scenario = load(file)
    assert from_toml(to_toml(scenario)) == scenario
    for cell in cells(scenario):
        assert from_toml(to_toml(cell.scenario)) == cell.scenario


# Errors


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds =", "sedes =", "unknown key 'sedes'; did you mean 'seeds'?"),
        ("clients = 2", "client = 2", "unknown key 'client' in [data]; did you mean 'clients'?"),
        ("[server]", "[servers]", "unknown key 'servers'; did you mean 'server'?"),
        ("{ steps = 5 }", "{ step = 5 }", "in [client.generator_training]; did you mean 'steps'?"),
        ("{ epsilon = 8.0 }", "{ epsilom = 8.0 }", "in [client.budget]; did you mean 'epsilon'?"),
        ('equals = "test"', 'equal = "test"', "in [data.test]; did you mean 'equals'?"),
        ("client.budget.epsilon = 2.0", "client.budget.epsilo = 2.0", "[arms.few] unknown key 'epsilo' in"),
        ("client.generator_training.rank", "client.generator_trainin.rank", "[arms.few] unknown key 'generator_t"),
        ("client.generator_training.rank", "clients.generator_training.rank", "[arms.few] unknown key 'clients'"),
        ("client.budget.epsilon = 2.0", 'client.budget.epsilon = "2"', "[arms.few]"),
        ("client.budget.epsilon = 2.0", "client.budget.epsilon = -2.0", "[arms.few] [client.budget] epsilon"),
        ("[arms.local]", "[arm.local]", "unknown key 'arm'; did you mean 'arms'?"),
        ('llm = "assets:tiny-llm"', "", "key 'server.llm' is missing"),
        (f'use = "{FDKT}"', "", 'strategy.use must read "package.module:Class"'),
        (f'use = "{FDKT}"', 'use = "fdkt"', "got 'fdkt'"),
        ('name = "two"', "name = 2", "name must be text, got 2"),
        ('name = "two"', "name = ", "not TOML"),
    ],
)
def test_a_mistake_is_named_with_file_place_and_nearest_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert TEXT.count(old) == 1
    path = tmp_path / "wrong.toml"
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(BadValue) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


def test_there_is_no_such_scenario() -> None:
    with pytest.raises(BadValue, match=r"no scenario 'hospital'; did you mean 'hospitals'\?; shipped are .*medquad"):
        load("hospital")
    with pytest.raises(BadValue, match="no scenario file"):
        load("nowhere/there.toml")


def test_misspelt_options_of_a_strategy_are_found_when_it_is_loaded(file: Path) -> None:
    scenario = load(file, ["strategy.shot=1"])
    with pytest.raises(BadValue, match=r"unknown key 'shot' in \[strategy\]; did you mean 'shots'"):
        load_strategy(scenario.strategy)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "client.task_training.continued_rate=0.5",
            r"task_training\.continued_rate is gone: a task model",
        ),
        ("participation.deadline=3.0", r"unknown key 'deadline' in \[participation\]"),
        (
            "participation.speed_tiers=[[1.0, 2.0]]",
            r"participation\.speed_tiers is gone: participation\.dropout",
        ),
        ("strategy.share_adapters=true", r"unknown key 'share_adapters' in \[strategy\]"),
    ],
)
def test_a_key_of_an_earlier_version_that_is_gone_is_refused_as_an_unknown_one(
    file: Path, line: str, said: str
) -> None:
    with pytest.raises(BadValue, match=said):
        load_strategy(load(file, [line]).strategy)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("fedsynth.strategies.fdkt:FDTK", "no strategy"),
        ("fedsynth.strategies.nothing:FDKT", "no strategy"),
        ("fedsynth.strategies.fdkt:State", "is not a RoundStrategy"),
        ("fedsynth.strategies.fdkt:warm_start", "is not a RoundStrategy"),
    ],
)
def test_a_class_that_is_no_strategy_is_refused(use: str, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        load_strategy(StrategyChoice(use))


DATA, CLIENT = Data("notes.csv"), Client("g", "t", budget=Budget(8.0))
SCENARIO = Scenario("n", StrategyChoice(LOCAL), DATA, CLIENT, Server("l"))


@pytest.mark.parametrize(
    ("value", "name", "bad"),
    [
        *[(DATA, n, v) for n in ("clients", "train_per_client", "test_per_client") for v in (0, -1)],
        (DATA, "labels", ()),
        (DATA, "labels", ("a", "b", "a")),
        (DATA, "split", "natural"),
        *[
            (GeneratorTraining(), n, v)
            for n in (
                "expected_batch_size",
                "steps",
                "learning_rate",
                "clip_norm",
                "rank",
                "alpha",
                "max_physical_batch_size",
            )
            for v in (0, -1, math.nan)
        ],
        (GeneratorTraining(), "max_length", 3),
        *[
            (TaskTraining(), n, v)
            for n in ("batch", "augmented_epochs", "private_epochs", "learning_rate", "max_length")
            for v in (0, -1, math.nan)
        ],
        *[(TaskTraining(), "token_dropout", v) for v in (-0.1, 1.0, math.nan)],
        (CLIENT, "budget", None),
        *[(Server("l"), "timeout", v) for v in (0.0, -1.0, math.nan)],
        *[(Server("l"), "quorum", v) for v in (0.0, 1.01, -0.5, math.nan)],
        *[(SCENARIO, "seeds", v) for v in ((), (1, 1), (0, -1))],
        *[(SCENARIO, "rounds", v) for v in (0, -1)],
        (SCENARIO, "run", ("local",)),
        *[(StrategyChoice("a:B"), "use", v) for v in ("", "a", "a:b:C")],
    ],
)
def test_a_value_out_of_range_is_refused_by_name(value: Any, name: str, bad: Any) -> None:
    with pytest.raises(BadValue, match="label" if name == "labels" else "client_column" if name == "split" else name):
        replace(value, **{name: bad})


@pytest.mark.parametrize(
    ("value", "name", "edge"),
    [
        (DATA, "clients", 1),
        (GeneratorTraining(), "max_length", 4),
        (TaskTraining(), "token_dropout", 0.0),
        (Server("l"), "quorum", 1.0),
        (replace(CLIENT, guarantee="none"), "budget", None),
        (replace(DATA, client_column="ward"), "split", "natural"),
        (SCENARIO, "seeds", (0,)),
    ],
)
def test_the_edges_of_the_ranges_are_inside(value: Any, name: str, edge: Any) -> None:
    assert getattr(replace(value, **{name: edge}), name) == edge


@pytest.mark.parametrize(
    ("value", "name", "bad"),
    [
        (GeneratorTraining(), "clip_norm", math.inf),
        (GeneratorTraining(), "learning_rate", math.inf),
        (TaskTraining(), "weight_decay", -1.0),
        (CLIENT, "max_noise_multiplier", 0.0),
        (CLIENT, "max_noise_multiplier", math.nan),
        (DATA, "tuned_on", (-1,)),  # above the clients is allowed: --clients makes a run smaller
        (DATA, "tuned_on", (0, 0)),
    ],
)
def test_values_that_fail_later_are_refused_at_the_door(value: Any, name: str, bad: Any) -> None:
    with pytest.raises(BadValue, match=name):
        replace(value, **{name: bad})


def test_an_arm_cannot_say_what_has_no_effect() -> None:
    text = TEXT + "seeds = [7]\n"  # of [arms.all]
    try:
        scenario = from_toml(text)
    except BadValue:
        return
    assert [c.seed for c in cells(scenario) if c.arm == "all"] == [7]


# Seeds


def test_public_seeds_are_paired_over_arms_and_differ_in_all_else() -> None:
    cell = Cell("a", 0, SCENARIO)
    assert cell.public_seed("learn") == Cell("b", 0, SCENARIO).public_seed("learn")
    others = [
        cell.public_seed("learn"),
        cell.public_seed("judge"),
        cell.public_seed("learn", round=1),
        cell.public_seed("learn", client=0),
        cell.public_seed("learn", client=1),
        cell.public_seed("learn", round=1, client=1),
        Cell("a", 1, SCENARIO).public_seed("learn"),
    ]
    assert len(set(others)) == len(others)
    assert all(0 <= s < 2**48 for s in others)


# What is shipped


SHIPPED = [p.name.removesuffix(".toml") for p in shipped_scenarios()]


def test_the_demo_is_shipped() -> None:
    assert "hospitals" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_scenario_resolves_and_comes_back(name: str) -> None:
    scenario = load(name)
    assert from_toml(to_toml(scenario)) == scenario
    for cell in [*cells(scenario), *cells(replace(scenario, run=()))]:
        found, config = load_strategy(cell.scenario.strategy)
        assert isinstance(config, found.config_class)
        assert set(cell.scenario.data.tuned_on) <= set(range(cell.scenario.data.clients))


def test_paths_become_absolute_wherever_they_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("beside", "here", "shared", "here/model"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for place in ("beside/a.csv", "here/a.csv", "here/b.csv", "shared/c.csv"):
        (tmp_path / place).write_text("text,label\n")
    text = (
        'name = "own"\n[strategy]\nuse = "fedsynth.strategies.local:LocalOnly"\n[data]\nsource = "a.csv"\n'
        '[client]\ngenerator = "model"\ntask_model = "assets:tiny-slm"\nbudget = { epsilon = 8.0 }\n'
        '[server]\nllm = "someone/else"\n[arms.b]\ndata.source = "b.csv"\n[arms.c]\ndata.source = "c.csv"\n'
        '[arms.nowhere]\ndata.source = "d.csv"\n'
    )
    (tmp_path / "beside" / "own.toml").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FEDSYNTH_DATA", str(tmp_path / "shared"))
    found = load("../beside/own.toml")
    by_arm = {cell.arm: cell.scenario.data.source for cell in cells(found)}
    assert Path(found.data.source).resolve() == tmp_path / "beside" / "a.csv"
    assert by_arm["b"] == str(tmp_path / "here" / "b.csv")
    assert by_arm["c"] == str(tmp_path / "shared" / "c.csv")
    assert by_arm["nowhere"] == "d.csv"
    assert found.client.generator == str(tmp_path / "here" / "model")
    assert (found.client.task_model, found.server.llm) == ("assets:tiny-slm", "someone/else")


def test_an_arm_with_another_split_leaves_what_belongs_to_the_old_one() -> None:
    unlike = TEXT.replace("clients = 2", 'clients = 2\nsplit = "pathological"\nclasses_per_client = 1')
    [iid] = [c.scenario.data for c in cells(from_toml(unlike + '[arms.iid]\ndata.split = "iid"\n')) if c.arm == "iid"][
        :1
    ]
    assert (iid.split, iid.classes_per_client) == ("iid", None)
    skewed = TEXT.replace("clients = 2", 'clients = 2\nsplit = "dirichlet"\nalpha = 0.1')
    found = {c.arm: c.scenario.data.alpha for c in cells(from_toml(skewed + '[arms.iid]\ndata.split = "iid"\n'))}
    assert found == {"local": 0.1, "few": 0.1, "all": 0.1, "iid": Data.alpha}


def test_as_many_workers_run_as_there_are_cores_clients_and_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    def machine(cores: int, free: float, held: float) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=int(free * 1e9)))
        used = SimpleNamespace(ru_maxrss=int(held * 1e9 / 1024))
        monkeypatch.setattr("resource.getrusage", lambda _: used)

    machine(cores=8, free=10.0, held=1.0)
    assert concurrency(None, 20) == (8, "8 workers, about 1.0 GB each, 10 GB free")
    assert concurrency(None, 3)[0] == 3
    machine(cores=8, free=5.0, held=1.0)
    assert concurrency(None, 20)[0] == 4  # 0.9 of what is free
    assert concurrency(2, 20) == (2, "2 workers, about 1.0 GB each, 5 GB free")
    count, said = concurrency(6, 20)
    assert count == 6
    assert said.endswith("fewer --workers would help")
    machine(cores=8, free=1.0, held=1.0)
    count, said = concurrency(None, 20)
    assert count == 1
    assert "memory may not reach" in said


def test_ghost_clipping_comes_without_a_guarantee() -> None:
    ghost = GeneratorTraining(clipping="ghost")
    Client("m", "m", guarantee="none", generator_training=ghost)
    with pytest.raises(BadValue, match="a record that is not finite spoils its sum"):
        Client("m", "m", budget=Budget(8.0), generator_training=ghost)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ["client.generator_training.steps=100001"],
            r"client.generator_training.steps must be at most 100,000 .*got 100,",
        ),
        (["client.generator_training.steps=60000", "rounds=2"], "got 60,000 in each of 2 rounds: take fewer"),
        (["client.scorer_training.steps=1000000000"], r"client.scorer_training.steps must be at most 100,000 "),
        (["client.max_noise_multiplier=1e9"], "max_noise_multiplier must be at most 1000, got 1e"),
    ],
)
def test_what_a_client_would_plan_for_minutes_is_refused_when_the_scenario_is_read(
    file: Path, change: list[str], said: str
) -> None:
    with pytest.raises(BadValue, match=said):
        load(file, change)


def test_as_many_steps_as_can_be_planned_are_read(file: Path) -> None:
    assert load(file, ["client.generator_training.steps=50000", "rounds=2"]).rounds == 2
