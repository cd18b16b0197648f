from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import tiny
from flwr.app import ConfigRecord, RecordDict

from fedsynth.clients import handler
from fedsynth.clients.client_side import ClientSide
from fedsynth.corpus import Corpus, Provenance, Scores, Votes
from fedsynth.data.partition import ClientData
from fedsynth.federation import messages as tasks
from fedsynth.federation.messages import (
    OUTPUTS,
    REQUESTS,
    Adopt,
    Adopted,
    Envelope,
    ErrorCode,
    Evaluate,
    Evaluated,
    Finetune,
    Finetuned,
    KeysOffered,
    Learn,
    Learnt,
    Origin,
    Output,
    Refused,
    Request,
    Score,
    Scored,
    SeedsShared,
    SelfTrain,
    SelfTrained,
    SharesOpened,
    SurvivorsSigned,
    Synthesize,
    Synthesized,
    Unmasked,
    Voted,
)
from fedsynth.federation.payload import BadPayload, decode, encode
from fedsynth.federation.records import (
    WillNotLeave,
    pack_reply,
    pack_request,
    payload_bytes,
    refusal,
    seal,
    unpack_reply,
    unpack_request,
)
from fedsynth.federation.secure_sum import Offer, Sealed, SeedShare
from fedsynth.federation.validation import (
    CHECKED,
    MAX_SAMPLES,
    MAX_TEXT,
    MAX_TOKENS,
    MAX_TOP_K,
    Rejected,
    check_reply,
    check_request,
)
from fedsynth.lora import Adapter
from fedsynth.privacy.caps import Account, BudgetExhausted
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.plan import BudgetTooSmall
from fedsynth.privacy.release import NotReleasable
from fedsynth.privacy.statement import Statement
from fedsynth.scenario.client import Client, TaskTraining
from fedsynth.typed import BadValue

LABELS = ("flu", "asthma")
PRIVATE = Corpus(("text of a patient",), ("flu",), Provenance.PRIVATE)
GRANTED = Corpus(("written under a grant",), ("flu",), Provenance.DP_SYNTHETIC, grants=("g",))
UNGRANTED = Corpus(("written without a mechanism",), ("flu",), Provenance.SELF_GENERATED)
ADAPTER = Adapter({"w.lora_A.weight": np.ones((1, 2), np.float32)}, 1, 2.0, "base", ("g",))
# 200 records in batches of 25: 7.986 and, for a unit replaced by another, 11.285 (dp-accounting 0.6).
DP = Statement("dp", 7.99, 1e-5, 11.29, sigma=0.928, sampling_rate=0.125, steps=60, clip_norm=0.3)
NONE = Statement("none", None, 1e-5)
SCORES = Scores((0.5, 0.25), ("g",))
UNDER_A_GRANT = (
    Synthesized(GRANTED, DP, 1),
    Finetuned(ADAPTER, DP, 200),
    Scored(SCORES, DP),
    Voted(Votes((2.5, -1.0), ("a3f1",)), DP),
    Adopted(2),
    Learnt(4),
    Evaluated({"accuracy": 0.5}, 600),
    Refused(ErrorCode.FAILED),
)
OPEN = SelfTrained(replace(ADAPTER, grants=()), NONE, 30)  # never under a grant
SUMS = (
    KeysOffered(Offer(3, "ab", "cd", "ef", "votes", Cohort(3), 1.5, "a key", "01")),
    SharesOpened((1,)),
    SeedsShared((Sealed(3, "ab"),)),
    SurvivorsSigned("ab"),
    Unmasked((SeedShare(3, "ab" * 16),)),
)  # of a secure sum: random numbers and signatures
ANSWERS = (*UNDER_A_GRANT, *SUMS, OPEN)
ORDER = Synthesize(per_label=2, temperature=0.8, top_p=0.95, max_new_tokens=48, seed=1)
ENVELOPE = Envelope(run="r", arm="fdkt", seed=0, exchange=1, client=3)
FIELDS = [(answer, field.name) for answer in ANSWERS for field in dataclasses.fields(answer)]


def with_field(answer: Any, name: str, value: object) -> Any:
    return replace(answer, **{name: value})


def sealed(answer: object, allowed: Sequence[Output] = OUTPUTS, waived: bool = False) -> bytes:
    return seal(answer, allowed=allowed, waived=waived)


# Declared origins


def undeclared(answers: list[type[Any]]) -> list[str]:
    return [
        f"{kind.__name__}.{field.name}"
        for kind in answers
        for field in dataclasses.fields(kind)
        if not isinstance(field.metadata.get("origin"), Origin)
    ]


def test_every_field_of_every_answer_declares_its_origin() -> None:
    answers = [*(request.reply for request in REQUESTS), Refused]
    assert undeclared(answers) == []
    assert {type(a) for a in ANSWERS} == set(answers)


def test_the_search_for_undeclared_fields_finds_one() -> None:
    @dataclass(frozen=True)
    class Careless(Learnt):
        loss: float = 0.0

    assert undeclared([Learnt, Careless]) == ["Careless.loss"]


def test_every_request_class_is_listed_and_has_a_handler() -> None:
    classes = [c for _, c in inspect.getmembers(tasks, inspect.isclass) if issubclass(c, Request) and c is not Request]
    assert set(classes) == set(REQUESTS) == set(handler.FUNCTIONS)
    assert len({request.task for request in REQUESTS}) == len(REQUESTS)


def test_a_field_without_an_origin_does_not_pack() -> None:
    @dataclass(frozen=True)
    class Careless(Learnt):
        loss: float = 0.0

    with pytest.raises(WillNotLeave, match=r"Careless\.loss declares no origin"):
        sealed(Careless(1), waived=True)


@pytest.mark.parametrize("value", [PRIVATE, "text", {"loss": 0.1}, None, [GRANTED]])
def test_what_is_no_answer_does_not_pack(value: object) -> None:
    with pytest.raises(WillNotLeave):
        sealed(value, waived=True)


@pytest.mark.parametrize("answer", UNDER_A_GRANT, ids=lambda a: type(a).__name__)
def test_every_answer_that_keeps_to_the_rules_packs(answer: object) -> None:
    assert encode(answer) == sealed(answer)


def test_what_has_no_guarantee_packs_once_that_is_logged() -> None:
    with pytest.raises(WillNotLeave, match="no release without guarantee was logged"):
        sealed(OPEN)
    assert encode(OPEN) == sealed(OPEN, waived=True)


@pytest.mark.parametrize(
    "answer",
    [
        Finetuned(replace(ADAPTER, grants=()), DP, 200),
        Finetuned(replace(ADAPTER, grants=()), NONE, 200),
        Scored(replace(SCORES, grants=()), DP),
        Scored(replace(SCORES, grants=()), NONE),
    ],
)
def test_weights_and_scores_without_a_grant_do_not_pack(answer: Finetuned | Scored) -> None:
    with pytest.raises(WillNotLeave, match="grant"):
        sealed(answer)
    if answer.statement == NONE:
        assert encode(answer) == sealed(answer, waived=True)
    else:  # a waiver is no guarantee
        with pytest.raises(WillNotLeave, match="claims a guarantee"):
            sealed(answer, waived=True)


# Private text


@pytest.mark.parametrize(("answer", "name"), FIELDS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda c: c,
        lambda c: [c],
        lambda c: {"deep": (c,)},
        lambda c: MappingProxyType({"deep": c}),
        lambda c: Learn(1, c),
    ],
    ids=["plain", "list", "dict", "mapping", "order"],
)
def test_private_text_does_not_pack_wherever_it_is_planted(answer: Any, name: str, wrap: Any) -> None:
    for waived in (True,) if isinstance(answer, SelfTrained) else (False, True):
        with pytest.raises(WillNotLeave, match=rf"{type(answer).__name__}\.{name} is private text"):
            sealed(with_field(answer, name, wrap(PRIVATE)), waived=waived)


def test_text_with_units_does_not_pack() -> None:
    with_units = Corpus(("a",), ("flu",), Provenance.PRIVATE, grants=("g",), units=("patient 1",))
    with pytest.raises(WillNotLeave, match="private text"):
        sealed(Synthesized(with_units, NONE, 0), waived=True)


def test_a_request_with_private_text_does_not_pack() -> None:
    with pytest.raises(WillNotLeave, match="private text"):
        pack_request(Learn(1, PRIVATE), ENVELOPE)


# Guarantees


def test_text_that_calls_itself_synthetic_under_dp_needs_a_grant_even_when_waived() -> None:
    for waived in (False, True):
        with pytest.raises(WillNotLeave, match="names no grant"):
            sealed(Synthesized(replace(GRANTED, grants=()), NONE, 0), waived=waived)


@pytest.mark.parametrize(
    "answer",
    [
        Synthesized(UNGRANTED, NONE, 0),
        Synthesized(replace(UNGRANTED, provenance=Provenance.LLM_WRITTEN), NONE, 0),
        Finetuned(replace(ADAPTER, grants=()), NONE, 200),
    ],
    ids=["self-generated", "llm-written", "adapter"],
)
def test_released_material_without_a_grant_packs_only_when_waived(answer: Synthesized | Finetuned) -> None:
    with pytest.raises(WillNotLeave, match="names no grant"):
        sealed(answer)
    assert comparable(decode(sealed(answer, waived=True), type(answer))) == comparable(answer)


def comparable(answer: Synthesized | Finetuned) -> object:
    if isinstance(answer, Synthesized):
        return answer
    return {n: a.tolist() for n, a in answer.adapter.arrays.items()}, answer.statement, answer.records


@dataclass(frozen=True)
class Opinions:
    """An answer that no request asks for."""

    values: tuple[float, ...] = dataclasses.field(metadata={"origin": Origin.NO_GUARANTEE})


def test_a_field_without_guarantee_packs_only_when_waived() -> None:
    with pytest.raises(WillNotLeave, match=r"Opinions\.values has no guarantee"):
        sealed(Opinions((0.5,)))
    assert decode(sealed(Opinions((0.5,)), waived=True), Opinions) == Opinions((0.5,))


@dataclass(frozen=True)
class PublicText:
    corpus: Corpus = dataclasses.field(metadata={"origin": Origin.PUBLIC})


@dataclass(frozen=True)
class MeasuredText:
    corpus: Corpus = dataclasses.field(metadata={"origin": Origin.MEASURED})


@pytest.mark.parametrize("answer", [PublicText(UNGRANTED), MeasuredText(UNGRANTED)])
def test_text_without_a_guarantee_packs_only_when_waived_in_fields_of_any_origin(answer: object) -> None:
    with pytest.raises(WillNotLeave):
        sealed(answer)


def test_measured_figures_pack_only_where_measuring_is_allowed() -> None:
    answer = Evaluated({"accuracy": 0.5}, 600)
    with pytest.raises(WillNotLeave, match=r"Evaluated\.metrics is measured on a private model"):
        sealed(answer, allowed=("text", "adapter", "scores"), waived=True)
    assert decode(sealed(answer), Evaluated) == answer


def test_a_statement_of_dp_beside_ungranted_text_is_refused_even_when_waived() -> None:
    with pytest.raises(WillNotLeave, match="claims a guarantee for text, weights, scores or votes without a grant"):
        sealed(Synthesized(UNGRANTED, DP, 0), waived=True)


def test_a_statement_of_dp_beside_an_ungranted_adapter_is_refused() -> None:
    with pytest.raises(WillNotLeave, match="claims a guarantee"):
        sealed(Finetuned(replace(ADAPTER, grants=()), DP, 200), waived=True)


# Requests and replies as Flower records


def test_a_request_comes_back_with_its_envelope() -> None:
    request, envelope, digest = unpack_request(pack_request(ORDER, ENVELOPE), Synthesize)
    assert (request, envelope) == (ORDER, ENVELOPE)
    assert len(bytes.fromhex(digest)) == 32


def digest_of(request: Request[Any] = ORDER, **envelope: Any) -> str:
    return unpack_request(pack_request(request, replace(ENVELOPE, **envelope)), type(request))[2]


@pytest.mark.parametrize("change", [{"run": "s"}, {"seed": 1}, {"exchange": 2}, {"client": 4}])
def test_the_digest_changes_with_run_seed_exchange_and_client(change: dict[str, Any]) -> None:
    assert digest_of(**change) != digest_of() == digest_of()


@pytest.mark.parametrize(
    "change",
    [{"per_label": 3}, {"temperature": 0.9}, {"top_p": 0.9}, {"max_new_tokens": 47}, {"seed": 2}, {"top_k": 50}],
)
def test_the_digest_changes_with_every_field_of_the_request(change: dict[str, Any]) -> None:
    assert digest_of(replace(ORDER, **change)) != digest_of()


def test_the_digest_of_learn_changes_with_its_text() -> None:
    texts = [Learn(1), Learn(1, GRANTED), Learn(1, replace(GRANTED, prompts=("other",)))]
    assert len({digest_of(request) for request in texts}) == 3


def test_the_digest_does_not_change_with_the_arm() -> None:
    assert digest_of(arm="no_filter") == digest_of()


def test_the_digest_sees_where_one_number_ends() -> None:
    assert digest_of(seed=1, exchange=23) != digest_of(seed=12, exchange=3)


def test_replies_come_back_typed() -> None:
    answer = Learnt(4)
    content = pack_reply(sealed(answer))
    assert unpack_reply(content, Learnt) == answer
    assert payload_bytes(content) == len(encode(answer))
    with pytest.raises(BadPayload, match="expected a Evaluated of schema 2"):
        unpack_reply(content, Evaluated)


@pytest.mark.parametrize("code", list(ErrorCode))
def test_a_refusal_carries_a_constant_code_and_nothing_else(code: ErrorCode) -> None:
    content = pack_reply(refusal(code), refused=True)
    assert unpack_reply(content, Synthesized) == Refused(code)
    names = {"fedsynth", "refused", "payload", "value.json", "schema", "type", "value", "Refused", "code"}
    assert texts_in(content) == {*names, code.value}


@pytest.mark.parametrize("field", ["code", "reason"])
def test_a_refusal_outside_the_closed_list_is_not_read(field: str) -> None:
    with zipfile.ZipFile(io.BytesIO(encode(Refused(ErrorCode.FAILED)))) as zipped:
        head = json.loads(zipped.read("value.json"))
    head["value"][field] = "the patient's name"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        zipped.writestr("value.json", json.dumps(head))
    with pytest.raises(BadPayload, match=r"Refused(\.code| has a field)") as caught:
        unpack_reply(pack_reply(out.getvalue(), refused=True), Learnt)
    assert "patient" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [RecordDict({}), RecordDict({"fedsynth": ConfigRecord({"payload": "text", "refused": False})})]
)
def test_a_message_that_is_no_reply_is_a_bad_value(content: RecordDict) -> None:
    with pytest.raises(BadValue):
        unpack_reply(content, Learnt)


@pytest.mark.parametrize("way", ["order", "answer"])
def test_a_record_without_its_keys_is_a_bad_value(way: str) -> None:
    content = RecordDict({"fedsynth": ConfigRecord({"run": "r"})})
    with pytest.raises(BadValue):
        unpack_request(content, Learn) if way == "order" else unpack_reply(content, Learnt)


# Canaries: searched in decoded content, because a format may hide them from a search of bytes


def texts_in(content: RecordDict) -> set[str]:
    """Every text that a message holds: names, values, and what is inside its payloads."""
    found: set[str] = set()
    for name, record in content.items():
        found.add(name)
        for key, value in record.items():
            found.add(key)
            found |= texts_of_bytes(value) if isinstance(value, bytes) else {value} & {str(value)}
    return found


def texts_of_bytes(data: bytes) -> set[str]:
    found: set[str] = set()
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        for name in zipped.namelist():
            found.add(name)
            inside = zipped.read(name)
            if name.endswith(".json"):
                found |= texts_of_tree(json.loads(inside))
            elif name.endswith(".jsonl"):
                found |= {t for line in inside.splitlines() for t in texts_of_tree(json.loads(line))}
            else:
                found.add(inside.decode("latin-1"))
    return found


def texts_of_tree(tree: Any) -> set[str]:
    if isinstance(tree, dict):
        return {t for k, v in tree.items() for t in ({k} | texts_of_tree(v))}
    if isinstance(tree, list):
        return {t for v in tree for t in texts_of_tree(v)}
    return {tree} if isinstance(tree, str) else set()


CANARY = "Zürich-7f3a91"


def holds(content: RecordDict, canary: str = CANARY) -> bool:
    return any(canary in text for text in texts_in(content))


@pytest.mark.parametrize(
    "planted",
    [
        replace(GRANTED, prompts=(f"lives in {CANARY}",)),
        replace(GRANTED, answers=(CANARY,)),
        replace(GRANTED, grants=(CANARY,)),
    ],
    ids=["prompt", "answer", "grant"],
)
def test_the_search_finds_a_planted_canary_in_a_corpus(planted: Corpus) -> None:
    assert holds(pack_reply(encode(Synthesized(planted, DP, 0))))
    assert not holds(pack_reply(encode(Synthesized(GRANTED, DP, 0))))


def test_the_search_finds_canaries_that_bytes_hide() -> None:
    content = pack_reply(encode(Evaluated({CANARY: 1.0}, 1)))
    assert CANARY.encode() not in content["fedsynth"]["payload"]  # JSON escapes it
    assert holds(content)
    assert holds(pack_request(Learn(1, replace(GRANTED, prompts=(CANARY,))), ENVELOPE))
    assert holds(pack_request(ORDER, replace(ENVELOPE, run=CANARY)))


RAISED = [
    (RuntimeError, ErrorCode.FAILED),
    (KeyError, ErrorCode.FAILED),
    (UnicodeDecodeError, ErrorCode.FAILED),
    (BudgetExhausted, ErrorCode.BUDGET_EXHAUSTED),
    (BudgetTooSmall, ErrorCode.BUDGET_TOO_SMALL),
    (WillNotLeave, ErrorCode.NOT_ALLOWED),
    (NotReleasable, ErrorCode.NOT_ALLOWED),
    (handler.BadRequest, ErrorCode.BAD_REQUEST),
    (BadValue, ErrorCode.FAILED),
]


@pytest.mark.parametrize(("kind", "code"), RAISED)
def test_what_a_client_raises_becomes_a_constant_code(kind: type[Exception], code: ErrorCode) -> None:
    def open_client(context: Any, envelope: Envelope) -> Any:
        if kind is UnicodeDecodeError:
            raise UnicodeDecodeError("utf-8", CANARY.encode("latin-1"), 1, 2, CANARY)
        raise kind(f"malformed date in the record of {CANARY}")

    context: Any = None
    content = handler.reply_to(Learn, pack_request(Learn(1), ENVELOPE), context, open_client)
    assert unpack_reply(content, Learnt) == Refused(code)
    assert not holds(content)


def client(folder: Path, train: Corpus) -> ClientSide:
    task = TaskTraining(batch=2, private_epochs=1, max_length=8)
    config = Client(tiny.folder(), tiny.folder(), guarantee="none", task_training=task)
    ledger = Ledger(folder / "ledger.sqlite", Account("ward", None))
    return ClientSide(
        0, config, LABELS, 3, 1, "row", folder, "run", ledger, lambda: ClientData(train, train), simulated=True
    )


@pytest.mark.parametrize("crash", ["none", "tokenizer"])
def test_no_reply_and_no_server_log_holds_private_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, crash: str
) -> None:
    train = Corpus(("one", f"{CANARY} two", "three"), ("flu", CANARY, "asthma"), Provenance.PRIVATE, units=(1, 2, 3))

    def tokenizer(name: str) -> Any:
        raise ValueError(f"cannot encode {train.prompts}")

    if crash == "tokenizer":
        monkeypatch.setattr("fedsynth.clients.learn.load_tokenizer", tokenizer)
    context: Any = None
    replies = [
        handler.reply_to(
            kind, pack_request(request, replace(ENVELOPE, exchange=i)), context, lambda *_: client(tmp_path, train)
        )
        for i, (kind, request) in enumerate([(Learn, Learn(1)), (Evaluate, Evaluate())])
    ]
    first = unpack_reply(replies[0], Learnt)
    assert first == (Learnt(0) if crash == "none" else Refused(ErrorCode.FAILED))
    assert not any(holds(reply) for reply in replies)
    assert CANARY not in caplog.text
    if crash == "tokenizer":
        assert CANARY in (tmp_path / "site.log").read_text()  # the site itself learns what happened


@pytest.mark.parametrize("content", [RecordDict({}), pack_request(ORDER, ENVELOPE), pack_reply(b"no zip")])
def test_a_request_that_cannot_be_read_is_refused_before_a_client_is_opened(content: RecordDict) -> None:
    def open_client(context: Any, envelope: Envelope) -> Any:
        raise AssertionError("opened")

    context: Any = None
    reply = unpack_reply(handler.reply_to(Learn, content, context, open_client), Learnt)
    assert isinstance(reply, Refused)
    assert reply.code in (ErrorCode.BAD_REQUEST, ErrorCode.FAILED)


# Firewall


@pytest.mark.parametrize(
    ("name", "fits", "does_not"),
    [
        ("per_label", [1, MAX_SAMPLES], [0, -1, MAX_SAMPLES + 1]),
        ("max_new_tokens", [1, MAX_TOKENS], [0, MAX_TOKENS + 1]),
        ("temperature", [0.01, 10.0], [0.0, -1.0, 10.1, float("inf"), float("nan")]),
        ("top_p", [0.01, 1.0], [0.0, 1.01, float("nan")]),
        ("top_k", [None, 1, MAX_TOP_K], [0, -1, MAX_TOP_K + 1]),
    ],
)
def test_a_client_checks_the_ranges_of_a_request(name: str, fits: list[Any], does_not: list[Any]) -> None:
    for value in fits:
        check_request(with_field(ORDER, name, value), LABELS)
    for value in does_not:
        with pytest.raises(Rejected, match=f"{name} must lie in"):
            check_request(with_field(ORDER, name, value), LABELS)


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        (replace(GRANTED, answers=("measles",)), "labels outside the public list: 1"),
        (replace(GRANTED, prompts=("a" * (MAX_TEXT + 1),)), f"more than {MAX_TEXT} characters"),
        (PRIVATE, "marked private"),
    ],
)
def test_a_client_checks_the_text_of_a_request(corpus: Corpus, said: str) -> None:
    check_request(Learn(1, replace(GRANTED, prompts=("a" * MAX_TEXT,))), LABELS)
    check_request(Learn(1), LABELS)
    with pytest.raises(Rejected, match=said):
        check_request(Learn(1, corpus), LABELS)


def answered(*labels: str, **more: Any) -> Synthesized:
    corpus = Corpus(("text",) * len(labels), labels, Provenance.DP_SYNTHETIC, grants=("g",))
    return Synthesized(**{"corpus": corpus, "statement": DP, "unfinished": 0, **more})


def measuring(**more: float) -> Evaluated:
    return Evaluated({"accuracy": 0.5, "macro_f1": 0.5, **more}, 5)


@pytest.mark.parametrize(
    ("asked", "labels", "names"),
    [
        (Evaluate(), LABELS, ("accuracy", "macro_f1")),
        (Evaluate(ADAPTER), LABELS, ("loss",)),
        (Evaluate(), (), ("exact_match", "field_match", "rouge_l")),
        (Evaluate(ADAPTER), (), ("exact_match", "field_match", "rouge_l", "loss")),
    ],
)
def test_each_figure_that_a_request_asks_for_comes_and_no_other(
    asked: Evaluate, labels: tuple[str, ...], names: tuple[str, ...]
) -> None:
    whole = dict.fromkeys(names, 0.5)
    check_reply(asked, Evaluated(whole, 5), labels)
    for wrong in (*[{n: 0.5 for n in names if n != gone} for gone in names], {**whole, "more": 0.5}):
        with pytest.raises(Rejected, match="metrics must be"):
            check_reply(asked, Evaluated(wrong, 5), labels)
    for name in names:
        for value in (-0.1, 2e6):
            with pytest.raises(Rejected, match=name):
                check_reply(asked, Evaluated({**whole, name: value}, 5), labels)


def test_a_server_accepts_what_it_asked_for() -> None:
    for labels in [(), ("flu",), ("flu", "flu", "asthma", "asthma")]:  # two per label were asked
        check_reply(ORDER, answered(*labels), LABELS)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (answered("flu", "flu", "flu"), r"of one label must lie in 0\.\.2, got 3"),
        (answered("flu", "flu", "asthma", "asthma", "asthma"), r"number of texts must lie in 0\.\.4, got 5"),
        (answered("measles"), "labels outside the public list: 1"),
        (answered("flu", statement=NONE), "guarantee 'none' with grants"),
        (answered(corpus=UNGRANTED), "guarantee 'dp' with grants"),
        (answered(corpus=replace(GRANTED, prompts=("a" * (MAX_TEXT + 1),))), "characters"),
        *[(measuring(accuracy=v), "must be finite") for v in (float("nan"), float("inf"), -float("inf"))],
        *[(measuring(macro_f1=v), r"'macro_f1' must lie in 0\.0\.\.1\.0") for v in (-1e-9, 1.001, 1e308)],
        (Evaluated({}, 5), "2 of them are missing, 0 others"),
        (Evaluated({"accuracy": 0.5}, 5), "1 of them are missing, 0 others"),
        (measuring(this_run_was_tampered_with=0.5), "0 of them are missing, 1 others"),
        (measuring(accuracy_held_out_clients=0.5), "0 of them are missing, 1 others"),
        (measuring(loss=0.5), "0 of them are missing, 1 others"),
    ],
)
def test_a_server_rejects_a_reply_that_does_not_keep_to_the_request(answer: object, said: str) -> None:
    with pytest.raises(Rejected, match=said):
        check_reply(ORDER if isinstance(answer, Synthesized) else Evaluate(), answer, LABELS)


def test_a_rejection_does_not_repeat_strange_labels() -> None:
    with pytest.raises(Rejected) as caught:
        check_reply(ORDER, answered(CANARY), LABELS)
    assert CANARY not in str(caught.value)


def test_a_server_rejects_text_that_is_marked_private() -> None:
    corpus = replace(GRANTED, provenance=Provenance.PRIVATE)
    with pytest.raises(Rejected):
        check_reply(ORDER, answered(corpus=corpus), LABELS)


@pytest.mark.parametrize("answer", [answered("flu", unfinished=-1), answered("flu", unfinished=5)])
def test_a_server_rejects_counts_that_cannot_be(answer: Synthesized) -> None:
    with pytest.raises(Rejected):
        check_reply(ORDER, answer, LABELS)


def test_private_text_is_stopped_in_one_place_only() -> None:
    """Whatever packs an answer takes bytes, so it must come through `seal` (or be the refusal's constant)."""
    packers = [p for p in Path(handler.__file__).parent.glob("*.py") if re.search(r"\bpack_reply\(", p.read_text())]
    assert [p.name for p in packers] == ["handler.py"]


# Adapters and scores at the firewall

FACTORS = {"w.lora_A.weight": np.ones((1, 2), np.float32), "w.lora_B.weight": np.zeros((3, 1), np.float32)}
START = Adapter(FACTORS, 1, 2.0, "base")
TRAINED = replace(START, grants=("g",))
ONLY_B = replace(TRAINED, arrays={"w.lora_B.weight": np.ones((3, 1), np.float32)})
BROKEN = {"w.lora_A.weight": np.full((1, 2), np.nan, np.float32), "w.lora_B.weight": np.zeros((3, 1), np.float32)}


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (replace(TRAINED, arrays={**START.arrays, "text": np.zeros(9, np.float32)}), "other tensors"),
        (replace(TRAINED, arrays={"w.lora_A.weight": START.arrays["w.lora_A.weight"]}), "other tensors"),
        (replace(TRAINED, arrays={n: a.T for n, a in START.arrays.items()}), "other tensors"),
        (replace(TRAINED, base="another"), "another base"),
        (replace(TRAINED, rank=2), "another rank"),
        (replace(TRAINED, alpha=4.0), "another alpha"),
        (replace(TRAINED, arrays=BROKEN), "not finite"),
        *[(replace(TRAINED, arrays={n: a + v for n, a in FACTORS.items()}), "not finite") for v in (np.inf, -np.inf)],
        (replace(TRAINED, arrays={n: a + 2e6 for n, a in FACTORS.items()}), "beyond 1e"),
        (START, "with grants"),
    ],
)
def test_an_adapter_may_only_be_one_of_those_that_were_sent(adapter: Adapter, said: str) -> None:
    request = Finetune(START, seed=0)
    check_reply(request, Finetuned(TRAINED, DP, 200), ())
    with pytest.raises(Rejected, match=said):
        check_reply(request, Finetuned(adapter, DP, 200), ())


def test_with_frozen_a_the_factors_b_come_back_alone() -> None:
    request = Finetune(START, seed=0, frozen_a=True)
    check_reply(request, Finetuned(ONLY_B, DP, 200), ())
    with pytest.raises(Rejected, match="other tensors"):
        check_reply(request, Finetuned(TRAINED, DP, 200), ())
    with pytest.raises(Rejected, match="other tensors"):
        check_reply(replace(request, frozen_a=False), Finetuned(ONLY_B, DP, 200), ())


def test_scores_are_one_finite_number_per_text() -> None:
    request = Score(GRANTED, seed=0)
    one = Scores((0.5,) * len(GRANTED), ("g",))
    check_reply(request, Scored(one, DP), LABELS)
    for values in [(0.5,) * (len(GRANTED) + 1), (), (float("nan"),) * len(GRANTED), (float("inf"),) * len(GRANTED)]:
        with pytest.raises(Rejected, match="score"):
            check_reply(request, Scored(replace(one, values=values), DP), LABELS)


@pytest.mark.parametrize(
    "asked",
    [
        Finetune(replace(START, arrays=BROKEN), seed=0),
        Finetune(START, seed=-1),
        Adopt(replace(START, arrays=BROKEN)),
        Score(replace(GRANTED, prompts=(), answers=()), seed=0),
        Score(PRIVATE, seed=0),
        SelfTrain(START, seed=0, writing_seed=2**40),
        SelfTrain(START, seed=0, writing_seed=0, share=1.1),
        SelfTrain(START, seed=0, writing_seed=0, share=float("nan")),
        SelfTrain(START, seed=0, writing_seed=0, candidates=2, keep=3),
        SelfTrain(START, seed=0, writing_seed=0, shots=0),
        SelfTrain(START, seed=0, writing_seed=0, max_new_tokens=MAX_TOKENS + 1),
    ],
)
def test_a_client_refuses_a_request_beyond_its_ranges(asked: Request[Any]) -> None:
    with pytest.raises(Rejected):
        check_request(asked, LABELS)


FACTORS_OF_TWO = {"w.lora_A.weight": np.ones((2, 4), np.float32), "w.lora_B.weight": np.zeros((3, 2), np.float32)}
SENT = Adapter(FACTORS_OF_TWO, 2, 4.0, "base")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, r"rank must lie in 1\.\.1024, got 0"),
        ({"rank": 10**9}, r"rank must lie in 1\.\.1024, got 1000000000"),
        ({"rank": 4}, "of rank 4 for each"),  # whoever puts it to use makes room for four
        ({"alpha": 1e7}, r"alpha must be above 0 and at most 1e\+06, got 1e\+07"),
        ({"alpha": float("inf")}, "alpha must"),
        ({"alpha": float("nan")}, "alpha must"),
        ({"alpha": 0.0}, "alpha must"),
        ({"base": "b" * 501}, "length of"),
        ({"grants": ("no grant",)}, "names of grants"),
        ({"grants": ("g",) * 100_001}, "number of"),
        ({"arrays": {n: a[:1] for n, a in FACTORS_OF_TWO.items()}}, "matrices A and B"),
        ({"arrays": {"w.lora_A.weight": FACTORS_OF_TWO["w.lora_A.weight"]}}, "matrices A and B"),
        ({"arrays": {n: a.ravel() for n, a in FACTORS_OF_TWO.items()}}, "matrices A and B"),
        ({"arrays": {**FACTORS_OF_TWO, "../../w": np.ones((2, 2), np.float32)}}, "whose name"),
        ({"arrays": {n: a * 2e6 for n, a in FACTORS_OF_TWO.items()}}, "beyond 1e"),
    ],
)
def test_a_client_caps_every_adapter_of_a_request(change: dict[str, Any], said: str) -> None:
    requests: list[Any] = [Finetune(SENT, 0), SelfTrain(SENT, 0, 0), Adopt(SENT), Evaluate(SENT)]
    for request in requests:
        check_request(request, LABELS)
        name = "start" if isinstance(request, Finetune | SelfTrain) else "adapter"
        with pytest.raises(Rejected, match=said):
            check_request(replace(request, **{name: replace(SENT, **change)}), LABELS)


@dataclass(frozen=True)
class Unheard(Request[Scores]):
    """A request that nobody wrote a check for."""


def test_a_request_without_a_check_is_refused() -> None:
    assert set(CHECKED) == set(tasks.REQUESTS)
    with pytest.raises(Rejected, match="a request Unheard has no check"):
        check_request(Unheard(), LABELS)


def test_text_and_records_have_caps() -> None:
    with pytest.raises(Rejected, match=r"number of texts must lie in 0\.\.1000000"):
        check_request(replace(ORDER, per_label=MAX_SAMPLES), [str(i) for i in range(11)])
    many = Corpus(("",) * 1_000_001, ("flu",) * 1_000_001, Provenance.PUBLIC)
    for request in (Learn(1, many), Score(many, 1)):
        with pytest.raises(Rejected, match="number of texts"):
            check_request(request, LABELS)
    with pytest.raises(Rejected, match=r"records must lie in 1\.\.1000000000"):
        check_reply(Finetune(START, seed=0), Finetuned(TRAINED, DP, 10**10), ())


def test_a_client_weighs_as_much_as_its_sampling_rate_was_planned_for() -> None:
    request = Finetune(START, seed=0)
    for records, batch, fits in [
        (200, 25, True), (200, None, True), (400, None, True), (8, 1, True),
        (400, 25, False), (10**8, 25, False), (201, None, False), (4, None, False), (2 * 10**8 + 1, None, False),
    ]:  # fmt: skip
        answer = Finetuned(TRAINED, DP, records)  # a batch is an eighth of them, in whole units
        if fits:
            check_reply(request, answer, (), batch=batch)
        else:
            with pytest.raises(Rejected, match=r"sampling rate of 0\.125 is not for"):
                check_reply(request, answer, (), batch=batch)
    few = replace(DP, sampling_rate=1.0, epsilon=70.0, epsilon_replace_one=210.0)
    check_reply(request, Finetuned(TRAINED, few, 7), (), batch=25)  # a client smaller than a batch


JUNK = "</td><script>alert(1)</script>\x1b[2J"


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (Evaluate(), Evaluated({JUNK: 0.5}, 1)),
        (Evaluate(), measuring(this_run_was_tampered_with=0.5)),
        (Evaluate(), measuring(accuracy_held_out_clients=0.5)),
        (Evaluate(), replace(measuring(), examples=-1)),
        (SelfTrain(START, 0, 0), SelfTrained(replace(START), NONE, 30, {JUNK: 1})),
        (SelfTrain(START, 0, 0), SelfTrained(replace(START), NONE, 30, {"tampered with by ops": 1})),
        (SelfTrain(START, 0, 0), SelfTrained(replace(START), NONE, 30, {"too short": 20, "kept": 20})),
        (Score(GRANTED, 0), Scored(Scores((1e308,), ("g",)), DP)),
        (Finetune(START, 0), Finetuned(replace(TRAINED, grants=(JUNK,)), DP, 200)),
        (Finetune(START, 0), Finetuned(replace(TRAINED, base=JUNK), DP, 200)),
        (Finetune(START, 0), Finetuned(TRAINED, replace(DP, unit=JUNK), 200)),
        (Finetune(START, 0), Finetuned(TRAINED, replace(DP, unit="client"), 200)),  # for lists of scores
        (ORDER, answered("flu", corpus=replace(GRANTED, grants=(JUNK,)))),
        (ORDER, answered("flu", corpus=replace(GRANTED, provenance=Provenance.PUBLIC))),
        (ORDER, Synthesized(replace(UNGRANTED, provenance=Provenance.PUBLIC), NONE, 0)),
        (Score(GRANTED, 0), Scored(Scores((0.5,), (JUNK,)), DP)),
        (Learn(1, GRANTED), Learnt(2)),
        (Learn(1), Learnt(-1)),
        (Adopt(START), Adopted(6)),
    ],
)
def test_no_word_of_a_client_gets_through_or_into_a_sentence(asked: Request[Any], answer: object) -> None:
    with pytest.raises(Rejected) as caught:
        check_reply(asked, answer, LABELS)
    assert "script" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_names_that_clients_do_send_get_through() -> None:
    reasons = ("asked", "too short", "instruction like a local one", "like an earlier one", "no response", "kept")
    check_reply(SelfTrain(START, 0, 0), SelfTrained(START, NONE, 30, dict.fromkeys(reasons, 3)), ())
    check_reply(Score(GRANTED, 0), Scored(Scores((0.5,), ("a3" * 16,)), replace(DP, unit="person")), LABELS)
    check_reply(Adopt(START), Adopted(5), ())
