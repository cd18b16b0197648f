"""What stays at the client: a task model, or an adapter; augmented text first, private text second."""

from __future__ import annotations

from typing import Any

from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.finetune import on_base, put_to_use, train_without_guarantee
from fedsynth.clients.local_model import keep_facts
from fedsynth.federation.messages import Learn, Learnt
from fedsynth.models.adapters import new_adapter, read_adapter
from fedsynth.models.devices import device
from fedsynth.models.hub import weights_hash
from fedsynth.models.loading import load_tokenizer
from fedsynth.models.weights import load_weights, save_weights
from fedsynth.training.classifier import fit_classifier, new_task_model

WEIGHTS = "task_model.safetensors"


class NoTaskModel(RuntimeError):
    """The client has learnt nothing yet."""


def learn(client: ClientSide, request: Learn) -> Learnt:
    """Trains the task model. Every arm gets the same schedule on private text, whatever came before."""
    if client.instructs:
        return _learn_to_respond(client, request)
    settings = client.config.task_training
    tokenizer = load_tokenizer(client.config.task_model)
    model = _new(client, request.seed)
    if request.corpus is not None and len(request.corpus) > 0:
        epochs = settings.augmented_epochs
        fit_classifier(model, tokenizer, request.corpus, client.labels, settings, epochs=epochs, seed=request.seed)
    epochs = settings.private_epochs
    fit_classifier(model, tokenizer, client.train, client.labels, settings, epochs=epochs, seed=request.seed + 1)
    save_weights(model, client.work / WEIGHTS)
    keep_facts(client)
    return Learnt(received=0 if request.corpus is None else len(request.corpus))


def _learn_to_respond(client: ClientSide, request: Learn) -> Learnt:
    """Instructions: an adapter of the client's model, trained on the same schedule, that stays with the client."""
    settings, base = client.config.generator_training, client.config.generator
    start = new_adapter(base, rank=settings.rank, alpha=settings.alpha, seed=request.seed, precision=settings.precision)
    model = on_base(client, start)
    if request.corpus is not None and len(request.corpus) > 0:
        train_without_guarantee(client, model, request.corpus, len(request.corpus), seed=request.seed)
    train_without_guarantee(client, model, client.train, client.records, seed=request.seed + 1)
    put_to_use(client, read_adapter(model, weights_hash(base)))
    return Learnt(received=0 if request.corpus is None else len(request.corpus))


def task_model(client: ClientSide) -> Any:
    """The task model as last trained.

    Raises:
        NoTaskModel: If none was.
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
