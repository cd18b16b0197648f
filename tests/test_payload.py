from __future__ import annotations

import dataclasses
import io
import json
import time
import tracemalloc
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from fedsynth.corpus import Corpus, Provenance, Scores, Votes
from fedsynth.federation.messages import (
    Adopt,
    Adopted,
    ErrorCode,
    Evaluate,
    Evaluated,
    Finetune,
    Finetuned,
    KeysOffered,
    Learn,
    Learnt,
    OfferKeys,
    OpenShares,
    Refused,
    Score,
    Scored,
    SeedsShared,
    SelfTrain,
    SelfTrained,
    ShareSeeds,
    SharesOpened,
    SignSurvivors,
    SurvivorsSigned,
    Synthesize,
    Synthesized,
    Unmask,
    Unmasked,
    Vote,
    Voted,
)
from fedsynth.federation.payload import SCHEMA, BadPayload, corpus_from_parquet, corpus_to_parquet, decode, encode
from fedsynth.federation.secure_sum import Offer, Sealed, SeedShare, Signed
from fedsynth.lora import Adapter
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.statement import Statement
from fedsynth.typed import BadValue

TEXTS = ("naïve café", "漢字 🩺", "", "a\nb\tc\x00", '"quoted", \\ and {$corpus}', "e\u0301 is not \u00e9")
CORPUS = Corpus(TEXTS, ("ä", "b", "c", "d", "e", "f"), Provenance.LLM_WRITTEN, grants=("g1", "g2"))
ADAPTER = Adapter(
    {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([[0.1]], np.float32)}, 2, 16.0, "base", ("g1",)
)
STATEMENT = Statement("dp", 7.99, 1e-5, 11.28, {2: 18.5, 10: 90.25}, "row", 1, 0.928, 0.125, 60, 0.3, True)
SUM, OFFER = "0123456789abcdef" * 2, Offer(3, "ab", "cd", "ef", "votes", Cohort(3), 1.5, "a key", "01")
VALUES = [
    Synthesize(per_label=50, temperature=0.8, top_p=0.95, max_new_tokens=48, seed=2**47 + 1),
    Learn(seed=3),
    Learn(seed=3, corpus=CORPUS),
    Evaluate(),
    Synthesized(CORPUS, STATEMENT, unfinished=2),
    Synthesized(Corpus((), (), Provenance.SELF_GENERATED), Statement("none", None, 1e-5), 0),
    Finetune(ADAPTER, seed=1, frozen_a=True),
    Finetuned(ADAPTER, STATEMENT, records=200),
    Adopt(ADAPTER),
    Adopted(parameters=7),
    Score(CORPUS, seed=4),
    Scored(Scores((0.1, 1 / 3, 0.0), ("g1",)), STATEMENT),
    Vote(CORPUS, nearest=4),
    Voted(Votes((-0.1, 1 / 3, 250.5), ("g1",)), STATEMENT),
    SelfTrain(ADAPTER, seed=1, writing_seed=2, share=0.25, selection="random", training="mixed"),
    SelfTrained(ADAPTER, Statement("none", None, 1e-5), records=30),
    OfferKeys(SUM, "votes"),
    KeysOffered(OFFER),
    ShareSeeds(SUM, (OFFER, OFFER)),
    SeedsShared((Sealed(3, "ab" * 48),)),
    OpenShares(SUM, (Sealed(0, "cd"),)),
    SharesOpened((1,)),
    SignSurvivors(SUM, (0, 3)),
    SurvivorsSigned("ab"),
    Unmask(SUM, (0, 3), (Signed(3, "ab"),)),
    Unmasked((SeedShare(3, "ef" * 16),)),
    Learnt(received=5),
    Evaluated({"accuracy": 0.1 + 0.2, "macro_f1": 1 / 3}, examples=600),
    *[Refused(code) for code in ErrorCode],
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
def test_every_request_and_answer_comes_back(value: object) -> None:
    back = decode(encode(value), type(value))
    assert comparable(back) == comparable(value)
    assert encode(back) == encode(value)


def test_every_request_and_answer_class_is_among_the_values() -> None:
    from fedsynth.federation.messages import REQUESTS

    assert {type(v) for v in VALUES} == {*REQUESTS, *(o.reply for o in REQUESTS), Refused}


def test_equal_values_give_equal_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = dataclasses.replace(ADAPTER, arrays=dict(reversed(ADAPTER.arrays.items())))
    texts, trained = Synthesized(CORPUS, STATEMENT, 0), Finetuned(ADAPTER, STATEMENT, records=200)
    before = encode(texts), encode(trained)
    monkeypatch.setattr(time, "time", lambda: 2e9)  # a zip made by default holds the clock
    rows = dict(reversed(STATEMENT.epsilon_rows.items()))
    said = dataclasses.replace(STATEMENT, epsilon_rows=rows)
    again = Synthesized(dataclasses.replace(CORPUS), said, 0), Finetuned(turned, said, records=200)
    assert (encode(again[0]), encode(again[1])) == before
    assert encode(Evaluated({"a": 1.0, "b": 2.0}, 1)) == encode(Evaluated({"b": 2.0, "a": 1.0}, 1))


def test_other_values_give_other_bytes() -> None:
    assert len({encode(value) for value in VALUES}) == len(VALUES)


@dataclass(frozen=True)
class Kept:
    corpora: Mapping[int, Corpus] = field(default_factory=dict)


def test_corpora_in_a_table_come_back_under_their_numbers() -> None:
    kept = Kept({3: CORPUS, 11: CORPUS.take([1])})
    assert decode(encode(kept, trusted=True), Kept, trusted=True) == kept
    with pytest.raises(BadPayload, match=r"Kept\.corpora holds texts or an adapter that do not belong there"):
        decode(encode(kept), Kept)  # no request and no answer has such a table


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


def test_an_adapter_that_an_earlier_version_left_at_a_site_is_read_and_its_texts_are_named() -> None:
    factor = np.ones((2, 3), np.float32)
    facts = {"$adapter": "0.safetensors", "rank": 2, "alpha": 4.0, "base": "b", "grants": ["g"]}
    data = archive({**head({"adapter": facts}, "Adopt", schema=1), "0.safetensors": save({"x.lora_A.weight": factor})})
    assert (decode(data, Adopt).adapter.arrays["x.lora_A.weight"] == factor).all()
    texts = {**head({"seed": 7, "corpus": {"$corpus": "0.parquet"}}, schema=1), "0.parquet": corpus_to_parquet(CORPUS)}
    with pytest.raises(BadPayload, match="texts of schema 2, got those of schema 1"):
        decode(archive(texts), Learn)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (encode(Evaluate()), "expected a Learn of schema 2, got another type"),
        (archive(head({"seed": 7}, schema=3)), "expected a Learn of schema 2, got another type or schema"),
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
    monkeypatch.setattr("fedsynth.federation.payload.MAX_BYTES", len(data))
    decode(data, Learn)
    monkeypatch.setattr("fedsynth.federation.payload.MAX_BYTES", size - 1)
    with pytest.raises(BadPayload, match="at most"):
        decode(data, Learn)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"seed": "7"}, "Learn.seed does not fit its type"),
        ({"seed": True}, "Learn.seed does not fit its type"),
        ({}, "lacks one of seed"),
        ({"seed": 7, "corpse": 1}, "Learn has a field that is none of seed, corpus"),
        ({"seed": 7, "corpus": "text"}, "Learn.corpus does not fit its type"),
        ([7], "Learn is no table"),
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


def learn_with(lines: bytes, **facts: Any) -> bytes:
    corpus = {"$corpus": "0", "provenance": "public", "grants": [], **facts}
    return archive({**head({"seed": 7, "corpus": corpus}), "0": lines})


def test_a_corpus_written_by_hand_is_read() -> None:
    decoded = decode(learn_with(b'["a","b"]\n[ "\\u00e9\\ud83e\\ude7a" , "" ]\n'), Learn)
    assert decoded.corpus == Corpus(("a", "\u00e9\U0001fa7a"), ("b", ""), Provenance.PUBLIC)
    assert decode(learn_with(b""), Learn).corpus == Corpus((), (), Provenance.PUBLIC)


@pytest.mark.parametrize(
    "lines",
    [
        b'[null,"b"]\n', b'[7,"b"]\n', b'["a"]\n', b'["a","b","c"]\n', b'{"a":"b"}\n', b'"ab"\n', b'["a","b"]',
        b"\n", b'["a","b"]\n\n', b'["a\n","b"]\n', b'["\xff","b"]\n', b'["\\ud800","b"]\n', b'["a","\\uDC00"]\n',
        b"[" * 100_000 + b"\n", b'["' + b"a" * 300_000 + b'","b"]\n',
    ],
)  # fmt: skip
def test_a_corpus_of_what_is_no_text_is_refused(lines: bytes) -> None:
    with pytest.raises(BadPayload):
        decode(learn_with(lines), Learn)


@pytest.mark.parametrize("facts", [{"provenance": "unknown"}, {"grants": [1]}, {"grants": "g"}, {"provenance": []}])
def test_a_corpus_of_unknown_origin_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(BadPayload):
        decode(learn_with(b'["a","b"]\n', **facts), Learn)


def test_a_corpus_of_too_many_texts_is_refused_before_any_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsynth.federation.payload.MAX_TEXTS", 3)
    decode(learn_with(b'["a","b"]\n' * 3), Learn)
    with pytest.raises(BadPayload, match="at most 3 texts"):
        decode(learn_with(b"?\n" * 4), Learn)


# What costs its reader more than its sender

ONE = {"$adapter": "0", "rank": 1, "alpha": 1.0, "base": "b", "grants": ["g"]}


def adopt_with(table: Any, body: bytes = b"\0" * 4, size: int | None = None) -> bytes:
    """A request with an adapter whose safetensors file is written by hand."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    tensors = (len(text) if size is None else size).to_bytes(8, "little") + text + body
    return archive({**head({"adapter": ONE}, "Adopt"), "0": tensors})


def tensor(shape: Any = (1, 1), begin: int = 0, end: int = 4, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_written_by_hand_are_read() -> None:
    table = {"b": tensor((2, 1), 4, 12), "a": tensor()}  # in the order of the bytes, whatever that of the names
    found = decode(adopt_with(table, np.arange(3, dtype="<f4").tobytes()), Adopt).adapter.arrays
    assert {name: array.tolist() for name, array in found.items()} == {"a": [[0.0]], "b": [[1.0], [2.0]]}
    assert all(array.dtype == np.float32 and array.flags.writeable for array in found.values())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (adopt_with({"a": tensor((1,) * 40)}), "matrices"),
        (adopt_with({"a": tensor(())}), "matrices"),
        (adopt_with({"a": tensor((4,))}), "matrices"),
        (adopt_with({"a": tensor((1 << 40, 1 << 40))}), "as large as their shapes"),
        (adopt_with({"a": tensor((0, 5), 0, 0)}, b""), "matrices"),
        (adopt_with({"a": tensor((True, 1))}), "matrices"),
        (adopt_with({"a": tensor((-1, -1))}), "matrices"),
        (adopt_with({"a": tensor(), "b": tensor()}), "one behind the other"),  # both on the same bytes
        (adopt_with({"a": tensor((1, 1), 4, 8)}, b"\0" * 8), "one behind the other"),
        (adopt_with({"a": tensor()}, b"\0" * 8), "behind the tensors"),
        (adopt_with({"a": tensor()}, b""), "cannot be read|cut off|as large|behind"),
        (adopt_with({"a": tensor(dtype="F64", end=8)}, b"\0" * 8), "float32"),
        (adopt_with({"a": tensor()}, size=1 << 63), "cut off"),
        (adopt_with({"__metadata__": {"format": "pt"}, "a": tensor()}), "cannot be read"),
        (adopt_with({f"a{i}": tensor() for i in range(20_001)}), "at most 20000 tensors"),
        (adopt_with(b"[" * 100_000), "cannot be read"),
        (adopt_with([]), "table"),
    ],
)
def test_tensors_that_are_not_as_safetensors_writes_them_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(BadPayload, match=said):
        decode(data, Adopt)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"[" * 100_000, "cannot be read"),
        (b"[" * 17 + b"]" * 17, "nest deeper than 16"),
        (b"1" + b"0" * 400, "at most 40 digits"),
        (b"1" + b"0" * 100_000, "at most 40 digits"),
        (b'{"seed": 1, "seed": 2}', "a name twice"),
        (b'{"seed": "' + b"x" * 501 + b'"}', "at most 500 characters"),
        (b'{"' + b"x" * 501 + b'": 1}', "at most 500 characters"),
        (b'{"seed": "\\ud800"}', "cannot be read"),
        (b"[" + b"0," * (1 << 20) + b"0]", "values"),
        (b" " * (1 << 25), "bytes"),
    ],
    ids=["nested", "too deep", "400 digits", "100000 digits", "twice", "text", "name", "surrogate", "values", "size"],
)
def test_json_that_multiplies_or_overflows_is_refused(value: bytes, said: str) -> None:
    data = archive({"value.json": b'{"schema": 2, "type": "Learn", "value": %s}' % value})
    with pytest.raises(BadPayload, match=said):
        decode(data, Learn)


def test_numbers_beyond_floats_do_not_fit() -> None:
    for number in (b"1e999", b"-1e999", b"9" * 40):
        value = b'{"start": {"$adapter": "0", "rank": 1, "alpha": %s, "base": "b", "grants": []}, "seed": 1}' % number
        data = archive({"value.json": b'{"schema": 2, "type": "Finetune", "value": %s}' % value, "0": save({})})
        if number == b"9" * 40:  # a finite alpha: the firewall has the range
            assert decode(data, Finetune).start.alpha == 1e40
        else:
            with pytest.raises(BadPayload, match="finite alpha"):
                decode(data, Finetune)


@dataclass(frozen=True)
class Both:
    corpus: Corpus
    adapter: Adapter


def test_each_part_is_named_once() -> None:
    corpus = {"$corpus": "0", "provenance": "public", "grants": []}
    for value, files, said in [
        (
            {"seed": 7, "corpus": corpus, "more": [corpus] * 1000},
            {"0": b""},
            "none of corpus, seed|none of seed, corpus",
        ),
        ({"seed": 7, "corpus": corpus}, {}, "does not hold"),
        ({"seed": 7}, {"0": b""}, "does not name"),
        ({"seed": 7}, {str(i): b"" for i in range(4)}, "at most 4 parts"),
    ]:
        with pytest.raises(BadPayload, match=said):
            decode(archive({**head(value), **files}), Learn)
    trained = {"$adapter": "0", "rank": 1, "alpha": 1.0, "base": "", "grants": []}
    read = json.dumps({"schema": 2, "type": "Both", "value": {"corpus": corpus, "adapter": trained}}).encode()
    with pytest.raises(BadPayload, match="one twice"):
        decode(archive({"value.json": read, "0": b""}), Both)


def patched(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    """Other bytes in the first header that begins with a mark."""
    place = data.index(mark) + offset
    return data[:place] + value + data[place + len(value) :]


LEARN = encode(Learn(3, CORPUS))
LOCAL, ENTRY, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
FOREIGN: dict[str, bytes] = {
    "encrypted": patched(patched(LEARN, LOCAL, 6, b"\1"), ENTRY, 8, b"\1"),
    "encrypted, says the directory": patched(LEARN, ENTRY, 8, b"\1"),
    "patched": patched(patched(LEARN, LOCAL, 6, b"\x20"), ENTRY, 8, b"\x20"),
    "strongly encrypted": patched(patched(LEARN, LOCAL, 6, b"\x41"), ENTRY, 8, b"\x41"),
    "deflated": patched(patched(LEARN, LOCAL, 8, b"\x08"), ENTRY, 10, b"\x08"),
    "method 99": patched(patched(LEARN, LOCAL, 8, b"\x63"), ENTRY, 10, b"\x63"),
    "on a second disk": patched(LEARN, ENTRY, 34, b"\1"),
    "larger in the directory": patched(LEARN, ENTRY, 20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f"),
    "zip64": patched(LEARN, ENTRY, 20, b"\xff" * 8),
    "another name in the directory": patched(LEARN, ENTRY, 46, b"w"),
    "elsewhere": patched(LEARN, ENTRY, 42, b"\1"),
    "more entries than there are": patched(LEARN, END, 8, b"\xff\xff\xff\xff"),
    "a longer directory": patched(LEARN, END, 12, b"\xff"),
    "a comment": LEARN[:-2] + b"\1\0x",
    "bytes before it": b"x" + LEARN,
    "bytes behind it": LEARN + b"x",
    "two behind one another": LEARN + LEARN,
    "the first of two": LEARN + encode(Learn(4, CORPUS)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_only_the_one_way_to_write_a_zip_is_read(name: str) -> None:
    assert FOREIGN[name] != LEARN
    with pytest.raises(BadPayload):
        decode(FOREIGN[name], Learn)


def test_a_member_twice_is_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        zipped.writestr("value.json", head({"seed": 1})["value.json"])
        with pytest.warns(UserWarning, match="Duplicate"):
            zipped.writestr("value.json", head({"seed": 2})["value.json"])
    with pytest.raises(BadPayload, match="a part twice"):
        decode(out.getvalue(), Learn)


def test_versions_and_times_of_another_writer_are_no_difference() -> None:
    data = patched(patched(LEARN, LOCAL, 4, b"\x0a"), ENTRY, 4, b"\x3f\x03\x0a")
    assert decode(patched(data, LOCAL, 10, b"\1\2\3\4"), Learn) == Learn(3, CORPUS)


BOMBS = {
    "lists": (b"[" + b"[]," * 30_000 + b"0]", 64),
    "tables": (b"[" + b"{}," * 30_000 + b"0]", 64),
    "numbers": (b"[" + b"1.5," * 30_000 + b"0]", 64),
    "many lists": (b"[" + b"[]," * 3_000_000 + b"0]", 4),
}


@pytest.mark.parametrize("name", BOMBS)
def test_json_costs_its_reader_little_more_than_its_sender(name: str) -> None:
    value, times = BOMBS[name]
    data = archive({"value.json": b'{"schema": 2, "type": "Learn", "value": {"seed": 1, "more": %s}}' % value})
    tracemalloc.start()
    with pytest.raises(BadPayload):
        decode(data, Learn)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < times * len(data)


def texts(rows: int) -> bytes:
    return "".join(f'["{chr(0x4E00 + i % 20_000)}{i}","ab"]\n' for i in range(rows)).encode()


PART = {"provenance": "dp_synthetic", "grants": ["g"]}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Synthesized, {"x": [{"$corpus": f"{i}.jsonl", **PART} for i in range(3)]}),
        (Synthesized, {"corpus": [{"$corpus": f"{i}.jsonl", **PART} for i in range(3)]}),
        (Synthesized, {"adapter": {"$corpus": "0.jsonl", **PART}}),
        (Synthesized, {"corpus": {"$corpus": "0.jsonl", "$adapter": "1.jsonl", **PART}}),
        (Synthesized, {"corpus": {"$corpus": "0.jsonl", **PART, "grants": [{"$corpus": "1.jsonl", **PART}]}}),
        (Synthesized, {"statement": {"epsilon_rows": {"2": {"$corpus": "0.jsonl", **PART}}}}),
        (Evaluated, {"metrics": {"accuracy": {"$corpus": "0.jsonl", **PART}}, "examples": 1}),
        (Learn, [{"$corpus": "0.jsonl", **PART}]),
    ],
)
def test_texts_that_do_not_belong_into_a_value_are_not_even_read(kind: type, value: object) -> None:
    head = json.dumps({"schema": 2, "type": kind.__name__, "value": value}).encode()
    data = archive({"value.json": head, **{f"{i}.jsonl": texts(10_000) for i in range(3)}})
    tracemalloc.start()
    with pytest.raises(BadPayload):
        decode(data, kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data)


def test_texts_cost_their_reader_less_than_sixteen_times_their_bytes() -> None:
    value = {"seed": 1, "corpus": {"$corpus": "0.jsonl", **PART}}
    head = json.dumps({"schema": 2, "type": "Learn", "value": value}).encode()
    data = archive({"value.json": head, "0.jsonl": texts(20_000)})
    tracemalloc.start()
    assert len(decode(data, Learn).corpus or ()) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * len(data)


def test_what_this_side_wrote_itself_has_no_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_HEAD", "MAX_VALUES", "MAX_PARTS", "MAX_TEXTS", "MAX_BYTES", "MAX_DEPTH", "MAX_NAME"):
        monkeypatch.setattr(f"fedsynth.federation.payload.{name}", 1)
    data = encode(Learn(3, CORPUS), trusted=True)
    assert decode(data, Learn, trusted=True) == Learn(3, CORPUS)
    with pytest.raises(BadPayload):
        decode(data, Learn)


def parquet(columns: dict[str, list[Any]], **more: Any) -> bytes:
    table = pa.table(columns).replace_schema_metadata({"provenance": "public", "grants": "[]"})
    out = io.BytesIO()
    pq.write_table(table, out, **{"compression": "none", **more})
    return out.getvalue()


def test_no_parquet_is_read_from_another_party() -> None:
    corpus = {"$corpus": "0", "provenance": "public", "grants": []}
    data = archive({**head({"seed": 7, "corpus": corpus}), "0": parquet({"prompt": ["a"], "answer": ["b"]})})
    with pytest.raises(BadPayload):
        decode(data, Learn)


def denied_dictionary(rows: int, length: int) -> bytes:
    """A Parquet file of one text in a dictionary, named by each row, whose footer says that all is plain.

    The offset of the dictionary is left out of the footer, that of the first data page is the dictionary's, and the
    list of encodings names none: Thrift's compact protocol, parquet.thrift's ColumnMetaData, fields 2, 9 and 11.
    """

    def varint(number: int) -> bytes:
        number, out = number << 1, b""
        while number > 127:
            number, out = number >> 7, out + bytes([number & 127 | 128])
        return out + bytes([number])

    named = pa.array([0] * rows, pa.int32())
    columns: Any = {
        "prompt": pa.DictionaryArray.from_arrays(named, ["x" * length]),
        "answer": pa.DictionaryArray.from_arrays(named, ["flu"]),
    }
    data = parquet(columns, dictionary_pagesize_limit=10**8, write_statistics=False, store_schema=False)
    size = int.from_bytes(data[-8:-4], "little")
    body, foot = data[: -8 - size], data[-8 - size : -8]
    for column in range(2):
        facts = pq.read_metadata(io.BytesIO(data)).row_group(0).column(column)
        offsets = b"\x26" + varint(facts.data_page_offset) + b"\x26" + varint(facts.dictionary_page_offset)
        assert foot.count(offsets) == 1
        after = foot.index(offsets) + len(offsets)
        begins = b"\x26" + varint(facts.dictionary_page_offset) + bytes([foot[after] + 0x20])
        foot = foot[: after - len(offsets)] + begins + foot[after + 1 :]
    foot = foot.replace(b"\x35\x00\x06\x10", b"\x35\x00\x06\x06")  # PLAIN, RLE, RLE_DICTIONARY
    return body + foot + len(foot).to_bytes(4, "little") + b"PAR1"


def test_a_parquet_file_that_denies_its_dictionary_unpacks_to_a_budget() -> None:
    """1 MB that Arrow reads as 2 GB; no field of the footer tells it from a plain file."""
    data = denied_dictionary(rows=2000, length=1_000_000)
    facts = pq.read_metadata(io.BytesIO(data)).row_group(0).column(0)
    assert (facts.has_dictionary_page, set(facts.encodings), len(data) < 1_010_000) == (False, {"PLAIN", "RLE"}, True)
    usual, counting = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counting)
    try:
        with pytest.raises(BadPayload, match="unpack"):
            corpus_from_parquet(data)
    finally:
        pa.set_memory_pool(usual)
    assert 1_000_000 < counting.max_memory() < 300e6


def test_texts_of_older_runs_are_read() -> None:
    texts = [f"text {i % 3}" for i in range(1000)]
    corpus = corpus_from_parquet(parquet({"prompt": texts, "answer": ["flu"] * 1000}))  # in dictionaries
    assert corpus == Corpus(tuple(texts), ("flu",) * 1000, Provenance.PUBLIC)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1",
        parquet({"prompt": ["a"], "answer": ["b"]})[:-9],
        parquet({"prompt": [None], "answer": ["b"]}),
        parquet({"prompt": ["a"], "answer": [1]}),
        parquet({"prompt": ["a"]}),
        parquet({"prompt": ["a"], "answer": ["b"], "more": ["c"]}),
        parquet({"prompt": ["a"], "answer": ["b"]}, compression="zstd"),
    ],
)
def test_a_file_that_is_no_corpus_is_a_bad_payload(data: bytes) -> None:
    with pytest.raises(BadPayload):
        corpus_from_parquet(data)


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
        assert {info.compress_type for info in zipped.infolist()} == {zipfile.ZIP_STORED}
        assert zipped.namelist() == ["value.json", "0.jsonl"]


def test_twenty_thousand_rows_cost_little_more_than_their_letters() -> None:
    rows = range(20_000)
    texts = tuple(f"note {i}: the patient reports a cough since day {i % 7}" for i in rows)
    corpus = Corpus(texts, tuple(str(i % 7) for i in rows), Provenance.LLM_WRITTEN, grants=("g",))
    data = encode(Learn(1, corpus))
    assert decode(data, Learn).corpus == corpus
    assert len(data) < 1.2 * sum(len(t) for t in texts)
