"""Gradient checkpointing: the same sums and the same training from less memory, and only where it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_dpsgd import apart, brute_force, built, clip, losses, summed, texts
from test_stacked import CLIENTS, SETTINGS, adapters, base, slots, training
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from fedsynth.dpsgd import clipper
from fedsynth.privacy.plan import Budget, plan
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.training import selfcheck
from fedsynth.training.checkpointing import checkpointed
from fedsynth.training.dp_training import train_generator, train_stacked, trainable
from fedsynth.typed import BadValue, plain

torch.set_num_threads(1)
ON = replace(SETTINGS, gradient_checkpointing=True)


@pytest.mark.parametrize("units", [None, [0, 1, 0, 2, 0]], ids=["rows", "persons"])
@pytest.mark.parametrize(
    ("family", "mode"), [("llama", "lora"), ("llama", "full"), ("gpt2", "full"), ("t5", "lora"), ("qwen2", "lora")]
)
def test_sums_are_those_of_brute_force(family: str, mode: str, units: Sequence[int] | None) -> None:
    model, tokens = built(family, mode), texts(9)
    expected = clip(brute_force(model, tokens, units or range(len(tokens))))
    without = summed(model, tokens, units)
    with checkpointed(model, True):
        found = summed(model, tokens, units)
    assert apart(found, expected) <= (1e-9 if family == "gpt2" else 1e-6)  # others' norms compute in float32
    assert apart(found, without) <= 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_single_precision_sums_are_the_same_bits(family: str) -> None:
    model, tokens = built(family, "lora", dtype=torch.float32), texts(9)
    without = summed(model, tokens)
    with checkpointed(model, True):
        assert torch.equal(summed(model, tokens), without)


class Calls:
    """Counts a layer's passes."""

    def __init__(self, layer: nn.Module) -> None:
        self.count = 0
        layer.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


def kept_bytes(model: Any, tokens: Tensor) -> int:
    """What one pass keeps for its backward pass."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        losses(model, tokens).sum()
    return sum(held.values())


def test_a_layer_runs_twice_and_keeps_less() -> None:
    model, tokens = built("llama", "lora", dtype=torch.float32), texts(64)
    calls, before = Calls(model.get_submodule("base_model.model.model.layers.0.mlp")), kept_bytes(model, tokens)
    calls.count = 0
    summed(model, tokens)
    assert calls.count == 1
    with checkpointed(model, True):
        assert kept_bytes(model, tokens) < 0.6 * before
        calls.count = 0
        summed(model, tokens)
        assert calls.count == 2
    summed(model, tokens)
    assert calls.count == 3  # as before


@pytest.mark.parametrize("sigma", [0.0, 1.5], ids=["plain", "dp"])
def test_a_training_ends_at_the_same_weights(sigma: float) -> None:
    ends = []
    for settings in (SETTINGS, ON):
        model = base("llama", torch.float32)
        calls = Calls(model.get_submodule("base_model.model.model.layers.0.mlp"))
        train_generator(model, training(0, sigma, slots(0)), settings, pad=0)
        ends.append((torch.cat([w.detach().flatten() for w in trainable(model)]), calls.count))
    (one, once), (other, twice) = ends
    assert torch.equal(one, other)
    assert twice == 2 * once > 0


def test_so_does_a_stack() -> None:
    ends = []
    for settings in (SETTINGS, ON):
        model = base("llama", torch.float32)
        factors, calls = adapters(model), Calls(model.get_submodule("base_model.model.model.layers.0.mlp"))
        many = [training(client, 1.5, slots(client)) for client in range(CLIENTS)]
        train_stacked(model, factors, many, settings, pad=0)
        ends.append((torch.cat([stack.flatten() for stack in factors.values()]), calls.count))
    (one, once), (other, twice) = ends
    assert torch.equal(one, other)
    assert twice == 2 * once > 0


def test_the_self_check_runs_as_the_training_will(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_check_loop", lambda *_, **__: None)  # no layer of a model runs in it
    planned = plan(
        Budget(8.0), records=40, expected_batch=4, steps=4, rounds=1, clip_norm=0.3, max_noise_multiplier=20.0
    )
    model = built("llama", "lora", dtype=torch.float32)
    calls = Calls(model.get_submodule("base_model.model.model.layers.0.mlp"))
    counts = []
    for settings in (SETTINGS, ON):
        settings = replace(settings, max_length=16)
        selfcheck.self_check(model, planned, settings, pad=0)
        selfcheck.check_stack(model, planned, settings, pad=0)
        counts.append(calls.count)
    assert counts[1] == 3 * counts[0]  # nothing that passed without is taken as passed with it


def test_a_model_that_cannot_is_named() -> None:
    config = AutoConfig.for_model("xlm", vocab_size=30, emb_dim=8, n_layers=1, n_heads=1)
    model = AutoModelForCausalLM.from_config(config)  # none of its layers is made for it
    with pytest.raises(BadValue, match="type 'xlm' has no gradient checkpointing"), checkpointed(model, True):
        pass


@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
def test_opacus_hooks_would_note_a_layers_input_twice(clipping: Any) -> None:
    with pytest.raises(BadValue, match='gradient_checkpointing needs clipping = "bookkeeping"'):
        GeneratorTraining(gradient_checkpointing=True, clipping=clipping)
    model, tokens = built("llama", "lora", dtype=torch.float32), texts(9)
    expected, wrong = summed(model, tokens, clipping="bookkeeping"), None
    with checkpointed(model, True), contextlib.suppress(Exception):  # Opacus raises many kinds
        wrong = summed(model, tokens, clipping=clipping)
    assert wrong is None or apart(wrong, expected) > 1e-3


def test_settings_that_say_nothing_new_are_what_they_were_to_a_grants_noise() -> None:
    assert set(plain(GeneratorTraining())) == {
        *("expected_batch_size", "steps", "learning_rate", "clip_norm", "rank", "alpha", "max_length"),
        *("max_physical_batch_size", "loss_on", "rows_per_unit", "clipping", "precision"),
    }
    said = plain(GeneratorTraining(gradient_checkpointing=True, lora_targets=("q_proj",)))
    assert (said["gradient_checkpointing"], said["lora_targets"]) == (True, ["q_proj"])


def test_the_engine_is_as_open_to_other_models_as_before() -> None:
    model = nn.Linear(3, 2)  # no transformer: nothing is asked of it
    with checkpointed(model, None), clipper(model, 1.0):
        pass
