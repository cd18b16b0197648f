"""Prompts to a professional model and the reading of its answers: responses, and verdicts on instructions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias, assert_never

from fedsynth.corpus import Corpus
from fedsynth.instructions import one_line
from fedsynth.limits import MAX_TEXT
from fedsynth.models.chat import Chat, Prompt
from fedsynth.models.form import Form, professional_form
from fedsynth.models.room import TOO_LONG, misfits
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.task import NO_CARD, Task
from fedsynth.synthesis.curation import Filtered, keep_rows, refuse_private, well_formed_instructions

if TYPE_CHECKING:
    from fedsynth.models.llm import TextModel  # imports torch, which a scripted or remote model does not need

Judge: TypeAlias = Literal["likelihood", "instruction", "none"]

BEYOND = "beyond the most certain"  # the reason of a step that drops rows as it was told to

# --- Responses ------------------------------------------------------------------------------------------------------


def respond(professional: TextModel, instructions: Corpus, max_new_tokens: int, *, task: Task = NO_CARD) -> Filtered:
    """The instructions with the professional's greedy responses in place of earlier ones.

    Instructions that do not fit into the professional, and those whose response is empty or cannot stand in a record,
    are dropped.

    Args:
        professional: The model; it reads each instruction in the card's form, or as the beginning of a record.
        instructions: Written or public instructions, never private ones.
        max_new_tokens: Most tokens of a response.
        task: The card.

    Raises:
        ValueError: If the corpus is private.
    """
    refuse_private(instructions)
    form = professional_form(task, chats=professional.chats)
    questions = {prompt: form.asked(prompt) for prompt in instructions.prompts}
    short = keep_rows(instructions, misfits(professional, [questions[p] for p in instructions.prompts], max_new_tokens))
    answers = tuple(_responses(professional, [questions[p] for p in short.corpus.prompts], max_new_tokens, form))
    found = well_formed_instructions(replace(short.corpus, answers=answers), answered=True, longest=MAX_TEXT)
    return replace(found, dropped=dict(Counter(short.dropped) + Counter(found.dropped)))


def _responses(professional: TextModel, questions: Sequence[Prompt], max_new_tokens: int, form: Form) -> list[str]:
    # Greedy: the seed has no effect.
    return [form.response(t) for t in professional.complete(questions, SamplingParams.greedy(max_new_tokens), seed=0)]


# --- Selection: the instructions that are worth a response ----------------------------------------------------------


def judged(
    professional: TextModel,
    instructions: Corpus,
    judge: Judge,
    share: float,
    max_new_tokens: int,
    *,
    task: Task = NO_CARD,
) -> Filtered:
    """The instructions that a judge finds good; `none` finds all of them good.

    Args:
        professional: The judging model.
        instructions: Written or public instructions, never private ones.
        judge: The kind of judge.
        share: `likelihood`: see `judged_by_likelihood`.
        max_new_tokens: `likelihood`: see `judged_by_likelihood`.
        task: The card, which says how the professional is asked.

    Raises:
        ValueError: If a judge would read a private corpus, or an argument is out of range.
    """
    match judge:
        case "likelihood":
            return judged_by_likelihood(professional, instructions, share, max_new_tokens, task=task)
        case "instruction":
            return judged_by_instruction(professional, instructions, task=task)
        case "none":
            return Filtered(instructions, {})
        case never:
            assert_never(never)


def judged_by_likelihood(
    professional: TextModel, instructions: Corpus, share: float, max_new_tokens: int, *, task: Task = NO_CARD
) -> Filtered:
    """A judge for base LLMs: it keeps the share of instructions whose responses the professional is most certain of.

    Certainty is the mean log-likelihood per token of its own greedy response. It is low if the instruction cannot be
    understood or the professional does not know the answer, and then its response is likely wrong. The likelihood of
    the instruction itself would prefer the words of public text to those of the clients.

    Args:
        professional: A model that scores.
        instructions: Written or public instructions, never private ones.
        share: Share of the instructions, in (0, 1], rounded up; those without a response never stay.
        max_new_tokens: Most tokens of a response.
        task: The card, which says how the professional is asked.

    Raises:
        ValueError: If the corpus is private, or the share lies outside its range.
    """
    refuse_private(instructions)
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    form = professional_form(task, chats=professional.chats)
    questions = [form.asked(prompt) for prompt in instructions.prompts]
    reasons = misfits(professional, questions, max_new_tokens)
    rows = [row for row, why in enumerate(reasons) if why is None]
    responses = dict(
        zip(rows, _responses(professional, [questions[r] for r in rows], max_new_tokens, form), strict=True)
    )
    reasons = [why if why or responses[row] else "no response" for row, why in enumerate(reasons)]
    rows = [row for row in rows if responses[row]]
    replies = [form.reply(responses[row]) for row in rows]
    unfit = misfits(professional, [questions[row] for row in rows], 0, replies)
    pairs = [(row, reply) for row, reply, why in zip(rows, replies, unfit, strict=True) if why is None]
    certainty = professional.score([questions[row] for row, _ in pairs], [reply for _, reply in pairs])
    certain = {row: score for (row, _), score in zip(pairs, certainty, strict=True) if score > -math.inf}
    best = sorted(certain, key=lambda row: -certain[row])
    chosen = set(best[: math.ceil(share * len(instructions))])
    for row in rows:
        reasons[row] = None if row in chosen else BEYOND if row in certain else TOO_LONG
    return replace(keep_rows(instructions, reasons), lost=())


VERDICT = "Verdict:"

NAMED = re.compile(re.escape(VERDICT) + r"[\"'*\[\s]*(?P<word>keep|drop)\b", re.IGNORECASE)


def judge_prompt(prompt: str, task: Task = NO_CARD) -> str:
    """The question to the judge about one instruction."""
    return task.judged(one_line(prompt), VERDICT)


def parse_verdict(answer: str) -> bool | None:
    """True if the last verdict of an answer is to keep; None if there is none."""
    words = [match["word"].lower() for match in NAMED.finditer(answer)]
    return words[-1] == "keep" if words else None


def judged_by_instruction(
    professional: TextModel, instructions: Corpus, max_new_tokens: int = 256, *, task: Task = NO_CARD
) -> Filtered:
    """The paper's kind of judge: a professional that follows instructions gives a verdict on each one, greedily.

    An answer without a verdict drops its instruction, and is counted separately.

    Raises:
        ValueError: If the corpus is private.
    """
    refuse_private(instructions)
    prompts: list[Prompt] = [judge_prompt(prompt, task) for prompt in instructions.prompts]
    if professional.chats:
        prompts = [Chat(str(prompt), task.system) for prompt in prompts]
    reasons = misfits(professional, prompts, max_new_tokens)
    rows = [row for row, why in enumerate(reasons) if why is None]
    answers = professional.complete([prompts[r] for r in rows], SamplingParams.greedy(max_new_tokens), seed=0)
    words = {True: None, False: "judged not good enough", None: "unreadable judgement"}
    for row, answer in zip(rows, answers, strict=True):
        reasons[row] = words[parse_verdict(answer)]
    return replace(keep_rows(instructions, reasons), lost=())
