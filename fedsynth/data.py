"""A labelled data set divided among clients; no example in two places."""

from __future__ import annotations

import math
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

TEST_SHARE = 0.2  # of a client's units, where the file names no test rows
UNIT = "\0unit"  # column that holds the privacy unit; no file has a column of this name


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
    return tuple(sorted(set(_read(data, find(data.source))[data.label])))


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


def _split(data: Data, seed: int) -> list[Site]:
    path = find(data.source)
    return _split_file(data, seed, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _split_file(data: Data, seed: int, path: Path, _: int) -> list[Site]:
    table = _read(data, path)
    rng = np.random.default_rng([seed, 0xDA7A])
    if data.split == "natural":
        names = table[data.client_column]
        clients = sorted(set(names))
        if len(clients) < data.clients:
            raise BadValue(
                f"{data.source}: {data.clients} clients asked, column {data.client_column!r} has {len(clients)}"
            )
        parts = [table[names == name] for name in clients[: data.clients]]
        _refuse_shared_units(data, parts)
    else:
        # Whole units are dealt: a person is at one client.
        units = rng.permutation(sorted(set(table[UNIT]), key=str))
        if data.clients > len(units):
            raise BadValue(f"{data.source}: {data.clients} clients for {len(units)} examples: ask for fewer clients")
        parts = [table[table[UNIT].isin(set(own))] for own in np.array_split(units, data.clients)]
    return [_site(data, part, index, rng) for index, part in enumerate(parts)]


def _refuse_shared_units(data: Data, parts: list[pd.DataFrame]) -> None:
    """Parallel composition needs each person at one client (docs/privacy.md)."""
    if data.unit is None:
        return
    seen = pd.concat([part[[UNIT]].drop_duplicates() for part in parts])
    if shared := int(seen[UNIT].duplicated().sum()):
        raise BadValue(f"{data.source}: {shared} values of the unit column {data.unit!r} are at more than one client")


def _site(data: Data, table: pd.DataFrame, index: int, rng: np.random.Generator) -> Site:
    if data.test is None:
        units = rng.permutation(sorted(set(table[UNIT]), key=str))
        held = table[UNIT].isin(set(units[: math.ceil(len(units) * TEST_SHARE)]))
    else:
        held = table[data.test.column].astype(str) == data.test.equals
    train, test = table[~held], table[held]
    for name, part in (("training", train), ("test", test)):
        if part.empty:
            raise BadValue(f"{data.source}: client {index} has no {name} example: ask for fewer clients or more data")
    return Site(_corpus(data, train), _corpus(data, test))


def _corpus(data: Data, table: pd.DataFrame) -> Corpus:
    units: tuple[Hashable, ...] = tuple(table[UNIT].tolist())
    return Corpus(tuple(table[data.text]), tuple(table[data.label]), Provenance.PRIVATE, units=units)


def _read(data: Data, path: Path) -> pd.DataFrame:
    """The rows that have a text and a label, both as text, and a privacy unit each: a person, or the row itself."""
    try:
        table = _table(path)
    except Exception as problem:
        raise BadValue(f"{data.source}: cannot be read: {(str(problem).splitlines() or ['no reason'])[0]}") from problem
    asked = [data.text, data.label, data.client_column, data.unit, data.test.column if data.test else None]
    for column in asked:
        if column is not None and column not in table.columns:
            raise BadValue(f"{data.source}: no column {column!r}; it has {', '.join(map(str, table.columns))}")
    for column in (data.text, data.label):
        table[column] = table[column].map(_as_text, na_action="ignore").replace("", None)
    table = table.dropna(subset=[data.text, data.label]).reset_index(drop=True)
    if table.empty:
        raise BadValue(f"{data.source}: no row has both {data.text!r} and {data.label!r}")
    for column in (data.client_column, data.unit):
        if column is None:
            continue
        table[column] = table[column].map(_as_text, na_action="ignore").replace("", None)
        if missing := int(table[column].isna().sum()):
            raise BadValue(f"{data.source}: {missing} rows have no value in column {column!r}")
    table[UNIT] = table[data.unit] if data.unit else table.index
    return table


def _table(path: Path) -> pd.DataFrame:
    """Text as it stands in the file: "01" and "None" are labels like any other."""
    if path.suffix == ".csv":
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    if path.suffix == ".jsonl":
        return pd.read_json(path, lines=True, dtype=False, convert_dates=False)
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    raise ValueError("expected a .csv, .jsonl or .parquet file")


def _as_text(value: object) -> str:
    # A whole number beside a missing one is read as a float.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


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
