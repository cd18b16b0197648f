"""The package's functions for Python: what the commands of the same names do, with Python's values and results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tomli_w

from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import load as load_scenario
from fedsynth.scenario.toml import resolved
from fedsynth.typed import BadValue

if TYPE_CHECKING:
    from rich.console import Console

    from fedsynth.comparison.running import Comparison
    from fedsynth.forecast.check import Forecast
    from fedsynth.simulation.progress import ProgressBar
    from fedsynth.simulation.result import Result

T = TypeVar("T")
Event = Callable[[dict[str, Any]], None]
Sets = Mapping[str, Any] | Sequence[str]


def scenario_of(
    scenario: Scenario | Mapping[str, Any] | str | Path,
    *,
    arms: Sequence[str] | str | None = None,
    seeds: Sequence[int] | int | None = None,
    set: Sets = (),
    clients: int | None = None,
    quick: bool = False,
) -> Scenario:
    """The scenario that `run` and `check` are asked for; nothing but its TOML file is read.

    Args:
        scenario: The path of a TOML file, the name of a shipped scenario, the table of such a file as a dictionary, or
            a `Scenario`. Relative paths in a dictionary are looked up in the working directory.
        arms: The arms to run: a list, "all", or None for those that run by default.
        seeds: Public seeds; None for the scenario's.
        set: Overrides: a dictionary, whose keys may be dotted (`{"client.budget.epsilon": 2}`), or a list of
            `key=value` as after `--set`.
        clients: Number of clients; None for the scenario's.
        quick: The scenario's smaller run, as its table `[quick]` says; the arguments above override it.

    Raises:
        BadValue: If a name, key or value does not fit; the message has the nearest one that does.
    """
    if isinstance(set, str):
        raise BadValue(f'set must be a dictionary or a list of "key=value", got the text {set!r}: put it into a list')
    more: dict[str, Any] = {}
    if clients is not None:
        more["data.clients"] = clients
    if seeds is not None:
        more["seeds"] = [seeds] if isinstance(seeds, int) else list(seeds)
    sets: list[str | Mapping[str, Any]] = [*([set] if isinstance(set, Mapping) else set), more]
    if isinstance(scenario, Scenario | Mapping):
        found = resolved(scenario, sets, quick=quick)
    else:
        found = load_scenario(scenario, sets, quick=quick)
    if arms is None:
        return found
    named = arms.split(",") if isinstance(arms, str) else list(arms)
    return replace(
        found, run=tuple(found.arms) if arms == "all" else tuple(arm.strip() for arm in named if arm.strip())
    )


def run(
    scenario: Scenario | Mapping[str, Any] | str | Path,
    *,
    arms: Sequence[str] | str | None = None,
    seeds: Sequence[int] | int | None = None,
    set: Sets = (),
    clients: int | None = None,
    quick: bool = False,
    out: Path | str | None = None,
    workers: int | None = None,
    port: int | None = None,
    ray: str | None = None,
    progress: bool = True,
    on_event: Event | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Result:
    """Runs a scenario as a simulation, on this machine or with its clients on a Ray cluster, and shows its progress.

    Args:
        scenario: As for `scenario_of`, as the next five.
        arms: Which arms run.
        seeds: Public seeds.
        set: Overrides.
        clients: Number of clients.
        quick: The smaller run.
        out: The run's directory; must be new or empty. None for `runs/NAME-DATE` in the working directory.
        workers: Number of client processes; None for one per core, as far as memory allows.
        port: Port of the run's SuperLink on this machine; None for any free one.
        ray: HOST:PORT of a Ray cluster that runs already and that this machine belongs to; its CPUs are the workers.
        progress: Show the progress and warnings of the check: a live line on a terminal and in a notebook, plain lines
            on standard error elsewhere.
        on_event: Called with each progress event, as `fedsynth.simulation.simulate.run` has it.
        on_warning: Called with each warning of the check.

    Raises:
        BadValue: If an argument, scenario, data, model, budget, directory or cluster has a fault; nothing has run then.
        fedsynth.simulation.flower.LaunchFailed: The run did not complete; the message has the reason and the log.
    """
    asked = scenario_of(scenario, arms=arms, seeds=seeds, set=set, clients=clients, quick=quick)
    _check_count("workers", workers)
    with _shown(asked, progress) as bar:  # before the imports, which take seconds
        from fedsynth.simulation.simulate import run as simulate

        done = simulate(
            asked,
            out=out,
            workers=workers,
            port=port,
            ray=ray,
            on_event=_both(bar.event if bar else None, on_event),
            on_warning=_both(bar.warn if bar else None, on_warning),
        )
        if bar:
            seconds = float(done.summary["seconds"])
            bar.console.print(f"written to {done.out} ({seconds:.0f} s)", markup=False, soft_wrap=True)
    return done


def resume(
    directory: Path | str,
    *,
    workers: int | None = None,
    port: int | None = None,
    ray: str | None = None,
    progress: bool = True,
    on_event: Event | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Result:
    """Goes on with a simulation that ended too soon; it reaches the results that it would have had.

    Nothing is charged twice: clients reply to a repeated request with the stored answer. A completed run is only read.

    Args:
        directory: The run's.
        workers: As for `run`, as all that follow.
        port: Of its SuperLink.
        ray: A cluster; a run may go on elsewhere than it began.
        progress: Show it.
        on_event: For each event.
        on_warning: Also called with each change of versions, hardware or code since the run began.

    Raises:
        BadValue: If there is no run, its clients' accounts are gone, or there is no such cluster.
        fedsynth.simulation.flower.LaunchFailed: The run did not complete, or still goes on.
    """
    _check_count("workers", workers)
    begun = Path(directory) / "scenario.toml"
    if not begun.is_file():
        raise BadValue(f"{str(directory)!r} holds no run: there is no scenario.toml")
    with _shown(load_scenario(begun), progress) as bar:
        from fedsynth.simulation.simulate import resume as go_on

        told: dict[str, Any] = {"on_event": _both(bar.event if bar else None, on_event)}
        return go_on(
            directory,
            workers=workers,
            port=port,
            ray=ray,
            on_warning=_both(bar.warn if bar else None, on_warning),
            **told,
        )


def load(directory: Path | str) -> Result:
    """The result of a run that is done, from its directory.

    Raises:
        BadValue: If none was completed there, with the way out.
    """
    from fedsynth.simulation.result import read

    return read(Path(directory).absolute())


def check(
    scenario: Scenario | Mapping[str, Any] | str | Path,
    *,
    arms: Sequence[str] | str | None = None,
    seeds: Sequence[int] | int | None = None,
    set: Sets = (),
    clients: int | None = None,
    quick: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Forecast:
    """Checks a scenario and foresees what a run of it would spend, send, hold and take; nothing is trained or charged.

    Args:
        scenario: As for `scenario_of`, as the next five.
        arms: Which arms would run.
        seeds: Public seeds.
        set: Overrides.
        clients: Number of clients.
        quick: The smaller run.
        workers: Number of client processes; None for as many as `run` would use.
        progress: Print a line on each step.

    Raises:
        BadValue: With the fault, as a run would.
    """
    asked = scenario_of(scenario, arms=arms, seeds=seeds, set=set, clients=clients, quick=quick)
    _check_count("workers", workers)
    from fedsynth.forecast.check import forecast

    return forecast(asked, workers=workers, tell=_console().print if progress else lambda _: None)


def compare(
    scenarios: Sequence[str | Path] | str | Path,
    *,
    epsilons: Sequence[float] = (),
    seeds: Sequence[int] | int = (0, 1, 2),
    arms: Sequence[str] | str = (),
    baseline: str | None = None,
    set: Sets = (),
    out: Path | str | None = None,
    workers: int | None = None,
    parallel: int | None = None,
    progress: bool = True,
    on_event: Event | None = None,
) -> Comparison:
    """Runs scenarios x epsilons x seeds, or goes on with them, and compares their arms.

    Args:
        scenarios: Names of shipped scenarios and paths of TOML files. Or the path of a grid's file, which has all that
            the next five say.
        epsilons: Budgets; none: the scenarios' own.
        seeds: Public seeds, the same for all.
        arms: The arms of each scenario; none: those that run by default.
        baseline: The arm to compare with; None for the first.
        set: Overrides of all scenarios, as for `run`.
        out: The comparison's directory; None for `runs/compare-NAME` in the working directory.
        workers: Client processes of each run.
        parallel: Runs at once; None for as many as cores and memory allow.
        progress: Print a line for each run and phase.
        on_event: Called with the events of all runs.

    Raises:
        BadValue: If an argument, a scenario or the directory has a fault; then nothing has run.
        fedsynth.simulation.flower.LaunchFailed: If some runs did not complete; the same call resumes them.
    """
    _check_count("workers", workers)
    _check_count("parallel", parallel)
    from fedsynth.comparison.grids import asked_for, is_grid, read_grid
    from fedsynth.comparison.tables import Lines

    named = [str(scenarios)] if isinstance(scenarios, str | Path) else [str(name) for name in scenarios]
    if len(named) == 1 and is_grid(Path(named[0])):
        if epsilons or arms or baseline or set or seeds != (0, 1, 2):
            raise BadValue("epsilons, seeds, arms, baseline and set belong in the grid's file")
        grid = read_grid(Path(named[0]))
    else:
        seeds = [seeds] if isinstance(seeds, int) else list(seeds)
        sets = list(_texts(set)) if isinstance(set, Mapping) else list(set)
        grid = asked_for(named, epsilons=epsilons, seeds=seeds, arms=arms, baseline=baseline or "", sets=sets)
    from fedsynth.comparison.running import compare as made
    from fedsynth.system.terminal import warn

    console = _console()
    return made(
        grid,
        Path(out or Path("runs") / f"compare-{grid.name}").absolute(),
        workers=workers,
        parallel=parallel,
        on_event=_both(Lines(console).event if progress else None, on_event),
        on_warning=(lambda text: warn(console, text)) if progress else None,
    )


def report(directory: Path | str | Result, *, out: Path | str | None = None, embedder: str = "") -> Path:
    """Writes one HTML page about a run or a comparison, with its figures as JSON and Parquet.

    Args:
        directory: Of the run or the comparison; or a run's result.
        out: The page, an .html file; None for `report.html` in the directory.
        embedder: Model that embeds texts for MAUVE; the scenario's by default.

    Returns:
        The page's path.

    Raises:
        BadValue: If nothing was completed there.
    """
    place = Path(directory if isinstance(directory, str | Path) else directory.out)
    page = None if out is None else Path(out)
    if (place / "comparison.json").is_file():
        from fedsynth.reporting.comparison_page import write as write_comparison

        return write_comparison(place, page)[0]
    from fedsynth.reporting.run_report import write

    return write(place, page, embedder)[0]


def _texts(table: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """A table of overrides as `key=value`, which a grid's file holds."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{above}{key}.")
        else:
            written = tomli_w.dumps({"v": value}).partition("=")[2].strip()
            yield f"{above}{key}=" + " ".join(line.strip() for line in written.split("\n"))  # a list has several


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise BadValue(f"{name} must be a whole number of at least 1, got {value!r}")


def _console() -> Console:
    from fedsynth.simulation.progress import in_notebook
    from fedsynth.system.terminal import console_of

    return console_of(error=not in_notebook())  # a notebook shows what stands on standard error as a fault


def _shown(scenario: Scenario, progress: bool) -> AbstractContextManager[ProgressBar | None]:
    if not progress:
        return nullcontext()
    from fedsynth.simulation.progress import ProgressBar

    return ProgressBar(_console(), scenario)


def _both(first: Callable[[T], None] | None, second: Callable[[T], None] | None) -> Callable[[T], None] | None:
    listeners = [each for each in (first, second) if each is not None]

    def tell(what: T) -> None:
        for each in listeners:
            each(what)

    return tell if listeners else None
