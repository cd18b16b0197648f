"""The gate on a yield: a run whose texts are mostly unusable stops before more work is spent on them."""

from __future__ import annotations

from collections.abc import Mapping

from fedsynth.synthesis.curation import Steps, yields


class YieldTooLow(ValueError):
    """Fewer texts passed the filters than the declared floor asks for."""


def check_yield(name: str, steps: Mapping[int, Steps], floor: float) -> None:
    """Refuses to go on with texts of which too few passed all filters.

    Args:
        name: The texts, as the subject of a message.
        steps: By client, the funnel of its texts.
        floor: Least share of the requested texts; 0 for no gate.

    Raises:
        YieldTooLow: With the share, the floor, the labels that are left, and the step that took most.
    """
    if not floor:
        return
    funnels = [yields(found) for found in steps.values()]
    asked, kept = sum(f[0].before for f in funnels), sum(f[-1].after for f in funnels)
    share = kept / asked if asked else 0.0
    if share >= floor:
        return
    took: dict[str, int] = {}
    for stage in (stage for funnel in funnels for stage in funnel):
        for reason, count in stage.dropped.items():
            took[reason] = took.get(reason, 0) + count
    worst = max(took, key=lambda reason: took[reason], default="")
    left = {label for found in steps.values() for label in found[-1][1].corpus.answers}
    why = f"; most were dropped as {worst!r} ({took[worst]})" if worst else ""
    raise YieldTooLow(
        f"{name}: {kept} of {asked} ({share:.2f}) passed the filters, of {len(left)} labels, and strategy.yield_floor "
        f"is {floor:g}{why}: the run stops before more work is spent; mend the task card or the models, or lower the "
        "floor"
    )
