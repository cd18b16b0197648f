"""The commands `fedsynth model`, which make models ready for scenarios."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

model_app = typer.Typer(no_args_is_help=True, help="Make models ready for scenarios.")


@model_app.command("import")
def import_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="A GGUF file; or its chunks, in order.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the model: new or empty.")],
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32, or bfloat16 at half the size.")] = "float32",
) -> None:
    """Make a model folder from a GGUF file: safetensors, tokenizer, chat template, generation settings."""
    from fedsynth.models.gguf import import_gguf  # torch takes seconds to import

    facts = import_gguf(files, folder, dtype)
    chat = "with a chat template" if facts.chat_template else "a base model without a chat template"
    print(
        f"{folder}: {facts.name} ({facts.architecture}, {', '.join(facts.types)} -> {dtype}), {chat}; licence, as the "
        f"file says it: {facts.licence or 'not said'}"
    )
