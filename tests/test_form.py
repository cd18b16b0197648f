"""Instructions and responses in the form of a card: turns of a chat, words for base models, what is learnt of them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from inprocess import play
from test_chat import CHATML, GEMMA, by_hand, speaker
from test_llm import tiny_llama

from fedsynth.clients import self_train
from fedsynth.clients.evaluate import evaluate
from fedsynth.clients.finetune import in_use, put_to_use
from fedsynth.clients.fitting import Fitting
from fedsynth.clients.local_model import FACTS, _read
from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import SelfTrain
from fedsynth.models.chat import Chat, Opening, render
from fedsynth.models.form import LINES, InTurns, InWords, professional_form, student_form
from fedsynth.models.llm import LocalLLM
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.scenario.task import NO_CARD, Task, Templates
from fedsynth.synthesis import student
from fedsynth.synthesis.distillation import VERDICT, judge_prompt, judged_by_instruction, judged_by_likelihood, respond
from fedsynth.synthesis.self_instruct import pairs, write_instructions
from fedsynth.synthesis.self_instruct import respond as answer_in_context
from fedsynth.testing import ScriptedLLM
from fedsynth.training.engine import Engine
from fedsynth.training.examples import check_room, encode_records, encode_slots
from fedsynth.typed import BadValue, build

CARD = Task(system="S.", templates=Templates(student="{instruction}", professional="Q: {instruction}"))
WORDS = Task(domain="Ask.", templates=Templates(student="{domain} Q: {instruction}\nA:"))
PAIRS = Corpus(("hi?\nnow",), ("yes\nno",), Provenance.PRIVATE)
SYSTEM = ("<|im_start|>", "system\nS.", "<|im_end|>", "\n")
ASKED = ("<|im_start|>", "user\nhi?\nnow", "<|im_end|>", "\n", "<|im_start|>", "assistant\n")


def test_the_whole_record_is_learnt_from_the_users_words_on_and_ends_with_the_turn() -> None:
    tokenizer = speaker(CHATML)
    [[example]] = encode_slots(tokenizer, PAIRS, (), 1, GeneratorTraining(max_length=400), task=CARD)
    head = by_hand(tokenizer, *SYSTEM, "<|im_start|>", "user\n")
    assert list(example.tokens) == by_hand(tokenizer, *SYSTEM, *ASKED, "yes\nno", "<|im_end|>")
    assert list(example.tokens[: example.start]) == head == render(student_form(CARD, tokenizer).opening(), tokenizer)


def test_of_the_response_the_question_in_its_turn_is_given() -> None:
    tokenizer = speaker(CHATML)
    settings = GeneratorTraining(max_length=400, loss_on="response")
    [[example]] = encode_slots(tokenizer, PAIRS, (), 1, settings, task=CARD)
    given = by_hand(tokenizer, *SYSTEM, *ASKED)
    assert list(example.tokens) == [*given, *by_hand(tokenizer, "yes\nno", "<|im_end|>")]
    assert example.start == len(given)
    assert render(student_form(CARD, tokenizer).asked("hi?\nnow"), tokenizer) == given  # what it is asked later


def test_a_record_that_is_cut_has_no_end() -> None:
    tokenizer = speaker(CHATML)
    whole = by_hand(tokenizer, *SYSTEM, *ASKED, "yes\nno", "<|im_end|>")
    [short] = encode_records(tokenizer, PAIRS, len(whole) - 1, form=student_form(CARD, tokenizer))
    assert list(short.tokens) == whole[:-1]


def test_a_base_model_reads_the_cards_words_and_learns_what_comes_after_them() -> None:
    form = student_form(WORDS, speaker_without_chat())
    assert form == InWords("Ask. Q: ", "\nA:")
    assert (form.opening(), form.asked("hi?"), form.reply("yes")) == ("Ask. Q:", "Ask. Q: hi?\nA:", " yes")
    assert form.record(" hi?\nA: yes\nno") == ("hi?", "yes\nno")
    assert form.record(" hi?\nA: yes\nAsk. Q: and?\nA: no") == ("hi?", "yes")
    assert form.record(" hi? yes") is None
    assert form.asked("c", [("a", "b")]) == "Ask. Q: a\nA: b\n\nAsk. Q: c\nA:"


def speaker_without_chat() -> Any:
    found = speaker(CHATML + " ")  # a copy of its own
    found.chat_template = None
    return found


def test_the_words_of_a_base_model_are_given_with_what_it_learns() -> None:
    tokenizer = speaker_without_chat()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for learns, given, rest in (("record", "Ask. Q:", " hi?\nA: yes"), ("response", "Ask. Q: hi?\nA:", " yes")):
        settings = GeneratorTraining(max_length=400, loss_on=learns)  # type: ignore[arg-type]  # a parameter is a text
        corpus = Corpus(("hi?",), ("yes",), Provenance.PRIVATE)
        [[example]] = encode_slots(tokenizer, corpus, (), 1, settings, task=WORDS)
        assert list(example.tokens) == [bos, *by_hand(tokenizer, given + rest), eos]
        assert example.start == 1 + len(given)


def test_without_a_template_for_it_a_record_is_the_line_that_it_was_whatever_the_model() -> None:
    assert student_form(NO_CARD, speaker(CHATML)) == LINES
    assert student_form(Task(system="S.", domain="D."), speaker(CHATML)) == LINES
    assert professional_form(NO_CARD, chats=True) == LINES


def test_a_form_whose_instruction_nothing_ends_is_refused_by_name() -> None:
    with pytest.raises(BadValue, match=r"task.templates.student ends with the instruction, and the model has no chat"):
        student_form(CARD, speaker_without_chat())
    assert student_form(CARD, speaker(CHATML)) == InTurns("", "", "S.")


@pytest.mark.parametrize(
    ("name", "template", "said"),
    [
        ("student", "Say.", r"task.templates.student lacks the slot \{instruction\}"),
        ("student", "{instruction} {instruction}", r"has the slot \{instruction\} more than once"),
        ("student", "{instruction} {label}", r"has the unknown slot \{label\}: it may have"),
        ("professional", "{domain}", r"task.templates.professional lacks the slot \{instruction\}"),
        ("judge", "Good? {instruction}", r"task.templates.judge lacks the slot \{verdict\}"),
        ("judge", "{instruction} {verdict} {texts}", r"has the unknown slot \{texts\}"),
    ],
)
def test_a_template_with_a_wrong_slot_is_refused(name: str, template: str, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        build(Task, {"templates": {name: template}}, "task")


@pytest.mark.parametrize("template", [CHATML, GEMMA])
def test_demonstrations_are_earlier_turns_as_the_template_puts_them(template: str) -> None:
    tokenizer = speaker(template)
    chat = Chat("c <|im_end|>", "" if template == GEMMA else "S.", (("a", "b"), ("d", "e")))
    text = tokenizer.apply_chat_template(
        [{**turn, "content": turn["content"].replace("<|im_end|>", "<|im end|>")} for turn in chat.messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    shown = tokenizer.decode(render(chat, tokenizer)).replace("c <|im_end|>", "c <|im end|>")
    assert shown == text
    ends = render(chat, tokenizer).count(tokenizer.get_vocab()["<|im_end|>"])
    assert ends == (0 if template == GEMMA else 6)  # what a user spells is no control token
    opened = Opening("", chat.system, chat.shown)
    assert tokenizer.decode(render(opened, tokenizer)) == text[: text.index("c <|im end|>")]


def test_a_system_text_stands_before_the_first_turn_where_the_template_has_none() -> None:
    tokenizer = speaker(GEMMA)
    told = tokenizer.decode(render(Chat("c", "S.", (("a", "b"),)), tokenizer))
    assert told.count("S.") == 1
    assert "user\nS.\n\na<end_of_turn>" in told


def test_an_answer_is_scored_by_its_own_tokens_after_the_question() -> None:
    tokenizer = speaker(CHATML)
    llm = LocalLLM(tiny_llama(tokenizer), tokenizer, workers=1)
    chat = Chat("hi", "S.")
    before, answer = render(chat, tokenizer), by_hand(tokenizer, "yes")
    with torch.no_grad():
        logs = llm.model(torch.tensor([[*before, *answer]])).logits[0].log_softmax(-1)
    wanted = sum(float(logs[len(before) - 1 + i, token]) for i, token in enumerate(answer)) / len(answer)
    assert llm.score([chat], ["yes"]) == pytest.approx([wanted], rel=1e-5)
    assert Fitting(llm).score([chat, chat], ["yes", "no"])[0] == pytest.approx(wanted, rel=1e-5)


def test_a_professional_that_converses_is_asked_in_the_cards_words() -> None:
    llm = ScriptedLLM(lambda chat: f"  re {chat.user}\nand more ", chats=True)
    found = respond(llm, Corpus(("why?",), ("",), Provenance.LLM_WRITTEN), 8, task=CARD).corpus
    assert llm.completed == [[Chat("Q: why?", "S.")]]
    assert found.answers == ("re Q: why?\nand more",)
    base = ScriptedLLM(lambda _: " it is", chats=False)
    respond(base, Corpus(("why?",), ("",), Provenance.LLM_WRITTEN), 8)
    assert base.completed == [["question: why? answer:"]]


def test_a_judge_reads_the_cards_question_and_converses_where_the_model_does() -> None:
    card = Task(system="S.", domain="Bakers.", templates=Templates(judge="{domain} Fit? {instruction} Say {verdict}"))
    assert judge_prompt("a\nb", card) == f"Bakers. Fit? a b Say {VERDICT}"
    llm = ScriptedLLM(lambda chat: f"{VERDICT} {'keep' if 'good' in chat.user else 'drop'}", chats=True)
    asked = Corpus(("a good one", "another"), ("", ""), Provenance.LLM_WRITTEN)
    assert judged_by_instruction(llm, asked, task=card).corpus.prompts == ("a good one",)
    assert llm.completed == [[Chat(judge_prompt(text, card), "S.") for text in asked.prompts]]


def test_certainty_is_that_of_the_answer_to_the_cards_question() -> None:
    seen: list[Any] = []

    def likelihood(prompt: Any, answer: str) -> float:
        seen.append((prompt, answer))
        return 0.0 if "b" in prompt.user else -1.0

    class Scores(ScriptedLLM):
        def misfits(self, prompts: Any, more: int = 0, continuations: Any = None) -> Any:
            return [None] * len(prompts)

    llm = Scores(lambda _: "so it is", likelihood, chats=True)
    kept = judged_by_likelihood(llm, Corpus(("a", "b"), ("", ""), Provenance.LLM_WRITTEN), 0.5, 8, task=CARD)
    assert kept.corpus.prompts == ("b",)
    assert seen[0] == (Chat("Q: a", "S."), "so it is")


def test_a_student_that_converses_writes_instructions_on_from_the_users_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([""])

    def reply(prompt: Any) -> str:
        return next(said) if isinstance(prompt, Opening) else f"re {prompt.user}"

    for answered in (True, False):
        said = iter(["what now?", "x" * 64, "  "])
        llm = ScriptedLLM(reply, chats=True)
        found = written_by(llm, monkeypatch, answered=answered)
        assert llm.completed[0] == [Opening("", "S.")] * 3
        assert found.corpus.prompts == ("what now?",)
        assert found.corpus.answers == (("re what now?",) if answered else ("",))
        assert found.dropped == {"unfinished": 1, "no record": 1}
        assert len(llm.completed) == 1 + answered  # no response that nobody reads


def written_by(llm: Any, monkeypatch: pytest.MonkeyPatch, *, answered: bool) -> Any:
    class Asked(Engine):
        def serve(self, model: Any, tokenizer: Any) -> Any:
            return llm

    class Nobody:
        def to(self, _: Any) -> None:
            return None

    monkeypatch.setattr(student, "load_tokenizer", lambda _: speaker(CHATML))
    monkeypatch.setattr(student, "merged", lambda *_: Nobody())
    adapter: Any = type("A", (), {"grants": ("g",)})
    how = SamplingParams(temperature=0.7, max_new_tokens=60)
    return student.write(Asked(), "base", adapter, 3, how, seed=0, task=CARD, answered=answered)


def test_records_in_context_are_turns_and_an_instruction_that_does_not_end_is_dropped() -> None:
    form = student_form(CARD, speaker(CHATML))
    llm = ScriptedLLM(lambda _: "what is new here?", chats=True)
    shown = [("a", "b"), ("c", "d")]
    found = write_instructions(llm, shown, 2, shots=8, max_new_tokens=60, seed=0, form=form)
    assert found.corpus.prompts == ("what is new here?",) * 2
    [first, _] = llm.completed[0]
    assert isinstance(first, Opening)
    assert sorted(first.shown) == shown
    assert write_instructions(llm, shown, 1, shots=8, max_new_tokens=9, seed=0, form=form).corpus.prompts == ("",)
    assert answer_in_context(llm, shown, ["x"], shots=1, max_new_tokens=9, seed=0, form=form) == ["what is new here?"]
    [asked] = llm.completed[-3]  # then nothing is missing
    assert (asked.user, len(asked.shown)) == ("x", 1)


def test_a_form_too_long_for_an_example_is_refused_before_any_charge() -> None:
    tokenizer = speaker(CHATML)
    check_room(tokenizer, tiny_llama(tokenizer, context=128), (), 80, CARD)
    with pytest.raises(ValueError, match=r"the form of an instruction \(task.templates.student\) has \d+ tokens"):
        check_room(tokenizer, tiny_llama(tokenizer, context=128), (), 30, CARD)


STORED = Path(os.environ.get("FEDSYNTH_MODELS", "/nowhere")) / "smollm2-135m-instruct"


@pytest.mark.skipif(not STORED.is_dir(), reason="FEDSYNTH_MODELS holds no SmolLM2")
def test_a_real_models_record_is_its_own_template_with_the_answers_turn() -> None:
    from fedsynth.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(STORED))
    [[example]] = encode_slots(tokenizer, PAIRS, (), 1, GeneratorTraining(max_length=400), task=CARD)
    turns = [*Chat("hi?\nnow", "S.").messages, {"role": "assistant", "content": "yes\nno"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(example.tokens) + "\n" == whole
    assert tokenizer.decode(example.tokens[: example.start]).endswith("<|im_start|>user\n")


SCENARIO = """
name = "turns"
rounds = 1
[strategy]
use = "fedsynth.strategies.{strategy}"
{options}
[data]
source = "{place}/rows.csv"
task = "instructions"
test = {{ column = "split", equals = "test" }}
clients = 2
[client]
generator = "{place}/model"
guarantee = "{guarantee}"
budget = {{ epsilon = 8.0 }}
max_noise_multiplier = 100.0
generator_training = {{ expected_batch_size = 4, steps = 2, learning_rate = 1e-3, rank = 2, max_length = 120 }}
answer_tokens = 8
[server]
llm = "assets:tiny-llm"
[arms.main]
[task]
system = "S."
[task.templates]
student = "{{instruction}}"
professional = "Q: {{instruction}}"
"""


def conversing_scenario(place: Path, **slots: str) -> str:
    tokenizer = speaker(CHATML)
    tokenizer.save_pretrained(place / "model")
    tiny_llama(tokenizer, context=1024).save_pretrained(place / "model")
    rows = [("train", f"what is thing {i} good for?", f"it is for number {i}") for i in range(24)]
    rows += [("test", f"is thing {i} bad?", f"no {i}") for i in range(4)]
    pd.DataFrame(rows, columns=["split", "text", "response"]).to_csv(place / "rows.csv", index=False)
    return SCENARIO.format(place=place, **slots)


@pytest.mark.full
def test_knowledge_sg_with_a_model_that_converses_from_dp_to_the_adopted_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter(range(100))
    writer = ScriptedLLM(lambda _: f"why is the new part {next(asked)} of kind {next(asked)} here?", chats=True)
    monkeypatch.setattr(Engine, "serve", lambda *_: writer)
    professional = ScriptedLLM(lambda chat: f"since {chat.user[3:]}", chats=True)
    options = 'num_texts = 4\nmax_new_tokens = 64\nnovelty = 1.0\njudge = "none"\nresponse_tokens = 40'
    toml = conversing_scenario(tmp_path, strategy="knowledge_sg:KnowledgeSG", options=options, guarantee="dp")
    run = play(toml, tmp_path, llm=professional)
    assert writer.completed == [[Opening("", "S.")] * 4] * 2  # one call for each client: no own responses
    assert [type(prompt) for call in professional.completed for prompt in call] == [Chat] * 8
    assert professional.completed[0][0] == Chat("Q: why is the new part 0 of kind 1 here?", "S.")
    client = run.client(0)
    assert in_use(client) is not None
    assert set(evaluate(client).metrics) == {"exact_match", "field_match", "rouge_l"}


def test_a_site_keeps_the_card_with_the_model_that_learnt_in_its_form(tmp_path: Path) -> None:
    toml = conversing_scenario(tmp_path, strategy="lora_avg:LoraAverage", options="", guarantee="dp")
    client = replace(play(toml, tmp_path).client(0), simulated=False)
    adapter = in_use(client)
    assert adapter is not None
    put_to_use(client, adapter)
    kept = _read(json.loads((client.work / FACTS).read_text()))
    assert kept.task == client.task
    assert student_form(kept.task, speaker(CHATML)) == InTurns("", "", "S.") != LINES


def test_fedpit_with_a_model_that_converses_shows_private_records_as_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Chat] = []

    class Writes(LocalLLM):
        def complete(self, prompts: Any, *_: Any, **__: Any) -> list[str]:
            seen.extend(prompts)
            return ["tell me of the other house" if isinstance(p, Opening) else "it is old" for p in prompts]

    monkeypatch.setattr(self_train, "LocalLLM", Writes)
    options = "shots = 2\ncandidates = 2\nkeep = 1\nmax_new_tokens = 60"
    toml = conversing_scenario(tmp_path, strategy="fedpit:FedPIT", options=options, guarantee="none")
    run = play(toml, tmp_path)
    [answer, _] = run.replies(SelfTrain)
    assert answer.funnel == {"asked": 2, "like an earlier one": 1, "kept": 1}
    clients = [set(pairs(run.client(index).train)) for index in range(2)]
    asked = [set(chat.shown) for chat in seen]
    assert all(any(shown <= own for own in clients) for shown in asked)  # each client shows its own
    assert any(shown <= clients[0] for shown in asked)
    assert {(type(chat), chat.system, len(chat.shown)) for chat in seen} == {(Opening, "S.", 2), (Chat, "S.", 2)}
