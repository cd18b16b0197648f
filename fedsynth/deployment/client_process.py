"""The replacement of Flower's `flwr-clientapp` at a site: it runs the installed client app, never the server's code.

A SuperNode has a process started for each message. Flower's own would load the server's bundle and run it. This
process takes message, context and the bundle's hash from the SuperNode as usual, and runs the client app of the
installed package with site.toml. Nothing of the bundle is unpacked.

The imports of a client take seconds. So `serve` makes them once and forks a child for each message. A child starts
with these imports, and nothing that it reads or learns outlives it.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

from fedsynth.system.folders import private_folder

STAND_IN = "flwr-clientapp"
SOCKET = "warm.socket"
PROBE = "--probe"  # tests a replaced program before a site relies on it
IMPORTED = (
    "fedsynth.clients.app",
    "fedsynth.deployment.client",
    "flwr.supernode.cli.flwr_clientapp",
    "peft",
    "sqlalchemy",
)
REPLACED = ("install_from_fab", "get_project_dir", "get_load_client_app_fn", "push_message", "push_task_output")

# Runs with the standard library only, in some hundredths of a second: the warm process does the work. A message is
# handed over once: if its process dies, no other can take the same token.
CLIENT = """\
import json, os, socket, sys
if sys.argv[1:] == [{probe!r}]:
    sys.exit(0)
with socket.socket(socket.AF_UNIX) as warm:
    try:
        warm.connect({socket!r})
    except OSError:
        os.execv({python!r}, [{python!r}, "-P", *{client!r}, *sys.argv[1:]])
    try:
        warm.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
        answer = warm.makefile().readline()
    except OSError:
        answer = ""
sys.exit(int(answer or 1))
"""


class UnknownFlower(RuntimeError):
    """Flower's client process differs from the one that this version of fedsynth is written for."""


class CannotStandIn(RuntimeError):
    """The program that replaces Flower's own cannot be run."""


def stand_ins(
    folder: Path,
    warm: Path,
    client: Sequence[str] = ("-m", "fedsynth.deployment.client_process"),
    seconds: float = 600.0,
) -> None:
    """Writes the programs that a SuperExec finds in place of Flower's own: whatever a server asks for, the only program
    that it can start is this one's handler of a message.

    Args:
        folder: Folder of the programs, the only one on the SuperExec's PATH.
        warm: Socket of the warm process.
        client: Python's arguments that run this module if no warm process answers.
        seconds: Longest run of the first program: site.toml's `start_seconds`.

    Raises:
        UnknownFlower: If the code that would run the server's bundle is not where it is to be replaced.
        CannotStandIn: If programs in the folder cannot be run.
    """
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    _check_flower()
    private_folder(folder)
    script = folder / "hand_over.py"
    text = CLIENT.format(probe=PROBE, socket=str(warm), python=sys.executable, client=list(client))
    _program(script, text)
    words = shlex.join([sys.executable, "-PS", str(script)])
    for name in sorted({STAND_IN, *TASK_TYPE_TO_COMMAND.values()}):
        _program(folder / name, f'#!/bin/sh\nexec {words} "$@"\n')
    try:
        subprocess.run([folder / STAND_IN, PROBE], check=True, timeout=seconds, capture_output=True)
    except subprocess.TimeoutExpired as problem:
        raise CannotStandIn(
            f"{folder / STAND_IN} did not run within {seconds:g} s (start_seconds of site.toml): wait "
            "until this machine is less busy, or raise that key"
        ) from problem
    except (OSError, subprocess.SubprocessError) as problem:
        why = f"programs in {folder} cannot be run ({problem}): is it mounted noexec?"
        raise CannotStandIn(f"{why} Name another `state` folder in site.toml") from problem


def _program(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.chmod(0o700)
    part.replace(path)


def _check_flower() -> Any:
    """The module of Flower's client process, checked: it looks up the replaced functions by name at each call."""
    runtime = import_module("flwr.supernode.runtime.run_clientapp")
    found = _names(runtime.run_clientapp.__code__) & set(vars(runtime))
    if missing := [name for name in REPLACED if name not in found]:
        why = f"flwr.supernode.runtime.run_clientapp does not use {missing[0]}"
        raise UnknownFlower(f"{why}: install flwr in the range that `fedsynth version` is made for (pyproject.toml)")
    return runtime


def _names(code: CodeType) -> set[str]:
    """The global names that a function and its inner functions use."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def main(arguments: Sequence[str], opener: Callable[..., Any] | None = None) -> None:
    """Handles one message; arguments are Flower's own.

    Args:
        arguments: Address of the SuperNode, token, ...
        opener: Opens the client; None for that of site.toml.

    Raises:
        UnknownFlower: If the code that would run the server's bundle is not where it is to be replaced.
    """
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    from fedsynth.clients.app import client_app
    from fedsynth.deployment.client import BUNDLE, site_client, unopened

    runtime = _check_flower()
    push_message, push_task_output = runtime.push_message, runtime.push_task_output
    pushed: list[bool] = []

    def load(_id: str, _version: str, bundle: str) -> Any:
        os.environ[BUNDLE] = bundle
        return client_app(opener or site_client, simulated=False, unopened=unopened)

    def push(*arguments: Any, **more: Any) -> None:
        push_message(*arguments, **more)
        pushed.append(True)

    def finish(*arguments: Any, **more: Any) -> None:
        # If a task finished without a reply, nobody would wait for it, and the SuperNode would take no more messages.
        # An unfinished task misses its heartbeats, and the server learns of it.
        if pushed:
            push_task_output(*arguments, **more)

    replaced: dict[str, Any] = {
        "install_from_fab": lambda *_, **__: None,
        "get_project_dir": lambda *_: Path(),
        "get_load_client_app_fn": lambda **_: load,
        "push_message": push,
        "push_task_output": finish,
    }
    for name in REPLACED:
        setattr(runtime, name, replaced[name])
    sys.argv = [STAND_IN, *arguments]
    flwr_clientapp()


def serve(path: Path, opener: Callable[..., Any] | None = None) -> NoReturn:
    """Makes a client's imports, then handles each message in its own child; ends with its parent.

    Args:
        path: Path of the Unix socket, in a folder that only the site's user can read.
        opener: As in `main`.
    """
    for name in IMPORTED:
        import_module(name)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        print("warm", flush=True)
        while True:
            asked, _ = listener.accept()
            threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else threading.active_count()
            assert threads == 1, f"{threads} threads: a fork would copy the locks that others hold"
            child = os.fork()
            if child == 0:
                listener.close()
                _handle(asked, opener)
            asked.close()
            _reap()


def _handle(asked: socket.socket, opener: Callable[..., Any] | None) -> NoReturn:
    """Handles one message in the child, and sends its exit code to the waiting program."""
    code = 1
    try:
        with asked.makefile() as words:
            arguments = json.loads(words.readline())
        main(arguments, opener)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            asked.sendall(f"{code}\n".encode())
        finally:
            os._exit(code)


def _reap() -> None:
    """Reaps children that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]))
    main(sys.argv[1:])
