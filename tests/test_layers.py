"""Packages import only those before them; who may know Flower, torch and databases."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "base", "system", "privacy", "scenario", "models", "world", "data", "dpsgd", "training", "evaluation",
    "pretraining", "synthesis", "federation", "strategies", "clients", "simulation", "fedsynth_sim", "comparison",
    "forecast", "audit", "deployment", "reporting", "testing", "api", "cli",
)  # fmt: skip
"""Lowest first: each imports only those before it. The base is what stands at the root of `fedsynth`."""
DEPTH = {package: depth for depth, package in enumerate(PACKAGES)}
BASE = {"corpus", "identifiers", "instructions", "limits", "lora", "national_ids", "rouge", "typed"}
MAY_IMPORT = {
    "sqlalchemy": {"data"},
    "flwr": {"federation", "clients", "simulation", "fedsynth_sim", "deployment"},
    "torch": {"models", "dpsgd", "training", "pretraining"},
}
FOLDERS = {"fedsynth": "fedsynth", "strategies": "fedsynth.strategies", "clients": "fedsynth.clients"}
FOLDERS["simulations/fedsynth_sim"] = "fedsynth_sim"


def modules() -> dict[str, str]:
    """Dotted name -> source of every module of the project; links are not followed, so each stands here once."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            if not any((ROOT / folder / part).is_symlink() for part in inside[:1]):
                found[".".join([package, *(part for part in inside if part != "__init__")])] = path.read_text()
    return found


def imports(name: str, source: str) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def package_of(dotted: str) -> str | None:
    """The package that a module or an imported name belongs to; None for what is not of this project."""
    top, *rest = dotted.split(".")
    if top in ("fedsynth_sim", "strategies", "clients"):
        return top
    if top != "fedsynth" or not rest or rest[0] == "__version__":
        return None
    return "base" if rest[0] in BASE else rest[0]


def violations(sources: Mapping[str, str]) -> list[str]:
    """What is wrong, one line each."""
    wrong = []
    for name, source in sources.items():
        own = package_of(name) or "cli"  # the public face: `fedsynth.run` is imported on first use
        if own == "assets":
            continue  # data
        if own not in DEPTH:
            wrong.append(f"{name} stands in no package: add it to PACKAGES")
            continue
        for imported in imports(name, source):
            top = imported.split(".")[0]
            if own not in MAY_IMPORT.get(top, {own}):
                wrong.append(f"{name} imports {top}")
            other = package_of(imported)
            if other in (None, own) or other not in DEPTH:
                continue
            if DEPTH[other] > DEPTH[own] or {other, own} == {"strategies", "clients"}:
                wrong.append(f"{name} imports {imported}")
    return wrong


def rings(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a ring, anywhere in them, or depend on such."""
    below = {
        name: {_module(i, sources) for i in imports(name, source)} - {name, ""} for name, source in sources.items()
    }
    while free := {name for name, needs in below.items() if not needs}:
        below = {name: needs - free for name, needs in below.items() if name not in free}
    return sorted(below)


def _module(imported: str, sources: Mapping[str, str]) -> str:
    """The module that an imported name stands in; empty for what is not of this project."""
    while imported and imported not in sources:
        imported = imported.rpartition(".")[0]
    return "" if imported == "fedsynth" else imported


def test_packages_import_only_those_before_them() -> None:
    assert violations(modules()) == []
    assert {package_of(name) or "cli" for name in modules()} == {*PACKAGES, "assets"}


def test_no_modules_import_each_other_in_a_ring() -> None:
    assert rings(modules()) == []


def test_a_ring_is_found() -> None:
    ring = {
        "fedsynth.a": "def f():\n    from fedsynth.b import c",
        "fedsynth.b": "from fedsynth import a",
        "fedsynth.c": "",
    }
    assert rings(ring) == ["fedsynth.a", "fedsynth.b"]
    assert rings(ring | {"fedsynth.b": ""}) == []


def reached(start: str, sources: Mapping[str, str]) -> set[str]:
    """The modules that a module brings with it, directly or through others."""
    found, left = set[str](), {start}
    while left:
        name = left.pop()
        found.add(name)
        left |= {_module(i, sources) for i in imports(name, sources[name])} - found - {""}
    return found


def test_a_server_brings_no_module_of_the_clients_side() -> None:
    def clients_side(sources: Mapping[str, str]) -> list[str]:
        return sorted(name for name in reached("fedsynth_sim.server_app", sources) if package_of(name) == "clients")

    sources = modules()
    workers = "from .workers import"  # Ray's, in simulations alone
    assert workers in sources["fedsynth_sim.server_app"]
    assert clients_side(sources) == []
    broken = sources["fedsynth.federation.cached_llm"] + "\nfrom fedsynth.clients.client_side import Rules"
    assert "fedsynth.clients.approval" in clients_side(sources | {"fedsynth.federation.cached_llm": broken})


def test_every_folder_is_looked_at() -> None:
    assert {"fedsynth.corpus", "fedsynth.strategies", "fedsynth.clients", "fedsynth_sim.server_app"} <= set(modules())


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        (
            "fedsynth.lora",
            "from fedsynth.training.dp_training import fit",
            "fedsynth.lora imports fedsynth.training.dp_training.fit",
        ),
        (
            "fedsynth.privacy.plan",
            "def f():\n    import fedsynth.federation.records",
            "fedsynth.privacy.plan imports fedsynth.federation.records",
        ),
        ("fedsynth.corpus", "from fedsynth import models", "fedsynth.corpus imports fedsynth.models"),
        ("fedsynth.corpus", "from . import models", "fedsynth.corpus imports fedsynth.models"),
        (
            "fedsynth.strategies.fdkt",
            "from fedsynth.clients import client_side",
            "imports fedsynth.clients.client_side",
        ),
        (
            "fedsynth.clients.client_side",
            "from fedsynth.strategies.fdkt import FDKT",
            "imports fedsynth.strategies.fdkt",
        ),
        ("fedsynth.strategies.fdkt", "from flwr.app import Message", "fedsynth.strategies.fdkt imports flwr"),
        ("fedsynth.training.sft", "import flwr", "fedsynth.training.sft imports flwr"),
        ("fedsynth.synthesis.curation", "import torch.nn as nn", "fedsynth.synthesis.curation imports torch"),
        ("fedsynth.novelty", "", "fedsynth.novelty stands in no package"),
    ],
)
def test_a_bad_import_is_caught(name: str, source: str, wrong: str) -> None:
    (found,) = violations({name: source})
    assert wrong in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("fedsynth.cli.main", "from fedsynth.simulation.launch import launch"),
        (
            "fedsynth.strategies.fdkt",
            "from fedsynth.federation.strategy import Clients\nfrom fedsynth.lora import average",
        ),
        ("fedsynth.clients.client_side", "import flwr.app"),
        ("fedsynth.training.sft", "import torch\nfrom fedsynth.models.loading import load"),
        ("fedsynth.data.partition", "import flwr_datasets\nfrom fedsynth.privacy import noise"),
    ],
)
def test_a_good_import_passes(name: str, source: str) -> None:
    assert violations({name: source}) == []
