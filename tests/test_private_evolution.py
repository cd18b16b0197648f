"""Private evolution: what a unit's votes can move, the noise on every count, and what votes choose."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from inprocess import Played, canary, play
from scipy.optimize import brentq
from scipy.stats import norm
from test_llm import letters

from fedsynth.clients import vote as on_client
from fedsynth.clients.vote import ballots, check_noise, prepared, protected, summed
from fedsynth.corpus import Corpus, Provenance, Votes
from fedsynth.deployment.policy import Policy
from fedsynth.federation.messages import Learn, Vote, Voted
from fedsynth.federation.nodes import TooFewReplies, nodes_by_client
from fedsynth.federation.payload import decode
from fedsynth.federation.records import WillNotLeave, seal
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.privacy_report import privacy_line
from fedsynth.federation.strategy import Clients
from fedsynth.federation.summing import added
from fedsynth.federation.validation import Rejected, check_reply, check_request
from fedsynth.models.sampling import SamplingParams
from fedsynth.privacy import claims
from fedsynth.privacy.caps import Account, BudgetExhausted
from fedsynth.privacy.ledger import Binding, Ledger
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import Budget, DPPlan, epsilon, replaced_epsilon
from fedsynth.privacy.statement import statement
from fedsynth.scenario.client import Client, Voting
from fedsynth.scenario.toml import from_toml
from fedsynth.synthesis.voting import by_chance, kept, permuted
from fedsynth.training.selfcheck import SelfCheckFailed
from fedsynth.typed import BadValue

LABELS = ("heart", "skin")


class Pointing:
    """An encoder whose direction of a text is the share of each of its letters; a text with "l" has none."""

    tokenizer = letters()
    width = 8

    def embed(self, texts: Sequence[str], *, longest: int | None = None) -> Any:
        assert longest == 128
        counts = [[text.count(letter) for letter in "abcdefgh"] for text in texts]
        found = np.array(counts, dtype=np.float32).reshape(len(texts), 8)
        found[["l" in text for text in texts]] = np.nan
        return found


CANDIDATES = Corpus(
    ("aaaa", "bbbb", "aabb", "bbbb", "cccc", "ccdd"),
    ("heart", "heart", "heart", "heart", "skin", "skin"),
    Provenance.PUBLIC,
)
ROWS = (("aaaa", "heart"), ("aab", "heart"), ("bbb", "heart"), ("cc", "skin"), ("ccd", "skin"))


@pytest.fixture(autouse=True)
def pointing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Pointing()
    monkeypatch.setattr(on_client, "shared_embedder", lambda _: encoder)


def holding(rows: Sequence[tuple[str, str]], units: Sequence[str] | None = None, records: int | None = None) -> Any:
    """A client with these rows, as far as votes look at it."""
    voting = Voting(rows_per_unit=4) if units else Voting()
    train = Corpus(
        tuple(t for t, _ in rows), tuple(y for _, y in rows), Provenance.PRIVATE, units=units and tuple(units)
    )
    config = SimpleNamespace(voting=voting, embedder="", task_model="an encoder")
    count = len(set(units) if units else rows) if records is None else records
    return SimpleNamespace(train=train, labels=LABELS, records=count, config=config)


def cast(client: Any, candidates: Corpus, nearest: int = 1) -> list[Any]:
    return list(ballots(client, nearest, prepared(client, candidates)))


def tally(rows: Sequence[tuple[str, str]], nearest: int = 1, **more: Any) -> list[float]:
    found: list[float] = summed(cast(holding(rows, **more), CANDIDATES, nearest), len(CANDIDATES)).tolist()
    return found


# --- one unit ---


def test_each_text_votes_for_its_nearest_of_its_own_label_by_hand() -> None:
    # "aab" points between "aaaa" and "aabb": cosine .894 and .949. "bbbb" stands twice, and is one candidate.
    assert tally(ROWS) == [1, 1, 1, 0, 1, 1]
    assert sum(tally(ROWS)) == len(ROWS)


@pytest.mark.parametrize("nearest", [1, 2, 3])
def test_an_emptied_record_moves_its_own_cells_and_nothing_else(nearest: int) -> None:
    whole = np.array(tally(ROWS, nearest))
    for row in range(len(ROWS)):
        less = np.array(tally([("", y) if i == row else (t, y) for i, (t, y) in enumerate(ROWS)], nearest))
        moved = whole - less
        own = min(nearest, 3 if ROWS[row][1] == "heart" else 2)  # different candidates of the label
        assert sorted(moved[moved != 0].tolist()) == pytest.approx([1 / math.sqrt(nearest)] * own)


class Swayed(Pointing):
    """An encoder whose last bits change with the number of texts that it reads at once, as those of real ones do."""

    def embed(self, texts: Sequence[str], *, longest: int | None = None) -> Any:
        found = super().embed(texts, longest=longest)
        found[:, 0] += 1e-3 * (len(texts) - 4)
        return found


def test_no_text_sways_the_vote_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, between = Swayed(), Corpus(("aaab", "abbb"), ("heart",) * 2, Provenance.PUBLIC)
    monkeypatch.setattr(on_client, "shared_embedder", lambda _: encoder)
    rows = [("ab", "heart")] * 7  # as near to one as to the other, but for the last bits

    def votes_of_one(others: int) -> list[dict[int, float]]:
        return [dict(ballot) for ballot in cast(holding(rows[: 1 + others], records=7), between)[:1]]

    assert all(votes_of_one(others) == votes_of_one(0) for others in range(1, 7))
    monkeypatch.setattr(on_client, "alone", on_client._directions)  # in one batch
    assert votes_of_one(6) != votes_of_one(0)


@pytest.mark.parametrize("bad", [("l", "heart"), ("aa", "lungs"), ("", "heart"), (" ", "heart"), ("\u200b", "heart")])
def test_a_text_without_direction_label_or_letters_has_no_vote_and_spoils_none(bad: tuple[str, str]) -> None:
    assert tally([*ROWS, bad]) == tally(ROWS) == [1, 1, 1, 0, 1, 1]


class Failing(Pointing):
    """An encoder that fails on some texts, as on one that is too long for it."""

    def __init__(self, bad: str) -> None:
        self.bad = bad

    def embed(self, texts: Sequence[str], *, longest: int | None = None) -> Any:
        if any(self.bad in text for text in texts):
            raise RuntimeError("index 34 is out of bounds")
        return super().embed(texts, longest=longest)


def test_a_text_that_the_encoder_fails_on_has_no_vote_and_nobody_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Failing("dddd")
    monkeypatch.setattr(on_client, "shared_embedder", lambda _: encoder)
    assert tally([*ROWS, ("dddd", "skin")]) == tally(ROWS)


def test_an_encoder_that_fails_on_public_text_fails_before_private_text_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for bad in ("a a a a a a a a a a a", "cccc"):  # the longest text that may come; a candidate
        encoder = Failing(bad)
        monkeypatch.setattr(on_client, "shared_embedder", lambda _, encoder=encoder: encoder)
        blind = SimpleNamespace(config=holding(ROWS).config)  # has no private text
        with pytest.raises(RuntimeError, match="out of bounds"):
            prepared(blind, CANDIDATES)


def test_a_replaced_unit_moves_the_counts_by_sqrt_2_at_most() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = [("".join(rng.choice(list("abcd"), 4)), LABELS[k]) for k in rng.integers(2, size=6)]
        units, nearest = ["p", "p", "q", "q", "q", "r"], int(rng.integers(1, 5))
        other = [
            *rows[:2],
            *(("".join(rng.choice(list("abcd"), 4)), LABELS[k]) for k in rng.integers(2, size=3)),
            rows[5],
        ]
        one, two = (np.array(tally(each, nearest, units=units)) for each in (rows, other))
        assert np.linalg.norm(one - two) <= math.sqrt(2) + 1e-9


def test_a_candidate_without_a_direction_takes_no_vote_and_a_label_without_candidates_has_none() -> None:
    asked = Corpus(("ll", "bbbb"), ("heart", "heart"), Provenance.PUBLIC)
    assert summed(cast(holding(ROWS), asked), 2).tolist() == [0, 3]


def test_a_persons_votes_together_have_norm_1_at_most() -> None:
    units = ["p", "p", "p", "q", "q"]
    votes = cast(holding(ROWS, units), CANDIDATES)
    assert [dict(each) for each in votes] == [{0: 1, 2: 1, 1: 1}, {4: 1, 5: 1}]
    assert summed(votes, 6) == pytest.approx([3**-0.5] * 3 + [0, 2**-0.5, 2**-0.5])
    one = cast(holding(ROWS[:1] * 4, ["p"] * 4), CANDIDATES)  # four equal rows are one vote
    assert summed(one, 6).tolist() == [1, 0, 0, 0, 0, 0]


def test_slots_beyond_the_units_are_empty_and_units_beyond_the_slots_do_not_vote() -> None:
    assert [dict(each) for each in cast(holding(ROWS, records=7), CANDIDATES)][5:] == [{}, {}]
    assert sum(tally(ROWS, records=2)) == 2


# --- the noise and what it costs ---


def exact_sigma(epsilon: float, delta: float, rounds: int) -> float:
    """Of T Gaussian mechanisms of sensitivity 1, by the closed form (Balle and Wang 2018)."""

    def spent(mu: float) -> float:
        return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)) - delta

    return math.sqrt(rounds) / brentq(spent, 1e-3, 20)


@pytest.mark.parametrize("epsilon", [8.0, 2.0, 1.0])
@pytest.mark.parametrize("rounds", [1, 3, 5, 10, 20])
def test_the_noise_is_that_of_rounds_gaussian_mechanisms(epsilon: float, rounds: int) -> None:
    client = Client("assets:tiny-slm", budget=Budget(epsilon), max_noise_multiplier=40)
    plan = client.vote_plan(200, rounds)
    exact = exact_sigma(epsilon, 1e-5, rounds)
    assert exact - 1e-9 <= plan.noise_multiplier <= exact + 0.01
    assert (plan.sampling_rate, plan.steps, plan.clip_norm) == (1.0, 1, 1.0)
    # A unit that is replaced takes a vote from one text and gives one to another: sqrt(2).
    replaced, sigma = replaced_epsilon(plan), plan.noise_multiplier / math.sqrt(2)
    assert exact_sigma(replaced, 1e-5, rounds) == pytest.approx(sigma, abs=0.005)
    assert client.vote_plan(10, rounds).noise_multiplier == plan.noise_multiplier  # the number of units changes nothing


def test_a_vote_and_a_training_of_equal_noise_share_neither_rounds_nor_figures(tmp_path: Path) -> None:
    budget = Budget(2.0)
    votes = Client("assets:tiny-slm", budget=budget).vote_plan(200, 2)
    training = replace(votes, mechanism="gradients")  # rate 1, one step, C = 1, as a server could ask for
    assert DPPlan.from_dict(json.loads(json.dumps(votes.to_dict()))) == votes
    assert "mechanism" not in training.to_dict()  # ledgers of earlier versions name none
    assert epsilon(votes, 1e-5) == epsilon(training, 1e-5) <= 2.0
    assert (round(replaced_epsilon(votes), 2), round(replaced_epsilon(training), 2)) == (2.95, 4.39)
    ledger = Ledger(tmp_path / "ledger.sqlite", Account("ward", None))

    def charge(plan: DPPlan, request: str) -> None:
        ledger.charge(plan, Binding(request, plan.digest(), "data", "model", "1"), "run/arm/0", budget=budget)

    charge(votes, "a vote")
    assert ledger.rounds("run/arm/0", votes) == 2
    assert ledger.rounds("run/arm/0", training) == 0
    with pytest.raises(BudgetExhausted):  # one round of the votes is left, and no training draws from it
        charge(training, "a training")
    charge(votes, "another vote")


def test_every_count_has_noise_of_the_planned_deviation_also_those_without_a_vote() -> None:
    plan = Client("assets:tiny-slm", budget=Budget(2.0)).vote_plan(200)
    values = np.array(protected([{3: 1.0}, {}], 20_000, plan, GrantRandomness(bytes(32))))
    assert (values != 0).all()
    assert values.std() == pytest.approx(plan.noise_multiplier, rel=0.02)
    assert abs(values.mean()) < 0.05


def only_the_first(votes: Any, candidates: int, bound: float = 1.0) -> Any:
    return summed(votes[:1], candidates, bound) + summed(votes[1:], candidates, math.inf)


def test_the_check_before_the_charge_finds_a_bound_of_the_first_unit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_client, "summed", only_the_first)
    with pytest.raises(SelfCheckFailed, match="apart"):
        check_noise(Client("assets:tiny-slm", budget=Budget(2.0)).vote_plan(200))


BROKEN = {
    "only counts with votes": lambda total, noise: np.where(total != 0, total + noise, 0.0),
    "half of the noise": lambda total, noise: total + noise / 2,
    "a unit moves it twice as far": lambda total, noise: 2 * total + noise,
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_check_before_the_charge_finds_a_broken_mechanism(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Client("assets:tiny-slm", budget=Budget(2.0)).vote_plan(200)
    check_noise(plan)

    def broken(votes: Any, candidates: int, plan: Any, randomness: Any) -> list[float]:
        total, noise = summed(votes, candidates), plan.noise_multiplier * randomness.normals(candidates)
        found: list[float] = BROKEN[fault](total, noise).tolist()
        return found

    monkeypatch.setattr(on_client, "protected", broken)
    with pytest.raises(SelfCheckFailed):
        check_noise(plan)


def test_a_server_believes_the_figure_of_a_replaced_unit_of_votes_alone() -> None:
    plan = Client("assets:tiny-slm", budget=Budget(2.0)).vote_plan(200)
    said = statement(plan, rows=())
    claims.check(said, mechanisms=("votes",))
    with pytest.raises(ValueError, match="epsilon_replace_one"):
        claims.check(replace(said, mechanism="gradients"))
    with pytest.raises(ValueError, match="epsilon_replace_one"):
        claims.check(replace(said, epsilon_replace_one=said.epsilon), mechanisms=("votes",))
    with pytest.raises(ValueError, match="sampling_rate"):
        claims.check(replace(said, sampling_rate=0.5), mechanisms=("votes",))


# --- what crosses ---


def test_requests_and_replies_out_of_range_are_refused() -> None:
    check_request(Vote(CANDIDATES, 64), LABELS)
    said = statement(Client("assets:tiny-slm", budget=Budget(2.0)).vote_plan(200), rows=())
    good = Voted(Votes((0.5, -3.0, 1, 2, 3, 4), ("g",)), said)
    check_reply(Vote(CANDIDATES), good, LABELS)
    for request, why in (
        (Vote(CANDIDATES, 0), "nearest"),
        (Vote(CANDIDATES, 65), "nearest"),
        (Vote(CANDIDATES.take([])), "no text to vote for"),
        (Vote(replace(CANDIDATES, answers=("lungs",) * 6)), "labels outside"),
        (Vote(replace(CANDIDATES, provenance=Provenance.PRIVATE)), "marked private"),
    ):
        with pytest.raises(Rejected, match=why):
            check_request(request, LABELS)
    for reply, why in (
        (replace(good, votes=replace(good.votes, values=(1.0,))), "number of votes"),
        (replace(good, votes=replace(good.votes, values=(math.nan,) * 6)), "not finite"),
        (replace(good, votes=replace(good.votes, values=(1e13,) * 6)), "votes beyond"),
        (replace(good, votes=replace(good.votes, grants=())), "with grants"),
    ):
        with pytest.raises(Rejected, match=why):
            check_reply(Vote(CANDIDATES), reply, LABELS)


def test_a_site_lets_out_votes_by_name_alone() -> None:
    said = statement(Client("assets:tiny-slm", budget=Budget(2.0)).vote_plan(200), rows=())
    reply, policy = Voted(Votes((0.5,), ("g",)), said), Policy(Budget(8.0))
    with pytest.raises(WillNotLeave, match="lets out no votes"):
        seal(reply, allowed=policy.outputs, waived=False)
    assert decode(seal(reply, allowed=(*policy.outputs, "votes"), waived=False), Voted) == reply
    with pytest.raises(WillNotLeave, match="names no grant"):
        seal(Voted(Votes((0.5,)), said), allowed=("votes",), waived=False)


# --- what votes choose ---


def test_votes_are_summed_and_the_highest_of_each_label_are_kept() -> None:
    votes = added([Votes((1, 5, 2, 0, 3, 1), ("a",)), Votes((1, -4, 1, 0, 1, 2), ("b",))])
    assert votes == Votes((2, 1, 3, 0, 4, 3), ("a", "b"))
    best = kept(CANDIDATES, votes, 2, select="rank", threshold=0, seed=0)
    assert best.prompts == ("aaaa", "aabb", "cccc", "ccdd")
    assert (best.provenance, best.grants) == (Provenance.LLM_WRITTEN, ("a", "b"))
    assert added([Votes((1,), ("a",)), Votes((1,))]).grants == ()  # one client without a guarantee


def test_draws_follow_the_votes_above_the_threshold() -> None:
    votes = Votes((6.0, 2.0, 3.0, 0.0, 9.0, 1.0), ("a",))
    drawn = Counter(
        kept(CANDIDATES, votes, 1, select="proportion", threshold=2.0, seed=seed).prompts for seed in range(600)
    )
    # Above 2: 4, 0, 1, 0 of one label, 7 and 0 of the other.
    assert set(drawn) == {("aaaa", "cccc"), ("aabb", "cccc")}
    assert drawn["aaaa", "cccc"] / 600 == pytest.approx(0.8, abs=0.05)
    assert len(kept(CANDIDATES, votes, 3, select="proportion", threshold=8.5, seed=0)) == 5  # the rest by rank


def test_a_hostile_count_ends_no_draw() -> None:
    votes = Votes((1e12, 1e-320, 0.0, 0.0, 1e12, 1e-320), ("a",))
    assert len(kept(CANDIDATES, votes, 2, select="proportion", threshold=0, seed=0)) == 4


def test_permuted_votes_choose_like_chance() -> None:
    votes, chances = Votes((9.0, 0, 0, 0, 5.0, 0), ("a",)), Counter[str]()
    for seed in range(400):
        mixed = permuted(votes, CANDIDATES, seed)
        assert (sorted(mixed.values[:4]), sorted(mixed.values[4:])) == ([0, 0, 0, 9], [0, 5])
        chances.update(kept(CANDIDATES, mixed, 1, select="rank", threshold=0, seed=0).prompts[:1])
    assert chances["aaaa"] / 400 == pytest.approx(0.25, abs=0.07)
    assert by_chance(CANDIDATES, 2, 0).counts() == {"heart": 2, "skin": 2}
    assert len({by_chance(CANDIDATES, 1, seed).prompts for seed in range(20)}) > 3


# --- a whole run ---

SCENARIO = """
name = "tiny"
rounds = {rounds}
[strategy]
use = "fedsynth.strategies.private_evolution:PrivateEvolution"
num_texts = 60
keep = 4
min_words = 1
max_new_tokens = 14
{options}
[data]
source = "{file}"
labels = ["heart", "skin"]
clients = 3
[client]
generator = "{slm}"
task_model = "{slm}"
budget = {{ epsilon = 8.0 }}
task_training = {{ augmented_epochs = 1, private_epochs = 1 }}
[server]
llm = "{slm}"
[arms.main]
[arms.permuted]
strategy.votes = "permuted"
[arms.chance]
strategy.votes = "none"
[arms.all]
strategy.votes = "all"
[arms.no_dp]
client.guarantee = "none"
"""
OWN = {"heart": "abcd", "skin": "efgh"}  # the letters of a label's private texts


class Guessing:
    """An LLM that knows nothing of the labels: it writes texts of either kind of letters for each."""

    chats = structured = False

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def complete(self, prompts: Sequence[str], sampling: SamplingParams, *, seed: int) -> list[str]:
        self.prompts += prompts
        rng = np.random.default_rng(seed)
        return [" ".join(rng.choice(list(OWN[LABELS[k]]), 8)) for k in rng.integers(2, size=len(prompts))]

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        raise NotImplementedError


def right(corpus: Corpus) -> float:
    """Share of texts in the letters of their label."""
    return float(
        np.mean([set(x.replace(" ", "")) <= set(OWN[y]) for x, y in zip(corpus.prompts, corpus.answers, strict=True)])
    )


def toml(place: Path, *, decoy: bool = False, rounds: int = 1, options: str = "") -> str:
    rng = np.random.default_rng(1)
    letters_of = dict(zip(LABELS, reversed(OWN.values()), strict=True)) if decoy else OWN
    labels = [LABELS[i % 2] for i in range(120)]
    texts = [f"{' '.join(rng.choice(list(letters_of[y]), 8))} {canary(i)}" for i, y in enumerate(labels)]
    pd.DataFrame({"text": texts, "label": labels}).to_csv(place / "notes.csv", index=False)
    return SCENARIO.format(file=place / "notes.csv", slm=tiny.folder(), rounds=rounds, options=options)


def run(place: Path, arm: str = "main", **more: Any) -> tuple[Played, Guessing]:
    place.mkdir()
    llm = Guessing()
    return play(toml(place, **more), place, arm, llm=llm, measures=False), llm


def test_votes_bring_the_texts_that_are_like_private_ones(tmp_path: Path) -> None:
    played, _ = run(tmp_path / "main")
    candidates = played.requests(Vote)[0].corpus
    assert 0.3 < right(candidates) < 0.7
    learnt = played.requests(Learn)[0].corpus
    assert right(learnt) == 1.0
    assert learnt.counts() == {"heart": 4, "skin": 4}
    assert learnt.provenance is Provenance.LLM_WRITTEN
    assert len(learnt.grants) == 3
    decoy, _ = run(tmp_path / "decoy", decoy=True)  # other private text pulls the choice to itself
    assert right(decoy.requests(Learn)[0].corpus) == 0.0
    permuted_, _ = run(tmp_path / "permuted", "permuted")
    assert 0.1 < right(permuted_.requests(Learn)[0].corpus) < 0.9


def test_counts_alone_leave_a_client_and_no_private_word(tmp_path: Path) -> None:
    played, _ = run(tmp_path / "main")
    for reply in played.replies(Vote):
        assert set(vars(reply)) == {"votes", "statement"}
        assert len(reply.votes.values) == len(played.requests(Vote)[0].corpus)
        assert reply.statement.epsilon <= 8.0
        assert reply.statement.steps == 1
        assert not any(float(v).is_integer() for v in reply.votes.values)
    assert len({reply.votes.values for reply in played.replies(Vote)}) == 3
    crossed = repr([message.content for message in (*played.grid.requests, *played.grid.replies)])
    assert not any(canary(i) in crossed for i in range(120))
    assert played.requests(Vote)[0].corpus.prompts[0] in crossed  # it would show
    assert "sees votes: (7.9" in privacy_line([played.run_log])


def test_controls_ask_nobody(tmp_path: Path) -> None:
    for arm, texts in (("chance", 8), ("all", None)):
        played, _ = run(tmp_path / arm, arm)
        assert played.requests(Vote) == []
        learnt = played.requests(Learn)[0].corpus
        assert len(learnt) == texts if texts else len(learnt) > 30
        assert learnt.provenance is Provenance.PUBLIC


def test_without_a_guarantee_the_counts_are_exact_and_said_to_be_so(tmp_path: Path) -> None:
    played, _ = run(tmp_path / "no_dp", "no_dp")
    assert [sum(reply.votes.values) for reply in played.replies(Vote)] == [32.0] * 3  # a fifth of 40 rows are for tests
    assert privacy_line([played.run_log]).startswith("no differential privacy guarantee: votes left clients")


def test_rounds_vary_what_was_kept_and_pay_for_each_vote(tmp_path: Path) -> None:
    played, llm = run(tmp_path / "main", rounds=3, options="variations = 2\nshots = 2")
    first, second, third = (played.requests(Vote)[3 * k].corpus for k in range(3))
    assert set(second.prompts[:8]) <= {*first.prompts}
    assert len(second) == len(third) == 8 + 16
    assert sum(any(text in prompt for prompt in llm.prompts) for text in second.prompts[:8]) == 8  # shown to the LLM
    statements = [reply.statement for reply in played.replies(Vote)]
    assert {said.steps for said in statements} == {3}
    assert {said.sigma for said in statements} == {Client("a", budget=Budget(8.0)).vote_plan(40, 3).noise_multiplier}
    one, two = played.replies(Vote)[0], played.replies(Vote)[3]
    assert one.votes.grants != two.votes.grants
    assert [len(request.corpus) for request in played.requests(Learn)[::3]] == [8, 8, 8]


def test_a_request_is_answered_once_and_a_round_beyond_the_plan_is_refused(tmp_path: Path) -> None:
    from inprocess import cell_of, simulation, to_toml
    from local import LocalGrid

    from fedsynth.clients.app import client_app

    whole = to_toml(from_toml(toml(tmp_path)))
    cell, out = cell_of(whole, "main", 0), tmp_path / "out"
    out.mkdir()
    grid = LocalGrid(client_app(simulation), 3, {"scenario-toml": whole, "out-dir": str(out)})
    run_log = RunLog(cell, out, out / "events.jsonl")
    clients = Clients(grid, nodes_by_client(grid, 3), cell, "simulated", LABELS, run_log)

    def ask(exchange: int, corpus: Corpus = CANDIDATES) -> Any:
        clients.exchange = exchange
        return clients.ask_each({0: Vote(corpus)})[0]

    first = ask(0)
    ledger = Played(cell, grid, run_log, out).client(0).ledger
    spent = ledger.spent()
    assert ask(0) == first
    assert ledger.spent() == spent
    assert 7.9 < spent[0] <= 8
    for exchange, corpus in ((1, CANDIDATES), (0, CANDIDATES.take([0, 1]))):  # another round; another list
        with pytest.raises(TooFewReplies, match="budget_exhausted"):
            ask(exchange, corpus)
    assert ledger.spent() == spent


def test_what_cannot_run_is_refused_before_any_work(tmp_path: Path) -> None:
    from fedsynth.scenario.toml import cells
    from fedsynth.simulation.simulate import check

    for options, why in (
        ("voters = [7]", "voters names clients from 0 to 2"),
        ("threshold = 1.0", "threshold belongs to"),
        ("nearest = 65", "nearest"),
    ):
        with pytest.raises(BadValue, match=why):
            check(from_toml(toml(tmp_path, options=options)))
    assert cells(from_toml(toml(tmp_path)))
    check(from_toml(toml(tmp_path).replace("epsilon = 8.0", "epsilon = 1.0")))  # 60 steps of a training would not fit
    with pytest.raises(BadValue, match="the noise of the votes does not fit the budget"):
        check(from_toml(toml(tmp_path).replace("epsilon = 8.0", "epsilon = 0.1")))
