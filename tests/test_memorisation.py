"""The benchmark of memorisation: what it plants, what it counts, and how a model with a known memory looks to it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from scipy.stats import norm

from fedsynth.clients.finetune import slots_of
from fedsynth.corpus import Corpus, Provenance
from fedsynth.evaluation.attack import auroc
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.testing import ScriptedLLM
from tests.benchmarks import benchmark

M = benchmark("memorisation")
SIZE = M.Size(members=12, canaries=1, controls=2, alternatives=7)
THINGS = ("card", "loan", "rate", "fee", "pin")
SCENARIO = """
name = "tiny"
seeds = [0]
[strategy]
use = "{strategy}"
{options}
[data]
source = "{file}"
clients = 1
[client]
generator = "{model}"
task_model = "{model}"
guarantee = "{guarantee}"
budget = {{ epsilon = {epsilon} }}
[client.voting]
rows_per_unit = 16
[client.generator_training]
expected_batch_size = 15
steps = {steps}
learning_rate = 1e-2
rank = 8
max_length = 64
rows_per_unit = 16
[server]
llm = "scripted"
"""
FDKT = ("fedsynth.strategies.fdkt:FDKT", 'per_label = 2\njudge = "none"\ndraft_tokens = 8')
EVOLUTION = ("fedsynth.strategies.private_evolution:PrivateEvolution", "keep = 2")


def rows(count: int = 40) -> Corpus:
    texts = tuple(f"my {THINGS[i % 5]} no {i}" for i in range(count))
    return Corpus(texts, tuple("ab"[i % 2] for i in range(count)), Provenance.PRIVATE)


def cell(place: Path, method: tuple[str, str], *, guarantee: str = "none", steps: int = 2, epsilon: float = 8) -> Cell:
    own = rows()
    pd.DataFrame({"text": own.prompts, "label": own.answers}).to_csv(place / "rows.csv", index=False)
    strategy, options = method
    text = SCENARIO.format(
        strategy=strategy,
        options=options,
        file=place / "rows.csv",
        model=tiny.folder(),
        guarantee=guarantee,
        steps=steps,
        epsilon=epsilon,
    )
    return cells(from_toml(text))[0]


def client(place: Path, planted: Any, method: tuple[str, str] = FDKT, **more: Any) -> tuple[Cell, Any]:
    found = cell(place, method, **more)
    return found, M.client_with(found, planted, place / "work")


@pytest.fixture
def planted() -> Any:
    return M.plant(rows(), SIZE, seed=0)


# --- Planting ---------------------------------------------------------------------------------------------------------


def test_a_repeated_canary_is_one_unit_and_a_control_is_in_no_row(planted: Any) -> None:
    assert [c.repeats for c in planted.canaries] == [1, 4, 16, 0, 0]
    held = [sum(f"{c.prefix} {c.suffix}" == text for text in planted.train.prompts) for c in planted.canaries]
    assert held == [1, 4, 16, 0, 0]
    units = planted.train.units
    assert len(planted.train) == 12 + 1 + 4 + 16
    assert len(set(units)) == 12 + 3
    for canary in planted.canaries[:3]:
        own = {u for u, t in zip(units, planted.train.prompts, strict=True) if canary.suffix in t}
        assert len(own) == 1


def test_members_others_and_prefixes_are_different_rows_and_the_rare_words_are_in_none(planted: Any) -> None:
    parts = [set(planted.members.prompts), set(planted.others.prompts), {c.prefix for c in planted.canaries}]
    assert [len(part) for part in parts] == [12, 12, 5]
    assert len(set.union(*parts)) == 29
    held = Corpus((*rows().prompts[:-1], "an ibex"), rows().answers, Provenance.PRIVATE)
    assert "ibex" in planted.space
    assert "ibex" not in M.plant(held, SIZE, seed=0).space


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="24 rows and 5 short ones"):
        M.plant(rows(28), SIZE, seed=0)


def test_the_unit_of_a_canary_is_one_slot_with_all_of_its_rows(planted: Any, tmp_path: Path) -> None:
    _, own = client(tmp_path, planted)
    assert own.records == 15
    assert [len(slot) for slot in slots_of(own, own.train, own.records)] == [1] * 12 + [1, 4, 16]
    # Broken: rows as units of their own, so that epsilon would cover one of the sixteen.
    rows_alone = replace(planted, train=replace(planted.train, units=None))
    apart = M.client_with(cell(tmp_path, FDKT), rows_alone, tmp_path / "apart")
    assert [len(slot) for slot in slots_of(apart, apart.train, apart.records)] == [1] * 33


def test_a_canary_that_is_cut_off_is_refused(planted: Any, tmp_path: Path) -> None:
    _, own = client(tmp_path, planted)
    M.check_learnt(own, planted.canaries)
    long = [replace(planted.canaries[0], prefix="word " * 16)]
    with pytest.raises(ValueError, match="do not fit into a training example"):
        M.check_learnt(own, long)


# --- Exposure, extraction, texts --------------------------------------------------------------------------------------


class Knows(ScriptedLLM):
    """A model that prefers the suffixes of some canaries to all others, and writes them."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.known = {c.prefix: c.suffix for c in known}

    def score(self, prompts: Any, continuations: Any) -> list[float]:
        return [
            0.0 if self.known.get(prompt.partition(" ")[2]) == text.strip() else -1.0 - (hash(text) % 1000) / 1000
            for prompt, text in zip(prompts, continuations, strict=True)
        ]

    def complete(self, prompts: Any, sampling: Any, *, seed: int) -> list[str]:
        return [f" {self.known.get(prompt.partition(' ')[2], 'nothing')}" for prompt in prompts]


def test_exposure_and_extraction_of_what_a_model_knows_by_hand(planted: Any, tmp_path: Path) -> None:
    _, own = client(tmp_path, planted)
    model = Knows(planted.canaries[1:3])
    bits = M.exposures(own, model, planted, SIZE, seed=1)
    assert bits[1:3] == [3.0, 3.0]  # first of eight candidates
    greedy, sampled = M.extracted(own, model, planted)
    assert greedy == sampled == [False, True, True, False, False]


def test_a_suffix_and_its_rivals_come_from_one_draw() -> None:
    # The rank of a suffix is uniform for any fixed preference of the model: mean exposure of 8 candidates by hand is
    # 3 - mean(log2(1..8)) = 3 - log2(8!) / 8.
    size, rng = replace(SIZE, alternatives=7), np.random.default_rng(0)
    space = M.RARE[:30]
    worth = {word: rng.normal() for word in space}
    bits = []
    for _ in range(1500):
        [own] = M.suffixes(space, 1, rng)
        rivals = M.suffixes(space, size.alternatives, rng, but=own)
        scores = [sum(worth[word] * (k + 1) for k, word in enumerate(pair.split())) for pair in (own, *rivals)]
        bits.append(M.exposure(scores[0], scores[1:]))
    expected = 3 - math.log2(math.factorial(8)) / 8
    assert np.mean(bits) == pytest.approx(expected, abs=4 * np.std(bits) / math.sqrt(len(bits)))
    # Broken: rivals of other words than the planted ones, which a model has learnt as words.
    likes = [M.exposure(1.0, [0.0] * 7) for _ in bits]
    assert np.mean(likes) > expected + 1


def test_what_texts_tell_by_hand(planted: Any) -> None:
    one, other = planted.canaries[1], planted.canaries[2]
    member, stranger = planted.members.prompts[0], planted.others.prompts[0]
    texts = [
        member.upper(),
        f"{member} please",
        stranger,
        f"oh {one.suffix}",
        f"{other.suffix.split()[0]} alone",
        "none",
    ]
    seen = M.Seen("case")
    M.look_at_texts(seen, texts, planted, M.prompts_of)
    assert (seen.texts, seen.echoes, seen.rare) == (6, [0, 1, 0, 0, 0], 2)
    own, beside = seen.near
    assert own[:2] == [1.0, pytest.approx(8 / 9)]  # the row has four words, and "please" is a fifth
    assert beside[2] == 1.0
    # "my card no 3" and "my card no 8" have three of four words in common: a common phrase, near to rows on both sides.
    assert own[2] == beside[0] == 3 / 4
    assert own[3] == own[5] == 0.0
    assert seen.closest[0][0] == seen.closest[1][0] == 1.0


# --- Whole cases, with the client's own code --------------------------------------------------------------------------


def test_without_noise_a_canary_of_sixteen_rows_is_learnt_and_the_stated_guarantee_is_none(
    planted: Any, tmp_path: Path
) -> None:
    settings, own = client(tmp_path, planted, steps=60)
    seen = M.Seen("case", repeats=[c.repeats for c in planted.canaries])
    M.fdkt(settings, own, planted, SIZE, seen)
    blank = M.Seen("blank", repeats=seen.repeats)
    M.base(settings, own, planted, SIZE, blank)
    assert (seen.guarantee, seen.epsilon, seen.steps) == ("none", None, 60)
    assert seen.exposures[2] == 3.0
    plain, less = (auroc(*M._members(seen, reference)) for reference in (None, blank))
    assert max(plain, less) > 0.8
    assert np.mean(seen.members) > np.mean(blank.members) + 0.5  # nats per token
    assert len(seen.closest[0]) == len(seen.members) == 12


def test_a_case_under_a_guarantee_states_the_epsilon_of_the_whole_unit(planted: Any, tmp_path: Path) -> None:
    settings, own = client(tmp_path, planted, guarantee="dp", steps=3, epsilon=2)
    seen = M.Seen("case", repeats=[c.repeats for c in planted.canaries])
    M.fdkt(settings, own, planted, SIZE, seen)
    assert seen.guarantee == "dp"
    assert seen.epsilon is not None
    assert 1.9 < seen.epsilon <= 2
    assert seen.steps == 3
    assert own.plan().records == 15  # units, not rows


def test_votes_give_away_members_to_who_knows_the_others_unless_there_is_noise(planted: Any, tmp_path: Path) -> None:
    offered = Corpus(
        tuple(f"my {thing} of {label}" for thing in THINGS for label in "ab"),
        tuple(label for _ in THINGS for label in "ab"),
        Provenance.PUBLIC,
    )
    found = {}
    for guarantee in ("none", "dp"):
        place = tmp_path / guarantee
        place.mkdir()
        settings, own = client(place, planted, EVOLUTION, guarantee=guarantee, epsilon=1)
        seen = M.Seen("case", repeats=[c.repeats for c in planted.canaries])
        M.evolution(settings, own, planted, SIZE, seen, lambda _: offered)
        assert set(seen.echoes) == {0}
        assert seen.rare == 0
        found[guarantee] = seen, own
    bare, known = found["none"][0], found["none"][0].known
    assert known == ([1.0] * 12, [0.0] * 12)  # the count less the others' votes is the own vote
    assert auroc(*known) == 1.0
    noisy, own = found["dp"]
    sigma = own.config.vote_plan(own.records, 1).noise_multiplier
    assert sigma > 2
    members, others = map(np.asarray, noisy.known)
    assert abs(members.mean() - others.mean()) < 1 + 3 * sigma  # one vote, in noise of ten cells
    assert norm.cdf(1 / (sigma * math.sqrt(2))) < 0.65
    assert len(bare.members) == len(bare.others) == 12


# --- The table --------------------------------------------------------------------------------------------------------


def test_the_table_takes_the_base_of_its_own_data_as_reference(tmp_path: Path) -> None:
    # By loss alone the two rows of each kind are told apart by chance; less the base's, all are.
    blank = M.Seen("bank-base", repeats=[0, 1, 4, 16], exposures=[1.0] * 4, greedy=[False] * 4, sampled=[False] * 4)
    blank.members, blank.others, blank.echoes = [-1.0, -3.0], [-1.0, -3.0], [0] * 4
    blank.closest = [0.5, 0.5], [0.5, 0.5]
    learnt = replace(blank, case="bank-fdkt", members=[-0.5, -2.5], exposures=[1.0, 2.0, 3.0, 5.0], epsilon=8.0)
    learnt.greedy, learnt.echoes = [False, False, False, True], [0, 0, 0, 7]
    place = tmp_path / "case.json"
    place.write_text(json.dumps(M.asdict(learnt)))
    table = M.told([blank, M.saved(place)])
    line = next(row for row in table if row.startswith("| bank-fdkt | 8.00 | 0 |"))
    assert "1.00 / 2.00 / 3.00 / 5.00" in line
    assert "0 (0) / 0 (0) / 1 (0)" in line
    assert "0.750 [" in line  # -0.5 > both, -2.5 > one of two: 3 of 4
    assert "1.000 [1.000, 1.000]" in line
    assert next(row for row in table if row.startswith("| bank-base | - | 0 |")).endswith("| - | - |")  # saw no row
    echo = [row for row in table if row.startswith("| bank-fdkt")][1]
    assert "0 / 0 / 7" in echo


def test_every_case_is_a_setting_of_a_shipped_scenario_and_those_with_a_guarantee_have_its_epsilon() -> None:
    found = {case.name: case for case in M.cases(10)}
    assert len(found) == 13
    for name, case in found.items():
        text = " ".join(case.sets)
        assert ("epsilon=8" in text) == name.endswith("-8")
        assert ("epsilon=2" in text) == name.endswith("-2")
        assert "rows_per_unit=16" in text
    assert "steps=108" in " ".join(found["bank-fdkt-by-heart"].sets)  # 10 passes of 172 units, 16 a step: 107.5
