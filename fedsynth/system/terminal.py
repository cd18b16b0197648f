"""The console of a command, and warnings on it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.markup import escape
from rich.segment import Segment

from fedsynth.typed import visible


def console_of(*, error: bool, width: int = 120) -> Console:
    """Wide enough for the table where nobody looks at a terminal (a file, a pipe); no text of it acts on a terminal.

    Args:
        error: It prints on standard error.
        width: Characters of a line where nobody looks at a terminal.
    """
    found = Console(stderr=error, highlight=False)
    found = found if found.is_terminal else Console(stderr=error, highlight=False, width=width)
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


def warn(console: Console, text: str) -> None:
    """One warning, in one line."""
    console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)
