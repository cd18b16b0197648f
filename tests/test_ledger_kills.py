"""A site killed at random moments of charging, training, storing, approving; a disk that fills, a clock that jumps."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_ledger import FORK, PLAN, TEXT, bind

from fedsynth.clients.approval import AwaitsApproval, NotApproved
from fedsynth.clients.audit_log import entries
from fedsynth.data.sources import SiteData
from fedsynth.deployment.policy import Place, Policy, SiteConfig, SuperLink
from fedsynth.privacy.audit import contents, problems
from fedsynth.privacy.caps import BudgetExhausted
from fedsynth.privacy.plan import Budget, composed_epsilon

CAP = 30.0  # room for some of the orders below, not for all
ORDERS = [f"order {number}" for number in range(60)]
TEXTS = (TEXT, replace(TEXT, prompts=("cough", "fever!")))  # an operator edits a record now and then


def site(tmp_path: Path) -> Place:
    data = SiteData(id="ward", source="notes.csv", labels=("a", "b"), person="person", records=100)
    policy = Policy(lifetime=Budget(CAP), minimum_records=1, models=("assets:tiny-slm",))
    place = Place(SiteConfig("north", data, policy, SuperLink("127.0.0.1:9443")), tmp_path / "north")
    place.folder.mkdir()
    place.open_ledger(create=True)
    return place


def note(path: Path, *words: str) -> None:
    """One line, whole or not there."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, (" ".join(words) + "\n").encode())
    os.close(handle)


def work(place: Place, seed: int, version: int) -> None:
    """What a site does with requests, as `clients.handler` does it, and an operator who decides; without an end."""
    rng = random.Random(seed)
    ledger = place.open_ledger()
    while True:
        order = rng.choice(ORDERS)
        stored = ledger.answered(order)
        if stored is None:
            binding = bind(ledger, order, text=TEXTS[version])
            try:
                grant = ledger.charge(PLAN, binding, "run/main/0")
            except BudgetExhausted:
                continue
            stored = ledger.begin(grant).normals(8).tobytes()  # the answer is the noise itself
            # Each use of noise, by its hash, beside what it was used for.
            note(place.folder / "used", hashlib.sha256(stored).hexdigest(), order.split()[1], str(version), grant.id)
            time.sleep(rng.random() / 500)
            place.approvals.hold(order_id(order), hashlib.sha256(stored).hexdigest(), task="t", run="r", texts=1)
            ledger.store(grant, stored)
            place.witness().add("stored", order=order, grants=[grant.id])
        sha256 = hashlib.sha256(stored).hexdigest()
        if rng.random() < 0.5:
            with contextlib.suppress(Exception):
                held = place.approvals.undecided(order_id(order))
                place.witness().add("accepted", order=order, sha256=sha256)
                place.approvals.decide(held, "accepted", "test")
        with contextlib.suppress(AwaitsApproval, NotApproved):
            place.approvals.check(order_id(order), sha256)
            ledger.mark_sent(order)
            note(place.folder / "sent", order.split()[1], sha256)


def order_id(order: str) -> str:
    return hashlib.sha256(order.encode()).hexdigest()


def killed(place: Place, seconds: float, seed: int, version: int, before: Callable[[], object] = lambda: None) -> None:
    """Works in a process of its own that is killed after so long, wherever it is; `before` spoils its surroundings."""

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        before()
        work(place, seed, version)

    process = FORK.Process(target=child)
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join(60)
    assert process.exitcode


def checked(place: Place) -> dict[str, Any]:
    """What the ledger holds; whatever does not hold fails."""
    ledger = place.open_ledger()  # an account that lacks charges of the trail would not open
    found = contents(place.ledger)
    assert problems(found) == []
    plans = [PLAN for row in found["reservations"] for _ in range(row["drawn"])]
    assert ledger.spent()[0] == pytest.approx(composed_epsilon(plans, 1e-5) if plans else 0.0)
    assert ledger.filtered() <= CAP or len(plans) <= 1  # the first plan may pass by its loss distribution
    lines = list(entries(place.audit_log)) if place.audit_log.is_file() else []
    charged = {charge.grant for charge in place.witness().known()}
    # Killed between the ledger and the trail, a grant is in the ledger alone; it draws no noise before it is in both.
    assert {grant["id"] for grant in found["grants"] if grant["state"] in ("running", "stored", "sent")} <= charged

    used, sent = (place.folder / name for name in ("used", "sent"))
    noise, orders = defaultdict[str, set[tuple[str, ...]]](set), defaultdict[str, set[str]](set)
    for line in used.read_text().splitlines() if used.is_file() else ():
        digest, *what = line.split()
        noise[digest].add(tuple(what))
        assert what[2] in charged
        orders[what[0]].add(digest)
    assert all(len(each) == 1 for each in noise.values())  # no key served two orders, two texts or two grants
    grants = defaultdict[str, int](int)
    for grant in found["grants"]:
        grants[grant["order_digest"].split()[1]] += 1
    assert all(
        len(digests) <= grants[order] for order, digests in orders.items()
    )  # fresh noise has a charge of its own
    answers = defaultdict[str, set[str]](set)
    for line in sent.read_text().splitlines() if sent.is_file() else ():
        order, digest = line.split()
        answers[order].add(digest)
    assert all(len(each) == 1 for each in answers.values())  # the same bytes, however often
    accepted = {line["sha256"] for line in lines if line["event"] == "accepted"}
    assert {digest for each in answers.values() for digest in each} <= accepted
    return found


def kills(
    tmp_path: Path, count: int, seed: int, before: Callable[[random.Random], Callable[[], object]]
) -> dict[str, Any]:
    place, rng = site(tmp_path), random.Random(seed)
    states, version = set[str](), 0
    for number in range(count):
        version = 1 - version if rng.random() < 0.1 else version
        killed(place, rng.random() * 0.08, rng.randrange(10**9), version, before(rng))
        if number % 5 == 4 or number + 1 == count:
            states |= {grant["state"] for grant in checked(place)["grants"]}
    found = checked(place)
    return {**found, "states": states}


def undisturbed(_: random.Random) -> Callable[[], object]:
    return lambda: None


def test_a_site_that_is_killed_again_and_again_spends_and_says_nothing_twice(tmp_path: Path) -> None:
    assert len(kills(tmp_path, 12, 0, undisturbed)["grants"]) > 2


@pytest.mark.full
def test_two_hundred_kills(tmp_path: Path) -> None:
    found = kills(tmp_path, 200, 1, undisturbed)
    assert found["states"] >= {"reserved", "running", "sent"}  # it was killed in these
    assert found["epsilon"] > CAP / 4


def filling(rng: random.Random) -> Callable[[], object]:
    """No file may grow beyond some size: what is beyond is not written, as on a full disk."""
    size = rng.randrange(1_000, 60_000)

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return before


def test_a_disk_that_fills_leaves_a_ledger_that_verifies(tmp_path: Path) -> None:
    found = kills(tmp_path, 16, 2, lambda rng: filling(rng) if rng.random() < 0.7 else undisturbed(rng))
    assert found["grants"]


def jumping(rng: random.Random) -> Callable[[], object]:
    """The clock stands years before or after."""
    year = rng.randrange(1971, 2200)

    def before() -> None:
        for module in ("ledger", "witness"):
            __import__(f"fedsynth.privacy.{module}", fromlist=["now"]).now = lambda: f"{year}-01-01T00:00:00+00:00"
        __import__("fedsynth.clients.approval", fromlist=["_now"])._now = lambda: f"{year}-01-01T00:00:00+00:00"

    return before


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    found = kills(tmp_path, 12, 3, jumping)
    assert len({grant["at"][:4] for grant in found["grants"]}) > 1


@pytest.mark.parametrize("line", ["aa 2 0 g", "bb 1 0 h", "bb 1 0 g"])
def test_noise_that_serves_twice_or_that_nobody_paid_for_is_found(tmp_path: Path, line: str) -> None:
    place = site(tmp_path)
    ledger = place.open_ledger()
    grant = ledger.charge(PLAN, bind(ledger, "order 1"), "run/main/0")
    note(place.folder / "used", "aa", "1", "0", grant.id)
    checked(place)
    note(place.folder / "used", *line.replace(" g", f" {grant.id}").split())
    with pytest.raises(AssertionError):
        checked(place)
