"""What a simulator counts in the clients' rows before a run, against texts whose tokens are counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import open_site
from fedsynth.federation.counting import cuts_of, data_facts, row_counts
from fedsynth.federation.run.data_facts import COUNTS, read_counts, read_facts, reasons_in
from fedsynth.federation.run.directory import prepare, private_of
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.simulation.simulate import check
from fedsynth.training.examples import encode_slots


def own_data(
    tmp_path: Path, *, generator: int, task_model: int, use: str = "fedsynth.strategies.fdkt:FDKT"
) -> Scenario:
    """Texts of 100 bytes, one token each, of three labels; a row in six has one that is not listed."""
    rows = [f"{i:02} {'x' * 97},{'abc'[i % 3] if i % 6 else 'z'}" for i in range(60)]
    (tmp_path / "own.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    asked = from_toml(
        f'name = "own"\n[strategy]\nuse = "{use}"\n[data]\nsource = "{tmp_path / "own.csv"}"\nclients = 1\n'
        f'labels = ["a", "b", "c", "d"]\n[client]\ngenerator = "{tiny.folder()}"\ntask_model = "{tiny.folder()}"\n'
        f'guarantee = "none"\n[server]\nllm = "{tiny.folder()}"\nembedder = "{tiny.folder()}"\n'
    )
    client = replace(
        asked.client,
        generator_training=replace(asked.client.generator_training, max_length=generator),
        task_training=replace(asked.client.task_training, max_length=task_model),
    )
    return replace(asked, client=client)


def test_what_is_cut_is_counted_token_by_token(tmp_path: Path) -> None:
    asked = own_data(tmp_path, generator=64, task_model=51)
    [generator, task_model] = cuts_of(cells(asked)[0])
    listed = sum(answer in "abcd" for answer in open_site(asked.data, 0, 0).train.answers)
    # A blank, 100 bytes and the end after BOS and "label: a\ntext:" (or what the code is): 64 less these are read.
    [code] = {len(tiny.tokenizer()(asked.task.code(label))["input_ids"]) for label in "abcd"}
    read = 64 - 1 - code
    assert (generator.part, generator.texts, generator.cut) == ("generator", listed, listed)
    assert generator.tokens == 102 * listed
    assert generator.lost == (102 - read) * listed
    # The task model reads BOS and 100 bytes of every row, of an unlisted label, too.
    assert (task_model.texts, task_model.cut) == (48, 48)
    assert (task_model.tokens, task_model.lost) == (101 * 48, 50 * 48)
    assert task_model.share == pytest.approx(50 / 101)
    lines = [line for line in check(asked) if "never reads" in line]
    assert lines[1] == (
        "48 of 48 private texts are longer than client.task_training.max_length = 51 tokens (seed 0): the task model "
        "never reads 50% of their tokens"
    )
    assert cuts_of(cells(own_data(tmp_path, generator=128, task_model=101))[0]) == []
    local = own_data(tmp_path, generator=64, task_model=51, use="fedsynth.strategies.local:LocalOnly")
    assert [cut.part for cut in cuts_of(cells(local)[0])] == ["task model"]  # no generator learns there


@pytest.mark.parametrize("public", [False, True])
def test_counts_of_private_rows_lie_beside_the_data_cards_and_not_in_the_directory_to_share(
    public: bool,
    tmp_path: Path,
) -> None:
    asked = own_data(tmp_path, generator=64, task_model=51)
    out = tmp_path / "run"
    prepare(replace(asked, data=replace(asked.data, public=public)), out)
    assert (out / COUNTS).is_file() is public
    assert (private_of(out) / COUNTS).is_file() is not public
    shared = "".join(path.read_text() for path in out.iterdir() if path.suffix == ".json")
    assert ('"unlisted": 10' in shared) is public
    assert list(map(str, reasons_in(read_facts(out)))) == (list(map(str, reasons_in(row_counts(asked)))) * public)
    assert len(list(reasons_in(read_counts(private_of(out))))) == 4 * (not public)


def test_whole_sentences_lose_what_follows_them() -> None:
    labelled = Corpus(("Ab c. De f? Gh.",), ("xyz",), Provenance.PRIVATE)
    settings = GeneratorTraining(max_length=20, cut="sentences")
    [[example]] = encode_slots(tiny.tokenizer(), labelled, ["xyz"], 1, settings)
    assert (example.cut, example.lost) == (False, len(" Gh."))
    [[whole]] = encode_slots(tiny.tokenizer(), labelled, ["xyz"], 1, replace(settings, max_length=40))
    assert (whole.cut, whole.lost) == (False, 0)


def test_rows_and_labels_are_counted_and_become_reasons(tmp_path: Path) -> None:
    asked = own_data(tmp_path, generator=64, task_model=51)
    facts = json.loads(json.dumps(data_facts(asked) | row_counts(asked)))  # as they lie in a run's directories
    [labels] = facts["labels"]
    assert {name: labels[name] for name in ("rows", "unlisted", "clients", "lacking", "most")} == {
        "rows": 60,
        "unlisted": 10,
        "clients": 1,
        "lacking": 1,
        "most": 1,  # d
    }
    said = list(map(str, reasons_in(facts)))
    assert said == [
        "client.task_training.max_length = 51 cuts 48 of 48 private texts, and the task model never reads 50 % of "
        "their tokens",
        *[line for line in said if "generator" in line],
        "10 of 60 rows have a label that data.labels lacks",
        "1 of 1 clients have no private text of some label (one lacks 1)",
    ]
    assert len(said) == 4
    [lines] = [each["clients"] for each in facts["lines"]]
    answers = open_site(asked.data, 0, 0).test.answers
    assert lines[0]["majority/accuracy"] == max(map(answers.count, "abcd")) / len(answers)
