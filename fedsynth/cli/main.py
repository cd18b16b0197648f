"""The command `fedsynth`: its options, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedsynth import __version__
from fedsynth.api import scenario_of
from fedsynth.cli.audit import audit_command
from fedsynth.cli.card import card_command
from fedsynth.cli.deployment import server_app, site_app
from fedsynth.cli.export import export_command
from fedsynth.cli.init import init_command
from fedsynth.cli.judging import judge_command
from fedsynth.cli.ledger import ledger_app
from fedsynth.cli.models import model_app
from fedsynth.cli.strategy import strategy_app
from fedsynth.data.places import find
from fedsynth.privacy.ledger_file import LedgerUnusable
from fedsynth.scenario.earlier_keys import OldName
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, shipped_scenarios
from fedsynth.simulation.flower import LaunchFailed, check_flower
from fedsynth.simulation.progress import ProgressBar
from fedsynth.system.proxy import past_proxies
from fedsynth.system.terminal import console_of, show, warn
from fedsynth.typed import BadValue, visible

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("audit")(audit_command)
app.command("card")(card_command)
app.command("export")(export_command)
app.command("init")(init_command)
app.command("judge")(judge_command)
app.add_typer(ledger_app, name="ledger")
app.add_typer(model_app, name="model")
app.add_typer(server_app, name="server")
app.add_typer(site_app, name="site")
app.add_typer(strategy_app, name="strategy")
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Federated transfer of knowledge between a server LLM and clients' small language models."""


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def scenarios(
    keys: Annotated[
        bool, typer.Option("--keys", help="Instead, every key of a scenario: a table in Markdown.")
    ] = False,
) -> None:
    """List the scenarios that come with the package."""
    if keys:
        from fedsynth.scenario.keys import page

        print(page(), end="")
        return
    for path in shipped_scenarios():
        print(path.stem)


@app.command("run")
def run_command(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or a shipped scenario by name.")] = "",
    set_: Annotated[list[str], typer.Option("--set", help="key=value, the key dotted: client.budget.epsilon=2")] = [],  # noqa: B006 - typer makes a list for each call
    arms: Annotated[str, typer.Option(help="Arms to run, separated by commas; 'all' for every arm.")] = "",
    clients: Annotated[int | None, typer.Option(help="Number of clients.")] = None,
    seeds: Annotated[str, typer.Option(help="Public seeds, separated by commas.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="The scenario's smaller run, as its table [quick] says.")
    ] = False,
    from_: Annotated[Path | None, typer.Option("--from", help="Repeat the run in this directory.")] = None,
    resume_: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the run in this directory, which was ended too soon.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory: new or empty.")] = None,
    server: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run on real sites, through the coordinator's server in DIR.")
    ] = None,
    sites: Annotated[
        str,
        typer.Option(
            help="With --server: names of the real sites that take part, with commas; all that were let in by default."
        ),
    ] = "",
    workers: Annotated[int | None, typer.Option(help="Client processes; one per core by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the run's own SuperLink; any free one by default.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Run the clients on this Ray cluster: docs/deployment/ray-cluster.md."),
    ] = None,
    track: Annotated[str, typer.Option(help="mlflow or wandb, or both with a comma: told when the run is done.")] = "",
    profile: Annotated[bool, typer.Option("--profile", help="Print where the time went as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object, last.")] = False,
) -> None:
    """Run SCENARIO, a TOML file or a shipped one by name (fedsynth scenarios), as a simulation on this machine; with
    --server on real sites, by default the coordinator's own scenario."""
    console = console_of(error=True)
    if server is not None:
        if any(given is not None for given in (from_, clients, workers, port, ray)):
            raise BadValue(
                "--from, --clients, --workers, --port and --ray are of simulations: leave them out with --server"
            )
        if not scenario and resume_ is None:
            scenario = str(server / "scenario.toml")
    elif sites:
        raise BadValue("--sites names real sites: say with --server DIR which coordinator's")
    if sum([bool(scenario), from_ is not None, resume_ is not None]) != 1:
        raise BadValue("name a scenario, or a run to repeat with --from DIR, or one to go on with: --resume DIR")
    if resume_ is not None and (set_ or arms or clients is not None or seeds or quick or out is not None or sites):
        raise BadValue(
            "--resume goes on with a run as it was begun: only --workers, --port, --ray, --server, --track, --json go "
            "with it"
        )
    trackers = [name.strip() for name in track.split(",") if name.strip()]
    if trackers:
        from fedsynth.federation.run.trackers import check

        check(trackers)
    known = from_ or resume_
    if known is not None and not known.is_dir():
        raise BadValue(f"there is no directory {str(known)!r}: name that of a run, as runs/NAME-DATE")
    asked = _asked(str(known / "scenario.toml") if known else scenario, set_, arms, clients, seeds, quick=quick)
    # torch and Flower take seconds to import: help and misspelt keys need neither
    if server is not None:
        result = _run_on_sites(console, server, asked, sites, out, resume_)
    else:
        result = _simulate(console, asked, out, from_, resume_, {"workers": workers, "port": port, "ray": ray})
    if trackers:
        from fedsynth.federation.run.trackers import tell

        tell(trackers, asked, result.metrics, result.out)
    from fedsynth.federation.run.tables import print_table, print_times

    shown = console if as_json else console_of(error=False)
    print_table(shown, result)
    if profile:
        print_times(shown, result)
    if as_json:
        print(json.dumps(result.summary))


def _read_early(asked: Scenario) -> None:
    """Refuses a data source that is missing or has a fault before torch and Flower are read, which takes seconds."""
    named = {cell.scenario.data for cell in cells(replace(asked, seeds=asked.seeds[:1]))}
    sources = [data for data in named if data.world is None and data.hub_name is None]
    for data in sources:
        find(data.source)
    if sources:
        from fedsynth.data.tables import read_rows  # kept for the check, which reads the same rows

        for data in sources:
            read_rows(data)


def _simulate(
    console: Console,
    asked: Scenario,
    out: Path | None,
    from_: Path | None,
    resumed: Path | None,
    how: dict[str, Any],
) -> Any:
    check_flower()
    with ProgressBar(console, asked) as watch:
        watch.awaits("reading the data")
        _read_early(asked)
        watch.awaits("loading PyTorch and Flower")
        from fedsynth.simulation.simulate import resume, run

        told: dict[str, Any] = {**how, "on_event": watch.event, "on_warning": watch.warn}
        if from_ is not None:
            from fedsynth.federation.run.environment import differences

            for line in differences(from_, asked):
                watch.warn(f"not as in {from_}: {line}")
        with watch.resumable("fedsynth run --resume {out}"):
            if resumed is not None:
                return resume(resumed, **told)
            return run(asked, out=out, **told)


def _run_on_sites(
    console: Console, server: Path, asked: Scenario, sites: str, out: Path | None, resumed: Path | None
) -> Any:
    check_flower()
    from fedsynth.deployment.plan import chosen, deployed, read_deployment

    names = [name.strip() for name in sites.split(",") if name.strip()]
    if resumed is not None:
        names = list(read_deployment(resumed.absolute()).sites)
    planned = deployed(asked, len(chosen(server, names)))
    from fedsynth.deployment import submit

    with ProgressBar(console, planned, planned.data.clients) as watch:
        told: dict[str, Any] = {"on_event": watch.event, "on_warning": watch.warn}
        with watch.resumable(f"fedsynth run --resume {{out}} --server {shlex.quote(str(server))}"):
            if resumed is not None:
                return submit.resume(server, resumed, **told)
            return submit.submit(server, asked, out=out, names=names, **told)


@app.command("compare")
def compare_command(
    grid: Annotated[list[str], typer.Argument(help="A grid's TOML file; or scenarios, named as for `run`.")],
    epsilons: Annotated[str, typer.Option(help="Budgets, separated by commas; the scenarios' own by default.")] = "",
    seeds: Annotated[str, typer.Option(help="Public seeds, separated by commas; 0,1,2 by default.")] = "",
    arms: Annotated[str, typer.Option(help="Arms, separated by commas; those that run unasked by default.")] = "",
    baseline: Annotated[str, typer.Option(help="The arm to compare with; the first one by default.")] = "",
    set_: Annotated[list[str], typer.Option("--set", help="key=value, as for `run`, of all scenarios.")] = [],  # noqa: B006 - typer makes a list for each call
    out: Annotated[Path | None, typer.Option(help="The comparison's directory; runs/compare-NAME by default.")] = None,
    workers: Annotated[int | None, typer.Option(help="Client processes of each run.")] = None,
    parallel: Annotated[int | None, typer.Option(help="Runs at once; as cores and memory allow by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as one JSON object, last.")] = False,
) -> None:
    """Run scenarios x epsilons x seeds, or go on with them, and compare their arms: docs/compare.md."""
    if parallel is not None and parallel < 1:
        raise BadValue(f"--parallel must be at least 1, got {parallel}")
    check_flower()
    from fedsynth.comparison.grids import asked_for, is_grid, read_grid

    if len(grid) == 1 and is_grid(Path(grid[0])):
        if epsilons or seeds or arms or baseline or set_:
            raise BadValue("--epsilons, --seeds, --arms, --baseline and --set belong in the grid's file")
        asked = read_grid(Path(grid[0]))
    else:
        asked = asked_for(grid, epsilons=epsilons, seeds=seeds or "0,1,2", arms=arms, baseline=baseline, sets=set_)
    console = console_of(error=True)
    console.print(f"{asked.name}: loading PyTorch and Flower", markup=False, soft_wrap=True)
    from fedsynth.comparison.running import compare
    from fedsynth.comparison.tables import NOTES, Lines, costs_table, remarks, utility_table

    place = (out or Path("runs") / f"compare-{asked.name}").absolute()
    done = compare(
        asked,
        place,
        workers=workers,
        parallel=parallel,
        on_event=Lines(console).event,
        on_warning=lambda text: warn(console, text),
    )
    shown = console if as_json else console_of(error=False)
    for task in done.tables["tables"]:
        show(shown, utility_table(done.tables, task))
        show(shown, costs_table(done.tables, task))
    for found in done.tables["verdicts"]:
        at = "" if found["epsilon"] is None else f", epsilon {found['epsilon']:g}"
        shown.print(f"{found['scenario']}{at}: {' '.join(found['sentences'])}", markup=False, soft_wrap=True)
    for word, sentence in remarks(done.tables):
        shown.print(f"{word} {sentence}", markup=False, soft_wrap=True)
    from fedsynth.reporting.comparison_page import write

    page, _ = write(done.out)
    for line in (*NOTES, f"written to {done.out}, the page is {page}"):
        shown.print(line, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(done.tables))


@app.command("check")
def check_command(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or a shipped scenario by name.")],
    set_: Annotated[list[str], typer.Option("--set", help="key=value, the key dotted: client.budget.epsilon=2")] = [],  # noqa: B006 - typer makes a list for each call
    arms: Annotated[str, typer.Option(help="Arms to check, separated by commas; 'all' for every arm.")] = "",
    clients: Annotated[int | None, typer.Option(help="Number of clients.")] = None,
    seeds: Annotated[str, typer.Option(help="Public seeds, separated by commas.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="The scenario's smaller run, as its table [quick] says.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Client processes; one per core by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the forecast as one JSON object, last.")] = False,
) -> None:
    """Check SCENARIO and foresee what a run of it would spend, send, hold and take; nothing is trained or charged."""
    asked = _asked(scenario, set_, arms, clients, seeds, quick=quick)
    check_flower()
    console = console_of(error=True)
    console.print(f"{asked.name}: reading the data, then loading PyTorch and Flower", markup=False, soft_wrap=True)
    _read_early(asked)
    from fedsynth.forecast.check import forecast
    from fedsynth.forecast.tables import print_forecast

    made = forecast(asked, workers=workers, tell=console.print)
    print_forecast(console if as_json else console_of(error=False), made)
    if as_json:
        print(json.dumps(made.to_dict()))
    if made.failures:
        raise typer.Exit(FAILED)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the model: new or empty.")],
    corpus: Annotated[str, typer.Option(help="Public text: CSV, JSONL, Parquet, or .txt with a text per line.")],
    text: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    topic: Annotated[str, typer.Option(help="Column of intent or topic: its lines form few-shot blocks.")] = "",
    held_out: Annotated[str, typer.Option(help="COLUMN=VALUE of the rows to measure on; 2 % by default.")] = "",
    width: Annotated[int, typer.Option(help="Hidden size, a multiple of 32.")] = 192,
    layers: Annotated[int, typer.Option(help="Number of blocks.")] = 4,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the new tokenizer.")] = 4096,
    tokenizer: Annotated[str, typer.Option(help="Folder whose tokenizer is shared; a new one by default.")] = "",
    epochs: Annotated[float, typer.Option(help="Passes over the text.")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of passes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; one per core by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the start and of the order of the text.")] = 0,
) -> None:
    """Pretrain a small language model from scratch on public text, with its tokenizer."""
    if steps is not None and steps < 1:
        raise BadValue(f"--steps must be at least 1, got {steps}")
    if threads is not None and threads < 1:
        raise BadValue(f"--threads must be at least 1, got {threads}")
    from fedsynth.pretraining.public_models import Hardware, Wanted, pretrain_from_text
    from fedsynth.pretraining.public_text import PublicText

    column, equals, value = held_out.partition("=")
    if held_out and not (column and equals and value):
        raise BadValue(f"--held-out needs COLUMN=VALUE, got {held_out!r}")
    card = pretrain_from_text(
        PublicText(corpus, text, topic or None, (column, value) if held_out else None),
        Wanted(width, layers, vocabulary, epochs, steps, seed=seed, tokenizer=tokenizer or None),
        out,
        command=" ".join(["fedsynth", *(a for a in sys.argv[1:] if a != "--resume")]),
        resume=resume,
        hardware=Hardware(device, threads or len(os.sched_getaffinity(0))),
        tell=lambda line: print(line, flush=True),
    )
    print(json.dumps(card, indent=2))


@app.command()
def report(
    place: Annotated[Path, typer.Argument(metavar="DIR", help="Of a run, or of a comparison.")],
    out: Annotated[Path | None, typer.Option(help="The page, an .html file; DIR/report.html by default.")] = None,
    embedder: Annotated[str, typer.Option(help="Model that embeds texts for MAUVE; the scenario's by default.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object, last.")] = False,
    site_only: Annotated[
        bool, typer.Option("--site-only", help="Compare with private text; written to DIR.private, not to be shared.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(help="Folder for every figure as SVG and PNG, every table as CSV and LaTeX.")
    ] = None,
) -> None:
    """Write one HTML page about a run or a comparison, with its figures as JSON and Parquet."""
    if not place.is_dir():
        raise BadValue(
            f"there is no directory {str(place)!r}: name that of a run or of a comparison, as runs/NAME-DATE"
        )
    if not (place / "scenario.toml").is_file() and not (place / "comparison.json").is_file():
        known = [path.parent for name in ("scenario.toml", "comparison.json") for path in place.glob(f"*/{name}")]
        if known:
            named = ", ".join(map(str, sorted(known)[-10:]))
            raise BadValue(f"{str(place)!r} holds runs, and is none itself: name one of {named}")
    if site_only and (out is not None or export is not None):
        raise BadValue("a site-only report stays in the private directory beside the run: leave --out and --export out")
    if site_only:
        from fedsynth.reporting.site_report import write as write_site_report

        page, found = write_site_report(place)
    elif (place / "comparison.json").is_file():
        from fedsynth.reporting.comparison_page import write as write_comparison

        page, found = write_comparison(place, out)
    else:
        from fedsynth.reporting.run_report import write

        page, found = write(place, out, embedder)
    console = console_of(error=as_json)
    console.print(f"written to {page}", markup=False, soft_wrap=True)
    if export is not None:
        from fedsynth.reporting.page_files import export_report

        console.print(f"{export_report(found, export)} files in {export}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(found))


def _asked(
    scenario: str, sets: Sequence[str], arms: str, clients: int | None, seeds: str, *, quick: bool = False
) -> Scenario:
    more = [*sets, *([f"seeds=[{seeds}]"] if seeds else [])]
    return scenario_of(scenario, arms=arms or None, set=more, clients=clients, quick=quick)


def main() -> None:
    """Entry point: one line and a non-zero exit for whatever goes wrong."""
    os.environ.update(past_proxies(os.environ))  # a tracker's server, a mirror of the hub: they may be on this machine
    warnings.showwarning = _one_line
    try:
        # Typer turns Ctrl-C into an exit code, and hands codes back instead of exiting where it does not stand alone.
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except BadValue as problem:
        _end(f"bad input: {problem}", BAD_INPUT)
    except LedgerUnusable as problem:
        _end(f"bad input: {problem}", BAD_INPUT)
    except LaunchFailed as problem:
        _end(f"{problem.what}: {problem}", FAILED)
    except (KeyboardInterrupt, typer.Abort):
        _end("interrupted; nothing of the run is left running", INTERRUPTED)
    except Exception as problem:
        if hasattr(problem, "format_message"):  # click's usage errors
            if not (said := problem.format_message()):  # the help was shown, as there was no argument
                sys.exit(BAD_INPUT)
            way_out = _way_out(problem)
            if way_out:  # click's own guess is another option
                said = f"No such option '{getattr(problem, 'option_name', '')}'"
            first, question, _ = said.partition(" Did you mean ")
            if said.count(question or said) > 1:  # Typer and click each add it
                said = first + question + said.rpartition(question)[2]
            _end(f"bad input: {said}{way_out}", BAD_INPUT)
        raise


def _way_out(problem: Any) -> str:
    """What an unknown option stands for: the command's own of several values (`--epsilons`), or a scenario's key."""
    option, context = getattr(problem, "option_name", ""), getattr(problem, "ctx", None)
    own = [name for each in context.command.params for name in each.opts] if context is not None else []
    return f"; did you mean {option}s?" if option and f"{option}s" in own else _as_key(option)


def _as_key(option: str) -> str:
    """The way out if an unknown option is a key of the scenario: `--epsilon 2` is `--set client.budget.epsilon=2`."""
    from fedsynth.scenario.keys import keys

    wanted = option.lstrip("-").replace("-", "_")
    found = [key.name for key in keys() if wanted and f".{key.name}".endswith(f".{wanted}")]
    return "".join(f"; say --set {name}=VALUE" for name in found[:1]) + "".join(
        f" or {name}=VALUE" for name in found[1:4]
    )


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """An old name of a key is the user's matter, and needs no place in our code; other warnings keep theirs."""
    if issubclass(category, OldName):
        warn(console_of(error=True), str(message))
    else:
        told = warnings.formatwarning(message, category, filename, lineno, line)
        print(*map(visible, told.split("\n")), sep="\n", end="", file=file or sys.stderr)


def _end(message: str, code: int) -> None:
    print(f"fedsynth: {visible(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
