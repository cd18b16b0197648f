"""Adapters that others made with PEFT: used as PEFT uses them, or refused with the name of the key that is not."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedsynth.models.adapters import OF_NO_MATTER, USED, load_adapter, merged, with_adapter
from fedsynth.typed import BadValue

LINEAR = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
TOKENS = torch.arange(3, 23).reshape(2, 10)


def base(family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(families.folder(family), torch_dtype=torch.float32)


def made(folder: Path, family: str, seed: int = 0, **config: Any) -> Path:
    """An adapter as PEFT writes it, its weights drawn at random."""
    adapted = get_peft_model(base(family), LoraConfig(**{"r": 3, "lora_alpha": 5, **config}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
    adapted.save_pretrained(str(folder))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def by_peft(family: str, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(base(family), str(folder)))


def assert_as_peft(family: str, folder: Path) -> None:
    name, expected = families.folder(family), by_peft(family, folder)
    adapter = load_adapter(str(folder), name)
    torch.testing.assert_close(logits(with_adapter(name, adapter)), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merged(name, adapter)), expected, atol=1e-4, rtol=0)
    assert (expected - logits(base(family))).abs().max() > 1e-2  # else it would be the base that is compared


def chosen(rng: np.random.Generator, family: str) -> dict[str, Any]:
    """A random configuration of what is put to use, and of what does not matter."""
    layers = [str(name) for name in rng.permutation(LINEAR[family])[: rng.integers(1, len(LINEAR[family]) + 1)]]
    ways: list[dict[str, Any]] = [
        {"target_modules": layers},
        {"target_modules": layers, "layers_to_transform": [int(rng.integers(families.LAYERS))]},
        {"target_modules": rf".*\.({'|'.join(layers)})"},
        {"target_modules": "all-linear"},
        {"target_modules": list(LINEAR[family]), "exclude_modules": layers[:-1]},
    ]
    more = {
        "r": int(rng.integers(1, 6)),
        "lora_alpha": float(rng.choice([1, 5, 16.5])),
        "use_rslora": bool(rng.integers(2)),
        "init_lora_weights": rng.choice(np.array([True, False, "gaussian"], object)),
        "lora_dropout": float(rng.choice([0.0, 0.3])),
        "fan_in_fan_out": bool(rng.integers(2)),
        "task_type": str(rng.choice(["CAUSAL_LM", "FEATURE_EXTRACTION"])),
    }
    return {**ways[int(rng.integers(len(ways)))], **more}


@pytest.mark.parametrize("family", sorted(LINEAR))
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(4, 24))])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_is_accepted_gives_the_logits_of_peft(tmp_path: Path, family: str, seed: int) -> None:
    assert_as_peft(family, made(tmp_path, family, seed, **chosen(np.random.default_rng(seed), family)))


def test_peft_s_own_default_for_llama_is_accepted_and_its_other_layers_stay_as_they_are(tmp_path: Path) -> None:
    folder = made(tmp_path, "llama")  # target_modules left out: q_proj and v_proj
    assert sorted(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == ["q_proj", "v_proj"]
    assert_as_peft("llama", folder)
    arrays = load_adapter(str(folder), families.folder("llama")).arrays
    assert len(arrays) == 2 * len(LINEAR["llama"]) * families.LAYERS
    for name, array in arrays.items():
        if not any(own in name for own in ("q_proj", "v_proj")):
            assert array.any() == ("lora_A" in name), name  # no update, and room to learn one


def test_an_adapter_in_half_precision_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    folder = made(tmp_path, "llama")
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert_as_peft("llama", folder)


def changed(folder: Path, **change: Any) -> str:
    """What is said of an adapter with another configuration."""
    path = folder / "adapter_config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, **change}))
    try:
        with pytest.raises(BadValue) as refused:
            load_adapter(str(folder), families.folder("llama"))
    finally:
        path.write_text(json.dumps(whole))
    return str(refused.value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("plain"), "llama")


def another(field: Any) -> Any:
    """A value of a key that is not its default."""
    default = field.default if field.default is not MISSING else field.default_factory()
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int) else "other" if isinstance(default, str) else {"q_proj": 2}


def test_every_key_that_is_not_put_to_use_is_refused_by_name(plain: Path) -> None:
    known = {*USED, *OF_NO_MATTER, "peft_type", "runtime_config"}  # the last one is never written
    known |= {"init_lora_weights", "megatron_core"}  # have tests of their own
    others = [field for field in fields(LoraConfig) if field.name not in known]
    assert {
        "alpha_pattern",
        "rank_pattern",
        "use_dora",
        "lora_bias",
        "layer_replication",
        "bias",
        "modules_to_save",
        "alora_invocation_tokens",
        "target_parameters",
        "loftq_config",
    } <= {f.name for f in others}
    for field in others:
        assert f"says more: {field.name} = " in changed(plain, **{field.name: another(field)}), field.name


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva"])
def test_a_start_that_changes_the_base_is_refused_by_name(plain: Path, start: str) -> None:
    assert f'says more: init_lora_weights = "{start}"' in changed(plain, init_lora_weights=start)


@pytest.mark.parametrize("value", [True, 1, -0.5, "x", "False", [1], [0], {"a": 1}])
def test_a_key_of_a_later_peft_is_refused_unless_it_says_nothing(plain: Path, value: Any) -> None:
    assert f"later_key = {json.dumps(value)} (unknown to the installed PEFT)" in changed(plain, later_key=value)


def loads(folder: Path, **change: Any) -> bool:
    """Whether an adapter whose configuration says more is taken."""
    path = folder / "adapter_config.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), **change}))
    try:
        return load_adapter(str(folder), families.folder("llama")).rank == 3
    finally:
        path.write_text(whole)


def test_a_key_of_another_peft_that_says_nothing_is_no_reason_to_refuse(plain: Path) -> None:
    for nothing in (None, {}, [], False, "", 0, 0.0):
        assert loads(plain, other_key=nothing)
    assert loads(plain, merge_weights=False, enable_lora=None)  # as of adapters that PEFT 0.2 wrote


def test_a_core_of_megatron_matters_only_with_its_configuration(plain: Path) -> None:
    for core in (None, "", "megatron.core", "my.core"):
        assert loads(plain, megatron_core=core)
        assert loads(plain, megatron_core=core, megatron_config={})
    said = changed(plain, megatron_core="my.core", megatron_config={"a": 1})
    assert "megatron_core = " in said
    assert "megatron_config = " in said


@pytest.mark.filterwarnings("ignore")
def test_a_start_of_orthogonal_factors_leaves_the_base_as_it_is_and_gives_the_logits_of_peft(tmp_path: Path) -> None:
    before = base("llama").state_dict()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="orthogonal")
    adapted = get_peft_model(base("llama"), config)
    after = {name.replace(".base_layer", ""): w for name, w in adapted.base_model.model.state_dict().items()}
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    folder = made(tmp_path, "llama", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="orthogonal")
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] == "orthogonal"
    assert_as_peft("llama", folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "it is no LoRA, its peft_type is 'IA3'"),
        ({"r": 2.5}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"r": 0}, "r must be a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha a finite one"),
        ({"lora_alpha": "8"}, "lora_alpha a finite one"),
        ({"r": 2}, r"not those of LoRA of rank 2 .*lora_A.weight is (3, 32), not (2, 32)"),
        ({"target_modules": None}, "names no target_modules"),
        (
            {"target_modules": ["q_proj"]},
            "has tensors for model.layers.0.self_attn.v_proj, model.layers.1.self_attn."
            "v_proj, which its target_modules do not name",
        ),
        (
            {"target_modules": ["q_proj", "v_proj", "o_proj"]},
            "has no tensors for model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj, which",
        ),
        ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "it adapts lm_head: only linear layers but the heads"),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}, "has tensors for model.layers.1"),
        ({"target_modules": "(q_proj"}, "its choice of layers cannot be read"),
    ],
)
def test_what_does_not_fit_is_named(plain: Path, change: dict[str, Any], said: str) -> None:
    for part in said.split(" .*"):
        assert part in changed(plain, **change)
