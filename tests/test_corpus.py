from __future__ import annotations

import hashlib

import pytest

from fedsynth.corpus import Corpus, Provenance, alike, blank, pool, same, same_person, told_apart

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


def test_public_text_beside_released_text_takes_its_provenance_and_guarantee() -> None:
    public = Corpus(("a",), ("x",), PUBLIC)
    drafts = Corpus(("b",), ("y",), Provenance.DP_SYNTHETIC, grants=("g",))
    bare = Corpus(("b",), ("y",), Provenance.SELF_GENERATED)
    for pair in ([public, drafts], [drafts, public]):
        assert (pool(pair).provenance, pool(pair).grants) == (Provenance.DP_SYNTHETIC, ("g",))
    assert (pool([public, bare]).provenance, pool([public, bare]).grants) == (Provenance.SELF_GENERATED, ())
    with pytest.raises(ValueError, match="one provenance"):
        pool([public, drafts, bare])


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
        ("PAT\ufe0f003", "PAT003"),  # a variation selector
        ("PAT\U000e0101003", "PAT003"),  # another one
        ("PAT\u034f003", "PAT003"),  # a grapheme joiner
        ("a\u034f\u0308", "\u00e4"),  # which keeps a letter and its dots from being composed
        ("PAT\u180b003", "PAT003"),  # a Mongolian variation selector
        ("PAT\u3164003", "PAT003"),  # a Hangul filler, of which NFKC makes another one
        ("PAT\u115f003", "PAT003"),
        ("PAT\uffa0003", "PAT003"),  # of half width
        ("PAT\u2800003", "PAT003"),  # Braille without a dot
        ("PAT\x01003", "PAT003"),  # a control character
        ("PAT\x7f003", "PAT003"),
        ("PAT\U000e0041003", "PAT003"),  # a tag
        ("two\twords", "two\x1fwords"),  # control characters that are blanks
        ("no\u00a0break", "no break"),
        ("\u0130", "i\u0307"),  # dotted capital I
        ("\u1fb3", "\u1fbc"),  # alpha with iota below, small and capital
        ("a\u0301\u0323", "a\u0323\u0301"),  # accents in either order
    ],
)
def test_spellings_of_one_text_are_the_same(one: str, other: str) -> None:
    assert same(one) == same(other)


@pytest.mark.parametrize(
    ("typed", "corrected"),
    [
        *(("PAT-3", f"pat{dash}3") for dash in "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"),
        *(("O'Neil", f"o{mark}neil") for mark in "\u2018\u2019\u02bc\u2032\u0060\u00b4\uff07"),
        *(("PAT3", f"PAT{digit}") for digit in "\u0663\u0969\uff13"),
    ],
)
def test_a_dash_or_an_apostrophe_that_a_program_corrected_makes_no_other_person(typed: str, corrected: str) -> None:
    assert same_person(typed) == same_person(corrected)
    assert same_person("PAT3") != same_person("PAT-3") != same_person("PAT 3")


@pytest.mark.parametrize(
    ("one", "other"), [("a b", "ab"), ("caf\u00e9", "cafe"), ("pat-3", "pat3"), ("\u6302", "\u5931")]
)
def test_other_texts_are_not_the_same(one: str, other: str) -> None:
    assert same(one) != same(other)


# Of https://www.unicode.org/Public/16.0.0/ucd/DerivedCoreProperties.txt, and U+2800: first and last, hexadecimal.
IGNORABLE = (
    "ad 34f 61c 115f-1160 17b4-17b5 180b-180d 180e 180f 200b-200f 202a-202e 2060-2064 2065 2066-206f 2800 3164 "
    "fe00-fe0f feff ffa0 fff0-fff8 1bca0-1bca3 1d173-1d17a e0000 e0001 e0002-e001f e0020-e007f e0080-e00ff "
    "e0100-e01ef e01f0-e0fff"
)


def test_what_nobody_sees_makes_no_other_text_and_a_text_of_it_alone_is_blank() -> None:
    for each in IGNORABLE.split():
        first, last = (int(code, 16) for code in (each.split("-") * 2)[:2])
        for code in {first, (first + last) // 2, last}:
            assert same(f"PAT{chr(code)}003") == "pat003", hex(code)
            assert blank(f" {chr(code)} ")
    for code in (*range(0x20), *range(0x7F, 0xA0)):
        assert same(f"PAT{chr(code)}003") == ("pat 003" if chr(code).isspace() else "pat003"), hex(code)


def test_a_text_is_blank_where_nothing_of_it_is_left_to_compare() -> None:
    for code in range(0x20000):
        if not 0xD800 <= code < 0xE000:
            assert blank(chr(code)) == (same(chr(code)) == ""), hex(code)
    assert blank("")
    assert not blank("\ufe0fa")


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
