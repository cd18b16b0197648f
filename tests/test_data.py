from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedsynth.corpus import Corpus, Provenance
from fedsynth.data import Site, find, label_list, open_site, open_sites
from fedsynth.scenario import Data, TestRows
from fedsynth.typed import BadValue

TestRows.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it


def table(rows: int = 20, **more: Any) -> pd.DataFrame:
    columns = {"text": [f"note {i}" for i in range(rows)], "label": [("flu", "asthma")[i % 2] for i in range(rows)]}
    return pd.DataFrame({**columns, **more})


def save(frame: pd.DataFrame, path: Path) -> Data:
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".parquet":
            frame.to_parquet(path)
        case ".jsonl":
            frame.to_json(path, orient="records", lines=True)
    return Data(str(path), clients=2)


def texts(*corpora: Corpus) -> list[str]:
    return [t for c in corpora for t in c.prompts]


def everything(sites: list[Site]) -> list[str]:
    return texts(*(c for s in sites for c in (s.train, s.test)))


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_every_format_is_divided_alike_and_nothing_is_in_two_places(tmp_path: Path, ending: str) -> None:
    data = save(table(), tmp_path / f"notes{ending}")
    sites = open_sites(data, seed=1)
    assert sorted(everything(sites)) == sorted(table()["text"])
    assert [(len(s.train), len(s.test)) for s in sites] == [(8, 2), (8, 2)]  # a fifth of ten is held out
    reference = open_sites(save(table(), tmp_path / "reference.csv"), seed=1)
    assert sites == reference
    labels = dict(zip(table()["text"], table()["label"], strict=True))
    for corpus in (c for s in sites for c in (s.train, s.test)):
        assert corpus.provenance is Provenance.PRIVATE
        assert [labels[p] for p in corpus.prompts] == list(corpus.answers)


def test_the_division_depends_on_the_seed_only(tmp_path: Path) -> None:
    data = save(table(), tmp_path / "seeded.csv")
    again = save(table(), tmp_path / "seeded_again.csv")  # another name: nothing remembered is used
    assert open_sites(data, seed=1) == open_sites(again, seed=1)
    assert open_sites(data, seed=1) != open_sites(data, seed=2)


def test_one_site_is_that_of_all_sites(tmp_path: Path) -> None:
    data = save(table(), tmp_path / "one.csv")
    assert [open_site(data, i, 3) for i in range(2)] == open_sites(data, 3)


def test_pooled_is_one_site_with_all_text(tmp_path: Path) -> None:
    data = save(table(), tmp_path / "pooled.csv")
    [site] = open_sites(replace(data, pooled=True), 3)
    apart = open_sites(data, 3)
    assert texts(site.train) == texts(*(s.train for s in apart))
    assert texts(site.test) == texts(*(s.test for s in apart))


def test_named_test_rows_are_held_out(tmp_path: Path) -> None:
    frame = table(part=["test" if i % 4 == 0 else "train" for i in range(20)])
    data = replace(save(frame, tmp_path / "parts.csv"), test=TestRows("part", "test"))
    sites = open_sites(data, 1)
    assert sorted(texts(*(s.test for s in sites))) == sorted(frame["text"][::4])
    assert sorted(everything(sites)) == sorted(frame["text"])


def test_numbers_as_the_mark_of_test_rows(tmp_path: Path) -> None:
    frame = table(fold=[i % 4 for i in range(20)])
    data = replace(save(frame, tmp_path / "folds.csv"), test=TestRows("fold", "3"), clients=1)
    assert sorted(texts(*(s.test for s in open_sites(data, 1)))) == sorted(frame["text"][3::4])


def test_natural_clients_are_the_values_of_a_column(tmp_path: Path) -> None:
    wards = [("north", "south", "east")[i % 3] for i in range(30)]
    frame = table(30, ward=wards)
    data = replace(save(frame, tmp_path / "wards.csv"), split="natural", client_column="ward", clients=3)
    sites = open_sites(data, 1)
    ward = dict(zip(frame["text"], wards, strict=True))
    assert [{ward[t] for t in everything([s])} for s in sites] == [{"east"}, {"north"}, {"south"}]
    assert sorted(everything(sites)) == sorted(frame["text"])
    with pytest.raises(BadValue, match="4 clients asked, column 'ward' has 3"):
        open_sites(replace(data, clients=4), 1)


def test_the_unit_is_the_row_or_the_named_column(tmp_path: Path) -> None:
    frame = table(patient=[f"p{i // 4}" for i in range(20)])
    data = save(frame, tmp_path / "patients.csv")
    patient = dict(zip(frame["text"], frame["patient"], strict=True))
    row = {t: i for i, t in enumerate(frame["text"])}
    for site in open_sites(replace(data, unit="patient"), 1):
        assert site.train.units == tuple(patient[t] for t in site.train.prompts)
    units = [s.train.units for s in open_sites(data, 1)]
    assert units == [tuple(row[t] for t in s.train.prompts) for s in open_sites(data, 1)]


def test_labels_are_those_of_the_scenario_or_the_sorted_ones_of_the_file(tmp_path: Path) -> None:
    data = save(table(), tmp_path / "labels.csv")
    assert label_list(data) == ("asthma", "flu")
    assert label_list(replace(data, labels=("flu", "asthma", "measles"))) == ("flu", "asthma", "measles")
    numbered = save(table(label=[i % 3 for i in range(20)]), tmp_path / "numbered.csv")
    assert label_list(numbered) == ("0", "1", "2")


def test_rows_without_text_or_label_are_left_out(tmp_path: Path) -> None:
    frame = table()
    frame.loc[3, "text"] = None
    frame.loc[5, "label"] = None
    assert sorted(everything(open_sites(save(frame, tmp_path / "gaps.csv"), 1))) == sorted(
        f"note {i}" for i in range(20) if i not in (3, 5)
    )


def test_other_column_names(tmp_path: Path) -> None:
    frame = table().rename(columns={"text": "body", "label": "diagnosis"})
    data = replace(save(frame, tmp_path / "named.csv"), text="body", label="diagnosis")
    assert sorted(everything(open_sites(data, 1))) == sorted(frame["body"])


@pytest.mark.parametrize(
    ("more", "column"),
    [
        ({"text": "txt"}, "txt"),
        ({"label": "lbl"}, "lbl"),
        ({"unit": "patient"}, "patient"),
        ({"test": TestRows("part", "test")}, "part"),
        ({"split": "natural", "client_column": "ward"}, "ward"),
    ],
)
def test_a_missing_column_is_named_beside_those_that_exist(tmp_path: Path, more: dict[str, Any], column: str) -> None:
    data = replace(save(table(), tmp_path / f"missing_{column}.csv"), **more)
    with pytest.raises(BadValue, match=f"no column '{column}'; it has text, label"):
        open_sites(data, 1)


def test_more_clients_than_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="9 clients for 8 examples: ask for fewer clients"):
        open_sites(replace(save(table(8), tmp_path / "few.csv"), clients=9), 1)


def test_a_client_without_test_or_training_examples_is_refused(tmp_path: Path) -> None:
    thin = replace(save(table(2), tmp_path / "two.csv"), clients=2)
    with pytest.raises(BadValue, match="client 0 has no training example"):  # its one example is held out
        open_sites(thin, 1)
    data = save(table(8), tmp_path / "thin.csv")
    alone = replace(data, test=TestRows("label", "flu"), split="natural", client_column="label")
    with pytest.raises(BadValue, match="client 0 has no test example"):  # asthma comes first
        open_sites(alone, 1)
    with pytest.raises(BadValue, match="client 0 has no training example"):
        open_sites(replace(alone, test=TestRows("label", "asthma")), 1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.txt", "text,label\n", "expected a .csv, .jsonl or .parquet file"),
        ("empty.csv", "text,label\n", "no row has both 'text' and 'label'"),
        ("nothing.csv", "", "cannot be read"),
        ("no.parquet", "PAR1", "cannot be read"),
        ("no.jsonl", "{", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(BadValue, match=said) as caught:
        open_sites(Data(str(path), clients=1), 1)
    assert str(path) in str(caught.value)


def test_a_file_is_looked_up_where_it_is_named_then_in_fedsynth_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.csv").touch()
    (there / "only_there.csv").touch()
    monkeypatch.chdir(here)
    monkeypatch.delenv("FEDSYNTH_DATA", raising=False)
    with pytest.raises(BadValue, match=f"no data file 'only_there.csv' .looked in {here}"):
        find("only_there.csv")
    monkeypatch.setenv("FEDSYNTH_DATA", str(there))
    assert find("only_there.csv") == there / "only_there.csv"
    assert find("both.csv").absolute() == here / "both.csv"
    with pytest.raises(BadValue, match=f"{here}, {there}"):
        find("nowhere.csv")


def test_a_world_gives_the_declared_number_of_examples_per_client() -> None:
    data = Data("world:hospitals", clients=2, train_per_client=5, test_per_client=7)
    sites = open_sites(data, 0)
    assert [(len(s.train), len(s.test)) for s in sites] == [(5, 7), (5, 7)]
    assert sites != open_sites(data, 1)
    assert {a for s in sites for a in s.train.answers} <= set(label_list(data))


@pytest.mark.parametrize("word", ["None", "NA", "null"])
def test_a_class_whose_name_pandas_takes_for_missing_is_kept(tmp_path: Path, word: str) -> None:
    data = save(table(label=["flu", word] * 10), tmp_path / f"{word}.csv")
    assert set(label_list(data)) == {"flu", word}


def test_labels_and_texts_are_read_as_they_are_written(tmp_path: Path) -> None:
    frame = table(text=[f"{i:03}" for i in range(20)], label=["01", "02"] * 10)
    data = save(frame, tmp_path / "digits.csv")
    assert label_list(data) == ("01", "02")
    assert sorted(everything(open_sites(data, 1))) == sorted(frame["text"])


def test_a_missing_label_does_not_change_the_others(tmp_path: Path) -> None:
    data = save(table(label=[1, 2, 1, None] * 5), tmp_path / "floats.parquet")
    assert label_list(data) == ("1", "2")


def test_a_row_without_its_client_is_left_out_or_refused_by_name(tmp_path: Path) -> None:
    frame = table(ward=[*["north", "south"] * 9, "north", None])
    data = replace(save(frame, tmp_path / "no_ward.csv"), split="natural", client_column="ward")
    try:
        sites = open_sites(data, 1)
    except BadValue:
        return
    assert len(everything(sites)) == 19


@pytest.mark.parametrize("places", ["clients", "train and test"])
def test_a_person_is_in_one_place_only(tmp_path: Path, places: str) -> None:
    frame = table(40, patient=[f"p{i // 4}" for i in range(40)])
    data = replace(save(frame, tmp_path / "persons.csv"), unit="patient")
    sites = open_sites(data, 1)
    one, other = (sites[0].train, sites[1].train) if places == "clients" else (sites[0].train, sites[0].test)
    assert not set(one.units or ()) & set(other.units or ())


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    data = save(table(), tmp_path / "changing.csv")
    assert label_list(data) == ("asthma", "flu")
    save(table(label=["measles"] * 20), tmp_path / "changing.csv")
    assert label_list(data) == ("measles",)
