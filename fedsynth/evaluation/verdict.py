"""The conclusion of a run in words: which arm is best under a guarantee, and above what it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

from fedsynth.evaluation.comparing import METRICS
from fedsynth.evaluation.lines import CHANCE, MAJORITY
from fedsynth.evaluation.utility import FEWEST_PAIRS, bootstrap, gaps

LEVEL = 0.05  # two-sided
CLIENT = 0  # the first number of a client; the server's is below
ORDER = tuple(dict.fromkeys(name for names in METRICS.values() for name in names))
NAMES = {"macro_f1": "macro-F1", "exact_match": "exact match", "field_match": "field match", "rouge_l": "ROUGE-L"}

Standing = Literal["above", "probably above", "not distinguishable from", "probably below", "below", "unknown"]


@dataclass(frozen=True)
class Statement:
    """One sentence.

    Attributes:
        words: The sentence, with the names of its numbers in braces, each with its format: `{low:.3f}`.
        numbers: The numbers by name.
    """

    words: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.words.format(**self.numbers)


@dataclass(frozen=True)
class Lead:
    """An arm's advantage over another arm, or over a line.

    Attributes:
        over: Name of the other.
        standing: What may be said of it.
        mean: Mean of the paired differences.
        low: Lower end of its 95 % interval, as in the tables (`evaluation.utility.bootstrap`).
        high: Upper end.
        pairs: Number of (seed, client).
        seeds: Number of seeds.
    """

    over: str
    standing: Standing
    mean: float
    low: float
    high: float
    pairs: int
    seeds: int


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a run.

    Attributes:
        statements: The sentences with their numbers apart, for a page that traces them.
        metric: The metric that it is about; "" if nothing was measured.
        best: The best arm under a guarantee, or the best of all if none has one; "" if there is none.
        leads: Its advantages: over the baseline, over the best arm that releases nothing.
    """

    statements: tuple[Statement, ...]
    metric: str = ""
    best: str = ""
    leads: tuple[Lead, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences as text."""
        return tuple(map(str, self.statements))


def verdict(
    metrics: pd.DataFrame,
    epsilon: Mapping[str, float | None],
    *,
    baseline: str = "local",
    metric: str = "",
    pooled: Sequence[str] = (),
    tuned_on: Sequence[int] = (),
    record: Sequence[Statement] = (),
) -> Verdict:
    """The conclusion that a run's figures allow, and no more.

    It names the arm that is best among those that spend epsilon under a guarantee, and compares it with the baseline
    and with the best arm that releases nothing, by pairs of (seed, client). An arm is above another if the 95 %
    interval of the tables lies above 0, and Student's test at 5 % says the same: over seeds, as clients of one seed
    share its draws, or over clients if there is one seed. With the first alone it is probably above: three
    seeds agree by chance in every fourth run. Below `FEWEST_PAIRS` pairs nothing is said.

    Args:
        metrics: A tidy frame, as in `metrics.parquet`; with the lines of `evaluation.lines`, they are compared, too.
        epsilon: By arm: 0 if it releases nothing, None without a guarantee. Other arms are left out.
        baseline: The arm to compare with; the first arm if it did not run.
        metric: The metric; "" for the first one of `comparing.METRICS` that there is.
        pooled: Arms that are not compared: they have one client with a test set of its own.
        tuned_on: Clients that are left out if there are others: settings were tuned on them.
        record: Reasons for a low result that the run's record shows, the likeliest first; stated if there is no gain.
    """
    here = [arm for arm in epsilon if arm not in pooled and (metrics["arm"] == arm).any()]
    rows = metrics[metrics["arm"].isin(here) & (metrics["client"] >= CLIENT)]
    held = rows[~rows["client"].isin(list(tuned_on))]
    apart = bool(tuned_on) and 0 < len(held) < len(rows)
    rows = held if apart else rows
    there = set(rows["metric"])
    metric = metric or next((name for name in ORDER if name in there), "")
    level = _levels(rows, metric)
    here = [arm for arm in here if arm in level]
    if not here:
        return Verdict((Statement("No figure of a task model was recorded: there is nothing to conclude from."),))
    baseline = baseline if baseline in here else here[0]
    others = [arm for arm in here if arm != baseline]
    spending = [arm for arm in others if epsilon[arm]]
    free = [arm for arm in others if epsilon[arm] == 0]
    candidates = spending or free or others or here
    best = max(candidates, key=lambda arm: level[arm])
    rivals = [baseline] if best != baseline else []
    if best in spending and free:
        rivals.append(max(free, key=lambda arm: level[arm]))
    leads = tuple(lead(gaps(rows, best, rival, metric=metric), rival) for rival in rivals)
    other = "" if epsilon[baseline] or best == baseline else "other "  # the baseline is most often one of these
    said = [_highest(best, candidates, epsilon, level[best], metric, other, apart=apart)]
    if rivals:
        said += _compared(leads, f"the {'best' if len(free) > 1 else 'only'} {other}arm that releases nothing")
    else:
        said.append(Statement("It ran alone: there is nothing to compare it with."))
    under = list(_under_lines(rows, here, best, level, metric))
    said += under
    gain = bool(leads) and all(each.standing in ("above", "probably above") for each in leads)
    if record and (under or not gain):
        said.append(_because(record))
    return Verdict(tuple(said), metric, best, leads)


def lead(found: pd.Series[float], over: str) -> Lead:
    """What may be said of paired differences.

    Args:
        found: Differences by (seed, client); at least one.
        over: Name of the arm that was subtracted.
    """
    low, high = bootstrap(found)
    per_seed = found.groupby(level="seed").mean()
    units = per_seed if len(per_seed) > 1 else found
    standing: Standing = "not distinguishable from"
    if len(found) < FEWEST_PAIRS:
        standing = "unknown"
    elif low > 0:
        standing = "above" if settled(units) else "probably above"
    elif high < 0:
        standing = "below" if settled(units) else "probably below"
    return Lead(over, standing, float(found.mean()), low, high, len(found), len(per_seed))


def settled(values: pd.Series[float]) -> bool:
    """True if Student's test, two-sided at `LEVEL`, finds that the mean of independent values is not 0."""
    from scipy.special import stdtrit  # a second to import; nothing but a conclusion needs it

    count = len(values)
    if count < 2:
        return False
    error = float(values.std(ddof=1)) / count**0.5
    return bool(abs(float(values.mean())) > float(stdtrit(count - 1, 1 - LEVEL / 2)) * error)


def _levels(rows: pd.DataFrame, metric: str) -> dict[str, float]:
    """By arm, the mean over seeds of the mean over clients, in its last round."""
    own = rows[rows["metric"] == metric]
    last = own[own["round"] == own.groupby("arm")["round"].transform("max")]
    means = last.groupby(["arm", "seed"])["value"].mean().groupby(level="arm").mean()
    return {str(arm): float(value) for arm, value in means.items()}


def _highest(
    best: str,
    among: Sequence[str],
    epsilon: Mapping[str, float | None],
    level: float,
    metric: str,
    other: str,
    *,
    apart: bool,
) -> Statement:
    spent, name = epsilon[best], NAMES.get(metric, metric.replace("_", " "))
    many, one, cost, numbers = "arms without a guarantee", "arm without a guarantee", "", {"level": level}
    if spent:
        many, one, cost = "arms under a guarantee", "arm under a guarantee", ", at epsilon {epsilon:.3f}"
        numbers["epsilon"] = math.ceil(1000 * spent) / 1000  # a printed bound must hold
    elif spent == 0:
        many, one = f"{other}arms that release nothing", f"{other}arm that releases nothing"
    others = f"Of {len(among)} {many}, {_plain(best)} has the highest {name}"
    alone = f"{_plain(best)}, the only {one}, has {name}"
    tuned = " on the clients on which no setting was tuned" if apart else ""
    said = f"{others}, {{level:.3f}}" if len(among) > 1 else f"{alone} {{level:.3f}}"
    return Statement(f"{said}{tuned}{cost}.", numbers)


def _compared(leads: Sequence[Lead], public: str) -> Iterator[Statement]:
    """One sentence on all advantages, and one on how far they can be trusted; `public` says what the second is over."""
    first = leads[0]
    if first.standing == "unknown":
        parts, numbers = zip(*(_mean(number, each) for number, each in enumerate(leads)), strict=True)
        few = "pair of a seed and a client is" if first.pairs == 1 else "pairs of a seed and a client are"
        yield Statement(
            f"Nothing can be said of its advantage: its mean is {' and '.join(parts)}, but {first.pairs} {few} too "
            f"few, as {FEWEST_PAIRS} are the least that can rule out chance. Run more seeds or clients.",
            {name: value for own in numbers for name, value in own.items()},
        )
        return
    who = ["", f", {public},"]
    found = [_interval(number, each, who[number]) for number, each in enumerate(leads)]
    said = ", and ".join(words for words, _ in found)
    yield Statement(f"It is {said}.", {name: value for _, own in found for name, value in own.items()})
    if any(each.standing.startswith("probably") for each in leads):
        yield Statement(f"“Probably”: {first.seeds} seeds alone do not settle it; more seeds would.")
    if first.seeds == 1:
        yield Statement(
            f"One seed ran: the intervals cover the differences of {first.pairs} clients and not those of seeds."
        )
    else:
        yield Statement(f"The 95 % intervals are over {first.seeds} seeds and {first.pairs} pairs of seed and client.")


def _mean(number: int, each: Lead) -> tuple[str, dict[str, float]]:
    """The mean difference in words, and its number."""
    side = "below" if each.mean < 0 else "above"
    return f"{{mean_{number}:.3f}} {side} that of {_plain(each.over)}", {f"mean_{number}": abs(each.mean)}


def _interval(number: int, each: Lead, who: str) -> tuple[str, dict[str, float]]:
    """The standing with its interval in words, and the ends."""
    over, low, high = f"{_plain(each.over)}{who}", f"low_{number}", f"high_{number}"
    if each.standing == "not distinguishable from":
        over = over.removesuffix(",")
        words = f"{each.standing} {over} ({{{low}:+.3f}} to {{{high}:+.3f}})"
        return words, {low: each.low, high: each.high}
    ends = (-each.high, -each.low) if "below" in each.standing else (each.low, each.high)  # a distance has no sign
    return f"{each.standing} {over} by {{{low}:.3f}} to {{{high}:.3f}}", {low: ends[0], high: ends[1]}


def _under_lines(
    rows: pd.DataFrame, arms: Sequence[str], best: str, level: Mapping[str, float], metric: str
) -> Iterator[Statement]:
    """Sentences on arms that do no better than a constant or a random answer."""
    against = {line: {arm: _over_line(rows, arm, line, metric) for arm in arms} for line in (CHANCE, MAJORITY)}
    known = {line: {arm: one for arm, one in found.items() if one is not None} for line, found in against.items()}
    at_chance = [arm for arm, one in known[CHANCE].items() if not _clear(one)]
    low = [arm for arm, one in known[MAJORITY].items() if not _clear(one)]
    means = {line: level[best] - found[best].mean for line, found in known.items() if best in found}
    if at_chance:
        yield Statement(f"{_listed(at_chance)} {_is(at_chance)} at chance ({{chance:.3f}}).", {"chance": means[CHANCE]})
    if not low:
        return
    numbers = {"majority": means[MAJORITY]}
    line = "the majority line ({majority:.3f}), which always answers the commonest test label"
    if len(low) == len(known[MAJORITY]):
        yield Statement(f"No arm is clearly above {line}.", numbers)
    elif set(low) != set(at_chance):
        yield Statement(f"{_listed(low)} {_is(low)} not clearly above {line}.", numbers)


def _over_line(rows: pd.DataFrame, arm: str, line: str, metric: str) -> Lead | None:
    """An arm's advantage over a line of its own clients' test sets; None if the line was not recorded."""
    own = rows[(rows["arm"] == arm) & rows["metric"].isin([metric, f"{line}/{metric}"])]
    as_arms = own.assign(arm=own["metric"], metric=metric)
    try:
        return lead(gaps(as_arms, metric, f"{line}/{metric}", metric=metric), line)
    except ValueError:
        return None


def _clear(one: Lead) -> bool:
    """Too few pairs leave the mean alone to go by: the sentence is a warning then, no finding."""
    return one.mean > 0 if one.standing == "unknown" else "above" in one.standing


def _because(record: Sequence[Statement]) -> Statement:
    """The reasons as one sentence; each keeps its numbers."""
    parts, numbers = [], dict[str, float]()
    for at, reason in enumerate(record):
        words = reason.words
        for name, value in reason.numbers.items():
            words = words.replace(f"{{{name}", f"{{because_{at}_{name}")
            numbers[f"because_{at}_{name}"] = value
        parts.append(words)
    return Statement(f"Likely reasons in the run's record: {'; '.join(parts)}.", numbers)


def _listed(arms: Iterable[str]) -> str:
    names = list(map(_plain, arms))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _is(arms: Sequence[str]) -> str:
    return "is" if len(arms) == 1 else "are"


def _plain(name: str) -> str:
    """A name within words that are formatted."""
    return name.replace("{", "{{").replace("}", "}}")
