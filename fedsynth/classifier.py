"""A task model: train it on labelled text, let it classify. No guarantee is claimed: it stays with its client."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsynth.corpus import Corpus
from fedsynth.scenario import TaskTraining
from fedsynth.training import token_ids


def fit_classifier(
    model: nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    labels: Sequence[str],
    settings: TaskTraining,
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> None:
    """Trains a task model in place on labelled text; rows with unknown labels are left out.

    Args:
        model: For sequence classification, `len(labels)` classes.
        tokenizer: Its tokenizer.
        corpus: Texts and class names.
        labels: The public label list; a class's number is its place.
        settings: Batch, regularisation, lengths.
        epochs: Passes over the corpus.
        rate: Learning rate, warmed up over ten steps and decayed linearly to zero.
        seed: Public seed of order and token dropout.
    """
    number = {label: i for i, label in enumerate(labels)}
    rows = [i for i, answer in enumerate(corpus.answers) if answer in number]
    if not rows:
        return  # nothing to learn from is no reason to fail: a client may hold other classes only
    texts = _token_rows(tokenizer, [corpus.prompts[i] for i in rows], settings.max_tokens)
    targets = torch.tensor([number[corpus.answers[i]] for i in rows])
    generator = torch.Generator().manual_seed(seed)
    hidden = tokenizer.mask_token_id or tokenizer.bos_token_id or tokenizer.eos_token_id
    total = epochs * math.ceil(len(rows) / settings.batch)
    pretrained = {id(p) for p in model.base_model.parameters()}  # type: ignore[union-attr]
    groups = [[p for p in model.parameters() if (id(p) in pretrained) == old] for old in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": g} for g in groups], lr=rate, weight_decay=settings.weight_decay, fused=True
    )
    model.train()
    for step, chosen in enumerate(_shuffled(len(rows), settings.batch, epochs, generator)):
        tokens, present = _pad([texts[i] for i in chosen.tolist()], tokenizer.pad_token_id)
        drop = (torch.rand(tokens.shape, generator=generator) < settings.token_dropout) & present.bool()
        tokens = torch.where(drop, torch.tensor(hidden), tokens)
        share = min(1.0, (step + 1) / 10) * (1 - step / total)
        for group, speed in zip(optimizer.param_groups, (1.0, settings.head_rate), strict=True):
            group["lr"] = rate * speed * share
        loss = F.cross_entropy(_logits(model, tokens, present), targets[chosen].to(next(model.parameters()).device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
    model.eval()


@torch.no_grad()
def classify(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], longest: int, batch: int = 128
) -> NDArray[np.int64]:
    """The class number that the task model gives to each text, shape (len(texts),)."""
    rows = _token_rows(tokenizer, texts, longest)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = np.empty(len(rows), np.int64)
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        tokens, present = _pad([rows[i] for i in chosen], tokenizer.pad_token_id)
        found[chosen] = _logits(model, tokens, present).argmax(-1).cpu().numpy()
    return found


def _logits(model: nn.Module, tokens: Tensor, present: Tensor) -> Tensor:
    where = next(model.parameters()).device
    logits: Tensor = model(input_ids=tokens.to(where), attention_mask=present.to(where)).logits
    return logits.float()


def _token_rows(tokenizer: Any, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Texts as a generator would write them after a control code: with a leading space, after the BOS."""
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [[*head, *token_ids(tokenizer, f" {text.strip()}")][:longest] for text in texts]


def _pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(r) for r in rows)
    tokens = torch.tensor([[*r, *[pad] * (width - len(r))] for r in rows])
    present = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    return tokens, present


def _shuffled(count: int, batch: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(batch)
