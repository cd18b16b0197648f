"""The fakes for a strategy's unit test: what they answer, and the faults of a strategy that they find."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from fedsynth.corpus import Corpus, Provenance, Scores, pool
from fedsynth.federation.messages import Adopt, Evaluate, Finetune, Learn, Score, Synthesize, Vote
from fedsynth.federation.nodes import TooFewReplies
from fedsynth.federation.records import WillNotLeave
from fedsynth.federation.strategy import Clients, RoundStrategy
from fedsynth.federation.validation import Rejected
from fedsynth.lora import Adapter
from fedsynth.models.sampling import SamplingParams
from fedsynth.testing import ScriptedClients, ScriptedLLM, play
from fedsynth.typed import BadValue

LABELS = ("fever", "cough")
DRAFTS = {
    client: Corpus((f"hot {client}", f"dry {client}"), LABELS, Provenance.DP_SYNTHETIC, grants=(f"g{client}",))
    for client in (0, 1)
}


@dataclass(frozen=True)
class Config:
    per_label: int = 1
    fault: str = ""  # a mutant's


@dataclass(frozen=True)
class State:
    round: int = 0
    corpus: Corpus | None = None


class Shared(RoundStrategy[State]):
    """Everybody learns what the LLM writes after everybody's drafts; a mutant has one fault of `Config.fault`."""

    config_class = Config

    def initial(self) -> State:
        return State()

    def round(self, clients: Clients, state: State) -> State:
        fault = self.config.fault
        request = Synthesize(self.config.per_label, 1.0, 1.0, 8, seed=self.seed("synthesize"))
        drafts = pool([reply.corpus for reply in clients.ask(request).values()])
        written = self.server.llm.complete(drafts.prompts, SamplingParams.greedy(8), seed=self.seed("write"))
        grants, kind = drafts.grants, Provenance.LLM_WRITTEN
        if fault == "private":
            grants, kind = (), Provenance.PRIVATE
        corpus = Corpus(tuple(written), drafts.answers, kind, grants)
        if fault == "label":
            corpus = replace(corpus, answers=("gout",) * len(corpus))
        if fault == "self":
            self.seen = getattr(self, "seen", 0) + 1
            if state.round + 1 != self.seen:
                raise RuntimeError("what was kept in self is gone")
        self.server.run_log.log_metric(-1, "texts/written", len(corpus))
        self.server.run_log.log_corpus(-1, "written", corpus)
        clients.ask(Learn(self.seed("learn"), corpus))
        return State(state.round + 1, corpus)


def played(fault: str = "", rounds: int = 1, **more: Any) -> Any:
    clients = ScriptedClients({Synthesize: lambda client, _: DRAFTS[client]}, **more)
    llm = ScriptedLLM(lambda prompt: f"{prompt} again")
    found = play(Shared, clients, labels=LABELS, options={"fault": fault}, llm=llm, rounds=rounds)
    return found, clients, llm


def test_a_round_is_played_with_the_answers_of_the_test() -> None:
    found, clients, llm = played()
    assert found.state.corpus.prompts == ("hot 0 again", "dry 0 again", "hot 1 again", "dry 1 again")
    assert found.state.corpus.grants == ("g0", "g1")
    assert llm.completed == [["hot 0", "dry 0", "hot 1", "dry 1"]]
    assert found.metric("texts/written") == {-1: 4.0}
    assert found.corpora[-1, "written"] == found.state.corpus
    assert {client: request.corpus for client, request in clients.requests(Learn).items()} == dict.fromkeys(
        (0, 1), found.state.corpus
    )


def test_each_round_has_its_own_seeds() -> None:
    found, clients, llm = played(rounds=2)
    assert [state.round for state in found.states] == [1, 2]
    seeds = [request.seed for client, request in clients.asked if isinstance(request, Learn) and client == 0]
    assert len(set(seeds)) == 2
    assert len({seed for _, seed in llm.settings}) == 2
    again = played(rounds=2)[1]
    assert [request for _, request in again.asked] == [request for _, request in clients.asked]


def test_a_client_that_is_away_has_no_reply() -> None:
    found, clients, _ = played(away=[1])
    assert found.state.corpus.grants == ("g0",)
    assert clients.requests(Synthesize).keys() == {0, 1}
    with pytest.raises(TooFewReplies, match="0 of 2 clients"):
        played(away=[0, 1])


@pytest.mark.parametrize(
    ("fault", "raised", "words"),
    [("private", WillNotLeave, "private text"), ("label", Rejected, "label"), ("self", RuntimeError, "is gone")],
)
def test_a_fault_of_a_strategy_is_found(fault: str, raised: type[Exception], words: str) -> None:
    with pytest.raises(raised, match=words):
        played(fault, rounds=2)


@dataclass(frozen=True)
class Lossy:
    found: Any = field(default=())  # comes back as a list


class Forgets(Shared):
    def round(self, clients: Clients, state: Any) -> Any:
        return Lossy((1, 2))


def test_a_state_that_cannot_be_stored_is_found() -> None:
    with pytest.raises(BadValue, match="does not come back as it is"):
        play(Forgets, ScriptedClients(), labels=LABELS)


def test_options_and_tasks_are_checked_as_before_a_run() -> None:
    with pytest.raises(BadValue, match="per_lable"):
        play(Shared, ScriptedClients(), labels=LABELS, options={"per_lable": 2})
    with pytest.raises(BadValue, match=r"data\.task"):
        play(Shared, ScriptedClients())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (replace(DRAFTS[0], provenance=Provenance.PRIVATE, grants=()), "private text"),
        (replace(DRAFTS[0], grants=()), "names no grant"),
        (replace(DRAFTS[0], provenance=Provenance.PUBLIC, grants=()), "marked public"),
        (replace(DRAFTS[0], answers=("fever", "fever")), "number of texts of one label"),
        (["hot"], "list is no answer to Synthesize"),
    ],
)
def test_an_answer_that_no_client_could_give_is_refused(answer: Any, words: str) -> None:
    with pytest.raises((WillNotLeave, Rejected, ValueError), match=words):
        play(Shared, ScriptedClients({Synthesize: answer}), labels=LABELS)


def test_a_request_without_an_answer_names_those_that_have_one() -> None:
    with pytest.raises(ValueError, match="asked to Synthesize, and the test has answers of Score"):
        play(Shared, ScriptedClients({Score: [1.0]}), labels=LABELS)


def test_scores_and_votes_are_numbers_in_the_order_of_the_texts() -> None:
    texts = Corpus(("a", "bcd"), LABELS, Provenance.PUBLIC)
    lengths = lambda client, request: [client + len(text) for text in request.corpus.prompts]  # noqa: E731 - a script
    clients = ScriptedClients({Score: lengths, Vote: lengths}, labels=LABELS)
    assert clients.ask(Score(texts, 1))[1].scores == Scores((2.0, 4.0), ("grant-1",))
    added = clients.summed(Vote(texts), (0, 1))
    assert (added.values, added.grants) == ((3.0, 7.0), ("grant-0", "grant-1"))
    with pytest.raises(Rejected, match="number of scores"):
        ScriptedClients({Score: [1.0]}, labels=LABELS).ask(Score(texts, 1))


def test_adapters_and_figures_come_back_as_they_are() -> None:
    names = ("m.lora_A.weight", "m.lora_B.weight")
    start = Adapter(
        {names[0]: np.ones((1, 2), np.float32), names[1]: np.zeros((3, 1), np.float32)},
        base="a model",
        rank=1,
        alpha=1.0,
    )
    trained = replace(start, grants=("g",))
    figures = {"accuracy": 0.5, "macro_f1": 0.25}
    clients = ScriptedClients({Finetune: trained, Evaluate: figures}, labels=LABELS)
    reply = clients.ask(Finetune(start, 3))[0]
    assert all(np.array_equal(reply.adapter.arrays[name], start.arrays[name]) for name in names)
    assert reply.statement.guarantee == "dp"
    assert clients.ask(Adopt(start))[1].parameters == 5
    assert clients.ask(Evaluate())[1].metrics == figures


def test_an_llm_fails_where_a_real_one_would() -> None:
    short = ScriptedLLM(context=10)
    assert short.complete(["four"], SamplingParams.greedy(6), seed=0) == [" a text"]
    with pytest.raises(ValueError, match="context = 10"):
        short.complete(["fives"], SamplingParams.greedy(6), seed=0)
    with pytest.raises(ValueError, match="context = 10"):
        short.score(["12345"], ["123456"])


def test_a_played_round_starts_no_ray_and_loads_no_model() -> None:
    code = (
        "import sys; from test_testing import played; played()\n"
        "assert not {'ray', 'transformers.models.llama'} & set(sys.modules), 'a model or Ray was loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.rpartition("/")[0])
