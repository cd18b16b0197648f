"""What all tests share."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

SESSION = "FEDSYNTH_TEST_SESSION"  # inherited by whatever this test process starts: another one may run beside it
os.environ[SESSION] = str(os.getpid())
os.environ["FEDSYNTH_CACHE"] = tempfile.mkdtemp(prefix="fedsynth-tests-")  # the user's own is not for tests
atexit.register(shutil.rmtree, os.environ["FEDSYNTH_CACHE"], ignore_errors=True)
torch.set_num_threads(1)  # two on a shared machine run at half the speed of one
# A shell without job control has what it starts in the background ignore Ctrl-C, and so would all that is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files whose tests start whole runs or sites: they go one after the other, and first, beside all others.
PROCESSES = (
    "test_run.py",
    "test_deployment.py",
    "test_launch.py",
    "test_server.py",
    "test_site.py",
    "test_wheel.py",
    "test_deployment_full.py",
    "test_faults.py",
    "test_ray_cluster.py",
)

# Files that `make unit` runs: each takes a few seconds, and none of their tests starts a process.
UNIT = (
    "comparing", "corpus", "csv_faults", "distillation", "encoding", "evaluation", "filter", "grids", "instructions",
    "layers", "lora", "messages", "ngram", "noise", "older_ledgers", "options", "peft_adapters", "plan", "reasons",
    "records", "release", "rouge", "scenario", "tables", "text_scores", "trackers", "typed",
)  # fmt: skip
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
_running: list[str] = []  # the unit test that runs


def _refuse(event: str, arguments: object) -> None:
    if _running and event in STARTS:
        raise RuntimeError(f"{_running[0]} is a unit test, and starts a process ({event}: {arguments})")


sys.addaudithook(_refuse)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m unit` does not even import the other files."""
    name = collection_path.stem.removeprefix("test_")
    return (config.option.markexpr == "unit" and collection_path.suffix == ".py" and name not in UNIT) or None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A unit test that starts a process fails, in its fixtures, too."""
    if item.get_closest_marker("unit"):
        _running.append(item.nodeid)
    try:
        return (yield)
    finally:
        _running.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest first, and marks those of UNIT."""
    items.sort(key=lambda item: item.path.name not in PROCESSES)  # stable: the order within a file stays
    for item in items:
        if item.path.stem.removeprefix("test_") in UNIT and not item.get_closest_marker("full"):
            item.add_marker(pytest.mark.unit)


class ByFile(LoadScopeScheduling):
    """Where tests are shared out to several processes, those of a file stay together, and all of `PROCESSES`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "processes" if Path(file).name in PROCESSES else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Called by pytest-xdist for `-n`."""
    return ByFile(config, log)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """`fedsynth WORDS` in a folder without any stored model: its exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSYNTH_MODELS", str(tmp_path / "no models"))
    monkeypatch.delenv("FEDSYNTH_DATA", raising=False)

    import fedsynth.cli.main

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedsynth", *words])
        with pytest.raises(SystemExit) as ended:
            fedsynth.cli.main.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run
