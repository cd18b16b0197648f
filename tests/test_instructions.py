"""An instruction and its response as one line, and back."""

import pytest

from fedsynth.instructions import ASK, asked, parse_record, record


def test_a_record_is_one_line_and_reads_back() -> None:
    line = record("what\nhelps ?", " rest \n and tea")
    assert line == "question: what helps ? answer: rest and tea"
    assert line.startswith(asked("what helps ?"))
    assert parse_record(line) == ("what helps ?", "rest and tea")


def test_what_a_model_writes_after_the_mark_reads_back_without_it() -> None:
    assert parse_record(record("a", "b").removeprefix(ASK)) == ("a", "b")


@pytest.mark.parametrize(
    "text", ["", "no mark", "question: answer: b", "question: a answer:", "question: a answer: \n"]
)
def test_half_a_record_is_none(text: str) -> None:
    assert parse_record(text) is None


def test_a_text_that_runs_on_is_read_up_to_the_next_instruction() -> None:
    assert parse_record("question: a answer: b question: c answer: d") == ("a", "b")
