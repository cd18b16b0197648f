"""CrossLM at the client: the model's confidence in the label of each of the server's texts; only these numbers leave.

The client's settings protect the numbers, never the request's: `client.guarantee` and `client.scores`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.learn import WEIGHTS, NoTaskModel, task_model
from fedsynth.clients.secure_sum import admit, refuse_sum, under_masks
from fedsynth.corpus import Corpus, Provenance, Scores
from fedsynth.federation.messages import Score, Scored
from fedsynth.models.devices import device
from fedsynth.models.hub import weights_hash
from fedsynth.models.loading import load_tokenizer
from fedsynth.models.weights import load_named, save_named
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.release import DPTrained, NotReleasable, Trained, release_scores, release_without_guarantee
from fedsynth.privacy.skellam import UNIT, Draws, noise
from fedsynth.privacy.statement import statement
from fedsynth.training.classifier import LabelledText, confidences, label_losses, label_slots, new_scorer
from fedsynth.training.dp_training import Randomness, private, train_generator, trainable
from fedsynth.training.selfcheck import LISTED, Noise, check_list, self_check

SCORER, RECEIPT = "scorer.safetensors", "scorer.json"


def score(client: ClientSide, request: Score, digest: str) -> Scored:
    """Rates the texts of a request; under DP the charge comes first and may be refused.

    Raises:
        fedsynth.clients.learn.NoTaskModel: If the client has learnt no task model yet, or has no labels.
        fedsynth.privacy.plan.BudgetTooSmall, fedsynth.privacy.caps.BudgetExhausted: Before private text is trained
            on, or a score of a model that saw it is computed.
    """
    if client.instructs:
        raise NoTaskModel("a task of instructions has no labels to score")
    if client.config.guarantee == "none":
        refuse_sum(client, request)
        return _without_guarantee(client, request)
    if client.config.scores == "noise":
        return _noised(client, request, digest)
    refuse_sum(client, request)
    # One grant for the whole run: all scores of a trained scorer are post-processing.
    scorer = _kept(client) or _trained(client, request, digest)
    values = _confidences(client, scorer.model, request.corpus, client.config.scorer_training.max_length)
    said = client.statement(scorer.plan, client.config.scorer_training.rows_per_unit)
    return Scored(release_scores(scorer, values), said)


def _without_guarantee(client: ClientSide, request: Score) -> Scored:
    """The task model's confidences, unprotected. Logged, charged as non-private, refused unless the rules allow it."""
    trained = Trained(task_model(client), reason="the scenario asks for no guarantee")
    values = _confidences(client, trained.model, request.corpus, client.config.task_training.max_length)
    scores = release_without_guarantee(
        trained,
        Scores(tuple(values)),
        client.ledger,
        client.run,
        trained.reason,
        allowed=client.rules.without_guarantee,
    )
    return Scored(scores, client.statement(None))


def _noised(client: ClientSide, request: Score, digest: str) -> Scored:
    """The task model's confidences under the Gaussian mechanism; each request is one round of the run's plan."""
    plan = client.config.score_plan(client.records, client.rounds)
    model = task_model(client)
    if client.config.secure_sum is not None:
        return _summed(client, request, digest, plan, model)
    refuse_sum(client, request)
    check_noise(plan)

    binding = client.binding(digest, plan, model=_hash(client), training=client.config.task_training)
    grant = client.ledger.charge(plan, binding, client.run, budget=client.config.budget)
    randomness = client.ledger.begin(grant)
    values = _confidences(client, model, request.corpus, client.config.task_training.max_length)
    scores = release_scores(DPTrained(model, plan, grant, 1), protected(values, request.corpus, plan, randomness))
    return Scored(scores, statement(client.charged(plan), unit="client", simulated=client.simulated))


def _summed(client: ClientSide, request: Score, digest: str, plan: DPPlan, model: Any) -> Scored:
    """The same in whole numbers, with this client's share of the noise, under the masks of a secure sum."""
    (cohort, share), rests = admit(client, request, digest), client.rules.rests_on_sums
    check_whole_noise(plan, share)

    bound = {"training": client.config.task_training, "variance": share}  # one key must not serve two amounts of noise
    binding = client.binding(digest, plan, model=_hash(client), training=bound)
    grant = client.ledger.charge(plan, binding, client.run, budget=client.config.budget)
    randomness = client.ledger.begin(grant)
    values = _confidences(client, model, request.corpus, client.config.task_training.max_length)
    numbers = protected_whole(values, request.corpus, plan, share, randomness)
    scores = release_scores(DPTrained(model, plan, grant, 1), under_masks(client, request, numbers))
    charged, cohort_of = client.charged(plan), cohort if rests else None
    return Scored(scores, statement(charged, unit="client", simulated=client.simulated, cohort=cohort_of))


def _hash(client: ClientSide) -> str:
    return hashlib.sha256((client.work / WEIGHTS).read_bytes()).hexdigest()


def bounded(values: Sequence[float], corpus: Corpus, bound: float) -> NDArray[np.float64]:
    """A list of scores, centred label by label, with an L2 norm of at most `bound`.

    Centring before the clip spends nothing, and scores are compared within a label only.
    """
    found: NDArray[np.float64] = np.asarray(values, np.float64)
    found = np.where(np.isfinite(found), found, 0.0)
    labels = np.asarray(corpus.answers)
    for label in set(corpus.answers):
        found[labels == label] -= found[labels == label].mean()
    norm = float(np.linalg.norm(found))
    return found * min(1.0, bound * (1 - 1e-9) / norm) if norm > 0 else found  # not above it by rounding either


def protected_whole(
    values: Sequence[float], corpus: Corpus, plan: DPPlan, variance: float, randomness: Draws
) -> NDArray[np.int64]:
    """A list of scores in whole numbers, `UNIT` for the plan's norm, with Skellam noise on each.

    Rounding is towards zero, so that it never lengthens a list.

    Args:
        values: One per text.
        corpus: The texts with their labels, which the server knows.
        plan: Two lists are at most its norm apart.
        variance: Of this client's noise.
        randomness: The grant's randomness.
    """
    numbers = np.trunc(bounded(values, corpus, plan.clip_norm / 2) * (UNIT / plan.clip_norm)).astype(np.int64)
    return numbers + noise(randomness, len(numbers), variance)


def protected(values: Sequence[float], corpus: Corpus, plan: DPPlan, randomness: Randomness) -> list[float]:
    """A list of scores, centred label by label, clipped to half the plan's norm, with the plan's noise on each number.

    Two lists within that half are at most the plan's norm apart, so the plan needs noise of `noise_multiplier` times
    the norm (docs/privacy.md).

    Args:
        values: One per text.
        corpus: The texts with their labels, which the server knows.
        plan: The plan of `Client.score_plan` for `scores = "noise"`.
        randomness: The grant's randomness.
    """
    clipped = bounded(values, corpus, plan.clip_norm / 2)
    noisy: list[float] = (clipped + plan.noise_multiplier * plan.clip_norm * randomness.normals(len(clipped))).tolist()
    return noisy


@lru_cache(maxsize=32)
def check_whole_noise(plan: DPPlan, share: float) -> None:
    """Checks `protected_whole` on public numbers, before the charge.

    Args:
        plan: The plan of `Client.score_plan`.
        share: The variance of this client's noise.

    Raises:
        fedsynth.training.selfcheck.SelfCheckFailed: If it does not hold to the plan.
    """
    listed = Corpus(("",) * LISTED, tuple(str(n % 2) for n in range(LISTED)), Provenance.PUBLIC)
    own = replace(plan, noise_multiplier=math.sqrt(share) / UNIT)

    def release(values: Sequence[float], public: Noise) -> list[float]:
        found: list[float] = (protected_whole(values, listed, plan, share, public) * (plan.clip_norm / UNIT)).tolist()
        return found

    check_list(release, own)


def check_noise(plan: DPPlan) -> None:
    """Checks `protected` against the plan on public numbers, before the charge.

    Raises:
        fedsynth.training.selfcheck.SelfCheckFailed: If it does not.
    """
    listed = Corpus(("",) * LISTED, tuple(str(n % 2) for n in range(LISTED)), Provenance.PUBLIC)
    check_list(lambda values, public: protected(values, listed, plan, public), plan)


def _trained(client: ClientSide, request: Score, digest: str) -> DPTrained[Any]:
    """A scorer trained under its own grant, stored with its receipt for later rounds."""
    settings, name = client.config.scorer_training, client.config.task_model
    plan = client.config.score_plan(client.records, client.rounds)
    tokenizer, model = load_tokenizer(name), _new_scorer(client, request.seed)
    pad = tokenizer.pad_token_id
    self_check(model, plan, settings, pad=pad, losses=label_losses, example=lambda tokens: LabelledText(tokens, 0))

    binding = client.binding(digest, plan, model=weights_hash(name), training=settings)
    grant = client.ledger.charge(plan, binding, client.run, budget=client.config.budget)
    randomness = client.ledger.begin(grant)
    slots = label_slots(
        tokenizer,
        client.train,
        client.labels,
        plan.records,
        settings.max_length,
        model.config,
        rows_per_unit=settings.rows_per_unit,
    )
    steps = train_generator(model, private(slots, plan, randomness), settings, pad=pad, losses=label_losses)
    trained = DPTrained(model, plan, grant, steps)
    _keep(client, trained, request.seed)
    return trained


def _keep(client: ClientSide, trained: DPTrained[Any], seed: int) -> None:
    """Stores the scorer's trained weights, then its receipt: a receipt always has its weights beside it."""
    save_named(trained.model, trainable(trained.model), client.work / SCORER)
    weights = hashlib.sha256((client.work / SCORER).read_bytes()).hexdigest()
    ran = {"grant": trained.grant.id, "plan": trained.plan.to_dict(), "steps_run": trained.steps_run, "seed": seed}
    part = client.work / f"{RECEIPT}.part"
    part.write_text(json.dumps({**ran, "run": client.run, "sha256": weights}), encoding="utf-8")
    part.replace(client.work / RECEIPT)


def _kept(client: ClientSide) -> DPTrained[Any] | None:
    """This run's scorer with its receipt; None until its first answer is stored.

    Before that its grant has released nothing: the training is repeated under it if all that it binds is the same, and
    charged again if not. The ledger holds the paid plan, the receipt the steps that ran; a release compares the two.

    Raises:
        fedsynth.privacy.release.NotReleasable: If the weights are not those of the receipt.
    """
    path = client.work / RECEIPT
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    grant = client.ledger.settled(facts["grant"]) if facts.get("run") == client.run else None
    if grant is None:
        return None
    weights = hashlib.sha256((client.work / SCORER).read_bytes()).hexdigest()
    if weights != facts["sha256"] or grant.binding.model != weights_hash(client.config.task_model):
        raise NotReleasable(f"the scorer in {client.work} is not what grant {grant.id} trained: restore it")
    # The seed also draws the layers that are neither pretrained nor trained, as a frozen pooler.
    model = _new_scorer(client, facts["seed"])
    load_named(model, client.work / SCORER)
    return DPTrained(model, DPPlan.from_dict(facts["plan"]), grant, facts["steps_run"])


def _new_scorer(client: ClientSide, seed: int) -> Any:
    settings = client.config.scorer_training
    name, classes = client.config.task_model, len(client.labels)
    scorer = new_scorer(
        name, classes, rank=settings.rank, alpha=settings.alpha, seed=seed, targets=settings.lora_targets
    )
    return scorer.to(device())


def _confidences(client: ClientSide, model: Any, corpus: Corpus, longest: int) -> list[float]:
    return confidences(model, load_tokenizer(client.config.task_model), corpus, client.labels, longest)
