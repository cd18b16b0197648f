from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from torch import Tensor, nn

from fedsynth.lora import average, only_b
from fedsynth.models import (
    attach_lora,
    check,
    load_causal,
    load_classifier,
    load_tokenizer,
    locate,
    read_adapter,
    save_adapter,
    weights_hash,
)
from fedsynth.typed import BadValue

torch.set_num_threads(1)
TOKENS = torch.tensor([[1, 10, 20, 30, 40, 50, 2]])
# By hand, from the architecture: seven linear maps per block, (in, out).
SHAPES = {
    **{f"self_attn.{name}_proj": (32, 32) for name in "qkvo"},
    "mlp.gate_proj": (32, 48),
    "mlp.up_proj": (32, 48),
    "mlp.down_proj": (48, 32),
}
EXPECTED = {
    f"base_model.model.model.layers.{block}.{name}.lora_{factor}.weight": (3, i) if factor == "A" else (o, 3)
    for block in range(2)
    for name, (i, o) in SHAPES.items()
    for factor in "AB"
}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(input_ids=TOKENS).logits
    return result


def fresh(seed: int = 0) -> PeftModel:
    return attach_lora(load_causal(tiny.folder()), rank=3, alpha=6.0, seed=seed)


def trained() -> PeftModel:
    """An adapter that changes the model: B is no longer zero."""
    model = fresh()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=generator)
    return model


# LoRA


def test_lora_adapts_every_linear_layer_but_the_head() -> None:
    arrays = read_adapter(fresh(), "base").arrays
    assert {name: a.shape for name, a in arrays.items()} == EXPECTED
    assert all(a.dtype == np.float32 for a in arrays.values())


def test_the_head_is_left_out_when_it_is_not_tied_either(tmp_path: Path) -> None:
    model = attach_lora(tiny.model(tie_word_embeddings=False), rank=3, alpha=6.0, seed=0)
    assert set(read_adapter(model, "base").arrays) == set(EXPECTED)


def test_only_the_adapter_is_trainable() -> None:
    names = {n for n, w in fresh().named_parameters() if w.requires_grad}
    assert names == {n.replace(".weight", ".default.weight") for n in EXPECTED}


def test_the_model_starts_as_its_base() -> None:
    assert torch.equal(logits(fresh()), logits(load_causal(tiny.folder())))
    arrays = read_adapter(fresh(), "base").arrays
    assert all((a == 0).all() == only_b(name) for name, a in arrays.items())


def test_a_depends_on_the_public_seed_only() -> None:
    def factor(seed: int) -> Any:
        return read_adapter(fresh(seed), "base").arrays[next(iter(sorted(EXPECTED)))]

    one = factor(1)
    torch.manual_seed(123)
    assert np.array_equal(factor(1), one)  # two clients of one seed share A: averaging B averages the product
    assert not np.array_equal(factor(2), one)
    assert abs(one).max() <= 1 / np.sqrt(one.shape[1])  # Kaiming-uniform with a = sqrt 5: bound 1 / sqrt(fan in)
    assert abs(one).max() > 0.9 / np.sqrt(one.shape[1])


def test_a_model_without_linear_layers_is_refused() -> None:
    class Bare(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(BadValue, match="Bare has no linear layer"):
        attach_lora(Bare(), rank=2, alpha=4.0, seed=0)


def test_an_adapter_knows_where_it_belongs() -> None:
    adapter = replace(read_adapter(fresh(), "base"), grants=("g1", "g2"))
    assert (adapter.rank, adapter.alpha, adapter.base, adapter.grants) == (3, 6.0, "base", ("g1", "g2"))
    assert list(adapter.arrays) == sorted(adapter.arrays)


def test_arrays_read_from_a_model_do_not_follow_its_training() -> None:
    model = fresh()
    adapter = read_adapter(model, "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    assert all((a == 0).all() for name, a in adapter.arrays.items() if only_b(name))


def test_the_arrays_are_the_update_of_the_layer() -> None:
    model = trained()
    arrays = read_adapter(model, "base").arrays
    name = "base_model.model.model.layers.1.mlp.up_proj"
    update = 6.0 / 3 * arrays[f"{name}.lora_B.weight"] @ arrays[f"{name}.lora_A.weight"]
    base = load_causal(tiny.folder()).get_submodule("model.layers.1.mlp.up_proj").weight.detach().numpy()
    merged = model.merge_and_unload().get_submodule("model.layers.1.mlp.up_proj").weight.detach().numpy()
    assert np.allclose(merged - base, update, atol=1e-5)


def test_a_saved_adapter_loads_in_peft_and_gives_the_same_logits(tmp_path: Path) -> None:
    model = trained()
    save_adapter(replace(read_adapter(model, "the hash"), grants=("g",)), tiny.folder(), tmp_path / "deep" / "adapter")
    loaded = PeftModel.from_pretrained(load_causal(tiny.folder()), str(tmp_path / "deep" / "adapter"))
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(load_causal(tiny.folder())), atol=0.1)
    again = replace(read_adapter(loaded, "the hash"), grants=("g",))
    assert all(np.array_equal(a, again.arrays[n]) for n, a in read_adapter(model, "").arrays.items())
    facts = json.loads((tmp_path / "deep" / "adapter" / "grants.json").read_text())
    assert facts == {"grants": ["g"], "base_sha256": "the hash"}
    config = json.loads((tmp_path / "deep" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6.0, tiny.folder())


def test_averaged_adapters_load_too(tmp_path: Path) -> None:
    adapter = replace(read_adapter(trained(), "base"), grants=("g",))
    save_adapter(
        average([adapter, replace(read_adapter(fresh(), "base"), grants=("h",))], [1, 0]), tiny.folder(), tmp_path
    )
    loaded = PeftModel.from_pretrained(load_causal(tiny.folder()), str(tmp_path))
    assert torch.allclose(logits(loaded), logits(trained()), atol=1e-5)


# Loading


def test_every_caller_gets_a_model_of_its_own() -> None:
    one, other = load_causal(tiny.folder()), load_causal(tiny.folder())
    with torch.no_grad():
        for weight in one.parameters():
            weight.zero_()
    assert torch.equal(logits(other), logits(tiny.model()))
    assert not other.training
    assert {w.dtype for w in other.parameters()} == {torch.float32}


def test_a_classifier_has_a_head_of_its_seed_on_the_pretrained_body() -> None:
    one, same, other = (load_classifier(tiny.folder(), 5, seed) for seed in (1, 1, 2))
    heads = [m.get_submodule("score").weight for m in (one, same, other)]
    assert heads[0].shape == (5, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.015 < heads[0].std() < 0.025
    body, pretrained = one.get_submodule("model"), tiny.model().model
    assert all(torch.equal(w, body.get_parameter(n)) for n, w in pretrained.named_parameters())
    assert one.config.pad_token_id == tiny.PAD  # else only one text at a time could be classified


def test_padding_falls_back_to_the_end_of_text(tmp_path: Path) -> None:
    bare = tiny.tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    shutil.copy(Path(tiny.folder()) / "config.json", tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tiny.EOS
    assert load_tokenizer(tiny.folder()).pad_token_id == tiny.PAD


def test_the_hash_changes_with_weights_and_config(tmp_path: Path) -> None:
    hashes = [weights_hash(tiny.folder())]
    for number, change in enumerate(("copy", "weights", "config")):
        folder = tmp_path / str(number)
        shutil.copytree(tiny.folder(), folder)
        if change == "weights":
            tiny.model(seed=1).save_pretrained(folder)
        if change == "config":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
        hashes.append(weights_hash(str(folder)))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert weights_hash("owner/model") != weights_hash("owner/other")


# Names


def test_shipped_models_are_found_by_name() -> None:
    folder = Path(locate("assets:tiny-slm"))
    assert folder.parts[-3:] == ("fedsynth", "assets", "tiny-slm")
    assert (folder / "config.json").is_file()


def test_a_model_that_is_not_shipped_is_named_beside_those_that_are() -> None:
    with pytest.raises(BadValue, match=r"no shipped model 'assets:tiny'; there are .*assets:tiny-slm"):
        locate("assets:tiny")


def test_folders_and_hub_names_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(tiny.folder()) == tiny.folder()
    assert locate("owner/model") == "owner/model"
    assert locate("gpt2") == "gpt2"
    monkeypatch.chdir(Path(tiny.folder()).parent)
    assert locate(Path(tiny.folder()).name) == tiny.folder()  # Flower's workers run in another folder


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "../model", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_hub_name(name: str) -> None:
    with pytest.raises(BadValue, match=f"the model path '{name}' does not exist"):
        locate(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"holds no config\.json"):
        locate(str(tmp_path))


def test_check_says_how_to_name_a_model_that_can_be_loaded(tmp_path: Path) -> None:
    check(tiny.folder())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadValue, match=r"cannot be loaded.*Give a folder with a saved model"):
        check(str(tmp_path))
