from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from typing import Any, Literal

import pytest

from fedsynth.typed import BadValue, Count, Positive, Share, build, in_range, plain


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size must be >= 0, got {self.size}")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    on: bool = False
    colour: Colour = Colour.RED
    mode: Literal["fast", "slow"] = "fast"
    pair: tuple[int, str] = (1, "a")
    many: tuple[Inner, ...] = ()
    table: Mapping[str, float] = field(default_factory=dict)
    rows: dict[int, float] = field(default_factory=dict)
    maybe: Inner | None = None
    either: int | str | None = None
    labels: Literal["all"] | tuple[str, ...] = "all"
    names: tuple[str, ...] = ()
    anything: Any = None


GOOD = {"name": "n", "inner": {"size": 1}}


def refusal(**more: Any) -> str:
    with pytest.raises(BadValue) as caught:
        build(Outer, {**GOOD, **more})
    return str(caught.value)


def test_a_tree_becomes_nested_dataclasses() -> None:
    tree = {
        "name": "n",
        "inner": {"size": 2, "rate": 3},
        "on": True,
        "colour": "green",
        "mode": "slow",
        "pair": [7, "b"],
        "many": [{"size": 0}],
        "table": {"x": 1},
        "rows": {"2": 18.5},
        "maybe": {"size": 4},
        "either": "text",
        "labels": ["flu", "asthma"],
        "anything": [{"free": 1}],
    }
    built = build(Outer, tree)
    assert built == Outer(
        name="n",
        inner=Inner(2, 3.0),
        on=True,
        colour=Colour.GREEN,
        mode="slow",
        pair=(7, "b"),
        many=(Inner(0),),
        table={"x": 1.0},
        rows={2: 18.5},
        maybe=Inner(4),
        either="text",
        labels=("flu", "asthma"),
        anything=[{"free": 1}],
    )
    assert isinstance(built.inner.rate, float)
    assert isinstance(built.table["x"], float)


def test_plain_is_the_inverse_of_build() -> None:
    built = build(Outer, {**GOOD, "rows": {"5": 1.5}, "many": [{"size": 3}], "colour": "green"})
    tree = plain(built)
    assert build(Outer, tree) == built
    assert tree["rows"] == {"5": 1.5}
    assert tree["many"] == [{"size": 3, "rate": 0.5}]
    assert type(tree["colour"]) is str
    assert "maybe" not in tree  # TOML has no null


def test_an_unknown_key_names_the_nearest_and_the_known_ones() -> None:
    message = refusal(colours="red")
    assert message.startswith("unknown key 'colours'; did you mean 'colour'?")
    assert "either, inner, labels" in message


def test_an_unknown_nested_key_names_its_table() -> None:
    assert "unknown key 'sizes' in [inner]; did you mean 'size'?" in refusal(inner={"sizes": 1})
    assert "unknown key 'rat' in [many[1]]; did you mean 'rate'?" in refusal(many=[{"size": 1}, {"size": 1, "rat": 1}])


def test_an_unknown_key_far_from_all_names_no_nearest() -> None:
    assert "did you mean" not in refusal(zzz=1)


def test_a_missing_key_is_named_with_its_place() -> None:
    with pytest.raises(BadValue, match="'name' is missing"):
        build(Outer, {"inner": {"size": 1}})
    assert "'inner.size' is missing" in refusal(inner={})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"name": 1}, "name must be text, got 1 (a whole number)"),
        ({"name": None}, "name must be text, got None"),
        ({"on": 1}, "on must be true or false, got 1 (a whole number)"),
        ({"inner": {"size": True}}, "inner.size must be a whole number, got True (true or false)"),
        ({"inner": {"size": 1.0}}, "inner.size must be a whole number, got 1.0 (a number)"),
        ({"inner": {"size": 1, "rate": True}}, "inner.rate must be a number, got True (true or false)"),
        ({"inner": {"size": 1, "rate": "1"}}, "inner.rate must be a number, got '1' (text)"),
        ({"inner": 3}, "inner must be a table, got 3"),
        ({"colour": "gren"}, "colour must be one of ['red', 'green'], got 'gren'; did you mean 'green'?"),
        ({"mode": "fas"}, "mode must be one of 'fast', 'slow', got 'fas'; did you mean 'fast'?"),
        ({"mode": True}, "mode must be one of"),
        ({"pair": [1]}, "pair must be a list of 2 values, got [1]"),
        ({"pair": ["1", "a"]}, "pair[0] must be a whole number, got '1'"),
        ({"many": {"size": 1}}, "many must be a list"),
        ({"table": [1]}, "table must be a table"),
        ({"table": {"x": "y"}}, "table.x must be a number, got 'y'"),
        ({"either": 1.5}, "either must be a whole number or text, got 1.5"),
        ({"either": True}, "either must be a whole number or text, got True"),
        ({"labels": "al"}, "labels must be 'all' or"),
        ({"labels": [1]}, "labels must be 'all' or"),
        ({"labels": [0, 1]}, "labels must be 'all' or a list of texts: write them in quotes, got [0, 1]"),
        ({"labels": ["a", 1.5]}, "a list of texts: write them in quotes, got ['a', 1.5]"),
        ({"labels": [True, False]}, "a list of texts: write them in quotes, got [True, False]"),
        ({"labels": [date(2024, 1, 1)]}, "a list of texts: write them in quotes"),
        ({"labels": 3}, "labels must be 'all' or a list of texts, got 3"),
        ({"names": [1, 2]}, "names must be a list of texts: write them in quotes, got [1, 2]"),
        ({"name": 3}, "name must be text, got 3 (a whole number): write it in quotes"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_fits(more: dict[str, Any], said: str) -> None:
    assert said in refusal(**more)


def test_a_table_in_a_union_gets_the_message_of_its_dataclass() -> None:
    assert "unknown key 'siz' in [maybe]; did you mean 'size'?" in refusal(maybe={"siz": 1})


def test_the_check_of_a_dataclass_names_its_place() -> None:
    assert refusal(inner={"size": -1}) == "[inner] size must be >= 0, got -1"
    with pytest.raises(BadValue, match=r"^size must be >= 0"):
        build(Inner, {"size": -1})


def test_true_is_no_member_of_a_literal_of_numbers() -> None:
    @dataclass(frozen=True)
    class Choice:
        level: Literal[1, 2]

    Choice.__annotations__["level"] = Literal[1, 2]  # a local class: its annotation is text that nobody can resolve
    assert build(Choice, {"level": 2}) == Choice(2)
    with pytest.raises(BadValue, match="got True"):
        build(Choice, {"level": True})


def test_a_number_as_key_that_is_none_is_a_bad_value() -> None:
    with pytest.raises(BadValue, match="rows must be a whole number, got 'two'"):
        build(Outer, {**GOOD, "rows": {"two": 1.0}})


def test_none_in_a_field_without_default_comes_back() -> None:
    @dataclass(frozen=True)
    class Figure:
        epsilon: float | None
        delta: float

    Figure.__annotations__.update(epsilon=float | None, delta=float)
    assert plain(Figure(None, 1e-5)) == {"delta": 1e-5}
    assert build(Figure, {"delta": 1e-5}) == Figure(None, 1e-5)
    with pytest.raises(BadValue, match="'delta' is missing"):
        build(Figure, {"epsilon": 1.0})


@dataclass(frozen=True)
class Ranged:
    count: Count = 1
    rate: Positive = 0.5
    share: Share = 1.0
    limit: Count | None = None

    def __post_init__(self) -> None:
        in_range(self, "table")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"count": 0}, r"^table.count must be at least 1, got 0$"),
        ({"rate": 0.0}, r"^table.rate must be finite and above 0, got 0.0$"),
        ({"rate": float("inf")}, r"^table.rate must be finite and above 0, got inf$"),
        ({"rate": float("nan")}, r"^table.rate must be finite and above 0, got nan$"),
        ({"share": 0.0}, r"^table.share must lie in \(0, 1\], got 0.0$"),
        ({"share": 1.01}, r"^table.share must lie in \(0, 1\], got 1.01$"),
        ({"limit": 0}, r"^table.limit must be at least 1, got 0$"),
    ],
)
def test_a_number_out_of_the_range_of_its_type_is_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(BadValue, match=told):
        Ranged(**given)
    with pytest.raises(BadValue, match=told):
        build(Ranged, given)


def test_numbers_in_range_and_none_pass() -> None:
    assert build(Ranged, {"count": 1, "rate": 1e-9, "share": 1, "limit": 5}) == Ranged(1, 1e-9, 1.0, 5)
    assert Ranged().limit is None
