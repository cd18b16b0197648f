"""Pretraining of the small models that the offline demo ships."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from acceptance import GATES, Role, measure_gates
from fedsynth.instructions import REPLY
from fedsynth.pretraining.causal_lm import Pretraining, Reading, Shape, digest_of, mean_loss, new_model, save_model
from fedsynth.world.grammar import public_blocks
from fedsynth.world.lexicon import World
from fedsynth.world.records import RARE_WEIGHT, public_records, public_terms
from world_tokenizers import Task, single_token_share, words_of, world_tokenizer

SAVE_EVERY = 500  # steps; an interrupted run leaves a usable model


@dataclass(frozen=True)
class Recipe:
    """Size of a model and what it reads.

    Attributes:
        shape: Size of the model.
        task: Notes after their labels, or records.
        weak: The model reads the corpus in which most facts are rare.
        steps: Default number of optimizer steps.
        batch_rows: Rows per step.
        row_tokens: Tokens per row; seven records have about 200.
        question_weight: For records: the initial weight in the loss of a question's tokens; an answer's have 1.
        answers_first: Share of the steps after which all tokens count alike, so that the model writes questions too.
    """

    shape: Shape
    task: Task
    weak: bool
    steps: int
    batch_rows: int = 16
    row_tokens: int = 128
    question_weight: float = 1.0
    answers_first: float = 1.0


RECIPES: dict[Role, Recipe] = {
    "llm": Recipe(Shape(width=128, layers=4, feed_forward=344), "notes", weak=False, steps=3500),
    "slm": Recipe(Shape(width=96, layers=3, feed_forward=256), "notes", weak=True, steps=2000),
    "base": Recipe(Shape(96, 3, 256, heads=3), "records", True, 3000, 8, 256, question_weight=0.25, answers_first=0.25),
    "professional": Recipe(Shape(96, 3, 256, heads=3), "records", False, 1500, 8, 256, question_weight=0.05),
}


def pretrain_asset(world: World, role: Role, out: Path, steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Pretrains one shipped model on one thread, measures its gates and saves it with its card.

    Args:
        world: The world whose public corpus the model reads.
        role: "llm" for the server's model, "slm" for the clients'; for the instruction task, "base" for the clients'
            and "professional" for the server's.
        out: Folder to write; replaced as a whole at every save.
        steps: Optimizer steps; the recipe's number if None.
        seed: Seed of the initialisation and of the corpus.

    Returns:
        The card, as saved in `card.json`.
    """
    torch.set_num_threads(1)  # small matrices: more threads cost more than they give
    recipe = RECIPES[role]
    steps = steps or recipe.steps
    options = f"{world.name} {role} OUT --steps {steps} --seed {seed}"
    started = time.process_time()
    tokenizer = world_tokenizer(world, recipe.task)
    model = new_model(recipe.shape, tokenizer, seed)
    if recipe.task == "records":
        model.set_attn_implementation("eager")  # a third faster on a CPU at this size
    read = _Counted(_text(world, recipe, seed))
    blocks = (tokenizer.encode(block, add_special_tokens=False) for block in read)
    digest = digest_of(tokenizer)
    reading = Reading(steps, recipe.batch_rows, recipe.row_tokens, seed, world.name, digest, recipe.shape)
    weigh = None if recipe.task == "notes" else answers_first(tokenizer, recipe.question_weight)
    trained = Pretraining(model, _rows(blocks, tokenizer.bos_token_id, recipe.row_tokens), reading, weigh=weigh)
    losses: list[float] = []
    card: dict[str, Any] = {}
    for done in range(1, steps + 1):
        if done > recipe.answers_first * steps:
            trained.weigh = None
        losses.append(trained.step())
        if done % 100 == 0:
            seconds = time.process_time() - started
            print(f"{role} {done}/{steps} loss {mean_loss(losses):.3f} {seconds:.0f} CPU s", flush=True)
        if done % SAVE_EVERY == 0 or done == steps:
            card = {
                "command": f"simulations/assets/make.py {options}",
                "world": world.name,
                "role": role,
                "recipe": asdict(recipe),
                "parameters": sum(p.numel() for p in model.parameters()),
                "vocabulary": len(tokenizer),
                "single_token_share": single_token_share(words_of(world, recipe.task), tokenizer),
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


def answers_first(tokenizer: PreTrainedTokenizerFast, question_weight: float) -> Callable[[Tensor], Tensor]:
    """Weights of tokens in rows of records: 1 from a record's answer to its line end, `question_weight` elsewhere.

    Half of a record's tokens are random (the patient and the style of a note): their loss drowned that of the
    answers. With equal weights no answer was right after 500 steps, with .05 half of them were after 200.
    """
    *_, word, colon = tokenizer.encode(REPLY, add_special_tokens=False)
    end = tokenizer.eos_token_id

    def weigh(ids: Tensor) -> Tensor:
        place = torch.arange(1, ids.shape[1] + 1).expand_as(ids)
        before = torch.roll(ids, 1, dims=1)
        mark = (ids == colon) & (before == word)
        last_mark = torch.where(mark, place, 0).cummax(dim=1).values
        last_end = torch.where(ids == end, place, 0).roll(1, dims=1)
        last_end[:, 0] = 0
        inside = (last_mark > last_end.cummax(dim=1).values) & ~mark
        return torch.where(inside, 1.0, question_weight)

    return weigh


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


def _text(world: World, recipe: Recipe, seed: int) -> Iterator[str]:
    if recipe.task == "notes":
        return public_blocks(world, sys.maxsize, seed, weak=recipe.weak)
    records = public_records(world, sys.maxsize, seed, rare=RARE_WEIGHT if recipe.weak else 1.0)
    terms = public_terms(world, sys.maxsize, seed, departments_only=recipe.weak)
    return (block for pair in zip(records, terms, strict=True) for block in pair)


def _rows(blocks: Iterable[Sequence[int]], bos: int, row_tokens: int) -> Iterator[list[int]]:
    """Rows of `row_tokens` tokens: whole blocks, each after a BOS, the last one cut. The rest of a cut block would have
    lost its style and is not read."""
    row: list[int] = []
    for block in blocks:
        row += [bos, *block]
        if len(row) >= row_tokens:
            yield row[:row_tokens]
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
