import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import Learn
from fedsynth.federation.validation import check_request
from fedsynth.limits import MAX_TEXT
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.task import Task
from fedsynth.strategies.fdkt import FDKT
from fedsynth.strategies.options import FDKTOptions
from fedsynth.synthesis.augmentation import (
    Augmented,
    Demonstrating,
    Mode,
    augment,
    bare_misfit,
    blocks_prompt,
    check_labels,
    line_prompt,
    misfit,
    parse_blocks,
    parse_line,
    turns,
)
from fedsynth.synthesis.curation import Filtered, clusters
from fedsynth.synthesis.judges import (
    LEAD_IN,
    judge_by_instruction,
    judge_by_likelihood,
    parse_selected,
    read_selected,
    select_prompt,
)
from fedsynth.testing import ScriptedLLM

LABELS = ("fever", "cough", "injury")
SAMPLING = SamplingParams(temperature=0.8, top_p=0.9, max_new_tokens=24)


def corpus(
    rows: list[tuple[str, str]], provenance: Provenance = Provenance.DP_SYNTHETIC, grants: tuple[str, ...] = ("g",)
) -> Corpus:
    return Corpus(tuple(t for t, _ in rows), tuple(y for _, y in rows), provenance, grants)


def drafts(per_label: int, site: int = 0, labels: tuple[str, ...] = LABELS) -> Corpus:
    return corpus([(f"site{site} {y} draft{i}", y) for i in range(per_label) for y in labels], grants=(f"g{site}",))


def ask(llm: ScriptedLLM, demonstrations: dict[int, Corpus], mode: Mode = "per_label", **options: Any) -> Any:
    asked = {"labels": LABELS, "texts": 6, "shots": 2, "sampling": SAMPLING, "seed": 1} | options
    labels, texts = asked["labels"], asked.pop("texts")
    wanted = dict.fromkeys(demonstrations, turns(labels, texts) if labels else [])
    how = Demonstrating(mode, asked.pop("shots"), asked.pop("sampling"))
    return augment(llm, demonstrations, how, wanted=wanted, **asked)


# --- templates ---


@pytest.mark.parametrize(
    ("render", "sentinels"),
    [
        (lambda: line_prompt("QQ1", ["QQ2", "QQ3"]), ["QQ1", "QQ2", "QQ3"]),
        (lambda: blocks_prompt([("QQ1", "QQ2")], labels=["QQ1", "QQ3"], wanted=["QQ4"]), ["QQ1", "QQ2", "QQ3", "QQ4"]),
        (lambda: blocks_prompt([], labels=["QQ1", "QQ2"], wanted=["QQ3"]), ["QQ1", "QQ2", "QQ3"]),
        (
            lambda: select_prompt([("QQ1", "QQ2"), ("QQ3", "QQ4")], labels=["QQ5"], keep=99, domain="QQ6"),
            ["QQ1", "QQ2", "QQ3", "QQ4", "QQ5", "QQ6", "99", "1.", "2.", LEAD_IN],
        ),
    ],
)
def test_every_placeholder_is_filled_and_no_domain_is_named(render: Callable[[], str], sentinels: list[str]) -> None:
    prompt = render()
    for sentinel in sentinels:
        assert sentinel in prompt
    assert not re.search(r"[{}]", prompt)  # as in FDKT's published AG News template
    assert not re.search(r"(?i)health|hospital|patient|bank|product|review|news|note", prompt)


def test_a_text_cannot_open_a_line_or_a_field_of_its_own() -> None:
    assert line_prompt("a", ["x\nb: y {z}"]) == "a: x b: y {z}\na:"
    assert blocks_prompt([("a", "x\n-----\nLabel: b")], labels=["a"], wanted=["a"]).count("\nLabel: ") == 1


def test_without_texts_a_line_prompt_is_the_label_alone() -> None:
    assert line_prompt("fever", []) == "fever:"


# --- parsers ---


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (" hot and cold", "hot and cold"),
        ("\n hot \ncough: dry", "hot"),
        (" \n ", None),
        ("", None),
    ],
)
def test_a_line_is_read_to_its_end(answer: str, text: str | None) -> None:
    assert parse_line(answer) == text


def test_blocks_are_read_and_the_others_counted() -> None:
    answer = """Sure, here they are:
-----
Label: fever
Text: hot and
 cold
-----
Label: fevr
Text: mistyped
-----
Text: no label
Label: cough
-------
 Label: cough
Text:
dry
-----
Label: injury
Text:
-----
Label: fever
Text: ran on
Label: cough
Text: without a line between
-----
Label: cough
Text: Label: this word and Text: are its own
"""
    found, dropped = parse_blocks(answer, LABELS)
    assert found == [("fever", "hot and cold"), ("cough", "dry"), ("cough", "Label: this word and Text: are its own")]
    # The greeting, the swapped fields and the empty text cannot be read.
    assert dropped == {"unreadable block": 3, "mistyped label": 1, "template marker": 1}


def test_the_parser_reads_what_the_template_shows() -> None:
    shown = [("fever", "hot"), ("cough", "dry")]
    prompt = blocks_prompt(shown, labels=LABELS, wanted=LABELS)
    assert parse_blocks(prompt.split("\n\n")[0], LABELS)[0] == shown


@pytest.mark.parametrize(
    ("answer", "rows"),
    [
        ("The selected texts are: 1, 3", [0, 2]),
        ("I think...\nthe selected texts are: [3,1]. Text 2 repeats 1.", [2, 0]),
        ("The selected texts are: 1, 2, and 4", [0, 1, 3]),
        ("The selected texts are: 1 and 4 (2 repeats 1)", [0, 3]),
        ("The selected texts are: 1\n2 is off-topic", [0]),
        ("The selected texts are: 0, 4, 5, 12, 1, 1", [3, 0]),  # out of range, and twice
        ("The selected texts are: none", []),
        ("The selected texts are: all good ones", None),
        ("1, 3", None),
        ("", None),
    ],
)
def test_selected_numbers_are_read_as_rows(answer: str, rows: list[int] | None) -> None:
    assert parse_selected(answer, 4) == rows


# --- augmentation ---


def test_per_label_prompts_show_shots_texts_of_one_label_and_labels_take_turns() -> None:
    llm = ScriptedLLM()
    demonstrations = drafts(5)
    result = ask(llm, {0: demonstrations})[0]
    (prompts,) = llm.completed
    members = set(zip(demonstrations.answers, demonstrations.prompts, strict=True))
    for prompt, label in zip(prompts, LABELS * 2, strict=True):
        *shown, last = prompt.split("\n")
        assert last == f"{label}:"
        assert len(shown) == 2
        assert {tuple(line.split(": ")) for line in shown} <= {m for m in members if m[0] == label}
    assert result == Augmented(
        corpus=Corpus(("a text",) * 6, LABELS * 2, Provenance.LLM_WRITTEN, ("g0",)), dropped={}, prompts=6, bare={}
    )


def shown_blocks(prompt: str) -> list[tuple[str, str]]:
    return parse_blocks(prompt.split("\n\n")[0], LABELS)[0]


def test_all_labels_prompts_show_exactly_shots_of_every_label() -> None:
    llm = ScriptedLLM(answer=lambda prompt: "-----\nLabel: fever\nText: hot\n-----\nLabel: cough\nText: dry\n-----")
    demonstrations = drafts(5)
    result = ask(llm, {0: demonstrations}, "all_labels", texts=7, shots=3)[0]
    (prompts,) = llm.completed
    assert len(prompts) == 3  # 7 texts, 3 labels each
    members = set(zip(demonstrations.answers, demonstrations.prompts, strict=True))
    for prompt in prompts:
        shown = shown_blocks(prompt)
        assert Counter(label for label, _ in shown) == dict.fromkeys(LABELS, 3)
        assert set(shown) <= members
    assert "each of these labels: fever.\n" in prompts[2]  # the seventh
    assert result.corpus.counts() == {"fever": 3, "cough": 2}  # the third prompt asks for no cough, and gets none
    assert result.corpus.provenance is Provenance.LLM_WRITTEN


def test_demonstrations_are_used_up_before_any_returns_and_none_stands_twice_in_a_prompt() -> None:
    llm = ScriptedLLM()
    ask(llm, {0: drafts(5, labels=("fever",))}, labels=("fever",), texts=10, shots=2)
    hands = [prompt.split("\n")[:-1] for prompt in llm.completed[0]]
    drawn = [text for hand in hands for text in hand]
    for start in range(0, 20, 5):
        assert len(set(drawn[start : start + 5])) == 5
    assert all(len(set(hand)) == 2 for hand in hands)  # also where a shuffle begins within a prompt: the third, ...
    assert drawn[:5] != drawn[5:10]


def test_all_sites_go_in_one_call_and_get_their_own_answers() -> None:
    llm = ScriptedLLM(answer=lambda prompt: " from " + " ".join(sorted(set(re.findall(r"site\d", prompt)))))
    result = ask(llm, {3: drafts(4, site=3), 1: drafts(4, site=1)})
    assert [len(prompts) for prompts in llm.completed] == [12]
    assert {site: set(a.corpus.prompts) for site, a in result.items()} == {1: {"from site1"}, 3: {"from site3"}}
    assert {site: a.corpus.grants for site, a in result.items()} == {1: ("g1",), 3: ("g3",)}
    assert llm.settings == [(replace(SAMPLING, one_line=True), 1)]


def test_a_sites_prompts_depend_on_the_seed_and_not_on_other_sites() -> None:
    llm = ScriptedLLM()
    for demonstrations, seed in (({1: drafts(9), 2: drafts(9)}, 1), ({2: drafts(9)}, 1), ({2: drafts(9)}, 2)):
        ask(llm, demonstrations, seed=seed)
    both, alone, reseeded = llm.completed
    assert both[6:] == alone
    assert alone != reseeded


def test_a_label_without_demonstrations_is_asked_for_by_name_and_counted() -> None:
    llm = ScriptedLLM()
    some = drafts(4, labels=("fever", "cough"))
    result = ask(llm, {0: some})[0]
    assert result.corpus.counts() == {"fever": 2, "cough": 2, "injury": 2}
    assert result.bare == {"injury": 2}
    assert [p for p in llm.completed[0] if p.endswith("injury:")] == ["injury:"] * 2

    llm = ScriptedLLM(answer=lambda p: "-----\nLabel: injury\nText: cut" if "Write one new text" in p else "")
    result = ask(llm, {0: some}, "all_labels")[0]
    assert (result.bare, result.prompts) == ({"injury": 2}, 4)
    assert result.corpus.counts() == {"injury": 2}
    for prompt in llm.completed[0]:
        assert ("these labels: injury." in prompt) != ("these labels: fever, cough." in prompt)


def test_without_demonstrations_the_text_is_public_and_only_names_are_shown() -> None:
    llm = ScriptedLLM()
    result = ask(llm, {0: drafts(5)}, "none")[0]
    assert llm.completed[0] == ["fever:", "cough:", "injury:"] * 2
    assert (result.corpus.provenance, result.corpus.grants, result.bare) == (Provenance.PUBLIC, (), {})


@pytest.mark.parametrize(
    ("source", "written"),
    [
        (Provenance.DP_SYNTHETIC, Provenance.LLM_WRITTEN),
        (Provenance.LLM_WRITTEN, Provenance.LLM_WRITTEN),
        (Provenance.SELF_GENERATED, Provenance.SELF_GENERATED),
        (Provenance.PUBLIC, Provenance.PUBLIC),
    ],
)
def test_the_text_has_the_guarantee_of_its_demonstrations(source: Provenance, written: Provenance) -> None:
    grants = ("g",) if source in (Provenance.DP_SYNTHETIC, Provenance.LLM_WRITTEN) else ()
    result = ask(ScriptedLLM(), {0: corpus([("hot", "fever")], source, grants)})[0]
    assert (result.corpus.provenance, result.corpus.grants) == (written, grants)


def test_an_empty_answer_gives_no_text() -> None:
    result = ask(ScriptedLLM(answer=lambda p: "" if p.endswith("cough:") else " x"), {0: drafts(3)})[0]
    assert result.corpus.counts() == {"fever": 2, "injury": 2}
    assert result.dropped == {"empty answer": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ("a:b",)}, "label 'a:b' cannot stand"),
        ({"labels": ("a", "a")}, "labels must be distinct"),
        ({"labels": ()}, "labels must be distinct"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(ScriptedLLM(), {0: drafts(3)}, **options)


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("", "is blank"),
        (" \t", "is blank"),
        ("\u200b", "is blank"),
        ("a:b", "holds a colon"),
        ("a\nb", "holds a line end"),
        ("a\n", "holds a line end"),
        ("\u6302\u5931 ", "ends with a blank"),
        (" a", "begins with a blank"),
        ("a  b", "holds two blanks in a row"),
        ("a\tb", r"holds white space that is no blank ('\t')"),
        ("a\u00a0b", r"holds white space that is no blank ('\xa0')"),
    ],
)
def test_a_label_that_stands_in_no_line_is_told_why(label: str, why: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_labels(["other", label])
    assert str(caught.value) == f"label {label!r} cannot stand in a prompt's line: it {why}"


@pytest.mark.parametrize("label", ["a b", "\u6302\u5931", "plan (old)", "a-b_c", "St\u00f6rung"])
def test_a_label_of_words_stands_in_a_line(label: str) -> None:
    check_labels([label])


# --- judges ---


JUDGES: dict[str, Any] = {"instruction": judge_by_instruction, "likelihood": judge_by_likelihood}


def judged(llm: ScriptedLLM, text: Corpus, groups: list[list[int]], judge: str, keep: int = 2) -> Filtered:
    return JUDGES[judge](llm, {0: text}, {0: groups}, labels=LABELS, keep=keep, seed=0)[0]


SIX = corpus([("t0", "fever"), ("t1", "cough"), ("t2", "fever"), ("t3", "injury"), ("t4", "cough"), ("t5", "injury")])


def test_the_instructed_judge_keeps_the_numbers_of_each_cluster() -> None:
    def answer(prompt: str) -> str:
        if "t4" in prompt:
            return "none of them is any good"
        return "The selected texts are: 3, 9, 1, 2" if "t0" in prompt else "The selected texts are: 1"

    llm = ScriptedLLM(answer)
    kept = judged(llm, SIX, [[0, 2, 5], [1], [3, 4]], "instruction")
    assert kept.corpus.prompts == ("t0", "t1", "t5")  # third and first of the first cluster; second is beyond two
    assert kept.dropped == {"beyond those selected": 1, "unreadable judgement": 2}
    assert kept.lost == ()
    assert "2. [fever] t2\n3. [injury] t5" in llm.completed[0][0]
    assert llm.settings[0][0].temperature == 0.0


def test_a_label_that_is_lost_whole_is_named() -> None:
    llm = ScriptedLLM(lambda prompt: "The selected texts are: 1")
    assert judged(llm, SIX, [[0, 1, 2], [3, 4, 5]], "instruction").lost == ("cough",)


def test_a_structured_judge_is_asked_for_json_and_held_to_its_numbers() -> None:
    llm = ScriptedLLM(lambda prompt: '{"selected": [3, 1]}', chats=True, structured=True)
    kept = judged(llm, SIX, [[0, 2, 5], [1, 3, 4]], "instruction")
    assert kept.corpus.prompts == ("t0", "t1", "t4", "t5")
    assert kept.dropped == {"beyond those selected": 2}
    [first, second] = llm.completed[0]
    assert first.user.endswith('Answer with JSON: {"selected": [the numbers of the texts you keep, or nothing]}.\n')
    assert "The selected texts are:" not in first.user
    asked = json.loads(second.schema)["properties"]["selected"]
    assert (asked["items"]["enum"], asked["maxItems"]) == ([1, 2, 3], 2)
    plain = ScriptedLLM(lambda prompt: "The selected texts are: 1", chats=True)
    judged(plain, SIX, [[0, 2, 5], [1, 3, 4]], "instruction")
    assert [prompt.schema for prompt in plain.completed[0]] == ["", ""]


@pytest.mark.parametrize(
    ("answer", "rows"),
    [
        ('{"selected": [3, 1, 3]}', [2, 0]),
        ('{"selected": []}', []),
        (' {"selected": [2]}\n', [1]),
        ('{"selected": [4]}', None),
        ('{"selected": [0]}', None),
        ('{"selected": [true]}', None),
        ('{"selected": [1.0]}', None),
        ('{"selected": ["1"]}', None),
        ('{"selected": 1}', None),
        ('{"selected": [1], "why": ""}', None),
        ('{"selected": [1', None),
        ("[1]", None),
        ("The selected texts are: 1", None),
        ("", None),
    ],
)
def test_a_structured_answer_is_of_its_schema_or_unreadable(answer: str, rows: list[int] | None) -> None:
    assert read_selected(answer, 3) == rows


def by_table(table: dict[tuple[str, str], float]) -> ScriptedLLM:
    """Scores (text, label) as the table says, any other pair at -9."""
    return ScriptedLLM(likelihood=lambda prompt, text: table.get((text.strip(), prompt.rstrip(":")), -9.0))


def test_the_likelihood_judge_drops_the_misplaced_the_repeated_and_the_unlikely() -> None:
    text = corpus(
        [
            ("hot all night long", "fever"),  # 0: -1
            ("Hot all night long", "fever"),  # 1: -2, says the same as 0
            ("a dry throat", "fever"),  # 2: likelier as cough
            ("cut on a thumb", "injury"),  # 3: -3
            ("broken toe", "injury"),  # 4: -4, the third of its cluster
            ("wheezing", "cough"),  # 5: alone
        ]
    )
    llm = by_table(
        {
            ("hot all night long", "fever"): -1,
            ("Hot all night long", "fever"): -2,
            ("a dry throat", "fever"): -1.5,
            ("a dry throat", "cough"): -1.4,
            ("cut on a thumb", "injury"): -3,
            ("broken toe", "injury"): -4,
            ("wheezing", "cough"): -8,
        }
    )
    kept = judged(llm, text, [[4, 3, 2, 1, 0], [5]], "likelihood")
    assert kept.corpus == text.take([0, 3, 5])
    assert kept.dropped == {
        "another label is likelier": 1,
        "near duplicate": 1,
        "beyond the best of its cluster": 1,
    }


def test_all_sites_are_scored_in_one_call() -> None:
    llm = ScriptedLLM(likelihood=lambda prompt, text: -float(text.strip()[1]))
    sites = {7: SIX, 2: SIX.take([5, 4])}
    kept = judge_by_likelihood(llm, sites, {7: [[0, 1, 2, 3, 4, 5]], 2: [[0, 1]]}, labels=LABELS, keep=1)
    assert llm.scored == [(6 + 2) * 3]
    assert {site: k.corpus.prompts for site, k in kept.items()} == {2: ("t4",), 7: ("t0",)}


def spoilt(seed: int) -> tuple[Corpus, np.ndarray, np.ndarray]:
    """40 texts of a label's own words; a quarter flipped in label, a quarter repeats of a clean one but for a word."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, str]] = []
    for i in range(20):
        label = LABELS[i % 3]
        rows.append((" ".join(f"{label}{w}" for w in rng.choice(60, size=9, replace=False)), label))
    flipped = [(text, LABELS[(LABELS.index(label) + 1) % 3]) for text, label in rows[:10]]
    rows = rows[10:] + flipped + [(text + " so", label) for text, label in rows[10:]]
    kind = np.array(["clean"] * 10 + ["flipped"] * 10 + ["repeat"] * 10)
    order = rng.permutation(len(rows))
    return corpus([rows[i] for i in order]), kind[order], np.array([hash_vector(rows[i][0]) for i in order])


def hash_vector(text: str) -> list[float]:
    """Counts of words, as a sentence embedding that places texts of like words together."""
    words = [f"{label}{w}" for label in LABELS for w in range(60)]
    return [float(text.split().count(word)) for word in words]


def noisy_reader(noise: float, seed: int = 0) -> ScriptedLLM:
    """Prefers the label whose words a text holds, by 1 nat, up to noise."""
    rng = np.random.default_rng(seed)
    return ScriptedLLM(likelihood=lambda prompt, text: (-4.0 + (prompt[:-1] in text)) + noise * float(rng.normal()))


def dropped_shares(llm: ScriptedLLM) -> dict[str, float]:
    gone: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for seed in range(5):
        text, kind, embeddings = spoilt(seed)
        groups = clusters(embeddings.astype(np.float32), size=4, seed=0)
        assert len(groups) == 8  # ceil(30 / 4)
        kept = judged(llm, text, groups, "likelihood", keep=6)
        stays = Counter(zip(kept.corpus.prompts, kept.corpus.answers, strict=True))
        assert not stays - Counter(zip(text.prompts, text.answers, strict=True))
        for row in range(len(text)):
            total[kind[row]] += 1
            gone[kind[row]] += stays[text.prompts[row], text.answers[row]] == 0
    return {k: gone[k] / total[k] for k in total}


def test_planted_flips_and_repeats_are_dropped_more_often_than_clean_texts() -> None:
    shares = dropped_shares(noisy_reader(0.4))
    # P(own label not the best): flipped 0.96, clean about 0.07; of a clean text and its repeat one is a repeat.
    assert shares["flipped"] > 0.8
    assert (shares["repeat"] + shares["clean"]) / 2 > 0.4
    pairs = shares["flipped"] - shares["clean"]
    assert pairs > 0.2


def test_the_test_of_planted_flips_catches_a_judge_that_scores_at_random() -> None:
    rng = np.random.default_rng(1)
    shares = dropped_shares(ScriptedLLM(likelihood=lambda prompt, text: float(rng.normal())))
    assert abs(shares["flipped"] - shares["clean"]) < 0.2


# --- both judges, and the door ---


@pytest.mark.parametrize("judge", ["instruction", "likelihood"])
def test_judges_refuse_private_text_broken_groups_and_unknown_labels(judge: str) -> None:
    with pytest.raises(ValueError, match="private corpus"):
        judged(ScriptedLLM(), corpus([("x", "fever")], Provenance.PRIVATE), [[0]], judge)
    for groups in ([[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4, 5], [5]], [[0, 1, 2, 3, 4, 6]]):
        with pytest.raises(ValueError, match="each of its 6 rows once"):
            judged(ScriptedLLM(), SIX, groups, judge)
    with pytest.raises(ValueError, match=r"not labels: \['flu'\]"):
        judged(ScriptedLLM(), corpus([("x", "flu")]), [[0]], judge)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        judged(ScriptedLLM(), SIX, [[0, 1, 2, 3, 4, 5]], judge, keep=0)


@pytest.mark.parametrize("mode", ["per_label", "all_labels", "none"])
def test_augmentation_refuses_private_text(mode: Mode) -> None:
    llm = ScriptedLLM()
    with pytest.raises(ValueError, match="private corpus"):
        ask(llm, {0: drafts(2), 1: corpus([("x", "fever")], Provenance.PRIVATE)}, mode)
    assert llm.completed == []


def test_a_judge_that_thinks_first_is_read_to_its_numbers() -> None:
    llm = ScriptedLLM()

    def answer(prompt: str) -> str:  # a token is a character here
        return f"{'Hm. ' * 40}The selected texts are: 2"[: llm.settings[-1][0].max_new_tokens]

    llm.answer = answer
    ask = partial(judge_by_instruction, llm, {0: SIX}, {0: [[0, 1, 2], [3, 4, 5]]}, labels=LABELS, keep=1, seed=0)
    assert ask()[0].dropped == {"unreadable judgement": 6}
    assert ask(max_new_tokens=200)[0].corpus.prompts == ("t1", "t4")
    assert [sampling.max_new_tokens for sampling, _ in llm.settings] == [64, 200]


def test_a_judges_longer_answer_leaves_less_room_for_texts() -> None:
    llm = ScriptedLLM(lambda prompt: "The selected texts are: 1", context=900)
    ask = partial(judge_by_instruction, llm, {0: SIX}, {0: [[0, 1, 2, 3, 4, 5]]}, labels=LABELS, keep=1, seed=0)
    assert "too long" not in "".join(ask()[0].dropped)
    least = len(llm.completed[0][0])
    assert least + 64 <= 900
    assert sum(n for why, n in ask(max_new_tokens=900 - least + 1)[0].dropped.items() if "long" in why) == 1


def test_the_instructed_judge_can_be_told_the_domain() -> None:
    llm = ScriptedLLM(lambda prompt: "The selected texts are: 1")
    judge_by_instruction(
        llm, {0: SIX}, {0: [[0, 1, 2, 3, 4, 5]]}, labels=LABELS, keep=1, task=Task(domain="QQ."), seed=0
    )
    assert "outside this domain: QQ," in llm.completed[0][0]


def test_a_text_is_compared_with_so_many_other_labels_and_its_own_always() -> None:
    labels = [f"label{i}" for i in range(20)]
    text = Corpus(("one two", "three four"), ("label0", "label7"), Provenance.DP_SYNTHETIC, grants=("g",))
    asked: list[tuple[str, str]] = []

    def likelihood(prompt: str, continuation: str) -> float:
        asked.append((prompt.rstrip(":"), continuation.strip()))
        return 0.0

    llm = ScriptedLLM(likelihood=likelihood)
    judge_by_likelihood(llm, {0: text}, {0: [[0], [1]]}, labels=labels, keep=1, rivals=5, seed=3)
    for words, own in (("one two", "label0"), ("three four", "label7")):
        compared = [label for label, t in asked if t == words]
        assert compared[0] == own
        assert len(set(compared)) == len(compared) == 6
    first = list(asked)
    asked.clear()
    judge_by_likelihood(llm, {0: text}, {0: [[0], [1]]}, labels=labels, keep=1, rivals=5, seed=3)
    assert asked == first
    asked.clear()
    judge_by_likelihood(llm, {0: text}, {0: [[0], [1]]}, labels=labels, keep=1, rivals=19)
    assert len(asked) == 40  # every label


def test_a_rival_that_is_likelier_drops_a_text_whichever_was_drawn() -> None:
    labels = [f"label{i}" for i in range(20)]
    text = Corpus(tuple(f"text {i}" for i in range(30)), ("label0",) * 30, Provenance.DP_SYNTHETIC, grants=("g",))
    llm = ScriptedLLM(likelihood=lambda prompt, _: 1.0 if prompt == "label9:" else 0.0)
    [kept] = judge_by_likelihood(
        llm, {0: text}, {0: [[i] for i in range(30)]}, labels=labels, keep=1, rivals=10
    ).values()
    # Label 9 is drawn for about 10 in 19 of the texts; five deviations are 14.
    assert 2 <= kept.dropped["another label is likelier"] <= 29


# --- texts that do not fit into the LLM ---

LONG = "word " * 3900


@pytest.mark.parametrize("mode", ["per_label", "all_labels"])
def test_a_text_that_does_not_fit_is_shown_in_no_prompt_and_ends_nothing(mode: Mode) -> None:
    llm, near = ScriptedLLM(context=900), "near " * 60  # two of the latter do not fit either
    shown = corpus([(LONG, "fever"), (near, "fever"), (near + "too", "fever"), ("hot", "fever"), ("dry", "cough")])
    assert misfit(llm, shown, labels=LABELS, mode=mode, max_new_tokens=24) == ["too long", None, None, None, None]
    found = ask(llm, {0: shown}, mode, shots=4)[0]
    assert len(llm.completed[0]) == found.prompts > 0
    assert LONG not in repr(llm.completed)
    assert any("hot" in prompt for prompt in llm.completed[0])


def test_prompts_that_fit_are_the_same_whatever_the_context() -> None:
    wide, narrow = ScriptedLLM(), ScriptedLLM(context=150)
    for llm in (wide, narrow):
        ask(llm, {0: drafts(4)})
    assert wide.completed == narrow.completed


@pytest.mark.parametrize(("mode", "left"), [("per_label", 29), ("all_labels", 100)])
def test_an_llm_without_room_for_the_labels_alone_is_found(mode: Mode, left: int) -> None:
    assert bare_misfit(ScriptedLLM(context=left), LABELS, mode, 24) == "too long"
    assert bare_misfit(ScriptedLLM(context=600), LABELS, mode, 24) is None


@pytest.mark.parametrize("judge", ["instruction", "likelihood"])
def test_a_text_that_does_not_fit_is_dropped_before_it_is_judged(judge: Any) -> None:
    texts = corpus([(LONG, "fever"), ("hot", "fever"), ("dry", "cough")])
    llm = ScriptedLLM(answer=lambda prompt: f"{LEAD_IN} 1, 2", context=1000)
    kept = judged(llm, texts, [[0, 1], [2]], judge)
    assert kept.corpus.prompts == ("hot", "dry")
    assert kept.dropped == {"too long": 1}
    assert LONG not in repr(llm.completed)


def test_a_text_that_an_endpoint_refused_is_dropped() -> None:
    llm = ScriptedLLM(likelihood=lambda prompt, text: -math.inf if "refused" in text else 0.0)
    texts = corpus([("refused", "fever"), ("hot", "fever")])
    kept = judge_by_likelihood(llm, {0: texts}, {0: [[0, 1]]}, labels=LABELS, keep=2)[0]
    assert (kept.corpus.prompts, kept.dropped) == (("hot",), {"too long": 1})


def test_fdkt_sends_no_text_that_no_client_would_take() -> None:
    over = "x " * (MAX_TEXT // 2) + "x"
    cell = SimpleNamespace(scenario=SimpleNamespace(task=Task()))
    server: Any = SimpleNamespace(labels=LABELS, cell=cell, llm=None, embed=None)
    method = FDKT(FDKTOptions(min_words=1), server)
    written = corpus([(over, "fever"), ("hot", "fever"), ("dry", "cough")])
    (_, formed), (_, unique) = method._curation.steps("written", written, {})
    assert unique.corpus.prompts == ("hot", "dry")
    assert formed.dropped["too long"] == 1
    check_request(Learn(1, unique.corpus), LABELS)


def test_fdkt_counts_the_drafts_that_do_not_fit() -> None:
    noted: list[Any] = []
    run_log = SimpleNamespace(
        log_stage=lambda client, stage: noted.append((client, stage.name, stage.before, stage.dropped))
    )
    cell = SimpleNamespace(scenario=SimpleNamespace(task=Task()))
    server: Any = SimpleNamespace(llm=ScriptedLLM(context=500), labels=LABELS, run_log=run_log, cell=cell)
    method = FDKT(FDKTOptions(judge="none"), server)
    texts = {0: corpus([(LONG, "fever"), ("hot", "fever")]), 1: corpus([("dry", "cough")])}
    assert {client: found.prompts for client, found in method._readable(texts).items()} == {0: ("hot",), 1: ("dry",)}
    assert noted == [(0, "readable", 2, {"too long": 1})]
    server.llm = ScriptedLLM(context=20)
    with pytest.raises(ValueError, match=r"labels' names alone and strategy\.max_new_tokens = 48"):
        method.initial()
