"""Faults that a CSV parser reads silently: a quote that swallows rows, columns that no comma separates."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass

LINE_END = re.compile(r"\r\n|\r|\n")
# A quote at the beginning of a field holds all up to the next undoubled one; elsewhere it is an ordinary sign.
QUOTED = r'"(?:[^"]*+(?:""[^"]*+)*+)(?:"|\Z)'
RECORD = re.compile(rf"(?:{QUOTED})?+[^,\r\n]*+(?:,(?:{QUOTED})?+[^,\r\n]*+)*+(?:\r\n|\r|\n|\Z)")
FIELD = re.compile(r'(?:"(?P<inside>[^"]*+(?:""[^"]*+)*+)(?P<close>"|\Z))?+(?P<rest>[^,\r\n]*+)')
SEPARATORS = ";\t|"
FREE = 3  # line ends that a quote must swallow before commas alone prove that they are rows
ROWS, SHARE = 8, 0.5  # in so many rows, a column with fewer different values than this share is a list, as of labels


@dataclass(frozen=True)
class Swallowed:
    """A quote that begins a field and closes lines later.

    Attributes:
        line: Number of its line, from 1.
        lines: Number of lines in its cell, its own among them.
        closes: True if another quote ends it; else the end of the file does.
    """

    line: int
    lines: int
    closes: bool

    def __str__(self) -> str:
        end = f"closes in line {self.line + self.lines - 1}" if self.closes else "never closes"
        return (
            f"a quote in line {self.line} begins a field and {end}: {self.lines} "
            f"{'lines stand' if self.lines > 1 else 'line stands'} in one cell; if they are rows, take the quote out; "
            "if they are one text, save the file as JSONL or Parquet"
        )


@dataclass(frozen=True)
class _Cell:
    """A field: the text between its quotes, if it has any, and after them."""

    inside: str
    closes: bool
    rest: str

    @property
    def value(self) -> str:
        return self.inside.replace('""', '"') + self.rest

    @property
    def ends(self) -> int:
        """Line ends in the field; that of the file does not count."""
        return len(LINE_END.findall(self.inside if self.closes else self.inside.rstrip()))


def swallowed(text: str) -> list[Swallowed]:
    """Quotes that swallow rows, in order.

    A text of several lines in quotes is no fault, with any commas. A quote is a fault if the file ends before it
    closes, if it closes lines later in the middle of a field, or if its lines look like the rows around it: they have
    as many commas, from its beginning to its close, and their fields are like those of other rows in these columns. If
    commas alone tell, and more cells look like that than the file has rows of one line, the cells are texts.

    Args:
        text: The text of the file, its header first.
    """
    found: list[Swallowed] = []
    by_commas: list[Swallowed] = []
    head, others = 0, None  # number of the header's fields; the other rows, read at the first use
    line, counted = 1, 0
    for match in RECORD.finditer(text) if '"' in text else ():
        record = match[0].rstrip("\r\n")
        if (head or not record) and match.end() < len(text) and not LINE_END.search(record):
            continue
        cells = _cells(record)
        line, counted = line + len(LINE_END.findall(text, counted, match.start())), match.start()
        at = line
        for place, cell in enumerate(cells):
            fault, told = not cell.closes or (cell.ends > 0 and cell.rest.strip() != ""), found
            if not fault and cell.ends and not head:
                fault = "," in LINE_END.split(cell.inside)[0]  # a name of several lines is no fault, but two names are
            elif not fault and cell.ends and (rows := _as_rows(cell, place, len(cells), head)):
                others = others or _others(text, head)
                fault, by_list = _like_others(rows, others.columns)
                told = found if by_list else by_commas
            told += [Swallowed(at, cell.ends + 1, cell.closes)] if fault else []
            at += cell.ends
        head = head or len(cells)
    if others is not None and len(by_commas) <= others.rows:
        found = sorted([*found, *by_commas], key=lambda each: each.line)
    return found


def surplus(text: str) -> str:
    """The place of a row with more fields than the header, and the way out; "" if there is none."""
    head, line, counted = 0, 1, 0
    for match in RECORD.finditer(text):
        record = match[0].rstrip("\r\n")
        line, counted = line + len(LINE_END.findall(text, counted, match.start())), match.start()
        if not record:
            continue
        cells = len(_cells(record))
        head = head or cells
        if cells > head:
            return (
                f"the row of line {line} has {cells} fields, the header has {head}: put a text that holds commas in "
                "quotes, or save the file as JSONL or Parquet"
            )
    return ""


def _cells(record: str) -> list[_Cell]:
    """The cells of a record without the line end behind it."""
    cells, at = [], 0
    while True:
        match = FIELD.match(record, at)
        assert match is not None  # it matches an empty text, too
        cells.append(_Cell(match["inside"] or "", match["close"] != "", match["rest"]))
        if match.end() >= len(record):
            return cells
        at = match.end() + 1


def _as_rows(cell: _Cell, place: int, cells: int, columns: int) -> list[dict[int, str]]:
    """The lines of a cell as rows, fields by column; none if their commas do not fit.

    Args:
        cell: A cell of several lines.
        place: Its column.
        cells: Number of cells in its row.
        columns: Number of columns in the header.
    """
    first, *between, last = (line.split(",") for line in LINE_END.split(cell.inside))
    whole = [line for line in between if line != [""]]
    closes = columns + place - cells  # the column where it closes, for the row there to be whole
    if columns < 2 or len(first) != columns - place or len(last) != closes + 1:
        return []
    if any(len(line) != columns for line in whole):
        return []
    return [dict(enumerate(first, place)), *(dict(enumerate(line)) for line in [*whole, last])]


@dataclass(frozen=True)
class _Column:
    """A column's values in rows of one line each.

    Attributes:
        values: All values.
        listed: True if the values are a list: of labels, persons, splits.
        numbers: True if all are numbers.
        spaced: True if some begin with a blank.
    """

    values: frozenset[str]
    listed: bool
    numbers: bool
    spaced: bool

    def may_hold(self, value: str) -> bool:
        """True if a value is one of the others or like them."""
        if value in self.values:
            return True
        # In prose there is a blank after a comma, or the line ends.
        return value.strip() != "" and (self.spaced or value[0] != " ") and (not self.numbers or _is_number(value))


@dataclass(frozen=True)
class _Others:
    """Rows of one line each: their number and columns."""

    rows: int
    columns: list[_Column]


def _others(text: str, size: int) -> _Others:
    records = [match[0].rstrip("\r\n") for match in RECORD.finditer(text)]
    rows = [cells for r in records if not LINE_END.search(r) and len(cells := _cells(r)) == size][1:]
    found = []
    for place in range(size):
        values = frozenset(row[place].value for row in rows)
        listed = len(rows) >= ROWS and len(values) <= SHARE * len(rows)
        numbers = len(rows) > 0 and all(map(_is_number, values))
        found.append(_Column(values, listed, numbers, any(value.startswith(" ") for value in values)))
    return _Others(len(rows), found)


def _like_others(rows: Sequence[dict[int, str]], columns: Sequence[_Column]) -> tuple[bool, bool]:
    """True if rows look like others, and true if a list column decides it.

    With list columns, most rows that have one must match. Without, all rows must look alike, and there must be enough.
    """
    shaped = [all(columns[place].may_hold(value) for place, value in row.items()) for row in rows]
    lists = [{place: value for place, value in row.items() if columns[place].listed} for row in rows]
    told = [
        shape and any(value in columns[place].values for place, value in known.items())
        for shape, known in zip(shaped, lists, strict=True)
        if known
    ]
    return (2 * sum(told) > len(told), True) if told else (len(rows) > FREE and all(shaped), False)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def separator(text: str, asked: Sequence[str]) -> str | None:
    """The separator of a file whose header lacks a column if split at commas; None if commas suffice or none is found.

    Args:
        text: The text of the file.
        asked: The columns that the header should have.
    """
    head = next(line for line in LINE_END.split(text) if line.strip())
    names = next(csv.reader([head]))
    if set(asked) <= set(names):
        return None
    for sign in SEPARATORS:
        found = next(csv.reader([head], delimiter=sign))
        if len(found) > 1 and (len(names) == 1 or set(asked) <= {name.strip() for name in found}):
            return sign
    return None
