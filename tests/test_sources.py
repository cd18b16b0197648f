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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.database import _engine
from fedsynth.data.findings import misread, warnings
from fedsynth.data.partition import ClientData
from fedsynth.data.sources import SiteData, gathered, laid_out
from fedsynth.privacy.noise import data_mac
from fedsynth.scenario.data import TestRows
from fedsynth.training.examples import unit_rows
from fedsynth.typed import BadValue, build

TestRows.__test__ = False  # pytest would collect it

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
    ("cough and fever", "wheeze at night", "fever is gone", "", 'café, 100% "sure"; it\'s\nnew :here'),
    ("flu", "asthma", "flu", "", "asthma"),
    Provenance.PRIVATE,
    units=("7", "3", "7", "9", "5"),
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


def read(data: SiteData, folder: Path) -> ClientData:
    """What requests of a site work with."""
    return laid_out(gathered(data, folder).records, data)


def check(data: SiteData, folder: Path) -> list[str]:
    """What a site is told."""
    return warnings(data, gathered(data, folder))


def said(data: SiteData, folder: Path) -> str:
    with pytest.raises(BadValue) as caught:
        gathered(data, folder)
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
    assert found == ClientData(TRAIN, TEST)
    assert data_mac(KEY, found.train) == data_mac(KEY, TRAIN)
    assert data_mac(KEY, found.train) != data_mac(KEY, TRAIN.take([1, 0, 2, 3, 4]))  # the order counts


def test_rows_have_the_order_that_the_query_says(database: postgres.Server, tmp_path: Path) -> None:
    back = site(query="SELECT * FROM notes ORDER BY id DESC", test=TestRows("part", "test"))
    assert read(back, tmp_path).train == TRAIN.take([4, 3, 2, 1, 0])


def test_independent_rows_are_units_of_their_own_and_without_test_rows_all_are_to_train_on(file_database: Path) -> None:
    found = read(site(query=QUERY, independent_rows=True), file_database)
    assert found.train.units == (0, 1, 2, 3, 4, 5)
    assert [not text for text in found.train.prompts] == [False, False, False, True, False, False]  # in its place
    assert found.test == Corpus((), (), Provenance.PRIVATE, units=())


def test_a_response_is_an_answer_of_instructions(tmp_path: Path) -> None:
    lines(tmp_path, {"text": "what helps?", "response": "rest"}, {"text": "and then?", "response": None})
    data = site(source="notes.jsonl", task="instructions", labels=(), independent_rows=True)
    assert read(data, tmp_path).train.answers == ("rest", "")
    assert check(data, tmp_path)[0] == (
        "notes.jsonl: 1 of 2 rows lack a text, response or person and are empty ones: line 2 (no 'response')"
    )


def test_a_pair_is_one_text_and_half_of_one_an_empty_slot_in_its_place(tmp_path: Path) -> None:
    rows = [("It rains.", "It is wet.", "p1"), ("It rains.", None, "p2"), (7, "{first}", "p3")]
    whole = [{"a": a, "b": b, "label": "flu", "person": person} for a, b, person in rows]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    data = site(source="notes.jsonl", text=("a", "b"))
    train = read(data, tmp_path).train
    assert (train.prompts, train.units) == (("It rains. | It is wet.", "", "7 | {first}"), ("p1", "p2", "p3"))
    assert [row for row, _ in gathered(data, tmp_path).incomplete] == [2]
    assert "line 2 (no 'b')" in " ".join(check(data, tmp_path))
    own = site(source="notes.jsonl", text=("a", "b"), pair="{second} <- {first}")
    assert read(own, tmp_path).train.prompts == ("It is wet. <- It rains.", "", "{first} <- 7")
    assert own.digest != data.digest
    (tmp_path / "notes.csv").write_text("a,b,label,person\n1,2,flu,p\n")
    assert said(site(text=("a", "c")), tmp_path).startswith("notes.csv: no column 'c'; it has 'a', 'b'")


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


# --- No single row decides anything about another ---------------------------------------------------------------------

DEEP = b"[" * 10_000 + b"]" * 10_000
WHOLE = {"text": "a b", "label": "flu", "person": "p", "part": "train"}
PERSONS = ("p1", "p2", "p1", "p3", "p4")
HEADER = b"text,label,person\n"


def line(row: int, kind: str, **odd: Any) -> bytes:
    """A row of a small table; the person stands before what is damaged."""
    cells = {"person": PERSONS[row], "text": f"note {row}", "label": LABELS[row % 3], **odd}
    if kind == "jsonl":
        return json.dumps(cells).encode()
    return f"{cells['text']},{cells['label']},{cells['person']}".encode()


def cell(column: str, raw: bytes) -> Any:
    """Damage: bytes in the place of a cell."""
    return lambda row, kind: line(row, kind, **{column: "@"}).replace(b'"@"' if kind == "jsonl" else b"@", raw)


BOTH: dict[str, Any] = {
    "a byte that is no UTF-8": lambda row, kind: line(row, kind).replace(b"note", b"n\xffte"),
    "no UTF-8 in the label": lambda row, kind: line(row, kind, label="@").replace(b"@", b"fl\xe9"),
    "a NUL": lambda row, kind: line(row, kind).replace(b"note", b"n\0te"),
    "half a character": lambda row, kind: line(row, kind).replace(b"note", b"\xed\xa0\x80"),
    "an empty text": lambda row, kind: line(row, kind, text=""),
    "a blank text": lambda row, kind: line(row, kind, text=" \u200b"),
    "a text that nobody sees": lambda row, kind: line(row, kind, text="\ufe0f\u2800\u3164"),
    "no label": lambda row, kind: line(row, kind, label=""),
    "a label that is not listed": lambda row, kind: line(row, kind, label="cholera"),
    "a blank person": lambda row, kind: line(row, kind, person=" "),
    "a person that is no UTF-8": lambda row, kind: line(row, kind, person="@").replace(b"@", b"M\xfcller"),
    "a number of 5,000 digits": lambda row, kind: (
        line(row, kind, text="@").replace(b'"@"', b"9" * 5000).replace(b"@", b"9" * 5000)
    ),
    "a cell that is too long": lambda row, kind: line(row, kind, text="a" * 1_000_001),
    "a blank line": lambda row, kind: b" ",
    "binary": lambda row, kind: bytes(range(11, 200)).replace(b"\r", b""),
}
CSV: dict[str, Any] = {
    "a field too many": lambda row, kind: line(row, kind, label="flu,mild"),
    "a field too few": lambda row, kind: b"note",
    "a quote that opens": lambda row, kind: b'"' + line(row, kind),
    "a quote that opens, and a comma": lambda row, kind: b'"so, ' + line(row, kind),
    "a quote within": lambda row, kind: line(row, kind, text='5" tall'),
}
JSON: dict[str, Any] = {
    "no JSON": lambda row, kind: b"note",
    "cut off": lambda row, kind: line(row, kind)[:-4],
    "no object": lambda row, kind: b'["note"]',
    "nested deeply": cell("text", DEEP),
    "nested deeply and never closed": cell("text", DEEP[:10_000]),
    "a table as text": cell("text", b'{"a": 1}'),
    "a list as label": cell("label", b'["flu"]'),
    "a number as label": cell("label", b"3.5"),
    "true as text": cell("text", b"true"),
    "null": cell("text", b"null"),
    "half a pair": cell("text", b'"\\ud800"'),
    "no number": cell("text", b"1e999999999"),
    "not a number": cell("text", b"NaN"),
    "twice": lambda row, kind: line(row, kind)[:-1] + b', "text": "other"}',
    "an unknown escape": cell("text", b'"\\q"'),
}
DAMAGE = [("csv", name, make) for name, make in {**BOTH, **CSV}.items()]
DAMAGE += [("jsonl", name, make) for name, make in {**BOTH, **JSON}.items()]


def table(folder: Path, kind: str, damage: Any = None, at: int = -1) -> None:
    rows = [damage(row, kind) if row == at else line(row, kind) for row in range(len(PERSONS))]
    (folder / f"notes.{kind}").write_bytes((HEADER if kind == "csv" else b"") + b"\n".join(rows) + b"\n")


def by_unit(data: SiteData, folder: Path) -> dict[Any, list[tuple[str, str]]]:
    """What is learnt of each unit that takes part, as training would see it."""
    train = read(data, folder).train
    assert train.units is not None
    taking = [rows for rows in unit_rows(train, data.records, rows_per_unit=2) if rows]
    return {train.units[rows[0]]: [(train.prompts[r], train.answers[r]) for r in rows] for rows in taking}


@pytest.mark.parametrize(("kind", "damage", "make"), DAMAGE)
def test_no_damage_to_a_row_changes_the_slot_of_another_unit(tmp_path: Path, kind: str, damage: str, make: Any) -> None:
    persons = site(source=f"notes.{kind}", records=4)  # no more and no fewer than there are
    rows = site(source=f"notes.{kind}", independent_rows=True, records=4)  # one fewer: none may move up
    table(tmp_path, kind)
    whole = by_unit(persons, tmp_path)
    assert {unit: len(found) for unit, found in whole.items()} == {"p1": 2, "p2": 1, "p3": 1, "p4": 1}
    alone = unit_rows(read(rows, tmp_path).train, rows.records)
    assert alone == [[0], [1], [2], [3]]
    for at, person in enumerate(PERSONS):
        table(tmp_path, kind, make, at)
        found = by_unit(persons, tmp_path)
        others = [{unit: each for unit, each in known.items() if unit != person} for known in (found, whole)]
        assert others[0] == others[1]
        train = read(rows, tmp_path).train
        slots = unit_rows(train, rows.records)
        if damage != "a blank line":  # which a file may hold anywhere, and which is no row
            assert len(train) == len(PERSONS)
            assert [slot for place, slot in enumerate(slots) if place != at] == [[n] for n in range(4) if n != at]
            assert slots[at : at + 1] in ([[]], [[at]], [])  # empty, or itself; nobody else
        gathered(persons, tmp_path)  # nothing is refused
        warnings(persons, gathered(persons, tmp_path))


@pytest.mark.parametrize(("kind", "damage", "make"), DAMAGE)
@pytest.mark.parametrize("whose", [{"person": "person"}, {"independent_rows": True}])
def test_no_damage_to_a_test_row_takes_a_place_from_a_row_to_learn_from(
    tmp_path: Path, kind: str, damage: str, make: Any, whose: dict[str, Any]
) -> None:
    """Four rows to learn from, as many as declared, of four persons; one to test on, which is damaged."""
    parts = ["train", "train", "test", "train", "train"]

    def lay(at: int = -1) -> list[str]:
        rows = [make(row, kind) if row == at else line(row, kind) for row in range(5)]
        if kind == "csv":
            content = [
                HEADER.replace(b"\n", b",part"),
                *(b"%s,%s" % (row, part.encode()) for row, part in zip(rows, parts, strict=True)),
            ]
        else:
            content = [
                row.replace(b"{", b'{"part": "%s", ' % part.encode(), 1) for row, part in zip(rows, parts, strict=True)
            ]
        (tmp_path / f"notes.{kind}").write_bytes(b"\n".join(content) + b"\n")
        train = read(site(source=f"notes.{kind}", records=4, test=TestRows("part", "test"), **whose), tmp_path).train
        return [train.prompts[rows[0]] for rows in unit_rows(train, 4) if rows]

    notes = [f"note {row}" for row in (0, 1, 3, 4)]
    assert lay() == notes
    if kind == "jsonl" or damage not in ("a field too few", "a blank line", "binary"):  # then the row has no mark left
        assert lay(2) == notes
    for at in (0, 1, 3, 4):  # nor does a row to learn from take another one with it
        others = [note for note in notes if note != f"note {at}"]
        assert [note for note in lay(at) if note in others] == others


@pytest.mark.parametrize(("kind", "damage", "make"), DAMAGE)
def test_a_source_of_damaged_rows_alone_is_a_source_of_empty_slots(
    tmp_path: Path, kind: str, damage: str, make: Any
) -> None:
    (tmp_path / f"notes.{kind}").write_bytes(
        (HEADER if kind == "csv" else b"") + b"\n".join(make(n, kind) for n in [0, 1])
    )
    for more in ({}, {"independent_rows": True}):
        train = read(site(source=f"notes.{kind}", records=4, **more), tmp_path).train
        assert len(unit_rows(train, 4)) == 4
    assert check(site(source=f"notes.{kind}", records=4), tmp_path)


def test_a_person_keeps_their_place_where_the_first_row_cannot_be_read(tmp_path: Path) -> None:
    table(tmp_path, "jsonl", BOTH["a NUL"], at=0)
    train = read(site(source="notes.jsonl", records=3), tmp_path).train
    assert unit_rows(train, 3, rows_per_unit=2) == [[2], [1], [3]]  # p1 learns the row that is left; p4 stays out


def test_a_row_of_no_known_person_takes_an_empty_place_and_never_a_persons(tmp_path: Path) -> None:
    table(tmp_path, "csv", CSV["a field too many"], at=1)  # p2's only row: whose it is cannot be known
    assert [len(rows) for rows in unit_rows(read(site(records=4), tmp_path).train, 4)] == [1, 0, 1, 1]
    table(tmp_path, "csv", CSV["a field too many"], at=2)  # one of p1's two: all four persons take part as before
    train = read(site(records=4), tmp_path).train
    assert unit_rows(train, 4, rows_per_unit=2) == [[0], [1], [2], [3]]
    assert train.units == ("p1", "p2", "p3", "p4")


def test_many_rows_of_a_person_that_cannot_be_read_push_nobody_out(tmp_path: Path) -> None:
    rows = [line(n, "csv", person="@").replace(b"@", b"M\xfcller") for n in range(3)] + [line(3, "csv"), line(4, "csv")]
    (tmp_path / "notes.csv").write_bytes(HEADER + b"\n".join(rows))
    found = read(site(records=3), tmp_path).train
    assert [[found.prompts[row] for row in rows] for rows in unit_rows(found, 3)] == [[], ["note 3"], ["note 4"]]


def test_one_word_in_a_column_of_numbers_changes_no_other_cell(tmp_path: Path) -> None:
    rows = [{**WHOLE, "text": f"note {n}", "person": n} for n in range(3)]
    for odd in (2, 2.0, "2", "two"):
        lines(tmp_path, *rows[:2], {**rows[2], "person": odd})
        assert read(site(source="notes.jsonl"), tmp_path).train.units == ("0", "1", "two" if odd == "two" else "2")
    for texts in ([1, 2.0, 3.5], [1, 2.0, "a word"]):
        lines(tmp_path, *({**WHOLE, "text": text, "person": n} for n, text in enumerate(texts)))
        assert read(site(source="notes.jsonl"), tmp_path).train.prompts[:2] == ("1", "2")


def test_a_first_row_that_begins_as_another_encoding_would_is_a_bad_row(tmp_path: Path) -> None:
    data, second = site(source="notes.jsonl"), line(1, "jsonl")
    for mark in (b"\xff\xfe", b"\xfe\xff"):
        for first in (mark + line(0, "jsonl"), mark + line(0, "jsonl").decode().encode("utf-16-le"), mark):
            for rest in ([], [b""], [second, b""], [second.replace(b"note", b"n\0te"), line(2, "jsonl"), b""]):
                (tmp_path / "notes.jsonl").write_bytes(b"\n".join([first, *rest]))
                found = gathered(data, tmp_path)
                assert found.damaged[0][0] == 1
                assert [record.unit for record in found.records[1:2]] == (["p2"] if len(rest) > 1 else [])
    for kind in ("utf-16-le", "utf-16-be"):
        for ending in ("", "\n", "\r\n"):
            whole = (
                "\ufeff" + (ending or "\n").join(line(row, "jsonl", text="\u54b3").decode() for row in (0, 1)) + ending
            )
            (tmp_path / "notes.jsonl").write_bytes(whole.encode(kind))
            assert said(data, tmp_path) == "notes.jsonl: cannot be read: its encoding is UTF-16: save it as UTF-8"


@pytest.mark.parametrize("odd", ["test", "train", "", 7, None, ["test"], "\0", "Test "])
def test_a_test_row_is_one_by_its_own_mark(tmp_path: Path, odd: Any) -> None:
    lines(tmp_path, WHOLE, {**WHOLE, "person": "q", "part": odd}, {**WHOLE, "person": "r", "part": "test"})
    data = site(source="notes.jsonl", test=TestRows("part", "test"))
    found = read(data, tmp_path)
    assert found.train.units is not None
    assert found.train.units[0] == "p"
    assert found.test.units == (("q", "r") if odd in ("test", "Test ") else ("r",))
    check(data, tmp_path)


def test_test_rows_that_cannot_be_read_are_left_out_and_learnt_by_nobody(tmp_path: Path) -> None:
    lines(tmp_path, WHOLE, {**WHOLE, "text": "\0", "part": "test"}, {**WHOLE, "text": "c d", "part": "test"})
    found = read(site(source="notes.jsonl", test=TestRows("part", "test")), tmp_path)
    assert (found.train.prompts, found.test.prompts) == (("a b",), ("c d",))


def test_a_parquet_file_is_read_cell_by_cell(tmp_path: Path) -> None:
    texts = pa.array([b"note 0", b"n\xffte", b"note 2"]).cast(pa.binary()).view(pa.string())
    days = pa.array([0, 10**9, 1], pa.int32()).view(pa.date32())  # the second is in a year that Python has not
    columns = {"text": texts, "label": pa.array(["flu", "flu", None]), "person": days}
    pq.write_table(pa.table(columns), tmp_path / "notes.parquet")
    found = gathered(site(source="notes.parquet"), tmp_path)
    assert found.damaged == [(2, "'text' is not UTF-8, 'person' cannot be read")]
    assert found.incomplete == [(3, "no 'label'")]
    assert [record.unit for record in found.records] == ["1970-01-01", None, "1970-01-02"]
    assert [record.text for record in found.records] == ["note 0", "", ""]


def test_a_damaged_page_of_a_parquet_file_loses_its_own_rows(tmp_path: Path) -> None:
    frame = pd.DataFrame([{**WHOLE, "text": f"note {n} {n * 7919}", "person": f"p{n}"} for n in range(6)])
    path = tmp_path / "notes.parquet"
    pq.write_table(pa.Table.from_pandas(frame), path, row_group_size=3, compression="gzip", use_dictionary=False)
    whole = gathered(site(source="notes.parquet"), tmp_path).records
    at = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    raw = bytearray(path.read_bytes())
    raw[at + 40 : at + 50] = bytes(10)
    path.write_bytes(raw)
    found = gathered(site(source="notes.parquet"), tmp_path)
    assert [number for number, _ in found.damaged] == [1, 2, 3]
    assert found.records[3:] == whole[3:]
    assert [record.unit for record in found.records] == [record.unit for record in whole]


def test_a_query_is_read_cell_by_cell(
    database: postgres.Server, file_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTES_DB", database.url())
    day = "CASE WHEN id = 2 THEN 'infinity'::date ELSE DATE '2024-05-01' + id END"  # the first is no date of Python's
    found = gathered(site(query=f"SELECT text, label, {day} AS person FROM notes ORDER BY id"), file_database)
    assert found.damaged == [(2, "'person' cannot be read")]
    assert [record.unit for record in found.records][:3] == ["2024-05-02", None, "2024-05-04"]
    monkeypatch.setenv("NOTES_DB", "sqlite:///notes.db")
    text = "CASE WHEN id = 2 THEN CAST(x'6e6fff' AS TEXT) ELSE text END"
    found = gathered(site(query=f"SELECT {text} AS text, label, person FROM notes ORDER BY id"), file_database)
    assert found.damaged == [(2, "'text' is not UTF-8")]
    assert [record.unit for record in found.records] == ["7", "3", "7", "9", "4", "5"]
    with sqlite3.connect(file_database / "notes.db") as connection:
        connection.execute("UPDATE notes SET text = x'00ff' WHERE id = 1")
    assert (1, "'text' holds bytes values, not text") in gathered(site(query=QUERY), file_database).damaged


def test_a_quote_that_takes_rows_with_it_is_told_with_its_line(tmp_path: Path) -> None:
    rows = [line(n, "csv") for n in range(5)]
    rows[1] = b'"' + rows[1]
    (tmp_path / "notes.csv").write_bytes(HEADER + b"\n".join(rows))
    told = "notes.csv: line 3: a quote that does not close before a comma or line end is read as text"
    assert told in check(site(), tmp_path)
    rows[3] = rows[3].replace(b",", b'",', 1)  # by chance, CSV takes this quote for the end of the other
    (tmp_path / "notes.csv").write_bytes(HEADER + b"\n".join(rows))
    [told, *_] = check(site(), tmp_path)
    assert told == (
        "notes.csv: line 3: a quote closes 2 line(s) further on, 3 lines look like rows of their own and are in one "
        "cell"
    )
    (tmp_path / "notes.csv").write_bytes(HEADER + b'"two,\nlines, all\r\nof one",flu,p\n')
    assert not [each for each in check(site(), tmp_path) if "quote" in each]
    assert read(site(), tmp_path).train.prompts == ("two,\nlines, all\r\nof one",)


def test_what_cannot_be_read_is_told_by_line_and_kind_and_not_by_content(tmp_path: Path) -> None:
    rows = [line(n, "jsonl") for n in range(5)]
    rows[1] = rows[1].replace(b"note 1", b"secret \\u0000")
    rows[3] = b"secret " + rows[3]
    (tmp_path / "notes.jsonl").write_bytes(b"\n\n".join(rows))
    [told, *_] = check(site(source="notes.jsonl"), tmp_path)
    assert told == (
        "notes.jsonl: 2 of 5 rows cannot be read and are empty ones in their places: line 3 ('text' holds a NUL), line "
        "7 (is not JSON)"
    )
    assert "secret" not in " ".join(check(site(source="notes.jsonl"), tmp_path))


# --- One person is one unit, however written ------------------------------------------------------------------------

SPELLINGS = ["PAT003", "PAT003 ", "pat003", "PA\u200bT003", "\uff30AT003", " PAT003\u00a0"]


@pytest.mark.parametrize("other", [*SPELLINGS[1:], "caf\u00e9", "3.0", "\uff13.0", "PAT\u20113", "\u0663"])
def test_spellings_of_a_person_are_one_unit_at_a_request_and_refused_by_the_check(tmp_path: Path, other: str) -> None:
    typed = {"caf\u00e9": "cafe\u0301", "3.0": "3", "\uff13.0": "3", "PAT\u20113": "PAT-3", "\u0663": "3"}
    first = typed.get(other, "PAT003")
    lines(tmp_path, {**WHOLE, "person": first}, {**WHOLE, "person": other}, {**WHOLE, "person": "q"})
    data = site(source="notes.jsonl")
    found = gathered(data, tmp_path)
    assert unit_rows(laid_out(found.records, data).train, 2, rows_per_unit=2) == [[0, 1], [2]]
    told = misread(data, found)
    assert f"{min(first, other)!a} and {max(first, other)!a}" in told
    assert told.startswith("notes.jsonl: 1 persons of the column 'person' are written in several ways: ")
    merging = site(source="notes.jsonl", spellings="merge")
    assert misread(merging, found) == ""
    assert "1 persons are written in several ways, and each counts as one (data.spellings)" in check(merging, tmp_path)
    assert merging.digest == data.digest  # rows are imported the same


@pytest.mark.parametrize("other", ["PAT004", "03", "3.5", "Pat 003", "\u0441\u0430f\u00e9"])
def test_other_persons_are_other_units(tmp_path: Path, other: str) -> None:
    lines(tmp_path, *({**WHOLE, "person": person} for person in ("PAT003", "3", "cafe\u0301", other)))
    data = site(source="notes.jsonl")
    assert len(set(read(data, tmp_path).train.units or ())) == 4
    assert misread(data, gathered(data, tmp_path)) == ""


def test_a_persons_spelling_depends_on_their_own_cell_alone(tmp_path: Path) -> None:
    for rest in ([], [{**WHOLE, "person": "PAT003"}], [{**WHOLE, "person": 3.5}, {**WHOLE, "person": None}]):
        lines(tmp_path, {**WHOLE, "person": "pAt003"}, *rest)
        assert gathered(site(source="notes.jsonl"), tmp_path).records[0].unit == "pat003"


def test_a_text_is_kept_as_it_was_written_and_no_row_is_dropped_as_anothers_copy(tmp_path: Path) -> None:
    texts = ["Cafe\u0301  \uff21\n\u200bx ", "Cafe\u0301  \uff21\n\u200bx ", "caf\u00e9 a x"]
    lines(tmp_path, *({**WHOLE, "text": text, "person": n} for n, text in enumerate(texts)))
    assert read(site(source="notes.jsonl"), tmp_path).train.prompts == tuple(texts)


def test_another_spelling_of_a_listed_label_is_that_label_and_is_told(tmp_path: Path) -> None:
    rows = [{**WHOLE, "label": label, "person": n} for n, label in enumerate(["Flu ", "flu", "influenza", "\uff46lu"])]
    lines(tmp_path, *rows)
    data = site(source="notes.jsonl", labels=("flu",), records=4)
    assert read(data, tmp_path).train.answers == ("flu", "flu", "influenza", "flu")
    assert (
        "2 rows have a label of data.labels in another spelling ('Flu ', '\\uff46lu'): they count as that label"
        in check(data, tmp_path)
    )


def test_the_real_number_changes_no_declared_one(tmp_path: Path) -> None:
    few = lines(tmp_path, WHOLE)
    many = lines(tmp_path, *({**WHOLE, "person": n} for n in range(9)))
    assert (few.records, few.unit_name) == (many.records, many.unit_name) == (3, "person")
    assert len(read(many, tmp_path).train) == 9  # which of them take part says fedsynth.training.examples


@pytest.mark.parametrize("key", ["source", "query", "text", "label", "person", "independent_rows", "test", "id"])
def test_other_words_about_reading_are_another_import(key: str) -> None:
    known = site()
    other: Any = {"independent_rows": True, "test": TestRows("part", "test"), "id": "n2", "query": QUERY}
    more = {"query": QUERY} if key == "query" else {key: other.get(key, "other.csv" if key == "source" else "other")}
    assert site(**more).digest != known.digest
    assert site(records=9, labels=("flu",)).digest == known.digest


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("text,label,who\na,flu,p\n", "notes.csv: no column 'person'; it has 'text', 'label', 'who'"),
        ("text;label;person\na;flu;p\n", "it has 'text;label;person'; are its columns parted by ';'?"),
        ("text,label,text,person\na,flu,b,p\n", "notes.csv: the column 'text' stands there twice"),
        ("", "notes.csv: cannot be read: it is empty"),
        ("text,label,person\n".encode("utf-16"), "notes.csv: cannot be read: its encoding is UTF-16: save it as UTF-8"),
        (None, "notes.csv: no such file in "),
    ],
)
def test_a_file_that_is_not_what_was_declared_is_refused(tmp_path: Path, content: Any, wrong: str) -> None:
    if content is not None:
        (tmp_path / "notes.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert wrong in said(site(), tmp_path)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ("image", "row 1 ('text' holds bytes values, not text)"),
        ("parts", "row 1 ('text' holds list values, not text)"),
        ("amount", "column 'text' holds numbers alone: is it the text's column?"),
    ],
)
def test_a_column_of_a_database_that_is_no_text_is_told(
    database: postgres.Server, tmp_path: Path, column: str, told: str
) -> None:
    data = site(query=f"SELECT {column} AS text, label, id AS person FROM odd ORDER BY id")
    assert told in " ".join(check(data, tmp_path))


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
        ({"person": None, "independent_rows": True, "spellings": "merge"}, "data.spellings is about persons"),
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
        ({"text": ("note", "label")}, "data.text and data.label both name the column 'label'"),
        ({"text": ("note", "")}, "data.text is empty: name a column"),
        ({"text": ("note",)}, "data.text must name one column, or two different ones"),
        ({"pair": "{first} {second}"}, "data.pair says how two columns become one text: data.text names one"),
    ],
)
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
    found = said(site(query=QUERY), tmp_path)
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
        ("SELECT text, label FROM notes ORDER BY id", "no column 'person'; it has 'text', 'label'"),
        ("SELECT text, label, text, person FROM notes ORDER BY id", "the column 'text' stands there twice"),
    ],
)
def test_a_query_that_gives_other_columns_is_refused(file_database: Path, query: str, wrong: str) -> None:
    found = said(site(query=query), file_database)
    assert found.startswith(f"data.query: {wrong}")


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
        "notes.jsonl: 1 of 57 rows lack a text, label or person and are empty ones: line 56 (no 'text')",
        "1 rows have a label that data.labels lacks ('cholera' 1): they count as records, and nothing is learnt from "
        "them",
        "no row has the label 'asthma' of data.labels",
        "the training text has 7 values of 'person', declared are 5 (data.records): only the first 5 take part. If one "
        "of them is taken out of the source, or damaged so that nobody can tell whose row it is, the next one moves "
        "in, so that this costs the replace-one figure; epsilon holds for one that stays and is emptied",
        "one of the values of 'person' has 50 of 56 training rows, half of them have at most 1: is it a person, or "
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
