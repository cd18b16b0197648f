"""A generator trained on private text under DP-SGD.

DP-SGD is Abadi et al. 2016 (algorithm 1) with Poisson sampling owned by the loop: masks are drawn before text is seen,
an empty batch is a noise-only step, and the noisy sum is divided by the expected batch, never by the drawn one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from fedsynth.batches import padded, token_rows
from fedsynth.corpus import Corpus
from fedsynth.instructions import ASK, asked, record
from fedsynth.models import Kind, context_of
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import DPPlan
from fedsynth.scenario import GeneratorTraining

# Opacus hooks layers whose input needs no gradient (the first, of a frozen base); torch remarks on each of them.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

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
) -> list[Example | None]:
    """One slot per declared record, each a map of one privacy unit to itself (docs/privacy.md).

    A unit is a person where the corpus names persons; its first row is used. A row with an unknown label, a slot beyond
    the real count, and a text that the tokenizer cannot read are empty: no record of one unit changes another's slot,
    or whether there is an answer. Declare at least as many units as there are: of more, only the first `records` are
    used, and taking one of them away would let the next one in (then the replace-one figure holds).

    Args:
        tokenizer: Public.
        corpus: Private; `prompts` are texts, `answers` class names. Without labels: instructions and responses.
        labels: The public label list; empty for instructions.
        records: Declared number of units; the plan's, whatever the real count is.
        longest: Longest example in tokens.
        kind: Of the generator.
        learns: Instructions: the whole record after its mark, or the response alone.
    """
    known = set(labels)
    return [
        None
        if row is None or (labels and corpus.answers[row] not in known)
        else _encode_or_none(tokenizer, *_parts(corpus, row, labels, learns), longest, kind)
        for row in unit_rows(corpus, records)
    ]


def unit_rows(corpus: Corpus, records: int) -> list[int | None]:
    """The first row of each privacy unit in as many slots as were declared; None where there is no unit."""
    units = corpus.units if corpus.units is not None else tuple(range(len(corpus)))
    first = sorted({unit: row for row, unit in reversed(list(enumerate(units)))}.values())
    return [*first[:records], *[None] * (records - len(first))]


def encode_records(
    tokenizer: Any, corpus: Corpus, longest: int, kind: Kind = "causal", *, learns: Learns = "record"
) -> list[Example]:
    """Instructions and responses of a corpus that is no privacy unit's slot, each as an example; those that the
    tokenizer cannot read are left out."""
    slots = encode_slots(tokenizer, corpus, (), len(corpus), longest, kind, learns=learns)
    return [example for example in slots if example is not None]


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
    where = next(model.parameters()).device
    within: Any = model._module if isinstance(model, GradSampleModule) else model
    if getattr(getattr(within, "config", None), "is_encoder_decoder", False):
        given, present = padded([e.tokens[: e.start] for e in examples], pad)
        wanted = padded([e.tokens[e.start :] or (IGNORED,) for e in examples], IGNORED)[0].to(where)
        # The decoder reads its start token and then the targets; padding stands behind, where it never looks.
        before = within.prepare_decoder_input_ids_from_labels(wanted)
        read = {"input_ids": given.to(where), "attention_mask": present.to(where), "decoder_input_ids": before}
        logits = model(**read, use_cache=False).logits.float()
    else:
        tokens, present = padded([e.tokens for e in examples], pad)
        targets, _ = padded([(IGNORED,) * e.start + e.tokens[e.start :] for e in examples], IGNORED)
        logits = model(input_ids=tokens.to(where), attention_mask=present.to(where)).logits[:, :-1].float()
        wanted = targets[:, 1 : tokens.shape[1]].to(where)
    return logits, wanted


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
    model: GradSampleModule,
    examples: Sequence[Encoded],
    *,
    pad: int,
    clip_norm: float,
    microbatch: int,
    losses: Losses | None = None,
) -> list[Tensor]:
    """Sum over examples of their gradients, each scaled to at most `clip_norm`; zeros for no example.

    A non-finite example contributes exactly nothing. Micro-batches only split one drawn batch. The loss of an example
    is `next_token_losses` unless another one is given.
    """
    losses_of: Losses = losses or next_token_losses
    weights = trainable(model)
    total = [torch.zeros_like(w) for w in weights]
    ordered = sorted(examples, key=lambda e: len(e.tokens))
    for at in range(0, len(ordered), microbatch):
        losses_of(model, ordered[at : at + microbatch], pad).sum().backward()
        if any(getattr(w, "grad_sample", None) is None or len(w.grad_sample) != len(ordered[at : at + microbatch])  # type: ignore[attr-defined]
               for w in weights):  # fmt: skip
            raise SelfCheckFailed(
                "a layer gives no gradient per example: LoRA on this architecture is not supported yet"
            )
        grads: list[Tensor] = [w.grad_sample for w in weights]  # type: ignore[attr-defined]  # Opacus puts it there
        scale = clip_factors(grads, clip_norm)
        for sum_, grad in zip(total, grads, strict=True):
            finite = torch.where(scale.view(-1, *[1] * (grad.dim() - 1)) > 0, grad, torch.zeros_like(grad))
            sum_ += torch.einsum("n,n...->...", scale, finite)
        for w in weights:
            w.grad, w.grad_sample = None, None  # type: ignore[attr-defined]
    return total


LARGEST_NORM = 1e30  # of a gradient that is clipped; beyond it one counts for nothing


def clip_factors(grads: Sequence[Tensor], clip_norm: float) -> Tensor:
    """Per example, what its gradient is multiplied by: min(1, C / norm), 0 where the norm is not finite or above 1e30.

    The norm runs over all tensors together, in float64; 1e-6 keeps float32 rounding of the product below C. For larger
    norms the factor would be a denormal of float32, which rounds by more than that.
    """
    squares = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) ** 2 for g in grads]
    norms = torch.stack(squares).sum(0).sqrt()
    factors = (clip_norm * (1 - 1e-6) / norms.clamp(min=1e-30)).clamp(max=1.0)
    return torch.where(norms <= LARGEST_NORM, factors, torch.zeros_like(factors)).to(grads[0].dtype)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are optimised, in the order of the model."""
    return [p for p in model.parameters() if p.requires_grad]


def train_generator(
    model: nn.Module,
    slots: Sequence[Encoded | None],
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
    per_example = GradSampleModule(model.train(), loss_reduction="sum")
    weights = trainable(per_example)
    starts = [w.detach().clone() for w in weights]
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate, betas=(0.9, 0.99))
    ran = 0
    for step in range(steps):
        mask = randomness.poisson_mask(len(slots), rate)
        drawn = [slots[i] for i in np.flatnonzero(mask).tolist()]
        batch = [e for e in drawn if e is not None]
        sums = clipped_sum(
            per_example, batch, pad=pad, clip_norm=clip_norm, microbatch=settings.microbatch, losses=losses
        )
        for weight, start, total in zip(weights, starts, sums, strict=True):
            if noise_multiplier > 0:
                noise = torch.from_numpy(randomness.normals(total.numel())).view(total.shape)
                total = (total.double() + noise_multiplier * clip_norm * noise.to(total.device)).to(weight.dtype)
            weight.grad = total / expected_batch
            if proximal:
                weight.grad = weight.grad + proximal * (weight.detach() - start)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - 0.9 * step / steps)
        optimizer.step()
        ran += 1
    per_example.to_standard_module()
    model.eval()
    return ran


def fit_private(
    model: nn.Module,
    slots: Sequence[Encoded | None],
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
    slots: Sequence[Example | None],
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
    lengths = (5, 9, 9, 14)
    batch = [example(tuple(int(t) for t in rng.integers(0, vocabulary_of(model), n))) for n in lengths]
    per_example = GradSampleModule(model.train(), loss_reduction="sum")
    settings: dict[str, Any] = {
        "pad": pad,
        "clip_norm": plan.clip_norm,
        "microbatch": len(batch),
        "losses": losses,
    }
    together = clipped_sum(per_example, batch, **settings)
    alone = [clipped_sum(per_example, [e], **settings) for e in batch]
    per_example.to_standard_module()
    model.eval()
    for grads in alone:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        if norm > plan.clip_norm:
            raise SelfCheckFailed(f"a clipped gradient has norm {norm}, above clip_norm {plan.clip_norm}")
        if norm == 0.0:
            raise SelfCheckFailed("an example has no gradient: is anything trainable, are its tokens learnt?")
    gap = math.sqrt(
        sum(float((t - sum(parts)).double().square().sum()) for t, *parts in zip(together, *alone, strict=True))
    )
    if gap > 1e-3 * plan.clip_norm:
        raise SelfCheckFailed(f"an example's gradient depends on its batch (by {gap:.2g}): a layer mixes examples")


def check_streams(rate: float, count: int = 20_000) -> None:
    """Draws of a public key, never used for anything else, have the planned rate and unit deviation (5 sigma)."""
    randomness = GrantRandomness(bytes(32))
    drawn = float(randomness.poisson_mask(count, rate).mean())
    if abs(drawn - rate) > 5 * math.sqrt(rate * (1 - rate) / count):
        raise SelfCheckFailed(f"the sampler draws at rate {drawn:.4f}, planned is {rate:.4f}")
    deviation = float(np.std(randomness.normals(count)))
    if abs(deviation - 1) > 5 / math.sqrt(2 * count):
        raise SelfCheckFailed(f"the noise has deviation {deviation:.4f} in units of sigma C, planned is 1")
