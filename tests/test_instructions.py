"""An instruction and its response as one line, and back."""

import random

import pytest
from typed_text import TYPED

from fedsynth.instructions import ASK, REPLY, asked, in_line, of_line, parse_record, parse_response, record


def test_a_record_is_one_line_and_reads_back() -> None:
    line = record("what\nhelps ?", " rest \n and tea")
    assert line == "question: what ␊ helps ? answer: rest  ␊  and tea"
    assert line.startswith(asked("what\nhelps ?"))
    assert parse_record(line) == ("what\nhelps ?", "rest \n and tea")


def test_a_text_without_marks_signs_and_line_ends_stands_there_as_it_is() -> None:
    for text in ("what helps ?", "two  blanks, a\ttab, a \\n and a \\", "answers: questions?", "心"):
        assert in_line(text) == text


def test_what_a_model_writes_after_the_mark_reads_back_without_it() -> None:
    assert parse_record(record("a", "b").removeprefix(ASK)) == ("a", "b")


@pytest.mark.parametrize("answer", TYPED)
def test_records_of_typed_texts_read_back(answer: str) -> None:
    for prompt in TYPED:
        line = record(prompt, answer)
        assert parse_record(line) == (prompt.strip(), answer.strip())
        assert parse_response(line.removeprefix(asked(prompt))) == answer.strip()
        assert "\n" not in line


PARTS = ["question:", " answer:", "answer:", "question", ":", "\n", "\r\n", "␊", "␛", " ", "  ", "\t", "a", "心", "\\n",
         "\\", "\u2028", "␊ ", " ␊"]  # fmt: skip


def test_a_record_reads_back_whatever_it_holds_but_for_white_space_around_it() -> None:
    rng = random.Random(0)
    for _ in range(5_000):
        prompt, answer = ("".join(rng.choice(PARTS) for _ in range(rng.randint(1, 7))) for _ in range(2))
        whole = prompt.strip(), answer.strip()
        line = record(prompt, answer)
        assert parse_record(line) == (whole if all(whole) else None)
        # A few-shot prompt is cut into its records at its line ends.
        assert f"{line}\n{line}\n".split("\n") == [line, line, ""]
        assert of_line(in_line(prompt)) == whole[0]


def test_a_scheme_without_signs_would_not_read_back() -> None:
    def naive(prompt: str, answer: str) -> str:
        return f"{ASK} {' '.join(prompt.split())}{REPLY} {' '.join(answer.split())}"

    lost = [(x, y) for x in TYPED for y in TYPED if parse_record(naive(x, y)) != (x.strip(), y.strip())]
    assert len(lost) > len(TYPED)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no mark",
        "question: answer: b",
        "question: a answer:",
        "question: a answer: \n",
        "question: a question: b answer: c",  # ran on before it was answered
        "question: a answer: b answer: c",
    ],
)
def test_half_a_record_and_one_with_a_mark_too_many_is_none(text: str) -> None:
    assert parse_record(text) is None


def test_a_text_that_runs_on_is_read_up_to_the_next_instruction() -> None:
    assert parse_record("question: a answer: b question: c answer: d") == ("a", "b")
    assert parse_response(" b\n question: c answer: d") == "b"
    assert parse_response("question: c answer: d") == ""


def test_a_response_that_no_record_taught_is_read_as_it_stands() -> None:
    said = " see part 1. question: was this useful? answer: yes\n- \\nu is a letter of LaTeX"
    assert parse_response(said) == said.strip()
