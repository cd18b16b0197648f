"""Real requests and answers, changed at random: each is read as a value of its type, or refused as a bad payload."""

from __future__ import annotations

import io
import json
import random
import resource
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from safetensors.numpy import save
from test_payload import ADAPTER, CORPUS, VALUES

from fedsynth.clients import handler as client
from fedsynth.federation.messages import (
    REQUESTS,
    Adopt,
    ErrorCode,
    Evaluate,
    Finetune,
    Learn,
    Refused,
    Request,
    Score,
    SelfTrain,
    Synthesize,
    Vote,
)
from fedsynth.federation.payload import BadPayload, decode, encode
from fedsynth.federation.records import joined, parted, unpack_reply
from fedsynth.federation.validation import Rejected, check_reply, check_request
from fedsynth.privacy.rdp import bound

Files = list[tuple[str, bytes]]
ORDER_OF: dict[type, Request[Any]] = {
    request.reply: request
    for request in (
        Synthesize(9, 0.8, 0.95, 48, 1),
        Learn(3, CORPUS),
        Evaluate(),
        Finetune(ADAPTER, 1),
        Adopt(ADAPTER),
        Score(CORPUS, 4),
        Vote(CORPUS, 2),
        SelfTrain(ADAPTER, 1, 2),
    )
}
LABELS = CORPUS.answers


def files_of(data: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def zipped(files: Files, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice is meant
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data, compression)
    return out.getvalue()


# ---- Bytes -----------------------------------------------------------------------------------------------------------


def flipped(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if found else 0):
        found[rng.randrange(len(found))] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(found)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def spliced(data: bytes, rng: random.Random) -> bytes:
    other = rng.choice(REAL)[1]
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def moved(data: bytes, rng: random.Random) -> bytes:
    """A piece of it twice, or left out, or another's put in."""
    first, second = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    more = rng.choice((b"", data[first:second], rng.choice(REAL)[1][:64], bytes(rng.randrange(64))))
    return data[:first] + more + data[rng.choice((first, second)) :]


def header(data: bytes, rng: random.Random) -> bytes:
    """A number in a header of the zip: versions, flags, method, sizes, lengths, offsets."""
    found = bytearray(data)
    mark = rng.choice((b"PK\3\4", b"PK\1\2", b"PK\5\6"))
    places = [i for i in range(len(data)) if data.startswith(mark, i)]
    place = rng.choice(places) + 4 + 2 * rng.randrange(9 if mark == b"PK\5\6" else 13)
    width = rng.choice((2, 4))
    value = rng.choice((0, 1, 8, 45, 63, 0x41, 0x800, 0xFFFF, 0xFFFFFFFF, rng.randrange(1 << 16)))
    found[place : place + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(found[: len(data)])


BYTES = (flipped, cut, spliced, moved)


# ---- Members ---------------------------------------------------------------------------------------------------------


def in_a_member(data: bytes, rng: random.Random) -> bytes:
    """Bytes of one of them, with the right checksum."""
    files = files_of(data)
    place = rng.randrange(len(files))
    files[place] = (files[place][0], rng.choice(BYTES)(files[place][1], rng))
    return zipped(files)


def among_members(data: bytes, rng: random.Random) -> bytes:
    files = files_of(data)
    other = files_of(rng.choice(REAL)[1])
    match rng.randrange(6):
        case 0:
            files.pop(rng.randrange(len(files)))
        case 1:
            files.append(rng.choice(files + other))
        case 2:
            rng.shuffle(files)
        case 3:
            files = [(rng.choice(("value.json", "0", "", "0.parquet", "../x", "0.safetensors")), b) for _, b in files]
        case 4:
            return zipped(files, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
        case _:
            files[rng.randrange(len(files))] = rng.choice(other)
    return zipped(files)


# ---- JSON ------------------------------------------------------------------------------------------------------------

NASTY: list[Callable[[], Any]] = [
    lambda: 10**400, lambda: -(10**400), lambda: 10**30, lambda: float("nan"), lambda: float("inf"), lambda: 1e300,
    lambda: -1, lambda: 0, lambda: 1.5, lambda: True, lambda: None, lambda: "", lambda: "x" * 5000, lambda: "\ud800",
    lambda: "\x1b[31m\x00", lambda: [], lambda: {}, lambda: [[]] * 50, lambda: nest(20), lambda: {"$corpus": "0.jsonl"},
    lambda: {"$adapter": "0.safetensors", "rank": 1, "alpha": 1, "base": "", "grants": []}, lambda: {"$corpus": []},
    lambda: "dp", lambda: "none", lambda: [1, 2], lambda: {"": {"": ""}}, lambda: 2**63,
]  # fmt: skip


def nest(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


def changed(tree: Any, rng: random.Random) -> Any:
    """One place of it is another value, gone, or has a neighbour."""
    if isinstance(tree, int | float | str) and rng.random() < 0.5:
        return tree * rng.choice((2, 1000)) if isinstance(tree, str) else type(tree)(tree * rng.choice((0.5, 2, 1e5)))
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return rng.choice(NASTY)()
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, found = rng.choice(keys), type(tree)(tree)
    match rng.randrange(8):
        case 0:
            del found[key]
        case 1:
            value = rng.choice(NASTY)()
            found = (
                {**found, rng.choice((*(str(key)[:9] for key in keys), "more", "$corpus", "", "9" * 400)): value}
                if isinstance(found, dict)
                else [*found, value]
            )
        case _:
            found[key] = changed(found[key], rng)
    return found


def text_of(tree: Any, rng: random.Random) -> bytes:
    text = json.dumps(tree)
    match rng.randrange(12):
        case 0:  # a name twice
            text = text.replace("{", '{"seed": 1, "value": 2, ', 1)
        case 1:
            text = text.replace(":", ":" + rng.choice(("[" * 5000, "1e999,", "-", "0x1", "9" * 5000)), 1)
        case 2:
            return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
    return text.encode()


def in_the_json(data: bytes, rng: random.Random) -> bytes:
    files = files_of(data)
    place = rng.randrange(len(files))
    name, inside = files[place]
    if name.endswith(".jsonl"):
        lines = inside.split(b"\n")
        lines[rng.randrange(len(lines))] = text_of(changed(["prompt", "b"], rng), rng)
        inside = b"\n".join(lines)
    elif name.endswith(".json"):
        head = json.loads(inside)
        tree = {**head, "value": changed(head["value"], rng)} if rng.random() < 0.9 else changed(head, rng)
        inside = text_of(tree, rng)
    else:
        size = int.from_bytes(inside[:8], "little")
        table = text_of(changed(json.loads(inside[8 : 8 + size]), rng), rng)
        named = rng.choice((len(table), len(table), len(table) + 1, 1 << 62))
        inside = named.to_bytes(8, "little") + table + inside[8 + size :]
    files[place] = (name, inside)
    return zipped(files)


MUTATIONS = (*BYTES, header, header, *[in_a_member] * 3, among_members, *[in_the_json] * 12)
REAL = [(value, encode(value)) for value in VALUES]
KINDS: list[type] = [*REQUESTS, *(request.reply for request in REQUESTS), Refused]
OF_A_KIND = [[pair for pair in REAL if type(pair[0]) is kind] for kind in KINDS]


def mutants(count: int, seed: int) -> Any:
    """(Kind that is read, bytes): mostly of the kind that they were of, changed once or twice."""
    rng = random.Random(seed)
    for _ in range(count):
        value, data = rng.choice(rng.choice(OF_A_KIND))
        for _ in range(rng.choice((1, 1, 1, 2))):
            try:
                data = rng.choice(MUTATIONS)(data, rng)
            except Exception:  # no archive any more, to Python's zipfile: what was done to it stands
                break
        yield rng.choice(KINDS) if rng.random() < 0.05 else type(value), data


def judged(kind: type, data: bytes) -> str:
    """How a payload is read, and what the firewall says; whatever else comes out fails the test."""
    try:
        value: Any = decode(data, kind)
    except BadPayload:
        return "bad payload"
    assert isinstance(value, kind)
    again = encode(value)
    assert encode(decode(again, kind)) == again
    try:
        if isinstance(value, Request):
            check_request(value, LABELS)
        elif kind in ORDER_OF:
            check_reply(ORDER_OF[kind], value, LABELS)
    except Rejected:
        return "rejected"
    return "read"


def survives(count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsynth.privacy.claims._above", lambda *_: None)  # that it is bounded: test_claims.py
    found, slowest, largest = Counter[str](), 0.0, 0
    for value, data in REAL:  # what is imported at the first of a kind is no growth
        judged(type(value), data)
    bound([(1.0, 1.0, 1)], 1e-5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, data in mutants(count, seed):
        begun = time.process_time()
        found[judged(kind, data)] += 1
        slowest, largest = max(slowest, time.process_time() - begun), max(largest, len(data))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert slowest < 2.0  # a collection of garbage may fall into it
    assert grown < 50 + 5 * largest / 2**20, f"{grown:.0f} MiB, the largest has {largest} bytes"
    # Were none read, or none refused by the firewall, the mutations would not be what the names say.
    assert all(found[how] > count / 50 for how in ("bad payload", "rejected", "read")), found


def test_ten_thousand_mutants_are_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    survives(10_000, 1, monkeypatch)


@pytest.mark.full
def test_a_hundred_thousand_mutants_are_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    survives(100_000, 2, monkeypatch)


def test_a_client_answers_every_mutant_of_a_request_with_a_code() -> None:
    def open_client(context: Any, envelope: Any) -> Any:
        raise KeyError("no client here")

    context: Any = None
    facts = {"run": "r", "arm": "a", "seed": 0, "exchange": 1, "client": 0, "stack": 0}
    found: Counter[ErrorCode] = Counter()
    for kind, data in mutants(600, 3):
        task: Any = kind if issubclass(kind, Request) else Learn
        content = RecordDict({"fedsynth": ConfigRecord({**facts, "payload": data})})
        said = unpack_reply(client.reply_to(task, content, context, open_client), Learn)
        assert isinstance(said, Refused)
        found[said.code] += 1
    assert set(found) == {
        ErrorCode.BAD_REQUEST,
        ErrorCode.FAILED,
    }  # the latter: it could be read, and there is no client


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_corrupt_answer_in_a_stack_leaves_the_others(place: int) -> None:
    contents = [RecordDict({"fedsynth": ConfigRecord({"refused": False, "payload": data})}) for _, data in REAL[:3]]
    kinds = [type(value) for value, _ in REAL[:3]]
    message = joined(contents)
    message[f"fedsynth.{place}"] = ConfigRecord({"refused": False, "payload": b"PK"})
    read = []
    for content, kind in zip(parted(message), kinds, strict=True):
        try:
            unpack_reply(content, kind)
            read.append(True)
        except BadPayload:
            read.append(False)
    assert read == [number != place for number in range(3)]


def test_an_array_of_many_axes_is_refused() -> None:
    files = files_of(encode(Adopt(ADAPTER)))
    files[1] = (files[1][0], save({"w": np.zeros((1,) * 32, np.float32)}))
    with pytest.raises(BadPayload, match="matrices"):
        decode(zipped(files), Adopt)
