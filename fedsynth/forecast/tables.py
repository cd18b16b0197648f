"""The output of `fedsynth check`: the forecast's table, its totals and its warnings."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsynth.federation.run.privacy_report import up
from fedsynth.forecast.check import Forecast
from fedsynth.system.terminal import show, warn


def print_forecast(console: Console, made: Forecast) -> None:
    """Prints the forecast of a run, arm by arm and in all, and its warnings."""
    table = Table(title=f"{made.scenario}: forecast")
    for head in ("arm", "guarantee", "epsilon", "delta", "up", "down", "LLM reads", "LLM writes", "seconds"):
        table.add_column(head)
    for name, arm in made.arms.items():
        epsilon, delta = (
            "-" if x is None else said
            for x, said in ((arm.epsilon, f"{up(arm.epsilon or 0.0, 3):.3f}"), (arm.delta, f"{arm.delta or 0.0:g}"))
        )
        moved = [f"{count / 1e6:.2f} MB" for count in (arm.up, arm.down)]
        table.add_row(
            name, arm.guarantee, epsilon, delta, *moved, f"{arm.read:,}", f"{arm.written:,}", f"{arm.seconds:.0f}"
        )
    show(console, table)
    console.print(
        f"in all about {made.seconds:.0f} s with {made.workers} worker{'s' if made.workers > 1 else ''}, starting and "
        f"ending included; memory {made.memory / 1e9:.1f} GB: {made.worker / 1e9:.1f} GB each worker, "
        f"{made.driver / 1e9:.1f} GB the rest",
        soft_wrap=True,
    )
    for line in made.warnings:
        warn(console, line)
    for line in made.failures:
        console.print(f"[red]error:[/] {escape(line)}", soft_wrap=True)
