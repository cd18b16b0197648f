"""An LLM whose answers and scores the test writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsynth.models.chat import Chat, Prompt
from fedsynth.models.sampling import SamplingParams


@dataclass
class ScriptedLLM:
    """A `TextModel`: `answer(prompt)` completes, `likelihood(prompt, continuation)` scores; calls are recorded."""

    answer: Callable[[Any], str] = lambda prompt: " a text"  # of a text, or of a `Chat`
    likelihood: Callable[[str, str], float] = lambda prompt, continuation: 0.0
    completed: list[list[Any]] = field(default_factory=list)  # the prompts of each call
    scored: list[int] = field(default_factory=list)  # how many pairs each call held
    context: int | None = None  # characters; what does not fit raises, as in a real one
    settings: list[tuple[SamplingParams, int]] = field(default_factory=list)
    chats: bool = False
    structured: bool = False

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int) -> list[str]:
        assert not any(self.misfits(prompts, sampling.max_new_tokens))
        assert self.chats or not any(isinstance(prompt, Chat) for prompt in prompts)
        self.completed.append(list(prompts))
        self.settings.append((sampling, seed))
        return [self.answer(prompt) for prompt in prompts]

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        assert not any(self.misfits(prompts, 0, continuations))
        self.scored.append(len(prompts))
        return [self.likelihood(p, c) for p, c in zip(prompts, continuations, strict=True)]

    def misfits(
        self, prompts: Sequence[Prompt], more: int = 0, continuations: Sequence[str] | None = None
    ) -> list[str | None]:
        read = [p.system + p.user if isinstance(p, Chat) else p for p in prompts]
        texts = [p + c for p, c in zip(read, continuations or [""] * len(prompts), strict=True)]
        return ["too long" if self.context and len(text) + more > self.context else None for text in texts]
