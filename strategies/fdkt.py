"""FDKT: clients send DP drafts, the server LLM reads the best of them, clients learn from its texts.

Federated Domain-specific Knowledge Transfer (arXiv 2405.14212). One round; privacy is spent in its first step only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fedsynth.corpus import Corpus, pool
from fedsynth.federation.messages import Learn, Synthesize, Vote
from fedsynth.federation.run.log import SERVER
from fedsynth.federation.strategy import Clients, Planner, RoundStrategy
from fedsynth.lora import Adapter
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.client import Client
from fedsynth.strategies import presets
from fedsynth.strategies.options import FDKTOptions
from fedsynth.synthesis.augmentation import Demonstrating, bare_misfit, misfit
from fedsynth.synthesis.curation import Steps, clusters, keep_rows, yields
from fedsynth.synthesis.judges import judge_by_instruction, judge_by_likelihood
from fedsynth.synthesis.label_check import check_of
from fedsynth.synthesis.student import warm_start
from fedsynth.synthesis.voting import kept
from fedsynth.synthesis.writing import NOTHING, Curation, write, write_combinations
from fedsynth.synthesis.yields import check_yield


@dataclass(frozen=True)
class State:
    """Completed rounds, and by client the text that it learnt from."""

    round: int = 0
    corpora: Mapping[int, Corpus] = field(default_factory=dict)


class FDKT(RoundStrategy[State]):
    """Federated Domain-specific Knowledge Transfer."""

    config_class = FDKTOptions
    presets = presets.FDKT
    config: FDKTOptions
    warm_starts = True
    divides_budget = True

    @classmethod
    def spends(cls, config: FDKTOptions) -> bool:
        """True unless no client is asked for drafts."""
        return config.asks

    @classmethod
    def planners(cls, config: FDKTOptions, client: Client) -> tuple[Planner, ...]:
        """Drafts, and the votes of clients that judge them."""
        return (client.plan, client.vote_plan) if config.votes_from else (client.plan,)

    @classmethod
    def only_simulated(cls, config: FDKTOptions) -> bool:
        """True texts."""
        return config.drafts == "true_texts"

    def initial(self) -> State:
        """No text yet. An LLM that cannot score for the judge, or whose context has no room for a prompt without
        demonstrations, fails here, before clients spend anything."""
        c = self.config
        if c.augments and (
            why := bare_misfit(self.server.llm, self.server.labels, c.demonstrations, c.max_new_tokens, self.task)
        ):
            raise ValueError(
                f"a prompt of the labels' names alone and strategy.max_new_tokens = {c.max_new_tokens} new tokens do "
                f"not fit into the server LLM ({why}): use fewer new tokens, or an LLM with a longer context"
            )
        judged = c.judge == "likelihood" and c.texts == "llm" and c.asks
        if judged or (c.label_check == "llm" and not self.server.llm.chats):
            self.server.llm.score(["a"], [" text"])
        if c.top_k and c.augments:  # an endpoint may know no top_k
            self.server.llm.complete(["a"], replace(self._how.sampling, max_new_tokens=1), seed=0)
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """One round, in the order of the paper: synthesize, select, augment, learn."""
        public = self._public_texts()
        if not self.config.asks:
            corpora = self._augmented({}, clients.ids)
        else:
            # Clients spend privacy here; all that follows is post-processing.
            drafts = self._drafts(clients, self._start(public))
            asked = self.config.drafts_from or clients.ids
            learners = [client for client in clients.ids if client in drafts or client not in asked]
            if self.config.texts == "drafts":
                corpora = self._shared(drafts, learners)
            else:
                # The LLM sees only released text: the best of it is kept, then the LLM writes more like it.
                corpora = self._augmented(self._best(clients, self._readable(drafts)), learners)
            if self.config.zero_shot:
                corpora = {client: pool([public, corpus]) for client, corpus in corpora.items()}

        # The task models stay with their clients.
        seeds = {client: self.server.cell.public_seed("learn", client=client) for client in corpora}
        clients.ask_each({client: Learn(seeds[client], corpus) for client, corpus in corpora.items()})
        return replace(state, round=state.round + 1, corpora=corpora)

    def _public_texts(self) -> Corpus:
        """The LLM's zero-shot texts, where they start generators, stand beside drafts, or rehearse the prompts: before
        any client spends, a floor on the yield stops a run whose LLM does not write as it is asked."""
        c, training = self.config, self.server.cell.scenario.client.generator_training
        used = c.zero_shot or training.warm_start is not None
        if not c.asks or not (used or (c.yield_floor and c.augments)):
            return NOTHING
        self.server.run_log.progress("zero_shot", 0, 1)
        how = replace(self._how, mode="none")
        found = write_combinations(
            self.server.llm,
            SERVER,
            how,
            self._curation,
            num_texts=c.num_texts if used else len(self.server.labels),
            seeds=self._seeds("augment", c.attempts if used else 1),
            task=self.task,
            name="zero_shot",
        )
        self._log(SERVER, found.steps)
        check_yield("the server LLM's zero-shot texts", {SERVER: found.steps}, c.yield_floor)
        self.server.run_log.log_corpus(SERVER, "zero_shot", replace(found.corpus, attributes=None))
        return found.corpus

    def _start(self, public: Corpus) -> Adapter | None:
        """The adapter that all clients' generators start from, or None for a new one each."""
        client = self.server.cell.scenario.client
        if client.generator_training.warm_start is None:
            return None
        self.server.run_log.progress("warm_start", 0, 1)
        fresh = self.server.new_adapter(self.server.cell.public_seed("adapter"))
        engine, seed = self.server.engine, self.seed("warm_start")
        start, loss = warm_start(
            engine, client.generator, fresh, public, client.generator_training, self.task, seed=seed
        )
        self.server.run_log.log_metric(SERVER, "loss/warm_start", loss)
        return start

    def _drafts(self, clients: Clients, start: Adapter | None) -> dict[int, Corpus]:
        """Steps 1 to 4: the text of each client's DP generator, without malformed texts and duplicates."""
        c, run_log = self.config, self.server.run_log
        requests = {
            client: Synthesize(
                per_label=c.per_label,
                temperature=c.draft_temperature,
                top_p=c.draft_top_p,
                max_new_tokens=c.draft_tokens,
                seed=self.seed("synthesize", client),
                true_texts=c.drafts == "true_texts",
                start=start,
                top_k=c.draft_top_k or None,
            )
            for client in c.drafts_from or clients.ids
        }
        steps: dict[int, Steps] = {}
        for client, reply in clients.ask_each(requests).items():
            if c.drafts == "generator":  # true text stays out of the run's directory
                run_log.log_corpus(client, "drafts", reply.corpus)
            steps[client] = self._curation.steps("drafts", reply.corpus, {"unfinished": reply.unfinished})
            self._log(client, steps[client])
        check_yield("the clients' drafts", steps, c.yield_floor)
        return {client: found[-1][1].corpus for client, found in steps.items()}

    def _readable(self, drafts: dict[int, Corpus]) -> dict[int, Corpus]:
        """The drafts that fit into the LLM's context; the others are dropped and do not stop the run."""
        c, found = self.config, dict[int, Corpus]()
        for client, corpus in drafts.items():
            why = misfit(
                self.server.llm,
                corpus,
                labels=self.server.labels,
                mode=c.demonstrations,
                max_new_tokens=c.max_new_tokens,
                task=self.task,
            )
            kept = keep_rows(corpus, why)
            if kept.dropped:
                self._log(client, [("readable", kept)])
            found[client] = kept.corpus
        return found

    def _best(self, clients: Clients, drafts: dict[int, Corpus]) -> dict[int, Corpus]:
        """Steps 5 and 6: the judge's best drafts of each cluster of similar drafts, or those that clients vote for."""
        c, run_log = self.config, self.server.run_log
        if c.judge == "none":
            return drafts
        if c.judge == "votes":
            return {SERVER: self._voted(clients, pool(list(drafts.values())))} if any(map(len, drafts.values())) else {}
        run_log.progress("select", 0, len(drafts))
        groups = {
            client: clusters(self.server.embed(d.prompts), size=c.cluster_size, seed=self.seed("cluster", client))
            for client, d in drafts.items()
        }
        seed = self.seed("judge")
        judge = (
            partial(judge_by_likelihood, rivals=c.judge_rivals)
            if c.judge == "likelihood"
            else partial(judge_by_instruction, max_new_tokens=c.judge_tokens)
        )
        labels = self.server.labels
        found = judge(self.server.llm, drafts, groups, labels=labels, keep=c.keep, seed=seed, task=self.task)
        for client, stage in found.items():
            self._log(client, [("selected", stage)])
        return {client: stage.corpus for client, stage in found.items()}

    def _voted(self, clients: Clients, drafts: Corpus) -> Corpus:
        """The drafts of each label that lie nearest to the private text of those that vote, which spend budget here."""
        votes = clients.summed(Vote(drafts), self.config.votes_from, cap=self.config.cap_votes)
        best = kept(drafts, votes, self.config.keep, select="rank", threshold=0.0, seed=self.seed("votes"))
        self.server.run_log.log_corpus(SERVER, "voted", best)
        return best

    def _shared(self, drafts: Mapping[int, Corpus], learners: Sequence[int]) -> dict[int, Corpus]:
        """One-to-many: everybody's drafts for everybody. Else each client has its own; none, where none were asked."""
        if self.config.one_to_many and drafts:
            return dict.fromkeys(learners, pool(list(drafts.values())))
        return {client: drafts.get(client, NOTHING) for client in learners}

    def _augmented(self, best: Mapping[int, Corpus], learners: Sequence[int]) -> dict[int, Corpus]:
        """The LLM's texts for each client. One-to-many: it writes once, for all, after everybody's drafts."""
        if not self.config.one_to_many:
            return self._augment(self._shared(best, learners))
        shown = pool(list(best.values())) if best else NOTHING
        return dict.fromkeys(learners, self._augment({SERVER: shown})[SERVER])

    def _augment(self, shown: Mapping[int, Corpus]) -> dict[int, Corpus]:
        """Step 7: more text like the demonstrations."""
        c, run_log = self.config, self.server.run_log
        run_log.progress("augment", 0, len(shown))
        # Beside zero-shot texts those of a label without a demonstration must be others.
        seeds = self._seeds("augment_shown" if c.zero_shot and c.asks else "augment", c.attempts)
        found = write(
            self.server.llm,
            shown,
            self._how,
            self._curation,
            num_texts=c.num_texts,
            seeds=seeds,
            task=self.task,
        )
        for client, written in found.items():
            run_log.log_metric(client, "yield/written/without_demonstrations", written.bare)
            self._log(client, written.steps)
            run_log.log_corpus(client, "written", written.corpus)
        return {client: written.corpus for client, written in found.items()}

    @property
    def _how(self) -> Demonstrating:
        c = self.config
        sampling = SamplingParams(
            temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, max_new_tokens=c.max_new_tokens
        )
        return Demonstrating(mode=c.demonstrations, shots=c.shots, sampling=sampling)

    @property
    def _curation(self) -> Curation:
        c, server = self.config, self.server
        check = check_of(c.label_check, server.labels, self.task, server.llm, server.embed)
        return Curation(server.labels, c.min_words, c.sentences, check and partial(server.engine.checked, check))

    def _seeds(self, purpose: str, attempts: int) -> list[int]:
        return [self.seed(f"{purpose}_again_{attempt}" if attempt else purpose) for attempt in range(attempts)]

    def _log(self, client: int, steps: Steps) -> None:
        for stage in yields(steps):
            self.server.run_log.log_stage(client, stage)
