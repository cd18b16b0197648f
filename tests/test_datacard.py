from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd

from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.card import MEASURED, SIMULATED, card_line, data_card, data_cards
from fedsynth.data.partition import ClientData, LeftOut
from fedsynth.federation.run.directory import prepare
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.privacy_report import _assumptions
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, from_toml


def corpus(*rows: tuple[str, str], units: tuple[int, ...] | None = None) -> Corpus:
    return Corpus(tuple(r[0] for r in rows), tuple(r[1] for r in rows), Provenance.PRIVATE, units=units)


SITES = [
    ClientData(
        corpus(("a b", "flu"), ("A  b", "flu"), ("c d e f", "asthma"), ("g", "other"), units=(1, 1, 2, 3)),
        corpus(("t t", "flu")),
    ),
    ClientData(corpus(("a b", "asthma"), ("h i j", "asthma")), corpus(("h I j", "asthma"), ("u", "flu"))),
]


def test_every_figure_of_a_card_by_hand() -> None:
    card = data_card(SITES, ("flu", "asthma", "measles"), LeftOut(incomplete=2, duplicates=1, over_limit=5))
    assert card == {
        "clients": [
            {
                "train": 4,
                "test": 1,
                "units": 3,
                "labels": {"flu": 2, "asthma": 1},
                "labels_present": 2,
                "other": 1,
                "words": {"min": 1, "median": 2.0, "p95": 4, "max": 4},
                "duplicates": 1,
            },
            {
                "train": 2,
                "test": 2,
                "units": 2,
                "labels": {"asthma": 2},
                "labels_present": 1,
                "words": {"min": 2, "median": 2.5, "p95": 3, "max": 3},
                "duplicates": 0,
            },
        ],
        "total": {
            "train": 6,
            "test": 3,
            "units": 5,
            "classes": 3,
            "words": {"min": 1, "median": 2.0, "p95": 4, "max": 4},
            "left_out": {"incomplete": 2, "duplicates": 1, "not_dealt": 0, "over_limit": 5},
            "duplicates": {"between_clients": 1, "train_and_test": 1},
        },
    }
    assert json.loads(json.dumps(card)) == card


def test_p95_is_the_length_that_95_of_100_texts_do_not_exceed() -> None:
    lengths = [1] * 95 + [7] * 5
    card = data_card([ClientData(corpus(*((" ".join("w" * n), "x") for n in lengths)), corpus(("t", "x")))], ("x",))
    assert card["clients"][0]["words"] == {"min": 1, "median": 1.0, "p95": 1, "max": 7}


def test_lengths_are_in_words_of_the_script() -> None:
    card = data_card([ClientData(corpus(("心が痛い", "x"), ("ผมปวด, b/c", "x")), corpus(("t", "x")))], ("x",))
    assert card["clients"][0]["words"] == {"min": 4, "median": 5.5, "p95": 7, "max": 7}  # a character each; b and c


def test_the_line_gives_ranges_over_clients_and_seeds() -> None:
    one = data_card(SITES, ("flu", "asthma"))
    other = data_card(SITES[:1], ("flu", "asthma"), LeftOut(duplicates=4))
    assert card_line({"cards": [one]}) == (
        "data: 2 clients, 2-4 training and 1-2 test texts, 2 labels (1-2 per client), 2 words in the median, "
        "0 duplicates dropped"
    )
    assert card_line({"cards": [one, other]}).startswith("data: 1-2 clients, ")
    assert card_line({"cards": [one, other]}).endswith(" 0-4 duplicates dropped")


def scenario(data: str, arms: str = "") -> Scenario:
    return from_toml(
        f'name = "own"\nseeds = [0, 3]\n[strategy]\nuse = "json:B"\n[data]\n{data}\n[client]\ngenerator = "a"\n'
        f'task_model = "a"\nguarantee = "none"\n[server]\nllm = "a"\n{arms}'
    )


def test_a_card_per_seed_and_per_way_of_dividing(tmp_path: Path) -> None:
    rows = {"text": [f"note {i}" for i in range(20)], "label": ["flu", "asthma"] * 10}
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    asked = scenario(
        f'source = "{tmp_path / "a.csv"}"\nclients = 2',
        "[arms.one]\n[arms.pooled]\ndata.pooled = true\n[arms.few]\ndata.limit = 3\n",
    )
    cards = data_cards(asked)
    assert cards["origin"] == MEASURED
    assert [(c["seed"], c["arms"], [x["train"] for x in c["clients"]]) for c in cards["cards"]] == [
        (0, ["one", "pooled"], [8, 8]),
        (0, ["few"], [3, 3]),
        (3, ["one", "pooled"], [8, 8]),
        (3, ["few"], [3, 3]),
    ]
    assert "note" not in json.dumps(cards)  # figures, no text


def test_a_simulated_world_says_so() -> None:
    cards = data_cards(scenario('source = "world:hospitals"\nclients = 1\ntrain_per_client = 5\ntest_per_client = 4'))
    assert cards["origin"] == SIMULATED
    assert [(c["total"]["train"], c["total"]["test"]) for c in cards["cards"]] == [(5, 4), (5, 4)]


def test_the_cards_lie_beside_the_directory_that_people_share(tmp_path: Path) -> None:
    asked = scenario('source = "world:hospitals"\nclients = 1\ntrain_per_client = 5\ntest_per_client = 4')
    asked = replace(asked, client=replace(asked.client, generator="assets:tiny-slm", task_model="assets:tiny-slm"))
    model = "assets:tiny-slm"
    asked = replace(asked, strategy=replace(asked.strategy, use="fedsynth.strategies.local:LocalOnly"))
    client = replace(asked.client, generator=model, task_model=model)
    cards = prepare(replace(asked, server=replace(asked.server, llm=model), client=client), tmp_path / "run")
    assert json.loads((tmp_path / "run.private" / "data.json").read_text()) == cards == data_cards(asked)


def test_the_privacy_line_names_dropped_duplicates(tmp_path: Path) -> None:
    said = {}
    for duplicates in ("refuse", "drop"):
        asked = scenario(f'source = "a.csv"\nlabels = ["x"]\nduplicates = "{duplicates}"')
        said[duplicates] = _assumptions([RunLog(cells(asked)[0], tmp_path, tmp_path / "events")])
    assert said["refuse"] == "; number of records read from the data by the simulator, a site would declare them"
    assert said["drop"] == said["refuse"] + "; duplicates dropped across clients by the simulator, no site could"
