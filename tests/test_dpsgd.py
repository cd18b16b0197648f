"""The clipping engine against brute force, `vmap(grad)` and Opacus, and what it must never let through."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from fedsynth.dpsgd import MARGIN, Clipping, UnknownWeight, clipper
from fedsynth.models.adapters import attach_lora

torch.set_num_threads(1)
C = 0.3
ROWS = 5


def built(family: str, mode: str, *, dtype: Any = torch.float64, seed: int = 0, **more: Any) -> Any:
    """A model of two layers of width 32 with something to train, past its start."""
    none = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "t5": ("dropout_rate",)}.get(family, ())
    model = families.model(family, seed, **dict.fromkeys(none, 0.0), **more).to(dtype)  # as `load_generator` does
    generator = torch.Generator().manual_seed(seed)
    if mode == "full":
        for name, weight in model.named_parameters():
            weight.requires_grad_("relative_attention_bias" not in name)  # one table for all examples
        return model.train()
    model = attach_lora(model, rank=3, alpha=6.0, seed=seed).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.to(dtype)
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=generator)
    return model


def texts(length: int, rows: int = ROWS, seed: int = 0, vocabulary: int = families.VOCABULARY) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def losses(model: Any, tokens: Tensor) -> Tensor:
    """Of each text; what T5 reads and what it writes have different lengths."""
    if model.config.is_encoder_decoder:
        wanted = tokens[:, : max(2, tokens.shape[1] // 2)].contiguous()
        logits = model(input_ids=tokens, labels=wanted).logits
    else:
        wanted, logits = tokens[:, 1:], model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)


def trainable(model: Any) -> list[nn.Parameter]:
    return [w for w in model.parameters() if w.requires_grad]


def flat(grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    given = (torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True))
    return torch.cat([g.flatten().double() for g in given])


def brute_force(model: Any, tokens: Tensor, units: Sequence[int]) -> list[Tensor]:
    """The summed gradient of each unit, text by text."""
    weights, found = trainable(model), {}
    for row, unit in enumerate(units):
        loss = losses(model, tokens[row : row + 1]).sum()
        grad = flat(torch.autograd.grad(loss, weights, allow_unused=True), weights)
        found[unit] = found.get(unit, 0) + grad
    return list(found.values())


def clip(grads: Sequence[Tensor], clip_norm: float = C) -> Tensor:
    return torch.stack([g * min(1.0, MARGIN * clip_norm / float(g.norm())) for g in grads]).sum(0)


def summed(
    model: Any,
    tokens: Tensor | Sequence[Tensor],
    units: Sequence[int] | None = None,
    clip_norm: float = C,
    clipping: Clipping = "bookkeeping",
    loss: Callable[[Any, Tensor], Tensor] = losses,
) -> Tensor:
    parts = [tokens] if isinstance(tokens, Tensor) else tokens
    with clipper(model, clip_norm, clipping) as engine:
        for part in parts:
            engine.add(lambda part=part: loss(model, part), range(len(part)) if units is None else units)
        return torch.cat([g.flatten().double() for g in engine.take()])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# Exactness. Two lengths: at 6 positions large weights take the way of factors (ghost norms), at 300 all are multiplied
# out, although an embedding of 270 tokens is then smaller than the text that looks it up.

LONG = {"gpt2": {"n_positions": 320}, "t5": {}}


@pytest.mark.parametrize("units", [None, [0, 1, 0, 2, 0]], ids=["rows", "persons"])
@pytest.mark.parametrize("length", [6, 300])
@pytest.mark.parametrize(
    ("family", "mode", "tied"),
    [
        ("llama", "lora", True),
        ("llama", "full", True),
        ("llama", "full", False),
        ("gpt2", "lora", True),
        ("gpt2", "full", True),
        ("gpt2", "full", False),
        ("t5", "lora", True),
        ("t5", "full", True),
        ("qwen3", "full", True),
        ("mistral", "full", True),
        ("gemma", "lora", True),
    ],
)
def test_the_clipped_sum_equals_brute_force(
    family: str, mode: str, tied: bool, length: int, units: list[int] | None
) -> None:
    more = LONG.get(family, {"max_position_embeddings": 320}) if length > 96 else {}
    model = built(family, mode, tie_word_embeddings=tied, **more)
    tokens = texts(length)
    each = brute_force(model, tokens, units or range(ROWS))
    middle = float(torch.stack([g.norm() for g in each]).median())  # some are cut, some are not
    for clip_norm in (middle, math.inf):
        assert apart(summed(model, tokens, units, clip_norm), clip(each, clip_norm)) < 1e-10


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_the_clipped_sum_equals_vmap_of_grad(family: str, tied: bool) -> None:
    model = built(family, "full", tie_word_embeddings=tied)
    model.set_attn_implementation("eager")
    tokens, weights = texts(7), dict(model.named_parameters())

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, values, (row[None],), {"use_cache": False}).logits
        return F.cross_entropy(logits[0, :-1], row[1:])

    frozen = {name: weight.detach() for name, weight in weights.items()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(frozen, tokens)
    rows = [flat([each[name][i] for name in weights], list(weights.values())) for i in range(ROWS)]

    def bare(model: Any, tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    assert apart(summed(model, tokens, loss=bare), clip(rows)) < 1e-10


@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
@pytest.mark.parametrize(("family", "mode"), [("llama", "lora"), ("llama", "full"), ("t5", "lora")])
def test_opacus_gives_the_same_sum(family: str, mode: str, clipping: Clipping) -> None:
    model = built(family, mode, tie_word_embeddings=family == "t5")  # ghost knows no tied weights
    for length in (6, 40):
        own, other = (summed(model, texts(length), clipping=way) for way in ("bookkeeping", clipping))
        assert apart(own, other) < 1e-6


def test_opacus_own_clip_is_met_within_its_one_in_a_million() -> None:
    model, tokens = built("llama", "full", tie_word_embeddings=False), texts(12)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    losses(model, tokens).sum().backward()
    weights = trainable(wrapped)
    each = torch.cat([w.grad_sample.flatten(1) for w in weights], 1)
    factor = (C * MARGIN / (each.norm(dim=1) + 1e-6)).clamp(max=1.0)  # Opacus' DPOptimizer
    for weight in weights:
        weight.grad, weight.grad_sample = None, None
    wrapped.to_standard_module()
    assert apart(summed(model, tokens), factor @ each) < 1e-5


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1]])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_micro_batches_add_up_to_the_whole(mode: str, sizes: list[int]) -> None:
    model, tokens = built("gpt2", mode), texts(9, rows=6)
    assert apart(summed(model, tokens.split(sizes)), summed(model, tokens)) < 1e-12


def test_taking_the_sums_starts_the_next_at_zero_and_nothing_is_a_sum_of_zeros() -> None:
    model, one, two = built("llama", "lora"), texts(6), texts(6, seed=1)
    with clipper(model, C) as engine:
        empty = engine.take()
        for tokens in (one, two):
            engine.add(lambda tokens=tokens: losses(model, tokens), range(ROWS))
            sums = engine.take()
    assert all(not total.any() for total in empty)
    assert [t.shape for t in empty] == [w.shape for w in trainable(model)]
    assert torch.equal(torch.cat([g.flatten().double() for g in sums]), summed(model, two))


# What one unit can do, by the way of factors and by that of products. At every number of units: test_precision.py

KINDS = [("llama", "lora"), ("llama", "full"), ("gpt2", "full"), ("t5", "full"), ("gpt2", "lora"), ("t5", "lora")]


@pytest.mark.parametrize("length", [4, 40])
@pytest.mark.parametrize(("family", "mode"), KINDS)
def test_no_unit_moves_the_sum_by_more_than_the_clip_norm(family: str, mode: str, length: int) -> None:
    model = built(family, mode, dtype=torch.float32)
    tokens = texts(length, rows=6)
    whole = summed(model, tokens)
    for unit in range(6):
        alone = summed(model, tokens[unit : unit + 1])
        assert 0.99 * C < alone.norm() <= C  # its own clipped gradient, in float64
        moved = (whole - summed(model, torch.cat([tokens[:unit], tokens[unit + 1 :]]))).norm()
        assert 0.9 * C < moved <= C
    # Another text in its place moves it by at most twice as much.
    others = texts(length, rows=6, seed=1)
    for unit in range(6):
        replaced = torch.cat([tokens[:unit], others[unit : unit + 1], tokens[unit + 1 :]])
        assert C / 2 < (whole - summed(model, replaced)).norm() <= 2 * C
    assert (summed(model, tokens, clip_norm=math.inf) - summed(model, tokens[1:], clip_norm=math.inf)).norm() > 2 * C


@pytest.mark.parametrize("length", [4, 40])
@pytest.mark.parametrize(("family", "mode"), [("llama", "lora"), ("gpt2", "full")])
def test_no_person_moves_the_sum_by_more_than_the_clip_norm(family: str, mode: str, length: int) -> None:
    model = built(family, mode, dtype=torch.float32)
    tokens, persons = texts(length, rows=6), [0, 1, 0, 2, 0, 1]
    whole = summed(model, tokens, persons)
    for gone, rows in ((0, 3), (1, 2), (2, 1)):
        kept = [i for i, person in enumerate(persons) if person != gone]
        moved = (whole - summed(model, tokens[kept], [persons[i] for i in kept])).norm()
        assert 0.9 * C < moved <= C, rows
    # Row by row a person of three notes would move it by up to three times as much.
    kept = [i for i, person in enumerate(persons) if person != 0]
    assert (summed(model, tokens) - summed(model, tokens[kept])).norm() > 1.3 * C


def test_a_norm_that_cancels_is_not_underestimated() -> None:
    # Two positions with opposite gradients: the terms of the Gram matrices are 1e8 times as large as what is left.
    layer, generator = nn.Linear(64, 64, bias=False), torch.Generator().manual_seed(0)
    for _ in range(50):
        x = 100 * torch.randn(1, 1, 64, generator=generator).repeat(1, 2, 1)
        x[0, 1] += 1e-2 * torch.randn(64, generator=generator)
        out = torch.randn(64, generator=generator)

        def loss(x: Tensor = x, out: Tensor = out) -> Tensor:
            return ((layer(x)[:, 0] - layer(x)[:, 1]) * out).sum(1)

        [exact] = torch.autograd.grad(loss().sum(), [layer.weight])
        assert exact.norm() > C
        with clipper(layer, C) as engine:
            engine.add(loss, [0])
            assert engine.take()[0].double().norm() <= C


@pytest.mark.parametrize(("inputs", "outputs"), [(1e17, 2e-23), (2e-23, 1e17), (1e18, 1e-23)])
def test_a_norm_whose_squares_are_too_small_for_a_float_is_not_taken_for_zero(
    inputs: float, outputs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A start that a server chose can make one layer's inputs huge and the gradients behind it tiny. Squares below 1e-45
    # are 0 in float32, and so is each number of their Gram matrix.
    positions, width, limit = 30, 256, 1e-6
    layer = nn.Linear(width, width, bias=False)
    x, g = torch.full((1, positions, width), inputs), torch.full((1, positions, width), outputs)

    def norm() -> float:
        with clipper(layer, limit) as engine:
            engine.add(lambda: (layer(x) * g).sum((1, 2)), [0])
            return float(engine.take()[0].double().norm())

    assert positions * width * inputs * outputs > 1e4 * limit  # as it is, each number of g^T x being the same
    assert norm() <= limit
    monkeypatch.setattr("fedsynth.dpsgd.bookkeeping._hidden", lambda uses, unit, count: 0.0)
    assert norm() > 1e4 * limit


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("family", "mode"), [("llama", "lora"), ("llama", "full"), ("gpt2", "full")])
def test_a_text_that_is_not_finite_counts_for_exactly_nothing(family: str, mode: str, value: float) -> None:
    model = built(family, mode, dtype=torch.float32, tie_word_embeddings=False)
    good, bad = texts(6, vocabulary=200), texts(6, rows=2, vocabulary=200)
    bad[:, 3] = 250
    with torch.no_grad():
        model.get_input_embeddings().weight[250] = value
    reference = summed(model, good)
    found = summed(model, torch.cat([bad[:1], good, bad[1:]]))
    assert torch.isfinite(found).all()
    assert apart(found, reference) < 1e-5
    assert not summed(model, bad).any()
    # One bad row silences its person, no one else.
    persons = summed(model, torch.cat([good, bad[:1]]), [0, 1, 2, 3, 4, 4])
    assert apart(persons, summed(model, good[:4])) < 1e-5


def test_texts_without_a_loss_count_for_nothing() -> None:
    model, tokens = built("llama", "full", dtype=torch.float32), texts(6)

    def half(model: Any, tokens: Tensor) -> Tensor:
        return losses(model, tokens) * torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])

    assert apart(summed(model, tokens, loss=half), summed(model, tokens[[0, 2, 4]])) < 1e-5


# What is not known is refused, by name


def test_a_layer_that_is_not_known_is_refused_by_name() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = nn.Sequential(nn.Linear(3, 3), Scaled())
    with pytest.raises(UnknownWeight, match=r"1\.scale in a Scaled"), clipper(model, C):
        pass
    model[1].requires_grad_(False)
    with clipper(model, C) as engine:
        engine.add(lambda: model(torch.ones(2, 3)).sum(1), [0, 1])
        assert len(engine.take()) == 2


def test_a_weight_that_is_used_past_its_layer_is_refused_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.first(x), self.first.weight)

    model = Odd()
    with clipper(model, C) as engine, pytest.raises(UnknownWeight, match=r"'first\.weight' is used outside"):
        engine.add(lambda: model(torch.ones(2, 3)).sum(1), [0, 1])


# (where it has as many rows as there are examples by chance, the self-check's batches of other sizes tell)
def test_a_table_that_is_the_same_for_all_examples_is_refused_by_name() -> None:
    model = families.model("t5").double().train()
    with clipper(model, C) as engine, pytest.raises(UnknownWeight, match=r"relative_attention_bias.*shape \(6, 6\)"):
        engine.add(lambda: losses(model, texts(6)), range(ROWS))


def test_the_row_of_padding_is_learnt_no_more_than_torch_learns_it() -> None:
    table = nn.Embedding(5, 3, padding_idx=0)
    ids = torch.tensor([[0, 1, 2], [3, 0, 0]])
    with clipper(table, math.inf) as engine:
        engine.add(lambda: table(ids).sum((1, 2)), [0, 1])
        [found] = engine.take()
    assert found.tolist() == [[0.0] * 3, [1.0] * 3, [1.0] * 3, [1.0] * 3, [0.0] * 3]


def test_the_model_is_as_before_when_the_engine_closes() -> None:
    model, tokens = built("llama", "lora"), texts(6)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    kept = layer.forward = lambda x, forward=layer.forward: forward(x)  # one that was put there by someone else
    before = losses(model, tokens)

    def stopped() -> None:
        with clipper(model, C) as engine:
            engine.add(lambda: losses(model, tokens), range(ROWS))
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        stopped()
    assert layer.__dict__["forward"] is kept
    assert sum("forward" in module.__dict__ for module in model.modules()) == 1
    assert torch.equal(losses(model, tokens), before)
    assert all(w.grad is None for w in model.parameters())


def test_ghost_of_opacus_refuses_persons() -> None:
    model = built("llama", "lora")
    with clipper(model, C, "ghost") as engine, pytest.raises(ValueError, match="use 'bookkeeping'"):
        engine.add(lambda: losses(model, texts(6)), [0, 0, 1, 2, 3])


def test_the_engine_and_its_benchmarks_need_neither_flwr_nor_ray() -> None:
    code = (
        "import sys; sys.path.insert(0, 'simulations/benchmarks'); import fedsynth.dpsgd, dp_step; "
        "print(sorted({'flwr', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_weight_less_precise_than_float32_is_refused_by_name() -> None:
    with pytest.raises(UnknownWeight, match=r"'weight' is torch\.bfloat16"), clipper(nn.Linear(2, 2).bfloat16(), C):
        pass


def test_mixed_precision_and_a_batchs_mean_loss_are_refused() -> None:
    model, tokens = built("llama", "lora", dtype=torch.float32), texts(6)
    with clipper(model, C) as engine:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"torch\.autocast is on"):
            engine.add(lambda: losses(model, tokens), range(ROWS))
        with pytest.raises(ValueError, match=r"5 examples need a loss each, got losses of shape \(\)"):
            engine.add(lambda: losses(model, tokens).mean(), range(ROWS))


def test_a_weight_behind_a_parametrisation_is_refused() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(UnknownWeight, match="no gradient per example is known"), clipper(model, C):
        pass


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_without_a_clip_sums_are_those_of_autograd_and_what_is_not_finite_counts_for_nothing(bad: float) -> None:
    model, tokens = built("gpt2", "lora"), texts(6)
    whole = torch.stack(brute_force(model, tokens, range(ROWS)))
    assert apart(summed(model, tokens, clip_norm=math.inf), whole.sum(0)) <= 1e-12
    scale = torch.tensor([1.0, 1.0, bad, 1.0, 1.0], dtype=torch.float64)
    found = summed(model, tokens, clip_norm=math.inf, loss=lambda m, t: losses(m, t) * scale)
    assert apart(found, whole[[0, 1, 3, 4]].sum(0)) <= 1e-12
    assert all(w.grad is None for w in trainable(model))


def test_a_second_engine_on_an_open_model_is_refused() -> None:
    model, tokens = built("gpt2", "lora"), texts(6)
    with clipper(model, C) as engine:
        with pytest.raises(RuntimeError, match="close that one first"), clipper(model, C):
            pass
        engine.add(lambda: losses(model, tokens), range(ROWS))  # the first one is as it was
        first = engine.take()
    assert apart(torch.cat([g.flatten().double() for g in first]), summed(model, tokens)) <= 1e-12
