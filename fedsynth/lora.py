"""LoRA adapters as named arrays, and ways to combine them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, sqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsynth.corpus import Source, united


@dataclass(frozen=True)
class Adapter:
    """The trained weights of a LoRA: layer update = (alpha / rank) * B @ A (Hu et al. 2021, section 4.1).

    Attributes:
        arrays: By PEFT's parameter name: `...lora_A.weight` is (rank, in), `...lora_B.weight` is (out, rank).
        rank: Inner dimension of the product.
        alpha: Numerator of its scale.
        base: SHA-256 of the weights of its base model.
        grants: Ids of the privacy grants that its guarantee rests on; empty: no guarantee, unless it is public.
        public: True if only chance or public text made it.
    """

    arrays: Mapping[str, NDArray[np.float32]]
    rank: int
    alpha: float
    base: str
    grants: tuple[str, ...] = ()
    public: bool = False

    def __repr__(self) -> str:
        numbers = sum(array.size for array in self.arrays.values())
        kind = "public" if self.public else f"{len(self.grants)} grants" if self.grants else "no guarantee"
        return f"Adapter(rank {self.rank}, {len(self.arrays)} tensors, {numbers:,} numbers, {kind})"


@dataclass(frozen=True)
class Truncated:
    """An adapter brought to another rank, and the loss on the way.

    Attributes:
        adapter: The nearest adapter of that rank.
        error: ||dW - dW'|| / ||dW||, Frobenius norms over the updates of all modules together; 0 where there is none.
    """

    adapter: Adapter
    error: float


Shared: TypeAlias = Callable[[str], bool]
"""Tells from a tensor's name whether it is averaged."""


def digest_of(adapter: Adapter) -> str:
    """SHA-256 (hex) of an adapter's rank, alpha, base and numbers."""
    digest = hashlib.sha256(repr((adapter.rank, adapter.alpha, adapter.base)).encode())
    for name, array in sorted(adapter.arrays.items()):
        digest.update(repr((name, array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


Matrix: TypeAlias = NDArray[np.float64]
_A, _B = ".lora_A.weight", ".lora_B.weight"
_FACTORS_ALIKE = {  # attributes that adapters must share to be combined factor by factor, and the way out
    "base": "adapters of different base models cannot be combined: start them all from the same weights",
    "rank": "`stacked` combines different ranks, and `truncated` gives each adapter one rank",
    "alpha": "`stacked` combines different alphas, and `truncated` gives each adapter one alpha",
}


def everything(_: str) -> bool:
    """FedIT: both factors are averaged, which is not the average of the products."""
    return True


def only_b(name: str) -> bool:
    """FFA-LoRA (arXiv 2403.12313): A stays at its common random start, so averaging B averages the product exactly."""
    return "lora_B" in name


def made_of(adapter: Adapter, sources: Sequence[Source]) -> Adapter:
    """An adapter with the guarantee of its sources: the adapters that it starts from and the text that it learnt."""
    return replace(adapter, grants=united(sources), public=all(source.public for source in sources))


def average(adapters: Sequence[Adapter], weights: Sequence[float], shared: Shared = everything) -> Adapter:
    """Weighted mean of the shared tensors.

    Args:
        adapters: One per client, of one base, rank and alpha, with the same names and shapes.
        weights: Finite and non-negative, one per client, not all zero; normalised here.
        shared: Tells from a tensor's name whether it is averaged; the others are left out.

    Raises:
        ValueError: If the adapters do not fit together, or the weights cannot be normalised.
    """
    shares = _normalised("average", adapters, weights)
    _check_fit(adapters, [_shapes(a) for a in adapters], *_FACTORS_ALIKE)
    mean = {
        name: _float32(sum(p * a.arrays[name].astype(np.float64) for p, a in zip(shares, adapters, strict=True)))
        for name in adapters[0].arrays
        if shared(name)
    }
    return made_of(replace(adapters[0], arrays=mean), adapters)


def median(adapters: Sequence[Adapter]) -> Adapter:
    """The median of each number (Yin et al., arXiv 1803.01498): a minority cannot move it beyond what others sent.

    Every client counts alike, whatever number of records it states.

    >>> sent = [Adapter({"x.lora_A.weight": np.full((1, 1), n)}, 1, 1.0, "base") for n in (1.0, 2.0, 1e6)]
    >>> median(sent).arrays["x.lora_A.weight"].tolist()
    [[2.0]]

    Args:
        adapters: As for `average`.

    Raises:
        ValueError: If they do not fit together.
    """
    return _by_number(adapters, lambda stack: np.median(stack, axis=0))


def trimmed_mean(adapters: Sequence[Adapter], share: float) -> Adapter:
    """The mean of each number without its highest and its lowest ones (Yin et al., section 4); all count alike.

    >>> sent = [Adapter({"x.lora_A.weight": np.full((1, 1), n)}, 1, 1.0, "base") for n in (1.0, 2.0, 3.0, 4.0, 1e6)]
    >>> trimmed_mean(sent, 0.2).arrays["x.lora_A.weight"].tolist()
    [[3.0]]

    Args:
        adapters: As for `average`.
        share: Share of the clients that are left out at each end, below 1/2; rounded up.

    Raises:
        ValueError: If they do not fit together, or nobody would be left.
    """
    cut = ceil(share * len(adapters))
    if not 0 <= 2 * cut < len(adapters):
        raise ValueError(f"of {len(adapters)} adapters {cut} cannot be left out at each end: take a share below 1/2")
    return _by_number(adapters, lambda stack: np.sort(stack, axis=0)[cut : len(stack) - cut].mean(axis=0))


def _by_number(adapters: Sequence[Adapter], combine: Callable[[Matrix], ArrayLike]) -> Adapter:
    _normalised("a median", adapters, [1.0] * len(adapters))
    _check_fit(adapters, [_shapes(a) for a in adapters], *_FACTORS_ALIKE)
    found = {
        name: _float32(combine(np.stack([a.arrays[name].astype(np.float64) for a in adapters])))
        for name in adapters[0].arrays
    }
    return made_of(replace(adapters[0], arrays=found), adapters)


def completed(part: Adapter, whole: Adapter) -> Adapter:
    """`whole` with the tensors of `part` in place, and the guarantee of both.

    It puts averaged B's beside the A's that every client holds (FFA-LoRA), or a client's result beside the `whole` that
    its training started from: the client's grant covers its own training, not the start.

    Raises:
        ValueError: If they differ in base, rank or alpha, or a tensor of `part` is not in `whole` in its shape.
    """
    counterpart = {name: shape for name, shape in _shapes(whole).items() if name in part.arrays}
    _check_fit([part, whole], [_shapes(part), counterpart], *_FACTORS_ALIKE)
    return made_of(replace(whole, arrays={**whole.arrays, **part.arrays}), [part, whole])


def mix(first: Adapter, second: Adapter, share: float) -> Adapter:
    """share * first + (1 - share) * second on the factors (FedPIT's local aggregation sharing).

    >>> first, second = (Adapter({"x.lora_A.weight": np.full((1, 2), n)}, 1, 1.0, "base") for n in (1.0, 5.0))
    >>> mix(first, second, 0.75).arrays["x.lora_A.weight"].tolist()
    [[2.0, 2.0]]

    At 1 the result is `first` itself, at 0 `second`, with its own grants alone. In between the product of the mixed
    factors is not the mixed product; `stacked([first, second], [share, 1 - share])` is.

    Raises:
        ValueError: If they differ in base, rank, alpha, names or shapes, or the share lies outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in 0..1 (1: the first adapter alone), got {share}")
    _check_fit([first, second], [_shapes(first), _shapes(second)], *_FACTORS_ALIKE)
    if share in (0, 1):  # bit for bit: by arithmetic -0.0 would become 0.0, and an inf of the other NaN
        return first if share == 1 else second
    return average([first, second], [share, 1 - share])


def stacked(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted mean of the updates, exactly, as an adapter of rank sum(rank_k) (FLoRA, arXiv 2409.05976).

    A's rows and B's columns stand side by side, so that the product is the sum of the products. Weights and scales are
    folded into B; alpha is the new rank, so that the scale is 1 whatever the ranks and alphas were.

    Args:
        adapters: One per client, of one base and the same modules; ranks and alphas may differ.
        weights: Finite and non-negative, one per client, not all zero; normalised here.

    Raises:
        ValueError: If the adapters do not fit together or lack a factor, or the weights cannot be normalised.
    """
    shares = _normalised("stacked", adapters, weights)
    factors = [_factors(a) for a in adapters]
    _check_fit(adapters, [{m: (len(b), a.shape[1]) for m, (a, b) in f.items()} for f in factors], "base")
    gains = [p * a.alpha / a.rank for p, a in zip(shares, adapters, strict=True)]
    arrays = {}
    for module in factors[0]:
        arrays[module + _A] = _float32(np.vstack([f[module][0] for f in factors]))
        arrays[module + _B] = _float32(np.hstack([g * f[module][1] for g, f in zip(gains, factors, strict=True)]))
    rank = sum(a.rank for a in adapters)
    return made_of(Adapter(arrays, rank, float(rank), adapters[0].base), adapters)


def residual(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The part of the mean update that `average` misses, for clients to merge into their base (FedEx-LoRA, 2410.09432).

    The updates of the average and of the residual add up to the weighted mean of the updates. The residual has rank
    K * rank for K adapters and needs (K - 1) * rank: truncated to that rank it loses nothing.

    Args:
        adapters: One per client, of one base, rank and alpha, with the same names and shapes.
        weights: Finite and non-negative, one per client, not all zero; normalised here.

    Raises:
        ValueError: As `average` and `stacked`.
    """
    mean = average(adapters, weights).arrays
    # mean(BA) - mean(B) mean(A) = mean((B - mean(B)) (A - mean(A))), the covariance of B and A: of smaller rank than
    # the paper's difference as it stands, with nothing to cancel, and exactly zero where all A are equal.
    deviations = [
        replace(a, arrays={n: _float32(array.astype(np.float64) - mean[n]) for n, array in a.arrays.items()})
        for a in adapters
    ]
    return stacked(deviations, weights)


def truncated(adapter: Adapter, rank: int, alpha: float | None = None) -> Truncated:
    """The adapter of this rank whose update is nearest, in every module (Eckart and Young 1936).

    A rank that is not smaller pads with zeros and changes nothing, so that `average` accepts adapters of different
    ranks. Padding cannot learn: where both factors are zero, so are both gradients.

    Args:
        adapter: It has both factors of every module.
        rank: The new rank.
        alpha: The new alpha; None keeps the scale alpha / rank.

    Raises:
        ValueError: If rank is below 1, alpha is not finite and above 0, or a factor is missing.
    """
    if rank < 1 or not (alpha is None or 0 < alpha < inf):
        raise ValueError(f"truncated needs a rank of at least 1 and a finite alpha above 0, got {rank} and {alpha}")
    same_scale = adapter.alpha * rank / adapter.rank
    alpha = same_scale if alpha is None else alpha
    arrays, lost, total = {}, 0.0, 0.0
    for module, (a, b) in _factors(adapter).items():
        if rank < adapter.rank:
            a, b, values = _nearest(a, b, rank)
            lost, total = lost + float(values[rank:] @ values[rank:]), total + float(values @ values)
        missing = rank - len(a)
        arrays[module + _A] = _float32(np.pad(a, ((0, missing), (0, 0))))
        arrays[module + _B] = _float32(np.pad(same_scale / alpha * b, ((0, 0), (0, missing))))
    return Truncated(replace(adapter, arrays=arrays, rank=rank, alpha=alpha), sqrt(lost / total) if total else 0.0)


def update(adapter: Adapter) -> dict[str, Matrix]:
    """(alpha / rank) * B @ A by module, (out, in). It is as large as the base's weights: for tests and small models."""
    return {module: adapter.alpha / adapter.rank * b @ a for module, (a, b) in _factors(adapter).items()}


def _nearest(a: Matrix, b: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """Factors of the best approximation of B @ A, of at most this rank, and all its singular values.

    It takes the SVD of the small product of the triangles of B and A, and never forms the product itself.
    """
    left, left_triangle = np.linalg.qr(b)
    right, right_triangle = np.linalg.qr(a.T)
    u, values, vt = np.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    # A gets orthonormal rows and B the singular values (as in FedSVD, arXiv 2505.12805). A is then as large as LoRA's
    # random start even if the update is small, and a direction of value zero can still be learnt.
    return vt[:rank] @ right.T, left @ (u * values)[:, :rank], values


def _factors(adapter: Adapter) -> dict[str, tuple[Matrix, Matrix]]:
    """A, (rank, in), and B, (out, rank), by module.

    Raises:
        ValueError: If a module lacks one of them, or their shapes do not fit the adapter's rank.
    """
    found = {}
    for module in dict.fromkeys(name.removesuffix(_A).removesuffix(_B) for name in adapter.arrays):
        a, b = adapter.arrays.get(module + _A), adapter.arrays.get(module + _B)
        if a is None or b is None:
            raise ValueError(f"{module!r} needs both factors, {_A[1:]} and {_B[1:]}; `completed` adds what is missing")
        if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == adapter.rank:
            raise ValueError(
                f"{module!r} must have A of shape (rank, in) and B of shape (out, rank) for rank "
                f"{adapter.rank}, got {a.shape} and {b.shape}"
            )
        found[module] = (a.astype(np.float64), b.astype(np.float64))
    return found


def _check_fit(adapters: Sequence[Adapter], shapes: Sequence[Mapping[str, tuple[int, ...]]], *alike: str) -> None:
    """Refuses adapters that differ in these attributes, or in the names or shapes of their tensors or modules."""
    for other, theirs in zip(adapters[1:], shapes[1:], strict=True):
        for fact in alike:
            ours, its = getattr(adapters[0], fact), getattr(other, fact)
            if ours != its:
                raise ValueError(f"adapters differ in {fact}: {ours!r} and {its!r}; {_FACTORS_ALIKE[fact]}")
        for name in [*shapes[0], *theirs]:
            size, its_size = shapes[0].get(name, "absent"), theirs.get(name, "absent")
            if size != its_size:
                raise ValueError(
                    f"adapters differ in their tensors' names or shapes: {name!r} is {size} and "
                    f"{its_size}; make them all for the same modules of one model"
                )


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in adapter.arrays.items()}


def _normalised(what: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> list[float]:
    if not adapters:
        raise ValueError(f"{what} needs at least one adapter")
    if len(weights) != len(adapters) or min(weights) < 0 or not 0 < sum(weights) < inf:
        raise ValueError(
            f"{what} needs one non-negative weight per adapter, finite and not all zero, got "
            f"{list(weights)} for {len(adapters)}"
        )
    return [float(w) / sum(weights) for w in weights]


def _float32(array: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(array, np.float32, order="C")  # safetensors writes memory as it lies
