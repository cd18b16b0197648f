"""ROUGE-L on words of any script: the share of a text that another text holds in the same order."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

BLOCK = 1_000_000  # pairs compared at once: some 20 MB

# Scripts without blanks between words: a whole sentence would be one word, and near copies would share none.
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
ZERO_WIDTH_SPACE = 0x200B


class _Spacing(dict[int, str | None]):
    """A table for `str.translate` that leaves words and blanks; filled as characters occur."""

    def __missing__(self, code: int) -> str | None:
        self[code] = found = self._of(chr(code))
        return found

    def _of(self, char: str) -> str | None:
        kind, name = unicodedata.category(char), unicodedata.name(char, "")
        # Joiners, soft hyphens, enclosing marks and variation selectors are neither parts nor ends of a word.
        if kind == "Me" or "VARIATION SELECTOR" in name or (kind == "Cf" and ord(char) != ZERO_WIDTH_SPACE):
            return None
        if kind in ("Mn", "Mc") or kind[0] == "L":
            return f" {char} " if name.startswith(UNSPACED) else char
        return char if kind[0] == "N" else " "


_SPACING = _Spacing()


def words(text: str) -> list[str]:
    """Runs of letters, digits and marks, without their case and compatibility forms (NFKC).

    In scripts without blanks between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_SPACING).split()


def rouge_l(one: str, other: str) -> float:
    """ROUGE-L F1 (beta 1) in 0..1: twice the longest common subsequence of words over both lengths (Lin 2004, 3.1).

    0 where neither text holds a word.

    >>> rouge_l("the cat sat", "The cat has sat, yes")  # 3 words in common, of 3 and of 5
    0.75
    """
    return nearest([one], [other])[0]


def nearest(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """For each text its ROUGE-L F1 with the closest of all references; 0 if there is none."""
    if not references:
        return [0.0] * len(texts)
    number: dict[str, int] = {}
    known = [[number.setdefault(word, len(number) + 1) for word in words(text)] for text in references]
    asked = [[number.get(word, 0) for word in words(text)] for text in texts]  # 0: a word of no reference
    widths = np.array([len(row) for row in known])
    best: list[float] = []
    rows = max(1, BLOCK // len(known))
    for start in range(0, len(asked), rows):
        block = asked[start : start + rows]
        common = process.cdist(block, known, scorer=LCSseq.similarity, dtype=np.int32)
        both = np.array([len(row) for row in block])[:, None] + widths
        best += (2 * common / np.maximum(both, 1)).max(axis=1).tolist()
    return best
