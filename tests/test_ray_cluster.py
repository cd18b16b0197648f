"""A run on a Ray cluster: its room, its workers, and docs/deployment/ray-cluster.md on two machines of namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from flwr.supercore.task_identity import TaskIdentity
from ray.exceptions import RayActorError
from test_recipes import PAGES, Terminal, blocks, needs
from test_run import assert_alike

from fedsynth.app.fedsynth_sim import workers
from fedsynth.federation.nodes import TooFewReplies, nodes_by_client
from fedsynth.federation.run.directory import private_of
from fedsynth.privacy.audit import contents, ledgers_in, problems
from fedsynth.simulation.cluster import cluster_at, cluster_environment, room
from fedsynth.simulation.flower import ray_clocks
from fedsynth.simulation.simulate import run
from fedsynth.typed import BadValue

# ---- without a cluster ----


def test_each_cpu_is_a_worker() -> None:
    found = room("a:1", [{"CPU": 16.0}, {"CPU": 2.0, "memory": 1e9}, {"node:head": 1.0}])
    assert (found.workers, found.machines, found.gpu_share) == (18, 3, 0.0)
    assert str(found) == "18 workers on 3 machines of the Ray cluster at a:1"
    assert str(room("a:1", [{"CPU": 1.0}])) == "1 worker on 1 machine of the Ray cluster at a:1"


def test_machines_without_a_gpu_stand_by_where_others_have_one_and_no_gpu_gets_more_workers_than_fit() -> None:
    found = room("a:1", [{"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}])
    assert found.workers == 11
    assert found.gpu_share == 0.25  # four on each of two; three on the other
    # Flower's own count of what fits, machine by machine.
    assert sum(min(int(cpus), int(gpus / found.gpu_share)) for cpus, gpus in ((8, 2), (3, 1))) == found.workers


@pytest.mark.parametrize("machines", [[{"CPU": 0.0}], [{}], [{"CPU": 4.0}, {"GPU": 1.0}]])
def test_a_cluster_without_a_cpu_for_clients_is_refused(machines: list[dict[str, float]]) -> None:
    with pytest.raises(BadValue, match=r"of the Ray cluster at a:1 has a CPU for clients: ray start --num-cpus=N"):
        room("a:1", machines)


@pytest.mark.parametrize("address", ["first", "auto", "ray://first:10001", ":6379", "first:many", ""])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(BadValue, match=r"--ray needs the HOST:PORT of a Ray cluster's first machine, got"):
        cluster_at(address)


def test_an_address_where_nothing_listens_is_named_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        with pytest.raises(BadValue, match=rf"no Ray cluster answers at 127.0.0.1:{port} .*ray start --head"):
            cluster_at(f"127.0.0.1:{port}")


def test_workers_are_the_clusters(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="leave --workers out with --ray"):
        run("hospitals", out=tmp_path / "run", workers=2, ray="first:6379")
    assert not (tmp_path / "run").exists()


def test_of_the_callers_environment_a_cluster_gets_folders_and_its_own_secret_only() -> None:
    caller = {
        "RAY_AUTH_TOKEN": "t",
        "RAY_ADDRESS": "other:1",
        "FEDSYNTH_DATA": "/d",
        "OPENAI_API_KEY": "k",
        "HOME": "/h",
    }
    found = cluster_environment("first:6379", caller, "mark")
    job = json.loads(found.pop("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    assert found == {"RAY_ADDRESS": "first:6379", "RAY_AUTH_TOKEN": "t"}
    told = job["runtime_env"]["env_vars"]
    assert told["FEDSYNTH_DATA"] == "/d"
    assert told["FEDSYNTH_RUN"] == "mark"
    assert not {"OPENAI_API_KEY", "HOME", "RAY_AUTH_TOKEN"} & set(told)


class Played:
    """Ray, played: a worker is "up", "starting" or "dead"; a call's answer is the worker itself."""

    exceptions = SimpleNamespace(RayError=RayActorError)

    def __init__(self) -> None:
        self.state: dict[str, str] = {}
        self.made = 0

    def worker(self, name: str, state: str) -> Any:
        self.state[name] = state
        return Handle(name)

    def wait(self, calls: list[str], timeout: float) -> tuple[list[str], list[str]]:
        there = [call for call in calls if self.state[call] != "starting"]
        return there, [call for call in calls if call not in there]

    def get(self, call: str) -> None:
        if self.state[call] == "dead":
            raise RayActorError


class Handle:
    """Ray's handle of a worker; its call `__ray_ready__` is the worker's name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.__dict__["__ray_ready__"] = SimpleNamespace(remote=lambda: name)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    ray = Played()
    monkeypatch.setattr(workers, "ray", ray)
    monkeypatch.setattr(workers, "_silent", {})
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.001)
    return ray


def pool_of(ray: Played, **states: str) -> Any:
    def more() -> Any:
        ray.made += 1
        return ray.worker(f"new-{ray.made}", "starting")  # no machine has room for it

    given = [ray.worker(name, state) for name, state in states.items()]
    return SimpleNamespace(pool=given, _future_to_actor={}, create_actor_fn=more)


JOB = ("this", "message", "partition", "context")


def sent(worker: Any, *job: Any) -> str:
    assert job == JOB
    return f"{worker.name} does this"


def test_a_message_goes_to_a_worker_that_is_up_not_to_one_that_died_idle_or_never_starts(played: Played) -> None:
    states = {"lost": "dead", "waits": "starting", "works": "up", "lost-too": "dead"}
    pool = pool_of(played, **states)
    assert workers._submit(pool, sent, JOB) == "works does this"
    assert [worker.name for worker in pool._future_to_actor.values()] == ["works"]
    # What Flower does: the last one of the pool, dead or not.
    flowers = pool_of(played, **states)
    assert BasicActorPool.__dict__["submit"](flowers, sent, JOB) == "lost-too does this"


def test_each_worker_that_died_idle_is_replaced_once(played: Played) -> None:
    pool = pool_of(played, lost="dead", works="up")
    workers._submit(pool, sent, JOB)
    assert sorted(worker.name for worker in pool.pool) == ["new-1"]
    assert workers._one_that_is_up(pool) is None
    assert sorted(worker.name for worker in pool.pool) == ["new-1"]


def test_a_message_waits_until_a_worker_is_up(played: Played) -> None:
    pool = pool_of(played, waits="starting")
    said: list[str] = []
    waiting = threading.Thread(target=lambda: said.append(workers._submit(pool, sent, JOB)))
    waiting.start()
    time.sleep(0.1)
    assert said == []
    played.state["waits"] = "up"
    waiting.join(10)
    assert said == ["waits does this"]


class Asked:
    """A grid of one SuperNode whose worker dies over the first questions."""

    def __init__(self, deaths: int) -> None:
        self.left = deaths

    def get_node_ids(self) -> list[int]:
        return [7]

    def send_and_receive(self, asked: list[Any], timeout: float) -> list[Any]:
        assert len(asked) == 1
        if self.left:
            self.left -= 1
            return [_reply(has_error=lambda: True, error=SimpleNamespace(reason="The actor died"))]
        facts = {"partition-id": 0, "num-partitions": 1}
        return [_reply(has_error=lambda: False, content={"who": facts})]


def _reply(**parts: Any) -> Any:
    return SimpleNamespace(metadata=SimpleNamespace(src_node_id=7), **parts)


def test_a_worker_that_dies_over_the_question_who_is_asked_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower's, of the process that makes a message
        monkeypatch.setattr(TaskIdentity, name, 1)
    assert nodes_by_client(cast(Any, Asked(2)), 3) == {0: 7, 1: 7, 2: 7}
    with pytest.raises(TooFewReplies, match="could not run the client app: The actor died"):
        nodes_by_client(cast(Any, Asked(3)), 3)


# ---- two machines ----

LONG = 1500.0  # seconds: on a busy machine
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SMALL = [
    "client.generator_training.steps=20",
    "client.task_training.augmented_epochs=1",
    "client.task_training.private_epochs=1",
    "data.test_per_client=40",
    "data.train_per_client=60",
    "strategy.num_texts=16",
    "strategy.per_label=3",
]
SETS = [word for each in SMALL for word in ("--set", each)] + ["--clients", "3", "--arms", "fdkt"]


class Machine:
    """A process that stands for a machine: with a network, process ids, /dev/shm and temporary files of its own."""

    def __init__(self, own: Path, users: int) -> None:
        setup = f"mount -t tmpfs none {own} && mount -t tmpfs none /dev/shm && ip link set lo up && echo up"
        inside = ["nsenter", "--target", str(users), "--user", "--preserve-credentials"]
        apart = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._process = subprocess.Popen(
            [*inside, *apart, "sh", "-c", f"{setup} && exec sleep 1000000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        if self._process.stdout.readline() != "up\n":
            raise OSError(self._process.stderr.read().strip())
        [self.first] = psutil.Process(self._process.pid).children()

    def within(self, *namespaces: str) -> list[str]:
        """The command that starts another one in this machine."""
        which = namespaces or ("--net", "--mount", "--pid")
        return ["nsenter", "--target", str(self.first.pid), "--user", "--preserve-credentials", *which]

    def processes(self) -> list[psutil.Process]:
        """All that run in it."""
        own, found = os.readlink(f"/proc/{self.first.pid}/ns/pid"), []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == own:
                    found.append(process)
        return found

    def lose(self) -> None:
        """As if its plug were pulled: all its processes die at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.first.send_signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def two_machines(own: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two machines with a cable between them, of one user without rights; skipped where the system refuses them."""
    for program in ("unshare", "nsenter", "ip"):
        needs(program)
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "sh", "-c", "echo up; exec sleep 1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    made: list[Machine] = []
    assert holder.stdout is not None
    assert holder.stderr is not None
    try:
        if holder.stdout.readline() != "up\n":
            pytest.skip(f"no user namespaces here: {holder.stderr.read().strip()}")
        try:
            made += [Machine(own, holder.pid)]
            made += [Machine(own, holder.pid)]
            _connect(*made)
        except OSError as refused:
            pytest.skip(f"no network namespaces here: {refused}")
        yield made[0], made[1]
    finally:
        for machine in made:
            machine.lose()
        holder.kill()
        holder.wait()
        holder.stdout.close()
        holder.stderr.close()


def _connect(first: Machine, second: Machine) -> None:
    # The address is not the cable's: a machine keeps its own when the other one, and the cable with it, is gone.
    address = "ip addr add {own} dev lo && ip link set wire up && ip route add {other} dev wire src {own}"
    default = "ip route add default dev wire src {own}"  # Ray takes the address of the default route
    cable = ["ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", str(second.first.pid)]
    ends = [
        [*machine.within(), "sh", "-c", f"{address} && {default}".format(own=own, other=other)]
        for machine, own, other in ((first, *ADDRESSES), (second, *reversed(ADDRESSES)))
    ]
    for command in ([*first.within("--net"), *cable], *ends):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip())


class Cluster:
    """The page's cluster, started by its own lines."""

    def __init__(self, machines: tuple[Machine, Machine], folder: Path, own: Path) -> None:
        self.second, self.folder = machines[1], folder
        self.page = PAGES / "ray-cluster.md"
        key, secret, head, other, self.run, self.resume, self.stop = (
            block.replace("FIRST-MACHINE", ADDRESSES[0]) for block in blocks(self.page, "bash")
        )
        self.shells = [Terminal(folder, folder / f"{i}.log", machine.within()) for i, machine in enumerate(machines)]
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        for shell in self.shells:  # a machine of its own knows nothing of this one's settings, nor where it stands
            settings = f"TMPDIR={own} HOME={folder}/home PATH={folder}/bin:{programs}"
            clocks = " ".join(f"{name}={value}" for name, value in ray_clocks(LONG).items())  # on a busy machine
            shell.type(f"cd {folder}; export {settings} {clocks}; unset http_proxy https_proxy")
        self.typed(0, key)
        for shell, start in zip(self.shells, (head, other), strict=True):
            shell.type(secret)
            # A machine of this test is a small one.
            shell.type(start.replace("--num-cpus=16", "--num-cpus=1 --object-store-memory=100000000"))
            shell.wait(LONG)
            assert "Ray runtime started" in shell.said(), shell.said()

    def typed(self, machine: int, block: str, seconds: float = LONG) -> str:
        """What is said to a block, which must succeed."""
        shell = self.shells[machine]
        before = len(shell.said())
        shell.type(block)
        shell.wait(seconds)
        said = shell.said()[before:]
        assert f"done-{shell.done} 0" in said, said[-3000:]
        return said

    def close(self) -> None:
        for shell in self.shells:
            assert shell.shell.stdin is not None
            shell.shell.kill()
            shell.shell.communicate()

    def busy(self) -> bool:
        """True while a client works on the second machine."""
        return any(_title(process) == "ray::ClientAppActor.run" for process in self.second.processes())


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "home").mkdir()
    own = Path(tempfile.mkdtemp(prefix="fs", dir="/tmp"))  # short: Ray's sockets lie below it
    try:
        with two_machines(own) as machines:
            made = Cluster(machines, folder, own)
            yield made
            made.close()
    finally:
        shutil.rmtree(own, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one machine."""
    out = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "fedsynth.cli.main", "run", "hospitals", *SETS, "--workers", "1"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=LONG)
    return out


def waits(condition: Any, what: str, seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def charged(out: Path) -> list[Any]:
    """All ledgers below a private directory, but for the time of day."""
    found = [contents(path) for path in ledgers_in(out)]
    assert [problems(ledger) for ledger in found] == [[]] * 3
    told = [(ledger["epsilon"], [*ledger["reservations"], *ledger["grants"]]) for ledger in found]
    return [(epsilon, [{k: v for k, v in row.items() if k != "at"} for row in rows]) for epsilon, rows in told]


@pytest.mark.deployment
@pytest.mark.full
@pytest.mark.timeout(2 * LONG)
def test_the_page_runs_on_two_machines_to_the_results_of_one(cluster: Cluster, alone: Path) -> None:
    shell = cluster.shells[0]
    shell.type(f"{cluster.run.strip()} {' '.join(SETS)}")
    waits(cluster.busy, "no client worked on the second machine")
    shell.wait(LONG)
    said, out = shell.said(), cluster.folder / "runs" / "hospitals"
    assert "2 workers on 2 machines of the Ray cluster at 10.77.0.1:6379" in said, said[-3000:]
    assert json.loads((out / "status.json").read_text()) == {"status": "completed"}, said[-3000:]
    assert_alike(alone, out)
    assert charged(private_of(out)) == charged(private_of(alone))
    assert not list((private_of(out) / "logs").glob("fedsynth-*"))  # Flower's folder is gone
    assert "fdkt" in cluster.typed(0, cluster.resume)  # a run that is done is read


@pytest.mark.deployment
@pytest.mark.full
@pytest.mark.timeout(2 * LONG)
def test_without_the_secret_nobody_runs_on_it(cluster: Cluster) -> None:
    shell = cluster.shells[0]
    line = cluster.run.strip().replace("runs/hospitals", "runs/refused")
    shell.type(f"env -u RAY_AUTH_TOKEN_PATH -u RAY_AUTH_MODE {line}")
    shell.wait(LONG)
    assert f"the Ray cluster at {ADDRESSES[0]}:6379 cannot be used from here" in " ".join(shell.said().split())
    assert not (cluster.folder / "runs" / "refused").exists()


@pytest.mark.deployment
@pytest.mark.full
@pytest.mark.timeout(2 * LONG)
def test_a_machine_that_is_lost_in_mid_run_changes_no_result(cluster: Cluster, alone: Path) -> None:
    out, shell = cluster.folder / "runs" / "lost", cluster.shells[0]
    shell.type(f"{cluster.run.strip().replace('runs/hospitals', 'runs/lost')} {' '.join(SETS)}")
    events = out / "events.jsonl"
    waits(lambda: events.exists() and '"synthesize"' in events.read_text(), "no training began")
    waits(cluster.busy, "no client trained on the second machine")
    cluster.second.lose()
    assert '"learn"' not in events.read_text()  # in mid-training
    shell.wait(LONG)
    assert f"written to {out}" in shell.said(), shell.said()[-3000:]
    assert re.search("Actor(Died|Unavailable)Error", (private_of(out) / "logs" / "flower.log").read_text())
    assert_alike(alone, out)
    assert charged(private_of(out)) == charged(private_of(alone))
    cluster.typed(0, cluster.stop)
