"""The models on this machine that a first scenario can name: stored ones, else the shipped ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedsynth.models.hub import STORED, locate, models_folder
from fedsynth.rouge import words
from fedsynth.typed import BadValue

TOKENS_OF_A_WORD = 2  # where no tokenizer is at hand: English has 1.3, scripts and names that it knows badly more


@dataclass(frozen=True)
class Model:
    """A model by name.

    Attributes:
        name: As scenarios name it.
        kind: What it is, by its configuration; `unknown` for one that is not on this machine.
        context: Its longest text in tokens; None if unknown.
        size: Bytes of its weights; 0 if unknown.
        chats: It converses.
        small: So small that a CPU trains it in seconds.
    """

    name: str
    kind: Literal["language model", "encoder", "unknown"] = "unknown"
    context: int | None = None
    size: int = 0
    chats: bool = False
    small: bool = False


@dataclass(frozen=True)
class Models:
    """The models of a scenario: the clients' generator and task model, the server's LLM and embedder (None: none)."""

    generator: Model
    task_model: Model
    llm: Model
    embedder: Model | None = None


def model_at(name: str) -> Model:
    """A model as its files describe it; nothing is downloaded.

    Raises:
        BadValue: If the name is that of a shipped, stored or local model, and there is none.
    """
    folder = Path(locate(name))
    if not folder.is_dir():
        return Model(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {**config, **config.get("text_config", {})}
    built = " ".join(config.get("architectures") or [])
    chats = (folder / "chat_template.jinja").is_file() or "chat_template" in _text(folder / "tokenizer_config.json")
    return Model(
        name,
        "language model" if "CausalLM" in built or "ConditionalGeneration" in built else "encoder",
        config.get("max_position_embeddings"),
        sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        chats,
        small=int(config.get("hidden_size") or 0) <= 256,
    )


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def stored() -> list[Model]:
    """The models of the folder of models that can be read, the smallest first."""
    found = []
    for config in sorted(models_folder().glob("*/config.json")):
        try:
            found.append(model_at(f"{STORED}{config.parent.name}"))
        except (BadValue, OSError, ValueError):  # half a download is no model
            continue
    return sorted((model for model in found if model.size), key=lambda model: model.size)


def at_hand(*, instructions: bool, room: int) -> Models:
    """Models for a first scenario: clients have the smallest language model, the server the largest.

    Args:
        instructions: The task is instructions, for which the generator is the task model.
        room: Bytes of weights that the server's LLM may have.
    """
    known = stored()
    causal = [model for model in known if model.kind == "language model"]
    encoders = [model for model in known if model.kind == "encoder"]
    shipped = (
        ("assets:tiny-base", "assets:tiny-professional") if instructions else ("assets:tiny-slm", "assets:tiny-llm")
    )
    generator, llm = map(model_at, shipped)
    if len(causal) > 1 or (causal and not instructions):  # a professional must be another model than the clients'
        generator = causal[0]
        fitting = [model for model in causal[1:] if model.size <= room] or [causal[min(1, len(causal) - 1)]]
        llm = max(fitting, key=lambda model: (model.chats, model.size))
    encoder = encoders[0] if encoders else None
    return Models(generator, encoder or generator, llm, encoder)


def counter(model: Model) -> tuple[Callable[[str], int], str]:
    """What counts a text's length in tokens of a model, and how it is done, in words."""
    if model.kind != "unknown" and (file := Path(locate(model.name)) / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda text: len(tokenizer.encode(text).ids), f"in tokens of {model.name}"
    return lambda text: TOKENS_OF_A_WORD * len(words(text)), f"as {TOKENS_OF_A_WORD} tokens a word, without a tokenizer"


def named(models: Models, **names: str) -> Models:
    """The models with others in place of those that are named (an empty name stands for none)."""
    return replace(models, **{role: model_at(name) for role, name in names.items() if name})
