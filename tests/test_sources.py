"""A site's own rows: the same from every source, in their order, and refused in one line that holds no password."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import postgres
import psycopg
import pytest

from fedsynth.corpus import Corpus, Provenance
from fedsynth.data import Site
from fedsynth.privacy.noise import data_mac
from fedsynth.scenario import TestRows
from fedsynth.sources import SiteData, _engine, check, read
from fedsynth.typed import BadValue, build

TestRows.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it

NOTES = [  # id, person, text, label, part; one has no text
    (1, 7, "cough and fever", "flu", "train"),
    (2, 3, "wheeze at night", "asthma", "train"),
    (3, 7, "fever is gone", "flu", "train"),
    (4, 9, None, "asthma", "train"),
    (5, 4, "rash on the arm", "eczema", "test"),
    (6, 5, 'café, 100% "sure"; it\'s\nnew :here', "asthma", "train"),
]
COLUMNS = ("id", "person", "text", "label", "part")
TRAIN = Corpus(
    ("cough and fever", "wheeze at night", "fever is gone", 'café, 100% "sure"; it\'s\nnew :here'),
    ("flu", "asthma", "flu", "asthma"),
    Provenance.PRIVATE,
    units=("7", "3", "7", "5"),
)
TEST = Corpus(("rash on the arm",), ("eczema",), Provenance.PRIVATE, units=("4",))
LABELS = ("asthma", "eczema", "flu")
QUERY = "SELECT * FROM notes ORDER BY id"
KEY = bytes(32)
PAGE = Path(__file__).parent.parent / "docs" / "deployment" / "data.md"


def site(**more: Any) -> SiteData:
    known: dict[str, Any] = {"id": "notes", "records": 3, "labels": LABELS}
    if not more.keys() & {"person", "independent_rows"}:
        known["person"] = "person"
    if "query" in more:
        known["database_env"] = "NOTES_DB"
    elif "source" not in more:
        known["source"] = "notes.csv"
    return SiteData(**{**known, **more})


def said(data: SiteData, folder: Path, step: Any = read) -> str:
    with pytest.raises(BadValue) as caught:
        step(data, folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def lines(folder: Path, *rows: dict[str, Any]) -> SiteData:
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return site(source="notes.jsonl")


def fill_sqlite(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (id INTEGER, person INTEGER, text TEXT, label TEXT, part TEXT)")
        connection.executemany("INSERT INTO notes VALUES (?, ?, ?, ?, ?)", NOTES[::-1])
    connection.close()


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.served() as server:
        server.run(
            "CREATE TABLE notes (id integer, person integer, text text, label varchar(20), part text)",
            "CREATE TABLE odd (id integer, text text, label text, image bytea, parts text[], amount numeric, day date)",
            "INSERT INTO odd VALUES (1, 'twelve', 'x', '\\x00ff', '{a,b}', 1.5, '2024-05-01')",
            "CREATE FUNCTION wipe() RETURNS integer LANGUAGE plpgsql AS 'BEGIN DELETE FROM notes; RETURN 1; END'",
        )
        with psycopg.connect(host=str(server.folder), user="owner", password=postgres.PASSWORD, dbname="postgres") as c:
            c.cursor().executemany("INSERT INTO notes VALUES (%s, %s, %s, %s, %s)", NOTES[::-1])
        yield server


@pytest.fixture
def database(server: postgres.Server, monkeypatch: pytest.MonkeyPatch) -> postgres.Server:
    monkeypatch.setenv("NOTES_DB", server.url())
    return server


@pytest.fixture
def file_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fill_sqlite(tmp_path / "notes.db")
    monkeypatch.setenv("NOTES_DB", "sqlite:///notes.db")
    return tmp_path


# --- What is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "sqlite", "postgresql"])
def test_the_same_rows_are_the_same_corpus_from_every_source(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    frame = pd.DataFrame(NOTES, columns=list(COLUMNS))
    place: dict[str, str] = {"source": f"notes.{kind}"}
    if kind == "csv":
        frame.to_csv(tmp_path / "notes.csv", index=False)
    elif kind == "jsonl":
        lines(tmp_path, *(dict(zip(COLUMNS, row, strict=True)) for row in NOTES))
    elif kind == "parquet":
        frame.to_parquet(tmp_path / "notes.parquet")
    else:
        place = {"query": QUERY}
        if kind == "sqlite":
            fill_sqlite(tmp_path / "notes.db")
        url = "sqlite:///notes.db" if kind == "sqlite" else request.getfixturevalue("server").url()
        monkeypatch.setenv("NOTES_DB", url)
    found = read(site(**place, test=TestRows("part", "test")), tmp_path)
    assert found == Site(TRAIN, TEST)
    assert data_mac(KEY, found.train) == data_mac(KEY, TRAIN)
    assert data_mac(KEY, found.train) != data_mac(KEY, TRAIN.take([1, 0, 2, 3]))  # the order counts


def test_rows_have_the_order_that_the_query_says(database: postgres.Server, tmp_path: Path) -> None:
    back = site(query="SELECT * FROM notes ORDER BY id DESC", test=TestRows("part", "test"))
    assert read(back, tmp_path).train == TRAIN.take([3, 2, 1, 0])


def test_independent_rows_are_units_of_their_own_and_without_test_rows_all_are_to_train_on(file_database: Path) -> None:
    found = read(site(query=QUERY, independent_rows=True), file_database)
    assert found.train.units == (0, 1, 2, 3, 4)  # the row without text is none
    assert found.test == Corpus((), (), Provenance.PRIVATE, units=())


def test_a_response_is_an_answer_of_instructions(tmp_path: Path) -> None:
    lines(tmp_path, {"text": "what helps?", "response": "rest"}, {"text": "and then?", "response": None})
    data = site(source="notes.jsonl", task="instructions", labels=(), independent_rows=True)
    assert read(data, tmp_path).train.answers == ("rest",)
    assert check(data, tmp_path)[0] == "notes.jsonl: 1 of 2 rows have no text or no response: they are left out"


def test_an_absolute_path_is_read_where_it_is(tmp_path: Path) -> None:
    lines(tmp_path, {"text": "a b", "label": "flu", "person": 1})
    assert read(site(source=str(tmp_path / "notes.jsonl")), tmp_path / "elsewhere").train.prompts == ("a b",)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_query_reaches_the_database_as_it_stands(
    kind: str, file_database: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if kind == "postgresql":
        monkeypatch.setenv("NOTES_DB", request.getfixturevalue("server").url())
    query = """
        WITH sure AS (SELECT * FROM notes WHERE text LIKE '%100\\%%' ESCAPE '\\' OR text = ' :nothing %s')
        SELECT *  -- DELETE nothing; ORDER no one
        FROM sure WHERE text LIKE '%:here' ORDER BY id;
    """
    assert read(site(query=query), file_database).train.units == ("5",)


def test_numbers_and_dates_of_a_database_name_persons(database: postgres.Server, tmp_path: Path) -> None:
    query = "SELECT text, label, {} AS person FROM odd ORDER BY id"
    for column, name in (("amount", "1.5"), ("day", "2024-05-01"), ("id", "1")):
        assert read(site(query=query.format(column)), tmp_path).train.units == (name,)


# --- No single row decides whether there is an answer -----------------------------------------------------------------

WHOLE = {"text": "a b", "label": "flu", "person": "p", "part": "train"}


@pytest.mark.parametrize(
    ("odd", "kept", "refused"),
    [
        ({"text": None}, False, None),
        ({"text": "  "}, False, None),
        ({"label": None}, False, None),
        ({"person": None}, False, "1 rows have no value in column 'person'"),
        ({"text": "a\0b"}, False, "row 2 of column 'text' holds a character that is no text"),
        ({"text": ["a", "b"]}, False, "row 2 of column 'text' holds list values, not text"),
        ({"text": "a" * 1_000_001}, False, "row 2 of column 'text' has 1000001 characters"),
        ({"person": {"name": "x"}}, False, "row 2 of column 'person' holds dict values"),
        ({"label": "\ud800"}, False, "row 2 of column 'label' holds a character"),
        ({"text": 12}, True, None),
        ({"label": "Flu "}, True, "labels differ only in case, blanks or what cannot be seen: 'Flu\\u0020' and 'flu'"),
        ({"label": "cholera"}, True, None),
    ],
)
def test_an_odd_row_stops_no_reading_and_changes_no_other(
    tmp_path: Path, odd: dict[str, Any], kept: bool, refused: str | None
) -> None:
    data = lines(tmp_path, WHOLE, {**WHOLE, **odd}, {**WHOLE, "text": "c d"})
    train = read(data, tmp_path).train
    assert [(train.prompts[i], train.answers[i]) for i in (0, -1)] == [("a b", "flu"), ("c d", "flu")]
    assert len(train) == 2 + kept
    if refused is None:
        check(data, tmp_path)
    else:
        assert refused in said(data, tmp_path, check)


@pytest.mark.parametrize(("part", "wrong"), [("test", "1 values of the unit column"), ("train", "no row has 'test'")])
def test_test_rows_stop_no_reading_either(tmp_path: Path, part: str, wrong: str) -> None:
    lines(tmp_path, WHOLE, {**WHOLE, "text": "c d", "part": part})
    data = site(source="notes.jsonl", test=TestRows("part", "test"))
    assert read(data, tmp_path).train.prompts[0] == "a b"
    assert wrong in said(data, tmp_path, check)


def test_the_real_number_changes_no_declared_one(tmp_path: Path) -> None:
    few = lines(tmp_path, WHOLE)
    many = lines(tmp_path, *({**WHOLE, "person": n} for n in range(9)))
    assert (few.records, few.unit_name) == (many.records, many.unit_name) == (3, "person")
    assert len(read(many, tmp_path).train) == 9  # which of them take part says fedsynth.examples


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("text,label,who\na,flu,p\n", "notes.csv: no column 'person'; it has text, label, who"),
        ("text,label,person\n1.5,flu,p\n2,flu,q\n", "notes.csv: column 'text' holds numbers, not text: name the"),
        ("text,label,person\n,flu,p\na,,q\n", "notes.csv: no row has both 'text' and 'label' (it has 2 rows)"),
        ("", "notes.csv: cannot be read: it is empty"),
        (b"text,label,person\ncaf\xe9,flu,p\n", "byte 0xe9 in line 2 is not UTF-8"),
        (None, "notes.csv: no such file in "),
    ],
)
def test_a_file_that_is_not_what_was_declared_is_refused(tmp_path: Path, content: Any, wrong: str) -> None:
    if content is not None:
        (tmp_path / "notes.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    for step in (read, check):
        assert wrong in said(site(), tmp_path, step)


@pytest.mark.parametrize(
    ("column", "wrong"),
    [
        ("image", "row 1 of column 'text' holds bytes values, not text"),
        ("parts", "row 1 of column 'text' holds list values, not text"),
        ("amount", "column 'text' holds numbers, not text"),
        ("day", "column 'text' holds date values, not text"),
    ],
)
def test_a_column_of_a_database_that_is_no_text_is_refused(
    database: postgres.Server, tmp_path: Path, column: str, wrong: str
) -> None:
    data = site(query=f"SELECT {column} AS text, label, id AS person FROM odd ORDER BY id")
    assert f"data.query: {wrong}" in said(data, tmp_path, check)
    said(data, tmp_path)


ONE = {"source": "notes.csv", "person": "person"}


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"id": "my notes"}, "data.id must be letters, digits, '.', '_' and '-', as notes-2024, got 'my notes'"),
        ({"id": "../notes"}, "data.id must be"),
        ({"records": 0}, "data.records must be at least 1, got 0"),
        ({"source": ""}, "data needs a source (a file) or a query (to a database), got none"),
        ({"query": QUERY, "database_env": "NOTES_DB"}, "data needs a source (a file) or a query (to a database), not"),
        ({"source": "notes.xlsx"}, "data.source must name a .csv, .jsonl, .parquet file, got 'notes.xlsx'"),
        ({"source": "hf:notes"}, "data.source must name a .csv, .jsonl, .parquet file, got 'hf:notes'"),
        ({"database_env": "NOTES_DB"}, "data.database_env belongs to a query"),
        ({"source": "", "query": QUERY}, "data.database_env must name the environment variable"),
        ({"person": None}, 'data must say whose rows these are: person = "COLUMN" protects a person with all of their'),
        ({"independent_rows": True}, "data.person and independent_rows = true exclude each other"),
        ({"labels": ()}, "data.labels is missing: list the classes"),
        ({"labels": ("flu", "flu")}, "data.labels holds a class twice: ['flu', 'flu']"),
        ({"labels": ("flu", "Flu ")}, "differ only in case, blanks or what cannot be seen: 'Flu\\u0020' and 'flu'"),
        ({"labels": ("flu", " ")}, "data.labels holds an empty name (' ')"),
        ({"task": "instructions"}, "data.labels belongs to task"),
        ({"task": "instructions", "labels": (), "label": "kind"}, "data.label is the column of task"),
        ({"response": "answer"}, "data.response is the column of task"),
        ({"text": "label"}, "data.text and data.label both name the column 'label'"),
        ({"person": ""}, "data.person is empty: name a column"),
    ],
)  # fmt: skip
def test_what_a_site_declares_is_checked_before_anything_is_read(more: dict[str, Any], wrong: str) -> None:
    with pytest.raises(BadValue, match=re.escape(wrong)):
        SiteData(**{"id": "notes", "records": 3, "labels": LABELS, **ONE, **more})


def test_a_site_declares_its_data_in_toml() -> None:
    table = tomllib.loads("""
        id = "notes-2024"
        query = '''
        SELECT * FROM notes ORDER BY id'''
        database_env = "NOTES_DB"
        independent_rows = true
        records = 1200
        labels = ["asthma", "flu"]
        test = { column = "part", equals = "test" }
    """)
    data = build(SiteData, table, "data")
    assert (data.records, data.unit_name, data.test) == (1200, "row", TestRows("part", "test"))
    with pytest.raises(BadValue, match=r"key 'data\.records' is missing"):
        build(SiteData, {"id": "notes"}, "data")


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("SELECT * FROM notes", "data.query has no ORDER BY of its own (one in brackets does not count)"),
        ("SELECT * FROM (SELECT * FROM notes ORDER BY id) AS n", "has no ORDER BY of its own"),
        ("SELECT text, rank() OVER (ORDER BY id) FROM notes", "has no ORDER BY of its own"),
        ("SELECT * FROM notes -- ORDER BY id", "has no ORDER BY of its own"),
        ("SELECT 'x ORDER BY id' FROM notes", "has no ORDER BY of its own"),
        ('SELECT "ORDER" BY FROM notes', "has no ORDER BY of its own"),
        ("DELETE FROM notes", "data.query must be one SELECT (or WITH ... SELECT): it only reads"),
        ("/* SELECT */ DROP TABLE notes", "must be one SELECT"),
        ("notes", "must be one SELECT"),
        ("SELECT * FROM notes ORDER BY id; DROP TABLE notes", "must be one statement, got several"),
        ("WITH gone AS (delete FROM notes RETURNING *) SELECT * FROM gone ORDER BY id", "it has the word DELETE"),
        ("SELECT * INTO copy FROM notes ORDER BY id", "it has the word INTO"),
        ("SELECT * FROM notes ORDER BY id FOR UPDATE", "it has the word UPDATE"),
        ("SELECT 'it FROM notes ORDER BY id", "has a quote that never closes"),
    ],
)
def test_a_query_is_one_ordered_select(query: str, wrong: str) -> None:
    with pytest.raises(BadValue, match=re.escape(wrong)):
        site(query=query)


@pytest.mark.parametrize(
    "query",
    [
        "select * from notes order by id;",
        "WITH n AS (SELECT * FROM notes) SELECT * FROM n ORDER  BY id LIMIT 5",
        'SELECT "update", `into`, $$DELETE ;$$, $a$ ( $a$ FROM notes ORDER/* by */ BY id',
        "SELECT a FROM x UNION SELECT deleted FROM y ORDER BY 1",
    ],
)
def test_what_stands_in_quotes_or_comments_is_no_statement(query: str) -> None:
    assert site(query=query).query == query


# --- Databases --------------------------------------------------------------------------------------------------------


def test_postgresql_is_opened_read_only(database: postgres.Server, tmp_path: Path) -> None:
    wrong = said(site(query="SELECT *, wipe() FROM notes ORDER BY id"), tmp_path)
    assert wrong == "data.query: the database refuses it: cannot execute DELETE in a read-only transaction"
    assert database.run("SELECT count(*) FROM notes") == [(6,)]
    with _engine("NOTES_DB", tmp_path).connect() as door:  # the reader's own, without the look at the statement
        for statement in ("INSERT INTO notes VALUES (7)", "DROP TABLE notes", "CREATE TABLE more (id integer)"):
            with pytest.raises(Exception, match="read-only transaction"):
                door.exec_driver_sql(statement)
            door.rollback()


def test_sqlite_is_opened_read_only_and_no_file_is_made(file_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _engine("NOTES_DB", file_database).connect() as door:
        for statement in ("DELETE FROM notes", "DROP TABLE notes", "CREATE TABLE more (id integer)"):
            with pytest.raises(Exception, match="attempt to write a readonly database"):
                door.exec_driver_sql(statement)
    monkeypatch.setenv("NOTES_DB", "sqlite:///other.db")
    assert "NOTES_DB names no SQLite file that is there" in said(site(query=QUERY), file_database)
    assert not (file_database / "other.db").exists()


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        (None, "the environment variable NOTES_DB of data.database_env is not set"),
        ("", "the environment variable NOTES_DB of data.database_env is not set"),
        ("hunter2", "what NOTES_DB holds is no URL of a database"),
        ("sqlite://", "NOTES_DB names no SQLite file"),
        ("sqlite:///:memory:", "NOTES_DB names no SQLite file"),
        ("hunter2://user:hunter2@host/notes", "what NOTES_DB holds names no kind of database that SQLAlchemy knows"),
        ("postgresql://user:hunter2@127.0.0.1:1/notes", "cannot be opened: nothing listens there; is the server up?"),
        ("postgresql://user:hunter2@127.0.0.1:hunter2/notes", "what NOTES_DB holds is no URL of a database"),
        ("postgresql://user:p@hunter2@hunter2.invalid/notes", "cannot be opened: no host of that name"),
        ("postgresql://user:hunter2@/notes?hunter2=1", "cannot be opened: ProgrammingError"),
    ],
)
def test_a_database_that_cannot_be_reached_is_named_by_its_variable(
    url: str | None, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if url is None:
        monkeypatch.delenv("NOTES_DB", raising=False)
    else:
        monkeypatch.setenv("NOTES_DB", url)
    for step in (read, check):
        found = said(site(query=QUERY), tmp_path, step)
        assert wrong in found
        assert "hunter2" not in found


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ({"password": "hunter2"}, "it takes neither this user nor this password"),
        ({"user": "nobody", "password": "hunter2"}, "it takes neither this user nor this password"),
        ({"database": "hunter2"}, "it has no database or user of that name"),
    ],
)
def test_a_server_that_lets_nobody_in_says_why(
    server: postgres.Server, url: dict[str, str], wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTES_DB", server.url(**url))
    found = said(site(query=QUERY), tmp_path)
    assert found == f"data.query: the database that NOTES_DB names cannot be opened: {wrong}"


@pytest.mark.parametrize("name", ["psycopg", "MySQLdb"])
def test_a_missing_driver_is_named_with_the_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    scheme = {"psycopg": "postgresql", "MySQLdb": "mysql"}[name]
    monkeypatch.setenv("NOTES_DB", f"{scheme}://user:hunter2@127.0.0.1/notes")
    found = said(site(query=QUERY), tmp_path)
    assert f"needs a driver that is not installed ({name})" in found
    assert 'pip install "fedsynth[sql]"' in found
    assert "hunter2" not in found


def texts_of(problem: BaseException | None) -> Iterator[str]:
    """All that a log of the exception could say."""
    while problem is not None:
        yield f"{problem} {problem!r} {problem.args}"
        yield from texts_of(problem.__cause__)
        problem = problem.__context__


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:hunter2@127.0.0.1:1/notes",
        "postgresql://user:hunter2@127.0.0.1:hunter2/notes",
        "postgresql://user:p@hunter2@hunter2.invalid/notes",
        "hunter2://user:hunter2@host",
        "hunter2",
    ],
)
def test_no_password_is_in_any_exception_or_repr(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTES_DB", url)
    data = site(query=QUERY)
    with pytest.raises(BadValue) as caught:
        read(data, tmp_path)
    assert "hunter2" not in " ".join(texts_of(caught.value))
    assert "hunter2" not in repr(data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"query": QUERY, "database_env": "postgresql://user:hunter2@host/notes"},
        {"query": "postgresql://user:hunter2@host/notes", "database_env": "NOTES_DB"},
        {"source": "postgresql://user:hunter2@host/notes"},
        {"source": "postgresql://user:hunter2@host/notes.csv"},
        {"source": "notes.csv", "id": "postgresql://user:hunter2@host/notes"},
        {"query": QUERY, "database": "postgresql://user:hunter2@host/notes"},
    ],
)
def test_a_url_in_the_wrong_place_is_refused_without_being_repeated(wrong: dict[str, Any]) -> None:
    table = {"id": "notes", "records": 3, "labels": list(LABELS), "person": "person", **wrong}
    with pytest.raises(BadValue) as caught:
        build(SiteData, table, "data")
    assert "hunter2" not in " ".join(texts_of(caught.value))


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("SELECT * FROM nowhere ORDER BY id", 'relation "nowhere" does not exist'),
        ("SELECT nothing FROM notes ORDER BY id", 'column "nothing" does not exist'),
        ("SELECT text FROM notes ORDER BY id, ", "syntax error at end of input"),
        # What the server says of these repeats a note.
        ("SELECT text::integer AS text FROM notes ORDER BY id", "InvalidTextRepresentation 22P02"),
        ("SELECT text::date AS text FROM notes ORDER BY id", "InvalidDatetimeFormat 22007"),
    ],
)
def test_what_the_server_says_of_a_query_is_told_unless_it_holds_a_value(
    database: postgres.Server, tmp_path: Path, query: str, wrong: str
) -> None:
    assert said(site(query=query), tmp_path) == f"data.query: the database refuses it: {wrong}"


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("SELECT * FROM nowhere ORDER BY id", "the database refuses it: no such table: nowhere"),
        ("SELECT CAST(x'6e6f746573ff' AS TEXT) AS text FROM notes ORDER BY id", "the database refuses it: Operational"),
        ("SELECT text, label FROM notes ORDER BY id", "no column 'person'; it has text, label"),
        ("SELECT text, label, text, person FROM notes ORDER BY id", "the column 'text' stands there twice"),
        ("SELECT * FROM notes WHERE id > 9 ORDER BY id", "no row has both 'text' and 'label' (it has 0 rows)"),
    ],
)
def test_a_query_that_gives_other_columns_is_refused(file_database: Path, query: str, wrong: str) -> None:
    found = said(site(query=query), file_database)
    assert found.startswith(f"data.query: {wrong}")
    assert "notes\\xff" not in found


# --- What a site is told ----------------------------------------------------------------------------------------------


def test_data_that_fit_give_no_warning(file_database: Path) -> None:
    query = "SELECT * FROM notes WHERE text IS NOT NULL ORDER BY id"
    assert (
        check(site(query=query, test=TestRows("part", "test"), labels=("asthma", "eczema", "flu")), file_database) == []
    )


def test_a_site_is_told_what_does_not_fit(tmp_path: Path) -> None:
    rows = [{**WHOLE, "text": f"note {n}", "person": "unknown"} for n in range(50)]
    rows += [{**WHOLE, "text": f"other {n}", "person": f"p{n}"} for n in range(3)]
    rows += [{**WHOLE, "text": "Note  3", "person": "p4"}, {**WHOLE, "text": "note 7", "person": "t", "part": "test"}]
    rows += [{**WHOLE, "text": None}, {**WHOLE, "text": "by sea", "label": "cholera", "person": "p5"}]
    lines(tmp_path, *rows)
    data = site(source="notes.jsonl", labels=("flu", "asthma"), records=5, test=TestRows("part", "test"))
    assert check(data, tmp_path) == [
        "notes.jsonl: 1 of 57 rows have no text or no label: they are left out",
        "1 rows have a label that data.labels lacks ('cholera' 1): they count as records, and nothing is learnt from "
        "them",
        "no row has the label 'asthma' of data.labels",
        "the training text has 6 values of 'person', declared are 5 (data.records): only the first 5 take part",
        "one of the values of 'person' has 50 of 55 training rows, half of them have at most 1: is it a person, or "
        "does it stand for unknown ones?",
        "1 training rows repeat the text of another one: if they are of one person, give them one value in a column of "
        "persons, or leave them out",
        "1 texts are training text and test text: measured on them, a model looks too good",
    ]


def test_too_few_records_are_filled_with_empty_ones(tmp_path: Path) -> None:
    data = site(source=lines(tmp_path, WHOLE).source, labels=("flu",), records=10)
    assert check(data, tmp_path) == [
        "the training text has 1 values of 'person', declared are 10 (data.records): those that are missing count as "
        "empty ones"
    ]


def test_a_query_that_gives_its_rows_in_any_order_is_refused(file_database: Path, database: postgres.Server) -> None:
    table = "FROM notes, generate_series(1, 20) AS copies"
    wrong = said(site(query=f"SELECT text, label, person {table} ORDER BY random()"), file_database, check)
    assert wrong.startswith("data.query gave other rows when it was asked again, and other rows are charged again")


def test_a_postgresql_is_missed_loudly_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("pathlib.Path.glob", lambda self, pattern: iter(()))
    monkeypatch.delenv(postgres.REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="on Debian the package postgresql"), postgres.served():
        pass
    monkeypatch.setenv(postgres.REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="FEDSYNTH_REQUIRE_POSTGRES is set"), postgres.served():
        pass


@pytest.mark.parametrize("block", re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))
def test_the_tables_of_the_docs_are_taken(block: str) -> None:
    data = build(SiteData, tomllib.loads(block)["data"], "data")
    assert (data.records, data.unit_name, data.columns.answer) == (1200, "patient", "diagnosis")
