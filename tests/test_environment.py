"""What a run is made with is written down, and what has changed since is named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import tiny
from inprocess import instructions

import fedsynth.cli.main
import fedsynth.federation.run.environment as module
from fedsynth.federation.run.directory import prepare
from fedsynth.federation.run.environment import differences, surroundings
from fedsynth.federation.run.log import COLUMNS
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import from_toml, load
from fedsynth.typed import BadValue


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    found = from_toml(instructions(tmp_path, "fedsynth.strategies.lora_avg:LoraAverage"))
    return replace(found, server=replace(found.server, llm="assets:tiny-llm"))


def test_versions_hardware_models_and_code_are_written_down(scenario: Scenario, tmp_path: Path) -> None:
    prepare(scenario, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert facts == json.loads(json.dumps(surroundings(scenario)))
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["hardware"]["cores"] >= 1
    assert facts["hardware"]["memory_gb"] >= 1
    assert set(facts["models"]) == {tiny.folder(), "assets:tiny-llm"}


def test_the_commit_is_that_of_the_checkout_and_none_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.check_output(["git", *who, *words], cwd=tmp_path, text=True).strip()

    file = tmp_path / "environment.py"
    file.write_text("one")
    monkeypatch.setattr(module, "__file__", str(file))
    git("init", "-q")
    assert module._code() is None  # a repository, but not ours
    git("add", ".")
    git("commit", "-qm", "first")
    assert module._code() == {"commit": git("rev-parse", "HEAD"), "changed": False}
    file.write_text("two")
    assert module._code() == {"commit": git("rev-parse", "HEAD"), "changed": True}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("git")))
    assert module._code() is None


def test_what_has_changed_is_named_and_nothing_else(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(scenario, tmp_path / "run")
    assert differences(tmp_path / "run", scenario) == []
    real = module.version
    monkeypatch.setattr(module, "version", lambda name: "0.0.1" if name == "torch" else real(name))
    [line] = differences(tmp_path / "run", scenario)
    assert line == f"packages/torch: {real('torch')!r} then, '0.0.1' now"
    with pytest.raises(BadValue, match="no run's directory"):
        differences(tmp_path, scenario)


def test_a_run_is_repeated_from_its_directory(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare(scenario, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "versions.json").read_text())
    (tmp_path / "run" / "versions.json").write_text(json.dumps({**facts, "python": "2.7"}))
    asked: list[Any] = []

    def stop(found: Scenario, **more: Any) -> Any:
        asked.append((found, more["out"]))
        summary, frame = {"scenario": "x", "arms": {}, "seconds": 1.0}, pd.DataFrame(columns=list(COLUMNS))
        return SimpleNamespace(summary=summary, metrics=frame, privacy={}, few={}, conclusion={}, out=more["out"])

    monkeypatch.setattr("fedsynth.simulation.simulate.run", stop)
    words = ["fedsynth", "run", "--from", str(tmp_path / "run"), "--out", str(tmp_path / "again")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        fedsynth.cli.main.main()
    assert ended.value.code == 0
    assert asked == [(load(tmp_path / "run" / "scenario.toml"), tmp_path / "again")]
    assert asked[0][0] == scenario
    assert "python: '2.7' then" in capfd.readouterr().err
    for both in (["run", "hospitals", "--from", str(tmp_path / "run")], ["run"]):
        monkeypatch.setattr(sys, "argv", ["fedsynth", *both])
        with pytest.raises(SystemExit) as ended:
            fedsynth.cli.main.main()
        assert ended.value.code == 2
        assert "name a scenario, or a run to repeat" in capfd.readouterr().err
