"""What accounting and noise cost: CPU seconds on one thread, medians of five. No limit is asserted here."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fedsynth.privacy.ledger import Binding, Ledger
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import Budget, plan


def seconds(work: Callable[[int], object], repeats: int = 5) -> float:
    """Median CPU seconds of `work(i)`."""
    found = []
    for i in range(repeats):
        start = time.process_time()
        work(i)
        found.append(time.process_time() - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    chosen = parser.parse_args()
    randomness = GrantRandomness(bytes(32))
    planned = plan(Budget(8.0), records=200, expected_batch=50, steps=60)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite", dataset="benchmark", cap=None)

        def charge(i: int) -> None:
            ledger.charge(planned, Binding(f"order {i}", planned.digest(), "mac", "model", "1"), f"run {i}")

        cases = {
            "noise of 60 steps of 350,000 parameters": seconds(lambda _: randomness.normals(21_000_000)),
            "calibration at epsilon 8 (n differs)": seconds(
                lambda i: plan(Budget(8.0), records=300 + i, expected_batch=50, steps=60)
            ),
            "charge of a grant": seconds(charge),
        }
    rows = [{"bar": "privacy", "case": c, "value": round(v, 4), "limit": None, "ok": True} for c, v in cases.items()]
    for row in rows:
        print(f"{row['value']:8.3f} s  {row['case']}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
