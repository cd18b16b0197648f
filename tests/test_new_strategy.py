"""A strategy beside the scenario: written by the command, found there by every process, refused between real sites."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from inprocess import instructions

from fedsynth.deployment.invitation import planned
from fedsynth.deployment.plan import deployed
from fedsynth.federation.run.environment import differences, surroundings
from fedsynth.federation.strategy import load_strategy
from fedsynth.scenario.schema import StrategyChoice
from fedsynth.scenario.toml import cells, from_toml, load, to_toml
from fedsynth.typed import BadValue

Command = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent
EMPTY = """from dataclasses import dataclass
from fedsynth.federation.strategy import RoundStrategy
@dataclass(frozen=True)
class Config:
    words: int = 3
class Mine(RoundStrategy):
    config_class = Config
    def initial(self): ...
    def round(self, clients, state): ...
"""


def test_the_new_strategy_is_that_of_the_docs() -> None:
    page = (ROOT / "docs" / "your-own-strategy.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert (ROOT / "fedsynth" / "cli" / "strategy.template.txt").read_text() == code
    session = re.findall(r"^```pycon\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[0]
    test = (ROOT / "fedsynth" / "cli" / "test_strategy.template.txt").read_text()
    assert test.splitlines()[0] in session  # the same fakes of fedsynth.testing


def test_a_new_strategy_passes_its_own_test_and_a_broken_one_does_not(command: Command, tmp_path: Path) -> None:
    code, out, err = command("strategy", "new", "my_own")
    assert (code, err) == (0, "")
    assert "fedsynth run SCENARIO.toml --set arms.my_own.strategy.use=my_own:MyOwn" in out
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_own.py"]
    env = {**os.environ, "PYTEST_ADDOPTS": "", "PYTHONDONTWRITEBYTECODE": "1"}

    def passed() -> bool:
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, check=False).returncode == 0

    assert passed()
    mine = tmp_path / "my_own.py"
    whole = mine.read_text()
    faults = {
        "everyone.grants)": '("other",))',
        "[: c.words]": "[: 4]",
        "for client in clients.ids})": "for client in (0,)})",
    }
    for old, new in faults.items():
        assert old in whole
        mine.write_text(whole.replace(old, new))
        assert not passed(), old


@pytest.mark.parametrize("name", ["My", "my-own", "class", "json", "fedsynth", "_x", "1st"])
def test_a_name_that_is_no_module_of_ones_own_is_refused(name: str, command: Command) -> None:
    code, _, err = command("strategy", "new", name)
    assert (code, "NAME" in err) == (2, True)


def test_nothing_is_overwritten(command: Command) -> None:
    Path("test_mine.py").write_text("kept")
    code, _, err = command("strategy", "new", "mine")
    assert (code, "test_mine.py exists, and is not overwritten" in err) == (2, True)
    assert (Path("test_mine.py").read_text(), Path("mine.py").exists()) == ("kept", False)


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scenario in a folder with mine.py; the working directory is another one."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.py").write_text(EMPTY)
    toml = instructions(tmp_path, "mine:Mine", options="words = 5").replace('"scripted"', '"assets:tiny-llm"')
    (folder / "s.toml").write_text(toml)
    monkeypatch.chdir(tmp_path)
    return folder / "s.toml"


def test_a_strategy_beside_the_scenario_is_found_by_processes_elsewhere(scenario: Path) -> None:
    """They get the scenario as text, and have other working directories."""
    asked = from_toml(to_toml(load(scenario)))
    [cell] = cells(asked)
    assert cell.scenario.strategy == StrategyChoice(f"{scenario.parent / 'mine.py'}:Mine", {"words": 5})
    found, config = load_strategy(cell.scenario.strategy)
    assert (found.__name__, config.words) == ("Mine", 5)
    assert load_strategy(cell.scenario.strategy)[0] is found  # read once
    program = "import sys; from fedsynth.federation.strategy import load_strategy\n"
    program += "from fedsynth.scenario.toml import cells, from_toml\n"
    program += "print([load_strategy(c.scenario.strategy)[0].__name__ for c in cells(from_toml(sys.stdin.read()))])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd="/",
        input=to_toml(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "['Mine']", done.stderr


def test_a_changed_file_is_read_again_and_a_run_says_that_it_changed(scenario: Path, tmp_path: Path) -> None:
    asked = load(scenario)
    (tmp_path / "versions.json").write_text(json.dumps(surroundings(asked)))
    assert differences(tmp_path, asked) == []
    file = scenario.parent / "mine.py"
    file.write_text(EMPTY.replace("words: int = 3", "words: int = 3\n    more: int = 7"))
    os.utime(file, ns=(1, 1))
    choice = asked.strategy
    assert load_strategy(choice)[1].more == 7
    [line] = differences(tmp_path, asked)
    assert line.startswith(f"strategies/{file}")
    file.unlink()
    with pytest.raises(BadValue, match=r"mine\.py' is gone"):
        load_strategy(choice)


def test_a_strategy_that_is_nowhere_names_where_it_was_looked_for(scenario: Path, tmp_path: Path) -> None:
    (scenario.parent / "mine.py").rename(tmp_path / "other.py")
    with pytest.raises(BadValue) as told:
        load(scenario)
    for part in (str(scenario.parent), str(tmp_path), "PYTHONPATH", "no mine.py", "fedsynth strategy new"):
        assert part in str(told.value)
    (tmp_path / "mine.py").write_text(EMPTY)  # the working directory's
    here = f"{tmp_path / 'mine.py'}:Mine"
    assert load(scenario).strategy.use == here
    more = load(scenario, ["arms.more.strategy.use=mine:Mine"])
    assert [cell.scenario.strategy.use for cell in cells(more)] == [here, here]
    with pytest.raises(BadValue, match=r"no strategy 'a\.b:C'.*PYTHONPATH"):
        load_strategy(StrategyChoice("a.b:C"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nraise RuntimeError('no luck')\n", "line 2: RuntimeError: no luck"),
        ("x = 1\n\ndef (\n", "line 3: SyntaxError"),
        ("import nowhere_to_be_found\n", "No module named 'nowhere_to_be_found'"),
        ("Other = 1\n", "has no attribute 'Mine'"),
        ("Mine = 1\n", "is not a RoundStrategy"),
    ],
)
def test_a_file_that_cannot_be_read_names_its_line(text: str, said: str, scenario: Path) -> None:
    (scenario.parent / "mine.py").write_text(text)
    [cell] = cells(load(scenario))
    with pytest.raises(BadValue, match=re.escape(said)):
        load_strategy(cell.scenario.strategy)


def test_a_file_named_like_a_known_module_takes_no_ones_place(scenario: Path) -> None:
    (scenario.parent / "mine.py").rename(scenario.parent / "json.py")
    scenario.write_text(scenario.read_text().replace("mine:Mine", "json:Mine"))
    [cell] = cells(load(scenario))
    assert load_strategy(cell.scenario.strategy)[0].__name__ == "Mine"
    assert sys.modules["json"] is json


def test_it_can_import_what_is_beside_it(scenario: Path) -> None:
    (scenario.parent / "beside_mine.py").write_text("WORDS = 9\n")
    (scenario.parent / "mine.py").write_text(f"from beside_mine import WORDS\n{EMPTY}".replace("= 3", "= WORDS"))
    found = load(scenario).strategy
    assert load_strategy(StrategyChoice(found.use))[1].words == 9
    assert str(scenario.parent) not in sys.path


def test_between_real_sites_a_file_is_refused(scenario: Path) -> None:
    asked = load(scenario)
    for refuse in (lambda: deployed(asked, 2), lambda: planned(asked)):
        with pytest.raises(BadValue, match=r"simulations alone read.*installed package"):
            refuse()


def test_no_part_of_a_site_reads_a_strategy() -> None:
    """A site answers typed requests; the class that asks them is the coordinator's."""
    parts = [*(ROOT / "clients").glob("*.py"), *(ROOT / "fedsynth" / "deployment" / "site").glob("*.py")]
    parts += [ROOT / "fedsynth" / "deployment" / f"{name}.py" for name in ("client", "client_process", "policy")]
    read = {
        file: {
            n.name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom)
            for n in node.names
        }
        for file in parts
    }
    assert len(read) > 10
    assert not [file for file, names in read.items() if "load_strategy" in names]
    assert any("ClientSide" in names for names in read.values())  # the search finds what is there
