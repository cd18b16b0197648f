"""The self-check's share of a client's work where each client starts from an adapter of its own.

Each start is another adapter of the shipped generator of `hospitals`, checked as `synthesize` checks it, before a
training of a few steps under DP-SGD. The first start of a process also pays for what is checked once.

    python simulations/benchmarks/selfcheck.py [--starts 5] [--steps 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from fedsynth.models.adapters import attach_lora
from fedsynth.models.devices import one_thread
from fedsynth.models.loading import load_frozen, load_tokenizer
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario.toml import load
from fedsynth.training.dp_training import private, train_generator
from fedsynth.training.examples import Example
from fedsynth.training.selfcheck import check_stack, self_check


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--starts", type=int, default=5)
    options.add_argument("--steps", type=int, default=5)
    given = options.parse_args()
    one_thread()
    client = load("hospitals").client
    settings = replace(client.generator_training, expected_batch_size=8)
    plan = DPPlan(40, 8, given.steps, 1, settings.clip_norm, 1.2, 1e-5)
    tokenizer = load_tokenizer(client.generator)
    pad = tokenizer.pad_token_id
    slots = [(Example(tuple((7 * i + j) % 500 + 5 for j in range(24)), 4),) for i in range(plan.records)]
    alone, stack, training = [], [], []
    for seed in range(given.starts):
        model = attach_lora(
            load_frozen(client.generator, settings.precision), rank=settings.rank, alpha=settings.alpha, seed=seed
        )
        alone.append(seconds(lambda model=model: self_check(model, plan, settings, pad=pad)))
        stack.append(seconds(lambda model=model: check_stack(model, plan, settings, pad=pad)))
        asked = private(slots, plan, GrantRandomness(bytes([seed]) * 32))
        training.append(seconds(lambda model=model, asked=asked: train_generator(model, asked, settings, pad=pad)))
    print("| CPU seconds | first start | each further start |")
    print("|---|---:|---:|")
    for name, taken in (
        ("self-check of the engine for one client", alone),
        ("self-check of the stacked engine", stack),
        (f"training, {given.steps} steps of 8 texts", training),
    ):
        print(f"| {name} | {taken[0]:.3f} | {statistics.median(taken[1:]):.3f} |")
    further = statistics.median(a / (a + t) for a, t in zip(alone[1:], training[1:], strict=True))
    print(f"share of the check beside its training, further starts: {further:.1%}")


if __name__ == "__main__":
    main()
