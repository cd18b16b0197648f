"""Released texts and adapters of a run as a folder to hand on: JSONL or Parquet, PEFT adapters, and a card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fedsynth.corpus import Provenance
from fedsynth.federation.run.log import SERVER
from fedsynth.models.hub import locate
from fedsynth.models.of_scenario import models_of
from fedsynth.reporting.export_card import Exported, card, guarantee_of, portable
from fedsynth.reporting.texts import Released, released
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import from_toml
from fedsynth.typed import BadValue

Format = Literal["jsonl", "parquet"]
CARD = "README.md"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "grants.json")
NAMED = re.compile(r"round-(\d+)-([A-Za-z_]+?)(?:-(\d+))?")
FLAG = "--without-guarantee"


@dataclass(frozen=True)
class Saved:
    """An adapter in a run's directory.

    Attributes:
        arm: Its arm.
        seed: Its seed.
        kind: `client`, or the server's name for what it made.
        client: The client that released it; -1 for the server.
        folder: PEFT's folder.
        grants: Ids of the privacy grants that its guarantee rests on.
        public: True if only chance or public text made it.
    """

    arm: str
    seed: int
    kind: str
    client: int
    folder: Path
    grants: tuple[str, ...]
    public: bool


def export(
    run: Path,
    out: Path,
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    format: Format = "jsonl",
    without_guarantee: bool = False,
) -> Exported:
    """Writes what a run released into a new folder, with a card. Nothing is read but the run's shareable directory.

    Args:
        run: The run's directory.
        out: The folder; new or empty.
        arms: The arms; none: all that have a guarantee and released something.
        seeds: The seeds; none: all.
        format: Of the texts.
        without_guarantee: Export what has no guarantee as well; the card says so.

    Raises:
        BadValue: If the run is not done, has no such arm or seed, or a named arm has no guarantee; nothing is written.
    """
    _check_places(run, out)
    privacy: dict[str, Any] = json.loads((run / "privacy.json").read_text(encoding="utf-8"))
    scenario = from_toml((run / "scenario.toml").read_text(encoding="utf-8"), str(run / "scenario.toml"))
    texts, adapters = released(run), saved(run)
    for each in texts:
        _check_inside(run, run / each.file)
        if each.corpus.provenance is Provenance.DISCLOSED:
            raise BadValue(f"{each.file} holds private text as it is, which is not exported: remove the file")
    known = sorted({*(each.seed for each in texts), *(each.seed for each in adapters)})
    if absent := [arm for arm in arms if arm not in privacy]:
        raise BadValue(f"the run has no arm {absent[0]!r}; it has {', '.join(privacy)}")
    if missing := [seed for seed in seeds if seed not in known]:
        raise BadValue(f"the run released nothing under seed {missing[0]}; it did under {', '.join(map(str, known))}")
    open_arms = [arm for arm, said in privacy.items() if said["guarantee"] == "none"]
    if not without_guarantee and (named := [arm for arm in arms if arm in open_arms]):
        raise BadValue(
            f"the arm {named[0]!r} has no guarantee ({privacy[named[0]]['line']}): leave it out, or say {FLAG}"
        )
    wanted = [arm for arm in privacy if arm in (arms or privacy) and (without_guarantee or arm not in open_arms)]

    def chosen(arm: str, seed: int) -> bool:
        return arm in wanted and seed in (seeds or known)

    texts = [each for each in texts if chosen(each.arm, each.seed)]
    adapters = [each for each in adapters if chosen(each.arm, each.seed)]
    if not without_guarantee:
        bare = [each.file for each in texts if not (each.corpus.public or each.corpus.grants)]
        bare += [each.folder.relative_to(run).as_posix() for each in adapters if not (each.public or each.grants)]
        if bare:
            raise BadValue(
                f"{bare[0]} names no grant, and is not public: it has no guarantee; leave its arm out, or say {FLAG}"
            )
    if not texts and not adapters:
        left = f"; of {', '.join(open_arms)} with {FLAG}" if open_arms else ""
        raise BadValue(
            f"{str(run)!r} has no released text or adapter of {', '.join(wanted) or 'an arm with a guarantee'}{left}"
        )

    out.mkdir(parents=True, exist_ok=True)
    files = _write_texts(texts, scenario, out, format)
    _write_adapters(adapters, scenario, out)
    skipped = tuple(arm for arm in open_arms if not without_guarantee)
    counted = [(each.arm, each.seed, each.kind, each.client) for each in adapters]
    made = Exported(run, out, tuple(texts), tuple(counted), files, skipped)
    versions = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    (out / CARD).write_text(card(made, scenario, privacy, versions), encoding="utf-8")
    return made


def saved(run: Path) -> list[Saved]:
    """The adapters of a run: of each arm, seed, kind and client that of the last round.

    Raises:
        BadValue: If one is a link to elsewhere, or does not say what its guarantee rests on.
    """
    last: dict[tuple[str, int, str, int], tuple[int, Path]] = {}
    for config in sorted((run / "adapters").glob("*/seed-*/round-*/adapter_config.json")):
        folder = config.parent
        if found := NAMED.fullmatch(folder.name):
            client = SERVER if found[3] is None else int(found[3])
            key = (folder.parent.parent.name, int(folder.parent.name.removeprefix("seed-")), found[2], client)
            last[key] = max(last.get(key, (-1, folder)), (int(found[1]), folder))
    adapters = []
    for place, (_, folder) in sorted(last.items()):
        for name in ADAPTER_FILES:
            _check_inside(run, folder / name)
        facts = json.loads((folder / "grants.json").read_text(encoding="utf-8"))
        adapters.append(Saved(*place, folder, tuple(facts["grants"]), bool(facts["public"])))
    return adapters


def _check_places(run: Path, out: Path) -> None:
    if run.name.endswith(".private"):
        raise BadValue(
            f"{str(run)!r} is a private directory, of which nothing may be handed on: name the run beside it"
        )
    if not run.is_dir():
        raise BadValue(f"there is no directory {str(run)!r}")
    if missing := [name for name in ("privacy.json", "versions.json", "scenario.toml") if not (run / name).is_file()]:
        raise BadValue(f"{str(run)!r} holds no run that is done: there is no {missing[0]}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadValue(f"the folder {str(out)!r} already holds something: name another with --out")


def _check_inside(run: Path, path: Path) -> None:
    """A link could lead into the private directory."""
    if not path.is_file() or not path.resolve().is_relative_to(run.resolve()):
        raise BadValue(f"{path} is no file of the run's directory: nothing else is exported")


def _write_texts(
    texts: Sequence[Released], scenario: Scenario, out: Path, format: Format
) -> dict[tuple[str, str], str]:
    """One file for each arm and kind, all seeds and clients; by (arm, kind) its name."""
    prompt, answer = ("text", "label") if scenario.data.task == "classification" else ("instruction", "response")
    files = {}
    for arm, kind in dict.fromkeys((each.arm, each.kind) for each in texts):
        rows = [
            {
                prompt: question,
                answer: reply,
                "seed": each.seed,
                "client": each.client,
                "provenance": each.corpus.provenance.value,
                "guarantee": guarantee_of(each),
            }
            for each in texts
            if (each.arm, each.kind) == (arm, kind)
            for question, reply in zip(each.corpus.prompts, each.corpus.answers, strict=True)
        ]
        path = out / "data" / arm / f"{kind}.{format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        else:
            pd.DataFrame(rows).to_parquet(path, index=False)
        files[arm, kind] = path.relative_to(out).as_posix()
    return files


def _write_adapters(adapters: Sequence[Saved], scenario: Scenario, out: Path) -> None:
    """PEFT's folders as they are, but that a base model has its name and not its place on this machine."""
    names = {}
    for name, _ in models_of(scenario):
        with suppress(BadValue):  # a model that is not here
            names[locate(name)] = name
    for each in adapters:
        place = out / "adapters" / each.arm / f"seed-{each.seed}" / each.folder.name
        place.mkdir(parents=True)
        for name in ADAPTER_FILES:
            shutil.copyfile(each.folder / name, place / name)
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        base = str(config["base_model_name_or_path"])
        config["base_model_name_or_path"] = portable(names.get(base, base))
        (place / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
