"""`fedsynth init`: from a file to a scenario that `check` takes, of which nothing private is shown."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoTokenizer

from fedsynth.data import proposal
from fedsynth.data.tables import read_rows
from fedsynth.models.at_hand import at_hand
from fedsynth.scenario.server import Endpoint
from fedsynth.scenario.toml import cells, load
from fedsynth.simulation.simulate import check

CANARY = "zyzzyva"  # in every text
WORDS = "the ward saw a patient who came in with pain and was given a bed".split()  # noqa: SIM905 - shorter
Command = Callable[..., tuple[int, str, str]]


def rows(number: int, labels: list[str], length: int = 12, **columns: Callable[[int], Any]) -> pd.DataFrame:
    """Texts of `length` words, each with the canary in it."""
    rng = random.Random(0)
    texts = [" ".join([f"{i}", CANARY, *rng.choices(WORDS, k=length - 2)]) + "." for i in range(number)]
    table = pd.DataFrame({"note": texts, "ward": [labels[i % len(labels)] for i in range(number)]})
    return table.assign(**{name: [of(i) for i in range(number)] for name, of in columns.items()})


def saved(table: pd.DataFrame, name: str) -> str:
    if name.endswith(".csv"):
        table.to_csv(name, index=False)
    elif name.endswith(".jsonl"):
        table.to_json(name, orient="records", lines=True, force_ascii=False)
    else:
        table.to_parquet(name)
    return name


VARIANTS: dict[str, tuple[Callable[[], pd.DataFrame], str, list[str]]] = {
    "600 notes of 190 words": (lambda: rows(600, ["flu", "asthma", "burn"], 190), "notes.csv", []),
    "two labels, numbers": (lambda: rows(80, ["1", "5"]), "notes.jsonl", []),
    "chinese, blank ones": (lambda: rows(90, ["\u5fc3\u810f", "\u9aa8\u79d1", ""]), "notes.csv", []),
    "persons of natural sites": (
        lambda: rows(120, ["flu", "asthma"], person=lambda i: f"p{i // 2}", clinic=lambda i: f"c{i // 2 % 3}"),
        "notes.parquet",
        ["--person", "person", "--site", "clinic"],
    ),
    "labels that part alike": (lambda: rows(60, ["a_b", "a-b", 'said "no"']), "notes.csv", []),
    "a test split": (lambda: rows(60, ["x", "y"], split=lambda i: "test" if i % 5 < 2 else "train"), "n.csv", []),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scenario_of_a_file_is_taken_at_once_and_no_text_is_shown(variant: str, command: Command) -> None:
    make, name, more = VARIANTS[variant]
    file = saved(make(), name)
    code, out, err = command("init", file, "--text", "note", "--label", "ward", *more, "--yes")
    assert code == 0, err
    written = Path(f"{Path(name).stem}.toml")
    scenario = load(str(written))
    assert {cell.arm for cell in cells(scenario)} >= {"majority", "local", "no_demonstrations", "dp_only", "fdkt"}
    assert load(str(written), quick=True).data.clients == 2
    quick = load(str(written), quick=True)
    assert (quick.data.limit, quick.client.generator_training.max_length <= 64) == (60, True)
    assert CANARY in Path(name).read_bytes().decode(errors="replace")
    assert CANARY not in out + err + written.read_text()
    told = check(scenario)
    assert not [line for line in told if "labels" in line and "lacks" in line]
    if more:
        assert (scenario.data.unit, scenario.data.client_column, scenario.data.clients) == ("person", "clinic", 3)
    if "chinese" in variant:
        assert "60 with a text" in out
        assert "30 more lack" in out
        assert scenario.data.labels == ("\u5fc3\u810f", "\u9aa8\u79d1")
        assert "label_names" in scenario.run
    if "numbers" in variant:
        assert "labels are numbers" in out
        assert "label_names" not in scenario.run
        assert scenario.task.wording("5") == "ward 5"
    if "split" in variant:
        assert scenario.data.test is not None
    if "600" in variant:
        assert (scenario.data.clients, scenario.seeds) == (5, (0,))


def test_lengths_hold_nineteen_of_twenty_texts_and_are_powers_of_two(command: Command) -> None:
    """Counted by transformers' own tokenizer. Half the figure would cut all of them."""
    saved(rows(300, ["flu", "asthma"], 40), "notes.csv")
    assert command("init", "notes.csv", "--text", "note", "--label", "ward", "--yes")[0] == 0
    scenario = load("notes.toml")
    tokenizer = AutoTokenizer.from_pretrained(Path(proposal.__file__).parents[1] / "assets" / "tiny-slm")
    counted = sorted(len(tokenizer(text)["input_ids"]) for text in pd.read_csv("notes.csv")["note"])
    for most in (scenario.client.task_training.max_length, scenario.client.generator_training.max_length):
        assert most & (most - 1) == 0
        assert counted[int(0.95 * len(counted))] <= most
    task = scenario.client.task_training.max_length
    assert counted[int(0.95 * len(counted))] > task // 2  # no larger than it must be


def test_texts_that_are_too_long_for_the_models_are_said_with_their_share_and_the_way_out(command: Command) -> None:
    saved(rows(40, ["flu", "asthma"], 600), "long.csv")
    _, out, _ = command("init", "long.csv", "--text", "note", "--label", "ward", "--yes")
    assert "100% of the texts are longer than the 512 tokens that the task model reads" in out
    assert "--task-model" in out
    saved(rows(40, ["flu", "asthma"]), "short.csv")
    _, out, _ = command("init", "short.csv", "--text", "note", "--label", "ward", "--yes")
    assert "longer than" not in out


def test_instructions_get_a_method_that_answers_them(command: Command) -> None:
    table = rows(60, ["x"]).assign(answer=[f"The answer {i} is {CANARY} and rest." for i in range(60)])
    saved(table, "asked.parquet")
    code, out, err = command("init", "asked.parquet", "--text", "note", "--response", "answer", "--yes")
    assert code == 0, err
    scenario = load("asked.toml")
    assert scenario.data.task == "instructions"
    assert scenario.run == ("base", "local", "dp_only", "knowledge_sg")
    check(scenario)
    assert CANARY not in out + err + Path("asked.toml").read_text()


@pytest.mark.parametrize(
    ("make", "words", "said"),
    [
        (lambda: rows(60, ["flu"]), [], "all 60 rows have the same label in 'ward'"),
        (lambda: rows(60, ["a", "b"]), ["--text", "notte"], "--text: no column 'notte'.*did you mean 'note'"),
        (lambda: rows(60, ["a", "b"]), ["--label", "wart"], "--label: no column 'wart'.*did you mean 'ward'"),
        (lambda: rows(60, ["a", "b"]), ["--person", "p"], "--person: no column 'p'; it has 'note', 'ward'"),
        (lambda: rows(60, ["a", "b"]), ["--label", "note"], "'note' has 60 different values in 60 rows"),
        (lambda: rows(60, ["a", "b"], w=lambda i: f"w{i % 3}"), ["--text", "w"], "'w' has 3 different values in 60"),
        (
            lambda: rows(60, ["a", "b"], p=lambda i: i // 2, s=lambda i: i % 2),
            ["--person", "p", "--site", "s"],
            "30 values of the unit column 'p' are at more than one client .*without --site.*weaker",
        ),
        (lambda: rows(60, ["a", ""]), ["--label", "note", "--text", "ward"], "it holds no class names"),
        (lambda: rows(60, [CANARY * 60, "b"]), [], "holds a value of 420 characters"),
        (lambda: rows(60, ["", ""]), [], "the label column 'ward' is empty"),
        (lambda: rows(8, ["a", "b"]), [], "8 rows with a text and an answer: at least 10"),
        (lambda: rows(60, ["a", "b"], p=lambda i: i % 4), ["--person", "p"], "4 different values in 'p'"),
        (lambda: rows(60, ["a", "b"]).rename(columns={"ward": "w"}), ["--label", ""], "no column ''"),
    ],
)
def test_a_file_that_nothing_can_be_learnt_from_is_refused_without_a_text(
    make: Callable[[], pd.DataFrame], words: list[str], said: str, command: Command
) -> None:
    saved(make(), "notes.csv")
    given = words if "--text" in words else ["--text", "note", *words]
    given = given if "--label" in given else [*given, "--label", "ward"]
    code, out, err = command("init", "notes.csv", *given, "--yes")
    assert code == 2
    assert re.search(said, err), err
    assert CANARY not in out + err
    assert not Path("notes.toml").exists()


def test_columns_are_guessed_by_obvious_names_and_else_all_are_listed(command: Command) -> None:
    saved(rows(60, ["a", "b"]).rename(columns={"note": "Text", "ward": "Category"}), "plain.csv")
    code, out, _ = command("init", "plain.csv", "--yes")
    assert code == 0
    assert "--text is not given: took the column 'Text'" in out
    assert "--label is not given: took the column 'Category'" in out
    saved(rows(60, ["a", "b"]), "odd.csv")
    code, _, err = command("init", "odd.csv", "--yes")
    assert code == 2
    assert "say --label COLUMN; the file has 'note', 'ward'" in err


def test_what_was_read_off_the_file_is_confirmed_first(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(rows(60, ["a", "b"]), "notes.csv")
    words = ("init", "notes.csv", "--text", "note", "--label", "ward")
    code, out, err = command(*words)
    assert (code, Path("notes.toml").exists()) == (2, False)
    assert "nothing is written, for want of a terminal to ask at: --yes says it may be public (2 labels" in err
    assert "(2 labels, lengths of 64 and 32 tokens" in err
    assert "becomes public when you send this scenario" in out
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    for answer, written in (("n\n", False), ("\n", False), ("y\n", True)):
        monkeypatch.setattr("builtins.input", lambda *_, said=answer: said.strip())
        monkeypatch.setattr("typer.confirm", lambda *_, said=answer, **__: said == "y\n")
        assert command(*words)[0] == (0 if written else 1)
        assert Path("notes.toml").exists() is written
    kept = Path("notes.toml").read_text()
    code, _, err = command(*words, "--yes")
    assert (code, "exists, and is not overwritten" in err) == (2, True)
    assert Path("notes.toml").read_text() == kept
    marked = {line.split("=")[0].strip() for line in kept.splitlines() if line.rstrip().endswith("from the file")}
    card = marked - {"min_words", "draft_tokens", "labels", "clients", "max_length"}
    assert len(marked) == 6
    assert [line.split()[0] for line in card] == ["[task.labels]"]


def model(folder: Path, architecture: str, width: int, size: int, *, chats: bool = False) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], "hidden_size": width}))
    (folder / "model.safetensors").write_bytes(b"0" * size)
    if chats:
        (folder / "chat_template.jinja").write_text("{{ messages }}")


def test_stored_models_go_before_shipped_ones_each_where_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSYNTH_MODELS", str(tmp_path))
    nothing = at_hand(instructions=False, room=100)
    assert (nothing.generator.name, nothing.llm.name) == ("assets:tiny-slm", "assets:tiny-llm")
    model(tmp_path / "small", "LlamaForCausalLM", 576, 10)
    alone = at_hand(instructions=True, room=100)  # no other model could be the professional
    assert (alone.generator.name, alone.llm.name) == ("assets:tiny-base", "assets:tiny-professional")
    assert at_hand(instructions=False, room=100).generator.name == "models:small"
    model(tmp_path / "base", "Gemma3ForCausalLM", 640, 50)
    model(tmp_path / "chat", "Qwen2ForCausalLM", 1536, 40, chats=True)
    model(tmp_path / "huge", "Qwen2ForCausalLM", 8192, 400, chats=True)
    model(tmp_path / "encoder", "BertModel", 384, 5)
    found = at_hand(instructions=False, room=100)
    names = [each.name for each in (found.generator, found.task_model, found.llm) if each is not None]
    assert names == ["models:small", "models:encoder", "models:chat"]
    assert found.embedder == found.task_model
    assert at_hand(instructions=False, room=1000).llm.name == "models:huge"


def test_an_endpoint_is_written_as_a_table_with_its_embedder(command: Command) -> None:
    saved(rows(60, ["a", "b"]), "notes.csv")
    words = ["init", "notes.csv", "--text", "note", "--label", "ward", "--yes", "--llm", "http://127.0.0.1:8000/v1"]
    code, _, err = command(*words)
    assert (code, "--model" in err) == (2, True)
    code, _, err = command(*words, "--model", "mine", "--key-env", "MY_KEY")
    assert code == 0, err
    server = load("notes.toml").server
    assert server.llm == Endpoint("http://127.0.0.1:8000/v1", "mine", key_env="MY_KEY", api="chat")
    assert server.embedder == "assets:tiny-slm"


def test_a_scenario_in_another_folder_finds_its_file(command: Command, tmp_path: Path) -> None:
    saved(rows(60, ["a", "b"]), "notes.csv")
    (tmp_path / "scenarios").mkdir()
    code, _, err = command(
        "init", "notes.csv", "--text", "note", "--label", "ward", "--yes", "--out", "scenarios/n.toml"
    )
    assert code == 0, err
    assert len(read_rows(load("scenarios/n.toml").data).table) == 60
