from __future__ import annotations

import hashlib

import pytest

from fedsynth.corpus import Corpus, Provenance, alike, pool, same, told_apart

PUBLIC = Provenance.PUBLIC


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 for 2"):
        Corpus(("a", "b"), ("x",), PUBLIC)


@pytest.mark.parametrize("provenance", [p for p in Provenance if p is not Provenance.PRIVATE])
def test_units_stand_beside_private_text_only(provenance: Provenance) -> None:
    with pytest.raises(ValueError, match=f"this one is {provenance.value}"):
        Corpus(("a",), ("x",), provenance, units=("patient 1",))


def test_there_is_one_unit_per_example() -> None:
    with pytest.raises(ValueError, match="got 1 for 2"):
        Corpus(("a", "b"), ("x", "y"), Provenance.PRIVATE, units=(1,))


def test_take_keeps_order_repeats_and_origin() -> None:
    corpus = Corpus(("a", "b", "c"), ("x", "y", "z"), Provenance.LLM_WRITTEN, grants=("g",))
    taken = corpus.take(i for i in (2, 0, 2))
    assert (taken.prompts, taken.answers) == (("c", "a", "c"), ("z", "x", "z"))
    assert (taken.provenance, taken.grants) == (Provenance.LLM_WRITTEN, ("g",))
    assert len(taken) == 3


def test_take_moves_units_with_their_rows() -> None:
    corpus = Corpus(("a", "b", "c"), ("x", "y", "z"), Provenance.PRIVATE, units=("p", "q", "p"))
    assert corpus.take([1, 2]).units == ("q", "p")
    assert corpus.take([]).units == ()


def test_counts_are_by_answer() -> None:
    assert Corpus(("a", "b", "c"), ("x", "y", "x"), PUBLIC).counts() == {"x": 2, "y": 1}


def test_fingerprint_is_sha256_of_length_prefixed_parts() -> None:
    by_hand = bytes(7) + b"\x01a" + bytes(7) + b"\x02\xc3\xa4"  # "ä" has two bytes
    assert Corpus(("a",), ("ä",), PUBLIC).fingerprint() == hashlib.sha256(by_hand).hexdigest()


def test_fingerprint_sees_where_one_text_ends() -> None:
    texts = [(("ab", "c"), ("", "")), (("a", "bc"), ("", "")), (("a", "c"), ("b", "")), (("c", "ab"), ("", ""))]
    assert len({Corpus(p, a, PUBLIC).fingerprint() for p, a in texts}) == 4
    assert len({"".join((*p, *a)) for p, a in texts}) < 4  # plain joining confuses some of them


def test_pool_keeps_order_and_unites_grants() -> None:
    one = Corpus(("a",), ("x",), Provenance.LLM_WRITTEN, grants=("g", "h"))
    two = Corpus(("b",), ("y",), Provenance.LLM_WRITTEN, grants=("h", "i"))
    assert pool([one, two]) == Corpus(("a", "b"), ("x", "y"), Provenance.LLM_WRITTEN, grants=("g", "h", "i"))


def test_pool_refuses_mixed_provenance_and_nothing() -> None:
    private = Corpus(("a",), ("x",), Provenance.PRIVATE)
    with pytest.raises(ValueError, match=r"\['private', 'public'\]"):
        pool([Corpus((), (), PUBLIC), private])
    with pytest.raises(ValueError, match="at least one"):
        pool([])


def test_persons_of_two_sites_stay_two_units_in_a_pool() -> None:
    site = Corpus(("a", "b"), ("x", "y"), Provenance.PRIVATE, units=("patient 1", "patient 2"))
    units = pool([site, site]).units
    assert units is not None
    assert len(set(units)) == 4


def test_a_pool_has_units_only_if_all_its_corpora_have() -> None:
    with_units = Corpus(("a",), ("x",), Provenance.PRIVATE, units=("p",))
    assert pool([with_units, Corpus(("b",), ("y",), Provenance.PRIVATE)]).units is None


def test_a_pool_with_text_that_has_no_guarantee_has_none() -> None:
    granted = Corpus(("a",), ("x",), Provenance.LLM_WRITTEN, grants=("g",))
    ungranted = Corpus(("b",), ("y",), Provenance.LLM_WRITTEN)
    assert pool([granted, ungranted]).grants == ()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("PAT003", "pat003"),
        ("PAT003", " PAT003\t"),
        ("two  words", "two words"),
        ("caf\u00e9", "cafe\u0301"),  # one character; a letter and its accent
        ("\uff30\uff21\uff34\uff13", "pat3"),  # full-width
        ("\ufb01le", "FILE"),  # the ligature fi
        ("stra\u00dfe", "STRASSE"),
        ("a\u200bb", "ab"),  # a zero-width space
        ("\ufeffPAT003", "PAT003"),  # a byte order mark
        ("a\u00adb", "ab"),  # a soft hyphen
        ("\u202epat", "pat"),  # turned round
        ("no\u00a0break", "no break"),
        ("\u0130", "i\u0307"),  # dotted capital I
        ("\u1fb3", "\u1fbc"),  # alpha with iota below, small and capital
        ("a\u0301\u0323", "a\u0323\u0301"),  # accents in either order
    ],
)
def test_spellings_of_one_text_are_the_same(one: str, other: str) -> None:
    assert same(one) == same(other)


@pytest.mark.parametrize(
    ("one", "other"), [("a b", "ab"), ("caf\u00e9", "cafe"), ("pat-3", "pat3"), ("\u6302", "\u5931")]
)
def test_other_texts_are_not_the_same(one: str, other: str) -> None:
    assert same(one) != same(other)


def test_what_is_the_same_stays_so() -> None:
    for code in range(0x20000):
        if not 0xD800 <= code < 0xE000:
            once = same(chr(code))
            assert same(once) == once, hex(code)


@pytest.mark.parametrize(
    ("spellings", "said"),
    [
        (["PAT003", "PAT003 "], r"'PAT003' and 'PAT003\u0020'"),
        (["caf\u00e9", "cafe\u0301"], r"'cafe\u0301' and 'caf\u00e9'"),
        (["two words", "two  words"], r"'two \u0020words' and 'two words'"),
        (["PAT 003", "pat 003"], "'PAT 003' and 'pat 003'"),
        (["\u6302\u5931", "\u6302\u5931 "], "'\u6302\u5931' and '\u6302\u5931\\u0020'"),  # what is alike stays readable
        (["a\u200bb", "ab"], r"'ab' and 'a\u200bb'"),
        (["a\nb", "a b"], r"'a\u000ab' and 'a b'"),
        (["\U000e0041p", "p"], r"'p' and '\U000e0041p'"),
    ],
)
def test_spellings_are_shown_so_that_they_differ(spellings: list[str], said: str) -> None:
    [found] = alike([*spellings, "another"])
    assert told_apart(found) == said


def test_spellings_of_one_text_never_look_alike() -> None:
    signs = ["a", "A", "\u00e9", "e\u0301", "E\u0301", " ", "  ", "\u00a0", "\u200b", "\uff41", "\u00ad", "\n"]
    texts = [one + two + three for one in signs for two in signs for three in signs]
    found = alike(texts)
    assert len(found) > 10
    for group in found:
        shown = told_apart(group).split("' and '")
        assert len(set(shown)) == len(group)
        assert all(part.isprintable() for part in shown)
