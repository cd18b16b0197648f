from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedsynth.corpus import Corpus, Provenance, pool
from fedsynth.data.partition import ClientData, LeftOut, divide, find, label_list, misfits, open_site, open_sites
from fedsynth.scenario.data import Data, TestRows
from fedsynth.typed import BadValue

TestRows.__test__ = False  # pytest would collect it


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


def everything(sites: list[ClientData]) -> list[str]:
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
    with pytest.raises(BadValue, match=f"no column '{column}'; it has 'text', 'label'"):
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
    frame = table(text=[f"0{i} NA" for i in range(20)], label=["01", "02"] * 10)
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


# --- Splits by label --------------------------------------------------------------------------------------------------


def many(path: Path, **more: Any) -> Data:
    """Two classes of 80 rows each; the last quarter of the file is for testing, as in data sets of two splits."""
    frame = table(160, part=["train"] * 120 + ["test"] * 40)
    return replace(save(frame, path), clients=4, test=TestRows("part", "test"), **more)


def counted(corpus: Corpus) -> tuple[int, int]:
    return corpus.counts()["flu"], corpus.counts()["asthma"]


DIRICHLET: dict[str, Any] = {"split": "dirichlet", "alpha": 1.0}
PATHOLOGICAL: dict[str, Any] = {"split": "pathological", "classes_per_client": 1}


@pytest.mark.parametrize("split", [{}, DIRICHLET, PATHOLOGICAL], ids=["iid", "dirichlet", "pathological"])
def test_every_split_deals_each_row_once_and_repeats_with_its_seed(tmp_path: Path, split: dict[str, Any]) -> None:
    data, again = many(tmp_path / "a.csv", **split), many(tmp_path / "b.csv", **split)
    before = str(np.random.get_state()), random.getstate()  # noqa: NPY002  # the hidden generator stays as it is
    sites = open_sites(data, 3)
    assert (str(np.random.get_state()), random.getstate()) == before  # noqa: NPY002 - as above
    assert sorted(everything(sites)) == sorted(table(160)["text"])
    assert open_sites(again, 3) == sites
    assert open_sites(data, 4) != sites


def test_a_large_alpha_deals_alike_and_a_small_one_does_not(tmp_path: Path) -> None:
    alike = open_sites(many(tmp_path / "a.csv", split="dirichlet", alpha=1e6), 0)
    for site in alike:  # 60 training and 20 test rows of each class for four clients
        assert all(abs(n - 15) <= 1 for n in counted(site.train))
        assert all(abs(n - 5) <= 1 for n in counted(site.test))
    apart = open_sites(many(tmp_path / "a.csv", split="dirichlet", alpha=0.3), 0)
    shares = [counted(s.train)[0] / len(s.train) for s in apart]
    assert max(shares) - min(shares) > 0.3


@pytest.mark.parametrize("seed", range(4))
def test_a_clients_test_rows_have_the_labels_of_its_training_rows(tmp_path: Path, seed: int) -> None:
    for split in (DIRICHLET, PATHOLOGICAL):
        for site in open_sites(many(tmp_path / "a.csv", **split), seed):
            for learnt, tested in zip(counted(site.train), counted(site.test), strict=True):
                assert abs(tested - learnt / 3) <= 1  # of every class three rows to learn from to one to test on


def test_a_pathological_client_holds_so_many_classes(tmp_path: Path) -> None:
    frame = table(120, label=[f"c{i % 6}" for i in range(120)])
    data = replace(save(frame, tmp_path / "six.csv"), clients=6, split="pathological", classes_per_client=2)
    division = divide(data, 1)
    held = [{*s.train.answers, *s.test.answers} for s in division.sites]
    assert [len(h) for h in held] == [2] * 6
    assert set.union(*held) == {f"c{i}" for i in range(6)}
    fewer = divide(replace(data, clients=2), 1)
    held = [{*s.train.answers, *s.test.answers} for s in fewer.sites]
    assert fewer.left_out.not_dealt == 120 - 20 * len(set.union(*held)) > 0


@pytest.mark.parametrize("split", [DIRICHLET, PATHOLOGICAL])
def test_persons_are_dealt_whole_by_their_first_label(tmp_path: Path, split: dict[str, Any]) -> None:
    frame = table(
        160, patient=[f"p{i // 4}" for i in range(160)], label=[("flu", "asthma")[i // 4 % 2] for i in range(160)]
    )
    frame.loc[3::4, "label"] = "cough"  # each person's last row
    data = replace(save(frame, tmp_path / "persons.csv"), clients=3, unit="patient", **split)
    sites = open_sites(data, 0)
    at = [{*(s.train.units or ()), *(s.test.units or ())} for s in sites]
    assert sum(map(len, at)) == len(set.union(*at)) == 40
    assert sorted(everything(sites)) == sorted(frame["text"])
    for site in sites:
        assert not set(site.train.units or ()) & set(site.test.units or ())


@pytest.mark.parametrize(
    ("split", "clients", "said"),
    [
        (
            {"split": "dirichlet", "alpha": 0.001},
            8,
            "no draw with alpha = 0.001 left each of 8 clients 2 examples: ask for a larger alpha or fewer clients",
        ),
        ({"split": "pathological", "classes_per_client": 3}, 4, "classes_per_client must lie in 1..2 .*, got 3"),
        ({"split": "pathological", "classes_per_client": 2}, 12, "a class has fewer examples than clients that draw"),
        ({"split": "pathological", "classes_per_client": 1}, 20, "client 0 has no training example: ask for more cl"),
    ],
)
def test_a_split_that_leaves_a_client_without_examples_says_the_way_out(
    tmp_path: Path, split: dict[str, Any], clients: int, said: str
) -> None:
    with pytest.raises(BadValue, match=said):
        open_sites(replace(save(table(20), tmp_path / "a.csv"), clients=clients, **split), 0)


def test_a_client_without_test_rows_is_named_with_the_way_out(tmp_path: Path) -> None:
    frame = table(40, part=["test", *["train"] * 39])
    data = replace(save(frame, tmp_path / "a.csv"), clients=2, test=TestRows("part", "test"), **DIRICHLET)
    with pytest.raises(
        BadValue, match=r"client [01] has no test example: ask for a larger alpha, fewer clients or more"
    ):
        open_sites(data, 0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"alpha": 0.0, "split": "dirichlet"}, "alpha must be finite and above 0, got 0.0"),
        ({"alpha": float("inf"), "split": "dirichlet"}, "alpha must be finite"),
        ({"alpha": float("nan"), "split": "dirichlet"}, "alpha must be finite"),
        ({"alpha": 0.1}, "alpha belongs to split = \"dirichlet\", not to 'iid'"),
        ({"classes_per_client": 2}, "need each other"),
        ({"split": "pathological"}, "need each other"),
        ({"classes_per_client": 0, "split": "pathological"}, "classes_per_client must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"source": "world:hospitals", "split": "dirichlet"}, "split belong to data files"),
        ({"source": "world:hospitals", "limit": 3}, "limit and duplicates belong to data files"),
        ({"source": "world:hospitals", "duplicates": "drop"}, "limit and duplicates belong to data files"),
        ({"source": "world:hospitals", "alpha": 2.0}, "alpha belongs to"),
    ],
)
def test_settings_of_a_split_belong_to_it(more: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=said):
        Data(**{"source": "a.csv", **more})


def test_the_partitioners_are_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    frame = table(120, label=[f"c{i % 6}" for i in range(120)], ward=["north", "south"] * 60)
    data = save(frame, tmp_path / "six.csv")
    open_sites(replace(data, split="natural", client_column="ward"), 1)
    open_sites(replace(data, split="pathological", classes_per_client=1), 1)  # classes that nobody draws
    assert (capfd.readouterr(), list(recwarn)) == (("", ""), [])


# --- Limit ------------------------------------------------------------------------------------------------------------


def test_a_limit_keeps_so_many_training_units_and_every_test_row(tmp_path: Path) -> None:
    data = save(table(40, patient=[f"p{i // 2}" for i in range(40)]), tmp_path / "a.csv")
    whole, three = divide(data, 5), divide(replace(data, limit=3), 5)
    for before, after in zip(whole.sites, three.sites, strict=True):
        assert after.test == before.test
        assert len(after.train) == 3
        assert set(after.train.prompts) < set(before.train.prompts)
    assert three.left_out == LeftOut(over_limit=2 * (16 - 3))
    assert divide(replace(data, limit=100), 5) == whole
    persons = divide(replace(data, limit=3, unit="patient"), 5)
    assert [(len(set(s.train.units or ())), len(s.train)) for s in persons.sites] == [(3, 6), (3, 6)]


def test_a_test_limit_keeps_so_many_test_units_and_every_training_row(tmp_path: Path) -> None:
    data = save(table(40), tmp_path / "a.csv")
    whole, two = divide(data, 5), divide(replace(data, test_limit=2), 5)
    for before, after in zip(whole.sites, two.sites, strict=True):
        assert after.train == before.train
        assert len(after.test) == 2
        assert set(after.test.prompts) < set(before.test.prompts)
    assert two.left_out == LeftOut(over_limit=sum(len(s.test) - 2 for s in whole.sites))


# --- Duplicates -------------------------------------------------------------------------------------------------------

TWICE = pd.DataFrame(
    [  # text, label, ward, part
        ("same text", "flu", "north", "train"),
        ("Same  text ", "flu", "south", "train"),
        ("in both", "asthma", "north", "train"),
        ("in BOTH", "asthma", "north", "test"),
        ("twice here", "flu", "south", "train"),
        ("twice here", "flu", "south", "train"),
        ("north only", "flu", "north", "train"),
        ("south only", "flu", "south", "train"),
        ("south test", "asthma", "south", "test"),
        ("elsewhere", "flu", "west", "train"),
        ("ELSEWHERE", "flu", "west", "test"),
    ],
    columns=["text", "label", "ward", "part"],
)


def wards(path: Path, frame: pd.DataFrame = TWICE, **more: Any) -> Data:
    data = save(frame, path)
    return replace(data, split="natural", client_column="ward", test=TestRows("part", "test"), **more)


def test_duplicates_between_clients_and_with_test_text_are_refused_and_counted(tmp_path: Path) -> None:
    with pytest.raises(BadValue) as caught:
        open_sites(wards(tmp_path / "a.csv"), 0)
    assert "1 texts are in the training text of more than one client, 1 in training and test text: " in str(
        caught.value
    )
    assert 'data.duplicates = "drop"' in str(caught.value)
    only_between = TWICE[~TWICE["text"].str.contains("both", case=False)]
    only_between = pd.concat([only_between, TWICE.iloc[[3]]])
    with pytest.raises(BadValue, match=r"1 texts are in .* client, 0 in training and test text"):
        open_sites(wards(tmp_path / "b.csv", only_between), 0)


def test_duplicates_within_one_clients_training_text_are_allowed(tmp_path: Path) -> None:
    sites = open_sites(wards(tmp_path / "a.csv", TWICE.drop([1, 2])), 0)
    assert sorted(sites[1].train.prompts) == ["south only", "twice here", "twice here"]


def test_of_dropped_duplicates_a_test_row_stays_else_the_first(tmp_path: Path) -> None:
    division = divide(wards(tmp_path / "a.csv", duplicates="drop"), 0)
    north, south = division.sites
    assert north.train.prompts == ("same text", "north only")
    assert north.test.prompts == ("in BOTH",)
    assert south.train.prompts == ("twice here", "south only")
    assert south.test.prompts == ("south test",)
    assert division.left_out == LeftOut(duplicates=3, not_dealt=2)  # of the third ward, two rows


def test_a_seeded_test_split_follows_the_same_rule(tmp_path: Path) -> None:
    frame = table(40)
    frame.loc[20:, "text"] = frame["text"][:20].to_numpy()
    data = save(frame, tmp_path / "a.csv")
    with pytest.raises(BadValue, match="texts are in the training text of more than one client"):
        open_sites(data, 0)
    division = divide(replace(data, duplicates="drop"), 0)
    assert sorted(everything(list(division.sites))) == sorted(frame["text"][:20])
    assert division.left_out == LeftOut(duplicates=20)


def test_100_000_rows_are_divided(tmp_path: Path) -> None:
    frame = table(100_000)
    frame.loc[99_990:, "text"] = "note 0"
    data = replace(save(frame, tmp_path / "a.parquet"), clients=10, duplicates="drop", **DIRICHLET)
    division = divide(data, 0)
    assert division.left_out == LeftOut(duplicates=10)
    assert sum(len(site.train) + len(site.test) for site in division.sites) == 99_990


def test_a_client_whose_texts_are_all_at_another_one_is_named(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "text": ["a one", "b two", "c three", "a one", "b two", "d", "e", "f"],
            "label": ["flu"] * 8,
            "ward": ["h1"] * 3 + ["h2"] * 2 + ["h3"] * 3,
        }
    )
    data = replace(save(frame, tmp_path / "a.csv"), split="natural", client_column="ward", duplicates="drop", clients=3)
    with pytest.raises(BadValue, match="all texts of client 'h2' are at another one, too"):
        open_sites(data, 0)


def test_instructions_of_a_file_are_prompts_and_responses(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "source": ["b", "a", "a", "b", "a", "b"],
            "question": [f"what is thing {i} ?" for i in range(6)],
            "answer": ["Same", "same", "a long response", "1.5", "an answer", None],
        }
    )
    frame.to_csv(tmp_path / "q.csv", index=False)
    data = Data(
        str(tmp_path / "q.csv"),
        clients=2,
        task="instructions",
        text="question",
        response="answer",
        split="natural",
        client_column="source",
    )
    assert label_list(data) == ()
    division = divide(data, 0)
    assert division.left_out.incomplete == 1
    assert [len(s.train) + len(s.test) for s in division.sites] == [3, 2]
    held = pool([division.sites[0].train, division.sites[0].test])
    assert set(zip(held.prompts, held.answers, strict=True)) == {
        ("what is thing 1 ?", "same"),
        ("what is thing 2 ?", "a long response"),
        ("what is thing 4 ?", "an answer"),
    }
    assert "no response" in misfits(data, ())[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"task": "instructions", "labels": ("a",)}, "responses are not of a list"),
        ({"task": "instructions", "split": "dirichlet"}, "have none"),
        ({"response": "answer"}, 'task = "instructions"'),
        ({"planted": True}, "simulated world"),
    ],
)
def test_settings_of_another_task_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=said):
        Data("some.csv", **more)


def test_patients_of_a_world_have_several_of_the_same_notes() -> None:
    one = open_site(Data("world:hospitals", train_per_client=60, test_per_client=5), 2, 7)
    five = open_site(Data("world:hospitals", train_per_client=60, test_per_client=5, notes_per_patient=5), 2, 7)
    assert one.train.prompts == five.train.prompts
    assert one.train.units == tuple(range(60))
    counts = Counter(five.train.units or ())
    assert set(counts.values()) <= {1, 2, 3, 4, 5}
    assert 2 < len(five.train.prompts) / len(counts) < 4  # three each on average
    assert list(five.train.units or ()) == sorted(five.train.units or ())
    with pytest.raises(BadValue, match=r"a data file names its persons by data\.unit"):
        Data("notes.csv", notes_per_patient=3)


# --- Spellings --------------------------------------------------------------------------------------------------------


def test_persons_and_clients_that_are_merged_are_dealt_whole(tmp_path: Path) -> None:
    ids = [f"{('PAT', 'pat')[i % 2]}{i // 4:03}{' ' * (i % 4 // 2)}" for i in range(80)]
    data = save(table(80, patient=ids), tmp_path / "persons.csv")
    with pytest.raises(BadValue, match="20 persons of the column 'patient'"):
        open_sites(replace(data, unit="patient"), 1)
    sites = open_sites(replace(data, unit="patient", spellings="merge"), 1)
    units = [{*corpus.units} for site in sites for corpus in (site.train, site.test) if corpus.units]
    assert sorted(unit for own in units for unit in own) == [f"pat{i:03}" for i in range(20)]  # each in one place

    ids = [f"P{('-', chr(0x2013), chr(0x2212))[i % 3]}{i // 3}" for i in range(30)]  # as programs correct a dash
    with pytest.raises(BadValue, match="10 persons of the column 'patient'"):
        open_sites(replace(save(table(30, patient=ids), tmp_path / "dashes.csv"), unit="patient"), 1)

    wards = [("North", "north ", "South")[i % 3] for i in range(30)]
    data = replace(save(table(30, ward=wards), tmp_path / "wards.csv"), split="natural", client_column="ward")
    with pytest.raises(BadValue, match=r"1 clients of the column 'ward' .*'North' and 'north\\u0020'"):
        open_sites(data, 1)
    north, south = open_sites(replace(data, spellings="merge"), 1)
    assert (len(everything([north])), len(everything([south]))) == (20, 10)


@pytest.mark.parametrize("other", ["NOTE  3", "note 3\u200b", "n\uff4fte 3"])
def test_texts_that_are_the_same_are_duplicates_wherever_they_are(tmp_path: Path, other: str) -> None:
    frame = table(40)
    frame.loc[17, "text"] = other
    data = save(frame, tmp_path / "twice.csv")
    with pytest.raises(
        BadValue, match="1 texts are in the training text of more than one client, 0 in training"
    ) as told:
        open_sites(data, 3)
    assert "rows 4 and 18 (from 1, without the header)" in str(told.value)
    assert "note 3" not in str(told.value)
    with pytest.raises(BadValue, match="0 texts are in the training text of more than one client, 1 in training"):
        open_sites(data, 0)
    division = divide(replace(data, duplicates="drop"), 1)
    assert division.left_out.duplicates == 1
    assert "note 3" in everything(list(division.sites))


def test_spellings_need_a_column_to_be_about(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="name their column as unit or client_column"):
        Data("notes.csv", spellings="merge")
    with pytest.raises(BadValue, match=r"labels holds a class in several spellings: 'Flu' and 'flu'"):
        Data("notes.csv", labels=("Flu", "flu"))


def test_a_task_may_be_a_part_of_a_source_and_clients_rich_and_poor(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {"text": [f"text {i}" for i in range(120)], "label": [("a", "b", "c")[i % 3] for i in range(120)]}
    )
    rows.to_csv(tmp_path / "rows.csv", index=False)
    whole = Data(str(tmp_path / "rows.csv"), clients=2, labels=("a", "b"))
    assert {label for site in open_sites(whole, 0) for label in site.train.answers} == {"a", "b", "c"}
    assert "40 rows have a label that data.labels lacks" in misfits(whole, ("a", "b"))[0]
    part = replace(whole, unlisted="drop", per_label=(10, 3))
    assert misfits(part, ("a", "b")) == []
    rich, poor = open_sites(part, 0)
    assert rich.train.counts() == {"a": 10, "b": 10}
    assert poor.train.counts() == {"a": 3, "b": 3}
    assert set(rich.test.answers) | set(poor.test.answers) == {"a", "b"}
    assert open_sites(part, 0)[1].train.prompts == poor.train.prompts
    assert open_sites(replace(part, per_label=3), 0)[1].train.prompts == poor.train.prompts
    assert divide(part, 0).left_out.not_dealt == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"unlisted": "drop"}, 'unlisted = "drop" belongs to a data file'),
        ({"per_label": 0}, "per_label must be at least 1"),
        ({"per_label": (3,)}, "names 1 clients, data.clients is 2"),
        ({"per_label": 3, "unit": "person"}, "rows that are declared independent"),
    ],
)
def test_parts_that_cannot_be_meant_are_refused(more: Any, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        Data("rows.csv", clients=2, **more)


def pairs(tmp_path: Path, **more: Any) -> Data:
    """Six rows; the second lacks a premise, the third a hypothesis."""
    first = ["It rains.", None, "Snow {falls}.", "a", "b", "c"]
    frame = pd.DataFrame({"premise": first, "hypothesis": ["It is wet.", "x", " ", "d", "e", "f"], "label": "yes"})
    frame.to_json(tmp_path / "pairs.jsonl", orient="records", lines=True)
    return Data(str(tmp_path / "pairs.jsonl"), clients=1, text=("premise", "hypothesis"), **more)


@pytest.mark.parametrize("task", ["classification", "choice"])
def test_two_columns_become_one_text_and_half_a_pair_is_none(tmp_path: Path, task: Any) -> None:
    found = divide(pairs(tmp_path, task=task), 0)
    [site] = found.sites
    assert sorted(everything([site])) == ["It rains. | It is wet.", "a | d", "b | e", "c | f"]
    assert found.left_out.incomplete == 2
    [site] = divide(pairs(tmp_path, task=task, pair="P: {first} H: {second} {{}}"), 0).sites
    assert "P: It rains. H: It is wet. {}" in everything([site])


def test_a_pair_with_a_wrong_column_or_template_is_refused_by_name(tmp_path: Path) -> None:
    data = pairs(tmp_path)
    with pytest.raises(BadValue, match="no column 'premises'; it has 'premise', 'hypothesis', 'label'"):
        divide(replace(data, text=("premises", "hypothesis")), 0)
    for more, said in (
        ({"text": ("premise",)}, "one column, or two different ones for a pair, got \\['premise'\\]"),
        ({"text": ("premise", "premise")}, "two different ones"),
        ({"text": ("a", "b", "c")}, "two different ones"),
        ({"text": "premise", "pair": "{first} {second}"}, "data.text names one"),
        ({"pair": "{first}"}, r"data.pair lacks the slot \{second\}"),
        ({"pair": "{first} {second} {third}"}, r"data.pair has the unknown slot \{third\}"),
        ({"pair": "{first:>9} {second}"}, r"data.pair: the slot \{first\} takes no format"),
        ({"source": "world:hospitals"}, "a pair of columns belongs to data files"),
    ):
        with pytest.raises(BadValue, match=said):
            replace(data, **more)
