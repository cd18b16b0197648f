from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedsynth.lora import Adapter, average, everything, only_b

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def adapter(a: list[list[float]], b: list[list[float]], grants: tuple[str, ...] = ("g",)) -> Adapter:
    return Adapter({A: np.array(a, np.float32), B: np.array(b, np.float32)}, 1, 2.0, "base", grants)


ONE = adapter([[1.0, 3.0]], [[2.0], [0.0]], ("g1",))
TWO = adapter([[5.0, -1.0]], [[6.0], [8.0]], ("g2",))


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


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(TWO, rank=2), "differ in rank: 1 and 2"),
        (replace(TWO, alpha=4.0), "differ in alpha: 2.0 and 4.0"),
        (replace(TWO, base="another"), "differ in base: 'base' and 'another'"),
        (replace(TWO, arrays={A: TWO.arrays[A]}), "names or shapes"),
        (replace(TWO, arrays={A: TWO.arrays[A], B: TWO.arrays[B].T}), "names or shapes"),
    ],
)
def test_adapters_that_do_not_fit_together_are_refused(other: Adapter, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        average([ONE, other], [1, 1])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0], [1.0, 1.0, 1.0]])
def test_weights_that_cannot_be_normalised_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="one non-negative weight per adapter"):
        average([ONE, TWO], weights)


def test_no_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        average([], [])


def test_one_adapter_without_a_guarantee_leaves_the_mean_without() -> None:
    assert average([ONE, replace(TWO, grants=())], [1, 1]).grants == ()
