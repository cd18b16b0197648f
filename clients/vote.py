"""Private evolution at the client: each private text votes for the server's nearest texts; noised counts leave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.learn import NoTaskModel
from fedsynth.clients.secure_sum import admit, refuse_sum, under_masks
from fedsynth.corpus import Corpus, Votes, blank, same
from fedsynth.federation.messages import Vote, Voted
from fedsynth.models.embedding import Embedder, directions, shared_embedder
from fedsynth.models.hub import weights_hash
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.release import DPTrained, Trained, release_votes, release_without_guarantee
from fedsynth.privacy.skellam import UNIT, Draws, noise
from fedsynth.training.dp_training import Randomness
from fedsynth.training.examples import readable, unit_rows
from fedsynth.training.selfcheck import LISTED, Noise, check_list

Booth = tuple[list[int], NDArray[np.float32]]  # of one label: places of its candidates, and their directions
Ballot = Mapping[int, float]  # a unit's votes: place of a candidate -> weight, none below 0


def vote(client: ClientSide, request: Vote, digest: str) -> Voted:
    """Counts the votes and adds noise to every count; under DP the charge comes first and may be refused.

    The Gaussian mechanism on a histogram (Aug-PE, arXiv 2403.01749, section 3). Each round is charged as a step in
    which every unit takes part.

    Raises:
        fedsynth.clients.learn.NoTaskModel: If the task is to follow instructions: these have no labels.
        fedsynth.privacy.plan.BudgetTooSmall, fedsynth.privacy.caps.BudgetExhausted: Before a private text is embedded.
    """
    if client.instructs:
        raise NoTaskModel("a task of instructions has no labels to vote within")
    polling = prepared(client, request.corpus)  # public work, which may fail, comes before the charge
    if client.config.guarantee == "none":
        refuse_sum(client, request)
        return _without_guarantee(client, request, polling)
    if client.config.secure_sum is not None:
        return _summed(client, request, digest, polling)
    refuse_sum(client, request)
    return noised(client, request, digest, polling)


def noised(client: ClientSide, request: Vote, digest: str, polling: Polling) -> Voted:
    """The counts with Gaussian noise on each; an audit asks for those of its own units."""
    settings, plan = client.config.voting, client.config.vote_plan(client.records, client.rounds)
    check_noise(plan)

    binding = client.binding(digest, plan, model=weights_hash(encoder(client)), training=settings)
    grant = client.ledger.charge(plan, binding, client.run, budget=client.config.budget)
    randomness = client.ledger.begin(grant)
    values = protected(ballots(client, request.nearest, polling), len(request.corpus), plan, randomness)
    votes = release_votes(DPTrained(None, plan, grant, 1), values)
    return Voted(votes, client.statement(plan, settings.rows_per_unit))


def _summed(client: ClientSide, request: Vote, digest: str, polling: Polling) -> Voted:
    """The counts in whole numbers, with this client's share of the noise, under the masks of a secure sum.

    Where the client's rules do not rest on sums, the share is as large as its own messages need, and its statement
    names no cohort.
    """
    settings, plan = client.config.voting, client.config.vote_plan(client.records, client.rounds)
    (cohort, share), rests = admit(client, request, digest), client.rules.rests_on_sums
    check_whole_noise(plan, share)

    bound = {"voting": settings, "variance": share}  # one key must not serve two amounts of noise
    binding = client.binding(digest, plan, model=weights_hash(encoder(client)), training=bound)
    grant = client.ledger.charge(plan, binding, client.run, budget=client.config.budget)
    randomness = client.ledger.begin(grant)
    values = protected_whole(ballots(client, request.nearest, polling), len(request.corpus), share, randomness)
    votes = release_votes(DPTrained(None, plan, grant, 1), under_masks(client, request, values))
    return Voted(votes, client.statement(plan, settings.rows_per_unit, cohort if rests else None))


def _without_guarantee(client: ClientSide, request: Vote, polling: Polling) -> Voted:
    """The counts as they are. Logged, charged as non-private, refused unless the rules allow it."""
    cast = ballots(client, request.nearest, polling)
    counted = Trained(summed(cast, len(request.corpus)), "the scenario asks for no guarantee")
    votes = release_without_guarantee(
        counted,
        Votes(tuple(counted.model.tolist())),
        client.ledger,
        client.run,
        counted.reason,
        allowed=client.rules.without_guarantee,
    )
    return Voted(votes, client.statement(None))


def encoder(client: ClientSide) -> str:
    """The name of the model that tells which texts are near."""
    return client.config.embedder or client.config.task_model


@dataclass(frozen=True)
class Polling:
    """What is public of a vote.

    Attributes:
        embedder: The encoder, which has read a text of the greatest length.
        booths: By label.
    """

    embedder: Embedder
    booths: Mapping[str, Booth]


def prepared(client: ClientSide, corpus: Corpus) -> Polling:
    """Loads the encoder, tries it on the longest text that may come, and finds the candidates' directions.

    Raises:
        Exception: The encoder's own, if it cannot do that: nothing is charged then, and no private text was looked at.
    """
    embedder, longest = shared_embedder(encoder(client)), client.config.voting.max_length
    embedder.embed([" a" * longest], longest=longest)
    return Polling(embedder, _booths(embedder, corpus, longest))


def ballots(client: ClientSide, nearest: int, polling: Polling) -> list[Ballot]:
    """The votes of each declared unit, before they are bounded; an empty ballot for a slot without a unit.

    A unit's votes depend on its own rows, the candidates and public models alone. A text has no vote if its label is
    not public or has no candidate, or if the encoder cannot read it or finds no finite direction.
    """
    settings, private, embedder = client.config.voting, client.train, polling.embedder
    rows = unit_rows(private, client.records, settings.rows_per_unit)
    voters = [row for own in rows for row in own if _may_vote(client, embedder, row)]
    found = alone(embedder, tuple(private.prompts[row] for row in voters), settings.max_length)
    cast = {}
    for row, direction in zip(voters, found, strict=True):
        places, texts = polling.booths.get(private.answers[row], ([], found[:0]))
        if not places or not np.isfinite(direction).all():
            continue
        # Candidates that are equally near, but for the last bits, stand in the order of the request.
        ranked = np.argsort(-(texts @ direction), kind="stable")[:nearest].tolist()
        cast[row] = {places[k]: 1 / math.sqrt(nearest) for k in ranked}
    return [_together(cast[row] for row in own if row in cast) for own in rows]


def _may_vote(client: ClientSide, embedder: Embedder, row: int) -> bool:
    text, label = client.train.prompts[row], client.train.answers[row]
    return label in client.labels and _has_direction(embedder, text)


def _has_direction(embedder: Embedder, text: str) -> bool:
    """True for a text that `directions` can read: one that it cannot would end the whole request."""
    return not blank(text) and readable(embedder.tokenizer, f" {text.strip()}")


def _booths(embedder: Embedder, offered: Corpus, longest: int) -> dict[str, Booth]:
    """By label: the places of its different candidates, and their directions. Equal texts are the first of them."""
    first: dict[tuple[str, str], int] = {}
    for place, (text, label) in enumerate(zip(offered.prompts, offered.answers, strict=True)):
        if _has_direction(embedder, text):
            first.setdefault((label, same(text)), place)
    found = _directions(embedder, [offered.prompts[place] for place in first.values()], longest)
    booths: dict[str, tuple[list[int], list[NDArray[np.float32]]]] = {}
    for ((label, _), place), direction in zip(first.items(), found, strict=True):
        if np.isfinite(direction).all():
            places, texts = booths.setdefault(label, ([], []))
            places.append(place)
            texts.append(direction)
    return {label: (places, np.stack(texts)) for label, (places, texts) in booths.items()}


def _directions(embedder: Embedder, texts: Sequence[str], longest: int) -> NDArray[np.float32]:
    found: NDArray[np.float32] = directions(embedder, tuple(texts), longest).numpy()
    return found


@lru_cache(maxsize=32)
def alone(embedder: Embedder, texts: tuple[str, ...], longest: int) -> NDArray[np.float32]:
    """The directions of private texts, each read by itself; shape (texts, width).

    In a batch the last bits of a text's direction change with its neighbours. Where two candidates are almost equally
    near, another unit's text could then move this one's vote, and the sum by more than one unit may. A text that the
    encoder fails on has no direction: an error would tell of it. Remembered, as every round reads the same texts.
    """
    found = np.full((len(texts), embedder.width), np.nan, dtype=np.float32)
    for place, text in enumerate(texts):
        with suppress(Exception):  # each encoder raises its own
            found[place] = directions.__wrapped__(embedder, (text,), longest).numpy()[0]
    return found


def _together(votes: Iterable[Ballot]) -> Ballot:
    """The sum of the ballots of one unit's rows."""
    whole: dict[int, float] = {}
    for each in votes:
        for place, weight in each.items():
            whole[place] = whole.get(place, 0.0) + weight
    return whole


def summed(votes: Sequence[Ballot], candidates: int, bound: float = 1.0) -> NDArray[np.float64]:
    """The sum of all ballots, each scaled down to an L2 norm of at most `bound`; shape (candidates,)."""
    total = np.zeros(candidates)
    for ballot in votes:
        norm = math.sqrt(sum(weight**2 for weight in ballot.values()))
        scale = min(1.0, bound / norm) if norm > 0 else 0.0
        for place, weight in ballot.items():
            total[place] += scale * weight
    return total


def protected(votes: Sequence[Ballot], candidates: int, plan: DPPlan, randomness: Randomness) -> list[float]:
    """The bounded sum with the plan's noise on every count, also on those without a vote.

    An empty unit in place of another moves the sum by at most C. Another unit moves it by at most sqrt(2) C, as no
    weight is below 0.

    Args:
        votes: A ballot for each unit.
        candidates: Number of texts of the request.
        plan: The plan of `Client.vote_plan`.
        randomness: The grant's randomness.
    """
    total = summed(votes, candidates, plan.clip_norm * (1 - 1e-9))  # not above it by rounding either
    noisy: list[float] = (total + plan.noise_multiplier * plan.clip_norm * randomness.normals(candidates)).tolist()
    return noisy


def whole(votes: Sequence[Ballot], candidates: int) -> NDArray[np.int64]:
    """The sum of all ballots in whole numbers, each with an L2 norm of at most `UNIT`; shape (candidates,)."""
    total = np.zeros(candidates, dtype=np.int64)
    for ballot in votes:
        norm = math.sqrt(sum(weight**2 for weight in ballot.values()))
        scale = UNIT / max(norm, 1.0)
        # A weight of 1 must not become 1023 by the last bit of a float; the norm is checked in whole numbers below.
        numbers = {place: math.floor(scale * weight + 1e-6) for place, weight in ballot.items()}
        while sum(number**2 for number in numbers.values()) > UNIT**2:
            numbers = {place: max(0, number - 1) for place, number in numbers.items()}
        for place, number in numbers.items():
            total[place] += number
    return total


def protected_whole(votes: Sequence[Ballot], candidates: int, variance: float, randomness: Draws) -> NDArray[np.int64]:
    """The bounded sum in whole numbers, with Skellam noise on every count.

    Args:
        votes: A ballot for each unit.
        candidates: Number of texts of the request.
        variance: Of this client's noise.
        randomness: The grant's randomness.
    """
    return whole(votes, candidates) + noise(randomness, candidates, variance)


@lru_cache(maxsize=32)
def check_whole_noise(plan: DPPlan, share: float) -> None:
    """Checks `protected_whole` on public numbers, before the charge: two units without a common text are sqrt(2) apart.

    Args:
        plan: The plan of `Client.vote_plan`.
        share: The variance of this client's noise.

    Raises:
        fedsynth.training.selfcheck.SelfCheckFailed: If it does not hold to the plan.
    """
    apart, deviation = math.sqrt(2) * plan.clip_norm, math.sqrt(share) / UNIT
    replaced = replace(plan, clip_norm=apart, noise_multiplier=deviation / apart)

    def release(values: Sequence[float], public: Noise) -> list[float]:
        ballot = {place: value for place, value in enumerate(values) if value > 0}
        found: list[float] = (protected_whole([{}, ballot, {}], LISTED, share, public) / UNIT).tolist()
        return found

    check_list(release, replaced)


def check_noise(plan: DPPlan) -> None:
    """Checks `protected` against the plan on public numbers, before the charge: two opposite units are 2 C apart.

    Raises:
        fedsynth.training.selfcheck.SelfCheckFailed: If it does not hold to the plan.
    """
    opposite = replace(plan, clip_norm=2 * plan.clip_norm, noise_multiplier=plan.noise_multiplier / 2)

    def release(values: Sequence[float], public: Randomness) -> list[float]:
        return protected([{}, dict(enumerate(values)), {}], LISTED, plan, public)

    check_list(release, opposite)
