"""The progress of a run: one live line on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import html
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells

# In the order of the methods' steps; the bar does not go back if a method repeats a phase.
PHASES = ("synthesize", "finetune", "self_train", "select", "write", "judge", "respond", "augment", "score", "teach",
          "tune", "adopt", "learn", "evaluate")  # fmt: skip

QUIET_SECONDS = 30.0  # without a line, outside of terminals


class ProgressBar:
    """Phase, number of clients done, share of texts kept, epsilon spent, clients a minute, time left.

    Args:
        console: Shows the bar.
        scenario: The run's scenario.
        sites: Number of real sites; None for a simulation.
    """

    def __init__(self, console: Console, scenario: Scenario, sites: int | None = None) -> None:
        self.console = console
        self.cells = len(cells(scenario))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.plain = not (console.is_terminal or in_notebook())
        self.live: Any = (
            NotebookLine()
            if in_notebook()
            else Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        )
        self.task = self.live.add_task("starting", total=1000 * self.cells)
        self.at = self.furthest = 0
        self.rounds = scenario.rounds  # an arm with fewer rounds jumps to the end of its part
        self.last: tuple[str, str, int] = ("", "", 0)
        self.begun = self.started = self.spoke = time.monotonic()
        self.awaited, self.ended = "starting", threading.Event()
        self.out: Path | None = None
        what = f"{scenario.data.clients} clients, {self.cells} cells (arms x seeds), data {scenario.data.source}"
        if sites is not None:
            what = f"{sites} site{'s' if sites > 1 else ''}, each with its own data"
        console.print(f"[bold]{escape(scenario.name)}[/]: {escape(what)}", soft_wrap=True)

    def awaits(self, what: str) -> None:
        """Says what the run waits for until the next event."""
        self.awaited, self.spoke = what, time.monotonic()
        if self.plain:
            self.console.print(f"{what} ...", markup=False, soft_wrap=True)
        else:
            self.live.update(self.task, description=what, completed=self.furthest)

    @contextmanager
    def resumable(self, command: str) -> Iterator[None]:
        """Says how a run is gone on with that ends early, by Ctrl-C or by a fault.

        Args:
            command: The command, with `{out}` for the run's directory.
        """
        try:
            yield
        except BaseException:
            if self.out is not None and (self.out / "scenario.toml").is_file():
                line = command.format(out=shlex.quote(str(self.out)))
                self.console.print(f"go on with it: {line}", markup=False, soft_wrap=True)
            raise

    def _beat(self) -> None:
        """A line where nothing was said for long, so that a log shows that the run goes on."""
        quiet = QUIET_SECONDS
        while not self.ended.wait(quiet / 10):
            if (silent := time.monotonic() - self.spoke) >= quiet:
                minutes = (time.monotonic() - self.started) / 60
                said = f"still {self.awaited} (nothing new for {silent:.0f} s; {minutes:.1f} min by the clock)"
                self.console.print(said, markup=False, soft_wrap=True)
                self.spoke = time.monotonic()

    def __enter__(self) -> ProgressBar:
        self.live.__enter__()
        if self.plain:  # a live line counts the seconds
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.ended.set()
        self.live.__exit__(*problem)

    def warn(self, text: str) -> None:
        """Prints a warning above the live line."""
        self.console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def event(self, event: dict[str, Any]) -> None:
        """Shows one of the run's events."""
        self.spoke = time.monotonic()
        if event.get("event") == "cell":
            self.at = int(event["number"])
            self._show(event, "", 0, 1)
        elif event.get("event") in ("data", "workers", "sites"):
            self.console.print(event["line"], markup=False, soft_wrap=True)
        elif event.get("event") == "begun":
            self.out = Path(event["out"])
        elif event.get("event") == "awaited":
            self.awaits(event["line"])
        elif event.get("event") == "warning":
            self.warn(event["text"])
        elif event.get("event") == "result":
            said = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in event["figures"].items())
            many = event["clients"]
            over = f"the mean of {many} clients" if many > 1 else "1 client"
            self.console.print(f"{event['arm']} seed {event['seed']}: {said}, {over}", markup=False, soft_wrap=True)
        elif event.get("event") == "progress":
            self._show(event, event["phase"], event["done"], event["total"])

    def _show(self, event: dict[str, Any], phase: str, done: int, total: int) -> None:
        cell, number = f"{event['arm']} seed {event['seed']}", int(event.get("round", 1))
        place = PHASES.index(phase) if phase in PHASES else 0
        share = (max(number, 1) - 1 + (place + done / max(total, 1)) / len(PHASES)) / self.rounds
        self.furthest = max(self.furthest, int(1000 * (self.at + min(share, 1.0))))
        self.awaited = f"at {self._line(event, cell, phase or 'start', number)}"
        if (cell, phase, number) != self.last:
            self.last, self.begun = (cell, phase, number), time.monotonic()
            if self.plain and phase:
                self.console.print(self._line(event, cell, phase, number), markup=False, soft_wrap=True)
        minutes = (time.monotonic() - self.begun) / 60
        speed = f", {done / minutes:.0f}/min" if done and minutes > 0 else ""
        text = f"{self._line(event, cell, phase or 'start', number)} {done}/{total}{speed}"
        self.live.update(self.task, completed=self.furthest, description=text)

    def _line(self, event: dict[str, Any], cell: str, phase: str, number: int) -> str:
        turn = f" round {number}/{self.rounds}" if self.rounds > 1 and number else ""
        told = [f"kept {_percent(event['kept'])}"] if event.get("kept") is not None else []
        told += [f"epsilon {event['epsilon']:.2f}"] if event.get("epsilon") is not None else []
        return f"[{self.at + 1}/{self.cells}] {cell}{turn}: {phase}" + (f" ({', '.join(told)})" if told else "")


def in_notebook() -> bool:
    """True in a notebook's kernel, which has one output for each cell and no terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class NotebookLine:
    """The live line as one output of a notebook's cell, which is replaced: HTML that needs no widgets."""

    def __enter__(self) -> NotebookLine:
        from IPython.display import HTML, display

        self.html, self.shown_at = HTML, 0.0
        self.output = display(HTML("starting"), display_id=True)
        return self

    def __exit__(self, *problem: object) -> None:
        self.output.update(self.html(""))

    def add_task(self, description: str, total: int) -> int:
        """The line's only task; a run has one."""
        self.total, self.description = total, description
        return 0

    def update(self, task: int, *, completed: int, description: str) -> None:  # noqa: ARG002 - as of rich's Progress
        """Shows a bar and the description; at most five times a second, but for a new phase."""
        phase, now = description.rpartition(": ")[2].partition(" ")[0], time.monotonic()
        if phase == self.description and now - self.shown_at < 0.2:
            return
        self.description, self.shown_at = phase, now
        bar = f"<progress value='{completed}' max='{self.total}' style='width:12em'></progress>"
        self.output.update(self.html(f"{bar} {html.escape(description)}"))


def _percent(share: float) -> str:
    """A share as a percentage; 0 % and 100 % only if exact."""
    return f"{share:.0%}" if share in (0, 1) else f"{min(max(share, 0.01), 0.99):.0%}"
