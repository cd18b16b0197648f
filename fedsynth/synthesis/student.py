"""The clients' model at the server: warmed up for their training, or as the student that writes and is taught."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from fedsynth.corpus import Corpus, Provenance
from fedsynth.instructions import ASK, asked, parse_record
from fedsynth.lora import Adapter, made_of
from fedsynth.models.adapters import merged, read_adapter, with_adapter
from fedsynth.models.devices import device
from fedsynth.models.encoding import token_ids
from fedsynth.models.loading import kind_of, load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.pretraining.public_text import sample
from fedsynth.scenario.schema import GeneratorTraining, Tuning, WarmStart
from fedsynth.scenario.task import Task
from fedsynth.synthesis.curation import Filtered, refuse_private
from fedsynth.training.engine import Engine
from fedsynth.training.examples import Learns, encode_records, encode_slots
from fedsynth.training.sft import Steps, sft


def write(
    engine: Engine,
    base: str,
    adapter: Adapter,
    count: int,
    sampling: SamplingParams,
    *,
    seed: int,
) -> Filtered:
    """Records that a model writes from the bare header of an instruction, without any example.

    Args:
        engine: Asks the model.
        base: Name of the adapter's base model.
        adapter: The adapter; the records are post-processing and have its guarantee.
        count: Number of requested records; those that do not end in time or lack instruction or response are dropped.
        sampling: Sampling of a record.
        seed: Public seed.

    Raises:
        fedsynth.models.adapters.WrongAdapter: If the adapter is not of this model.
    """
    tokenizer = load_tokenizer(base)
    writer = engine.serve(merged(base, adapter).to(device()), tokenizer)
    texts = writer.complete([ASK] * count, sampling, seed=seed)
    found: list[tuple[str, str]] = []
    dropped: Counter[str] = Counter()
    for text in texts:
        record = parse_record(text)
        if len(token_ids(tokenizer, text)) >= sampling.max_new_tokens:  # cut before its end
            dropped["unfinished"] += 1
        elif record is None:
            dropped["no record"] += 1
        else:
            found.append(record)
    prompts, answers = tuple(p for p, _ in found), tuple(a for _, a in found)
    return Filtered(Corpus(prompts, answers, Provenance.LLM_WRITTEN, adapter.grants), dict(dropped))


def draw(base: str, source: str, count: int, max_new_tokens: int, *, seed: int) -> Filtered:
    """Public instructions in place of written ones; a record of `max_new_tokens` must hold them.

    Args:
        base: Name of the model whose tokenizer counts.
        source: Corpus file or world, as `server.public`.
        count: Number of draws, before any are left out.
        max_new_tokens: Most tokens of a record.
        seed: Public seed.
    """
    corpus, tokenizer = sample(source, count, seed), load_tokenizer(base)
    fits = [
        row for row, prompt in enumerate(corpus.prompts) if len(token_ids(tokenizer, asked(prompt))) < max_new_tokens
    ]
    return Filtered(corpus.take(fits), {"too long": len(corpus) - len(fits)} if len(fits) < len(corpus) else {})


def taught(
    engine: Engine, base: str, start: Adapter, pairs: Corpus, settings: Tuning, *, loss_on: Learns, seed: int
) -> tuple[Adapter, float]:
    """An adapter trained on instructions and responses, and its mean loss (nats per token) in the last pass.

    Args:
        engine: Takes the steps.
        base: Name of the adapter's base model.
        start: The adapter to start from.
        pairs: Text that is free to use. The guarantee of the result is that of the text and the start.
        settings: Passes, batch, rate, longest example.
        loss_on: The whole record or the response alone.
        seed: Public seed of the order.
    """
    tokenizer, model = load_tokenizer(base), with_adapter(base, start).to(device())
    examples = encode_records(tokenizer, pairs, settings.max_length, kind_of(model.config), loss_on=loss_on)
    loss = sft(model, examples, Steps(settings, pad=tokenizer.pad_token_id, seed=seed), descend=engine.descend)
    return made_of(read_adapter(model, start.base), [start, pairs]), loss


def warm_start(
    engine: Engine, base: str, start: Adapter, texts: Corpus, settings: GeneratorTraining, task: Task, *, seed: int
) -> tuple[Adapter, float]:
    """An adapter for clients' generators to start from, and its mean loss (nats per token) in the last pass.

    Args:
        engine: Takes the steps.
        base: Name of the clients' generator.
        start: A new adapter.
        texts: Public or released texts and their labels. The guarantee of the result is theirs.
        settings: The clients' training; its `warm_start` gives passes, batch and rate, its `max_length` cuts texts.
        task: The card, which gives each label's control code.
        seed: Public seed of the order.

    Raises:
        ValueError: If the texts are private.
    """
    refuse_private(texts)
    how = settings.warm_start or WarmStart()
    tuning = Tuning(how.epochs, how.batch, how.learning_rate, settings.max_length, how.max_grad_norm)
    tokenizer, model = load_tokenizer(base), with_adapter(base, start).to(device())
    labels, alone = tuple(dict.fromkeys(texts.answers)), replace(settings, rows_per_unit=1)
    slots = encode_slots(tokenizer, texts, labels, len(texts), alone, kind_of(model.config), task=task)
    steps = Steps(tuning, pad=tokenizer.pad_token_id, seed=seed)
    loss = sft(model, [example for slot in slots for example in slot], steps, descend=engine.descend)
    return made_of(read_adapter(model, start.base), [start, texts]), loss
