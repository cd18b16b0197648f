"""Small inputs that once came out wrong: made here, and those of ../shared/cases where they are at hand."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from inprocess import play
from rich.console import Console
from typer.testing import CliRunner

import fedsynth.cli.main
from fedsynth.data.partition import divide, misfits
from fedsynth.data.tables import read_rows
from fedsynth.federation.run.summary import summarize
from fedsynth.federation.run.tables import print_table
from fedsynth.scenario.data import Data
from fedsynth.scenario.toml import from_toml, load
from fedsynth.simulation.simulate import check, read
from fedsynth.testing import ScriptedLLM
from fedsynth.typed import BadValue

# Some of these files were written for an earlier version.
pytestmark = pytest.mark.filterwarnings("ignore::fedsynth.scenario.earlier_keys.OldName")

SHARED = Path(__file__).parents[2] / "shared" / "cases"
LABELS = ["billing", "login", "delivery"]
WORDS = {"billing": ["invoice", "refund"], "login": ["password", "code"], "delivery": ["parcel", "van"]}
TOML = """
name = "case"
[strategy]
use = "fedsynth.strategies.fdkt:FDKT"
min_words = 3
per_label = 4
draft_tokens = 24
num_texts = 8
max_new_tokens = 24
judge = "none"
[data]
source = "{source}"
labels = {labels}
clients = 2
{more}
[client]
generator = "{model}"
task_model = "{model}"
budget = {{ epsilon = 8.0 }}
generator_training = {{ expected_batch_size = 8, steps = 3 }}
task_training = {{ private_epochs = 1, augmented_epochs = 1 }}
[server]
llm = "{llm}"
[arms.fdkt]
"""


def scenario(
    folder: Path, source: str, labels: object = LABELS, more: str = "", *, model: str = "assets:tiny-slm"
) -> Path:
    """A scenario beside its data."""
    path = folder / "case.toml"
    listed = json.dumps(labels, ensure_ascii=False)
    path.write_text(TOML.format(source=source, labels=listed, more=more, model=model, llm="assets:tiny-llm"))
    return path


def table(rows: int = 60) -> pd.DataFrame:
    kinds = [LABELS[i % 3] for i in range(rows)]
    texts = [f"message {i} asks about the {WORDS[kind][i % 2]} of order {7 * i}" for i, kind in enumerate(kinds)]
    return pd.DataFrame({"text": texts, "label": kinds})


def save(frame: pd.DataFrame, path: Path) -> str:
    frame.to_csv(path, index=False, sep=";" if "semicolon" in path.name else ",")
    return path.name


# --- One function for each kind of input: it writes it down and returns the scenario ----------------------------------


def units(folder: Path) -> Path:
    """One person as a CHAR column pads it, and in small letters."""
    spelt = [f"PAT{i // 6:03}" for i in range(60)]
    spelt = [(name, name + " ", name.lower())[i % 3] for i, name in enumerate(spelt)]
    return scenario(folder, save(table().assign(patient=spelt), folder / "units.csv"), more='unit = "patient"')


def wards(folder: Path) -> Path:
    """The same of natural clients, by a sign of no width."""
    frame = table().assign(ward=[("north", "nor\u200bth", "south")[i % 3] for i in range(60)])
    return scenario(folder, save(frame, folder / "w.csv"), more='split = "natural"\nclient_column = "ward"')


def nfd(folder: Path) -> Path:
    """Accents as one character, and as a letter with its accent."""
    names = {"billing": "Pr\u00fcfung", "login": "Caf\u00e9", "delivery": "St\u00f6rung"}
    frame = table()
    frame["label"] = [unicodedata.normalize(("NFC", "NFD")[i % 2], names[y]) for i, y in enumerate(frame["label"])]
    return scenario(folder, save(frame, folder / "nfd.csv"), "all")


def strayquote(folder: Path) -> Path:
    """Two quotes that nobody meant, at the beginning of rows 11 and 26."""
    lines = table(90).to_csv(index=False).splitlines()
    for row in (11, 26):
        lines[row] = '"' + lines[row]
    (folder / "stray.csv").write_text("\n".join(lines) + "\n")
    return scenario(folder, "stray.csv")


def hidden_test(folder: Path) -> Path:
    """Test labels hidden as -1, as on the hub."""
    classes = datasets.ClassLabel(names=LABELS)
    frame = table(45)
    parts = {}
    for name, rows in (("train", frame[:20]), ("validation", frame[20:30]), ("test", frame[30:])):
        numbers = [-1 if name == "test" else LABELS.index(y) for y in rows["label"]]
        made = datasets.Dataset.from_dict({"text": rows["text"].tolist(), "label": numbers})
        parts[name] = made.cast_column("label", classes)
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(folder / "hidden")
    return scenario(folder, "hidden", more='test = { column = "split", equals = "test" }')


def floatlabels(folder: Path) -> Path:
    """Class numbers that went through a column of floats."""
    frame = table()
    frame["label"] = [f"{LABELS.index(y)}.0" for y in frame["label"]]
    return scenario(folder, save(frame, folder / "floats.csv"), ["0", "1", "2"])


def toml_int(folder: Path) -> Path:
    """Class numbers in a scenario, without quotes."""
    frame = table().assign(n=[i % 3 for i in range(60)])
    frame.to_parquet(folder / "kinds.parquet")
    return scenario(folder, "kinds.parquet", [0, 1, 2], 'label = "n"')


def blank_in_label(folder: Path) -> Path:
    """A label with a blank behind it."""
    frame = table().replace({"delivery": "\u6302\u5931"})
    return scenario(folder, save(frame, folder / "chinese.csv"), ["billing", "login", "\u6302\u5931 "])


def semicolon(folder: Path) -> Path:
    """As a spreadsheet in half of Europe saves it."""
    return scenario(folder, save(table(), folder / "semicolon.csv"))


@dataclass(frozen=True)
class Case:
    """What is refused, of one kind.

    Attributes:
        make: Writes an input of the kind.
        says: All of which stand in what is said of it, and of the shared one.
        shared: What stands in what is said of the shared one, too.
    """

    make: Callable[[Path], Path]
    says: tuple[str, ...]
    shared: tuple[str, ...] = ()


CASES = {
    "units": Case(
        units,
        (r"persons of the column 'patient'", r"'PAT003' and 'PAT003\u0020' and 'pat003'", 'spellings = "merge"'),
        ("15 persons",),
    ),
    "wards": Case(wards, ("1 clients of the column 'ward'", r"'north' and 'nor\u200bth'")),
    "nfd": Case(
        nfd, (r"'Cafe\u0301' and 'Caf\u00e9'", r"'Pru\u0308fung' and 'Pr\u00fcfung'", "write each class one way")
    ),
    "strayquote": Case(strayquote, ("a quote in line 12", "closes in line 27", "16 lines stand in one cell")),
    "hidden_test": Case(
        hidden_test, ("15 rows are 'test'", "none of them has a label (-1 hides it)", "name another split")
    ),
    "floatlabels": Case(
        floatlabels, ("'0.0' ", "'1.0' ", "'2.0' ", "no row has a label of data.labels ('0', '1', '2')")
    ),
    "toml_int": Case(toml_int, ("data.labels must be ", "a list of texts: write them in quotes")),
    "blank_in_label": Case(blank_in_label, ("it ends with a blank",)),
    "semicolon": Case(semicolon, ("columns are parted by ';'", "save it with commas")),
}


def refusal(path: Path) -> str:
    with pytest.raises(BadValue) as caught:
        check(load(path))
    return str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_an_input_of_the_kind_is_refused_in_one_line_that_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    said = refusal(CASES[name].make(tmp_path))
    assert not [words for words in CASES[name].says if words not in said], said
    assert len(said.splitlines()) == 1
    assert said.isprintable()  # a difference that nobody sees is written out


@pytest.mark.parametrize("name", [name for name in CASES if name != "wards"])
def test_the_shared_input_is_refused_likewise(name: str) -> None:
    path = SHARED / f"{name}.toml"
    if not path.is_file():
        pytest.skip("the shared cases are not here")
    said, case = refusal(path), CASES[name]
    assert not [words for words in (*case.says, *case.shared) if words not in said], said


def test_the_command_ends_with_the_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fedsynth", "check", str(semicolon(tmp_path))])
    with pytest.raises(SystemExit) as ended:
        fedsynth.cli.main.main()
    assert ended.value.code == 2
    assert "parted by ';'" in capfd.readouterr().err


def test_persons_that_are_merged_are_as_many_as_there_are(tmp_path: Path) -> None:
    for path, persons in ((units(tmp_path), 10), (SHARED / "units.toml", 15)):
        if not path.is_file():
            continue
        data = load(path, ["data.spellings=merge"]).data
        sites = divide(data, 0).sites
        held = [{*corpus.units} for site in sites for corpus in (site.train, site.test) if corpus.units]
        assert sum(map(len, held)) == len(set.union(*held)) == persons  # nobody is at two places
        assert misfits(data, LABELS) == [
            f"{data.source}: {2 * persons} spellings of persons or clients are merged into others of them"
        ]


# --- Kinds of columns -------------------------------------------------------------------------------------------------


def kinds(path: Path) -> Path:
    """A Parquet file with a column of each kind that people have."""
    rows = 12
    columns = {
        "text": pa.array(table(rows)["text"].tolist(), pa.large_string()),
        "label": pa.array(table(rows)["label"].tolist()).dictionary_encode(),
        "n": pa.array([i % 3 for i in range(rows)], pa.int8()),
        "f": pa.array([None if i == 4 else float(i % 3) for i in range(rows)], pa.float32()),
        "b": pa.array([i % 2 == 0 for i in range(rows)]),
        "seen": pa.array([i * 86_400_000_000 for i in range(rows)], pa.timestamp("us")),
        "tags": pa.array([["x", "y"]] * rows),
        "meta": pa.array([{"text": "a"}] * rows),
        "raw": pa.array([b"a"] * rows),
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ("label", set(LABELS)),
        ("n", {"0", "1", "2"}),
        ("f", {"0", "1", "2"}),
        ("b", {"True", "False"}),
        ("seen", {f"1970-01-{i + 1:02} 00:00:00" for i in range(12)}),
        ("tags", "holds ndarray values, not text"),
        ("meta", "holds dict values, not text"),
        ("raw", "holds bytes values, not text"),
    ],
)
def test_a_column_of_any_kind_is_read_as_text_or_refused_by_name(
    tmp_path: Path, column: str, found: set[str] | str
) -> None:
    data = Data(str(kinds(tmp_path / "kinds.parquet")), label=column)
    if isinstance(found, set):
        assert set(read_rows(data).table["label"]) == found
    else:
        with pytest.raises(BadValue, match=f"row 1 of column '{column}' {found}"):
            read_rows(data)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared cases are not here")
def test_the_shared_kinds_are_read_or_refused_by_name() -> None:
    source = str(SHARED / "kinds.parquet")
    assert set(read_rows(Data(source, label="n")).table["label"]) == {"0", "1", "2"}
    assert set(read_rows(Data(source, label="f")).table["label"]) == {"0", "1", "2"}
    assert set(read_rows(Data(source)).table["label"]) == set(LABELS)
    for column in ("tags", "meta"):
        with pytest.raises(BadValue, match=f"row 1 of column '{column}' holds"):
            read_rows(Data(source, label=column))


# --- A run of which nothing is left -----------------------------------------------------------------------------------


def test_a_run_of_which_a_filter_leaves_nothing_says_so(tmp_path: Path) -> None:
    path = scenario(tmp_path, save(table(), tmp_path / "plain.csv"), model=tiny.folder())
    # Without a guarantee, as the search for the noise takes longer than all else.
    asked = load(path, ["strategy.min_words=60", "strategy.draft_tokens=6", "client.guarantee=none"])
    run = play(_toml(asked), tmp_path, "fdkt", llm=ScriptedLLM())
    summarize(asked, run.out, 1.0, [run.run_log])
    shown = io.StringIO()
    print_table(Console(file=shown, width=120, highlight=False), read(run.out))
    said = " ".join(shown.getvalue().split())
    # The LLM's answers are "a text"; of the drafts the tiny model ends none.
    assert "0 of 24 drafts left (unfinished 24)" in said
    assert "0 of 16 written texts left (too short 16)" in said
    assert "its figures are not those of its method" in said


@pytest.mark.full
def test_the_command_says_so_too(tmp_path: Path) -> None:
    shared = SHARED / "plain.toml"
    path = shared if shared.is_file() else scenario(tmp_path, save(table(), tmp_path / "plain.csv"))
    words = ["run", str(path), "--out", str(tmp_path / "run"), "--set", "strategy.min_words=60", "--json"]
    done = CliRunner().invoke(fedsynth.cli.main.app, words)
    assert done.exit_code == 0, done.output
    [row] = [line for line in done.stderr.splitlines() if line.startswith("│ fdkt")]
    assert re.search(r"0 of 24 drafts left \((too short|unfinished) \d+\)", row)
    told = json.loads(done.stdout.splitlines()[-1])["arms"]["fdkt"]["losses"]
    assert [(loss["asked"], loss["left"]) for loss in told] == [(24, 0), (16, 0)]
    assert not re.search("kept (?!0%)", done.stderr)


def _toml(asked: object) -> str:
    from fedsynth.scenario.toml import to_toml

    assert from_toml(to_toml(asked)) == asked
    return to_toml(asked)
