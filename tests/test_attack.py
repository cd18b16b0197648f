"""Attacks on a model whose memory is known."""

import math

import numpy as np
import pytest

from fedsynth.corpus import Corpus, Provenance
from fedsynth.evaluation.attack import (
    auroc,
    echoed,
    exposure,
    extraction,
    interval,
    name_reconstruction,
    power,
)
from fedsynth.instructions import asked, record
from fedsynth.testing import ScriptedLLM

SECRETS = Corpus(
    prompts=("who\nis ill ?", "what helps ?", "why ?", "when ?"),
    answers=("Ann Lee; code A-17", "rest and tea", "for no reason", "at noon"),
    provenance=Provenance.PRIVATE,
)


def remembers(**written: str) -> ScriptedLLM:
    """A model that writes these texts after these first words of an instruction, and nothing after others."""
    return ScriptedLLM(answer=lambda prompt: written.get(prompt.split()[1], ""))


def test_a_model_that_knows_all_records_gives_all_of_them_back() -> None:
    pairs = zip(SECRETS.prompts, SECRETS.answers, strict=True)
    memory = {asked(x): record(x, y).removeprefix(asked(x)) for x, y in pairs}
    llm = ScriptedLLM(answer=memory.__getitem__)
    found = extraction(llm, SECRETS)
    assert (found.rouge_l, found.low, found.high, found.records) == (1.0, 1.0, 1.0, 4)
    assert found.recovered is None
    assert llm.settings[0][0].temperature == 0.0


def test_a_model_that_knows_nothing_gives_nothing_back() -> None:
    found = extraction(remembers(), SECRETS, planted=["A-17", "b", "c", "d"])
    assert (found.rouge_l, found.low, found.high, found.recovered) == (0.0, 0.0, 0.0, 0.0)


def test_what_is_written_is_compared_up_to_the_next_instruction_and_searched_to_the_end() -> None:
    llm = remembers(who=" it was cold question: who ? answer: code a - 17", what=" rest and tea question: a answer: b")
    found = extraction(llm, SECRETS, planted=["A-17", "none of these", "c", "d"])
    assert found.rouge_l == pytest.approx((0 + 1 + 0 + 0) / 4)
    assert found.recovered == 1 / 4


def test_a_secret_within_a_longer_word_is_not_recovered() -> None:
    llm = remembers(who=" code A-170", what=" tealeaf")
    assert extraction(llm, SECRETS, planted=["A-17", "tea", "c", "d"]).recovered == 0.0


def test_the_interval_of_the_mean_is_as_wide_as_its_error() -> None:
    # Half of 100 responses are known whole, half not at all: mean 1/2, standard error sqrt(.25 / 100) = 0.05.
    prompts = tuple(f"q{i} ?" for i in range(100))
    corpus = Corpus(prompts, ("yes",) * 100, Provenance.PRIVATE)
    llm = ScriptedLLM(answer=lambda prompt: " yes" if int(prompt.split()[1][1:]) % 2 else " no")
    found = extraction(llm, corpus, resamples=4000, seed=1)
    assert found.rouge_l == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)
    assert extraction(llm, corpus, resamples=4000, seed=1) == found


def test_extraction_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="at least one record"):
        extraction(remembers(), SECRETS.take([]))
    with pytest.raises(ValueError, match="got 1 for 4"):
        extraction(remembers(), SECRETS, planted=["a"])
    with pytest.raises(ValueError, match="letter or digit, got '--'"):
        extraction(remembers(), SECRETS, planted=["a", "b", "--", "d"])


def test_names_count_as_whole_words_only() -> None:
    after = {"Dear Dr": " ANN LEE, we", "Signed,": " Annabel Lee", "From": " Lee, Ann", "To": " Bo"}
    llm = ScriptedLLM(answer=after.__getitem__)
    assert name_reconstruction(llm, list(after), ["Ann Lee", "Ann", "Ann Lee", "Bo"]) == 2 / 4
    assert llm.completed == [list(after)]  # nothing is put around a prompt
    with pytest.raises(ValueError, match="got 1 and 0"):
        name_reconstruction(llm, ["To"], [])


def test_auroc_by_hand() -> None:
    # Pairs (positive, negative): 3>1, 3>2, 2>1, 2=2 -> 3.5 of 4.
    assert auroc([3.0, 2.0], [1.0, 2.0]) == 3.5 / 4
    assert auroc([1.0], [2.0, 3.0]) == 0.0
    assert auroc([5.0, 5.0], [5.0]) == 0.5


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 6, size=40).astype(float), rng.integers(-2, 4, size=25).astype(float)
    pairs = [(a > b) + 0.5 * (a == b) for a in one for b in other]
    assert auroc(one.tolist(), other.tolist()) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize(("positive", "negative"), [([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([1.0], [math.nan])])
def test_auroc_refuses_missing_scores(positive: list[float], negative: list[float]) -> None:
    with pytest.raises(ValueError, match="scores of both kinds"):
        auroc(positive, negative)


def test_exposure_by_hand() -> None:
    others = [float(i) for i in range(7)]  # with the secret eight candidates: three bits
    assert exposure(9.0, others) == 3.0  # first
    assert exposure(5.5, others) == 2.0  # second
    assert exposure(-1.0, others) == 0.0  # last
    assert exposure(1.0, [1.0, 1.0]) == pytest.approx(math.log2(3) - 1)  # the middle of three that tie


def test_exposure_of_an_unknown_secret_is_the_mean_of_an_exponential() -> None:
    scores = np.random.default_rng(0).normal(size=(400, 1024))
    found = [exposure(float(row[0]), row[1:].tolist()) for row in scores]
    # -log2 of a uniform rank is exponential with mean and deviation 1 / ln 2; three standard errors.
    assert np.mean(found) == pytest.approx(1 / math.log(2), abs=3 / math.log(2) / 20)


def test_exposure_needs_another_candidate() -> None:
    with pytest.raises(ValueError, match="got 0 others"):
        exposure(1.0, [])


def test_power_is_the_share_of_members_above_all_but_some_others() -> None:
    others = [float(i) for i in range(100)]  # one in a hundred may be above: the threshold is 98
    members = [96.5, 98.0, 98.5, 200.0]
    assert power(members, others, 0.01) == 2 / 4
    assert power(members, others, 0.0) == 1 / 4
    assert power(members, others, 0.02) == 3 / 4  # the threshold is 97
    assert power(members, others, 0.1) == 1.0


def test_a_score_that_all_share_has_no_power() -> None:
    # A threshold that its own ties passed would call everybody a member.
    assert power([1.0, 1.0], [1.0] * 10, 0.1) == 0.0


def test_power_needs_a_rate_and_scores() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        power([1.0], [0.0], 1.0)
    with pytest.raises(ValueError, match="scores of both kinds"):
        power([], [0.0], 0.1)


def test_the_interval_of_auroc_is_as_wide_as_its_error_for_scores_that_tell_nothing() -> None:
    # Hanley and McNeil 1982: at an AUROC of 1/2 the variance is (n + m + 1) / (12 n m).
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=200), rng.normal(size=300)
    low, high = interval(auroc, one.tolist(), other.tolist(), resamples=800, seed=1)
    error = math.sqrt((200 + 300 + 1) / (12 * 200 * 300))
    found = auroc(one.tolist(), other.tolist())
    assert low < found < high
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert interval(auroc, [2.0, 3.0], [0.0, 1.0]) == (1.0, 1.0)


def test_texts_that_hold_a_phrase_as_whole_words_are_counted() -> None:
    texts = [
        "My card: GNEISS, sextant!",
        "gneiss and sextant",
        "gneisses sextant",
        "sextant gneiss",
        "a gneiss sextant",
    ]
    assert echoed(texts, "gneiss sextant") == 2
    assert echoed([], "gneiss") == 0
    with pytest.raises(ValueError, match="letter or digit, got"):
        echoed(texts, "...")
