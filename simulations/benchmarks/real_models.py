"""CPU seconds of the work on a real language model: beside plain transformers, and beside llama.cpp.

    FEDSYNTH_MODELS=... python simulations/benchmarks/real_models.py [--model smollm2-135m-instruct] [--repeats 3]
        [--count 16] [--llama PYTHON --gguf FILE] [--json FILE]

Four things cost the time of a run with real models. Each is done in turns by fedsynth, by plain transformers and, if
asked, by llama.cpp, all on one thread; the clock is process CPU time. A row is the median of seconds per piece.

| piece | fedsynth | plain | llama.cpp |
|---|---|---|---|
| DP step | a batch, clipped text by text, noised | the same batch as plain training of a LoRA by PEFT | - |
| draft | a sampled line after a control code | `model.generate`, same batch and lengths | one after the other |
| text | a sampled answer to a question | `apply_chat_template`, `model.generate` | chat completion |
| judgement | a text's likelihood after 12 codes | logits of the 12 rows, `cross_entropy` | logits of each row |

Texts end where the model ends them, so that drafts and texts are compared by seconds per token that was written.
llama.cpp runs in a process of its own: PYTHON is an interpreter with `llama_cpp`, FILE the same model as GGUF. Its
weights have 4 bits where the others' have 32 (or 16, where that pays): it is another trade, not the same work.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from dp_step import private
from measuring import Bar, figure, options, told
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsynth.models.adapters import attach_lora
from fedsynth.models.chat import Chat
from fedsynth.models.hub import locate
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_generator, load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.task import Task
from fedsynth.training.examples import encode_text

LABELS = (
    "card arrival", "card delivery", "card not working", "declined payment", "pending payment", "returned payment",
    "missing transfer", "pending transfer", "failed transfer", "declined transfer", "balance", "transfer time",
)  # fmt: skip
CARD = Task(
    domain="Customers of an online bank type short messages into its support chat.",
    noun="a message of a customer",
    style="The customer writes in the first person.",
)
SAID = "I ordered this {} two weeks ago and still have not heard anything, so I wonder what I can do about it now."
LENGTH, DRAFT, TEXT, TOP_P, TEMPERATURE = 56, 40, 48, 0.95, 0.8

Way = Callable[[], tuple[float, int]]
"""Does all pieces once; returns CPU seconds, and tokens written (or pieces)."""

LLAMA = """
import json, sys, time
import numpy as np
from llama_cpp import Llama
asked = json.loads(sys.stdin.readline())
few = dict(n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, seed=0)
llm, judge = Llama(asked["gguf"], **few), Llama(asked["gguf"], logits_all=True, **few)
draws = dict(temperature=asked["temperature"], top_p=asked["top_p"], top_k=0)
for line in sys.stdin:
    start, done = time.process_time(), 0
    if line.strip() == "draft":
        for prompt in asked["codes"]:
            said = llm.create_completion(prompt, max_tokens=asked["draft"], stop=["\\n"], **draws)
            done += said["usage"]["completion_tokens"]
    elif line.strip() == "text":
        for question in asked["questions"]:
            turns = [{"role": "user", "content": question}]
            said = llm.create_chat_completion(turns, max_tokens=asked["text"], **draws)
            done += said["usage"]["completion_tokens"]
    else:
        for text in asked["judged"]:
            for code in asked["among"]:
                begin, both = (judge.tokenize(t.encode()) for t in (code, code + text))
                judge.reset()
                judge.eval(both)
                rows = np.array(judge.scores[len(begin) - 1 : len(both) - 1], dtype=np.float64)
                rows -= rows.max(1, keepdims=True)
                (rows - np.log(np.exp(rows).sum(1, keepdims=True)))[range(len(rows)), both[len(begin) :]].mean()
            done += 1
    print(json.dumps([time.process_time() - start, done]), flush=True)
"""


def timed(work: Callable[[], int]) -> Way:
    """A way that runs in this process."""

    def way() -> tuple[float, int]:
        start = time.process_time()
        done = work()
        return time.process_time() - start, done

    return way


def in_turns(ways: Mapping[str, Way], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median CPU seconds of each way per token (or piece), and of all; run A, B, C, A, ...; the first turn warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    whole: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            taken, done = way()
            if turn:
                found[name].append(taken / max(1, done))
                whole[name].append(taken)
    each, every = ({name: statistics.median(of) for name, of in kind.items()} for kind in (found, whole))
    return each, every


def steps(name: str, count: int) -> dict[str, Way]:
    """A step of DP-SGD, and one of plain training by PEFT, on one batch of texts."""
    tokenizer = load_tokenizer(name)
    batch = [
        encode_text(tokenizer, CARD.code(LABELS[i % 12]), SAID.format(LABELS[i % 12]), LENGTH, "causal")
        for i in range(count)
    ]
    own = attach_lora(load_generator(name, "float32"), rank=8, alpha=16.0, seed=0).train()
    dp = private(own, "bookkeeping")
    base = AutoModelForCausalLM.from_pretrained(locate(name), dtype=torch.float32)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
    plain = get_peft_model(base, settings).train()
    optimizer = torch.optim.AdamW([w for w in plain.parameters() if w.requires_grad], lr=1e-4)
    width = max(len(e.tokens) for e in batch)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[*e.tokens, *[pad] * (width - len(e.tokens))] for e in batch])
    wanted = torch.tensor([[*[-100] * e.start, *e.tokens[e.start :], *[-100] * (width - len(e.tokens))] for e in batch])

    def one() -> int:
        optimizer.zero_grad(set_to_none=True)
        mask = (torch.arange(width) < torch.tensor([[len(e.tokens)] for e in batch])).long()
        plain(input_ids=ids, attention_mask=mask, labels=wanted).loss.backward()
        optimizer.step()
        return 1

    def step() -> int:
        dp(batch)
        return 1

    return {"fedsynth": timed(step), "plain": timed(one)}


def written(llm: LocalLLM, prompts: Sequence[str | Chat], most: int) -> dict[str, Way]:
    """Sampled lines after the prompts: by `complete`, and by `generate` on the same batch."""
    tokenizer = AutoTokenizer.from_pretrained(llm.tokenizer.name_or_path, padding_side="left")
    model: Any = llm.model
    sampling = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=most)
    turns = 0

    def own() -> int:
        nonlocal turns
        turns += 1
        before = llm.used.written
        llm.complete(prompts, sampling, seed=turns)
        return llm.used.written - before

    def plain() -> int:
        if isinstance(prompts[0], Chat):
            told = [[{"role": "user", "content": p.user}] for p in prompts if isinstance(p, Chat)]
            rows = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in told]
        else:
            rows = [str(p) for p in prompts]
        read = tokenizer(rows, return_tensors="pt", padding=True, add_special_tokens=isinstance(prompts[0], str))
        draws = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
        with torch.no_grad():
            new = model.generate(**read, max_new_tokens=most, pad_token_id=tokenizer.pad_token_id, **draws)
        new = new[:, read["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        return sum(len(tokenizer(text)["input_ids"]) for text in texts)

    return {"fedsynth": timed(own), "plain": timed(plain)}


def judged(llm: LocalLLM, texts: Sequence[str], codes: Sequence[str]) -> dict[str, Way]:
    """Likelihoods of each text after each code: by `score`, and by the logits of a padded batch."""
    tokenizer: Any = llm.tokenizer
    model: Any = llm.model

    def own() -> int:
        llm.score(list(codes) * len(texts), [text for text in texts for _ in codes])
        return len(texts)

    @torch.no_grad()
    def plain() -> int:
        for text in texts:
            begun = [tokenizer(code)["input_ids"] for code in codes]
            read = tokenizer([code + text for code in codes], return_tensors="pt", padding=True, padding_side="right")
            logits = model(**read).logits[:, :-1].float()
            wanted = read["input_ids"][:, 1:].clone()
            wanted[read["attention_mask"][:, 1:] == 0] = -100
            for row, start in zip(wanted, begun, strict=True):
                row[: len(start) - 1] = -100
            F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted).sum(1)
        return len(texts)

    return {"fedsynth": timed(own), "plain": timed(plain)}


class Llama:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, asked: Mapping[str, Any]) -> None:
        self.process = subprocess.Popen(
            [python, "-c", LLAMA], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._say(json.dumps(asked))

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def way(self, piece: str) -> Way:
        """One of its pieces, timed by itself."""

        def ask() -> tuple[float, int]:
            self._say(piece)
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError("llama.cpp's process ended: has PYTHON the package llama_cpp, is FILE a GGUF file?")
            taken, done = json.loads(line)
            return float(taken), int(done)

        return ask

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """All pieces, as a table."""
    parser = options(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder under FEDSYNTH_MODELS")
    parser.add_argument("--count", type=int, default=16, help="texts of a batch (default 16)")
    parser.add_argument("--llama", default="", help="an interpreter that has llama_cpp")
    parser.add_argument("--gguf", default="", help="the same model for llama.cpp")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    name, count = f"models:{asked.model}", asked.count
    codes = [CARD.code(LABELS[i % 12]) for i in range(count)]
    questions = [CARD.question(LABELS[i % 12]) for i in range(count)]
    texts = [" " + SAID.format(LABELS[i % 12]) for i in range(max(1, count // 4))]
    among = [CARD.code(label) for label in LABELS]
    llm = LocalLLM.load(name, batch_size=256, workers=1)
    print(f"{name} in {str(llm.model.dtype).removeprefix('torch.')}; DP steps in float32")
    beside = None
    if asked.llama:
        beside = Llama(
            asked.llama,
            {
                "gguf": asked.gguf, "codes": codes, "questions": questions, "judged": texts, "among": among,
                "draft": DRAFT, "text": TEXT, "temperature": TEMPERATURE, "top_p": TOP_P,
            },
        )  # fmt: skip
    pieces: dict[str, tuple[str, Callable[[], dict[str, Way]]]] = {
        "DP step": (f"{count} texts, rank 8", lambda: steps(name, count)),
        "draft": (f"per token, {count} codes", lambda: written(llm, codes, DRAFT)),
        "text": (f"per token, {count} questions", lambda: written(llm, [Chat(q) for q in questions], TEXT)),
        "judgement": (f"a text after {len(among)} codes", lambda: judged(llm, texts, among)),
    }
    bars: list[Bar] = []
    for piece, (case, made) in pieces.items():
        if piece == "text" and not llm.chats:
            continue
        ways = made()
        if beside is not None and piece != "DP step":
            ways["llama.cpp"] = beside.way(piece)
        took, every = in_turns(ways, asked.repeats)
        bars += [figure(f"{piece}, seconds: {way}", case, value) for way, value in took.items()]
        if piece in ("draft", "text"):
            bars += [figure(f"{piece}, seconds of one: {way}", "as long as it is", every[way] / count) for way in every]
        bars += [figure(f"{piece}: fedsynth / {way}", case, took["fedsynth"] / took[way]) for way in [*took][1:]]
    if beside is not None:
        beside.close()
    return told(bars, asked.json)


if __name__ == "__main__":
    sys.exit(main())
