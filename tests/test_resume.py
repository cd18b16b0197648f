"""Runs that were ended and go on."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import instructions, play
from resuming import asked, dies_everywhere, left
from test_participation import corrupting

from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import Finetune, Finetuned
from fedsynth.federation.messaging import Clients
from fedsynth.federation.payload import decode, encode
from fedsynth.federation.run.checkpoint import Checkpoint
from fedsynth.federation.run.exchange_record import Heard
from fedsynth.federation.run.log import RunLog
from fedsynth.lora import Adapter
from fedsynth.privacy.statement import Statement
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.simulation.flower import STATUS
from fedsynth.simulation.simulate import done, resume
from fedsynth.testing import ScriptedLLM
from fedsynth.typed import BadValue

AVERAGE = "fedsynth.strategies.lora_avg:LoraAverage"
PIT = "fedsynth.strategies.fedpit:FedPIT"
SG = "fedsynth.strategies.knowledge_sg:KnowledgeSG"


def test_averaging_goes_on_to_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = instructions(tmp_path, AVERAGE, rounds=2, clients=2, rows=20)
    whole, again = dies_everywhere(toml, tmp_path, monkeypatch, every=3)
    assert len(asked(whole)) == 2 * 2 * 3  # rounds, clients, exchanges
    # What was kept is not asked for again: after a death in the second round those of the first are not.
    # Deaths 0, 3, 6, ...: before or after each second message; an exchange is asked again from its first client.
    assert [len(asked(run)) for run in again] == [12 - at // 4 * 2 for at in range(0, 24, 3)]


def test_without_a_guarantee_it_does_too_and_notes_once_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = instructions(tmp_path, AVERAGE, guarantee="none", clients=2, rows=20)
    _, again = dies_everywhere(toml, tmp_path, monkeypatch, every=4)
    assert [e["kind"] for e in again[0].client(0).ledger.entries()] == ["no_guarantee"]


def test_knowledge_sg_asks_its_professional_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ScriptedLLM] = []

    def professional() -> ScriptedLLM:
        made.append(ScriptedLLM(answer=lambda prompt: f" PRO {len(prompt)}"))
        return made[-1]

    options = (
        'instructions = "public"\nnum_texts = 6\nmin_words = 1\nnovelty = 1.0\nresponse_tokens = 8\n'
        "tuning = { epochs = 1, batch = 4, rank = 2, alpha = 4.0 }"
    )
    toml = instructions(tmp_path, SG, options=options, clients=2, rows=20) + 'server.public = "world:hospitals"\n'
    _, again = dies_everywhere(toml, tmp_path, monkeypatch, professional=professional)
    assert len(made) == 1 + 2 * len(again)
    calls = [len(llm.completed) for llm in made]
    assert calls[0] > 0
    assert {one + other for one, other in zip(calls[1::2], calls[2::2], strict=True)} == {calls[0]}


def test_fedpit_goes_on_to_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = instructions(
        tmp_path,
        PIT,
        options="candidates = 4\nkeep = 2\nshots = 1\nmax_new_tokens = 8",
        guarantee="none",
        rounds=2,
        clients=2,
        rows=20,
    )
    dies_everywhere(toml, tmp_path, monkeypatch, every=5)


def test_a_run_goes_on_behind_answers_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupting(monkeypatch)  # clients 1 to 3: nothing, cut off, nested too deep
    toml = instructions(tmp_path, AVERAGE, clients=4, rows=60) + "server.quorum = 0.25\n"
    whole = play(toml, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "log_adapter", dies)  # after the first exchange
        with pytest.raises(KeyboardInterrupt):
            play(toml, tmp_path / "died")
    [record] = (tmp_path / "died").rglob("exchange-1.zip")
    with zipfile.ZipFile(record) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()}
    facts = json.loads(kept.pop("head.json"))["clients"]
    assert decode(kept.pop("0"), Finetuned).records == 12
    assert set(kept.values()) == {b""}
    assert all(facts[client]["why"].startswith("sent an unusable reply: ") for client in kept)
    again = play(toml, tmp_path / "died")
    assert again.requests(Finetune) == []
    assert left(again) == left(whole)


def dies(self: Any, *_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_other_requests_than_the_kept_ones_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = instructions(tmp_path, AVERAGE, clients=2, rows=20)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "log_adapter", dies)  # after the first exchange
        with pytest.raises(KeyboardInterrupt):
            play(toml, tmp_path)
    monkeypatch.setattr(Clients, "_digest", lambda *_: "0")
    with pytest.raises(BadValue, match=r"other requests .* run the scenario anew"):
        play(toml, tmp_path)


@dataclass(frozen=True)
class State:
    """As a strategy's."""

    round: int = 0
    adapter: Adapter | None = None
    corpora: dict[int, Corpus] | None = None


PUBLIC = Adapter({"a": np.ones((1, 2), np.float32)}, 1, 2.0, "base", public=True)
TEXT = Corpus(("a",), ("b",), Provenance.DP_SYNTHETIC, ("grant",))


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "cell")
    assert kept.load(State) is None
    kept.save(0, State(), {"rows": []})
    kept.save(1, State(1, PUBLIC, {0: TEXT, -1: TEXT}), {"rows": [[1, 2.5]]})
    (tmp_path / "cell" / ".part").mkdir()  # of a save that was cut short
    (tmp_path / "cell" / ".part" / "state.payload").write_bytes(b"half")
    found = Checkpoint(tmp_path / "cell")
    loaded = found.load(State)
    assert loaded is not None
    state, record = loaded
    assert (found.round, state.round, record) == (1, 1, {"rows": [[1, 2.5]]})
    assert state.corpora == {0: TEXT, -1: TEXT}
    assert state.adapter is not None
    assert state.adapter.public
    assert np.array_equal(state.adapter.arrays["a"], PUBLIC.arrays["a"])
    assert [p.name for p in (tmp_path / "cell").glob("round-*")] == ["round-1"]


ROW = [1, -1, "loss", 0.5]


def test_rows_are_appended_not_written_again(tmp_path: Path) -> None:
    kept, rows = Checkpoint(tmp_path), [ROW] * 1000
    kept.save(1, State(), {"rows": rows})
    first = (tmp_path / "rows.jsonl").read_bytes()
    record = (tmp_path / "round-1" / "record.json").stat().st_size
    (tmp_path / "rows.jsonl").write_bytes(b"?" * len(first))  # were they written again, these bytes would go
    kept.save(2, State(), {"rows": [*rows, [2, *ROW[1:]]]})
    assert (tmp_path / "rows.jsonl").read_bytes() == b"?" * len(first) + b'[[2, -1, "loss", 0.5]]\n'
    assert (tmp_path / "round-2" / "record.json").stat().st_size < record + 10 < 100


def test_rows_of_a_round_that_was_not_completed_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoint(tmp_path)
    kept.save(1, State(), {"rows": [ROW, ROW]})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            kept.save(2, State(), {"rows": [ROW, ROW, ["killed"]]})
    assert b"killed" in (tmp_path / "rows.jsonl").read_bytes()
    again = Checkpoint(tmp_path)
    loaded = again.load(State)
    assert loaded is not None
    assert loaded[1]["rows"] == [ROW, ROW]
    again.save(2, State(), {"rows": [ROW, ROW, [2, *ROW[1:]]]})
    loaded = Checkpoint(tmp_path).load(State)
    assert loaded is not None
    assert loaded[1]["rows"] == [ROW, ROW, [2, *ROW[1:]]]


def test_a_checkpoint_of_an_earlier_version_has_its_rows_in_the_record(tmp_path: Path) -> None:
    Checkpoint(tmp_path).save(1, State(), {})
    (tmp_path / "round-1" / "record.json").write_text(json.dumps({"rows": [ROW]}))
    kept = Checkpoint(tmp_path)
    loaded = kept.load(State)
    assert loaded is not None
    assert loaded[1]["rows"] == [ROW]
    kept.save(2, State(), loaded[1])
    loaded = Checkpoint(tmp_path).load(State)
    assert loaded is not None
    assert loaded[1]["rows"] == [ROW]


def test_lost_rows_are_noticed(tmp_path: Path) -> None:
    Checkpoint(tmp_path).save(1, State(), {"rows": [ROW, ROW]})
    (tmp_path / "rows.jsonl").write_text(json.dumps([ROW]) + "\n")
    with pytest.raises(BadValue, match=r"rows\.jsonl holds 1 of 2 rows"):
        Checkpoint(tmp_path).load(State)


def test_on_the_wire_nobody_is_believed_that_an_adapter_is_public() -> None:
    data = encode(State(adapter=PUBLIC), trusted=True)
    for bytes_, trusted, public in (
        (data, False, False),
        (encode(State(adapter=PUBLIC)), True, False),
        (data, True, True),
    ):
        found = decode(bytes_, State, trusted=trusted).adapter
        assert found is not None
        assert found.public is public


def test_a_state_that_cannot_be_kept_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path)
    with pytest.raises(BadValue, match=r"must be a frozen dataclass.*got dict"):
        kept.save(0, {"round": 1}, {})
    kept.save(0, State(), {})
    (tmp_path / "round-0" / "state.payload").write_bytes(b"?")
    with pytest.raises(BadValue, match=r"cannot be read .* run the scenario anew"):
        kept.load(State)


@dataclass(frozen=True)
class Odd:
    """What does not come back as it is."""

    limit: int | None = 5
    more: Any = None


def test_what_would_come_back_otherwise_is_refused_and_none_stays_none(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path)
    kept.save(0, Odd(limit=None), {})
    loaded = kept.load(Odd)
    assert loaded is not None
    assert loaded[0] == Odd(limit=None)
    for value in ((1, 2), np.zeros(2), object()):
        with pytest.raises(BadValue, match="Odd"):
            kept.save(1, Odd(more=value), {})
    again = Checkpoint(tmp_path)
    assert again.load(Odd) is not None
    assert again.round == 0  # what was kept before is still there


def test_one_corpus_of_many_clients_is_written_once() -> None:
    text = Corpus(("a" * 1000,) * 10, ("b",) * 10, Provenance.DP_SYNTHETIC, ("grant",))
    many, one = (encode(State(corpora=dict.fromkeys(range(count), text)), trusted=True) for count in (50, 1))
    assert len(one) > 10_000
    assert len(many) < 2 * len(one)
    assert decode(many, State, trusted=True) == State(corpora=dict.fromkeys(range(50), text))


def test_two_do_not_go_on_with_one_run(tmp_path: Path) -> None:
    from fedsynth.simulation.flower import LaunchFailed, alone

    with alone(tmp_path), pytest.raises(LaunchFailed, match="another run works in this directory"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_answers_are_whole_or_not_there(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path)
    kept.save(0, State(), {})
    half = kept.exchange(1)
    half.begin("digest")
    half.keep(0, Heard(payload=b"one"), down=1)
    assert kept.exchange(1).kept(lambda: "digest") is None
    whole = kept.exchange(1)
    whole.keep(3, Heard(payload=b"three", size=5), down=1)
    whole.keep(0, Heard(why="refused", size=7), down=2)
    whole.begin("digest")
    whole.close()
    assert kept.exchange(1).kept(lambda: "digest") == [
        (3, Heard(payload=b"three", size=5), 1),
        (0, Heard(why="refused", size=7), 2),
    ]
    kept.save(1, State(1), {})
    assert kept.exchange(1).kept(lambda: "digest") is None  # another round's


def test_a_journal_comes_back_as_it_was(tmp_path: Path) -> None:
    cell = cells(from_toml(instructions(tmp_path, AVERAGE)))[0]
    run_log = RunLog(cell, tmp_path, tmp_path / "events.jsonl", round=2)
    run_log.log_metric(-1, "loss", float("nan"))
    run_log.count("bytes/up", 0, 5)
    run_log.count("bytes/up", 0, 6)
    run_log.released, run_log.silent = {"adapters"}, {(3, 1)}
    run_log.log_statement(3, Statement("dp", 7.5, 1e-5))
    again = RunLog(cell, tmp_path, tmp_path / "events.jsonl")
    record = json.loads(json.dumps(run_log.record()))
    again.restore(record)
    assert again.rows[0][:5] == ("main", 0, 2, -1, "loss")
    assert np.isnan(again.rows[0][5])
    assert (again.totals, again.released, again.silent) == ({("bytes/up", 0): 11}, {"adapters"}, {(3, 1)})
    assert (again.spending, again.epsilon) == (run_log.spending, 7.5)
    again.restore({**record, "statements": {client: parts[0] for client, parts in record["statements"].items()}})
    assert again.spending == run_log.spending  # as an earlier version wrote it


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="holds no run"):
        resume(tmp_path / "nothing")
    out = tmp_path / "run"
    out.mkdir()
    (out / "scenario.toml").write_text(instructions(tmp_path, AVERAGE))
    assert not done(out)
    with pytest.raises(BadValue, match=r"run\.private is gone, and with it what the clients .* have spent"):
        resume(out)
    (out / STATUS).write_text('{"status": "fai')
    assert not done(out)
    shutil.rmtree(out)
