"""Keys of earlier versions: a renamed one is read for one version, with a warning; a removed one is refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from fedsynth.typed import BadValue

_DP_TRAINING = {
    "expected_batch": "expected_batch_size",
    "microbatch": "max_physical_batch_size",
    "learns": "loss_on",
    "max_tokens": "max_length",
}

# An old key's path -> its new name in the same table.
RENAMED: Mapping[Sequence[str], str] = {
    **{("client", "generator_training", old): new for old, new in _DP_TRAINING.items()},
    **{("client", "scorer_training", old): new for old, new in _DP_TRAINING.items()},
    ("client", "task_training", "max_tokens"): "max_length",
    ("server", "answer_seconds"): "timeout",
}
# Options of the methods of this package; another package's method may have options with these names.
RENAMED_OPTIONS: Mapping[Sequence[str], str] = {
    ("strategy", "learns"): "loss_on",
    ("strategy", "max_tokens"): "max_new_tokens",
    ("strategy", "pooled"): "one_to_many",
    ("strategy", "teaching", "tuning", "max_tokens"): "max_length",
    ("strategy", "tuning", "max_tokens"): "max_length",
    ("strategy", "written"): "num_texts",
}
OWN_METHODS = "fedsynth.strategies."

# The default that earlier versions wrote for a removed key, and the way out if a user had set another value.
REMOVED: Mapping[Sequence[str], tuple[object, str]] = {
    ("client", "task_training", "continued_rate"): (1.0, "a task model learns at its learning_rate throughout"),
    ("participation", "speed_tiers"): ([], "participation.dropout stands for slow clients, too"),
}


class OldName(FutureWarning):
    """A key has its old name."""


def with_new_names(tree: Mapping[str, Any], renamed: Mapping[Sequence[str], str]) -> dict[str, Any]:
    """A table in which keys have their new names.

    Args:
        tree: The output of a TOML parser; it stays as it is.
        renamed: An old key's path -> its new name.

    Raises:
        BadValue: If the table has a key under both names.
    """
    found = dict(tree)
    for path, new in renamed.items():
        *above, old = path
        if _at(found, path) is None:
            continue
        place = ".".join(above)
        if _at(found, (*above, new)) is not None:
            raise BadValue(
                f"{place}.{old} is the old name of {place}.{new}: give the new one alone "
                "(one may stand in the file, the other in an arm or in --set)"
            )
        warnings.warn(
            f"{place}.{old} is called {place}.{new} now; the next version refuses the old name", OldName, stacklevel=2
        )
        table = _copied(found, above)
        table[new] = table.pop(old)
    return found


def without_removed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A scenario's table, or an arm's, without removed keys that have the default of earlier versions.

    Raises:
        BadValue: If a removed key has another value.
    """
    found = dict(tree)
    for path, (nothing, instead) in REMOVED.items():
        if (value := _at(found, path)) is None:
            continue
        if value != nothing:
            raise BadValue(f"{'.'.join(path)} is gone: {instead}")
        *above, key = path
        del _copied(found, above)[key]
    return found


def as_of_now(tree: Mapping[str, Any], method: str = "") -> dict[str, Any]:
    """A scenario's table, or an arm's, with the keys of this version.

    Args:
        tree: The output of a TOML parser.
        method: The scenario's `strategy.use`, if the table itself names none.

    Raises:
        BadValue: If a key has both of its names, or a removed key has a value other than its default.
    """
    method = str(_at(tree, ("strategy", "use")) or method)
    options = RENAMED_OPTIONS if method.startswith(OWN_METHODS) else {}
    return with_new_names(without_removed(tree), {**RENAMED, **options})


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The value at a path of tables; None if there is none."""
    found: Any = tree
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _copied(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The table at a path, after it and all tables above it became the tree's own copies."""
    for name in path:
        tree[name] = tree = dict(tree[name])
    return tree
