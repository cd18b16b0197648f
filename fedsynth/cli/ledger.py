"""The commands `fedsynth ledger`, and the tables that they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsynth.privacy.ledger_file import LOST
from fedsynth.system.terminal import console_of, show
from fedsynth.typed import BadValue, visible

FAILED = 1
ledger_app = typer.Typer(no_args_is_help=True, help="Read privacy ledgers: of a site, or of a run's simulated clients.")
Place = Annotated[Path, typer.Argument(help="A ledger's file, a site's folder, or a run's directory.")]


@ledger_app.command("show")
def ledger_show(
    place: Place,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per ledger.")] = False,
) -> None:
    """Charges by run and grant, and the requests that were answered. Keys and answers are never shown."""
    from fedsynth.privacy.audit import contents, ledgers_in

    for path in ledgers_in(place):
        found = contents(path)
        if as_json:
            print(json.dumps(found))
        else:
            _print_ledger(console_of(error=False), found)


@ledger_app.command("verify")
def ledger_verify(
    place: Place,
    recovered: Annotated[
        bool, typer.Option("--recover", help="First undo what a killed process left half written.")
    ] = False,
) -> None:
    """Check that ledgers are whole and consistent; exit with 1 and a line per problem where one is not."""
    from fedsynth.privacy.audit import contents, ledgers_in, problems, recover

    paths = ledgers_in(place)
    for path in paths if recovered else ():
        if recover(path):
            print(f"{path}: what a killed process had not committed is undone")
    found = [f"{path}: {problem}" for path in paths for problem in problems(contents(path))]
    for line in found:
        print(visible(line))
    if found:
        raise typer.Exit(FAILED)
    print(f"{len(paths)} ledger{'s' if len(paths) > 1 else ''}: consistent")


@ledger_app.command("export")
def ledger_export(
    place: Place, out: Annotated[Path, typer.Option(help="A new JSONL file: one ledger per line.")]
) -> None:
    """Write ledgers as JSON lines for an auditor, without keys, answers and the key of the data's MAC."""
    from fedsynth.privacy.audit import contents, ledgers_in

    lines = [json.dumps(contents(path)) for path in ledgers_in(place)]
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
    except OSError as problem:
        raise BadValue(f"{out} cannot be written ({problem.strerror}): name a new file") from problem
    print(f"{len(lines)} written to {out}")


def _print_ledger(console: Console, found: dict[str, Any]) -> None:
    from fedsynth.federation.run.privacy_report import up

    spent = (
        "no guarantee" if found["epsilon"] is None else f"epsilon {up(found['epsilon'], 3):.3f} at {found['delta']:g}"
    )
    console.print(f"{found['dataset']}: {spent} ({found['path']})", markup=False, soft_wrap=True)
    for line in _filter_lines(found):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    table = Table()
    for head in ("at", "run", "what", "rounds drawn", "state", "order"):
        table.add_column(head)
    for row in found["reservations"]:
        plan = row["plan"]
        what = (
            row["reason"]
            if plan is None
            else (
                f"{plan['steps']} steps x {row['rounds']}, sigma {plan['noise_multiplier']:g}, "
                f"{plan['expected_batch']} of {plan['records']}" + (f"; {row['reason']}" if row["reason"] else "")
            )
        )
        drawn = "-" if plan is None else f"{row['drawn']} of {row['rounds']}"
        lost = row["run"] == LOST or (plan is not None and row["reason"])  # declared so
        state = "lost" if lost else "no guarantee" if plan is None else "reserved"
        table.add_row(row["at"], escape(row["run"]), escape(what), drawn, state, "")
        for grant in found["grants"]:
            if grant["spent"] == row["id"]:
                table.add_row(
                    grant["at"], "", f"grant {grant['counter']}", "", grant["state"], grant["order_digest"][:12]
                )
    show(console, table)


def _filter_lines(found: dict[str, Any]) -> list[str]:
    """The filter that guards the lifetime cap, and the rest of the cap."""
    from fedsynth.federation.run.privacy_report import up

    cap, by = found["cap"], found["filter"]
    if found["epsilon"] is None:
        return ["nothing can be charged any more"] if cap else []
    if by is None:
        return [
            "as if all plans had been fixed in advance; the filter's figure follows when the account is next opened"
        ]
    told = (
        f"this is as if all plans had been fixed in advance; {up(by['epsilon'], 3):.3f} by the filter of order "
        f"{by['order']}, wherever a plan was chosen after seeing results"
    )
    if cap is None:
        return [told]
    share = max(0.0, by["used"] / by["room"]) if by["room"] > 0 else 1.0
    lines = [
        told,
        f"of the lifetime cap, {cap['epsilon']:g} at {cap['delta']:g}, {min(share, 1.0):.0%} is used by the filter",
    ]
    if by["closed"]:
        lines.append("the filter is full: what is reserved is answered, and no further plan is admitted")
    return lines
