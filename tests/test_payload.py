from __future__ import annotations

import dataclasses
import io
import json
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from fedsynth.corpus import Corpus, Provenance, Scores
from fedsynth.lora import Adapter
from fedsynth.payload import SCHEMA, BadPayload, corpus_from_parquet, corpus_to_parquet, decode, encode
from fedsynth.privacy.plan import Statement
from fedsynth.tasks import (
    Adopt,
    Adopted,
    Code,
    Evaluate,
    Evaluated,
    Finetune,
    Finetuned,
    Learn,
    Learnt,
    Refused,
    Score,
    Scored,
    SelfTrain,
    SelfTrained,
    Synthesize,
    Synthesized,
)
from fedsynth.typed import BadValue

TEXTS = ("naïve café", "漢字 🩺", "", "a\nb\tc\x00", '"quoted", \\ and {$corpus}', "e\u0301 is not \u00e9")
CORPUS = Corpus(TEXTS, ("ä", "b", "c", "d", "e", "f"), Provenance.LLM_WRITTEN, grants=("g1", "g2"))
ADAPTER = Adapter(
    {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([[0.1]], np.float32)}, 2, 16.0, "base", ("g1",)
)
STATEMENT = Statement("dp", 7.99, 1e-5, 11.28, {2: 18.5, 10: 90.25}, "row", 1, 0.928, 0.125, 60, 0.3, True)
VALUES = [
    Synthesize(per_label=50, temperature=0.8, top_p=0.95, max_tokens=48, seed=2**47 + 1, share_adapter=True),
    Learn(seed=3),
    Learn(seed=3, corpus=CORPUS),
    Evaluate(),
    Synthesized(CORPUS, STATEMENT, unfinished=2),
    Synthesized(Corpus((), (), Provenance.SELF_GENERATED), Statement("none", None, 1e-5), 0, ADAPTER),
    Finetune(ADAPTER, seed=1, frozen_a=True),
    Finetuned(ADAPTER, STATEMENT, records=200),
    Adopt(ADAPTER),
    Adopted(parameters=7),
    Score(CORPUS, seed=4),
    Scored(Scores((0.1, 1 / 3, 0.0), ("g1",)), STATEMENT),
    SelfTrain(ADAPTER, seed=1, writing_seed=2, share=0.25, selection="random", training="mixed"),
    SelfTrained(ADAPTER, Statement("none", None, 1e-5), records=30),
    Learnt(received=5),
    Evaluated({"accuracy": 0.1 + 0.2, "macro_f1": 1 / 3}, examples=600),
    *[Refused(code) for code in Code],
]


def comparable(value: object) -> object:
    """Arrays compare element by element only: as nested lists they compare like the rest."""
    if isinstance(value, Adapter):
        arrays = {n: (a.dtype.str, a.shape, a.tolist()) for n, a in value.arrays.items()}
        return (arrays, value.rank, value.alpha, value.base, value.grants)
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Corpus):
        return (type(value), [comparable(getattr(value, f.name)) for f in dataclasses.fields(value)])
    return value


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_every_order_and_answer_comes_back(value: object) -> None:
    back = decode(encode(value), type(value))
    assert comparable(back) == comparable(value)
    assert encode(back) == encode(value)


def test_every_order_and_answer_class_is_among_the_values() -> None:
    from fedsynth.tasks import ORDERS

    assert {type(v) for v in VALUES} == {*ORDERS, *(o.reply for o in ORDERS), Refused}


def test_equal_values_give_equal_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = dataclasses.replace(ADAPTER, arrays=dict(reversed(ADAPTER.arrays.items())))
    answer = Synthesized(CORPUS, STATEMENT, 0, ADAPTER)
    before = encode(answer)
    monkeypatch.setattr(time, "time", lambda: 2e9)  # a zip made by default holds the clock
    rows = dict(reversed(STATEMENT.epsilon_rows.items()))
    again = Synthesized(dataclasses.replace(CORPUS), dataclasses.replace(STATEMENT, epsilon_rows=rows), 0, turned)
    assert encode(again) == before
    assert encode(Evaluated({"a": 1.0, "b": 2.0}, 1)) == encode(Evaluated({"b": 2.0, "a": 1.0}, 1))


def test_other_values_give_other_bytes() -> None:
    assert len({encode(value) for value in VALUES}) == len(VALUES)


@dataclass(frozen=True)
class Kept:
    corpora: Mapping[int, Corpus] = field(default_factory=dict)


def test_corpora_in_a_table_come_back_under_their_numbers() -> None:
    kept = Kept({3: CORPUS, 11: CORPUS.take([1])})
    assert decode(encode(kept), Kept) == kept


def test_equal_tables_of_corpora_give_equal_bytes() -> None:
    kept = Kept({3: CORPUS, 11: CORPUS.take([1])})
    turned = Kept(dict(reversed(kept.corpora.items())))
    assert kept == turned
    assert encode(kept) == encode(turned)


def archive(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
    return out.getvalue()


def head(value: object, kind: str = "Learn", schema: int = SCHEMA) -> dict[str, bytes]:
    return {"value.json": json.dumps({"schema": schema, "type": kind, "value": value}).encode()}


def test_a_payload_written_by_hand_is_read() -> None:
    assert decode(archive(head({"seed": 7})), Learn) == Learn(7)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (encode(Evaluate()), "expected a Learn of schema 1, got 'Evaluate'"),
        (archive(head({"seed": 7}, schema=2)), "got 'Learn' of schema 2"),
        (archive(head({"seed": 7}), zipfile.ZIP_DEFLATED), "uncompressed"),
        (archive({"other.json": b"{}"}), "not a payload"),
        (archive({"value.json": b"{"}), "not a payload"),
        (b"", "not a payload"),
        (b"PK no zip", "not a payload"),
    ],
)
def test_bytes_that_are_no_such_payload_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(BadPayload, match=said):
        decode(data, Learn)


def test_truncated_bytes_are_refused_wherever_they_end() -> None:
    data = encode(Learn(3, CORPUS))
    for end in range(0, len(data), 37):
        with pytest.raises(BadPayload):
            decode(data[:end], Learn)


def test_a_flipped_bit_in_a_text_is_noticed() -> None:
    data = bytearray(encode(Learn(3, Corpus(("stethoscope",), ("x",), Provenance.PUBLIC))))
    data[data.index(b"stethoscope")] ^= 1
    with pytest.raises(BadPayload, match="CRC"):
        decode(bytes(data), Learn)


def test_a_payload_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Learn(3, CORPUS))
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        size = sum(i.file_size for i in zipped.infolist())
    monkeypatch.setattr("fedsynth.payload.MAX_BYTES", size)
    decode(data, Learn)
    monkeypatch.setattr("fedsynth.payload.MAX_BYTES", size - 1)
    with pytest.raises(BadPayload, match="at most"):
        decode(data, Learn)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"seed": "7"}, "Learn.seed must be a whole number"),
        ({"seed": True}, "Learn.seed must be a whole number"),
        ({}, "'Learn.seed' is missing"),
        ({"seed": 7, "corpse": 1}, "did you mean 'corpus'"),
        ({"seed": 7, "corpus": "text"}, "Learn.corpus"),
    ],
)
def test_fields_of_the_wrong_type_are_refused_by_name(value: object, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        decode(archive(head(value)), Learn)


UNREADABLE: dict[str, bytes] = {
    "no table": archive({"value.json": b"[1]"}),
    "missing part": archive(head({"seed": 7, "corpus": {"$corpus": "0.parquet"}})),
    "no parquet": archive({**head({"seed": 7, "corpus": {"$corpus": "0"}}), "0": b"PAR1"}),
    "other columns": archive({**head({"seed": 7, "corpus": {"$corpus": "0"}}), "0": b""}),
    "no safetensors": archive(
        {
            **head({"$adapter": "0", "rank": 1, "alpha": 1.0, "base": "", "grants": []}, "Synthesized"),
            "0": b"12345678",
        }
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_payload_with_unreadable_parts_is_a_bad_payload(name: str) -> None:
    with pytest.raises((BadPayload, BadValue)):
        decode(UNREADABLE[name], Synthesized if "safe" in name else Learn)


def learn_with(columns: dict[str, list[Any]], compression: str = "none") -> bytes:
    table = pa.table(columns).replace_schema_metadata({"provenance": "public", "grants": "[]"})
    out = io.BytesIO()
    pq.write_table(table, out, compression=compression)
    return archive({**head({"seed": 7, "corpus": {"$corpus": "0"}}), "0": out.getvalue()})


def test_a_corpus_written_by_hand_is_read() -> None:
    decoded = decode(learn_with({"prompt": ["a"], "answer": ["b"]}), Learn)
    assert decoded.corpus == Corpus(("a",), ("b",), Provenance.PUBLIC)


@pytest.mark.parametrize("texts", [[None], [7]])
def test_a_corpus_of_what_is_no_text_is_refused(texts: list[Any]) -> None:
    with pytest.raises((BadPayload, BadValue)):
        decode(learn_with({"prompt": texts, "answer": ["b"]}), Learn)


def test_a_compressed_corpus_is_refused() -> None:
    bomb = learn_with({"prompt": ["a" * 1_000_000], "answer": ["b"]}, compression="zstd")
    assert len(bomb) < 10_000
    with pytest.raises(BadPayload):
        decode(bomb, Learn)


@pytest.mark.parametrize(
    ("facts", "dtype"), [({"rank": "many"}, np.float32), ({"alpha": None}, np.float32), ({}, np.int8)]
)
def test_an_adapter_of_wrong_types_is_refused(facts: dict[str, Any], dtype: type) -> None:
    right = {"rank": 1, "alpha": 1.0, "base": "b", "grants": ["g"]}

    @dataclass(frozen=True)
    class Answer:
        adapter: Adapter

    Answer.__annotations__["adapter"] = Adapter

    def data(facts: dict[str, Any], dtype: type) -> bytes:
        tree = {"adapter": {"$adapter": "0", **right, **facts}}
        return archive({**head(tree, "Answer"), "0": save({"w": np.ones((1, 1), dtype)})})

    assert decode(data({}, np.float32), Answer).adapter.rank == 1
    with pytest.raises((BadPayload, BadValue)):
        decode(data(facts, dtype), Answer)


@pytest.mark.parametrize("value", ["alone", "nested"])
def test_a_corpus_with_units_is_not_written(value: str) -> None:
    private = Corpus(("a",), ("x",), Provenance.PRIVATE, units=("patient 1",))
    with pytest.raises(BadPayload, match="units"):
        encode(Learn(1, private)) if value == "nested" else corpus_to_parquet(private)


def test_parquet_keeps_texts_and_origin_and_more_facts() -> None:
    data = corpus_to_parquet(CORPUS, arm="fdkt")
    assert corpus_from_parquet(data) == CORPUS
    assert pq.read_schema(io.BytesIO(data)).metadata[b"arm"] == b"fdkt"


def test_nothing_in_a_payload_is_compressed() -> None:
    data = encode(Learn(1, Corpus(("a" * 100_000, "b" * 100_000), ("x", "y"), Provenance.PUBLIC)))
    assert len(data) > 200_000
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        [name] = [n for n in zipped.namelist() if n.endswith(".parquet")]
        columns = pq.read_metadata(io.BytesIO(zipped.read(name))).row_group(0)
    assert {columns.column(i).compression for i in range(2)} == {"UNCOMPRESSED"}


def test_twenty_thousand_rows_cost_little_more_than_their_letters() -> None:
    rows = range(20_000)
    texts = tuple(f"note {i}: the patient reports a cough since day {i % 7}" for i in rows)
    corpus = Corpus(texts, tuple(str(i % 7) for i in rows), Provenance.LLM_WRITTEN, grants=("g",))
    data = encode(Learn(1, corpus))
    assert decode(data, Learn).corpus == corpus
    assert len(data) < 2.0 * sum(len(t) for t in texts)
