"""Answers of endpoints are kept, what goes out is taken down and capped, and where it may go."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from local import LocalGrid
from test_endpoint import Body, Reply, Stand, complete, echoing, refused, scenario, written

from fedsynth.app.fedsynth_sim import server_app
from fedsynth.clients.app import client_app, simulation
from fedsynth.deployment.plan import deployed
from fedsynth.federation.run.egress import EgressRecord, Sent, egress_lines, egress_of
from fedsynth.models.endpoint import CapReached, EndpointFailed, RemoteLLM
from fedsynth.models.endpoint_cache import Answer, EndpointCache, cache_folder
from fedsynth.reporting.page import render
from fedsynth.reporting.run_page import page
from fedsynth.reporting.run_report import build
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.server import Endpoint
from fedsynth.scenario.toml import load, to_toml
from fedsynth.typed import BadValue


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSYNTH_CACHE", str(tmp_path_factory.mktemp("cache") / "mine"))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    made = Stand()
    made.reply = counted
    yield made
    made.close()


def counted(path: str, body: Body) -> Reply:
    """A text that says which sample it is, of 3 tokens after a prompt of 5."""
    return 200, {
        **written(f" {body['prompt']} {body['seed']}"),
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }


def kept(at: Endpoint, **more: Any) -> RemoteLLM:
    return RemoteLLM(at, cache=EndpointCache(cache_folder()), **more)


# The cache


def test_an_answered_prompt_is_not_asked_again_and_two_samples_of_one_stay_two(stand: Stand) -> None:
    at = Endpoint(stand.url, "small")
    first = complete(kept(at), "flu:", "flu:", "skin:")
    assert len(set(first)) == len(stand.seen) == 3
    again = kept(at)
    assert complete(again, "flu:", "flu:", "skin:") == first
    assert len(stand.seen) == 3
    assert (again.used.read, again.used.written) == (15, 9)  # work done, whoever did it
    assert complete(kept(at), "flu:", "flu:", "flu:", "skin:")[:2] == first[:2]
    assert len(stand.seen) == 5  # the third and the fourth are other samples


@pytest.mark.parametrize(
    "other",
    [
        {"model": "large"},
        {"endpoint": "localhost"},
        {"seed": 6},
        {"temperature": 0.8},
        {"top_p": 0.9},
        {"max_new_tokens": 5},
        {"one_line": True},
        {"prompt": "flu :"},
    ],
)
def test_an_answer_is_that_of_one_question_alone(stand: Stand, other: dict[str, Any]) -> None:
    at = Endpoint(stand.url, "small")
    complete(kept(at), "flu:")
    named = {key: other.pop(key) for key in ("model", "endpoint") if key in other}
    if "endpoint" in named:
        named["endpoint"] = stand.url.replace("127.0.0.1", "localhost")
    complete(kept(replace(at, **named)), other.pop("prompt", "flu:"), **other)
    assert len(stand.seen) == 2


def test_scores_are_kept(stand: Stand) -> None:
    stand.reply = echoing()
    at = Endpoint(stand.url, "small")
    first = kept(at).score(["flu:", "flu:"], [" a cough", " b"])
    assert len(stand.seen) == 3
    assert kept(at).score(["flu:", "flu:"], [" a cough", " b"]) == first
    assert len(stand.seen) == 3


def test_chat_and_completions_of_the_same_words_are_two(stand: Stand) -> None:
    stand.reply = lambda path, body: (
        200,
        {"choices": [{"text": path, "message": {"role": "assistant", "content": path}, "finish_reason": "stop"}]},
    )
    at = Endpoint(stand.url, "small")
    assert complete(kept(at), "flu:") == ["/v1/completions"]
    assert complete(kept(replace(at, api="chat")), "flu:") == ["/v1/chat/completions"]


def test_the_cache_is_its_owners_alone(stand: Stand) -> None:
    before = os.umask(0)
    try:
        complete(kept(Endpoint(stand.url, "small")), "flu:", "skin:")
    finally:
        os.umask(before)
    assert cache_folder() == Path(os.environ["FEDSYNTH_CACHE"]) / "endpoints"
    places = [Path(os.environ["FEDSYNTH_CACHE"]), *Path(os.environ["FEDSYNTH_CACHE"]).rglob("*")]
    assert len([p for p in places if p.is_file()]) == 2
    assert {stat.S_IMODE(p.stat().st_mode) for p in places if p.is_dir()} == {0o700}
    assert {stat.S_IMODE(p.stat().st_mode) for p in places if p.is_file()} == {0o600}


def test_an_open_folder_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    EndpointCache(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-4],
        lambda data: data.replace(b" flu", b" fly"),
        lambda data: b"[]",
        lambda data: b'{"answer": {"text": 3}}',
        lambda data: b"\xff",
    ],
)
def test_a_damaged_file_is_no_answer(stand: Stand, damage: Callable[[bytes], bytes]) -> None:
    at = Endpoint(stand.url, "small")
    first = complete(kept(at), "flu:")
    [path] = cache_folder().rglob("*.json")
    path.write_bytes(damage(path.read_bytes()))
    assert complete(kept(at), "flu:") == first
    assert len(stand.seen) == 2
    assert complete(kept(at), "flu:") == first
    assert len(stand.seen) == 2  # it is whole again


def test_an_answer_comes_back_as_it_is(tmp_path: Path) -> None:
    cache, whole = EndpointCache(tmp_path), Answer(" ü\n", "stop", 3, 1, ("a", "ü"), (None, -1.25))
    cache.put({"q": 1}, whole)
    assert cache.get({"q": 1}) == whole
    cache.put({"q": 2}, Answer())
    assert cache.get({"q": 2}) == Answer()
    assert cache.get({"q": 3}) is None


def test_a_full_disk_costs_no_answer(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    llm = kept(Endpoint(stand.url, "small", concurrency=1))
    assert llm.cache is not None
    llm.cache.folder = Path("/dev/null")
    assert len(complete(llm, "flu:", "skin:")) == 2
    assert caplog.text.count("answers of endpoints are no longer kept in /dev/null") == 1


def test_a_cache_that_cannot_be_made_is_said_so(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSYNTH_CACHE", "mine")
    with pytest.raises(BadValue, match="FEDSYNTH_CACHE must be an absolute path, got 'mine'"):
        RemoteLLM.connect(Endpoint(stand.url, "small"))
    monkeypatch.setenv("FEDSYNTH_CACHE", "/dev/null")
    with pytest.raises(BadValue, match="name another folder in FEDSYNTH_CACHE, or say cache = false at the endpoint"):
        RemoteLLM.connect(Endpoint(stand.url, "small"))
    RemoteLLM.connect(Endpoint(stand.url, "small", cache=False))


def test_the_users_cache_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDSYNTH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fedsynth" / "endpoints"
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder() == Path.home() / ".cache" / "fedsynth" / "endpoints"


def test_a_server_is_asked_first_whatever_the_cache_holds(stand: Stand) -> None:
    for asked in (1, 2):
        llm = RemoteLLM.connect(Endpoint(stand.url, "small"))
        assert len(stand.seen) == asked
    complete(llm, "flu:")
    complete(RemoteLLM.connect(Endpoint(stand.url, "small")), "flu:")
    assert len(stand.seen) == 4
    complete(RemoteLLM.connect(Endpoint(stand.url, "small", cache=False)), "flu:")
    assert len(stand.seen) == 6


KILLED = """
import sys
from fedsynth.models.endpoint import RemoteLLM
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.server import Endpoint
llm = RemoteLLM.connect(Endpoint(sys.argv[1], "small", concurrency=1, retries=0))
print(llm.complete([f"note {i}:" for i in range(6)], SamplingParams(temperature=0.7, max_new_tokens=4), seed=5))
"""


def test_a_process_killed_in_mid_call_asks_only_for_what_lacks(stand: Stand) -> None:
    asking: list[subprocess.Popen[str]] = []

    def reply(path: str, body: Body) -> Reply:
        if body["prompt"] == "note 3:" and len(asking) == 1:
            asking[0].kill()
        return counted(path, body)

    stand.reply = reply
    for _ in range(2):
        asking.append(subprocess.Popen([sys.executable, "-c", KILLED, stand.url], stdout=subprocess.PIPE, text=True))
        said, _ = asking[-1].communicate(timeout=900)  # a busy machine takes long to import
    assert [done.returncode for done in asking] == [-9, 0]
    prompts = [body["prompt"] for body in stand.bodies()]
    assert prompts == ["A", "note 0:", "note 1:", "note 2:", "note 3:", "A", "note 3:", "note 4:", "note 5:"]
    assert [f"note {i}:" in said for i in range(6)] == [True] * 6


# Where text may go

FAR = "https://llm.example/v1"


def asking(tmp_path: Path, url: str, *sets: str) -> Scenario:
    """A scenario with a data file of nobody's and no guarantee, changed as by `--set`; without arms, but for those."""
    rows = [{"text": f"note {i} on a thing", "label": ("heart", "skin")[i % 2]} for i in range(24)]
    pd.DataFrame(rows).to_csv(tmp_path / "notes.csv", index=False)
    found = scenario(source=str(tmp_path / "notes.csv"), url=NEAR)
    (tmp_path / "own.toml").write_text(to_toml(replace(found, arms={}, data=replace(found.data, public=False))))
    return load(tmp_path / "own.toml", [f"server.llm.endpoint={url}", "server.llm.model=small", *sets])


NEAR = "http://127.0.0.1:8000/v1"
DP = ("client.guarantee=dp", "client.budget.epsilon=8.0")
PUBLIC = "data.public=true"
TRUE_TEXTS = "strategy.drafts=true_texts"
FEDPIT = "strategy={use = 'fedsynth.strategies.fedpit:FedPIT'}"


@pytest.mark.parametrize(
    ("url", "sets", "goes"),
    [
        (NEAR, [], True),
        ("http://localhost:8000/v1", [TRUE_TEXTS], True),
        (FAR, [], False),
        (FAR, [TRUE_TEXTS], False),
        (FAR, [FEDPIT], False),
        (FAR, [PUBLIC], True),
        (FAR, [TRUE_TEXTS, PUBLIC], True),
        (FAR, DP, True),
    ],
)
def test_text_without_a_guarantee_stays_on_this_machine_unless_it_is_public(
    tmp_path: Path, url: str, sets: list[str], goes: bool
) -> None:
    if goes:
        at = asking(tmp_path, url, *sets).server.llm
        assert isinstance(at, Endpoint)
        assert at.endpoint == url
        return
    said = rf'client.guarantee = "none", and server.llm is {FAR} on another machine: .* or say data.public = true'
    with pytest.raises(BadValue, match=said):
        asking(tmp_path, url, *sets)


def test_the_professional_and_each_arm_are_looked_at(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r'\[arms.no_dp\] client.guarantee = "none", and server.llm is https'):
        asking(tmp_path, FAR, *DP, "arms.no_dp.client.guarantee=none")
    other = f"arms.other.server.professional={{ endpoint = '{FAR}', model = 'large' }}"
    with pytest.raises(BadValue, match=r"\[arms.other\] .* and server.professional is https"):
        asking(tmp_path, NEAR, other)


def test_a_simulated_world_is_public_and_what_sites_hold_is_not() -> None:
    found = scenario(url=FAR)
    simulated = replace(found, arms={}, data=replace(found.data, public=False))
    assert simulated.server.elsewhere
    with pytest.raises(BadValue, match="text without a guarantee goes to no other machine"):
        deployed(simulated, 2)
    assert deployed(replace(found, arms={}), 2).data.clients == 2


@pytest.mark.parametrize("key", ["llm", "professional"])
def test_local_only_refuses_another_machine_by_name(tmp_path: Path, key: str) -> None:
    sets = [*DP, f"arms.far.server.{key}={{ endpoint = '{FAR}', model = 'large' }}"]
    assert asking(tmp_path, NEAR, *DP, "server.local_only=true").server.local_only
    with pytest.raises(BadValue, match=rf"server.local_only = true, and server.{key} is {FAR} on another machine"):
        asking(tmp_path, NEAR, *sets, "server.local_only=true")
    assert not asking(tmp_path, NEAR, *sets).server.local_only


# What went out


def conduct(toml: str, out: Path) -> None:
    grid = LocalGrid(client_app(simulation), 1, {"scenario-toml": toml, "out-dir": str(out)})
    server_app.conduct(grid, toml, out)


def with_arms(tmp_path: Path, url: str, *sets: str) -> str:
    """An arm whose drafts have a guarantee, one whose drafts have none, and one without drafts; two texts each."""
    arms = ["arms.fdkt={}", "arms.no_dp.client.guarantee=none"]
    arms += ["arms.bare={ client = { guarantee = 'none' }, strategy = { demonstrations = 'none' } }"]
    few = ["strategy.num_texts=2", "server.llm.concurrency=1", "server.llm.retries=0"]
    return to_toml(asking(tmp_path, url, *DP, *few, *arms, *sets))


def test_a_run_takes_down_what_it_sent_and_keeps_what_has_a_guarantee(stand: Stand, tmp_path: Path) -> None:
    toml, out = with_arms(tmp_path, stand.url), tmp_path / "run"
    conduct(toml, out)
    lines = {(line.arm, line.provenance): line for line in egress_of(out)}
    assert set(lines) == {("fdkt", "public"), ("fdkt", "released"), ("no_dp", "no guarantee"), ("bare", "public")}
    assert lines["fdkt", "public"].requests == 1  # the one token before
    assert sum(line.requests for line in lines.values()) == len(stand.seen)
    for line in lines.values():
        assert (line.host, line.endpoint, line.model, line.seed) == ("127.0.0.1", stand.url, "small", 0)
        assert (line.tokens_read, line.tokens_written) == (5 * line.requests, 3 * line.requests)
        # Where no draft was left, `fdkt` has asked for the texts of the label alone that `bare` asks for.
        assert line.from_cache == 0 or line.arm == "bare"
    assert json.loads((out / "egress.json").read_text()) == json.loads((out / "summary.json").read_text())["egress"]
    shown = (out / "egress.jsonl").read_text() + (out / "egress.json").read_text()
    assert "note" not in shown
    assert "heart" not in shown

    report = build(out)
    assert "What went to endpoints" in render(page(report))
    rows = [row for row in report["rows"] if row["part"] == "egress" and row["statistic"] == "requests"]
    assert {(row["arm"], row["metric"]): row["value"] for row in rows} == {
        (arm, f"127.0.0.1/{provenance}"): line.requests for (arm, provenance), line in lines.items()
    }

    asked = len(stand.seen)
    conduct(toml, tmp_path / "again")
    again = {(line.arm, line.provenance): line for line in egress_of(tmp_path / "again")}
    assert again["fdkt", "released"].requests == again["bare", "public"].requests == 0
    assert again["fdkt", "released"].from_cache == lines["fdkt", "released"].requests
    assert again["fdkt", "released"].tokens_from_cache == 8 * lines["fdkt", "released"].requests
    assert again["no_dp", "no guarantee"] == lines["no_dp", "no guarantee"]  # kept nowhere: it is asked again
    assert len(stand.seen) - asked == 1 + lines["no_dp", "no guarantee"].requests


def test_a_run_that_goes_on_adds_to_its_record(stand: Stand, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    toml = with_arms(tmp_path, stand.url, "server.llm.cache=false")
    conduct(toml, whole)
    undisturbed, asked = egress_of(whole), len(stand.seen)
    stand.reply = lambda path, body: counted(path, body) if len(stand.seen) < asked + 4 else (503, refused("stopped"))
    server_app._far.cache_clear()
    with pytest.raises(EndpointFailed):
        conduct(toml, out)
    broken = egress_of(out)
    assert sum(line.requests for line in broken) == len(stand.seen) - asked >= 4  # what failed went out as well
    assert json.loads((out / "egress.json").read_text()) == [vars(line) for line in broken]
    with (out / "egress.jsonl").open("a") as file:
        file.write('{"arm": "fdkt", "se')  # a kill cut it
    stand.reply = counted
    conduct(toml, out)
    sums = [sum(line.requests for line in lines) for lines in (undisturbed, egress_of(out))]
    assert sums[1] == len(stand.seen) - asked
    assert sums[0] + 1 <= sums[1] <= sums[0] + 4  # the one token, and what was under way


def test_requests_that_are_repeated_or_fail_went_out_too(stand: Stand, tmp_path: Path) -> None:
    left = [503, 503]
    stand.reply = lambda path, body: (left.pop(), refused("not now")) if left else counted(path, body)
    record = EgressRecord(tmp_path)
    complete(RemoteLLM(Endpoint(stand.url, "small", retries=2), egress=record), "flu:")
    [line] = egress_of(tmp_path)
    assert (line.requests, line.tokens_read, line.tokens_written) == (3, 5, 3)
    assert (line.arm, line.seed, line.provenance) == ("", -1, "public")  # before the first cell
    stand.reply = lambda path, body: (503, refused("no"))
    with pytest.raises(EndpointFailed):
        complete(RemoteLLM(Endpoint(stand.url, "small", retries=0), egress=record), "flu:")
    [line] = egress_of(tmp_path)
    assert (line.requests, line.tokens_read) == (4, 5)


def test_lines_for_people_are_sums() -> None:
    one = Sent("fdkt", 0, "llm.example", FAR, "large", "released", 1000, 2000, 300, 4, 50)
    two = replace(one, arm="other", seed=1)
    assert egress_lines([one, two, replace(one, provenance="public")]) == [
        "sent to llm.example (model 'large'; text released under differential privacy): 2,000 requests, 4,000 tokens "
        "of prompts, 600 of answers; 8 answers of 100 tokens from the cache",
        "sent to llm.example (model 'large'; public text): 1,000 requests, 2,000 tokens of prompts, 300 of answers; "
        "4 answers of 50 tokens from the cache",
    ]


# The cap


def test_no_request_begins_above_the_cap(stand: Stand, tmp_path: Path) -> None:
    at = Endpoint(stand.url, "small", concurrency=1, max_tokens_total=17)
    with pytest.raises(CapReached) as caught:
        complete(kept(at, egress=EgressRecord(tmp_path)), "a", "b", "c", "d", "e")
    assert len(stand.seen) == 3  # 0, 8 and 16 tokens before each
    said = str(caught.value)
    assert said.startswith(f"the model 'small' at {stand.url} has read and written 24 tokens for this run, and max_")
    assert "max_tokens_total is 17: raise it in a new run, or ask for fewer texts; the answers so far are kept" in said
    with pytest.raises(CapReached):  # it is counted over resumptions
        complete(kept(at, egress=EgressRecord(tmp_path)), "a", "b", "c", "d")
    assert len(stand.seen) == 3
    assert len(complete(kept(at, egress=EgressRecord(tmp_path)), "a", "b", "c")) == 3  # kept answers are free
    with pytest.raises(CapReached):
        complete(RemoteLLM(replace(at, max_tokens_total=8)), "a", "b", "c")
    assert len(stand.seen) == 4
    assert len(complete(RemoteLLM(replace(at, max_tokens_total=24)), "a", "b", "c")) == 3


def test_a_cap_needs_a_server_that_counts(stand: Stand) -> None:
    stand.reply = lambda path, body: (200, written(" a"))
    with pytest.raises(EndpointFailed, match="reports no tokens, so that max_tokens_total cannot hold: leave it out"):
        RemoteLLM.connect(Endpoint(stand.url, "small", max_tokens_total=10))
    with pytest.raises(BadValue, match="max_tokens_total must be at least 1, got 0"):
        Endpoint(stand.url, "small", max_tokens_total=0)
