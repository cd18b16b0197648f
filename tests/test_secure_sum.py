"""A secure sum: the server learns the sum alone, whoever is missing; a client gives nothing that would show more."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from inprocess import Played, cell_of, play, simulation, to_toml
from local import LocalGrid
from resuming import Died, left
from scipy.stats import chisquare, poisson, skellam
from test_private_evolution import LABELS, Guessing, pointing, right, toml  # noqa: F401 - a fixture

from fedsynth.clients import handler
from fedsynth.clients import secure_sum as at_client
from fedsynth.clients import vote as on_client
from fedsynth.clients.app import client_app
from fedsynth.clients.vote import check_whole_noise, protected_whole, whole
from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation import summing
from fedsynth.federation.identity import Mistrusted, simulated_identity
from fedsynth.federation.messages import (
    KeysOffered,
    Learn,
    OfferKeys,
    OpenShares,
    Refused,
    SeedsShared,
    ShareSeeds,
    SharesOpened,
    SignSurvivors,
    SurvivorsSigned,
    Unmask,
    Unmasked,
    Vote,
)
from fedsynth.federation.nodes import TooFewReplies, nodes_by_client
from fedsynth.federation.run.exchange_record import ExchangeRecord
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.privacy_report import RDP, privacy_line, privacy_report
from fedsynth.federation.secure_sum import (
    MODULUS,
    NotOpened,
    Offer,
    Sealed,
    Secrets,
    SeedShare,
    Signed,
    check_offers,
    genuine,
    masked,
    new_secrets,
    offer,
    opened,
    shares,
    undisputed,
    unmasked,
)
from fedsynth.federation.strategy import Clients
from fedsynth.privacy import claims
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import Budget, BudgetTooSmall, replaced_epsilon
from fedsynth.privacy.skellam import UNIT, noise, sigma_of, variance
from fedsynth.privacy.statement import statement
from fedsynth.scenario.client import Client
from fedsynth.scenario.toml import from_toml
from fedsynth.training.selfcheck import SelfCheckFailed
from fedsynth.typed import BadValue

SUM = "0123456789abcdef" * 2
COHORT = Cohort(5, dropouts=2)


def offered(held: Secrets, client: int, sum_id: str = SUM, clients: int = 8, **more: Any) -> Offer:
    terms: dict[str, Any] = {"kind": "votes", "cohort": COHORT, "variance": 9.0} | more
    return offer(held, sum_id, client, simulated_identity(client, clients), **terms)


class Five:
    """Five clients with vectors, up to the point at which vectors are sent; no network."""

    def __init__(self, size: int = 40) -> None:
        rng = np.random.default_rng(0)
        self.ids = (0, 1, 2, 4, 7)
        self.vectors = {i: rng.integers(-(2**40), 2**40, size) for i in self.ids}
        self.secrets = {i: new_secrets() for i in self.ids}
        self.offers = [offered(self.secrets[i], i) for i in self.ids]
        self.boxes = {i: shares(self.secrets[i], SUM, i, self.offers, COHORT.threshold) for i in self.ids}

    def sent(self, client: int, members: Sequence[int] | None = None) -> list[int]:
        return masked(self.vectors[client], self.secrets[client], SUM, client, self.offers, members or self.ids)

    def given(self, client: int, members: Sequence[int], survivors: Sequence[int]) -> list[SeedShare]:
        to_me = [replace(box, client=i) for i in members for box in self.boxes[i] if box.client == client]
        found = opened(self.secrets[client], SUM, client, self.offers, to_me)
        return [SeedShare(i, found[i][1 if i in survivors else 0].hex()) for i in members]


# --- the arithmetic ---


@pytest.mark.parametrize("missing", [n for k in range(3) for n in itertools.combinations((0, 1, 2, 4, 7), k)])
def test_the_sum_of_masked_vectors_is_that_of_plain_ones_whoever_is_missing(missing: tuple[int, ...]) -> None:
    five = Five()
    survivors = [i for i in five.ids if i not in missing]
    vectors = {i: five.sent(i) for i in survivors}
    given = {i: five.given(i, five.ids, survivors) for i in survivors[:3]}  # as many as the threshold
    total = unmasked(SUM, five.offers, five.ids, vectors, given, 3)
    assert total.tolist() == sum(five.vectors[i] for i in survivors).tolist()
    with pytest.raises(NotOpened, match="2 shares are there, 3 are needed"):
        unmasked(SUM, five.offers, five.ids, vectors, dict(list(given.items())[:2]), 3)


def test_a_client_that_never_shared_its_seeds_has_no_mask_with_others() -> None:
    five = Five()
    members = five.ids[:4]
    vectors = {i: five.sent(i, members) for i in members[:3]}
    given = {i: five.given(i, members, members[:3]) for i in members[:3]}
    total = unmasked(SUM, five.offers, members, vectors, given, 3)
    assert total.tolist() == sum(five.vectors[i] for i in members[:3]).tolist()


def test_what_a_client_sends_is_uniform_and_never_the_same() -> None:
    one, other = Five(20_000), Five(20_000)
    one.vectors[1][:] = other.vectors[1][:] = 7  # equal inputs
    sent = [np.array(five.sent(1)) for five in (one, other)]
    assert (sent[0] != sent[1]).mean() > 0.999
    for words in (*sent, (sent[0] - sent[1]) % MODULUS):
        for shift in (0, 20, 40):
            counts = np.bincount(words >> shift & 255, minlength=256)
            assert chisquare(counts).pvalue > 1e-6
    plain = np.bincount(np.full(20_000, 7) & 255, minlength=256)
    assert chisquare(plain).pvalue < 1e-6  # it would show


def test_a_missing_mask_leaves_the_sum_unreadable() -> None:
    five = Five()
    vectors = {i: five.sent(i) for i in five.ids}
    given = {i: five.given(i, five.ids, five.ids) for i in five.ids}
    vectors[0] = five.sent(0, five.ids[:4])
    total = unmasked(SUM, five.offers, five.ids, vectors, given, 3)
    assert (np.abs(total - sum(five.vectors.values())) > 2**40).mean() > 0.9


@pytest.mark.parametrize("survives", [True, False])
def test_false_shares_are_passed_over_as_long_as_enough_are_true(survives: bool) -> None:
    five = Five()
    survivors = five.ids if survives else five.ids[1:]
    other = Five()
    given = {i: five.given(i, five.ids, survivors) for i in survivors}
    strange = {i: other.given(i, five.ids, survivors) for i in survivors}
    vectors = {i: five.sent(i) for i in survivors}
    wanted = sum(five.vectors[i] for i in survivors).tolist()
    liars = survivors[: len(survivors) - 3]
    false = {i: [strange[i][0], *of[1:]] if i in liars else of for i, of in given.items()}  # of client 0's seed
    assert unmasked(SUM, five.offers, five.ids, vectors, false, 3).tolist() == wanted
    false[survivors[-1]] = strange[survivors[-1]]  # now two are true, three are needed
    with pytest.raises(NotOpened, match="gave false ones"):
        unmasked(SUM, five.offers, five.ids, vectors, false, 3)


def test_offers_count_only_as_signed_by_a_pinned_key_for_this_sum_on_the_same_terms() -> None:
    five, me = Five(), simulated_identity(0, 8)
    own = five.offers[0]
    check_offers(five.offers, SUM, me, own, rests=True)

    def refused(offers: Sequence[Any], why: str, sum_id: str = SUM) -> None:
        with pytest.raises(Mistrusted, match=why):
            check_offers(offers, sum_id, me, own, rests=True)

    forged, first = new_secrets(), five.offers[:4]
    refused([*first, offered(forged, 9, clients=10)], "none of this client's roster")
    refused([*first, replace(five.offers[4], masking_key="ab" * 32)], "not of what it should sign")
    refused([*first, replace(five.offers[4], client=8)], "not of what it should sign")
    refused([*first, replace(five.offers[4], variance=10.0)], "not of what it should sign")
    refused([*first, replace(five.offers[4], signature="zz")], "not of what it should sign")
    refused([*first, replace(five.offers[4], signer="")], "no key")
    refused(five.offers, "not of what it should sign", sum_id="f" * 32)  # of another sum
    refused([*five.offers, own], "two offers of one client")
    impostor = replace(offered(forged, 2), client=3)
    refused([*five.offers[:3], impostor, *five.offers[3:]], "two offers of one signer")
    refused(five.offers[::-1], "order")
    refused(five.offers[1:], "own offer is not among")
    # An active server may tell clients different things: noise for another budget, another cohort.
    less = offered(forged, 7, variance=8.0)
    refused([*first, less], "client 7 will add less noise")
    check_offers([*first, less], SUM, me, own, rests=False)  # its own noise is enough
    refused([*first, offered(forged, 7, cohort=Cohort(5, 1, 1))], "client 7 was told of another cohort")
    refused([*first, offered(forged, 7, kind="scores")], "client 7 was told of another")
    low = replace(five.offers[4], masking_key="00" * 32)
    refused([*first, replace(low, signature=simulated_identity(7, 8).sign(low.said(SUM)))], "is none")


def test_an_offer_that_nobody_can_use_is_found_by_the_server() -> None:
    five = Five()
    assert all(genuine(made, SUM) for made in five.offers)
    made = five.offers[1]
    for change in (
        {"sealing_key": "zz"},
        {"masking_key": "00" * 32},
        {"commitment": "ab"},
        {"variance": math.inf},
        {"signer": "ssh-ed25519 AAAA"},
    ):
        changed = replace(made, **change)
        assert not genuine(replace(changed, signature=simulated_identity(1, 8).sign(changed.said(SUM))), SUM)
    assert not genuine(replace(made, signature=made.signature[:-2]), SUM)
    assert not genuine(made, "f" * 32)


def test_signatures_are_of_one_length() -> None:
    me = simulated_identity(0, 8)
    assert len({len(me.sign(bytes([n]))) for n in range(64)}) == 1


def test_shares_open_for_their_receiver_and_sum_alone() -> None:
    five = Five()
    for sender, receiver, offers in ((1, 2, five.offers), (1, 0, Five().offers), (1, 0, five.offers[:4])):
        box = next(box for box in five.boxes[sender] if box.client == 0)
        assert opened(five.secrets[receiver], SUM, receiver, offers, [replace(box, client=sender)]) == {}
    box = next(box for box in five.boxes[1] if box.client == 0)
    assert set(opened(five.secrets[0], SUM, 0, five.offers, [replace(box, client=1)])) == {1}
    with pytest.raises(Mistrusted, match="made no offer"):
        opened(five.secrets[0], SUM, 0, five.offers, [replace(box, client=3)])


@pytest.mark.parametrize(
    ("unreadable", "remain"),
    [
        ({0: (), 1: (), 2: ()}, (0, 1, 2)),
        ({0: (2,), 1: (2,), 2: ()}, (0, 1)),  # client 2 sent junk
        ({0: (), 1: (), 2: (0, 1)}, (0, 1)),  # client 2 lies about the others
        ({0: (), 1: (0,), 2: (), 3: ()}, (1, 2, 3)),  # either may be at fault: the lower number goes
        ({0: (0,), 1: (), 2: ()}, (0, 1, 2)),
    ],
)
def test_those_with_the_most_disputes_are_left_out(unreadable: Any, remain: tuple[int, ...]) -> None:
    assert undisputed(unreadable) == remain


@pytest.mark.parametrize(
    ("clients", "dropouts", "colluders", "threshold", "honest"),
    [(3, 1, 0, 2, 2), (3, 0, 1, 3, 2), (8, 1, 0, 5, 7), (8, 2, 2, 6, 4), (10, 1, 3, 7, 6)],
)
def test_two_lists_of_survivors_can_never_both_be_opened(
    clients: int, dropouts: int, colluders: int, threshold: int, honest: int
) -> None:
    cohort = Cohort(clients, dropouts, colluders)
    assert (cohort.threshold, cohort.honest) == (threshold, honest)
    assert 2 * cohort.threshold > clients + colluders  # an honest client signs one list, a colluder two
    assert cohort.threshold <= cohort.least


@pytest.mark.parametrize("numbers", [(2, 0, 0), (3, 2, 0), (3, 1, 1), (257, 0, 0), (8, -1, 0)])
def test_a_cohort_that_could_not_keep_its_promise_is_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(BadValue, match="secure_sum"):
        Cohort(*numbers)


# --- the noise ---


def brute_force(order: int, shift: int, spread: float) -> float:
    """Rényi divergence of Skellam noise and the same moved by `shift`, by the sum over all whole numbers.

    The difference of two Poisson draws, added up in logarithms: scipy's own `skellam` loses the tails.
    """
    mean = spread / 2
    reach = int(12 * math.sqrt(spread)) + (order + 1) * shift  # the terms are largest at order * shift
    points = np.arange(-reach, reach + 1)
    second = np.arange(int(mean + 12 * math.sqrt(mean)) + reach)
    both = poisson.logpmf(points[:, None] + second, mean) + poisson.logpmf(second, mean)
    density = np.logaddexp.reduce(both, axis=1)
    terms = order * density[:-shift] - (order - 1) * density[shift:]
    return float(np.logaddexp.reduce(terms)) / (order - 1)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("order", [2, 3, 8, 32])
def test_skellam_noise_costs_no_more_than_the_gaussian_noise_that_is_charged(sigma: float, order: int) -> None:
    unit = 16  # in place of 1024, so that the sum over whole numbers can be computed; the theorem is the same
    half = unit**2 / 2
    spread = sigma**2 * (half + math.sqrt(half**2 + 2.5 * unit**2 / sigma**2))
    found, charged = brute_force(order, unit, spread), order / (2 * sigma**2)
    assert found <= charged
    if order <= 3:  # at high orders the tails of this small unit cost far less than the theorem says
        assert found > 0.9 * charged
        assert brute_force(order, unit, 0.8 * spread) > charged  # less noise would show


def test_variance_and_sigma_are_inverse_and_hardly_more_than_a_gaussians() -> None:
    for sigma in (0.05, 0.6, 2.0, 20.0):
        assert sigma_of(variance(sigma)) == pytest.approx(sigma, rel=1e-12)
        assert 1 < variance(sigma) / (sigma * UNIT) ** 2 < 1 + 3 / (sigma**2 * UNIT**2)


def test_draws_are_of_the_skellam_distribution_and_shares_of_them_add_up() -> None:
    spread = 12.0
    whole_ = noise(GrantRandomness(b"a" * 32), 40_000, spread)
    parts = [noise(GrantRandomness(bytes([k]) * 32), 40_000, spread / 4) for k in range(4)]
    edges = np.arange(-8, 9)
    chances = skellam.pmf(edges, spread / 2, spread / 2)
    chances = np.append(chances, 1 - chances.sum())
    for found in (whole_, np.sum(parts, axis=0)):
        counts = np.array([*[(found == edge).sum() for edge in edges], (np.abs(found) > 8).sum()])
        assert chisquare(counts, chances * len(found)).pvalue > 1e-6
    assert abs(np.corrcoef(parts[0], parts[1])[0, 1]) < 0.02
    counts = np.array([*[(parts[0] == edge).sum() for edge in edges], (np.abs(parts[0]) > 8).sum()])
    assert chisquare(counts, chances * 40_000).pvalue < 1e-6  # a share alone is too little noise


@pytest.mark.parametrize("sigma", [0.05, 2.0, 128.0])
def test_draws_have_the_planned_variance_at_every_size(sigma: float) -> None:
    drawn = noise(GrantRandomness(b"b" * 32), 4_000, variance(sigma)) / UNIT
    assert drawn.std() == pytest.approx(sigma, rel=0.05)
    assert abs(drawn.mean()) < 5 * sigma / math.sqrt(4_000)


def test_more_noise_than_the_table_holds_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(ValueError, match="mean must lie in"):
        GrantRandomness(bytes(32)).poissons(1, 2.0**35)
    plan = client(2.0).vote_plan(200)
    with pytest.raises(ValueError, match="at most 128"):
        replace(plan, noise_multiplier=129.0)
    with pytest.raises(BudgetTooSmall):
        replace(client(0.02), max_noise_multiplier=1000.0).vote_plan(200)


def test_noise_of_the_honest_is_that_of_the_plan_and_more_if_all_stay() -> None:
    cohort = Cohort(8, dropouts=2, colluders=1)
    plan = client(2.0, cohort).vote_plan(200)
    drawn = [
        protected_whole([{}], 6_000, cohort.share(plan.noise_multiplier), GrantRandomness(bytes([k]) * 32))
        for k in range(8)
    ]
    spread = np.var(np.sum(drawn[: cohort.honest], axis=0)) / UNIT**2
    assert spread == pytest.approx(plan.noise_multiplier**2, rel=0.05)
    assert np.var(np.sum(drawn[:4], axis=0)) / UNIT**2 < 0.9 * plan.noise_multiplier**2  # one fewer is too little
    assert np.var(np.sum(drawn, axis=0)) / UNIT**2 > 1.4 * plan.noise_multiplier**2


@pytest.mark.parametrize("weights", [[1.0], [1 / math.sqrt(3)] * 3, [5.0, 1.0, 0.2], [0.6, 0.8], [1 / 8] * 64])
def test_a_units_votes_are_bounded_after_rounding(weights: list[float]) -> None:
    found = whole([dict(enumerate(weights))], len(weights) + 1)
    assert int((found**2).sum()) <= UNIT**2
    norm = max(1.0, math.hypot(*weights))
    assert np.abs(found[:-1] / UNIT - np.array(weights) / norm).max() <= 1 / UNIT
    assert whole([{0: 1.0}], 1).tolist() == [UNIT]  # not one less by the last bit of a float


def client(epsilon: float, cohort: Cohort | None = COHORT) -> Client:
    return Client("assets:tiny-slm", budget=Budget(epsilon), secure_sum=cohort)


def canonne(sigma: float, rounds: int, delta: float) -> float:
    """Epsilon by RDP of whole orders, Canonne, Kamath and Steinke 2020, proposition 12; written out by hand."""
    return min(rounds * a / (2 * sigma**2) + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a in range(2, 513))


@pytest.mark.parametrize(("epsilon", "sigma"), [(8.0, 0.639), (2.0, 2.15), (1.0, 4.073)])
def test_both_figures_are_those_of_renyi_divergence(epsilon: float, sigma: float) -> None:
    plan = client(epsilon).vote_plan(200)
    assert plan.noise_multiplier == sigma
    said = statement(plan, rows=(2,), cohort=COHORT)
    assert canonne(sigma, 1, 1e-5) <= said.epsilon <= epsilon < canonne(0.98 * sigma, 1, 1e-5)
    assert (
        canonne(sigma / math.sqrt(2), 1, 1e-5)
        <= replaced_epsilon(plan)
        <= 1.03 * canonne(sigma / math.sqrt(2), 1, 1e-5)
    )
    # Three of five are counted on: one client's own messages have a third of the variance.
    assert said.epsilon_alone == pytest.approx(canonne(sigma / math.sqrt(3), 1, 1e-5), rel=0.03)
    assert said.epsilon_rows[2] == pytest.approx(canonne(sigma / 2, 1, 1e-5), rel=0.03)
    claims.check(said, mechanisms=("summed_votes",))
    with pytest.raises(ValueError, match="epsilon_alone"):
        claims.check(replace(said, epsilon_alone=said.epsilon), mechanisms=("summed_votes",))
    with pytest.raises(ValueError, match="by RDP"):  # the figure of a Gaussian of that deviation
        claims.check(replace(said, epsilon=0.93 * said.epsilon), mechanisms=("summed_votes",))
    with pytest.raises(ValueError, match="in none"):
        claims.check(replace(said, mechanism="votes"))


def test_the_check_before_the_charge_finds_missing_noise_and_a_missing_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = client(2.0).vote_plan(200)
    share = COHORT.share(plan.noise_multiplier)
    check_whole_noise.__wrapped__(plan, share)

    def broken(bound: Callable[..., Any], times: float) -> Callable[..., Any]:
        return lambda votes, n, spread, r: bound(votes, n) + noise(r, n, spread * times)

    monkeypatch.setattr(on_client, "protected_whole", broken(whole, 0.8))
    with pytest.raises(SelfCheckFailed, match="deviation"):
        check_whole_noise.__wrapped__(plan, share)
    monkeypatch.setattr(on_client, "protected_whole", broken(lambda v, n: whole(v, n) * 2, 1.0))
    with pytest.raises(SelfCheckFailed, match="apart"):
        check_whole_noise.__wrapped__(plan, share)


# --- clients and a server in one process ---

SUMMED = "budget = { epsilon = 8.0 }\nsecure_sum = { clients = 3, dropouts = 1 }"


def summed_toml(place: Path, *, rounds: int = 1, options: str = "", settings: str = SUMMED) -> str:
    return toml(place, rounds=rounds, options=options).replace("budget = { epsilon = 8.0 }", settings)


def run(place: Path, *, settings: str = SUMMED, rounds: int = 1, **more: Any) -> Played:
    place.mkdir(exist_ok=True)
    return play(summed_toml(place, rounds=rounds, settings=settings), place, llm=Guessing(), measures=False, **more)


def dropping(task: str, node: int) -> Callable[[Message], Message | None]:
    """A client that is gone when it is asked for something."""

    def spoil(message: Message) -> Message | None:
        if message.metadata.message_type == task and message.metadata.dst_node_id == node:
            from flwr.app import Error

            return Message(Error(1, "gone"), reply_to=message)
        return None

    return spoil


def test_the_server_learns_the_sum_of_votes_and_no_clients_counts(tmp_path: Path) -> None:
    played = run(tmp_path / "a")
    votes = played.requests(Vote)
    replies = played.replies(Vote)
    assert [request.members for request in votes] == [(0, 1, 2)] * 3
    for reply in replies:
        assert min(reply.votes.values) >= 0
        assert max(reply.votes.values) > MODULUS / 4  # a count would be far below
        assert reply.statement.cohort == Cohort(3, 1)
        assert reply.statement.epsilon <= 8.0 < reply.statement.epsilon_alone
    learnt = played.requests(Learn)[0].corpus
    assert right(learnt) == 1.0
    assert set(learnt.grants) == {grant for reply in replies for grant in reply.votes.grants}
    line = privacy_line([played.run_log])
    terms = privacy_report([played.run_log])["terms"]
    assert terms["mechanism"].startswith("Skellam noise on every count of votes")
    assert (terms["sampler"], terms["accountant"]) == ("none: all of the client's data takes part", RDP)
    assert "a secure sum of 3 clients" in line
    assert "honest" in line
    again = run(tmp_path / "b")  # masks differ, the sum and its noise do not
    assert again.replies(Vote)[0].votes.values != replies[0].votes.values
    assert again.requests(Learn)[0].corpus == learnt


@pytest.mark.parametrize("request_", [OfferKeys, ShareSeeds, OpenShares, Vote, SignSurvivors, Unmask])
def test_one_client_may_be_gone_at_any_point(tmp_path: Path, request_: Any) -> None:
    node = next(iter(LocalGrid(client_app(simulation), 3, {}).contexts))
    played = run(tmp_path / "a", spoil=dropping(request_.task, node))
    assert right(played.requests(Learn)[0].corpus) == 1.0


def test_with_two_gone_nothing_is_opened_and_the_charge_stands(tmp_path: Path) -> None:
    nodes = list(LocalGrid(client_app(simulation), 3, {}).contexts)
    spoils = [dropping(Vote.task, node) for node in nodes[:2]]
    out = tmp_path / "a"
    with pytest.raises(TooFewReplies, match=r"vote: .* 2 needed"):
        run(out, spoil=lambda message: next(filter(None, (spoil(message) for spoil in spoils)), None))
    crossed = (out / "run").rglob("*")
    assert not any("unmask" in path.name for path in crossed)


class Asked:
    """Three simulated clients that a test asks what it likes."""

    def __init__(self, place: Path, settings: str = SUMMED) -> None:
        place.mkdir(exist_ok=True)
        text = to_toml(from_toml(summed_toml(place, settings=settings)))
        cell, out = cell_of(text, "main", 0), place / "out"
        out.mkdir(exist_ok=True)
        self.grid = LocalGrid(client_app(simulation), 3, {"scenario-toml": text, "out-dir": str(out)})
        self.run_log = RunLog(cell, out, out / "events.jsonl")
        self.clients = Clients(self.grid, nodes_by_client(self.grid, 3), cell, "simulated", LABELS, self.run_log)
        self.played = Played(cell, self.grid, self.run_log, out)

    def __call__(self, request: Any, *ids: int) -> Any:
        found = self.clients.ask_each(dict.fromkeys(ids or (0, 1, 2), request), needed=0)
        return found if len(ids) != 1 else found.get(ids[0])

    def refused(self, request: Any, client: int = 0) -> str:
        assert self(request, client) is None
        reply = self.played.replies(type(request))[-1]
        assert isinstance(reply, Refused)
        return (self.played.client(client).work / "site.log").read_text().rsplit("Mistrusted: ", 1)[-1]

    def until_opened(self) -> None:
        self.offers = tuple(reply.offer for reply in self(OfferKeys(SUM, "votes")).values())
        self.shared = self(ShareSeeds(SUM, self.offers))
        for client in range(3):
            self(OpenShares(SUM, self.boxes(client)), client)

    def boxes(self, client: int, senders: Sequence[int] = (0, 1, 2)) -> tuple[Sealed, ...]:
        found = [(i, box) for i in senders for box in self.shared[i].shares if box.client == client]
        return tuple(replace(box, client=i) for i, box in found)

    def until_voted(self, members: tuple[int, ...] = (0, 1, 2)) -> tuple[Any, dict[int, Any]]:
        self.until_opened()
        corpus = Corpus(("a b", "c d", "e f", "g h"), ("heart", "heart", "skin", "skin"), Provenance.PUBLIC)
        self.vote = Vote(corpus, sum_id=SUM, members=members)
        return self.vote, self(self.vote, *members)


def unmask(survivors: tuple[int, ...], signers: Sequence[int], signed: dict[int, Any]) -> Unmask:
    return Unmask(SUM, survivors, tuple(Signed(i, signed[i].signature) for i in signers))


def test_a_client_never_gives_both_seeds_of_another(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    asked.until_voted()
    one = asked(SignSurvivors(SUM, (0, 1, 2)))
    assert "another list" in asked.refused(SignSurvivors(SUM, (0, 1)))
    assert "another list" in asked.refused(unmask((0, 1), (0, 1), one))
    assert len(asked(unmask((0, 1, 2), (0, 1, 2), one), 0).shares) == 3
    assert "opened already" in asked.refused(unmask((0, 1), (0, 1), one))
    assert "opened already" in asked.refused(SignSurvivors(SUM, (0, 1)))


def test_a_list_that_too_few_signed_opens_nothing(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    asked.until_voted()
    signed = asked(SignSurvivors(SUM, (0, 1, 2)), 0, 1)  # client 2 has signed none
    one_of_another = asked(SignSurvivors(SUM, (0, 2)), 2, 2)
    both = dict(signed) | {2: one_of_another[2]}
    assert "1 clients have signed" in asked.refused(unmask((0, 1, 2), (1,), both))
    assert "1 clients have signed" in asked.refused(unmask((0, 1, 2), (1, 1, 1), both))  # one, three times
    assert "1 clients have signed" in asked.refused(unmask((0, 1, 2), (1, 2), both))  # of another list
    forged = dict(signed) | {2: signed[1]}
    assert "1 clients have signed" in asked.refused(unmask((0, 1, 2), (1, 2), forged))  # under another's name
    assert "1 survivors of a sum" in asked.refused(SignSurvivors(SUM, (0,)), 0)
    junk = unmask((0, 1, 2), (0, 1), signed)
    junk = replace(junk, signatures=(*junk.signatures, Signed(2, "ab"), Signed(7, "ab")))
    assert len(asked(junk, 0).shares) == 3  # a false signature keeps nobody from opening


def test_a_second_vector_of_a_sum_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    vote, _ = asked.until_voted()
    side = asked.played.client(0)
    before = side.ledger.spent()
    other = replace(vote, corpus=vote.corpus.take([0, 2]))
    assert "another request has got this client's vector" in asked.refused(other)
    assert "another request" in asked.refused(replace(vote, members=(0, 1)))
    assert side.ledger.spent() == before
    # A folder that is restored from a copy forgets the vector, the account does not.
    [file] = (side.work / "sums").glob("*.json")
    part = json.loads(file.read_text())
    file.write_text(json.dumps({**part, "vector": "", "members": []}))
    assert "another request has got" in asked.refused(other)
    assert side.ledger.spent() == before


def test_what_does_not_belong_to_a_sum_is_refused_before_the_charge(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    assert "not known here" in asked.refused(ShareSeeds(SUM, ()))
    assert "no sum of them" in asked.refused(OfferKeys(SUM, "scores"))
    asked.offers = offers = tuple(reply.offer for reply in asked(OfferKeys(SUM, "votes")).values())
    assert "known from another request" in asked.refused(OfferKeys(SUM, "votes"))  # of a later exchange
    assert "1 offers of a sum" in asked.refused(ShareSeeds(SUM, offers[:1]))
    assert "own offer is not among" in asked.refused(ShareSeeds(SUM, offers[1:]))
    asked.shared = asked(ShareSeeds(SUM, offers))
    assert "other clients" in asked.refused(ShareSeeds(SUM, offers[:2]))
    again = asked(ShareSeeds(SUM, offers), 0)  # of a later exchange: nothing is encrypted twice
    assert again == asked.shared[0]
    junk = (*asked.boxes(0, (0, 1)), replace(asked.boxes(0, (2,))[0], box="ab" * 40))
    assert asked(OpenShares(SUM, junk), 0).unreadable == (2,)
    corpus = Corpus(("a b", "e f"), ("heart", "skin"), Provenance.PUBLIC)
    for vote, why in (
        (Vote(corpus), "not known here"),
        (Vote(corpus, sum_id="f" * 32, members=(0, 1, 2)), "not known here"),
        (Vote(corpus, sum_id=SUM, members=(1, 2)), "this one among them"),
        (Vote(corpus, sum_id=SUM, members=(0,)), "1 members of a sum"),
        (Vote(corpus, sum_id=SUM, members=(0, 1, 2)), "could not be opened"),
    ):
        assert why in asked.refused(vote)
    assert asked.played.client(0).ledger.spent() == (0.0, 1e-5)
    assert "has sent no vector" in asked.refused(SignSurvivors(SUM, (0, 1, 2)))


def faulty(change: Callable[[Any], Any], kind: type[Any], client: int = 2) -> Callable[..., Any]:
    """`ask` of `secure_sum`, in which one client replies something else."""

    def ask(real: Callable[..., Any], requests: Any, *, needed: int) -> dict[int, Any]:
        found = real(requests, needed=needed)
        if client in found and isinstance(found[client], kind):
            found[client] = change(found[client])
        return dict(found)

    return ask


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (KeysOffered, lambda r: replace(r, offer=replace(r.offer, client=999))),
        (KeysOffered, lambda r: replace(r, offer=replace(r.offer, masking_key="00" * 32))),
        (KeysOffered, lambda r: replace(r, offer=replace(r.offer, signature="ab"))),
        (KeysOffered, lambda r: replace(r, offer=replace(r.offer, cohort=Cohort(4, 1)))),
        (SeedsShared, lambda r: replace(r, shares=tuple(replace(box, box="ab") for box in r.shares))),
        (SharesOpened, lambda r: replace(r, unreadable=(0, 1))),
        (SurvivorsSigned, lambda r: replace(r, signature="ab")),
        (Unmasked, lambda r: replace(r, shares=tuple(replace(s, share="ab" * 16) for s in r.shares))),
    ],
    ids=[
        "another number",
        "a low key",
        "no signature",
        "another cohort",
        "junk boxes",
        "lies",
        "no list",
        "junk seeds",
    ],
)
def test_one_faulty_client_costs_no_more_than_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Any], change: Any
) -> None:
    real, ask = Clients.ask_each, faulty(change, kind)
    monkeypatch.setattr(
        Clients,
        "ask_each",
        lambda self, requests, **more: ask(partial(real, self), requests, **more) if more else real(self, requests),
    )
    played = run(tmp_path / "a")
    assert right(played.requests(Learn)[0].corpus) == 1.0


def test_a_cohort_must_have_as_many_clients_as_vote(tmp_path: Path) -> None:
    from fedsynth.simulation.simulate import check

    with pytest.raises(BadValue, match="clients is 4, but 3 are asked"):
        check(from_toml(summed_toml(tmp_path, settings=SUMMED.replace("clients = 3", "clients = 4"))))


def test_two_amounts_of_noise_never_come_of_one_key(tmp_path: Path) -> None:
    counters = []
    for name, dropouts in (("a", 0), ("b", 1)):
        played = run(tmp_path / name, settings=SUMMED.replace("dropouts = 1", f"dropouts = {dropouts}"))
        counters.append([row["id"] for row in played.client(0).ledger.entries() if row["kind"] == "grant"])
    assert counters[0] != counters[1]  # in a simulation a grant's name is made from its key


def test_every_round_has_a_sum_of_its_own(tmp_path: Path) -> None:
    played = run(tmp_path / "a", rounds=2)
    assert len({request.sum_id for request in played.requests(Vote)}) == 2
    assert {reply.statement.steps for reply in played.replies(Vote)} == {2}
    kept = sorted((played.client(0).work / "sums").glob("*.json"))
    assert len(kept) == 2
    assert not any('"secrets"' in path.read_text() for path in kept)  # erased with the opening


# --- runs that are killed and go on ---

EXCHANGES = (OfferKeys, ShareSeeds, OpenShares, Vote, SignSurvivors, Unmask)


class Killed:
    """A run that is left alone, and others of the same scenario, each killed once and gone on with."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.monkeypatch, self.toml = place, monkeypatch, summed_toml(place)
        self.made: list[tuple[int, list[int]]] = []  # a client, and a vector that it put under masks
        self.opened: list[dict[int, list[float]]] = []  # by client, the vectors of a sum that the server opened
        monkeypatch.setattr(at_client, "masked", self._masked)
        monkeypatch.setattr(summing, "unmasked", self._unmasked)
        self.whole = self.play("whole")

    def _masked(self, values: Any, held: Any, sum_id: str, client: int, *more: Any) -> list[int]:
        self.made.append((client, masked(values, held, sum_id, client, *more)))
        return self.made[-1][1]

    def _unmasked(self, sum_id: str, offers: Any, members: Any, vectors: Any, *more: Any) -> Any:
        self.opened.append({client: [*vector] for client, vector in vectors.items()})
        return unmasked(sum_id, offers, members, vectors, *more)

    def play(self, name: str) -> Played:
        return play(self.toml, self.place / name, llm=Guessing(), measures=False)

    def goes_on(self, name: str, spoil: Callable[[pytest.MonkeyPatch], None]) -> list[int]:
        """Kills a run by a patch and goes on with it: it ends as the other one. The clients of all vectors made."""
        self.made, self.opened = [], []
        with self.monkeypatch.context() as patch:
            spoil(patch)
            with pytest.raises(Died):
                self.play(name)
        again = self.play(name)
        assert self.settled(again) == self.settled(self.whole), name
        assert again.requests(Learn)[0].corpus == self.whole.requests(Learn)[0].corpus, name
        assert all(self.opened[-1][client] == vector for client, vector in self.made), name
        for client in range(3):
            [path] = (again.client(client).work / at_client.SUMS).iterdir()
            assert '"secrets"' not in path.read_text(), name
        return [client for client, _ in self.made]

    @staticmethod
    def settled(run: Played) -> dict[str, Any]:
        """What a run leaves, but for the sizes of messages: those of signatures and of masked numbers differ."""
        found = left(run)
        assert [len(found[key][1]) for key in found if "#" in key] == [1, 1, 1]  # reservations
        assert [[grant["state"] for grant in found[key][2]] for key in found if "#" in key] == [["sent"]] * 3
        return found | {"rows": [row for row in found["rows"] if not row[4].startswith("bytes/")]}


@pytest.mark.parametrize("recorded", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_server_killed_after_any_exchange_opens_the_sum_of_the_same_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    killed, close = Killed(tmp_path, monkeypatch), ExchangeRecord.close
    for number, request in enumerate(EXCHANGES):

        def spoil(patch: pytest.MonkeyPatch, number: int = number) -> None:
            count = iter(range(len(EXCHANGES)))

            def dies(self: ExchangeRecord) -> None:
                last = next(count) == number
                if recorded or not last:
                    close(self)
                if last:
                    raise Died

            patch.setattr(ExchangeRecord, "close", dies)

        assert sorted(killed.goes_on(request.__name__, spoil)) == [0, 1, 2]  # a repeated request gets the stored bytes


@pytest.mark.parametrize("noted", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_client_killed_before_it_stores_an_answer_sends_the_same_vector_under_the_same_grant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    """As soon as its part of the sum is noted, or when the answer is made and not yet stored."""
    killed, keep = Killed(tmp_path, monkeypatch), at_client._keep
    for request in EXCHANGES:
        answer: Any = handler.FUNCTIONS[request]

        def spoil(patch: pytest.MonkeyPatch, request: Any = request, answer: Any = answer) -> None:
            def dies(*arguments: Any) -> None:
                keep(*arguments)
                raise Died

            def answers(*arguments: Any) -> Any:
                if noted:
                    patch.setattr(at_client, "_keep", dies)
                answer(*arguments)
                raise Died

            patch.setitem(handler.FUNCTIONS, request, answers)

        made = killed.goes_on(request.__name__, spoil)
        twice = request is Vote and not noted
        assert sorted(made) == sorted([*range(3), *([made[0]] if twice else [])])
