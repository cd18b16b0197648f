"""One cell of a scenario in this process: the real client app and strategy, tiny models, no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import tiny
from flwr.app import ArrayRecord, Message
from local import LocalGrid

from fedsynth.clients.app import client_app, simulation
from fedsynth.clients.client_side import ClientSide, cell_of, simulated_client
from fedsynth.data.partition import label_list
from fedsynth.federation.cached_llm import CachedLLM
from fedsynth.federation.messages import Refused, Request
from fedsynth.federation.nodes import nodes_by_client
from fedsynth.federation.payload import decode
from fedsynth.federation.records import parted
from fedsynth.federation.run.directory import private_of
from fedsynth.federation.run.log import RunLog
from fedsynth.federation.strategy import Clients, ServerSide, load_strategy
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.toml import from_toml, to_toml
from fedsynth.testing import ScriptedLLM, embed

T = TypeVar("T")

INSTRUCTIONS = """
name = "tiny"
seeds = [0]
rounds = {rounds}
[strategy]
use = "{strategy}"
{options}
[data]
source = "{file}"
task = "instructions"
clients = {clients}
[client]
generator = "{model}"
guarantee = "{guarantee}"
budget = {{ epsilon = 8.0 }}
answer_tokens = 8
[client.generator_training]
expected_batch_size = 5
steps = 3
learning_rate = 1e-3
rank = 2
alpha = 4.0
max_length = 96
[server]
llm = "scripted"
[arms.main]
"""


def canary(row: int) -> str:
    """Each private record's own high-entropy token: one shared by all would be a fact about the population."""
    return f"zq{row * 7919 + 104729:08x}"


def instructions(
    tmp_path: Path,
    strategy: str,
    *,
    options: str = "",
    guarantee: str = "dp",
    clients: int = 3,
    rows: int = 36,
    rounds: int = 1,
    model: str | None = None,
) -> str:
    """A scenario on a file of instructions, in each of which a canary stands, and one in each response."""
    frame = pd.DataFrame(
        {
            "text": [f"note {canary(2 * i)} of thing {i % 5}" for i in range(rows)],
            "response": [f"ward {i % 5}; {canary(2 * i + 1)}" for i in range(rows)],
        }
    )
    frame.to_csv(tmp_path / "records.csv", index=False)
    return INSTRUCTIONS.format(
        strategy=strategy,
        options=options,
        file=tmp_path / "records.csv",
        guarantee=guarantee,
        clients=clients,
        rounds=rounds,
        model=model or tiny.folder(),
    )


@dataclass
class Played:
    """What a cell left."""

    cell: Cell
    grid: LocalGrid
    run_log: RunLog
    out: Path
    states: list[Any] = field(default_factory=list)

    def requests(self, kind: type[Request[Any]]) -> list[Any]:
        """All orders of a class, in the order in which they were sent."""
        messages = self.grid.requests_of(kind.task)
        return [decode(part["fedsynth"]["payload"], kind) for m in messages for part in parted(m.content)]

    def replies(self, kind: type[Request[Any]]) -> list[Any]:
        """The replies to them."""
        pairs = zip(self.grid.requests, self.grid.replies_in_order(), strict=True)
        answered = [pair for pair in pairs if pair[0].metadata.message_type == kind.task and not pair[1].has_error()]
        found = [(request.content, reply.content) for request, reply in answered]
        parts = [pair for request, reply in found for pair in zip(parted(request), parted(reply), strict=True)]
        parts.sort(key=lambda pair: (pair[0]["fedsynth"]["exchange"], pair[0]["fedsynth"]["client"]))
        said = [reply["fedsynth"] for _, reply in parts]
        return [decode(part["payload"], Refused if part["refused"] else kind.reply) for part in said]

    def metric(self, name: str) -> list[float]:
        """A metric's values, in the order in which they were noted."""
        return [value for _, _, _, _, metric, value in self.run_log.rows if metric == name]

    def client(self, index: int) -> ClientSide:
        """A client's house as it was left."""
        return simulated_client(self.cell, index, private_of(self.out), "simulated")


def play(
    toml: str,
    tmp_path: Path,
    arm: str = "main",
    *,
    seed: int = 0,
    llm: Any = None,
    professional: Any = None,
    spoil: Callable[[Message], Message | None] = lambda _: None,
    nodes: int | None = None,
    run: str = "simulated",
    measures: bool = True,
) -> Played:
    """Runs all rounds of one cell, on as many nodes as clients unless told otherwise."""
    whole = to_toml(from_toml(toml))
    cell = cell_of(whole, arm, seed)
    out = tmp_path / "run"
    out.mkdir(exist_ok=True, parents=True)
    data = cell.scenario.data
    ids, labels = 1 if data.pooled else data.clients, label_list(data)
    grid = LocalGrid(client_app(simulation), nodes or ids, {"scenario-toml": whole, "out-dir": str(out)}, spoil=spoil)
    run_log = RunLog(cell, out, out / "events.jsonl")
    llm = CachedLLM(llm or ScriptedLLM(), "llm", run_log)
    professional = llm if professional is None else CachedLLM(professional, "professional", run_log)

    def open_clients(grid: Any) -> Clients:
        return Clients(grid, nodes_by_client(grid, ids, stack=cell.scenario.stack), cell, run, labels, run_log)

    kind, config = load_strategy(cell.scenario.strategy)
    strategy: Any = kind(config, ServerSide(cell, labels, llm, professional, embed, run_log, open_clients, measures))
    played, one_round = Played(cell, grid, run_log, out), strategy.round

    def remembered(clients: Clients, state: Any) -> Any:
        played.states.append(one_round(clients, state))
        return played.states[-1]

    strategy.round = remembered
    strategy.start(grid, ArrayRecord(), num_rounds=cell.scenario.rounds)
    run_log.close()
    return played
