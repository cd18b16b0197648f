"""The scripts of simulations/benchmarks as modules, so that tests use what gives the tables of docs/."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent.parent / "simulations" / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """The script NAME.py. It gets a name of its own, as `audit` and others are names of packages."""
    found = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # its dataclasses look for their module
    found.loader.exec_module(module)
    return module
