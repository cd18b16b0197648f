"""Between real processes, what takes longer: state at the server, sizes by message, a site as it is left."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import instructed
import numpy as np
import pandas as pd
import pytest
from deployment import NAMES, Federation, Running, federation, fedsynth, spawn
from flwr.app import ConfigRecord, RecordDict
from inprocess import canary, play
from proxy import Proxy
from spelled import spelled
from test_deployment import FDKT, ROWS, SITE_TOML, decoded, drafts, notes_of_sites, scenario
from test_faults import edited, kill, last_line, until

from fedsynth.clients.audit_log import entries
from fedsynth.deployment.policy import load_site
from fedsynth.deployment.site.rows import import_rows
from fedsynth.federation.messages import (
    Adopted,
    Finetuned,
    KeysOffered,
    Learnt,
    SeedsShared,
    SharesOpened,
    SurvivorsSigned,
    Unmasked,
    Voted,
)
from fedsynth.federation.payload import decode
from fedsynth.federation.records import unpacked
from fedsynth.federation.secure_sum import MODULUS
from fedsynth.models.llm import LocalLLM
from fedsynth.simulation.flower import free_port
from fedsynth.simulation.result import read
from fedsynth.world import load_world, private_notes

pytestmark = [pytest.mark.deployment, pytest.mark.full, pytest.mark.timeout(480)]
FIRST, *_ = SITES = tuple(sorted(NAMES))
OVERHEAD = 30_000  # bytes of one message beside its payload: Flower's own fields, signatures, HTTP, TLS


@dataclass
class Said:
    """When a program said what, as it says it: Flower's SuperNode writes no times."""

    running: Running
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while self.running.process.poll() is None:
            whole, _, _ = self.running.said().rpartition("\n")
            new = whole.splitlines()[len(self.lines) :]
            self.lines += [(time.time(), line) for line in new]
            time.sleep(0.02)

    def windows(self, begin: str, end: str) -> dict[str, list[tuple[float, float]]]:
        """By message type, from the line that names it to the next that says `end`."""
        found: dict[str, list[tuple[float, float]]] = {}
        for number, (at, line) in enumerate(self.lines):
            if match := re.search(rf"{begin}: (\S+) message", line):
                until = next(t for t, later in self.lines[number:] if end in later)
                found.setdefault(match[1], []).append((at, until))
        return found


@dataclass
class Ran:
    federation: Federation
    text: str
    out: Path
    dump: Path
    proxy: Proxy
    said: Said


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("federation")
    text = instructed.scenario(folder, SITES)
    (folder / "scenario.toml").write_text(text)
    (folder / "dump").mkdir()
    port = free_port()
    proxy = Proxy(port)
    data = instructed.records(SITES)
    with federation(folder, folder / "scenario.toml", data, port=port, **instructed.SITE_TOML) as made:
        first = made.place(FIRST) / "site.toml"
        first.write_text(first.read_text().replace(f":{port}", f":{proxy.port}"))
        for name in SITES:
            made.start_site(name, injected=True, wait=False, FEDSYNTH_TEST_DUMP=str(folder / "dump"))
        said = Said(made.sites[FIRST])
        made.run(made.coordinator / "scenario.toml", "run", "--json")
        yield Ran(made, text, folder / "run", folder / "dump", proxy, said)
        proxy.close()


def run_of(out: Path) -> str:
    return str(json.loads((out / "deployment.json").read_text())["run"])


def test_two_rounds_with_state_at_the_server_release_what_the_simulation_does(ran: Ran, tmp_path: Path) -> None:
    found = instructed.adapters(ran.out)
    assert len(found) == 2 * (3 + 1)  # in each round three sites', and the server's mean
    assert instructed.same(instructed.simulated(ran.text, tmp_path / "simulated", run_of(ran.out)), found)
    for name in SITES:
        account = instructed.account(load_site(ran.federation.place(name)).ledger)
        assert [grant["state"] for grant in account["grants"]] == ["sent", "sent"]
        assert len(account["reservations"]) == 1
        assert 7.5 < account["epsilon"] <= 8.0


def test_sizes_by_message_type_at_the_socket_are_those_of_the_payloads(ran: Ran) -> None:
    """Means: a TCP proxy before one site; the lines of its SuperNode tell which message passes."""
    up, down = ran.said.windows("Sending", "Sent successfully"), ran.said.windows("Receiving", "Received successfully")
    kinds = {"train.finetune", "train.adopt"}
    assert set(up) == set(down) == kinds
    assert [len(each) for each in (*up.values(), *down.values())] == [2] * 4

    def passed(way: str, begin: float, end: float) -> int:
        return ran.proxy.bytes(way, begin - 0.1, end + 0.1)

    adapter = max(len(payload) for payload in payloads(ran.dump))
    sizes = {
        (kind, way): [passed(way, *window) for window in found[kind]]
        for way, found in (("up", up), ("down", down))
        for kind in kinds
    }
    print(f"\n{adapter=} {sizes}")
    bundle = sizes["train.finetune", "down"].pop(0) - adapter  # comes with a run's first message, and is never run
    assert 0 < bundle < 300_000
    for size in (*sizes["train.finetune", "up"], *sizes["train.finetune", "down"], *sizes["train.adopt", "down"]):
        assert 0.9 * adapter < size < 1.1 * adapter + OVERHEAD
    for size in sizes["train.adopt", "up"]:
        assert size < OVERHEAD
    rows = read(ran.out).metrics
    told = rows[(rows["client"] == 0) & (rows["metric"] == "bytes/up")]["value"].sum()
    assert told <= sum(sum(sizes[kind, "up"]) for kind in kinds) <= told + 4 * OVERHEAD


def payloads(dump: Path) -> list[bytes]:
    """What left, as Flower's serialiser was given it."""
    found = []
    for file in dump.glob("ConfigRecord-*"):
        payload, refused, seconds = unpacked(RecordDict({"fedsynth": ConfigRecord.inflate(file.read_bytes())}))
        assert not refused
        assert seconds is None
        found.append(payload)
    return found


def test_no_canary_is_in_any_adapter_that_left_and_the_search_finds_one_that_is_planted(ran: Ran) -> None:
    answers: list[Any] = []
    for payload in payloads(ran.dump):
        try:
            answers.append(decode(payload, Finetuned))
        except Exception:
            answers.append(decode(payload, Adopted))
    assert sorted(type(answer).__name__ for answer in answers) == ["Adopted"] * 6 + ["Finetuned"] * 6
    canaries = [instructed.canary(row) for site in range(3) for row in range(2000 * site, 2000 * site + 60)]

    def found_in(answer: Any) -> set[str]:
        arrays = answer.adapter.arrays.values() if isinstance(answer, Finetuned) else ()
        said = spelled(answer) + "".join(array.tobytes().decode("latin-1") for array in arrays)
        return {token for token in canaries if token in said}

    assert [found_in(answer) for answer in answers] == [set()] * 12
    trained = next(answer for answer in answers if isinstance(answer, Finetuned))
    name, array = next(iter(trained.adapter.arrays.items()))
    planted = np.array(array)
    text = canaries[5].encode() + b"  "
    planted.reshape(-1)[: len(text) // 4] = np.frombuffer(text[: len(text) // 4 * 4], np.float32)
    holding = replace(trained.adapter, arrays={**trained.adapter.arrays, name: planted})
    assert found_in(replace(trained, adapter=holding)) == {canaries[5]}
    raw = b"".join(file.read_bytes() for file in ran.dump.iterdir())
    assert not any(token.encode() in raw for token in canaries)


def test_an_adapter_without_a_guarantee_does_not_leave_a_site(ran: Ran, tmp_path: Path) -> None:
    """The policy's lines on this are as the template leaves them."""
    (tmp_path / "scenario.toml").write_text(instructed.scenario(tmp_path, (FIRST,), guarantee="none"))
    done = ran.federation.run(tmp_path / "scenario.toml", "without", "--sites", FIRST, code=1)
    assert f"site '{FIRST}' refused: not_allowed" in done.stderr
    assert not instructed.adapters(ran.federation.folder / "without")
    place = load_site(ran.federation.place(FIRST))
    assert "policy.without_guarantee is false" in (place.state / "site.log").read_text()
    assert len(instructed.account(place.ledger)["reservations"]) == 1  # of the run before


def test_without_injected_keys_noise_is_new_in_each_run(ran: Ran, tmp_path: Path) -> None:
    """The last of this module: the site runs as it does at an operator's."""
    text = instructed.scenario(tmp_path, (FIRST,), rounds=1)
    (tmp_path / "scenario.toml").write_text(text)
    ran.federation.sites[FIRST].end()
    ran.federation.start_site(FIRST)
    found = []
    for number in range(2):
        with edited(ran.federation.place(FIRST) / "site.toml", id=f'"drawn-{number}"'):
            list(import_rows(load_site(ran.federation.place(FIRST))))  # makes the account, too
            ran.federation.run(tmp_path / "scenario.toml", f"drawn-{number}", "--sites", FIRST)
        out = ran.federation.folder / f"drawn-{number}"
        found.append(instructed.adapters(out))
        assert not instructed.same(instructed.simulated(text, tmp_path / f"simulated-{number}", run_of(out)), found[-1])
    assert found[0].keys() == found[1].keys()
    assert not instructed.same(*found)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One site of notes; its policy is as `fedsynth site init` leaves it."""
    folder = tmp_path_factory.mktemp("default")
    world = load_world("hospitals")
    corpus = private_notes(world, 0, 120, 0, split="train")
    notes = pd.DataFrame({"text": corpus.prompts, "label": corpus.answers, "part": "train", "site": "alone"})
    notes.to_csv(folder / "all.csv", index=False)
    text = FDKT.format(file=folder / "all.csv", labels=json.dumps(list(world.labels)))
    (folder / "scenario.toml").write_text(text.replace("clients = 3", "clients = 1").replace('unit = "person"\n', ""))
    outputs = 'outputs = ["text", "scores"]  '
    keep = {"minimum_records = 1": "minimum_records = 100", outputs.replace('"scores', '"adapter", "scores'): outputs}
    with federation(
        folder, folder / "scenario.toml", {"alone": notes}, port=free_port(), policy="approve_text = true", **keep
    ) as made:
        made.start_site("alone")
        yield made


def begun(made: Federation, name: str) -> tuple[Running, str]:
    """A run that waits for a person at the site, and the request that waits."""
    command = ["run", made.coordinator / "scenario.toml", "--out", made.folder / name, "--server", made.coordinator]
    run = spawn([sys.executable, "-P", "-m", "fedsynth.cli.main", *command], made.folder, made.folder / f"{name}.log")
    place = load_site(made.place("alone"))
    held = until(
        lambda: [
            h for h in place.approvals.all() if h["decision"] == "waits" and place.open_ledger().answered(h["order"])
        ],
        "text waits",
    )
    return run, held[0]["order"]


def approve(made: Federation, *arguments: str) -> str:
    return fedsynth("site", "approve", made.place("alone"), "--json", *arguments, cwd=made.folder).stdout


def test_text_waits_until_a_person_lets_it_go_and_no_metric_leaves(default: Federation) -> None:
    run, request = begun(default, "approved")
    [held] = json.loads(approve(default))
    assert (held["order"], held["task"], held["decision"]) == (request, "train.synthesize", "waits")
    shown = [json.loads(line) for line in approve(default, "--show", request[:8]).splitlines()]
    assert len(shown) == held["texts"] > 10
    time.sleep(8)  # the server asks again meanwhile
    out = default.folder / "approved"
    assert drafts(out) == []
    assert run.process.poll() is None
    run.end(signal.SIGINT)

    deployment = json.loads((out / "deployment.json").read_text())
    (out / "deployment.json").write_text(json.dumps(deployment | {"measured": True}))  # a coordinator who is curious
    assert json.loads(approve(default, "--accept", request[:8]))["decision"] == "accepted"
    resume = ("run", "--resume", out, "--server", default.coordinator)
    curious = fedsynth(*resume, cwd=default.folder, code=1)
    assert "evaluate: 0 of 1 clients answered, 1 needed (site 'alone' refused: not_allowed)" in curious.stderr
    [released] = drafts(out)
    assert [prompt for prompt, _ in released] == [each["text"] for each in shown]
    (out / "deployment.json").write_text(json.dumps(deployment))
    fedsynth(*resume, cwd=default.folder)

    place = load_site(default.place("alone"))
    account = instructed.account(place.ledger)
    assert [grant["state"] for grant in account["grants"]] == ["sent"]
    assert not [row for row in read(out).metrics["metric"] if row in ("accuracy", "macro_f1")]
    said = [(e["event"], e.get("task")) for e in entries(place.audit_log)]
    assert ("accepted", None) in said
    assert ("refused", "evaluate.evaluate") in said


def test_text_that_a_person_refuses_ends_the_run_in_one_line_and_stays_paid(default: Federation) -> None:
    with edited(default.place("alone") / "site.toml", id='"alone-2"'):
        list(import_rows(load_site(default.place("alone"))))  # makes the account, too
        run, request = begun(default, "declined")
        place = load_site(default.place("alone"))
        assert json.loads(approve(default, "--refuse", request))["decision"] == "declined"
        assert run.process.wait(60) == 1
        assert "site 'alone' refused: not_approved" in last_line(run)
        assert drafts(default.folder / "declined") == []
        account = instructed.account(place.ledger)
        assert [grant["state"] for grant in account["grants"]] == ["stored"]
        assert account["epsilon"] > 7


# --- secure sums ---

SUMMED = FDKT.replace(
    'use = "fedsynth.strategies.fdkt:FDKT"\nper_label = 4\nnum_texts = 24\nshots = 2\n',
    'use = "fedsynth.strategies.private_evolution:PrivateEvolution"\nnum_texts = 24\nkeep = 2\nvariations = 0\n',
)
for old, new in (
    ("epsilon = 8.0 }}\n", "epsilon = 8.0 }}\nsecure_sum = {{ clients = 3, dropouts = 1 }}\n"),
    ("[server]\n", "[server]\ntimeout = {timeout}\nquorum = 0.6\n"),
    ("[arms.fdkt]", "[arms.summed]"),
):
    assert old in SUMMED
    SUMMED = SUMMED.replace(old, new)


@pytest.fixture(scope="module")
def summing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites whose operators have exchanged their public keys as files, and accept what a sum costs."""
    folder = tmp_path_factory.mktemp("summing")
    text = scenario(folder, SUMMED.replace("{timeout}", "120"))
    (folder / "scenario.toml").write_text(text)
    (folder / "dump").mkdir()
    outputs = {'outputs = ["text", "adapter", "scores"]  ': 'outputs = ["votes"]  '}
    with federation(
        folder,
        folder / "scenario.toml",
        notes_of_sites(),
        port=free_port(),
        policy="approve_text = false\n[policy.secure_sum]\naccept = true\nclients = 2",
        **outputs,
        **SITE_TOML,
    ) as made:
        for name in SITES:
            (made.place(name) / "roster").mkdir()
            for other in SITES:
                shutil.copy(made.place(other) / f"{other}.pub", made.place(name) / "roster")
        for name in SITES:
            made.start_site(name, injected=True, wait=False, FEDSYNTH_TEST_DUMP=str(folder / "dump"))
        for site in made.sites.values():
            site.wait_for("warm")
        yield made


def chosen(out: Path) -> list[tuple[str, str]]:
    """The texts that a run's votes have kept."""
    [file] = (out / "corpora").rglob("kept*.parquet")
    frame = pd.read_parquet(file)
    return list(zip(frame["prompt"], frame["answer"], strict=True))


def parts(made: Federation, name: str, run: str = "*") -> list[dict[str, Any]]:
    """What a site has on its disk of its sums."""
    runs = load_site(made.place(name)).state / "runs"
    return [json.loads(file.read_text()) for file in runs.glob(f"{run}/summed/seed-0/sums/*.json")]


def paid_once(made: Federation, name: str) -> None:
    account = instructed.account(load_site(made.place(name)).ledger)
    assert [grant["state"] for grant in account["grants"]] == ["sent"]
    assert len(account["reservations"]) == 1
    assert 7.5 < account["epsilon"] <= 8.0


def hidden(votes: Voted) -> bool:
    """Whether no number is as small as a count with noise; under a mask one is by chance, once in 1e8 numbers."""
    numbers = np.array(votes.votes.values)
    return bool((np.minimum(numbers, MODULUS - numbers) > 2**20).all())


def test_three_sites_send_their_votes_under_masks_and_the_sum_is_the_simulations(
    summing: Federation, tmp_path: Path
) -> None:
    summing.run(summing.coordinator / "scenario.toml", "summed", "--json")
    out = summing.folder / "summed"
    text, run = (summing.folder / "scenario.toml").read_text(), run_of(out)
    llm = LocalLLM.for_server("assets:tiny-llm")
    simulated = play(text, tmp_path / "simulated", "summed", llm=llm, run=run, measures=False)
    assert chosen(out) == chosen(simulated.out)
    assert len(chosen(out)) > 8

    said = json.loads((out / "privacy.json").read_text())["summed"]
    figures = said["largest_over_clients"]
    assert 7.5 < figures["epsilon"] <= 8.0 < figures["epsilon_alone"]
    assert f"({figures['epsilon']:.3f}, 1e-05)-DP per person" in said["line"]
    assert "by a secure sum of 3 clients (no more than 1 missing, no more than 0 in league" in said["line"]
    assert f"a client's own messages without the sum: {figures['epsilon_alone']:.2f}" in said["line"]
    assert "simulat" not in said["line"]
    for name in SITES:
        paid_once(summing, name)
        [part] = parts(summing, name, run)
        assert "secrets" not in part

    kinds = (KeysOffered, SeedsShared, SharesOpened, Voted, SurvivorsSigned, Unmasked, Learnt)
    answers = decoded(summing.folder / "dump", kinds)
    assert sorted(type(answer).__name__ for answer in answers) == sorted(3 * [kind.__name__ for kind in kinds])
    votes = [answer for answer in answers if isinstance(answer, Voted)]
    assert [hidden(each) for each in votes] == [True] * 3
    planted = replace(votes[0].votes, values=(*votes[0].votes.values[1:], 1024.0))
    assert not hidden(replace(votes[0], votes=planted))
    raw = b"".join(file.read_bytes() for file in (summing.folder / "dump").iterdir())
    assert not any(canary(1000 * site + row).encode() in raw for site in range(3) for row in range(ROWS))


def test_a_sum_is_opened_by_the_others_when_a_site_is_killed_after_it_has_masks_with_them(
    summing: Federation, tmp_path: Path
) -> None:
    """Means: SIGKILL to all programs of a site as soon as it has noted the request for its votes. Whether these leave
    it before is open: its seed is opened then, or else its key."""
    summing.new_accounts("killed")
    (tmp_path / "scenario.toml").write_text(scenario(tmp_path, SUMMED.replace("{timeout}", "60")))
    out, (*others, lost) = summing.folder / "killed", SITES
    before = len(parts(summing, lost))
    command = ["run", tmp_path / "scenario.toml", "--out", out, "--server", summing.coordinator]
    run = spawn([sys.executable, "-P", "-m", "fedsynth.cli.main", *command], tmp_path, tmp_path / "run.log")
    until(lambda: len(parts(summing, lost)) > before and parts(summing, lost, run_of(out))[0]["vector"], "it votes")
    kill(summing.sites[lost])
    assert run.process.wait(400) == 0, run.said()

    assert len(chosen(out)) > 8
    for name in others:
        paid_once(summing, name)
        [part] = parts(summing, name, run_of(out))
        assert "secrets" not in part
        assert part["members"] == [0, 1, 2]
        assert part["survivors"] in ([0, 1], [0, 1, 2])
        assert [share["client"] for share in part["given"]] == [0, 1, 2]
    epsilon, _ = load_site(summing.place(lost)).open_ledger().spent()
    assert epsilon <= 8.0
    line = json.loads((out / "privacy.json").read_text())["summed"]["line"]
    assert "which rests on the noise of 2 honest ones" in line
