"""A hostile minority: 2 of 10 clients that send what they like, and what the honest ones keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import instructions, play

from fedsynth.corpus import Corpus, Provenance, Votes
from fedsynth.federation.messages import Finetune
from fedsynth.federation.summing import added, capped
from fedsynth.limits import MAX_RECORDS, MAX_SCORE, MAX_WEIGHT
from fedsynth.lora import Adapter, average, median, trimmed_mean
from fedsynth.scenario.toml import from_toml
from fedsynth.strategies.lora_avg import TRIMMED
from fedsynth.strategies.options import FDKTOptions, PrivateEvolutionOptions
from fedsynth.synthesis.voting import kept
from fedsynth.typed import BadValue

CLIENTS, WIDTH = 10, 200
TRUTH = np.random.default_rng(0).standard_normal(WIDTH)


def adapter(weights: Any, grants: tuple[str, ...] = ("g",)) -> Adapter:
    factors = {"w.lora_A.weight": np.ones((1, 1), np.float32), "w.lora_B.weight": np.float32(weights)[:, None]}
    return Adapter(factors, 1, 1.0, "base", grants)


def sent(seed: int) -> tuple[list[Adapter], list[Adapter]]:
    """Adapters of eight clients that learnt the truth up to noise, and of two that send its opposite, at the bound."""
    rng = np.random.default_rng(seed)
    honest = [adapter(TRUTH + 0.4 * rng.standard_normal(WIDTH)) for _ in range(CLIENTS - 2)]
    return honest, [adapter(-np.sign(TRUTH) * MAX_WEIGHT)] * 2


def points(found: Adapter) -> float:
    """Accuracy of the linear model, in points."""
    texts = np.random.default_rng(9).standard_normal((4000, WIDTH))
    weights = found.arrays["w.lora_B.weight"][:, 0]
    return 100 * float(np.mean(np.sign(texts @ weights) == np.sign(texts @ TRUTH)))


@pytest.mark.parametrize("seed", range(3))
def test_two_of_ten_adapters_at_the_bound_cost_the_honest_three_points_at_most_and_the_mean_everything(
    seed: int,
) -> None:
    honest, hostile = sent(seed)
    alone = points(average(honest, [100.0] * 8))
    assert alone > 85
    assert points(average([*honest, *hostile], [100.0] * 10)) < 20  # the opposite of the truth
    for defended in (median([*honest, *hostile]), trimmed_mean([*honest, *hostile], TRIMMED)):
        assert alone - points(defended) < 3
    # The weight of a mean is a client's own word.
    stated = [100.0] * 8 + [float(MAX_RECORDS)] * 2
    mild = [*honest, *[adapter(-TRUTH)] * 2]
    assert points(average(mild, stated)) < 1
    assert alone - points(median(mild)) < 3


def test_fewer_than_half_move_no_number_out_of_the_range_of_the_others() -> None:
    honest, hostile = sent(1)
    values = np.stack([each.arrays["w.lora_B.weight"] for each in honest])
    for defended in (median([*honest, *hostile]), trimmed_mean([*honest, *hostile], TRIMMED)):
        found = defended.arrays["w.lora_B.weight"]
        assert (values.min(0) <= found).all()
        assert (found <= values.max(0)).all()


def test_by_hand() -> None:
    found = [adapter([n, -n], (f"g{n}",)) for n in (1.0, 2.0, 4.0, 8.0, 16.0)]
    assert median(found).arrays["w.lora_B.weight"][:, 0].tolist() == [4.0, -4.0]
    assert trimmed_mean(found, 0.2).arrays["w.lora_B.weight"][:, 0].tolist() == [
        pytest.approx(14 / 3),
        pytest.approx(-14 / 3),
    ]
    assert median(found[:2]).arrays["w.lora_B.weight"][:, 0].tolist() == [1.5, -1.5]
    assert set(median(found).grants) == {"g1.0", "g2.0", "g4.0", "g8.0", "g16.0"}  # also of those that were left out
    assert not median([*found, adapter([0.0, 0.0], ())]).grants
    with pytest.raises(ValueError, match="take a share below 1/2"):
        trimmed_mean(found[:2], 0.2)
    with pytest.raises(ValueError, match="different base models"):
        median([found[0], Adapter(found[1].arrays, 1, 1.0, "other")])


@pytest.mark.parametrize("aggregation", ["median", "trimmed"])
def test_a_run_averages_so(tmp_path: Path, aggregation: str) -> None:
    text = instructions(tmp_path, "fedsynth.strategies.lora_avg:LoraAverage", options=f'aggregation = "{aggregation}"')
    run = play(text, tmp_path)
    adapters = [reply.adapter for reply in run.replies(Finetune)]
    expected = median(adapters) if aggregation == "median" else trimmed_mean(adapters, TRIMMED)
    for name, array in run.states[-1].adapter.arrays.items():
        assert np.array_equal(array, expected.arrays[name])


# --- votes -----------------------------------------------------------------------------------------------------------

CANDIDATES = Corpus(tuple(f"text {i}" for i in range(40)), ("a", "b") * 20, Provenance.PUBLIC)
GOOD = set(range(12))  # the honest vote for these


def voted(seed: int, cells: Any) -> list[Votes]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(CLIENTS - 2):
        counts = np.zeros(40)
        np.add.at(counts, rng.choice(sorted(GOOD), 100), 1)
        found.append(Votes(tuple((counts + 2 * rng.standard_normal(40)).tolist()), ("g",)))
    hostile = np.zeros(40)
    hostile[cells] = MAX_SCORE
    return [*found, *[Votes(tuple(hostile.tolist()), ("h",))] * 2]


def chosen(numbers: Any) -> set[int]:
    total = added(numbers)
    assert isinstance(total, Votes)
    best = kept(CANDIDATES, total, 6, select="rank", threshold=0.0, seed=0)
    return {CANDIDATES.prompts.index(text) for text in best.prompts}


@pytest.mark.parametrize("seed", range(3))
def test_votes_without_measure_choose_all_and_capped_ones_nearly_nothing(seed: int) -> None:
    bad = list(range(20, 40))
    all_bad = voted(seed, bad)
    assert chosen(all_bad[:-2]) == GOOD  # six of each label
    assert not chosen(all_bad) & GOOD
    assert chosen(capped(all_bad)) == GOOD
    one = voted(seed, [38, 39])  # one cell of each label
    assert len(chosen(one) & GOOD) == 10
    assert len(chosen(capped(one)) & GOOD) >= 10


def test_no_client_weighs_more_than_the_median_one_and_none_gains() -> None:
    numbers = [Votes((3.0, 4.0), ("a",)), Votes((0.0, 1.0), ("b",)), Votes((0.0, 50.0), ("c",))]
    first, second, third = capped(numbers)
    assert (first, second) == (numbers[0], numbers[1])  # the median length is 5
    assert third.values == (0.0, 5.0)
    assert third.grants == ("c",)
    assert [each.values for each in capped([Votes((0.0,)), Votes((0.0,)), Votes((7.0,))])] == [(0.0,), (0.0,), (0.0,)]


def test_a_cap_that_nobody_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="cap_votes belongs to"):
        FDKTOptions(cap_votes=True)
    summed = scenario(tmp_path, "secure_sum = { clients = 3, dropouts = 0, colluders = 1 }\n")
    with pytest.raises(BadValue, match="sees none of them in a secure sum"):
        PrivateEvolutionOptions(cap_votes=True).check(summed)


def scenario(tmp_path: Path, more: str = "") -> Any:
    text = instructions(tmp_path, "fedsynth.strategies.lora_avg:LoraAverage")
    return from_toml(text.replace("[client]\n", f"[client]\n{more}"))
