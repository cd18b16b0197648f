"""Checks before use: of a reply at the server, of a request at a client, of a scenario's settings at both."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import (
    FUNNEL,
    LOSS,
    SUMMING,
    Adopt,
    Adopted,
    Evaluate,
    Evaluated,
    Finetune,
    Finetuned,
    Learn,
    Learnt,
    OfferKeys,
    OpenShares,
    Request,
    Score,
    Scored,
    SeedsShared,
    SelfTrain,
    SelfTrained,
    ShareSeeds,
    SharesOpened,
    SignSurvivors,
    Synthesize,
    Synthesized,
    Unmask,
    Unmasked,
    Vote,
    Voted,
    measured,
)
from fedsynth.federation.secure_sum import MODULUS
from fedsynth.limits import (
    CLIP_NORMS,
    MAX_ALPHA,
    MAX_BATCH,
    MAX_CANDIDATES,
    MAX_CLIENTS,
    MAX_GRANTS,
    MAX_LOSS,
    MAX_MICROBATCH,
    MAX_NAME,
    MAX_NEAREST,
    MAX_PROXIMAL,
    MAX_RANK,
    MAX_RATE,
    MAX_RECORDS,
    MAX_ROWS,
    MAX_SAMPLES,
    MAX_SCORE,
    MAX_SEED,
    MAX_SHOTS,
    MAX_SIGMA,
    MAX_STEPS,
    MAX_TEMPERATURE,
    MAX_TEXT,
    MAX_TEXTS,
    MAX_TOKENS,
    MAX_TOP_K,
    MAX_WEIGHT,
    MIN_TEMPERATURE,
    MIN_TOP_P,
)
from fedsynth.lora import Adapter, Shared, only_b
from fedsynth.privacy import claims
from fedsynth.privacy.cohort import LARGEST
from fedsynth.privacy.plan import SMALLEST_SIGMA, Mechanism
from fedsynth.privacy.statement import Statement
from fedsynth.scenario.client import Client, GeneratorTraining

# A name in a reply becomes a word of a report, so that grants must look like this.
GRANT = re.compile(r"[A-Za-z0-9_-]{1,64}")
A, B = ".lora_A.weight", ".lora_B.weight"
FACTOR = re.compile(r"[A-Za-z0-9_.-]+\.lora_[AB]\.weight")


SUM = re.compile(r"[0-9a-f]{32}")  # it names a file at the client
CHECKED = (Synthesize, Finetune, Adopt, Score, Vote, *SUMMING, SelfTrain, Learn, Evaluate)  # by `check_request`


class Rejected(ValueError):
    """A request or reply with a value outside its agreed range. The message repeats no text of it."""


def check_request(request: Request[Any], labels: Sequence[str]) -> None:
    """A client's check of the ranges in a request: a server cannot ask for more than the privacy statement covers, or
    than any site could do.

    Raises:
        Rejected: With the value and the range; or for a kind of request without a check here.
    """
    if not isinstance(request, CHECKED):
        raise Rejected(f"a request {type(request).__name__} has no check: `check_request` must say what it may ask for")
    if isinstance(request, Synthesize):
        _within("per_label", request.per_label, 1, MAX_SAMPLES)
        _within("number of texts", request.per_label * len(labels), 0, MAX_TEXTS)
        _within("max_new_tokens", request.max_new_tokens, 1, MAX_TOKENS)
        _within("temperature", request.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE)
        _within("top_p", request.top_p, MIN_TOP_P, 1.0)
        if request.top_k is not None:
            _within("top_k", request.top_k, 1, MAX_TOP_K)
    if isinstance(request, Synthesize | Learn | Finetune | Score | SelfTrain):
        _within("seed", request.seed, 0, MAX_SEED)
    if isinstance(request, Learn | Score | Vote) and request.corpus is not None:
        _check_corpus(request.corpus, labels)
        if request.corpus.provenance in (Provenance.PRIVATE, Provenance.DISCLOSED):
            raise Rejected("a server sent text that is marked private")
    if isinstance(request, Score | Vote) and not len(request.corpus):
        raise Rejected(f"a server sent no text to {'score' if isinstance(request, Score) else 'vote for'}")
    if isinstance(request, Vote):
        _within("nearest", request.nearest, 1, MAX_NEAREST)
    if isinstance(request, Vote | Score):
        _check_clients("members", request.members)
    if isinstance(request, Vote | Score | OfferKeys | ShareSeeds | OpenShares | SignSurvivors | Unmask):
        unsummed = isinstance(request, Vote | Score) and not request.sum_id and not request.members
        if not (unsummed or SUM.fullmatch(request.sum_id)):
            raise Rejected("the id of a sum has 32 hexadecimal digits")
    if isinstance(request, ShareSeeds):
        _check_clients("offers", [made.client for made in request.offers])
    if isinstance(request, SignSurvivors | Unmask):
        _check_clients("survivors", request.survivors)
    if isinstance(request, Unmask):
        _check_clients("signatures", [each.client for each in request.signatures])
    if isinstance(request, OpenShares):
        _check_clients("sealed", [each.client for each in request.sealed])
    if isinstance(request, Synthesize | Finetune | SelfTrain) and request.start is not None:
        _check_factors("start", request.start)
    if isinstance(request, Finetune) and request.proximal is not None:
        _within("proximal", request.proximal, 0.0, MAX_PROXIMAL)
    if isinstance(request, Adopt | Evaluate) and request.adapter is not None:
        _check_factors("adapter", request.adapter)
    if isinstance(request, SelfTrain):
        _within("writing_seed", request.writing_seed, 0, MAX_SEED)
        _within("share", request.share, 0.0, 1.0)
        _within("candidates", request.candidates, 1, MAX_CANDIDATES)
        _within("keep", request.keep, 1, request.candidates)
        _within("shots", request.shots, 1, MAX_SHOTS)
        _within("max_new_tokens", request.max_new_tokens, 1, MAX_TOKENS)


def check_settings(client: Client, rounds: int) -> None:
    """Checks the settings that a scenario gives clients, before a run and, as a server sends them, again at each site.
    Beyond these numbers the bound was never shown to hold, or planning and training would never end.

    Args:
        client: The scenario's `client` table.
        rounds: The scenario's number of rounds.

    Raises:
        Rejected: With the key, the value and the range.
    """
    for table in ("generator_training", "scorer_training"):
        training: GeneratorTraining = getattr(client, table)
        for key, low, high in (
            ("steps", 1, MAX_STEPS),
            ("rank", 1, MAX_RANK),
            ("alpha", 0.0, MAX_ALPHA),
            ("learning_rate", 0.0, MAX_RATE),
            ("clip_norm", *CLIP_NORMS),
            ("max_length", 1, MAX_TOKENS),
            ("max_physical_batch_size", 1, MAX_MICROBATCH),
            ("rows_per_unit", 1, min(MAX_ROWS, training.max_physical_batch_size)),  # a unit goes through in one pass
        ):
            _within(f"client.{table}.{key}", getattr(training, key), low, high)
    _within("rounds * client.generator_training.steps", rounds * client.generator_training.steps, 1, MAX_STEPS)
    _within("client.task_training.batch", client.task_training.batch, 1, MAX_BATCH)
    _within("client.task_training.max_length", client.task_training.max_length, 1, MAX_TOKENS)
    _within("client.answer_tokens", client.answer_tokens, 1, MAX_TOKENS)
    _within("client.score_norm", client.score_norm, *CLIP_NORMS)
    _within("client.max_noise_multiplier", client.max_noise_multiplier, SMALLEST_SIGMA, MAX_SIGMA)


def check_reply(
    request: Request[Any],
    reply: object,
    labels: Sequence[str],
    *,
    units: Collection[str] = claims.UNITS,
    simulated: bool | None = None,
    batch: int | None = None,
    chooses: bool = False,
) -> None:
    """A server's check of one client's reply.

    Args:
        request: The request that it replies to.
        reply: An object of the request's reply class.
        labels: The public label list.
        units: Units of privacy that a client's statement may name.
        simulated: True if the statement must call its noise reproducible, False if it must not; None for either.
        batch: The scenario's expected batch size; None for any.
        chooses: Instructions ask for a label (`data.task = "choice"`).

    Raises:
        Rejected: With the name and the range; no word of the client is repeated.
    """
    said = getattr(reply, "statement", None)
    if isinstance(said, Statement):
        # A list of scores may be protected for the client as a whole; text and adapters are not.
        whole = {claims.CLIENT} if isinstance(reply, Scored) else set()
        try:
            mechanisms: tuple[Mechanism, ...] = ("gradients", "scores") if whole else ("gradients",)
            if isinstance(request, Vote) and said.guarantee == "dp":
                mechanisms = ("votes",)
            if isinstance(request, Vote | Score) and request.sum_id:
                mechanisms = ("summed_votes" if isinstance(request, Vote) else "summed_scores",)
            claims.check(said, units=[*dict.fromkeys([*units, *whole])], simulated=simulated, mechanisms=mechanisms)
        except ValueError as problem:
            raise Rejected(f"statement: {problem}") from problem
    if isinstance(reply, Synthesized) and isinstance(request, Synthesize):
        _check_corpus(reply.corpus, labels)
        true = reply.corpus.provenance is Provenance.DISCLOSED
        written = reply.corpus.provenance in (Provenance.DP_SYNTHETIC, Provenance.SELF_GENERATED)
        if not (true if request.true_texts else written):
            raise Rejected(f"a client sent text that is marked {reply.corpus.provenance.value}")
        _within("number of texts", len(reply.corpus), 0, request.per_label * len(labels))
        most = max(reply.corpus.counts().values(), default=0)
        _within("number of texts of one label", most, 0, request.per_label)
        _within("unfinished", reply.unfinished, 0, request.per_label * len(labels) - len(reply.corpus))
        _check_grants(reply.statement, reply.corpus.grants)
        if (reply.corpus.provenance is Provenance.DP_SYNTHETIC) != (reply.statement.guarantee == "dp"):
            raise Rejected(f"text under guarantee {reply.statement.guarantee!r} that calls itself otherwise")
    if isinstance(reply, Finetuned) and isinstance(request, Finetune):
        _check_grants(reply.statement, reply.adapter.grants)
        _check_adapter(reply.adapter, request.start, only=only_b if request.frozen_a else None)
        _check_records(reply.records, reply.statement, batch)
    if isinstance(reply, SelfTrained) and isinstance(request, SelfTrain):
        _check_grants(reply.statement, reply.adapter.grants)
        _check_adapter(reply.adapter, request.start)
        _check_records(reply.records, reply.statement, batch)
        _check_funnel(reply.funnel, request.candidates)
    if isinstance(reply, Scored) and isinstance(request, Score):
        _check_grants(reply.statement, reply.scores.grants)
        _within("number of scores", len(reply.scores.values), len(request.corpus), len(request.corpus))
        _check_numbers("scores", reply.scores.values, masked=bool(request.sum_id))
    if isinstance(reply, Voted) and isinstance(request, Vote):
        _check_grants(reply.statement, reply.votes.grants)
        _within("number of votes", len(reply.votes.values), len(request.corpus), len(request.corpus))
        _check_numbers("votes", reply.votes.values, masked=bool(request.sum_id))
    if isinstance(reply, SeedsShared) and isinstance(request, ShareSeeds):
        receivers, asked = ([each.client for each in of] for of in (reply.shares, request.offers))
        if receivers != asked:
            raise Rejected("shares that are not one for each offer")
    if isinstance(reply, SharesOpened):
        _check_clients("senders", reply.unreadable)
    if isinstance(reply, Unmasked) and isinstance(request, Unmask):
        _check_clients("shares", [each.client for each in reply.shares])
        if not all(SUM.fullmatch(each.share) for each in reply.shares):  # as long as an id: 16 bytes
            raise Rejected("shares that are not 32 hexadecimal digits")
    if isinstance(reply, Evaluated) and isinstance(request, Evaluate):
        _check_metrics(reply.metrics, measured(request, instructs=not labels, chooses=chooses))
        _within("examples", reply.examples, 0, MAX_RECORDS)
    if isinstance(reply, Learnt) and isinstance(request, Learn):
        _within("received", reply.received, 0, len(request.corpus or ()))
    if isinstance(reply, Adopted) and isinstance(request, Adopt):
        size = sum(array.size for array in request.adapter.arrays.values())
        _within("parameters", reply.parameters, size, size)


def _check_grants(said: Statement, grants: Sequence[str]) -> None:
    _check_names("grants", grants)
    if (said.guarantee == "dp") != bool(grants):
        raise Rejected(f"guarantee {said.guarantee!r} with grants: {len(grants)}")


def _check_records(records: int, said: Statement, batch: int | None) -> None:
    """Checks an average's weight: the number of units that the sampling rate was planned for. Without a guarantee there
    is no rate."""
    _within("records", records, 1, MAX_RECORDS)
    if said.sampling_rate is None:
        return
    planned = min(batch or max(1, round(records * said.sampling_rate)), records) / records
    if not math.isclose(said.sampling_rate, planned, rel_tol=1e-9):
        raise Rejected(f"records are said to be {records}, which a sampling rate of {said.sampling_rate:g} is not for")


def _check_metrics(metrics: Mapping[str, float], names: Sequence[str]) -> None:
    """Checks that each requested figure is there and no other: a name becomes a word of a report."""
    if set(metrics) != set(names):
        raise Rejected(
            f"metrics must be {', '.join(names)}: {len(set(names) - set(metrics))} of them are missing, "
            f"{len(set(metrics) - set(names))} others are there"
        )
    for name in names:
        if not math.isfinite(metrics[name]):
            raise Rejected(f"metrics {name!r} must be finite, got {metrics[name]}")
        _within(f"metrics {name!r}", metrics[name], 0.0, MAX_LOSS if name == LOSS else 1.0)


def _check_funnel(funnel: Mapping[str, int], candidates: int) -> None:
    """Checks the names in `FUNNEL`, and that counts do not exceed the candidates that were asked for."""
    if others := set(funnel) - set(FUNNEL):
        raise Rejected(f"funnel with {len(others)} names that are none of {', '.join(FUNNEL)}")
    for name, count in funnel.items():
        _within(f"funnel {name!r}", count, 0, candidates)
    _within("funnel without 'asked'", sum(funnel.values()) - funnel.get("asked", 0), 0, candidates)


def _check_adapter(adapter: Adapter, like: Adapter, only: Shared | None = None) -> None:
    """Checks that an adapter has the tensors of the one that was sent (or those that `only` names) and no others."""
    expected = {name: array.shape for name, array in like.arrays.items() if only is None or only(name)}
    if {name: array.shape for name, array in adapter.arrays.items()} != expected:
        raise Rejected("an adapter with other tensors than those of the one that was sent")
    for name in ("rank", "alpha", "base"):
        if getattr(adapter, name) != getattr(like, name):
            raise Rejected(f"an adapter of another {name} than that of the one that was sent")
    _check_finite(adapter)


def _check_factors(name: str, adapter: Adapter) -> None:
    """Checks an adapter without one to compare with: caps, and both factors of each layer in their shapes.

    Loading an adapter allocates memory for its rank. So A must have as many rows, which the sender had to send.
    """
    _check_finite(adapter)
    _within(f"{name}.rank", adapter.rank, 1, MAX_RANK)
    if not 0 < adapter.alpha <= MAX_ALPHA:
        raise Rejected(f"{name}.alpha must be above 0 and at most {MAX_ALPHA:g}, got {adapter.alpha:g}")
    _within(f"length of {name}.base", len(adapter.base), 0, MAX_NAME)
    _check_names(f"{name}.grants", adapter.grants)
    shapes = {tensor: array.shape for tensor, array in adapter.arrays.items()}
    if not all(FACTOR.fullmatch(tensor) for tensor in shapes):
        raise Rejected(f"{name} has a tensor whose name is not that of a factor, as layer.lora_A.weight")
    for layer in {tensor.removesuffix(A).removesuffix(B) for tensor in shapes}:
        a, b = shapes.get(layer + A, ()), shapes.get(layer + B, ())
        if not (len(a) == len(b) == 2 and a[0] == b[1] == adapter.rank):
            raise Rejected(f"{name} must have matrices A and B of rank {adapter.rank} for each of its layers")


def _check_numbers(what: str, values: Sequence[float], *, masked: bool) -> None:
    """Checks scores or votes; those under the masks of a secure sum are whole numbers below its modulus."""
    if not all(map(math.isfinite, values)):
        raise Rejected(f"{what} that are not finite")
    if masked and not all(0 <= value < MODULUS and float(value).is_integer() for value in values):
        raise Rejected(f"{what} under masks that are not whole numbers from 0 to {MODULUS - 1}")
    if not masked and any(abs(value) > MAX_SCORE for value in values):
        raise Rejected(f"{what} beyond {MAX_SCORE:g}")


def _check_clients(what: str, clients: Sequence[int]) -> None:
    _within(f"number of {what}", len(clients), 0, LARGEST)
    if any(not 0 <= client < MAX_CLIENTS for client in clients):
        raise Rejected(f"{what} name a client below 0, or from {MAX_CLIENTS}")


def _check_finite(adapter: Adapter) -> None:
    for array in adapter.arrays.values():
        if not bool(np.isfinite(array).all()):
            raise Rejected("an adapter with values that are not finite")
        if array.size and float(np.abs(array).max()) > MAX_WEIGHT:
            raise Rejected(f"an adapter with values beyond {MAX_WEIGHT:g}")


def _check_corpus(corpus: Corpus, labels: Sequence[str]) -> None:
    _within("number of texts", len(corpus), 0, MAX_TEXTS)
    _check_names("grants", corpus.grants)
    if labels and (strange := set(corpus.answers) - set(labels)):
        raise Rejected(f"labels outside the public list: {len(strange)}")
    if any(len(text) > MAX_TEXT for text in (*corpus.prompts, *corpus.answers)):
        raise Rejected(f"a text of more than {MAX_TEXT} characters")


def _check_names(name: str, grants: Iterable[str]) -> None:
    grants = list(grants)
    _within(f"number of {name}", len(grants), 0, MAX_GRANTS)
    if not all(GRANT.fullmatch(grant) for grant in grants):
        raise Rejected(f"{name} must be names of grants: letters, digits, dashes and underscores")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise Rejected(f"{name} must lie in {low}..{high}, got {value}")
