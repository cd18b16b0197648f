"""fedsynth from Python: what is asked for, what is refused before work, and what a result shows."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fedsynth
from fedsynth.api import scenario_of
from fedsynth.corpus import Corpus, Provenance
from fedsynth.evaluation.utility import bootstrap
from fedsynth.federation.payload import corpus_to_parquet
from fedsynth.lora import Adapter
from fedsynth.scenario.toml import load
from fedsynth.simulation.result import Result
from fedsynth.typed import BadValue

ACCURACY = {  # of clients 0 to 5 in the last round
    "local": [0.5, 0.6, 0.4, 0.5, 0.6, 0.4],
    "fdkt": [0.7, 0.9, 0.8, 0.7, 0.9, 0.8],
}
TABLE = {
    "name": "own",
    "strategy": {"use": "fedsynth.strategies.local:LocalOnly"},
    "data": {"source": "notes.csv", "labels": ["fever", "cough"], "clients": 3},
    "client": {"generator": "assets:tiny-slm", "task_model": "assets:tiny-slm", "budget": {"epsilon": 8.0}},
    "server": {"llm": "assets:tiny-llm"},
    "arms": {"local": {}, "other": {"client": {"task_training": {"batch": 3}}}},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The directory of a run that is done."""
    out = tmp_path / "run"
    rows = [(arm, 0, 1, client, "accuracy", 0.1) for arm in ACCURACY for client in range(6)]
    rows += [(arm, 0, 2, client, "accuracy", v) for arm, own in ACCURACY.items() for client, v in enumerate(own)]
    rows += [("fdkt", 0, 2, -1, "seconds/cell", 3.0)]
    arms = {
        arm: {
            "metrics": {"accuracy": {"mean": float(np.mean(own)), "std": None, "n": 3}},
            "guarantee": "dp",
            "epsilon": 7.9994 if arm == "fdkt" else 0.0,
            "delta": 1e-5,
            "bytes": {"up": 10, "down": 20},
            "losses": [],
        }
        for arm, own in ACCURACY.items()
    }
    texts = out / "corpora" / "fdkt" / "seed-0"
    texts.mkdir(parents=True)
    for number, client in ((1, 0), (2, 0), (2, 1)):
        written = Corpus(
            (f"round {number} <b>", "dry"), ("fever", "cough"), Provenance.LLM_WRITTEN, grants=(f"g{client}",)
        )
        (texts / f"written-round{number}-client{client}.parquet").write_bytes(corpus_to_parquet(written))
    summary = {"scenario": "own <i>", "out": str(out), "seconds": 3.0, "arms": arms}
    (out / "conclusion.json").write_text(json.dumps({"verdict": ["fdkt is above local"], "lines": {}}))
    (out / "summary.json").write_text(json.dumps(summary))
    (out / "privacy.json").write_text(json.dumps({arm: {"line": f"of {arm} the line"} for arm in ACCURACY}))
    columns = ["arm", "seed", "round", "client", "metric", "value"]
    pd.DataFrame(rows, columns=columns).to_parquet(out / "metrics.parquet")
    return out


# ---- Asking ----


def test_arguments_are_those_of_the_command() -> None:
    asked = scenario_of("hospitals", arms=["local", "fdkt"], seeds=[0, 3], set={"client.budget.epsilon": 2}, clients=2)
    typed = load("hospitals", ["client.budget.epsilon=2", "data.clients=2", "seeds=[0,3]", 'run=["local", "fdkt"]'])
    assert asked == typed
    assert scenario_of("hospitals", set=["client.budget.epsilon=2"]) == load("hospitals", ["client.budget.epsilon=2"])
    assert scenario_of("hospitals", set={"client": {"budget": {"epsilon": 2}}}).client.budget.epsilon == 2
    assert scenario_of("hospitals", seeds=4).seeds == (4,)
    everything = scenario_of("hospitals", arms="all")
    assert everything.run == tuple(everything.arms)
    assert scenario_of("hospitals", quick=True) == load("hospitals", quick=True)


def test_a_scenario_may_be_a_dictionary_or_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.csv").write_text("text,label\nhot,fever\n")
    monkeypatch.chdir(tmp_path)
    asked = scenario_of(TABLE, arms=["other"], set={"data.clients": 2})
    assert asked.data.source == str(tmp_path / "notes.csv")  # Flower's processes work elsewhere
    assert (asked.data.clients, asked.run) == (2, ("other",))
    assert scenario_of(asked, seeds=[1]).seeds == (1,)
    assert scenario_of(asked) == asked


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"arms": ["fdtk"]}, r"no \[arms.fdtk\]"),
        ({"set": {"client.bugdet.epsilon": 2}}, "did you mean 'budget'"),
        ({"set": ["client.bugdet.epsilon=2"]}, "did you mean 'budget'"),
        ({"set": "client.budget.epsilon=2"}, "put it into a list"),
        ({"seeds": [1, 1]}, "seeds must be distinct"),
        ({"seeds": ["one"]}, "seeds"),
        ({"clients": 0}, "clients must be at least 1"),
        ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_imported(more: dict[str, Any], words: str) -> None:
    code = (
        "import sys, fedsynth\n"
        f"try:\n    fedsynth.run('hospitals', **{more!r})\n"
        "except ValueError as problem:\n    print(problem)\n"
        "print(*{'torch', 'flwr', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, imported = done.stdout.split("\n")[:2]
    assert re.search(words, said)
    assert imported == ""


def test_a_grid_takes_the_same_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("fedsynth.comparison.running.compare", lambda grid, out, **_: asked.append((grid, out)))
    sets = {"client.budget": {"epsilon": 2.0}, "data.labels": ["a", "b"]}
    fedsynth.compare("hospitals", epsilons=[2, 8.0], seeds=[0], arms=["local", "fdkt"], set=sets, progress=False)
    fedsynth.compare(["hospitals"], arms="local,fdkt", baseline="fdkt", progress=False)
    (grid, out), (other, _) = asked
    assert (grid.epsilons, grid.seeds, out.name) == ((2.0, 8.0), (0,), "compare-hospitals")
    assert grid.scenarios["hospitals"].set == ("client.budget.epsilon=2.0", 'data.labels=[ "a", "b", ]')
    assert (other.seeds, other.scenarios["hospitals"].baseline) == ((0, 1, 2), "fdkt")
    with pytest.raises(BadValue, match="epsilons must be numbers"):
        fedsynth.compare("hospitals", epsilons=["much"], progress=False)  # type: ignore[list-item]  # what is tested


# ---- Importing ----


def test_importing_the_package_is_cheap_and_shows_its_names() -> None:
    assert {"run", "load", "check", "compare", "report", "resume", "Result", "Corpus", "Scenario"} <= set(dir(fedsynth))
    assert all(getattr(fedsynth, name) is not None for name in fedsynth.__all__)
    code = "import sys, fedsynth; dir(fedsynth); print(len([m for m in sys.modules if m.startswith('fedsynth')]))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout == "1\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # CPU seconds
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        fedsynth.runn  # noqa: B018 - what is tested


def test_a_result_is_read_without_torch_and_flower(place: Path) -> None:
    code = f"import sys, fedsynth; fedsynth.load({str(place)!r}); print(*{{'torch', 'flwr', 'ray'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# ---- Progress ----


def finished(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """A run that tells two events, warns once, and is done."""

    def run(*_: Any, on_event: Any, on_warning: Any, **__: Any) -> Result:
        for phase in ("write", "learn"):
            event = {"event": "progress", "arm": "fdkt", "seed": 0, "round": 1, "phase": phase, "done": 1, "total": 2}
            if on_event is not None:
                on_event(event)
        if on_warning is not None:
            on_warning("cut")
        return fedsynth.load(place)

    monkeypatch.setattr("fedsynth.simulation.simulate.run", run)


def test_a_run_shows_plain_lines_where_there_is_no_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(monkeypatch, place)
    events: list[Any] = []
    fedsynth.run("hospitals", arms=["fdkt"], on_event=events.append)
    out, said = capsys.readouterr()
    assert out == ""
    assert said.splitlines()[0].startswith("hospitals: 8 clients, 1 cells")
    assert "[1/1] fdkt seed 0: write" in said
    assert "warning: cut" in said
    assert said.splitlines()[-1] == f"written to {place} (3 s)"
    assert [event["phase"] for event in events] == ["write", "learn"]


def test_a_run_can_be_silent(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    finished(monkeypatch, place)
    warned: list[str] = []
    fedsynth.run("hospitals", progress=False, on_warning=warned.append)
    assert capsys.readouterr() == ("", "")
    assert warned == ["cut"]


def test_a_notebook_has_one_line_that_is_replaced(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(monkeypatch, place)
    shown: list[str] = []
    output = SimpleNamespace(update=lambda html: shown.append(html))
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=None)  # type: ignore[attr-defined]  # a stand-in
    display.HTML = str  # type: ignore[attr-defined]  # likewise
    display.display = lambda html, display_id: output  # type: ignore[attr-defined]  # likewise
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    fedsynth.run("hospitals", arms=["fdkt"])
    out, error = capsys.readouterr()
    assert error == ""  # a notebook paints it red
    assert out.splitlines()[0].startswith("hospitals: 8 clients")
    assert "seed 0: write" not in out
    assert ["fdkt seed 0: write" in shown[0], "fdkt seed 0: learn" in shown[1]] == [True, True]
    assert all(re.match(r"<progress value='\d+' max='1000'", line) for line in shown[:-1])
    assert shown[-1] == ""


# ---- Results ----


def test_a_result_is_loaded_and_says_briefly_what_it_is(place: Path) -> None:
    found = fedsynth.load(place)
    assert repr(found) == f"Result(own <i>, 1 seed: local 0.500, fdkt 0.800 (accuracy); {place})"
    assert list(found.table.index) == ["local", "fdkt"]
    assert repr(found.difference("fdkt", "local")).startswith("Difference(+0.300, 95 % +0.2")
    assert found.sentences == ["fdkt is above local", "local: of local the line", "fdkt: of fdkt the line"]


def test_a_notebook_shows_a_table_of_escaped_text(place: Path) -> None:
    shown = fedsynth.load(place)._repr_html_()
    assert "own &lt;i&gt;" in shown
    assert "<i>" not in shown
    rows = re.findall(r"<tr>(.*?)</tr>", shown)
    assert [re.findall(r">([^<]*)</t[hd]>", row) for row in rows] == [
        ["arm", "accuracy", "guarantee"],
        ["local", "0.500", "nothing is released"],
        ["fdkt", "0.800", "epsilon 8.000"],  # rounded up: a printed bound must hold
    ]
    assert "<li>fdkt is above local</li>" in shown


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda place: (place / "summary.json").unlink(), "holds no run"),
        (
            lambda place: [(place / "summary.json").unlink(), (place / "scenario.toml").touch()],
            "is not done: go on with it, `fedsynth run --resume",
        ),
        (lambda place: [(place / "summary.json").unlink(), (place / "comparison.json").touch()], "holds a comparison"),
        (lambda place: place.rename(place.with_name("gone")), "there is no directory"),
    ],
)
def test_a_directory_without_a_result_says_what_it_is(place: Path, spoil: Any, words: str) -> None:
    spoil(place)
    with pytest.raises(BadValue, match=words):
        fedsynth.load(place)


def test_texts_come_by_client_and_as_a_frame(place: Path) -> None:
    found = fedsynth.load(place).corpora("fdkt")
    assert {client: corpus.prompts[0] for client, corpus in found.items()} == {0: "round 2 <b>", 1: "round 2 <b>"}
    frame = found.to_frame()
    assert list(frame.columns) == ["client", "prompt", "answer", "provenance", "grants"]
    assert frame.iloc[3].tolist() == [1, "dry", "cough", "llm_written", ("g1",)]
    assert found[0].to_frame().to_dict("list") == {"prompt": ["round 2 <b>", "dry"], "answer": ["fever", "cough"]}
    assert repr(found) == "Corpora(4 texts of 2 clients)"
    assert len(fedsynth.load(place).corpora("local", 0).to_frame()) == 0  # it writes none


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("fdtk",), "no arm 'fdtk'; did you mean 'fdkt'\\?; it has local, fdkt"),
        (("fdkt", 3), "no seed 3 of 'fdkt'; it has 0"),
        (("fdkt", 0, "draft"), "kind 'draft'; it has written"),
    ],
)
def test_texts_that_are_not_there_name_those_that_are(place: Path, asked: Any, words: str) -> None:
    with pytest.raises(BadValue, match=words):
        fedsynth.load(place).corpora(*asked)


def test_a_plot_shows_each_arms_mean_and_interval(place: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    found = fedsynth.load(place)
    axes = found.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "local\nnothing is released",
        "fdkt\nepsilon 8.000",
    ]
    bars, means = axes.get_lines()[::2], axes.get_lines()[1::2]
    assert [float(line.get_xdata()[0]) for line in means] == pytest.approx([0.5, 0.8])
    index = pd.MultiIndex.from_product([[0], range(6)], names=["seed", "client"])
    for bar, own in zip(bars, ACCURACY.values(), strict=True):
        assert list(bar.get_xdata()) == pytest.approx(bootstrap(pd.Series(own, index)))
    with pytest.raises(BadValue, match="no client has the metric 'rouge_l'; the run has accuracy"):
        found.plot("rouge_l")


def test_without_matplotlib_the_way_out_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadValue, match=r"pip install 'fedsynth\[plot\]'"):
        fedsynth.load(place).plot()


def test_no_representation_shows_a_text() -> None:
    private = Corpus(("a secret",), ("fever",), Provenance.PRIVATE, units=("Jane",))
    assert repr(private) == "Corpus(1 texts, private, no grants)"
    drafts = Corpus(("hot",), ("fever",), Provenance.DP_SYNTHETIC, grants=("g",))
    assert repr(drafts) == "Corpus(1 texts, dp_synthetic, 1 grant)"
    arrays = {"m.lora_A.weight": np.ones((2, 300)), "m.lora_B.weight": np.ones((300, 2))}
    assert repr(Adapter(arrays, 2, 4.0, "base", ("g", "h"))) == "Adapter(rank 2, 2 tensors, 1,200 numbers, 2 grants)"


def test_a_scenario_says_briefly_what_it_is() -> None:
    assert repr(scenario_of(TABLE, arms=["local"])) == "Scenario(own: local; 3 clients, data notes.csv, seeds 0)"
    del (bare := dict(TABLE))["arms"]
    assert repr(scenario_of(bare)) == "Scenario(own: LocalOnly; 3 clients, data notes.csv, seeds 0)"
