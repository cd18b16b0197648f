from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import signal
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsynth.corpus import Corpus, Provenance
from fedsynth.privacy import ledger as ledger_module
from fedsynth.privacy.caps import Account, BudgetExhausted
from fedsynth.privacy.filter import epsilon_at, order_for, room, used
from fedsynth.privacy.ledger import Binding, Grant, GrantUsed, Ledger
from fedsynth.privacy.ledger_file import LedgerUnusable
from fedsynth.privacy.noise import data_mac, simulated_key
from fedsynth.privacy.plan import Budget, DPPlan, composed_epsilon, epsilon, event_epsilon, plan

PLAN = DPPlan(100, 100, 4, 1, 1.0, 4.0, 1e-5)  # full batches: epsilon takes milliseconds
COST = epsilon(PLAN, 1e-5)
TEXT = Corpus(("cough", "fever"), ("flu", "flu"), Provenance.PRIVATE)
plan_module = importlib.import_module("fedsynth.privacy.plan")  # `privacy.plan` is the function
FORK = multiprocessing.get_context("fork")


def open_ledger(path: Path, cap: Budget | None = None, *, per_run: Budget | None = None, **more: Any) -> Ledger:
    return Ledger(path / "ward.sqlite", Account("ward", cap, per_run), **more)


def bind(ledger: Ledger, order: str = "order 1", plan: DPPlan = PLAN, text: Corpus = TEXT) -> Binding:
    return Binding(order, plan.digest(), data_mac(ledger.mac_key, text), "model", "0.1")


def charge(ledger: Ledger, order: str = "order 1", plan: DPPlan = PLAN, run: str = "run", text: Corpus = TEXT) -> Grant:
    return ledger.charge(plan, bind(ledger, order, plan, text), run)


def answer(ledger: Ledger, order: str = "order 1", plan: DPPlan = PLAN, run: str = "run") -> bytes:
    """One order as a site deals with it: the answer is the noise itself."""
    stored = ledger.answered(order)
    if stored is not None:
        return stored
    grant = charge(ledger, order, plan, run)
    made = ledger.begin(grant).normals(4).tobytes()
    ledger.store(grant, made)
    ledger.mark_sent(order)
    return made


def states(ledger: Ledger) -> list[str]:
    return [row["state"] for row in ledger.entries() if row["kind"] == "grant"]


def killed(action: Callable[[], object]) -> None:
    """Runs `action` in a process of its own, which dies by SIGKILL right after, or in the midst of it."""

    def child() -> None:
        action()
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def die(*_: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_order_goes_through_its_states(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    grant = charge(ledger)
    assert states(ledger) == ["reserved"]
    ledger.begin(grant)
    assert states(ledger) == ["running"]
    ledger.store(grant, b"text")
    assert (states(ledger), ledger.answered("order 1")) == (["stored"], b"text")
    ledger.mark_sent("order 1")
    ledger.mark_sent("order 1")
    assert (states(ledger), ledger.answered("order 1")) == (["sent"], b"text")
    assert ledger.spent() == (COST, 1e-5)
    assert grant.counter == 1
    assert len(bytes.fromhex(grant.id)) == 16


VOTES = DPPlan(100, 100, 1, 1, 1.0, 3.0, 1e-5, "votes")


def test_plans_that_were_fixed_together_are_reserved_together(tmp_path: Path) -> None:
    both = composed_epsilon([PLAN, VOTES], 1e-5)
    ledger = open_ledger(tmp_path, Budget(both + 1e-3))
    grant = ledger.charge(PLAN, bind(ledger), "run", beside=[VOTES])
    assert ledger.spent()[0] == both  # before a vote is asked for
    ledger.begin(grant)
    ledger.store(grant, b"drafts")
    votes = ledger.charge(VOTES, bind(ledger, "order 2", VOTES), "run")
    assert (votes.plan, ledger.spent()[0]) == (VOTES, both)
    with pytest.raises(BudgetExhausted):  # a second vote was not planned
        ledger.charge(VOTES, bind(ledger, "order 3", VOTES), "run")
    assert ledger.rounds("run", VOTES) == 1


def test_a_vote_that_was_not_fixed_with_the_training_does_not_fit_after_it(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, Budget(composed_epsilon([PLAN, VOTES], 1e-5) + 1e-3))
    charge(ledger)
    with pytest.raises(BudgetExhausted):
        ledger.charge(VOTES, bind(ledger, "order 2", VOTES), "run")


def test_plans_that_pass_a_budget_together_reserve_nothing(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, Budget(COST + 1e-3))
    with pytest.raises(BudgetExhausted):
        ledger.charge(PLAN, bind(ledger), "run", beside=[VOTES])
    assert ledger.entries() == []
    charge(ledger)  # alone it fits


def test_killed_while_charging_nothing_is_spent(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    binding = bind(ledger)
    killed(lambda: open_ledger(tmp_path, keys=die).charge(PLAN, binding, "run"))  # inside the open transaction
    assert ledger.entries() == []
    charge(ledger)
    assert ledger.spent()[0] == COST


@pytest.mark.parametrize("state", ["reserved", "running", "storing"])
def test_killed_before_stored_the_same_grant_runs_again(tmp_path: Path, state: str) -> None:
    ledger = open_ledger(tmp_path)

    def work() -> None:
        grant = charge(ledger)
        (tmp_path / "id").write_text(grant.id)
        if state == "reserved":
            return
        (tmp_path / "noise").write_bytes(ledger.begin(grant).normals(4).tobytes())
        if state == "storing":
            ledger_module.now = die  # after the key's erasure, before the commit
            ledger.store(grant, b"text")

    killed(work)
    assert states(ledger) == ["reserved" if state == "reserved" else "running"]
    assert ledger.answered("order 1") is None
    grant = charge(ledger)
    assert grant.id == (tmp_path / "id").read_text()
    noise = ledger.begin(grant).normals(4).tobytes()
    assert state == "reserved" or noise == (tmp_path / "noise").read_bytes()
    ledger.store(grant, b"text")
    assert ledger.spent()[0] == COST
    assert states(ledger) == ["stored"]


@pytest.mark.parametrize("state", ["stored", "sent"])
def test_killed_after_stored_the_same_bytes_are_sent(tmp_path: Path, state: str) -> None:
    ledger = open_ledger(tmp_path)

    def work() -> None:
        grant = charge(ledger)
        ledger.begin(grant)
        ledger.store(grant, b"text")
        if state == "sent":
            ledger.mark_sent("order 1")

    killed(work)
    assert states(ledger) == [state]
    assert answer(ledger) == b"text"
    with pytest.raises(GrantUsed, match="answered"):
        charge(ledger)
    assert ledger.spent()[0] == COST


def test_an_order_delivered_twice_is_answered_with_the_same_bytes(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    first = answer(ledger)
    assert answer(ledger) == first
    assert len(states(ledger)) == 1
    assert answer(ledger, "order 2") != first


def test_a_grant_begins_once(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    grant = charge(ledger)
    ledger.begin(grant)
    with pytest.raises(GrantUsed, match="running"):
        ledger.begin(grant)
    ledger.store(grant, b"text")
    with pytest.raises(GrantUsed, match="stored"):
        ledger.begin(grant)
    with pytest.raises(GrantUsed, match="stored"):
        ledger.store(grant, b"other text")
    assert ledger.answered("order 1") == b"text"


def test_a_forged_grant_does_not_begin(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    grant = charge(ledger)
    less = replace(PLAN, noise_multiplier=0.1)
    for forged in (
        replace(grant, id="00"),
        replace(grant, plan=less),
        replace(grant, counter=2),
        replace(grant, binding=replace(grant.binding, data="other")),
    ):
        with pytest.raises(GrantUsed, match="not of the ledger"):
            ledger.begin(forged)
    with pytest.raises(ValueError, match="binding names plan"):
        ledger.charge(less, bind(ledger, "order 2"), "run")


def test_answers_are_stored_in_turn(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    grant = charge(ledger)
    with pytest.raises(GrantUsed, match="reserved"):
        ledger.store(grant, b"text")
    with pytest.raises(GrantUsed, match="stored before it is sent"):
        ledger.mark_sent("order 1")
    with pytest.raises(GrantUsed, match="no such grant"):
        ledger.store("order 9", b"text")
    ledger.begin(grant)
    ledger.store("order 1", b"text")
    assert ledger.answered("order 1") == b"text"


class Refunding(Ledger):
    """Broken: gives back what a crashed run was charged."""

    def charge(self, plan: DPPlan, binding: Binding, run: str) -> Grant:
        with sqlite3.connect(self.path) as db:
            db.execute("DELETE FROM grants WHERE state = 'running'")
            db.execute("DELETE FROM spent WHERE id NOT IN (SELECT spent FROM grants)")
        return super().charge(plan, binding, run)


def edited_resume(ledger: Ledger) -> tuple[Grant, Grant, bool]:
    """A run dies after it began, one record is edited, the order comes again: both grants; same noise?"""
    first = charge(ledger)
    noise = ledger.begin(first).normals(100)
    second = charge(ledger, text=replace(TEXT, prompts=("cough", "no fever")))
    return first, second, np.array_equal(noise, ledger.begin(second).normals(100))


@pytest.mark.parametrize("simulated", [False, True])
def test_an_edited_record_takes_a_new_grant_a_new_charge_and_new_noise(tmp_path: Path, simulated: bool) -> None:
    keys = {"keys": lambda counter, binding: simulated_key(1, 2, counter, binding)} if simulated else {}
    ledger = open_ledger(tmp_path, **keys)
    first, second, same = edited_resume(ledger)
    assert first.id != second.id
    assert not same
    assert states(ledger) == ["abandoned", "running"]
    assert ledger.spent()[0] == epsilon(replace(PLAN, rounds=2), 1e-5)
    with pytest.raises(GrantUsed, match="abandoned"):
        ledger.begin(first)


def test_a_refund_after_running_would_be_seen(tmp_path: Path) -> None:
    broken = Refunding(tmp_path / "ward.sqlite", Account("ward", None))
    edited_resume(broken)
    assert broken.spent()[0] < epsilon(replace(PLAN, rounds=2), 1e-5)


def test_rounds_draw_from_one_reservation(tmp_path: Path) -> None:
    plan = replace(PLAN, rounds=3)
    whole = epsilon(replace(PLAN, steps=12), 1e-5)
    ledger = open_ledger(tmp_path, cap=Budget(whole))
    for round in range(3):
        answer(ledger, f"round {round}", plan)
        assert ledger.spent()[0] == whole  # all of it from the first round on
    with pytest.raises(BudgetExhausted):
        answer(ledger, "round 3", plan)
    roomy = open_ledger(tmp_path, cap=Budget(100.0))
    answer(roomy, "round 3", plan)
    assert roomy.spent()[0] == epsilon(replace(PLAN, steps=16), 1e-5)
    assert [r["rounds"] for r in roomy.entries() if r["kind"] == "reservation"] == [3, 1]
    # What a statement says is what was paid, not what was planned.
    assert (roomy.rounds("run", plan), roomy.rounds("another run", plan), roomy.rounds("run", PLAN)) == (4, 0, 0)


def test_a_retry_leaves_later_rounds_their_reservation(tmp_path: Path) -> None:
    plan = replace(PLAN, rounds=2)
    ledger = open_ledger(tmp_path)
    ledger.begin(charge(ledger, "round 0", plan))

    def drawn() -> list[tuple[int, int]]:
        return [(r["drawn"], r["rounds"]) for r in ledger.entries() if r["kind"] == "reservation"]

    assert drawn() == [(1, 2)]
    charge(ledger, "round 0", plan, text=replace(TEXT, prompts=("cough", "no fever")))
    assert drawn() == [(1, 2), (1, 1)]
    charge(ledger, "round 1", plan)
    assert drawn() == [(2, 2), (1, 1)]


def test_another_run_or_plan_is_another_reservation(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    answer(ledger, "a", run="seed 0")
    answer(ledger, "b", run="seed 1")
    assert ledger.spent()[0] == epsilon(replace(PLAN, steps=8), 1e-5)
    assert ledger.spent(run="seed 0")[0] == COST
    other = replace(PLAN, noise_multiplier=8.0)
    answer(ledger, "c", plan=other, run="seed 0")
    assert ledger.spent(run="seed 0")[0] > COST


def test_an_exhausted_budget_leaves_no_row(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, cap=Budget(COST))
    answer(ledger)
    before = ledger.entries()
    one, two = (epsilon_at(used([PLAN] * n, ledger.order), ledger.order, 1e-5) for n in (1, 2))
    said = rf"pass the lifetime cap of data set 'ward', epsilon {COST:.6g} at .*1 plan.* {one:.4g}, .* at {two:.4g}$"
    with pytest.raises(BudgetExhausted, match=said):
        charge(ledger, "order 2")
    assert ledger.entries() == before
    # The cap is the data's: another run, a reopened ledger or edited rows do not reset it.
    with pytest.raises(BudgetExhausted):
        charge(open_ledger(tmp_path, cap=Budget(COST)), "order 3", run="next", text=replace(TEXT, prompts=("a", "b")))


class Hasty(Ledger):
    """Broken: looks at the budget first and charges later, in a transaction of its own."""

    def charge(self, plan: DPPlan, binding: Binding, run: str) -> Grant:
        if self.spent()[0] > 0:
            raise BudgetExhausted
        BARRIER.wait(30)  # all have looked
        return Ledger(self.path, replace(self.account, cap=None)).charge(plan, binding, run)


RACERS = 4
BARRIER = FORK.Barrier(RACERS)


def winners(path: Path, kind: type[Ledger]) -> int:
    """How many of some processes get the last of a budget that is enough for one."""
    assert epsilon(replace(PLAN, rounds=2), 1e-5) > 1.2 * COST
    ledger = kind(path / "ward.sqlite", Account("ward", Budget(1.2 * COST)))
    bindings = [bind(ledger, f"order {i}") for i in range(RACERS)]
    start = FORK.Barrier(RACERS)

    def race(i: int) -> None:
        start.wait(30)
        try:
            ledger.charge(PLAN, bindings[i], f"run {i}")
        except BudgetExhausted:
            os._exit(3)
        os._exit(0)

    processes = [FORK.Process(target=race, args=(i,)) for i in range(RACERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    assert set(codes) <= {0, 3}
    assert len(states(ledger)) == codes.count(0)
    return codes.count(0)


def test_of_processes_charging_the_last_of_a_budget_one_wins(tmp_path: Path) -> None:
    for attempt in range(3):
        (tmp_path / str(attempt)).mkdir()
        assert winners(tmp_path / str(attempt), Ledger) == 1
    assert winners(tmp_path, Hasty) > 1  # the test sees who looks before the transaction


def test_processes_that_create_a_ledger_together_share_it(tmp_path: Path) -> None:
    def work(i: int) -> None:
        ledger = open_ledger(tmp_path / "new")
        charge(ledger, f"order {i}", run=f"run {i}")

    processes = [FORK.Process(target=work, args=(i,)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * 4
    assert len(states(open_ledger(tmp_path / "new"))) == 4
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["ward.sqlite"]


def test_the_key_is_erased_when_the_answer_is_stored(tmp_path: Path) -> None:
    keys: list[bytes] = []

    def key(counter: int, binding: str) -> bytes:
        keys.append(simulated_key(5, 6, counter, binding))
        return keys[-1]

    def on_disk(secret: bytes) -> bool:
        return any(secret in path.read_bytes() for path in tmp_path.iterdir())

    ledger = open_ledger(tmp_path, keys=key)
    grant = charge(ledger)
    assert len(keys) == 2  # of the data MAC, of the grant
    ledger.begin(grant)
    assert on_disk(keys[1])  # the search finds it while it is needed
    assert keys[1].hex() not in repr((grant, ledger.entries()))
    ledger.store(grant, b"text" * 1000)
    assert not on_disk(keys[1])
    ledger.begin(charge(ledger, "order 2"))
    charge(ledger, "order 2", text=replace(TEXT, prompts=("a", "b")))
    assert not on_disk(keys[2])  # abandoned
    assert on_disk(keys[3])
    assert on_disk(ledger.mac_key)


def test_keys_among_many_grants_are_erased(tmp_path: Path) -> None:
    keys: list[bytes] = []

    def key(counter: int, binding: str) -> bytes:
        keys.append(simulated_key(5, 6, counter, binding))
        return keys[-1]

    ledger = open_ledger(tmp_path, keys=key)
    grants = [charge(ledger, f"order {i}" + "x" * i) for i in range(12)]
    for grant in grants:
        ledger.begin(grant)
    for grant in grants[::2]:
        ledger.store(grant, b"t")
    raw = ledger.path.read_bytes()
    # Parts too: freed bytes are reused in part, and half a key is half a secret.
    parts = [[secret[at : at + 8] in raw for at in (0, 8, 16, 24)] for secret in keys[1:]]
    assert parts == [[grant not in grants[::2]] * 4 for grant in grants]


def test_simulated_worlds_repeat_and_sites_do_not(tmp_path: Path) -> None:
    def world(name: str, seed: int | None) -> tuple[str, bytes]:
        keys = {} if seed is None else {"keys": lambda counter, binding: simulated_key(seed, 0, counter, binding)}
        ledger = Ledger(tmp_path / name, Account("ward", None), **keys)
        grant = charge(ledger)
        return grant.id, ledger.begin(grant).normals(4).tobytes()

    assert world("a", 1) == world("b", 1)
    assert world("a2", 1)[0] != world("c", 2)[0]
    site, other = world("d", None), world("e", None)
    assert site[0] != other[0]
    assert site[1] != other[1]


def test_a_release_without_guarantee_is_infinite_for_ever(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    answer(ledger)
    assert not ledger.waived("run 2")
    assert ledger.charge_without_guarantee("FedPIT arm", "run 2")
    assert not ledger.charge_without_guarantee("FedPIT arm", "run 2")  # as a repeated order does
    assert [e["kind"] for e in ledger.entries()].count("no_guarantee") == 1
    assert ledger.waived("run 2")
    assert not ledger.waived("run")
    answer(ledger, "order 2")
    assert ledger.spent()[0] == math.inf
    assert ledger.spent(run="run")[0] < math.inf
    assert ledger.spent(run="run 2")[0] == math.inf
    capped = open_ledger(tmp_path, cap=Budget(1000.0))
    with pytest.raises(BudgetExhausted, match="epsilon inf, with what is asked at inf; something left without"):
        charge(capped, "order 3")
    with pytest.raises(ValueError, match="reason"):
        ledger.charge_without_guarantee(" ", "run")


def test_orders_that_spend_nothing_are_answered_once_too(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    assert ledger.answered("learn") is None
    ledger.store_answer("learn", b"done")
    ledger.store_answer("learn", b"done")
    with pytest.raises(GrantUsed, match="another answer"):
        ledger.store_answer("learn", b"done otherwise")
    ledger.mark_sent("learn")
    assert ledger.answered("learn") == b"done"
    assert ledger.spent() == (0.0, 1e-5)
    charge(ledger)
    with pytest.raises(GrantUsed, match="under a grant"):
        ledger.store_answer("order 1", b"text")


def test_the_strictest_delta_counts(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    answer(ledger, "a")
    answer(ledger, "b", plan=replace(PLAN, delta=1e-7))
    assert ledger.spent() == (epsilon(replace(PLAN, steps=8), 1e-7), 1e-7)
    assert open_ledger(tmp_path, cap=Budget(9.0, 1e-6)).spent()[1] == 1e-6


def test_commits_are_flushed_and_deletions_overwritten(tmp_path: Path) -> None:
    with open_ledger(tmp_path)._transaction() as db:
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 3  # EXTRA: FULL (2) and the folder
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
        assert db.execute("PRAGMA secure_delete").fetchone()[0] == 1


def test_only_the_owner_reads_the_file(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
    ledger.path.chmod(0o644)
    assert stat.S_IMODE(open_ledger(tmp_path).path.stat().st_mode) == 0o600


def test_another_ledger_is_refused(tmp_path: Path) -> None:
    path = open_ledger(tmp_path).path
    key = open_ledger(tmp_path).mac_key
    assert open_ledger(tmp_path).mac_key == key
    with pytest.raises(LedgerUnusable, match="account of data set 'ward', not of 'clinic'"):
        Ledger(path, Account("clinic", None))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = 0 WHERE name = 'schema'")
    with pytest.raises(LedgerUnusable, match="schema 0"):
        open_ledger(tmp_path)


def scramble(raw: bytes) -> bytes:
    return raw[:4096] + bytes(255 - b for b in raw[4096:])


@pytest.mark.parametrize(
    "damage", [lambda raw: b"", lambda raw: b"no database" * 500, lambda raw: raw[:5000], scramble]
)
def test_a_damaged_file_is_refused_and_kept(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    ledger = open_ledger(tmp_path)
    answer(ledger)
    broken = damage(ledger.path.read_bytes())
    ledger.path.write_bytes(broken)
    with pytest.raises(LedgerUnusable, match="Do not delete it"):
        open_ledger(tmp_path)
    assert ledger.path.read_bytes() == broken


def test_a_ledger_that_vanishes_is_not_begun_anew(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    answer(ledger)
    ledger.path.unlink()
    with pytest.raises(LedgerUnusable):
        charge(ledger, "order 2")
    assert not ledger.path.exists()


def test_an_order_too_many_passes_the_run_s_budget_even_under_a_wide_cap(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", Account("d", Budget(30.0)))
    budget = Budget(8.0)
    planned = plan(budget, records=200, expected_batch=50, steps=10, clip_norm=0.3)

    def bound(order: str) -> Binding:
        return Binding(order=order, plan=planned.digest(), data="mac", model="m", version="v")

    ledger.charge(planned, bound("a" * 64), "run", budget=budget)
    before = ledger.entries()
    with pytest.raises(BudgetExhausted, match="the budget of run 'run', epsilon 8 at"):
        ledger.charge(planned, bound("b" * 64), "run", budget=budget)
    assert ledger.entries() == before
    ledger.charge(planned, bound("c" * 64), "another run", budget=budget)  # the cap allows it


SMALL = DPPlan(100, 100, 1, 1, 1.0, 8.0, 1e-5)  # epsilon 0.5


def test_a_second_plan_is_held_to_the_filter_and_not_to_what_fixed_plans_would_cost(tmp_path: Path) -> None:
    cap = Budget(epsilon(PLAN, 1e-5) + 0.1)
    ledger = open_ledger(tmp_path, cap)
    charge(ledger)  # the first passes by its privacy loss distribution, although it fills the filter
    assert used([PLAN], ledger.order) > room(cap, ledger.order)
    tiny = replace(SMALL, noise_multiplier=100.0)
    assert composed_epsilon([PLAN, tiny], 1e-5) <= cap.epsilon
    before = ledger.entries()
    with pytest.raises(BudgetExhausted):
        charge(ledger, "order 2", tiny, "next")
    assert ledger.entries() == before
    roomy = open_ledger(tmp_path, Budget(cap.epsilon + 3))
    charge(roomy, "order 2", tiny, "next")
    assert roomy.filtered() <= cap.epsilon + 3


def test_the_order_is_that_of_the_cap_until_something_is_spent_and_then_stays(tmp_path: Path) -> None:
    wide = open_ledger(tmp_path, Budget(10.0))
    assert wide.order == order_for(Budget(10.0)) == 3
    assert room(Budget(1.0), 3) < 0  # at that order a lifetime of 1 would admit no second run, ever
    narrow = open_ledger(tmp_path, Budget(1.0))
    assert wide.order == narrow.order == order_for(Budget(1.0)) == 16  # in the process that opened it before, too
    tiny = replace(SMALL, noise_multiplier=100.0)
    for number in range(2):
        charge(narrow, f"order {number}", tiny, f"run {number}")
    assert open_ledger(tmp_path, Budget(10.0)).order == 16
    with sqlite3.connect(narrow.path) as db:  # nothing goes through that was not held to it
        assert db.execute("SELECT value FROM meta WHERE name = 'order'").fetchone() == (16,)


def test_an_account_of_before_there_was_a_filter_is_recounted_and_what_it_has_above_stays(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    for number in range(3):
        answer(ledger, f"order {number}", run=f"run {number}")
    with sqlite3.connect(ledger.path) as db:
        db.execute("DELETE FROM meta WHERE name IN ('order', 'cap')")
    cap = Budget(epsilon(replace(PLAN, rounds=3), 1e-5))  # all that was admitted is within it, as if fixed
    again = open_ledger(tmp_path, cap)
    assert again.order == order_for(cap)
    assert again.spent()[0] == pytest.approx(cap.epsilon)
    assert again.filtered() > cap.epsilon
    assert answer(again, "order 1") == ledger.answered("order 1")
    with pytest.raises(BudgetExhausted):
        charge(again, "order 4", SMALL, "next")
    assert len(states(again)) == 3


def test_a_run_s_arms_and_seeds_share_what_a_run_may_spend(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, Budget(20.0), per_run=Budget(2.0))
    cell = replace(SMALL, noise_multiplier=4.0)
    assert composed_epsilon([cell], 1e-5) < 1 < 2.5 < composed_epsilon([cell] * 6, 1e-5)
    for run in ("one", "oneself"):
        for name in ("a/0", "a/1", "b/0"):
            ledger.charge(cell, bind(ledger, f"{run} {name}", cell), f"{run}/{name}", budget=Budget(1.0))
        for name in ("b/1", "c/0", "c/1"):
            with pytest.raises(BudgetExhausted, match=f"what policy.per_run allows run '{run}' in all its arms"):
                ledger.charge(cell, bind(ledger, f"{run} {name}", cell), f"{run}/{name}", budget=Budget(1.0))
        assert ledger.spent(run)[0] == composed_epsilon([cell] * 3, 1e-5) < 2.0
        assert ledger.spent(f"{run}/a/0")[0] == composed_epsilon([cell], 1e-5)


def test_no_other_process_waits_while_a_cost_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, computed = open_ledger(tmp_path, Budget(1.95), per_run=Budget(1.94)), []
    new = DPPlan(97, 97, 4, 1, 1.0, 4.1, 1e-5)  # none that is known already

    def free(*args: Any, **more: Any) -> float:
        with sqlite3.connect(ledger.path, timeout=0, isolation_level=None) as db:
            db.execute("BEGIN IMMEDIATE")  # raises while another one holds the lock
            db.execute("ROLLBACK")
        computed.append(args)
        return event_epsilon(*args, **more)

    monkeypatch.setattr(plan_module, "event_epsilon", free)
    charge(ledger, "order 1", new)
    with pytest.raises(BudgetExhausted):
        charge(ledger, "order 2", replace(new, noise_multiplier=4.2), "next")
    assert computed
