"""All that a value holds, as text to search: the `repr` of a corpus shows none of its texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def spelled(value: Any) -> str:
    """The `repr` of every part of a value, through dataclasses, mappings and sequences."""
    if is_dataclass(value) and not isinstance(value, type):
        return " ".join([type(value).__name__, *(spelled(getattr(value, field.name)) for field in fields(value))])
    if isinstance(value, Mapping):
        return " ".join(f"{spelled(key)} {spelled(each)}" for key, each in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return " ".join(map(spelled, value))
    return repr(value)
