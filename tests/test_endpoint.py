"""The remote LLM against servers on loopback, over real sockets."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from local import LocalGrid

from fedsynth.app.fedsynth_sim import server_app
from fedsynth.clients.app import client_app, simulation
from fedsynth.federation.run.directory import prepare
from fedsynth.federation.run.egress import EgressRecord
from fedsynth.models.chat import Chat
from fedsynth.models.embedding import Embedder
from fedsynth.models.endpoint import CannotScore, EndpointFailed, RemoteLLM
from fedsynth.models.llm import LocalLLM
from fedsynth.models.of_scenario import endpoints_of, models_of
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.server import Endpoint, Server
from fedsynth.scenario.toml import cells, from_toml, load, to_toml
from fedsynth.simulation.simulate import pinned
from fedsynth.typed import BadValue

Body = dict[str, Any]
Reply = tuple[int, object]
KEY = "sk-do-not-repeat-me"


class Stand:
    """An OpenAI-compatible server whose answers the test writes; requests are recorded.

    Attributes:
        reply: Path and body -> status and what is sent: JSON, or text as it is.
        models: What /v1/models lists; None answers 404.
        waits: The headers that say how long to wait before a request is repeated.
    """

    def __init__(self) -> None:
        self.reply: Callable[[str, Body], Reply] = lambda path, body: (200, written(" a text"))
        self.models: list[str] | None = ["small"]
        self.waits = {"retry-after-ms": "1"}
        self.seen: list[tuple[str, Body, dict[str, str]]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        stand = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                listed = stand.models
                self.answer(404, {}) if listed is None else self.answer(200, {"data": [{"id": m} for m in listed]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stand.lock:
                    stand.seen.append((self.path, body, {k.lower(): v for k, v in self.headers.items()}))
                    stand.at_once += 1
                    stand.most_at_once = max(stand.most_at_once, stand.at_once)
                try:
                    status, content = stand.reply(self.path, body)
                finally:
                    with stand.lock:
                        stand.at_once -= 1
                self.answer(status, content)

            def answer(self, status: int, content: object) -> None:
                sent = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                kind = "text/html" if sent.startswith("<") else "application/json"
                for name, value in {
                    "Content-Type": kind,
                    **stand.waits,
                    "Location": f"{stand.url}/moved",
                    "Content-Length": str(len(sent.encode())),
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent.encode())

            def log_message(self, *_: object) -> None: ...

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None: ...  # a client that no longer waits

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def bodies(self) -> list[Body]:
        return [body for _, body, _ in self.seen]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def written(text: str | None, finish: str = "length", **more: object) -> Body:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, **more}]}


def refused(message: str) -> Body:
    return {"error": {"message": message, "type": "x", "code": None}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port may come again, and with it another test's answers."""
    monkeypatch.setenv("FEDSYNTH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    made = Stand()
    yield made
    made.close()


def complete(llm: RemoteLLM, *prompts: str, seed: int = 5, **more: Any) -> list[str]:
    sampling = SamplingParams(**{"temperature": 0.7, "max_new_tokens": 4, **more})
    return llm.complete(prompts, sampling, seed=seed)


def failure(stand: Stand, **more: Any) -> str:
    """What is said when a prompt gets no answer: one line that names endpoint and model."""
    with pytest.raises(EndpointFailed) as caught:
        complete(RemoteLLM(Endpoint(stand.url, "small", **{"retries": 0, **more})), "heart:")
    said = str(caught.value)
    assert said.startswith(f"the model 'small' at {stand.url} ")
    assert "\n" not in said
    return said


# Completions


def test_answers_stand_in_the_order_of_the_prompts_however_they_come(stand: Stand) -> None:
    def reply(path: str, body: Body) -> Reply:
        time.sleep({"a": 0.15, "b": 0.1, "c": 0.0}[body["prompt"]])
        return 200, written(f" after {body['prompt']}\nand on")

    stand.reply = reply
    assert complete(RemoteLLM(Endpoint(stand.url, "small")), "a", "b", "c") == [f" after {p}\nand on" for p in "abc"]


def test_a_prompt_goes_out_as_it_is_with_what_was_asked_for(stand: Stand) -> None:
    assert complete(RemoteLLM(Endpoint(stand.url, "small")), "heart:", max_new_tokens=7, top_p=0.9) == [" a text"]
    [(path, body, _)] = stand.seen
    seed = body.pop("seed")
    assert path == "/v1/completions"
    assert body == {"model": "small", "prompt": "heart:", "max_tokens": 7, "temperature": 0.7, "top_p": 0.9}
    assert 0 <= seed < 2**31


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_top_k_goes_out_as_a_field_of_its_own_and_is_another_question_to_the_cache(stand: Stand, api: Any) -> None:
    stand.reply = lambda path, body: (200, written(" a text") if api == "completions" else said("a text"))
    llm = RemoteLLM.connect(Endpoint(stand.url, "small", api=api))
    for k in (0, 50, 0, 50):
        complete(llm, "heart:", top_k=k)
    assert [body.get("top_k") for body in stand.bodies()] == [None, None, 50]  # the first one connects
    assert all("extra_body" not in body for body in stand.bodies())


def test_a_server_that_knows_no_top_k_is_named_with_its_own_words(stand: Stand) -> None:
    def reply(path: str, body: Body) -> Reply:
        return (400, refused("Unrecognized request argument: top_k")) if "top_k" in body else (200, written(" a"))

    stand.reply = reply
    llm = RemoteLLM(Endpoint(stand.url, "small"))
    with pytest.raises(EndpointFailed, match="Unrecognized request argument: top_k"):
        complete(llm, "heart:", top_k=50)
    assert complete(llm, "heart:") == [" a"]


def test_chat_puts_each_prompt_as_one_user_message(stand: Stand) -> None:
    def reply(path: str, body: Body) -> Reply:
        return 200, {"choices": [{"message": {"role": "assistant", "content": path}, "finish_reason": "stop"}]}

    stand.reply = reply
    assert complete(RemoteLLM(Endpoint(stand.url, "small", api="chat")), "one", "two") == ["/v1/chat/completions"] * 2
    messages = sorted((body["messages"] for body in stand.bodies()), key=str)
    assert messages == [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
    assert all("prompt" not in body for body in stand.bodies())


def said(text: str, finish: str = "stop") -> Body:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def test_a_question_goes_out_with_its_system_text_and_comes_back_without_thoughts(stand: Stand) -> None:
    stand.reply = lambda path, body: (200, said("<think>\nhm\n</think>\n\nParis."))
    llm = RemoteLLM(Endpoint(stand.url, "small", api="chat", concurrency=1))
    asked = [Chat("Which?"), Chat("Which?", "Be short."), "Which?"]
    assert llm.chats
    answers = llm.complete(asked, SamplingParams.greedy(9), seed=0)
    assert answers == ["Paris.", "Paris.", "<think>\nhm\n</think>\n\nParis."]
    user = {"role": "user", "content": "Which?"}
    assert [body["messages"] for body in stand.bodies()] == [
        [user],
        [{"role": "system", "content": "Be short."}, user],
        [user],
    ]


def test_a_model_that_goes_on_after_text_is_asked_no_question(stand: Stand) -> None:
    llm = RemoteLLM(Endpoint(stand.url, "small"))
    assert not llm.chats
    with pytest.raises(BadValue, match=r"the model 'small' at http.* cannot be asked a question: set api = \"chat\""):
        llm.complete(["a", Chat("a")], SamplingParams.greedy(9), seed=0)
    assert stand.seen == []


def test_one_line_is_asked_for_by_a_stop_and_again_where_that_leaves_no_text(stand: Stand) -> None:
    texts = {"plain": " one", "blank": "", "unknown": None}  # with the stop

    def reply(path: str, body: Body) -> Reply:
        if "stop" not in body:
            return 200, written("\n\n two\nthree")
        assert body["stop"] == ["\n"]
        return (400, refused("no stop here")) if body["prompt"] == "unknown" else (200, written(texts[body["prompt"]]))

    stand.reply = reply
    llm = RemoteLLM(Endpoint(stand.url, "small", concurrency=1))
    assert complete(llm, *texts, one_line=True) == [" one", " two", " two"]
    asked = [(body["prompt"], "stop" in body, body["seed"]) for body in stand.bodies()]
    assert [each[:2] for each in asked] == [
        ("plain", True),
        ("blank", True),
        ("blank", False),
        ("unknown", True),
        ("unknown", False),
    ]
    assert asked[1][2] == asked[2][2]
    assert complete(llm, "plain") == ["\n\n two\nthree"]  # not asked for


def test_a_thought_that_the_stop_cut_is_thought_to_its_end(stand: Stand) -> None:
    stand.reply = lambda path, body: (200, said("<think>" if "stop" in body else "<think>\na\n</think>\nYes.\nNo."))
    llm = RemoteLLM(Endpoint(stand.url, "small", api="chat"))
    assert llm.complete([Chat("q")], SamplingParams.greedy(9, one_line=True), seed=0) == ["Yes."]
    assert len(stand.seen) == 2


def test_equal_prompts_get_seeds_of_their_own_and_each_call_the_same_again(stand: Stand) -> None:
    llm = RemoteLLM(Endpoint(stand.url, "small", concurrency=1))
    for seed in (5, 5, 6):
        complete(llm, "heart:", "heart:", seed=seed)
    first, again, other = ([body["seed"] for body in stand.bodies()[i : i + 2]] for i in (0, 2, 4))
    assert first == again
    assert len({*first, *other}) == 4


# Structured answers


SCHEMA = '{"type": "object"}'
FORMS = {
    "json_schema": {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": {"type": "object"}},
    },
    "json_object": {"type": "json_object", "schema": {"type": "object"}},
}


@pytest.mark.parametrize("structured", list(FORMS))
def test_a_schema_goes_out_with_its_question_alone(stand: Stand, structured: str) -> None:
    stand.reply = lambda path, body: (200, said("{}"))
    at = Endpoint(stand.url, "small", api="chat", concurrency=1, structured=structured)  # type: ignore[arg-type]  # a parameter is a text
    asked = [Chat("Which?", schema=SCHEMA), Chat("Which?"), "Which?"]
    assert RemoteLLM(at).complete(asked, SamplingParams.greedy(9), seed=0) == ["{}"] * 3
    assert [body.get("response_format") for body in stand.bodies()] == [FORMS[structured], None, None]
    RemoteLLM(replace(at, structured="none")).complete(asked[:1], SamplingParams.greedy(9), seed=0)
    assert "response_format" not in stand.bodies()[-1]


def test_a_structured_endpoint_shows_before_a_run_that_it_holds_to_a_schema(stand: Stand) -> None:
    at = Endpoint(stand.url, "small", api="chat", retries=0, structured="json_schema")
    stand.reply = lambda path, body: (200, said('{"numbers": [2]}' if "response_format" in body else "A"))
    assert RemoteLLM.connect(at).structured
    assert not RemoteLLM.connect(replace(at, structured="none")).structured
    assert [
        body.get("response_format", {}).get("json_schema", {}).get("schema", {}).get("required")
        for body in stand.bodies()
    ] == [None, ["numbers"], None]


@pytest.mark.parametrize(
    ("status", "content", "why"),
    [
        (400, refused("response_format is unknown"), r"400: response_format is unknown"),
        (500, refused("Input should be 'text'"), "500: Input should be 'text'"),
        (200, said("The second one."), "it says 'The second one.'"),
        (200, said('{"other": [2]}'), "it says '{\"other\": \\[2\\]}'"),
        (200, said("[2]"), r"it says '\[2\]'"),
    ],
)
def test_a_server_that_holds_to_no_schema_is_refused_by_name(
    stand: Stand, status: int, content: Body, why: str
) -> None:
    stand.reply = lambda path, body: (status, content) if "response_format" in body else (200, said("A"))
    for structured, other in (("json_schema", "json_object"), ("json_object", "json_schema")):
        at = Endpoint(stand.url, "small", api="chat", retries=0, structured=structured)  # type: ignore[arg-type]  # likewise
        asks = f'gives no structured answers by "{structured}" \\({why}\\): leave .* or try structured = "{other}"'
        with pytest.raises(EndpointFailed, match=f"the model 'small' at {stand.url} {asks}"):
            RemoteLLM.connect(at)


def test_a_structured_answer_needs_the_chat_api() -> None:
    with pytest.raises(
        BadValue, match='structured = "json_schema" is for questions: say api = "chat", or leave it out'
    ):
        Endpoint(AT, "small", structured="json_schema")


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(stand: Stand, concurrency: int) -> None:
    def reply(path: str, body: Body) -> Reply:
        time.sleep(0.03)
        return 200, written("")

    stand.reply = reply
    assert complete(RemoteLLM(Endpoint(stand.url, "small", concurrency=concurrency)), *"abcdef") == [""] * 6
    assert stand.most_at_once == concurrency


def test_no_prompts_ask_nothing(stand: Stand) -> None:
    llm = RemoteLLM(Endpoint(stand.url, "small"))
    assert complete(llm) == []
    assert llm.score([], []) == []
    assert stand.seen == []


def test_what_a_content_filter_cut_is_empty(stand: Stand) -> None:
    answers = {"cut": written("half a", "content_filter"), "none": written(None), "whole": written("all")}
    stand.reply = lambda path, body: (200, answers[body["prompt"]])
    assert complete(RemoteLLM(Endpoint(stand.url, "small")), *answers) == ["", "", "all"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must not be negative, got -0.1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\], got 1.1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(stand: Stand, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        complete(RemoteLLM(Endpoint(stand.url, "small")), "heart:", **more)
    assert stand.seen == []


# Failures


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_failing_server_is_asked_again(stand: Stand, status: int) -> None:
    left = [status, status]
    stand.reply = lambda path, body: (left.pop(), refused("not now")) if left else (200, written("now"))
    assert complete(RemoteLLM(Endpoint(stand.url, "small", retries=2)), "heart:") == ["now"]
    assert len(stand.seen) == 3
    assert len({body["seed"] for body in stand.bodies()}) == 1


def test_retries_end(stand: Stand) -> None:
    stand.reply = lambda path, body: (500, refused("out of\nmemory"))
    assert "failed (500: out of memory), after 2 retries: its server's log says more" in failure(stand, retries=2)
    assert len(stand.seen) == 3
    stand.reply = lambda path, body: (429, refused("quota"))
    assert "takes no more requests (429: quota), after 1 retries: lower concurrency" in failure(stand, retries=1)


def test_waits_double_less_some_chance_unless_the_server_says_how_long(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(**{**vars(time), "sleep": waits.append}))
    stand.reply, stand.waits = lambda path, body: (503, refused("not now")), {}
    for _ in range(3):
        failure(stand, retries=4)
    shares = [wait / longest for wait, longest in zip(waits, [0.5, 1, 2, 4] * 3, strict=True)]
    assert all(0.75 <= share <= 1 for share in shares)
    assert len(set(shares)) == 12  # jitter: clients that failed together do not come back together
    waits.clear()
    stand.waits = {"Retry-After": "7"}
    failure(stand, retries=2)
    assert waits == [7.0, 7.0]


def test_the_first_failure_ends_the_call(stand: Stand) -> None:
    stand.reply = lambda path, body: (400, refused("no"))
    with pytest.raises(EndpointFailed):
        complete(RemoteLLM(Endpoint(stand.url, "small", concurrency=2)), *["heart:"] * 500)
    assert len(stand.seen) < 100


def test_a_server_that_hangs_is_not_waited_for(stand: Stand) -> None:
    done = threading.Event()

    def reply(path: str, body: Body) -> Reply:
        done.wait(20)
        return 200, written("late")

    stand.reply = reply
    started = time.monotonic()
    said = failure(stand, timeout=0.2)
    done.set()
    assert time.monotonic() - started < 5
    assert "gave no answer within 0.2 s, after 0 retries: raise timeout, or lower concurrency" in said


def test_a_server_that_is_not_there_is_said_so(stand: Stand) -> None:
    stand.close()
    said = failure(stand)
    assert re.search(r"cannot be reached \(.*refused.*\): start its server, or check the address", said)


def test_a_missing_key_is_said_with_the_way_to_give_one(stand: Stand) -> None:
    stand.reply = lambda path, body: (401, refused("no key"))
    assert "refuses access (401): name the variable that holds the key as key_env" in failure(stand)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_key_is_in_no_message_log_or_traceback(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    monkeypatch.setenv("LAB_KEY", KEY)
    stand.reply = lambda path, body: (status, refused(f"wrong key: {KEY}"))
    llm = RemoteLLM(Endpoint(stand.url, "small", key_env="LAB_KEY", retries=0))
    with caplog.at_level(logging.DEBUG), pytest.raises(EndpointFailed) as caught:
        complete(llm, "heart:")
    assert stand.seen[0][2]["authorization"] == f"Bearer {KEY}"
    assert KEY not in f"{caught.value}{caught.getrepr(chain=True)}{caplog.text}{llm!r}{vars(llm)}{llm.endpoint}"
    assert ("LAB_KEY" if status < 500 else "wrong key: ***") in str(caught.value)


def test_keys_and_names_of_the_environment_go_nowhere_by_themselves(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_WEBHOOK_SECRET"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert complete(RemoteLLM(Endpoint(stand.url, "small")), "heart:") == [" a text"]
    assert KEY not in str(stand.seen)


def test_an_unset_key_is_refused_at_once(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAB_KEY", raising=False)
    for value in (None, " "):
        if value is not None:
            monkeypatch.setenv("LAB_KEY", value)
        with pytest.raises(BadValue, match="the environment variable LAB_KEY is not set: put the key for the model"):
            RemoteLLM(Endpoint(stand.url, "small", key_env="LAB_KEY"))


def test_an_unknown_model_is_said_with_those_that_the_server_has(stand: Stand) -> None:
    stand.reply = lambda path, body: (404, refused("no such model"))
    stand.models = ["large", "medium"]
    assert failure(stand).endswith("is not found (404): its server has 'large', 'medium'")
    stand.models = [f"m{i}" for i in range(20)]
    assert failure(stand).endswith("'m7' and 12 more")
    stand.models = []
    assert failure(stand).endswith("its server has none")
    stand.models = None
    assert "(404): check that the address ends in /v1, and the model's name" in failure(stand)


def test_a_server_without_completions_is_told_from_one_without_the_model(stand: Stand) -> None:
    stand.reply = lambda path, body: (404, refused("no such path"))
    assert 'does not answer completions (404): try api = "chat"' in failure(stand)
    assert 'does not answer chat (404): try api = "completions"' in failure(stand, api="chat")


def test_a_prompt_that_is_too_long_costs_its_own_answer_alone(stand: Stand) -> None:
    def reply(path: str, body: Body) -> Reply:
        return (400, refused("prompt too long")) if "long" in str(body["prompt"]) else (200, written(" fine"))

    stand.reply = reply
    llm = RemoteLLM(Endpoint(stand.url, "small"))
    assert llm.complete(["a", "long", "b"], SamplingParams.greedy(4), seed=0) == [" fine", "", " fine"]
    assert llm.complete(["long", "longer"], SamplingParams.greedy(4), seed=0) == ["", ""]
    stand.reply = lambda path, body: (400, refused("prompt too long"))
    with pytest.raises(EndpointFailed, match="prompt too long"):
        llm.complete(["long", "longer"], SamplingParams.greedy(4), seed=0)


def test_a_text_that_is_too_long_to_score_costs_its_own_score_alone(stand: Stand) -> None:
    def reply(path: str, body: Body) -> Reply:
        if "long" in (text := str(body["prompt"])):
            return 400, refused("prompt too long")
        told = {"tokens": list(text), "token_logprobs": [None, *[-1.0] * (len(text) - 1)]}
        return 200, {
            **written(text + "!", logprobs=told),
            "usage": {"prompt_tokens": len(text), "completion_tokens": 1},
        }

    stand.reply = reply
    assert RemoteLLM(Endpoint(stand.url, "small")).score(["a:"] * 3, ["b", "long", "c"]) == [-1.0, -math.inf, -1.0]


def test_a_refused_request_repeats_the_server_in_one_line(stand: Stand) -> None:
    stand.reply = lambda path, body: (400, refused("maximum context length is 8\ntokens " + "x" * 1000))
    assert "refuses the request (400: maximum context length is 8 tokens xxx" in failure(stand)
    assert len(failure(stand)) < 500
    stand.reply = lambda path, body: (422, {"detail": "prompt must be a string"})
    assert "(422: prompt must be a string): if a prompt is too long" in failure(stand)


@pytest.mark.parametrize("content", [{"choices": []}, {}, [], "<html>Welcome</html>", "{not json", '"text"'])
def test_what_is_no_completion_is_said_so(stand: Stand, content: object) -> None:
    stand.reply = lambda path, body: (200, content)
    for api in ("completions", "chat"):
        assert failure(stand, api=api).endswith(": check that the address ends in /v1")


@pytest.mark.parametrize("status", [302, 308])
def test_text_is_not_carried_on_to_where_a_server_points(stand: Stand, status: int) -> None:
    stand.reply = lambda path, body: (status, {})
    assert f"refuses the request ({status}" in failure(stand)
    assert [path for path, _, _ in stand.seen] == ["/v1/completions"]


def test_a_scenarios_model_is_asked_for_one_token_first(stand: Stand) -> None:
    at = Endpoint(stand.url, "small", retries=0, concurrency=2)
    assert RemoteLLM.connect(at).endpoint == at
    assert [body["max_tokens"] for body in stand.bodies()] == [1]
    stand.reply = lambda path, body: (404, refused("no such model"))
    with pytest.raises(EndpointFailed, match="its server has 'small'"):
        RemoteLLM.connect(replace(at, model="smal"))


# Scores: this server's tokens are words with the blanks before them, and a token of n characters has likelihood -n.


def echoing(*, bos: bool = True) -> Callable[[str, Body], Reply]:
    def reply(path: str, body: Body) -> Reply:
        assert (body["echo"], body["logprobs"]) == (True, 1)
        tokens = (["<s>"] if bos else []) + re.findall(r"\s*\S+", body["prompt"])
        used = {"prompt_tokens": len(tokens), "completion_tokens": body["max_tokens"], "total_tokens": 99}
        new = [" new"] * body["max_tokens"]
        logs = [None, *(-float(len(t)) for t in [*tokens, *new][1:])]
        told = {"tokens": [*tokens, *new], "token_logprobs": logs, "text_offset": [0] * len(logs), "top_logprobs": None}
        return 200, {**written(body["prompt"] + "".join(new), logprobs=told), "usage": used}

    return reply


@pytest.mark.parametrize("bos", [True, False])
def test_a_score_is_the_mean_over_the_continuations_own_tokens(stand: Stand, bos: bool) -> None:
    stand.reply = echoing(bos=bos)
    prompts = ["a note on flu:", "a note on flu:", "one"]
    scores = RemoteLLM(Endpoint(stand.url, "small")).score(prompts, [" a bad cough", " x", " two"])
    assert scores == [-(2 + 4 + 6) / 3, -2.0, -4.0]


def test_a_token_across_the_border_is_scored(stand: Stand) -> None:
    stand.reply = echoing()
    assert RemoteLLM(Endpoint(stand.url, "small")).score(["on flu:"], ["cough now"]) == [
        -(len(" flu:cough") + len(" now")) / 2
    ]


def test_a_text_is_sent_once(stand: Stand) -> None:
    stand.reply = echoing()
    llm = RemoteLLM(Endpoint(stand.url, "small"))
    llm.score(["flu:", "flu:", "flu:"], [" a", " b", " a"])
    llm.score(["flu:"], [" c"])
    assert sorted(body["prompt"] for body in stand.bodies()) == ["flu:", "flu:", "flu: a", "flu: b", "flu: c"]


def test_scores_of_nothing_are_refused(stand: Stand) -> None:
    stand.reply = echoing(bos=False)
    llm = RemoteLLM(Endpoint(stand.url, "small"))
    with pytest.raises(ValueError, match="got 2 for 1"):
        llm.score(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="continuation 1 holds no token: ''; leave empty texts out"):
        llm.score(["a", "a"], [" b", ""])
    for prompt in ("", "flu:"):
        with pytest.raises(ValueError, match=f"prompt 0 holds no token of its own: '{prompt}'; give a first word"):
            llm.score([prompt], ["cough"])


@pytest.mark.parametrize(
    "reply",
    [
        lambda path, body: (400, refused("echo is not supported")),
        lambda path, body: (422, refused("echo is not supported")),
        lambda path, body: (200, written(" ignores echo and logprobs")),
        lambda path, body: (200, written(body["prompt"], logprobs=None)),
        lambda path, body: (200, written(" x", logprobs={"tokens": [" x"], "token_logprobs": [-1.0]})),
    ],
)
def test_an_endpoint_that_cannot_score_says_so(stand: Stand, reply: Callable[[str, Body], Reply]) -> None:
    stand.reply = reply
    with pytest.raises(CannotScore) as caught:
        RemoteLLM(Endpoint(stand.url, "small", retries=0)).score(["flu:"], [" cough"])
    assert f"the model 'small' at {stand.url} does not tell" in str(caught.value)
    assert 'use judge = "instruction"' in str(caught.value)


def test_a_chat_endpoint_cannot_score(stand: Stand) -> None:
    with pytest.raises(CannotScore, match="instruction"):
        RemoteLLM(Endpoint(stand.url, "small", api="chat")).score(["flu:"], [" cough"])
    assert stand.seen == []


def test_a_failure_while_scoring_is_not_taken_for_inability(stand: Stand) -> None:
    stand.reply = lambda path, body: (503, refused("loading"))
    with pytest.raises(EndpointFailed, match="503: loading"):
        RemoteLLM(Endpoint(stand.url, "small", retries=0)).score(["flu:"], [" cough"])


# In a scenario

TOML = """
name = "far"
[strategy]
use = "fedsynth.strategies.fdkt:FDKT"
per_label = 4
min_words = 1
num_texts = 4
shots = 1
judge = "none"
[data]
source = "{source}"
public = true
labels = ["heart", "skin"]
clients = 1
[client]
generator = "{model}"
task_model = "{model}"
guarantee = "none"
generator_training = {{ expected_batch_size = 5, steps = 1 }}
task_training = {{ augmented_epochs = 1, private_epochs = 1 }}
[server]
llm = {{ endpoint = "{url}", model = "small", retries = 0 }}
embedder = "{model}"
[arms.far]
[arms.near.server]
llm = "assets:tiny-llm"
[arms.elsewhere.server]
professional = {{ endpoint = "https://elsewhere.example/v1", model = "large", key_env = "LAB_KEY", api = "chat" }}
"""
AT = "http://127.0.0.1:8000/v1"


def scenario(**more: str) -> Scenario:
    return from_toml(TOML.format(**{"source": "world:hospitals", "model": tiny.folder(), "url": AT, **more}))


def test_an_endpoint_stands_in_a_scenario_and_comes_back(tmp_path: Path) -> None:
    found = scenario()
    assert found.server.llm == Endpoint(AT, "small", retries=0)
    assert from_toml(to_toml(found)) == found
    (tmp_path / "far.toml").write_text(to_toml(found))
    changed = load(tmp_path / "far.toml", ["server.llm.model=other", "server.professional=assets:tiny-llm"]).server
    assert (changed.llm, changed.professional) == (Endpoint(AT, "other", retries=0), "assets:tiny-llm")
    by_arm = {cell.arm: cell.scenario.server for cell in cells(found)}
    assert by_arm["near"].llm == "assets:tiny-llm"
    assert by_arm["elsewhere"].professional == Endpoint(
        "https://elsewhere.example/v1", "large", key_env="LAB_KEY", api="chat"
    )


def test_endpoints_are_neither_loaded_nor_pinned_but_written_down(tmp_path: Path) -> None:
    found = scenario()
    assert pinned(found) == found
    assert set(models_of(found)) == {
        (tiny.folder(), "generator"),
        (tiny.folder(), "task_model"),
        (tiny.folder(), "embedder"),
        ("assets:tiny-llm", "llm"),
    }
    assert [at.model for at in endpoints_of(found)] == ["small", "large"]
    prepare(found, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert facts["endpoints"] == [
        {"endpoint": AT, "model": "small"},
        {"endpoint": "https://elsewhere.example/v1", "model": "large"},
    ]
    assert set(facts["models"]) == {tiny.folder(), "assets:tiny-llm"}


def test_a_local_professional_is_checked_as_an_llm() -> None:
    toml = to_toml(scenario()).replace("[server]", '[server]\nprofessional = "org/other"')
    assert ("org/other", "llm") in models_of(from_toml(toml))


def test_another_endpoint_does_not_get_the_key_of_the_first() -> None:
    toml = to_toml(scenario(url="https://first.example/v1")).replace(
        "[server.llm]", '[server.llm]\nkey_env = "LAB_KEY"'
    )
    arms = '[arms.other.server.llm]\nendpoint = "https://second.example/v1"\nmodel = "large"\n'
    arms += '[arms.same.server.llm]\nmodel = "large"\n'
    found = {cell.arm: cell.scenario.server.llm for cell in cells(from_toml(toml + arms))}
    assert found["other"] == Endpoint("https://second.example/v1", "large")
    assert found["same"] == Endpoint("https://first.example/v1", "large", key_env="LAB_KEY", retries=0)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8000/v1", "ftp://host/v1", "http://", "http:///v1", "https://me:secret@host/v1",
     "https://host/v1?key=secret", "https://host/v1#secret", "http://host:port/v1", "http://[::1/v1", ""],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(BadValue, match="endpoint must read http://HOST:PORT/v1 or https://HOST/v1") as caught:
        Endpoint(address, "small")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["host.example", "10.0.0.1", "localhost.example"])
def test_a_key_does_not_travel_in_clear(host: str) -> None:
    with pytest.raises(BadValue, match=f"the key would go to {host} in clear: use https://"):
        Endpoint(f"http://{host}:8000/v1", "small", key_env="LAB_KEY")
    Endpoint(f"http://{host}:8000/v1", "small")
    Endpoint(f"https://{host}:8000/v1", "small", key_env="LAB_KEY")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "[::1]"])
def test_a_key_may_go_to_this_machine(host: str) -> None:
    Endpoint(f"http://{host}:8000/v1", "small", key_env="LAB_KEY")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model": ""}, "model is empty"),
        ({"timeout": 0.0}, "timeout must be finite and above 0, got 0.0"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"key_env": KEY}, "a key is no part of a scenario"),
    ],
)
def test_a_bad_endpoint_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=said) as caught:
        Endpoint(**{"endpoint": AT, "model": "small", **more})
    assert KEY not in str(caught.value)


def test_a_mistake_in_the_table_is_named_with_its_place() -> None:
    with pytest.raises(BadValue, match=r"unknown key 'modell' in \[server.llm\]; did you mean 'model'"):
        from_toml(to_toml(scenario()).replace('model = "small"', 'modell = "small"'))
    with pytest.raises(BadValue, match=r"'server\.llm\.endpoint' is missing"):
        from_toml(to_toml(scenario()).replace(f'endpoint = "{AT}"', ""))


def test_an_endpoint_needs_an_embedder_beside_it() -> None:
    with pytest.raises(BadValue, match="the llm is an endpoint, which embeds no text: name an embedder"):
        Server(Endpoint(AT, "small"))
    Server("assets:tiny-llm", professional=Endpoint(AT, "small"))


def test_a_run_asks_the_endpoint(stand: Stand, tmp_path: Path) -> None:
    rows = [{"text": f"note {i} on a thing", "label": ("heart", "skin")[i % 2]} for i in range(24)]
    pd.DataFrame(rows).to_csv(tmp_path / "notes.csv", index=False)
    toml = to_toml(replace(scenario(source=str(tmp_path / "notes.csv"), url=stand.url), run=("far",)))
    number = iter(range(10**6))
    stand.reply = lambda path, body: (200, written(f" text {next(number)} from afar\nheart: another"))
    out = tmp_path / "run"
    grid = LocalGrid(client_app(simulation), 1, {"scenario-toml": toml, "out-dir": str(out)})
    server_app.conduct(grid, toml, out)
    [file] = (out / "corpora" / "far" / "seed-0").glob("written-*.parquet")
    texts = list(pd.read_parquet(file)["prompt"])
    assert texts
    assert all(re.fullmatch(r"text \d+ from afar", text) for text in texts)
    assert len(stand.seen) > len(texts)  # the one token before


def test_models_of_the_server_are_loaded_once_and_by_what_they_are(stand: Stand, tmp_path: Path) -> None:
    at = Endpoint(stand.url, "small")
    record = EgressRecord(tmp_path)
    far, near = server_app._llm(at, None, record), server_app._llm("assets:tiny-llm")
    assert server_app._llm(at, None, record) is far
    assert isinstance(far, RemoteLLM)
    assert isinstance(near, LocalLLM)
    assert server_app._embedder(None, near) is near
    assert isinstance(server_app._embedder(tiny.folder(), far), Embedder)


def test_a_remote_model_brings_no_torch() -> None:
    code = "import fedsynth.models.endpoint, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# A server that others wrote


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """`transformers serve` with the tiny model: address and name."""
    needed = pytest.importorskip("transformers.utils.import_utils")
    if not needed.is_serve_available():
        pytest.skip("needs transformers[serving]")
    serve: Any = pytest.importorskip("transformers.cli.serve").Serve
    folder = tmp_path_factory.mktemp("model")
    made = tiny.model()
    made.generation_config.do_sample = True  # it goes by the model's own word on this, whatever the temperature
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.random.fork_rng(devices=[]):  # it seeds all of torch
        running = serve(str(folder), device="cpu", host="127.0.0.1", port=port, log_level="error", non_blocking=True)
        end = time.monotonic() + 30
        while not running.server.started and time.monotonic() < end:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
        running.kill_server()


def test_transformers_serve_answers_as_the_model_in_process(serving: tuple[str, str]) -> None:
    url, name = serving
    greedy: dict[str, Any] = {"sampling": SamplingParams.greedy(6), "seed": 0}
    prompts = ["heart: a", "skin:", "note"]
    near = tiny.model(), tiny.tokenizer()
    near[1].bos_token = None  # that server puts none before a prompt, as this tokenizer adds none by itself
    assert RemoteLLM(Endpoint(url, name)).complete(prompts, **greedy) == LocalLLM(*near).complete(prompts, **greedy)


def test_transformers_serve_draws_by_the_seed(serving: tuple[str, str]) -> None:
    llm = RemoteLLM(Endpoint(*serving, concurrency=1))  # its generator is one for all requests
    first, again = (complete(llm, "heart:", "heart:", max_new_tokens=12) for _ in range(2))
    assert first == again
    assert first[0] != first[1]
    assert complete(llm, "heart:", "heart:", max_new_tokens=12, seed=6) != first


def test_transformers_serve_cannot_score(serving: tuple[str, str]) -> None:
    with pytest.raises(CannotScore):
        RemoteLLM(Endpoint(*serving, retries=0)).score(["heart:"], [" a"])


def test_transformers_serve_has_no_other_model(serving: tuple[str, str]) -> None:
    with pytest.raises(EndpointFailed, match=f"no/such' at {serving[0]} "):
        RemoteLLM.connect(Endpoint(serving[0], "no/such"))
