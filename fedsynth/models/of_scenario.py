"""The models that a scenario names, with their roles."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedsynth.scenario.client import Client
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.server import Endpoint, Server
from fedsynth.scenario.toml import cells

if TYPE_CHECKING:
    from fedsynth.models.loading import Role  # brings torch, which readers of a run need not wait for

STRANGERS = (
    "the shipped models know the simulated hospitals and nothing of your file: a run shows the steps, not what a "
    "method is worth"
)


def strangers(scenario: Scenario) -> list[str]:
    """A line if shipped models are to read data that is not of their world; else none."""
    shipped = any(name.startswith("assets:") for name, _ in models_of(scenario))
    return [STRANGERS] if shipped and scenario.data.world is None else []


def models_of(scenario: Scenario) -> list[tuple[str, Role]]:
    """Every model that the arms of a scenario name, with its role, each pair once; no endpoints."""
    found: dict[tuple[str, Role], None] = {}
    for cell in cells(replace(scenario, seeds=scenario.seeds[:1])):
        found |= dict.fromkeys([*client_models(cell.scenario.client), *server_models(cell.scenario.server)])
    return list(found)


def client_models(client: Client) -> list[tuple[str, Role]]:
    """The models that clients run, with what each is for."""
    task: Role = "task_model" if client.task_training.trains == "all" else "embedder"
    # Instructions need no task model.
    found: list[tuple[str, Role]] = [
        (client.generator, "generator"),
        *((name, task) for name in client.task_models or (client.task_model,) if name),
    ]
    return [*found, (client.embedder, "embedder")] if client.embedder else found


def server_models(server: Server) -> list[tuple[str, Role]]:
    """The server's models with their roles; no endpoints."""
    found: list[tuple[str, Role]] = [
        (name, "llm") for name in (server.llm, server.professional) if isinstance(name, str)
    ]
    return found if server.embedder is None else [*found, (server.embedder, "embedder")]


def endpoints_of(scenario: Scenario) -> list[Endpoint]:
    """Every endpoint that the arms of a scenario name, once; it is not loaded, checked or pinned."""
    found: dict[Endpoint, None] = {}
    for cell in cells(replace(scenario, seeds=scenario.seeds[:1])):
        server = cell.scenario.server
        found |= {model: None for model in (server.llm, server.professional) if isinstance(model, Endpoint)}
    return list(found)
