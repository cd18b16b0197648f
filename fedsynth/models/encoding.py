"""What people typed as token ids: it is text, whatever it spells, and never a control token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LINE_END = "\n"


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without those that some tokenizers put around it; no control token is among them."""
    return text_rows(tokenizer, [text])[0]


def text_rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`token_ids` of each text.

    The name of a control token ("</s>", "[SEP]") is spelled out. So is a line end where that is the model's end of
    text: byte-level tokenizers have a token of its byte, which is another one.
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
    """Token ids of prompts, each with the text that goes on from it, if there is one.

    As `text_rows`, but for the line ends of a prompt: they part its lines, in which texts stand on one line each
    (`instructions`). A model whose end of text is the line end has read lines that end with it.

    Args:
        tokenizer: Of the model.
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
    """Rows of token ids within what the tokenizer puts around a text, cut to `longest` tokens in all."""
    before, after = _facts(tokenizer).before, _facts(tokenizer).after
    room = None if longest is None else max(0, longest - len(before) - len(after))
    return [[*before, *row[:room], *after] for row in rows]


@dataclass(frozen=True)
class _Facts:
    """Of a tokenizer.

    Attributes:
        control: Control tokens: id -> name.
        unknown: Id and name of what stands for unknown characters, where that is no control token.
        options: How it is told that names of control tokens are text.
        before: What it puts before a text.
        after: What it puts after it.
    """

    control: Mapping[int, str]
    unknown: tuple[int, str] | None
    options: Mapping[str, bool]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def misread(self, text: str, row: Sequence[int]) -> bool:
        """Whether the name of a token in a text was taken for the token."""
        if not self.control.keys().isdisjoint(row):
            return True
        return self.unknown is not None and self.unknown[1] in text and self.unknown[0] in row


@lru_cache(maxsize=32)
def _facts(tokenizer: Any) -> _Facts:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    control = {number: str(token) for number, token in added.items() if token.special}
    control |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    # What stands for unknown characters is the one special token that texts hold, unless it is the end, too (GPT-2).
    unknown, roles = None, ("bos", "eos", "sep", "cls", "pad", "mask")
    if tokenizer.unk_token_id not in [None, *(getattr(tokenizer, f"{role}_token_id") for role in roles)]:
        control.pop(tokenizer.unk_token_id, None)
        unknown = (tokenizer.unk_token_id, str(tokenizer.unk_token))
    options = {"split_special_tokens": True}
    try:
        [inner] = tokenizer(["a"], add_special_tokens=False, **options)["input_ids"]
    except ValueError:  # mistral-common does not know the option: it reads no names in a text anyway
        options = {}
        [inner] = tokenizer(["a"], add_special_tokens=False)["input_ids"]
    [whole] = tokenizer(["a"])["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), len(whole))
    return _Facts(control, unknown, options, tuple(whole[:at]), tuple(whole[at + len(inner) :]))


def _spelled_out(tokenizer: Any, text: str, facts: _Facts) -> list[int]:
    """The tokens of a text by a model that finds names of control tokens among its pieces (Unigram, whole words).

    A name is cut after its first character, and read as two texts. What cannot be cut, as a line end that only the end
    of text can write, becomes a blank.
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
