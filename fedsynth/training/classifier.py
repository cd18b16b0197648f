"""A task model: its training on labelled text, and classification. It stays with its client, without a guarantee."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsynth.corpus import Corpus
from fedsynth.models.adapters import attach_lora
from fedsynth.models.batches import longest_of, padded, token_rows
from fedsynth.models.embedding import Embedder, directions, shared_embedder
from fedsynth.models.encoding import token_ids
from fedsynth.models.loading import Kind, kind_of, load_classifier
from fedsynth.scenario.client import SHOTS, TaskTraining
from fedsynth.training.baselines import Majority, Nearest
from fedsynth.training.examples import all_readable, unit_rows


class Probe(nn.Module):
    """A task model that trains only its head, on the embeddings of a frozen model.

    Embeddings are scaled to the length sqrt(width), a fixed map of one text: nothing is fitted to the data, and a
    coordinate is about 1, as the head's learning rate needs it. The head starts at zero: its loss is convex, so that a
    random start would only add noise. The saved state is the head without the frozen model.

    Args:
        embedder: The frozen model.
        classes: Number of labels.
    """

    def __init__(self, embedder: Embedder, classes: int):
        super().__init__()
        self.embedder = embedder  # not a module: neither trained nor saved
        self.head = nn.Linear(embedder.width, classes, device="cpu")
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, texts: Sequence[str], longest: int) -> Tensor:
        """One row per text, float32 on the head's device, shape (texts, width)."""
        found = directions(self.embedder, tuple(texts), longest) * math.sqrt(self.embedder.width)
        return found.to(self.head.weight.device)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, shape (texts, classes)."""
        logits: Tensor = self.head(features)
        return logits


def new_task_model(name: str, classes: int, trains: str, seed: int) -> nn.Module:
    """A task model before its training.

    Args:
        name: The pretrained model.
        classes: Number of labels.
        trains: As in `TaskTraining`: a new model, a `Probe`, or a baseline.
        seed: Public seed of the head of a new model; others need none.
    """
    if trains == "majority":
        return Majority(classes)
    if trains == "head":
        return Probe(shared_embedder(name), classes)
    if trains == "all":
        return load_classifier(name, classes, seed)
    return Nearest(shared_embedder(name), classes, SHOTS if trains == "few_shot" else 1)


def fit_classifier(
    model: nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    labels: Sequence[str],
    settings: TaskTraining,
    *,
    epochs: int,
    seed: int,
    weights: Sequence[float] | None = None,
) -> None:
    """Trains a task model in place on labelled text; rows with unknown labels are left out.

    Args:
        model: A model for sequence classification with `len(labels)` classes, or a `Probe`. `head_rate` and
            `token_dropout` do not apply to a `Probe`: only its head learns, from embeddings computed once per text.
        tokenizer: Its tokenizer.
        corpus: Texts and class names; a text that the tokenizer cannot read is left out.
        labels: The public label list; a class's number is its place.
        settings: Batch, regularisation, lengths; the learning rate, warmed up over ten steps and decayed linearly to
            zero.
        epochs: Passes over the corpus.
        seed: Public seed of order and token dropout.
        weights: Weight of each text's loss, in 0..1; None for 1.
    """
    number = {label: i for i, label in enumerate(labels)}
    reader = model.embedder.tokenizer if isinstance(model, Probe) else tokenizer
    good = all_readable(reader, corpus.prompts)
    rows = [i for i, (y, read) in enumerate(zip(corpus.answers, good, strict=True)) if y in number and read]
    if not rows:
        return  # an empty corpus is no error: a client may hold other classes only
    prompts = [corpus.prompts[i] for i in rows]
    targets = torch.tensor([number[corpus.answers[i]] for i in rows])
    shares = None if weights is None else torch.tensor([weights[i] for i in rows], dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Probe):
        groups, speeds = [list(model.parameters())], [1.0]
        features = model.features(prompts, settings.max_length)
        lengths = [1] * len(rows)

        def logits(chosen: Tensor) -> Tensor:
            found: Tensor = model(features[chosen.to(features.device)])
            return found
    else:
        pretrained = {id(p) for p in model.base_model.parameters()}  # type: ignore[union-attr]  # torch types it as Tensor | Module
        groups = [[p for p in model.parameters() if (id(p) in pretrained) == old] for old in (True, False)]
        speeds = [1.0, settings.head_rate]
        texts = _token_rows(tokenizer, prompts, settings.max_length, model.config)
        lengths = [len(text) for text in texts]
        hide = _hider(tokenizer, kind_of(model.config), settings.token_dropout, generator)

        def logits(chosen: Tensor) -> Tensor:
            tokens, present = padded([texts[i] for i in chosen.tolist()], tokenizer.pad_token_id)
            return _logits(model, hide(tokens, present), present)

    model.train()
    trained = list(model.parameters())  # once: a look through all modules takes as long as the norm itself
    rate, total = settings.learning_rate, epochs * math.ceil(len(rows) / settings.batch)
    optimizer = torch.optim.AdamW(
        [{"params": g} for g in groups], lr=rate, weight_decay=settings.weight_decay, fused=True
    )
    for step, chosen in enumerate(_batches(lengths, settings.batch, epochs, generator)):
        share = min(1.0, (step + 1) / 10) * (1 - step / total)
        for group, speed in zip(optimizer.param_groups, speeds, strict=True):
            group["lr"] = rate * speed * share
        said, wanted = logits(chosen), targets[chosen].to(next(model.parameters()).device)
        if shares is None:
            loss = F.cross_entropy(said, wanted)
        else:
            loss = (F.cross_entropy(said, wanted, reduction="none") * shares[chosen].to(said.device)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
    model.eval()


def _hider(tokenizer: Any, kind: Kind, share: float, generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """Token dropout: it replaces a share of a text's tokens, drawn anew each time, by a neutral token.

    The neutral token is the mask token of a model that has one, padding that is attended to for T5, and BOS for a
    causal model. The tokens that an encoder or T5 puts around a text stay: their heads read them.
    """
    stands_for = (tokenizer.pad_token_id,) if kind == "seq2seq" else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    hidden = torch.tensor(next(t for t in (tokenizer.mask_token_id, *stands_for) if t is not None))
    around = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id) if kind != "causal" else ()
    kept = torch.tensor([token for token in around if token is not None], dtype=torch.long)

    def hide(tokens: Tensor, present: Tensor) -> Tensor:
        drop = (torch.rand(tokens.shape, generator=generator) < share) & present.bool()
        return torch.where(drop & ~torch.isin(tokens, kept), hidden, tokens)

    return hide


def classify(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], longest: int, batch: int = 128
) -> NDArray[np.int64]:
    """The class number that the task model gives to each text, shape (len(texts),).

    Args:
        model: As `fit_classifier` trains it, or a baseline that has learnt.
        tokenizer: Its tokenizer.
        texts: Any number of texts.
        longest: Most tokens of a text; longer texts are cut.
        batch: Texts at once.
    """
    classes: NDArray[np.int64] = _all_logits(model, tokenizer, texts, longest, batch).argmax(-1).astype(np.int64)
    return classes


def confidences(
    model: nn.Module, tokenizer: Any, corpus: Corpus, labels: Sequence[str], longest: int, batch: int = 128
) -> list[float]:
    """The probability, in 0..1, that the task model gives to each text's own label; 0 if the label is not in the list.

    Args:
        model: A task model, as in `fit_classifier`, or a `new_scorer`.
        tokenizer: Its tokenizer.
        corpus: Texts and class names.
        labels: The public label list.
        longest: Most tokens of a text; longer texts are cut.
        batch: Texts at once.
    """
    number = {label: i for i, label in enumerate(labels)}
    logits = torch.from_numpy(_all_logits(model, tokenizer, corpus.prompts, longest, batch))
    found = logits.double().softmax(-1).numpy()
    return [float(row[number[y]]) if y in number else 0.0 for row, y in zip(found, corpus.answers, strict=True)]


@torch.no_grad()
def _all_logits(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], longest: int, batch: int
) -> NDArray[np.float32]:
    """The logits of all texts, shape (texts, classes)."""
    if isinstance(model, Probe):
        found: Tensor = model(model.features(texts, longest))
        return found.cpu().numpy()
    if isinstance(model, Majority | Nearest):
        return model.logits(texts, longest).cpu().numpy()
    rows = _token_rows(tokenizer, texts, longest, model.config)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = [np.empty((0, int(model.config.num_labels)), np.float32)]  # type: ignore[union-attr, arg-type]  # likewise
    for at in range(0, len(order), batch):
        tokens, present = padded([rows[i] for i in order[at : at + batch]], tokenizer.pad_token_id)
        parts.append(_logits(model, tokens, present).cpu().numpy())
    return np.concatenate(parts)[np.argsort(order, kind="stable")]


# --- Under DP-SGD: a model whose scores may leave --------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledText:
    """One encoded text and its class number."""

    tokens: tuple[int, ...]
    label: int


def new_scorer(
    name: str, classes: int, *, rank: int, alpha: float, seed: int, targets: Sequence[str] | None = None
) -> nn.Module:
    """A classifier before its training; a LoRA and the new head are trainable.

    Args:
        name: The pretrained model.
        classes: Number of labels.
        rank: LoRA rank.
        alpha: LoRA scale is alpha / rank.
        seed: Public seed of head and LoRA.
        targets: See `attach_lora`.
    """
    model = load_classifier(name, classes, seed)
    body = {id(p) for p in model.base_model.parameters()}  # type: ignore[union-attr]  # torch types it as Tensor | Module
    head = [p for p in model.parameters() if id(p) not in body]
    scorer = attach_lora(model, rank=rank, alpha=alpha, seed=seed, targets=targets)
    for weight in head:
        weight.requires_grad_(True)
    return scorer


def label_slots(
    tokenizer: Any,
    corpus: Corpus,
    labels: Sequence[str],
    records: int,
    longest: int,
    config: Any,
    *,
    rows_per_unit: int = 1,
) -> list[tuple[LabelledText, ...]]:
    """One slot per declared record, each a map of one privacy unit to itself, as `encode_slots` for a generator.

    Args:
        tokenizer: A public tokenizer.
        corpus: Private text; `prompts` are texts, `answers` class names.
        labels: The public label list.
        records: Declared number of units.
        longest: Most tokens of a text; longer texts are cut.
        config: The classifier's configuration.
        rows_per_unit: The most rows of a unit that count.
    """
    number = {label: i for i, label in enumerate(labels)}

    def encoded(row: int) -> LabelledText | None:
        if corpus.answers[row] not in number:
            return None
        try:
            [tokens] = _token_rows(tokenizer, [corpus.prompts[row]], longest, config)
        except Exception:  # the answer would reveal a record that makes it fail
            return None
        return LabelledText(tuple(tokens), number[corpus.answers[row]]) if tokens else None

    return [
        tuple(text for text in map(encoded, rows) if text is not None)
        for rows in unit_rows(corpus, records, rows_per_unit)
    ]


def label_losses(model: nn.Module, examples: Sequence[LabelledText], pad: int) -> Tensor:
    """Each text's negative log-likelihood of its class: no text enters another's loss."""
    tokens, present = padded([e.tokens for e in examples], pad)
    logits = _logits(model, tokens, present)
    return F.cross_entropy(logits, torch.tensor([e.label for e in examples]).to(logits.device), reduction="none")


def _logits(model: nn.Module, tokens: Tensor, present: Tensor) -> Tensor:
    where = next(model.parameters()).device
    logits: Tensor = model(input_ids=tokens.to(where), attention_mask=present.to(where)).logits
    return logits.float()


def _token_rows(tokenizer: Any, texts: Sequence[str], longest: int, config: Any) -> list[list[int]]:
    """Token ids of texts in the form that the model knows.

    A causal model reads a text as a generator would write it after a control code: with a leading space, after the BOS.
    The others also read the tokens that their tokenizer puts around a text. T5 reads exactly one EOS, at the end, where
    its head looks for it.
    """
    kind, longest = kind_of(config), longest_of(config, tokenizer, longest) or longest
    if kind == "causal":
        head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [[*head, *token_ids(tokenizer, f" {text.strip()}")][:longest] for text in texts]
    rows = token_rows(tokenizer, [text.strip() for text in texts], kind, longest)
    if kind == "encoder":
        return rows
    end = tokenizer.eos_token_id
    return [[*[t for t in row if t != end][: longest - 1], end] for row in rows]


def _batches(lengths: Sequence[int], batch: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Every row once per epoch, in random batches of similar length.

    It draws the rows of eight batches at random, deals them by length and shuffles the batches. Otherwise half of a
    batch of questions was padding.
    """
    width = torch.tensor(lengths)
    for _ in range(epochs):
        for window in torch.randperm(len(lengths), generator=generator).split(8 * batch):
            dealt = window[width[window].argsort(stable=True)].split(batch)
            yield from (dealt[i] for i in torch.randperm(len(dealt), generator=generator).tolist())
