"""A grid of scenarios, epsilons and seeds from start to finish: runs made or resumed, and read as one tidy frame."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fedsynth.comparison.grids import Grid, at_epsilon, read_grid, refuse_another, scenario_of
from fedsynth.comparison.grids import to_toml as grid_to_toml
from fedsynth.evaluation.comparing import COLUMNS, Terms, costs, pareto, points, utility
from fedsynth.evaluation.verdict import verdict
from fedsynth.federation.run.conclusion import lines_for, reasons
from fedsynth.federation.run.log import SERVER
from fedsynth.federation.strategy import load_strategy
from fedsynth.models.devices import gpus
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.scenario.toml import cells, from_toml, to_toml
from fedsynth.simulation import simulate
from fedsynth.simulation.flower import LaunchFailed
from fedsynth.simulation.result import Result
from fedsynth.simulation.result import read as read_run
from fedsynth.typed import BadValue

GRID, FRAME, TABLES = "comparison.toml", "comparison.parquet", "comparison.json"
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Part:
    """One run of a grid: a scenario at one epsilon, its arms and all seeds as cells.

    Attributes:
        name: Name of the run's directory below `runs`.
        entry: Name of the scenario in the grid.
        scenario: The scenario with the run's arms, seeds and epsilon.
    """

    name: str
    entry: str
    scenario: Scenario


@dataclass(frozen=True)
class Comparison:
    """The results of a grid.

    Attributes:
        out: The comparison's directory.
        grid: The resolved grid.
        frame: Tidy frame with the columns `fedsynth.evaluation.comparing.COLUMNS`.
        tables: The tables that `--json` prints.
    """

    out: Path
    grid: Grid
    frame: pd.DataFrame
    tables: Mapping[str, Any]

    def __repr__(self) -> str:
        cells = len(self.frame[["scenario", "epsilon", "arm", "seed"]].drop_duplicates())
        return f"Comparison({self.grid.name}: {', '.join(self.grid.scenarios)}; {cells} cells; {self.out})"


def compare(
    grid: Grid,
    out: Path,
    *,
    workers: int | None = None,
    parallel: int | None = None,
    on_event: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Comparison:
    """Makes the missing runs of a grid, and the tables of all.

    Args:
        grid: A resolved grid (`fedsynth.comparison.grids.resolved`).
        out: Directory of the comparison. Completed runs of an earlier call are read, begun ones are resumed.
        workers: Client processes of each run; None for as many as cores and memory allow.
        parallel: Runs at once; None for one, or more if a run has fewer clients than there is room for workers.
        on_event: Called with the progress events of runs, with the run's name, and with one at each run's start
            and end: run, number, runs, state ("new", "begun", "completed", "done").
        on_warning: Called with each warning of the check.

    Raises:
        BadValue: If grid or directory have a fault; then nothing has run.
        fedsynth.simulation.flower.LaunchFailed: If some runs did not complete; the same call resumes them.
    """
    whole = parts(grid)
    with _alone(out):
        _fits(grid, out)
        pinned = [replace(part, scenario=simulate.pinned(part.scenario)) for part in whole]
        states = {part.name: state(part, out) for part in pinned}
        todo = [part for part in pinned if states[part.name] != "completed"]
        told = _Told(on_event, on_warning, [part.name for part in pinned])
        for part in todo:
            for warning in _checked(part):
                told.warning(warning)
        (out / f"{GRID}.part").write_text(grid_to_toml(grid), encoding="utf-8")
        (out / f"{GRID}.part").replace(out / GRID)
        for part in pinned:
            if states[part.name] == "completed":
                told.run(part.name, "completed")
        _make(todo, out, states, workers, parallel, told)
        frame = gather(pinned, out)
        return _written(grid, frame, pinned, out)


def read(out: Path) -> Comparison:
    """The comparison in a directory.

    Raises:
        BadValue: If none was completed there.
    """
    if not (out / TABLES).is_file():
        raise BadValue(f"{str(out)!r} holds no completed comparison: there is no {TABLES}")
    tables = json.loads((out / TABLES).read_text(encoding="utf-8"))
    return Comparison(out, read_grid(out / GRID), pd.read_parquet(out / FRAME), tables)


def parts(grid: Grid) -> list[Part]:
    """The runs of a grid. Arms that do not depend on epsilon run once in each scenario, for all epsilons."""
    found = []
    for name, entry in grid.scenarios.items():
        scenario = scenario_of(entry, grid.seeds)
        if not grid.epsilons:
            found.append(Part(f"{name}-own", name, scenario))
            continue
        arms = {cell.arm: depends_on_epsilon(cell) for cell in cells(replace(scenario, seeds=scenario.seeds[:1]))}
        for depends in (False, True):
            run = tuple(arm for arm, does in arms.items() if does == depends)
            # A scenario without arms has one.
            chosen = replace(scenario, run=run) if scenario.arms else scenario
            if run and not depends:
                found.append(Part(f"{name}-any", name, chosen))
            elif run:
                found += [Part(f"{name}-eps{_short(e)}", name, at_epsilon(chosen, e)) for e in sorted(grid.epsilons)]
    return found


def _short(epsilon: float) -> str:
    return repr(float(epsilon)).removesuffix(".0")


def depends_on_epsilon(cell: Cell) -> bool:
    """True if a cell spends budget: it is under `dp` and its method's requests cost something.

    Raises:
        BadValue: If the strategy does not exist, or its options are wrong.
    """
    try:
        kind, options = load_strategy(cell.scenario.strategy)
    except BadValue as problem:
        raise BadValue(f"arm {cell.arm!r}: {problem}") from problem
    return cell.scenario.client.guarantee == "dp" and kind.spends(options)


State = Literal["new", "begun", "completed"]


def place_of(part: Part, out: Path) -> Path:
    """A run's directory."""
    return out / "runs" / part.name


def state(part: Part, out: Path) -> State:
    """The state of a run.

    Raises:
        BadValue: If its directory holds another run.
    """
    place = place_of(part, out)
    if not (place / "scenario.toml").exists():
        return "new"
    if (place / "scenario.toml").read_text(encoding="utf-8") != to_toml(part.scenario):
        raise BadValue(
            f"{str(place)!r} holds a run of another scenario than {part.entry!r} is now (its file, the "
            "commit of a model or this program has changed): name another directory with --out"
        )
    return "completed" if simulate.done(place) else "begun"


def _checked(part: Part) -> list[str]:
    try:
        return simulate.check(part.scenario)
    except BadValue as problem:
        raise BadValue(f"{part.name}: {problem}") from problem


def _fits(grid: Grid, out: Path) -> None:
    """Refuses a directory that holds another grid, or other files."""
    path = out / GRID
    if path.exists():
        refuse_another(read_grid(path), grid, str(out))
    elif any(p.name != LOCK for p in out.iterdir()):
        raise BadValue(f"the directory {str(out)!r} holds something else than a comparison: name another with --out")


LOCK = ".lock"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Locks the directory: two comparisons in it would resume each other's runs while they go on."""
    if out.exists() and not out.is_dir():
        raise BadValue(f"{str(out)!r} is not a directory: name another with --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadValue(f"another comparison is at work in {str(out)!r}: wait for its end") from None
        yield


class _Told:
    """Events of runs, with the run's name and number; each warning once."""

    def __init__(
        self, on_event: Progress | None, on_warning: Callable[[str], None] | None, names: Sequence[str]
    ) -> None:
        self.on_event = on_event
        self.on_warning = on_warning
        self.warned: set[str] = set()
        self.numbers = {name: number for number, name in enumerate(names, 1)}

    def run(self, name: str, state: str) -> None:
        self.event(name, {"event": "run", "state": state, "number": self.numbers[name], "runs": len(self.numbers)})

    def event(self, name: str, event: Mapping[str, Any]) -> None:
        if self.on_event is not None:
            self.on_event({**event, "run": name})

    def warning(self, text: str) -> None:
        if self.on_warning is not None and text not in self.warned:
            self.on_warning(text)
        self.warned.add(text)


def _make(
    todo: Sequence[Part],
    out: Path,
    states: Mapping[str, State],
    workers: int | None,
    parallel: int | None,
    told: _Told,
) -> None:
    """Makes the missing runs; a failure does not stop the others.

    Raises:
        LaunchFailed: At the end, with the reason of each failure.
    """
    if not todo:
        return
    at_once, each = shares(todo, workers, parallel)
    if at_once == 1:
        failed = {}
        for part in todo:
            told.run(part.name, states[part.name])
            try:
                _run(part, place_of(part, out), states[part.name], workers, told)
            except LaunchFailed as problem:
                failed[part.name] = str(problem)
            told.run(part.name, "failed" if part.name in failed else "done")
    else:
        failed = _side_by_side(todo, out, states, at_once, each, told)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise LaunchFailed(f"{len(failed)} of {len(todo)} runs did not complete, the same command goes on: {reasons}")


def shares(todo: Sequence[Part], workers: int | None, parallel: int | None) -> tuple[int, int]:
    """The number of runs at once, and of workers for each.

    A run uses as many workers as it has clients; another run starts only if cores and memory allow more workers. Runs
    on a shared GPU would have to know each other's memory, so they go one by one unless `parallel` says otherwise.
    """
    clients = max(1 if part.scenario.data.pooled else part.scenario.data.clients for part in todo)
    room, _ = simulate.concurrency(None, len(todo) * clients)
    at_once = parallel or (1 if gpus() else max(1, room // clients))
    at_once = min(at_once, len(todo))
    return at_once, workers or max(1, min(clients, room // at_once))


def _run(part: Part, place: Path, state: State, workers: int | None, told: _Told | None = None) -> None:
    on_event = None if told is None else partial(told.event, part.name)
    if state == "begun":
        simulate.resume(place, workers=workers, on_event=on_event, on_warning=None if told is None else told.warning)
    else:
        simulate.run(part.scenario, out=place, workers=workers, on_event=on_event)


def _side_by_side(
    todo: Sequence[Part], out: Path, states: Mapping[str, State], at_once: int, workers: int, told: _Told
) -> dict[str, str]:
    """Makes each run in its own process: they share no loaded models, and die with this process, however it ends."""
    context = multiprocessing.get_context("spawn")  # a forked process would have torch's threads without their state
    waiting, failed = list(todo), dict[str, str]()
    running: dict[int, tuple[Part, Any, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                part = waiting.pop(0)
                told.run(part.name, states[part.name])
                here, there = context.Pipe(duplex=False)
                place = str(place_of(part, out))
                arguments = (part.name, to_toml(part.scenario), place, states[part.name], workers, there)
                child = context.Process(target=_child, args=arguments)
                child.start()
                there.close()
                running[child.sentinel] = (part, child, here)
            for sentinel in connection.wait(list(running)):
                assert isinstance(sentinel, int)
                part, child, here = running.pop(sentinel)
                child.join()
                if (reason := _reason(child.exitcode, here)) is not None:
                    failed[part.name] = reason
                told.run(part.name, "done" if reason is None else "failed")
    finally:
        for _, child, _ in running.values():
            child.terminate()
            child.join()
    return failed


def _reason(code: int | None, said: Any) -> str | None:
    try:
        return None if code == 0 else str(said.recv())
    except EOFError:
        return f"its process died (exit code {code})"


def _child(name: str, toml: str, place: str, state: State, workers: int, says: Any) -> None:
    """Makes one run; sends the reason of a failure through the pipe."""
    above = multiprocessing.parent_process()
    assert above is not None

    def die_with_it() -> None:
        above.join()
        os._exit(1)  # the supervisor of its run sees that, and takes everything down

    threading.Thread(target=die_with_it, daemon=True).start()
    try:
        _run(Part(name, name, from_toml(toml)), Path(place), state, workers)
    except (BadValue, LaunchFailed) as problem:
        says.send(str(problem))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(1) from None


def gather(runs: Sequence[Part], out: Path) -> pd.DataFrame:
    """The metrics of all runs as one tidy frame.

    Raises:
        RuntimeError: If an arm spent budget although its strategy says that it spends none.
    """
    return pd.concat([_rows(part, read_run(place_of(part, out))) for part in runs], ignore_index=True)


def _rows(part: Part, result: Result) -> pd.DataFrame:
    found = {cell.arm: cell for cell in cells(replace(part.scenario, seeds=part.scenario.seeds[:1]))}
    epsilons, more = {}, []
    for arm, cell in found.items():
        budget, summary = cell.scenario.client.budget, result.summary["arms"][arm]
        depends = depends_on_epsilon(cell)
        assert budget is not None or not depends  # a scenario under dp has a budget
        epsilons[arm] = budget.epsilon if depends and budget is not None else math.nan
        if not depends and summary["guarantee"] == "dp" and summary["epsilon"] > 0:
            raise RuntimeError(
                f"{part.name}, arm {arm!r}: {cell.scenario.strategy.use} says that it spends nothing, "
                f"and spent epsilon {summary['epsilon']}: its `spends` is wrong"
            )
        last = int(result.metrics.loc[result.metrics["arm"] == arm, "round"].max())
        for seed in part.scenario.seeds:
            if summary["guarantee"] == "none" or summary["epsilon"] == 0:
                stated = math.inf if summary["guarantee"] == "none" else 0.0
                more.append((arm, seed, last, SERVER, "privacy/epsilon", stated))
            if cell.scenario.data.pooled:
                more.append((arm, seed, last, SERVER, "data/pooled", 1.0))
    extra = pd.DataFrame(more, columns=["arm", "seed", "round", "client", "metric", "value"])
    rows = pd.concat([result.metrics, extra]) if more else result.metrics
    rows = rows.assign(scenario=part.entry, task=part.scenario.data.task, epsilon=rows["arm"].map(epsilons))
    return rows[list(COLUMNS)]


def terms(grid: Grid) -> dict[str, Terms]:
    """By scenario: baseline, first metric, clients on which settings were tuned."""
    found = {}
    for name, entry in grid.scenarios.items():
        assert entry.baseline is not None  # the grid is resolved
        assert entry.metric is not None
        found[name] = Terms(entry.baseline, entry.metric, scenario_of(entry, grid.seeds).data.tuned_on)
    return found


def _written(grid: Grid, frame: pd.DataFrame, runs: Sequence[Part], out: Path) -> Comparison:
    known = terms(grid)
    levels, spent = utility(frame, known), costs(frame)
    marked = pareto(points(frame, {name: t.metric for name, t in known.items()}))
    read_back = {part.name: read_run(place_of(part, out)) for part in runs}
    privacy = {name: {arm: said["line"] for arm, said in run.privacy.items()} for name, run in read_back.items()}
    few = {name: {arm: "; ".join(lines) for arm, lines in run.few.items()} for name, run in read_back.items()}
    lost = {
        name: {
            arm: "; ".join(loss["line"] for loss in found.get("losses", []))
            for arm, found in run.summary["arms"].items()
        }
        for name, run in read_back.items()
    }
    tables = {
        "name": grid.name,
        "out": str(out),
        "seeds": list(grid.seeds),
        "scenarios": {name: asdict(t) for name, t in known.items()},
        "tables": {
            task: {"utility": _of_task(levels, task), "costs": _of_task(spent, task)} for task in frame["task"].unique()
        },
        "points": _records(marked),
        "privacy": privacy,
        "lines": {str(name): lines_for(own) for name, own in frame.groupby("scenario", sort=False)},
        "verdicts": verdicts(frame, known),
        "few_texts": {name: arms for name, arms in few.items() if arms},
        "losses": {name: {arm: line for arm, line in arms.items() if line} for name, arms in lost.items()},
    }
    frame.to_parquet(out / f"{FRAME}.part", index=False)
    (out / f"{FRAME}.part").replace(out / FRAME)
    (out / f"{TABLES}.part").write_text(json.dumps(tables, indent=1), encoding="utf-8")
    (out / f"{TABLES}.part").replace(out / TABLES)
    return Comparison(out, grid, frame, tables)


def verdicts(frame: pd.DataFrame, known: Mapping[str, Terms]) -> list[dict[str, Any]]:
    """The verdict of each scenario under each budget: its sentences, with their numbers apart."""
    found = []
    for name, own in frame.groupby("scenario", sort=False):
        budgets = sorted(own["epsilon"].dropna().unique()) or [None]
        for budget in budgets:
            rows = own if budget is None else own[own["epsilon"].isna() | (own["epsilon"] == budget)]
            stated = rows[rows["metric"] == "privacy/epsilon"].groupby("arm", sort=False)["value"].max()
            epsilon = {str(arm): float(value) if math.isfinite(value) else None for arm, value in stated.items()}
            said = verdict(
                rows,
                epsilon,
                baseline=known[str(name)].baseline,
                metric=known[str(name)].metric,
                pooled=sorted(set(rows.loc[rows["metric"] == "data/pooled", "arm"])),
                tuned_on=known[str(name)].tuned_on,
                record=list(reasons(rows)),
            )
            found.append(
                {
                    "scenario": str(name),
                    "epsilon": None if budget is None else float(budget),
                    "statements": [{"words": one.words, "numbers": dict(one.numbers)} for one in said.statements],
                    "sentences": list(said.sentences),
                }
            )
    return found


def _of_task(rows: pd.DataFrame, task: str) -> list[dict[str, Any]]:
    return _records(rows[rows["task"] == task].drop(columns="task"))


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON; figures that are not finite become null."""
    return [{str(key): _plain(value) for key, value in row.items()} for row in rows.to_dict("records")]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
