"""The model that a run leaves at a site, with what is needed to use it after the run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedsynth.clients.home import Home
from fedsynth.scenario import Client
from fedsynth.typed import BadValue, build, plain

FACTS = "model.json"  # beside the weights


@dataclass(frozen=True)
class Kept:
    """What is known of a model.

    Attributes:
        run: Public id of the run that left it, with arm and seed.
        learnt: When, UTC.
        config: What the site ran.
        labels: The label list; empty for a model that responds to instructions.
    """

    run: str
    learnt: str
    config: Client
    labels: tuple[str, ...] = ()


def keep_facts(home: Home) -> None:
    """Called once the weights are written; a simulation's clients need no facts, for its scenario is at hand."""
    if home.simulated:
        return
    facts = Kept(home.run, datetime.now(UTC).isoformat(timespec="seconds"), home.config, home.labels)
    part = home.work / f"{FACTS}.part"
    part.write_text(json.dumps(plain(facts)), encoding="utf-8")
    part.replace(home.work / FACTS)


def all_kept(state: Path) -> list[tuple[Path, Kept]]:
    """The folders of a site's models and what is known of each, oldest first.

    Args:
        state: The site's.

    Raises:
        BadValue: If a file was changed.
    """
    found = []
    for path in (state / "runs").glob(f"*/*/*/{FACTS}"):
        try:
            found.append((path.parent, build(Kept, json.loads(path.read_text(encoding="utf-8")))))
        except (ValueError, OSError) as problem:  # BadValue is one
            raise BadValue(f"{path}: {problem}") from problem
    return sorted(found, key=lambda each: each[1].learnt)
