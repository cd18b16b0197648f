"""The papers' values as one word; keys beside it win, and what a scenario says stays what it says."""

from __future__ import annotations

import pytest

from fedsynth.federation.strategy import load_strategy
from fedsynth.scenario.schema import StrategyChoice
from fedsynth.strategies.options import FDKTOptions, KnowledgeSGOptions
from fedsynth.typed import BadValue

FDKT = "fedsynth.strategies.fdkt:FDKT"


def options(use: str, **given: object) -> object:
    return load_strategy(StrategyChoice(use, given))[1]


def test_the_papers_fdkt_keeps_all_that_an_instructed_judge_selects_and_has_room_for_all_labels() -> None:
    found = options(FDKT, preset="paper")
    assert isinstance(found, FDKTOptions)
    assert (found.judge, found.keep, found.cluster_size, found.demonstrations) == ("instruction", 4, 4, "all_labels")
    assert (found.draft_temperature, found.draft_top_p, found.draft_tokens) == (1.0, 0.9, 256)
    assert found.judge_tokens == 1024 > FDKTOptions().judge_tokens
    assert (found.draft_top_k, found.top_k) == (50, 0)  # the generator's; none is told of the LLM
    assert (found.temperature, found.top_p, found.max_new_tokens) == (0.8, 0.9, 4096)
    assert found.num_texts == FDKTOptions().num_texts  # left open


def test_a_key_beside_a_preset_wins() -> None:
    found = options(FDKT, preset="paper", keep=1, temperature=0.5)
    assert found == options(FDKT, **{"temperature": 0.5, "keep": 1, "preset": "paper"})
    assert isinstance(found, FDKTOptions)
    assert (found.keep, found.temperature, found.judge) == (1, 0.5, "instruction")


def test_without_a_preset_nothing_changes() -> None:
    assert options(FDKT) == FDKTOptions()
    knowledge = options("fedsynth.strategies.knowledge_sg:KnowledgeSG", preset="paper")
    assert isinstance(knowledge, KnowledgeSGOptions)
    assert (knowledge.judge, knowledge.max_new_tokens, knowledge.response_tokens) == ("instruction", 2048, 2048)


def test_the_defaults_of_fedpit_are_its_papers() -> None:
    use = "fedsynth.strategies.fedpit:FedPIT"
    assert options(use, preset="paper") == options(use)


@pytest.mark.parametrize(
    ("use", "preset", "said"),
    [
        (FDKT, "papers", "FDKT has no preset 'papers'; known: 'paper'"),
        (
            "fedsynth.strategies.cross_lm:CrossLM",
            "paper",
            "CrossLM has no preset 'paper'; known: none",
        ),  # reconstructed
    ],
)
def test_an_unknown_preset_is_refused_by_name(use: str, preset: str, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        options(use, preset=preset)
