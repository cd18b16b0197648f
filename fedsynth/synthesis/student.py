"""The clients' model at the server: warmed up for their training, or as the student that writes and is taught."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fedsynth.corpus import Corpus, Provenance
from fedsynth.lora import Adapter, made_of
from fedsynth.models.adapters import merged, read_adapter, with_adapter
from fedsynth.models.devices import device
from fedsynth.models.encoding import token_ids
from fedsynth.models.form import Learns, student_form
from fedsynth.models.loading import kind_of, load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.pretraining.public_text import sample
from fedsynth.scenario.client import GeneratorTraining, Tuning, WarmStart
from fedsynth.scenario.task import NO_CARD, Task
from fedsynth.synthesis.curation import Filtered, refuse_private
from fedsynth.training.checkpointing import checkpointed
from fedsynth.training.engine import Engine
from fedsynth.training.examples import encode_records, encode_slots
from fedsynth.training.sft import Steps, sft


def write(
    engine: Engine,
    base: str,
    adapter: Adapter,
    count: int,
    sampling: SamplingParams,
    *,
    seed: int,
    task: Task = NO_CARD,
    answered: bool = True,
) -> Filtered:
    """Records that a model writes from the bare header of an instruction, without any example.

    Args:
        engine: Asks the model.
        base: Name of the adapter's base model.
        adapter: The adapter; the records are post-processing and have its guarantee.
        count: Number of requested records; those that do not end in time or lack instruction or response are dropped.
        sampling: Sampling of a record.
        seed: Public seed.
        task: The card, which gives the form of a record.
        answered: A model that converses writes its own response, too, in a second call; else its responses are empty.

    Raises:
        fedsynth.models.adapters.WrongAdapter: If the adapter is not of this model.
    """
    tokenizer = load_tokenizer(base)
    form, writer = student_form(task, tokenizer), engine.serve(merged(base, adapter).to(device()), tokenizer)
    dropped: Counter[str] = Counter()

    def finished(texts: Sequence[str]) -> list[str]:
        """Without those that were cut before their end."""
        kept = [text for text in texts if len(token_ids(tokenizer, text)) < sampling.max_new_tokens]
        dropped["unfinished"] += len(texts) - len(kept)
        return kept

    texts = finished(writer.complete([form.opening()] * count, sampling, seed=seed))
    found = [form.record(text) for text in texts]
    whole = [pair for pair in found if pair is not None]
    if form.in_turns and answered:
        prompts = [form.asked(instruction) for instruction, _ in whole]
        written = map(form.response, writer.complete(prompts, sampling, seed=seed + 1))
        whole = [(instruction, answer) for (instruction, _), answer in zip(whole, written, strict=True) if answer]
    dropped["no record"] += len(found) - len(whole)
    corpus = Corpus(tuple(x for x, _ in whole), tuple(y for _, y in whole), Provenance.LLM_WRITTEN, adapter.grants)
    return Filtered(corpus, {reason: n for reason, n in dropped.items() if n})


def draw(base: str, source: str, count: int, max_new_tokens: int, *, seed: int, task: Task = NO_CARD) -> Filtered:
    """Public instructions in place of written ones; a record of `max_new_tokens` must hold them.

    Args:
        base: Name of the model whose tokenizer counts.
        source: Corpus file or world, as `server.public`.
        count: Number of draws, before any are left out.
        max_new_tokens: Most tokens of a record.
        seed: Public seed.
        task: The card, which gives the form of a record.
    """
    corpus, tokenizer = sample(source, count, seed), load_tokenizer(base)
    form = student_form(task, tokenizer)

    def tokens(instruction: str) -> int:
        prompt = form.asked(instruction)
        return len(token_ids(tokenizer, prompt) if isinstance(prompt, str) else token_ids(tokenizer, instruction))

    fits = [row for row, prompt in enumerate(corpus.prompts) if tokens(prompt) < max_new_tokens]
    return Filtered(corpus.take(fits), {"too long": len(corpus) - len(fits)} if len(fits) < len(corpus) else {})


def taught(
    engine: Engine,
    base: str,
    start: Adapter,
    pairs: Corpus,
    settings: Tuning,
    *,
    loss_on: Learns,
    seed: int,
    task: Task = NO_CARD,
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
        task: The card, which gives the form of a record.
    """
    tokenizer, model = load_tokenizer(base), with_adapter(base, start).to(device())
    form, kind = student_form(task, tokenizer), kind_of(model.config)
    examples = encode_records(tokenizer, pairs, settings.max_length, kind, loss_on=loss_on, form=form)
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
    with checkpointed(model, settings.gradient_checkpointing):
        loss = sft(model, [example for slot in slots for example in slot], steps, descend=engine.descend)
    return made_of(read_adapter(model, start.base), [start, texts]), loss
