"""Every request and every reply; nothing else crosses the network.

Each field of a reply declares its origin. `fedsynth.federation.records` packs nothing else:

- PUBLIC: computed from public inputs only (the request, the scenario, the plan).
- RELEASED: what a mechanism let out under a grant, or post-processing of it.
- MEASURED: a figure of a task model that learnt private text, on a test set declared public. Simulations only, unless a
  site's policy allows it; not covered by epsilon, and reports say so.
- NO_GUARANTEE: let out without a mechanism, through `release_without_guarantee`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from fedsynth.corpus import Corpus, Scores
from fedsynth.lora import Adapter
from fedsynth.privacy.plan import Statement

R = TypeVar("R")


class Origin(StrEnum):
    """Why a field may leave a client."""

    PUBLIC = "public"
    RELEASED = "released"
    MEASURED = "measured"
    NO_GUARANTEE = "no_guarantee"


def _leaves(origin: Origin, **more: Any) -> Any:
    return dataclasses.field(metadata={"origin": origin}, **more)


@dataclass(frozen=True)
class Request(Generic[R]):
    """What a server asks; `task` is its Flower action, `reply` the class of the reply."""

    task: ClassVar[str]
    reply: ClassVar[type[Any]]


@dataclass(frozen=True)
class Synthesized:
    """Text that a DP generator wrote; or true text of a simulated client."""

    corpus: Corpus = _leaves(Origin.RELEASED)
    statement: Statement = _leaves(Origin.PUBLIC)
    unfinished: int = _leaves(Origin.RELEASED)
    """Samples cut at the token limit, or of more characters than a text may have; left out of the corpus."""


@dataclass(frozen=True)
class Synthesize(Request[Synthesized]):
    """Train a generator on private text, sample from it with the labels as control codes (FDKT, steps 1 and 2).

    Attributes:
        per_label: Samples for every label of the public list, present at the client or not.
        temperature: Of the sampling.
        top_p: Nucleus of the sampling.
        max_new_tokens: Longest sample.
        seed: Public: order of nothing private depends on it, unless true texts are drawn.
        true_texts: Train nothing, and give at most `per_label` private texts of each label as they are: a bound that
            simulated clients without a guarantee give, and no site.
    """

    task: ClassVar[str] = "train.synthesize"
    reply: ClassVar[type[Any]] = Synthesized
    per_label: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    true_texts: bool = False


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
        start: The adapter to go on from, in the first round a new one: the same for all clients.
        seed: Public; of nothing private under DP, of the order of batches without a guarantee.
        frozen_a: Train and send the factors B alone (FFA-LoRA); A stays as it starts.
        proximal: Mu of FedProx's pull towards the start; None: no pull.
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
    """Use an adapter of the server's from now on (KnowledgeSG, step 6)."""

    task: ClassVar[str] = "train.adopt"
    reply: ClassVar[type[Any]] = Adopted
    adapter: Adapter


@dataclass(frozen=True)
class Scored:
    """What a client thinks of the server's texts; numbers only."""

    scores: Scores = _leaves(Origin.RELEASED)
    statement: Statement = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class Score(Request[Scored]):
    """Rate each text of the server: the task model's confidence in its label (CrossLM).

    Attributes:
        corpus: Texts that the LLM wrote, with the labels that they were asked for.
        seed: Public seed of a scoring model's start.
    """

    task: ClassVar[str] = "train.score"
    reply: ClassVar[type[Any]] = Scored
    corpus: Corpus
    seed: int


# What a funnel of a client may speak of: these, and no word of its own.
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
    """What became of the self-generated candidates: how many were written, dropped (`FUNNEL`) and kept."""


@dataclass(frozen=True)
class SelfTrain(Request[SelfTrained]):
    """Write synthetic records in context, select them, train on both kinds apart, send the mix (FedPIT, section 3).

    Attributes:
        start: The global adapter; in the first round a new one.
        seed: Public seed of the order of batches, as in `Finetune`.
        writing_seed: Public seed of all that has to do with synthetic records: a stream of its own, so that the
            training on private ones is the same without them.
        share: Beta: weight of the adapter trained on private text in what is sent. 1 is FedIT, and writes nothing.
        candidates: Self-generated records asked for.
        keep: How many of them are trained on, at most.
        shots: Demonstrations in a prompt, at most.
        selection: `ifs` (the paper's), or `random`.
        training: `isolated` (the paper's): private and synthetic text each from the same start. `mixed`: one training
            on both (FedMIT). `personal` (version 1): the synthetic adapter is sent, the client keeps one trained on
            both. `share` counts in the first only.
        max_new_tokens: Longest instruction or response that is written.
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
    """The task model stays with its client."""

    received: int = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class Learn(Request[Learnt]):
    """Train the task model on the server's text, then on private text. Instructions: the client's adapter, likewise.

    Attributes:
        corpus: Augmented text for this client; None: private text only.
        seed: Public seed of initialisation and request.
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
        adapter: Measure the client's generator with this adapter instead; nothing is put to use.
    """

    task: ClassVar[str] = "evaluate.evaluate"
    reply: ClassVar[type[Any]] = Evaluated
    adapter: Adapter | None = None


LABELLED = ("accuracy", "macro_f1")
WRITTEN = ("exact_match", "field_match", "rouge_l")
LOSS = "loss"


def measured(request: Evaluate, *, instructs: bool) -> tuple[str, ...]:
    """Names of the figures of a reply, each of which it has: all but the loss are shares.

    Args:
        request: A loss belongs to an adapter that comes with it.
        instructs: Whether the task is to follow instructions, else there are labels.
    """
    figures = WRITTEN if instructs else () if request.adapter is not None else LABELLED
    return figures if request.adapter is None else (*figures, LOSS)


class ErrorCode(StrEnum):
    """Why a client refused. A closed list: the text of an exception may hold private values, so none is sent."""

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
    """The constant code of a refusal; what happened stands in the site's own log."""

    code: ErrorCode = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class Envelope:
    """Which cell and client an order is for. The digest of order and envelope makes a repeated order recognisable.

    Attributes:
        run: Public id of the world that requests belong to; "simulated" where each cell has ledgers of its own.
        exchange: Number of the exchange within the cell.
        client: The client.
        stack: Homes of one number train in one pass where they can. No part of what makes a request known again.
    """

    run: str
    arm: str
    seed: int
    exchange: int
    client: int
    stack: int = 0


Output = Literal["text", "adapter", "scores", "metrics"]
OUTPUTS: tuple[Output, ...] = get_args(Output)


def outputs(request: Request[Any]) -> set[Output]:
    """What the reply to a request would let out."""
    kinds: dict[type[Request[Any]], set[Output]] = {
        Synthesize: {"text"},
        Finetune: {"adapter"},
        SelfTrain: {"adapter", "metrics"},  # how many candidates were kept tells of private text
        Score: {"scores"},
        Evaluate: {"metrics"},
        Adopt: set(),
        Learn: set(),
    }
    return kinds[type(request)]


REQUESTS: tuple[type[Request[Any]], ...] = (Synthesize, Finetune, Adopt, Score, SelfTrain, Learn, Evaluate)
Guarantee = Literal["dp", "none"]
