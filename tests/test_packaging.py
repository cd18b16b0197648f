"""What a wheel carries, and what no file of the tree may say."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LINKS = {"fedsynth/app": "simulations", "fedsynth/clients": "clients", "fedsynth/strategies": "strategies"}
NOT_SHIPPED = {"fedsynth.app.assets", "fedsynth.app.benchmarks", "fedsynth.app.models"}


def build_wheel(tree: Path) -> Path:
    """A wheel that is built in `tree` from a copy of the project, without its links."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
        else:
            (tree / name).touch()
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("clients", "strategies", "simulations"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    shutil.copytree(
        ROOT / "fedsynth",
        tree / "fedsynth",
        ignore=lambda at, names: [n for n in names if n == "__pycache__" or (Path(at) / n).is_symlink()],
    )
    code = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tree / "dist")], cwd=tree, check=True, capture_output=True)
    (path,) = (tree / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel."""
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("tree"))).namelist()


def tracked() -> Iterator[tuple[str, str]]:
    """Path and text of every text file of the tree that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in sorted(set(listed.stdout.splitlines())):
        path = ROOT / name
        if path.is_file() and path.suffix not in {".safetensors", ".png", ".parquet"}:
            yield name, path.read_text()


def packages_on_disk() -> set[str]:
    found = set()
    for start in ("fedsynth", *LINKS):
        top = ROOT / start
        for path in top.rglob("*.py"):  # does not follow links; each of them is a start of its own
            found.add(".".join([*start.split("/"), *path.parent.relative_to(top).parts]))
    return found | {"fedsynth.app"}  # a folder of data


def test_every_package_is_listed() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_on_disk() - NOT_SHIPPED


def test_links_and_package_dir_say_the_same() -> None:
    for link, target in LINKS.items():
        package = link.replace("/", ".")
        assert SETUPTOOLS["package-dir"][package] == target
        path = ROOT / link
        assert path.is_symlink()
        assert path.readlink() == Path("..") / target


def test_wheel_carries_the_data(wheel: list[str]) -> None:
    expected = {"fedsynth/py.typed", "fedsynth/app/pyproject.toml"}
    expected |= {f"fedsynth/app/fedsynth_sim/{name}.py" for name in ("__init__", "server_app", "client_app")}
    expected |= {f"fedsynth/app/scenarios/{path.name}" for path in (ROOT / "simulations/scenarios").glob("*.toml")}
    expected |= {
        path.relative_to(ROOT).as_posix()
        for folder in ("assets", "deployment", "reporting", "world")
        for path in (ROOT / "fedsynth" / folder).rglob("*")
        if path.suffix in {".safetensors", ".json", ".toml", ".html"}
    }
    assert expected - set(wheel) == set()


def test_wheel_carries_every_module_and_nothing_else(wheel: list[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedsynth").rglob("*.py")}
    for link, target in LINKS.items():
        modules |= {f"{link}/{path.relative_to(ROOT / target).as_posix()}" for path in (ROOT / target).rglob("*.py")}
    shipped = {name for name in wheel if name.endswith(".py")}
    left_out = tuple(f"{package.replace('.', '/')}/" for package in NOT_SHIPPED)
    assert shipped == {name for name in modules if not name.startswith(left_out)}


def test_no_file_speaks_of_one_machine() -> None:
    place = re.compile(r"(?<![\w.])/(work|root|home/\w+)/|\b(pypi|pythonhosted|anaconda)\.(org|com)\b")
    found = [f"{name}: {match[0]}" for name, text in tracked() for match in place.finditer(text)]
    assert [line for line in found if not line.startswith("tests/test_packaging.py")] == []


def test_the_rule_about_machines_catches_one() -> None:
    place = Path("/") / "work" / "main"
    assert re.search(r"(?<![\w.])/(work|root|home/\w+)/", f"see {place}")


def forbidden(source: str) -> list[str]:
    """Names of what a module does and must not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append("trust_remote_code")
            continue
        else:
            continue
        tops = {name.split(".")[0] for name in names}
        found += sorted(
            tops & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "strategies", "clients"}
        )
    return found


def test_no_module_runs_foreign_code_or_uses_the_wrong_name() -> None:
    python = [(name, set(forbidden(text))) for name, text in tracked() if name.endswith(".py")]
    # A test may show that something refuses to be pickled.
    assert [
        (name, did) for name, found in python if (did := found - {"pickle"} if name.startswith("tests/") else found)
    ] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import strategies.fdkt", ["strategies"]),
        ("from clients import client", ["clients"]),
        ("import pickle", ["pickle"]),
        ("load(name, trust_remote_code=True)", ["trust_remote_code"]),
        ("load(name, trust_remote_code=False)\nfrom fedsynth.clients import client", []),
    ],
)
def test_what_is_forbidden_is_caught(source: str, found: list[str]) -> None:
    assert forbidden(source) == found
