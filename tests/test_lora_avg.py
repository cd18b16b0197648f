"""Averages of adapters in process: what is sent, what is averaged, what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from inprocess import Played, canary, instructions, play
from spelled import spelled

from fedsynth.clients import app
from fedsynth.clients.client_side import COVERED
from fedsynth.clients.finetune import finetune
from fedsynth.federation.messages import Adopt, Evaluate, Finetune
from fedsynth.federation.nodes import TooFewReplies
from fedsynth.federation.run.privacy_report import privacy_line
from fedsynth.lora import Adapter, average, only_b, stacked, update
from fedsynth.models.adapters import WrongAdapter, new_adapter, with_adapter
from fedsynth.models.hub import weights_hash
from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.plan import epsilon

STRATEGY = "fedsynth.strategies.lora_avg:LoraAverage"


def played(tmp_path: Path, options: str = "", **more: object) -> Played:
    return play(instructions(tmp_path, STRATEGY, options=options, **more), tmp_path)


def same(one: Adapter, other: Adapter) -> bool:
    return all(np.array_equal(one.arrays[n], other.arrays[n]) for n in {*one.arrays, *other.arrays})


def test_the_global_adapter_is_the_mean_weighted_by_records(tmp_path: Path) -> None:
    run = played(tmp_path, rows=41)
    answers = run.replies(Finetune)
    records = [a.records for a in answers]
    assert records == [len(run.client(i).train) for i in range(3)]
    assert len(set(records)) > 1
    expected = average([a.adapter for a in answers], records)
    assert same(run.states[-1].adapter, expected)
    assert all(same(request.adapter, expected) for request in run.requests(Adopt))


def test_all_clients_start_from_one_adapter_and_rounds_go_on_from_the_mean(tmp_path: Path) -> None:
    run = played(tmp_path, rounds=2)
    first, second = run.requests(Finetune)[:3], run.requests(Finetune)[3:]
    assert all(same(request.start, first[0].start) for request in first)
    assert all(not array.any() for name, array in first[0].start.arrays.items() if "lora_B" in name)
    assert all(same(request.start, run.states[0].adapter) for request in second)
    assert len({request.seed for request in first + second}) == 6


def test_frozen_a_sends_b_alone_and_averages_the_product_exactly(tmp_path: Path) -> None:
    run = played(tmp_path, 'aggregation = "frozen_a"')
    start = run.requests(Finetune)[0].start
    answers = run.replies(Finetune)
    assert all(all(map(only_b, a.adapter.arrays)) for a in answers)
    assert all(any(array.any() for array in a.adapter.arrays.values()) for a in answers)
    ends = [replace(a.adapter, arrays={**start.arrays, **a.adapter.arrays}) for a in answers]
    assert len(run.states[-1].adapter.grants) == 3  # A is public and never trained: the guarantee is that of the B's
    expected = update(stacked(ends, [a.records for a in answers]))
    found = update(run.states[-1].adapter)
    assert all(np.allclose(found[m], expected[m], atol=1e-6) for m in expected)


def test_the_product_is_averaged_up_to_the_error_that_is_reported(tmp_path: Path) -> None:
    run = played(tmp_path, 'aggregation = "product"')
    answers = run.replies(Finetune)
    expected, found = update(stacked([a.adapter for a in answers], [1, 1, 1])), update(run.states[-1].adapter)
    whole = sum(float((expected[m] ** 2).sum()) for m in expected)
    missed = sum(float(((found[m] - expected[m]) ** 2).sum()) for m in expected)
    [error] = run.metric("aggregation/error")
    assert error == pytest.approx((missed / whole) ** 0.5, rel=1e-3)


def test_a_site_refuses_to_be_measured_before_it_reads_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = app.simulated_client
    monkeypatch.setattr(app, "simulated_client", lambda *a: replace(opened(*a), allowed=COVERED))

    def never(*_: object) -> None:
        raise AssertionError("a test text was read: one that is too long would be told by the code of the refusal")

    monkeypatch.setitem(app.FUNCTIONS, Evaluate, never)
    with pytest.raises(TooFewReplies, match="refused: not_allowed"):
        played(tmp_path)


def test_what_was_paid_beyond_the_plan_is_stated(tmp_path: Path) -> None:
    found = played(tmp_path).client(0)
    roomy = Ledger(tmp_path / "roomy.sqlite", Account("records", None), keys=lambda counter, _: bytes([counter] * 32))
    client, plan = replace(found, ledger=roomy), found.plan()
    client.ledger.charge(plan, client.binding("as planned", plan), client.run)
    assert client.charged(plan) == plan
    client.ledger.charge(plan, client.binding("one more", plan), client.run)
    assert client.charged(plan) == replace(plan, rounds=plan.rounds + 1)


def test_rounds_of_k_steps_cost_what_one_run_of_all_steps_costs(tmp_path: Path) -> None:
    run = played(tmp_path, rounds=2)
    said = run.replies(Finetune)[-1].statement
    plan = run.client(2).plan()
    assert (plan.steps, plan.rounds, said.steps) == (3, 2, 6)
    together = replace(plan, steps=6, rounds=1)
    assert said.epsilon == pytest.approx(epsilon(together, 1e-5), abs=1e-6)
    assert said.epsilon <= 8.0
    assert run.client(2).ledger.spent()[0] == pytest.approx(said.epsilon, abs=1e-6)


def test_without_a_guarantee_the_run_says_so_and_prints_no_epsilon(tmp_path: Path) -> None:
    run = played(tmp_path, guarantee="none")
    assert all(a.statement.guarantee == "none" and a.adapter.grants == () for a in run.replies(Finetune))
    assert "no differential privacy guarantee: adapters left" in privacy_line([run.run_log])


def test_no_text_of_a_record_crosses(tmp_path: Path) -> None:
    run = played(tmp_path)
    crossed = b"".join(
        m.content["fedsynth"]["payload"] for m in (*run.grid.requests, *run.grid.replies) if "fedsynth" in m.content
    )
    assert not [row for row in range(72) if canary(row).encode() in crossed]
    assert canary(0) in spelled([run.client(i).site for i in range(3)])  # they are there to be found


def test_adapters_of_some_layers_with_checkpoints_are_trained_averaged_and_measured(tmp_path: Path) -> None:
    asked = 'max_length = 96\nlora_targets = ["q_proj", "v_proj"]\ngradient_checkpointing = true'
    toml = instructions(tmp_path, STRATEGY)
    assert toml.count("max_length = 96") == 1
    run = play(toml.replace("max_length = 96", asked), tmp_path)
    for answer in run.replies(Finetune):
        assert {name.split(".")[-3] for name in answer.adapter.arrays} == {"q_proj", "v_proj"}
        assert any(array.any() for name, array in answer.adapter.arrays.items() if only_b(name))
    assert set(run.replies(Evaluate)[0].metrics) == {"exact_match", "field_match", "rouge_l"}

    client, before = run.client(0), run.client(0).ledger.spent()[0]
    whole = new_adapter(tiny.folder(), rank=2, alpha=4.0, seed=0)  # of all layers: not what the site agreed to
    with pytest.raises(WrongAdapter, match=r"of 14 layers, and .*lora_targets means 4: they differ in model.layers.0"):
        next(finetune(client, Finetune(whole, seed=1), "digest"))
    assert client.ledger.spent()[0] == before


def test_the_adopted_adapter_is_what_is_measured(tmp_path: Path) -> None:
    run = played(tmp_path)
    assert set(run.replies(Evaluate)[0].metrics) == {"exact_match", "field_match", "rouge_l"}


def test_an_adapter_of_another_base_is_refused_with_a_code(tmp_path: Path) -> None:
    own = new_adapter(tiny.folder(), rank=2, alpha=4.0, seed=0)
    assert own.base == weights_hash(tiny.folder())
    with pytest.raises(WrongAdapter, match="same base"):
        with_adapter(tiny.folder(), replace(own, base="another"))
    with pytest.raises(WrongAdapter, match="tensors"):
        with_adapter(tiny.folder(), replace(own, rank=3))
