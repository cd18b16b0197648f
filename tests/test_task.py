"""The task card: labels in words, in prompts and control codes."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from numpy.typing import NDArray
from typer.testing import CliRunner

from fedsynth.cli.main import app
from fedsynth.corpus import Corpus, Provenance
from fedsynth.models.chat import Chat
from fedsynth.models.loading import load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.scenario.task import NO_CARD, LabelCard, Task, Templates
from fedsynth.synthesis.augmentation import Demonstrating, augment, lacking, parse_line, text_prompt, turns
from fedsynth.synthesis.curation import Filtered, deduplicate, summed
from fedsynth.synthesis.judges import judge_by_instruction, judge_by_likelihood
from fedsynth.synthesis.label_check import chosen, fitting
from fedsynth.testing import ScriptedLLM
from fedsynth.training.examples import encode_slots
from fedsynth.typed import BadValue, build

BANK = Task(
    domain="Customers of a bank write to its support.",
    noun="a message of a bank's customer",
    style="Nobody greets.",
    system="You write as customers do.",
    labels={
        "lost_card": LabelCard("a lost card", "The card is gone."),
        "pin": LabelCard("a forgotten PIN"),
    },
)
LABELS = ("lost_card", "pin", "topUp_failed")
DRAFTS = Corpus(("my card is gone", "no idea of my code"), ("lost_card", "pin"), Provenance.DP_SYNTHETIC, grants=("g",))
LONG = GeneratorTraining(max_length=200)
ONE = SamplingParams(temperature=0.0, max_new_tokens=8)


def conversing(answer: Callable[[Any], str] = lambda _: "a text") -> ScriptedLLM:
    return ScriptedLLM(answer, chats=True)


def test_a_label_that_the_card_does_not_list_is_put_into_words_by_its_name() -> None:
    assert [BANK.wording(label) for label in LABELS] == ["a lost card", "a forgotten PIN", "top up failed"]
    assert [BANK.description(label) for label in LABELS] == ["The card is gone.", "", ""]


def test_a_control_code_is_the_wording_after_the_noun_and_without_a_card_the_label() -> None:
    assert [BANK.code(label) for label in LABELS] == [
        "a message of a bank's customer about a lost card:",
        "a message of a bank's customer about a forgotten PIN:",
        "a message of a bank's customer about top up failed:",
    ]
    assert [NO_CARD.code(label) for label in LABELS] == ["lost_card:", "pin:", "topUp_failed:"]
    assert Task(labels=BANK.labels).code("pin") == "a forgotten PIN:"
    own = Task(noun="a note", templates=Templates(generator="[{label}] {noun}:"))
    assert own.code("pin") == "[pin] a note:"


def test_the_question_without_demonstrations_is_the_question_with_them_less_the_block() -> None:
    bare, shown = BANK.question("lost_card"), BANK.question("lost_card", ["gone it is", "where is it"])
    block = "These are examples, one on each line:\ngone it is\nwhere is it\n\nDo not copy them. "
    assert block in shown
    assert shown.replace(block, "") == bare
    assert bare == (
        "Customers of a bank write to its support.\n"
        "Write a message of a bank's customer. It is about a lost card. The card is gone. Nobody greets.\n"
        "Answer with the text alone, on one line."
    )
    bare = replace(BANK, style="")
    assert "about a forgotten PIN.\n" in bare.question("pin")  # no blank where there is no description


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"labels": {"a": {"wording": "x\ny"}}}, "must stand in one line"),
        ({"labels": {"a": {"wording": " x"}}}, "without blanks around"),
        ({"labels": {"a": {"wording": "x"}, "b": {"wording": "X"}}}, "two labels have the wording 'x'"),
        ({"labels": {"a": {"wording": "x" * 201}}}, "201 characters: 200 at most"),
        ({"noun": "a\tb\nc"}, "must stand in one line"),
        ({"templates": {"writer": "Write about {wording}."}}, r"task.templates.writer lacks the slot \{examples\}"),
        ({"templates": {"writer": "{examples}Write."}}, "lacks the label"),
        ({"templates": {"writer": "{examples}{wording}{nuon}"}}, r"has the unknown slot \{nuon\}: it may have"),
        ({"templates": {"examples": "Examples:"}}, r"lacks the slot \{texts\}"),
        ({"templates": {"generator": "{texts} {label}:"}}, r"has the unknown slot \{texts\}"),
        ({"templates": {"generator": "text:"}}, "lacks the label"),
        ({"templates": {"generator": "{label"}}, "write {{ and }} for braces"),
        ({"templates": {"generator": "{label:>1000000000}"}}, r"the slot \{label\} takes no format"),
        ({"templates": {"generator": "{label!r}"}}, r"the slot \{label\} takes no format"),
        ({"templates": {"generator": "{label.__class__}"}}, r"has the unknown slot \{label.__class__\}"),
        ({"templates": {"writer": "{examples}{wording}" + "x" * 4000}}, "4000 at most"),
    ],
)
def test_a_card_that_cannot_be_meant_is_refused(card: Any, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        build(Task, card, "task")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('"My card is lost."', "My card is lost."),
        ("\u201cMy card is lost.\u201d\n\nI hope this helps!", "My card is lost."),
        ('"Lost" is what "my card" is', '"Lost" is what "my card" is'),
        ('"', '"'),
        ('""', None),
        (" \n ", None),
    ],
)
def test_quotes_around_a_whole_answer_are_no_part_of_the_text(answer: str, text: str | None) -> None:
    assert parse_line(answer) == text


def test_an_llm_that_converses_is_asked_and_a_base_llm_goes_on_after_codes() -> None:
    asked = text_prompt(conversing(), "pin", ["no\ncode"], BANK)
    assert asked == Chat(BANK.question("pin", ["no code"]), "You write as customers do.")
    code = BANK.code("pin")
    assert text_prompt(ScriptedLLM(), "pin", ["no\ncode"], BANK) == f"{code} no code\n{code}"


@pytest.mark.parametrize("llm", [conversing(lambda _: "Where is my card?"), ScriptedLLM(lambda _: "Where is my card?")])
@pytest.mark.parametrize("mode", ["per_label", "none"])
def test_texts_come_back_under_their_labels_whatever_the_words_were(llm: ScriptedLLM, mode: Any) -> None:
    how = Demonstrating(mode, 1, ONE)
    found = augment(llm, {0: DRAFTS}, how, labels=LABELS, wanted={0: LABELS}, seed=0, task=BANK)[0]
    assert found.corpus.answers == LABELS
    assert set(found.corpus.prompts) == {"Where is my card?"}
    assert found.corpus.provenance is (Provenance.LLM_WRITTEN if mode == "per_label" else Provenance.PUBLIC)


def test_blocks_name_labels_by_their_wordings_and_are_read_back_as_labels() -> None:
    llm = conversing(lambda _: "-----\nLabel: a lost card\nText: gone\n-----\nLabel: lost_card\nText: gone, too\n")
    how = Demonstrating("all_labels", 1, ONE)
    found = augment(llm, {0: DRAFTS}, how, labels=LABELS, wanted={0: LABELS}, seed=0, task=BANK)[0]
    # The identifier was never shown. The second prompt asks for one text of topUp_failed alone, and none comes.
    assert found.corpus.answers == ("lost_card",)
    assert (found.prompts, found.dropped) == (2, {"mistyped label": 2})
    assert all("Label: a forgotten PIN" in p.user or "forgotten" in p.user for p in llm.completed[0])


def test_judges_read_wordings_too() -> None:
    llm = conversing(lambda _: "The selected texts are: 1")
    judge_by_instruction(llm, {0: DRAFTS}, {0: [[0, 1]]}, labels=LABELS, keep=1, task=BANK, seed=0)
    [[asked]] = llm.completed
    assert asked.system == BANK.system
    assert "[a lost card] my card is gone" in asked.user
    assert "outside this domain: Customers of a bank write to its support," in asked.user
    seen: list[str] = []
    scoring = ScriptedLLM(likelihood=lambda prompt, _: seen.append(prompt) or 0.0)
    judge_by_likelihood(scoring, {0: DRAFTS}, {0: [[0, 1]]}, labels=LABELS, keep=1, task=BANK)
    assert set(seen) == {BANK.code(label) for label in LABELS}


def test_a_generator_learns_texts_after_their_codes() -> None:
    tokenizer = load_tokenizer(tiny.folder())
    private = Corpus(("gone", "code"), ("lost_card", "pin"), Provenance.PRIVATE)
    [[first], [second]] = encode_slots(tokenizer, private, LABELS, 2, LONG, task=BANK)
    for example, label in ((first, "lost_card"), (second, "pin")):
        given = tokenizer.decode(example.tokens[1 : example.start])
        assert (
            given.split() == tokenizer.decode(tokenizer(BANK.code(label), add_special_tokens=False).input_ids).split()
        )
    [[plain], _] = encode_slots(tokenizer, private, LABELS, 2, LONG)
    assert plain.tokens != first.tokens


def test_a_text_is_kept_where_its_own_label_in_words_is_the_nearest() -> None:
    texts = Corpus(
        ("gone", "code?", "code!"), ("lost_card", "pin", "lost_card"), Provenance.DP_SYNTHETIC, grants=("g",)
    )
    places = {
        "gone": (1.0, 0.1), "code?": (0.1, 5.0), "code!": (0.2, 0.9),
        "a lost card. The card is gone.": (3.0, 0.0), "a forgotten PIN": (0.0, 0.1),
    }  # fmt: skip  # a table

    def embed(asked: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray([places[text] for text in asked], np.float32)

    found = fitting(texts, ("lost_card", "pin"), BANK, embed)
    assert found.corpus.prompts == ("gone", "code?")
    assert found.dropped == {"another label is nearer": 1}
    assert fitting(texts.take([]), ("lost_card", "pin"), BANK, embed).corpus.prompts == ()
    with pytest.raises(ValueError, match="private"):
        fitting(Corpus(("gone",), ("pin",), Provenance.PRIVATE), LABELS, BANK, embed)


def test_what_labels_lack_is_asked_for_again() -> None:
    have = Corpus(("x", "y", "z"), ("a", "a", "c"), Provenance.PUBLIC)
    assert turns(("a", "b", "c"), 7) == ["a", "b", "c", "a", "b", "c", "a"]
    assert lacking(have, ("a", "b", "c"), 7) == ["a", "b", "b", "c"]
    assert lacking(have, ("a", "b", "c"), 1) == []


def test_a_first_card_of_a_file_is_read_back_as_one(tmp_path: Path) -> None:
    rows = [("my card is gone", "lost_card"), ("what is my code", 'the "PIN"'), ("where is it", "lost_card")]
    pd.DataFrame(rows, columns=["words", "kind"]).to_csv(tmp_path / "rows.csv", index=False)
    found = CliRunner().invoke(app, ["card", str(tmp_path / "rows.csv"), "--label", "kind", "--text", "words"])
    assert found.exit_code == 0
    assert not any(text in found.stdout for text, _ in rows)
    card = build(Task, tomllib.loads(found.stdout)["task"], "task")
    assert card.labels == {"lost_card": LabelCard("lost card"), 'the "PIN"': LabelCard('the "PIN"')}
    assert card.code("lost_card") == "lost card:"


def test_a_first_card_for_instructions_is_read_back_as_one_and_shows_no_text(tmp_path: Path) -> None:
    pd.DataFrame([("why?", "so")], columns=["words", "said"]).to_csv(tmp_path / "rows.csv", index=False)
    asked = ["card", str(tmp_path / "rows.csv"), "--text", "words", "--response"]
    found = CliRunner().invoke(app, [*asked, "said"])
    assert found.exit_code == 0
    assert "why?" not in found.stdout
    card = build(Task, tomllib.loads(found.stdout)["task"], "task")
    assert (card.templates.student, card.templates.professional) == ("{instruction}", "{instruction}")
    assert CliRunner().invoke(app, [*asked, "reply"]).exit_code != 0  # no such column


def test_attempts_are_one_funnel_and_a_text_that_is_kept_already_is_a_duplicate() -> None:
    first = Corpus(("x", "y"), ("a", "b"), Provenance.PUBLIC)
    again = deduplicate(Corpus(("X ", "z"), ("a", "c"), Provenance.PUBLIC), first)
    assert again.corpus.prompts == ("z",)
    assert again.dropped == {"duplicate": 1}
    steps = [
        [("written", Filtered(first, {"too short": 2}, ("c", "d")))],
        [("written", Filtered(again.corpus, {"too short": 1, "duplicate": 1}, ("d",)))],
    ]
    [(name, found)] = summed(steps)
    assert name == "written"
    assert found.corpus.prompts == ("x", "y", "z")
    assert found.dropped == {"too short": 3, "duplicate": 1}
    assert found.lost == ("d",)  # c came with the second attempt


TOLD = Corpus(
    ("It is gone.", "I forgot it.", "Hello there.", "Which one?"), ("lost_card", "pin", "pin", "pin"), Provenance.PUBLIC
)


def test_an_llm_that_converses_chooses_the_label_of_each_text() -> None:
    answers = {
        "gone": "A lost card.",
        "forgot": "the PIN, or a lost card?",
        "Hello": "the lost card",
        "Which": "the PIN",
    }
    card = Task(system="Be brief.", labels={"lost_card": LabelCard("lost card"), "pin": LabelCard("PIN")})
    llm = ScriptedLLM(answer=lambda chat: next(a for word, a in answers.items() if word in chat.user), chats=True)
    found = chosen(TOLD, ("lost_card", "pin"), card, llm)
    assert found.corpus.prompts == ("It is gone.", "Which one?")
    assert found.dropped == {"no label is chosen": 1, "another label is chosen": 1}
    [asked] = llm.completed
    assert asked[0] == Chat(card.choice("It is gone.", ("lost_card", "pin")), "Be brief.")
    assert llm.settings[0][0].temperature == 0


def test_a_base_llm_chooses_the_likeliest_wording_and_what_does_not_fit_is_dropped() -> None:
    card = Task(labels={"lost_card": LabelCard("lost card"), "pin": LabelCard("PIN")})
    likes = {("gone", "lost card"), ("forgot", "PIN"), ("Hello", "lost card")}
    llm = ScriptedLLM(likelihood=lambda p, c: float(any(word in p and c == wording for word, wording in likes)))
    llm.context = len(card.choice("It is gone.", ("lost_card", "pin"))) + 34
    long = Corpus((*TOLD.prompts[:3], "x" * 99), TOLD.answers, Provenance.PUBLIC)
    found = chosen(long, ("lost_card", "pin"), card, llm)
    assert found.corpus.prompts == ("It is gone.", "I forgot it.")
    assert found.dropped == {"another label is chosen": 1, "too long": 1}
    with pytest.raises(ValueError, match="private"):
        chosen(Corpus(("gone",), ("pin",), Provenance.PRIVATE), ("pin",), card, llm)
    assert chosen(long.take([]), ("lost_card", "pin"), card, llm).corpus.prompts == ()
