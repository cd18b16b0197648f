"""Baselines and schedules of a client's task model, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from safetensors.torch import load_file

import fedsynth.clients.learn as at_client
from fedsynth.clients.batched_training import together
from fedsynth.clients.client_side import EVERYTHING, ClientSide
from fedsynth.clients.evaluate import answers, evaluate
from fedsynth.clients.learn import WEIGHTS, NoTaskModel, learn
from fedsynth.clients.synthesize import synthesize
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import ClientData
from fedsynth.federation.messages import Learn, Synthesize
from fedsynth.forecast.profiling import Unit
from fedsynth.forecast.work import WORK, Facts
from fedsynth.models.embedding import Embedder
from fedsynth.models.loading import load_tokenizer
from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.plan import Budget
from fedsynth.privacy.release import NotReleasable
from fedsynth.scenario.client import SHOTS, Client, TaskTraining
from fedsynth.scenario.task import LabelCard, Task, parted
from fedsynth.training.baselines import Majority, Nearest
from fedsynth.training.classifier import classify
from fedsynth.typed import BadValue

LABELS = ("flu", "cold", "burn")


class ByHand(Embedder):
    """Texts are written with their vectors: "3 4" has the direction (.6, .8)."""

    def __init__(self) -> None:
        self.tokenizer, self.width = load_tokenizer(tiny.folder()), 2

    def embed(self, texts: Sequence[str], *, longest: int | None = None) -> NDArray[np.float32]:
        return np.array([list(map(float, text.split())) for text in texts], np.float32).reshape(-1, 2)


def corpus(*rows: tuple[str, str], provenance: Provenance = Provenance.PRIVATE) -> Corpus:
    return Corpus(tuple(text for text, _ in rows), tuple(label for _, label in rows), provenance)


def said(model: Majority | Nearest, *texts: str) -> list[str]:
    return [LABELS[place] for place in classify(model, None, texts, 8)]


# ---- Baselines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learnt", "commonest"),
    [
        (["burn", "flu", "burn"], "burn"),
        (["cold", "burn", "burn", "cold"], "cold"),  # equally many: the first of the list, whichever came first
        (["burn", "cold", "burn", "cold"], "cold"),
        (["x", "x", "x", "burn"], "burn"),  # on nobody's list
        ([], "flu"),
    ],
)
def test_the_majority_is_the_commonest_label_and_the_first_of_equals(learnt: list[str], commonest: str) -> None:
    model = Majority(3)
    model.learn(corpus(*(("text", label) for label in learnt)), LABELS, 8, 0)
    assert said(model, "anything", "else") == [commonest] * 2
    assert said(model) == []


def test_the_nearest_text_is_that_of_the_smallest_angle() -> None:
    model = Nearest(ByHand(), 3, SHOTS)
    model.learn(corpus(("1 0", "flu"), ("30 40", "cold"), ("0 1", "cold")), LABELS, 8, 0)
    # (2, 1) is at 27 degrees: 27 from flu, 27 and 63 from cold's; a scalar product would say cold, whose text is long.
    assert said(model, "20 9") == ["flu"]
    assert said(model, "20 11", "1 9") == ["cold", "cold"]
    # The mean of cold's texts is at 72 degrees: at 35 it would be 37 away, and flu's nearer.
    assert said(model, "82 57") == ["cold"]
    cosines = model.logits(["20 9"], 8)[0]
    length = (20**2 + 9**2) ** 0.5
    assert cosines.tolist() == pytest.approx([20 / length, (0.6 * 20 + 0.8 * 9) / length, -2.0])


def test_a_label_without_a_text_is_never_said_and_equals_are_the_first_label() -> None:
    model = Nearest(ByHand(), 3, SHOTS)
    model.learn(corpus(("1 0", "burn"), ("1 0", "cold"), ("-1 0", "x")), LABELS, 8, 0)
    assert said(model, "-1 0", "1 0") == ["cold", "cold"]
    assert (model.logits(["-1 0"], 8)[0, 0] < -1).item()


def test_at_most_five_texts_of_a_label_are_drawn_and_a_seed_says_which() -> None:
    many = corpus(*((f"{n} 1", "cold") for n in range(20)), ("0 1", "flu"))

    def drawn(seed: int) -> set[int]:
        model = Nearest(ByHand(), 3, SHOTS)
        model.learn(many, LABELS, 8, seed)
        assert model.there.sum(1).tolist() == [1, 5, 0]
        return {round(float(x / y)) for x, y in model.vectors[1]}

    assert drawn(3) == drawn(3)
    assert len(drawn(3)) == 5
    assert drawn(3) != drawn(4)


def test_a_label_is_put_into_words() -> None:
    assert parted("activate_my_card") == "activate my card"
    assert parted("top-up__failed") == "top up failed"
    assert parted("Heart") == "Heart"
    assert parted("_") == "_"


# ---- At a client -----------------------------------------------------------------------------------------------------


PRIVATE = corpus(("1 0", "flu"), ("0 1", "cold"), ("1 0", "flu"))
SENT = corpus(("0 1", "cold"), ("0.6 0.8", "burn"), provenance=Provenance.PUBLIC)


def client(folder: Path, task: TaskTraining, train: Corpus | None = PRIVATE, *, simulated: bool = True) -> ClientSide:
    """Its text cannot be opened where there is none."""

    def opened() -> ClientData:
        assert train is not None, "private text was read"
        return ClientData(train, corpus(("1 0", "flu"), ("0 1", "cold"), ("9 10", "burn")))

    config = Client(tiny.folder(), tiny.folder(), guarantee="none", task_training=task)
    ledger = Ledger(folder / "ledger.sqlite", Account("ward", None))
    words = Task(labels={y: LabelCard(x) for y, x in (("flu", "1 0"), ("cold", "0 1"), ("burn", "0.6 0.8"))})
    return ClientSide(0, config, LABELS, 3, 1, "row", folder, "run", ledger, opened, simulated, task=words)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = ByHand()
    monkeypatch.setattr("fedsynth.training.classifier.shared_embedder", lambda _: embedder)


def shown(folder: Path, task: TaskTraining, sent: Corpus | None) -> list[tuple[tuple[str, ...], int, int]]:
    """Text, passes and seed of each training."""
    found = []

    def noted(model: Any, tokenizer: Any, text: Corpus, *_: Any, epochs: int, seed: int, **__: Any) -> None:
        found.append((text.prompts, epochs, seed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at_client, "fit_classifier", noted)
        learn(client(folder, task, None if task.schedule == "synthetic_only" else PRIVATE), Learn(7, sent))
    return found


def test_each_schedule_passes_over_private_text_as_often_with_the_same_seed(tmp_path: Path) -> None:
    own, sent = PRIVATE.prompts, SENT.prompts
    both = TaskTraining(trains="head", augmented_epochs=2, private_epochs=5)
    assert shown(tmp_path, both, SENT) == [(sent, 2, 7), (own, 5, 8)]
    mixed = replace(both, schedule="mixed")
    assert shown(tmp_path, mixed, SENT) == [(own + sent, 5, 8)]
    for nothing in (None, SENT.take([])):
        assert shown(tmp_path, mixed, nothing) == shown(tmp_path, both, nothing) == [(own, 5, 8)]
    # And no private text is opened for it:
    assert shown(tmp_path, replace(both, schedule="synthetic_only"), SENT) == [(sent, 2, 7)]


def test_synthetic_text_alone_without_any_is_refused_before_work(tmp_path: Path) -> None:
    alone = TaskTraining(trains="head", schedule="synthetic_only")
    for nothing in (None, SENT.take([])):
        with pytest.raises(NoTaskModel, match="the server sent no text"):
            learn(client(tmp_path, alone, None), Learn(7, nothing))
    assert not (tmp_path / WEIGHTS).exists()


def head(folder: Path, schedule: Any, **more: Any) -> dict[str, list[Any]]:
    task = TaskTraining(
        batch=2, trains="head", schedule=schedule, private_epochs=1, augmented_epochs=1, learning_rate=0.5, **more
    )
    own, sent = corpus(("1 0", "flu")), corpus(("0 1", "cold"), provenance=Provenance.PUBLIC)
    learn(client(folder, task, own), Learn(7, sent))
    return {name: tensor.tolist() for name, tensor in load_file(folder / WEIGHTS).items()}


def test_a_mixed_step_on_two_texts_by_hand(tmp_path: Path) -> None:
    # Text 1, private, is sqrt(2) (1, 0) with label 1; text 2 is sqrt(2) (0, 1) with label 2. From zero each label has
    # the probability 1/3. The gradient of a weight is the mean of (p - y) x over both, of a bias that of (p - y); the
    # first step of Adam is the rate times its sign, and the rate is .5 / 10 in a first step.
    step = 0.05
    found = head(tmp_path, "mixed")
    assert found["head.weight"] == [
        pytest.approx(row, rel=1e-4) for row in ([step, -step], [-step, step], [-step, -step])
    ]
    # Bias: flu (-2/3 + 1/3) / 2, cold the same, burn (1/3 + 1/3) / 2.
    assert found["head.bias"] == pytest.approx([step, step, -step], rel=1e-4)


def test_a_text_weighs_as_much_as_a_model_of_private_text_agrees_by_hand(tmp_path: Path) -> None:
    # The model of private text alone takes one step: bias (.05, -.05, -.05). Text 2 shares no coordinate with text 1:
    # its label 2 has the probability exp(-.05) / (exp(.05) + 2 exp(-.05)) = .322. The gradient of cold's bias is then
    # (1/3 - .322 * 2/3) / 2 > 0: it falls, where it rises with equal weights.
    step = 0.05
    assert head(tmp_path, "mixed", weights="agreement")["head.bias"] == pytest.approx([step, -step, -step], rel=1e-4)
    weights = at_client._agreement(
        client(
            tmp_path, TaskTraining(batch=2, trains="head", private_epochs=1, learning_rate=0.5), corpus(("1 0", "flu"))
        ),
        corpus(("0 1", "cold"), provenance=Provenance.PUBLIC),
        7,
    )
    assert weights == [1.0, pytest.approx(1 / (2 + math.exp(0.1)), rel=1e-4)]


@pytest.mark.parametrize("task", [{"schedule": "sequential"}, {"schedule": "mixed", "trains": "zero_shot"}])
def test_weights_belong_to_a_model_that_learns_both_at_once(task: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match="belongs to schedule"):
        TaskTraining(weights="agreement", **task)


def test_one_after_the_other_is_not_mixed(tmp_path: Path) -> None:
    # Two trainings of one step each. The second has an optimizer of its own: cold's bias goes up, then down by as much.
    found = head(tmp_path, "sequential")
    assert found["head.bias"][1] == pytest.approx(0.0, abs=1e-3)
    assert found["head.bias"][2] == pytest.approx(-0.1, rel=1e-2)


@pytest.mark.parametrize(
    ("trains", "expected"),
    [
        ("majority", ["flu", "flu", "flu"]),
        ("few_shot", ["flu", "cold", "cold"]),  # no private text of burn
        ("zero_shot", ["flu", "cold", "burn"]),
    ],
)
def test_a_baseline_learns_and_answers_after_a_reload(tmp_path: Path, trains: Any, expected: list[str]) -> None:
    task = TaskTraining(trains=trains, schedule="synthetic_only")  # a schedule is of what is trained
    here = client(tmp_path, task)
    learn(here, Learn(7))
    assert answers(here, ["1 0", "0 1", "9 10"]) == expected
    assert set(evaluate(here).metrics) == {"accuracy", "macro_f1"}
    assert evaluate(here).metrics["accuracy"] == pytest.approx(
        sum(a == b for a, b in zip(expected, ("flu", "cold", "burn"), strict=True)) / 3
    )


def test_wordings_are_read_without_private_text(tmp_path: Path) -> None:
    learn(client(tmp_path, TaskTraining(trains="zero_shot"), None), Learn(7))
    assert load_file(tmp_path / WEIGHTS)["vectors"][:, 0].tolist() == [
        pytest.approx(row) for row in ([1.0, 0.0], [0.0, 1.0], [0.6, 0.8])
    ]


# ---- True texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("simulated", "guarantee"), [(False, "none"), (True, "dp")])
def test_true_texts_are_given_by_simulated_clients_without_a_guarantee_alone(
    tmp_path: Path, simulated: bool, guarantee: Any
) -> None:
    asking = Synthesize(per_label=1, temperature=0.8, top_p=0.95, max_new_tokens=10, seed=3, true_texts=True)
    everything = replace(client(tmp_path, TaskTraining(), None, simulated=simulated), allowed=EVERYTHING)
    config = replace(everything.config, guarantee=guarantee, budget=Budget(8.0))
    with pytest.raises(NotReleasable, match="simulated clients without a guarantee"):
        together([synthesize(replace(everything, config=config), asking, "digest")])
    assert everything.ledger.entries() == []


# ---- What is foreseen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "kind", "expected"),
    [
        ({}, "fit", 2 * 6 + 3 * 15),
        ({"schedule": "mixed"}, "fit", (2 + 3) * 15),
        ({"schedule": "mixed", "weights": "agreement"}, "fit", (2 + 3) * 15 + 3 * 15),
        ({"schedule": "synthetic_only"}, "fit", 2 * 6),
        ({"trains": "head"}, "read", 2 + 3),
        ({"trains": "head", "schedule": "mixed"}, "read", 2 + 3),
        ({"trains": "head", "schedule": "synthetic_only"}, "read", 2),
        ({"trains": "few_shot"}, "read", 3),
        ({"trains": "zero_shot"}, "read", 3),
    ],
)
def test_what_each_schedule_learns_is_foreseen(task: dict[str, Any], kind: Any, expected: int) -> None:
    of = Facts("main", Client("g", "t", guarantee="none", task_training=TaskTraining(**task)), LABELS, 3, 3, 9)
    assert WORK[Learn](Learn(7, SENT), of) == {Unit(kind, "main"): expected}


@pytest.mark.parametrize(
    ("schedule", "sent", "steps"),
    [
        ("sequential", SENT, 2 * 60),
        ("sequential", None, 60),
        ("mixed", SENT, 60 * 5 / 3),
        ("mixed", None, 60),
        ("synthetic_only", SENT, 60),
    ],
)
def test_what_each_schedule_learns_of_instructions_is_foreseen(
    schedule: Any, sent: Corpus | None, steps: float
) -> None:
    task = TaskTraining(schedule=schedule)
    of = Facts("main", Client("g", "t", guarantee="none", task_training=task), (), 3, 3, 9)
    assert WORK[Learn](Learn(7, sent), of) == {Unit("own_step", "main"): pytest.approx(steps)}


def test_the_majority_reads_nothing() -> None:
    of = Facts(
        "main", Client("g", "t", guarantee="none", task_training=TaskTraining(trains="majority")), LABELS, 3, 3, 9
    )
    assert WORK[Learn](Learn(7), of) == {}
