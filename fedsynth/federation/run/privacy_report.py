"""The privacy report of a run: one sentence for each arm, with its figures and terms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fedsynth.federation.run.log import RunLog
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.plan import BY_RDP, FINE, Mechanism
from fedsynth.privacy.statement import ROWS_OF_A_PERSON, Spending, plan_of


def guarantee_of(run_logs: Sequence[RunLog]) -> str:
    """ "none" if one client of one seed released anything without a mechanism, or the simulator pooled raw text."""
    pooled = any(j.cell.scenario.data.pooled for j in run_logs)
    open_ = any(s.guarantee == "none" for j in run_logs for s in j.spending.values())
    return "none" if pooled or open_ else "dp"


MEASURED = "test figures: measured on task models that learnt private text and stay at their clients"
WORKED = "how long a simulated client worked (seconds): it depends on what was drawn of its text, and no site tells it"
NOT_COVERED = (
    "tuning: settings come from public or simulated data; tuning on private text would cost more",
    "a server that does not run the published bundle: Flower clients execute the code that it sends",
    "what the base models had read before",
)


_LIST = "noise on a client's list of scores, clipped as a whole, each round"
_VOTES = "noise on every count of votes, each unit's votes scaled to norm 1 at most, each round"
MECHANISMS: Mapping[Mechanism, str] = {
    "gradients": "DP-SGD: each unit's gradient is clipped, Gaussian noise is added to the sum of a batch",
    "scores": f"Gaussian {_LIST}",
    "votes": f"Gaussian {_VOTES}",
    "summed_scores": f"Skellam {_LIST}",
    "summed_votes": f"Skellam {_VOTES}",
}
POISSON = "Poisson: each unit enters each batch by a draw of its own"
PLD = f"privacy loss distributions (dp-accounting {version('dp-accounting')}), rounded up on a grid of {FINE:g} or more"
RDP = "Rényi differential privacy at whole orders, for Skellam noise"


PUBLIC = (
    "the number of records that a client declares",
    "label list, tokenizer, longest text",
    "base models, and the words of prompts around released text",
    "all settings of the scenario",
    "seeds of everything but noise and Poisson draws",
)


OF_MECHANISM = ("epsilon", "sigma", "sampling_rate", "steps", "clip_norm")  # by itself, where there are several


def privacy_report(run_logs: Sequence[RunLog]) -> dict[str, Any]:
    """The largest of each figure over clients and seeds: clients differ in n, and each figure has its own worst one."""
    guarantee = guarantee_of(run_logs)
    measured = [MEASURED] if any("/" not in row[4] for j in run_logs for row in j.rows) else []
    worked = [WORKED] if run_logs[0].simulated else []
    head = {"guarantee": guarantee, "line": privacy_line(run_logs), "not_covered": [*measured, *worked, *NOT_COVERED],
            "terms": _terms(run_logs)}  # fmt: skip
    spent = _spent(run_logs)
    if guarantee == "none" or not spent:
        return head
    worst = max(spent, key=lambda s: s.epsilon or 0.0)
    figures = worst.parts[0].to_dict()
    figures["epsilon"] = worst.epsilon
    figures["delta"] = max(s.delta for s in spent)
    figures["epsilon_replace_one"] = max(s.epsilon_replace_one or 0.0 for s in spent)
    alone = [s.epsilon_alone for s in spent if s.epsilon_alone is not None]
    figures["epsilon_alone"] = max(alone, default=None)
    # The sum may be another part's, or another client's: what epsilon rests on stands beside it all the same.
    resting = (part.to_dict()["cohort"] for own in (worst, *spent) for part in own.parts if part.cohort is not None)
    figures["cohort"] = next(resting, None)
    figures["unit"] = " or ".join(sorted({s.unit for s in spent}))
    if rows_only := {tuple(map(plan_of, own.parts)): own for own in spent if own.unit == "row"}.values():
        figures["epsilon_rows"] = {
            str(rows): up(max(own.epsilon_rows(rows) for own in rows_only), 2) for rows in ROWS_OF_A_PERSON
        }
    if len(worst.parts) > 1:  # of each mechanism by itself; what they cost together stands above
        parts = [part.to_dict() for part in worst.parts]
        figures["mechanisms"] = [{name: part[name] for name in ("mechanism", "unit", *OF_MECHANISM)} for part in parts]
        figures |= dict.fromkeys(("mechanism", "sigma", "sampling_rate", "steps", "clip_norm"))
    return {**head, "largest_over_clients": figures}


def _terms(run_logs: Sequence[RunLog]) -> dict[str, Any]:
    """The terms of an arm's figures, in words, and the largest number of units of a client."""
    client, seen = run_logs[0].cell.scenario.client, sorted({kind for j in run_logs for kind in j.released})
    terms: dict[str, Any] = {
        "adversary": "an honest-but-curious server that runs the published bundle",
        "sees": seen,
        "public": list(PUBLIC),
        "assumptions": _assumptions(run_logs).removeprefix("; "),
        "silent": sorted({(j.cell.seed, client) for j in run_logs for client, _ in j.silent}),
    }
    spent = [part for own in _spent(run_logs) for part in own.parts]
    if guarantee_of(run_logs) == "none" or not spent:
        return terms
    noised = [mechanism for mechanism in MECHANISMS if any(s.mechanism == mechanism for s in spent)]
    trained = [s for s in spent if s.mechanism == "gradients"]
    training = client.scorer_training if "scores" in seen else client.generator_training
    rate = min((s.sampling_rate or 1.0 for s in trained), default=1.0)
    units = round(training.expected_batch_size / rate) if trained else 1  # a list of scores has one: the client
    samplers = [POISSON] if trained else []
    if len(trained) < len(spent):
        samplers.append("none: all of the client's data takes part" + (" in votes and lists of scores" * bool(trained)))
    by_rdp = [mechanism in BY_RDP for mechanism in noised]
    accountants = [PLD] * (not all(by_rdp)) + [RDP] * any(by_rdp)
    return {
        **terms,
        "mechanism": "; ".join(MECHANISMS[mechanism] for mechanism in noised),
        "sampler": "; ".join(samplers),
        "accountant": "; ".join(accountants),
        "adjacency": "zero-out: one unit is replaced by an empty one, the number of units is public and stays",
        "composition": "all rounds and releases of a run; clients in parallel: no unit is at two of them",
        **({} if all("votes" in mechanism for mechanism in noised) else {"largest_units": units}),
    }


def _spent(run_logs: Sequence[RunLog]) -> list[Spending]:
    return [s for j in run_logs for s in j.spending.values() if s.epsilon is not None]


def up(value: float, digits: int) -> float:
    """The value rounded up to `digits` places: a printed bound must hold."""
    return math.ceil(value * 10**digits) / 10**digits if math.isfinite(value) else value


def privacy_line(run_logs: Sequence[RunLog]) -> str:
    """One sentence per arm: adversary, what it sees, the bound and what it covers."""
    if any(j.cell.scenario.data.pooled for j in run_logs):
        return "no guarantee: the simulator pools raw private text, which no real server could see"
    seen = " and ".join(sorted({kind for j in run_logs for kind in j.released}))
    if guarantee_of(run_logs) == "none":
        return f"no differential privacy guarantee: {seen} left clients without a mechanism; no epsilon holds for them"
    spent = _spent(run_logs)
    if not spent:
        return "nothing derived from private text leaves a client (test figures aside), so there is nothing to spend"
    epsilon, delta = up(max(s.epsilon or 0.0 for s in spent), 3), max(s.delta for s in spent)
    replaced = up(max(s.epsilon_replace_one or 0.0 for s in spent), 2)
    unit = " or ".join(sorted({s.unit for s in spent}))  # sites may differ in what they protect
    return (
        f"an honest-but-curious server sees {seen}: ({epsilon:.3f}, {delta:g})-DP per {unit}, all rounds, zero-out "
        f"({replaced:.2f} if replaced by another {unit}); largest over "
        + ("clients and seeds, each a world of its own" if run_logs[0].simulated else "sites, in this run alone")
        + ("; simulated: noise reproducible" if any(s.simulated for s in spent) else "")
        + _sums(spent)
        + _assumptions(run_logs)
    )


def _sums(spent: Sequence[Spending]) -> str:
    """The assumptions of each cohort whose sum epsilon rests on, and the figure without it."""
    found: dict[Cohort, float] = {}
    for own in spent:
        for part in own.parts:
            if part.cohort is not None:
                found[part.cohort] = max(found.get(part.cohort, 0.0), own.epsilon_alone or 0.0)
    return "".join(
        f"; by a secure sum of {cohort.clients} clients (no more than {cohort.dropouts} missing, no more than "
        f"{cohort.colluders} in league with the server, {cohort.threshold} to open it, keys pinned by each operator), "
        f"which rests on the noise of {cohort.honest} honest ones; a client's own messages without the sum: "
        f"{up(alone, 2):.2f}"
        for cohort, alone in found.items()
    )


def _assumptions(run_logs: Sequence[RunLog]) -> str:
    """The facts that a simulator reads from private rows and a site would declare, and the silent clients."""
    data = run_logs[0].cell.scenario.data
    silent = len({(j.cell.seed, client) for j in run_logs for client, _ in j.silent})
    missing = (
        f"; {silent} clients gave no usable reply: what they may have spent is not in these figures" if silent else ""
    )
    listed = data.labels == "all" and data.classes
    taken = (
        [] if data.world or not run_logs[0].simulated else (["label list"] if listed else []) + ["number of records"]
    )
    dropped = "; duplicates dropped across clients by the simulator, no site could" if data.duplicates == "drop" else ""
    return (
        f"; {' and '.join(taken)} read from the data by the simulator, a site would declare them{dropped}{missing}"
        if taken
        else missing
    )
