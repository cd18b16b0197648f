"""CrossLM: clients rate texts of the server LLM, the LLM learns from the ratings, the clients from the best texts.

A RECONSTRUCTION from the abstract of "Mutual Enhancement of Large and Small Language Models with Cross-Silo Knowledge
Transfer" (arXiv 2312.05842): docs/methods/cross-lm.md says what is certain. A client sends numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedsynth.corpus import Corpus, Provenance, Scores, pool
from fedsynth.federation.cached_llm import CachedLLM
from fedsynth.federation.messages import Learn, Score
from fedsynth.federation.run.log import SERVER
from fedsynth.federation.strategy import Clients, Planner, RoundStrategy
from fedsynth.limits import MAX_TEXT
from fedsynth.lora import Adapter, digest_of
from fedsynth.models.llm import TextModel
from fedsynth.models.sampling import SamplingParams
from fedsynth.pretraining.public_text import labelled, sample
from fedsynth.scenario.client import Client
from fedsynth.scenario.server import PublicTest
from fedsynth.strategies.options import CrossLMOptions
from fedsynth.synthesis.augmentation import Demonstrating, augment, turns
from fedsynth.synthesis.curation import Filtered, asked_for, deduplicate, well_formed, yields
from fedsynth.synthesis.reward_tuning import (
    CHOICES,
    MEASURED,
    Measures,
    Ranked,
    first_adapter,
    fit,
    ranked,
    shuffled,
    taught,
)


@dataclass(frozen=True)
class State:
    """Completed rounds, the LLM's adapter (None for the base alone), the texts sent to clients so far, and the clients
    with a task model: the others cannot score."""

    round: int = 0
    adapter: Adapter | None = None
    corpus: Corpus | None = None
    learnt: tuple[int, ...] = ()


class CrossLM(RoundStrategy[State]):
    """Large and small models teach each other: texts one way, scores the other."""

    config_class = CrossLMOptions
    config: CrossLMOptions

    @classmethod
    def spends(cls, config: CrossLMOptions) -> bool:
        """True unless no client is asked for scores."""
        return config.feedback != "none"

    @classmethod
    def trains_generator(cls, config: CrossLMOptions) -> bool:  # noqa: ARG003 - whatever its options say
        """False: clients give scores only."""
        return False

    @classmethod
    def planners(cls, config: CrossLMOptions, client: Client) -> tuple[Planner, ...]:  # noqa: ARG003 - whatever its options say
        """That of scores."""
        return (client.score_plan,)

    @classmethod
    def sends_text(cls, config: CrossLMOptions) -> bool:
        """Clients that score have learnt their own text first."""
        return config.feedback == "none"

    def initial(self) -> State:
        """The LLM without an adapter."""
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """The LLM writes, clients score, the LLM learns from the scores, clients learn from the best texts."""
        learnt = set(state.learnt)
        if self.config.feedback != "none" and (new := set(clients.ids) - learnt):
            learnt |= self._learn(clients, new, None)

        written = self._written(state.adapter)
        best, adapter = written, state.adapter
        if self.config.feedback != "none":
            # These numbers derive from private text; nothing else that reaches the server does.
            texts = ranked(written, self._scores(clients, written), self.config.keep)
            best = texts.best
            if self.config.teaches:
                adapter = self._taught(state.adapter, texts)
                if state.round + 1 == self.server.cell.scenario.rounds and self._measures_fit:
                    self._log_fit(self._texts(adapter, "measure")[1].corpus, "")

        corpus = deduplicate(pool([state.corpus, best] if state.corpus else [best])).corpus
        learnt |= self._learn(clients, set(clients.ids), corpus)
        return State(state.round + 1, adapter, corpus, tuple(sorted(learnt)))

    def _learn(self, clients: Clients, ids: set[int], corpus: Corpus | None) -> set[int]:
        """Steps 1 and 5: clients learn texts, whatever their architecture and tokenizer. Returns those that replied."""
        seeds = {client: self.server.cell.public_seed("learn", client=client) for client in sorted(ids)}
        return set(clients.ask_each({client: Learn(seed, corpus) for client, seed in seeds.items()}))

    def _written(self, adapter: Adapter | None) -> Corpus:
        """Step 2: texts that the LLM is asked for by each label alone, the well-formed ones."""
        c, run_log = self.config, self.server.run_log
        run_log.progress("write", 0, 1)
        formed, unique = self._texts(adapter, "write")
        for stage in yields([("written", formed), ("written_unique", unique)]):
            run_log.log_stage(SERVER, stage)
        written = unique.corpus
        if not len(written):
            raise ValueError(
                f"none of the {c.num_texts} texts that the server LLM wrote to labels' names is well formed "
                f"({formed.dropped}): check server.llm, strategy.min_words and strategy.max_new_tokens"
            )
        if adapter is not None:  # texts of an LLM that has learnt from scores have their guarantee
            written = replace(written, provenance=Provenance.LLM_WRITTEN, grants=adapter.grants)
        run_log.log_corpus(SERVER, "written", written)
        self._log_fit(written, "_before")
        return written

    def _scores(self, clients: Clients, written: Corpus) -> Scores:
        """Step 3: the clients' models' confidence in each text's label, added up; only its order in a label counts."""
        scores = clients.summed(Score(written, self.seed("score")), clients.ids)
        self.server.run_log.log_metric(SERVER, "scores/sum", sum(scores.values) / len(scores.values))
        return shuffled(scores, self.seed("shuffle")) if self.config.feedback == "shuffled" else scores

    def _taught(self, adapter: Adapter | None, texts: Ranked) -> Adapter:
        """Step 4: the LLM's adapter after the round; metrics show the change of the LLM's general ability."""
        teaching, run_log, models = self.config.teaching, self.server.run_log, self.server.cell.scenario.server
        assert isinstance(models.llm, str)  # refused at load
        start = adapter or first_adapter(models.llm, models.adapter, teaching.tuning, self.seed("adapter"))
        public = Corpus((), (), Provenance.PUBLIC)
        if models.public is not None:
            public = sample(models.public, teaching.measured, self.server.cell.public_seed("public"))
        tests, others = self._tests()
        run_log.progress("teach", 0, 1)
        done = taught(
            self.server.engine,
            models.llm,
            start,
            texts,
            teaching,
            Measures(self.server.labels, public=public.prompts, tests=tests, others=others, task=self.task),
            seed=self.seed("teach"),
            first=adapter is None,
        )
        run_log.log_adapter(SERVER, done.adapter, "llm", base=models.llm)
        for name, value in done.metrics.items():
            run_log.log_metric(SERVER, name, value)
        return done.adapter

    def _texts(self, adapter: Adapter | None, purpose: str) -> tuple[Filtered, Filtered]:
        """As many texts as a round asks for, after no demonstration: the well-formed ones, and those without copies."""
        c = self.config
        raw = augment(
            self._llm(adapter),
            {0: Corpus((), (), Provenance.PUBLIC)},
            Demonstrating(
                mode="none",
                shots=1,
                sampling=SamplingParams(temperature=c.temperature, top_p=c.top_p, max_new_tokens=c.max_new_tokens),
            ),
            labels=self.server.labels,
            wanted={0: turns(self.server.labels, c.num_texts)},
            seed=self.seed(purpose),
            task=self.task,
        )[0]
        formed = well_formed(
            raw.corpus, labels=self.server.labels, min_words=c.min_words, sentences=c.sentences, longest=MAX_TEXT
        )
        formed = asked_for(formed, self.server.labels[: c.num_texts], raw.dropped)
        return formed, deduplicate(formed.corpus)

    def _tests(self) -> tuple[Corpus, Corpus]:
        """Public texts of the labels, and of other labels."""
        models, seed = self.server.cell.scenario.server, self.server.cell.public_seed("public")
        test = models.public_test or (None if models.public is None else PublicTest(models.public))
        if test is None:
            return Corpus((), (), Provenance.PUBLIC), Corpus((), (), Provenance.PUBLIC)
        labels, most = self.server.labels, min(MEASURED, self.config.teaching.measured)
        return labelled(test, labels, most, seed), labelled(test, labels, most, seed, others=CHOICES)

    @property
    def _measures_fit(self) -> bool:
        return self.server.cell.scenario.server.embedder is not None and len(self._tests()[0]) > 0

    def _log_fit(self, written: Corpus, when: str) -> None:
        """How often the LLM's texts lie nearest to public texts of the label that they were asked for."""
        if not self._measures_fit:
            return
        fits, of_true = fit(written, self._tests()[0], self.server.embed)
        if not math.isnan(fits):
            self.server.run_log.log_metric(SERVER, f"llm/text_fit{when}", fits)
            self.server.run_log.log_metric(SERVER, "llm/text_fit_of_true_text", of_true)

    def _llm(self, adapter: Adapter | None) -> TextModel:
        name = self.server.cell.scenario.server.llm
        if adapter is None or not isinstance(name, str):
            return self.server.llm
        return CachedLLM(self.server.engine.load(name, adapter), digest_of(adapter), self.server.run_log)
