"""Several clients' adapters in one pass of the model, beside one client at a time.

    python simulations/benchmarks/stacked.py [--json FILE] [--repeats 5] [--sizes toy,small,15m]

A step is one of DP-SGD on a LoRA of rank 8 on all linear layers, with noise of a grant's stream and Adam; of a stack it
is one of each of its clients, and its time is divided by their number. It is held against the usual recipe (PEFT with
Opacus' hooks and torch's noise, float32, one client at a time) and against this project's own step for one. Models are
random Llamas in float32, as a guarantee asks for. All texts of a case have one length, and stacks are as wide as the
design's bars say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from dp_step import CLIP_NORM, SIGMA, VOCABULARY, batch_of, private
from measuring import Bar, at_least, figure, options, seconds, told
from transformers import LlamaConfig, LlamaForCausalLM

from fedsynth.dpsgd.stacked import stacked
from fedsynth.models.adapters import attach_lora, read_adapter, stack_of
from fedsynth.models.devices import device
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.training.dp_training import add_noise, clipped_sums

SIZES = {"toy": (64, 128, 2, 4), "small": (128, 256, 4, 4), "15m": (384, 1024, 6, 6)}  # width, inner, layers, heads
# Size, texts of each client, their length, clients, and the least gain on the usual recipe (on CPUs).
CASES = [
    ("toy", 4, 16, 32, 5.0),
    ("toy", 8, 32, 32, None),
    ("small", 4, 32, 8, 2.5),
    ("small", 8, 64, 8, None),
    ("15m", 4, 16, 16, None),
    ("15m", 4, 64, 8, None),
    ("15m", 8, 64, 4, None),
    ("15m", 16, 64, 4, None),
]


def built(size: str) -> Any:
    """A random model of a size."""
    width, inner, layers, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=min(VOCABULARY, 16 * width),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).to(device())


def with_lora(size: str) -> Any:
    """With a LoRA."""
    return attach_lora(built(size), rank=8, alpha=16.0, seed=0).train()


def stack_step(model: Any, clients: int) -> Callable[[list[Any]], None]:
    """A step of each of so many clients, each on the same texts, with noise of its own."""
    factors = stack_of(model, [read_adapter(model, "")] * clients).factors
    streams = [GrantRandomness(client.to_bytes(32, "big")) for client in range(clients)]
    opened = ExitStack()
    clip = opened.enter_context(stacked(model, factors, CLIP_NORM))
    optimizer = torch.optim.Adam([clip.weights], lr=1e-4)

    def step(batch: list[Any], _: ExitStack = opened) -> None:  # held as long as the step is
        units = [[(text,) for text in batch]] * clients
        sums = clipped_sums(clip, model, units, pad=0, max_physical_batch_size=clients * len(batch))
        for total, stream in zip(sums, streams, strict=True):
            add_noise(total, SIGMA * CLIP_NORM, stream)
        clip.weights.grad = sums.div_(len(batch))
        optimizer.step()

    return step


def measured(size: str, count: int, length: int, clients: int, least: float | None, repeats: int) -> list[Bar]:
    """The bars of one case."""
    vocabulary = built(size).config.vocab_size
    batch = [type(text)(tuple(t % (vocabulary - 3) + 3 for t in text.tokens), 1) for text in batch_of(count, length)]
    steps = {
        "usual": private(with_lora(size), "hooks", secret=False),
        "alone": private(with_lora(size), "bookkeeping"),
        "stack": stack_step(with_lora(size), clients),
    }
    took = seconds({name: partial(step, batch) for name, step in steps.items()}, repeats)
    each = {name: took[name] / (clients if name.startswith("stack") else 1) for name in took}
    case = f"{size} {count}x{length}, {clients} clients"
    bars = [figure(f"{name}: milliseconds per client", case, 1000 * each[name]) for name in each]
    bars.append(figure("stacked faster than alone", case, each["alone"] / each["stack"]))
    name, gain = "stacked faster than PEFT with Opacus' hooks", each["usual"] / each["stack"]
    return [*bars, figure(name, case, gain) if least is None else at_least(name, case, gain, least)]


def on_gpu(repeats: int) -> list[Bar]:
    """64 clients of 15 million parameters, on a GPU."""
    if not torch.cuda.is_available():
        print("no CUDA GPU here: not measured", file=sys.stderr)
        return []
    batch = batch_of(8, 64)
    vocabulary = built("15m").config.vocab_size
    batch = [type(text)(tuple(t % (vocabulary - 3) + 3 for t in text.tokens), 1) for text in batch]
    alone = private(with_lora("15m"), "bookkeeping")
    stack = stack_step(with_lora("15m"), 64)
    took = seconds({"alone": partial(alone, batch), "stack": partial(stack, batch)}, repeats)
    return [
        at_least("stacked faster than alone on a GPU", "15m 8x64, 64 clients", 64 * took["alone"] / took["stack"], 20)
    ]


def main(arguments: list[str]) -> int:
    """Prints the table; 1 where a bar is not kept."""
    parser = options(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--sizes", default="toy,small,15m", help="which models (default: all three)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bars: list[Bar] = []
    for size, count, length, clients, least in CASES:
        if size in chosen.sizes.split(","):
            bars += measured(size, count, length, clients, None if torch.cuda.is_available() else least, chosen.repeats)
            print(f"{size} {count}x{length} done", file=sys.stderr, flush=True)
    return told([*bars, *on_gpu(chosen.repeats)], chosen.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
