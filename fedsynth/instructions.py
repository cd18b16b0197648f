"""An instruction and its response as one line of text, and back."""

from __future__ import annotations

ASK = "question:"
REPLY = " answer:"  # its blank belongs to it, as byte-level tokenizers would put it into the next token


def asked(prompt: str) -> str:
    """What a model goes on from with the response."""
    return f"{ASK} {one_line(prompt)}{REPLY}"


def record(prompt: str, answer: str) -> str:
    """Instruction and response as one line, without a line end."""
    return f"{asked(prompt)} {one_line(answer)}"


def parse_record(text: str) -> tuple[str, str] | None:
    """Instruction and response of what a model wrote after `ASK`; None where one of them is missing.

    A text that goes on with further instructions is read up to the first of them.
    """
    prompt, mark, answer = text.removeprefix(ASK).partition(REPLY)
    answer = answer.partition(ASK)[0]
    if not mark or not prompt.strip() or not answer.strip():
        return None
    return one_line(prompt), one_line(answer)


def parse_response(text: str) -> str:
    """The response in what a model wrote after `asked`: up to a next instruction; "" for none."""
    return one_line(text.partition(ASK)[0])


def one_line(text: str) -> str:
    """A text as it stands in a prompt: a line end would look like the next example."""
    return " ".join(text.split())
