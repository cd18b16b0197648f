"""The table of figures of a report, a row for each number, and the figures of metrics, costs and privacy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import pandas as pd

from fedsynth.evaluation.lines import CHANCE, MAJORITY, recorded
from fedsynth.evaluation.utility import bootstrap, paired_difference
from fedsynth.evaluation.verdict import Verdict
from fedsynth.federation.run.egress import Sent
from fedsynth.federation.run.log import SERVER
from fedsynth.federation.run.privacy_report import OF_MECHANISM, up
from fedsynth.federation.run.times import Spent
from fedsynth.reporting.page import Cell, Number
from fedsynth.synthesis.attrition import Loss

COLUMNS = ("row", "part", "arm", "baseline", "seed", "round", "client", "metric", "statistic", "value")
HELD_OUT = "_held_out_clients"


@dataclass(frozen=True)
class Where:
    """Which part of a run a figure is of; what is left out, it is over all of.

    Attributes:
        arm: The arm.
        baseline: The arm that it is compared with.
        seed: The run's seed.
        round: The arm's round.
        client: Or the server.
    """

    arm: str = ""
    baseline: str = ""
    seed: int | None = None
    round: int | None = None
    client: int | None = None


Key: TypeAlias = tuple[str, str, str, Where]


@dataclass
class Figures:
    """The table of figures: one row per number, found by part, arm, metric and the like.

    Attributes:
        rows: The rows of `report.parquet`; `seed`, `round` and `client` are None if a figure is over all of them.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    places: dict[Key, int] = field(default_factory=dict)

    def add(self, part: str, metric: str, statistic: str, value: float | None, where: Where = Where()) -> None:
        """Adds one number; None adds nothing, so that a figure that cannot be computed has no row.

        Raises:
            ValueError: If the figure is already there.
        """
        if value is None or math.isnan(value):
            return
        key = (part, metric, statistic, where)
        if key in self.places:
            raise ValueError(f"the figure {key} stands in the table already")
        self.places[key] = len(self.rows)
        cells = {"row": len(self.rows), "part": part, **asdict(where)}
        self.rows.append(cells | {"metric": metric, "statistic": statistic, "value": float(value)})

    def row(self, part: str, metric: str, statistic: str, where: Where = Where()) -> int | None:
        """The row of a figure; None if there is none."""
        return self.places.get((part, metric, statistic, where))

    def value(self, row: int | None) -> float | None:
        """The number of a row."""
        return None if row is None else self.rows[row]["value"]

    def metrics(self, part: str, arm: str | None = None) -> list[str]:
        """Metrics of a part of the report (and of an arm), in the order of their rows."""
        found = (r["metric"] for r in self.rows if r["part"] == part and arm in (None, r["arm"]))
        return list(dict.fromkeys(found))

    def number(self, row: int | None, digits: int | None = 3, *, sign: bool = False) -> Number | str:
        """A row's number as the page shows it; a dash if there is none."""
        value = self.value(row)
        if row is None or value is None:
            return "-"
        return Number(shown(value, digits, sign=sign), row)

    def spread(self, part: str, metric: str, arm: str, digits: int | None = 3) -> Cell:
        """Mean ± deviation over seeds."""
        mean, std = (self.number(self.row(part, metric, name, Where(arm=arm)), digits) for name in ("mean", "std"))
        return mean if isinstance(std, str) else (mean, " ± ", std)

    def bound(self, row: int | None, digits: int) -> Number | str:
        """The same, rounded up: a printed bound must hold."""
        value = self.value(row)
        return "-" if row is None or value is None else Number(f"{up(value, digits):.{digits}f}", row)

    def table(self) -> pd.DataFrame:
        """The table as it is written to Parquet."""
        frame = pd.DataFrame(self.rows, columns=list(COLUMNS))
        return frame.astype(dict.fromkeys(("row", "seed", "round", "client"), "Int64") | {"value": "float64"})

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Figures:
        """The table in a report's JSON, where an infinite number is text."""
        found = cls()
        for row in rows:
            where = {name: row[name] for name in ("arm", "baseline", "seed", "round", "client")}
            found.add(row["part"], row["metric"], row["statistic"], float(row["value"]), Where(**where))
        return found


def shown(value: float, digits: int | None = 3, *, sign: bool = False) -> str:
    """A number as text; without `digits`, with about three significant figures."""
    if not math.isfinite(value):
        return str(value)
    if digits is None:
        digits = (
            4 if abs(value) < 0.1 else 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
        )
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "", 1) if float(text) == 0 and text.startswith("-") else text


# --- The metrics of a run in figures ----------------------------------------------------------------------------------


def task_metrics(metrics: pd.DataFrame) -> list[str]:
    """The quality metrics of clients' models: logged for clients and in no group (`yield/`, `bytes/` ...)."""
    names = metrics.loc[metrics["client"] != SERVER, "metric"]
    return [str(name) for name in dict.fromkeys(names) if "/" not in str(name)]


def last_rounds(metrics: pd.DataFrame) -> pd.DataFrame:
    """The metrics of each arm's own last round."""
    return metrics[metrics["round"] == metrics.groupby("arm")["round"].transform("max")]


def add_utility(figures: Figures, metrics: pd.DataFrame, tuned_on: Sequence[int]) -> None:
    """Adds the mean over seeds of the mean over clients, its deviation over seeds and its interval; also by client."""
    last = last_rounds(metrics)
    for metric in task_metrics(metrics):
        for arm, rows in last[last["metric"] == metric].groupby("arm", sort=False):
            values = rows.set_index(["seed", "client"])["value"]
            held = rows[~rows["client"].isin(list(tuned_on))].set_index(["seed", "client"])["value"]
            _add_spread(figures, "utility", metric, values, str(arm))
            if tuned_on and 0 < len(held) < len(values):
                _add_spread(figures, "utility", metric + HELD_OUT, held, str(arm))
            for client, own in rows.groupby("client"):
                _add_mean(figures, "client", metric, own["value"], arm=str(arm), client=_whole(client))


def add_lines(figures: Figures, metrics: pd.DataFrame) -> None:
    """Adds the lines of the test labels: means over clients and seeds, as `evaluation.lines.recorded` has them."""
    for metric in task_metrics(metrics):
        for line in (CHANCE, MAJORITY):
            figures.add("line", f"{line}/{metric}", "mean", recorded(metrics, metric, line))


def add_facts(figures: Figures, facts: Mapping[str, Any]) -> None:
    """Adds the counts of `row_counts.json`: texts that are cut, rows and labels."""
    for kind in ("cuts", "labels"):
        for place, each in enumerate(facts.get(kind, [])):
            for name, value in each.items():
                if isinstance(value, int):
                    figures.add("data", f"{kind}/{place}/{name}", "value", value)
            if each.get("tokens"):
                figures.add("data", f"{kind}/{place}/share", "value", each["lost"] / each["tokens"])


def add_verdict(figures: Figures, found: Verdict) -> None:
    """Adds the numbers of the verdict's sentences."""
    for place, statement in enumerate(found.statements):
        for name, value in statement.numbers.items():
            figures.add("verdict", f"{place}/{name}", "value", value)


def add_curves(figures: Figures, metrics: pd.DataFrame) -> None:
    """Adds the same means round by round, for arms of several rounds."""
    for metric in task_metrics(metrics):
        for arm, rows in metrics[metrics["metric"] == metric].groupby("arm", sort=False):
            if rows["round"].nunique() < 2:
                continue
            for number, of_round in rows.groupby("round"):
                _add_mean(
                    figures,
                    "curve",
                    metric,
                    of_round.groupby("seed")["value"].mean(),
                    arm=str(arm),
                    round=_whole(number),
                )


def add_differences(
    figures: Figures, metrics: pd.DataFrame, arms: Sequence[str], baseline: str, tuned_on: Sequence[int]
) -> None:
    """Adds each arm's difference from the baseline, paired by (seed, client).

    Args:
        figures: Gets the rows.
        metrics: The run's metrics.
        arms: The arms with the baseline's clients; a pooled arm has a single client with another test set.
        baseline: One of these arms.
        tuned_on: Clients that a second figure leaves out.
    """
    held = metrics[~metrics["client"].isin(list(tuned_on))]
    groups = [("", metrics), (HELD_OUT, held)] if tuned_on and set(held["client"]) - {SERVER} else [("", metrics)]
    for metric in task_metrics(metrics):
        for end, chosen in groups:
            for arm in arms:
                if arm == baseline:
                    continue
                try:
                    found = paired_difference(chosen, arm, baseline, metric=metric)
                except ValueError:  # no pair: the arm lacks this metric
                    continue
                for statistic in ("mean", "low", "high", "better", "pairs"):
                    figures.add(
                        "difference",
                        metric + end,
                        statistic,
                        getattr(found, statistic),
                        Where(arm=arm, baseline=baseline),
                    )


def add_yields(figures: Figures, metrics: pd.DataFrame) -> None:
    """Adds each step's counts of texts in, kept and dropped: sums over rounds, then means over clients and seeds."""
    rows = metrics[metrics["metric"].str.startswith("yield/")]
    for arm, of_arm in rows.groupby("arm", sort=False):
        sums = of_arm.groupby(["metric", "seed", "client"], sort=False)["value"].sum()
        clients = of_arm.groupby("seed")["client"].nunique()
        for metric in dict.fromkeys(of_arm["metric"]):
            # A reason that a client never had is not recorded there: it counts as 0.
            means = (sums[metric].groupby(level="seed").sum() / clients).fillna(0.0)
            _add_mean(figures, "yield", str(metric).removeprefix("yield/"), means, arm=str(arm))


def add_losses(figures: Figures, found: Mapping[str, Sequence[Loss]]) -> None:
    """Adds an arm's notable losses of texts to filters, over all clients, rounds and seeds."""
    for arm, own in found.items():
        for loss in own:
            for name in ("asked", "left", "most", "clients", "bare", "narrowed"):
                figures.add("loss", f"{loss.what}/{name}", "sum", getattr(loss, name), Where(arm=arm))


def add_costs(figures: Figures, metrics: pd.DataFrame) -> None:
    """Adds kilobytes of payload per client and run, and per seed its seconds, clients' CPU time and LLM tokens."""
    for arm, rows in metrics.groupby("arm", sort=False):
        for direction in ("up", "down"):
            moved = rows[rows["metric"] == f"bytes/{direction}"]
            per_client = moved.groupby(["seed", "client"])["value"].sum().groupby(level="seed").mean() / 1000
            _add_mean(figures, "cost", f"kilobytes {direction} per client", per_client, arm=str(arm))
        _add_mean(figures, "cost", "seconds per seed", rows[rows["metric"] == "seconds/cell"]["value"], arm=str(arm))
        for metric, name in (
            ("seconds/client", "client CPU seconds"),
            ("llm/tokens_read", "LLM tokens read"),
            ("llm/tokens_written", "LLM tokens written"),
        ):
            per_seed = rows[rows["metric"] == metric].groupby("seed")["value"].sum()
            _add_mean(figures, "cost", name, per_seed, arm=str(arm))


def add_times(figures: Figures, parts: Sequence[Spent]) -> None:
    """Adds the seconds of a run's parts: of each arm, and of all arms together."""
    for part in parts:
        figures.add("time", part.part, "seconds", part.seconds, Where(arm=part.arm))
        figures.add("time", part.part, "clients", part.clients, Where(arm=part.arm))
    for name in dict.fromkeys(part.part for part in parts if part.arm):
        whole = sum(part.seconds for part in parts if part.part == name)
        figures.add("time", name, "seconds of all arms", whole)


BEFORE = "_before"  # ends the name of a figure that is taken before a round's work

# Names that earlier versions gave to a figure; runs are read as they were written.
EARLIER = {
    "metric": {
        "llm/chosen_label_accuracy": "llm/agreement_on_chosen",
        "llm/label_accuracy": "llm/agreement_on_chosen",
        "llm/test_label_accuracy": "llm/test_accuracy",
        "llm/test_label_accuracy_before": "llm/test_accuracy_before",
    }
}


def add_server(figures: Figures, metrics: pd.DataFrame) -> None:
    """Adds all other metrics of the last round: of the server's models and of aggregation.

    Of a figure taken before each round (`_before`), the first round's is the start.
    """
    known = ("yield/", "bytes/", "seconds/", "privacy/", "llm/tokens", "exchange/", f"{CHANCE}/", f"{MAJORITY}/")
    before, last = metrics[metrics["metric"].str.endswith(BEFORE)], last_rounds(metrics)
    first = before[before["round"] == before.groupby(["arm", "metric"])["round"].transform("min")]
    rows = pd.concat([last[~last["metric"].str.endswith(BEFORE)], first])
    rows = rows[rows["metric"].str.contains("/") & ~rows["metric"].str.startswith(known)].replace(EARLIER)
    for (arm, metric), found in rows.groupby(["arm", "metric"], sort=False):
        _add_mean(figures, "server", str(metric), found.groupby("seed")["value"].mean(), arm=str(arm))


SENT = ("requests", "tokens_read", "tokens_written", "from_cache", "tokens_from_cache")


def add_egress(figures: Figures, sent: Sequence[Sent]) -> None:
    """Adds what the run sent to endpoints: sums over the models at a machine, by arm, seed, machine and provenance."""
    sums: dict[tuple[str, str, int, str], int] = {}
    for line in sent:
        for name in SENT:
            key = f"{line.host}/{line.provenance}", line.arm, line.seed, name
            sums[key] = sums.get(key, 0) + getattr(line, name)
    for (metric, arm, seed, name), amount in sums.items():
        figures.add("egress", metric, name, amount, Where(arm=arm, seed=seed))


PRIVACY = ("epsilon", "delta", "epsilon_replace_one", "sigma", "sampling_rate", "steps", "clip_norm", "rows_per_unit")


def add_privacy(figures: Figures, privacy: Mapping[str, Any]) -> None:
    """Adds the figures of `privacy.json`, arm by arm."""
    for arm, said in privacy.items():
        spent = said.get("largest_over_clients", {})
        for name in PRIVACY:
            figures.add("privacy", name, "largest", _float(spent.get(name)), Where(arm=arm))
        if spent.get("epsilon_alone") is not None:
            figures.add("privacy", "epsilon_alone", "largest", _float(spent["epsilon_alone"]), Where(arm=arm))
        for part in spent.get("mechanisms", []):
            for name in OF_MECHANISM:
                figures.add("privacy", f"{part['mechanism']}/{name}", "largest", _float(part[name]), Where(arm=arm))
        for rows, epsilon in spent.get("epsilon_rows", {}).items():
            figures.add("privacy", f"epsilon of {rows} rows", "largest", _float(epsilon), Where(arm=arm))
        figures.add("privacy", "units", "largest", _float(said.get("terms", {}).get("largest_units")), Where(arm=arm))


Statistic = Literal["mean", "std", "low", "high", "n"]


def _add_spread(figures: Figures, part: str, metric: str, values: pd.Series[float], arm: str) -> None:
    """Mean, deviation over seeds, number of seeds and interval of values by (seed, client)."""
    _add_mean(figures, part, metric, values.groupby(level="seed").mean(), arm=arm)
    if len(values) > 1:
        low, high = bootstrap(values)
        figures.add(part, metric, "low", low, Where(arm=arm))
        figures.add(part, metric, "high", high, Where(arm=arm))


def _add_mean(figures: Figures, part: str, metric: str, per_seed: pd.Series[float], **where: Any) -> None:
    """Mean and deviation over seeds (none for one seed), and the number of seeds."""
    if len(per_seed) == 0:
        return
    figures.add(part, metric, "mean", float(per_seed.mean()), Where(**where))
    figures.add(part, metric, "std", float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None, Where(**where))
    figures.add(part, metric, "n", len(per_seed), Where(**where))


def _float(value: Any) -> float | None:
    return None if value is None else float(value)  # "inf" is a number as well


def _whole(value: Any) -> int:
    return int(value)
