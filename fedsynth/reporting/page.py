"""A page of sections, tables and figures as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# Characters that neither XML nor HTML may hold, even as a reference.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Number:
    """A number as text, with its row in the table of figures.

    Attributes:
        shown: The number as text.
        row: Its row in the table.
    """

    shown: str
    row: int


Piece: TypeAlias = str | Number
Cell: TypeAlias = Piece | tuple[Piece, ...]
"""A table's cell: words, a number, or several of them side by side."""


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    kind: ClassVar = "paragraph"
    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Items:
    """A list; each entry may begin with a word in bold."""

    kind: ClassVar = "items"
    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows under heads. On a narrow screen each row becomes a block, its first cell on top.

    Attributes:
        heads: Heads of the columns.
        rows: Rows with one cell per head.
        caption: The caption.
        note: A note for the reader.
        words: Columns (by number) of words, set left; numbers are set right.
    """

    kind: ClassVar = "table"
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    note: str = ""
    words: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Plot:
    """A figure of `reporting.figures`, with a description in words."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Plots:
    """Figures side by side if there is room."""

    kind: ClassVar = "plots"
    plots: Sequence[Plot]


@dataclass(frozen=True)
class Card:
    """Facts by name, in a frame.

    Attributes:
        title: The title.
        facts: Names and values.
        open: The card is a warning: there is no guarantee.
    """

    kind: ClassVar = "card"
    title: str
    facts: Sequence[tuple[str, Cell]]
    open: bool = False


@dataclass(frozen=True)
class Cards:
    """Cards side by side if there is room."""

    kind: ClassVar = "cards"
    cards: Sequence[Card]


@dataclass(frozen=True)
class Quote:
    """A text of a corpus, unchanged.

    Attributes:
        source: The text's source.
        text: Untrusted.
        answer: Its label or response; untrusted.
    """

    source: Cell
    text: str
    answer: str


@dataclass(frozen=True)
class Quotes:
    """Examples of texts."""

    kind: ClassVar = "quotes"
    quotes: Sequence[Quote]


Block: TypeAlias = Paragraph | Items | Table | Plots | Cards | Quotes


@dataclass(frozen=True)
class Section:
    """A part of the page; `anchor` is its place in the table of contents."""

    title: str
    anchor: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: Title of the page.
        lead: One or two sentences under the title.
        verdict: The conclusion, a sentence each; the first two are what a reader takes away.
        banner: A line on the permitted readers.
        sections: The sections in order.
        apart: Each sentence of the verdict is about something else, and stands by itself.
        table: Name of the file that holds the figures.
        private: The page must stay in its place; the banner says so loudly.
    """

    title: str
    lead: str
    banner: str
    sections: Sequence[Section]
    table: str
    private: bool = False
    verdict: Sequence[Cell] = ()
    apart: bool = False


def render(page: Page) -> str:
    """The page as HTML that is well-formed XML, too; every text is escaped."""
    # `finalize` sees each value before it is escaped; text of models may hold what no page can.
    loader = PackageLoader("fedsynth.reporting", "")
    pages = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.tests["number"] = lambda piece: isinstance(piece, Number)
    pages.filters["pieces"] = pieces
    return pages.get_template("page.html").render(page=page)


def printable(value: object) -> object:
    """Text without characters that no page may hold."""
    if isinstance(value, Markup):
        return Markup(UNPRINTABLE.sub("\ufffd", value))
    return UNPRINTABLE.sub("\ufffd", value) if isinstance(value, str) else value


def pieces(cell: Cell) -> tuple[Piece, ...]:
    """The parts of a cell that stand side by side."""
    return cell if isinstance(cell, tuple) else (cell,)


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
