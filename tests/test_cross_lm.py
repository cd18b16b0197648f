"""CrossLM in process: who sends what, what the LLM learns from it, and what each protection of scores costs."""

from __future__ import annotations

import ast
import copy
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from inprocess import Played, canary, play
from resuming import dies_everywhere
from spelled import spelled

from fedsynth.clients import score as score_module
from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.score import RECEIPT, protected, protected_whole
from fedsynth.corpus import Corpus, Provenance, Scores
from fedsynth.dpsgd import clipper
from fedsynth.evaluation.attack import auroc
from fedsynth.federation.availability import fates
from fedsynth.federation.messages import Evaluate, Learn, Score, Scored
from fedsynth.federation.nodes import TooFewReplies, nodes_by_client
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.privacy_report import guarantee_of, privacy_line
from fedsynth.federation.strategy import Clients, load_strategy
from fedsynth.federation.summing import added
from fedsynth.lora import Adapter
from fedsynth.models.adapters import load_adapter, new_adapter, public_adapter, read_adapter, save_adapter, with_adapter
from fedsynth.models.hub import locate_adapter, weights_hash
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_generator, load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.pretraining.public_text import labelled
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.ledger import GrantUsed
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import Budget, epsilon
from fedsynth.privacy.skellam import UNIT
from fedsynth.scenario.client import Client, GeneratorTraining, TaskTraining, Tuning
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.server import Endpoint, PublicTest, Server
from fedsynth.scenario.task import Task
from fedsynth.scenario.toml import cells, from_toml, load
from fedsynth.simulation.simulate import check
from fedsynth.strategies.cross_lm import CrossLM
from fedsynth.strategies.options import CrossLMOptions
from fedsynth.synthesis import reward_tuning
from fedsynth.synthesis.reward_tuning import (
    Measures,
    Teaching,
    fit,
    label_accuracy,
    ranked,
    shuffled,
    taught,
)
from fedsynth.training.classifier import (
    confidences,
    fit_classifier,
    label_losses,
    label_slots,
    new_scorer,
    new_task_model,
)
from fedsynth.training.dp_training import clipped_sum, next_token_losses, trainable
from fedsynth.training.engine import Engine
from fedsynth.training.examples import encode_slots, encode_text
from fedsynth.training.sft import Guard, Steps, dpo, perplexity, sft
from fedsynth.typed import BadValue
from fedsynth.world import load_world, main_facts, private_notes, site, told_labels, write_note
from world_adapters import WRONG, mislabelled, mislabelled_notes

torch.set_num_threads(1)
LABELS = ("heart", "skin")
LETTERS = {"heart": "abcd", "skin": "wxyz"}  # a text of a label has these letters alone
ROUNDS = 2

SCENARIO = """
name = "tiny"
rounds = {rounds}
[strategy]
use = "fedsynth.strategies.cross_lm:CrossLM"
num_texts = 80
min_words = 1
max_new_tokens = 14
[strategy.teaching]
tuning = {{ epochs = 6, batch = 8, learning_rate = 1e-2, rank = 4, alpha = 8.0, max_length = 32 }}
measured = 60
[data]
source = "{file}"
labels = ["heart", "skin"]
clients = 3
[client]
generator = "{slm}"
task_model = "{slm}"
guarantee = "none"
budget = {{ epsilon = 8.0 }}
scorer_training = {{ expected_batch_size = 8, steps = 3, learning_rate = 1e-2, rank = 2, alpha = 4.0 }}
task_training = {{ augmented_epochs = 2, private_epochs = 8, learning_rate = 5e-3, head_rate = 5.0, batch = 8 }}
[server]
llm = "{llm}"
public = "{public}"
[arms.main]
[arms.shuffled]
strategy.feedback = "shuffled"
[arms.zerogen]
strategy.feedback = "none"
[arms.filter]
strategy.teaching.update = "none"
[arms.dpo]
strategy.teaching.update = "preference"
strategy.teaching.tuning.learning_rate = 2e-3
[arms.dp]
client.guarantee = "dp"
[arms.noise]
client.guarantee = "dp"
client.scores = "noise"
[arms.summed]
client.guarantee = "dp"
client.scores = "noise"
client.secure_sum = {{ clients = 3, dropouts = 1 }}
[arms.hetero]
client.task_models = ["{bert}", "{slm}"]
"""


def words(label: str, rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(LETTERS[label]), 8))


def right(corpus: Corpus) -> float:
    """Share of the texts in the letters of their label."""
    return float(
        np.mean(
            [set(x.replace(" ", "")) <= set(LETTERS[y]) for x, y in zip(corpus.prompts, corpus.answers, strict=True)]
        )
    )


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Writes texts of either kind, whatever label it is asked for: all that it lacks is what the clients know."""

    def notes(tokenizer: Any, rng: np.random.Generator) -> list[Any]:
        kinds = [LABELS[k] for k in rng.integers(2, size=24)]
        corpus = Corpus(
            tuple(words(k, rng) for k in kinds), tuple(LABELS[k] for k in rng.integers(2, size=24)), Provenance.PUBLIC
        )
        return [
            e for slot in encode_slots(tokenizer, corpus, LABELS, 24, GeneratorTraining(max_length=32)) for e in slot
        ]

    return tiny.taught(tmp_path_factory.mktemp("llm"), notes, steps=200, rate=5e-3)


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, llm: str) -> str:
    rng = np.random.default_rng(1)
    rows = 120
    labels = [LABELS[i % 2] for i in range(rows)]
    frame = pd.DataFrame({"text": [f"{words(y, rng)} {canary(i)}" for i, y in enumerate(labels)], "label": labels})
    place = tmp_path_factory.mktemp("data")
    frame.to_csv(place / "notes.csv", index=False)
    public = pd.DataFrame([(words(y, rng), y) for y in LABELS * 30] + [("abc", "other")], columns=["text", "label"])
    public.to_csv(place / "public.csv", index=False)
    return SCENARIO.format(
        rounds=ROUNDS,
        file=place / "notes.csv",
        public=place / "public.csv",
        slm=tiny.folder(),
        llm=llm,
        bert=families.folder("bert"),
    )


class Runs:
    """Each arm runs once, when it is first looked at."""

    def __init__(self, toml: str, llm: str, place: Path) -> None:
        self.toml, self.llm, self.place = toml, LocalLLM.load(llm, batch_size=256), place
        self.done: dict[str, Played] = {}

    def __getitem__(self, arm: str) -> Played:
        if arm not in self.done:
            self.done[arm] = play(self.toml, self.place / arm, arm, llm=self.llm)
        return self.done[arm]


@pytest.fixture(scope="module")
def runs(toml: str, llm: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(toml, llm, tmp_path_factory.mktemp("runs"))


def end(run: Played, llm: str) -> Corpus:
    """What the LLM writes after the last round."""
    writer = LocalLLM.load(llm, adapter=run.states[-1].adapter, batch_size=256)
    asked = [y for y in LABELS for _ in range(60)]
    texts = writer.complete([f"{y}:" for y in asked], SamplingParams(temperature=1.0, max_new_tokens=14), seed=77)
    return Corpus(tuple(t.strip() for t in texts), tuple(asked), Provenance.PUBLIC)


# What crosses (METHODS 3.6.1)


def test_texts_and_labels_go_down_and_numbers_of_the_same_count_come_up(runs: Runs) -> None:
    run = runs["main"]
    requests, answers = run.requests(Score), run.replies(Score)
    assert len(requests) == len(answers) == 3 * ROUNDS
    for request, answer in zip(requests, answers, strict=True):
        assert set(vars(answer)) == {"scores", "statement"}
        assert len(answer.scores.values) == len(request.corpus)
        assert all(isinstance(v, float) and 0 <= v <= 1 for v in answer.scores.values)
    kinds = {m.metadata.message_type for m in run.grid.requests} - {"query.who"}
    assert kinds == {Score.task, Learn.task, Evaluate.task}  # no adapters, no gradients, no text of a client


def test_no_private_word_crosses(runs: Runs) -> None:
    run = runs["main"]
    crossed = b"".join(
        m.content["fedsynth"]["payload"] for m in [*run.grid.requests, *run.grid.replies] if "fedsynth" in m.content
    )
    assert not [i for i in range(120) if canary(i).encode() in crossed]
    assert any(canary(i) in spelled(run.client(0).train) for i in range(120))  # they are there to be found


def test_a_round_is_learn_score_learn_and_the_first_learns_private_text_alone(runs: Runs) -> None:
    run = runs["main"]
    tasks = [m.metadata.message_type for m in run.grid.requests if m.content.get("fedsynth")]
    one = [Score.task] * 3 + [Learn.task] * 3 + [Evaluate.task] * 3
    assert tasks == [Learn.task] * 3 + one * ROUNDS
    given = [request.corpus for request in run.requests(Learn)]
    assert given[:3] == [None] * 3
    assert given[3] == run.states[0].corpus


def test_clients_are_given_the_best_share_of_each_label_and_keep_what_they_had(runs: Runs) -> None:
    run = runs["main"]
    first, second = (state.corpus for state in run.states)
    asked = run.requests(Score)[0].corpus
    assert first.counts() == {y: max(1, round(0.35 * n)) for y, n in asked.counts().items()}
    assert second.prompts[: len(first)] == first.prompts
    scores = added([reply.scores for reply in run.replies(Score)[:3]]).values
    for label in LABELS:
        kept = [
            s for s, x, y in zip(scores, asked.prompts, asked.answers, strict=True) if y == label and x in first.prompts
        ]
        left = [
            s
            for s, x, y in zip(scores, asked.prompts, asked.answers, strict=True)
            if y == label and x not in first.prompts
        ]
        assert min(kept) >= max(left)


# What the LLM learns (METHODS 3.6.3)


def test_the_llm_learns_what_only_the_clients_know(runs: Runs, llm: str) -> None:
    run = runs["main"]
    assert 0.35 < right(run.requests(Score)[0].corpus) < 0.65
    assert right(run.requests(Score)[-1].corpus) > 0.7
    assert right(end(run, llm)) > 0.85
    assert any(array.any() for name, array in run.states[0].adapter.arrays.items() if "lora_B" in name)


def test_with_shuffled_scores_it_does_not(runs: Runs, llm: str) -> None:
    run = runs["shuffled"]
    assert any(array.any() for name, array in run.states[-1].adapter.arrays.items() if "lora_B" in name)  # it is tuned
    assert right(end(run, llm)) < 0.65


def test_preferences_teach_it_too(runs: Runs, llm: str) -> None:
    assert right(end(runs["dpo"], llm)) > 0.7


def test_without_feedback_nobody_is_asked_and_the_llm_stays_as_it_is(runs: Runs) -> None:
    run = runs["zerogen"]
    assert {m.metadata.message_type for m in run.grid.requests} - {"query.who"} == {Learn.task, Evaluate.task}
    assert len(run.requests(Learn)) == 3 * ROUNDS
    assert run.states[-1].adapter is None
    assert run.states[-1].corpus.provenance is Provenance.PUBLIC
    assert guarantee_of([run.run_log]) == "dp"
    assert "nothing derived from private text leaves" in privacy_line([run.run_log])
    assert not run.metric("general/perplexity")


def test_a_filter_alone_leaves_the_llm_as_it_is(runs: Runs) -> None:
    run = runs["filter"]
    assert run.states[-1].adapter is None
    assert 0.35 < right(run.requests(Score)[-1].corpus) < 0.65
    assert right(run.states[-1].corpus) > 0.7


def test_general_ability_and_label_accuracy_are_reported_each_round(runs: Runs) -> None:
    run = runs["main"]
    before, after = run.metric("general/perplexity_before"), run.metric("general/perplexity")
    assert (len(before), len(after)) == (1, ROUNDS)  # before a later round it is as after the one before
    assert {client for _, _, _, client, metric, _ in run.run_log.rows if metric == "general/perplexity"} == {-1}
    assert len(run.metric("llm/agreement_on_chosen")) == len(run.metric("scores/sum")) == ROUNDS
    folder = run.out / "adapters" / "main" / "seed-0" / f"round-{ROUNDS}-llm"
    assert (
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        == runs.llm.tokenizer.name_or_path
    )


def test_how_often_the_llm_tells_a_label_is_measured_on_public_texts_that_no_score_chose(runs: Runs, llm: str) -> None:
    run = runs["main"]
    before, after = run.metric("llm/test_accuracy_before"), run.metric("llm/test_accuracy")
    assert len(before) == 1
    assert 0.3 < before[0] < 0.7
    assert after[-1] > 0.9
    tests = labelled(PublicTest(run.cell.scenario.server.public), LABELS, 200, 3)
    assert tests.counts() == {"heart": 30, "skin": 30}  # all of the file that are of the list, in any order
    last = LocalLLM.load(llm, adapter=run.states[-1].adapter, batch_size=256)
    assert label_accuracy(last, tests, LABELS) == pytest.approx(after[-1], abs=0.02)
    assert runs["shuffled"].metric("llm/test_accuracy")[-1] < 0.7


def test_on_texts_that_scores_have_just_chosen_an_llm_that_knows_nothing_agrees_as_well(llm: str) -> None:
    rng = np.random.default_rng(4)
    written = Corpus(tuple(words(y, rng) for y in LABELS * 20), LABELS * 20, Provenance.PUBLIC)
    asked = LocalLLM.load(llm, batch_size=256).score(
        [f"{y}:" for y in (*written.answers, *written.answers[::-1])], [f" {x}" for x in written.prompts] * 2
    )
    # Scores that come of the LLM's own likelihoods choose where it is right by chance.
    agrees = Scores(tuple(a - b for a, b in zip(asked[:40], asked[40:], strict=True)))
    start = new_adapter(llm, rank=2, alpha=4.0, seed=0)
    metrics = taught(
        Engine(),
        llm,
        start,
        ranked(written, agrees, 0.35),
        Teaching(tuning=Tuning(epochs=1)),
        Measures(LABELS, tests=written),
        seed=0,
    ).metrics
    assert metrics["llm/agreement_on_chosen"] > 0.9
    assert 0.3 < metrics["llm/test_accuracy_before"] < 0.7
    assert "llm/label_accuracy" not in metrics


def test_public_texts_come_with_labels_where_their_source_has_them(tmp_path: Path) -> None:
    world = load_world("hospitals")
    notes = labelled(PublicTest("world:hospitals"), world.labels, 100, 0)
    assert 80 < len(notes) <= 100
    assert notes.provenance is Provenance.PUBLIC
    for text, label in zip(notes.prompts, notes.answers, strict=True):
        assert told_labels(world, main_facts(world, text)) == {label}
    assert set(labelled(PublicTest("world:hospitals"), world.labels[:2], 100, 0).answers) == set(world.labels[:2])
    (tmp_path / "public.txt").write_text("one text\n")
    pd.DataFrame({"text": ["a"]}).to_csv(tmp_path / "bare.csv", index=False)
    for bare in ("public.txt", "bare.csv"):
        assert len(labelled(PublicTest(str(tmp_path / bare)), world.labels, 9, 0)) == 0


def test_public_test_rows_are_those_that_the_scenario_names_and_other_labels_are_a_choice_task(tmp_path: Path) -> None:
    rows = [(f"{part} text {y} {i}", y, part) for part in ("train", "test") for y in "abcdef" for i in range(3)]
    pd.DataFrame(rows, columns=["text", "label", "split"]).to_csv(tmp_path / "public.csv", index=False)
    test = PublicTest(str(tmp_path / "public.csv"), "split", "test")
    own = labelled(test, ["a", "b"], 100, 0)
    assert own.counts() == {"a": 3, "b": 3}
    assert all(text.startswith("test ") for text in own.prompts)
    others = labelled(test, ["a", "b"], 100, 0, others=3)
    assert len(others.counts()) == 3
    assert set(others.answers) <= set("cdef")
    assert others == labelled(test, ["a", "b"], 100, 0, others=3)  # the same before and after each round
    assert len(labelled(test, list("abcde"), 100, 0, others=3)) == 0  # one label alone is no choice
    assert len(labelled(PublicTest("world:hospitals"), load_world("hospitals").labels, 100, 0, others=3)) == 0
    with pytest.raises(BadValue, match="no column 'part'"):
        labelled(replace(test, column="part"), ["a"], 9, 0)
    with pytest.raises(BadValue, match="go together"):
        PublicTest("public.csv", column="split")


def test_generality_is_a_choice_between_labels_that_the_llm_is_not_taught(llm: str) -> None:
    rng = np.random.default_rng(4)
    written = Corpus(tuple(words(y, rng) for y in LABELS * 20), LABELS * 20, Provenance.PUBLIC)
    flipped = replace(written, answers=tuple(LABELS[::-1] * 20))
    start = new_adapter(llm, rank=2, alpha=4.0, seed=0)
    chosen = ranked(written, Scores((1.0,) * 40, ()), 1.0)
    teaching = Teaching(guard=0.0, tuning=Tuning(epochs=6, batch=8, learning_rate=1e-2))
    measures = Measures(LABELS, tests=written, others=flipped)
    found = taught(Engine(), llm, start, chosen, teaching, measures, seed=0).metrics
    assert found["llm/test_accuracy"] > 0.9
    assert found["general/choice_accuracy"] == pytest.approx(1 - found["llm/test_accuracy"])
    assert found["general/choice_accuracy_before"] > 0.3 > found["general/choice_accuracy"]


def test_texts_fit_the_label_whose_public_texts_are_nearest() -> None:
    corners = {"heart": (1.0, 0.1), "skin": (0.1, 1.0), "odd": (0.9, 0.2)}

    def embed(texts: Sequence[str]) -> Any:
        return np.array([corners[text.split()[0]] for text in texts], dtype=np.float32)

    tests = Corpus(
        ("heart a", "heart b", "skin a", "skin b", "odd c"), ("heart",) * 2 + ("skin",) * 3, Provenance.PUBLIC
    )
    written = Corpus(("heart x", "skin x", "skin y", "odd z"), ("heart", "skin", "heart", "heart"), Provenance.PUBLIC)
    assert fit(written, tests, embed) == (0.75, 0.8)  # "odd c" lies nearer to heart, and does not count for itself
    assert math.isnan(fit(written, tests.take([0, 2, 3]), embed)[0])  # one public text of a label is no mean
    assert math.isnan(fit(written.take([]), tests, embed)[0])


def test_an_llm_that_converses_is_taught_in_the_form_that_it_is_asked_in(
    llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llm, tmp_path / "chat")
    tokenizer = copy.deepcopy(load_tokenizer(llm))  # the one that is loaded serves other tests
    form = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = form + "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    name, learnt = str(tmp_path / "chat"), []
    monkeypatch.setattr(reward_tuning, "sft", lambda model, examples, *_, **__: learnt.extend(examples) or 0.0)
    texts = Corpus(("aabb", "w" * 90), LABELS, Provenance.PUBLIC)
    start, task = new_adapter(name, rank=2, alpha=4.0, seed=0), Task(noun="a word", system="be brief")
    chosen = ranked(texts, Scores((1.0, 1.0), ()), 1.0)
    taught(Engine(), name, start, chosen, Teaching(tuning=Tuning(max_length=20)), Measures(LABELS, task=task), seed=0)
    short, long = (tokenizer.decode(example.tokens[example.start :]) for example in learnt)
    assert short == f"aabb{tokenizer.eos_token}"  # no blank before it, and the turn's end after it
    assert long == "w" * 20  # cut, so that no end is learnt
    asked = tokenizer.decode(learnt[0].tokens[: learnt[0].start])
    assert asked.endswith("on one line.</s><assistant>".replace("</s>", tokenizer.eos_token))
    assert "It is about heart." in asked


def test_texts_after_the_scores_are_under_their_guarantee(runs: Runs) -> None:
    first, second = (runs["main"].requests(Score)[i].corpus for i in (0, 3))
    assert first.provenance is Provenance.PUBLIC
    assert (second.provenance, second.grants) == (Provenance.LLM_WRITTEN, ())
    dp = runs["dp"]
    grants = {g for a in dp.replies(Score) for g in a.scores.grants}
    assert set(dp.requests(Score)[3].corpus.grants) == set(dp.states[-1].adapter.grants) == grants
    assert len(grants) == 3


# Whether scores mean anything (METHODS 3.6.2)


@pytest.fixture(scope="module")
def planted() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Mean scores of two hospitals' models, trained and untrained, for true notes, flipped labels and gibberish."""
    world, name = load_world("hospitals"), "assets:tiny-slm"
    tokenizer, rng = load_tokenizer(name), np.random.default_rng(5)
    texts: list[tuple[str, str, str]] = []
    for index in (0, 3):
        place = site(world, index)
        prior = np.cumsum(place.fact_prior, axis=1)
        for i in range(96):
            row = i % len(world.labels)
            note = write_note(world, place.style, row, prior, rng)
            texts.append(("clean", note, world.labels[row]))
            texts.append(("flipped", note, world.labels[(row + 1 + i % 7) % len(world.labels)]))
    pile = [word for _, note, _ in texts for word in note.split()]
    texts += [("gibberish", " ".join(rng.choice(pile, 14)), world.labels[i % 8]) for i in range(192)]
    corpus = Corpus(tuple(t for _, t, _ in texts), tuple(y for _, _, y in texts), Provenance.PUBLIC)
    found = []
    for epochs in (15, 0):
        scores = []
        for index in (0, 3):
            model = new_task_model(name, len(world.labels), "all", index)
            notes = private_notes(world, index, 400, 0, split="train")
            fit_classifier(
                model,
                tokenizer,
                notes,
                world.labels,
                replace(TaskTraining(), learning_rate=1e-3),
                epochs=epochs,
                seed=1,
            ) if epochs else None
            scores.append(Scores(tuple(confidences(model, tokenizer, corpus, world.labels, 64))))
        values = [total / len(scores) for total in added(scores).values]
        found.append(
            {
                k: [v for v, (kind, _, _) in zip(values, texts, strict=True) if kind == k]
                for k in ("clean", "flipped", "gibberish")
            }
        )
    return found[0], found[1]


def test_trained_models_tell_clean_texts_from_corrupted_ones(planted: Any) -> None:
    trained, untrained = planted
    assert auroc(trained["clean"], trained["flipped"] + trained["gibberish"]) >= 0.8
    assert abs(auroc(untrained["clean"], untrained["flipped"] + untrained["gibberish"]) - 0.5) < 0.1


# Different clients (METHODS 3.6.5)


def test_two_architectures_and_tokenizers_score_and_learn_in_one_run(runs: Runs, llm: str) -> None:
    run = runs["hetero"]
    names = [run.client(i).config.task_model for i in range(3)]
    assert names == [families.folder("bert"), tiny.folder(), families.folder("bert")]
    assert len({len(load_tokenizer(name)) for name in names}) == 2
    assert len(run.replies(Score)) == 3 * ROUNDS
    assert right(end(run, llm)) > 0.7
    assert all(set(a.metrics) == {"accuracy", "macro_f1"} for a in run.replies(Evaluate))


def test_scorers_of_both_architectures_are_trained_by_clipped_gradients_alone() -> None:
    for name in (families.folder("bert"), tiny.folder()):
        tokenizer, model = load_tokenizer(name), new_scorer(name, 2, rank=2, alpha=4.0, seed=0)
        rows = Corpus(("ab ab", "wx", "dd dd dd"), ("heart", "skin", "heart"), Provenance.PRIVATE)
        slots = [s for [s] in label_slots(tokenizer, rows, LABELS, 3, 32, model.config)]
        assert any("lora_" not in n for n, p in model.named_parameters() if p.requires_grad)  # the head, too

        def summed(
            batch: list[Any], clip_norm: float, model: Any = model, pad: int = tokenizer.pad_token_id
        ) -> torch.Tensor:
            with clipper(model.train(), clip_norm) as clip:
                slots = [(text,) for text in batch]
                parts = clipped_sum(clip, model, slots, pad=pad, max_physical_batch_size=2, losses=label_losses)
            return torch.cat([p.flatten().double() for p in parts])

        for slot in slots:
            grads = torch.autograd.grad(
                label_losses(model.eval(), [slot], tokenizer.pad_token_id).sum(), trainable(model)
            )
            alone = torch.cat([g.flatten().double() for g in grads])
            assert (summed([slot], math.inf) - alone).norm() < 1e-4 * alone.norm()
        whole = summed(slots, 0.1)
        for gone in slots:
            move = float((whole - summed([s for s in slots if s is not gone], 0.1)).norm())
            assert 0.05 < move <= 0.1 * (1 + 1e-5)


def test_a_scorers_slots_map_each_unit_to_itself() -> None:
    tokenizer, config = load_tokenizer(tiny.folder()), load_generator(tiny.folder()).config
    rows = Corpus(
        ("ab", "wx", "later", "cd"),
        ("heart", "measles", "heart", "skin"),
        Provenance.PRIVATE,
        units=("p", "q", "p", "r"),
    )
    slots = label_slots(tokenizer, rows, LABELS, 5, 32, config)
    assert [[text.label for text in slot] for slot in slots] == [[0], [], [1], [], []]
    both = label_slots(tokenizer, rows, LABELS, 5, 32, config, rows_per_unit=2)
    assert [[text.label for text in slot] for slot in both] == [[0, 0], [], [1], [], []]
    assert tokenizer.decode(slots[0][0].tokens) == "<bos> ab"


# Protection: a scoring model under one grant


def entries(client: ClientSide, kind: str) -> list[dict[str, Any]]:
    return [e for e in client.ledger.entries() if e["kind"] == kind]


def test_one_grant_pays_for_the_scores_of_all_rounds(runs: Runs) -> None:
    run = runs["dp"]
    for index in range(3):
        client = run.client(index)
        [reserved], [grant] = entries(client, "reservation"), entries(client, "grant")
        assert (reserved["plan"]["steps"], reserved["rounds"], reserved["drawn"]) == (3, 1, 1)
        assert grant["state"] == "sent"
        answers = run.replies(Score)[index::3]
        assert [a.scores.grants for a in answers] == [(grant["id"],)] * ROUNDS
        assert len({a.scores.values for a in answers}) == ROUNDS
        plan = client.config.score_plan(client.records, ROUNDS)
        assert (plan.rounds, reserved["plan"]) == (1, plan.to_dict())
        assert all(a.statement.epsilon == pytest.approx(epsilon(plan, 1e-5)) for a in answers)
        assert client.ledger.spent()[0] == pytest.approx(answers[0].statement.epsilon)
        assert client.ledger.spent()[0] <= 8.0


@pytest.mark.parametrize("arm", [pytest.param("dp", marks=pytest.mark.full), "noise"])
def test_it_goes_on_to_the_same_results(
    arm: str, toml: str, llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = LocalLLM.load(llm, batch_size=256)
    dies_everywhere(toml, tmp_path, monkeypatch, arm, llm=lambda: loaded, every=21)


def test_who_was_away_in_the_first_round_learns_before_it_scores(toml: str, llm: str, tmp_path: Path) -> None:
    text = toml.replace("[arms.main]", "[participation]\navailability = 0.5\nseed = SEED\n[arms.main]")
    text = text.replace("[server]\n", "[server]\nquorum = 0.3\n")
    cell = cells(from_toml(text.replace("SEED", "0")))[0]

    def gone(seed: int, number: int) -> set[int]:
        table = replace(cell.scenario.participation, seed=seed)
        return set(fates(replace(cell, scenario=replace(cell.scenario, participation=table)), number, 1, range(3)))

    seed = next(s for s in range(99) if len(gone(s, 1)) == 1 and not gone(s, 2))
    run = play(text.replace("SEED", str(seed)), tmp_path, "main", llm=LocalLLM.load(llm, batch_size=256))
    [late] = gone(seed, 1)
    scored = [m.content["fedsynth"]["client"] for m in run.grid.requests_of(Score.task)]
    assert sorted(scored) == sorted([*(set(range(3)) - {late}), 0, 1, 2])
    assert run.states[0].learnt == tuple(sorted(set(range(3)) - {late}))
    assert run.states[1].learnt == (0, 1, 2)
    assert run.run_log.silent == set()  # it spent nothing while it was away
    assert not any(metric.endswith("-score/failed") for *_, metric, _ in run.run_log.rows)


def test_the_run_says_what_the_server_saw_and_what_it_costs(runs: Runs) -> None:
    said = privacy_line([runs["dp"].run_log])
    assert said.startswith("an honest-but-curious server sees scores: (")
    assert "-DP per row, all rounds" in said
    assert "-DP per client, all rounds" in privacy_line([runs["noise"].run_log])
    said = privacy_line([runs["main"].run_log])
    assert said.startswith("no differential privacy guarantee: scores left clients without a mechanism")
    assert runs["main"].client(0).ledger.spent()[0] == math.inf
    assert len(entries(runs["main"].client(0), "no_guarantee")) == 1  # noted once for a run and a reason


@dataclass
class Asked:
    """A cell whose clients are asked by hand."""

    run: Played
    clients: Clients

    def score(self, texts: Corpus, exchange: int, client: int = 0) -> Scored:
        self.clients.exchange = exchange - 1
        return self.clients.ask_each({client: Score(texts, seed=4)})[client]


TEXTS = Corpus(("abab", "wxwx", "cdcd", "yzyz"), ("heart", "heart", "skin", "skin"), Provenance.PUBLIC)


@pytest.fixture
def asked(toml: str, llm: str, tmp_path: Path) -> Iterator[Any]:
    """A client app with its clients, before any request."""

    def make(arm: str) -> Asked:
        from inprocess import cell_of, simulation, to_toml
        from local import LocalGrid

        from fedsynth.clients.app import client_app

        whole = to_toml(from_toml(toml))
        cell, out = cell_of(whole, arm, 0), tmp_path / arm
        out.mkdir(exist_ok=True)
        grid = LocalGrid(client_app(simulation), 3, {"scenario-toml": whole, "out-dir": str(out)})
        run_log = RunLog(cell, out, out / "events.jsonl")
        clients = Clients(grid, nodes_by_client(grid, 3), cell, "simulated", LABELS, run_log)
        return Asked(Played(cell, grid, run_log, out), clients)

    return make


def test_later_scores_read_no_private_text_and_are_those_of_the_model_that_was_kept(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = asked("dp")
    first = made.score(TEXTS, 1)
    monkeypatch.setattr(ClientSide, "train", property(lambda _: pytest.fail("private text was read after the release")))
    monkeypatch.setattr(score_module, "train_generator", lambda *_, **__: pytest.fail("trained twice"))
    again = made.score(TEXTS, 2)
    assert again.scores == first.scores
    fewer = made.score(TEXTS.take([2, 0]), 3)
    assert fewer.scores.values == pytest.approx((first.scores.values[2], first.scores.values[0]), abs=1e-6)
    assert fewer.scores.grants == first.scores.grants


def test_a_repeated_request_gets_the_same_bytes_and_one_training(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []
    real = score_module.train_generator
    monkeypatch.setattr(score_module, "train_generator", lambda *a, **k: fits.append(1) or real(*a, **k))
    made = asked("dp")
    for exchange in (1, 1, 2, 2):
        made.score(TEXTS, exchange)
    payloads = [r.content["fedsynth"]["payload"] for r in made.run.grid.replies if "fedsynth" in r.content]
    assert payloads[0] == payloads[1]
    assert payloads[2] == payloads[3]
    assert len(fits) == 1


def test_a_scorer_that_is_lost_cannot_be_trained_again_under_its_grant(asked: Any) -> None:
    made = asked("dp")
    made.score(TEXTS, 1)
    (made.run.client(0).work / RECEIPT).unlink()
    with pytest.raises(TooFewReplies, match="budget_exhausted"):
        made.score(TEXTS, 2)
    [grant] = entries(made.run.client(0), "grant")
    assert grant["state"] == "sent"


def test_a_scorer_whose_weights_were_changed_is_not_released(asked: Any) -> None:
    made = asked("dp")
    made.score(TEXTS, 1)
    weights = made.run.client(0).work / score_module.SCORER
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(TooFewReplies, match="not_allowed"):
        made.score(TEXTS, 2)


def test_after_a_crash_before_the_answer_was_kept_the_same_grant_gives_the_same_scorer(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsynth.privacy.ledger import Ledger

    made = asked("dp")
    real = Ledger.store
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "store", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(TooFewReplies, match="failed"):
            made.score(TEXTS, 1)
    kept = (made.run.client(0).work / score_module.SCORER).read_bytes()
    assert made.run.client(0).ledger.settled(entries(made.run.client(0), "grant")[0]["id"]) is None
    assert Ledger.store is real
    answer = made.score(TEXTS, 1)
    [grant], [reserved] = entries(made.run.client(0), "grant"), entries(made.run.client(0), "reservation")
    assert answer.scores.grants == (grant["id"],)
    assert reserved["drawn"] == 1
    assert (made.run.client(0).work / score_module.SCORER).read_bytes() == kept


def test_an_answer_without_a_charge_names_grants_that_are_settled(asked: Any) -> None:
    made = asked("dp")
    made.score(TEXTS, 1)
    ledger = made.run.client(0).ledger
    [grant] = entries(made.run.client(0), "grant")
    ledger.store("another request", b"numbers", derived_from=[grant["id"]])
    assert ledger.answered("another request") == b"numbers"
    for foreign in (["0f" * 16], [grant["id"], "0f" * 16]):
        with pytest.raises(GrantUsed, match="unknown"):
            ledger.store("a third request", b"numbers", derived_from=foreign)
    with pytest.raises(GrantUsed, match="no such grant"):
        ledger.store("a third request", b"numbers")
    settled = ledger.settled(grant["id"])
    assert settled is not None
    with pytest.raises(GrantUsed, match="sent"):
        ledger.begin(settled)


# Protection: noise on each round's list


class Silent:
    """Takes the noise away, and remembers how much was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def normals(self, count: int) -> Any:
        self.asked.append(count)
        return np.zeros(count)

    def poissons(self, count: int, mean: float) -> Any:
        return np.zeros(count, dtype=np.int64)

    def poisson_mask(self, count: int, rate: float) -> Any:
        raise AssertionError(f"{count} units drawn at rate {rate}")


NOISY = Client("generator", "task model", budget=Budget(8.0), scores="noise", score_norm=0.7)


def test_a_list_is_centred_label_by_label_and_clipped() -> None:
    plan = NOISY.score_plan(200, rounds=3)
    quiet = Silent()
    small = protected([0.4, 0.6, 0.1, 0.3], TEXTS, plan, quiet)
    assert small == pytest.approx([-0.1, 0.1, -0.1, 0.1])  # norm 0.2: nothing to clip
    long = protected([0.0, 9.0, 0.0, 1.0], TEXTS, plan, quiet)
    assert np.linalg.norm(long) <= 0.7
    assert np.linalg.norm(long) > 0.7 * (1 - 1e-6)
    assert long == pytest.approx([-4.5 * 0.7 / 41**0.5, 4.5 * 0.7 / 41**0.5, -0.5 * 0.7 / 41**0.5, 0.5 * 0.7 / 41**0.5])
    assert quiet.asked == [4, 4]
    assert protected([0.5] * 4, TEXTS, plan, quiet) == [0.0] * 4
    assert np.isfinite(protected([math.nan, math.inf, 0.2, 0.4], TEXTS, plan, quiet)).all()


def test_any_two_lists_are_at_most_the_plans_norm_apart() -> None:
    plan, rng = NOISY.score_plan(200), np.random.default_rng(0)
    assert plan.clip_norm == 2 * 0.7
    texts = Corpus(("t",) * 40, tuple(LABELS[i % 2] for i in range(40)), Provenance.PUBLIC)
    far = 0.0
    for _ in range(200):
        one = rng.random(40).round()  # another data set may turn every score round
        lists = [np.asarray(protected(u.tolist(), texts, plan, Silent())) for u in (one, 1 - one)]
        far = max(far, float(np.linalg.norm(lists[0] - lists[1])))
    assert 0.99 * plan.clip_norm < far <= plan.clip_norm


def test_noise_has_the_planned_deviation() -> None:
    plan = NOISY.score_plan(200, rounds=3)
    texts = Corpus(("t",) * 20_000, ("heart",) * 20_000, Provenance.PUBLIC)
    noise = np.asarray(protected([0.5] * 20_000, texts, plan, GrantRandomness(bytes(range(32)))))
    wanted = plan.noise_multiplier * 2 * 0.7

    def fits(std: float) -> bool:
        return abs(noise.std() / std - 1) < 5 / math.sqrt(2 * len(noise)) and abs(noise.mean()) < 5 * std / math.sqrt(
            len(noise)
        )

    assert fits(wanted)
    assert not any(fits(wanted * factor) for factor in (0.5, 2.0, 1.05))  # half: the sensitivity of one list, not two


def test_whole_lists_are_as_near_and_their_noise_is_that_of_the_share() -> None:
    plan, rng = NOISY.score_plan(200), np.random.default_rng(0)
    texts = Corpus(("t",) * 40, tuple(LABELS[i % 2] for i in range(40)), Provenance.PUBLIC)
    far = 0.0
    for _ in range(200):
        one = rng.random(40).round()
        lists = [protected_whole(u.tolist(), texts, plan, 1.0, Silent()) for u in (one, 1 - one)]
        far = max(far, float(np.linalg.norm(lists[0] - lists[1])))
    assert 0.85 * UNIT < far <= UNIT  # rounding towards zero shortens a list by less than one a number
    many = Corpus(("t",) * 20_000, ("heart",) * 20_000, Provenance.PUBLIC)
    drawn = protected_whole([0.5] * 20_000, many, plan, 9.0 * UNIT**2, GrantRandomness(bytes(range(32))))
    assert drawn.std() / UNIT == pytest.approx(3.0, rel=0.03)


def test_the_server_sees_the_sum_of_noised_scores_alone(runs: Runs) -> None:
    summed = runs["summed"]
    for reply in summed.replies(Score):
        assert reply.statement.mechanism == "summed_scores"
        assert reply.statement.cohort == Cohort(3, 1)
        assert reply.statement.epsilon <= 8.0 < reply.statement.epsilon_alone
        assert reply.statement.epsilon_replace_one == pytest.approx(reply.statement.epsilon)
        assert min(reply.scores.values) >= 0
        assert max(reply.scores.values) > 2**46  # masked
    assert len({request.sum_id for request in summed.requests(Score)}) == ROUNDS
    assert "by a secure sum of 3 clients" in privacy_line([summed.run_log])


def test_epsilon_of_the_rounds_is_the_plans_and_one_more_is_refused(asked: Any, runs: Runs) -> None:
    run = runs["noise"]
    for index in range(3):
        client, answers = run.client(index), run.replies(Score)[index::3]
        plan = client.config.score_plan(client.records, ROUNDS)
        assert (plan.steps, plan.rounds, plan.sampling_rate) == (1, ROUNDS, 1.0)
        # Gaussian composition by hand: T rounds at sigma are one at sigma / sqrt(T).
        once = replace(plan, rounds=1, noise_multiplier=plan.noise_multiplier / ROUNDS**0.5)
        assert epsilon(plan, 1e-5) == pytest.approx(epsilon(once, 1e-5), abs=1e-2)
        assert {a.statement.epsilon for a in answers} == {epsilon(plan, 1e-5)}
        assert {a.statement.epsilon_replace_one for a in answers} == {epsilon(plan, 1e-5)}
        assert {a.statement.unit for a in answers} == {"client"}
        grants = entries(client, "grant")
        assert [a.scores.grants for a in answers] == [(g["id"],) for g in grants]
        assert len(grants) == ROUNDS
        assert client.ledger.spent()[0] == pytest.approx(epsilon(plan, 1e-5))
        assert epsilon(plan, 1e-5) <= 8.0
    made = asked("noise")
    made.clients.ask(Learn(seed=1))
    for exchange in range(2, 2 + ROUNDS):
        made.score(TEXTS, exchange)
    with pytest.raises(TooFewReplies, match="budget_exhausted"):
        made.score(TEXTS, 2 + ROUNDS)


def test_noise_differs_between_rounds_and_clients(runs: Runs) -> None:
    lists = [a.scores.values for a in runs["noise"].replies(Score)]
    assert len({round(v, 9) for values in lists for v in values}) == sum(map(len, lists))


def test_a_client_without_a_task_model_refuses_before_anything_is_charged(asked: Any) -> None:
    for arm in ("main", "noise"):
        made = asked(arm)
        with pytest.raises(TooFewReplies, match="no_task_model"):
            made.score(TEXTS, 1)
        assert made.run.client(0).ledger.entries() == []


def test_no_request_can_choose_the_protection(asked: Any) -> None:
    assert {field.name for field in fields(Score)} == {"corpus", "seed", "sum_id", "members"}
    for arm in ("main", "dp", "noise"):  # a sum in whose shares of noise this client has no part
        made = asked(arm)
        made.clients.ask_each({0: Learn(1)})
        with pytest.raises(TooFewReplies, match="not_allowed"):
            made.clients.ask_each({0: Score(TEXTS, 1, sum_id="0" * 32, members=(0, 1, 2))})


# How scores sort texts


def test_the_best_share_of_each_label_by_hand() -> None:
    texts = Corpus(("a", "b", "c", "d", "e"), ("heart", "heart", "skin", "heart", "skin"), Provenance.PUBLIC)
    found = ranked(texts, Scores((0.1, 0.9, 0.2, 0.5, 0.3), ("g",)), 0.4)
    assert found.best.prompts == ("b", "e")
    assert (found.best.provenance, found.best.grants) == (Provenance.LLM_WRITTEN, ("g",))
    assert found.pairs == (("b", "a", "heart"), ("e", "c", "skin"))
    assert ranked(texts, Scores((0.5,) * 5), 1.0).pairs == ()  # equal scores prefer nothing
    written = replace(texts, provenance=Provenance.LLM_WRITTEN)
    assert ranked(written, Scores((0.5,) * 5, ("g",)), 0.4).best.grants == ()  # an earlier round had no guarantee


def test_scores_add_up_by_hand() -> None:
    answers = [Scores((0.2, 0.8), ("g",)), Scores((0.4, 0.0), ("h",))]
    assert added(answers).values == pytest.approx((0.6, 0.8))
    assert added(answers).grants == ("g", "h")
    assert added([*answers, Scores((1.0, 1.0))]).grants == ()


def test_shuffling_keeps_the_numbers() -> None:
    scores = Scores(tuple(i / 50 for i in range(50)), ("g",))
    found = shuffled(scores, 3)
    assert sorted(found.values) == sorted(scores.values)
    assert found.values != scores.values
    assert found.grants == scores.grants
    assert shuffled(scores, 3) == found


# Tuning


def example(text: str, given: str = "heart:") -> Any:
    return encode_text(load_tokenizer(tiny.folder()), given, text, 32, "causal")


def adapted(seed: int = 0) -> Any:
    return with_adapter(tiny.folder(), new_adapter(tiny.folder(), rank=4, alpha=8.0, seed=seed))


STEPS = Tuning(epochs=8, batch=4, learning_rate=1e-2)


def test_preference_makes_the_preferred_likelier_than_the_rejected() -> None:
    model = adapted()
    pairs = [(example("abca"), example("wxyz")), (example("dcba"), example("zyxw"))]
    chosen, rejected = ([p[side] for p in pairs] for side in (0, 1))

    def gap() -> float:
        with torch.no_grad():
            return float(
                (next_token_losses(model, rejected, tiny.PAD) - next_token_losses(model, chosen, tiny.PAD)).mean()
            )

    before = gap()
    first = dpo(model, pairs, Steps(replace(STEPS, epochs=1, learning_rate=1e-12), pad=tiny.PAD, seed=0), beta=0.5)
    assert first == pytest.approx(math.log(2), abs=1e-4)  # the model is its own reference
    assert dpo(model, pairs, Steps(STEPS, pad=tiny.PAD, seed=0), beta=0.5) < 0.5
    assert gap() > before + 0.1
    assert math.isnan(dpo(model, [], Steps(STEPS, pad=tiny.PAD, seed=0), beta=0.5))
    with pytest.raises(ValueError, match="beta must be above 0"):
        dpo(model, pairs, Steps(STEPS, pad=tiny.PAD, seed=0), beta=0.0)


def test_a_guard_holds_what_the_model_says_of_other_text() -> None:
    learnt = [example(t) for t in ("abca", "bcab", "cabc")]
    others = [example(t, given="") for t in ("one two", "three four", "five six", "seven")]

    def drift(weight: float) -> float:
        model, before = adapted(), adapted()
        sft(model, learnt, Steps(STEPS, pad=tiny.PAD, seed=0, guard=Guard(others, weight)))
        with torch.no_grad():
            return float(
                (next_token_losses(model, others, tiny.PAD) - next_token_losses(before, others, tiny.PAD)).abs().mean()
            )

    free, held = drift(0.0), drift(20.0)
    assert held < 0.5 * free


def test_a_guard_leaves_weights_and_loss_as_they_are_where_nothing_moves() -> None:
    model = adapted()
    start = [w.detach().clone() for w in trainable(model)]
    sft(
        model,
        [example("ab")],
        Steps(replace(STEPS, epochs=1, learning_rate=1e-12), pad=tiny.PAD, seed=0, guard=Guard([example("x")], 1.0)),
    )
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(start, trainable(model), strict=True))


def test_perplexity_is_that_of_all_tokens_together() -> None:
    model = load_generator(tiny.folder())
    texts = [example("a", given=""), example("abcdefgh", given="")]
    with torch.no_grad():
        losses = next_token_losses(model, texts, tiny.PAD).tolist()
    counts = [len(e.tokens) - e.start for e in texts]
    by_hand = math.exp(sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts))
    assert perplexity(model, texts, pad=tiny.PAD) == pytest.approx(by_hand, rel=1e-5)
    with pytest.raises(ValueError, match="at least one"):
        perplexity(model, [], pad=tiny.PAD)


def test_label_accuracy_compares_a_text_after_each_label() -> None:
    from fedsynth.testing import ScriptedLLM

    llm = ScriptedLLM(
        likelihood=lambda prompt, text: float(prompt == "heart:") if "a" in text else float(prompt == "skin:")
    )
    texts = Corpus(("abc", "xyz", "axa", "www"), ("heart", "skin", "skin", "skin"), Provenance.PUBLIC)
    assert label_accuracy(llm, texts, LABELS) == 0.75
    assert math.isnan(label_accuracy(llm, texts.take([]), LABELS))


@pytest.mark.parametrize("context", [9, 40, 300])
def test_label_accuracy_reads_a_long_text_as_far_as_the_llm_can(context: int) -> None:
    from fedsynth.testing import ScriptedLLM

    read: set[tuple[str, str]] = set()

    def likelihood(prompt: str, text: str) -> float:
        read.add((prompt, text))
        return float(prompt == "heart:")

    llm, long = ScriptedLLM(likelihood=likelihood, context=context), "a long public note " * 200
    found = label_accuracy(llm, Corpus((long, "abc"), ("heart", "skin"), Provenance.PUBLIC), LABELS)
    room = context - max(len(f"{label}:") for label in LABELS)
    begun = f" {long}"[:room]
    assert {text for _, text in read} == {begun, " abc"[:room]}
    assert found == 0.5
    llm.context = len("heart:")  # no room for a text
    assert math.isnan(label_accuracy(llm, Corpus((long,), ("heart",), Provenance.PUBLIC), LABELS))


def test_label_accuracy_of_the_shipped_llm_ends_at_no_text() -> None:
    llm = LocalLLM.load("assets:tiny-llm", workers=1)
    texts = Corpus(("a long public note " * 200, "zzz" * 20_000), ("a", "b"), Provenance.PUBLIC)
    assert 0 <= label_accuracy(llm, texts, ["a", "b", "a longer name of a label"]) <= 1


# Adapters of the server LLM


def saved(folder: Path, name: str, std: float = 0.3, *, public: bool = True, grants: tuple[str, ...] = ()) -> Path:
    model = with_adapter(name, new_adapter(name, rank=2, alpha=4.0, seed=0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trainable(model):
            weight.normal_(std=std, generator=generator)
    save_adapter(replace(read_adapter(model, weights_hash(name)), public=public, grants=grants), name, folder)
    return folder


def test_an_adapter_in_peft_format_is_read_back_and_put_into_the_llm(tmp_path: Path) -> None:
    name, folder = tiny.folder(), saved(tmp_path / "lora", tiny.folder())
    adapter = load_adapter(str(folder), name)
    beside = LocalLLM(with_adapter(name, adapter).eval(), load_tokenizer(name))
    within = LocalLLM.load(name, adapter=adapter)
    prompts, texts = ["heart:"] * 2, [" abc", " wxyz"]
    assert within.score(prompts, texts) == pytest.approx(beside.score(prompts, texts), abs=1e-4)
    assert within.score(prompts, texts) != pytest.approx(LocalLLM.load(name).score(prompts, texts), abs=1e-2)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"use_dora": True}, "use_dora = true"), ({"peft_type": "IA3"}, "no LoRA"), ({"r": 3}, "rank 3")],
)
def test_an_adapter_that_cannot_be_used_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = saved(tmp_path / "lora", tiny.folder())
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadValue, match=said):
        load_adapter(str(folder), tiny.folder())


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "lora", tiny.folder())
    with pytest.raises(BadValue, match="same base"):
        load_adapter(str(folder), families.folder("llama"))
    with pytest.raises(BadValue, match=r"no adapter 'nowhere'.*assets:tiny-llm-mislabelled"):
        load_adapter("nowhere", tiny.folder())
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BadValue, match="cannot be read"):
        load_adapter(str(folder), tiny.folder())


def test_every_method_is_given_the_llm_with_its_adapter(tmp_path: Path) -> None:
    from fedsynth.app.fedsynth_sim import server_app

    folder = saved(tmp_path / "lora", tiny.folder())
    plain, other = server_app._llm(tiny.folder()), server_app._llm(tiny.folder(), str(folder))
    assert isinstance(plain, LocalLLM)
    assert isinstance(other, LocalLLM)
    assert plain.score(["heart:"], [" abc"]) != pytest.approx(other.score(["heart:"], [" abc"]), abs=1e-2)
    assert server_app._llm(tiny.folder(), str(folder)) is other


@pytest.mark.parametrize("grants", [(), ("g",)])
def test_an_adapter_that_learnt_private_text_is_no_servers_start(
    toml: str, llm: str, tmp_path: Path, grants: tuple[str, ...]
) -> None:
    folder = saved(tmp_path / "lora", llm, public=False, grants=grants)
    assert (load_adapter(str(folder), llm).grants, load_adapter(str(folder), llm).public) == (grants, False)
    with pytest.raises(BadValue, match=r"was trained on private text.*start from a public one"):
        public_adapter(str(folder), llm)
    (tmp_path / "own.toml").write_text(toml.replace(f'llm = "{llm}"', f'llm = "{llm}"\nadapter = "{folder}"'))
    with pytest.raises(BadValue, match="start from a public one"):
        check(load(tmp_path / "own.toml"))


def test_an_adapter_that_says_nothing_of_its_text_is_declared_public(tmp_path: Path) -> None:
    folder = saved(tmp_path / "lora", tiny.folder(), public=False)
    (folder / "grants.json").unlink()
    assert public_adapter(str(folder), tiny.folder()).public


def test_what_is_taught_has_the_guarantee_of_its_start_too(llm: str) -> None:
    start = new_adapter(llm, rank=2, alpha=4.0, seed=0)
    corpus = Corpus(("ab", "cd"), ("heart", "skin"), Provenance.PUBLIC)
    texts, teaching = ranked(corpus, Scores((1.0, 0.5), ("s",)), 1.0), Teaching(tuning=Tuning(epochs=1))

    def grants(start: Adapter) -> tuple[str, ...]:
        done = taught(Engine(), llm, start, texts, teaching, Measures(("heart", "skin")), seed=0).adapter
        assert not done.public
        return done.grants

    assert grants(start) == ("s",)
    assert grants(replace(start, public=False, grants=("g",))) == ("g", "s")
    assert grants(replace(start, public=False)) == ()


def test_rounds_go_on_from_the_servers_adapter(toml: str, llm: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "lora", llm, std=0.02)
    start = load_adapter(str(folder), llm)
    own = toml.replace(f'llm = "{llm}"', f'llm = "{llm}"\nadapter = "{folder}"').replace(
        f"rounds = {ROUNDS}", "rounds = 1"
    )
    run = play(own.replace("num_texts = 80", "num_texts = 16"), tmp_path, llm=LocalLLM.load(llm, adapter=start))
    adapter = run.states[-1].adapter
    assert (adapter.rank, adapter.alpha) == (2, 4.0)  # its own, not those of the tuning
    far = max(float(np.abs(adapter.arrays[n] - start.arrays[n]).max()) for n in start.arrays)
    assert 0 < far < 0.2
    assert max(float(np.abs(a).max()) for n, a in adapter.arrays.items() if "lora_A" in n) < 0.3


def test_the_mislabelled_server_is_what_its_card_says() -> None:
    folder = locate_adapter("assets:tiny-llm-mislabelled")
    card = json.loads((folder / "card.json").read_text())
    assert card["label_correct"]["before"] > 0.98
    assert 0.35 < card["label_correct"]["after"] < 0.47  # 1 - .6, and what top-p sampling adds
    assert card["base_sha256"] == weights_hash("assets:tiny-llm")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 450_000
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    load_adapter("assets:tiny-llm-mislabelled", card["base"])


def test_it_can_be_made_again(tmp_path: Path) -> None:
    world = load_world("hospitals")
    card = mislabelled(world, tmp_path / "lora", steps=2)
    assert card["command"].endswith(" mislabelled OUT --steps 2 --seed 0")
    assert load_adapter(str(tmp_path / "lora"), "assets:tiny-llm").rank == 4
    with pytest.raises(BadValue, match="hospitals"):
        mislabelled(load_world("banks"), tmp_path / "banks")


def test_six_notes_in_ten_are_mislabelled() -> None:
    from fedsynth.world import main_facts, told_labels

    world = load_world("hospitals")
    notes = mislabelled_notes(world, 3000, 0)
    told = [told_labels(world, main_facts(world, text)) for text in notes.prompts]
    wrong = [y not in t for t, y in zip(told, notes.answers, strict=True) if t]
    assert abs(np.mean(wrong) - WRONG) < 5 * (0.24 / len(wrong)) ** 0.5
    assert min(notes.counts().values()) > 300


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"num_texts": 0}, "num_texts"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"feedback": "applause"}, "feedback"),
        ({"teaching": {"beta": 0.0}}, "beta"),
        ({"teaching": {"guard": -1.0}}, "guard"),
        ({"teaching": {"update": "often"}}, "update"),
        ({"teaching": {"measured": 0}}, "measured"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    from fedsynth.typed import build

    with pytest.raises(BadValue, match=said):
        build(CrossLMOptions, options, "strategy")


def scenario(toml: str, arm: str = "main", **server: Any) -> Scenario:
    from fedsynth.scenario.toml import cells

    [cell] = [c for c in cells(from_toml(toml)) if c.arm == arm]
    return replace(cell.scenario, server=replace(cell.scenario.server, **server), arms={}, run=())


def test_an_endpoint_cannot_be_tuned(toml: str) -> None:
    far = Endpoint("http://127.0.0.1:9/v1", "large")
    with pytest.raises(BadValue, match=r"server\.llm is an endpoint"):
        check(scenario(toml, llm=far, embedder=tiny.folder()))
    CrossLM.check(CrossLMOptions(feedback="none"), scenario(toml, llm=far, embedder=tiny.folder()))
    CrossLM.check(CrossLMOptions(teaching=Teaching(update="none")), scenario(toml, llm=far, embedder=tiny.folder()))
    with pytest.raises(BadValue, match="no adapter can be put"):
        Server(far, adapter="assets:tiny-llm-mislabelled", embedder=tiny.folder())


def test_instructions_have_no_labels_to_score(tmp_path: Path) -> None:
    from inprocess import instructions

    with pytest.raises(BadValue, match=r"CrossLM is for data\.task"):
        check(from_toml(instructions(tmp_path, "fedsynth.strategies.cross_lm:CrossLM")))


def test_a_frozen_task_model_has_no_layers_for_a_scorer(toml: str) -> None:
    made = scenario(toml, "dp")
    head = replace(made, client=replace(made.client, task_training=TaskTraining(trains="head")))
    with pytest.raises(BadValue, match='scores = "noise"'):
        CrossLM.check(CrossLMOptions(), head)
    CrossLM.check(CrossLMOptions(feedback="none"), head)
    CrossLM.check(CrossLMOptions(), replace(head, client=replace(head.client, scores="noise")))


def test_a_budget_that_no_scorer_fits_is_found_before_the_run(toml: str) -> None:
    made = scenario(toml, "noise")
    poor = replace(
        made,
        client=replace(made.client, budget=Budget(0.01)),
        data=replace(made.data, source="world:hospitals", labels="all"),
    )
    with pytest.raises(BadValue, match="scores"):
        CrossLM.check(CrossLMOptions(), poor)
    CrossLM.check(CrossLMOptions(feedback="none"), poor)


def test_an_adapter_that_is_not_there_is_found_before_the_run(toml: str) -> None:
    with pytest.raises(BadValue, match="no adapter"):
        check(scenario(toml, adapter="nowhere"))


def test_an_llm_that_writes_nothing_well_formed_ends_the_run_in_words(toml: str, tmp_path: Path) -> None:
    from fedsynth.testing import ScriptedLLM

    with pytest.raises(ValueError, match="none of the 80 texts"):
        play(toml, tmp_path, llm=ScriptedLLM(answer=lambda prompt: "\n"))


def test_task_models_are_named_like_any_model(tmp_path: Path, toml: str) -> None:
    (tmp_path / "one").mkdir()
    text = toml.replace(f'task_model = "{tiny.folder()}"', 'task_models = ["one", "assets:tiny-slm"]')
    (tmp_path / "own.toml").write_text(text)
    client = load(tmp_path / "own.toml").client
    assert client.task_models == (str(tmp_path / "one"), "assets:tiny-slm")
    assert [client.of(i).task_model for i in range(3)] == [
        str(tmp_path / "one"),
        "assets:tiny-slm",
        str(tmp_path / "one"),
    ]
    with pytest.raises(BadValue, match="empty name"):
        Client("generator", task_models=("",), guarantee="none")


def test_the_shipped_scenario_is_complete() -> None:
    shipped = load("hospitals-crosslm")
    assert shipped.run == ("crosslm", "shuffled", "zerogen", "local")
    assert shipped.server.adapter == "assets:tiny-llm-mislabelled"
    assert check(shipped) == []
    assert load_strategy(shipped.strategy)[0] is CrossLM


def test_only_the_client_decides_how_scores_are_protected() -> None:
    """The strategy reads neither guarantee nor protection in what it asks; only its check at load does."""
    source = Path(score_module.__file__).parents[1] / "strategies" / "cross_lm.py"
    tree = ast.parse(source.read_text())
    [strategy] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "CrossLM"]
    used = {
        n.attr
        for f in strategy.body
        if isinstance(f, ast.FunctionDef) and f.name != "check"
        for n in ast.walk(f)
        if isinstance(n, ast.Attribute)
    }
    assert not used & {"guarantee", "budget", "client"}
