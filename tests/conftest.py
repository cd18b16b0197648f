"""What all tests share."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

SESSION = "FEDSYNTH_TEST_SESSION"  # inherited by whatever this test process starts: another one may run beside it
os.environ[SESSION] = str(os.getpid())
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
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest first."""
    items.sort(key=lambda item: item.path.name not in PROCESSES)  # stable: the order within a file stays


class ByFile(LoadScopeScheduling):
    """Where tests are shared out to several processes, those of a file stay together, and all of `PROCESSES`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "processes" if Path(file).name in PROCESSES else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Called by pytest-xdist for `-n`."""
    return ByFile(config, log)
