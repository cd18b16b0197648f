"""The console of a command, and warnings on it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from fedsynth.typed import visible

WIDTH = 120  # characters of a line where nobody looks at a terminal (a file, a pipe)


def console_of(*, error: bool) -> Console:
    """A console no text of which acts on a terminal.

    Args:
        error: It prints on standard error.
    """
    found = Console(stderr=error, highlight=False, force_jupyter=False)
    found = found if found.is_terminal else Console(stderr=error, highlight=False, force_jupyter=False, width=WIDTH)
    found.push_render_hook(_Visibly())
    return found


class _Visibly(RenderHook):
    """Rich prints the control characters of a text as they are: an escape sequence in one would move the cursor."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(each) for each in renderables]


@dataclass(frozen=True)
class _Visible:
    inner: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in console.render(self.inner, options):
            if part.control:  # rich's own
                yield part
            else:
                yield Segment("\n".join(map(visible, part.text.split("\n"))), part.style)


def show(console: Console, table: Table) -> None:
    """A table of which nothing is cut off: a terminal breaks its cells, elsewhere lines are as long as it takes."""
    for column in table.columns:
        column.no_wrap, column.overflow = False, "fold"
    if not console.is_terminal:
        needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
        console.width = max(console.width, needed)
    console.print(table)


def warn(console: Console, text: str) -> None:
    """One warning, in one line."""
    console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)
