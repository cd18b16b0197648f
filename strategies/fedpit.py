"""FedPIT: clients write records in context, train on them and on private records apart, and send the mix of adapters.

FedPIT, FewFedPIT and PPFedIT are one method (arXiv 2403.06131; the form here is the journal's, ACM TIST 17(5) 106).
It makes extraction harder and has no formal privacy: no epsilon is ever printed for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Literal

from fedsynth.federation.messages import Adopt, SelfTrain
from fedsynth.federation.run.log import SERVER
from fedsynth.federation.strategy import Clients, RoundStrategy
from fedsynth.limits import MAX_CANDIDATES, MAX_SHOTS, Tokens, most
from fedsynth.lora import Adapter, average
from fedsynth.scenario.schema import Scenario
from fedsynth.strategies import presets
from fedsynth.synthesis.curation import Stage
from fedsynth.typed import BadValue, Count, in_range


@dataclass(frozen=True)
class Config:
    """Options of FedPIT; the defaults are the paper's.

    Attributes:
        share: Beta, the weight in the sent mix of the adapter trained on private text, in 0..1. 1 is FedIT.
        candidates: Number of records that a client asks its model for.
        keep: Number of these records to train on, at most.
        shots: Demonstrations in a prompt, at most.
        selection: `ifs`, or `random` (an ablation).
        training: `isolated`; `mixed`: one training on both (FedMIT, an ablation); `personal`: version 1 of the paper.
        aggregate: The server averages the adapters; else each client continues with its own (LocIT+SG, a control).
        max_new_tokens: Longest instruction or response to write, in tokens.
    """

    share: float = 0.5
    candidates: Annotated[Count, most(MAX_CANDIDATES)] = 32
    keep: Count = 16
    shots: Annotated[Count, most(MAX_SHOTS)] = 8
    selection: Literal["ifs", "random"] = "ifs"
    training: Literal["isolated", "mixed", "personal"] = "isolated"
    aggregate: bool = True
    max_new_tokens: Tokens = 48

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise BadValue(f"strategy.share must lie in 0..1, got {self.share}")
        in_range(self, "strategy")
        if self.keep > self.candidates:
            raise BadValue(f"strategy.keep must be at most the {self.candidates} candidates, got {self.keep}")
        if self.training != "isolated" and self.share != Config.share:
            raise BadValue(f'strategy.share belongs to training = "isolated", not to {self.training!r}')


@dataclass(frozen=True)
class State:
    """Completed rounds, and by client the adapter that it trains from: the global one, if there is an average."""

    round: int = 0
    adapters: Mapping[int, Adapter] = field(default_factory=dict)


class FedPIT(RoundStrategy[State]):
    """Federated instruction tuning in which self-generated records train a separate adapter."""

    config_class = Config
    presets = presets.FEDPIT
    tasks = ("instructions",)
    config: Config

    @classmethod
    def check(cls, config: Config, scenario: Scenario) -> None:
        """Checks also that the scenario asks for no guarantee and that demonstrations fit into the client's model.

        Raises:
            BadValue: If not, with the way out.
        """
        super().check(config, scenario)
        if scenario.client.guarantee != "none":
            raise BadValue(
                "FedPIT has no form with a guarantee: the client's model reads private records as demonstrations, and "
                "what it then writes shapes what is sent, so that DP-SGD on the private half alone would promise what "
                'does not hold. Say client.guarantee = "none"'
            )
        from fedsynth.models.hub import config_of  # these bring torch
        from fedsynth.models.loading import context_of

        context = context_of(config_of(scenario.client.generator))
        longest = scenario.client.generator_training.max_length
        needed = (
            config.shots * (longest + 1) + 2 * config.max_new_tokens + 8
        )  # with the marks of the record that is written
        if context is not None and needed > context:
            raise BadValue(
                f"strategy.shots = {config.shots} records of {longest} tokens and what is written need {needed} "
                f"tokens, the client's model reads {context}: use fewer shots, or a smaller max_new_tokens"
            )

    def initial(self) -> State:
        """No adapter yet."""
        return State()

    def round(self, clients: Clients, state: State) -> State:
        """Sends the global adapter, lets clients write, train and mix, averages their adapters."""
        start = state.adapters or dict.fromkeys(clients.ids, self.server.new_adapter(self.seed("adapter")))
        replies = clients.ask_each({client: self._request(client, adapter) for client, adapter in start.items()})
        for client, reply in replies.items():
            self.server.run_log.log_adapter(client, reply.adapter)
            if stage := _stage(reply.funnel):
                self.server.run_log.log_stage(client, stage)

        adapters = {client: reply.adapter for client, reply in replies.items()}
        if self.config.aggregate:
            mean = average(list(adapters.values()), [float(reply.records) for reply in replies.values()])
            self.server.run_log.log_adapter(SERVER, mean, "global")
            adapters = dict.fromkeys(start, mean)
        if self.config.training != "personal":  # there each client has put its own adapter to use
            clients.ask_each({client: Adopt(adapter) for client, adapter in adapters.items()})
        return replace(state, round=state.round + 1, adapters={**start, **adapters})

    def _request(self, client: int, start: Adapter) -> SelfTrain:
        options = {name: value for name, value in asdict(self.config).items() if name != "aggregate"}
        return SelfTrain(start, self.seed("train", client), self.seed("write", client), **options)


def _stage(funnel: Mapping[str, int]) -> Stage | None:
    """The funnel of a client's candidates; None if it wrote none."""
    if "asked" not in funnel:
        return None
    asked, kept = funnel["asked"], funnel.get("kept", 0)
    dropped = {reason: count for reason, count in funnel.items() if reason not in ("asked", "kept")}
    beyond = asked - kept - sum(dropped.values())
    return Stage("self-generated", asked, kept, {**dropped, "beyond the best": beyond} if beyond > 0 else dropped, ())
