"""Division of a labelled data set among clients; no example is in two places."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from fedsynth.corpus import Corpus, Provenance, pool, same
from fedsynth.data.places import find
from fedsynth.data.tables import (
    ATTRIBUTES,
    CLIENT,
    HELD,
    LABEL,
    NAMED,
    OPTIONS,
    ROW,
    TEXT,
    UNIT,
    Rows,
    misfit_values,
    nothing_to_test_on,
    read_rows,
    refuse_alike,
)
from fedsynth.scenario.data import Data
from fedsynth.scenario.task import Task
from fedsynth.typed import BadValue
from fedsynth.world import load_world, private_notes, private_records

__all__ = [
    "ClientData",
    "Division",
    "LeftOut",
    "compared",
    "divide",
    "find",
    "label_list",
    "misfits",
    "misfitting",
    "open_site",
    "open_sites",
    "overlaps",
    "unified",
    "unlisted_values",
]

TEST_SHARE = 0.2  # of a client's units, if the source names no test rows
MOST_UNLISTED = 0.5  # share of rows with an unlisted label; with more, the list is most likely another file's
SMALLEST = 2  # fewest units of a client in a Dirichlet draw, else it is repeated: one to learn from, one to test on


@dataclass(frozen=True)
class ClientData:
    """One client's text.

    Attributes:
        train: Private training text.
        test: Held-out text. A simulation declares it public: the researcher measures on it (docs/privacy.md).
    """

    train: Corpus
    test: Corpus


@dataclass(frozen=True)
class LeftOut:
    """Rows of a source that no client has, by reason.

    Attributes:
        incomplete: Without text or label.
        duplicates: Dropped for `data.duplicates = "drop"`.
        not_dealt: Rows of natural clients that were not asked for, or of classes that no client drew.
        over_limit: Rows beyond `data.limit`, `data.per_label` and `data.test_limit`.
    """

    incomplete: int = 0
    duplicates: int = 0
    not_dealt: int = 0
    over_limit: int = 0


@dataclass(frozen=True)
class Division:
    """Every client's text, in the order of clients, and the rows left out."""

    sites: tuple[ClientData, ...]
    left_out: LeftOut = LeftOut()


def label_list(data: Data) -> tuple[str, ...]:
    """The public list of classes; empty for instructions, whose responses come from no list, and for choices.

    Raises:
        BadValue: If a classification has no class.
    """
    return () if data.task == "choice" else class_list(data)


def class_list(data: Data) -> tuple[str, ...]:
    """The public list of classes of the rows; empty for instructions, and for rows with options of their own.

    Raises:
        BadValue: If a classification has no class.
    """
    if not data.classes:
        return ()
    if data.labels != "all":
        return tuple(data.labels)
    if data.world is not None:
        return tuple(load_world(data.world).labels)
    return tuple(sorted(set(read_rows(data).table[LABEL])))


def misfits(data: Data, labels: Sequence[str]) -> list[str]:
    """Warnings on rows left out, merged spellings, unlisted labels, and listed labels that no row has.

    Args:
        data: A source that is not a world.
        labels: The public label list.

    Raises:
        BadValue: If a listed label and one of the source are spellings of the same, or no training or no test row has a
            listed label.
    """
    rows = read_rows(data)
    merged = f"{data.source}: {rows.merged} spellings of persons or clients are merged into others of them"
    if not data.classes:
        lacks = "answer among its options" if data.options else "response"
        return [*misfitting(rows, data.source, None, lacks), *([merged] if rows.merged else [])]
    if data.unlisted == "drop":
        rows = replace(rows, table=rows.table[rows.table[LABEL].isin(labels)])
    warnings = misfitting(rows, data.source, labels)
    held = rows.table[HELD]
    for name, part in (("training", rows.table[~held]), ("test", rows.table[held])):
        if len(part) and not part[LABEL].isin(labels).any():
            _refuse_unlisted(data, "" if data.test is None else f"{name} ", part[LABEL].value_counts(), labels)
    ignored = int((~rows.table[LABEL].isin(labels)).sum())
    if ignored > MOST_UNLISTED * len(rows.table):
        counts = rows.table[LABEL][~rows.table[LABEL].isin(labels)].value_counts()
        named = ", ".join(
            f"{label!r} {count}{nearest(str(label), labels)}" for label, count in counts.head(NAMED).items()
        )
        raise BadValue(
            f"{data.source}: {ignored} of {len(rows.table)} rows ({ignored / len(rows.table):.0%}) have a label that "
            f"data.labels lacks ({named}{', ...' if len(counts) > NAMED else ''}): nothing would be learnt from them; "
            'list these labels as the source has them, or leave the rows out with data.unlisted = "drop"'
        )
    return [*warnings, *([merged] if rows.merged else [])]


def _refuse_unlisted(data: Data, name: str, counts: pd.Series[int], labels: Sequence[str]) -> None:
    if data.test is not None and name == "test " and list(counts.index) == ["-1"]:
        raise BadValue(f"{data.source}: {nothing_to_test_on(int(counts.iloc[0]), data.test)}")
    has = ", ".join(f"{label!r} {count}" for label, count in counts.head(NAMED).items())
    raise BadValue(
        f"{data.source}: no {name}row has a label of data.labels ({_few(labels)}); there are {has}"
        f"{', ...' if len(counts) > NAMED else ''}: list them as the source has them"
    )


def nearest(label: str, labels: Sequence[str]) -> str:
    """The listed label that an unlisted one may stand for, in words for a message; "" if none is near."""
    found = difflib.get_close_matches(label.casefold(), [listed.casefold() for listed in labels], 1)
    known = {listed.casefold(): listed for listed in labels}
    return f" (nearest: {known[found[0]]!r})" if found else ""


def _few(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:NAMED])) + (", ..." if len(labels) > NAMED else "")


def misfitting(rows: Rows, source: str, labels: Sequence[str] | None, lacks: str = "response") -> list[str]:
    """`misfits` of rows that were read.

    Args:
        rows: The rows of the source.
        source: Its name, for messages.
        labels: The public label list; None if answers are of no list.
        lacks: What an answer is, without labels.

    Raises:
        BadValue: If a listed label and one of the source are spellings of the same.
    """
    found = []
    if rows.incomplete:
        total = rows.incomplete + len(rows.table)
        answer = lacks if labels is None else "label"
        found.append(f"{source}: {rows.incomplete} of {total} rows have no text or no {answer}: they are left out")
    if labels is None:
        return found
    counts = rows.table[LABEL].value_counts()
    try:
        refuse_alike([*labels, *counts.index])
    except BadValue as problem:
        raise BadValue(f"data.labels and {source}: {problem}") from problem
    unknown = counts[~counts.index.isin(labels)]
    if len(unknown):
        named = ", ".join(
            f"{label!r} {count}{nearest(str(label), labels)}" for label, count in unknown.head(NAMED).items()
        )
        named += ", ..." if len(unknown) > NAMED else ""
        found.append(
            f"{int(unknown.sum())} rows have a label that data.labels lacks ({named}): they count as records, and "
            "nothing is learnt from them"
        )
    if absent := [label for label in labels if label not in counts.index]:
        found.append(f"no row has the label {', '.join(map(repr, absent))} of data.labels")
    return found


def unlisted_values(data: Data, labels: Sequence[str], task: Task) -> list[str]:
    """Warnings on values of attributes: those that the card does not list, and listed ones that no row has.

    Args:
        data: A source that is not a world.
        labels: The public label list.
        task: The card.

    Raises:
        BadValue: If no training row has a listed label and listed values, so that a generator would learn nothing.
    """
    if not task.attributes:
        return []
    table = read_rows(data).table
    rows = table[ATTRIBUTES][table[LABEL].isin(labels) & ~table[HELD]].tolist()
    said = [
        line
        for place, column in enumerate(task.columns)
        for line in misfit_values(
            column,
            [values[place] for values in rows],
            task.attributes[column].values,
            f"task.attributes.{column}.values",
        )
    ]
    if not any(map(task.listed, set(rows))):
        raise BadValue(f"{data.source}: no training row has listed values of all attributes: {'; '.join(said)}")
    return said


def open_sites(data: Data, seed: int) -> list[ClientData]:
    """Every client's text, in the order of clients; one site with all text if `pooled`.

    Args:
        data: The source and its division.
        seed: Public seed of the draw (worlds) or the split (other sources).

    Raises:
        BadValue: If the source or a column is missing or cannot be used, a client would have no example, or a text
            would be in two places.
    """
    return list(divide(data, seed).sites)


def open_site(data: Data, index: int, seed: int) -> ClientData:
    """One client's text: `open_sites(data, seed)[index]` of a scenario that is not pooled."""
    if data.world is not None:
        world = load_world(data.world)
        if data.task == "instructions":
            train = private_records(world, index, data.train_per_client, seed, split="train", planted=data.planted)
            test = private_records(world, index, data.test_per_client, seed, split="test")
        else:
            train = private_notes(world, index, data.train_per_client, seed, split="train")
            test = private_notes(world, index, data.test_per_client, seed, split="test")
        return ClientData(replace(train, units=_patients(len(train), data.notes_per_patient, seed, index)), test)
    return divide(replace(data, pooled=False), seed).sites[index]


def _patients(notes: int, most: int, seed: int, index: int) -> tuple[int, ...]:
    """The patient of each note; each patient has from 1 to `most` notes in a row."""
    sizes = np.random.default_rng([seed, index, 0x9A71]).integers(1, most + 1, size=notes)
    return tuple(np.repeat(np.arange(notes), sizes)[:notes].tolist())


def divide(data: Data, seed: int) -> Division:
    """`open_sites` with the counts of rows left out."""
    if data.world is not None:
        found = Division(tuple(open_site(data, index, seed) for index in range(data.clients)))
    else:
        # Neither labels nor pooling change who holds what.
        labels = data.labels if data.unlisted == "drop" else "all"  # else a division does not depend on them
        found = _divide(replace(data, pooled=False, labels=labels, tuned_on=()), seed, read_rows(data))
    if data.pooled:
        return replace(
            found, sites=(ClientData(pool([s.train for s in found.sites]), pool([s.test for s in found.sites])),)
        )
    return found


def overlaps(sites: Sequence[ClientData]) -> tuple[int, int]:
    """Texts in the training text of more than one client, and texts in both training and test text of any clients.

    Texts are equal if `corpus.same` of them is.
    """
    between, both = _shared(sites)
    return len(between), len(both)


def _shared(sites: Sequence[ClientData]) -> tuple[set[str], set[str]]:
    train = pd.DataFrame(
        [(index, same) for index, site in enumerate(sites) for same in compared(site.train)],
        columns=["client", "text"],
    ).drop_duplicates()
    test = {same for site in sites for same in compared(site.test)}
    return set(train["text"][train["text"].duplicated()]), test & set(train["text"])


def _equal_rows(table: pd.DataFrame, sites: Sequence[ClientData]) -> str:
    """The rows of the first texts that are in two places, by number; the texts themselves are private."""
    options = table[OPTIONS].tolist() if OPTIONS in table else None
    texts = pd.Series(_with_options(table[TEXT].tolist(), options), index=table.index, dtype=object)
    groups = table[ROW][texts.isin(set.union(*_shared(sites)))].groupby(texts, sort=False)
    told = ["rows " + " and ".join(map(str, rows[:NAMED])) for _, rows in groups]
    return ", ".join(told[:NAMED]) + (", ..." if len(told) > NAMED else "")


def compared(corpus: Corpus) -> list[str]:
    """Texts in the form that is the same for equal texts; a question with other options is another one."""
    return _with_options(corpus.prompts, corpus.options)


def _with_options(texts: Sequence[str], options: Sequence[Sequence[str]] | None) -> list[str]:
    if options is None:
        return unified(texts)
    return ["\n".join(unified([text, *own])) for text, own in zip(texts, options, strict=True)]


def unified(texts: Sequence[str]) -> list[str]:
    """Texts in the form that is the same for equal texts."""
    return [same(text) for text in texts]


@lru_cache(maxsize=8)
def _divide(data: Data, seed: int, rows: Rows) -> Division:
    whole = table = rows.table
    if data.unlisted == "drop":
        whole = table = table[table[LABEL].isin(data.labels)]
    if data.split == "natural":
        table = _of_first_clients(data, table)
    unique = table[~_duplicated(table)] if data.duplicates == "drop" else table
    if data.split == "natural" and (bare := sorted(set(table[CLIENT]) - set(unique[CLIENT]))):
        raise BadValue(
            f"{data.source}: all texts of client {bare[0]!r} are at another one, too, and were dropped: mend the source"
        )
    owner = _owners(data, unique, seed)
    sites = tuple(_site(data, unique[owner == index], index, seed) for index in range(data.clients))
    if any(found := overlaps(sites)):
        raise BadValue(
            f"{data.source}: {found[0]} texts are in the training text of more than one client, {found[1]} in training "
            f"and test text: {_equal_rows(unique, sites)} (from 1, without the header); mend the source, or say "
            'data.duplicates = "drop" to keep one of each'
        )
    held = sum(len(site.train) + len(site.test) for site in sites)
    dealt = int((owner >= 0).sum())
    dropped = len(table) - len(unique)
    return Division(sites, LeftOut(rows.incomplete, dropped, len(whole) - dropped - dealt, over_limit=dealt - held))


def _of_first_clients(data: Data, table: pd.DataFrame) -> pd.DataFrame:
    names = sorted(set(table[CLIENT]))
    if len(names) < data.clients:
        raise BadValue(f"{data.source}: {data.clients} clients asked, column {data.client_column!r} has {len(names)}")
    table = table[table[CLIENT].isin(names[: data.clients])]
    # Parallel composition needs each person at one client only (docs/privacy.md).
    shared = int(table[[UNIT, CLIENT]].drop_duplicates()[UNIT].duplicated().sum())
    if shared:
        raise BadValue(
            f"{data.source}: {shared} values of the unit column {data.unit!r} are at more than one client (column "
            f"{data.client_column!r}): write each one's rows under one client in the file; or deal whole units by "
            'chance: split = "iid" without client_column, in `fedsynth init` without --site; or leave out unit '
            "(--person): privacy is then per row only, which is weaker"
        )
    return table


def _duplicated(table: pd.DataFrame) -> pd.Series[bool]:
    """Marks all but one of equal texts; it spares a test row if there is one, else the first row."""
    options = table[OPTIONS].tolist() if OPTIONS in table else None
    texts = pd.Series(_with_options(table[TEXT].tolist(), options), index=table.index, dtype=object)
    test_first = table[HELD].sort_values(ascending=False, kind="stable").index
    return texts.loc[test_first].duplicated().loc[table.index]


def _owners(data: Data, table: pd.DataFrame, seed: int) -> np.ndarray[Any, Any]:
    """The client of each row, -1 for none. Whole units are dealt by their first rows: a person is at one client."""
    units = table.drop_duplicates(UNIT)
    if data.clients > len(units):
        raise BadValue(f"{data.source}: {data.clients} clients for {len(units)} examples: ask for fewer clients")
    units = units.iloc[np.random.default_rng([seed, 0xDA7A]).permutation(len(units))]
    if data.split in ("dirichlet", "pathological"):
        # Clients get consecutive units of a class: if spread evenly, its test rows are dealt like its training rows.
        kinds = units.groupby([LABEL, HELD])
        place = (kinds.cumcount() + 0.5) / kinds[TEXT].transform("size")
        units = units.iloc[np.argsort(place.to_numpy(), kind="stable")]
    by = CLIENT if data.split == "natural" else LABEL
    codes = pd.factorize(units[by], sort=True)[0]
    client = pd.Series(-1, index=units[UNIT])
    for index, members in enumerate(_partitions(data, codes, seed)):
        client.iloc[members] = index
    return table[UNIT].map(client).to_numpy()


def _partitions(data: Data, codes: np.ndarray[Any, Any], seed: int) -> list[list[int]]:
    """The units of each client, by flwr-datasets.

    Args:
        data: The division.
        codes: Number of each unit's label, or of its client if the split is natural: 0, 1, ... [units].
        seed: Public seed.
    """
    # flwr-datasets takes seconds to import, and draws progress bars.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from flwr_datasets import partitioner as partitioners

        classes = int(codes.max()) + 1
        if data.split == "natural":
            partitioner = partitioners.NaturalIdPartitioner("code")
        elif data.split == "dirichlet":
            partitioner = partitioners.DirichletPartitioner(
                data.clients, "code", data.alpha, min_partition_size=SMALLEST, seed=seed
            )
        elif data.split == "pathological":
            # The mode of the paper: if there are enough clients, each class is at one at least.
            asked = data.classes_per_client or 0
            if asked > classes:
                raise BadValue(
                    f"{data.source}: classes_per_client must lie in 1..{classes} (the number of classes), got {asked}"
                )
            partitioner = partitioners.PathologicalPartitioner(
                data.clients, "code", asked, class_assignment_mode="first-deterministic", seed=seed
            )
        else:
            partitioner = partitioners.IidPartitioner(data.clients)
        partitioner.dataset = Dataset.from_dict({"unit": np.arange(len(codes)), "code": codes})
        partitioner.dataset.set_format("pandas")  # the format that gives a column as an array in one step
        try:
            return [partitioner.load_partition(index)["unit"][:].tolist() for index in range(data.clients)]
        except ValueError as problem:
            raise BadValue(f"{data.source}: {_undealt(data)}") from problem


def _undealt(data: Data) -> str:
    if data.split == "dirichlet":
        return (
            f"no draw with alpha = {data.alpha:g} left each of {data.clients} clients {SMALLEST} examples: "
            "ask for a larger alpha or fewer clients"
        )
    return (
        f"a class has fewer examples than clients that draw it ({data.clients} clients, classes_per_client = "
        f"{data.classes_per_client}): ask for fewer clients or classes per client"
    )


def _site(data: Data, table: pd.DataFrame, index: int, seed: int) -> ClientData:
    rng = np.random.default_rng([seed, 0xDA7A, index])
    held = table[HELD]
    if data.test is None:
        units = rng.permutation(table[UNIT].unique())
        held = table[UNIT].isin(units[: math.ceil(len(units) * TEST_SHARE)])
    train, test = table[~held], table[held]
    for name, part in (("training", train), ("test", test)):
        if part.empty:
            way_out = {"dirichlet": "a larger alpha, ", "pathological": "more classes per client, "}.get(data.split, "")
            raise BadValue(
                f"{data.source}: client {index} has no {name} example: ask for {way_out}fewer clients or more data"
            )
    if data.limit is not None:
        train = train[train[UNIT].isin(rng.permutation(train[UNIT].unique())[: data.limit])]
    if data.per_label is not None:
        most = data.per_label if isinstance(data.per_label, int) else data.per_label[index]
        shuffled = train.iloc[rng.permutation(len(train))]
        train = train.loc[sorted(shuffled.groupby(LABEL, sort=False).head(most).index)]
    if data.test_limit is not None:
        test = test[test[UNIT].isin(rng.permutation(test[UNIT].unique())[: data.test_limit])]
    return ClientData(_corpus(train), _corpus(test))


def _corpus(table: pd.DataFrame) -> Corpus:
    units: tuple[Hashable, ...] = tuple(table[UNIT].tolist())
    options = tuple(table[OPTIONS]) if OPTIONS in table else None
    attributes = tuple(table[ATTRIBUTES]) if ATTRIBUTES in table else None
    return Corpus(tuple(table[TEXT]), tuple(table[LABEL]), Provenance.PRIVATE, (), units, options, attributes)
