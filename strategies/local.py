"""Local training only: a baseline in which the request to learn is all that crosses the network."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsynth.federation.messages import Learn
from fedsynth.federation.strategy import Clients, RoundStrategy


@dataclass(frozen=True)
class Config:
    """No options."""


@dataclass(frozen=True)
class State:
    """Completed rounds."""

    round: int = 0


class LocalOnly(RoundStrategy[State]):
    """Each client trains its task model on its own text; the pooled baseline if one client holds all text."""

    config_class = Config
    tasks = ("classification", "instructions")

    @classmethod
    def spends(cls, config: Config) -> bool:  # noqa: ARG003 - it has none that matter
        """False: clients only learn."""
        return False

    @classmethod
    def sends_text(cls, config: Config) -> bool:  # noqa: ARG003 - it has none
        """Private text is all that is learnt."""
        return False

    def initial(self) -> State:
        """No round yet."""
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """Asks every client to learn, without text from the server."""
        seeds = {client: self.server.cell.public_seed("learn", client=client) for client in clients.ids}
        clients.ask_each({client: Learn(seed=seed) for client, seed in seeds.items()})
        return replace(state, round=state.round + 1)
