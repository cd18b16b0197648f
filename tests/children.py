"""Stands in for runs in processes of their own: light to import, as every spawned process does it anew."""

import time
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds


def meeting_child(name: str, toml: str, place: str, state: str, workers: int, says: Any) -> None:
    """Ends when three have begun; then the one at epsilon 8 says why it fails, and the one at epsilon 2 dies."""
    Path(place).mkdir(parents=True)
    (Path(place) / "began").touch()
    until = time.monotonic() + PATIENCE
    while len(list(Path(place).parent.glob("*/began"))) < 3:
        if time.monotonic() > until:
            raise SystemExit(9)
        time.sleep(0.05)
    if name == "notes-eps8":
        says.send("no more clients")
        raise SystemExit(1)
    if name == "notes-eps2":
        raise SystemExit(3)
