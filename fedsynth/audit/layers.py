"""The three layers of an audit: what a mechanism let out of canaries, tested against its statement.

*structural*: noise, draws, clipping, steps and keys are those of the statement. *profile*: no threshold tells canaries
that take part from others better than the statement's own delta at each of several epsilons. *bound*: so many right
guesses are likely under the statement (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, theorem 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from numpy.typing import NDArray
from scipy.stats import beta, binom, norm

from fedsynth.privacy.plan import BY_RDP
from fedsynth.privacy.rdp import ORDERS, bound, of_step
from fedsynth.privacy.statement import Statement
from fedsynth.training.loopcheck import chance_of_squares, far, two_sided

Layer = Literal["structural", "profile", "bound"]

ERR = 1e-4  # chance that any limit of an audit fails if all is right: one of 10,000 audits
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the stated epsilon, at which the profile is tested
CONFIDENCE = 0.95  # of the epsilon that is shown, as papers do; a violation is found with the audit's own
_STATISTICAL = 7  # tests of the structural layer that can err
TESTS = _STATISTICAL + 2 * len(SHARES) + 1  # of one mechanism
_GRID = 1e-3  # of privacy losses: rounded up, at most some thousandths too high
_REACHED = 0.98  # of C: canaries that move a sum by less show nothing
_COMPARED, _PRODUCTS = 64, 2**23  # steps of a grant whose noise is compared; numbers of all grants
_FEWEST = 4096  # products whose sum is taken for normal
_GUESSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of the canaries that are guessed


@dataclass(frozen=True)
class Seen:
    """What left under one grant, in units of C: a canary that takes part in a step adds 1 to its own number.

    Attributes:
        client: Number of the client.
        values: The numbers of canaries, (steps, canaries).
        hit: True where a canary took part, (steps, canaries).
        rest: Numbers that no canary moves, (steps, more).
        ran: Number of steps that the mechanism says it ran.
        sizes: Units drawn in each step; None if all take part in each.
    """

    client: int
    values: NDArray[np.float32]
    hit: NDArray[np.bool_]
    rest: NDArray[np.float32]
    ran: int
    sizes: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Evidence:
    """What an adversary saw of a run with canaries, and what the run states.

    Attributes:
        stated: The statement of a client.
        records: Number of units of a client, canaries or not.
        present: By client, True for each canary that is in its data, by a coin each.
        seen: What left, grant by grant.
        charged: By client, the steps that its ledger has charged; some clients may have none.
        grants: Ids of all grants.
    """

    stated: Statement
    records: int
    present: tuple[NDArray[np.bool_], ...]
    seen: tuple[Seen, ...]
    charged: tuple[int, ...]
    grants: tuple[str, ...]

    @property
    def coins(self) -> NDArray[np.bool_]:
        """All clients' canaries."""
        return np.concatenate(self.present)

    @property
    def sigma(self) -> float:
        """Deviation of the noise in units of C."""
        return float(self.stated.sigma or math.nan)

    @property
    def rate(self) -> float:
        """Chance of a unit to take part in a step."""
        return float(self.stated.sampling_rate or math.nan)


@dataclass(frozen=True)
class Finding:
    """The result of one test.

    Attributes:
        layer: The layer.
        test: Name of the test.
        found: The figure and what is stated, in words.
        violated: True if the statement cannot be true, or the test could not have found out.
    """

    layer: Layer
    test: str
    found: str
    violated: bool


@dataclass(frozen=True)
class Bound:
    """The one-run bound on epsilon, at the statement's delta and with `CONFIDENCE`.

    Attributes:
        lower: Epsilon is at least this.
        ceiling: The most that so many canaries can show, if every guess were right.
        guesses: Number of guesses.
        right: How many of them were right.
    """

    lower: float
    ceiling: float
    guesses: int
    right: int


def examined(evidence: Evidence, audits: int = 1) -> tuple[list[Finding], Bound]:
    """All findings of a mechanism, layer by layer, and the one-run bound.

    Args:
        evidence: What was seen.
        audits: Number of mechanisms that share `ERR`.
    """
    chance = ERR / (TESTS * audits)
    score = scores(evidence)
    guessed, figures = _guesses(evidence, score, chance)
    return [*_structural(evidence, chance), *_profile(evidence, score, chance), guessed], figures


# --- Structural -------------------------------------------------------------------------------------------------------


def _structural(evidence: Evidence, chance: float) -> Iterator[Finding]:
    yield _steps(evidence)
    yield _keys(evidence)
    yield from _noise(evidence, chance)
    if evidence.seen[0].sizes is not None:
        yield from _draws(evidence, chance)
    yield from _contribution(evidence, chance)
    yield _correlation(evidence, chance)


def _steps(evidence: Evidence) -> Finding:
    """Each client's steps, as taken, as reported and as charged, are those of the statement."""
    stated, wrong = evidence.stated.steps, []
    for client in range(len(evidence.present)):
        own = [seen for seen in evidence.seen if seen.client == client]
        wrong += [n for n in (sum(len(s.values) for s in own), sum(s.ran for s in own)) if n != stated]
    wrong += [steps for steps in evidence.charged if steps != stated]
    total = sum(len(seen.values) for seen in evidence.seen)
    words = f"{total} steps in {len(evidence.seen)} grants, each client states {stated}"
    more = "" if not wrong else f"; some took, reported or paid {wrong[0]}"
    return Finding("structural", "steps", words + more, bool(wrong))


def _keys(evidence: Evidence) -> Finding:
    different = len(set(evidence.grants))
    words = f"{len(evidence.grants)} grants have {different} keys"
    return Finding("structural", "keys", words, different < len(evidence.grants))


def _noise(evidence: Evidence, chance: float) -> Iterator[Finding]:
    """Numbers that no canary moved are noise of the stated deviation, and normal."""
    squares, fourth, count = 0.0, 0.0, 0
    for seen in evidence.seen:
        for values in (seen.values[~seen.hit], seen.rest):
            square = np.square(values / np.float32(evidence.sigma), dtype=np.float64)
            squares, fourth = squares + float(square.sum()), fourth + float(np.square(square).sum())
            count += values.size
    ratio = math.sqrt(squares / max(count, 1))
    z = (ratio - 1) * math.sqrt(2 * count)
    words = f"{ratio:.4f} sigma C over {count:,} numbers (z {z:+.1f})"
    yield Finding("structural", "noise", words, not far(squares, count) >= chance)
    # Of its own variance, so that a wrong deviation is no second violation.
    shape = fourth * count / squares**2 if squares else 3.0
    z = (shape - 3) / math.sqrt(24 / max(count, 1))
    words = f"fourth power {shape:.3f} times that of the deviation, of normal noise 3 (z {z:+.1f})"
    yield Finding("structural", "shape", words, not 2 * norm.sf(abs(z)) >= chance)


def _draws(evidence: Evidence, chance: float) -> Iterator[Finding]:
    """Batches are Poisson samples: their sizes have the binomial mean and variance."""
    n, q = evidence.records, evidence.rate
    sizes = np.concatenate([seen.sizes for seen in evidence.seen if seen.sizes is not None])
    mean, variance = n * q, n * q * (1 - q)
    unlikely = two_sided(int(sizes.sum()), n * len(sizes), q) < chance
    yield Finding("structural", "rate", f"{sizes.mean():.1f} of {n:,} units a step, stated {mean:.1f}", bool(unlikely))
    if q == 1:  # all take part, and there is nothing to vary
        return
    squares = int(((sizes - round(mean)) ** 2).sum())
    words = f"{squares / len(sizes) / variance:.2f} of binomial variance over {len(sizes)} steps"
    yield Finding("structural", "batches", words, chance_of_squares(squares, len(sizes), n, q) < chance)


def _contribution(evidence: Evidence, chance: float) -> Iterator[Finding]:
    """A canary moves its number by C: on average, and nowhere by more."""
    moved = np.concatenate([seen.values[seen.hit] for seen in evidence.seen]).astype(np.float64)
    if not len(moved):
        yield Finding("structural", "clipping", "no canary took part: this shows nothing", violated=True)
        return
    spread = norm.isf(chance / 2) * evidence.sigma / math.sqrt(len(moved))
    mean, largest = float(moved.mean()), float(moved.max())
    words = f"a unit moves its number by {mean:.3f} C on average, {_REACHED} to 1 within {spread:.3f}"
    yield Finding("structural", "clipping", words, not _REACHED - spread <= mean <= 1 + spread)
    most = 1 + evidence.sigma * float(norm.isf(chance / len(moved)))
    words = f"the largest number of a unit is {largest:.1f} C, with noise at most {most:.1f}"
    yield Finding("structural", "largest", words, not largest <= most)


def _correlation(evidence: Evidence, chance: float) -> Finding:
    """The noise of no grant is that of another, of another client, of the step before, or of another number."""
    noise, free, most_numbers = [], [], _PRODUCTS // len(evidence.seen)
    found: list[tuple[float, str]] = []
    lags = 0
    for grant, seen in enumerate(evidence.seen):
        values = np.hstack([seen.values[:_COMPARED], seen.rest[:_COMPARED]]) / np.float32(evidence.sigma)
        there = np.hstack([~seen.hit[:_COMPARED], np.ones(seen.rest[:_COMPARED].shape, np.bool_)])
        own = np.where(there, values, np.float32(0))
        apart = _apart(own, there)
        lags += len(apart)
        if len(apart):
            at = int(np.abs(apart).argmax())
            found.append((float(apart[at]), f"numbers {at + 1} places apart in a step of grant {grant + 1}"))
        if len(own) > 1:
            both = int((there[1:] & there[:-1]).sum())
            product = float(np.einsum("ij,ij->", own[1:], own[:-1], dtype=np.float64))
            found.append((product / math.sqrt(max(both, 1)), f"steps of grant {grant + 1}"))
        noise.append(own.ravel()[:most_numbers].copy())
        free.append(there.ravel()[:most_numbers].copy())
    if len({each.shape for each in noise}) == 1 and len(noise) > 1:
        flat, masks = np.stack(noise), np.stack(free).astype(np.float32)
        z = (flat @ flat.T) / np.sqrt(np.maximum(masks @ masks.T, 1))
        rows, columns = np.triu_indices(len(flat), 1)
        found += [
            (float(z[i, j]), f"grants {i + 1} and {j + 1}, of clients {a.client} and {b.client}")
            for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
            for a, b in [(evidence.seen[i], evidence.seen[j])]
        ]
    if not found:
        return Finding("structural", "correlation", "one grant of one step: nothing to compare", violated=False)
    z_most, where = max(found, key=lambda each: abs(each[0]))
    tried = len(found) + lags
    most = float(norm.isf(chance / 2 / tried))
    words = f"largest of {tried} pairs: z {z_most:+.1f} ({where}), at most {most:.1f}"
    return Finding("structural", "correlation", words, not abs(z_most) <= most)


def _apart(noise: NDArray[np.float32], there: NDArray[np.bool_]) -> NDArray[np.float64]:
    """z of the products of numbers that are 1, 2, ... places apart in a step, for as many places as give `_FEWEST`.

    Args:
        noise: (steps, numbers), 0 where a canary is.
        there: True elsewhere.
    """
    size = 2 * noise.shape[1]

    def products(values: NDArray[Any]) -> NDArray[np.float64]:
        power = sum(np.abs(np.fft.rfft(row, size)) ** 2 for row in values.astype(np.float64))
        found: NDArray[np.float64] = np.fft.irfft(power, size)[1 : noise.shape[1]]
        return found

    pairs = np.rint(products(there))
    kept = pairs >= _FEWEST
    found: NDArray[np.float64] = np.where(kept, products(noise), 0.0) / np.sqrt(np.maximum(pairs, 1))
    return found[: int(np.flatnonzero(kept).max(initial=-1)) + 1]


# --- Profile ----------------------------------------------------------------------------------------------------------


def scores(evidence: Evidence) -> NDArray[np.float64]:
    """Each canary's log-likelihood ratio: in the data against not in it, by all that left; (canaries,)."""
    q, sigma = evidence.rate, evidence.sigma
    found = [np.zeros(len(own)) for own in evidence.present]
    for seen in evidence.seen:
        each = (2 * seen.values.astype(np.float64) - 1) / (2 * sigma**2)
        found[seen.client] += (each if q == 1 else np.logaddexp(math.log1p(-q), math.log(q) + each)).sum(0)
    return np.concatenate(found)


def _thirds(count: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The canaries that choose a threshold, and those that it is tested on."""
    choosing = np.arange(count) % 3 == 0
    return choosing, ~choosing


def _profile(evidence: Evidence, score: NDArray[np.float64], chance: float) -> Iterator[Finding]:
    """The lower limit of TPR - e^eps' FPR is at most delta(eps'), for both ways to mistake two data sets."""
    stated, coins = evidence.stated, evidence.coins
    choosing, others = _thirds(len(coins))
    for share in SHARES:
        epsilon = share * (stated.epsilon or 0.0)
        delta = delta_at(stated, epsilon)
        for sign, which in ((1.0, "in"), (-1.0, "out")):
            own, true = sign * score, coins if sign > 0 else ~coins
            thresholds = np.quantile(own[choosing], np.linspace(0.01, 0.99, 99))
            limits = _limits(own[choosing], true[choosing], thresholds, epsilon, chance)
            best = thresholds[int(limits.argmax())]
            [limit] = _limits(own[others], true[others], np.array([best]), epsilon, chance)
            words = f"TPR - e^eps' FPR is {max(limit, 0.0):.4f} or more, stated delta({epsilon:.2f}) is {delta:.4g}"
            yield Finding("profile", f"eps' {epsilon:.2f}, {which}", words, bool(limit > delta))


def _limits(
    score: NDArray[np.float64],
    true: NDArray[np.bool_],
    thresholds: NDArray[np.float64],
    epsilon: float,
    chance: float,
) -> NDArray[np.float64]:
    """Lower limits of TPR - e^epsilon FPR at each threshold: Clopper and Pearson's, half of the chance for each."""
    above = score[:, None] > thresholds
    right, of_true = above[true].sum(0), int(true.sum())
    wrong, of_false = above[~true].sum(0), int((~true).sum())
    low = np.where(right > 0, beta.ppf(chance / 2, np.maximum(right, 1), of_true - right + 1), 0.0)
    high = np.where(wrong < of_false, beta.ppf(1 - chance / 2, wrong + 1, np.maximum(of_false - wrong, 1)), 1.0)
    return np.asarray(low - math.exp(epsilon) * high)


@lru_cache(maxsize=16)
def _accountant(rate: float, sigma: float, steps: int) -> Any:
    step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, _GRID)
    return accountant.compose(dp_event.SelfComposedDpEvent(step, steps))


def delta_at(stated: Statement, epsilon: float) -> float:
    """The statement's own delta at another epsilon: an upper bound."""
    rate, sigma, steps = _piece(stated)
    if stated.mechanism in BY_RDP:
        spent = [(order, steps * of_step(rate, sigma, order)) for order in ORDERS]
        logs = [(a - 1) * (used - epsilon + math.log1p(-1 / a)) - math.log(a) for a, used in spent]
        return math.exp(min(0.0, *logs))
    return float(_accountant(rate, sigma, steps).get_delta(epsilon))


def epsilon_at(stated: Statement, delta: float) -> float:
    """The statement's own epsilon at another delta: an upper bound."""
    if stated.mechanism in BY_RDP:
        return bound([_piece(stated)], delta)
    return float(_accountant(*_piece(stated)).get_epsilon(delta))


def _piece(stated: Statement) -> tuple[float, float, int]:
    return float(stated.sampling_rate or 1.0), float(stated.sigma or 0.0), int(stated.steps or 0)


# --- Bound ------------------------------------------------------------------------------------------------------------


def _guesses(evidence: Evidence, score: NDArray[np.float64], chance: float) -> tuple[Finding, Bound]:
    """Guesses "in" of the highest scores, "out" of the lowest, or both; a third of the canaries says how many."""
    stated, coins = evidence.stated, evidence.coins
    choosing, others = _thirds(len(coins))
    own, true, canaries = score[others], coins[others], int(others.sum())

    def lower(guesses: int, right: int, of: int) -> float:
        return least_epsilon(of, guesses, right, stated.delta, 1 - CONFIDENCE)

    third = int(choosing.sum())
    ways = [(high * share / 2, low * share / 2) for share in _GUESSES for high, low in ((1, 1), (1, 0), (0, 1))]
    chosen = max(ways, key=lambda way: lower(*_right(score[choosing], coins[choosing], way), third))
    guesses, right = _right(own, true, chosen)
    numbers = [2 * round(share * canaries / 2) for share in _GUESSES]
    ceiling = max(lower(number, number, canaries) for number in numbers)
    # At the stated delta the theorem's own term, 2 m delta, would be above the chance: a smaller one makes it vanish.
    delta = min(stated.delta, 10.0 ** math.floor(math.log10(chance / (4 * canaries))))
    epsilon = epsilon_at(stated, delta)
    likely = chance_of_guesses(canaries, guesses, right, epsilon, delta)
    found = Bound(lower(guesses, right, canaries), ceiling, guesses, right)
    words = (
        f"{right:,} of {guesses:,} guesses are right: epsilon >= {found.lower:.2f} at delta {stated.delta:g} with "
        f"{CONFIDENCE:.0%} confidence, stated {stated.epsilon:.2f}, ceiling of {canaries:,} canaries {ceiling:.2f}"
    )
    return Finding("bound", "guesses", words, likely < chance), found


def _right(score: NDArray[np.float64], true: NDArray[np.bool_], shares: tuple[float, float]) -> tuple[int, int]:
    """Number of guesses, and how many are right, if these shares of the highest and lowest scores are guessed."""
    order = np.argsort(score, kind="stable")
    high, low = (round(share * len(order)) for share in shares)
    return high + low, int(true[order[len(order) - high :]].sum() + (~true[order[:low]]).sum())


def chance_of_guesses(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound on the chance of so many right guesses under (epsilon, delta)-DP: theorem 5.2 of the paper.

    Under epsilon alone the right guesses are dominated by Binomial(guesses, e^eps / (1 + e^eps)), W. Delta adds
    2 m delta max_i P(right - i <= W < right) / i for the m canaries.
    """
    rate = 1 / (1 + math.exp(-epsilon))
    short = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, rate))
    most = float((short / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, float(binom.sf(right - 1, guesses, rate)) + 2 * canaries * delta * most)


def least_epsilon(canaries: int, guesses: int, right: int, delta: float, chance: float) -> float:
    """The largest epsilon that so many right guesses refute, but for the chance; 0 if there is none."""
    low, high = 0.0, 1.0
    if chance_of_guesses(canaries, guesses, right, low, delta) >= chance:
        return 0.0
    while chance_of_guesses(canaries, guesses, right, high, delta) < chance:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if chance_of_guesses(canaries, guesses, right, middle, delta) < chance else (low, middle)
        )
    return low


def error_line(audits: int) -> str:
    """The error of all limits together, in words."""
    return (
        f"{TESTS} tests for each of {audits} mechanism{'s' if audits > 1 else ''}, each with a chance of "
        f"{ERR / (TESTS * audits):.1e} to fail if all is right (Bonferroni): together 1 of {1 / ERR:,.0f} audits"
    )


def violations(findings: Sequence[Finding]) -> list[Finding]:
    """The findings that are violations."""
    return [finding for finding in findings if finding.violated]


__all__ = [
    "CONFIDENCE",
    "ERR",
    "SHARES",
    "TESTS",
    "Bound",
    "Evidence",
    "Finding",
    "Layer",
    "Seen",
    "chance_of_guesses",
    "delta_at",
    "epsilon_at",
    "error_line",
    "examined",
    "least_epsilon",
    "scores",
    "violations",
]
