"""Where text made from private text becomes releasable: the only place that says so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from fedsynth.corpus import Corpus, Provenance, Scores
from fedsynth.lora import Adapter
from fedsynth.privacy.ledger import Grant, Ledger
from fedsynth.privacy.plan import DPPlan

log = logging.getLogger(__name__)

M = TypeVar("M")
V = TypeVar("V", Corpus, Adapter, Scores)


class NotReleasable(RuntimeError):
    """What was asked to leave carries no guarantee, or not the one it claims."""


@dataclass(frozen=True)
class DPTrained(Generic[M]):
    """A model trained under a grant, with the receipt of what ran.

    Attributes:
        model: Whatever the trainer made.
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
    """A model that saw private text without a mechanism, or that text itself; and why."""

    model: M
    reason: str


def release(trained: DPTrained[M], prompts: Sequence[str], answers: Sequence[str]) -> Corpus:
    """Text written by a model trained under a grant, now free to leave: post-processing of the training.

    Args:
        trained: The receipt; nothing else is accepted.
        prompts: Written by `trained.model` from public prompts, or public.
        answers: One per prompt; the same.

    Raises:
        NotReleasable: If the receipt is none, or says something else ran than was planned and paid for.
    """
    _check_receipt(trained)
    return Corpus(tuple(prompts), tuple(answers), Provenance.DP_SYNTHETIC, grants=(trained.grant.id,))


def release_adapter(trained: DPTrained[M], adapter: Adapter) -> Adapter:
    """The weights of a model trained under a grant, now free to leave: the release that its text is made from.

    Raises:
        NotReleasable: As `release`.
    """
    _check_receipt(trained)
    return replace(adapter, grants=(trained.grant.id,))


def release_scores(trained: DPTrained[M], values: Sequence[float]) -> Scores:
    """What a model trained under a grant thinks of the server's texts: post-processing of the training.

    Args:
        trained: Its receipt; or, for noised scores, that of the Gaussian mechanism that let the vector out.
        values: One per text, in order; computed with `trained.model` and the server's texts alone.

    Raises:
        NotReleasable: As `release`.
    """
    _check_receipt(trained)
    return Scores(tuple(values), grants=(trained.grant.id,))


def _check_receipt(trained: DPTrained[M]) -> None:
    if not isinstance(trained, DPTrained):
        raise NotReleasable(f"only text of a DPTrained model is released, got {type(trained).__name__}")
    if trained.grant.plan != trained.plan:
        raise NotReleasable(f"grant {trained.grant.id} paid for {trained.grant.plan}, the training ran {trained.plan}")
    if trained.steps_run != trained.plan.steps:
        raise NotReleasable(f"grant {trained.grant.id} is for {trained.plan.steps} steps, {trained.steps_run} ran")


def release_without_guarantee(trained: Trained[M], value: V, ledger: Ledger, run: str, reason: str, allowed: bool) -> V:
    """Text, weights or scores that leave without any guarantee: logged, and charged as a non-private event for ever.

    Args:
        trained: A model that saw private text without a mechanism.
        value: Made by it, or its weights. A corpus must be SELF_GENERATED, or DISCLOSED.
        ledger: Of the data; its lifetime epsilon becomes infinite.
        run: The run that asks.
        reason: Why; shown on every later report.
        allowed: Whether this is a simulation, or the site's own policy allows it.

    Returns:
        `value`, without any grant.

    Raises:
        NotReleasable: If it is not allowed, `trained` is not a `Trained`, or the corpus calls itself something else;
            nothing is charged then.
        ValueError: If there is no reason.
    """
    kind = type(value).__name__.lower()
    if not isinstance(trained, Trained):
        raise NotReleasable(f"only the {kind} of a Trained model is released so, got {type(trained).__name__}")
    open_ = (Provenance.SELF_GENERATED, Provenance.DISCLOSED)
    if isinstance(value, Corpus) and value.provenance not in open_:
        raise NotReleasable(
            f"text without a guarantee is self-generated or disclosed, this calls itself {value.provenance.value}"
        )
    if not allowed:
        raise NotReleasable(
            f"run {run!r} asks to release a {kind} without a privacy guarantee ({reason}); only a simulation may, or a "
            "site whose policy says so"
        )
    if not reason.strip():
        raise ValueError("a release without guarantee needs a reason: it is shown on every later report")
    if ledger.charge_without_guarantee(f"{reason} (model: {trained.reason})", run):
        log.warning("run %s releases a %s WITHOUT a privacy guarantee: %s", run, kind, reason)
    return replace(value, grants=())
