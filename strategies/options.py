"""What the methods with many options can be told, and what they refuse before any work is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fedsynth.limits import MAX_SAMPLES, MAX_TEMPERATURE, MAX_TEXTS, MIN_TEMPERATURE, MIN_TOP_P, Tokens, least, most
from fedsynth.models.hub import weights_hash
from fedsynth.privacy.plan import BudgetTooSmall
from fedsynth.scenario.schema import Scenario, Tuning
from fedsynth.scenario.server import Endpoint
from fedsynth.strategies.lora_avg import Aggregation
from fedsynth.synthesis.distillation import Judge
from fedsynth.synthesis.reward_tuning import Teaching
from fedsynth.typed import BadValue, Count, Positive, Share, in_range


@dataclass(frozen=True)
class FDKTOptions:
    """Options of FDKT; section numbers are those of docs/methods/fdkt.md.

    Attributes:
        per_label: Drafts that each client writes per label.
        draft_temperature: Of the clients' sampling.
        draft_top_p: Of the clients' sampling.
        draft_tokens: Longest draft.
        min_words: Texts of fewer words are dropped (10 in the paper's code, for reviews; notes are shorter). In scripts
            without blanks between words each character is one.
        sentences: Sentences are asked for: texts that look like code, JSON or markup are dropped.
        judge: `likelihood` (a base LLM scores), `instruction` (the paper's: an LLM that follows instructions), `none`.
        judge_rivals: Other labels that the likelihood judge compares a draft's own with.
        cluster_size: Drafts that the judge compares at once (4 in the paper's code).
        keep: Drafts that survive of a cluster.
        demonstrations: `per_label` (k of one label: small contexts, many labels), `all_labels` (the paper's), or
            `none`: the ablation in which the LLM sees label names only and clients release nothing.
        shots: Demonstrations per label in a prompt.
        texts: `llm`: clients learn from what the LLM wrote. `drafts`: from their own DP drafts, without the LLM.
        num_texts: Texts the LLM writes for each client.
        temperature: Of the LLM.
        top_p: Of the LLM.
        max_new_tokens: Longest answer of the LLM.
        one_to_many: Each client's texts are written from the drafts of all clients, instead of its own.
    """

    per_label: Annotated[Count, most(MAX_SAMPLES)] = 50
    draft_temperature: Annotated[Positive, least(MIN_TEMPERATURE), most(MAX_TEMPERATURE)] = 0.8
    draft_top_p: Annotated[Share, least(MIN_TOP_P)] = 0.95
    draft_tokens: Tokens = 48
    min_words: Count = 10
    sentences: bool = False
    judge: Literal["likelihood", "instruction", "none"] = "likelihood"
    judge_rivals: Count = 16
    cluster_size: Count = 4
    keep: Count = 2
    demonstrations: Literal["per_label", "all_labels", "none"] = "per_label"
    shots: Count = 4
    texts: Literal["llm", "drafts"] = "llm"
    num_texts: Annotated[Count, most(MAX_TEXTS)] = 800
    temperature: Positive = 1.0
    top_p: Share = 0.95
    max_new_tokens: Count = 48
    one_to_many: bool = False

    def __post_init__(self) -> None:
        in_range(self, "strategy")

    def check(self, scenario: Scenario) -> None:
        """An endpoint that can do what is asked of the LLM."""
        if not self.augments or not _chats(scenario.server.llm):
            return
        if self.demonstrations == "none":
            raise BadValue(f"{NO_LINE}: name one that goes on after a prompt, or a model with weights, as server.llm")
        if self.demonstrations == "per_label":
            raise BadValue(f'{NO_LINE}: say strategy.demonstrations = "all_labels"')
        if self.judge == "likelihood":
            raise BadValue(f'{NO_SCORES}: say strategy.judge = "instruction"')

    def warnings(self, labels: Sequence[str]) -> list[str]:
        """Labels that the LLM writes no text of."""
        return few_texts(self.num_texts, labels) if self.augments else []

    @property
    def augments(self) -> bool:
        """Whether the LLM writes."""
        return self.texts == "llm" or self.demonstrations == "none"


NO_SCORES = 'an endpoint with api = "chat" scores no text'
NO_LINE = 'an endpoint with api = "chat" goes on after no line of text'


def _chats(model: str | Endpoint | None) -> bool:
    return isinstance(model, Endpoint) and model.api == "chat"


def few_texts(num_texts: int, labels: Sequence[str]) -> list[str]:
    """A warning where fewer texts are asked of the LLM than there are labels: texts are asked for label by label."""
    if num_texts >= len(labels):
        return []
    none = labels[num_texts:]
    named = ", ".join(map(repr, none[:5])) + (", ..." if len(none) > 5 else "")
    return [
        f"strategy.num_texts = {num_texts} is less than the {len(labels)} labels: the LLM writes no text of "
        f"{len(none)} of them ({named}); ask for {len(labels)} at least"
    ]


@dataclass(frozen=True)
class KnowledgeSGOptions:
    """Options of KnowledgeSG; the steps are those of docs/methods/knowledge-sg.md.

    Attributes:
        instructions: `dp`: the clients' DP models write them. `public`: drawn from `server.public`; nothing is asked of
            private text (the control that shows what the clients' instructions are worth).
        responses: `professional`, or `own`: those that the DP model wrote itself.
        adopts: What clients use in the end: the distilled `target`, the `dp` adapter as it is, or `nothing`: the base.
        personal: Each client's DP model writes for a target of its own. Else their average writes, for one target.
        aggregation: How they are averaged, as in `lora_avg`.
        num_texts: Records that a DP model writes, or public instructions drawn.
        temperature: Of the DP model.
        top_p: Of the DP model.
        max_new_tokens: Longest record.
        min_words: Instructions of fewer words are dropped.
        sentences: Sentences are asked for: instructions that look like code, JSON or markup are dropped.
        novelty: Instructions as close to an earlier one (ROUGE-L) are dropped; at 1 only those with the same words.
        judge: `likelihood` (a base LM scores), `instruction` (an LLM that follows instructions), `none`.
        judge_share: `likelihood`: share of the instructions that stay.
        response_tokens: Longest response of the professional.
        pairs: Instructions with responses that are learnt, at most.
        start_from: `dp`: the target goes on from the DP adapter (the paper's). `base`: from a new one.
        loss_on: The target learns to write the `response`, or the whole `record`.
        tuning: How the target is trained.
    """

    instructions: Literal["dp", "public"] = "dp"
    responses: Literal["professional", "own"] = "professional"
    adopts: Literal["target", "dp", "nothing"] = "target"
    personal: bool = True
    aggregation: Aggregation = "factors"
    num_texts: Count = 2000
    temperature: Positive = 0.7  # the paper's code
    top_p: Share = 1.0
    max_new_tokens: Count = 64
    min_words: Count = 3
    sentences: bool = False
    novelty: Share = 0.7  # Self-Instruct (arXiv 2212.10560)
    judge: Judge = "likelihood"
    judge_share: Share = 0.8
    response_tokens: Count = 32
    pairs: Count = 1200
    start_from: Literal["dp", "base"] = "dp"
    loss_on: Literal["response", "record"] = "response"
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        in_range(self, "strategy")
        if self.instructions == "public" and (self.responses == "own" or self.adopts == "dp"):
            raise BadValue('strategy.instructions = "public" leaves no DP model that could respond or be adopted')

    def check(self, scenario: Scenario) -> None:
        """What is needed besides instructions: above all a professional model that is not the clients' own."""
        client, server = scenario.client, scenario.server
        professional = server.professional or server.llm
        if "://" in client.generator:
            raise BadValue(
                f"client.generator {client.generator!r} is an endpoint: clients train this model, name one with weights"
            )
        if isinstance(professional, str) and weights_hash(professional) == weights_hash(client.generator):
            raise BadValue(
                f"the professional model {professional!r} is the clients' own, it would teach itself: name "
                "one that knows more as server.professional"
            )
        if _chats(professional) and self.judge == "likelihood":
            raise BadValue(f'{NO_SCORES}: say strategy.judge = "instruction"')
        if self.instructions == "public" and server.public is None:
            raise BadValue('strategy.instructions = "public" needs server.public: where they come from')
        if self.instructions == "dp" and self.adopts == "target" and client.generator_training.loss_on != "record":
            raise BadValue(
                'client.generator_training.loss_on must be "record": the DP models are to write instructions'
            )


@dataclass(frozen=True)
class CrossLMOptions:
    """Options; all are this reconstruction's own.

    Attributes:
        feedback: `scores`; `shuffled`: the same scores at other texts, the ablation; `none`: nobody is asked, the LLM
            stays as it is and clients learn all its texts (ZeroGen).
        keep: Share of each label's texts, by score, that the LLM and the clients learn from.
        teaching: How the LLM learns from them.
        num_texts: Texts that the LLM writes in a round, before any are dropped.
        min_words: Texts of fewer words are dropped.
        sentences: Sentences are asked for: texts that look like code, JSON or markup are dropped.
        temperature: Of the LLM.
        top_p: Of the LLM.
        max_new_tokens: Longest text of the LLM.
    """

    feedback: Literal["scores", "shuffled", "none"] = "scores"
    keep: Share = 0.35
    teaching: Teaching = field(default_factory=Teaching)
    num_texts: Annotated[Count, most(MAX_TEXTS)] = 800
    min_words: Count = 5
    sentences: bool = False
    temperature: Positive = 1.0
    top_p: Share = 0.95
    max_new_tokens: Count = 48

    def __post_init__(self) -> None:
        in_range(self, "strategy")

    def warnings(self, labels: Sequence[str]) -> list[str]:
        """Labels that the LLM writes no text of."""
        return few_texts(self.num_texts, labels)

    @property
    def teaches(self) -> bool:
        """Whether the LLM changes."""
        return self.feedback != "none" and self.teaching.update != "none"

    def check(self, scenario: Scenario) -> None:
        """Classification; an LLM that can be tuned; clients whose settings can protect scores."""
        if self.teaches and isinstance(scenario.server.llm, Endpoint):
            raise BadValue(
                "CrossLM tunes the server LLM, and server.llm is an endpoint: name a model with weights, or "
                'say strategy.teaching.update = "none"'
            )
        if _chats(scenario.server.llm):
            raise BadValue(
                f"{NO_LINE}, and CrossLM's texts go on after a label's name: name one that goes on after a "
                "prompt, or a model with weights, as server.llm"
            )
        client, data = scenario.client, scenario.data
        if self.feedback == "none" or client.guarantee == "none":
            return
        if client.scores == "model" and client.task_training.trains == "head":
            raise BadValue(
                'client.scores = "model" trains layers that task_training.trains = "head" leaves as they '
                'are: say client.scores = "noise", or trains = "all"'
            )
        # Patients, and a file's records, are counted when the data is divided, or declared by their site.
        if data.world is not None and data.notes_per_patient == 1:
            try:
                client.score_plan(data.train_per_client, scenario.rounds)
            except BudgetTooSmall as problem:
                raise BadValue(f"what protects the clients' scores does not fit the budget: {problem}") from problem
