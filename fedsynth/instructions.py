"""An instruction and its response as one line of text, and back, for any content."""

from __future__ import annotations

import re

ASK = "question:"
REPLY = " answer:"  # its blank belongs to it, as byte-level tokenizers would put it into the next token

# A text in a record has no line ends and no marks of its own. Two signs that hardly any text holds stand for them. No
# other text changes, backslashes included. Output of a model that never learnt the signs is not taken for them.
LINE_END = "\u240a"  # symbol for line feed
AS_IS = "\u241b"  # symbol for escape: the next character is itself, and no part of a mark
MARK = re.compile(f"{ASK.strip()}|{REPLY.strip()}")
SIGN = re.compile(f"[{LINE_END}{AS_IS}]")
WRITTEN = re.compile(f"{AS_IS}(.)| ?{LINE_END} ?", re.DOTALL)
NEXT = re.compile(rf"(?:^|\n)\s*{ASK}")  # a model that continues with another record begins a line


def asked(prompt: str) -> str:
    """The prompt that a model continues with the response."""
    return f"{ASK} {in_line(prompt)}{REPLY}"


def record(prompt: str, answer: str) -> str:
    """Instruction and response as one line, without a line end; `parse_record` gives them back.

    White space around a text is no part of it.

    >>> record("Name a fruit.", "An apple.")
    'question: Name a fruit. answer: An apple.'
    >>> parse_record(record("Two lines,\\nplease.", "One\\ntwo"))
    ('Two lines,\\nplease.', 'One\\ntwo')
    """
    return f"{asked(prompt)} {in_line(answer)}"


def parse_record(text: str) -> tuple[str, str] | None:
    """Instruction and response in a model's text after `ASK`; None if one of them is missing or a mark occurs twice.

    If the text continues with further instructions, it is read up to the first of them.
    """
    prompt, mark, answer = text.removeprefix(ASK).partition(REPLY)
    answer = answer.partition(ASK)[0]
    if not mark or ASK in prompt or REPLY in answer or not prompt.strip() or not answer.strip():
        return None
    return of_line(prompt), of_line(answer)


def parse_response(text: str) -> str:
    """The response in a model's text after `asked`: up to a line that begins a next instruction; "" for none.

    A mark within a line is the response's own: not every model that responds has learnt records.
    """
    return of_line(NEXT.split(text, maxsplit=1)[0])


def in_line(text: str) -> str:
    """A text in the form that a record holds."""
    held = SIGN.sub(lambda sign: AS_IS + sign[0], text.strip())
    held = MARK.sub(lambda mark: f"{mark[0][:-1]}{AS_IS}{mark[0][-1]}", held)
    # Blanks around the sign leave the words beside it the tokens that they have elsewhere.
    return held.replace("\n", f" {LINE_END} ")


def of_line(line: str) -> str:
    """The inverse of `in_line`; any other text stays as it is, without white space around it."""
    return WRITTEN.sub(lambda sign: sign[1] or "\n", line.strip()).strip()


def one_line(text: str) -> str:
    """A text in the form for a prompt that is only read: a line end would look like the next example."""
    return " ".join(text.split())
