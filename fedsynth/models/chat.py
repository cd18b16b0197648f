"""A question in the form of a model's chat template, as tokens, and its answer without thoughts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

from fedsynth.models.encoding import LINE_END, token_ids
from fedsynth.typed import BadValue


@dataclass(frozen=True)
class Chat:
    """One turn that asks.

    Attributes:
        user: The question.
        system: How the model is to behave. Empty: as its template says by itself (SmolLM2 and Qwen have a default).
        shown: Earlier turns, each a question and its answer.
        schema: JSON schema of the answer, as text. For models that are `structured`: others do not read it.
    """

    user: str
    system: str = ""
    shown: tuple[tuple[str, str], ...] = ()
    schema: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """All turns, in the form of chat templates and endpoints."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [pair for asked, answer in self.shown for pair in (("user", asked), ("assistant", answer))]
        return [*system, *({"role": role, "content": text} for role, text in (*turns, ("user", self.user)))]


class Opening(Chat):
    """A turn of the user that the model itself writes on, after the words in `user`; they may be none."""


Prompt: TypeAlias = str | Chat  # text to go on after, or a question

# A template reads these, where it reads any: a text is too short for thoughts, and is the same on every day.
SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}

# Marks of turns, and of beginnings and ends, in the templates and tokenizers of published models.
MARKS = re.compile(
    "<[|\uff5c][^<>|\uff5c\n]{1,40}[|\uff5c]>|<(?:start|end)_of_turn>|\\[/?INST\\]|<</?SYS>>|</?s>"
    "|<(?:bos|eos|pad|unk)>"
)


def converses(tokenizer: Any) -> bool:
    """True if the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_asked(prompts: Sequence[Prompt], tokenizer: Any) -> None:
    """Refuses questions to a model without a chat template.

    Raises:
        BadValue: With the way out.
    """
    if not converses(tokenizer) and any(isinstance(prompt, Chat) for prompt in prompts):
        raise BadValue(
            f"the model {_name(tokenizer)!r} has no chat template, so that it cannot be asked a question: name an "
            "instruct model, or let it go on after a text"
        )


def render(chat: Chat, tokenizer: Any) -> list[int]:
    """A turn's tokens in the tokenizer's own chat template, up to where the model answers.

    They are those of `apply_chat_template`, and no BOS beyond the template's own. But the contents stay text: what they
    spell is no control token. Marks of turns that are no tokens (Mistral's "[INST]", Zephyr's "<|user|>") would be read
    as such in any text, so that a content that spells one gets a blank after its first sign. Where the template knows
    no system role, the system text stands before the user's.

    Raises:
        BadValue: If there is no template, or it does not show what the user says.
    """
    check_asked([chat], tokenizer)
    form = _form(tokenizer, bool(chat.system), len(chat.shown))
    if form is None:
        form, chat = _form(tokenizer, False, len(chat.shown)), _without_system(chat)
        assert form is not None  # only the system role is left out
    said = [unmarked(message["content"], form.marked) for message in chat.messages]
    contents = [slot.filled(said) for slot in form.slots]
    own, rows, marks = form.own, form.rows, form.marks
    if isinstance(chat, Opening):  # nothing of the template stands after what is written on
        if form.slots[-1].number != len(said) - 1:
            raise BadValue(f"the chat template of the model {_name(tokenizer)!r} does not end with what the user says")
        contents[-1] = replace(form.slots[-1], right=False).filled(said)
        own, rows = (*own[:-1], ""), (*rows[:-1], ())
        marks = [token for row in rows for token in row if token in form.control]
    text = "".join(before + content for before, content in zip(own, [*contents, ""], strict=True))
    whole = _with_control(tokenizer, text)
    if [token for token in whole if token in form.control] == marks:  # the template's own, and no other
        return whole
    row = list(rows[0])
    for content, after in zip(contents, rows[1:], strict=True):
        row += [*form.as_text(tokenizer, content), *after]
    return row


def _without_system(chat: Chat) -> Chat:
    """The same turns, with the system's text before the first user's."""
    if not chat.shown:
        return replace(chat, system="", user=f"{chat.system}\n\n{chat.user}")
    (asked, answer), *others = chat.shown
    return replace(chat, system="", shown=((f"{chat.system}\n\n{asked}", answer), *others))


def unmarked(text: str, marks: re.Pattern[str] = MARKS) -> str:
    """A text with a blank after the first sign of each mark: it is read as text then, by any tokenizer."""
    return marks.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", text)


def begins_in_thought(chat: Chat, tokenizer: Any) -> bool:
    """True if the template itself opens the model's thought, so that the model writes only its end."""
    if isinstance(chat, Opening):
        return False
    form = _form(tokenizer, bool(chat.system), 0) or _form(tokenizer, False, 0)
    return form is not None and form.own[-1].rstrip().endswith(OPEN)


@lru_cache(maxsize=32)
def turn_end(tokenizer: Any) -> int | None:
    """The control token that ends an answer in the chat template; None where it has none."""
    if not converses(tokenizer):
        return None
    turns = [{"role": "user", "content": "Asked"}, {"role": "assistant", "content": _ANSWER}]
    try:
        after = str(tokenizer.apply_chat_template(turns, tokenize=False, **SETTINGS)).rpartition(_ANSWER)[2]
    except Exception:  # a template may refuse with any error of its own; then `render` says so
        return None
    special, loose = _control(tokenizer, after)
    return next((token for token in _with_control(tokenizer, after) if token in special or token in loose), None)


OPEN, CLOSE = "<think>", "</think>"


def reply_of(prompt: Prompt, written: str, *, one_line: bool, in_thought: bool = False) -> str:
    """A model's answer to a prompt, cut from all that it wrote.

    A question gets the answer without the thoughts before it, and none where they do not end. With
    `one_line` the first line that is not blank remains.
    """
    text = written
    if isinstance(prompt, Chat):
        text = _without_thoughts(f"{OPEN}{text}" if in_thought else text)
    return next((line for line in text.split(LINE_END) if line.strip()), "") if one_line else text


def _without_thoughts(text: str) -> str:
    """A text without its thoughts. The time grows with its length alone: some models write thoughts without an end."""
    said, at = list[str](), 0
    while (begin := text.find(OPEN, at)) >= 0 and (end := text.find(CLOSE, begin)) >= 0:
        said.append(text[at:begin])
        at = end + len(CLOSE)
        while text[at : at + 1].isspace():
            at += 1
    rest = "".join([*said, text[at:]])
    rest = rest.rpartition(CLOSE)[2].lstrip() if CLOSE in rest else rest
    return "" if OPEN in rest else rest


def holds_line(text: str) -> bool:
    """True if a line that is not blank has ended."""
    return LINE_END in text.lstrip()


# The contents in whose place the template is read; blanks of their own show whether it trims them.
_ANSWER, _EDGE = "TheAnswerSaysThis", "\t \t"
_CONTENT = re.compile(r"TheMessage(\d+)SaysThis")
_ROLE = r"<\|[^<>|\s]+\|>"
_MARK = re.compile(rf"{_ROLE}|<</?[A-Z]+>>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class _Slot:
    """Where the template puts a content, and on which sides it trims it."""

    number: int
    left: bool
    right: bool

    def filled(self, contents: Sequence[str]) -> str:
        text = contents[self.number]
        text = text.lstrip() if self.left else text
        return text.rstrip() if self.right else text


@dataclass(frozen=True)
class _Form:
    """A template, read.

    Attributes:
        own: Its own text: before the first slot, between two, after the last.
        slots: One fewer.
        rows: Tokens of its own text.
        control: Tokens that the contents must not hold: id -> name.
        loose: Names of those that the tokenizer does not call special: it would take them for the token in any text.
        marks: Control tokens in its own text, in order.
        marked: Marks of turns that are no tokens.
    """

    own: tuple[str, ...]
    slots: tuple[_Slot, ...]
    rows: tuple[Sequence[int], ...]
    control: Mapping[int, str]
    loose: tuple[str, ...]
    marks: list[int]
    marked: re.Pattern[str]

    def as_text(self, tokenizer: Any, content: str) -> list[int]:
        """A content's tokens; a loose name is cut after its first character, and read as two texts."""
        cut = re.compile("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in self.loose) or "(?!)")
        ids = [token for part in cut.split(content) if part for token in token_ids(tokenizer, part)]
        return [token for token in ids if token not in self.control or token == tokenizer.unk_token_id]


@lru_cache(maxsize=128)
def _form(tokenizer: Any, system: bool, shown: int) -> _Form | None:
    """The template as it puts a turn after others; None where it refuses a system's text, or leaves it out.

    Raises:
        BadValue: If it does not show what the user says, or an earlier turn.
    """
    name = _name(tokenizer)
    turns = Chat("user", "system" if system else "", (("user", "answer"),) * shown).messages
    turns = [{**turn, "content": f"{_EDGE}TheMessage{number}SaysThis{_EDGE}"} for number, turn in enumerate(turns)]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **SETTINGS))
    except Exception as problem:  # a template may refuse with any error of its own
        if system:
            return None
        raise BadValue(f"the chat template of the model {name!r} cannot be used ({problem})") from problem
    parts = _CONTENT.split(text)
    found = list(map(int, parts[1::2]))
    if system and 0 not in found:
        return None
    if missing := set(range(len(turns))) - set(found):
        what = "does not show what the user says" if max(missing) == len(turns) - 1 else "leaves out earlier turns"
        raise BadValue(f"the chat template of the model {name!r} {what}: serve the model")
    own, slots = parts[::2], []
    for i, slot in enumerate(parts[1::2]):
        left, right = own[i].endswith(_EDGE), own[i + 1].startswith(_EDGE)
        own[i] = own[i].removesuffix(_EDGE)
        own[i + 1] = own[i + 1].removeprefix(_EDGE)
        slots.append(_Slot(int(slot), not left, not right))
    rows = tuple(tuple(_with_control(tokenizer, part)) for part in own)
    special, loose = _control(tokenizer, text)
    control = special | loose
    marks = [token for row in rows for token in row if token in control]
    names = set(_MARK.findall(text + tokenizer.get_chat_template())) - set(control.values())
    # The template may make the mark of a role out of its name: then each role has one, also those that are not shown.
    roles = [_ROLE] if any(name.startswith("<|") for name in names) else []
    marked = re.compile("|".join([*roles, *map(re.escape, sorted(names))]) or "(?!)")
    return _Form(tuple(own), tuple(slots), rows, control, tuple(loose.values()), marks, marked)


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _control(tokenizer: Any, text: str) -> tuple[dict[int, str], dict[int, str]]:
    """Tokens that the tokenizer calls special, and others of its own that the template names; id -> name."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number: str(token) for number, token in added.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    named = f"{tokenizer.get_chat_template()}{text}"
    others = {number: str(token) for number, token in added.items() if number not in special}
    return special, {number: name for number, name in others.items() if name.strip() and name in named}


def _with_control(tokenizer: Any, text: str) -> list[int]:
    row: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return row
