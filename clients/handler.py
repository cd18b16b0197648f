"""The reply to a message: unpack each order, open its client, check, call the function, seal; or a constant code."""

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
from fedsynth.clients.self_train import self_train
from fedsynth.clients.synthesize import synthesize
from fedsynth.corpus import Corpus
from fedsynth.federation.messages import (
    Adopt,
    Code,
    Envelope,
    Evaluate,
    Finetune,
    Learn,
    Order,
    Score,
    SelfTrain,
    Synthesize,
    outputs,
)
from fedsynth.federation.payload import decode
from fedsynth.federation.records import (
    WillNotLeave,
    client_number,
    derived,
    joined,
    pack_answer,
    parted,
    payload_bytes,
    refusal,
    seal,
    stack_number,
    unpack_order,
)
from fedsynth.federation.validation import Rejected, check_order
from fedsynth.models.adapters import WrongAdapter
from fedsynth.privacy.ledger import BudgetExhausted
from fedsynth.privacy.plan import BudgetTooSmall, Statement
from fedsynth.privacy.release import NotReleasable
from fedsynth.training.selfcheck import SelfCheckFailed
from fedsynth.typed import BadValue, plain

Opener = Callable[[Context, Envelope], ClientSide]
Unopened = Callable[[str, str], None]
Reader = Callable[[RecordDict, type[Any]], tuple[Any, Envelope, str]]

# What a client does for each order; these functions never see Flower.
FUNCTIONS: dict[type[Order[Any]], Callable[[ClientSide, Any, str], object]] = {
    Synthesize: synthesize,
    Finetune: finetune,
    Score: score,
    SelfTrain: lambda client, order, _: self_train(client, order),
    Adopt: lambda client, order, _: adopt(client, order),
    Learn: lambda client, order, _: learn(client, order),
    Evaluate: lambda client, order, _: evaluate(client, order.adapter),
}


class BadOrder(ValueError):
    """The server sent something that is not an order, or not one within range."""


CODES: dict[type[Exception], Code] = {
    BudgetExhausted: Code.BUDGET_EXHAUSTED,
    BudgetTooSmall: Code.BUDGET_TOO_SMALL,
    WillNotLeave: Code.NOT_ALLOWED,
    NotReleasable: Code.NOT_ALLOWED,
    NotAllowed: Code.NOT_ALLOWED,
    BadOrder: Code.BAD_ORDER,
    NoTaskModel: Code.NO_TASK_MODEL,
    SelfCheckFailed: Code.SELF_CHECK_FAILED,
    WrongAdapter: Code.WRONG_ADAPTER,
    WrongLabels: Code.WRONG_LABELS,
    WrongData: Code.WRONG_DATA,
    AwaitsApproval: Code.AWAITS_APPROVAL,
    NotApproved: Code.NOT_APPROVED,
}


def answer(
    kind: type[Order[Any]],
    content: RecordDict,
    context: Context,
    open_client: Opener,
    read: Reader = unpack_order,
    unopened: Unopened | None = None,
) -> RecordDict:
    """The reply to a message, order by order: sealed bytes, or a constant code. No text of an exception leaves.

    Orders of one stack train in one pass. A site answers one order a message.
    """
    replies: list[RecordDict] = []
    orders = parted(content)
    for stack in _stacks(orders):
        begun = time.process_time()
        alone = len(orders) == 1
        said = together([_answer(kind, order, context, open_client, read, unopened, alone=alone) for order in stack])
        each = (time.process_time() - begun) / len(stack)
        replies += [pack_answer(a.data, refused=a.refused, seconds=each if a.simulated else None) for a in said]
    return joined(replies)


@dataclass(frozen=True)
class _Said:
    """Sealed bytes, whether they refuse, and whether their home is simulated."""

    data: bytes
    refused: bool
    simulated: bool


def _stacks(orders: Sequence[RecordDict]) -> list[list[RecordDict]]:
    """Neighbours of one stack, each client once: a client's second order would wait for ever for the lock of its first."""
    stacks: list[list[RecordDict]] = []
    number, clients = None, set[int]()
    for order in orders:
        own, client = stack_number(order), client_number(order)
        if own != number or client in clients:
            stacks.append([])
            clients = set()
        number = own
        clients.add(client)
        stacks[-1].append(order)
    return stacks


def _answer(
    kind: type[Order[Any]],
    content: RecordDict,
    context: Context,
    open_client: Opener,
    read: Reader,
    unopened: Unopened | None,
    *,
    alone: bool,
) -> Trains[_Said]:
    client: ClientSide | None = None
    try:
        try:
            order, envelope, digest = read(content, kind)
        except BadValue as problem:
            raise BadOrder(str(problem)) from problem
        client = open_client(context, envelope)
        if not (alone or client.simulated):
            raise BadOrder("a site answers one order a message")
        with client.locked():
            stored = client.ledger.answered(digest)
            if stored is None and client.trail is not None:  # who waits is asked again and again
                size = payload_bytes(content)
                _enter(client, "asked", order=digest, task=kind.task, envelope=asdict(envelope), bytes=size)
            _check(order, client)
            if stored is None:
                reply = FUNCTIONS[kind](client, order, digest)
                if isinstance(reply, Generator):
                    reply = yield from reply
                stored = seal(reply, allowed=client.rules.outputs, waived=client.waived)
                # A process that is killed hardly ever leaves the answers of some who trained together: those who train
                # again do so among the same, to the same weights.
                yield Barrier()
                _hold(client, kind, digest, stored, reply)
                if _under_grant(reply):
                    client.ledger.store(digest, stored, derived_from=_grants(reply))
                else:
                    client.ledger.store_answer(digest, stored)
                _enter(client, "stored", order=digest, **_cost(reply))
            elif not client.ledger.sent(digest):  # approval may have been asked for since it was stored
                _hold(client, kind, digest, stored, decode(stored, kind.reply, trusted=True))
            if client.approvals is not None:
                client.approvals.check(digest, hashlib.sha256(stored).hexdigest())
            client.ledger.mark_sent(digest)
            _enter(client, "answered", order=digest, bytes=len(stored), sha256=hashlib.sha256(stored).hexdigest())
            return _Said(stored, False, client.simulated)
    except Exception as problem:  # the only place that catches everything: the reason stays at the site
        code = next((code for cls, code in CODES.items() if isinstance(problem, cls)), Code.FAILED)
        if _no_room(problem):
            code = Code.DISK_FULL
            where = "the disk" if client is None else client.log_folder
            print(
                f"fedsynth: no room is left in {where}: make some; what was charged stays charged, and the run can "
                "be resumed",
                file=sys.stderr,
                flush=True,
            )
        if code is not Code.AWAITS_APPROVAL:
            with suppress(OSError):  # a full disk must not turn a refusal into an error whose text leaves
                _enter(client, "refused", task=kind.task, code=code.value, why=type(problem).__name__)
            _write_down(client, kind.task, traceback.format_exc(), unopened)
        return _Said(refusal(code), True, client is not None and client.simulated)


def _check(order: Order[Any], client: ClientSide) -> None:
    """Before private text is read: what would be refused after it could tell by how it fails what it had read."""
    try:
        check_order(order, client.labels)
    except Rejected as problem:
        raise BadOrder(str(problem)) from problem
    rules = client.rules
    if rules.objection is not None:
        raise rules.objection
    if order.task not in rules.orders:
        raise NotAllowed(f"the order {order.task} is none of those that this site answers: policy.orders")
    if kinds := outputs(order) - rules.outputs:
        raise NotAllowed(f"{order.task} asks for {' and '.join(sorted(kinds))}: not among policy.outputs")
    releases = any(field.name == "statement" for field in fields(order.reply))
    if releases and client.config.guarantee == "none" and not rules.without_guarantee:
        raise NotAllowed(f"{order.task} asks for a release without a guarantee: policy.without_guarantee is false")


def _enter(client: ClientSide | None, event: str, **facts: Any) -> None:
    if client is not None and client.trail is not None:
        client.trail.add(event, **facts)


def _hold(client: ClientSide, kind: type[Order[Any]], digest: str, stored: bytes, reply: object) -> None:
    """Makes an answer with synthetic text wait for a person, where the site asks for that; before it is stored."""
    texts = sum(len(part) for part in derived(reply) if isinstance(part, Corpus))
    if client.rules.approval and client.approvals is not None and texts:
        facts = {"task": kind.task, "run": client.run, "texts": texts}
        if client.approvals.hold(digest, hashlib.sha256(stored).hexdigest(), **facts):
            _enter(client, "waits", order=digest, texts=texts)


def _cost(reply: object) -> dict[str, Any]:
    """What an answer says that it cost, and under which grants."""
    said = getattr(reply, "statement", None)
    figures = plain(said) if isinstance(said, Statement) else {}
    return {"grants": _grants(reply), **{k: figures[k] for k in ("guarantee", "epsilon", "delta") if k in figures}}


def _no_room(problem: BaseException | None) -> bool:
    """Whether a full disk is behind an exception."""
    while problem is not None:
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if getattr(problem, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _write_down(client: ClientSide | None, task: str, what: str, unopened: Unopened | None) -> None:
    """To the site's own log; of a simulation to this process's own output, before a client is known or if that log cannot
    be written. A site's output goes elsewhere than its log, and may not hold what a traceback does."""
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
