"""The arms of a run in words: their method, and what each sets otherwise than the scenario."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedsynth.federation.strategy import RoundStrategy, load_strategy
from fedsynth.scenario.keys import keys, meanings
from fedsynth.scenario.schema import Scenario
from fedsynth.scenario.toml import cells
from fedsynth.typed import BadValue


def arm_words(scenario: Scenario) -> dict[str, str]:
    """By arm, one line: the first line of its strategy's docstring, and each value that the arm overrides with its
    meaning, from the docstring that documents the key.

    A strategy that cannot be imported here is named instead.

    Args:
        scenario: The run's scenario.
    """
    known = {key.name: key.meaning for key in keys()}
    found = {}
    for cell in cells(scenario):
        own = cell.scenario.strategy
        method: type[RoundStrategy[Any]] | None = None
        try:
            method, options = load_strategy(own)
        except BadValue:
            words, said = own.use.rpartition(":")[2], dict[str, str]()
        else:
            words = (method.__doc__ or method.__name__).strip().partition("\n")[0].removesuffix(".")
            said = {f"strategy.{name}": text for name, text in meanings(type(options)).items()}
        overrides = dict(_flat(scenario.arms.get(cell.arm, {})))
        overrides.pop("strategy.use", None)
        told = [_setting(key, value, (said | known).get(key, "")) for key, value in overrides.items()]
        found[cell.arm] = f"{words}; {'; '.join(told)}" if told else words
    return found


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _setting(key: str, value: Any, meaning: str) -> str:
    """A key and its value, with the value's own meaning if the key's says it: "`value`: ..." or "`value` (...)"."""
    shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    words = f"{key} = {shown}"
    if not isinstance(value, str):
        return words
    after = re.search(rf"`{re.escape(value)}`(?: \(([^()]*)\)|(?::| is) (.*?)(?:[.;] |[.;]?$))", meaning)
    return f"{words} ({(after[1] or after[2]).replace('`', '')})" if after else words
