"""The commands `fedsynth server`, of a coordinator, and `fedsynth site`, of a hospital or bank."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fedsynth.system.terminal import console_of, show
from fedsynth.typed import BadValue, visible

FAILED = 1
server_app = typer.Typer(no_args_is_help=True, help="A coordinator's SuperLink for real sites: docs/deployment.")
site_app = typer.Typer(no_args_is_help=True, help="Take part as a site: a hospital, a bank.")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")]
Site = Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder, with site.toml.")]


# ---- fedsynth server ----


@server_app.command("init")
def server_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder: new or empty.")],
    host: Annotated[str, typer.Option(help="The SuperLink's address; 0.0.0.0 for all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.")] = 9443,
    public_address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The address that sites connect to; host and port by default.")
    ] = "",
    scenario: Annotated[
        str, typer.Option(help="The planned scenario: a TOML file, or a shipped one by name.")
    ] = "hospitals",
    test_certificates: Annotated[
        bool, typer.Option("--test-certificates", help="Make a CA and a certificate, for tests.")
    ] = False,
    certificate: Annotated[Path | None, typer.Option(help="The server's certificate, PEM.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key, PEM without a password.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The CA that vouches for it, PEM.")] = None,
    public_ca: Annotated[
        Path | None, typer.Option(help="The CA that sites trust, if a proxy ends TLS before the SuperLink.")
    ] = None,
) -> None:
    """Write a coordinator's folder: server.toml, scenario.toml, certificates, and the invitation for sites."""
    from fedsynth.deployment.invitation import planned
    from fedsynth.deployment.server import Files, init
    from fedsynth.scenario.toml import load

    files = None
    if certificate is not None and key is not None and ca is not None and not test_certificates:
        files = Files(certificate, key, ca)
    elif not test_certificates or certificate or key or ca:
        raise BadValue(
            "name the server's certificate with --certificate, --key and --ca, or have one made for tests: "
            "--test-certificates"
        )
    asked = load(scenario)
    if not all(name.startswith("assets:") or Path(name).is_absolute() for name in planned(asked).models):
        from fedsynth.deployment.submit import pinned  # sites allow models by name, that of the hub with its commit

        asked = pinned(asked)
    warnings = init(folder, asked, host=host, port=port, public=public_address, files=files, public_ca=public_ca)
    for warning in warnings:
        _say(f"warning: {warning}")
    _say(f"{folder}: start it with `fedsynth server start {folder}`; send {folder / 'invitation.toml'} to the sites")


@server_app.command("start")
def server_start(folder: Folder) -> None:
    """Run the SuperLink until Ctrl-C: TLS, registered sites only. Its log is also DIR/superlink.log."""
    from fedsynth.deployment.superlink import start

    start(folder, _say)


@server_app.command("invite")
def server_invite(
    folder: Folder,
    public_key: Annotated[Path | None, typer.Argument(metavar="[KEY]", help="A site's public key, NAME.pub.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the site; the file's by default.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Instead, show the sites and their states.")] = False,
    remove: Annotated[str | None, typer.Option(metavar="NAME", help="Instead, remove a site.")] = None,
) -> None:
    """Register a site's public key with the running SuperLink."""
    from fedsynth.deployment import registry as invited

    if [public_key is not None, listed, remove is not None].count(True) != 1 or (name and public_key is None):
        raise BadValue("name a site's public key (and --name NAME), or say --list, or --remove NAME")
    if listed:
        states, others = invited.states(folder)
        table = Table("site", "client", "state", "let in (UTC)", "key")
        for number, site in enumerate(invited.sites(folder)):
            table.add_row(site.name, str(number), states[site.name], site.since, site.fingerprint)
        show(console_of(error=False), table)
        for node in others:
            _say(
                f"warning: node {node} is registered, and not in {folder / invited.SITES}: whoever reaches the "
                "SuperLink's control API can register keys; no run asks it"
            )
    elif remove is not None:
        gone = invited.remove(folder, remove)
        _say(f"{gone.name} is shut out; its key {gone.fingerprint} cannot be registered again")
    else:
        assert public_key is not None
        made = invited.invite(folder, public_key, name)
        _say(f"{made.name} is let in, with the key {made.fingerprint}: compare it with what the site says")


def _say(line: str) -> None:
    """Prints for people, on standard error: standard output is for results."""
    console_of(error=True).print(line, markup=False, soft_wrap=True)


# ---- fedsynth site ----


@site_app.command("init")
def site_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder: new.")],
    name: Annotated[str, typer.Option(help="The site's name, as the coordinator will register it.")] = "",
    invitation: Annotated[Path | None, typer.Option(help="The coordinator's invitation.toml.")] = None,
    renewed: Annotated[bool, typer.Option("--new-key", help="Instead, make a new key for an existing site.")] = False,
) -> None:
    """Make a site's folder: site.toml for you to edit, a key, the CA's certificate."""
    from fedsynth.deployment.site.init import init, new_key

    if renewed:
        public = new_key(folder)
    elif not name or invitation is None:
        raise BadValue("a site needs a --name and the coordinator's --invitation; or, if it is there, --new-key")
    else:
        public = init(folder, name=name, invitation=invitation)
        print(f"made {folder / 'site.toml'}: read it and fill it in")
    print(f"send {public} to the coordinator, and tell its fingerprint another way: ssh-keygen -lf {public}")
    print(f"then: fedsynth site check {folder}, fedsynth site start {folder}")


@site_app.command("check")
def site_check(
    folder: Site,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per finding.")] = False,
    statement: Annotated[
        bool, typer.Option("--statement", help="Instead, print one page for a data officer; no row is read.")
    ] = False,
) -> None:
    """Import the rows; check models, budget, key, certificate, clock and reachability; exit with 1 on a problem."""
    from fedsynth.deployment.policy import load_site

    if statement:
        if as_json:
            raise BadValue("--statement prints a page, and --json findings: say one of them")
        from fedsynth.deployment.site.statement import statement as page

        console_of(error=False).print(page(load_site(folder)), end="", markup=False, soft_wrap=True)
        return
    from fedsynth.deployment.site.check import check

    console, worst = console_of(error=False), False
    try:
        place = load_site(folder)
    except BadValue as problem:
        raise BadValue(f"{problem}{_still_to_do(folder)}") from problem
    for finding in check(place):
        worst |= finding.state == "problem"
        if as_json:
            print(json.dumps(asdict(finding)))
        else:
            colour = {"ok": "green", "warning": "yellow", "problem": "red"}[finding.state]
            console.print(f"[{colour}]{finding.state:8}[/] {finding.what}: ", end="")
            console.print(finding.says, markup=False, soft_wrap=True)
    if worst:
        raise typer.Exit(FAILED)


def _still_to_do(folder: Path) -> str:
    """The lines of site.toml that are marked TODO, all at once: a reader stops at the first fault."""
    file = folder / "site.toml" if folder.is_dir() else folder
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    marked = [(number, line.split("=")[0].strip()) for number, line in enumerate(lines, 1) if "# TODO" in line]
    told = ", ".join(f"{number} ({key})" for number, key in marked)
    return f"; lines marked TODO: {told}; take the mark out of those that are done" if marked else ""


@site_app.command("start")
def site_start(
    folder: Site, port: Annotated[int, typer.Option(help="Port of the SuperNode's own API here; any free one.")] = 0
) -> None:
    """Run the site's SuperNode until it is stopped: Ctrl-C, SIGTERM."""
    from fedsynth.deployment.policy import load_site
    from fedsynth.deployment.site.start import start

    start(load_site(folder), port=port)


@site_app.command("approve")
def site_approve(
    folder: Site,
    show: Annotated[str, typer.Option(help="Print the text of this request; the beginning of its id is enough.")] = "",
    accept: Annotated[str, typer.Option(help="Let the text of this request go to the server.")] = "",
    refuse: Annotated[str, typer.Option(help="Keep the text of this request here; its charge stays.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List synthetic text that waits for a person; show it, let it go, or keep it."""
    from fedsynth.deployment.policy import load_site
    from fedsynth.deployment.site.approve import decide, held_text
    from fedsynth.identifiers import KINDS, NAMES, kinds_in

    if sum(map(bool, (show, accept, refuse))) > 1:
        raise BadValue("one of --show, --accept and --refuse at a time")
    place = load_site(folder)
    if show:
        corpus = held_text(place, show)
        for prompt, answer in zip(corpus.prompts, corpus.answers, strict=True):
            found = kinds_in(f"{prompt}\n{answer}")
            has = [kind for kind in KINDS if kind in found]
            line = f"[{visible(answer)}] {visible(prompt)}" + (
                f"  <- {', '.join(NAMES[k] for k in has)}" if has else ""
            )
            print(_shown_json({"text": prompt, "answer": answer, "identifiers": has}) if as_json else line)
        return
    if accept or refuse:
        held = decide(place, accept or refuse, "accepted" if accept else "declined")
        print(json.dumps(held) if as_json else f"{held['order'][:12]}: {held['decision']} by {held['by']}")
        return
    _list(place.approvals.all(), as_json=as_json)


@site_app.command("declare-loss")
def site_declare_loss(
    folder: Site,
    confirm: Annotated[bool, typer.Option("--confirm", help="Count them as spent: this cannot be undone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show charges of the audit log that the ledger (an older copy, or lost) lacks; --confirm counts them as spent."""
    from fedsynth.deployment.policy import load_site
    from fedsynth.deployment.site.declare_loss import declare, lost

    place = load_site(folder)
    ledger, charges = lost(place)
    unknown = sum(bool(charge.grant) and charge.plan is None for charge in charges)
    gone = ledger is None
    if confirm and (charges or gone):
        ledger = declare(place, ledger, charges)
    epsilon, delta = (0.0, place.site.policy.lifetime.delta) if ledger is None else ledger.spent()
    stands = 0.0 if ledger is None else ledger.filtered()
    if as_json:
        figures = {"epsilon": _finite(epsilon), "epsilon_filter": _finite(stands), "delta": delta}
        told = {"missing": [asdict(charge) for charge in charges], "gone": gone, "declared": confirm}
        print(json.dumps({**told, **figures}))
        return
    for charge in charges:
        what = f"grant {charge.grant}" if charge.grant else f"release without guarantee ({charge.reason or 'of old'})"
        cost = (
            "the whole cap"
            if charge.plan is None
            else f"{charge.plan.steps} steps, sigma {charge.plan.noise_multiplier:g}"
        )
        print(f"{charge.at}  {visible(charge.run) or 'run not known'}  {visible(what)}: {cost}")
    if gone:
        _say(
            f"{place.ledger} is gone: "
            + (
                "a new account holds what the trail knows; `fedsynth site check` imports the rows under its key"
                if confirm
                else "with --confirm a new one is made, which holds what the trail knows"
            )
        )
    elif not charges:
        _say(f"{place.ledger}: nothing is missing that the audit trail knows")
        return
    said = f"spent: epsilon {epsilon:.4g} at {delta:g} as if fixed in advance, {stands:.4g} by the filter"
    if unknown:
        said += f"; {unknown} of the grants stand in the trail without a plan, and take the whole cap"
    if confirm:
        _say(f"{len(charges)} declared lost and counted as spent; {said}")
    else:
        _say(f"{len(charges)} missing, nothing changed; {said}. Put the newest ledger in place, or say --confirm")


def _shown_json(value: dict[str, Any]) -> str:
    """JSON for people and programs: letters as they are, and whatever acts on a terminal escaped."""
    return "".join(
        char if char.isprintable() else json.dumps(char)[1:-1] for char in json.dumps(value, ensure_ascii=False)
    )


def _finite(figure: float) -> float | None:
    return None if figure == float("inf") else figure


@site_app.command("model")
def site_model(
    folder: Site,
    run: Annotated[str, typer.Option(help="Models of this run; the beginning of its id is enough.")] = "",
    texts: Annotated[Path | None, typer.Option(metavar="FILE", help="Answer its texts: CSV, JSONL, Parquet.")] = None,
    column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="A new file for the answers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per model.")] = False,
) -> None:
    """Measure the models that runs left here on your test rows, or answer texts with the latest. Nothing leaves."""
    from fedsynth.deployment.policy import load_site
    from fedsynth.deployment.site.model import answer_file, measured, models

    if (texts is None) != (out is None):
        raise BadValue("--texts FILE and --out FILE.jsonl go together")
    place = load_site(folder)
    found, unread = models(place, run)
    for problem in unread:
        _say(f"warning: {problem}; move the file away to hear no more of it")
    if texts is not None and out is not None:
        count, by = answer_file(place, *found[-1], texts, column, out), found[-1][1].run
        if as_json:
            print(json.dumps({"run": by, "out": str(out), "answers": count}))
        else:
            _say(f"{out}: {count} answers of the model that {by} left")
        return
    rows = [measured(place, *each) for each in found]
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return
    names = sorted({name for row in rows for name in row.metrics})
    table = Table("run", "learnt (UTC)", *names, "test rows")
    for row in rows:
        values = [f"{row.metrics[name]:.3f}" if name in row.metrics else "-" for name in names]
        table.add_row(
            escape(row.run), row.learnt[:19].replace("T", " "), *values, str(row.test_rows) if row.test_rows else "-"
        )
    show(console_of(error=False), table)
    for row in rows:
        if row.problem:
            _say(f"{row.run} cannot be used: {row.problem}")
    if place.site.data.test is None:
        _say("site.toml names no test rows (data.test), so there is nothing to measure on")


def _list(held: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(held))
        return
    from fedsynth.identifiers import told

    table = Table("order", "asked (UTC)", "run", "texts", "of these", "decision", "by")
    for each in held:
        asked = each["asked"][:19].replace("T", " ")
        by = escape(each.get("by", ""))
        run = escape(each["run"][:12])
        has = told(each["identifiers"]) if "identifiers" in each else "not searched"  # held by an earlier version
        table.add_row(each["order"][:12], escape(asked), run, str(each["texts"]), has, each["decision"], by)
    show(console_of(error=False), table)
