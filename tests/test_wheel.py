"""The wheel runs where there is no repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from test_packaging import build_wheel
from test_run import QUICK

TOOLS = ("flower", "flwr", "ray")  # commands that the launcher starts


def install(wheel: Path, place: Path) -> Path:
    """A virtual environment with the wheel, and this one's packages without its link to the checkout.

    A folder that is named in a .pth file is only put on the path: .pth files inside it (an editable install's) are not
    read. Nothing is downloaded.
    """
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    zipfile.ZipFile(wheel).extractall(site)
    for script in Path(sysconfig.get_path("scripts")).iterdir():
        if script.name.startswith(TOOLS):
            lines = script.read_text().splitlines(keepends=True)
            target = place / "bin" / script.name
            target.write_text("".join([f"#!{python}\n", *lines[1:]]))
            target.chmod(0o755)
    return python


@pytest.mark.full
def test_the_wheel_runs_outside_the_repository(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    python = install(build_wheel(tmp_path / "tree"), tmp_path / "venv")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    where = subprocess.check_output(
        [python, "-c", "import fedsynth; print(fedsynth.__file__)"], cwd=elsewhere, text=True
    )
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    sets = [part for item in QUICK for part in ("--set", item)]
    command = [
        python,
        "-m",
        "fedsynth.cli.main",
        "run",
        "hospitals",
        *sets,
        "--clients",
        "2",
        "--arms",
        "fdkt",
        "--out",
        "run",
        "--json",
    ]
    done = subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])["arms"]) == {"fdkt"}
    log = (elsewhere / "run.private" / "logs" / "flower.log").read_text()
    assert str(Path(__file__).parent.parent) not in log
    assert sys.executable not in log
