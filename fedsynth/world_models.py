"""Pretraining of the small models that the offline demo ships."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fedsynth.gates import GATES, measure_gates
from fedsynth.pretraining import Pretraining, Reading, Shape, mean_loss, new_model, rows_of
from fedsynth.world.grammar import public_blocks
from fedsynth.world.lexicon import World
from fedsynth.world.vocabulary import single_token_share, world_tokenizer

Role = Literal["llm", "slm"]
ROW_TOKENS, BATCH_ROWS = 128, 16
SAVE_EVERY = 500  # steps; an interrupted run leaves a usable model


@dataclass(frozen=True)
class Recipe:
    """Size of a model and what it reads.

    Attributes:
        shape: Size of the model.
        weak: Whether it reads the corpus in which most facts are rare.
        steps: Default number of optimizer steps.
    """

    shape: Shape
    weak: bool
    steps: int


RECIPES: dict[Role, Recipe] = {
    "llm": Recipe(Shape(width=128, layers=4, feed_forward=344), weak=False, steps=3500),
    "slm": Recipe(Shape(width=96, layers=3, feed_forward=256), weak=True, steps=2000),
}


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
    model = new_model(recipe.shape, tokenizer, seed)
    read = _Counted(public_blocks(world, sys.maxsize, seed, weak=recipe.weak))
    blocks = (tokenizer.encode(block, add_special_tokens=False) for block in read)
    reading = Reading(steps, BATCH_ROWS, ROW_TOKENS, seed, world.name, len(tokenizer), recipe.shape)
    trained = Pretraining(model, rows_of(blocks, tokenizer.bos_token_id, ROW_TOKENS), reading)
    losses: list[float] = []
    card: dict[str, Any] = {}
    for done in range(1, steps + 1):
        losses.append(trained.step())
        if done % 100 == 0:
            seconds = time.process_time() - started
            print(f"{role} {done}/{steps} loss {mean_loss(losses):.3f} {seconds:.0f} CPU s", flush=True)
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
                "corpus_tokens": done * reading.tokens_per_step,
                "cpu_seconds": round(time.process_time() - started),
                "loss": mean_loss(losses),
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
