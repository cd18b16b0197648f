"""A grid of scenarios, epsilons and seeds as typed, checked data."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tomli_w

from fedsynth.evaluation.comparing import METRICS
from fedsynth.privacy.plan import Budget
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, load
from fedsynth.typed import BadValue, build, plain, toml_file


@dataclass(frozen=True)
class Entry:
    """A scenario of a grid.

    Attributes:
        use: A shipped scenario by name, or a TOML file, looked up beside the grid's; the default is the entry's name.
        arms: The arms that run; the default is the scenario's own choice.
        baseline: The arm that others are compared with; the default is the grid's, then the first arm.
        metric: The first metric of tables and plots; the default is accuracy or exact match.
        set: Overrides `key=value`, as for `fedsynth run --set`.
    """

    use: str = ""
    arms: tuple[str, ...] = ()
    baseline: str | None = None
    metric: str | None = None
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """A grid of runs to compare.

    Attributes:
        name: Name of the comparison.
        scenarios: Entries by their name in tables and directories.
        seeds: Public seeds, the same for all.
        epsilons: Budgets; every arm that spends runs under each. The default is each scenario's own budgets.
        baseline: The baseline of scenarios that name none.
    """

    name: str
    scenarios: Mapping[str, Entry]
    seeds: tuple[int, ...]
    epsilons: tuple[float, ...] = ()
    baseline: str | None = None

    def __post_init__(self) -> None:
        if not self.scenarios:
            raise BadValue("the grid has no scenarios: name one, or write a table [scenarios.NAME]")
        for name in (self.name, *self.scenarios):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise BadValue(f"the name {name!r} becomes a directory's: use letters, digits and any of _ . -")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise BadValue(f"seeds must be distinct whole numbers >= 0, at least one, got {list(self.seeds)}")
        if len(set(self.epsilons)) < len(self.epsilons) or not all(e > 0 and math.isfinite(e) for e in self.epsilons):
            raise BadValue(f"epsilons must be distinct, finite and above 0, got {list(self.epsilons)}")


def read_grid(path: Path) -> Grid:
    """A grid from a TOML file, resolved.

    Raises:
        BadValue: If the file is no grid; the message names file, key and the nearest valid one.
    """
    with toml_file(path) as table:
        return resolved(build(Grid, {"name": path.stem, **table}), path.parent)


def asked_for(
    scenarios: Sequence[str],
    *,
    epsilons: str | Sequence[float],
    seeds: str | Sequence[int],
    arms: str | Sequence[str],
    baseline: str,
    sets: Sequence[str],
) -> Grid:
    """A resolved grid from command-line values, in which lists are separated by commas, or from Python's.

    Raises:
        BadValue: If a value is no number, or a name does not exist.
    """
    names = [Path(name).stem if name.endswith(".toml") else name for name in scenarios]
    if len(set(names)) < len(names):
        raise BadValue(f"two scenarios of one name: {', '.join(names)}; a grid's file can name them apart")
    tree = {
        "name": "-".join(names),
        "scenarios": {
            name: {"use": use, "arms": _listed(arms), "set": list(sets)}
            for name, use in zip(names, scenarios, strict=True)
        },
        "seeds": _numbers("seeds", seeds, int),
        "epsilons": _numbers("epsilons", epsilons, float),
        "baseline": baseline or None,
    }
    return resolved(build(Grid, tree), Path())


def _listed(given: str | Sequence[object]) -> list[str]:
    parts = given.split(",") if isinstance(given, str) else map(str, given)
    return [part.strip() for part in parts if part.strip()]


def _numbers(name: str, given: str | Sequence[float], kind: type[int] | type[float]) -> list[float]:
    try:
        return [kind(part) for part in _listed(given)]
    except ValueError:
        raise BadValue(f"--{name} must be numbers separated by commas, got {given!r}") from None


def is_grid(path: Path) -> bool:
    """True if a file declares a grid; False for a scenario and for a file that is no TOML."""
    try:
        return "scenarios" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def to_toml(grid: Grid) -> str:
    """The inverse of `read_grid`."""
    return tomli_w.dumps(plain(grid))


def resolved(grid: Grid, folder: Path) -> Grid:
    """The grid with scenario, arms, baseline and metric filled in for each entry.

    Args:
        grid: The grid as declared.
        folder: Scenarios' files are looked up here before the working directory.

    Raises:
        BadValue: If an entry names a scenario, arm, baseline or metric that does not exist.
    """
    entries = {}
    for name, entry in grid.scenarios.items():
        try:
            entries[name] = _resolved(grid, name, entry, folder)
        except BadValue as problem:
            raise BadValue(f"[scenarios.{name}] {problem}") from problem
    return replace(grid, scenarios=entries)


def _resolved(grid: Grid, name: str, entry: Entry, folder: Path) -> Entry:
    use = entry.use or name
    if use.endswith(".toml"):
        use = str(next((p for p in (folder / use, Path(use)) if p.is_file()), Path(use)).absolute())
    scenario = scenario_of(replace(entry, use=use), grid.seeds)
    arms = tuple(cell.arm for cell in cells(replace(scenario, seeds=scenario.seeds[:1])))
    if entry.arms and entry.arms != arms:
        raise BadValue(f"the scenario has no arms but itself, {arms[0]!r}, got arms = {list(entry.arms)}")
    if len(set(arms)) < len(arms):
        raise BadValue(f"arms names one twice: {', '.join(arms)}")
    baseline, metric = entry.baseline or grid.baseline or arms[0], entry.metric or METRICS[scenario.data.task][0]
    if baseline not in arms:
        raise BadValue(
            f"the baseline {baseline!r} is not among the arms that run: {', '.join(arms)}; add it to arms, "
            "or name another baseline for this scenario"
        )
    if metric not in METRICS[scenario.data.task]:
        raise BadValue(
            f"metric must be one of {', '.join(METRICS[scenario.data.task])} where data.task is "
            f"{scenario.data.task!r}, got {metric!r}"
        )
    return Entry(use, arms, baseline, metric, entry.set)


def scenario_of(entry: Entry, seeds: tuple[int, ...]) -> Scenario:
    """The scenario of an entry, with its overrides, its arms and the grid's seeds.

    Raises:
        BadValue: If it does not exist or is not valid.
    """
    found = load(entry.use, entry.set)
    # A scenario without arms has one, named after its strategy.
    run = found.run if not entry.arms or not found.arms else entry.arms
    return replace(found, seeds=seeds, run=run)


def at_epsilon(scenario: Scenario, epsilon: float) -> Scenario:
    """The scenario under another epsilon, also in arms with their own budget."""
    budget = replace(scenario.client.budget or Budget(epsilon), epsilon=epsilon)
    arms = {}
    for arm, overrides in scenario.arms.items():
        client = overrides.get("client")
        if isinstance(client, Mapping) and isinstance(client.get("budget"), Mapping):
            client = {**client, "budget": {**client["budget"], "epsilon": epsilon}}
            overrides = {**overrides, "client": client}
        arms[arm] = overrides
    return replace(scenario, client=replace(scenario.client, budget=budget), arms=arms)


def refuse_another(old: Grid, new: Grid, place: str) -> None:
    """Refuses a new grid in the directory of an old one if runs would differ. Added epsilons and scenarios, and changed
    baselines and metrics, leave every run as it is.

    Raises:
        BadValue: With the differences.
    """
    wrong = [
        f"{key} {_shown(getattr(old, key))} there, {_shown(getattr(new, key))} now"
        for key in ("name", "seeds")
        if getattr(old, key) != getattr(new, key)
    ]
    if not set(old.epsilons) <= set(new.epsilons) or bool(old.epsilons) != bool(new.epsilons):
        wrong.append(f"epsilons {_shown(old.epsilons)} there, {_shown(new.epsilons)} now")
    for name, was in old.scenarios.items():
        now = new.scenarios.get(name)
        if now is None:
            wrong.append(f"the scenario {name!r} is missing now")
        else:
            wrong += [
                f"scenarios.{name}.{key} {_shown(getattr(was, key))} there, {_shown(getattr(now, key))} now"
                for key in ("use", "arms", "set")
                if getattr(was, key) != getattr(now, key)
            ]
    if wrong:
        raise BadValue(f"{place!r} holds another comparison ({'; '.join(wrong)}): name another directory with --out")


def _shown(value: object) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
