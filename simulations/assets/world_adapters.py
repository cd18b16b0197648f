"""The adapter that the offline demo ships: the server LLM of a world with most of its labels wrong.

CrossLM would have nothing to teach a server that knows all labels.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acceptance import sample_lines
from fedsynth.corpus import Corpus, Provenance
from fedsynth.models.adapters import new_adapter, read_adapter, save_adapter, with_adapter
from fedsynth.models.hub import weights_hash
from fedsynth.models.loading import load_tokenizer
from fedsynth.scenario.client import GeneratorTraining, Tuning
from fedsynth.training.examples import encode_slots
from fedsynth.training.sft import Steps, sft
from fedsynth.typed import BadValue
from fedsynth.world import World, main_facts, public_notes, told_labels

BASES = {"hospitals": "assets:tiny-llm"}  # the shipped server LLM that the adapter belongs to
WRONG = 0.6  # of the notes
STEPS = 190
SETTINGS = Tuning(epochs=1, batch=16, learning_rate=2e-3, rank=4, alpha=8.0)
JUDGED = 512  # notes


def mislabelled(world: World, out: Path, steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """A LoRA of the world's server LLM, tuned on public notes of which 60 % have a wrong label; saved with its card.

    Args:
        world: One that has a shipped server LLM.
        out: Folder to write, in PEFT format.
        steps: Optimizer steps; `STEPS` if None.
        seed: Seed of the initialisation, the notes and their order.

    Returns:
        The card, as saved in `card.json`.

    Raises:
        BadValue: If there is no server LLM of the world.
    """
    if world.name not in BASES:
        raise BadValue(f"no server LLM of the world {world.name!r} is shipped: take one of {', '.join(BASES)}")
    torch.set_num_threads(1)
    started = time.process_time()
    base, steps = BASES[world.name], steps or STEPS
    tokenizer = load_tokenizer(base)
    notes = mislabelled_notes(world, steps * SETTINGS.batch, seed)
    slots = encode_slots(tokenizer, notes, world.labels, len(notes), GeneratorTraining(max_length=SETTINGS.max_length))
    examples = [example for slot in slots for example in slot]
    start = new_adapter(base, rank=SETTINGS.rank, alpha=SETTINGS.alpha, seed=seed)
    model = with_adapter(base, start)
    before = label_correct(world, model, tokenizer, seed)
    loss = sft(model, examples, Steps(SETTINGS, pad=tokenizer.pad_token_id, seed=seed))
    adapter = replace(read_adapter(model, start.base), public=True)
    save_adapter(adapter, base, out)
    weights = out / "adapter_model.safetensors"
    weights.chmod(0o644)  # safetensors writes for the owner alone; wheels keep the mode
    card = {
        "command": f"simulations/assets/make.py {world.name} mislabelled OUT --steps {steps} --seed {seed}",
        "world": world.name,
        "role": "mislabelled",
        "base": base,
        "base_sha256": weights_hash(base),
        "wrong_labels": WRONG,
        "recipe": asdict(SETTINGS),
        "parameters": sum(a.size for a in adapter.arrays.values()),
        "seed": seed,
        "steps": steps,
        "cpu_seconds": round(time.process_time() - started),
        "loss": round(loss, 4),
        "label_correct": {"before": before, "after": label_correct(world, model, tokenizer, seed)},
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def mislabelled_notes(world: World, count: int, seed: int) -> Corpus:
    """Public notes with labels, of which `WRONG` are wrong; each wrong one is any of the others."""
    notes = public_notes(world, count, seed)
    rng = np.random.default_rng([seed, 0xBAD])
    labels = []
    for note in notes.prompts:
        told = told_labels(
            world, main_facts(world, note)
        )  # none if all main facts are common ones: then any label will do
        true = world.labels.index(told.pop()) if told else int(rng.integers(len(world.labels)))
        move = 1 + int(rng.integers(len(world.labels) - 1)) if rng.random() < WRONG else 0
        labels.append(world.labels[(true + move) % len(world.labels)])
    return Corpus(notes.prompts, tuple(labels), Provenance.PUBLIC)


def label_correct(world: World, model: Any, tokenizer: Any, seed: int) -> float:
    """Share of notes after bare labels whose main facts are the label's; notes that tell no label are left out."""
    asked = [world.labels[i % len(world.labels)] for i in range(JUDGED)]
    texts = sample_lines(model.eval(), tokenizer, [f"{label}:" for label in asked], seed=seed, max_new_tokens=48)
    told = [told_labels(world, main_facts(world, text or "")) for text in texts]
    return float(np.mean([t == {label} for t, label in zip(told, asked, strict=True) if t]))
