"""Flower's own strategies on our client app: what they send, get, make of it, and what it costs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedProx, FedTrimmedAvg, Krum, Result
from inprocess import canary, instructions, play
from local import LocalGrid

from fedsynth.clients.app import client_app, simulation
from fedsynth.clients.client_side import ClientSide, simulated_client
from fedsynth.clients.flower_compat import adapter_of, arrays_of, chosen_cell, common_start, largest_epsilon
from fedsynth.federation.messages import Finetune
from fedsynth.federation.run.directory import private_of
from fedsynth.lora import Adapter, average
from fedsynth.models.adapters import WrongAdapter, with_adapter
from fedsynth.privacy.plan import epsilon
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.scenario.schema import Cell
from fedsynth.simulation.launch import AppRun, launch
from fedsynth.training.dp_training import Training, next_token_losses, train_generator, trainable
from fedsynth.training.examples import Example

LORA_AVERAGE = "fedsynth.strategies.lora_avg:LoraAverage"
Tensors = dict[str, Any]
Tamper = Callable[[int, Tensors], Tensors]


def tensors(arrays: ArrayRecord) -> Tensors:
    return {name: array.numpy().copy() for name, array in arrays.items()}


def distance(one: Tensors, other: Any) -> float:
    return math.sqrt(sum(float(((one[n].astype(np.float64) - other[n]) ** 2).sum()) for n in one))


def same(one: Any, other: Any) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[n], other[n]) for n in one)


@dataclass
class Stock:
    """A world for Flower's own strategies, and what its clients sent in each round."""

    toml: str
    out: Path
    nodes: int
    tamper: Tamper = lambda _, sent: sent
    more: dict[str, Any] = field(default_factory=dict)
    opener: Any = simulation
    sent: dict[tuple[int, int], Tensors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.app = client_app(self.opener)
        keeps: Any = self._answer
        self.grid = LocalGrid(keeps, self.nodes, {"scenario-toml": self.toml, "out-dir": str(self.out), **self.more})

    def _answer(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        if message.metadata.message_type == "train" and not reply.has_error():
            client = int(str(context.node_config["partition-id"]))
            reply.content["arrays"] = ArrayRecord(
                {n: Array(a) for n, a in self.tamper(client, tensors(reply.content.array_records["arrays"])).items()}
            )
            # A copy: the trimmed mean takes replies apart.
            number = int(str(message.content.config_records["config"]["server-round"]))
            self.sent[number, client] = tensors(reply.content.array_records["arrays"])
        return reply

    @property
    def cell(self) -> Cell:
        return chosen_cell(next(iter(self.grid.contexts.values())))

    @property
    def start(self) -> Adapter:
        return common_start(self.cell)

    def client(self, index: int) -> ClientSide:
        return simulated_client(self.cell, index, private_of(self.out), "simulated")

    def play(
        self,
        kind: type[FedAvg] = FedAvg,
        rounds: int = 2,
        arrays: Any = None,
        measured: bool = False,
        **options: Any,
    ) -> Result:
        strategy = kind(fraction_evaluate=float(measured), min_available_nodes=self.nodes, **options)
        return strategy.start(self.grid, ArrayRecord() if arrays is None else arrays, num_rounds=rounds)

    def ask(self, kind: str = "train", node: int = 0, arrays: Any = None, **config: Any) -> Message:
        """One message by hand."""
        records = {"arrays": ArrayRecord() if arrays is None else arrays, "config": ConfigRecord(config)}
        return self.send(RecordDict(records), kind, node)

    def send(self, content: RecordDict, kind: str = "train", node: int = 0) -> Message:
        to = list(self.grid.contexts)[node]
        [reply] = self.grid.send_and_receive([Message(content, message_type=kind, dst_node_id=to)])
        return reply


def stock(tmp_path: Path, *, clients: int = 3, rows: int = 36, rounds: int = 2, **more: Any) -> Stock:
    told = {k: more.pop(k) for k in ("guarantee",) if k in more}
    steps = more.pop("steps", 3)
    toml = instructions(tmp_path, LORA_AVERAGE, clients=clients, rows=rows, rounds=rounds, **told)
    return Stock(toml.replace("steps = 3", f"steps = {steps}"), tmp_path / "run", clients, **more)


def code(reply: Message) -> str | None:
    return reply.error.reason if reply.has_error() else None


def everything(reply: Message) -> bytes:
    """All that a reply holds, its metadata included."""
    parts = [repr(reply.metadata.__dict__)]
    if reply.has_error():
        return "".join([*parts, repr(reply.error)]).encode()
    held = reply.content
    parts += [repr(dict(r)) for r in (*held.config_records.values(), *held.metric_records.values())]
    arrays = [repr(name).encode() + array.data for r in held.array_records.values() for name, array in r.items()]
    return b"".join(["".join(parts).encode(), *arrays])


# ---- what is averaged ----


def test_fedavg_makes_the_mean_of_the_replies_weighted_by_records(tmp_path: Path) -> None:
    world = stock(tmp_path, rows=41, guarantee="none")
    first = tensors(world.play(rounds=1).arrays)
    result = world.play()
    counts = [len(world.client(i).train) for i in range(3)]
    assert len(set(counts)) > 1
    for number, found in ((1, first), (2, tensors(result.arrays))):
        replies = [replace(world.start, arrays=world.sent[number, client]) for client in range(3)]
        expected = average(replies, counts).arrays
        assert all(np.allclose(found[n], expected[n], rtol=1e-6, atol=1e-8) for n in expected)
    assert 0 < distance(first, world.start.arrays) < distance(tensors(result.arrays), world.start.arrays)


def test_fedavg_gives_bit_for_bit_what_our_own_average_gives(tmp_path: Path) -> None:
    # Two clients with as many records: then Flower's float32 mean rounds as ours does.
    world = stock(tmp_path, clients=2, rows=30, guarantee="none")
    result = world.play()
    ours = play(world.toml, tmp_path / "ours")
    assert len({len(world.client(i).train) for i in range(2)}) == 1
    answers = [a.adapter.arrays for a in ours.replies(Finetune)]
    assert all(same(world.sent[n, h], answers[2 * (n - 1) + h]) for n in (1, 2) for h in range(2))
    assert same(tensors(result.arrays), ours.states[-1].adapter.arrays)


def test_under_dp_the_first_round_has_the_noise_of_our_own_average(tmp_path: Path) -> None:
    world = stock(tmp_path, clients=2, rows=30)
    world.play(rounds=1)
    ours = play(world.toml, tmp_path / "ours")
    assert all(same(world.sent[1, h], ours.replies(Finetune)[h].adapter.arrays) for h in range(2))


def test_no_arrays_mean_the_common_start(tmp_path: Path) -> None:
    one = stock(tmp_path, guarantee="none")
    other = Stock(one.toml, tmp_path / "other", 3)
    one.play(rounds=1)
    other.play(rounds=1, arrays=arrays_of(other.start))
    assert all(same(one.sent[1, client], other.sent[1, client]) for client in range(3))


@pytest.mark.parametrize("kind", [FedMedian, FedAdam])
def test_other_strategies_that_combine_arrays_run(tmp_path: Path, kind: type[FedAvg]) -> None:
    world = stock(tmp_path, guarantee="none")
    result = world.play(kind, arrays=arrays_of(world.start))
    assert adapter_of(result.arrays, world.start).rank == 2
    assert distance(tensors(result.arrays), world.start.arrays) > 0
    assert set(world.sent) == {(n, h) for n in (1, 2) for h in range(3)}


# ---- FedProx ----


@pytest.mark.parametrize("guarantee", ["none", "dp"])
def test_fedprox_pulls_towards_the_start(tmp_path: Path, guarantee: str) -> None:
    moved = []
    for number, mu in enumerate((0.0, 10.0, 1000.0)):
        world = stock(tmp_path, guarantee=guarantee, rounds=1, steps=12)
        world = Stock(world.toml, tmp_path / f"run-{number}", 3)
        world.play(FedProx, rounds=1, proximal_mu=mu)
        moved.append(np.mean([distance(world.sent[1, client], world.start.arrays) for client in range(3)]))
    assert moved[0] > 1.2 * moved[1] > 1.2 * 1.2 * moved[2] > 0, moved


def test_fedprox_without_a_pull_is_fedavg(tmp_path: Path) -> None:
    world = stock(tmp_path)
    world.play(FedProx, rounds=1, proximal_mu=0.0)
    again = Stock(world.toml, tmp_path / "again", 3)
    again.play(FedAvg, rounds=1)
    assert all(same(world.sent[key], again.sent[key]) for key in again.sent)


def test_the_pull_costs_no_privacy(tmp_path: Path) -> None:
    world = stock(tmp_path)
    world.play(FedProx, proximal_mu=1.0)
    [grant, *_] = [e for e in world.client(0).ledger.entries() if e["kind"] == "grant"]
    assert grant["binding"]["plan"] == world.client(0).plan().digest()
    assert world.client(0).ledger.spent()[0] == pytest.approx(epsilon(world.client(0).plan(), 1e-5), abs=1e-6)


class Always:
    """Every unit in every batch."""

    def normals(self, count: int) -> Any:
        raise AssertionError

    def poisson_mask(self, count: int, rate: float) -> Any:
        return np.ones(count, np.bool_)


def test_the_proximal_term_is_half_mu_times_the_squared_distance(tmp_path: Path) -> None:
    start = stock(tmp_path).start
    settings = GeneratorTraining(steps=4, learning_rate=1e-2, max_length=16)
    examples = [Example(tuple(range(5 + i, 15 + i)), start=2) for i in range(3)]
    trained = with_adapter(tiny.folder(), start)
    slots = [(e,) for e in examples]
    training = Training(
        slots,
        rate=1.0,
        expected_batch_size=3,
        steps=4,
        clip_norm=math.inf,
        noise_multiplier=0.0,
        randomness=Always(),
        proximal=2.0,
    )
    train_generator(trained, training, settings, pad=0)

    model = with_adapter(tiny.folder(), start).train()
    weights, begins = trainable(model), [w.detach().clone() for w in trainable(model)]
    optimizer = torch.optim.Adam(weights, lr=1e-2, betas=(0.9, 0.99))
    for step in range(4):
        pull = sum(((w - b) ** 2).sum() for w, b in zip(weights, begins, strict=True))
        loss = next_token_losses(model, examples, 0).mean() + 2.0 / 2 * pull
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - 0.9 * step / 4)
        optimizer.step()
    for found, expected in zip(trainable(trained), weights, strict=True):
        assert torch.allclose(found, expected, atol=2e-5)


# ---- one bad client ----


def huge(client: int, sent: Tensors) -> Tensors:
    return {name: array * 1e6 for name, array in sent.items()} if client == 0 else sent


def test_one_poisoned_client_spoils_fedavg(tmp_path: Path) -> None:
    world = stock(tmp_path, clients=4, rows=40, guarantee="none", tamper=huge)
    assert distance(tensors(world.play(rounds=1).arrays), world.start.arrays) > 1e5


def test_krum_survives_a_poisoned_client(tmp_path: Path) -> None:
    world = stock(tmp_path, clients=4, rows=40, guarantee="none", tamper=huge)
    found = tensors(world.play(Krum, num_malicious_nodes=1).arrays)
    assert any(same(found, world.sent[2, client]) for client in (1, 2, 3))


def test_a_trimmed_mean_survives_a_poisoned_client(tmp_path: Path) -> None:
    world = stock(tmp_path, clients=4, rows=40, guarantee="none", tamper=huge)
    found = tensors(world.play(FedTrimmedAvg, beta=0.25).arrays)
    for name, array in found.items():
        honest = np.stack([world.sent[2, client][name] for client in (1, 2, 3)])
        assert (honest.min(0) - 1e-7 <= array).all()
        assert (array <= honest.max(0) + 1e-7).all()
    assert 0 < distance(found, world.start.arrays) < 1


# ---- privacy ----


def test_all_rounds_are_one_budget_and_one_more_is_refused(tmp_path: Path) -> None:
    world = stock(tmp_path)
    result = world.play(rounds=3, measured=True, train_metrics_aggr_fn=largest_epsilon)
    plan = world.client(1).plan()
    assert plan.rounds == 2
    assert set(world.sent) == {(n, h) for n in (1, 2) for h in range(3)}
    refused = [r for r in world.grid.replies if r.has_error()]
    assert [(r.error.code, r.error.reason) for r in refused] == 3 * [(2, "budget_exhausted")]
    for number in (1, 2):
        figures = result.train_metrics_clientapp[number]
        assert figures["epsilon"] == pytest.approx(epsilon(plan, 1e-5))
        assert figures["delta"] == 1e-5
    assert 3 not in result.train_metrics_clientapp
    assert world.client(1).ledger.spent()[0] == pytest.approx(epsilon(plan, 1e-5), abs=1e-6)
    assert epsilon(plan, 1e-5) <= 8.0
    losses = [result.evaluate_metrics_clientapp[number]["loss"] for number in (2, 3)]
    assert losses[0] == pytest.approx(losses[1])  # the arrays stay; Flower sums in the order of replies


def test_each_round_is_a_grant_and_a_repeated_message_gets_the_same_bytes(tmp_path: Path) -> None:
    world = stock(tmp_path)
    first, again, second = (world.ask(**{"server-round": number}) for number in (1, 1, 2))
    grants = [e["id"] for e in world.client(0).ledger.entries() if e["kind"] == "grant"]
    told = [r.content.config_records["privacy"]["grants"] for r in (first, again, second)]
    assert told == [[grants[0]], [grants[0]], [grants[1]]]
    assert same(tensors(first.content["arrays"]), tensors(again.content["arrays"]))
    assert not same(tensors(first.content["arrays"]), tensors(second.content["arrays"]))


def test_other_arrays_or_another_pull_in_the_same_round_are_another_request(tmp_path: Path) -> None:
    world = stock(tmp_path)
    told = {"server-round": 1}
    moved = arrays_of(replace(world.start, arrays={n: a + 1e-3 for n, a in world.start.arrays.items()}))
    replies = [world.ask(**told), world.ask(**told, **{"proximal-mu": 0.5}), world.ask(arrays=moved, **told)]
    assert [code(r) for r in replies] == [None, None, "budget_exhausted"]  # two are paid for
    losses = [world.ask("evaluate", arrays=arrays, **told).content["metrics"]["loss"] for arrays in (None, moved)]
    assert losses[0] != losses[1]


def test_without_a_guarantee_every_reply_and_the_ledger_say_so(tmp_path: Path) -> None:
    world = stock(tmp_path, guarantee="none")
    result = world.play(rounds=1, train_metrics_aggr_fn=largest_epsilon)
    assert result.train_metrics_clientapp[1]["epsilon"] == math.inf
    replies = [r.content.config_records["privacy"] for r in world.grid.replies if "privacy" in r.content]
    assert [(p["guarantee"], p["grants"], "epsilon" in p) for p in replies] == 3 * [("none", [], False)]
    assert all(world.client(i).ledger.spent()[0] == math.inf for i in range(3))
    assert all(world.client(i).waived for i in range(3))


@pytest.mark.parametrize("epsilon", [None, math.nan, -1.0, "7.9"])
def test_what_is_no_epsilon_is_no_bound(epsilon: Any) -> None:
    said = [{"epsilon": 2.0, "delta": 1e-5}, {"delta": 1e-6} | ({} if epsilon is None else {"epsilon": epsilon})]
    replies = [RecordDict({"privacy": ConfigRecord(dict(facts))}) for facts in said]
    for request in (replies, replies[::-1]):
        found = largest_epsilon(request, "num-examples")
        assert (found["epsilon"], found["delta"]) == (math.inf, 1e-5)


def test_outside_simulations_no_test_figure_and_no_open_release_leaves(tmp_path: Path) -> None:
    def site(context: Context, envelope: Any) -> ClientSide:
        return replace(simulation(context, envelope), simulated=False)

    told = {"server-round": 1}
    world = stock(tmp_path, opener=site)
    assert code(world.ask("evaluate", **told)) == "not_allowed"
    assert world.ask(**told).content.config_records["privacy"]["simulated"] is False
    bare = Stock(world.toml.replace('guarantee = "dp"', 'guarantee = "none"'), tmp_path / "bare", 3, opener=site)
    assert code(bare.ask(**told)) == "not_allowed"
    assert bare.client(0).ledger.entries() == []


def test_no_text_of_a_record_stands_in_any_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = stock(tmp_path)
    world.play(rounds=3, measured=True)  # the last round's training is refused
    private = world.client(0).train.prompts[0]
    assert any(canary(row) in private for row in range(72))

    def crash(*_: Any, **__: Any) -> Any:
        raise ValueError(f"cannot read {private!r}")

    monkeypatch.setattr("fedsynth.clients.finetune.encode_slots", crash)
    assert code(world.ask("evaluate", **{"server-round": 4})) == "failed"
    assert private in (world.client(0).work / "site.log").read_text()  # there the reason stands

    def found(replies: list[Message]) -> list[int]:
        crossed = b"".join(map(everything, replies))
        return [row for row in range(72) if canary(row).encode() in crossed]

    assert len(world.grid.replies) == 19
    assert found(world.grid.replies) == []
    leak = deepcopy(world.grid.replies[0])
    leak.content["more"] = MetricRecord({canary(7): 1.0})
    assert found([leak]) == [7]  # the search would find one


# ---- what is refused ----


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"server-round": 1, "lr": 0.1}, "bad_order"),
        ({}, "bad_order"),
        ({"server-round": "1"}, "bad_order"),
        ({"server-round": 1, "proximal-mu": -1.0}, "bad_order"),
        ({"server-round": 1, "proximal-mu": math.nan}, "bad_order"),
        ({"server-round": 1, "proximal-mu": "much"}, "bad_order"),
    ],
)
def test_a_config_that_clients_do_not_keep_to_is_refused(tmp_path: Path, config: Any, said: str) -> None:
    world = stock(tmp_path)
    assert code(world.ask(**config)) == said
    assert world.client(0).ledger.entries() == []


def test_arrays_that_are_no_adapter_of_this_model_are_refused(tmp_path: Path) -> None:
    world = stock(tmp_path)
    told = {"server-round": 1}
    name, array = next(iter(world.start.arrays.items()))
    other = {
        "wrong_adapter": [
            {"weight": array},
            {**world.start.arrays, name: array[:1]},
            {**world.start.arrays, name: np.zeros(array.shape, np.int64)},
        ],
        "bad_order": [{**world.start.arrays, name: array * np.nan}],
    }
    for expected, cases in other.items():
        for case in cases:
            arrays = ArrayRecord({n: Array(np.asarray(a)) for n, a in case.items()})
            assert code(world.ask(arrays=arrays, **told)) == expected
            assert code(world.ask("evaluate", arrays=arrays, **told)) == expected
    more = RecordDict({"a": ArrayRecord(), "b": ArrayRecord(), "config": ConfigRecord(told)})
    assert code(world.send(more)) == "bad_order"
    assert code(world.send(RecordDict({"config": ConfigRecord(told)}))) == "bad_order"
    assert world.client(0).ledger.entries() == []


def test_every_client_needs_a_supernode_of_its_own(tmp_path: Path) -> None:
    toml = stock(tmp_path).toml
    few, many = Stock(toml, tmp_path / "few", 2), Stock(toml, tmp_path / "many", 4)
    assert [code(few.ask(node=n, **{"server-round": 1})) for n in range(2)] == ["bad_order", "bad_order"]
    assert [code(many.ask(node=n, **{"server-round": 1})) for n in (2, 3)] == [None, "bad_order"]


# ---- cells, tasks, arrays ----


def test_run_config_names_the_cell(tmp_path: Path) -> None:
    toml = stock(tmp_path).toml.replace("seeds = [0]", "seeds = [4, 5]") + '\n[arms.bare.client]\nguarantee = "none"\n'
    first = Stock(toml, tmp_path / "first", 3)
    assert (first.cell.arm, first.cell.seed) == ("main", 4)
    second = Stock(toml, tmp_path / "second", 3, more={"arm": "bare", "seed": 5})
    assert second.ask(**{"server-round": 1}).content.config_records["privacy"]["guarantee"] == "none"
    assert second.client(0).run == "simulated/bare/5"
    third = Stock(toml, tmp_path / "third", 3, more={"arm": "none"})
    assert code(third.ask(**{"server-round": 1})) == "bad_order"


def test_a_generator_of_classes_is_trained_and_has_a_loss(tmp_path: Path) -> None:
    rows = [{"text": f"note {i} of {label}", "label": label} for i in range(24) for label in ("ward", "ruin")]
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    toml = f"""
name = "classes"
rounds = 2
[strategy]
use = "fedsynth.strategies.local:LocalOnly"
[data]
source = "{tmp_path / "rows.csv"}"
labels = ["ward", "ruin"]
clients = 2
[client]
generator = "{tiny.folder()}"
task_model = "{tiny.folder()}"
guarantee = "none"
[client.generator_training]
expected_batch_size = 8
steps = 10
learning_rate = 5e-3
rank = 2
alpha = 4.0
max_length = 48
[server]
llm = "scripted"
"""
    world = Stock(toml, tmp_path / "run", 2)
    losses = [result["loss"] for _, result in sorted(world.play(measured=True).evaluate_metrics_clientapp.items())]
    before = world.ask("evaluate", **{"server-round": 9}).content.metric_records["metrics"]
    assert set(before) == {"num-examples", "loss"}
    assert before["num-examples"] == len(world.client(0).test)
    assert losses[1] < losses[0] < before["loss"]


def test_adapters_become_arrays_and_come_back(tmp_path: Path) -> None:
    start = stock(tmp_path).start
    back = adapter_of(arrays_of(replace(start, grants=("g",))), start)
    assert same(back.arrays, start.arrays)
    assert (list(back.arrays), back.rank, back.alpha, back.base) == (list(start.arrays), 2, 4.0, start.base)
    assert back.grants == ()  # a mean of released adapters does not say which
    wide = ArrayRecord({n: Array(start.arrays[n].astype(np.float64)) for n in reversed(start.arrays)})
    assert same(adapter_of(wide, start).arrays, start.arrays)
    with pytest.raises(WrongAdapter, match="tensors"):
        adapter_of(ArrayRecord(), start)


# ---- a real run ----

PAGE = Path(__file__).parent.parent / "docs" / "flower-strategies.md"
PROBE = """
import json
from pathlib import Path

from flwr.serverapp import Grid, ServerApp
from stock import server

app = ServerApp()

@app.main()
def main(grid: Grid, context) -> None:
    said = []
    inner = type(grid).send_and_receive

    def listened(self, messages, **more):
        replies = list(inner(self, messages, **more))
        said.extend(r.error.reason if r.has_error() else sorted(r.content) for r in replies)
        return replies

    type(grid).send_and_receive = listened
    server.app(grid, context)
    out = Path(context.run_config["out-dir"])
    (out / "said.json").write_text(json.dumps(said))
    (out / "status.json").write_text(json.dumps({"status": "completed"}))
"""


@pytest.mark.full
def test_the_page_on_flowers_strategies_runs(tmp_path: Path) -> None:
    text = PAGE.read_text()
    client, server = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    [project] = re.findall(r"^```toml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    package = tmp_path / "app" / "stock"
    package.mkdir(parents=True)
    # One round more than planned, and a server that notes what came.
    server = server.replace("num_rounds=scenario.rounds", "num_rounds=scenario.rounds + 1")
    files = {"__init__": "", "client": client, "server": server, "probe": PROBE}
    for name, source in files.items():
        (package / f"{name}.py").write_text(source)
    (tmp_path / "app" / "pyproject.toml").write_text(project.replace("stock.server:app", "stock.probe:app"))
    toml = instructions(tmp_path, LORA_AVERAGE, clients=2, rows=30, rounds=1)
    out = tmp_path / "run"
    config = {"scenario-toml": toml, "out-dir": str(out)}
    launch(AppRun(app=tmp_path / "app", run_config=config, supernodes=2, workers=1, out=out, logs=tmp_path / "logs"))
    said = json.loads((out / "said.json").read_text())
    assert said[:4] == 2 * [["arrays", "metrics", "privacy"]] + 2 * [["metrics"]]
    assert said[4:6] == ["budget_exhausted", "budget_exhausted"]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert "epsilon" in (tmp_path / "logs" / "flower.log").read_text()
