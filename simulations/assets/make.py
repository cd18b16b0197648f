"""Makes the models that the offline demonstration ships: `python simulations/assets/make.py hospitals llm OUT`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fedsynth.typed import BadValue
from fedsynth.world import WORLDS, load_world
from world_adapters import mislabelled
from world_models import RECIPES, pretrain_asset


def main() -> None:
    """Reads the command line, makes one model or adapter, prints its card; takes minutes on one core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("role", choices=[*RECIPES, "mislabelled"], help="of notes, of records, or the adapter")
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--steps", type=int, help="optimizer steps; the recipe's by default")
    parser.add_argument("--seed", type=int, default=0, help="of the start and of the order of the text")
    asked = parser.parse_args()
    try:
        print(json.dumps(make(asked.world, asked.role, asked.out, asked.steps, asked.seed), indent=2))
    except BadValue as problem:
        sys.exit(str(problem))


def make(world: str, role: str, out: Path, steps: int | None = None, seed: int = 0) -> dict[str, object]:
    """Makes one asset in a new folder; returns its card.

    Raises:
        BadValue: If the folder holds something, the steps are not positive, or the world has no such asset.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadValue(f"the folder {str(out)!r} already holds something: name another one")
    if steps is not None and steps < 1:
        raise BadValue(f"--steps must be at least 1, got {steps}")
    made = load_world(world)
    if role == "mislabelled":
        return mislabelled(made, out, steps, seed)
    return pretrain_asset(made, role, out, steps, seed)  # type: ignore[arg-type]  # a choice of the parser


if __name__ == "__main__":
    main()
