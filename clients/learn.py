"""The task model or adapter that stays with the client; it learns the server's text and private text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.finetune import on_base, put_to_use, slots_of, train_without_guarantee
from fedsynth.clients.local_model import keep_facts
from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import Learn, Learnt
from fedsynth.models.adapters import new_adapter, read_adapter
from fedsynth.models.devices import device
from fedsynth.models.hub import weights_hash
from fedsynth.models.loading import load_tokenizer
from fedsynth.models.weights import load_weights, save_weights
from fedsynth.training.baselines import Majority, Nearest
from fedsynth.training.classifier import confidences, fit_classifier, new_task_model

WEIGHTS = "task_model.safetensors"


class NoTaskModel(RuntimeError):
    """The client has learnt nothing yet."""


def learn(client: ClientSide, request: Learn) -> Learnt:
    """Trains the task model. Every arm passes over private text as often, whatever the server sent.

    Raises:
        NoTaskModel: If the server's text is all that there is to learn from, and there is none.
    """
    sent = request.corpus or Corpus((), (), Provenance.PUBLIC)
    task = client.config.task_training
    if task.trains == "llm_zero_shot":  # the generator as it is
        return Learnt(received=len(sent))
    if task.schedule == "synthetic_only" and not (task.baseline or len(sent)):
        raise NoTaskModel('task_training.schedule = "synthetic_only", and the server sent no text')
    if client.instructs:
        _learn_to_respond(client, sent, request.seed)
    else:
        _learn_labels(client, sent, request.seed)
    return Learnt(received=len(sent))


def _learn_labels(client: ClientSide, sent: Corpus, seed: int) -> None:
    settings = client.config.task_training
    tokenizer = load_tokenizer(client.config.task_model)
    model = _new(client, seed)
    if isinstance(model, Majority | Nearest):
        known = _wordings(client) if settings.trains == "zero_shot" else client.train
        model.learn(known, client.labels, settings.max_length, seed)
    else:
        weights = _agreement(client, sent, seed) if settings.weights == "agreement" and len(sent) else None
        for corpus, epochs, own in _trainings(client, sent, seed):
            fit_classifier(model, tokenizer, corpus, client.labels, settings, epochs=epochs, seed=own, weights=weights)
    save_weights(model, client.work / WEIGHTS)
    keep_facts(client)


def _trainings(client: ClientSide, sent: Corpus, seed: int) -> Iterator[tuple[Corpus, int, int]]:
    """Text, passes and seed of each training. The seed of private text is the same in every arm."""
    task = client.config.task_training
    if task.schedule != "mixed" and len(sent):
        yield sent, task.augmented_epochs, seed
    if task.schedule == "sequential":
        yield client.train, task.private_epochs, seed + 1
    if task.schedule == "mixed":
        yield _beside(client.train, sent), task.private_epochs, seed + 1


def _agreement(client: ClientSide, sent: Corpus, seed: int) -> list[float]:
    """1 for each private text; for each text of the server the probability of its label, by a model of the private text
    alone. It learnt that without noise, so that the weights stay here: no count and no request follows from them."""
    settings, tokenizer = client.config.task_training, load_tokenizer(client.config.task_model)
    model = _new(client, seed)
    fit_classifier(
        model, tokenizer, client.train, client.labels, settings, epochs=settings.private_epochs, seed=seed + 1
    )
    found = confidences(model, tokenizer, sent, client.labels, settings.max_length)
    return [*[1.0] * len(client.train), *found]


def _wordings(client: ClientSide) -> Corpus:
    """Each label in words, as one text; public."""
    return Corpus(tuple(map(client.task.in_words, client.labels)), client.labels, Provenance.PUBLIC)


def _beside(private: Corpus, sent: Corpus) -> Corpus:
    """One corpus of both, which is as private as the first."""
    return Corpus(private.prompts + sent.prompts, private.answers + sent.answers, Provenance.PRIVATE)


def _learn_to_respond(client: ClientSide, sent: Corpus, seed: int) -> None:
    """Trains an adapter of the client's model for instructions, on the same schedule; it stays with the client."""
    settings, base = client.config.generator_training, client.config.generator
    schedule = client.config.task_training.schedule
    start = new_adapter(base, rank=settings.rank, alpha=settings.alpha, seed=seed, precision=settings.precision)
    model = on_base(client, start)
    written = slots_of(client, sent, len(sent)) if len(sent) else []
    if schedule != "mixed" and written:
        train_without_guarantee(client, model, written, seed=seed)
    if schedule != "synthetic_only":
        real = slots_of(client, client.train, client.records)
        train_without_guarantee(client, model, real, seed=seed + 1, beside=written if schedule == "mixed" else [])
    put_to_use(client, read_adapter(model, weights_hash(base)))


def task_model(client: ClientSide) -> Any:
    """The task model as last trained.

    Raises:
        NoTaskModel: If none was trained.
    """
    path = client.work / WEIGHTS
    if not path.is_file():
        raise NoTaskModel("evaluate was asked before learn")
    model = _new(client, seed=0)
    load_weights(model, path)
    return model


def _new(client: ClientSide, seed: int) -> Any:
    config = client.config
    return new_task_model(config.task_model, len(client.labels), config.task_training.trains, seed).to(device())
