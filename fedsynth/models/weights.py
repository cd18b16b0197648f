"""Weights of a model, written to a file and read from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes all weights of a model in their precision; one that has several names (the embedding of T5) once."""
    known = _first_names(model)
    own = {name: tensor for name, tensor in model.state_dict().items() if known.get(name, name) == name}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}, str(path))


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads the file of `save_weights` into a model of the same shape."""
    found = load_file(str(path))
    for name, first in _first_names(model).items():
        if name != first and first in found:
            found[name] = found[first]
    model.load_state_dict(found, strict=True)


def _first_names(model: nn.Module) -> dict[str, str]:
    """By each name of a parameter, the first name that this parameter has."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def save_named(model: nn.Module, weights: Iterable[nn.Parameter], path: Path) -> None:
    """Writes some of a model's parameters by name."""
    wanted = {id(weight) for weight in weights}
    named = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if id(p) in wanted}
    save_file(named, str(path))


@torch.no_grad()
def load_named(model: nn.Module, path: Path) -> None:
    """Reads the file of `save_named` into a model that has parameters of those names and shapes."""
    weights = dict(model.named_parameters())
    for name, tensor in load_file(str(path)).items():
        weights[name].copy_(tensor)
