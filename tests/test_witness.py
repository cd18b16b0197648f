"""An older copy of a ledger: the audit trail knows what it has forgotten, and closes the account."""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_ledger import FORK, PLAN, answer, bind, die, killed, states

import fedsynth.cli.main
from fedsynth.clients.audit_log import AuditLog, AuditLogCorrupted, entries
from fedsynth.data.sources import SiteData
from fedsynth.deployment.policy import Place, Policy, SiteConfig, SuperLink
from fedsynth.deployment.site.check import check
from fedsynth.deployment.site.declare_loss import declare, lost
from fedsynth.deployment.site.start import _open_account
from fedsynth.privacy.audit import contents, problems
from fedsynth.privacy.caps import Account
from fedsynth.privacy.filter import order_for
from fedsynth.privacy.ledger import Grant, GrantUsed, Ledger, Opening
from fedsynth.privacy.plan import Budget, composed_epsilon
from fedsynth.privacy.witness import LedgerBehind
from fedsynth.typed import BadValue

COST = composed_epsilon([PLAN], 1e-5)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A site with an account of which two rounds of a run are spent, each in the trail."""
    data = SiteData(id="ward", source="notes.csv", labels=("a", "b"), person="person", records=100)
    policy = Policy(lifetime=Budget(20.0), minimum_records=1, models=("assets:tiny-slm",))
    made = Place(SiteConfig("north", data, policy, SuperLink("127.0.0.1:9443")), tmp_path / "north")
    made.folder.mkdir()
    ledger = made.open_ledger(create=True)
    for number in (1, 2):
        answered(made, ledger, f"order {number}")
    return made


def charge(ledger: Ledger, order: str, run: str = "run/main/0") -> Grant:
    return ledger.charge(PLAN, bind(ledger, order), run)


def answered(place: Place, ledger: Ledger, order: str, run: str = "run/main/0") -> Grant:
    """An order from its charge to its answer, with what the trail says of it."""
    audit_log = place.witness()
    [name, arm, seed] = run.split("/")
    audit_log.add("asked", order=order, task="train.finetune", envelope={"run": name, "arm": arm, "seed": int(seed)})
    grant = charge(ledger, order, run)
    ledger.begin(grant)
    ledger.store(grant, f"answer to {order}".encode())
    audit_log.add("stored", order=order, grants=[grant.id], guarantee="dp", epsilon=1.0, delta=1e-5)
    ledger.mark_sent(order)
    audit_log.add("answered", order=order)
    return grant


def backup(place: Place) -> Path:
    return Path(shutil.copy(place.ledger, place.folder / "backup.sqlite"))


def restore(place: Place, copy: Path) -> None:
    shutil.copy(copy, place.folder / "again.sqlite")
    (place.folder / "again.sqlite").replace(place.ledger)


def events(place: Place) -> list[str]:
    return [entry["event"] for entry in entries(place.audit_log)]


def test_a_charge_stands_in_the_trail_with_its_plan_before_anything_runs(place: Place) -> None:
    ledger = place.open_ledger()
    grant = charge(ledger, "order 3")
    last = list(entries(place.audit_log))[-1]
    assert (last["event"], last["grant"], last["order"], last["run"]) == ("charged", grant.id, "order 3", "run/main/0")
    assert last["plan"] == PLAN.to_dict()
    assert states(ledger)[-1] == "reserved"
    charge(ledger, "order 3")  # handed out again: noted once
    assert events(place)[-1:] == ["charged"]
    assert events(place).count("charged") == 3


def test_an_older_copy_is_refused_where_a_site_starts_where_it_is_checked_and_where_it_is_charged(place: Place) -> None:
    ledger, copy = place.open_ledger(), backup(place)
    answered(place, ledger, "order 3")
    restore(place, copy)
    says = r"knows less than the audit trail: 1 grant\(s\) and 0 release.* `fedsynth site declare-loss DIR`"
    with pytest.raises(LedgerBehind, match=says):
        _open_account(place)
    [found] = [finding for finding in check(place) if finding.what == "budget"]
    assert found.state == "problem"
    assert "knows less than the audit trail" in found.says
    before = events(place)
    with pytest.raises(LedgerBehind, match=says):  # a ledger that was opened before
        charge(ledger, "order 4")
    with pytest.raises(LedgerBehind, match=says):
        ledger.charge_without_guarantee("asked for", "run/main/0")
    assert (len(states(Ledger(place.ledger, Account("ward", None)))), events(place)) == (2, before)


def test_without_the_witness_the_same_round_is_spent_twice_and_counted_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, copy = place.open_ledger(), backup(place)
    answered(place, ledger, "order 3")
    counted = ledger.spent()[0]
    restore(place, copy)
    monkeypatch.setattr("fedsynth.privacy.ledger.check_witness", lambda *_: None)  # broken: a ledger asks nobody
    trusting = place.open_ledger()
    answered(place, trusting, "order 4")
    assert trusting.spent()[0] == counted
    assert events(place).count("charged") == 4


def test_a_declared_loss_is_counted_at_the_plan_of_the_trail_and_opens_the_account(place: Place) -> None:
    copy, ledger = backup(place), place.open_ledger()
    three = [answered(place, ledger, "order 3"), answered(place, ledger, "order 4"), charge(ledger, "order 5")]
    restore(place, copy)
    found, charges = lost(place)
    assert [c.grant for c in charges] == [grant.id for grant in three]
    declare(place, found, charges)
    again = place.open_ledger()
    assert again.spent() == (composed_epsilon([replace(PLAN, rounds=5)], 1e-5), 1e-5)
    assert states(again) == ["sent", "sent", "abandoned", "abandoned", "abandoned"]
    read = contents(place.ledger)
    assert problems(read) == []
    assert [row["reason"] for row in read["reservations"]][:2] == [None, None]
    assert all("loss declared by" in row["reason"] for row in read["reservations"][2:])
    last = list(entries(place.audit_log))[-1]
    assert (last["event"], last["grants"]) == ("lost", [grant.id for grant in three])
    assert " (uid " in last["by"]
    with pytest.raises(GrantUsed, match="not of the ledger"):
        again.begin(three[2])
    assert charge(again, "order 3").id not in {grant.id for grant in three}  # its answer is gone: paid for anew
    restore(place, copy)  # and the same copy once more is found out once more
    with pytest.raises(LedgerBehind, match=r"4 grant\(s\)"):
        place.open_ledger()


def test_a_lost_grant_that_an_old_trail_has_without_a_plan_takes_the_whole_cap(place: Place) -> None:
    copy, ledger = backup(place), place.open_ledger()
    grant = answered(place, ledger, "order 3")
    lines = [json.loads(line) for line in place.audit_log.read_bytes().splitlines()]
    place.audit_log.unlink()
    for line in lines:  # as it was written before charges stood in it
        if line["event"] != "charged":
            place.witness().add(**{key: value for key, value in line.items() if key not in ("at", "before", "dataset")})
    place.open_ledger()
    restore(place, copy)
    with pytest.raises(LedgerBehind):
        place.open_ledger()
    found, charges = lost(place)
    assert [(c.grant, c.run, c.plan) for c in charges] == [(grant.id, "run/main/0", None)]
    declare(place, found, charges)
    again = place.open_ledger()
    assert (again.spent()[0], again.filtered()) == (math.inf, math.inf)
    assert not again.waived("run/main/0")  # nothing left without a guarantee
    assert problems(contents(place.ledger)) == []
    assert [finding.state for finding in check(place) if finding.what == "budget"] == ["problem"]


def test_a_lost_release_without_guarantee_is_one_again(place: Place) -> None:
    copy, ledger = backup(place), place.open_ledger()
    assert ledger.charge_without_guarantee("asked for", "run/bare/0")
    assert not ledger.charge_without_guarantee("asked for", "run/bare/0")
    assert events(place).count("charged") == 3
    restore(place, copy)
    with pytest.raises(LedgerBehind, match=r"0 grant\(s\) and 1 release"):
        place.open_ledger()
    declare(place, *lost(place))
    again = place.open_ledger()
    assert again.spent()[0] == math.inf
    assert again.waived("run/bare/0")
    # Of a trail that was written before, the release that was stored.
    place.witness().add("asked", order="o", envelope={"run": "run", "arm": "old", "seed": 0})
    place.witness().add("stored", order="o", grants=[], guarantee="none", delta=1e-5)
    with pytest.raises(LedgerBehind, match="1 release"):
        place.open_ledger()


def shared(place: Place, name: str = "south") -> Place:
    """Another site of the same hospital, in another federation: the same account, a trail of its own."""
    made = Place(replace(place.site, name=name, accounts=str(place.accounts)), place.folder.parent / name)
    made.state.mkdir(parents=True)
    return made


@pytest.mark.parametrize(
    "look",
    [
        _open_account,
        lambda south: list(check(south)),
        lambda south: charge(south.open_ledger(), "order of south", "other/main/0"),
    ],
)
def test_each_site_of_a_shared_account_knows_what_the_other_charged(place: Place, look: Any) -> None:
    south, copy = shared(place), backup(place)
    three = answered(place, place.open_ledger(), "order 3")
    bare = place.open_ledger()
    bare.charge_without_guarantee("asked for", "run/bare/0") if look is _open_account else None
    look(south)
    seen = [entry for entry in entries(south.audit_log) if entry["event"] == "seen"]
    assert three.id in {entry.get("grant") for entry in seen}
    assert all(entry["dataset"] == "ward" and not entry.keys() & {"superlink", "strategy"} for entry in seen)
    lines = len(south.audit_log.read_bytes().splitlines())
    look(south) if look is _open_account else south.open_ledger().tell_witness()
    assert len(south.audit_log.read_bytes().splitlines()) == lines  # each is told once
    restore(place, copy)
    for site in (place, south):  # whoever asks first
        with pytest.raises(LedgerBehind, match="knows less than the audit trail"):
            site.open_ledger()
    declare(south, *lost(south))
    spent = south.open_ledger().spent()[0]
    assert spent == math.inf if look is _open_account else spent >= composed_epsilon([replace(PLAN, rounds=3)], 1e-5)
    assert problems(contents(place.ledger)) == []
    place.open_ledger()


class Forgetful(Ledger):
    """Broken: as it was, a witness is told of its own charges alone."""

    def _untold(self, *told: Any) -> Any:
        return [charge for charge in super()._untold(*told) if charge.order == "order of south"]


def test_a_witness_of_its_own_charges_alone_lets_a_shared_account_be_spent_twice(place: Place) -> None:
    south, copy = shared(place), backup(place)
    answered(place, place.open_ledger(), "order 3")
    told = (place.ledger, Account("ward", Budget(20.0)))
    Forgetful(*told, witness=south.witness(), opening=Opening(create=False)).tell_witness()
    restore(place, copy)
    Forgetful(*told, witness=south.witness(), opening=Opening(create=False))


def test_a_lifetime_that_is_lowered_before_the_first_run_chooses_the_order_and_later_is_told(place: Place) -> None:
    def under(site: Place, epsilon: float) -> Place:
        return Place(replace(site.site, policy=replace(site.site.policy, lifetime=Budget(epsilon))), site.folder)

    def told(site: Place) -> list[str]:
        return [found.says for found in check(site) if found.what == "budget" and found.state == "warning"]

    fresh = Place(replace(place.site, data=replace(place.site.data, id="clinic")), place.folder)
    assert under(fresh, 10.0).open_ledger(create=True).order == 3
    [said] = told(under(fresh, 2.0))
    assert "was last used under a lifetime of epsilon 10 at delta 1e-05, here it is 2 at 1e-05" in said
    assert told(under(fresh, 2.0)) == []
    assert under(fresh, 2.0).open_ledger().order == 8
    assert under(fresh, 10.0).open_ledger().order == 3
    charge(under(fresh, 10.0).open_ledger(), "order 1")
    assert told(under(fresh, 10.0)) == []
    full, last = told(under(fresh, 4.5))
    assert re.search(r"the filter has order 3, .* below epsilon 4\.802 that order has no room", full)
    assert "another site that uses the account says so" in last


def test_a_grant_whose_answer_was_stored_does_not_run_again_from_a_copy_of_before(place: Place) -> None:
    ledger = place.open_ledger()
    grant = charge(ledger, "order 3")
    ledger.begin(grant)
    copy = backup(place)
    ledger.store(grant, b"text")
    place.witness().add("stored", order="order 3", grants=[grant.id], guarantee="dp", epsilon=1.0, delta=1e-5)
    restore(place, copy)
    with pytest.raises(LedgerBehind):
        place.open_ledger()
    declare(place, *lost(place))
    again = place.open_ledger()
    assert states(again) == ["sent", "sent", "abandoned"]
    assert again.spent()[0] == composed_epsilon([replace(PLAN, rounds=3)], 1e-5)
    with sqlite3.connect(place.ledger) as db:
        assert db.execute("SELECT COUNT(*) FROM grants WHERE key IS NOT NULL").fetchone() == (0,)


class Dying(AuditLog):
    """Its process dies before it has written a charge down, or right after."""

    after = False

    def note(self, charge: Any) -> None:
        if self.after:
            super().note(charge)
        die()


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_the_ledger_and_the_trail_is_no_alarm_and_leaves_no_hole(
    place: Place, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = backup(place)
    monkeypatch.setattr(Dying, "after", after)
    killed(lambda: charge(place.open_ledger(witness=Dying(place.audit_log, {"dataset": "ward"})), "order 3"))
    ledger = place.open_ledger()  # no alarm
    assert states(ledger) == ["sent", "sent", "reserved"]
    known = [c.grant for c in place.witness().known()]
    assert len(known) == (3 if after else 2)  # what is not in the trail never ran: nothing is lost with it
    grant = charge(ledger, "order 3")
    assert [c.grant for c in place.witness().known()][2:] == [grant.id]
    ledger.begin(grant)
    restore(place, copy)
    with pytest.raises(LedgerBehind):
        place.open_ledger()


def test_processes_that_charge_together_raise_no_alarm(place: Place) -> None:
    def work(worker: int) -> None:
        ledger = place.open_ledger()
        for number in range(4):
            charge(ledger, f"order {worker} {number}", f"run{worker}/main/0")

    place = Place(replace(place.site, policy=replace(place.site.policy, lifetime=Budget(100.0))), place.folder)
    processes = [FORK.Process(target=work, args=(worker,)) for worker in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert len(place.witness().known()) == len(states(place.open_ledger())) == 2 + 12


def test_another_data_set_s_charges_are_not_looked_for(place: Place) -> None:
    other = Place(replace(place.site, data=replace(place.site.data, id="clinic")), place.folder)
    fresh = other.open_ledger(create=True)
    charge(fresh, "order 1")
    assert place.open_ledger().spent()[0] == composed_epsilon([PLAN, PLAN], 1e-5)
    assert [c.order for c in other.witness().known()] == ["order 1"]


def test_a_changed_line_does_not_hide_the_grants_of_others(place: Place) -> None:
    copy = backup(place)
    answered(place, place.open_ledger(), "order 3")
    restore(place, copy)
    lines = place.audit_log.read_bytes().split(b"\n")
    place.audit_log.write_bytes(b"\n".join([b"scribbled over", *lines[1:]]))
    with pytest.raises(AuditLogCorrupted):
        list(entries(place.audit_log))
    with pytest.raises(LedgerBehind):
        place.open_ledger()


def test_a_ledger_and_a_trail_from_one_backup_stay_undetected(place: Place) -> None:
    """Said in docs/deployment/site.md: the two agree."""
    copy, audit_log = backup(place), place.audit_log.read_bytes()
    answered(place, place.open_ledger(), "order 3")
    restore(place, copy)
    place.audit_log.write_bytes(audit_log)
    assert place.open_ledger().spent()[0] == composed_epsilon([PLAN, PLAN], 1e-5)


def gone(place: Place) -> None:
    place.ledger.unlink()
    with pytest.raises(
        BadValue, match=r"is gone .* `fedsynth site declare-loss DIR` makes one that holds every charge"
    ):
        _open_account(place)


def test_an_account_that_is_gone_is_made_anew_with_every_charge_of_the_trail(place: Place) -> None:
    ledger, order = place.open_ledger(), place.open_ledger().order
    grants = [row["id"] for row in ledger.entries() if row["kind"] == "grant"]
    charge(ledger, "order 3")
    spent = ledger.spent()
    gone(place)
    found, charges = lost(place)
    assert found is None
    assert [c.grant for c in charges][:2] == grants
    assert not place.ledger.exists()  # looked at, and nothing changed
    wide = Place(replace(place.site, policy=replace(place.site.policy, lifetime=Budget(2.0))), place.folder)
    made = declare(wide, *lost(wide))
    assert made.order == order != order_for(Budget(2.0))  # fixed before the first of them: the trail says it
    again = place.open_ledger()
    assert again.spent() == (composed_epsilon([replace(PLAN, rounds=3)], 1e-5), 1e-5)
    assert again.spent() == spent
    assert states(again) == ["abandoned"] * 3
    assert problems(contents(place.ledger)) == []
    _open_account(place)
    assert lost(place)[1] == []
    last = list(entries(place.audit_log))[-1]
    assert (last["event"], last["account"], len(last["grants"])) == ("lost", "gone", 3)


def test_an_account_that_is_gone_stays_so_where_a_line_of_the_trail_is(place: Place) -> None:
    gone(place)
    lines = place.audit_log.read_bytes().split(b"\n")
    place.audit_log.write_bytes(b"\n".join([*lines[:4], *lines[5:]]))  # it says who paid, or it does not: nobody knows
    with pytest.raises(BadValue, match="the trail was changed"):
        lost(place)
    place.audit_log.unlink()
    with pytest.raises(BadValue, match="nothing of it is lost"):
        lost(place)


def test_a_process_that_is_killed_while_it_makes_the_account_anew_leaves_it_closed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone(place)
    monkeypatch.setattr(Ledger, "declare_lost", lambda *_: die())
    killed(lambda: declare(place, *lost(place)))
    monkeypatch.undo()
    with pytest.raises(LedgerBehind):
        place.open_ledger()
    declare(place, *lost(place))
    assert place.open_ledger().spent()[0] == composed_epsilon([PLAN, PLAN], 1e-5)


DAMAGED = (
    b'{"event":"stored","dataset":"ward","grants":null}',
    b'{"event":"stored","dataset":"ward","grants":7,"guarantee":["none"]}',
    b'{"event":"stored","dataset":"ward","grants":[null,{"a":1}]}',
    b'{"event":"charged","dataset":"ward","grant":"g","plan":{"records":"many"}}',
    b'{"event":"charged","dataset":"ward","grant":"g","plan":[1],"filter":"3"}',
    b'{"event":"charged","dataset":"ward","grant":null,"run":null}',
    b'{"event":"asked","dataset":"ward","order":[],"envelope":[]}',
    b'{"event":{},"dataset":"ward"}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 5_000,
    b'"text"',
    b"\xff\xfe\0",
    b"",
)


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_of_the_trail_is_told_in_one_line_and_stops_no_reading(
    place: Place, line: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    known = place.witness().known()
    whole = place.audit_log.read_bytes()
    for content in (line + b"\n" + whole, whole + line + b"\n" + whole):
        place.audit_log.write_bytes(content)
        assert {c.grant for c in known} <= {c.grant for c in place.witness().known()}
        with pytest.raises(AuditLogCorrupted, match=r"line \d+: it does not follow"):
            list(entries(place.audit_log))
    place.ledger.unlink()
    place.audit_log.write_bytes(line + b"\n")
    (place.folder / "site.toml").write_text(SITE)
    monkeypatch.setattr(sys, "argv", ["fedsynth", "site", "declare-loss", str(place.folder)])
    with pytest.raises(SystemExit) as ended:
        fedsynth.cli.main.main()
    said = capfd.readouterr().err
    assert (ended.value.code, len(said.splitlines())) == (2, 1)
    assert said.startswith("fedsynth: bad input: ")


SITE = """
name = "north"
[superlink]
address = "127.0.0.1:9443"
[data]
id = "ward"
source = "notes.csv"
labels = ["a", "b"]
person = "person"
records = 100
[policy]
lifetime = { epsilon = 20.0, delta = 1e-5 }
minimum_records = 1
"""


def test_the_command_shows_a_loss_and_declares_it_when_told_to(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def typed(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedsynth", *words])
        with pytest.raises(SystemExit) as ended:
            fedsynth.cli.main.main()
        return (ended.value.code, *capfd.readouterr())

    folder = str(place.folder)
    (place.folder / "site.toml").write_text(SITE)
    assert "nothing is missing" in typed("site", "declare-loss", folder)[2]
    copy = backup(place)
    grant = answered(place, place.open_ledger(), "order 3")
    restore(place, copy)
    code, out, said = typed("site", "declare-loss", folder)
    assert (code, grant.id in out, "1 missing, nothing changed" in said) == (0, True, True)
    assert typed("site", "check", folder, "--json")[1].count("knows less than the audit trail") == 1
    code, out, _ = typed("site", "declare-loss", folder, "--confirm", "--json")
    told = json.loads(out)
    three = composed_epsilon([replace(PLAN, rounds=3)], 1e-5)
    assert (code, told["declared"], told["epsilon"], len(told["missing"])) == (0, True, pytest.approx(three), 1)
    assert told["epsilon_filter"] > three
    assert "nothing is missing" in typed("site", "declare-loss", folder)[2]
    code, out, _ = typed("ledger", "show", folder)
    assert code == 0
    assert re.search(r"4 steps x 1.* 1 of 1 .* lost ", out)
    assert typed("ledger", "verify", folder)[0] == 0
    place.ledger.unlink()
    code, out, said = typed("site", "declare-loss", folder)
    assert (code, grant.id in out, "is gone: with --confirm a new one is made" in said) == (0, True, True)
    assert not place.ledger.exists()
    assert json.loads(typed("site", "declare-loss", folder, "--json")[1])["gone"] is True
    code, _, said = typed("site", "declare-loss", folder, "--confirm")
    assert (code, "a new account holds what the trail knows" in said, f"epsilon {three:.4g}" in said) == (0, True, True)
    assert typed("ledger", "verify", folder)[0] == 0


def test_text_of_an_order_whose_grant_was_lost_is_not_sent_again_for_nothing(place: Place) -> None:
    copy, ledger = backup(place), place.open_ledger()
    answered(place, ledger, "order 3")
    assert ledger.answered("order 3") is not None
    restore(place, copy)
    declare(place, *lost(place))
    again = place.open_ledger()
    assert again.answered("order 3") is None
    assert answer(again, "order 3", run="run/main/0")
    assert again.spent()[0] == composed_epsilon([replace(PLAN, rounds=4)], 1e-5)
