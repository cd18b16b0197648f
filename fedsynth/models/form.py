"""How an instruction and its response stand for a model: lines of a record, a card's words, or turns of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from fedsynth.instructions import ASK, REPLY, asked, in_line, of_line, one_line, parse_record, parse_response, record
from fedsynth.models.chat import Chat, Opening, Prompt, converses, turn_end
from fedsynth.models.encoding import LINE_END, token_ids
from fedsynth.scenario.task import Task
from fedsynth.typed import BadValue

if TYPE_CHECKING:
    from fedsynth.models.loading import Kind

Pair: TypeAlias = tuple[str, str]  # an instruction and its response
Learns: TypeAlias = Literal["record", "response"]


class Form(Protocol):
    """The form of instructions and responses for one model."""

    @property
    def in_turns(self) -> bool:
        """True if a model writes an instruction and its response in two calls: its turn ends after either."""
        ...

    def opening(self, shown: Sequence[Pair] = ()) -> Prompt:
        """What a model writes an instruction after.

        Args:
            shown: Records that stand before as demonstrations.
        """
        ...

    def asked(self, instruction: str, shown: Sequence[Pair] = ()) -> Prompt:
        """What a model writes the response after; `shown` as in `opening`."""
        ...

    def unasked(self) -> Prompt:
        """`asked` without an instruction."""
        ...

    def reply(self, response: str) -> str:
        """A response as the text that goes on after `asked`."""
        ...

    def response(self, text: str, *, shown: bool = False) -> str:
        """The response in a model's text after `asked`; "" for none.

        Args:
            text: The model's text.
            shown: There were demonstrations, so that the model may go on with a further record.
        """
        ...

    def instruction(self, text: str, longest: int) -> str | None:
        """The instruction in a model's text after `opening`; "" if it has not ended, None if it runs on.

        Args:
            text: The model's text.
            longest: The most tokens that it could have.
        """
        ...

    def record(self, text: str) -> Pair | None:
        """Instruction and response in a model's text after `opening`; None if one is missing. A turn has no response:
        there it is empty."""
        ...


@dataclass(frozen=True)
class Lines:
    """Records of one line each, `question: ... answer: ...` (`fedsynth.instructions`)."""

    @property
    def in_turns(self) -> bool:
        """As `Form`."""
        return False

    def opening(self, shown: Sequence[Pair] = ()) -> str:
        """As `Form`."""
        return self._before(shown) + ASK

    def asked(self, instruction: str, shown: Sequence[Pair] = ()) -> str:
        """As `Form`."""
        return self._before(shown) + asked(instruction)

    def unasked(self) -> str:
        """As `Form`."""
        return one_line(asked(""))

    def reply(self, response: str) -> str:
        """As `Form`."""
        return f" {in_line(response)}"

    def response(self, text: str, *, shown: bool = False) -> str:
        """As `Form`; after demonstrations the first line, as each of them is one."""
        return parse_response(text.strip().partition("\n")[0] if shown else text)

    def instruction(self, text: str, longest: int) -> str | None:  # noqa: ARG002 - of `Form`
        """As `Form`."""
        told, mark, _ = text.partition(REPLY)
        told = told.strip()
        if not mark or "\n" in told:
            return ""
        # An instruction's own words are no marks (`in_line`): this text ran on into the next record.
        return None if ASK in told else of_line(told)

    def record(self, text: str) -> Pair | None:
        """As `Form`."""
        return parse_record(text)

    def _before(self, shown: Sequence[Pair]) -> str:
        return "".join(f"{record(*pair)}\n" for pair in shown)


LINES = Lines()


@dataclass(frozen=True)
class InWords:
    """A card's words around an instruction, as text for a base model.

    Attributes:
        before: Words before the instruction.
        after: Words after it; they are not blank.
    """

    before: str
    after: str

    @property
    def in_turns(self) -> bool:
        """As `Form`."""
        return False

    def opening(self, shown: Sequence[Pair] = ()) -> str:
        """As `Form`."""
        return f"{self._shown(shown)}{self.before}".rstrip(" ")

    def asked(self, instruction: str, shown: Sequence[Pair] = ()) -> str:
        """As `Form`."""
        return f"{self._shown(shown)}{self.before}{instruction.strip()}{self.after}".rstrip(" ")

    def unasked(self) -> str:
        """As `Form`."""
        return self.asked("")

    def reply(self, response: str) -> str:
        """As `Form`."""
        return response.strip() if self.after.endswith("\n") else f" {response.strip()}"

    def response(self, text: str, *, shown: bool = False) -> str:
        """As `Form`: up to where the words of a next record begin, if these begin with words."""
        first = self.before.strip().partition("\n")[0] or (SHOWN if shown else "")
        return text.partition(first)[0].strip() if first else text.strip()

    def instruction(self, text: str, longest: int) -> str | None:  # noqa: ARG002 - of `Form`
        """As `Form`."""
        told, mark, _ = text.partition(self.after.strip())
        return told.strip() if mark else ""

    def record(self, text: str) -> Pair | None:
        """As `Form`."""
        told, _, answer = text.partition(self.after.strip())
        pair = told.strip(), self.response(answer)
        return pair if all(pair) else None

    def _shown(self, shown: Sequence[Pair]) -> str:
        return "".join(f"{self.asked(x)}{self.reply(y)}{SHOWN}" for x, y in shown)


SHOWN = "\n\n"  # parts demonstrations


@dataclass(frozen=True)
class InTurns:
    """A card's words around an instruction as the user's turn; the response is the model's.

    Attributes:
        before: Words before the instruction.
        after: Words after it.
        system: System prompt; "" for none.
        tokenizer: The model's, of which an instruction's length is known; None for a model that writes none.
    """

    before: str
    after: str
    system: str
    tokenizer: Any = field(default=None, compare=False, repr=False)

    @property
    def in_turns(self) -> bool:
        """As `Form`."""
        return True

    def opening(self, shown: Sequence[Pair] = ()) -> Opening:
        """As `Form`."""
        return Opening(self.before.rstrip(" "), self.system, self._shown(shown))

    def asked(self, instruction: str, shown: Sequence[Pair] = ()) -> Chat:
        """As `Form`."""
        return Chat(self._turn(instruction), self.system, self._shown(shown))

    def unasked(self) -> Chat:
        """As `Form`."""
        return self.asked("")

    def reply(self, response: str) -> str:
        """As `Form`."""
        return response.strip()

    def response(self, text: str, *, shown: bool = False) -> str:  # noqa: ARG002 - of `Form`
        """As `Form`."""
        return text.strip()

    def instruction(self, text: str, longest: int) -> str | None:
        """As `Form`. Words after the instruction end it; else the turn's end does, which no text shows."""
        if not self.after.strip() and len(token_ids(self.tokenizer, text)) >= longest:
            return ""
        return self._told(text)

    def record(self, text: str) -> Pair | None:
        """As `Form`."""
        told = self._told(text)
        return (told, "") if told else None

    def _told(self, text: str) -> str:
        words = self.after.strip()
        told, mark, _ = text.partition(words) if words else (text, "-", "")
        return told.strip() if mark else ""

    def _turn(self, instruction: str) -> str:
        return f"{self.before}{instruction.strip()}{self.after}"

    def _shown(self, shown: Sequence[Pair]) -> tuple[Pair, ...]:
        return tuple((self._turn(instruction), response.strip()) for instruction, response in shown)


def student_form(task: Task, tokenizer: Any) -> Form:
    """The form in which a client's model learns instructions: `task.templates.student`.

    Raises:
        BadValue: If the model, having no chat template, could not tell where an instruction ends.
    """
    if task.templates.student and not converses(tokenizer) and tokenizer.eos_token == LINE_END:
        raise BadValue(
            f"the model {tokenizer.name_or_path!r} ends each text with its line, so that it reads no other form than "
            "lines: leave task.templates.student out"
        )
    return _form(task, "student", chats=converses(tokenizer), tokenizer=tokenizer)


def professional_form(task: Task, *, chats: bool) -> Form:
    """The form in which a professional model is asked: `task.templates.professional`.

    Args:
        task: The card.
        chats: The model answers questions (`TextModel.chats`).

    Raises:
        BadValue: If a model without a chat template could not tell where an instruction ends.
    """
    return _form(task, "professional", chats=chats)


def _form(task: Task, name: Literal["student", "professional"], *, chats: bool, tokenizer: Any = None) -> Form:
    if not getattr(task.templates, name):
        return LINES
    before, after = task.around(name)
    if chats:
        return InTurns(before, after, task.system, tokenizer)
    if not after.strip():
        raise BadValue(
            f"task.templates.{name} ends with the instruction, and the model has no chat template that would end it: "
            'write words after it, as "\\nAnswer:", or name an instruct model'
        )
    return InWords(before, after)


def learnt_rows(
    tokenizer: Any, form: InWords | InTurns, pair: Pair, learns: Learns, kind: Kind
) -> tuple[list[int], list[int], int]:
    """Tokens that a model is given, those that it learns, and the token that ends these.

    Args:
        tokenizer: The model's.
        form: The form of the record.
        pair: Instruction and response.
        learns: The whole record, from the opening on, or the response.
        kind: The model's kind; a seq2seq model reads what it is given with its encoder.
    """
    from fedsynth.models.batches import given_rows  # brings torch, which forms do not need

    instruction, response = pair
    reply = form.reply(response)
    if kind == "seq2seq":
        assert isinstance(form, InWords)  # no chat template
        prompt = form.opening() if learns == "record" else form.asked(instruction)
        rest = form.asked(instruction).removeprefix(prompt) + reply if learns == "record" else reply
        return given_rows(tokenizer, [prompt], kind)[0], token_ids(tokenizer, rest.strip()), tokenizer.eos_token_id
    [before] = given_rows(tokenizer, [form.asked(instruction)], kind)
    body = [*before, *token_ids(tokenizer, reply)]
    start = len(before)
    if learns == "record":
        [opening] = given_rows(tokenizer, [form.opening()], kind)
        # The tokenizer may merge the opening's last characters with the instruction's first.
        start = next((i for i, (a, b) in enumerate(zip(opening, body, strict=False)) if a != b), len(opening))
    end = turn_end(tokenizer) if form.in_turns else None
    return body[:start], body[start:], tokenizer.eos_token_id if end is None else end
