"""LoRA on a model: attach it, put an adapter's weights in place, read them, write them as PEFT does.

A process keeps its adapted models. A caller borrows one, with other weights in place, and it goes back when the caller
drops it. Loading and adapting a model for each client would cost more than a step of training.
"""

from __future__ import annotations

import copy
import json
import math
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsynth.lora import Adapter, only_b
from fedsynth.models.hub import locate_adapter, weights_hash
from fedsynth.models.loading import dtype_of, load_frozen, load_model
from fedsynth.scenario.hardware import Precision
from fedsynth.typed import BadValue


class WrongAdapter(ValueError):
    """The adapter does not belong to this model."""


def new_adapter(
    name: str,
    *,
    rank: int,
    alpha: float,
    seed: int,
    precision: Precision = "float32",
    targets: Sequence[str] | None = None,
) -> Adapter:
    """The start of an adapter for the model `name`: A random from `seed`, B zero.

    The precision is that of the base that a client has loaded anyway; the adapter is the same for each.

    Raises:
        BadValue: If the model cannot be loaded, or has no layer to adapt.
    """
    model = fresh_lora(name, rank=rank, alpha=alpha, seed=seed, precision=precision, targets=targets)
    return replace(read_adapter(model, weights_hash(name)), public=True)


def fresh_lora(
    name: str,
    *,
    rank: int,
    alpha: float,
    seed: int,
    precision: Precision = "float32",
    targets: Sequence[str] | None = None,
) -> PeftModel:
    """The model `name` with LoRA at its start, ready to train; it is borrowed as in `with_adapter`.

    Raises:
        BadValue: If the model cannot be loaded, or has no layer to adapt.
    """
    borrowed = _borrowed(name, rank, alpha, precision, layers_to_adapt(name, targets, precision))
    _start(borrowed.model, seed)
    return borrowed.model


def with_adapter(name: str, adapter: Adapter, *, frozen_a: bool = False, precision: Precision = "float32") -> PeftModel:
    """The model `name` with the weights of an adapter in place, ready to train or to write.

    The caller borrows it and must not merge it or change its structure. The next caller gets it when this one drops it;
    a reference to a part keeps the whole.

    Args:
        name: Name of the base.
        adapter: An adapter for the base; its tensors tell which layers it adapts.
        frozen_a: True to leave the factors A as they are in training (FFA-LoRA).
        precision: Precision of the base.

    Raises:
        WrongAdapter: If the adapter's base, tensors or shapes are not those of this model.
    """
    _check_base(adapter.base, name)
    layers = _adapted_layers(adapter, layers_to_adapt(name, None, precision))
    borrowed = _borrowed(name, adapter.rank, adapter.alpha, precision, layers)
    _check_fits(adapter, borrowed.weights)
    arrays = [torch.from_numpy(np.ascontiguousarray(adapter.arrays[n])) for n in borrowed.weights]
    with torch.no_grad():
        torch._foreach_copy_(list(borrowed.weights.values()), arrays)
    if frozen_a:
        for weight_name, weight in borrowed.weights.items():
            weight.requires_grad_(only_b(weight_name))
    return borrowed.model


def merged(name: str, adapter: Adapter) -> Any:
    """The model `name` with an adapter added to its weights, for generation: a copy of its own, in float32.

    LoRA beside each layer of a small model would cost as much time as the layer.

    Raises:
        WrongAdapter: See `with_adapter`.
    """
    _check_base(adapter.base, name)
    own: Any = load_model(name, "generator")
    layers = _adapted_layers(adapter, tuple(_linear_layers(own)))
    own = attach_lora(own, rank=adapter.rank, alpha=adapter.alpha, seed=0, targets=layers)
    weights = _by_name(own)
    _check_fits(adapter, weights)
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(torch.from_numpy(np.ascontiguousarray(adapter.arrays[key])))
    return own.merge_and_unload().eval()


@dataclass(frozen=True)
class _Adapted:
    """A model with LoRA, and its LoRA weights by PEFT's names."""

    model: PeftModel
    weights: Mapping[str, nn.Parameter]


_idle: dict[tuple[str, int, float, Any, tuple[str, ...]], list[_Adapted]] = {}


def _borrowed(name: str, rank: int, alpha: float, precision: Precision, layers: tuple[str, ...]) -> _Adapted:
    """An idle adapted model, or a new one. The loan ends when the caller drops the returned handle."""
    idle = _idle.setdefault((name, rank, alpha, dtype_of(name, precision), layers), [])
    try:
        resident = idle.pop()
    except IndexError:
        # All adapted models share one copy of the base's weights: it is as large as they are small.
        model = attach_lora(load_frozen(name, precision), rank=rank, alpha=alpha, seed=0, targets=layers or None)
        resident = _Adapted(model, _by_name(model))
    for weight in resident.weights.values():
        weight.requires_grad_(True)
    handle = copy.copy(resident.model).eval()
    weakref.finalize(handle, _give_back, idle, resident)
    return _Adapted(handle, resident.weights)


def _by_name(model: PeftModel) -> dict[str, nn.Parameter]:
    """LoRA weights by the names that PEFT saves them under."""
    places = {weight.data_ptr(): weight for weight in model.parameters()}
    return {name: places[tensor.data_ptr()] for name, tensor in _adapter_weights(model).items()}


def _check_base(base: str, name: str) -> None:
    if base != (own := weights_hash(name)):
        raise WrongAdapter(
            f"the adapter belongs to a model with weights {base[:12]}, {name!r} has {own[:12]}: server and "
            "clients must use the same base"
        )


def _check_fits(adapter: Adapter, weights: Mapping[str, nn.Parameter]) -> None:
    if {n: tuple(w.shape) for n, w in weights.items()} != {n: a.shape for n, a in adapter.arrays.items()}:
        raise WrongAdapter(f"the adapter's tensors are not those of LoRA of rank {adapter.rank} on this model")


def _give_back(idle: list[_Adapted], resident: _Adapted) -> None:
    for weight in resident.weights.values():
        weight.grad = None
    idle.append(resident)


def attach_lora(
    model: nn.Module, *, rank: int, alpha: float, seed: int, targets: Sequence[str] | None = None
) -> PeftModel:
    """LoRA on every linear layer except the heads (Hu et al. 2021; all-linear as in QLoRA, section 4), or on some.

    A starts at Kaiming-uniform from `seed` (public), B at zero, so the model starts as its base.

    Args:
        model: The base.
        rank: LoRA rank.
        alpha: LoRA scale is alpha / rank.
        seed: Public seed of A.
        targets: Ends of the names of the layers to adapt, such as `q_proj`; None for all.

    Raises:
        BadValue: If the model has no linear layer to adapt, or none of a name in `targets`.
    """
    linear = _linear_layers(model)
    if not linear:
        raise BadValue(f"{type(model).__name__} has no linear layer that LoRA could adapt")
    layers = _chosen_by(linear, targets)
    turned = all(isinstance(linear[name], Conv1D) for name in layers)  # GPT-2 keeps its weights transposed
    adapted = get_peft_model(model, _lora_config(rank, alpha, list(layers), fan_in_fan_out=turned))
    _start(adapted, seed)
    return adapted


@lru_cache(maxsize=16)
def layers_to_adapt(
    name: str, targets: tuple[str, ...] | None = None, precision: Precision = "float32"
) -> tuple[str, ...]:
    """The layers of the model `name` that an adapter with these `targets` has; see `attach_lora`.

    Raises:
        BadValue: If the model cannot be loaded, or has no linear layer of a name in `targets`.
    """
    return _chosen_by(_linear_layers(load_frozen(name, precision)), targets)


def check_layers(adapter: Adapter, name: str, targets: tuple[str, ...] | None, precision: Precision) -> None:
    """Refuses an adapter that has other layers than those to train.

    Raises:
        WrongAdapter: If it has.
    """
    found, wanted = _layers(adapter.arrays), layers_to_adapt(name, targets, precision)
    if other := sorted(found ^ set(wanted)):
        raise WrongAdapter(
            f"the adapter's tensors are of {len(found)} layers, and client.generator_training.lora_targets means "
            f"{len(wanted)}: they differ in {_listed(other)}"
        )


def _chosen_by(linear: Iterable[str], targets: Sequence[str] | None) -> tuple[str, ...]:
    """The layers whose names, or ends of names, are among the targets; all for None."""
    layers = tuple(linear)
    if targets is None:
        return layers
    for target in targets:
        if not any(_ends(layer, target) for layer in layers):
            ends = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            raise BadValue(f"lora_targets: no linear layer's name ends in {target!r}; these do: {_listed(ends)}")
    return tuple(layer for layer in layers if any(_ends(layer, target) for target in targets))


def _ends(layer: str, target: str) -> bool:
    return f".{layer}".endswith(f".{target}")


def _adapted_layers(adapter: Adapter, linear: tuple[str, ...]) -> tuple[str, ...]:
    """The layers that an adapter's tensors belong to, in the order of the model.

    Raises:
        WrongAdapter: If the model has no such layers.
    """
    own = _layers(adapter.arrays)
    if not own or not own <= set(linear):
        raise WrongAdapter(f"the adapter's tensors are not those of LoRA of rank {adapter.rank} on this model")
    return tuple(layer for layer in linear if layer in own)


@torch.no_grad()
def _start(adapted: PeftModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_A" in name:
            drawn = nn.init.kaiming_uniform_(torch.empty(weight.shape), a=5**0.5, generator=generator)
            weight.copy_(drawn)
        elif "lora_B" in name:
            weight.zero_()


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the body: the output embedding, a pooler and layers outside the body are heads."""
    body: Any = getattr(model, "base_model", model)
    head, pooler = model.get_output_embeddings(), getattr(body, "pooler", None)  # type: ignore[operator]  # torch types it as Tensor | Module
    heads = {id(head), *(id(m) for m in (pooler.modules() if pooler is not None else ()))}
    inside = {id(m) for m in body.modules()}
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and id(layer) in inside and id(layer) not in heads
    }


def _lora_config(rank: int, alpha: float, targets: list[str], **more: Any) -> LoraConfig:
    scale: Any = alpha  # PEFT's annotation says int; it only divides by it
    return LoraConfig(r=rank, lora_alpha=scale, lora_dropout=0.0, target_modules=targets, **more)


def read_adapter(model: PeftModel, base: str) -> Adapter:
    """The LoRA weights of a model as named arrays, without a guarantee: `privacy.release` gives one."""
    config = cast(LoraConfig, model.peft_config["default"])
    arrays = {n: _array(t).copy() for n, t in _adapter_weights(model).items()}
    return Adapter(dict(sorted(arrays.items())), config.r, float(config.lora_alpha), base)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.detach().cpu().float().numpy()
    return found


def _adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    # Never embeddings: PEFT would ask the hub whether they were resized.
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return weights


@dataclass(frozen=True)
class Stack:
    """The adapters of several clients, in the form for `fedsynth.training.dp_training.train_stacked`.

    Attributes:
        names: Names of the LoRA weights, as in an `Adapter`.
        factors: By LoRA weight of the model, the weights of all clients, (clients, *weight.shape).
    """

    names: tuple[str, ...]
    factors: Mapping[nn.Parameter, Tensor]

    def read(self) -> list[dict[str, NDArray[np.float32]]]:
        """The arrays of each client's adapter."""
        whole = {name: _array(stack) for name, stack in zip(self.names, self.factors.values(), strict=True)}
        clients = len(next(iter(whole.values())))
        return [{name: whole[name][client].copy() for name in sorted(whole)} for client in range(clients)]


def stack_of(model: PeftModel, adapters: Sequence[Adapter]) -> Stack:
    """Stacks adapters of one base and rank.

    Raises:
        WrongAdapter: If an adapter's tensors are not those of the model.
    """
    weights = _by_name(model)
    for adapter in adapters:
        _check_fits(adapter, weights)
    return Stack(
        tuple(weights),
        {
            weight: torch.from_numpy(np.stack([a.arrays[name] for a in adapters])).to(weight.device)
            for name, weight in weights.items()
        },
    )


def save_adapter(adapter: Adapter, base: str, folder: Path) -> None:
    """Writes an adapter so that `PeftModel.from_pretrained` loads it on top of the model named `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = sorted(_layers(adapter.arrays))
    config = _lora_config(adapter.rank, adapter.alpha, modules)
    # Derived from the layers: the process that saves a client's adapter need not have the client's model.
    sides = {side for module in modules for side in ("encoder", "decoder") if side in module.split(".")}
    repository, _, revision = (base, "", "") if Path(base).is_dir() else base.partition("@")
    config.task_type = "SEQ_2_SEQ_LM" if len(sides) == 2 else "CAUSAL_LM"
    config.base_model_name_or_path, config.revision, config.inference_mode = repository, revision or None, True
    config.save_pretrained(str(folder))
    tensors = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in adapter.arrays.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    facts = {"grants": list(adapter.grants), "public": adapter.public, "base_sha256": adapter.base}
    (folder / GUARANTEE).write_text(json.dumps(facts))


GUARANTEE = "grants.json"  # beside an adapter's weights
USED = ("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Keys on the adapter's origin and training; PEFT itself sets `fan_in_fan_out` by the kind of each layer.
OF_NO_MATTER = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",
)
# Values of `init_lora_weights` that concern A and B alone. Others, as "pissa" and "olora", change the base itself.
STARTS = (True, False, "gaussian", "orthogonal")


def load_adapter(name: str, base: str) -> Adapter:
    """A LoRA in PEFT format for the model named `base`, with the guarantee that `save_adapter` wrote.

    Layers that it does not adapt get a fresh A and a B of zeros: they compute as before, and can learn from there. An
    adapter without a statement of its guarantee is public: the user who names it declares that, as for any model.

    Args:
        name: `assets:NAME`, or a folder.
        base: Name of the base model.

    Raises:
        BadValue: If there is no such adapter, it does not belong to the model, or its configuration has a key that is
            not supported.
    """
    folder = locate_adapter(name)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        known = folder / GUARANTEE
        facts = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
        rank, alpha = config["r"], config["lora_alpha"]
    except Exception as problem:  # safetensors has its own exceptions for bad bytes
        raise BadValue(f"the adapter {name!r} cannot be read ({problem}): name a folder in PEFT format") from problem
    try:
        _check_base(facts.get("base_sha256", weights_hash(base)), base)
        _check_understood(config)
        if config.get("use_rslora"):  # Kalajdzievski 2023: alpha / sqrt(rank)
            alpha *= rank**0.5
        model = fresh_lora(base, rank=rank, alpha=alpha, seed=0)
        start = read_adapter(model, weights_hash(base))
        _check_tensors(tensors, start, _chosen_layers(config, model))
    except WrongAdapter as problem:
        raise BadValue(f"the adapter {name!r}: {problem}") from problem
    arrays = {**start.arrays, **{n: _array(t) for n, t in tensors.items()}}
    public = bool(facts.get("public", not known.is_file()))
    return replace(start, arrays=arrays, grants=tuple(facts.get("grants", ())), public=public)


def _check_understood(config: Mapping[str, Any]) -> None:
    """Refuses, by name, each key that may change the meaning of the tensors and is neither used nor at its default."""
    if config.get("peft_type") != "LORA":
        raise WrongAdapter(f"it is no LoRA, its peft_type is {config.get('peft_type')!r}: name one that is")
    rank, alpha = config["r"], config["lora_alpha"]
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise WrongAdapter(f"r must be a whole number from 1 and lora_alpha a finite one, got {rank!r} and {alpha!r}")
    defaults: dict[str, Any] = LoraConfig().to_dict() | {"init_lora_weights": None}  # type: ignore[no-untyped-call]  # PEFT types no `to_dict`
    other = []
    for key, value in config.items():
        if key in (*USED, *OF_NO_MATTER, "peft_type") or (key == "init_lora_weights" and value in STARTS):
            continue
        if key == "megatron_core" and not config.get("megatron_config"):
            continue  # PEFT reads it for layers of Megatron alone; old ones wrote null
        # Unknown keys, as `merge_weights` of old PEFT, have no effect if they are false, 0 or empty.
        off = not value if key not in defaults else value == defaults[key] or not (value or defaults[key])
        if not off:
            told = f"{key} = {json.dumps(value)[:80]}"
            other.append(told if key in defaults else f"{told} (unknown to the installed PEFT)")
    if other:
        raise WrongAdapter(
            f"only A and B can be used, and its adapter_config.json says more: "
            f"{', '.join(other)}; merge it into a model of its own (PEFT's merge_and_unload), and name "
            "that as the model"
        )


def _check_tensors(tensors: Mapping[str, Tensor], whole: Adapter, chosen: set[str]) -> None:
    """Refuses tensors that do not belong to the layers in the adapter's configuration, and names them.

    Args:
        tensors: Tensors by the names that PEFT saves them under.
        whole: An adapter of all layers that can be adapted.
        chosen: The chosen layers of the base model.
    """
    if strange := sorted(chosen - _layers(whole.arrays)):
        raise WrongAdapter(f"it adapts {_listed(strange)}: only linear layers but the heads can be adapted here")
    if lack := sorted(chosen - _layers(tensors)):
        raise WrongAdapter(f"it has no tensors for {_listed(lack)}, which its target_modules name")
    if surplus := sorted(_layers(tensors) - chosen):
        raise WrongAdapter(f"it has tensors for {_listed(surplus)}, which its target_modules do not name in this model")
    wanted = {n: a.shape for n, a in whole.arrays.items() if _layers([n]) <= chosen}
    found = {n: tuple(t.shape) for n, t in tensors.items()}
    if wrong := sorted(n for n in {*wanted, *found} if wanted.get(n) != found.get(n)):
        shapes = f"{wrong[0]} is {found.get(wrong[0], 'absent')}, not {wanted.get(wrong[0], 'absent')}"
        raise WrongAdapter(f"its tensors are not those of LoRA of rank {whole.rank} on this model: {shapes}")


def _chosen_layers(config: Mapping[str, Any], adapted: PeftModel) -> set[str]:
    """The layers of the base that PEFT adapts under a configuration; `adapted` is the base with LoRA on all layers."""
    targets = config.get("target_modules")
    if not targets:
        raise WrongAdapter("its adapter_config.json names no target_modules: write there which layers it adapts")
    linear = _layers(_adapter_weights(adapted))
    within = tuple(f"{layer}." for layer in linear)
    body = cast(nn.Module, adapted.base_model.model)
    names = [name for name, _ in body.named_modules() if not name.startswith(within)]
    choice = {key: config[key] for key in ("exclude_modules", "layers_to_transform", "layers_pattern") if key in config}
    try:
        if targets == "all-linear":
            targets = sorted(linear)
        asked = LoraConfig(target_modules=targets, **choice)
        return {name for name in names if check_target_module_exists(asked, name)}
    except (ValueError, TypeError, re.error) as problem:
        raise WrongAdapter(f"its choice of layers cannot be read ({problem})") from problem


def _layers(names: Iterable[str]) -> set[str]:
    """The layers of the base model that LoRA weights belong to, from PEFT's names of the weights."""
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}


def _listed(layers: Sequence[str]) -> str:
    return ", ".join(layers[:8]) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")


def public_adapter(name: str, base: str) -> Adapter:
    """`load_adapter` for a server's start: the texts of its LLM count as public.

    Raises:
        BadValue: See `load_adapter`; also if the adapter derives from private text, under a guarantee or not.
    """
    adapter = load_adapter(name, base)
    if not adapter.public:
        raise BadValue(
            f"the adapter {name!r} was trained on private text, as its {GUARANTEE} says, and the LLM's texts would "
            "count as public: start from a public one"
        )
    return adapter
