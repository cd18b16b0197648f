"""A LoRA of the client's model: trained on private text and sent, or received and adopted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

from peft import PeftModel

from fedsynth.clients.batched_training import TrainRequest, Trains
from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.local_model import keep_facts
from fedsynth.corpus import Corpus
from fedsynth.federation.messages import Adopt, Adopted, Finetune, Finetuned
from fedsynth.federation.payload import decode, encode
from fedsynth.lora import Adapter, digest_of, only_b
from fedsynth.models.adapters import check_layers, with_adapter
from fedsynth.models.devices import device
from fedsynth.models.hub import config_of, weights_hash
from fedsynth.models.loading import kind_of, load_tokenizer
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.release import DPTrained, Trained, release_adapter, release_without_guarantee
from fedsynth.training.dp_training import private, train_generator, without_guarantee
from fedsynth.training.examples import Example, Slot, check_room, encode_slots
from fedsynth.training.selfcheck import check_stack, self_check

IN_USE = "adapter.payload"


def finetune(client: ClientSide, request: Finetune, digest: str) -> Trains[Finetuned]:
    """Trains and releases; under DP the charge comes first and may be refused.

    Raises:
        fedsynth.models.adapters.WrongAdapter: If the adapter that was sent is not of this client's model.
        fedsynth.privacy.plan.BudgetTooSmall, fedsynth.privacy.caps.BudgetExhausted: Before any text is trained on.
    """
    settings, pull = client.config.generator_training, request.proximal or 0.0
    to_train = partial(TrainRequest, client.config.generator, request.start, settings, frozen_a=request.frozen_a)
    if client.config.guarantee == "none":
        check(client, request.start)
        slots = slots_of(client, client.train, client.records)
        trained = yield to_train(without_guarantee(slots, settings, request.seed, pull))
        model = Trained(trained.adapter, reason="the scenario asks for no guarantee")
        adapter = release_without_guarantee(
            model,
            _sent(trained.adapter, request),
            client.ledger,
            client.run,
            model.reason,
            allowed=client.rules.without_guarantee,
        )
        return Finetuned(adapter, client.statement(None), client.records)
    plan = client.plan()
    check(client, request.start, plan, frozen_a=request.frozen_a)

    grant = client.ledger.charge(plan, client.binding(digest, plan), client.run, budget=client.config.budget)
    randomness = client.ledger.begin(grant)
    slots = slots_of(client, client.train, plan.records)
    trained = yield to_train(private(slots, plan, randomness, pull))
    receipt = DPTrained(trained.adapter, plan, grant, trained.steps)
    adapter = release_adapter(receipt, _sent(trained.adapter, request))
    return Finetuned(adapter, client.statement(plan, settings.rows_per_unit), client.records)


def check(
    client: ClientSide, start: Adapter, plan: DPPlan | None = None, *, frozen_a: bool = False, longest: int = 0
) -> None:
    """Checks adapter and room, and runs the self-check of a plan, so that failures come before anything is spent.

    Args:
        client: The client.
        start: The adapter that training starts from.
        plan: The plan of the training; None without a guarantee.
        frozen_a: Only the factors B will be trained.
        longest: Tokens that must fit, if more than the training's.

    Raises:
        fedsynth.models.adapters.WrongAdapter: If the adapter is not of this client's model.
        fedsynth.training.selfcheck.SelfCheckFailed: If the training does not do what the plan says.
        ValueError: If texts do not fit.
    """
    settings, name = client.config.generator_training, client.config.generator
    # The same start under the same plan passes again: simulated clients that share both are checked once.
    codes = _card_of(client)
    asked = (weights_hash(name), digest_of(start), settings, plan, codes, frozen_a, longest, client.stacked)
    if client.simulated and asked in _passed:
        return
    tokenizer, model = load_tokenizer(name), on_base(client, start, frozen_a=frozen_a)
    check_layers(start, name, settings.lora_targets, settings.precision)
    check_room(tokenizer, model, client.labels, max(settings.max_length, longest), client.task)
    if plan is not None:
        self_check(model, plan, settings, pad=tokenizer.pad_token_id)
        if client.stacked:
            check_stack(model, plan, settings, pad=tokenizer.pad_token_id)
    while len(_passed) >= _REMEMBERED:
        _passed.pop(next(iter(_passed)))
    _passed[asked] = None


_REMEMBERED = 64
_passed: dict[Hashable, None] = {}  # of this process


def _sent(whole: Adapter, request: Finetune) -> Adapter:
    if not request.frozen_a:
        return whole
    return replace(whole, arrays={name: array for name, array in whole.arrays.items() if only_b(name)})


def adopt(client: ClientSide, request: Adopt) -> Adopted:
    """Puts the server's adapter to use if it fits.

    Raises:
        fedsynth.models.adapters.WrongAdapter: If it is not of this client's model.
    """
    on_base(client, request.adapter)
    put_to_use(client, request.adapter)
    return Adopted(sum(array.size for array in request.adapter.arrays.values()))


def on_base(client: ClientSide, adapter: Adapter, *, frozen_a: bool = False) -> PeftModel:
    """The client's model with an adapter in place.

    Raises:
        fedsynth.models.adapters.WrongAdapter: If the adapter is not of this model.
    """
    precision = client.config.generator_training.precision
    return with_adapter(client.config.generator, adapter, frozen_a=frozen_a, precision=precision).to(device())


def slots_of(client: ClientSide, corpus: Corpus, records: int) -> list[tuple[Example, ...]]:
    """One slot per declared record, by the client's settings; cached for the lifetime of the corpus."""
    settings, name = client.config.generator_training, client.config.generator
    codes = _card_of(client)
    cuts = (settings.max_length, settings.cut)
    asked = (name, client.labels, records, cuts, settings.loss_on, settings.rows_per_unit, *codes)
    known = _encoded.setdefault(corpus, {})
    if asked not in known:
        known[asked] = encode_slots(
            load_tokenizer(name),
            corpus,
            client.labels,
            records,
            settings,
            kind_of(config_of(name)),
            task=client.task,
        )
    return list(known[asked])


def _card_of(client: ClientSide) -> tuple[str, ...]:
    """What the card has to do with the client's examples."""
    if client.instructs:
        return (*client.task.around("student"), client.task.system)
    rows = map(repr, client.task.combinations)  # which rows are learnt
    return (*client.task.codes(*client.labels), *rows)


_encoded: WeakKeyDictionary[Corpus, dict[Hashable, list[tuple[Example, ...]]]] = WeakKeyDictionary()


def train_without_guarantee(
    client: ClientSide, model: PeftModel, slots: Sequence[Slot], *, seed: int, beside: Sequence[Slot] = ()
) -> None:
    """Trains on the client's schedule without clip and noise, in place; without slots nothing changes.

    Args:
        client: Its settings give the schedule.
        model: A model with an adapter.
        slots: The examples to learn.
        seed: Seed of the batches.
        beside: Further examples. Batches grow in proportion, so that steps and draws per slot stay the same.
    """
    if not (learnt := [*slots, *beside]):
        return
    settings = client.config.generator_training
    batch = min(settings.expected_batch_size, len(slots)) * len(learnt) / len(slots)
    settings = replace(settings, expected_batch_size=round(batch))
    pad = load_tokenizer(client.config.generator).pad_token_id
    train_generator(model, without_guarantee(learnt, settings, seed), settings, pad=pad)


def put_to_use(client: ClientSide, adapter: Adapter) -> None:
    """Stores an adapter as the one in use."""
    part = client.work / f"{IN_USE}.part"
    part.write_bytes(encode(Adopt(adapter)))
    part.replace(client.work / IN_USE)
    if client.instructs:  # no one uses the generator of a classifier
        keep_facts(client)


def in_use(client: ClientSide) -> Adapter | None:
    """The adapter in use; None for the base alone."""
    path: Path = client.work / IN_USE
    return decode(path.read_bytes(), Adopt).adapter if path.is_file() else None
