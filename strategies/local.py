"""Local training only: the baseline in which nothing but the request to learn crosses the network."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsynth.federation.messages import Learn
from fedsynth.federation.strategy import Clients, RoundStrategy


@dataclass(frozen=True)
class Config:
    """No options."""


@dataclass(frozen=True)
class State:
    """Rounds done."""

    round: int = 0


class LocalOnly(RoundStrategy[State]):
    """Each client trains its task model on its own text; also the pooled baseline, where one client holds all text."""

    config_class = Config
    tasks = ("classification", "instructions")

    @classmethod
    def spends(cls, config: Config) -> bool:  # noqa: ARG003 - it has none that matter
        """Nothing is asked of a client but to learn."""
        return False

    @classmethod
    def sends_text(cls, config: Config) -> bool:  # noqa: ARG003 - it has none
        """Private text is all that is learnt."""
        return False

    def initial(self) -> State:
        """Nothing yet."""
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """One empty `Learn`."""
        seeds = {client: self.server.cell.public_seed("learn", client=client) for client in clients.ids}
        clients.ask_each({client: Learn(seed=seed) for client, seed in seeds.items()})
        return replace(state, round=state.round + 1)
