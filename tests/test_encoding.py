"""What people typed is text, never a control token, for tokenizers of every kind; lines end as a model's lines do."""

from __future__ import annotations

from functools import cache
from typing import Any

import families
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast
from typed_text import CONTROL, LINES, TYPED, cases, faq

from fedsynth.corpus import Corpus, Provenance
from fedsynth.instructions import ASK, asked, parse_record, record
from fedsynth.models.batches import given_rows, token_rows
from fedsynth.models.embedding import Embedder
from fedsynth.models.encoding import prompt_rows, text_rows, token_ids
from fedsynth.models.hub import config_of
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.pretraining.tokenizer import train_tokenizer
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.scenario.task import NO_CARD
from fedsynth.synthesis.augmentation import line_prompt
from fedsynth.synthesis.curation import well_formed
from fedsynth.training.classifier import _token_rows
from fedsynth.training.dp_training import next_token_losses
from fedsynth.training.examples import all_readable, encode_slots
from fedsynth.world import WORLDS, load_world, private_notes, private_records, public_blocks, public_records

TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
SHIPPED = ("assets:tiny-slm", "assets:tiny-base")
VARIED = ("unigram", "words", "slow", "lines")  # kinds of tokenizer beside those of the families
SPECIAL = {*CONTROL, "\n"}


class Slow(PreTrainedTokenizer):
    """One of transformers' tokenizers in Python: whole words, and names of tokens among them."""

    words = ("<pad>", "</s>", "<unk>", "<", "/s>", "a", "b")

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 2)

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]


@cache
def tokenizer_of(name: str) -> Any:
    """Of a family or a shipped model; "unigram", "words" and "slow" find names of tokens in a text, "lines" is that of
    `fedsynth pretrain`."""
    if name == "unigram":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((chr(c), -5.0) for c in range(33, 127))]
        inner = Tokenizer(models.Unigram([*pieces, ("</", -4.0)], 2))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif name == "words":
        words = ["<pad>", "</s>", "<unk>", "<", "/s>", "a", "b"]
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif name == "slow":
        return Slow(**TOKENS)
    elif name == "lines":
        return train_tokenizer([f"{text}\n" for text in LINES], 300)
    elif name.startswith("assets:"):
        return load_tokenizer(name)
    else:
        return families.tokenizer(name)
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=inner, **TOKENS)


def control_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


WRITERS = (*families.WRITERS, *SHIPPED, "lines")


@pytest.mark.parametrize("name", [*families.ALL, *SHIPPED, *VARIED])
def test_no_typed_text_holds_a_control_token(name: str) -> None:
    tokenizer = tokenizer_of(name)
    texts = [*TYPED, *CONTROL, *(f"a {c} b" for c in CONTROL), *(f"{c}{c}\n" for c in CONTROL), "a\nb", "\n", ""]
    for text, row in zip(texts, text_rows(tokenizer, texts), strict=True):
        assert control_ids(tokenizer).isdisjoint(row), text
        assert row == token_ids(tokenizer, text)


@pytest.mark.parametrize("name", [*WRITERS, "deberta"])
def test_typed_text_comes_back_from_its_tokens_to_the_letter(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for text in (*TYPED, *CONTROL):
        assert tokenizer.decode(token_ids(tokenizer, text), skip_special_tokens=True) == text


def test_a_name_that_a_vocabulary_holds_is_spelled_out() -> None:
    unigram = tokenizer_of("unigram")
    for text in ("a</s>b <pad>", "an <unk> token"):
        assert unigram.decode(token_ids(unigram, text), skip_special_tokens=True) == text
    plain = unigram("a</s>b", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert unigram.eos_token_id in plain  # transformers' own option does not do it
    for words in map(tokenizer_of, ("words", "slow")):
        assert words.convert_ids_to_tokens(token_ids(words, "a </s> b")) == ["a", "<", "/s>", "b"]


def test_a_line_end_that_only_the_end_of_text_can_write_is_a_blank() -> None:
    inner = Tokenizer(models.BPE({"\n": 0, "a": 1, "b": 2, " ": 3}, []))
    build: Any = PreTrainedTokenizerFast
    letters = build(tokenizer_object=inner, eos_token="\n")
    assert token_ids(letters, "a\nb") == [1, 3, 2]
    assert prompt_rows(letters, ["a\nb"]) == [[1, 0, 2]]


# Examples


@pytest.mark.parametrize("name", WRITERS)
def test_the_end_of_text_stands_at_the_end_of_an_example_alone_and_the_text_is_whole(name: str) -> None:
    tokenizer, kind = tokenizer_of(name), families.KINDS.get(name, "causal")
    corpus = Corpus(TYPED, ("Plan",) * len(TYPED), Provenance.PRIVATE)
    slots = encode_slots(tokenizer, corpus, ("Plan",), len(TYPED), GeneratorTraining(max_length=4000), kind)
    for text, [example] in zip(TYPED, slots, strict=True):
        learnt = list(example.tokens[example.start :])
        assert learnt.index(tokenizer.eos_token_id) == len(learnt) - 1
        assert control_ids(tokenizer).isdisjoint(learnt[:-1])
        assert tokenizer.decode(learnt, skip_special_tokens=True).strip() == text.strip()
    [[short]] = encode_slots(tokenizer, corpus.take([len(LINES)]), ("Plan",), 1, GeneratorTraining(max_length=20), kind)
    assert len(short.tokens) == 20
    assert tokenizer.eos_token_id not in short.tokens[short.start :]  # a text that was cut has no end


@pytest.mark.parametrize("name", WRITERS)
def test_a_record_comes_back_from_its_example_whatever_it_holds(name: str) -> None:
    tokenizer, kind = tokenizer_of(name), families.KINDS.get(name, "causal")
    corpus = Corpus(TYPED, TYPED[::-1], Provenance.PRIVATE)
    for loss_on in ("record", "response"):
        slots = encode_slots(
            tokenizer, corpus, (), len(TYPED), GeneratorTraining(max_length=4000, loss_on=loss_on), kind
        )
        for prompt, answer, [example] in zip(TYPED, TYPED[::-1], slots, strict=True):
            learnt = tokenizer.decode(example.tokens[example.start :], skip_special_tokens=True)
            text = learnt if loss_on == "record" else f"{asked(prompt)}{learnt}"
            assert parse_record(text) == (prompt.strip(), answer.strip())


@pytest.mark.parametrize("name", WORLDS)
def test_texts_and_records_of_the_worlds_are_encoded_as_the_shipped_models_learnt_them(name: str) -> None:
    world = load_world(name)
    for asset in SHIPPED:
        tokenizer = tokenizer_of(asset)

        def plain(text: str, tokenizer: Any = tokenizer) -> list[int]:
            """As they were pretrained on."""
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        notes = private_notes(world, 1, 60, 0, split="train")
        for note, label, [example] in zip(
            notes.prompts,
            notes.answers,
            encode_slots(tokenizer, notes, world.labels, 60, GeneratorTraining(max_length=200)),
            strict=True,
        ):
            assert example.tokens == (bos, *plain(f"{label}: {note}"), eos)
            assert example.start == 1 + len(plain(NO_CARD.code(label)))
        records = private_records(world, 1, 60, 0, split="train", planted=True)
        for note, answer, [example] in zip(
            records.prompts,
            records.answers,
            encode_slots(tokenizer, records, (), 60, GeneratorTraining(max_length=200)),
            strict=True,
        ):
            assert example.tokens == (bos, *plain(f"question: {note} answer: {answer}"), eos)
        shown = "".join(f"{record(*pair)}\n" for pair in zip(records.prompts[:5], records.answers[:5], strict=True))
        prompts = [shown + ASK, shown + asked(records.prompts[9]), line_prompt(world.labels[0], notes.prompts[:4])]
        prompts += [*public_blocks(world, 20, 0, weak=False), *public_records(world, 20, 0, rare=1.0)]
        assert prompt_rows(tokenizer, prompts) == [plain(prompt) for prompt in prompts]
        assert prompt_rows(tokenizer, ["a: b\nc:"], [" d"]) == [plain("a: b\nc: d")]


# Prompts, embeddings, classifiers, judges


@pytest.mark.parametrize("name", families.ALL)
def test_what_stands_around_a_text_is_what_the_tokenizer_puts_there(name: str) -> None:
    tokenizer, kind = tokenizer_of(name), families.KINDS[name]
    texts, control = ["abc", "a longer text about a cough", ""], control_ids(tokenizer)
    if kind == "causal":
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        whole = [[*bos, *tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]
        cut = [row[:5] for row in whole]
    else:
        whole = tokenizer(texts)["input_ids"]
        cut = tokenizer(texts, truncation=True, max_length=5)["input_ids"]
    assert token_rows(tokenizer, texts, kind) == whole
    assert token_rows(tokenizer, texts, kind, 5) == cut
    typed = "".join(CONTROL)
    [empty], [row], [prompt] = (
        rows(tokenizer, [t], kind) for rows, t in [(token_rows, ""), (token_rows, typed), (given_rows, typed)]
    )
    assert [t for t in row if t in control] == [t for t in prompt if t in control] == empty


@pytest.mark.parametrize("name", families.ALL)
def test_a_task_model_reads_what_was_typed_as_text(name: str) -> None:
    tokenizer, config = tokenizer_of(name), config_of(families.folder(name))
    [bare] = _token_rows(tokenizer, [""], 400, config)
    [row] = _token_rows(tokenizer, ["".join(CONTROL) + "\n."], 400, config)
    assert [t for t in row if t in control_ids(tokenizer)] == [t for t in bare if t in control_ids(tokenizer)]
    assert len(row) > len(bare) + 20


def test_an_embedding_of_a_text_of_several_lines_reads_no_end_of_text() -> None:
    name = "assets:tiny-slm"
    seen: list[torch.Tensor] = []
    embedder = Embedder.load(name, workers=1)
    embedder.body.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    embedder.embed(["two\nlines </s> <pad>"])
    assert not {embedder.tokenizer.eos_token_id, embedder.tokenizer.pad_token_id} & set(seen[0][0].tolist())


def test_a_continuation_of_several_lines_is_scored_as_text_and_a_prompts_lines_end() -> None:
    llm = LocalLLM.load("assets:tiny-llm", workers=1)
    eos = llm.tokenizer.eos_token_id
    [row] = given_rows(llm.tokenizer, ["a: b\nc:"], "causal", [" d\ne"])
    assert row.count(eos) == 1
    start, wanted = given_rows(llm.tokenizer, ["a: b\nc:"], "causal")[0], token_ids(llm.tokenizer, " d\ne")
    with torch.inference_mode():
        logs = llm.model(input_ids=torch.tensor([[*start, *wanted]])).logits[0].log_softmax(-1)
    by_hand = np.mean([float(logs[len(start) - 1 + i, t]) for i, t in enumerate(wanted)])
    assert llm.score(["a: b\nc:"], [" d\ne"])[0] == pytest.approx(by_hand, abs=1e-4)


# The way there and back


def learnt(tokenizer: Any, text: str) -> LocalLLM:
    """A small model that knows a text of the label Plan by heart."""
    corpus = Corpus((text,), ("Plan",), Provenance.PUBLIC)
    [examples] = encode_slots(tokenizer, corpus, ("Plan",), 1, GeneratorTraining(max_length=90))
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                **settings,
                max_position_embeddings=128,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.bos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        next_token_losses(model, examples, tokenizer.pad_token_id).mean().backward()
        optimizer.step()
    return LocalLLM(model.eval(), tokenizer, workers=1)


@pytest.mark.parametrize("name", ["lines", "llama"])
def test_a_letter_of_several_lines_is_learnt_whole_and_written_back(name: str) -> None:
    text = "Hi,\n\n</s>?\n- A\t<pad>"
    [written] = learnt(tokenizer_of(name), text).complete(["Plan:"], SamplingParams.greedy(90), seed=0)
    assert written == f" {text}"
    draft = Corpus((written,), ("Plan",), Provenance.PUBLIC)
    assert well_formed(draft, labels=("Plan",), min_words=1).corpus.prompts == (text,)


# ../shared/cases


@pytest.mark.skipif(not cases(), reason="no ../shared/cases beside this checkout")
def test_the_letters_of_the_cases_hold_one_end_of_text_each() -> None:
    tokenizer = tokenizer_of("assets:tiny-slm")
    for texts, labels in cases().values():
        corpus = Corpus(tuple(texts), tuple(labels), Provenance.PRIVATE)
        for [example] in encode_slots(
            tokenizer, corpus, tuple(dict.fromkeys(labels)), len(texts), GeneratorTraining(max_length=600)
        ):
            assert example.tokens.count(tokenizer.eos_token_id) == 1


@pytest.mark.skipif(not faq(), reason="no ../shared/cases beside this checkout")
def test_the_records_of_the_cases_come_back() -> None:
    assert all(parse_record(record(*pair)) == pair for pair in faq())


def test_texts_are_read_in_one_call_and_one_by_one_only_where_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("assets:tiny-slm")
    token_ids(tokenizer, "a")  # its facts are known: they ask the tokenizer, too
    whole, calls = type(tokenizer).__call__, list[list[str]]()

    def failing(self: Any, texts: list[str], *arguments: Any, **more: Any) -> Any:
        calls.append(list(texts))
        if "bad" in texts:
            raise ValueError("bad")
        return whole(self, texts, *arguments, **more)

    monkeypatch.setattr(type(tokenizer), "__call__", failing)
    assert all_readable(tokenizer, ["one", "", "two"]) == [True, False, True]
    assert calls == [["one", "", "two"]]
    assert all_readable(tokenizer, ["one", "bad", ""]) == [True, False, False]
    assert calls[1:] == [["one", "bad", ""], ["one"], ["bad"], [""]]
