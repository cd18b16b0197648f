"""FedPIT in process: what is written and kept, what is trained from what, what is sent."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from inprocess import Played, canary, instructions, play

from fedsynth.clients import app, finetune
from fedsynth.clients import evaluate as measure
from fedsynth.clients import self_train as on_client
from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.finetune import in_use
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import ClientData
from fedsynth.evaluation.fidelity import ifd
from fedsynth.federation.messages import FUNNEL, Adopt, Finetune, SelfTrain
from fedsynth.federation.nodes import TooFewReplies
from fedsynth.federation.run.privacy_report import privacy_line
from fedsynth.federation.strategy import load_strategy
from fedsynth.federation.validation import Rejected, check_reply, check_request
from fedsynth.instructions import ASK, REPLY, asked, parse_record, record
from fedsynth.lora import Adapter, average, mix
from fedsynth.models.adapters import new_adapter, read_adapter
from fedsynth.models.llm import LocalLLM
from fedsynth.privacy.release import NotReleasable
from fedsynth.rouge import nearest, rouge_l
from fedsynth.scenario.client import Client
from fedsynth.scenario.toml import cells, from_toml, load, to_toml
from fedsynth.strategies.fedpit import Config, FedPIT
from fedsynth.synthesis import self_instruct as selfgen
from fedsynth.synthesis.self_instruct import generate, pairs, respond, select, texts, write_instructions
from fedsynth.testing import ScriptedLLM
from fedsynth.typed import BadValue
from fedsynth.world import load_world, private_records, secret_of

STRATEGY = "fedsynth.strategies.fedpit:FedPIT"
FEDIT = "fedsynth.strategies.lora_avg:LoraAverage"
SMALL = "candidates = 6\nkeep = 3\nshots = 2\nmax_new_tokens = 8"
WORDS = [f"w{number:02d}x" for number in range(90)]
LOCAL = Corpus(
    tuple(f"patient {i} reports pain in limb {i % 7} since day {i}" for i in range(20)),
    tuple(f"ward {i % 4} ; rest {i} ; ref s{i * 7919:06d}" for i in range(20)),
    Provenance.PRIVATE,
)


def text_for(prompt: str, words: int) -> str:
    """Words that follow from the prompt and from nothing else: other demonstrations give other ones."""
    rng = np.random.default_rng(zlib.crc32(prompt.encode()))
    return " ".join(rng.choice(WORDS, words, replace=False))


def inventor(prompt: str) -> str:
    return f" {text_for(prompt, 5)}{REPLY} x" if prompt.endswith(ASK) else f" {text_for(prompt, 3)}\n{ASK} more"


class Writer(LocalLLM):
    """Writes by script; scores are the model's own."""

    prompts: tuple[list[str], ...] = ([],)
    answer = staticmethod(inventor)

    def complete(self, prompts: Sequence[str], *_: Any, **__: Any) -> list[str]:
        self.prompts[0].extend(prompts)
        return [self.answer(prompt) for prompt in prompts]


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> type[Writer]:
    class Fresh(Writer):
        prompts: tuple[list[str], ...] = ([],)

    monkeypatch.setattr(on_client, "LocalLLM", Fresh)
    return Fresh


def played(tmp_path: Path, options: str = "", *, strategy: str = STRATEGY, **more: Any) -> Played:
    options = f"{SMALL}\n{options}" if strategy == STRATEGY else options
    tmp_path.mkdir(exist_ok=True)
    return play(instructions(tmp_path, strategy, options=options, guarantee="none", **more), tmp_path)


def digest(adapter: Adapter) -> str:
    hashed = hashlib.sha256()
    for name, array in sorted(adapter.arrays.items()):
        hashed.update(name.encode() + array.tobytes())
    return hashed.hexdigest()


def lines(corpus: Corpus) -> list[str]:
    """Records as base models read them."""
    return [record(*pair) for pair in pairs(corpus)]


def gen(llm: Any, local: Corpus = LOCAL, **more: Any) -> tuple[Corpus, dict[str, int]]:
    options = {"candidates": 12, "shots": 4, "max_new_tokens": 48, "seed": 0, **more}
    found, funnel = generate(llm, pairs(local), local, **options)
    assert set(funnel) <= set(FUNNEL)  # else no server would take the answer
    return found, funnel


# --- What is sent ----------------------------------------------------------------------------------------------------


def test_beta_1_is_fedit_bit_for_bit_and_writes_nothing(tmp_path: Path, writer: type[Writer]) -> None:
    fedit = played(tmp_path / "fedit", strategy=FEDIT, rounds=2, rows=41)
    fedpit = played(tmp_path / "fedpit", "share = 1.0", rounds=2, rows=41)
    ours, theirs = fedpit.replies(SelfTrain), fedit.replies(Finetune)
    assert len(ours) == len(theirs) == 6
    assert [digest(a.adapter) for a in ours] == [digest(a.adapter) for a in theirs]
    assert [a.records for a in ours] == [a.records for a in theirs]
    assert [digest(s.adapters[0]) for s in fedpit.states] == [digest(s.adapter) for s in fedit.states]
    assert fedpit.metric("rouge_l") == fedit.metric("rouge_l")
    assert writer.prompts[0] == []


def test_the_private_half_does_not_depend_on_what_is_written(
    tmp_path: Path, writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    halves: list[tuple[Adapter, Adapter]] = []
    monkeypatch.setattr(on_client, "mix", lambda *a: halves.append(a[:2]) or mix(*a))
    run = played(tmp_path / "fedpit")
    fedit = played(tmp_path / "fedit", strategy=FEDIT)
    assert writer.prompts[0]
    assert {digest(private) for private, _ in halves} == {digest(a.adapter) for a in fedit.replies(Finetune)}
    sent = [digest(a.adapter) for a in run.replies(SelfTrain)]
    assert set(sent) == {digest(mix(private, own, 0.5)) for private, own in halves}
    assert len({digest(own) for _, own in halves}) == 3


def test_the_global_adapter_is_the_mean_weighted_by_real_records(tmp_path: Path, writer: type[Writer]) -> None:
    run = played(tmp_path, rows=41, rounds=2)
    first = run.replies(SelfTrain)[:3]
    records = [a.records for a in first]
    assert records == [len(run.client(i).train) for i in range(3)]
    assert len(set(records)) > 1
    expected = average([a.adapter for a in first], records)
    assert {digest(request.adapter) for request in run.requests(Adopt)[:3]} == {digest(expected)}
    assert {digest(request.start) for request in run.requests(SelfTrain)[3:]} == {digest(expected)}
    assert digest(in_use(run.client(0))) == digest(run.states[-1].adapters[0])


def test_at_beta_0_an_unshown_record_counts_through_filter_and_ranking_only(
    tmp_path: Path, writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfgen, "nearest", lambda written, _: [0.0] * len(written))
    monkeypatch.setattr(
        selfgen, "ifd", lambda llm, prompts, answers, form: [float(zlib.crc32(p.encode())) for p in prompts]
    )
    toml = instructions(tmp_path, STRATEGY, options=f"{SMALL}\nshare = 0.0", guarantee="none", clients=1, rows=30)
    toml = toml.replace("steps = 3", "steps = 20")  # so that no record is left out of training by chance
    table = tmp_path / "records.csv"
    whole = table.read_text()

    def sent(text: str, beta: str = "0.0") -> str:
        table.write_text(text)
        place = tmp_path / hashlib.sha256((text + beta).encode()).hexdigest()[:8]
        [answer] = play(toml.replace("share = 0.0", f"share = {beta}"), place).replies(SelfTrain)
        return digest(answer.adapter)

    as_it_is = sent(whole)
    prompts = "".join(writer.prompts[0])
    train = play(toml, tmp_path / "look").client(0).train
    shown = {line in prompts: row for row, line in enumerate(lines(train))}  # one of either kind
    assert set(shown) == {True, False}

    def altered(row: int) -> str:
        return whole.replace(train.answers[row], "quite another response")

    assert sent(altered(shown[False])) == as_it_is
    assert sent(altered(shown[True])) != as_it_is
    assert sent(altered(shown[False]), "0.5") != sent(whole, "0.5")


# --- What is trained from what ---------------------------------------------------------------------------------------


def test_both_halves_start_from_the_global_adapter_and_share_no_optimizer(
    tmp_path: Path, writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[str] = []
    optimizers: list[torch.optim.Adam] = []
    fit, adam = finetune.train_generator, torch.optim.Adam

    def watched(model: Any, *arguments: Any, **more: Any) -> int:
        starts.append(digest(read_adapter(model, "")))
        return fit(model, *arguments, **more)

    def made(*arguments: Any, **more: Any) -> torch.optim.Adam:
        optimizers.append(adam(*arguments, **more))
        assert not optimizers[-1].state
        return optimizers[-1]

    monkeypatch.setattr(finetune, "train_generator", watched)
    monkeypatch.setattr("fedsynth.training.dp_training.torch.optim.Adam", made)
    run = played(tmp_path, clients=1, rows=12)
    assert starts == [digest(run.requests(SelfTrain)[0].start)] * 2
    private, own = ({id(p) for g in o.param_groups for p in g["params"]} for o in optimizers)
    assert private
    assert not private & own


def test_the_global_model_writes_and_the_local_one_selects(
    tmp_path: Path, writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}

    def noting(name: str, function: Any) -> Any:
        return lambda llm, *a, **k: [
            seen.update({name: digest(read_adapter(llm.llm.model, ""))}),
            function(llm, *a, **k),
        ][1]

    monkeypatch.setattr(on_client, "generate", noting("generate", on_client.generate))
    monkeypatch.setattr(on_client, "select", noting("select", on_client.select))
    run = played(tmp_path / "fedpit", clients=1)
    fedit = played(tmp_path / "fedit", strategy=FEDIT, clients=1)
    [request], [private] = run.requests(SelfTrain), fedit.replies(Finetune)
    assert seen == {"generate": digest(request.start), "select": digest(private.adapter)}


def test_the_synthetic_half_is_what_it_would_be_without_the_private_one(
    tmp_path: Path, writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = played(tmp_path, 'share = 0.0\nselection = "random"', clients=1, rows=12)
    client, [request], [answer] = run.client(0), run.requests(SelfTrain), run.replies(SelfTrain)
    candidates, _ = on_client.syn_gen(client, request)
    kept = select(ScriptedLLM(), candidates, keep=request.keep, by="random", seed=request.writing_seed)
    alone = on_client.loc_train(
        client, request.start, on_client.slots_of(client, kept, len(kept)), request.writing_seed
    )
    assert digest(read_adapter(alone, "")) == digest(answer.adapter)


def test_nothing_left_to_learn_is_no_synthetic_update(tmp_path: Path, writer: type[Writer]) -> None:
    writer.answer = staticmethod(lambda prompt: " too short")
    run = played(tmp_path / "half", clients=1)
    fedit = played(tmp_path / "fedit", strategy=FEDIT, clients=1)
    [request], [answer], [trained] = run.requests(SelfTrain), run.replies(SelfTrain), fedit.replies(Finetune)
    assert digest(answer.adapter) == digest(mix(trained.adapter, request.start, 0.5))
    assert answer.funnel == {"asked": 6, "too short": 6, "kept": 0}
    run = played(tmp_path / "none", "share = 0.0", clients=1)
    assert digest(run.replies(SelfTrain)[0].adapter) == digest(request.start)
    run = played(tmp_path / "mixed", 'training = "mixed"', clients=1)
    assert digest(run.replies(SelfTrain)[0].adapter) == digest(trained.adapter)


def test_mixed_training_takes_as_many_steps_and_draws_each_private_record_as_often(
    tmp_path: Path, writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []
    fit = finetune.train_generator

    def watched(model: Any, training: Any, *rest: Any, **more: Any) -> int:
        seen.append((len(training.slots), training.expected_batch_size, training.steps))
        return fit(model, training, *rest, **more)

    monkeypatch.setattr(finetune, "train_generator", watched)
    run = played(tmp_path, 'training = "mixed"', clients=1, rows=12)
    records = len(run.client(0).train)
    assert run.replies(SelfTrain)[0].funnel["kept"] == 3
    local, both = seen
    assert local == (records, 5, 3)
    assert both == (records + 3, round(5 * (records + 3) / records), 3)


def test_version_1_sends_the_synthetic_half_and_keeps_one_trained_on_both(tmp_path: Path, writer: type[Writer]) -> None:
    run = played(tmp_path / "personal", 'training = "personal"', clients=2)
    synthetic = played(tmp_path / "zero", "share = 0.0", clients=2)
    both = played(tmp_path / "mixed", 'training = "mixed"', clients=2)
    assert [digest(a.adapter) for a in run.replies(SelfTrain)] == [
        digest(a.adapter) for a in synthetic.replies(SelfTrain)
    ]
    assert run.requests(Adopt) == []
    kept = [digest(in_use(run.client(i))) for i in range(2)]
    assert kept == [digest(a.adapter) for a in both.replies(SelfTrain)]


def test_without_aggregation_each_client_goes_on_with_its_own(tmp_path: Path, writer: type[Writer]) -> None:
    run = played(tmp_path, "aggregate = false", rounds=2)
    sent = [digest(a.adapter) for a in run.replies(SelfTrain)]
    assert len(set(sent)) == 6
    assert [digest(o.start) for o in run.requests(SelfTrain)[3:]] == sent[:3]
    assert [digest(o.adapter) for o in run.requests(Adopt)] == sent


def test_random_selection_keeps_others_than_the_lowest(tmp_path: Path, writer: type[Writer]) -> None:
    chosen = [played(tmp_path / by, f'share = 0.0\nselection = "{by}"').replies(SelfTrain) for by in ("ifs", "random")]
    assert [a.funnel for a in chosen[0]] == [a.funnel for a in chosen[1]]
    assert {digest(a.adapter) for a in chosen[0]} != {digest(a.adapter) for a in chosen[1]}


# --- SynGen ----------------------------------------------------------------------------------------------------------


def test_demonstrations_are_random_local_records_as_lines() -> None:
    llm = ScriptedLLM(inventor)
    gen(llm)
    asking, answering = llm.completed[0], llm.completed[1]
    known = set(lines(LOCAL))
    for prompt in asking:
        *shown, last = prompt.split("\n")
        assert last == ASK
        assert len(set(shown)) == 4
        assert set(shown) <= known
    assert len(set(asking)) == 12
    assert all(prompt.endswith(REPLY) and len(prompt.split("\n")) == 5 for prompt in answering)
    assert {sampling.temperature for sampling, _ in llm.settings} == {0.0}


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (f" a tall order of new things{REPLY} x", None),
        (" a tall order that never ends", "too short"),
        (f" two words{REPLY} x", "too short"),
        (f" As a language model I cannot do that{REPLY} x", "too short"),
        (f" Sorry, that is not possible here{REPLY} x", "too short"),
        (f" a new order\n{ASK} another one{REPLY} x", "too short"),
        (f" a new {ASK} order of things{REPLY} x", "template marker"),
        (f" a new \x00 order of things{REPLY} x", "control character"),
    ],
)
def test_what_is_no_instruction_is_dropped(written: str, reason: str | None) -> None:
    llm = ScriptedLLM(lambda prompt: written if prompt.endswith(ASK) else " a fine reply")
    found, funnel = gen(llm, candidates=1)
    assert len(found) == (reason is None)
    assert funnel == {"asked": 1} | ({reason: 1} if reason else {})


def test_a_response_gets_three_tries_after_other_demonstrations() -> None:
    asked_for: list[str] = []

    def answer(prompt: str) -> str:
        asked_for.append(prompt)
        return " late reply" if prompt.endswith(asked("slow one")) and len(asked_for) > 4 else "\n"

    llm = ScriptedLLM(answer)
    found = respond(llm, pairs(LOCAL), ["slow one", "never one"], shots=4, max_new_tokens=8, seed=0)
    assert found == ["late reply", ""]
    assert [len(prompts) for prompts in llm.completed] == [2, 2, 2]
    assert len(set(asked_for)) == 6
    llm = ScriptedLLM(lambda prompt: " at once")
    assert respond(llm, pairs(LOCAL), ["one"], shots=4, max_new_tokens=8, seed=0) == ["at once"]


def copies(prompt: str) -> str:
    """The last demonstration: its instruction, then its response."""
    found = parse_record(prompt.rstrip("\n").split("\n")[-2])
    assert found is not None
    return f" {found[0]}{REPLY} x" if prompt.endswith(ASK) else f" {found[1]}"


def test_copies_of_demonstrations_are_all_dropped() -> None:
    found, funnel = gen(ScriptedLLM(copies))
    assert len(found) == 0
    assert funnel == {"asked": 12, "instruction like a local one": 12}


def test_a_copy_of_a_record_that_was_not_shown_is_dropped_too() -> None:
    shown = pairs(LOCAL)[:10]
    hidden = LOCAL.prompts[15].replace("reports", "reported")
    llm = ScriptedLLM(lambda prompt: f" {hidden}{REPLY} x" if prompt.endswith(ASK) else " x")
    options = {"candidates": 3, "shots": 4, "max_new_tokens": 48, "seed": 0}
    assert len(generate(llm, shown, LOCAL, **options)[0]) == 0
    seen_only = LOCAL.take(range(10))
    assert nearest([hidden], seen_only.prompts)[0] > 0.7 or len(generate(llm, shown, seen_only, **options)[0]) == 1


def test_a_copied_response_under_an_instruction_of_its_own_is_dropped() -> None:
    long = Corpus(
        ("what is to be done",), ("take the blue pill at noon and the red one at night ; ref s1",), Provenance.PRIVATE
    )
    llm = ScriptedLLM(lambda p: f" and what of the rest{REPLY} x" if p.endswith(ASK) else f" {long.answers[0]}")
    found, funnel = gen(llm, long, candidates=1)
    assert rouge_l("and what of the rest", long.prompts[0]) <= 0.7
    assert len(found) == 0
    assert funnel["record like a local one"] == 1


def test_candidates_like_one_another_are_kept_once() -> None:
    found, funnel = gen(ScriptedLLM(lambda p: f" always this very same order{REPLY} x" if p.endswith(ASK) else " yes"))
    assert texts(found) == ["always this very same order yes"]
    assert funnel == {"asked": 12, "like an earlier one": 11}


def test_the_funnel_accounts_for_every_candidate() -> None:
    kinds = (inventor, copies, lambda _: "", lambda p: inventor(p) if p.endswith(ASK) else "\n")

    def mixed(prompt: str) -> str:
        told = prompt.split("\n")[-1] + prompt.split("\n")[0]
        return kinds[zlib.crc32(told.encode()) % len(kinds)](prompt)

    found, funnel = gen(ScriptedLLM(mixed), candidates=60)
    assert funnel.pop("asked") == 60
    assert len(funnel) > 2
    assert sum(funnel.values()) + len(found) == 60
    assert max(nearest(found.prompts, LOCAL.prompts)) <= 0.7
    assert max(nearest(texts(found), texts(LOCAL))) <= 0.7


def test_in_a_run_nothing_kept_is_like_a_local_record_or_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Corpus, Corpus]] = []
    selected = on_client.syn_sel

    def watched(client: ClientSide, *rest: Any) -> Corpus:
        seen.append((client.train, selected(client, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(on_client, "syn_sel", watched)
    sets = [
        "rounds=2",
        "data.clients=2",
        "data.train_per_client=10",
        "data.test_per_client=4",
        'run=["fedpit"]',
        "client.generator_training.steps=4",
        "strategy.candidates=24",
    ]
    play(to_toml(load("hospitals-fedpit", sets)), tmp_path, "fedpit")
    assert len(seen) == 4
    for train, kept in seen:
        assert len(kept) > 0
        assert max(nearest(kept.prompts, train.prompts)) <= 0.7
        assert max(nearest(texts(kept), texts(train))) <= 0.7
        secrets = [secret_of(answer) for answer in train.answers]
        assert all(secrets)
        assert not [y for y in kept.answers for secret in secrets if secret and secret in y]


@pytest.mark.parametrize("records", [0, 1, 3])
def test_fewer_records_than_shots_give_fewer_shots(records: int) -> None:
    llm = ScriptedLLM(inventor)
    shown = pairs(LOCAL)[:records]
    write_instructions(llm, shown, 2, shots=8, max_new_tokens=8, seed=0)
    assert [prompt.count("\n") for prompt in llm.completed[0]] == [records] * 2


def test_a_record_too_long_to_be_learnt_whole_is_not_shown(tmp_path: Path, writer: type[Writer]) -> None:
    toml = instructions(tmp_path, STRATEGY, options=SMALL, guarantee="none", clients=1, rows=12)
    table = tmp_path / "records.csv"
    table.write_text(table.read_text().replace("of thing 1", "of thing 1" + " and so on" * 20))
    run = play(toml, tmp_path)
    long = [line for line in lines(run.client(0).train) if "and so on" in line]
    prompts = "".join(writer.prompts[0])
    assert long
    assert not [line for line in long if line in prompts]


# --- SynSel ----------------------------------------------------------------------------------------------------------


def test_the_lowest_are_kept_in_their_request() -> None:
    scores = {"a": 0.9, "b": 0.2, "c": 0.7, "d": 0.4, "e": float("inf")}
    # NLL(y) is 1, so that the ratio is NLL(y|x).
    llm = ScriptedLLM(likelihood=lambda prompt, _: -next((v for k, v in scores.items() if f" {k} " in prompt), 1.0))
    candidates = Corpus(tuple(scores), ("yes",) * 5, Provenance.SELF_GENERATED)
    assert select(llm, candidates, keep=3).prompts == ("b", "c", "d")
    assert select(llm, candidates, keep=9).prompts == tuple(scores)
    assert len(select(llm, candidates.take([]), keep=3)) == 0


def test_after_training_shuffled_responses_score_worse_than_matched_ones(tmp_path: Path) -> None:
    client = play(instructions(tmp_path, FEDIT, guarantee="none", clients=1, rows=10), tmp_path).client(0)
    settings = replace(client.config.generator_training, steps=120, learning_rate=2e-2, rank=8)
    client = replace(client, config=replace(client.config, generator_training=settings))
    start = new_adapter(tiny.folder(), rank=8, alpha=16.0, seed=0)
    local = on_client.loc_train(client, start, on_client.slots_of(client, client.train, client.records), 0)
    llm, prompts, answers = LocalLLM(local, tiny.tokenizer(), workers=1), client.train.prompts, client.train.answers
    shifted = answers[1:] + answers[:1]
    assert np.mean(ifd(llm, prompts, answers)) < 0.9 * np.mean(ifd(llm, prompts, shifted))
    kept = select(llm, Corpus(prompts * 2, answers + shifted, Provenance.SELF_GENERATED), keep=len(prompts))
    true = set(zip(prompts, answers, strict=True))
    assert len(true & set(zip(kept.prompts, kept.answers, strict=True))) >= 0.8 * len(prompts)


# --- What is promised ------------------------------------------------------------------------------------------------


def test_the_run_says_that_nothing_is_guaranteed_and_prints_no_epsilon(tmp_path: Path, writer: type[Writer]) -> None:
    run = played(tmp_path)
    line = privacy_line([run.run_log])
    assert line.startswith("no differential privacy guarantee: adapters left clients without a mechanism")
    assert not run.metric("privacy/epsilon")
    assert all(a.statement.guarantee == "none" and a.statement.epsilon is None for a in run.replies(SelfTrain))
    assert all(a.adapter.grants == () for a in run.replies(SelfTrain))
    assert run.client(0).ledger.spent()[0] == float("inf")


def test_a_scenario_with_a_guarantee_is_refused_with_the_reason(tmp_path: Path) -> None:
    [cell] = cells(from_toml(instructions(tmp_path, STRATEGY, options="shots = 1\nmax_new_tokens = 8")))
    kind, config = load_strategy(cell.scenario.strategy)
    assert kind is FedPIT
    with pytest.raises(BadValue, match=r'reads private records as demonstrations.*Say client.guarantee = "none"'):
        FedPIT.check(config, cell.scenario)
    open_ = replace(cell.scenario, client=replace(cell.scenario.client, guarantee="none"))
    FedPIT.check(config, open_)
    with pytest.raises(BadValue, match="use fewer shots"):
        FedPIT.check(replace(config, shots=2), open_)


def test_a_client_that_guarantees_refuses_the_request(tmp_path: Path, writer: type[Writer]) -> None:
    run = played(tmp_path, clients=1)
    client = run.client(0)
    strict = replace(client, config=Client(tiny.folder(), guarantee="dp", budget=client.config.budget))
    with pytest.raises(NotReleasable, match="no formal privacy"):
        on_client.self_train(strict, run.requests(SelfTrain)[0])


def test_outside_a_simulation_the_server_sees_a_constant_code(
    tmp_path: Path, writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = app.simulated_client
    monkeypatch.setattr(app, "simulated_client", lambda *a: replace(opened(*a), simulated=False))
    with pytest.raises(TooFewReplies, match="refused: not_allowed"):
        played(tmp_path, clients=1)

    def never(*_: Any) -> None:
        raise AssertionError("private text was read for what is not allowed")

    # Nor may it tell by how it fails what it read: demonstrations that leave no room would answer "failed".
    monkeypatch.setattr(on_client, "syn_gen", never)
    monkeypatch.setattr(on_client, "slots_of", never)
    with pytest.raises(TooFewReplies, match="refused: not_allowed"):
        played(tmp_path / "again", clients=1)


def test_no_text_crosses_neither_private_nor_written(tmp_path: Path, writer: type[Writer]) -> None:
    run = played(tmp_path)
    crossed = b"".join(
        m.content["fedsynth"]["payload"] for m in (*run.grid.requests, *run.grid.replies) if "fedsynth" in m.content
    )
    assert not [row for row in range(72) if canary(row).encode() in crossed]
    assert not [word for word in WORDS if f" {word}".encode() in crossed]
    assert canary(0) in "".join(writer.prompts[0])  # they are there to be found


@pytest.mark.parametrize(
    ("wrong", "what"),
    [({"share": 1.1}, "share"), ({"keep": 33}, "keep"), ({"shots": 0}, "shots")],
)
def test_requests_and_options_out_of_range_are_refused(wrong: dict[str, Any], what: str) -> None:
    request = SelfTrain(Adapter({}, 1, 1.0, ""), 0, 0)
    check_request(request, ())
    with pytest.raises(Rejected, match=what):
        check_request(replace(request, **wrong), ())
    with pytest.raises(BadValue, match=what):
        Config(**wrong)


def test_beta_belongs_to_isolated_training() -> None:
    with pytest.raises(BadValue, match='share belongs to training = "isolated"'):
        Config(training="mixed", share=0.2)


def test_a_funnel_with_more_than_was_asked_for_is_refused(tmp_path: Path, writer: type[Writer]) -> None:
    run = played(tmp_path, clients=1)
    [request], [answer] = run.requests(SelfTrain), run.replies(SelfTrain)
    check_reply(request, answer, ())
    with pytest.raises(Rejected, match="kept"):
        check_reply(request, replace(answer, funnel={"kept": 7}), ())
    assert run.metric("yield/self-generated/in") == [6.0]


def test_what_follows_the_true_fields_is_no_part_of_a_worlds_task_and_an_error_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = played(tmp_path, strategy=FEDIT, clients=1).client(0)
    notes = private_records(load_world("hospitals"), 0, 5, 0, split="test")
    world = replace(file, world="hospitals", open=lambda: ClientData(file.train, notes))
    for client, exact in ((file, 0.0), (world, 1.0)):
        true = client.test.answers
        for said, right in ((lambda y: f"{y} ; ref one two", exact), (str, 1.0), (lambda y: f"ref; {y}", 0.0)):
            monkeypatch.setattr(measure, "respond", lambda *_, said=said, true=true: [said(y) for y in true])
            assert measure.evaluate(client).metrics["exact_match"] == right
