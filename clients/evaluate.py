"""Measure the task model on the client's test set."""

from __future__ import annotations

from fedsynth.classifier import classify
from fedsynth.clients.home import Home
from fedsynth.clients.learn import task_model
from fedsynth.evaluation.utility import scores
from fedsynth.models import load_tokenizer
from fedsynth.tasks import Evaluated


def evaluate(home: Home) -> Evaluated:
    """Accuracy and macro-F1 of the task model; examples with unknown labels count as errors."""
    tokenizer = load_tokenizer(home.config.task_model)
    found = classify(task_model(home), tokenizer, home.test.prompts, home.config.task_training.max_tokens)
    answers = [home.labels[i] for i in found]
    return Evaluated(scores(home.test.answers, answers, home.labels), examples=len(home.test))
