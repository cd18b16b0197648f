"""The only place where a result made from private text becomes releasable."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from fedsynth.corpus import Corpus, Provenance, Scores, Votes
from fedsynth.lora import Adapter
from fedsynth.privacy.ledger import Grant, Ledger
from fedsynth.privacy.plan import DPPlan

log = logging.getLogger(__name__)

M = TypeVar("M")
V = TypeVar("V", Corpus, Adapter, Scores, Votes)


class NotReleasable(RuntimeError):
    """A value that was to leave carries no guarantee, or not the one it claims."""


@dataclass(frozen=True)
class DPTrained(Generic[M]):
    """A model trained under a grant, with the receipt of the training.

    Attributes:
        model: The trainer's result.
        plan: The plan that the trainer read.
        grant: The grant that paid for this round.
        steps_run: Noisy steps that ran, empty batches included.
    """

    model: M
    plan: DPPlan
    grant: Grant
    steps_run: int


@dataclass(frozen=True)
class Trained(Generic[M]):
    """A model that saw private text without a mechanism, or that text itself, and the reason."""

    model: M
    reason: str


def release(trained: DPTrained[M], prompts: Sequence[str], answers: Sequence[str]) -> Corpus:
    """Text written by a model trained under a grant, now free to leave: post-processing of the training.

    Args:
        trained: The receipt; nothing else is accepted.
        prompts: Public prompts, or prompts that `trained.model` wrote from public ones.
        answers: One answer per prompt, of the same origin.

    Raises:
        NotReleasable: If `trained` is no receipt, or the training was not the planned and paid one.
    """
    _check_receipt(trained)
    return Corpus(tuple(prompts), tuple(answers), Provenance.DP_SYNTHETIC, grants=(trained.grant.id,))


def release_adapter(trained: DPTrained[M], adapter: Adapter) -> Adapter:
    """The weights of a model trained under a grant, now free to leave: the release behind its text.

    Raises:
        NotReleasable: As `release`.
    """
    _check_receipt(trained)
    return replace(adapter, grants=(trained.grant.id,))


def release_scores(trained: DPTrained[M], values: Sequence[float]) -> Scores:
    """Scores of the server's texts by a model trained under a grant: post-processing of the training.

    Args:
        trained: The model's receipt; for noised scores, the receipt of the Gaussian mechanism that released the vector.
        values: One score per text, in order, computed from `trained.model` and the server's texts alone.

    Raises:
        NotReleasable: As `release`.
    """
    _check_receipt(trained)
    return Scores(tuple(values), grants=(trained.grant.id,))


def release_votes(trained: DPTrained[M], values: Sequence[float]) -> Votes:
    """Votes with the noise of a grant on each of them.

    Args:
        trained: The receipt of the Gaussian mechanism that released the vector.
        values: One number per text, in order.

    Raises:
        NotReleasable: As `release`.
    """
    _check_receipt(trained)
    return Votes(tuple(values), grants=(trained.grant.id,))


def _check_receipt(trained: DPTrained[M]) -> None:
    if not isinstance(trained, DPTrained):
        raise NotReleasable(f"only text of a DPTrained model is released, got {type(trained).__name__}")
    if trained.grant.plan != trained.plan:
        raise NotReleasable(f"grant {trained.grant.id} paid for {trained.grant.plan}, the training ran {trained.plan}")
    if trained.steps_run != trained.plan.steps:
        raise NotReleasable(f"grant {trained.grant.id} is for {trained.plan.steps} steps, {trained.steps_run} ran")


def release_without_guarantee(trained: Trained[M], value: V, ledger: Ledger, run: str, reason: str, allowed: bool) -> V:
    """Releases text, weights or scores without any guarantee: it logs and charges them as a non-private event for ever.

    Args:
        trained: A model that saw private text without a mechanism.
        value: The model's output, or its weights. A corpus must be SELF_GENERATED, or DISCLOSED.
        ledger: The ledger of the data; its lifetime epsilon becomes infinite.
        run: The run that asks.
        reason: The reason, shown on every later report.
        allowed: True in a simulation, or if the site's own policy allows it.

    Returns:
        `value`, without any grant.

    Raises:
        NotReleasable: If the release is not allowed, `trained` is not a `Trained`, or the corpus has another
            provenance; nothing is charged then.
        ValueError: If there is no reason.
    """
    kind = {Corpus: "text", Adapter: "an adapter", Scores: "scores", Votes: "votes"}[type(value)]
    if not isinstance(trained, Trained):
        raise NotReleasable(f"only {kind} of a Trained model is released so, got {type(trained).__name__}")
    open_ = (Provenance.SELF_GENERATED, Provenance.DISCLOSED)
    if isinstance(value, Corpus) and value.provenance not in open_:
        raise NotReleasable(
            f"text without a guarantee is self-generated or disclosed, this calls itself {value.provenance.value}"
        )
    if not allowed:
        raise NotReleasable(
            f"run {run!r} asks to release {kind} without a privacy guarantee ({reason}); only a simulation may, or a "
            "site whose policy says so"
        )
    if not reason.strip():
        raise ValueError("a release without guarantee needs a reason: it is shown on every later report")
    if ledger.charge_without_guarantee(f"{reason} (model: {trained.reason})", run):
        log.warning("run %s releases %s WITHOUT a privacy guarantee: %s", run, kind, reason)
    return replace(value, grants=())
