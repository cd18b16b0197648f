"""Cells of a file or a query as text, each by itself, for any type; an unreadable cell changes no other.

A table's loader (fedsynth.data.tables) refuses a file for one bad byte, and takes a column's type from all of its
cells. Here an unreadable cell is `Lost`, its row stays in its place, and the next row is read normally.
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

from fedsynth.corpus import blank
from fedsynth.typed import BadValue

T = TypeVar("T")
MAX_CHARACTERS = 1_000_000  # of a cell, as in fedsynth.data.tables
MAX_DIGITS = 300  # of a JSON number that is read as a number; a longer one stays text
BATCH = 1024  # rows of a Parquet file at once


@dataclass(frozen=True)
class Lost:
    """A cell that cannot be read; `why` gives the reason without any of the cell's content."""

    why: str


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        number: Number of its line, if its file has lines; else of the row. It starts at 1.
        cells: Cells by column, `Lost` if unreadable; a missing cell has no entry.
        broken: The reason why the whole row cannot be read; "" if it can. Cells before the damage may have entries.
        blank: True if it is white space only and may be no row at all.
    """

    number: int
    cells: dict[str, object]
    broken: str = ""
    blank: bool = False


@dataclass(frozen=True)
class Read:
    """The content of a source.

    Attributes:
        counted: Unit of the row numbers: "line" or "row".
        names: Columns of the source.
        rows: All rows, in order.
        notes: Notes for a person to look at; none holds a cell.
    """

    counted: str
    names: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = field(default=())


def read_file(path: Path, asked: Sequence[str]) -> Read:
    """The rows of a CSV, JSONL or Parquet file.

    Args:
        path: Path of the file.
        asked: The columns to read.

    Raises:
        BadValue: If the file does not exist, is of another kind, or its header lacks a column.
    """
    if not path.is_file():
        raise BadValue(f"no such file in {path.parent.absolute()}")
    readers: dict[str, Callable[[Path, Sequence[str]], Read]] = {
        ".csv": _from_csv,
        ".jsonl": _from_jsonl,
        ".parquet": _from_parquet,
    }
    try:
        return readers[path.suffix.lower()](path, asked)
    except OSError as problem:
        raise BadValue(f"cannot be read: {problem.strerror or problem}") from problem


def chosen(names: Sequence[str], asked: Sequence[str]) -> None:
    """Checks that a header has the columns that are asked for.

    Raises:
        BadValue: If a column is missing, or any occurs twice.
    """
    for column in asked:
        if column not in names:
            parted = next(
                (
                    f"; are its columns parted by {sign!r}? save it with commas"
                    for sign in ";\t|"
                    if len(names) == 1 and sign in names[0]
                ),
                "",
            )
            raise BadValue(f"no column {column!r}; it has {', '.join(map(repr, names))}{parted}")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise BadValue(f"the column {doubled[0]!r} stands there twice: give each column a name of its own")


def text_of(cell: object) -> str | Lost | None:
    """A cell as text, from this cell alone: a whole number has no fraction, even beside numbers that have one.

    None for a missing cell, or one that shows nothing.
    """
    if isinstance(cell, Lost):
        return cell
    if isinstance(cell, str):
        return _readable(cell)
    if cell is None:
        return None
    if isinstance(cell, numbers.Number) and not isinstance(cell, bool):
        return _digits(cell)
    if isinstance(cell, bytes | bytearray | memoryview):
        return Lost("holds bytes values, not text")
    if isinstance(cell, Iterable):  # a list, a table, an array
        return Lost(f"holds {type(cell).__name__} values, not text")
    return tried(lambda: _readable(str(cell)))  # a date, a UUID, any type of a driver


def _readable(text: str) -> str | Lost | None:
    if len(text) > MAX_CHARACTERS:
        return Lost(f"is longer than {MAX_CHARACTERS} characters")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            escaped = any("\udc80" <= char <= "\udcff" for char in text)
            return Lost("is not UTF-8" if escaped else "holds half a character")
    if "\0" in text:
        return Lost("holds a NUL")
    return None if blank(text) else text


def _digits(number: Any) -> str | None:
    if isinstance(number, Decimal):
        return None if number.is_nan() else _whole(format(number, "f"))
    if isinstance(number, float):
        return None if math.isnan(number) else str(int(number)) if number.is_integer() else str(number)
    return str(number)


def _whole(digits: str) -> str:
    return re.sub(r"\.0+$", "", digits)


def _utf_16(head: bytes, lines: Sequence[bytes]) -> None:
    """Refuses a file in UTF-16: it begins with the mark of that encoding, and each of its lines has a NUL.

    Args:
        head: The beginning of the file.
        lines: Lines that must have NULs, too; in one row alone, mark and NULs are damage.

    Raises:
        BadValue: If it is UTF-16.
    """
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") and all(b"\0" in line for line in lines):
        raise BadValue("cannot be read: its encoding is UTF-16: save it as UTF-8")


def _decoded(raw: bytes) -> str:
    """Bytes as text; those that are not UTF-8 in a form that `_readable` recognises."""
    return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


# --- CSV --------------------------------------------------------------------------------------------------------------

_QUOTED = re.compile(r'"((?:[^"]++|"")*+)"')
_PLAIN = re.compile(r"[^,\r\n]*+")
_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True)
class _Record:
    line: int
    fields: list[str]
    text: str
    unclosed: bool  # a field begins with a quote that does not close as CSV asks


def _from_csv(path: Path, asked: Sequence[str]) -> Read:
    """The text of the file unchanged: "01" and "None" are ordinary labels.

    A quote counts as CSV defines it: it begins a field, and closes before a comma or a line end. Any other quote is a
    character of its line, so that it cannot swallow the rest of the file.
    """
    raw = path.read_bytes()
    _utf_16(raw, [])  # the mark is in the header, which is no row
    records = _records(_decoded(raw))
    head = next((record for record in records if record.text.strip()), None)
    if head is None:
        raise BadValue("cannot be read: it is empty")
    names = head.fields
    chosen(names, asked)
    rows, notes = [], []
    for record in records:
        row = Row(record.line, dict(zip(names, record.fields, strict=False)), blank=not record.text.strip())
        if any(surplus.strip() for surplus in record.fields[len(names) :]):
            row = Row(record.line, {}, f"has {len(record.fields)} fields, the header names {len(names)}")
        rows.append(row)
        if record.unclosed:
            notes.append(f"line {record.line}: a quote that does not close before a comma or line end is read as text")
        if (held := _rows_within(record, len(names))) is not None:
            notes.append(
                f"line {record.line}: a quote closes {held[0]} line(s) further on, {held[1]} lines look like "
                "rows of their own and are in one cell"
            )
    return Read("line", names, rows, notes)


def _records(text: str) -> Iterator[_Record]:
    at, line = 0, 1
    while at < len(text):
        start, fields, unclosed = at, list[str](), False
        while True:
            quoted = _QUOTED.match(text, at, at + MAX_CHARACTERS) if text[at : at + 1] == '"' else None
            if quoted is not None and text[quoted.end() : quoted.end() + 1] in ("", ",", "\r", "\n"):
                fields.append(quoted[1].replace('""', '"'))
                at = quoted.end()
            else:
                plain = _PLAIN.match(text, at)
                assert plain is not None
                unclosed |= plain[0].startswith('"')
                fields.append(plain[0])
                at = plain.end()
            if text[at : at + 1] != ",":
                break
            at += 1
        yield _Record(line, fields, text[start:at], unclosed)
        line += 1 + sum(1 for _ in _END.finditer(text, start, at))
        end = _END.match(text, at)
        at = len(text) if end is None else end.end()


def _rows_within(record: _Record, columns: int) -> tuple[int, int] | None:
    """Numbers of lines in a record of several lines: after the first, and with the form of a row.

    None if the first or the last has not that form: in a text of several lines one of the two has other fields beside
    it.
    """
    like = [line.count(",") + 1 == columns for line in _END.split(record.text)]
    return (len(like) - 1, sum(like)) if len(like) > 1 and columns > 1 and like[0] and like[-1] else None


# --- JSONL ------------------------------------------------------------------------------------------------------------


def _from_jsonl(path: Path, asked: Sequence[str]) -> Read:
    """Rows from single lines; a broken line gives the cells before the damage."""
    rows: list[Row] = []
    names: dict[str, None] = {}
    lines = path.read_bytes().split(b"\n")
    full = [line for line in lines if line.strip(b"\0 \r")]
    if len(full) > 1:
        _utf_16(lines[0], full)
    for number, line in enumerate(lines, start=1):
        row = _from_line(number, _decoded(line) if number == 1 else line.decode("utf-8", "surrogateescape"))
        rows.append(row)
        names |= dict.fromkeys(row.cells)
    while rows and rows[-1].blank:  # nothing after the last line end is a line
        rows.pop()
    missing = [column for column in asked if column not in names]
    known = ", ".join(list(names)[:20]) or "no column that can be read"
    return Read("line", list(names), rows, [f"no line has {column!r}; they have {known}" for column in missing])


def _from_line(number: int, line: str) -> Row:
    if not line.strip():
        return Row(number, {}, blank=True)
    try:
        found = _loads(line)
    except (ValueError, RecursionError):
        cells, whole = _members(line)
        return Row(number, cells, "" if whole else "is not JSON")
    if not isinstance(found, dict):
        return Row(number, {}, "is no JSON object")
    return Row(number, found)


def _loads(text: str) -> object:
    return json.loads(text, strict=False, object_pairs_hook=_unique, parse_int=_number)  # a NUL concerns its cell only


def _number(digits: str) -> int | str:
    return int(digits) if len(digits) <= MAX_DIGITS else digits


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        found |= {name: Lost("stands there twice") for name in found if names.count(name) > 1}
    return found


_KEY = re.compile(r'\s*("(?:[^"\\]++|\\.)*+")\s*:\s*', re.DOTALL)
_PIECE = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]|,|[^"\[\]{},]++', re.DOTALL)


def _members(line: str) -> tuple[dict[str, object], bool]:
    """The members of a JSON object one by one, if the whole cannot be read; and true if only some values are damaged.

    It counts brackets, so that no depth of nesting matters.
    """
    pairs: list[tuple[str, object]] = []
    whole = True
    at = len(line) - len(line.lstrip())
    if line[at : at + 1] != "{":
        return {}, False
    at += 1
    while key := _KEY.match(line, at):
        depth, start, at = 0, key.end(), key.end()
        while piece := _PIECE.match(line, at):
            if depth == 0 and piece[0] in (",", "}", "]"):
                break
            depth += (piece[0] in ("[", "{")) - (piece[0] in ("]", "}"))
            at = piece.end()
        if piece is None:  # an end within a text, or within brackets
            break
        try:
            name, value = str(_loads(key[1])), _loads(line[start:at])
        except RecursionError:
            name, value = str(_loads(key[1])), Lost("is nested too deeply")
        except ValueError:  # in the value, or in an escape in the name
            name, value, whole = key[1][1:-1], Lost("is not JSON"), False
        pairs.append((name, value))
        if piece[0] == "}":
            return _unique(pairs), whole and not line[at + 1 :].strip()
        if piece[0] != ",":
            break
        at += 1
    return _unique(pairs), False


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _from_parquet(path: Path, asked: Sequence[str]) -> Read:
    try:
        file = pq.ParquetFile(path)
        names = list(file.schema_arrow.names)  # a broken schema shows here only, and so do broken groups
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except Exception as problem:
        raise BadValue(f"cannot be read: it is not a Parquet file ({type(problem).__name__})") from problem
    with file:
        chosen(names, asked)
        rows: list[Row] = []
        for group, count in enumerate(counts):
            columns = {name: _cells(file, group, name, count) for name in asked}
            rows += [
                Row(len(rows) + place + 1, {name: cells[place] for name, cells in columns.items()})
                for place in range(count)
            ]
    return Read("row", names, rows)


def _cells(file: Any, group: int, name: str, count: int) -> list[object]:
    """A column of a row group, cell by cell; a damaged one gives the cells before the damage, or less than it says."""
    found: list[object] = []
    with suppress(Exception):  # a damaged page or an unknown encoding, only at the site's import
        for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], columns=[name], use_threads=False):
            found += _values(batch.column(0))
    return [*found[:count], *[Lost("cannot be read")] * (count - len(found))]


def _values(column: Any) -> list[object]:
    try:
        return list(column.to_pylist())
    except Exception:
        return [tried(cell.as_py) for cell in column]


def tried(load: Callable[[], T]) -> T | Lost:
    """The result of a cell's loader; `Lost` if it raises anything."""
    try:
        return load()
    except Exception as problem:
        return Lost("is not UTF-8" if isinstance(problem, UnicodeDecodeError) else "cannot be read")


# --- Queries ----------------------------------------------------------------------------------------------------------


def result(names: Sequence[str], rows: Iterable[Sequence[object]], asked: Sequence[str]) -> Read:
    """The rows of a query, whose cells were fetched one by one.

    Raises:
        BadValue: If a column is missing, or occurs twice.
    """
    chosen(names, asked)
    return Read("row", names, [Row(number, dict(zip(names, row, strict=True))) for number, row in enumerate(rows, 1)])
