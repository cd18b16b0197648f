"""An audit on a terminal: a table of tests for each mechanism and arm, and what the limits err in together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from fedsynth.audit.auditing import Audit
from fedsynth.audit.layers import Finding, error_line


def print_audit(console: Console, made: Audit) -> None:
    """Prints what was found."""
    for each in made.mechanisms:
        title = f"{each.mechanism} of {', '.join(each.arms)}: epsilon {each.epsilon:.3f} at {each.delta:g}"
        console.print(_table(f"{title}; {each.canaries:,} canaries, {each.seconds:.1f} s", each.findings))
    if made.charges:
        console.print(_charges(made.charges))
    for arm, why in made.left_out.items():
        console.print(f"not audited: {arm}: {why}", markup=False, soft_wrap=True)
    if made.mechanisms:
        console.print(error_line(len(made.mechanisms)), markup=False, soft_wrap=True)
    verdict = (
        "no test refutes a statement" if not made.violations else f"{len(made.violations)} tests refute statements"
    )
    console.print(f"{verdict}; --seed {made.seed} repeats this audit", markup=False, soft_wrap=True)


def _charges(charges: Mapping[str, Sequence[Finding]]) -> Table:
    """The arms of a run; what is violated is told in words at the end."""
    table = Table(title="charges against statements", title_justify="left")
    for head in ("arm", *(finding.test for finding in next(iter(charges.values())))):
        table.add_column(head, no_wrap=True)
    for arm, findings in charges.items():
        table.add_row(arm, *("VIOLATED" if finding.violated else "holds" for finding in findings))
    return table


def _table(title: str, findings: Sequence[Finding]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in ("layer", "test", "found", ""):
        table.add_column(head, no_wrap=head in ("layer", "test"))
    for finding in findings:
        table.add_row(finding.layer, finding.test, finding.found, "VIOLATED" if finding.violated else "")
    return table
