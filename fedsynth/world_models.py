"""Pretraining of the small models that the offline demo ships."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fedsynth.gates import GATES, measure_gates
from fedsynth.pretraining import Pretraining, Reading, Shape, digest_of, mean_loss, new_model, save_model
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
    reading = Reading(steps, BATCH_ROWS, ROW_TOKENS, seed, world.name, digest_of(tokenizer), recipe.shape)
    trained = Pretraining(model, _rows(blocks, tokenizer.bos_token_id), reading)
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
    """Saves model, tokenizer and card; the gates are measured on the model as saved."""

    def measured(folder: Path) -> dict[str, Any]:
        saved: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return card | {"gates_required": GATES[role], "gates": measure_gates(world, saved.eval(), tokenizer, role)}

    save_model(model, tokenizer, out, measured)
    whole: dict[str, Any] = json.loads((out / "card.json").read_text(encoding="utf-8"))
    return whole


def _rows(blocks: Iterable[Sequence[int]], bos: int) -> Iterator[list[int]]:
    """Rows of `ROW_TOKENS` tokens: whole blocks, each after a BOS, the last one cut: what follows a cut would have lost
    the style of its block."""
    row: list[int] = []
    for block in blocks:
        row += [bos, *block]
        if len(row) >= ROW_TOKENS:
            yield row[:ROW_TOKENS]
            row = []


class _Counted(Iterator[str]):
    """Blocks, counted as they are read."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self.blocks = blocks
        self.count = 0

    def __next__(self) -> str:
        block = next(self.blocks)
        self.count += 1
        return block
