"""The command `fedsynth init`: a first scenario for a file, with what it chose and why."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fedsynth.system.terminal import console_of
from fedsynth.typed import BadValue


def init_command(
    file: Annotated[str, typer.Argument(help="CSV, JSONL or Parquet: one text a row.")],
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the texts; guessed by its name.")] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of the class names; guessed by its name.")
    ] = None,
    person: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the persons: privacy is per person.")] = None,
    site: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Of the file: each of its values becomes a client; rows are dealt by chance by default.",
        ),
    ] = None,
    response: Annotated[str | None, typer.Option(metavar="COLUMN", help="Instructions: of the responses.")] = None,
    test: Annotated[str, typer.Option(metavar="COLUMN=VALUE", help="The rows to test on; a fifth by default.")] = "",
    generator: Annotated[str, typer.Option(help="The clients' generator, as scenarios name models.")] = "",
    task_model: Annotated[str, typer.Option(help="The clients' task model.")] = "",
    llm: Annotated[str, typer.Option(help="The server's LLM; or http(s)://HOST/v1, an endpoint.")] = "",
    model: Annotated[str, typer.Option(help="Endpoint: the model's name at the server.")] = "",
    key_env: Annotated[str, typer.Option(help="Endpoint: the environment variable that holds the key.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="TOML", help="The scenario; FILE.toml here by default.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Labels, lengths and number of clients may become public.")
    ] = False,
) -> None:
    """Look at FILE and write a scenario for it, with comments: `fedsynth check` and `fedsynth run` take it at once."""
    place = out or Path(f"{Path(file).stem}.toml")
    column, equals, value = test.partition("=")
    endpoint = llm.startswith(("http://", "https://"))
    if place.suffix != ".toml":
        raise BadValue(f"--out must end with .toml, got {str(place)!r}")
    if place.exists():
        raise BadValue(f"{place} exists, and is not overwritten: name another file with --out")
    if not place.absolute().parent.is_dir():
        raise BadValue(f"--out: there is no folder {str(place.parent)!r}")
    if test and not (column and equals and value):
        raise BadValue(f"--test needs COLUMN=VALUE, got {test!r}")
    if label is not None and response is not None:
        raise BadValue("--label is of class names, --response of instructions: name one of the two")
    if endpoint != bool(model):
        raise BadValue("--model names the model of an endpoint: give --llm http://HOST:PORT/v1 and --model together")
    from fedsynth.data import draft, proposal  # pandas takes a second to import
    from fedsynth.models.at_hand import Model, at_hand, named
    from fedsynth.scenario.data import TestRows
    from fedsynth.scenario.server import Endpoint
    from fedsynth.scenario.toml import from_toml

    asked = proposal.Asked(file, text, label, response, person, site, TestRows(column, value) if test else None)
    found = proposal.read_file(asked)
    if found.labels:
        from fedsynth.synthesis.augmentation import check_labels

        try:
            check_labels(list(found.labels))
        except ValueError as problem:
            raise BadValue(f"{problem}: write it in another way in the file") from problem
    gpu = shutil.which("nvidia-smi") is not None
    models = at_hand(instructions=response is not None, room=_memory() // 2)
    models = named(models, generator=generator, task_model=task_model, llm="" if endpoint else llm)
    said = json.dumps(models.llm.name)
    if endpoint:
        Endpoint(llm, model, key_env=key_env or None, api="chat")  # refuses what a run would
        models = replace(models, llm=Model(f"{model} at {llm}"))
        said = f'{{ endpoint = {json.dumps(llm)}, model = {json.dumps(model)}, api = "chat"'
        said += f", key_env = {json.dumps(key_env)} }}" if key_env else " }"
    lengths = proposal.lengths_of(found, models, gpu=gpu)
    words = shlex.join(["fedsynth", *sys.argv[1:]]) if len(sys.argv) > 1 else "fedsynth init"
    written = draft.write(
        found,
        lengths,
        models,
        said,
        name=re.sub(r"[^\w-]+", "-", place.stem).strip("-") or "mine",
        source=_source(file, place),
        command=words if words.isprintable() else "fedsynth init",
    )
    from_toml(written, str(place))
    console = console_of(error=False)
    for line in draft.told(found, lengths, models, gpu=gpu):
        console.print(line, markup=False, soft_wrap=True)
    known = draft.public(found, lengths)
    console.print(
        f"read off the file: {known}; it becomes public when you send this scenario", markup=False, soft_wrap=True
    )
    if not yes:
        if not sys.stdin.isatty():
            raise BadValue(
                f"nothing is written, for want of a terminal to ask at: --yes says it may be public ({known})"
            )
        if not typer.confirm(f"May this become public, and be written to {place}?", default=False):
            console.print("nothing is written", markup=False)
            raise typer.Exit(1)
    place.write_text(written, encoding="utf-8")
    console.print(f"written to {place}; put the task into words in [task], then:", markup=False, soft_wrap=True)
    for line in (f"check {place}", f"run {place} --quick", f"run {place}"):
        console.print(f"  fedsynth {line}", markup=False, soft_wrap=True)


def _source(file: str, place: Path) -> str:
    """The file as the scenario names it: relative to its folder where it lies below, so that both can move together."""
    path = Path(file)
    if not path.exists():
        return file  # in FEDSYNTH_DATA
    whole, folder = path.absolute(), place.absolute().parent
    return str(whole.relative_to(folder)) if whole.is_relative_to(folder) else str(whole)


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
