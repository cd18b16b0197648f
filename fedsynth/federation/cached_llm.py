"""The server's LLM with a cache for the round in progress and a count of its tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from fedsynth.federation.run.log import SERVER, RunLog
from fedsynth.federation.run.times import LLM_SECONDS
from fedsynth.models.chat import Prompt
from fedsynth.models.llm import TextModel
from fedsynth.models.room import misfits
from fedsynth.models.sampling import SamplingParams

V = TypeVar("V")


class CachedLLM:
    """A `TextModel` that asks another one; a resumed run takes stored replies and does not ask again.

    Args:
        llm: The model to ask.
        name: The model's name within the cell; part of the key of a stored reply.
        run_log: Stores the replies, and counts the tokens read and written if the model reports them.
        memory: Replies to all cells of this process, by question; arms ask the same of it once. None to ask again.
    """

    def __init__(self, llm: TextModel, name: str, run_log: RunLog, memory: dict[str, Any] | None = None) -> None:
        self.llm, self.name, self.run_log, self.memory = llm, name, run_log, memory

    @property
    def chats(self) -> bool:
        """As the model that is asked."""
        return self.llm.chats

    @property
    def structured(self) -> bool:
        """As the model that is asked."""
        return self.llm.structured

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int) -> list[str]:
        """As `TextModel`."""
        how = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.one_line:  # else as before there was the choice: what a run has kept is known again
            how["one_line"] = True
        if sampling.top_k:
            how["top_k"] = sampling.top_k
        question = ["complete", list(map(_plain, prompts)), {**how, "seed": seed}]
        return self._recalled(question, lambda: self.llm.complete(prompts, sampling, seed=seed))

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        """As `TextModel`."""
        question = ["score", list(map(_plain, prompts)), list(continuations)]
        return self._recalled(question, lambda: self.llm.score(prompts, continuations))

    def misfits(
        self, prompts: Sequence[Prompt], more: int = 0, continuations: Sequence[str] | None = None
    ) -> list[str | None]:
        """As the model itself says; nothing is stored."""
        return misfits(self.llm, prompts, more, continuations)

    def _recalled(self, question: list[Any], ask: Callable[[], list[V]]) -> list[V]:
        def counted() -> list[Any]:
            before, begun = self._used(), time.monotonic()
            reply = ask()
            self.run_log.count(LLM_SECONDS, SERVER, time.monotonic() - begun)
            return [reply, [now - then for now, then in zip(self._used(), before, strict=True)]]

        def remembered() -> list[Any]:
            if self.memory is None:
                return counted()
            asked = json.dumps(question, sort_keys=True)
            if asked not in self.memory:
                self.memory[asked] = counted()
            kept: list[Any] = self.memory[asked]
            return kept

        reply, (read, written) = self.run_log.checkpoint.recalled([self.name, *question], remembered)
        for kind, tokens in (("read", read), ("written", written)):
            if tokens:
                self.run_log.count(f"llm/tokens_{kind}", SERVER, tokens)
        found: list[V] = reply
        return found

    def _used(self) -> tuple[int, int]:
        used = getattr(self.llm, "used", None)
        return (used.read, used.written) if used is not None else (0, 0)


def _plain(prompt: Prompt) -> Any:
    """The prompt as JSON; a chat without earlier turns or a schema has the form that kept answers were stored under."""
    if isinstance(prompt, str):
        return prompt
    return {name: value for name, value in asdict(prompt).items() if name not in ("shown", "schema") or value}
