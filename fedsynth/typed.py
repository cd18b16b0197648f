"""Plain JSON or TOML values to typed frozen dataclasses and back; errors name the key and the way out."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, time
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union

T = TypeVar("T")
MAX_DIGITS = 40  # digits of a whole number: a seed has 10, and int -> float overflows beyond 308


class BadValue(ValueError):
    """A value does not fit its declared type; the message names the key, the value and what fits."""


class UnknownKey(BadValue):
    """A table has a key that its dataclass has no field for.

    Attributes:
        key: The key, without its table.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class MissingKey(BadValue):
    """A table lacks a key that has no default.

    Attributes:
        key: The key, dotted, with its table.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Range:
    """The allowed values of a number, as `Annotated[int, Range(...)]`; `in_range` checks it and names it."""

    says: str
    holds: Callable[[float], bool]


Count: TypeAlias = Annotated[int, Range("be at least 1", lambda value: value >= 1)]
Positive: TypeAlias = Annotated[float, Range("be finite and above 0", lambda value: value > 0 and math.isfinite(value))]
Share: TypeAlias = Annotated[float, Range("lie in (0, 1]", lambda value: 0 < value <= 1)]


def toml_table(text: str) -> dict[str, Any]:
    """The table of a TOML text.

    Raises:
        BadValue: If it is not TOML, or holds a number or nesting that Python's reader gives up on.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        raise BadValue(f"not TOML: {problem}") from problem


@contextmanager
def toml_file(path: Path, missing: str = "") -> Iterator[dict[str, Any]]:
    """The table of a TOML file. A `BadValue` raised in the `with` statement gets the file's name.

    Args:
        path: The file.
        missing: The way out if the file does not exist, for the message.

    Raises:
        BadValue: If it cannot be read, is not TOML, or the body of the `with` statement raises one.
    """
    try:
        table = toml_table(path.read_text(encoding="utf-8"))
    except OSError as problem:
        way_out = f"; {missing}" if missing and isinstance(problem, FileNotFoundError) else ""
        raise BadValue(f"{path} cannot be read: {problem.strerror}{way_out}") from problem
    except UnicodeDecodeError as problem:
        raise BadValue(f"{path}: not TOML: {problem}") from problem
    except BadValue as problem:
        raise BadValue(f"{path}: {problem}") from problem
    try:
        yield table
    except BadValue as problem:
        raise BadValue(f"{path}: {problem}") from problem


def in_range(values: Any, table: str = "") -> None:
    """Checks every field of a dataclass whose annotation has a `Range`; None, where it is allowed, passes.

    Args:
        values: The dataclass, which calls this from its `__post_init__`.
        table: Its name in a scenario, for messages.

    Raises:
        BadValue: If a field is out of range; the message names the first.
    """
    kind: type = type(values)
    for name, hint in _annotations(kind).items():
        value = getattr(values, name)
        for limit in _ranges(hint):
            if value is not None and not limit.holds(value):
                raise BadValue(f"{table}{'.' if table else ''}{name} must {limit.says}, got {value}")


def _ranges(hint: Any) -> list[Range]:
    """The ranges of an annotation, also of `... | None`."""
    found = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    if typing.get_origin(hint) in (Union, types.UnionType):
        found += [limit for option in typing.get_args(hint) for limit in _ranges(option)]
    return found


@cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def build(kind: type[T], value: object, key: str = "") -> T:
    """`value` as an instance of `kind`: a frozen dataclass whose fields may nest.

    >>> build(tuple[float, ...], [1, 0.5])
    (1.0, 0.5)
    >>> build(dict[str, int], {"steps": "many"}, "client")
    Traceback (most recent call last):
    fedsynth.typed.BadValue: client.steps must be a whole number, got 'many' (text)

    Args:
        kind: A dataclass, or any annotation made of dataclasses, tuples, mappings, literals, enums, scalars, unions.
        value: The output of a JSON or TOML parser.
        key: Dotted name of the place, for messages.

    Raises:
        BadValue: If a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    return typing.cast(T, _build(kind, value, key))


def _build(kind: Any, value: Any, key: str) -> Any:
    if kind is Any or kind is object:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _build_union(args, value, key)
    if origin is Literal:
        if value not in args or isinstance(value, bool) != isinstance(args[0], bool):
            raise BadValue(f"{key} must be one of {', '.join(map(repr, args))}, got {value!r}{nearest(value, args)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BadValue(f"{key} must be a list, got {value!r}")
        if unquoted := _unquoted(kind, value):
            raise BadValue(f"{key} must be {_name(kind)}{unquoted}, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_build(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise BadValue(f"{key} must be a list of {len(args)} values, got {value!r}")
        return tuple(_build(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise BadValue(f"{key} must be a table, got {value!r}")
        return {
            _build(args[0], _from_text(args[0], k), key): _build(args[1], v, f"{key}.{k}") for k, v in value.items()
        }
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, key)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            names = [m.value for m in kind]
            raise BadValue(f"{key} must be one of {names}, got {value!r}{nearest(value, names)}") from None
    return _build_scalar(kind, value, key)


def _build_scalar(kind: Any, value: Any, key: str) -> Any:
    if kind is type(None):
        if value is not None:
            raise BadValue(f"{key} must be left out, got {value!r}")
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadValue(f"{key} must be {_name(kind)}, got {value!r} ({_name(type(value))}){_unquoted(kind, value)}")
    return value


def _build_union(options: tuple[Any, ...], value: Any, key: str) -> Any:
    problems: list[BadValue] = []
    for option in options:
        try:
            return _build(option, value, key)
        except BadValue as refusal:
            problems.append(refusal)
    # A table was meant as the dataclass among the options: its own message says more than "fits none".
    for option, problem in zip(options, problems, strict=True):
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            raise problem
    wanted = " or ".join(_name(o) for o in options if o is not type(None))
    unquoted = next(filter(None, (_unquoted(option, value) for option in options if option is not str)), "")
    raise BadValue(f"{key} must be {wanted}{unquoted}, got {value!r}")


def _unquoted(kind: Any, value: Any) -> str:
    """The way out where a number, a date or true stands in place of text; "" elsewhere."""
    if kind is str and isinstance(value, bool | int | float | date | time):
        return ": write it in quotes"
    if (
        typing.get_args(kind) == (str, ...)
        and isinstance(value, list | tuple)
        and any(_unquoted(str, v) for v in value)
    ):
        return ": write them in quotes"
    return ""


def _build_dataclass(kind: type, value: Any, key: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise BadValue(f"{key or kind.__name__} must be a table, got {value!r}")
    hints = _hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for name in value:
        if name not in fields:
            place = f" in [{key}]" if key else ""
            known = ", ".join(sorted(fields))
            raise UnknownKey(str(name), f"unknown key {name!r}{place}{nearest(name, fields)}; known: {known}")
    given = {n: _build(hints[n], v, f"{key}.{n}" if key else n) for n, v in value.items()}
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            if type(None) in typing.get_args(hints[name]):
                given[name] = None  # `plain` leaves it out
                continue
            missing = (key + "." if key else "") + name
            raise MissingKey(missing, f"key {missing!r} is missing")
    try:
        return kind(**given)
    except BadValue:
        raise
    except ValueError as problem:
        raise BadValue(f"[{key}] {problem}" if key else str(problem)) from problem


def _from_text(kind: Any, key: Any) -> Any:
    """A text key as the number it stands for, as JSON and TOML have text keys only; beyond MAX_DIGITS it stays text."""
    number = kind is int and isinstance(key, str) and len(key) <= MAX_DIGITS and key.removeprefix("-").isdecimal()
    return int(key) if number else key


def _name(kind: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        dict: "a table",
        list: "a list",
    }
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a list of texts" if typing.get_args(kind)[0] is str else "a list"
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def nearest(name: object, known: typing.Iterable[object]) -> str:
    """The question whether the closest of the known names was meant, to be added to a message; "" if none is close.

    >>> nearest("epsilom", ["epsilon", "delta"])
    "; did you mean 'epsilon'?"
    """
    if len(given := str(name)) > 100:  # no slip of the pen, and comparing takes long
        return ""
    close = difflib.get_close_matches(given, [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def plain(value: object) -> Any:
    """The inverse of `build`: dataclasses become dicts, tuples lists, enums their values; None fields are left out."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init)
        return {name: plain(v) for name, v in pairs if v is not None}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def visible(text: str) -> str:
    """A text of another party on one line, without characters that control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
