"""FDKT at the client: trains a generator on private text under DP, samples from it with labels as control codes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsynth.clients.batched_training import TrainRequest, Trains
from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.finetune import check, on_base, slots_of
from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import Synthesize, Synthesized
from fedsynth.federation.payload import decode, encode
from fedsynth.federation.run.whole_files import write_whole
from fedsynth.identifiers import kinds_in
from fedsynth.limits import MAX_TEXT
from fedsynth.lora import Adapter
from fedsynth.models.adapters import new_adapter
from fedsynth.models.encoding import text_rows
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.privacy.ledger import Grant
from fedsynth.privacy.release import DPTrained, NotReleasable, Trained, release, release_without_guarantee
from fedsynth.synthesis.augmentation import turns
from fedsynth.system.folders import private_folder
from fedsynth.training.dp_training import private, without_guarantee


def synthesize(client: ClientSide, request: Synthesize, digest: str) -> Trains[Synthesized]:
    """Trains, samples and releases; the charge comes first and may be refused.

    Raises:
        fedsynth.models.adapters.WrongAdapter: If the adapter that was sent is not of this client's model.
        fedsynth.privacy.release.NotReleasable: If true texts are asked of a site, or of a client with a guarantee.
        fedsynth.privacy.plan.BudgetTooSmall, fedsynth.privacy.caps.BudgetExhausted: Before any text is trained on.
    """
    if request.true_texts:
        return _true_texts(client, request)
    settings, name = client.config.generator_training, client.config.generator
    start = request.start or new_adapter(
        name,
        rank=settings.rank,
        alpha=settings.alpha,
        seed=request.seed,
        precision=settings.precision,
        targets=settings.lora_targets,
    )
    if client.config.guarantee == "none":
        return (yield from _without_guarantee(client, request, start))
    plan = client.plan()
    tokenizer = load_tokenizer(name)
    longest_code = max(map(len, text_rows(tokenizer, client.task.codes(*client.labels))))
    check(client, start, plan, longest=longest_code + 1 + request.max_new_tokens)  # with BOS

    later = (client.config.vote_plan(client.records, client.rounds),) if client.config.voting.share else ()
    grant = client.ledger.charge(
        plan, client.binding(digest, plan), client.run, budget=client.config.budget, beside=later
    )
    randomness = client.ledger.begin(grant)
    place = _shared(client, grant, digest)
    if place is not None and place.is_file():
        kept = decode(place.read_bytes(), _Kept, trusted=True)
    else:
        slots = slots_of(client, client.train, plan.records)
        trained = yield TrainRequest(name, start, settings, private(slots, plan, randomness))
        # Nothing below reads private text: sampling and all that follows is post-processing of the adapter.
        kept = _Kept(trained.adapter, trained.steps, *_sample(client, trained.adapter, request))
        if place is not None:
            private_folder(place.parent)
            write_whole(place, encode(kept, trusted=True))
    receipt = DPTrained(kept.adapter, plan, grant, kept.steps)
    corpus = release(receipt, kept.texts, kept.labels)
    return Synthesized(corpus, client.statement(plan, settings.rows_per_unit), kept.unfinished)


@dataclass(frozen=True)
class _Kept:
    """A training and its samples, for other arms of a simulation."""

    adapter: Adapter
    steps: int
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    unfinished: int


def _shared(client: ClientSide, grant: Grant, digest: str) -> Path | None:
    """The file of a simulation's arms that ask the same of the same client, by its grant and request; None elsewhere.

    Arms are hypothetical worlds. A grant's name in a simulation tells seed, client, data, plan, model, settings and
    request, and so the noise: equal names would train to the same bytes. Each arm's ledger has its own charge. Clients
    that train in one pass round otherwise than alone, and share nothing.
    """
    if client.shared is None or client.stacked:
        return None
    return client.shared / hashlib.sha256(f"{grant.id}/{digest}".encode()).hexdigest()


def _without_guarantee(client: ClientSide, request: Synthesize, start: Adapter) -> Trains[Synthesized]:
    """The same schedule without clip and noise. Logged, charged as non-private, refused outside simulations."""
    settings = client.config.generator_training
    check(client, start)
    slots = slots_of(client, client.train, client.records)
    found = yield TrainRequest(
        client.config.generator, start, settings, without_guarantee(slots, settings, request.seed)
    )
    trained = Trained(found.adapter, reason="the scenario asks for no guarantee")
    texts, labels, unfinished = _sample(client, trained.model, request)
    written = Corpus(texts, labels, Provenance.SELF_GENERATED)
    corpus = release_without_guarantee(
        trained, written, client.ledger, client.run, trained.reason, allowed=client.rules.without_guarantee
    )
    return Synthesized(corpus, client.statement(None), unfinished)


def _true_texts(client: ClientSide, request: Synthesize) -> Synthesized:
    """Private texts as they are, of each label at most as many as asked. Logged, charged as non-private."""
    if not client.simulated or client.config.guarantee != "none":
        raise NotReleasable("true texts are given by simulated clients without a guarantee, and by no others")
    rng, rows = np.random.default_rng(request.seed), list[int]()
    for label in client.labels:
        own = [row for row, answer in enumerate(client.train.answers) if answer == label]
        fits = [row for row in own if len(client.train.prompts[row]) <= MAX_TEXT]
        rows += rng.permutation(fits).astype(int).tolist()[: request.per_label]
    drawn = client.train.take(rows)
    shown = Corpus(drawn.prompts, drawn.answers, Provenance.DISCLOSED)
    corpus = release_without_guarantee(
        Trained(drawn, reason="none: the text itself"),
        shown,
        client.ledger,
        client.run,
        "the scenario asks for true texts",
        allowed=client.simulated and client.rules.without_guarantee,
    )
    return Synthesized(corpus, client.statement(None), unfinished=0)


def _sample(client: ClientSide, adapter: Adapter, request: Synthesize) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """The same number of samples for every label of the public list, present at this client or not; the combinations
    of attributes take turns in each label, also those that no row here has."""
    labels = [label for label in client.labels for _ in range(request.per_label)]
    codes = [code for label in client.labels for code in turns(client.task.codes(label), request.per_label)]
    tokenizer = load_tokenizer(client.config.generator)
    writer = LocalLLM(on_base(client, adapter).eval(), tokenizer, batch_size=256, workers=1)
    texts = writer.complete(
        codes,
        SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k or 0,
            max_new_tokens=request.max_new_tokens,
        ),
        seed=request.seed,
    )
    # A text as long as the limit was cut before its end. A text with too many characters is not sent, as the server
    # would refuse the whole reply. All these tests look at the DP model's text only, at nothing private: a text is left
    # out for its own form, never for being a person's.
    blocked = client.rules.identifiers
    finished = [
        len(row) < request.max_new_tokens and len(text) <= MAX_TEXT and not (blocked and blocked & kinds_in(text))
        for row, text in zip(text_rows(tokenizer, texts), texts, strict=True)
    ]
    kept = [i for i, done in enumerate(finished) if done]
    return tuple(texts[i].strip() for i in kept), tuple(labels[i] for i in kept), len(codes) - len(kept)
