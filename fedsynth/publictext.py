"""A public corpus file as text to pretrain on: few-shot blocks, held-out lines, and the model that comes of it."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedsynth.corpus import same
from fedsynth.llm import LocalLLM
from fedsynth.models import load_tokenizer
from fedsynth.pretraining import (
    CHECKPOINT,
    Pretraining,
    Reading,
    digest_of,
    held_out_loss,
    mean_loss,
    new_model,
    rows_of,
    save_model,
    shape_of,
)
from fedsynth.tables import decoded, find, load_columns
from fedsynth.tokenizer import train_tokenizer
from fedsynth.typed import BadValue

# Lines of one topic in a block, and how often: as the blocks of the simulated worlds, so that a model learns to go on
# after any number of demonstrations, none included.
BLOCK_LINES, BLOCK_SHARES = (1, 2, 3, 5, 7), (0.2, 0.15, 0.15, 0.25, 0.25)
BARE_SHARE = 0.15  # of the blocks are written without their topic: the model must also know text by itself
HELD_OUT_SHARE = 0.02  # of the rows, where the file names none
CHECKED_LINES = 2000  # held-out lines that progress looks at; the final figure is over all
TOKENIZER_LINES = 200_000
SAMPLED_TOPICS, SAMPLED_TOKENS = 8, 40


@dataclass(frozen=True)
class PublicText:
    """What is read of a corpus file.

    Attributes:
        source: CSV, JSONL, Parquet, or plain text with one text per line; looked up in FEDSYNTH_DATA, too.
        text: Column of the text.
        topic: Column of the intent or topic; lines of one topic stand in one few-shot block. None: no blocks.
        held_out: (column, value) of the rows that are not read but measured on; None: a seeded fiftieth.
    """

    source: str
    text: str = "text"
    topic: str | None = None
    held_out: tuple[str, str] | None = None


@dataclass(frozen=True)
class Lines:
    """Texts on one line each, and their topics ("" for none)."""

    texts: tuple[str, ...]
    topics: tuple[str, ...]

    def digest(self) -> str:
        """SHA-256 of all lines in order."""
        found = hashlib.sha256()
        for text, topic in zip(self.texts, self.topics, strict=True):
            found.update(f"{topic}\n{text}\n".encode())
        return found.hexdigest()


def read(public: PublicText, seed: int) -> tuple[Lines, Lines]:
    """The lines to learn and the held-out ones, no line among both.

    Raises:
        BadValue: If the file or a column is missing, or one of the two parts would be empty.
    """
    path = find(public.source)
    if path.suffix == ".txt":
        try:
            rows = decoded(path).splitlines()
        except ValueError as problem:
            raise BadValue(f"{public.source}: cannot be read: {problem}") from problem
        columns: dict[str, list[str]] = {public.text: rows}
    else:
        asked = [public.text, public.topic or None, public.held_out[0] if public.held_out else None]
        names = list(dict.fromkeys(c for c in asked if c is not None))
        try:
            table = load_columns(path, names)
        except BadValue as problem:
            raise BadValue(f"{public.source}: {problem}") from problem
        columns = {c: table[c].fillna("").astype(str).tolist() for c in names}
    texts = [" ".join(t.split()) for t in columns[public.text]]
    topics = [topic_name(t) for t in columns[public.topic]] if public.topic else [""] * len(texts)
    if public.held_out:
        column, value = public.held_out
        held = np.array([cell == value for cell in columns[column]])
    else:
        held = np.random.default_rng([seed, 0x4E1D]).random(len(texts)) < HELD_OUT_SHARE
    measured = {same(t) for t, h in zip(texts, held.tolist(), strict=True) if h}
    learn = [i for i, t in enumerate(texts) if t and not held[i] and same(t) not in measured]
    hold = [i for i, t in enumerate(texts) if t and held[i]]
    for name, part in (("to learn from", learn), ("held out", hold)):
        if not part:
            raise BadValue(f"{public.source}: no text {name} in column {public.text!r}: check the held-out rows")
    parts = [Lines(tuple(texts[i] for i in p), tuple(topics[i] for i in p)) for p in (learn, hold)]
    return parts[0], parts[1]


def topic_name(topic: str) -> str:
    """A topic as label lists have it: "ReserveRestaurant" and "Reserve restaurant" are `reserve_restaurant`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", topic)
    return "_".join(re.findall(r"[^\W_]+", spaced)).lower()


def blocks(lines: Lines, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Token ids of few-shot blocks for ever; every line stands in one block of each pass.

    A block holds lines `topic: text` of one topic, or (a share of them, and all lines without a topic) lines of bare
    text.
    """
    bare = _encode(tokenizer, [f" {t}\n" for t in lines.texts])
    named = _encode(
        tokenizer, [f"{y}: {t}\n" if y else f" {t}\n" for t, y in zip(lines.texts, lines.topics, strict=True)]
    )
    by_topic: dict[str, list[int]] = {}
    for row, topic in enumerate(lines.topics):
        by_topic.setdefault(topic, []).append(row)
    rng = np.random.default_rng([seed, 0xB10C])
    while True:
        shown: list[tuple[bool, list[int]]] = []
        for topic, rows in by_topic.items():
            shown += [(bool(topic) and rng.random() >= BARE_SHARE, block) for block in _dealt(rows, bool(topic), rng)]
        for place in rng.permutation(len(shown)).tolist():
            with_topic, block = shown[place]
            yield [i for row in block for i in (named if with_topic else bare)[row]]


def _dealt(rows: Sequence[int], together: bool, rng: Generator) -> Iterator[list[int]]:
    order = rng.permutation(np.asarray(rows)).tolist()
    at = 0
    while at < len(order):
        size = int(rng.choice(BLOCK_LINES, p=BLOCK_SHARES)) if together else 1
        yield order[at : at + size]
        at += size


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return found


@dataclass(frozen=True)
class Wanted:
    """The model that is asked for.

    Attributes:
        width: Hidden size, a multiple of 32.
        layers: Number of blocks.
        vocabulary: Tokens of the tokenizer at most.
        epochs: Passes over the text.
        steps: Optimizer steps, instead of passes.
        batch_rows: Rows per step.
        row_tokens: Tokens per row.
        seed: Of everything.
        tokenizer: Folder of a tokenizer to share; None: a new one from the text.
    """

    width: int = 192
    layers: int = 4
    vocabulary: int = 4096
    epochs: float = 3.0
    steps: int | None = None
    batch_rows: int = 16
    row_tokens: int = 128
    seed: int = 0
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise BadValue(f"epochs must be finite and above 0, got {self.epochs}")
        if self.vocabulary < 300:
            raise BadValue(f"vocabulary must be at least 300 (256 bytes and the special tokens), got {self.vocabulary}")


SAVE_EVERY, TELL_EVERY = 250, 50  # steps


def pretrain_from_text(
    public: PublicText,
    wanted: Wanted,
    out: Path,
    *,
    command: str,
    resume: bool = False,
    device: str = "auto",
    threads: int = 1,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains tokenizer and model, measures the held-out loss and saves both so that the Auto classes load them.

    Args:
        public: The text. It must be public: no guarantee is given for it.
        wanted: The model.
        out: Folder; holds checkpoint and tokenizer while the run lasts.
        command: For the card: how it was made.
        resume: Go on from the checkpoint in `out`.
        device: "cpu", "cuda", or "auto": a CUDA GPU where there is one.
        threads: Of the CPU.
        tell: Called with lines of progress.

    Returns:
        The card, as saved in `card.json`.

    Raises:
        BadValue: If the text, the folder, the checkpoint or the device does not fit.
    """
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise BadValue(f"device must be auto, cpu or (where there is one) cuda, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    learn, held = read(public, wanted.seed)
    out = out.resolve()  # so that the working directory and links can be replaced, too
    if wanted.tokenizer is not None:
        load_tokenizer(wanted.tokenizer)  # what cannot be loaded is said before anything is written
    checkpoint = out / CHECKPOINT
    if resume and not checkpoint.is_file():
        raise BadValue(f"there is no checkpoint in {str(out)!r} to resume from: run without --resume")
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        way = "go on with --resume, or name another --out" if checkpoint.is_file() else "name another --out"
        raise BadValue(f"the folder {str(out)!r} already holds something: {way}")
    shape = shape_of(wanted.width, wanted.layers)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(wanted, learn, out)
    tokens = sum(map(len, _encode(tokenizer, [f" {t}\n" for t in learn.texts])))
    steps = wanted.steps or math.ceil(wanted.epochs * tokens / (wanted.batch_rows * wanted.row_tokens))
    reading = Reading(
        steps=steps,
        batch_rows=wanted.batch_rows,
        row_tokens=wanted.row_tokens,
        seed=wanted.seed,
        text=learn.digest(),
        tokenizer=digest_of(tokenizer),
        shape=shape,
    )
    rows = rows_of(blocks(learn, tokenizer, wanted.seed), tokenizer.bos_token_id, wanted.row_tokens)
    trained = Pretraining(new_model(shape, tokenizer, wanted.seed), rows, reading, device)
    if resume:
        trained.take_up(checkpoint)
    else:
        trained.store(checkpoint)  # so that the folder of a run that ends early is known for what it is
    parameters = sum(p.numel() for p in trained.model.parameters())
    tell(
        f"{len(learn.texts):,} texts, {tokens:,} tokens of {len(tokenizer):,}; {parameters:,} parameters; "
        f"{steps:,} steps of {reading.tokens_per_step:,} tokens; {len(held.texts):,} texts held out"
    )
    measured = _encode(tokenizer, [f" {t}\n" for t in held.texts])
    glance = measured[:: max(1, len(measured) // CHECKED_LINES)]
    losses: list[float] = []
    first, began = trained.done, time.monotonic()
    while trained.done < steps:
        losses.append(trained.step())
        if trained.done % TELL_EVERY == 0:
            pace = (time.monotonic() - began) / (trained.done - first)
            tell(
                f"step {trained.done:,}/{steps:,}  loss {mean_loss(losses):.3f}  "
                f"{reading.tokens_per_step / pace:,.0f} tokens/s  {pace * (steps - trained.done) / 60:.1f} min left"
            )
        if trained.done % SAVE_EVERY == 0 and trained.done < steps:
            trained.store(checkpoint)
            loss = held_out_loss(trained.model, tokenizer, glance)
            tell(f"step {trained.done:,}/{steps:,}  held-out {loss:.3f}  kept: --resume goes on from here")
    card = {
        "command": command,
        "corpus": {
            "file": Path(public.source).name,
            "sha256": reading.text,
            "texts": len(learn.texts),
            "tokens": tokens,
        },
        "wanted": asdict(wanted),
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        "steps": steps,
        "tokens_read": steps * reading.tokens_per_step,
        "loss": mean_loss(losses),
        "held_out": {
            "texts": len(measured),
            "tokens": sum(map(len, measured)),
            "nats_per_token": round(held_out_loss(trained.model, tokenizer, measured), 4),
        },
        "samples": _samples(trained.model.to("cpu").eval(), tokenizer, learn, wanted.seed),  # type: ignore[arg-type]
        "seconds": round(trained.seconds),
    }
    save_model(trained.model, tokenizer, out, lambda _: card)
    return card


def _tokenizer(wanted: Wanted, learn: Lines, out: Path) -> Any:
    if wanted.tokenizer is not None:
        found = load_tokenizer(wanted.tokenizer)
        newline = found.encode("\n", add_special_tokens=False)
        if found.bos_token_id is None or found.pad_token_id is None or newline != [found.eos_token_id]:
            raise BadValue(f"the tokenizer {wanted.tokenizer!r} needs BOS, padding, and the line end as its EOS token")
        return found
    if (out / "tokenizer.json").is_file():  # of the run that is resumed
        return AutoTokenizer.from_pretrained(out)
    named = [f"{y}: {t}" if y else f" {t}" for t, y in zip(learn.texts, learn.topics, strict=True)]
    made = train_tokenizer(named[:: max(1, len(named) // TOKENIZER_LINES)], wanted.vocabulary)
    made.save_pretrained(out)
    return made


def _samples(model: Any, tokenizer: Any, learn: Lines, seed: int) -> list[str]:
    """What it writes after a topic's name, or after nothing: for people to look at."""
    known = sorted(set(learn.topics) - {""})
    chosen = known[:: max(1, len(known) // SAMPLED_TOPICS)][:SAMPLED_TOPICS] if known else []
    prompts = [f"{topic}:" for topic in chosen] or [""] * SAMPLED_TOPICS
    texts = LocalLLM(model, tokenizer).complete(
        prompts, max_tokens=SAMPLED_TOKENS, temperature=0.8, top_p=0.95, seed=seed
    )
    return [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
