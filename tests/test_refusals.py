"""What the command says about slips of a first hour: the thing, the value, the way out."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

import fedsynth
from fedsynth.scenario.server import Server
from fedsynth.typed import BadValue

Command = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run hospitals --epsilon 2", "No such option '--epsilon'; say --set client.budget.epsilon=VALUE"),
        ("check hospitals --max-new-tokens 2", "No such option '--max-new-tokens'"),
        ("run hospitals --set epsilon=2", "unknown key 'epsilon'"),
        ("run hospitals --set epsilon=2", "; 'epsilon' stands in client.budget.epsilon"),
        ("run hospitals --set client.epsilon=2", "; 'epsilon' stands in client.budget.epsilon"),
        ("run hospitals --set budget.epsilon=2", "; 'budget' stands in client.budget"),
        ("compare hospitals --epsilon 2,8", "No such option '--epsilon'; did you mean --epsilons?"),
        ("run --resume runs/nope", "there is no directory 'runs/nope': name that of a run"),
        ("report .", "'.' holds runs, and is none itself: name one of first"),
        ("runs", "No such command 'runs'. Did you mean 'run'?"),
        ("run lacking.toml", "key 'server' is missing; write server.llm = text or table"),
        ("run hospital", "no scenario 'hospital'; did you mean 'hospitals'?"),
        ("check hospitalz.toml", "no scenario file 'hospitalz.toml'; did you mean 'hospitals'?"),
        ("run notes.csv", "'notes.csv' is a data file, no scenario: `fedsynth init notes.csv` writes one for it"),
        ("run first", "'first' is the directory of a run: repeat it with --from"),
        ("run mine", "no scenario 'mine'; did you mean 'mine.toml'?"),
        ("report runs/nowhere", "bad input: there is no directory 'runs/nowhere': name that of a run"),
        (
            "run hospitals --set server.llm=http://127.0.0.1:8000/v1",
            'write server.llm = { endpoint = "http://HOST:PORT/v1", model = "NAME", api = "chat" }',
        ),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(words: str, said: str, command: Command) -> None:
    Path("first").mkdir()
    Path("first/scenario.toml").touch()
    Path("mine.toml").touch()
    lacking = ('name = "x"', "[strategy]", 'use = "fedsynth.strategies.fdkt:FDKT"', "[data]", 'source = "d.csv"')
    Path("lacking.toml").write_text(
        "\n".join([*lacking, "[client]", 'generator = "assets:tiny-slm"', 'guarantee = "none"'])
    )
    code, out, err = command(*words.split())
    assert (code, out) == (2, "")
    assert said in err
    assert err.lower().count("did you mean") <= 1
    assert len(err.splitlines()) == 1


def test_a_key_that_is_no_key_has_no_way_out_of_its_own(command: Command) -> None:
    _, _, err = command("run", "hospitals", "--nonsense", "2")
    assert "--set" not in err
    _, _, err = command("run", "hospitals", "--set", "nonsense=2")
    assert "stands in" not in err


def test_an_address_with_a_key_in_it_is_not_repeated() -> None:
    with pytest.raises(BadValue, match=r"server\.professional is an address") as told:
        Server("assets:tiny-llm", professional="https://me:secret@host/v1")
    assert "secret" not in str(told.value)


def test_the_command_alone_shows_its_help_and_no_line_of_an_error(command: Command) -> None:
    code, out, err = command()
    assert code == 2
    assert "Federated transfer of knowledge" in out + err
    assert "bad input" not in out + err
    code, out, _ = command("site")
    assert (code, "Take part as a site" in out) == (2, True)


def test_the_version_is_an_option_and_a_command(command: Command) -> None:
    for words in ("--version", "version"):
        assert command(words) == (0, f"{fedsynth.__version__}\n", "")


def test_site_check_lists_all_that_is_to_do_at_once(command: Command) -> None:
    text = files("fedsynth.deployment.site").joinpath("site.template.toml").read_text()
    for mark in ("@name@", "@address@", "@task@", "@asked@"):
        text = text.replace(mark, "x")
    for mark in ("@labels@", "@strategies@", "@models@"):
        text = text.replace(mark, "")
    Path("site").mkdir()
    Path("site/site.toml").write_text(text)
    code, _, err = command("site", "check", "site")
    assert code == 2
    lines = text.splitlines()
    marked = [number for number, line in enumerate(lines, 1) if "TODO " in line and not line.startswith("#")]
    assert len(marked) == 6
    for number, key in zip(marked, ("source", "text", "label", "person", "records", "lifetime"), strict=True):
        assert f"{number} ({key})" in err
    Path("site/site.toml").write_text(text.replace("# TODO", "#"))
    assert "TODO" not in command("site", "check", "site")[2]


def test_nothing_is_released_is_said_in_one_way() -> None:
    """In whatever prints a table: two ways of saying it would be read as two things."""
    other = "nothing " + "released"
    sources = [path for folder in ("fedsynth", "simulations", "docs") for path in (ROOT / folder).rglob("*.[pm][yd]")]
    assert len(sources) > 200
    assert [path for path in sources if other in path.read_text()] == []
    assert any("nothing is released" in path.read_text() for path in sources)
