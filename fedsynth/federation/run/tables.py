"""A run on the terminal: the table of its arms, and a line on the privacy of each."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsynth.evaluation.lines import WORDS
from fedsynth.federation.run.data_facts import read_counts, reasons_in
from fedsynth.federation.run.directory import private_of
from fedsynth.federation.run.egress import Sent, egress_lines
from fedsynth.federation.run.privacy_report import up
from fedsynth.federation.run.summary import missing
from fedsynth.federation.run.times import times_of
from fedsynth.system.terminal import show

NOT_ITS_OWN = "its figures are not those of its method"
COLUMNS = {
    "accuracy": "accuracy",
    "accuracy_held_out_clients": "held-out clients",
    "macro_f1": "macro F1",
    "parsed_accuracy": "accuracy of the written answer",
    "readable": "readable answers",
    "exact_match": "exact match",
    "exact_match_held_out_clients": "held-out clients",
    "field_match": "field match",
    "rouge_l": "ROUGE-L",
}


def print_table(console: Console, result: Any) -> None:
    """The result table, and one privacy line per arm."""
    arms = result.summary["arms"]
    names = [m for m in COLUMNS if any(m in a["metrics"] for a in arms.values())]
    heads = ["arm", *(COLUMNS[n] for n in names), "guarantee", "epsilon", "up", "down"]
    table = Table(title=result.summary["scenario"])
    for head in heads:
        table.add_column(head)
    losses = {arm: found["losses"] for arm, found in arms.items() if found.get("losses")}
    if losses:
        table.add_column("left by filters", min_width=20)
    for arm, found in arms.items():
        figures = [_figure(found["metrics"].get(n)) for n in names]
        told = ["\n".join(loss["line"] for loss in losses.get(arm, [])) or "-"] if losses else []
        epsilon = f"{up(found['epsilon'], 3):.3f}" if found["epsilon"] else "-"
        moved = [f"{found['bytes'][d] / 1e6:.2f} MB" for d in ("up", "down")]
        guarantee = "nothing is released" if found["epsilon"] == 0 else found["guarantee"]
        table.add_row(arm, *figures, guarantee, epsilon, *moved, *map(escape, told))
    lines: dict[str, dict[str, float]] = result.conclusion.get("lines", {})
    for line in WORDS:
        if any(line in own for own in lines.values()):
            own = [f"{lines[n][line]:.3f}" if line in lines.get(n, {}) else "-" for n in names]
            table.add_row(f"({WORDS[line]})", *own, style="dim")
    show(console, table)
    for sentence in result.conclusion.get("verdict", []):
        console.print(sentence, markup=False, soft_wrap=True)
    for reason in reasons_in(read_counts(private_of(result.out))):
        console.print(f"counted in private rows, for this terminal alone: {reason}.", markup=False, soft_wrap=True)
    for arm, few in result.few.items():
        console.print(f"{arm}: {'; '.join(few)}: {NOT_ITS_OWN}", markup=False, soft_wrap=True)
    for line in missing(result.metrics):
        console.print(line, markup=False, soft_wrap=True)
    console.print("privacy, arm by arm:")
    for arm, said in result.privacy.items():
        console.print(f"  {arm}: {said['line']}", markup=False, soft_wrap=True)
    for line in egress_lines(Sent(**sent) for sent in result.summary.get("egress", [])):
        console.print(line, markup=False, soft_wrap=True)
    if names:
        console.print(
            "  Test figures are measured at the clients, on test sets declared public, mostly on models that learnt "
            "private text there: epsilon does not cover these figures, and real sites do not answer them by default.",
            soft_wrap=True,
        )
    console.print(f"written to {result.out} ({result.summary['seconds']:.0f} s)", markup=False, soft_wrap=True)


def print_times(console: Console, result: Any) -> None:
    """The time of each part of a run, and its share."""
    parts = times_of(result.out, result.metrics)
    whole = sum(part.seconds for part in parts) or 1.0
    table = Table(title="where the time went")
    for head in ("arm", "part", "seconds", "share", "clients' CPU seconds"):
        table.add_column(head, justify="left" if head in ("arm", "part") else "right")
    for part in parts:
        clients = "" if part.clients is None else f"{part.clients:.1f}"
        table.add_row(escape(part.arm), part.part, f"{part.seconds:.1f}", f"{part.seconds / whole:.0%}", clients)
    show(console, table)


def _figure(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ± {value['std']:.3f}")
