"""Several clients' adapters in one pass: each is trained as if it were alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode as FlowerError
from inprocess import Played, instructions, play
from torch import Tensor, nn

from fedsynth.clients import app
from fedsynth.clients import batched_training as module
from fedsynth.clients.finetune import check
from fedsynth.dpsgd import UnknownWeight, clipper
from fedsynth.dpsgd.stacked import Stacked, stacked
from fedsynth.federation.messages import Envelope, ErrorCode, Finetune, Finetuned
from fedsynth.federation.records import joined, pack_request, parted, unpack_reply
from fedsynth.lora import Adapter
from fedsynth.models.adapters import attach_lora
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario.client import Client, GeneratorTraining
from fedsynth.training.dp_training import (
    PublicRandomness,
    Training,
    clipped_sum,
    clipped_sums,
    next_token_losses,
    train_generator,
    train_stacked,
    trainable,
    without_guarantee,
)
from fedsynth.training.examples import Example, Slot
from fedsynth.training.selfcheck import SelfCheckFailed, check_stack

torch.set_num_threads(1)
C, CLIENTS = 0.3, 3
SETTINGS = GeneratorTraining(learning_rate=0.01, clip_norm=C, rank=3, alpha=6.0, max_physical_batch_size=6)
AVERAGE = "fedsynth.strategies.lora_avg:LoraAverage"


def base(family: str, dtype: Any = torch.float64) -> Any:
    """A frozen model with LoRA."""
    none = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "t5": ("dropout_rate",)}.get(family, ())
    model = families.model(family, 0, **dict.fromkeys(none, 0.0)).to(dtype)
    model = attach_lora(model, rank=3, alpha=6.0, seed=0)
    for weight in trainable(model):
        weight.data = weight.data.to(torch.float32 if dtype == torch.bfloat16 else dtype)
    return model


def adapters(model: Any, frozen_a: bool = False) -> dict[nn.Parameter, Tensor]:
    """One adapter for each client, past its start."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, weight in model.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(CLIENTS, *weight.shape, generator=generator, dtype=torch.float64) * 0.3
            found[weight] = drawn.to(weight.dtype)
            weight.requires_grad_("lora_A" not in name or not frozen_a)
    return found


def alone(model: Any, factors: dict[nn.Parameter, Tensor], client: int) -> Any:
    """The model with one client's adapter in place; an equal one, so that nothing is shared."""
    own = copy.deepcopy(model)
    with torch.no_grad():
        for place, stack in zip((w for n, w in own.named_parameters() if "lora_" in n), factors.values(), strict=True):
            place.copy_(stack[client])
    return own


def slots(client: int, units: int = 10) -> list[Slot]:
    """Units of up to three texts of many lengths, one of them empty; clients differ in all of it."""
    rng = np.random.default_rng(client)

    def text() -> Example:
        return Example(tuple(rng.integers(3, families.VOCABULARY, int(rng.integers(4, 14))).tolist()), 2)

    return [(), *(tuple(text() for _ in range(int(rng.integers(1, 4)))) for _ in range(units + client - 1))]


def training(client: int, sigma: float, own: Sequence[Slot]) -> Training:
    noise = GrantRandomness(bytes([client]) * 32) if sigma else PublicRandomness(client)
    clip_norm, pull = (C, 0.0) if sigma else (math.inf, 0.5)
    # Clients differ in all that may differ: one with fewer records has another rate and more noise.
    return Training(own, 0.3 + 0.1 * client, 4 + client, 4, clip_norm, sigma * (1 + client), noise, proximal=pull)


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    first, second = (torch.cat([t.detach().flatten().double() for t in each]) for each in (one, other))
    return float((first - second).norm() / second.norm())


# --- Exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_a", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 1.5], ids=["plain", "dp"])
@pytest.mark.parametrize(("family", "error"), [("gpt2", 1e-12), ("llama", 1e-6), ("t5", 1e-6)])  # the latter's norms
def test_each_client_ends_where_it_would_alone(family: str, error: float, sigma: float, frozen_a: bool) -> None:
    model = base(family)
    factors = adapters(model, frozen_a)
    expected = []
    for client in range(CLIENTS):
        own = alone(model, factors, client)
        assert train_generator(own, training(client, sigma, slots(client)), SETTINGS, pad=0) == 4
        expected.append([w for n, w in own.named_parameters() if "lora_" in n])
    before = {n: w.detach().clone() for n, w in model.named_parameters()}
    start = [stack.detach().clone() for stack in factors.values()]
    many = [training(client, sigma, slots(client)) for client in range(CLIENTS)]
    assert train_stacked(model, factors, many, SETTINGS, pad=0) == 4
    for client in range(CLIENTS):
        ends = [stack[client] for stack in factors.values()]
        assert apart(ends, expected[client]) <= error
        assert apart(ends, [stack[client] for stack in start]) > 0.01
    assert all(torch.equal(w, before[n]) for n, w in model.named_parameters())  # the model's own adapter is not used
    moved = {
        n
        for n, w, s in zip((n for n in before if "lora_" in n), factors.values(), start, strict=True)
        if not torch.equal(w, s)
    }
    assert moved == {n for n in before if "lora_B" in n or ("lora_A" in n and not frozen_a)}


def sums(model: Any, factors: Any, units: Sequence[Sequence[Slot]], clip_norm: float = C) -> list[list[Tensor]]:
    """By client."""
    with stacked(model.train(), factors, clip_norm) as engine:
        return [[own] for own in clipped_sums(engine, model, units, pad=0, max_physical_batch_size=5)]


def of_one(dtype: Any, client: int) -> list[Tensor]:
    """The sum of the engine for one, without a clip."""
    model = base("llama", dtype)
    own = alone(model, adapters(model), client)
    with clipper(own.train(), math.inf) as engine:
        return clipped_sum(engine, own, slots(client), pad=0, max_physical_batch_size=5)


def test_in_half_precision_a_client_s_plain_sum_is_as_exact_as_that_of_the_engine_for_one() -> None:
    model = base("llama", torch.bfloat16)
    units = [slots(client) for client in range(CLIENTS)]
    for client, found in enumerate(sums(model, adapters(model), units, math.inf)):
        exact = of_one(torch.float64, client)
        assert apart(found, exact) < 2 * apart(of_one(torch.bfloat16, client), exact)


# --- What must never happen ------------------------------------------------------------------------------------------


def test_no_client_s_text_enters_another_s_sum() -> None:
    model = base("gpt2")
    factors = adapters(model)
    units = [slots(client) for client in range(CLIENTS)]
    before = sums(model, factors, units)
    after = sums(model, factors, [units[0], slots(7), units[2]])
    assert apart(after[1], before[1]) > 0.1
    assert max(apart(after[0], before[0]), apart(after[2], before[2])) <= 1e-12
    assert not any(total.any() for total in sums(model, factors, [units[0], [(), ()], units[2]])[1])


def test_a_unit_moves_its_client_s_sum_by_at_most_c() -> None:
    model = base("llama", torch.float32)
    factors = adapters(model)
    units = [slots(client, 6) for client in range(CLIENTS)]
    whole = sums(model, factors, units)
    for left_out in range(1, 5):
        fewer = sums(model, factors, [units[0], [*units[1][:left_out], (), *units[1][left_out + 1 :]], units[2]])
        moved = [one.double() - other.double() for one, other in zip(whole[1], fewer[1], strict=True)]
        assert 0 < math.sqrt(sum(float(m.square().sum()) for m in moved)) <= C


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_counts_for_nothing_and_spoils_nobody(bad: float) -> None:
    model = base("gpt2")
    texts = [Example((5, 6, 7, 8 + n), 2) for n in range(4)]
    found = []
    for chosen in ([0, 1, 2, 3], [0, 1, 3]):
        scale = torch.tensor([bad if n == 2 else 1.0 for n in chosen], dtype=torch.float64)
        with stacked(model.train(), adapters(model), C) as engine:
            read = [texts[n] for n in chosen]
            engine.add(lambda: next_token_losses(model, read, 0) * scale, chosen, [(0, 1, 1, 2)[n] for n in chosen])  # noqa: B023 - called at once
            found.append([engine.take()])
    assert apart(*found) <= 1e-12


def test_noise_is_each_client_s_own_stream() -> None:
    model = base("gpt2")
    factors = adapters(model)
    start = [stack.detach().clone() for stack in factors.values()]
    empty = [replace(training(client, 1.0, [()] * 5), steps=1) for client in (0, 0, 1)]  # the first two share a key
    train_stacked(model, factors, empty, SETTINGS, pad=0)
    moved = [
        [stack[client] - s[client] for stack, s in zip(factors.values(), start, strict=True)] for client in range(3)
    ]
    # One step of Adam goes by the sign of the noise.
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(moved[0], moved[1], strict=True))
    agree = torch.cat([(one * two > 0).flatten() for one, two in zip(moved[0], moved[2], strict=True)])
    assert abs(float(agree.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(len(agree))


def test_what_cannot_be_stacked_is_refused_by_name() -> None:
    model = base("gpt2")
    factors = adapters(model)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(UnknownWeight, match="wte"), stacked(model, factors, C):
        pass
    model.get_input_embeddings().weight.requires_grad_(False)
    factors.pop(next(iter(factors)))
    with pytest.raises(UnknownWeight, match="lora_A"), stacked(model, factors, C):
        pass


def test_examples_that_meet_in_a_layer_are_refused() -> None:
    model = base("gpt2")
    factors = adapters(model)

    def one_for_both() -> Tensor:
        logits: Tensor = model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits
        return logits.sum().view(1).expand(2)

    with stacked(model.train(), factors, C) as engine, pytest.raises(UnknownWeight, match="examples"):
        engine.add(one_for_both, [0, 1], [0, 1])
    assert isinstance(engine, Stacked)
    assert "forward" not in {k for m in model.modules() for k in m.__dict__}


@pytest.mark.parametrize("other", [{"steps": 5}, {"clip_norm": 1.0}, {"proximal": 0.5}])
def test_trainings_of_different_shape_are_refused(other: dict[str, Any]) -> None:
    model = base("gpt2")
    trainings = [training(0, 1.0, slots(0)), training(1, 1.0, slots(1)), replace(training(2, 1.0, slots(2)), **other)]
    with pytest.raises(ValueError, match="same steps, clip norm and proximal pull"):
        train_stacked(model, adapters(model), trainings, SETTINGS, pad=0)


# --- In a run --------------------------------------------------------------------------------------------------------


def in_stacks(toml: str, stack: int) -> str:
    few = toml.replace('llm = "scripted"', 'llm = "scripted"\nquorum = 0.5')
    return few.replace("answer_tokens = 8", f"answer_tokens = 8\nstacked = {stack}")


def played(tmp_path: Path, guarantee: str, stack: int, nodes: int | None = None) -> Played:
    tmp_path.mkdir()
    toml = instructions(tmp_path, AVERAGE, guarantee=guarantee, clients=5, rows=60, rounds=2)
    return play(in_stacks(toml, stack), tmp_path, nodes=nodes)


def near(one: Adapter, other: Adapter) -> bool:
    return all(np.allclose(one.arrays[n], other.arrays[n], atol=2e-4) for n in one.arrays)


@pytest.mark.parametrize("guarantee", ["dp", "none"])
def test_stacks_and_chunks_change_no_result_but_for_rounding(
    tmp_path: Path, guarantee: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    real = module.train_stacked

    def watched(model: Any, factors: Any, trainings: Any, *rest: Any, **more: Any) -> int:
        widths.append(len(trainings))
        return real(model, factors, trainings, *rest, **more)

    monkeypatch.setattr(module, "train_stacked", watched)
    alone = played(tmp_path / "alone", guarantee, stack=1)
    assert widths == []
    stack = played(tmp_path / "stack", guarantee, stack=2, nodes=2)
    assert widths == [2, 2] * 2  # clients 0 and 1, clients 2 and 3; client 4 by itself; two rounds
    for run in (alone, stack):
        assert len(run.replies(Finetune)) == 10
    for one, other in zip(alone.replies(Finetune), stack.replies(Finetune), strict=True):
        assert near(one.adapter, other.adapter)
        assert one.adapter.grants == other.adapter.grants
        assert one.statement == other.statement
        assert one.records == other.records
    for client in range(5):
        first, second = (
            [{k: v for k, v in e.items() if k != "at"} for e in run.client(client).ledger.entries()]
            for run in (alone, stack)
        )
        assert first == second
    # The same stacks on another number of nodes: bit by bit.
    again = played(tmp_path / "again", guarantee, stack=2, nodes=5)
    for one, other in zip(stack.replies(Finetune), again.replies(Finetune), strict=True):
        assert all(np.array_equal(one.adapter.arrays[n], other.adapter.arrays[n]) for n in one.adapter.arrays)


def test_one_client_that_refuses_leaves_the_others_of_its_stack_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Ledger.begin

    def fails(self: Ledger, grant: Any) -> Any:
        if "client-1" in str(self.path):
            raise OSError("disk full")
        return real(self, grant)

    monkeypatch.setattr(Ledger, "begin", fails)
    run = play(in_stacks(instructions(tmp_path, AVERAGE, clients=4, rows=48), 4), tmp_path, nodes=1)
    assert [a.adapter.grants != () for a in run.replies(Finetune) if not hasattr(a, "code")] == [True] * 3
    assert {client for client, _ in run.run_log.silent} == {1}


def test_a_training_that_fails_fails_each_of_its_clients_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.train_stacked
    calls = []

    def once(*arguments: Any, **more: Any) -> int:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("no room")
        return real(*arguments, **more)

    monkeypatch.setattr(module, "train_stacked", once)
    run = play(in_stacks(instructions(tmp_path, AVERAGE, clients=4, rows=48), 2), tmp_path, nodes=1)
    assert {client for client, _ in run.run_log.silent} in ({0, 1}, {2, 3})
    failed = run.client(min(run.run_log.silent)[0])
    assert [e["state"] for e in failed.ledger.entries() if e["kind"] == "grant"] == ["running"]  # charged, not answered


def test_parts_of_a_message_come_back_in_order() -> None:
    from flwr.app import ConfigRecord, RecordDict

    parts = [RecordDict({"fedsynth": ConfigRecord({"payload": bytes([n])})}) for n in range(12)]
    assert [p["fedsynth"]["payload"] for p in parted(joined(parts))] == [bytes([n]) for n in range(12)]
    assert parted(joined(parts[:1])) == parts[:1]
    strange = RecordDict({"fedsynth.0": ConfigRecord({}), "fedsynth.7": ConfigRecord({})})
    assert parted(strange) == [strange]
    assert parted(RecordDict({})) == [RecordDict({})]


@pytest.mark.parametrize(
    ("clients", "batch", "tokens", "asked", "stack"),
    [
        (1000, 4, 16, None, 16),
        (1000, 1, 128, None, 8),  # 1,024 tokens in a step
        (1000, 8, 64, None, 1),  # 2 would not pay
        (1000, 50, 64, None, 1),
        (1000, 50, 64, 5, 5),
        (40, 4, 16, None, 5),  # at least eight stacks, for the workers
        (4, 4, 16, None, 1),
    ],
)
def test_how_many_train_in_one_pass(
    tmp_path: Path, clients: int, batch: int, tokens: int, asked: int | None, stack: int
) -> None:
    from fedsynth.scenario.toml import from_toml

    scenario = from_toml(instructions(tmp_path, AVERAGE, rows=12))
    training = GeneratorTraining(expected_batch_size=batch, max_length=tokens)
    client: Client = replace(scenario.client, generator_training=training, stacked=asked)
    scenario = replace(scenario, client=client, data=replace(scenario.data, clients=clients))
    assert scenario.stack == stack
    hooks = replace(client, generator_training=replace(training, clipping="hooks"))
    assert replace(scenario, client=hooks).stack == 1
    assert replace(scenario, data=replace(scenario.data, pooled=True)).stack == (1 if asked is None else asked)


def test_each_client_s_own_start_is_what_is_trained_on(tmp_path: Path) -> None:
    from fedsynth.clients.batched_training import TrainRequest
    from fedsynth.models.adapters import new_adapter

    starts = [new_adapter(tiny.folder(), rank=2, alpha=4.0, seed=seed) for seed in range(3)]
    settings = GeneratorTraining(
        expected_batch_size=4, steps=2, learning_rate=1e-3, rank=2, alpha=4.0, precision="float32"
    )
    text = [(Example((5, 6, 7, 8), 2),)] * 4

    def asked(client: int) -> TrainRequest:
        return TrainRequest(tiny.folder(), starts[client], settings, without_guarantee(text, settings, client))

    together = module._trained([asked(client) for client in range(3)])
    for client, found in enumerate(together):
        [alone] = module._trained([asked(client)])
        assert near(found.adapter, alone.adapter)
        assert not near(found.adapter, together[client - 1].adapter)


def test_what_differs_in_more_than_numbers_is_trained_apart() -> None:
    from fedsynth.clients.batched_training import TrainRequest
    from fedsynth.models.adapters import new_adapter

    start = new_adapter(tiny.folder(), rank=2, alpha=4.0, seed=0)
    settings = GeneratorTraining(expected_batch_size=4, steps=2, rank=2, alpha=4.0)
    base = TrainRequest(tiny.folder(), start, settings, without_guarantee([()] * 4, settings, 0))
    others = [
        replace(base, frozen_a=True),
        replace(base, settings=replace(settings, learning_rate=0.5)),
        replace(base, training=replace(base.training, steps=3)),
        replace(base, training=replace(base.training, clip_norm=1.0)),
        replace(base, training=replace(base.training, proximal=0.1)),
        replace(base, start=replace(start, alpha=8.0)),
    ]
    assert module._alike(dict(enumerate([base, base, *others]))) == [[0, 1], *([n] for n in range(2, 8))]


def test_nobody_passes_where_all_meet_before_all_are_there_or_through() -> None:
    from fedsynth.clients.batched_training import Barrier, Trains, together

    passed: list[str] = []

    def walker(name: str, meets: int, fails: bool = False) -> Trains[str]:
        for number in range(meets):
            yield Barrier()
            passed.append(f"{name}{number}")
        if fails:
            raise ValueError(name)
        return name

    assert together([walker("a", 2), walker("b", 1), walker("c", 0), walker("d", 2)]) == ["a", "b", "c", "d"]
    assert passed == ["a0", "b0", "d0", "a1", "d1"]


def test_who_trained_together_is_written_down_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = instructions(tmp_path, AVERAGE, clients=3, rows=36) + "client.stacked = 3\n"
    done: list[str] = []
    trained, store = module._trained, Ledger.store

    def noted(*asked: Any) -> Any:
        done.append("trained")
        return trained(*asked)

    def stored(*said: Any, **more: Any) -> None:
        done.append("stored")
        store(*said, **more)

    monkeypatch.setattr(module, "_trained", noted)
    monkeypatch.setattr(Ledger, "store", stored)
    play(toml, tmp_path)
    assert done == ["trained", "stored", "stored", "stored"]


def one_message(played: Played, clients: Sequence[tuple[int, int]]) -> list[Any]:
    """A message with an order for each (client, stack)."""
    order = played.requests(Finetune)[0]
    contents = [pack_request(order, Envelope("simulated", "main", 0, 90 + n, *at)) for n, at in enumerate(clients)]
    reply = app.reply_to(Finetune, joined(contents), played.grid.contexts[1000], app.simulation)
    return [unpack_reply(part, Finetuned) for part in parted(reply)]


def test_two_orders_of_one_client_in_a_message_do_not_wait_for_each_other(tmp_path: Path) -> None:
    run = play(instructions(tmp_path, AVERAGE, guarantee="none"), tmp_path)
    first, second = one_message(run, [(1, 0), (1, 0)])
    assert isinstance(first, Finetuned)
    assert isinstance(second, Finetuned)


def test_a_site_answers_one_order_a_message_and_is_checked_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = play(instructions(tmp_path, AVERAGE), tmp_path)
    opened, checks = app.simulated_client, []
    monkeypatch.setattr(app, "simulated_client", lambda *a: replace(opened(*a), simulated=False))
    monkeypatch.setattr("fedsynth.clients.finetune.self_check", lambda *_, **__: checks.append(1))
    assert [said.code for said in one_message(run, [(0, 0), (1, 0)])] == [ErrorCode.BAD_REQUEST] * 2
    client = replace(run.client(0), simulated=False)
    start = run.requests(Finetune)[0].start
    for _ in range(2):
        check(client, start, client.plan())
    assert len(checks) == 2
    check(run.client(0), start, client.plan())  # a simulated one shares what its kind has found
    assert len(checks) == 2


def test_a_client_that_kills_its_worker_takes_no_other_with_it(tmp_path: Path) -> None:
    sent: list[list[int]] = []

    def dies(message: Message) -> Message | None:
        clients = [part["fedsynth"]["client"] for part in parted(message.content) if "fedsynth" in part]
        if message.metadata.message_type != Finetune.task or 1 not in clients:
            return None
        sent.append(clients)
        return Message(Error(FlowerError.CLIENT_APP_RAISED_EXCEPTION, "the worker died"), reply_to=message)

    toml = in_stacks(instructions(tmp_path, AVERAGE, clients=6, rows=72), 2)
    run = play(toml, tmp_path, nodes=1, spoil=dies)
    assert sent == [[0, 1, 2, 3, 4, 5], [0, 1], [1]]
    assert {client for client, _ in run.run_log.silent} == {1}
    assert len(run.replies(Finetune)) == 5


def test_a_message_is_cut_between_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsynth.federation.delivery.sending.LARGEST_MESSAGE", 1)
    run = play(in_stacks(instructions(tmp_path, AVERAGE, clients=5, rows=60), 2), tmp_path, nodes=1)
    clients = [[p["fedsynth"]["client"] for p in parted(m.content)] for m in run.grid.requests_of(Finetune.task)]
    assert clients == [[0, 1], [2, 3], [4]]


def test_the_check_finds_an_engine_that_gives_a_client_another_s_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = base("llama", torch.float32), DPPlan(12, 4, 2, 1, C, 1.5, 1e-5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    settings = replace(SETTINGS, expected_batch_size=4, steps=2)
    check_stack(model, plan, settings, pad=0)
    real = Stacked.add
    monkeypatch.setattr(
        Stacked, "add", lambda self, losses, units, clients: real(self, losses, units, [0] * len(units))
    )
    with pytest.raises(SelfCheckFailed, match="stacked client's sum"):
        check_stack(model, plan, settings, pad=0)
