"""Selection of the best drafts of a cluster, by the server LLM's answer or by its likelihoods."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fedsynth.corpus import Corpus
from fedsynth.instructions import one_line
from fedsynth.models.chat import Chat
from fedsynth.models.room import TOO_LONG, misfits
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.task import NO_CARD, Task
from fedsynth.synthesis.augmentation import check_labels
from fedsynth.synthesis.curation import Filtered, keep_rows, refuse_private

if TYPE_CHECKING:
    from fedsynth.models.llm import TextModel  # imports torch, which a scripted or remote LLM does not need

Groups: TypeAlias = Sequence[Sequence[int]]

ANSWER = 64  # tokens of an answer of numbers; a model that thinks first needs many more

LEAD_IN = "The selected texts are:"
SELECTED = "selected"  # the same, as the key of a structured answer

SELECT = """Below is a numbered list of texts with their labels. The labels are: {labels}.

{texts}

Choose the texts to keep:
1. Drop each text that lies outside {domain}, and each text whose label does not fit.
2. Of texts that say nearly the same, keep only the most representative one.
3. Keep at most {keep} texts.
{form}
"""
FORM = (
    f'Answer with one line: "{LEAD_IN}" followed by the numbers of the texts you keep, separated by commas, or by '
    '"none".'
)
STRUCTURED_FORM = f'Answer with JSON: {{"{SELECTED}": [the numbers of the texts you keep, or nothing]}}.'
NUMBERED = "{number}. [{label}] {text}"


def select_prompt(
    examples: Sequence[tuple[str, str]], *, labels: Sequence[str], keep: int, domain: str, structured: bool = False
) -> str:
    """The question to the judge about the (label, text) examples of one cluster, numbered from 1."""
    texts = "\n".join(
        NUMBERED.format(number=i, label=label, text=one_line(text)) for i, (label, text) in enumerate(examples, start=1)
    )
    form = STRUCTURED_FORM if structured else FORM
    return SELECT.format(labels=", ".join(labels), texts=texts, domain=domain, keep=keep, form=form)


def selection_schema(size: int, keep: int) -> str:
    """The JSON schema of an answer about so many texts."""
    numbers = {"type": "array", "items": {"type": "integer", "enum": list(range(1, size + 1))}, "maxItems": keep}
    whole = {"type": "object", "properties": {SELECTED: numbers}, "required": [SELECTED], "additionalProperties": False}
    return json.dumps(whole)


# The list ends where its form ends: the bracket of "1, 3 (2 repeats 1)" and a reason on the next line choose no number.
LINE = re.compile(
    re.escape(LEAD_IN) + r"[\"'*]*[ \t]*\[?(?P<rows>none|\d+(?:[ \t]*(?:,|;|and|,[ \t]*and)?[ \t]*\d+)*)", re.IGNORECASE
)


DIGITS = 9  # of a number of the list: no cluster has more texts, and Python reads no number of thousands of digits


def parse_selected(answer: str, size: int) -> list[int] | None:
    """The kept rows (from 0, in the answer's order, each once), or None if the answer has no such line."""
    match = LINE.search(answer)
    if match is None:
        return None
    numbers = dict.fromkeys(int(n) for n in re.findall(r"\d+", match["rows"]) if len(n) <= DIGITS)
    return [n - 1 for n in numbers if 1 <= n <= size]


def read_selected(answer: str, size: int) -> list[int] | None:
    """The kept rows of a structured answer, as `parse_selected`; None if it is not of the schema."""
    try:
        said = json.loads(answer)
    except (ValueError, RecursionError):  # brackets may nest deeper than any reader goes
        return None
    numbers = said.get(SELECTED) if isinstance(said, dict) and len(said) == 1 else None
    if not isinstance(numbers, list) or not all(type(n) is int and 1 <= n <= size for n in numbers):
        return None
    return [n - 1 for n in dict.fromkeys(numbers)]


def judge_by_instruction(
    llm: TextModel,
    corpora: Mapping[int, Corpus],
    groups: Mapping[int, Groups],
    *,
    labels: Sequence[str],
    keep: int,
    seed: int,
    task: Task = NO_CARD,
    max_new_tokens: int = ANSWER,
) -> dict[int, Filtered]:
    """The paper's judge: the LLM reads each cluster and names the rows to keep (docs/methods/fdkt.md, step 6).

    Numbers out of range are ignored, and those beyond the first `keep`, too. An unreadable answer drops its whole
    cluster, as in the paper; `dropped` counts these rows separately. All sites' clusters go in one call. If a cluster
    and `max_new_tokens` of an answer do not fit into the LLM, the cluster's longest texts are dropped until they do. A
    `structured` LLM answers with JSON, and all else is unreadable.

    Raises:
        ValueError: If a corpus is private, or its groups do not hold each row once.
    """
    _check_groups(corpora, groups, labels, keep)
    reasons: dict[int, list[str | None]] = {site: [None] * len(corpus) for site, corpus in corpora.items()}

    domain = f"this domain: {task.domain.rstrip('.')}" if task.domain else "the domain that most of them share"
    names = {label: task.labels[label].wording if label in task.labels else label for label in labels}

    def question(site: int, group: Sequence[int]) -> str | Chat:
        corpus = corpora[site]
        examples = [(names[corpus.answers[i]], corpus.prompts[i]) for i in group]
        prompt = select_prompt(
            examples, labels=list(names.values()), keep=keep, domain=domain, structured=llm.structured
        )
        schema = selection_schema(len(group), keep) if llm.structured else ""
        return Chat(prompt, task.system, schema=schema) if llm.chats else prompt

    asked = [(site, list(group)) for site in sorted(corpora) for group in groups[site]]
    left = asked
    while left:
        unfit = misfits(llm, [question(site, group) for site, group in left], max_new_tokens)
        left = [each for each, why in zip(left, unfit, strict=True) if why and each[1]]
        for site, group in left:
            longest = max(group, key=lambda row: len(corpora[site].prompts[row]))
            group.remove(longest)
            reasons[site][longest] = TOO_LONG
    asked = [(site, group) for site, group in asked if group]
    prompts = [question(site, group) for site, group in asked]
    answers = llm.complete(prompts, SamplingParams.greedy(max_new_tokens), seed=seed)
    read = read_selected if llm.structured else parse_selected
    for (site, group), answer in zip(asked, answers, strict=True):
        chosen = read(answer, len(group))
        for place, row in enumerate(group):
            if chosen is None:
                reasons[site][row] = "unreadable judgement"
            elif place not in chosen[:keep]:
                reasons[site][row] = "beyond those selected"
    return {site: keep_rows(corpora[site], reasons[site]) for site in sorted(corpora)}


NEAR = 0.8  # share of common words from which two texts of a cluster count as one


def near_identical(one: str, other: str) -> bool:
    """True if two texts share nearly all of their words (Jaccard index, regardless of case)."""
    a, b = set(one.casefold().split()), set(other.casefold().split())
    return len(a & b) >= NEAR * len(a | b)


def judge_by_likelihood(
    llm: TextModel,
    corpora: Mapping[int, Corpus],
    groups: Mapping[int, Groups],
    *,
    labels: Sequence[str],
    keep: int,
    rivals: int = 16,
    seed: int = 0,
    task: Task = NO_CARD,
) -> dict[int, Filtered]:
    """A judge for base LLMs: a text must be likelier after its own label's name than after other labels' names.

    The `keep` likeliest of the remaining texts of a cluster stay, and only one of near-identical ones. All texts of all
    sites are scored in one call. A text is dropped if it does not fit into the LLM after each of its compared labels.

    Args:
        llm: An LLM that scores.
        corpora: Released texts by site.
        groups: The clusters of rows by site.
        labels: The public labels.
        keep: Most texts of a cluster that stay.
        rivals: Other labels that a text's own is compared with, drawn for each text; all where there are no more.
        seed: Seed of that draw.
        task: The card, which gives each label's control code.

    Raises:
        ValueError: If a corpus is private, or its groups do not hold each row once.
    """
    _check_groups(corpora, groups, labels, keep)
    rows = [(site, row) for site in sorted(corpora) for row in range(len(corpora[site]))]
    asked: list[tuple[tuple[int, int], str, str]] = []
    for site, row in rows:
        corpus = corpora[site]
        text = " " + one_line(corpus.prompts[row])
        others = [y for y in labels if y != corpus.answers[row]]
        if len(others) > rivals:
            drawn = np.random.default_rng([seed, site, row]).permutation(len(others))[:rivals]
            others = [others[i] for i in sorted(drawn.tolist())]
        asked += [((site, row), y, text) for y in [corpus.answers[row], *others]]
    unfit = misfits(llm, [task.code(y) for _, y, _ in asked], 0, [text for _, _, text in asked])
    lacking = {at: why for (at, _, _), why in zip(asked, unfit, strict=True) if why is not None}
    asked = [each for each in asked if each[0] not in lacking]
    flat = llm.score([task.code(y) for _, y, _ in asked], [text for _, _, text in asked])
    scores: dict[tuple[int, int], dict[str, float]] = {at: {} for at in rows}
    for (at, y, _), score in zip(asked, flat, strict=True):
        scores[at][y] = score
        if score == -np.inf:  # an endpoint refused the text
            lacking[at] = TOO_LONG

    kept: dict[int, Filtered] = {}
    for site in sorted(corpora):
        corpus = corpora[site]
        reasons: list[str | None] = [lacking.get((site, row)) for row in range(len(corpus))]
        for group in groups[site]:
            own = {row: scores[site, row][corpus.answers[row]] for row in group if (site, row) not in lacking}
            chosen: list[int] = []
            for row in sorted(own, key=lambda row: -own[row]):
                best_other = max((s for y, s in scores[site, row].items() if y != corpus.answers[row]), default=-np.inf)
                if best_other > own[row]:
                    reasons[row] = "another label is likelier"
                elif any(near_identical(corpus.prompts[row], corpus.prompts[other]) for other in chosen):
                    reasons[row] = "near duplicate"
                elif len(chosen) == keep:
                    reasons[row] = "beyond the best of its cluster"
                else:
                    chosen.append(row)
        kept[site] = keep_rows(corpus, reasons)
    return kept


def _check_groups(
    corpora: Mapping[int, Corpus], groups: Mapping[int, Groups], labels: Sequence[str], keep: int
) -> None:
    check_labels(labels)
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    for site, corpus in corpora.items():
        refuse_private(corpus)
        if sorted(row for group in groups[site] for row in group) != list(range(len(corpus))):
            raise ValueError(f"the groups of site {site} must hold each of its {len(corpus)} rows once")
        unknown = sorted(set(corpus.answers) - set(labels))
        if unknown:
            raise ValueError(f"site {site} has answers that are not labels: {unknown}; run well_formed first")
