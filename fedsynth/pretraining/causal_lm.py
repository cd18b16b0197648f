"""A small causal language model from scratch: its start, its steps, its checkpoints, its held-out loss.

It serves as the server LLM if no other is available, and as the models of the offline demonstration. Optimizers: Muon
for the hidden matrices (torch.optim.Muon), AdamW for embeddings and gains.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsynth.models.batches import padded
from fedsynth.typed import BadValue, Count, build, in_range

WARM_UP_STEPS = 60
MUON_RATE, ADAM_RATE = 0.02, 4e-3
# Deviation of the embeddings' start. Blocks write at a scale near 1; with embeddings six times shorter the server's
# model learnt to copy templates and labels in 3,500 steps, but not the register of its demonstrations.
EMBEDDING_SCALE = 0.5
CONTEXT = 512
CHECKPOINT = "checkpoint.safetensors"
HEAD_WIDTH = 32


@dataclass(frozen=True)
class Shape:
    """Size of a Llama.

    Attributes:
        width: Hidden size.
        layers: Number of blocks.
        feed_forward: Inner size of the feed-forward layers.
        heads: Attention heads.
    """

    width: Count
    layers: Count
    feed_forward: Count
    heads: Count = 4

    def __post_init__(self) -> None:
        in_range(self)
        if self.width % (2 * self.heads):
            raise BadValue(f"width must be a multiple of twice the {self.heads} heads, got {self.width}")


def shape_of(width: int, layers: int) -> Shape:
    """A Llama of usual proportions: heads of 32, feed-forward of 8/3 the width, rounded up to a multiple of 8."""
    if width % HEAD_WIDTH:
        raise BadValue(f"width must be a multiple of {HEAD_WIDTH}, got {width}")
    return Shape(width, layers, feed_forward=math.ceil(width / 3) * 8, heads=max(1, width // HEAD_WIDTH))


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings at its random start."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.width,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                # Each block starts as the identity: its last matrix is zero, as is usual with Muon.
                last = "o_proj" in name or "down_proj" in name
                weight.normal_(std=0.0 if last else weight.shape[1] ** -0.5, generator=generator)
        # Longer embeddings, and a last gain that keeps the first logits of the tied head near 1.
        model.model.embed_tokens.weight.mul_(EMBEDDING_SCALE * shape.width**0.5)
        model.model.norm.weight.fill_(1 / (EMBEDDING_SCALE * shape.width**0.5))
    return model


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": [embedding], "lr": ADAM_RATE * EMBEDDING_SCALE * embedding.shape[1] ** 0.5},
        {"params": gains, "lr": ADAM_RATE},
    ]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass(frozen=True)
class Reading:
    """The reading of a run; a checkpoint must share it with the run that resumes from it.

    Attributes:
        steps: Optimizer steps in all; the rate warms up, stays, and falls linearly over the second half.
        batch_rows: Rows per step.
        row_tokens: Tokens per row.
        seed: Seed of the model's start and of the text's order.
        text: Digest of the text.
        tokenizer: Digest of the tokenizer.
        shape: Shape of the model.
    """

    steps: Count
    batch_rows: Count
    row_tokens: Count
    seed: int
    text: str
    tokenizer: str
    shape: Shape

    def __post_init__(self) -> None:
        in_range(self)
        if not 8 <= self.row_tokens <= CONTEXT:
            raise BadValue(f"row_tokens must lie in 8..{CONTEXT} (the model's context), got {self.row_tokens}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_rows * self.row_tokens


def rows_of(blocks: Iterable[Sequence[int]], bos: int, row_tokens: int) -> Iterator[list[int]]:
    """Rows of `row_tokens` tokens: blocks of token ids, each after a BOS; the rest of a block is in the next row."""
    row: list[int] = []
    for block in blocks:
        row += [bos, *block]
        while len(row) >= row_tokens:
            yield row[:row_tokens]
            row = row[row_tokens:]


class Pretraining:
    """A model in training: it advances step by step, and can be stored and resumed between two steps.

    Args:
        model: The model at its start.
        rows: Token ids, `reading.row_tokens` each; always the same ones, in the same order.
        reading: The run's settings.
        device: CPU or CUDA; it computes in bfloat16 under autocast if the hardware has it, else in float32.
        weigh: Token ids (rows, tokens) -> weights in the loss, of the same shape; without it all are equal.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        rows: Iterator[list[int]],
        reading: Reading,
        device: str = "cpu",
        weigh: Callable[[Tensor], Tensor] | None = None,
    ):
        self.weigh = weigh
        self.model, self.rows, self.reading, self.device = model, rows, reading, torch.device(device)
        self.model.to(self.device).train()  # type: ignore[arg-type]  # transformers wraps `to` without its types
        self.optimizers = optimizers(model)
        self.done = 0
        self.earlier, self.started = 0.0, time.monotonic()
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]

    @property
    def seconds(self) -> float:
        """Seconds since the start, those of earlier processes included."""
        return self.earlier + time.monotonic() - self.started

    def step(self) -> float:
        """Takes one optimizer step; returns the loss in nats per token."""
        steps = self.reading.steps
        share = min(1.0, (self.done + 1) / WARM_UP_STEPS, max(0.02, 2 * (steps - self.done) / steps))
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
        ids = torch.tensor([*itertools.islice(self.rows, self.reading.batch_rows)], device=self.device)
        with half_precision(self.device):
            logits: Tensor = self.model(input_ids=ids[:, :-1]).logits
        if self.weigh is None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        else:
            each = nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
            weights = self.weigh(ids)[:, 1:]
            loss = (weights * each).sum() / weights.sum()
        self.model.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.done += 1
        return loss.item()

    def store(self, path: Path) -> None:
        """Writes weights, optimizer state and place in the text to one safetensors file, replaced as a whole."""
        tensors = {f"model/{name}": w.detach().cpu().contiguous() for name, w in self.model.named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    tensors[f"optimizer{number}/{index}/{name}"] = value.detach().cpu().contiguous()
        part = path.with_name(path.name + ".part")
        facts = {
            "done": str(self.done),
            "seconds": str(self.seconds),
            "reading": json.dumps(asdict(self.reading), sort_keys=True),
        }
        save_file(tensors, str(part), metadata=facts)
        part.replace(path)

    def take_up(self, path: Path) -> None:
        """Resumes where `store` left off; the next steps are those of a run that never stopped.

        They are equal to the last bit on the same device with as many threads.

        Raises:
            BadValue: If the checkpoint belongs to another run.
        """
        facts = _metadata(path)
        stored = build(Reading, json.loads(facts["reading"]))
        if stored != self.reading:
            other = [n for n in asdict(stored) if getattr(stored, n) != getattr(self.reading, n)]
            raise BadValue(
                f"the checkpoint {str(path)!r} is of a run with another {', '.join(other)}: ask for the same"
            )
        tensors = load_file(str(path), device=str(self.device))
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(tensors[f"model/{name}"])
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                place, _, name = key.partition("/")
                if place == f"optimizer{number}":
                    index, _, name = name.partition("/")
                    state.setdefault(int(index), {})[name] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.done, self.earlier = int(facts["done"]), float(facts["seconds"])
        skipped = self.done * self.reading.batch_rows
        next(itertools.islice(self.rows, skipped, skipped), None)


def digest_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all properties that decide the tokens of a text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def save_model(model: Any, tokenizer: Any, out: Path, card_of: Callable[[Path], Mapping[str, Any]]) -> None:
    """Writes model (bfloat16), tokenizer and `card.json` to one folder, which replaces an earlier one at once.

    Args:
        model: The model; it stays as it is.
        tokenizer: Its tokenizer.
        out: The folder.
        card_of: Makes the card from the unfinished folder; the hash of the weights is added here.
    """
    out = out.resolve()  # so that the working directory and links can be replaced, too
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    weights = unfinished / "model.safetensors"
    weights.chmod(0o644)  # safetensors writes for the owner alone; wheels keep the mode
    card = {**card_of(unfinished), "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    (unfinished / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)


def _metadata(path: Path) -> Mapping[str, str]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            found: Mapping[str, str] = json.loads(file.read(length))["__metadata__"]
    except (OSError, ValueError, KeyError) as problem:
        raise BadValue(f"no checkpoint can be read in {str(path)!r}: {problem}") from problem
    return found


def half_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 if that is fast; a CPU without its instructions would be slower with it."""
    fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, lines: Sequence[Sequence[int]], batch: int = 64) -> float:
    """Mean negative log-likelihood in nats per token of token rows, each after a BOS.

    Args:
        model: A model in any mode; it is evaluated without dropout and without gradient.
        tokenizer: Its BOS precedes each row and is not counted.
        lines: Token ids, the end mark included; rows beyond the model's context are cut.
        batch: Rows at once.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    order = sorted(range(len(lines)), key=lambda i: len(lines[i]))
    for at in range(0, len(order), batch):
        rows = [[tokenizer.bos_token_id, *lines[i]][:CONTEXT] for i in order[at : at + batch]]
        ids, mask = (t.to(model.device) for t in padded(rows, tokenizer.pad_token_id))
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total += float((losses * mask[:, 1:]).sum())
        count += int(mask[:, 1:].sum())
    model.train(was_training)
    return total / max(count, 1)


def mean_loss(losses: Sequence[float]) -> float:
    """Mean of the last hundred losses."""
    return round(float(np.mean(losses[-100:])), 4)
