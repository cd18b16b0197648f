"""The 5-gram that a pretrained model must beat is a real one."""

import numpy as np
import pytest

from tests.benchmarks import benchmark

KneserNey = benchmark("ngram").KneserNey


def windows_after(model, context: list[int]) -> np.ndarray:
    base = model.base
    head = 0
    for token in ([model.vocabulary] * (model.order - 1) + context)[-(model.order - 1) :]:
        head = head * base + token
    return head * base + np.arange(model.vocabulary)


@pytest.mark.parametrize("context", [[], [1], [1, 2], [3, 3, 3], [0, 1, 2, 3]])
def test_the_probabilities_of_the_next_token_add_up_to_one(context):
    rng = np.random.default_rng(0)
    model = KneserNey([rng.integers(0, 5, 8).tolist() for _ in range(40)], vocabulary=5, order=3)
    assert model.probabilities(windows_after(model, context)).sum() == pytest.approx(1.0)


def test_a_bigram_worked_out_by_hand():
    # Lines "a b" and "a c"; start mark S. Bigrams: S a (2), a b (1), a c (1): n1 = 2, n2 = 1, D = 2 / 4.
    # Continuations: a after {S}, b after {a}, c after {a}: 1 each of 3; n1 = 3, n2 = 0: D = 1, so that all is uniform.
    model = KneserNey([[0, 1], [0, 2]], vocabulary=3, order=2)
    after_a = model.probabilities(windows_after(model, [0]))
    assert after_a == pytest.approx([0.5 * 2 / 2 / 3, 0.5 / 2 + 0.5 / 3, 0.5 / 2 + 0.5 / 3])


def test_repetition_is_learnt_and_held_out_text_costs_more_than_training_text():
    lines = [[1, 2, 3, 4, 0]] * 50 + [[2, 1, 4, 3, 0]] * 50
    model = KneserNey(lines, vocabulary=6)
    assert model.nats_per_token(lines) < 0.25
    assert model.nats_per_token([[5, 5, 5, 5, 5]]) > 2


def test_too_long_ngrams_are_refused():
    with pytest.raises(ValueError, match="63 bits"):
        KneserNey([[1]], vocabulary=1 << 14, order=5)
