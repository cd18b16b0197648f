"""What stands in the place of Flower's client process at a site."""

from __future__ import annotations

import ast
import inspect
import json
import os
import socket
import subprocess
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import flwr.supernode.runtime.run_clientapp as runtime
import pytest
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

from fedsynth.deployment import client_process as process
from fedsynth.deployment.client_process import PROBE, REPLACED, STAND_IN, CannotStandIn, UnknownFlower, main, stand_ins

COLD = ("-c", "import sys; print('cold', *sys.argv[1:])")


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a SuperExec starts it: by its name, with nothing else on the PATH."""
    return subprocess.run(
        [STAND_IN, *arguments], env={"PATH": str(folder)}, capture_output=True, text=True, timeout=60, check=False
    )


def test_every_program_that_a_server_can_have_started_is_a_stand_in(tmp_path: Path) -> None:
    stand_ins(tmp_path, tmp_path / "no.socket", COLD)
    assert {path.name for path in tmp_path.iterdir()} == {*TASK_TYPE_TO_COMMAND.values(), "hand_over.py"}
    texts = {(tmp_path / name).read_text() for name in TASK_TYPE_TO_COMMAND.values()}
    assert len(texts) == 1
    assert all(os.stat(path).st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_without_a_warm_process_a_message_gets_one_of_its_own(tmp_path: Path) -> None:
    stand_ins(tmp_path, tmp_path / "no.socket", COLD)
    assert call(tmp_path, "--token", "t").stdout == "cold --token t\n"


@pytest.mark.parametrize(("answer", "code"), [(b"0\n", 0), (b"3\n", 3), (b"", 1)])
def test_a_message_is_handed_over_once_whatever_becomes_of_who_took_it(
    tmp_path: Path, answer: bytes, code: int
) -> None:
    told: list[Any] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "warm.socket"))
        listener.listen()

        def take() -> None:
            asked, _ = listener.accept()
            with asked, asked.makefile() as words:
                told.append(json.loads(words.readline()))
                asked.sendall(answer)  # nothing: it was killed

        taking = threading.Thread(target=take)
        taking.start()
        stand_ins(tmp_path / "bin", tmp_path / "warm.socket", COLD)
        done = call(tmp_path / "bin", "--token", "t")
        taking.join(10)
    assert told == [["--token", "t"]]
    assert (done.returncode, done.stdout) == (code, "")


def test_programs_that_cannot_be_run_are_refused_before_a_supernode_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_executable(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o600)

    monkeypatch.setattr(process, "_program", not_executable)
    with pytest.raises(CannotStandIn, match="is it mounted noexec"):
        stand_ins(tmp_path, tmp_path / "no.socket", COLD)


def test_a_probe_asks_nobody(tmp_path: Path) -> None:
    stand_ins(tmp_path, tmp_path / "no.socket", COLD)
    assert call(tmp_path, PROBE).stdout == ""


@pytest.mark.parametrize("name", REPLACED)
def test_a_flower_that_is_built_otherwise_is_not_worked_with(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(runtime, name)
    with pytest.raises(UnknownFlower, match=f"does not use {name}"):
        main(["--token", "t"])


@pytest.mark.parametrize("name", REPLACED)
def test_a_flower_that_has_what_is_replaced_and_does_not_use_it_is_not_worked_with(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the bundle would be unpacked and run by what took its place."""
    source = inspect.getsource(runtime.run_clientapp).replace(name, "its_successor")
    place: dict[str, Any] = {**vars(runtime)}
    exec(source, place)
    monkeypatch.setattr(runtime, "run_clientapp", place["run_clientapp"])
    with pytest.raises(UnknownFlower, match=f"does not use {name}"):
        main(["--token", "t"])


def test_what_flower_calls_takes_what_it_is_given() -> None:
    """The calls of Flower's own code that a site answers, as they stand there."""
    source = inspect.getsource(runtime.run_clientapp)
    calls = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    assert {
        "install_from_fab(fab.content, skip_prompt=True)",
        "get_project_dir(run.fab_id, run.fab_version, fab.hash_str)",
        "get_load_client_app_fn(default_app_ref='', app_path=None, multi_app=True)",
        "load_client_app_fn(run.fab_id, run.fab_version, fab.hash_str)",
        "client_app(message=message, context=context)",
        "push_message(client, reply_message, context)",
        "push_task_output(client=client, context=context, sub_status=sub_status, details=details)",
    } <= calls


class TestMessage:
    """Flower's own code, with its SuperNode played by this test."""

    @pytest.fixture
    def ends(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What the process tells the SuperNode."""
        told: list[str] = []
        for name in REPLACED:  # put back afterwards
            monkeypatch.setattr(runtime, name, getattr(runtime, name))
        monkeypatch.setattr(runtime, "push_message", lambda *_, **__: told.append("reply"))
        monkeypatch.setattr(runtime, "push_task_output", lambda *_, **__: told.append("finished"))
        monkeypatch.setattr("sys.argv", ["test"])
        return told

    def test_a_task_is_finished_only_with_a_reply(self, ends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def played() -> None:
            runtime.push_task_output(None, None, "", "")  # as at SIGTERM, before there is a reply
            assert ends == []
            runtime.push_message(None, None, None)
            runtime.push_task_output(None, None, "", "")

        monkeypatch.setattr(import_module("flwr.supernode.cli.flwr_clientapp"), "flwr_clientapp", played)
        main([])
        assert ends == ["reply", "finished"]

    def test_nothing_of_the_bundle_is_unpacked_and_the_installed_app_is_loaded(
        self, ends: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        loaded: list[Any] = []

        def played() -> None:
            runtime.install_from_fab(b"no bundle at all", skip_prompt=True)
            loaded.append(
                runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)("i", "v", "h")
            )

        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("FEDSYNTH_BUNDLE", "")
        monkeypatch.setattr(import_module("flwr.supernode.cli.flwr_clientapp"), "flwr_clientapp", played)
        main([])
        assert type(loaded[0]).__name__ == "ClientApp"
        assert os.environ["FEDSYNTH_BUNDLE"] == "h"
        assert list(tmp_path.iterdir()) == []
