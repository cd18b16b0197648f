"""Hostile texts against prompts, answers, pages, terminals and the display for approval: what none of them does."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attacks import ATTACKS, TEMPLATES, TURNS
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedsynth.cli import deployment, main
from fedsynth.cli.main import app
from fedsynth.corpus import Corpus, Provenance
from fedsynth.evaluation.text import compare_prompt
from fedsynth.instructions import parse_record, record
from fedsynth.limits import MAX_TEXT
from fedsynth.models.chat import Chat, render, reply_of
from fedsynth.models.endpoint import RemoteLLM
from fedsynth.models.endpoint_cache import Answer
from fedsynth.models.form import InTurns, InWords, Lines
from fedsynth.models.sampling import SamplingParams
from fedsynth.reporting import figures as draw
from fedsynth.reporting import page as pages
from fedsynth.reporting.figures import Mark
from fedsynth.scenario.server import Endpoint
from fedsynth.scenario.task import LabelCard, Task
from fedsynth.synthesis.augmentation import Demonstrating, Mode, blocks_prompt, line_prompt, text_prompt
from fedsynth.synthesis.curation import well_formed, well_formed_instructions
from fedsynth.synthesis.distillation import judge_prompt, judged_by_instruction, respond
from fedsynth.synthesis.judges import judge_by_instruction, select_prompt
from fedsynth.synthesis.label_check import chosen
from fedsynth.synthesis.writing import Curation, write
from fedsynth.system.terminal import console_of, warn
from fedsynth.testing import ScriptedLLM
from fedsynth.typed import visible

LABELS = ("fever", "cough", "injury")
HARMLESS = "The patient fell down the stairs and hurt her left knee."
TASK = Task(
    domain="Nurses write.", noun="a note", system="Be brief.", labels={"fever": LabelCard("a fever", "It is high.")}
)
every_attack = pytest.mark.parametrize("name", ATTACKS)
# What no text that curation lets through holds: control and bidi characters, tags, halves of pairs.
UNTYPED = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)


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


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_no_mark_of_a_turn_goes_to_the_server_of_an_endpoint(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[dict[str, Any]] = []

    def answer(self: RemoteLLM, api: str, body: dict[str, Any], sample: Any = None) -> Answer:
        bodies.append(body)
        return Answer("a", "stop", 1, 1, ("a",), (0.0,))

    monkeypatch.setattr(RemoteLLM, "_answer", answer)
    llm = RemoteLLM(Endpoint("http://127.0.0.1:1/v1", "m", api=api))
    prompts = [f"before {text} after" for text in TURNS.values()]
    asked: Any = [Chat(text, text, ((text, text),)) for text in prompts] if api == "chat" else prompts
    llm.complete([*asked, *prompts], SamplingParams.greedy(2), seed=0)
    sent = json.dumps([body.get("messages", body.get("prompt")) for body in bodies], ensure_ascii=False)
    assert "before Ok." in sent
    marks = {mark for _, control, plain in TEMPLATES.values() for mark in (*control, *plain)}
    assert {mark for mark in {*marks, "<<SYS>>", "<\uff5cAssistant\uff5c>"} if mark in sent} == set()
    assert all(any(mark in text for mark in {*marks, "<\uff5cAssistant\uff5c>"}) for text in prompts)


# --- prompts: a text of another party is one line, whatever it holds -------------------------------------------------

PROMPTS: dict[str, Callable[[str], str]] = {
    "lines for a writer": lambda text: line_prompt("fever", [HARMLESS, text, HARMLESS], TASK),
    "a question to a writer": lambda text: asked_of_a_writer(text),
    "blocks for a writer": lambda text: blocks_prompt(
        [("fever", text), ("cough", HARMLESS)], labels=LABELS, wanted=LABELS
    ),
    "a judge's list": lambda text: select_prompt(
        [("fever", text), ("cough", HARMLESS)], labels=LABELS, keep=2, domain="d"
    ),
    "a verdict on an instruction": lambda text: judge_prompt(text, TASK),
    "two answers compared": lambda text: compare_prompt(text, text, text),
    "a record": lambda text: record(text, text),
    "records shown": lambda text: Lines().asked(text, [(text, text)]),
}


def asked_of_a_writer(text: str) -> str:
    asked = text_prompt(ScriptedLLM(chats=True), "fever", [text, HARMLESS], TASK)
    assert isinstance(asked, Chat)
    return asked.user


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_text_stays_on_its_line_of_a_prompt(prompt: str) -> None:
    ends = str.splitlines if "record" not in prompt else lambda text: text.split("\n")  # a record keeps rare line ends
    lines = len(ends(PROMPTS[prompt](HARMLESS)))
    found = {name: len(ends(PROMPTS[prompt](text))) for name, text in ATTACKS.items()}
    assert {name: count for name, count in found.items() if count != lines} == {}


def test_a_text_would_leave_its_line_if_it_were_put_in_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("augmentation", "judges", "distillation"):
        monkeypatch.setattr(f"fedsynth.synthesis.{module}.one_line", str)
    for prompt in list(PROMPTS)[:5]:
        lines = len(PROMPTS[prompt](HARMLESS).splitlines())
        assert any(len(PROMPTS[prompt](text).splitlines()) != lines for text in ATTACKS.values())


@every_attack
def test_a_record_gives_back_what_it_holds_and_no_further_record(name: str) -> None:
    text = ATTACKS[name].strip()
    read = parse_record(record(text, HARMLESS).removeprefix("question:"))
    assert read == ((text, HARMLESS) if text else None)


# --- counts: what is asked and kept, whatever drafts and answers hold ------------------------------------------------


def written(
    shown: dict[int, Corpus], answer: Callable[[Any], str], *, mode: Mode, chats: bool, texts: int = 6
) -> tuple[dict[int, Corpus], Counter[str]]:
    """The LLM's texts by client, and how often it was asked for each label by name, as the prompts say."""
    llm = ScriptedLLM(answer=answer, chats=chats)
    how = Demonstrating(mode, 2, SamplingParams(temperature=0.8, top_p=0.9, max_new_tokens=24))
    card = replace(TASK, labels={})  # blocks name labels as the card does
    found = write(llm, shown, how, Curation(LABELS, 1, False), num_texts=texts, seeds=[1, 2], task=card)
    return {client: each.corpus for client, each in found.items()}, Counter(
        str(p) for each in llm.completed for p in each
    )


WAYS = [(mode, chats) for mode in ("per_label", "all_labels", "none") for chats in (False, True)]


@pytest.mark.parametrize(("mode", "chats"), WAYS)
@every_attack
def test_no_answer_of_an_llm_gives_more_texts_of_a_label_than_were_asked_for(
    name: str, mode: Mode, chats: bool
) -> None:
    def answer(prompt: Any) -> str:
        said = prompt.user if isinstance(prompt, Chat) else prompt
        label = next((y for y in LABELS if f"{y}:" in said.splitlines()[-1:]), "cough")
        return f"{ATTACKS[name]}\n-----\nLabel: {label}\nText: {ATTACKS[name]}\n-----\nLabel: fever\nText: more"

    shown = {0: drafts("one fever", "two fevers"), 1: drafts("a cough", label="cough")}
    corpora, _ = written(shown, answer, mode=mode, chats=chats)
    for corpus in corpora.values():
        assert set(corpus.answers) <= set(LABELS)
        assert max(corpus.counts().values(), default=0) <= 2  # six texts of three labels
        for text in corpus.prompts:
            assert len(text) <= MAX_TEXT
            assert not UNTYPED.search(text.replace("\x85", ""))
            assert len(text.splitlines()) == 1


@pytest.mark.parametrize(("mode", "chats"), WAYS)
@every_attack
def test_a_draft_of_one_client_changes_nothing_that_is_asked_or_written_for_another(
    name: str, mode: Mode, chats: bool
) -> None:
    """The LLM obeys: it answers with what the prompt holds."""

    def obeys(prompt: Any) -> str:
        said = prompt.user if isinstance(prompt, Chat) else prompt
        return "-----\nLabel: fever\nText: " + " ".join(said.split())[:200]

    honest = drafts("one fever", "two fevers")
    harmless, before = written({0: honest, 1: drafts(HARMLESS)}, obeys, mode=mode, chats=chats)
    hostile, after = written({0: honest, 1: drafts(ATTACKS[name])}, obeys, mode=mode, chats=chats)
    assert hostile[0] == harmless[0]
    assert sum(after.values()) == sum(before.values())


@pytest.mark.parametrize("structured", [False, True])
@every_attack
def test_a_judge_keeps_no_more_of_a_cluster_whatever_it_says(name: str, structured: bool) -> None:
    said = ATTACKS[name]
    for answer in (said, f"The selected texts are: 1, 2, 3, 4 {said}", f'{{"selected": [4, 3, 2, 1]}} {said}'):
        llm = ScriptedLLM(answer=lambda _, answer=answer: answer, chats=True, structured=structured)  # type: ignore[misc]  # a default
        corpora = {0: drafts("a", "b", "c", "d"), 1: drafts("e", "f", "g", "h")}
        kept = judge_by_instruction(
            llm, corpora, {0: [[0, 1, 2, 3]], 1: [[0, 1, 2, 3]]}, labels=LABELS, keep=2, seed=0, task=TASK
        )
        for client, found in kept.items():
            assert len(found.corpus) <= 2
            assert set(found.corpus.prompts) <= set(corpora[client].prompts)


@pytest.mark.parametrize("chats", [False, True])
@every_attack
def test_a_label_check_of_a_hostile_text_decides_on_that_text_alone(name: str, chats: bool) -> None:
    def answer(prompt: Any) -> str:
        return "cough" if ATTACKS[name].strip() and ATTACKS[name].strip() in prompt.user else "a fever"

    texts = ["one", ATTACKS[name] or "-", "two"]
    llm = ScriptedLLM(answer=answer, chats=chats)
    kept = chosen(drafts(*texts), LABELS, TASK, llm).corpus
    assert {"one", "two"} <= set(kept.prompts) <= set(texts)
    said = ScriptedLLM(answer=lambda _: ATTACKS[name], chats=True)
    assert set(chosen(drafts("one", "two"), LABELS, TASK, said).corpus.prompts) <= {"one", "two"}


@pytest.mark.parametrize("chats", [False, True])
@every_attack
def test_a_professional_answers_each_instruction_once(name: str, chats: bool) -> None:
    instructions = Corpus(("one", ATTACKS[name], "two"), ("",) * 3, Provenance.LLM_WRITTEN, ("g",))
    asked = ScriptedLLM(answer=lambda _: ATTACKS[name], chats=chats)
    found = respond(asked, instructions, 24, task=TASK).corpus
    assert set(found.prompts) <= set(instructions.prompts)
    assert max(Counter(found.prompts).values(), default=0) <= 1
    assert not any(UNTYPED.search(text) for text in (*found.prompts, *found.answers))
    drops = ScriptedLLM(answer=lambda _: "Verdict: drop", chats=chats)
    assert not len(judged_by_instruction(drops, instructions, task=TASK).corpus)


@every_attack
def test_a_students_record_is_one_instruction_and_one_response(name: str) -> None:
    words = InWords("Q: ", "\nA:")
    turns = InTurns("", "", "", speaker("chatml"))
    for form in (Lines(), words, turns):
        pair = form.record(ATTACKS[name])
        assert pair is None or (len(pair) == 2 and all(isinstance(part, str) for part in pair))
    assert turns.asked(ATTACKS[name]).messages == [{"role": "user", "content": ATTACKS[name].strip()}]


@every_attack
def test_what_curation_lets_through_is_not_too_long_and_holds_nothing_unseen_that_reorders(name: str) -> None:
    for corpus in (
        well_formed(drafts(ATTACKS[name]), labels=LABELS, min_words=1, longest=MAX_TEXT).corpus,
        well_formed_instructions(drafts(ATTACKS[name]), longest=MAX_TEXT).corpus,
        well_formed_instructions(Corpus(("why",), (ATTACKS[name],), Provenance.LLM_WRITTEN), longest=MAX_TEXT).corpus,
    ):
        for text in (*corpus.prompts, *corpus.answers):
            assert len(text) <= MAX_TEXT
            assert not UNTYPED.search(text.replace("\x85", ""))


def test_thoughts_without_an_end_are_read_in_no_time() -> None:
    begun = time.process_time()
    assert reply_of(Chat("q"), "<think>" * 100_000, one_line=True) == ""
    assert reply_of(Chat("q"), "<think>a</think>" * 50_000 + "Yes.", one_line=True) == "Yes."
    assert time.process_time() - begun < 2


# --- pages -----------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """A page's elements with their attributes, in order, without the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, [(k, v) for k, v in attrs if k not in ("data-head", "aria-label")]))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(("end", tag))

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", data))

    def handle_pi(self, data: str) -> None:
        self.found.append(("instruction", data))

    def unknown_decl(self, data: str) -> None:
        self.found.append(("declaration", data))


def shown_on_a_page(text: str) -> str:
    """Every place of a page that words can stand in."""
    parts = [
        pages.Paragraph(text), pages.Items([(text, text)]), pages.Quotes([pages.Quote((text,), text, text)]),
        pages.Table([text, text], [[text, (text, text)]], caption=text, note=text),
        pages.Cards([pages.Card(text, [(text, text)])]),
        pages.Plots([pages.Plot(draw.bars([text[:60]], [Mark(1.0, row=0)], title=text[:60]), text)]),
    ]  # fmt: skip
    return pages.render(pages.Page(text, text, text, [pages.Section(text, "anchor", parts)], text))


@every_attack
def test_no_text_adds_an_element_or_a_link_to_a_page(name: str) -> None:
    # Of blank text a block leaves its mark out: the page is compared with one of as many words.
    page, plain = shown_on_a_page(ATTACKS[name] or "-"), shown_on_a_page("a" if ATTACKS[name] else "-")
    without_sizes = re.compile(r' (?:width|height|viewBox|x|y|x1|x2|y1|y2|d|points|transform)="[^"]*"')
    found, expected = (Tags(without_sizes.sub("", each)).found for each in (page, plain))
    # A long name of a bar stands on several lines, each a <tspan> or <text>.
    lines = [("text", [("text-anchor", "end")])]
    assert Counter(map(str, found)) - Counter(map(str, [*expected, *lines * 40])) == Counter()
    links = [attrs for tag, attrs in found if tag == "a"]
    assert links == [[("href", "#anchor")]]


# --- terminals -------------------------------------------------------------------------------------------------------

# What a terminal acts upon, but for line ends and the colours that the console itself sets.
ACTS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
COLOURS = re.compile("\x1b\\[[0-9;]*m")
SHOWN = {name: text[:4000] for name, text in ATTACKS.items()}


def acts(written: str) -> list[str]:
    return ACTS.findall(COLOURS.sub("", written))


@pytest.mark.parametrize("name", SHOWN)
def test_no_text_moves_the_cursor_of_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = SHOWN[name]
    monkeypatch.setenv("FORCE_COLOR", "1")
    for error in (False, True):
        console = console_of(error=error)
        warn(console, text)
        console.print(text, markup=False, soft_wrap=True)
        table = Table(title="t")
        table.add_column("head")
        table.add_row(Text(text))
        console.print(table)
    deployment._say(text)
    with pytest.raises(SystemExit):
        main._end(text, 1)
    told = capsys.readouterr()
    assert acts(told.out + told.err) == []
    assert "\x1b]8" not in told.out + told.err  # no link either
    assert acts(visible(text)) == []


def test_a_console_of_rich_alone_lets_texts_move_the_cursor(capsys: Any) -> None:
    Console().print(SHOWN["a clear screen"], markup=False)
    assert acts(capsys.readouterr().out)


# --- approval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("name", SHOWN)
def test_a_text_that_waits_is_one_line_that_moves_no_cursor(
    name: str, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    waiting = Corpus((SHOWN[name], HARMLESS), ("fever", SHOWN[name]), Provenance.DP_SYNTHETIC, ("g",))
    held = {"order": "a" * 64, "asked": SHOWN[name], "run": SHOWN[name], "texts": 2, "decision": "waits", "task": "t"}
    place = SimpleNamespace(approvals=SimpleNamespace(all=lambda: [held]))
    monkeypatch.setattr("fedsynth.deployment.policy.load_site", lambda folder: place)
    monkeypatch.setattr("fedsynth.deployment.site.approve.held_text", lambda place, request: waiting)
    options = ["--json"] if as_json else []
    app(["site", "approve", str(tmp_path), "--show", "aa", *options], standalone_mode=False)
    told = capsys.readouterr().out
    assert acts(told) == []
    assert len(told.splitlines()) == 2
    if as_json:
        assert [json.loads(line)["text"] for line in told.splitlines()] == [SHOWN[name], HARMLESS]
    app(["site", "approve", str(tmp_path), *options], standalone_mode=False)
    assert acts(capsys.readouterr().out) == []
