"""A run that dies at each of its moments in turn, and goes on, beside one that is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from inprocess import Played, play

from fedsynth.federation.messaging import Clients
from fedsynth.federation.nodes import WHO
from fedsynth.privacy.audit import contents, ledgers_in, problems


class Died(BaseException):
    """As a killed process: nothing in the product catches it."""


def left(run: Played) -> dict[str, Any]:
    """What a run leaves, without how long things took and at what time of day."""
    found: dict[str, Any] = {"rows": [row for row in run.run_log.rows if not row[4].startswith("seconds/")]}
    for kind in ("corpora/**/*.parquet", "adapters/**/*.safetensors"):
        found[kind] = {str(path.relative_to(run.out)): path.read_bytes() for path in run.out.glob(kind)}
    found["privacy"] = (run.run_log.spending, run.run_log.released, run.run_log.silent)
    for path in ledgers_in(run.out):
        ledger = contents(path)
        assert problems(ledger) == []
        reserved = [{k: v for k, v in row.items() if k != "at"} for row in ledger["reservations"]]
        grants = [{k: v for k, v in grant.items() if k != "at"} for grant in ledger["grants"]]
        found[ledger["dataset"]] = (ledger["epsilon"], reserved, grants)
    return found


def dies_everywhere(
    toml: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arm: str = "main",
    *,
    llm: Callable[[], Any] = lambda: None,
    professional: Callable[[], Any] = lambda: None,
    every: int = 1,
) -> tuple[Played, list[Played]]:
    """The unbroken run, and the ones that were gone on with: each dies once, before a request reaches its client or
    after a client's answer has reached the server. All leave the same."""
    whole = play(toml, tmp_path / "whole", arm, llm=llm(), professional=professional())
    messages, again = len(asked(whole)), []
    for at in range(0, 2 * messages, every):
        place = tmp_path / f"died-{at}"
        count = iter(range(messages))
        counted = Clients._counted

        def before(request: Message, at: int = at, count: Any = count) -> None:
            if at % 2 == 0 and request.metadata.message_type != WHO and next(count) == at // 2:
                raise Died

        def after(self: Any, *said: Any, at: int = at, count: Any = count, counted: Any = counted) -> Any:
            if at % 2 and next(count) == at // 2:
                raise Died
            return counted(self, *said)

        with monkeypatch.context() as patch:
            patch.setattr(Clients, "_counted", after)
            with pytest.raises(Died):
                play(toml, place, arm, llm=llm(), professional=professional(), spoil=before)
        again.append(play(toml, place, arm, llm=llm(), professional=professional()))
        assert left(again[-1]) == left(whole), f"died at {at}"
    return whole, again


def asked(run: Played) -> list[Message]:
    """The messages with requests."""
    return [message for message in run.grid.requests if message.metadata.message_type != WHO]
