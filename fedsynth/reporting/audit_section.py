"""The section of a run's page on its audit: the bound that was found beside the stated one, and what was violated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsynth.reporting.page import Block, Cell, Items, Table

LAYERS = ("structural", "profile", "bound")


def audit_section(audit: Mapping[str, Any]) -> list[Block]:
    """Tables of an `audit.json`, and a line for each violation.

    Args:
        audit: What `fedsynth audit --json` wrote.
    """
    rows: list[list[Cell]] = [
        [
            each["mechanism"],
            ", ".join(each["arms"]),
            f"{each['epsilon']:.3f}",
            f"{each['bound']['lower']:.2f}",
            f"{each['bound']['ceiling']:.2f}",
            *(_layer(each["findings"], layer) for layer in LAYERS),
        ]
        for each in audit["mechanisms"]
    ]
    heads = ["mechanism", "arms", "stated epsilon", "lower bound", "ceiling", *LAYERS]
    note = (
        "The mechanisms of this scenario ran on canaries; no text was read for it. The lower bound holds with "
        f"{audit['confidence']:.0%} confidence; the ceiling is the most that so many canaries can show. An audit can "
        "refute a statement and never proves one."
    )
    blocks: list[Block] = [Table(heads, rows, note=note, words=frozenset({0, 1, 5, 6, 7}))]
    if charges := audit["charges"]:
        tests = list(dict.fromkeys(finding["test"] for own in charges.values() for finding in own))
        kept: list[list[Cell]] = [[arm, *(_test(own, test) for test in tests)] for arm, own in charges.items()]
        caption = "Ledgers, grants and released texts against the statements"
        blocks.append(Table(["arm", *tests], kept, caption=caption, words=frozenset(range(len(tests) + 1))))
    named = [(each["mechanism"], each["findings"]) for each in audit["mechanisms"]] + list(charges.items())
    wrong = [
        (f"{name}, {finding['layer']}, {finding['test']}:", finding["found"])
        for name, findings in named
        for finding in findings
        if finding["violated"]
    ]
    return [*blocks, Items(wrong)] if wrong else blocks


def _layer(findings: Sequence[Mapping[str, Any]], layer: str) -> str:
    own = [finding for finding in findings if finding["layer"] == layer]
    wrong = [finding["test"] for finding in own if finding["violated"]]
    return f"VIOLATED: {', '.join(wrong)}" if wrong else f"{len(own)} of {len(own)} hold"


def _test(findings: Sequence[Mapping[str, Any]], test: str) -> str:
    return "VIOLATED" if any(finding["violated"] for finding in findings if finding["test"] == test) else "holds"
