"""FDKT in process: the real client app, tiny models, a scripted LLM."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny
from flwr.app import ArrayRecord, Error, Message
from inprocess import canary
from local import LocalGrid
from resuming import Died, dies_everywhere
from spelled import spelled

import fedsynth.clients.client_side
from fedsynth.clients.app import client_app, simulation
from fedsynth.clients.batched_training import together
from fedsynth.clients.client_side import ClientSide, cell_of
from fedsynth.clients.synthesize import synthesize
from fedsynth.corpus import Corpus, Provenance, pool
from fedsynth.federation.messages import Evaluate, Evaluated, Learn, Synthesize, Synthesized, Vote
from fedsynth.federation.nodes import TooFewReplies, nodes_by_client
from fedsynth.federation.payload import decode
from fedsynth.federation.records import parted, unpack_request
from fedsynth.federation.run.directory import private_of
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.privacy_report import guarantee_of, privacy_line, privacy_report, up
from fedsynth.federation.strategy import Clients, ServerSide, load_strategy
from fedsynth.federation.validation import Rejected, check_request
from fedsynth.instructions import one_line
from fedsynth.lora import Adapter
from fedsynth.models.adapters import WrongAdapter, new_adapter, with_adapter
from fedsynth.models.encoding import token_ids
from fedsynth.models.loading import load_tokenizer
from fedsynth.privacy.audit import contents, problems
from fedsynth.scenario.client import Client, GeneratorTraining, WarmStart
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.task import NO_CARD
from fedsynth.scenario.toml import cells, from_toml, to_toml
from fedsynth.simulation.simulate import check
from fedsynth.strategies.fdkt import FDKT
from fedsynth.strategies.knowledge_sg import KnowledgeSG, KnowledgeSGOptions
from fedsynth.synthesis.curation import well_formed
from fedsynth.synthesis.student import warm_start
from fedsynth.testing import ScriptedLLM
from fedsynth.training.dp_training import mean_loss
from fedsynth.training.engine import Engine
from fedsynth.training.examples import Example, encode_slots
from fedsynth.typed import BadValue

SCENARIOS = Path(__file__).parent.parent / "simulations" / "scenarios"
LABELS = ("heart", "skin")
CLIENTS, ROWS = 3, 12

SCENARIO = """
name = "tiny"
seeds = [0]
[strategy]
use = "fedsynth.strategies.fdkt:FDKT"
per_label = 6
min_words = 1
num_texts = 8
shots = 2
draft_tokens = 24
judge = "likelihood"
cluster_size = 4
[data]
source = "{file}"
labels = ["heart", "skin"]
clients = 3
[client]
generator = "{model}"
task_model = "{model}"
budget = {{ epsilon = 8.0 }}
generator_training = {{ expected_batch_size = 5, steps = 3, learning_rate = 1e-3 }}
task_training = {{ augmented_epochs = 1, private_epochs = 1 }}
[server]
llm = "scripted"
[arms.fdkt]
[arms.no_demonstrations]
strategy.demonstrations = "none"
[arms.dp_only]
strategy.texts = "drafts"
[arms.no_filter]
strategy.judge = "none"
[arms.no_dp]
client.guarantee = "none"
[arms.true_texts]
strategy.drafts = "true_texts"
strategy.per_label = 2
strategy.judge = "none"
client.guarantee = "none"
[arms.local]
strategy.use = "fedsynth.strategies.local:LocalOnly"
[arms.pooled]
strategy.use = "fedsynth.strategies.local:LocalOnly"
data.pooled = true
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learnt to write short words and to end: drafts of noise, or without end, are dropped."""

    def notes(tokenizer: Any, rng: np.random.Generator) -> list[Any]:
        texts = ["".join(rng.choice(list("abcd "), 6)) for _ in range(16)]
        corpus = Corpus(tuple(texts), tuple(LABELS[i % 2] for i in range(16)), Provenance.PUBLIC)
        return [
            e for slot in encode_slots(tokenizer, corpus, LABELS, 16, GeneratorTraining(max_length=64)) for e in slot
        ]

    return tiny.taught(tmp_path_factory.mktemp("model"), notes, steps=80, rate=1e-2)


@pytest.fixture
def toml(tmp_path: Path, model: str) -> str:
    rows = CLIENTS * ROWS * 2
    frame = pd.DataFrame(
        {
            "text": [f"note {canary(i)} about a thing" for i in range(rows)],
            "label": [LABELS[i % 2] for i in range(rows)],
        }
    )
    frame.loc[[1, rows - 2], "label"] = [canary(rows + 1), canary(rows + 2)]  # labels that are on nobody's list
    frame.to_csv(tmp_path / "notes.csv", index=False)
    return SCENARIO.format(file=tmp_path / "notes.csv", model=model)


@dataclass
class World:
    """One cell, run in process."""

    cell: Cell
    grid: LocalGrid
    llm: ScriptedLLM
    run_log: RunLog
    out: Path
    state: Any = None
    clients: list[ClientSide] = field(default_factory=list)

    def run(self) -> None:
        data = self.cell.scenario.data
        clients = 1 if data.pooled else data.clients

        def open_clients(grid: Any) -> Clients:
            return Clients(grid, nodes_by_client(grid, clients), self.cell, "simulated", LABELS, self.run_log)

        kind, config = load_strategy(self.cell.scenario.strategy)
        server = ServerSide(self.cell, LABELS, self.llm, self.llm, embed, self.run_log, open_clients)
        kind(config, server).start(self.grid, ArrayRecord())
        self.run_log.close()

    def replies(self, kind: type[Any]) -> list[Any]:
        request_kind = {Synthesized: Synthesize, Evaluated: Evaluate}[kind]
        payloads = [
            reply.content["fedsynth"]["payload"]
            for request, reply in zip(self.sent(), self.grid.replies_in_order(), strict=True)
            if request.metadata.message_type == request_kind.task
        ]
        return [decode(p, kind) for p in payloads]

    def sent(self) -> list[Message]:
        return self.grid.requests


def embed(texts: Any) -> Any:
    return np.array([[len(t), sum(map(ord, t)) % 97] for t in texts], np.float32)


def world(toml: str, arm: str, tmp_path: Path, nodes: int = CLIENTS, **more: Any) -> World:
    cell = cell_of(to_toml(from_toml(toml)), arm, 0)
    out = tmp_path / "run"
    out.mkdir(exist_ok=True, parents=True)
    grid = LocalGrid(
        client_app(simulation), nodes, {"scenario-toml": to_toml(from_toml(toml)), "out-dir": str(out)}, **more
    )
    llm = ScriptedLLM(answer=lambda prompt: f" written after {len(prompt)} characters")
    return World(cell, grid, llm, RunLog(cell, out, out / "events.jsonl"), out)


@pytest.fixture
def fdkt(toml: str, tmp_path: Path) -> World:
    made = world(toml, "fdkt", tmp_path)
    made.run()
    return made


def test_only_synthetic_text_and_labels_go_up(fdkt: World) -> None:
    drafts = [a.corpus for a in fdkt.replies(Synthesized)]
    assert len(drafts) == CLIENTS
    assert all(c.provenance is Provenance.DP_SYNTHETIC and len(c.grants) == 1 for c in drafts)
    assert len({c.grants for c in drafts}) == CLIENTS  # a grant of its own for each
    assert all(set(a.metrics) == {"accuracy", "macro_f1"} for a in fdkt.replies(Evaluated))


def test_no_private_token_crosses_and_the_search_would_find_one(fdkt: World) -> None:
    def decoded(message: Message) -> str:
        kinds = {
            Synthesize.task: (Synthesize, Synthesized),
            Learn.task: (Learn, Learn.reply),
            Evaluate.task: (Evaluate, Evaluated),
        }
        record = message.content.get("fedsynth")
        if record is None:
            return ""
        own, reply = kinds[message.metadata.message_type]
        found = decode(record["payload"], reply if "refused" in record else own)
        return spelled(found) + repr(dict(record))

    texts = " ".join(decoded(m) for m in [*fdkt.grid.requests, *fdkt.grid.replies])
    assert len(texts) > 1000
    assert not [i for i in range(CLIENTS * ROWS * 2 + 3) if canary(i) in texts]
    planted = fdkt.grid.requests[-1]
    client = fedsynth.clients.client_side.simulated_client(fdkt.cell, 0, private_of(fdkt.out), "simulated")
    assert any(canary(i) in spelled(client.train) for i in range(CLIENTS * ROWS * 2))  # they are there to be found
    assert planted.content["fedsynth"]["client"] in range(CLIENTS)


def test_labels_are_drawn_uniformly_whatever_the_client_holds(fdkt: World) -> None:
    for answer in fdkt.replies(Synthesized):
        assert max(answer.corpus.counts().values()) <= 6
        assert len(answer.corpus) + answer.unfinished == 6 * len(LABELS)


def test_demonstrations_are_drafts_that_were_selected(fdkt: World) -> None:
    prompts = fdkt.llm.completed[-1]
    assert len(prompts) == CLIENTS * 8
    drafts = pool([a.corpus for a in fdkt.replies(Synthesized)])
    released = {one_line(t) for t in well_formed(drafts, labels=LABELS, min_words=1).corpus.prompts}
    shown = {line.partition(": ")[2] for p in prompts for line in p.split("\n")[:-1]}
    assert shown
    assert shown <= released


def test_each_client_learns_from_its_own_texts(fdkt: World) -> None:
    learnt = [
        decode(m.content["fedsynth"]["payload"], Learn)
        for m in fdkt.grid.requests
        if m.metadata.message_type == Learn.task
    ]
    grants = [o.corpus.grants for o in learnt]
    assert grants == [a.corpus.grants for a in fdkt.replies(Synthesized)]
    assert all(o.corpus.provenance is Provenance.LLM_WRITTEN for o in learnt)


def test_clusters_follow_the_papers_formula(
    fdkt: World, monkeypatch: pytest.MonkeyPatch, toml: str, tmp_path: Path
) -> None:
    import fedsynth.strategies.fdkt as module

    seen: list[tuple[int, int]] = []
    real = module.clusters

    def spy(embeddings: Any, *, size: int, seed: int) -> Any:
        groups = real(embeddings, size=size, seed=seed)
        seen.append((len(embeddings), len(groups)))
        return groups

    monkeypatch.setattr(module, "clusters", spy)
    world(toml, "fdkt", tmp_path / "again").run()
    assert len(seen) == CLIENTS
    assert all(groups == -(-rows // 4) for rows, groups in seen)


def test_deleting_private_text_after_training_changes_no_released_byte(
    fdkt: World, toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedsynth.clients.batched_training as module

    real = module.train_generator

    def fit_then_delete(model: Any, training: Any, *rest: Any, **more: Any) -> int:
        steps = real(model, training, *rest, **more)
        training.slots.clear()
        monkeypatch.setattr(
            ClientSide, "train", property(lambda _: pytest.fail("private text was read after the release"))
        )
        return steps

    monkeypatch.setattr(module, "train_generator", fit_then_delete)
    again = world(toml, "fdkt", tmp_path / "again")
    [client] = [0]
    clients = Clients(again.grid, nodes_by_client(again.grid, CLIENTS), again.cell, "simulated", LABELS, again.run_log)
    request = decode(fdkt.grid.requests_of(Synthesize.task)[client].content["fedsynth"]["payload"], Synthesize)
    answer = clients.ask_each({client: request})[client]
    assert answer.corpus.fingerprint() == fdkt.replies(Synthesized)[client].corpus.fingerprint()


def test_charged_steps_are_the_steps_that_ran(fdkt: World) -> None:
    for index in range(CLIENTS):
        client = fedsynth.clients.client_side.simulated_client(fdkt.cell, index, private_of(fdkt.out), "simulated")
        [reserved] = [e for e in client.ledger.entries() if e["kind"] == "reservation"]
        assert reserved["plan"]["steps"] == 3
        assert reserved["drawn"] == 1
        [grant] = [e for e in client.ledger.entries() if e["kind"] == "grant"]
        assert grant["state"] == "sent"
        epsilon, delta = client.ledger.spent()
        assert epsilon <= 8.0
        assert delta == 1e-5
        assert fdkt.run_log.spending[index].epsilon == pytest.approx(epsilon, abs=1e-2)


def test_the_same_seed_gives_the_same_metrics_and_texts(fdkt: World, toml: str, tmp_path: Path) -> None:
    again = world(toml, "fdkt", tmp_path / "again", nodes=1)  # another number of SuperNodes, too
    again.run()

    def untimed(w: World) -> list[Any]:
        return [r for r in w.run_log.rows if not r[4].startswith("seconds/")]

    assert untimed(again) == untimed(fdkt)


def test_a_repeated_request_gets_the_same_bytes_and_one_training(
    toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedsynth.clients.batched_training as module

    fits: list[int] = []
    real = module.train_generator
    monkeypatch.setattr(module, "train_generator", lambda *a, **k: fits.append(1) or real(*a, **k))
    made = world(toml, "fdkt", tmp_path)
    request = Synthesize(2, 1.0, 1.0, 8, seed=1)
    for _ in range(2):
        clients = Clients(made.grid, nodes_by_client(made.grid, 1), made.cell, "simulated", LABELS, made.run_log)
        clients.ask(request)
    first, second = (r.content["fedsynth"]["payload"] for r in made.grid.replies if "fedsynth" in r.content)
    assert first == second
    assert len(fits) == 1


@pytest.mark.parametrize(
    ("arm", "guarantee", "asked"),
    [
        ("local", "dp", {Learn.task, Evaluate.task}),
        ("no_demonstrations", "dp", {Learn.task, Evaluate.task}),
        ("dp_only", "dp", {Synthesize.task, Learn.task, Evaluate.task}),
        ("no_filter", "dp", {Synthesize.task, Learn.task, Evaluate.task}),
        ("no_dp", "none", {Synthesize.task, Learn.task, Evaluate.task}),
        ("pooled", "none", {Learn.task, Evaluate.task}),
    ],
)
def test_arms_ask_what_they_say(toml: str, tmp_path: Path, arm: str, guarantee: str, asked: set[str]) -> None:
    made = world(toml, arm, tmp_path)
    made.run()
    assert {m.metadata.message_type for m in made.grid.requests} - {"query.who"} == asked
    assert guarantee_of([made.run_log]) == guarantee
    assert bool(made.llm.completed) == (arm in ("no_demonstrations", "no_filter", "no_dp"))
    if arm == "no_dp":
        assert all(
            a.corpus.grants == () and a.corpus.provenance is Provenance.SELF_GENERATED
            for a in made.replies(Synthesized)
        )
        client = fedsynth.clients.client_side.simulated_client(made.cell, 0, private_of(made.out), "simulated")
        assert client.ledger.spent()[0] == float("inf")
    if arm == "no_demonstrations":
        assert all(p in ("heart:", "skin:") for p in made.llm.completed[0])


def test_true_texts_are_a_bound_without_any_guarantee(toml: str, tmp_path: Path) -> None:
    made = world(toml, "true_texts", tmp_path)
    made.run()
    given = [reply.corpus for reply in made.replies(Synthesized)]
    assert len(given) == CLIENTS
    for index, corpus in enumerate(given):
        client = fedsynth.clients.client_side.simulated_client(made.cell, index, private_of(made.out), "simulated")
        own = dict(zip(client.train.prompts, client.train.answers, strict=True))
        assert (corpus.provenance, corpus.grants, corpus.counts()) == (
            Provenance.DISCLOSED,
            (),
            {"heart": 2, "skin": 2},
        )
        assert all(own[text] == label for text, label in zip(corpus.prompts, corpus.answers, strict=True))
        assert len(set(corpus.prompts)) == 4
        assert client.ledger.spent()[0] == float("inf")
        assert "true texts" in client.ledger.entries()[0]["reason"]
    shown = " ".join(made.llm.completed[-1])
    assert all(one_line(text) in shown for corpus in given for text in corpus.prompts)
    learnt = [decode(m.content["fedsynth"]["payload"], Learn) for m in made.grid.requests_of(Learn.task)]
    assert {order.corpus.provenance for order in learnt} == {Provenance.SELF_GENERATED}
    assert guarantee_of([made.run_log]) == "none"
    assert "true private text left clients without a mechanism; no epsilon holds" in privacy_line([made.run_log])
    assert [path.name for path in made.out.rglob("*draft*")] == []
    assert [path.name for path in made.out.rglob("*written*")] != []


@pytest.mark.parametrize(("arm", "stored"), [("true_texts", []), ("no_dp", ["exchange-1.zip"])])
def test_a_run_that_dies_leaves_no_true_text_in_the_directory_that_people_share(
    toml: str, tmp_path: Path, arm: str, stored: list[str]
) -> None:
    made = world(toml, arm, tmp_path)

    def dies(prompt: str) -> str:
        raise KeyboardInterrupt

    made.llm.answer = dies
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert [path.name for path in made.out.rglob("exchange-1.zip")] == stored
    if arm == "true_texts":
        [client] = [m for m in made.grid.replies if "fedsynth" in m.content][:1]
        text = decode(client.content["fedsynth"]["payload"], Synthesized).corpus.prompts[0].encode()
        assert text in client.content["fedsynth"]["payload"]  # it would be found
        assert not any(text in path.read_bytes() for path in made.out.rglob("*") if path.is_file())


def test_a_client_that_raises_ends_the_run_with_a_code_and_no_private_word(
    toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedsynth.clients.learn as module

    def explode(*_: Any, **__: Any) -> None:
        raise ValueError(f"cannot train on {canary(3)}")

    monkeypatch.setattr(module, "fit_classifier", explode)
    made = world(toml, "local", tmp_path)
    with pytest.raises(TooFewReplies, match="refused: failed") as caught:
        made.run()
    assert canary(3) not in str(caught.value)
    assert not any(canary(3) in repr(r.content) for r in made.grid.replies)
    logs = list(private_of(made.out).rglob("site.log"))
    assert any(canary(3) in log.read_text() for log in logs)  # the site's own log says what happened


def test_a_worker_that_dies_each_time_ends_the_run_with_the_clients_number(toml: str, tmp_path: Path) -> None:
    def die(message: Message) -> Message | None:
        if message.metadata.message_type == Learn.task and message.content["fedsynth"]["client"] == 1:
            return Message(Error(code=0, reason="The actor died"), reply_to=message)
        return None

    made = world(toml, "local", tmp_path, spoil=die)
    with pytest.raises(TooFewReplies, match="client 1 its worker failed: The actor died"):
        made.run()
    asked = [m.content["fedsynth"]["client"] for m in made.grid.requests_of(Learn.task)]
    assert sorted(asked) == [0, 1, 1, 1, 2]  # three tries


def test_a_worker_that_dies_costs_its_client_another_try_and_nothing_else(toml: str, tmp_path: Path) -> None:
    died: list[str] = []

    def die(message: Message) -> Message | None:
        task = message.metadata.message_type
        if task in (Synthesize.task, Learn.task) and message.content["fedsynth"]["client"] == 1 and task not in died:
            died.append(task)
            if task == Synthesize.task:  # after the work was done and stored: nobody heard of it
                made.grid.app(message, made.grid.contexts[message.metadata.dst_node_id])
            return Message(Error(code=0, reason="The actor died"), reply_to=message)
        return None

    made = world(toml, "fdkt", tmp_path / "killed", spoil=die)
    made.run()
    whole = world(toml, "fdkt", tmp_path / "whole")
    whole.run()
    assert sorted(died) == [Learn.task, Synthesize.task]
    figures = [[row for row in run.run_log.rows if row[4] == "accuracy"] for run in (made, whole)]
    assert figures[0] == figures[1] != []
    client, other = (
        fedsynth.clients.client_side.simulated_client(run.cell, 1, private_of(run.out), "simulated")
        for run in (made, whole)
    )
    assert client.ledger.spent() == other.ledger.spent()
    assert len(client.ledger.entries()) == len(other.ledger.entries())


def test_a_quorum_lets_a_run_go_on_without_a_client(toml: str, tmp_path: Path) -> None:
    def die(message: Message) -> Message | None:
        if "fedsynth" in message.content and message.content["fedsynth"]["client"] == 1:
            return Message(Error(code=0, reason="gone"), reply_to=message)
        return None

    made = world(toml.replace('llm = "scripted"', 'llm = "scripted"\nquorum = 0.5'), "fdkt", tmp_path, spoil=die)
    made.run()
    assert {r[3] for r in made.run_log.rows if r[4] == "accuracy"} == {0, 2}


def test_nothing_in_the_run_directory_is_private(fdkt: World) -> None:
    for path in fdkt.out.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [i for i in range(CLIENTS * ROWS * 2 + 3) if canary(i).encode() in data], path
    names = {p.relative_to(fdkt.out).parts[0] for p in fdkt.out.rglob("*") if p.is_file()}
    # Each with a declared origin; summary and versions come at the end.
    assert names <= {"events.jsonl", "corpora", "checkpoint", "tensorboard"}


def test_nor_is_anything_in_that_of_a_run_that_died_in_mid_round(
    toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world(toml, "fdkt", tmp_path)

    def dies(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(FDKT, "_best", dies)
        with pytest.raises(Died):
            made.run()
    kept = list((made.out / "checkpoint").rglob("exchange-1.zip"))
    assert len(kept) == 1
    assert b".jsonl" in kept[0].read_bytes()  # the drafts, as they came: nothing is compressed, the search sees them
    for path in made.out.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [i for i in range(CLIENTS * ROWS * 2 + 3) if canary(i).encode() in data], path


def test_it_goes_on_to_the_same_results(toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def llm() -> ScriptedLLM:
        return ScriptedLLM(
            answer=lambda prompt: f" text {len(prompt)} of it", likelihood=lambda p, c: -float(len(p + c))
        )

    whole, again = dies_everywhere(toml, tmp_path, monkeypatch, "fdkt", llm=llm, every=5)
    assert len(again) == 4
    assert whole.metric("accuracy")


@pytest.mark.parametrize("option", ["", "one_to_many = true"])
def test_one_to_many_shows_every_clients_drafts_to_all(toml: str, tmp_path: Path, option: str) -> None:
    made = world(toml.replace("shots = 2", f"shots = {CLIENTS}\n{option}"), "fdkt", tmp_path)
    kind, config = load_strategy(made.cell.scenario.strategy)
    strategy = kind(config, ServerSide(made.cell, LABELS, made.llm, made.llm, embed, made.run_log, lambda _: None))
    drafts = {
        client: Corpus(
            (f"heart of {client}", f"skin of {client}"), LABELS, Provenance.DP_SYNTHETIC, grants=(f"g{client}",)
        )
        for client in range(CLIENTS)
    }
    written = strategy._augmented(drafts, range(CLIENTS))
    prompts = made.llm.completed[-1]
    assert len(prompts) == (8 if option else CLIENTS * 8)
    for client in range(CLIENTS):
        wanted = set(range(CLIENTS)) if option else {client}
        for prompt in prompts if option else prompts[8 * client : 8 * client + 8]:
            assert {other for other in range(CLIENTS) if f"of {other}" in prompt} == wanted
        assert set(written[client].grants) == {f"g{other}" for other in wanted}  # whose guarantee it has


def test_top_k_and_the_judges_length_reach_those_who_write(toml: str, tmp_path: Path) -> None:
    asked = 'judge = "instruction"\njudge_tokens = 99\ndraft_top_k = 1\ntop_k = 3'
    made = world(toml.replace('judge = "likelihood"', asked), "no_dp", tmp_path)
    made.llm.answer = lambda prompt: "The selected texts are: 1" if "numbered list" in prompt else " some text"
    made.run()
    assert {request.top_k for request in requests(made, Synthesize).values()} == {1}
    for reply in made.replies(Synthesized):  # one token is left to draw: a label has one text
        assert len(set(zip(reply.corpus.prompts, reply.corpus.answers, strict=True))) <= len(LABELS)
    tried, judged, *wrote = [sampling for sampling, _ in made.llm.settings]
    assert (tried.max_new_tokens, tried.top_k) == (1, 3)  # before any client spends
    assert (judged.max_new_tokens, judged.top_k) == (99, 0)
    assert {sampling.top_k for sampling in wrote} == {3}


def test_where_no_top_k_is_said_requests_are_the_same_bytes_as_ever(fdkt: World) -> None:
    sent = [m for m in fdkt.sent() if m.metadata.message_type == Synthesize.task]
    assert sent
    assert all(b"top_k" not in bytes(part["fedsynth"]["payload"]) for m in sent for part in parted(m.content))  # type: ignore[arg-type]  # records of Flower
    assert all(sampling.top_k == 0 for sampling, _ in fdkt.llm.settings)


@pytest.mark.parametrize("option", ["one_to_many = true", ""])
def test_clients_that_give_no_drafts_spend_nothing_and_learn_from_those_of_others(
    toml: str, tmp_path: Path, option: str
) -> None:
    made = world(toml.replace("shots = 2", f"shots = 2\ndrafts_from = [0, 2]\n{option}"), "fdkt", tmp_path)
    made.run()

    def asked(kind: type[Any]) -> dict[int, Any]:
        sent = [m.content for m in made.sent() if m.metadata.message_type == kind.task]
        found = [unpack_request(part, kind) for content in sent for part in parted(content)]
        return {envelope.client: request for request, envelope, _ in found}

    assert set(asked(Synthesize)) == {0, 2}
    sides = [
        fedsynth.clients.client_side.simulated_client(made.cell, i, private_of(made.out), "simulated")
        for i in range(CLIENTS)
    ]
    assert sides[1].ledger.spent()[0] == 0 < sides[0].ledger.spent()[0]
    grants = {client: set(request.corpus.grants) for client, request in asked(Learn).items()}
    assert set(grants) == set(range(CLIENTS))
    assert grants[0]
    assert grants[1] == (grants[0] if option else set())


def test_clients_without_drafts_judge_those_of_others_by_votes(
    toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsynth.federation.run.privacy_report.ROWS_OF_A_PERSON", ())  # seconds for each client
    without_judge = toml.replace('judge = "likelihood"', "")
    option = f"shots = 2\n{VOTED}\nvotes_from = [1]\ndrafts_from = [0, 2]\nkeep = 1"
    made = world(without_judge.replace("shots = 2", option), "fdkt", tmp_path)
    made.run()
    [vote] = [unpack_request(m.content, Vote)[0] for m in made.sent() if m.metadata.message_type == Vote.task]
    assert len(vote.corpus) > 2
    kept = pd.read_parquet(next(made.out.rglob("voted-*.parquet")))
    assert kept["answer"].value_counts().max() == 1  # the one with the most votes of each label
    assert set(kept["prompt"]) <= set(vote.corpus.prompts)
    [learnt, *_] = [
        unpack_request(part, Learn)[0]
        for m in made.sent()
        if m.metadata.message_type == Learn.task
        for part in parted(m.content)
    ]
    assert len(learnt.corpus.grants) == 3  # of the two generators and the votes
    sides = [
        fedsynth.clients.client_side.simulated_client(made.cell, i, private_of(made.out), "simulated")
        for i in range(CLIENTS)
    ]
    terms = privacy_report([made.run_log])["terms"]
    assert terms["mechanism"].startswith("DP-SGD: ")
    assert "; Gaussian noise on every count of votes" in terms["mechanism"]
    assert terms["sampler"].startswith("Poisson: ")
    assert "none: all of the client's data takes part in votes" in terms["sampler"]
    assert [{row["plan"].get("mechanism") for row in s.ledger.entries() if "plan" in row} for s in sides] == [
        {None},
        {"votes"},
        {None},
    ]


def test_a_client_that_drafts_and_votes_keeps_one_budget_for_both(
    toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsynth.federation.run.privacy_report.ROWS_OF_A_PERSON", ())  # seconds for each client
    option = f"shots = 2\n{VOTED}\nvotes_from = [0, 1, 2]\nkeep = 1"
    shared = toml.replace('judge = "likelihood"', "").replace("shots = 2", option)
    made = world(shared.replace("[client]", "[client]\nvoting = { share = 0.25 }"), "fdkt", tmp_path)
    made.run()
    own = made.run_log.spending
    assert set(own) == set(range(CLIENTS))
    for client, said in own.items():
        ledger = fedsynth.clients.client_side.simulated_client(
            made.cell, client, private_of(made.out), "simulated"
        ).ledger
        assert problems(contents(ledger.path)) == []
        assert said.epsilon == pytest.approx(ledger.spent()[0], abs=1e-6)
        assert 7.9 < said.epsilon <= 8.0
        trained, voted = sorted(said.parts, key=lambda part: part.mechanism)
        assert (trained.mechanism, voted.mechanism) == ("gradients", "votes")
        assert 1.9 < voted.epsilon <= 2.0 < trained.epsilon < 8.0
    figures = privacy_report([made.run_log])["largest_over_clients"]
    assert figures["epsilon"] == max(said.epsilon for said in own.values())
    assert [part["mechanism"] for part in figures["mechanisms"]] == ["gradients", "votes"]
    assert figures["sigma"] is None
    assert f"({up(figures['epsilon'], 3):.3f}, 1e-05)-DP" in privacy_report([made.run_log])["line"]


def test_cells_pair_arms_by_public_seed(toml: str) -> None:
    by_arm = {c.arm: c for c in cells(from_toml(toml))}
    assert by_arm["local"].public_seed("learn", client=2) == by_arm["fdkt"].public_seed("learn", client=2)
    assert by_arm["fdkt"].public_seed("learn", client=1) != by_arm["fdkt"].public_seed("learn", client=2)


# ---- Public text comes first: warm starts, zero-shot texts, the gate on yields ----

WARM = "learning_rate = 1e-3, warm_start = { epochs = 2, batch = 4, learning_rate = 1e-2 }"


def warm(toml: str, more: str = "") -> str:
    return toml.replace("learning_rate = 1e-3", WARM, 1).replace("shots = 2", f"shots = 2\n{more}")


def requests(made: World, kind: type[Any]) -> dict[int, Any]:
    sent = [m.content for m in made.sent() if m.metadata.message_type == kind.task]
    found = [unpack_request(part, kind) for content in sent for part in parted(content)]
    return {envelope.client: request for request, envelope, _ in found}


def spent(made: World, client: int = 0) -> float:
    side = fedsynth.clients.client_side.simulated_client(made.cell, client, private_of(made.out), "simulated")
    return side.ledger.spent()[0]


def numbered() -> ScriptedLLM:
    """Each answer is another text: duplicates would be dropped."""
    count = iter(range(10_000))
    return ScriptedLLM(answer=lambda prompt: f" abcd dcba {next(count)}")


def test_all_clients_start_from_what_the_llm_wrote_without_demonstrations(toml: str, tmp_path: Path) -> None:
    made = world(warm(toml), "fdkt", tmp_path)
    made.llm = numbered()
    made.run()
    starts = [request.start for request in requests(made, Synthesize).values()]
    assert len(starts) == CLIENTS
    first = starts[0]
    assert all(np.array_equal(a, s.arrays[n]) for s in starts for n, a in first.arrays.items())
    assert all(s.grants == () for s in starts)
    assert any(np.abs(a).max() > 1e-3 for n, a in first.arrays.items() if "lora_B" in n)  # it was trained
    # The prompts that come before any client's work hold the label alone; those after drafts show some.
    assert made.llm.completed[0] == [f"{LABELS[i % 2]}:" for i in range(8)]
    assert any("\n" in prompt for prompt in made.llm.completed[-1])
    kinds = [m.metadata.message_type for m in made.sent()]
    assert Synthesize.task in kinds


def test_it_costs_no_privacy_and_changes_the_drafts(toml: str, tmp_path: Path) -> None:
    cold, started = world(toml, "fdkt", tmp_path / "cold"), world(warm(toml), "fdkt", tmp_path / "warm")
    started.llm = numbered()
    cold.run()
    started.run()
    assert spent(cold) == spent(started) > 0
    assert [s.epsilon for s in cold.run_log.spending.values()] == [s.epsilon for s in started.run_log.spending.values()]
    drafts = [next((m.out / "corpora").rglob("drafts-round1-client0.parquet")).read_bytes() for m in (cold, started)]
    assert drafts[0] != drafts[1]


def test_the_adapter_learns_the_texts_and_private_text_is_refused(model: str) -> None:
    settings = GeneratorTraining(max_length=48, warm_start=WarmStart(epochs=40, batch=4, learning_rate=1e-2))
    texts = Corpus(("abba cddc", "dada bcbc") * 4, LABELS * 4, Provenance.PUBLIC)
    fresh = new_adapter(model, rank=8, alpha=16.0, seed=1)
    found, loss = warm_start(Engine(), model, fresh, texts, settings, NO_CARD, seed=3)
    tokenizer = load_tokenizer(model)

    def loss_of(adapter: Adapter) -> float:
        """By hand: the code, then the text and its end."""
        head = token_ids(tokenizer, "heart:")
        head = head if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *head]
        body = token_ids(tokenizer, " abba cddc")
        example = Example((*head, *body, tokenizer.eos_token_id), len(head))
        return mean_loss(with_adapter(model, adapter).eval(), [example], pad=tokenizer.pad_token_id, batch=1)

    assert loss_of(found) < 0.5 * loss_of(fresh)
    assert loss < loss_of(fresh)
    with pytest.raises(ValueError, match="private"):
        warm_start(Engine(), model, fresh, replace(texts, provenance=Provenance.PRIVATE), settings, NO_CARD, seed=3)


def test_released_texts_leave_their_grants_on_the_adapter(model: str) -> None:
    texts = Corpus(("abba cddc",), ("heart",), Provenance.DP_SYNTHETIC, grants=("g1",))
    settings = GeneratorTraining(max_length=48, warm_start=WarmStart(epochs=1))
    fresh = new_adapter(model, rank=8, alpha=16.0, seed=1)
    assert warm_start(Engine(), model, fresh, texts, settings, NO_CARD, seed=3)[0].grants == ("g1",)


def test_a_start_of_another_model_is_refused_before_the_charge(toml: str, tmp_path: Path, model: str) -> None:
    made = world(toml, "fdkt", tmp_path)
    side = fedsynth.clients.client_side.simulated_client(made.cell, 0, private_of(made.out), "simulated")
    other = replace(new_adapter(model, rank=8, alpha=16.0, seed=1), base="another")
    for arm_side in (side, _without_guarantee(toml, tmp_path)):
        [problem] = _fails([synthesize(arm_side, Synthesize(2, 1.0, 1.0, 8, 1, start=other), "digest")])
        assert isinstance(problem, WrongAdapter)
        assert arm_side.ledger.spent()[0] == 0
        assert not arm_side.ledger.entries()


def _without_guarantee(toml: str, tmp_path: Path) -> Any:
    made = world(toml, "no_dp", tmp_path / "bare")
    return fedsynth.clients.client_side.simulated_client(made.cell, 0, private_of(made.out), "simulated")


def _fails(functions: list[Any]) -> list[Exception]:
    try:
        together(functions)
    except WrongAdapter as problem:
        return [problem]
    return []


def test_a_client_refuses_a_start_with_numbers_that_are_none(model: str) -> None:
    start = new_adapter(model, rank=8, alpha=16.0, seed=1)
    check_request(Synthesize(2, 1.0, 1.0, 8, 1, start=start), LABELS)
    name = next(iter(start.arrays))
    broken = replace(start, arrays={**start.arrays, name: np.full_like(start.arrays[name], np.nan)})
    with pytest.raises(Rejected):
        check_request(Synthesize(2, 1.0, 1.0, 8, 1, start=broken), LABELS)


def test_zero_shot_texts_stand_beside_drafts_or_written_texts(toml: str, tmp_path: Path) -> None:
    for arm, written in (("fdkt", True), ("dp_only", False)):
        made = world(warm(toml, "zero_shot = true"), arm, tmp_path / arm)
        made.llm = numbered()
        made.run()
        public = next((made.out / "corpora").rglob("zero_shot-round1-client*.parquet"))
        assert public.exists()
        learnt = requests(made, Learn)[1].corpus
        texts = list(learnt.prompts)
        assert texts[:8] == [f"abcd dcba {i}" for i in range(8)]  # the first that the LLM wrote, for everybody
        drafts = {t for r in made.replies(Synthesized) for t in r.corpus.prompts}
        rest = set(texts[8:])
        assert rest
        assert (rest <= {f"abcd dcba {i}" for i in range(8, 99)}) if written else rest <= drafts
        assert set(learnt.grants)  # the whole has the guarantee of its DP part


def test_a_floor_stops_a_run_whose_llm_does_not_write_before_anybody_spends(toml: str, tmp_path: Path) -> None:
    made = world(toml.replace("shots = 2", "shots = 2\nyield_floor = 0.6"), "fdkt", tmp_path)
    made.llm = ScriptedLLM(answer=lambda prompt: "" if "skin" in prompt else " a text")
    with pytest.raises(ValueError, match=r"zero-shot texts: 1 of 2 \(0.50\) passed the filters, of 1 labels.*0.6"):
        made.run()
    assert not requests(made, Synthesize)
    assert spent(made) == 0


def test_a_floor_stops_a_run_of_bad_drafts_before_the_llm_reads_them(toml: str, tmp_path: Path) -> None:
    poor = toml.replace("shots = 2", "shots = 2\nyield_floor = 0.99").replace("min_words = 1", "min_words = 2")
    made = world(poor, "fdkt", tmp_path)
    made.llm = numbered()
    with pytest.raises(ValueError, match=r"the clients' drafts: \d+ of 36 .*most were dropped as '"):
        made.run()
    assert len(made.llm.completed) == 1  # the rehearsal of the prompts
    assert spent(made) > 0
    assert [r for r in made.run_log.rows if r[4] == "yield/drafts/in"]  # the funnel is on record

    going = world(poor.replace("0.99", "0.0"), "fdkt", tmp_path / "on")
    going.llm = numbered()
    going.run()
    assert len(going.llm.completed) == 1  # without a floor nothing is rehearsed: these are the texts


VOTED = 'judge = "votes"\none_to_many = true'


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[client]", "[client]\nscorer_training = { warm_start = {} }"), "a scorer writes no text"),
        (("shots = 2", 'shots = 2\ndemonstrations = "none"\nzero_shot = true'), "stands beside drafts"),
        (("shots = 2", "shots = 2\nyield_floor = 1.5"), "yield_floor must lie in"),
        (("learning_rate = 1e-3", "learning_rate = 1e-3, warm_start = { epochs = 0 }"), "epochs"),
        (("shots = 2", 'shots = 2\njudge = "votes"\none_to_many = true'), "belong together"),
        (("shots = 2", "shots = 2\nvotes_from = [1]"), "belong together"),
        (("shots = 2", 'shots = 2\njudge = "votes"\nvotes_from = [1]'), "one_to_many = true"),
        (("shots = 2", f"shots = 2\n{VOTED}\nvotes_from = [1]"), r"clients \[1\] would give drafts and votes"),
        (("shots = 2", f"shots = 2\n{VOTED}\nvotes_from = [9]\ndrafts_from = [0]"), "names clients from 0 to"),
        (("[client]", "[client]\nvoting = { share = 1.0 }"), r"share must lie in \[0, 1\)"),
        (("[client]", "[client]\nvoting = { share = 0.5 }"), 'say strategy.judge = "votes"'),
    ],
)
def test_settings_that_make_no_sense_are_named(toml: str, change: tuple[str, str], said: str) -> None:
    before = toml.replace('judge = "likelihood"', "") if "votes" in change[1] else toml
    text = before.replace(*change, 1).replace('llm = "scripted"', 'llm = "assets:tiny-llm"')
    with pytest.raises(BadValue, match=said):
        check(from_toml(text.split("[arms.no_demonstrations]")[0]))


def test_a_method_that_sends_no_start_refuses_the_key() -> None:
    scenario = from_toml((SCENARIOS / "hospitals-knowledgesg.toml").read_text())
    training = replace(scenario.client.generator_training, warm_start=WarmStart())
    client: Client = replace(scenario.client, generator_training=training)
    with pytest.raises(BadValue, match="KnowledgeSG sends no such start"):
        KnowledgeSG.check(KnowledgeSGOptions(), replace(scenario, client=client))


def test_arms_that_ask_the_same_of_a_client_share_one_training(
    toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedsynth.clients.batched_training as module

    fits: list[int] = []
    real = module.train_generator
    monkeypatch.setattr(module, "train_generator", lambda *a, **k: fits.append(1) or real(*a, **k))

    def drafts(arm: str, text: str = toml) -> tuple[int, list[bytes], World]:
        before, made = len(fits), world(text, arm, tmp_path)
        made.run()
        folder = made.out / "corpora" / arm
        files = sorted(folder.rglob("drafts-*.parquet"))
        return len(fits) - before, [pq.read_table(file).to_pylist() for file in files], made

    alone, written, first = drafts("fdkt")
    again, same, second = drafts("dp_only")
    assert (alone, again) == (CLIENTS, 0)
    assert written == same
    assert len(written) == CLIENTS
    assert spent(first) == spent(second) > 0  # each arm's ledger has its own charge
    assert {stored.name for stored in private_of(first.out).iterdir()} >= {"shared"}
    shutil.rmtree(private_of(first.out) / "shared")  # as if a kill had come before they were stored
    shutil.rmtree(private_of(first.out) / "no_filter", ignore_errors=True)
    anew, equal, _ = drafts("no_filter")
    assert (anew, equal) == (CLIENTS, written)
    spends_less = toml.replace(
        "[arms.no_demonstrations]", "[arms.less]\nclient.budget.epsilon = 2.0\n[arms.no_demonstrations]"
    )
    trained, other, _ = drafts("less", spends_less)
    assert trained == CLIENTS
    assert other != written
