"""A run's directory, which people share, and the private one beside it: their paths and first files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsynth.data.card import data_cards
from fedsynth.federation.run.data_facts import COUNTS, FACTS
from fedsynth.federation.run.environment import FILE, surroundings
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, from_toml, load, to_toml
from fedsynth.typed import BadValue


def check_free(out: Path) -> None:
    """Checks that a run can begin in a directory.

    Raises:
        BadValue: If it, or the private one beside it, holds anything: a run is never overwritten.
    """
    for place in (out, private_of(out)):
        # An old private directory would answer new requests with what it stored: its epsilon would be another run's.
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            begun = (out / "scenario.toml").is_file()
            more = f", or go on with the one that is there: fedsynth run --resume {out}" if begun else ""
            raise BadValue(f"the directory {str(place)!r} already holds something: name another run with --out{more}")


def prepare(scenario: Scenario, out: Path) -> dict[str, Any]:
    """Makes a simulation's directory and writes the files that precede the run.

    Returns:
        The data cards. They count private text, as `row_counts.json` does: both lie in the private directory. The
        second is in the shareable one if nobody's text is counted, or text that is declared public.

    Raises:
        BadValue: If the directory, or the private one beside it, holds anything: a run is never overwritten.
    """
    from fedsynth.federation.counting import data_facts, row_counts  # torch takes seconds; readers need none

    check_free(out)
    cards, counts = data_cards(scenario), {COUNTS: row_counts(scenario)}
    anyones = all(cell.scenario.data.world is not None or cell.scenario.data.public for cell in cells(scenario))
    begin(
        scenario,
        out,
        {FACTS: data_facts(scenario), **(counts if anyones else {})},
        {"data.json": cards, **({} if anyones else counts)},
    )
    return cards


def begin(scenario: Scenario, out: Path, more: Mapping[str, Any], private: Mapping[str, Any]) -> None:
    """Makes a run's directory, and the private one beside it.

    Args:
        scenario: The run's scenario.
        out: The directory; it holds nothing.
        more: JSON values of the directory, by file name.
        private: JSON values of the private directory, by file name.
    """
    out.mkdir(parents=True, exist_ok=True)
    beside = private_of(out)
    beside.mkdir(mode=0o700, exist_ok=True)
    (out / FILE).write_text(json.dumps(surroundings(scenario), indent=1), encoding="utf-8")
    for folder, files in ((out, more), (beside, private)):
        for name, value in files.items():
            (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    # Last and at once: a run whose directory has this file can be resumed.
    part = out / "scenario.toml.part"
    part.write_text(to_toml(scenario), encoding="utf-8")
    part.replace(out / "scenario.toml")


def places(config: Mapping[str, Any], run_id: int) -> tuple[str, Path, Path]:
    """The scenario's TOML, the run's directory and the private one, from a run-config.

    The launcher sends all three. By hand (`flwr run simulations`) the scenario is a shipped one by name, and the
    directories lie under the user's home: the working directory of Flower's processes is not the caller's.

    Raises:
        BadValue: If a directory is relative.
    """
    toml = str(config.get("scenario-toml", "")) or to_toml(load(str(config.get("scenario", "hospitals"))))
    name = from_toml(toml).name
    out = Path(str(config.get("out-dir", "")) or Path.home() / ".fedsynth" / "runs" / f"{name}-{run_id}")
    if not out.is_absolute():
        raise BadValue(f"out-dir must be absolute, got {str(out)!r}")
    return toml, out, private_of(out)


def private_of(out: Path) -> Path:
    """The directory of the simulated clients' private state: beside the directory that people share, never in it."""
    return out.with_name(out.name + ".private")


SHARED = "shared"  # what arms have in common, in the private state of a simulation
RESPONSES = "responses.jsonl"  # of a simulated client, in its private state: instruction, reference, response
