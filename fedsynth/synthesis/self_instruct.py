"""Records that a model writes after local examples, and the selection of those worth learning (FedPIT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedsynth.corpus import Corpus, Provenance
from fedsynth.evaluation.fidelity import ifd
from fedsynth.models.form import LINES, Form, Pair
from fedsynth.models.sampling import SamplingParams
from fedsynth.rouge import nearest
from fedsynth.synthesis.curation import Filtered, keep_rows, well_formed_instructions

if TYPE_CHECKING:
    from fedsynth.models.llm import TextModel  # brings torch

OVERLAP = 0.7  # a ROUGE-L F1 above it is too similar; paper, section 3
TRIES = 3  # tries at a response; paper, section 3
MIN_WORDS = 3  # words of an instruction
REFUSALS = ("as a ", "as an ", "sorry", "i'm sorry")  # a chat model's refusals begin so; the paper's list


def generate(
    llm: TextModel,
    shown: Sequence[Pair],
    local: Corpus,
    *,
    candidates: int,
    shots: int,
    max_new_tokens: int,
    seed: int,
    form: Form = LINES,
) -> tuple[Corpus, dict[str, int]]:
    """SynGen: records that differ from every local one and from one another; and the numbers dropped, by reason.

    Decoding is greedy: texts differ only by their demonstrations.

    Args:
        llm: The LLM with the global adapter.
        shown: Local records (`pairs`): the demonstrations.
        local: All local records, shown or not.
        candidates: Number of requested instructions.
        shots: Most demonstrations in a prompt.
        max_new_tokens: Longest instruction, and longest response.
        seed: Seed of the demonstrations.
        form: The form in which the LLM reads and writes records.
    """
    how = {"shots": shots, "max_new_tokens": max_new_tokens, "seed": seed}
    drafts = write_instructions(llm, shown, candidates, **how, form=form)
    formed = well_formed_instructions(drafts.corpus, min_words=MIN_WORDS)
    prompts = formed.corpus.prompts
    new = keep_rows(formed.corpus, _alike(prompts, local.prompts, "instruction like a local one"))
    answers = respond(llm, shown, new.corpus.prompts, **how, form=form)
    answered = well_formed_instructions(replace(new.corpus, answers=tuple(answers)), answered=True)
    # Again with the response: a new instruction can have a copied response.
    whole = texts(answered.corpus)
    unlike = keep_rows(answered.corpus, _alike(whole, texts(local), "record like a local one"))
    single = keep_rows(unlike.corpus, _repeated(texts(unlike.corpus)))
    funnel = {"asked": candidates}
    for step in (drafts, formed, new, answered, unlike, single):
        for reason, count in step.dropped.items():
            funnel[reason] = funnel.get(reason, 0) + count
    return single.corpus, funnel


def write_instructions(
    llm: TextModel,
    shown: Sequence[Pair],
    count: int,
    *,
    shots: int,
    max_new_tokens: int,
    seed: int,
    form: Form = LINES,
) -> Filtered:
    """Instructions, each written after random records; "" for one that did not end, or for a refusal."""
    rng = np.random.default_rng([seed, 0])
    prompts = [form.opening(_demonstrations(shown, shots, rng)) for _ in range(count)]
    written = llm.complete(prompts, SamplingParams.greedy(max_new_tokens), seed=seed)
    told = [form.instruction(text, max_new_tokens) for text in written]
    drafts = Corpus(tuple(_unless_refused(text or "") for text in told), ("",) * count, Provenance.SELF_GENERATED)
    kept = keep_rows(drafts, ["template marker" if text is None else None for text in told])
    return replace(kept, lost=())


def _unless_refused(text: str) -> str:
    return "" if text.lower().startswith(REFUSALS) else text


def respond(
    llm: TextModel,
    shown: Sequence[Pair],
    instructions: Sequence[str],
    *,
    shots: int,
    max_new_tokens: int,
    seed: int,
    form: Form = LINES,
) -> list[str]:
    """A response to each instruction, written after random records; "" after `TRIES` without one."""
    rng = np.random.default_rng([seed, 1])
    found = [""] * len(instructions)
    for _ in range(TRIES):
        missing = [i for i, response in enumerate(found) if not response]
        prompts = [form.asked(instructions[i], _demonstrations(shown, shots, rng)) for i in missing]
        written = llm.complete(prompts, SamplingParams.greedy(max_new_tokens), seed=seed)
        for i, text in zip(missing, written, strict=True):
            found[i] = form.response(text, shown=True)
    return found


def select(
    llm: TextModel,
    candidates: Corpus,
    *,
    keep: int,
    by: Literal["ifs", "random"] = "ifs",
    seed: int = 0,
    form: Form = LINES,
) -> Corpus:
    """SynSel: at most `keep` records, those of the lowest IFS = L(y|x) / L(y), in their order.

    Args:
        llm: The LLM with the local adapter: the global one would prefer its own habits (the paper's footnote).
        candidates: The records of `generate`.
        keep: Most records; the paper's M.
        by: The criterion; `random` is the ablation.
        seed: Seed of the random choice.
        form: The form in which the LLM reads records.
    """
    if by == "random":
        ranked = np.random.default_rng([seed, 2]).permutation(len(candidates))
    else:
        ranked = np.argsort(ifd(llm, candidates.prompts, candidates.answers, form), kind="stable")
    return candidates.take(sorted(ranked[:keep].tolist()))


def pairs(corpus: Corpus) -> list[Pair]:
    """Records as instructions and responses."""
    return list(zip(corpus.prompts, corpus.answers, strict=True))


def texts(corpus: Corpus) -> list[str]:
    """Records in the form for comparisons: without their common marks."""
    return [f"{prompt} {answer}" for prompt, answer in zip(corpus.prompts, corpus.answers, strict=True)]


def _demonstrations(shown: Sequence[Pair], shots: int, rng: np.random.Generator) -> list[Pair]:
    return [shown[i] for i in rng.choice(len(shown), min(shots, len(shown)), replace=False)]


def _alike(written: Sequence[str], local: Sequence[str], reason: str) -> list[str | None]:
    return [reason if close > OVERLAP else None for close in nearest(written, local)]


def _repeated(written: Sequence[str]) -> list[str | None]:
    kept: list[str] = []
    reasons: list[str | None] = []
    for text in written:
        reasons.append("like an earlier one" if nearest([text], kept)[0] > OVERLAP else None)
        kept += [] if reasons[-1] else [text]
    return reasons
