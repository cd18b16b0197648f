"""Each family of models in each role, chat and base, through the code that a run takes; docs/real-models.md says which
run and which are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import families
import numpy as np
import pytest
import torch

from fedsynth.clients.batched_training import together
from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.evaluate import evaluate
from fedsynth.clients.finetune import finetune
from fedsynth.clients.learn import learn
from fedsynth.clients.synthesize import synthesize
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import ClientData
from fedsynth.federation.messages import Finetune, Learn, Synthesize
from fedsynth.models.adapters import new_adapter
from fedsynth.models.chat import Chat
from fedsynth.models.embedding import Embedder
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import check
from fedsynth.models.of_scenario import client_models
from fedsynth.models.sampling import SamplingParams
from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.plan import Budget
from fedsynth.scenario.client import Client, GeneratorTraining, TaskTraining, Tuning
from fedsynth.scenario.task import Task, Templates
from fedsynth.synthesis.distillation import respond
from fedsynth.synthesis.judges import judge_by_instruction
from fedsynth.synthesis.student import taught, write
from fedsynth.training.engine import Engine
from fedsynth.training.selfcheck import SelfCheckFailed
from fedsynth.typed import BadValue

torch.set_num_threads(1)
PAGE = Path(__file__).parent.parent / "docs" / "real-models.md"
BASE, CHAT = "base", "chat"
FAMILIES = {
    "GPT-2": "gpt2",
    "OPT": "opt",
    "Llama": "llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Gemma 3": "gemma3",
    "Mistral": "mistral",
    "T5": "t5",
    "BERT": "bert",
    "DeBERTa": "deberta",
}
MODELS = {
    f"{name}, {form}" if family in families.CHAT else name: (family, form)
    for name, family in FAMILIES.items()
    for form in ((BASE, CHAT) if family in families.CHAT else (BASE,))
}
QUICK = ("Qwen2, base", "Qwen2, chat", "T5", "BERT")  # the others are `full`

LABELS = ("flu", "cold")
ROWS = Corpus(("hot and tired", "wet nose", "an ache", "sneezing a lot") * 2, ("flu", "cold") * 4, Provenance.PUBLIC)
RECORDS = Corpus(("what is flu", "what is a cold") * 4, ("a fever", "a wet nose") * 4, Provenance.PUBLIC)
# With words after the instruction, so that a model without a chat template sees its end.
WORDS = Task(
    templates=Templates(student="Question: {instruction}\nAnswer:", professional="Question: {instruction}\nAnswer:")
)
TRAINING = GeneratorTraining(
    expected_batch_size=2, max_physical_batch_size=2, steps=4, max_length=48, learning_rate=0.01, rank=2, alpha=4.0
)
ONE_PASS = TaskTraining(batch=8, max_length=24, augmented_epochs=1, private_epochs=1)
GREEDY = SamplingParams.greedy(4)


def client(folder: str, place: Path, rows: Corpus, labels: tuple[str, ...], **more: object) -> ClientSide:
    """A client whose models are all this one; a model that does not fit is refused, as before a run."""
    config = Client(generator=folder, task_model=folder, budget=Budget(8.0), generator_training=TRAINING, **more)  # type: ignore[arg-type]  # of any type
    ledger, site = Ledger(place / "ledger.sqlite", Account("d", None)), ClientData(train=rows, test=rows)
    return ClientSide(0, config, labels, len(rows), 1, "row", place, "run", ledger, lambda: site, True, task=WORDS)


def server_llm(folder: str) -> LocalLLM:
    check(folder, "llm")
    return LocalLLM.load(folder, workers=1)


def as_generator(folder: str, place: Path) -> None:
    check(folder, "generator")
    order = Synthesize(per_label=2, temperature=0.8, top_p=0.95, max_new_tokens=6, seed=3)
    [reply] = together([synthesize(client(folder, place, ROWS, LABELS), order, "digest")])
    assert reply.statement.guarantee == "dp"
    assert reply.statement.epsilon <= 8.0
    assert len(reply.corpus) + reply.unfinished == 4


def as_llm(folder: str, place: Path) -> None:
    llm = server_llm(folder)
    assert len(llm.complete(["flu:", "cold: a"], GREEDY, seed=0)) == 2
    assert all(-math.inf < score < 0 for score in llm.score(["flu:", "cold:"], [" hot", " wet"]))


def as_llm_that_answers(folder: str, place: Path) -> None:
    llm = server_llm(folder)
    asked = Chat("What is a cold?", "Be short.", (("What is flu?", "A fever."),))
    assert len(llm.complete([asked], GREEDY, seed=0)) == 1
    assert -math.inf < llm.score([asked], ["a wet nose"])[0] < 0


def as_professional(folder: str, place: Path) -> None:
    llm = server_llm(folder)
    if not llm.chats:
        with pytest.raises(BadValue, match="no chat template that would end it: write words after it"):
            respond(llm, RECORDS, 6, task=Task(templates=Templates(professional="{instruction}")))
    found = respond(llm, RECORDS, 6, task=WORDS)
    assert len(found.corpus) + sum(found.dropped.values()) == len(RECORDS)


def as_student(folder: str, place: Path) -> None:
    check(folder, "generator")
    start = new_adapter(folder, rank=2, alpha=4.0, seed=0)
    [reply] = together([finetune(client(folder, place, RECORDS, ()), Finetune(start, 0, False), "digest")])
    assert reply.statement.guarantee == "dp"
    assert any(not np.array_equal(array, start.arrays[name]) for name, array in reply.adapter.arrays.items())
    how = SamplingParams(temperature=0.7, max_new_tokens=8)
    written = write(Engine(), folder, reply.adapter, 3, how, seed=0, task=WORDS)
    assert len(written.corpus) + sum(written.dropped.values()) == 3
    tuning = Tuning(epochs=1, batch=4, rank=2, alpha=4.0)
    _, loss = taught(Engine(), folder, reply.adapter, RECORDS, tuning, loss_on="response", seed=0, task=WORDS)
    assert 0 < loss < math.inf


def as_judge(folder: str, place: Path) -> None:
    drafts = ROWS.take(range(4))
    kept = judge_by_instruction(server_llm(folder), {0: drafts}, {0: [[0, 1], [2, 3]]}, labels=LABELS, keep=1, seed=0)
    assert len(kept[0].corpus) + sum(kept[0].dropped.values()) == 4
    assert set(kept[0].dropped) <= {"unreadable judgement", "beyond those selected"}


def as_embedder(folder: str, place: Path) -> None:
    check(folder, "embedder")
    one, two = Embedder.load(folder, workers=1).embed(["hot", "a wet nose"])
    assert np.isfinite([one, two]).all()
    assert np.linalg.norm(one - two) > 1e-3


def as_task_model(folder: str, place: Path, trains: str = "all") -> None:
    here = client(folder, place, ROWS, LABELS, task_training=replace(ONE_PASS, trains=trains))  # type: ignore[arg-type]  # a parameter is a text
    [asked] = [(name, role) for name, role in client_models(here.config) if role != "generator"]
    assert asked == (folder, "task_model" if trains == "all" else "embedder")
    check(*asked)
    learn(here, Learn(seed=0, corpus=None))
    assert 0 <= evaluate(here).metrics["accuracy"] <= 1


def as_head(folder: str, place: Path) -> None:
    as_task_model(folder, place, "head")


ROLES: dict[str, Callable[[str, Path], None]] = {
    "generator": as_generator,
    "LLM goes on": as_llm,
    "LLM answers": as_llm_that_answers,
    "professional": as_professional,
    "student": as_student,
    "judge": as_judge,
    "embedder": as_embedder,
    "task model": as_task_model,
    "head": as_head,
}


@cache
def table() -> tuple[list[str], dict[str, dict[str, str]], dict[str, str]]:
    """Of the page: the roles, what it says of each model in each, and the messages of refusals by number."""
    section = PAGE.read_text().partition("## Which family fits which role\n")[2].partition("\n## ")[0]
    first = section[section.index("|") :].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    (_, *roles), _, *said = rows
    reasons = dict(re.findall(r"^(\d)\. `([^`]+)`", section, re.MULTILINE))
    return roles, {name: dict(zip(roles, cells, strict=True)) for name, *cells in said}, reasons


def test_the_page_has_each_model_and_each_role() -> None:
    roles, said, reasons = table()
    assert roles == list(ROLES)
    assert list(said) == list(MODELS)
    numbers = {cell.removeprefix("refused ") for cells in said.values() for cell in cells.values() if cell != "runs"}
    assert numbers == set(reasons)
    assert len(families.CHAT) >= 5
    assert {family for family, form in MODELS.values() if form == CHAT} == set(families.CHAT)


CASES = [
    pytest.param(model, role, marks=[] if model in QUICK else pytest.mark.full) for model in MODELS for role in ROLES
]


@pytest.mark.parametrize(("model", "role"), CASES)
def test_a_role_runs_or_is_refused_as_the_page_says(model: str, role: str, tmp_path: Path) -> None:
    family, form = MODELS[model]
    _, said, reasons = table()
    folder = families.folder(family, chat=form == CHAT, long=True)
    if said[model][role] == "runs":
        ROLES[role](folder, tmp_path)
        return
    with pytest.raises((BadValue, SelfCheckFailed)) as refused:
        ROLES[role](folder, tmp_path)
    assert reasons[said[model][role].removeprefix("refused ")] in str(refused.value)
