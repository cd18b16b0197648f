"""Requests and replies to Flower records and back; private text stops here."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from flwr.app import ConfigRecord, RecordDict

from fedsynth.corpus import Corpus, Provenance, Scores, Votes
from fedsynth.federation.messages import Envelope, ErrorCode, Origin, Output, Refused, Request
from fedsynth.federation.payload import decode, encode
from fedsynth.lora import Adapter
from fedsynth.privacy.statement import Statement
from fedsynth.typed import BadValue, build, plain

T = TypeVar("T")
RECORD = "fedsynth"
Derived: TypeAlias = Corpus | Adapter | Scores | Votes
KINDS: dict[type[Derived], Output] = {Corpus: "text", Adapter: "adapter", Scores: "scores", Votes: "votes"}


class WillNotLeave(RuntimeError):
    """A part of a reply may not leave this client."""


def pack_request(request: Request[Any], envelope: Envelope) -> RecordDict:
    """A request for one client. Server text is checked as well: a server has no private text to send."""
    for corpus in _parts(request, Corpus):
        if corpus.provenance in (Provenance.PRIVATE, Provenance.DISCLOSED):
            raise WillNotLeave(f"{type(request).__name__} holds private text")
    fields: dict[str, Any] = {**plain(envelope), "payload": encode(request)}
    return RecordDict({RECORD: ConfigRecord(fields)})


def unpack_request(content: RecordDict, kind: type[T]) -> tuple[T, Envelope, str]:
    """The request, its envelope, and the digest that makes a repeated request recognisable.

    Raises:
        fedsynth.typed.BadValue: If the message is not such a request; a BadPayload if its payload cannot be read.
    """
    record = _record(content)
    facts = {f.name: _value(record, f.name) for f in dataclasses.fields(Envelope)}
    envelope = build(Envelope, facts, "envelope")
    data = _payload(record)
    digest = hashlib.sha256()
    # Without the arm: `run` is unique, and arms that send a simulated client the same request get the same noise.
    for part in (*(str(facts[name]).encode() for name in ("run", "seed", "exchange", "client")), data):
        digest.update(len(part).to_bytes(8, "big") + part)
    return decode(data, kind), envelope, digest.hexdigest()


def joined(contents: Sequence[RecordDict]) -> RecordDict:
    """Requests, or replies, as the content of one message; a single one is its own content."""
    if len(contents) == 1:
        return contents[0]
    return RecordDict({f"{RECORD}.{place}": _record(content) for place, content in enumerate(contents)})


def parted(content: RecordDict) -> list[RecordDict]:
    """The requests, or replies, that were joined to a message, in order; any other content is one bad part."""
    if RECORD in content or not content:
        return [content]
    keys = [f"{RECORD}.{place}" for place in range(len(content))]
    return [RecordDict({RECORD: content[key]}) for key in keys] if set(keys) == set(content) else [content]


def stack_number(content: RecordDict) -> int:
    """The stack of a request: requests of one number train in one pass; -1 if it has none."""
    return _number(content, "stack")


def client_number(content: RecordDict) -> int:
    """The client that a request is for; -1 if it names none."""
    return _number(content, "client")


def _number(content: RecordDict, key: str) -> int:
    record = content.get(RECORD)
    number = record.get(key) if isinstance(record, ConfigRecord) else None
    return number if isinstance(number, int) else -1


def seal(reply: object, *, allowed: Collection[Output], waived: bool, disclosed: bool = False) -> bytes:
    """A reply as bytes, if each of its fields may leave.

    Args:
        reply: One of the reply classes of `fedsynth.federation.messages`.
        allowed: Kinds of outputs that may leave: all in a simulation, those of its policy at a site.
        waived: True if a release without guarantee was logged in this run's ledger.
        disclosed: True for a simulated client, which alone gives private text as it is.

    Raises:
        WillNotLeave: With the field and the rule.
    """
    name = type(reply).__name__
    if not dataclasses.is_dataclass(reply):
        raise WillNotLeave(f"{name} is not a reply class")
    for field in dataclasses.fields(reply):
        origin = field.metadata.get("origin")
        value = getattr(reply, field.name)
        if not isinstance(origin, Origin):
            raise WillNotLeave(f"{name}.{field.name} declares no origin")
        if origin is Origin.MEASURED and "metrics" not in allowed:
            raise WillNotLeave(f"{name}.{field.name} is measured on a private model, which this site does not allow")
        if origin is Origin.NO_GUARANTEE and not waived:
            raise WillNotLeave(f"{name}.{field.name} has no guarantee, and no release without guarantee was logged")
        for part in derived(value):
            if KINDS[type(part)] not in allowed:
                raise WillNotLeave(f"{name}.{field.name}: this site lets out no {KINDS[type(part)]}")
            if isinstance(part, Corpus) and part.provenance is Provenance.DISCLOSED and not disclosed:
                raise WillNotLeave(f"{name}.{field.name} is private text as it is: simulated clients alone give that")
            _check_part(part, f"{name}.{field.name}", waived)
    for statement in _parts(reply, Statement):
        if statement.guarantee == "dp" and any(not part.grants for part in derived(reply)):
            raise WillNotLeave(f"{name} claims a guarantee for text, weights, scores or votes without a grant")
    return encode(reply)


def derived(value: object) -> list[Derived]:
    """The parts of a value that may derive from private text."""
    return [*_parts(value, Corpus), *_parts(value, Adapter), *_parts(value, Scores), *_parts(value, Votes)]


def _check_part(part: Derived, place: str, waived: bool) -> None:
    public = False
    if isinstance(part, Corpus):
        if part.provenance is Provenance.PRIVATE or part.units is not None:
            raise WillNotLeave(f"{place} is private text")
        if part.provenance is Provenance.DP_SYNTHETIC and not part.grants:
            raise WillNotLeave(f"{place} calls itself synthetic under DP but names no grant")
        public = part.provenance is Provenance.PUBLIC
    if not public and not part.grants and not waived:
        raise WillNotLeave(f"{place} names no grant, and no release without guarantee was logged")


def _parts(value: object, kind: type[T]) -> list[T]:
    if isinstance(value, kind):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Corpus | Adapter | Scores | Votes):
        return [p for f in dataclasses.fields(value) for p in _parts(getattr(value, f.name), kind)]
    if isinstance(value, Mapping):
        return [p for v in value.values() for p in _parts(v, kind)]
    if isinstance(value, list | tuple):
        return [p for v in value for p in _parts(v, kind)]
    return []


def pack_reply(data: bytes, *, refused: bool = False, seconds: float | None = None) -> RecordDict:
    """Sealed bytes as the content of a reply.

    Args:
        data: Bytes from `seal` or `refusal`.
        refused: True for a refusal.
        seconds: The client's CPU time. Simulations only: it depends on the texts that were drawn.
    """
    timed = {} if seconds is None else {"seconds": seconds}
    return RecordDict({RECORD: ConfigRecord({"refused": refused, "payload": data, **timed})})


def unpacked(content: RecordDict) -> tuple[bytes, bool, float | None]:
    """Payload of a request or a reply; for a reply, also its `refused` and `seconds` (see `pack_reply`).

    Raises:
        fedsynth.typed.BadValue: If the content is neither.
    """
    record = _record(content)
    seconds = record.get("seconds")
    return _payload(record), record.get("refused") is True, seconds if isinstance(seconds, float) else None


def refusal(code: ErrorCode) -> bytes:
    """The bytes of a refusal: a constant code and nothing else."""
    return encode(Refused(code))


def unpack_reply(content: RecordDict, kind: type[T]) -> T | Refused:
    """The typed reply, or refusal, in a message's content.

    Raises:
        fedsynth.typed.BadValue: If the content is no reply; a BadPayload if its payload cannot be read.
    """
    record = _record(content)
    data = _payload(record)
    return decode(data, Refused) if _value(record, "refused") is True else decode(data, kind)


def payload_bytes(content: RecordDict) -> int:
    """Size of a message's payload in bytes."""
    return len(_payload(_record(content)))


def _record(content: RecordDict) -> ConfigRecord:
    record = content.get(RECORD)
    if not isinstance(record, ConfigRecord):
        raise BadValue(f"the message has no record {RECORD!r}")
    return record


def _value(record: ConfigRecord, key: str) -> Any:
    if key not in record:
        raise BadValue(f"the message's record {RECORD!r} has no {key!r}")
    return record[key]


def _payload(record: ConfigRecord) -> bytes:
    data = _value(record, "payload")
    if not isinstance(data, bytes):
        raise BadValue(f"payload must be bytes, got {type(data).__name__}")
    return data
