"""The ClientApp: each request class under its Flower action."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsynth.clients.client_side import ClientSide, cell_of, simulated_client
from fedsynth.clients.flower_compat import read_message, write_reply
from fedsynth.clients.handler import FUNCTIONS, Opener, Unopened, reply_to
from fedsynth.federation.messages import Envelope, Evaluate, Finetune, Request
from fedsynth.federation.records import unpack_reply
from fedsynth.federation.run.directory import places
from fedsynth.models.devices import one_thread


def client_app(open_client: Opener, *, simulated: bool = True, unopened: Unopened | None = None) -> ClientApp:
    """The ClientApp of one or more clients.

    Args:
        open_client: Flower's context and the request's envelope -> the client that it is for.
        simulated: Replies to Flower's own strategies as well, and limits this process to one thread.
        unopened: Logs the failure of a request whose client cannot be opened; None for this process's own output.
    """
    if simulated:
        one_thread()
    app = ClientApp()

    @app.query("who")
    def who(message: Message, context: Context) -> Message:
        facts = {k: int(str(context.node_config.get(k, d))) for k, d in (("partition-id", 0), ("num-partitions", 1))}
        return Message(RecordDict({"who": ConfigRecord(dict(facts))}), reply_to=message)

    for kind in FUNCTIONS:
        group, _, action = kind.task.partition(".")
        register = {"train": app.train, "evaluate": app.evaluate, "query": app.query}[group]

        def handle(message: Message, context: Context, kind: type[Request[Any]] = kind) -> Message:
            return Message(reply_to(kind, message.content, context, open_client, unopened=unopened), reply_to=message)

        register(action)(handle)

    def usual(kind: type[Request[Any]]) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            sealed = reply_to(kind, message.content, context, open_client, partial(read_message, context=context))
            return write_reply(message, unpack_reply(sealed, kind.reply))

        return handle

    if simulated:
        app.train()(usual(Finetune))  # Flower's own strategies: docs/flower-strategies.md
        app.evaluate()(usual(Evaluate))
    return app


def simulation(context: Context, envelope: Envelope) -> ClientSide:
    """The simulated client of an envelope; the run-config gives the scenario and the run's private directory."""
    toml, _, private = _places(tuple(sorted(context.run_config.items())), context.run_id)
    os.umask(0o077)
    return simulated_client(cell_of(toml, envelope.arm, envelope.seed), envelope.client, private, envelope.run)


@lru_cache(maxsize=2)
def _places(config: tuple[tuple[str, Any], ...], run_id: int) -> tuple[str, Path, Path]:
    return places(dict(config), run_id)
