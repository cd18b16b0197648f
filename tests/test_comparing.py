"""Statistics of a grid, against figures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd
import pytest

from fedsynth.evaluation.comparing import COLUMNS, Terms, costs, pareto, points, utility
from fedsynth.evaluation.utility import bootstrap, paired_difference

NAN = math.nan
Row = tuple[str, str, float, str, int, int, int, str, float]


def level(arm: str, epsilon: float, values: dict[tuple[int, int], float], round: int = 1) -> list[Row]:
    return [("h", "classification", epsilon, arm, s, round, c, "accuracy", v) for (s, c), v in values.items()]


def server(arm: str, epsilon: float, metric: str, value: float, seed: int = 0, round: int = 1) -> Row:
    return ("h", "classification", epsilon, arm, seed, round, -1, metric, value)


def frame(*rows: Iterable[Row] | Row) -> pd.DataFrame:
    flat = [r for row in rows for r in ([row] if isinstance(row[0], str) else row)]
    return pd.DataFrame(flat, columns=list(COLUMNS))


LOCAL = {(0, 0): 0.2, (0, 1): 0.4, (1, 0): 0.4, (1, 1): 0.6}
AT_2 = {(0, 0): 0.3, (0, 1): 0.5, (1, 0): 0.5, (1, 1): 0.7}  # .1 more for each client
AT_8 = {(0, 0): 0.4, (0, 1): 0.6, (1, 0): 0.6, (1, 1): 0.8}  # .2 more


def twice(values: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """As many clients again, alike: eight pairs are enough for an interval."""
    return {**values, **{(seed, client + 2): value for (seed, client), value in values.items()}}


GRID = frame(level("local", NAN, twice(LOCAL)), level("fdkt", 2.0, twice(AT_2)), level("fdkt", 8.0, twice(AT_8)))


def test_means_and_deviations_are_over_seeds_of_the_clients_means() -> None:
    row = utility(GRID, {"h": Terms("local", "accuracy")}).set_index(["arm", "epsilon"]).loc[("fdkt", 8.0)]
    # Seed 0: .5, seed 1: .7. Mean .6, deviation sqrt(.01 + .01) / sqrt(1).
    assert (row["mean"], row["std"]) == (pytest.approx(0.6), pytest.approx(0.02**0.5))
    assert (row["seeds"], row["clients"]) == (2, 4)
    assert 0.4 <= row["low"] < 0.6 < row["high"] <= 0.8


def test_a_baseline_that_does_not_depend_on_epsilon_is_the_same_at_each() -> None:
    found = utility(GRID, {"h": Terms("local", "accuracy")})
    assert list(found["arm"]) == ["local", "fdkt", "fdkt"]
    assert found["epsilon"].tolist()[1:] == [2.0, 8.0]
    assert found["epsilon"].isna().tolist() == [True, False, False]
    assert math.isnan(found["difference"][0])
    assert found["difference"].tolist()[1:] == pytest.approx([0.1, 0.2])
    assert found["difference_low"].tolist()[1:] == pytest.approx([0.1, 0.2])  # a constant gain: no width
    assert found["better"].tolist()[1:] == [1.0, 1.0]
    assert found["pairs"].tolist()[1:] == [8, 8]


def test_against_a_baseline_under_dp_arms_are_compared_at_each_of_its_epsilons() -> None:
    found = utility(GRID, {"h": Terms("fdkt", "accuracy")}).set_index(["arm", "epsilon"])
    assert found.loc[("local", 2.0), "difference"] == pytest.approx(-0.1)
    assert found.loc[("local", 8.0), "difference"] == pytest.approx(-0.2)
    assert len(found) == 4


def test_unequal_epsilons_are_not_compared() -> None:
    rows = frame(level("fdkt", 8.0, AT_8), level("fdkt_epsilon2", 2.0, AT_2))
    found = utility(rows, {"h": Terms("fdkt", "accuracy")}).set_index("arm")
    assert math.isnan(found.loc["fdkt_epsilon2", "difference"])
    assert found.loc["fdkt_epsilon2", "mean"] == pytest.approx(0.5)


def test_the_held_out_figure_leaves_out_clients_that_were_tuned_on() -> None:
    uneven = {**AT_8, (0, 1): 0.8, (1, 1): 1.0}
    rows = frame(level("local", NAN, LOCAL), level("fdkt", 8.0, uneven))
    row = utility(rows, {"h": Terms("local", "accuracy", (0,))}).set_index("arm").loc["fdkt"]
    assert row["mean"] == pytest.approx((0.4 + 0.8 + 0.6 + 1.0) / 4)
    assert row["held_out_mean"] == pytest.approx(0.9)  # of client 1: .8 and 1.0
    assert row["held_out_difference"] == pytest.approx(0.4)
    assert row["difference"] == pytest.approx(0.3)
    assert row["held_out_pairs"] == 2


def test_one_seed_has_no_deviation_and_no_tuned_clients_no_held_out_figure() -> None:
    row = utility(frame(level("local", NAN, {(0, 0): 0.5, (0, 1): 0.7})), {"h": Terms("local", "accuracy")}).iloc[0]
    assert math.isnan(row["std"])
    assert math.isnan(row["held_out_mean"])
    assert row["mean"] == pytest.approx(0.6)


def test_each_arm_counts_in_its_own_last_round() -> None:
    rows = frame(level("local", NAN, LOCAL), level("crosslm", NAN, LOCAL, 1), level("crosslm", NAN, AT_8, 3))
    found = utility(rows, {"h": Terms("local", "accuracy")}).set_index("arm")
    assert found.loc["crosslm", "mean"] == pytest.approx(0.6)
    assert found.loc["crosslm", "difference"] == pytest.approx(0.2)


def test_a_pooled_arm_is_not_paired_with_one_client_of_others() -> None:
    rows = frame(
        level("local", NAN, LOCAL),
        level("pooled", NAN, {(0, 0): 0.9, (1, 0): 0.8}),
        server("pooled", NAN, "data/pooled", 1.0),
    )
    row = utility(rows, {"h": Terms("local", "accuracy", (1,))}).set_index("arm").loc["pooled"]
    assert row["mean"] == pytest.approx(0.85)
    assert math.isnan(row["difference"])
    assert math.isnan(row["held_out_mean"])


def test_metrics_of_the_task_stand_one_after_the_other_the_scenarios_first() -> None:
    rows = [(s, "instructions", NAN, "base", 0, 1, 0, m, 0.1) for s in ("a", "b") for m in ("exact_match", "rouge_l")]
    found = utility(frame(rows), {"a": Terms("base", "exact_match"), "b": Terms("base", "rouge_l")})
    assert list(found["metric"]) == ["exact_match", "rouge_l", "rouge_l", "exact_match"]


def test_costs_are_sums_over_clients_and_means_over_seeds() -> None:
    rows: list[Row] = []
    for seed in (0, 1):
        figures = {"bytes/up": 100.0 + 20 * seed, "bytes/down": 10.0, "privacy/delta": 1e-5, "privacy/epsilon": 7.0}
        for client in (0, 1):
            noted = {**figures, "privacy/epsilon": 7.0 + client}
            rows += [("h", "classification", 8.0, "fdkt", seed, 2, client, m, v) for m, v in noted.items()]
            rows += [("h", "classification", 8.0, "fdkt", seed, r, client, "seconds/client", 1.5) for r in (1, 2)]
        read = {1: 50.0, 2: 70.0}
        rows += [server("fdkt", 8.0, "llm/tokens_read", tokens, seed, round) for round, tokens in read.items()]
    found = costs(frame(rows)).iloc[0]
    assert (found["bytes_up"], found["bytes_down"]) == (220.0, 20.0)  # (200 + 240) / 2
    assert found["client_seconds"] == 6.0
    assert found["tokens_read"] == 120.0
    assert math.isnan(found["tokens_written"])
    assert (found["guarantee"], found["epsilon_stated"], found["delta"]) == ("dp", 8.0, 1e-5)


def test_what_is_stated_without_a_guarantee_is_nothing_and_without_a_release_zero() -> None:
    rows = frame(server("no_dp", NAN, "privacy/epsilon", math.inf), server("local", NAN, "privacy/epsilon", 0.0))
    found = costs(rows).set_index("arm")
    assert found.loc["no_dp", "guarantee"] == "none"
    assert math.isnan(found.loc["no_dp", "epsilon_stated"])
    assert (found.loc["local", "guarantee"], found.loc["local", "epsilon_stated"]) == ("dp", 0.0)


def test_a_client_without_a_guarantee_leaves_the_arm_without_one() -> None:
    rows = frame(
        server("mixed", 8.0, "privacy/epsilon", math.inf),
        ("h", "classification", 8.0, "mixed", 0, 1, 0, "privacy/epsilon", 7.9),
    )
    assert costs(rows).iloc[0]["guarantee"] == "none"


def placed(arm: str, utility: float, epsilon: float, moved: float, *, pooled: bool = False) -> dict[str, object]:
    return {"scenario": "h", "arm": arm, "utility": utility, "epsilon": epsilon, "bytes": moved, "pooled": pooled}


def test_a_front_by_hand() -> None:
    found = pareto(
        pd.DataFrame(
            [
                placed("local", 0.5, 0.0, 10),
                placed("twin", 0.5, 0.0, 10),  # alike in all: neither dominates
                placed("dp_only", 0.7, 8.0, 50),
                placed("fdkt2", 0.8, 2.0, 120),  # better than dp_only for a smaller epsilon, not for fewer bytes
                placed("fdkt8", 0.85, 8.0, 120),  # as many bytes as fdkt2, and better
                placed("no_dp", 0.84, math.inf, 120),
                placed("pooled", 0.99, math.inf, 1, pooled=True),
            ]
        )
    ).set_index("arm")
    assert set(found.index[found["pareto_epsilon"]]) == {"local", "twin", "fdkt2", "fdkt8"}
    assert set(found.index[found["pareto_bytes"]]) == {"local", "twin", "dp_only", "fdkt8"}


def test_scenarios_have_fronts_of_their_own() -> None:
    rows = [placed("a", 0.9, 1.0, 1), {**placed("b", 0.1, 2.0, 2), "scenario": "other"}]
    assert pareto(pd.DataFrame(rows))["pareto_epsilon"].tolist() == [True, True]


def test_points_hold_what_was_stated_and_what_was_sent() -> None:
    more = [
        server("local", NAN, "privacy/epsilon", 0.0),
        *(("h", "classification", 8.0, "fdkt", s, 1, 0, "privacy/epsilon", 7.994) for s in (0, 1)),
        *(
            ("h", "classification", 8.0, "fdkt", s, 1, c, f"bytes/{d}", 5.0)
            for s in (0, 1)
            for c in (0, 1)
            for d in ("up", "down")
        ),
        *(
            ("h", "classification", NAN, "local", s, 1, c, f"bytes/{d}", 1.0)
            for s in (0, 1)
            for c in (0, 1)
            for d in ("up", "down")
        ),
    ]
    levels = (level("local", NAN, twice(LOCAL)), level("fdkt", 8.0, twice(AT_8)))
    found = points(frame(*levels, more)).set_index("arm")
    assert found["epsilon"].to_dict() == {"local": 0.0, "fdkt": 7.994}
    assert math.isnan(found.loc["local", "budget"])
    assert found.loc["fdkt", "budget"] == 8.0
    assert found["bytes"].to_dict() == {"local": 4.0, "fdkt": 20.0}
    assert found["utility"].to_dict() == pytest.approx({"local": 0.4, "fdkt": 0.6})
    assert (found["low"] < found["utility"]).all()
    assert (found["utility"] < found["high"]).all()
    assert pareto(found.reset_index())["pareto_bytes"].tolist() == [True, True]


def test_bytes_that_nobody_counted_leave_an_arm_off_that_front() -> None:
    found = pareto(points(frame(level("local", NAN, LOCAL), server("local", NAN, "privacy/epsilon", 0.0))))
    assert math.isnan(found["bytes"][0])
    assert (bool(found["pareto_epsilon"][0]), bool(found["pareto_bytes"][0])) == (True, False)


def by(values: dict[tuple[int, int], float]) -> pd.Series:
    return pd.Series(values).rename_axis(["seed", "client"])


def test_the_bootstrap_of_one_seed_is_that_of_its_clients() -> None:
    # Six clients, three at 0 and three at 1: of six draws none is 1 with chance 1/64 = 1.6 %, one at most with 7/64.
    ends = bootstrap(by({(0, client): float(client % 2) for client in range(6)}))
    assert ends == (pytest.approx(1 / 6), pytest.approx(5 / 6))


@pytest.mark.parametrize(("pairs", "shown"), [(1, False), (2, False), (5, False), (6, True)])
def test_few_pairs_have_no_interval(pairs: int, shown: bool) -> None:
    # Five pairs agree in sign by chance in 2 of 32 cases, six in 2 of 64.
    ends = bootstrap(by({(0, client): 0.05 + 0.01 * client for client in range(pairs)}))
    assert [math.isnan(end) for end in ends] == [not shown] * 2
    alone = paired_difference(
        frame(*(level(arm, NAN, {(0, c): v for c in range(pairs)}) for arm, v in (("a", 0.5), ("b", 0.25)))), "a", "b"
    )
    assert (alone.mean, alone.pairs, math.isnan(alone.low)) == (0.25, pairs, not shown)
    assert ("no interval" in repr(alone)) is not shown


def test_the_bootstrap_draws_seeds_first() -> None:
    # Clients of a seed are alike: the mean of two draws of seeds is 0 or 1 with chance 1/4 each, as if there were two
    # values. Drawn as forty independent ones, the interval would be about .5 +- .16.
    values = {(s, c): float(s) for s in (0, 1) for c in range(20)}
    assert bootstrap(by(values)) == (0.0, 1.0)


def test_the_bootstrap_weighs_every_client_alike_where_seeds_have_unlike_numbers_of_them() -> None:
    # 100 seeds have one client (1.0), 100 have three (0.0): a quarter of the clients, although half of the seeds.
    ones = {(seed, 0): 1.0 for seed in range(100)}
    low, high = bootstrap(by({**ones, **{(seed, c): 0.0 for seed in range(100, 200) for c in range(3)}}))
    assert low < 0.25 < high < 0.35


def test_blocks_of_resamples_change_nothing_in_the_intervals_width() -> None:
    # 20,000 clients: blocks of 52. The deviation of a mean of n uniform values is sqrt(1 / 12 / n).
    low, high = bootstrap(by({(0, c): (c + 0.5) / 20000 for c in range(20000)}), resamples=200)
    assert high - low == pytest.approx(3.92 * (1 / 12 / 20000) ** 0.5, rel=0.25)
    assert low < 0.5 < high
