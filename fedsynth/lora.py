"""LoRA adapters as named arrays; how they are averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Adapter:
    """The trained weights of a LoRA: layer update = (alpha / rank) * B @ A (Hu et al. 2021, section 4.1).

    Attributes:
        arrays: By PEFT's parameter name: `...lora_A.weight` is (rank, in), `...lora_B.weight` is (out, rank).
        rank: Inner dimension of the product.
        alpha: Numerator of its scale.
        base: SHA-256 of the base model's weights that it belongs to.
        grants: Ids of the privacy grants that its guarantee rests on; empty: no guarantee.
    """

    arrays: Mapping[str, NDArray[np.float32]]
    rank: int
    alpha: float
    base: str
    grants: tuple[str, ...] = ()


Shared: TypeAlias = Callable[[str], bool]
"""Tells from a tensor's name whether it is averaged."""


def everything(_: str) -> bool:
    """FedIT: both factors are averaged, which is not the average of the products."""
    return True


def only_b(name: str) -> bool:
    """FFA-LoRA (arXiv 2403.12313): A stays at its common random start, so averaging B averages the product exactly."""
    return "lora_B" in name


def average(adapters: Sequence[Adapter], weights: Sequence[float], shared: Shared = everything) -> Adapter:
    """Weighted mean of the shared tensors.

    Args:
        adapters: One per client, of one base, rank and alpha, with the same names and shapes.
        weights: Non-negative, one per client, not all zero; normalised here.
        shared: Tells from a tensor's name whether it is averaged; the others are left out.

    Raises:
        ValueError: If the adapters do not fit together, or the weights cannot be normalised.
    """
    if not adapters:
        raise ValueError("average needs at least one adapter")
    if len(weights) != len(adapters) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"average needs one non-negative weight per adapter, not all zero, got {list(weights)}")
    first = adapters[0]
    for other in adapters[1:]:
        for name in ("rank", "alpha", "base"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(f"adapters differ in {name}: {getattr(first, name)!r} and {getattr(other, name)!r}")
        if {n: a.shape for n, a in other.arrays.items()} != {n: a.shape for n, a in first.arrays.items()}:
            raise ValueError("adapters differ in their tensors' names or shapes: were they made for the same modules?")
    scale = np.asarray(weights, np.float64) / sum(weights)
    mean = {
        name: sum(w * a.arrays[name].astype(np.float64) for w, a in zip(scale, adapters, strict=True)).astype(
            np.float32
        )
        for name in first.arrays
        if shared(name)
    }
    grants = tuple(dict.fromkeys(g for a in adapters for g in a.grants))
    # One adapter without a guarantee makes the mean one without.
    return replace(first, arrays=mean, grants=grants if all(a.grants for a in adapters) else ())
