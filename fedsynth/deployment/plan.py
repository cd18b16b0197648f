"""A run on real sites before it is submitted: its sites, and the scenario in a form that can run there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsynth.deployment.invitation import check_installed, public_labels
from fedsynth.deployment.registry import RegisteredSite, sites
from fedsynth.federation.nodes import Deployment
from fedsynth.federation.strategy import load_strategy
from fedsynth.scenario.schema import Participation, Scenario
from fedsynth.scenario.server import check_unguarded
from fedsynth.scenario.toml import cells
from fedsynth.simulation.flower import DEPLOYMENT
from fedsynth.typed import BadValue


def chosen(server: Path, names: Sequence[str]) -> tuple[RegisteredSite, ...]:
    """The sites of a run.

    Args:
        server: The coordinator's folder.
        names: Names in the order of clients; empty for all registered sites.

    Raises:
        BadValue: If there is no site, one is unknown, or one is named twice.
    """
    known = {site.name: site for site in sites(server)}
    if not known:
        raise BadValue(f"no site has been let in: `fedsynth server invite {server} NAME.pub` lets one in")
    if unknown := [name for name in names if name not in known]:
        raise BadValue(f"no site {unknown[0]!r} has been let in; there are {', '.join(known)}")
    if len(set(names)) < len(names):
        raise BadValue(f"a site is named twice: {', '.join(names)}")
    return tuple(known[name] for name in names) if names else tuple(known.values())


def deployed(scenario: Scenario, clients: int) -> Scenario:
    """A scenario as it runs on real sites: one arm and one seed, resolved, and as many clients as there are sites.

    Raises:
        BadValue: With the keys that only a simulation can have.
    """
    planned = cells(scenario)
    if len(planned) != 1:
        arms, seeds = (list(dict.fromkeys(getattr(cell, key) for cell in planned)) for key in ("arm", "seed"))
        raise BadValue(
            f"the arms {', '.join(arms)} under the seeds {', '.join(map(str, seeds))} are {len(planned)} "
            "runs, and each would be charged to the sites' real data: name one arm with --arms, one seed "
            "with --seeds"
        )
    (cell,) = planned
    resolved = cell.scenario
    public_labels(resolved.data)
    if resolved.data.pooled:
        raise BadValue(f"arm {cell.arm!r}: data.pooled puts all clients' text in one place, which only a simulator can")
    check_installed(cell)
    kind, options = load_strategy(resolved.strategy)
    if kind.only_simulated(options):
        raise BadValue(f"arm {cell.arm!r}: {kind.__name__} with these options asks for what no site gives: true texts")
    # A simulated world as source is public; what sites hold is not that world's.
    check_unguarded(resolved.server, guarantee=resolved.client.guarantee, public=resolved.data.public)
    if resolved.participation != Participation():
        raise BadValue(
            f"arm {cell.arm!r}: participation is of simulated clients; real ones are away by themselves, "
            "see server.quorum and server.timeout"
        )
    data = replace(resolved.data, clients=clients, tuned_on=())  # whose numbers are those of simulated clients
    own: dict[str, dict[str, Any]] = {cell.arm: {}} if scenario.arms else {}
    return replace(resolved, data=data, seeds=(cell.seed,), arms=own, run=tuple(own))


def read_deployment(out: Path) -> Deployment:
    """The sites of a run, from its directory.

    Raises:
        BadValue: If it holds no run on sites.
    """
    if not (out / "scenario.toml").is_file():
        raise BadValue(f"{out} holds no run: there is no scenario.toml; start one with --out")
    try:
        found = Deployment.read((out / DEPLOYMENT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadValue(f"{out} holds a simulation: go on with it without --server") from None
    except (OSError, ValueError) as problem:
        raise BadValue(f"{out / DEPLOYMENT}: {problem}") from problem
    if found is None:
        raise BadValue(f"{out / DEPLOYMENT} is empty")
    return found
