"""Norms of per-example gradients and their clipped sum, from the record of one backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
from torch import Tensor, nn

from fedsynth.dpsgd.precision import check_precision
from fedsynth.dpsgd.recording import Lookup, Product, Record, Use, check_unused, recording

LARGEST_NORM = 1e18  # of a gradient to clip: squares of larger ones overflow float32, and they count as zero
MARGIN = (
    1 - 1e-3
)  # units are clipped to MARGIN * C: rounding in norms, sums and padding stays below C (docs/privacy.md)
_BLOCK = 1024  # squares that are added in float32 before float64 takes over


class BookKeeping:
    """Adds up clipped gradients of micro-batches, by one forward and one backward pass.

    It forms no large gradient per example (Bu et al. 2022, algorithm 1, with mixed ghost norms, section 3).
    """

    def __init__(self, model: nn.Module, clip_norm: float, record: Record) -> None:
        self._clip_norm, self._record = clip_norm, record
        self._named = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self._weights = list(self._named.values())
        self._sums: dict[nn.Parameter, Tensor] = {}

    def add(self, losses: Callable[[], Tensor], units: Sequence[int]) -> None:
        """Adds the clipped gradients of the units of one micro-batch; all examples of a unit must be in it.

        Args:
            losses: Computes each example's own loss by a pass of the model, (examples,).
            units: The unit of each example; the examples of one unit are clipped together.

        Raises:
            UnknownWeight: If a weight is used in a way for which no gradient per example is known.
            ValueError: If there is not one loss per example, or the caller computes in mixed precision.
        """
        record = self._record
        check_precision(self._weights[0].device)
        record.examples = len(units)
        for weight in self._weights:
            weight.grad = None
        try:
            each = losses()
            if each.shape != (len(units),):
                raise ValueError(f"{len(units)} examples need a loss each, got losses of shape {tuple(each.shape)}")
            each.sum().backward()
            check_unused(self._named)
            with torch.no_grad():
                self._finish(numbered(units, self._weights[0].device))
        finally:
            record.clear()

    def take(self) -> list[Tensor]:
        """The sums so far, in the order of the model's trainable weights; the next ones start at zero."""
        sums = self._sums
        self._sums = {}
        return [sums[w] if w in sums else torch.zeros_like(w) for w in self._weights]

    def _finish(self, unit: Tensor) -> None:
        record, count = self._record, int(unit.max()) + 1
        whole = {w: united(grads, unit, count) for w, grads in record.whole.items()}
        squares = torch.zeros(count, dtype=torch.float64, device=unit.device)
        for grads in whole.values():
            squares += square_norms(grads)
        between = _pairs(unit) if count < len(unit) else None
        for uses in record.factors.values():
            squares += _ghost(uses, unit, count, between)
        factor = clip_factors(squares, self._clip_norm)
        bad = factor == 0
        spoilt = bool(bad.any())
        each = factor[unit]
        # Passes are added up in float64: in float32 one unit among tens of thousands moves the rounded sum by more
        # than C. One pass is small enough for float32 (`limits.MAX_MICROBATCH`).
        self._sums = {weight: total.double() for weight, total in self._sums.items()}
        record.whole.clear()
        while whole:  # frees each gradient once it is added
            weight, grads = whole.popitem()
            if spoilt:  # 0 * NaN is NaN
                grads = grads.masked_fill(bad.view(-1, *[1] * (grads.dim() - 1)), 0.0)
            self._total(weight).add_((factor.to(grads.dtype) @ grads.flatten(1)).view(weight.shape))
        while record.factors:
            weight, uses = record.factors.popitem()
            for used in uses:
                _add(self._total(weight), _silenced(used, bad[unit]) if spoilt else used, each.to(used.g.dtype))

    def _total(self, weight: nn.Parameter) -> Tensor:
        """The sum of a weight, made at its first use: no second copy of the weights exists beside the activations."""
        if weight not in self._sums:
            self._sums[weight] = torch.zeros_like(weight)
        return self._sums[weight]


@contextmanager
def clipper(model: nn.Module, clip_norm: float) -> Iterator[BookKeeping]:
    """The engine for one model, in training; the model is as before when it closes.

    Raises:
        UnknownWeight: If a trainable weight belongs to a layer that is not known.
    """
    with recording(model) as record:
        yield BookKeeping(model, clip_norm, record)


def clip_factors(squares: Tensor, clip_norm: float) -> Tensor:
    """The factor of each unit's gradient: min(1, MARGIN C / norm), 0 for a norm that cannot be used.

    Args:
        squares: Squared norms, float64; those that are not finite, or of norms above `LARGEST_NORM`, give 0.
        clip_norm: C; infinite clips nothing.
    """
    norms = squares.clamp(min=0.0).sqrt()  # NaN stays
    factors = (clip_norm * MARGIN / norms.clamp(min=1e-30)).clamp(max=1.0)
    return torch.where(norms <= LARGEST_NORM, factors, torch.zeros_like(factors))


def square_norms(grads: Tensor) -> Tensor:
    """Squared norm of each row's tensor, float64; added in float32 by blocks, which rounds by less than 1e-4."""
    flat = grads.flatten(1)
    if flat.dtype == torch.float64 or flat.shape[1] < _BLOCK:
        whole: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64) ** 2
        return whole
    blocks = flat.shape[1] // _BLOCK
    head = torch.linalg.vector_norm(flat[:, : blocks * _BLOCK].reshape(len(flat), blocks, _BLOCK), dim=2)
    rest = torch.linalg.vector_norm(flat[:, blocks * _BLOCK :], dim=1)
    squares: Tensor = head.double().square().sum(1) + rest.double().square()
    return squares


def _ghost(uses: Sequence[Use], unit: Tensor, count: int, between: tuple[Tensor, Tensor] | None) -> Tensor:
    """Squared norm of each unit's gradient of a weight, from the factors of its uses alone; float64.

    It is || sum_u G_u ||^2 over uses u and examples of the unit, each <G, G'> by Gram matrices of inputs and of
    outputs. The terms can cancel, and then rounding could hide a norm: the bound of the hidden part is added.
    """
    found = uses[0].g.new_zeros(count, dtype=torch.float64)
    for used in uses:
        found.index_add_(0, unit, _inner(used, used))
    for one, other in combinations(uses, 2):
        found.index_add_(0, unit, 2 * _inner(one, other))
    if between is not None:
        # As many pairs at once as examples: pairs grow with the square of a unit's rows, and memory must not.
        for first, second in zip(*(side.split(len(unit)) for side in between), strict=True):
            for one in uses:
                for other in uses:
                    found.index_add_(0, unit[first], 2 * _inner(_rows(one, first), _rows(other, second)))
    return found + _hidden(uses, unit, count)


def _inner(one: Use, other: Use) -> Tensor:
    """<G_n, G'_n> for each n, (examples,), float64: of two uses of one weight, or one use of two lists of examples."""
    if isinstance(one, Lookup) and isinstance(other, Lookup):
        same = one.ids.unsqueeze(2) == other.ids.unsqueeze(1)
        return _total(torch.bmm(one.g, other.g.transpose(1, 2)) * same)
    if isinstance(one, Product) and isinstance(other, Product):
        if one.transposed != other.transposed:  # x and g change places
            other = Product(other.g, other.x, one.transposed)
        inputs = torch.bmm(one.x, other.x.transpose(1, 2))
        return _total(inputs.mul_(torch.bmm(one.g, other.g.transpose(1, 2))))
    if isinstance(one, Lookup):
        return _inner(other, one)
    product, lookup = one, other
    assert isinstance(lookup, Lookup)
    rows, columns = (product.x, product.g) if product.transposed else (product.g, product.x)
    picked = torch.gather(rows, 2, lookup.ids.unsqueeze(1).expand(-1, rows.shape[1], -1))
    return _total(picked * torch.bmm(columns, lookup.g.transpose(1, 2)))


def _hidden(uses: Sequence[Use], unit: Tensor, count: int) -> Tensor:
    """Bound on the loss of a squared norm to rounding: c u (sum_t |x_t| |g_t|)^2, which bounds the cancelling terms,
    and k tiny (sum_t |x_t| + |g_t|)^2, which bounds what is too small for a float.

    The error of a dot product of k numbers is at most sqrt(k) u |x| |g|, except for a vanishing chance (Higham and Mary
    2019), and k times the smallest normal number where its terms are below that. Small g beside large x, as a start
    that a server sends may make them, would otherwise pass for a gradient of norm 0.
    """
    both = uses[0].g.new_zeros(2, count, dtype=torch.float64)
    longest = max(max(used.g.shape[2], used.x.shape[2] if isinstance(used, Product) else 1) for used in uses)
    kind = torch.finfo(uses[0].g.dtype)
    for used in uses:
        g = torch.linalg.vector_norm(used.g, dim=2).double() + math.sqrt(longest * kind.tiny)
        x = torch.ones_like(g)
        if isinstance(used, Product):
            x = torch.linalg.vector_norm(used.x, dim=2).double() + math.sqrt(longest * kind.tiny)
        both.index_add_(1, unit, torch.stack([(x * g).sum(1), (x + g).sum(1)]))
    lengths, sizes = both
    bound: Tensor = 4 * math.sqrt(longest) * kind.eps * lengths**2 + longest * kind.tiny * sizes**2
    return bound


def _add(total: Tensor, used: Use, factor: Tensor) -> None:
    """total += sum_n factor_n G_n, as one product."""
    if isinstance(used, Lookup):
        total.index_add_(0, used.ids.flatten(), (used.g * factor.view(-1, 1, 1)).flatten(0, 1).to(total.dtype))
        return
    x, g = used.x, used.g
    if x.shape[2] < g.shape[2]:
        x = x * factor.view(-1, 1, 1)
    else:
        g = g * factor.view(-1, 1, 1)
    first, second = (x, g) if used.transposed else (g, x)
    first, second = first.flatten(0, 1).t(), second.flatten(0, 1)
    if total.dtype == first.dtype:
        total.addmm_(first, second)
    else:
        total.add_(first @ second)


def _silenced(used: Use, bad: Tensor) -> Use:
    """A use without the examples that are not finite: a factor of 0 does not silence NaN."""
    mask = bad.view(-1, 1, 1)
    if isinstance(used, Lookup):
        return Lookup(used.ids, used.g.masked_fill(mask, 0.0), used.rows)
    return Product(used.x.masked_fill(mask, 0.0), used.g.masked_fill(mask, 0.0), used.transposed)


def _rows(used: Use, index: Tensor) -> Use:
    if isinstance(used, Lookup):
        return Lookup(used.ids[index], used.g[index], used.rows)
    return Product(used.x[index], used.g[index], used.transposed)


def numbered(units: Sequence[int], device: torch.device) -> Tensor:
    """Units as 0, 1, ... in the order of their first examples."""
    order = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    return torch.tensor([order[unit] for unit in units], device=device)


def united(grads: Tensor, unit: Tensor, count: int) -> Tensor:
    """Gradients of examples, added up by unit."""
    if count == len(unit):
        return grads
    return grads.new_zeros(count, *grads.shape[1:]).index_add_(0, unit, grads)


def _pairs(unit: Tensor) -> tuple[Tensor, Tensor]:
    """Every two different examples of one unit, each pair once."""
    same = (unit.unsqueeze(0) == unit.unsqueeze(1)).triu(diagonal=1)
    first, second = same.nonzero(as_tuple=True)
    return first, second


def _total(grams: Tensor) -> Tensor:
    return grams.flatten(1).sum(1, dtype=torch.float64)
