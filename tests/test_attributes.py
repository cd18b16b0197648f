"""Control codes with attributes of a text beside its label: public values, asked alike, empty slots for all others."""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from inprocess import Played, play
from spelled import spelled
from test_site_rows import asked, client, imported, told
from test_site_rows import rows as lines_of
from test_site_rows import scenario as site_scenario
from typer.testing import CliRunner

import fedsynth.clients.synthesize
from fedsynth.cli.main import app
from fedsynth.clients.client_side import NotAllowed, WrongData, WrongLabels, cell_of
from fedsynth.corpus import Corpus, Provenance, pool
from fedsynth.data import rowstore
from fedsynth.data.partition import divide, unlisted_values
from fedsynth.data.sources import SiteData, gathered
from fedsynth.deployment.invitation import Invitation, planned
from fedsynth.deployment.site.init import template
from fedsynth.deployment.site.rows import check_rows, import_rows
from fedsynth.federation.messages import Learn, Refused, Synthesize
from fedsynth.federation.payload import BadPayload, encode
from fedsynth.forecast.profiling import Unit, _work
from fedsynth.models.encoding import token_ids
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.privacy.noise import data_mac
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.scenario.task import AttributeCard, LabelCard, Task, Templates
from fedsynth.scenario.toml import cells, from_toml, to_toml
from fedsynth.simulation.simulate import check
from fedsynth.synthesis.augmentation import Demonstrating
from fedsynth.synthesis.curation import Filtered, keep_rows
from fedsynth.synthesis.writing import Curation, write_combinations
from fedsynth.testing import ScriptedLLM
from fedsynth.training.examples import check_room, encode_slots
from fedsynth.typed import BadValue, build, plain

STARS = AttributeCard({"1": "one star", "3": "three stars", "5": "five stars"})
SHOP = AttributeCard({"web": "bought on the web", "till": "bought in a shop"})
LABELS = ("food", "music")
CARD = Task(noun="a review", labels={"food": LabelCard("food and drink")}, attributes={"stars": STARS, "shop": SHOP})
LONG = GeneratorTraining(max_length=120)

SCENARIO = """
name = "reviews"
[strategy]
use = "fedsynth.strategies.fdkt:FDKT"
per_label = 4
min_words = 1
num_texts = 6
draft_tokens = 8
judge = "none"
[data]
source = "{file}"
labels = ["food", "music"]
attributes = ["stars"]
clients = 2
[client]
generator = "{model}"
task_model = "{model}"
budget = {{ epsilon = 8.0 }}
generator_training = {{ expected_batch_size = 4, steps = 2, rank = 2, alpha = 4.0, max_length = 96 }}
task_training = {{ augmented_epochs = 1, private_epochs = 1, max_length = 16 }}
[server]
llm = "scripted"
[task]
noun = "a review"
[task.attributes.stars.values]
"1" = "one star"
"3" = "three stars"
"5" = "five stars"
[arms.main]
"""
CANARY = "zq7731canary"


def written(tmp_path: Path, stars: Sequence[str] = ("1", "3", "5", "5")) -> str:
    """A scenario on forty reviews, one of them with a value that no list has, and one without a value."""
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "stars"])
        for i in range(40):
            value = CANARY if i == 6 else "" if i == 9 else stars[i % len(stars)]
            rows.writerow([f"what I think of thing {i}", LABELS[i % 2], value])
    return SCENARIO.format(file=tmp_path / "reviews.csv", model=tiny.folder())


def own(rows: Sequence[tuple[str, str, tuple[str, ...]]]) -> Corpus:
    """Private texts: text, label, values of shop and stars."""
    texts, labels, values = zip(*rows, strict=True)
    return Corpus(texts, labels, Provenance.PRIVATE, units=tuple(range(len(rows))), attributes=values)


# --- Codes ------------------------------------------------------------------------------------------------------------


def test_a_code_tells_the_label_and_a_value_of_each_attribute() -> None:
    assert CARD.columns == ("shop", "stars")  # by name: neither the card nor a table decides
    assert CARD.combinations == [(a, b) for a in ("web", "till") for b in ("1", "3", "5")]
    assert CARD.codes("food") == [
        "a review about food and drink, bought on the web, one star:",
        "a review about food and drink, bought on the web, three stars:",
        "a review about food and drink, bought on the web, five stars:",
        "a review about food and drink, bought in a shop, one star:",
        "a review about food and drink, bought in a shop, three stars:",
        "a review about food and drink, bought in a shop, five stars:",
    ]
    assert CARD.codes(*LABELS) == [*CARD.codes("food"), *CARD.codes("music")]
    other = replace(CARD, attributes={"shop": SHOP, "stars": STARS})
    assert other.codes(*LABELS) == CARD.codes(*LABELS)
    assert Task(attributes={"stars": STARS}).code("pop_music", ["5"]) == "pop_music, five stars:"


def test_a_template_shows_each_attribute_and_an_llm_reads_the_label_alone() -> None:
    card = replace(CARD, templates=Templates(generator="[{stars}|{shop}] {noun}: {wording}."))
    assert card.code("food", ("till", "3")) == "[three stars|bought in a shop] a review: food and drink."
    assert card.code("food") == CARD.code("food") == "a review about food and drink:"
    sentinels = {"1": "QA", "2": "QB"}
    marked = Task(attributes={"stars": AttributeCard(sentinels)}, templates=Templates(generator="{label} {stars}"))
    assert marked.codes("x") == ["x QA", "x QB"]


def test_values_are_listed_in_any_spelling_and_others_are_not() -> None:
    assert CARD.listed((" WEB", "5")) == ("web", "5")
    for values in (("web", ""), ("web", "4"), ("", "5"), ("web", "5.0")):
        assert CARD.listed(values) is None
    with pytest.raises(ValueError, match="zip"):
        CARD.listed(("web",))
    assert Task().listed(()) == ()
    assert Task().combinations == [()]


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"attributes": {"stars": {"values": {"1": "one star"}}}}, r"from 2 to 50 values, got 1"),
        ({"attributes": {"stars": {"values": {str(i): f"v{i}" for i in range(51)}}}}, r"from 2 to 50 values, got 51"),
        ({"attributes": {"stars": {"values": {"1": "a", "2": "A"}}}}, "two values have the wording 'a'"),
        ({"attributes": {"stars": {"values": {"web": "a", "Web": "b"}}}}, "in several spellings: 'Web' and 'web'"),
        ({"attributes": {"stars": {"values": {"1": "a\nb", "2": "c"}}}}, r"stars.values.1 must stand in one line"),
        ({"attributes": {"stars": {"values": {"": "a", "2": "c"}}}}, r"a value of task.attributes.stars.values must"),
        ({"attributes": {"a.b": {"values": {"1": "a", "2": "c"}}}}, "'a.b' must be a slot of a template"),
        ({"attributes": {"noun": {"values": {"1": "a", "2": "c"}}}}, r"\{noun\} is a slot of its own"),
        ({"attributes": {c: {"values": {"1": "a", "2": "b"}} for c in "wxyz"}}, "4 columns: 3 at most"),
        ({"attributes": {c: {"values": {str(i): f"v{i}" for i in range(32)}} for c in "xy"}}, "are 1,024, 1,000 at"),
        ({"templates": {"generator": "{wording} {stars}:"}}, r"has the unknown slot \{stars\}"),
        (
            {"attributes": {"stars": plain(STARS)}, "templates": {"generator": "{wording}:"}},
            r"task.templates.generator lacks the slot \{stars\}",
        ),
        (
            {"attributes": {"stars": plain(STARS)}, "templates": {"generator": "{label} {stars:>99}:"}},
            r"the slot \{stars\} takes no format",
        ),
    ],
)
def test_a_card_whose_attributes_cannot_be_meant_is_refused(card: Any, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        build(Task, card, "task")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('["stars"]', "[]", r"data.attributes names \[\], the card has values for \['stars'\]"),
        ('["stars"]', '["stars", "shop"]', r"names \['shop', 'stars'\], the card has values for \['stars'\]"),
        ('["stars"]', '["stars", "stars"]', "names a column twice"),
        ('["stars"]', '["label"]', "names 'label', the column of the text, the label or the person"),
        ("per_label = 4", "per_label = 2", "2 drafts of a label leave out some of the 3 combinations"),
        ('labels = ["food", "music"]', f"labels = {[f'l{i}' for i in range(334)]}", "334 labels with 3 combinations"),
        ("clients = 2", 'clients = 2\ntask = "choice"', 'attributes are columns of a data file with task = "class'),
    ],
)
def test_a_scenario_whose_columns_and_card_do_not_agree_is_refused(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    toml = written(tmp_path)
    assert old in toml
    with pytest.raises(BadValue, match=said):
        check(from_toml(toml.replace(old, new, 1)))


def test_an_arm_may_add_an_attribute(tmp_path: Path) -> None:
    whole, key = written(tmp_path).replace('attributes = ["stars"]\n', ""), "[task.attributes.stars.values]\n"
    head, values = whole.replace("[arms.main]\n", "").split(key)
    own_arm = f'data.attributes = ["stars"]\n[arms.stars.task.attributes.stars.values]\n{values}'
    first, second = cells(from_toml(to_toml(from_toml(f"{head}[arms.plain]\n[arms.stars]\n{own_arm}"))))
    assert first.scenario.task.codes("food") == ["a review about food:"]
    assert second.scenario.task.codes("food")[2] == "a review about food, five stars:"


# --- Slots ------------------------------------------------------------------------------------------------------------

ROWS = [
    ("good bread", "food", ("web", "5")),
    ("no stars", "food", ("web", "")),
    ("many stars", "food", ("web", "6")),
    ("no such label", "dance", ("web", "5")),
    ("loud", "music", ("till", "1")),
]


def slots(rows: Sequence[Any], task: Task = CARD, records: int = 7) -> list[Any]:
    return encode_slots(load_tokenizer(tiny.folder()), own(rows), LABELS, records, LONG, task=task)


def head_of(example: Any) -> str:
    return str(load_tokenizer(tiny.folder()).decode(example.tokens[1 : example.start]))


def test_a_row_with_an_unlisted_value_is_an_empty_slot_in_its_place_as_with_an_unlisted_label() -> None:
    found = slots(ROWS)
    assert [len(slot) for slot in found] == [1, 0, 0, 0, 1, 0, 0]
    assert head_of(found[0][0]) == "a review about food and drink, bought on the web, five stars:"
    assert head_of(found[4][0]) == "a review about music, bought in a shop, one star:"
    relabelled = [(text, "dance" if i in (1, 2) else y, ("web", "5")) for i, (text, y, _) in enumerate(ROWS)]
    assert [len(slot) for slot in slots(relabelled)] == [len(slot) for slot in found]
    moved_up = [row for row in ROWS if CARD.listed(row[2])]  # broken: what is left out of the table leaves its place
    assert [len(slot) for slot in slots(moved_up)] != [len(slot) for slot in found]
    # A row's values change its own slot, and no other.
    for row, (text, label, _) in enumerate(ROWS):
        changed = slots([*ROWS[:row], (text, label, ("till", "3")), *ROWS[row + 1 :]])
        assert [a == b for i, (a, b) in enumerate(zip(changed, found, strict=True)) if i != row] == [True] * 6
    with pytest.raises(ValueError, match="the card has the attributes shop, stars, this text has none"):
        encode_slots(load_tokenizer(tiny.folder()), replace(own(ROWS), attributes=None), LABELS, 7, LONG, task=CARD)


def test_rows_are_divided_and_counted_as_without_attributes(tmp_path: Path) -> None:
    data = from_toml(written(tmp_path)).data
    with_values, without = divide(data, 0), divide(replace(data, attributes=()), 0)
    assert with_values.left_out == without.left_out
    for own_site, bare in zip(with_values.sites, without.sites, strict=True):
        assert own_site.train.attributes is not None
        assert replace(own_site.train, attributes=None) == bare.train
        assert replace(own_site.test, attributes=None) == bare.test
    values = Counter(v for s in with_values.sites for (v,) in (*(s.train.attributes or ()), *(s.test.attributes or ())))
    assert values == {"1": 10, "3": 9, "5": 19, "": 1, CANARY: 1}
    both = pool([site.train for site in with_values.sites])
    assert both.attributes == tuple(v for site in with_values.sites for v in site.train.attributes or ())
    assert both.take([3, 0]).attributes == (both.attributes[3], both.attributes[0])


def test_the_researcher_is_told_of_values_that_do_not_fit(tmp_path: Path) -> None:
    scenario = from_toml(written(tmp_path).replace('"scripted"', f'"{tiny.folder()}"'))
    data, card = scenario.data, scenario.task
    said = "\n".join(unlisted_values(data, LABELS, card))
    assert "2 rows have a value of 'stars' that task.attributes.stars.values lacks" in said
    assert f"{CANARY!r} 1" in said
    assert said in "\n".join(check(scenario))
    more = {**card.attributes["stars"].values, "2": "two stars"}
    assert "no row has the value '2' of task.attributes.stars.values" in unlisted_values(
        data, LABELS, replace(card, attributes={"stars": AttributeCard(more)})
    )
    none = replace(card, attributes={"stars": AttributeCard({"*": "one star", "**": "two stars"})})
    with pytest.raises(BadValue, match=r"no training row has listed values of all attributes: 40 rows have a value of"):
        unlisted_values(data, LABELS, none)
    renamed = replace(card, attributes={"Stars": card.attributes["stars"]})
    with pytest.raises(BadValue, match=r"reviews.csv: no column 'Stars'; it has 'text', 'label', 'stars'"):
        check(replace(scenario, data=replace(data, attributes=("Stars",)), task=renamed))


# --- What a grant is bound to -----------------------------------------------------------------------------------------


def test_without_attributes_digests_are_what_they_were(tmp_path: Path) -> None:
    toml = written(tmp_path).replace('attributes = ["stars"]\n', "").split("[task.attributes")[0] + "[arms.main]\n"
    site = imported(tmp_path / "site", lines_of())
    side = replace(client(site, site_scenario()), task=from_toml(toml).task, labels=LABELS)
    settings = {
        "training": plain(side.config.generator_training),
        "labels": ["food", "music"],
        "unit": "person",
        "codes": ["a review about food:", "a review about music:"],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    assert side.binding("order", side.plan()).version.endswith(f" {digest}")

    corpus = Corpus(("a", "b"), ("x", "y"), Provenance.PRIVATE, units=(0, 1))
    mac = hmac.new(bytes(32), digestmod=hashlib.sha256)
    for column in (("a", "b"), ("x", "y"), ("0", "1")):
        mac.update(len(column).to_bytes(8, "big"))
        for text in column:
            mac.update(len(text).to_bytes(8, "big") + text.encode())
    assert data_mac(bytes(32), corpus) == mac.hexdigest()
    not_read = ("attributes", "database_env", "labels", "records", "spellings")
    facts = {key: value for key, value in plain(site.site.data).items() if key not in not_read}
    assert site.site.data.digest == hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def test_a_grant_is_bound_to_codes_listed_values_and_the_rows_own_values(tmp_path: Path) -> None:
    cell = cell_of(to_toml(from_toml(written(tmp_path))), "main", 0)
    side = Played(cell, None, None, tmp_path / "run").client(0)  # type: ignore[arg-type]  # nothing ran

    def bound(task: Task) -> str:
        return replace(side, task=task).binding("order", side.plan()).version

    stars = side.task.attributes["stars"].values
    reworded = {**stars, "5": "all stars"}
    relisted = {("5.0" if value == "5" else value): wording for value, wording in stars.items()}  # the same codes
    found = [bound(replace(side.task, attributes={"stars": AttributeCard(v)})) for v in (stars, reworded, relisted)]
    assert found[0] == bound(side.task)
    assert len(set(found)) == 3

    values = side.train.attributes or ()
    edited = replace(side.train, attributes=(("3",) if values[0] != ("3",) else ("1",), *values[1:]))
    macs = {data_mac(bytes(32), c) for c in (side.train, edited, replace(side.train, attributes=None))}
    assert len(macs) == 3


def test_no_text_with_attributes_is_written_to_a_payload() -> None:
    with pytest.raises(BadPayload, match="with units, options or attributes"):
        encode(Learn(0, replace(own(ROWS), units=None)))
    public = Corpus(("a",), ("x",), Provenance.PUBLIC, attributes=(("1",),))
    with pytest.raises(BadPayload, match="with units, options or attributes"):
        encode(Learn(0, public))
    with pytest.raises(ValueError, match="attributes belong to private corpora only, this one is dp_synthetic"):
        Corpus(("a",), ("x",), Provenance.DP_SYNTHETIC, grants=("g",), attributes=(("1",),))


# --- Rounds -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of each client's generator; it writes a short text after each."""
    found: list[list[str]] = []

    def complete(_: LocalLLM, prompts: Sequence[Any], *__: Any, **___: Any) -> list[str]:
        found.append(list(prompts))
        return [f"a {i}" for i in range(len(prompts))]

    monkeypatch.setattr(LocalLLM, "complete", complete)
    return found


IN_TURN = [
    "a review about food, one star:",
    "a review about food, three stars:",
    "a review about food, five stars:",
    "a review about food, one star:",
    "a review about music, one star:",
    "a review about music, three stars:",
    "a review about music, five stars:",
    "a review about music, one star:",
]


@pytest.mark.parametrize("stars", [("1", "3", "5", "5"), ("5",)])
def test_every_client_is_asked_for_all_combinations_alike_whatever_its_rows_hold(
    tmp_path: Path, heard: list[list[str]], stars: Sequence[str]
) -> None:
    played = play(written(tmp_path, stars), tmp_path, llm=ScriptedLLM(), measures=False)
    assert heard == [IN_TURN, IN_TURN]
    for reply in played.replies(Synthesize):
        assert reply.corpus.attributes is None
        assert reply.corpus.answers == ("food",) * 4 + ("music",) * 4
        assert CANARY not in spelled(reply)
        assert "star" not in spelled(reply)
    assert all("star" not in spelled(request) for request in played.requests(Learn))
    assert CANARY in spelled(played.client(0).train) + spelled(played.client(1).train)  # it is there to be found


def test_the_check_of_turns_finds_a_client_that_asks_by_its_own_shares(
    tmp_path: Path, heard: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedsynth.clients.synthesize, "turns", lambda codes, count: [codes[2]] * count)
    play(written(tmp_path), tmp_path, llm=ScriptedLLM(), measures=False)
    assert heard != [IN_TURN, IN_TURN]


def test_a_forecast_takes_steps_and_writes_after_all_codes(tmp_path: Path, heard: list[list[str]]) -> None:
    cell = cell_of(to_toml(from_toml(written(tmp_path))), "main", 0)
    learnt: list[Any] = []

    def noted(tokenizer: Any, corpus: Corpus, *rest: Any, **more: Any) -> list[Any]:
        learnt.append(corpus.attributes)
        return encode_slots(tokenizer, corpus, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsynth.training.examples.encode_slots", noted)
        step, _ = _work(cell, Unit("step", "main"), [5] * 10)
    step(1)
    assert learnt[0][:4] == (("1",), ("3",), ("5",), ("1",))
    write, _ = _work(cell, Unit("sample", "main", tokens=8, temperature=1.0), [5] * 10)
    write(6)
    assert heard == [[*IN_TURN[:3], *IN_TURN[4:7]]]


def test_room_is_checked_for_the_longest_code() -> None:
    tokenizer, model = load_tokenizer(tiny.folder()), tiny.model()
    longest = max(CARD.codes(*LABELS), key=len)
    size = len(token_ids(tokenizer, longest)) + 1
    check_room(tokenizer, model, LABELS, size + 2, CARD)
    with pytest.raises(ValueError, match=f"control code '{longest}' has {size} tokens"):
        check_room(tokenizer, model, LABELS, size + 1, CARD)


def test_zero_shot_texts_are_asked_by_combination_and_start_generators_under_their_codes() -> None:
    count = iter(range(99))
    llm = ScriptedLLM(answer=lambda prompt: f" text number {next(count)}")
    how = Demonstrating("none", 1, SamplingParams(temperature=1.0, max_new_tokens=8))
    seen: list[Corpus] = []

    def only_music(corpus: Corpus) -> Filtered:
        seen.append(corpus)
        return keep_rows(corpus, [None if label == "music" else "another label is nearer" for label in corpus.answers])

    card = Task(noun="a review", attributes={"stars": STARS})
    asked_for: Any = {"num_texts": 6, "seeds": [0], "task": card, "name": "zero_shot"}
    found = write_combinations(llm, -1, how, Curation(LABELS, 1, False), **asked_for)
    assert llm.completed[0] == [
        f"a review about {label}, {words}:" for words in ("one star", "three stars", "five stars") for label in LABELS
    ]
    assert found.corpus.answers == LABELS * 3
    assert found.corpus.attributes == (("1",), ("1",), ("3",), ("3",), ("5",), ("5",))
    assert found.corpus.provenance is Provenance.PUBLIC
    learnt = encode_slots(load_tokenizer(tiny.folder()), found.corpus, LABELS, 6, LONG, task=card)
    assert [head_of(example) for (example,) in learnt] == llm.completed[0]

    checked = write_combinations(llm, -1, how, Curation(LABELS, 1, False, only_music), **asked_for)
    assert seen[0].answers == LABELS * 3  # a check sees labels, not combinations
    assert checked.corpus.answers == ("music",) * 3
    assert checked.corpus.attributes == (("1",), ("3",), ("5",))
    assert [(name, stage.lost) for name, stage in checked.steps][-1] == ("zero_shot_fitting", ("food",))
    assert all(set(stage.corpus.answers) <= set(LABELS) for _, stage in checked.steps)


def test_a_warm_start_and_zero_shot_texts_beside_drafts_work_with_attributes(
    tmp_path: Path, heard: list[list[str]]
) -> None:
    toml = written(tmp_path).replace("max_length = 96", "max_length = 96, warm_start = { epochs = 1 }")
    count = iter(range(999))
    llm = ScriptedLLM(answer=lambda prompt: f" written {next(count)}")
    played = play(toml.replace("min_words = 1", "min_words = 1\nzero_shot = true"), tmp_path, llm=llm, measures=False)
    assert len(set(llm.completed[0])) == 6
    assert all(", " in prompt for prompt in llm.completed[0])
    starts = [request.start for request in played.requests(Synthesize)]
    assert any(np.abs(a).max() > 1e-4 for n, a in starts[0].arrays.items() if "lora_B" in n)
    assert heard == [IN_TURN, IN_TURN]
    assert all(request.corpus.attributes is None for request in played.requests(Learn))


# --- Sites ------------------------------------------------------------------------------------------------------------

VALUES = {"stars": ("1", "5")}


def starred(values: Sequence[str] = ("1", "5", "", "2")) -> list[bytes]:
    found = [json.loads(line) for line in lines_of()]
    return [json.dumps({**row, "stars": values[i % len(values)]}).encode() for i, row in enumerate(found)]


def site_toml(values: Sequence[str] = ("1", "5")) -> str:
    lines = "\n".join(f'"{value}" = "star {value}"' for value in values)
    toml = site_scenario().replace("clients = 1", 'clients = 1\nattributes = ["stars"]')
    return toml.replace("[arms.main]", f"[task.attributes.stars.values]\n{lines}\n[arms.main]")


def test_a_site_learns_from_rows_with_listed_values_and_the_others_keep_their_places(tmp_path: Path) -> None:
    site = imported(tmp_path, starred(), attributes=VALUES)
    stored = rowstore.read(site.rows, site.open_ledger().mac_key)
    assert [record.attributes for record in stored][:4] == [("1",), ("5",), ("",), ("2",)]
    side = client(site, site_toml())
    assert side.train.attributes == tuple((("1", "5", "", "2")[i % 4],) for i in range(9))
    found = encode_slots(load_tokenizer(tiny.folder()), side.train, side.labels, side.records, LONG, task=side.task)
    assert [len(slot) for slot in found] == [1, 1, 0, 0, 1, 1, 0, 0, 1]
    # Without attributes in the scenario, the same rows are text and label alone.
    assert client(site, site_scenario()).train == client(imported(tmp_path / "b", lines_of()), site_scenario()).train


def test_an_operator_is_told_of_a_missing_column_and_of_unlisted_values(tmp_path: Path) -> None:
    lacks = "4 rows have a value of 'stars' that data.attributes.stars lacks ('' 2, '2' 2)"
    assert lacks in "\n".join(told(imported(tmp_path / "a", starred(), attributes=VALUES)))
    without = "\n".join(told(imported(tmp_path / "b", lines_of(), attributes=VALUES)))  # JSONL has no header
    assert "9 rows have a value of 'stars' that data.attributes.stars lacks ('' 9)" in without
    assert "no row has the value '1', '5' of data.attributes.stars" in without
    written(tmp_path)
    facts: Any = {"source": "reviews.csv", "independent_rows": True, "records": 5, "labels": LABELS}
    with pytest.raises(BadValue, match=r"reviews.csv: no column 'shop'; it has 'text', 'label', 'stars'"):
        gathered(SiteData(id="n", attributes={"shop": ("web", "till")}, **facts), tmp_path)


def test_a_site_refuses_attributes_that_it_does_not_list(tmp_path: Path) -> None:
    plain_site = imported(tmp_path / "a", starred())
    site = imported(tmp_path / "b", starred(), attributes=VALUES)
    assert isinstance(client(plain_site, site_toml()).rules.objection, WrongData)
    assert isinstance(client(site, site_toml(("1", "5", "2"))).rules.objection, WrongLabels)
    assert isinstance(client(site, site_toml(("1", "2"))).rules.objection, WrongLabels)
    three = imported(tmp_path / "c", starred(), attributes={"stars": ("1", "5", "2")})
    assert isinstance(client(three, site_toml()).rules.objection, WrongLabels)
    assert client(site, site_toml(("5", "1"))).rules.objection is None
    assert client(site, site_scenario()).rules.objection is None
    assert isinstance(asked(plain_site, Learn(0), site_toml()), Refused)


def test_rows_that_were_stored_without_the_column_are_imported_again(tmp_path: Path) -> None:
    site = imported(tmp_path, starred())
    lines = site.rows.read_bytes().splitlines()[:-1]
    cut = [json.dumps(json.loads(line)[:4]).encode() for line in lines[1:]]  # as an earlier version wrote them
    body = b"".join(line + b"\n" for line in [lines[0].replace(b'"format": 3', b'"format": 2'), *cut])
    key = site.open_ledger().mac_key
    site.rows.write_bytes(body + rowstore._mac(key, rowstore._STORED, body).encode() + b"\n")
    check_rows(site)
    assert client(site, site_scenario()).train.prompts[0] == "note 0"
    named = replace(site, site=replace(site.site, data=replace(site.site.data, attributes=VALUES)))
    assert isinstance(client(named, site_toml()).rules.objection, NotAllowed)
    with pytest.raises(BadValue, match=r"no rows have been imported as \[data\] of site.toml declares them"):
        check_rows(named)
    list(import_rows(named))
    check_rows(named)
    longer = replace(named.site.data, attributes={"stars": ("1", "5", "2")})
    other = replace(named, site=replace(named.site, data=longer))
    check_rows(other)  # a list of values is no part of reading


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"attributes": {"stars": ("1",)}}, "data.attributes.stars must list two values or more"),
        ({"attributes": {"stars": ("a", "A ")}}, "data.attributes.stars must list two values or more, each once"),
        ({"attributes": {"text": ("1", "2")}}, "data.text and data.attributes.text both name the column 'text'"),
        ({"attributes": {"stars": ("1", "2")}, "task": "instructions", "labels": ()}, 'belongs to task = "classific'),
    ],
)
def test_a_site_whose_attributes_cannot_be_meant_is_refused(more: Any, said: str) -> None:
    facts = {"id": "n", "source": "n.csv", "independent_rows": True, "records": 5, "labels": LABELS, **more}
    with pytest.raises(BadValue, match=said):
        SiteData(**facts)


def test_an_invitation_brings_the_lists_into_site_toml(tmp_path: Path) -> None:
    facts = planned(from_toml(written(tmp_path)))
    assert facts.attributes == {"stars": ("1", "3", "5")}
    text = template("north", Invitation("127.0.0.1:9443", "ca", facts))
    assert tomllib.loads(text)["data"]["attributes"] == {"stars": ["1", "3", "5"]}
    bare = template("north", Invitation("127.0.0.1:9443", "ca", replace(facts, attributes={})))
    assert bare == text.replace('attributes.stars = [\n    "1",\n    "3",\n    "5",\n]\n', "")
    several = written(tmp_path) + '[arms.more.task.attributes.stars.values]\n"4" = "four stars"\n'
    with pytest.raises(BadValue, match=r"arms list different values of task\.attributes\.stars"):
        planned(from_toml(several))


def test_a_first_card_proposes_the_values_of_a_column(tmp_path: Path) -> None:
    written(tmp_path)
    shown = CliRunner().invoke(app, ["card", str(tmp_path / "reviews.csv"), "--attributes", "stars"])
    assert shown.exit_code == 0, shown.output
    card = build(Task, tomllib.loads(shown.output)["task"], "task")
    assert card.codes("food")[0] == "food, stars 1:"
    assert list(card.attributes["stars"].values) == ["1", "3", "5", CANARY]
    failed = CliRunner().invoke(app, ["card", str(tmp_path / "reviews.csv"), "--attributes", "text"])
    assert failed.exit_code != 0
