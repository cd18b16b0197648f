"""The results of a run, read from its directory: a table, tidy metrics, texts, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from fedsynth.corpus import Corpus
from fedsynth.evaluation.utility import Difference, bootstrap, paired_difference
from fedsynth.federation.payload import corpus_from_parquet
from fedsynth.federation.run.privacy_report import up
from fedsynth.typed import BadValue, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = ("summary.json", "privacy.json", "metrics.parquet")  # of a run that is done
HEADLINE = ("accuracy", "exact_match")  # the first that a run has is what `plot` and `repr` show


class Corpora(dict[int, Corpus]):
    """Texts by client."""

    def to_frame(self) -> pd.DataFrame:
        """One row per text: client, prompt, answer, provenance, grants (a tuple); as `Corpus` has them."""
        columns = ["client", "prompt", "answer", "provenance", "grants"]
        rows = [
            (client, prompt, answer, corpus.provenance.value, corpus.grants)
            for client, corpus in self.items()
            for prompt, answer in zip(corpus.prompts, corpus.answers, strict=True)
        ]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        return f"Corpora({sum(map(len, self.values()))} texts of {len(self)} clients)"


@dataclass(frozen=True, repr=False)
class Result:
    """The results of a run.

    Attributes:
        out: The run's directory.
        summary: The summary that `--json` prints.
        metrics: Tidy frame: arm, seed, round, client, metric, value; client -1 is the server.
        privacy: By arm, the privacy statement in words and figures.
        conclusion: `verdict`, its sentences; `lines`, by metric the figures of chance and of the commonest label.
            Empty for a run of an earlier version.
    """

    out: Path
    summary: Mapping[str, Any]
    metrics: pd.DataFrame
    privacy: Mapping[str, Any]
    conclusion: Mapping[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> pd.DataFrame:
        """One row per arm: mean and standard deviation of each task metric, guarantee, epsilon, bytes, and the filters'
        notable losses of texts."""
        rows = []
        for arm, found in self.summary["arms"].items():
            row: dict[str, Any] = {"arm": arm, "guarantee": found["guarantee"], "epsilon": found["epsilon"]}
            for metric, value in found["metrics"].items():
                if not metric.startswith(("yield/", "exchange/")):
                    row[metric], row[f"{metric}_std"] = value["mean"], value["std"]
            row |= {"bytes_up": found["bytes"]["up"], "bytes_down": found["bytes"]["down"]}
            rows.append({**row, "losses": "; ".join(loss["line"] for loss in found.get("losses", []))})
        return pd.DataFrame(rows).set_index("arm")

    @property
    def few(self) -> dict[str, list[str]]:
        """By arm, the steps that left so few texts that the arm's figures do not describe its method."""
        told = {arm: found.get("losses", []) for arm, found in self.summary["arms"].items()}
        few = {arm: [loss["line"] for loss in own if loss["few"]] for arm, own in told.items()}
        return {arm: lines for arm, lines in few.items() if lines}

    @property
    def sentences(self) -> list[str]:
        """What a reader has to know beside the table: the run's verdict, arms that lost their texts, the privacy of
        each arm."""
        verdict = self.conclusion.get("verdict", [])
        lost = [f"{arm}: {'; '.join(lines)}" for arm, lines in self.few.items()]
        return [*verdict, *lost, *(f"{arm}: {said['line']}" for arm, said in self.privacy.items())]

    def difference(self, arm: str, baseline: str, metric: str = "accuracy") -> Difference:
        """Mean paired difference of two arms over (seed, client), with its bootstrap interval."""
        return paired_difference(self.metrics, arm, baseline, metric=metric)

    def corpora(self, arm: str, seed: int | None = None, kind: str = "written") -> Corpora:
        """Texts by client, of the last round that has some. Key -1 is the server: its one corpus for all clients.

        Args:
            arm: An arm of the run.
            seed: One of its seeds; None for the first.
            kind: `drafts` (released by clients), `written` (the LLM's texts from these), or another kind that the
                arm's strategy logs.

        Raises:
            BadValue: If the run has no such arm or seed, or the arm logged texts and none of this kind.
        """
        own = self.metrics[self.metrics["arm"] == arm]
        seeds = sorted(map(int, own["seed"].unique()))
        if not seeds:
            arms = list(self.summary["arms"])
            raise BadValue(f"the run has no arm {arm!r}{nearest(arm, arms)}; it has {', '.join(arms)}")
        if seed is not None and seed not in seeds:
            raise BadValue(f"the run has no seed {seed} of {arm!r}; it has {', '.join(map(str, seeds))}")
        folder = self.out / "corpora" / arm / f"seed-{seeds[0] if seed is None else seed}"
        kinds = sorted({path.stem.rpartition("-round")[0] for path in folder.glob("*-round*-client*.parquet")})
        if kinds and kind not in kinds:
            raise BadValue(f"the arm {arm!r} has no texts of the kind {kind!r}; it has {', '.join(kinds)}")
        files = sorted(
            folder.glob(f"{kind}-round*.parquet"), key=lambda p: int(p.stem.split("-round")[1].split("-")[0])
        )
        found = {int(p.stem.rpartition("client")[2]): p for p in files}  # the last round's
        return Corpora({client: corpus_from_parquet(found[client].read_bytes()) for client in sorted(found)})

    def plot(self, metric: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Each arm's mean of a metric, with its 95 % interval (bootstrap over seeds, then clients).

        Args:
            metric: A metric that clients have, in each arm's last round; None for accuracy or exact match.
            ax: Draws here; None for a figure of its own.

        Raises:
            BadValue: If no arm has the metric, or matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as problem:
            raise BadValue("a plot needs matplotlib: pip install 'fedsynth[plot]'") from problem
        metric = metric or self._headline
        values = {arm: found for arm in self.summary["arms"] if len(found := self._last(arm, metric))}
        if not values:
            known = sorted(self.metrics.loc[self.metrics["client"] >= 0, "metric"].unique())
            raise BadValue(f"no client has the metric {metric!r}; the run has {', '.join(known)}")
        if ax is None:
            _, ax = pyplot.subplots(figsize=(6.4, 1.2 + 0.4 * len(values)), layout="constrained")
        for place, found in enumerate(values.values()):
            mean, (low, high) = float(found.mean()), bootstrap(found)
            ax.plot([low, high], [place, place], color="0.6", linewidth=2, solid_capstyle="round")
            ax.plot([mean], [place], "o", color="C0")
            ax.annotate(f"{mean:.3f}", (mean, place), xytext=(0, 6), textcoords="offset points", ha="center")
        ax.set_yticks(range(len(values)), [f"{arm}\n{self._guarantee(arm)}" for arm in values])
        ax.set_ylim(len(values) - 0.4, -0.6)  # the first arm on top
        ax.set_xlabel(f"{metric.replace('_', ' ')}, mean and 95 % interval")
        ax.set_title(str(self.summary["scenario"]))
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(left=False)
        return ax

    @cached_property
    def _headline(self) -> str:
        there = set(self.metrics["metric"])
        return next((metric for metric in HEADLINE if metric in there), HEADLINE[0])

    def _last(self, arm: str, metric: str) -> pd.Series[float]:
        """A metric's values by (seed, client) in an arm's last round."""
        own = self.metrics[(self.metrics["arm"] == arm) & (self.metrics["client"] >= 0)]
        own = own[(own["metric"] == metric) & (own["round"] == own["round"].max())]
        values: pd.Series[float] = own.set_index(["seed", "client"])["value"]
        return values

    def _guarantee(self, arm: str) -> str:
        found = self.summary["arms"][arm]
        if found["epsilon"] is None:
            return "no guarantee"
        return f"epsilon {up(found['epsilon'], 3):.3f}" if found["epsilon"] else "nothing is released"

    def __repr__(self) -> str:
        arms = self.summary["arms"]
        seeds = len(self.metrics["seed"].unique())
        means = {arm: found["metrics"].get(self._headline) for arm, found in arms.items()}
        told = ", ".join(f"{arm} {value['mean']:.3f}" if value else arm for arm, value in means.items())
        of = f" ({self._headline})" if any(means.values()) else ""
        return f"Result({self.summary['scenario']}, {seeds} seed{'s' * (seeds > 1)}: {told}{of}; {self.out})"

    def _repr_html_(self) -> str:
        """For notebooks: the table, then `sentences`."""
        arms = self.summary["arms"]
        shown = [m for m in dict.fromkeys(m for a in arms.values() for m in a["metrics"]) if "/" not in m]
        rows = [
            [arm, *(_figure(found["metrics"].get(metric)) for metric in shown), self._guarantee(arm)]
            for arm, found in arms.items()
        ]
        heads = ["arm", *(metric.replace("_", " ") for metric in shown), "guarantee"]
        title = Markup("<strong>{}</strong>, written to {}").format(self.summary["scenario"], self.out)
        said = Markup("").join(Markup("<li>{}</li>").format(line) for line in self.sentences)
        return str(
            Markup("<p>{}</p>{}<ul style='max-width:60em'>{}</ul>").format(title, _html_table(heads, rows), said)
        )


def read(out: Path) -> Result:
    """The result in a run's directory.

    Raises:
        BadValue: If no run was completed there.
    """
    if missing := [name for name in FILES if not (out / name).is_file()]:
        raise BadValue(_why_none(out, missing))
    files = {name: json.loads((out / name).read_text(encoding="utf-8")) for name in FILES[:2]}
    told = out / "conclusion.json"
    conclusion = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    metrics = pd.read_parquet(out / "metrics.parquet")
    return Result(out, files["summary.json"], metrics, files["privacy.json"], conclusion)


def _why_none(out: Path, missing: Sequence[str]) -> str:
    if not out.is_dir():
        return f"there is no directory {str(out)!r}"
    if (out / "comparison.json").is_file():
        return f"{str(out)!r} holds a comparison: load one of its runs, in {out / 'runs'}"
    if (out / "scenario.toml").is_file():
        return f"the run in {str(out)!r} is not done: go on with it, `fedsynth run --resume {out}`"
    return f"{str(out)!r} holds no run: there is no {missing[0]}"


def _figure(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ± {value['std']:.3f}")


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    def line(cells: Sequence[str], tag: str) -> Markup:
        cell = Markup(f"<{tag} style='text-align:left'>{{}}</{tag}>")
        return Markup("<tr>{}</tr>").format(Markup("").join(cell.format(text) for text in cells))

    body = Markup("").join(line(row, "td") for row in rows)
    return Markup("<table><thead>{}</thead><tbody>{}</tbody></table>").format(line(heads, "th"), body)
