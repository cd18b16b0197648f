"""The verdict of a run: what it says of figures that are known, and what it refuses to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedsynth.corpus import Corpus, Provenance
from fedsynth.evaluation import verdict as module
from fedsynth.evaluation.lines import lines_of, recorded
from fedsynth.evaluation.utility import bootstrap, scores
from fedsynth.evaluation.verdict import Statement, Verdict, lead, settled, verdict
from fedsynth.federation.run import conclusion
from fedsynth.models.of_scenario import STRANGERS, strangers
from fedsynth.scenario.toml import from_toml, load
from fedsynth.simulation.simulate import check

EPSILON: dict[str, float | None] = {"local": 0.0, "public": 0.0, "fdkt": 7.994, "no_dp": None}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bootstrap", partial(bootstrap, resamples=500))


def frame(levels: Mapping[str, float], *, seeds: int = 5, clients: int = 4, spread: float = 0.01) -> pd.DataFrame:
    """Accuracies of arms, equal but for a gap and a little noise; clients differ far more."""
    rng = np.random.default_rng(0)
    base = rng.uniform(-0.2, 0.2, (seeds, clients))
    base -= base.mean()
    rows = []
    for arm, level in levels.items():
        noise = rng.normal(0, spread, (seeds, clients))
        values = level + base + noise - noise.mean()
        rows += [
            (arm, seed, 1, client, "accuracy", values[seed, client])
            for seed in range(seeds)
            for client in range(clients)
        ]
    return pd.DataFrame(rows, columns=["arm", "seed", "round", "client", "metric", "value"])


def with_lines(metrics: pd.DataFrame, **lines: float) -> pd.DataFrame:
    more = [metrics.assign(metric=f"{line}/accuracy", value=value) for line, value in lines.items()]
    return pd.concat([metrics, *more], ignore_index=True)


def concluded(levels: Mapping[str, float], **more: int | float) -> Verdict:
    return verdict(frame(levels, **more), EPSILON)  # type: ignore[arg-type]  # counts and a spread


# --- The advantage ----------------------------------------------------------------------------------------------------


def test_the_best_arm_under_a_guarantee_is_compared_with_the_baseline_and_the_best_public_arm() -> None:
    found = concluded({"local": 0.5, "public": 0.7, "fdkt": 0.7, "no_dp": 0.9})
    assert (found.metric, found.best) == ("accuracy", "fdkt")
    assert [(each.over, each.standing) for each in found.leads] == [
        ("local", "above"),
        ("public", "not distinguishable from"),
    ]
    assert found.leads[0].mean == pytest.approx(0.2)
    assert found.sentences[0] == "fdkt, the only arm under a guarantee, has accuracy 0.700, at epsilon 7.994."
    low, high = found.leads[0].low, found.leads[0].high
    assert found.sentences[1].startswith(f"It is above local by {low:.3f} to {high:.3f}, and not distinguishable from ")
    assert "public, the only other arm that releases nothing (" in found.sentences[1]
    assert found.sentences[2] == "The 95 % intervals are over 5 seeds and 20 pairs of seed and client."
    assert len(found.sentences) == 3


def test_epsilon_is_rounded_up() -> None:
    found = verdict(frame({"local": 0.5, "fdkt": 0.7}), {"local": 0.0, "fdkt": 1.00001})
    assert found.sentences[0].endswith("at epsilon 1.001.")


def test_an_arm_without_a_guarantee_is_best_where_there_is_no_other() -> None:
    found = verdict(frame({"local": 0.5, "no_dp": 0.9}), {"local": 0.0, "no_dp": None})
    assert found.sentences[0] == "no_dp, the only arm without a guarantee, has accuracy 0.900."


def test_a_loss_is_told_as_a_distance_below() -> None:
    found = concluded({"local": 0.7, "fdkt": 0.5})
    assert found.leads[0].standing == "below"
    assert f"below local by {-found.leads[0].high:.3f} to {-found.leads[0].low:.3f}." in found.sentences[1]
    assert -found.leads[0].high > 0


def test_one_seed_is_said_to_cover_clients_alone() -> None:
    found = concluded({"local": 0.5, "fdkt": 0.7}, seeds=1, clients=8)
    assert found.leads[0].standing == "above"
    assert (
        found.sentences[-1] == "One seed ran: the intervals cover the differences of 8 clients and not those of seeds."
    )


@pytest.mark.parametrize(("seeds", "clients"), [(1, 2), (1, 5), (5, 1)])
def test_nothing_is_said_of_too_few_pairs(seeds: int, clients: int) -> None:
    found = concluded({"local": 0.5, "fdkt": 0.9}, seeds=seeds, clients=clients, spread=0.0)
    assert found.leads[0].standing == "unknown"
    assert found.sentences[1].startswith("Nothing can be said of its advantage: its mean is 0.400 above that of local")
    assert "Run more seeds or clients" in found.sentences[1]
    assert not any("above local by" in sentence for sentence in found.sentences)
    assert concluded({"local": 0.5, "fdkt": 0.9}, seeds=1, clients=6, spread=0.0).leads[0].standing == "above"


def test_six_pairs_are_the_fewest_that_a_sign_test_can_settle() -> None:
    def chance(pairs: int) -> float:
        return 2 * 0.5**pairs

    assert chance(module.FEWEST_PAIRS) <= module.LEVEL < chance(module.FEWEST_PAIRS - 1)


def test_clients_on_which_settings_were_tuned_are_left_out() -> None:
    metrics = frame({"local": 0.5, "fdkt": 0.5}, seeds=6)
    metrics.loc[(metrics["arm"] == "fdkt") & metrics["client"].isin([0, 1]), "value"] += 0.3
    assert verdict(metrics, EPSILON).leads[0].mean == pytest.approx(0.15)
    found = verdict(metrics, EPSILON, tuned_on=(0, 1))
    assert found.leads[0].mean == pytest.approx(0.0, abs=0.02)
    assert "on the clients on which no setting was tuned" in found.sentences[0]
    assert verdict(metrics, EPSILON, tuned_on=(0, 1, 2, 3)).leads[0].mean == pytest.approx(0.15)  # there are no others


def test_a_pooled_arm_is_not_compared() -> None:
    epsilon = {**EPSILON, "pooled": None}
    found = verdict(frame({"local": 0.5, "fdkt": 0.6, "pooled": 0.9}), epsilon, pooled=["pooled"])
    assert (found.best, [each.over for each in found.leads]) == ("fdkt", ["local"])


def test_runs_with_little_to_compare() -> None:
    alone = concluded({"fdkt": 0.7})
    assert alone.sentences == (
        "fdkt, the only arm under a guarantee, has accuracy 0.700, at epsilon 7.994.",
        "It ran alone: there is nothing to compare it with.",
    )
    nothing = verdict(frame({"local": 0.5})[:0], EPSILON)
    assert nothing.sentences == ("No figure of a task model was recorded: there is nothing to conclude from.",)
    free = concluded({"local": 0.5, "public": 0.7})
    assert free.sentences[0] == "public, the only other arm that releases nothing, has accuracy 0.700."


# --- How often it is wrong --------------------------------------------------------------------------------------------


def alarms(decide: Callable[[pd.Series], bool], seeds: int, clients: int, shared: float, runs: int) -> float:
    """The share of runs without any difference in which an arm is said to be above or below.

    Args:
        decide: The rule.
        seeds: Seeds of a run.
        clients: Clients of each.
        shared: Share of the variance that all clients of a seed have in common.
        runs: Number of runs.
    """
    rng = np.random.default_rng(1)
    index = pd.MultiIndex.from_product([range(seeds), range(clients)], names=["seed", "client"])
    said = 0
    for _ in range(runs):
        common = np.repeat(rng.normal(0, shared**0.5, seeds), clients)
        own = rng.normal(0, (1 - shared) ** 0.5, seeds * clients)
        said += decide(pd.Series(common + own, index=index))
    return said / runs


def by_both(gaps: pd.Series) -> bool:
    return lead(gaps, "local").standing in ("above", "below")


def by_interval(gaps: pd.Series) -> bool:
    return "not" not in lead(gaps, "local").standing


@pytest.mark.parametrize(("seeds", "clients", "shared"), [(3, 8, 1.0), (3, 8, 0.3), (5, 8, 1.0), (1, 8, 0.0)])
def test_an_arm_without_an_advantage_is_called_above_or_below_in_no_more_than_5_percent(
    seeds: int, clients: int, shared: float
) -> None:
    # 400 runs of a 5 % error: the deviation is 1.1 %.
    assert alarms(by_both, seeds, clients, shared, 400) <= 0.05 + 3 * 0.011


def test_the_interval_alone_would_be_wrong_in_every_fourth_run_of_three_seeds() -> None:
    # If seeds decide all, it leaves out 0 wherever three of them agree in sign: 2 / 2^3.
    assert alarms(by_interval, 3, 8, 1.0, 400) == pytest.approx(0.25, abs=0.07)


def test_a_lead_that_the_seeds_do_not_settle_is_probable() -> None:
    found = pd.Series([0.01, 0.01, 0.01, 0.01, 0.08, 0.08], pd.MultiIndex.from_product([range(3), range(2)]))
    found.index.names = ["seed", "client"]
    assert lead(found, "local").standing == "probably above"
    assert lead(-found, "local").standing == "probably below"
    said = concluded_of(found)
    assert "It is probably above local by" in said[1]
    assert said[2] == "“Probably”: 3 seeds alone do not settle it; more seeds would."


def concluded_of(found: pd.Series) -> Sequence[str]:
    local = found.rename("value").reset_index().assign(arm="local", round=1, metric="accuracy", value=0.5)
    fdkt = found.rename("value").reset_index().assign(arm="fdkt", round=1, metric="accuracy")
    fdkt["value"] += 0.5
    return verdict(pd.concat([local, fdkt]), EPSILON).sentences


def test_the_test_is_students() -> None:
    # t of (1, 2, 3) is 2 / (1 / sqrt 3) = 3.46, below 4.303 of two degrees of freedom; of (2, 3, 4) it is 5.2.
    assert not settled(pd.Series([1.0, 2.0, 3.0]))
    assert settled(pd.Series([2.0, 3.0, 4.0]))
    assert not settled(pd.Series([1.0]))


# --- Lines ------------------------------------------------------------------------------------------------------------


def corpus(answers: Sequence[str], options: Sequence[tuple[str, ...]] | None = None) -> Corpus:
    texts = tuple(f"text {number}" for number in range(len(answers)))
    own = None if options is None else tuple(options)
    return Corpus(texts, tuple(answers), Provenance.PRIVATE, options=own)


def test_lines_are_those_of_a_constant_and_of_a_random_answer() -> None:
    truth, labels = ["a"] * 5 + ["b"] * 3 + ["c"] * 2, ("a", "b", "c", "d")
    found = lines_of(corpus(truth), labels)
    assert found["chance/accuracy"] == 0.25
    constant = scores(truth, ["a"] * 10, labels)
    assert found["majority/accuracy"] == constant["accuracy"] == 0.5
    assert found["majority/macro_f1"] == pytest.approx(constant["macro_f1"])
    rng = np.random.default_rng(0)
    drawn = [scores(truth, list(rng.choice(labels, 10)), labels)["accuracy"] for _ in range(300)]
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.03)


def test_an_unknown_label_is_right_for_no_answer() -> None:
    found = lines_of(corpus(["a", "a", "b", "zzz"]), ("a", "b"))
    assert found["majority/accuracy"] == scores(["a", "a", "b", "zzz"], ["a"] * 4, ("a", "b"))["accuracy"] == 0.5
    assert found["chance/accuracy"] == pytest.approx(3 / 4 / 2)
    assert lines_of(corpus(["zzz"]), ("a", "b")) == {}


def test_options_of_a_row_are_as_many_chances() -> None:
    found = lines_of(corpus(["A", "B", "A"], [("x", "y"), ("x", "y", "z", "w"), ("x", "y")]), ())
    assert found["chance/accuracy"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 2) / 3)
    assert found["majority/accuracy"] == pytest.approx(2 / 3)


def test_arms_at_chance_and_below_the_majority_line_are_named() -> None:
    metrics = with_lines(frame({"local": 0.25, "fdkt": 0.45}), chance=0.25, majority=0.35)
    found = verdict(metrics, EPSILON, record=[Statement("every text is cut to {share:.0f} %", {"share": 10.0})])
    assert "local is at chance (0.250)." in found.sentences
    assert not any("majority" in sentence for sentence in found.sentences)  # it is below a line that is higher, too
    assert recorded(metrics, "accuracy", "chance") == pytest.approx(0.25)


def test_if_no_arm_is_above_the_majority_line_the_reasons_follow() -> None:
    metrics = with_lines(frame({"local": 0.25, "fdkt": 0.3}), chance=0.1, majority=0.35)
    reason = Statement("every text is cut to {share:.0f} %", {"share": 10.0})
    found = verdict(metrics, EPSILON, record=[reason, Statement("no label {{x}}")])
    line = "the majority line (0.350), which always answers the commonest test label"
    assert f"No arm is clearly above {line}." in found.sentences
    assert found.sentences[-1] == "Likely reasons in the run's record: every text is cut to 10 %; no label {x}."
    good = verdict(with_lines(frame({"local": 0.5, "fdkt": 0.7}), majority=0.35), EPSILON, record=[reason])
    assert not any("reasons" in sentence for sentence in good.sentences)


def test_too_few_pairs_are_held_against_a_line_by_their_mean() -> None:
    few = frame({"local": 0.2, "fdkt": 0.9}, seeds=1, clients=2)
    found = verdict(with_lines(few, majority=0.35), EPSILON)
    assert any(s.startswith("local is not clearly above the majority line") for s in found.sentences)


def test_a_name_with_braces_is_a_name() -> None:
    found = verdict(frame({"local": 0.5, "a{0}b": 0.7}), {"local": 0.0, "a{0}b": 1.0})
    assert found.sentences[0].startswith("a{0}b, the only arm under a guarantee")


def test_shipped_models_on_a_file_are_named_by_check_and_by_the_verdict(tmp_path: Path) -> None:
    rows = "".join(f"text {row} of ward {row % 2},{'ab'[row % 2]}\n" for row in range(40))
    (tmp_path / "notes.csv").write_text(f"text,label\n{rows}")
    toml = (
        'name = "own"\n[strategy]\nuse = "fedsynth.strategies.local:LocalOnly"\n'
        f'[data]\nsource = "{tmp_path / "notes.csv"}"\nclients = 2\n'
        '[client]\ngenerator = "assets:tiny-slm"\ntask_model = "assets:tiny-slm"\nbudget = { epsilon = 8.0 }\n'
        '[server]\nllm = "assets:tiny-llm"\n'
    )
    own, of_world = from_toml(toml), load("hospitals")
    assert strangers(own) == [STRANGERS]
    assert strangers(of_world) == []
    assert STRANGERS in check(own)
    said = conclusion.concluded(own, frame({"local": 0.5}), {"local": 0.0}, {}).sentences
    assert said[-1] == f"T{STRANGERS[1:]}."
