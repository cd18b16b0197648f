"""The arms of a finished simulation judged against each other, pair by pair, by a language model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedsynth.evaluation.text import Judge, llm_judge, verdicts
from fedsynth.evaluation.utility import bootstrap
from fedsynth.federation.run.directory import RESPONSES, private_of
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.server import Endpoint, host_of
from fedsynth.scenario.toml import cells
from fedsynth.system.proxy import is_loopback
from fedsynth.typed import BadValue

if TYPE_CHECKING:
    from fedsynth.models.llm import TextModel  # brings torch

FILE = "judgements.json"  # in the run's directory: counts, no text


@dataclass(frozen=True)
class Judged:
    """Two arms compared on the same test instructions, each pair of responses in both orders.

    Attributes:
        judge: Name of the judge.
        first: An arm.
        second: The other arm.
        win: Instructions on which the first arm's response won in both orders.
        tie: Instructions judged a tie, or on which the two orders disagree.
        lose: Instructions on which it lost in both orders.
        unreadable: Instructions without a verdict in at least one order; they count in nothing else.
        net: (win - lose) / judged, in -1..1; None if no verdict could be read.
        low: Lower end of its 95 % interval: seeds are drawn, then instructions within each.
        high: Upper end.
    """

    judge: str
    first: str
    second: str
    win: int
    tie: int
    lose: int
    unreadable: int
    net: float | None
    low: float | None
    high: float | None


Responses = dict[tuple[int, int, int], tuple[str, str]]
"""(seed, client, row of its test set) -> instruction, response."""


def judge_run(
    out: Path, scenario: Scenario, judge: Judge, name: str, arms: Sequence[str], *, most: int, seed: int = 0
) -> list[Judged]:
    """Judges each pair of arms, and records the counts in the run's directory.

    Args:
        out: A simulation's directory; its private directory stands beside it.
        scenario: The run's.
        judge: Compares two responses.
        name: Its name in the record.
        arms: Two or more arms of the run.
        most: Most instructions of a pair of arms.
        seed: Of the draw of instructions.

    Raises:
        BadValue: If a run or arm has no responses, or two arms share no test instruction.
    """
    if len(set(arms)) < 2:
        raise BadValue(f"--arms needs two arms or more, got {', '.join(arms) or 'none'}")
    found = {arm: responses(out, scenario, arm) for arm in dict.fromkeys(arms)}
    done = [
        _compared(found[a], found[b], Judged(name, a, b, 0, 0, 0, 0, None, None, None), judge, most, seed)
        for a, b in combinations(found, 2)
    ]
    _record(out, done)
    return done


def _compared(one: Responses, other: Responses, pair: Judged, judge: Judge, most: int, seed: int) -> Judged:
    both = [key for key in sorted(one) if key in other and one[key][0] == other[key][0]]
    if not both:
        raise BadValue(f"the arms {pair.first!r} and {pair.second!r} have no test instruction in common")
    drawn = np.random.default_rng([seed, 0x10D6E]).permutation(len(both))[:most]
    keys = [both[i] for i in sorted(drawn.tolist())]
    said = verdicts(judge, [one[k][0] for k in keys], [one[k][1] for k in keys], [other[k][1] for k in keys])
    values = {"first": 1.0, "tie": 0.0, "second": -1.0}
    kept = [(key[0], row, values[v]) for row, (key, v) in enumerate(zip(keys, said, strict=True)) if v is not None]
    won, tied, lost, unread = (said.count(verdict) for verdict in ("first", "tie", "second", None))
    pair = replace(pair, win=won, tie=tied, lose=lost, unreadable=unread)
    if not kept:
        return pair
    series = pd.DataFrame(kept, columns=["seed", "client", "value"]).set_index(["seed", "client"])["value"]
    low, high = bootstrap(series)
    return replace(pair, net=float(series.mean()), low=low, high=high)


def responses(out: Path, scenario: Scenario, arm: str) -> Responses:
    """The responses of an arm's clients to their test instructions, as of its last round.

    Raises:
        BadValue: If there are none: the task is no instruction following, the run was on real sites or of an earlier
            version, or its private directory is gone.
    """
    if scenario.data.task != "instructions":
        raise BadValue(f"a judge compares responses, and data.task = {scenario.data.task!r} has labels")
    known = sorted({cell.arm for cell in cells(scenario)})
    if arm not in known:
        raise BadValue(f"the run has no arm {arm!r}; it has {', '.join(known)}")
    found: Responses = {}
    for path in sorted((private_of(out) / arm).glob(f"seed-*/client-*/{RESPONSES}")):
        seed, client = (int(part.rpartition("-")[2]) for part in path.parts[-3:-1])
        for row, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            instruction, _, response = json.loads(line)
            found[seed, client, row] = (instruction, response)
    if not found:
        raise BadValue(
            f"no responses of the arm {arm!r} in {private_of(out)}: only simulations keep them, in the private "
            "directory beside the run"
        )
    return found


def _record(out: Path, done: Sequence[Judged]) -> None:
    again = {(each.judge, each.first, each.second) for each in done}
    kept = [each for each in judgements(out) if (each["judge"], each["first"], each["second"]) not in again]
    part = out / f"{FILE}.part"
    part.write_text(json.dumps([*kept, *map(asdict, done)], indent=1) + "\n", encoding="utf-8")
    part.replace(out / FILE)


def judgements(out: Path) -> list[dict[str, Any]]:
    """The judgements that were recorded in a run's directory."""
    try:
        found: list[dict[str, Any]] = json.loads((out / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as problem:
        raise BadValue(f"{out / FILE} cannot be read: remove it, and judge again") from problem
    return found


def open_judge(scenario: Scenario, judge: str | Endpoint, *, public_data: bool, max_new_tokens: int) -> Judge:
    """A language model as the judge.

    Args:
        scenario: The run's.
        judge: A model by name, or an endpoint.
        public_data: The clients' text is declared public, so that responses of models that learnt it may go anywhere.
        max_new_tokens: Longest verdict.

    Raises:
        BadValue: If the model does not converse, or responses would leave this machine without that declaration.
    """
    model: TextModel
    if isinstance(judge, Endpoint):
        host = host_of(judge.endpoint)
        if not (is_loopback(host) or public_data or scenario.data.world is not None):
            raise BadValue(
                f"responses of models that learnt private text would go to {host}: serve the judge on this machine, or "
                "declare with --public-data that the clients' text is public"
            )
        from fedsynth.models.endpoint import RemoteLLM

        # Nothing is kept in the user's cache: the responses have no guarantee.
        model = RemoteLLM.connect(replace(judge, cache=False))
    else:
        from fedsynth.models.llm import LocalLLM  # torch takes seconds to import

        model = LocalLLM.for_server(judge)
    if not model.chats:
        raise BadValue(
            "the judge is asked a question, and this model goes on after text: name one with a chat template, or an "
            "endpoint with --api chat"
        )
    return llm_judge(model, max_new_tokens=max_new_tokens)


def figure(value: float | None) -> str:
    """A share or difference as text; "-" where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
