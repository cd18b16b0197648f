"""How a batch of texts is decoded: what prompts have in common is read once, and rows that ended make room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fedsynth.models.batches import padded

RANKED = 256  # tokens to rank first: top-p rarely needs more, and sorting all of them takes most of the time
# Measured (1.5B parameters, bfloat16, one core, CPU seconds): 48 prompts of 122 tokens, six different ones, answers
# of at most 48 tokens in one line: 155; what is shared is read once: 78; and rows that ended make room: 41. With four
# demonstrations in each prompt, whose beginnings alone are shared: 201, and with both 136.
READ_ONCE = 16  # what prompts share is read once where that saves so many tokens a row: less costs as much to copy
GROWING = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache that hold keys and values of each row, no more


class Draw(LogitsProcessor):
    """Samples each row's next token with that row's own uniform numbers, by inversion of its distribution.

    `generate` then only takes the maximum, so that it reads and moves no generator of torch. Inversion needs one number
    per token, Gumbel noise one per token of the vocabulary: generation took 25 % longer with the latter.

    Args:
        uniforms: Numbers in [0, 1), shape (rows, new tokens), double precision.
        prompt_length: Width of the input, padding included: the prompts', or 1 (a decoder's start).
        temperature: Temperature above 0.
        top_p: Tokens are drawn from the smallest set of likeliest tokens that holds this much of the mass.
        top_k: The mass is that of so many likeliest tokens alone; 0 for all.
    """

    def __init__(self, uniforms: torch.Tensor, prompt_length: int, temperature: float, top_p: float, top_k: int = 0):
        self.uniforms, self.prompt_length = uniforms, prompt_length
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) that leave only the drawn token possible."""
        mass = torch.softmax(scores.float() / self.temperature, dim=-1)
        uniform = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None]
        if 0 < self.top_k < mass.shape[-1]:
            ranked, tokens = mass.topk(self.top_k)
            ranked = ranked / ranked.sum(dim=-1, keepdim=True)
            drawn = tokens.gather(1, self._place(self._nucleus(ranked), uniform))
        elif self.top_p == 1:
            drawn = self._place(mass, uniform)
        else:
            ranked, tokens = mass.topk(min(RANKED, mass.shape[-1]))
            drawn = tokens.gather(1, self._place(self._nucleus(ranked), uniform))
            further = ranked.sum(dim=-1) < self.top_p
            if further.any():
                ranked, tokens = mass[further].sort(dim=-1, descending=True)
                drawn[further] = tokens.gather(1, self._place(self._nucleus(ranked), uniform[further]))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def of(self, rows: Sequence[int], prompt_length: int) -> Draw:
        """The same for some rows, behind prompts of another width."""
        return Draw(self.uniforms[list(rows)], prompt_length, self.temperature, self.top_p, self.top_k)

    def _place(self, mass: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        cumulative = mass.double().cumsum(dim=-1)
        # right=True never lands on a token of mass 0; the clamp is for round-off at the far end only.
        return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=mass.shape[-1] - 1)

    def _nucleus(self, ranked: torch.Tensor) -> torch.Tensor:
        if self.top_p == 1:  # rounding may bring the sum to 1 before the last token
            return ranked
        before = ranked.cumsum(dim=-1) - ranked
        return ranked.masked_fill(before >= self.top_p, 0.0)


@dataclass(frozen=True)
class Ends:
    """Where a row ends.

    Attributes:
        stops: Tokens that end a text.
        may_end: True for a token that holds a line end: only after such a token is a row read.
        has_line: Row number and its new tokens -> whether a line is whole. None where a line ends nothing.
    """

    stops: Sequence[int]
    may_end: Callable[[int], bool] | None = None
    has_line: Callable[[int, list[int]], bool] | None = None

    def ended(self, row: int, new: torch.Tensor) -> bool:
        """True if the last of a row's new tokens ends it."""
        last = int(new[-1])
        if last in self.stops:
            return True
        return bool(self.has_line and self.may_end and self.may_end(last) and self.has_line(row, new.tolist()))


class Pass(StoppingCriteria):
    """Ends each row of one call of `generate` where it ends, and the call where few enough of its rows go on.

    Args:
        rows: Numbers of the rows.
        ends: Where they end.
        begin: Width of the prompts.
        few: The call ends where so many rows go on, or fewer.
    """

    def __init__(self, rows: Sequence[int], ends: Ends, begin: int, few: int):
        self.rows, self.ends, self.begin, self.few = rows, ends, begin, few
        self.done = [False] * len(rows)

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """True for each row that is done; for all where the call ends."""
        for place, row in enumerate(input_ids[:, self.begin :].cpu()):
            self.done[place] = self.done[place] or self.ends.ended(self.rows[place], row)
        over = self.done.count(False) <= self.few
        return torch.tensor([over or done for done in self.done], device=input_ids.device)


def decode(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int, draw: Draw | None, ends: Ends
) -> list[list[int]]:
    """The new tokens of each row, of a model with an encoder.

    Args:
        model: In evaluation mode.
        ids: Token ids, shape (rows, tokens).
        mask: 1 at a row's own tokens.
        new_tokens: Tokens to write at most.
        draw: The sampler; None for the likeliest tokens.
        ends: Where a row ends. What stands after its end is arbitrary.
    """
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([draw] if draw else []),
        stopping_criteria=StoppingCriteriaList([Pass(range(len(ids)), ends, 1, 0)]),
    )
    new: list[list[int]] = written[:, 1:].tolist()
    return new


def go_on(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int, draw: Draw | None, ends: Ends
) -> list[list[int]]:
    """The new tokens of each row, of a model that goes on from its prompt. See `decode`.

    What the rows' prompts share is read once. Whenever half of the rows have ended, the others go on without them:
    `generate` would compute further tokens of all rows until the last one ends.

    Args:
        model: In evaluation mode.
        ids: Token ids of the prompts, shape (rows, tokens), padded on the left.
        mask: 1 at a row's own tokens.
        new_tokens: Tokens to write at most.
        draw: The sampler; None for the likeliest tokens.
        ends: Where a row ends.
    """
    ids, mask, cache = read_once(model, ids, mask, new_tokens)
    begin, rows = ids.shape[1], list(range(len(ids)))
    new: list[list[int]] = [[] for _ in rows]
    halves = True
    while True:
        now = Pass(rows, ends, begin, len(rows) // 2 if halves else 0)
        sampler = [draw.of(rows, begin)] if draw else []
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=new_tokens - (ids.shape[1] - begin),
            do_sample=False,
            logits_processor=LogitsProcessorList(sampler),
            stopping_criteria=StoppingCriteriaList([now]),
            return_dict_in_generate=True,
        )
        for row, written in zip(rows, out.sequences[:, begin:].tolist(), strict=True):
            new[row] = written
        left = [place for place, done in enumerate(now.done) if not done]
        more = out.sequences.shape[1] - ids.shape[1]
        if not left or not more or out.sequences.shape[1] - begin >= new_tokens:
            return new
        ids = out.sequences[left]
        mask = torch.cat([mask[left], mask.new_ones(len(left), more)], dim=1)
        rows = [rows[place] for place in left]
        cache = selected(out.past_key_values, left)
        halves = cache is not None


def selected(cache: Any, rows: Sequence[int]) -> DynamicCache | None:
    """Some rows of a cache, in a given order; None if it holds something else than keys and values."""
    if not isinstance(cache, DynamicCache) or any(type(layer) not in GROWING for layer in cache.layers):
        return None
    cache.batch_select_indices(torch.tensor(rows))
    return cache


def read_once(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, DynamicCache | None]:
    """The prompts, and the keys and values of what several of them begin with, which is read once.

    A row is laid out anew, as (padding, the shared beginning, padding, the rest). Without a cache, the prompts are as
    they came: where reading once would save little, where the model keeps something else than keys and values, or
    where it looks back over so few places that the padding within would take some of them.
    """
    own = mask.sum(dim=1).tolist()
    prompts = [row[len(row) - count :] for row, count in zip(ids.tolist(), own, strict=True)]
    shared = beginnings(prompts)
    heads = list(dict.fromkeys(tuple(row[:count]) for row, count in zip(prompts, shared, strict=True)))
    saved = sum(shared) - sum(map(len, heads))
    if saved < READ_ONCE * len(prompts) or min(shared) == 0:
        return ids, mask, None
    rests = [row[count:] for row, count in zip(prompts, shared, strict=True)]
    longest = max(map(len, rests))
    window = window_of(model)
    if window and any(len(rest) < longest for rest in rests) and max(map(len, heads)) + longest + new_tokens > window:
        return ids, mask, None
    pad = int(ids[mask == 0][0]) if (mask == 0).any() else 0
    first, present = _left([list(head) for head in heads], pad, ids)
    read = model.generate(
        input_ids=first, attention_mask=present, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    )
    place = {head: number for number, head in enumerate(heads)}
    order = [place[tuple(row[:count])] for row, count in zip(prompts, shared, strict=True)]
    cache = selected(read.past_key_values, order)
    if cache is None:
        return ids, mask, None
    rest, remaining = _left(rests, pad, ids)
    return torch.cat([first[order], rest], dim=1), torch.cat([present[order], remaining], dim=1), cache


def window_of(model: Any) -> int | None:
    """Over how many places a model's narrowest layers look back; None for all."""
    window: int | None = getattr(model.config.get_text_config(), "sliding_window", None)
    return window


def _left(rows: Sequence[list[int]], pad: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = padded(rows, pad, left=True)
    return ids.to(like.device), mask.to(like.device)


def beginnings(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each prompt are worth reading apart; its last token never is one of them.

    Prompts with one beginning form a group, whose longest common beginning is read once. The length by which groups
    are formed is the one that saves most.

    >>> beginnings([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4], [7, 8, 9]])
    [3, 3, 3, 2]
    >>> beginnings([[1, 2, 3, 4], [1, 2, 3, 5], [6, 7]])
    [3, 3, 1]
    """
    ranked = sorted(map(tuple, prompts))
    lengths = {_alike(one, two) for one, two in pairwise(ranked)}

    def saved(length: int) -> int:
        return (len(ranked) - len({row[:length] for row in ranked})) * length

    best = max(sorted(lengths), key=saved, default=0)
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for row in ranked:
        groups.setdefault(row[:best], []).append(row)
    common = {start: min(_alike(rows[0], rows[-1]), *(len(row) - 1 for row in rows)) for start, rows in groups.items()}
    return [common[tuple(row)[:best]] for row in prompts]


def _alike(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens two rows have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
