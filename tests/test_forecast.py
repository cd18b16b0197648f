"""What `fedsynth check` foresees is what a run then does; what is wrong or will not fit is said before."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import tiny
from inprocess import canary, instructions, play

import fedsynth.cli.main
import fedsynth.forecast.check
import fedsynth.forecast.estimating
import fedsynth.forecast.profiling
import fedsynth.forecast.rehearsal
import fedsynth.forecast.work
import fedsynth.training.engine
from fedsynth.clients.client_side import cell_of
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import open_sites
from fedsynth.federation.messages import Adopt, Finetune, Learn, Learnt, Request
from fedsynth.federation.strategy import Clients, RoundStrategy
from fedsynth.forecast.check import EXCHANGE, MESSAGE, Workers, forecast
from fedsynth.forecast.estimating import SampledLLM, Tally
from fedsynth.forecast.profiling import (
    Cost,
    Probed,
    Unit,
    dummy_site,
    forget_peak,
    measured,
    peak_memory,
    typical_lengths,
)
from fedsynth.forecast.rehearsal import Exchange, Rehearsed, rehearse
from fedsynth.models.encoding import token_ids
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.client import Tuning
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.scenario.toml import from_toml, to_toml
from fedsynth.synthesis.student import taught, write

AVERAGE = "fedsynth.strategies.lora_avg:LoraAverage"
FEDPIT = "fedsynth.strategies.fedpit:FedPIT"


def scenario(tmp_path: Path, strategy: str = AVERAGE, **more: Any) -> str:
    """As `instructions`, with an LLM that can be loaded."""
    return instructions(tmp_path, strategy, **more).replace('llm = "scripted"', f'llm = "{tiny.folder()}"')


def cell(toml: str) -> Cell:
    return cell_of(to_toml(from_toml(toml)), "main", 0)


def rehearsed(toml: str, place: Path) -> Rehearsed:
    return rehearse(cell(toml), place, typical_lengths(cell(toml)), {})


@dataclass(frozen=True)
class Nothing:
    """No options."""


@dataclass(frozen=True)
class Strange(Request[Learnt]):
    """A request that this package does not know."""

    task: ClassVar[str] = "train.strange"
    reply: ClassVar[type[Any]] = Learnt


class Asks(RoundStrategy[Nothing]):
    """A strategy of somebody else's; `requests` says what it asks for."""

    config_class = Nothing
    tasks = ("instructions",)

    def initial(self) -> Nothing:
        return Nothing()

    def round(self, clients: Clients, state: Nothing) -> Nothing:
        for request in self.requests():
            clients.ask(request)
        return state

    def requests(self) -> list[Request[Any]]:
        return [Learn(seed=1), Strange()]


class Twice(Asks):
    """Private text is trained on twice in a round: more than is planned."""

    def requests(self) -> list[Request[Any]]:
        start = self.server.new_adapter(1)
        return [Finetune(start, 1), Finetune(start, 2)]


class Makes(Asks):
    """Everything is done by a model that the strategy makes itself: it writes, scores and learns."""

    def round(self, clients: Clients, state: Nothing) -> Nothing:
        engine, start = self.server.engine, self.server.new_adapter(1)
        write(engine, tiny.folder(), start, 40, SamplingParams(temperature=1.0, max_new_tokens=8), seed=0)
        llm = engine.load(tiny.folder(), start)
        assert len(llm.score(["a"] * 40, [f"{chr(98 + n)}" for n in range(4)] * 10)) == 40
        pairs = Corpus(("ab",) * 40, ("cd",) * 40, Provenance.PUBLIC)
        taught(engine, tiny.folder(), start, pairs, Tuning(epochs=3, batch=4), loss_on="response", seed=0)
        return state


@pytest.mark.parametrize(
    ("strategy", "guarantee", "options"),
    [
        (AVERAGE, "dp", ""),
        (AVERAGE, "dp", 'aggregation = "frozen_a"'),
        (AVERAGE, "none", ""),
        (FEDPIT, "none", "shots = 1\ncandidates = 4\nkeep = 2\nmax_new_tokens = 4"),
    ],
)
def test_bytes_and_epsilon_are_those_of_the_run(tmp_path: Path, strategy: str, guarantee: str, options: str) -> None:
    model = tiny.folder()
    toml = scenario(tmp_path, strategy, guarantee=guarantee, options=options, rounds=2, rows=24, model=model)
    if strategy == FEDPIT:
        toml = toml.replace("max_length = 96", "max_length = 48")
    ran = play(toml, tmp_path / "ran")
    found = rehearsed(toml, tmp_path / "rehearsed")
    sent = {d: sum(n for (name, _), n in ran.run_log.totals.items() if name == f"bytes/{d}") for d in ("up", "down")}
    assert found.noted == ()
    assert found.up == pytest.approx(sent["up"], rel=0.02)
    assert found.down == pytest.approx(sent["down"], rel=0.02)
    epsilons = [said.epsilon for said in ran.run_log.spending.values()]
    assert found.epsilon == (None if guarantee == "none" else max(e for e in epsilons if e is not None))
    assert [e.name for e in found.exchanges] == [*[e.name for e in found.exchanges[:3]]] * 2


@pytest.mark.full
def test_drafts_and_what_is_written_from_them_weigh_what_they_weigh_in_the_run(tmp_path: Path) -> None:
    toml = """
name = "tiny"
[strategy]
use = "fedsynth.strategies.fdkt:FDKT"
per_label = 6
num_texts = 24
[data]
source = "world:hospitals"
clients = 2
train_per_client = 60
test_per_client = 20
[client]
generator = "assets:tiny-slm"
task_model = "assets:tiny-slm"
budget = { epsilon = 8.0 }
generator_training = { expected_batch_size = 10, steps = 3 }
task_training = { augmented_epochs = 1, private_epochs = 1 }
[server]
llm = "assets:tiny-llm"
[arms.main]
"""
    llm = LocalLLM.load("assets:tiny-llm")
    ran = play(toml, tmp_path / "ran", llm=llm)
    found = rehearsed(toml, tmp_path / "rehearsed")
    sent = {d: sum(n for (name, _), n in ran.run_log.totals.items() if name == f"bytes/{d}") for d in ("up", "down")}
    assert found.up == pytest.approx(sent["up"], rel=0.3)
    assert found.down == pytest.approx(sent["down"], rel=0.3)
    assert found.epsilon == max(said.epsilon or 0 for said in ran.run_log.spending.values())
    [synthesis, learning, _] = found.exchanges
    assert synthesis.work[0][Unit("step", "main")] == 3
    assert sum(n for unit, n in synthesis.work[0].items() if unit.kind == "sample") == 6 * 8
    assert learning.work[0][Unit("fit", "main")] == pytest.approx(60 + 24, abs=5)  # some may be dropped
    assert found.written > 0
    assert found.read > found.written


def test_of_a_model_that_a_strategy_makes_itself_a_sample_is_asked_and_all_of_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: dict[str, list[int]] = {"complete": [], "score": [], "descend": []}

    def noted(name: str, real: Any) -> Any:
        return lambda model, things, *more, **how: done[name].append(len(things)) or real(model, things, *more, **how)

    monkeypatch.setattr(fedsynth.forecast.estimating, "WHOLE", 0.0)  # the smallest sample
    monkeypatch.setattr(LocalLLM, "complete", noted("complete", LocalLLM.complete))
    monkeypatch.setattr(LocalLLM, "score", noted("score", LocalLLM.score))
    real = fedsynth.training.engine.descend
    steps = lambda asked: done["descend"].append(len(asked.rows)) or real(asked)  # noqa: E731 - as `noted`, of one value
    monkeypatch.setattr(fedsynth.training.engine, "descend", steps)
    found = rehearsed(scenario(tmp_path, "test_forecast:Makes", model=tiny.folder()), tmp_path / "rehearsed")
    assert found.noted == ()
    assert done == {"complete": [1, 4, 16], "score": [1], "descend": [4]}  # one token and two samples, a pair, a step
    assert found.read == 40 * len("<question:") + 40 * len("<ab")
    assert found.written > 0


def test_no_record_of_a_client_stands_in_what_is_made_up(tmp_path: Path) -> None:
    toml = scenario(tmp_path)
    whole = cell(toml)
    private = open_sites(whole.scenario.data, 0)
    site = dummy_site(whole, 0, typical_lengths(whole), train=40, test=10)
    made = " ".join((*site.train.prompts, *site.train.answers, *site.test.prompts))
    assert canary(0) in " ".join(p for s in private for p in s.train.prompts + s.test.prompts)
    assert not any(canary(row) in made for row in range(72))


def test_rounds_that_are_not_gone_through_count_as_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = scenario(tmp_path, rounds=6)
    all_of_them = rehearsed(toml, tmp_path / "all")
    monkeypatch.setattr(fedsynth.forecast.rehearsal, "ENOUGH", 0.0)
    some = rehearsed(toml, tmp_path / "some")
    assert some.noted == ("rounds 3 to 6 are taken to be as round 2",)
    assert [e.name for e in some.exchanges] == [e.name for e in all_of_them.exchanges]
    assert (some.up, some.epsilon) == (all_of_them.up, all_of_them.epsilon)
    assert some.down == pytest.approx(all_of_them.down, rel=1e-3)  # seeds differ in their digits


def test_a_request_of_somebody_elses_is_told_and_what_came_before_it_counts(tmp_path: Path) -> None:
    found = rehearsed(scenario(tmp_path, "test_forecast:Asks"), tmp_path / "rehearsed")
    assert [e.name for e in found.exchanges] == ["learn"]
    assert found.noted == (
        "what clients do for the request Strange is not known here: what comes after it is left out",
    )


class Fails(Asks):
    """Divides by the number of no replies."""

    def round(self, clients: Clients, state: Nothing) -> Nothing:
        super().round(clients, state)
        _mean([])
        return state

    def requests(self) -> list[Request[Any]]:
        return [Learn(seed=1)]


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def test_an_error_of_a_method_ends_the_check_with_its_type_and_the_methods_own_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "tiny.toml"
    place.write_text(scenario(tmp_path, "test_forecast:Fails"))
    monkeypatch.setattr(fedsynth.forecast.check, "probe", lambda *_: Probed(EveryUnit(), 0.0, 1.0, 1))
    assert typed(monkeypatch, str(place), "--json") == 1
    at = Path(__file__).read_text().splitlines().index("    return sum(numbers) / len(numbers)") + 1
    said = capfd.readouterr()
    told = " ".join(said.err.split())
    assert json.loads(said.out)["warnings"][0].startswith("arm 'main' would fail: ZeroDivisionError")
    assert "error: arm 'main' would fail: ZeroDivisionError: division by zero" in told
    assert f"{Path(__file__).name}, line {at}, in _mean)" in told


class EveryUnit(dict[Unit, Cost]):
    """No work takes time."""

    def __missing__(self, _: Unit) -> Cost:
        return Cost(0.0, 0.0)


def test_a_draft_is_rehearsed_no_longer_than_a_generator_may_write(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("assets:tiny-slm")
    texts = ["the patient came at night and went home in the morning " * 3, "short"]
    cut = fedsynth.forecast.rehearsal._no_longer("assets:tiny-slm", texts, 12)
    assert len(token_ids(tokenizer, texts[0])) > 12
    assert len(token_ids(tokenizer, cut[0])) <= 12
    assert texts[0].startswith(cut[0])
    assert cut[1] == "short"


@pytest.mark.parametrize("spread", [0, 1, 30])
def test_the_tokens_of_many_prompts_follow_from_those_of_a_sample(spread: int) -> None:
    texts = ["ab " * (10 + n % (spread + 1)) + "c" * (n % 3) for n in range(3000)]
    asked: list[int] = []

    def tokens(some: list[str]) -> list[int]:
        asked.append(len(some))
        return [len(text.split()) for text in some]

    found = fedsynth.forecast.estimating._counted(texts, len, tokens)
    assert asked == [fedsynth.forecast.estimating.COUNTED]
    assert sum(found) == pytest.approx(sum(tokens(texts)), rel=0.02)


def test_of_many_prompts_the_longest_show_whether_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    llm = LocalLLM.load(tiny.folder())
    context = llm.context or 0
    real = LocalLLM.misfits
    noted = lambda own, prompts, *more: asked.append(len(prompts)) or real(own, prompts, *more)  # noqa: E731 - of one value
    monkeypatch.setattr(LocalLLM, "misfits", noted)
    sampled = SampledLLM(llm, Tally(frozenset()))
    fitting = [chr(97 + n % 26) * 3 for n in range(999)]
    assert sampled.misfits(fitting) == [None] * 999
    assert asked == [fedsynth.forecast.estimating.COUNTED]
    assert sampled.misfits([*fitting, "a" * (context + 1)]) == [None] * 999 + ["too long"]


# ---- What is added up ------------------------------------------------------------------------------------------------


def test_an_exchange_takes_as_long_as_the_worker_that_is_done_last() -> None:
    unit = Unit("fit", "main")
    exchange = Exchange(1, "learn", {client: {unit: 2.0} for client in range(3)}, 0, 0)
    pool = Workers(count=2, nodes=3)
    costs = {unit: Cost(first=5.0, each=4.0)}
    # Two messages of three go to one worker: 8 seconds each, and 5 once.
    assert pool.take(exchange, costs, 1) == pytest.approx(EXCHANGE + 2 * (MESSAGE + 8.0) + 5.0)
    assert pool.take(exchange, costs, 1) == pytest.approx(EXCHANGE + 2 * (MESSAGE + 8.0))  # both know it by now


def constant(each: float, memory: int) -> Any:
    """A probe that measures nothing."""

    def probe(_: Any, units: Mapping[Unit, int], *__: Any) -> Probed:
        return Probed(dict.fromkeys(units, Cost(0.0, each)), imported=1.0, waiting=1.0, memory=memory)

    return probe


def test_seeds_multiply_all_but_epsilon_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsynth.forecast.check, "probe", constant(10.0, 10**8))  # beside which nothing else counts
    asked = from_toml(scenario(tmp_path))
    once = forecast(asked, workers=1, tell=lambda _: None)
    twice = forecast(replace(asked, seeds=(0, 1)), workers=1, tell=lambda _: None)
    assert twice.arms["main"].up == 2 * once.arms["main"].up
    assert twice.arms["main"].epsilon == once.arms["main"].epsilon
    assert twice.worker == once.worker == 10**8
    assert twice.arms["main"].seconds == pytest.approx(2 * once.arms["main"].seconds, rel=0.1)


def test_what_will_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsynth.forecast.check, "probe", constant(1e5, 10**15))
    made = forecast(from_toml(scenario(tmp_path)), workers=2, tell=lambda _: None)
    said = " ".join(made.warnings)
    assert "will not fit: 2 workers and what drives them need 2000" in said
    assert "days: ask for fewer" in said
    assert made.memory == 2 * 10**15 + made.driver
    assert made.to_dict()["memory"]["workers"] == 2 * 10**15


def test_what_fits_has_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsynth.forecast.check, "probe", constant(1e-4, 10**6))
    made = forecast(from_toml(scenario(tmp_path)), workers=1, tell=lambda _: None)
    assert made.memory < psutil.virtual_memory().total
    assert [line for line in made.warnings if "label" not in line and "others use the cores" not in line] == []


def test_what_the_check_took_is_not_counted_for_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = 10**10  # a pass of a generator's training, given back before the rounds are rehearsed

    def checked(asked: Scenario) -> list[str]:
        peak[0] = large
        return []

    peak = [10**8]
    monkeypatch.setattr(fedsynth.forecast.check, "probe", constant(1e-4, 10**6))
    monkeypatch.setattr(fedsynth.forecast.check, "check", checked)
    monkeypatch.setattr(fedsynth.forecast.check, "forget_peak", lambda: peak.__setitem__(0, 10**8))
    monkeypatch.setattr(fedsynth.forecast.check, "peak_memory", lambda: peak[0])
    assert forecast(from_toml(scenario(tmp_path)), workers=1, tell=lambda _: None).driver < large


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_a_peak_is_forgotten() -> None:
    held = np.ones(50_000_000)
    high = peak_memory()
    del held
    forget_peak()
    assert peak_memory() < high - 300_000_000


def test_a_text_is_measured_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over the weights serves a whole batch: one text alone would foresee as many passes as texts."""
    whole = cell(scenario(tmp_path))
    monkeypatch.setattr(fedsynth.forecast.profiling, "_seconds", lambda work, count: 2.0 + 0.01 * count)
    written = measured(whole, Unit("respond", "main", tokens=4), 12, typical_lengths(whole))
    assert written.each * 12 == pytest.approx(2.12)
    assert measured(whole, Unit("rate", "main"), 12, typical_lengths(whole)).each == pytest.approx(2.01)


def test_a_method_that_asks_for_more_than_is_planned_is_told_that_clients_will_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedsynth.forecast.check, "probe", constant(1e-4, 10**6))
    made = forecast(from_toml(scenario(tmp_path, "test_forecast:Twice")), workers=1, tell=lambda _: None)
    [line] = [line for line in made.warnings if "refuse" in line]
    assert "its budget is 8" in line


# ---- What is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plan", "step", "own_step", "respond", "rate", "choose", "demonstrated"])
def test_each_kind_of_work_is_measured_by_doing_it(tmp_path: Path, kind: Any) -> None:
    whole = cell(scenario(tmp_path))
    found = measured(whole, Unit(kind, "main", tokens=4, shots=1), 2, typical_lengths(whole))
    assert found.each > 0 or kind == "plan"
    assert found.first >= 0


def test_clients_that_train_together_share_the_cost_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cell(scenario(tmp_path, clients=4, rows=40))
    four = replace(whole, scenario=replace(whole.scenario, client=replace(whole.scenario.client, stacked=4)))
    monkeypatch.setattr(fedsynth.forecast.profiling, "_seconds", lambda work, count: [work(count), 8.0 * count][1])
    unit = Unit("step", "main")
    assert measured(whole, unit, 2, typical_lengths(whole)).each == 8.0
    assert measured(four, unit, 2, typical_lengths(whole)).each == 2.0


@pytest.mark.parametrize("kind", ["fit", "read", "sample", "scorer_step"])
def test_each_kind_of_work_of_a_classification_is_measured_by_doing_it(kind: Any) -> None:
    from fedsynth.scenario.toml import cells, load

    [whole] = cells(load("hospitals", ["seeds=[0]", 'run=["fdkt"]', "client.scorer_training.expected_batch_size=8"]))
    assert measured(whole, Unit(kind, "fdkt", tokens=4, temperature=1.0), 2, ()).each > 0


# ---- The command -----------------------------------------------------------------------------------------------------


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The exit code of the command, in this process: imports of seconds are paid once."""
    monkeypatch.setattr(sys, "argv", ["fedsynth", "check", *words])
    with pytest.raises(SystemExit) as ended:
        fedsynth.cli.main.main()
    return ended.value.code


def test_a_bad_scenario_is_refused_with_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "bad.toml"
    place.write_text(scenario(tmp_path).replace("epsilon = 8.0", "epsilon = 0.001"))
    assert typed(monkeypatch, str(place)) == 2
    assert "needs noise_multiplier" in capfd.readouterr().err.splitlines()[-1]


def test_json_is_the_last_line_and_has_the_promised_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "tiny.toml"
    place.write_text(scenario(tmp_path))
    assert typed(monkeypatch, str(place), "--workers", "1", "--json") == 0
    said = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(said) == {"scenario", "workers", "arms", "seconds", "seconds_alone", "memory", "warnings"}
    assert set(said["arms"]["main"]) == {"epsilon", "delta", "guarantee", "bytes", "llm_tokens", "seconds"}
    assert set(said["memory"]) == {"worker", "workers", "driver", "total"}
    assert said["workers"] == 1
    assert 0 < said["seconds_alone"] <= said["seconds"]
    assert said["memory"]["total"] == said["memory"]["workers"] + said["memory"]["driver"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["records.csv", "tiny.toml"]  # nothing is left behind


def test_every_request_of_this_package_is_foreseen() -> None:
    from fedsynth.federation.messages import REQUESTS

    assert set(REQUESTS) == set(fedsynth.forecast.work.WORK)
    assert Adopt in fedsynth.forecast.work.WORK
