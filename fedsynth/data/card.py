"""The data card of a run: figures of each client's data, measured by the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedsynth.corpus import Corpus
from fedsynth.data.partition import ClientData, Division, LeftOut, class_list, compared, divide, overlaps
from fedsynth.rouge import words
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells
from fedsynth.typed import plain

MEASURED = "measured by the simulator on private text: no guarantee covers it; a real site keeps its own"
NONE_LEFT_OUT = LeftOut()
SIMULATED = "drawn from a simulated world: no private text"


def data_card(sites: Sequence[ClientData], labels: Sequence[str], left_out: LeftOut = NONE_LEFT_OUT) -> dict[str, Any]:
    """Sizes, labels, text lengths and duplicates of every client, and totals.

    Args:
        sites: The clients' data in order; at least one.
        labels: The public label list; other labels count as `other`.
        left_out: Rows of the source that no client has.

    Returns:
        A tree for JSON. Lengths are in words of the training text (`fedsynth.rouge.words`); p95 is the shortest length
        that 95 % of the texts do not exceed.
    """
    between, across = overlaps(sites)
    clients = [_client(site, labels) for site in sites]
    total = {key: sum(client[key] for client in clients) for key in ("train", "test", "units")}
    everything = [length for site in sites for length in _lengths(site.train)]
    return {
        "clients": clients,
        "total": {
            **total,
            "classes": len(labels),
            "words": _spread(everything),
            "left_out": plain(left_out),
            "duplicates": {"between_clients": between, "train_and_test": across},
        },
    }


def data_cards(scenario: Scenario) -> dict[str, Any]:
    """The content of a run's `data.json`: a card per seed, and per division if arms divide the data differently."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in cells(scenario):
        data = replace(cell.scenario.data, pooled=False, tuned_on=())  # a pooled client holds the clients' text
        key = (data, cell.seed)
        if key not in found:
            division: Division = divide(data, cell.seed)
            card = data_card(division.sites, class_list(data), division.left_out)
            found[key] = {"seed": cell.seed, "arms": [], **card}
        found[key]["arms"].append(cell.arm)
    worlds = all(data.world is not None for data, _ in found)
    return {"origin": SIMULATED if worlds else MEASURED, "cards": list(found.values())}


def card_line(cards: Mapping[str, Any]) -> str:
    """One line on all cards: ranges over clients and seeds.

    Args:
        cards: The result of `data_cards`.
    """
    found = cards["cards"]
    clients = [client for card in found for client in card["clients"]]
    classes = [card["total"]["classes"] for card in found]
    dropped = [card["total"]["left_out"]["duplicates"] for card in found]
    lengths = [card["total"]["words"]["median"] for card in found]
    kinds = f"{_range(classes)} labels ({_range([c['labels_present'] for c in clients])} per client), "
    return (
        f"data: {_range([len(card['clients']) for card in found])} clients, "
        f"{_range([c['train'] for c in clients])} training and {_range([c['test'] for c in clients])} test texts, "
        f"{kinds if any(classes) else ''}"
        f"{_range(lengths)} words in the median, {_range(dropped)} duplicates dropped"
    )


def _client(site: ClientData, labels: Sequence[str]) -> dict[str, Any]:
    train = site.train
    counts = train.counts()
    known = {label: counts[label] for label in labels if counts[label]}
    other = len(train) - sum(known.values()) if labels else 0
    return {
        "train": len(train),
        "test": len(site.test),
        "units": len(train) if train.units is None else len(set(train.units)),
        "labels": known,
        "labels_present": len(known),
        **({"other": other} if other else {}),
        "words": _spread(_lengths(train)),
        "duplicates": len(train) - len(set(compared(train))),
    }


def _lengths(corpus: Corpus) -> list[int]:
    return [len(words(text)) for text in corpus.prompts]


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    at = np.quantile(lengths, 0.95, method="inverted_cdf")
    return {"min": min(lengths), "median": float(np.median(lengths)), "p95": int(at), "max": max(lengths)}


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low}-{high}"
