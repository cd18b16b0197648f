"""A coordinator's server: certificates, its folder, a real SuperLink over TLS, runs that are submitted to it."""

from __future__ import annotations

import json
import os
import signal
import ssl
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from proxy import behind_a_dead_proxy

import fedsynth.cli.main
from fedsynth.deployment import certificates, submit
from fedsynth.deployment import registry as invited
from fedsynth.deployment.certificates import check_covers, check_pair, fingerprint, write_certificates, write_node_keys
from fedsynth.deployment.invitation import host_and_port, planned, read_invitation
from fedsynth.deployment.plan import chosen, deployed
from fedsynth.deployment.server import Files, check, commands, init, read_config
from fedsynth.deployment.site import init as site_init
from fedsynth.deployment.superlink import ServerFailed, start
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, load
from fedsynth.simulation import simulate
from fedsynth.simulation.flower import MARKER, OWNER, CommandRefused, Events, LaunchFailed, alive, free_port
from fedsynth.simulation.launch import APP
from fedsynth.typed import BadValue

STAND_IN = Path(__file__).parent / "data" / "sites_app"
SECONDS = 60.0


def coordinator(folder: Path, **more: Any) -> Path:
    """A folder of a coordinator with certificates for tests."""
    init(folder, load("hospitals"), **{"host": "127.0.0.1", "port": 9443, **more})
    return folder


def files(folder: Path) -> Files:
    return Files(*(folder / certificates.NAMES[name] for name in ("certificate", "key", "ca")))


# ---- certificates and keys ----


def test_a_certificate_is_for_the_hosts_it_names_and_for_this_machine(tmp_path: Path) -> None:
    write_certificates(tmp_path, ["superlink.example.org", "10.0.0.3"])
    made = files(tmp_path)
    ca = made.ca.read_text()
    assert check_pair(made.certificate, made.key) == []
    for host in ("superlink.example.org", "10.0.0.3", "localhost", "127.0.0.1", "::1"):
        check_covers(made.certificate, made.key, ca, host)
    with pytest.raises(BadValue, match=r"other.example.org would refuse .*server.crt: Hostname mismatch"):
        check_covers(made.certificate, made.key, ca, "other.example.org")
    with pytest.raises(BadValue, match="unable to get local issuer"):
        check_covers(made.certificate, made.key, certificates.authority().pem.decode(), "localhost")
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    with pytest.raises(BadValue, match="nothing is overwritten"):
        write_certificates(tmp_path, ["localhost"])


def test_what_is_wrong_with_a_certificate_is_said_with_both_dates(tmp_path: Path) -> None:
    write_certificates(tmp_path / "old", ["localhost"], days=-1)
    write_certificates(tmp_path / "new", ["localhost"], days=5)
    old, new = files(tmp_path / "old"), files(tmp_path / "new")
    with pytest.raises(BadValue, match=r"server.crt has expired: it holds from 20\d\d-.* to 20\d\d-.* UTC, now it is"):
        check_pair(old.certificate, old.key)
    with pytest.raises(BadValue, match="does not belong to the certificate"):
        check_pair(new.certificate, old.key)
    with pytest.raises(BadValue, match="no certificate as PEM"):
        check_pair(new.key, new.key)
    with pytest.raises(BadValue, match=r"nowhere.key cannot be read: No such file"):
        check_pair(new.certificate, tmp_path / "nowhere.key")
    new.key.chmod(0o644)
    expires, readable = check_pair(new.certificate, new.key)
    assert "expires on 20" in expires
    assert f"chmod 600 {new.key}" in readable


def test_node_keys_are_those_of_ssh_keygen(tmp_path: Path) -> None:
    private, public = tmp_path / "keys" / "node", tmp_path / "st-marys.pub"
    write_node_keys(private, public, "st-marys")
    key = serialization.load_ssh_private_key(private.read_bytes(), None)  # as Flower loads it
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    kind, _, comment = public.read_text().split()
    assert (kind, comment) == ("ecdsa-sha2-nistp384", "st-marys")
    assert fingerprint(public).startswith("SHA256:")
    with pytest.raises(BadValue, match="nothing is overwritten"):
        write_node_keys(tmp_path / "other", public)
    assert not (tmp_path / "other").exists()


def test_only_a_public_key_that_flower_takes_is_a_key(tmp_path: Path) -> None:
    write_node_keys(tmp_path / "node", tmp_path / "node.pub")
    openssh = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (tmp_path / "rsa.pub").write_bytes(rsa.generate_private_key(65537, 2048).public_key().public_bytes(*openssh))
    (tmp_path / "text.pub").write_text("not a key")
    for name, said in (
        ("node", "must not leave its site"),
        ("rsa.pub", "of the kind ssh-rsa"),
        ("text.pub", "no OpenSSH public key"),
        ("none.pub", "cannot be read"),
    ):
        with pytest.raises(BadValue, match=said):
            fingerprint(tmp_path / name)


# ---- the folder ----


def test_a_folder_holds_an_invitation_without_a_secret(tmp_path: Path) -> None:
    folder = coordinator(tmp_path / "dir", host="0.0.0.0", public="superlink.example.org:443")
    invitation = read_invitation(folder / "invitation.toml")
    assert invitation.address == "superlink.example.org:443"
    assert invitation.ca == (folder / "certificates" / "ca.crt").read_text()
    assert invitation.scenario == planned(load("hospitals"))
    assert invitation.scenario.epsilon == 8.0
    assert "assets:tiny-slm" in invitation.scenario.models
    assert "assets:tiny-llm" not in invitation.scenario.models  # the server's
    assert "PRIVATE" not in (folder / "invitation.toml").read_text()
    config = read_config(folder)
    assert config.local == "127.0.0.1:9443"
    assert Path(config.key) == folder / "certificates" / "server.key"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (warning,) = check(folder)
    assert "is for tests, and sites connect to superlink.example.org" in warning
    with pytest.raises(BadValue, match="already holds something"):
        coordinator(folder)


def test_ones_own_certificate_is_used_where_it_lies(tmp_path: Path) -> None:
    certificate, key = certificates.issue(by := certificates.authority(), ["superlink.example.org"])
    made = files(tmp_path)
    made.certificate.write_bytes(certificate)
    certificates.write_new(made.key, key, secret=True)
    made.ca.write_bytes(by.pem)
    public = "superlink.example.org:9443"
    folder = tmp_path / "dir"
    with pytest.raises(BadValue, match=r"connects to 127.0.0.1 would refuse"):
        coordinator(folder, files=made)
    assert not folder.exists()
    coordinator(folder, files=made, public=public)
    assert read_config(folder).local == public  # no certificate of a public CA is for 127.0.0.1
    assert read_config(folder).key == str(made.key)


def test_behind_a_proxy_sites_trust_the_proxys_ca(tmp_path: Path) -> None:
    (tmp_path / "proxy.crt").write_bytes(certificates.authority().pem)
    folder = coordinator(tmp_path / "dir", public="fl.example.org:443", public_ca=tmp_path / "proxy.crt")
    assert read_invitation(folder / "invitation.toml").ca == (tmp_path / "proxy.crt").read_text()
    assert check(folder) == []  # the SuperLink's own certificate is for this machine's programs alone


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("invitation.toml", '"127.0.0.1:9443"', '"other.example.org:9443"', "other.example.org .*names it to sites"),
        ("server.toml", 'local = "127.0.0.1:9443"', 'local = "10.0.0.9:9443"', "10.0.0.9 .*see `local`"),
        ("server.toml", "port = 9443", "port = 99443", "port must lie in 1..65535, got 99443"),
        ("server.toml", "port = 9443", "prot = 9443", "unknown key 'prot'; did you mean 'port'"),
        ("server.toml", "certificates/server.crt", "nowhere.crt", "nowhere.crt cannot be read"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named_before_anything_starts(
    tmp_path: Path, file: str, old: str, new: str, said: str
) -> None:
    folder = coordinator(tmp_path / "dir")
    path = folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BadValue, match=said):
        start(folder, print)


def test_sites_cannot_be_sent_to_every_address_nor_shown_a_files_labels(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"sites cannot connect to 0.0.0.0"):
        coordinator(tmp_path / "dir", host="0.0.0.0")
    own = load("hospitals")
    own = replace(own, data=replace(own.data, source="notes.csv", tuned_on=()))
    with pytest.raises(BadValue, match="the list of a run on sites must be public"):
        init(tmp_path / "dir", own, host="127.0.0.1", port=9443)
    assert not (tmp_path / "dir").exists()
    with pytest.raises(BadValue, match="HOST:PORT"):
        host_and_port("https://superlink.example.org")


def test_a_new_key_of_a_site_leaves_its_old_one_and_all_else_where_it_is(tmp_path: Path) -> None:
    invitation, place = coordinator(tmp_path / "dir") / "invitation.toml", tmp_path / "st-marys"
    public = site_init.init(place, name="st-marys", invitation=invitation)
    first, private = public.read_text(), (place / "keys" / "node").read_bytes()
    site_toml = (place / "site.toml").read_text().replace("records = 0 ", "records = 9 ")
    (place / "site.toml").write_text(site_toml)
    assert site_init.new_key(place) == public
    assert site_init.new_key(place) == public  # at once again: neither of the old ones is lost
    assert first not in public.read_text()
    assert (place / "site.toml").read_text() == site_toml
    kept = sorted(place.glob("st-marys.pub.*")), sorted((place / "keys").glob("node.*"))
    assert [len(files) for files in kept] == [2, 2]
    assert kept[0][0].read_text() == first
    assert kept[1][0].read_bytes() == private
    assert {file.stat().st_mode & 0o777 for file in (place / "keys").iterdir()} == {0o600}
    with pytest.raises(BadValue, match="holds a site already"):
        site_init.init(place, name="st-marys", invitation=invitation)
    with pytest.raises(BadValue, match="cannot be read"):
        site_init.new_key(tmp_path / "nowhere")


def test_without_a_superlink_the_way_out_is_named(tmp_path: Path) -> None:
    port = free_port()
    folder = coordinator(tmp_path / "dir", port=port)
    write_node_keys(tmp_path / "node", tmp_path / "st-marys.pub")
    with pytest.raises(BadValue, match=f"no SuperLink answers at 127.0.0.1:{port} .*fedsynth server start"):
        invited.invite(folder, tmp_path / "st-marys.pub")
    with pytest.raises(BadValue, match="cannot be read: No such file or directory; make a coordinator"):
        invited.invite(tmp_path, tmp_path / "st-marys.pub")
    with pytest.raises(BadValue, match="name has letters"):
        invited.invite(folder, tmp_path / "st-marys.pub", "../etc")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("server init NEW", "name the server's certificate with --certificate, --key and --ca, or"),
        ("server init NEW --test-certificates --ca ca.crt", "name the server's certificate"),
        ("server init NEW --test-certificates --scenario hospital", "no scenario 'hospital'"),
        ("server invite DIR", "name a site's public key"),
        ("server invite DIR --list --remove st-marys", "name a site's public key"),
        ("server start NEW", "cannot be read: No such file or directory; make a coordinator"),
        ("run --server DIR --workers 2", "are of simulations: leave them out with --server"),
        ("run --server DIR", "are 4 runs, and each would be charged"),
        ("run hospitals --sites st-marys", "say with --server DIR"),
        ("run --server DIR --resume OUT --sites st-marys", "goes on with a run as it was begun"),
        ("run --server DIR --resume OUT", "there is no directory"),
    ],
)
def test_commands_say_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    folder = coordinator(tmp_path / "dir")
    (folder / "sites.toml").write_text('[[sites]]\nname = "a"\nfingerprint = "f"\nnode = "1"\nsince = "s"\n')
    places = {"DIR": str(folder), "NEW": str(tmp_path / "new"), "OUT": str(tmp_path / "out")}
    monkeypatch.setattr("sys.argv", ["fedsynth", *(places.get(word, word) for word in words.split())])
    with pytest.raises(SystemExit) as end:
        fedsynth.cli.main.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---- runs, before they are submitted ----


def hospitals(**more: Any) -> Scenario:
    return replace(load("hospitals"), **{"run": ("fdkt",), **more})


def test_a_run_on_sites_is_one_arm_resolved(tmp_path: Path) -> None:
    scenario = deployed(hospitals(run=("fdkt_epsilon2",), seeds=(7,)), 3)
    (cell,) = cells(scenario)
    assert (cell.arm, cell.seed, cell.scenario.data.clients) == ("fdkt_epsilon2", 7, 3)
    assert cell.scenario.client.budget is not None
    assert cell.scenario.client.budget.epsilon == 2.0
    assert scenario.data.tuned_on == ()
    for wrong, said in (
        ({"run": ("fdkt", "local")}, "the arms fdkt, local under the seeds 0 are 2 runs, and each would be charged"),
        ({"seeds": (0, 1)}, "under the seeds 0, 1 are 2 runs"),
        ({"run": ("pooled",)}, "only a simulator can"),
        ({"run": ("true_texts",)}, "what no site gives: true texts"),
        ({"participation": replace(hospitals().participation, seed=1)}, "participation is of simulated clients"),
    ):
        with pytest.raises(BadValue, match=said):
            deployed(hospitals(**wrong), 3)


def test_sites_of_a_run_are_those_let_in_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="no site has been let in"):
        chosen(tmp_path, ())
    entries = "".join(f'[[sites]]\nname = "{n}"\nfingerprint = "f"\nnode = "1"\nsince = "s"\n' for n in ("a", "b", "c"))
    (tmp_path / "sites.toml").write_text(entries)
    assert [site.name for site in chosen(tmp_path, ())] == ["a", "b", "c"]
    assert [site.name for site in chosen(tmp_path, ("c", "a"))] == ["c", "a"]
    with pytest.raises(BadValue, match="no site 'd' has been let in; there are a, b, c"):
        chosen(tmp_path, ("a", "d"))
    with pytest.raises(BadValue, match="twice"):
        chosen(tmp_path, ("a", "a"))


def test_a_run_waits_for_its_sites_and_then_goes_by_the_quorum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = coordinator(tmp_path / "dir")
    text = (folder / "server.toml").read_text()
    (folder / "server.toml").write_text(text.replace("wait_seconds = 600.0", "wait_seconds = 0.01"))
    asked_of = [invited.RegisteredSite(name, "f", name, "s") for name in ("a", "b")]
    states = iter([{"a": "offline", "b": "registered"}, *[{"a": "online", "b": "registered"}] * 9])
    monkeypatch.setattr(submit, "states_by", lambda *_: (next(states), ["77"]))
    lines: list[str] = []
    wait: Any = submit._wait_for_sites

    def tell(event: dict[str, Any]) -> None:
        lines.append(event["line"])

    with pytest.raises(BadValue, match=r"not online after 0.01 s \(wait_seconds of server.toml\): b; .*--sites"):
        wait(folder, None, hospitals(), asked_of, tell, lines.append)
    assert lines[0].startswith("registered with the SuperLink, and not in sites.toml: node 77; whoever")
    assert lines[1] == "waiting for a (offline), b (registered): `fedsynth site start` there"
    half = hospitals(server=replace(hospitals().server, quorum=0.5))
    wait(folder, None, half, asked_of, None, lines.append)
    assert lines[-1] == "not online, the quorum goes on without them: b"


@pytest.mark.parametrize(
    ("own", "flower", "said"),
    [
        ({"status": "completed"}, "running", None),
        ({"status": "failed", "reason": "ours"}, "running", "^ours$"),
        ({}, "finished:completed", "without writing status.json"),
        ({}, "finished:failed", "^it fell$"),
        ({"status": "failed", "reason": "SystemExit: 0"}, "finished:failed", "the run was stopped"),
        ({}, "finished:stopped", "the run was stopped"),
        ({}, "", "the SuperLink answers no more: start it again"),
    ],
)
def test_how_a_run_on_sites_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, str], flower: str, said: str | None
) -> None:
    monkeypatch.setattr(submit, "LOOK_SECONDS", 0.0)
    (tmp_path / "status.json").write_text(json.dumps(own))

    def flwr(*_: str) -> dict[str, Any]:
        if not flower:
            raise CommandRefused("Connection to the SuperLink is unavailable.")
        return {"runs": [{"status": flower, "status-details": "it fell" if "failed" in flower else "N/A"}]}

    watched = submit._watched(flwr, "1", tmp_path, Events(tmp_path / "events.jsonl"))
    if said is None:
        assert list(watched) == []
        return
    with pytest.raises(submit._Ended, match=said):
        list(watched)


def test_a_run_is_gone_on_with_where_it_was_begun(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="holds no run"):
        submit.resume(tmp_path, tmp_path)
    (tmp_path / "scenario.toml").touch()
    with pytest.raises(BadValue, match="holds a simulation: go on with it without --server"):
        submit.resume(tmp_path, tmp_path)
    (tmp_path / "deployment.json").write_text('{"run": "1", "sites": ["a"]}')
    with pytest.raises(BadValue, match="holds a run on sites: say with --server"):
        simulate.resume(tmp_path)


def test_the_app_takes_what_a_run_on_sites_is_told() -> None:
    known = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert known["deployment"] == ""
    stand_in = tomllib.loads((STAND_IN / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert set(stand_in) <= set(known)


# ---- a real SuperLink ----


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A SuperLink, started by the command; at the end SIGTERM takes everything down."""
    place = tmp_path_factory.mktemp("coordinator")
    folder = coordinator(place / "dir", port=free_port())
    command = [sys.executable, "-m", "fedsynth.cli.main", "server", "start", str(folder)]
    env = behind_a_dead_proxy(os.environ)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert "sites connect to 127.0.0.1" in line, line
            with pytest.MonkeyPatch.context() as during:
                during.setattr(os, "environ", env)
                connected = commands(folder, read_config(folder))
                flwr = connected.__enter__()
            with flwr:
                yield SimpleNamespace(folder=folder, config=read_config(folder), flwr=flwr)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    assert of_server(folder) == []


@pytest.fixture
def one_command_line(running: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's is imported once for all tests; each command of ours would take some seconds for it."""
    for module in (invited, submit):
        monkeypatch.setattr(module, "commands", lambda *_: nullcontext(running.flwr))


def of_server(folder: Path) -> list[str]:
    """The processes that a server has left."""
    marker, found = (folder / "flower" / OWNER).read_text(), []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARKER) == marker or str(folder) in " ".join(process.cmdline())
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def test_the_server_speaks_tls_alone_and_gives_work_to_its_own_superexec_alone(running: SimpleNamespace) -> None:
    address = running.config.local
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://{address}/health")
    proto = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    trusted = ssl.create_default_context(cafile=running.config.ca)
    with httpx.Client(verify=trusted, base_url=f"https://{address}", headers=proto) as client:
        assert client.get("/health").is_success
        assert client.post("/v1/runtime/acquire-task").status_code == 401  # it would be the ServerApp then
        assert client.post("/v1/fleet/pull-messages").status_code >= 400  # no node's signature
    with pytest.raises(ServerFailed, match=r"another `fedsynth server start .* is running"):
        start(running.folder, print)


@pytest.mark.usefixtures("one_command_line")
def test_a_key_is_let_in_once(running: SimpleNamespace, tmp_path: Path) -> None:
    folder = running.folder
    for name in ("st-marys", "other"):
        write_node_keys(tmp_path / name, tmp_path / f"{name}.pub")
    made = invited.invite(folder, tmp_path / "st-marys.pub")
    assert invited.sites(folder) == (made,)
    assert (made.name, made.fingerprint) == ("st-marys", fingerprint(tmp_path / "st-marys.pub"))
    with pytest.raises(BadValue, match="the name 'st-marys' is taken, by the key SHA256:"):
        invited.invite(folder, tmp_path / "other.pub", "st-marys")
    with pytest.raises(BadValue, match="already that of the site 'st-marys'"):
        invited.invite(folder, tmp_path / "st-marys.pub", "elsewhere")
    # Whoever reaches the control API can register keys, under any name.
    answer = running.flwr("supernode", "register", str(tmp_path / "other.pub"), "--name", "st-marys")
    assert invited.states(folder) == ({"st-marys": "registered"}, [str(answer["node-id"])])
    with pytest.raises(BadValue, match=r"the SuperLink knows the key .* Flower takes a key once"):
        invited.invite(folder, tmp_path / "other.pub", "other")
    with pytest.raises(BadValue, match="there is no site 'nobody'"):
        invited.remove(folder, "nobody")
    assert invited.remove(folder, "st-marys") == made
    assert invited.sites(folder) == ()
    with pytest.raises(BadValue, match="Flower takes a key once"):
        invited.invite(folder, tmp_path / "st-marys.pub")


@pytest.mark.usefixtures("one_command_line")
def test_a_run_is_submitted_interrupted_and_gone_on_with(
    running: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "APP", STAND_IN)
    monkeypatch.setattr(submit, "STOPPING_SECONDS", 0.5)
    monkeypatch.setattr(submit, "_wait_for_sites", lambda *_: None)  # none is started here
    monkeypatch.setattr(submit, "chosen", lambda *_: (invited.RegisteredSite("st-marys", "f", "1", "s"),))
    out = tmp_path / "out"
    seen: list[dict[str, Any]] = []

    def interrupt(event: dict[str, Any]) -> None:
        seen.append(event)
        if event["event"] == "started":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit.submit(running.folder, hospitals(), out=out, on_event=interrupt)
    started = seen[-1]
    assert started["deployment"] == json.loads((out / "deployment.json").read_text())
    assert started["deployment"]["sites"] == ["st-marys"]
    assert started["deployment"]["measured"] is False
    assert not alive(psutil.Process(started["pid"]))  # it computed: `flwr stop` alone would not have ended it
    assert load(out / "scenario.toml").data.clients == 1
    assert not (out.with_name("out.private") / "data.json").exists()
    with pytest.raises(BadValue, match="already holds something"):
        submit.submit(running.folder, hospitals(), out=out)

    log = running.folder / "superlink.log"
    with pytest.raises(LaunchFailed) as failure:
        submit.resume(running.folder, out, on_event=seen.append)
    assert str(failure.value) == (
        f"the reason in words (log: {log}); go on with `fedsynth run --resume {out} --server {running.folder}`"
    )
    assert seen[-1]["deployment"] == started["deployment"]
    assert seen[-1]["pid"] != started["pid"]
    assert log.read_text().count("a line of the ServerApp's") >= 1
