"""Bytes of other parties, broken in every way: readers answer with a named error, soon, and in little memory.

    python tests/fuzz.py --inputs 100000       what `make fuzz` runs at night

Inputs follow from a seed, so that a found one comes back. Half of them keep what would stop a reader at once: an
archive's checksums, the length before a header.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from fedsynth.corpus import Corpus, Provenance, Scores, Votes
from fedsynth.data.loaders import load_columns
from fedsynth.data.rowwise import read_file
from fedsynth.deployment.invitation import Invitation, Planned, invitation_toml, read_invitation
from fedsynth.deployment.policy import load_site
from fedsynth.federation.messages import (
    Finetuned,
    Learn,
    Request,
    Score,
    Scored,
    Synthesize,
    Synthesized,
    Vote,
    Voted,
)
from fedsynth.federation.payload import BadPayload, corpus_from_parquet, corpus_to_parquet, decode, encode
from fedsynth.federation.validation import Rejected, check_request
from fedsynth.lora import Adapter
from fedsynth.models.adapters import fresh_lora, load_adapter, read_adapter, save_adapter
from fedsynth.models.hub import weights_hash
from fedsynth.privacy.statement import Statement
from fedsynth.scenario.toml import from_toml, shipped_scenarios
from fedsynth.typed import BadValue

SECONDS = 2.0  # CPU time of one input
ROOM = 3 << 30  # bytes of address space beyond what the process has when it begins
WORDS = [
    b"", b"0", b"-1", b"1e999", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{}", b'""', b"1" * 5000, b"[" * 3000,
    b"{" * 500, b'{"a":' * 500, b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"\r\n", b"\n\n\n", b'"', b"'''",
    b'"""', b",", b";", b"=", b"$corpus", b"$adapter", b"__class__", b"../../etc/passwd", b"9" * 25,
    b"18446744073709551616", b"\xed\xa0\x80", b"PAR1", b"PK\x05\x06", b"[[a]]\n", b"[a.b]\n", b"a.b.c = 1\n",
    b"x" * 30000, b"1979-05-27T07:32:00Z", b"0x1f", b"inf", b"%s", b"{text}", b"\x1b[2J",
]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to six changes of some bytes."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.choice((1, 1, 2, 4, 16, 200)))
        match rng.randrange(7):
            case 0:
                found[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
            case 1:
                del found[at:end]
            case 2:
                found[at:at] = found[at:end]
            case 3:
                found[at:at] = rng.choice(WORDS)
            case 4:
                found[at:end] = rng.choice(WORDS)
            case 5:
                del found[at:]
            case 6:
                numbers = [i for i, byte in enumerate(found[:20_000]) if 48 <= byte < 58]
                if numbers:
                    at = rng.choice(numbers)
                    found[at : at + 1] = rng.choice(WORDS[:12])
    return bytes(found)


def in_archive(data: bytes, rng: random.Random) -> bytes:
    """A member of a payload is changed, and its checksum with it; now and then one is left out."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    place = rng.randrange(len(members))
    name, inner = members[place]
    members[place] = (name, in_tensors(inner, rng) if name.endswith(".safetensors") else mutated(inner, rng))
    if rng.random() < 0.05:
        del members[rng.randrange(len(members))]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, inner in members:
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), inner)
    return out.getvalue()


def in_tensors(data: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file is changed, and the length before it is that of the new one."""
    (length,) = struct.unpack("<Q", data[:8])
    header = mutated(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


@dataclass(frozen=True)
class Target:
    """A reader of bytes.

    Attributes:
        seeds: Bytes that it accepts.
        read: The reader.
        named: The errors that it may raise.
        within: A change that keeps the outer form; None for none.
    """

    seeds: Sequence[bytes]
    read: Callable[[bytes], object]
    named: tuple[type[Exception], ...]
    within: Callable[[bytes, random.Random], bytes] | None = None

    def inputs(self, count: int, seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [self._input(rng) for _ in range(count)]

    def _input(self, rng: random.Random) -> bytes:
        data = rng.choice(list(self.seeds))
        change = self.within if self.within is not None and rng.random() < 0.5 else mutated
        return change(data, rng)


@dataclass
class Tried:
    """What came of some inputs: accepted ones, errors by name, the slowest; and faults, each with its input."""

    count: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    faults: list[tuple[str, bytes]] = field(default_factory=list)


def tried(target: Target, inputs: Sequence[bytes]) -> Tried:
    found = Tried()
    for data in inputs:
        begun = time.process_time()
        found.count += 1
        try:
            target.read(data)
            found.accepted += 1
        except target.named as problem:
            found.refused[type(problem).__name__] += 1
        except Exception as problem:  # whatever else: a fault
            found.faults.append((f"{type(problem).__name__}: {str(problem)[:120]}", data))
        took = time.process_time() - begun
        found.slowest = max(found.slowest, took)
        if took > SECONDS:
            found.faults.append((f"{took:.1f} s", data))
    return found


# ---- The readers ----------------------------------------------------------------------------------------------------

GRANTS = ("a3" * 16,)
STATEMENT = Statement("dp", 7.99, 1e-5, 11.29, unit="person", sigma=0.928, sampling_rate=0.125, steps=60, clip_norm=0.3)
TEXTS = Corpus(("a fall", "two\nlines"), ("fever", "cough"), Provenance.DP_SYNTHETIC, GRANTS)
FACTORS = {"w.lora_A.weight": np.ones((1, 2), np.float32), "w.lora_B.weight": np.zeros((3, 1), np.float32)}
ADAPTER = Adapter(FACTORS, 1, 2.0, "base", GRANTS)
VALUES = (
    Synthesize(3, 1.0, 0.9, 8, 1, start=ADAPTER), Synthesized(TEXTS, STATEMENT, 1), Finetuned(ADAPTER, STATEMENT, 40),
    Learn(1, TEXTS), Score(TEXTS, 1), Scored(Scores((0.5, -1.0), GRANTS), STATEMENT), Vote(TEXTS),
    Voted(Votes((0.5, 2.0), GRANTS), STATEMENT),
)  # fmt: skip


KINDS: dict[bytes, type] = {f'"{type(value).__name__}"'.encode(): type(value) for value in VALUES}


def _payload(data: bytes) -> None:
    """As its receiver reads it: as the kind that it calls itself, and then the ranges of a request."""
    kind = next((kind for name, kind in KINDS.items() if name in data), Learn)
    found = decode(data, kind)
    if isinstance(found, Request):
        check_request(found, ("fever", "cough"))


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fedsynth-fuzz-"))


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def _adapter_seeds() -> tuple[bytes, bytes]:
    place = _folder() / "good-adapter"
    if not place.is_dir():
        base = "assets:tiny-slm"
        save_adapter(read_adapter(fresh_lora(base, rank=1, alpha=2.0, seed=0), weights_hash(base)), base, place)
    return (place / "adapter_config.json").read_bytes(), (place / "adapter_model.safetensors").read_bytes()


SITE = b"""
name = "north"
[superlink]
address = "example.org:9443"
[data]
id = "north-1"
source = "notes.csv"
task = "classification"
text = "text"
label = "label"
person = "patient"
records = 200
labels = ["fever", "cough"]
test = { column = "split", equals = "test" }
[policy]
lifetime = { epsilon = 10.0, delta = 1e-5 }
per_run = { epsilon = 4.0 }
outputs = ["text"]
identifiers = ["email"]
models = ["assets:tiny-slm"]
[policy.secure_sum]
accept = true
"""
CSV = b'text,label,patient\n"a ""fall"", hard",fever,1\nb,cough,2\n"two\nlines",fever,3\n'
JSONL = b'{"text": "a fall", "label": "fever", "patient": 1}\n{"text": "b", "label": "cough", "patient": 2}\n'


def _parquet() -> bytes:
    out = io.BytesIO()
    pd.DataFrame({"text": ["a", "b"], "label": ["fever", "cough"], "patient": [1, 2]}).to_parquet(out)
    return out.getvalue()


def _rows(ending: str) -> Callable[[bytes], object]:
    """A file of rows by both readers: the simulator's, and the site's, for which no row may end the import."""

    def read(data: bytes) -> None:
        path = _file(f"rows.{ending}", data)
        refused = None
        for reader in (load_columns, read_file):
            try:
                reader(path, ["text", "label", "patient"])
            except BadValue as problem:
                refused = problem
        if refused is not None:
            raise refused

    return read


def _adapter(changed: str) -> Callable[[bytes], object]:
    def read(data: bytes) -> None:
        place = _folder() / "adapter"
        place.mkdir(exist_ok=True)
        for name, good in zip(FILES, _adapter_seeds(), strict=True):
            (place / name).write_bytes(data if name == changed else good)
        load_adapter(str(place), "assets:tiny-slm")

    return read


FILES = ("adapter_config.json", "adapter_model.safetensors")


def _site(data: bytes) -> None:
    load_site(_file("site.toml", data))


def _invitation(data: bytes) -> None:
    read_invitation(_file("invitation.toml", data))


@cache
def targets() -> dict[str, Target]:
    """By name."""
    invited = Planned("planned", "classification", ("fever", "cough"), ("fedsynth.strategies.fdkt:FDKT",), (), "dp")
    bad = (BadValue,)
    config, tensors = _adapter_seeds()
    scenarios = [path.read_bytes() for path in shipped_scenarios()]
    invitation = invitation_toml(Invitation("example.org:9443", "PEM", invited)).encode()
    return {
        "payload": Target([encode(value) for value in VALUES], _payload, (BadPayload, Rejected), in_archive),
        "scenario": Target(scenarios, lambda data: from_toml(data.decode("utf-8", "replace")), bad),
        "site.toml": Target([SITE], _site, bad),
        "invitation": Target([invitation], _invitation, bad),
        "PEFT configuration": Target([config], _adapter(FILES[0]), bad),
        "PEFT tensors": Target([tensors], _adapter(FILES[1]), bad, in_tensors),
        "corpus as Parquet": Target([corpus_to_parquet(TEXTS)], corpus_from_parquet, (BadPayload, BadValue)),
        "rows as Parquet": Target([_parquet()], _rows("parquet"), bad),
        "rows as CSV": Target([CSV], _rows("csv"), bad),
        "rows as JSON lines": Target([JSONL], _rows("jsonl"), bad),
    }


# A scenario is long, and a PEFT folder is read with its base model beside it: these take longer than other inputs.
SHARE = {"PEFT configuration": 0.3, "PEFT tensors": 0.3, "scenario": 0.4}


def main(arguments: list[str]) -> int:
    """Prints a line for each reader; 1 where an input led to an error without a name, or took too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one reader")
    chosen = parser.parse_args(arguments)
    found = {name: target for name, target in targets().items() if not chosen.only or name == chosen.only}
    for target in found.values():  # models and libraries are loaded before memory is counted
        target.read(target.seeds[0])
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
    total = sum(SHARE.get(name, 1.0) for name in found)
    faults = 0
    for name, target in found.items():
        count = round(chosen.inputs * SHARE.get(name, 1.0) / total)
        result = tried(target, target.inputs(count, chosen.seed))
        told = ", ".join(f"{n} {error}" for error, n in result.refused.most_common())
        print(f"{name}: {count} inputs, {result.accepted} accepted, {told}; slowest {result.slowest:.2f} s", flush=True)
        for why, data in result.faults[:5]:
            print(f"  FAULT {why}: {data[:200]!r} ({len(data)} bytes)")
        faults += len(result.faults)
    print(f"{faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
