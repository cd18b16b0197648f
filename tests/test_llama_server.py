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
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from test_egress import DP, asking, conduct

from fedsynth.app.fedsynth_sim import server_app
from fedsynth.federation.run.egress import JOURNAL, egress_of
from fedsynth.models.chat import Chat
from fedsynth.models.endpoint import EndpointFailed, RemoteLLM
from fedsynth.models.endpoint_cache import EndpointCache
from fedsynth.models.llm import LocalLLM
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.hardware import Hardware
from fedsynth.scenario.server import Endpoint
from fedsynth.scenario.toml import to_toml

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
        return Endpoint(**{"endpoint": self.url, "model": "small", "api": "chat", "concurrency": 1, **more})  # type: ignore[arg-type]


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
