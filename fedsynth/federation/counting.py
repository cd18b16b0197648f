"""Counts that a simulator takes of the clients' rows before a run: texts that are cut, labels, test labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fedsynth.data.partition import class_list, divide, label_list
from fedsynth.data.tables import LABEL, read_rows
from fedsynth.evaluation.lines import lines_of
from fedsynth.federation.arm_words import arm_words
from fedsynth.federation.strategy import load_strategy
from fedsynth.models.batches import longest_of, token_rows
from fedsynth.models.hub import config_of
from fedsynth.models.loading import kind_of, load_tokenizer
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.scenario.data import Data
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.scenario.task import Task
from fedsynth.scenario.toml import cells
from fedsynth.training.examples import encode_slots
from fedsynth.typed import build, plain

READS = ("all", "head")  # values of `task_training.trains` with which private text is learnt


@dataclass(frozen=True)
class Cut:
    """The private training texts that a model's longest text shortens.

    Attributes:
        part: What reads them: the generator, or the task model.
        key: The key of its longest text.
        limit: Tokens that it reads of a text.
        texts: Texts of all clients.
        cut: Those that are longer.
        tokens: Tokens of all texts.
        lost: Tokens that are never read.
    """

    part: str
    key: str
    limit: int
    texts: int
    cut: int
    tokens: int
    lost: int

    @property
    def share(self) -> float:
        """The share of tokens that are never read."""
        return self.lost / self.tokens if self.tokens else 0.0


def data_facts(scenario: Scenario) -> dict[str, Any]:
    """The content of a run's `data_facts.json`.

    `arms` has each arm in words. `lines` are of test labels, which a simulation declares public (docs/privacy.md): for
    each cell, a table by client.
    """
    lines = [{"arm": cell.arm, "seed": cell.seed, "clients": _lines(cell)} for cell in cells(scenario)]
    return {"arms": arm_words(scenario), "lines": lines}


def row_counts(scenario: Scenario) -> dict[str, Any]:
    """The content of a run's `row_counts.json`: texts that are cut, and labels, of private rows of the first seed."""
    cuts: dict[Cut, list[str]] = {}
    labels: dict[Data, list[str]] = {}
    for cell in cells(replace(scenario, seeds=scenario.seeds[:1])):
        for cut in cuts_of(cell):
            cuts.setdefault(cut, []).append(cell.arm)
        data = cell.scenario.data
        if data.classes and not data.pooled:
            labels.setdefault(data, []).append(cell.arm)
    seed = scenario.seeds[0]
    return {
        "cuts": [{"arms": arms, **plain(cut)} for cut, arms in cuts.items()],
        "labels": [{"arms": arms, **label_counts(data, seed)} for data, arms in labels.items()],
    }


def _lines(cell: Cell) -> list[dict[str, float]]:
    data = cell.scenario.data
    if data.task == "instructions":
        return []
    labels = class_list(data)
    return [lines_of(site.test, labels) for site in divide(data, cell.seed).sites]


def label_counts(data: Data, seed: int) -> dict[str, int]:
    """Rows, rows of an unlisted label, clients, clients that lack private text of a label, and the most that one lacks.

    With `data.unlisted = "drop"` no row of an unlisted label is one of the clients', and none is counted.
    """
    labels, sites = class_list(data), divide(data, seed).sites
    lacks = [len(set(labels) - set(site.train.answers)) for site in sites]
    rows, unlisted = sum(len(site.train) + len(site.test) for site in sites), 0
    if data.world is None:
        counts = read_rows(data).table[LABEL]
        rows, unlisted = len(counts), int((~counts.isin(labels)).sum())
    found = {"rows": rows, "unlisted": 0 if data.unlisted == "drop" else unlisted, "clients": len(sites)}
    return {**found, "lacking": sum(map(bool, lacks)), "most": max(lacks)}


def cuts_of(cell: Cell) -> list[Cut]:
    """What the arm's models leave out of the clients' private texts; models that cut nothing are left out."""
    resolved = cell.scenario
    client, data = resolved.client.of(0), resolved.data
    kind, options = load_strategy(resolved.strategy)
    found = []
    if kind.trains_generator(options) or data.task == "instructions":
        card = json.dumps(plain(resolved.task), sort_keys=True)
        found.append(_by_generator(data, client.generator, client.generator_training, card, cell.seed))
    if data.task == "classification" and client.task_training.trains in READS:
        found.append(_by_task_model(data, client.task_model, client.task_training.max_length, cell.seed))
    return [cut for cut in found if cut.cut]


@lru_cache(maxsize=32)
def _by_generator(data: Data, model: str, settings: GeneratorTraining, card: str, seed: int) -> Cut:
    tokenizer, kind, labels = load_tokenizer(model), kind_of(config_of(model)), label_list(data)
    task = build(Task, json.loads(card))  # as text it can be a key
    examples = [
        example
        for site in divide(data, seed).sites
        for slot in encode_slots(tokenizer, site.train, labels, len(site.train), settings, kind, task=task)
        for example in slot
    ]
    read, lost = sum(len(each.tokens) - each.start for each in examples), [each.lost for each in examples]
    key = "client.generator_training.max_length"
    return Cut(
        "generator", key, settings.max_length, len(lost), sum(map(bool, lost)), max(0, read) + sum(lost), sum(lost)
    )


@lru_cache(maxsize=32)
def _by_task_model(data: Data, model: str, longest: int, seed: int) -> Cut:
    tokenizer, config = load_tokenizer(model), config_of(model)
    limit = longest_of(config, tokenizer, longest) or longest
    lengths = list(_lengths(tokenizer, [site.train.prompts for site in divide(data, seed).sites], config))
    lost = [max(0, length - limit) for length in lengths]
    key = "client.task_training.max_length"
    return Cut("task model", key, limit, len(lost), sum(map(bool, lost)), sum(lengths), sum(lost))


def _lengths(tokenizer: Any, texts: Sequence[Sequence[str]], config: Any) -> Iterator[int]:
    """Tokens of each text that can be read."""
    for own in texts:
        try:
            yield from map(len, token_rows(tokenizer, own, kind_of(config)))
        except Exception:  # one text, of many, that the tokenizer cannot read
            for text in own:
                try:
                    yield from map(len, token_rows(tokenizer, [text], kind_of(config)))
                except Exception:
                    continue


def cut_line(cut: Cut, seed: int) -> str:
    """A warning for the operator of a simulation."""
    end = ""
    if cut.part == "generator":
        end = '; they are cut, and teach no end of text (with cut = "sentences", texts cut at a sentence do not count)'
    return (
        f"{cut.cut} of {cut.texts} private texts are longer than {cut.key} = {cut.limit} tokens (seed {seed}): "
        f"the {cut.part} never reads {cut.share:.0%} of their tokens{end}"
    )
