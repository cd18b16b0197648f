"""`fedsynth site check --statement`: one page for a data officer on what leaves a site, to whom, and under what bound.

Each number comes from site.toml, the coordinator's invitation, or the account. No row is read.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

from fedsynth.deployment.invitation import FILE, Planned, read_invitation
from fedsynth.deployment.policy import Place, Policy
from fedsynth.federation.messages import Output
from fedsynth.federation.run.privacy_report import up
from fedsynth.identifiers import NAMES
from fedsynth.privacy.audit import contents
from fedsynth.privacy.curve import rate_of
from fedsynth.privacy.plan import Budget

LEAVES: Mapping[Output, str] = {
    "text": "synthetic text: written by a model that was trained here on the private text, under differential privacy",
    "adapter": "an adapter: numbers that make a language model write like the private text; anyone who has it can "
    "write text with it, which nobody at this site reads",
    "scores": "scores: for each text of the coordinator a number, from a model trained here under differential "
    "privacy, or with noise on the numbers",
    "votes": "votes: for each text of the coordinator a count of the private texts near to it, with noise",
    "metrics": "figures of how well models that learnt private text do on test rows; **no bound covers these figures**",
}


def statement(place: Place) -> str:
    """The page, in Markdown.

    Raises:
        BadValue: If the folder has an invitation that cannot be read.
        fedsynth.privacy.ledger_file.LedgerUnusable: If the account cannot be read.
    """
    invitation = place.path(FILE)
    asked = read_invitation(invitation).scenario if invitation.is_file() else None
    account = contents(place.ledger) if place.ledger.is_file() else None
    return "\n".join(_page(place, asked, account)) + "\n"


def _page(place: Place, asked: Planned | None, account: dict[str, Any] | None) -> Iterator[str]:
    site, policy = place.site, place.site.policy
    yield f"# What leaves the site {site.name}"
    yield ""
    yield (
        f"For whoever answers for the data set {site.data.id}. Made from the site's policy (site.toml), the "
        "coordinator's invitation and the account of what was spent. No row of the data was read for this page."
    )
    yield "\n## What leaves, and to whom\n"
    yield f"To the coordinator's server, {site.superlink.address}, by TLS. {_certificate(place)}"
    yield "The coordinator may pass on what it gets: to its language model, to the other sites, to anybody.\n"
    yield from (f"- {line}" for line in _leaving(policy))
    yield (
        f"- always: the site's name and public key, the declared number of {_units(place)} ({site.data.records}), "
        "the privacy statement of each reply, and codes of refusal from a fixed list. Anyone on the way sees when a "
        "reply comes, and how large it is."
    )
    yield "\nThe private text itself, models trained on it, and keys stay on this site's machine."
    yield "\n## How often\n"
    yield from _often(policy, asked, account)
    yield "\n## How much\n"
    yield from _bounds(place, asked, account)
    yield "\n## On what this rests\n"
    yield from (f"- {line}" for line in _assumptions(place, asked))
    yield "\n## What the bound does not cover\n"
    yield from (f"- {line}" for line in _open(place, asked))
    yield "\n## Who to ask\n"
    contact = site.contact or 'nobody is named: write contact = "..." into site.toml'
    yield f"- at this site: {contact}"
    yield f"- the coordinator: whoever runs {site.superlink.address}, and sent the invitation"
    yield "- what has left so far: `fedsynth ledger show`, and the audit trail, on this site's machine"


def _certificate(place: Place) -> str:
    """By what the server is recognised."""
    try:
        der = ssl.PEM_cert_to_DER_cert(place.path(place.site.superlink.root_certificates).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return "Its certificate authority's file is not there, so that nothing can be sent yet."
    digest = hashlib.sha256(der).hexdigest().upper()
    pairs = ":".join(digest[at : at + 2] for at in range(0, len(digest), 2))
    return f"It is recognised by the certificate authority with the SHA-256 fingerprint {pairs}."


def _leaving(policy: Policy) -> Iterator[str]:
    for output in policy.outputs:
        line = LEAVES[output]
        if output == "text" and policy.approve_text:
            line += ". A person of this site reads it first, and may refuse"
        if output == "text" and policy.identifiers:
            named = ", ".join(NAMES[kind] for kind in policy.identifiers)
            line += f". A text with one of these by its form stays here: {named}"
        yield line
    if not policy.outputs:
        yield "nothing that derives from private text"
    if policy.without_guarantee:
        yield "**the policy lets outputs leave without any bound (without_guarantee = true)**"


def _often(policy: Policy, asked: Planned | None, account: dict[str, Any] | None) -> Iterator[str]:
    if asked is not None:
        yield (
            f"The coordinator plans {asked.name!r} with {_counted(asked.rounds, 'round')}: in each round the server "
            "asks, and the site answers once to each question. A question that is repeated gets the stored answer."
        )
    yield "More runs may follow under this policy, until the budget of all runs is spent. Then nothing is answered."
    if policy.strategies:
        yield f"Only these methods may ask: {', '.join(policy.strategies)}."
    if account is not None:
        runs = {str(row["run"]).partition("/")[0] for row in account["reservations"]}
        sent = sum(1 for answer in account["answers"] if answer["sent"])
        yield f"So far: {_counted(len(runs), 'run')}, {_counted(sent, 'answer')} sent."


def _bounds(place: Place, asked: Planned | None, account: dict[str, Any] | None) -> Iterator[str]:
    policy = place.site.policy
    one, whole = policy.per_run or policy.lifetime, policy.lifetime
    rows = []
    if asked is not None and asked.guarantee == "dp" and asked.epsilon is not None and asked.delta is not None:
        rows.append(("the plan asks, for each of its arms", asked.epsilon, asked.delta, "the invitation"))
    origin = "policy.per_run" if policy.per_run else "policy.lifetime, as no policy.per_run is set"
    rows.append(("one run with all its arms and seeds, at most", one.epsilon, one.delta, origin))
    rows.append(("all runs together, for ever, at most", whole.epsilon, whole.delta, "policy.lifetime"))
    yield "| | epsilon | delta | from |"
    yield "|---|---|---|---|"
    yield from (f"| {what} | {epsilon:g} | {delta:g} | {origin} |" for what, epsilon, delta, origin in rows)
    if account is not None:
        spent = "no bound" if account["epsilon"] is None else f"{up(account['epsilon'], 3):.3f}"
        yield f"| spent so far, as if all had been planned at first | {spent} | {account['delta']:g} | the account |"
        if account["filter"] is not None:
            stands = f"{up(account['filter']['epsilon'], 3):.3f}"
            yield f"| spent so far, as it is held to the budget | {stands} | {account['delta']:g} | the account |"
    unit = "one row" if place.site.data.person is None else "one person, with all rows of theirs"
    yield (
        f"\nEpsilon bounds what all outputs that have a bound say together about {unit}: whether these data are in or "
        "an empty place is in theirs, any output is about as likely, up to a factor exp(epsilon) and but for delta. In "
        "plain words: somebody tries to tell from the outputs who is in the data, and is wrong about 1 in 100 of those "
        "who are "
        f"not. They find at most {_percent(one)} of those who are after one run, and {_percent(whole)} after all. "
        "Without outputs they would find 1 in 100."
    )
    if policy.without_guarantee:
        yield "**None of these figures holds once something has left without a bound, which the policy allows.**"
    if policy.per_run:
        yield "The coordinator says what a run is. Against one that lies, only the budget of all runs holds."


def _assumptions(place: Place, asked: Planned | None) -> Iterator[str]:
    data, policy = place.site.data, place.site.policy
    if data.person is None:
        yield "the rows are declared independent: a person with several rows is protected less"
    else:
        yield f"the column {data.person!r} tells whose row it is; all rows of a person are one unit"
    yield (
        f"{data.records} is a declared number of {_units(place)}, and public. With fewer than "
        f"{policy.minimum_records} the site takes part in nothing"
    )
    yield "the label list, the base models and the scenario's settings are public, and were not made from these data"
    yield "the noise comes from the randomness of this machine's operating system, and nobody reads its memory"
    yield "this site runs its installed package, and no code of the server's"
    yield "the account (state folder) is never deleted, and never put back from an old copy"
    terms = policy.secure_sum
    if terms is not None and terms.accept:
        yield (
            f"for secure sums: at least {terms.clients} sites in a sum, and no more of them in league with the "
            f"server than the scenario allows for (at least {terms.colluders}). The account is charged what the sum "
            "costs, which rests on the other sites' noise"
        )
    if asked is None:
        yield "the coordinator's invitation is not in this folder, so that its plan is not on this page"


def _open(place: Place, asked: Planned | None) -> Iterator[str]:
    policy = place.site.policy
    yield "what is true of the data as a whole: a common disease can be read from the outputs, and is meant to be"
    yield "a person whose data is replaced by another's: that figure is larger, and stands in the report of each run"
    yield "settings that were tuned on private text; and what the base models had read before"
    if "metrics" in policy.outputs:
        yield "figures on test rows (policy.outputs has metrics)"
    if policy.without_guarantee:
        yield "all that leaves without a bound (policy.without_guarantee); these data have none from then on"
    elif asked is not None and asked.guarantee == "none":
        yield "an arm of the plan has no guarantee: this site refuses it"
    if policy.approve_text and "text" in policy.outputs:
        yield "a person's decision to refuse a text, if it is made by comparison with private text"
    yield "whoever has access to this machine: the task models here learnt private text without noise"


def _units(place: Place) -> str:
    return "rows" if place.site.data.person is None else "persons"


def _percent(budget: Budget) -> str:
    share = rate_of(budget.epsilon, budget.delta)
    return "all" if share > 0.999 else f"{up(100 * share, 1):.1f} %"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
