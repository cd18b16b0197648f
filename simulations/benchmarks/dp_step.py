"""One step of DP-SGD beside one of plain training, and beside Opacus' ways to clip.

    python simulations/benchmarks/dp_step.py [--json FILE] [--repeats 5] [--cases lora,full,real,persons,bfloat16]

Models have the widths of one of 15 million parameters (384, inner 1,024, 8,192 tokens) and 2 layers: the ratios depend
on widths, batch and length, not on depth. A step draws nothing: it passes one batch, clips, adds noise of a grant's
stream, and lets Adam go one step; plain training does the same without clip and noise, in the same precision (float32:
no private step is taken in another). `real` is a LoRA of SmolLM2-135M-Instruct (`models:smollm2-135m-instruct` under
FEDSYNTH_MODELS), whole. `persons` has 4 texts of each person in the batch. `bfloat16` is plain training of a LoRA on
all 6 layers, with the base in half precision and in float32, what a whole training of each ends at, and a private step
in float32 beside a plain one in half precision.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import Bar, at_least, at_most, figure, options, peak_bytes, seconds, told
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fedsynth.dpsgd import CLIPPING, Clipping, clipper
from fedsynth.models.adapters import attach_lora
from fedsynth.models.devices import device
from fedsynth.models.loading import computes_in_bfloat16, load_generator
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.training.dp_training import add_noise, mean_loss, next_token_losses, train_generator, without_guarantee
from fedsynth.training.examples import Example

CLIP_NORM, SIGMA, VOCABULARY = 1.0, 1.0, 8192
SHAPES = [(8, 64), (32, 64), (8, 256)]
REAL = "models:smollm2-135m-instruct"


def built(family: str, *, tied: bool = True, layers: int = 2) -> Any:
    """A random model of the widths of one of 15 million parameters."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    if family == "llama":
        config = LlamaConfig(
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=layers,
            num_attention_heads=6,
            max_position_embeddings=512,
            **common,
        )
        return LlamaForCausalLM(config)
    if family == "gpt2":
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(GPT2Config(n_embd=384, n_layer=layers, n_head=6, n_positions=512, **none, **common))
        model.transformer.wpe.requires_grad_(False)  # Opacus has no gradient per example of what is shared by all
        return model
    config = T5Config(
        d_model=384,
        d_ff=1024,
        d_kv=64,
        num_layers=layers,
        num_heads=6,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **common,
    )
    model = T5ForConditionalGeneration(config)
    for name, weight in model.named_parameters():  # the same table for all examples: no gradient per example
        weight.requires_grad_("relative_attention_bias" not in name)
    return model


def batch_of(count: int, length: int) -> list[Example]:
    """Texts of one length; T5 reads half of each and learns the other half."""
    rng = np.random.default_rng(0)
    return [Example(tuple(rng.integers(3, VOCABULARY, length).tolist()), length // 2) for _ in range(count)]


def private(
    model: nn.Module, clipping: Clipping, *, noise: bool = True, secret: bool = True
) -> Callable[[list[Example]], None]:
    """A step of DP-SGD. The engine is opened once, as a training does, and stays open with the model.

    The noise is of a grant's stream, or torch's, which anybody can predict.
    """
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer, stream = torch.optim.Adam(weights, lr=1e-4), GrantRandomness(bytes(32))
    opened = ExitStack()
    clip = opened.enter_context(clipper(model, CLIP_NORM, clipping))

    def step(batch: list[Example], _: ExitStack = opened) -> None:  # held as long as the step is
        clip.add(lambda: next_token_losses(model, batch, 0), range(len(batch)))
        sums = clip.take()
        for weight, total in zip(weights, sums, strict=True):
            if noise and secret:
                add_noise(total, SIGMA * CLIP_NORM, stream)
            elif noise:
                total += SIGMA * CLIP_NORM * torch.randn_like(total)
            weight.grad = total.div_(len(batch))
        optimizer.step()

    return step


def plain(model: nn.Module) -> Callable[[list[Example]], None]:
    """A step of plain training."""
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=1e-4)

    def step(batch: list[Example]) -> None:
        optimizer.zero_grad(set_to_none=True)
        next_token_losses(model, batch, 0).mean().backward()
        optimizer.step()

    return step


def measured(family: str, mode: str, count: int, length: int, ways: tuple[str, ...], repeats: int) -> list[Bar]:
    """All bars of one model, mode and shape."""

    def prepared() -> Any:
        # Opacus' ghost mode knows no tied weights: GPT-2 and Llama are compared untied, T5 not at all.
        model = built(family, tied=family == "t5" or mode == "lora").to(device())
        return (attach_lora(model, rank=8, alpha=16.0, seed=0) if mode == "lora" else model).train()

    batch, steps = batch_of(count, length), {"plain": plain(prepared())}
    for way in ways:
        steps[way] = private(prepared(), way)
    if mode == "full":
        steps["without noise"] = private(prepared(), "bookkeeping", noise=False)
    runs = {name: partial(step, batch) for name, step in steps.items()}
    took = seconds(runs, repeats)
    held = {name: peak_bytes(run) for name, run in runs.items() if name != "without noise"}
    case = f"{family} {mode} {count}x{length}"
    own, slow = took["bookkeeping"], 1.12 if mode == "lora" else (1.45 if count < 32 else 1.25)
    bars = [
        at_most("time of plain training", case, own / took["plain"], slow),
        at_most("memory of plain training", case, held["bookkeeping"] / held["plain"], 1.05 if mode == "lora" else 1.1),
    ]
    if mode == "full":
        bars.append(figure("time of plain training, without noise", case, took["without noise"] / took["plain"]))
    if "hooks" in ways and mode == "full":
        bars.append(at_least("faster than Opacus hooks", case, took["hooks"] / own, 1.6))
        bars.append(at_most("memory of Opacus hooks", case, held["bookkeeping"] / held["hooks"], 0.3))
    elif "hooks" in ways:
        bars.append(at_most("time of Opacus hooks", case, own / took["hooks"], 1.05))
    if "ghost" in ways:
        bars.append(at_least("faster than Opacus ghost", case, took["ghost"] / own, 1.5 if mode == "full" else 1.4))
    return bars


def real(repeats: int) -> list[Bar]:
    """A LoRA of a model that is really used."""
    steps = {
        name: make(attach_lora(load_generator(REAL).to(device()), rank=8, alpha=16.0, seed=0).train())
        for name, make in {"plain": plain, "private": partial(private, clipping="bookkeeping")}.items()
    }
    bars = []
    for count, length in SHAPES[:1]:
        batch = batch_of(count, length)
        took = seconds({name: partial(step, batch) for name, step in steps.items()}, repeats)
        ratio = took["private"] / took["plain"]
        bars.append(at_most("time of plain training", f"SmolLM2-135M lora {count}x{length}", ratio, 1.05))
    return bars


def persons(repeats: int) -> list[Bar]:
    """Clipping the summed gradient of 4 texts of each person, beside clipping each text."""
    bars, batch = [], batch_of(32, 64)
    for mode in ("lora", "full"):
        model = built("llama").to(device())
        model = (attach_lora(model, rank=8, alpha=16.0, seed=0) if mode == "lora" else model).train()

        def step(units: list[int], model: Any = model) -> None:
            with clipper(model, CLIP_NORM) as clip:
                clip.add(lambda: next_token_losses(model, batch, 0), units)
                clip.take()

        took = seconds(
            {"texts": lambda: step(list(range(32))), "persons": lambda: step([i // 4 for i in range(32)])}, repeats
        )
        bars.append(
            figure("time of text-level clipping", f"llama {mode} 8 persons x 4", took["persons"] / took["texts"])
        )
    return bars


def bfloat16(repeats: int) -> list[Bar]:
    """A frozen base in half precision: time of a step, and the loss at which a whole training ends."""
    if not (torch.cuda.is_available() or computes_in_bfloat16()):
        print("no bfloat16 here: not measured", file=sys.stderr)
        return []
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    bars = []
    for count, length in ((8, 64), (16, 64), (8, 256)):
        models = {
            name: attach_lora(built("llama", layers=6).to(device(), kind), rank=8, alpha=16.0, seed=0).train()
            for name, kind in kinds.items()
        }
        batch = batch_of(count, length)
        runs = {name: partial(plain(m), batch) for name, m in models.items()}
        safe = attach_lora(built("llama", layers=6).to(device()), rank=8, alpha=16.0, seed=0).train()
        runs["private"] = partial(private(safe, "bookkeeping"), batch)
        took = seconds(runs, repeats)
        case = f"llama lora {count}x{length}, 6 layers"
        bars.append(at_least("bfloat16 faster than float32", case, took["float32"] / took["bfloat16"], 1.8))
        bars.append(figure("time of plain training in bfloat16", case, took["private"] / took["bfloat16"]))
    ends = {name: _trained(kind) for name, kind in kinds.items()}
    gap = abs(ends["bfloat16"][1] / ends["float32"][1] - 1)
    print(
        f"loss of a whole training: from {ends['float32'][0]:.3f} to {ends['float32'][1]:.4f} (float32), "
        f"{ends['bfloat16'][1]:.4f} (bfloat16)",
        file=sys.stderr,
    )
    return [*bars, at_most("loss beside float32", "60 steps, 6 layers", gap, 0.01)]


def _trained(kind: Any) -> tuple[float, float]:
    """Loss before and after 60 steps without clip and noise, on texts of 40 tokens that each follow from the one
    before."""
    rng = np.random.default_rng(0)
    follows = rng.integers(3, VOCABULARY, size=(64, 4))
    texts = []
    for _ in range(400):
        row = [int(rng.integers(64))]
        while len(row) < 40:
            row.append(int(follows[row[-1] % 64, rng.integers(4)]))
        texts.append(Example(tuple(row), 1))
    model = attach_lora(built("llama", layers=6).to(device(), kind), rank=8, alpha=16.0, seed=0)
    settings = GeneratorTraining(learning_rate=5e-3, max_physical_batch_size=32, expected_batch_size=16, steps=60)
    before = mean_loss(model, texts[320:], pad=0, batch=80)
    training = without_guarantee([(text,) for text in texts[:320]], settings, seed=0)
    train_generator(model, training, settings, pad=0)
    return before, mean_loss(model, texts[320:], pad=0, batch=80)


def main(arguments: list[str]) -> int:
    """Prints the table; 1 where a bar is not kept."""
    parser = options(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--cases", default="lora,full,real,persons,bfloat16", help="which of these (default: all)")
    parser.add_argument("--families", default="llama,gpt2,t5", help="which models (default: all three)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bars: list[Bar] = []
    cases = chosen.cases.split(",")
    for mode in [case for case in cases if case in ("lora", "full")]:
        for family in chosen.families.split(","):
            for count, length in SHAPES:
                # Opacus is compared at the shape of the design's bars: its memory at longer texts is another story.
                every = CLIPPING if (count, length) == (8, 64) else CLIPPING[:1]
                ways = tuple(way for way in every if way != "ghost" or family != "t5" or mode == "lora")
                bars += measured(family, mode, count, length, ways, chosen.repeats)
                print(f"{family} {mode} {count}x{length} done", file=sys.stderr, flush=True)
    bars += real(chosen.repeats) if "real" in cases else []
    bars += persons(chosen.repeats) if "persons" in cases else []
    bars += bfloat16(chosen.repeats) if "bfloat16" in cases else []
    return told(bars, chosen.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
