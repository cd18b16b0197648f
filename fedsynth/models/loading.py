"""Loading of models by role and kind."""

from __future__ import annotations

import copy
import json
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging
from transformers.utils.hub import has_file

from fedsynth.models.hub import config_of, download_command, fetch, file_of, place_of
from fedsynth.scenario.hardware import Precision
from fedsynth.system.memory import give_back
from fedsynth.typed import BadValue

logging.set_verbosity_error()  # the head of a task model is new on purpose; its warning would be in every log
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about its own calls


Kind = Literal["causal", "seq2seq", "encoder"]
Role = Literal["generator", "llm", "task_model", "embedder"]

_LM = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
# The kinds of models that fit a role, and the class that loads them.
LOADERS: dict[Role, dict[str, Any]] = {
    "generator": _LM,
    "llm": _LM,
    "task_model": dict.fromkeys(get_args(Kind), AutoModelForSequenceClassification),
    "embedder": dict.fromkeys(get_args(Kind), AutoModel),
}
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "vocab.json",
    "vocab.txt",
)


def kind_of(config: Any) -> Kind:
    """The kind of a model with this configuration.

    Raises:
        BadValue: If it is none of the three kinds.
    """
    if config.is_encoder_decoder:
        return "seq2seq"
    # BERT and similar models could be built as decoders, too; their checkpoints are encoders.
    if type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False):
        return "encoder"
    if type(config) in AutoModelForCausalLM._model_mapping:
        return "causal"
    raise BadValue(f"a model of type {config.model_type!r} is no causal LM, seq2seq LM or encoder of text")


def fits(name: str, role: Role) -> Kind:
    """The kind of a model, if it fits the role.

    Raises:
        BadValue: If it does not fit; the message names the roles that it fits. Also if its configuration cannot be
            loaded.
    """
    config = config_of(name)
    kind = kind_of(config)
    able = [r for r, kinds in LOADERS.items() if kind in kinds and type(config) in kinds[kind]._model_mapping]
    if role not in able:
        raise BadValue(
            f"the model {name!r} ({config.model_type}: {kind}) cannot be the {role}; it fits as {' or '.join(able)}"
        )
    return kind


def check(name: str, role: Role) -> None:
    """Refuses a model that cannot be loaded or does not fit its role, before any work.

    It downloads the missing files of a hub model once, instead of every client.

    Raises:
        BadValue: If it is refused; the message names the way out.
    """
    fits(name, role)
    tokenizer, known = load_tokenizer(name), getattr(config_of(name).get_text_config(), "vocab_size", None)
    if known is not None and len(tokenizer) > known:
        raise BadValue(
            f"the model {name!r} knows {known} tokens, its tokenizer {len(tokenizer)}: they do not belong together"
        )
    _check_weights(name)


def _check_weights(name: str) -> None:
    """Refuses a model without safetensors: other formats can run code when they are read."""
    parts = ["model.safetensors"]
    if index := file_of(name, "model.safetensors.index.json"):
        parts = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    missing = [part for part in parts if not file_of(name, part)]
    if not missing:
        return
    place = place_of(name)
    where, revision, local = (place[k] for k in ("pretrained_model_name_or_path", "revision", "local_files_only"))
    if any(has_file(where, f"pytorch_model.bin{end}", revision=revision) for end in ("", ".index.json")):
        raise BadValue(
            f"the model {name!r} has weights as pickle (.bin) only, which can run code when they are read: where "
            "you trust it, load it once with `transformers`, write it with `save_pretrained(FOLDER)`, name FOLDER"
        )
    if local:
        raise BadValue(f"the model folder {name!r} holds no {missing[0]}: save the model into it, too")
    raise BadValue(
        f"the weights of the model {name!r} ({missing[0]}) are not on this machine: download them beforehand "
        f"with `{download_command(place)}`, or name a folder"
    )


@lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Any:
    """The model's tokenizer; padding falls back to the end-of-text token.

    Raises:
        BadValue: If there is no tokenizer.
    """
    tokenizer = fetch(AutoTokenizer, name)
    if not any(file_of(name, file) for file in VOCABULARIES):  # transformers would accept an empty vocabulary
        raise BadValue(
            f"the model {name!r} has no tokenizer beside its weights: save its tokenizer into the folder, "
            f"as one of {', '.join(VOCABULARIES)}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, role: Role, *, dtype: Any = torch.float32, **more: Any) -> Any:
    """A model in evaluation mode, for its role; `more` are further arguments of `from_pretrained`.

    Dropout is off in training, too: an example's gradient must not depend on its batch, nor a fit on torch's global
    random state. A task model has token dropout instead.

    Raises:
        BadValue: If it cannot be loaded, has no safetensors, does not fit the role, or lacks weights that it needs.
    """
    return _load(name, role, dtype=dtype, **more)[0]


def _load(name: str, role: Role, *, dtype: Any = torch.float32, classes: int = 2, **more: Any) -> tuple[Any, set[str]]:
    """The model, and the names of its parameters that no file holds: those of a new head."""
    loader = LOADERS[role][fits(name, role)]
    _check_weights(name)
    config = copy.deepcopy(config_of(name))
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(part, key, type(value)(0))
        if role == "task_model" and hasattr(part, "use_cache"):
            part.use_cache = False  # a classifier reads a text once; else every layer copies its keys and values
    more |= {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if role == "task_model":
        config.num_labels = classes
        more["ignore_mismatched_sizes"] = True  # replaces a checkpoint's head for another task
    model, info = fetch(loader, name, **more)
    new = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    lacking = sorted(key for key in new if not _may_be_new(key, role, model.base_model_prefix))
    if lacking:
        raise BadValue(
            f"the weights of the model {name!r} are not those of a {type(model).__name__}: {len(lacking)} are missing "
            f"or of another shape, such as {lacking[0]!r}; it cannot be the {role}"
        )
    return model, new


def _may_be_new(key: str, role: Role, body: str) -> bool:
    """True if a role does not need a pretrained parameter: a task model's head, or one that an embedder ignores."""
    if role == "task_model":
        return not key.startswith(f"{body}.") or "pooler" in key
    return role == "embedder" and ("pooler" in key or key.startswith("decoder."))


@lru_cache(maxsize=4)
def _generator(name: str, dtype: Any) -> nn.Module:
    model: nn.Module = load_model(name, "generator", dtype=dtype)
    return model


def load_generator(name: str, precision: Precision = "float32") -> nn.Module:
    """A new copy of a causal or seq2seq language model to train (read from disk once per process).

    Raises:
        BadValue: See `load_model`.
    """
    return copy.deepcopy(_generator(name, dtype_of(name, precision))).requires_grad_(True)


def load_frozen(name: str, precision: Precision = "float32") -> nn.Module:
    """A causal or seq2seq language model that shares its weights with every other one from here; none may change them.

    Raises:
        BadValue: See `load_model`.
    """
    base = _generator(name, dtype_of(name, precision))
    return copy.deepcopy(base, {id(weight): weight for weight in base.parameters()}).requires_grad_(False)


def forget_weights() -> None:
    """Drops the weights that this process keeps of clients' models, and gives their memory back."""
    _generator.cache_clear()
    _classifier.cache_clear()
    give_back()


NARROWEST = 256  # below this width a CPU loses more by converting than it gains by computing in bfloat16 (measured)


def wide(name: str) -> bool:
    """True if a model is wide enough to gain from bfloat16, and to be bound by arithmetic, on a CPU.

    Raises:
        BadValue: If the model's configuration cannot be loaded.
    """
    return bool(getattr(config_of(name).get_text_config(), "hidden_size", 0) >= NARROWEST)


def dtype_of(name: str, precision: Precision) -> Any:
    """The torch type of a model's weights: `auto` is bfloat16 if that pays and its rounding was measured.

    Raises:
        BadValue: If the model's configuration cannot be loaded.
    """
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if torch.cuda.is_available():
        return torch.float32  # the independence of examples' gradients in bfloat16 was measured on CPUs only
    return torch.bfloat16 if wide(name) and computes_in_bfloat16() else torch.float32


@lru_cache(maxsize=1)
def computes_in_bfloat16() -> bool:
    """True if the CPU has instructions for bfloat16 (AVX512_BF16 or AMX)."""
    facts = Path("/proc/cpuinfo")
    return facts.is_file() and bool({"avx512_bf16", "amx_bf16"} & set(facts.read_text().split()))


def context_of(config: Any) -> int | None:
    """Longest text in tokens; None for a model without a limit (the relative positions of T5)."""
    longest: int | None = getattr(config, "max_position_embeddings", None)
    return longest


@lru_cache(maxsize=4)
def _classifier(name: str, classes: int) -> tuple[nn.Module, tuple[str, ...]]:
    model, new = _load(name, "task_model", classes=classes)
    model.config.pad_token_id = load_tokenizer(name).pad_token_id
    return model, tuple(sorted(new))


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
            if key not in weights:
                continue  # a buffer
            if weights[key].dim() > 1:
                weights[key].normal_(std=0.02, generator=generator)
            else:
                weights[key].fill_(0.0 if key.endswith("bias") else 1.0)  # a gain of a norm starts at 1
    return model
