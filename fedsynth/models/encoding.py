"""Token ids of text that people typed: it never becomes a control token, whatever it spells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LINE_END = "\n"


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without the tokens that some tokenizers put around it, and without any control token."""
    return text_rows(tokenizer, [text])[0]


def text_rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`token_ids` of each text.

    The name of a control token ("</s>", "[SEP]") is spelled out. So is a line end if it is the model's end of text:
    byte-level tokenizers have another token for its byte.
    """
    if not texts:
        return []
    facts = _facts(tokenizer)
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, **facts.options)["input_ids"]
    return [
        _spelled_out(tokenizer, text, facts) if facts.misread(text, row) else row
        for row, text in zip(rows, texts, strict=True)
    ]


def prompt_rows(tokenizer: Any, prompts: Sequence[str], continuations: Sequence[str] | None = None) -> list[list[int]]:
    """Token ids of prompts, each with its continuation, if there is one.

    The encoding is that of `text_rows`, except for the line ends of a prompt: they separate its lines, which hold one
    text each (`instructions`). A model whose end of text is the line end has read lines that end with it.

    Args:
        tokenizer: The model's tokenizer.
        prompts: Lines, the last one open.
        continuations: One text per prompt.
    """
    texts = [""] * len(prompts) if continuations is None else continuations
    if tokenizer.eos_token != LINE_END:
        return text_rows(tokenizer, [prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    lines = [prompt.split(LINE_END) for prompt in prompts]
    rows = iter(
        text_rows(
            tokenizer,
            [line for whole, text in zip(lines, texts, strict=True) for line in (*whole[:-1], whole[-1] + text)],
        )
    )
    found = []
    for whole in lines:
        row = next(rows)
        for _ in whole[1:]:
            row = [*row, tokenizer.eos_token_id, *next(rows)]
        found.append(row)
    return found


def surrounded(tokenizer: Any, rows: Sequence[list[int]], longest: int | None = None) -> list[list[int]]:
    """Rows of token ids with the tokens that the tokenizer puts around a text, cut to `longest` tokens in all."""
    before, after = _facts(tokenizer).before, _facts(tokenizer).after
    room = None if longest is None else max(0, longest - len(before) - len(after))
    return [[*before, *row[:room], *after] for row in rows]


@dataclass(frozen=True)
class _Facts:
    """Properties of a tokenizer.

    Attributes:
        control: Control tokens: id -> name.
        unknown: Id and name of the token for unknown characters, if that is no control token.
        options: Options that make it read names of control tokens as text.
        before: Tokens that it puts before a text.
        after: Tokens that it puts after a text.
    """

    control: Mapping[int, str]
    unknown: tuple[int, str] | None
    options: Mapping[str, bool]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def misread(self, text: str, row: Sequence[int]) -> bool:
        """True if the tokenizer took the name of a token in a text for the token."""
        if not self.control.keys().isdisjoint(row):
            return True
        return self.unknown is not None and self.unknown[1] in text and self.unknown[0] in row


@lru_cache(maxsize=32)
def _facts(tokenizer: Any) -> _Facts:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    control = {number: str(token) for number, token in added.items() if token.special}
    control |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    # The unknown token is the one special token that texts may hold, unless it is also the end of text (GPT-2).
    unknown, roles = None, ("bos", "eos", "sep", "cls", "pad", "mask")
    if tokenizer.unk_token_id not in [None, *(getattr(tokenizer, f"{role}_token_id") for role in roles)]:
        control.pop(tokenizer.unk_token_id, None)
        unknown = (tokenizer.unk_token_id, str(tokenizer.unk_token))
    options = {"split_special_tokens": True}
    try:
        [inner] = tokenizer(["a"], add_special_tokens=False, **options)["input_ids"]
    except ValueError:  # mistral-common lacks the option, and reads no names in a text anyway
        options = {}
        [inner] = tokenizer(["a"], add_special_tokens=False)["input_ids"]
    [whole] = tokenizer(["a"])["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), len(whole))
    return _Facts(control, unknown, options, tuple(whole[:at]), tuple(whole[at + len(inner) :]))


def _spelled_out(tokenizer: Any, text: str, facts: _Facts) -> list[int]:
    """The tokens of a text from a tokenizer that finds names of control tokens among its pieces (Unigram, whole words).

    A name is cut after its first character and read as two texts. A name that cannot be cut, as a line end that only
    the end of text can write, becomes a blank.
    """
    names = [*facts.control.values(), *([] if facts.unknown is None else [facts.unknown[1]])]
    for name in names:
        text = text.replace(name, " ") if len(name) == 1 else text
    cut = re.compile("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names if len(n) > 1) or "(?!)")
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        parts = [part for part in cut.split(text) if part]
        rows = tokenizer(parts, add_special_tokens=False, **facts.options)["input_ids"] if parts else []
        ids = [number for row in rows for number in row]
    else:  # piece by piece, so that a cut adds no blank of its own
        text = inner.normalizer.normalize_str(text) if inner.normalizer is not None else text
        pieces = [text] if inner.pre_tokenizer is None else [p for p, _ in inner.pre_tokenizer.pre_tokenize_str(text)]
        ids = [t.id for piece in pieces for part in cut.split(piece) if part for t in inner.model.tokenize(part)]
    return [number for number in ids if number not in facts.control]
