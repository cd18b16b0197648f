"""A LoRA of the client's model: trained on private text and sent, or received and put to use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peft import PeftModel

from fedsynth.adapters import read_adapter, with_adapter
from fedsynth.clients.home import Home
from fedsynth.corpus import Corpus
from fedsynth.examples import Example, check_room, encode_slots
from fedsynth.hub import config_of
from fedsynth.lora import Adapter, only_b
from fedsynth.models import device, kind_of, load_tokenizer
from fedsynth.payload import decode, encode
from fedsynth.privacy.release import DPTrained, Trained, release_adapter, release_without_guarantee
from fedsynth.selfcheck import self_check
from fedsynth.tasks import Adopt, Adopted, Finetune, Finetuned
from fedsynth.training import fit_private, fit_without_guarantee

IN_USE = "adapter.payload"


def finetune(home: Home, order: Finetune, digest: str) -> Finetuned:
    """Trains and releases; under DP the charge comes first and may refuse.

    Raises:
        fedsynth.adapters.WrongAdapter: If the adapter that was sent is not of this client's model.
        fedsynth.privacy.plan.BudgetTooSmall, fedsynth.privacy.ledger.BudgetExhausted: Before any text is trained on.
    """
    settings = home.config.generator_training
    tokenizer = load_tokenizer(home.config.generator)
    model = on_base(home, order.start, frozen_a=order.frozen_a)
    check_room(tokenizer, model, home.labels, settings.max_tokens)
    if home.config.guarantee == "none":
        train_without_guarantee(home, model, home.train, home.records, seed=order.seed, proximal=order.proximal or 0.0)
        trained = Trained(model, reason="the scenario asks for no guarantee")
        adapter = release_without_guarantee(
            trained, _sent(model, order), home.ledger, home.run, trained.reason, allowed=home.simulated
        )
        return Finetuned(adapter, home.said(None), home.records)
    plan = home.plan()
    self_check(model, plan, settings, pad=tokenizer.pad_token_id)

    grant = home.ledger.charge(plan, home.binding(digest, plan), home.run, budget=home.config.budget)
    randomness = home.ledger.begin(grant)
    slots = slots_of(home, home.train, plan.records)
    steps = fit_private(
        model,
        slots,
        plan,
        settings,
        pad=tokenizer.pad_token_id,
        randomness=randomness,
        proximal=order.proximal or 0.0,
    )
    adapter = release_adapter(DPTrained(model, plan, grant, steps), _sent(model, order))
    return Finetuned(adapter, home.said(plan, settings.rows_per_unit), home.records)


def _sent(model: PeftModel, order: Finetune) -> Adapter:
    whole = read_adapter(model, order.start.base)
    if not order.frozen_a:
        return whole
    return replace(whole, arrays={name: array for name, array in whole.arrays.items() if only_b(name)})


def adopt(home: Home, order: Adopt) -> Adopted:
    """Puts the server's adapter to use, once it is known to fit.

    Raises:
        fedsynth.adapters.WrongAdapter: If it is not of this client's model.
    """
    on_base(home, order.adapter)
    put_to_use(home, order.adapter)
    return Adopted(sum(array.size for array in order.adapter.arrays.values()))


def on_base(home: Home, adapter: Adapter, *, frozen_a: bool = False) -> PeftModel:
    """The client's model with an adapter in place.

    Raises:
        fedsynth.adapters.WrongAdapter: If the adapter is not of this model.
    """
    precision = home.config.generator_training.precision
    return with_adapter(home.config.generator, adapter, frozen_a=frozen_a, precision=precision).to(device())


def slots_of(home: Home, corpus: Corpus, records: int) -> list[tuple[Example, ...]]:
    """One slot per declared record, as the client's settings say."""
    settings, name = home.config.generator_training, home.config.generator
    kind = kind_of(config_of(name))
    return encode_slots(
        load_tokenizer(name),
        corpus,
        home.labels,
        records,
        settings.max_tokens,
        kind,
        learns=settings.learns,
        rows_per_unit=settings.rows_per_unit,
    )


def train_without_guarantee(
    home: Home, model: PeftModel, corpus: Corpus, records: int, *, seed: int, proximal: float = 0.0
) -> None:
    """The client's schedule without clip and noise: for what stays at home, and for runs without a guarantee."""
    pad = load_tokenizer(home.config.generator).pad_token_id
    slots, settings = slots_of(home, corpus, records), home.config.generator_training
    fit_without_guarantee(model, slots, settings, pad=pad, seed=seed, proximal=proximal)


def put_to_use(home: Home, adapter: Adapter) -> None:
    """Keeps an adapter as the one that the client answers with."""
    part = home.work / f"{IN_USE}.part"
    part.write_bytes(encode(Adopt(adapter)))
    part.replace(home.work / IN_USE)


def in_use(home: Home) -> Adapter | None:
    """The adapter that the client answers with; None while it is the base alone."""
    path: Path = home.work / IN_USE
    return decode(path.read_bytes(), Adopt).adapter if path.is_file() else None
