"""Words of any script, and ROUGE-L against its definition."""

import random
import unicodedata

import pytest

from fedsynth.rouge import nearest, rouge_l, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat, the  cat's\n3.5 mg!", ["the", "cat", "the", "cat", "s", "3", "5", "mg"]),
        ("snake_case e-mail", ["snake", "case", "e", "mail"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("ﬁne \uff26\uff55\uff4c\uff4c x²", ["fine", "full", "x2"]),
        ("Ёлка, ΌΔΟΣ ὁδός", ["ёлка", "όδοσ", "ὁδόσ"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are marks: \w+ of `re` would cut the words at each
        ("كِتَاب جديد", ["كِتَاب", "جديد"]),
        ("我爱你abc\uff0c42号", ["我", "爱", "你", "abc", "42", "号"]),
        ("カード・ゲーム", ["カ", "ー", "ト\u3099", "ケ\u3099", "ー", "ム"]),
        ("한국어 문장", ["한국어", "문장"]),  # Korean has blanks
        ("ไป123", ["ไ", "ป", "123"]),
        ("inter\u00adnational می\u200cخواهم", ["international", "میخواهم"]),  # noqa: RUF001 - Persian
        ("I ❤\ufe0f 1\ufe0f\u20e3 🙂 you", ["i", "1", "you"]),
        ("", []),
        (" -- \u200b…", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == [unicodedata.normalize("NFKC", word) for word in expected]


def test_composed_and_decomposed_letters_are_the_same_word() -> None:
    assert words("Café") == words("CAFE\u0301") == ["café"]


def test_rouge_by_hand() -> None:
    # "the cat on the mat" is common, 5 of 6 and 5 of 5 words: precision 1, recall 5/6.
    assert rouge_l("The cat sat on the mat.", "the cat, on the mat") == pytest.approx(2 * (5 / 6) / (1 + 5 / 6))
    assert rouge_l("a b c d", "d c b a") == 2 / 8  # order counts: one word in common
    assert rouge_l("a b", "A, B!") == 1.0
    assert rouge_l("a b", "c d") == 0.0


def test_texts_without_words_are_like_nothing() -> None:
    assert rouge_l("", "") == rouge_l("", "a") == rouge_l("a", "--") == 0.0
    assert nearest(["a", ""], []) == [0.0, 0.0]
    assert nearest([], ["a"]) == []


def by_definition(one: list[str], other: list[str]) -> float:
    """F1 of the longest common subsequence by the usual table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one, start=1):
        for j, b in enumerate(other, start=1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    common = table[-1][-1]
    precision, recall = common / max(1, len(one)), common / max(1, len(other))
    return 2 * precision * recall / (precision + recall) if common else 0.0


def sentences(number: int, longest: int, vocabulary: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(vocabulary)}" for _ in range(draw.randint(0, longest))) for _ in range(number)]


@pytest.mark.parametrize(("longest", "vocabulary"), [(12, 5), (30, 400), (150, 30)])  # also beyond a machine word
def test_nearest_is_the_largest_of_all_references(longest: int, vocabulary: int) -> None:
    texts, references = sentences(25, longest, vocabulary, 1), sentences(20, longest, vocabulary, 2)
    expected = [max(by_definition(t.split(), r.split()) for r in references) for t in texts]
    assert nearest(texts, references) == pytest.approx(expected, abs=1e-12)
    assert nearest(texts[:1], references[:1]) == [rouge_l(texts[0], references[0])]


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, references = sentences(20, 15, 10, 3), sentences(7, 15, 10, 4)
    whole = nearest(texts, references)
    monkeypatch.setattr("fedsynth.rouge.BLOCK", 15)
    assert nearest(texts, references) == whole


def test_a_copy_is_found_wherever_it_stands() -> None:
    references = sentences(500, 20, 1000, 5)
    assert nearest([references[123].upper() + "!"], references) == [1.0]
