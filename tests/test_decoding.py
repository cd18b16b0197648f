"""What prompts share is read once, and rows that ended make room: the same texts, for fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_llm import letters, tiny_llama
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from fedsynth.models import decoding
from fedsynth.models.decoding import Ends, Pass, beginnings, go_on
from fedsynth.models.llm import LocalLLM
from fedsynth.models.sampling import SamplingParams

SHARED = "abcdefghijkl: abcdefghij"  # 24 tokens, 25 with BOS
PROMPTS = [SHARED + rest for rest in ("", "a", "a", "bcd", "", "kkkkkkkk", "a")] + ["k" + SHARED + "l", "k" + SHARED]
SEED, NEW = 5, 12


def gemma(tokenizer: Any, window: int) -> Gemma3ForCausalLM:
    """Every other layer looks back over so many places."""
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=128,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Gemma3ForCausalLM = Gemma3ForCausalLM(config).eval()
    return model


MODELS = {
    "full": lambda tokenizer: tiny_llama(tokenizer, context=128),
    "window": lambda tokenizer: gemma(tokenizer, 8),
    "wide window": lambda tokenizer: gemma(tokenizer, 512),
}


def llm_of(family: str) -> LocalLLM:
    tokenizer = letters()
    return LocalLLM(MODELS[family](tokenizer), tokenizer, batch_size=9, workers=1)


@torch.inference_mode()
def by_hand(llm: LocalLLM, prompts: Sequence[str]) -> list[str]:
    """Each text alone, without padding or cache: the token at which the cumulative mass passes the row's number."""
    texts = []
    for place, prompt in enumerate(prompts):
        numbers = np.random.default_rng([SEED, place]).random(NEW)
        row = [llm.tokenizer.bos_token_id, *llm.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        begin = len(row)
        for number in numbers:
            mass = llm.model(input_ids=torch.tensor([row])).logits[0, -1].double().softmax(-1).cumsum(0)
            row.append(int((mass <= number * mass[-1]).sum()))
            if row[-1] == llm.tokenizer.eos_token_id:
                break
        texts.append(llm.tokenizer.decode(row[begin:], skip_special_tokens=True))
    return texts


def read(llm: LocalLLM, prompts: Sequence[str]) -> tuple[list[str], list[tuple[int, int]]]:
    """The texts, and the shape of what passed through the model at each step."""
    shapes: list[tuple[int, int]] = []
    hook = llm.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    try:
        texts = llm.complete(prompts, SamplingParams(temperature=1.0, max_new_tokens=NEW), seed=SEED)
    finally:
        hook.remove()
    return texts, [(rows, width) for rows, width in shapes]


@pytest.mark.parametrize("family", MODELS)
def test_texts_are_those_of_each_prompt_alone(family: str) -> None:
    llm = llm_of(family)
    assert read(llm, PROMPTS)[0] == by_hand(llm, PROMPTS)


def test_padding_within_a_narrow_window_would_change_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, wide = llm_of("window"), llm_of("wide window")
    assert read(llm, PROMPTS)[1][0] == (9, 33)  # nothing is read apart: the longest prompt has 32 tokens and BOS
    assert read(wide, PROMPTS)[1][0] == (2, 25)
    monkeypatch.setattr(decoding, "window_of", lambda _: None)
    assert read(llm, PROMPTS)[0] != by_hand(llm, PROMPTS)


def test_what_prompts_share_passes_through_the_model_once() -> None:
    # Seven prompts share 25 tokens. Two of them have no more and keep their last, so that 24 are read apart. The other
    # two share 26, and keep their last.
    shapes = read(llm_of("full"), PROMPTS)[1]
    assert shapes[:2] == [(2, 25), (9, 9)]  # the rest of the longest: the last token of the beginning, and eight more


def test_equal_prompts_are_read_once_but_for_their_last_token() -> None:
    texts, shapes = read(llm_of("full"), [SHARED] * 5)
    assert shapes[:2] == [(1, 24), (5, 1)]
    assert texts == by_hand(llm_of("full"), [SHARED] * 5)


def test_short_beginnings_are_read_with_their_rows() -> None:
    assert read(llm_of("full"), ["abc", "abd"])[1][0] == (2, 4)
    assert read(llm_of("full"), [SHARED])[1][0] == (1, 25)


def test_the_length_by_which_prompts_are_grouped_is_the_one_that_saves_most() -> None:
    one, two = [1] * 10 + [2] * 10, [1] * 10 + [3] * 10
    assert beginnings([[*one, 4], [*one, 5], [*two, 4], [*two, 5], [*two, 6]]) == [20] * 5  # 3 * 20, not 4 * 10
    assert beginnings([[*one, 4], [*two, 4], [1] * 10 + [7], [1] * 10 + [8, 9]]) == [10] * 4
    assert beginnings([[5]]) == [0]
    assert beginnings([[5], [5, 6]]) == [0, 0]


class Counting:
    """Writes token 3 until each row has had its share, then the end, 2; notes the rows of each call."""

    def __init__(self, shares: Sequence[int]):
        self.shares, self.config = shares, self
        self.calls: list[tuple[int, int, tuple[int, ...]]] = []

    def get_text_config(self) -> None:
        return None

    def generate(self, *, input_ids: Any, max_new_tokens: int, stopping_criteria: Any = None, **more: Any) -> Any:
        [now] = stopping_criteria
        ids, steps = input_ids, 0
        for _ in range(max_new_tokens):
            wrote = ids.shape[1] - now.begin
            ids = torch.cat([ids, torch.tensor([[2 if wrote >= self.shares[row] else 3] for row in now.rows])], dim=1)
            steps += 1
            if now(ids, None).all():
                break
        self.calls.append((len(now.rows), steps, tuple(more["attention_mask"].shape)))
        cache = DynamicCache()
        zeros = torch.zeros(len(ids), 1, ids.shape[1] - 1, 1)
        cache.update(zeros, zeros, 0)
        return Result(ids, cache)


class Result:
    def __init__(self, sequences: torch.Tensor, past_key_values: Any):
        self.sequences, self.past_key_values = sequences, past_key_values


def test_rows_that_ended_make_room_whenever_half_are_left() -> None:
    shares, ids = [0, 9, 1, 3, 2, 0, 1, 20], torch.arange(8)[:, None] + 10
    model = Counting(shares)
    new = go_on(model, ids, torch.ones_like(ids), 15, None, Ends([2]))
    # Of 8 rows 4 are left after 2 tokens (shares 0, 0, 1, 1), of these 2 after 4, of these 1 after 10; then none.
    assert model.calls == [(8, 2, (8, 1)), (4, 2, (4, 3)), (2, 6, (2, 5)), (1, 5, (1, 11))]
    ended = [row[: row.index(2)] if 2 in row else row for row in new]
    assert ended == [[3] * min(15, share) for share in shares]


def test_a_model_that_keeps_something_else_is_let_go_on_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "GROWING", ())
    model, ids = Counting([0, 0, 5, 7]), torch.ones(4, 1, dtype=torch.long)
    go_on(model, ids, torch.ones_like(ids), 15, None, Ends([2]))
    assert [rows for rows, _, _ in model.calls] == [4, 2]  # read once more, and not again
    llm = llm_of("full")
    assert read(llm, PROMPTS)[0] == by_hand(llm, PROMPTS)


def test_a_pass_that_forgot_which_rows_are_left_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoding.selected
    monkeypatch.setattr(decoding, "selected", lambda cache, rows: real(cache, list(rows)[::-1]))
    llm = llm_of("full")
    assert read(llm, PROMPTS)[0] != by_hand(llm, PROMPTS)
    assert Pass([0, 1], Ends([2]), 1, 1)(torch.tensor([[9, 2], [9, 3]])).tolist() == [True, True]
    assert Pass([0, 1], Ends([2]), 1, 0)(torch.tensor([[9, 2], [9, 3]])).tolist() == [True, False]
