"""Averages of LoRA adapters: the baselines of the instruction methods.

FedIT (arXiv 2305.05644) is FedAvg on both factors; FFA-LoRA (arXiv 2403.12313) trains and averages B alone, which is
exact and has no product of two noises under DP; FLoRA (arXiv 2409.05976) averages the products, here truncated to the
clients' rank. With a budget FedIT is DP-FedAvg-LoRA: each client runs its own DP-SGD and need not trust the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fedsynth.federation.messages import Adopt, Finetune, Finetuned
from fedsynth.federation.run.log import SERVER, RunLog
from fedsynth.federation.strategy import Clients, RoundStrategy
from fedsynth.lora import Adapter, average, completed, median, only_b, stacked, trimmed_mean, truncated

Aggregation = Literal["factors", "frozen_a", "product", "median", "trimmed"]
TRIMMED = 0.2  # of the clients at each end: bears two hostile ones of ten


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        aggregation: `factors`: mean of A and mean of B (FedIT). `frozen_a`: B alone (FFA-LoRA). `product`: the mean of
            the products, truncated by SVD to the clients' rank; the metric `aggregation/error` is the loss. `median`,
            `trimmed`: of each number of A and B, the median, or the mean without the highest and lowest fifth of the
            clients. These bear a hostile minority; clients count alike there, whatever number of records they state.
    """

    aggregation: Aggregation = "factors"


@dataclass(frozen=True)
class State:
    """Completed rounds and the global adapter."""

    round: int = 0
    adapter: Adapter | None = None


class LoraAverage(RoundStrategy[State]):
    """FedIT, FFA-LoRA or a form of FLoRA, by `aggregation`."""

    config_class = Config
    tasks = ("instructions",)
    config: Config

    def initial(self) -> State:
        """No adapter yet."""
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """Sends the global adapter, lets clients train it, averages their adapters."""
        start = state.adapter or self.server.new_adapter(self.seed("adapter"))
        frozen_a = self.config.aggregation == "frozen_a"
        replies = clients.ask_each(
            {client: Finetune(start, self.seed("train", client), frozen_a) for client in clients.ids}
        )
        adapter = aggregate(replies, start, self.config.aggregation, self.server.run_log)
        self.server.run_log.log_adapter(SERVER, adapter, "global")
        clients.ask(Adopt(adapter))
        return replace(state, round=state.round + 1, adapter=adapter)


def aggregate(replies: Mapping[int, Finetuned], start: Adapter, aggregation: Aggregation, run_log: RunLog) -> Adapter:
    """The mean of the clients' adapters, weighted by their records, or what stands for it; logs each of them as well.

    Args:
        replies: By client; their requests had `frozen_a` if that is the aggregation.
        start: The adapter that all clients trained from.
        aggregation: See `Config`.
        run_log: Gets the clients' adapters and the error.
    """
    sent = {client: completed(reply.adapter, start) for client, reply in replies.items()}
    for client, adapter in sent.items():
        run_log.log_adapter(client, adapter)
    adapters = list(sent.values())
    weights = [float(reply.records) for reply in replies.values()]
    if aggregation == "frozen_a":
        return completed(average(adapters, weights, only_b), start)
    if aggregation == "factors":
        return average(adapters, weights)
    if aggregation == "median":
        return median(adapters)
    if aggregation == "trimmed":
        return trimmed_mean(adapters, TRIMMED)
    short = truncated(stacked(adapters, weights), start.rank, start.alpha)
    run_log.log_metric(SERVER, "aggregation/error", short.error)
    return short.adapter
