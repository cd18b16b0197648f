"""Measure the client's model on the client's test set."""

from __future__ import annotations

from fedsynth.classifier import classify
from fedsynth.clients.finetune import in_use, on_base
from fedsynth.clients.home import Home
from fedsynth.clients.learn import task_model
from fedsynth.evaluation.text import instruction_scores
from fedsynth.evaluation.utility import scores
from fedsynth.instructions import asked, parse_response
from fedsynth.llm import LocalLLM
from fedsynth.models import device, load_generator, load_tokenizer
from fedsynth.tasks import Evaluated


def evaluate(home: Home) -> Evaluated:
    """Accuracy and macro-F1 of the task model, examples with unknown labels as errors; instructions: see `respond`."""
    if home.instructs:
        found = respond(home)
        return Evaluated(instruction_scores(home.test.answers, found), examples=len(home.test))
    tokenizer = load_tokenizer(home.config.task_model)
    classes = classify(task_model(home), tokenizer, home.test.prompts, home.config.task_training.max_tokens)
    answers = [home.labels[i] for i in classes]
    return Evaluated(scores(home.test.answers, answers, home.labels), examples=len(home.test))


def respond(home: Home) -> list[str]:
    """What the adapter in use (the base alone, before there is one) responds to the test set's instructions; greedy."""
    name, adapter = home.config.generator, in_use(home)
    model = load_generator(name).to(device()) if adapter is None else on_base(home, adapter)
    writer = LocalLLM(model.eval(), load_tokenizer(name), batch_size=128, workers=1)
    prompts = [asked(prompt) for prompt in home.test.prompts]
    written = writer.complete(prompts, max_tokens=home.config.answer_tokens, temperature=0.0, seed=0)
    return [parse_response(text) for text in written]
