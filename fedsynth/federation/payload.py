"""Dataclasses to bytes and back, for the wire and the checkpoint; corpora as Parquet files of a run's directory.

A payload is an uncompressed zip: `value.json` with the scalars, one file of JSON lines per corpus (a prompt and its
answer in each line), one safetensors file per adapter. Nothing in it is executable. Nothing in it unpacks to more than
its size. The few lines below read the bytes of other parties and know no other form: with a decoder of a general
format (compression, dictionaries, encryption) the sender would choose what it does.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping
from math import prod
from struct import Struct
from typing import Any, TypeVar, cast, get_args, get_type_hints
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from fedsynth.corpus import Corpus, Provenance
from fedsynth.limits import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_HEAD,
    MAX_NAME,
    MAX_PARTS,
    MAX_TENSORS,
    MAX_TEXT,
    MAX_TEXTS,
    MAX_VALUES,
)
from fedsynth.lora import Adapter
from fedsynth.typed import MAX_DIGITS, BadValue, build, plain

T = TypeVar("T")
SCHEMA = 2
READ = (1, SCHEMA)  # 1 differs in its texts alone; adapters in use, scores and refusals of schema 1 can be read
MAX_LINE = 16 + 2 * 6 * MAX_TEXT  # bytes of a prompt and a reply: JSON writes a character in six at most
ROWS = 64  # of a Parquet file, read at once
SPARE = 1 << 26  # bytes that a Parquet file of any size may unpack to


class BadPayload(BadValue):
    """Bytes that are not a payload of the expected type and schema version. The message repeats nothing of them."""


def encode(value: object, *, trusted: bool = False) -> bytes:
    """A dataclass as bytes. Equal values give equal bytes.

    Args:
        value: A dataclass.
        trusted: For the writer's own reading: keeps the mark of a public adapter, which other readers ignore.

    Raises:
        BadPayload: If a corpus has private units: units never leave, so no payload has a place for them.
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
        data: Bytes from `encode`.
        kind: The dataclass.
        trusted: The bytes were written by this side with `trusted`: read without the caps of `fedsynth.limits`.

    Raises:
        BadPayload: For all other bytes, and no other exception: the sender is at fault, not the reader.
    """
    try:
        return _decoded(data, kind, trusted=trusted)
    except BadPayload:
        raise
    except Exception as problem:  # bytes of another party may raise anything; this is the only place that catches it
        raise BadPayload(f"not a payload: it cannot be read ({type(problem).__name__})") from problem


def _decoded(data: bytes, kind: type[T], *, trusted: bool) -> T:
    files = _own_files(data) if trusted else _files(data)
    if "value.json" not in files:
        raise BadPayload("not a payload: it has no value.json")
    head = _json(files.pop("value.json"), trusted=trusted)
    if not isinstance(head, dict) or set(head) != {"schema", "type", "value"}:
        raise BadPayload("not a payload: its head is no table of schema, type and value")
    if head["schema"] not in READ or head["type"] != kind.__name__:
        raise BadPayload(f"expected a {kind.__name__} of schema {SCHEMA}, got another type or schema")
    if not trusted:
        _check_places(kind, head["value"])
    tree = _put_parts(head["value"], files, {} if trusted else None)
    if files and not trusted:
        raise BadPayload("a payload holds a part that its value does not name")
    try:
        return build(kind, tree, kind.__name__)
    except BadValue as problem:
        raise BadPayload(str(problem) if trusted else _misfit(kind, tree, kind.__name__)) from problem


def _check_places(kind: type, tree: Any) -> None:
    """Checks that texts and adapters stand only where the type has them. This precedes all reading, as reading texts
    takes some ten times their bytes."""
    if not isinstance(tree, dict):
        raise BadPayload(f"{kind.__name__} is no table")
    hints = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(cast(Any, kind)) if field.init]
    if set(tree) - set(fields):
        raise BadPayload(f"{kind.__name__} has a field that is none of {', '.join(fields)}")
    for name, value in tree.items():
        options = (hints[name], *get_args(hints[name]))
        own = [mark for mark, part in (("$corpus", Corpus), ("$adapter", Adapter)) if part in options]
        if own and isinstance(value, dict) and own[0] in value:
            value = {key: inner for key, inner in value.items() if key != own[0]}
        if _holds_part(value):
            raise BadPayload(f"{kind.__name__}.{name} holds texts or an adapter that do not belong there")


def _holds_part(tree: Any) -> bool:
    if isinstance(tree, dict):
        return "$corpus" in tree or "$adapter" in tree or any(map(_holds_part, tree.values()))
    return isinstance(tree, list) and any(map(_holds_part, tree))


def _misfit(kind: type, tree: Any, place: str) -> str:
    """Names the declared field that does not fit. It repeats nothing that was sent, as messages end up in reports."""
    if not isinstance(tree, dict):
        return f"{place} is no table"
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if set(tree) - set(fields):
        return f"{place} has a field that is none of {', '.join(fields)}"
    for name, value in tree.items():
        inner = hints[name]
        try:
            build(inner, value, name)
        except ValueError:
            nested = dataclasses.is_dataclass(inner) and isinstance(value, dict)
            return _misfit(inner, value, f"{place}.{name}") if nested else f"{place}.{name} does not fit its type"
    missing = [name for name in fields if name not in tree]
    return f"{place} is not consistent" + (f", or lacks one of {', '.join(missing)}" if missing else "")


# ---- The archive -----------------------------------------------------------------------------------------------------

# PKWARE's APPNOTE, sections 4.3.7, 4.3.12 and 4.3.16: signature, versions, flags, method, time, date, ...
_LOCAL = Struct("<4s5H3L2H")
_CENTRAL = Struct("<4s6H3L5H2L")
_END = Struct("<4s4H2LH")


def _files(data: bytes) -> dict[str, memoryview]:
    """The members of a zip as `encode` writes it: stored, in one piece, each byte at its one place; nothing is copied.

    All else that a zip could hold is refused: compression, encryption, extra fields, comments, members twice or over
    one another, bytes before, between and after them.
    """
    view, end = memoryview(data), len(data) - _END.size
    if not 0 <= end <= MAX_BYTES:
        raise BadPayload(f"not a payload: it must have at most {MAX_BYTES} bytes, and at least those of an empty one")
    signature, disk, first, here, count, size, start, comment = _END.unpack_from(view, end)
    if signature != b"PK\5\6" or disk or first or here != count or comment or start + size != end:
        raise BadPayload("not a payload: it does not end as one")
    if count > MAX_PARTS:
        raise BadPayload(f"a payload must have at most {MAX_PARTS} parts")
    files: dict[str, memoryview] = {}
    place, at = 0, start  # of the next member, of its entry in the directory
    for _ in range(count):
        mark, _, _, flags, method, _, _, crc, packed, size, length, extra, comment, disk, _, _, offset = (
            _CENTRAL.unpack_from(view, at)
        )
        local, _, *again, longer, more = _LOCAL.unpack_from(view, place)
        begin = place + _LOCAL.size + length
        name = bytes(view[at + _CENTRAL.size : at + _CENTRAL.size + length])
        plain_entry = (flags, method, packed, extra, comment, disk, offset) == (0, 0, size, 0, 0, 0, place)
        same_again = (*again[:2], *again[4:], longer, more) == (0, 0, crc, size, size, length, 0)
        same_name = bytes(view[place + _LOCAL.size : begin]) == name
        if (mark, local) != (b"PK\1\2", b"PK\3\4") or not (plain_entry and same_again and same_name):
            raise BadPayload("a payload must be uncompressed, and hold nothing but its parts")
        part = view[begin : begin + size]
        if crc32(part) != crc:
            raise BadPayload("a part of the payload is not what was written: its CRC-32 is another")
        if (text := name.decode("ascii")) in files:
            raise BadPayload("a payload holds a part twice")
        files[text] = part
        place, at = begin + size, at + _CENTRAL.size + length
    if place != start or at != end:
        raise BadPayload("a payload must hold nothing but its parts")
    return files


def _own_files(data: bytes) -> dict[str, memoryview]:
    """The members of a zip that this side wrote, of any size."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: memoryview(archive.read(info)) for info in archive.infolist()}


def _json(data: memoryview, *, trusted: bool = False) -> Any:
    raw = bytes(data)
    if trusted:
        return json.loads(raw)
    if len(raw) > MAX_HEAD or sum(map(raw.count, (b",", b"[", b"{", b":"))) > MAX_VALUES:
        raise BadPayload(f"its JSON must have at most {MAX_HEAD} bytes and {MAX_VALUES} values")
    tree = json.loads(raw.decode(), object_pairs_hook=_table, parse_int=_whole)
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise BadPayload(f"its JSON must not nest deeper than {MAX_DEPTH}")
        texts = [each for each in level if isinstance(each, str)]
        if any(len(text) > MAX_NAME for text in texts):
            raise BadPayload(f"a text outside of a corpus must have at most {MAX_NAME} characters")
        "".join(texts).encode()  # half a surrogate pair is no text
        inner: list[Any] = []
        for each in level:
            inner += each if isinstance(each, list) else [*each, *each.values()] if isinstance(each, dict) else ()
        level = inner
    return tree


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise BadPayload("a table of its JSON has a name twice")
    return table


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BadPayload(f"a whole number must have at most {MAX_DIGITS} digits")
    return int(digits)


# ---- Texts and adapters ----------------------------------------------------------------------------------------------

_line = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _take_parts(value: object, parts: list[tuple[str, bytes]], known: dict[int, Any] | None) -> Any:
    """The tree of a value, its corpora and adapters moved to `parts`. `known` (trusted only) holds the parts so far: a
    state may hold one adapter for each of many clients."""
    if isinstance(value, Corpus | Adapter):
        if known is not None and id(value) in known:
            return known[id(value)]
        if isinstance(value, Corpus):
            _check_leaves(value)
            name = f"{len(parts)}.jsonl"
            rows = zip(value.prompts, value.answers, strict=True)
            parts.append((name, "".join(_line(row) + "\n" for row in rows).encode()))
            place: dict[str, Any] = {
                "$corpus": name,
                "provenance": value.provenance.value,
                "grants": list(value.grants),
            }
        else:
            name = f"{len(parts)}.safetensors"
            parts.append((name, save_tensors(dict(value.arrays))))
            place = {"$adapter": name, "rank": value.rank, "alpha": value.alpha, "base": value.base}
            place |= {"public": True} if known is not None and value.public else {}
        place["grants"] = list(value.grants)
        if known is not None:
            known[id(value)] = {key: place[key] for key in ("$corpus", "$adapter") if key in place}
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


def _put_parts(tree: Any, files: dict[str, memoryview], known: dict[str, Any] | None) -> Any:
    """The inverse of `_take_parts`. On the wire each part is named once, so that it is read once."""
    if isinstance(tree, dict):
        if "$corpus" in tree or "$adapter" in tree:
            name = tree.get("$corpus") or tree["$adapter"]
            if known is not None and name in known:
                return known[name]
            if name not in files:
                raise BadPayload("a payload names a part that it does not hold, or one twice")
            data, trusted = files.pop(name), known is not None
            found = _corpus(tree, data, trusted) if "$corpus" in tree else _adapter(tree, data, trusted)
            if known is not None:
                known[name] = found
            return found
        return {k: _put_parts(v, files, known) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_put_parts(v, files, known) for v in tree]
    return tree


def _corpus(facts: Mapping[str, Any], data: memoryview, trusted: bool) -> Corpus:
    """From JSON lines: `["prompt","answer"]`, each with its line end."""
    raw = bytes(data)
    if raw.startswith(b"PAR1"):
        if trusted:
            return corpus_from_parquet(raw)
        raise BadPayload(f"expected texts of schema {SCHEMA}, got those of schema 1, which an earlier version wrote")
    if not trusted and raw.count(b"\n") > MAX_TEXTS:
        raise BadPayload(f"a corpus must have at most {MAX_TEXTS} texts")
    lines = raw.split(b"\n")
    if lines.pop():
        raise BadPayload("a corpus must end with a line end")
    prompts, replies = [], []
    for line in lines:
        if not trusted and len(line) > MAX_LINE:
            raise BadPayload(f"a corpus holds a text of more than {MAX_TEXT} characters")
        row = json.loads(line.decode())
        if not (isinstance(row, list) and len(row) == 2 and all(isinstance(text, str) for text in row)):
            raise BadPayload("a line of a corpus must be a list of two texts")
        if b"\\u" in line:
            "".join(row).encode()  # half a surrogate pair is no text
        prompts.append(row[0])
        replies.append(row[1])
    provenance = build(Provenance, facts["provenance"], "provenance")
    return Corpus(tuple(prompts), tuple(replies), provenance, build(tuple[str, ...], facts["grants"], "grants"))


def _adapter(facts: Mapping[str, Any], data: memoryview, trusted: bool) -> Adapter:
    rank, alpha = build(int, facts["rank"], "rank"), build(float, facts["alpha"], "alpha")
    if rank < 1 or not 0 < alpha < float("inf"):
        raise BadPayload(f"an adapter needs a rank of at least 1 and a finite alpha above 0, got {rank} and {alpha}")
    base, grants = build(str, facts["base"], "base"), build(tuple[str, ...], facts["grants"], "grants")
    return Adapter(_tensors(data), rank, alpha, base, grants, trusted and facts.get("public") is True)


def _tensors(data: memoryview) -> dict[str, NDArray[np.float32]]:
    """The tensors of a safetensors file: matrices of float32, one behind the other, without gaps."""
    size = int.from_bytes(data[:8], "little")
    if not size <= len(data) - 8:
        raise BadPayload("the tensors of an adapter are cut off")
    head, body = _json(data[8 : 8 + size]), data[8 + size :]
    if not isinstance(head, dict) or len(head) > MAX_TENSORS:
        raise BadPayload(f"an adapter must be a table of at most {MAX_TENSORS} tensors")
    found, place = {}, 0
    for name, facts in sorted(head.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        shape, (begin, end) = facts["shape"], facts["data_offsets"]
        if facts["dtype"] != "F32":
            raise BadPayload("the tensors of an adapter must be float32")
        if len(shape) != 2 or not all(type(width) is int and width > 0 for width in shape):
            raise BadPayload("the tensors of an adapter must be matrices")
        if begin != place or end - begin != 4 * prod(shape):
            raise BadPayload("the tensors of an adapter must lie one behind the other, as large as their shapes")
        # A copy: a view would keep the whole message in memory, and torch writes into its input.
        found[name] = np.frombuffer(body[begin:end], "<f4").reshape(shape).astype(np.float32)
        place = end
    if place != len(body):
        raise BadPayload("behind the tensors of an adapter lies something else")
    return found


def _check_leaves(corpus: Corpus) -> None:
    if any(own is not None for own in (corpus.units, corpus.options, corpus.attributes)):
        raise BadPayload("a corpus with units, options or attributes (private) cannot be written to a payload")


# ---- Files of a run's directory --------------------------------------------------------------------------------------


def corpus_to_parquet(corpus: Corpus, **more: str) -> bytes:
    """One corpus as a Parquet file of a run's directory; its schema's metadata holds provenance, grants and `more`.
    Such files are never sent or received."""
    _check_leaves(corpus)
    facts = {"provenance": corpus.provenance.value, "grants": json.dumps(corpus.grants), **more}
    table = pa.table(
        {"prompt": pa.array(corpus.prompts, pa.string()), "answer": pa.array(corpus.answers, pa.string())}
    ).replace_schema_metadata(facts)
    out = io.BytesIO()
    pq.write_table(table, out, compression="none", use_dictionary=False)
    return out.getvalue()


def corpus_from_parquet(data: bytes) -> Corpus:
    """The corpus that `corpus_to_parquet` wrote.

    A few hundred kilobytes of Parquet can hold a gigabyte of text (one text in a dictionary, named by each row), and
    its footer can deny it. So bytes are counted as they come.

    Raises:
        BadPayload: If it is none, unpacks to more than `SPARE` plus four times its size, or has over MAX_TEXTS rows.
    """
    try:
        return _from_parquet(data)
    except BadPayload:
        raise
    except Exception as problem:  # Arrow has exceptions of its own
        raise BadPayload(f"no Parquet file of texts: {type(problem).__name__}") from problem


def _from_parquet(data: bytes) -> Corpus:
    file = pq.ParquetFile(io.BytesIO(data), thrift_string_size_limit=MAX_HEAD, thrift_container_size_limit=MAX_VALUES)
    names, metadata = ("prompt", "answer"), file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if metadata.num_columns != 2 or any(file.schema_arrow.field(name).type != pa.string() for name in names):
        raise BadPayload("a corpus must have two columns of text, 'prompt' and 'answer'")
    if any(group.column(c).compression != "UNCOMPRESSED" for group in groups for c in range(2)):
        raise BadPayload("a corpus must not be compressed")
    if metadata.num_rows > MAX_TEXTS:
        raise BadPayload(f"a corpus must have at most {MAX_TEXTS} texts")
    columns: tuple[list[str], list[str]] = ([], [])
    left = SPARE + 4 * len(data)  # files of older runs hold labels, and texts that repeat, in dictionaries
    for batch in file.iter_batches(ROWS, columns=list(names)):
        left -= batch.nbytes
        if left < 0:
            raise BadPayload(f"a corpus of {len(data)} bytes may not unpack to more than {SPARE} and four times that")
        for texts, name in zip(columns, names, strict=True):
            if batch[name].null_count:
                raise BadPayload(f"the column {name!r} of a corpus must hold text in every row")
            texts += batch[name].to_pylist()
    facts = {k.decode(): v.decode() for k, v in (file.schema_arrow.metadata or {}).items()}
    grants = build(tuple[str, ...], json.loads(facts["grants"]), "grants")
    return Corpus(tuple(columns[0]), tuple(columns[1]), Provenance(facts["provenance"]), grants)
