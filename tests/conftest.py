"""What all tests share."""

import os
import signal

import pytest
import torch

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


@pytest.hookimpl(tryfirst=True)  # before the names of groups are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests are shared out to several processes, a file's stay together."""
    items.sort(key=lambda item: item.path.name not in PROCESSES)  # stable: the order within a file stays
    for item in items:
        item.add_marker(pytest.mark.xdist_group("processes" if item.path.name in PROCESSES else item.path.stem))
