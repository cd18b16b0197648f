"""The command `fedsynth export`: released texts and adapters of a run, with a card, as a folder to hand on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsynth.system.terminal import console_of
from fedsynth.typed import BadValue


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run that is done.")],
    arm: Annotated[list[str], typer.Option(help="An arm; all with a guarantee by default.")] = [],  # noqa: B006 - typer makes a list for each call
    seed: Annotated[list[int], typer.Option(help="A public seed; all by default.")] = [],  # noqa: B006 - likewise
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="New or empty; RUN-export by default.")] = None,
    format: Annotated[str, typer.Option(help="Of the texts: jsonl or parquet.")] = "jsonl",
    without_guarantee: Annotated[
        bool, typer.Option("--without-guarantee", help="Export what has no guarantee, too; the card says so.")
    ] = False,
) -> None:
    """Write released texts and adapters of a run into a folder to hand on, with a card: docs/export.md."""
    if format not in ("jsonl", "parquet"):
        raise BadValue(f"--format must be jsonl or parquet, got {format!r}")
    from fedsynth.reporting.export import export

    place = run.absolute()
    made = export(
        place,
        (out or place.with_name(f"{place.name}-export")).absolute(),
        arms=arm,
        seeds=seed,
        format="jsonl" if format == "jsonl" else "parquet",
        without_guarantee=without_guarantee,
    )
    console = console_of(error=False)
    for name in made.skipped:
        console.print(
            f"left out {name}: it has no guarantee; --without-guarantee exports it", markup=False, soft_wrap=True
        )
    texts, adapters = sum(len(each.corpus) for each in made.texts), len(made.adapters)
    console.print(
        f"{texts} texts and {adapters} adapter{'s' * (adapters != 1)} written to {made.out}; README.md is their card",
        markup=False,
        soft_wrap=True,
    )
