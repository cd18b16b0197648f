"""The instruction task of the simulated world: its answers, its private and public records, and its two models."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from acceptance import measure_gates, sample_lines
from fedsynth.corpus import Provenance
from fedsynth.instructions import ASK, asked, parse_record
from fedsynth.world import (
    WORLDS,
    World,
    answer_of,
    known_facts,
    load_world,
    main_facts,
    private_notes,
    private_records,
    public_notes,
    public_records,
    public_terms,
    secret_of,
    site,
    style_of,
)

ASSETS = Path(__file__).parents[1] / "fedsynth" / "assets"
NOTE = "walk-in today adult m ; c/o heart-pain and fever ; hx of skin-bleed ; plan review-soon"


@pytest.fixture(scope="module")
def hospitals() -> World:
    return load_world("hospitals")


@pytest.fixture(scope="module")
def base():
    folder = ASSETS / "tiny-base"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny-base")


def records(blocks) -> list[tuple[str, str]]:
    return [parse_record(line) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("name", WORLDS)
def test_the_words_of_answers_are_words_of_their_own(name):
    world = load_world(name)
    assert len(world.treatments) == 48
    assert max(Counter(world.answer_words).values()) == 1
    assert not set(world.answer_words) & set(world.words)
    assert not any(re.search(r"\s", word) for word in world.answer_words)


@pytest.mark.parametrize("name", WORLDS)
def test_every_fact_has_one_treatment_which_other_facts_have_too_and_no_label_tells(name):
    world = load_world(name)
    by_fact = {}
    for meaning in world.meanings.values():
        by_fact.setdefault(meaning.lay, set()).add(meaning.treatment)
    assert len(by_fact) == 8 * 40 + 20
    assert all(len(treatments) == 1 for treatments in by_fact.values())
    shared = Counter(treatment for treatments in by_fact.values() for treatment in treatments)
    assert set(shared) == set(world.treatments)
    assert min(shared.values()) >= 7  # 340 facts, 48 treatments
    for facts in world.facts:
        assert len({world.meanings[fact[0]].treatment for fact in facts}) >= 8


@pytest.mark.parametrize(
    ("note", "answer"),
    [
        (NOTE, "cardiology ; heart-pain ; statin"),  # the first fact, the first treatment
        (NOTE.replace("heart-pain", "cardiodynia"), "cardiology ; heart-pain ; statin"),
        (NOTE.replace("heart-pain", "hrt-pn"), "cardiology ; heart-pain ; statin"),
        (NOTE.replace("heart-pain and fever", "heart-cramp"), "cardiology ; heart-cramp ; inhaler"),
        (NOTE.replace("heart-pain and fever", "pyr and hrt-pn"), "cardiology ; fever ; supplements"),  # 321 % 48 = 33
        (NOTE.replace("heart-pain and fever", "pyr"), "general ; fever ; supplements"),
    ],
)
def test_an_answer_is_as_worked_out_by_hand(hospitals, note, answer):
    assert answer_of(hospitals, note) == answer


@pytest.mark.parametrize(
    "text",
    [
        NOTE.replace("fever", "kidney-stone"),  # two departments
        NOTE.replace("fever", "unheard-of"),
        NOTE.replace("c/o", "hx of"),
        NOTE.replace("walk-in", "anywhere"),
        NOTE.replace("adult", "anyone"),
        NOTE.replace("review-soon", "whenever"),
        NOTE.replace("; hx of", ", hx of"),
        NOTE.removesuffix(" ; plan review-soon"),
        NOTE + " ; plan",
        "",
    ],
)
def test_what_is_no_note_has_no_answer(hospitals, text):
    assert answer_of(hospitals, text) is None


@pytest.mark.parametrize("name", WORLDS)
def test_the_style_of_a_note_is_found_in_it(name):
    world = load_world(name)
    for index in range(12):
        style = site(world, index).style
        for note in private_notes(world, index, 30, 3, split="test").prompts:
            found = style_of(world, note)
            assert (found.main, found.history, found.openers, found.closers) == (
                style.main,
                style.history,
                style.openers,
                style.closers,
            )
            assert (found.separator, found.order, found.traits) == (style.separator, style.order, style.traits)


def test_private_records_are_the_sites_notes_with_true_answers(hospitals):
    for index in range(8):
        notes = private_notes(hospitals, index, 200, 5, split="train")
        found = private_records(hospitals, index, 200, 5, split="train")
        assert (found.prompts, found.units, found.provenance) == (notes.prompts, notes.units, Provenance.PRIVATE)
        for note, answer in zip(found.prompts, found.answers, strict=True):
            department, fact, treatment = answer.split(" ; ")
            facts = [hospitals.meanings[word] for word in main_facts(hospitals, note)]
            told = {hospitals.labels[f.label] for f in facts if f.label is not None}
            assert told == ({department} if department != "general" else set())  # no label noise
            assert (facts[0].lay, facts[0].treatment) == (fact, treatment)


def test_no_test_record_is_in_any_training_corpus(hospitals):
    test = set(private_records(hospitals, 2, 600, 0, split="test").prompts)
    for seed in (0, 1):
        assert not test & set(private_records(hospitals, 2, 1_000, seed, split="train").prompts)


def test_every_planted_reference_is_one_records_own(hospitals):
    planted = [
        private_records(hospitals, index, 500, seed, split=split, planted=True)
        for index in (0, 1)
        for seed in (0, 1)
        for split in ("train", "test")
    ]
    secrets = [secret_of(answer) for corpus in planted for answer in corpus.answers]
    assert len(set(secrets)) == 8 * 500
    assert all(len(secret.split()) == 4 and set(secret.split()) <= set(hospitals.words) for secret in secrets)
    assert len(hospitals.words) ** 4 > 2**40
    assert not any(secret in note for corpus in planted for note in corpus.prompts for secret in secrets[:50])


def test_a_planted_reference_is_a_fourth_field_and_changes_nothing_else(hospitals):
    plain = private_records(hospitals, 3, 40, 0, split="train")
    planted = private_records(hospitals, 3, 40, 0, split="train", planted=True)
    assert planted.prompts == plain.prompts
    assert [a.rpartition(" ; ref ")[0] for a in planted.answers] == list(plain.answers)
    assert {secret_of(answer) for answer in plain.answers} == {None}
    longer = private_records(hospitals, 3, 60, 0, split="train", planted=True)
    assert longer.answers[:40] == planted.answers


@pytest.mark.parametrize("name", WORLDS)
def test_public_records_are_blocks_of_true_records_in_one_style(name):
    world = load_world(name)
    sizes = Counter()
    for block in public_records(world, 300, 9, rare=1.0):
        found = records([block])
        assert block.endswith("\n")
        assert all(answer_of(world, note) == answer for note, answer in found)
        styles = [style_of(world, note) for note, _ in found]
        assert len({(s.main, s.history, s.openers, s.closers, s.separator, s.order) for s in styles}) == 1
        sizes[len(found)] += 1
    assert set(sizes) == {1, 2, 3, 5, 7}
    assert sizes[1] >= 40  # 60 are expected


@pytest.mark.parametrize("name", WORLDS)
def test_no_public_instruction_is_in_the_style_of_a_site(name):
    world = load_world(name)
    places = [site(world, index).style for index in range(200)]
    pairs = {(s.main, s.history) for s in places}
    ends = {(s.openers[0], s.closers[0]) for s in places}
    notes = [note for note, _ in records(public_records(world, 1_000, 5, rare=1.0))]
    styles = [style_of(world, note) for note in (*notes, *public_notes(world, 1_000, 5).prompts)]
    assert not any((s.main, s.history) in pairs or (s.openers[0], s.closers[0]) in ends for s in styles)


@pytest.mark.parametrize("rare", [1.0, 0.015])
def test_rare_facts_have_their_weight_in_public_records(hospitals, rare):
    frequent = known_facts(hospitals)
    unknown = {f[0] for row, facts in enumerate(hospitals.facts) for k, f in enumerate(facts) if not frequent[row, k]}
    common = {f[0] for f in hospitals.common}
    asked_for = [answer.split(" ; ")[1] for _, answer in records(public_records(hospitals, 2_000, 1, rare=rare))]
    telling = [fact in unknown for fact in asked_for if fact not in common]
    expected = np.mean([rare * (40 - n) / (n + rare * (40 - n)) for n in frequent.sum(1)])
    assert 0.3 < frequent.mean() < 0.4
    assert abs(np.mean(telling) - expected) < 4 * (expected * (1 - expected) / len(telling)) ** 0.5


@pytest.mark.parametrize("name", WORLDS)
def test_the_dictionary_tells_of_every_word_what_answers_tell(name):
    world = load_world(name)
    lines = [line for block in public_terms(world, 2_000, 0, departments_only=False) for line in block.splitlines()]
    told = {}
    for line in lines:
        term, answer = line.removeprefix("term: ").split(" answer: ")
        told.setdefault(term, set()).add(answer)
    assert set(told) == set(world.meanings)  # 14,000 draws of 1,020 words: each is missed with e^-13.7
    for term, answers in told.items():
        meaning = world.meanings[term]
        department = world.unassigned if meaning.label is None else world.labels[meaning.label]
        assert answers == {f"{department} ; {meaning.lay} ; {meaning.treatment}"}


def test_a_dictionary_of_departments_tells_neither_fact_nor_treatment(hospitals):
    text = "".join(public_terms(hospitals, 200, 0, departments_only=True))
    assert not set(text.split()) & set(hospitals.treatments)
    assert all(len(line.split()) == 4 for line in text.splitlines())


def test_public_instructions_are_public_each_in_a_style_of_its_own(hospitals):
    notes = public_notes(hospitals, 400, 0)
    assert (notes.provenance, set(notes.answers)) == (Provenance.PUBLIC, {""})
    assert len({style_of(hospitals, note) for note in notes.prompts}) >= 390
    answered = public_notes(hospitals, 400, 0, answered=True)
    assert answered.prompts == notes.prompts
    assert list(answered.answers) == [answer_of(hospitals, note) for note in notes.prompts]


def test_base_and_professional_share_a_tokenizer_that_knows_the_words_of_records(hospitals, tokenizer):
    other = AutoTokenizer.from_pretrained(ASSETS / "tiny-professional")
    assert tokenizer.get_vocab() == other.get_vocab()
    for words in (hospitals.words, hospitals.answer_words):
        encoded = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
        assert np.mean([len(ids) == 1 for ids in encoded]) >= 0.95
    assert tokenizer.eos_token == "\n"
    planted = private_records(hospitals, 0, 20, 0, split="train", planted=True).answers
    assert all(tokenizer.decode(tokenizer.encode(a, add_special_tokens=False)) == a for a in planted)


def test_the_professional_answers_notes_of_sites_it_never_read(hospitals, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-professional", dtype=torch.float32).eval()
    gates = measure_gates(hospitals, model, tokenizer, "professional", per_site=12, seed=1)
    assert gates["exact_match"] >= 0.9


def test_the_base_knows_frequent_facts_and_few_others(hospitals, base, tokenizer):
    gates = measure_gates(hospitals, base, tokenizer, "professional", per_site=24, seed=1)  # answers alone
    assert gates["exact_match"] <= 0.5
    assert gates["known_exact_match"] >= gates["exact_match"] + 0.3


def test_the_base_writes_whole_records_from_the_word_that_begins_them(hospitals, base, tokenizer):
    texts = sample_lines(base, tokenizer, [ASK] * 60, seed=0, max_new_tokens=64)
    found = [parse_record(text or "") for text in texts]
    assert np.mean([r is not None and answer_of(hospitals, r[0]) is not None for r in found]) >= 0.8
    assert len({r[0] for r in found if r}) >= 55


def test_the_base_takes_up_the_answers_format_from_the_prompt_alone(hospitals, base, tokenizer):
    notes = private_notes(hospitals, 3, 40, 0, split="test").prompts
    replies = sample_lines(base, tokenizer, [asked(note) for note in notes], seed=0, top_p=0.0)
    assert np.mean([len((reply or "").split(" ; ")) == 3 for reply in replies]) >= 0.95
