"""One thread per process: two on a shared machine run at half the speed of one. Tests run in two processes."""

import pytest
import torch

torch.set_num_threads(1)

WHOLE_RUNS = ("test_run.py", "test_docs.py", "test_launch.py", "test_wheel.py")  # start processes of their own


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start whole runs go one after the other in one process, all others meanwhile in the second; first of
    all, because they take longest."""
    runs = [item for item in items if item.path.name in WHOLE_RUNS]
    for item in runs:
        item.add_marker(pytest.mark.xdist_group("runs"))
    items[:] = runs + [item for item in items if item.path.name not in WHOLE_RUNS]
