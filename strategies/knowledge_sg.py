"""KnowledgeSG: the clients' DP adapters write instructions at the server, and a professional model responds to them.

arXiv 2410.05725. Only the training of the clients' adapters spends privacy; several rounds are one schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite

from fedsynth.corpus import Corpus
from fedsynth.federation.messages import Adopt, Finetune
from fedsynth.federation.run.log import SERVER
from fedsynth.federation.strategy import Clients, RoundStrategy
from fedsynth.limits import MAX_TEXT
from fedsynth.lora import Adapter, completed
from fedsynth.models.adapters import new_adapter
from fedsynth.models.sampling import SamplingParams
from fedsynth.strategies import presets
from fedsynth.strategies.lora_avg import aggregate
from fedsynth.strategies.options import KnowledgeSGOptions
from fedsynth.synthesis.curation import at_most, novel, well_formed_instructions, yields
from fedsynth.synthesis.distillation import judged, respond
from fedsynth.synthesis.student import draw, taught, write


@dataclass(frozen=True)
class State:
    """Completed rounds; by client (`SERVER` for all) the DP adapter, and the adapter adopted after the last round."""

    round: int = 0
    adapters: Mapping[int, Adapter] = field(default_factory=dict)
    targets: Mapping[int, Adapter] = field(default_factory=dict)


class KnowledgeSG(RoundStrategy[State]):
    """Knowledge distillation with synthetic data generated at the server."""

    config_class = KnowledgeSGOptions
    presets = presets.KNOWLEDGE_SG
    tasks = ("instructions",)
    config: KnowledgeSGOptions

    @classmethod
    def spends(cls, config: KnowledgeSGOptions) -> bool:
        """True unless no client is asked to train."""
        return config.instructions == "dp" and config.adopts != "nothing"

    def initial(self) -> State:
        """No adapter yet."""
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """Step 1 in every round; all other steps after the last one, when the DP models are complete."""
        c = self.config
        state = replace(state, round=state.round + 1)
        if c.instructions == "dp" and c.adopts != "nothing":
            # Clients spend privacy here; all that follows is post-processing.
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
        owners = {client: SERVER if SERVER in targets else client for client in clients.ids}
        clients.ask_each({client: Adopt(targets[owner]) for client, owner in owners.items() if owner in targets})
        return replace(state, targets=targets)

    def _finetuned(self, clients: Clients, before: Mapping[int, Adapter]) -> dict[int, Adapter]:
        """Step 1: clients continue DP-SGD on whole records from the last round; one adapter each, or their mean."""
        c, run_log = self.config, self.server.run_log
        first = before.get(SERVER) or self.server.new_adapter(self.server.cell.public_seed("adapter"))
        starts = {client: before.get(client, first) for client in clients.ids}
        frozen_a = not c.personal and c.aggregation == "frozen_a"
        replies = clients.ask_each(
            {client: Finetune(start, self.seed("train", client), frozen_a) for client, start in starts.items()}
        )
        if not c.personal:
            return {SERVER: aggregate(replies, first, c.aggregation, run_log)}
        trained = {client: completed(reply.adapter, starts[client]) for client, reply in replies.items()}
        for client, adapter in trained.items():
            run_log.log_adapter(client, adapter)
        return {**before, **trained}

    def _pairs(self, owner: int, writer: Adapter | None) -> Corpus:
        """Steps 2 to 4: a DP model's instructions, or public ones without a DP model, selected and with responses."""
        c, server, professional = self.config, self.server, self.server.professional
        server.run_log.progress("write", 0, 1)
        base, public = server.cell.scenario.client.generator, server.cell.scenario.server.public
        task = server.cell.scenario.task
        if writer is None:
            raw = draw(base, public or "", c.num_texts, c.max_new_tokens, seed=self.seed("public"), task=task)
        else:
            how = SamplingParams(temperature=c.temperature, top_p=c.top_p, max_new_tokens=c.max_new_tokens)
            seed, own = self.seed("write", owner), c.responses == "own"
            raw = write(server.engine, base, writer, c.num_texts, how, seed=seed, task=task, answered=own)

        formed = well_formed_instructions(raw.corpus, min_words=c.min_words, sentences=c.sentences, longest=MAX_TEXT)
        fresh = novel(formed.corpus, c.novelty)
        good = judged(professional, fresh.corpus, c.judge, c.judge_share, c.response_tokens, task=task)
        few = at_most(good.corpus, c.pairs)
        steps = [("written", raw), ("formed", formed), ("novel", fresh), ("judged", good), ("chosen", few)]

        pairs = few.corpus
        if c.responses == "professional":
            # The DP model's own responses are neither shown nor kept.
            answered = respond(professional, pairs, c.response_tokens, task=task)
            steps, pairs = [*steps, ("answered", answered)], answered.corpus
        for stage in yields(steps):
            server.run_log.log_stage(owner, stage)
        instructions = replace(raw.corpus, answers=("",) * len(raw.corpus))
        server.run_log.log_corpus(owner, "instructions", instructions, instructions=c.instructions)
        server.run_log.log_corpus(owner, "pairs", pairs, instructions=c.instructions, responses=c.responses)
        return pairs

    def _target(self, owner: int, writer: Adapter | None, pairs: Corpus) -> Adapter:
        """Step 5: the DP model, or the base, learns the pairs."""
        c, base = self.config, self.server.cell.scenario.client.generator
        start = writer if c.start_from == "dp" else None
        if start is None:
            start = new_adapter(base, rank=c.tuning.rank, alpha=c.tuning.alpha, seed=self.seed("target"))
        engine, seed = self.server.engine, self.seed("teach", owner)
        task = self.server.cell.scenario.task
        target, loss = taught(engine, base, start, pairs, c.tuning, loss_on=c.loss_on, seed=seed, task=task)
        self.server.run_log.log_adapter(owner, target, "target")
        if isfinite(loss):
            self.server.run_log.log_metric(owner, "loss/target", loss)
        return target
