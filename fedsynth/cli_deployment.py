"""The commands `fedsynth site` and `fedsynth server`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedsynth.typed import BadValue

FAILED = 1
site_app = typer.Typer(no_args_is_help=True, help="Take part as a site: a hospital, a bank.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder, with site.toml.")]


@site_app.command("init")
def site_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder: new.")],
    name: Annotated[str, typer.Option(help="Of the site, as the coordinator will register it.")],
    invitation: Annotated[Path, typer.Option(help="The coordinator's invitation.toml.")],
) -> None:
    """Make a site's folder: site.toml to be edited, a key, the CA's certificate."""
    from fedsynth.site import init

    public = init(folder, name=name, invitation=invitation)
    print(f"made {folder / 'site.toml'}: read it and fill it in")
    print(f"send {public} to the coordinator, and tell its fingerprint another way: ssh-keygen -lf {public}")
    print(f"then: fedsynth site check {folder}, fedsynth site start {folder}")


@site_app.command("check")
def site_check(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per finding.")] = False
) -> None:
    """Check schema, labels, models, budget, key, certificate, clock and reachability; exit with 1 on a problem."""
    from fedsynth.clients.site import load_site
    from fedsynth.site_check import check

    console, worst = Console(highlight=False), False
    for finding in check(load_site(folder)):
        worst |= finding.state == "problem"
        if as_json:
            print(json.dumps(asdict(finding)))
        else:
            colour = {"ok": "green", "warning": "yellow", "problem": "red"}[finding.state]
            console.print(f"[{colour}]{finding.state:8}[/] {finding.what}: ", end="")
            console.print(finding.says, markup=False, soft_wrap=True)
    if worst:
        raise typer.Exit(FAILED)


@site_app.command("start")
def site_start(
    folder: Folder, port: Annotated[int, typer.Option(help="Of the SuperNode's own API here; any free one.")] = 0
) -> None:
    """Run the site's SuperNode until it is stopped: Ctrl-C, SIGTERM."""
    from fedsynth.clients.site import load_site
    from fedsynth.site import start

    raise typer.Exit(start(load_site(folder), port=port))


@site_app.command("approve")
def site_approve(
    folder: Folder,
    show: Annotated[str, typer.Option(help="Print the text of this order, or of the one that starts so.")] = "",
    accept: Annotated[str, typer.Option(help="Let the text of this order go to the server.")] = "",
    refuse: Annotated[str, typer.Option(help="Keep it here; what was charged for it stays charged.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List synthetic text that waits for a person; show it, let it go, or keep it."""
    from fedsynth.clients.site import load_site
    from fedsynth.site import decide, held_text, waiting

    if sum(map(bool, (show, accept, refuse))) > 1:
        raise BadValue("one of --show, --accept and --refuse at a time")
    place = load_site(folder)
    if show:
        corpus = held_text(place, show)
        for prompt, answer in zip(corpus.prompts, corpus.answers, strict=True):
            print(
                json.dumps({"text": prompt, "answer": answer}, ensure_ascii=False)
                if as_json
                else f"[{answer}] {prompt}"
            )
        return
    if accept or refuse:
        held = decide(place, accept or refuse, "accepted" if accept else "declined")
        print(json.dumps(held) if as_json else f"{held['order'][:12]}: {held['decision']} by {held['by']}")
        return
    _list(waiting(place), as_json=as_json)


def _list(held: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(held))
        return
    table = Table()
    for head in ("order", "asked", "run", "texts", "decision", "by"):
        table.add_column(head)
    for each in held:
        table.add_row(
            each["order"][:12], each["asked"], each["run"], str(each["texts"]), each["decision"], each.get("by", "")
        )
    Console().print(table)
