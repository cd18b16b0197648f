"""A classification read as instructions: questions, what is learnt of them, and accuracy by likelihood and by words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from inprocess import play
from scripted import ScriptedLLM

from fedsynth.clients.evaluate import evaluate
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.choice import as_instructions
from fedsynth.data.partition import ClientData
from fedsynth.deployment.invitation import public_labels
from fedsynth.evaluation.choice import likeliest, parsed_scores, said_choice
from fedsynth.federation.messages import Evaluate, Evaluated, measured
from fedsynth.federation.validation import Rejected, check_reply
from fedsynth.scenario.schema import Data
from fedsynth.scenario.task import LabelCard, Task, Templates
from fedsynth.scenario.toml import from_toml
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
    assert likeliest(llm, ["a", "b", "c"], [" x", " y z"]) == [1, 0, None]
    assert likeliest(llm, [], [" x"]) == []


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("It is about a LOST  card.", "a lost card"),
        ("a card", "a card"),
        ("a lost card, not a card", None),
        ("a PIN", None),
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
