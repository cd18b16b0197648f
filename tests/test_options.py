"""What methods refuse, and what they warn of, before any work is spent."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tomli_w
from inprocess import instructions

from fedsynth.federation.strategy import load_strategy
from fedsynth.models.sampling import SamplingParams
from fedsynth.privacy.plan import Budget
from fedsynth.scenario.client import TaskTraining
from fedsynth.scenario.earlier_keys import OldName, as_of_now
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, from_toml, to_toml
from fedsynth.simulation.simulate import check, server_warnings
from fedsynth.strategies.options import FDKTOptions, few_texts
from fedsynth.typed import BadValue

CHAT = '{ endpoint = "http://127.0.0.1:9/v1", model = "large", api = "chat" }'
PLAIN = CHAT.replace('"chat"', '"completions"')
FDKT, CROSS_LM = "fdkt:FDKT", "cross_lm:CrossLM"


def scenario(method: str, options: str, llm: str, labels: str = '"all"') -> Scenario:
    made = from_toml(
        f'name = "own"\n[strategy]\nuse = "fedsynth.strategies.{method}"\n{options}\n[data]\nlabels = {labels}\n'
        'source = "world:hospitals"\nclients = 1\ntrain_per_client = 8\ntest_per_client = 8\n[client]\n'
        f'generator = "{tiny.folder()}"\ntask_model = "{tiny.folder()}"\nguarantee = "none"\n[server]\nllm = {llm}\n'
        f'embedder = "{tiny.folder()}"\n'
    )
    return cells(made)[0].scenario


def refusal(method: str, options: str, llm: str) -> str:
    with pytest.raises(BadValue) as caught:
        check(scenario(method, options, llm))
    return str(caught.value)


def test_the_old_name_of_an_option_works_with_a_warning_and_not_beside_the_new_one() -> None:
    with pytest.warns(OldName) as warned:
        asked = scenario(FDKT, "pooled = true\nwritten = 100\nmax_tokens = 9", f'"{tiny.folder()}"')
    assert load_strategy(asked.strategy)[1] == FDKTOptions(one_to_many=True, num_texts=100, max_new_tokens=9)
    assert [str(each.message) for each in warned] == [
        f"strategy.{old} is called strategy.{new} now; the next version refuses the old name"
        for old, new in (("max_tokens", "max_new_tokens"), ("pooled", "one_to_many"), ("written", "num_texts"))
    ]
    with pytest.raises(
        BadValue, match=r"strategy\.pooled is the old name of strategy\.one_to_many: give the new one alone"
    ):
        scenario(FDKT, "pooled = true\none_to_many = true", PLAIN)


def test_an_option_of_somebody_elses_method_keeps_its_name() -> None:
    found = as_of_now({"strategy": {"use": "mine:Mine", "written": 3, "max_tokens": 4}})
    assert found == {"strategy": {"use": "mine:Mine", "written": 3, "max_tokens": 4}}


def test_arms_take_old_names_of_the_method_that_the_scenario_names() -> None:
    made = to_toml(scenario(FDKT, "one_to_many = true", f'"{tiny.folder()}"'))
    old = f"{made}\n[arms.few.strategy]\nwritten = 5\n[arms.few.client.task_training]\nmax_tokens = 7\n"
    with pytest.warns(OldName):
        [cell] = cells(from_toml(old))
    assert load_strategy(cell.scenario.strategy)[1] == FDKTOptions(one_to_many=True, num_texts=5)
    assert cell.scenario.client.task_training.max_length == 7


# Every key that has another name: what stands under the old one is found under the new one.
@pytest.mark.parametrize(
    ("table", "key", "new", "value"),
    [
        ("client.generator_training", "expected_batch", "expected_batch_size", 7),
        ("client.generator_training", "microbatch", "max_physical_batch_size", 9),
        ("client.generator_training", "learns", "loss_on", "response"),
        ("client.generator_training", "max_tokens", "max_length", 11),
        ("client.scorer_training", "max_tokens", "max_length", 12),
        ("client.task_training", "max_tokens", "max_length", 13),
        ("server", "answer_seconds", "timeout", 5.0),
    ],
)
def test_an_old_key_is_read_and_written_anew(table: str, key: str, new: str, value: Any) -> None:
    tree: dict[str, Any] = tomllib.loads(to_toml(scenario(FDKT, "", f'"{tiny.folder()}"')))
    place = tree
    for name in table.split("."):
        place = place[name]
    del place[new]
    place[key] = value
    with pytest.warns(OldName, match=rf"{table}\.{key} is called {table}\.{new} now"):
        found: Any = from_toml(tomli_w.dumps(tree))
    for name in (*table.split("."), new):
        found = getattr(found, name)
    assert found == value
    place[new] = value
    with pytest.raises(BadValue, match=rf"{table}\.{key} is the old name of {table}\.{new}"):
        from_toml(tomli_w.dumps(tree))


def test_cross_lm_takes_the_mean_of_scores_and_nothing_else() -> None:
    assert "unknown key 'aggregation' in [strategy]" in refusal(CROSS_LM, 'aggregation = "max"', PLAIN)


@pytest.mark.parametrize(
    ("method", "options", "way_out"),
    [
        (FDKT, "", 'scores no text: say strategy.judge = "instruction"'),
        (FDKT, 'demonstrations = "all_labels"', 'scores no text: say strategy.judge = "instruction"'),
        (FDKT, "drafts_from = [0, 1]", "strategy.drafts_from names clients from 0 to 0, got [0, 1]"),
        (CROSS_LM, "", 'say strategy.teaching.update = "none"'),
    ],
)
def test_what_an_endpoint_or_a_run_cannot_do_is_refused_with_the_way_out(
    method: str, options: str, way_out: str
) -> None:
    assert way_out in refusal(method, options, CHAT)


@pytest.mark.parametrize(
    ("method", "options", "llm"),
    [
        (FDKT, 'demonstrations = "all_labels"\njudge = "instruction"', CHAT),
        (FDKT, 'demonstrations = "all_labels"\njudge = "none"', CHAT),
        (FDKT, 'judge = "instruction"', CHAT),
        (FDKT, 'demonstrations = "none"', CHAT),  # nothing is judged
        (FDKT, 'texts = "drafts"', CHAT),  # no LLM takes part
        (CROSS_LM, 'feedback = "none"', CHAT),
        (CROSS_LM, 'teaching.update = "none"', CHAT),
        (FDKT, "", PLAIN),
        (CROSS_LM, 'feedback = "none"', PLAIN),
    ],
)
def test_what_an_endpoint_can_do_is_taken(method: str, options: str, llm: str) -> None:
    resolved = scenario(method, options, llm)
    kind, config = load_strategy(resolved.strategy)
    kind.check(config, resolved)


LOCAL, NAMES = "local:LocalOnly", "label_names:LabelNames"


# A method, its options, settings of the task model, and a part of what is said; None: it can run.
@pytest.mark.parametrize(
    ("method", "options", "task", "said"),
    [
        (LOCAL, "", {"schedule": "synthetic_only"}, "leaves nothing to learn from: LocalOnly asks clients to learn"),
        (CROSS_LM, "", {"schedule": "synthetic_only"}, "leaves nothing to learn from: CrossLM"),
        (CROSS_LM, 'feedback = "none"', {"schedule": "synthetic_only"}, None),
        (FDKT, "", {"schedule": "synthetic_only"}, None),
        (NAMES, "", {"schedule": "synthetic_only"}, None),
        (LOCAL, "", {"schedule": "mixed"}, None),
        (LOCAL, "", {"trains": "majority", "schedule": "synthetic_only"}, None),
        (LOCAL, "", {"trains": "few_shot"}, None),
        (LOCAL, "", {"trains": "zero_shot"}, None),
        (NAMES, "", {"trains": "zero_shot"}, 'trains = "zero_shot" learns from no text that is sent'),
        (FDKT, "", {"trains": "majority"}, 'say strategy.use = "fedsynth.strategies.local:LocalOnly"'),
        (CROSS_LM, "", {"trains": "few_shot"}, "clients score texts by how sure they are"),
        (CROSS_LM, 'feedback = "none"', {"trains": "few_shot"}, "learns from no text that is sent"),
    ],
)
def test_what_leaves_nothing_to_learn_from_is_refused(
    method: str, options: str, task: dict[str, Any], said: str | None
) -> None:
    resolved = scenario(method, options, f'"{tiny.folder()}"')
    resolved = replace(resolved, client=replace(resolved.client, task_training=TaskTraining(**task)))
    kind, config = load_strategy(resolved.strategy)
    if said is None:
        kind.check(config, resolved)
        return
    with pytest.raises(BadValue, match=re.escape(said)):
        kind.check(config, resolved)


def test_a_baseline_is_refused_where_there_are_no_labels(tmp_path: Path) -> None:
    made = from_toml(instructions(tmp_path, "fedsynth.strategies.local:LocalOnly", guarantee="none"))
    for trains in ("majority", "few_shot", "zero_shot"):
        with pytest.raises(BadValue, match=f'trains = "{trains}" tells labels, and instructions have none'):
            replace(made, client=replace(made.client, task_training=TaskTraining(trains=trains)))


TRUE = 'drafts = "true_texts"\ndemonstrations = "all_labels"\njudge = "none"\n'


@pytest.mark.parametrize(
    ("options", "llm", "guarantee", "said"),
    [
        (TRUE, CHAT, "none", None),
        (TRUE, CHAT, "dp", 'say client.guarantee = "none"'),
        (TRUE + 'texts = "drafts"', CHAT, "none", "are demonstrations of the LLM"),
        (TRUE.replace('"all_labels"', '"none"'), PLAIN, "none", "are demonstrations of the LLM"),
    ],
)
def test_true_texts_are_demonstrations_and_are_never_called_private(
    options: str, llm: str, guarantee: Any, said: str | None
) -> None:
    resolved = scenario(FDKT, options, llm)
    resolved = replace(resolved, client=replace(resolved.client, guarantee=guarantee, budget=Budget(8.0)))
    kind, config = load_strategy(resolved.strategy)
    assert kind.only_simulated(config)
    if said is None:
        kind.check(config, resolved)
        return
    with pytest.raises(BadValue, match=re.escape(said)):
        kind.check(config, resolved)


def test_labels_beyond_the_texts_that_are_written_are_named() -> None:
    labels = [f"class {i}" for i in range(10)]
    assert few_texts(10, labels) == []
    [said] = few_texts(8, labels)
    assert said == (
        "strategy.num_texts = 8 is less than the 10 labels: the LLM writes no text of 2 of them ('class 8', "
        "'class 9'); ask for 10 at least"
    )
    assert "('class 1', 'class 2', 'class 3', 'class 4', 'class 5', ...)" in few_texts(1, labels)[0]


@pytest.mark.parametrize(
    ("method", "options", "warned"),
    [
        (FDKT, "num_texts = 3", True),
        (FDKT, 'num_texts = 3\ndemonstrations = "none"\ntexts = "drafts"', True),
        (FDKT, 'num_texts = 3\ntexts = "drafts"', False),
        (FDKT, "num_texts = 100", False),
        (CROSS_LM, 'num_texts = 3\nfeedback = "none"', True),
    ],
)
def test_the_check_tells_of_labels_without_text(method: str, options: str, warned: bool) -> None:
    asked = scenario(method, options, f'"{tiny.folder()}"')
    assert ["strategy.num_texts = 3" in line for line in server_warnings(cells(asked)[0])] == [True] * warned
    assert any("strategy.num_texts = 3" in line for line in check(asked)) == warned


def test_the_check_tells_how_many_private_texts_are_cut(tmp_path: Path) -> None:
    toml = instructions(tmp_path, "fedsynth.strategies.lora_avg:LoraAverage", rows=6, clients=1, model=tiny.folder())
    asked = from_toml(toml.replace('"scripted"', f'"{tiny.folder()}"'))
    own = asked.client.generator_training
    assert [line for line in check(asked) if "are cut" in line] == []
    short = replace(asked, client=replace(asked.client, generator_training=replace(own, max_length=40)))
    [said] = [line for line in check(short) if "are cut" in line]
    assert re.match(r"(\d) of \1 private texts are longer than .*max_length = 40 tokens \(seed 0\)", said)
    by_label = scenario(FDKT, "", f'"{tiny.folder()}"')  # 16 bytes are shorter than any note
    tight = replace(by_label.client.generator_training, max_length=24)
    found = check(replace(by_label, client=replace(by_label.client, generator_training=tight)))
    assert any("are cut, and teach no end of text" in line for line in found)


def test_the_labels_that_are_named_are_those_that_nothing_is_asked_of() -> None:
    from fedsynth.corpus import Corpus, Provenance
    from fedsynth.synthesis.augmentation import Demonstrating, augment, turns
    from fedsynth.testing import ScriptedLLM

    labels, mode = ("a", "b", "c", "d"), FDKTOptions().demonstrations
    how = Demonstrating(mode, 1, SamplingParams(temperature=1.0, max_new_tokens=8))
    nothing = {0: Corpus((), (), Provenance.PUBLIC)}
    written = augment(ScriptedLLM(), nothing, how, labels=labels, wanted={0: turns(labels, 3)}, seed=0)[0]
    assert set(labels) - set(written.corpus.answers) == {"d"}
    assert "('d')" in few_texts(3, labels)[0]
