"""FedPIT at the client: writes records in context, trains on private and on written ones apart, sends the mix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peft import PeftModel

from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.finetune import on_base, put_to_use, slots_of, train_without_guarantee
from fedsynth.clients.fitting import Fitting
from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import SelfTrain, SelfTrained
from fedsynth.instructions import record
from fedsynth.lora import Adapter, mix
from fedsynth.models.adapters import read_adapter
from fedsynth.models.encoding import token_ids
from fedsynth.models.form import LINES, Form, Pair
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_tokenizer
from fedsynth.privacy.release import NotReleasable, Trained, release_without_guarantee
from fedsynth.synthesis.self_instruct import generate, pairs, select
from fedsynth.training.examples import Slot, readable

NO_GUARANTEE = "FedPIT has no formal privacy: private records are shown to the model whose texts shape what is sent"


def self_train(client: ClientSide, request: SelfTrain) -> SelfTrained:
    """The client's part of a round, in the order of the paper's algorithm (docs/methods/fedpit.md).

    Raises:
        NotReleasable: If the client's configuration asks for a guarantee: nothing here gives one.
        fedsynth.models.adapters.WrongAdapter: If the global adapter is not of this client's model.
    """
    if client.config.guarantee != "none":
        raise NotReleasable(NO_GUARANTEE)
    real = slots_of(client, client.train, client.records)

    candidates, funnel = syn_gen(client, request)  # by W^g
    local = loc_train(client, request.start, real, request.seed)  # W^l
    kept = syn_sel(client, request, local, candidates)
    written = slots_of(client, kept, len(kept))
    if request.training == "isolated":
        own = loc_train(
            client, request.start, written, request.writing_seed
        )  # W^s: the same start, an optimizer of its own
        sent = mix(_adapter(local, request), _adapter(own, request), request.share)  # W^a
    elif request.training == "mixed":
        sent = _adapter(loc_train(client, request.start, real, request.seed, beside=written), request)
    else:
        sent = _adapter(loc_train(client, request.start, written, request.writing_seed), request)
        put_to_use(client, _adapter(loc_train(client, request.start, real, request.seed, beside=written), request))

    released = release_without_guarantee(
        Trained(local, NO_GUARANTEE),
        sent,
        client.ledger,
        client.run,
        NO_GUARANTEE,
        allowed=client.rules.without_guarantee,
    )
    said = client.statement(None)
    return SelfTrained(released, said, client.records, {**funnel, "kept": len(kept)})


def syn_gen(client: ClientSide, request: SelfTrain) -> tuple[Corpus, dict[str, int]]:
    """Candidates written with the global adapter in place; none if they would have no weight in the sent mix."""
    if request.training == "isolated" and request.share == 1:
        return Corpus((), (), Provenance.SELF_GENERATED), {}
    tokenizer = load_tokenizer(client.config.generator)
    # Training truncates longer records; as demonstrations they could leave no room for the new record.
    longest = client.config.generator_training.max_length
    local = client.train.take(row for row, text in enumerate(client.train.prompts) if text)
    shown = [pair for pair in pairs(local) if _tokens(client.form, tokenizer, pair) <= longest]
    return generate(
        Fitting(LocalLLM(on_base(client, request.start).eval(), tokenizer, workers=1)),
        shown,
        local,
        candidates=request.candidates,
        shots=request.shots,
        max_new_tokens=request.max_new_tokens,
        seed=request.writing_seed,
        form=client.form,
    )


def _tokens(form: Form, tokenizer: Any, pair: Pair) -> float:
    """Tokens of a record as a demonstration; infinitely many if the tokenizer cannot read it."""
    line = record(*pair) if form == LINES else f"{pair[0]} {pair[1]}"
    return len(token_ids(tokenizer, line)) if readable(tokenizer, line) else math.inf


def syn_sel(client: ClientSide, request: SelfTrain, local: PeftModel, candidates: Corpus) -> Corpus:
    """The candidates to train on, chosen with the local adapter in place."""
    llm = Fitting(LocalLLM(local, load_tokenizer(client.config.generator), workers=1))
    return select(llm, candidates, keep=request.keep, by=request.selection, seed=request.writing_seed, form=client.form)


def loc_train(
    client: ClientSide, start: Adapter, slots: Sequence[Slot], seed: int, *, beside: Sequence[Slot] = ()
) -> PeftModel:
    """Trains from `start`, as `train_without_guarantee` does."""
    model = on_base(client, start)
    train_without_guarantee(client, model, slots, seed=seed, beside=beside)
    return model.eval()


def _adapter(model: PeftModel, request: SelfTrain) -> Adapter:
    return read_adapter(model, request.start.base)
