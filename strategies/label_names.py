"""Labels in words as the only text that clients are sent: the baseline of a server that asks no LLM."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import Learn
from fedsynth.federation.strategy import Clients, RoundStrategy


@dataclass(frozen=True)
class Config:
    """No options."""


@dataclass(frozen=True)
class State:
    """Rounds done."""

    round: int = 0


class LabelNames(RoundStrategy[State]):
    """Each client learns one text per label, the label's wording, beside its own text."""

    config_class = Config

    @classmethod
    def spends(cls, config: Config) -> bool:  # noqa: ARG003 - it has none
        """Nothing is asked of a client but to learn."""
        return False

    def initial(self) -> State:
        """Nothing yet."""
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """The same text to all."""
        labels = self.server.labels
        corpus = Corpus(tuple(map(self.task.wording, labels)), labels, Provenance.PUBLIC)
        seeds = {client: self.server.cell.public_seed("learn", client=client) for client in clients.ids}
        clients.ask_each({client: Learn(seed, corpus) for client, seed in seeds.items()})
        return replace(state, round=state.round + 1)
