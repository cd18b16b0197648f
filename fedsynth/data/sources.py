"""A site's own rows as its site.toml declares them: fetched from a file or a database, and laid out as units."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedsynth.corpus import Corpus, Provenance, same
from fedsynth.data.partition import ClientData, overlaps, unified
from fedsynth.data.rowstore import Record
from fedsynth.data.rowwise import Lost, Read, read_file, result, text_of, tried
from fedsynth.data.tables import Columns, refuse_alike
from fedsynth.scenario.schema import TestRows
from fedsynth.typed import BadValue, Count, in_range, plain

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine

ENDINGS = (".csv", ".jsonl", ".parquet")
WRITES = {"INSERT", "UPDATE", "DELETE", "MERGE", "INTO"}  # of these, SQL allows some within a SELECT or WITH
PATIENCE = 10  # seconds to wait for a database to answer
NOT_READ = ("database_env", "labels", "records", "spellings")  # of the keys: they do not change what a row is
NAMED = 5  # labels, persons or splits in a message
TOLD = 10  # rows in a message
MANY = 20  # rows: who has more of them, and ten times as many as half of all persons have, may be no person


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """A site's own data: the table [data] of site.toml. All of it may be known to others; the rows may not.

    Attributes:
        id: Names the data set in the site's ledger. It stays when rows change: what was spent on them is still spent.
        source: A CSV, JSONL or Parquet file, beside site.toml unless the path is absolute.
        query: In place of a file: one SELECT, whose ORDER BY ends with a column that no two rows share.
        database_env: Environment variable that holds the database's URL, as SQLAlchemy writes it; never the URL itself.
        task: `classification`: text -> one of `labels`. `instructions`: text (an instruction) -> response.
        text: Column of the text.
        label: Column of the class name.
        response: `instructions`: column of the response.
        person: Column that says whose row it is: the privacy unit.
        independent_rows: In place of `person`: no two rows are of one person, and each is a unit of its own.
        records: Declared, public number of persons (of rows, where they are independent) in the training rows. Noise
            and sampling depend on it, never on the real number; of more, only the first take part.
        labels: The public label list of a classification.
        test: Rows held out for testing; without it there are none.
        spellings: Persons that are written in several ways (`fedsynth.corpus.same`) are refused by `fedsynth site
            check`; or merged. A request takes them for one in any case.
    """

    id: str
    source: str = ""
    query: str = ""
    database_env: str = ""
    task: Literal["classification", "instructions"] = "classification"
    text: str = "text"
    label: str = "label"
    response: str = "response"
    person: str | None = None
    independent_rows: bool = False
    records: Count
    labels: tuple[str, ...] = ()
    test: TestRows | None = None
    spellings: Literal["refuse", "merge"] = "refuse"

    def __post_init__(self) -> None:
        in_range(self, "data")
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
        roles = {"text": self.text, answer: self.columns.answer, "person": self.person}
        for role, column in roles.items():
            if column == "":
                raise BadValue(f"data.{role} is empty: name a column")
            if shared := [other for other, name in roles.items() if other != role and name == column]:
                raise BadValue(f"data.{role} and data.{shared[0]} both name the column {column!r}: they must differ")

    @property
    def digest(self) -> str:
        """SHA-256 of what decides how rows are read: with other words they have to be imported anew. Labels and
        `records` play no part in that."""
        facts = {name: value for name, value in plain(self).items() if name not in NOT_READ}
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
        if wrong := _not_read_only(self.query):
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
    def unit_name(self) -> str:
        """What is protected: the column of persons, or the row."""
        return self.person or "row"

    @property
    def columns(self) -> Columns:
        """Which columns say what."""
        classes = self.task == "classification"
        return Columns(self.text, self.label if classes else self.response, classes, self.test, self.person)


@dataclass(frozen=True)
class Gathered:
    """A source, row by row, with what its operator should know. Only `records` are kept.

    Attributes:
        records: In the order of the source.
        rows: How many of them are more than a blank line.
        counted: How rows are counted: "line" or "row".
        damaged: Number and reason of each row that cannot be read, and is an empty one in its place.
        incomplete: Number and reason of each row that lacks a text, an answer or a person; likewise.
        notes: What else to look at.
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
        data: What is read.
        folder: That of site.toml: where a path begins.

    Raises:
        BadValue: If the source or a column is missing, or the database refuses the query. The message stays at the
            site.
    """
    columns = data.columns
    try:
        found = _asked(data, folder) if data.query else read_file(folder / data.source, columns.names)
    except BadValue as problem:
        raise BadValue(f"{_name(data)}: {problem}") from None
    records, damaged, incomplete = list[Record](), list[tuple[int, str]](), list[tuple[int, str]]()
    spelt, splits = dict[str, dict[str, None]](), dict[str, None]()
    for row in found.rows:
        if row.blank:
            records.append(Record(None, False, "", ""))
            continue
        cells = {name: text_of(row.cells.get(name)) for name in columns.names}
        bad = [f"{name!r} {cell.why}" for name, cell in cells.items() if isinstance(cell, Lost)]
        lacks = [name for name in (columns.text, columns.answer, columns.unit) if name and cells[name] is None]
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
        text, answer = cells[columns.text], cells[columns.answer]
        whole = not (row.broken or bad or lacks)
        records.append(Record(unit, held, str(text) if whole else "", str(answer) if whole else ""))
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
    """The one spelling of a person, from this cell alone: `same`, and a whole number without its fraction (3, 3.0, "3"
    and "3.0" are one; "03" is another). None for no text: whose row it is, nobody knows."""
    if not isinstance(cell, str):
        return None
    return re.sub(r"^(-?\d+)\.0+$", r"\1", same(cell)) or None


def laid_out(records: Sequence[Record], data: SiteData) -> ClientData:
    """The site's training and test text: what requests work with. Each row becomes what it becomes whatever the others
    hold (docs/deployment/data.md).

    Training rows stand in their order, unreadable ones as empty texts, so that a unit's place is that of its first row.
    A row takes an empty place where it stands if nobody can tell whose it is, or whether it is to test on, as long as
    it takes none of `records` from a unit that is known: it may be one more row of a person who has a place, or a test
    row. Test rows that cannot be read are left out.
    """
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
            )
            for rows in (train, test)
        )
    )


def units_of(records: Sequence[Record]) -> Counter[str | int]:
    """The units that training rows name, and how many rows each has."""
    return Counter(record.unit for record in records if record.unit is not None and not record.held)


def misread(data: SiteData, found: Gathered) -> str:
    """Why rows must not be used as they are: persons of several spellings, unless `data.spellings` merges them; ""
    if they may be. What nobody sees of a spelling is escaped."""
    if not found.spelt or data.spellings == "merge":
        return ""
    named = ", ".join(" and ".join(map(ascii, group)) for group in found.spelt[:NAMED])
    more = f", and {len(found.spelt) - NAMED} more" if len(found.spelt) > NAMED else ""
    return (
        f"{_name(data)}: {len(found.spelt)} persons of the column {data.person!r} are written in several ways: {named}"
        f'{more}; write each person one way, or say data.spellings = "merge"'
    )


def warnings(data: SiteData, found: Gathered) -> list[str]:
    """What does not fit but can be used, a line each, for the eyes of the site alone: it names labels and counts."""
    name, site = _name(data), laid_out(found.records, data)
    answer = data.columns.answer
    said = [f"{name}: {note}" for note in found.notes]
    if found.damaged:
        said.append(
            f"{name}: {len(found.damaged)} of {found.rows} rows cannot be read and are empty ones in their places: "
            f"{_notice(found.counted, found.damaged)}{_way_out(found.damaged)}"
        )
    if found.incomplete:
        said.append(
            f"{name}: {len(found.incomplete)} of {found.rows} rows lack a text, {answer} or person and are empty ones: "
            f"{_notice(found.counted, found.incomplete)}"
        )
    if found.spelt:
        said.append(f"{len(found.spelt)} persons are written in several ways, and each counts as one (data.spellings)")
    texts = [record.text for record in found.records if record.text]
    if texts and all(map(_is_number, texts)):
        said.append(f"column {data.text!r} holds numbers alone: is it the text's column?")
    if data.labels:
        said += _labels(data, found)
    if data.test is not None:
        said += _test_rows(data, found, len(site.test))
    said += _units(data, found, site)
    usable = [text for text in site.train.prompts if text]
    if repeated := len(usable) - len(set(unified(usable))):
        said.append(
            f"{repeated} training rows repeat the text of another one: if they are of one person, give them one value "
            "in a column of persons, or leave them out"
        )
    if both := overlaps([site])[1]:
        said.append(f"{both} texts are training text and test text: measured on them, a model looks too good")
    return said


def _notice(counted: str, rows: Sequence[tuple[int, str]]) -> str:
    named = ", ".join(f"{counted} {number} ({why})" for number, why in rows[:TOLD])
    return named + (f", and {len(rows) - TOLD} more" if len(rows) > TOLD else "")


def _way_out(rows: Sequence[tuple[int, str]]) -> str:
    return "; save it as UTF-8" if any("UTF-8" in why for _, why in rows) else ""


def _labels(data: SiteData, found: Gathered) -> list[str]:
    said = []
    rows = Counter(record.answer for record in found.records if record.text)
    listed = {same(label) for label in data.labels}
    other = {label: count for label, count in rows.items() if label not in data.labels}
    if respelt := [label for label in other if same(label) in listed]:
        named = ", ".join(map(ascii, respelt[:NAMED])) + (", ..." if len(respelt) > NAMED else "")
        said.append(
            f"{sum(other[label] for label in respelt)} rows have a label of data.labels in another spelling ({named}): "
            "they count as that label"
        )
    if unknown := Counter({label: count for label, count in other.items() if same(label) not in listed}):
        named = ", ".join(f"{label!r} {count}" for label, count in unknown.most_common(NAMED))
        named += ", ..." if len(unknown) > NAMED else ""
        said.append(
            f"{unknown.total()} rows have a label that data.labels lacks ({named}): they count as records, and nothing "
            "is learnt from them"
        )
    there = {same(label) for label in rows}
    if absent := [label for label in data.labels if same(label) not in there]:
        said.append(f"no row has the label {', '.join(map(repr, absent))} of data.labels")
    return said


def _test_rows(data: SiteData, found: Gathered, count: int) -> list[str]:
    assert data.test is not None
    if not count:
        known = ", ".join(map(repr, found.splits[:NAMED])) or "no value"
        return [
            f"no row to test on: none that can be read has {data.test.equals!r} in the test column "
            f"{data.test.column!r}; it has {known}"
        ]
    train = units_of(found.records)
    if data.person and (both := len({record.unit for record in found.records if record.held} & set(train))):
        return [f"{both} values of {data.person!r} have training and test rows: a person belongs in one of the two"]
    return []


def _units(data: SiteData, found: Gathered, site: ClientData) -> list[str]:
    said = []
    unit, units = f"values of {data.person!r}" if data.person else "rows", units_of(found.records)
    if len(units) > data.records:
        said.append(
            f"the training text has {len(units)} {unit}, declared are {data.records} (data.records): only the first "
            f"{data.records} take part. If one of them is taken out of the source, or damaged so that nobody can tell "
            "whose row it is, the next one moves in, so that this costs the replace-one figure; epsilon holds for one "
            "that stays and is emptied"
        )
    elif len(units) < data.records:
        said.append(
            f"the training text has {len(units)} {unit}, declared are {data.records} (data.records): those that are "
            "missing count as empty ones"
        )
    sizes = sorted(units.values())
    if sizes and sizes[-1] > max(MANY, 10 * sizes[len(sizes) // 2]):
        said.append(
            f"one of the {unit} has {sizes[-1]} of {len(site.train)} training rows, half of them have at most "
            f"{sizes[len(sizes) // 2]}: is it a person, or does it stand for unknown ones?"
        )
    return said


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _name(data: SiteData) -> str:
    return data.source or "data.query"


def _unless_url(value: str) -> str:
    """A value for a message: a URL may hold a password."""
    return "a URL" if "://" in value else repr(value)


# --- Databases --------------------------------------------------------------------------------------------------------

_SQL = re.compile(
    r"""--[^\n]* | /\*.*?\*/                                          # comments
    | '(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | (\$\w*\$).*?\1    # texts, and names in quotes
    | (?P<word>[^\W\d][\w$]*) | (?P<sign>[();'"`])""",
    re.VERBOSE | re.DOTALL,
)


def _not_read_only(query: str) -> str:
    """Why a query is not one ordered SELECT; "" for one that is. It catches mistakes: what forbids is the database."""
    found = [m["word"].upper() if m["word"] else m["sign"] for m in _SQL.finditer(query.strip()) if m.lastgroup]
    while found and found[-1] == ";":
        found.pop()
    if not found or found[0] not in ("SELECT", "WITH"):
        return "must be one SELECT (or WITH ... SELECT): it only reads"
    if set(found) & set("'\"`"):
        return "has a quote that never closes"
    if ";" in found:
        return "must be one statement, got several"
    if writes := sorted(WRITES & set(found)):
        return f"must only read, it has the word {writes[0]}; a column of that name needs quotes"
    depth, ordered = 0, False
    for one, after in zip(found, [*found[1:], ""], strict=True):
        depth += {"(": 1, ")": -1}.get(one, 0)
        ordered |= depth == 0 and (one, after) == ("ORDER", "BY")
    if not ordered:
        return (
            "has no ORDER BY of its own (one in brackets does not count): without it a database may give the same rows "
            "in another order, which looks like other data and is charged again; order by a column that no two rows "
            "share"
        )
    return ""


def _asked(data: SiteData, folder: Path) -> Read:
    """The query's result, cells as the driver gives them."""
    names, rows = _fetched(_engine(data.database_env, folder), data.query, data.database_env)
    return result(names, rows, data.columns.names)


def _url(env: str) -> URL:
    from sqlalchemy.engine import make_url  # takes half a second to import, and a file needs none of it
    from sqlalchemy.exc import ArgumentError

    value = os.environ.get(env, "")
    if not value:
        raise BadValue(
            f"the environment variable {env} of data.database_env is not set: it holds the database's URL, as "
            "postgresql://USER:PASSWORD@HOST/NAME or sqlite:///FILE"
        )
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        url = None
    if url is None:  # outside of `except`: what was raised there may repeat the URL
        raise BadValue(f"what {env} holds is no URL of a database, as postgresql://USER:PASSWORD@HOST/NAME")
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _engine(env: str, folder: Path) -> Engine:
    """A door to the database that reads only, where there is one; nothing is connected yet."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    url, options, problem = _url(env), dict[str, Any](), ""
    if url.get_backend_name() == "sqlite":
        path = folder / (url.database or "")
        if not path.is_file():
            raise BadValue(
                f"{env} names no SQLite file that is there: sqlite:///FILE, beside site.toml, or sqlite:////PATH"
            )
        options["creator"] = lambda: _sqlite(path)
    elif url.get_backend_name() == "postgresql":
        options["execution_options"] = {"postgresql_readonly": True}
        options["connect_args"] = {} if "connect_timeout" in url.query else {"connect_timeout": PATIENCE}
    try:
        return create_engine(url, poolclass=NullPool, **options)
    except ImportError as missing:
        problem = (
            f"the database that {env} names needs a driver that is not installed ({missing.name or missing}); that of "
            'PostgreSQL comes with pip install "fedsynth[sql]"'
        )
    except SQLAlchemyError:
        problem = f"what {env} holds names no kind of database that SQLAlchemy knows: postgresql://..., sqlite:///..."
    raise BadValue(problem)


def _sqlite(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    # Else one text that is not UTF-8 would fail the whole result.
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    return connection


def _fetched(engine: Engine, query: str, env: str) -> tuple[list[str], Sequence[Sequence[object]]]:
    """Names of columns and rows.

    Raises:
        BadValue: Without what the driver says where that may hold a piece of the URL or of a row.
    """
    connected = False
    try:
        with engine.connect() as connection:
            connected = True
            # As it stands: neither a colon nor a per cent sign is a parameter.
            found = connection.execution_options(no_parameters=True).exec_driver_sql(query)
            names = list(found.keys())
            return names, _each_cell(found.cursor) if engine.driver == "psycopg" else found.all()
    except Exception as failure:
        cause = getattr(failure, "orig", None) or failure
        said = _why_failed(cause) if connected else _why_unreachable(cause)
    if not connected:
        raise BadValue(f"the database that {env} names cannot be opened: {said}")
    raise BadValue(f"the database refuses it: {said}")


def _each_cell(cursor: Any) -> list[list[object]]:
    """A result of psycopg, cell by cell: a date beyond Python's years would fail the whole of it."""
    from psycopg.adapt import Transformer

    raw, loaders = cursor.pgresult, Transformer(cursor)
    load = [loaders.get_loader(raw.ftype(column), raw.fformat(column)).load for column in range(raw.nfields)]

    def cell(row: int, column: int) -> object:
        value = raw.get_value(row, column)
        return None if value is None else tried(lambda: load[column](value))

    return [[cell(row, column) for column in range(raw.nfields)] for row in range(raw.ntuples)]


def _why_unreachable(cause: BaseException) -> str:
    """From a closed list: what a driver says of a URL may repeat a piece of it."""
    known = {
        "pg_hba.conf": "its pg_hba.conf lets no such user in from here",
        "password authentication failed": "it takes neither this user nor this password",
        "no password supplied": "it asks for a password",
        "does not exist": "it has no database or user of that name",
        "Connection refused": "nothing listens there; is the server up?",
        "No such file": "nothing listens there; is the server up?",
        "resolve host": "no host of that name",
        "translate host name": "no host of that name",
        "timeout": f"no answer in time ({PATIENCE} s unless the URL has connect_timeout)",
        "SSL": "no encrypted connection as the URL asks for it",
        "certificate": "no encrypted connection as the URL asks for it",
    }
    return next((reason for sign, reason in known.items() if sign in str(cause)), type(cause).__name__)


def _why_failed(cause: BaseException) -> str:
    """What is wrong with the statement; of an error about a value, which may be a row's, only its name."""
    state = getattr(cause, "sqlstate", None) or ""
    # Of PostgreSQL, a transaction that only reads (25) or a wrong statement (42); of SQLite, what it says itself.
    if state[:2] in ("25", "42") or hasattr(cause, "sqlite_errorname"):
        said = getattr(getattr(cause, "diag", None), "message_primary", None) or str(cause)
        return " ".join(said.split())[:300]
    return f"{type(cause).__name__} {state}".strip()
