"""The options of the methods that have many, and the scenarios that these methods refuse before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from fedsynth.limits import (
    MAX_NEAREST,
    MAX_SAMPLES,
    MAX_TEMPERATURE,
    MAX_TEXTS,
    MAX_TOP_K,
    MIN_TEMPERATURE,
    MIN_TOP_P,
    Tokens,
    least,
    most,
)
from fedsynth.models.hub import weights_hash
from fedsynth.privacy.plan import BudgetTooSmall
from fedsynth.scenario.client import Client, Tuning
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.server import Endpoint
from fedsynth.strategies.lora_avg import Aggregation
from fedsynth.synthesis.distillation import Judge
from fedsynth.synthesis.reward_tuning import Teaching
from fedsynth.typed import BadValue, Count, Positive, Range, Share, in_range

TopK: TypeAlias = Annotated[int, least(0), most(MAX_TOP_K)]


@dataclass(frozen=True)
class FDKTOptions:
    """Options of FDKT; section numbers are those of docs/methods/fdkt.md.

    Attributes:
        per_label: Drafts that each client writes per label; combinations of attributes take turns in them.
        draft_temperature: The clients' sampling temperature.
        draft_top_p: The clients' nucleus of sampling.
        draft_top_k: The clients draw from so many of the likeliest tokens alone; 0 for all.
        draft_tokens: Longest draft, in tokens.
        min_words: Texts of fewer words are dropped (10 in the paper's code, for reviews; notes are shorter). In scripts
            without blanks between words each character is one.
        sentences: Texts that look like code, JSON or markup are dropped.
        judge: `likelihood` (a base LLM scores), `instruction` (the paper's: an LLM that follows instructions), `votes`
            (the clients of `votes_from` vote for those near to their private text, as in private evolution), `none`.
        judge_rivals: Number of other labels that the likelihood judge compares a draft's own label with.
        judge_tokens: Longest answer of the judge that follows instructions, in tokens, thoughts included: a cluster
            whose answer ends before its numbers is lost.
        cluster_size: Drafts that the judge compares at once (4 in the paper's code).
        keep: Drafts that the judge keeps of a cluster; those with the most votes of each label.
        demonstrations: `per_label` (k of one label: small contexts, many labels), `all_labels` (the paper's), or
            `none`: the ablation in which the LLM sees label names only and clients release nothing.
        shots: Demonstrations per label in a prompt.
        drafts: `generator`: what clients' generators write. `true_texts`: `per_label` private texts of each label as
            they are, at most: the bound of what demonstrations can give. Simulations only, without any guarantee.
        texts: `llm`: clients learn from what the LLM wrote. `drafts`: from their own DP drafts, without the LLM.
        num_texts: Texts that the LLM writes for each client.
        temperature: The LLM's sampling temperature.
        top_p: The LLM's nucleus of sampling.
        top_k: The LLM draws from so many of the likeliest tokens alone; 0 for all. Not every endpoint takes another.
        max_new_tokens: Longest text of the LLM, in tokens.
        one_to_many: The LLM writes once, from the drafts of all clients, and every client learns these texts. Else it
            writes for each client, from that client's own drafts.
        label_check: `embedder`: drafts and written texts that lie nearer to another label's words are dropped, by
            `server.embedder` and the task card. `llm`: those for which the server LLM chooses another label, or none.
            `none`: no check.
        attempts: How often the LLM is asked, at most, for the texts that labels still lack after the filters.
        zero_shot: Clients also learn `num_texts` of the LLM's texts without demonstrations, beside the drafts or what
            the LLM wrote after drafts.
        yield_floor: Least share of texts that must pass the filters: of the LLM's zero-shot texts before clients are
            asked, and of all clients' drafts before the LLM reads them. Below it the run stops. 0: no floor.
        drafts_from: Clients that are asked for drafts, by their numbers; left out, all. A client that is not asked
            spends nothing; with `one_to_many` it gains from the drafts of the others.
        cap_votes: With the judge `votes`: no client's votes weigh more together than those of the median client.
        votes_from: Clients that judge by votes. Under a guarantee those that give drafts as well need
            `client.voting.share`, which divides their budget.
    """

    per_label: Annotated[Count, most(MAX_SAMPLES)] = 50
    draft_temperature: Annotated[Positive, least(MIN_TEMPERATURE), most(MAX_TEMPERATURE)] = 0.8
    draft_top_p: Annotated[Share, least(MIN_TOP_P)] = 0.95
    draft_top_k: TopK = 0
    draft_tokens: Tokens = 48
    min_words: Count = 10
    sentences: bool = False
    judge: Literal["likelihood", "instruction", "votes", "none"] = "likelihood"
    judge_rivals: Count = 16
    judge_tokens: Tokens = 64
    cluster_size: Count = 4
    keep: Count = 2
    demonstrations: Literal["per_label", "all_labels", "none"] = "per_label"
    shots: Count = 4
    drafts: Literal["generator", "true_texts"] = "generator"
    texts: Literal["llm", "drafts"] = "llm"
    num_texts: Annotated[Count, most(MAX_TEXTS)] = 800
    temperature: Positive = 1.0
    top_p: Share = 0.95
    top_k: TopK = 0
    max_new_tokens: Count = 48
    one_to_many: bool = False
    label_check: Literal["none", "embedder", "llm"] = "none"
    attempts: Annotated[Count, most(20)] = 1
    zero_shot: bool = False
    yield_floor: Annotated[float, Range("lie in [0, 1]", lambda value: 0 <= value <= 1)] = 0.0
    drafts_from: tuple[int, ...] = ()
    cap_votes: bool = False
    votes_from: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        in_range(self, "strategy")
        if self.cap_votes and self.judge != "votes":
            raise BadValue('strategy.cap_votes belongs to strategy.judge = "votes"')
        if (self.judge == "votes") != bool(self.votes_from):
            raise BadValue('strategy.judge = "votes" and strategy.votes_from, which names who votes, belong together')
        if self.judge == "votes" and not self.one_to_many:
            raise BadValue('strategy.judge = "votes" judges all drafts together: say strategy.one_to_many = true')

    def check(self, scenario: Scenario) -> None:
        """Checks that an endpoint as LLM can score as the options need, and that clients who draft or vote exist.

        Raises:
            BadValue: If not, with the way out.
        """
        if self.drafts == "true_texts":
            _check_true_texts(self, scenario)
        clients = 1 if scenario.data.pooled else scenario.data.clients
        if self.zero_shot and not self.asks:
            raise BadValue(
                'strategy.zero_shot stands beside drafts: with strategy.demonstrations = "none" all texts are such'
            )
        if self.drafts_from and not set(self.drafts_from) <= set(range(clients)):
            raise BadValue(f"strategy.drafts_from names clients from 0 to {clients - 1}, got {list(self.drafts_from)}")
        if self.judge == "votes":
            self._check_voters(scenario, clients)
        elif scenario.client.voting.share and self.asks:
            raise BadValue('client.voting.share is for votes on drafts: say strategy.judge = "votes", or leave it out')
        combinations = len(scenario.task.combinations)
        if self.asks and self.drafts == "generator" and self.per_label < combinations:
            raise BadValue(
                f"strategy.per_label = {self.per_label} drafts of a label leave out some of the {combinations} "
                f"combinations of attributes: ask for {combinations} at least, or list fewer values"
            )
        judges = self.judge != "none" and self.texts == "llm" and self.asks
        if judges and _chats(scenario.server.llm) and self.judge == "likelihood":
            raise BadValue(f'{NO_SCORES}: say strategy.judge = "instruction"')

    def _check_voters(self, scenario: Scenario, clients: int) -> None:
        if not set(self.votes_from) <= set(range(clients)):
            raise BadValue(f"strategy.votes_from names clients from 0 to {clients - 1}, got {list(self.votes_from)}")
        drafting = set(self.drafts_from or range(clients))
        both = sorted(drafting & set(self.votes_from)) if scenario.client.guarantee == "dp" else []
        if both and not scenario.client.voting.share:
            raise BadValue(
                f"clients {both} would give drafts and votes, and each client's budget is for one of the two: give "
                "client.voting.share of it to votes; or name in strategy.drafts_from those that draft, and in "
                "strategy.votes_from others"
            )
        if scenario.client.voting.share and not both:
            raise BadValue(
                "client.voting.share divides a client's budget between drafts and votes, and no client gives both: "
                "leave it out"
            )
        check_votes(scenario, len(set(self.votes_from)), cap=self.cap_votes)

    def warnings(self, labels: Sequence[str]) -> list[str]:
        """Warns of labels for which the LLM writes no text."""
        return few_texts(self.num_texts, labels) if self.augments else []

    @property
    def asks(self) -> bool:
        """True if clients are asked for drafts."""
        return self.demonstrations != "none"

    @property
    def augments(self) -> bool:
        """True if the LLM writes texts."""
        return self.texts == "llm" or not self.asks or self.zero_shot


def _check_true_texts(options: FDKTOptions, scenario: Scenario) -> None:
    if scenario.client.guarantee != "none":
        raise BadValue('strategy.drafts = "true_texts" has no guarantee: say client.guarantee = "none"')
    if options.texts != "llm" or options.demonstrations == "none":
        raise BadValue(
            'strategy.drafts = "true_texts" are demonstrations of the LLM: say strategy.texts = "llm", and '
            'strategy.demonstrations = "per_label" or "all_labels"'
        )


def check_votes(scenario: Scenario, voters: int, *, cap: bool = False) -> None:
    """Checks that votes of so many clients fit the budget, and a secure sum's cohort, and can be capped if they are to.

    Raises:
        BadValue: If not.
    """
    client = scenario.client
    if client.guarantee == "none" or client.budget is None:
        return
    if cap and client.secure_sum is not None:
        raise BadValue(
            "strategy.cap_votes bounds each client's votes at the server, which sees none of them in a secure sum: "
            "leave one of cap_votes and client.secure_sum out"
        )
    check_cohort(client, voters)
    try:
        client.vote_plan(1, scenario.rounds)  # the number of units changes nothing
    except BudgetTooSmall as problem:
        raise BadValue(f"the noise of the votes does not fit the budget: {problem}") from problem


def check_cohort(client: Client, asked: int) -> None:
    """Checks that a secure sum, if there is one, is of all clients that are asked.

    Raises:
        BadValue: If not.
    """
    if client.secure_sum is not None and client.secure_sum.clients != asked:
        raise BadValue(f"client.secure_sum.clients is {client.secure_sum.clients}, but {asked} are asked: say {asked}")


NO_SCORES = 'an endpoint with api = "chat" scores no text'


def _chats(model: str | Endpoint | None) -> bool:
    return isinstance(model, Endpoint) and model.api == "chat"


def few_texts(num_texts: int, labels: Sequence[str]) -> list[str]:
    """A warning if the LLM is asked for fewer texts than there are labels: texts are asked for label by label."""
    if num_texts >= len(labels):
        return []
    none = labels[num_texts:]
    named = ", ".join(map(repr, none[:5])) + (", ..." if len(none) > 5 else "")
    return [
        f"strategy.num_texts = {num_texts} is less than the {len(labels)} labels: the LLM writes no text of "
        f"{len(none)} of them ({named}); ask for {len(labels)} at least"
    ]


@dataclass(frozen=True)
class PrivateEvolutionOptions:
    """Options of private evolution; the steps are those of docs/methods/private-evolution.md.

    Attributes:
        votes: `counted`: clients vote. `permuted`: the same votes on other texts of their label; `none`: no client is
            asked, and texts are kept by chance; `all`: likewise, and every text is kept (three controls).
        voters: Clients that vote, by their numbers; left out, all. All clients learn.
        nearest: Texts that each private text votes for.
        cap_votes: No client's votes weigh more together than those of the median client, against clients that vote as
            they like. Not with `client.secure_sum`, of which nobody sees a client's own.
        keep: Texts of each label that are kept of a round's candidates.
        select: `rank`: those with the most votes. `proportion`: drawn in proportion to the votes above `threshold`.
        threshold: Is taken from each text's votes before such a draw.
        variations: Further texts that the LLM writes after each kept one, as candidates of the next round.
        learns: Clients learn the `kept` texts of the round, or the `pool` of these and their variations.
        num_texts: Texts that the LLM writes by the task card alone, the candidates of the first round.
        shots: Kept texts of a label in a prompt for variations.
        min_words: Texts of fewer words are dropped.
        sentences: Texts that look like code, JSON or markup are dropped.
        label_check: As for FDKT: texts that fit another label are dropped by the `embedder`, or by the `llm`.
        attempts: How often the LLM is asked, at most, for the texts that labels still lack after the filters.
        temperature: The LLM's sampling temperature.
        top_p: The LLM's nucleus of sampling.
        max_new_tokens: Longest text of the LLM, in tokens.
    """

    votes: Literal["counted", "permuted", "none", "all"] = "counted"
    voters: tuple[int, ...] = ()
    nearest: Annotated[Count, most(MAX_NEAREST)] = 1
    cap_votes: bool = False
    keep: Count = 3
    select: Literal["rank", "proportion"] = "rank"
    threshold: float = 0.0
    variations: Annotated[int, least(0), most(MAX_SAMPLES)] = 1
    learns: Literal["kept", "pool"] = "kept"
    num_texts: Annotated[Count, most(MAX_TEXTS)] = 800
    shots: Count = 1
    min_words: Count = 5
    sentences: bool = False
    label_check: Literal["none", "embedder", "llm"] = "none"
    attempts: Annotated[Count, most(20)] = 1
    temperature: Positive = 1.0
    top_p: Share = 0.95
    max_new_tokens: Count = 48

    def __post_init__(self) -> None:
        in_range(self, "strategy")

    @property
    def asks(self) -> bool:
        """True if clients vote."""
        return self.votes in ("counted", "permuted")

    def check(self, scenario: Scenario) -> None:
        """Checks that the voters exist, that their encoder reads text, and that the votes fit the budget.

        Raises:
            BadValue: If not, with the way out.
        """
        clients = 1 if scenario.data.pooled else scenario.data.clients
        if self.voters and not set(self.voters) <= set(range(clients)):
            raise BadValue(f"strategy.voters names clients from 0 to {clients - 1}, got {list(self.voters)}")
        if self.threshold and self.select != "proportion":
            raise BadValue('strategy.threshold belongs to strategy.select = "proportion"; a rank needs none')
        if self.asks:
            check_votes(scenario, len(set(self.voters)) or clients, cap=self.cap_votes)

    def warnings(self, labels: Sequence[str]) -> list[str]:
        """Warns of labels for which the LLM writes no text."""
        return few_texts(self.num_texts, labels)


@dataclass(frozen=True)
class KnowledgeSGOptions:
    """Options of KnowledgeSG; the steps are those of docs/methods/knowledge-sg.md.

    Attributes:
        instructions: `dp`: the clients' DP models write them. `public`: drawn from `server.public`, no private text is
            used (a control that shows the value of the clients' instructions).
        responses: `professional`, or `own`: the DP model's own responses.
        adopts: The model that clients use in the end: the distilled `target`, the `dp` adapter, or `nothing`: the base.
        personal: Each client's DP model writes for the client's own target. Else their average writes for one target.
        aggregation: The form of that average, as in `lora_avg`.
        num_texts: Records that a DP model writes, or public instructions drawn.
        temperature: The DP model's sampling temperature.
        top_p: The DP model's nucleus of sampling.
        max_new_tokens: Longest record, in tokens.
        min_words: Instructions of fewer words are dropped.
        sentences: Instructions that look like code, JSON or markup are dropped.
        novelty: Instructions this close (ROUGE-L) to an earlier one are dropped; at 1 only those with the same words.
        judge: `likelihood` (a base LM scores), `instruction` (an LLM that follows instructions), `none`.
        judge_share: Share of the instructions that the `likelihood` judge keeps.
        response_tokens: Longest response of the professional model, in tokens.
        pairs: Instructions with responses to learn, at most.
        start_from: `dp`: the target continues from the DP adapter (the paper's). `base`: from a new one.
        loss_on: The target learns to write the `response`, or the whole `record`.
        tuning: The target's training.
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
        """Checks the models: above all, the professional model must not be the clients' own.

        Raises:
            BadValue: If a model does not fit the options, with the way out."""
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
        feedback: `scores`; `shuffled`: the same scores at other texts (an ablation); `none`: no client is asked, the
            LLM stays as it is and clients learn all its texts (ZeroGen).
        keep: Share of each label's texts, by score, that the LLM and the clients learn from.
        teaching: The LLM's training on these texts.
        num_texts: Texts that the LLM writes in a round, before any are dropped.
        min_words: Texts of fewer words are dropped.
        sentences: Texts that look like code, JSON or markup are dropped.
        temperature: The LLM's sampling temperature.
        top_p: The LLM's nucleus of sampling.
        max_new_tokens: Longest text of the LLM, in tokens.
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
        """Warns of labels for which the LLM writes no text."""
        return few_texts(self.num_texts, labels)

    @property
    def teaches(self) -> bool:
        """True if the LLM is trained."""
        return self.feedback != "none" and self.teaching.update != "none"

    def check(self, scenario: Scenario) -> None:
        """Checks that the LLM can be tuned and that the clients' settings can protect scores.

        Raises:
            BadValue: If not, with the way out."""
        if self.teaches and isinstance(scenario.server.llm, Endpoint):
            raise BadValue(
                "CrossLM tunes the server LLM, and server.llm is an endpoint: name a model with weights, or "
                'say strategy.teaching.update = "none"'
            )
        placed = [key for key in ("device_map", "quantization") if getattr(scenario.server, key) != "none"]
        if self.teaches and placed:
            raise BadValue(
                f"CrossLM tunes the server LLM on one device, and server.{placed[0]} is for models that stay as they "
                'are: leave it out, or say strategy.teaching.update = "none"'
            )
        client, data = scenario.client, scenario.data
        if client.task_training.baseline and self.feedback != "none":
            raise BadValue(
                f'client.task_training.trains = "{client.task_training.trains}" is not sure of any label, and clients '
                'score texts by how sure they are: say "all" or "head"'
            )
        if self.feedback == "none" or client.guarantee == "none":
            return
        if client.scores == "model" and client.task_training.trains == "head":
            raise BadValue(
                'client.scores = "model" trains layers that task_training.trains = "head" leaves as they '
                'are: say client.scores = "noise", or trains = "all"'
            )
        check_cohort(client, 1 if data.pooled else data.clients)
        if client.secure_sum is not None and client.scores == "model":
            raise BadValue(
                'client.scores = "model" needs no secure sum, as a model trained under a grant may score in the open: '
                'leave client.secure_sum out, or say client.scores = "noise"'
            )
        # Patients, and a file's records, are counted when the data is divided, or declared by their site.
        if data.world is not None and data.notes_per_patient == 1:
            try:
                client.score_plan(data.train_per_client, scenario.rounds)
            except BudgetTooSmall as problem:
                raise BadValue(f"what protects the clients' scores does not fit the budget: {problem}") from problem
