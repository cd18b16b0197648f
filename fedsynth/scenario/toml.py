"""Scenarios as TOML: read, overridden by arms and by `--set`, resolved to cells, written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tomli_w

from fedsynth.scenario.earlier_keys import as_of_now
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.typed import BadValue, MissingKey, UnknownKey, build, nearest, plain, toml_file, toml_table


def from_tree(tree: Mapping[str, Any]) -> Scenario:
    """A scenario from a TOML parser's output; arms and `quick` are resolved once to check their keys, too."""
    tree = as_of_now(tree)
    choice = tree.get("strategy")
    method = str(choice.get("use", "")) if isinstance(choice, Mapping) else ""
    if isinstance(arms := tree.get("arms"), Mapping):
        tree["arms"] = {n: as_of_now(arm, method) if isinstance(arm, Mapping) else arm for n, arm in arms.items()}
    if isinstance(choice, Mapping):
        choice = dict(choice)
        tree["strategy"] = {"use": choice.pop("use", ""), "options": choice}
    try:
        scenario = build(Scenario, tree)
    except UnknownKey as problem:
        raise BadValue(f"{problem}{elsewhere(problem.key)}") from problem
    except MissingKey as problem:
        raise BadValue(f"{problem}{_needed(problem.key)}") from problem
    for arm, overrides in scenario.arms.items():
        try:
            _override(scenario, overrides)
        except BadValue as problem:
            raise BadValue(f"[arms.{arm}] {problem}") from problem
    if scenario.quick:
        try:
            from_tree(_quick(_tree(scenario)))
        except BadValue as problem:
            raise BadValue(f"[quick] {problem}") from problem
    return scenario


def elsewhere(key: str) -> str:
    """Where a key stands whose table was left out or taken for another one, to be added to a message; "" for no key.

    >>> elsewhere("epsilon")
    "; 'epsilon' stands in client.budget.epsilon"
    """
    from fedsynth.scenario.keys import keys

    found = [each.name for each in keys() if each.name.endswith(f".{key}")]
    tables = [each.name.partition(f".{key}.")[0] + f".{key}" for each in keys() if f".{key}." in each.name]
    found = list(dict.fromkeys([*found, *tables]))
    return f"; {key!r} stands in {' or '.join(found)}" if found else ""


def _needed(missing: str) -> str:
    """What to write for a key or table that is missing, to be added to a message.

    >>> _needed("server")
    "; write server.llm = text or table"
    """
    from fedsynth.scenario.keys import keys

    own = [k for k in keys() if missing in (k.name, k.name.rpartition(".")[0]) and k.default == "-"]
    return f"; write {', '.join(f'{k.name} = {k.kind}' for k in own)}" if own else ""


def to_toml(scenario: Scenario) -> str:
    """The inverse of `from_toml`."""
    return tomli_w.dumps(_tree(scenario))


def from_toml(text: str, where: str = "scenario") -> Scenario:
    """A scenario from TOML text.

    Raises:
        BadValue: If the text is not valid; the message names the place and the reason.
    """
    try:
        return from_tree(toml_table(text))
    except BadValue as problem:
        raise BadValue(f"{where}: {problem}") from problem


def load(name: str | Path, sets: Sequence[str | Mapping[str, Any]] = (), *, quick: bool = False) -> Scenario:
    """A scenario from a file, or a shipped one by name.

    Args:
        name: Path of a TOML file, or the name of a shipped scenario such as "hospitals".
        sets: Overrides `key=value`, the key dotted, the value in TOML (bare text is taken as text); or tables, whose
            keys may be dotted.
        quick: The scenario's smaller run, with its table `quick` in force; `sets` override that as well.

    Raises:
        BadValue: If there is no such scenario, it has no smaller run, or it is not valid; the message names file, key
            and the nearest valid key.
    """
    path = _place(name)
    with toml_file(path) as tree:
        return resolved(tree, sets, path.parent, quick=quick)


def resolved(
    declared: Scenario | Mapping[str, Any],
    sets: Sequence[str | Mapping[str, Any]] = (),
    folder: Path = Path(),
    *,
    quick: bool = False,
) -> Scenario:
    """A scenario with overrides in force and absolute paths.

    Args:
        declared: A scenario, or the table of a TOML file.
        sets: As for `load`.
        folder: Relative paths are looked up here before the working directory.
        quick: As for `load`.

    Raises:
        BadValue: If it is not valid.
    """
    tree = _tree(declared) if isinstance(declared, Scenario) else declared
    if quick:
        tree = _quick(tree)
    for item in sets:
        tree = _merge(tree, _parse_set(item) if isinstance(item, str) else _nested(item))
    tree = _with_absolute_paths(tree, folder)
    arms = {name: _with_absolute_paths(over, folder) for name, over in _table(tree, "arms").items()}
    return from_tree({**tree, "arms": arms} if arms else tree)


def _place(name: str | Path) -> Path:
    path = Path(name)
    shipped = {p.name.removesuffix(".toml"): p for p in shipped_scenarios()}
    if str(name) in shipped:
        return shipped[str(name)]
    if path.suffix == ".toml":
        if not path.is_file():
            there = [str(path.parent / found.name) for found in path.parent.glob("*.toml")]
            raise BadValue(f"no scenario file {str(path)!r}{nearest(path, [*there, *shipped])}")
        return path
    if path.suffix.lower() in DATA_FILES:
        raise BadValue(f"{str(name)!r} is a data file, no scenario: `fedsynth init {name}` writes one for it")
    if (path / "scenario.toml").is_file():
        raise BadValue(f"{str(name)!r} is the directory of a run: repeat it with --from, go on with it with --resume")
    near = nearest(name, [*shipped, *(found.name for found in Path().glob("*.toml"))])
    raise BadValue(
        f"no scenario {str(name)!r}{near or ': give a .toml file'}; shipped are {', '.join(sorted(shipped))}"
    )


DATA_FILES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")


def _table(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = tree.get(key)
    return found if isinstance(found, Mapping) else {}


PATHS = (
    ("data", "source"),
    ("client", "generator"),
    ("client", "task_model"),
    ("client", "task_models"),
    ("client", "embedder"),
    ("server", "llm"),
    ("server", "adapter"),
    ("server", "professional"),
    ("server", "embedder"),
    ("server", "public"),
)
TEXTS = (("data", "source"), ("server", "public"))


def _with_absolute_paths(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A table with absolute paths of files and folders beside the scenario, in the working directory, or (data) in
    FEDSYNTH_DATA.

    Flower's processes have other working directories, where relative paths would lead elsewhere. A name that is found
    nowhere stays as it is: a shipped model, a Hugging Face name, or an error that the check before a run reports.
    """
    found = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}

    def absolute(name: object, *, text: bool) -> object:
        if not isinstance(name, str) or not name or ":" in name:
            return name
        places = [folder / name, Path(name)]
        if text and (shared := os.environ.get("FEDSYNTH_DATA")):
            places.append(Path(shared) / name)
        # Text may be a file or a saved data set; a file goes first.
        there = [p for p in places if text and p.is_file()] or [p for p in places if p.is_dir()]
        return str(there[0].absolute()) if there else name

    for table, key in PATHS:
        if key not in _table(found, table):
            continue
        named, text = found[table][key], (table, key) in TEXTS
        several = isinstance(named, list)
        found[table][key] = [absolute(n, text=text) for n in named] if several else absolute(named, text=text)
    if isinstance(use := _table(found, "strategy").get("use"), str):
        found["strategy"]["use"] = _with_its_file(use, folder)
    if isinstance(test := _table(found, "server").get("public_test"), Mapping):
        found["server"]["public_test"] = {**test, "source": absolute(test.get("source"), text=True)}
    return found


def _with_its_file(use: str, folder: Path) -> str:
    """A strategy `mine:Mine` as `/absolute/mine.py:Mine`, where that file is beside the scenario or in the working
    directory: Flower's processes have other working directories.

    Raises:
        BadValue: If there is neither such a file nor a module of this name to import.
    """
    module, colon, name = use.partition(":")
    file = f"{module.removesuffix('.py')}.py"
    if not (module and colon) or Path(module).is_absolute() or ("." in module and file != module):
        return use  # in a package, in a run's scenario, or no name at all
    for place in (folder, Path()):
        if (place / file).is_file():
            return f"{(place / file).absolute()}:{name}"
    try:
        known = file != module and find_spec(module) is not None
    except (ImportError, ValueError):
        known = False
    if known:
        return use
    places = " or ".join(dict.fromkeys(repr(str(place.absolute())) for place in (folder, Path())))
    raise BadValue(
        f"strategy.use: no strategy {use!r}: there is no {file} in {places}, and PYTHONPATH leads to no module of that "
        "name; put the file beside the scenario, or write one with `fedsynth strategy new`"
    )


def shipped_scenarios() -> Iterator[Path]:
    """The scenario files that come with the package."""
    folder = Path(str(resources.files("fedsynth"))) / "app" / "scenarios"  # app is no package: a folder of data
    yield from sorted(folder.glob("*.toml"))


def cells(scenario: Scenario) -> list[Cell]:
    """Every arm that runs, under every seed, resolved. Without arms: the scenario itself, named after its strategy."""
    if not scenario.arms:
        arm = scenario.strategy.use.rpartition(":")[2].lower()
        return [Cell(arm, seed, scenario) for seed in scenario.seeds]
    arms = scenario.run or tuple(scenario.arms)
    resolved = {arm: _override(scenario, scenario.arms[arm]) for arm in arms}
    return [Cell(arm, seed, resolved[arm]) for seed in scenario.seeds for arm in arms]


def _override(scenario: Scenario, overrides: Mapping[str, Any]) -> Scenario:
    for key in ("name", "seeds", "arms", "run", "quick"):
        if key in overrides:
            raise BadValue(f"{key!r} belongs to the whole scenario, an arm cannot override it")
    tree = _tree(scenario)
    for key in ("arms", "run", "quick"):
        tree.pop(key, None)
    return from_tree(_merge(tree, overrides))


def _quick(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A scenario's tree with its table `quick` in force, and without it.

    Raises:
        BadValue: If it has none, or `quick` changes what names a run or its arms.
    """
    small = _table(tree, "quick")
    if not small:
        raise BadValue("--quick: the scenario has no [quick] table, which says what a smaller run leaves out")
    for key in ("name", "seeds", "arms", "quick"):
        if key in small:
            raise BadValue(f"{key!r} belongs to the whole scenario, `quick` cannot override it")
    return _merge({key: value for key, value in tree.items() if key != "quick"}, small)


def _tree(scenario: Scenario) -> dict[str, Any]:
    tree: dict[str, Any] = plain(scenario)
    tree["strategy"] = {"use": scenario.strategy.use, **tree["strategy"]["options"]}
    return tree


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """`over` on top of `base`, table by table; options of a strategy or split go if `over` names another one."""
    merged = dict(base)
    if key == "data" and "split" in over and over["split"] != base.get("split"):
        merged = {name: value for name, value in merged.items() if name not in ("alpha", "classes_per_client")}
    if key == "strategy" and "use" in over and over["use"] != base.get("use"):
        merged = {}
    moves = "endpoint" in over and over["endpoint"] != base.get("endpoint")
    if key in ("server.llm", "server.professional") and moves:
        merged = {}  # above all key_env: one server's key must not reach another
    for name, value in over.items():
        old = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[name] = _merge(old, value, name if not key else f"{key}.{name}") if both else value  # type: ignore[arg-type]  # `both` narrows no type
    return merged


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """A table with dotted keys as tables within tables."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        found = _merge(found, value)
    return found


def _parse_set(item: str) -> dict[str, Any]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise BadValue(f"--set needs key=value, got {item!r}")
    try:
        return toml_table(f"{key.strip()} = {value.strip()}")
    except BadValue:
        text = tomli_w.dumps({"v": value.strip()}).partition("=")[2].strip()  # a string without its quotes
    try:
        return toml_table(f"{key.strip()} = {text}")
    except BadValue as problem:
        why = str(problem).removeprefix("not TOML: ")
        raise BadValue(f"--set {item!r}: {key.strip()!r} is no TOML key ({why})") from problem
