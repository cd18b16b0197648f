"""The command `fedsynth server`: of a coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedsynth.typed import BadValue

server_app = typer.Typer(no_args_is_help=True, help="A coordinator's SuperLink for real sites: docs/deployment.")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")]


# ---- fedsynth server ----


@server_app.command("init")
def server_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder: new or empty.")],
    host: Annotated[str, typer.Option(help="Where the SuperLink listens; 0.0.0.0: on every address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.")] = 9443,
    public_address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="What sites connect to; host and port by default.")
    ] = "",
    scenario: Annotated[
        str, typer.Option(help="What is planned: a TOML file, or a shipped one by name.")
    ] = "hospitals",
    test_certificates: Annotated[
        bool, typer.Option("--test-certificates", help="Make a CA and a certificate, for tests.")
    ] = False,
    certificate: Annotated[Path | None, typer.Option(help="The server's certificate, PEM.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key, PEM without a password.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The CA that vouches for it, PEM.")] = None,
    public_ca: Annotated[
        Path | None, typer.Option(help="The CA that sites trust, where a proxy ends TLS before the SuperLink.")
    ] = None,
) -> None:
    """Write a coordinator's folder: server.toml, scenario.toml, certificates, and the invitation for sites."""
    from fedsynth.invitation import planned
    from fedsynth.scenario_toml import load
    from fedsynth.server import Files, init

    files = None
    if certificate is not None and key is not None and ca is not None and not test_certificates:
        files = Files(certificate, key, ca)
    elif not test_certificates or certificate or key or ca:
        raise BadValue("name the server's certificate with --certificate, --key and --ca, or have one made for tests: "
                       "--test-certificates")  # fmt: skip
    asked = load(scenario)
    if not all(name.startswith("assets:") or Path(name).is_absolute() for name in planned(asked).models):
        from fedsynth.submit import pinned  # sites allow models by name, that of the hub with its commit

        asked = pinned(asked)
    warnings = init(folder, asked, host=host, port=port, public=public_address, files=files, public_ca=public_ca)
    for warning in warnings:
        _say(f"warning: {warning}")
    _say(f"{folder}: start it with `fedsynth server start {folder}`; send {folder / 'invitation.toml'} to the sites")


@server_app.command("start")
def server_start(folder: Folder) -> None:
    """Run the SuperLink until Ctrl-C: TLS, registered sites alone. Its log is also DIR/superlink.log."""
    from fedsynth.superlink import start

    start(folder, _say)


@server_app.command("invite")
def server_invite(
    folder: Folder,
    public_key: Annotated[Path | None, typer.Argument(metavar="[KEY]", help="A site's public key, NAME.pub.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the site; the file's name by default.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Instead, show the sites, and who is online.")] = False,
    remove: Annotated[str | None, typer.Option(metavar="NAME", help="Instead, shut a site out.")] = None,
) -> None:
    """Let a site in: register its public key with the running SuperLink."""
    from fedsynth import invited

    if [public_key is not None, listed, remove is not None].count(True) != 1 or (name and public_key is None):
        raise BadValue("name a site's public key (and --name NAME), or say --list, or --remove NAME")
    if listed:
        states, others = invited.states(folder)
        table = Table("site", "client", "state", "let in (UTC)", "key")
        for number, site in enumerate(invited.sites(folder)):
            table.add_row(site.name, str(number), states[site.name], site.since, site.fingerprint)
        Console(width=None if Console().is_terminal else 140).print(table)
        for node in others:
            _say(f"warning: node {node} is registered, and not in {folder / invited.SITES}: whoever reaches the "
                 "SuperLink's control API can register keys; no run asks it")  # fmt: skip
    elif remove is not None:
        gone = invited.remove(folder, remove)
        _say(f"{gone.name} is shut out; its key {gone.fingerprint} cannot be registered again")
    else:
        assert public_key is not None
        made = invited.invite(folder, public_key, name)
        _say(f"{made.name} is let in, with the key {made.fingerprint}: compare it with what the site says")


def _say(line: str) -> None:
    """To people: standard output is for what is asked for."""
    Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)
