"""One ordered SELECT put to a database that is only read; messages hold no piece of its URL or of a row."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsynth.data.rowwise import tried
from fedsynth.typed import BadValue

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine

WRITES = {"INSERT", "UPDATE", "DELETE", "MERGE", "INTO"}  # of these, SQL allows some within a SELECT or WITH
PATIENCE = 10  # seconds to wait for a database to answer

_SQL = re.compile(
    r"""--[^\n]* | /\*.*?\*/                                          # comments
    | '(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | (\$\w*\$).*?\1    # texts, and names in quotes
    | (?P<word>[^\W\d][\w$]*) | (?P<sign>[();'"`])""",
    re.VERBOSE | re.DOTALL,
)


def not_read_only(query: str) -> str:
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


def fetched(query: str, env: str, folder: Path) -> tuple[list[str], Sequence[Sequence[object]]]:
    """Names of columns, and rows with cells as the driver gives them.

    Args:
        query: The SELECT.
        env: Environment variable that holds the database's URL.
        folder: Where the path of an SQLite file begins.

    Raises:
        BadValue: Without what the driver says where that may hold a piece of the URL or of a row.
    """
    engine = _engine(env, folder)
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
    """The fault of a statement. An error about a value gives its name alone, because the value may be a row's."""
    state = getattr(cause, "sqlstate", None) or ""
    # Of PostgreSQL, a transaction that only reads (25) or a wrong statement (42); of SQLite, what it says itself.
    if state[:2] in ("25", "42") or hasattr(cause, "sqlite_errorname"):
        said = getattr(getattr(cause, "diag", None), "message_primary", None) or str(cause)
        return " ".join(said.split())[:300]
    return f"{type(cause).__name__} {state}".strip()
