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

# The place of an old key, and its new name in the same table.
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

# What earlier versions wrote where nobody had set a key that is gone now, and the way out where somebody had.
REMOVED: Mapping[Sequence[str], tuple[object, str]] = {
    ("client", "task_training", "continued_rate"): (1.0, "a task model learns at its learning_rate throughout"),
    ("participation", "speed_tiers"): ([], "participation.dropout stands for slow clients, too"),
}


class OldName(FutureWarning):
    """A key stands under its old name."""


def with_new_names(tree: Mapping[str, Any], renamed: Mapping[Sequence[str], str]) -> dict[str, Any]:
    """A table in which keys stand under their new names.

    Args:
        tree: Of a TOML parser; left as it is.
        renamed: The place of an old key, and its new name.

    Raises:
        BadValue: If a key stands there under both names.
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
    """A scenario's table, or an arm's, without keys that earlier versions wrote and that said nothing.

    Raises:
        BadValue: If one says something.
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
        tree: Of a TOML parser.
        method: What the scenario names as `strategy.use`, where the table itself names none.

    Raises:
        BadValue: If a key stands under both of its names, or one that is gone says something.
    """
    method = str(_at(tree, ("strategy", "use")) or method)
    options = RENAMED_OPTIONS if method.startswith(OWN_METHODS) else {}
    return with_new_names(without_removed(tree), {**RENAMED, **options})


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    """What stands at a path of tables; None if nothing does."""
    found: Any = tree
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _copied(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The table at a path, which from now on is the tree's own, as are those above it."""
    for name in path:
        tree[name] = tree = dict(tree[name])
    return tree
