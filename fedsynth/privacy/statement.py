"""The privacy statement of a client: the figures of its plans, and what they cost together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.plan import (
    DPPlan,
    Mechanism,
    Relation,
    check_names,
    composed_epsilon,
    epsilon,
    group_epsilon,
    replaced_epsilon,
)
from fedsynth.privacy.skellam import sigma_of


@dataclass(frozen=True)
class Statement:
    """A report's statement of a run's privacy, with the figures that belong to epsilon.

    Attributes:
        guarantee: "none" if anything left without a mechanism; epsilon is None then.
        epsilon: Epsilon of all rounds, zero-out adjacency.
        delta: The delta of every epsilon here.
        epsilon_replace_one: The same for a unit replaced by any other one.
        epsilon_rows: Epsilon for 2, 5 and 10 rows of one person, if the unit is a row. Empty for persons.
        unit: The privacy unit: "row", "patient", ...
        rows_per_unit: The most rows of a unit that count.
        sigma: Noise multiplier.
        sampling_rate: Probability of each unit in each step.
        steps: Steps of all rounds.
        clip_norm: L2 norm to which a unit's gradient is clipped.
        simulated: True if the noise comes from a run seed and is reproducible: a statement about a hypothetical site.
        mechanism: What gets the noise.
        cohort: The cohort of the secure sum that epsilon rests on; None if it holds for the client's messages alone.
        epsilon_alone: Epsilon of the client's own messages, if the server could read them without the sum.
    """

    guarantee: Literal["dp", "none"]
    epsilon: float | None
    delta: float
    epsilon_replace_one: float | None = None
    epsilon_rows: dict[int, float] = field(default_factory=dict)
    unit: str = "row"
    rows_per_unit: int = 1
    sigma: float | None = None
    sampling_rate: float | None = None
    steps: int | None = None
    clip_norm: float | None = None
    simulated: bool = False
    mechanism: Mechanism = "gradients"
    cohort: Cohort | None = None
    epsilon_alone: float | None = None

    def __post_init__(self) -> None:
        if (self.cohort is None) != (self.epsilon_alone is None):
            raise ValueError("a cohort and epsilon_alone belong together")
        if (self.guarantee == "dp") != (self.epsilon is not None and math.isfinite(self.epsilon)):
            raise ValueError(f"guarantee {self.guarantee!r} cannot stand beside epsilon {self.epsilon}")

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON: row counts become text, and an infinite figure the text "inf"."""
        values = asdict(self)
        values["epsilon_rows"] = {str(rows): _finite(figure) for rows, figure in self.epsilon_rows.items()}
        for name in ("epsilon_replace_one", "epsilon_alone"):
            values[name] = _finite(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statement:
        """The statement that `to_dict` wrote.

        Raises:
            ValueError: If names are missing or unknown.
        """
        check_names(cls, values)
        replaced = values["epsilon_replace_one"]
        rows = {int(rows): float(figure) for rows, figure in values["epsilon_rows"].items()}
        replace_one = None if replaced is None else float(replaced)
        alone = None if values["epsilon_alone"] is None else float(values["epsilon_alone"])
        cohort = None if values["cohort"] is None else Cohort(**values["cohort"])
        return cls(
            **{**values, "epsilon_rows": rows, "epsilon_replace_one": replace_one}
            | {"cohort": cohort, "epsilon_alone": alone}
        )


ROWS_OF_A_PERSON = (2, 5, 10)  # docs/privacy.md


def statement(
    plan: DPPlan | None,
    *,
    delta: float = 1e-5,
    unit: str = "row",
    rows_per_unit: int = 1,
    rows: Iterable[int] = ROWS_OF_A_PERSON,
    simulated: bool = False,
    cohort: Cohort | None = None,
) -> Statement:
    """The statement of a plan that runs whole; without a plan, the statement that there is no guarantee.

    Args:
        plan: The plan; None for a run in which anything leaves without a mechanism.
        delta: The delta if there is no plan; a plan has its own.
        unit: "row" if rows are declared independent, else the name of the privacy unit.
        rows_per_unit: The most rows of a unit that count.
        rows: Numbers of rows of one person for which the statement has epsilon, too; ignored unless the unit is a row.
            The figures take seconds each and are cached.
        simulated: True if the noise is reproducible.
        cohort: The cohort of the secure sum that the plan's noise is counted in.
    """
    if plan is None:
        return Statement("none", None, delta, unit=unit, rows_per_unit=rows_per_unit, simulated=simulated)
    return Statement(
        guarantee="dp",
        epsilon=epsilon(plan, plan.delta),
        delta=plan.delta,
        epsilon_replace_one=replaced_epsilon(plan),
        epsilon_rows={size: group_epsilon(plan, size, plan.delta) for size in rows} if unit == "row" else {},
        unit=unit,
        rows_per_unit=rows_per_unit,
        sigma=plan.noise_multiplier,
        sampling_rate=plan.sampling_rate,
        steps=plan.total_steps,
        clip_norm=plan.clip_norm,
        simulated=simulated,
        mechanism=plan.mechanism,
        cohort=cohort,
        epsilon_alone=None if cohort is None else cohort.alone(plan.noise_multiplier, plan.total_steps, plan.delta),
    )


def _finite(figure: float | None) -> float | str | None:
    return "inf" if figure == math.inf else figure


@dataclass(frozen=True)
class Spending:
    """All that a client has stated in a run: one statement for each of its plans, and what they cost together.

    Attributes:
        parts: At least one statement. A plan whose rounds have grown has its last one. A statement without a guarantee
            stands alone.
    """

    parts: tuple[Statement, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a client that has stated nothing has no spending")

    def and_(self, said: Statement) -> Spending:
        """The spending with one more statement. The largest figure of a plan holds, as replies may come late."""
        if self.guarantee == "none":
            return self
        if said.guarantee == "none":
            return Spending((said,))
        same = [part for part in self.parts if _kind(part) == _kind(said)]
        others = [part for part in self.parts if _kind(part) != _kind(said)]
        return Spending((*others, max([*same, said], key=lambda part: part.epsilon or 0.0)))

    @property
    def guarantee(self) -> Literal["dp", "none"]:
        """ "none" if anything left without a mechanism."""
        return self.parts[0].guarantee

    @property
    def delta(self) -> float:
        """The delta of epsilon."""
        return max(part.delta for part in self.parts)

    @property
    def epsilon(self) -> float | None:
        """Epsilon of all plans together, zero-out adjacency; None without a guarantee."""
        return self._together("zero_out", "epsilon")

    @property
    def epsilon_replace_one(self) -> float | None:
        """The same for a unit replaced by any other one."""
        return self._together("replace_one", "epsilon_replace_one")

    @property
    def epsilon_alone(self) -> float | None:
        """Epsilon if the server could read a client's own messages without the sum; None if it is in no sum."""
        if all(part.cohort is None for part in self.parts):
            return None
        if len(self.parts) == 1:
            return self.parts[0].epsilon_alone
        own = [replace(plan_of(part), noise_multiplier=_alone(part)) for part in self.parts]
        return composed_epsilon(own, self.delta)

    @property
    def unit(self) -> str:
        """The privacy units, joined by "or"."""
        return " or ".join(sorted({part.unit for part in self.parts}))

    @property
    def simulated(self) -> bool:
        """True if the noise of a part is reproducible."""
        return any(part.simulated for part in self.parts)

    def epsilon_rows(self, rows: int) -> float:
        """Epsilon for so many rows of one person, if the unit is a row."""
        return group_epsilon([plan_of(part) for part in self.parts], rows, self.delta)

    def _together(self, relation: Relation, name: str) -> float | None:
        if self.guarantee == "none" or len(self.parts) == 1:
            figure: float | None = getattr(self.parts[0], name)
            return figure
        return composed_epsilon([plan_of(part) for part in self.parts], self.delta, relation=relation)


def plan_of(said: Statement) -> DPPlan:
    """The plan behind a statement, up to a common factor of records and batch, on which no figure depends."""
    rate = Fraction(said.sampling_rate or 1).limit_denominator(10**7)
    return DPPlan(
        records=10 * rate.denominator,
        expected_batch=10 * rate.numerator,
        steps=said.steps or 1,
        rounds=1,
        clip_norm=said.clip_norm or 1.0,
        noise_multiplier=said.sigma or 1.0,
        delta=said.delta,
        mechanism=said.mechanism,
    )


def _kind(said: Statement) -> tuple[object, ...]:
    """The same for all statements of one plan, however many of its rounds they cover."""
    return said.mechanism, said.unit, said.sigma, said.sampling_rate, said.clip_norm, said.delta, said.cohort


def _alone(said: Statement) -> float:
    """The noise multiplier of a client's own messages."""
    sigma = said.sigma or 1.0
    return sigma if said.cohort is None else sigma_of(said.cohort.share(sigma))
