"""An LLM whose answers and scores the test writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedsynth.models.sampling import SamplingParams


@dataclass
class ScriptedLLM:
    """A `TextModel`: `answer(prompt)` completes, `likelihood(prompt, continuation)` scores; calls are recorded."""

    answer: Callable[[str], str] = lambda prompt: " a text"
    likelihood: Callable[[str, str], float] = lambda prompt, continuation: 0.0
    completed: list[list[str]] = field(default_factory=list)  # the prompts of each call
    scored: list[int] = field(default_factory=list)  # how many pairs each call held
    context: int | None = None  # characters; what does not fit raises, as in a real one
    settings: list[tuple[SamplingParams, int]] = field(default_factory=list)

    def complete(self, prompts: Sequence[str], sampling: SamplingParams, *, seed: int) -> list[str]:
        assert not any(self.misfits(prompts, sampling.max_new_tokens))
        self.completed.append(list(prompts))
        self.settings.append((sampling, seed))
        return [self.answer(prompt) for prompt in prompts]

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        assert not any(self.misfits(prompts, 0, continuations))
        self.scored.append(len(prompts))
        return [self.likelihood(p, c) for p, c in zip(prompts, continuations, strict=True)]

    def misfits(
        self, prompts: Sequence[str], more: int = 0, continuations: Sequence[str] | None = None
    ) -> list[str | None]:
        texts = [p + c for p, c in zip(prompts, continuations or [""] * len(prompts), strict=True)]
        return ["too long" if self.context and len(text) + more > self.context else None for text in texts]
