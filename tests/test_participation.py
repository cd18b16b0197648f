"""Clients that are away, leave, or are slow."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from flwr.app import Error, Message
from inprocess import Played, instructions, play
from local import LocalGrid
from test_mutants import files_of, zipped

from fedsynth.federation.availability import Fate, fates
from fedsynth.federation.messages import Adopt, Evaluate, Finetune
from fedsynth.federation.messaging import Clients
from fedsynth.federation.nodes import TooFewReplies
from fedsynth.federation.records import parted
from fedsynth.federation.run.log import COLUMNS, SERVER, RunLog
from fedsynth.federation.run.privacy_report import privacy_line, privacy_report
from fedsynth.federation.run.summary import missing
from fedsynth.privacy.audit import contents, ledgers_in, problems
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.statement import Statement, statement
from fedsynth.scenario.schema import Cell, Participation
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.testing import ScriptedLLM
from fedsynth.typed import BadValue

AVERAGE = "fedsynth.strategies.lora_avg:LoraAverage"


def cell_with(tmp_path: Path, **table: object) -> Cell:
    [cell] = cells(from_toml(instructions(tmp_path, AVERAGE) + "server.quorum = 0.1\n"))
    return replace(cell, scenario=replace(cell.scenario, participation=Participation(**table)))


def within(count: int, chance: float, of: int) -> bool:
    """Four standard deviations of a binomial: false in 6 of 100,000 fair seeds."""
    return abs(count - chance * of) < 4 * math.sqrt(of * chance * (1 - chance))


def test_each_misses_as_often_as_the_table_says(tmp_path: Path) -> None:
    clients = range(2000)
    away = fates(cell_with(tmp_path, availability=0.7), 1, 1, clients)
    assert set(away.values()) == {Fate.ABSENT}
    assert within(len(away), 0.3, 2000)
    left = fates(cell_with(tmp_path, dropout=0.2), 1, 1, clients)
    assert set(left.values()) == {Fate.DROPPED}
    assert within(len(left), 0.2, 2000)
    assert fates(cell_with(tmp_path), 1, 1, clients) == {}


def test_absent_for_a_round_gone_for_an_exchange(tmp_path: Path) -> None:
    cell = cell_with(tmp_path, availability=0.5, dropout=0.5, seed=3)
    first, same_round, next_round = (fates(cell, *place, range(200)) for place in ((1, 1), (1, 2), (2, 3)))

    def of(found: dict[int, Fate], fate: Fate) -> set[int]:
        return {client for client, told in found.items() if told is fate}

    assert of(first, Fate.ABSENT) == of(same_round, Fate.ABSENT) != of(next_round, Fate.ABSENT)
    assert of(first, Fate.DROPPED) != of(same_round, Fate.DROPPED)
    # The same in every arm, another one under another seed.
    assert fates(replace(cell, arm="other"), 1, 1, range(200)) == first
    assert fates(replace(cell, seed=1), 1, 1, range(200)) != first


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("participation.dropout = 1.0", r"participation.dropout must lie in \[0, 1\), got 1.0"),
        ("participation.availability = 0.0", r"participation.availability must lie in \(0, 1\], got 0.0"),
        ("participation.dropout = 0.1", "server.quorum is 1"),
        ("participation.seed = -1", "seed must be at least 0"),
    ],
)
def test_bad_tables_are_refused_at_load(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        from_toml(instructions(tmp_path, AVERAGE) + line + "\n")


TABLE = """
server.quorum = 0.3
participation = { availability = 0.8, dropout = 0.4, seed = SEED }
"""


def test_a_run_ends_with_what_it_has_and_says_so(tmp_path: Path) -> None:
    toml = instructions(tmp_path, AVERAGE, rounds=2, clients=6, rows=60)
    run = play(toml + TABLE.replace("SEED", "2"), tmp_path)
    told = {
        name: [value for *_, metric, value in run.run_log.rows if metric.endswith(f"-finetune/{name}")]
        for name in ("clients", "answered", "absent", "dropped")
    }
    gone = sum(len(told[name]) for name in ("absent", "dropped"))
    assert told["clients"] == [6.0, 6.0]
    assert sum(told["answered"]) == 12 - gone
    assert gone > 0
    # Who is absent is not asked; the others are, in vain or not.
    assert len(run.requests(Finetune)) == 12 - len(told["absent"])
    assert len(run.requests(Evaluate)) == 12  # the simulator measures all
    assert len(run.requests(Adopt)) == 12 - sum(metric.endswith("-adopt/absent") for *_, metric, _ in run.run_log.rows)

    [line] = missing(pd.DataFrame(run.run_log.rows, columns=list(COLUMNS)))
    assert line.startswith("main seed 0 went on without some clients: finetune of round 1: ")
    assert f"{int(told['answered'][0])} of 6 clients" in line

    charged = 0
    for path in ledgers_in(run.out):
        ledger = contents(path)
        assert problems(ledger) == []
        charged += len(ledger["grants"])
    assert charged == len(run.requests(Finetune))  # what was released in vain is paid for
    statements = run.run_log.spending
    asked = {where["client"] for where in (m.content["fedsynth"] for m in run.grid.requests_of(Finetune.task))}
    assert set(statements) == asked
    assert run.run_log.silent == set()
    for client in asked:
        spent = run.client(client).ledger.spent()[0]
        assert statements[client].epsilon == pytest.approx(spent)


def methods(tmp_path: Path) -> dict[str, str]:
    small = (
        "num_texts = 6\nmin_words = 1\nnovelty = 1.0\nresponse_tokens = 8\n"
        "tuning = { epochs = 1, batch = 4, rank = 2, alpha = 4.0 }"
    )
    pit = "candidates = 4\nkeep = 2\nshots = 1\nmax_new_tokens = 8"
    sg = "fedsynth.strategies.knowledge_sg:KnowledgeSG"
    more = {"rounds": 2, "clients": 5, "rows": 50}
    return {
        "averaging": instructions(tmp_path, AVERAGE, **more),
        "product": instructions(tmp_path, AVERAGE, options='aggregation = "product"', **more),
        "knowledge_sg": instructions(tmp_path, sg, options=small, **more),
        "fedpit": instructions(tmp_path, "fedsynth.strategies.fedpit:FedPIT", options=pit, guarantee="none", **more),
    }


@pytest.mark.parametrize("name", ["averaging", "product", "knowledge_sg", "fedpit"])
def test_every_method_goes_on_without_some(tmp_path: Path, name: str) -> None:
    run: Played | None = None
    for seed in range(6):  # one under which the quorum holds in each exchange
        try:
            toml = methods(tmp_path)[name] + TABLE.replace("SEED", str(seed)).replace("0.3\n", "0.2\n", 1)
            run = play(toml, tmp_path / str(seed), professional=ScriptedLLM(answer=lambda _: " PRO"))
            break
        except TooFewReplies:
            continue
    assert run is not None
    assert any(metric.startswith("exchange/") for *_, metric, _ in run.run_log.rows)
    assert len(run.states) == 2


def test_what_comes_after_its_time_counts_as_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real straggler: the server's clock runs out, and its answer lies there when the next exchange begins."""
    toml = instructions(tmp_path, AVERAGE, clients=3) + "server.quorum = 0.5\nserver.timeout = 0.5\n"
    pull, slow = LocalGrid.pull_messages, {}

    def late(grid: LocalGrid, ids: object) -> object:
        wanted = list(ids)
        of = {key: message for key, message in grid._waiting.items() if message.metadata.message_type == Finetune.task}
        if of and not slow:
            slow[min(of)] = time.monotonic()
        # Until the server's clock has run out, the straggler's answer is not there.
        ready = [key for key in wanted if key not in slow or time.monotonic() - slow[key] > 0.6]
        return pull(grid, ready)

    monkeypatch.setattr(LocalGrid, "pull_messages", late)
    run = play(toml, tmp_path)
    [answered] = run.metric("exchange/1-finetune/answered")
    assert answered == 2
    assert set(run.run_log.spending) == {0, 1, 2}
    assert run.run_log.silent == set()
    assert "no usable answer" not in privacy_line([run.run_log])
    failed = [client for *_, client, metric, _ in run.run_log.rows if metric == "exchange/1-finetune/failed"]
    assert len(failed) == 1
    assert failed[0] != SERVER


def test_a_client_that_never_answers_is_named(tmp_path: Path) -> None:
    toml = instructions(tmp_path, AVERAGE, clients=3) + "server.quorum = 0.5\n"

    def dead(request: Message) -> Message | None:
        broken = request.metadata.message_type == Finetune.task and request.content["fedsynth"]["client"] == 1
        return Message(Error(1, "gone"), reply_to=request) if broken else None

    run = play(toml, tmp_path, spoil=dead)
    assert run.run_log.silent == {(1, 1)}
    assert "1 clients gave no usable reply" in privacy_line([run.run_log])


def test_a_late_failure_leaves_it_said_that_something_may_be_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = instructions(tmp_path, AVERAGE, clients=3) + "server.quorum = 0.5\nserver.timeout = 0.5\n"
    pull, slow, begun = LocalGrid.pull_messages, {}, list[float]()

    def late(grid: LocalGrid, ids: object) -> object:
        wanted = list(ids)
        of = {key: message for key, message in grid._waiting.items() if message.metadata.message_type == Finetune.task}
        if of and not slow:
            slow[min(of)] = of[min(of)]
            begun.append(time.monotonic())
        if wanted == list(slow) and time.monotonic() - begun[0] > 0.6:
            request = slow[wanted[0]]
            grid._waiting.pop(wanted[0], None)
            return [Message(Error(1, "gone"), reply_to=request)]
        return pull(grid, [key for key in wanted if key not in slow])

    monkeypatch.setattr(LocalGrid, "pull_messages", late)
    monkeypatch.setattr("fedsynth.federation.delivery.worker_retry.TRIES", 1)
    run = play(toml, tmp_path)
    [(client, exchange)] = run.run_log.silent
    assert exchange == 1
    assert set(run.run_log.spending) == {0, 1, 2} - {client}
    assert "1 clients gave no usable reply" in privacy_line([run.run_log])


def test_the_largest_statement_holds_in_whatever_order_they_come(tmp_path: Path) -> None:
    cell = cell_with(tmp_path)
    for request in ((8.0, 9.5), (9.5, 8.0)):
        run_log = RunLog(cell, tmp_path, tmp_path / "events.jsonl")
        for epsilon in request:
            run_log.log_statement(0, Statement("dp", epsilon, 1e-5))
        assert run_log.spending[0].epsilon == 9.5
        run_log.log_statement(0, Statement("none", None, 0.0))
        run_log.log_statement(0, Statement("dp", 1.0, 1e-5))
        assert run_log.spending[0].guarantee == "none"


def test_the_sum_that_epsilon_rests_on_stands_beside_it_whichever_part_or_client_is_in_it(tmp_path: Path) -> None:
    cohort = Cohort(8, 1, 2)
    votes = statement(DPPlan(40, 40, 1, 1, 1.0, 3.0, 1e-5, "summed_votes"), unit="person", cohort=cohort)
    training = statement(DPPlan(40, 40, 1, 1, 1.0, 4.0, 1e-5), unit="person")
    alone = statement(DPPlan(40, 40, 1, 1, 1.0, 0.5, 1e-5), unit="person")  # of another client, which spends most
    for said in ([(0, training), (0, votes)], [(0, votes), (1, alone)]):
        run_log = RunLog(cell_with(tmp_path), tmp_path, tmp_path / "events.jsonl", released={"votes"})
        for client, each in said:
            run_log.log_statement(client, each)
        figures = privacy_report([run_log])["largest_over_clients"]
        assert figures["cohort"] == {"clients": 8, "dropouts": 1, "colluders": 2}
        assert figures["epsilon_alone"] > (votes.epsilon_alone or 0.0) - 1e-9


def test_the_epsilon_of_a_run_is_the_largest_of_its_clients_and_none_beside_one_without(tmp_path: Path) -> None:
    run_log, told = RunLog(cell_with(tmp_path), tmp_path, tmp_path / "events.jsonl"), list[float | None]()
    for client, epsilon in ((0, 2.0), (1, 5.0), (0, 3.0), (2, None), (1, 6.0)):
        run_log.log_statement(client, Statement("none" if epsilon is None else "dp", epsilon, 1e-5))
        told.append(run_log.epsilon)
    assert told == [2.0, 5.0, 5.0, None, None]
    again = RunLog(cell_with(tmp_path), tmp_path, tmp_path / "events.jsonl")
    again.restore(run_log.record())
    assert (again.spending, again.epsilon) == (run_log.spending, None)
    del run_log.spending[2]
    again.restore(run_log.record())
    assert again.epsilon == 6.0


def in_the_head(payload: bytes, old: str, new: str) -> bytes:
    """A payload with another value.json, and the right checksums."""
    files = files_of(payload)
    text = files[0][1].decode()
    assert text.count(old) == 1
    return zipped([("value.json", text.replace(old, new).encode()), *files[1:]])


def with_tensors(payload: bytes, change: Callable[[bytes], bytes]) -> bytes:
    files = files_of(payload)
    return zipped([files[0], (files[1][0], change(files[1][1]))])


# What a client may do to its answer, and what is said of it. The first one keeps to what was agreed.
CORRUPTIONS: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda payload: payload, ""),
    (lambda payload: b"", "not a payload"),
    (lambda payload: payload[:-30], "does not end as one"),
    (lambda payload: in_the_head(payload, '"records": 12', '"records": ' + "[" * 100_000), r"\(RecursionError\)"),
    (lambda payload: in_the_head(payload, '"records": 12', '"records": 1' + "0" * 400), "at most 40 digits"),
    (lambda payload: in_the_head(payload, '"records": 12', '"records": 1' + "0" * 20), "records must lie in"),
    (lambda payload: in_the_head(payload, '"records": 12', '"records": "\x1b[2J<b>"'), "cannot be read"),
    (lambda payload: payload[:6] + b"\1" + payload[7:], "nothing but its parts"),  # "encrypted"
    (lambda payload: with_tensors(payload, lambda file: file[:40]), "tensors"),
    (lambda payload: in_the_head(payload, '"unit": "row"', '"unit": "<script>"'), "unit must be one of row$"),
    (lambda payload: in_the_head(payload, '"steps": 3', '"steps": 300'), "epsilon is said to be"),
]


def corrupting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on client k does the k-th of these to its adapter."""
    pull = LocalGrid.pull_messages

    def corrupt(grid: LocalGrid, ids: Iterable[str]) -> Iterator[Message]:
        for reply in pull(grid, ids):
            [request] = [m for m in grid.requests if m.metadata.message_id == reply.metadata.reply_to_message_id]
            if request.metadata.message_type == Finetune.task:
                for asked, said in zip(parted(request.content), parted(reply.content), strict=True):
                    change, _ = CORRUPTIONS[asked["fedsynth"]["client"] % len(CORRUPTIONS)]
                    said["fedsynth"]["payload"] = change(said["fedsynth"]["payload"])
            yield reply

    monkeypatch.setattr(LocalGrid, "pull_messages", corrupt)


@pytest.mark.parametrize("nodes", [None, 1], ids=["a message each", "all in one message"])
def test_a_corrupt_answer_is_one_clients_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int | None
) -> None:
    clients = len(CORRUPTIONS)
    toml = instructions(tmp_path, AVERAGE, clients=clients, rows=15 * clients) + "server.quorum = 0.05\n"
    corrupting(monkeypatch)
    reasons: dict[int, str] = {}
    heard = Clients._counted

    def noted(self: Clients, client: int, what: Any) -> Any:
        reasons.setdefault(client, what.why or "")
        return heard(self, client, what)

    monkeypatch.setattr(Clients, "_counted", noted)
    run = play(toml, tmp_path, nodes=nodes)
    for client, (_, said) in enumerate(CORRUPTIONS):
        assert re.search(said, reasons[client]), (client, reasons[client])
        assert bool(said) == reasons[client].startswith("sent an unusable reply: ")
        assert reasons[client].isprintable()
    assert run.metric("exchange/1-finetune/answered") == [1.0]
    assert set(run.run_log.spending) == {0}
    # What they spent is not known, and that is said; each was charged, and its account has it.
    assert run.run_log.silent == {(client, 1) for client in range(1, clients)}
    assert f"{clients - 1} clients gave no usable reply" in privacy_line([run.run_log])
    assert all(len(contents(path)["grants"]) == 1 for path in ledgers_in(run.out))
    told = json.dumps([*run.run_log.rows, (run.out / "events.jsonl").read_text()])
    assert "script" not in told
    assert "u001b" not in told


def test_where_a_quorum_is_out_of_reach_nobody_spends_in_vain(tmp_path: Path) -> None:
    toml = instructions(tmp_path, AVERAGE, clients=4, rows=40)
    away = TABLE.replace("0.3\n", "0.9\n", 1).replace("availability = 0.8", "availability = 0.5")
    with pytest.raises(TooFewReplies, match="was not there in this round"):
        play(toml + away.replace("SEED", "1"), tmp_path)
    assert not list((tmp_path / "run.private").rglob("ledger.sqlite"))


def test_a_quorum_is_not_raised_by_rounding(tmp_path: Path) -> None:
    # 0.28 of 25 is 7, and 7.000000000000001 in floating point.
    toml = instructions(tmp_path, AVERAGE, clients=25, rows=250) + "server.quorum = 0.28\n"

    def dead(request: Message) -> Message | None:
        broken = request.metadata.message_type == Finetune.task and request.content["fedsynth"]["client"] >= 7
        return Message(Error(1, "gone"), reply_to=request) if broken else None

    run = play(toml, tmp_path, spoil=dead)
    assert run.metric("exchange/1-finetune/answered") == [7.0]
