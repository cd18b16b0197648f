"""Tables on a terminal and in a file: no figure of them is cut off."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from fedsynth.system.terminal import console_of, show

FIGURES = [f"0.{n} ± 0.0{n}" for n in range(110, 125)]


def of_figures() -> Table:
    table = Table(title="of a run")
    for head in ("arm", *(f"accuracy of kind {n}" for n in range(len(FIGURES)))):
        table.add_column(head, no_wrap=True)
    table.add_row("no_demonstrations_alone", *FIGURES)
    return table


def test_in_a_file_a_row_is_one_line_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    show(console_of(error=False), of_figures())
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if "no_demonstrations_alone" in line)
    assert all(figure in row for figure in FIGURES)
    console_of(error=False).print(of_figures())  # printed as it is, the same table loses figures
    assert not all(figure in capsys.readouterr().out for figure in FIGURES)


def test_a_narrow_terminal_breaks_cells_and_loses_no_character() -> None:
    found = io.StringIO()
    show(Console(file=found, force_terminal=True, width=100, color_system=None), of_figures())
    said = found.getvalue()
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 100
    for n, figure in enumerate(FIGURES):
        column = "".join(line.split("│")[n + 2] for line in said.splitlines() if line.startswith("│"))
        assert column.replace(" ", "") == figure.replace(" ", "")
