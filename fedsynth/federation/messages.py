"""Every request and every reply; nothing else crosses the network.

Each field of a reply declares its origin. `fedsynth.federation.records` packs nothing else:

- PUBLIC: computed from public inputs only (the request, the scenario, the plan).
- RELEASED: the output of a mechanism under a grant, or post-processing of it.
- MEASURED: a figure of a task model that learnt private text, on a test set declared public. Simulations only, unless a
  site's policy allows it. Epsilon does not cover it, and reports say so.
- NO_GUARANTEE: released without a mechanism, through `release_without_guarantee`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from fedsynth.corpus import Corpus, Scores, Votes
from fedsynth.federation.secure_sum import Kind, Offer, Sealed, SeedShare, Signed
from fedsynth.lora import Adapter
from fedsynth.privacy.statement import Statement

R = TypeVar("R")


class Origin(StrEnum):
    """The reason why a field may leave a client."""

    PUBLIC = "public"
    RELEASED = "released"
    MEASURED = "measured"
    NO_GUARANTEE = "no_guarantee"


def _leaves(origin: Origin, **more: Any) -> Any:
    return dataclasses.field(metadata={"origin": origin}, **more)


@dataclass(frozen=True)
class Request(Generic[R]):
    """A server's request; `task` is its Flower action, `reply` the class of its reply."""

    task: ClassVar[str]
    reply: ClassVar[type[Any]]

    @property
    def discloses(self) -> bool:
        """True if the reply holds private text as it is; simulated clients alone give one."""
        return False


@dataclass(frozen=True)
class Synthesized:
    """Text that a DP generator wrote; or true text of a simulated client."""

    corpus: Corpus = _leaves(Origin.RELEASED)
    statement: Statement = _leaves(Origin.PUBLIC)
    unfinished: int = _leaves(Origin.RELEASED)
    """Number of samples that are not in the corpus: cut at the token limit, of too many characters, or with an
    identifier that the site's policy keeps back."""


@dataclass(frozen=True)
class Synthesize(Request[Synthesized]):
    """Train a generator on private text and sample from it with the labels as control codes (FDKT, steps 1 and 2).

    Attributes:
        per_label: Samples for every label of the public list, present at the client or not.
        temperature: The sampling temperature.
        top_p: The nucleus of sampling.
        max_new_tokens: Longest sample, in tokens.
        seed: Public seed; no order of private text depends on it, unless true texts are drawn.
        true_texts: Train nothing, and give at most `per_label` private texts of each label as they are: a bound that
            simulated clients without a guarantee give, and no site.
        start: The adapter to train from, made of public or released text; None for a new one.
        top_k: Only so many of the likeliest tokens are drawn from; None for all.
    """

    task: ClassVar[str] = "train.synthesize"
    reply: ClassVar[type[Any]] = Synthesized
    per_label: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    true_texts: bool = False
    start: Adapter | None = None
    top_k: int | None = None

    @property
    def discloses(self) -> bool:
        """True for `true_texts`."""
        return self.true_texts


@dataclass(frozen=True)
class Finetuned:
    """A LoRA trained on private text: under a grant, or without any guarantee."""

    adapter: Adapter = _leaves(Origin.RELEASED)
    statement: Statement = _leaves(Origin.PUBLIC)
    records: int = _leaves(Origin.PUBLIC)
    """Declared number of units: the client's weight in an average."""


@dataclass(frozen=True)
class Finetune(Request[Finetuned]):
    """Train the client's model on private text, as a LoRA (KnowledgeSG, step 1; FedIT).

    Attributes:
        start: The adapter to train from, the same for all clients; a new one in the first round.
        seed: Public seed. It draws nothing private under DP, and the order of batches without a guarantee.
        frozen_a: Train and send the factors B alone (FFA-LoRA); A stays as it starts.
        proximal: Mu of FedProx's pull towards the start; None for no pull.
    """

    task: ClassVar[str] = "train.finetune"
    reply: ClassVar[type[Any]] = Finetuned
    start: Adapter
    seed: int
    frozen_a: bool = False
    proximal: float | None = None


@dataclass(frozen=True)
class Adopted:
    """The adapter is in use at the client."""

    parameters: int = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class Adopt(Request[Adopted]):
    """Use the server's adapter from now on (KnowledgeSG, step 6)."""

    task: ClassVar[str] = "train.adopt"
    reply: ClassVar[type[Any]] = Adopted
    adapter: Adapter


@dataclass(frozen=True)
class Scored:
    """A client's ratings of the server's texts; numbers only."""

    scores: Scores = _leaves(Origin.RELEASED)
    statement: Statement = _leaves(Origin.PUBLIC)

    @property
    def numbers(self) -> Scores:
        """One for each text."""
        return self.scores


@dataclass(frozen=True)
class Score(Request[Scored]):
    """Rate each text of the server: the task model's confidence in its label (CrossLM).

    Attributes:
        corpus: The LLM's texts, each with the label that the LLM was asked to write for.
        seed: Public seed of a scoring model's initialisation.
        sum_id: Public id of a secure sum: the scores are whole numbers under the masks of that sum. Empty: none.
        members: The clients that have shared their seeds for it.
    """

    task: ClassVar[str] = "train.score"
    reply: ClassVar[type[Any]] = Scored
    corpus: Corpus
    seed: int
    sum_id: str = ""
    members: tuple[int, ...] = ()


@dataclass(frozen=True)
class Voted:
    """A client's votes for the server's texts; numbers only."""

    votes: Votes = _leaves(Origin.RELEASED)
    statement: Statement = _leaves(Origin.PUBLIC)

    @property
    def numbers(self) -> Votes:
        """One for each text."""
        return self.votes


@dataclass(frozen=True)
class Vote(Request[Voted]):
    """Vote for the texts of the server that lie nearest to private text of their label (private evolution).

    Attributes:
        corpus: The candidates, each with its label. Equal texts of a label are one candidate, the first of them.
        nearest: Each private text votes for so many candidates, with the weight 1 / sqrt(nearest) each.
        sum_id: Public id of a secure sum: the counts are whole numbers under the masks of that sum. Empty: none.
        members: The clients that have shared their seeds for it.
    """

    task: ClassVar[str] = "train.vote"
    reply: ClassVar[type[Any]] = Voted
    corpus: Corpus
    nearest: int = 1
    sum_id: str = ""
    members: tuple[int, ...] = ()


@dataclass(frozen=True)
class KeysOffered:
    """A client's public keys for one secure sum, signed."""

    offer: Offer = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class OfferKeys(Request[KeysOffered]):
    """Make keys for a secure sum (`fedsynth.federation.secure_sum`, exchange 1).

    Attributes:
        sum_id: The sum.
        kind: What it will add up.
    """

    task: ClassVar[str] = "train.offer_keys"
    reply: ClassVar[type[Any]] = KeysOffered
    sum_id: str
    kind: Kind


@dataclass(frozen=True)
class SeedsShared:
    """Shares of a client's seeds, each encrypted for another client; seeds are random, and know no text."""

    shares: tuple[Sealed, ...] = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class ShareSeeds(Request[SeedsShared]):
    """Check the keys of a sum's clients, and share two seeds among them (exchange 2)."""

    task: ClassVar[str] = "train.share_seeds"
    reply: ClassVar[type[Any]] = SeedsShared
    sum_id: str
    offers: tuple[Offer, ...]


@dataclass(frozen=True)
class SharesOpened:
    """The senders whose shares a client could not open."""

    unreadable: tuple[int, ...] = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class OpenShares(Request[SharesOpened]):
    """Open the shares that the others have encrypted for this client (exchange 3).

    Attributes:
        sum_id: The sum.
        sealed: From each sender, its shares.
    """

    task: ClassVar[str] = "train.open_shares"
    reply: ClassVar[type[Any]] = SharesOpened
    sum_id: str
    sealed: tuple[Sealed, ...]


@dataclass(frozen=True)
class SurvivorsSigned:
    """A client's signature of a list of survivors."""

    signature: str = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class SignSurvivors(Request[SurvivorsSigned]):
    """Sign the list of the clients whose vectors have arrived; a client signs one list of a sum (exchange 5)."""

    task: ClassVar[str] = "train.sign_survivors"
    reply: ClassVar[type[Any]] = SurvivorsSigned
    sum_id: str
    survivors: tuple[int, ...]


@dataclass(frozen=True)
class Unmasked:
    """A client's share of one seed of each client of a sum; with enough of them the server learns the sum."""

    shares: tuple[SeedShare, ...] = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class Unmask(Request[Unmasked]):
    """Open a sum whose survivors enough clients have signed (exchange 6).

    Attributes:
        sum_id: The sum.
        survivors: The list that was signed.
        signatures: Of the clients that signed it.
    """

    task: ClassVar[str] = "train.unmask"
    reply: ClassVar[type[Any]] = Unmasked
    sum_id: str
    survivors: tuple[int, ...]
    signatures: tuple[Signed, ...]


# A client's funnel has these names and none of the client's own.
FUNNEL = (
    "asked", "kept", "template marker", "control character", "bidi or tag character", "replacement character",
    "too short", "too long", "no response", "instruction like a local one", "record like a local one",
    "like an earlier one",
)  # fmt: skip


@dataclass(frozen=True)
class SelfTrained:
    """An adapter trained on private and self-generated text; it has no formal privacy."""

    adapter: Adapter = _leaves(Origin.NO_GUARANTEE)
    statement: Statement = _leaves(Origin.PUBLIC)
    records: int = _leaves(Origin.PUBLIC)
    funnel: Mapping[str, int] = _leaves(Origin.NO_GUARANTEE, default_factory=dict)
    """Counts of the self-generated candidates: written, dropped by reason (`FUNNEL`) and kept."""


@dataclass(frozen=True)
class SelfTrain(Request[SelfTrained]):
    """Write synthetic records in context, select them, train on both kinds apart, send the mix (FedPIT, section 3).

    Attributes:
        start: The global adapter; a new one in the first round.
        seed: Public seed of the order of batches, as in `Finetune`.
        writing_seed: Public seed of everything about synthetic records. It is a stream of its own, so that training on
            private records is the same without them.
        share: Beta, the weight in the sent mix of the adapter trained on private text. 1 is FedIT, and writes nothing.
        candidates: Number of self-generated records to write.
        keep: Number of self-generated records to train on, at most.
        shots: Demonstrations in a prompt, at most.
        selection: `ifs` (the paper's), or `random`.
        training: `isolated` (the paper's): private and synthetic text each from the same start. `mixed`: one training
            on both (FedMIT). `personal` (version 1): the synthetic adapter is sent, the client keeps one trained on
            both. `share` counts in `isolated` only.
        max_new_tokens: Longest instruction or response to write, in tokens.
    """

    task: ClassVar[str] = "train.self_train"
    reply: ClassVar[type[Any]] = SelfTrained
    start: Adapter
    seed: int
    writing_seed: int
    share: float = 0.5
    candidates: int = 32
    keep: int = 16
    shots: int = 8
    selection: Literal["ifs", "random"] = "ifs"
    training: Literal["isolated", "mixed", "personal"] = "isolated"
    max_new_tokens: int = 48


@dataclass(frozen=True)
class Learnt:
    """A receipt; the task model stays with its client."""

    received: int = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class Learn(Request[Learnt]):
    """Train the task model, or for instructions the client's adapter: on the server's text, then on private text.

    Attributes:
        corpus: Augmented text for this client; None for private text only.
        seed: Public seed of the initialisation and the order of batches.
    """

    task: ClassVar[str] = "train.learn"
    reply: ClassVar[type[Any]] = Learnt
    seed: int
    corpus: Corpus | None = None


@dataclass(frozen=True)
class Evaluated:
    """Figures on the client's test set."""

    metrics: Mapping[str, float] = _leaves(Origin.MEASURED)
    examples: int = _leaves(Origin.MEASURED)


@dataclass(frozen=True)
class Evaluate(Request[Evaluated]):
    """Measure the task model, or the adapter in use, on the client's test set.

    Attributes:
        adapter: Measure the client's generator with this adapter instead; the client does not adopt it.
    """

    task: ClassVar[str] = "evaluate.evaluate"
    reply: ClassVar[type[Any]] = Evaluated
    adapter: Adapter | None = None


LABELLED = ("accuracy", "macro_f1")
WRITTEN = ("exact_match", "field_match", "rouge_l")
CHOSEN = (*LABELLED, "parsed_accuracy", "readable")
LOSS = "loss"


def measured(request: Evaluate, *, instructs: bool, chooses: bool = False) -> tuple[str, ...]:
    """Names of the figures that a reply must have; all but the loss are shares.

    Args:
        request: The request; a reply has a loss if the request brings an adapter.
        instructs: True if the task is to follow instructions, False if texts have labels.
        chooses: True if these instructions ask for a label.
    """
    figures = CHOSEN if chooses else WRITTEN if instructs else () if request.adapter is not None else LABELLED
    return figures if request.adapter is None else (*figures, LOSS)


class ErrorCode(StrEnum):
    """A client's reason to refuse. The list is closed: an exception's text may hold private values and is not sent."""

    BUDGET_EXHAUSTED = "budget_exhausted"
    BUDGET_TOO_SMALL = "budget_too_small"
    NOT_ALLOWED = "not_allowed"
    BAD_REQUEST = "bad_order"
    NO_TASK_MODEL = "no_task_model"
    WRONG_ADAPTER = "wrong_adapter"
    WRONG_LABELS = "wrong_labels"
    WRONG_DATA = "wrong_data"
    AWAITS_APPROVAL = "awaits_approval"
    NOT_APPROVED = "not_approved"
    SELF_CHECK_FAILED = "self_check_failed"
    DISK_FULL = "disk_full"
    FAILED = "failed"


@dataclass(frozen=True)
class Refused:
    """The constant code of a refusal; the site's own log has the details."""

    code: ErrorCode = _leaves(Origin.PUBLIC)


SIMULATED = "simulated"  # the run of a simulation, in which each cell has ledgers of its own


@dataclass(frozen=True)
class Envelope:
    """The cell and client that a request is for. The digest of both makes a repeated request recognisable.

    Attributes:
        run: Public id of the run that a request belongs to; `SIMULATED`, or that of real sites.
        arm: The cell's arm; no part of the digest.
        seed: The cell's seed.
        exchange: Number of the exchange within the cell.
        client: The client.
        stack: Clients of one number train in one pass where they can; no part of the digest.
    """

    run: str
    arm: str
    seed: int
    exchange: int
    client: int
    stack: int = 0


Output = Literal["text", "adapter", "scores", "votes", "metrics"]
OUTPUTS: tuple[Output, ...] = get_args(Output)


def outputs(request: Request[Any]) -> set[Output]:
    """The kinds of outputs that the reply to a request releases."""
    kinds: dict[type[Request[Any]], set[Output]] = {
        Synthesize: {"text"},
        Finetune: {"adapter"},
        SelfTrain: {"adapter", "metrics"},  # the counts of candidates depend on private text
        Score: {"scores"},
        Vote: {"votes"},
        OfferKeys: set(),  # of a secure sum: random numbers and signatures
        ShareSeeds: set(),
        OpenShares: set(),
        SignSurvivors: set(),
        Unmask: set(),
        Evaluate: {"metrics"},
        Adopt: set(),
        Learn: set(),
    }
    return kinds[type(request)]


SUMMING: tuple[type[Request[Any]], ...] = (OfferKeys, ShareSeeds, OpenShares, SignSurvivors, Unmask)
REQUESTS: tuple[type[Request[Any]], ...] = (
    Synthesize, Finetune, Adopt, Score, Vote, *SUMMING, SelfTrain, Learn, Evaluate
)  # fmt: skip
Guarantee = Literal["dp", "none"]
