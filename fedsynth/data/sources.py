"""A site's own rows as its site.toml declares them: gathered from a file or a database, and laid out as units."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedsynth.corpus import Corpus, Provenance, same, same_person
from fedsynth.data.database import fetched, not_read_only
from fedsynth.data.partition import ClientData
from fedsynth.data.rowstore import Record
from fedsynth.data.rowwise import Lost, read_file, result, text_of
from fedsynth.data.tables import Columns, refuse_alike
from fedsynth.scenario.data import TestRows, check_pair
from fedsynth.typed import BadValue, Count, in_range, plain

ENDINGS = (".csv", ".jsonl", ".parquet")
NOT_READ = ("attributes", "database_env", "labels", "records", "spellings")  # keys that do not change what a row is


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """A site's own data: the table [data] of site.toml. All of it may be known to others; the rows may not.

    Attributes:
        id: Names the data set in the site's ledger. It stays when rows change: what was spent on them is still spent.
        source: A CSV, JSONL or Parquet file, beside site.toml unless the path is absolute.
        query: In place of a file: one SELECT, whose ORDER BY ends with a column that no two rows share.
        database_env: Environment variable that holds the database's URL, as SQLAlchemy writes it; never the URL itself.
        task: `classification`: text -> one of `labels`. `instructions`: text (an instruction) -> response.
        text: Column of the text; two columns, as ["premise", "hypothesis"], for a pair, which becomes one text.
        pair: How the two become one, with the slots `{first}` and `{second}`; left out, `{first} | {second}`. Agree on
            it with the other sites. A row that lacks one of them has no text.
        label: Column of the class name.
        response: `instructions`: column of the response.
        person: Column that says whose row it is: the privacy unit.
        independent_rows: In place of `person`: no two rows are of one person, and each is a unit of its own.
        records: Declared, public number of persons (of rows, where they are independent) in the training rows. Noise
            and sampling depend on it, never on the real number; of more, only the first take part.
        labels: The public label list of a classification.
        attributes: `classification`: column -> its public values, as { stars = ["1", "5"] }: further columns by which a
            scenario's generators write. They must be the scenario's. No generator learns a row with another value.
        test: Rows held out for testing; without it there are none.
        spellings: Persons that are written in several ways (`fedsynth.corpus.same_person`) are refused by `fedsynth
            site check`; or merged. A request takes them for one in any case.
    """

    id: str
    source: str = ""
    query: str = ""
    database_env: str = ""
    task: Literal["classification", "instructions"] = "classification"
    text: str | tuple[str, ...] = "text"
    pair: str | None = None
    label: str = "label"
    response: str = "response"
    person: str | None = None
    independent_rows: bool = False
    records: Count
    labels: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    test: TestRows | None = None
    spellings: Literal["refuse", "merge"] = "refuse"

    def __post_init__(self) -> None:
        in_range(self, "data")
        check_pair(self.text, self.pair)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.id):
            raise BadValue(
                f"data.id must be letters, digits, '.', '_' and '-', as notes-2024, got {_unless_url(self.id)}"
            )
        self._check_place()
        self._check_unit()
        if self.task == "classification" and not self.labels:
            raise BadValue("data.labels is missing: list the classes, as the coordinator's scenario has them")
        if self.task == "instructions" and self.labels:
            raise BadValue('data.labels belongs to task = "classification"; responses are not of a list')
        if self.task == "classification" and self.response != SiteData.response:
            raise BadValue('data.response is the column of task = "instructions"; that of a class name is data.label')
        if self.task == "instructions" and self.label != SiteData.label:
            raise BadValue('data.label is the column of task = "classification"; that of a response is data.response')
        if blank := [label for label in self.labels if not label.strip()]:
            raise BadValue(f"data.labels holds an empty name ({blank[0]!r}): leave it out")
        if len(set(self.labels)) < len(self.labels):
            raise BadValue(f"data.labels holds a class twice: {sorted(self.labels)}")
        refuse_alike(self.labels)
        answer = "label" if self.task == "classification" else "response"
        texts = [("text", column) for column in self.columns.texts]
        if self.attributes and self.task != "classification":
            raise BadValue('data.attributes belongs to task = "classification"')
        for name, values in self.attributes.items():
            if len(values) < 2 or len({same(value) for value in values}) < len(values):
                raise BadValue(f"data.attributes.{name} must list two values or more, each once, got {list(values)}")
        roles: list[tuple[str, str | None]] = [*texts, (answer, self.columns.answer), ("person", self.person)]
        roles += [(f"attributes.{column}", column) for column in self.attributes]
        for role, column in roles:
            if column == "":
                raise BadValue(f"data.{role} is empty: name a column")
            if shared := [other for other, name in roles if other != role and name == column]:
                raise BadValue(f"data.{role} and data.{shared[0]} both name the column {column!r}: they must differ")

    @property
    def digest(self) -> str:
        """SHA-256 of what decides how rows are read: with other words they have to be imported anew. Labels, values of
        attributes and `records` play no part in that."""
        facts = {name: value for name, value in plain(self).items() if name not in NOT_READ}
        if self.attributes:
            facts["attributes"] = sorted(self.attributes)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _check_place(self) -> None:
        if bool(self.source) == bool(self.query):
            raise BadValue(
                f"data needs a source (a file) or a query (to a database), {'not both' if self.source else 'got none'}"
            )
        if self.source and ("://" in self.source or Path(self.source).suffix.lower() not in ENDINGS):
            raise BadValue(f"data.source must name a {', '.join(ENDINGS)} file, got {_unless_url(self.source)}")
        if self.source and self.database_env:
            raise BadValue("data.database_env belongs to a query; a file needs none")
        if not self.query:
            return
        # Neither is repeated: whoever mistakes the field puts the URL itself here, password and all.
        if not self.database_env.isidentifier():
            raise BadValue(
                "data.database_env must name the environment variable that holds the database's URL, as NOTES_DB; the "
                "URL itself may hold a password and is no part of site.toml"
            )
        if wrong := not_read_only(self.query):
            raise BadValue(f"data.query {wrong}")

    def _check_unit(self) -> None:
        if self.spellings != "refuse" and self.person is None:
            raise BadValue("data.spellings is about persons: name their column as data.person")
        if self.person is not None and self.independent_rows:
            raise BadValue(
                "data.person and independent_rows = true exclude each other: a column of persons says that rows of one "
                "person belong together, and then the person is what is protected; leave one of the two out"
            )
        if self.person is None and not self.independent_rows:
            raise BadValue(
                'data must say whose rows these are: person = "COLUMN" protects a person with all of their rows; '
                "independent_rows = true protects a row, which is the same only where no two rows are of one person: "
                "epsilon is much larger for who has several (docs/privacy.md)"
            )

    @property
    def origin(self) -> str:
        """As messages call it: the file, or the key of the query."""
        return self.source or "data.query"

    @property
    def unit_name(self) -> str:
        """The privacy unit: the column of persons, or the row."""
        return self.person or "row"

    @property
    def columns(self) -> Columns:
        """Which columns say what."""
        classes = self.task == "classification"
        answer = self.label if classes else self.response
        attributes = tuple(sorted(self.attributes))
        return Columns(self.text, answer, classes, self.test, self.person, pair=self.pair, attributes=attributes)


@dataclass(frozen=True)
class Gathered:
    """A source, row by row, with what its operator should know. Only `records` are kept.

    Attributes:
        records: In the order of the source.
        rows: How many of them are more than a blank line.
        counted: How rows are counted: "line" or "row".
        damaged: Number and reason of each row that cannot be read, and is an empty one in its place.
        incomplete: Number and reason of each row that lacks a text, an answer or a person; likewise.
        notes: Further lines for the operator.
        spelt: Persons that are written in several ways, each with its spellings.
        splits: Values of the test column.
    """

    records: Sequence[Record]
    rows: int
    counted: str
    damaged: Sequence[tuple[int, str]]
    incomplete: Sequence[tuple[int, str]]
    notes: Sequence[str]
    spelt: Sequence[Sequence[str]]
    splits: Sequence[str]


def gathered(data: SiteData, folder: Path) -> Gathered:
    """All rows of a source. A row that cannot be read is an empty one: it stops nothing, and changes no other.

    Args:
        data: The source.
        folder: That of site.toml: where a path begins.

    Raises:
        BadValue: If the source or a column is missing, or the database refuses the query. The message stays at the
            site.
    """
    columns = data.columns
    try:
        if data.query:
            found = result(*fetched(data.query, data.database_env, folder), columns.names)
        else:
            found = read_file(folder / data.source, columns.names)
    except BadValue as problem:
        raise BadValue(f"{data.origin}: {problem}") from None
    records, damaged, incomplete = list[Record](), list[tuple[int, str]](), list[tuple[int, str]]()
    spelt, splits = dict[str, dict[str, None]](), dict[str, None]()
    for row in found.rows:
        if row.blank:
            records.append(Record(None, False, "", "", ("",) * len(columns.attributes)))
            continue
        cells = {name: text_of(row.cells.get(name)) for name in columns.names}
        bad = [f"{name!r} {cell.why}" for name, cell in cells.items() if isinstance(cell, Lost)]
        lacks = [name for name in (*columns.texts, columns.answer, columns.unit) if name and cells[name] is None]
        if row.broken or bad:
            damaged.append((row.number, row.broken or ", ".join(bad)))
        elif lacks:
            incomplete.append((row.number, f"no {' and no '.join(map(repr, lacks))}"))
        split = cells[columns.test.column] if columns.test else None
        if isinstance(split, str):
            splits[split] = None
        held = columns.test is not None and isinstance(split, str) and same(split) == same(columns.test.equals)
        unit: str | int | None = len(records)
        if columns.unit is not None:
            person = cells[columns.unit]
            unit = _person(person)
            if isinstance(person, str) and unit is not None:
                spelt.setdefault(str(unit), {})[person] = None
        if columns.test and (isinstance(split, Lost) or (row.broken and columns.test.column not in row.cells)):
            unit = None  # whether it is to learn from cannot be known either
        whole = not (row.broken or bad or lacks)
        text = columns.one_text([str(cells[name]) for name in columns.texts]) if whole else ""
        answer = str(cells[columns.answer]) if whole else ""
        values = tuple(str(cells[name] or "") if whole else "" for name in columns.attributes)
        records.append(Record(unit, held, text, answer, values))
    return Gathered(
        records,
        sum(not row.blank for row in found.rows),
        found.counted,
        damaged,
        incomplete,
        found.notes,
        [sorted(group) for group in spelt.values() if len(group) > 1],
        list(splits),
    )


def _person(cell: str | Lost | None) -> str | None:
    """The one spelling of a person, from this cell alone: `same_person`, and a whole number without its fraction (3,
    3.0, "3" and "3.0" are one; "03" is another). None for no text: whose row it is, nobody knows."""
    if not isinstance(cell, str):
        return None
    return re.sub(r"^(-?\d+)\.0+$", r"\1", same_person(cell)) or None


def laid_out(records: Sequence[Record], data: SiteData, attributes: Sequence[str] = ()) -> ClientData:
    """The site's training and test text: what requests work with. Each row becomes what it becomes whatever the others
    hold (docs/deployment/data.md).

    Training rows stand in their order, unreadable ones as empty texts, so that a unit's place is that of its first row.
    A row takes an empty place where it stands if nobody can tell whose it is, or whether it is to test on, as long as
    it takes none of `records` from a unit that is known: it may be one more row of a person who has a place, or a test
    row. Test rows that cannot be read are left out.

    Args:
        records: The rows.
        data: How they are declared.
        attributes: The columns of `data.attributes` that a request works with.
    """
    places = [data.columns.attributes.index(column) for column in attributes]
    listed = {same(label): label for label in reversed(data.labels)}
    found = {record.answer for record in records} - set(data.labels) if listed else set()
    label = {answer: listed.get(same(answer), answer) for answer in found}
    spare = data.records - len(units_of(records))
    train, test = list[tuple[Hashable, Record]](), list[tuple[Hashable, Record]]()
    for number, record in enumerate(records):
        if record.held:
            test += [(number if record.unit is None else record.unit, record)] if record.text else []
        elif record.unit is not None:
            train.append((record.unit, record))
        elif spare > 0:
            spare -= 1
            train.append((-1 - number, record))  # no other row's, and no number of one
    return ClientData(
        *(
            Corpus(
                tuple(record.text for _, record in rows),
                tuple(label.get(record.answer, record.answer) for _, record in rows),
                Provenance.PRIVATE,
                units=tuple(unit for unit, _ in rows),
                attributes=tuple(tuple(record.attributes[i] for i in places) for _, record in rows) if places else None,
            )
            for rows in (train, test)
        )
    )


def units_of(records: Sequence[Record]) -> Counter[str | int]:
    """The units that training rows name, and how many rows each has."""
    return Counter(record.unit for record in records if record.unit is not None and not record.held)


def _unless_url(value: str) -> str:
    """A value for a message: a URL may hold a password."""
    return "a URL" if "://" in value else repr(value)
