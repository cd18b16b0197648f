"""A labelled data set divided among clients; no example in two places."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from fedsynth.corpus import Corpus, Provenance, pool
from fedsynth.scenario import Data
from fedsynth.typed import BadValue
from fedsynth.world import load_world, private_notes

TEST_SHARE = 0.2  # of a client's rows, where the file names no test rows


@dataclass(frozen=True)
class Site:
    """One client's text.

    Attributes:
        train: Private.
        test: Held out. In a simulation it is declared public: measuring is the researcher's act (docs/privacy.md).
    """

    train: Corpus
    test: Corpus


def label_list(data: Data) -> tuple[str, ...]:
    """The public list of classes.

    Raises:
        BadValue: If it would be empty.
    """
    if data.labels != "all":
        return tuple(data.labels)
    if data.world is not None:
        return tuple(load_world(data.world).labels)
    return tuple(sorted(set(_read(data)[data.label])))


def open_sites(data: Data, seed: int) -> list[Site]:
    """Every client's text, in the order of clients; one site with all of it where `pooled`.

    Args:
        data: What is divided, and how.
        seed: Public seed of the draw (worlds) or the split (files).

    Raises:
        BadValue: If the file or a column is missing, or a client would have no example.
    """
    sites = [open_site(data, index, seed) for index in range(data.clients)]
    if data.pooled:
        return [Site(pool([s.train for s in sites]), pool([s.test for s in sites]))]
    return sites


def open_site(data: Data, index: int, seed: int) -> Site:
    """One client's text: `open_sites(data, seed)[index]` of a scenario that is not pooled."""
    if data.world is not None:
        world = load_world(data.world)
        return Site(
            train=private_notes(world, index, data.train_per_client, seed, split="train"),
            test=private_notes(world, index, data.test_per_client, seed, split="test"),
        )
    return _split(data, seed)[index]


@lru_cache(maxsize=4)
def _split(data: Data, seed: int) -> list[Site]:
    table = _read(data)
    rng = np.random.default_rng([seed, 0xDA7A])
    rows = rng.permutation(len(table))
    if data.split == "natural":
        names = table[data.client_column].to_numpy()
        clients = sorted(set(names))
        if len(clients) < data.clients:
            raise BadValue(
                f"{data.source}: {data.clients} clients asked, column {data.client_column!r} has {len(clients)}"
            )
        parts = [rows[names[rows] == name] for name in clients[: data.clients]]
    else:
        if data.clients > len(table):
            raise BadValue(f"{data.source}: {data.clients} clients for {len(table)} examples: ask for fewer clients")
        parts = np.array_split(rows, data.clients)
    return [_site(data, table.iloc[part], index) for index, part in enumerate(parts)]


def _site(data: Data, table: pd.DataFrame, index: int) -> Site:
    if data.test is None:
        held = np.arange(len(table)) < int(len(table) * TEST_SHARE)
    else:
        held = (table[data.test.column].astype(str) == data.test.equals).to_numpy()
    train, test = table[~held], table[held]
    for name, part in (("training", train), ("test", test)):
        if part.empty:
            raise BadValue(f"{data.source}: client {index} has no {name} example: ask for fewer clients or more data")
    return Site(_corpus(data, train), _corpus(data, test))


def _corpus(data: Data, table: pd.DataFrame) -> Corpus:
    units: tuple[Hashable, ...] = tuple(table[data.unit] if data.unit else (int(i) for i in table.index))
    return Corpus(tuple(table[data.text]), tuple(table[data.label]), Provenance.PRIVATE, units=units)


@lru_cache(maxsize=4)
def _read(data: Data) -> pd.DataFrame:
    path = find(data.source)
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".jsonl": lambda p: pd.read_json(p, lines=True)}
    if path.suffix not in readers:
        raise BadValue(f"{data.source}: expected a .csv, .jsonl or .parquet file")
    try:
        table: pd.DataFrame = readers[path.suffix](path)  # type: ignore[operator]
    except Exception as problem:
        raise BadValue(f"{data.source}: cannot be read: {str(problem).splitlines()[0]}") from problem
    asked = [data.text, data.label, data.client_column, data.unit, data.test.column if data.test else None]
    for column in asked:
        if column is not None and column not in table.columns:
            raise BadValue(f"{data.source}: no column {column!r}; it has {', '.join(map(str, table.columns))}")
    table = table.dropna(subset=[data.text, data.label]).reset_index(drop=True)
    if table.empty:
        raise BadValue(f"{data.source}: no row has both {data.text!r} and {data.label!r}")
    table[data.text] = table[data.text].astype(str)
    table[data.label] = table[data.label].astype(str)
    return table


def find(source: str) -> Path:
    """The file that a scenario names: as it stands, or in the folder named by FEDSYNTH_DATA.

    Raises:
        BadValue: If it is in neither place.
    """
    places = [Path(source)]
    if folder := os.environ.get("FEDSYNTH_DATA"):
        places.append(Path(folder) / source)
    for place in places:
        if place.is_file():
            return place
    raise BadValue(f"no data file {source!r} (looked in {', '.join(str(p.parent.absolute()) for p in places)})")
