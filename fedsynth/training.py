"""A generator trained on private text under DP-SGD.

DP-SGD is Abadi et al. 2016 (algorithm 1) with Poisson sampling owned by the loop: masks are drawn before text is seen,
an empty batch is a noise-only step, and the noisy sum is divided by the expected batch, never by the drawn one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsynth.batches import padded, token_rows
from fedsynth.corpus import Corpus
from fedsynth.dpsgd import Clipper, UnknownWeight, clipper
from fedsynth.instructions import ASK, asked, record
from fedsynth.models import Kind, context_of
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario import GeneratorTraining

IGNORED = -100  # cross_entropy's own mark for positions without a target


@dataclass(frozen=True)
class Example:
    """One encoded text.

    Attributes:
        tokens: Token ids.
        start: Position of the first token that is learnt; what stands before it (BOS, control code) is given. A seq2seq
            model reads what is given with its encoder, and its decoder learns the rest.
    """

    tokens: tuple[int, ...]
    start: int


class Encoded(Protocol):
    """An encoded text with whatever its loss needs beside the tokens."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids."""


Slot: TypeAlias = Sequence[Encoded]
"""What is learnt of one privacy unit: its examples, clipped together; none for an empty unit."""

Losses: TypeAlias = Callable[[nn.Module, Sequence[Any], int], Tensor]
"""Model, examples, padding token -> each example's own loss, shape (examples,)."""


class SelfCheckFailed(RuntimeError):
    """The training would not be what the plan says; found on random public tokens, before any charge."""


class Randomness(Protocol):
    """Noise and Poisson draws: a grant's own (fedsynth.privacy.noise), or a public one where nothing is protected."""

    def normals(self, count: int) -> NDArray[np.float64]:
        """`count` standard normals."""

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:
        """An independent coin per unit."""


Learns: TypeAlias = Literal["record", "response"]


def control_code(label: str) -> str:
    """How a label is put before its text (FDKT step 1)."""
    return f"{label}:"


def encode_slots(
    tokenizer: Any,
    corpus: Corpus,
    labels: Sequence[str],
    records: int,
    longest: int,
    kind: Kind = "causal",
    *,
    learns: Learns = "record",
    rows_per_unit: int = 1,
) -> list[tuple[Example, ...]]:
    """One slot per declared record, each a map of one privacy unit to itself (docs/privacy.md).

    A unit is a person where the corpus names persons; its first rows are used. A row with an unknown label and a text
    that the tokenizer cannot read are left out, a slot beyond the real count is empty: no record of one unit changes
    another's slot, or whether there is an answer. Declare at least as many units as there are: of more, only the first
    `records` are used, and taking one of them away would let the next one in (then the replace-one figure holds).

    Args:
        tokenizer: Public.
        corpus: Private; `prompts` are texts, `answers` class names. Without labels: instructions and responses.
        labels: The public label list; empty for instructions.
        records: Declared number of units; the plan's, whatever the real count is.
        longest: Longest example in tokens.
        kind: Of the generator.
        learns: Instructions: the whole record after its mark, or the response alone.
        rows_per_unit: At most so many rows of a unit count.
    """
    known = set(labels)

    def encoded(row: int) -> Example | None:
        if labels and corpus.answers[row] not in known:
            return None
        return _encode_or_none(tokenizer, *_parts(corpus, row, labels, learns), longest, kind)

    return [
        tuple(example for example in map(encoded, rows) if example is not None)
        for rows in unit_rows(corpus, records, rows_per_unit)
    ]


def unit_rows(corpus: Corpus, records: int, rows_per_unit: int = 1) -> list[list[int]]:
    """The first rows of each privacy unit in as many slots as were declared; none where there is no unit."""
    rows: dict[Hashable, list[int]] = {}
    for row, unit in enumerate(corpus.units if corpus.units is not None else range(len(corpus))):
        rows.setdefault(unit, []).append(row)
    slots = [found[:rows_per_unit] for found in rows.values()][:records]
    return [*slots, *([] for _ in range(records - len(slots)))]


def encode_records(
    tokenizer: Any, corpus: Corpus, longest: int, kind: Kind = "causal", *, learns: Learns = "record"
) -> list[Example]:
    """Instructions and responses of a corpus that is no privacy unit's slot, each as an example; those that the
    tokenizer cannot read are left out."""
    each_its_own = replace(corpus, units=None)
    slots = encode_slots(tokenizer, each_its_own, (), len(corpus), longest, kind, learns=learns)
    return [example for slot in slots for example in slot]


def _parts(corpus: Corpus, row: int, labels: Sequence[str], learns: Learns) -> tuple[str, str]:
    """What is given of a row, and what is learnt."""
    if labels:
        return control_code(corpus.answers[row]), corpus.prompts[row].strip()
    whole = record(corpus.prompts[row], corpus.answers[row])
    given = ASK if learns == "record" else asked(corpus.prompts[row])
    return given, whole.removeprefix(given).strip()


def _encode_or_none(tokenizer: Any, given: str, text: str, longest: int, kind: Kind) -> Example | None:
    try:
        return encode_text(tokenizer, given, text, longest, kind)
    except Exception:  # a record that fails the whole answer would show in the answer
        return None


def encode_text(tokenizer: Any, given: str, text: str, longest: int, kind: Kind) -> Example:
    """A text to learn after what is given (BOS stands before that), and its end; cut where it is too long."""
    if kind == "seq2seq":
        [head] = token_rows(tokenizer, [given], kind)
    else:
        head = token_ids(tokenizer, given)
        head = head if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *head]
        text = f" {text}"
    # The end of text is learnt, also where a long text was cut: a generator that never ends writes noise up to the
    # limit, and drafts without an end are not used.
    body = token_ids(tokenizer, text)[: max(0, longest - len(head) - 1)]
    return Example((*head, *body, tokenizer.eos_token_id)[:longest], len(head))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without the special ones that some tokenizers add."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def check_room(tokenizer: Any, model: nn.Module, labels: Sequence[str], longest: int) -> None:
    """Whether examples and samples of `longest` tokens fit: found out before a charge, not after it.

    Raises:
        ValueError: If a control code leaves no room for a text, the model's context is too short, or the tokenizer has
            no end of text or tokens that the model does not know.
    """
    codes = {code: len(token_ids(tokenizer, code)) + 1 for code in map(control_code, labels)} or {
        ASK: len(token_ids(tokenizer, ASK)) + 1
    }
    code, tokens = max(codes.items(), key=lambda item: item[1])
    if tokens + 2 > longest:
        raise ValueError(f"the control code {code!r} has {tokens} tokens, which leaves no text of {longest}")
    context = context_of(model.config)
    if context is not None and longest > context:
        raise ValueError(
            f"{longest} tokens are asked for, the model's context holds {context}: use a smaller max_tokens"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token): a text that never ends cannot be learnt")
    if len(tokenizer) > vocabulary_of(model):
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocabulary_of(model)}: "
                         "save the model with the tokenizer that it was trained with")  # fmt: skip


def vocabulary_of(model: nn.Module) -> int:
    """Tokens that the model embeds: often more than its tokenizer writes."""
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    return embedding.num_embeddings


def next_token_losses(model: nn.Module, examples: Sequence[Example], pad: int) -> Tensor:
    """Each example's mean negative log-likelihood over its own learnt tokens: no example enters another's loss."""
    logits, wanted = next_tokens(model, examples, pad)
    losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED)
    return losses.sum(1) / (wanted != IGNORED).sum(1).clamp(min=1)


def next_tokens(model: nn.Module, examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """What the model says of each token before it reads it, (examples, positions, vocabulary) logits, and the tokens
    that are learnt, (examples, positions), `IGNORED` elsewhere."""
    where, step = next(model.parameters()).device, padding_step(model)
    if _reads_and_writes(model):
        within: Any = getattr(model, "_module", model)  # Opacus wraps it
        given, present = padded([e.tokens[: e.start] for e in examples], pad, step=step)
        wanted = padded([e.tokens[e.start :] or (IGNORED,) for e in examples], IGNORED, step=step)[0].to(where)
        # The decoder reads its start token and then the targets; padding stands behind, where it never looks.
        before = within.prepare_decoder_input_ids_from_labels(wanted)
        read = {"input_ids": given.to(where), "attention_mask": present.to(where), "decoder_input_ids": before}
        logits = model(**read, use_cache=False).logits.float()
    else:
        tokens, present = padded([e.tokens for e in examples], pad, step=step)
        targets, _ = padded([(IGNORED,) * e.start + e.tokens[e.start :] for e in examples], IGNORED, step=step)
        length = tokens.shape[1]
        # What comes before all learnt tokens needs no logits: they cost as much as some layers.
        first = max(0, min(min(e.start for e in examples) - 1, length - 2))
        read = {"input_ids": tokens.to(where), "attention_mask": present.to(where)}
        logits = model(**read, logits_to_keep=torch.arange(first, length - 1, device=where)).logits.float()
        wanted = targets[:, first + 1 : length].to(where)
    return logits, wanted


_STEP = 16


def padding_step(model: nn.Module) -> int:
    """To a multiple of how many tokens examples are padded.

    In half precision the gradient of an example moves with the length to which it is padded, by up to 1 % of the clip
    norm as measured: it may depend on the example alone, not on who else was drawn (docs/privacy.md).
    """
    return _STEP if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else 1


def _reads_and_writes(model: nn.Module) -> bool:
    within: Any = getattr(model, "_module", model)  # Opacus wraps it
    return bool(getattr(getattr(within, "config", None), "is_encoder_decoder", False))


def mean_loss(model: nn.Module, examples: Sequence[Example], *, pad: int, batch: int) -> float:
    """Mean over examples of their negative log-likelihood (nats) per learnt token.

    Raises:
        ValueError: If there is no example.
    """
    if not examples:
        raise ValueError("a mean loss needs at least one example")
    with torch.no_grad():
        parts = [next_token_losses(model, examples[i : i + batch], pad) for i in range(0, len(examples), batch)]
    return float(torch.cat(parts).double().mean())


def clipped_sum(
    clip: Clipper,
    model: nn.Module,
    units: Sequence[Slot],
    *,
    pad: int,
    microbatch: int,
    losses: Losses | None = None,
) -> list[Tensor]:
    """Sum over units of their examples' summed gradients, each unit's clipped; zeros for no unit.

    Micro-batches of `microbatch` examples (more only where one unit has more) split one drawn batch, sorted by length;
    in half precision those of one padded length each. The loss of an example is `next_token_losses` unless another one
    is given.
    """
    losses_of: Losses = losses or next_token_losses
    step, both = padding_step(model), _reads_and_writes(model)

    def shape(unit: Slot) -> tuple[int, ...]:
        """Of its longest example, as it is padded: what is read and what is written, or all in one."""
        ends = [(getattr(e, "start", 0) if both else 0, len(e.tokens)) for e in unit]
        return tuple(-(-size // step) for size in (max(n - s for s, n in ends), max(s for s, _ in ends)))

    ordered = sorted((unit for unit in units if unit), key=shape)
    at = 0
    while at < len(ordered):
        end, rows = at + 1, len(ordered[at])
        while (
            end < len(ordered)
            and rows + len(ordered[end]) <= microbatch
            and (step == 1 or shape(ordered[end]) == shape(ordered[at]))
        ):
            rows += len(ordered[end])
            end += 1
        examples = [example for unit in ordered[at:end] for example in unit]
        numbers = [number for number, unit in enumerate(ordered[at:end]) for _ in unit]
        clip.add(partial(losses_of, model, examples, pad), numbers)
        at = end
    return clip.take()


_BLOCK = 2**18  # noise that is made at once


def add_noise(total: Tensor, deviation: float, randomness: Randomness) -> None:
    """Gaussian noise onto a sum, in place: added in float64 and rounded once, block by block to need no second copy."""
    flat = total.view(-1)
    for at in range(0, len(flat), _BLOCK):
        part = flat[at : at + _BLOCK]
        noise = torch.from_numpy(randomness.normals(len(part)))
        part.copy_((deviation * noise).to(part.device).add_(part))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are optimised, in the order of the model."""
    return [p for p in model.parameters() if p.requires_grad]


def train_generator(
    model: nn.Module,
    slots: Sequence[Slot],
    settings: GeneratorTraining,
    *,
    pad: int,
    rate: float,
    expected_batch: int,
    steps: int,
    clip_norm: float,
    noise_multiplier: float,
    randomness: Randomness,
    proximal: float = 0.0,
    losses: Losses | None = None,
) -> int:
    """Trains in place; returns the number of steps that ran.

    Called with a plan's numbers and a grant's randomness by `fit_private`; with an infinite clip and no noise by the
    run without guarantee, so that both take the same steps.

    Args:
        proximal: Mu of FedProx (arXiv 1812.06127): the loss gains mu / 2 times the squared distance from the start.
            Its gradient is a function of the weights alone: added to the noisy sum, it costs no privacy.
        losses: Of the examples; `next_token_losses` unless a classifier is trained.
    """
    weights = trainable(model)
    starts = [w.detach().clone() for w in weights] if proximal else weights
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate, betas=(0.9, 0.99))
    ran = 0
    with clipper(model.train(), clip_norm, settings.clipping) as clip:
        for step in range(steps):
            mask = randomness.poisson_mask(len(slots), rate)
            drawn = [slots[i] for i in np.flatnonzero(mask).tolist()]
            sums = clipped_sum(clip, model, drawn, pad=pad, microbatch=settings.microbatch, losses=losses)
            for weight, start, total in zip(weights, starts, sums, strict=True):
                if noise_multiplier > 0:
                    add_noise(total, noise_multiplier * clip_norm, randomness)
                weight.grad = total.div_(expected_batch)
                if proximal:
                    weight.grad = weight.grad + proximal * (weight.detach() - start)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 - 0.9 * step / steps)
            optimizer.step()
            ran += 1
    model.eval()
    return ran


def fit_private(
    model: nn.Module,
    slots: Sequence[Slot],
    plan: DPPlan,
    settings: GeneratorTraining,
    *,
    pad: int,
    randomness: Randomness,
    proximal: float = 0.0,
    losses: Losses | None = None,
) -> int:
    """DP-SGD exactly as planned: rate, steps, clip and noise are the plan's, which is what was charged.

    Raises:
        ValueError: If there is not one slot per declared record.
    """
    if len(slots) != plan.records:
        raise ValueError(f"the plan declares {plan.records} records, got {len(slots)} slots")
    return train_generator(
        model,
        slots,
        settings,
        pad=pad,
        rate=plan.sampling_rate,
        expected_batch=plan.expected_batch,
        steps=plan.steps,
        clip_norm=plan.clip_norm,
        noise_multiplier=plan.noise_multiplier,
        randomness=randomness,
        proximal=proximal,
        losses=losses,
    )


@dataclass
class PublicRandomness:
    """Poisson draws from a public seed, for training that claims no guarantee; it has no noise to give."""

    seed: int

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def normals(self, count: int) -> NDArray[np.float64]:
        """Never: noise from a public seed protects nothing."""
        raise RuntimeError(f"{count} normals asked of a public seed: noise comes from a grant's key only")

    def poisson_mask(self, count: int, rate: float) -> NDArray[np.bool_]:
        """An independent coin per unit."""
        return self._rng.random(count) < rate


def fit_without_guarantee(
    model: nn.Module,
    slots: Sequence[Slot],
    settings: GeneratorTraining,
    *,
    pad: int,
    seed: int,
    proximal: float = 0.0,
) -> int:
    """The same schedule without clip and noise: the control arm that shows what privacy costs."""
    return train_generator(
        model,
        slots,
        settings,
        pad=pad,
        rate=min(settings.expected_batch, len(slots)) / len(slots),
        expected_batch=min(settings.expected_batch, len(slots)),
        steps=settings.steps,
        clip_norm=math.inf,
        noise_multiplier=0.0,
        randomness=PublicRandomness(seed),
        proximal=proximal,
    )


def self_check(
    model: nn.Module,
    plan: DPPlan,
    settings: GeneratorTraining,
    *,
    pad: int,
    losses: Losses | None = None,
    example: Callable[[tuple[int, ...]], Encoded] = lambda tokens: Example(tokens, start=2),
) -> None:
    """Checks sampler, noise, clipping and independence of examples on random public tokens (docs/privacy.md).

    Finds layers that mix the examples of a batch (BatchNorm, packing, batch-mean losses), a missing clip and a model
    that does not learn at all. Leaves the model as it was. Costs some hundredths of a second for a tiny model.

    Args:
        model: What will be trained.
        plan: As which it will be trained.
        settings: With which it will be trained.
        pad: Token that fills a batch.
        losses: As it will be trained with.
        example: Makes an example for them from tokens.

    Raises:
        SelfCheckFailed: With what is wrong.
    """
    if not trainable(model):
        raise SelfCheckFailed("no parameter is trainable: was the adapter attached?")
    check_streams(plan.sampling_rate)
    rng = np.random.default_rng(0)
    # One as long as any: some models compute all positions otherwise where one text is long (LongRoPE).
    lengths = (5, 9, 9, max(14, settings.max_tokens), 7)
    examples = [example(tuple(int(t) for t in rng.integers(0, vocabulary_of(model), n))) for n in lengths]
    first = min(settings.rows_per_unit, len(examples) - 1)
    units = [examples[:first], *([e] for e in examples[first:])]
    try:
        with clipper(model.train(), plan.clip_norm, settings.clipping) as clip:
            summed = partial(clipped_sum, clip, model, pad=pad, microbatch=len(examples), losses=losses)
            together, alone = summed(units), [summed([unit]) for unit in units]
        norms = [_norm(grads) for grads in alone]
        # Gradients may be shorter than C at the start: what clips is seen where all are cut, too.
        tight = min([plan.clip_norm, *(norm / 2 for norm in norms if norm > 0)])
        with clipper(model.train(), tight, settings.clipping) as clip:
            cut = [_norm(clipped_sum(clip, model, [unit], pad=pad, microbatch=len(examples), losses=losses))
                   for unit in units]  # fmt: skip
    except UnknownWeight as problem:
        raise SelfCheckFailed(str(problem)) from problem
    finally:
        model.eval()
    for norm, limit in [*((norm, plan.clip_norm) for norm in norms), *((norm, tight) for norm in cut)]:
        if norm > limit:
            raise SelfCheckFailed(f"a clipped gradient has norm {norm}, above clip_norm {limit}")
    if 0.0 in norms:
        raise SelfCheckFailed("an example has no gradient: is anything trainable, are its tokens learnt?")
    gap = math.sqrt(
        sum(float((t - sum(parts)).double().square().sum()) for t, *parts in zip(together, *alone, strict=True))
    )
    if gap > 1e-3 * plan.clip_norm:
        raise SelfCheckFailed(f"an example's gradient depends on its batch (by {gap:.2g}): a layer mixes examples")


def whole_microbatch(model: nn.Module, plan: DPPlan, settings: GeneratorTraining, *, pad: int) -> None:
    """Trains on as many of the longest examples as are ever held at once, and forgets it: what memory that takes shows
    before a run, not in the midst of it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary_of(model), (settings.microbatch, settings.max_tokens)).tolist()
    units = [(Example(tuple(row), start=2),) for row in tokens]
    with clipper(model.train(), plan.clip_norm, settings.clipping) as clip:
        clipped_sum(clip, model, units, pad=pad, microbatch=settings.microbatch)
    model.eval()


def _norm(grads: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


def check_streams(rate: float, count: int = 20_000) -> None:
    """Draws of a public key, never used for anything else, have the planned rate and unit deviation (5 sigma)."""
    randomness = GrantRandomness(bytes(32))
    drawn = float(randomness.poisson_mask(count, rate).mean())
    if abs(drawn - rate) > 5 * math.sqrt(rate * (1 - rate) / count):
        raise SelfCheckFailed(f"the sampler draws at rate {drawn:.4f}, planned is {rate:.4f}")
    deviation = float(np.std(randomness.normals(count)))
    if abs(deviation - 1) > 5 / math.sqrt(2 * count):
        raise SelfCheckFailed(f"the noise has deviation {deviation:.4f} in units of sigma C, planned is 1")
