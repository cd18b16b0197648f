"""Figures by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typed_text import LINES, faq

from fedsynth.clients.evaluate import _scored
from fedsynth.corpus import Corpus, Provenance
from fedsynth.evaluation.utility import paired_difference, scores
from fedsynth.instructions import ASK, SIGN, in_line, parse_response
from fedsynth.rouge import words


def test_scores_by_hand() -> None:
    found = scores(["a", "a", "b", "b"], ["a", "b", "b", "b"], ["a", "b", "c"])
    assert found["accuracy"] == 0.75
    # F1 of a: precision 1, recall 1/2 -> 2/3; of b: precision 2/3, recall 1 -> 4/5; c does not occur.
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_no_known_label_in_the_truth_is_zero_not_nan() -> None:
    assert scores(["z"], ["a"], ["a"]) == {"accuracy": 0.0, "macro_f1": 0.0}


def frame(gap: float, spread: float) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(5):
        for client in range(8):
            base = float(rng.uniform(0.4, 0.9))  # clients differ much more than arms do: pairing takes that out
            rows += [("local", seed, 1, client, "accuracy", base)]
            rows += [("fdkt", seed, 1, client, "accuracy", base + gap + spread * float(rng.normal()))]
    return pd.DataFrame(rows, columns=["arm", "seed", "round", "client", "metric", "value"])


def test_a_constant_gain_has_an_interval_of_width_zero() -> None:
    found = paired_difference(frame(0.1, 0.0), "fdkt", "local")
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (found.better, found.pairs) == (1.0, 40)


def test_the_interval_of_pure_noise_holds_zero_and_that_of_a_gain_does_not() -> None:
    nothing = paired_difference(frame(0.0, 0.05), "fdkt", "local")
    assert nothing.low < 0 < nothing.high
    assert paired_difference(frame(0.1, 0.05), "fdkt", "local").low > 0
    # 40 independent pairs: the standard error is .05 / sqrt(40), the interval about four of them wide.
    assert nothing.high - nothing.low == pytest.approx(4 * 0.05 / 40**0.5, rel=0.4)


def test_arms_without_common_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs of arms 'fdkt' and 'pooled'"):
        paired_difference(frame(0.1, 0.0), "fdkt", "pooled")


def test_arms_of_different_lengths_are_compared_in_their_own_last_rounds() -> None:
    values = {("long", 1): 0.1, ("long", 2): 0.9, ("short", 1): 0.5}
    rows = [(a, s, r, c, "accuracy", v) for (a, r), v in values.items() for s in (0, 1) for c in (0, 1)]
    metrics = pd.DataFrame(rows, columns=["arm", "seed", "round", "client", "metric", "value"])
    found = paired_difference(metrics, "long", "short")
    assert (found.mean, found.pairs) == (pytest.approx(0.4), 4)


# --- Responses of instructions ---


def figures(reference: str, response: str, world: str | None = None) -> dict[str, float]:
    client: Any = SimpleNamespace(world=world, simulated=False, test=Corpus(("x",), (reference,), Provenance.PRIVATE))
    return _scored(client, [response])


def test_a_response_to_peoples_text_is_measured_whole() -> None:
    assert figures("rest; tea", "rest; tea; and six more words of it")["rouge_l"] == pytest.approx(2 * 2 / (2 + 8))
    assert figures("rest; tea", "rest; tea")["rouge_l"] == 1.0
    assert figures("rest", "rest; tea")["rouge_l"] == pytest.approx(2 / 3)


def test_a_worlds_planted_reference_is_no_part_of_its_task() -> None:
    wanted = "renal ; kidney-pain ; scan"
    planted = f"{wanted} ; ref one two three four"
    assert figures(wanted, planted, world="hospitals") == figures(wanted, wanted)
    assert figures(wanted, planted)["rouge_l"] < 0.8  # of text of people it would be


@pytest.mark.parametrize("reference", [*LINES, *(answer for _, answer in faq())])
def test_a_model_that_gives_the_reference_word_for_word_is_right(reference: str) -> None:
    plain = not reference.startswith(ASK) and not SIGN.search(reference)
    # As an LLM says it that learnt records, and one that did not.
    for said in [in_line(reference)] + [reference] * plain:
        found = figures(reference, parse_response(f" {said}"))
        assert found["exact_match"] == 1.0
        assert found["rouge_l"] == (1.0 if words(reference) else 0.0)  # signs alone hold no word
