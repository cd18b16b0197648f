"""Quality of written answers: against references, and against another model's answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from fedsynth.corpus import same
from fedsynth.instructions import one_line
from fedsynth.models.chat import Chat, Prompt
from fedsynth.models.room import misfits
from fedsynth.models.sampling import SamplingParams
from fedsynth.rouge import rouge_l

if TYPE_CHECKING:
    from fedsynth.models.llm import TextModel  # brings torch

# --- Against references ---------------------------------------------------------------------------------------------


def instruction_scores(
    truth: Sequence[str], answers: Sequence[str], *, fields: str = ";", compared: int | None = None
) -> dict[str, float]:
    """Means over the examples, all in 0..1; 0 if there is no example.

    `exact_match`: all fields are right, and there are as many. `field_match`: the share of the reference's fields that
    are right, place by place; further fields of the answer cost nothing. Both ignore case and white space. `rouge_l`:
    F1 between the whole texts.

    Args:
        truth: References.
        answers: One answer per reference.
        fields: Separator of the fields of a text; a text without it is one field.
        compared: Number of first fields that count for the two matches; None: all. Private references may have a
            planted secret as their last field, which no model should learn.

    Raises:
        ValueError: If the numbers of texts differ, `fields` is empty, or `compared` is below 1.
    """
    if len(truth) != len(answers):
        raise ValueError(f"each reference needs an answer, got {len(answers)} answers for {len(truth)} references")
    if not fields:
        raise ValueError("fields must hold the separator of a text's fields")
    if compared is not None and compared < 1:
        raise ValueError(f"compared must be at least 1, got {compared}")

    def split(text: str) -> list[str]:
        return [same(field) for field in text.split(fields)][:compared]

    exact: list[float] = []
    right: list[float] = []
    close: list[float] = []
    for reference, answer in zip(truth, answers, strict=True):
        wanted, given = split(reference), split(answer)
        exact.append(float(wanted == given))
        right.append(sum(w == g for w, g in zip(wanted, given, strict=False)) / len(wanted))
        close.append(rouge_l(reference, answer))
    named = {"exact_match": exact, "field_match": right, "rouge_l": close}
    return {name: float(np.mean(values)) if values else 0.0 for name, values in named.items()}


# --- Against another model's answers --------------------------------------------------------------------------------

Verdict: TypeAlias = Literal["first", "second", "tie"]
Judge: TypeAlias = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[Verdict | None]]
"""(prompts, answers, other answers) -> the better answer, row by row; None if no verdict could be read."""


@dataclass(frozen=True)
class Pairwise:
    """Counts of a model's answers that were judged better than another's, as good, and worse.

    Attributes:
        win: Prompts on which the first model won in both orders.
        tie: Prompts judged a tie, or on which the two orders disagree.
        lose: Prompts on which it lost in both orders.
        unreadable: Prompts without a verdict in at least one order; they count in nothing else.
    """

    win: int
    tie: int
    lose: int
    unreadable: int = 0

    @property
    def wt(self) -> float:
        """Win-tie rate in 0..1 (FedPIT); NaN if no verdict could be read."""
        judged = self.win + self.tie + self.lose
        return (self.win + self.tie) / judged if judged else float("nan")


def pairwise(judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Pairwise:
    """The first model's answers against the second's, judged in both orders, as judges favour a place.

    Raises:
        ValueError: If the numbers of texts differ.
    """
    found = Counter(verdicts(judge, prompts, first, second))
    return Pairwise(win=found["first"], tie=found["tie"], lose=found["second"], unreadable=found[None])


def verdicts(judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[Verdict | None]:
    """The verdict on each prompt from both orders: a tie where they disagree, None where one cannot be read.

    Raises:
        ValueError: If the numbers of texts differ.
    """
    if not len(prompts) == len(first) == len(second):
        raise ValueError(f"each prompt needs two answers, got {len(first)} and {len(second)} for {len(prompts)}")
    swapped: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}
    found: list[Verdict | None] = []
    for one, other in zip(judge(prompts, first, second), judge(prompts, second, first), strict=True):
        readable = one is not None and other is not None
        found.append(None if not readable else one if other is not None and one == swapped[other] else "tie")
    return found


def reference_judge(references: Sequence[str], *, margin: float = 0.05) -> Judge:
    """A judge without an LLM: the answer with the higher ROUGE-L to the prompt's reference is better.

    Args:
        references: One reference per judged prompt, in the same order.
        margin: Difference of ROUGE-L, in 0..1, up to which the two are a tie.
    """

    def judge(prompts: Sequence[str], one: Sequence[str], other: Sequence[str]) -> list[Verdict | None]:
        gaps = [rouge_l(a, y) - rouge_l(b, y) for _, a, b, y in zip(prompts, one, other, references, strict=True)]
        return ["first" if gap > margin else "second" if gap < -margin else "tie" for gap in gaps]

    return judge


VERDICT = "Verdict:"

COMPARE = """Below stand an instruction and two answers to it.

Instruction: {prompt}

Answer A: {one}

Answer B: {other}

Which answer is better? Look at how helpful, relevant, correct and coherent each of them is.
The order in which they stand and their length do not matter.
End with one line: "{verdict}" followed by A, by B, or by "tie" if they are equally good.
"""

# The letters must be capitals: "Verdict: a close call" names no answer.
NAMED = re.compile(
    re.escape(VERDICT) + r"[\"'*\[\s]*(?:(?P<tie>(?:[Aa] )?[Tt](?:ie|IE)\b)|(?:[Aa]nswer )?(?P<letter>[AB])\b)"
)


def compare_prompt(prompt: str, one: str, other: str) -> str:
    """The question to the judge about two answers; A is `one`."""
    return COMPARE.format(prompt=one_line(prompt), one=one_line(one), other=one_line(other), verdict=VERDICT)


def parse_verdict(answer: str) -> Verdict | None:
    """The last verdict of a judge's answer, or None if there is none."""
    verdict: Verdict | None = None
    for match in NAMED.finditer(answer):
        verdict = "tie" if match["tie"] else "first" if match["letter"] == "A" else "second"
    return verdict


def llm_judge(llm: TextModel, *, max_new_tokens: int = 256, seed: int = 0) -> Judge:
    """An instruction LLM as the judge, greedy, asked in its chat form; all prompts of one order go in one call.

    A prompt that does not fit into the LLM has no verdict.
    It must not be the model that wrote the training responses: it would favour its own style.
    """

    def judge(prompts: Sequence[str], one: Sequence[str], other: Sequence[str]) -> list[Verdict | None]:
        texts = [compare_prompt(x, a, b) for x, a, b in zip(prompts, one, other, strict=True)]
        asked: list[Prompt] = [Chat(text) for text in texts] if llm.chats else list(texts)
        fits = [row for row, why in enumerate(misfits(llm, asked, max_new_tokens)) if why is None]
        said = llm.complete([asked[row] for row in fits], SamplingParams.greedy(max_new_tokens), seed=seed)
        found = {row: parse_verdict(text) for row, text in zip(fits, said, strict=True)}
        return [found.get(row) for row in range(len(asked))]

    return judge
