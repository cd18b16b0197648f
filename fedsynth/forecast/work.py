"""The client's work for each request, in units: the only such table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedsynth.clients.client_side import declared_records
from fedsynth.data.partition import class_list, divide
from fedsynth.federation.messages import (
    SUMMING,
    Adopt,
    Evaluate,
    Finetune,
    Learn,
    Request,
    Score,
    SelfTrain,
    Synthesize,
    Vote,
)
from fedsynth.forecast.profiling import Unit
from fedsynth.scenario.client import SHOTS, Client
from fedsynth.scenario.schema import Cell

Work = dict[Unit, float]  # number of each unit


@dataclass(frozen=True)
class Facts:
    """The declared facts of one client.

    Attributes:
        arm: The arm with the settings.
        client: The client's models and trainings.
        labels: The public label list.
        records: Declared number of privacy units.
        train: Number of training texts.
        test: Number of test texts.
        choices: Number of responses that an instruction chooses from, at most; 0 for free ones.
    """

    arm: str
    client: Client
    labels: tuple[str, ...]
    records: int
    train: int
    test: int
    choices: int = 0


def _synthesize(request: Synthesize, of: Facts) -> Work:
    if request.true_texts:
        return {}
    sampling = Unit("sample", of.arm, request.max_new_tokens, temperature=request.temperature, top_p=request.top_p)
    return {**_trained(of), sampling: request.per_label * len(of.labels)}


def _finetune(request: Finetune, of: Facts) -> Work:
    return _trained(of, frozen_a=request.frozen_a)


def _trained(of: Facts, *, frozen_a: bool = False) -> Work:
    steps: Work = {Unit("step", of.arm, frozen_a=frozen_a): of.client.generator_training.steps}
    return {**steps, Unit("plan", of.arm): 1} if of.client.guarantee == "dp" else steps


def _self_train(request: SelfTrain, of: Facts) -> Work:
    steps, step = of.client.generator_training.steps, Unit("own_step", of.arm)
    if request.training == "isolated" and request.share == 1:
        return {step: steps}
    both = 1 + request.keep / of.records  # batches grow in proportion
    trainings = {"isolated": 2.0, "mixed": 1 + both, "personal": 2 + both}[request.training]
    written = Unit("demonstrated", of.arm, request.max_new_tokens, request.shots)
    return {written: 2 * request.candidates, Unit("rate", of.arm): 2 * request.candidates, step: trainings * steps}


def _score(request: Score, of: Facts) -> Work:
    read: Work = {Unit("read", of.arm): len(request.corpus)}
    if of.client.guarantee == "dp" and of.client.scores == "model":  # once for all rounds
        return {**read, Unit("scorer_step", of.arm): of.client.scorer_training.steps}
    return read


def _vote(request: Vote, of: Facts) -> Work:
    """Candidates and private texts are embedded; the task model's pass is the measure of an encoder's."""
    plan: Work = {Unit("plan", of.arm): 1} if of.client.guarantee == "dp" else {}
    return {Unit("read", of.arm): len(request.corpus) + of.train, **plan}


def _learn(request: Learn, of: Facts) -> Work:
    received, task = len(request.corpus or ()), of.client.task_training
    private = 0 if task.schedule == "synthetic_only" else of.train
    if task.trains == "llm_zero_shot":
        return {}
    if not of.labels:
        steps = of.client.generator_training.steps
        if task.schedule == "mixed":  # batches are as much larger
            return {Unit("own_step", of.arm): steps * (1 + received / of.records)}
        return {Unit("own_step", of.arm): steps * (bool(received) + bool(private))}
    if task.baseline:  # texts are embedded, at most
        shown = {"majority": 0, "few_shot": min(of.train, SHOTS * len(of.labels)), "zero_shot": len(of.labels)}
        return {Unit("read", of.arm): shown[task.trains]} if shown[task.trains] else {}
    if task.trains == "head":  # each text is embedded once; the head is little work
        return {Unit("read", of.arm): received + private}
    passes = task.private_epochs if task.schedule == "mixed" else task.augmented_epochs
    alone = private * task.private_epochs if task.weights == "agreement" else 0
    return {Unit("fit", of.arm): received * passes + private * task.private_epochs + alone}


def _evaluate(request: Evaluate, of: Facts) -> Work:
    loss: Work = {} if request.adapter is None else {Unit("rate", of.arm): of.test}
    if not of.labels:
        chosen: Work = {Unit("choose", of.arm, of.choices): of.test} if of.choices else {}
        return {**loss, **chosen, Unit("respond", of.arm, of.client.answer_tokens): of.test}
    return loss or ({} if of.client.task_training.trains == "majority" else {Unit("read", of.arm): of.test})


WORK: dict[type[Request[Any]], Callable[[Any, Facts], Work]] = {
    Synthesize: _synthesize,
    Finetune: _finetune,
    SelfTrain: _self_train,
    Score: _score,
    Vote: _vote,
    Learn: _learn,
    Evaluate: _evaluate,
    Adopt: lambda *_: {},
    **dict.fromkeys(SUMMING, lambda *_: {}),  # keys, shares and signatures: milliseconds
}


def facts_of(cell: Cell, labels: tuple[str, ...]) -> dict[int, Facts]:
    """The declared facts of every client: counts, no text."""
    data = cell.scenario.data
    choices = len(class_list(data)) if data.task == "choice" else 0
    clients = 1 if data.pooled else data.clients
    if data.world is not None:
        many = data.clients if data.pooled else 1
        sizes = [(data.train_per_client * many, data.test_per_client * many)] * clients
    else:
        sites = divide(data, cell.seed).sites
        sizes = [(len(site.train), len(site.test)) for site in sites]
        if data.options:
            choices = max(len(own) for site in sites for own in site.test.options or ())
    return {
        client: Facts(
            cell.arm, cell.scenario.client.of(client), labels, declared_records(cell, client), *sizes[client], choices
        )
        for client in range(clients)
    }
