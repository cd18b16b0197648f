"""Exported texts and adapters: what is written and read again, what its card says, and what never leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fedsynth.cli.main import app
from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.payload import corpus_to_parquet
from fedsynth.federation.run.directory import begin, private_of
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.run.summary import summarize
from fedsynth.models.adapters import load_adapter, new_adapter
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.statement import statement
from fedsynth.reporting.export import export
from fedsynth.reporting.export_card import UNKNOWN, Exported, card, licence_of
from fedsynth.scenario.toml import cells, load
from fedsynth.typed import BadValue

SETS = [
    "data.clients=2",
    "seeds=[0,1]",
    'run=["local","no_demonstrations","fdkt","no_dp"]',
    "client.generator=models:mine",
]
TEXTS = {0: ("hot | <b>", 'dry "so"'), 1: ("naïve\u2028line", "two\nlines")}
PLAN = DPPlan(200, 50, 60, 1, 0.3, 1.416, 1e-5)  # of the shipped hospitals: epsilon 7.994 (docs/results.md)
SECRET = "zq81f3c2"  # in the private directory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with drafts, texts of the LLM and adapters: with a guarantee, public, and without one."""
    shutil.copytree(families.folder("llama"), tmp_path / "models" / "mine")
    (tmp_path / "models" / "mine" / "README.md").write_text("# mine\n\n- licence of the original: MIT\n")
    monkeypatch.setenv("FEDSYNTH_MODELS", str(tmp_path / "models"))
    scenario, out = load("hospitals", SETS), tmp_path / "run"
    begin(scenario, out, {}, {"data.json": {"secret": SECRET}})
    logs = []
    for cell in cells(scenario):
        log = RunLog(cell, out, out / "events.jsonl", round=1)
        for client, texts in TEXTS.items():
            log.log_metric(client, "accuracy", 0.5)
            labels = ("cardiology", "respiratory")
            kind = {"no_demonstrations": Provenance.PUBLIC, "fdkt": Provenance.LLM_WRITTEN}.get(cell.arm)
            if cell.arm in ("fdkt", "no_dp"):
                dp = cell.arm == "fdkt"
                log.log_statement(client, replace(statement(PLAN if dp else None, rows=()), simulated=True))
                log.released.add("synthetic text with labels")
                grants = (f"grant-{cell.seed}-{client}",) if dp else ()
                adapter = new_adapter("models:mine", rank=2, alpha=4.0, seed=client)
                log.log_adapter(client, replace(adapter, grants=grants, public=False))
                kind = kind or Provenance.SELF_GENERATED
            else:
                grants = ()
            if kind is not None:
                log.log_corpus(client, "written", Corpus(texts, labels, kind, grants))
        logs.append(log)
    summarize(scenario, out, 1.0, logs)
    (private_of(out) / "client-0").mkdir()
    (private_of(out) / "client-0" / "train.csv").write_text(f"text\n{SECRET}\n")
    return out


def rows(folder: Path, arm: str = "fdkt") -> list[dict[str, Any]]:
    lines = (folder / "data" / arm / "written.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


# ---- What is written ----


def test_texts_come_back_as_they_were(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    found, kind = rows(tmp_path / "out"), "llm_written"
    assert len(found) == 8  # two texts of each client and seed
    assert found[2] == {
        "text": TEXTS[1][0], "label": "cardiology", "seed": 0, "client": 1, "provenance": kind, "guarantee": "dp",
    }  # fmt: skip
    export(run, tmp_path / "tables", format="parquet", arms=["fdkt"], seeds=[1])
    frame = pd.read_parquet(tmp_path / "tables" / "data" / "fdkt" / "written.parquet")
    assert frame.to_dict("records") == [row for row in found if row["seed"] == 1]


def test_the_hubs_reader_finds_the_texts_by_the_card(run: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    export(run, tmp_path / "out")
    found = load_dataset(str(tmp_path / "out"), "fdkt-written", cache_dir=str(tmp_path / "cache"))["train"]
    assert found["text"][2] == TEXTS[1][0]
    assert len(found) == 8


def test_adapters_load_in_plain_peft_and_in_fedsynth(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", arms=["fdkt"])
    folder = tmp_path / "out" / "adapters" / "fdkt" / "seed-1" / "round-1-client-1"
    expected = new_adapter("models:mine", rank=2, alpha=4.0, seed=1)
    read = load_adapter(str(folder), "models:mine")
    assert read.grants == ("grant-1-1",)
    assert all(np.array_equal(read.arrays[name], array) for name, array in expected.arrays.items())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "mine")
    tensors = PeftModel.from_pretrained(base, str(folder)).state_dict()
    name, array = next((n, a) for n, a in expected.arrays.items() if "lora_A" in n)
    assert np.array_equal(tensors[name.replace(".weight", ".default.weight")].numpy(), array)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models:mine"


def test_nothing_of_the_private_directory_and_no_path_of_this_machine_is_written(run: Path, tmp_path: Path) -> None:
    assert SECRET.encode() in all_bytes(private_of(run))  # a search that finds it
    export(run, tmp_path / "out", without_guarantee=True)
    written = all_bytes(tmp_path / "out")
    assert TEXTS[1][0].encode() in written  # likewise
    assert SECRET.encode() not in written
    assert str(tmp_path).encode() not in written


@pytest.mark.parametrize("kind", ["corpora", "adapters"])
def test_a_link_out_of_the_run_is_not_followed(run: Path, tmp_path: Path, kind: str) -> None:
    path = next(p for p in sorted((run / kind / "fdkt").rglob("*")) if p.suffix in (".parquet", ".safetensors"))
    moved = private_of(run) / path.name
    shutil.move(path, moved)
    os.symlink(moved, path)
    with pytest.raises(BadValue, match="no file of the run's directory"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- What has no guarantee ----


def test_an_arm_without_a_guarantee_is_refused_by_name_and_else_left_out(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BadValue, match=r"the arm 'no_dp' has no guarantee .*: leave it out, or say --without-guarantee"
    ):
        export(run, tmp_path / "out", arms=["fdkt", "no_dp"])
    assert not (tmp_path / "out").exists()
    made = export(run, tmp_path / "out")
    assert (made.skipped, made.arms) == (("no_dp",), ["fdkt", "no_demonstrations"])
    assert not (tmp_path / "out" / "data" / "no_dp").exists()
    assert not (tmp_path / "out" / "adapters" / "no_dp").exists()
    assert "Arms that have no guarantee were left out: no_dp." in (tmp_path / "out" / "README.md").read_text()


def test_with_the_flag_the_card_says_that_there_is_none(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", arms=["no_dp"], without_guarantee=True)
    assert {row["guarantee"] for row in rows(tmp_path / "out", "no_dp")} == {"none"}
    text = (tmp_path / "out" / "README.md").read_text()
    assert "**No guarantee covers no_dp:**" in text
    assert "epsilon, the largest" not in text


@pytest.mark.parametrize("kind", ["text", "adapter"])
def test_one_file_without_a_grant_is_refused_in_an_arm_with_a_guarantee(run: Path, tmp_path: Path, kind: str) -> None:
    if kind == "text":
        bare = Corpus(("x",), ("cardiology",), Provenance.LLM_WRITTEN)
        (run / "corpora/fdkt/seed-0/written-round1-client0.parquet").write_bytes(corpus_to_parquet(bare))
    else:
        path = run / "adapters/fdkt/seed-0/round-1-client-0/grants.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "grants": []}))
    with pytest.raises(BadValue, match="names no grant"):
        export(run, tmp_path / "out")
    assert export(run, tmp_path / "out", arms=["no_demonstrations"]).arms == ["no_demonstrations"]


@pytest.mark.parametrize("kind", [Provenance.PRIVATE, Provenance.DISCLOSED])
def test_true_private_text_is_refused_even_with_the_flag(run: Path, tmp_path: Path, kind: Provenance) -> None:
    path = run / "corpora/fdkt/seed-0/written-round1-client0.parquet"
    path.write_bytes(corpus_to_parquet(Corpus((SECRET,), ("cardiology",), kind)))
    with pytest.raises(BadValue, match="private text"):
        export(run, tmp_path / "out", without_guarantee=True)
    assert not (tmp_path / "out").exists()


# ---- The card ----


def table(text: str, after: str) -> dict[str, str]:
    """The first table behind a heading: first column -> second."""
    block = text.partition(f"{after}\n")[2].split("| --- |", 1)[1].split("\n\n")[0]
    lines = [re.split(r"(?<!\\)\|", line) for line in block.splitlines()[1:]]
    return {line[1].strip(): line[2].strip() for line in lines}


def test_the_card_has_the_figures_of_the_run(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    head = text.split("---\n")[1]
    assert '- config_name: "fdkt-written"\n  data_files: "data/fdkt/written.jsonl"' in head
    assert "task_categories: [text-classification]" in head
    figures = json.loads((run / "privacy.json").read_text())["fdkt"]["largest_over_clients"]
    shown = table(text, "### fdkt")
    assert shown["epsilon, the largest over clients and seeds"] == "7.994"
    assert float(shown["epsilon, if a row is replaced by another"]) >= figures["epsilon_replace_one"]
    assert (shown["delta"], shown["unit of privacy"]) == ("1e-05", "row")
    assert shown["adjacency"].startswith("zero-out: one unit is replaced by an empty one")
    assert shown["epsilon of 2 rows of one person"] == str(figures["epsilon_rows"]["2"])
    assert "**This run was a simulation.**" in text
    assert "All of it together" not in text  # each seed is a world of its own
    assert "a server that does not run the published bundle" in text.partition("### What this does not cover")[2]
    assert "federation of 2 clients" in text
    files = text.partition("## Files")[2]
    assert "| `data/fdkt/written.jsonl` | 8 | 2 | 0, 1 | written by the server's language model" in files
    assert re.search(r"`data/no_demonstrations/written.jsonl` .* \| public \|", files)
    assert re.search(r"\| generator \| `models:mine` \| sha256 `[0-9a-f]{64}` \| MIT \|", text)
    assert re.search(r"\| llm \| `assets:tiny-llm` \| .* \| Apache-2.0, as fedsynth itself \|", text)


def test_of_real_sites_the_cells_add_up(run: Path, tmp_path: Path) -> None:
    made = export(run, tmp_path / "out", arms=["fdkt"])
    privacy = json.loads((run / "privacy.json").read_text())
    privacy["fdkt"]["largest_over_clients"] |= {"simulated": False, "epsilon": 1.5001}
    text = card(made, load("hospitals", SETS), privacy, {})
    assert "2 cells spent of the same clients' data. By simple composition they are (3.001, 2e-05)-DP" in text
    assert "This run was a simulation" not in text


def test_names_in_the_card_are_no_markup(run: Path) -> None:
    scenario = replace(load("hospitals", SETS), name="a <script> | b\n# c")
    privacy = json.loads((run / "privacy.json").read_text())
    text = card(Exported(run, run, (), (("fdkt", 0, "client", 0),), {}, ()), scenario, privacy, {})
    assert "# Released by a fedsynth run: a &lt;script> \\| b # c\n" in text


@pytest.mark.parametrize(
    ("paper", "words", "licence"),
    [
        ("README.md", "# x\n\n- licence of the original: Gemma Terms (T.html)\n", "Gemma Terms (T.html)"),
        ("README.md", "# x\n- licence, as the file says it: apache-2.0\n", "apache-2.0"),
        ("ORIGINAL.md", "---\nlanguage: en\nlicense: 'mit'\ntags:\n- a\n---\n", "mit"),
        ("README.md", "no word of it\n", UNKNOWN),
    ],
)  # fmt: skip
def test_a_licence_is_what_the_models_papers_say(tmp_path: Path, paper: str, words: str, licence: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / paper).write_text(words)
    assert licence_of(str(tmp_path)) == licence
    assert licence_of("no/such-model-on-this-machine") == UNKNOWN


# ---- The command ----


def typed(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["export", *words])
    return done.exit_code, done.output if done.exception is None else str(done.exception)


def test_the_command_says_what_it_wrote_and_left_out(run: Path) -> None:
    code, said = typed(str(run), "--arm", "fdkt", "--arm", "no_demonstrations", "--seed", "1")
    assert code == 0, said
    assert f"8 texts and 2 adapters written to {run}-export; README.md is their card" in said
    code, said = typed(str(run), "--out", f"{run}-all")
    assert "left out no_dp: it has no guarantee; --without-guarantee exports it" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "csv"], "--format must be jsonl or parquet, got 'csv'"),
        (["--arm", "fdtk"], "no arm 'fdtk'; it has local, no_demonstrations, fdkt, no_dp"),
        (["--seed", "7"], "nothing under seed 7; it did under 0, 1"),
        (["--arm", "local"], "no released text or adapter of local"),
        (["--out", "models"], "already holds something"),
    ],
)
def test_a_wrong_argument_is_one_line(
    run: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, told = typed(str(run), *words)
    assert code != 0
    assert said in told
    assert not Path(f"{run}-export").exists()


def test_a_place_that_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    for place, said in (
        (private_of(run), "private directory"),
        (tmp_path / "gone", "there is no directory"),
        (tmp_path / "models", "holds no run that is done"),
    ):
        code, told = typed(str(place))
        assert code != 0
        assert said in told


def test_the_extra_for_plots_is_declared() -> None:
    extras = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert any(need.startswith("matplotlib") for need in extras["optional-dependencies"]["plot"])
