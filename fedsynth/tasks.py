"""Every order and every answer; nothing else crosses the network.

Each field of an answer declares its origin. `fedsynth.wire` packs nothing else:

- PUBLIC: computed from public inputs only (the order, the scenario, the plan).
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
from typing import Any, ClassVar, Generic, Literal, TypeVar

from fedsynth.corpus import Corpus
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
class Order(Generic[R]):
    """What a server asks; `task` is its Flower action, `reply` the class of the answer."""

    task: ClassVar[str]
    reply: ClassVar[type[Any]]


@dataclass(frozen=True)
class Synthesized:
    """Text that a DP generator wrote."""

    corpus: Corpus = _leaves(Origin.RELEASED)
    statement: Statement = _leaves(Origin.PUBLIC)
    unfinished: int = _leaves(Origin.RELEASED)
    """Samples cut at the token limit; left out of the corpus."""
    adapter: Adapter | None = _leaves(Origin.RELEASED, default=None)


@dataclass(frozen=True)
class Synthesize(Order[Synthesized]):
    """Train a generator on private text, sample from it with the labels as control codes (FDKT, steps 1 and 2).

    Attributes:
        per_label: Samples for every label of the public list, present at the client or not.
        temperature: Of the sampling.
        top_p: Nucleus of the sampling.
        max_tokens: Longest sample.
        seed: Public: order of nothing private depends on it.
        share_adapter: Send the DP adapter, too: post-processing of the same release, no further cost.
    """

    task: ClassVar[str] = "train.synthesize"
    reply: ClassVar[type[Any]] = Synthesized
    per_label: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    share_adapter: bool = False


@dataclass(frozen=True)
class Learnt:
    """The task model stays with its client."""

    received: int = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class Learn(Order[Learnt]):
    """Train the task model on the server's text, then on private text.

    Attributes:
        corpus: Augmented text for this client; None: private text only.
        seed: Public seed of initialisation and order.
    """

    task: ClassVar[str] = "train.learn"
    reply: ClassVar[type[Any]] = Learnt
    seed: int
    corpus: Corpus | None = None


@dataclass(frozen=True)
class Evaluated:
    """Figures on the client's test set."""

    metrics: Mapping[str, float] = _leaves(Origin.MEASURED)
    examples: int = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class Evaluate(Order[Evaluated]):
    """Measure the task model on the client's test set."""

    task: ClassVar[str] = "evaluate.evaluate"
    reply: ClassVar[type[Any]] = Evaluated


class Code(StrEnum):
    """Why a client refused. A closed list: the text of an exception may hold private values, so none is sent."""

    BUDGET_EXHAUSTED = "budget_exhausted"
    BUDGET_TOO_SMALL = "budget_too_small"
    NOT_ALLOWED = "not_allowed"
    BAD_ORDER = "bad_order"
    NO_TASK_MODEL = "no_task_model"
    SELF_CHECK_FAILED = "self_check_failed"
    FAILED = "failed"


@dataclass(frozen=True)
class Refused:
    """The constant code of a refusal; what happened stands in the site's own log."""

    code: Code = _leaves(Origin.PUBLIC)


@dataclass(frozen=True)
class Envelope:
    """Which cell and home an order is for. The digest of order and envelope makes a repeated order recognisable.

    Attributes:
        run: Public id of the world that orders belong to; "simulated" where each cell has ledgers of its own.
        exchange: Number of the exchange within the cell.
        home: The client; SuperNode p of N hosts homes p, p + N, p + 2 N, ...
    """

    run: str
    arm: str
    seed: int
    exchange: int
    home: int


ORDERS: tuple[type[Order[Any]], ...] = (Synthesize, Learn, Evaluate)
Guarantee = Literal["dp", "none"]
