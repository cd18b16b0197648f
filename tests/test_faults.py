"""Faults between real processes: each ends in a run that goes on, or in one clear line, with privacy spent once.

What is done is done with the means that the docstrings name; nothing is simulated but where they say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import instructed
import psutil
import pytest
from deployment import START_SITE, Federation, Running, federation, fedsynth, spawn
from proxy import Proxy
from test_deployment import scenario as classes

from fedsynth.clients.audit_log import entries
from fedsynth.deployment.certificates import write_certificates, write_node_keys
from fedsynth.deployment.policy import load_site
from fedsynth.privacy.audit import contents
from fedsynth.privacy.ledger_file import LedgerUnusable
from fedsynth.simulation.flower import OWNER, free_port, marked

pytestmark = [pytest.mark.deployment, pytest.mark.full, pytest.mark.timeout(420)]
NAMES = ("north", "south")
HEARTBEATS = 75.0  # seconds after which Flower takes a site for gone: two intervals of 30 s, and some


def until(found: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    """What `found` finds, as soon as it does."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.03)
    return result


def kill(running: Running) -> None:
    """SIGKILL to a program and to all that it started, at once."""
    processes = [psutil.Process(running.process.pid), *running.descendants()]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    running.process.wait(20)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@dataclass
class Hall:
    """A coordinator and two sites whose noise is a simulation's, so that each run can be held against one."""

    federation: Federation
    proxy: Proxy  # between north and the server
    text: str  # of the scenario
    fault: str = ""
    latest: Running | None = None  # run

    def begin(self, fault: str) -> None:
        """New accounts for a fault."""
        self.fault = fault
        self.federation.new_accounts(fault)

    def submit(self, *arguments: object) -> Running:
        """A run in the background."""
        command = [
            sys.executable,
            "-P",
            "-m",
            "fedsynth.cli.main",
            "run",
            *arguments,
            "--server",
            self.federation.coordinator,
        ]
        self.latest = spawn(command, self.federation.folder, self.federation.folder / f"{self.fault}.log")
        return self.latest

    def run(self) -> Running:
        return self.submit(self.federation.coordinator / "scenario.toml", "--out", self.out)

    def resume(self) -> Running:
        return self.submit("--resume", self.out)

    @property
    def out(self) -> Path:
        return self.federation.folder / self.fault

    def grants(self, name: str) -> list[str]:
        """States of a site's grants."""
        try:
            return [grant["state"] for grant in contents(load_site(self.federation.place(name)).ledger)["grants"]]
        except LedgerUnusable:
            return []

    def charged_once(self, tmp_path: Path) -> None:
        """Each site has paid for the run's two rounds, once; and what was released is what a simulation releases."""
        for name in NAMES:
            account = instructed.account(load_site(self.federation.place(name)).ledger)
            assert [grant["state"] for grant in account["grants"]] == ["sent", "sent"]
            assert len(account["reservations"]) == 1
            assert account["epsilon"] <= 8.0
        run = json.loads((self.out / "deployment.json").read_text())["run"]
        assert instructed.same(
            instructed.simulated(self.text, tmp_path / "simulated", run), instructed.adapters(self.out)
        )

    def nothing_left(self) -> None:
        """No process works on any more, but for those that stand."""

        def idle() -> bool:
            programs = [p for p in (*self.federation.sites.values(), self.federation.server) if p is not None]
            alive = [program for program in programs if program.process.poll() is None]
            below = {p.pid for program in alive for p in program.descendants() if _works(p)}
            places = [self.federation.coordinator / "flower"]
            places += [load_site(self.federation.place(name)).state for name in NAMES]
            marks = [(place / OWNER).read_text() for place in places if (place / OWNER).exists()]
            # A site stands with three programs, the server with two; what bears their marks is one of them.
            standing = sum(2 if program is self.federation.server else 3 for program in alive)
            return len(below) == standing and {p.pid for m in marks for p in marked(m) if _works(p)} <= below

        until(idle, "everything ended", 40)


def _works(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hall]:
    folder = tmp_path_factory.mktemp("hall")
    text = instructed.scenario(folder, NAMES, steps=30)
    (folder / "scenario.toml").write_text(text)
    port = free_port()
    proxy = Proxy(port)
    data = instructed.records(NAMES)
    with federation(folder, folder / "scenario.toml", data, port=port, **instructed.SITE_TOML) as made:
        file = made.place("north") / "site.toml"
        file.write_text(file.read_text().replace(f":{port}", f":{proxy.port}"))
        for name in NAMES:
            made.start_site(name, injected=True, wait=False)
        yield Hall(made, proxy, text)
        for site in made.sites.values():
            site.end()
        assert made.server is not None
        made.server.end()
        proxy.close()


@pytest.fixture
def hall(standing: Hall) -> Iterator[Hall]:
    """With everything that should stand."""
    if standing.federation.server is None or standing.federation.server.process.poll() is not None:
        standing.federation.start_server()
    for name in NAMES:
        if standing.federation.sites[name].process.poll() is not None:
            standing.federation.start_site(name, injected=True)
    yield standing
    if standing.latest is not None and standing.latest.process.poll() is None:  # the test has failed
        standing.latest.end(signal.SIGINT)


def test_a_site_killed_in_mid_training_goes_on_when_it_is_started_again(hall: Hall, tmp_path: Path) -> None:
    """Means: SIGKILL to `site start`, the SuperNode, the SuperExec, the warm process and its child, while the ledger
    says `running`."""
    hall.begin("killed")
    run = hall.run()
    until(lambda: hall.grants("north") == ["running"], "north trains")
    kill(hall.federation.sites["north"])
    assert hall.grants("north") == ["running"]
    hall.federation.start_site("north", injected=True, wait=False)
    assert run.process.wait(200) == 0, run.said()
    hall.charged_once(tmp_path)
    hall.nothing_left()


def test_a_message_whose_process_is_killed_is_answered_after_all(hall: Hall, tmp_path: Path) -> None:
    """Means: SIGKILL to the child that handles the message, as the system does where memory is short, while the ledger
    says `running`. Flower finds its missing heartbeats out, the server asks again, and the site goes on."""
    hall.begin("message")
    run = hall.run()
    until(lambda: hall.grants("north") == ["running"], "north trains")
    serving = [p for p in hall.federation.sites["north"].descendants() if "serve" in p.cmdline()]
    [child] = [p for p in serving if p.ppid() in {other.pid for other in serving}]
    child.kill()
    assert run.process.wait(280) == 0, run.said()
    hall.charged_once(tmp_path)
    hall.nothing_left()


def test_a_network_cut_for_longer_than_heartbeats_is_survived(hall: Hall, tmp_path: Path) -> None:
    """Means: the TCP proxy before the site drops its connections in mid-training, and closes new ones at once for 75 s:
    Flower takes the site for gone meanwhile."""
    hall.begin("cut")
    run = hall.run()
    until(lambda: hall.grants("north") == ["running"], "north trains")
    hall.proxy.cut(HEARTBEATS)
    assert run.process.wait(240) == 0, run.said()
    hall.charged_once(tmp_path)
    hall.nothing_left()


def test_a_superlink_killed_in_mid_run_is_started_again_and_the_run_is_resumed(hall: Hall, tmp_path: Path) -> None:
    """Means: SIGKILL to `server start`, the SuperLink, the SuperExec and the ServerApp while a site trains; started
    again on its database."""
    hall.begin("superlink")
    run = hall.run()
    until(lambda: hall.grants("north") == ["running"], "north trains")
    assert hall.federation.server is not None
    kill(hall.federation.server)
    assert run.process.wait(60) == 1
    said = run.said().strip().splitlines()[-1]
    assert "the SuperLink answers no more" in said
    assert f"fedsynth run --resume {hall.out}" in said
    hall.federation.start_server()
    again = hall.resume()
    assert again.process.wait(240) == 0, again.said()
    hall.charged_once(tmp_path)
    hall.nothing_left()


def test_a_serverapp_killed_between_exchanges_is_resumed(hall: Hall, tmp_path: Path) -> None:
    """Means: SIGKILL to the ServerApp's process once both sites have answered the first round."""
    hall.begin("serverapp")
    run = hall.run()
    until(lambda: all(hall.grants(name)[:1] == ["sent"] for name in NAMES), "both have answered")
    until(lambda: list(hall.out.rglob("exchange-2.asked")), "the second exchange begins")
    [app] = [p for p in hall.federation.server.descendants() if "flwr-serverapp" in " ".join(p.cmdline()[:2])]
    app.kill()
    assert run.process.wait(120) == 1
    assert "fedsynth run --resume" in run.said().strip().splitlines()[-1]
    again = hall.resume()
    assert again.process.wait(240) == 0, again.said()
    hall.charged_once(tmp_path)
    hall.nothing_left()


def site_file(hall: Hall, name: str = "north") -> Path:
    return hall.federation.place(name) / "site.toml"


@contextlib.contextmanager
def edited(file: Path, **changes: str) -> Iterator[None]:
    """A site.toml with other lines, by their keys, for a while."""
    before = file.read_text()
    text = before
    for key, value in changes.items():
        text, found = re.subn(rf"(?ms)^{key} = (\[\n.*?^\]|[^\n]*)", f"{key} = {value}" if value else "", text)
        assert found == 1, f"{key}:\n{before}"
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(before)


def stopped(hall: Hall, name: str = "north") -> None:
    if hall.federation.sites[name].process.poll() is None:
        hall.federation.sites[name].end()


def last_line(running: Running) -> str:
    return running.said().strip().splitlines()[-1]


@pytest.fixture
def small_disk(hall: Hall) -> Iterator[Path]:
    """A file system of its own for the state of a site."""
    place = hall.federation.place("north") / "small"
    place.mkdir()
    options = f"size={2**30 + 2**26},mode=700"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=False).returncode:
        pytest.skip("no file system may be mounted here: this test needs CAP_SYS_ADMIN")
    yield place
    stopped(hall)
    subprocess.run(["umount", place], check=True)


def fill(place: Path) -> None:
    """Until nothing more goes in."""
    with (place / "filling").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**22))
    with (place / "filling").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1))


def test_a_full_disk_at_a_site_ends_the_run_in_one_line_and_it_goes_on_when_there_is_room(
    hall: Hall, small_disk: Path, tmp_path: Path
) -> None:
    """Means: a tmpfs of 1.06 GiB is mounted as the state folder, and filled to the last byte in mid-training."""
    hall.begin("disk")
    stopped(hall)
    with edited(site_file(hall), state='"small"'):
        fill(small_disk)
        refused = fedsynth("site", "start", hall.federation.place("north"), cwd=tmp_path, code=2)
        assert "0 MiB free: make room" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        (small_disk / "filling").unlink()
        site = hall.federation.start_site("north", injected=True)
        run = hall.run()
        until(lambda: hall.grants("north") == ["running"], "north trains")
        fill(small_disk)
        assert run.process.wait(120) == 1
        assert "site 'north' refused: disk_full" in last_line(run)
        assert "fedsynth run --resume" in last_line(run)
        assert f"no room is left in {small_disk}" in site.said()
        (small_disk / "filling").unlink()
        again = hall.resume()
        assert again.process.wait(240) == 0, again.said()
        hall.charged_once(tmp_path)
        hall.nothing_left()
        assert list(entries(small_disk / "audit.jsonl"))


SKEW = """\
import datetime, importlib.abc, importlib.machinery, sys, time

AHEAD, clock = 60.0, time.time
time.time = lambda: clock() + AHEAD


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "flwr.supercore.date":  # where Flower asks for the time
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            now = module.now
            module.now = lambda: now() + datetime.timedelta(seconds=AHEAD)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


def test_a_clock_that_is_off_is_named_by_the_check_and_by_the_start(hall: Hall, tmp_path: Path) -> None:
    """Means: a `sitecustomize` by which the Python programs of one site read a clock that is 60 s ahead; the clock of a
    whole machine is not set, which would need a machine of its own."""
    stopped(hall)
    (tmp_path / "sitecustomize.py").write_text(SKEW)
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    said = "ahead of the server's: set it by NTP"
    place = hall.federation.place("north")
    checked = spawn(
        [sys.executable, "-P", "-m", "fedsynth.cli.main", "site", "check", place, "--json"],
        tmp_path,
        tmp_path / "check.log",
        **path,
    )
    assert checked.process.wait(120) == 1
    findings = [json.loads(line) for line in checked.said().splitlines() if line.startswith("{")]
    assert [f["what"] for f in findings if f["state"] == "problem"] == ["clock"]
    assert said in next(f["says"] for f in findings if f["what"] == "clock")
    started = spawn(
        [sys.executable, "-P", "-m", "fedsynth.cli.main", "site", "start", place],
        tmp_path,
        tmp_path / "start.log",
        **path,
    )
    assert started.process.wait(120) == 1
    assert said in last_line(started)
    hall.nothing_left()


def test_a_site_with_a_key_that_nobody_registered_gets_nothing(hall: Hall, tmp_path: Path) -> None:
    """Means: the site shows a new key. It is refused for as long as a site that was killed would be; here 3 s."""
    stopped(hall)
    place = hall.federation.place("north")
    write_node_keys(place / "keys" / "other", tmp_path / "other.pub")
    impatient = f"import fedsynth.deployment.site.supernode as watch\nwatch.REFUSED_SECONDS = 3\n{START_SITE}"
    with edited(site_file(hall), private_key='"keys/other"'):
        command = [sys.executable, "-P", "-c", impatient, place, 0, "-m", "fedsynth.deployment.client_process"]
        started = spawn(command, tmp_path, tmp_path / "start.log")
        assert started.process.wait(120) == 1
    assert "did not let this site in" in last_line(started)
    assert "send north.pub to the coordinator" in last_line(started)
    assert "SuperNode ID" not in started.said()
    hall.nothing_left()


def test_a_server_whose_certificate_has_expired_is_neither_started_nor_trusted(hall: Hall, tmp_path: Path) -> None:
    """Means: certificates that were valid until yesterday; a SuperLink that uses them is started by hand."""
    port, coordinator = free_port(), tmp_path / "coordinator"
    fedsynth(
        "server",
        "init",
        coordinator,
        "--port",
        port,
        "--scenario",
        hall.federation.coordinator / "scenario.toml",
        "--test-certificates",
        cwd=tmp_path,
    )
    shutil.rmtree(coordinator / "certificates")
    write_certificates(coordinator / "certificates", ["127.0.0.1"], days=-1)
    refused = fedsynth("server", "start", coordinator, cwd=tmp_path, code=2)
    [line] = refused.stderr.strip().splitlines()
    assert "has expired" in line
    assert "put a new one there" in line

    stopped(hall)
    at = coordinator / "certificates"
    superlink = spawn(
        [
            "flower-superlink",
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--ssl-certfile",
            at / "server.crt",
            "--ssl-keyfile",
            at / "server.key",
            "--ssl-ca-certfile",
            at / "ca.crt",
        ],
        tmp_path,
        tmp_path / "superlink.log",
        FLWR_HOME=str(tmp_path / "flower"),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    try:
        superlink.wait_for("Uvicorn running")
        place = hall.federation.place("north")
        with edited(site_file(hall), address=f'"127.0.0.1:{port}"', root_certificates=json.dumps(str(at / "ca.crt"))):
            checked = fedsynth("site", "check", place, "--json", cwd=tmp_path, code=1)
            problems = [json.loads(line) for line in checked.stdout.splitlines()]
            [found] = [p for p in problems if p["state"] == "problem"]
            assert found["what"] == "certificate"
            assert "certificate has expired; ask the coordinator" in found["says"]
            started = fedsynth("site", "start", place, cwd=tmp_path, code=1)
            assert "certificate has expired; ask the coordinator" in started.stderr.strip().splitlines()[-1]
    finally:
        superlink.end()
    hall.nothing_left()


def test_a_site_with_other_labels_refuses_by_a_code_and_keeps_the_labels_to_itself(hall: Hall, tmp_path: Path) -> None:
    """Means: site.toml lists a label that the scenario has not."""
    hall.begin("labels")
    (tmp_path / "scenario.toml").write_text(classes(tmp_path))
    labels = '["train", "test", "zebra fever"]'
    with edited(site_file(hall), task=f'"classification"\nlabel = "part"\nlabels = {labels}', strategies=""):
        run = hall.submit(tmp_path / "scenario.toml", "--out", hall.out, "--sites", "north")
        assert run.process.wait(120) == 1
    assert "site 'north' refused: wrong_labels" in last_line(run)
    assert "the site's own log says more" in last_line(run)
    state = hall.federation.place("north") / "state"
    assert "zebra fever" in (state / "site.log").read_text()
    assert "WrongLabels" in (state / "audit.jsonl").read_text()
    assert hall.grants("north") == []
    for told in (hall.out / "events.jsonl", hall.out / "status.json", hall.federation.coordinator / "superlink.log"):
        assert "zebra" not in told.read_text()
    hall.nothing_left()
