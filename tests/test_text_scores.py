"""Scores of written answers by hand."""

import math
from collections.abc import Sequence

import pytest

from fedsynth.evaluation.text import (
    Pairwise,
    Verdict,
    compare_prompt,
    instruction_scores,
    llm_judge,
    pairwise,
    parse_verdict,
    reference_judge,
)
from fedsynth.testing import ScriptedLLM


def test_scores_of_fields_by_hand() -> None:
    found = instruction_scores(
        ["Cardiology; urgent; ABC", "x; y", "one field", "a; b; c"],
        ["cardiology ;  URGENT;abc", "x; z", "one field; more", "b; a"],
    )
    assert found["exact_match"] == 1 / 4  # the first alone: a further field is not exact
    assert found["field_match"] == pytest.approx((1 + 1 / 2 + 1 + 0) / 4)  # place by place: a and b swapped are wrong
    # ROUGE-L: 1; one of two words on both sides; two words of two and of three; b or a of three and of two.
    assert found["rouge_l"] == pytest.approx((1 + 1 / 2 + 4 / 5 + 2 / 5) / 4)


def test_a_planted_last_field_does_not_count_among_the_compared() -> None:
    truth, answers = ["a; b; secret 17"], ["a; b; another 4"]
    assert instruction_scores(truth, answers)["exact_match"] == 0.0
    found = instruction_scores(truth, answers, compared=2)
    assert (found["exact_match"], found["field_match"]) == (1.0, 1.0)
    assert found["rouge_l"] == 2 * 2 / 8  # of the whole texts
    assert instruction_scores(truth, ["a"], compared=2)["field_match"] == 0.5  # a missing field is wrong


def test_no_example_is_zero_and_bad_arguments_are_refused() -> None:
    assert instruction_scores([], []) == {"exact_match": 0.0, "field_match": 0.0, "rouge_l": 0.0}
    with pytest.raises(ValueError, match="got 1 answers for 2 references"):
        instruction_scores(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="compared must be at least 1, got 0"):
        instruction_scores(["a"], ["a"], compared=0)
    with pytest.raises(ValueError, match="fields"):
        instruction_scores(["a"], ["a"], fields="")


def prefers(better: dict[str, Verdict | None]):
    """A judge that gives one verdict for each (answer, other answer)."""

    def judge(prompts: Sequence[str], one: Sequence[str], other: Sequence[str]) -> list[Verdict | None]:
        return [better[a + b] for a, b in zip(one, other, strict=True)]

    return judge


def test_both_orders_must_agree() -> None:
    # a beats b whatever the order; of c and d, and of e and f, the first in place wins; g ties once; h loses twice.
    judge = prefers(
        {"ab": "first", "ba": "second", "cd": "first", "dc": "first", "ef": "second", "fe": "second"}
        | {"gi": "first", "ig": "tie", "hj": "second", "jh": "first", "kl": "tie", "lk": "tie", "mn": None, "nm": "tie"}
    )
    found = pairwise(judge, ["x"] * 7, list("aceghkm"), list("bdfijln"))
    assert found == Pairwise(win=1, tie=4, lose=1, unreadable=1)
    assert found.wt == pytest.approx(5 / 6)


def test_win_tie_rate_without_a_verdict_is_not_a_number() -> None:
    assert math.isnan(Pairwise(0, 0, 0, unreadable=3).wt)


def test_a_pair_for_each_prompt() -> None:
    with pytest.raises(ValueError, match="got 1 and 2 for 2"):
        pairwise(prefers({}), ["x", "y"], ["a"], ["b", "c"])


def test_the_answer_closer_to_the_reference_wins_beyond_the_margin() -> None:
    references = ["a b c d", "a b c d", "a b c d"]
    first, second = ["a b c d", "a b x y", "a b c x"], ["a b x y", "a b c d", "a b c z"]
    assert pairwise(reference_judge(references), ["q"] * 3, first, second) == Pairwise(win=1, tie=1, lose=1)
    assert pairwise(reference_judge(references, margin=0.5), ["q"] * 3, first, second) == Pairwise(0, 3, 0)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Both are short, A is right.\nVerdict: A", "first"),
        ('verdict: A\nOn second thought:\nVerdict: "B".', "second"),
        ("**Verdict:** tie", "tie"),
        ("Verdict: Tie", "tie"),
        ("Verdict: a tie", "tie"),
        ("Verdict: Answer B, because", "second"),
        ("Verdict: a close call", None),
        ("Verdict: Both", None),
        ("A", None),
        ("", None),
    ],
)
def test_the_last_verdict_is_read(answer: str, verdict: Verdict | None) -> None:
    assert parse_verdict(answer) == verdict


def test_the_llm_judge_asks_in_both_orders_in_two_greedy_calls() -> None:
    # It says that the answer which holds "good" is the better one, and cannot be read on "odd".
    def answer(prompt: str) -> str:
        if "odd" in prompt:
            return "I cannot tell."
        one, other = (prompt.split(f"Answer {name}: ")[1].split("\n")[0] for name in "AB")
        return "Verdict: " + ("tie" if one == other else "A" if "good" in one else "B")

    llm = ScriptedLLM(answer=answer)
    found = pairwise(llm_judge(llm), ["p", "q", "r", "s"], ["good\nline", "bad", "x", "odd"], ["bad", "good", "x", "x"])
    assert found == Pairwise(win=1, tie=1, lose=1, unreadable=1)
    assert [len(prompts) for prompts in llm.completed] == [4, 4]
    assert {sampling.temperature for sampling, _ in llm.settings} == {0.0}
    assert llm.completed[0][0] == compare_prompt("p", "good line", "bad")
    assert llm.completed[1][0] == compare_prompt("p", "bad", "good line")
