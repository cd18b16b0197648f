"""Who may import whom: layers from left to right, and who may know Flower, torch and databases."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = """
cli
cli_deployment
site_init site_check site_model site_start site_approve site_loss submit
site_watch superlink deployment
site_ready site_rows
invited
server
reporting forecast
comparison comparison_tables
grids
simulate watch dryrun dry_models client_work probe
fedsynth_sim launch
flower
strategies clients
federation exchanges nodes runs wire firewall tasks recall trackers
classifier public_models world_models world_adapters
judges mentor apprentice selfgen feedback selfcheck
loopcheck
teacher publictext pretraining gates llm remote tuning training examples generation curation evaluation embedding
batches adapters surroundings
models dpsgd participation
hub certificates invitation
scenario scenario_toml scenario_keys privacy lora rouge data datacard tables sources world payload tokenizer checkpoint
corpus csv_faults typed limits losses assets instructions usage proxy folders rowwise rowstore encoding sentences room
"""
LAYER = {module: depth for depth, line in enumerate(LAYERS.split("\n")) for module in line.split()}
MAY_IMPORT = {
    "sqlalchemy": {"sources"},
    "flwr": {
        "wire",
        "federation",
        "exchanges",
        "nodes",
        "clients.app",
        "clients.answer",
        "clients.home",
        "clients.site",
        "clients.process",
        "clients.stock",
        "flower",
        "fedsynth_sim",
    },
    "torch": {
        "models",
        "dpsgd",
        "training",
        "examples",
        "selfcheck",
        "loopcheck",
        "classifier",
        "generation",
        "llm",
        "evaluation",
        "pretraining",
        "public_models",
        "world_models",
        "world_adapters",
        "gates",
        "embedding",
        "batches",
        "adapters",
        "tuning",
    },
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


def violations(sources: Mapping[str, str]) -> list[str]:
    """What is wrong, one line each."""
    wrong = []
    for name, source in sources.items():
        own = name.removeprefix("fedsynth.").split(".")
        if name == "fedsynth":
            own = ["cli"]  # the public face: `fedsynth.run` is imported on first use
        if own[0] not in LAYER:
            wrong.append(f"{name} stands in no layer: add it to LAYERS")
            continue
        for imported in imports(name, source):
            top, *rest = imported.split(".")
            allowed = MAY_IMPORT.get(top)
            if allowed is not None and not {own[0], ".".join(own[:2])} & allowed:
                wrong.append(f"{name} imports {top}")
            other = (rest[0] if rest else "") if top == "fedsynth" else top if top in ("fedsynth_sim", *FOLDERS) else ""
            if other not in LAYER or other == own[0]:
                continue
            if LAYER[other] < LAYER[own[0]] or {other, own[0]} == {"strategies", "clients"}:
                wrong.append(f"{name} imports {imported}")
    return wrong


def test_imports_go_from_left_to_right() -> None:
    assert violations(modules()) == []


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
        ("fedsynth.corpus", "from fedsynth import lora", "fedsynth.corpus imports fedsynth.lora"),
        ("fedsynth.corpus", "from . import lora", "fedsynth.corpus imports fedsynth.lora"),
        ("fedsynth.strategies.fdkt", "from fedsynth.clients import home", "imports fedsynth.clients.home"),
        ("fedsynth.clients.home", "from fedsynth.strategies.fdkt import FDKT", "imports fedsynth.strategies.fdkt"),
        ("fedsynth.strategies.fdkt", "from flwr.app import Message", "fedsynth.strategies.fdkt imports flwr"),
        ("fedsynth.clients.learn", "import flwr", "fedsynth.clients.learn imports flwr"),
        ("fedsynth.synthesis.curation", "import torch.nn as nn", "fedsynth.synthesis.curation imports torch"),
        ("fedsynth.novelty", "", "fedsynth.novelty stands in no layer"),
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
        ("fedsynth.clients.home", "import flwr.app"),
        ("fedsynth.evaluation.utility", "import torch\nfrom fedsynth.models.loading import load"),
        ("fedsynth.data.partition", "import flwr_datasets\nfrom fedsynth.privacy import noise"),
    ],
)
def test_a_good_import_passes(name: str, source: str) -> None:
    assert violations({name: source}) == []
