from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import httpx
import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import errors
from peft import PeftModel
from torch import Tensor, nn

from fedsynth.lora import average, only_b
from fedsynth.models import hub as hub_module
from fedsynth.models import loading as models
from fedsynth.models.adapters import (
    WrongAdapter,
    attach_lora,
    merged,
    new_adapter,
    read_adapter,
    save_adapter,
    stack_of,
    with_adapter,
)
from fedsynth.models.hub import locate, pin, version_of, weights_hash
from fedsynth.models.loading import check, dtype_of, load_classifier, load_generator, load_tokenizer
from fedsynth.models.of_scenario import models_of
from fedsynth.scenario.client import GeneratorTraining, TaskTraining
from fedsynth.scenario.toml import from_toml, to_toml
from fedsynth.simulation import simulate
from fedsynth.simulation.simulate import pinned
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
    return attach_lora(load_generator(tiny.folder()), rank=3, alpha=6.0, seed=seed)


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


ATTENTION = ("q_proj", "self_attn.v_proj")


def test_lora_adapts_the_layers_that_are_named_by_their_ends(tmp_path: Path) -> None:
    chosen = {name for name in EXPECTED if ".q_proj." in name or ".v_proj." in name}
    start = new_adapter(tiny.folder(), rank=3, alpha=6.0, seed=1, targets=ATTENTION)
    assert set(start.arrays) == chosen
    assert len(chosen) == 8
    drawn = np.random.default_rng(0)
    adapter = replace(start, arrays={n: drawn.normal(size=a.shape).astype(np.float32) for n, a in start.arrays.items()})
    model = with_adapter(tiny.folder(), adapter)  # the adapter itself tells where it belongs
    assert {n.replace(".default", "") for n, w in model.named_parameters() if w.requires_grad} == chosen
    before = logits(model)
    assert not torch.allclose(before, logits(load_generator(tiny.folder())), atol=0.1)
    assert torch.allclose(logits(merged(tiny.folder(), adapter)), before, atol=1e-4)
    save_adapter(replace(adapter, grants=("g",)), tiny.folder(), tmp_path)
    loaded = PeftModel.from_pretrained(load_generator(tiny.folder()), str(tmp_path))
    assert torch.allclose(logits(loaded), before, atol=1e-5)
    stack = stack_of(with_adapter(tiny.folder(), start), [start, adapter])
    assert all(np.array_equal(array, adapter.arrays[name]) for name, array in stack.read()[1].items())
    whole = with_adapter(tiny.folder(), new_adapter(tiny.folder(), rank=3, alpha=6.0, seed=1))  # not the same model
    assert {n.replace(".default", "") for n, w in whole.named_parameters() if w.requires_grad} == set(EXPECTED)


@pytest.mark.parametrize("targets", [("proj",), ("q_proj", "query"), ("lm_head",), ("1.q_proj",)])
def test_an_end_that_no_linear_layer_has_is_named_with_those_there_are(targets: tuple[str, ...]) -> None:
    with pytest.raises(BadValue, match=f"name ends in '{targets[-1]}'; these do: q_proj, k_proj, v_proj, o_proj"):
        new_adapter(tiny.folder(), rank=3, alpha=6.0, seed=1, targets=targets)


def test_an_adapter_of_no_layer_or_of_one_that_is_not_there_is_refused() -> None:
    whole = new_adapter(tiny.folder(), rank=3, alpha=6.0, seed=1)
    elsewhere = {name.replace("layers.1", "layers.7"): array for name, array in whole.arrays.items()}
    half = dict(list(whole.arrays.items())[1:])  # a B without its A
    for arrays in ({}, elsewhere, half):
        for put in (with_adapter, merged):
            with pytest.raises(WrongAdapter, match="tensors are not those of LoRA"):
                put(tiny.folder(), replace(whole, arrays=arrays))


@pytest.mark.parametrize("named", [(), ("",), ("q_proj", "")])
def test_no_layer_at_all_is_no_choice(named: tuple[str, ...]) -> None:
    with pytest.raises(BadValue, match="lora_targets must hold names"):
        GeneratorTraining(lora_targets=named)


def test_only_the_adapter_is_trainable() -> None:
    names = {n for n, w in fresh().named_parameters() if w.requires_grad}
    assert names == {n.replace(".weight", ".default.weight") for n in EXPECTED}


def test_the_model_starts_as_its_base() -> None:
    assert torch.equal(logits(fresh()), logits(load_generator(tiny.folder())))
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
    base = load_generator(tiny.folder()).get_submodule("model.layers.1.mlp.up_proj").weight.detach().numpy()
    merged = model.merge_and_unload().get_submodule("model.layers.1.mlp.up_proj").weight.detach().numpy()
    assert np.allclose(merged - base, update, atol=1e-5)


def test_a_saved_adapter_loads_in_peft_and_gives_the_same_logits(tmp_path: Path) -> None:
    model = trained()
    save_adapter(replace(read_adapter(model, "the hash"), grants=("g",)), tiny.folder(), tmp_path / "deep" / "adapter")
    loaded = PeftModel.from_pretrained(load_generator(tiny.folder()), str(tmp_path / "deep" / "adapter"))
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(load_generator(tiny.folder())), atol=0.1)
    again = replace(read_adapter(loaded, "the hash"), grants=("g",))
    assert all(np.array_equal(a, again.arrays[n]) for n, a in read_adapter(model, "").arrays.items())
    facts = json.loads((tmp_path / "deep" / "adapter" / "grants.json").read_text())
    assert facts == {"grants": ["g"], "public": False, "base_sha256": "the hash"}
    config = json.loads((tmp_path / "deep" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6.0, tiny.folder())


def test_averaged_adapters_load_too(tmp_path: Path) -> None:
    adapter = replace(read_adapter(trained(), "base"), grants=("g",))
    save_adapter(
        average([adapter, replace(read_adapter(fresh(), "base"), grants=("h",))], [1, 0]), tiny.folder(), tmp_path
    )
    loaded = PeftModel.from_pretrained(load_generator(tiny.folder()), str(tmp_path))
    assert torch.allclose(logits(loaded), logits(trained()), atol=1e-5)


# Loading


def test_every_caller_gets_a_model_of_its_own() -> None:
    one, other = load_generator(tiny.folder()), load_generator(tiny.folder())
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


def test_the_hash_changes_with_weights_config_and_tokenizer_and_with_nothing_else(tmp_path: Path) -> None:
    hashes = [weights_hash(tiny.folder())]
    for change in ("copy", "notes", "weights", "config", "tokenizer"):
        folder = tmp_path / change
        shutil.copytree(tiny.folder(), folder)
        if change == "notes":
            (folder / "README.md").write_text("a model")
        if change == "weights":
            tiny.model(seed=1).save_pretrained(folder)
        if change == "config":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
        if change == "tokenizer":
            text = (folder / "tokenizer.json").read_text()
            (folder / "tokenizer.json").write_text(text + "\n")
        hashes.append(weights_hash(str(folder)))
    assert hashes[0] == hashes[1] == hashes[2]
    assert len(set(hashes)) == 4
    assert weights_hash(f"owner/model@{'a' * 40}") != weights_hash(f"owner/model@{'b' * 40}")


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
    check(tiny.folder(), "generator")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadValue, match=r"cannot be loaded.*Give a folder with a saved model"):
        check(str(tmp_path), "generator")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    families.model("gpt2").save_pretrained(tmp_path)  # transformers would make one up that knows a single token
    with pytest.raises(BadValue, match=r"has no tokenizer beside its weights: save .* tokenizer\.json"):
        check(str(tmp_path), "generator")


# The hub, as a folder of downloads


COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two revisions of a model in a cache as the hub's client keeps it; there is no network."""
    place = tmp_path / "models--org--tiny"
    for number, (revision, commit) in enumerate(COMMITS.items()):
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        shutil.copytree(tiny.folder(), place / "snapshots" / commit)
        tiny.model(seed=number).save_pretrained(place / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget()
    yield "org/tiny"
    forget()


def forget() -> None:
    for cache in (hub_module.config_of, models._generator, models._classifier, models.load_tokenizer):
        cache.cache_clear()


def test_a_name_is_pinned_to_the_commit_that_it_means_today(hub: str) -> None:
    assert pin(hub) == f"{hub}@{COMMITS['main']}"
    assert pin(f"{hub}@v1") == f"{hub}@{COMMITS['v1']}"
    assert pin(pin(hub)) == pin(hub)
    assert pin("assets:tiny-slm") == "assets:tiny-slm"
    assert pin(tiny.folder()) == tiny.folder()
    assert pin(f"no/such@{'c' * 40}") == f"no/such@{'c' * 40}"  # means one thing for ever: nothing to look up


def test_a_pinned_name_loads_its_own_revision(hub: str) -> None:
    for number, commit in enumerate(COMMITS.values()):
        check(f"{hub}@{commit}", "generator")
        assert torch.equal(logits(load_generator(f"{hub}@{commit}")), logits(tiny.model(seed=number)))
    assert torch.equal(logits(load_generator(f"{hub}@v1")), logits(tiny.model(seed=1)))
    body = load_classifier(f"{hub}@v1", 2, 0).get_submodule("model")
    assert all(torch.equal(w, body.get_parameter(n)) for n, w in tiny.model(seed=1).model.named_parameters())
    assert weights_hash(hub) == weights_hash(pin(hub)) != weights_hash(f"{hub}@v1")


def test_a_run_writes_down_which_models_it_read(hub: str) -> None:
    assert version_of(hub) == {"revision": COMMITS["main"]}
    assert version_of(tiny.folder()) == {"sha256": weights_hash(tiny.folder())}


def test_a_run_sends_pinned_names_only(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(simulate, "launch", lambda run, *_, **more: sent.append(run.run_config["scenario-toml"]))
    monkeypatch.setattr(simulate, "read", lambda place: None)
    monkeypatch.setattr(simulate, "check", lambda scenario: [])
    toml = f"""
        name = "x"
        strategy.use = "fedsynth.strategies.fdkt:FDKT"
        data = {{ source = "world:hospitals", clients = 1, train_per_client = 5, test_per_client = 5 }}
        client = {{ generator = "{hub}", task_model = "{hub}", guarantee = "none" }}
        server.llm = "{hub}@v1"
        """
    simulate.run(from_toml(toml), out=tmp_path / "run")
    [asked] = [from_toml(text) for text in sent]
    assert asked.client.generator == asked.client.task_model == f"{hub}@{COMMITS['main']}"
    assert asked.server.llm == f"{hub}@{COMMITS['v1']}"
    assert from_toml((tmp_path / "run" / "scenario.toml").read_text()) == asked


def test_a_scenario_is_pinned_with_its_arms(hub: str) -> None:
    scenario = from_toml(
        f"""
        name = "x"
        run = ["a", "b"]
        [strategy]
        use = "fedsynth.strategies.local:Local"
        [data]
        source = "world:hospitals"
        [client]
        generator = "{hub}"
        task_model = "assets:tiny-slm"
        budget = {{ epsilon = 8.0 }}
        [server]
        llm = "{hub}@v1"
        [arms.a]
        [arms.b.server]
        embedder = "{hub}"
        llm = "assets:tiny-llm"
        [arms.c.client]
        generator = "org/unknown"
        """
    )
    found = pinned(scenario)
    assert found.client == replace(scenario.client, generator=f"{hub}@{COMMITS['main']}")
    assert found.server == replace(scenario.server, llm=f"{hub}@{COMMITS['v1']}")
    assert found.arms["b"] == {"server": {"embedder": f"{hub}@{COMMITS['main']}", "llm": "assets:tiny-llm"}}
    assert found.arms["c"] == scenario.arms["c"]  # does not run
    assert from_toml(to_toml(found)) == found
    roles = dict(models_of(replace(scenario, arms={}, run=())))
    assert roles == {hub: "generator", f"{hub}@v1": "llm", "assets:tiny-slm": "task_model"}
    head = replace(scenario.client, task_training=TaskTraining(trains="head"))
    assert dict(models_of(replace(scenario, client=head, arms={}, run=())))["assets:tiny-slm"] == "embedder"
    assert {name for name, _ in models_of(found)} == {
        f"{hub}@{COMMITS['main']}",
        f"{hub}@{COMMITS['v1']}",
        "assets:tiny-slm",
        "assets:tiny-llm",
    }


def test_a_saved_adapter_names_the_base_and_its_revision(hub: str, tmp_path: Path) -> None:
    save_adapter(replace(read_adapter(trained(), "hash"), grants=("g",)), f"{hub}@{COMMITS['v1']}", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (hub, COMMITS["v1"])


def test_what_was_not_downloaded_is_said_with_the_command_that_does(hub: str, tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"'org/other' is not on this machine.*`hf download org/other` and set HF_HUB_"):
        check("org/other", "llm")
    with pytest.raises(BadValue, match=r"'org/tiny@v9' is not on this machine.*`hf download org/tiny --revision v9`"):
        check("org/tiny@v9", "llm")
    (tmp_path / "models--org--tiny" / "snapshots" / COMMITS["v1"] / "model.safetensors").unlink()
    with pytest.raises(BadValue, match=r"weights of the model 'org/tiny@v1'.*`hf download org/tiny --revision v1`"):
        check("org/tiny@v1", "llm")


def http(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid"))


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (errors.GatedRepoError("no", response=http(403)), r"is gated: accept its licence .*org/model.*`hf auth login`"),
        (
            errors.RepositoryNotFoundError("no", response=http(404)),
            r"no model 'org/model@v1' on the hub: check",
        ),
        (errors.RevisionNotFoundError("no", response=http(404)), r"'org/model' has no revision 'v1': name a branch"),
        (errors.LocalEntryNotFoundError("no"), r"hub cannot be reached: .*`hf download org/model --revision v1`"),
        (errors.OfflineModeIsEnabled("no"), r"hub cannot be reached: download it beforehand"),
        (httpx.ConnectError("no"), r"hub cannot be reached: download it beforehand"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_says_is_one_line_with_the_way_out(
    problem: Exception, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise problem

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    for asked in (lambda: check("org/model@v1", "llm"), lambda: pin("org/model@v1")):
        with pytest.raises(BadValue, match=said) as caught:
            asked()
        assert "\n" not in str(caught.value)


# Borrowing


def test_a_model_that_was_let_go_serves_the_next_with_other_weights_and_nothing_of_the_first() -> None:
    first, second = (new_adapter(tiny.folder(), rank=3, alpha=6.0, seed=seed) for seed in (1, 2))
    held = with_adapter(tiny.folder(), first)
    other = with_adapter(tiny.folder(), second)  # while one is held, the next is another
    weights = {id(w) for w in held.parameters()}
    assert not weights & {id(w) for w in other.parameters()}
    for weight in held.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    held.train()
    del held
    again = with_adapter(tiny.folder(), second, frozen_a=True)
    assert {id(w) for w in again.parameters()} == weights
    assert not again.training
    assert all(w.grad is None for w in again.parameters())
    assert {n for n, w in again.named_parameters() if w.requires_grad} == {
        n for n, _ in again.named_parameters() if "lora_B" in n
    }
    assert torch.equal(logits(again), logits(other))
    del again
    whole = with_adapter(tiny.folder(), first)
    assert all(w.requires_grad for n, w in whole.named_parameters() if "lora_" in n)


def test_merging_leaves_what_is_borrowed_as_it_was() -> None:
    trained_adapter = read_adapter(trained(), weights_hash(tiny.folder()))
    before = logits(with_adapter(tiny.folder(), trained_adapter))
    own = merged(tiny.folder(), trained_adapter)
    assert torch.allclose(logits(own), before, atol=1e-4)
    with torch.no_grad():
        for weight in own.parameters():
            weight.zero_()
    assert torch.equal(logits(with_adapter(tiny.folder(), trained_adapter)), before)


def test_a_base_is_bfloat16_where_it_is_asked_for_or_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {w.dtype for w in load_generator(tiny.folder(), "bfloat16").parameters()} == {torch.bfloat16}
    adapter = new_adapter(tiny.folder(), rank=2, alpha=4.0, seed=0)
    model = with_adapter(tiny.folder(), adapter, precision="bfloat16")
    kinds = {("lora_" in n, w.dtype) for n, w in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}  # what is trained stays precise
    monkeypatch.setattr("fedsynth.models.loading.computes_in_bfloat16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dtype_of(tiny.folder(), "auto") == torch.float32  # 32 wide: it would be slower
    monkeypatch.setattr("fedsynth.models.loading.NARROWEST", 32)
    assert dtype_of(tiny.folder(), "auto") == torch.bfloat16
    monkeypatch.setattr("fedsynth.models.loading.computes_in_bfloat16", lambda: False)
    assert dtype_of(tiny.folder(), "auto") == torch.float32
