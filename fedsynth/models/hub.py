"""The place of a model (shipped, stored, in a folder, or on the hub), its version, and the way out if it is missing."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from fedsynth.system.proxy import UNREADABLE
from fedsynth.typed import BadValue

hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its messages on retries would precede our own line with the way out

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
COMMIT = re.compile(r"[0-9a-f]{40}")
STORED = "models:"  # prefix of the name of a model in the folder of models
STORED_NAME = re.compile(r"\w[\w.+-]*")
FETCHED = ("all-minilm-l6-v2", "gemma-3-270m", "qwen2.5-coder-1.5b-instruct", "smollm2-135m-instruct")
"""The models that `simulations/models/get.py` puts there."""


def locate(name: str) -> str:
    """The place to load from: a shipped or stored model's folder, a folder, or a Hugging Face name and any `@revision`.

    Raises:
        BadValue: If the name is none of these, or the folder holds GGUF files.
    """
    if name.startswith("assets:"):
        folder = Path(str(resources.files("fedsynth.assets"))) / name.removeprefix("assets:")
        if not (folder / "config.json").is_file():
            known = sorted(p.parent.name for p in folder.parent.glob("*/config.json"))
            raise BadValue(f"no shipped model {name!r}; there are {', '.join('assets:' + k for k in known)}")
        return str(folder)
    stored = name.startswith(STORED)
    path = stored_folder(name) if stored else Path(name)
    if found := _gguf_in(path):
        raise BadValue(
            f"the model {name!r} is a GGUF file: make a folder of it with `fedsynth model import {found} FOLDER`, and "
            "name FOLDER"
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadValue(f"the model folder {name!r} holds no config.json: name the folder of a saved model")
        return str(path.absolute())
    if stored:
        fetched = path.name in FETCHED
        make = f"python simulations/models/get.py {path.name}" if fetched else f"fedsynth model import FILE {path}"
        raise BadValue(f"no model {name!r}: there is no folder {str(path)!r}; make it with `{make}`")
    if path.is_absolute() or name.startswith(".") or name.partition("@")[0].count("/") > 1:
        raise BadValue(
            f"the model path {name!r} does not exist: make the model first (`fedsynth pretrain`; a shipped scenario "
            "says how in its first lines), or name a folder or a Hugging Face model"
        )
    return name


def models_folder() -> Path:
    """The folder of the models named `models:NAME`: FEDSYNTH_MODELS, or a cache folder of the user.

    Raises:
        BadValue: If FEDSYNTH_MODELS is a relative path: processes of a run have other working directories.
    """
    if named := os.environ.get("FEDSYNTH_MODELS", ""):
        if not Path(named).is_absolute():
            raise BadValue(f"FEDSYNTH_MODELS must be an absolute path, got {named!r}")
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "fedsynth" / "models"


def stored_folder(name: str) -> Path:
    """The folder that `models:NAME` means; it need not exist.

    Raises:
        BadValue: If NAME could lead elsewhere.
    """
    wanted = name.removeprefix(STORED)
    if not STORED_NAME.fullmatch(wanted):
        raise BadValue(f"the model {name!r} must be {STORED}NAME, where NAME is one folder in {str(models_folder())!r}")
    return models_folder() / wanted


def _gguf_in(path: Path) -> Path | None:
    """A GGUF file at this path, or in this folder if it has no weights that can be loaded."""
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    return min(path.glob("*.gguf"), default=None)


def elsewhere(name: str) -> bool:
    """True if a model's name is a folder that is not on this machine; it may be at a site."""
    path = stored_folder(name) if name.startswith(STORED) else Path(name)
    return path.is_absolute() and not path.exists()


def locate_adapter(name: str) -> Path:
    """The folder of a shipped adapter, or a folder, in PEFT format.

    Raises:
        BadValue: If there is no such adapter.
    """
    shipped = Path(str(resources.files("fedsynth.assets")))
    folder = shipped / name.removeprefix("assets:") if name.startswith("assets:") else Path(name)
    if not (folder / "adapter_config.json").is_file():
        known = sorted(f"assets:{p.parent.name}" for p in shipped.glob("*/adapter_config.json"))
        raise BadValue(
            f"no adapter {name!r}: name a folder that holds adapter_config.json and adapter_model.safetensors, or one "
            f"of {', '.join(known)}"
        )
    return folder


def place_of(name: str) -> dict[str, Any]:
    """Arguments of every `from_pretrained`: place and revision. Code that comes with a model never runs."""
    where = locate(name)
    repository, _, revision = (where, "", "") if Path(where).is_dir() else where.partition("@")
    return {
        "pretrained_model_name_or_path": repository,
        "revision": revision or "main",
        "local_files_only": Path(where).is_dir(),
        "trust_remote_code": False,
    }


def fetch(what: Any, name: str, **more: Any) -> Any:
    """Calls `what.from_pretrained`; a failure becomes one line with the reason and the way out.

    Raises:
        BadValue: If it cannot be loaded.
    """
    try:
        return what.from_pretrained(**place_of(name), **more)
    except (OSError, ValueError, ImportError, RuntimeError, httpx.HTTPError, httpx.InvalidURL) as problem:
        raise BadValue(_why(name, problem)) from problem


def _why(name: str, problem: BaseException) -> str:
    """One line with the reason and the way out. It also reads the causes, as transformers wraps the hub's message."""
    place = place_of(name)
    repository = place["pretrained_model_name_or_path"]
    causes: list[BaseException] = [problem]
    while (deeper := causes[-1].__cause__ or causes[-1].__context__) is not None and deeper not in causes:
        causes.append(deeper)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if place["local_files_only"]:
        causes.clear()  # a folder: the hub is not involved
    if caused_by(httpx.InvalidURL):
        return f"the model {name!r} cannot be asked for: {UNREADABLE} ({causes[-1]})"
    if caused_by(GatedRepoError):
        return (
            f"the model {name!r} is gated: accept its licence at https://huggingface.co/{repository} "
            "and log in with `hf auth login`"
        )
    if caused_by(RepositoryNotFoundError):
        return f"no model {name!r} on the hub: check the name; a private one needs `hf auth login`"
    if caused_by(RevisionNotFoundError):
        return f"the model {repository!r} has no revision {place['revision']!r}: name a branch, a tag or a commit of it"
    if caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, httpx.TransportError):
        return (
            f"the model {name!r} is not on this machine, and the hub cannot be reached: download it beforehand with "
            f"`{download_command(place)}` and set HF_HUB_OFFLINE=1, or name a folder"
        )
    first = next(iter(str(problem).splitlines()), type(problem).__name__).rstrip(".: ")
    return (
        f"the model {name!r} cannot be loaded: {first}. Give a folder with a saved model, or a Hugging Face name that "
        f"this machine can reach (looked for {repository!r})"
    )


def download_command(place: Mapping[str, Any]) -> str:
    """The command that downloads a model of the hub to this machine."""
    revision = "" if place["revision"] == "main" else f" --revision {place['revision']}"
    return f"hf download {place['pretrained_model_name_or_path']}{revision}"


@lru_cache(maxsize=16)
def config_of(name: str) -> Any:
    """A model's configuration, read once per process.

    Raises:
        BadValue: If it cannot be loaded.
    """
    return fetch(AutoConfig, name)


def file_of(name: str, file: str) -> str | None:
    """The path of a file of a model, downloaded if necessary; None if there is no such file or it cannot be fetched."""
    place = place_of(name)
    place.pop("trust_remote_code")
    path_or_name = place.pop("pretrained_model_name_or_path")
    try:
        found: str | None = cached_file(path_or_name, file, _raise_exceptions_for_missing_entries=False, **place)
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as problem:
        raise BadValue(_why(name, problem)) from problem
    return found


def pin(name: str) -> str:
    """A name that always means the same model: `org/name@<commit>` for one from the hub; others stay as they are.

    If the hub cannot be reached, the commit is that of the copy on this machine.

    Raises:
        BadValue: If the model is not found.
    """
    where = locate(name)
    repository, _, revision = where.partition("@")
    if Path(where).is_dir() or COMMIT.fullmatch(revision):
        return name
    config_of(name)  # reports a missing model
    commit = extract_commit_hash(file_of(name, "config.json"), None)
    if commit is None:
        raise BadValue(f"the hub gives no commit for the model {name!r}: name one, as {repository}@COMMIT")
    return f"{repository}@{commit}"


def version_of(name: str) -> dict[str, str]:
    """A run's record of a model's version: the revision of one from the hub, else the hash of its files."""
    if Path(locate(name)).is_dir():
        return {"sha256": weights_hash(name)}
    return {"revision": pin(name).partition("@")[2]}


def weights_hash(name: str) -> str:
    """SHA-256 over configuration, tokenizer and safetensors of a local model; over the pinned name of one from the hub.

    Raises:
        BadValue: If a model from the hub without a commit in its name is not found.
    """
    where = locate(name)
    return _hash_folder(where) if Path(where).is_dir() else hashlib.sha256(pin(where).encode()).hexdigest()


@lru_cache(maxsize=8)
def _hash_folder(folder: str) -> str:
    digest = hashlib.sha256()
    files = {file for pattern in ("*.safetensors", *TOKENIZER_FILES) for file in Path(folder).glob(pattern)}
    for file in [*sorted(f for f in files if f.is_file()), Path(folder) / "config.json"]:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
