"""The costs of accounting and noise: CPU seconds on one thread. No limit is asserted here.

python simulations/benchmarks/privacy.py [--json FILE] [--repeats 7]
"""

from __future__ import annotations

import sys
import tempfile
from itertools import count
from pathlib import Path

from measuring import figure, options, seconds, told

from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Binding, Ledger
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import Budget, plan


def main(arguments: list[str]) -> int:
    """Prints the table."""
    chosen = options(__doc__).parse_args(arguments)
    randomness, number = GrantRandomness(bytes(32)), count()
    planned = plan(Budget(8.0), records=200, expected_batch=50, steps=60)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite", Account("benchmark", None))

        def charge() -> None:
            i = next(number)
            ledger.charge(planned, Binding(f"order {i}", planned.digest(), "mac", "model", "1"), f"run {i}")

        took = seconds(
            {
                "noise of 60 steps of 350,000 parameters": lambda: randomness.normals(21_000_000),
                # Another n each time: calibrations are kept.
                "calibration at epsilon 8": lambda: plan(
                    Budget(8.0), records=300 + next(number), expected_batch=50, steps=60
                ),
                "charge of a grant": charge,
            },
            chosen.repeats,
        )
    return told([figure("CPU seconds", case, value) for case, value in took.items()], chosen.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
