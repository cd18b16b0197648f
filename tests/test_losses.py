"""What filters leave of an arm's drafts and texts, and where it is told."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import tiny
from inprocess import canary, play
from rich.console import Console

from fedsynth.federation.run.directory import prepare
from fedsynth.federation.run.log import COLUMNS, RunLog
from fedsynth.federation.run.summary import summarize
from fedsynth.federation.run.tables import print_table
from fedsynth.reporting import run_report
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells, from_toml
from fedsynth.simulation.progress import _percent
from fedsynth.simulation.simulate import read
from fedsynth.synthesis.attrition import losses
from fedsynth.synthesis.curation import Stage
from fedsynth.testing import ScriptedLLM


def scenario(arms: str = "[arms.a]\n[arms.b]\n", data: str = 'source = "world:hospitals"\nclients = 2') -> Scenario:
    return from_toml(
        f'name = "own"\nseeds = [0]\n[strategy]\nuse = "fedsynth.strategies.fdkt:FDKT"\n[data]\n{data}\n'
        'train_per_client = 5\ntest_per_client = 5\n[client]\ngenerator = "assets:tiny-slm"\n'
        f'task_model = "assets:tiny-slm"\nguarantee = "none"\n[server]\nllm = "assets:tiny-llm"\n{arms}'
    )


def run_log(place: Path, arm: int = 0) -> RunLog:
    found = RunLog(cells(scenario())[arm], place, place / "events.jsonl")
    found.round = 1
    return found


def step(name: str, before: int, after: int, lost: tuple[str, ...] = (), **dropped: int) -> Stage:
    return Stage(name, before, after, {reason.replace("_", " "): count for reason, count in dropped.items()}, lost)


def told(*run_logs: RunLog) -> dict[str, list[str]]:
    frame = pd.DataFrame([row for j in run_logs for row in j.rows], columns=list(COLUMNS))
    return {arm: [str(loss) for loss in own] for arm, own in losses(frame).items()}


def fdkt(run_log: RunLog, client: int, unfinished: int, kept: int, written: int) -> None:
    """Of 12 drafts and 8 texts of a client."""
    drafts = 12 - unfinished
    run_log.log_stage(client, step("drafts", 12, kept, unfinished=unfinished, too_short=drafts - kept))
    run_log.log_stage(client, step("drafts_unique", kept, kept))
    run_log.log_stage(client, step("written", 8, written, too_short=8 - written))
    run_log.log_stage(client, step("written_unique", written, written))


# --- What counts as a loss --------------------------------------------------------------------------------------------


def test_nothing_is_told_where_a_tenth_or_more_is_left_at_every_client(tmp_path: Path) -> None:
    made = run_log(tmp_path)
    for client in (0, 1):
        fdkt(made, client, unfinished=2, kept=2, written=1)  # 4 of 24, 2 of 16
    assert told(made) == {}


def test_less_than_a_tenth_is_told_with_the_counts_and_the_reason_that_took_most(tmp_path: Path) -> None:
    made = run_log(tmp_path)
    for client, kept in ((0, 1), (1, 1)):
        made.log_stage(client, step("drafts", 10, kept, unfinished=4, too_short=5))
    assert told(made) == {}  # 2 of 20 are a tenth
    made.round = 2
    for client, kept in ((0, 1), (1, 0)):
        made.log_stage(client, step("drafts", 10, kept, unfinished=10 - kept))
    assert told(made) == {"a": ["3 of 40 drafts left (unfinished 27), none at 1 of 2 clients"]}


def test_the_seen_run_is_told(tmp_path: Path) -> None:
    made = run_log(tmp_path)
    for client in (0, 1):
        fdkt(made, client, unfinished=12, kept=0, written=8)
    assert told(made) == {"a": ["0 of 24 drafts left (unfinished 24)"]}


def test_a_client_without_text_is_told_although_the_others_have_enough(tmp_path: Path) -> None:
    made = run_log(tmp_path)
    fdkt(made, 0, unfinished=0, kept=12, written=8)
    fdkt(made, 1, unfinished=0, kept=12, written=0)
    assert told(made) == {"a": ["8 of 16 written texts left (too short 8), none at 1 of 2 clients"]}


def test_lost_labels_are_told(tmp_path: Path) -> None:
    made = run_log(tmp_path)
    made.log_stage(0, step("drafts", 12, 8, ("flu",), too_short=4))
    made.log_stage(1, step("drafts", 12, 12))
    assert told(made) == {"a": ["20 of 24 drafts left (too short 4), labels lost at 1 of 2 clients"]}
    of_server = run_log(tmp_path)
    of_server.log_stage(-1, step("written", 12, 8, ("flu",), too_short=4))
    assert told(of_server) == {"a": ["8 of 12 written texts left (too short 4), labels lost"]}


def test_filters_one_after_the_other_count_together(tmp_path: Path) -> None:
    made = run_log(tmp_path)
    made.log_stage(0, step("drafts", 100, 25, too_short=75))
    made.log_stage(0, step("drafts_unique", 25, 6, duplicate=19))
    assert told(made) == {"a": ["6 of 100 drafts left (too short 75)"]}


def test_texts_of_the_llm_are_none_of_the_drafts_although_they_are_as_many(tmp_path: Path) -> None:
    made = run_log(tmp_path)
    made.log_stage(0, step("drafts", 8, 8))
    made.log_stage(0, step("written", 8, 0, too_short=8))
    assert told(made) == {"a": ["0 of 8 written texts left (too short 8)"]}


def test_what_a_step_was_told_to_leave_out_is_no_loss(tmp_path: Path) -> None:
    made = run_log(tmp_path)
    made.log_stage(-1, step("written", 2000, 1900, unfinished=100))
    made.log_stage(-1, Stage("chosen", 1900, 40, {"beyond 40": 1860}, ()))
    assert told(made) == {}


def test_a_judge_that_selects_nothing_is_told_with_its_reason(tmp_path: Path) -> None:
    made = run_log(tmp_path)
    made.log_stage(0, step("drafts", 12, 12))
    made.log_stage(0, Stage("selected", 12, 0, {"beyond those selected": 12}, ()))
    assert told(made) == {"a": ["0 of 12 drafts left (beyond those selected 12)"]}


def test_arms_are_told_apart(tmp_path: Path) -> None:
    good, bad = run_log(tmp_path, 0), run_log(tmp_path, 1)
    fdkt(good, 0, unfinished=0, kept=12, written=8)
    fdkt(bad, 0, unfinished=12, kept=0, written=0)
    assert told(good, bad) == {"b": ["0 of 12 drafts left (unfinished 12)", "0 of 8 written texts left (too short 8)"]}


# --- Where it is told -------------------------------------------------------------------------------------------------


def ended(place: Path) -> Path:
    """A run's directory, as a run writes it: of the arm b nothing was left."""
    asked = scenario()
    prepare(asked, place)
    run_logs = []
    for number, cell in enumerate(cells(asked)):
        made = RunLog(cell, place, place / "events.jsonl", round=1)
        for client in (0, 1):
            fdkt(made, client, *((12, 0, 0) if number else (0, 12, 8)))
            made.log_metric(client, "accuracy", 0.5)
        made.close()
        run_logs.append(made)
    summarize(asked, place, 3.0, run_logs)
    return place


def test_terminal_json_summary_and_report_say_it_in_the_arms_own_line(tmp_path: Path, monkeypatch: Any) -> None:
    out = ended(tmp_path / "run")
    line = "0 of 24 drafts left (unfinished 24)"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["arms"]["a"]["losses"] == []
    assert [loss["line"] for loss in summary["arms"]["b"]["losses"]] == [
        line,
        "0 of 16 written texts left (too short 16)",
    ]
    assert summary["arms"]["b"]["losses"][0] | {"line": ""} == {
        "what": "drafts",
        "asked": 24,
        "left": 0,
        "taken": 24,
        "reason": "unfinished",
        "most": 24,
        "clients": 2,
        "bare": 2,
        "narrowed": 0,
        "few": True,
        "line": "",
    }

    result = read(out)
    shown = io.StringIO()
    print_table(Console(file=shown, width=120, highlight=False), result)
    [row] = [r for r in shown.getvalue().splitlines() if r.startswith("│ b ")]
    assert line in row
    assert "its figures are not those of its method" in shown.getvalue()
    assert not any("left (" in r for r in shown.getvalue().splitlines() if r.startswith("│ a "))
    assert line in result.table.loc["b", "losses"]

    monkeypatch.setattr(run_report, "embedder", lambda _: ("none", None))
    page, report = run_report.write(out)
    [entry] = [said for word, said in report["warnings"] if word == "Hardly any text left."]
    assert entry.startswith(f"b: {line}; ")
    [of_arm] = [r for r in page.read_text().split("<tr>") if "<span>b</span>" in r and "drafts left" in r]
    assert "unfinished" in of_arm


def test_progress_counts_all_clients_and_all_that_was_asked_for(tmp_path: Path) -> None:
    made = run_log(tmp_path)
    made.log_stage(0, step("drafts", 12, 0, unfinished=12))
    made.log_stage(0, step("drafts_unique", 0, 0))
    made.log_stage(1, step("drafts", 12, 6, unfinished=6))
    assert made.kept == 0.25
    made.log_stage(1, step("drafts_unique", 6, 3, duplicate=3))
    assert made.kept == 3 / 24
    made.log_stage(0, step("written", 8, 8))
    assert made.kept == 1.0  # of the texts that came last
    made.round = 2
    made.log_stage(0, step("written", 8, 2, too_short=6))
    assert made.kept == 0.25


def test_progress_says_all_and_nothing_only_where_it_is() -> None:
    assert [_percent(share) for share in (0, 0.001, 0.5, 0.999, 1)] == ["0%", "1%", "50%", "99%", "100%"]


# --- A method's own funnel --------------------------------------------------------------------------------------------


def test_the_share_kept_is_that_of_the_latest_step_of_all_clients(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    assert log.kept is None
    for client, (asked, good, unique) in enumerate([(10, 8, 4), (30, 30, 12)]):
        log.log_stage(client, step("drafts", asked, good))
        log.log_stage(client, step("drafts_unique", good, unique))
    assert log.kept == (4 + 12) / (10 + 30)
    log.log_stage(0, step("drafts", 6, 3))  # a client whose drafts are filtered anew, among those of the others
    log.log_stage(0, step("drafts_unique", 3, 2))
    assert log.kept == sum(left for _, left in log.left.values()) / sum(n for n, _ in log.left.values())
    log.round = 2
    log.log_stage(1, step("drafts", 20, 5))
    assert (log.left, log.kept) == ({1: (20, 5)}, 0.25)


def test_drafts_that_never_end_are_counted_as_lost_and_told(tmp_path: Path) -> None:
    rows = {"text": [f"note {canary(i)} about it" for i in range(24)], "label": ["heart", "skin"] * 12}
    pd.DataFrame(rows).to_csv(tmp_path / "notes.csv", index=False)
    model = tiny.folder()  # it knows no end
    toml = (
        'name = "tiny"\n[strategy]\nuse = "fedsynth.strategies.fdkt:FDKT"\nper_label = 3\nmin_words = 1\n'
        "num_texts = 5\ndraft_tokens = 4\n"
        f'judge = "none"\n[data]\nsource = "{tmp_path / "notes.csv"}"\nlabels = ["heart", "skin"]\n'
        f'clients = 1\n[client]\ngenerator = "{model}"\ntask_model = "{model}"\nguarantee = "none"\n'
        "generator_training = { expected_batch_size = 5, steps = 1 }\n"
        "task_training = { augmented_epochs = 1, private_epochs = 1 }\n"
        f'[server]\nllm = "scripted"\n[arms.main]\n'
    )
    run = play(toml, tmp_path, llm=ScriptedLLM(answer=lambda prompt: "" if "skin" in prompt else " good"))
    found = losses(pd.DataFrame(list(run.run_log.rows), columns=["arm", "seed", "round", "client", "metric", "value"]))[
        "main"
    ]
    assert [str(loss) for loss in found] == [
        "0 of 6 drafts left (unfinished 6)",
        # heart, skin, heart, skin, heart: two answers are empty, and of three the same one is kept.
        "1 of 5 written texts left (empty answer 2), labels lost at 1 of 1 clients",
    ]
    events = [json.loads(line) for line in (run.out / "events.jsonl").read_text().splitlines()]
    kept = {event["phase"]: event["kept"] for event in events}
    assert kept["augment"] == 0.0
    assert kept["learn"] == 0.2
