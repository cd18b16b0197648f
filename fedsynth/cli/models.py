"""The commands `fedsynth model`, which make models ready for scenarios, and a run's adapters for lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

model_app = typer.Typer(no_args_is_help=True, help="Make models ready for scenarios, and for other programs.")


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


@model_app.command("evaluate")
def evaluate_command(
    place: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run that released adapters.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, separated by commas.")] = "mmlu",
) -> None:
    """Print the commands by which lm-eval measures the adapters of a run's last round; nothing is run."""
    from fedsynth.reporting.adapters import lm_eval_command, saved  # torch takes seconds to import

    for folder in saved(place):
        print(lm_eval_command(folder, tasks))
