"""Pretraining from a public corpus file: what is read, that it can be interrupted, that others can load it."""

import json
import math
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsynth.cli.main import pretrain as pretrain_command
from fedsynth.pretraining import public_models
from fedsynth.pretraining.causal_lm import CHECKPOINT, held_out_loss, rows_of, shape_of
from fedsynth.pretraining.public_models import Wanted, pretrain_from_text
from fedsynth.pretraining.public_text import Lines, PublicText, blocks, read, topic_name
from fedsynth.typed import BadValue

WORDS = {
    "GetRide": "i want a taxi to the station",
    "BuyTicket": "two tickets for the concert please",
    "": "anything else",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """300 lines in two topics, and 150 without one; a tenth is named as held out."""
    rows = []
    for i in range(450):
        topic = ("GetRide", "BuyTicket", "")[i % 3]
        rows.append(
            {"text": f"{WORDS[topic]} number {i}", "intent": topic, "split": "test" if i % 10 == 0 else "train"}
        )
    path = tmp_path_factory.mktemp("corpus") / "dialogues.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def public(corpus: Path, **more) -> PublicText:
    return PublicText(str(corpus), **{"topic": "intent", "held_out": ("split", "test"), **more})


WANTED = Wanted(width=32, layers=1, vocabulary=320, steps=6, batch_rows=4, row_tokens=32)


def run(corpus: Path, out: Path, wanted: Wanted = WANTED, **more) -> dict:
    return pretrain_from_text(public(corpus), wanted, out, command="test", tell=lambda _: None, **more)


def test_named_rows_are_held_out_and_topics_are_written_as_label_lists_have_them(corpus):
    learn, held = read(public(corpus), seed=0)
    assert (len(learn.texts), len(held.texts)) == (405, 45)
    assert set(learn.topics) == {"get_ride", "buy_ticket", ""}
    assert not set(learn.texts) & set(held.texts)


def test_a_line_that_is_held_out_is_learnt_nowhere_else(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("text,split\nHello you,test\nhello  you,train\nsomething else,train\n")
    learn, held = read(PublicText(str(path), held_out=("split", "test")), seed=0)
    assert (learn.texts, held.texts) == (("something else",), ("Hello you",))


def test_without_named_rows_a_fiftieth_is_held_out_by_the_seed(corpus):
    parts = [read(public(corpus, held_out=None), seed)[1].texts for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert 2 <= len(parts[0]) <= 20  # 450 rows; nine are expected


@pytest.mark.parametrize(
    ("topic", "name"),
    [
        ("ReserveRestaurant", "reserve_restaurant"),
        ("Find a  hotel", "find_a_hotel"),
        ("card_arrival", "card_arrival"),
        ("", ""),
    ],
)
def test_topic_names(topic, name):
    assert topic_name(topic) == name


def test_blocks_hold_one_topic_and_each_line_once_in_a_pass():
    lines = Lines(tuple(f"t{i}" for i in range(60)), tuple("ab"[i % 2] for i in range(60)))
    tokenizer = tiny.tokenizer()
    seen, labelled, sizes = Counter(), 0, Counter()
    for ids in blocks(lines, tokenizer, seed=0):
        text = tokenizer.decode(ids)
        shown = [line for line in text.split("\n") if line]
        topics = {line.partition(":")[0] for line in shown if ":" in line}
        assert len(topics) <= 1
        labelled += bool(topics)
        sizes[len(shown)] += 1
        seen.update(line.rpartition(" ")[2] for line in shown)
        if sum(seen.values()) == 60:
            break
    assert set(seen) == set(lines.texts)
    assert set(seen.values()) == {1}
    assert len(sizes) >= 3  # of 1, 2, 3, 5 and 7
    assert labelled >= 0.6 * sum(sizes.values())


def test_rows_hold_every_token_of_every_block_each_after_a_bos():
    assert list(rows_of([[5, 6], [7], [8, 9, 9]], 1, 3)) == [[1, 5, 6], [1, 7, 1], [8, 9, 9]]
    assert list(rows_of([list(range(10, 19))], 1, 4)) == [[1, 10, 11, 12], [13, 14, 15, 16]]


@pytest.mark.parametrize("topic", ["", "card"])
def test_nothing_of_long_texts_is_lost(topic):
    tokenizer = tiny.tokenizer()
    lines = Lines(tuple(f"{i:03d}" + "x" * 100 for i in range(40)), (topic,) * 40)
    pass_ = []
    for block in blocks(lines, tokenizer, seed=0):
        pass_.append(block)
        if sum(tokenizer.decode(b).count("\n") for b in pass_) == 40:
            break
    read = "".join(tokenizer.decode(row) for row in rows_of([*pass_, [0] * 200], tiny.BOS, 64)).replace("<bos>", "")
    assert all(f"{i:03d}" + "x" * 100 + "\n" in read for i in range(40))


def test_the_held_out_loss_of_a_model_that_knows_nothing_is_the_logarithm_of_the_vocabulary():
    model = tiny.model()
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are 0
    loss = held_out_loss(model, tiny.tokenizer(), [[5, 6, 2], [7, 2], [9] * 40])
    assert loss == pytest.approx(math.log(model.config.vocab_size), abs=1e-5)


def test_padding_and_batching_do_not_change_the_held_out_loss():
    model, rows = tiny.model(), [[5, 6, 2], [7, 2], [9, 8, 7, 6, 5, 4, 3]]
    apart = sum(len(r) * held_out_loss(model, tiny.tokenizer(), [r]) for r in rows) / sum(map(len, rows))
    assert held_out_loss(model, tiny.tokenizer(), rows) == pytest.approx(apart, abs=1e-4)


def test_a_model_learns_and_the_auto_classes_load_it(corpus, tmp_path):
    card = run(
        corpus, tmp_path / "model", Wanted(width=32, layers=1, vocabulary=320, steps=60, batch_rows=4, row_tokens=32)
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    held = read(public(corpus), seed=0)[1]
    rows = tokenizer([f" {t}\n" for t in held.texts], add_special_tokens=False)["input_ids"]
    assert held_out_loss(model, tokenizer, rows) == pytest.approx(
        card["held_out"]["nats_per_token"], abs=0.02
    )  # bfloat16
    assert card["held_out"]["nats_per_token"] < 0.7 * math.log(len(tokenizer))
    assert card["tokens_read"] == 60 * 4 * 32
    assert len(card["samples"]) == 2
    assert json.loads((tmp_path / "model" / "card.json").read_text())["sha256"]
    assert not (tmp_path / "model" / CHECKPOINT).exists()


class Stopped(Exception):
    pass


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(public_models, "SAVE_EVERY", 2)
    whole = run(corpus, tmp_path / "whole")

    def stop(line: str) -> None:
        if "held-out" in line and "4/6" in line:
            raise Stopped

    with pytest.raises(Stopped):
        pretrain_from_text(public(corpus), WANTED, tmp_path / "part", command="test", tell=stop)
    with pytest.raises(BadValue, match="--resume"):
        run(corpus, tmp_path / "part")
    resumed = run(corpus, tmp_path / "part", resume=True)
    assert (
        resumed["sha256" if "sha256" in resumed else "held_out"] == whole["sha256" if "sha256" in whole else "held_out"]
    )
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert files[0] == files[1]


def test_a_checkpoint_of_another_run_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(public_models, "SAVE_EVERY", 2)

    def stop(line: str) -> None:
        if "held-out" in line:
            raise Stopped

    with pytest.raises(Stopped):
        pretrain_from_text(public(corpus), WANTED, tmp_path / "part", command="test", tell=stop)
    with pytest.raises(BadValue, match="another steps"):
        run(corpus, tmp_path / "part", Wanted(**{**vars(WANTED), "steps": 8}), resume=True)


def test_a_checkpoint_is_not_gone_on_from_with_another_tokenizer(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(public_models, "SAVE_EVERY", 2)
    run(corpus, tmp_path / "other", Wanted(**{**vars(WANTED), "vocabulary": 310}))
    shared = Wanted(**{**vars(WANTED), "tokenizer": str(tmp_path / "other")})

    def stop(line: str) -> None:
        if "held-out" in line:
            raise Stopped

    with pytest.raises(Stopped):
        pretrain_from_text(public(corpus), shared, tmp_path / "part", command="test", tell=stop)
    with pytest.raises(BadValue, match="another tokenizer"):
        run(corpus, tmp_path / "part", resume=True)


def test_plain_text_in_another_encoding_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait\n".encode("latin-1"))
    with pytest.raises(BadValue, match=r"latin.txt.*UTF-8"):
        read(PublicText(str(tmp_path / "latin.txt")), seed=0)


def test_a_tokenizer_that_is_not_there_leaves_nothing_behind(corpus, tmp_path):
    with pytest.raises(BadValue, match="nowhere"):
        run(corpus, tmp_path / "model", Wanted(**{**vars(WANTED), "tokenizer": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "model").exists()


def test_a_link_is_written_through(corpus, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(corpus, tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").is_file()


def test_a_second_model_can_share_the_tokenizer(corpus, tmp_path):
    run(corpus, tmp_path / "first")
    run(corpus, tmp_path / "second", Wanted(**{**vars(WANTED), "tokenizer": str(tmp_path / "first")}))
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"text": "words"}, "no column 'words'"),
        ({"topic": "label"}, "no column 'label'"),
        ({"held_out": ("split", "dev")}, "no text held out"),
    ],
)
def test_a_column_or_split_that_is_not_there_is_named(corpus, more, message):
    with pytest.raises(BadValue, match=message):
        read(public(corpus, **more), seed=0)


def test_sizes_that_cannot_be_are_refused(corpus, tmp_path):
    with pytest.raises(BadValue, match="multiple of 32"):
        shape_of(100, 2)
    with pytest.raises(BadValue, match="at least 300"):
        Wanted(vocabulary=100)
    with pytest.raises(BadValue, match="row_tokens"):
        run(corpus, tmp_path / "long", Wanted(**{**vars(WANTED), "row_tokens": 5000}))
    with pytest.raises(BadValue, match="no checkpoint"):
        run(corpus, tmp_path / "none", resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "a.csv", "held_out": "split"}, "COLUMN=VALUE"),
        ({"corpus": "a.csv", "device": "tpu"}, "device must"),
        ({"corpus": "a.csv", "steps": 0}, "--steps"),
        ({"corpus": "nowhere.csv"}, "no data file 'nowhere.csv'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(options, message, tmp_path):
    usual = {"corpus": "", "text": "text", "topic": "", "held_out": "", "width": 32, "layers": 1, "vocabulary": 320}
    usual |= {
        "tokenizer": "",
        "epochs": 1.0,
        "steps": None,
        "resume": False,
        "device": "cpu",
        "threads": 1,
    }
    with pytest.raises(BadValue, match=message):
        pretrain_command(out=tmp_path / "model", **{**usual, **options})
    assert not (tmp_path / "model").exists()
