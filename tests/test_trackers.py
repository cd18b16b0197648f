"""What is told to TensorBoard, MLflow and Weights & Biases, and what a run shows while it goes."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from inprocess import instructions, play
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from fedsynth.federation.run.log import COLUMNS, SERVER, RunLog
from fedsynth.federation.run.summary import last_figures
from fedsynth.federation.run.trackers import check, figures, tell
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.simulation.progress import ProgressBar
from fedsynth.typed import BadValue

AVERAGE = "fedsynth.strategies.lora_avg:LoraAverage"


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """By tag and step, read from the records of event files: length, its checksum, data, its checksum."""
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + size :]
    return found


def test_means_over_clients_and_the_servers_own_figures() -> None:
    rows = [
        ("a", 0, 1, 0, "accuracy", 0.5),
        ("a", 0, 1, 1, "accuracy", 1.0),
        ("a", 0, 1, -1, "loss", 3.0),
        ("a", 0, 2, 0, "accuracy", 0.25),
    ]
    assert figures(rows, 1) == {"accuracy": 0.75, "server/loss": 3.0}
    assert figures(rows, 2) == {"accuracy": 0.25}


def test_event_files_hold_what_the_metrics_say(tmp_path: Path) -> None:
    run = play(instructions(tmp_path, AVERAGE, rounds=2, clients=2, rows=20), tmp_path)
    told = scalars(run.out / "tensorboard" / "main" / "seed-0")
    for number in (1, 2):
        of_round = [v for _, _, at, client, m, v in run.run_log.rows if (at, m) == (number, "rouge_l") and client >= 0]
        assert told["rouge_l", number] == pytest.approx(sum(of_round) / 2)
        assert told["privacy/epsilon", number] == pytest.approx(run.run_log.epsilon, rel=1e-6)


class Recorder:
    """MLflow's and W&B's calls, as they document them."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any, **more: Any) -> Any:
            self.said.append((name, args, more))
            return self

        return called

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_tracker_is_told_each_cell_round_by_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    recorder = Recorder()
    module: Any = types.ModuleType(tracker)
    module.__getattr__ = lambda name: getattr(recorder, name)
    monkeypatch.setitem(sys.modules, tracker, module)
    scenario = from_toml(instructions(tmp_path, AVERAGE))
    rows = [("main", s, r, c, "rouge_l", 0.1 * r + c) for s in (0, 1) for r in (1, 2) for c in (0, 1)]
    tell([tracker], scenario, pd.DataFrame(rows, columns=list(COLUMNS)), tmp_path)
    logged = [(args[0], more["step"]) for name, args, more in recorder.said if name in ("log_metrics", "log")]
    assert logged == 2 * [({"rouge_l": pytest.approx(0.6)}, 1), ({"rouge_l": pytest.approx(0.7)}, 2)]
    names = [
        more.get("run_name") or more.get("name") for name, _, more in recorder.said if name in ("start_run", "init")
    ]
    assert names == ["tiny/main/0", "tiny/main/1"]
    parameters = next(
        args[0] if name == "log_params" else more["config"]
        for name, args, more in recorder.said
        if name in ("log_params", "init")
    )
    assert str(parameters["client.budget.epsilon"]) == "8.0"


def test_unknown_and_missing_trackers_are_refused_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadValue, match="--track knows mlflow and wandb, not 'aim'"):
        check(["aim"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BadValue, match=r"pip install 'fedsynth\[mlflow\]'"):
        check(["mlflow"])


def test_what_a_warning_or_a_path_has_in_brackets_is_shown(tmp_path: Path) -> None:
    out, [place] = io.StringIO(), [tmp_path / "[red]notes[/]"]
    place.mkdir(parents=True)
    watch = ProgressBar(Console(file=out, width=40), from_toml(instructions(place, AVERAGE, rounds=3)))
    watch.warn("[client.budget] delta is large")
    said = out.getvalue().splitlines()
    assert str(place) in said[0]
    assert said[1] == "warning: [client.budget] delta is large"


def test_lines_say_round_yield_and_epsilon(tmp_path: Path) -> None:
    out = io.StringIO()
    scenario = from_toml(instructions(tmp_path, AVERAGE, rounds=3))
    watch = ProgressBar(Console(file=out, width=120), scenario)
    at = {"event": "progress", "arm": "main", "seed": 0, "round": 2, "phase": "finetune", "total": 3}
    for done in (0, 1, 3):
        watch.event({**at, "done": done, "kept": 0.714, "epsilon": 7.987})
    watch.event({**at, "round": 3, "done": 0, "kept": None, "epsilon": None})
    lines = out.getvalue().splitlines()[1:]
    assert lines == [
        "[1/1] main seed 0 round 2/3: finetune (kept 71%, epsilon 7.99)",
        "[1/1] main seed 0 round 3/3: finetune",
    ]


def test_an_arm_tells_its_figures_as_soon_as_it_is_done(tmp_path: Path) -> None:
    out = io.StringIO()
    scenario = from_toml(instructions(tmp_path, AVERAGE, rounds=2))
    log = RunLog(cells(scenario)[0], tmp_path / "run", tmp_path / "run" / "events.jsonl")
    for number, values in ((1, (0.1, 0.2)), (2, (0.25, 0.5))):  # the last round counts
        log.round = number
        for client, value in enumerate(values):
            log.log_metric(client, "rouge_l", value)
            log.log_metric(client, "bytes/up", 7)
    log.log_metric(SERVER, "rouge_l", 0.9)
    found = last_figures(log)
    assert found == {"figures": {"rouge_l": 0.375}, "clients": 2}
    watch = ProgressBar(Console(file=out, width=120), scenario)
    watch.event({"event": "result", "arm": "main", "seed": 0, **found})
    assert out.getvalue().splitlines()[1] == "main seed 0: rouge l 0.375, the mean of 2 clients"
    log.rows.clear()
    assert last_figures(log) == {}
