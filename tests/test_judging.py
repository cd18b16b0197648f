"""Arms of a finished run judged pair by pair: both orders, what is recorded, and where responses may go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_endpoint
from typer.testing import CliRunner

from fedsynth.cli.main import app
from fedsynth.clients import evaluate as evaluating
from fedsynth.corpus import Corpus, Provenance
from fedsynth.evaluation.text import llm_judge
from fedsynth.federation.run.directory import RESPONSES, private_of
from fedsynth.models import endpoint, llm
from fedsynth.models.chat import Chat
from fedsynth.reporting.judging import judge_run, judgements, open_judge
from fedsynth.reporting.run_page import _judged
from fedsynth.scenario.server import Endpoint
from fedsynth.scenario.toml import load, to_toml
from fedsynth.testing import ScriptedLLM
from fedsynth.typed import BadValue

ARMS = ("knowledge_sg", "local")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two seeds and three instructions each: the first arm is better on two, the second on one."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "scenario.toml").write_text(to_toml(replace(load("hospitals-knowledgesg"), run=ARMS)))
    for arm, said in zip(ARMS, (["good", "good", "bad"], ["bad", "bad", "good"]), strict=True):
        for seed in (0, 1):
            place = private_of(out) / arm / f"seed-{seed}" / "client-0"
            place.mkdir(parents=True)
            rows = [json.dumps([f"question {i}", "true", f"{word} {arm}"]) + "\n" for i, word in enumerate(said)]
            (place / RESPONSES).write_text("".join(rows))
    return out


def scripted(answer: str | None = None) -> ScriptedLLM:
    """Says always the same; or that the answer with "good" in it is better."""

    def said(prompt: Chat) -> str:
        one = prompt.user.split("Answer A: ")[1].split("\n")[0]
        return answer or ("Verdict: A" if "good" in one else "Verdict: B")

    return ScriptedLLM(answer=said, chats=True)


def test_a_judge_that_always_names_the_first_place_gives_ties(run: Path) -> None:
    [found] = judge_run(run, load("hospitals-knowledgesg"), llm_judge(scripted("Verdict: A")), "j", ARMS, most=9)
    assert (found.win, found.tie, found.lose, found.unreadable) == (0, 6, 0, 0)
    assert (found.net, found.low, found.high) == (0.0, 0.0, 0.0)


def test_wins_and_losses_are_counted_over_clients_and_seeds_with_an_interval(run: Path) -> None:
    scenario, judge = load("hospitals-knowledgesg"), scripted()
    [found] = judge_run(run, scenario, llm_judge(judge), "j", ARMS, most=9)
    assert (found.first, found.second) == ARMS
    assert (found.win, found.tie, found.lose) == (4, 0, 2)
    assert found.net == pytest.approx(1 / 3)
    assert found.low is not None
    assert found.high is not None
    assert -1 <= found.low < 1 / 3 < found.high <= 1
    assert [len(prompts) for prompts in judge.completed] == [6, 6]
    assert all(isinstance(prompt, Chat) for prompts in judge.completed for prompt in prompts)
    [other] = judge_run(run, scenario, llm_judge(scripted()), "j", ARMS[::-1], most=9)
    assert (other.win, other.lose, other.net) == (2, 4, pytest.approx(-1 / 3))
    [few] = judge_run(run, scenario, llm_judge(scripted()), "j", ARMS, most=2)
    assert few.win + few.tie + few.lose == 2
    assert [(each["first"], each["win"]) for each in judgements(run)] == [("local", 2), ("knowledge_sg", few.win)]
    assert "question" not in (run / "judgements.json").read_text()  # counts alone
    assert "good" not in (run / "judgements.json").read_text()


def test_verdicts_that_cannot_be_read_count_in_nothing_else(run: Path) -> None:
    [found] = judge_run(run, load("hospitals-knowledgesg"), llm_judge(scripted("Well.")), "j", ARMS, most=9)
    assert (found.win, found.tie, found.lose, found.unreadable, found.net) == (0, 0, 0, 6, None)
    [table] = _judged(judgements(run))
    assert list(table.rows[0]) == ["knowledge_sg against local", "j", "0", "0", "0", "6", "-", "-"]  # type: ignore[union-attr]  # there is a table


def test_responses_that_do_not_fit_the_judge_have_no_verdict(run: Path) -> None:
    judge = scripted()
    judge.context = 800
    long = private_of(run) / "local" / "seed-0" / "client-0" / RESPONSES
    long.write_text(long.read_text().replace("bad local", "bad local " * 90, 1))
    [found] = judge_run(run, load("hospitals-knowledgesg"), llm_judge(judge, max_new_tokens=9), "j", ARMS, most=9)
    assert (found.win, found.lose, found.unreadable) == (3, 2, 1)


def test_the_command_judges_records_and_prints(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.LocalLLM, "for_server", classmethod(lambda *_: scripted()))
    done = CliRunner().invoke(app, ["judge", str(run), "--judge", "some/model", "--json"])
    assert done.exit_code == 0, done.output
    assert "knowledge_sg against local: 4 won, 0 tied, 2 lost; net 0.333" in done.output
    assert judgements(run)[0]["judge"] == "some/model"
    monkeypatch.setattr(llm.LocalLLM, "for_server", classmethod(lambda *_: ScriptedLLM()))
    with pytest.raises(BadValue, match="goes on after text"):
        CliRunner().invoke(app, ["judge", str(run), "--judge", "some/base"], catch_exceptions=False)


def test_runs_without_responses_are_refused_by_name(run: Path) -> None:
    scenario, judge = load("hospitals-knowledgesg"), llm_judge(scripted())
    with pytest.raises(BadValue, match="two arms or more"):
        judge_run(run, scenario, judge, "j", ["local", "local"], most=9)
    with pytest.raises(BadValue, match="no arm 'other'"):
        judge_run(run, scenario, judge, "j", ["local", "other"], most=9)
    with pytest.raises(BadValue, match="only simulations keep them"):
        judge_run(run.with_name("none"), scenario, judge, "j", ARMS, most=9)
    with pytest.raises(BadValue, match="has labels"):
        judge_run(run, load("hospitals"), judge, "j", ARMS, most=9)


def test_responses_stay_on_this_machine_unless_the_text_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint.RemoteLLM, "connect", classmethod(lambda *_: scripted()))
    made_up = load("hospitals-knowledgesg")
    real = replace(made_up, data=replace(made_up.data, source="patients.csv"))
    far, near = (Endpoint(f"{place}/v1", "m", api="chat") for place in ("https://judge.example", "http://127.0.0.1:1"))
    with pytest.raises(BadValue, match=r"would go to judge\.example"):
        open_judge(real, far, public_data=False, max_new_tokens=9)
    for scenario, place, public in ((made_up, far, False), (real, far, True), (real, near, False)):
        assert open_judge(scenario, place, public_data=public, max_new_tokens=9)


def test_responses_are_kept_in_no_cache_as_they_have_no_guarantee(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDSYNTH_CACHE", str(tmp_path))
    stand = test_endpoint.Stand()
    stand.reply = lambda path, body: (200, test_endpoint.said("hm"))
    try:
        judge = open_judge(
            load("hospitals-knowledgesg"), Endpoint(stand.url, "m", api="chat"), public_data=False, max_new_tokens=9
        )
        judge(["why"], ["secret"], ["other"])
        assert "secret" in json.dumps(stand.seen[-1][1])  # it was asked
    finally:
        stand.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("simulated", [True, False])
def test_a_simulated_client_keeps_its_responses_and_a_site_keeps_none(simulated: bool, tmp_path: Path) -> None:
    test = Corpus(("why", "how"), ("so", "thus"), Provenance.PUBLIC)
    client: Any = SimpleNamespace(simulated=simulated, test=test, work=tmp_path, world=None)
    evaluating._scored(client, ["because", "thus"])
    if simulated:
        rows = [json.loads(line) for line in (tmp_path / RESPONSES).read_text().splitlines()]
        assert rows == [["why", "so", "because"], ["how", "thus", "thus"]]
    assert [path.name for path in tmp_path.iterdir()] == ([RESPONSES] if simulated else [])
