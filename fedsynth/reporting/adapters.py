"""The adapters of a finished run as commands for the Language Model Evaluation Harness (`lm-eval`)."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from fedsynth.models.chat import converses
from fedsynth.models.loading import load_tokenizer
from fedsynth.typed import BadValue

NAMED = re.compile(r"round-(\d+)-(.+)")


def saved(out: Path) -> list[Path]:
    """The folders of a run's adapters: of each arm, seed and maker those of the last round.

    Raises:
        BadValue: If the run has none.
    """
    last: dict[tuple[Path, str], tuple[int, Path]] = {}
    for config in sorted((out / "adapters").glob("*/seed-*/round-*/adapter_config.json")):
        folder = config.parent
        if found := NAMED.fullmatch(folder.name):
            key, number = (folder.parent, found[2]), int(found[1])
            last[key] = max(last.get(key, (-1, folder)), (number, folder))
    if not last:
        raise BadValue(f"{out} holds no adapter: methods that release text alone have none")
    return [folder for _, folder in last.values()]


def lm_eval_command(folder: Path, tasks: str) -> str:
    """The command that measures an adapter on its base model.

    Raises:
        BadValue: If the adapter's configuration cannot be read, or its base model is not here.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError) as problem:
        raise BadValue(f"{folder}: adapter_config.json cannot be read ({problem})") from problem
    chat = converses(load_tokenizer(f"{base}@{revision}" if revision else base))
    arguments = {"pretrained": base, "peft": str(folder.absolute()), "dtype": "float32"}
    if revision:
        arguments["revision"] = revision
    if awkward := [value for value in arguments.values() if "," in value or "=" in value]:
        raise BadValue(f"lm-eval takes no comma or equals sign in {awkward[0]!r}: move the folder")
    words = ["lm_eval", "--model", "hf", "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    return shlex.join([*words, "--tasks", tasks, *(["--apply_chat_template"] if chat else [])])
