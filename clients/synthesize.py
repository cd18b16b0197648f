"""FDKT at the client: train a generator on private text under DP, sample from it with labels as control codes."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from fedsynth.adapters import fresh_lora, read_adapter
from fedsynth.clients.finetune import slots_of
from fedsynth.clients.home import Home
from fedsynth.corpus import Corpus, Provenance
from fedsynth.examples import check_room, control_code
from fedsynth.hub import weights_hash
from fedsynth.llm import LocalLLM
from fedsynth.lora import Adapter
from fedsynth.models import device, load_tokenizer
from fedsynth.privacy.release import DPTrained, Trained, release, release_adapter, release_without_guarantee
from fedsynth.selfcheck import self_check
from fedsynth.tasks import Synthesize, Synthesized
from fedsynth.training import fit_private, fit_without_guarantee


def synthesize(home: Home, order: Synthesize, digest: str) -> Synthesized:
    """Trains, samples and releases; the charge comes first and may refuse.

    Raises:
        fedsynth.privacy.plan.BudgetTooSmall, fedsynth.privacy.ledger.BudgetExhausted: Before any text is trained on.
    """
    if home.config.guarantee == "none":
        return _synthesize_without_guarantee(home, order)
    settings = home.config.generator_training
    tokenizer = load_tokenizer(home.config.generator)
    model = _fresh(home, order)
    plan = home.plan()
    # Whatever can fail fails here, before anything is spent.
    longest_code = max(len(tokenizer(control_code(label))["input_ids"]) for label in home.labels)
    check_room(tokenizer, model, home.labels, max(settings.max_tokens, longest_code + 1 + order.max_tokens))
    self_check(model, plan, settings, pad=tokenizer.pad_token_id)

    grant = home.ledger.charge(plan, home.binding(digest, plan), home.run, budget=home.config.budget)
    randomness = home.ledger.begin(grant)
    slots = slots_of(home, home.train, plan.records)
    steps = fit_private(model, slots, plan, settings, pad=tokenizer.pad_token_id, randomness=randomness)
    trained = DPTrained(model, plan, grant, steps)

    # From here on nothing reads private text: sampling and all that follows is post-processing of `trained`.
    texts, labels, unfinished = _sample(trained.model, tokenizer, home.labels, order)
    adapter: Adapter | None = None
    if order.share_adapter:
        adapter = release_adapter(trained, read_adapter(trained.model, weights_hash(home.config.generator)))
    said = home.said(plan, settings.rows_per_unit)
    return Synthesized(release(trained, texts, labels), said, unfinished, adapter)


def _synthesize_without_guarantee(home: Home, order: Synthesize) -> Synthesized:
    """The same schedule without clip and noise. Logged, charged as non-private, refused outside simulations."""
    settings = home.config.generator_training
    tokenizer = load_tokenizer(home.config.generator)
    model = _fresh(home, order)
    slots = slots_of(home, home.train, home.records)
    fit_without_guarantee(model, slots, settings, pad=tokenizer.pad_token_id, seed=order.seed)
    trained = Trained(model, reason="the scenario asks for no guarantee")
    texts, labels, unfinished = _sample(trained.model, tokenizer, home.labels, order)
    written = Corpus(tuple(texts), tuple(labels), Provenance.SELF_GENERATED)
    corpus = release_without_guarantee(trained, written, home.ledger, home.run, trained.reason, allowed=home.simulated)
    adapter = read_adapter(model, weights_hash(home.config.generator)) if order.share_adapter else None
    return Synthesized(corpus, home.said(None), unfinished, adapter)


def _fresh(home: Home, order: Synthesize) -> PeftModel:
    settings = home.config.generator_training
    model = fresh_lora(
        home.config.generator,
        rank=settings.rank,
        alpha=settings.alpha,
        seed=order.seed,
        precision=settings.precision,
    )
    return model.to(device())


def _sample(model: Any, tokenizer: Any, labels: tuple[str, ...], order: Synthesize) -> tuple[list[str], list[str], int]:
    """The same number of samples for every label of the public list, present at this client or not."""
    codes = [label for label in labels for _ in range(order.per_label)]
    writer = LocalLLM(model, tokenizer, batch_size=256, workers=1)
    texts = writer.complete(
        [control_code(label) for label in codes],
        max_tokens=order.max_tokens,
        temperature=order.temperature,
        top_p=order.top_p,
        seed=order.seed,
    )
    # A text as long as the limit was cut before its end.
    finished = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) < order.max_tokens for t in texts]
    kept = [i for i, done in enumerate(finished) if done]
    return [texts[i].strip() for i in kept], [codes[i] for i in kept], len(codes) - len(kept)
