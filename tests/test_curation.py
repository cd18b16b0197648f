import re
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from typed_text import LABELS, LINES, SHAPED, SHARED, TYPED, cases, faq

from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import Learn
from fedsynth.federation.validation import Rejected, check_request
from fedsynth.limits import MAX_TEXT
from fedsynth.rouge import nearest
from fedsynth.synthesis import curation
from fedsynth.synthesis.curation import (
    Filtered,
    at_most,
    balance,
    clusters,
    deduplicate,
    novel,
    well_formed,
    well_formed_instructions,
    yields,
)
from fedsynth.synthesis.sentences import code_or_markup


def notes(*rows: tuple[str, str], provenance: Provenance = Provenance.DP_SYNTHETIC) -> Corpus:
    return Corpus(tuple(t for t, _ in rows), tuple(y for _, y in rows), provenance, grants=("g",))


def private() -> Corpus:
    return notes(("one two", "a"), provenance=Provenance.PRIVATE)


# --- well_formed ---


def test_texts_are_stripped_of_the_edges_that_fdkt_names() -> None:
    kept = well_formed(notes((" -._~/\\*|#one, two-three.#\n", "a")), labels=["a"], min_words=2)
    assert kept.corpus.prompts == ("one, two-three",)
    assert kept.dropped == {}


def test_a_text_that_no_client_would_take_is_dropped_and_counted() -> None:
    fits, over = "x " * (MAX_TEXT // 2 - 1) + "xx", "x " * (MAX_TEXT // 2) + "x"
    assert len(fits) == MAX_TEXT < len(over)
    kept = well_formed(notes((over, "a"), (fits, "a")), labels=["a"], min_words=1, longest=MAX_TEXT)
    assert (kept.corpus.prompts, kept.dropped) == ((fits,), {"too long": 1})
    assert well_formed(notes((over, "a")), labels=["a"], min_words=1).dropped == {}  # by its form it may stay
    check_request(Learn(1, kept.corpus), ["a"])
    with pytest.raises(Rejected, match="characters"):
        check_request(Learn(1, notes((over, "a"))), ["a"])
    pairs = well_formed_instructions(Corpus((over, "a", "a"), ("b", over, fits), Provenance.PUBLIC), longest=MAX_TEXT)
    assert (pairs.corpus.answers, pairs.dropped) == ((fits,), {"too long": 2})


@pytest.mark.parametrize(
    ("text", "label", "reason"),
    [
        ("one two three", "z", "unknown label"),
        ("one two\x07 three", "a", "control character"),
        ("one two\x85\x92 three", "a", "control character"),
        ("one two \ufffd three", "a", "replacement character"),
        ("one two \u202ethree", "a", "bidi or tag character"),
        ("one \u2067two\u2069 three", "a", "bidi or tag character"),
        ("one two three" + "".join(chr(0xE0000 + ord(c)) for c in "yes"), "a", "bidi or tag character"),
        ("one two\na: three\na: four", "a", "template marker"),
        ("one two\nthree", "a", None),
        ("one two\u2028three", "a", None),
        ("one two B: three", "a", None),  # an ordinary heading, or a time
        ("one two\na: three", "a", None),
        ("one\na: two\nb: three", "a", None),
        ("one two a b : three", "a", None),
        ("one - two", "a", "too short"),
        ("one two", "a", "too short"),
        ("...... one two ......", "a", "too short"),
        ("one two three four five six", "a", "too long"),
        ("one lab: three", "a", None),  # "b:" is the end of another word
        ("one two three", "a", None),
        ("naïve zwölf 三", "a", None),
    ],
)
def test_a_text_is_dropped_for_the_reason_that_is_named(text: str, label: str, reason: str | None) -> None:
    kept = well_formed(notes((text, label)), labels=["a", "b", "a b"], min_words=3, max_words=5)
    assert kept.dropped == ({} if reason is None else {reason: 1})
    assert len(kept.corpus) == (reason is None)


def form(texts: Sequence[str], labels: Sequence[str], known: Sequence[str]) -> Filtered:
    return well_formed(Corpus(tuple(texts), tuple(labels), Provenance.PUBLIC), labels=known, min_words=1)


def test_texts_of_people_pass_whatever_their_script_and_shape() -> None:
    for label in LABELS:
        kept = form(TYPED, [label] * len(TYPED), LABELS)
        assert kept.dropped == {}
        shaped = kept.corpus.prompts[len(LINES) :]
        assert shaped == tuple(text.strip() for text in SHAPED)  # a list keeps the dash of its first point
    corpus = Corpus(TYPED, TYPED[::-1], Provenance.PUBLIC)
    assert well_formed_instructions(corpus, answered=True).corpus == corpus


def test_a_filter_that_drops_line_ends_or_labels_with_a_colon_is_found_out() -> None:
    marker = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, LABELS)) + r")\s*:", re.IGNORECASE)
    assert sum(bool(re.search("[\x00-\x1f\u2028\u2029]", text)) for text in TYPED) > 8
    assert sum(bool(marker.search(text)) for text in TYPED) > 5


def test_words_are_those_of_the_script() -> None:
    texts = ("心が痛いので休む", "ผมปวดหัว", "어제 보낸 송금", "one two three")
    kept = well_formed(notes(*((t, "a") for t in texts)), labels=["a"], min_words=4)
    assert kept.corpus.prompts == texts[:2]
    assert kept.dropped == {"too short": 2}  # three words each


def test_signs_alone_are_one_word_and_stay_as_they_are() -> None:
    signs = ("👍", "?!", "...", "-", "---", "***", "~", "\\", "/ /")
    rows = notes(*((sign, "a") for sign in (*signs, " \n ")))
    assert well_formed(rows, labels=["a"], min_words=1).corpus.prompts == signs
    assert well_formed(rows, labels=["a"], min_words=2).dropped == {"too short": len(rows)}
    assert well_formed_instructions(rows).corpus.prompts == signs


@pytest.mark.parametrize("text", ["\u200b", "\u00ad\u2060", " \u200e\n\ufeff", "-\u200b"])
def test_what_nobody_sees_is_no_word(text: str) -> None:
    wanted = {} if "-" in text else {"too short": 1}
    assert well_formed(notes((text, "a")), labels=["a"], min_words=1).dropped == wanted
    assert well_formed_instructions(asked((text, "b"))).dropped == wanted


@pytest.mark.parametrize(
    ("text", "label", "dropped"),
    [
        ("Pain log\n3:05 worse\n3:20 better\n3:50 gone", "3", False),
        ("links\nhttp://a.example\nhttp://b.example", "http", False),
        ("bugs\nstd::string\nstd::map", "std", False),
        ("pain at night\n3: better\n3: worse", "3", True),
        ("pain at night\n3:\n\n3: better", "3", True),  # a prompt's line that nothing was written behind
        ("pain at night\n3:\tbetter\n3:\u00a0worse", "3", True),
        ("pain at night\na.b: x\naxb: y", "a.b", False),  # a label is no expression
    ],
)
def test_a_text_runs_on_only_in_lines_that_begin_as_a_prompt_does(text: str, label: str, dropped: bool) -> None:
    kept = well_formed(notes((text, label)), labels=[label], min_words=1)
    assert kept.dropped == ({"template marker": 1} if dropped else {})


def test_flags_that_are_written_with_tags_pass_and_hidden_words_behind_one_do_not() -> None:
    tags = {name: "".join(chr(0xE0000 + ord(c)) for c in name) for name in ("gbsct", "hi")}
    flag = f"\U0001f3f4{tags['gbsct']}\U000e007f"
    kept = well_formed(notes((f"from {flag}", "a"), (f"from {flag}{tags['hi']}", "a")), labels=["a"], min_words=1)
    assert kept.corpus.prompts == (f"from {flag}",)
    assert kept.dropped == {"bidi or tag character": 1}


# Rows of each file that `make test` looks at: the whole takes half a minute.
@pytest.mark.parametrize("every", [200, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no ../shared/data beside this checkout")
def test_no_text_of_real_data_is_dropped_by_form(every: int) -> None:
    for name, text, label in (
        ("banking77", "text", "label"),
        ("medical_abstracts", "text", "label"),
        ("public_dialogues", "text", "intent"),
        ("medquad", "answer", "question_type"),
    ):
        table = pd.read_parquet(SHARED / "data" / f"{name}.parquet", columns=[text, label])[::every].fillna("")
        texts, labels = table[text].astype(str).tolist(), table[label].astype(str).tolist()
        kept = form(texts, labels, sorted(set(labels)))
        assert kept.dropped.get("too short", 0) == sum(not t.strip() for t in texts)
        assert set(kept.dropped) <= {"too short"}
        assert sum(map(code_or_markup, texts)) <= len(texts) / 1000


@pytest.mark.skipif(not cases(), reason="no ../shared/cases beside this checkout")
def test_no_text_of_the_cases_is_dropped_by_form() -> None:
    for name, (texts, labels) in cases().items():
        assert form(texts, labels, sorted(set(labels))).dropped == {}, name
    rows = asked(*faq())
    assert well_formed_instructions(rows, answered=True).corpus == rows
    texts, labels = cases()["chinese"]
    assert well_formed(notes(*zip(texts, labels, strict=True)), labels=labels, min_words=10).dropped == {}


# --- sentences ---

CODE = (
    "def f(x):\n    return x + 1",
    "import numpy as np\nprint(np.zeros(3))",
    "for row in rows:\n    total += row.value",
    "function add(a, b) { return a + b; }",
    "const f = (x) => x * 2;",
    "if (x > 0) {\n  y = 1;\n} else {\n  y = 2;\n}",
    "public static void main(String[] args) {",
    '#include <stdio.h>\nint main() { printf("hi"); }',
    "SELECT name, age FROM patients WHERE age > 65",
    '{"label": "billing", "text": "where is my refund"}',
    '[{"a": 1}, {"a": 2}]',
    'here it is: "name": "Anna", "age": 41, "open": true',
    "<p>Dear team,</p>",
    '<a href="https://a.example">here</a>',
    "<?xml version='1.0'?>",
    "line one<br/>line two",
    "```\nanything\n```",
    "## Summary\nall is well",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "see [the page](https://a.example/x)",
    "\\begin{itemize}\\item rest\\end{itemize}",
    "body { color: red; }",
    "$ sudo apt install x",
    "try:\n    run()\nexcept ValueError:\n    pass",
)


@pytest.mark.parametrize("text", CODE)
def test_code_json_and_markup_are_dropped_where_sentences_are_asked_for(text: str) -> None:
    rows, wanted = notes((text, "a")), {"code or markup": 1}
    assert well_formed(rows, labels=["a"], min_words=1, sentences=True).dropped == wanted
    assert well_formed(rows, labels=["a"], min_words=1).dropped == {}
    assert well_formed_instructions(asked((text, "b")), sentences=True).dropped == wanted
    assert well_formed_instructions(asked(("b", text)), sentences=True).dropped == wanted


HONEST = (
    "a < b and b > c, so a<b>c holds",
    "write to <anna.b@clinic.example>, anna@b.example or see https://a.example/x?y=1&z=[2]#top",
    "Na = 140, K = 4.1; CRP: < 5; HbA1c = 7.2 %; BP 150/90 -> 140/85",
    "BP 150/90 => start amlodipine (5 mg); K+ ++, pain +/-",
    "- rest;\n- fluids;\n- paracetamol (500 mg);\n- review",
    "# of days: 3\n#1 problem: rent",
    'He said "pain": 3 of 10, then "none": 0.',
    "Dear <name>,\nyour order [7] (see page(s) 2) is {urgent}",
    "if (possible) call me; while waiting: rest; for the nurse: dose",
    "return to clinic in 2 weeks; import duties apply from May",
    "class of drug: statin\nfunction: liver ok\nprivate practice, static lung compliance (low)",
    "I select the card from the list and update the app set",
    "Subject: Re: order\nFrom: me\n>> quoted\n---\n***\n===",
    "the price is $20 or $ 15, see C:\\Users\\me and e.g.(this)",
    "x != y once",
    "*very* important, _really_; 50 % ~ half; i.e. 1|2",
)


@pytest.mark.parametrize("text", [*HONEST, *TYPED])
def test_sentences_lists_and_values_pass_where_sentences_are_asked_for(text: str) -> None:
    assert not code_or_markup(text)


REPEATED = (
    *"\n \t\r-|:<>([{\"'#*.,;=/\\$_a)&", "\n ", "\n-", "\n|", " -", "|---", "---|\n", "| ", "| \n", ":-", "SELECT ",
    "<a b", "<a ", "<a-", "<a>", '<a b="', "[x](", "a.b(", "x = y", "x =\n", "if (", "if(", "# ", '"a": ', '{"',
    "public ", "public\n", "static ", "function ", "def a(", "class a", "import a.", "a.", "return )", "for x in ",
    "if a", "try:\n", "a,", "\u2028",
)  # fmt: skip
BEGINNINGS = ("", "if ", "|", "<a", "function", "a = ")


def test_a_long_text_of_one_sign_or_word_is_looked_at_in_little_time() -> None:
    for part in REPEATED:
        for begin in BEGINNINGS if len(part) == 1 else ("",):
            started = time.process_time()
            code_or_markup(begin + part * 10_000 + "word")
            assert time.process_time() - started < 0.5, (begin, part)


def test_the_kept_rows_keep_their_order_provenance_and_grants_and_lost_labels_are_named() -> None:
    corpus = notes(("one two", "a"), ("one", "b"), ("three four", "a"), ("two", "a"), ("x", "b"))
    kept = well_formed(corpus, labels=["a", "b"], min_words=2)
    assert kept.corpus == notes(("one two", "a"), ("three four", "a"))
    assert kept.dropped == {"too short": 3}
    assert kept.lost == ("b",)


# --- deduplicate ---


def test_the_first_of_equal_texts_stays_whatever_case_space_and_label() -> None:
    corpus = notes(("One  two", "a"), ("one two", "a"), ("ONE TWO ", "b"), ("one two.", "a"))
    kept = deduplicate(corpus)
    assert kept.corpus.prompts == ("One  two", "one two.")
    assert kept.dropped == {"duplicate": 1, "duplicate under another label": 1}
    assert kept.lost == ("b",)


# --- balance ---


def test_at_most_per_label_rows_of_each_label_stay_in_order() -> None:
    corpus = notes(*((f"{y}{i}", y) for i in range(10) for y in "ab"), ("c0", "c"))
    kept = balance(corpus, per_label=3, seed=0)
    assert kept.corpus.counts() == {"a": 3, "b": 3, "c": 1}
    assert kept.dropped == {"beyond per_label": 14}
    rows = [corpus.prompts.index(t) for t in kept.corpus.prompts]
    assert rows == sorted(rows)
    assert kept == balance(corpus, per_label=3, seed=0)
    assert any(kept != balance(corpus, per_label=3, seed=s) for s in (1, 2, 3))


# --- clusters ---


@pytest.mark.parametrize(("rows", "size", "count"), [(1, 4, 1), (8, 4, 2), (9, 4, 3), (41, 4, 11), (5, 1, 5)])
def test_as_many_clusters_as_rows_over_size_rounded_up(rows: int, size: int, count: int) -> None:
    points = np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32)
    groups = clusters(points, size=size, seed=0)
    assert len(groups) == count
    assert all(groups)
    assert sorted(row for group in groups for row in group) == list(range(rows))


@pytest.mark.filterwarnings("error")
def test_equal_rows_leave_no_cluster_empty() -> None:
    points = np.array([[0.0, 0.0]] * 9 + [[5.0, 5.0]] * 3, dtype=np.float32)
    groups = clusters(points, size=3, seed=0)
    assert len(groups) == 4
    assert all(groups)
    assert sorted(row for group in groups for row in group) == list(range(12))
    assert [9, 10, 11] in groups  # the far ones stay together


def test_clusters_hold_what_lies_together_and_repeat_with_the_seed() -> None:
    centres = np.repeat(np.eye(4, dtype=np.float32) * 10, 5, axis=0)
    points = (centres + np.random.default_rng(1).normal(size=centres.shape, scale=0.1)).astype(np.float32)
    expected = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
    assert clusters(points, size=5, seed=3) == expected
    cloud = np.random.default_rng(2).normal(size=(60, 8)).astype(np.float32)
    assert clusters(cloud, size=4, seed=0) == clusters(cloud, size=4, seed=0)
    assert clusters(cloud, size=4, seed=0) != clusters(cloud, size=4, seed=1)


def test_no_rows_no_clusters() -> None:
    assert clusters(np.zeros((0, 3), dtype=np.float32), size=4, seed=0) == []


# --- all of them ---


def test_a_funnel_accounts_for_every_row() -> None:
    corpus = notes(("one two", "a"), ("one two", "a"), ("x", "b"), ("three four", "a"))
    formed = well_formed(corpus, labels=["a", "b"], min_words=2)
    distinct = deduplicate(formed.corpus)
    first, second = yields([("well formed", formed), ("distinct", distinct)])
    assert (first.name, first.before, first.after, first.dropped, first.lost) == (
        "well formed",
        4,
        3,
        {"too short": 1},
        ("b",),
    )
    assert (second.before, second.after) == (3, 2)


@pytest.mark.parametrize("step", [lambda c: well_formed(c, labels=["a"], min_words=1), well_formed_instructions])
def test_private_text_is_refused_where_it_would_come_in(step) -> None:
    with pytest.raises(ValueError, match="private corpus"):
        step(private())
    assert isinstance(step(notes(("one two", "a"))), Filtered)


@pytest.mark.parametrize("step", [deduplicate, lambda c: balance(c, per_label=1, seed=0), novel])
def test_a_later_step_leaves_private_text_private(step) -> None:
    found = step(private()).corpus  # so the next door refuses it
    assert len(found) > 0
    assert found.provenance is Provenance.PRIVATE


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 1"):
        clusters(np.zeros((3, 2), dtype=np.float32), size=0, seed=0)
    with pytest.raises(ValueError, match="per_label must be at least 1"):
        balance(notes(("x", "a")), per_label=0, seed=0)


def planted(groups: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around well separated centres, shuffled; row i lies around centre `owner[i]`."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(groups), each))
    centres = 20 * rng.normal(size=(groups, 8))
    return owner, (centres[owner] + 0.1 * rng.normal(size=(len(owner), 8))).astype(np.float32)


def test_many_rows_are_clustered_in_two_levels_with_the_same_promises(monkeypatch):
    monkeypatch.setattr(curation, "WHOLE", 100)
    monkeypatch.setattr(curation, "PART", 60)
    owner, rows = planted(groups=100, each=4)
    found = clusters(rows, size=4, seed=0)
    assert len(found) == 100
    assert sorted(row for group in found for row in group) == list(range(400))
    assert found == clusters(rows, size=4, seed=0) == sorted(found)
    assert all(group == sorted(group) for group in found)
    # Most of what lies together stays together: a share by chance would be below 2 %.
    pure = sum(len(group) for group in found if len({owner[row] for row in group}) == 1)
    assert pure > 0.6 * 400


def test_two_levels_give_every_equal_row_a_place(monkeypatch):
    monkeypatch.setattr(curation, "WHOLE", 10)
    monkeypatch.setattr(curation, "PART", 5)
    found = clusters(np.ones((30, 3), np.float32), size=4, seed=0)
    assert len(found) == 8
    assert sorted(row for group in found for row in group) == list(range(30))


@pytest.mark.parametrize(
    ("sizes", "wanted", "shares"),
    [([10, 10], 5, [3, 2]), ([1, 99], 25, [1, 24]), ([2, 2, 2], 6, [2, 2, 2]), ([1, 1, 8], 3, [1, 1, 1])],
)
def test_clusters_are_shared_out_by_size(sizes, wanted, shares):
    assert curation._shares(sizes, wanted) == shares


# --- instructions ---


def asked(*rows: tuple[str, str]) -> Corpus:
    return Corpus(tuple(x for x, _ in rows), tuple(y for _, y in rows), Provenance.LLM_WRITTEN, grants=("g",))


@pytest.mark.parametrize(
    ("prompt", "answer", "reason"),
    [
        ("one two three", "x", None),
        ("one two three", "", None),
        ("心が痛い", "", None),  # a word each
        ("one two", "x", "too short"),
        ("... ... ...", "x", "too short"),
        ("one two\nthree", "x\n\n- y", None),
        ("one two three", "x\x00", "control character"),
        ("one two \ufffd three", "x", "replacement character"),
        ("one two three", "x\u202e", "bidi or tag character"),
        ("one two question: three", "x", None),
        ("one two answer: three", "x", None),
        ("one two three", "answer: x", None),
    ],
)
def test_an_instruction_is_dropped_for_the_reason_that_is_named(prompt: str, answer: str, reason: str | None) -> None:
    kept = well_formed_instructions(asked((prompt, answer)), min_words=3)
    assert kept.dropped == ({} if reason is None else {reason: 1})


def test_instructions_without_response_are_dropped_where_one_is_needed() -> None:
    rows = asked(("one", "x"), ("two", " "))
    kept = well_formed_instructions(rows, answered=True)
    assert kept.corpus == rows.take([0])
    assert kept.dropped == {"no response": 1}
    assert kept.lost == ()


def test_an_instruction_like_an_earlier_kept_one_is_dropped() -> None:
    rows = asked(("a b c d", "1"), ("a b c e", "2"), ("A, b c d!", "3"), ("a x y e", "4"), ("e f g h", "5"))
    kept = novel(rows, 0.7)  # ROUGE-L of the second with the first: 3 of 4 words
    assert kept.corpus == rows.take([0, 3, 4])
    assert kept.dropped == {"like an earlier one": 1, "duplicate": 1}
    assert kept.lost == ()
    assert novel(rows, 0.76).corpus == rows.take([0, 1, 3, 4])
    assert novel(rows, 1.0).corpus == rows.take([0, 1, 3, 4])


def test_blocks_do_not_change_what_is_novel(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = asked(*((" ".join(rng.choice(list("abcdef"), 4)), "") for _ in range(60)))
    monkeypatch.setattr(curation, "COMPARED", 60)
    whole = novel(rows, 0.75)
    assert 1 < len(whole.corpus) < 60
    for block in (1, 7):
        monkeypatch.setattr(curation, "COMPARED", block)
        assert novel(rows, 0.75) == whole
    every = whole.corpus.prompts
    assert all(max(nearest([x], every[:i])) < 0.75 for i, x in enumerate(every))


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        novel(asked(("a", "")), threshold)


def test_the_first_rows_are_kept_and_the_others_counted() -> None:
    rows = Corpus(("a", "b", "c"), ("x", "y", "z"), Provenance.LLM_WRITTEN)
    assert at_most(rows, 2) == Filtered(rows.take([0, 1]), {"beyond 2": 1})
    assert at_most(rows, 3) == at_most(rows, 9) == Filtered(rows, {})
