"""The mechanisms of all methods, run on canaries: real ledgers, keys, draws, clipping and noise; no data is read.

Each is run as a client runs it, from the charge on, round by round, by two clients. A canary is in a client's data or
not, by a coin.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from fedsynth import __version__
from fedsynth.audit.layers import Evidence, Seen
from fedsynth.clients import score, vote
from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.vote import Polling
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import ClientData
from fedsynth.federation.messages import Vote
from fedsynth.models.loading import load_tokenizer
from fedsynth.privacy.audit import contents
from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Binding, Grant, Ledger, Opening
from fedsynth.privacy.noise import GrantRandomness, simulated_key
from fedsynth.privacy.plan import DPPlan, Mechanism
from fedsynth.privacy.skellam import UNIT
from fedsynth.privacy.statement import Statement, statement
from fedsynth.scenario.client import Client, GeneratorTraining
from fedsynth.system.folders import private_folder
from fedsynth.training.canaries import ROWS, trained

CLIENTS = 2
CANARIES = 6000  # of all clients
_FEWEST, _NUMBERS = 500, 2**24  # canaries of a long plan; numbers that are held in memory, or drawn by Skellam noise
_BOOTH = 100  # candidates of a label
_LISTED = 8  # numbers of a list of scores
_RUN = "audit"
_ENCODER = "assets:tiny-slm"  # its tokenizer reads the canaries' texts; nothing of it is trained


@dataclass(frozen=True)
class Audited:
    """A mechanism of a scenario, as its clients would run it.

    Attributes:
        arms: Names of the arms that have it.
        client: A client's settings.
        plan: The plan of all rounds.
        rounds: Number of rounds that ask for it.
        training: Settings of a training under DP-SGD; None for votes and lists of scores.
    """

    arms: tuple[str, ...]
    client: Client
    plan: DPPlan
    rounds: int
    training: GeneratorTraining | None = None

    @property
    def mechanism(self) -> Mechanism:
        """What gets the noise."""
        return self.plan.mechanism


def evidence(audited: Audited, seed: int, place: Path, canaries: int = CANARIES) -> Evidence:
    """Runs a mechanism on canaries.

    Args:
        audited: The mechanism.
        seed: Seed of keys and coins.
        place: An empty folder, for ledgers.
        canaries: Number of canaries; fewer for plans of very many steps.
    """
    shares = _shares(audited.client)
    most = _NUMBERS // (audited.plan.total_steps * 2 * (1 if shares is None else shares[0]))
    per_client = max(_FEWEST, min(canaries, most)) // CLIENTS
    run = {
        "gradients": _gradients,
        "votes": _votes,
        "scores": _lists,
        "summed_votes": _summed_votes,
        "summed_scores": _lists,
    }[audited.mechanism]
    return run(audited, seed, place, per_client)


# --- Clients of an audit ----------------------------------------------------------------------------------------------


def _closed() -> NoReturn:
    raise RuntimeError("an audit opens no data")


def _client(
    audited: Audited,
    seed: int,
    place: Path,
    index: int,
    *,
    config: Client | None = None,
    records: int = 1,
    labels: tuple[str, ...] = ("0", "1"),
    open: Callable[[], ClientData] = _closed,
) -> ClientSide:
    """A simulated client with a ledger of its own in the audit's folder."""
    work = place / f"client-{index}"
    private_folder(work)
    keys = partial(simulated_key, seed, index)
    return ClientSide(
        index=index,
        config=config or audited.client,
        labels=labels,
        records=records,
        rounds=audited.rounds,
        unit="canary",
        work=work,
        run=_RUN,
        ledger=Ledger(
            work / "ledger.sqlite", Account(f"canaries#{index}", None), keys=keys, opening=Opening(durable=False)
        ),
        open=open,
        simulated=True,
    )


def _begun(client: ClientSide, plan: DPPlan, round: int) -> tuple[Grant, GrantRandomness]:
    """A grant of a round, charged, and its randomness."""
    binding = Binding(f"round {round}", plan.digest(), "canaries", "canaries", __version__)
    grant = client.ledger.charge(plan, binding, client.run, budget=client.config.budget)
    return grant, client.ledger.begin(grant)


def _coins(seed: int, client: int, count: int) -> NDArray[np.bool_]:
    return np.random.default_rng([seed, client]).random(count) < 0.5


def _evidence(
    clients: Sequence[ClientSide],
    stated: Statement,
    present: Sequence[NDArray[np.bool_]],
    seen: Sequence[Seen],
    records: int = 1,
) -> Evidence:
    ledgers = [contents(client.ledger.path) for client in clients]
    charged = [sum(row["plan"]["steps"] * row["drawn"] for row in ledger["reservations"]) for ledger in ledgers]
    grants = [grant["id"] for ledger in ledgers for grant in ledger["grants"]]
    return Evidence(stated, records, tuple(present), tuple(seen), tuple(charged), tuple(grants))


def _all_hit(present: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return present[np.newaxis]


# --- DP-SGD -----------------------------------------------------------------------------------------------------------


def _gradients(audited: Audited, seed: int, place: Path, canaries: int) -> Evidence:
    """The trainer's own loop. Records and batch are multiplied: rate, and hence epsilon, stay the same."""
    assert audited.training is not None
    times = -(-canaries // audited.plan.records)
    plan = replace(
        audited.plan,
        records=times * audited.plan.records,
        expected_batch=times * audited.plan.expected_batch,
    )
    clients = [_client(audited, seed, place, index, records=plan.records) for index in range(CLIENTS)]
    present, seen = [_coins(seed, client.index, canaries) for client in clients], []
    for client in clients:
        for round in range(audited.rounds):
            grant, randomness = _begun(client, plan, round)
            steps = trained(present[client.index], plan, audited.training, randomness)
            client.ledger.store(grant, b"audited")
            seen.append(Seen(client.index, steps.values, steps.hit, steps.rest, steps.ran, steps.sizes))
    return _evidence(clients, clients[0].statement(plan, ROWS), present, seen, plan.records)


# --- Votes ------------------------------------------------------------------------------------------------------------


class _Embedder:
    """Places text `canary K` at its own angle within its label."""

    width = 2

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(_ENCODER)

    def embed(self, texts: Sequence[str], *, longest: int | None = None) -> NDArray[np.float32]:  # noqa: ARG002 - the signature of Embedder
        """Directions in a plane, (texts, 2)."""
        numbers = np.array([int(re.findall(r"\d+", text)[0]) % _BOOTH for text in texts])
        angles = numbers * (math.pi / 2 / _BOOTH)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _canary(number: int) -> tuple[str, str]:
    """Text and label of a canary, and of the candidate that it votes for."""
    return f"canary {number}", f"booth {number // _BOOTH}"


@lru_cache(maxsize=2)
def _poll(canaries: int) -> tuple[Vote, Polling]:
    """A candidate for each canary, and as many again that get no vote."""
    offered = [_canary(number) for number in range(2 * canaries)]
    candidates = Corpus(tuple(text for text, _ in offered), tuple(of for _, of in offered), Provenance.PUBLIC)
    embedder, places = _Embedder(), dict[str, list[int]]()
    for number, (_, label) in enumerate(offered):
        places.setdefault(label, []).append(number)
    booths = {label: (own, embedder.embed([offered[n][0] for n in own])) for label, own in places.items()}
    return Vote(candidates), Polling(embedder, booths)  # type: ignore[arg-type]  # a stand-in for Embedder


def _voter(audited: Audited, seed: int, place: Path, index: int, present: NDArray[np.bool_]) -> ClientSide:
    """A client whose units are canaries, each with `ROWS` rows that vote for one candidate."""
    labels = tuple(_poll(len(present))[1].booths)
    rows = [_canary(int(number)) for number in np.flatnonzero(present) for _ in range(ROWS)]
    units = tuple(int(number) for number in np.flatnonzero(present) for _ in range(ROWS))
    texts, answers = tuple(text for text, _ in rows), tuple(label for _, label in rows)
    data = ClientData(Corpus(texts, answers, Provenance.PRIVATE, units=units), Corpus((), (), Provenance.PUBLIC))
    config = replace(audited.client, embedder=_ENCODER, voting=replace(audited.client.voting, rows_per_unit=ROWS))
    return _client(audited, seed, place, index, config=config, records=len(present), labels=labels, open=lambda: data)


def _votes(audited: Audited, seed: int, place: Path, canaries: int) -> Evidence:
    present, clients, seen = [_coins(seed, index, canaries) for index in range(CLIENTS)], [], []
    request, polling = _poll(canaries)
    for index, own in enumerate(present):
        client = _voter(audited, seed, place, index, own)
        clients.append(client)
        for round in range(audited.rounds):
            reply = vote.noised(client, request, f"round {round}", polling)
            client.ledger.store(f"round {round}", b"audited")
            values = np.asarray(reply.votes.values, np.float32)[np.newaxis] / audited.plan.clip_norm
            seen.append(Seen(index, values[:, :canaries], _all_hit(own), values[:, canaries:], 1))
    return _evidence(clients, reply.statement, present, seen)


def _summed_votes(audited: Audited, seed: int, place: Path, canaries: int) -> Evidence:
    """The sum of as many clients as are counted on: the noise of those that are missing or collude is not in it."""
    shares = _shares(audited.client)
    assert shares is not None
    honest, share = shares[0], shares[1](audited.plan.noise_multiplier)
    count = CLIENTS * canaries
    present, nobody = _coins(seed, 0, count), np.zeros(count, np.bool_)
    clients = [_voter(audited, seed, place, index, nobody if index else present) for index in range(honest)]
    (request, polling), cohort, seen = _poll(count), audited.client.secure_sum, []
    plan = clients[0].config.vote_plan(count, audited.rounds)
    vote.check_whole_noise(plan, share)
    for round in range(audited.rounds):
        total = np.zeros(2 * count)
        for client in clients:
            grant, randomness = _begun(client, plan, round)
            cast = vote.ballots(client, request.nearest, polling)
            total += vote.protected_whole(cast, 2 * count, share, randomness)
            client.ledger.store(grant, b"audited")
        values = (total / UNIT).astype(np.float32)[np.newaxis]
        seen.append(Seen(0, values[:, :count], _all_hit(present), values[:, count:], 1))
    return _evidence(clients, clients[0].statement(plan, ROWS, cohort), [present], seen)


def _shares(client: Client) -> tuple[int, Callable[[float], float]] | None:
    """The number of clients whose noise a sum counts on, and the variance of each one's noise by sigma."""
    cohort = client.secure_sum
    return None if cohort is None else (cohort.honest, cohort.share)


# --- Lists of scores --------------------------------------------------------------------------------------------------


def _lists(audited: Audited, seed: int, place: Path, canaries: int) -> Evidence:
    """Lists of scores, one a canary: its client has the list u or its opposite, which is C away once both are clipped.

    A canary is a whole client here. Two of these clients, and the others of a sum, have ledgers; the other keys are
    made as a simulation makes them.
    """
    summed, plan = _shares(audited.client) if audited.client.secure_sum else None, audited.plan
    corpus = Corpus(("text",) * _LISTED, tuple(str(n * 2 // _LISTED) for n in range(_LISTED)), Provenance.PUBLIC)
    signs = np.where(np.arange(_LISTED) % 2 == 0, 1.0, -1.0)
    basis = _basis(signs)
    sides = CLIENTS if summed is None else 1
    count = canaries * CLIENTS // sides
    present = [_coins(seed, index, count) for index in range(sides)]
    clients = [_client(audited, seed, place, index) for index in range(sides if summed is None else summed[0])]
    share = 0.0 if summed is None else summed[1](plan.noise_multiplier)
    score.check_noise(plan) if summed is None else score.check_whole_noise(plan, share)

    def noised(values: NDArray[np.float64], texts: Corpus, randomness: GrantRandomness) -> NDArray[np.float64]:
        """A list with its noise, in units of C."""
        if summed is None:
            return np.asarray(score.protected(values.tolist(), texts, plan, randomness)) / plan.clip_norm
        return score.protected_whole(values.tolist(), texts, plan, share, randomness) / UNIT

    seen = []
    for index, own in enumerate(present):
        for round in range(audited.rounds):
            grant, first = _begun(clients[index], plan, round)
            binding = f"{grant.binding.digest()} list"
            found = np.empty((count, _LISTED))
            for number, there in enumerate(own.tolist()):
                key = simulated_key(seed, CLIENTS * number + index, grant.counter, binding)
                list_ = 1000 * plan.clip_norm * (signs if there else -signs)
                found[number] = noised(list_, corpus, GrantRandomness(key) if number else first)
            clients[index].ledger.store(grant, b"audited")
            for other in clients[sides:]:  # of a sum: their lists are all zero, and one call adds noise to all of them
                other_grant, randomness = _begun(other, plan, round)
                many = Corpus(("text",) * found.size, ("0",) * found.size, Provenance.PUBLIC)
                found += noised(np.zeros(found.size), many, randomness).reshape(found.shape)
                other.ledger.store(other_grant, b"audited")
            along = found @ basis
            values = (along[:, 0] + 0.5).astype(np.float32)[np.newaxis]
            rest = along[:, 1:].astype(np.float32).reshape(1, -1)
            seen.append(Seen(index, values, _all_hit(own), rest, 1))
    charged = clients[0].charged(plan)
    cohort = None if summed is None else audited.client.secure_sum
    stated = statement(charged, unit="client", simulated=True, cohort=cohort)
    return _evidence(clients, stated, present, seen)


def _basis(first: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal directions as columns, the given one first."""
    q, _ = np.linalg.qr(np.column_stack([first, np.eye(len(first))[:, 1:]]))
    return np.asarray(q * np.sign(q[:, 0] @ first))


__all__ = ["CANARIES", "CLIENTS", "Audited", "evidence"]
