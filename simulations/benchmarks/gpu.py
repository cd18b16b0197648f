"""One card in one call of under six minutes: are sums right, how fast is the LLM, what do DP steps cost.

    python simulations/benchmarks/gpu.py [--json FILE]       # on a machine with a CUDA GPU
    python simulations/benchmarks/gpu.py --cpu-rehearsal     # every line of it with tiny models, in under a minute

It downloads nothing: models of two published shapes (Qwen2.5-1.5B, SmolLM2-135M) get random weights on the spot, which
compute as fast as trained ones. Bars with a limit must be kept; the others are figures. Without a GPU it says so, and
exits with 3. A rehearsal's figures say nothing about a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measuring import Bar, at_least, at_most, figure, options, peak_bytes, seconds, told
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fedsynth.dpsgd import HalfPrecision, clipper
from fedsynth.dpsgd.bookkeeping import MARGIN
from fedsynth.dpsgd.stacked import stacked
from fedsynth.models.adapters import attach_lora
from fedsynth.models.devices import device, gpu_names
from fedsynth.models.llm import LocalLLM
from fedsynth.models.sampling import SamplingParams
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.training.dp_training import add_noise, clipped_sum, clipped_sums, next_token_losses, trainable
from fedsynth.training.examples import Example

NOT_RUN = 3  # exit status on a machine without a GPU
CLIP_NORM = 0.3
WORST = 1e-3  # of a sum in float32, relative to one in float64
DEARER = 2.0  # a step of DP-SGD against a plain one


@dataclass(frozen=True)
class Size:
    """The sizes of the measured models and batches.

    Attributes:
        copied: Bytes that the copy kernel reads.
        llm: Configuration of the LLM.
        new: Tokens that it writes after each prompt.
        prompts: Numbers of prompts at once.
        generator: Configuration of the generator.
        batch: Examples of a step.
        length: Tokens of an example, and of a prompt.
    """

    copied: int
    llm: Any
    new: int
    prompts: tuple[int, ...]
    generator: Any
    batch: int
    length: int


def whole() -> Size:
    """The published shapes of Qwen2.5-1.5B and SmolLM2-135M."""
    llm = Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    generator = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return Size(2**30, llm, 64, (1, 16, 64, 256), generator, 64, 64)


def rehearsed() -> Size:
    """Shapes with which a CPU needs seconds."""
    same = {"vocab_size": 512, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm = Qwen2Config(hidden_size=64, num_key_value_heads=2, tie_word_embeddings=True, **same)
    generator = LlamaConfig(hidden_size=64, num_key_value_heads=2, tie_word_embeddings=True, **same)
    return Size(2**22, llm, 8, (1, 4), generator, 8, 16)


class Numbers:
    """A tokenizer of numbers: `LocalLLM` reads and writes tokens of a random model with it."""

    chat_template = None
    bos_token_id = eos_token_id = pad_token_id = unk_token_id = sep_token_id = cls_token_id = mask_token_id = None
    eos_token = ""
    all_special_ids: tuple[int, ...] = ()
    all_special_tokens: tuple[str, ...] = ()

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        """A token for each number, and one for any other word."""
        return {"input_ids": [[int(w) if w.isdigit() else 0 for w in text.split()] for text in texts]}

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        """The numbers."""
        return " ".join(map(str, tokens))


def main() -> int:
    """Measures all; the exit status."""
    parser = options(__doc__)
    parser.add_argument("--cpu-rehearsal", action="store_true", help="run all of it with tiny models on the CPU")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not asked.cpu_rehearsal:
        print("not run: no CUDA GPU")
        return NOT_RUN
    size, begun = (rehearsed() if asked.cpu_rehearsal else whole()), time.perf_counter()
    repeats = min(asked.repeats, 2 if asked.cpu_rehearsal else 5)
    print(
        f"{'a rehearsal: ' if asked.cpu_rehearsal else ''}{', '.join(gpu_names()) or 'CPU'}, torch {torch.__version__}"
    )
    bars: list[Bar] = []
    for part in (sums, half, writing, steps):
        bars += part(size, repeats)
        print(f"{part.__name__}: {time.perf_counter() - begun:.0f} s", flush=True)
    return told(bars, asked.json)


def sums(size: Size, repeats: int) -> list[Bar]:  # noqa: ARG001 - as the other parts
    """Clipped sums on the device, of one client and of three at once, against brute force in float64 on the CPU."""
    config = rehearsed().generator
    model, texts = adapted(config, torch.float32).to(device()), examples(24, 12, config.vocab_size)
    exact = adapted(config, torch.float32).double().cpu()
    each = [clipped_alone(exact, text) for text in texts]
    bars = []
    with clipper(model.train(), CLIP_NORM) as clip:
        found = clipped_sum(clip, model, [[text] for text in texts], pad=0, max_physical_batch_size=7)
    bars.append(at_most("a sum's distance from float64", "one client", apart(flat(found), sum(each)), WORST))
    own = [texts[client::3] for client in range(3)]
    factors = {weight: torch.stack([weight.detach()] * 3) for weight in trainable(model)}
    with stacked(model, factors, CLIP_NORM) as stack:
        units = [[[text] for text in part] for part in own]
        rows = clipped_sums(stack, model, units, pad=0, max_physical_batch_size=7)
    for client, row in enumerate(rows):
        far = apart(flat([row]), sum(each[client::3]))
        bars.append(at_most("a sum's distance from float64", f"client {client} of 3", far, WORST))
    cut = float(np.mean([float(alone(exact, text).norm()) > CLIP_NORM for text in texts]))
    return [*bars, at_least("share of gradients that were clipped", f"{len(each)} units", cut, 0.5)]


def half(size: Size, repeats: int) -> list[Bar]:  # noqa: ARG001 - as the other parts
    """A base in bfloat16 is refused under a clip norm."""
    model, refused = adapted(rehearsed().generator, torch.bfloat16).to(device()), 0
    try:
        with clipper(model.train(), CLIP_NORM):
            pass
    except HalfPrecision:
        refused = 1
    return [at_least("bfloat16 under dp is refused", "1 = refused", refused, 1)]


def writing(size: Size, repeats: int) -> list[Bar]:
    """Tokens per second of the LLM in bfloat16, beside the memory bandwidth: each token reads all weights once."""
    bandwidth = copied_per_second(size.copied)
    model = random_model(size.llm, torch.bfloat16).eval()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    llm = LocalLLM(model, Numbers(), batch_size=max(size.prompts), workers=1)
    rng = np.random.default_rng(0)
    bars = [figure("bandwidth of a copy, GB/s", f"{size.copied >> 20} MiB", bandwidth / 1e9)]
    bars.append(figure("weights of the LLM, GB", "bfloat16", held / 1e9))
    for count in size.prompts:
        prompts = [" ".join(map(str, rng.integers(3, 500, size.length))) for _ in range(count)]

        def write(prompts: list[str] = prompts) -> None:
            llm.complete(prompts, SamplingParams(temperature=1.0, top_p=0.95, max_new_tokens=size.new), seed=0)

        took = seconds({"write": write}, min(repeats, 2))["write"]
        case = f"{count} prompts of {size.length}, {size.new} new"
        bars.append(figure("tokens per second", case, count * size.new / took))
        bars.append(figure("share of the bandwidth", case, held * size.new / took / bandwidth))
    bars.append(figure("memory of writing beside the weights, GB", case, peak_bytes(write) / 1e9))
    return bars


def copied_per_second(count: int) -> float:
    """Bytes that a copy of so many bytes reads and writes in a second."""
    given = torch.empty(count, dtype=torch.uint8, device=device())
    taken = torch.empty_like(given)
    return 2 * count / seconds({"copy": lambda: taken.copy_(given)}, 5)["copy"]


def steps(size: Size, repeats: int) -> list[Bar]:
    """A step of DP-SGD on LoRA against a plain one, in float32: seconds, and memory beside the weights."""
    texts = examples(size.batch, size.length, size.generator.vocab_size)
    models = [adapted(size.generator, torch.float32).to(device()).train() for _ in range(2)]
    ways: dict[str, Callable[[], None]] = {"plain": plain(models[0], texts)}
    with clipper(models[1], CLIP_NORM) as clip:
        ways["dp"] = private(models[1], clip, texts)
        took = seconds(ways, repeats)
        memory = {name: peak_bytes(way) for name, way in ways.items()}
    case = f"{size.batch} x {size.length} tokens"
    return [
        figure("seconds of a plain step", case, took["plain"]),
        figure("seconds of a DP step", case, took["dp"]),
        at_most("DP step / plain step", case, took["dp"] / took["plain"], DEARER if torch.cuda.is_available() else 9.0),
        figure("memory of a plain step, GB", case, memory["plain"] / 1e9),
        figure("memory of a DP step, GB", case, memory["dp"] / 1e9),
    ]


def plain(model: nn.Module, texts: Sequence[Example]) -> Callable[[], None]:
    """A step without a guarantee."""
    optimizer = torch.optim.Adam(trainable(model), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        next_token_losses(model, texts, 0).mean().backward()
        optimizer.step()

    return step


def private(model: nn.Module, clip: Any, texts: Sequence[Example]) -> Callable[[], None]:
    """A step with a grant's noise."""
    weights, stream = trainable(model), GrantRandomness(bytes(32))
    optimizer = torch.optim.Adam(weights, lr=1e-4)

    def step() -> None:
        clip.add(lambda: next_token_losses(model, texts, 0), range(len(texts)))
        for weight, total in zip(weights, clip.take(), strict=True):
            add_noise(total, CLIP_NORM, stream)
            weight.grad = total.to(weight.dtype).div_(len(texts))
        optimizer.step()

    return step


def random_model(config: Any, dtype: torch.dtype) -> Any:
    """A model of a shape, with random weights, made where it will be used."""
    torch.manual_seed(0)
    kind = Qwen2ForCausalLM if isinstance(config, Qwen2Config) else LlamaForCausalLM
    with torch.device(device()):
        return kind(config).to(dtype)


def adapted(config: Any, dtype: torch.dtype) -> Any:
    """A random model with LoRA past its start: with B at zero every gradient of A would be zero."""
    model = attach_lora(random_model(config, dtype), rank=8, alpha=16.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
            if "lora_B" in name:
                weight.copy_(torch.empty(weight.shape).normal_(std=0.2, generator=generator))
    return model


def examples(count: int, length: int, vocabulary: int) -> list[Example]:
    """Random texts, half of each learnt."""
    rng = np.random.default_rng(0)
    return [Example(tuple(rng.integers(3, vocabulary, length).tolist()), length // 2) for _ in range(count)]


def alone(model: Any, text: Example) -> Tensor:
    """One example's gradient by autograd alone."""
    model.zero_grad(set_to_none=True)
    next_token_losses(model, [text], 0).sum().backward()
    return flat([weight.grad for weight in trainable(model)])


def clipped_alone(model: Any, text: Example) -> Tensor:
    """The same, at most as long as C."""
    grad = alone(model, text)
    return grad * min(1.0, MARGIN * CLIP_NORM / float(grad.norm()))


def flat(parts: Sequence[Tensor]) -> Tensor:
    """All numbers in float64 on the CPU."""
    return torch.cat([part.detach().double().cpu().flatten() for part in parts])


def apart(found: Tensor, wanted: Any) -> float:
    """Relative distance."""
    return float((found - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    raise SystemExit(main())
