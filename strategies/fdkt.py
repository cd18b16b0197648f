"""FDKT: clients send DP drafts, the server LLM reads the best of them, clients learn from its texts.

Federated Domain-specific Knowledge Transfer (arXiv 2405.14212). One round; privacy is spent in its first step only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fedsynth.corpus import Corpus, Provenance, pool
from fedsynth.federation.messages import Learn, Synthesize
from fedsynth.federation.run.log import SERVER
from fedsynth.federation.strategy import Clients, RoundStrategy
from fedsynth.limits import MAX_TEXT
from fedsynth.models.sampling import SamplingParams
from fedsynth.strategies import presets
from fedsynth.strategies.options import FDKTOptions
from fedsynth.synthesis.augmentation import Demonstrating, augment, bare_misfit, lacking, misfit, turns
from fedsynth.synthesis.curation import (
    Steps,
    asked_for,
    clusters,
    deduplicate,
    keep_rows,
    summed,
    well_formed,
    yields,
)
from fedsynth.synthesis.judges import judge_by_instruction, judge_by_likelihood
from fedsynth.synthesis.label_check import fitting


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

    @classmethod
    def spends(cls, config: FDKTOptions) -> bool:
        """True unless no client is asked for drafts."""
        return config.demonstrations != "none"

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
        if self.config.judge == "likelihood" and self.config.texts == "llm" and self.config.demonstrations != "none":
            self.server.llm.score(["a"], [" text"])
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """One round, in the order of the paper: synthesize, select, augment, learn."""
        if self.config.demonstrations == "none":
            corpora = self._augmented({}, clients.ids)
        else:
            # Clients spend privacy here; all that follows is post-processing.
            drafts = self._drafts(clients)
            asked = self.config.drafts_from or clients.ids
            learners = [client for client in clients.ids if client in drafts or client not in asked]
            if self.config.texts == "drafts":
                corpora = self._shared(drafts, learners)
            else:
                # The LLM sees only released text: it keeps the best of each cluster, then writes more like it.
                corpora = self._augmented(self._best(self._readable(drafts)), learners)

        # The task models stay with their clients.
        seeds = {client: self.server.cell.public_seed("learn", client=client) for client in corpora}
        clients.ask_each({client: Learn(seeds[client], corpus) for client, corpus in corpora.items()})
        return replace(state, round=state.round + 1, corpora=corpora)

    def _drafts(self, clients: Clients) -> dict[int, Corpus]:
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
            )
            for client in c.drafts_from or clients.ids
        }
        drafts: dict[int, Corpus] = {}
        for client, reply in clients.ask_each(requests).items():
            if c.drafts == "generator":  # true text stays out of the run's directory
                run_log.log_corpus(client, "drafts", reply.corpus)
            missing = {"unfinished": reply.unfinished}
            steps = self._curate("drafts", reply.corpus, self.server.labels, missing, _nothing())
            self._note(client, steps)
            drafts[client] = steps[-1][1].corpus
        return drafts

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
                self._note(client, [("readable", kept)])
            found[client] = kept.corpus
        return found

    def _best(self, drafts: dict[int, Corpus]) -> dict[int, Corpus]:
        """Steps 5 and 6: the judge's best drafts of each cluster of similar drafts."""
        c, run_log = self.config, self.server.run_log
        if c.judge == "none":
            return drafts
        run_log.progress("select", 0, len(drafts))
        groups = {
            client: clusters(self.server.embed(d.prompts), size=c.cluster_size, seed=self.seed("cluster", client))
            for client, d in drafts.items()
        }
        seed = self.seed("judge")
        judge = partial(judge_by_likelihood, rivals=c.judge_rivals) if c.judge == "likelihood" else judge_by_instruction
        labels = self.server.labels
        kept = judge(self.server.llm, drafts, groups, labels=labels, keep=c.keep, seed=seed, task=self.task)
        for client, stage in kept.items():
            self._note(client, [("selected", stage)])
        return {client: stage.corpus for client, stage in kept.items()}

    def _shared(self, drafts: Mapping[int, Corpus], learners: Sequence[int]) -> dict[int, Corpus]:
        """One-to-many: everybody's drafts for everybody. Else each client has its own; none, where none were asked."""
        if self.config.one_to_many and drafts:
            return dict.fromkeys(learners, pool(list(drafts.values())))
        return {client: drafts.get(client, _nothing()) for client in learners}

    def _augmented(self, best: Mapping[int, Corpus], learners: Sequence[int]) -> dict[int, Corpus]:
        """The LLM's texts for each client. One-to-many: it writes once, for all, after everybody's drafts."""
        if not self.config.one_to_many:
            return self._augment(self._shared(best, learners))
        shown = pool(list(best.values())) if best else _nothing()
        return dict.fromkeys(learners, self._augment({SERVER: shown})[SERVER])

    def _augment(self, shown: Mapping[int, Corpus]) -> dict[int, Corpus]:
        """Step 7: more text like the demonstrations; all clients' prompts in one batch, again for what filters took."""
        c, run_log = self.config, self.server.run_log
        run_log.progress("augment", 0, len(shown))
        wanted = {client: turns(self.server.labels, c.num_texts) for client in shown}
        how = Demonstrating(
            mode=c.demonstrations,
            shots=c.shots,
            sampling=SamplingParams(temperature=c.temperature, top_p=c.top_p, max_new_tokens=c.max_new_tokens),
        )
        corpora = dict.fromkeys(shown, _nothing())
        steps: dict[int, list[Steps]] = {client: [] for client in shown}
        bare = dict.fromkeys(shown, 0)
        for attempt in range(c.attempts):
            written = augment(
                self.server.llm,
                {client: shown[client] for client in wanted},
                how,
                labels=self.server.labels,
                wanted=wanted,
                seed=self.seed(f"augment_again_{attempt}" if attempt else "augment"),
                task=self.task,
            )
            for client, reply in written.items():
                asked, came = wanted[client], len(reply.corpus) + sum(reply.dropped.values())
                missing = {**reply.dropped, "not written": max(0, len(asked) - came)}
                found = self._curate("written", reply.corpus, list(dict.fromkeys(asked)), missing, corpora[client])
                corpora[client] = pool([corpora[client], found[-1][1].corpus]) if attempt else found[-1][1].corpus
                steps[client].append(found)
                bare[client] += sum(reply.bare.values())
            left = {client: lacking(corpus, self.server.labels, c.num_texts) for client, corpus in corpora.items()}
            wanted = {client: labels for client, labels in left.items() if labels}
            if not wanted:
                break
        for client, corpus in corpora.items():
            run_log.log_metric(client, "yield/written/without_demonstrations", bare[client])
            self._note(client, summed(steps[client]))
            run_log.log_corpus(client, "written", corpus)
        return corpora

    def _curate(
        self, name: str, corpus: Corpus, labels: Sequence[str], missing: Mapping[str, int], before: Corpus
    ) -> Steps:
        """The well-formed texts, each once, that fit their labels, beside the number that was asked for."""
        formed = well_formed(
            corpus,
            labels=self.server.labels,
            min_words=self.config.min_words,
            sentences=self.config.sentences,
            longest=MAX_TEXT,
        )
        unique = deduplicate(formed.corpus, before)
        steps = [(name, asked_for(formed, labels, missing)), (f"{name}_unique", unique)]
        if self.config.label_check == "embedder":
            steps.append((f"{name}_fitting", fitting(unique.corpus, self.server.labels, self.task, self.server.embed)))
        return steps

    def _note(self, client: int, steps: Steps) -> None:
        for stage in yields(steps):
            self.server.run_log.log_stage(client, stage)


def _nothing() -> Corpus:
    return Corpus((), (), Provenance.PUBLIC)
