"""Private evolution: clients vote for the server's texts, and those with the most votes are kept and varied.

Aug-PE (arXiv 2403.01749), over clients as PrE-Text has it (arXiv 2406.02958). A client trains nothing for the server:
it sends one noised count for each text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fedsynth.corpus import Corpus, pool
from fedsynth.evaluation.fidelity import distinct
from fedsynth.federation.messages import Learn, Vote
from fedsynth.federation.run.log import SERVER
from fedsynth.federation.strategy import Clients, Planner, RoundStrategy
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.client import Client
from fedsynth.strategies.options import PrivateEvolutionOptions
from fedsynth.synthesis.augmentation import Demonstrating, bare_misfit
from fedsynth.synthesis.curation import yields
from fedsynth.synthesis.label_check import check_of
from fedsynth.synthesis.voting import by_chance, kept, permuted
from fedsynth.synthesis.writing import NOTHING, Curation, write


@dataclass(frozen=True)
class State:
    """Completed rounds, and the texts for the votes of the next one; None before the first."""

    round: int = 0
    candidates: Corpus | None = None


class PrivateEvolution(RoundStrategy[State]):
    """An LLM's texts, chosen by clients' votes round by round."""

    config_class = PrivateEvolutionOptions
    config: PrivateEvolutionOptions

    @classmethod
    def spends(cls, config: PrivateEvolutionOptions) -> bool:
        """True unless no client is asked to vote."""
        return config.asks

    @classmethod
    def trains_generator(cls, config: PrivateEvolutionOptions) -> bool:  # noqa: ARG003 - whatever its options say
        """False: clients vote only."""
        return False

    @classmethod
    def planners(cls, config: PrivateEvolutionOptions, client: Client) -> tuple[Planner, ...]:  # noqa: ARG003 - whatever its options say
        """That of votes."""
        return (client.vote_plan,)

    def initial(self) -> State:
        """No text yet. An LLM whose context has no room for a prompt fails here, before clients spend anything."""
        c = self.config
        if why := bare_misfit(self.server.llm, self.server.labels, "none", c.max_new_tokens, self.task):
            raise ValueError(
                f"a prompt of the labels' names alone and strategy.max_new_tokens = {c.max_new_tokens} new tokens do "
                f"not fit into the server LLM ({why}): use fewer new tokens, or an LLM with a longer context"
            )
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """One generation: clients vote, the texts with most votes are kept and learnt, the LLM varies them."""
        c = self.config
        candidates = state.candidates or self._written(NOTHING, "candidates", c.num_texts)
        # Counts of private texts, each with noise; nothing else that reaches the server derives from private text.
        best = self._chosen(clients, candidates)
        more = NOTHING
        last = state.round + 1 == self.server.cell.scenario.rounds
        if c.variations and (c.learns == "pool" or not last):
            more = self._written(best, "variations", c.variations * len(best))
        evolved = pool([best, more]) if len(more) else best
        self.server.run_log.log_metric(SERVER, "pool/distinct_2", distinct(evolved.prompts, 2))

        learnt = evolved if c.learns == "pool" else best
        seeds = {client: self.server.cell.public_seed("learn", client=client) for client in clients.ids}
        clients.ask_each({client: Learn(seed, learnt) for client, seed in seeds.items()})
        return State(state.round + 1, evolved)

    def _chosen(self, clients: Clients, candidates: Corpus) -> Corpus:
        """The texts of each label that the votes choose; or those of a control without votes."""
        c = self.config
        if c.votes == "all":
            return candidates
        if c.votes == "none":
            return by_chance(candidates, c.keep, self.seed("select"))
        votes = clients.summed(Vote(candidates, c.nearest), c.voters or clients.ids, cap=c.cap_votes)
        if c.votes == "permuted":
            votes = permuted(votes, candidates, self.seed("permute"))
        best = kept(candidates, votes, c.keep, select=c.select, threshold=c.threshold, seed=self.seed("select"))
        self.server.run_log.log_corpus(SERVER, "kept", best)
        return best

    def _written(self, shown: Corpus, name: str, num_texts: int) -> Corpus:
        """Texts of the LLM, uniform over labels: by the card alone, or like the texts that are shown."""
        c, run_log = self.config, self.server.run_log
        run_log.progress(name, 0, 1)
        sampling = SamplingParams(temperature=c.temperature, top_p=c.top_p, max_new_tokens=c.max_new_tokens)
        how = Demonstrating(mode="per_label" if len(shown) else "none", shots=c.shots, sampling=sampling)
        found = write(
            self.server.llm,
            {SERVER: shown},
            how,
            self._curation,
            num_texts=num_texts,
            seeds=[self.seed(f"{name}_{attempt}") for attempt in range(c.attempts)],
            task=self.task,
            name=name,
        )[SERVER]
        for stage in yields(found.steps):
            run_log.log_stage(SERVER, stage)
        run_log.log_corpus(SERVER, name, found.corpus)
        if not len(found.corpus) and not len(shown):
            raise ValueError(
                f"none of the {num_texts} texts that the server LLM wrote by the task card passes the filters: check "
                "server.llm, strategy.min_words and strategy.max_new_tokens"
            )
        return found.corpus

    @property
    def _curation(self) -> Curation:
        c, server = self.config, self.server
        check = check_of(c.label_check, server.labels, self.task, server.llm, server.embed)
        return Curation(server.labels, c.min_words, c.sentences, check and partial(server.engine.checked, check))
