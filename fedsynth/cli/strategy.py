"""The commands `fedsynth strategy`: a first strategy of one's own, with its test."""

from __future__ import annotations

import keyword
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from fedsynth.typed import BadValue

strategy_app = typer.Typer(no_args_is_help=True, help="Write a strategy of your own: docs/your-own-strategy.md.")
TEMPLATES = {"{}.py": "strategy.template.txt", "test_{}.py": "test_strategy.template.txt"}


@strategy_app.command("new")
def new_command(
    name: Annotated[str, typer.Argument(help="Of the module; its class has it in capitals: my_own gives MyOwn.")],
    folder: Annotated[
        Path, typer.Option("--in", help="That of the scenario; the working directory by default.")
    ] = Path(),
) -> None:
    """Write NAME.py, a complete strategy to change, and test_NAME.py, which needs no Flower and no model."""
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower() or name.startswith("_"):
        raise BadValue(f"NAME must be that of a Python module in small letters, as my_own, got {name!r}")
    if name in sys.stdlib_module_names or name == "fedsynth":
        raise BadValue(f"NAME is that of a module that Python has already: {name!r}; take another one")
    if not folder.is_dir():
        raise BadValue(f"--in: there is no folder {str(folder)!r}")
    there = resources.files("fedsynth.cli")
    kind = "".join(part.capitalize() for part in name.split("_"))
    files = {folder / pattern.format(name): there.joinpath(file) for pattern, file in TEMPLATES.items()}
    if known := [str(file) for file in files if file.exists()]:
        raise BadValue(f"{known[0]} exists, and is not overwritten: take another name")
    for file, template in files.items():
        text = template.read_text(encoding="utf-8").replace("Continued", kind).replace("continued", name)
        file.write_text(text, encoding="utf-8")
    print(f"written: {', '.join(map(str, files))}")
    print(f"test it:  python -m pytest {folder / f'test_{name}.py'}")
    print("run it as an arm of a scenario beside it:")
    print(f"  fedsynth run SCENARIO.toml --set arms.{name}.strategy.use={name}:{kind} --arms local,{name}")
