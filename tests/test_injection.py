"""Hostile texts against prompts, answers, pages, terminals and the display for approval: what none of them does."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from attacks import ATTACKS, TEMPLATES, TURNS
from rich.console import Console
from rich.table import Table
from scripted import ScriptedLLM
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedsynth.cli import deployment, main
from fedsynth.cli.main import app
from fedsynth.corpus import Corpus, Provenance
from fedsynth.evaluation.text import compare_prompt
from fedsynth.instructions import one_line, parse_record, record
from fedsynth.limits import MAX_TEXT
from fedsynth.models.chat import Chat, render, reply_of
from fedsynth.models.form import InTurns, InWords, Lines
from fedsynth.models.sampling import SamplingParams
from fedsynth.reporting import figures as draw
from fedsynth.reporting import page as pages
from fedsynth.reporting.figures import Mark
from fedsynth.scenario.task import LabelCard, Task
from fedsynth.synthesis.augmentation import Demonstrating, Mode, line_prompt
from fedsynth.synthesis.curation import well_formed, well_formed_instructions
from fedsynth.synthesis.distillation import judge_prompt, judged_by_instruction, respond
from fedsynth.synthesis.judges import judge_by_instruction, select_prompt
from fedsynth.synthesis.label_check import chosen
from fedsynth.synthesis.writing import Curation, write
from fedsynth.system.terminal import console_of, warn
from fedsynth.typed import visible

LABELS = ("fever", "cough", "injury")
HARMLESS = "The patient fell down the stairs and hurt her left knee."
TASK = Task(
    domain="Nurses write.", noun="a note", system="Be brief.", labels={"fever": LabelCard("a fever", "It is high.")}
)
every_attack = pytest.mark.parametrize("name", ATTACKS)
# What no text that curation lets through holds: control and bidi characters, tags, halves of pairs.
UNTYPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]")


def drafts(*texts: str, label: str = "fever", grant: str = "g") -> Corpus:
    return Corpus(texts, (label,) * len(texts), Provenance.DP_SYNTHETIC, (grant,))


# --- turns of a chat -------------------------------------------------------------------------------------------------


@cache
def speaker(template: str) -> Any:
    """A tokenizer of single bytes with the control tokens of a family."""
    text, control, _ = TEMPLATES[template]
    found = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(["<none>", *found])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    build: Any = PreTrainedTokenizerFast
    made = build(tokenizer_object=inner, pad_token="<none>", eos_token=control[1])
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    made.chat_template = text
    return made


def turns_of(tokenizer: Any, row: list[int], marks: tuple[str, ...] = ()) -> tuple[list[int], Counter[str]]:
    """Control tokens of a prompt in their order, and how often it has each mark that is no token."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = tokenizer.decode(row)
    return [token for token in row if token in special], Counter({mark: text.count(mark) for mark in marks})


PLACES: dict[str, Callable[[str], Chat]] = {
    "a question": lambda text: Chat(text),
    "a system text": lambda text: Chat("Why?", text),
    "an earlier question": lambda text: Chat("Why?", "", ((text, "So."),)),
    "an earlier answer": lambda text: Chat("Why?", "", (("What?", text),)),
}
# Halves of pairs are no text to a tokenizer, and an empty system text is no turn.
READ = {name: text[:3000] for name, text in ATTACKS.items() if name not in ("halves of pairs", "empty")}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_no_text_forges_a_turn(template: str, place: str) -> None:
    tokenizer, marks = speaker(template), TEMPLATES[template][2]
    harmless = turns_of(tokenizer, render(PLACES[place](HARMLESS), tokenizer), marks)
    forged = [
        name
        for name, text in READ.items()
        if turns_of(tokenizer, render(PLACES[place](text), tokenizer), marks) != harmless
    ]
    assert forged == []


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_template_alone_lets_texts_forge_turns(template: str) -> None:
    """The broken variant: the text goes into the template, and all of it through the tokenizer."""
    tokenizer, marks = speaker(template), TEMPLATES[template][2]

    def applied(text: str) -> Any:
        found = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        return turns_of(tokenizer, tokenizer(found, add_special_tokens=False)["input_ids"], marks)

    assert any(applied(text) != applied(HARMLESS) for text in TURNS.values())


def test_a_text_that_spells_no_mark_stays_as_it_is() -> None:
    tokenizer = speaker("mistral")
    for text in ("see [1] and [ICD]: <b>", "[Inst] a", "a <|b c|> d"):
        assert render(Chat(text), tokenizer) == tokenizer(f"<s>[INST] {text} [/INST]")["input_ids"]


STORED = Path(os.environ.get("FEDSYNTH_MODELS", ""))


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct"])
def test_no_text_forges_a_turn_of_a_published_model(name: str) -> None:
    if not (STORED / name / "tokenizer.json").is_file():
        pytest.skip(f"needs {name} in FEDSYNTH_MODELS")
    tokenizer = AutoTokenizer.from_pretrained(STORED / name)
    for place in PLACES.values():
        harmless = turns_of(tokenizer, render(place(HARMLESS), tokenizer))
        assert [n for n, text in READ.items() if turns_of(tokenizer, render(place(text), tokenizer)) != harmless] == []


# --- prompts: a text of another party is one line, whatever it holds -------------------------------------------------

PROMPTS: dict[str, Callable[[str], str]] = {
    "lines for a writer": lambda text: line_prompt("fever", [HARMLESS, text, HARMLESS], TASK),
    "a question to a writer": lambda text: TASK.question("fever", [one_line_of(text), HARMLESS]),
    "blocks for a writer": lambda text: blocks(text),
    "a judge's list": lambda text: select_prompt([("fever", text), ("cough", HARMLESS)], labels=LABELS, keep=2, domain="d"),
    "a verdict on an instruction": lambda text: judge_prompt(text, TASK),
    "two answers compared": lambda text: compare_prompt(text, text, text),
    "a record": lambda text: record(text, text),
    "records shown": lambda text: Lines().asked(text, [(text, text)]),
}


def one_line_of(text: str) -> str:
    from fedsynth.instructions import one_line

    return one_line(text)


def blocks(text: str) -> str:
    from fedsynth.synthesis.augmentation import blocks_prompt

    return blocks_prompt([("fever", text), ("cough", HARMLESS)], labels=LABELS, wanted=LABELS)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_text_stays_on_its_line_of_a_prompt(prompt: str) -> None:
    ends = str.splitlines if "record" not in prompt else lambda text: text.split("\n")  # a record keeps rare line ends
    lines = len(ends(PROMPTS[prompt](HARMLESS)))
    found = {name: len(ends(PROMPTS[prompt](text))) for name, text in ATTACKS.items()}
    assert {name: count for name, count in found.items() if count != lines} == {}
