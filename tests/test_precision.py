"""What one unit can move is bounded whatever number of others is passed with it; half precision bounds nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch
from inprocess import instructions
from torch import Tensor, nn

from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.finetune import check
from fedsynth.dpsgd import Clipping, HalfPrecision, clipper
from fedsynth.dpsgd.stacked import stacked
from fedsynth.limits import MAX_BATCH, MAX_MICROBATCH
from fedsynth.models.adapters import attach_lora, new_adapter, with_adapter
from fedsynth.models.loading import dtype_of
from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.plan import Budget, BudgetTooSmall, DPPlan
from fedsynth.scenario.client import Client, GeneratorTraining
from fedsynth.scenario.toml import from_toml
from fedsynth.simulation.simulate import check as check_scenario
from fedsynth.training.dp_training import clipped_sum, clipped_sums, next_token_losses, trainable
from fedsynth.training.examples import Example, Slot
from fedsynth.training.selfcheck import SelfCheckFailed, check_stack, self_check
from fedsynth.typed import BadValue

torch.set_num_threads(1)
C = 0.3
MICROBATCH = 64  # the default
WIDTHS = (256, 384, 512, 576, 640, 768)
PLAN = DPPlan(records=100, expected_batch=10, steps=3, rounds=1, clip_norm=C, noise_multiplier=1.5, delta=1e-5)
SETTINGS = GeneratorTraining(
    expected_batch_size=10, steps=3, clip_norm=C, rank=8, alpha=16.0, max_length=16, max_physical_batch_size=24
)


@cache
def wide(width: int, trained: bool, dtype: Any = torch.float32) -> Any:
    """A Llama of two layers with LoRA, fresh or past its start."""
    heads = width // 32
    base = tiny.model(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        initializer_range=0.05,
    ).to(dtype)
    return adapted(base, 8, trained)


def adapted(base: nn.Module, rank: int, trained: bool = True) -> Any:
    model = attach_lora(base, rank=rank, alpha=2.0 * rank, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
            if "lora_B" in name and trained:
                weight.normal_(std=0.05, generator=generator)
    return model.train()


def units(count: int, alike: bool, rows: int = 1, length: int = 6) -> list[Slot]:
    """Of one to `rows` rows each."""
    rng = np.random.default_rng(1)

    def text() -> Example:
        return Example(tuple(rng.integers(3, 250, length).tolist()), 2)

    if alike:
        return [[text()] * rows] * count
    return [[text() for _ in range(1 + number % rows)] for number in range(count)]


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten().double() for part in parts])


def largest_move(sum_of: Callable[[Sequence[Slot]], Tensor], of: Sequence[Slot]) -> float:
    """Of the sum of 0, 1, ... units, by one more, in units of C."""
    sums = (sum_of(of[:count]) for count in range(len(of) + 1))
    moves, before = [], next(sums)
    for after in sums:
        moves.append(float((after - before).norm()) / C)
        before = after
    return max(moves)


def moved(model: Any, of: Sequence[Slot], clipping: Clipping = "bookkeeping") -> float:
    with clipper(model, C, clipping) as clip:
        return largest_move(
            lambda part: flat(clipped_sum(clip, model, part, pad=0, max_physical_batch_size=MICROBATCH)), of
        )


def moved_in_a_stack(model: Any, of: Sequence[Slot]) -> float:
    """The largest move of any of three clients whose units come by turns."""
    factors = {weight: torch.stack([weight.detach()] * 3) for weight in trainable(model)}
    with stacked(model, factors, C) as clip:

        def sums(part: Sequence[Slot]) -> Tensor:
            own = [part[client::3] for client in range(3)]
            return clipped_sums(clip, model, own, pad=0, max_physical_batch_size=MICROBATCH).double()

        before, moves = sums([]), []
        for count in range(1, len(of) + 1):
            after = sums(of[:count])
            moves.append(float((after - before).norm(dim=1).max()) / C)
            before = after
    return max(moves)


@pytest.mark.parametrize(
    ("width", "alike", "trained", "count"),
    [
        pytest.param(256, True, False, 20, id="256 alike fresh"),
        pytest.param(256, False, True, 20, id="256 unlike trained"),
        pytest.param(576, True, True, 10, id="576 alike trained"),
        *(
            pytest.param(width, alike, trained, MICROBATCH + 1, marks=pytest.mark.full)
            for width in WIDTHS
            for alike in (True, False)
            for trained in (True, False)
        ),
    ],
)
def test_one_unit_more_moves_the_sum_by_c_at_most_at_every_number_of_units(
    width: int, alike: bool, trained: bool, count: int
) -> None:
    largest = moved(wide(width, trained), units(count, alike))
    assert 0.99 < largest <= 1


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("count", [12, pytest.param(MICROBATCH, marks=pytest.mark.full)])
def test_it_does_for_units_of_several_rows_and_models_that_read_and_write(family: str, alike: bool, count: int) -> None:
    none = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "t5": ("dropout_rate",)}[family]
    model = adapted(families.model(family, 0, **dict.fromkeys(none, 0.0)), 3)
    with torch.no_grad():
        for weight in trainable(model):
            weight.mul_(4)
    largest = moved(model, units(count, alike, rows=3))
    assert 0.9 < largest <= 1


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(
    ("width", "count"), [(256, 12), *(pytest.param(w, MICROBATCH + 1, marks=pytest.mark.full) for w in (256, 576))]
)
def test_it_does_for_clients_that_train_in_one_pass(width: int, count: int, alike: bool) -> None:
    largest = moved_in_a_stack(wide(width, True), units(count, alike, rows=2))
    assert 0.99 < largest <= 1


# --- A kernel that depends on the number of rows ---------------------------------------------------------------------


def switching(patch: pytest.MonkeyPatch, at: int) -> None:
    """Frozen layers compute as half precision does on some CPUs: from so many rows on, sums are rounded otherwise."""
    real = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        out = real(self, x)
        return out if self.weight.requires_grad or len(x) < at else out.bfloat16().float()

    patch.setattr(nn.Linear, "forward", forward)


def test_units_that_are_alike_move_the_sum_by_more_than_c_where_the_kernel_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switching(monkeypatch, 20)
    model, of = wide(256, False), units(20, alike=True)
    assert moved(model, of[:19]) <= 1
    assert moved(model, of) > 1.002


@pytest.mark.parametrize("at", [7, 24])
def test_the_self_check_finds_a_kernel_that_depends_on_the_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    model = wide(64, True)
    self_check(model, PLAN, SETTINGS, pad=0)
    check_stack(model, PLAN, SETTINGS, pad=0)
    switching(monkeypatch, at)
    said = "depends on its batch|computes otherwise with another number of rows"
    with pytest.raises(SelfCheckFailed, match=said):
        self_check(model, PLAN, SETTINGS, pad=0)
    with pytest.raises(SelfCheckFailed, match=f"stacked client|{said}"):
        check_stack(model, PLAN, SETTINGS, pad=0)


def test_numbers_of_rows_that_no_pass_can_have_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(64, True)
    switching(monkeypatch, 25)  # a pass has 24 at most
    self_check(model, PLAN, SETTINGS, pad=0)
    switching(monkeypatch, 13)
    self_check(model, replace(PLAN, records=12), SETTINGS, pad=0)


# --- Sums of many passes ---------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Losses of which every unit's gradient is the same, far above C, and as long in each of so many numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, count: int) -> Tensor:
        losses: Tensor = 100 * self.layer(torch.ones(count, 1, self.layer.in_features)).sum((1, 2))
        return losses


def sum_of_equal_units(model: Wide, count: int, max_physical_batch_size: int) -> Tensor:
    with clipper(model.train(), 1.0) as clip:
        for at in range(0, count, max_physical_batch_size):
            rows = min(max_physical_batch_size, count - at)
            clip.add(partial(model, rows), range(rows))
        return clip.take()[0].double()


@pytest.mark.parametrize(
    ("width", "count", "max_physical_batch_size"),
    [
        (60, 63_534, 64),  # with running sums in float32 it was 1.0061 C
        *((width, MAX_MICROBATCH, MAX_MICROBATCH) for width in (40, 56, 77)),  # the largest pass
        (60, MAX_BATCH, MAX_MICROBATCH),
    ],
)
def test_one_unit_more_among_tens_of_thousands_moves_the_sum_by_c_at_most(
    width: int, count: int, max_physical_batch_size: int
) -> None:
    model = Wide(width)
    move = sum_of_equal_units(model, count, max_physical_batch_size) - sum_of_equal_units(
        model, count - 1, max_physical_batch_size
    )
    assert 0.998 < float(move.norm()) <= 1  # C


@pytest.mark.parametrize("clipping", ["bookkeeping", "hooks", "ghost", "stacked"])
def test_every_engine_adds_up_passes_in_double_precision(clipping: Any) -> None:
    model, passes = adapted(tiny.model(), 8), [units(1 + n % 3, alike=False, length=4 + n % 5) for n in range(12)]
    factors = {weight: torch.stack([weight.detach()]) for weight in trainable(model)}
    with stacked(model, factors, C) if clipping == "stacked" else clipper(model, C, clipping) as clip:

        def add(part: Sequence[Slot]) -> None:
            texts = [example for [example] in part]
            whose = ([0] * len(texts),) if clipping == "stacked" else ()
            clip.add(partial(next_token_losses, model, texts, 0), range(len(texts)), *whose)

        def taken() -> Tensor:
            return flat(clip.take())

        alone = []
        for part in passes:
            add(part)
            alone.append(taken())
        for part in passes:
            add(part)
        assert torch.equal(taken(), sum(alone))


@pytest.mark.full
def test_the_self_check_passes_at_the_largest_micro_batch() -> None:
    model = adapted(tiny.model(), 2)
    largest = replace(SETTINGS, max_physical_batch_size=MAX_MICROBATCH, max_length=4)
    self_check(model, replace(PLAN, records=10**5), largest, pad=0)


# --- Half precision --------------------------------------------------------------------------------------------------


def halves() -> Iterator[tuple[str, Any]]:
    for dtype in (torch.bfloat16, torch.float16):
        yield f"{dtype} base", adapted(tiny.model().to(dtype), 2)
    norm = adapted(tiny.model(), 2)
    norm.get_base_model().model.norm.bfloat16()
    yield "a norm", norm
    table = adapted(tiny.model(), 2)
    table.register_buffer("table", torch.zeros(2, dtype=torch.bfloat16))
    yield "a buffer", table


@pytest.mark.parametrize(("model"), [pytest.param(model, id=name) for name, model in halves()])
def test_half_precision_under_a_clip_norm_is_refused_by_every_engine(model: Any) -> None:
    for clipping in ("bookkeeping", "hooks", "ghost"):
        with (
            pytest.raises(HalfPrecision, match=r"is torch\.b?float16.* no clip norm bounds"),
            clipper(model, C, clipping),
        ):
            pass
    factors = {weight: torch.stack([weight.detach()]) for weight in trainable(model)}
    with pytest.raises(HalfPrecision), stacked(model, factors, C):
        pass
    with pytest.raises(SelfCheckFailed, match=r'client\.generator_training\.precision is "float32"'):
        self_check(model, PLAN, SETTINGS, pad=0)
    with clipper(model, math.inf), stacked(model, factors, math.inf):
        pass  # where nothing is promised


def client_config(precision: Any, guarantee: Any) -> Client:
    training = GeneratorTraining(expected_batch_size=4, steps=2, rank=2, alpha=4.0, precision=precision)
    return Client(tiny.folder(), tiny.folder(), (), guarantee, Budget(8.0), generator_training=training)


def test_auto_is_float32_under_a_guarantee_and_what_pays_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsynth.models.loading.computes_in_bfloat16", lambda: True)
    monkeypatch.setattr("fedsynth.models.loading.NARROWEST", 32)

    def held(precision: Any, guarantee: Any) -> Any:
        own = client_config(precision, guarantee).of(3)
        return dtype_of(own.generator, own.generator_training.precision)

    assert held("auto", "dp") == held("float32", "dp") == held("float32", "none") == torch.float32
    assert held("auto", "none") == held("bfloat16", "none") == torch.bfloat16


def test_a_client_refuses_half_precision_before_the_charge_and_names_the_key(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("opened")

    config = client_config("bfloat16", "dp").of(0)
    ledger = Ledger(tmp_path / "ledger.sqlite", Account("d", None))
    client = ClientSide(0, config, ("flu", "cold"), 12, 1, "row", tmp_path, "run", ledger, never, simulated=False)
    start = new_adapter(tiny.folder(), rank=2, alpha=4.0, seed=0, precision="bfloat16")
    with pytest.raises(SelfCheckFailed, match=r"client\.generator_training\.precision"):
        check(client, start, replace(PLAN, records=12))
    assert ledger.entries() == []
    check(client, start)  # without a guarantee


NOTES = """
name = "notes"
[data]
source = "{file}"
labels = ["flu", "cold"]
clients = 2
[client]
generator = "{model}"
task_model = "{model}"
budget = {{ epsilon = 8.0 }}
[client.generator_training]
expected_batch_size = 4
steps = 2
rank = 2
alpha = 4.0
max_length = 24
max_physical_batch_size = 8
precision = "{precision}"
[server]
llm = "{model}"
[strategy]
use = "{strategy}"
[arms.main]
{arm}
"""


def scenario(tmp_path: Path, strategy: str, precision: str, arm: str = "") -> Any:
    rows = [f"note {number} of {number % 7},{('flu', 'cold')[number % 2]}" for number in range(48)]
    file = tmp_path / "notes.csv"
    file.write_text("\n".join(["text,label", *rows]))
    said = NOTES.format(file=file, model=tiny.folder(), strategy=strategy, precision=precision, arm=arm)
    return from_toml(said)


FDKT, CROSS_LM, LOCAL = (f"fedsynth.strategies.{s}" for s in ("fdkt:FDKT", "cross_lm:CrossLM", "local:LocalOnly"))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise is looked for."""
    for name in ("plan", "score_plan"):
        monkeypatch.setattr(Client, name, lambda self, records, rounds: replace(PLAN, records=records))


@pytest.mark.usefixtures("planned")
def test_bfloat16_under_a_guarantee_is_refused_by_key_value_and_way_out(tmp_path: Path) -> None:
    said = r'arm \'main\': client\.generator_training\.precision = "bfloat16" gives no guarantee.*"float32", or "auto"'
    with pytest.raises(BadValue, match=said):
        check_scenario(scenario(tmp_path, FDKT, "bfloat16"))
    check_scenario(scenario(tmp_path, FDKT, "auto"))
    check_scenario(scenario(tmp_path, FDKT, "bfloat16", 'client.guarantee = "none"'))
    with pytest.raises(BadValue, match=said):
        check_scenario(
            from_toml(
                instructions(tmp_path, "fedsynth.strategies.lora_avg:LoraAverage").replace(
                    "steps = 3\n", 'steps = 3\nprecision = "bfloat16"\n'
                )
            )
        )


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("strategy", [CROSS_LM, LOCAL])
def test_an_arm_that_trains_no_generator_is_not_refused_for_it(
    tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise SelfCheckFailed("the generator is checked")

    monkeypatch.setattr("fedsynth.simulation.simulate.self_check", refuses)
    check_scenario(scenario(tmp_path, strategy, "bfloat16"))
    with pytest.raises(BadValue, match="the generator is checked"):
        check_scenario(scenario(tmp_path, FDKT, "auto"))
    # Whichever comes first: an arm that trains none lets none pass that does.
    both = scenario(tmp_path, strategy, "auto", f'[arms.second]\nstrategy.use = "{FDKT}"')
    with pytest.raises(BadValue, match=r"arm 'second'.*the generator is checked"):
        check_scenario(both)


def test_an_arm_of_scores_is_held_against_the_budget_of_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poor(self: Client, records: int, rounds: int) -> DPPlan:
        raise BudgetTooSmall(f"too little for scores of {records} records in {rounds} rounds")

    monkeypatch.setattr(Client, "score_plan", poor)
    with pytest.raises(BadValue, match=r"a client with \d+ records: too little for scores of \d+ records in 1 rounds"):
        check_scenario(scenario(tmp_path, CROSS_LM, "auto"))
    check_scenario(scenario(tmp_path, LOCAL, "auto"))  # spends nothing


def test_the_base_that_is_trained_under_a_guarantee_is_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inprocess import play

    from fedsynth.clients import batched_training as together

    monkeypatch.setattr("fedsynth.models.loading.computes_in_bfloat16", lambda: True)
    monkeypatch.setattr("fedsynth.models.loading.NARROWEST", 32)
    kinds: list[set[Any]] = []
    real = together.train_generator

    def watched(model: Any, *arguments: Any, **more: Any) -> int:
        kinds.append({w.dtype for w in model.parameters()})
        return real(model, *arguments, **more)

    monkeypatch.setattr(together, "train_generator", watched)
    for guarantee in ("dp", "none"):
        folder = tmp_path / guarantee
        folder.mkdir()
        play(instructions(folder, "fedsynth.strategies.lora_avg:LoraAverage", guarantee=guarantee), folder)
    assert kinds == [{torch.float32}] * 3 + [{torch.float32, torch.bfloat16}] * 3


def test_a_model_that_was_made_in_half_precision_is_refused_by_the_self_check() -> None:
    name = tiny.folder()
    model = with_adapter(name, new_adapter(name, rank=2, alpha=4.0, seed=0), precision="bfloat16")
    with pytest.raises(SelfCheckFailed, match=r"torch\.bfloat16.*client\.generator_training\.precision"):
        self_check(model, PLAN, SETTINGS, pad=0)
