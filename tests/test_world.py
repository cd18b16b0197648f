"""The simulated world: its grammar, its hold-out, and the models that were pretrained in it."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import make
from acceptance import GATES, sample_lines
from fedsynth.corpus import Provenance
from fedsynth.typed import BadValue
from fedsynth.world import (
    WORLDS,
    Style,
    World,
    load_world,
    main_facts,
    oracle_accuracy,
    parse,
    private_notes,
    public_blocks,
    quality,
    site,
    write_note,
)

ASSETS = Path(__file__).parents[1] / "fedsynth" / "assets"
ROLES = ("llm", "slm")
STYLE = Style("c/o", "hx of", ("walk-in", "today"), ("plan", "review-soon"), ";", "and", 0, (0, 1, 2), True)
NOTE = "walk-in today adult m ; c/o heart-pain and fever ; hx of skin-bleed ; plan review-soon"


@pytest.fixture(scope="module")
def hospitals() -> World:
    return load_world("hospitals")


def asset(role: str) -> Path:
    return ASSETS / f"tiny-{role}"


def marked(world: World, line: str) -> tuple[str, str]:
    """Main and history marker of a line, found by text search and without the parser."""
    segments = re.split("|".join(re.escape(f" {s} ") for s in world.separators), line)
    found = []
    for markers in (world.main_markers, world.history_markers):
        hits = [m for m in markers if any(segment.startswith(f"{m} ") for segment in segments)]
        found.append(max(hits, key=len))
    return found[0], found[1]


def planted(world: World, style: Style) -> str:
    uniform = np.cumsum(np.full((8, 40), 1 / 40), axis=1)
    return write_note(world, style, 0, uniform, np.random.default_rng(0))


def test_an_asset_is_made_in_an_empty_folder_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BadValue, match="already holds something"):
        make.make("hospitals", "llm", tmp_path)
    with pytest.raises(BadValue, match="--steps must be at least 1, got 0"):
        make.make("hospitals", "llm", tmp_path / "new", steps=0)


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_has_the_planned_shape_and_no_word_twice(name):
    world = load_world(name)
    assert [len(facts) for facts in world.facts] == [40] * 8
    assert all(len(fact) == 3 for facts in world.facts for fact in facts)
    assert [len(x) for x in (world.common, world.main_markers, world.history_markers)] == [20, 24, 16]
    assert [len(x) for x in (world.openers, world.closers, world.separators, world.joiners)] == [30, 30, 6, 4]
    facts = [word for group in (*world.facts, world.common) for fact in group for word in fact]
    counts = Counter([*facts, *world.openers, *world.closers, *world.labels])
    assert max(counts.values()) == 1
    assert not any(" " in word for word in counts)
    marker_words = {word for marker in world.main_markers + world.history_markers for word in marker.split()}
    assert not marker_words & set(counts)


@pytest.mark.parametrize("name", WORLDS)
def test_no_public_text_has_a_marker_pair_or_an_opener_closer_pair_of_a_site(name):
    world = load_world(name)
    styles = [site(world, k).style for k in range(200)]
    markers = {(s.main, s.history) for s in styles}
    ends = {(s.openers[0], s.closers[0]) for s in styles}

    def violations(lines):
        for text in lines:
            words = text.split()
            # A closing pair stands at the end or between two separators; any closer of the note is looked up.
            closer = next(w for w in words if w in world.closers)
            yield marked(world, text) in markers or (words[0], closer) in ends

    blocks = public_blocks(world, 3_000, 5, weak=False)
    lines = [line.split(": ", 1)[1] for block in blocks for line in block.splitlines()]
    assert len(lines) > 10_000
    assert not any(violations(lines))
    assert all(violations(planted(world, style) for style in styles[:20]))  # the search finds what it looks for


def test_sites_differ_in_both_pairs(hospitals):
    styles = [site(hospitals, k).style for k in range(8)]
    assert len({(s.main, s.history) for s in styles}) == 8
    assert len({(s.openers[0], s.closers[0]) for s in styles}) == 8
    assert len({site(hospitals, k).style for k in range(200)}) == 200


def test_a_note_reads_as_written_by_hand(hospitals):
    assert parse(hospitals, STYLE, NOTE) == (True, ("heart-pain", "fever"), ("skin-bleed",))
    assert main_facts(hospitals, NOTE) == ("heart-pain", "fever")


@pytest.mark.parametrize(
    "broken",
    [
        NOTE.replace("walk-in today", "today walk-in"),
        NOTE.replace("adult", "anyone"),
        NOTE.replace(" and fever", " & fever"),
        NOTE.replace("hx of", "known"),
        NOTE.replace("skin-bleed", "unheard-of"),
        NOTE.removesuffix(" review-soon"),
        NOTE + " more",
        "",
    ],
)
def test_a_note_off_the_template_is_not_valid(hospitals, broken):
    assert not parse(hospitals, STYLE, broken).valid


@pytest.mark.parametrize("name", WORLDS)
def test_parsing_inverts_writing(name):
    world = load_world(name)
    for index in range(12):
        notes = private_notes(world, index, 100, 3, split="train")
        readings = [parse(world, site(world, index).style, text) for text in notes.prompts]
        assert all(r.valid for r in readings)
        assert all(1 <= len(r.main) <= 2 and 1 <= len(r.history) <= 2 for r in readings)
        assert [main_facts(world, text) for text in notes.prompts] == [r.main for r in readings]


def test_quality_counts_by_hand(hospitals):
    wrong_label = NOTE.replace("heart-pain", "kidney-stone")
    other_register = NOTE.replace("skin-bleed", "dermatorrhagia")
    judged = quality(hospitals, STYLE, ["cardiology"] * 4, [NOTE, wrong_label, other_register, None])
    assert (judged.count, judged.valid, judged.distinct) == (4, 3 / 4, 3)
    assert judged.label_correct == 2 / 3
    assert judged.register_match == 8 / 9


def test_notes_depend_on_seed_site_and_split_alone(hospitals):
    def prints(site_index, seed, split):
        return private_notes(hospitals, site_index, 30, seed, split=split).fingerprint()

    assert prints(1, 2, "train") == prints(1, 2, "train")
    assert len({prints(*key) for key in [(1, 2, "train"), (1, 2, "test"), (1, 3, "train"), (2, 2, "train")]}) == 4
    assert [*public_blocks(hospitals, 5, 1, weak=True)] == [*public_blocks(hospitals, 5, 1, weak=True)]
    longer = private_notes(hospitals, 1, 60, 2, split="train")
    assert longer.take(range(30)).fingerprint() == prints(1, 2, "train")


def test_no_test_text_is_in_any_training_corpus(hospitals):
    for index in range(8):
        test = set(private_notes(hospitals, index, 600, 0, split="test").prompts)
        for seed in (0, 1):
            assert not test & set(private_notes(hospitals, index, 1_000, seed, split="train").prompts)


def test_private_notes_are_private_with_one_unit_each(hospitals):
    notes = private_notes(hospitals, 0, 20, 0, split="train")
    assert notes.provenance is Provenance.PRIVATE
    assert notes.units == tuple(range(20))
    assert set(notes.answers) <= set(hospitals.labels)


def test_label_noise_is_three_percent(hospitals):
    wrong = told = 0
    for index in range(8):
        notes = private_notes(hospitals, index, 1_500, 1, split="train")
        for text, answer in zip(notes.prompts, notes.answers, strict=True):
            labels = {hospitals.meanings[f].label for f in main_facts(hospitals, text)} - {None}
            assert len(labels) <= 1
            told += len(labels)
            wrong += bool(labels) and hospitals.labels.index(answer) not in labels
    deviation = (0.03 * 0.97 / told) ** 0.5
    assert abs(wrong / told - 0.03) < 4 * deviation  # 4 standard deviations: about .6 percentage points


def test_common_facts_and_slips_occur_at_their_rates(hospitals):
    common = slips = seen = 0
    for index in range(8):
        notes = private_notes(hospitals, index, 500, 2, split="train")
        own = site(hospitals, index).style.register
        for word in (w for text in notes.prompts for w in text.split() if w in hospitals.meanings):
            meaning = hospitals.meanings[word]
            seen, common, slips = seen + 1, common + (meaning.label is None), slips + (meaning.register != own)
    assert abs(common / seen - 0.10) < 0.015
    assert abs(slips / seen - 0.05 * 2 / 3) < 0.008  # one slip in three lands on the own register


def test_the_oracle_reaches_between_90_and_95_percent(hospitals):
    reached = [oracle_accuracy(hospitals, k, private_notes(hospitals, k, 2_000, 4, split="test")) for k in range(8)]
    assert 0.90 < np.mean(reached) < 0.95
    assert all(0.89 < x < 0.96 for x in reached)


def test_weak_text_mentions_most_facts_rarely_and_all_of_them_sometimes(hospitals):
    def counts(weak):
        text = " ".join(public_blocks(hospitals, 3_000, 0, weak=weak)).split()
        found = Counter(text)
        return np.array([found[fact[0]] for facts in hospitals.facts for fact in facts])

    weak, full = counts(True), counts(False)
    assert min(weak.min(), full.min()) > 0
    assert weak.std() / weak.mean() > 0.7  # two-valued weights 1 and .15 at .35/.65: .91; Poisson noise alone: < .2
    assert full.std() / full.mean() < 0.25


def test_public_lines_are_label_colon_text(hospitals):
    for block in public_blocks(hospitals, 200, 9, weak=False):
        assert block.endswith("\n")
        assert len(block.splitlines()) in (1, 2, 3, 5, 7)
        for line in block.splitlines():
            label, text = line.split(": ", 1)
            assert label in hospitals.labels
            assert text == " ".join(text.split())


def test_both_models_share_a_tokenizer_that_knows_the_lexicon(hospitals):
    first, second = (AutoTokenizer.from_pretrained(asset(role)) for role in ROLES)
    assert first.get_vocab() == second.get_vocab()
    encoded = first([f" {word}" for word in hospitals.words], add_special_tokens=False)["input_ids"]
    single = [len(ids) == 1 for ids in encoded]
    assert np.mean(single) >= 0.95
    assert all(len(first.encode(label, add_special_tokens=False)) <= 2 for label in hospitals.labels)


@pytest.mark.parametrize("text", [NOTE, "Größe:  12 µg\n\n\tc/o é, 漢字 🙂\r\n", "renal: a\nrenal: b\n", " "])
def test_every_text_survives_the_tokenizer(text):
    tokenizer = AutoTokenizer.from_pretrained(asset("slm"))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_newline_is_the_end_of_sequence():
    tokenizer = AutoTokenizer.from_pretrained(asset("llm"))
    assert tokenizer.eos_token == "\n"
    assert tokenizer.encode("renal: a\n", add_special_tokens=False)[-1] == tokenizer.eos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


@pytest.mark.parametrize("role", GATES)
def test_a_card_describes_its_model_and_the_gates_are_met(role):
    card = json.loads((asset(role) / "card.json").read_text())
    assert card["sha256"] == hashlib.sha256((asset(role) / "model.safetensors").read_bytes()).hexdigest()
    assert card["gates_required"] == GATES[role]
    assert all(card["gates"][name] >= least for name, least in GATES[role].items())


def test_the_assets_are_small():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*.safetensors")) < 6e6


@pytest.mark.parametrize("role", ROLES)
def test_the_models_write_the_label_they_are_asked_for(hospitals, role):
    tokenizer = AutoTokenizer.from_pretrained(asset(role))
    model = AutoModelForCausalLM.from_pretrained(asset(role), dtype=torch.float32).eval()
    wanted = [label for label in hospitals.labels for _ in range(8)]
    texts = sample_lines(model, tokenizer, [f"{label}:" for label in wanted], seed=0)
    told = [{hospitals.meanings[f].label for f in main_facts(hospitals, text or "")} - {None} for text in texts]
    assert sum(t is not None for t in texts) >= 60
    right = [t == {hospitals.labels.index(label)} for t, label in zip(told, wanted, strict=True) if t]
    assert len(right) >= 48
    assert np.mean(right) >= 0.85  # a model that ignores the label would reach 1/8


def test_the_client_model_loads_as_a_classifier():
    model = AutoModelForSequenceClassification.from_pretrained(asset("slm"), num_labels=8)
    tokenizer = AutoTokenizer.from_pretrained(asset("slm"))
    batch = tokenizer([NOTE, "short"], padding=True, return_tensors="pt", return_token_type_ids=False)
    assert model(**batch).logits.shape == (2, 8)
