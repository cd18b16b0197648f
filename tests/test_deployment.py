"""A federation between real processes: TLS, registered keys, sites with folders, ledgers and policies of their own."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from deployment import NAMES, Federation, federation
from flwr.app import RecordDict
from inprocess import canary, play
from proxy import Proxy
from spelled import spelled

from fedsynth.federation.messages import Learnt, Synthesized
from fedsynth.federation.payload import decode
from fedsynth.federation.records import unpacked
from fedsynth.privacy.audit import contents, problems
from fedsynth.simulation.flower import free_port
from fedsynth.testing import ScriptedLLM
from fedsynth.world import load_world, private_notes

pytestmark = pytest.mark.deployment
ROWS = 60

FDKT = """
name = "between-hospitals"
seeds = [0]
[strategy]
use = "fedsynth.strategies.fdkt:FDKT"
per_label = 4
num_texts = 24
shots = 2
[data]
source = "{file}"
labels = {labels}
clients = 3
split = "natural"
client_column = "site"
unit = "person"
test = {{ column = "part", equals = "test" }}
[client]
generator = "assets:tiny-slm"
task_model = "assets:tiny-slm"
budget = {{ epsilon = 8.0 }}
generator_training = {{ expected_batch_size = 20, steps = 12 }}
task_training = {{ augmented_epochs = 1, private_epochs = 1 }}
[server]
llm = "assets:tiny-llm"
[arms.fdkt]
"""


def notes_of_sites() -> dict[str, pd.DataFrame]:
    """Notes of three simulated hospitals, a canary in each; the last tenth is held out."""
    world, found = load_world("hospitals"), {}
    for index, name in enumerate(sorted(NAMES)):
        corpus = private_notes(world, index, ROWS, 0, split="train")
        found[name] = pd.DataFrame(
            {
                "text": [f"{text} {canary(1000 * index + i)}" for i, text in enumerate(corpus.prompts)],
                "label": corpus.answers,
                "person": [f"{name}-{i // 2}" for i in range(ROWS)],
                "part": ["test" if i >= ROWS * 0.9 else "train" for i in range(ROWS)],
                "site": name,
            }
        )
    return found


def scenario(folder: Path, text: str = FDKT) -> str:
    """The scenario of simulation and deployment alike; the simulation reads all sites' notes from one file."""
    pd.concat(notes_of_sites().values()).to_csv(folder / "all.csv", index=False)
    return text.format(file=folder / "all.csv", labels=json.dumps(list(load_world("hospitals").labels)))


SITE_TOML = {
    "independent_rows = true": 'person = "person"',
    "records = 60": "records = 27",
    "# test = {": "test = {",
    'equals = "test" }   #': 'equals = "test" } #',
    'column = "split"': 'column = "part"',
}


@dataclass
class Ran:
    """One run with injected keys."""

    federation: Federation
    out: Path
    dump: Path
    proxy: Proxy
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("federation")
    (folder / "scenario.toml").write_text(scenario(folder))
    dump = folder / "dump"
    dump.mkdir()
    port = free_port()
    proxy = Proxy(port)
    with federation(folder, folder / "scenario.toml", notes_of_sites(), port=port, **SITE_TOML) as made:
        first = made.place(sorted(NAMES)[0]) / "site.toml"
        first.write_text(first.read_text().replace(f":{port}", f":{proxy.port}"))  # one site's traffic is counted
        for name in sorted(NAMES):
            made.start_site(name, injected=True, wait=False, FEDSYNTH_TEST_DUMP=str(dump))
        for name in sorted(NAMES):
            made.sites[name].wait_for("SuperNode ID")
            made.sites[name].wait_for("warm")
        done = made.run(made.coordinator / "scenario.toml", "run", "--json")
        yield Ran(made, folder / "run", dump, proxy, json.loads(done.stdout.splitlines()[-1]))
        proxy.close()


def drafts(out: Path) -> list[list[tuple[str, str]]]:
    files = sorted((out / "corpora").rglob("drafts-*.parquet"))
    frames = [pd.read_parquet(file) for file in files]
    return [list(zip(frame["prompt"], frame["answer"], strict=True)) for frame in frames]


def test_with_injected_keys_three_sites_release_what_the_simulation_does(ran: Ran, tmp_path: Path) -> None:
    text = scenario(tmp_path)
    deployment = json.loads((ran.out / "deployment.json").read_text())
    simulated = play(text, tmp_path, "fdkt", llm=ScriptedLLM(), run=deployment["run"])
    assert drafts(simulated.out) == drafts(ran.out)
    assert [len(site) > 10 for site in drafts(ran.out)] == [True] * 3


def test_the_run_says_what_was_spent_and_measures_nothing(ran: Ran) -> None:
    arm = ran.summary["arms"]["fdkt"]
    assert arm["guarantee"] == "dp"
    assert 7.8 < arm["epsilon"] <= 8.0
    assert "accuracy" not in arm["metrics"]
    line = json.loads((ran.out / "privacy.json").read_text())["fdkt"]["line"]
    assert "simulat" not in line


def test_each_site_keeps_an_account_a_trail_and_a_model_of_its_own(ran: Ran) -> None:
    for name in NAMES:
        state = ran.federation.place(name) / "state"
        found = contents(state / "accounts" / f"{name}-1" / "ledger.sqlite")
        assert not problems(found)
        assert [grant["state"] for grant in found["grants"]] == ["sent"]
        events = [(e["event"], e.get("task")) for e in ran.federation.audit_log(name)]
        assert events == [
            ("asked", "train.synthesize"),
            ("charged", None),
            ("stored", None),
            ("answered", None),
            ("asked", "train.learn"),
            ("stored", None),
            ("answered", None),
        ]
        assert list(state.rglob("task_model.safetensors"))


def decoded(dump: Path, kinds: Sequence[type[Any]] = (Synthesized, Learnt)) -> list[Any]:
    """Every payload that left a site, as the object that it stands for."""
    from flwr.app import ConfigRecord

    answers = []
    for file in dump.glob("ConfigRecord-*"):
        record = ConfigRecord.inflate(file.read_bytes())
        payload, refused, seconds = unpacked(RecordDict({"fedsynth": record}))
        assert not refused
        assert seconds is None  # how long a client works depends on what was drawn of its text
        for kind in kinds:
            try:
                answers.append(decode(payload, kind))
                break
            except Exception:
                continue
        else:
            raise AssertionError(f"unknown payload in {file.name}")
    return answers


def test_no_canary_is_in_any_payload_that_left_and_the_search_finds_one_that_is_planted(ran: Ran) -> None:
    answers = decoded(ran.dump)
    assert sorted(type(a).__name__ for a in answers) == ["Learnt"] * 3 + ["Synthesized"] * 3
    canaries = [canary(1000 * site + row) for site in range(3) for row in range(ROWS)]

    def found_in(answers: list[Any]) -> set[str]:
        said = spelled(answers)
        return {token for token in canaries if token in said}

    assert found_in(answers) == set()
    synthesized = next(a for a in answers if isinstance(a, Synthesized))
    corpus = synthesized.corpus
    planted = type(corpus)((canaries[7], *corpus.prompts[1:]), corpus.answers, corpus.provenance, corpus.grants)
    assert found_in([planted]) == {canaries[7]}
    raw = b"".join(file.read_bytes() for file in ran.dump.iterdir())
    assert not any(token.encode() in raw for token in canaries)


def test_what_passes_the_socket_is_little_more_than_the_payloads(ran: Ran) -> None:
    summary = ran.summary["arms"]["fdkt"]["bytes"]
    each = summary["up"] / 3
    up = ran.proxy.bytes("up")
    assert each < up < each + 400_000  # handshakes, polls, heartbeats


def test_plain_http_and_strangers_are_refused(ran: Ran) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", ran.federation.port, timeout=10)
    connection.request("GET", "/health")
    with pytest.raises((http.client.HTTPException, OSError)):
        connection.getresponse()
