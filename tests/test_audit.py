"""Ledgers read by people: what is shown, what is found wrong, and what never gets out."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_ledger import COST, PLAN, answer, bind, charge, die, killed, open_ledger

import fedsynth.cli.main
from fedsynth.federation.run.privacy_report import up
from fedsynth.privacy.audit import contents, ledgers_in, problems
from fedsynth.privacy.ledger_file import LedgerUnusable
from fedsynth.privacy.plan import Budget

ANSWER = b"the answer's own bytes"


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    """Two rounds answered, one order abandoned and asked again, one still running."""
    ledger = open_ledger(tmp_path, Budget(100.0))
    answer(ledger, "order 1")
    answer(ledger, "order 2")
    grant = charge(ledger, "order 3")
    ledger.begin(grant)
    ledger.store(grant, ANSWER)
    ledger.begin(charge(ledger, "order 4"))
    ledger.store_answer("free", b"nothing")
    return ledger.path


def test_contents_are_the_ledger_s_own(ward: Path, tmp_path: Path) -> None:
    found = contents(ward)
    ledger = open_ledger(tmp_path, Budget(100.0))
    assert found["dataset"] == "ward"
    assert (found["epsilon"], found["delta"]) == pytest.approx(ledger.spent())
    assert found["epsilon"] > 2 * COST * 0.7
    assert [grant["state"] for grant in found["grants"]] == ["sent", "sent", "stored", "running"]
    assert {a["order_digest"]: (a["bytes"], a["sent"]) for a in found["answers"]}["order 3"] == (len(ANSWER), 0)
    assert problems(found) == []
    ledger.charge_without_guarantee("asked for", "run")
    assert contents(ward)["epsilon"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE spent SET drawn = 0 WHERE id = 1", "counts 0 drawn rounds, 1 grants hold one"),
        ("UPDATE spent SET plan = REPLACE(plan, '4.0', '9.0') WHERE id = 2", "not the one of its digest"),
        ("DELETE FROM grants WHERE counter = 2", "are numbered [1, 3, 4]"),
        ("DELETE FROM answers WHERE order_digest = 'order 1'", "grant 1 is sent, its order has no answer"),
        ("UPDATE grants SET state = 'reserved', key = x'00' WHERE counter = 1", "its order has an answer"),
        ('UPDATE grants SET binding = REPLACE(binding, \'"plan":"\', \'"plan":"0\') WHERE counter = 1', "another plan"),
        ("UPDATE meta SET value = 7 WHERE name = 'schema'", "schema 7"),
        ("UPDATE grants SET spent = 99 WHERE counter = 4", "belongs to no reservation"),
    ],
)
def test_what_was_changed_by_hand_is_found(ward: Path, change: str, said: str) -> None:
    with sqlite3.connect(ward) as db:
        db.execute(change)
    assert any(said in problem for problem in problems(contents(ward)))


def test_an_abandoned_grant_is_no_problem(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, Budget(100.0))
    charge(ledger)
    ledger.charge(PLAN, bind(ledger), "run")  # the same again: handed out once more
    other = bind(ledger)
    grant = ledger.charge(PLAN, type(other)(other.order, other.plan, other.data, "another model", other.version), "run")
    ledger.begin(grant)
    ledger.store(grant, ANSWER)
    found = contents(ledger.path)
    assert [g["state"] for g in found["grants"]] == ["abandoned", "stored"]
    assert problems(found) == []


def test_reading_changes_no_byte(ward: Path) -> None:
    before = ward.read_bytes()
    problems(contents(ward))
    assert ward.read_bytes() == before
    assert sorted(p.name for p in ward.parent.iterdir()) == [ward.name]


def test_a_ledger_that_a_killed_process_left_half_written_says_so_and_the_way_out(
    tmp_path: Path, typed: Callable[..., tuple[object, str, str]]
) -> None:
    ledger = open_ledger(tmp_path, Budget(100.0))
    answer(ledger, "order 1")

    def half_written() -> None:
        with open_ledger(tmp_path, Budget(100.0))._transaction() as db:
            db.execute("PRAGMA cache_size = 5")  # a large change does not wait in memory for its commit
            db.execute("UPDATE grants SET state = 'abandoned'")
            db.execute("INSERT INTO answers VALUES ('order 2', ?, 0, '')", (bytes(1_000_000),))
            die()

    killed(half_written)
    half = ledger.path.read_bytes()
    with pytest.raises(
        LedgerUnusable, match=r"process that was killed; .*-journal .*`fedsynth ledger verify --recover "
    ):
        contents(ledger.path)
    assert ledger.path.read_bytes() == half  # it was only read
    assert typed("show", str(ledger.path))[0] == 2
    code, out, _ = typed("verify", "--recover", str(ledger.path))
    assert (code, "had not committed is undone" in out, "1 ledger: consistent" in out) == (0, True, True)
    assert [grant["state"] for grant in contents(ledger.path)["grants"]] == ["sent"]
    assert typed("verify", "--recover", str(ledger.path))[1] == "1 ledger: consistent\n"


def test_both_figures_are_shown_and_what_is_left_of_the_cap(
    tmp_path: Path, typed: Callable[..., tuple[object, str, str]]
) -> None:
    ledger = open_ledger(tmp_path, Budget(10.0))
    path = str(ledger.path)
    assert "0% is used by the filter" in typed("show", path)[1]
    answer(ledger, "order 1")
    told = json.loads(typed("show", "--json", path)[1])
    assert told["epsilon"] == pytest.approx(COST)
    assert told["cap"] == {"epsilon": 10.0, "delta": 1e-5}
    by = told["filter"]
    assert (by["order"], by["closed"]) == (3, False)
    assert by["used"] == pytest.approx(4 * 3 / (2 * 16))  # RDP of four Gaussians: steps * order / (2 sigma^2)
    assert by["room"] == pytest.approx(10 + math.log(3e-5) / 2 - math.log(2 / 3))
    assert by["epsilon"] == pytest.approx(by["used"] - by["room"] + 10)
    _, out, _ = typed("show", path)
    assert f"{up(COST, 3):.3f} at 1e-05" in out
    assert f"{up(by['epsilon'], 3):.3f} by the filter of order 3" in out
    assert "7% is used by the filter" in out
    open_ledger(tmp_path, Budget(COST + 0.01))
    assert "the filter is full" in typed("show", path)[1]


def test_what_is_no_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"no database")
    with pytest.raises(LedgerUnusable, match="no ledger that can be read"):
        contents(tmp_path / "ledger.sqlite")
    with pytest.raises(LedgerUnusable, match="no ledger in"):
        ledgers_in(tmp_path / "elsewhere")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    def run(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedsynth", "ledger", *words])
        with pytest.raises(SystemExit) as ended:
            fedsynth.cli.main.main()
        return (ended.value.code, *capfd.readouterr())

    return run


def test_the_command_shows_verifies_and_exports(
    ward: Path, tmp_path: Path, typed: Callable[..., tuple[object, str, str]]
) -> None:
    private = tmp_path / "run.private" / "arm"
    private.mkdir(parents=True)
    ward.rename(private / "ledger.sqlite")
    run = str(tmp_path / "run")  # its ledgers lie beside it
    code, out, _ = typed("show", run)
    assert code == 0
    assert "ward: epsilon" in out
    assert "running" in out
    assert typed("verify", run)[:2] == (0, "1 ledger: consistent\n")
    code, _, _ = typed("export", run, "--out", str(tmp_path / "audit.jsonl"))
    assert code == 0
    exported = (tmp_path / "audit.jsonl").read_bytes()
    assert json.loads(exported)["dataset"] == "ward"
    with sqlite3.connect(private / "ledger.sqlite") as db:
        secrets = [
            row[0]
            for row in db.execute(
                "SELECT key FROM grants WHERE key IS NOT NULL UNION SELECT value FROM meta WHERE name = 'mac_key'"
            )
        ]
    assert len(secrets) == 2
    for secret in (*secrets, ANSWER):  # not as bytes, hex or base64
        assert secret not in exported
        assert secret.hex().encode() not in exported
    code, _, said = typed("export", run, "--out", str(tmp_path / "audit.jsonl"))
    assert code == 2
    assert "name a new file" in said
    with sqlite3.connect(private / "ledger.sqlite") as db:
        db.execute("UPDATE spent SET drawn = 0")
    code, out, _ = typed("verify", run)
    assert code == 1
    assert "drawn rounds" in out
    assert typed("show", str(tmp_path / "nowhere"))[0] == 2
