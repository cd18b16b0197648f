"""The command `fedsynth card`: a first task card, from the class names of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def card_command(
    file: Annotated[Path, typer.Argument(help="Labelled rows: CSV, JSONL or Parquet.")],
    label: Annotated[str, typer.Option(help="Its column of class names.")] = "label",
    text: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
) -> None:
    """Print a [task] table for a scenario: each class name of a file with its words parted. No text of it is shown."""
    from fedsynth.data.partition import label_list  # pandas takes a second to import
    from fedsynth.scenario.schema import Data
    from fedsynth.scenario.task import proposed

    print(proposed(label_list(Data(str(file), label=label, text=text))), end="")
