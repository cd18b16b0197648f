from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedsynth.lora import (
    Adapter,
    average,
    completed,
    everything,
    mix,
    only_b,
    residual,
    stacked,
    truncated,
    update,
)

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
SIZES = {"model.q": (7, 5), "model.up": (4, 9)}  # (out, in)
SEEDS = range(10)


def adapter(a: list[list[float]], b: list[list[float]], grants: tuple[str, ...] = ("g",)) -> Adapter:
    return Adapter({A: np.array(a, np.float32), B: np.array(b, np.float32)}, 1, 2.0, "base", grants)


ONE = adapter([[1.0, 3.0]], [[2.0], [0.0]], ("g1",))
TWO = adapter([[5.0, -1.0]], [[6.0], [8.0]], ("g2",))


def drawn(rng: np.random.Generator, rank: int, alpha: float, sizes: Mapping[str, tuple[int, int]] = SIZES) -> Adapter:
    """Factors of standard normal entries."""
    arrays = {}
    for module, (out, into) in sizes.items():
        arrays[f"{module}.lora_A.weight"] = rng.normal(size=(rank, into)).astype(np.float32)
        arrays[f"{module}.lora_B.weight"] = rng.normal(size=(out, rank)).astype(np.float32)
    return Adapter(arrays, rank, alpha, "base", ("g",))


def clients(seed: int, ranks: Sequence[int], alphas: Sequence[float]) -> tuple[list[Adapter], list[float]]:
    """Adapters and unequal weights that do not sum to one."""
    rng = np.random.default_rng(seed)
    return [drawn(rng, r, a) for r, a in zip(ranks, alphas, strict=True)], list(rng.uniform(0.1, 5.0, len(ranks)))


def dense(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Any]:
    """sum_k p_k (alpha_k / r_k) B_k A_k as it stands in the papers."""
    modules = [name.removesuffix(".lora_A.weight") for name in adapters[0].arrays if "lora_A" in name]
    products = [
        {
            m: a.arrays[f"{m}.lora_B.weight"].astype(float) @ a.arrays[f"{m}.lora_A.weight"].astype(float)
            for m in modules
        }
        for a in adapters
    ]
    return {
        m: sum(w / sum(weights) * a.alpha / a.rank * p[m] for w, a, p in zip(weights, adapters, products, strict=True))
        for m in modules
    }


def distance(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """||found - wanted|| / ||wanted|| over all modules."""
    assert found.keys() == wanted.keys()
    lost = sum(np.sum((found[m] - wanted[m]) ** 2) for m in wanted)
    return float(np.sqrt(lost / sum(np.sum(wanted[m] ** 2) for m in wanted)))


def plus(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {m: first[m] + second[m] for m in first}


def bits(adapter: Adapter) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in adapter.arrays.items()}


def test_average_by_hand() -> None:
    mean = average([ONE, TWO], [3, 1])  # weights 3/4 and 1/4
    assert np.array_equal(mean.arrays[A], [[2.0, 2.0]])
    assert np.array_equal(mean.arrays[B], [[3.0], [2.0]])
    assert all(array.dtype == np.float32 for array in mean.arrays.values())
    assert (mean.rank, mean.alpha, mean.base, mean.grants) == (1, 2.0, "base", ("g1", "g2"))


def test_averaging_b_alone_leaves_a_out() -> None:
    mean = average([ONE, TWO], [1, 1], only_b)
    assert set(mean.arrays) == {B}
    assert np.array_equal(mean.arrays[B], [[4.0], [4.0]])


def test_averaging_b_at_one_a_averages_the_product_and_averaging_both_does_not() -> None:
    same_a = replace(TWO, arrays={**TWO.arrays, A: ONE.arrays[A]})
    product = (ONE.arrays[B] @ ONE.arrays[A] + same_a.arrays[B] @ same_a.arrays[A]) / 2
    assert np.array_equal(average([ONE, same_a], [1, 1], only_b).arrays[B] @ ONE.arrays[A], product)
    both = average([ONE, TWO], [1, 1], everything).arrays
    assert not np.allclose(both[B] @ both[A], (ONE.arrays[B] @ ONE.arrays[A] + TWO.arrays[B] @ TWO.arrays[A]) / 2)


def test_a_client_of_weight_zero_does_not_count() -> None:
    assert np.array_equal(average([ONE, TWO], [0.0, 2.0]).arrays[B], TWO.arrays[B])


def test_the_mean_of_many_is_taken_in_double_precision() -> None:
    # In float32, 2**24 + 1 is 2**24: a running sum would lose every one of the ones.
    values = [2.0**24, *[1.0] * 64]
    parts = [adapter([[v, 0.0]], [[0.0], [0.0]]) for v in values]
    assert average(parts, [1.0] * 65).arrays[A][0, 0] == np.float32((2**24 + 64) / 65)


# The update


def test_the_update_is_scaled_by_alpha_over_rank() -> None:
    found = update(ONE)  # 2 / 1 * [2, 0]^T [1, 3]
    assert set(found) == {"layer"}
    assert np.array_equal(found["layer"], [[4.0, 12.0], [0.0, 0.0]])
    assert found["layer"].dtype == np.float64
    assert np.array_equal(update(drawn(np.random.default_rng(0), 4, 0.0))["model.up"], np.zeros((4, 9)))


# Exact products


def test_stacking_by_hand() -> None:
    found = stacked([ONE, TWO], [3, 1])  # weights 3/4 and 1/4, both of scale 2
    assert np.array_equal(found.arrays[A], [[1.0, 3.0], [5.0, -1.0]])
    assert np.array_equal(found.arrays[B], [[3.0, 3.0], [0.0, 4.0]])
    assert (found.rank, found.alpha, found.base, found.grants) == (2, 2.0, "base", ("g1", "g2"))


@pytest.mark.parametrize("seed", SEEDS)
def test_stacking_is_exact_for_any_ranks_and_alphas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 6))
    ranks, alphas = rng.integers(1, 6, k).tolist(), rng.uniform(0.5, 64.0, k).tolist()
    adapters, weights = clients(seed, ranks, alphas)
    found = stacked(adapters, weights)
    assert found.rank == sum(ranks)
    assert found.alpha == found.rank
    assert distance(update(found), dense(adapters, weights)) < 1e-6


def test_one_adapter_stacked_is_that_adapter_at_scale_one() -> None:
    assert np.array_equal(update(stacked([ONE], [5.0]))["layer"], update(ONE)["layer"])


@pytest.mark.parametrize("seed", SEEDS)
def test_averaging_factors_is_not_exact(seed: int) -> None:
    adapters, weights = clients(seed, [3, 3, 3], [6.0, 6.0, 6.0])
    assert distance(update(average(adapters, weights)), dense(adapters, weights)) > 0.1


@pytest.mark.parametrize("clients_", [2, 5, 10])
def test_averaging_factors_errs_by_a_quarter_where_a_drifted_by_three_tenths(clients_: int) -> None:
    rng = np.random.default_rng(0)
    start = drawn(rng, 8, 16.0, {"m": (256, 256)})
    adapters = []
    for _ in range(clients_):
        own = drawn(rng, 8, 16.0, {"m": (256, 256)}).arrays
        drifted = start.arrays["m.lora_A.weight"] + np.float32(0.3) * own["m.lora_A.weight"]
        adapters.append(replace(start, arrays={**own, "m.lora_A.weight": drifted}))
    equal = [1.0] * clients_
    error = distance(update(average(adapters, equal)), dense(adapters, equal))
    assert 0.15 < error < 0.35
    # ||cov(B, A)||^2 = .3^2 (1 - 1/K) / K and ||mean(BA)||^2 = (1 + .3^2) / K, per entry, rank and unit of variance.
    assert error == pytest.approx(0.3 * np.sqrt((1 - 1 / clients_) / (1 + 0.3**2)), rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_averaging_is_exact_where_all_a_are_equal_and_nothing_remains(seed: int) -> None:
    adapters, weights = clients(seed, [3] * 4, [6.0] * 4)
    start = adapters[0]
    frozen = {name: array for name, array in start.arrays.items() if "lora_A" in name}
    adapters = [replace(a, arrays={**a.arrays, **frozen}) for a in adapters]
    wanted = dense(adapters, weights)
    assert distance(update(average(adapters, weights)), wanted) < 1e-6
    assert distance(update(completed(average(adapters, weights, only_b), start)), wanted) < 1e-6
    assert all(not array.any() for array in update(residual(adapters, weights)).values())


def test_the_residual_by_hand() -> None:
    # mean(BA) = [[16, 0], [20, -4]], mean(B) mean(A) = [[12, 4], [12, 4]], scale 2
    found = residual([ONE, TWO], [1, 1])
    assert np.array_equal(update(found)["layer"], [[8.0, -8.0], [16.0, -16.0]])
    assert (found.rank, found.base, found.grants) == (2, "base", ("g1", "g2"))


@pytest.mark.parametrize("seed", SEEDS)
def test_average_and_residual_are_exact_together(seed: int) -> None:
    adapters, weights = clients(seed, [2] * 3, [5.0] * 3)
    both = plus(update(average(adapters, weights)), update(residual(adapters, weights)))
    assert distance(both, dense(adapters, weights)) < 1e-6


def test_the_residual_needs_one_rank_less_than_it_has() -> None:
    adapters, weights = clients(0, [1] * 3, [5.0] * 3)
    left = residual(adapters, weights)
    assert left.rank == 3
    assert truncated(left, 2).error < 1e-6
    assert truncated(left, 1).error > 0.01


def test_one_adapter_leaves_no_residual() -> None:
    assert np.array_equal(update(residual([ONE], [1.0]))["layer"], np.zeros((2, 2)))


# Other ranks


def test_truncation_by_hand() -> None:
    # The update is diag(4, 3): of rank 1 the nearest is diag(4, 0), and 3 of 5 are lost.
    both = Adapter({A: np.eye(2, dtype=np.float32), B: np.diag([4, 3]).astype(np.float32)}, 2, 2.0, "base", ("g",))
    found = truncated(both, 1)
    assert found.error == pytest.approx(3 / 5)
    assert np.allclose(update(found.adapter)["layer"], [[4.0, 0.0], [0.0, 0.0]])
    assert (found.adapter.rank, found.adapter.alpha) == (1, 1.0)
    assert (found.adapter.base, found.adapter.grants) == ("base", ("g",))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_truncation_is_the_dense_svd_cut_off(seed: int, rank: int, alpha: float | None) -> None:
    whole = drawn(np.random.default_rng(seed), 6, 12.0)  # of rank 5 and 4 in truth: the layers are no larger
    lost = total = 0.0
    wanted = {}
    for module, product in dense([whole], [1.0]).items():
        u, s, vt = np.linalg.svd(product, full_matrices=False)
        wanted[module] = (u[:, :rank] * s[:rank]) @ vt[:rank]
        lost, total = lost + np.sum(s[rank:] ** 2), total + np.sum(s**2)
    found = truncated(whole, rank, alpha)
    assert found.error == pytest.approx(np.sqrt(lost / total), rel=1e-6)
    assert distance(update(found.adapter), wanted) < 1e-6
    assert distance(update(found.adapter), update(whole)) == pytest.approx(found.error, rel=1e-4)
    assert (found.adapter.rank, found.adapter.alpha) == (rank, 2.0 * rank if alpha is None else alpha)
    for module, (out, into) in SIZES.items():
        a, b = (found.adapter.arrays[f"{module}.lora_{factor}.weight"] for factor in "AB")
        assert (a.shape, b.shape) == ((rank, into), (out, rank))
        assert np.allclose(a @ a.T, np.eye(rank), atol=1e-6)


def test_a_rank_that_is_not_smaller_keeps_every_bit_and_pads_with_zeros() -> None:
    whole = drawn(np.random.default_rng(0), 3, 6.0)
    found = truncated(whole, 5)
    assert (found.error, found.adapter.rank, found.adapter.alpha) == (0.0, 5, 10.0)
    for name, array in whole.arrays.items():
        wide = found.adapter.arrays[name] if "lora_A" in name else found.adapter.arrays[name].T
        assert np.array_equal(wide[:3], array if "lora_A" in name else array.T)
        assert not wide[3:].any()
    assert bits(truncated(whole, 3).adapter) == bits(whole)


@pytest.mark.parametrize("rank", [3, 8])
def test_another_alpha_leaves_the_update_as_it_was(rank: int) -> None:
    whole = drawn(np.random.default_rng(0), 3, 6.0)
    found = truncated(whole, rank, alpha=7.0)
    assert found.error == 0.0
    assert distance(update(found.adapter), update(whole)) < 1e-6


def test_a_rank_above_that_of_the_layers_loses_nothing() -> None:
    adapters, weights = clients(0, [4, 8], [8.0, 4.0])
    found = truncated(stacked(adapters, weights), 10)  # below 4 + 8, above the 5 and 4 of the layers
    assert found.error == 0.0
    assert distance(update(found.adapter), dense(adapters, weights)) < 1e-6
    assert found.adapter.arrays["model.up.lora_A.weight"].shape == (10, 9)


def test_adapters_of_different_ranks_meet_at_one() -> None:
    adapters, weights = clients(0, [2, 4], [4.0, 8.0])
    mean = average([truncated(a, 4).adapter for a in adapters], weights)
    assert (mean.rank, mean.alpha) == (4, 8.0)


def test_an_adapter_that_changes_nothing_loses_nothing() -> None:
    idle = Adapter({A: np.ones((2, 3), np.float32), B: np.zeros((3, 2), np.float32)}, 2, 4.0, "base", ("g",))
    found = truncated(idle, 1)
    assert found.error == 0.0
    assert not update(found.adapter)["layer"].any()
    assert found.adapter.arrays[A].any()  # else B could not learn: its gradient is zero where A is


def test_truncation_never_forms_the_update() -> None:
    side = 10**6  # squared, 8 TB
    row, column = np.zeros((2, side), np.float32), np.zeros((side, 2), np.float32)
    row[0, 0] = row[1, 1] = column[0, 0] = column[1, 1] = 1.0
    assert truncated(Adapter({A: row, B: column}, 2, 2.0, "base"), 1).error == pytest.approx(np.sqrt(1 / 2))


# Mixing


def test_mixing_by_hand() -> None:
    found = mix(ONE, TWO, 0.75)
    assert np.array_equal(found.arrays[A], [[2.0, 2.0]])
    assert np.array_equal(found.arrays[B], [[3.0], [2.0]])
    assert found.grants == ("g1", "g2")


def test_all_of_one_adapter_is_that_adapter_bit_for_bit() -> None:
    odd = adapter([[-0.0, 1e-45]], [[float("inf")], [3.4e38]], ("g3",))
    assert bits(mix(odd, TWO, 1.0)) == bits(odd)
    assert bits(mix(TWO, odd, 0.0)) == bits(odd)
    assert bits(mix(TWO, odd, 1)) == bits(TWO)
    assert mix(odd, replace(TWO, grants=()), 1.0).grants == ("g3",)  # nothing of the second is in it


def test_an_adapter_mixed_with_itself_is_itself() -> None:
    for share in np.random.default_rng(0).uniform(size=20):
        assert bits(mix(TWO, TWO, float(share))) == bits(TWO)


@pytest.mark.parametrize("seed", SEEDS)
def test_mixing_swapped_is_mixing(seed: int) -> None:
    (first, second), _ = clients(seed, [2, 2], [4.0, 4.0])
    share = seed / 9
    found, swapped = mix(first, second, share), mix(second, first, 1 - share)
    assert all(np.allclose(found.arrays[n], swapped.arrays[n], rtol=1e-6, atol=1e-7) for n in found.arrays)


def test_the_mixed_product_needs_stacking() -> None:
    (first, second), _ = clients(0, [2, 2], [4.0, 4.0])
    wanted = {m: 0.3 * update(first)[m] + 0.7 * update(second)[m] for m in SIZES}
    assert distance(update(mix(first, second, 0.3)), wanted) > 0.1
    assert distance(update(stacked([first, second], [0.3, 0.7])), wanted) < 1e-6


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_outside_zero_to_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must lie in 0\.\.1 .*got"):
        mix(ONE, TWO, share)


# Completing


def test_completing_puts_the_part_in_place() -> None:
    found = completed(average([ONE, TWO], [1, 1], only_b), TWO)
    assert list(found.arrays) == [A, B]
    assert np.array_equal(found.arrays[A], TWO.arrays[A])
    assert np.array_equal(found.arrays[B], [[4.0], [4.0]])
    assert found.grants == ("g1", "g2")


def test_a_public_start_needs_no_grant_and_one_without_guarantee_leaves_the_result_without() -> None:
    part, start = average([ONE, TWO], [1, 1], only_b), replace(TWO, grants=())
    assert completed(part, start).grants == ()
    assert completed(part, replace(start, public=True)).grants == ("g1", "g2")
    assert not completed(part, replace(start, public=True)).public
    assert completed(replace(part, grants=()), TWO).grants == ()
    assert completed(part, replace(start, grants=("g0",))).grants == ("g1", "g2", "g0")  # earlier rounds are in it


def test_what_is_made_of_public_adapters_is_public() -> None:
    public = [replace(each, public=True, grants=()) for each in (ONE, TWO)]
    for mean in (average(public, [1, 1]), stacked(public, [1, 1]), mix(*public, 0.5)):
        assert (mean.public, mean.grants) == (True, ())
    assert (average([public[0], TWO], [1, 1]).public, average([public[0], TWO], [1, 1]).grants) == (False, TWO.grants)


def test_a_part_that_the_whole_has_no_place_for_is_refused() -> None:
    alien = replace(ONE, arrays={"head.lora_B.weight": ONE.arrays[B]})
    with pytest.raises(ValueError, match=r"'head.lora_B.weight' is \(2, 1\) and absent"):
        completed(alien, TWO)


# Refusals

PART = replace(TWO, arrays={A: TWO.arrays[A]})
TURNED = replace(TWO, arrays={A: TWO.arrays[A], B: TWO.arrays[B].T})
LARGER = adapter([[5.0, -1.0, 0.0]], [[6.0], [8.0]])
RENAMED = replace(TWO, arrays={name.replace("layer", "head"): array for name, array in TWO.arrays.items()})
BY_FACTOR: dict[str, Callable[[Adapter, Adapter], object]] = {
    "average": lambda first, second: average([first, second], [1, 1]),
    "mix": lambda first, second: mix(first, second, 1.0),
    "completed": lambda first, second: completed(first, second),
    "residual": lambda first, second: residual([first, second], [1, 1]),
}


@pytest.mark.parametrize("combine", BY_FACTOR.values(), ids=BY_FACTOR)
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(TWO, rank=2), "differ in rank: 1 and 2; `stacked` combines"),
        (replace(TWO, alpha=4.0), "differ in alpha: 2.0 and 4.0; `stacked` combines"),
        (replace(TWO, base="another"), "differ in base: 'base' and 'another'; .*start them all"),
        (PART, r"names or shapes: 'layer.lora_B.weight' is \(2, 1\) and absent; make"),
        (TURNED, r"names or shapes: 'layer.lora_B.weight' is \(2, 1\) and \(1, 2\); make"),
        (LARGER, r"names or shapes: 'layer.lora_A.weight' is \(1, 2\) and \(1, 3\); make"),
        (RENAMED, r"names or shapes: 'layer.lora_A.weight' is \(1, 2\) and absent; make"),
    ],
)
def test_factors_that_do_not_fit_together_are_refused(
    combine: Callable[[Adapter, Adapter], object], other: Adapter, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        combine(ONE, other)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(TWO, base="another"), "differ in base: 'base' and 'another'; .*start them all"),
        (LARGER, r"names or shapes: 'layer' is \(2, 2\) and \(2, 3\); make"),
        (RENAMED, r"names or shapes: 'layer' is \(2, 2\) and absent; make"),
        (replace(TWO, arrays={**TWO.arrays, **RENAMED.arrays}), r"'head' is absent and \(2, 2\); make"),
    ],
)
def test_products_that_do_not_fit_together_are_refused(other: Adapter, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        stacked([ONE, other], [1, 1])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (PART, "'layer' needs both factors, lora_A.weight and lora_B.weight; `completed`"),
        (replace(TWO, arrays={**TWO.arrays, "norm.bias": TWO.arrays[B]}), "'norm.bias' needs both factors"),
        (TURNED, r"for rank 1, got \(1, 2\) and \(1, 2\)"),
        (replace(TWO, rank=2), r"for rank 2, got \(1, 2\) and \(2, 1\)"),
        (replace(TWO, arrays={A: TWO.arrays[A][0], B: TWO.arrays[B]}), r"got \(2,\) and \(2, 1\)"),
    ],
)
@pytest.mark.parametrize("use", [update, lambda a: truncated(a, 1), lambda a: stacked([a], [1])])
def test_an_adapter_without_a_product_has_no_update(
    broken: Adapter, said: str, use: Callable[[Adapter], object]
) -> None:
    with pytest.raises(ValueError, match=said):
        use(broken)


@pytest.mark.parametrize(("rank", "alpha"), [(0, None), (-1, 2.0), (1, 0.0), (1, -1.0), (1, np.inf), (1, np.nan)])
def test_a_rank_or_alpha_that_means_nothing_is_refused(rank: int, alpha: float | None) -> None:
    with pytest.raises(ValueError, match=f"rank of at least 1 and a finite alpha above 0, got {rank} and {alpha}"):
        truncated(ONE, rank, alpha)


MEANS = [average, stacked, residual]


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize(
    "weights",
    [[], [1.0], [1.0, -1.0], [3.0, -1.0], [0.0, 0.0], [np.nan, 1.0], [1.0, np.nan], [1.0, np.inf], [1.0, 1.0, 1.0]],
)
def test_weights_that_cannot_be_normalised_are_refused(mean: Any, weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"one non-negative weight per adapter, finite and not all zero, got \[.* 2$"):
        mean([ONE, TWO], weights)


@pytest.mark.parametrize("mean", MEANS)
def test_no_adapter_is_refused(mean: Any) -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean([], [])


# What holds for all


@pytest.mark.parametrize("mean", [*MEANS, lambda both, _: mix(both[0], both[1], 0.5), lambda both, _: completed(*both)])
def test_one_adapter_without_a_guarantee_leaves_the_result_without(mean: Any) -> None:
    assert mean([ONE, TWO], [1, 1]).grants == ("g1", "g2")
    assert mean([ONE, replace(TWO, grants=("g2", "g1"))], [1, 1]).grants == ("g1", "g2")
    assert mean([ONE, replace(TWO, grants=())], [1, 1]).grants == ()
    assert mean([replace(ONE, grants=()), TWO], [1, 1]).grants == ()


def test_every_result_can_be_written_as_it_lies() -> None:
    adapters, weights = clients(0, [3, 3], [6.0, 6.0])
    turned = [replace(a, arrays={n: np.asfortranarray(x) for n, x in a.arrays.items()}) for a in adapters]
    results = [mean(turned, weights) for mean in MEANS] + [truncated(turned[0], rank).adapter for rank in (2, 3, 4)]
    for result in results:
        assert list(result.arrays) == list(adapters[0].arrays)
        assert all(x.dtype == np.float32 and x.flags.c_contiguous for x in result.arrays.values())
