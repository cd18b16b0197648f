"""The recipes of docs/deployment: files parse, open no door, and what people are told to type works."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pandas as pd
import pytest
import typer
import yaml

from fedsynth.cli.main import app

PAGES = Path(__file__).parent.parent / "docs" / "deployment"
RECIPES = PAGES / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*") if path.is_file())
OPEN_DOORS = re.compile(
    r"(?P<plain>--insecure\b|http://(?!127\.0\.0\.1|localhost))|trust_remote_code|--allow-runtime-dependency-installation"
    r"|proxy_ssl_verify\s+off|verify\s*=\s*False|privileged:\s*true|BEGIN [A-Z ]*PRIVATE KEY"
    r"|(?i:passw(or)?d|secret|\btoken)\s*[:=]\s*[\"']?[\w$/+.-]{4,}[\"']?\s*$"
    r"|://[^\s:/@]+:(?!PASSWORD@)[^\s@]+@"
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def needs(program: str) -> str:
    found = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if found is None:
        pytest.skip(f"{program} is not here")
    return found


# ---- what is shipped ----


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_recipe_opens_no_door(path: Path) -> None:
    found = [line for line in path.read_text().splitlines() if OPEN_DOORS.search(line.partition("#")[0])]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "ExecStart=flower-superlink --insecure",
        "  POSTGRES_PASSWORD: hunter22",
        "proxy_ssl_verify off;",
        "NOTES_DB=postgresql://reader:hunter22@db/clinic",
        "proxy_pass http://superlink:9443;",
    ],
)
def test_open_doors_would_be_found(line: str) -> None:
    assert OPEN_DOORS.search(line)


def manifests() -> list[dict[str, Any]]:
    files = [path for path in FILES if path.suffix == ".yaml" and path.name != "compose.yaml"]
    return [each for path in files for each in yaml.safe_load_all(path.read_text()) if each]


def pods() -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for each in manifests() if "template" in each.get("spec", {})]


def test_manifests_are_whole() -> None:
    assert {each["kind"] for each in manifests()} >= {"StatefulSet", "Service", "NetworkPolicy"}
    assert all(each["apiVersion"] and each["metadata"]["name"] for each in manifests())


def test_no_container_has_more_rights_than_it_needs() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"] + pod.get("initContainers", []):
            held = container["securityContext"]
            assert held["allowPrivilegeEscalation"] is False
            assert held["readOnlyRootFilesystem"] is True
            assert held["capabilities"] == {"drop": ["ALL"]}
    for service in yaml.safe_load((RECIPES / "compose.yaml").read_text())["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_containers_run_commands_that_exist() -> None:
    for pod in pods():
        for container in pod["containers"] + pod.get("initContainers", []):
            if container["image"] != "fedsynth":
                continue
            if "command" not in container:
                assert understood(["fedsynth", *container["args"]])
            for script in container.get("args", []) if "command" in container else []:
                said = re.findall(r"fedsynth .*", script.replace("\\\n", " "))
                assert all(understood(shlex.split(line)) for line in said)
    for service in yaml.safe_load((RECIPES / "compose.yaml").read_text())["services"].values():
        assert understood(["fedsynth", *service["command"]])


def test_the_image_runs_without_root_and_takes_torch_first() -> None:
    lines = (RECIPES / "Dockerfile").read_text().splitlines()
    said = [line.split()[0] for line in lines if re.match(r"[A-Z]+ ", line)]
    assert said[0] == "FROM"
    assert set(said) <= {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "ENTRYPOINT"}
    [user] = [line for line in lines if line.startswith("USER ")]
    assert user.split()[1].split(":")[0].isdigit()
    assert user.split()[1] != "0"
    pinned = re.search(r"torch==\S+", (PAGES.parent.parent / "Makefile").read_text())
    assert pinned is not None
    assert pinned[0] in " ".join(lines).partition("constraints.txt")[0]


# ---- where the programs are that read these files ----


def test_units_are_accepted_by_systemd(tmp_path: Path) -> None:
    verify = needs("systemd-analyze")
    for unit in RECIPES.glob("*.service"):
        text = re.sub(r"^(User|Group)=.*$", "", unit.read_text(), flags=re.MULTILINE)  # the user is made by hand
        name = unit.name.replace("@", "@north")
        (tmp_path / name).write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
        done = subprocess.run(
            [verify, "verify", "--man=no", tmp_path / name], capture_output=True, text=True, check=False
        )
        mine = [line for line in (done.stdout + done.stderr).splitlines() if name in line]
        assert (done.returncode, mine) == (0, [])


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    nginx = needs("nginx")
    from fedsynth.deployment.certificates import write_certificates

    write_certificates(tmp_path, ["superlink.example.org"])
    text = re.sub(
        r"/etc/fedsynth/\S+?(\.\w+);",
        lambda found: {".crt": f"{tmp_path}/server.crt;", ".key": f"{tmp_path}/server.key;"}[found[1]],
        (RECIPES / "nginx.conf").read_text(),
    )
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{ access_log off; {text} }}\n"
    )
    done = subprocess.run(
        [nginx, "-t", "-p", tmp_path, "-c", tmp_path / "nginx.conf"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_compose_accepts_its_file(tmp_path: Path) -> None:
    asked = [needs("docker"), "compose"]
    if subprocess.run([*asked, "version"], capture_output=True, check=False).returncode:
        asked = [needs("docker-compose")]
    done = subprocess.run(
        [*asked, "-f", RECIPES / "compose.yaml", "config", "--quiet"],
        capture_output=True,
        text=True,
        env={**os.environ, "FEDSYNTH_USER": "1000:1000"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---- what people are told to type ----


def told() -> list[Any]:
    """Every `fedsynth ...` of a page: in blocks, and in the text where it has more than the command's name."""
    found = []
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text()
        lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`(fedsynth [^`\n]+)`", text)
        commands = (re.search(r"(?:^|[\s/])(fedsynth [a-z][^|&>#;]*)", line.partition("  #")[0]) for line in lines)
        found += [pytest.param(each[1], id=f"{page.stem}: {each[1].strip()[:60]}") for each in commands if each]
    return found


def understood(words: list[str]) -> bool:
    """Whether the command line is one, with these options; raises click's own error if not."""
    command: Any = typer.main.get_command(app)
    context = click.Context(command, info_name="fedsynth")
    rest = words[1:]
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        if not rest:
            return True
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, found.context_class(found, info_name=name, parent=context)
    options = {name for each in command.params for name in each.opts}
    named = [word.partition("=")[0] for word in rest if word.startswith("-")]
    assert set(named) <= options | {"--help"}, f"{words}: no {set(named) - options}"
    return True


@pytest.mark.parametrize("line", told())
def test_commands_of_the_pages_exist(line: str) -> None:
    assert understood([word for word in shlex.split(re.sub(r"\s[|,.)].*", "", line)) if word != "..."])


def test_a_command_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(Exception, match="opne"):
        understood(["fedsynth", "site", "opne", "x"])
    with pytest.raises(AssertionError, match="--plain"):
        understood(["fedsynth", "server", "start", "x", "--plain"])


class Terminal:
    """A shell that is told one block after the other; `within` is a command that starts it elsewhere."""

    def __init__(self, folder: Path, log: Path, within: Sequence[str] = ()) -> None:
        self.log, self.done = log, 0
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "fedsynth").write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m fedsynth.cli.main "$@"\n'
        )
        (programs / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.shell = subprocess.Popen(
            [*within, "bash", "-m"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=log.open("ab"),
            env=env,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def type(self, block: str) -> None:
        assert self.shell.stdin is not None
        self.done += 1
        self.shell.stdin.write(f"{block}\necho done-{self.done} $?\n")
        self.shell.stdin.flush()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 280, words: str = "") -> None:
        end = time.monotonic() + seconds
        while (words or f"done-{self.done} ") not in self.said():
            assert time.monotonic() < end, self.said()[-3000:]
            time.sleep(0.3)


@contextlib.contextmanager
def terminals(folder: Path) -> Iterator[dict[str, Terminal]]:
    made = {name: Terminal(folder, folder / f"terminal-{name}.log") for name in ("1", "2")}
    try:
        yield made
    finally:
        for terminal in made.values():
            terminal.type("kill $(jobs -p); wait; exit")
        for terminal in made.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                terminal.shell.wait(30)
            terminal.shell.kill()


def order_at(site: str, folder: Path) -> str:
    held = subprocess.run(
        [folder / "bin" / "fedsynth", "site", "approve", site, "--json"],
        cwd=folder,
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    return str(json.loads(held)[0]["order"][:6])


@pytest.mark.deployment
@pytest.mark.full
@pytest.mark.timeout(1500)
def test_two_terminals_word_by_word(tmp_path: Path) -> None:
    page = PAGES / "two-terminals.md"
    [script], [scenario] = blocks(page, "python"), blocks(page, "toml")
    (tmp_path / "notes.py").write_text(script)
    (tmp_path / "departments.toml").write_text(scenario)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sections = re.findall(r"^## Terminal (\d): (.*?)\n(.*?)(?=^## )", page.read_text(), re.DOTALL | re.MULTILINE)
    typed = [
        (number, block)
        for number, _, text in sections
        for block in re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]
    with terminals(tmp_path) as terminal:
        terminal["2"].type("python notes.py")
        terminal["2"].wait()
        for number, block in typed:
            mine = terminal[number]
            for line in block.splitlines():
                if "ORDER" in line:
                    line = line.replace("ORDER", order_at(line.split()[3], tmp_path))
                if "server init" in line:
                    line += f" --port {port}"
                if "--resume" in line:  # Ctrl-C, and on
                    runs = [p for p in _children(mine.shell.pid) if "--out" in p.cmdline()]
                    for run in runs:
                        run.send_signal(signal.SIGINT)
                    mine.wait()
                if line == "fedsynth site model north":
                    terminal["1"].wait()  # the run, which goes on by itself
                mine.type(line)
                if "start coordinator" in line:
                    mine.wait()
                    _wait_for(tmp_path / "coordinator.log", "the SuperLink listens")
                elif "fedsynth run" in line and "second" not in line:
                    for site in ("north", "south"):
                        mine.wait(words=f"site '{site}': its reply waits for approval there")
                    if "--resume" not in line:
                        (tmp_path / "terminal-1.first").write_text(mine.said())
                        mine.log.write_text("")
                else:
                    mine.wait()
        one, two = ((tmp_path / "terminal-1.first").read_text() + terminal["1"].said(), terminal["2"].said())
    assert "budget_exhausted" in one
    assert "epsilon 7.988" in two
    assert re.search(r"accuracy.*macro_f1.*test rows", two)
    assert set(pd.read_json(tmp_path / "north" / "answers.jsonl", lines=True)["answer"]) <= set(
        tomllib.loads(scenario)["data"]["labels"]
    )
    assert "consistent" in two
    assert not re.search("^problem ", two, re.MULTILINE)
    assert json.loads((tmp_path / "runs" / "first" / "status.json").read_text())["status"] == "completed"


def _wait_for(log: Path, words: str) -> None:
    for _ in range(600):
        if words in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def _children(pid: int) -> list[Any]:
    import psutil

    return list(psutil.Process(pid).children(recursive=True))
