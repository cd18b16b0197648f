"""The environment of a run (versions, models, hardware, commit) and its differences from another run's."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from fedsynth import __version__
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells
from fedsynth.typed import BadValue

PACKAGES = (
    "flwr",
    "ray",
    "torch",
    "transformers",
    "peft",
    "opacus",
    "dp-accounting",
    "numpy",
    "pandas",
    "flwr-datasets",
    "datasets",
)
FILE = "versions.json"


def surroundings(scenario: Scenario) -> dict[str, Any]:
    """The content of `versions.json` in a run's directory."""
    from fedsynth.models.devices import gpu_names  # brings torch, which readers of the file do not need
    from fedsynth.models.hub import elsewhere, version_of
    from fedsynth.models.of_scenario import endpoints_of, models_of

    return {
        "fedsynth": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
            "gpus": gpu_names(),
        },
        "code": _code(),
        "public_seeds": list(scenario.seeds),
        "models": {name: version_of(name) for name, _ in models_of(scenario) if not elsewhere(name)},
        "computes": _computes(scenario),
        "strategies": _strategies(scenario),
        # Only an endpoint's server knows the weights behind it.
        "endpoints": [{"endpoint": e.endpoint, "model": e.model} for e in endpoints_of(scenario)],
    }


def _strategies(scenario: Scenario) -> dict[str, str]:
    """By file of a strategy that is no installed module, the hash of its text."""
    files = (cell.scenario.strategy.file for cell in cells(replace(scenario, seeds=scenario.seeds[:1])))
    return {str(file): sha256(file.read_bytes()).hexdigest() for file in files if file is not None and file.is_file()}


def _computes(scenario: Scenario) -> dict[str, str]:
    """Precision and device of each model in all arms: bfloat16 can change texts."""
    from fedsynth.models.hub import elsewhere
    from fedsynth.models.loading import dtype_of
    from fedsynth.models.placing import choices

    found: dict[str, dict[str, None]] = {}
    for cell in cells(replace(scenario, seeds=scenario.seeds[:1])):
        own, client = choices(cell.scenario.server), cell.scenario.client.of(0)
        if not elsewhere(client.generator):
            dtype = dtype_of(client.generator, client.generator_training.precision)
            own[f"generator {client.generator}"] = str(dtype).removeprefix("torch.")
        for model, how in own.items():
            found.setdefault(model, {})[how] = None
    return {model: "; ".join(hows) for model, hows in found.items()}


def differences(run: Path, scenario: Scenario) -> list[str]:
    """The changes of the environment since a run, one line each; with changes, a repetition may give other results.

    Args:
        run: The run's directory.
        scenario: The run's scenario, as it would run now.

    Raises:
        BadValue: If the directory has no readable `versions.json`.
    """
    try:
        then = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise BadValue(f"{run} is no run's directory: {FILE} cannot be read ({problem})") from problem
    now = json.loads(json.dumps(surroundings(scenario)))
    return [
        f"{key}: {_at(then, key)!r} then, {_at(now, key)!r} now"
        for key in sorted({*_keys(then), *_keys(now)})
        if _at(then, key) != _at(now, key)
    ]


def _keys(tree: Mapping[str, Any], above: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        path = f"{above}/{key}" if above else key
        found += _keys(value, path) if isinstance(value, dict) else [path]
    return found


def _at(tree: Any, path: str) -> Any:
    # Names of models hold slashes, so the longest matching key is taken.
    while isinstance(tree, dict) and path:
        key = max((k for k in tree if path == k or path.startswith(f"{k}/")), key=len, default=None)
        if key is None:
            return None
        tree, path = tree[key], path[len(key) + 1 :]
    return tree


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _code() -> dict[str, Any] | None:
    """The commit of this package's checkout, and whether files have changed since; None outside of a checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *words],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # the repository, if there is one, is another project's
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
