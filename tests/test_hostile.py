"""Sites that send what they like, and what the server makes of it; what a scenario may not ask of sites."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from inprocess import instructions
from local import LocalGrid

from fedsynth.federation.messages import Evaluated, Finetune, Finetuned
from fedsynth.federation.messaging import Clients
from fedsynth.federation.nodes import TooFewReplies
from fedsynth.federation.payload import encode
from fedsynth.federation.records import pack_reply, parted
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.privacy_report import privacy_line
from fedsynth.federation.strategy import RoundStrategy, load_strategy
from fedsynth.federation.validation import Rejected, check_settings
from fedsynth.lora import Adapter
from fedsynth.privacy.statement import Statement
from fedsynth.scenario.client import Client
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.simulation.simulate import check_server
from fedsynth.typed import BadValue

AVERAGE = "fedsynth.strategies.lora_avg:LoraAverage"
FACTORS = {"w.lora_A.weight": np.ones((1, 2), np.float32), "w.lora_B.weight": np.zeros((3, 1), np.float32)}
START = Adapter(FACTORS, 1, 2.0, "base")
TRAINED = replace(START, grants=("a3" * 16,))
# 40 records in batches of 5: as 200 in batches of 25.
SAID = Statement("dp", 7.99, 1e-5, 11.29, unit="person", sigma=0.928, sampling_rate=0.125, steps=60, clip_norm=0.3)
JUNK = "<script>x</script>\x1b[2J"
Says = Callable[[Message], RecordDict | Message | Exception]


class Sites(LocalGrid):
    """Three sites, each of which answers as it is told to."""

    def __init__(self, says: Mapping[str, Says]) -> None:
        super().__init__(None, len(says), {})
        self.says = dict(zip(self.contexts, says.items(), strict=True))

    def get_nodes(self) -> Iterable[Any]:
        return [
            SimpleNamespace(node_id=node, name=name, status="online", last_activated_at="")
            for node, (name, _) in self.says.items()
        ]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for key in message_ids:
            if request := self._waiting.pop(key, None):
                said = self.says[request.metadata.dst_node_id][1](request)
                if isinstance(said, Exception):
                    raise said
                yield said if isinstance(said, Message) else Message(said, reply_to=request)


def clients(tmp_path: Path, says: Mapping[str, Says], quorum: float) -> Clients:
    [cell] = cells(from_toml(instructions(tmp_path, AVERAGE) + f"server.quorum = {quorum}\n"))
    run_log = RunLog(cell, tmp_path, tmp_path / "events.jsonl", simulated=False)
    return Clients(Sites(says), {}, cell, "run", (), run_log, sites=tuple(says))


def answering(**change: Any) -> Says:
    """An answer with another statement."""
    said = Finetuned(TRAINED, replace(SAID, **change), 40)
    return lambda request: pack_reply(encode(said))


def to_another(request: Message) -> Message:
    """An answer that calls itself one to a message that was never sent."""
    reply = Message(answering()(request), reply_to=request)
    reply.metadata.__dict__["_reply_to_message_id"] = "message-99"
    return reply


BAD: dict[str, tuple[Says, str]] = {
    "no message": (lambda _: ValueError("Unexpected set of `children`"), "its message cannot be read"),
    "no objects": (lambda _: KeyError("4f"), "its message cannot be read"),
    "no record": (lambda _: RecordDict({}), "no record 'fedsynth'"),
    "another record": (lambda _: RecordDict({JUNK: ConfigRecord({JUNK: JUNK})}), "no record 'fedsynth'"),
    "a number as payload": (lambda _: RecordDict({"fedsynth": ConfigRecord({"payload": 7})}), "must be bytes"),
    "two answers": (
        lambda _: RecordDict({f"fedsynth.{i}": ConfigRecord({}) for i in (0, 1)}),
        "2 replies to 1 requests",
    ),
    "a word as unit": (answering(unit=JUNK), "statement: unit must be one of row, person"),
    "a column as unit": (answering(unit="patient"), "statement: unit must be one of row, person"),
    "simulated noise": (answering(simulated=True), "statement: simulated must be false here"),
    "too little epsilon": (answering(epsilon=0.5), "statement: epsilon is said to be 0.5"),
    "an epsilon of another delta": (answering(delta=1e-9), "statement: epsilon is said to be 7.99"),
    "too few steps": (answering(steps=600), "statement: epsilon is said to be 7.99"),
    "no number": (answering(epsilon_replace_one=float("nan")), "statement: epsilon_replace_one must lie in"),
    "rows beyond all numbers": (
        answering(unit="row", epsilon_rows={10**400: 9.0}),
        "Finetuned.statement.epsilon_rows does not fit its type",
    ),
    "rows in a large number": (
        answering(unit="row", epsilon_rows={10**39: 9.0}),
        "statement: epsilon_rows must lie in 2..1000, got 1e+39",
    ),
    "another rate": (answering(sampling_rate=0.1), "sampling rate of 0.1 is not for"),
    "a worker that dies": (
        lambda request: Message(Error(2, JUNK), reply_to=request),
        "its worker failed: Flower's error 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_one_site_sends_is_that_sites_failure(tmp_path: Path, name: str) -> None:
    bad, why = BAD[name]
    request = Finetune(START, seed=1)
    three = clients(tmp_path, {"north": answering(), "south": bad, "west": answering(epsilon=8.5)}, quorum=0.5)
    answers = three.ask(request)
    assert sorted(answers) == [0, 2]
    assert {client: said.epsilon for client, said in three.run_log.spending.items()} == {0: 7.99, 2: 8.5}
    assert three.run_log.silent == {(1, 1)}
    assert "1 clients gave no usable reply" in privacy_line([three.run_log])
    told = json.dumps(three.run_log.record()) + (tmp_path / "events.jsonl").read_text()
    assert "script" not in told

    all_needed = clients(tmp_path, {"north": answering(), "south": bad, "west": answering()}, quorum=1.0)
    with pytest.raises(TooFewReplies) as caught:
        all_needed.ask(request)
    assert why in str(caught.value)
    # Who answers behind the one that ends it is not waited for.
    assert re.match(r"finetune: [012] of 3 clients answered, 3 needed \(site 'south' ", str(caught.value))
    assert str(caught.value).isprintable()
    assert "script" not in str(caught.value)


@pytest.mark.parametrize("problem", [OverflowError(JUNK), KeyError(JUNK), RecursionError(JUNK), MemoryError()])
def test_an_answer_that_cannot_even_be_checked_is_one_sites_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def checked(request: Any, answer: Any, *_: Any, **__: Any) -> None:
        if answer.statement.epsilon == 8.5:
            raise problem

    monkeypatch.setattr("fedsynth.federation.messaging.check_reply", checked)
    says = {"north": answering(), "south": answering(epsilon=8.5), "west": answering()}
    three = clients(tmp_path, says, quorum=0.5)
    assert sorted(three.ask(Finetune(START, seed=1))) == [0, 2]
    assert three.run_log.silent == {(1, 1)}
    (tmp_path / "late").mkdir()
    late = clients(tmp_path / "late", says, quorum=0.5)
    requests = dict.fromkeys(range(3), Finetune(START, seed=1))
    sent, _ = late._delivery.send(requests, range(3), partial(late._packed, requests))
    late._late.expect(sent, 1, requests)
    late.close()
    assert {client: said.epsilon for client, said in late.run_log.spending.items()} == {0: 7.99, 2: 7.99}


def test_seconds_that_a_site_makes_up_are_not_added_up(tmp_path: Path) -> None:
    def timed(_: Message) -> RecordDict:
        return pack_reply(encode(Finetuned(TRAINED, SAID, 40)), seconds=1.7e308)

    two = clients(tmp_path, {"north": timed, "south": timed}, quorum=1.0)
    assert sorted(two.ask(Finetune(START, seed=1))) == [0, 1]
    assert "seconds/client" not in json.dumps(two.run_log.record())


def test_a_figure_that_one_client_lacks_is_the_mean_of_the_others() -> None:
    class Journaled:
        noted: ClassVar[list[tuple[int, str, float]]] = []

        def log_metric(self, *figure: Any) -> None:
            self.noted.append(figure)

    answers = {0: Evaluated({}, 5), 1: Evaluated({"accuracy": 0.25}, 5), 2: Evaluated({"accuracy": 0.75}, 5)}
    method: Any = SimpleNamespace(server=SimpleNamespace(run_log=Journaled()))
    assert dict(RoundStrategy._record(method, answers)) == {"accuracy": 0.5}
    assert Journaled.noted == [(1, "accuracy", 0.25), (2, "accuracy", 0.75)]


def test_a_reply_counts_for_the_request_that_it_was_asked_for_by(tmp_path: Path) -> None:
    three = clients(tmp_path, {"north": to_another, "south": answering(), "west": to_another}, quorum=1.0)
    assert sorted(three.ask(Finetune(START, seed=1))) == [0, 1, 2]


def test_a_connection_that_is_gone_ends_the_exchange(tmp_path: Path) -> None:
    def gone(_: Message) -> Exception:
        return ConnectionError("the SuperLink is gone")

    with pytest.raises(ConnectionError):
        clients(tmp_path, {"north": answering(), "south": gone}, quorum=0.5).ask(Finetune(START, seed=1))


def test_a_site_answers_for_one_record_of_its_reply_alone() -> None:
    content = pack_reply(encode(Finetuned(TRAINED, SAID, 40)))
    content["more"] = ConfigRecord({"x": JUNK})
    assert parted(content) == [content]


# ---- What a scenario may ask -----------------------------------------------------------------------------------------

CLIENT = Client("assets:tiny-slm", "assets:tiny-slm", guarantee="none")


@pytest.mark.parametrize("table", ["generator_training", "scorer_training"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 100_001), ("steps", 10**9), ("rank", 1025), ("alpha", 1.1e6), ("learning_rate", 1e4),
        ("clip_norm", 1e-7), ("clip_norm", 1e7), ("max_length", 8193), ("max_physical_batch_size", 4_097),
        ("rows_per_unit", 65),  # a micro-batch is 64, and a unit goes through in one pass
    ],
)  # fmt: skip
def test_settings_beyond_what_any_client_does_are_refused_by_name(table: str, key: str, value: float) -> None:
    check_settings(CLIENT, 3)
    training = replace(getattr(CLIENT, table), **{key: value})
    with pytest.raises(Rejected, match=rf"^client\.{table}\.{key} must lie in .*, got {value}$"):
        check_settings(replace(CLIENT, **{table: training}), 3)


@pytest.mark.parametrize(
    ("change", "rounds", "said"),
    [
        ({}, 10**6, r"rounds \* client.generator_training.steps must lie in 1..100000, got 60000000"),
        ({"answer_tokens": 8193}, 1, "client.answer_tokens"),
        ({"score_norm": 1e7}, 1, "client.score_norm"),
        ({"max_noise_multiplier": 0.01}, 1, "client.max_noise_multiplier"),
    ],
)
def test_other_settings_have_their_caps(change: dict[str, Any], rounds: int, said: str) -> None:
    with pytest.raises(Rejected, match=said):
        check_settings(replace(CLIENT, **change), rounds)


def test_a_run_that_asks_for_more_is_refused_before_anything_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(*_: Any, **__: Any) -> Any:
        raise AssertionError("planned")

    monkeypatch.setattr("fedsynth.scenario.client.plan", planned)
    text = instructions(tmp_path, AVERAGE)
    for old, new, said in (
        ("steps = 3", "steps = 1000000000", "client.generator_training.steps must be at most 100,000 over all rounds"),
        ("[client]", "[client]\nmax_noise_multiplier = 1e9", "max_noise_multiplier must be at most 1000, got 1e\\+09"),
    ):
        assert text.count(old) == 1
        with pytest.raises(BadValue, match=said):
            check_server(*cells(from_toml(text.replace(old, new))))


@pytest.mark.parametrize(
    ("strategy", "option", "said"),
    [
        ("fdkt:FDKT", {"per_label": 100_001}, "strategy.per_label must be at most 100000, got 100001"),
        ("fdkt:FDKT", {"num_texts": 1_000_001}, "strategy.num_texts must be at most 1000000"),
        ("fdkt:FDKT", {"draft_tokens": 8193}, "strategy.draft_tokens must be at most 8192"),
        ("fdkt:FDKT", {"draft_temperature": 11.0}, "strategy.draft_temperature must be at most 10"),
        ("fdkt:FDKT", {"draft_top_p": 0.001}, "strategy.draft_top_p must be at least 0.01"),
        ("cross_lm:CrossLM", {"num_texts": 1_000_001}, "strategy.num_texts must be at most 1000000"),
        ("fedpit:FedPIT", {"candidates": 10_001}, "strategy.candidates must be at most 10000"),
        ("fedpit:FedPIT", {"shots": 65}, "strategy.shots must be at most 64"),
        ("fedpit:FedPIT", {"max_new_tokens": 8193}, "strategy.max_new_tokens must be at most 8192"),
        ("knowledge_sg:KnowledgeSG", {"tuning": {"rank": 1025}}, "rank must be at most 1024, got 1025"),
    ],
)
def test_options_that_no_client_would_answer_are_refused_by_name(
    tmp_path: Path, strategy: str, option: dict[str, Any], said: str
) -> None:
    cell = _with(tmp_path, strategy, {})
    load_strategy(cell.scenario.strategy)
    with pytest.raises(BadValue, match=said):
        load_strategy(_with(tmp_path, strategy, option).scenario.strategy)


def _with(tmp_path: Path, strategy: str, options: dict[str, Any]) -> Cell:
    [cell] = cells(from_toml(instructions(tmp_path, f"fedsynth.strategies.{strategy}")))
    choice = replace(cell.scenario.strategy, options=options)
    return replace(cell, scenario=replace(cell.scenario, strategy=choice))
