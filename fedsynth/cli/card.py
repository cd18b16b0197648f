"""The command `fedsynth card`: a first task card, from the class names of a file, or for its instructions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def card_command(
    file: Annotated[Path, typer.Argument(help="Labelled rows: CSV, JSONL or Parquet.")],
    label: Annotated[str, typer.Option(help="Its column of class names.")] = "label",
    text: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
    attributes: Annotated[list[str], typer.Option(help="A column whose values generators write by, too.")] = [],  # noqa: B006 - typer makes a list for each call
    response: Annotated[str | None, typer.Option(help="Instructions: its column of responses.")] = None,
) -> None:
    """Print the task card of a scenario: each class name of a file with its words parted. No text of it is shown."""
    from fedsynth.data.partition import label_list  # pandas takes a second to import
    from fedsynth.data.tables import read_rows, values_of
    from fedsynth.scenario.data import Data
    from fedsynth.scenario.task import proposed, proposed_for_instructions

    if response is not None:
        read_rows(Data(str(file), task="instructions", text=text, response=response))  # refuses what a run would
        print(proposed_for_instructions(), end="")
        return
    data = Data(str(file), label=label, text=text, attributes=tuple(attributes))
    print(proposed(label_list(data), values_of(data)), end="")
