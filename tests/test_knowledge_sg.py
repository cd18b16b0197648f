"""KnowledgeSG in process: the real client app, tiny models, a scripted professional; criteria of its faithfulness."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from flwr.app import Error, Message
from inprocess import Played, canary, instructions, play
from server_alone import record, with_clients, with_recording
from spelled import spelled

from fedsynth.clients.batched_training import together
from fedsynth.clients.finetune import finetune
from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import Adopt, Evaluate, Finetune, Finetuned
from fedsynth.federation.payload import corpus_from_parquet
from fedsynth.federation.records import unpack_request
from fedsynth.federation.run.log import SERVER
from fedsynth.federation.run.privacy_report import guarantee_of, privacy_line, up
from fedsynth.federation.strategy import load_strategy
from fedsynth.federation.validation import Rejected, check_reply
from fedsynth.lora import Adapter, average
from fedsynth.models.llm import LocalLLM
from fedsynth.models.sampling import SamplingParams
from fedsynth.privacy.caps import BudgetExhausted
from fedsynth.privacy.plan import epsilon
from fedsynth.privacy.statement import Statement
from fedsynth.scenario.client import Tuning
from fedsynth.scenario.toml import cells, from_toml, to_toml
from fedsynth.synthesis.student import taught, write
from fedsynth.testing import ScriptedLLM
from fedsynth.training.engine import Engine
from fedsynth.training.examples import encode_records
from fedsynth.typed import BadValue

STRATEGY = "fedsynth.strategies.knowledge_sg:KnowledgeSG"
SMALL = """
num_texts = 40
max_new_tokens = 40
min_words = 1
novelty = 1.0
response_tokens = 8
tuning = { epochs = 1, batch = 8, rank = 3, alpha = 6.0 }
"""


def wordy(folder: Path, seed: int) -> str:
    """A model that has learnt to write records of single letters, such as `question: a d b answer: c`."""

    def records(tokenizer: Any, rng: np.random.Generator) -> list[Any]:
        rows = [" ".join(rng.choice(list("abcd"), 3)) for _ in range(16)]
        corpus = Corpus(tuple(rows), tuple(row[-1] for row in rows), Provenance.PUBLIC)
        return encode_records(tokenizer, corpus, 64)

    return tiny.taught(folder, records, steps=150, rate=1e-2, seed=seed)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The clients' base, and a professional of other weights."""
    return wordy(tmp_path_factory.mktemp("base"), 0), wordy(tmp_path_factory.mktemp("professional"), 1)


@pytest.fixture
def base(models: tuple[str, str]) -> str:
    return models[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models: tuple[str, str]) -> Played:
    """One run of the method as it is, for tests that only look."""
    return played(tmp_path_factory.mktemp("run"), models[0])


def professional(prompt: str) -> str:
    """A response that no DP model writes."""
    return f" PRO {len(prompt)}"


def toml(tmp_path: Path, base: str, options: str = "", *, last: str = "", **more: Any) -> str:
    return instructions(tmp_path, STRATEGY, options=SMALL + options, model=base, **more) + last


def played(tmp_path: Path, base: str, options: str = "", **more: Any) -> Played:
    return play(toml(tmp_path, base, options, **more), tmp_path, professional=ScriptedLLM(answer=professional))


def same(one: Adapter, other: Adapter) -> bool:
    return all(np.array_equal(one.arrays[n], other.arrays[n]) for n in {*one.arrays, *other.arrays})


def journaled(run: Played, kind: str) -> dict[int, tuple[Corpus, dict[str, str]]]:
    """A kind's corpora by owner, with the facts beside them."""
    found = {}
    for path in (run.out / "corpora").rglob(f"{kind}-*.parquet"):
        facts = {k.decode(): v.decode() for k, v in pq.read_schema(path).metadata.items()}
        found[int(path.stem.rpartition("client")[2])] = (corpus_from_parquet(path.read_bytes()), facts)
    return dict(sorted(found.items()))


def records(run: Played, base: str, client: int) -> dict[str, str]:
    """What a client's DP model writes, sampled again from the adapter that it sent: prompt -> first response."""
    seed = run.cell.public_seed("write", round=run.cell.scenario.rounds, client=client)
    adapter = run.replies(Finetune)[-3:][client].adapter
    corpus = write(Engine(), base, adapter, 40, SamplingParams(temperature=0.7, max_new_tokens=40), seed=seed).corpus
    return dict(reversed(list(zip(corpus.prompts, corpus.answers, strict=True))))


# --- The order of the paper, and what crosses (criterion 1) ---


def test_each_client_gets_a_target_made_from_its_own_dp_models_instructions(tmp_path: Path, base: str) -> None:
    run = played(tmp_path, base)
    asked = [type(o).__name__ for kind in (Finetune, Adopt, Evaluate) for o in run.requests(kind)]
    assert asked == ["Finetune"] * 3 + ["Adopt"] * 3 + ["Evaluate"] * 3
    targets = run.states[-1].targets
    assert sorted(targets) == [0, 1, 2]
    assert all(same(request.adapter, targets[client]) for client, request in enumerate(run.requests(Adopt)))
    assert not any(same(targets[client], answer.adapter) for client, answer in enumerate(run.replies(Finetune)))
    assert not same(targets[0], targets[1])
    assert set(run.replies(Evaluate)[0].metrics) >= {"exact_match", "field_match", "rouge_l"}


def test_a_client_sends_an_adapter_its_statement_and_a_count_and_has_no_place_for_text() -> None:
    hints = get_type_hints(Finetuned)
    assert {f.name: hints[f.name] for f in fields(Finetuned)} == {
        "adapter": Adapter,
        "statement": Statement,
        "records": int,
    }
    assert {f.name: f.type for f in fields(Adapter)} == {
        "arrays": "Mapping[str, NDArray[np.float32]]",
        "rank": "int",
        "alpha": "float",
        "base": "str",
        "grants": "tuple[str, ...]",
        "public": "bool",
    }


def test_no_text_of_a_record_crosses_or_reaches_the_professional(tmp_path: Path, base: str) -> None:
    pro = ScriptedLLM(answer=professional)
    run = play(toml(tmp_path, base), tmp_path, professional=pro)
    crossed = b"".join(
        m.content["fedsynth"]["payload"] for m in (*run.grid.requests, *run.grid.replies) if "fedsynth" in m.content
    )
    shown = spelled(pro.completed)
    assert "question:" in shown
    assert not [row for row in range(72) if canary(row).encode() in crossed or canary(row) in shown]
    assert canary(0) in spelled([run.client(i).site for i in range(3)])  # they are there to be found


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: replace(a, base="0" * 64), "base"),
        (lambda a: replace(a, rank=3), "rank"),
        (lambda a: replace(a, arrays={**a.arrays, "notes": np.zeros((1, 1), np.float32)}), "tensors"),
        (lambda a: replace(a, arrays={n: x[:, :1] for n, x in a.arrays.items()}), "tensors"),
    ],
)
def test_the_server_takes_no_adapter_of_another_base_or_with_other_tensors(
    run: Played, change: Callable[[Adapter], Adapter], why: str
) -> None:
    request, answer = run.requests(Finetune)[0], run.replies(Finetune)[0]
    check_reply(request, answer, ())
    with pytest.raises(Rejected, match=why):
        check_reply(request, replace(answer, adapter=change(answer.adapter)), ())


# --- Privacy: all rounds are one schedule (criterion 2) ---


def test_two_rounds_cost_what_one_run_of_all_their_steps_costs(tmp_path: Path, base: str) -> None:
    run = played(tmp_path, base, rounds=2)
    said, client = run.replies(Finetune)[-1].statement, run.client(2)
    plan = client.plan()
    assert (plan.steps, plan.rounds, said.steps) == (3, 2, 6)
    assert said.epsilon == pytest.approx(epsilon(replace(plan, steps=6, rounds=1), 1e-5), abs=1e-6)
    assert said.epsilon <= 8.0
    assert client.ledger.spent()[0] == pytest.approx(said.epsilon, abs=1e-6)
    assert f"({up(said.epsilon, 3):.3f}, 1e-05)-DP per row, all rounds" in privacy_line([run.run_log])


def test_a_round_beyond_the_plan_is_refused_before_a_step_of_it_runs(tmp_path: Path, base: str) -> None:
    run = played(tmp_path, base, rounds=2)
    request = replace(run.requests(Finetune)[-1], seed=7)
    with pytest.raises(BudgetExhausted):
        together([finetune(run.client(2), request, "a third request")])
    assert run.client(2).ledger.spent()[0] <= 8.0


def test_rounds_go_on_from_each_clients_own_adapter_and_the_rest_happens_once(tmp_path: Path, base: str) -> None:
    pro = ScriptedLLM(answer=professional)
    run = play(toml(tmp_path, base, rounds=2), tmp_path, professional=pro)
    first, second = run.requests(Finetune)[:3], run.requests(Finetune)[3:]
    assert all(same(request.start, first[0].start) for request in first)
    assert all(same(second[client].start, run.replies(Finetune)[client].adapter) for client in range(3))
    assert len({request.seed for request in first + second}) == 6
    assert run.states[0].targets == {}
    assert len(run.requests(Adopt)) == 3
    assert len(pro.completed) == 6  # judge and respond, once per client


def test_without_a_guarantee_nothing_claims_one(tmp_path: Path, base: str) -> None:
    run = played(tmp_path, base, guarantee="none")
    assert guarantee_of([run.run_log]) == "none"
    assert "no differential privacy guarantee: adapters left" in privacy_line([run.run_log])
    assert all(corpus.grants == () for corpus, _ in journaled(run, "pairs").values())
    assert all(request.adapter.grants == () for request in run.requests(Adopt))


# --- The server has no way to private text (criterion 3) ---


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, models: tuple[str, str]) -> tuple[Path, str]:
    """A run with real clients and a real professional, by the server's own app; its exchanges are written down."""
    place = tmp_path_factory.mktemp("recorded")
    text = to_toml(from_toml(toml(place, models[0], last=f'server.llm = "{models[1]}"\n')))
    (place / "scenario.toml").write_text(text)
    record(with_clients(text, place / "first", 3), place / "replies")
    return place, text


@pytest.mark.full
def test_the_server_process_opens_no_clients_file(recorded: tuple[Path, str]) -> None:
    place, _ = recorded
    arguments = [str(place / "scenario.toml"), str(place / "replies"), str(place / "audited"), "3"]
    script = [sys.executable, str(Path(__file__).with_name("server_alone.py")), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    opened = json.loads(done.stdout.splitlines()[-1])

    def private(paths: list[str]) -> list[str]:
        return [p for p in paths if p == str(place / "records.csv") or ".private/" in p]

    assert str(place / "replies") in opened["alone"]
    assert any("/alone/corpora/" in path for path in opened["alone"])  # it wrote pairs: the whole method ran
    assert private(opened["alone"]) == []
    assert opened["loaded"] == []
    # The same process with its clients in it: the listener sees their source and their private directory.
    assert str(place / "records.csv") in private(opened["together"])
    assert any("/together.private/" in path for path in opened["together"])


def test_the_targets_are_the_same_when_all_private_text_is_gone(recorded: tuple[Path, str]) -> None:
    place, text = recorded
    first = sorted((place / "first").rglob("*target*/adapter_model.safetensors"))
    assert len(first) == 3
    (place / "records.csv").rename(place / "gone.csv")
    try:
        with_recording(text, place / "again", 3, place / "replies")
    finally:
        (place / "gone.csv").rename(place / "records.csv")
    again = sorted((place / "again").rglob("*target*/adapter_model.safetensors"))
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in first]


# --- Where every pair comes from (criterion 4) ---


def test_every_instruction_is_the_dp_models_and_every_response_the_professionals(run: Played, base: str) -> None:
    kept = journaled(run, "pairs")
    assert sorted(kept) == [0, 1, 2]
    for client, (pairs, facts) in kept.items():
        wrote = records(run, base, client)
        assert len(pairs) >= 10
        assert set(pairs.prompts) <= set(wrote)
        assert pairs.answers == tuple(professional(f"question: {p} answer:").strip() for p in pairs.prompts)
        assert not set(pairs.answers) & set(wrote.values())
        assert (facts["instructions"], facts["responses"], facts["kind"]) == ("dp", "professional", "pairs")


def test_all_that_is_made_of_an_adapter_carries_its_grants(run: Played) -> None:
    for client, answer in enumerate(run.replies(Finetune)):
        assert len(answer.adapter.grants) == 1
        for kind in ("instructions", "pairs"):
            corpus, _ = journaled(run, kind)[client]
            assert (corpus.provenance, corpus.grants) == (Provenance.LLM_WRITTEN, answer.adapter.grants)
        assert run.requests(Adopt)[client].adapter.grants == answer.adapter.grants


def test_what_the_dp_model_would_have_responded_is_nowhere(run: Played, base: str) -> None:
    for client, (corpus, _) in journaled(run, "instructions").items():
        assert set(corpus.prompts) == set(records(run, base, client))
        assert set(corpus.answers) == {""}


def test_instructions_come_from_the_bare_header_and_each_adapter_writes_its_own(run: Played, base: str) -> None:
    adapters = [a.adapter for a in run.replies(Finetune)]
    seen: list[list[str]] = []

    def complete(self: LocalLLM, prompts: list[str], *_: object, **__: object) -> list[str]:
        seen.append(list(prompts))
        return [""] * len(prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalLLM, "complete", complete)
        write(Engine(), base, adapters[0], 5, SamplingParams(temperature=0.7, max_new_tokens=40), seed=0)
    assert seen == [["question:"] * 5]
    assert records(run, base, 0) != records(run, base, 1)


def test_the_funnel_adds_up(run: Played) -> None:
    steps = ("written", "formed", "novel", "judged", "chosen", "answered")
    for before, after in pairwise(steps):
        assert run.metric(f"yield/{before}/kept") == run.metric(f"yield/{after}/in")
    assert run.metric("yield/written/in") == [40.0] * 3
    assert run.metric("yield/answered/kept") == [float(len(c)) for c, _ in journaled(run, "pairs").values()]


# --- Ablations by flag (criterion 6) ---


def test_own_responses_are_those_of_the_dp_model(tmp_path: Path, base: str) -> None:
    pro = ScriptedLLM(answer=professional)
    run = play(toml(tmp_path, base, 'responses = "own"\njudge = "none"'), tmp_path, professional=pro)
    assert pro.completed == []
    for client, (pairs, facts) in journaled(run, "pairs").items():
        wrote = records(run, base, client)
        assert pairs.answers == tuple(wrote[prompt] for prompt in pairs.prompts)
        assert facts["responses"] == "own"


def test_public_instructions_ask_nothing_of_the_clients_and_spend_nothing(tmp_path: Path, base: str) -> None:
    (tmp_path / "public.csv").write_text("text\n" + "".join(f"public note {i}\n" for i in range(200)))
    source = f'server.public = "{tmp_path / "public.csv"}"\n'
    run = play(
        toml(tmp_path, base, 'instructions = "public"', last=source),
        tmp_path,
        professional=ScriptedLLM(answer=professional),
    )
    assert run.requests(Finetune) == []
    assert len({id(target) for target in run.states[-1].targets.values()}) == 1
    assert len(run.requests(Adopt)) == 3
    [(owner, (pairs, facts))] = journaled(run, "pairs").items()
    assert (owner, facts["instructions"]) == (SERVER, "public")
    assert all(prompt.startswith("public note") for prompt in pairs.prompts)
    assert (pairs.provenance, pairs.grants) == (Provenance.PUBLIC, ())
    assert guarantee_of([run.run_log]) == "dp"
    assert "nothing to spend" in privacy_line([run.run_log])
    assert all(run.client(i).ledger.spent()[0] == 0 for i in range(3))


def test_without_a_judge_the_professional_only_responds(tmp_path: Path, base: str) -> None:
    pro = ScriptedLLM(answer=professional)
    run = play(toml(tmp_path, base, 'judge = "none"'), tmp_path, professional=pro)
    assert (len(pro.completed), pro.scored) == (3, [])
    assert run.metric("yield/judged/in") == run.metric("yield/judged/kept")


def test_the_instruction_judge_decides(tmp_path: Path, base: str) -> None:
    pro = ScriptedLLM(
        answer=lambda p: (
            professional(p) if p.startswith("question:") else f"Verdict: {'drop' if ' a ' in p else 'keep'}"
        )
    )
    run = play(toml(tmp_path, base, 'judge = "instruction"'), tmp_path, professional=pro)
    assert sum(run.metric("yield/judged/dropped/judged not good enough")) > 0
    assert pro.scored == []


def test_the_dp_model_itself_can_be_adopted(tmp_path: Path, base: str) -> None:
    pro = ScriptedLLM(answer=professional)
    run = play(toml(tmp_path, base, 'adopts = "dp"'), tmp_path, professional=pro)
    sent = [answer.adapter for answer in run.replies(Finetune)]
    assert all(same(request.adapter, sent[client]) for client, request in enumerate(run.requests(Adopt)))
    assert pro.completed == []


def test_nothing_can_be_adopted_and_then_nothing_is_asked(tmp_path: Path, base: str) -> None:
    run = played(tmp_path, base, 'adopts = "nothing"')
    assert [m.metadata.message_type for m in run.grid.requests if "fedsynth" in m.content] == [Evaluate.task] * 3
    assert "nothing to spend" in privacy_line([run.run_log])


@pytest.mark.parametrize("aggregation", ["factors", "frozen_a", "product"])
def test_one_average_can_write_for_one_target(tmp_path: Path, base: str, aggregation: str) -> None:
    run = played(tmp_path, base, f'personal = false\naggregation = "{aggregation}"', rounds=2)
    answers = run.replies(Finetune)[3:]
    mean = run.states[-1].adapters[SERVER]
    if aggregation == "factors":
        assert same(mean, average([a.adapter for a in answers], [a.records for a in answers]))
    assert (aggregation == "frozen_a") == all("lora_B" in name for name in answers[0].adapter.arrays)
    assert all(same(request.start, run.states[0].adapters[SERVER]) for request in run.requests(Finetune)[3:])
    assert all(same(request.adapter, run.states[-1].targets[SERVER]) for request in run.requests(Adopt))
    assert list(journaled(run, "pairs")) == [SERVER]
    grants = {g for answer in run.replies(Finetune) for g in answer.adapter.grants}
    assert len(grants) == 6  # of three clients, in two rounds
    assert set(journaled(run, "pairs")[SERVER][0].grants) == set(mean.grants) == grants


def test_the_target_goes_on_from_the_dp_model_or_from_the_base(tmp_path: Path, run: Played, base: str) -> None:
    assert run.requests(Adopt)[0].adapter.rank == 2  # the clients'
    fresh = played(tmp_path, base, 'start_from = "base"')
    assert fresh.requests(Adopt)[0].adapter.rank == 3  # the tuning's
    assert fresh.requests(Adopt)[0].adapter.grants == fresh.replies(Finetune)[0].adapter.grants


def test_the_target_learns_responses_or_records(run: Played, base: str) -> None:
    start, (pairs, _) = run.replies(Finetune)[0].adapter, journaled(run, "pairs")[0]
    found = {}
    for loss_on in ("response", "record"):
        losses = [taught(Engine(), base, start, pairs, Tuning(epochs=e), loss_on=loss_on, seed=0)[1] for e in (1, 12)]
        assert losses[1] < losses[0]
        found[loss_on] = losses[0]
    assert found["response"] > found["record"]  # the base has never seen such responses, but wrote the instructions


def test_a_client_that_gives_no_adapter_keeps_the_base_where_a_quorum_allows(tmp_path: Path, base: str) -> None:
    def spoil(message: Message) -> Message | None:
        if message.metadata.message_type == Finetune.task and unpack_request(message.content, Finetune)[1].client == 1:
            return Message(Error(code=0, reason="gone"), reply_to=message)
        return None

    run = play(
        toml(tmp_path, base, last="server.quorum = 0.6\n"),
        tmp_path,
        professional=ScriptedLLM(answer=professional),
        spoil=spoil,
    )
    assert sorted(run.states[-1].targets) == [0, 2]
    assert len(run.requests(Adopt)) == 2


# --- What is refused before any work ---


def refusal(tmp_path: Path, base: str, options: str = "", last: str = "", **more: Any) -> str:
    scenario = cells(from_toml(toml(tmp_path, base, options, last=last, **more)))[0].scenario
    kind, config = load_strategy(scenario.strategy)
    with pytest.raises(BadValue) as raised:
        kind.check(config, scenario)
    return str(raised.value)


def test_the_professional_must_not_be_the_clients_model_under_whatever_name(tmp_path: Path, base: str) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(base, copied)
    for name in (base, str(copied)):
        assert "own" in refusal(tmp_path, base, last=f'server.llm = "{name}"\n')
        assert "own" in refusal(tmp_path, base, last=f'server.professional = "{name}"\n')


def test_a_professional_of_other_weights_is_taken(tmp_path: Path, models: tuple[str, str]) -> None:
    scenario = cells(from_toml(toml(tmp_path, models[0], last=f'server.professional = "{models[1]}"\n')))[0].scenario
    kind, config = load_strategy(scenario.strategy)
    kind.check(config, scenario)


def test_what_the_method_cannot_do_is_refused(tmp_path: Path, models: tuple[str, str]) -> None:
    base, other = models
    good = f'server.professional = "{other}"\n'
    assert "weights" in refusal(tmp_path, "http://127.0.0.1:8000/v1")
    assert "classification" in refusal(
        tmp_path, base, last=good + 'data.task = "classification"\nclient.task_model = "x"\n'
    )
    assert "server.public" in refusal(tmp_path, base, 'instructions = "public"', last=good)
    assert '"record"' in refusal(tmp_path, base, last=good + 'client.generator_training.loss_on = "response"\n')
    chat = 'server.professional = { endpoint = "http://127.0.0.1:8000/v1", model = "m", api = "chat" }\n'
    assert "scores no text" in refusal(tmp_path, base, last=chat)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ('instructions = "public"\nresponses = "own"', "no DP model"),
        ('instructions = "public"\nadopts = "dp"', "no DP model"),
        ("pairs = 0", "pairs"),
        ("judge_share = 0.0", "judge_share"),
        ("temperature = 0.0", "temperature"),
        ("tuning.epoch = 3", "did you mean 'epochs'"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, base: str, options: str, why: str) -> None:
    with pytest.raises(BadValue, match=why):
        load_strategy(from_toml(instructions(tmp_path, STRATEGY, options=options, model=base)).strategy)
