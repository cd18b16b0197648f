"""The reply to a message: unpack each request, open its client, check, call the function, seal; or a constant code."""

from __future__ import annotations

import errno
import hashlib
import logging
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

from flwr.app import Context, RecordDict

from fedsynth.clients.approval import AwaitsApproval, NotApproved
from fedsynth.clients.batched_training import Barrier, Trains, together
from fedsynth.clients.client_side import ClientSide, NotAllowed, WrongData, WrongLabels
from fedsynth.clients.evaluate import evaluate
from fedsynth.clients.finetune import adopt, finetune
from fedsynth.clients.learn import NoTaskModel, learn
from fedsynth.clients.score import score
from fedsynth.clients.secure_sum import offer_keys, open_shares, share_seeds, sign_survivors, unmask
from fedsynth.clients.self_train import self_train
from fedsynth.clients.synthesize import synthesize
from fedsynth.clients.vote import vote
from fedsynth.corpus import Corpus
from fedsynth.federation.identity import Mistrusted
from fedsynth.federation.messages import (
    Adopt,
    Envelope,
    ErrorCode,
    Evaluate,
    Finetune,
    Learn,
    OfferKeys,
    OpenShares,
    Request,
    Score,
    SelfTrain,
    ShareSeeds,
    SignSurvivors,
    Synthesize,
    Unmask,
    Vote,
    outputs,
)
from fedsynth.federation.payload import decode
from fedsynth.federation.records import (
    WillNotLeave,
    client_number,
    derived,
    joined,
    pack_reply,
    parted,
    payload_bytes,
    refusal,
    seal,
    stack_number,
    unpack_request,
)
from fedsynth.federation.validation import Rejected, check_request
from fedsynth.identifiers import counts, told
from fedsynth.models.adapters import WrongAdapter
from fedsynth.privacy.caps import BudgetExhausted
from fedsynth.privacy.plan import BudgetTooSmall
from fedsynth.privacy.release import NotReleasable
from fedsynth.privacy.statement import Statement
from fedsynth.training.selfcheck import SelfCheckFailed
from fedsynth.typed import BadValue, plain

Opener = Callable[[Context, Envelope], ClientSide]
Unopened = Callable[[str, str], None]
Reader = Callable[[RecordDict, type[Any]], tuple[Any, Envelope, str]]

# A client's function for each request; these functions never see Flower.
FUNCTIONS: dict[type[Request[Any]], Callable[[ClientSide, Any, str], object]] = {
    Synthesize: synthesize,
    Finetune: finetune,
    Score: score,
    Vote: vote,
    OfferKeys: offer_keys,
    ShareSeeds: lambda client, request, _: share_seeds(client, request),
    OpenShares: lambda client, request, _: open_shares(client, request),
    SignSurvivors: lambda client, request, _: sign_survivors(client, request),
    Unmask: lambda client, request, _: unmask(client, request),
    SelfTrain: lambda client, request, _: self_train(client, request),
    Adopt: lambda client, request, _: adopt(client, request),
    Learn: lambda client, request, _: learn(client, request),
    Evaluate: lambda client, request, _: evaluate(client, request.adapter),
}


class BadRequest(ValueError):
    """The server sent something that is not a request, or not one within range."""


CODES: dict[type[Exception], ErrorCode] = {
    BudgetExhausted: ErrorCode.BUDGET_EXHAUSTED,
    BudgetTooSmall: ErrorCode.BUDGET_TOO_SMALL,
    WillNotLeave: ErrorCode.NOT_ALLOWED,
    NotReleasable: ErrorCode.NOT_ALLOWED,
    Mistrusted: ErrorCode.NOT_ALLOWED,
    NotAllowed: ErrorCode.NOT_ALLOWED,
    BadRequest: ErrorCode.BAD_REQUEST,
    NoTaskModel: ErrorCode.NO_TASK_MODEL,
    SelfCheckFailed: ErrorCode.SELF_CHECK_FAILED,
    WrongAdapter: ErrorCode.WRONG_ADAPTER,
    WrongLabels: ErrorCode.WRONG_LABELS,
    WrongData: ErrorCode.WRONG_DATA,
    AwaitsApproval: ErrorCode.AWAITS_APPROVAL,
    NotApproved: ErrorCode.NOT_APPROVED,
}


def reply_to(
    kind: type[Request[Any]],
    content: RecordDict,
    context: Context,
    open_client: Opener,
    read: Reader = unpack_request,
    unopened: Unopened | None = None,
) -> RecordDict:
    """The reply to a message, request by request: sealed bytes, or a constant code. No text of an exception leaves.

    Requests of one stack train in one pass. A site accepts one request a message.
    """
    replies: list[RecordDict] = []
    requests = parted(content)
    for stack in _stacks(requests):
        begun = time.process_time()
        alone = len(requests) == 1
        said = together([_reply(kind, request, context, open_client, read, unopened, alone=alone) for request in stack])
        each = (time.process_time() - begun) / len(stack)
        replies += [pack_reply(a.data, refused=a.refused, seconds=each if a.simulated else None) for a in said]
    return joined(replies)


@dataclass(frozen=True)
class _Sealed:
    """Sealed bytes, marked as a refusal or not, and as a simulated client's or not."""

    data: bytes
    refused: bool
    simulated: bool


def _stacks(requests: Sequence[RecordDict]) -> list[list[RecordDict]]:
    """Adjacent requests of one stack, each client once: its second request would wait forever for the first's lock."""
    stacks: list[list[RecordDict]] = []
    number, clients = None, set[int]()
    for request in requests:
        own, client = stack_number(request), client_number(request)
        if own != number or client in clients:
            stacks.append([])
            clients = set()
        number = own
        clients.add(client)
        stacks[-1].append(request)
    return stacks


def _reply(
    kind: type[Request[Any]],
    content: RecordDict,
    context: Context,
    open_client: Opener,
    read: Reader,
    unopened: Unopened | None,
    *,
    alone: bool,
) -> Trains[_Sealed]:
    client: ClientSide | None = None
    try:
        try:
            request, envelope, digest = read(content, kind)
        except BadValue as problem:
            raise BadRequest(str(problem)) from problem
        client = open_client(context, envelope)
        if not (alone or client.simulated):
            raise BadRequest("a site answers one request a message")
        with client.locked():
            stored = client.ledger.answered(digest)
            if stored is None and client.audit_log is not None:  # requests that wait are repeated
                size = payload_bytes(content)
                _enter(client, "asked", order=digest, task=kind.task, envelope=asdict(envelope), bytes=size)
            _check(request, client)
            if stored is None:
                reply = FUNCTIONS[kind](client, request, digest)
                if isinstance(reply, Generator):
                    reply = yield from reply
                stored = seal(reply, allowed=client.rules.outputs, waived=client.waived, disclosed=client.simulated)
                # Clients of one pass store their replies only when all are ready: a killed process then rarely leaves
                # some of them, and the same clients are retrained together, to the same weights.
                yield Barrier()
                _hold(client, kind, digest, stored, reply)
                if _under_grant(reply):
                    client.ledger.store(digest, stored, derived_from=_grants(reply))
                else:
                    client.ledger.store_answer(digest, stored)
                _enter(client, "stored", order=digest, **_cost(reply))
            elif not client.ledger.sent(digest):  # the policy may have become stricter since it was stored
                kept = decode(stored, kind.reply, trusted=True)
                _refuse_identifiers(client, kept)
                _hold(client, kind, digest, stored, kept)
            if client.approvals is not None:
                client.approvals.check(digest, hashlib.sha256(stored).hexdigest())
            client.ledger.mark_sent(digest)
            _enter(client, "answered", order=digest, bytes=len(stored), sha256=hashlib.sha256(stored).hexdigest())
            return _Sealed(stored, False, client.simulated)
    except Exception as problem:  # the only place that catches everything: the reason stays at the site
        code = next((code for cls, code in CODES.items() if isinstance(problem, cls)), ErrorCode.FAILED)
        if _no_room(problem):
            code = ErrorCode.DISK_FULL
            where = "the disk" if client is None else client.log_folder
            print(
                f"fedsynth: no room is left in {where}: make some; what was charged stays charged, and the run can "
                "be resumed",
                file=sys.stderr,
                flush=True,
            )
        if code is not ErrorCode.AWAITS_APPROVAL:
            with suppress(OSError):  # a full disk must not turn a refusal into an error whose text leaves
                _enter(client, "refused", task=kind.task, code=code.value, why=type(problem).__name__)
            _write_down(client, kind.task, traceback.format_exc(), unopened)
        return _Sealed(refusal(code), True, client is not None and client.simulated)


def _check(request: Request[Any], client: ClientSide) -> None:
    """Checks a request before private text is read: a later refusal could reveal the text by the way it fails."""
    try:
        check_request(request, client.labels)
    except Rejected as problem:
        raise BadRequest(str(problem)) from problem
    rules = client.rules
    if rules.objection is not None:
        raise rules.objection
    if request.task not in rules.requests:
        raise NotAllowed(f"the request {request.task} is none of those that this site answers: policy.requests")
    if request.discloses and not client.simulated:
        raise NotAllowed(
            "private text as it is, which no policy lets out, is asked for: simulated clients alone give it"
        )
    if kinds := outputs(request) - rules.outputs:
        raise NotAllowed(f"{request.task} asks for {' and '.join(sorted(kinds))}: not among policy.outputs")
    releases = any(field.name == "statement" for field in fields(request.reply))
    if releases and client.config.guarantee == "none" and not rules.without_guarantee:
        raise NotAllowed(f"{request.task} asks for a release without a guarantee: policy.without_guarantee is false")


def _enter(client: ClientSide | None, event: str, **facts: Any) -> None:
    if client is not None and client.audit_log is not None:
        client.audit_log.add(event, **facts)


def _hold(client: ClientSide, kind: type[Request[Any]], digest: str, stored: bytes, reply: object) -> None:
    """Makes a reply with synthetic text wait for a person, if the site requires that; called before it is stored."""
    texts = _texts(reply)
    if client.rules.approval and client.approvals is not None and texts:
        facts = {"task": kind.task, "run": client.run, "texts": len(texts), "identifiers": counts(texts)}
        if client.approvals.hold(digest, hashlib.sha256(stored).hexdigest(), **facts):
            _enter(client, "waits", order=digest, texts=len(texts))


def _texts(reply: object) -> list[str]:
    """Each text of a reply with its answer."""
    corpora = [part for part in derived(reply) if isinstance(part, Corpus)]
    return [f"{text}\n{answer}" for each in corpora for text, answer in zip(each.prompts, each.answers, strict=True)]


def _refuse_identifiers(client: ClientSide, reply: object) -> None:
    """Refuses a stored reply whose text today's policy blocks. It cannot lose a text: its hash stands in the trail."""
    if found := {kind: n for kind, n in counts(_texts(reply)).items() if kind in client.rules.identifiers}:
        raise NotAllowed(f"of the stored texts {told(found)}: policy.identifiers blocks them since")


def _cost(reply: object) -> dict[str, Any]:
    """The cost that a reply states, and its grants."""
    said = getattr(reply, "statement", None)
    figures = plain(said) if isinstance(said, Statement) else {}
    return {"grants": _grants(reply), **{k: figures[k] for k in ("guarantee", "epsilon", "delta") if k in figures}}


def _no_room(problem: BaseException | None) -> bool:
    """True if a full disk caused an exception."""
    while problem is not None:
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if getattr(problem, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _write_down(client: ClientSide | None, task: str, what: str, unopened: Unopened | None) -> None:
    """Writes to the site's own log. In a simulation without a client or with a failing log: to the process's output.

    A site's process output does not stay in its log's folder, so that no traceback may go there.
    """
    try:
        if client is not None:
            return client.log().error("%s: %s", task, what)
        if unopened is not None:
            return unopened(task, what)
    except (OSError, BadValue):
        pass
    site = unopened is not None or (client is not None and not client.simulated)
    return logging.getLogger(__name__).error("%s: %s", task, "the site's log cannot be written" if site else what)


def _under_grant(reply: object) -> bool:
    said = getattr(reply, "statement", None)
    return isinstance(said, Statement) and said.guarantee == "dp"


def _grants(reply: object) -> list[str]:
    return [grant for part in derived(reply) for grant in part.grants]
