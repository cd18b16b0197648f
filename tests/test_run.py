"""The command, with real processes: results, bad input, repeatability, faults."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import SESSION
from proxy import behind_a_dead_proxy

import fedsynth.cli.main
from fedsynth.federation.run.directory import SHARED, private_of
from fedsynth.privacy.audit import contents, ledgers_in, problems
from fedsynth.simulation.flower import MARKER
from fedsynth.simulation.simulate import resume

ROOT = Path(__file__).parent.parent
FEDSYNTH = [sys.executable, "-m", "fedsynth.cli.main"]
QUICK = [
    "client.generator_training.steps=3",
    "client.task_training.augmented_epochs=1",
    "data.test_per_client=40",
    "client.task_training.private_epochs=1",
    "strategy.num_texts=16",
    "strategy.per_label=3",
    "data.train_per_client=60",
]


def command(*more: str) -> list[str]:
    sets = [part for item in QUICK for part in ("--set", item)]
    return [*FEDSYNTH, "run", "hospitals", *sets, *more]


def run(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=cwd,
        env=behind_a_dead_proxy({**os.environ, **more}),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One quick run of three arms with one worker, from outside the repository."""
    place = tmp_path_factory.mktemp("run")
    done = run(
        *command("--clients", "3", "--arms", "local,fdkt,no_dp", "--out", "first", "--workers", "1", "--json"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    return place / "first", done


def test_what_arms_share_is_gone_at_the_end(ended: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    private = private_of(ended[0])
    assert list(private.glob("fdkt/seed-*/client-*/ledger.sqlite"))  # clients trained, and their ledgers stay
    assert not (private / SHARED).exists()


def test_json_is_the_last_line_and_has_the_promised_shape(ended: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = ended
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said) == {"scenario", "out", "seconds", "arms"}
    assert said["scenario"] == "hospitals"
    assert said["out"] == str(out)
    assert set(said["arms"]) == {"local", "fdkt", "no_dp"}
    for arm in said["arms"].values():
        assert set(arm) == {"metrics", "guarantee", "epsilon", "delta", "bytes", "losses"}
        assert set(arm["metrics"]["accuracy"]) == {"mean", "std", "n"}
        assert arm["metrics"]["accuracy"]["std"] is None  # one seed
        assert set(arm["bytes"]) == {"up", "down"}
    assert said["arms"]["fdkt"]["guarantee"] == "dp"
    assert 7.9 < said["arms"]["fdkt"]["epsilon"] <= 8.0
    assert said["arms"]["no_dp"]["guarantee"] == "none"
    assert said["arms"]["no_dp"]["epsilon"] is None
    frame = pd.read_parquet(out / "metrics.parquet")
    local = frame[(frame["arm"] == "local") & (frame["metric"] == "accuracy")]["value"]
    assert said["arms"]["local"]["metrics"]["accuracy"]["mean"] == pytest.approx(local.mean())


def test_each_arm_has_a_sentence_on_privacy(ended: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = ended
    assert "local: nothing derived from private text leaves a client" in done.stderr
    assert re.search(
        r"fdkt: an honest-but-curious server sees .* \(7\.9\d\d, 1e-05\)-DP per row, all rounds", done.stderr
    )
    assert "no_dp: no differential privacy guarantee: synthetic text with labels left clients" in done.stderr


def test_the_run_directory_is_complete(ended: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = ended
    assert "data: 3 clients, 60 training and 40 test texts, " in done.stderr
    names = {p.name for p in out.iterdir()}
    assert names == {
        "scenario.toml",
        "summary.json",
        "conclusion.json",
        "data_facts.json",
        "row_counts.json",  # of the simulated world: nobody's rows
        "metrics.parquet",
        "privacy.json",
        "corpora",
        "versions.json",
        "events.jsonl",
        "status.json",
        "tensorboard",
    }
    frame = pd.read_parquet(out / "metrics.parquet")
    assert list(frame.columns) == ["arm", "seed", "round", "client", "metric", "value"]
    assert not frame.duplicated(["arm", "seed", "round", "client", "metric"]).any()
    from fedsynth.simulation.result import read

    drafts = read(out).corpora("fdkt", 0, "drafts")
    assert set(drafts) == {0, 1, 2}
    assert all(len(c.grants) == 1 for c in drafts.values())
    keys = {p.read_bytes() for p in private_of(out).rglob("ledger.sqlite")}
    assert len(keys) == 9  # three arms, three clients
    privacy = json.loads((out / "privacy.json").read_text())["fdkt"]["largest_over_clients"]
    assert privacy["epsilon"] < privacy["epsilon_replace_one"] < privacy["epsilon_rows"]["2"]


def assert_alike(out: Path, other: Path) -> None:
    """Of the arm fdkt: the same metrics, but for how long things took, and the same texts to the byte."""

    def frame(place: Path) -> pd.DataFrame:
        found = pd.read_parquet(place / "metrics.parquet")
        found = found[~found["metric"].str.startswith("seconds/") & (found["arm"] == "fdkt")]
        return found.sort_values(["arm", "seed", "round", "client", "metric"]).reset_index(drop=True)

    pd.testing.assert_frame_equal(frame(out), frame(other), check_exact=True)
    files = list((out / "corpora" / "fdkt").rglob("*.parquet"))
    assert len(files) == 6  # drafts and written texts of three clients
    for path in files:
        assert path.read_bytes() == (other / path.relative_to(out)).read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("said", [{"synthesize": 1}, {"synthesize": 1, "learn": 1}])
def test_killed_and_gone_on_with_by_more_workers_it_ends_as_one_that_was_left_alone(
    ended: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, said: dict[str, int]
) -> None:
    out, broken = ended[0], tmp_path / "broken"
    words = command("--clients", "3", "--arms", "fdkt", "--out", "broken", "--workers", "1")
    for phase, count in said.items():
        child = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        reached = f'"phase": "{phase}", "done": {count}'
        wait_for(lambda reached=reached: reached in _text(broken / "events.jsonl"))
        if phase == "synthesize":
            child.kill()
        else:
            superlinks = [p for p in psutil.process_iter() if _carries_marker(p) and "flower-superlink" in _words(p)]
            superlinks[0].kill()
        child.communicate(timeout=60)
        assert child.returncode != 0
        words = [*FEDSYNTH, "run", "--resume", "broken", "--workers", "2"]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_alike(out, broken)
    assert not (broken / "checkpoint").exists()
    ledgers = [contents(path) for path in ledgers_in(broken)]
    assert [problems(ledger) for ledger in ledgers] == [[], [], []]
    grants = {g["id"] for ledger in ledgers for g in ledger["grants"]}
    assert len(grants) == 3  # one grant a client, the same as without the kills
    assert grants <= {g["id"] for path in ledgers_in(out) for g in contents(path)["grants"]}
    assert json.loads((broken / "summary.json").read_text()) == resume(broken).summary


@pytest.mark.parametrize("more", [["hospitals"], ["--set", "rounds=2"], ["--out", "other"], ["--from", "run"]])
def test_what_goes_on_is_the_run_as_it_was_begun(
    more: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, error = typed(["run", "--resume", "run", *more], tmp_path, capfd, monkeypatch)
    assert code == 2
    assert "--resume" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "strategy.per_labl=3"], "did you mean 'per_label'"),
        (["--set", "client.bugdet.epsilon=3"], "did you mean 'budget'"),
        (["--set", 'strategy.per_label="many"'], "strategy.per_label must be a whole number"),
        (["--set", "data.labels=[]"], "the label list is empty"),
        (["--set", "client.budget.epsilon=0.001"], "max_noise_multiplier"),
        (["--set", "client.generator=/no/such/model"], "does not exist"),
        (["--set", "client.generator=assets:tiny"], "assets:tiny-slm"),
        (["--set", "strategy.use=fedsynth.strategies.fdkt:FDK"], "no strategy"),
        (["--arms", "fdtk"], "no [arms.fdtk]"),
        (["--seeds", "1,1"], "seeds"),
        (["--clients", "0"], "clients must be at least 1"),
        (["--set", "data.source=nowhere.csv"], "no data file 'nowhere.csv'"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    arguments: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, error = typed(["run", "hospitals", *arguments, "--out", "never"], tmp_path, capfd, monkeypatch)
    assert code == 2
    assert said in error
    assert len([line for line in error.splitlines() if line.startswith("fedsynth: bad input")]) == 1
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def typed(
    words: list[str], place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[object, str]:
    """Exit code and standard error of the command, in this process: imports of seconds are paid once."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["fedsynth", *words])
    with pytest.raises(SystemExit) as ended:
        fedsynth.cli.main.main()
    return ended.value.code, capfd.readouterr().err


def test_bad_input_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run(*FEDSYNTH, "run", "hospitals", "--set", "strategy.per_labl=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fedsynth: bad input: ")
    assert "did you mean 'per_label'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ("text,label\na b c,x\n", "clients = 2", "2 clients for 1 examples"),
        ("words,label\na b c,x\n", "clients = 1", "no column 'text'; it has 'words', 'label'"),
        ("text,label\na b c,x\nd e f,y\n", "clients = 2", "client 0 has no"),
    ],
)
def test_bad_data_is_one_line_before_any_work(
    rows: str, more: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.csv").write_text(rows)
    (tmp_path / "own.toml").write_text(
        f'name = "own"\n[strategy]\nuse = "fedsynth.strategies.fdkt:FDKT"\n[data]\nsource = "notes.csv"\n{more}\n'
        '[client]\ngenerator = "assets:tiny-slm"\ntask_model = "assets:tiny-slm"\nbudget = { epsilon = 8.0 }\n'
        '[server]\nllm = "assets:tiny-llm"\n'
    )
    code, error = typed(["run", "own.toml", "--out", "never"], tmp_path, capfd, monkeypatch)
    assert code == 2
    assert said in " ".join(error.split())
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("name", ["old", "old.private"])
def test_a_run_is_never_overwritten(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "summary.json").write_text("mine")
    code, error = typed(["run", "hospitals", "--out", "old"], tmp_path, capfd, monkeypatch)
    assert code == 2
    assert f"{name}' already holds something" in error
    assert (tmp_path / name / "summary.json").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.rglob("*")) == [name, "summary.json"]


def test_ctrl_c_ends_with_one_line_and_leaves_no_process(tmp_path: Path) -> None:
    before = marked()
    # A shell starts what stands in the background with SIGINT ignored, and children inherit that.
    child = subprocess.Popen(
        command("--clients", "2", "--out", "broken"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: (tmp_path / "broken" / "events.jsonl").exists())
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.splitlines()[-1] == "fedsynth: interrupted; nothing of the run is left running"
    wait_for(lambda: marked() <= before, seconds=20)


@pytest.mark.full
def test_a_worker_killed_in_round_1_is_replaced_and_all_rounds_complete_for_all_clients(tmp_path: Path) -> None:
    before = marked()
    slow = ["--set", "client.task_training.private_epochs=12", "--set", "rounds=3"]
    child = subprocess.Popen(
        command("--clients", "2", "--arms", "local", "--out", "killed", *slow),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: "learn" in _text(tmp_path / "killed" / "events.jsonl"))
    time.sleep(1)
    workers = [p for p in psutil.process_iter() if _is_worker(p, before)]
    assert workers
    workers[0].kill()
    _, said = child.communicate(timeout=240)
    assert child.returncode == 0, said
    assert "died" in _text(tmp_path / "killed.private" / "logs" / "flower.log")
    table = pd.read_parquet(tmp_path / "killed" / "metrics.parquet")
    found = table[table["metric"] == "accuracy"].groupby("round")["client"].apply(sorted).to_dict()
    assert found == {number: [0, 1] for number in (1, 2, 3)}
    wait_for(lambda: marked() <= before, seconds=20)


@pytest.mark.full
def test_run_from_python(tmp_path: Path) -> None:
    from fedsynth.scenario.toml import load

    scenario = load("hospitals", [*QUICK, "data.clients=2", 'run=["no_demonstrations"]'])
    events: list[dict[str, object]] = []
    result = fedsynth.run(scenario, out=tmp_path / "own", on_event=events.append)
    assert list(result.table.index) == ["no_demonstrations"]
    assert 0 <= result.table.loc["no_demonstrations", "accuracy"] <= 1
    assert {e.get("phase") for e in events} >= {"augment", "learn", "evaluate"}


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(condition: object, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def marked() -> set[int]:
    """Processes of any run that this test process started: they carry the marker in their environment."""
    return {p.pid for p in psutil.process_iter() if _carries_marker(p)}


def _carries_marker(process: psutil.Process) -> bool:
    try:
        environment = process.environ()
        return MARKER in environment and environment.get(SESSION) == os.environ[SESSION]
    except psutil.Error:
        return False


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _is_worker(process: psutil.Process, before: set[int]) -> bool:
    try:
        return process.pid not in before and "ray::" in " ".join(process.cmdline()) and _carries_marker(process)
    except psutil.Error:
        return False


def test_a_taken_port_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, error = typed(["run", "hospitals", "--out", "run", "--port", str(port)], tmp_path, capfd, monkeypatch)
    assert code == 1
    assert str(port) in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("fedsynth: the run failed: ")
