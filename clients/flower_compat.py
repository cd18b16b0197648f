"""Flower's own strategies on our clients: their messages become our requests, our replies become theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode as FlowerError

from fedsynth.federation.messages import Envelope, Evaluate, Evaluated, Finetune, Finetuned, Refused, Request
from fedsynth.federation.records import pack_request, unpack_request
from fedsynth.federation.run.directory import places
from fedsynth.lora import Adapter
from fedsynth.models.adapters import WrongAdapter, new_adapter
from fedsynth.privacy.statement import Statement
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.typed import BadValue, build

R = TypeVar("R")
ROUND, PROXIMAL, EXAMPLES = "server-round", "proximal-mu", "num-examples"  # Flower's keys


def arrays_of(adapter: Adapter) -> ArrayRecord:
    """An adapter as the arrays of Flower's strategies."""
    return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in adapter.arrays.items()})


def adapter_of(arrays: ArrayRecord, like: Adapter) -> Adapter:
    """The adapter in a strategy's arrays. It names no grants: Flower's averages do not carry them.

    Args:
        arrays: Arrays from `arrays_of` or from replies, or means of those.
        like: An adapter with the same rank, alpha, base, tensor names and shapes.

    Raises:
        WrongAdapter: If names, shapes or types differ.
    """
    found = {name: array.numpy() for name, array in arrays.items()}
    if {name: a.shape for name, a in found.items()} != {name: a.shape for name, a in like.arrays.items()}:
        raise WrongAdapter("the arrays are not the tensors of an adapter of this client's model and rank")
    if any(array.dtype.kind != "f" for array in found.values()):
        raise WrongAdapter("the tensors of an adapter must be floating-point numbers")
    # Some strategies compute in float64; the order of names is part of a request's digest.
    return replace(like, arrays={name: found[name].astype(np.float32) for name in like.arrays}, grants=())


def chosen_cell(context: Context) -> Cell:
    """The cell that a run of a stock strategy is for, on the server and on clients.

    The run-config gives the scenario, as for our own strategies. Its `arm` and `seed` may name one of the cells; the
    first is the default. The scenario's own strategy is not used.

    Raises:
        BadValue: If the scenario has no such arm or seed.
    """
    toml, _, _ = places(context.run_config, context.run_id)
    planned = cells(from_toml(toml))
    arm = str(context.run_config.get("arm", "")) or planned[0].arm
    seed = str(context.run_config.get("seed", "")) or str(planned[0].seed)
    for cell in planned:
        if (cell.arm, str(cell.seed)) == (arm, seed):
            return cell
    known = ", ".join(f"{cell.arm} with seed {cell.seed}" for cell in planned)
    raise BadValue(f"run-config names arm {arm!r} with seed {seed}, the scenario has {known}")


def common_start(cell: Cell) -> Adapter:
    """The start of all clients if the server sends no arrays; `LoraAverage` starts from the same adapter."""
    client = cell.scenario.client
    training = client.generator_training
    return _new(client.generator, training.rank, training.alpha, cell.public_seed("adapter", round=1))


@lru_cache(maxsize=2)
def _new(name: str, rank: int, alpha: float, seed: int) -> Adapter:
    return new_adapter(name, rank=rank, alpha=alpha, seed=seed)


def read_message(content: RecordDict, kind: type[R], context: Context) -> tuple[R, Envelope, str]:
    """A stock message as one of our requests, with the digest that the request of our own strategies would have.

    Args:
        content: One ArrayRecord, empty or an adapter's, and one ConfigRecord.
        kind: `Finetune` for the plain action `train`, `Evaluate` for `evaluate`.
        context: Flower's context; its partition is the client.

    Raises:
        BadValue: If it holds anything else, has a key that clients do not read, or a SuperNode hosts several clients.
        WrongAdapter: If the arrays are not an adapter of this client's model.
    """
    arrays, config = _only(content.array_records), _only(content.config_records)
    cell = chosen_cell(context)
    client, number = _client(cell, context), build(int, config.get(ROUND), ROUND)
    if strange := set(config) - {ROUND, PROXIMAL}:  # refused: ignoring a learning rate would mislead its sender
        raise BadValue(f"clients read {ROUND} and {PROXIMAL} only, not {sorted(strange)}: the scenario says the rest")
    common = common_start(cell)
    adapter = adapter_of(arrays, common) if arrays else common
    request: Request[Any] = Evaluate(adapter)
    if kind is Finetune:
        seed = cell.public_seed("train", round=number, client=client)
        mu = build(float, config.get(PROXIMAL, 0.0), PROXIMAL)
        request = Finetune(adapter, seed, proximal=mu or None)
    return unpack_request(pack_request(request, Envelope("simulated", cell.arm, cell.seed, number, client)), kind)


def _only(records: Mapping[str, R]) -> R:
    if len(records) != 1:
        raise BadValue(f"a stock message holds one ArrayRecord and one ConfigRecord, this one {sorted(records)}")
    return next(iter(records.values()))


def _client(cell: Cell, context: Context) -> int:
    """The partition: a stock message names no client, so that each client needs a SuperNode of its own."""
    clients = 1 if cell.scenario.data.pooled else cell.scenario.data.clients
    client, nodes = (int(str(context.node_config.get(k, d))) for k, d in (("partition-id", 0), ("num-partitions", 1)))
    if not client < clients <= nodes:
        raise BadValue(
            f"a stock strategy needs one SuperNode per client: partition {client} of {nodes}, {clients} clients"
        )
    return client


def write_reply(message: Message, reply: Finetuned | Evaluated | Refused) -> Message:
    """A sealed reply in the form of Flower's strategies; a refusal as an error whose reason is its code."""
    if isinstance(reply, Refused):
        return Message(Error(FlowerError.CLIENT_APP_RAISED_EXCEPTION, reply.code.value), reply_to=message)
    if isinstance(reply, Finetuned):
        arrays, metrics = arrays_of(reply.adapter), MetricRecord({EXAMPLES: reply.records})
        privacy = _statement_record(reply.statement, reply.adapter)
        return Message(RecordDict({"arrays": arrays, "metrics": metrics, "privacy": privacy}), reply_to=message)
    metrics = MetricRecord({EXAMPLES: reply.examples, **reply.metrics})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _statement_record(statement: Statement, adapter: Adapter) -> ConfigRecord:
    """A statement as a flat record, without figures that are None."""
    facts = {k: v for k, v in statement.to_dict().items() if isinstance(v, str | int | float)}
    return ConfigRecord({**facts, "grants": list(adapter.grants)})


def largest_epsilon(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """For a strategy's `train_metrics_aggr_fn`: (epsilon, delta) over clients, inf if one has no guarantee.

    A strategy that drops replies (Krum) passes only the rest; the dropped ones were released all the same.
    """
    del weighted_by_key  # a bound is no mean
    said = [reply.config_records["privacy"] for reply in replies]
    epsilon, delta = (max(_bound(s.get(k)) for s in said) for k in ("epsilon", "delta"))
    return MetricRecord({"epsilon": epsilon, "delta": delta})


def _bound(value: object) -> float:
    """A figure of a reply; inf for anything else, as a maximum may skip a NaN."""
    return float(value) if isinstance(value, int | float) and value >= 0 else math.inf
