"""The rows of a labelled data source, checked: cells are texts, spellings differ, test rows are named."""

from __future__ import annotations

import json
import numbers
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from fedsynth.corpus import LETTERS, alike, blank, same, same_person, told_apart
from fedsynth.data.loaders import OfHub, from_hub, load_columns
from fedsynth.data.places import find
from fedsynth.scenario.data import PAIR, Data, TestRows
from fedsynth.scenario.task import MAX_VALUES
from fedsynth.typed import BadValue

TEXT, LABEL, UNIT, CLIENT, HELD = "text", "label", "unit", "client", "held"  # columns of Rows.table; LABEL: any answer
OPTIONS = "options"
ROW = "row"
ATTRIBUTES = "attributes"
MAX_CHARACTERS = 1_000_000  # of a cell; a longer one has a quote that never closes, or is no text


@dataclass(frozen=True, eq=False)
class Rows:
    """The content of a source.

    Attributes:
        table: One row per example, in the order of the source. `text` and `label` are text; `unit` is the person, or
            the number of the row; `client` is the value of the client column ("" without one); `held` marks test rows
            (none without `data.test`); `row` is its number in the source, from 1 without the header; with
            `data.options`, `options` are a row's own ones and `label` is the letter of the right one; with
            `data.attributes`, `attributes` are a row's values, "" where it has none. Never change it in place: it is
            cached.
        incomplete: Rows left out because they have no text or no label.
        merged: Spellings of persons and clients that stand for another one (`data.spellings`).
    """

    table: pd.DataFrame
    incomplete: int
    merged: int = 0


@dataclass(frozen=True)
class Columns:
    """The columns of a source by meaning; None for a column that it lacks.

    Attributes:
        text: Column of the text or instruction; two columns for a pair.
        answer: Column of the class name or response.
        classes: True if answers are class names: two spellings of one would be two classes.
        test: The test rows, which are held out.
        unit: Column of the person; None: each row is its own unit.
        client: Column whose values are the natural clients.
        spellings: Treatment of persons and clients with several spellings; None: they are refused, and no key can
            change that.
        pair: How a pair becomes one text; None for the default.
        options: Columns of a row's own options, or one column with a list; the answer then names one of them.
        answer_as: How it names it.
        attributes: Further columns of public values, in the order of their names.
    """

    text: str | tuple[str, ...]
    answer: str
    classes: bool = True
    test: TestRows | None = None
    unit: str | None = None
    client: str | None = None
    spellings: Literal["refuse", "merge"] | None = None
    pair: str | None = None
    options: tuple[str, ...] = ()
    answer_as: Literal["letter", "index", "text"] = "letter"
    attributes: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the text: one, or two for a pair."""
        return (self.text,) if isinstance(self.text, str) else self.text

    def one_text(self, parts: Sequence[str]) -> str:
        """The text of a row.

        >>> Columns(("premise", "hypothesis"), "label").one_text(["It rains.", "It is dry."])
        'It rains. | It is dry.'

        Args:
            parts: The cells of `texts`.
        """
        if len(parts) == 1:
            return parts[0]
        first, second = parts
        return (self.pair or PAIR).format(first=first, second=second)

    @property
    def names(self) -> list[str]:
        """All column names, each once."""
        named = [*self.texts, self.answer, self.client, self.unit, self.test.column if self.test else None]
        named += [*self.options, *self.attributes]
        return list(dict.fromkeys(column for column in named if column is not None))


def read_rows(data: Data) -> Rows:
    """The rows that have a text and a label. Read once per process, and again when the source changes.

    Raises:
        BadValue: If the source or a column is missing or cannot be used, labels, persons or clients have several
            spellings, a quote swallows rows, or a person has both training and test rows.
    """
    place = find(data.source) if data.hub_name is None else OfHub(data.hub_name, data.subset, data.revision)
    columns = Columns(
        data.text,
        data.response if data.task == "instructions" else data.label,
        data.classes,
        data.test,
        data.unit,
        data.client_column,
        data.spellings,
        data.pair,
        data.options,
        data.answer_as,
        tuple(sorted(data.attributes)),
    )
    # Arms that divide one source in different ways share its rows.
    return _read(data.source, columns, place, _stamp(place))


ALIKE = "differ only in case, blanks or what cannot be seen"
NAMED = 5  # groups of spellings in a message


def refuse_alike(labels: Iterable[str]) -> None:
    """Refuses two spellings of one class, which would be two classes.

    Raises:
        BadValue: If labels are the `same`; the message shows the difference.
    """
    if found := alike(labels):
        raise BadValue(f"labels {ALIKE}: {_spelt(found)}; write each class one way")


def _spelt(found: Sequence[Sequence[str]]) -> str:
    more = f", and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(map(told_apart, found[:NAMED])) + more


def values_of(data: Data) -> dict[str, list[str]]:
    """The values of each attribute in the source, each in its first spelling.

    Raises:
        BadValue: If a column has too many to be listed, or fewer than two.
    """
    found = dict[str, list[str]]()
    for place, column in enumerate(sorted(data.attributes)):
        values = sorted(row[place] for row in read_rows(data).table[ATTRIBUTES] if row[place])
        found[column] = list({same(value): value for value in reversed(values)}.values())[::-1]
        if not 2 <= len(found[column]) <= MAX_VALUES:
            raise BadValue(f"column {column!r} has {len(found[column])} values, an attribute from 2 to {MAX_VALUES}")
    return found


def misfit_values(column: str, values: Iterable[str], listed: Iterable[str], where: str) -> list[str]:
    """Lines on values of an attribute that are not listed, and on listed ones that no row has.

    Args:
        column: Its column.
        values: Of the rows; "" where a row has none.
        listed: The public values.
        where: What lists them, for the lines.
    """
    known = {same(value): value for value in listed}
    found = Counter(values)
    said = []
    if unknown := Counter({value: count for value, count in found.items() if same(value) not in known}):
        named = ", ".join(f"{value!r} {count}" for value, count in unknown.most_common(NAMED))
        said.append(
            f"{unknown.total()} rows have a value of {column!r} that {where} lacks "
            f"({named}{', ...' if len(unknown) > NAMED else ''}): they count as records, and no generator learns them"
        )
    there = set(map(same, found))
    if absent := [repr(value) for form, value in known.items() if form not in there]:
        said.append(f"no row has the value {', '.join(absent)} of {where}")
    return said


def _stamp(place: Path | OfHub) -> tuple[int, ...]:
    """A stamp that changes with the source; a data set of the Hub is read once per process."""
    if isinstance(place, OfHub):
        return ()
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return tuple(p.stat().st_mtime_ns for p in files)


@lru_cache(maxsize=4)
def _read(source: str, columns: Columns, place: Path | OfHub, _: tuple[int, ...]) -> Rows:
    asked = columns.names
    try:
        return rows_of(from_hub(place, asked) if isinstance(place, OfHub) else load_columns(place, asked), columns)
    except BadValue as problem:
        raise BadValue(f"{source}: {problem}") from problem


def rows_of(raw: pd.DataFrame, columns: Columns) -> Rows:
    """The rows that have a text and an answer.

    Args:
        raw: The columns, as `load_columns` gives them.
        columns: The columns by meaning.

    Raises:
        BadValue: If no row can be used or the text column holds numbers; also for a cell that is no text, a missing
            person, several spellings of labels, persons or clients, test rows that do not exist or have no label, or a
            person with training and test rows.
    """
    lists = columns.options if len(columns.options) == 1 else ()
    for column in raw.columns:
        if column not in lists:
            _check_cells(raw[column], column)
    for column in columns.texts:
        _refuse_numbers(raw[column], column)
    found = pd.DataFrame({TEXT: _texts(raw, columns), LABEL: _as_texts(raw[columns.answer])}, dtype=object)
    if columns.options:
        found[OPTIONS] = own = pd.Series(_options(raw, columns.options), dtype=object)
        found[LABEL] = [_letter(x, y, columns.answer_as) for x, y in zip(found[LABEL], own, strict=True)]
    if columns.attributes:  # a row without a value stays, as one with an unlisted label does
        values = ([value or "" for value in _as_texts(raw[column])] for column in columns.attributes)
        found[ATTRIBUTES] = pd.Series(list(zip(*values, strict=True)), dtype=object)
    whole = found.notna().all(axis=1).to_numpy()
    found[ROW] = np.arange(1, len(found) + 1)
    if not whole.any():
        needed = " and ".join(map(repr, (*columns.texts, columns.answer)))
        if columns.options:
            needed += f" as the {columns.answer_as} of one of its options ({', '.join(columns.options)})"
        raise BadValue(f"no row has both {needed} (it has {len(raw)} rows)")
    held = np.zeros(len(raw), dtype=bool) if columns.test is None else _held(raw[columns.test.column], columns.test)
    if columns.test is not None:
        _refuse_no_test(raw[columns.test.column], columns, held, found)
    found, raw = found[whole].reset_index(drop=True), raw[whole].reset_index(drop=True)
    found[UNIT] = found.index if columns.unit is None else _names(raw, columns.unit)
    found[CLIENT] = "" if columns.client is None else _names(raw, columns.client)
    found[HELD] = held[whole]
    merged = sum(
        _one_spelling(found, column, name, columns.spellings)
        for column, name in ((UNIT, columns.unit), (CLIENT, columns.client))
        if name
    )
    if columns.classes:
        refuse_alike(found[LABEL])
    if both := len(set(found[UNIT][found[HELD]]) & set(found[UNIT][~found[HELD]])):
        raise BadValue(
            f"{both} values of the unit column {columns.unit!r} have training and test rows: a person belongs in one "
            "of the two, mend the test rows"
        )
    return Rows(found, int((~whole).sum()), merged)


def _names(raw: pd.DataFrame, column: str) -> list[str]:
    names = _as_texts(raw[column])
    if missing := names.count(None):
        raise BadValue(f"{missing} rows have no value in column {column!r}")
    return [name for name in names if name is not None]


def _one_spelling(found: pd.DataFrame, column: str, name: str, spellings: str | None) -> int:
    """Refuses persons or clients with several spellings, or merges these in `found`; returns the number merged."""
    by = same_person if column == UNIT else same
    if not (several := alike(found[column], by)):
        return 0
    if spellings != "merge":
        what = "person" if column == UNIT else "client"
        way_out = ', or say data.spellings = "merge"' if spellings else ""
        raise BadValue(
            f"{len(several)} {what}s of the column {name!r} are written in ways that {ALIKE}: {_spelt(several)}; write "
            f"each one way{way_out}"
        )
    found[column] = [by(value) for value in found[column]]
    return sum(len(group) - 1 for group in several)


def _held(column: pd.Series[Any], test: TestRows) -> np.ndarray[Any, Any]:
    return np.array([value == test.equals for value in _as_texts(column)], dtype=bool)


def _refuse_no_test(column: pd.Series[Any], columns: Columns, held: np.ndarray[Any, Any], found: pd.DataFrame) -> None:
    """Refuses test rows that do not exist or cannot be measured on."""
    assert columns.test is not None
    equals, name = columns.test.equals, columns.test.column
    if not held.any():
        known = ", ".join(repr(v) for v in list(dict.fromkeys(_as_texts(column)))[:5])
        raise BadValue(f"no row has {equals!r} in the test column {name!r}; it has {known}")
    if not found[held].notna().all(axis=1).any():
        answered = found[held][LABEL].notna().any()
        lacks = "text" if answered else HIDDEN if columns.classes else "answer" if columns.options else "response"
        raise BadValue(nothing_to_test_on(int(held.sum()), columns.test, lacks))


HIDDEN = "label (-1 hides it)"


def nothing_to_test_on(rows: int, test: TestRows, lacks: str = HIDDEN) -> str:
    """The message on test rows that all lack something."""
    return (
        f"{rows} rows are {test.equals!r} in the test column {test.column!r}, none of them has a {lacks}; name another "
        "split"
    )


def _texts(raw: pd.DataFrame, columns: Columns) -> list[str | None]:
    """The text of each row; None for one that lacks a part of it."""
    rows = zip(*(_as_texts(raw[column]) for column in columns.texts), strict=True)
    whole = ([part for part in row if part is not None] for row in rows)
    return [columns.one_text(row) if len(row) == len(columns.texts) else None for row in whole]


def _options(raw: pd.DataFrame, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The options of each row; none for a row whose options cannot be read or told apart."""
    cells = zip(*(raw[column] for column in columns), strict=True)
    return [_told_apart(_listed(row[0]) if len(columns) == 1 else row) for row in cells]


def _listed(cell: object) -> Sequence[object]:
    """The list that a cell holds, itself or as JSON; else nothing."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return ()
    found = cell.tolist() if isinstance(cell, np.ndarray) else cell
    return found if isinstance(found, list | tuple) else ()


def _told_apart(cells: Sequence[object]) -> tuple[str, ...]:
    """Options as texts, without empty ones at the end; none if one is no text, or two are the same."""
    read = [_as_text(cell) if isinstance(cell, str | int | float) and cell == cell else "" for cell in cells]
    while read and blank(read[-1]):
        read.pop()
    texts = [option.strip() for option in read]
    whole = not any(blank(text) or _misfit(text) for text in texts)
    differ = len(set(map(same, texts))) == len(texts)
    return tuple(texts) if whole and differ and 1 < len(texts) <= len(LETTERS) else ()


def _letter(answer: str | None, options: Sequence[str], how: str) -> str | None:
    """The letter of the option that an answer names; None if it names none."""
    if answer is None:
        return None
    letters = LETTERS[: len(options)]
    named = {"letter": list(letters), "index": list(map(str, range(len(options)))), "text": list(map(same, options))}
    known = same(answer) if how == "text" else answer.strip().upper()
    return letters[named[how].index(known)] if known in named[how] else None


def _as_texts(column: pd.Series[Any]) -> list[str | None]:
    """Each cell as text; None for a missing or blank one."""
    texts = [None if gone else _as_text(value) for value, gone in zip(column, column.isna(), strict=True)]
    return [None if text is None or blank(text) else text for text in texts]


def _as_text(value: object) -> str:
    # A whole number beside a missing one is read as a float.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _check_cells(column: pd.Series[Any], name: str) -> None:
    """Refuses cells that are no text; row numbers count from 1 without the header."""
    for row, value in enumerate(column, start=1):
        if misfit := _misfit(value):
            raise BadValue(f"row {row} of column {name!r} {misfit}")


def _misfit(value: object) -> str:
    """The reason why a cell is no text; "" if it is text."""
    if isinstance(value, bytes | bytearray | memoryview | list | tuple | set | dict | np.ndarray):
        return f"holds {type(value).__name__} values, not text"
    if not isinstance(value, str):
        return ""
    if len(value) > MAX_CHARACTERS:
        return (
            f"has {len(value)} characters, at most {MAX_CHARACTERS} are read: look for a quote that never closes, or "
            "cut the text"
        )
    return "holds a character that is no text (NUL or half a pair)" if "\0" in value or not _encodes(value) else ""


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_numbers(column: pd.Series[Any], name: str) -> None:
    values = column[column.notna() & (column != "")]
    if len(values) and all(map(_is_number, values)):
        raise BadValue(f"column {name!r} holds numbers, not text: name the text's column")
    if len(values) and not any(isinstance(value, str) for value in values):
        raise BadValue(
            f"column {name!r} holds {type(values.iloc[0]).__name__} values, not text: name the text's column"
        )


def _is_number(value: object) -> bool:
    if isinstance(value, numbers.Number):
        return not isinstance(value, bool)
    try:
        float(str(value))
    except ValueError:
        return False
    return True
