"""Layers that record the parts of per-example gradients.

A linear layer's gradient of example n is g_n^T x_n, with its input x_n and the gradient g_n of its output. One backward
pass has both (book-keeping, Bu et al. 2022, arXiv 2210.00038). Small gradients are multiplied out at once. For large
ones the record keeps the factors, and `fedsynth.dpsgd.bookkeeping` takes norms and the clipped sum from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd import Function
from transformers.pytorch_utils import Conv1D


class UnknownWeight(NotImplementedError):
    """A trainable weight is used in a way for which no gradient per example is known; nothing was trained."""


# Of transformers' layers that send each token to some of several experts: Mixtral, Qwen-MoE, OLMoE, DeepSeek, Switch.
ROUTED = re.compile(r"Experts$|MoE|Moe|TopKRouter|SparseMLP")


def check_unrouted(model: nn.Module) -> None:
    """Refuses a mixture of experts under a clip norm.

    Each expert multiplies the tokens that the whole pass sends to it. So the shapes of its products, and with them the
    kernels, depend on the other texts, and no check before the training sees those shapes. Some mixtures also drop a
    text's tokens where other texts fill an expert.

    Raises:
        UnknownWeight: If there is one.
    """
    for name, module in model.named_modules():
        if ROUTED.search(type(module).__name__):
            raise UnknownWeight(
                f"{name!r} is a {type(module).__name__}, which sends the tokens of all texts of a pass to experts: "
                "what one text adds depends on the others, and no clip norm bounds that; name a model without experts"
            )


@dataclass(frozen=True)
class Product:
    """A linear layer was used: the gradient of example n is g_n^T x_n, or its transpose.

    Attributes:
        x: Inputs, (examples, positions, in).
        g: Gradients of the outputs, (examples, positions, out).
        transposed: True if the weight is (in, out), as in GPT-2's Conv1D.
    """

    x: Tensor
    g: Tensor
    transposed: bool

    def multiplied(self) -> Tensor:
        """Gradient of each example, (examples, *weight.shape)."""
        first, second = (self.x, self.g) if self.transposed else (self.g, self.x)
        return torch.bmm(first.transpose(1, 2), second)


@dataclass(frozen=True)
class Lookup:
    """An embedding was used: row ids[n, t] of example n's gradient gains g[n, t].

    Attributes:
        ids: Token ids, (examples, positions).
        g: Gradients of the rows, (examples, positions, width).
        rows: Number of rows of the table.
    """

    ids: Tensor
    g: Tensor
    rows: int

    def multiplied(self) -> Tensor:
        """Gradient of each example, (examples, rows, width)."""
        table = self.g.new_zeros(len(self.ids), self.rows, self.g.shape[2])
        return table.scatter_add_(1, self.ids.unsqueeze(2).expand_as(self.g), self.g)


Use: TypeAlias = Product | Lookup


@dataclass
class Record:
    """The record of one forward and backward pass.

    Attributes:
        examples: Number of examples in the next batch; each layer's input must have them as its first dimension.
        whole: Gradient of each example, (examples, *weight.shape), at least float32.
        factors: The uses of each weight whose gradients are too large to multiply out.
    """

    examples: int = 0
    whole: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    factors: dict[nn.Parameter, list[Use]] = field(default_factory=dict)

    def add(self, weight: nn.Parameter, gradients: Tensor) -> None:
        """Notes gradients per example, (examples, *weight.shape)."""
        gradients = _float(gradients)
        for earlier in self.factors.pop(weight, ()):  # all uses of a weight are recorded in one form
            gradients = gradients + earlier.multiplied()
        known = self.whole.get(weight)
        self.whole[weight] = gradients if known is None else known + gradients

    def use(self, weight: nn.Parameter, used: Use) -> None:
        """Notes a use of a weight; all uses of one weight (tied, or shared by layers) are recorded in one form.

        For a weight (p, d) used at T positions the factors take T (p + d) numbers, and a norm from them T^2 (p + d)
        multiplications; the product takes p d and T p d. The record keeps the smaller form.
        """
        earlier = self.factors.get(weight)
        if weight not in self.whole and (earlier is not None or used.g.shape[1] * _width(used) < weight.numel()):
            self.factors.setdefault(weight, []).append(_upcast(used))
        else:
            self.add(weight, used.multiplied())

    def clear(self) -> None:
        """Forgets everything."""
        self.whole, self.factors = {}, {}


@contextmanager
def recording(model: nn.Module) -> Iterator[Record]:
    """While open, a backward pass through the model fills the record and leaves no `.grad`.

    Raises:
        UnknownWeight: If a trainable weight belongs to a layer that is not known.
    """
    record = Record()
    found = {module: _forward_of(module, name, record) for name, module in model.named_modules()}
    with patched({module: forward for module, forward in found.items() if forward is not None}):
        yield record


@contextmanager
def patched(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """While open, each of these layers runs the function beside it.

    Raises:
        RuntimeError: If one of them is patched already: the first to close would remove the other's function.
    """
    if not _patched.isdisjoint(forwards):
        raise RuntimeError("an engine is open on this model already: close that one first")
    _patched.update(forwards)
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            _patched.discard(module)
            del module.forward
            if own is not None:
                module.forward = own


_patched: set[nn.Module] = set()


def check_unused(weights: Mapping[str, nn.Parameter]) -> None:
    """Checks after a backward pass that autograd gave no trainable weight a gradient of its own.

    Args:
        weights: The trained weights by name.

    Raises:
        UnknownWeight: If a weight was used past its layer, such as a table that is read as an array.
    """
    for name, weight in weights.items():
        if weight.grad is not None:
            weight.grad = None
            raise UnknownWeight(
                f"the weight {name!r} is used outside of its layer, so that no gradient per example is "
                "known: freeze it (requires_grad_(False))"
            )


def _forward_of(module: nn.Module, name: str, record: Record) -> Callable[..., Tensor] | None:
    """A layer's function while recording; None for a layer without trainable weights of its own."""
    own = {key: weight for key, weight in module.named_parameters(recurse=False) if weight.requires_grad}
    if isinstance(module, LoraLinear) and (parts := plain_lora(module)) is not None:
        return partial(_lora, module, *parts, _Named(name, record), module.forward)
    if not own:
        return None
    # Weights of other names come from parametrisations, such as weight_norm.
    kind = type(module) if set(own) <= {"weight", "bias"} else type(None)
    if kind is nn.Linear:
        return partial(_linear, module, False, _Named(name, record))
    if kind is Conv1D:
        return partial(_linear, module, True, _Named(name, record))
    if kind is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse:
        return partial(_embedding, module, _Named(name, record))
    if kind is nn.LayerNorm or kind is nn.RMSNorm:
        return partial(_torch_norm, module, _Named(name, record))
    if kind.__name__.endswith(("RMSNorm", "LayerNorm")) and all(weight.dim() == 1 for weight in own.values()):
        return partial(_spread_norm, module, tuple(own), _Named(name, record), module.forward)
    raise UnknownWeight(
        f"no gradient per example is known of {name}.{next(iter(own))} in a {type(module).__name__}: "
        "freeze it (requires_grad_(False)), or train a LoRA on linear layers"
    )


@dataclass(frozen=True)
class _Named:
    """The record, for one layer to write to."""

    layer: str
    record: Record

    def check(self, x: Tensor) -> None:
        check_examples(self.layer, x, self.record)


def check_examples(layer: str, x: Tensor, record: Record) -> None:
    """Refuses a layer's input that does not have the batch's examples as its first dimension.

    Raises:
        UnknownWeight: If it does not.
    """
    if x.dim() < 2 or len(x) != record.examples:
        raise UnknownWeight(
            f"the layer {layer!r} gets an input of shape {tuple(x.shape)} for {record.examples} "
            "examples: it mixes them, or is the same for all of them; freeze its weights "
            "(requires_grad_(False))"
        )


def _linear(layer: Any, transposed: bool, named: _Named, x: Tensor) -> Tensor:
    named.check(x)
    out: Tensor = _Linear.apply(x, layer.weight, layer.bias, transposed, named.record)  # type: ignore[no-untyped-call]  # torch types no `apply`
    return out


def _embedding(layer: nn.Embedding, named: _Named, ids: Tensor) -> Tensor:
    if len(ids) == 1 < named.record.examples:  # positions, the same for all examples: each has a gradient of its own
        ids = ids.expand(named.record.examples, *ids.shape[1:])
    named.check(ids)
    out: Tensor = _Embedding.apply(ids, layer.weight, layer.padding_idx, named.record)  # type: ignore[no-untyped-call]  # torch types no `apply`
    return out


def _torch_norm(layer: Any, named: _Named, x: Tensor) -> Tensor:
    named.check(x)
    if isinstance(layer, nn.LayerNorm):
        x = F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    else:
        x = F.rms_norm(x, layer.normalized_shape, None, layer.eps)
    if layer.weight is not None:
        x = x * _spread(layer.weight, x, named.record)
    bias = getattr(layer, "bias", None)
    return x if bias is None else x + _spread(bias, x, named.record)


def _spread_norm(layer: Any, own: tuple[str, ...], named: _Named, forward: Any, x: Tensor, *args: Any) -> Tensor:
    """A normalisation layer of a model library, in its own arithmetic, with one copy of its gains per example."""
    named.check(x)
    weights = {key: layer._parameters[key] for key in own}
    try:
        layer._parameters.update({key: _spread(weight, x, named.record) for key, weight in weights.items()})
        out: Tensor = forward(x, *args)
    finally:
        layer._parameters.update(weights)
    return out


def _spread(weight: nn.Parameter, x: Tensor, record: Record) -> Tensor:
    """The weight once per example, to multiply with or add to x, (examples, ..., width)."""
    if not weight.requires_grad:
        return weight
    copies: Tensor = _Spread.apply(weight, len(x), x.dim(), record)  # type: ignore[no-untyped-call]  # torch types no `apply`
    return copies


def plain_lora(layer: Any) -> tuple[nn.Linear, nn.Linear, float] | None:
    """The two layers and the scale of a LoRA without variants, whose steps can be one operation; else None."""
    [*active] = layer.active_adapters
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return None
    first, second, dropout = (part[active[0]] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    plain = type(first) is nn.Linear and type(second) is nn.Linear and first.bias is None and second.bias is None
    return (first, second, float(layer.scaling[active[0]])) if plain and type(dropout) is nn.Identity else None


def _lora(
    layer: Any, first: nn.Linear, second: nn.Linear, scale: float, named: _Named, forward: Any, x: Tensor
) -> Tensor:
    """PEFT's computation, in the precision of the base: W x + scale B A x."""
    if not (first.weight.requires_grad or second.weight.requires_grad):
        return forward(x)  # type: ignore[no-any-return]  # PEFT's own forward
    named.check(x)
    out: Tensor = _Lora.apply(layer.base_layer(x), x, first.weight, second.weight, scale, named.record)  # type: ignore[no-untyped-call]  # torch types no `apply`
    return out


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, record: Record) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.weight, ctx.bias, ctx.transposed, ctx.record = weight, bias, transposed, record
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if ctx.weight.requires_grad:
            ctx.record.use(ctx.weight, Product(positions(x), positions(g), ctx.transposed))
        if ctx.bias is not None and ctx.bias.requires_grad:
            ctx.record.add(ctx.bias, _float(positions(g)).sum(1))
        back = g @ (weight.t() if ctx.transposed else weight) if ctx.needs_input_grad[0] else None
        return back, None, None, None, None


class _Lora(Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, first: nn.Parameter, second: nn.Parameter, scale: float, record: Record
    ) -> Tensor:
        a, b = first.to(x.dtype), second.to(x.dtype)
        inner = F.linear(x, a)
        ctx.save_for_backward(x, a, b, inner)
        ctx.first, ctx.second, ctx.scale, ctx.record = first, second, scale, record
        return torch.add(base, F.linear(inner, b), alpha=scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, a, b, inner = ctx.saved_tensors
        back = (g @ b).mul_(ctx.scale)
        if ctx.first.requires_grad:
            ctx.record.use(ctx.first, Product(positions(x), positions(back), False))
        if ctx.second.requires_grad:
            ctx.record.use(ctx.second, Product(positions(inner * ctx.scale), positions(g), False))
        return g, back @ a if ctx.needs_input_grad[1] else None, None, None, None, None


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: nn.Parameter, padding: int | None, record: Record) -> Tensor:
        ctx.ids, ctx.weight, ctx.padding, ctx.record = ids, weight, padding, record
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ids, g = ctx.ids.flatten(1), positions(g)
        if ctx.padding is not None:  # as in torch, the row of padding is not learnt
            g = g * (ids != ctx.padding).unsqueeze(2)
        ctx.record.use(ctx.weight, Lookup(ids, g, len(ctx.weight)))
        return None, None, None, None


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, examples: int, dims: int, record: Record) -> Tensor:
        ctx.weight, ctx.record = weight, record
        return weight.view(*[1] * (dims - weight.dim()), *weight.shape).expand(
            examples, *[1] * (dims - weight.dim() - 1), *weight.shape
        )

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.record.add(ctx.weight, g.reshape(len(g), *ctx.weight.shape))
        return None, None, None, None


def positions(x: Tensor) -> Tensor:
    """(examples, ..., width) as (examples, positions, width)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _width(used: Use) -> int:
    return used.g.shape[2] + (used.x.shape[2] if isinstance(used, Product) else 1)


def _float(x: Tensor) -> Tensor:
    """Numbers in at least float32: norms and sums use the same ones."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _upcast(used: Use) -> Use:
    if isinstance(used, Product):
        return Product(_float(used.x), _float(used.g), used.transposed)
    return Lookup(used.ids, _float(used.g), used.rows)
