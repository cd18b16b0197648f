"""A federation of real processes on this machine: one SuperLink, several SuperNodes, TLS, registered keys."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from proxy import behind_a_dead_proxy

from fedsynth.deployment.policy import load_site
from fedsynth.deployment.site.rows import import_rows
from fedsynth.privacy.noise import simulated_key

NAMES = ("charite", "st-marys", "ukb")
HERE = Path(__file__).parent
START_SITE = """
import sys
from pathlib import Path
from fedsynth.deployment.policy import load_site
from fedsynth.privacy.noise import simulated_key
from fedsynth.deployment.site.rows import import_rows
from fedsynth.deployment.site.start import start
place, index = load_site(Path(sys.argv[1])), int(sys.argv[2])
place.state.mkdir(mode=0o700, exist_ok=True)
place.open_ledger(create=True, keys=lambda counter, binding: simulated_key(0, index, counter, binding))
list(import_rows(place))
start(place, client=sys.argv[3:])
"""


def fedsynth(*arguments: object, cwd: Path, seconds: float = 120, code: int = 0) -> subprocess.CompletedProcess[str]:
    """One command, run to its end."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fedsynth.cli.main", *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def environment() -> dict[str, str]:
    """This process's, one thread, and proxies that answer to nobody: all of it is on this machine."""
    return {**behind_a_dead_proxy(os.environ), "OMP_NUM_THREADS": "1"}


@dataclass
class Running:
    """A program in the foreground of its own session, with its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))

    def wait_for(self, words: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while words not in self.said():
            assert self.process.poll() is None, f"ended without saying {words!r}:\n{self.said()[-3000:]}"
            assert time.monotonic() < end, f"did not say {words!r}:\n{self.said()[-3000:]}"
            time.sleep(0.1)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, sign: signal.Signals = signal.SIGTERM, seconds: float = 20) -> None:
        """Sends a signal and waits until the program and all that it started are gone."""
        try:
            below = self.descendants()
        except psutil.NoSuchProcess:
            below = []
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(sign)
        self.process.wait(seconds)
        _, alive = psutil.wait_procs(below, timeout=seconds)
        left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not left, [p.cmdline() for p in left]


def spawn(command: Sequence[object], cwd: Path, log: Path, **more: Any) -> Running:
    with log.open("ab") as out:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=cwd,
            env={**environment(), **more},
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Running(process, log)


@dataclass
class Federation:
    """Folders of a coordinator and of sites, and what runs in them."""

    folder: Path
    port: int
    names: Sequence[str] = NAMES
    server: Running | None = None
    sites: dict[str, Running] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        return self.folder / "coordinator"

    def place(self, name: str) -> Path:
        return self.folder / name

    def new_accounts(self, what: str) -> None:
        """An empty account for every site: site.toml is read for each request. Their keys are a simulation's."""
        for index, name in enumerate(sorted(self.names)):
            file = self.place(name) / "site.toml"
            file.write_text(re.sub(r'(?m)^id = "[^"]*"', f'id = "{name}-{what}"', file.read_text()))
            load_site(file).state.mkdir(mode=0o700, exist_ok=True)
            load_site(file).open_ledger(create=True, keys=partial(simulated_key, 0, index))
            list(import_rows(load_site(file)))

    def start_server(self) -> Running:
        self.server = spawn(
            [sys.executable, "-P", "-m", "fedsynth.cli.main", "server", "start", self.coordinator],
            self.folder,
            self.folder / "server.log",
        )
        self.server.wait_for("the SuperLink listens")
        return self.server

    def start_site(self, name: str, *, injected: bool = False, wait: bool = True, **more: str) -> Running:
        command: list[object] = [sys.executable, "-P", "-m", "fedsynth.cli.main", "site", "start", self.place(name)]
        if not injected:
            list(import_rows(load_site(self.place(name))))  # as `fedsynth site check` does
        else:
            command = [
                sys.executable,
                "-P",
                "-c",
                START_SITE,
                self.place(name),
                sorted(self.names).index(name),
                HERE / "injected_client.py",
            ]
        self.sites[name] = spawn(command, self.folder, self.folder / f"{name}.log", **more)
        if wait:
            self.sites[name].wait_for("SuperNode ID")
            self.sites[name].wait_for("warm")
        return self.sites[name]

    def run(
        self, scenario: str | Path, out: str, *arguments: object, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        return fedsynth(
            "run",
            scenario,
            "--server",
            self.coordinator,
            "--out",
            self.folder / out,
            *arguments,
            cwd=self.folder,
            seconds=280,
            code=code,
        )

    def audit_log(self, name: str) -> list[dict[str, Any]]:
        lines = (self.place(name) / "state" / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        for site in self.sites.values():
            with contextlib.suppress(Exception):
                site.end()
        if self.server is not None:
            with contextlib.suppress(Exception):
                self.server.end()


@contextlib.contextmanager
def federation(
    folder: Path, scenario: str | Path, data: dict[str, pd.DataFrame], *, port: int, policy: str = "", **toml: str
) -> Iterator[Federation]:
    """A coordinator and sites that are registered; the SuperLink runs, no site does.

    Args:
        folder: For all of it.
        scenario: The coordinator's.
        data: Notes by site.
        port: Of the SuperLink.
        policy: Lines of [policy] in place of those that ask for a person and for many records.
        toml: More replacements in site.toml, old text -> new.
    """
    made = Federation(folder, port, tuple(data))
    fedsynth(
        "server", "init", made.coordinator, "--port", port, "--scenario", scenario, "--test-certificates", cwd=folder
    )
    try:
        made.start_server()
        for name, notes in data.items():
            place = made.place(name)
            fedsynth(
                "site", "init", place, "--name", name, "--invitation", made.coordinator / "invitation.toml", cwd=folder
            )
            notes.to_csv(place / "notes.csv", index=False)
            fill_in(place, records=len(notes), policy=policy, **toml)
            fedsynth("server", "invite", made.coordinator, place / f"{name}.pub", cwd=folder)
        yield made
    finally:
        made.end()


def fill_in(place: Path, *, records: int, policy: str = "", **toml: str) -> None:
    """What an operator does with site.toml."""
    text = (place / "site.toml").read_text()
    todo = 'person = "patient"        # TODO column that says whose row it is; or: independent_rows = true'
    changes = {
        todo: "independent_rows = true",
        "records = 0": f"records = {records}",
        "minimum_records = 100": "minimum_records = 1",
        "approve_text = true": policy or "approve_text = false",
        'outputs = ["text", "scores"]  ': 'outputs = ["text", "adapter", "scores"]  ',
        **toml,
    }
    for old, new in changes.items():
        assert old in text, f"site.toml has no {old!r}:\n{text}"
        text = text.replace(old, new)
    (place / "site.toml").write_text(text)
