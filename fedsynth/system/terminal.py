"""The console of a command, and warnings on it."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape


def console_of(*, error: bool) -> Console:
    """Wide enough for the table where nobody looks at a terminal (a file, a pipe)."""
    found = Console(stderr=error, highlight=False)
    return found if found.is_terminal else Console(stderr=error, highlight=False, width=120)


def warn(console: Console, text: str) -> None:
    """One warning, in one line."""
    console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)
