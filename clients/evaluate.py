"""Measure the client's model on the client's test set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.finetune import in_use, on_base, slots_of
from fedsynth.clients.fitting import Fitting
from fedsynth.clients.learn import task_model
from fedsynth.corpus import LETTERS
from fedsynth.evaluation.choice import likeliest, parsed_scores, said_choice, said_option
from fedsynth.evaluation.text import instruction_scores
from fedsynth.evaluation.utility import scores
from fedsynth.federation.messages import Evaluated
from fedsynth.federation.run.directory import RESPONSES
from fedsynth.limits import MAX_LOSS
from fedsynth.lora import Adapter
from fedsynth.models.devices import device
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_frozen, load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.training.classifier import classify
from fedsynth.training.dp_training import mean_loss
from fedsynth.training.examples import all_readable
from fedsynth.world import task_part


def evaluate(client: ClientSide, adapter: Adapter | None = None) -> Evaluated:
    """Accuracy and macro-F1 of the task model, with unknown labels as errors; scores of responses for instructions.

    Args:
        client: The client.
        adapter: Measure the generator with this adapter instead; adds its loss.
    """
    if client.choices or client.test.options is not None:
        loss = {} if adapter is None else {"loss": _loss(client, adapter)}
        return Evaluated({**_chosen(client, adapter), **loss}, examples=len(client.test))
    if adapter is not None:
        scored = _scored(client, respond(client, client.test.prompts, adapter)) if client.instructs else {}
        return Evaluated({**scored, "loss": _loss(client, adapter)}, examples=len(client.test))
    found = answers(client, client.test.prompts)
    figures = _scored(client, found) if client.instructs else scores(client.test.answers, found, client.labels)
    return Evaluated(figures, examples=len(client.test))


def answers(client: ClientSide, texts: Sequence[str]) -> list[str]:
    """The client's model's label or response for each text; "" for one that its tokenizer cannot read.

    Raises:
        fedsynth.clients.learn.NoTaskModel: If it has learnt no labels yet.
    """
    if client.instructs:
        return respond(client, texts)
    tokenizer, found = load_tokenizer(client.config.task_model), [""] * len(texts)
    places = [place for place, read in enumerate(all_readable(tokenizer, texts)) if read]
    read = [texts[place] for place in places]
    classes = classify(task_model(client), tokenizer, read, client.config.task_training.max_length)
    for place, number in zip(places, classes, strict=True):
        found[place] = client.labels[number]
    return found


def _chosen(client: ClientSide, adapter: Adapter | None) -> dict[str, float]:
    """Shares of test texts whose label or option is right, by likelihood and by the written answer; see
    `evaluation.choice`. The macro-F1 of options is over their letters: low where a model says one letter throughout."""
    prompts, truth, options = client.test.prompts, client.test.answers, client.test.options
    choices = [client.choices] * len(prompts) if options is None else [LETTERS[: len(own)] for own in options]
    form = client.form
    replies = [[form.reply(choice) for choice in own] for own in choices]
    likely = likeliest(_writer(client, adapter), [form.asked(prompt) for prompt in prompts], replies)
    found = ["" if place is None else own[place] for place, own in zip(likely, choices, strict=True)]
    written = respond(client, prompts, adapter)
    if options is None:
        said = [said_choice(text, client.choices) for text in written]
    else:
        said = [said_option(text, own) for text, own in zip(written, options, strict=True)]
    return {**scores(truth, found, client.choices or LETTERS), **parsed_scores(truth, said)}


def _scored(client: ClientSide, found: list[str]) -> dict[str, float]:
    """Scores of whole responses against the true ones; in a simulated world of the part that its task asks for."""
    if client.simulated:  # a judge may compare them later; a site keeps none
        keep_responses(client, found)
    return instruction_scores(
        client.test.answers, found if client.world is None else [task_part(text) for text in found]
    )


def keep_responses(client: ClientSide, found: Sequence[str]) -> None:
    """Keeps the responses to the test set in the client's private directory, in place of those of an earlier round."""
    rows = zip(client.test.prompts, client.test.answers, found, strict=True)
    part = client.work / f"{RESPONSES}.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(client.work / RESPONSES)


def _loss(client: ClientSide, adapter: Adapter) -> float:
    """The training loss on the test set, each row a unit of its own; 0 if no row can be read."""
    model = on_base(client, adapter).eval()
    slots = slots_of(client, replace(client.test, units=None), len(client.test))
    pad, batch = (
        load_tokenizer(client.config.generator).pad_token_id,
        client.config.generator_training.max_physical_batch_size,
    )
    examples = [example for slot in slots for example in slot]
    found = mean_loss(model, examples, pad=pad, batch=batch) if examples else 0.0
    return found if found < MAX_LOSS else MAX_LOSS  # nan as well: a diverged model has a figure


def respond(client: ClientSide, instructions: Sequence[str], adapter: Adapter | None = None) -> list[str]:
    """An adapter's responses to instructions, decoded greedily.

    Args:
        client: The client.
        instructions: Any number of instructions.
        adapter: None for the adapter in use, or the base alone if there is none.
    """
    writer = _writer(client, adapter)
    prompts = [client.form.asked(instruction) for instruction in instructions]
    written = writer.complete(prompts, SamplingParams.greedy(client.config.answer_tokens), seed=0)
    return [client.form.response(text) for text in written]


def _writer(client: ClientSide, adapter: Adapter | None) -> Fitting:
    """The client's model with an adapter, or with the one in use, if there is one."""
    name, adapter = client.config.generator, adapter or in_use(client)
    precision = client.config.generator_training.precision
    model = load_frozen(name, precision).to(device()) if adapter is None else on_base(client, adapter)
    return Fitting(LocalLLM(model.eval(), load_tokenizer(name), batch_size=128, workers=1))
