"""Curation of released texts: the kept rows, and the reasons for dropping others."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # ships no types

from fedsynth.corpus import Corpus, Provenance, blank, pool, same
from fedsynth.rouge import nearest, words
from fedsynth.synthesis.sentences import code_or_markup

EDGES = " -._~/\\*|#"  # FDKT strips these at both ends of a text of one line
# Control characters and halves of pairs; tabs, line ends and page ends are white space that people type.
BROKEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
# Characters that change the shown order of a text (overrides, embeddings, isolates), and tags, which are invisible.
# Marks of direction (U+200E, U+200F, U+061C) occur in honest Hebrew and Arabic text.
DISGUISED = re.compile("[\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")
TAGGED = ("gbeng", "gbsct", "gbwls")  # flags whose emoji are written with tags: England, Scotland, Wales
FLAG = re.compile(
    "\U0001f3f4(?:" + "|".join("".join(chr(0xE0000 + ord(c)) for c in name) for name in TAGGED) + ")\U000e007f"
)


@dataclass(frozen=True)
class Filtered:
    """The result of a step of curation.

    Attributes:
        corpus: The kept rows, in their order.
        dropped: Reason -> number of rows; they add up to the dropped rows.
        lost: Labels of the corpus before the step that have no row left.
    """

    corpus: Corpus
    dropped: Mapping[str, int]
    lost: tuple[str, ...] = ()


Steps: TypeAlias = list[tuple[str, Filtered]]
"""The steps of a funnel by name, in order."""


@dataclass(frozen=True)
class Stage:
    """One line of a funnel: rows before and after a step."""

    name: str
    before: int
    after: int
    dropped: Mapping[str, int]
    lost: tuple[str, ...]


def refuse_private(corpus: Corpus) -> None:
    """Refuses private text: curation and augmentation may see released text only, at each entry and before each model.

    Raises:
        ValueError: If the corpus is private.
    """
    if corpus.provenance is Provenance.PRIVATE:
        raise ValueError(
            f"a private corpus ({len(corpus)} examples) came where only released text is read; "
            "make synthetic text from it under a grant first (fedsynth.privacy.release)"
        )


def keep_rows(corpus: Corpus, reasons: Sequence[str | None]) -> Filtered:
    """The rows without a reason to drop them."""
    rows = [i for i, reason in enumerate(reasons) if reason is None]
    kept = corpus.take(rows)
    left = set(kept.answers)
    return Filtered(
        corpus=kept,
        dropped=dict(Counter(reason for reason in reasons if reason is not None)),
        lost=tuple(label for label in dict.fromkeys(corpus.answers) if label not in left),
    )


def well_formed(
    corpus: Corpus,
    *,
    labels: Sequence[str],
    min_words: int,
    max_words: int | None = None,
    sentences: bool = False,
    longest: int | None = None,
) -> Filtered:
    """Texts that could be private ones of one of the labels, stripped at both ends (FDKT's invalid filter, and more).

    Texts that people write pass: any script, several lines, headings and times ("Plan: continue", "at 3:45"), lists.

    Args:
        corpus: Texts and their class names.
        labels: The public labels; other answers are dropped.
        min_words: Fewest words (`fedsynth.rouge.words`); a text of signs alone, as an emoji, counts as one. FDKT: 10.
        max_words: Most words; None for no limit.
        sentences: True to drop texts that look like code, JSON or markup (`fedsynth.synthesis.sentences`).
        longest: Most characters; None for no limit. No client accepts a request with a text above `limits.MAX_TEXT`.

    Raises:
        ValueError: If the corpus is private.
    """
    refuse_private(corpus)
    known = set(labels)

    def reason(text: str, label: str) -> str | None:
        if label not in known:
            return "unknown label"
        if longest is not None and len(text) > longest:
            return "too long"
        if (broken := _broken(text)) is not None:
            return broken
        if _runs_on(text, label):
            return "template marker"
        count = _count(text)
        if count < min_words:
            return "too short"
        if max_words is not None and count > max_words:
            return "too long"
        return "code or markup" if sentences and code_or_markup(text) else None

    stripped = replace(corpus, prompts=tuple(map(_stripped, corpus.prompts)))
    return keep_rows(stripped, [reason(t, y) for t, y in zip(stripped.prompts, stripped.answers, strict=True)])


def _stripped(text: str) -> str:
    """A text without FDKT's edges.

    The first of several lines may be the first point of a list, and keeps its dash. A text of edges only, as "..." or
    "-", is a text of signs, and stays.
    """
    bare = text.strip()
    if "\n" in bare:
        return bare
    inner = bare.strip(EDGES)
    return bare if blank(inner) else inner


def _broken(text: str) -> str | None:
    """A part of a text that no person types, if there is one."""
    if BROKEN.search(text):
        return "control character"
    if DISGUISED.search(FLAG.sub("", text)):
        return "bidi or tag character"
    return "replacement character" if "\ufffd" in text else None


def _runs_on(text: str, label: str) -> bool:
    """True if a text continues with further examples: each line after its first begins like a prompt's line.

    There must be at least two such lines, with the requested label: a label with a colon is a heading elsewhere. After
    the colon a prompt has a blank, or the line ends: "3:05 worse" under the label 3 is a time.
    """
    more = [line for line in text.split("\n") if line.strip()][1:]
    return len(more) > 1 and all(re.match(rf"{re.escape(label)}:(?:\s|$)", line) for line in more)


def _count(text: str) -> int:
    """Number of words of a text; a text of signs alone counts as one, a text without visible signs as none."""
    return len(words(text)) or int(bool(same(text)))


def deduplicate(corpus: Corpus, before: Corpus | None = None) -> Filtered:
    """The first row of each text, regardless of case, white space and label.

    Args:
        corpus: The texts.
        before: Texts that are kept already; their duplicates are dropped, too.
    """
    seen = {} if before is None else {same(t): y for t, y in zip(before.prompts, before.answers, strict=True)}
    reasons: list[str | None] = []
    for text, label in zip(corpus.prompts, corpus.answers, strict=True):
        key = same(text)
        if key not in seen:
            seen[key] = label
            reasons.append(None)
        else:
            reasons.append("duplicate" if seen[key] == label else "duplicate under another label")
    return keep_rows(corpus, reasons)


def balance(corpus: Corpus, *, per_label: int, seed: int) -> Filtered:
    """At most `per_label` rows of each label, drawn at random, in their order.

    Raises:
        ValueError: If `per_label` is below 1.
    """
    if per_label < 1:
        raise ValueError(f"per_label must be at least 1, got {per_label}")
    rng = np.random.default_rng(seed)
    chosen: set[int] = set()
    rows_of: dict[str, list[int]] = {}
    for i, answer in enumerate(corpus.answers):
        rows_of.setdefault(answer, []).append(i)
    for rows in rows_of.values():
        chosen.update(rng.permutation(rows)[:per_label].tolist())
    return keep_rows(corpus, [None if i in chosen else "beyond per_label" for i in range(len(corpus))])


def clusters(embeddings: NDArray[np.float32], *, size: int, seed: int) -> list[list[int]]:
    """Rows of similar meaning: seeded k-means with ceil(rows / size) clusters, none of them empty (FDKT).

    Above `WHOLE` rows it has two levels: a k-means into parts of some hundred rows first, then each part into its share
    of the clusters. The cost of one level grows with the square of the rows: 100,000 would take days.

    Args:
        embeddings: Embeddings, shape (rows, width).
        size: The average number of rows in a cluster, not a limit. FDKT: 4.
        seed: Seed of the first centres.

    Returns:
        Row numbers; each row is in exactly one cluster. Rows ascend, and so do the clusters' first rows.

    Raises:
        ValueError: If `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    rows = len(embeddings)
    if rows == 0:
        return []
    wanted = math.ceil(rows / size)
    # One thread: sums in the same order give the same clusters on every machine with as many cores or fewer.
    with threadpool_limits(limits=1):
        if rows <= WHOLE:
            return sorted(_means(embeddings, wanted, seed, starts=3))
        parts = _means(embeddings, min(wanted, math.ceil(rows / PART)), seed, starts=1, fast=True)
        groups: list[list[int]] = []
        for part, share in zip(parts, _shares([len(p) for p in parts], wanted), strict=True):
            groups += [[part[i] for i in group] for group in _means(embeddings[part], share, seed, starts=1)]
    return sorted(groups)


WHOLE = 4000  # most rows of one k-means
PART = 500  # mean rows of a part of the first level


def _means(
    embeddings: NDArray[np.float32], wanted: int, seed: int, *, starts: int, fast: bool = False
) -> list[list[int]]:
    """Exactly `wanted` clusters, at most one per row; `fast` reads a sample of the rows in each step."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    distinct = min(wanted, len(np.unique(embeddings, axis=0)))
    if fast:
        means = MiniBatchKMeans(n_clusters=distinct, n_init=starts, batch_size=4096, random_state=seed).fit(embeddings)
    else:
        means = KMeans(n_clusters=distinct, n_init=starts, random_state=seed).fit(embeddings)
    order = np.argsort(means.labels_, kind="stable")
    ends = np.cumsum(np.bincount(means.labels_, minlength=distinct))[:-1]
    groups = [group.tolist() for group in np.split(order, ends) if len(group)]
    while len(groups) < wanted:  # equal rows leave clusters empty; halving the largest gives back their number
        largest = max(groups, key=len)
        groups.remove(largest)
        groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return groups


def _shares(sizes: Sequence[int], wanted: int) -> list[int]:
    """`wanted` clusters divided by size: at least one for each part, at most one per row (largest remainders first)."""
    exact = [wanted * size / sum(sizes) for size in sizes]
    shares = [min(size, max(1, math.floor(share))) for size, share in zip(sizes, exact, strict=True)]
    by_need = sorted(range(len(sizes)), key=lambda i: exact[i] - math.floor(exact[i]), reverse=True)
    while sum(shares) != wanted:
        missing = wanted - sum(shares)
        for i in by_need if missing > 0 else reversed(by_need):
            if missing > 0 and shares[i] < sizes[i]:
                shares[i] += 1
                missing -= 1
            elif missing < 0 and shares[i] > 1:
                shares[i] -= 1
                missing += 1
            if missing == 0:
                break
    return shares


def well_formed_instructions(
    corpus: Corpus, *, min_words: int = 1, answered: bool = False, sentences: bool = False, longest: int | None = None
) -> Filtered:
    """Instructions, and the responses that some have, that people could have written.

    Args:
        corpus: Instructions and responses, "" for none.
        min_words: Fewest words of an instruction, as in `well_formed`; an empty one is always dropped.
        answered: True to drop instructions without a response.
        sentences: True to drop texts that look like code, JSON or markup (`fedsynth.synthesis.sentences`).
        longest: Most characters of either, as in `well_formed`.

    Raises:
        ValueError: If the corpus is private.
    """
    refuse_private(corpus)

    def reason(prompt: str, answer: str) -> str | None:
        if longest is not None and max(len(prompt), len(answer)) > longest:
            return "too long"
        if (broken := _broken(prompt) or _broken(answer)) is not None:
            return broken
        if _count(prompt) < max(1, min_words):
            return "too short"
        if answered and not same(answer):
            return "no response"
        return "code or markup" if sentences and (code_or_markup(prompt) or code_or_markup(answer)) else None

    return _regardless_of_labels(corpus, [reason(x, y) for x, y in zip(corpus.prompts, corpus.answers, strict=True)])


COMPARED = 64  # instructions that are compared with all kept ones at once


def novel(corpus: Corpus, threshold: float = 0.7) -> Filtered:
    """Instructions whose ROUGE-L F1 with every instruction kept before them is below the threshold.

    Args:
        corpus: Instructions; the first of two alike stays.
        threshold: Number in (0, 1]; Self-Instruct (arXiv 2212.10560, section 2.2): 0.7. At 1 only equal words are
            alike.

    Raises:
        ValueError: If the threshold lies outside its range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    kept: list[str] = []
    reasons: list[str | None] = []
    # In blocks, as each call splits the kept ones into words; the result is that of one text after the other.
    for at in range(0, len(corpus), COMPARED):
        block, fresh = corpus.prompts[at : at + COMPARED], list[str]()
        for text, before in zip(block, nearest(block, kept), strict=True):
            closest = max(before, *nearest([text], fresh))
            reasons.append(None if closest < threshold else "duplicate" if closest == 1 else "like an earlier one")
            fresh += [] if reasons[-1] else [text]
        kept += fresh
    return _regardless_of_labels(corpus, reasons)


def _regardless_of_labels(corpus: Corpus, reasons: Sequence[str | None]) -> Filtered:
    """The kept rows without lost labels, as responses come from no list."""
    return replace(keep_rows(corpus, reasons), lost=())


def at_most(corpus: Corpus, count: int) -> Filtered:
    """The first `count` rows; all if there are fewer."""
    beyond = max(0, len(corpus) - count)
    return Filtered(corpus.take(range(len(corpus) - beyond)), {f"beyond {count}": beyond} if beyond else {})


def asked_for(kept: Filtered, labels: Sequence[str], missing: Mapping[str, int]) -> Filtered:
    """The result of a first step relative to all requested texts, not only to the received ones.

    Args:
        kept: The result for the received texts.
        labels: Labels of the requested texts.
        missing: Reason -> texts that never came.
    """
    left = set(kept.corpus.answers)
    lost = tuple(label for label in labels if label not in left)
    dropped = Counter({reason: count for reason, count in missing.items() if count}) + Counter(kept.dropped)
    return replace(kept, dropped=dict(dropped), lost=lost)


def summed(attempts: Sequence[Steps]) -> Steps:
    """The same steps of several attempts as one funnel; a label is lost if no attempt kept a text of it.

    Args:
        attempts: One at least; each with the same steps.
    """
    found: Steps = []
    for of_step in zip(*attempts, strict=True):
        kept = pool([filtered.corpus for _, filtered in of_step])
        dropped = sum((Counter(filtered.dropped) for _, filtered in of_step), Counter[str]())
        lost = dict.fromkeys(label for _, filtered in of_step for label in filtered.lost)
        left = tuple(label for label in lost if label not in set(kept.answers))
        found.append((of_step[0][0], Filtered(kept, dict(dropped), left)))
    return found


def yields(stages: Iterable[tuple[str, Filtered]]) -> list[Stage]:
    """A funnel's lines from its named steps, in order."""
    return [
        Stage(
            name=name,
            before=len(kept.corpus) + sum(kept.dropped.values()),
            after=len(kept.corpus),
            dropped=kept.dropped,
            lost=kept.lost,
        )
        for name, kept in stages
    ]
