"""`fedsynth site model`: what runs left at a site is measured on its own test rows, and answers its texts."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from fedsynth.clients.evaluate import answers, evaluate
from fedsynth.clients.home import Home
from fedsynth.clients.kept import Kept, all_kept
from fedsynth.clients.policy import Place
from fedsynth.sources import read
from fedsynth.tables import load_columns
from fedsynth.typed import BadValue


def models(place: Place, run: str = "") -> list[tuple[Path, Kept]]:
    """The models that runs left, oldest first.

    Args:
        place: The site.
        run: How the run's id starts; any if empty.

    Raises:
        BadValue: If there is none.
    """
    found = [(folder, kept) for folder, kept in all_kept(place.state) if kept.run.startswith(run)]
    if not found:
        raise BadValue(f"no run {run!r} left a model in {place.state}: `fedsynth site model` without --run lists all"
                       if run else f"no run has left a model in {place.state} yet")  # fmt: skip
    return found


def measured(place: Place, folder: Path, kept: Kept) -> tuple[dict[str, float], int]:
    """A model's figures on the site's test rows, and how many those are; nothing leaves the site.

    Raises:
        BadValue: If the site's data cannot be read.
    """
    if place.site.data.test is None:
        return {}, 0
    found = evaluate(_home(place, folder, kept))
    return dict(found.metrics), found.examples


def answer_file(place: Place, folder: Path, kept: Kept, texts: Path, column: str, out: Path) -> int:
    """Writes what a model answers to each text of a file: columns `column` and `answer`.

    Args:
        place: The site.
        folder: Of the model.
        kept: What is known of it.
        texts: CSV, JSONL or Parquet.
        column: Of the texts.
        out: CSV; new, readable for its owner alone: texts may be private.

    Returns:
        Number of texts.

    Raises:
        BadValue: If the texts cannot be read, one is missing, or `out` is there already.
    """
    if out.suffix.lower() != ".csv" or out.exists():
        raise BadValue(f"--out must name a new .csv file, got {str(out)!r}"
                       + (", which is there already" if out.exists() else ""))  # fmt: skip
    try:
        found: list[object] = load_columns(texts, [column])[column].tolist()
    except BadValue as problem:
        raise BadValue(f"{texts}: {problem}") from problem
    asked = [text for text in found if isinstance(text, str) and text.strip()]
    if len(asked) < len(found):
        row = next(i for i, text in enumerate(found) if not (isinstance(text, str) and text.strip()))
        raise BadValue(f"{texts}: row {row + 1} has no text in column {column!r}; {len(found) - len(asked)} in all")
    said = answers(_home(place, folder, kept), asked)
    with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        pd.DataFrame({column: asked, "answer": said}).to_csv(file, index=False)
    return len(asked)


def _home(place: Place, folder: Path, kept: Kept) -> Home:
    data = place.site.data
    os.environ |= place.cards  # before PyTorch looks for GPUs
    return Home(
        index=0,
        config=kept.config,
        labels=kept.labels,
        records=data.records,
        rounds=1,
        unit="row" if data.person is None else "person",
        work=folder,
        run=kept.run,
        ledger=place.open_ledger(),
        open=lambda: read(data, place.folder),
        simulated=False,
    )
