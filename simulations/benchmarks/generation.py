"""Sampling: the library's loop beside a minimal one, and how much of a batch is padding.

    python simulations/benchmarks/generation.py [--json FILE] [--repeats 3] [--rows 1,16,64,256]

`LocalLLM.complete` (Hugging Face's `generate`, tokenising, drawing and decoding included) is held against a decoder of
some forty lines that knows one family and nothing else: fused projections, caches of the final size, plain draws. A
random Llama of 15 million parameters goes on for 64 tokens after prompts of 32, all rows in one batch, both loops in
float32 or both in bfloat16. Greedy, both write the same.

Waste is what batches compute over what their texts need, rows times the longest row by the sum of rows: of the batches
that `fedsynth.models.batches.by_length` makes, for lengths that are log-normal with mean 64 and for those of simulated
notes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import Bar, at_most, figure, options, seconds, told
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedsynth.models.batches import by_length
from fedsynth.models.devices import device
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import computes_in_bfloat16, load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.world.grammar import private_notes
from fedsynth.world.lexicon import load_world

PROMPT, NEW, VOCABULARY = 32, 64, 8192


def built(dtype: torch.dtype = torch.float32) -> Any:
    """A random model of 15 million parameters that never ends a text, with a tokenizer's special tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[load_tokenizer("assets:tiny-base").eos_token_id] = 0.0
        model.lm_head.weight *= 20.0  # as decided as a trained model
    return model.to(device(), dtype)


class Mini:
    """The least that a Llama needs to go on after prompts of one length."""

    def __init__(self, model: Any) -> None:
        self.model, inner = model, model.model
        self.layers = [
            (
                layer,
                torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]),
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
            )
            for layer in inner.layers
        ]
        self.heads, self.width = model.config.num_attention_heads, model.config.hidden_size

    @torch.inference_mode()
    def write(self, ids: Tensor, new: int, generator: torch.Generator | None = None) -> Tensor:
        """Token ids, (rows, new): the likeliest without a generator, else drawn from the model's distribution."""
        rows, read = ids.shape
        size = self.width // self.heads
        shape = (len(self.layers), rows, self.heads, read + new, size)
        kind = next(self.model.parameters()).dtype
        keys, values = torch.empty(shape, dtype=kind), torch.empty(shape, dtype=kind)
        out = torch.empty(rows, new, dtype=torch.long)
        begin, tokens = 0, ids
        for step in range(new):
            end = begin + tokens.shape[1]
            x = self.model.model.embed_tokens(tokens)
            cos, sin = self.model.model.rotary_emb(x, torch.arange(begin, end).unsqueeze(0))
            for number, (layer, qkv, gate_up) in enumerate(self.layers):
                q, k, v = F.linear(layer.input_layernorm(x), qkv).view(rows, -1, 3, self.heads, size).unbind(2)
                q, k = (self._turned(y.transpose(1, 2), cos, sin) for y in (q, k))
                keys[number, :, :, begin:end], values[number, :, :, begin:end] = k, v.transpose(1, 2)
                seen = F.scaled_dot_product_attention(
                    q, keys[number, :, :, :end], values[number, :, :, :end], is_causal=step == 0
                )
                x = x + layer.self_attn.o_proj(seen.transpose(1, 2).flatten(2))
                gate, up = F.linear(layer.post_attention_layernorm(x), gate_up).chunk(2, dim=-1)
                x = x + layer.mlp.down_proj(F.silu(gate) * up)
            logits = self.model.lm_head(self.model.model.norm(x[:, -1])).float()
            if generator is None:
                tokens = logits.argmax(-1, keepdim=True)
            else:
                mass = logits.softmax(-1).cumsum(-1)
                tokens = torch.searchsorted(mass, mass[:, -1:] * torch.rand(rows, 1, generator=generator))
            out[:, step : step + 1], begin = tokens, end
        return out

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos.unsqueeze(1) + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin.unsqueeze(1)


def prompts(count: int) -> list[str]:
    """Texts of simulated notes, each of the prompt's length in tokens (with the one that begins a text)."""
    tokenizer, found = load_tokenizer("assets:tiny-base"), []
    notes = private_notes(load_world("hospitals"), 0, 4000, 0, split="train").prompts
    joined = " ".join(notes).split()
    for start in range(0, len(joined), PROMPT):
        text = tokenizer.decode(
            tokenizer(" ".join(joined[start : start + PROMPT]), add_special_tokens=False)["input_ids"][: PROMPT - 1]
        )
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == PROMPT - 1:
            found.append(text)
        if len(found) == count:
            return found
    raise ValueError(f"{len(found)} prompts of {PROMPT} tokens, {count} are needed")


def loops(repeats: int, counts: list[int]) -> list[Bar]:
    """The library's loop over the minimal one."""
    tokenizer, bars = load_tokenizer("assets:tiny-base"), []
    kinds = [torch.float32, *([torch.bfloat16] if computes_in_bfloat16() else [])]
    for kind in kinds:
        model = built(kind)
        mini = Mini(model)
        for rows in counts:
            llm, texts = LocalLLM(model, tokenizer, batch_size=rows, workers=1), prompts(rows)
            ids, _ = llm._padded(llm._tokens(texts), left=True)
            if kind == torch.float32:
                told_by = [tokenizer.decode(row, skip_special_tokens=True) for row in mini.write(ids, NEW)]
                if llm.complete(texts, SamplingParams.greedy(NEW), seed=0) != told_by:
                    raise RuntimeError("the two loops do not write the same: what is timed is not one thing")
            generator, ask = torch.Generator().manual_seed(0), partial(llm.complete, texts, seed=0)
            drawn = SamplingParams(temperature=1.0, max_new_tokens=NEW)
            took = seconds({"greedy": partial(ask, SamplingParams.greedy(NEW)), "drawn": partial(ask, drawn),
                            "top-p 0.95": partial(ask, replace(drawn, top_p=0.95)),
                            "minimal greedy": partial(mini.write, ids, NEW),
                            "minimal drawn": partial(mini.write, ids, NEW, generator)}, repeats)  # fmt: skip
            name, case = str(kind).removeprefix("torch."), f"{rows} prompts of {PROMPT}, {NEW} new"
            bars.append(figure(f"tokens per second of CPU, drawn, {name}", case, rows * NEW / took["drawn"]))
            bars.append(
                figure(f"time of top-p beside drawing from all, {name}", case, took["top-p 0.95"] / took["drawn"])
            )
            for way in ("greedy", "drawn"):
                told_as, ratio = f"time of a minimal loop, {way}, {name}", took[way] / took[f"minimal {way}"]
                bars.append(at_most(told_as, case, ratio, 1.35))
    return bars


def waste() -> list[Bar]:
    """The waste of batches by length, beside batches in the order of the texts."""
    rng = np.random.default_rng(0)
    tokenizer = load_tokenizer("assets:tiny-base")
    notes = private_notes(load_world("hospitals"), 0, 2048, 0, split="train").prompts
    cases = {
        "log-normal, mean 64": np.maximum(1, rng.lognormal(np.log(64) - 0.18, 0.6, 2048)).astype(int).tolist(),
        "simulated notes": [len(row) for row in tokenizer(list(notes), add_special_tokens=False)["input_ids"]],
    }
    bars = []
    for case, lengths in cases.items():
        for size in (16, 64):
            batches: list[list[int]] = []

            def one(rows: Any, lengths: list[int] = lengths, batches: list[list[int]] = batches) -> list[int]:
                batches.append([lengths[row] for row in rows])
                return list(rows)

            by_length(one, lengths, batch_size=size, workers=1)
            as_given = [lengths[i : i + size] for i in range(0, len(lengths), size)]
            bars.append(at_most("waste of batches by length", f"{case}, {size} rows", _waste(batches), 1.15))
            bars.append(figure("waste in the order of texts", f"{case}, {size} rows", _waste(as_given)))
    return bars


def _waste(batches: list[list[int]]) -> float:
    return sum(len(batch) * max(batch) for batch in batches) / sum(map(sum, batches))


def main(arguments: list[str]) -> int:
    """Prints the table; 1 where a bar is not kept."""
    parser = options(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--rows", default="1,16,64,256", help="how many prompts are gone on from (default: all four)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts = [int(rows) for rows in chosen.rows.split(",")]
    return told([*loops(chosen.repeats, counts), *waste()], chosen.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
