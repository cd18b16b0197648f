"""The command `fedsynth audit`: a scenario's mechanisms on canaries, a simulation's charges against its statements."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated

import typer

from fedsynth.system.terminal import console_of
from fedsynth.typed import BadValue

FAILED = 1


def audit_command(
    asked: Annotated[
        str,
        typer.Argument(metavar="SCENARIO|RUN", help="A TOML file, a shipped scenario by name, or a run's directory."),
    ],
    canaries: Annotated[int, typer.Option(help="Canaries of each mechanism.")] = 6000,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of keys and coins, to repeat an audit; a new one by default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the audit; RUN/audit.json is a section of RUN's report."),
    ] = None,
) -> None:
    """Try to refute the privacy statements of a scenario or of a simulation; exit with 1 if one is refuted.

    No data is read but the number of units: canaries take its place. See docs/privacy.md.
    """
    if canaries < 500:
        raise BadValue(f"--canaries must be at least 500, got {canaries}: fewer show next to nothing")
    from fedsynth.audit.auditing import audit
    from fedsynth.audit.tables import print_audit

    told = console_of(error=True)
    made = audit(
        asked,
        seed=secrets.randbits(63) if seed is None else seed,
        canaries=canaries,
        tell=lambda line: told.print(line, markup=False, soft_wrap=True),
    )
    print_audit(console_of(error=False), made)
    if out is not None:
        try:
            out.write_text(json.dumps(made.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as problem:
            raise BadValue(f"{out} cannot be written ({problem.strerror}): name another file") from problem
    for what, finding in made.violations:
        told.print(
            f"fedsynth: audit violated: {what}, layer {finding.layer}, test {finding.test}: {finding.found}",
            markup=False,
            soft_wrap=True,
        )
    if made.violations:
        raise typer.Exit(FAILED)
