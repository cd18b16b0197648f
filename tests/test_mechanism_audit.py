"""An audit accuses no mechanism as it is, finds each broken one by the test that is named, and refuses private data."""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

import fedsynth.cli.main
from fedsynth.audit import layers, mechanisms
from fedsynth.audit.auditing import Audit, audit, audit_mechanism
from fedsynth.audit.auditing import mechanisms as mechanisms_of
from fedsynth.audit.layers import Finding, chance_of_guesses, delta_at, epsilon_at, least_epsilon, violations
from fedsynth.audit.runs import audit_charges, charged_records
from fedsynth.corpus import Corpus, Provenance, Votes
from fedsynth.federation.messages import Voted
from fedsynth.federation.payload import corpus_to_parquet, encode
from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Binding, Ledger
from fedsynth.privacy.noise import GrantRandomness, site_key
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.rdp import bound
from fedsynth.privacy.statement import statement
from fedsynth.reporting.audit_section import audit_section
from fedsynth.reporting.page import Page, Section, Table, render
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import from_toml, load
from fedsynth.training.canaries import trained
from fedsynth.typed import BadValue
from tests.benchmarks import benchmark

ENGINES = benchmark("audit")  # gives the table of docs/privacy.md: mechanisms, and ways to break them


# What an adversary's guesses alone show as well: the one-run bound misses the accountant, the profile does not.
OUTCOMES = {
    "accountant begins anew, 10 rounds": {"profile"},
    "no noise": {"profile", "bound"},
    "no clipping": {"profile"},
}


def words(findings: Any) -> list[str]:
    return [f"{finding.layer}, {finding.test}: {finding.found}" for finding in violations(findings)]


# --- Mechanisms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES.CORRECT)
def test_a_mechanism_as_it_is_is_not_accused(name: str) -> None:
    made = ENGINES.run(name, seed=100)
    assert words(made.findings) == []
    assert made.canaries == 6000
    # Of its tests those may err that the chance is divided by; without draws there are two less.
    may_err = [finding for finding in made.findings if finding.test not in ("steps", "keys")]
    assert len(may_err) == layers.TESTS - (0 if "gradients" in name else 2)
    assert 0 < made.bound.lower < made.epsilon < made.bound.ceiling


@pytest.mark.parametrize("name", ENGINES.BROKEN)
def test_a_broken_engine_is_found_by_the_test_that_is_named(name: str) -> None:
    made = ENGINES.run(name, seed=101, canaries=3000)  # half as many as in the table, in half the time
    test = ENGINES.BROKEN[name].test or "noise"  # noise x 0.8 shows in its deviation
    wrong = violations(made.findings)
    assert ("structural", test) in {(finding.layer, finding.test) for finding in wrong}
    assert OUTCOMES.get(name, set()) <= {finding.layer for finding in wrong}


@pytest.mark.full
@pytest.mark.parametrize("name", [*ENGINES.CORRECT, *ENGINES.BROKEN])
def test_twenty_of_twenty(name: str) -> None:
    found = ENGINES.row(name, 20)
    if name in ENGINES.CORRECT:
        assert found["found"] == 0
    elif ENGINES.BROKEN[name].test:
        assert found["tests"][ENGINES.BROKEN[name].test] == 20


def test_a_canary_moves_its_number_by_c_and_no_other() -> None:
    plan = DPPlan(40, 10, 200, 1, 0.3, 0.05, 1e-5)
    present = np.arange(40) < 20
    seen = trained(present, plan, ENGINES.CLIENT.generator_training, GrantRandomness(bytes(32)))
    assert seen.ran == len(seen.values) == 200
    assert not seen.hit[:, 20:].any()
    assert seen.values[seen.hit] == pytest.approx(0.999, abs=0.3)  # six deviations of the noise
    assert seen.values[~seen.hit] == pytest.approx(0.0, abs=0.3)
    assert seen.hit[:, :20].mean() == pytest.approx(0.25, abs=0.05)
    assert seen.sizes.mean() == pytest.approx(10, abs=1)  # empty slots are drawn as well


def test_canaries_that_never_reach_c_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that learns nothing is private, and its audit would pass for the wrong reason."""
    monkeypatch.setattr("fedsynth.dpsgd.bookkeeping.clip_factors", lambda squares, clip_norm: 0 * squares)
    made = audit_mechanism(ENGINES.gradients(), 7)
    assert {finding.test for finding in violations(made.findings)} == {"clipping"}


def test_the_same_seed_gives_the_same_audit_and_another_does_not() -> None:
    one, again, other = (audit_mechanism(ENGINES.gradients(), seed, canaries=500).findings for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_no_data_is_opened(tmp_path: Path) -> None:
    client = mechanisms._client(ENGINES.gradients(), 0, tmp_path, 0)
    with pytest.raises(RuntimeError, match="opens no data"):
        _ = client.train


# --- Limits -----------------------------------------------------------------------------------------------------------


def test_guesses_are_binomial_without_delta_and_delta_adds_its_term() -> None:
    assert chance_of_guesses(10, 10, 10, math.log(3), 0.0) == pytest.approx(0.75**10)
    assert chance_of_guesses(10, 2, 1, 0.0, 0.0) == pytest.approx(0.75)
    # One right guess of one at epsilon 0: 1/2, and 2 m delta P(W = 0) / 1.
    assert chance_of_guesses(3, 1, 1, 0.0, 0.1) == pytest.approx(0.5 + 2 * 3 * 0.1 * 0.5)
    # Two of two at epsilon 0: P(W = 1) / 1 = 1/2 is above P(W < 2) / 2 = 3/8.
    assert chance_of_guesses(2, 2, 2, 0.0, 0.01) == pytest.approx(0.25 + 2 * 2 * 0.01 * 0.5)


def test_the_ceiling_is_that_of_all_guesses_right() -> None:
    rate = 0.05 ** (1 / 100)
    assert least_epsilon(100, 100, 100, 0.0, 0.05) == pytest.approx(math.log(rate / (1 - rate)), abs=1e-6)
    assert least_epsilon(100, 100, 50, 0.0, 0.05) == 0.0


def test_the_profile_is_that_of_the_gaussian_mechanism() -> None:
    stated = statement(DPPlan(10, 10, 4, 1, 1.0, 4.0, 1e-5, "votes"), rows=())
    mu = math.sqrt(4) / 4.0
    for epsilon in (0.0, 0.5, 1.0):
        exact = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        assert delta_at(stated, epsilon) == pytest.approx(exact, rel=0.01)
    assert epsilon_at(stated, 1e-5) == pytest.approx(stated.epsilon, abs=0.01)


def test_a_profile_by_renyi_is_the_inverse_of_its_bound() -> None:
    stated = statement(DPPlan(10, 10, 3, 1, 1.0, 4.0, 1e-5, "summed_votes"), rows=())
    for delta in (1e-3, 1e-5, 1e-10):
        assert delta_at(stated, bound([(1.0, 4.0, 3)], delta)) == pytest.approx(delta)
        assert epsilon_at(stated, delta) == pytest.approx(bound([(1.0, 4.0, 3)], delta))
    mu = math.sqrt(3) / 4
    assert 2 * norm.cdf(mu / 2) - 1 < delta_at(stated, 0.0) < 1.0


def test_limits_of_rates_hold_as_often_as_they_say() -> None:
    """TPR 0.5 and FPR 0.2 at one threshold: of 2,000 samples some 1 % may lie above the truth, and most lie near it."""
    rng, chance = np.random.default_rng(0), 0.01
    limits = []
    for _ in range(2000):
        true = rng.random(300) < 0.5
        score = np.where(rng.random(300) < np.where(true, 0.5, 0.2), 1.0, 0.0)
        limits.append(layers._limits(score, true, np.array([0.5]), 0.0, chance)[0])
    above = np.mean(np.array(limits) > 0.5 - 0.2)
    assert above <= chance
    assert np.mean(limits) > 0.05


def test_all_limits_together_err_as_seldom_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 10,000 cannot be counted; one of five can. Without shares for the tests most audits would accuse."""

    def accused() -> int:
        return sum(bool(violations(layers.examined(each, 1)[0])) for each in seen)

    monkeypatch.setattr(layers, "ERR", 0.2)
    seen = []
    for seed in range(16):
        with tempfile.TemporaryDirectory() as place:
            seen.append(mechanisms.evidence(ENGINES.gradients(), seed, Path(place), 500))
    assert accused() <= 8  # 3 are expected; more than 8 have a chance of 2 in 10,000
    monkeypatch.setattr(layers, "TESTS", 1)
    assert accused() > 8


# --- Scenarios --------------------------------------------------------------------------------------------------------

SMALL = """
name = "small"
seeds = [0]
rounds = 2
run = ["local", "adapters", "votes", "scores", "bare"]
[strategy]
use = "fedsynth.strategies.lora_avg:LoraAverage"
[data]
source = "world:hospitals"
clients = 3
train_per_client = 200
test_per_client = 20
[client]
generator = "assets:tiny-slm"
task_model = "assets:tiny-slm"
budget = { epsilon = 8.0 }
[client.generator_training]
expected_batch_size = 25
steps = 4
[server]
llm = "assets:tiny-llm"
[arms.local]
strategy.use = "fedsynth.strategies.local:LocalOnly"
[arms.adapters]
data.task = "instructions"
[arms.votes]
strategy.use = "fedsynth.strategies.private_evolution:PrivateEvolution"
[arms.summed]
strategy.use = "fedsynth.strategies.private_evolution:PrivateEvolution"
client.secure_sum = { clients = 3 }
[arms.scores]
strategy.use = "fedsynth.strategies.cross_lm:CrossLM"
[arms.judged]
strategy = { use = "fedsynth.strategies.fdkt:FDKT", judge = "votes", votes_from = [0, 1, 2], one_to_many = true }
client.voting.share = 0.5
[arms.lists]
strategy.use = "fedsynth.strategies.cross_lm:CrossLM"
client.scores = "noise"
[arms.bare]
data.task = "instructions"
client.guarantee = "none"
"""


def small(*arms: str) -> Scenario:
    return replace(from_toml(SMALL), run=arms)


def test_the_mechanism_of_every_method_is_found() -> None:
    arms = ("local", "adapters", "judged", "votes", "summed", "scores", "lists", "bare")
    found, left_out = mechanisms_of(small(*arms), lambda cell: 200)
    assert {(each.arms, each.mechanism, each.rounds, each.training is not None) for each in found} == {
        (("adapters",), "gradients", 2, True),
        (("judged",), "gradients", 2, True),
        (("judged",), "votes", 2, False),
        (("votes",), "votes", 2, False),
        (("summed",), "summed_votes", 2, False),
        (("scores",), "gradients", 1, True),  # a scorer is trained once
        (("lists",), "scores", 2, False),
    }
    assert left_out == {"local": "nothing private leaves a client", "bare": "it gives no guarantee"}


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    def run(*typed_words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedsynth", "audit", *typed_words])
        with pytest.raises(SystemExit) as ended:
            fedsynth.cli.main.main()
        return (ended.value.code, *capfd.readouterr())

    return run


def test_the_command_prints_writes_and_ends_with_what_it_found(
    tmp_path: Path, typed: Callable[..., tuple[object, str, str]]
) -> None:
    scenario, out = tmp_path / "small.toml", tmp_path / "audit.json"
    scenario.write_text(SMALL.replace('"adapters", "votes", "scores", ', '"adapters", '))
    asked = (str(scenario), "--seed", "3", "--canaries", "500", "--json", str(out))
    code, said, _ = typed(*asked)
    assert code == 0
    assert "gradients of adapters: epsilon 7.9" in said
    assert "together 1 of 10,000 audits" in said
    assert "not audited: bare: it gives no guarantee" in said
    written = json.loads(out.read_text())
    assert written["violated"] is False
    assert [each["arms"] for each in written["mechanisms"]] == [["adapters"]]
    with ENGINES._noise(0.8):
        code, _, complaint = typed(*asked)
    assert code == 1
    assert re.search(r"audit violated: gradients, layer structural, test noise: 0\.(79|80)\d* sigma C", complaint)
    assert json.loads(out.read_text())["violated"] is True


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("site.toml", "a site's folder, with private data"),
        ("server.toml", "a coordinator's folder"),
        ("deployment.json", "a run on real sites"),
        ("comparison.json", "name one of its runs"),
        ("other", "no scenario.toml"),
    ],
)
def test_all_but_simulations_is_refused_by_name(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).write_text("")
    with pytest.raises(BadValue, match=said):
        audit(str(tmp_path), seed=0)
    if file == "other":
        (tmp_path / "scenario.toml").write_text(SMALL)
        with pytest.raises(BadValue, match="the run did not end"):
            audit(str(tmp_path), seed=0)
        (tmp_path / "privacy.json").write_text("{}")
        with pytest.raises(BadValue, match=r"\.private is gone"):
            audit(str(tmp_path), seed=0)
    with pytest.raises(BadValue, match="is a file"):
        audit(str((tmp_path / file).rename(tmp_path / "x")), seed=0)
    with pytest.raises(BadValue, match="no scenario 'nowhere'"):
        audit("nowhere", seed=0)


def test_a_scenario_without_a_mechanism_is_refused_with_the_reasons(tmp_path: Path) -> None:
    scenario = tmp_path / "small.toml"
    scenario.write_text(SMALL.replace('run = ["local", "adapters", "votes", "scores", "bare"]', 'run = ["bare"]'))
    with pytest.raises(BadValue, match=r"no arm has a mechanism to audit \(bare: it gives no guarantee"):
        audit(str(scenario), seed=0)


# --- Runs -------------------------------------------------------------------------------------------------------------

PLAN = DPPlan(200, 25, 4, 2, 0.3, 2.0, 1e-5)
ARM = "adapters"


@dataclass
class Left:
    """What a run of two clients left."""

    out: Path
    grants: list[str] = field(default_factory=list)
    silent: list[tuple[int, int]] = field(default_factory=list)  # seed, client

    def spend(
        self,
        client: int,
        rounds: int = 2,
        *,
        said: int | None = 2,
        keys: Callable[[int, str], bytes] = lambda *_: site_key(),
        beside: tuple[DPPlan, ...] = (),
    ) -> Ledger:
        """A client that trains so many rounds, and states so many; None: it does not answer."""
        work = self.out.with_name("run.private") / ARM / "seed-0" / f"client-{client}"
        work.mkdir(parents=True)
        ledger = Ledger(work / "ledger.sqlite", Account(f"world#{client}", None), keys=keys)
        for round in range(rounds):
            binding = Binding(f"order {round}", PLAN.digest(), "mac", "model", "1")
            grant = ledger.charge(PLAN, binding, "run/a/0", beside=beside)
            ledger.begin(grant)
            if said is not None:
                stated = statement(replace(PLAN, rounds=said), unit="person", simulated=True)
                ledger.store(grant, encode(Voted(Votes((), grants=(grant.id,)), stated)))
            self.grants.append(grant.id)
        return ledger

    def found(self, epsilon: float = 99.0) -> dict[str, Finding]:
        shown = {"guarantee": "dp", "terms": {"silent": self.silent}, "largest_over_clients": {"epsilon": epsilon}}
        (self.out / "privacy.json").write_text(json.dumps({ARM: shown}))
        return {finding.test: finding for finding in audit_charges(self.out, small(ARM))[ARM]}

    def release(self, grants: tuple[str, ...]) -> None:
        place = self.out / "corpora" / ARM / "seed-0"
        place.mkdir(parents=True)
        corpus = Corpus(("a text",), ("label",), Provenance.DP_SYNTHETIC, grants=grants)
        (place / "drafts-round1-client0.parquet").write_bytes(corpus_to_parquet(corpus))


@pytest.fixture
def left(tmp_path: Path) -> Left:
    (tmp_path / "run").mkdir()
    return Left(tmp_path / "run")


def test_the_charges_of_a_run_are_those_of_its_statements(left: Left) -> None:
    left.spend(0)
    left.spend(1)
    left.release((left.grants[0],))
    assert [finding.found for finding in left.found().values() if finding.violated] == []
    assert charged_records(left.out, ARM) == 200
    assert charged_records(left.out, "elsewhere") is None


def test_a_statement_of_fewer_rounds_than_charged_is_found(left: Left) -> None:
    left.spend(0, said=1)
    found = left.found()
    assert found["steps"].violated
    assert "states 4 steps of gradients with noise 2, charged 8, 8 of them in grants" in found["steps"].found
    assert found["epsilon"].violated


def test_a_round_beyond_the_plan_must_be_stated(left: Left) -> None:
    left.spend(0, rounds=3)
    left.spend(1, rounds=3, said=3)
    found = left.found()["steps"]
    assert found.violated
    assert found.found == (
        "adapters, seed 0, client 0 states 8 steps of gradients with noise 2, charged 12, 12 of them in grants"
    )


def test_each_of_two_plans_must_be_stated(left: Left) -> None:
    """A client that drafts and votes: both plans are reserved at first, and what never ran need not be stated."""
    beside = DPPlan(200, 200, 1, 2, 1.0, 5.0, 1e-5, "votes")
    ledger = left.spend(0, beside=(beside,))
    assert not left.found()["steps"].violated
    binding = Binding("a vote", beside.digest(), "mac", "model", "1")
    grant = ledger.charge(beside, binding, "run/a/0")
    ledger.begin(grant)
    found = left.found()
    assert found["steps"].found.endswith(
        "client 0 states nothing of votes with noise 5, charged 2, 1 of them in grants"
    )
    assert found["epsilon"].violated
    ledger.store(grant, encode(Voted(Votes((), grants=(grant.id,)), statement(beside, unit="person", simulated=True))))
    assert [finding.found for finding in left.found().values() if finding.violated] == []


def test_one_key_of_two_clients_is_found(left: Left) -> None:
    for client in (0, 1):
        left.spend(client, keys=lambda counter, binding: bytes([counter]) * 32)
    assert left.found()["keys"].violated


def test_a_client_that_charges_and_states_nothing_is_found_unless_it_fell_silent(left: Left) -> None:
    left.spend(0, rounds=1, said=None)
    assert "has charged and states nothing" in left.found()["steps"].found
    left.silent = [(0, 0)]
    assert not left.found()["steps"].violated


def test_a_release_without_a_guarantee_must_be_stated(left: Left) -> None:
    left.spend(0).charge_without_guarantee("asked for", "run/a/0")
    assert "released something without a guarantee" in left.found()["steps"].found


@pytest.mark.parametrize("grants", [(), ("f" * 32,)])
def test_a_text_of_no_paid_grant_is_found(left: Left, grants: tuple[str, ...]) -> None:
    left.spend(0)
    left.release(grants)
    assert left.found()["released"].violated


def test_a_report_that_says_less_than_a_client_is_found(left: Left) -> None:
    left.spend(0)
    assert left.found(epsilon=0.5)["report"].violated


def test_an_epsilon_that_no_ledger_stands_behind_is_found(left: Left) -> None:
    assert "no ledger has a grant" in left.found(epsilon=8.0)["report"].found


def test_a_report_shows_the_audit_and_what_it_found() -> None:
    good, bad = Finding("structural", "noise", "1.0 <sigma> C", violated=False), ENGINES.run("no noise", 101)
    made = Audit("name", 1, (bad,), {"arm": (good, replace(good, test="keys", violated=True))}, {})
    blocks = audit_section(json.loads(json.dumps(made.to_dict())))
    assert isinstance(blocks[0], Table)
    assert isinstance(blocks[1], Table)
    assert list(blocks[0].rows[0][:3]) == ["gradients", "audit", f"{bad.epsilon:.3f}"]
    assert str(blocks[0].rows[0][5]).startswith("VIOLATED: noise")
    assert blocks[1].rows == [["arm", "holds", "VIOLATED"]]
    page = render(Page("run", "lead", "banner", [Section("Audit", "audit", blocks)], "table"))
    assert "1.0 &lt;sigma&gt; C" in page


def test_arms_with_one_mechanism_are_audited_together() -> None:
    scenario = replace(load("hospitals"), run=("fdkt", "dp_only", "local"))
    [found], _ = mechanisms_of(scenario, lambda cell: 200)
    assert found.arms == ("fdkt", "dp_only")
    assert found.training is not None
    assert found.training.steps == scenario.client.generator_training.steps


def test_a_training_that_draws_all_units_has_no_sizes_to_vary() -> None:
    client = ENGINES.CLIENT
    every = mechanisms.Audited(("audit",), client, client.plan(ENGINES.BATCH, 1), 1, client.generator_training)
    made = audit_mechanism(every, 5, canaries=1000)
    assert words(made.findings) == []
    assert "rate" in {finding.test for finding in made.findings}
    assert "batches" not in {finding.test for finding in made.findings}
