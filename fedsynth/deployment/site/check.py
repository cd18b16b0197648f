"""`fedsynth site check`: imports a site's rows and checks all that it needs to take part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from fedsynth.clients.audit_log import entries
from fedsynth.deployment.policy import Place
from fedsynth.deployment.roster import told
from fedsynth.deployment.site.ready import Finding, check_account, check_key, check_state, server
from fedsynth.deployment.site.rows import import_rows
from fedsynth.instructions import record
from fedsynth.models.hub import weights_hash
from fedsynth.models.loading import Role, load_tokenizer
from fedsynth.models.loading import check as check_model
from fedsynth.privacy.audit import last_cap
from fedsynth.privacy.rdp import above_epsilon
from fedsynth.simulation.flower import check_flower
from fedsynth.training.examples import tokens_of
from fedsynth.typed import BadValue


def check(place: Place) -> Iterator[Finding]:
    """Makes every check, in order; sends only a request for the server's health."""
    site = place.site
    yield _found("site.toml", lambda: f"site {site.name!r}, data set {site.data.id!r}")
    yield _found("Flower", check_flower)
    before = last_cap(place.ledger)
    yield from _data(place)
    yield from _models(place)
    yield from _lengths(place)
    yield from _budget(place)
    if before is not None and before != site.policy.lifetime:
        yield Finding(
            "budget",
            "warning",
            f"the account was last used under a lifetime of epsilon {before.epsilon:g} at delta {before.delta:g}, here "
            f"it is {site.policy.lifetime.epsilon:g} at {site.policy.lifetime.delta:g}: if site.toml was not changed, "
            "another site that uses the account says so; write the same policy.lifetime in both",
        )
    yield _found("audit trail", lambda: _trail(place))
    yield _found("state folder", lambda: check_state(place))
    yield _found("key", lambda: check_key(place))
    if site.policy.secure_sum is not None:
        yield _found("secure sums", lambda: told(place))
    yield from server(place)


def _found(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, "ok", look())
    except (BadValue, OSError, ValueError, RuntimeError) as problem:
        return Finding(what, "problem", " ".join(str(problem).split()))


def _data(place: Place) -> Iterator[Finding]:
    try:
        yield from import_rows(place)
    except (BadValue, OSError, ValueError, RuntimeError) as problem:
        kept = place.imported
        stay = f"; requests go on with the rows as imported at {kept.at}" if kept else ""
        yield Finding("data", "problem", f"nothing was imported: {' '.join(str(problem).split())}{stay}")


def _models(place: Place) -> Iterator[Finding]:
    own: list[tuple[Role, str]] = [
        ("generator", place.site.models.generator),
        ("task_model", place.site.models.task_model),
    ]
    for role, name in own:
        if name:
            yield _found(role, partial(_fits, place.model(name), role))
    for name in place.site.policy.models:
        yield _found("model", partial(_loads, name))
    if not place.site.policy.models and not all(name for _, name in own):
        yield Finding(
            "models",
            "warning",
            "policy.models is empty, and [models] does not name both: scenarios that need another model are refused",
        )


LENGTHS = (64, 128, 256, 512)  # tokens; a scenario's max_length is often one of them


def _lengths(place: Place) -> Iterator[Finding]:
    """How many of the site's texts are long, in tokens of its generator: only its operator is told."""
    name = place.site.models.generator
    if not name or place.imported is None:
        return
    try:
        tokenizer = load_tokenizer(place.model(name))
        train = place.open_rows(place.open_ledger()).train
    except (BadValue, OSError, ValueError, RuntimeError):
        return  # another check reports it
    if place.site.data.task == "classification":
        texts = train.prompts
    else:
        texts = tuple(map(record, train.prompts, train.answers))
    found = [tokens for text in texts if text and (tokens := tokens_of(tokenizer, text)) is not None]
    longer = ", ".join(f"{sum(tokens >= limit for tokens in found)} than {limit}" for limit in LENGTHS)
    yield Finding(
        "lengths",
        "ok",
        f"of {len(found)} training texts, longer in tokens of the generator: {longer}. A scenario with a smaller "
        "client.generator_training.max_length cuts them, and they teach no end of text; nobody else is told",
    )


def _fits(name: str, role: Role) -> str:
    check_model(name, role)
    return f"{name} loads"


def _loads(name: str) -> str:
    load_tokenizer(name)
    return f"{name} is here ({weights_hash(name)[:12]})"


def _budget(place: Place) -> Iterator[Finding]:
    cap = place.site.policy.lifetime
    try:
        check_account(place)
        if not place.ledger.exists():
            start = "the ledger is made with the first import"
            yield Finding("budget", "ok", f"nothing spent of epsilon {cap.epsilon:g} at delta {cap.delta:g}; {start}")
            return
        ledger = place.open_ledger()
        ledger.tell_witness()
    except (BadValue, OSError, RuntimeError) as problem:
        yield Finding("budget", "problem", " ".join(str(problem).split()))
        return
    (spent, delta), stands, order = ledger.spent(), ledger.filtered(), ledger.order
    if spent >= cap.epsilon:
        yield Finding(
            "budget", "problem", f"epsilon {spent:.4g} of {cap.epsilon:g} is spent: nothing more will be answered"
        )
        return
    told = (
        f"epsilon {spent:.4g} of {cap.epsilon:g} spent, at delta {delta:g}, as if all plans had been fixed in advance"
    )
    yield Finding("budget", "ok", f"{told}; {stands:.4g} by the filter ({place.ledger})")
    if (least := -above_epsilon(order, cap.delta)) >= cap.epsilon:
        yield Finding(
            "budget",
            "warning",
            f"the filter has order {order}, which the lifetime chose under which the first run was charged; below "
            f"epsilon {least:.4g} that order has no room, so that policy.lifetime admits no further run",
        )
    elif stands >= cap.epsilon:
        full = "the filter's share of policy.lifetime is used up: what is reserved is answered, and no further run"
        yield Finding("budget", "warning", full)


def _trail(place: Place) -> str:
    return f"{sum(1 for _ in entries(place.audit_log))} entries, each follows from the one before ({place.audit_log})"
