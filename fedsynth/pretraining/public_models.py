"""A small language model and its tokenizer from a public corpus file, for `fedsynth pretrain --corpus`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fedsynth.models.encoding import prompt_rows
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.pretraining.causal_lm import (
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
from fedsynth.pretraining.public_text import Lines, PublicText, blocks, read
from fedsynth.pretraining.tokenizer import train_tokenizer
from fedsynth.typed import BadValue, Positive, in_range

CHECKED_LINES = 2000  # held-out lines in reports of progress; the final figure is over all
TOKENIZER_LINES = 200_000
SAMPLED_TOPICS, SAMPLED_TOKENS = 8, 40


@dataclass(frozen=True)
class Wanted:
    """The requested model.

    Attributes:
        width: Hidden size, a multiple of 32.
        layers: Number of blocks.
        vocabulary: Most tokens of the tokenizer.
        epochs: Passes over the text.
        steps: Optimizer steps, instead of passes.
        batch_rows: Rows per step.
        row_tokens: Tokens per row.
        seed: Seed of all random choices.
        tokenizer: Folder of a tokenizer to share; None for a new one from the text.
    """

    width: int = 192
    layers: int = 4
    vocabulary: int = 4096
    epochs: Positive = 3.0
    steps: int | None = None
    batch_rows: int = 16
    row_tokens: int = 128
    seed: int = 0
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        in_range(self)
        if self.vocabulary < 300:
            raise BadValue(f"vocabulary must be at least 300 (256 bytes and the special tokens), got {self.vocabulary}")


SAVE_EVERY, TELL_EVERY = 250, 50  # steps


@dataclass(frozen=True)
class Hardware:
    """The hardware of a training.

    Attributes:
        device: "cpu", "cuda", or "auto": a CUDA GPU if there is one.
        threads: Threads of the CPU.
    """

    device: str = "auto"
    threads: int = 1


def pretrain_from_text(
    public: PublicText,
    wanted: Wanted,
    out: Path,
    *,
    command: str,
    resume: bool = False,
    hardware: Hardware = Hardware(),
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains tokenizer and model, measures the held-out loss and saves both so that the Auto classes load them.

    Args:
        public: The text. It must be public, as it gets no guarantee.
        wanted: The requested model.
        out: The folder; it holds checkpoint and tokenizer during the run.
        command: The command, for the card.
        resume: True to resume from the checkpoint in `out`.
        hardware: The device and threads of the training.
        tell: Called with lines of progress.

    Returns:
        The card, as saved in `card.json`.

    Raises:
        BadValue: If the text, the folder, the checkpoint or the device does not fit.
    """
    device = hardware.device
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise BadValue(f"device must be auto, cpu or (where there is one) cuda, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(hardware.threads)
    learn, held = read(public, wanted.seed)
    if wanted.tokenizer is not None:
        load_tokenizer(wanted.tokenizer)  # a failure to load ends the run before it writes anything
    checkpoint = out / CHECKPOINT
    if resume and not checkpoint.is_file():
        raise BadValue(f"there is no checkpoint in {str(out)!r} to resume from: run without --resume")
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        way = "go on with --resume, or name another --out" if checkpoint.is_file() else "name another --out"
        raise BadValue(f"the folder {str(out)!r} already holds something: {way}")
    shape = shape_of(wanted.width, wanted.layers)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(wanted, learn, out)
    tokens = sum(map(len, prompt_rows(tokenizer, [f" {t}\n" for t in learn.texts])))
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
        trained.store(checkpoint)  # so that the folder of a run that ends early is recognised
    parameters = sum(p.numel() for p in trained.model.parameters())
    tell(
        f"{len(learn.texts):,} texts, {tokens:,} tokens of {len(tokenizer):,}; {parameters:,} parameters; "
        f"{steps:,} steps of {reading.tokens_per_step:,} tokens; {len(held.texts):,} texts held out"
    )
    measured = prompt_rows(tokenizer, [f" {t}\n" for t in held.texts])
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
        "samples": _samples(trained.model.to("cpu").eval(), tokenizer, learn, wanted.seed),  # type: ignore[arg-type]  # likewise wrapped
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
    if (out / "tokenizer.json").is_file():  # from the resumed run
        return AutoTokenizer.from_pretrained(out)
    named = [f"{y}: {t}" if y else f" {t}" for t, y in zip(learn.texts, learn.topics, strict=True)]
    made = train_tokenizer(named[:: max(1, len(named) // TOKENIZER_LINES)], wanted.vocabulary)
    made.save_pretrained(out)
    return made


def _samples(model: Any, tokenizer: Any, learn: Lines, seed: int) -> list[str]:
    """Samples after a topic's name, or after nothing, for people to look at."""
    known = sorted(set(learn.topics) - {""})
    chosen = known[:: max(1, len(known) // SAMPLED_TOPICS)][:SAMPLED_TOPICS] if known else []
    prompts = [f"{topic}:" for topic in chosen] or [""] * SAMPLED_TOPICS
    texts = LocalLLM(model, tokenizer).complete(
        prompts, SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=SAMPLED_TOKENS), seed=seed
    )
    return [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
