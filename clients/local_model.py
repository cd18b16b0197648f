"""The model that a run leaves at a site, with the facts needed to use it after the run."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsynth.clients.client_side import ClientSide
from fedsynth.models.hub import weights_hash
from fedsynth.scenario.client import Client
from fedsynth.scenario.earlier_keys import OldName, as_of_now
from fedsynth.scenario.task import NO_CARD, Task
from fedsynth.typed import build, plain

FACTS = "model.json"  # beside the weights


@dataclass(frozen=True)
class LocalModel:
    """The facts of a model.

    Attributes:
        run: Public id of the run that left it, with arm and seed.
        learnt: Time of the training, UTC.
        config: The site's models and trainings.
        base: Hash of the weights that it was trained from.
        labels: The label list; empty for a model that responds to instructions.
        task: For instructions: the run's card, as the model learnt them in its form.
    """

    run: str
    learnt: str
    config: Client
    base: str
    labels: tuple[str, ...] = ()
    task: Task = NO_CARD


def keep_facts(client: ClientSide) -> None:
    """Writes the facts, after the weights; simulated clients need none, as the run's scenario has them."""
    if client.simulated:
        return
    base = weights_hash(client.config.generator if client.instructs else client.config.task_model)
    facts = LocalModel(
        run=client.run,
        learnt=datetime.now(UTC).isoformat(timespec="seconds"),
        config=client.config,
        base=base,
        labels=client.labels,
        task=client.task if client.instructs else NO_CARD,
    )
    part = client.work / f"{FACTS}.part"
    part.write_text(json.dumps(plain(facts)), encoding="utf-8")
    part.replace(client.work / FACTS)


def all_kept(state: Path) -> tuple[list[tuple[Path, LocalModel]], list[str]]:
    """The folders of a site's models with their facts, oldest first; and a line for each file that cannot be read.

    Args:
        state: The site's state folder.
    """
    found, unread = [], []
    for path in (state / "runs").glob(f"*/*/*/{FACTS}"):
        try:
            found.append((path.parent, _read(json.loads(path.read_text(encoding="utf-8")))))
        except (ValueError, OSError) as problem:  # BadValue is one
            unread.append(f"{path}: {problem}")
    return sorted(found, key=lambda each: each[1].learnt), unread


def _read(facts: Any) -> LocalModel:
    """The facts of a file, also of one that an earlier version wrote."""
    if isinstance(facts, dict) and isinstance(facts.get("config"), dict):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OldName)  # no person wrote these keys
            facts = {**facts, "config": as_of_now({"client": facts["config"]})["client"]}
    return build(LocalModel, facts)
