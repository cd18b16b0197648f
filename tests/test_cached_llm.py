"""The server's LLM is asked a question once: within a round that goes on, and by the arms of one process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fedsynth.federation.cached_llm import CachedLLM
from fedsynth.models.sampling import SamplingParams
from fedsynth.models.usage import TokenUsage
from fedsynth.testing import ScriptedLLM


class Counting(ScriptedLLM):
    """Reports tokens as a real model does: a character each."""

    used = TokenUsage()

    def complete(self, prompts: Any, sampling: SamplingParams, *, seed: int) -> list[str]:
        self.used.read += sum(map(len, prompts))
        return super().complete(prompts, sampling, seed=seed)


def log() -> Any:
    counted: dict[str, float] = {}

    def count(name: str, client: int, amount: float) -> None:
        counted[name] = counted.get(name, 0) + amount

    def recalled(question: Any, ask: Callable[[], Any]) -> Any:
        return ask()

    return SimpleNamespace(count=count, counted=counted, checkpoint=SimpleNamespace(recalled=recalled))


def test_two_arms_ask_a_model_of_this_process_once_and_count_its_tokens_both() -> None:
    llm, memory, first, second = Counting(), dict[str, Any](), log(), log()
    llm.used = TokenUsage()
    how = SamplingParams.greedy(4)
    replies = [
        CachedLLM(llm, "llm", run_log, memory).complete(["abc", "de"], how, seed=1) for run_log in (first, second)
    ]
    assert replies[0] == replies[1] == [" a text", " a text"]
    assert len(llm.completed) == 1
    seconds = first.counted.pop("seconds/llm")
    assert 0 < seconds < 60
    assert first.counted == second.counted == {"llm/tokens_read": 5}  # the second arm waited for nothing
    CachedLLM(llm, "llm", second, memory).complete(["abc", "de"], how, seed=2)  # another seed is another question
    CachedLLM(llm, "llm", second, memory).score(["abc"], ["de"])
    assert (len(llm.completed), llm.scored) == (2, [1])


def test_without_a_memory_each_arm_asks() -> None:
    llm = Counting()
    for _ in range(2):
        CachedLLM(llm, "llm", log()).complete(["abc"], SamplingParams.greedy(4), seed=1)
    assert len(llm.completed) == 2
