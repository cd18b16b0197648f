"""A site's own rows: a file beside its site.toml, or a query to its database."""

from __future__ import annotations

import os
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from fedsynth.data import Site, misfitting, overlaps, undivided, unified
from fedsynth.scenario import TestRows
from fedsynth.tables import Columns, Rows, columns_of, load_columns, refuse_alike, rows_of
from fedsynth.typed import BadValue, Count, in_range

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine

ENDINGS = (".csv", ".jsonl", ".parquet")
WRITES = {"INSERT", "UPDATE", "DELETE", "MERGE", "INTO"}  # of these, SQL allows some within a SELECT or WITH
PATIENCE = 10  # seconds to wait for a database to answer
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


def read(data: SiteData, folder: Path) -> Site:
    """The site's training and test text, in the order of the source.

    No single row decides whether this succeeds (docs/privacy.md): a cell that is no text counts as missing, rows
    without text, answer or person are left out, and a label that is not listed teaches nothing. `check` refuses them.

    Args:
        data: What is read.
        folder: That of site.toml: where a path begins.

    Raises:
        BadValue: If the source or a column is missing or cannot be used, the text column holds numbers, or no row has
            what is needed. The message stays at the site.
    """
    return undivided(_rows(data, folder, strict=False))


def check(data: SiteData, folder: Path) -> list[str]:
    """What is wrong with a site's data, for the eyes of the site alone: it names labels and counts.

    Args:
        data: What is read; a query twice.
        folder: That of site.toml.

    Returns:
        Warnings, a line each: what does not fit, but can be used.

    Raises:
        BadValue: If the data cannot be used as it is: as `read`, also for what a single row holds, and for a query that
            gives other rows the second time.
    """
    rows = _rows(data, folder, strict=True)
    site = undivided(rows)
    if data.query and undivided(_rows(data, folder, strict=True)) != site:
        raise BadValue(
            "data.query gave other rows when it was asked again, and other rows are charged again: let ORDER BY end "
            "with a column that no two rows share, and WHERE leave out what is still being written"
        )
    warnings = misfitting(rows, _name(data), data.labels if data.task == "classification" else None)
    if data.query and (driver := _url(data.database_env).get_backend_name()) not in ("postgresql", "sqlite"):
        warnings.append(f"a {driver} database is not opened read-only: use an account that may only read")
    unit = f"values of {data.person!r}" if data.person else "rows"
    units = Counter(site.train.units or ())
    if len(units) != data.records:
        effect = (
            f"only the first {data.records} take part"
            if len(units) > data.records
            else "those that are missing count as empty ones"
        )
        warnings.append(
            f"the training text has {len(units)} {unit}, declared are {data.records} (data.records): {effect}"
        )
    sizes = sorted(units.values())
    if sizes and sizes[-1] > max(MANY, 10 * sizes[len(sizes) // 2]):
        warnings.append(
            f"one of the {unit} has {sizes[-1]} of {len(site.train)} training rows, half of them have at most "
            f"{sizes[len(sizes) // 2]}: is it a person, or does it stand for unknown ones?"
        )
    texts = Counter(unified(site.train.prompts))
    if repeated := len(site.train) - len(texts):
        warnings.append(
            f"{repeated} training rows repeat the text of another one: if they are of one person, give them one value "
            "in a column of persons, or leave them out"
        )
    if both := overlaps([site])[1]:
        warnings.append(f"{both} texts are training text and test text: measured on them, a model looks too good")
    return warnings


def _rows(data: SiteData, folder: Path, *, strict: bool) -> Rows:
    try:
        raw = _asked(data, folder) if data.query else _loaded(folder / data.source, data.columns.names, strict)
        return rows_of(raw, data.columns, strict=strict)
    except BadValue as problem:
        raise BadValue(f"{_name(data)}: {problem}") from None


def _name(data: SiteData) -> str:
    return data.source or "data.query"


def _unless_url(value: str) -> str:
    """A value for a message: a URL may hold a password."""
    return "a URL" if "://" in value else repr(value)


def _loaded(path: Path, columns: Sequence[str], strict: bool) -> pd.DataFrame:
    if not path.is_file():
        raise BadValue(f"no such file in {path.parent.absolute()}")
    return load_columns(path, columns, strict=strict)


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


def _asked(data: SiteData, folder: Path) -> pd.DataFrame:
    """The columns of the query's result, cells as the driver gives them."""
    names, rows = _fetched(_engine(data.database_env, folder), data.query, data.database_env)
    return columns_of(names, rows, data.columns.names)


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
        options["creator"] = lambda: sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
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
            result = connection.execution_options(no_parameters=True).exec_driver_sql(query)
            return list(result.keys()), result.all()
    except Exception as failure:
        cause = getattr(failure, "orig", None) or failure
        said = _why_failed(cause) if connected else _why_unreachable(cause)
    if not connected:
        raise BadValue(f"the database that {env} names cannot be opened: {said}")
    raise BadValue(f"the database refuses it: {said}")


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
