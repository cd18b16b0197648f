"""What a machine says to itself goes through no proxy of its environment; what it says to others does."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import httpx2
import huggingface_hub
import pytest
import requests
from proxy import DEAD, behind_a_dead_proxy

from fedsynth.deployment.certificates import authority, write_certificates
from fedsynth.deployment.server import flower_environment
from fedsynth.deployment.site.ready import server
from fedsynth.deployment.site.start import _environment
from fedsynth.models.endpoint import EndpointFailed, RemoteLLM
from fedsynth.models.hub import config_of
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.server import Endpoint
from fedsynth.simulation.flower import environment
from fedsynth.system.proxy import is_loopback, past_proxies
from fedsynth.typed import BadValue

AWAY = "http://hub.example.test/models"


class Listener:
    """An HTTP server on this machine that notes what it is asked; as a proxy it refuses tunnels."""

    def __init__(self) -> None:
        asked: list[str] = []
        self.asked = asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_POST(self) -> None:
                self.do_GET()

            def do_CONNECT(self) -> None:
                asked.append(f"CONNECT {self.path}")
                self.send_error(502)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self.server.server_port)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


@pytest.fixture
def proxy(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """This process's environment names a proxy that listens, and no exception."""
    made = Listener()
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in behind_a_dead_proxy({}):
        monkeypatch.setenv(name, f"http://127.0.0.1:{made.port}")
    yield made
    made.close()


CLIENTS: dict[str, Callable[[str], object]] = {
    "httpx": lambda url: httpx.get(url, timeout=5),  # Flower's command line and SuperNode, the hub
    "httpx2": lambda url: httpx2.get(url, timeout=5),  # openai
    "requests": lambda url: requests.get(url, timeout=5),  # MLflow
    "urllib": lambda url: urllib.request.build_opener().open(url, timeout=5).close(),
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("own", [None, "intranet.example.test,10.0.0.7"])
def test_each_client_goes_past_the_proxy_to_this_machine_and_through_it_to_others(
    client: str, own: str | None, listener: Listener, proxy: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own:
        monkeypatch.setenv("NO_PROXY", own)  # in capitals alone: what is set in small letters must not hide it
    for name, value in past_proxies(os.environ).items():
        monkeypatch.setenv(name, value)
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):  # the last is what servers print that listen everywhere
        CLIENTS[client](f"http://{host}:{listener.port}/")
    assert (listener.asked, proxy.asked) == (["/", "/", "/"], [])
    CLIENTS[client](AWAY)
    assert proxy.asked == [AWAY]
    assert os.environ["no_proxy"].startswith(own or "127.0.0.1")


def test_without_it_each_client_asks_the_proxy_for_this_machine(listener: Listener, proxy: Listener) -> None:
    for ask in CLIENTS.values():
        ask(f"http://127.0.0.1:{listener.port}/")
    assert listener.asked == []
    assert proxy.asked == [f"http://127.0.0.1:{listener.port}/"] * len(CLIENTS)


# In a process of its own: gRPC reads the environment once.
GRPC = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
served = grpc.server(ThreadPoolExecutor(1))
port = served.add_insecure_port("127.0.0.1:0")
served.start()
try:
    grpc.channel_ready_future(grpc.insecure_channel(f"127.0.0.1:{port}")).result(timeout=float(sys.argv[1]))
except grpc.FutureTimeoutError:
    os._exit(1)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("completed", "seconds", "own"),
    [(True, 30, {}), (False, 1, {}), (True, 30, {"no_proxy": "*"}), (True, 30, {"NO_PROXY": "*,corp"})],
)
def test_grpc_goes_past_the_proxy_to_this_machine(completed: bool, seconds: int, own: dict[str, str]) -> None:
    env = behind_a_dead_proxy(os.environ) | own
    done = subprocess.run(
        [sys.executable, "-c", GRPC, str(seconds)], check=False, env=env | (past_proxies(env) if completed else {})
    )
    assert done.returncode == (0 if completed else 1)


def test_what_the_user_wrote_stays_and_what_lacks_is_added() -> None:
    env = behind_a_dead_proxy({}) | {"no_proxy": " 10.0.0.1 , localhost,.corp.example", "no_grpc_proxy": "a.example"}
    found = past_proxies(env)
    assert set(found) == {"no_proxy", "NO_PROXY", "no_grpc_proxy"}
    assert found["no_proxy"].startswith(" 10.0.0.1 , localhost,.corp.example,127.0.0.1,::1,")
    assert found["no_proxy"].split(",").count("localhost") + found["no_proxy"].split(",").count(" localhost") == 1
    assert found["NO_PROXY"] == found["no_proxy"]
    assert found["no_grpc_proxy"].startswith("a.example,127.0.0.1,localhost,::1,")


def test_every_address_of_this_machine_is_named_and_no_other() -> None:
    import ray

    named = past_proxies(behind_a_dead_proxy({}), "fl.example.org")["no_proxy"].split(",")
    assert ray.util.get_node_ip_address() in named  # where Ray's processes find each other
    assert socket.gethostname() in named
    assert named[-1] == "fl.example.org"
    assert not {"*", ""} & set(named)


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
@pytest.mark.parametrize("star", ["*", "a.example, *"])
def test_who_wants_no_proxy_at_all_gets_none_and_grpc_is_told_in_its_own_words(name: str, star: str) -> None:
    found = past_proxies(behind_a_dead_proxy({}) | {name: star})
    assert (found["no_proxy"], found["NO_PROXY"]) == (star, star)
    assert "*" not in found["no_grpc_proxy"]
    assert {"127.0.0.1", "localhost", "::1"} <= set(found["no_grpc_proxy"].split(","))
    assert found["no_grpc_proxy"].startswith("a.example,") == star.startswith("a.example")


MISREAD = (
    "fd00::/8",
    "[::1]",
    "[fd00::]/8",
    "[fd00::/8]",
    "[::1]:80",
    "a.example:port",
    "b\u00fcro.de",
    "B\u00fcro-PC",
)
READ = ("::1", "::1:8000", "fe80::1%eth0", "10.0.0.0/8", "10.0.0.1", "*.corp", ".corp", "a.example:80", "a.example",
        "http://a.example", "_a", "localhost.", "0.0.0.0")  # fmt: skip


@pytest.mark.parametrize("proxies", [{}, behind_a_dead_proxy({})])
@pytest.mark.parametrize("entry", [*MISREAD, *READ])
def test_no_entry_keeps_clients_from_being_made(
    entry: str, proxies: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = proxies | {"no_proxy": f"a.example,{entry}"}
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if entry in MISREAD:
        with pytest.raises(httpx.InvalidURL):
            httpx.Client()
    found = past_proxies(env)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    httpx.Client().close()
    kept = os.environ["no_proxy"].split(",")
    assert (kept[0], entry in kept) == ("a.example", entry in READ)
    if proxies and entry in MISREAD:  # gRPC knows networks of IPv6
        assert found["no_grpc_proxy"].startswith(f"a.example,{entry},127.0.0.1,")


def test_a_name_of_this_machine_that_is_not_ascii_is_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "B\u00fcro-PC")
    assert past_proxies(behind_a_dead_proxy({}))["no_proxy"].isascii()


def test_without_a_proxy_nothing_is_set() -> None:
    assert (
        past_proxies({"PATH": "/bin", "http_proxy": "", "NO_PROXY": "a"}) == {}
    )  # one exception hides macOS's proxies


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("::1", True), ("10.0.0.1", False),
     ("localhost.example.org", False), ("0.0.0.0", True), ("::", True), ("localhost.", True), ("LOCALHOST", True),
     ("llm.localhost", True), ("127.0.0.1.", True), ("notlocalhost", False), ("0.0.0.1", False)],
)  # fmt: skip
def test_which_hosts_are_always_this_machine(host: str, here: bool) -> None:
    assert is_loopback(host) == here


def test_programs_of_runs_servers_and_sites_start_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", behind_a_dead_proxy(os.environ))
    (tmp_path / "server.toml").write_text(
        'host = "0.0.0.0"\nport = 1\nlocal = "fl.example.org:1"\ncertificate = "a"\nkey = "b"\nca = "c"\n'
    )
    link = SimpleNamespace(address="127.0.0.2:9443")
    place: Any = SimpleNamespace(
        cards={}, folder=tmp_path, state=tmp_path, site=SimpleNamespace(superlink=link, threads=1)
    )
    for env, more in (
        (environment("m"), None),
        (flower_environment(tmp_path, "m"), "fl.example.org"),
        (_environment(place, "m"), "127.0.0.2"),
    ):
        assert {"127.0.0.1", "localhost", "::1", *([more] if more else [])} <= set(env["no_proxy"].split(","))
        assert env["http_proxy"] == DEAD
    link.address = "fl.example.org:9443"  # another machine: the site's proxy leads there
    assert "fl.example.org" not in _environment(place, "m")["no_proxy"]


def test_an_endpoint_here_is_asked_directly_and_one_elsewhere_through_the_proxy(
    listener: Listener, proxy: Listener
) -> None:
    # In a process whose environment nobody completed: a notebook.
    for url, told in ((f"http://127.0.0.1:{listener.port}/v1", listener), ("http://llm.example.test/v1", proxy)):
        with pytest.raises(EndpointFailed):  # what answers is no model
            RemoteLLM(Endpoint(url, "small", retries=0)).complete(["a"], SamplingParams.greedy(1), seed=0)
        assert [path.partition("/v1")[2] for path in told.asked] == ["/completions"]


def site(folder: Path, address: str) -> Any:
    """A site's folder, with the CA that it trusts in ca.crt."""
    link = SimpleNamespace(address=address, root_certificates="ca.crt")
    return SimpleNamespace(site=SimpleNamespace(superlink=link), path=lambda name: folder / name)


def test_a_site_tells_a_certificate_that_is_not_accepted_from_a_server_that_is_away(
    tmp_path: Path, listener: Listener, proxy: Listener
) -> None:
    write_certificates(tmp_path / "server", ["127.0.0.1"])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server" / "server.crt", tmp_path / "server" / "server.key")
    listener.server.socket = tls.wrap_socket(listener.server.socket, server_side=True)
    place = site(tmp_path, f"127.0.0.1:{listener.port}")

    def found() -> list[tuple[str, str]]:
        return [(finding.what, finding.state) for finding in server(place)]

    (tmp_path / "ca.crt").write_bytes((tmp_path / "server" / "ca.crt").read_bytes())
    assert found() == [("server", "ok"), ("clock", "ok")]
    assert listener.asked == ["/health"]
    (tmp_path / "ca.crt").write_bytes(authority().pem)
    assert found() == [("certificate", "problem")]
    assert proxy.asked == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "fl.example.test:9443"])
def test_a_site_looks_for_its_server_the_way_its_supernode_goes(tmp_path: Path, proxy: Listener, address: str) -> None:
    (tmp_path / "ca.crt").write_bytes(authority().pem)
    [finding] = server(site(tmp_path, address))
    assert (finding.what, finding.state) == ("server", "problem")
    assert proxy.asked == ([] if address.startswith("127.") else [f"CONNECT {address}"])
    assert ("through the proxy of the environment" in finding.says) == bool(proxy.asked)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_proxy", "localhost,10.0.0.0/8,fd00::/8"),
        ("https_proxy", "http://a.example:port"),
        ("all_proxy", "gopher://a"),
    ],
)
def test_a_proxy_variable_that_cannot_be_used_is_named_and_ends_in_no_traceback(
    name: str, value: str, tmp_path: Path, proxy: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a process whose environment nobody completed.
    monkeypatch.setenv(name, value)
    monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / "ca.crt").write_bytes(authority().pem)
    [finding] = server(site(tmp_path, "fl.example.test:9443"))
    assert (finding.what, finding.state) == ("server", "problem")
    assert "no_proxy, https_proxy" in finding.says
    if name != "no_proxy":  # httpx2 reads them
        with pytest.raises(BadValue, match="no_proxy, https_proxy"):
            RemoteLLM(Endpoint("http://llm.example.test/v1", "small"))
    huggingface_hub.close_session()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(BadValue, match="proxy"):
        config_of("nobody/no-model")
    huggingface_hub.close_session()
