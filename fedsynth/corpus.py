"""Texts in columns with their provenance, and the scores that a client gives them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import pandas as pd


class Provenance(StrEnum):
    """The origin of a text; it decides whether the text may leave a client (fedsynth.federation.records)."""

    PUBLIC = "public"
    PRIVATE = "private"
    DP_SYNTHETIC = "dp_synthetic"
    """Written by a model trained under a grant. Set in fedsynth.privacy.release only."""
    LLM_WRITTEN = "llm_written"
    """Written by the server LLM; its guarantee is that of its demonstrations (`grants`)."""
    SELF_GENERATED = "self_generated"
    """Written from private demonstrations: no guarantee."""
    DISCLOSED = "disclosed"
    """Private text as it is, of a simulated client alone, for a bound: no guarantee."""


# Unicode's property Default_Ignorable_Code_Point, which Python does not know: joiners, variation selectors, fillers,
# tags. And the Braille pattern without a dot.
_IGNORABLE = (
    (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x2800, 0x2800), (0x3164, 0x3164), (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
_UNSEEN = frozenset(chr(code) for first, last in _IGNORABLE for code in range(first, last + 1))


def unseen(char: str) -> bool:
    """True if a character has no glyph and separates nothing."""
    if char in _UNSEEN:
        return True
    kind = unicodedata.category(char)
    return kind == "Cf" or (kind == "Cc" and not char.isspace())


class _Seen(dict[int, int | None]):
    """A table of `str.translate` that drops what is unseen; it looks each character up once in a process."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unseen(chr(code)) else code
        return self[code]


_SEEN = _Seen()


def seen(text: str) -> str:
    """A text without the characters that have no glyph and separate nothing."""
    return text.translate(_SEEN)


def blank(text: str) -> bool:
    """True if a text shows nothing to a reader."""
    return not seen(text).strip()


def same(text: str) -> str:
    """A text without insignificant differences. It is only for comparing; never write it in place of the text.

    The differences are case, compatibility forms and composition (Unicode's NFKC), characters without a glyph (of no
    width, soft hyphens, marks of direction, variation selectors, fillers, control characters), and white space around
    it or doubled. The result decides which labels, privacy units, clients and duplicates are equal.
    """
    folded = text
    # Twice: case folding undoes a composition, and a compatibility form may fold to a character with case or a blank.
    for _ in range(2):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", folded).casefold())
        folded = seen(folded)
    return " ".join(folded.split())


_APOSTROPHES = "\u2018\u2019\u201b\u02bc\u2032\u0060\u00b4"


class _Typed(dict[int, str]):
    """A table of `str.translate`: dashes, apostrophes and digits of any form as a keyboard types them."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if unicodedata.category(char) == "Pd" or char == "\u2212":  # the minus sign
            char = "-"
        elif char in _APOSTROPHES:
            char = "'"
        elif unicodedata.category(char) == "Nd":
            char = str(unicodedata.decimal(char))
        self[code] = char
        return char


_TYPED = _Typed()


def same_person(text: str) -> str:
    """As `same`; and dashes, apostrophes and digits have one form, as programs correct what is typed.

    >>> same_person("O\u2019Neil\u20113") == same_person("o'neil-3")
    True
    """
    return same(text.translate(_TYPED)).translate(_TYPED)


def alike(texts: Iterable[str], by: Callable[[str], str] = same) -> list[list[str]]:
    """Groups of different texts that are the `same`, sorted.

    >>> alike(["Billing", "login", "billing "])
    [['Billing', 'billing ']]
    """
    groups: dict[str, list[str]] = {}
    for text in sorted(set(texts)):
        groups.setdefault(by(text), []).append(text)
    return [group for group in groups.values() if len(group) > 1]


def told_apart(spellings: Sequence[str]) -> str:
    """Spellings of one text in quotes; invisible characters that differ are escaped: 'PAT003' and 'PAT003\\u0020'."""
    start = _shared(spellings)
    end = _shared([text[start:][::-1] for text in spellings])
    return " and ".join(
        "'" + "".join(_shown(text, place, start <= place < len(text) - end) for place in range(len(text))) + "'"
        for text in spellings
    )


def _shared(texts: Sequence[str]) -> int:
    """Length of the common prefix of all texts."""
    return next((i for i, chars in enumerate(zip(*texts, strict=False)) if len(set(chars)) > 1), min(map(len, texts)))


def _shown(text: str, place: int, differs: bool) -> str:
    """One character of a text, escaped if a reader would not see it.

    A blank is seen between two words. Letters that may be composed are seen where all of the spellings have them.
    """
    char, beside = text[place], text[max(0, place - 1) : place] + text[place + 1 : place + 2]
    seen = char.isprintable() and (char.isascii() or not differs)
    if seen and (char != " " or not differs or (len(beside) == 2 and not any(c.isspace() for c in beside))):
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


class Source(Protocol):
    """Material that something else is made of: public, under grants, or without a guarantee (neither)."""

    @property
    def public(self) -> bool:
        """True if it derives from no private text."""

    @property
    def grants(self) -> tuple[str, ...]:
        """Ids of the privacy grants that its guarantee rests on."""


def united(sources: Sequence[Source]) -> tuple[str, ...]:
    """The grants behind the guarantee of something made of all sources; none if one source has no guarantee."""
    if not all(source.public or source.grants for source in sources):
        return ()
    return tuple(dict.fromkeys(grant for source in sources for grant in source.grants))


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of options, in their order


@dataclass(frozen=True)
class Corpus:
    """Examples in columns.

    Attributes:
        prompts: Classification: the text. Instructions: the instruction.
        answers: Classification: the class name. Instructions: the response.
        provenance: Origin of the texts.
        grants: Ids of the privacy grants that the guarantee rests on. Texts that derive from private ones and have
            no grants have no guarantee.
        units: The person (or other privacy unit) of each example. Private corpora only; never leaves.
        options: Multiple choice: the options of each example, whose answer is the letter of one. Likewise.
        attributes: Classification: each text's values of `data.attributes`, by the names of their columns. Of private
            text, and of public text that an LLM was asked for with these values. They are in no payload.

    Raises:
        ValueError: If the columns differ in length, or stand beside text of which they cannot be.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    provenance: Provenance
    grants: tuple[str, ...] = ()
    units: tuple[Hashable, ...] | None = None
    options: tuple[tuple[str, ...], ...] | None = None
    attributes: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.answers):
            raise ValueError(
                f"a corpus needs as many answers as prompts, got {len(self.answers)} for {len(self.prompts)}"
            )
        for name, own in (("units", self.units), ("options", self.options), ("attributes", self.attributes)):
            if own is None:
                continue
            if self.provenance is not Provenance.PRIVATE and not (name == "attributes" and self.public):
                raise ValueError(f"{name} belong to private corpora only, this one is {self.provenance.value}")
            if len(own) != len(self.prompts):
                raise ValueError(f"a corpus needs {name} for each example, got {len(own)} for {len(self.prompts)}")

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        # No text: what is shown of a private corpus in a log or a traceback would have left it.
        return f"Corpus({len(self)} texts, {self.provenance.value}, {_counted(len(self.grants), 'grant')})"

    def to_frame(self) -> pd.DataFrame:
        """One row per text: prompt, answer."""
        import pandas as pd  # takes a second, and the base is for every process

        return pd.DataFrame({"prompt": self.prompts, "answer": self.answers}, dtype=object)

    @property
    def public(self) -> bool:
        """True if it derives from no private text."""
        return self.provenance is Provenance.PUBLIC

    def take(self, rows: Iterable[int]) -> Corpus:
        """The examples at `rows`, in that order, with the same provenance and grants."""
        rows = list(rows)
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in rows),
            answers=tuple(self.answers[i] for i in rows),
            units=None if self.units is None else tuple(self.units[i] for i in rows),
            options=None if self.options is None else tuple(self.options[i] for i in rows),
            attributes=None if self.attributes is None else tuple(self.attributes[i] for i in rows),
        )

    def counts(self) -> Counter[str]:
        """Number of occurrences of each answer."""
        return Counter(self.answers)

    def fingerprint(self) -> str:
        """SHA-256 of the examples in order. Not for private text that leaves: use a keyed MAC there."""
        digest = hashlib.sha256()
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            for part in (prompt, answer):
                raw = part.encode()
                digest.update(len(raw).to_bytes(8, "big") + raw)
        return digest.hexdigest()


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number or 'no'} {what}s"


@dataclass(frozen=True)
class Scores:
    """One number per text of a corpus that the server wrote.

    Attributes:
        values: In the order of the texts.
        grants: Ids of the privacy grants that their guarantee rests on; empty: no guarantee.
    """

    values: tuple[float, ...]
    grants: tuple[str, ...] = ()

    @property
    def public(self) -> bool:
        """Never: a client's model gave them."""
        return False


@dataclass(frozen=True)
class Votes:
    """The sum of a client's units' votes for each text of a corpus that the server wrote, with noise.

    Attributes:
        values: In the order of the texts; real numbers, as each has noise of its own.
        grants: Ids of the privacy grants that their guarantee rests on; empty: no guarantee.
    """

    values: tuple[float, ...]
    grants: tuple[str, ...] = ()

    @property
    def public(self) -> bool:
        """Never: they count private text."""
        return False


def pool(corpora: Sequence[Corpus]) -> Corpus:
    """All examples of corpora of one provenance, in order; grants are united. Public text may stand beside released.

    >>> first = Corpus(("a bill",), ("billing",), Provenance.DP_SYNTHETIC, grants=("one",))
    >>> second = Corpus(("a parcel",), ("delivery",), Provenance.DP_SYNTHETIC, grants=("two",))
    >>> pool([first, second]).prompts
    ('a bill', 'a parcel')
    >>> pool([first, second]).grants
    ('one', 'two')

    Raises:
        ValueError: If there is no corpus, their provenances beside public differ, or private text meets public text.
    """
    if not corpora:
        raise ValueError("pool needs at least one corpus")
    kinds = {c.provenance for c in corpora}
    if len(kinds) == 2 and Provenance.PRIVATE not in kinds:
        kinds -= {Provenance.PUBLIC}
    if len(kinds) > 1:
        raise ValueError(f"only corpora of one provenance can be pooled, got {sorted(k.value for k in kinds)}")
    units = None
    if all(c.units is not None for c in corpora):
        # Persons of different sites are different units, even where two sites use the same identifier.
        units = tuple((site, unit) for site, c in enumerate(corpora) for unit in c.units or ())
    options = tuple(own for c in corpora for own in c.options or ())
    attributes = tuple(own for c in corpora for own in c.attributes or ())
    return Corpus(
        prompts=tuple(p for c in corpora for p in c.prompts),
        answers=tuple(a for c in corpora for a in c.answers),
        provenance=kinds.pop(),
        grants=united(corpora),
        units=units,
        options=options if all(c.options is not None for c in corpora) else None,
        attributes=attributes if all(c.attributes is not None for c in corpora) else None,
    )
