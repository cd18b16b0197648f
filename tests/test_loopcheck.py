"""The self-check runs the real step loop: what it must let pass, and the broken trainers that it must find."""

from __future__ import annotations

import inspect
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from inprocess import instructions, play
from numpy.typing import NDArray
from scipy.stats import binom

from fedsynth.clients import score
from fedsynth.clients.score import check_noise
from fedsynth.dpsgd import bookkeeping, precision, stacked
from fedsynth.federation.messaging import TooFewReplies
from fedsynth.models.adapters import attach_lora
from fedsynth.models.loading import load_generator
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.training import dp_training as training
from fedsynth.training.dp_training import Training
from fedsynth.training.loopcheck import CHANCE, Watched, _draws, _enough, chance_of_squares, differs
from fedsynth.training.selfcheck import LISTED, SelfCheckFailed, check_list, check_stack, self_check

torch.set_num_threads(1)
CPU = torch.device("cpu")
PLAN = DPPlan(records=100, expected_batch=15, steps=40, rounds=1, clip_norm=0.3, noise_multiplier=0.928, delta=1e-5)
SMALL = DPPlan(records=12, expected_batch=4, steps=3, rounds=1, clip_norm=0.3, noise_multiplier=1.5, delta=1e-5)
SETTINGS = GeneratorTraining(
    expected_batch_size=4, steps=3, clip_norm=0.3, rank=2, alpha=4.0, rows_per_unit=2, max_physical_batch_size=8
)

Break = Callable[[pytest.MonkeyPatch, DPPlan], None]


def noise(change: Callable[[torch.Tensor, float, Any, DPPlan], tuple[float, Any]]) -> Break:
    """A trainer that adds another noise."""

    def apply(patch: pytest.MonkeyPatch, plan: DPPlan) -> None:
        real = training.add_noise

        def added(total: torch.Tensor, deviation: float, randomness: Any) -> None:
            real(total, *change(total, deviation, randomness, plan))

        patch.setattr(training, "add_noise", added)

    return apply


def rewritten(*changes: tuple[str, str]) -> Break:
    """A trainer with other lines in its loop."""

    def apply(patch: pytest.MonkeyPatch, plan: DPPlan) -> None:
        source = inspect.getsource(training._descend)
        for old, new in changes:
            assert source.count(old) == 1
            source = source.replace(old, new)
        names = dict(vars(training))
        exec("from __future__ import annotations\n" + source, names)
        patch.setattr(training, "_descend", names["_descend"])

    return apply


def draws(draw: Callable[[Training, dict[Any, Any]], list[Any]]) -> Break:
    """A trainer that draws otherwise; the draw keeps what it wants to remember."""

    def apply(patch: pytest.MonkeyPatch, plan: DPPlan) -> None:
        kept: dict[Any, Any] = {"rng": np.random.default_rng(0)}
        patch.setattr(Training, "draw", lambda self: draw(self, kept))

    return apply


def shuffled(own: Training, kept: dict[Any, Any]) -> list[Any]:
    """Epochs of batches of one size."""
    left = kept.setdefault(id(own), [])
    if len(left) < own.expected_batch_size:
        left[:] = kept["rng"].permutation(len(own.slots)).tolist()
    return [own.slots[left.pop()] for _ in range(own.expected_batch_size)]


def clips(factor: Callable[[Any], Callable[[torch.Tensor, float], torch.Tensor]]) -> Break:
    """A trainer that clips otherwise."""

    def apply(patch: pytest.MonkeyPatch, plan: DPPlan) -> None:
        other = factor(bookkeeping.clip_factors)
        for module in (bookkeeping, stacked):
            patch.setattr(module, "clip_factors", other)

    return apply


class Signs:
    """Noise of deviation 1 that is not Gaussian."""

    def __init__(self, inner: GrantRandomness) -> None:
        self.inner = inner

    def normals(self, count: int) -> NDArray[np.float64]:
        return np.sign(self.inner.normals(count))


def keyed(name: str) -> Break:
    """A trainer whose noise, or whose draws, come from no grant's key."""

    def apply(patch: pytest.MonkeyPatch, plan: DPPlan) -> None:
        real, fixed = getattr(GrantRandomness, name), {}

        def other(self: GrantRandomness, *arguments: Any) -> Any:
            return real(fixed.setdefault(id(self), (self, GrantRandomness(bytes(32))))[1], *arguments)

        patch.setattr(GrantRandomness, name, other)

    return apply


def of_a_step(change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Break:
    """A trainer whose noise is made of half as many normals."""

    def apply(patch: pytest.MonkeyPatch, plan: DPPlan) -> None:
        real = GrantRandomness.normals
        patch.setattr(GrantRandomness, "normals", lambda self, count: change(real(self, -(-count // 2)))[:count])

    return apply


def one_stream_for_all_blocks(patch: pytest.MonkeyPatch, plan: DPPlan) -> None:
    """Noise that begins anew in each block of a large model."""
    real: Any = training.add_noise

    def added(total: torch.Tensor, deviation: float, randomness: Any) -> None:
        flat, kept = total.view(-1), randomness.normals(min(total.numel(), training._BLOCK))

        class Again:
            def normals(self, count: int) -> NDArray[np.float64]:
                return kept[:count]

        for at in range(0, len(flat), training._BLOCK):
            real(flat[at : at + training._BLOCK], deviation, Again())

    patch.setattr(training, "add_noise", added)


def two_by_two(patch: pytest.MonkeyPatch, plan: DPPlan) -> None:
    """Draws of units two by two."""
    real = GrantRandomness.poisson_mask

    def mask(self: GrantRandomness, count: int, rate: float) -> NDArray[np.bool_]:
        return np.repeat(real(self, -(-count // 2), rate), 2)[:count]

    patch.setattr(GrantRandomness, "poisson_mask", mask)


POISSON = Training.draw
EACH_DRAW = (
    "totals = sums_of([training.draw() for training in trainings])",
    "drawn = [training.draw() for training in trainings]; totals = sums_of(drawn)",
)
THE_FOUR: dict[str, tuple[Break, str]] = {
    "noise divided by the batch": (noise(lambda t, d, r, plan: (d / plan.expected_batch, r)), "noise has deviation 0"),
    "no noise": (noise(lambda t, d, r, plan: (0.0, r)), "the noise has deviation"),
    "shuffled batches": (draws(shuffled), "are batches shuffled"),
    "no clip": (clips(lambda real: lambda squares, c: torch.ones_like(squares)), r"a drawn unit moves the sum by \d\d"),
}
OTHERS: dict[str, tuple[Break, str]] = {
    "one draw for all steps": (draws(lambda own, kept: kept.setdefault(id(own), POISSON(own))), "rate|vary|in pairs"),
    "two steps with each draw": (
        draws(lambda own, kept: kept.pop(id(own), None) or kept.setdefault(id(own), POISSON(own))),
        "pairs of steps of one training",
    ),
    "a clip a quarter above C": (clips(lambda real: lambda squares, c: real(squares, 1.25 * c)), r"sum by 1\.2\d* C"),
    "sigma 3 % too small": (noise(lambda t, d, r, plan: (0.97 * d, r)), r"deviation 0\.9[67]"),
    "noise of another form": (noise(lambda t, d, r, plan: (d, Signs(r))), "not Gaussian"),
    "the same noise in each step": (noise(lambda t, d, r, plan: (d, GrantRandomness(bytes(32)))), "the noise has devi"),
    "the same noise in both halves": (of_a_step(lambda half: np.tile(half, 2)), "within a step"),
    "the opposite noise beside each": (of_a_step(lambda half: np.outer(half, [1, -1]).ravel()), "1 places apart"),
    "the same noise in each block": (one_stream_for_all_blocks, "the noise of a large model is used again"),
    "units drawn two by two": (two_by_two, "side by side"),
    "a most of a batch": (
        draws(lambda own, kept: POISSON(own)[: 2 * own.expected_batch_size - 1]),
        "a most of a batch",
    ),
    "noise of a fixed key": (keyed("normals"), "the noise of trainings with keys of their own is correlated by 1"),
    "draws of a fixed key": (keyed("poisson_mask"), "pairs of trainings' steps"),
    "a step less": (rewritten(("range(steps)", "range(steps - 1)")), "39 steps were taken and 39 reported"),
    "a step that is not told": (rewritten(("ran += 1", "ran += step > 0")), "40 steps were taken and 39 reported"),
    "divided by the drawn batch": (
        rewritten(EACH_DRAW, ("div_(training.expected_batch_size)", "div_(max(1, len(drawn[client])))")),
        "the noise has deviation 1",
    ),
    "divided by twice the batch": (
        rewritten(
            ("given[client].div_(training.expected_batch_size)", "given[client].div_(2 * training.expected_batch_size)")
        ),
        r"deviation 0\.(50|49)",
    ),
}


@pytest.mark.parametrize(
    ("name", "clients"), [*((name, n) for name in THE_FOUR for n in (1, 2)), *((name, 1) for name in OTHERS)]
)
def test_a_broken_trainer_is_found(monkeypatch: pytest.MonkeyPatch, name: str, clients: int) -> None:
    broken, said = (THE_FOUR | OTHERS)[name]
    broken(monkeypatch, PLAN)
    found = differs(PLAN, SETTINGS, CPU, clients=clients)
    assert found is not None
    assert re.search(said, found), found


@pytest.mark.full
@pytest.mark.parametrize("plan", [PLAN, SMALL], ids=["40 steps", "3 steps"])
@pytest.mark.parametrize("clients", [1, 2], ids=["alone", "stacked"])
@pytest.mark.parametrize("name", THE_FOUR)
def test_a_broken_trainer_is_found_with_each_of_twenty_keys(
    monkeypatch: pytest.MonkeyPatch, name: str, clients: int, plan: DPPlan
) -> None:
    THE_FOUR[name][0](monkeypatch, plan)
    found = [differs(plan, SETTINGS, CPU, clients=clients, key=bytes([key]) * 32) for key in range(20)]
    assert None not in found


RIGHT = [
    PLAN,
    SMALL,
    DPPlan(12, 12, 1, 3, 0.3, 1.5, 1e-5),  # all units in the only step
    DPPlan(2, 1, 1, 1, 1e-6, 20.0, 1e-5),
    DPPlan(12, 11, 2, 1, 1e6, 0.05, 1e-5),
    DPPlan(100_000, 1, 40, 1, 1.0, 0.6, 1e-5),  # ten in a million
]


@pytest.mark.parametrize("clients", [1, 2], ids=["alone", "stacked"])
@pytest.mark.parametrize("plan", RIGHT)
def test_the_trainer_as_it_is_passes_with_few_steps_and_tiny_rates_too(plan: DPPlan, clients: int) -> None:
    assert differs(plan, SETTINGS, CPU, clients=clients) is None


@pytest.mark.full
@pytest.mark.parametrize("clients", [1, 2], ids=["alone", "stacked"])
@pytest.mark.parametrize("plan", [plan for plan in RIGHT if plan.records < 1000])
def test_the_trainer_as_it_is_passes_with_each_of_thirty_keys(plan: DPPlan, clients: int) -> None:
    assert {differs(plan, SETTINGS, CPU, clients=clients, key=bytes([key]) * 32) for key in range(30)} == {None}


LONG = replace(PLAN, steps=200)


@pytest.fixture
def at_most_40(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsynth.training.loopcheck.MOST", 40)


@pytest.mark.usefixtures("at_most_40")
@pytest.mark.parametrize("clients", [1, 2], ids=["alone", "stacked"])
def test_of_a_long_training_each_step_is_counted_and_the_first_are_watched(
    monkeypatch: pytest.MonkeyPatch, clients: int
) -> None:
    watched: list[int] = []
    real = Watched.step

    def step(self: Watched, *arguments: Any) -> None:
        watched.append(1)
        real(self, *arguments)

    monkeypatch.setattr(Watched, "step", step)
    assert differs(LONG, SETTINGS, CPU, clients=clients) is None
    assert len(watched) == clients * (40 + 4)  # four are of another key
    rewritten(("range(steps)", "range(min(steps, 199))"))(monkeypatch, LONG)
    said = "199 steps were taken and 199 reported, planned are 200"
    assert differs(LONG, SETTINGS, CPU, clients=clients) == said


@pytest.mark.usefixtures("at_most_40")
@pytest.mark.parametrize("name", ["no noise", "no clip", "a step that is not told"])
def test_a_broken_trainer_is_found_by_the_first_steps_of_a_long_training(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (THE_FOUR | OTHERS)[name][0](monkeypatch, LONG)
    assert differs(LONG, SETTINGS, CPU) is not None


def test_what_is_counted_of_units_takes_no_memory_for_those_that_are_never_drawn() -> None:
    plan = replace(PLAN, records=10**7)
    rng, masks = np.random.default_rng(0), [Watched(), Watched()]
    for each in masks:
        each.drawn = [np.unique(rng.integers(0, plan.records, rng.poisson(15))) for _ in range(40)]
    tracemalloc.start()
    assert list(_draws(masks, masks[:1], plan)) == []
    assert tracemalloc.get_traced_memory()[1] < 10e6  # bytes; ten million counts would take 80
    tracemalloc.stop()
    often = replace(masks[0], drawn=[np.append(drawn[drawn != 7], 7) for drawn in masks[0].drawn])
    assert any("one unit is drawn in 40 of 40" in said for said in _draws([often], masks[1:], plan))


def test_units_that_are_never_drawn_are_found() -> None:
    plan = replace(PLAN, records=20, expected_batch=10)
    rng = np.random.default_rng(0)
    some = Watched(drawn=[np.flatnonzero(np.append(rng.random(19) < 0.5, False)) for _ in range(100)])
    assert any("one unit is drawn in 0 of 100" in said for said in _draws([some], [some], plan))


def test_opacus_hooks_pass_too() -> None:
    hooks = GeneratorTraining(clipping="hooks")
    assert differs(SMALL, hooks, CPU) is None


def test_the_chance_of_draws_sizes_is_an_upper_bound_of_the_exact_one() -> None:
    # Two draws of three coins: squares of (size - 1.5)... rate 1/3: sizes 0 to 3 about 1, exact by enumeration.
    chances = [binom.pmf(size, 3, 1 / 3) for size in range(4)]
    exact: dict[int, float] = {}
    for one in range(4):
        for other in range(4):
            squares = (one - 1) ** 2 + (other - 1) ** 2
            exact[squares] = exact.get(squares, 0.0) + chances[one] * chances[other]
    for squares in exact:
        low = sum(p for s, p in exact.items() if s <= squares)
        high = sum(p for s, p in exact.items() if s >= squares)
        assert chance_of_squares(squares, 2, 3, 1 / 3) >= min(low, high)
    # Fifty draws of exactly 25 of 200: each has chance 0.085.
    same = float(binom.pmf(25, 200, 1 / 8)) ** 50
    assert same <= chance_of_squares(0, 50, 200, 1 / 8) <= 3 * same
    typical, doubled = round(50 * 25 * 7 / 8), round(2 * 50 * 25 * 7 / 8)
    assert chance_of_squares(typical, 50, 200, 1 / 8) > 0.5
    assert chance_of_squares(3 * doubled, 50, 200, 1 / 8) < CHANCE
    assert float(binom.pmf(4, 12, 1 / 3)) ** _enough(SMALL) < 1e-15


def lora() -> Any:
    model = attach_lora(load_generator(tiny.folder()), rank=2, alpha=4.0, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("name", THE_FOUR)
def test_the_self_check_fails_for_a_broken_trainer_also_after_it_passed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = lora()
    self_check(model, SMALL, SETTINGS, pad=tiny.PAD)
    check_stack(model, SMALL, SETTINGS, pad=tiny.PAD)
    THE_FOUR[name][0](monkeypatch, SMALL)
    with pytest.raises(SelfCheckFailed):
        self_check(model, SMALL, SETTINGS, pad=tiny.PAD)
    with pytest.raises(SelfCheckFailed):
        check_stack(model, SMALL, SETTINGS, pad=tiny.PAD)


def test_the_loop_is_run_once_in_a_process_for_one_plan_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = lora(), []
    monkeypatch.setattr("fedsynth.training.selfcheck._passed", {})
    monkeypatch.setattr("fedsynth.training.selfcheck.differs", lambda *a, **more: ran.append(a))
    for _ in range(2):
        self_check(model, SMALL, SETTINGS, pad=tiny.PAD)
    assert len(ran) == 1
    self_check(model, PLAN, SETTINGS, pad=tiny.PAD)
    assert len(ran) == 2
    for number, (module, name) in enumerate([(training, "add_noise"), (precision, "check_bounded")], start=3):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments, real=real: real(*arguments))
        self_check(model, PLAN, SETTINGS, pad=tiny.PAD)
        assert len(ran) == number


def test_a_broken_trainer_or_a_pass_without_room_is_refused_before_anything_is_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[str] = []
    real = Ledger.charge

    def charge(self: Ledger, *arguments: Any, **more: Any) -> Any:
        charged.append("charged")
        return real(self, *arguments, **more)

    monkeypatch.setattr(Ledger, "charge", charge)
    toml = instructions(tmp_path, "fedsynth.strategies.lora_avg:LoraAverage")
    play(toml, tmp_path / "right")
    assert charged
    charged.clear()

    def no_room(*_: Any, **__: Any) -> None:
        raise SelfCheckFailed("a pass of the longest texts needs more memory")

    for number, broken in enumerate((THE_FOUR["no noise"][0], no_room)):
        with monkeypatch.context() as patch:
            if broken is no_room:
                patch.setattr("fedsynth.training.selfcheck.whole_physical_batch", no_room)
            else:
                broken(patch, SMALL)
            patch.setattr("fedsynth.training.selfcheck._passed", {})  # as of a process of its own
            patch.setattr("fedsynth.clients.finetune._passed", {})
            with pytest.raises(TooFewReplies, match="self_check_failed"):
                play(toml, tmp_path / f"broken{number}")
            assert charged == []


# --- Lists of scores -------------------------------------------------------------------------------------------------


def test_a_list_s_noise_and_bound_are_checked_on_public_numbers() -> None:
    plan = DPPlan(1, 1, 1, 1, 2.0, 1.5, 1e-5)

    def release(values: Any, randomness: Any, sigma: float = 1.5, bound: float = 1.0) -> Any:
        found = np.asarray(values)
        found = found * min(1.0, bound / max(float(np.linalg.norm(found)), 1e-9))
        return found + sigma * 2.0 * randomness.normals(LISTED)

    check_noise(plan)  # as a client's scores are protected
    check_list(release, plan)
    with pytest.raises(SelfCheckFailed, match=r"the noise has deviation 0\.7"):
        check_list(lambda values, public: release(values, public, sigma=0.75 * 1.5), plan)
    with pytest.raises(SelfCheckFailed, match="the noise has deviation 0 "):
        check_list(lambda values, public: release(values, public, sigma=0.0), plan)
    with pytest.raises(SelfCheckFailed, match=r"lists are 2 C apart"):
        check_list(lambda values, public: release(values, public, bound=2.0), plan)


def test_scores_that_are_protected_otherwise_than_planned_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = DPPlan(1, 1, 1, 1, 2.0, 1.5, 1e-5)
    real = score.protected
    monkeypatch.setattr(score, "protected", lambda v, c, p, r: real(v, c, replace(p, noise_multiplier=1.4), r))
    with pytest.raises(SelfCheckFailed, match=r"the noise has deviation 0\.9"):
        check_noise(plan)
    monkeypatch.setattr(score, "protected", lambda v, c, p, r: real(v, c, replace(p, clip_norm=4.0), r))
    with pytest.raises(SelfCheckFailed, match="2 C apart"):
        check_noise(plan)
