"""Texts as batches of token ids: the input of each kind of model, padding, batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsynth.models.chat import Chat, Prompt, render
from fedsynth.models.encoding import prompt_rows, surrounded, text_rows, token_ids
from fedsynth.models.loading import Kind, context_of, kind_of

T = TypeVar("T")


def token_rows(tokenizer: Any, texts: Sequence[str], kind: Kind, longest: int | None = None) -> list[list[int]]:
    """Token ids of each text in the form that a model of this kind reads.

    A causal model reads exactly one BOS, if its tokenizer has one, and then the text. The others also read the tokens
    that their tokenizer puts around a text ([CLS] and [SEP] of BERT, the EOS of T5); a cut text keeps them. There is no
    other control token, for any text.
    """
    return _as_read(tokenizer, text_rows(tokenizer, texts), kind, longest)


def given_rows(
    tokenizer: Any, prompts: Sequence[Prompt], kind: Kind, continuations: Sequence[str] | None = None
) -> list[list[int]]:
    """As `token_rows`, of prompts: their line ends are the model's own (`encoding.prompt_rows`).

    A question stands in the tokenizer's chat template (`chat.render`), and a text after it is the model's answer.
    """
    more = [""] * len(prompts) if continuations is None else continuations
    texts = ["" if isinstance(prompt, Chat) else prompt for prompt in prompts]
    rows = _as_read(tokenizer, prompt_rows(tokenizer, texts, more), kind)
    return [
        [*render(prompt, tokenizer), *token_ids(tokenizer, text)] if isinstance(prompt, Chat) else row
        for prompt, text, row in zip(prompts, more, rows, strict=True)
    ]


def _as_read(tokenizer: Any, rows: list[list[int]], kind: Kind, longest: int | None = None) -> list[list[int]]:
    if kind != "causal":
        return surrounded(tokenizer, rows, longest)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [[*bos, *row][:longest] for row in rows]


def longest_of(config: Any, tokenizer: Any, longest: int | None = None) -> int | None:
    """The most tokens of one text that a model can read, at most `longest`; None for no limit.

    Some encoders number their positions from 2 on: their tokenizer knows the number that a text may use.
    """
    limits = [longest, context_of(config), None if kind_of(config) == "causal" else tokenizer.model_max_length]
    return min((limit for limit in limits if limit is not None), default=None)


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids, and a mask that is 1 at a row's own tokens; each of shape (rows, longest row), on the CPU."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad, dtype=torch.long)
    present = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, place], present[i, place] = torch.tensor(row, dtype=torch.long), 1
    return tokens, present


LOGITS = 2**28  # logits of a batch at once, at most: 1 GiB in float32
COPIES = 4  # tensors as large as the logits that scoring and drawing hold at once
SHARE = 0.5  # of the free memory that batches may fill


def rows_that_fit(config: Any, *, places: int, tokens: int, width: int, free: float) -> int:
    """Rows of a batch whose logits and keys and values fit; at least 1.

    Gemma's 262,144 numbers for each of 64 tokens in 64 rows took 6.2 GB.

    Args:
        config: The model's configuration.
        places: Places of a row with logits.
        tokens: Tokens of a row, whose keys and values are kept.
        width: Bytes of a number of the model.
        free: Bytes that one batch may have.
    """
    text = config.get_text_config()

    def known(*names: str) -> int:
        return next((int(found) for name in names if (found := getattr(text, name, None))), 1)

    vocabulary, heads = known("vocab_size"), known("num_attention_heads", "n_head")
    head = getattr(text, "head_dim", None) or known("hidden_size") // heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    kept = 2 * known("num_hidden_layers") * shared * head * tokens * width
    logits = 4 * COPIES * vocabulary * places
    return max(1, min(LOGITS // (vocabulary * places), int(SHARE * free / (logits + kept))))


def by_length(
    work: Callable[[Sequence[int]], list[T]], lengths: Sequence[int], *, batch_size: int, workers: int
) -> list[T]:
    """Runs `work` on batches of similar length, longest first (if memory fails, at once); results in input order.

    Args:
        work: Row numbers of one batch -> one result per row.
        lengths: Lengths of all rows.
        batch_size: Rows at once.
        workers: Threads. Their number never changes a result, as batches are formed before.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def run(rows: Sequence[int]) -> list[T]:
        with torch.inference_mode():  # per thread, hence here
            return work(rows)

    workers = min(workers, len(batches))
    if workers <= 1:
        done = [run(rows) for rows in batches]
    else:
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                done = list(pool.map(run, batches))
        finally:
            torch.set_num_threads(threads)
    results: list[T | None] = [None] * len(order)
    for rows, values in zip(batches, done, strict=True):
        for row, value in zip(rows, values, strict=True):
            results[row] = value
    return results  # type: ignore[return-value]  # each row is in one batch
