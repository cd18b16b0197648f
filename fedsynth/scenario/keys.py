"""Every key of a scenario, with its default and meaning, read from the dataclasses that check it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fedsynth.scenario.schema import Scenario, StrategyChoice


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: Dotted name, as in TOML and for `--set`.
        kind: The values that it takes.
        default: The default as TOML; "-" for a required key, "" if `meaning` explains a key that is left out.
        meaning: One or two sentences.
    """

    name: str
    kind: str
    default: str
    meaning: str


def keys(kind: type = Scenario, table: str = "") -> Iterator[Key]:
    """The keys of a table and of the tables in it, in the order of the code."""
    hints, said = typing.get_type_hints(kind), _attributes(kind)
    for field in dataclasses.fields(kind):
        name = f"{table}{field.name}"
        inner = next((o for o in _options(hints[field.name]) if dataclasses.is_dataclass(o)), None)
        if inner is StrategyChoice:
            yield Key(
                "strategy.use",
                "text",
                "-",
                "The strategy's class, as module:Class. A module without a package is looked for beside the scenario "
                "and in the working directory before it is imported, and a run keeps the path of its file. All other "
                "keys of the table are its options (docs/methods, docs/your-own-strategy.md).",
            )
        elif inner is not None and field.name not in ("llm", "professional"):
            yield from keys(typing.cast(type, inner), f"{name}.")
        else:
            yield Key(name, _kind(hints[field.name]), _default(field), said.get(field.name) or _first_line(kind))


def _attributes(kind: type) -> dict[str, str]:
    """The entries of a docstring's `Attributes:`."""
    _, _, listed = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", listed, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _options(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(hint) for option in _options(part)]
    return [hint]


def _kind(hint: Any) -> str:
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    shown = []
    for option in _options(hint):
        origin = typing.get_origin(option)
        if option is type(None):
            continue
        if origin is typing.Literal:
            shown.append(" or ".join(f'"{value}"' for value in typing.get_args(option)))
        elif origin is tuple:
            shown.append("list")
        elif origin in (dict, Mapping) or dataclasses.is_dataclass(option):
            shown.append("table")
        elif isinstance(option, type) and issubclass(option, Enum):
            shown.append(" or ".join(f'"{member.value}"' for member in option))
        else:
            shown.append(names.get(option, "value"))
    return " or ".join(dict.fromkeys(shown))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return ""
    if field.default is dataclasses.MISSING:
        return "-"
    value = field.default
    if value is None or value == () or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return f'"{value.value}"'
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)


HEAD = """# Every key of a scenario

Made by `fedsynth scenarios --keys` from the code that checks them. Dotted names stand for tables:
`client.budget.epsilon` is the key `epsilon` in `[client.budget]`, and works for `--set`. An arm (`[arms.NAME]`) may
override any of them; one that names another `strategy.use` takes none of the options of `[strategy]`, and starts from
that strategy's defaults. Unknown keys are refused. A default of `-` has to be given; an empty one is explained by the
text."""


def page() -> str:
    """The text of `docs/scenario.md`."""
    lines = [HEAD, "", "| key | takes | default | meaning |", "|---|---|---|---|"]
    cell = "| `{}` | {} | {} | {} |"
    for key in keys():
        default = f"`{key.default}`" if key.default not in ("", "-") else key.default
        lines.append(cell.format(key.name, key.kind.replace("|", "\\|"), default, key.meaning.replace("|", "\\|")))
    return "\n".join(lines) + "\n"
