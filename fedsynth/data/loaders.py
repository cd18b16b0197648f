"""Columns of a file, a saved data set or a Hugging Face name, with unchanged cells."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from fedsynth.data.csv_faults import separator, surplus, swallowed
from fedsynth.scenario.data import Data
from fedsynth.typed import BadValue, nearest


@dataclass(frozen=True)
class OfHub:
    """A data set of the Hub."""

    name: str
    subset: str | None
    revision: str | None


def load_columns(path: Path, asked: Sequence[str] | None = None) -> pd.DataFrame:
    """Columns of a file or saved data set (all, unless some are asked for), cells unchanged; a missing one is None.

    Args:
        path: Path of the file or data set.
        asked: The columns to read.

    Raises:
        BadValue: If it cannot be read, or has no such column; the message does not name the file.
    """
    try:
        return _as_objects(_loader(path)(path, asked))  # a cell that is no text shows when it is taken out
    except BadValue:
        raise
    except Exception as problem:
        raise BadValue(f"cannot be read: {_reason(problem)}") from problem


def _as_objects(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.astype(object)
    return frame.where(frame.notna(), None)


def _reason(problem: Exception) -> str:
    """One line on the failure."""
    return " ".join(str(problem).split())[:300] or type(problem).__name__


Loader = Callable[[Path, Sequence[str] | None], pd.DataFrame]


def _loader(path: Path) -> Loader:
    loaders: dict[str, Loader] = {".csv": _from_csv, ".jsonl": _from_jsonl, ".parquet": _from_parquet}
    if path.is_dir():
        return _from_disk
    if path.suffix.lower() not in loaders:
        raise ValueError("expected a .csv, .jsonl or .parquet file, or a folder that datasets.save_to_disk wrote")
    return loaders[path.suffix.lower()]


def _chosen(names: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """The requested columns, or all."""
    for column in asked or ():
        if column not in names:
            raise BadValue(f"no column {column!r}; it has {', '.join(map(repr, names))}{nearest(column, names)}")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise BadValue(f"the column {doubled[0]!r} stands there twice: give each column a name of its own")
    return list(names if asked is None else asked)


def decoded(path: Path) -> str:
    """A file's text.

    Raises:
        ValueError: If it is empty or not UTF-8.
    """
    raw = path.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("its encoding is UTF-16: save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")  # without the mark that some programs put first
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        raise ValueError(f"byte 0x{raw[problem.start]:02x} in line {line} is not UTF-8: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"a NUL byte in line {text.count(chr(10), 0, text.index(chr(0))) + 1}: save it as UTF-8 text")
    if not text.strip():
        raise ValueError("it is empty")
    return text


def _from_csv(path: Path, asked: Sequence[str] | None) -> pd.DataFrame:
    """Text as it stands in the file: "01" and "None" are labels like any other."""
    text = decoded(path)
    if sign := separator(text, asked or ()):
        raise BadValue(
            f"its columns are parted by {sign!r}, not by commas: save it with commas, or as JSONL or Parquet"
        )
    if found := swallowed(text):
        raise ValueError(f"{found[0]}{f' (and {len(found) - 1} more such quotes)' if len(found) > 1 else ''}")
    head = pd.read_csv(io.StringIO(text), header=None, nrows=1, dtype=str, keep_default_na=False)
    names = [str(name) for name in head.iloc[0]]
    chosen = _chosen(names, asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
        try:
            frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, index_col=False)
        except (pd.errors.ParserWarning, pd.errors.ParserError) as problem:
            raise ValueError(surplus(text) or _reason(problem)) from problem
    return frame[chosen]


def _from_jsonl(path: Path, asked: Sequence[str] | None) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except BadValue as problem:
            raise BadValue(f"line {number}: {problem}") from None
        except json.JSONDecodeError as problem:
            raise ValueError(f"line {number} is not JSON: {problem}") from None
        except ValueError:  # Python reads no whole number of more than some thousand digits
            raise ValueError(f"line {number} holds a number that is too long to be read: put it in quotes") from None
        except RecursionError:
            raise ValueError(f"line {number} is nested too deep to be read: give each column a text") from None
        if not isinstance(row, dict):
            raise ValueError(f'line {number} is no JSON object: each line must read {{"column": "value", ...}}')
        rows.append(row)
    chosen = _chosen(list(dict.fromkeys(name for row in rows for name in row)), asked)
    return pd.DataFrame({column: [row.get(column) for row in rows] for column in chosen}, dtype=object)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        _chosen([name for name, _ in pairs], None)
    return dict(pairs)


def _from_parquet(path: Path, asked: Sequence[str] | None) -> pd.DataFrame:
    try:
        file = pq.ParquetFile(path)
    except Exception as problem:
        raise ValueError(f"it is not a Parquet file: {_reason(problem)}") from problem
    with file:
        table = file.read(columns=_chosen(list(file.schema_arrow.names), asked))
    frame: pd.DataFrame = table.to_pandas(integer_object_nulls=True, ignore_metadata=True)
    return frame


def _from_disk(path: Path, asked: Sequence[str] | None) -> pd.DataFrame:
    import datasets  # takes a second to import

    return _from_dataset(datasets.load_from_disk(str(path)), asked)


def from_hub(place: OfHub, asked: Sequence[str]) -> pd.DataFrame:
    """A data set by name; the library runs no code of the data set's author."""
    import datasets

    try:
        found = datasets.load_dataset(place.name, place.subset, revision=place.revision)
    except Exception as problem:
        raise BadValue(
            f"cannot be loaded: {_reason(problem)}; check data.source, data.subset and data.revision, log in with "
            "`hf auth login` if it is gated, or download it and name the folder or file"
        ) from problem
    return _as_objects(_from_dataset(found, asked))


def pinned(data: Data) -> Data:
    """The data with the commit of a data set of the hub, so that every process reads the same.

    If the hub cannot be reached, they stay as they are, and the local cache serves all.
    """
    if data.hub_name is None or re.fullmatch("[0-9a-f]{40}", data.revision or ""):
        return data
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(data.hub_name, revision=data.revision).sha
    except Exception:
        return data
    return replace(data, revision=commit)


def _from_dataset(found: Any, asked: Sequence[str] | None) -> pd.DataFrame:
    """All splits in one table, with the split's name in a column `split`, and class names in place of numbers."""
    import datasets

    parts = dict(found) if isinstance(found, datasets.DatasetDict) else {None: found}
    names = list(dict.fromkeys(column for part in parts.values() for column in part.column_names))
    add_split = None not in parts and "split" not in names
    chosen = _chosen([*names, "split"] if add_split else names, asked)
    frames = []
    for split, part in parts.items():
        own = [column for column in chosen if column in part.column_names]
        frame = part.select_columns(own).to_pandas()
        for column in own:
            if isinstance(part.features[column], datasets.ClassLabel):
                frame[column] = _class_names(frame[column], part.features[column].names)
        frames.append(frame.astype(object).assign(split=split) if add_split else frame.astype(object))
    together: pd.DataFrame = pd.concat(frames, ignore_index=True)[chosen]
    return together


def _class_names(numbers: pd.Series[Any], names: Sequence[str]) -> list[str | None]:
    # -1 stands for a hidden label.
    return [None if gone or n < 0 else names[int(n)] for n, gone in zip(numbers, numbers.isna(), strict=True)]
