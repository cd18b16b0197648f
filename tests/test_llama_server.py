"""llama.cpp's own server on loopback: killed in mid-run and started again, against the same weights in process.

FEDSYNTH_LLAMA names a Python that has llama-cpp-python's server, FEDSYNTH_GGUF the GGUF file of SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_egress import DP, asking, conduct

from fedsynth.app.fedsynth_sim import server_app
from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.run.egress import JOURNAL, egress_of
from fedsynth.models.chat import Chat
from fedsynth.models.endpoint import EndpointFailed, RemoteLLM
from fedsynth.models.hub import models_folder
from fedsynth.models.llm import LocalLLM
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.hardware import Hardware
from fedsynth.scenario.server import Endpoint
from fedsynth.scenario.toml import to_toml
from fedsynth.synthesis.judges import judge_by_instruction

PYTHON, GGUF = (Path(os.environ.get(name, "")) for name in ("FEDSYNTH_LLAMA", "FEDSYNTH_GGUF"))
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (PYTHON.is_file() and GGUF.is_file()), reason="needs FEDSYNTH_LLAMA and FEDSYNTH_GGUF"),
]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PATIENCE = 300  # seconds


class Llama:
    """The server, at an address that it keeps over its restarts."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = {"model": GGUF, "model_alias": "small", "host": "127.0.0.1", "port": self.port, "n_ctx": 1024}
        words |= {"n_threads": 1, "n_threads_batch": 1}
        line = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        self.process = subprocess.Popen(
            [PYTHON, "-m", "llama_cpp.server", *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            try:
                DIRECT.open(f"{self.url}/models", timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("llama.cpp's server does not start")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def endpoint(self, **more: object) -> Endpoint:
        return Endpoint(**{"endpoint": self.url, "model": "small", "api": "chat", "concurrency": 1, **more})  # type: ignore[arg-type]  # of any type


@pytest.fixture(scope="module")
def serving() -> Iterator[Llama]:
    found = Llama()
    found.start()
    yield found
    found.kill()


@pytest.fixture
def llama(serving: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Llama:
    monkeypatch.setenv("FEDSYNTH_CACHE", str(tmp_path / "cache"))
    return serving


def events(journal: Path, kind: str) -> int:
    return journal.read_text().count(f'"{kind}"') if journal.is_file() else 0


def texts(out: Path) -> list[str]:
    [file] = (out / "corpora").rglob("written-*.parquet")
    return list(pd.read_parquet(file)["prompt"])


def test_a_run_whose_server_was_killed_asks_it_only_for_what_lacks(
    llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ["strategy.num_texts=24", "strategy.max_new_tokens=10", "server.llm.api=chat", "server.llm.concurrency=1"]
    toml = to_toml(asking(tmp_path, llama.url, *DP, *sets))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    conduct(toml, whole)
    undisturbed = sum(line.requests for line in egress_of(whole))

    monkeypatch.setenv("FEDSYNTH_CACHE", str(tmp_path / "other"))
    server_app._far.cache_clear()

    def kill() -> None:
        end = time.monotonic() + PATIENCE
        while events(broken / JOURNAL, "answered") < 8 and time.monotonic() < end:
            time.sleep(0.005)
        llama.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(EndpointFailed) as caught:
            conduct(toml, broken)
    finally:
        killer.join()
    said = str(caught.value)
    assert said.startswith(f"the model 'small' at {llama.url} cannot be reached (")
    assert said.endswith("): start its server, or check the address")
    answered = events(broken / JOURNAL, "answered")
    assert 8 <= answered < undisturbed

    llama.start()
    server_app._far.cache_clear()
    conduct(toml, broken)
    print(f"{undisturbed} requests undisturbed, {answered} answered before the kill")
    assert events(broken / JOURNAL, "recalled") == answered - 1  # all but the one token before a run
    assert events(broken / JOURNAL, "answered") == undisturbed + 1  # and that token once more
    assert texts(broken) == texts(whole)


def test_a_run_waits_for_a_server_that_starts_again(llama: Llama, tmp_path: Path) -> None:
    ask = [Chat(f"Write one short message of a customer about {what}.") for what in ("a card", "a fee", "a PIN")]
    how = SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=8, one_line=True)
    undisturbed = RemoteLLM(llama.endpoint()).complete(ask, how, seed=3)
    llama.kill()
    again = threading.Thread(target=llama.start)
    again.start()
    try:
        assert RemoteLLM(llama.endpoint(retries=30)).complete(ask, how, seed=3) == undisturbed
    finally:
        again.join()


def test_it_holds_to_a_schema_and_refuses_one_that_it_does_not_know(llama: Llama) -> None:
    llm = RemoteLLM.connect(llama.endpoint(structured="json_object"))
    drafts = Corpus(("my card is lost", "what a fee", "my card is gone"), ("card", "fee", "card"), Provenance.PUBLIC)
    kept = judge_by_instruction(llm, {0: drafts}, {0: [[0, 1, 2]]}, labels=["card", "fee"], keep=2, seed=0)[0]
    assert "unreadable judgement" not in kept.dropped
    assert len(kept.corpus) <= 2
    with pytest.raises(
        EndpointFailed, match=r'gives no structured answers by "json_schema" \(.*try .* = "json_object"'
    ):
        RemoteLLM.connect(llama.endpoint(structured="json_schema", retries=0))


NAME = "smollm2-135m-instruct"
QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "What colour is the sky on a clear day?",
    "How many days does a week have?",
    "Write one short message of a bank's customer about a lost card.",
    "Write one short message of a bank's customer about a fee.",
    "Which animal says meow?",
    "What is the opposite of hot?",
    "Translate to French: good morning.",
    "What is 2 plus 3?",
    "Name the largest ocean.",
    "Who wrote Romeo and Juliet?",
)


def leading(tokenizer: Any, texts: Sequence[str], others: Sequence[str]) -> float:
    """Mean share of the tokens of two texts that are equal before the first that differs."""
    shares = []
    for pair in zip(texts, others, strict=True):
        one, other = (tokenizer(text, add_special_tokens=False).input_ids for text in pair)
        same = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
        shares.append(same / max(len(one), len(other)))
    return sum(shares) / len(shares)


@pytest.mark.skipif(not (models_folder() / NAME / "config.json").is_file(), reason=f"needs {NAME} in FEDSYNTH_MODELS")
def test_greedy_texts_are_near_those_of_the_same_weights_in_process(llama: Llama) -> None:
    """The file has four bits for a weight, and the folder what was read from it, in float32. llama.cpp rounds the
    activations too, and its server lowers the likelihood of tokens that were there (`repeat_penalty`). So greedy texts
    part where two tokens are nearly as likely."""
    near = LocalLLM.load(models_folder() / NAME, workers=1, hardware=Hardware("float32"))
    ask, how = [Chat(question) for question in QUESTIONS], SamplingParams.greedy(12)
    here, there = near.complete(ask, how, seed=0), RemoteLLM(llama.endpoint()).complete(ask, how, seed=0)
    equal = sum(one == other for one, other in zip(here, there, strict=True)) / len(ask)
    untold = RemoteLLM(llama.endpoint(api="completions")).complete(QUESTIONS, how, seed=0)  # without the template
    shares = leading(near.tokenizer, here, there), leading(near.tokenizer, here, untold)
    print(f"equal texts {equal:.2f}, equal leading tokens {shares[0]:.2f}, without the template {shares[1]:.2f}")
    assert equal >= 0.3  # measured: 0.50
    assert shares[0] >= 0.5  # measured: 0.75
    assert shares[1] < 0.2
