"""Skellam noise on sums of whole numbers, in shares that add up: the noise of a secure sum.

The difference of two Poisson draws. Shares of several clients add up to one such draw exactly, which shares of a
discrete Gaussian do not (Agarwal, Kairouz and Liu, The Skellam Mechanism, arXiv 2110.04995).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np  # every scenario reads this module for its two formulas
    from numpy.typing import NDArray

UNIT = 2**10  # a vote of weight 1 in whole numbers: rounding takes a thousandth of a vote at most
Whole: TypeAlias = "NDArray[np.int64]"


class Draws(Protocol):
    """The secret randomness of a grant."""

    def poissons(self, count: int, mean: float) -> Whole:
        """The next draws of its noise."""


def variance(sigma: float) -> float:
    """The variance with which Skellam noise costs no more than Gaussian noise of `sigma` on the same sum.

    Theorem 3.5 of the paper: with sensitivities D1, D2 and variance v, an integer order a > 1 costs at most
    a D2^2 / 2v + ((2a - 1) D2^2 + 6 D1) / 4v^2. Whole numbers of norm `UNIT` have D2 = UNIT and D1 <= UNIT^2, so that
    for a >= 2 this is at most a (UNIT^2 / 2v + 5 UNIT^2 / 4v^2). Gaussian noise costs a / 2 sigma^2. The result is the
    v at which the two are equal.

    Args:
        sigma: Deviation of the Gaussian noise, in units of a vote.
    """
    half = UNIT**2 / 2
    return sigma**2 * (half + math.sqrt(half**2 + 2.5 * UNIT**2 / sigma**2))


def sigma_of(variance: float) -> float:
    """The inverse of `variance`: Gaussian noise of this deviation costs as much at every whole order from 2."""
    return 1 / math.sqrt(UNIT**2 / variance + 2.5 * UNIT**2 / variance**2)


def noise(randomness: Draws, count: int, variance: float) -> Whole:
    """Skellam noise; shape (count,), mean 0."""
    return randomness.poissons(count, variance / 2) - randomness.poissons(count, variance / 2)
