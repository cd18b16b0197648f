"""Conversion of GGUF files to ordinary model folders: safetensors, tokenizer, chat template, generation settings."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from fedsynth.typed import BadValue

logging.disable_progress_bar()

MAGIC = b"GGUF"  # the first bytes of such a file
LOADER: Any = AutoModelForCausalLM  # its declared type knows nothing of `output_loading_info`
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
END_OF_TURN = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>")  # each ends a text if the chat template has it
LISTS = (".tokens", ".scores", ".token_type", ".merges")  # lists of a vocabulary: long, and read by transformers
BLOCK = 2**22  # bytes read at once
# Tensors that stretch rotary positions. transformers ignores them, and the model would be another one.
STRETCHED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Facts:
    """A GGUF file's metadata.

    Attributes:
        name: Name of the model.
        architecture: llama.cpp's name of the architecture.
        licence: The licence as the file states it; empty if it states none.
        types: Formats of its tensors, such as Q4_K.
        tied: True if input and output embeddings are one: there is no tensor of the output.
        chat_template: Jinja template; None for a base model.
    """

    name: str
    architecture: str
    licence: str
    types: tuple[str, ...]
    tied: bool
    chat_template: str | None


def check_installed() -> None:
    """Checks that the package that reads GGUF is installed.

    Raises:
        BadValue: If it is not; the message names the extra to install.
    """
    if find_spec("gguf") is None:
        raise BadValue("GGUF files are read by the package gguf: install it with `pip install 'fedsynth[gguf]'`")


def import_gguf(files: Sequence[Path], folder: Path, dtype: str = "float32") -> Facts:
    """Makes a model folder from a GGUF file. The folder appears whole, or not at all.

    Quantized weights stay as coarse as they were: only their format changes.

    Args:
        files: The file, or its chunks in order.
        folder: A new or empty folder.
        dtype: Type of the weights in the folder, float32 or bfloat16.

    Raises:
        BadValue: If the package gguf is missing, the folder is not empty, or the file cannot be converted.
    """
    check_installed()
    if dtype not in DTYPES:
        raise BadValue(f"--dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadValue(f"the folder {str(folder)!r} already holds something: name another one")
    for file in files:
        if not file.is_file():
            raise BadValue(f"no GGUF file {str(file)!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        whole, made = Path(place) / "joined.gguf", Path(place) / "made"
        source = files[0] if len(files) == 1 else join(files, whole)
        made.mkdir()
        shown = files[0].name if len(files) == 1 else f"{files[0].name} to {files[-1].name} ({len(files)} chunks)"
        facts = _convert(source, made, dtype, shown)
        (made / "README.md").write_text(_card(facts, source, dtype, shown), encoding="utf-8")
        for file in made.iterdir():  # safetensors writes files for their owner alone, and a site runs as another user
            shutil.copymode(made / "README.md", file)
        made.rename(folder)
    return facts


def join(files: Sequence[Path], whole: Path) -> Path:
    """Joins chunks into one file, in the given order.

    Raises:
        BadValue: If a later chunk begins as a separate GGUF file.
    """
    with whole.open("wb") as out:
        for file in files:
            with file.open("rb") as piece:
                if out.tell() and piece.read(len(MAGIC)) == MAGIC:
                    raise BadValue(
                        f"{file.name!r} begins as a GGUF file of its own: name the chunks in order, the first one "
                        "first; parts of llama.cpp's own splitting are merged with `llama-gguf-split --merge`"
                    )
                piece.seek(0)
                shutil.copyfileobj(piece, out, BLOCK)
    return whole


def _facts(path: Path, shown: str) -> Facts:
    """Reads a file's metadata and the places of its tensors.

    Raises:
        BadValue: If it is no GGUF file, ends too soon, or is one part of a split file.
    """
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise BadValue(f"{shown} is no GGUF file: it does not begin with {MAGIC.decode()}")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.endswith(LISTS)}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as problem:
        raise BadValue(
            f"{shown} is damaged or ends too soon ({problem}): fetch it again; chunks are named in order, all of them"
        ) from problem
    names = {tensor.name for tensor in reader.tensors}
    architecture = str(fields.get("general.architecture", ""))
    if fields.get("split.count", 1) > 1:
        raise BadValue(f"{shown} is one of {fields['split.count']} parts: merge them with `llama-gguf-split --merge`")
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if names & {*STRETCHED} or (scaling != "none" and architecture != "gpt-oss"):  # transformers reads it for gpt-oss
        raise BadValue(
            f"{shown} stretches its rotary positions, which transformers does not read from GGUF, and would compute "
            "otherwise without: name the original model"
        )
    template = fields.get("tokenizer.chat_template")
    return Facts(
        name=str(fields.get("general.name") or path.stem),
        architecture=architecture,
        licence=str(fields.get("general.license") or ""),
        types=tuple(sorted({tensor.tensor_type.name for tensor in reader.tensors})),
        tied="output.weight" not in names,
        chat_template=None if template is None else str(template),
    )


def _convert(path: Path, folder: Path, dtype: str, shown: str) -> Facts:
    """Writes the model and its tokenizer into an existing folder."""
    facts, more = _facts(path, shown), {}
    if unpacking := getattr(transformers, "GgufConfig", None):
        # If there are kernels for it, newer versions leave weights in GGUF's blocks, in the saved folder, too.
        more["quantization_config"] = unpacking(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model, info = LOADER.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=DTYPES[dtype], output_loading_info=True, **more
        )
    except Exception as problem:  # tokenizers has no exception class of its own
        first = next(iter(str(problem).splitlines()), type(problem).__name__).rstrip(". ")
        raise BadValue(f"{shown} ({facts.architecture or 'of no architecture'}) cannot be read: {first}") from problem
    _check(model, tokenizer, info, facts, shown)
    model.config.tie_word_embeddings = facts.tied
    if facts.tied:
        model.tie_weights()
    # The configuration no longer says that the model is quantized: `from_pretrained` would look for the GGUF file.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    tokenizer.chat_template = facts.chat_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = _ends(tokenizer, facts.chat_template or "")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return facts


def _check(model: Any, tokenizer: Any, info: dict[str, Any], facts: Facts, shown: str) -> None:
    """Checks that the file held the whole model.

    Raises:
        BadValue: If something is missing; the message names it.
    """
    missing = sorted(key for key in info["missing_keys"] if not (facts.tied and key == "lm_head.weight"))
    if wrong := [*missing, *map(str, info["mismatched_keys"])]:
        raise BadValue(f"{shown} lacks weights, or has them in another shape: {len(wrong)}, such as {wrong[0]}")
    if len(tokenizer) > model.config.vocab_size:
        raise BadValue(f"{shown} has {len(tokenizer)} tokens, and weights for {model.config.vocab_size} of them")
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise BadValue(f"{shown} holds weights that are not finite: are its chunks in order?")


def _ends(tokenizer: Any, template: str) -> list[int]:
    """Tokens that end a text; for a chat model also the end of its turn."""
    known = tokenizer.get_vocab()
    turns = {known[token] for token in END_OF_TURN if token in template and token in known}
    return sorted(turns | ({tokenizer.eos_token_id} - {None}))


def _card(facts: Facts, source: Path, dtype: str, shown: str) -> str:
    """The text of the folder's README.md."""
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return (
        f"# {facts.name}\n\n"
        f"Made by `fedsynth model import` from {shown}.\n\n"
        f"- architecture: {facts.architecture}\n"
        f"- weights: {', '.join(facts.types)} in the file, {dtype} here\n"
        f"- chat template: {'yes' if facts.chat_template else 'no'}\n"
        f"- licence, as the file says it: {facts.licence or 'not said'}\n"
        f"- SHA-256 of the file: {digest}\n"
    )
