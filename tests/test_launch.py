"""The launcher with real processes: how runs end, and that none leaves anything behind."""

import contextlib
import json
import os
import shutil
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
from proxy import behind_a_dead_proxy

import fedsynth.simulation.launch as module
from fedsynth.simulation.flower import CommandRefused, Events, LaunchFailed, environment, ray_clocks
from fedsynth.simulation.launch import PARTS, AppRun, _parts, _Plan, _RunFailed, _watch, launch
from fedsynth.simulation.simulate import concurrency, gpu_share

ECHO = Path(__file__).parent / "data" / "echo_app"
TAG = "FEDSYNTH_TEST"  # inherited by everything that a test starts


@pytest.fixture(autouse=True)
def leftovers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """The processes of this test's runs that are still there; after every test there is none."""
    tag = uuid.uuid4().hex
    # Every run here passes proxies by that answer to nobody.
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**behind_a_dead_proxy({}), TAG: tag}.items():
        monkeypatch.setenv(name, value)

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
        AppRun(
            app=ECHO, run_config={"out-dir": str(out), **config}, supernodes=2, workers=2, out=out, logs=out / "logs"
        ),
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


def planned(folder: Path, start_seconds: float = 60.0) -> _Plan:
    return _Plan("", {}, 2, 2, 0.0, str(folder), str(folder), None, 0, start_seconds, marker="", log_from=0)


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
    plan = planned(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps(own))
    (tmp_path / "flower.log").write_text("SomeError: last words\nfarewell\n")
    superlink: Any = SimpleNamespace(poll=lambda: None)
    with pytest.raises(_RunFailed, match=reason) if reason else nullcontext():
        _watch(plan, superlink, lambda: flower)


class TestWhatARunStandsOn:
    """Processes that a run needs, played by this test."""

    LIVES, DEAD = SimpleNamespace(status=lambda: "sleeping"), SimpleNamespace(status=lambda: "zombie")

    @pytest.fixture
    def watch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def watch(parts: list[dict[str, Any]], said: list[Any], own: str = "", **plan: float) -> None:
            """Looks at processes, and asks Flower, until each list has one entry left, which stays."""
            found, told = iter(parts[:-1]), iter(said[:-1])
            monkeypatch.setattr(module, "_parts", lambda _: next(found, parts[-1]))
            monkeypatch.setattr(module, "ENDING_SECONDS", 0.0)
            monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
            monkeypatch.setattr(module.time, "sleep", lambda _: None)
            (tmp_path / "flower.log").touch()
            (tmp_path / "status.json").write_text(json.dumps({"status": own}))

            def status() -> dict[str, Any]:
                answer = next(told, said[-1])
                if isinstance(answer, Exception):
                    raise answer
                return {"status": answer}

            _watch(planned(tmp_path, **plan), SimpleNamespace(poll=lambda: None), status)

        return watch

    def test_a_simulation_that_flower_gave_up_before_it_began_is_followed_by_another(
        self, watch: Callable[..., None]
    ) -> None:
        sim = module.SIMULATION
        watch(
            [{sim: self.LIVES}, {sim: self.DEAD}, {}, {sim: self.LIVES}],
            ["pending", "starting", "finished:completed"],
            "completed",
        )

    @pytest.mark.parametrize(
        ("name", "status", "reason"),
        [
            (module.SIMULATION, "running", "the simulation process died in mid-run"),
            ("flower-superexec", "pending", "SuperExec died in mid-run"),
            ("raylet", "running", r"Ray's raylet died in mid-run: .*wait until the machine is less busy"),
            ("gcs_server", "starting", "Ray's gcs_server died in mid-run"),
        ],
    )
    def test_one_that_dies_ends_the_run_at_once(
        self, watch: Callable[..., None], name: str, status: str, reason: str
    ) -> None:
        begun = time.monotonic()
        with pytest.raises(_RunFailed, match=reason):
            watch([{name: self.LIVES}, {name: self.DEAD}], [status], start_seconds=3600.0)
        assert time.monotonic() - begun < 5

    def test_ray_is_ended_by_the_simulation_before_that_ends_itself(self, watch: Callable[..., None]) -> None:
        ended = {"raylet": self.DEAD, "gcs_server": self.DEAD}
        watch([ended, ended, {}], ["running", "running", "finished:completed"], "completed")

    def test_the_clock_of_the_start_is_named_with_the_time_and_the_way_out(self, watch: Callable[..., None]) -> None:
        said = r"has not started the simulation after \d+ s \(server.start_seconds\): .*raise that key"
        with pytest.raises(_RunFailed, match=said):
            watch([{}], ["pending"], start_seconds=0.05)

    def test_that_clock_is_not_one_of_the_run(self, watch: Callable[..., None]) -> None:
        watch([{}], ["running", "running", "finished:completed"], "completed", start_seconds=1e-9)

    def test_a_superlink_that_is_slow_to_answer_is_asked_again(self, watch: Callable[..., None]) -> None:
        slow = CommandRefused("timed out")
        watch([{module.SIMULATION: self.LIVES}, {}], [slow, slow, "finished:completed"], "completed")
        with pytest.raises(CommandRefused):
            watch([{}], [slow])


def test_ray_is_given_the_time_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", environment("m") | ray_clocks(1234.5))
    from ray._private import ray_constants

    code = "from ray._private import ray_constants as c; print(c.GCS_SERVER_REQUEST_TIMEOUT_SECONDS)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=dict(os.environ)) == "1235\n"
    assert ray_constants.RAY_WORKER_NICENESS in os.environ
    # Of the others its programs read the names, which are in them.
    program = (Path(ray_constants.__file__).parents[1] / "core/src/ray/raylet/raylet").read_bytes()
    for name in set(ray_clocks(1)) - {"RAY_NUM_REDIS_GET_RETRIES"} | {"RAY_worker_niceness"}:
        assert name.encode() in program, name


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
    niceness: list[int] = []

    def kill_a_worker(event: dict[str, Any]) -> None:
        if event["event"] == "answer":
            workers.append(event["pid"])
            niceness.append(psutil.Process(event["pid"]).nice())
        if event["event"] == "asked":
            time.sleep(0.5)  # the question has reached the worker
            os.kill(workers[0], signal.SIGKILL)

    with pytest.raises(LaunchFailed, match="clients failed") as failure:
        echo(tmp_path, kill_a_worker, sleep=3.0)
    assert "\n" not in str(failure.value)
    assert niceness == [psutil.Process().nice()] * 2  # the launcher's own: by default Ray's workers stand back by 15


FULL = [pytest.param(name, marks=pytest.mark.full) for name in ("flower-superexec", "raylet")]


@pytest.mark.parametrize("victim", ["flower-superlink", "flwr-simulation", *FULL])
def test_death_of_flower_itself_fails_the_run(tmp_path: Path, victim: str) -> None:
    killed = []

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "started":
            simulation = psutil.Process(event["pid"])
            while not (found := named(simulation, victim)):  # Ray starts beside the ServerApp
                time.sleep(0.02)
            found[0].kill()
            killed.append(time.monotonic())

    with pytest.raises(LaunchFailed, match=r"died in mid-run"):
        echo(tmp_path, kill)
    assert killed
    assert time.monotonic() - killed[0] < 20  # Flower itself notices after a minute


def test_a_program_of_ray_that_died_before_anybody_looked_is_seen(tmp_path: Path) -> None:
    sleep = shutil.which("sleep")
    assert sleep
    started = [subprocess.Popen([shutil.copy(sleep, tmp_path / name), "60"]) for name in ("raylet", "flwr-simulation")]
    for process in started:
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    try:
        assert {name: part.pid for name, part in _parts(PARTS).items()} == {"raylet": started[0].pid}
    finally:
        for process in started:
            process.wait()


STRANGER = """
import ray, sys
try:
    ray.init(address=sys.argv[1], logging_level="ERROR")
except ConnectionError as refused:
    sys.exit(str(refused))
"""


@pytest.mark.full
def test_nobody_but_the_run_can_have_code_run_by_its_workers(tmp_path: Path) -> None:
    said = []

    def visit(event: dict[str, Any]) -> None:
        if event["event"] == "asked":
            [raylet] = named(psutil.Process(children[0]), "raylet")
            [address] = [word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--gcs-address=")]
            env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
            said.append(
                subprocess.run(
                    [sys.executable, "-c", STRANGER, address], env=env, capture_output=True, text=True, check=False
                ).stderr
            )
        elif event["event"] == "started":
            children.append(event["pid"])

    children: list[int] = []
    echo(tmp_path, visit, sleep=30.0)
    assert "Failed to connect to Ray cluster" in said[0]


def named(simulation: psutil.Process, victim: str) -> list[psutil.Process]:
    around = [simulation, *simulation.parents(), *simulation.children(recursive=True)]
    found = []
    for process in around:
        with contextlib.suppress(psutil.Error):
            found += [process] if any(victim == Path(word).name for word in process.cmdline()[:2]) else []
    return found


@pytest.mark.parametrize(
    ("sent", "when"), [(signal.SIGINT, "asked"), pytest.param(signal.SIGKILL, "started", marks=pytest.mark.full)]
)
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
