"""Figures for trackers: TensorBoard's event files during a run; MLflow and Weights & Biases after it."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pandas as pd
from tensorboardX import SummaryWriter

from fedsynth.scenario.schema import Scenario
from fedsynth.typed import BadValue, plain

EXTRAS = ("mlflow", "wandb")
SERVER = -1


@contextmanager
def event_files(folder: Path) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """TensorBoard's scalars of one cell: a function that takes a round and its figures by name.

    Args:
        folder: Gets an event file, beside those of earlier attempts of the same cell.
    """
    writer = SummaryWriter(str(folder))

    def tell(round: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, round)
        writer.flush()

    try:
        yield tell
    finally:
        writer.close()


def figures(rows: Iterable[tuple[str, int, int, int, str, float]], round: int) -> dict[str, float]:
    """By metric, the mean over clients of a round; the server's own figures as they are."""
    found: dict[str, list[float]] = defaultdict(list)
    for _, _, at, client, metric, value in rows:
        if at == round:
            found[f"server/{metric}" if client == SERVER else metric].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def check(trackers: Sequence[str]) -> None:
    """Checks the trackers' names before a run.

    Raises:
        BadValue: If one is not known, or not installed.
    """
    for name in trackers:
        if name not in EXTRAS:
            raise BadValue(
                f"--track knows {' and '.join(EXTRAS)}, not {name!r}; TensorBoard's files are always written"
            )
        if importlib.util.find_spec(name) is None:
            raise BadValue(f"--track {name} needs the package {name}: pip install 'fedsynth[{name}]'")


def tell(trackers: Sequence[str], scenario: Scenario, metrics: pd.DataFrame, out: Path) -> None:
    """Sends a run's figures, by arm and seed, to trackers; each is configured as its own documentation says.

    Args:
        trackers: Names in `EXTRAS`.
        scenario: The run's scenario.
        metrics: The tidy frame of the run.
        out: The run's directory, logged as a parameter.
    """
    for key, own in metrics.groupby(["arm", "seed"]):
        arm, seed = cast("tuple[str, int]", key)
        rows: list[Any] = [tuple(row) for row in own.itertuples(index=False)]
        by_round = {int(number): figures(rows, int(number)) for number in sorted(own["round"].unique())}
        name, parameters = f"{scenario.name}/{arm}/{seed}", {"arm": arm, "seed": int(seed), "out": str(out)}
        parameters |= _flat({**plain(scenario), "arms": plain(scenario.arms.get(str(arm), {}))})
        for tracker in trackers:
            {"mlflow": _to_mlflow, "wandb": _to_wandb}[tracker](scenario.name, name, parameters, by_round)


def _to_mlflow(
    project: str, name: str, parameters: Mapping[str, Any], by_round: Mapping[int, Mapping[str, float]]
) -> None:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.set_experiment(project)
    with mlflow.start_run(run_name=name):
        mlflow.log_params({key: str(value)[:500] for key, value in parameters.items()})
        for number, told in by_round.items():
            mlflow.log_metrics(dict(told), step=number)


def _to_wandb(
    project: str, name: str, parameters: Mapping[str, Any], by_round: Mapping[int, Mapping[str, float]]
) -> None:
    wandb: Any = importlib.import_module("wandb")
    run = wandb.init(project=project, name=name, config=dict(parameters))
    for number, told in by_round.items():
        run.log(dict(told), step=number)
    run.finish()


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{above}.{key}" if above else key
        found |= _flat(value, path) if isinstance(value, Mapping) else {path: value}
    return found
