"""How runs, servers and sites start: whose clock it is, and with which Flower."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inprocess import instructions
from local import LocalGrid
from rich.console import Console

import fedsynth.cli.main
from fedsynth.app.fedsynth_sim import server_app
from fedsynth.deployment import superlink
from fedsynth.deployment.client_process import STAND_IN, CannotStandIn, stand_ins
from fedsynth.deployment.server import ServerConfig
from fedsynth.deployment.site import supernode as site_watch
from fedsynth.deployment.site.check import check
from fedsynth.deployment.site.supernode import Patience, SiteFailed, watch
from fedsynth.federation.nodes import TooFewReplies, nodes_by_client
from fedsynth.federation.run.log import RunLog
from fedsynth.scenario.server import Server
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.simulation import flower, progress
from fedsynth.simulation.flower import FLOWER, LaunchFailed, check_flower, environment
from fedsynth.testing import ScriptedLLM
from fedsynth.typed import BadValue

ROOT = Path(__file__).parent.parent
SCENARIO = (ROOT / "simulations" / "scenarios" / "hospitals.toml").read_text()
LATE = r"after \d+ s \({key}\).*raise that key"


class Slow(LocalGrid):
    """Its nodes are there after so many looks."""

    looks = 3

    def get_node_ids(self) -> Any:
        self.looks -= 1
        return super().get_node_ids() if self.looks < 0 else []


def answer(message: Any, context: Any) -> Any:
    from flwr.app import ConfigRecord, Message, RecordDict

    return Message(RecordDict({"who": ConfigRecord(dict(context.node_config))}), reply_to=message)


# ---- A command ----

HEAVY = {
    "cryptography", "datasets", "dp_accounting", "flwr", "numpy", "opacus", "pandas", "peft", "pyarrow", "ray", "scipy",
    "sklearn", "torch", "transformers",
}  # fmt: skip


def heavy_after(program: str, *words: str) -> set[str]:
    """The heavy libraries that a process has read when its program ends."""
    whole = f"import sys\ntry:\n    {program}\nfinally:\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", whole, *words], capture_output=True, text=True, timeout=120)
    return HEAVY & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["site", "--help"],
        ["scenarios"],
        ["version"],
        ["run", "nonsense"],
        ["check", "hospitals", "--set", "client.budget.epsilon=-1"],
        ["run", "hospitals", "--set", "client.rank=3"],
    ],
)
def test_help_lists_and_refusals_read_no_heavy_library(words: list[str]) -> None:
    assert heavy_after("from fedsynth.cli.main import main; main()", *words) == set()


def data_of(folder: Path, text: str) -> str:
    """A scenario of a small file, whose texts are in a column of this name."""
    (folder / "notes.csv").write_text("note,ward\n" + "".join(f"note {i} of a ward,{'ab'[i % 2]}\n" for i in range(40)))
    scenario = folder / "s.toml"
    scenario.write_text(f"""name = "s"
[strategy]
use = "fedsynth.strategies.local:LocalOnly"
[data]
source = "{folder}/notes.csv"
text = "{text}"
label = "ward"
clients = 2
[client]
generator = "assets:tiny-slm"
task_model = "assets:tiny-slm"
budget = {{ epsilon = 8.0 }}
[server]
llm = "assets:tiny-llm"
""")
    return str(scenario)


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_missing_file_reads_no_heavy_library_and_a_wrong_column_only_those_of_tables(
    command: str, tmp_path: Path
) -> None:
    program = "from fedsynth.cli.main import main; main()"
    scenario = data_of(tmp_path, "nota")
    read = heavy_after(program, command, scenario)
    assert "pandas" in read  # it got as far as the file
    assert not {"torch", "flwr", "transformers", "ray", "opacus"} & read
    (tmp_path / "notes.csv").unlink()
    assert heavy_after(program, command, scenario) == set()


def test_a_run_speaks_before_it_reads_anything_heavy_and_says_what_it_waits_for(tmp_path: Path) -> None:
    """By what is read when the first line is printed, not by the clock of a busy machine."""
    watched = f"""
import sys
from rich.console import Console
first = []
printed = Console.print
def noted(self, *words, **how):
    first.append((str(words[0]), sorted(set({sorted(HEAVY)}) & sys.modules.keys())))
    printed(self, *words, **how)
Console.print = noted
sys.argv = ["fedsynth", "run", {data_of(tmp_path, "nota")!r}]
from fedsynth.cli.main import main
try:
    main()
finally:
    print(first)
"""
    line = [sys.executable, "-c", watched]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=120)
    said = ast.literal_eval(done.stdout.splitlines()[-1])
    assert said[0][0].endswith("notes.csv")  # the scenario's name, clients, cells and data
    assert said[0][1] == said[1][1] == []
    assert said[1][0] == "reading the data ..."


def test_a_silent_run_says_what_it_waits_for_and_how_long_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.2)
    out = io.StringIO()
    with progress.ProgressBar(Console(file=out, width=120), from_toml(SCENARIO)) as watch:
        watch.event({"event": "awaited", "line": "starting Flower and Ray"})
        deadline = time.monotonic() + 30
        while "still" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    said = out.getvalue()
    assert "starting Flower and Ray ..." in said
    assert re.search(r"still starting Flower and Ray \(nothing new for \d+ s; \d+\.\d min by the clock\)", said)
    time.sleep(0.5)
    assert out.getvalue() == said  # it ends with the run


def test_a_run_that_speaks_has_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 2.0)
    out = io.StringIO()
    with progress.ProgressBar(Console(file=out, width=120), from_toml(SCENARIO)) as watch:
        for _ in range(25):
            watch.event({"event": "nothing that is shown"})
            time.sleep(0.1)
    assert "still" not in out.getvalue()


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), LaunchFailed("it died")])
def test_a_run_that_ends_early_names_the_line_that_goes_on_with_it(problem: BaseException, tmp_path: Path) -> None:
    def said(*, begun: bool) -> str:
        out = io.StringIO()
        place = tmp_path / "a run"
        watch = progress.ProgressBar(Console(file=out, width=200), from_toml(SCENARIO))
        if begun:
            place.mkdir()
            (place / "scenario.toml").touch()
            watch.event({"event": "begun", "out": str(place)})
        with pytest.raises(type(problem)), watch.resumable("fedsynth run --resume {out}"):
            raise problem
        return out.getvalue()

    assert "resume" not in said(begun=False)
    assert f"go on with it: fedsynth run --resume '{tmp_path}/a run'\n" in said(begun=True)


def test_a_command_that_read_one_would_be_caught() -> None:
    found = heavy_after("import fedsynth.privacy.noise; from fedsynth.cli.main import main; main()", "scenarios")
    assert {"cryptography", "numpy", "scipy"} <= found


def test_a_report_reads_torch_only_if_it_embeds_texts() -> None:
    assert not {"torch", "peft", "sklearn", "flwr"} & heavy_after("import fedsynth.reporting.run_report")


# ---- A run ----


def test_nodes_are_waited_for_as_long_as_the_scenario_says_and_the_line_names_key_time_and_way_out() -> None:
    assert nodes_by_client(Slow(answer, 1, {}), 1, seconds=60.0) == {0: 1000}
    said = LATE.format(key=r"server\.start_seconds")
    with pytest.raises(TooFewReplies, match="0 of 1 SuperNodes said which partition they hold " + said):
        nodes_by_client(LocalGrid(answer, 0, {}), 1, seconds=0.1)


def test_a_run_waits_for_its_nodes_by_the_scenarios_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "_llm", lambda *_: ScriptedLLM())
    monkeypatch.setattr(server_app, "_embedder", lambda *_: SimpleNamespace(embed=None))
    toml = instructions(tmp_path, "fedsynth.strategies.lora_avg:LoraAverage") + "server.start_seconds = 0.2\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scenario.toml").write_text(toml)  # the launcher's work
    begun = time.monotonic()
    with pytest.raises(TooFewReplies, match=r"server\.start_seconds"):
        server_app.conduct(LocalGrid(answer, 0, {}), toml, tmp_path / "run")
    assert time.monotonic() - begun < 60


def test_a_run_by_hand_prints_each_phase_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [cell, *_] = cells(from_toml(SCENARIO))
    for echo, said in ((True, "local seed 0: learn\nlocal seed 0 round 2: evaluate\n"), (False, "")):
        run_log = RunLog(cell, tmp_path, tmp_path / "events.jsonl", echo=echo)
        run_log.progress("learn", 0, 8)
        run_log.progress("learn", 3, 8)
        run_log.round = 2
        run_log.progress("evaluate", 0, 8)
        assert capsys.readouterr().out == said


def test_the_launcher_gets_the_same_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsynth.simulation import simulate

    told: dict[str, Any] = {}
    monkeypatch.setattr(simulate, "launch", lambda _, **more: told.update(more))
    monkeypatch.setattr(simulate, "read", lambda _: None)
    scenario = from_toml(instructions(tmp_path, "fedsynth.strategies.lora_avg:LoraAverage"))
    server = replace(scenario.server, start_seconds=77.0)
    served, _ = simulate._served(scenario, 1, None)
    simulate._launched(replace(scenario, server=server), "", tmp_path, served, None, None, 0.0)
    assert told["start_seconds"] == 77.0


def test_by_default_a_busy_machine_has_an_hour() -> None:
    assert Server("m").start_seconds == 3600  # what dies is noticed at once, so nothing is lost by it
    with pytest.raises(BadValue, match=r"server\.start_seconds must be finite and above 0"):
        Server("m", start_seconds=0.0)


# ---- A server ----


def test_a_superlink_that_does_not_listen_is_waited_for_by_server_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServerConfig("127.0.0.1", 1, "127.0.0.1:1", "c", "k", "a", start_seconds=0.05)
    monkeypatch.setattr(superlink, "listens", lambda *_: False)
    lives, quiet, log = SimpleNamespace(poll=lambda: None), SimpleNamespace(show=lambda: None), tmp_path / "log"
    with pytest.raises(LaunchFailed, match=LATE.format(key=r"start_seconds of server\.toml")):
        superlink._wait_for(lives, config, log, 0, quiet)


# ---- A site ----


def supernode(polls: int | None) -> Any:
    """A process that ends after it was looked at so many times."""
    left = iter(range(polls)) if polls is not None else iter(int, 1)
    return SimpleNamespace(pid=1, returncode=1, poll=lambda: None if next(left, None) is not None else 1)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A site whose server answers; its SuperNode is looked at all the time, and for silent after no time."""
    monkeypatch.setattr(site_watch, "_problems", lambda _: {})
    monkeypatch.setattr(site_watch, "source_changed", lambda _: "")
    monkeypatch.setattr(site_watch, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(site_watch, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(site_watch, "_connected", lambda *_: False)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    link = SimpleNamespace(address="fl.example.org:9443")
    return SimpleNamespace(site=SimpleNamespace(start_seconds=60.0, superlink=link, name="north"))


def test_a_supernode_is_silent_only_once_it_has_started(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    monkeypatch.setattr(site_watch, "listens", lambda *_: time.monotonic() - begun > 0.3)  # importing takes it so long
    said, lived = watch(place, supernode(None), supernode(None), supernode(None), 1)
    assert said == "the SuperNode lost its connection and does not try again"
    assert time.monotonic() - begun > 0.3
    assert lived < 0.3


def test_a_supernode_that_never_starts_is_waited_for_by_site_toml(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_watch, "listens", lambda *_: False)
    place.site.start_seconds = 0.1
    with pytest.raises(SiteFailed, match=LATE.format(key=r"start_seconds of site\.toml")):
        watch(place, supernode(None), supernode(None), supernode(None), 1)


def test_a_supernode_that_dies_is_noticed_before_its_clock_is_over(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_watch, "listens", lambda *_: False)
    assert watch(place, supernode(None), supernode(3), supernode(None), 1) == ("the SuperNode ended (exit code 1)", 0.0)


@pytest.mark.parametrize(("lived", "again"), [(1.0, False), (46.0, True)])
def test_how_long_a_supernode_lived_is_counted_from_its_start(
    place: Any, capsys: pytest.CaptureFixture[str], lived: float, again: bool
) -> None:
    Patience(place).wait("it ended", lived)
    assert ("it is started again" in capsys.readouterr().err) == again


def test_a_program_that_takes_too_long_to_run_is_told_from_one_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(command: Any, *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(CannotStandIn, match=rf"{STAND_IN} did not run within 7 s \(start_seconds of site\.toml\)"):
        stand_ins(tmp_path, tmp_path / "no.socket", seconds=7.0)


# ---- Which Flower ----


@pytest.mark.parametrize("version", ["1.41.0", "1.41.3", "1.42.0", "1.42.1.post1"])
def test_a_flower_of_the_range_is_worked_with(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "version", lambda _: version)
    assert check_flower() == f"flwr {version}"


@pytest.mark.parametrize("version", ["1.40.9", "1.43.0", "1.43.0.dev20261101", "2.0.0", "0.42.0", "unknown"])
def test_another_flower_is_refused_with_its_version_and_the_way_out(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "version", lambda _: version)
    way_out = re.escape("flwr[simulation]>=1.41,<1.43: pip install 'flwr[simulation]>=1.41,<1.43'")
    with pytest.raises(BadValue, match=f"^Flower {re.escape(version)} is installed, .* works with {way_out}"):
        check_flower()
    with pytest.raises(BadValue, match="is installed"):
        environment("m")  # no program of Flower starts without it


def test_where_there_is_no_flower_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flower, "version", missing)
    with pytest.raises(BadValue, match="Flower is not installed beside this Python: pip install"):
        check_flower()


@pytest.mark.parametrize(
    "words",
    [
        ["run", "hospitals"],
        ["check", "hospitals"],
        ["compare", "hospitals"],
        ["server", "start", "DIR"],
        ["site", "start", "DIR"],
        ["run", "--server", "DIR"],
    ],
)
def test_every_command_that_needs_flower_says_so_before_anything_else(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    site = (ROOT / "fedsynth" / "deployment" / "site" / "site.template.toml").read_text()
    site = re.sub(r"^@\w+@\n", "", site, flags=re.M).replace("@name@", "north").replace("@address@", "127.0.0.1:1")
    site = site.replace("@task@", "instructions").replace("@asked@", "8").replace("records = 0", "records = 100")
    (tmp_path / "site.toml").write_text(site.replace('label = "label"', 'response = "response"'))
    (tmp_path / "scenario.toml").write_text((ROOT / "simulations/scenarios/hospitals.toml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flower, "version", lambda _: "1.99.0")
    monkeypatch.setattr(sys, "argv", ["fedsynth", *(str(tmp_path) if word == "DIR" else word for word in words)])
    with pytest.raises(SystemExit) as ended:
        fedsynth.cli.main.main()
    said = capfd.readouterr().err
    assert said.startswith("fedsynth: bad input: Flower 1.99.0 is installed"), said
    assert ended.value.code == 2


def test_a_sites_check_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flower, "version", lambda _: "1.99.0")
    place: Any = SimpleNamespace(site=SimpleNamespace(name="north", data=SimpleNamespace(id="d")))
    said = {finding.what: finding for _, finding in zip(range(2), check(place), strict=False)}
    assert (said["Flower"].state, said["Flower"].says[:27]) == ("problem", "Flower 1.99.0 is installed,")


def test_pyproject_and_constraints_name_the_range_and_the_tested_version() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (first, second), (beyond, minor) = FLOWER
    assert f"flwr[simulation]>={first}.{second},<{beyond}.{minor}" in listed
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    assert pins["flwr"].startswith("1.42.")
    assert tuple(map(int, pins["certifi"].split(".")[:3])) >= (2026, 10, 19)
