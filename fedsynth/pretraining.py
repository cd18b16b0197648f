"""Pretraining of the small models that the offline demo ships."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsynth.gates import GATES, measure_gates
from fedsynth.world.grammar import public_blocks
from fedsynth.world.lexicon import World
from fedsynth.world.vocabulary import single_token_share, world_tokenizer

Role = Literal["llm", "slm"]
ROW_TOKENS, BATCH_ROWS = 128, 16
WARM_UP_STEPS = 60
SAVE_EVERY = 500  # steps; an interrupted run leaves a usable model
MUON_RATE, ADAM_RATE = 0.02, 4e-3
# Deviation of the embeddings' start. Blocks write at a scale near 1; with embeddings six times shorter the server's
# model learnt to copy templates and labels in 3,500 steps, but not the register of its demonstrations.
EMBEDDING_SCALE = 0.5


@dataclass(frozen=True)
class Recipe:
    """Size of a model and what it reads.

    Attributes:
        width: Hidden size.
        layers: Number of blocks.
        feed_forward: Inner size of the feed-forward layers.
        weak: Whether it reads the corpus in which most facts are rare.
        steps: Default number of optimizer steps.
    """

    width: int
    layers: int
    feed_forward: int
    weak: bool
    steps: int


RECIPES: dict[Role, Recipe] = {
    "llm": Recipe(width=128, layers=4, feed_forward=344, weak=False, steps=3500),
    "slm": Recipe(width=96, layers=3, feed_forward=256, weak=True, steps=2000),
}


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama at its random start."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
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
        model.model.embed_tokens.weight.mul_(EMBEDDING_SCALE * recipe.width**0.5)
        model.model.norm.weight.fill_(1 / (EMBEDDING_SCALE * recipe.width**0.5))
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


def rows_of(blocks: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Rows of `ROW_TOKENS` tokens: whole blocks, each after a BOS, the last one cut."""
    row: list[int] = []
    for block in blocks:
        row += [tokenizer.bos_token_id, *tokenizer.encode(block, add_special_tokens=False)]
        if len(row) >= ROW_TOKENS:
            yield row[:ROW_TOKENS]
            row = []


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, blocks: Iterable[str], steps: int
) -> Iterator[tuple[int, float]]:
    """Trains in place; yields (steps done, loss in nats per token) after each step.

    The rate warms up, stays, and falls linearly over the second half.
    """
    model.train()
    trained = optimizers(model)
    groups = [group for optimizer in trained for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    rows = rows_of(blocks, tokenizer)
    for step in range(steps):
        share = min(1.0, (step + 1) / WARM_UP_STEPS, max(0.02, 2 * (steps - step) / steps))
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * share
        ids = torch.tensor([*itertools.islice(rows, BATCH_ROWS)])
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = model(input_ids=ids[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        model.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in trained:
            optimizer.step()
        yield step + 1, loss.item()
    model.train(False)


def pretrain_asset(world: World, role: Role, out: Path, steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Pretrains one shipped model on one thread, measures its gates and saves it with its card.

    Args:
        world: What it reads.
        role: "llm" for the server's model, "slm" for the clients'.
        out: Folder to write; replaced as a whole at every save.
        steps: Optimizer steps; the recipe's number if None.
        seed: Of the start and of the corpus.

    Returns:
        The card, as saved in `card.json`.
    """
    torch.set_num_threads(1)  # small matrices: more threads cost more than they give
    recipe = RECIPES[role]
    steps = steps or recipe.steps
    options = f"--world {world.name} --role {role} --steps {steps} --seed {seed}"
    started = time.process_time()
    tokenizer = world_tokenizer(world)
    model = new_model(recipe, tokenizer, seed)
    read = _Counted(public_blocks(world, sys.maxsize, seed, weak=recipe.weak))
    losses: list[float] = []
    card: dict[str, Any] = {}
    for done, loss in pretrain(model, tokenizer, read, steps):
        losses.append(loss)
        if done % 100 == 0:
            seconds = time.process_time() - started
            print(f"{role} {done}/{steps} loss {np.mean(losses[-100:]):.3f} {seconds:.0f} CPU s", flush=True)
        if done % SAVE_EVERY == 0 or done == steps:
            card = {
                "command": f"fedsynth pretrain {options}",
                "world": world.name,
                "role": role,
                "recipe": asdict(recipe),
                "parameters": sum(p.numel() for p in model.parameters()),
                "vocabulary": len(tokenizer),
                "single_token_share": single_token_share(world, tokenizer),
                "seed": seed,
                "steps": done,
                "corpus_blocks": read.count,
                "corpus_tokens": done * BATCH_ROWS * ROW_TOKENS,
                "cpu_seconds": round(time.process_time() - started),
                "loss": round(float(np.mean(losses[-100:])), 4),
            }
            card = save_asset(world, role, model, tokenizer, card, out)
            print(f"{role} {done}/{steps} {card['gates']}", flush=True)
    return card


def save_asset(
    world: World,
    role: Role,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    card: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Saves model (bfloat16), tokenizer and card; the gates are measured on the model as saved."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    halved: Any = copy.deepcopy(model)
    halved.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone; wheels keep the mode
    saved: Any = LlamaForCausalLM.from_pretrained(unfinished, dtype=torch.float32)
    card = card | {
        "sha256": hashlib.sha256((unfinished / "model.safetensors").read_bytes()).hexdigest(),
        "gates_required": GATES[role],
        "gates": measure_gates(world, saved.eval(), tokenizer, role),
    }
    (unfinished / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)
    return card


class _Counted(Iterator[str]):
    """Blocks, counted as they are read."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self.blocks = blocks
        self.count = 0

    def __next__(self) -> str:
        block = next(self.blocks)
        self.count += 1
        return block
