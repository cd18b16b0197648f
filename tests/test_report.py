"""The report of a run: what it shows, where each number stands, and what it never reads."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup
from rich.console import Console
from typer.testing import CliRunner

import fedsynth.cli.main
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import open_site
from fedsynth.evaluation.fidelity import self_bleu
from fedsynth.evaluation.utility import bootstrap, paired_difference
from fedsynth.federation.arm_words import arm_words
from fedsynth.federation.payload import corpus_to_parquet
from fedsynth.federation.run.directory import prepare, private_of
from fedsynth.federation.run.log import COLUMNS as LOGGED
from fedsynth.federation.run.log import SERVER, RunLog
from fedsynth.federation.run.privacy_report import up
from fedsynth.federation.run.summary import summarize
from fedsynth.federation.run.tables import print_table
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.statement import Spending, Statement
from fedsynth.reporting import run_report, site_report, statistics
from fedsynth.reporting.cautions import cautions
from fedsynth.reporting.figures import DASHES, SHAPES, Mark, Series, _shape, bars, dots, lines, scatter
from fedsynth.reporting.page import Number, Page, Paragraph, Quote, Quotes, Section, render
from fedsynth.reporting.run_page import page
from fedsynth.reporting.statistics import Figures, Where, add_server, shown
from fedsynth.reporting.texts import balance
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.server import PublicTest
from fedsynth.scenario.toml import cells, load
from fedsynth.simulation import simulate
from fedsynth.typed import BadValue
from fedsynth.world import load_world

HOSTILE = "<script>alert('x')</script> <img src=http://example.org/x onerror=alert(1)> \x07 & \"quoted\" ]]>"
LABELS = load_world("hospitals").labels
TEXTS = tuple(f"{HOSTILE} pain number {i} of the left knee" for i in range(3 * len(LABELS)))
DP = Statement(
    "dp",
    7.99364,
    1e-5,
    14.341719,
    unit="patient",
    sigma=1.416,
    sampling_rate=0.25,
    steps=60,
    clip_norm=0.3,
    simulated=True,
)
# By arm: accuracy of clients 0 and 1 of seed 0, then of seed 1.
ACCURACY = {"local": (0.5, 0.6, 0.7, 0.6), "fdkt": (0.6, 0.8, 0.8, 1.0), "no_dp": (0.6, 0.6, 0.9, 0.9)}
SMALL = [
    "data.clients=2",
    "data.train_per_client=20",
    "data.test_per_client=20",
    "seeds=[0, 1]",
    'run=["local", "fdkt", "no_dp"]',
]


def embed(texts: Sequence[str]) -> np.ndarray:
    """Letters counted: no model is needed to compare texts with."""
    return np.array([[text.count(letter) for letter in "aeionrst"] for text in texts], dtype=np.float32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_report, "embedder", lambda scenario: ("letters", embed))
    monkeypatch.setattr(site_report, "embedder", lambda scenario: ("letters", embed))
    # Ten thousand draws take a second per pair of arms; no claim here is about them.
    monkeypatch.setattr(statistics, "paired_difference", partial(paired_difference, resamples=50))


def make(out: Path, scenario: Scenario) -> Path:
    """A run's directory as a run writes it, with figures that are known."""
    prepare(scenario, out)
    run_logs = []
    for cell in cells(scenario):
        run_log = RunLog(cell, out, out / "events.jsonl")
        for number in (1, 2):
            run_log.round = number
            for client in (0, 1):
                value = ACCURACY[cell.arm][2 * cell.seed + client]
                run_log.log_metric(client, "accuracy", value if number == 2 else value / 2)
                if cell.arm != "local":
                    run_log.log_metric(client, "yield/written/in", 30)
                    run_log.log_metric(client, "yield/written/kept", 24)
                    run_log.log_metric(client, "yield/written/dropped/too short", 6)
                    kind, grants = (
                        (Provenance.LLM_WRITTEN, ("grant",)) if cell.arm == "fdkt" else (Provenance.SELF_GENERATED, ())
                    )
                    written = Corpus(TEXTS, 3 * tuple(LABELS), kind, grants)
                    run_log.log_corpus(client, "written", written)
                run_log.count("bytes/up", client, 1500)
        run_log.count("seconds/exchange/learn", SERVER, 4.5)
        run_log.count("seconds/clients/learn", SERVER, 8.25)
        run_log.spending = {0: Spending((DP,)), 1: Spending((DP,))} if cell.arm == "fdkt" else {}
        if cell.arm == "no_dp":
            run_log.spending = {0: Spending((Statement("none", None, 1e-5),))}
        run_log.released = set() if cell.arm == "local" else {"synthetic text with labels"}
        run_log.close()
        run_logs.append(run_log)
    summarize(scenario, out, 12.0, run_logs)
    return out


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make(tmp_path / "run", load("hospitals", SMALL))


def parsed(path: Path) -> ElementTree.Element:
    """A strict parser of XML takes it, so that no tag is left open and nothing is escaped by luck."""
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_every_number_of_the_page_is_that_of_its_row(run: Path) -> None:
    path, _ = run_report.write(run)
    table = pd.read_parquet(run / "report.parquet")
    assert list(table["row"]) == list(range(len(table)))
    seen: set[str] = set()
    for element in parsed(path).iter():
        for row_name, value_name in (("data-row", "data-value"), ("data-x-row", "data-x")):
            if row_name not in element.attrib:
                continue
            text = element.get(value_name) or element.text or ""
            row = table.iloc[int(element.attrib[row_name])]
            value = float(row["value"])
            digits = len(text.partition(".")[2]) if "e" not in text else None
            rounded = {f"{value:g}"} if digits is None else {f"{value:.{digits}f}", f"{value:+.{digits}f}"}
            if row["part"] in ("privacy", "risk") and digits is not None:
                rounded = {f"{up(value, digits):.{digits}f}", f"{value:.{digits}f}"}
            assert text in rounded | ({repr(value)} if value_name == "data-x" else set()), (text, dict(row))
            seen.add(str(row["part"]))
    parts = {
        "run",
        "privacy",
        "utility",
        "difference",
        "curve",
        "client",
        "yield",
        "text",
        "identifiers",
        "cost",
        "data",
        "time",
        "line",
        "risk",
        "verdict",
    }
    assert seen == parts


def test_no_number_stands_outside_of_a_row(run: Path) -> None:
    path, _ = run_report.write(run)
    root = parsed(path)
    (conclusion,) = [box for box in root.iter("div") if box.get("class") == "verdict"]
    assert len(list(conclusion.iter("span"))) >= 2
    for cell in [*root.iter("td"), conclusion]:
        bare = "".join(e.text or "" for e in cell.iter() if "data-row" not in e.attrib)
        bare += "".join(e.tail or "" for e in cell.iter())
        assert not re.search(r"\d\.\d", bare), bare


def figure(table: pd.DataFrame, part: str, metric: str, statistic: str, **where: object) -> float:
    chosen = table[(table["part"] == part) & (table["metric"] == metric) & (table["statistic"] == statistic)]
    for name, value in where.items():
        chosen = chosen[chosen[name] == value]
    (found,) = chosen["value"]
    return float(found)


def test_figures_by_hand(run: Path) -> None:
    run_report.write(run)
    table = pd.read_parquet(run / "report.parquet")
    # fdkt: .7 in seed 0, .9 in seed 1; a deviation of .2 / sqrt 2. Client 0 was tuned on: client 1 has .8 and 1.
    assert figure(table, "utility", "accuracy", "mean", arm="fdkt") == pytest.approx(0.8)
    assert figure(table, "utility", "accuracy", "std", arm="fdkt") == pytest.approx(0.2 / math.sqrt(2))
    assert figure(table, "utility", "accuracy_held_out_clients", "mean", arm="fdkt") == pytest.approx(0.9)
    assert figure(table, "curve", "accuracy", "mean", arm="fdkt", round=1) == pytest.approx(0.4)
    assert figure(table, "client", "accuracy", "mean", arm="fdkt", client=0) == pytest.approx(0.7)
    # Pairs: .1, .2, .1, .4.
    assert figure(table, "difference", "accuracy", "mean", arm="fdkt", baseline="local") == pytest.approx(0.2)
    assert figure(table, "difference", "accuracy", "better", arm="fdkt", baseline="local") == 1.0
    # Two rounds of 30 and 24 texts; two messages of 1,500 bytes a client.
    assert figure(table, "yield", "written/kept", "mean", arm="fdkt") == 48
    assert figure(table, "yield", "written/dropped/too short", "mean", arm="fdkt") == 12
    assert figure(table, "cost", "kilobytes up per client", "mean", arm="fdkt") == 3.0
    assert figure(table, "text", "written/texts", "mean", arm="fdkt") == 24
    assert figure(table, "text", "written/label_balance", "mean", arm="fdkt") == pytest.approx(1.0)
    assert figure(table, "privacy", "epsilon_replace_one", "largest", arm="fdkt") == 14.341719
    # Two seeds of 4.5 seconds in each of three arms.
    assert figure(table, "time", "learn", "seconds", arm="fdkt") == 9.0
    assert figure(table, "time", "learn", "clients", arm="fdkt") == 16.5
    assert figure(table, "time", "learn", "seconds of all arms") == 27.0
    assert figure(table, "privacy", "units", "largest", arm="fdkt") == 200  # batches of 50 at a rate of a quarter


def test_the_page_concludes_with_what_the_summary_has(run: Path) -> None:
    path, _ = run_report.write(run)
    told = json.loads((run / "conclusion.json").read_text())["verdict"]
    (conclusion,) = [box for box in parsed(path).iter("div") if box.get("class") == "verdict"]
    assert " ".join("".join(conclusion.itertext()).split()) == " ".join(told)
    # Client 0 was tuned on: two pairs are left, whose means are .2 and .4.
    assert told[0] == (
        "fdkt, the only arm under a guarantee, has accuracy 0.900 on the clients on which no setting was tuned, at "
        "epsilon 7.994."
    )
    assert told[1].startswith(
        "Nothing can be said of its advantage: its mean is 0.300 above that of local, but 2 pairs"
    )


def test_every_table_of_arms_has_the_lines_of_the_test_labels(run: Path) -> None:
    path, _ = run_report.write(run)
    truth = [
        open_site(load("hospitals", SMALL).data, client, seed).test.answers for seed in (0, 1) for client in (0, 1)
    ]
    commonest = np.mean([max(map(own.count, own)) / len(own) for own in truth])
    rows = [["".join(cell.itertext()) for cell in row.iter("td")] for row in parsed(path).iter("tr")]
    for name, value in (("(chance)", 1 / len(LABELS)), ("(commonest test label)", commonest)):
        own = [row for row in rows if row and row[0] == name]
        assert [f"{value:.3f}" in row for row in own] == [True, True]  # of the summary, and of utility
    shown_there = io.StringIO()
    print_table(Console(file=shown_there, width=200), simulate.read(run))
    said = shown_there.getvalue()
    assert re.search(rf"\(commonest test label\)[^0-9]+{commonest:.3f}", said)
    assert re.search(rf"\(chance\)[^0-9]+{1 / len(LABELS):.3f}", said)
    assert "Nothing can be said of its advantage" in said


def test_the_arms_are_told_in_words_with_what_each_sets_otherwise() -> None:
    told = arm_words(load("hospitals", ['run=["local", "no_demonstrations", "fdkt", "fdkt_epsilon2", "true_texts"]']))
    assert told["fdkt"] == "Federated Domain-specific Knowledge Transfer"
    assert told["no_demonstrations"] == (
        "Federated Domain-specific Knowledge Transfer; strategy.demonstrations = none (the ablation in which the LLM "
        "sees label names only and clients release nothing)"
    )
    assert told["fdkt_epsilon2"].endswith("; client.budget.epsilon = 2")
    assert "strategy.drafts = true_texts (" in told["true_texts"]
    assert told["local"].startswith("Each client trains its task model on its own text")
    own = replace(load("hospitals").strategy, use="nowhere:Mine")
    elsewhere = arm_words(replace(load("hospitals"), arms={"mine": {}}, run=(), strategy=own))
    assert elsewhere == {"mine": "Mine"}  # where the report is written it cannot be imported


def test_the_page_has_the_day_of_the_run_and_says_who_is_held_out(run: Path) -> None:
    events = [{"event": "data", "at": 86_400 * 365.25 * 50}, {"event": "cell", "at": 9e9}]  # 1 January 2020
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    path, _ = run_report.write(run)
    text = "".join(parsed(path).itertext())
    assert "Begun on 1 January 2020." in text
    assert "Held-out clients are all but 0: on these settings were tuned" in text


def test_the_page_is_made_of_the_json_alone(run: Path) -> None:
    path, _ = run_report.write(run)
    read_back = json.loads((run / "report.json").read_text())
    assert render(page(read_back)) == path.read_text()


def test_an_epsilon_is_never_shown_smaller_than_it_is() -> None:
    figures = Figures()
    figures.add("privacy", "epsilon", "largest", 7.99301)
    row = figures.row("privacy", "epsilon", "largest")
    assert figures.bound(row, 3) == Number("7.994", 0)
    assert figures.number(row, 3) == Number("7.993", 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.012345, "0.0123"), (0.12345, "0.123"), (3.14159, "3.14"), (31.41, "31.4"), (3141.5, "3142"), (math.inf, "inf")],
)
def test_numbers_have_as_many_decimals_as_their_size_asks_for(value: float, text: str) -> None:
    assert shown(value, None) == text


def test_no_figure_is_shown_as_minus_zero() -> None:
    assert shown(-0.0001, 3) == "0.000"


# --- What is read -----------------------------------------------------------------------------------------------------

OPENED: list[str] | None = None


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if OPENED is not None and event in ("open", "os.listdir", "os.scandir"):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_listen)


@contextmanager
def opened() -> Iterator[list[str]]:
    """What this process opens and lists meanwhile."""
    global OPENED
    OPENED = []
    try:
        yield OPENED
    finally:
        OPENED = None


CANARY = "canary-4711"


def test_the_shareable_report_reads_nothing_private(run: Path) -> None:
    private = private_of(run)
    for path in [*private.rglob("*"), private / "clients.json"]:
        if not path.is_dir():
            path.write_text(json.dumps({"origin": CANARY, "cards": [CANARY]}))
    with opened() as places:
        run_report.write(run)
    files = {name: (run / f"report.{name}").read_bytes() for name in ("html", "json", "parquet")}
    assert any(place.endswith("privacy.json") for place in places)  # it does listen, but for Arrow's own reads:
    assert not [place for place in places if private.name in place]
    assert not any(CANARY.encode() in data for data in files.values())
    shutil.rmtree(private)  # so the same must come of it where there is nothing to read
    run_report.write(run)
    assert files == {name: (run / f"report.{name}").read_bytes() for name in files}


def test_the_search_finds_what_the_site_only_report_opens(run: Path) -> None:
    with opened() as places:
        site_report.write(run)
    assert [place for place in places if place.endswith(f"{private_of(run).name}/data.json")]


def test_the_private_data_file_is_not_needed(tmp_path: Path) -> None:
    rows = "".join(f"words {i} {j} here,{label}\n" for i, label in enumerate("abcd") for j in range(20))
    (tmp_path / "notes.csv").write_text("text,label\n" + rows)
    scenario = load("hospitals", SMALL)
    data = replace(scenario.data, source=str(tmp_path / "notes.csv"), labels=tuple("abcd"), tuned_on=())
    out = make(tmp_path / "run", replace(scenario, data=data))
    made = json.loads((out / "privacy.json").read_text())["fdkt"]["terms"]["assumptions"]
    assert made == "number of records read from the data by the simulator, a site would declare them"
    (tmp_path / "notes.csv").unlink()
    path, report = run_report.write(out)
    text = path.read_text()
    assert "notes.csv" in text
    assert str(tmp_path) not in text  # where it lies is nobody else's business
    assert "no MAUVE" in text
    assert made in text
    # What no mechanism stands before is neither shown nor described where it stems from real text; the other arm's is.
    assert {e["arm"] for e in report["examples"]} == {"fdkt"}
    assert {r["arm"] for r in report["rows"] if r["part"] == "text"} == {"fdkt"}
    assert "no_dp: texts without a guarantee" in "".join(parsed(path).itertext()).replace("\n", " ")


def test_private_text_in_a_run_directory_ends_the_report(run: Path) -> None:
    place = run / "corpora" / "fdkt" / "seed-0" / "kept-round1-client0.parquet"
    place.write_bytes(corpus_to_parquet(Corpus(("a", "b"), ("x", "y"), Provenance.PRIVATE)))
    with pytest.raises(BadValue, match="holds private text"):
        run_report.write(run)
    assert not (run / "report.html").exists()


def test_a_run_that_broke_off_has_no_report(run: Path) -> None:
    (run / "privacy.json").unlink()
    with pytest.raises(BadValue, match="a run that ended"):
        run_report.write(run)


# --- The page ---------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_runs_nothing(run: Path) -> None:
    path, _ = run_report.write(run)
    assert path.stat().st_size < 3_000_000
    root = parsed(path)
    tags = {element.tag for element in root.iter()}
    assert tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "foreignObject"} == set()
    assert {"svg", "table", "blockquote"} <= tags
    for element in root.iter():
        assert not [name for name in element.attrib if name.startswith("on") or name == "src"]
        assert element.get("href", "#").startswith("#")
    (style,) = [element.text or "" for element in root.iter("style")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    (policy,) = [e.get("content") for e in root.iter("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    names = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(names) == len(set(names))
    assert {e.get("href", "")[1:] for e in root.iter("a")} <= set(names)


def test_markup_in_synthetic_text_is_shown_as_text(run: Path) -> None:
    path, _ = run_report.write(run)
    shown_texts = [element.text for element in parsed(path).iter("p") if element.get("class") == "text"]
    assert f"{HOSTILE} pain number 0 of the left knee".replace("\x07", "\ufffd") in shown_texts


def test_identifiers_in_synthetic_text_are_counted(run: Path) -> None:
    path, report = run_report.write(run)
    found = {(r["arm"], r["metric"]): r["value"] for r in report["rows"] if r["part"] == "identifiers"}
    with_address = sum("http://" in text for text in TEXTS)
    assert with_address
    for arm in ("fdkt", "no_dp"):
        seeds = len(report["run"]["seeds"])
        assert found[arm, "written/searched"] == 2 * seeds * len(TEXTS)  # of two clients
        assert found[arm, "written/url"] == 2 * seeds * with_address
    assert {metric for _, metric in found} == {"written/searched", "written/url"}
    page = path.read_text()
    assert "web address" in page
    assert "payment card" not in page  # a column that is empty everywhere


def test_every_text_of_a_page_is_escaped() -> None:
    sections = [Section(HOSTILE, "a", [Paragraph(HOSTILE), Quotes([Quote(HOSTILE, HOSTILE, HOSTILE)])])]
    root = ElementTree.fromstring(render(Page(HOSTILE, HOSTILE, HOSTILE, sections, HOSTILE)))
    assert not list(root.iter("script"))
    assert not list(root.iter("img"))


def test_the_privacy_card_has_every_fact(run: Path) -> None:
    path, _ = run_report.write(run)
    cards = {}
    for card in parsed(path).iter("div"):
        if (card.get("class") or "").startswith("card") and card.get("class") != "cards":
            names = ["".join(e.itertext()) for e in card.iter("dt")]
            cards[card.find("h3").text] = dict(
                zip(names, ["".join(e.itertext()) for e in card.iter("dd")], strict=True)
            )
    said = cards["fdkt"]
    assert said["epsilon"].startswith("7.994")
    assert said["epsilon if a patient is replaced by another"] == "14.35"
    assert said["delta"] == "1e-05"
    assert said["unit"] == "patient; at most 1 of its rows count"
    assert said["noise, clip"] == "sigma 1.416, clip norm 0.300"
    assert said["sampler"].startswith("Poisson")
    assert said["sampler"].endswith("rate 0.250, 60 steps")
    assert "zero-out" in said["adjacency"]
    assert "DP-SGD" in said["mechanism"]
    assert "privacy loss distributions" in said["accountant"]
    assert "honest-but-curious" in said["adversary"]
    assert said["sees"] == "synthetic text with labels"
    assert said["noise keys"] == "simulated: noise reproducible"
    assert cards["no_dp"]["guarantee"] == "none"
    assert cards["local"]["guarantee"] == "nothing to spend"


def test_rows_of_a_person_stand_beside_epsilon() -> None:
    report = run_report_of(replace(DP, unit="row", epsilon_rows={2: 19.01, 5: math.inf}).to_dict())
    text = render(page(report))
    assert "epsilon for a person with 2 and 5 rows" in text
    assert ">19.1</span>" in text  # rounded up
    assert ">inf</span>" in text


def test_a_secure_sum_stands_with_its_assumptions_and_the_figure_without_it() -> None:
    spent = replace(DP, mechanism="summed_votes", cohort=Cohort(8, 1, 2), epsilon_alone=21.301)
    text = render(page(run_report_of(spent.to_dict())))
    assert "a secure sum of 8 clients, at most 1 missing, 2 in league with the server" in text
    assert ">21.31</span>" in text  # rounded up
    assert "secure sum" not in render(page(run_report_of(DP.to_dict())))


def test_each_of_two_mechanisms_has_its_figures_below_those_of_both() -> None:
    own = {"mechanism": "votes", "epsilon": 2.001, "sigma": 1.987, "sampling_rate": 1.0, "steps": 1, "clip_norm": 1.0}
    text = render(page(run_report_of(DP.to_dict() | {"sigma": None, "mechanisms": [own]})))
    assert "votes: epsilon by itself" in text
    assert ">2.001</span>" in text
    assert ">1.987</span>" in text
    assert "noise, clip</" in text
    assert "votes:" not in render(page(run_report_of(DP.to_dict())))


def run_report_of(spent: dict[str, object]) -> dict[str, object]:
    """The smallest report: one arm that spent so much."""
    figures = Figures()
    privacy = {"fdkt": {"guarantee": "dp", "line": "", "not_covered": [], "largest_over_clients": spent}}
    run_report.add_privacy(figures, privacy)
    run = {"name": "x", "source": "s", "task": "t", "unit": "row", "seeds": [0], "tuned_on": [], "strategies": {}}
    texts = {"kinds": [], "labels": [], "reference": "", "embedder": "", "left_out": "", "bare": []}
    return {
        "rows": [run_report._row(r) for r in figures.rows],
        "run": {**run, "models": {}, "versions": {}},
        "arms": ["fdkt"],
        "pooled": [],
        "baseline": "fdkt",
        "privacy": privacy,
        "warnings": [],
        "examples": [],
        "texts": texts,
    }


def test_thousands_of_clients_make_no_page_too_long_to_open() -> None:
    rows = [("fdkt", seed, 1, client, "accuracy", 0.5) for seed in (0, 1) for client in range(3000)]
    figures = Figures()
    statistics.add_utility(
        figures, pd.DataFrame(rows, columns=["arm", "seed", "round", "client", "metric", "value"]), []
    )
    report = run_report_of({})
    text = render(page({**report, "rows": figures.rows}))
    assert len(text) < 100_000
    assert "2950 more clients" in text


# --- Cautions ---------------------------------------------------------------------------------------------------------


def words_of(run: Path, **privacy: object) -> list[str]:
    metrics = pd.read_parquet(run / "metrics.parquet")
    figures, said = Figures(), json.loads((run / "privacy.json").read_text())
    for arm, more in privacy.items():
        said[arm] = {**said[arm], **more}
    run_report.add_privacy(figures, said)
    found = cautions(figures, said, metrics, run_report.read_scenario(run), list(ACCURACY), [])
    return [word for word, _ in found]


def test_what_a_run_warns_of(run: Path) -> None:
    usual = ["No guarantee.", "Test figures are not covered by epsilon.", "Settings were tuned", "Simulated noise."]
    assert words_of(run) == usual
    metrics = pd.read_parquet(run / "metrics.parquet")
    metrics[metrics["seed"] == 0].to_parquet(run / "metrics.parquet")
    assert "One seed only." in words_of(run)
    metrics[(metrics["arm"] != "fdkt") | (metrics["client"] != 1)].to_parquet(run / "metrics.parquet")
    assert "Clients without an answer." in words_of(run)


def test_unequal_budgets_and_a_large_delta_are_said(run: Path) -> None:
    # 20,000 units at delta 1e-5 make 0.2.
    more = {
        "guarantee": "dp",
        "largest_over_clients": replace(DP, epsilon=2.0).to_dict(),
        "terms": {"largest_units": 20000},
    }
    found = words_of(run, local=more)
    assert "Budgets differ." in found
    assert "Delta is large." in found


# --- Site only --------------------------------------------------------------------------------------------------------


def test_the_site_only_report_stays_in_the_private_directory(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    path, report = site_report.write(run)
    assert path == private_of(run) / "site-report.html"
    for name in ("html", "json", "parquet"):
        assert (path.with_suffix(f".{name}").stat().st_mode & 0o777) == 0o600
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "SITE ONLY" in path.read_text()
    parsed(path)
    # The texts of this run are nothing like the notes; held-out notes are.
    closest = {
        r["arm"]: r["value"] for r in report["rows"] if (r["metric"], r["statistic"]) == ("written/nearest", "mean")
    }
    assert closest["fdkt"] < 0.2 < closest["(held-out test text)"]


def test_a_copy_of_a_private_text_is_found(run: Path) -> None:
    from fedsynth.data.partition import open_site

    note = open_site(load("hospitals", SMALL).data, 0, 0).train.prompts[0]
    place = run / "corpora" / "fdkt" / "seed-0" / "written-round2-client0.parquet"
    texts = Corpus((note.upper(), *TEXTS[1:]), 3 * tuple(LABELS), Provenance.LLM_WRITTEN, ("grant",))
    place.write_bytes(corpus_to_parquet(texts))
    _, report = site_report.write(run)
    share = next(r["value"] for r in report["rows"] if (r["metric"], r["arm"]) == ("written/copies", "fdkt"))
    # One of the 20 texts that are compared (as many as there is test text), at one of two clients, in one of two seeds.
    assert share == pytest.approx(1 / 20 / 4)
    assert (report["pairs"][0]["rouge_l"], report["pairs"][0]["private"]) == (1.0, note)


def test_a_site_only_report_needs_the_private_directory(run: Path) -> None:
    shutil.rmtree(private_of(run))
    with pytest.raises(BadValue, match="no private directory"):
        site_report.write(run)


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_three_files_and_prints_json(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        fedsynth.cli.main.app, ["report", str(run), "--out", str(tmp_path / "page.html"), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["audience"] == "shareable"
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"page.html", "page.json", "page.parquet"}
    assert "stands in page.parquet" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--site-only", "--out", "here.html"], "leave --out and --export out"),
        (["--site-only", "--export", "here"], "leave --out and --export out"),
        (["--out", "here.pdf"], "must name an .html file"),
        (["--out", "missing/here.html"], "cannot be written"),
    ],
)
def test_what_the_command_refuses(words: list[str], said: str, run: Path) -> None:
    done = CliRunner().invoke(fedsynth.cli.main.app, ["report", str(run), *words])
    assert isinstance(done.exception, BadValue)
    assert said in str(done.exception)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="cannot be read"):
        run_report.build(tmp_path)


# --- Figures ----------------------------------------------------------------------------------------------------------


def marks_of(svg: Markup) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(str(svg)).iter() if e.get("data-row") and e.get("d")]


def place_of(mark: ElementTree.Element) -> float:
    """Horizontal place of a circle: its path begins a radius of 5 left of the middle."""
    found = re.match(r"M([\d.]+)", mark.get("d", ""))
    assert found is not None
    return float(found[1]) + 5


def test_a_mark_stands_where_its_value_is() -> None:
    series = Series("a", tuple(Mark(value, row=i) for i, value in enumerate((0.0, 0.5, 1.0))))
    more = Series("b", (None, None, None))
    first, middle, last = (place_of(mark) for mark in marks_of(dots(["x", "y", "z"], [series, more], title="t")))
    assert middle == pytest.approx((first + last) / 2, abs=0.02)
    assert last - first > 200


def test_bars_are_as_long_as_their_values() -> None:
    root = ElementTree.fromstring(str(bars(["a", "b"], [Mark(400.0, row=0), Mark(100.0, row=1)], title="t")))
    long, short = (float(e.get("width", "")) for e in root.iter("rect"))
    assert long == pytest.approx(4 * short, abs=0.05)


def test_series_are_told_apart_without_colour() -> None:
    series = [Series(f"arm {k}", (Mark(0.1 * k, row=k, x=1.0), Mark(0.2 * k, row=k, x=2.0))) for k in range(8)]
    root = ElementTree.fromstring(str(lines(series, title="t", x_name="round")))
    dashes = [e.get("stroke-dasharray") for e in root.iter("polyline")]
    assert len(set(dashes)) == 8
    assert len(set(SHAPES)) == len(set(DASHES)) == 8
    outlines = {str(_shape(k, 0, 0, None, "")).partition(" style=")[0] for k in range(8)}
    assert len(outlines) == 8


def test_figures_say_what_they_show_and_cut_no_name() -> None:
    name = "a_very_long_name_of_an_arm_that_has_no_room"
    svg = str(scatter([Series(name, (Mark(1.0, x=2.0, row=0),))], title="a & b", x_name="x", y_name="y"))
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "a & b"
    assert name in [e.text for e in root.iter("title")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_has_no_place_in_a_figure(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        dots(["a"], [Series("s", (Mark(value),))], title="t")


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_self_bleu_of_equal_texts_is_1_and_of_texts_without_a_common_word_small() -> None:
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(1.0)
    # Each order: 0.1 instead of 0 of 4, 3, 2 and 1 n-grams.
    expected = (0.1 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    assert self_bleu(["a b c d", "e f g h"]) == pytest.approx(expected)


def test_self_bleu_by_hand() -> None:
    # "a b c d" against "a b c e": 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0.1 of 1; both ways, equally long.
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx(expected)
    # "a a" has one order less than three words: 1 of 2 words and 0.1 of 1 pair against "a b c", shorter by a half;
    # "a b c": 1 of 3, 0.1 of 2, 0.1 of 1, and no shortness.
    short = math.exp(1 - 3 / 2) * math.sqrt(1 / 2 * 0.1)
    assert self_bleu(["a a", "a b c"]) == pytest.approx((short + (1 / 3 * 0.1 / 2 * 0.1) ** (1 / 3)) / 2)


def test_self_bleu_needs_two_texts() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        self_bleu(["alone"])


def test_label_balance_by_hand() -> None:
    assert balance({"a": 5, "b": 5}, ["a", "b"]) == pytest.approx(1.0)
    assert balance({"a": 7}, ["a", "b"]) == 0.0
    # Shares of 3/4 and 1/4: 0.8113 bits of 1.
    assert balance({"a": 3, "b": 1}, ["a", "b"]) == pytest.approx(0.8113, abs=1e-4)


def series(values: Sequence[float], seeds: int) -> pd.Series[float]:
    index = pd.MultiIndex.from_product([range(seeds), range(len(values) // seeds)], names=["seed", "client"])
    return pd.Series(values, index=index)


def test_the_interval_of_equal_values_has_no_width() -> None:
    assert bootstrap(series([0.5] * 8, 2)) == (0.5, 0.5)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hit = 0
    for _ in range(200):
        per_seed = rng.normal(size=(12, 1))
        low, high = bootstrap(series((per_seed + rng.normal(size=(12, 8))).ravel().tolist(), 12), resamples=400)
        hit += low <= 0 <= high
    assert 0.86 <= hit / 200 <= 0.99  # a bootstrap of 12 seeds is a little too narrow


def test_seeds_are_drawn_whole() -> None:
    # Clients of a seed are alike: the interval must be as wide as two seeds make it, not as sixteen values would.
    low, high = bootstrap(series([0.0] * 8 + [1.0] * 8, 2))
    assert (low, high) == (0.0, 1.0)


def test_figures_of_the_llm_keep_their_meaning_under_their_earlier_names_and_start_before_the_first_round() -> None:
    told = [
        ("llm/chosen_label_accuracy", 1, 0.8),
        ("llm/chosen_label_accuracy", 2, 0.9),
        ("llm/test_label_accuracy_before", 1, 0.3),
        ("llm/test_label_accuracy_before", 2, 0.4),
        ("llm/test_label_accuracy", 1, 0.4),
        ("llm/test_label_accuracy", 2, 0.5),
        ("llm/tokens_read", 2, 1000.0),
    ]
    frame = pd.DataFrame([("main", 0, round_, -1, name, value) for name, round_, value in told], columns=LOGGED)
    figures = Figures()
    add_server(figures, frame)
    found = {
        name: figures.value(figures.row("server", name, "mean", Where(arm="main")))
        for name in figures.metrics("server")
    }
    assert found == {"llm/agreement_on_chosen": 0.9, "llm/test_accuracy_before": 0.3, "llm/test_accuracy": 0.5}


def test_public_test_texts_are_the_reference_in_two_halves_that_share_no_text(tmp_path: Path) -> None:
    rows = [(f"text {y} {i}", y) for y in "abz" for i in range(10)]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "public.csv", index=False)
    scenario = load("hospitals", SMALL)
    scenario = replace(
        scenario,
        data=replace(scenario.data, source=str(tmp_path / "notes.csv"), labels=("a", "b")),
        server=replace(scenario.server, public_test=PublicTest(str(tmp_path / "public.csv"))),
    )
    found = run_report.public_reference(scenario, [0])
    assert found is not None
    [one], [other] = found.corpora.values(), found.other.values()
    assert len(one) == len(other) == 10
    assert not set(one.prompts) & set(other.prompts)
    assert set(one.answers) | set(other.answers) == {"a", "b"}  # texts of other labels are no reference
    (tmp_path / "public.csv").unlink()
    assert run_report.public_reference(scenario, [0]) is None
