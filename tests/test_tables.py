"""What is read of a source, and what is refused in one line."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from fedsynth.data.partition import label_list, misfits, open_sites
from fedsynth.data.places import find
from fedsynth.data.tables import read_rows
from fedsynth.scenario.data import Data, TestRows
from fedsynth.scenario.toml import load
from fedsynth.typed import BadValue

TestRows.__test__ = False  # pytest would collect it


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def rows(path: Path, **more: Any) -> list[tuple[str, str]]:
    table = read_rows(Data(str(path), **more)).table
    return list(zip(table["text"], table["label"], strict=True))


def refused(path: Path, **more: Any) -> str:
    with pytest.raises(BadValue) as caught:
        read_rows(Data(str(path), **more))
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert len(said.splitlines()) == 1
    return said.removeprefix(f"{path}: ")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def saved() -> datasets.DatasetDict:
    classes = datasets.ClassLabel(names=["flu", "asthma"])
    parts = {"train": (["a b", "c d", "e f"], [0, 1, 1]), "test": (["g h", "i j"], [1, -1])}
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"text": t, "label": n}).cast_column("label", classes)
            for name, (t, n) in parts.items()
        }
    )


# --- Saved data sets and the Hub --------------------------------------------------------------------------------------


def test_splits_become_a_column_and_numbers_become_class_names(tmp_path: Path) -> None:
    saved().save_to_disk(tmp_path / "notes")
    found = read_rows(Data(str(tmp_path / "notes"), test=TestRows("split", "test")))
    assert found.table[["text", "label", "held"]].to_numpy().tolist() == [
        ["a b", "flu", False],
        ["c d", "asthma", False],
        ["e f", "asthma", False],
        ["g h", "asthma", True],
    ]
    assert found.incomplete == 1  # -1 hides a label


def test_a_column_split_of_the_data_itself_is_kept(tmp_path: Path) -> None:
    own = saved().map(lambda row: {"split": "test" if row["text"] == "a b" else "other"})
    own.save_to_disk(tmp_path / "own")
    table = read_rows(Data(str(tmp_path / "own"), test=TestRows("split", "test"))).table
    assert table["text"][table["held"]].tolist() == ["a b"]


def test_a_saved_data_set_without_splits(tmp_path: Path) -> None:
    saved()["train"].save_to_disk(tmp_path / "plain")
    assert rows(tmp_path / "plain") == [("a b", "flu"), ("c d", "asthma"), ("e f", "asthma")]
    assert "no column 'split'; it has 'text', 'label'" in refused(tmp_path / "plain", test=TestRows("split", "test"))


def test_a_changed_saved_data_set_is_read_again(tmp_path: Path) -> None:
    saved()["train"].save_to_disk(tmp_path / "notes")
    assert len(rows(tmp_path / "notes")) == 3
    time.sleep(0.01)
    saved()["train"].select([0]).save_to_disk(tmp_path / "notes")
    assert len(rows(tmp_path / "notes")) == 1


def test_a_data_set_of_the_hub_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*words: Any, **more: Any) -> datasets.DatasetDict:
        calls.append((words, more))
        return saved()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = Data("hf:someone/notes", subset="small", revision="v2", test=TestRows("split", "test"), clients=1)
    assert len(read_rows(data).table) == 4
    assert label_list(data) == ("asthma", "flu")
    assert [len(c) for s in open_sites(data, 0) for c in (s.train, s.test)] == [3, 1]
    assert calls == [(("someone/notes", "small"), {"revision": "v2"})]  # loaded once, no foreign code


def test_a_name_that_cannot_be_reached_says_what_to_do() -> None:
    with pytest.raises(BadValue) as caught:
        read_rows(Data("hf:nobody/nothing"))
    said = str(caught.value)
    assert said.startswith("hf:nobody/nothing: cannot be loaded: Couldn't reach 'nobody/nothing'")
    for way_out in ("check data.source", "`hf auth login`", "download it and name the folder"):
        assert way_out in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"source": "hf:"}, "names no data set"),
        ({"source": "a.csv", "revision": "v1"}, "revision and subset belong to a source hf:NAME, not to 'a.csv'"),
        ({"source": "world:hospitals", "subset": "x"}, "revision and subset belong to"),
    ],
)
def test_settings_of_the_hub_belong_to_the_hub(more: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=re.escape(said)):
        Data(**more)


def test_a_folder_beside_the_scenario_is_found(tmp_path: Path) -> None:
    saved().save_to_disk(tmp_path / "notes")
    (tmp_path / "own.toml").write_text(
        'name = "own"\n[strategy]\nuse = "json:B"\n[data]\nsource = "notes"\n[client]\ngenerator = "a/b"\n'
        'task_model = "a/b"\nguarantee = "none"\n[server]\nllm = "a/b"\n'
    )
    assert load(tmp_path / "own.toml").data.source == str(tmp_path / "notes")


def test_a_saved_data_set_in_the_shared_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved().save_to_disk(tmp_path / "shared" / "notes")
    monkeypatch.setenv("FEDSYNTH_DATA", str(tmp_path / "shared"))
    assert find("notes") == tmp_path / "shared" / "notes"


# --- What cannot be read ----------------------------------------------------------------------------------------------


def test_a_folder_of_files_is_no_source(tmp_path: Path) -> None:
    write(tmp_path / "notes.csv", "text,label\na,b\n")
    assert refused(tmp_path) == "is a folder, but none that datasets.save_to_disk wrote: name a file in it"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "text,label\na,b\n", "expected a .csv, .jsonl or .parquet file, or a folder that"),
        ("a.csv", "", "it is empty"),
        ("a.csv", "text,label\n", "no row has both 'text' and 'label' (it has 0 rows)"),
        ("a.csv", "text,label\n,x\n ,y\na b,\n", "no row has both 'text' and 'label' (it has 3 rows)"),
        ("a.csv", "text,label\na b,x\ncaf\xe9,y\n".encode("latin-1"), "byte 0xe9 in line 3 is not UTF-8: save it as"),
        ("a.csv", "text,label\na b,x\n".encode("utf-16"), "its encoding is UTF-16: save it as UTF-8"),
        ("a.csv", "text,label\na b,x\n".encode("utf-16-le"), "a NUL byte in line 1: save it as UTF-8"),
        ("a.csv", "text,label\na b,x\nc\0d,x\n", "a NUL byte in line 3"),
        ("a.csv", "text,label,text\na b,x,c\n", "the column 'text' stands there twice"),
        ("a.csv", "text,label\na b,x,y,z\n", "the row of line 2 has 4 fields, the header has 2: put a text that"),
        ("a.csv", "text,label\na,b\na b,x,y\n", "the row of line 3 has 3 fields, the header has 2"),
        ("a.csv", "text,label\na,b,c\nd,e,f\n", "the row of line 2 has 3 fields"),
        ("a.csv", '\ntext,label\r\n"a\n\nb",x\n\na, b,x\n', "the row of line 7 has 3 fields, the header has 2"),
        ("a.csv", "text , label\na,x\n", "no column 'text'; it has 'text ', ' label'"),
        (
            "a.jsonl",
            '{"text": "a", "label": "x"}\n\n{"text": "a", "label": ' + "1" * 5000 + "}\n",
            "line 3 holds a number that is too long to be read: put it in quotes",
        ),
        ("a.jsonl", '{"text": "a", "label": ' + "[" * 100_000 + "}\n", "line 1 is nested too deep to be read"),
        ("a.csv", 'text,label\n"a b,x\n', "cannot be read: "),
        ("a.jsonl", '{"text": "a b", "label": "x"}\n{"text": \n', "line 2 is not JSON: Expecting value"),
        ("a.jsonl", '{"text": "a b", "label": "x"}\n[1]\n', "line 2 is no JSON object"),
        ("a.jsonl", '{"text": "a b", "label": "x", "text": "c"}\n', "line 1: the column 'text' stands there twice"),
        ("a.jsonl", '{"text": ["a", "b"], "label": "x"}\n', "row 1 of column 'text' holds list values, not text"),
        ("a.jsonl", '{"text": {"a": 1}, "label": "x"}\n', "row 1 of column 'text' holds dict values, not text"),
        ("a.jsonl", '{"text": "a\\u0000", "label": "x"}\n', "row 1 of column 'text' holds a character that is no text"),
        ("a.jsonl", '{"text": "a", "label": "\\ud800"}\n', "row 1 of column 'label' holds a character that is no"),
        ("a.parquet", "text,label\n", "it is not a Parquet file: "),
        ("a.csv", "text,label\n1.5,x\n002,y\n", "column 'text' holds numbers, not text: name the text's"),
        ("a.jsonl", '{"text": 3, "label": "x"}\n', "column 'text' holds numbers, not text"),
        ("a.jsonl", '{"text": true, "label": "x"}\n', "column 'text' holds bool values, not text"),
        ("a.csv", "text;label\na, b;x\n", "its columns are parted by ';', not by commas: save it with commas, or as"),
        ("a.csv", "text\tlabel\na\tx\n", "its columns are parted by '\\t'"),
        ("a.csv", 'text;label\n"a\nb";x\n', "its columns are parted by ';'"),
        ("a.csv", '"text,label\na,x\n', "a quote in line 1 begins a field and never closes: 2 lines"),
        ("a.csv", "text,label\na,Caf\u00e9\nb,Cafe\u0301\n", r"'Cafe\u0301' and 'Caf\u00e9'; write each class one way"),
        ("a.csv", "text,label\n\u200b,x\na,\u00ad\n", "no row has both 'text' and 'label' (it has 2 rows)"),
        ("a.csv", 'text,label\na,x\n"b c,x\nd,y\n', "a quote in line 3 begins a field and never closes: 2 lines stand"),
        (
            "a.csv",
            "text,label\na,Billing\nb,billing \n",
            "labels differ only in case, blanks or what cannot "
            "be seen: 'Billing' and 'billing\\u0020'; write each class one way",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    assert said in refused(write(tmp_path / name, content))


def test_bytes_and_numbers_of_parquet_are_no_text(tmp_path: Path) -> None:
    pd.DataFrame({"text": [b"a", b"b"], "label": ["x", "y"]}).to_parquet(tmp_path / "bytes.parquet")
    assert "row 1 of column 'text' holds bytes values" in refused(tmp_path / "bytes.parquet")
    pd.DataFrame({"text": [1.5, None], "label": ["x", "y"]}).to_parquet(tmp_path / "numbers.parquet")
    assert "column 'text' holds numbers, not text" in refused(tmp_path / "numbers.parquet")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_cell_of_50_mb_is_refused(tmp_path: Path, ending: str) -> None:
    long = "ab cd " * (50_000_000 // 6)
    if ending == "csv":
        path = write(tmp_path / "long.csv", f"text,label\nshort one,x\n{long},y\n")
    else:
        path = write(
            tmp_path / "long.jsonl", "".join(json.dumps({"text": t, "label": "x"}) + "\n" for t in ("a", long))
        )
    said = refused(path)
    assert said.startswith(f"row 2 of column 'text' has {len(long)} characters, at most 1000000 are read")


def test_some_numbers_among_texts_are_texts(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.csv", "text,label\n12,x\nnot 12,y\n")) == [("12", "x"), ("not 12", "y")]


def test_the_mark_of_utf_8_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\ncafé,x\n".encode("utf-8-sig"))
    assert rows(path) == [("café", "x")]
    marked = write(tmp_path / "a.jsonl", '{"text": "café", "label": "x"}\n'.encode("utf-8-sig"))
    assert rows(marked) == [("café", "x")]


def test_line_ends_and_commas_within_quotes(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.csv", 'text,label\r\n"a,\nb",x\r\n')) == [("a,\nb", "x")]


def test_an_unnamed_or_unused_column_does_no_harm(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.csv", ",text,label,raw\n0,a b,x,\n1,c d,y,3\n")) == [("a b", "x"), ("c d", "y")]
    pd.DataFrame({"text": ["a"], "label": ["x"], "raw": [b"1"]}).to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [("a", "x")]


def test_a_test_value_that_no_row_has_is_named_beside_those_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,part\na,x,train\nb,y,Test\n")
    said = refused(path, test=TestRows("part", "test"))
    assert said == "no row has 'test' in the test column 'part'; it has 'train', 'Test'"


def test_a_person_on_both_sides_of_the_test_split_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,part,who\na,x,train,p\nb,y,test,p\nc,y,test,q\nd,y,train,r\n")
    said = refused(path, test=TestRows("part", "test"), unit="who")
    assert said.startswith("1 values of the unit column 'who' have training and test rows")


# --- What fits badly --------------------------------------------------------------------------------------------------


def test_left_out_rows_unknown_labels_and_absent_ones_are_warned_about(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,x\nb,x\nc,y\n,x\nd,\ne,y\n")
    assert misfits(Data(str(path)), ("x", "y")) == [f"{path}: 2 of 6 rows have no text or no label: they are left out"]
    assert misfits(Data(str(path)), ("y", "z"))[1:] == [
        "2 rows have a label that data.labels lacks ('x' 2): they count as records, and nothing is learnt from them",
        "no row has the label 'z' of data.labels",
    ]


def test_if_most_rows_have_an_unlisted_label_the_nearest_ones_are_named(tmp_path: Path) -> None:
    rows = "a,card_arrival\nb,card_arrival\nc,card_arrival\nd,lost card\ne,login\nf,login\n"
    path = write(tmp_path / "a.csv", f"text,label\n{rows}")
    with pytest.raises(BadValue) as caught:
        misfits(Data(str(path)), ("card arrival", "login"))
    said = str(caught.value)
    assert "4 of 6 rows (67%) have a label that data.labels lacks ('card_arrival' 3 (nearest: 'card arrival')" in said
    assert 'data.unlisted = "drop"' in said
    listed = ("card arrival", "login")
    dropped = misfits(Data(str(path), labels=listed, unlisted="drop"), listed)
    assert dropped == ["no row has the label 'card arrival' of data.labels"]
    half = write(tmp_path / "b.csv", "text,label\na,card_arrival\nb,login\n")  # one of two is no more than half
    assert "'card_arrival' 1 (nearest: 'card arrival')" in misfits(Data(str(half)), listed)[0]


def test_a_listed_label_in_another_spelling_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,billing\nb,login\n")
    with pytest.raises(BadValue, match=r"data.labels and .*: labels differ only in case.*: 'Billing' and 'billing'"):
        misfits(Data(str(path)), ("Billing", "login"))


# --- Spellings --------------------------------------------------------------------------------------------------------

PERSONS = ["PAT1", "PAT1 ", "pat1", "caf\u00e9", "cafe\u0301", "p2\u200b", "p2", "other"]
SEEN = ["'PAT1' and 'PAT1\\u0020' and 'pat1'", "'cafe\\u0301' and 'caf\\u00e9'", "'p2' and 'p2\\u200b'"]


def spelt(path: Path, column: str) -> Path:
    frame = pd.DataFrame({"text": [f"note {i}" for i in range(8)], "label": ["x", "y"] * 4, column: PERSONS})
    frame.to_parquet(path)
    return path


@pytest.mark.parametrize(("column", "key", "what"), [("who", "unit", "persons"), ("ward", "client_column", "clients")])
def test_a_person_or_client_in_several_spellings_is_refused_or_merged(
    tmp_path: Path, column: str, key: str, what: str
) -> None:
    path = spelt(tmp_path / "a.parquet", column)
    said = refused(path, **{key: column})
    assert said.startswith(
        f"3 {what} of the column {column!r} are written in ways that differ only in case, blanks or "
    )
    assert all(shown in said for shown in SEEN)
    assert said.endswith('; write each one way, or say data.spellings = "merge"')
    found = read_rows(Data(str(path), spellings="merge", **{key: column}))
    names = found.table["unit" if key == "unit" else "client"].tolist()
    assert [names.index(name) for name in names] == [0, 0, 0, 3, 3, 5, 5, 7]
    assert found.table["text"].tolist() == [f"note {i}" for i in range(8)]  # no text is written anew
    assert found.merged == 4
    told = misfits(Data(str(path), spellings="merge", **{key: column}), ("x", "y"))
    assert told == [f"{path}: 4 spellings of persons or clients are merged into others of them"]


def test_labels_in_several_spellings_are_refused_although_persons_are_merged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,who\na,Flu,p\nb,flu,P\n")
    assert "labels differ only in case" in refused(path, unit="who", spellings="merge")


def test_a_person_with_training_and_test_rows_under_two_spellings_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,part,who\na,x,train,p\nb,y,test,P\nc,y,train,q\n")
    said = refused(path, test=TestRows("part", "test"), unit="who", spellings="merge")
    assert said.startswith("1 values of the unit column 'who' have training and test rows")


def test_many_persons_in_several_spellings_are_counted(tmp_path: Path) -> None:
    rows = "".join(f"note {i},x,P{i // 2}{' ' * (i % 2)}\n" for i in range(40))
    said = refused(write(tmp_path / "a.csv", f"text,label,who\n{rows}"), unit="who")
    assert said.startswith("20 persons of")
    assert said.count(" and 'P") == 5
    assert ", and 15 more; " in said


def test_a_person_whose_name_nobody_sees_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,who\na,x,p\nb,y,\u200b\n")
    assert refused(path, unit="who") == "1 rows have no value in column 'who'"


# --- Labels that nothing can be measured on ---------------------------------------------------------------------------


def test_test_rows_whose_labels_are_hidden_are_counted(tmp_path: Path) -> None:
    hidden = saved()
    hidden["test"] = hidden["test"].map(lambda row: {"label": -1})
    hidden.save_to_disk(tmp_path / "notes")
    said = refused(tmp_path / "notes", test=TestRows("split", "test"))
    assert said == (
        "2 rows are 'test' in the test column 'split', none of them has a label (-1 hides it); name another split"
    )
    path = write(tmp_path / "a.csv", "text,response,part\na,x,train\nb,,test\n")
    said = refused(path, test=TestRows("part", "test"), task="instructions")
    assert said == "1 rows are 'test' in the test column 'part', none of them has a response; name another split"


def test_a_file_that_hides_labels_as_a_number_is_told_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,part\na,0,train\nb,1,train\nc,-1,test\nd,-1,test\n")
    with pytest.raises(BadValue, match=r"2 rows are 'test' .*, none of them has a label \(-1 hides it\)"):
        misfits(Data(str(path), test=TestRows("part", "test")), ("0", "1"))
    assert misfits(Data(str(path), test=TestRows("part", "test")), ("0", "1", "-1")) == []


def test_labels_that_no_row_has_are_told_beside_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,0.0\nb,1.0\nc,0.0\n")
    with pytest.raises(
        BadValue, match=r"no row has a label of data.labels \('0', '1'\); there are '0.0' 2, '1.0' 1: list"
    ):
        misfits(Data(str(path)), ("0", "1"))
    parted = write(tmp_path / "b.csv", "text,label,part\na,x,train\nb,y,test\n")
    for listed, part in ((("x",), "test"), (("y",), "training")):
        with pytest.raises(BadValue, match=f"no {part} row has a label of data.labels"):
            misfits(Data(str(parted), test=TestRows("part", "test")), listed)
    pd.DataFrame({"text": ["a", "b"], "label": [0.0, 1.0]}).to_parquet(tmp_path / "a.parquet")
    assert misfits(Data(str(tmp_path / "a.parquet")), ("0", "1")) == []  # there a whole number is one
