"""The launcher with real processes: how runs end, and that none leaves anything behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fedsynth.flower import Events, LaunchFailed
from fedsynth.launch import _Plan, _RunFailed, _watch, launch
from fedsynth.simulate import concurrency, gpu_share

ECHO = Path(__file__).parent / "data" / "echo_app"
TAG = "FEDSYNTH_TEST"  # inherited by everything that a test starts


@pytest.fixture(autouse=True)
def leftovers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """The processes of this test's runs that are still there; after every test there is none."""
    tag = uuid.uuid4().hex
    monkeypatch.setenv(TAG, tag)

    def find() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                # A Ray worker's title overwrites its environment: those are looked for by pid.
                ours = process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE
                if ours and process.pid != os.getpid():
                    found.append(f"{process.pid} {process.cmdline()}")
            except (psutil.Error, OSError):
                continue
        return found

    yield find
    assert find() == []


def echo(
    out: Path, on_event: Callable[[dict[str, Any]], None] | None = None, port: int | None = None, **config: Any
) -> None:
    launch(
        ECHO,
        run_config={"out-dir": str(out), **config},
        supernodes=2,
        workers=2,
        out=out,
        logs=out / "logs",
        on_event=on_event,
        port=port,
    )


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.full
def test_two_runs_side_by_side_complete_and_do_not_meet(tmp_path: Path) -> None:
    text = 'name = "two"\n[data]\nquoted = """it\'s"""\n'  # a scenario travels as one string of many lines
    seen: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}

    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(echo, tmp_path / name, seen[name].append, text=text + name) for name in seen]
        for run in runs:
            run.result()

    workers = {}
    for name, events in seen.items():
        started, *answers = events
        assert started["text"] == text + name
        assert sorted(answer["partition"] for answer in answers) == [0, 1]
        assert {Path(event["cwd"]).name for event in events} == {"cwd"}  # not the folder that pytest runs in
        assert not Path(started["cwd"]).exists()
        assert "Starting Flower Simulation" in (tmp_path / name / "logs" / "flower.log").read_text()
        workers[name] = {answer["pid"] for answer in answers}
    assert workers["a"].isdisjoint(workers["b"])
    assert not any(map(alive, workers["a"] | workers["b"]))


@pytest.mark.parametrize(
    ("flower", "own", "reason"),
    [
        ({"status": "finished:completed"}, {"status": "completed"}, None),
        ({"status": "finished:completed"}, {}, "without writing status.json"),  # as when every client failed
        ({"status": "finished:failed", "status-details": "it fell"}, {}, "it fell"),
        ({"status": "finished:failed", "status-details": "late"}, {"status": "completed"}, "late"),
        ({"status": "finished:stopped", "status-details": ""}, {}, "finished:stopped; SomeError: last words"),
        ({"status": "running"}, {"status": "failed", "reason": "ours"}, "ours"),
    ],
)
def test_a_run_has_completed_when_both_flower_and_the_run_say_so(
    tmp_path: Path, flower: dict[str, Any], own: dict[str, Any], reason: str | None
) -> None:
    plan = _Plan("", {}, 2, 2, 0.0, out=str(tmp_path), logs=str(tmp_path), port=0, marker="", log_from=0)
    (tmp_path / "status.json").write_text(json.dumps(own))
    (tmp_path / "flower.log").write_text("SomeError: last words\nfarewell\n")
    superlink: Any = SimpleNamespace(poll=lambda: None)
    with pytest.raises(_RunFailed, match=reason) if reason else nullcontext():
        _watch(plan, superlink, lambda: flower)


def test_only_whole_new_lines_are_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"of": "an earlier run"}\n')
    events = Events(path)
    with path.open("a") as file:
        file.write('{"n": 1}\n{"n":')
        file.flush()
        assert list(events.new()) == [{"n": 1}]
        file.write(" 2}\n")
    assert list(events.new()) == [{"n": 2}]


def test_own_status_ends_the_run_at_once(tmp_path: Path) -> None:
    started = []
    with pytest.raises(LaunchFailed, match=r"^the reason in words \(log: /.*/flower.log\)$"):
        echo(tmp_path, lambda _: started.append(time.monotonic()), behave="fail")
    assert time.monotonic() - started[0] < 20  # while the ServerApp would have slept for a minute


def test_unknown_key_of_run_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchFailed, match="Invalid run configuration"):
        echo(tmp_path, nonsense=1)


def test_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchFailed, match=f"port {port} on 127.0.0.1"):
            echo(tmp_path, port=port)


def test_killed_worker_fails_the_run(tmp_path: Path) -> None:
    workers: list[int] = []

    def kill_a_worker(event: dict[str, Any]) -> None:
        if event["event"] == "answer":
            workers.append(event["pid"])
        if event["event"] == "asked":
            time.sleep(0.5)  # the question has reached the worker
            os.kill(workers[0], signal.SIGKILL)

    with pytest.raises(LaunchFailed, match="clients failed") as failure:
        echo(tmp_path, kill_a_worker, sleep=3.0)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("victim", ["flower-superlink", "flwr-simulation"])
def test_death_of_flower_itself_fails_the_run(tmp_path: Path, victim: str) -> None:
    killed = []

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "started":
            simulation = psutil.Process(event["pid"])
            chain = [simulation, *simulation.parents()]
            next(p for p in chain if any(victim in word for word in p.cmdline())).kill()
            killed.append(time.monotonic())

    with pytest.raises(LaunchFailed, match=r"died in mid-run"):
        echo(tmp_path, kill)
    assert time.monotonic() - killed[0] < 20  # Flower itself notices after a minute


@pytest.mark.parametrize(("sent", "when"), [(signal.SIGINT, "asked"), (signal.SIGKILL, "started")])
def test_signal_to_the_launcher_takes_everything_down(
    tmp_path: Path, leftovers: Callable[[], list[str]], sent: signal.Signals, when: str
) -> None:
    code = "import sys, test_launch as t; from pathlib import Path\n"
    code += "t.echo(Path(sys.argv[1]), lambda e: print(t.json.dumps(e), flush=True), sleep=60.0)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    pids = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parent,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            event = json.loads(line)
            pids += [event["pid"]] if "pid" in event else []
            if event["event"] == when:
                child.send_signal(sent)
    assert child.returncode == -sent
    deadline = time.monotonic() + (
        0 if sent == signal.SIGINT else 10
    )  # nobody waits for the supervisor of a killed one
    while (left := leftovers()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert pids
    assert not any(map(alive, pids))


@pytest.mark.parametrize(
    ("gpus", "workers", "share"), [(0, 4, 0.0), (1, 1, 1.0), (1, 3, 0.3333), (2, 4, 0.5), (2, 3, 0.5), (4, 2, 1.0)]
)
def test_workers_share_gpus_evenly(monkeypatch: pytest.MonkeyPatch, gpus: int, workers: int, share: float) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert gpu_share(workers) == share
    assert share * -(-workers // max(gpus, 1)) <= 1  # Ray starts no worker for which no GPU has room


def test_memory_of_gpus_bounds_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: 9_500_000_000)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (34_000_000_000, 80_000_000_000))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=1000))
    count, said = concurrency(None, 100)
    assert count == 6  # 0.9 * 34 GB / 10 GB on each of two
    assert "on a GPU 10.0 GB each, 34 GB free" in said
