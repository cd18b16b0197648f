"""FDKT: DP drafts from the clients, the best of them shown to the server LLM, its texts back to the clients.

Federated Domain-specific Knowledge Transfer (arXiv 2405.14212). One round; privacy is spent in its first step only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fedsynth.corpus import Corpus, Provenance, pool
from fedsynth.federation.messages import Learn, Synthesize
from fedsynth.federation.strategy import Clients, RoundStrategy
from fedsynth.limits import MAX_TEXT
from fedsynth.models.sampling import SamplingParams
from fedsynth.strategies.options import FDKTOptions
from fedsynth.synthesis.augmentation import Demonstrating, augment, bare_misfit, misfit
from fedsynth.synthesis.curation import Filtered, asked_for, clusters, deduplicate, keep_rows, well_formed, yields
from fedsynth.synthesis.judges import judge_by_instruction, judge_by_likelihood


@dataclass(frozen=True)
class State:
    """What the method has made: round, and per client the text that it learnt from."""

    round: int = 0
    corpora: Mapping[int, Corpus] = field(default_factory=dict)


class FDKT(RoundStrategy[State]):
    """Federated Domain-specific Knowledge Transfer."""

    config_class = FDKTOptions
    config: FDKTOptions

    @classmethod
    def spends(cls, config: FDKTOptions) -> bool:
        """Not where no client is asked for drafts."""
        return config.demonstrations != "none"

    def initial(self) -> State:
        """Nothing yet; an LLM that cannot do what the judge needs, or has no room for a prompt without demonstrations,
        says so here, before clients spend anything."""
        c = self.config
        if c.augments and (why := bare_misfit(self.server.llm, self.server.labels, c.demonstrations, c.max_new_tokens)):
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
            corpora = self._augment({client: _nothing() for client in clients.ids})
        else:
            # Privacy is spent here, on the clients; all that follows is post-processing.
            drafts = self._drafts(clients)
            if self.config.texts == "drafts":
                corpora = drafts
            else:
                # The LLM sees only released text: it keeps the best of each cluster, then writes more like it.
                corpora = self._augment(self._best(self._readable(drafts)))

        # The task models stay with their clients.
        seeds = {client: self.server.cell.public_seed("learn", client=client) for client in corpora}
        clients.ask_each({client: Learn(seeds[client], corpus) for client, corpus in corpora.items()})
        return replace(state, round=state.round + 1, corpora=corpora)

    def _drafts(self, clients: Clients) -> dict[int, Corpus]:
        """Steps 1 to 4: text that each client's DP generator wrote, without what is not a text."""
        c, run_log = self.config, self.server.run_log
        requests = {
            client: Synthesize(
                per_label=c.per_label,
                temperature=c.draft_temperature,
                top_p=c.draft_top_p,
                max_new_tokens=c.draft_tokens,
                seed=self.seed("synthesize", client),
            )
            for client in clients.ids
        }
        drafts: dict[int, Corpus] = {}
        for client, reply in clients.ask_each(requests).items():
            run_log.log_corpus(client, "drafts", reply.corpus)
            missing = {"unfinished": reply.unfinished}
            drafts[client] = self._curate(client, "drafts", reply.corpus, self.server.labels, missing)
        return drafts

    def _readable(self, drafts: dict[int, Corpus]) -> dict[int, Corpus]:
        """The drafts that fit into the LLM: one that does not costs its client a draft, and nobody the run."""
        c, found = self.config, dict[int, Corpus]()
        for client, corpus in drafts.items():
            why = misfit(
                self.server.llm,
                corpus,
                labels=self.server.labels,
                mode=c.demonstrations,
                max_new_tokens=c.max_new_tokens,
            )
            kept = keep_rows(corpus, why)
            if kept.dropped:
                self._note(client, [("readable", kept)])
            found[client] = kept.corpus
        return found

    def _best(self, drafts: dict[int, Corpus]) -> dict[int, Corpus]:
        """Steps 5 and 6: the judge's best of each cluster of like drafts."""
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
        kept = judge(self.server.llm, drafts, groups, labels=self.server.labels, keep=c.keep, seed=seed)
        for client, stage in kept.items():
            self._note(client, [("selected", stage)])
        return {client: stage.corpus for client, stage in kept.items()}

    def _augment(self, shown: Mapping[int, Corpus]) -> dict[int, Corpus]:
        """Step 7: more text like the demonstrations; all clients' prompts in one batch."""
        c, run_log = self.config, self.server.run_log
        run_log.progress("augment", 0, len(shown))
        if c.one_to_many and c.demonstrations != "none":
            everyone = pool(list(shown.values()))
            shown = dict.fromkeys(shown, everyone)
        written = augment(
            self.server.llm,
            shown,
            Demonstrating(
                per_site=c.num_texts,
                mode=c.demonstrations,
                shots=c.shots,
                sampling=SamplingParams(temperature=c.temperature, top_p=c.top_p, max_new_tokens=c.max_new_tokens),
            ),
            labels=self.server.labels,
            seed=self.seed("augment"),
        )
        corpora: dict[int, Corpus] = {}
        for client, reply in written.items():
            run_log.log_metric(client, "yield/written/without_demonstrations", sum(reply.bare.values()))
            labels, came = self.server.labels[: c.num_texts], len(reply.corpus) + sum(reply.dropped.values())
            missing = {**reply.dropped, "not written": max(0, c.num_texts - came)}
            corpora[client] = self._curate(client, "written", reply.corpus, labels, missing)
            run_log.log_corpus(client, "written", corpora[client])
        return corpora

    def _curate(
        self, client: int, name: str, corpus: Corpus, labels: Sequence[str], missing: Mapping[str, int]
    ) -> Corpus:
        """The texts that are texts, each once; noted beside those that were asked for and never came."""
        formed = well_formed(
            corpus,
            labels=self.server.labels,
            min_words=self.config.min_words,
            sentences=self.config.sentences,
            longest=MAX_TEXT,
        )
        unique = deduplicate(formed.corpus)
        self._note(client, [(name, asked_for(formed, labels, missing)), (f"{name}_unique", unique)])
        return unique.corpus

    def _note(self, client: int, steps: list[tuple[str, Filtered]]) -> None:
        for stage in yields(steps):
            self.server.run_log.log_stage(client, stage)


def _nothing() -> Corpus:
    return Corpus((), (), Provenance.PUBLIC)
