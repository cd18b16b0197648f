"""Audits of the mechanisms as they are, and of broken ones: how many of 20 runs find a violation, and by which layer.

    python simulations/benchmarks/audit.py [--json FILE] [--runs 20] [--only NAME]

Each broken engine is the real one with one part replaced. The plan is that of a small client: epsilon 2 at delta 1e-5,
one unit in eight a step, 24 steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.special import ndtr

from fedsynth.audit.auditing import MechanismAudit, audit_mechanism
from fedsynth.audit.layers import violations
from fedsynth.audit.mechanisms import CANARIES, Audited
from fedsynth.clients import score, vote
from fedsynth.clients.client_side import ClientSide
from fedsynth.dpsgd import bookkeeping
from fedsynth.privacy.caps import Account
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.noise import GrantRandomness
from fedsynth.privacy.plan import Budget
from fedsynth.privacy.skellam import variance
from fedsynth.scenario.client import Client, GeneratorTraining
from fedsynth.training import dp_training as training

LAYERS = ("structural", "profile", "bound")
BATCH = 25
CLIENT = Client(
    generator="assets:tiny-slm",
    task_model="assets:tiny-slm",
    budget=Budget(2.0),
    generator_training=GeneratorTraining(expected_batch_size=BATCH, steps=24),
)
SUMMED = replace(CLIENT, secure_sum=Cohort(5, dropouts=2))
NOISED = replace(CLIENT, scores="noise")

# --- The mechanisms ---------------------------------------------------------------------------------------------------


def gradients(rounds: int = 1) -> Audited:
    return Audited(("audit",), CLIENT, CLIENT.plan(200, rounds), rounds, CLIENT.generator_training)


def votes(client: Client = CLIENT, rounds: int = 3) -> Audited:
    return Audited(("audit",), client, client.vote_plan(200, rounds), rounds)


def scores(client: Client = NOISED, rounds: int = 3) -> Audited:
    return Audited(("audit",), client, client.score_plan(200, rounds), rounds)


CORRECT: dict[str, Callable[[], Audited]] = {
    "gradients": gradients,
    "gradients, 10 rounds": lambda: gradients(10),
    "votes": votes,
    "scores": scores,
    "summed votes": lambda: votes(SUMMED),
    "summed scores": lambda: scores(replace(NOISED, secure_sum=SUMMED.secure_sum)),
}

# --- What is broken ---------------------------------------------------------------------------------------------------


def _noise(factor: float) -> Any:
    real = training.add_noise

    def added(total: torch.Tensor, deviation: float, randomness: Any) -> None:
        real(total, factor * deviation, randomness)

    return patch.object(training, "add_noise", added)


def _normals(change: Callable[[Any], Any], share: int = 1) -> Any:
    """Noise that is made of the key's normals, or of fewer."""
    real = GrantRandomness.normals

    def normals(self: GrantRandomness, count: int) -> Any:
        return change(real(self, -(-count // share)))[:count]

    return patch.object(GrantRandomness, "normals", normals)


def _long_alone() -> Any:
    """Gradients are clipped from three times C on."""
    real = bookkeeping.clip_factors

    def factors(squares: torch.Tensor, limit: float) -> torch.Tensor:
        return torch.where(squares > (3 * limit) ** 2, real(squares, limit), torch.ones_like(squares))

    return patch.object(bookkeeping, "clip_factors", factors)


def _unclipped() -> Any:
    return patch.object(bookkeeping, "clip_factors", lambda squares, *_: torch.ones_like(squares))


@contextmanager
def _shuffled() -> Iterator[None]:
    """Epochs of batches of one size."""
    left: dict[int, list[int]] = {}
    rng = np.random.default_rng()

    def draw(self: training.Training) -> list[Any]:
        own = left.setdefault(id(self), [])
        if len(own) < self.expected_batch_size:
            own[:] = rng.permutation(len(self.slots)).tolist()
        return [self.slots[own.pop()] for _ in range(self.expected_batch_size)]

    with patch.object(training.Training, "draw", draw):
        yield


@contextmanager
def _reset() -> Iterator[None]:
    """An accountant that begins anew in each round: plan, budget and statement are those of one."""
    real = Client.plan
    with ExitStack() as stack:
        stack.enter_context(patch.object(Client, "plan", lambda self, records, *_: real(self, records, 1)))
        stack.enter_context(patch.object(ClientSide, "charged", lambda _, planned: planned))
        stack.enter_context(patch.object(Account, "check", lambda *_: None))
        yield


@contextmanager
def _one_key(of_all_clients: bool) -> Iterator[None]:
    """Each round of a client, or each client, has the same key."""
    real = Ledger.begin

    def begin(self: Ledger, grant: Any) -> GrantRandomness:
        real(self, grant)
        name = str(grant.counter) if of_all_clients else str(self.path.parent.name)
        return GrantRandomness(name.encode().ljust(32, b"\0"))

    with patch.object(Ledger, "begin", begin):
        yield


def _rows_apart() -> Any:
    """Each row of a unit is clipped by itself."""

    def rows(units: Sequence[Any], numbers: Sequence[int]) -> tuple[list[Any], list[int]]:
        examples = [example for number in numbers for example in units[number]]
        return examples, list(range(len(examples)))

    return patch.object(training, "_rows", rows)


def _ballots_apart() -> Any:
    """Each row of a unit has a ballot of its own."""
    real = vote.ballots

    def ballots(*asked: Any) -> list[Any]:
        return [{place: 1.0} for ballot in real(*asked) for place, rows in ballot.items() for _ in range(round(rows))]

    return patch.object(vote, "ballots", ballots)


def _zeros_bare() -> Any:
    """Counts of zero get no noise."""
    real = vote.protected

    def protected(cast: Any, candidates: int, plan: Any, randomness: Any) -> list[float]:
        bare = vote.summed(cast, candidates) == 0
        return np.where(bare, 0.0, real(cast, candidates, plan, randomness)).tolist()

    return patch.object(vote, "protected", protected)


def _unchecked() -> Any:
    """Without the self-check before the charge, which finds this by itself."""
    stack = ExitStack()
    for module in (vote, score):
        for name in ("check_noise", "check_whole_noise"):
            stack.enter_context(patch.object(module, name, lambda *_: None))
    return stack


def _share_of_all() -> Any:
    """Each client's share of the noise is as if all stayed to the end."""
    return patch.object(Cohort, "share", lambda self, sigma: variance(sigma) / self.clients)


def _long_lists() -> Any:
    """Lists of scores are not bounded."""
    return patch.object(score, "bounded", lambda values, *_: np.asarray(values, np.float64))


@dataclass(frozen=True)
class Broken:
    """A mechanism with a broken part.

    Attributes:
        audited: The mechanism, planned while the part is broken.
        breaks: Opens the break.
        test: The test that must find it; empty for one that need not be found.
    """

    audited: Callable[[], Audited]
    breaks: Callable[[], Any]
    test: str


BROKEN: dict[str, Broken] = {
    "noise divided by the batch": Broken(gradients, lambda: _noise(1 / BATCH), "noise"),
    "no noise": Broken(gradients, lambda: _noise(0.0), "noise"),
    "no clipping": Broken(gradients, _unclipped, "clipping"),
    "clipping from 3 C on": Broken(gradients, _long_alone, "clipping"),
    "numbers share their noise": Broken(gradients, lambda: _normals(lambda half: np.tile(half, 2), 2), "correlation"),
    "uniform noise": Broken(gradients, lambda: _normals(lambda own: math.sqrt(12) * (ndtr(own) - 0.5)), "shape"),
    "shuffled batches": Broken(gradients, _shuffled, "batches"),
    "accountant begins anew, 10 rounds": Broken(lambda: gradients(10), _reset, "steps"),
    "one key for 10 rounds": Broken(lambda: gradients(10), lambda: _one_key(False), "correlation"),
    "one key for all clients": Broken(gradients, lambda: _one_key(True), "correlation"),
    "a unit's rows clipped one by one": Broken(gradients, _rows_apart, "clipping"),
    "a unit's rows vote one by one": Broken(votes, _ballots_apart, "clipping"),
    "votes: no noise on zeros": Broken(votes, _zeros_bare, "noise"),
    "scores: lists not bounded": Broken(scores, _long_lists, "clipping"),
    "sum of votes without the noise of the missing": Broken(lambda: votes(SUMMED), _share_of_all, "noise"),
    "sum of scores without the noise of the missing": Broken(CORRECT["summed scores"], _share_of_all, "noise"),
    "noise x 0.8": Broken(gradients, lambda: _noise(0.8), ""),
}


def run(name: str, seed: int, canaries: int = CANARIES) -> MechanismAudit:
    """One audit of a correct or a broken mechanism."""
    if name in CORRECT:
        return audit_mechanism(CORRECT[name](), seed, canaries=canaries)
    broken = BROKEN[name]
    with _unchecked(), broken.breaks():
        return audit_mechanism(broken.audited(), seed, canaries=canaries)


# --- The tables -------------------------------------------------------------------------------------------------------


def row(name: str, runs: int, canaries: int = CANARIES) -> dict[str, Any]:
    """Of so many audits: those with a violation, by layer and by test, and their seconds of CPU."""
    layers, tests, found, seconds, lower = Counter[str](), Counter[str](), 0, [], []
    for seed in range(runs):
        started = time.process_time()
        made = run(name, seed, canaries)
        seconds.append(time.process_time() - started)
        wrong = violations(made.findings)
        found += bool(wrong)
        layers.update({finding.layer for finding in wrong})
        tests.update({finding.test for finding in wrong if finding.layer == "structural"})
        lower.append(made.bound.lower)
    return {
        "name": name,
        "canaries": canaries,
        "runs": runs,
        "found": found,
        "layers": dict(layers),
        "tests": dict(tests),
        "epsilon": made.epsilon,
        "lower": float(np.median(lower)),
        "ceiling": made.bound.ceiling,
        "seconds": float(np.median(seconds)),
    }


def told(each: dict[str, Any]) -> str:
    """A line of the table."""
    by = [f"{each['layers'].get(layer, 0)}" for layer in LAYERS]
    tests = ", ".join(f"{test} {count}" for test, count in sorted(each["tests"].items(), key=lambda item: -item[1]))
    figures = f"{each['lower']:.2f} of {each['epsilon']:.2f} | {each['seconds']:.1f}"
    size = "" if each["canaries"] == CANARIES else f", {each['canaries']:,} canaries"
    return f"| {each['name']}{size} | {each['found']} of {each['runs']} | {' | '.join(by)} | {tests} | {figures} |"


def main(arguments: list[str]) -> int:
    """Prints the table; 1 if a correct mechanism was accused, or a broken one was not found in every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--runs", type=int, default=20, help="audits of each (default 20)")
    parser.add_argument("--only", default="", help="names that hold this text")
    parser.add_argument("--sizes", default="", help="noise x 0.8 only, with these numbers of canaries: 6000,24000")
    chosen = parser.parse_args(arguments)
    sizes = [int(size) for size in chosen.sizes.split(",") if size]
    cases = [("noise x 0.8", size) for size in sizes] or [
        (name, CANARIES) for name in (*CORRECT, *BROKEN) if chosen.only in name
    ]
    print("| mechanism | found | structural | profile | bound | tests | lower bound of stated | CPU s |")
    print("|---|---:|---:|---:|---:|---|---:|---:|", flush=True)
    rows = []
    for name, size in cases:
        rows.append(row(name, chosen.runs, size))
        print(told(rows[-1]), flush=True)
    print(f"the ceiling of the lower bound is {rows[-1]['ceiling']:.2f}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")
    accused = [each for each in rows if each["name"] in CORRECT and each["found"]]
    missed = [
        each
        for each in rows
        if each["name"] in BROKEN and (test := BROKEN[each["name"]].test) and each["tests"].get(test, 0) < chosen.runs
    ]
    return int(bool(accused or missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
