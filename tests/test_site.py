"""Real sites in process: their policies, what they let out, what they write down; and that they equal a simulation."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from flwr.app import ArrayRecord, Context, Error, Message
from flwr.common.constant import ErrorCode as FlowerError
from inprocess import canary, play
from local import LocalGrid

import fedsynth.federation.delivery.site_retry
from fedsynth.clients.app import client_app
from fedsynth.clients.approval import Approvals
from fedsynth.clients.audit_log import AuditLog, AuditLogCorrupted, entries
from fedsynth.clients.client_side import ClientSide, cell_of
from fedsynth.clients.handler import reply_to
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import label_list
from fedsynth.data.sources import SiteData
from fedsynth.deployment.certificates import write_node_keys
from fedsynth.deployment.client import client_side
from fedsynth.deployment.invitation import Invitation, Planned
from fedsynth.deployment.policy import Place, Policy, SiteConfig, SumPolicy, SuperLink, load_site
from fedsynth.deployment.site.approve import decide, held_text
from fedsynth.deployment.site.check import check
from fedsynth.deployment.site.declare_loss import declare, lost
from fedsynth.deployment.site.init import template
from fedsynth.deployment.site.model import answer_file, measured, models
from fedsynth.deployment.site.rows import import_rows
from fedsynth.deployment.site.start import _open_account
from fedsynth.federation.messages import (
    OUTPUTS,
    REQUESTS,
    Envelope,
    ErrorCode,
    Evaluate,
    Learn,
    Refused,
    Synthesize,
    outputs,
)
from fedsynth.federation.nodes import Deployment, TooFewReplies
from fedsynth.federation.payload import decode
from fedsynth.federation.records import KINDS, pack_request, unpack_reply
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.privacy_report import guarantee_of, privacy_line, privacy_report
from fedsynth.federation.strategy import Clients, ServerSide, load_strategy
from fedsynth.privacy.audit import contents
from fedsynth.privacy.caps import BudgetExhausted
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.ledger import Binding, Ledger
from fedsynth.privacy.noise import simulated_key
from fedsynth.privacy.plan import Budget
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.scenario.toml import from_toml, to_toml
from fedsynth.testing import ScriptedLLM, embed
from fedsynth.training.examples import encode_slots
from fedsynth.typed import BadValue

NAMES = ("st-marys", "charite", "ukb")
LABELS = ("heart", "skin")
ROWS = 12
MODEL: list[str] = []

SCENARIO = """
name = "tiny"
seeds = [0]
rounds = {rounds}
[strategy]
use = "fedsynth.strategies.fdkt:FDKT"
per_label = 6
min_words = 1
num_texts = 4
shots = 2
draft_tokens = 24
judge = "likelihood"
cluster_size = 4
[data]
source = "{file}"
labels = ["heart", "skin"]
clients = 3
split = "natural"
client_column = "site"
unit = "person"
test = {{ column = "part", equals = "test" }}
[client]
generator = "{model}"
task_model = "{model}"
budget = {{ epsilon = {epsilon} }}
generator_training = {{ expected_batch_size = 5, steps = 3, learning_rate = 1e-2 }}
task_training = {{ augmented_epochs = 1, private_epochs = 1 }}
[server]
llm = "scripted"
quorum = {quorum}
timeout = 20
[arms.main]
"""


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learnt to write short words and to end: drafts of noise, or without end, are dropped."""

    def notes(tokenizer: Any, rng: np.random.Generator) -> list[Any]:
        texts = ["".join(rng.choice(list("abcd "), 6)) for _ in range(16)]
        corpus = Corpus(tuple(texts), tuple(LABELS[i % 2] for i in range(16)), Provenance.PUBLIC)
        return [
            e for slot in encode_slots(tokenizer, corpus, LABELS, 16, GeneratorTraining(max_length=64)) for e in slot
        ]

    MODEL.append(tiny.taught(tmp_path_factory.mktemp("model"), notes, steps=80, rate=1e-2))
    return MODEL[0]


@pytest.fixture
def notes(tmp_path: Path) -> pd.DataFrame:
    """Every site's notes, in the order of sites by name: that is how a natural split numbers them."""
    rows = [
        (
            f"note {canary(index * 100 + i)} about a thing",
            ("heart", "skin")[i % 2],
            name,
            "test" if i % 4 == 3 else "train",
            f"{name} {i}",
        )
        for index, name in enumerate(sorted(NAMES))
        for i in range(ROWS * 4 // 3)
    ]
    return pd.DataFrame(rows, columns=["text", "label", "site", "part", "person"])


@pytest.fixture
def toml(tmp_path: Path, notes: pd.DataFrame) -> str:
    return scenario(tmp_path, notes)


def scenario(tmp_path: Path, notes: pd.DataFrame, *, epsilon: float = 8.0, quorum: float = 1.0, rounds: int = 1) -> str:
    notes.to_csv(tmp_path / "all.csv", index=False)
    return SCENARIO.format(file=tmp_path / "all.csv", model=MODEL[0], epsilon=epsilon, quorum=quorum, rounds=rounds)


POLICY = Policy(lifetime=Budget(10.0), minimum_records=1, approve_text=False)


def places(
    tmp_path: Path, notes: pd.DataFrame, policies: Mapping[str, Policy] | None = None, **data: Any
) -> list[Place]:
    """A folder for each site, with its own notes alone."""
    made = []
    for name in sorted(NAMES):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        notes[notes["site"] == name].to_csv(folder / "notes.csv", index=False)
        facts: dict[str, Any] = {"labels": ("heart", "skin"), "test": {"column": "part", "equals": "test"}}
        own = SiteData(id=f"{name}-1", source="notes.csv", person="person", records=ROWS, **_typed({**facts, **data}))
        policy = (policies or {}).get(name, POLICY)
        policy = replace(policy, models=policy.models or (MODEL[0],))
        made.append(Place(SiteConfig(name, own, policy, SuperLink("127.0.0.1:9443")), folder))
    return made


def _typed(facts: dict[str, Any]) -> dict[str, Any]:
    from fedsynth.scenario.data import TestRows

    return {**facts, "test": TestRows(**facts["test"])}


class SitesGrid(LocalGrid):
    """Named nodes; some of them away for a while."""

    def __init__(self, *args: Any, away: Mapping[str, int] = {}, **more: Any) -> None:
        super().__init__(*args, **more)
        self.away = dict(away)
        self.connected = ""

    def get_nodes(self) -> Any:
        found = []
        for number, (node, _) in enumerate(self.contexts.items()):
            name = sorted(NAMES)[number]
            status = "online"
            if self.away.get(name, 0) > 0:
                self.away[name] -= 1
                status = "offline"
            found.append(SimpleNamespace(node_id=node, name=name, status=status, last_activated_at=self.connected))
        return found


@dataclass
class Deployed:
    """A run between sites, in process."""

    sites: list[Place]
    toml: str
    out: Path
    away: Mapping[str, int] = field(default_factory=dict)
    measured: bool = False
    injected: bool = False
    accounts: bool = True  # made where there are none
    imports: bool = True  # `fedsynth site check`, where there was none
    run_id: str = "simulated"  # the same in the simulation: then requests and keys are the same, too

    def __post_init__(self) -> None:
        self.whole = to_toml(from_toml(self.toml))
        self.cell = cell_of(self.whole, "main", 0)
        self.out.mkdir(parents=True, exist_ok=True)
        self.run_log = RunLog(self.cell, self.out, self.out / "events.jsonl", simulated=False)
        for index, place in enumerate(self.sites):
            if not place.ledger.exists() and self.accounts:
                place.open_ledger(create=True, **self.keys(index))
            if place.ledger.exists() and place.imported is None and self.imports:
                list(import_rows(place))
        app = client_app(self.open, simulated=False)
        self.grid = SitesGrid(app, len(self.sites), {"scenario-toml": self.whole}, away=self.away)

    def open(self, context: Context, envelope: Envelope) -> ClientSide:
        index = int(str(context.node_config["partition-id"]))
        return client_side(self.sites[index], self.cell, envelope, {"superlink": "127.0.0.1:9443"}, **self.keys(index))

    def keys(self, index: int) -> dict[str, Any]:
        """A simulation's, or none: a site's own."""
        if not self.injected:
            return {}
        return {"keys": lambda counter, binding: simulated_key(self.cell.seed, index, counter, binding)}

    def run(self, llm: Any = None) -> Any:
        labels = label_list(self.cell.scenario.data)
        names = [place.site.name for place in self.sites]

        def open_clients(grid: Any) -> Clients:
            return Clients(grid, {}, self.cell, self.run_id, labels, self.run_log, sites=names)

        kind, config = load_strategy(self.cell.scenario.strategy)
        llm = llm or ScriptedLLM()
        server = ServerSide(self.cell, labels, llm, llm, embed, self.run_log, open_clients, self.measured)
        result = kind(config, server).start(self.grid, ArrayRecord(), num_rounds=self.cell.scenario.rounds)
        self.run_log.close()
        return result

    def codes(self) -> list[ErrorCode]:
        """What was refused, in the order of orders."""
        said = [r.content["fedsynth"] for r in self.grid.replies]
        return [decode(part["payload"], Refused).code for part in said if part["refused"]]

    def texts(self) -> list[tuple[Any, ...]]:
        """What sites released, by site and round."""
        files = sorted((self.out / "corpora").rglob("drafts-*.parquet"))
        return [tuple(map(tuple, pd.read_parquet(file)[["prompt", "answer"]].to_numpy())) for file in files]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsynth.federation.delivery.site_retry, "ASK_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(fedsynth.federation.delivery.site_retry, "APPROVAL_SECONDS", 0.05)


def test_with_injected_keys_sites_release_what_the_simulation_does(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    simulated = play(toml, tmp_path / "simulation", llm=ScriptedLLM())
    deployed = Deployed(places(tmp_path, notes), toml, tmp_path / "run", injected=True)
    deployed.run()
    before = sorted((simulated.out / "corpora").rglob("drafts-*.parquet"))
    assert [tuple(map(tuple, pd.read_parquet(f)[["prompt", "answer"]].to_numpy())) for f in before] == deployed.texts()
    assert len(deployed.texts()) == 3
    assert deployed.run_log.epsilon == simulated.run_log.epsilon


def test_without_injected_keys_two_runs_differ_in_noise(tmp_path: Path, toml: str, notes: pd.DataFrame) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runs.append(Deployed(places(tmp_path / name, notes), toml, tmp_path / name / "run"))
        runs[-1].run()
    assert runs[0].texts() != runs[1].texts()


def test_what_is_said_of_a_real_run_calls_nothing_simulated(tmp_path: Path, toml: str, notes: pd.DataFrame) -> None:
    deployed = Deployed(places(tmp_path, notes), toml, tmp_path / "run")
    deployed.run()
    line = privacy_line([deployed.run_log])
    assert guarantee_of([deployed.run_log]) == "dp"
    assert "simulat" not in line
    assert "read from the data" not in line
    assert "largest over sites, in this run alone" in line


def test_a_default_site_is_not_asked_for_figures_and_refuses_them(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    quiet = Deployed(places(tmp_path, notes), toml, tmp_path / "quiet")
    quiet.run()
    assert not quiet.grid.requests_of(Evaluate.task)
    curious = Deployed(places(tmp_path, notes), toml, tmp_path / "curious", measured=True)
    with pytest.raises(TooFewReplies, match=r"site '[\w-]+' refused: not_allowed\); the site's own log"):
        curious.run()
    assert curious.codes() == [ErrorCode.NOT_ALLOWED]


def test_figures_leave_where_the_operator_allows_them(tmp_path: Path, toml: str, notes: pd.DataFrame) -> None:
    open_ = replace(POLICY, requests=(*POLICY.requests, "evaluate.evaluate"), outputs=("text", "metrics"))
    deployed = Deployed(places(tmp_path, notes, dict.fromkeys(NAMES, open_)), toml, tmp_path / "run", measured=True)
    assert set(deployed.run().evaluate_metrics_clientapp[1]) >= {"accuracy"}


def test_a_site_measures_and_uses_the_model_that_a_run_left_after_the_run(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    open_ = replace(POLICY, requests=(*POLICY.requests, "evaluate.evaluate"), outputs=("text", "metrics"))
    sites = places(tmp_path, notes, dict.fromkeys(NAMES, open_))
    deployed = Deployed(sites, toml, tmp_path / "run", measured=True)
    deployed.run()
    told = {(client, metric): value for *_, client, metric, value in deployed.run_log.rows}
    for number, place in enumerate(sites):
        [(folder, kept)], unread = models(place, "simul")
        assert (kept.run, kept.labels, unread) == ("simulated/main/0", LABELS, [])
        here = measured(place, folder, kept)
        assert here.metrics == {
            name: told[number, name] for name in ("accuracy", "macro_f1")
        }  # what the run itself saw
        assert here.test_rows == (notes["site"] == place.site.name).sum() - ROWS
    texts, out = tmp_path / "more.csv", tmp_path / "answers.jsonl"
    pd.DataFrame({"note": ["heart of stone", "skin of teeth"], "other": [1, 2]}).to_csv(texts, index=False)
    assert answer_file(place, folder, kept, texts, "note", out) == 2
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["text"] for each in found] == ["heart of stone", "skin of teeth"]
    assert {each["answer"] for each in found} <= set(LABELS)
    assert out.stat().st_mode & 0o777 == 0o600  # texts may be private


@pytest.fixture
def left(tmp_path: Path, toml: str, notes: pd.DataFrame) -> Place:
    """A site at which a run left a model."""
    place = places(tmp_path, notes)[0]
    deployed = Deployed([place], toml.replace("clients = 3", "clients = 1"), tmp_path / "run")
    deployed.run()
    return place


def test_texts_that_cannot_be_answered_are_refused_before_the_work(left: Place, tmp_path: Path) -> None:
    [(folder, kept)], _ = models(left)
    texts, out = tmp_path / "more.csv", tmp_path / "new.jsonl"
    texts.write_text("note,number\nfirst,1\n ,2\n")
    for column, said in (
        ("note", r"more\.csv: row 2 has no text in column 'note'; 1 in all"),
        ("text", "no column 'text'"),
    ):
        with pytest.raises(BadValue, match=said):
            answer_file(left, folder, kept, texts, column, out)
    for name, said in (
        ("answers.csv", r"must name a \.jsonl file"),
        ("no/where.jsonl", "No such file"),
        ("more.jsonl", "exists"),
    ):
        (tmp_path / "more.jsonl").write_text("")
        with pytest.raises(BadValue, match=said):
            answer_file(left, folder, kept, left.folder / "notes.csv", "text", tmp_path / name)
    texts.write_text("note,number\n")
    with pytest.raises(BadValue, match="has no rows: there is nothing to answer"):
        answer_file(left, folder, kept, texts, "note", out)
    assert not out.exists()
    with pytest.raises(BadValue, match="no run 'other' left a model"):
        models(left, "other")


def test_a_model_that_cannot_be_used_says_why_and_hides_no_other(left: Place, tmp_path: Path) -> None:
    [(folder, kept)], _ = models(left)
    assert measured(left, folder, replace(kept, base="0" * 64)).problem.endswith("has now: put those back")
    other = folder.parent.parent.parent / "second" / "main" / "seed-0"
    shutil.copytree(folder, other)
    (other / "task_model.safetensors").unlink()
    [*_, last], unread = models(left)
    assert measured(left, other, last[1]).problem == "evaluate was asked before learn"
    assert not unread
    facts = json.loads((folder / "model.json").read_text())
    facts["config"]["task_training"]["continued_rate"] = 1.0  # as an earlier version wrote
    (other / "model.json").write_text(json.dumps(facts))
    assert (len(models(left)[0]), models(left)[1]) == (2, [])
    (other / "model.json").write_text("{")
    [(same, _)], [said] = models(left)
    assert same == folder
    assert said.startswith(str(other / "model.json"))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"strategies": ("fedsynth.strategies.local:LocalOnly",)}, ErrorCode.NOT_ALLOWED),
        ({"requests": ("train.learn",)}, ErrorCode.NOT_ALLOWED),
        ({"outputs": ("scores",)}, ErrorCode.NOT_ALLOWED),
        ({"minimum_records": ROWS + 1}, ErrorCode.NOT_ALLOWED),
        ({"models": ("assets:hospitals-slm",)}, ErrorCode.NOT_ALLOWED),
        ({"bundles": ("a" * 64,)}, ErrorCode.NOT_ALLOWED),
        ({"lifetime": Budget(2.0)}, ErrorCode.BUDGET_EXHAUSTED),
    ],
)
def test_a_stricter_policy_wins_before_anything_is_read(
    tmp_path: Path, toml: str, notes: pd.DataFrame, change: dict[str, Any], code: ErrorCode
) -> None:
    strict = {"charite": replace(POLICY, **change)}
    sites = places(tmp_path, notes, strict)
    deployed = Deployed(sites, toml, tmp_path / "run")
    if code is not ErrorCode.BUDGET_EXHAUSTED:  # the MAC of the data is made before the charge
        damage(sites[0])
    with pytest.raises(TooFewReplies, match=f"site 'charite' refused: {code.value}"):
        deployed.run()
    assert code in deployed.codes()
    assert sites[0].open_ledger().spent() == (0.0, POLICY.lifetime.delta)


VOTES = """
use = "fedsynth.strategies.private_evolution:PrivateEvolution"
num_texts = 8
keep = 2
min_words = 1
"""


def voting(toml: str, more: str = "") -> str:
    before, _, rest = toml.partition("[strategy]")
    _, _, after = rest.partition("[data]")
    found = f"{before}[strategy]{VOTES}[data]{after}"
    return found.replace("task_training = {", f"{more}\ntask_training = {{") if more else found


def test_sites_vote_by_persons_where_their_policy_lets_votes_out(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    told = dict.fromkeys(NAMES, replace(POLICY, outputs=("votes",)))
    deployed = Deployed(places(tmp_path, notes, told), voting(toml), tmp_path / "run")
    deployed.run()
    assert deployed.codes() == []
    said = [part for own in deployed.run_log.spending.values() for part in own.parts]
    assert {(s.unit, s.steps, s.sampling_rate, s.simulated) for s in said} == {("person", 1, 1.0, False)}
    assert len({s.sigma for s in said}) == 1
    spent, _ = deployed.sites[0].open_ledger().spent()
    assert 7.9 < spent <= 8.0


def test_votes_are_paid_before_a_private_text_is_embedded(
    tmp_path: Path, toml: str, notes: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = dict.fromkeys(NAMES, replace(POLICY, outputs=("votes",), lifetime=Budget(2.0)))
    deployed = Deployed(places(tmp_path, notes, poor), voting(toml), tmp_path / "run")
    looked: list[int] = []
    monkeypatch.setattr("fedsynth.clients.vote.alone", lambda *_: looked.append(1))
    with pytest.raises(TooFewReplies, match="budget_exhausted"):
        deployed.run()
    assert looked == []


def test_a_site_that_was_told_nothing_of_votes_refuses_them_unread(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    told = {name: replace(POLICY, outputs=("votes",)) for name in NAMES if name != "charite"}
    for more, policies in (("", told), ('embedder = "assets:tiny-base"', dict.fromkeys(NAMES, told["ukb"]))):
        place = tmp_path / ("embedder" if more else "outputs")
        place.mkdir()
        sites = places(place, notes, policies)
        deployed = Deployed(sites, voting(toml, more), place / "run")
        damage(sites[0])
        with pytest.raises(TooFewReplies, match="site 'charite' refused: not_allowed"):
            deployed.run()
        assert sites[0].open_ledger().spent() == (0.0, POLICY.lifetime.delta)


def with_keys(sites: list[Place]) -> list[Place]:
    """Each site has a key of its own, and the public keys of all."""
    for place in sites:
        name = place.site.name
        write_node_keys(place.path("keys/node"), place.path("keys/node.pub"), name)
    for place in sites:
        place.path("roster").mkdir()
        for other in sites:
            shutil.copy(other.path("keys/node.pub"), place.path(f"roster/{other.site.name}.pub"))
    return sites


def summing(tmp_path: Path, notes: pd.DataFrame, toml: str, **terms: Any) -> Deployed:
    policy = replace(POLICY, outputs=("votes",), secure_sum=SumPolicy(clients=2, **terms))
    sites = with_keys(places(tmp_path, notes, dict.fromkeys(NAMES, policy)))
    more = "secure_sum = { clients = 3, dropouts = 1 }"
    return Deployed(sites, voting(toml, more), tmp_path / "run")


def test_sites_vote_by_a_secure_sum_and_are_charged_as_their_operators_say(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    deviations = {}
    for accept in (True, False):
        place = tmp_path / str(accept)
        place.mkdir()
        deployed = summing(place, notes, toml, accept=accept)
        deployed.run()
        assert deployed.codes() == []
        stated = [part for own in deployed.run_log.spending.values() for part in own.parts]
        for said in stated:
            assert said.mechanism == "summed_votes"
            assert said.epsilon <= 8.0
            assert (said.cohort, said.epsilon_alone is None) == ((Cohort(3, 1), False) if accept else (None, True))
        spent, _ = deployed.sites[0].open_ledger().spent()
        assert 7.9 < spent <= 8.0
        assert ("rests on the noise of 2 honest ones" in privacy_line([deployed.run_log])) == accept
        deviations[accept] = {said.sigma for said in stated}
    assert deviations[True] == deviations[False]  # of the sum; of one site's own noise, who does not rest on others


def test_a_site_with_a_smaller_budget_relies_on_its_own_noise(tmp_path: Path, toml: str, notes: pd.DataFrame) -> None:
    deployed = summing(tmp_path, notes, toml, accept=True)
    first = deployed.sites[0]
    policy = replace(first.site.policy, per_run=Budget(3.0))
    deployed.sites[0] = replace(first, site=replace(first.site, policy=policy))
    deployed.run()
    cautious, *others = (own.parts[0] for _, own in sorted(deployed.run_log.spending.items()))
    assert (cautious.epsilon <= 3.0, cautious.cohort) == (True, None)  # the others' noise is for epsilon 8
    assert {said.cohort for said in others} == {Cohort(3, 1)}


def test_two_arms_that_share_a_sites_account_have_sums_of_their_own(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    deployed = summing(tmp_path, notes, toml + "[arms.other]\nstrategy.keep = 1\n", accept=True)
    for place in deployed.sites:
        place.open_ledger(create=True)
    wide = replace(POLICY, outputs=("votes",), secure_sum=SumPolicy(clients=2, accept=True), lifetime=Budget(40.0))
    deployed.sites = [
        replace(place, site=replace(place.site, policy=replace(wide, models=place.site.policy.models)))
        for place in deployed.sites
    ]
    deployed.run_id = "a-run"
    deployed.run()
    second = replace(deployed, out=tmp_path / "second")
    second.cell = cell_of(second.whole, "other", 0)
    second.run_log = RunLog(second.cell, second.out, second.out / "events.jsonl", simulated=False)
    second.run()
    assert (deployed.codes(), second.codes()) == ([], [])


def test_a_site_takes_part_in_no_sum_that_its_operator_did_not_allow(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    for number, (terms, why) in enumerate(
        (
            (None, "no policy.secure_sum"),
            (SumPolicy(clients=4), "asks for 4 and 0 at least"),
            (SumPolicy(clients=2, colluders=1), "asks for 2 and 1 at least"),
        )
    ):
        place = tmp_path / str(number)
        place.mkdir()
        deployed = summing(place, notes, toml, accept=True)
        first = deployed.sites[0]
        policy = replace(first.site.policy, secure_sum=terms)
        deployed.sites[0] = replace(first, site=replace(first.site, policy=policy))
        with pytest.raises(TooFewReplies, match="refused: not_allowed"):
            replace(deployed, toml=deployed.toml.replace("dropouts = 1", "dropouts = 0"), out=place / "again").run()
        assert why in "".join(path.read_text() for path in first.state.rglob("site.log"))
        assert first.open_ledger().spent() == (0.0, POLICY.lifetime.delta)


def test_a_key_that_an_operator_has_not_pinned_ends_a_sum_before_any_charge(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    deployed = summing(tmp_path, notes, toml, accept=True)
    first, stranger = deployed.sites[0], tmp_path / "stranger"
    write_node_keys(stranger, tmp_path / "stranger.pub")
    shutil.copy(tmp_path / "stranger.pub", first.path("roster/ukb.pub"))  # as if the server had handed out the keys
    with pytest.raises(TooFewReplies, match="share_seeds: 0 of 3 clients answered, 3 needed"):
        replace(deployed, toml=deployed.toml.replace("dropouts = 1", "dropouts = 0"), out=tmp_path / "again").run()
    assert "none of this client's roster" in "".join(p.read_text() for p in first.state.rglob("site.log"))
    assert all(place.open_ledger().spent()[0] == 0.0 for place in deployed.sites)


def test_site_check_lists_the_pinned_keys(tmp_path: Path, toml: str, notes: pd.DataFrame) -> None:
    place = summing(tmp_path, notes, toml).sites[0]
    [found] = [f for f in check(place) if f.what == "secure sums"]
    assert found.state == "ok"
    assert found.says.count("SHA256:") == 3
    assert "what this site's own messages cost" in found.says
    place.path("roster/charite.pub").unlink()
    [found] = [f for f in check(place) if f.what == "secure sums"]
    assert (found.state, "lacks this site's own key" in found.says) == ("problem", True)


def test_one_run_gets_no_more_than_the_site_allows_it(tmp_path: Path, toml: str, notes: pd.DataFrame) -> None:
    less = {"charite": replace(POLICY, per_run=Budget(3.0))}
    deployed = Deployed(places(tmp_path, notes, less), toml, tmp_path / "run")
    deployed.run()
    said = deployed.run_log.spending
    assert said[0].epsilon is not None
    assert 2.8 < said[0].epsilon <= 3.0
    assert said[1].epsilon is not None
    assert 7.8 < said[1].epsilon <= 8.0


def test_a_run_of_many_arms_and_seeds_spends_no_more_than_the_site_allows_one_run(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    [place, *_] = places(tmp_path, notes, {"charite": replace(POLICY, per_run=Budget(2.0))})
    place.open_ledger(create=True)
    many = toml.replace("seeds = [0]", "seeds = [0, 1]").replace("epsilon = 8.0", "epsilon = 1.0")
    many = to_toml(from_toml(many + "[arms.other]\n[arms.third]\n"))
    refused = 0
    for number, (arm, seed) in enumerate([(a, s) for a in ("main", "other", "third") for s in (0, 1)]):
        client = client_side(place, cell_of(many, arm, seed), Envelope("run", arm, seed, 1, 0), {})
        planned = client.plan()
        binding = Binding(f"request {number}", planned.digest(), "mac", "model", "version")
        try:
            client.ledger.charge(planned, binding, client.run, budget=client.config.budget)
        except BudgetExhausted:
            refused += 1
    assert refused > 0
    assert 1.5 < place.open_ledger().spent("run")[0] <= 2.0  # 2.577 if each cell is held against it by itself
    assert place.open_ledger().spent()[0] <= 2.0


def test_a_request_to_a_site_whose_ledger_is_an_older_copy_is_refused_with_a_code_alone(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    [place, *_] = places(tmp_path, notes)
    place.open_ledger(create=True)
    shutil.copy(place.ledger, tmp_path / "backup")
    one = toml.replace("clients = 3", "clients = 1").replace("epsilon = 8.0", "epsilon = 1.0")
    Deployed([place], one, tmp_path / "run", run_id="first").run()
    shutil.copy(tmp_path / "backup", place.ledger)
    again = Deployed([place], one, tmp_path / "again", run_id="second")
    with pytest.raises(TooFewReplies, match="site 'charite' refused: failed"):
        again.run()
    assert again.codes() == [ErrorCode.FAILED]
    assert not contents(place.ledger)["grants"]
    declare(place, *lost(place))
    Deployed([place], one, tmp_path / "after", run_id="third").run()
    assert [grant["state"] for grant in contents(place.ledger)["grants"]] == ["abandoned", "sent"]


def test_a_stricter_scenario_is_obeyed(tmp_path: Path, notes: pd.DataFrame) -> None:
    lax = dict.fromkeys(NAMES, replace(POLICY, per_run=Budget(9.0)))
    deployed = Deployed(places(tmp_path, notes, lax), scenario(tmp_path, notes, epsilon=2.0), tmp_path / "run")
    deployed.run()
    assert all(said.epsilon is not None and 1.8 < said.epsilon <= 2.0 for said in deployed.run_log.spending.values())


def test_runs_add_up_to_the_lifetime_cap_and_no_further(tmp_path: Path, toml: str, notes: pd.DataFrame) -> None:
    sites = places(tmp_path, notes)
    Deployed(sites, toml, tmp_path / "first", run_id="first").run()
    spent = sites[0].open_ledger().spent()
    again = Deployed(sites, toml, tmp_path / "second", run_id="second")
    with pytest.raises(TooFewReplies, match="budget_exhausted"):
        again.run()
    assert sites[0].open_ledger().spent() == spent
    assert 7.8 < spent[0] <= 8.0


def test_a_release_without_guarantee_does_not_leave_a_default_site(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    bare = toml.replace("[client]\n", '[client]\nguarantee = "none"\n')
    sites = places(tmp_path, notes)
    deployed = Deployed(sites, bare, tmp_path / "run")
    with pytest.raises(TooFewReplies, match="refused: not_allowed"):
        deployed.run()
    assert not sites[0].open_ledger().entries()


def test_a_site_with_other_labels_says_so_and_names_them_in_its_own_log_only(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    sites = places(tmp_path, notes)
    sites[2] = replace(
        sites[2], site=replace(sites[2].site, data=replace(sites[2].site.data, labels=("heart", "lung")))
    )
    deployed = Deployed(sites, toml, tmp_path / "run")
    with pytest.raises(TooFewReplies, match="site 'ukb' refused: wrong_labels") as told:
        deployed.run()
    assert "lung" not in str(told.value)
    assert "'lung'" in (sites[2].state / "site.log").read_text()


def damage(place: Place) -> None:
    """Rows that cannot be opened, whatever is said above them."""
    place.rows.write_bytes(place.rows.read_bytes() + canary(1).encode())


def test_what_goes_wrong_at_a_site_reaches_the_server_as_a_code_only(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    sites = places(tmp_path, notes)
    deployed = Deployed(sites, toml, tmp_path / "run")
    damage(sites[2])
    with pytest.raises(TooFewReplies, match="site 'ukb' refused: failed"):
        deployed.run()
    replies = b"".join(r.content["fedsynth"]["payload"] for r in deployed.grid.replies)
    assert canary(1).encode() not in replies
    assert b"imported" not in decode_all(deployed)
    assert "they were changed or cut short" in (sites[2].state / "site.log").read_text()
    assert sites[2].open_ledger().spent() == (0.0, POLICY.lifetime.delta)


def decode_all(deployed: Deployed) -> bytes:
    return b"".join(
        bytes(r.content["fedsynth"]["payload"]) for r in deployed.grid.replies if r.content["fedsynth"]["refused"]
    )


class TestApproval:
    """Synthetic text waits for a person."""

    @pytest.fixture
    def sites(self, tmp_path: Path, notes: pd.DataFrame) -> list[Place]:
        return places(tmp_path, notes, {"charite": replace(POLICY, approve_text=True)})

    def test_text_waits_is_shown_and_leaves_once_it_is_accepted(
        self, tmp_path: Path, toml: str, sites: list[Place], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deployed = Deployed(sites, toml, tmp_path / "run")
        seen: list[Any] = []
        check = Approvals.check

        def accepted_at_the_third_look(approvals: Approvals, request: str, sha256: str) -> None:
            if request in [held["order"] for held in sites[0].approvals.all()]:
                seen.append(held_text(sites[0], request[:10]))
                if len(seen) == 3:
                    decide(sites[0], request[:10], "accepted")
            check(approvals, request, sha256)

        monkeypatch.setattr(Approvals, "check", accepted_at_the_third_look)
        deployed.run()
        assert deployed.codes() == [ErrorCode.AWAITS_APPROVAL] * 2
        told = (tmp_path / "run" / "events.jsonl").read_text()
        assert told.count("site 'charite': its reply waits for approval there") == 1  # not at each look
        assert deployed.texts()[0] == tuple(zip(seen[0].prompts, seen[0].answers, strict=True))
        assert len([e for e in sites[0].open_ledger().entries() if e["kind"] == "grant"]) == 1
        events = [e["event"] for e in entries(sites[0].audit_log)]
        assert events == ["asked", "charged", "waits", "stored", "accepted", "answered", "asked", "stored", "answered"]

    def test_declined_text_never_leaves_and_what_was_charged_stays_charged(
        self, tmp_path: Path, toml: str, sites: list[Place], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deployed = Deployed(sites, toml, tmp_path / "run")
        check = Approvals.check

        def declined(approvals: Approvals, request: str, sha256: str) -> None:
            if approvals.folder == sites[0].approvals.folder and [
                h for h in sites[0].approvals.all() if h["decision"] == "waits"
            ]:
                decide(sites[0], request, "declined")
            check(approvals, request, sha256)

        monkeypatch.setattr(Approvals, "check", declined)
        with pytest.raises(TooFewReplies, match="site 'charite' refused: not_approved"):
            deployed.run()
        assert 7.8 < sites[0].open_ledger().spent()[0] <= 8.0
        assert (0, 1) in deployed.run_log.silent  # what it spent is not in the server's figures, and they say so
        with pytest.raises(BadValue, match="was declined by"):
            decide(sites[0], sites[0].approvals.all()[0]["order"], "accepted")

    def test_who_never_decides_is_a_missing_answer_with_its_reason(
        self, tmp_path: Path, toml: str, sites: list[Place]
    ) -> None:
        deployed = Deployed(sites, toml.replace("timeout = 20", "timeout = 2"), tmp_path / "run")
        with pytest.raises(TooFewReplies, match="site 'charite' gave no reply in time: its reply waits for approval"):
            deployed.run()


def test_a_site_that_is_away_is_asked_when_it_comes_back(tmp_path: Path, toml: str, notes: pd.DataFrame) -> None:
    deployed = Deployed(places(tmp_path, notes), toml, tmp_path / "run", away={"charite": 3})
    deployed.run()
    assert len(deployed.texts()) == 3


def test_two_nodes_of_one_name_are_refused_before_anything_is_asked(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    deployed = Deployed(places(tmp_path, notes), toml, tmp_path / "run")
    at: dict[str, Any] = {"status": "online", "last_activated_at": ""}
    nodes = [SimpleNamespace(node_id=number, name=name, **at) for number, name in enumerate([*NAMES, "ukb"])]
    deployed.grid.get_nodes = lambda: nodes
    with pytest.raises(TooFewReplies, match="2 SuperNodes are registered as 'ukb'"):
        deployed.run()
    assert not deployed.grid.requests


def test_a_quorum_goes_on_without_a_site_that_stays_away(tmp_path: Path, notes: pd.DataFrame) -> None:
    text = scenario(tmp_path, notes, quorum=0.6).replace("timeout = 20", "timeout = 2")
    deployed = Deployed(places(tmp_path, notes), text, tmp_path / "run", away={"ukb": 10**6})
    deployed.run()
    assert len(deployed.texts()) == 2


def test_a_site_that_cannot_be_reached_is_asked_again_under_the_same_grant(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    deployed = Deployed(places(tmp_path, notes), toml, tmp_path / "run")
    lost = [5]

    def unreachable(message: Message) -> Message | None:
        if message.metadata.message_type == Synthesize.task and lost[0] > 0:
            lost[0] -= 1
            deployed.grid.app(message, deployed.grid.contexts[message.metadata.dst_node_id])  # its answer is lost
            return Message(Error(FlowerError.NODE_UNAVAILABLE, "heartbeat"), reply_to=message)
        return None

    deployed.grid.spoil = unreachable
    deployed.run()
    for place in deployed.sites:
        assert len([e for e in place.open_ledger().entries() if e["kind"] == "grant"]) == 1


def test_a_site_that_connected_anew_is_asked_anew_under_the_same_grant(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    deployed = Deployed(places(tmp_path, notes), toml, tmp_path / "run")
    grid, pull = deployed.grid, deployed.grid.pull_messages
    lost: list[str] = []

    def forgetful(ids: Any) -> Any:
        """The first site's first request was taken, and forgotten with the program that died."""
        if not lost:
            lost.append(next(iter(ids)))
            grid._waiting.pop(lost[0])
            grid.connected = "later"
        return pull([each for each in ids if each not in lost])

    grid.pull_messages = forgetful
    deployed.run()
    assert len(deployed.texts()) == 3
    for place in deployed.sites:
        assert [entry["state"] for entry in place.open_ledger().entries() if entry["kind"] == "grant"] == ["sent"]


def test_a_full_disk_has_a_code_and_one_line_at_the_site(
    tmp_path: Path, toml: str, notes: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    deployed = Deployed(places(tmp_path, notes), toml, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("fedsynth.privacy.ledger.Ledger.store", full)
        with pytest.raises(TooFewReplies, match="refused: disk_full"):
            deployed.run()
    assert "no room is left in" in capfd.readouterr().err
    again = Deployed(deployed.sites, toml, tmp_path / "run")
    again.run()
    assert len(again.texts()) == 3
    for place in again.sites:
        assert [entry["state"] for entry in place.open_ledger().entries() if entry["kind"] == "grant"] == ["sent"]


def test_an_entry_of_the_trail_that_a_full_disk_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    audit_log = AuditLog(tmp_path / "audit.jsonl", {})
    audit_log.add("asked")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # a file that may grow by 10 bytes is cut as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "audit.jsonl").stat().st_size + 10, limits[1]))
        with pytest.raises(OSError):
            audit_log.add("stored")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    audit_log.add("answered")
    assert [entry["event"] for entry in entries(tmp_path / "audit.jsonl")] == ["asked", "answered"]


def test_a_run_id_or_arm_that_leads_elsewhere_is_refused(tmp_path: Path, toml: str, notes: pd.DataFrame) -> None:
    deployed = Deployed(places(tmp_path, notes), toml, tmp_path / "run", run_id="../../elsewhere")
    with pytest.raises(TooFewReplies, match="refused: failed"):
        deployed.run()
    assert not (tmp_path / "elsewhere").exists()


def test_what_a_request_lets_out_is_what_its_answer_class_holds() -> None:
    from typing import get_type_hints

    for request in REQUESTS:
        held = {KINDS[kind] for hint in get_type_hints(request.reply).values() for kind in KINDS if hint is kind}
        fields = {f.metadata["origin"].value for f in __import__("dataclasses").fields(request.reply)}
        told = outputs(request.__new__(request))
        assert told - {"metrics"} == held, request
        assert ("metrics" in told) == bool(fields & {"measured"} or request.task == "train.self_train"), request
    assert set(OUTPUTS) == {*KINDS.values(), "metrics"}


class TestTrail:
    """The audit trail."""

    def test_says_what_was_asked_answered_and_spent_and_by_whom(
        self, tmp_path: Path, toml: str, notes: pd.DataFrame
    ) -> None:
        sites = places(tmp_path, notes)
        Deployed(sites, toml, tmp_path / "run").run()
        found = list(entries(sites[1].audit_log))
        assert [e["event"] for e in found] == ["asked", "charged", *["stored", "answered", "asked"] * 2][:-1]
        assert [e["task"] for e in found if e["event"] == "asked"] == [Synthesize.task, Learn.task]
        charged, stored, answered = found[1:4]
        assert [charged["grant"]] == stored["grants"]
        assert charged["plan"] == sites[1].open_ledger().entries()[0]["plan"]
        assert charged["run"] == "simulated/main/0"
        assert 7.8 < stored["epsilon"] <= 8.0
        assert answered["bytes"] > 0
        assert len(answered["sha256"]) == 64
        assert {e["superlink"] for e in found} == {"127.0.0.1:9443"}
        assert "zq" not in sites[1].audit_log.read_text()

    def test_a_changed_a_missing_and_an_added_line_show(self, tmp_path: Path) -> None:
        audit_log = AuditLog(tmp_path / "audit.jsonl", {"superlink": "here"})
        for number in range(4):
            audit_log.add("asked", number=number)
        lines = audit_log.path.read_text().splitlines()
        assert [e["number"] for e in entries(audit_log.path)] == [0, 1, 2, 3]
        broken = {
            "changed": [lines[0], lines[1].replace('"number": 1', '"number": 7'), *lines[2:]],
            "missing": [lines[0], *lines[2:]],
            "added": [*lines[:2], json.dumps({"event": "asked", "before": "0" * 64}), *lines[2:]],
            "cut": [lines[0], lines[1][:20], *lines[2:]],
        }
        for changed in broken.values():
            audit_log.path.write_text("\n".join(changed) + "\n")
            with pytest.raises(AuditLogCorrupted, match=r"line [23]:"):
                list(entries(audit_log.path))


class TestFile:
    """site.toml."""

    def test_reads_back_what_the_template_says_once_it_is_filled_in(self, tmp_path: Path) -> None:
        use, model = ("fedsynth.strategies.fdkt:FDKT",), ("assets:hospitals-slm",)
        planned = Planned("tiny", "classification", LABELS, use, model, "dp", epsilon=8.0)
        text = template("st-marys", Invitation("fl.example.org:9443", "", planned))
        (tmp_path / "site.toml").write_text(text)
        with pytest.raises(BadValue, match="records must be at least 1, got 0"):  # what only the site knows
            load_site(tmp_path)
        (tmp_path / "site.toml").write_text(text.replace("records = 0", "records = 250"))
        site = load_site(tmp_path).site
        assert site.data.labels == ("heart", "skin")
        assert site.policy == Policy(
            lifetime=Budget(10.0), strategies=("fedsynth.strategies.fdkt:FDKT",), models=("assets:hospitals-slm",)
        )
        assert site.superlink == SuperLink("fl.example.org:9443")
        assert site.policy.approve_text
        assert not site.policy.without_guarantee
        assert "metrics" not in site.policy.outputs

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"requests": ("train.synthesise",)}, "no request 'train.synthesise'"),
            ({"lifetime": Budget(10.0, 1e-3)}, "delta must be at most 1e-05, got 0.001"),
            ({"per_run": Budget(11.0)}, "more than policy.lifetime"),
            ({"bundles": ("abc",)}, "64 hexadecimal digits, got 'abc'"),
        ],
    )
    def test_a_policy_that_cannot_be_meant_is_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(BadValue, match=message):
            replace(POLICY, **change)


def test_a_deployment_is_read_from_a_run_config() -> None:
    assert Deployment.read("") is None
    assert Deployment.read('{"run": "ab", "sites": ["x", "y"]}') == Deployment("ab", ("x", "y"), False)
    with pytest.raises(BadValue, match="not JSON"):
        Deployment.read("{")


def test_an_account_that_is_gone_is_never_begun_anew_by_a_message(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    sites = places(tmp_path, notes)
    for place in sites[1:]:
        list(import_rows(place))
    with pytest.raises(TooFewReplies, match="site 'charite' refused: failed"):
        Deployed(sites, toml, tmp_path / "run", accounts=False).run()
    assert not sites[0].ledger.exists()


def test_a_start_makes_the_account_once_and_asks_for_the_one_that_the_trail_knows(
    tmp_path: Path, notes: pd.DataFrame
) -> None:
    place = places(tmp_path, notes)[0]
    _open_account(place)
    assert place.ledger.exists()
    AuditLog(place.audit_log, {"dataset": place.site.data.id}).add("asked")
    _open_account(place)
    place.ledger.unlink()
    with pytest.raises(BadValue, match="the account of the data set 'charite-1' is gone"):
        _open_account(place)
    [said] = [finding for finding in check(place) if finding.what == "budget"]
    assert said.state == "problem"
    assert "is gone" in said.says


@pytest.mark.parametrize("labels", ["", 'labels = "all"\n'])
def test_a_scenario_cannot_make_a_site_read_its_files_to_find_labels(
    tmp_path: Path, toml: str, notes: pd.DataFrame, labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probing = toml.replace('labels = ["heart", "skin"]\n', labels)
    deployed = Deployed(places(tmp_path, notes), probing, tmp_path / "run")
    context = next(iter(deployed.grid.contexts.values()))
    request = pack_request(Synthesize(1, 1.0, 1.0, 8, 0), Envelope("run", "main", 0, 1, 0))
    (tmp_path / "all.csv").unlink()  # what the scenario names; what is there would be an answer
    sealed = reply_to(Synthesize, request, context, deployed.open, unopened=lambda task, why: None)
    assert unpack_reply(sealed, Synthesize.reply) == Refused(ErrorCode.FAILED)
    notes.to_csv(tmp_path / "all.csv", index=False)
    sealed = reply_to(Synthesize, request, context, deployed.open, unopened=lambda task, why: None)
    assert unpack_reply(sealed, Synthesize.reply) == Refused(ErrorCode.FAILED)


def test_a_model_of_a_list_by_client_is_held_against_the_policy_too(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    more = toml.replace("[client]\n", f'[client]\ntask_models = ["{MODEL[0]}", "assets:tiny-slm", "{MODEL[0]}"]\n')
    with pytest.raises(TooFewReplies, match="site 'st-marys' refused: not_allowed"):
        Deployed(places(tmp_path, notes), more, tmp_path / "run").run()


def test_more_steps_than_can_be_planned_for_are_refused_before_anything_is_opened(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    deployed = Deployed(places(tmp_path, notes), toml, tmp_path / "run")
    wild = deployed.whole.replace("steps = 3", "steps = 1000000000")
    assert wild != deployed.whole
    why: list[str] = []

    def opened(context: Context, envelope: Envelope) -> ClientSide:
        return client_side(deployed.sites[0], cell_of(wild, "main", 0), envelope, {})

    request = pack_request(Synthesize(1, 1.0, 1.0, 8, 0), Envelope("run", "main", 0, 1, 0))
    context = next(iter(deployed.grid.contexts.values()))
    sealed = reply_to(Synthesize, request, context, opened, unopened=lambda task, what: why.append(what))
    assert unpack_reply(sealed, Synthesize.reply) == Refused(ErrorCode.FAILED)
    assert "client.generator_training.steps must be at most 100,000 over all rounds, got 1,000,000,000" in why[0]


@pytest.mark.parametrize("setting", ["clip_norm = 1e-37", "clip_norm = 1e30", "learning_rate = 1e9", "alpha = 1e30"])
def test_numbers_beyond_which_the_bound_was_never_shown_are_refused(
    tmp_path: Path, toml: str, notes: pd.DataFrame, setting: str
) -> None:
    wild = toml.replace("steps = 3, learning_rate = 1e-2", f"steps = 3, {setting}")
    assert setting in wild
    with pytest.raises(TooFewReplies, match="refused: not_allowed"):
        Deployed(places(tmp_path, notes), wild, tmp_path / "run").run()


def test_half_precision_under_a_guarantee_is_refused_before_the_charge(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    half = toml.replace("steps = 3, learning_rate = 1e-2", 'steps = 3, precision = "bfloat16"')
    assert half != toml
    sites = places(tmp_path, notes)
    with pytest.raises(TooFewReplies, match="refused: self_check_failed"):
        Deployed(sites, half, tmp_path / "run").run()
    assert not any(site.open_ledger().entries() for site in sites)
    [log] = [log for site in sites if (log := site.state / "site.log").is_file()]  # who is asked first
    assert "client.generator_training.precision" in log.read_text()


def test_a_policy_made_stricter_holds_for_what_is_stored_and_not_yet_sent(
    tmp_path: Path, toml: str, notes: pd.DataFrame
) -> None:
    sites = places(tmp_path, notes, {"charite": replace(POLICY, approve_text=True)})
    short = toml.replace("timeout = 20", "timeout = 2")
    with pytest.raises(TooFewReplies, match="its reply waits for approval"):
        Deployed(sites, short, tmp_path / "run").run()
    decide(sites[0], sites[0].approvals.all()[0]["order"], "accepted")
    strict = replace(sites[0], site=replace(sites[0].site, policy=replace(POLICY, outputs=("scores",))))
    with pytest.raises(TooFewReplies, match="site 'charite' refused: not_allowed"):
        Deployed([strict, *sites[1:]], short, tmp_path / "again").run()


def odd(text: str) -> frozenset[Any]:
    """Takes about half of all texts for addresses: a random model writes none."""
    return frozenset({"email"} if len(text.strip().partition("\n")[0]) % 2 else ())


def test_a_synthetic_text_with_what_the_policy_names_stays_and_the_others_leave(
    tmp_path: Path, toml: str, notes: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsynth.clients.synthesize.kinds_in", odd)
    deployed = Deployed(
        places(tmp_path, notes, {"charite": replace(POLICY, identifiers=("email",))}), toml, tmp_path / "r"
    )
    deployed.run()
    careful, free, _ = deployed.texts()
    assert careful
    assert not any(odd(text) for text, _ in careful)
    assert any(odd(text) for text, _ in free)
    assert any(not odd(text) for text, _ in free)


def test_identifiers_are_counted_for_who_approves_and_block_what_is_stored_when_the_policy_says_so_later(
    tmp_path: Path, toml: str, notes: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsynth.identifiers.kinds_in", odd)
    sites = places(tmp_path, notes, {"charite": replace(POLICY, approve_text=True)})
    short = toml.replace("timeout = 20", "timeout = 2")
    with pytest.raises(TooFewReplies, match="its reply waits for approval"):
        Deployed(sites, short, tmp_path / "run").run()
    [held] = sites[0].approvals.all()
    waiting = held_text(sites[0], held["order"])
    assert held["identifiers"] == {"email": sum(map(bool, map(odd, waiting.prompts)))}
    decide(sites[0], held["order"], "accepted")
    policy = replace(POLICY, approve_text=True, identifiers=("email",), models=(MODEL[0],))
    strict = replace(sites[0], site=replace(sites[0].site, policy=policy))
    with pytest.raises(TooFewReplies, match="site 'charite' refused: not_allowed"):
        Deployed([strict, *sites[1:]], short, tmp_path / "again").run()
    assert "an e-mail address: policy.identifiers blocks them since" in (sites[0].state / "site.log").read_text()


def test_approval_that_is_asked_for_later_holds_for_what_is_stored(
    tmp_path: Path, toml: str, notes: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = places(tmp_path, notes)
    with monkeypatch.context() as patched:  # its process dies when the answer is stored, and not yet sent
        patched.setattr(Ledger, "mark_sent", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(TooFewReplies):
            Deployed(sites, toml, tmp_path / "run").run()
    careful = replace(
        sites[0], site=replace(sites[0].site, policy=replace(POLICY, approve_text=True, models=(MODEL[0],)))
    )
    short = toml.replace("timeout = 20", "timeout = 2")
    with pytest.raises(TooFewReplies, match="site 'charite' gave no reply in time: its reply waits"):
        Deployed([careful, *sites[1:]], short, tmp_path / "again").run()


def test_a_site_that_was_never_reached_is_not_charged_when_the_run_goes_on(tmp_path: Path, notes: pd.DataFrame) -> None:
    text = scenario(tmp_path, notes, quorum=0.6).replace("timeout = 20", "timeout = 2")
    sites = places(tmp_path, notes)
    first = Deployed(sites, text, tmp_path / "run", away={"ukb": 10**6})
    with pytest.raises(RuntimeError, match="the server dies"):
        first.run(llm=DyingLLM())
    assert (2, 1) not in first.run_log.silent
    again = Deployed(sites, text, tmp_path / "run")  # ukb is back
    again.run()
    assert not sites[2].open_ledger().entries()


class DyingLLM(ScriptedLLM):
    """Ends its server."""

    def complete(self, *_: Any, **__: Any) -> list[str]:
        raise RuntimeError("the server dies")


def test_units_of_sites_that_differ_are_all_named(tmp_path: Path, toml: str, notes: pd.DataFrame) -> None:
    sites = places(tmp_path, notes)
    rows = replace(sites[2].site.data, person=None, independent_rows=True)
    sites[2] = replace(sites[2], site=replace(sites[2].site, data=rows))
    deployed = Deployed(sites, toml, tmp_path / "run")
    deployed.run()
    assert "-DP per person or row" in privacy_line([deployed.run_log])
    told = privacy_report([deployed.run_log])["largest_over_clients"]
    assert told["unit"] == "person or row"
    assert set(told["epsilon_rows"]) == {"2", "5", "10"}


def test_a_line_that_a_killed_process_left_half_written_does_not_look_like_a_change(tmp_path: Path) -> None:
    audit_log = AuditLog(tmp_path / "audit.jsonl", {})
    audit_log.add("asked", number=0)
    with audit_log.path.open("ab") as file:
        file.write(b'{"at": "2026-')
    assert [e["number"] for e in entries(audit_log.path)] == [0]
    audit_log.add("asked", number=1)
    audit_log.add("asked", number=2)
    found = list(entries(audit_log.path))
    assert [e["number"] for e in found] == [0, 1, 2]
    assert [e.get("torn", False) for e in found] == [False, True, False]
