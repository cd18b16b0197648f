"""Load a model and tokenizer, attach LoRA, read and write an adapter."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from fedsynth.lora import Adapter
from fedsynth.typed import BadValue

logging.set_verbosity_error()  # the head of a task model is new on purpose; that warning would stand in every log
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own, about its own calls


def locate(name: str) -> str:
    """What `from_pretrained` is given: the folder of a shipped model, a folder, or a Hugging Face name.

    Raises:
        BadValue: If it is neither a shipped model nor a folder, and cannot be a Hugging Face name.
    """
    if name.startswith("assets:"):
        folder = Path(str(resources.files("fedsynth.assets"))) / name.removeprefix("assets:")
        if not (folder / "config.json").is_file():
            known = sorted(p.parent.name for p in folder.parent.glob("*/config.json"))
            raise BadValue(f"no shipped model {name!r}; there are {', '.join('assets:' + k for k in known)}")
        return str(folder)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadValue(f"the model folder {name!r} holds no config.json")
        return str(path.absolute())
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise BadValue(f"the model path {name!r} does not exist")
    return name


def check(name: str) -> None:
    """Refuses a model that cannot be loaded, before any work is spent.

    Raises:
        BadValue: With the way out.
    """
    where = locate(name)
    try:
        load_tokenizer(name)
    except (OSError, ValueError) as problem:
        raise BadValue(
            f"the model {name!r} cannot be loaded: {str(problem).splitlines()[0]} Give a folder with a saved model, "
            f"or a Hugging Face name that this machine can reach (looked for {where!r})"
        ) from problem


@lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Any:
    """The tokenizer; padding falls back to the end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(locate(name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@lru_cache(maxsize=4)
def _causal(name: str) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(locate(name), dtype=torch.float32)
    return model.eval()


def load_causal(name: str) -> nn.Module:
    """A causal language model of one's own to train, in float32 (read from disk once per process)."""
    return copy.deepcopy(_causal(name))


@lru_cache(maxsize=4)
def _classifier(name: str, classes: int) -> tuple[nn.Module, tuple[str, ...]]:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        locate(name), num_labels=classes, dtype=torch.float32, output_loading_info=True
    )
    model.config.pad_token_id = load_tokenizer(name).pad_token_id
    return model.eval(), tuple(sorted(info["missing_keys"]))


def load_classifier(name: str, classes: int, seed: int) -> nn.Module:
    """A model for sequence classification with a new head.

    Args:
        name: The pretrained model.
        classes: Number of labels.
        seed: Public seed of the head.
    """
    pretrained, new = _classifier(name, classes)
    model = copy.deepcopy(pretrained)
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for key in new:
            if weights[key].dim() > 1:
                weights[key].normal_(std=0.02, generator=generator)
            else:
                weights[key].zero_()
    return model


def attach_lora(model: nn.Module, *, rank: int, alpha: float, seed: int) -> PeftModel:
    """LoRA on every linear layer but the output head (Hu et al. 2021; all-linear as in QLoRA, section 4).

    A starts at Kaiming-uniform from `seed` (public), B at zero, so the model starts as its base.

    Raises:
        BadValue: If the model has no linear layer to adapt.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if not targets:
        raise BadValue(f"{type(model).__name__} has no linear layer that LoRA could adapt")
    adapted = get_peft_model(model, _lora_config(rank, alpha, targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_A" in name:
                nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)
    return adapted


def _lora_config(rank: int, alpha: float, targets: list[str]) -> LoraConfig:
    scale: Any = alpha  # PEFT's annotation says int; it only divides by it
    return LoraConfig(r=rank, lora_alpha=scale, lora_dropout=0.0, target_modules=targets)


def weights_hash(name: str) -> str:
    """SHA-256 over configuration and safetensors of a local model; over the name alone of one from the hub."""
    where = locate(name)
    return _hash_folder(where) if Path(where).is_dir() else hashlib.sha256(where.encode()).hexdigest()


@lru_cache(maxsize=8)
def _hash_folder(folder: str) -> str:
    digest = hashlib.sha256()
    for file in [*sorted(Path(folder).glob("*.safetensors")), Path(folder) / "config.json"]:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def read_adapter(model: PeftModel, base: str) -> Adapter:
    """The LoRA weights of a model as named arrays, without a guarantee: `privacy.release` gives one."""
    config = cast(LoraConfig, model.peft_config["default"])
    arrays = {n: t.detach().cpu().float().numpy().copy() for n, t in get_peft_model_state_dict(model).items()}
    return Adapter(dict(sorted(arrays.items())), config.r, float(config.lora_alpha), base)


def save_adapter(adapter: Adapter, base: str, folder: Path) -> None:
    """Writes an adapter so that `PeftModel.from_pretrained` loads it on top of the model named `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = sorted({n.removeprefix("base_model.model.").partition(".lora_")[0] for n in adapter.arrays})
    config = _lora_config(adapter.rank, adapter.alpha, modules)
    config.task_type, config.base_model_name_or_path, config.inference_mode = "CAUSAL_LM", base, True
    config.save_pretrained(str(folder))
    tensors = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in adapter.arrays.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "grants.json").write_text(json.dumps({"grants": list(adapter.grants), "base_sha256": adapter.base}))


def save_weights(model: nn.Module, path: Path) -> None:
    """All weights of a model, in the precision they have."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, str(path))


def load_weights(model: nn.Module, path: Path) -> None:
    """What `save_weights` wrote, into a model of the same shape."""
    model.load_state_dict(load_file(str(path)), strict=True)


def one_thread() -> None:
    """One thread for this process: two per worker on a shared machine run at half the speed of one."""
    torch.set_num_threads(1)


def device() -> torch.device:
    """A CUDA GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
