"""A small random model of each family, with a tokenizer of its kind, made once per test run."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

CAUSAL = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gemma", "gemma3", "mistral")
WRITERS = (*CAUSAL, "t5")
TRAINED = tuple(family for family in WRITERS if family != "opt")  # under DP: OPT reads a batch's tokens as one list
ENCODERS = ("bert", "deberta")
ALL = (*WRITERS, *ENCODERS)
KINDS = {**dict.fromkeys(CAUSAL, "causal"), "t5": "seq2seq", **dict.fromkeys(ENCODERS, "encoder")}
VOCABULARY = 270  # a few more than any tokenizer here writes, as published models often have
LAYERS = 2

ROTARY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "init_std": 0.2,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": LAYERS,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
BUILD: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, GPT2),  # dropout 0.1 by default, as OPT, BERT, DeBERTa and T5
    "opt": (OPTConfig, OPTForCausalLM, OPT),
    "llama": (LlamaConfig, LlamaForCausalLM, ROTARY),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, ROTARY),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, ROTARY),
    "gemma": (GemmaConfig, GemmaForCausalLM, ROTARY),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**ROTARY, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {**ROTARY, "sliding_window": 8}),
    "t5": (T5Config, T5ForConditionalGeneration, T5),
    "bert": (BertConfig, BertModel, BERT),
    "deberta": (DebertaV2Config, DebertaV2Model, {**BERT, **DEBERTA}),
}


def byte_level(*specials: str, template: str | None = None, **names: str) -> Any:
    """One token per byte; `template` says what is put around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {token: number for number, token in enumerate([*specials, *letters])}
    inner = Tokenizer(models.BPE(numbers, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return _finished(inner, specials, template, names)


def word_piece(*specials: str, template: str, **names: str) -> Any:
    """Letters and digits, at the start of a word and within it."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:"
    words = [*specials, *letters, *(f"##{letter}" for letter in letters)]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return _finished(inner, specials, template, names)


def _finished(inner: Tokenizer, specials: tuple[str, ...], template: str | None, names: dict[str, str]) -> Any:
    if template is not None:
        numbered = [(special, inner.token_to_id(special)) for special in specials]
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbered)
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=inner, model_max_length=96, **names)


BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_NAMES = {f"{t.strip('[]').lower()}_token": t for t in BERT_TOKENS}


def tokenizer(family: str) -> Any:
    """As the family's own: which special tokens there are, and whether the tokenizer adds them."""
    if family == "gpt2":  # one special token for all, none for padding
        return byte_level("<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    if family == "opt":  # the same token begins and ends a text
        names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
        return byte_level("<s>", "<pad>", "</s>", template="</s> $A", **names)
    if family in ("qwen2", "qwen3"):  # no BOS
        return byte_level("<pad>", "<eos>", pad_token="<pad>", eos_token="<eos>")
    if family == "mistral":  # adds BOS, has no padding
        return byte_level("<s>", "</s>", template="<s> $A", bos_token="<s>", eos_token="</s>")
    if family == "t5":
        return byte_level("<pad>", "</s>", template="$A </s>", pad_token="<pad>", eos_token="</s>")
    if family == "bert":
        return word_piece(*BERT_TOKENS, template="[CLS] $A [SEP]", **BERT_NAMES)
    if family == "deberta":  # calls the same tokens BOS and EOS, too
        more = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
        return byte_level(*BERT_TOKENS, template="[CLS] $A [SEP]", **BERT_NAMES, **more)
    return tiny.tokenizer()


def model(family: str, seed: int = 0, **more: Any) -> Any:
    """Two layers of width 32; the global random state is left as it was."""
    config, build, settings = BUILD[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config(**{**settings, **more})).float().eval()


# Chat templates, each with the control tokens that it writes, as the families publish them.
_ANSWERS = "{% if add_generation_prompt %}{{ "
_TURN = "m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
_CHATML = "{% for m in messages %}{{ '<|im_start|>' + " + _TURN + " }}{% endfor %}" + _ANSWERS
_HEAD = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>'"
_NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
_ROLE = "('model' if m['role'] == 'assistant' else m['role'])"
_GEMMA = (
    "{{ bos_token }}" + _NO_SYSTEM + "{% for m in messages %}{{ '<start_of_turn>' + " + _ROLE + " + '\n' +"
    " m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}" + _ANSWERS + "'<start_of_turn>model\n' }}{% endif %}"
)
_INST = (
    "{{ bos_token }}" + _NO_SYSTEM + "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] +"
    " ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHAT: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": (
        "{{ bos_token }}{% for m in messages %}{{ " + _HEAD + " }}{% endfor %}" + _ANSWERS
        + "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "qwen2": (_CHATML + "'<|im_start|>assistant\n' }}{% endif %}", ("<|im_start|>", "<|im_end|>")),
    "qwen3": (  # without thoughts: an empty one stands before the answer
        _CHATML + "'<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
        "{% endif %}{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    ),
    "gemma3": (_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "mistral": (_INST, ("[INST]", "[/INST]")),
}  # fmt: skip
LONG = 2048  # positions of a model that reads questions, a byte each
CONTEXT = {"gpt2": "n_positions", "t5": None}  # its name elsewhere: max_position_embeddings


def chat_tokenizer(family: str) -> Any:
    """The family's tokenizer with its chat template."""
    made, (template, marks) = tokenizer(family), CHAT[family]
    made.add_tokens(list(marks), special_tokens=True)
    made.chat_template = template
    return made


@cache
def folder(family: str, *, chat: bool = False, long: bool = False) -> str:
    """A saved model with its tokenizer; removed at the end of the run.

    Args:
        family: One of `ALL`.
        chat: With a chat template (`CHAT`).
        long: With room for whole prompts.
    """
    where = Path(tempfile.mkdtemp(prefix=f"fedsynth-{family}-"))
    atexit.register(shutil.rmtree, where, ignore_errors=True)
    context = CONTEXT.get(family, "max_position_embeddings")
    model(family, **({context: LONG} if long and context else {})).save_pretrained(where)
    (chat_tokenizer(family) if chat else tokenizer(family)).save_pretrained(where)
    return str(where)
