"""Ledgers and audit trails that an earlier version wrote open, verify and count: what was spent stays spent."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from fedsynth.clients.audit_log import entries
from fedsynth.data.sources import SiteData
from fedsynth.deployment.policy import Place, Policy, SiteConfig, SuperLink
from fedsynth.deployment.site.check import check
from fedsynth.deployment.site.declare_loss import declare, lost
from fedsynth.federation.messages import Synthesized
from fedsynth.federation.payload import decode
from fedsynth.privacy.audit import contents, problems
from fedsynth.privacy.caps import BudgetExhausted
from fedsynth.privacy.filter import order_for
from fedsynth.privacy.ledger import Binding
from fedsynth.privacy.plan import Budget, DPPlan
from fedsynth.privacy.witness import LedgerBehind

WRITTEN = Path(__file__).parent / "fixtures" / "269ef66"  # by the code of that commit
EPSILON = {"all": 4.095360199332489, "2026-summer": 3.752344286373231, "2026-spring": 1.9989878872627933}  # it said
ROUNDED = 1 + 3e-5  # a coarser grid of losses than that version's may add so much, and takes nothing away
SENT = "0757fd2542f3b30d316584891652d0ad3517f0605e695af262d52d8cd193d1b0"


def opened(tmp_path: Path, name: str, cap: float = 10.0) -> Place:
    data = SiteData(id="charite-1", source="notes.csv", labels=("heart", "skin"), person="person", records=12)
    place = Place(
        SiteConfig("charite", data, Policy(Budget(cap), minimum_records=1), SuperLink("127.0.0.1:9443")), tmp_path
    )
    place.ledger.parent.mkdir(parents=True)
    with sqlite3.connect(place.ledger) as db:
        db.executescript((WRITTEN / name / "ledger.sql").read_text())
    shutil.copy(WRITTEN / name / "audit.jsonl", place.audit_log)
    return place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Two runs under a guarantee, with a grant in each state."""
    return opened(tmp_path, "guarantee")


def test_it_is_read_as_it_lies_there(place: Place) -> None:
    before = place.ledger.read_bytes()
    found = contents(place.ledger)
    assert problems(found) == []
    assert [g["state"] for g in found["grants"]] == ["sent", "sent", "stored", "abandoned", "running", "reserved"]
    assert EPSILON["all"] <= found["epsilon"] <= EPSILON["all"] * ROUNDED
    assert (found["filter"], found["cap"]) == (None, None)  # it was never opened under one
    assert place.ledger.read_bytes() == before


def test_it_opens_and_counts_what_it_counted(place: Place) -> None:
    ledger = place.open_ledger()
    spent, delta = ledger.spent()
    assert EPSILON["all"] <= spent <= EPSILON["all"] * ROUNDED
    assert delta == 1e-5
    for run in ("2026-summer", "2026-spring"):
        assert ledger.spent(run)[0] == ledger.spent(f"{run}/main/0")[0]
        assert EPSILON[run] <= ledger.spent(run)[0] <= EPSILON[run] * ROUNDED
    stored = ledger.answered(SENT)
    assert stored is not None
    assert decode(stored, Synthesized, trusted=True).corpus.grants == ("33093734fc3f50e3e447086849f8eb83",)
    assert ledger.answered("2" * 64) == b"the answer of 2222"
    assert not ledger.sent("2" * 64)
    assert len(list(entries(place.audit_log))) == 14
    found = contents(place.ledger)
    assert problems(found) == []
    assert found["filter"]["order"] == ledger.order == order_for(Budget(10.0))
    assert found["filter"]["epsilon"] == ledger.filtered() > EPSILON["all"]
    assert not found["filter"]["closed"]
    states = {finding.what: finding.state for finding in check(place)}
    assert (states["budget"], states["audit trail"]) == ("ok", "ok")


def test_it_is_charged_further_and_grants_that_were_not_finished_run_again(place: Place) -> None:
    ledger = place.open_ledger()
    [row] = [row for row in ledger.entries() if row["kind"] == "grant" and row["state"] == "running"]
    plan = DPPlan.from_dict(next(r["plan"] for r in ledger.entries() if r["run"] == row["run"] and "plan" in r))
    again = ledger.charge(plan, Binding(**row["binding"]), row["run"])
    assert again.id == row["id"]
    ledger.begin(again)
    ledger.store(again, b"text")
    spent = ledger.spent()[0]
    binding = replace(Binding(**row["binding"]), order="5" * 64)
    ledger.charge(plan, binding, "2027-spring/main/0")  # three rounds of its plan
    assert ledger.spent()[0] > spent
    assert problems(contents(place.ledger)) == []
    assert [c.run for c in place.witness().known()][-1] == "2027-spring/main/0"
    assert place.open_ledger().order == 3


def test_under_a_cap_that_it_has_passed_nothing_is_undone_and_nothing_added(tmp_path: Path) -> None:
    place = opened(tmp_path, "guarantee", cap=4.1)  # as if fixed in advance, all of it is within that
    ledger = place.open_ledger()
    assert ledger.spent()[0] < 4.1 < ledger.filtered()
    tiny = DPPlan(12, 1, 1, 1, 1.0, 50.0, 1e-5)
    with pytest.raises(BudgetExhausted, match="4 plan"):
        ledger.charge(tiny, Binding("5" * 64, tiny.digest(), "m", "w", "v"), "2027-spring/main/0")
    assert contents(place.ledger)["filter"]["closed"]
    assert [f.state for f in check(place) if f.what == "budget"] == ["ok", "warning"]


def test_a_release_without_guarantee_stays_one(tmp_path: Path) -> None:
    place = opened(tmp_path, "bare")
    assert contents(place.ledger)["epsilon"] is None
    assert problems(contents(place.ledger)) == []
    ledger = place.open_ledger()
    assert ledger.waived("2026-summer/main/0")
    assert not ledger.waived("2026-spring/main/0")
    known = place.witness().known()
    assert [(c.grant != "", c.run, c.plan) for c in known] == [
        (True, "2026-spring/main/0", None),
        (False, "2026-summer/main/0", None),
    ]


@pytest.mark.parametrize("name", ["guarantee", "bare"])
def test_its_trail_closes_an_older_copy_of_it(tmp_path: Path, name: str) -> None:
    place = opened(tmp_path, name)
    with sqlite3.connect(place.ledger) as db:
        db.execute("DELETE FROM grants WHERE id = '9a82739609bc29fe1c70622f4403b478'")
        db.execute("DELETE FROM spent WHERE plan IS NULL")
    with pytest.raises(LedgerBehind):
        place.open_ledger()
    declare(place, *lost(place))
    assert place.open_ledger().spent()[0] == float("inf")  # it says no plan
    assert contents(place.ledger)["epsilon"] is None
