"""The GPU script's rehearsal: every line of it runs on a CPU, and a wrong sum is told."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "simulations" / "benchmarks"

pytestmark = pytest.mark.full


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_without_a_gpu_nothing_is_measured_and_the_exit_status_says_so() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py")], env=hidden, capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stdout) == (3, "not run: no CUDA GPU\n")


def test_a_rehearsal_measures_all_and_keeps_its_limits(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cpu-rehearsal", "--repeats", "1", "--json", str(tmp_path / "bars")])
    assert gpu.main() == 0
    assert capsys.readouterr().out.startswith("a rehearsal: ")
    bars = {(bar["bar"], bar["case"]): bar["value"] for bar in json.loads((tmp_path / "bars").read_text())}
    apart = [value for (bar, _), value in bars.items() if bar == "a sum's distance from float64"]
    assert len(apart) == 4
    assert all(0 < far < 1e-5 for far in apart)  # float32, and no comparison with itself
    assert bars["bfloat16 under dp is refused", "1 = refused"] == 1
    assert {case for bar, case in bars if bar == "tokens per second"} == {
        "1 prompts of 16, 8 new",
        "4 prompts of 16, 8 new",
    }
    assert bars["DP step / plain step", "8 x 16 tokens"] > 0


def test_a_wrong_sum_misses_its_limit(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MARGIN", 1.01 * gpu.MARGIN)  # the true sum is now one percent longer
    found = [bar for bar in gpu.sums(gpu.rehearsed(), 1) if bar.bar == "a sum's distance from float64"]
    assert [bar.ok for bar in found] == [False] * 4
