"""KnowledgeSG: the clients' DP adapters write instructions at the server, and a professional model responds to them.

Arxiv 2410.05725. Privacy is spent in the training of the clients' adapters only; several rounds are one schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Literal

from fedsynth.adapters import new_adapter
from fedsynth.apprentice import taught, write
from fedsynth.corpus import Corpus
from fedsynth.curation import Kept, at_most, novel, well_formed_instructions, yields
from fedsynth.federation import Clients, RoundStrategy
from fedsynth.hub import weights_hash
from fedsynth.lora import Adapter, completed
from fedsynth.mentor import Judge, judged, respond
from fedsynth.publictext import sample
from fedsynth.runs import SERVER
from fedsynth.scenario import Endpoint, Scenario, Tuning
from fedsynth.strategies.lora_avg import Aggregation, aggregate
from fedsynth.tasks import Adopt, Finetune
from fedsynth.typed import BadValue, Count, Positive, Share, in_range


@dataclass(frozen=True)
class Config:
    """Options of KnowledgeSG; the steps are those of docs/methods/knowledge-sg.md.

    Attributes:
        instructions: `dp`: the clients' DP models write them. `public`: drawn from `server.public`; nothing is asked of
            private text (the control that shows what the clients' instructions are worth).
        responses: `professional`, or `own`: those that the DP model wrote itself.
        adopts: What clients use in the end: the distilled `target`, the `dp` adapter as it is, or `nothing`: the base.
        personal: Each client's DP model writes for a target of its own. Else their average writes, for one target.
        aggregation: How they are averaged, as in `lora_avg`.
        written: Records that a DP model writes, or public instructions drawn.
        temperature: Of the DP model.
        top_p: Of the DP model.
        max_tokens: Longest record.
        min_words: Shorter instructions are dropped.
        novelty: Instructions as close to an earlier one (ROUGE-L) are dropped; at 1 only those with the same words.
        judge: `likelihood` (a base LM scores), `instruction` (an LLM that follows instructions), `none`.
        judge_share: `likelihood`: share of the instructions that stay.
        response_tokens: Longest response of the professional.
        pairs: Instructions with responses that are learnt, at most.
        start_from: `dp`: the target goes on from the DP adapter (the paper's). `base`: from a new one.
        learns: The target learns to write the `response`, or the whole `record`.
        tuning: How the target is trained.
    """

    instructions: Literal["dp", "public"] = "dp"
    responses: Literal["professional", "own"] = "professional"
    adopts: Literal["target", "dp", "nothing"] = "target"
    personal: bool = True
    aggregation: Aggregation = "factors"
    written: Count = 2000
    temperature: Positive = 0.7  # the paper's code
    top_p: Share = 1.0
    max_tokens: Count = 64
    min_words: Count = 3
    novelty: Share = 0.7  # Self-Instruct (arXiv 2212.10560)
    judge: Judge = "likelihood"
    judge_share: Share = 0.8
    response_tokens: Count = 32
    pairs: Count = 1200
    start_from: Literal["dp", "base"] = "dp"
    learns: Literal["response", "record"] = "response"
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        in_range(self, "strategy")
        if self.instructions == "public" and (self.responses == "own" or self.adopts == "dp"):
            raise BadValue('strategy.instructions = "public" leaves no DP model that could respond or be adopted')


@dataclass(frozen=True)
class State:
    """Rounds done; by client (`SERVER`: for all) the DP adapter, and what was adopted after the last round."""

    round: int = 0
    adapters: Mapping[int, Adapter] = field(default_factory=dict)
    targets: Mapping[int, Adapter] = field(default_factory=dict)


class KnowledgeSG(RoundStrategy[State]):
    """Knowledge distillation with synthetic data that is generated at the server."""

    config_class = Config
    tasks = ("instructions",)
    config: Config

    @classmethod
    def check(cls, config: Config, scenario: Scenario) -> None:
        """What is needed besides instructions: above all a professional model that is not the clients' own."""
        super().check(config, scenario)
        client, server = scenario.client, scenario.server
        professional = server.professional or server.llm
        if "://" in client.generator:
            raise BadValue(f"client.generator {client.generator!r} is an endpoint: clients train this model, name one "
                           "with weights")  # fmt: skip
        if isinstance(professional, str) and weights_hash(professional) == weights_hash(client.generator):
            raise BadValue(f"the professional model {professional!r} is the clients' own, it would teach itself: name "
                           "one that knows more as server.professional")  # fmt: skip
        if isinstance(professional, Endpoint) and professional.api == "chat" and config.judge == "likelihood":
            raise BadValue('an endpoint with api = "chat" scores no text: say strategy.judge = "instruction"')
        if config.instructions == "public" and server.public is None:
            raise BadValue('strategy.instructions = "public" needs server.public: where they come from')
        if config.instructions == "dp" and config.adopts == "target" and client.generator_training.learns != "record":
            raise BadValue('client.generator_training.learns must be "record": the DP models are to write instructions')

    def initial(self) -> State:
        """No adapter yet."""
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """Step 1 in every round; all others after the last one, when the DP models are what they will be."""
        c = self.config
        state = replace(state, round=state.round + 1)
        if c.instructions == "dp" and c.adopts != "nothing":
            # Privacy is spent here, on the clients; all that follows is post-processing.
            state = replace(state, adapters=self._finetuned(clients, state.adapters))
        if c.adopts == "nothing" or state.round < self.server.cell.scenario.rounds:
            return state

        targets = state.adapters
        if c.adopts == "target":
            writers: Mapping[int, Adapter | None] = state.adapters or {SERVER: None}
            targets = {
                owner: self._target(owner, writer, self._pairs(owner, writer)) for owner, writer in writers.items()
            }

        # Step 6. With a quorum below 1 a client may have no adapter; then it keeps the base.
        owners = {home: SERVER if SERVER in targets else home for home in clients.nodes}
        clients.ask_each({home: Adopt(targets[owner]) for home, owner in owners.items() if owner in targets})
        return replace(state, targets=targets)

    def _finetuned(self, clients: Clients, before: Mapping[int, Adapter]) -> dict[int, Adapter]:
        """Step 1: the clients' DP-SGD on whole records goes on from the last round; one adapter each, or their mean."""
        c, journal = self.config, self.server.journal
        first = before.get(SERVER) or self.server.new_adapter(self.server.cell.public_seed("adapter"))
        starts = {home: before.get(home, first) for home in clients.nodes}
        frozen_a = not c.personal and c.aggregation == "frozen_a"
        answers = clients.ask_each(
            {home: Finetune(start, self.seed("train", home), frozen_a) for home, start in starts.items()}
        )
        if not c.personal:
            return {SERVER: aggregate(answers, first, c.aggregation, journal)}
        trained = {home: completed(answer.adapter, starts[home]) for home, answer in answers.items()}
        for home, adapter in trained.items():
            journal.adapter(home, adapter)
        return {**before, **trained}

    def _pairs(self, owner: int, writer: Adapter | None) -> Corpus:
        """Steps 2 to 4: instructions that a DP model writes (without one: public ones), selected and responded to."""
        c, server, professional = self.config, self.server, self.server.professional
        server.journal.progress("write", 0, 1)
        if writer is None:
            raw = Kept(sample(server.cell.scenario.server.public or "", c.written, self.seed("public")), {})
        else:
            base, how = server.cell.scenario.client.generator, (c.temperature, c.top_p, c.max_tokens)
            raw = write(base, writer, c.written, *how, seed=self.seed("write", owner))

        formed = well_formed_instructions(raw.corpus, min_words=c.min_words)
        fresh = novel(formed.corpus, c.novelty)
        good = judged(professional, fresh.corpus, c.judge, c.judge_share, c.response_tokens)
        few = at_most(good.corpus, c.pairs)
        steps = [("written", raw), ("formed", formed), ("novel", fresh), ("judged", good), ("chosen", few)]

        pairs = few.corpus
        if c.responses == "professional":
            # What the DP model responded is neither shown nor kept.
            answered = respond(professional, pairs, c.response_tokens)
            steps, pairs = [*steps, ("answered", answered)], answered.corpus
        for stage in yields(steps):
            server.journal.stage(owner, stage)
        instructions = replace(raw.corpus, answers=("",) * len(raw.corpus))
        server.journal.corpus(owner, "instructions", instructions, instructions=c.instructions)
        server.journal.corpus(owner, "pairs", pairs, instructions=c.instructions, responses=c.responses)
        return pairs

    def _target(self, owner: int, writer: Adapter | None, pairs: Corpus) -> Adapter:
        """Step 5: the DP model, or the base, learns the pairs."""
        c, base = self.config, self.server.cell.scenario.client.generator
        start = writer if c.start_from == "dp" else None
        if start is None:
            start = new_adapter(base, rank=c.tuning.rank, alpha=c.tuning.alpha, seed=self.seed("target"))
        target, loss = taught(base, start, pairs, c.tuning, learns=c.learns, seed=self.seed("teach", owner))
        self.server.journal.adapter(owner, target, "target")
        if isfinite(loss):
            self.server.journal.metric(owner, "loss/target", loss)
        return target
