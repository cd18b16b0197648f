"""A real site's client: a scenario's settings within the limits of site.toml."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context

from fedsynth.clients.audit_log import AuditLog
from fedsynth.clients.client_side import ClientSide, NotAllowed, Rules, WrongData, WrongLabels, cell_of, site_log
from fedsynth.deployment.invitation import public_labels
from fedsynth.deployment.policy import SITE, Place, Policy, load_site
from fedsynth.deployment.roster import identity
from fedsynth.federation.messages import Envelope
from fedsynth.federation.validation import Rejected, check_settings
from fedsynth.privacy.plan import Budget
from fedsynth.scenario.client import Client
from fedsynth.scenario.schema import Cell
from fedsynth.system.folders import private_folder
from fedsynth.typed import BadValue

BUNDLE = "FEDSYNTH_BUNDLE"  # set for a client app's process: the hash of the server's bundle


def site_client(context: Context, envelope: Envelope) -> ClientSide:
    """The client of this site for a request of a run: the scenario's settings within the limits of site.toml.

    Raises:
        BadValue: If site.toml or the scenario cannot be read.
        KeyError: If the scenario has no such arm or seed.
        fedsynth.privacy.ledger_file.LedgerUnusable: If the data's account cannot be used, or lacks charges of the audit
            log.
    """
    place = load_site(Path(os.environ[SITE]))
    cell = cell_of(str(context.run_config["scenario-toml"]), envelope.arm, envelope.seed)
    return client_side(place, cell, envelope, _asker(place, context))


def client_side(place: Place, cell: Cell, envelope: Envelope, who: Mapping[str, Any], **ledger: Any) -> ClientSide:
    """`site_client` for a resolved cell. It opens no files of the site but site.toml, the account and the header of its
    rows.

    Args:
        place: The site.
        cell: The cell of the request.
        envelope: The request's envelope.
        who: The requester, for the audit log.
        **ledger: More arguments of the account.
    """
    site, scenario = place.site, cell.scenario
    if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) for name in (envelope.run, cell.arm)):
        raise BadValue("run and arm name folders here: letters, digits, dots, dashes and underscores")
    work = place.state / "runs" / envelope.run / cell.arm / f"seed-{cell.seed}"
    private_folder(work)
    # Labels are never read from a file: a server could learn if a file exists, or holds a value.
    labels = public_labels(scenario.data)
    config = client_of(place, scenario.client.of(envelope.client))
    audit_log = place.witness({"strategy": scenario.strategy.use, **who})
    account = place.open_ledger(witness=audit_log, **ledger)
    return ClientSide(
        index=envelope.client,
        config=config,
        labels=labels,
        records=site.data.records,
        rounds=scenario.rounds,
        unit="row" if site.data.person is None else "person",  # the site's name of its column stays private
        work=work,
        run=f"{envelope.run}/{cell.arm}/{cell.seed}",
        ledger=account,
        open=lambda: place.open_rows(account, scenario.task.columns),
        simulated=False,
        allowed=rules_of(place, cell, config, labels),
        lock=place.ledger.parent / "orders.lock",
        approvals=place.approvals,
        audit_log=audit_log,
        task=scenario.task,
        identify=None if site.policy.secure_sum is None else lambda: identity(place),
    )


def unopened(task: str, why: str) -> None:
    """Logs a request whose client could not be opened, at the site; the reason may hold private values.

    Args:
        task: Task of the request.
        why: A traceback.
    """
    place = load_site(Path(os.environ[SITE]))
    AuditLog(place.audit_log, {"superlink": place.site.superlink.address, "bundle": os.environ.get(BUNDLE, "")}).add(
        "refused", task=task, why="no client could be opened for the request: site.log"
    )
    site_log(place.state).error("%s: %s", task, why)


def client_of(place: Place, asked: Client) -> Client:
    """The client table that the site runs: the scenario's, with the site's own models and at most its own budget."""
    models, cap = place.site.models, place.site.policy.per_run
    found = replace(asked, task_models=(), stacked=None)
    if models.generator:
        found = replace(found, generator=place.model(models.generator))
    if models.task_model:
        found = replace(found, task_model=place.model(models.task_model))
    if asked.budget is not None and cap is not None:
        least = Budget(min(asked.budget.epsilon, cap.epsilon), min(asked.budget.delta, cap.delta))
        found = replace(found, budget=least)
    return found


def rules_of(place: Place, cell: Cell, config: Client, labels: tuple[str, ...]) -> Rules:
    """The site's rules for a scenario, by its policy. They read nothing private.

    Args:
        place: The site.
        cell: The cell of the request.
        config: The client table that would run here, from `client_of`.
        labels: The scenario's label list.
    """
    policy = place.site.policy
    return Rules(
        requests=frozenset(policy.requests),
        outputs=frozenset(policy.outputs),
        without_guarantee=policy.without_guarantee,
        approval=policy.approve_text,
        identifiers=frozenset(policy.identifiers),
        objection=_objection(place, cell, config, labels),
        # The others add the noise of the scenario's budget: a site with a smaller one must rely on its own.
        rests_on_sums=policy.secure_sum is not None
        and policy.secure_sum.accept
        and config.budget == cell.scenario.client.budget,
    )


def _objection(place: Place, cell: Cell, config: Client, labels: tuple[str, ...]) -> Exception | None:
    site, policy, scenario = place.site, place.site.policy, cell.scenario
    if policy.strategies and scenario.strategy.use not in policy.strategies:
        return NotAllowed(f"the strategy {scenario.strategy.use!r} is none of policy.strategies")
    if site.data.records < policy.minimum_records:
        return NotAllowed(
            f"{site.data.records} records are declared, policy.minimum_records is {policy.minimum_records}"
        )
    bundle = os.environ.get(BUNDLE, "")
    if policy.bundles and bundle not in policy.bundles:
        return NotAllowed(f"the server's bundle {bundle or 'without a hash'} is none of policy.bundles")
    if scenario.data.task != site.data.task:
        return WrongData(f"the scenario's task is {scenario.data.task!r}, the site's data are for {site.data.task!r}")
    if set(labels) != set(site.data.labels):
        strange, missing = sorted(set(labels) - set(site.data.labels)), sorted(set(site.data.labels) - set(labels))
        return WrongLabels(f"of the scenario's labels data.labels has not {strange}; the scenario has not {missing}")
    for column, card in scenario.task.attributes.items():
        own = site.data.attributes.get(column)
        if own is None:
            return WrongData(f"the scenario has the attribute {column!r}, data.attributes of site.toml has not")
        if odd := sorted(set(card.values) ^ set(own)):
            return WrongLabels(f"of the attribute {column!r} only one of the scenario and data.attributes lists {odd}")
    for role, name, sites_own in (
        ("generator", config.generator, site.models.generator),
        ("task_model", config.task_model, site.models.task_model),
        ("embedder", config.embedder, ""),
    ):
        if name and not sites_own and name not in policy.models:
            return NotAllowed(f"the scenario's {role} {name!r} is none of policy.models, and [models] names no own one")
    if place.imported is None:
        return NotAllowed("no row has been imported as site.toml declares them: fedsynth site check")
    return _sums(policy, config) or _out_of_range(config, scenario.rounds)


def _sums(policy: Policy, config: Client) -> Exception | None:
    """The reason why a scenario's secure sum is none that the site takes part in."""
    cohort, terms = config.secure_sum, policy.secure_sum
    if cohort is None:
        return None
    if terms is None:
        return NotAllowed("the scenario asks for secure sums, and site.toml has no policy.secure_sum")
    if cohort.least < terms.clients or cohort.colluders < terms.colluders:
        return NotAllowed(
            f"of the scenario's cohort {cohort.least} clients open a sum and {cohort.colluders} may collude, "
            f"policy.secure_sum asks for {terms.clients} and {terms.colluders} at least"
        )
    return None


def _out_of_range(config: Client, rounds: int) -> Exception | None:
    """Refuses a server's numbers beyond which the privacy statement was never shown to hold."""
    try:
        check_settings(config, rounds)
    except Rejected as problem:
        return NotAllowed(str(problem))
    return None


def _asker(place: Place, context: Context) -> dict[str, Any]:
    return {
        "dataset": place.site.data.id,
        "superlink": place.site.superlink.address,
        "flower_run": str(context.run_id),
        "bundle": os.environ.get(BUNDLE, ""),
    }
