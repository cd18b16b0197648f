import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fedsynth.models.llm as llm_module
from fedsynth.models import decoding
from fedsynth.models.decoding import Draw
from fedsynth.models.llm import LocalLLM
from fedsynth.models.sampling import SamplingParams

LETTERS = "abcdefghijkl: "
SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "\n"}


def letters(*, merges: tuple[tuple[str, str], ...] = (), adds_bos: bool = False, **specials: str) -> Any:
    """A tokenizer of single letters, and of the merged pairs."""
    specials = specials or SPECIALS
    words = [*specials.values(), *LETTERS, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(dict.fromkeys(words))}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
    if adds_bos:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", fast.bos_token_id)]
        )
    return fast


def tiny_llama(tokenizer: Any, *, seed: int = 0, context: int = 64) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.4,  # far from uniform
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny(tokenizer: Any = None, *, seed: int = 0, **options: Any) -> LocalLLM:
    tokenizer = letters() if tokenizer is None else tokenizer
    return LocalLLM(tiny_llama(tokenizer, seed=seed), tokenizer, **{"batch_size": 4, "workers": 1} | options)


def ids(llm: LocalLLM, text: str) -> list[int]:
    return [llm.tokenizer.bos_token_id, *llm.tokenizer(text, add_special_tokens=False)["input_ids"]]


@torch.inference_mode()
def log_probabilities(llm: LocalLLM, tokens: list[int]) -> torch.Tensor:
    """Of the next token after each, without padding or cache: shape (tokens, vocabulary)."""
    return llm.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)


# --- sampling ---


def sampled_and_expected(llm: LocalLLM, temperature: float) -> tuple[list[int], list[float]]:
    draws = 4000
    texts = llm.complete(["ab:"] * draws, SamplingParams(temperature=temperature, max_new_tokens=1), seed=7)
    exact = (log_probabilities(llm, ids(llm, "ab:"))[-1] / temperature).softmax(-1).tolist()
    expected = [draws * exact[llm.tokenizer.convert_tokens_to_ids(letter)] for letter in LETTERS]
    observed = [texts.count(letter) for letter in LETTERS]
    # Special tokens read as nothing: one class.
    return [*observed, draws - sum(observed)], [*expected, draws - sum(expected)]


def fits(observed: list[int], expected: list[float]) -> bool:
    # Pearson's approximation wants no nearly empty classes.
    small = [i for i, e in enumerate(expected) if e < 5]
    large = [i for i, e in enumerate(expected) if e >= 5]
    seen = [*(observed[i] for i in large), sum(observed[i] for i in small)]
    due = [*(expected[i] for i in large), sum(expected[i] for i in small)]
    if due[-1] < 1e-9:
        seen, due = seen[:-1], due[:-1]
    return bool(chisquare(seen, np.array(due) * sum(seen) / sum(due)).pvalue > 0.001)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sampled_tokens_follow_the_softmax(temperature: float) -> None:
    assert fits(*sampled_and_expected(tiny(batch_size=500), temperature))


def test_the_test_of_the_softmax_catches_missing_noise_and_a_wrong_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny(batch_size=500)
    observed, _ = sampled_and_expected(llm, 1.0)
    _, expected = sampled_and_expected(llm, 1.7)
    assert not fits(observed, expected)

    class Silent:
        def random(self, n: int) -> Any:
            return np.full(n, 0.5)

    monkeypatch.setattr(llm_module.np.random, "default_rng", lambda seed: Silent())
    assert not fits(*sampled_and_expected(llm, 1.0))


def drawn(logits: torch.Tensor, top_p: float, top_k: int = 0, *, grid: int = 4000) -> torch.Tensor:
    """How often each token is drawn when the uniform numbers are evenly spread."""
    uniforms = ((torch.arange(grid, dtype=torch.float64) + 0.5) / grid)[:, None]
    scores = Draw(uniforms, 3, 1.0, top_p, top_k)(torch.zeros(grid, 3, dtype=torch.long), logits.expand(grid, -1))
    assert bool((scores.isfinite().sum(1) == 1).all())
    return scores.argmax(1).bincount(minlength=logits.shape[-1]) / grid


@pytest.mark.parametrize("spread", [4.0, 0.1])  # the second needs more tokens than are ranked at first
def test_top_p_draws_from_the_nucleus_in_proportion(spread: float) -> None:
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(0)) * spread
    exact = TopPLogitsWarper(0.9)(torch.zeros(1, 3, dtype=torch.long), logits).softmax(-1)[0]
    assert ((exact > 0).sum() > decoding.RANKED) == (spread < 1)
    # Inversion over a grid of numbers errs by less than one grid step per token.
    torch.testing.assert_close(drawn(logits, 0.9), exact, atol=1 / 4000 + 1e-6, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "top_k", "expected"),
    [
        (1.0, 0, [0.1, 0.4, 0.2, 0.3]),
        (1.0, 3, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, 1, [0, 1, 0, 0]),
        (0.65, 0, [0, 4 / 7, 0, 3 / 7]),  # .4 + .3 hold .65 of all
        (0.65, 3, [0, 4 / 7, 0, 3 / 7]),  # 4/9 does not, and 7/9 does
        (0.65, 2, [0, 4 / 7, 0, 3 / 7]),
        (0.5, 2, [0, 1, 0, 0]),  # 4/7 of what the two hold; of all tokens it would be .4, and two were drawn
        (0.5, 4, [0, 4 / 7, 0, 3 / 7]),
        (0.65, 9, [0, 4 / 7, 0, 3 / 7]),  # more than there are
    ],
)
def test_top_k_draws_from_the_likeliest_and_top_p_from_their_mass(
    top_p: float, top_k: int, expected: list[float]
) -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    found = drawn(logits, top_p, top_k)
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1 / 4000 + 1e-6, rtol=0)


def test_top_k_draws_as_transformers_does_also_beyond_what_is_ranked_at_first() -> None:
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(0)) * 0.1
    none = torch.zeros(1, 3, dtype=torch.long)
    exact = TopPLogitsWarper(0.9)(none, TopKLogitsWarper(400)(none, logits)).softmax(-1)[0]  # type: ignore[no-untyped-call]  # of transformers
    assert decoding.RANKED < int((exact > 0).sum()) < 400
    torch.testing.assert_close(drawn(logits, 0.9, 400), exact, atol=1 / 4000 + 1e-6, rtol=0)


def test_a_model_writes_the_likeliest_token_where_one_is_left_to_draw() -> None:
    llm = tiny()
    hot = SamplingParams(temperature=5.0, top_k=1, max_new_tokens=8)
    greedy = llm.complete(["ab", "cd:"], SamplingParams.greedy(8), seed=0)
    assert llm.complete(["ab", "cd:"], hot, seed=3) == greedy
    assert llm.complete(["ab", "cd:"], replace(hot, top_k=0), seed=3) != greedy


def test_each_new_token_takes_the_next_number_of_its_row() -> None:
    even = torch.zeros(2, 4)  # four tokens of mass 1/4
    draw = Draw(torch.tensor([[0.1, 0.6], [0.9, 0.3]], dtype=torch.float64), 5, 1.0, 1.0)
    assert draw(torch.zeros(2, 5, dtype=torch.long), even).argmax(1).tolist() == [0, 3]
    assert draw(torch.zeros(2, 6, dtype=torch.long), even).argmax(1).tolist() == [2, 1]


def test_a_token_of_no_mass_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert drawn(logits, 1.0).tolist() == [0, 0.5, 0, 0.5, 0]


def test_global_generators_are_neither_moved_nor_read() -> None:
    llm = tiny()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002 - the global one, on purpose
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002 - the global one, on purpose
    first = llm.complete(["ab"] * 9, SamplingParams(temperature=1.0, max_new_tokens=8), seed=3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (str(np.random.get_state()), random.getstate())  # noqa: NPY002 - the global one, on purpose
    torch.manual_seed(2), np.random.seed(2), random.seed(2)  # noqa: NPY002 - the global one, on purpose
    assert llm.complete(["ab"] * 9, SamplingParams(temperature=1.0, max_new_tokens=8), seed=3) == first
    assert llm.complete(["ab"] * 9, SamplingParams(temperature=1.0, max_new_tokens=8), seed=4) != first


# --- batches ---

PROMPTS = ["a:", "abcabcabc:", "fg", "a:", "klkl dd", "c", "abcdefghijkl:", "ee:", "b:"]


def test_a_text_depends_on_its_place_and_seed_not_on_the_other_prompts() -> None:
    llm = tiny()
    together = llm.complete(PROMPTS, SamplingParams(temperature=1.0, max_new_tokens=12), seed=5)
    others = ["lllllllllllllll"] * 8 + ["b:"]
    assert llm.complete(others, SamplingParams(temperature=1.0, max_new_tokens=12), seed=5)[8] == together[8]
    assert llm.complete(PROMPTS[:1], SamplingParams(temperature=1.0, max_new_tokens=12), seed=5)[0] == together[0]
    assert together[0] != together[3]  # the same prompt at another place is another draw


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 64}, {"workers": 2}, {"workers": 5}])
def test_batches_and_workers_change_no_result(options: dict[str, int]) -> None:
    one, other = tiny(), tiny(**options)
    asked = {"sampling": SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=12), "seed": 5}
    assert one.complete(PROMPTS, **asked) == other.complete(PROMPTS, **asked)
    continuations = [p[::-1] for p in PROMPTS]
    np.testing.assert_allclose(one.score(PROMPTS, continuations), other.score(PROMPTS, continuations), atol=1e-5)
    np.testing.assert_allclose(one.embed(PROMPTS), other.embed(PROMPTS), atol=1e-5)


def test_workers_leave_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    tiny(workers=2).embed(PROMPTS)
    assert torch.get_num_threads() == before


def test_nothing_asked_nothing_answered() -> None:
    llm = tiny()
    assert llm.complete([], SamplingParams(temperature=1.0, max_new_tokens=3), seed=0) == []
    assert llm.score([], []) == []
    assert llm.embed([]).shape == (0, 16)


# --- completion ---


def test_greedy_text_ends_before_the_end_mark() -> None:
    stopped = 0
    for seed in range(4):
        llm = tiny(seed=seed)
        for prompt, text in zip(PROMPTS, llm.complete(PROMPTS, SamplingParams.greedy(10), seed=0), strict=True):
            tokens, new = ids(llm, prompt), []
            while len(new) < 10:
                new.append(int(log_probabilities(llm, tokens + new)[-1].argmax()))
                if new[-1] == llm.tokenizer.eos_token_id:
                    stopped += 1
                    break
            assert text == "".join(t for t in llm.tokenizer.convert_ids_to_tokens(new) if t not in SPECIALS.values())
    assert stopped > 0


def test_a_prompt_too_long_for_the_context_is_refused_with_its_length() -> None:
    llm = tiny()
    llm.complete(["a" * 53], SamplingParams(temperature=1.0, max_new_tokens=10), seed=0)  # 53 + BOS + 10 = 64
    with pytest.raises(ValueError, match=r"text 1 has 55 tokens and 10 more .* context holds 64: use fewer or shorter"):
        llm.complete(["a", "a" * 54], SamplingParams(temperature=1.0, max_new_tokens=10), seed=0)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_arguments_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SamplingParams(temperature=1.0, max_new_tokens=2), **wrong)


# --- scores ---


def test_score_is_the_mean_log_likelihood_of_the_continuation_alone() -> None:
    llm = tiny()
    pairs = [("ab:", " cd"), ("a", "k"), ("abcabc:", " lkj hg"), ("", "ab"), ("c:", " cdefgh")]
    scores = llm.score([p for p, _ in pairs], [c for _, c in pairs])
    for (prompt, continuation), score in zip(pairs, scores, strict=True):
        start, whole = ids(llm, prompt), ids(llm, prompt + continuation)
        logs = log_probabilities(llm, whole)
        by_hand = [float(logs[i - 1, whole[i]]) for i in range(len(start), len(whole))]
        assert score == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)


MANY = [" cd", "k", " lkj hg", "a", " cdefghijkl"]


def test_several_continuations_of_a_prompt_are_scored_as_each_by_itself() -> None:
    llm, prompts = tiny(), ["abcabcabc abc abcabc abc:", "ab abcdefghijk abcdefgh abcdef:"]
    asked = [(prompt, continuation) for continuation in MANY for prompt in prompts]  # not one prompt after the other
    alone = [llm.score([p], [c])[0] for p, c in asked]
    read = list[int]()
    forward = llm.model.forward

    def counted(**given: Any) -> Any:
        read.append(given["input_ids"].numel())
        return forward(**given)

    llm.model.forward = counted
    assert llm.score([p for p, _ in asked], [c for _, c in asked]) == pytest.approx(alone, abs=1e-5)
    assert sum(read) < sum(len(ids(llm, p + c)) for p, c in asked) / 2
    assert alone != pytest.approx([llm.score([p], [c])[0] for p, c in reversed(asked)], abs=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "qwen2", "opt"])
def test_of_any_architecture_a_prompt_is_read_once_for_its_continuations(family: str) -> None:
    """Absolute positions, a window shorter than the prompt, shared keys, positions counted from the mask."""
    sizes = {"vocab_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16}
    more: dict[str, Any] = {
        "gpt2": {},
        "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "head_dim": 8, "num_key_value_heads": 1},
        "qwen2": {"num_key_value_heads": 1},
        "opt": {"word_embed_proj_dim": 16},
    }[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **more, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    llm = LocalLLM(AutoModelForCausalLM.from_config(config).eval(), letters())
    prompt = "abcabcabc abc abcabc abc:"
    together = llm.score([prompt] * len(MANY), MANY)
    assert together == pytest.approx([llm.score([prompt], [c])[0] for c in MANY], abs=1e-5)


def test_where_tokens_merge_across_the_border_the_prompt_keeps_its_own() -> None:
    llm = tiny(letters(merges=(("a", "b"),)))
    assert len(ids(llm, "ab")) == 2  # BOS and the merged pair
    by_hand = log_probabilities(llm, ids(llm, "a"))[-1, llm.tokenizer.convert_tokens_to_ids("b")]
    assert llm.score(["a"], ["b"])[0] == pytest.approx(float(by_hand), abs=1e-5)


def test_bos_stands_once_whether_or_not_the_tokenizer_adds_it() -> None:
    plain, adding = tiny(letters()), tiny(letters(adds_bos=True))
    assert (
        adding.tokenizer("a")["input_ids"][0] == adding.tokenizer.bos_token_id != plain.tokenizer("a")["input_ids"][0]
    )
    assert plain.score(["ab:"], [" cd"]) == adding.score(["ab:"], [" cd"]) != plain.score(["<bos>ab:"], [" cd"])


def test_pairs_that_cannot_be_scored_are_refused() -> None:
    llm = tiny()
    with pytest.raises(ValueError, match="continuation 1 holds no token"):
        llm.score(["a", "b"], ["c", ""])
    with pytest.raises(ValueError, match="got 1 for 2"):
        llm.score(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="shorter texts"):
        llm.score(["a" * 60], ["b" * 10])


# --- embeddings ---


def test_an_embedding_is_the_mean_of_its_texts_last_states_without_bos() -> None:
    llm = tiny()
    found = llm.embed(["abc", "klklklkl", "d"])
    assert found.dtype == np.float32
    with torch.inference_mode():
        states = llm.model.base_model(input_ids=torch.tensor([ids(llm, "abc")])).last_hidden_state[0]
    np.testing.assert_allclose(found[0], states[1:].mean(0).numpy(), atol=1e-5)


# --- loading ---


def test_a_saved_model_is_loaded_with_eos_for_padding_and_without_its_own_sampling_habits(tmp_path: Path) -> None:
    tokenizer = letters(bos_token="<bos>", eos_token="\n")
    model = tiny_llama(tokenizer)
    in_memory = LocalLLM(model, tokenizer, workers=1)
    asked = {"sampling": SamplingParams.greedy(12), "seed": 0}
    expected = in_memory.complete(PROMPTS, **asked)
    model.generation_config.repetition_penalty = 50.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    loaded = LocalLLM.load(tmp_path, workers=1)
    assert loaded.pad == tokenizer.eos_token_id
    assert loaded.complete(PROMPTS, **asked) == expected


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        LocalLLM.load(tmp_path)


# --- what does not fit ---


def test_what_the_model_has_no_room_for_is_told_and_is_what_it_would_refuse() -> None:
    llm = tiny()  # a context of 64 tokens, of which the BOS is one
    assert llm.misfits(["a" * 59, "a" * 60, "a"], 4) == [None, "too long", None]
    llm.complete(["a" * 59], SamplingParams.greedy(4), seed=0)
    with pytest.raises(ValueError, match="context holds 64"):
        llm.complete(["a" * 60], SamplingParams.greedy(4), seed=0)
    assert llm.misfits(["a", "a", "a"], 0, ["b" * 62, "b" * 63, "b"]) == [None, "too long", None]
    llm.score(["a"], ["b" * 62])
    with pytest.raises(ValueError, match="context holds 64"):
        llm.score(["a"], ["b" * 63])


def test_what_a_tokenizer_cannot_read_is_told_and_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny()
    real = llm._tokens

    def tokens(texts: Any) -> Any:
        if any("c" in text for text in texts):
            raise KeyError("c")
        return real(texts)

    monkeypatch.setattr(llm, "_tokens", tokens)
    assert llm.misfits(["a", "c", "b" * 70]) == [None, "unreadable to the model", "too long"]


def test_a_wide_model_has_batches_for_all_cores_and_a_narrow_one_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(LocalLLM, "load", lambda *_, **more: asked.append(more))
    for is_wide in (True, False):
        monkeypatch.setattr("fedsynth.models.llm.wide", lambda _, is_wide=is_wide: is_wide)
        LocalLLM.for_server("a model")
    assert [more["batch_size"] for more in asked] == [48, 256]
    assert all(more["workers"] == len(os.sched_getaffinity(0)) for more in asked)
