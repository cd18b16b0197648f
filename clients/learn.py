"""What stays at the client: a task model, or an adapter; augmented text first, private text second."""

from __future__ import annotations

from typing import Any

from fedsynth.clients.finetune import on_base, put_to_use, train_without_guarantee
from fedsynth.clients.home import Home
from fedsynth.clients.local_model import keep_facts
from fedsynth.federation.messages import Learn, Learnt
from fedsynth.models.adapters import new_adapter, read_adapter
from fedsynth.models.hub import weights_hash
from fedsynth.models.loading import device, load_tokenizer, load_weights, save_weights
from fedsynth.training.classifier import fit_classifier, new_task_model

WEIGHTS = "task_model.safetensors"


class NoTaskModel(RuntimeError):
    """The client has learnt nothing yet."""


def learn(home: Home, order: Learn) -> Learnt:
    """Trains the task model. Every arm gets the same schedule on private text, whatever came before."""
    if home.instructs:
        return _learn_to_respond(home, order)
    settings = home.config.task_training
    tokenizer = load_tokenizer(home.config.task_model)
    model = _new(home, order.seed)
    rate = settings.learning_rate
    if order.corpus is not None and len(order.corpus) > 0:
        epochs = settings.augmented_epochs
        fit_classifier(model, tokenizer, order.corpus, home.labels, settings, epochs=epochs, rate=rate, seed=order.seed)
    epochs = settings.private_epochs
    fit_classifier(model, tokenizer, home.train, home.labels, settings, epochs=epochs, rate=rate, seed=order.seed + 1)
    save_weights(model, home.work / WEIGHTS)
    keep_facts(home)
    return Learnt(received=0 if order.corpus is None else len(order.corpus))


def _learn_to_respond(home: Home, order: Learn) -> Learnt:
    """Instructions: an adapter of the client's model, trained on the same schedule, that stays with the client."""
    settings, base = home.config.generator_training, home.config.generator
    start = new_adapter(base, rank=settings.rank, alpha=settings.alpha, seed=order.seed, precision=settings.precision)
    model = on_base(home, start)
    if order.corpus is not None and len(order.corpus) > 0:
        train_without_guarantee(home, model, order.corpus, len(order.corpus), seed=order.seed)
    train_without_guarantee(home, model, home.train, home.records, seed=order.seed + 1)
    put_to_use(home, read_adapter(model, weights_hash(base)))
    return Learnt(received=0 if order.corpus is None else len(order.corpus))


def task_model(home: Home) -> Any:
    """The task model as last trained.

    Raises:
        NoTaskModel: If none was.
    """
    path = home.work / WEIGHTS
    if not path.is_file():
        raise NoTaskModel("evaluate was asked before learn")
    model = _new(home, seed=0)
    load_weights(model, path)
    return model


def _new(home: Home, seed: int) -> Any:
    config = home.config
    return new_task_model(config.task_model, len(home.labels), config.task_training.trains, seed).to(device())
