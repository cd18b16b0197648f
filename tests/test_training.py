from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedsynth.clients.client_side import ClientSide
from fedsynth.corpus import Corpus, Provenance
from fedsynth.dpsgd import bookkeeping, clipper
from fedsynth.dpsgd.bookkeeping import MARGIN, clip_factors, square_norms
from fedsynth.models.adapters import attach_lora
from fedsynth.models.loading import load_classifier, load_generator, load_tokenizer
from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import Budget, DPPlan
from fedsynth.scenario.client import Client, GeneratorTraining, TaskTraining
from fedsynth.scenario.task import NO_CARD
from fedsynth.training.classifier import _batches, classify, fit_classifier
from fedsynth.training.dp_training import (
    PublicRandomness,
    Training,
    add_noise,
    clipped_sum,
    next_token_losses,
    private,
    train_generator,
    trainable,
    without_guarantee,
)
from fedsynth.training.examples import Example, cut_texts, encode_records, encode_slots, encode_text
from fedsynth.training.selfcheck import SelfCheckFailed, self_check

torch.set_num_threads(1)
C = 0.3
PLAN = DPPlan(records=12, expected_batch=4, steps=6, rounds=1, clip_norm=C, noise_multiplier=1.5, delta=1e-5)
SETTINGS = GeneratorTraining(expected_batch_size=4, steps=6, learning_rate=0.01, clip_norm=C, rank=2, alpha=4.0)
KEY = bytes(range(32))


def lora(seed: int = 0) -> Any:
    """A model with LoRA past its start: with B at zero every gradient of A would be zero."""
    model = attach_lora(load_generator(tiny.folder()), rank=2, alpha=4.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=generator)
    return model


def examples(count: int = 6, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [Example(tuple(int(t) for t in rng.integers(3, 259, int(n))), 2) for n in rng.integers(4, 16, count)]


def own(batch: Sequence[Example | None]) -> list[tuple[Example, ...]]:
    """Slots of units of one row each, and empty ones."""
    return [() if example is None else (example,) for example in batch]


def summed(model: Any, batch: Sequence[Example], clip_norm: float = C, max_physical_batch_size: int = 64) -> Tensor:
    """The clipped sum as one vector of float64."""
    with clipper(model.train(), clip_norm) as clip:
        parts = clipped_sum(clip, model, own(batch), pad=tiny.PAD, max_physical_batch_size=max_physical_batch_size)
    model.eval()
    return torch.cat([p.flatten().double() for p in parts])


def gradient_alone(model: Any, example: Example) -> Tensor:
    """Brute force: autograd on one example, without an engine, padding or batch."""
    logits = model(input_ids=torch.tensor([example.tokens])).logits[0].double().log_softmax(-1)
    learnt = range(example.start, len(example.tokens))
    loss = -sum(logits[t - 1, example.tokens[t]] for t in learnt) / len(learnt)
    grads = torch.autograd.grad(loss, trainable(model))
    return torch.cat([g.flatten().double() for g in grads])


@contextmanager
def steps_taken() -> Iterator[list[Tensor]]:
    """The gradient that each optimizer step was given."""
    seen: list[Tensor] = []

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        seen.append(torch.cat([w.grad.flatten().double() for w in weights]))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


class Draws:
    """Chosen draws; noise of a key, kept, so that a test can take it away again."""

    def __init__(self, masks: Sequence[Sequence[bool]], key: bytes = KEY) -> None:
        self.masks, self.inner = iter(masks), GrantRandomness(key)
        self.noise: list[NDArray[np.float64]] = []

    def normals(self, count: int) -> NDArray[np.float64]:
        self.noise.append(self.inner.normals(count))
        return self.noise[-1].copy()

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:
        mask = np.array(next(self.masks), bool)
        assert len(mask) == count
        return mask


def fit(model: Any, batch: Any, randomness: Any, plan: DPPlan = PLAN) -> int:
    slots = batch if isinstance(batch, Events) else own(batch)
    return train_generator(model, private(slots, plan, randomness), SETTINGS, pad=tiny.PAD)


# What is learnt


class Table(nn.Module):
    """The same logits whatever is read: targets can be worked out by hand."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor) -> Any:
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), -1, -1)[:, logits_to_keep])


NOTE = Example((tiny.BOS, 7, 5, 6, tiny.EOS), start=2)  # BOS and a control code of one token are given
SHORT = Example((tiny.BOS, 4, tiny.EOS), start=2)


def test_the_loss_of_uniform_logits_is_the_log_of_the_vocabulary_for_every_length() -> None:
    losses = next_token_losses(Table(torch.zeros(1, 5, 8)), [NOTE, SHORT], tiny.PAD)
    assert losses.tolist() == pytest.approx([math.log(8)] * 2)


def test_text_and_end_of_text_are_learnt_and_code_and_padding_are_not() -> None:
    model = Table(torch.zeros(2, 5, 8))
    model.forward = lambda input_ids, attention_mask, logits_to_keep: SimpleNamespace(
        logits=model.logits[:, logits_to_keep]
    )
    next_token_losses(model, [NOTE, SHORT], tiny.PAD).sum().backward()
    grad = model.logits.grad
    assert grad is not None
    learnt = [[t for t in range(5) if grad[row, t].abs().sum() > 0] for row in range(2)]
    # Position t predicts token t + 1: tokens 2, 3 and 4 (the end) of the first; only the end of the second.
    assert learnt == [[1, 2, 3], [1]]
    assert [grad[0, t].argmin().item() for t in (1, 2, 3)] == [5, 6, tiny.EOS]
    assert grad[1, 1].argmin().item() == tiny.EOS
    # Mean over an example's own three tokens: softmax minus one-hot, by three.
    assert grad[0, 1, 5].item() == pytest.approx((1 / 8 - 1) / 3)
    assert grad[0, 1, 0].item() == pytest.approx(1 / 8 / 3)


def test_what_the_model_says_of_code_and_padding_changes_no_loss() -> None:
    logits = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    before = next_token_losses(Table(logits), [NOTE, SHORT], tiny.PAD)
    for position, changes in [(0, []), (1, [0, 1]), (2, [0]), (3, [0]), (4, [])]:
        other = logits.clone()
        other[0, position, 3] += 1.0
        after = next_token_losses(Table(other), [NOTE, SHORT], tiny.PAD)
        assert [i for i in range(2) if before[i] != after[i]] == changes


def test_no_example_enters_the_loss_of_another() -> None:
    model, batch = lora(), examples()
    together = next_token_losses(model, batch, tiny.PAD)
    alone = torch.cat([next_token_losses(model, [e], tiny.PAD) for e in batch])
    assert torch.allclose(together, alone, rtol=1e-5)


def test_another_token_for_padding_changes_nothing() -> None:
    model, batch = lora(), examples()
    assert torch.allclose(next_token_losses(model, batch, 0), next_token_losses(model, batch, 77), rtol=1e-5)


# Slots


LABELS = ("flu", "cold")


def ids(text: str) -> tuple[int, ...]:
    return tuple(load_tokenizer(tiny.folder())(text, add_special_tokens=False)["input_ids"])


def corpus(*rows: tuple[str, str], units: Sequence[str] | None = None) -> Corpus:
    texts, labels = zip(*rows, strict=True) if rows else ((), ())
    return Corpus(tuple(texts), tuple(labels), Provenance.PRIVATE, units=None if units is None else tuple(units))


def slots_of(text: Corpus, records: int, longest: int = 64) -> list[tuple[Example, ...]]:
    return encode_slots(load_tokenizer(tiny.folder()), text, LABELS, records, GeneratorTraining(max_length=longest))


ROWS = [("hot", "flu"), ("wet nose", "cold"), ("ache", "flu")]


def test_an_example_is_bos_code_text_and_end() -> None:
    code, text = ids("flu:"), ids(" hot")
    assert (len(code), len(text)) == (4, 4)  # a token per byte
    [[slot]] = slots_of(corpus(("  hot \n", "flu")), 1)
    assert slot == Example((tiny.BOS, *code, *text, tiny.EOS), start=5)
    assert NO_CARD.code("flu") == "flu:"


def test_a_long_text_is_cut_and_never_longer_than_allowed() -> None:
    [[slot]] = slots_of(corpus(("a" * 100, "flu")), 1, longest=16)
    assert len(slot.tokens) == 16
    assert slot.start == 5


def test_rows_with_unknown_labels_become_empty() -> None:
    [one, two, three] = slots_of(corpus(ROWS[0], ("text", "measles"), ROWS[2]), 3)
    assert two == ()
    assert [one, three] == slots_of(corpus(ROWS[0], ROWS[2]), 2)


@pytest.mark.parametrize("records", [1, 2, 3, 4, 9])
def test_there_is_one_slot_per_declared_record_whatever_the_real_count(records: int) -> None:
    slots = slots_of(corpus(*ROWS), records)
    assert len(slots) == records
    assert slots[:3] == slots_of(corpus(*ROWS), 3)[:records]
    assert all(slot == () for slot in slots[3:])


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_emptying_one_record_changes_no_other_slot(gone: int) -> None:
    whole = slots_of(corpus(*ROWS), 4)
    rows = [("", "") if i == gone else row for i, row in enumerate(ROWS)]
    without = slots_of(corpus(*rows), 4)
    assert without[gone] == ()
    assert [s for i, s in enumerate(without) if i != gone] == [s for i, s in enumerate(whole) if i != gone]


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_taking_one_row_out_of_the_file_leaves_the_others_as_they_were_prepared(gone: int) -> None:
    whole = slots_of(corpus(*ROWS), 4)
    without = slots_of(corpus(*ROWS).take([i for i in range(3) if i != gone]), 4)
    assert without == [*(s for i, s in enumerate(whole) if i != gone), ()]


PEOPLE = corpus(*ROWS, ("later", "flu"), ("last", "cold"), units="abcaa")


def test_further_rows_of_a_person_do_not_count() -> None:
    assert slots_of(PEOPLE, 4) == slots_of(PEOPLE.take([0, 1, 2]), 4)
    # Neither do they push another person out, where more persons came than were declared.
    assert slots_of(PEOPLE, 2) == slots_of(PEOPLE.take([0, 1, 2]), 2)


def test_emptying_all_rows_of_a_person_moves_the_sum_by_at_most_the_clip_norm() -> None:
    emptied = replace(
        PEOPLE, answers=tuple("" if u == "a" else x for u, x in zip("abcaa", PEOPLE.answers, strict=True))
    )
    model = lora()
    whole, without = ([e for slot in slots_of(c, 4) for e in slot] for c in (PEOPLE, emptied))
    assert len(whole) - len(without) == 1
    assert 0.5 * C < (summed(model, whole) - summed(model, without)).norm() <= C * (1 + 1e-5)


# Sensitivity


def test_the_gradient_of_each_example_equals_brute_force() -> None:
    model, batch = lora(), examples()
    by_hand = [gradient_alone(model, e) for e in batch]
    for example, grad in zip(batch, by_hand, strict=True):
        assert (summed(model, [example], math.inf) - grad).norm() < 1e-4 * grad.norm()
    clipped = sum(g * min(1.0, MARGIN * C / float(g.norm())) for g in by_hand)
    assert (summed(model, batch) - clipped).norm() < 1e-4 * C * len(batch)


def largest_move(model: Any, batch: list[Example], clip_norm: float, max_physical_batch_size: int = 64) -> float:
    whole = summed(model, batch, clip_norm, max_physical_batch_size)
    without = (summed(model, [e for e in batch if e is not gone], clip_norm, max_physical_batch_size) for gone in batch)
    return max(float((whole - other).norm()) for other in without)


@pytest.mark.parametrize("max_physical_batch_size", [1, 4, 64])
def test_removing_any_example_moves_the_sum_by_at_most_the_clip_norm(max_physical_batch_size: int) -> None:
    model, batch = lora(), examples(7)
    assert largest_move(model, batch, C, max_physical_batch_size) <= C * (1 + 1e-5)
    assert largest_move(model, batch, math.inf, max_physical_batch_size) > 2 * C  # without a clip it would be far more


def test_replacing_any_example_moves_the_sum_by_at_most_twice_the_clip_norm() -> None:
    model, batch = lora(), examples(7)
    whole = summed(model, batch)
    moves = []
    for i, other in enumerate(examples(7, seed=1)):
        moves.append(float((whole - summed(model, [*batch[:i], other, *batch[i + 1 :]])).norm()))
    assert C < max(moves) <= 2 * C * (1 + 1e-5)


def test_small_gradients_are_not_scaled_up() -> None:
    model, batch = lora(), examples(3)
    norms = [float(gradient_alone(model, e).norm()) for e in batch]
    wide = 2 * max(norms)
    assert (summed(model, batch, wide) - summed(model, batch, math.inf)).norm() < 1e-5 * sum(norms)


@pytest.mark.parametrize("max_physical_batch_size", [1, 2, 3, 5])
def test_micro_batches_change_nothing_but_rounding(max_physical_batch_size: int) -> None:
    model, batch = lora(), examples(7)
    whole = summed(model, batch)
    assert (summed(model, batch, max_physical_batch_size=max_physical_batch_size) - whole).norm() < 1e-5 * whole.norm()


def test_clip_factors_by_hand() -> None:
    # Two tensors together: norms 5 (3 and 4), 0.5, 0, NaN, infinite, and two whose squares overflow float32.
    three = [3.0, 0.3, 0.0, math.nan, math.inf, 3e20, 3e38]
    four = [4.0, 0.4, 0.0, 1.0, 1.0, 4e20, 0.0]
    one, two = torch.tensor([[x, 0.0] for x in three]), torch.tensor([[[0.0, x]] for x in four])
    factors = clip_factors(square_norms(one) + square_norms(two), 1.0).tolist()
    assert factors == pytest.approx([0.2 * MARGIN, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    for clip_norm, width in itertools.product((0.1, 0.3, 1.0, 7.0), (40, 5000)):
        grads = torch.randn(500, width, generator=torch.Generator().manual_seed(1)) * 3
        norms = (clip_factors(square_norms(grads), clip_norm).float()[:, None] * grads).double().norm(dim=1)
        assert norms.max() <= clip_norm  # not even by rounding
        assert norms.max() > clip_norm * 0.9989


def poison(model: Any, token: int, value: float) -> None:
    """Whoever reads this token gets non-finite activations. Untied: else its logit would spoil everyone's loss."""
    embeddings = model.get_input_embeddings()
    embeddings.weight = nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)
    embeddings.weight[token] = value


def without_where(grads: Sequence[Tensor], clip_norm: float) -> Tensor:
    """Broken on purpose: a NaN times zero is NaN."""
    norm = torch.sqrt(sum((g.flatten(1) ** 2).sum(1) for g in grads))
    factor = (clip_norm / norm).nan_to_num(0.0).clamp(max=1.0)
    return torch.cat([torch.einsum("n,n...->...", factor, g).flatten() for g in grads])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_physical_batch_size", [1, 3, 64])
def test_a_bad_example_contributes_exactly_nothing(value: float, max_physical_batch_size: int) -> None:
    model = lora()
    good = [e for e in examples(7) if 50 not in e.tokens]
    bad = [Example((1, 10, 50, 11, 2), 2), Example((1, 10, *range(100, 120), 50, 2), 2)]
    reference = summed(model, good)
    poison(model, 50, value)
    assert torch.isnan(gradient_alone(model, bad[0])).any()
    found = summed(model, [bad[0], *good, bad[1]], max_physical_batch_size=max_physical_batch_size)
    assert torch.isfinite(found).all()
    # Padding to a longer neighbour shifts other gradients by rounding only.
    assert (found - reference).norm() < 1e-5 * reference.norm()
    assert torch.equal(summed(model, bad, max_physical_batch_size=max_physical_batch_size), torch.zeros_like(reference))


def test_a_clip_that_multiplies_by_zero_would_not_do() -> None:
    grads = [torch.tensor([[1.0, 0.0], [math.nan, 1.0]])]
    assert without_where(grads, C).isnan().any()


def test_an_example_without_a_learnt_token_contributes_exactly_nothing() -> None:
    model, good = lora(), examples(5)
    empty = [Example((1, 10, 11), 3), Example((1, 10, 11, 12), 9), Example((1,), 1)]
    assert next_token_losses(model, empty, tiny.PAD).tolist() == [0.0, 0.0, 0.0]  # not 0 / 0
    reference = summed(model, good)
    found = summed(model, [*good, *empty])
    assert torch.isfinite(found).all()
    assert (found - reference).norm() < 1e-6 * reference.norm()
    for one in empty:
        assert torch.equal(summed(model, [one]), torch.zeros_like(reference))
    assert torch.equal(summed(model, []), torch.zeros_like(reference))


# Steps, draws and noise


@pytest.mark.parametrize("steps", [1, 6])
def test_as_many_optimizer_steps_run_as_the_plan_says(steps: int) -> None:
    plan = replace(PLAN, steps=steps)
    with steps_taken() as seen:
        ran = fit(lora(), examples(12), GrantRandomness(KEY), plan)
    assert len(seen) == ran == plan.steps == plan.total_steps


class Events:
    """Slots and draws that write down when they are used."""

    def __init__(self, batch: Sequence[Example | None]) -> None:
        self.slots, self.inner = own(batch), GrantRandomness(KEY)
        self.seen: list[str] = []
        self.masks: list[list[bool]] = []
        self.rates: list[float] = []

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, index: int) -> tuple[Example, ...]:
        self.seen.append("text")
        return self.slots[index]

    def normals(self, count: int) -> NDArray[np.float64]:
        self.seen.append("noise")
        return self.inner.normals(count)

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:
        self.seen.append("mask")
        self.rates.append(rate)
        mask = self.inner.poisson_mask(count, rate)
        self.masks.append(mask.tolist())
        return mask


def test_draws_come_before_text_at_the_planned_rate_and_do_not_depend_on_it() -> None:
    one, two = Events(examples(12)), Events([*examples(4, seed=1), *[None] * 8])
    for events in (one, two):
        fit(lora(), events, events)
        assert events.rates == [4 / 12] * 6
        steps = "".join({"mask": "m", "text": "t", "noise": "n"}[e] for e in events.seen).split("m")
        assert steps[0] == ""
        assert len(steps) == 7
        drawn = [sum(mask) for mask in events.masks]
        assert [s.count("t") for s in steps[1:]] == drawn  # what was drawn is read, once, and nothing else
        assert all(s == "t" * s.count("t") + "n" * s.count("n") for s in steps[1:])
        assert len(set(drawn)) > 1  # Poisson: batches of different size
    assert one.masks == two.masks


def deviates(seen: Sequence[Tensor], std: float) -> bool:
    """Whether the coordinates are not normal with mean 0 and this deviation, by five deviations of each estimate."""
    noise = torch.cat(list(seen))
    n = len(noise)
    wrong_std = abs(float(noise.std()) / std - 1) > 5 / math.sqrt(2 * n)
    return wrong_std or abs(float(noise.mean())) > 5 * std / math.sqrt(n)


def noise_of(**broken: Any) -> list[Tensor]:
    planned: dict[str, Any] = {
        "rate": PLAN.sampling_rate,
        "expected_batch_size": PLAN.expected_batch,
        "steps": 20,
        "clip_norm": C,
        "noise_multiplier": 1.5,
        "randomness": GrantRandomness(KEY),
    }
    with steps_taken() as seen:
        train_generator(lora(), Training([()] * 12, **{**planned, **broken}), SETTINGS, pad=tiny.PAD)
    return seen


def test_noise_per_coordinate_has_deviation_sigma_c_by_expected_batch() -> None:
    planned = 1.5 * C / 4
    with steps_taken() as seen:
        fit(lora(), [None] * 12, GrantRandomness(KEY), replace(PLAN, steps=20))
    assert sum(map(len, seen)) > 30_000
    assert not deviates(seen, planned)
    # The same measurement finds each wrong scale.
    for broken in (
        {"noise_multiplier": 1.5 * 1.03},
        {"clip_norm": 1.0},
        {"expected_batch_size": 1},
        {"expected_batch_size": 5},
    ):
        assert deviates(noise_of(**broken), planned)


def test_noise_of_two_steps_and_of_two_layers_is_not_the_same() -> None:
    seen = noise_of(steps=2)
    assert len(set(torch.cat(seen).tolist())) > 0.999 * 2 * len(seen[0])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_noise_is_added_in_double_precision_and_rounded_once_whatever_the_threads(
    monkeypatch: pytest.MonkeyPatch, kind: torch.dtype
) -> None:
    count = 3 * 2**18 + 5  # several blocks, and a rest
    before = torch.randn(3, count // 3, generator=torch.Generator().manual_seed(0)).to(kind)
    noise = 0.7 * GrantRandomness(KEY).normals(before.numel())
    wanted = torch.from_numpy(before.double().numpy() + noise.reshape(before.shape)).to(kind)
    noised = []
    for threads in (1, 2, 3):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        total = before.clone()
        add_noise(total, 0.7, GrantRandomness(KEY))
        noised.append(total)
    assert all(torch.equal(total, wanted) for total in noised)
    # Normals that are rounded before they are scaled give other sums.
    rounded = before.double() + 0.7 * torch.from_numpy(noise / 0.7).float().view(before.shape)
    assert not torch.equal(rounded.to(kind), wanted)


def test_an_empty_batch_is_a_step_of_noise_only() -> None:
    draws = Draws([[False] * 12] * 6)
    with steps_taken() as seen:
        assert fit(lora(), examples(12), draws) == 6
    noise = torch.from_numpy(np.concatenate(draws.noise)).view(6, -1)
    assert torch.allclose(torch.stack(seen), 1.5 * C * noise / 4, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("drawn", [0, 1, 3, 12])
def test_the_noisy_sum_is_divided_by_the_expected_batch_not_by_the_drawn_one(drawn: int) -> None:
    slots = examples(12)
    draws = Draws([[i < drawn for i in range(12)]])
    with steps_taken() as seen:
        fit(lora(), slots, draws, replace(PLAN, steps=1))
    expected = summed(lora(), slots[:drawn]) + 1.5 * C * torch.from_numpy(np.concatenate(draws.noise))
    assert torch.allclose(seen[0] * 4, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gone", [0, 5, 11])
def test_emptying_a_slot_moves_the_first_step_by_at_most_the_clip_norm_by_expected_batch(gone: int) -> None:
    slots: list[Example | None] = list(examples(12))
    steps = []
    for text in (slots, [None if i == gone else e for i, e in enumerate(slots)]):
        with steps_taken() as seen:
            fit(lora(), text, Draws([[True] * 12]), replace(PLAN, steps=1))
        steps.append(seen[0])
    # Noise is the same on both sides; it was added in float64 and rounded to float32.
    assert 0.5 * C / 4 < (steps[0] - steps[1]).norm() <= C / 4 * (1 + 1e-4)


def test_the_same_key_gives_the_same_model_and_another_key_another() -> None:
    def trained(key: bytes) -> Tensor:
        model = lora()
        fit(model, examples(12), GrantRandomness(key))
        return torch.cat([w.detach().flatten() for w in trainable(model)])

    one = trained(KEY)
    torch.manual_seed(1)  # torch's own generator plays no part
    assert torch.equal(one, trained(KEY))
    assert not torch.equal(one, trained(bytes(32)))


def test_training_changes_the_adapter_only_and_leaves_no_trace_on_the_model() -> None:
    model = lora()
    before = {n: w.detach().clone() for n, w in model.named_parameters()}
    fit(model, examples(12), GrantRandomness(KEY))
    changed = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if "lora_" in n}
    assert not model.training
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("count", [0, 11, 13])
def test_another_number_of_slots_than_declared_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"declares 12 records, got {count} slots"):
        fit(lora(), [None] * count, GrantRandomness(KEY))


def test_the_plan_comes_from_declared_facts_before_any_text_is_read(tmp_path: Path) -> None:
    def client(rows: int) -> ClientSide:
        def read() -> Any:
            raise AssertionError(f"opened {rows} rows")

        config = Client(tiny.folder(), tiny.folder(), budget=Budget(2.0), generator_training=SETTINGS)
        work = tmp_path / str(rows)
        ledger = Ledger(work / "ledger.sqlite", Account("d", None))
        return ClientSide(0, config, LABELS, 12, 1, "row", work, "run", ledger, read, True)

    one, two = (client(rows).plan() for rows in (5, 500) if (tmp_path / str(rows)).mkdir() is None)
    assert one == two
    assert (one.records, one.expected_batch, one.steps, one.clip_norm) == (12, 4, 6, C)


# Without guarantee


def test_training_without_guarantee_takes_the_same_steps_and_draws_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any, count: int) -> NDArray[np.float64]:
        raise AssertionError("drew noise")

    for kind in (PublicRandomness, GrantRandomness):
        monkeypatch.setattr(kind, "normals", never)
    model = lora()
    with steps_taken() as seen:
        ran = train_generator(model, without_guarantee(own([*examples(11), None]), SETTINGS, 3), SETTINGS, pad=tiny.PAD)
    assert ran == len(seen) == SETTINGS.steps
    # Not clipped: the first step is the plain sum of what was drawn, by the expected batch.
    mask = PublicRandomness(3).poisson_mask(12, 4 / 12)
    drawn = [e for e, m in zip([*examples(11), None], mask, strict=True) if m and e is not None]
    assert torch.allclose(seen[0] * 4, summed(lora(), drawn, math.inf), rtol=1e-4, atol=1e-5)


def test_a_public_seed_gives_no_noise() -> None:
    with pytest.raises(RuntimeError, match="from a grant's key only"):
        PublicRandomness(0).normals(1)


def test_training_lowers_the_loss() -> None:
    model, text = lora(), examples(12)
    before = next_token_losses(model, text, tiny.PAD).mean().item()
    settings = replace(SETTINGS, steps=40, learning_rate=0.02)
    train_generator(model, without_guarantee(own(text), settings, 0), settings, pad=tiny.PAD)
    assert next_token_losses(model, text, tiny.PAD).mean().item() < before - 0.5


def test_training_without_guarantee_of_a_small_site_divides_like_a_plan() -> None:
    slots = examples(2)  # Client.plan: expected_batch = min(4, 2)
    with steps_taken() as seen:
        train_generator(lora(), without_guarantee(own(slots), SETTINGS, 3), SETTINGS, pad=tiny.PAD)
    assert torch.allclose(seen[0] * 2, summed(lora(), slots, math.inf), rtol=1e-4, atol=1e-5)


# Self-check


def checked(model: Any, plan: DPPlan = PLAN) -> None:
    self_check(model, plan, SETTINGS, pad=tiny.PAD)


def test_a_good_model_passes_and_is_left_as_it_was() -> None:
    for model in (attach_lora(load_generator(tiny.folder()), rank=2, alpha=4.0, seed=0), lora()):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        checked(model)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert all(w.grad is None for w in model.parameters())
        assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
        assert not model.training


class NoRoom(nn.Module):
    """A layer for which there is memory up to so many positions, of all examples of a pass together."""

    def __init__(self, inner: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most, self.seen = inner, most, 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = max(self.seen, hidden.shape[0] * hidden.shape[1])
        if self.seen > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return self.inner(hidden)


@pytest.mark.parametrize("rows_per_unit", [1, 3])
def test_what_one_long_text_would_need_is_taken_before_the_charge_or_refused(
    monkeypatch: pytest.MonkeyPatch, rows_per_unit: int
) -> None:
    settings = replace(SETTINGS, max_physical_batch_size=12, max_length=40, rows_per_unit=rows_per_unit)
    long, short = Example(tuple(range(3, 43)), 2), Example((3, 4, 5), 2)
    slots = [(short,) * rows_per_unit] * 3 + [(long,) * rows_per_unit] + [()] * 8
    for most in (12 * 40, 12 * 40 - 1):
        monkeypatch.setattr("fedsynth.training.selfcheck._passed", {})  # as in a process of its own
        model = lora()
        layer(model).mlp = NoRoom(layer(model).mlp, most)
        if most < 12 * 40:
            with pytest.raises(
                SelfCheckFailed, match=r"a pass of 12 texts of 40 tokens .* a smaller max_physical_batch_size"
            ):
                self_check(model, PLAN, settings, pad=tiny.PAD)
            assert not model.training
            continue
        self_check(model, PLAN, settings, pad=tiny.PAD)
        train_generator(model, private(slots, PLAN, GrantRandomness(KEY)), settings, pad=tiny.PAD)


def test_a_site_of_few_units_is_asked_for_no_more_than_it_can_ever_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsynth.training.selfcheck._passed", {})
    model = lora()
    layer(model).mlp = NoRoom(layer(model).mlp, 12 * 40)
    self_check(
        model, PLAN, replace(SETTINGS, max_physical_batch_size=64, max_length=40), pad=tiny.PAD
    )  # 12 records are declared


def test_the_whole_pass_is_tried_once_in_a_process_for_one_model_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsynth.training.selfcheck._passed", {})
    ran: list[int] = []
    monkeypatch.setattr("fedsynth.training.selfcheck.whole_physical_batch", lambda *_, **__: ran.append(1))
    for seed in (0, 1):
        checked(lora(seed))
        checked(lora(seed), replace(PLAN, noise_multiplier=1.5 + seed))
    assert len(ran) == 1
    self_check(lora(), PLAN, replace(SETTINGS, max_length=SETTINGS.max_length + 1), pad=tiny.PAD)
    assert len(ran) == 2


def test_memory_for_a_unit_of_many_rows_does_not_grow_with_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    real, picked = bookkeeping._rows, []

    def rows(used: Any, index: Tensor) -> Any:
        picked.append(len(index))
        return real(used, index)

    model, batch = lora(), examples(9)
    with clipper(model.train(), C) as clip:
        whole = clipped_sum(clip, model, [tuple(batch)], pad=tiny.PAD, max_physical_batch_size=9)
    alone = sum(gradient_alone(model.eval(), example) for example in batch)
    assert torch.allclose(
        torch.cat([p.flatten().double() for p in whole]), alone * (C * MARGIN / alone.norm()), rtol=1e-3, atol=1e-6
    )
    use = bookkeeping.Product(torch.randn(9, 4, 6), torch.randn(9, 4, 5), False)
    monkeypatch.setattr(bookkeeping, "_rows", rows)
    unit = torch.zeros(9, dtype=torch.long)
    found = bookkeeping._ghost([use], unit, 1, bookkeeping._pairs(unit))
    exact = torch.einsum("ntx,ntg->xg", use.x.double(), use.g.double()).square().sum()
    assert torch.allclose(found, exact, rtol=1e-3)
    assert max(picked) == 9
    assert sum(picked) == 2 * 36  # of 9 rows there are 36 pairs


class Centred(nn.Module):
    """Broken on purpose: takes the batch's mean away, as BatchNorm does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.inner(*args, **kwargs)
        return hidden - hidden.mean(dim=0, keepdim=True)


def layer(model: Any) -> Any:
    return model.get_base_model().model.layers[0]


def test_a_layer_that_mixes_examples_is_found() -> None:
    model = lora()
    layer(model).mlp = Centred(layer(model).mlp)
    with pytest.raises(SelfCheckFailed, match="a layer mixes examples"):
        checked(model)


class Mixing(nn.Module):
    """Adds so much of the batch's mean as its buffer says: the same shapes and code for every start."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("share", torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.inner(*args, **kwargs)
        return hidden + self.share * hidden.mean(dim=0, keepdim=True)


def endless(model: Any) -> None:
    next(w for n, w in model.named_parameters() if "lora_B" in n).data[0, 0] = math.inf


def without_gradient(model: Any) -> None:
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.zero_()


def mixing(model: Any) -> None:
    layer(model).mlp.share.fill_(1.0)


@pytest.mark.parametrize(
    ("broken", "said"),
    [(endless, "not finite|nan"), (without_gradient, "has no gradient"), (mixing, "a layer mixes examples")],
)
def test_a_start_is_checked_by_itself_after_another_has_passed_with_the_same_plan_and_shapes(
    broken: Callable[[Any], None], said: str
) -> None:
    for good in (True, False):
        model = lora()
        layer(model).mlp = Mixing(layer(model).mlp)
        if good:
            checked(model)
            continue
        broken(model)
        with pytest.raises(SelfCheckFailed, match=said):
            checked(model)


@pytest.mark.parametrize(("clip_norm", "again"), [(1e-3, 0), (1e4, 3)])
def test_a_further_start_takes_four_passes_and_one_for_each_gradient_that_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, clip_norm: float, again: int
) -> None:
    """Three texts together, each alone, and each alone under a lower bound if it is shorter than C."""
    real, passed = next_token_losses, list[int]()

    def counted(model: nn.Module, batch: Sequence[Example], pad: int) -> Tensor:
        passed.append(len(batch))
        return real(model, batch, pad)

    monkeypatch.setattr("fedsynth.training.dp_training.next_token_losses", counted)
    monkeypatch.setattr("fedsynth.training.selfcheck._once", lambda asked, check: None)
    checked(lora(2), replace(PLAN, clip_norm=clip_norm))
    assert passed == [3, 1, 1, 1] + [1] * again


def test_batch_norm_is_found() -> None:
    class Norm(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.norm = nn.BatchNorm1d(32, affine=False, track_running_stats=False)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.norm(self.inner(hidden).transpose(1, 2)).transpose(1, 2)

    model = lora()
    layer(model).mlp = Norm(layer(model).mlp)
    with pytest.raises(SelfCheckFailed):
        checked(model)


def test_a_batch_mean_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(model: nn.Module, batch: Sequence[Example], pad: int) -> Tensor:
        return next_token_losses(model, batch, pad) / len(batch)

    monkeypatch.setattr("fedsynth.training.dp_training.next_token_losses", mean)
    # With a clip below every gradient the mean would be scaled up again: then it is no danger either.
    with pytest.raises(SelfCheckFailed, match="depends on its batch"):
        checked(lora(), replace(PLAN, clip_norm=100.0))


def test_a_missing_clip_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsynth.dpsgd.bookkeeping.clip_factors", lambda squares, clip_norm: torch.ones_like(squares))
    with pytest.raises(SelfCheckFailed, match=f"above clip_norm {C}"):
        checked(lora())


def test_a_missing_clip_is_found_where_gradients_are_short_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsynth.dpsgd.bookkeeping.clip_factors", lambda squares, clip_norm: torch.ones_like(squares))
    with pytest.raises(SelfCheckFailed, match="above clip_norm"):
        checked(lora(), replace(PLAN, clip_norm=1e4))


def test_a_model_that_treats_all_otherwise_where_one_is_long_is_found() -> None:
    class Stretched(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor) -> Tensor:  # as LongRoPE does beyond its first context
            return self.inner(hidden) * (1.0 if hidden.shape[1] < 40 else 2.0)

    model = lora()
    layer(model).mlp = Stretched(layer(model).mlp)
    with pytest.raises(SelfCheckFailed, match="depends on its batch"):
        checked(model, replace(PLAN, clip_norm=100.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_start_that_is_not_finite_is_found(bad: float) -> None:
    model = lora()
    with torch.no_grad():
        trainable(model)[0][0, 0] = bad
    with pytest.raises(SelfCheckFailed, match="no gradient, or one that is not finite"):
        checked(model)


def test_an_adapter_without_effect_is_found() -> None:
    model = lora()
    with torch.no_grad():
        for weight in trainable(model):
            weight.zero_()  # A and B both zero: neither has a gradient
    with pytest.raises(SelfCheckFailed, match="no gradient"):
        checked(model)


def test_a_model_with_nothing_to_learn_is_found() -> None:
    model = lora()
    model.requires_grad_(False)
    with pytest.raises(SelfCheckFailed, match="trainable"):
        checked(model)


# The task model


TASK = TaskTraining(batch=8, token_dropout=0.1, max_length=16, weight_decay=0.01)
TOY = Corpus(
    tuple(f"{'aaa' if i % 2 else 'zzz'} {i % 5}" for i in range(32)),
    tuple("flu" if i % 2 else "cold" for i in range(32)),
    Provenance.PUBLIC,
)


def learnt(seed: int = 0, epochs: int = 12, text: Corpus = TOY, head: int = 0) -> nn.Module:
    model = load_classifier(tiny.folder(), 2, head)
    fit_classifier(
        model, load_tokenizer(tiny.folder()), text, LABELS, replace(TASK, learning_rate=5e-3), epochs=epochs, seed=seed
    )
    return model


def found(model: nn.Module, texts: Sequence[str], batch: int = 128) -> list[int]:
    return classify(model, load_tokenizer(tiny.folder()), texts, 16, batch).tolist()


def test_a_separable_task_is_learnt() -> None:
    model = learnt()
    assert not model.training
    truth = [LABELS.index(a) for a in TOY.answers]
    assert found(model, TOY.prompts) == truth
    assert found(model, ["aaa 9", "zzz 9"]) == [0, 1]
    untrained = found(load_classifier(tiny.folder(), 2, 0), TOY.prompts)
    assert sum(a == b for a, b in zip(untrained, truth, strict=True)) < 28


def weights(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def test_the_task_model_depends_on_its_seeds_only() -> None:
    one = weights(learnt(epochs=1))
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  # the global state, on purpose
    assert torch.equal(weights(learnt(epochs=1)), one)
    assert not torch.equal(weights(learnt(epochs=1, seed=1)), one)
    assert not torch.equal(weights(learnt(epochs=1, head=1)), one)


def test_rows_with_unknown_labels_do_not_count_for_the_task_model() -> None:
    strange = Corpus((*TOY.prompts, "bad"), (*TOY.answers, "measles"), Provenance.PUBLIC)
    assert torch.equal(weights(learnt(epochs=1, text=strange)), weights(learnt(epochs=1)))


def test_classes_come_in_the_order_of_the_texts_for_any_batch() -> None:
    model, texts = learnt(epochs=2), [t * (i % 3 + 1) for i, t in enumerate(TOY.prompts)]
    assert found(model, texts, batch=1) == found(model, texts, batch=5) == found(model, texts)
    assert found(model, []) == []


@contextmanager
def global_state_kept() -> Iterator[None]:
    torch.manual_seed(5)
    before = torch.get_rng_state().clone()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def test_training_and_checking_leave_the_global_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsynth.training.selfcheck._passed", {})
    generator, task = lora(), load_classifier(tiny.folder(), 2, 0)
    tokenizer = load_tokenizer(tiny.folder())
    with global_state_kept():
        checked(generator)
        fit(generator, examples(12), GrantRandomness(KEY))
        train_generator(generator, without_guarantee(own(examples(12)), SETTINGS, 0), SETTINGS, pad=tiny.PAD)
        fit_classifier(task, tokenizer, TOY, LABELS, replace(TASK, learning_rate=1e-3), epochs=1, seed=0)
        classify(task, tokenizer, TOY.prompts, 16)


@pytest.mark.parametrize(
    "make",
    [
        lambda: attach_lora(load_generator(tiny.folder()), rank=2, alpha=4.0, seed=3),
        lambda: load_classifier(tiny.folder(), 2, 3),
    ],
    ids=["lora", "classifier"],
)
def test_a_fresh_model_does_not_depend_on_the_global_random_state(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    one = weights(make())
    torch.manual_seed(2)
    assert torch.equal(weights(make()), one)
    assert torch.initial_seed() == 2  # it may draw from the global generator, but never seeds it


def test_no_row_with_a_known_label_leaves_the_task_model_as_it_was() -> None:
    fresh = weights(load_classifier(tiny.folder(), 2, 0))
    assert torch.equal(weights(learnt(text=Corpus(("a",), ("measles",), Provenance.PUBLIC))), fresh)


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        (
            "poisson_mask",
            lambda self, count, rate: np.arange(count) < count * rate * 0.9,
            "one unit is drawn in|sampler draws|vary by",
        ),
        ("normals", lambda self, count: np.linspace(-1.0, 1.0, count), "noise has deviation"),
    ],
)
def test_a_wrong_sampler_or_noise_is_found_before_the_charge(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, said: str
) -> None:
    checked(lora())
    monkeypatch.setattr(GrantRandomness, name, broken)
    with pytest.raises(SelfCheckFailed, match=said):
        checked(lora())


@pytest.mark.parametrize(("size", "whole"), [(12, True), (13, True), (14, False), (50, False)])
def test_a_cut_text_teaches_no_end_and_a_whole_one_does(size: int, whole: bool) -> None:
    text = ("abcdefghij" * 5)[:size]  # a token per byte; BOS, code and end leave room for 14 bytes, a blank among them
    labelled = Corpus((text,), ("xyz",), Provenance.PRIVATE)
    slots = encode_slots(tiny.tokenizer(), labelled, ["xyz"], 1, GeneratorTraining(max_length=20))
    [[example]] = slots
    assert (example.tokens[-1] == tiny.EOS) == whole
    learnt = example.tokens[example.start : -1] if whole else example.tokens[example.start :]
    assert tiny.tokenizer().decode(learnt) == f" {text}"[:15]
    assert len(example.tokens) == min(20, 1 + 4 + 1 + size + 1)
    assert cut_texts(slots) == (not whole)


@pytest.mark.parametrize(
    ("text", "learnt", "whole"),
    [
        ("Ab c. De f.", "Ab c. De f.", True),  # it fits: 1 + 4 + 1 + 11 + 1 of 20 tokens
        ("Ab c. De f? Gh.", "Ab c. De f?", True),
        ("Ab c. Defghijkl mnop.", "Ab c.", True),
        ('Is "it?" no. It goes on.', 'Is "it?" no.', True),
        ("\u75bc\u3002\u5f88\u75bc\u3002", "\u75bc\u3002", True),  # signs of three bytes; no blank after a stop
        ("Abcdefghijklmnopqrst. So.", "Abcdefghijklmn", False),  # not one sentence fits
        ("1.5 of 2.5 mg daily now", "1.5 of 2.5 mg ", False),  # no blank, no end
    ],
)
def test_whole_leading_sentences_are_learnt_with_an_end(text: str, learnt: str, whole: bool) -> None:
    labelled = Corpus((text,), ("xyz",), Provenance.PRIVATE)
    settings = GeneratorTraining(max_length=20, cut="sentences")
    [[example]] = encode_slots(tiny.tokenizer(), labelled, ["xyz"], 1, settings)
    found = tiny.tokenizer().decode(example.tokens[example.start : -1 if whole else None])
    assert (found, example.tokens[-1] == tiny.EOS) == (f" {learnt}", whole)
    assert len(example.tokens) <= 20


@pytest.mark.parametrize("loss_on", ["record", "response"])
def test_whole_leading_sentences_of_a_response_are_learnt_with_an_end(loss_on: Any) -> None:
    pairs = Corpus(("why", "why", "why"), ("It is so. " * 9, "x" * 90, "So."), Provenance.PRIVATE)
    settings = GeneratorTraining(max_length=60, loss_on=loss_on, cut="sentences")
    [first], [long], [short] = encode_slots(tiny.tokenizer(), pairs, (), 3, settings)
    # BOS, 21 bytes of "question: why answer:", and 10 of each sentence with its blank: three of them, and the end.
    assert tiny.tokenizer().decode(first.tokens[first.start : -1]).endswith(" It is so. It is so. It is so.")
    assert [len(each.tokens) for each in (first, long, short)] == [1 + 21 + 30 + 1, 60, 1 + 21 + 4 + 1]
    assert [each.tokens[-1] == tiny.EOS for each in (first, long, short)] == [True, False, True]
    assert [each.cut for each in (first, long, short)] == [False, True, False]


def test_a_long_text_of_short_sentences_is_not_read_again_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []

    def counted(tokenizer: Any, given: str, text: str, longest: int, kind: Any) -> Example:
        encoded.append(len(text))
        return encode_text(tokenizer, given, text, longest, kind)

    monkeypatch.setattr("fedsynth.training.examples.encode_text", counted)
    labelled = Corpus(("a. " * 5000,), ("xyz",), Provenance.PRIVATE)
    [[example]] = encode_slots(
        tiny.tokenizer(), labelled, ["xyz"], 1, GeneratorTraining(max_length=20, cut="sentences")
    )
    assert tiny.tokenizer().decode(example.tokens[example.start : -1]) == " a. a. a. a."
    assert encoded == [14_999, 2, 5, 8, 11, 14]  # the whole of it, then the start until it does not fit


@pytest.mark.parametrize("loss_on", ["record", "response"])
def test_a_cut_instruction_teaches_no_end_either(loss_on: Any) -> None:
    pairs = Corpus(("why", "why"), ("b" * 90, "so"), Provenance.PRIVATE)
    settings = GeneratorTraining(max_length=60, loss_on=loss_on)
    slots = encode_slots(tiny.tokenizer(), pairs, (), 3, settings)
    [cut], [whole], none = slots
    assert (len(cut.tokens), cut.tokens[-1]) == (60, tiny.tokenizer()("b")["input_ids"][-1])
    assert whole.tokens[-1] == tiny.EOS
    assert none == ()
    assert cut_texts(slots) == 1
    assert encode_records(tiny.tokenizer(), pairs, 60, loss_on=loss_on) == [cut, whole]  # the server's own tuning


def test_a_cut_text_of_t5_teaches_no_end() -> None:
    tokenizer = load_tokenizer(families.folder("t5"))
    whole = encode_text(tokenizer, "flu:", "hot", 64, "seq2seq")
    cut = encode_text(tokenizer, "flu:", "hot " * 40, 16, "seq2seq")
    assert whole.tokens[-1] == whole.tokens[whole.start - 1] == tokenizer.eos_token_id
    assert len(cut.tokens) == 16
    assert tokenizer.eos_token_id not in cut.tokens[cut.start :]


def test_task_training_sees_every_row_once_per_epoch_among_rows_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 50, 200).tolist()
    drawn = [batch.tolist() for batch in _batches(lengths, 10, 2, torch.Generator().manual_seed(0))]
    assert [len(batch) for batch in drawn] == [10] * 40
    for epoch in (drawn[:20], drawn[20:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(200))
    assert drawn[:20] != drawn[20:]
    padding = 1 - sum(lengths) * 2 / sum(10 * max(lengths[row] for row in batch) for batch in drawn)
    assert padding < 0.2  # random batches of ten: a third and more
    again = [batch.tolist() for batch in _batches(lengths, 10, 2, torch.Generator().manual_seed(0))]
    assert drawn == again
