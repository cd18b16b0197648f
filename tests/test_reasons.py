"""What silences a checker says why, only tables keep a shape of their own, and unit tests start no process."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("fedsynth", "strategies", "clients", "simulations", "tests")
SILENCED = re.compile(r"(?:type: ignore|noqa)(?:\[[\w, -]*\]|: ?[A-Z]+\d+(?:, ?[A-Z]+\d+)*)?(.*)")
FEWEST = 8  # values of a table
COLLECTIONS = ast.Dict | ast.List | ast.Tuple | ast.Set


def comments(source: str) -> list[tuple[int, str]]:
    read = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in read if token.type == tokenize.COMMENT]


def without_reason(source: str) -> list[int]:
    """Lines whose checker is silenced by a comment with no reason behind it."""
    found = [(line, SILENCED.search(comment)) for line, comment in comments(source)]
    return [line for line, match in found if match and not re.search(r"\w", match[1])]


def without_table(source: str) -> list[int]:
    """Lines that keep their own shape and end no collection of at least FEWEST values."""
    kept = [line for line, comment in comments(source) if re.match(r"# (fmt|yapf): ", comment)]
    if not kept:
        return []
    tables = [n for n in ast.walk(ast.parse(source)) if isinstance(n, COLLECTIONS)]
    ends = {
        n.end_lineno or 0 for n in tables if sum(isinstance(v, ast.Constant | ast.Name) for v in ast.walk(n)) >= FEWEST
    }
    return [line for line in kept if not ends & {line, line - 1}]  # the line before: a bracket alone ends a call


def everywhere(check: Callable[[str], list[int]]) -> list[str]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in check(path.read_text())]


def test_every_silenced_checker_has_its_reason() -> None:
    assert everywhere(without_reason) == []


def test_only_tables_keep_their_own_shape() -> None:
    assert everywhere(without_table) == []


@pytest.mark.parametrize(
    ("comment", "silent"),
    [
        ("type: ignore", True),
        ("type: ignore[arg-type, misc]", True),
        ("type: ignore[arg-type]  # a stand-in", False),
        ("noqa: E501", True),
        ("noqa: ARG002, B006", True),
        ("noqa: ARG002 - the library's signature", False),
        ("fmt: skip", False),
    ],
)
def test_a_reason_stands_behind_the_code(comment: str, silent: bool) -> None:
    assert without_reason(f"\nx = 1  # {comment}\n") == ([2] if silent else [])


def test_a_call_is_no_table() -> None:
    assert without_table("raise ValueError('a',\n    'b')  # fmt: skip\n") == [2]
    assert without_table("x = [1, 2, 3, 4,\n    5, 6, 7, 8]  # fmt: skip\n") == []
    assert without_table("x = [1, 2, 3]  # fmt: skip\n") == [1]
    assert without_table("# fmt: off\nx = 1\n") == [1]


def test_a_unit_test_starts_no_process() -> None:
    with pytest.raises(RuntimeError, match=r"test_a_unit_test_starts_no_process is a unit test, and starts a process"):
        subprocess.run(["true"], check=True)
