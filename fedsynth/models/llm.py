"""The server LLM: one that completes and scores text in process."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from fedsynth.lora import Adapter
from fedsynth.models.adapters import merged
from fedsynth.models.batches import by_length, given_rows, padded, rows_that_fit
from fedsynth.models.chat import (
    CLOSE,
    OPEN,
    Chat,
    Prompt,
    begins_in_thought,
    check_asked,
    converses,
    holds_line,
    reply_of,
    turn_end,
)
from fedsynth.models.decoding import Draw, Ends, decode, go_on
from fedsynth.models.devices import device, free_memory, gpus
from fedsynth.models.embedding import Embedder
from fedsynth.models.encoding import LINE_END, text_rows
from fedsynth.models.loading import context_of, kind_of, load_tokenizer, wide
from fedsynth.models.placing import ONE_DEVICE, load_placed, server_dtype
from fedsynth.models.room import TOO_LONG, UNREADABLE
from fedsynth.models.sampling import SamplingParams
from fedsynth.models.usage import TokenUsage
from fedsynth.scenario.hardware import Hardware
from fedsynth.typed import BadValue

T = TypeVar("T")


class TextModel(Protocol):
    """The interface of an LLM for augmentation and judges, local or remote."""

    @property
    def chats(self) -> bool:
        """True if the model answers a `Chat`."""
        ...

    @property
    def structured(self) -> bool:
        """True if its answer to a `Chat` holds to the chat's schema."""
        ...

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int) -> list[str]:
        """Per prompt, in order: what goes on after a text, or the answer to a `Chat`."""
        ...

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        """Mean log-likelihood (nats) per token of each continuation after its prompt, or of an answer to a `Chat`."""
        ...


WIDE = 48  # rows of a wide model's batch on a CPU: it is bound by arithmetic, and the other cores take other batches


class LocalLLM:
    """A Hugging Face causal or seq2seq LM in process.

    A causal LM continues the prompt; a seq2seq LM reads the prompt with its encoder, and its decoder writes. Batches of
    similar length run in `workers` threads. Their number never changes a result, as batches are formed before.

    Args:
        model: In evaluation mode, with or without an adapter. Its generation config is replaced: what is asked for in a
            call is all that shapes the sampled distribution (some published configs bring a repetition penalty).
        tokenizer: A causal LM's BOS precedes every prompt, once. What a seq2seq LM's tokenizer puts around a text
            (the EOS of T5) stands around every prompt. Its EOS, the model's, and what ends a turn in its chat template
            end a text.
        batch_size: Sequences at once.
        workers: Threads; by default as many as torch may use (`torch.get_num_threads`) on the CPU, 1 on a GPU.
    """

    # Measured (1M-parameter Llama, vocabulary 4,096, 512 prompts of 110 tokens, 24 new, 2 cores, seconds): batch 64 in
    # one thread 3.2, with two intra-op threads 2.1-2.6 (CPU 4.1-5.2), two workers 2.0-2.1 (CPU 3.8). Intra-op threads
    # spin where others use the cores: 1,600 prompts of the shipped LLM took 224 s (CPU 104), two workers 39 s (CPU 15).
    # 64 was the best batch (128: 1.0-1.1 times, 256: 1.3-1.5 times the time). The static cache gained 5-15 %, but is
    # compiled per shape on GPUs: it is not used.

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 64, workers: int | None = None):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.kind = kind_of(model.config)
        stops = model.generation_config.eos_token_id
        stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        self.stops = sorted({*stops, tokenizer.eos_token_id, turn_end(tokenizer)} - {None})
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        # Padding is always masked, so that any token will do for a tokenizer that has neither.
        self.pad = pad if pad is not None else 0
        plain: Any = GenerationConfig
        # PEFT passes `generate` to the inner model, which reads its own configuration.
        self._within = within = model.get_base_model() if hasattr(model, "get_base_model") else model
        starts = (getattr(c, "decoder_start_token_id", None) for c in (model.generation_config, model.config))
        within.generation_config = plain(
            eos_token_id=self.stops or None,
            pad_token_id=self.pad,
            decoder_start_token_id=next((s for s in starts if s is not None), None),
        )
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        if workers is None:
            workers = torch.get_num_threads() if torch.device(model.device).type == "cpu" else 1
        self.workers = workers
        self.context = context_of(model.config)
        self.used = TokenUsage()
        self._line_ends: dict[int, bool] = {}  # tokens seen so far -> whether they hold one

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        adapter: Adapter | None = None,
        batch_size: int = 64,
        workers: int | None = None,
        hardware: Hardware = ONE_DEVICE,
    ) -> LocalLLM:
        """Loads a shipped model, one in a directory (nothing is fetched), or one under a Hugging Face name.

        Args:
            path: Path or name.
            adapter: An adapter to add to its weights: LoRA beside each layer of a small model would cost as much time
                as the layer.
            batch_size: Sequences at once.
            workers: Threads.
            hardware: Its precision and devices; left out, a GPU if there is one. In bfloat16 the rounding of a padded
                batch is coarse enough for a prompt's neighbours to change its text.

        Raises:
            BadValue: If it cannot be loaded, or writes no text; the message names the way out.
            fedsynth.models.adapters.WrongAdapter: If the adapter is not of this model.
        """
        name = str(path)
        dtype = server_dtype(name, hardware)
        if adapter is None:
            model = load_placed(name, "llm", dtype, hardware)
        elif hardware.quantization != "none" or hardware.device_map != "none":
            raise BadValue(
                f"an adapter is added to the weights of {name!r} on one device, in full precision: leave out "
                "server.quantization and server.device_map, or name a model that holds the adapter (merge_and_unload)"
            )
        else:
            model = merged(name, adapter).to(dtype).to(device())
        return cls(model, load_tokenizer(name), batch_size=batch_size, workers=workers)

    @classmethod
    def for_server(cls, name: str, adapter: Adapter | None = None, hardware: Hardware = ONE_DEVICE) -> LocalLLM:
        """See `load`. Clients wait while the server works, so it uses every core, despite torch's own setting."""
        workers = 1 if gpus() else len(os.sched_getaffinity(0))
        rows = WIDE if not gpus() and wide(name) else 256
        return cls.load(name, adapter=adapter, batch_size=rows, workers=workers, hardware=hardware)

    @property
    def chats(self) -> bool:
        """True if its tokenizer has a chat template."""
        return converses(self.tokenizer)

    @property
    def structured(self) -> bool:
        """False: its answers are free text."""
        return False

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int) -> list[str]:
        """One continuation or answer per prompt, in order, without its end mark.

        Args:
            prompts: Text that is gone on from, without a chat template, in which the name of a control token is text
                and a line end is the end of text of a model that has learnt lines; or questions, in the template.
            sampling: How tokens are drawn, and how many; see `Draw`.
            seed: A prompt's text depends on the seed, the prompt and its place in this call, not on the other prompts.

        Raises:
            BadValue: If a question is asked of a model without a chat template.
            ValueError: If a prompt leaves no room for the new tokens in the context.
        """
        new_tokens, tokens = sampling.max_new_tokens, self._tokens(prompts)
        self.check_room([len(t) for t in tokens], new_tokens, way_out="fewer or shorter demonstrations")

        def reply(place: int, written: str, *, one_line: bool) -> str:
            prompt = prompts[place]
            begun = isinstance(prompt, Chat) and begins_in_thought(prompt, self.tokenizer)
            return reply_of(prompt, written, one_line=one_line, in_thought=begun)

        def continuations(rows: Sequence[int]) -> list[str]:
            ids, mask = self._padded([tokens[i] for i in rows], left=self.kind == "causal")
            begin = ids.shape[1] if self.kind == "causal" else 1  # a decoder begins with its start token alone
            draw = None
            if sampling.temperature > 0:
                uniforms = np.stack([np.random.default_rng([seed, i]).random(new_tokens) for i in rows])
                numbers = torch.from_numpy(uniforms).to(ids.device)
                draw = Draw(numbers, begin, sampling.temperature, sampling.top_p, sampling.top_k)

            def has_line(row: int, new: list[int]) -> bool:
                text = self._text(prompts[rows[row]], new)
                return holds_line(reply(rows[row], text, one_line=False))  # thoughts are no line

            ends = Ends(self.stops, self._may_end_line, has_line) if sampling.one_line else Ends(self.stops)
            if self.kind == "causal":
                new = go_on(self.model, ids, mask, new_tokens, draw, ends)
            else:
                new = decode(self.model, ids, mask, new_tokens, draw, ends)
            return [self._text(prompts[i], row) for i, row in zip(rows, new, strict=True)]

        written = self._by_length([len(t) for t in tokens], continuations, more=new_tokens)
        self.used.read += sum(map(len, tokens))
        self.used.written += sum(map(len, text_rows(self.tokenizer, written)))
        return [reply(place, text, one_line=sampling.one_line) for place, text in enumerate(written)]

    def _text(self, prompt: Prompt, new: Sequence[int]) -> str:
        """The text of new tokens before the first that ends it. An answer keeps the marks of its thoughts."""
        end = next((i for i, token in enumerate(new) if token in self.stops), len(new))
        row = list(new[:end])
        if isinstance(prompt, Chat):
            row = [token for token in row if token not in self._silent]
        text: str = self.tokenizer.decode(
            row, skip_special_tokens=not isinstance(prompt, Chat), clean_up_tokenization_spaces=False
        )
        return text

    @cached_property
    def _silent(self) -> set[int]:
        """Special tokens, but for the marks of thoughts."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if token.special} | {*self.tokenizer.all_special_ids}
        return special - {number for number, token in added.items() if str(token) in (OPEN, CLOSE)}

    def _may_end_line(self, token: int) -> bool:
        if token not in self._line_ends:
            self._line_ends[token] = LINE_END in self.tokenizer.decode([token])
        return self._line_ends[token]

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        """Mean log-likelihood (nats) per token of each continuation after its prompt; no end mark is scored.

        Continuations are texts: they never become control tokens, their line ends included. A continuation's tokens are
        those that prompt + continuation has beyond the prompt's own. If the tokenizer merges across the border, and for
        a seq2seq LM, the two are tokenized apart, so that the prompt's tokens are always conditioned on and never
        scored.

        Raises:
            ValueError: If the lists differ in length, a continuation is empty, or a pair exceeds the context.
        """
        if len(prompts) != len(continuations):
            raise ValueError(f"score needs a continuation per prompt, got {len(continuations)} for {len(prompts)}")
        if self.kind == "seq2seq":
            return self._score_seq2seq(prompts, continuations)
        starts = self._tokens(prompts)
        whole = given_rows(self.tokenizer, prompts, self.kind, continuations)
        apart = text_rows(self.tokenizer, continuations)
        for i, (start, both) in enumerate(zip(starts, whole, strict=True)):
            if both[: len(start)] != start:
                whole[i] = start + apart[i]
            if len(whole[i]) == len(start):
                raise ValueError(f"continuation {i} holds no token: {continuations[i]!r}; leave empty texts out")
            if not start:
                raise ValueError(f"prompt {i} holds no token and the tokenizer has no BOS; give a first word to go on")
        self.check_room([len(t) for t in whole], 0, way_out="shorter texts")
        self.used.read += sum(map(len, whole))
        same: dict[tuple[int, ...], list[int]] = {}
        for i, start in enumerate(starts):
            same.setdefault(tuple(start), []).append(i)
        once = sum(map(len, same)) + sum(len(both) - len(start) for start, both in zip(starts, whole, strict=True))
        # A GPU is faster with one large batch than with a small one for each prompt; a recurrent state is not repeated.
        alone = torch.device(self.model.device).type == "cpu" and not getattr(self._within, "_is_stateful", False)
        if alone and 0 < 2 * once <= sum(map(len, whole)):
            return self._score_after(same, whole)  # within rounding of what follows

        def likelihoods(rows: Sequence[int]) -> list[float]:
            ids, mask = self._padded([whole[i] for i in rows], left=False)
            first = min(len(starts[i]) for i in rows)  # no logits while every row is still in its prompt
            wanted = torch.arange(first - 1, ids.shape[1] - 1, device=ids.device)
            seen = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=wanted, use_cache=False)
            logits = seen.logits.float()
            ahead = ids[:, first:, None]
            logs = logits.gather(2, ahead).squeeze(2) - logits.logsumexp(dim=2)
            begin = torch.tensor([len(starts[i]) - first for i in rows], device=ids.device)[:, None]
            end = torch.tensor([len(whole[i]) - first for i in rows], device=ids.device)[:, None]
            place = torch.arange(logs.shape[1], device=ids.device)
            scored = (place >= begin) & (place < end)
            means: list[float] = (logs.where(scored, 0.0).sum(dim=1) / scored.sum(dim=1)).tolist()
            return means

        most = max(map(len, whole), default=1) - min(map(len, starts), default=0)
        return self._by_length([len(t) for t in whole], likelihoods, logits=most)

    def _score_after(self, same: Mapping[tuple[int, ...], list[int]], whole: Sequence[list[int]]) -> list[float]:
        """Scores of several continuations of each prompt, which is read once: a choice among a dozen replies costs
        little more than one of them.

        Args:
            same: Rows by the tokens of their prompt.
            whole: The tokens of each row, those of its prompt first.
        """
        groups = [(start, list(rows)) for start, rows in same.items()]

        def of_prompt(place: int) -> list[float]:
            start, rows = groups[place]
            ahead = [whole[row][len(start) :] for row in rows]
            prompt = torch.tensor([start], device=self.model.device)
            read = self.model(input_ids=prompt, logits_to_keep=1, use_cache=True)
            next_ = read.logits[0, -1].float().log_softmax(dim=-1)
            sums = next_[[own[0] for own in ahead]]
            if max(map(len, ahead)) > 1:
                ids, there = self._padded([own[:-1] for own in ahead], left=False)
                wanted, scored = self._padded([own[1:] for own in ahead], left=False)
                read.past_key_values.batch_repeat_interleave(len(rows))
                seen = torch.cat([prompt.new_ones(len(rows), len(start)), there], dim=1)
                logits = self.model(input_ids=ids, attention_mask=seen, past_key_values=read.past_key_values).logits
                logs = logits.float().log_softmax(dim=-1).gather(2, wanted[:, :, None]).squeeze(2)
                sums = sums + logs.where(scored.bool(), 0.0).sum(dim=1)
            means: list[float] = (sums / torch.tensor(list(map(len, ahead)), device=sums.device)).tolist()
            return means

        widest = max(len(rows) * max(len(whole[row]) - len(start) for row in rows) for start, rows in groups)
        found = self._by_length(
            [max(len(whole[row]) for row in rows) for _, rows in groups],
            lambda places: list(map(of_prompt, places)),
            logits=widest,
        )
        scores = [0.0] * len(whole)
        for (_, rows), means in zip(groups, found, strict=True):
            for row, mean in zip(rows, means, strict=True):
                scores[row] = mean
        return scores

    def _score_seq2seq(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        starts = self._tokens(prompts)
        wanted = text_rows(self.tokenizer, continuations)
        for i, row in enumerate(wanted):
            if not row:
                raise ValueError(f"continuation {i} holds no token: {continuations[i]!r}; leave empty texts out")
        both = [len(s) + len(w) for s, w in zip(starts, wanted, strict=True)]
        self.check_room(both, 0, way_out="shorter texts")
        self.used.read += sum(both)

        def likelihoods(rows: Sequence[int]) -> list[float]:
            ids, mask = self._padded([starts[i] for i in rows], left=False)
            ahead, scored = self._padded([wanted[i] for i in rows], left=False)
            given = self.model.prepare_decoder_input_ids_from_labels(ahead)
            seen = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=given, use_cache=False)
            logits = seen.logits.float()
            logs = logits.gather(2, ahead[:, :, None]).squeeze(2) - logits.logsumexp(dim=2)
            means: list[float] = (logs.where(scored.bool(), 0.0).sum(dim=1) / scored.sum(dim=1)).tolist()
            return means

        return self._by_length(both, likelihoods, logits=max(map(len, wanted), default=1))

    def embedder(self) -> Embedder:
        """The LLM as an `Embedder`."""
        return Embedder(self.model, self.tokenizer, batch_size=self.batch_size, workers=self.workers)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Mean of its last hidden states, shape (texts, width); long texts are cut.

        Raises:
            ValueError: If a text holds no token.
        """
        return self.embedder().embed(texts)

    def misfits(
        self, prompts: Sequence[Prompt], more: int = 0, continuations: Sequence[str] | None = None
    ) -> list[str | None]:
        """Why `complete`, or `score`, would refuse; see `fedsynth.models.room`."""
        check_asked(prompts, self.tokenizer)
        texts = [""] * len(prompts) if continuations is None else continuations
        pairs = list(zip(prompts, texts, strict=True))
        distinct = list(dict.fromkeys(pairs))
        try:
            needed = self._needed(distinct)
        except Exception:  # each tokenizer raises its own for an unreadable text
            needed = [self._needed_by(pair) for pair in distinct]
        room = math.inf if self.context is None else self.context
        told = {
            pair: UNREADABLE if tokens is None else TOO_LONG if tokens + more > room else None
            for pair, tokens in zip(distinct, needed, strict=True)
        }
        return [told[pair] for pair in pairs]

    def _needed(self, pairs: Sequence[tuple[Prompt, str]]) -> list[int | None]:
        """Tokens of each prompt and its continuation, "" for none; None where the latter holds no token."""
        starts = [len(row) for row in self._tokens([prompt for prompt, _ in pairs])]
        if not any(text for _, text in pairs):
            return list(starts)
        apart = [len(row) for row in text_rows(self.tokenizer, [text for _, text in pairs])]
        both = [prompt if isinstance(prompt, Chat) else prompt + text for prompt, text in pairs]
        whole = [len(row) for row in self._tokens(both)]
        return [
            None if text and not own else max(together, start + own)
            for (_, text), start, own, together in zip(pairs, starts, apart, whole, strict=True)
        ]

    def _needed_by(self, pair: tuple[Prompt, str]) -> int | None:
        try:
            return self._needed([pair])[0]
        except Exception:
            return None

    def _tokens(self, texts: Sequence[Prompt]) -> list[list[int]]:
        return given_rows(self.tokenizer, texts, self.kind)

    def check_room(self, lengths: Sequence[int], max_new_tokens: int, *, way_out: str) -> None:
        """Refuses texts that leave no room in the context for `max_new_tokens` more.

        Raises:
            ValueError: If there is such a text; the message names it, and the way out.
        """
        longest = max(lengths, default=0)
        if self.context is not None and longest + max_new_tokens > self.context:
            raise ValueError(
                f"text {list(lengths).index(longest)} has {longest} tokens and {max_new_tokens} more are asked for, "
                f"but the model's context holds {self.context}: use {way_out}, fewer new tokens or a longer context"
            )

    def _padded(self, rows: Sequence[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = padded(rows, self.pad, left=left)
        return ids.to(self.model.device), mask.to(self.model.device)

    def _by_length(
        self, lengths: Sequence[int], work: Callable[[Sequence[int]], list[T]], logits: int = 1, more: int = 0
    ) -> list[T]:
        """As `by_length`, in smaller batches where one would not fit into memory; in float32 no result depends on it.

        Args:
            lengths: Tokens of each row.
            work: Row numbers of one batch -> one result per row.
            logits: Places of a row with logits at once.
            more: Further tokens of a row, which are kept.
        """
        rows = rows_that_fit(
            self.model.config,
            places=logits,
            tokens=max(lengths, default=0) + more,
            width=self.model.dtype.itemsize,
            free=free_memory(self.model.device) / self.workers,
        )
        return by_length(work, lengths, batch_size=min(self.batch_size, rows), workers=self.workers)
