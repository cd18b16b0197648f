"""Dataclasses to bytes and back: the one serialiser of wire, checkpoint and run directory.

A payload is an uncompressed zip: `value.json` with the scalars, one Parquet file per corpus, one safetensors file per
adapter. Nothing in it is executable and nothing is compressed, so its size is its cost.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedsynth.corpus import Corpus, Provenance
from fedsynth.lora import Adapter
from fedsynth.typed import build, plain

T = TypeVar("T")
SCHEMA = 1
MAX_BYTES = 1 << 30  # a payload above 1 GiB is a mistake or an attack


class BadPayload(ValueError):
    """Bytes that are not a payload of the expected type and schema version."""


def encode(value: object, *, trusted: bool = False) -> bytes:
    """A dataclass as bytes. Equal values give equal bytes.

    Args:
        value: A dataclass.
        trusted: For the writer's own reading: also that an adapter is public, which others would not believe.

    Raises:
        BadPayload: If a private unit would be written: units never leave, so no payload has a place for them.
    """
    parts: list[tuple[str, bytes]] = []
    tree = _take_parts(value, parts, {} if trusted else None)
    head = {"schema": SCHEMA, "type": type(value).__name__, "value": tree}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in [("value.json", json.dumps(head, sort_keys=True).encode()), *parts]:
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data)
    return out.getvalue()


def decode(data: bytes, kind: type[T], *, trusted: bool = False) -> T:
    """The dataclass of type `kind` in `data`.

    Args:
        data: As `encode` gave them.
        kind: The dataclass.
        trusted: Written by this side, as such.

    Raises:
        BadPayload: If the bytes are not a payload, or one of another type or schema version.
        fedsynth.typed.BadValue: If a field does not fit its declared type.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            size = sum(i.file_size for i in infos)
            if any(i.compress_type != zipfile.ZIP_STORED for i in infos) or (size > MAX_BYTES and not trusted):
                raise BadPayload(f"a payload must be uncompressed and at most {MAX_BYTES} bytes")
            files = {i.filename: archive.read(i) for i in infos}
        head = json.loads(files["value.json"])
    except (zipfile.BadZipFile, KeyError, ValueError) as problem:
        raise BadPayload(f"not a payload: {problem}") from problem
    if not isinstance(head, dict):
        raise BadPayload("not a payload: its head is no table")
    if head.get("schema") != SCHEMA or head.get("type") != kind.__name__:
        raise BadPayload(
            f"expected a {kind.__name__} of schema {SCHEMA}, got {head.get('type')!r} of schema {head.get('schema')!r}"
        )
    try:
        tree = _put_parts(head["value"], files, {} if trusted else None)
    except BadPayload:
        raise
    except Exception as problem:  # Arrow and safetensors have exceptions of their own for bad bytes
        raise BadPayload(f"a part of the payload cannot be read: {type(problem).__name__}") from problem
    return build(kind, tree, kind.__name__)


def corpus_to_parquet(corpus: Corpus, **more: str) -> bytes:
    """One corpus as a Parquet file; provenance and grants stand in its schema's metadata."""
    if corpus.units is not None:
        raise BadPayload("a corpus with units (private) cannot be written to a payload")
    facts = {"provenance": corpus.provenance.value, "grants": json.dumps(corpus.grants), **more}
    table = pa.table(
        {"prompt": pa.array(corpus.prompts, pa.string()), "answer": pa.array(corpus.answers, pa.string())}
    ).replace_schema_metadata(facts)
    out = io.BytesIO()
    pq.write_table(table, out, compression="none")
    return out.getvalue()


def corpus_from_parquet(data: bytes) -> Corpus:
    """The corpus that `corpus_to_parquet` wrote."""
    file = pq.ParquetFile(io.BytesIO(data))
    if sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)) > MAX_BYTES:
        raise BadPayload(f"a corpus may unpack to {MAX_BYTES} bytes at most")
    groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
    if any(g.column(c).compression != "UNCOMPRESSED" for g in groups for c in range(g.num_columns)):
        raise BadPayload("a corpus must not be compressed")
    table = file.read()
    for name in ("prompt", "answer"):
        if table.schema.field(name).type != pa.string() or table[name].null_count:
            raise BadPayload(f"the column {name!r} of a corpus must hold text in every row")
    facts = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    return Corpus(
        prompts=tuple(table["prompt"].to_pylist()),
        answers=tuple(table["answer"].to_pylist()),
        provenance=Provenance(facts["provenance"]),
        grants=tuple(json.loads(facts["grants"])),
    )


def _take_parts(value: object, parts: list[tuple[str, bytes]], known: dict[int, Any] | None) -> Any:
    """The tree of a value, its corpora and adapters moved to `parts`; `known` (trusted only) holds those that are there
    already: a state may hold one adapter for each of many clients."""
    if isinstance(value, Corpus | Adapter):
        if known is not None and id(value) in known:
            return known[id(value)]
        if isinstance(value, Corpus):
            name = f"{len(parts)}.parquet"
            parts.append((name, corpus_to_parquet(value)))
            place: dict[str, Any] = {"$corpus": name}
        else:
            name = f"{len(parts)}.safetensors"
            parts.append((name, save_tensors(dict(value.arrays))))
            facts = {"rank": value.rank, "alpha": value.alpha, "base": value.base, "grants": list(value.grants)}
            facts |= {"public": True} if known is not None and value.public else {}
            place = {"$adapter": name, **facts}
        if known is not None:
            known[id(value)] = place
        return place
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init)
        # Left out, None becomes the field's default.
        return {name: _take_parts(v, parts, known) for name, v in pairs if v is not None or known is not None}
    if isinstance(value, Mapping):
        return {str(k): _take_parts(value[k], parts, known) for k in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_take_parts(v, parts, known) for v in value]
    return plain(value)


def _put_parts(tree: Any, files: Mapping[str, bytes], known: dict[str, Any] | None) -> Any:
    if isinstance(tree, dict):
        if "$corpus" in tree or "$adapter" in tree:
            name = tree.get("$corpus") or tree["$adapter"]
            if known is not None and name in known:
                return known[name]
            if "$corpus" in tree:
                found: Corpus | Adapter = corpus_from_parquet(files[name])
            else:
                public = known is not None and tree.get("public") is True
                found = _adapter(load_tensors(files[name]), tree, public=public)
            if known is not None:
                known[name] = found
            return found
        return {k: _put_parts(v, files, known) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_put_parts(v, files, known) for v in tree]
    return tree


def _adapter(arrays: Mapping[str, Any], facts: Mapping[str, Any], *, public: bool) -> Adapter:
    if any(array.dtype != np.float32 for array in arrays.values()):
        raise BadPayload("the tensors of an adapter must be float32")
    rank, alpha = build(int, facts["rank"], "rank"), build(float, facts["alpha"], "alpha")
    if rank < 1 or not 0 < alpha < float("inf"):
        raise BadPayload(f"an adapter needs a rank of at least 1 and a finite alpha above 0, got {rank} and {alpha}")
    grants = build(tuple[str, ...], facts["grants"], "grants")
    return Adapter(arrays, rank, alpha, build(str, facts["base"], "base"), grants, public)
