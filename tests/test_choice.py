"""A classification read as instructions: questions, what is learnt of them, and accuracy by likelihood and by words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from inprocess import play

from fedsynth.clients.evaluate import evaluate
from fedsynth.corpus import Corpus, Provenance, pool
from fedsynth.data.choice import as_instructions
from fedsynth.data.partition import ClientData, class_list, divide, label_list, misfits
from fedsynth.deployment.invitation import public_labels
from fedsynth.evaluation.choice import likeliest, parsed_scores, said_choice, said_option
from fedsynth.federation.messages import Evaluate, Evaluated, measured
from fedsynth.federation.payload import BadPayload, encode
from fedsynth.federation.validation import Rejected, check_reply
from fedsynth.scenario.data import Data
from fedsynth.scenario.task import LabelCard, Task, Templates
from fedsynth.scenario.toml import from_toml
from fedsynth.testing import ScriptedLLM
from fedsynth.typed import BadValue

LABELS = ("lost", "pin")
CARD = Task(labels={"lost": LabelCard("a lost card")}, templates=Templates(choice="{text} Which of {wordings}?"))


def test_a_row_is_a_question_and_its_labels_wording_the_response() -> None:
    train = Corpus(("it is gone", "x", ""), ("lost", "other", "pin"), Provenance.PRIVATE, units=("a", "b", "c"))
    test = Corpus(("no idea", "y"), ("pin", "other"), Provenance.PRIVATE)
    found = as_instructions(ClientData(train, test), LABELS, CARD)
    # A row of an unlisted label, or without a text, holds its unit's place.
    assert found.train.prompts == ("it is gone Which of a lost card, pin?", "", "")
    assert found.train.answers == ("a lost card", "", "pin")
    assert found.train.units == ("a", "b", "c")
    # In a test row such a label is never found.
    assert found.test.prompts == ("no idea Which of a lost card, pin?", "y Which of a lost card, pin?")
    assert found.test.answers == ("pin", "")


def test_the_likeliest_wording_is_chosen_by_the_mean_over_its_tokens() -> None:
    means = {("a", " x"): -1.0, ("a", " y z"): -0.9, ("b", " x"): -1.0, ("b", " y z"): -1.0}
    means |= {("c", " x"): float("-inf"), ("c", " y z"): float("-inf")}
    llm = ScriptedLLM(likelihood=lambda prompt, reply: means[prompt, reply])
    assert likeliest(llm, ["a", "b", "c"], [[" x", " y z"]] * 3) == [1, 0, None]
    assert likeliest(llm, ["a", "b", "a"], [[" x"], [" y z", " x"], [" x", " y z"]]) == [0, 0, 1]
    assert likeliest(llm, [], []) == []


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("It is about a LOST  card.", "a lost card"),
        ("a card", "a card"),
        ("a lost card, not a card", None),
        ("a PIN", None),
        ("a cardboard box, and ana card", None),  # within other words
        ("a lost card.", "a lost card"),
        ("", None),
    ],
)
def test_a_response_is_read_if_it_holds_one_wording(response: str, found: str | None) -> None:
    assert said_choice(response, ["a card", "a lost card"]) == found


def test_an_answer_that_cannot_be_read_is_wrong() -> None:
    assert parsed_scores(["a", "b", "c", "d"], ["a", None, "b", None]) == {"parsed_accuracy": 0.25, "readable": 0.5}


SCENARIO = """
name = "choice"
rounds = 1
[strategy]
use = "fedsynth.strategies.lora_avg:LoraAverage"
[data]
source = "{file}"
task = "choice"
labels = ["lost", "pin"]
test = {{ column = "split", equals = "test" }}
clients = 2
[client]
generator = "assets:tiny-slm"
guarantee = "{guarantee}"
budget = {{ epsilon = 8.0 }}
generator_training = {{ expected_batch_size = 10, steps = 2, learning_rate = 1e-3, rank = 2, loss_on = "response" }}
answer_tokens = 8
[server]
llm = "assets:tiny-llm"
[arms.main]
[arms.zero]
strategy.use = "fedsynth.strategies.local:LocalOnly"
client.task_training.trains = "llm_zero_shot"
[task.templates]
choice = "{{text}} Which?"
"""


def scenario(tmp_path: Path, guarantee: str = "dp") -> str:
    rows = [("train", f"text {i} is gone", LABELS[i % 2]) for i in range(60)]
    rows += [("test", f"test {i} is gone", LABELS[i % 2]) for i in range(12)]
    pd.DataFrame(rows, columns=["split", "text", "label"]).to_csv(tmp_path / "rows.csv", index=False)
    return SCENARIO.format(file=tmp_path / "rows.csv", guarantee=guarantee)


@pytest.mark.full
def test_a_run_measures_the_same_accuracy_as_a_classifiers_and_that_of_what_is_written(tmp_path: Path) -> None:
    run = play(scenario(tmp_path), tmp_path, "main")
    client = run.client(0)
    assert (client.labels, client.choices) == ((), ("lost", "pin"))
    assert client.train.prompts[0].endswith("is gone Which?")
    found = evaluate(client).metrics
    assert set(found) == {"accuracy", "macro_f1", "parsed_accuracy", "readable"}
    truth = [x == y for x, y in zip(client.test.answers, ["lost"] * len(client.test), strict=True)]
    assert found["accuracy"] in (0.5, *(i / len(truth) for i in range(len(truth) + 1)))


def test_nothing_is_trained_where_the_model_is_asked_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = play(scenario(tmp_path), tmp_path, "zero")
    client = run.client(0)
    assert not (client.work / "adapter.payload").exists()

    class Knows(ScriptedLLM):
        def score(self, prompts: Any, continuations: Any) -> list[float]:
            asked = dict(zip(map(client.form.asked, client.test.prompts), client.test.answers, strict=True))
            return [
                0.0 if c == client.form.reply(asked[p]) else -1.0 for p, c in zip(prompts, continuations, strict=True)
            ]

    monkeypatch.setattr("fedsynth.clients.evaluate._writer", lambda *_: Knows(lambda _: " it is lost"))
    found = evaluate(client).metrics
    lost = client.test.answers.count("lost") / len(client.test)
    assert (found["accuracy"], found["macro_f1"]) == (1.0, 1.0)
    assert (found["parsed_accuracy"], found["readable"]) == (lost, 1.0)


def test_a_server_takes_these_figures_only_where_the_task_is_a_choice() -> None:
    request = Evaluate()
    whole = dict.fromkeys(measured(request, instructs=True, chooses=True), 0.5)
    check_reply(request, Evaluated(whole, 5), (), chooses=True)
    with pytest.raises(Rejected):
        check_reply(request, Evaluated(whole, 5), ())


def test_what_a_choice_is_not_for_is_refused_by_name(tmp_path: Path) -> None:
    toml = scenario(tmp_path)
    with pytest.raises(BadValue, match="compares methods in a simulation"):
        public_labels(Data("rows.csv", task="choice", labels=LABELS))
    with pytest.raises(BadValue, match='"llm_zero_shot" asks a language model which label'):
        from_toml(
            toml.replace('task = "choice"', 'task = "classification"').replace(
                "[client]", '[client]\ntask_model = "assets:tiny-encoder"\ntask_training.trains = "llm_zero_shot"'
            )
        )
    with pytest.raises(BadValue, match="tells labels, and instructions have none"):
        from_toml(toml.replace("[client]", '[client]\ntask_training.trains = "majority"'))
    assert replace(from_toml(toml).data, clients=1).task == "choice"


# --- Multiple choice: each row has its own options --------------------------------------------------------------------

ROWS: list[tuple[Any, Any, Any]] = [
    ("Which is a metal?", ["wood", "zinc", "wool"], "B"),
    ("Which is a metal?", ["iron", "bread"], "a"),  # the same question with other options is another one
    ("Which flies?", ["a crow", "a cow", 4, "a {crab}"], "D"),
    ("Which swims?", ["cod", "Cod "], "A"),  # two that are the same
    ("Which sings?", ["a bird"], "A"),
    ("Which runs?", ["a", "b"], "C"),
    ("Which reads?", None, "A"),
    ("", ["a", "b"], "A"),
]
WHOLE = {
    ("Which is a metal?", ("wood", "zinc", "wool"), "B"),
    ("Which is a metal?", ("iron", "bread"), "A"),
    ("Which flies?", ("a crow", "a cow", "4", "a {crab}"), "D"),
}


def held(data: Data) -> set[tuple[str, tuple[str, ...], str]]:
    """Questions, options and answers of one client's whole text."""
    [site] = divide(data, 0).sites
    both = pool([site.train, site.test])
    return set(zip(both.prompts, both.options or (), both.answers, strict=True))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_row_brings_its_own_options_in_a_list(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    rows = [(q, None if o is None else list(map(str, o)) if ending == "parquet" else o, a) for q, o, a in ROWS]
    frame = pd.DataFrame(rows, columns=["question", "choices", "answer"])
    if ending == "csv":
        frame["choices"] = [None if o is None else json.dumps(o) for o in frame["choices"]]
        frame.to_csv(path, index=False)
    elif ending == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    data = Data(str(path), clients=1, task="choice", text="question", label="answer", options=("choices",))
    assert held(data) == WHOLE
    assert (class_list(data), label_list(data)) == ((), ())
    assert "5 of 8 rows have no text or no answer among its options: they are left out" in misfits(data, ())[0]
    with pytest.raises(BadValue, match=r"'answer' as the text of one of its options \(choices\)"):
        divide(replace(data, answer_as="text"), 0)


@pytest.mark.parametrize(("how", "answers"), [("text", ["Zinc", "iron", "a {crab}"]), ("index", [1, 0, 3])])
def test_options_may_stand_in_columns_and_the_answer_be_a_text_or_an_index(
    tmp_path: Path, how: Any, answers: list[Any]
) -> None:
    options = [[*o, None, None][:4] for _, o, _ in ROWS[:3]]
    rows = [[q, *o, a] for (q, _, _), o, a in zip(ROWS, options, answers, strict=False)]
    rows.append(["Which has a gap?", "x", None, "y", None, answers[0]])
    rows.append(["Which is beyond?", "x", "y", None, None, "z" if how == "text" else 2])
    pd.DataFrame(rows, columns=["text", "a", "b", "c", "d", "label"]).to_json(
        tmp_path / "rows.jsonl", orient="records", lines=True
    )
    data = Data(str(tmp_path / "rows.jsonl"), clients=1, task="choice", options=("a", "b", "c", "d"), answer_as=how)
    assert held(data) == WHOLE


def test_the_same_question_with_the_same_options_is_a_duplicate(tmp_path: Path) -> None:
    rows = [("Which?", json.dumps(own), "A") for own in (["a", "b"], ["c", "d"], ["A", "b"], ["e", "f"])]
    pd.DataFrame(rows, columns=["text", "o", "label"]).to_csv(tmp_path / "rows.csv", index=False)
    data = Data(str(tmp_path / "rows.csv"), clients=1, task="choice", options=("o",), duplicates="drop")
    assert divide(data, 0).left_out.duplicates == 1
    assert len(held(data)) == 3


def test_options_are_lettered_lines_of_the_question_and_never_leave() -> None:
    card = Task(templates=Templates(options="{text}\n{options}\nWhich?"))
    rows = Corpus(("Metal? ", "Flies?"), ("B", "A"), Provenance.PRIVATE, options=(("{wood}", "zinc"), ("a crow", "ox")))
    found = as_instructions(ClientData(rows, rows.take([1])), (), card)
    assert found.train.prompts == ("Metal?\nA. {wood}\nB. zinc\nWhich?", "Flies?\nA. a crow\nB. ox\nWhich?")
    assert found.train.answers == ("B", "A")
    assert found.test.options == (("a crow", "ox"),)
    with pytest.raises(ValueError, match="options belong to private corpora only"):
        replace(rows, provenance=Provenance.PUBLIC)
    with pytest.raises(BadPayload, match="units, options or attributes"):
        encode(rows)
    with pytest.raises(BadValue, match=r"task.templates.options lacks the slot \{options\}"):
        Templates(options="{text}")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        (" (b) zinc", "B"),
        ("**B**", "B"),
        ("B. zinc", "B"),
        ("B\nbecause zinc is a metal", "B"),
        ("I think the answer is B.", "B"),
        ("The answer: (B)", "B"),
        ("It is zinc.", "B"),
        ("A cow is no metal, zinc is", "B"),  # an article is no letter
        ("A. The answer is B.", None),
        ("D.", None),
        ("wood or zinc", None),
        ("woody, woolly", None),
        ("", None),
    ],
)
def test_an_answer_is_read_by_its_letter_else_by_an_options_text(response: str, letter: str | None) -> None:
    assert said_option(response, ("wood", "zinc", "wool")) == letter


def with_options(tmp_path: Path) -> str:
    """Half of the questions have two options, half three; the right one is the last."""
    own = [["no", f"yes {i}", "this"][: 2 + i % 2] for i in range(72)]
    rows = [
        ("test" if i >= 60 else "train", f"Which of number {i}?", json.dumps(o), "ABC"[len(o) - 1])
        for i, o in enumerate(own)
    ]
    pd.DataFrame(rows, columns=["split", "text", "choices", "label"]).to_csv(tmp_path / "rows.csv", index=False)
    toml = SCENARIO.format(file=tmp_path / "rows.csv", guarantee="dp")
    return toml.replace('labels = ["lost", "pin"]', 'options = ["choices"]').replace(
        'choice = "{text} Which?"', 'options = "{text} {options}"'
    )


@pytest.mark.full
def test_a_run_measures_the_likeliest_of_each_rows_own_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = play(with_options(tmp_path), tmp_path, "main").client(0)
    assert (client.labels, client.choices) == ((), ())
    assert "? A. no\nB. yes " in client.train.prompts[0]
    assert set(evaluate(client).metrics) == {"accuracy", "macro_f1", "parsed_accuracy", "readable"}
    asked: list[tuple[Any, Any]] = []

    class Last(ScriptedLLM):
        """Finds the last letter of a question likeliest, and always writes B."""

        def score(self, prompts: Any, continuations: Any) -> list[float]:
            asked.extend(zip(prompts, continuations, strict=True))
            return [float(ord(c.strip()[-1])) for c in continuations]

    monkeypatch.setattr("fedsynth.clients.evaluate._writer", lambda *_: Last(lambda _: " B."))
    found = evaluate(client).metrics
    options = client.test.options or ()
    assert len(asked) == sum(map(len, options))
    assert {len(own) for own in options} == {2, 3}
    two = sum(len(own) == 2 for own in options) / len(options)
    assert found == {"accuracy": 1.0, "macro_f1": 1.0, "parsed_accuracy": two, "readable": 1.0}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"task": "classification"}, 'options are columns of a data file with task = "choice"'),
        ({"source": "world:hospitals"}, "options are columns of a data file"),
        ({"labels": ("a", "b")}, "with options each row brings its own"),
        ({"per_label": 3}, "with options each row brings its own"),
        ({"split": "dirichlet"}, "goes by label, and options have none"),
        ({"options": ("a", "a")}, "names a column twice"),
        ({"options": (), "answer_as": "text"}, "name their columns as options"),
    ],
)
def test_what_options_are_not_for_is_refused_by_name(more: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=said):
        replace(Data("rows.csv", task="choice", options=("a", "b")), **more)
